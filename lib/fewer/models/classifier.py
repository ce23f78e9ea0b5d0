"""A classifier of texts: a language model as the body, and a linear head on what it says.

For each text the body's last hidden states are brought down to one vector, the features:

    BERT:   mean over the tokens        (Reimers & Gurevych, 2019, arXiv:1908.10084)
    Llama:  the last token's            (Radford et al., 2018, "Improving Language Understanding by
                                        Generative Pre-Training": it alone has seen the whole text)

and logits = head(features).
"""

from jaxtyping import Float, Int
from torch import Tensor, nn

from fewer.models.llama import Llama
from fewer.models.minilm import Bert


class Classifier(nn.Module):
    """Logits of texts: `Classifier(body, nn.Linear(body.config.d_model, classes))`.

    Parameters of the two are named `body.<name>` and `head.<name>`. Nothing is frozen or thawed.

    Args:
        body: a `Bert` or a `Llama`.
        head: maps features [batch, d_model] to logits [batch, classes].

    Raises:
        TypeError: another kind of body, for which it is not said what its features are.

    Example:
        >>> import torch
        >>> from fewer.models import tiny_llama
        >>> classify = Classifier(tiny_llama(), nn.Linear(16, 3))
        >>> classify(torch.tensor([[1, 2, 3], [4, 5, 6]])).shape
        torch.Size([2, 3])
    """

    def __init__(self, body: Bert | Llama, head: nn.Module) -> None:
        super().__init__()
        if not isinstance(body, Bert | Llama):
            raise TypeError(f"body must be a Bert or a Llama, got {type(body).__name__}")
        self.body, self.head = body, head

    def features(self, tokens: Int[Tensor, "batch n"]) -> Float[Tensor, "batch d_model"]:
        """What the head reads, a vector a text.

        Args:
            tokens: token ids of rows of equal length, as the body wants them.
        """
        hidden = self.body.hidden(tokens)
        return hidden.mean(dim=1) if isinstance(self.body, Bert) else hidden[:, -1]

    def forward(self, tokens: Int[Tensor, "batch n"]) -> Float[Tensor, "batch classes"]:
        """The logits of each text's classes."""
        return self.head(self.features(tokens))
