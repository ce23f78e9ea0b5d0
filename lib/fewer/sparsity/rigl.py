"""RigL: drop the weakest connections, grow where the loss would fall fastest.

Evci, Gale, Menick, Castro & Elsen 2020, "Rigging the lottery: making all tickets winners" (arXiv
1911.11134), section 3 and algorithm 1. Every Delta T steps until T_end, in place of a step of the
optimizer, each layer with the weights theta (`weight`) changes k of its connections:

    f(t)   = alpha/2 (1 + cos(t pi / T_end))
    k      = f(t) (1 - s) N                              (a fraction of the connections)
    I_drop = ArgTopK(-|theta|, k)                        among the connections
    I_grow = ArgTopK(|grad L|, k)                        among all places not in theta \\ I_drop

It differs from SET in the last line alone. The gradient is that of the *dense* layer, taken with
the sparse weights: dL/dtheta for every place, connected or not. It costs a dense backward pass for
the weights, and that only once every Delta T steps (see `flops.py`).

May what was dropped come straight back? The paper excludes only theta \\ I_drop, the connections
that survive; so yes, if its gradient is among the largest. The authors' code does the same, and
leaves such a connection its weight and momentum. Grown ones start at zero, which leaves the
network's function as it is, with their optimizer state at zero (`carry_over` in `set.py`).

The paper's settings for ImageNet: Delta T = 100, alpha = 0.3, T_end = three quarters of the
training.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.sparsity.set import drop_smallest, grow_largest
from fewer.sparsity.validate import require_int, require_mask, require_sparsity


def drop_fraction(t: int, alpha: float, T_end: int) -> float:
    """The fraction of the connections that step t replaces: a half cosine from alpha down to 0.

        f(t; alpha, T_end) = alpha/2 (1 + cos(t pi / T_end)),    0 from T_end on

    Args:
        t: the step, at least 0.
        alpha: the fraction at t = 0, in [0, 1].
        T_end: the step from which the connections stay as they are, at least 1.

    Raises:
        TypeError: t or T_end is not an int.
        ValueError: an argument out of range.

    Example:
        >>> [round(drop_fraction(t, alpha=0.3, T_end=100), 3) for t in (0, 50, 100, 150)]
        [0.3, 0.15, 0.0, 0.0]
    """
    require_int(t, "t", 0)
    require_int(T_end, "T_end", 1)
    require_sparsity(alpha, "alpha")
    return alpha / 2 * (1 + math.cos(math.pi * min(t / T_end, 1)))


def rigl_update(
    weight: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    fraction: float,
) -> Bool[Tensor, "*shape"]:
    """One update of RigL: drop the fraction of smallest magnitude, grow by gradient magnitude.

    k connections are dropped, those of smallest |theta|. Then, of all places that are now empty,
    the k with the largest |gradient| are connected.

    Args:
        weight: theta, any floating type, finite.
        mask: True where a connection is, the shape of weight. It is not modified.
        gradient: dL/dtheta of the dense layer, for every place, the shape of weight, finite.
        fraction: f(t), of the connections, in [0, 1]; their number k is rounded down.

    Returns:
        A new mask with exactly as many True. What was just dropped may be grown again.

    Raises:
        TypeError: mask is not a boolean tensor.
        ValueError: the shapes differ, or fraction is out of range.

    Example:
        >>> weight, mask = torch.tensor([3.0, 0.1, 0.0, 0.0]), torch.tensor([1, 1, 0, 0]).bool()
        >>> rigl_update(weight, mask, torch.tensor([9.0, 0.2, 0.1, -0.4]), 0.5).tolist()
        [True, False, False, True]
    """
    require_sparsity(fraction, "fraction")
    require_mask(mask, gradient.shape)
    count = int(fraction * int(require_mask(mask, weight.shape).sum()))
    kept = drop_smallest(weight, mask, count)
    return grow_largest(kept, torch.abs(gradient), count)
