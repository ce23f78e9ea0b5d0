"""DoRA: the size of each output's weights and their direction, trained apart.

Liu et al. 2024, "DoRA: Weight-decomposed low-rank adaptation" (arXiv 2402.09353), equation 5:

    W' = m * V' / ||V'||,        V' = W0 + s B A        (s, A, B as in LoRA)

m is the *magnitude* and V' / ||V'|| the *direction*. The paper writes ||.||_c, the norm of each
column; PyTorch stores the transpose, W [out, in], so here (as in the authors' code and in peft) it
is the norm of each row: one m for each output. m begins as ||W0||, and B as zero: W' = W0.

Section 4.3 treats ||V'|| as a constant in the backward pass. The forward pass is the same; the
gradient of V' (equation 11 in place of 6) loses its projection, and training needs less memory.
"""

from collections.abc import Collection
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.peft.attach import Wrap
from fewer.peft.lora import (
    LowRankLinear,
    lora_merge,
    lora_output,
    same_linear,
    targets_and_seeds,
)


def row_norm(W: Float[Tensor, "out in"]) -> Float[Tensor, "out"]:
    """||W|| of each output: the root of the sum of squares along `in`.

    Example:
        >>> row_norm(torch.tensor([[3.0, 4.0], [0.0, -2.0]])).tolist()
        [5.0, 2.0]
    """
    return torch.linalg.vector_norm(W, dim=1)


def dora_scale(
    W: Float[Tensor, "out in"],
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    m: Float[Tensor, "out"],
    alpha: float,
    detach_norm: bool = True,
) -> Float[Tensor, "out"]:
    """m / ||V'|| of each output, the number by which DoRA multiplies it; V' = W + s B A.

    Where V' is a row of zeros it has no direction, and the number is m itself.

    Args:
        W, A, B, alpha: as for `lora_merge`.
        m: the magnitudes.
        detach_norm: no gradient flows through ||V'|| (section 4.3), and V' is not kept for it.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> W, m = torch.tensor([[3.0, 4.0]]), torch.tensor([10.0])
        >>> dora_scale(W, torch.zeros(1, 2), torch.zeros(1, 1), m, alpha=1).tolist()
        [2.0]
    """
    if m.shape != W.shape[:1]:
        raise ValueError(f"m must have shape {tuple(W.shape[:1])}, got {tuple(m.shape)}")
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_norm):
        norm = row_norm(lora_merge(W, A, B, alpha))
    return m / torch.where(norm == 0, 1.0, norm)


def dora_weight(
    W: Float[Tensor, "out in"],
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    m: Float[Tensor, "out"],
    alpha: float,
    detach_norm: bool = True,
) -> Float[Tensor, "out in"]:
    """The adapted weight W' = m V' / ||V'||, with V' = W + s B A and the norm of each row.

    s = alpha / r. Where a row of V' is all zeros, so is that of W'.

    Args:
        W: [out, in], the frozen weight.
        A, B: [r, in] and [out, r].
        m: [out], the magnitude of each output's row: the norm that it will have.
        alpha: the numerator of s.
        detach_norm: True lets no gradient through ||V'|| (section 4.3): W' is the same, the
            gradients of A and B are not.

    Returns:
        [out, in].

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> W, A, B = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0]])
        >>> dora_weight(W, A, B, m=torch.tensor([10.0]), alpha=1).tolist()  # [3, 4], made 10 long
        [[6.0, 8.0]]
    """
    scale = dora_scale(W, A, B, m, alpha, detach_norm)
    return scale[:, None] * lora_merge(W, A, B, alpha)


class DoRALinear(LowRankLinear):
    """A frozen linear layer whose weight is used as W' = m V' / ||V'||; m, A and B are trained.

    It trains r (out + in) + out numbers. Arguments are those of `LoRALinear`, and `detach_norm` of
    `dora_weight`.

    Example:
        >>> layer = DoRALinear(nn.Linear(4, 3), rank=2)
        >>> [(name, p.numel()) for name, p in layer.named_parameters() if name in "ABm"]
        [('A', 8), ('B', 6), ('m', 3)]
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        seed: int = 0,
        detach_norm: bool = True,
    ) -> None:
        super().__init__(base, rank, alpha, seed)
        self.detach_norm = detach_norm
        self.m = nn.Parameter(row_norm(self.frozen))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """y = W' x + b, without a W' that would have to be kept for the backward pass.

        Written as the base's own output and a change, y0 + (c - 1) (y0 - b) + c s B A x with
        c = m / ||V'||, so that c = 1 and B = 0 leave every bit as it was.
        """
        scale = dora_scale(self.frozen, self.A, self.B, self.m, self.alpha, self.detach_norm)
        y = self.base(x)
        product = y if self.base.bias is None else y - self.base.bias
        return y + (scale - 1) * product + scale * lora_output(x, self.A, self.B, self.alpha)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A linear layer with the weight W'; on a 4-bit base a float layer, as with LoRA."""
        weight = dora_weight(self.frozen, self.A, self.B, self.m, self.alpha)
        return same_linear(self.base, weight)


def dora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Collection[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    detach_norm: bool = True,
) -> dict[str, Wrap]:
    """DoRA for `attach`; arguments and errors are those of `lora`, and `detach_norm`.

    Example:
        >>> from fewer.models import tiny_llama
        >>> from fewer.peft import attach
        >>> model = tiny_llama()
        >>> attach(model, dora(model, rank=2, targets=["o_proj"])).count()  # LoRA's 192, and 2 * 16
        224
    """

    layer = partial(DoRALinear, rank=rank, alpha=alpha, detach_norm=detach_norm)
    return {name: partial(layer, seed=own) for name, own in targets_and_seeds(model, targets, seed)}
