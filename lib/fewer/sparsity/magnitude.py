"""Magnitude pruning: the smallest weights go, by threshold, by count, per layer, per row.

Han et al. 2015, "Learning both weights and connections for efficient neural networks" (arXiv
1506.02626), section 3: weights below a threshold are removed. Zhu & Gupta 2017 (arXiv 1710.01878),
section 3, sort by |w| instead, to reach a sparsity s exactly. Per output row: Sun et al. 2023,
"Wanda" (arXiv 2306.11695), section 3.

    mask_i = 1  if score_i is among the k largest,      k = n - round(s n)
    w' = mask * w                                       magnitude: score_i = |w_i|

A mask is a bool tensor, True = kept. Two conventions hold for the whole folder. The number kept is
`number_kept`, rounded once. And equal scores are kept in the order in which they are stored (row by
row), so that k weights are kept, not about k: of a constant tensor too.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.sparsity.validate import (
    require_dims,
    require_floating,
    require_int,
    require_scores,
    require_sparsity,
)


def number_kept(n: int, sparsity: float) -> int:
    """How many of n weights remain at a sparsity: n - round(sparsity * n).

    The number *pruned* is rounded, a tie to the even number (Python's `round`), as
    `torch.nn.utils.prune` does: half of 5 weights prunes 2 and keeps 3.

    Args:
        n: number of weights, at least 0.
        sparsity: share to prune, 0 to 1.

    Returns:
        0 to n; n at sparsity 0, and 0 at sparsity 1.

    Raises:
        TypeError: n is not an int, sparsity not a number.
        ValueError: n or sparsity out of range.

    Example:
        >>> [number_kept(10, sparsity) for sparsity in (0, 0.5, 0.9, 0.99, 1)]
        [10, 5, 1, 0, 0]
    """
    return require_int(n, "n", 0) - round(require_sparsity(sparsity) * n)


def threshold_mask(w: Float[Tensor, "*shape"], threshold: float) -> Bool[Tensor, "*shape"]:
    """Keep the weights whose magnitude is at least the threshold: |w| >= threshold.

    How many that is depends on the weights: pruning by threshold fixes the smallest magnitude that
    remains, not the sparsity.

    Args:
        w: any shape, any floating type, without NaN.
        threshold: at least 0, in the unit of w. 0 keeps everything; infinity prunes all finite
            weights.

    Returns:
        bool, the shape of w, True = kept.

    Raises:
        TypeError: w is not a floating-point tensor.
        ValueError: w holds NaN; threshold is negative or NaN.

    Example:
        >>> threshold_mask(torch.tensor([0.3, -0.5, 0.0, 2.0]), 0.5).tolist()
        [False, True, False, True]
    """
    if not threshold >= 0:  # NaN fails this too
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    return require_scores(w, "w").abs() >= threshold


def top_k_mask(scores: Float[Tensor, "*shape"], k: int) -> Bool[Tensor, "*shape"]:
    """Keep exactly the k largest scores of the whole tensor.

    Where scores tie for the last places, those stored first (row by row) are kept. Sorting will do,
    in O(n log n); the k-th largest score alone can be found by selection, in O(n).

    Args:
        scores: any shape, any floating type; infinite scores are allowed, NaN is not. The sign
            counts: for magnitudes, pass w.abs().
        k: 0 to the number of scores.

    Returns:
        bool, the shape of scores, with exactly k True.

    Raises:
        TypeError: scores is not a floating-point tensor, or k not an int.
        ValueError: k out of range, or NaN among the scores.

    Example:
        >>> top_k_mask(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), k=2).tolist()
        [[True, True], [False, False]]
    """
    flat = require_scores(scores).flatten()
    if require_int(k, "k", 0, flat.numel()) == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    kth_largest = flat.kthvalue(flat.numel() - k + 1).values
    mask = flat > kth_largest
    ties = (flat == kth_largest).nonzero().flatten()
    mask[ties[: k - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def magnitude_mask(w: Float[Tensor, "*shape"], sparsity: float) -> Bool[Tensor, "*shape"]:
    """Prune one layer by itself: keep the `number_kept(n, sparsity)` weights of largest |w|.

    Args:
        w: any shape, any floating type, without NaN.
        sparsity: share to prune, 0 to 1.

    Returns:
        bool, the shape of w, True = kept.

    Raises:
        TypeError, ValueError: as `top_k_mask` and `number_kept`.

    Example:
        >>> magnitude_mask(torch.tensor([[0.3, -0.5], [0.1, 2.0]]), sparsity=0.5).tolist()
        [[False, True], [False, True]]
    """
    return top_k_mask(require_floating(w, "w").abs(), number_kept(w.numel(), sparsity))


def row_mask(scores: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
    """Prune each output row by itself: every row keeps its `number_kept(in, sparsity)` largest.

    So every output neuron keeps equally many inputs. Ties are kept from the left.

    Args:
        scores: [out, in], any floating type, without NaN; |w| for magnitude pruning.
        sparsity: share to prune of each row, 0 to 1.

    Returns:
        bool, [out, in], every row with the same number of True.

    Raises:
        TypeError: scores is not a floating-point tensor.
        ValueError: scores is not a matrix or holds NaN; sparsity out of range.

    Example:
        >>> row_mask(torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 2.0, 2.0]]), 0.5).tolist()
        [[True, True, False, False], [False, True, True, False]]
    """
    scores = require_dims(require_scores(scores), 2, "scores")
    best_first = scores.argsort(dim=-1, descending=True, stable=True)
    kept = best_first[:, : number_kept(scores.shape[-1], sparsity)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)
