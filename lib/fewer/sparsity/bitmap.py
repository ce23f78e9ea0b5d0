"""A bitmap: one bit for each weight says whether it is there; the values follow in order.

Gondimalla et al. 2019, "SparTen" (MICRO 2019, doi 10.1145/3352460.3358291), where a bit mask
(SparseMap) goes with the packed values. For W [out, in]:

    bit c mod 8 of bitmap[r, c // 8]  is 1  where W[r, c] is not 0     (bit 0 is the lowest)
    values                            the non-zeros, row by row, from left to right

    y_r = sum over the set bits c of row r:  next value * x[c]

The map costs one bit a weight whatever the sparsity: with 16-bit weights it pays from one zero in
sixteen. CSR overtakes it only where a column index costs less than the map does for each non-zero,
1 / (1 - s) bits: with 16-bit columns, above 15 zeros in sixteen.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fewer.sparsity.packing import pack_bits, unpack_bits
from fewer.sparsity.validate import require_dims, require_floating


def encode_bitmap(
    w: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "nnz"], UInt8[Tensor, "out row_bytes"]]:
    """Store a matrix as its non-zeros and a bit for each weight.

    Args:
        w: [out, in], any floating type. What is not 0 is stored, NaN too; -0.0 is a zero.

    Returns:
        values: [nnz], the type of w, row by row, from left to right.
        bitmap: uint8, [out, ceil(in / 8)]; the bits left over in a row's last byte are 0.

    Raises:
        TypeError: w is not a floating-point tensor.
        ValueError: w is not a matrix.

    Example:
        >>> values, bitmap = encode_bitmap(torch.tensor([[0.0, 5.0, 6.0], [0.0, 0.0, 7.0]]))
        >>> values.tolist(), bitmap.tolist()  # 0b110, 0b100
        ([5.0, 6.0, 7.0], [[6], [4]])
    """
    require_dims(require_floating(w, "w"), 2, "w")
    mask = w.detach() != 0
    return w.detach()[mask], pack_bits(mask, 1)


def require_bitmap(
    values: Float[Tensor, "nnz"], bitmap: UInt8[Tensor, "out row_bytes"], in_features: int
) -> Tensor:
    """Return the bitmap as a bool mask [out, in], if it has one bit for each value.

    Raises:
        ValueError: another number of bytes a row, or of bits that are set.
    """
    mask = unpack_bits(require_dims(bitmap, 2, "bitmap"), 1, in_features).bool()
    if values.shape != (int(mask.sum()),):
        raise ValueError(
            f"values must have shape {(int(mask.sum()),)}, one for each bit that is set in the "
            f"bitmap, got {tuple(values.shape)}"
        )
    return mask


def decode_bitmap(
    values: Float[Tensor, "nnz"], bitmap: UInt8[Tensor, "out row_bytes"], in_features: int
) -> Float[Tensor, "out in"]:
    """The inverse of `encode_bitmap`: the dense matrix.

    Args:
        values, bitmap: as `encode_bitmap` returns them.
        in_features: the number of columns (the bytes alone do not tell).

    Returns:
        [out, in_features], the type of values.

    Raises:
        TypeError: bitmap is not uint8.
        ValueError: the bitmap has not ceil(in_features / 8) bytes a row, or not a bit a value.

    Example:
        >>> decode_bitmap(*encode_bitmap(torch.tensor([[0.0, 5.0, 6.0]])), in_features=3).tolist()
        [[0.0, 5.0, 6.0]]
    """
    mask = require_bitmap(values, bitmap, in_features)
    w = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    w[mask] = values
    return w


def matvec_bitmap(
    values: Float[Tensor, "nnz"], bitmap: UInt8[Tensor, "out row_bytes"], x: Float[Tensor, "in"]
) -> Float[Tensor, "out"]:
    """y = W x from the encoding: nnz multiplications, and no dense W.

    The map itself is unpacked here, to one byte a bit; a kernel would do that in registers.

    Args:
        values, bitmap: as `encode_bitmap` returns them.
        x: [in], any floating type.

    Returns:
        [out], computed in float32 (float64 where values or x is). Zero for an empty row.

    Raises:
        TypeError: values or x is not a floating-point tensor, bitmap is not uint8.
        ValueError: the bitmap has not ceil(in / 8) bytes a row, or not a bit a value.

    Example:
        >>> w = torch.tensor([[0.0, 5.0], [0.0, 0.0], [1.0, 2.0]])
        >>> matvec_bitmap(*encode_bitmap(w), torch.tensor([10.0, 1.0])).tolist()
        [5.0, 0.0, 12.0]
    """
    x = require_dims(require_floating(x, "x"), 1, "x")
    rows, columns = require_bitmap(values, bitmap, x.numel()).nonzero(as_tuple=True)
    products = require_floating(values, "values") * x[columns]
    return products.new_zeros(bitmap.shape[0]).index_add(0, rows, products)
