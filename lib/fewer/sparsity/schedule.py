"""Gradual pruning: the sparsity rises during training, fast at first and then ever more slowly.

Zhu & Gupta 2017, "To prune, or not to prune" (arXiv 1710.01878), section 3, equation 1:

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Delta_t))^3,      t = t_0, t_0 + Delta_t, ...

s_i is the `initial` sparsity, s_f the `final` one; pruning starts at step t_0 (`begin`), is
repeated `every` Delta_t steps, and is complete at step t_0 + n Delta_t (`end`). Early on there is
much that is redundant, and much training left to repair what was lost.

Between two prunings the mask stays. It is applied after each step of the optimizer, which moves
pruned weights too.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.sparsity.magnitude import number_kept, top_k_mask
from fewer.sparsity.validate import require_int, require_mask, require_number, require_sparsity


def cubic_sparsity(step: float, begin: float, end: float, initial: float, final: float) -> float:
    """The sparsity that the cubic schedule asks for at a step.

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Delta_t))^3, while t goes from t_0 to
    t_0 + n Delta_t.

    Args:
        step: the training step t, any number that is finite.
        begin: t_0; up to this step the sparsity is `initial`.
        end: t_0 + n Delta_t, above begin; from this step on the sparsity is `final`.
        initial: s_i, 0 to 1.
        final: s_f, from `initial` to 1.

    Returns:
        the sparsity s_t, from `initial` (at begin and before) to `final` (at end and after).

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is NaN or infinite; end is not above begin; initial or final is out
            of range; initial is above final.

    Example:
        >>> [round(cubic_sparsity(step, 0, 100, 0.0, 0.9), 4) for step in (0, 25, 50, 75, 100, 125)]
        [0.0, 0.5203, 0.7875, 0.8859, 0.9, 0.9]
    """
    if not require_number(begin, "begin") < require_number(end, "end"):
        raise ValueError(f"end must be above begin = {begin}, got {end}")
    if not require_sparsity(initial, "initial") <= require_sparsity(final, "final"):
        raise ValueError(f"final must be at least initial = {initial}, got {final}")
    progress = (require_number(step, "step") - begin) / (end - begin)
    remaining = (1 - min(max(progress, 0.0), 1.0)) ** 3
    return remaining * initial + (1 - remaining) * final  # equation 1, exact at both ends


def apply_masks(
    weights: dict[str, Float[Tensor, "..."]], masks: dict[str, Bool[Tensor, "..."]]
) -> None:
    """Set the pruned weights to zero, in place.

    Call it after each step of the optimizer. Zero is written, not multiplied in: infinity times
    zero would be NaN.

    Args:
        weights: name -> parameter, changed in place, outside of autograd.
        masks: name -> bool mask of its shape, True = kept. The same names.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: other names or another shape.

    Example:
        >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> apply_masks({"w": w}, {"w": torch.tensor([True, False, True])})
        >>> w.tolist()
        [1.0, 0.0, 3.0]
    """
    if weights.keys() != masks.keys():
        raise ValueError(f"masks must be for {sorted(weights)}, got {sorted(masks)}")
    with torch.no_grad():
        for name, w in weights.items():
            w.masked_fill_(~require_mask(masks[name], w.shape, f"masks[{name!r}]"), 0)


def prune_gradually(
    train_step: Callable[[int], object],
    weights: dict[str, Float[Tensor, "..."]],
    steps: int,
    begin: int,
    end: int,
    every: int = 1,
    initial: float = 0.0,
    final: float = 0.9,
) -> dict[str, Bool[Tensor, "..."]]:
    """Train, and prune each layer by magnitude along the cubic schedule while doing so.

    For t = 0, 1, ..., steps - 1: call train_step(t); if t is begin, begin + every, begin + 2 every,
    ... below end, or end itself, recompute the masks for the sparsity of step t; apply the masks.
    A pruned weight never returns: masks only shrink.

    Args:
        train_step: does one step of the optimizer on the weights, in place; it is given t. What it
            returns is ignored.
        weights: name -> the parameters to prune (no biases, no norms), changed in place.
        steps: training steps in all; above end, so that the final sparsity is reached.
        begin, end: first and last step that prunes, 0 <= begin < end.
        every: steps between two prunings, at least 1.
        initial, final: sparsity at begin and at end, each layer's own.

    Returns:
        name -> bool mask, True = kept, `number_kept(n, final)` in each layer. Pruned weights are 0.

    Raises:
        TypeError: steps, begin, end or every is not an int.
        ValueError: one of them, initial or final is out of range; a weight became NaN.

    Example:
        >>> w = torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> masks = prune_gradually(lambda t: w.sub_(1), {"w": w}, 3, begin=0, end=1, final=0.5)
        >>> w.tolist(), masks["w"].tolist()  # pruned at t = 1, when it was [2, 1, 0, -1]
        ([1.0, 0.0, 0.0, 0.0], [True, True, False, False])
    """
    require_int(every, "every", 1)
    require_int(end, "end", require_int(begin, "begin", 0) + 1)
    require_int(steps, "steps", end + 1)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for t in range(steps):
        train_step(t)
        if t == end or (begin <= t < end and (t - begin) % every == 0):
            sparsity = cubic_sparsity(t, begin, end, initial, final)
            for name, w in weights.items():  # a score of -1 keeps what is pruned last in line
                scores = w.detach().abs().masked_fill(~masks[name], -1)
                masks[name] = top_k_mask(scores, number_kept(w.numel(), sparsity))
        apply_masks(weights, masks)
    return masks
