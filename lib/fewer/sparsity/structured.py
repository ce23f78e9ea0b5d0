"""Sparsity with a shape: N of every M weights, whole blocks.

Hardware gains little from zeros anywhere; it can skip zeros whose places follow a rule.

N:M: Mishra et al. 2021, "Accelerating sparse deep neural networks" (arXiv 2104.08378): in
every M = 4 consecutive weights of a row, N = 2 may be other than zero. Zhou et al. 2021 (arXiv
2102.04010), section 3, for general N and M:

    mask_i = 1  if score_i is among the N largest of its group   {w_jM, ..., w_jM+M-1}

Blocks: Mao et al. 2017, "Exploring the regularity of sparse structure in convolutional neural
networks" (arXiv 1705.08922), section 3: a block stays or goes as one, by the sum of its scores
(with |w|, its L1 norm).

    S_b = sum over i in block b of score_i,      block b is kept if S_b is among the k largest
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.sparsity.magnitude import number_kept, top_k_mask
from fewer.sparsity.validate import (
    require_dims,
    require_finite,
    require_groups,
    require_int,
    require_pair,
    require_scores,
)


def n_m_mask(scores: Float[Tensor, "*rows in"], n: int, m: int) -> Bool[Tensor, "*rows in"]:
    """Keep the n largest scores of every m consecutive ones along the last dimension.

    n is the number *kept*: 2:4 and 4:8 both halve the weights. Groups do not overlap; the first one
    starts at column 0. Ties are kept from the left.

    Args:
        scores: [..., in], any floating type, without NaN; in must be a multiple of m. |w| for
            magnitude pruning.
        n: 0 to m, weights kept in a group.
        m: at least 1, weights in a group.

    Returns:
        bool, the shape of scores, with exactly n True in every group.

    Raises:
        TypeError: scores is not a floating-point tensor; n or m is not an int.
        ValueError: n or m out of range; in is not a multiple of m; scores is 0-d or holds NaN.

    Example:
        >>> n_m_mask(torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 1.0]]), n=2, m=4).int()
        tensor([[1, 0, 1, 0, 1, 0, 0, 1]], dtype=torch.int32)
    """
    require_int(n, "n", 0, require_int(m, "m", 1))
    scores = require_scores(scores)
    if scores.ndim == 0:
        raise ValueError("scores must have at least one dimension, got a 0-d tensor")
    groups = require_groups(scores.shape[-1], m, "the last dimension of scores")
    scores = scores.unflatten(-1, (groups, m))
    kept = scores.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True).flatten(-2)


def block_mask(
    scores: Float[Tensor, "out in"], block: tuple[int, int], sparsity: float
) -> Bool[Tensor, "out in"]:
    """Prune whole blocks of a matrix: those with the smallest sum of scores go.

    The matrix is cut into blocks of `block` = (rows, columns), starting at the top left. Of B
    blocks `number_kept(B, sparsity)` are kept; of equal sums, those stored first (row of blocks by
    row of blocks). A block of (1, in) is an output neuron, one of (out, 1) an input feature.

    Args:
        scores: [out, in], any floating type, finite; out a multiple of block[0], in of block[1].
            |w| for magnitude pruning.
        block: height and width of a block, each at least 1.
        sparsity: share of the blocks to prune, 0 to 1.

    Returns:
        bool, [out, in], constant within each block.

    Raises:
        TypeError: scores is not a floating-point tensor, or block not a pair of ints.
        ValueError: scores is not a matrix, holds NaN or infinity, or is no multiple of the block;
            block or sparsity out of range.

    Example:
        >>> scores = torch.tensor([[9.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0]])  # sums 9 and 16
        >>> block_mask(scores, (2, 2), sparsity=0.5).int().tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    height, width = require_pair(block, "block")
    scores = require_dims(require_finite(scores, "scores"), 2, "scores")
    down = require_groups(scores.shape[0], height, "the number of rows of scores")
    across = require_groups(scores.shape[1], width, "the number of columns of scores")
    sums = scores.reshape(down, height, across, width).sum(dim=(1, 3))
    kept = top_k_mask(sums, number_kept(sums.numel(), sparsity))
    return kept.repeat_interleave(height, dim=0).repeat_interleave(width, dim=1)
