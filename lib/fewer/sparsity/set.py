"""SET: drop the weakest connections, grow as many at random.

Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science" (arXiv 1707.04780), algorithm 1. With theta the weights
(`weight`), their pattern (`mask`, True where a connection is) and zeta the fraction that is
replaced (`fraction`):

    k      = floor(zeta * connections)
    I_drop = the k connections with the smallest |theta|
    I_grow = k of the places without a connection, uniformly at random

Every drop is paid back by a grow, so the number of connections never changes. The paper drops the
smallest positive and the largest negative weights; by magnitude, as here, is how Evci et al. 2020
(arXiv 1911.11134) and the comparisons after them run SET.

Three things about the growing that one would otherwise have to guess, all as in the code that came
with Evci et al.:
- the places that the drop has just emptied are candidates too, so a connection may come back;
- a grown connection starts at zero, with its optimizer state (momentum, Adam's moments) at zero;
- one that was dropped and grown in the same update keeps its weight and its state. So "kept" is
  simply: there before and after (`carry_over`).
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.sparsity.magnitude import top_k_mask
from fewer.sparsity.validate import require_int, require_mask, require_sparsity


def drop_smallest(
    weight: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], count: int
) -> Bool[Tensor, "*shape"]:
    """The mask without the `count` connections of smallest magnitude.

    Only what is connected can be dropped: places without a connection stay so, whatever their
    weight, and a connection whose weight happens to be 0 is the first to go.

    Args:
        weight: theta, any floating type, finite.
        mask: True where a connection is, the shape of weight. It is not modified.
        count: k, between 0 and the number of connections.

    Returns:
        A new mask with exactly `count` fewer True, all of them True in `mask`. Which of equal
        magnitudes go is left open.

    Raises:
        TypeError: mask is not a boolean tensor, or count is not an int.
        ValueError: the shapes differ, or count is out of range.

    Example:
        >>> weight = torch.tensor([0.5, -0.1, 0.0, -2.0])
        >>> drop_smallest(weight, torch.tensor([True, True, False, True]), 1).tolist()
        [True, False, False, True]
    """
    connections = int(require_mask(mask, weight.shape).sum())
    require_int(count, "count", 0, connections)
    magnitude = torch.where(mask, weight.detach().abs(), -math.inf)
    return top_k_mask(magnitude, connections - count)


def grow_largest(
    mask: Bool[Tensor, "*shape"], score: Float[Tensor, "*shape"], count: int
) -> Bool[Tensor, "*shape"]:
    """The mask with `count` more connections: the empty places of largest score.

    Args:
        mask: True where a connection is. It is not modified.
        score: how much a connection is wanted at each place, any floating type, the shape of
            mask. What it says where a connection already is does not matter.
        count: k, between 0 and the number of empty places.

    Returns:
        A new mask with exactly `count` more True; all that were True are so still.

    Raises:
        TypeError: mask is not a boolean tensor, or count is not an int.
        ValueError: the shapes differ, or count is out of range.

    Example:
        >>> score = torch.tensor([9.0, 0.1, 0.7, 0.2])
        >>> grow_largest(torch.tensor([True, False, False, False]), score, 2).tolist()
        [True, False, True, True]
    """
    require_mask(mask, score.shape)
    require_int(count, "count", 0, int((~mask).sum()))
    return mask | top_k_mask(torch.where(mask, -math.inf, score), count)


def set_update(
    weight: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    fraction: float,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "*shape"]:
    """One update of SET: drop the fraction of smallest magnitude, grow as many at random.

    Args:
        weight: theta, any floating type, finite.
        mask: True where a connection is, the shape of weight. It is not modified.
        fraction: zeta, of the connections, in [0, 1]; their number is rounded down. The authors
            use 0.3.
        generator: a generator on the CPU, whatever the device of weight, so that a seed gives the
            same connections everywhere. None takes torch's global one.

    Returns:
        A new mask with exactly as many True. Each place that is empty after the drop, just dropped
        or not, is equally likely to be grown.

    Raises:
        TypeError: mask is not a boolean tensor.
        ValueError: the shapes differ, or fraction is out of range.

    Example:
        >>> weight, mask = torch.tensor([3.0, 0.1, 0.0, 0.0]), torch.tensor([1, 1, 0, 0]).bool()
        >>> new = set_update(weight, mask, 0.5, torch.Generator().manual_seed(0))
        >>> int(new.sum()), bool(new[0])  # one is dropped and one grown; the 3.0 stays
        (2, True)
    """
    require_sparsity(fraction, "fraction")
    count = int(fraction * int(require_mask(mask, weight.shape).sum()))
    kept = drop_smallest(weight, mask, count)
    return grow_largest(kept, torch.rand(mask.shape, generator=generator).to(mask.device), count)


def carry_over(
    values: Float[Tensor, "*shape"],
    old_mask: Bool[Tensor, "*shape"],
    new_mask: Bool[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """What a tensor of weights, momentum or moments holds after an update of the connections.

    Kept connections (in both masks) keep their value bit for bit. Everything else is zero: what was
    dropped is gone, and what is grown starts at zero. Without the last, a connection that returns
    after a long absence would be pushed by the stale momentum of its former life.

    Args:
        values: the weights, or any state of the optimizer with one number a weight.
        old_mask, new_mask: before and after the update, the shape of values.

    Returns:
        A new tensor, the shape and type of values.

    Raises:
        TypeError: a mask is not a boolean tensor.
        ValueError: the shapes differ.

    Example:
        >>> old, new = torch.tensor([True, True, False]), torch.tensor([True, False, True])
        >>> carry_over(torch.tensor([1.5, 2.5, 3.5]), old, new).tolist()
        [1.5, 0.0, 0.0]
    """
    kept = require_mask(old_mask, values.shape, "old_mask") & require_mask(
        new_mask, values.shape, "new_mask"
    )
    return torch.where(kept, values, torch.zeros_like(values))
