"""SparsePEFT: an adapter with the zeros of the weight, so that merging keeps them.

Munoz, Yuan & Jain 2024, "SQFT: Low-cost model adaptation in low-precision sparse foundation models"
(arXiv 2410.03750), section 2.3:

    M = (W != 0),        L = (B A) * M,        W' = W + s L

W is a pruned weight. B A has no zeros: LoRA merged into W makes it dense again, and all that
pruning saved is lost. L is zero wherever W is, and so is W'. The price is paid in training, where
the [out, in] matrix L has to be formed: LoRA's way through the narrow middle does not know M.
"""

from collections.abc import Collection
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fewer.peft.attach import Wrap
from fewer.peft.lora import LowRankLinear, lora_delta, same_linear, targets_and_seeds


def sparse_peft_delta(
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    mask: Bool[Tensor, "out in"],
    alpha: float,
) -> Float[Tensor, "out in"]:
    """The masked change of the weight: s (B A) * M, with s = alpha / r.

    Args:
        A, B: [r, in] and [out, r]. The gradients of A and B come from the kept places alone.
        mask: bool, True where the weight is kept (`W != 0`).
        alpha: the numerator of s.

    Returns:
        [out, in], exactly 0 where the mask is False.

    Raises:
        TypeError: mask is not a bool tensor.
        ValueError: shapes that do not fit.

    Example:
        >>> A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [1.0]])
        >>> sparse_peft_delta(A, B, torch.tensor([[True, False], [True, True]]), alpha=2).tolist()
        [[6.0, 0.0], [2.0, 4.0]]
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor such as W != 0, got {mask.dtype}")
    delta = lora_delta(A, B, alpha)
    if mask.shape != delta.shape:
        raise ValueError(
            f"mask must have shape {tuple(delta.shape)} as B A, got {tuple(mask.shape)}"
        )
    return delta * mask


class SparsePEFTLinear(LowRankLinear):
    """A frozen, pruned linear layer with a low-rank change that is zero where the weight is.

    Arguments are those of `LoRALinear`; it trains the same r (out + in) numbers. The mask is read
    off the base at each call: it needs no memory of its own.

    Example:
        >>> pruned = nn.Linear(4, 3)
        >>> pruned.weight.data[:, ::2] = 0
        >>> layer = SparsePEFTLinear(pruned, rank=2)
        >>> _ = layer.B.data.fill_(1.0)
        >>> bool((layer.merged().weight[:, ::2] == 0).all())
        True
    """

    def delta(self) -> Float[Tensor, "out in"]:
        return sparse_peft_delta(self.A, self.B, self.frozen != 0, self.alpha)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.base(x) + F.linear(x, self.delta())

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A linear layer with the weight W + s (B A) * M, which has the zeros of W."""
        return same_linear(self.base, self.frozen + self.delta())


def sparse_peft(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Collection[str] = ("q_proj", "v_proj"),
    seed: int = 0,
) -> dict[str, Wrap]:
    """SparsePEFT for `attach`, on a model whose layers are pruned; arguments are those of `lora`.

    Example:
        >>> from fewer.models import tiny_llama
        >>> from fewer.peft import attach
        >>> model = tiny_llama()
        >>> attach(model, sparse_peft(model, rank=2, targets=["o_proj"])).count()
        192
    """

    return {
        name: partial(SparsePEFTLinear, rank=rank, alpha=alpha, seed=own)
        for name, own in targets_and_seeds(model, targets, seed)
    }
