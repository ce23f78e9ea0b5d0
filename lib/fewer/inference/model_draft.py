"""A language model as the draft: a smaller one, or the same one made cheaper.

Leviathan et al. 2023 (arXiv 2211.17192), section 3.6, take a small model of the same family. It has
to have the same vocabulary. `early_exit(model, layers)` makes one of the model's own first layers;
the model with its weights in 4 bits is another (the caller makes it, with the quantization of his
choice).
"""

import torch
from jaxtyping import Int
from torch import Tensor

from fewer.inference.ragged import RaggedCache
from fewer.inference.speculative import Proposal
from fewer.models import Llama, token_probabilities
from fewer.validate import require_int


def common_prefix(a: Int[Tensor, "m"], b: Int[Tensor, "n"]) -> int:
    """How many tokens two texts have in common from the beginning.

    Example:
        >>> common_prefix(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4, 3]))
        2
    """
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).cumprod(0).sum())


class ModelDraft:
    """Proposes what another model says, one token after the other, with a cache of its own.

    What the cache holds and the next text has not (it was rejected) is forgotten; so the draft may
    be asked about any text, but reads least if the texts grow out of each other.

    Args:
        model: of the same vocabulary as the model that judges.
        length: k, tokens to propose.
        temperature, top_p: of the draft, as for `stream`. At temperature 0 it proposes the
            likeliest token, sure of it. Any values leave the result exact; most is accepted if they
            are those of the model that judges.

    Raises:
        TypeError, ValueError: length is not an int of at least 1.

    Example:
        >>> from fewer.models import generate, tiny_llama
        >>> model, text = tiny_llama(), torch.tensor([1, 2, 3])
        >>> ModelDraft(model, length=2)(text).tokens.equal(generate(model, text[None], 2)[0])
        True
    """

    def __init__(
        self, model: Llama, length: int = 4, temperature: float = 0.0, top_p: float = 1.0
    ) -> None:
        self.model, self.length = model, require_int(length, "length", 1)
        self.temperature, self.top_p = temperature, top_p
        self.cache = RaggedCache()
        self.read = torch.zeros(0, dtype=torch.long)

    @torch.no_grad()
    def __call__(
        self, text: Int[Tensor, "tokens"], generator: torch.Generator | None = None
    ) -> Proposal:
        """Read what is new in the text, then go on."""
        known = common_prefix(self.read.to(text.device), text[:-1])  # one must be read at least
        self.cache.crop([known])
        unread, rows = text[known:], []
        proposed = text[:0]
        for _ in range(self.length):
            hidden = self.model.hidden(unread[None], self.cache)[0, -1]
            logits = self.model.logits(hidden)
            if self.temperature:
                rows.append(token_probabilities(logits, self.temperature, self.top_p))
                unread = torch.multinomial(rows[-1], 1, generator=generator)
            else:
                unread = logits.argmax(-1, keepdim=True)
            proposed = torch.cat([proposed, unread])
        self.read = torch.cat([text, proposed[:-1]])
        return Proposal(proposed, torch.stack(rows) if rows else None)
