"""BitFit: train the biases, and nothing else.

Ben Zaken, Ravfogel & Goldberg 2022, "BitFit: Simple parameter-efficient fine-tuning for
transformer-based masked language-models" (arXiv 2106.10199), section 3: of every linear layer and
every normalization, the bias b moves and the weight W stays.

    y = W x + b + b_delta,        b_delta = 0 at the start

The paper trains b itself; training b_delta beside a frozen b is the same, gradient for gradient
(Adam's steps do not depend on where b is), and leaves the model as it was. In a model without
biases, like Llama, b_delta is the only bias there is, and the model's function grows by it.

A BERT layer of width d with an MLP of width 4 d has 11 d biases: 4 d of attention, 4 d + d of the
MLP, 2 d of its two normalizations. In MiniLM these are 0.1% of the parameters.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.models.llama import RMSNorm
from fewer.peft.attach import Wrap


class BitFit(nn.Module):
    """A linear layer or a normalization with a trained bias on top of its output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        weight = base.weight  # of a linear layer [out, in], of a normalization [d]
        assert isinstance(weight, Tensor)
        self.bias = nn.Parameter(torch.zeros_like(weight[..., 0] if weight.ndim == 2 else weight))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.base(x) + self.bias

    def merged(self) -> nn.Module:
        """The module with the sum of both biases.

        Raises:
            TypeError: an RMSNorm has no place for a bias.
        """
        if isinstance(self.base, RMSNorm):
            raise TypeError("an RMSNorm has no bias to merge into")
        merged = copy.deepcopy(self.base)
        assert isinstance(merged, nn.Linear | nn.LayerNorm)
        bias = self.bias if merged.bias is None else merged.bias + self.bias
        merged.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return merged


def bitfit(model: nn.Module) -> dict[str, Wrap]:
    """A bias for every linear layer and every normalization of a model, for `attach`.

    Args:
        model: a `Llama` or a `Bert`. A head that is to be trained whole is no concern of this
            function: pass it the body, or leave the head out of what it returns.

    Example:
        >>> from fewer.models import tiny_llama
        >>> from fewer.peft import attach
        >>> model, tokens = tiny_llama(n_layers=1), torch.tensor([[1, 2, 3]])
        >>> before = model(tokens)
        >>> with attach(model, bitfit(model)) as attached:
        ...     attached.count(), torch.equal(model(tokens), before)
        (192, True)
    """
    kinds = (nn.Linear, nn.LayerNorm, RMSNorm)
    return {name: BitFit for name, module in model.named_modules() if isinstance(module, kinds)}
