"""The lottery ticket: prune what training made small, go back to the start, train again.

Frankle & Carbin 2018, "The lottery ticket hypothesis" (arXiv 1803.03635), and, for networks beyond
the smallest, Frankle, Dziugaite, Roy & Carbin 2019, "Linear mode connectivity and the lottery
ticket hypothesis" (arXiv 1912.05671), which rewinds to an early step k in place of step 0:

    W_k   = the weights after k steps of dense training        (k = 0: the initialization)
    m     = 1 (everything connected)
    round:  W_T = train(m * W_k from step k to T)
            m   = m without the fraction p of its connections of smallest |W_T|
    ticket: m * W_k

The ticket is W_k bit for bit, times a mask. It is found by training many times over; that its
training succeeds shows what a sparse network can do, not a cheap way to get one.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.sparsity.set import drop_smallest
from fewer.sparsity.validate import require_mask, require_sparsity

Weights = list[Float[Tensor, "..."]]
Masks = list[Bool[Tensor, "..."]]


def prune_surviving(
    weights: list[Float[Tensor, "..."]], masks: list[Bool[Tensor, "..."]], fraction: float
) -> list[Bool[Tensor, "..."]]:
    """Take away the fraction of the surviving connections that has the smallest magnitude.

    All layers compete with each other (*global* pruning, as in the second paper; the first prunes
    its small networks layer by layer, which is this function called for each).

    Args:
        weights: one trained tensor a layer, of any shapes, finite.
        masks: one a layer, True where a connection is. They are not modified.
        fraction: p, of the connections of all layers together, in [0, 1]; their number is rounded
            to the nearest. The first paper takes 0.2 a round.

    Returns:
        One new mask a layer, with exactly that number fewer True in all (which of equal magnitudes
        go is left open). Nothing comes back that was pruned before.

    Raises:
        TypeError: a mask is not a boolean tensor.
        ValueError: shapes or lengths differ, or fraction is out of range.

    Example:
        >>> weights = [torch.tensor([5.0, 0.1]), torch.tensor([[0.3], [0.2]])]
        >>> masks = [torch.tensor([True, True]), torch.tensor([[True], [True]])]
        >>> [mask.tolist() for mask in prune_surviving(weights, masks, 0.5)]
        [[True, False], [[True], [False]]]
    """
    require_sparsity(fraction, "fraction")
    pairs = list(zip(weights, masks, strict=True))
    flat_mask = torch.cat([require_mask(mask, weight.shape).flatten() for weight, mask in pairs])
    flat_weight = torch.cat([weight.flatten() for weight, _ in pairs])
    survivors = drop_smallest(flat_weight, flat_mask, round(fraction * int(flat_mask.sum())))
    parts = survivors.split([mask.numel() for mask in masks])
    return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]


def rewind(
    early: list[Float[Tensor, "..."]], masks: list[Bool[Tensor, "..."]]
) -> list[Float[Tensor, "..."]]:
    """The ticket m * W_k: the early weights where a connection is, zero elsewhere.

    Args:
        early: W_k, one tensor a layer. They are not modified: the next round needs them again.
        masks: one a layer.

    Returns:
        New tensors. Where the mask is True they are W_k bit for bit.

    Raises:
        TypeError: a mask is not a boolean tensor.
        ValueError: shapes or lengths differ.

    Example:
        >>> rewind([torch.tensor([0.5, -0.25])], [torch.tensor([True, False])])[0].tolist()
        [0.5, 0.0]
    """
    return [
        torch.where(require_mask(mask, weight.shape), weight, torch.zeros_like(weight))
        for weight, mask in zip(early, masks, strict=True)
    ]


def lottery_ticket(
    train: Callable[[Weights, Masks], Weights],
    early: Weights,
    fractions: list[float],
    prune: Callable[[Weights, Masks, float], Masks] = prune_surviving,
) -> list[Masks]:
    """Iterative magnitude pruning with rewinding.

    Args:
        train: called as train(weights, masks) with the rewound weights; trains them from step k to
            the end with those connections alone and returns the trained ones.
        early: W_k, one tensor a layer.
        fractions: p of each round, in [0, 1]. After rounds of 0.2 the density is 0.8^rounds.
        prune: which connections a round takes away, called as prune(trained, masks, fraction).

    Returns:
        The masks after each round; the last are the ticket's. Train `rewind(early, masks)` to see
        what it is worth.

    Raises:
        ValueError: as `prune_surviving`.

    Example:
        >>> early = [torch.tensor([1.0, 2.0, 3.0, 4.0])]
        >>> backwards = lambda weights, masks: [w.flip(0) * m for w, m in zip(weights, masks)]
        >>> [masks[0].int().tolist() for masks in lottery_ticket(backwards, early, [0.5, 0.5])]
        [[1, 1, 0, 0], [1, 0, 0, 0]]
    """
    masks: Masks = [torch.ones_like(weight, dtype=torch.bool) for weight in early]
    rounds = []
    for fraction in fractions:
        trained = train(rewind(early, masks), masks)
        masks = prune(trained, masks, fraction)
        rounds.append(masks)
    return rounds
