"""GPTQ: round the columns of W one after another; those not yet rounded make up for the error.

Frantar, Ashkboos, Hoefler & Alistarh 2023, "GPTQ: Accurate post-training quantization for
generative pre-trained transformers" (arXiv 2210.17323), algorithm 1. Rounding to nearest makes each
weight's error small; what matters is the error of the layer's output, tr(dW H dW^T) with
H = X^T X, in which the errors of correlated inputs can cancel. With
(H + lambda I)^-1 = U^T U (`fewer.models.inverse_cholesky`, where the formulas come from), for
j = 0, 1, ...:

    q_j = round W_j to the grid,     e = (W_j - q_j) / U_jj,     W_j+1: = W_j+1: - e U_j,j+1:

The updates reach the end of a block of 128 columns at once, and the columns beyond it in one matrix
product when the block is done: the same numbers, with less memory traffic.
"""

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from fewer.models import inverse_cholesky
from fewer.quantization.granularity import quantize_per_group
from fewer.quantization.uniform import dequantize
from fewer.quantization.validate import (
    require_bits,
    require_int,
    require_matrix,
    require_same_shape,
)


def quantize_to_grid(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, "*scale"],
    zero_point: Int[Tensor, "*scale"] | None,
    bits: int,
) -> Int[Tensor, "*shape"]:
    """The nearest codes on a grid that is already there (scale and zero-point are given).

        codes = clamp(round(x / scale) + zero_point, 0, 2^bits - 1)       with a zero-point
        codes = clamp(round(x / scale), -Q, Q),  Q = 2^(bits-1) - 1       without one

    Args:
        x: any shape, any floating type.
        scale: positive, broadcast against x.
        zero_point: integers, broadcast against x; None for the restricted symmetric grid.
        bits: 2 to 8.

    Returns:
        uint8 with a zero-point, else int8; the shape of x. The types and ranges are those of
        `quantize_asymmetric` and `quantize_symmetric`, and so are the ties: to the even integer.

    Raises:
        TypeError: bits is not an int.
        ValueError: bits out of range.

    Example:
        >>> quantize_to_grid(torch.tensor([-9.0, 0.4, 3.4]), torch.tensor(0.5), None, 4).tolist()
        [-7, 1, 7]
    """
    require_bits(bits)
    if zero_point is None:
        largest = 2 ** (bits - 1) - 1
        return torch.round(x / scale).clamp(-largest, largest).to(torch.int8)
    return (torch.round(x / scale) + zero_point).clamp(0, 2**bits - 1).to(torch.uint8)


def gptq_block(
    w: Float[Tensor, "out columns"],
    u: Float[Tensor, "columns columns"],
    scale: Float[Tensor, "out columns"],
    zero_point: Int[Tensor, "out columns"] | None,
    bits: int,
) -> tuple[Int[Tensor, "out columns"], Float[Tensor, "out columns"]]:
    """Round a block of columns from left to right, each error passed on to the columns after it.

    For each column j, with the weights as the columns before it have left them:

        q_j = round W_j to its grid,     e_j = (W_j - q_j) / U_jj,     W_j+1: -= e_j U_j,j+1:

    q_j is in the unit of W: the real number that the code of `quantize_to_grid` stands for, as
    `dequantize` gives it.

    Args:
        w: the block's weights, after the updates of all blocks before; float32 or float64. Not
            modified.
        u: U of these columns, upper triangular with a positive diagonal (the diagonal block of the
            layer's U), in the type of w.
        scale: the step of every weight, one for each of them; columns may differ (groups).
        zero_point: the same for the zero-points, or None for symmetric codes.
        bits: 2 to 8.

    Returns:
        codes: [out, columns], as `quantize_to_grid` gives them.
        errors: [out, columns], the e_j. The columns after the block change by -errors @ U[block,
            after].

    Raises:
        TypeError: bits is not an int.
        ValueError: u is not [columns, columns], scale or zero_point has another shape than w, or
            bits is out of range.

    Example:
        >>> w, u = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, -1.0], [0.0, 1.0]])
        >>> codes, errors = gptq_block(w, u, torch.ones(1, 2), None, bits=4)
        >>> codes.tolist()  # the second weight takes over what the first lost, and rounds up
        [[0, 1]]
    """
    if u.shape != (w.shape[1], w.shape[1]):
        raise ValueError(f"u must be [columns, columns] = {[w.shape[1]] * 2}, got {[*u.shape]}")
    require_same_shape(w, scale, "w and scale")
    if zero_point is not None:
        require_same_shape(w, zero_point, "w and zero_point")
    w, codes, errors = w.clone(), [], torch.zeros_like(w)
    for j in range(w.shape[1]):
        zero = None if zero_point is None else zero_point[:, j]
        codes.append(quantize_to_grid(w[:, j], scale[:, j], zero, bits))
        errors[:, j] = (w[:, j] - dequantize(codes[j], scale[:, j], zero)) / u[j, j]
        w[:, j + 1 :] -= torch.outer(errors[:, j], u[j, j + 1 :])
    return torch.stack(codes, dim=1), errors


def quantize_gptq(
    w: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    act_order: bool = False,
    damp: float = 0.01,
    block: int = 128,
) -> tuple[Int[Tensor, "out in"], Float[Tensor, "out groups"], Int32[Tensor, "out groups"] | None]:
    """Quantize a layer so that its output, on the inputs behind `hessian`, changes little.

    The result is read as that of `quantize_per_group`: `dequantize_per_group(codes, scale,
    zero_point, group_size)`. It costs no more bits, and the same kernels run it.

    A group's scale is computed when the walk reaches the group, from the weights as they are by
    then. With `act_order` the columns are walked in the order of falling H_jj: the inputs that
    matter most are rounded first, while most weights are still free to make up for them. A group
    then is not walked in one piece, so all scales are computed from the original weights, before
    the walk ("static groups"); columns and groups stay where they were, and inference sees no
    difference.

    An input that was always zero in the calibration data passes no error on: its weights are
    rounded to nearest.

    Args:
        w: [out, in], any floating type, finite. It is not modified.
        hessian: H = X^T X [in, in] of the layer's inputs (`fewer.models.input_hessian`), of any
            scale.
        bits: 2 to 8.
        group_size: weights of a row that share a scale; None for one scale a row.
        symmetric: restricted symmetric codes, or asymmetric codes with zero-points.
        act_order: walk the columns in the order of falling H_jj.
        damp: lambda as a fraction of the mean of H's diagonal, at least 0.
        block: columns between two lazy updates, at least 1. It changes the speed, not the result.

    Returns:
        codes: [out, in], int8 if symmetric, else uint8.
        scale: [out, groups] with groups = ceil(in / group_size), float32 (float64 for float64 w).
        zero_point: [out, groups], int32; None if symmetric.

    Raises:
        TypeError: w is not a floating-point tensor; bits, group_size or block is not an int.
        ValueError: w is not a matrix, or not finite; hessian is not [in, in], or not positive
            definite after damping; bits, group_size, block or damp out of range.

    Example:
        >>> x = torch.tensor([[1.0, 0.9], [2.0, 2.1]])  # two inputs that nearly agree
        >>> codes, scale, _ = quantize_gptq(torch.tensor([[7.0, 0.4]]), x.T @ x, bits=4)
        >>> codes.tolist(), scale.tolist()
        ([[7, 0]], [[1.0]])
    """
    w = require_matrix(w, "w").clone()
    columns = w.shape[1]
    size = columns if group_size is None else require_int(group_size, "group_size", 1)
    require_int(block, "block", 1)
    if tuple(hessian.shape) != (columns, columns):
        raise ValueError(f"hessian must be {(columns, columns)}, got {tuple(hessian.shape)}")
    order = torch.arange(columns, device=w.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    u = inverse_cholesky(hessian[order][:, order], damp).to(w.dtype)
    _, scale, zero_point = quantize_per_group(w, bits, size, symmetric)
    w, groups, codes = w[:, order], order // size, []
    # Blocks start anew with each group, so that its scale is computed from up-to-date weights.
    walk = columns if act_order else size
    starts = [s for g in range(0, columns, walk) for s in range(g, min(g + walk, columns), block)]
    for start, end in zip(starts, [*starts[1:], columns], strict=True):
        if not act_order and start % size == 0:
            _, new, zero = quantize_per_group(w[:, start : start + size], bits, size, symmetric)
            scale[:, start // size] = new[:, 0]
            if zero_point is not None and zero is not None:
                zero_point[:, start // size] = zero[:, 0]
        mine = groups[start:end]
        zeros = None if zero_point is None else zero_point[:, mine]
        rounded, errors = gptq_block(
            w[:, start:end], u[start:end, start:end], scale[:, mine], zeros, bits
        )
        w[:, end:] -= errors @ u[start:end, end:]
        codes.append(rounded)
    return torch.cat(codes, dim=1)[:, order.argsort()], scale, zero_point
