"""SparseGPT: prune the columns of W one after another; those not yet reached make up for the loss.

Frantar & Alistarh 2023, "SparseGPT: Massive language models can be accurately pruned in one-shot"
(arXiv 2301.00774), algorithm 1. With H = X^T X of the layer's inputs and (H + lambda I)^-1 = U^T U
(`fewer.models.inverse_cholesky`, where the formulas come from), a block of 128 columns prunes the
weights of least cost, found before the block is walked,

    S_ij = W_ij^2 / U_jj^2

and then, for each of its columns j = 0, 1, ...,

    e = W_j / U_jj where pruned, 0 elsewhere,        W_j+1: = W_j+1: - e U_j,j+1:

The weights that stay change too. It is GPTQ with the grid {0, W_j} in place of the integers.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.models import inverse_cholesky
from fewer.sparsity.magnitude import number_kept, top_k_mask
from fewer.sparsity.structured import n_m_mask
from fewer.sparsity.validate import (
    require_dims,
    require_finite,
    require_groups,
    require_int,
    require_sparsity,
)


def sparsegpt_block(
    w: Float[Tensor, "out columns"],
    u: Float[Tensor, "columns columns"],
    sparsity: float = 0.5,
    n_m: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, "out columns"], Float[Tensor, "out columns"]]:
    """Prune a block of columns from left to right, each loss passed on to the columns after it.

    The weights of least S_ij = W_ij^2 / U_jj^2 are pruned. Unstructured, the mask is chosen once
    for the block, over all its rows and columns together. N:M, it is chosen for m columns at a time
    when the walk reaches them, within each row, from the weights as they are by then.

    Column j = 0, 1, ... loses W_j where it is pruned. Its error e_j is W_j / U_jj there, and 0
    elsewhere; the columns after it become W_j+1: - e_j U_j,j+1:.

    Args:
        w: the block's weights, after the updates of all blocks before. Not modified.
        u: U of these columns, upper triangular (the diagonal block of the layer's U).
        sparsity: share of the block to prune, 0 to 1; not used with n_m.
        n_m: (n, m) keeps n of every m consecutive weights of a row.

    Returns:
        w: [out, columns], pruned weights exactly 0, the others updated.
        errors: [out, columns], the e_j. The columns after the block change by -errors @ U[block,
            after].

    Raises:
        ValueError: sparsity out of range; n out of range, or columns no multiple of m.

    Example:
        >>> w, u = torch.tensor([[1.0, 4.0]]), torch.tensor([[1.0, -1.0], [0.0, 1.0]])
        >>> pruned, errors = sparsegpt_block(w, u, sparsity=0.5)
        >>> pruned.tolist()  # the second weight takes over what the first did
        [[0.0, 5.0]]
    """
    w, errors, diagonal = w.clone(), torch.zeros_like(w), u.diagonal()
    if n_m is None:
        keep = top_k_mask((w / diagonal).square(), number_kept(w.numel(), sparsity))
    else:
        keep = torch.empty_like(w, dtype=torch.bool)  # filled group by group
    for j in range(w.shape[1]):
        if n_m is not None and j % n_m[1] == 0:
            group = slice(j, j + n_m[1])
            keep[:, group] = n_m_mask((w[:, group] / diagonal[group]).square(), *n_m)
        errors[:, j] = torch.where(keep[:, j], 0.0, w[:, j] / u[j, j])
        w[:, j + 1 :] -= torch.outer(errors[:, j], u[j, j + 1 :])
    return torch.where(keep, w, 0.0), errors


def prune_sparsegpt(
    w: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    sparsity: float = 0.5,
    n_m: tuple[int, int] | None = None,
    damp: float = 0.01,
    block: int = 128,
) -> Float[Tensor, "out in"]:
    """Prune a layer so that its output, on the inputs behind `hessian`, changes little.

    Args:
        w: [out, in], any floating type, finite. It is not modified.
        hessian: H = X^T X [in, in] of the layer's inputs (`fewer.models.input_hessian`), of any
            scale.
        sparsity: share to prune, 0 to 1, of each block of columns (so of the whole, up to rounding
            in each block); rows may differ. Not used with n_m.
        n_m: (n, m) keeps n of every m consecutive weights of a row, such as (2, 4).
        damp: lambda as a fraction of the mean of H's diagonal, at least 0.
        block: columns whose mask is chosen together, at least 1; with n_m a multiple of m (and
            without influence on the result).

    Returns:
        [out, in], float32 (float64 for a float64 w): pruned weights exactly 0, the others updated.
        The mask is `result != 0`, unless a weight was 0 before.

    Raises:
        TypeError: w is not a floating-point tensor; block, n or m is not an int.
        ValueError: w is not a matrix, or not finite; hessian is not [in, in], or not positive
            definite after damping; sparsity, n, m, damp or block out of range; with n_m, in or
            block is not a multiple of m.

    Example:
        >>> x = torch.tensor([[1.0, 0.9], [2.0, 2.1]])  # two inputs that nearly agree
        >>> prune_sparsegpt(torch.tensor([[1.0, 4.0]]), x.T @ x, damp=0.0)
        tensor([[0.0000, 4.9...]])
    """
    w = require_dims(require_finite(w, "w"), 2, "w").clone()
    require_int(block, "block", 1)
    require_sparsity(sparsity)
    columns = w.shape[1]
    if tuple(hessian.shape) != (columns, columns):
        raise ValueError(f"hessian must be {(columns, columns)}, got {tuple(hessian.shape)}")
    if n_m is not None:
        require_groups(columns, n_m[1], "the number of columns of w")
        require_groups(block, n_m[1], "block")
    u = inverse_cholesky(hessian, damp).to(w.dtype)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        w[:, start:end], errors = sparsegpt_block(
            w[:, start:end], u[start:end, start:end], sparsity, n_m
        )
        w[:, end:] -= errors @ u[start:end, end:]
    return w
