"""Compressed sparse rows: each non-zero with its column, and where each row begins.

Saad 2003, "Iterative methods for sparse linear systems", 2nd edition, section 3.4; the format of
scipy.sparse and torch.sparse. For W [out, in], read row by row:

    values[j]         the j-th weight that is not zero
    columns[j]        its column
    row_pointers[r]   where row r begins: its weights are j = row_pointers[r] .. row_pointers[r+1]-1

    y_r = sum over j of row r:  values[j] * x[columns[j]]

Every non-zero pays for its column: with 16-bit weights and 32-bit columns, a matrix must be two
thirds zeros before a byte is saved.
"""

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from fewer.sparsity.validate import require_dims, require_floating, require_int


def encode_csr(
    w: Float[Tensor, "out in"], index_bits: int = 32
) -> tuple[Float[Tensor, "nnz"], Int[Tensor, "nnz"], Int32[Tensor, "pointers"]]:
    """Store a matrix as compressed sparse rows.

    Args:
        w: [out, in], any floating type. What is not 0 is stored, NaN too; -0.0 is a zero.
        index_bits: 32, 16 (up to 32768 columns) or 8 (up to 256), the size of a column's number.

    Returns:
        values: [nnz], the type of w, row by row, from left to right.
        columns: [nnz], the column of each value: int32, int16 or uint8, as index_bits says.
        row_pointers: [out + 1], int32, from 0 to nnz. The values of row r are those from
            row_pointers[r] up to, and without, row_pointers[r + 1]: none where the two are equal.

    Raises:
        TypeError: w is not a floating-point tensor.
        ValueError: w is not a matrix; index_bits is none of these, or too few for the columns.

    Example:
        >>> values, columns, row_pointers = encode_csr(torch.tensor([[0.0, 5.0], [0.0, 0.0]]))
        >>> values.tolist(), columns.tolist(), row_pointers.tolist()
        ([5.0], [1], [0, 1, 1])
    """
    require_dims(require_floating(w, "w"), 2, "w")
    index_dtypes = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
    if index_bits not in index_dtypes:
        raise ValueError(f"index_bits must be 8, 16 or 32, got {index_bits}")
    index_dtype = index_dtypes[index_bits]
    if w.shape[1] - 1 > torch.iinfo(index_dtype).max:
        raise ValueError(f"index_bits must number {w.shape[1]} columns, got {index_bits}")
    rows, columns = w.nonzero(as_tuple=True)
    ends = (w != 0).sum(dim=1).cumsum(dim=0)
    row_pointers = torch.cat([ends.new_zeros(1), ends])
    return w.detach()[rows, columns], columns.to(index_dtype), row_pointers.to(torch.int32)


def csr_rows(row_pointers: Int[Tensor, "pointers"], nonzeros: int) -> Int[Tensor, "nnz"]:
    """The row of each stored value: row r, as often as row r has values.

    Raises:
        ValueError: the pointers do not rise from 0 to `nonzeros`.

    Example:
        >>> csr_rows(torch.tensor([0, 2, 2, 3]), nonzeros=3).tolist()
        [0, 0, 2]
    """
    pointers = require_dims(row_pointers, 1, "row_pointers").to(torch.int64)
    counts = pointers.diff()
    if pointers.numel() == 0 or pointers[0] != 0 or pointers[-1] != nonzeros or (counts < 0).any():
        raise ValueError(
            f"row_pointers must rise from 0 to the number of values, {nonzeros}, "
            f"got {row_pointers.tolist()}"
        )
    return torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)


def decode_csr(
    values: Float[Tensor, "nnz"],
    columns: Int[Tensor, "nnz"],
    row_pointers: Int[Tensor, "pointers"],
    in_features: int,
) -> Float[Tensor, "out in"]:
    """The inverse of `encode_csr`: the dense matrix.

    Args:
        values, columns, row_pointers: as `encode_csr` returns them.
        in_features: the number of columns (the encoding does not tell).

    Returns:
        [out, in_features], the type of values.

    Raises:
        ValueError: the pointers do not rise from 0 to nnz; a column is not below in_features.

    Example:
        >>> decode_csr(*encode_csr(torch.tensor([[0.0, 5.0], [0.0, 0.0]])), in_features=2).tolist()
        [[0.0, 5.0], [0.0, 0.0]]
    """
    rows = csr_rows(row_pointers, values.numel())
    columns = require_columns(columns, values.numel(), require_int(in_features, "in_features", 0))
    w = values.new_zeros(row_pointers.numel() - 1, in_features)
    w[rows, columns] = values
    return w


def matvec_csr(
    values: Float[Tensor, "nnz"],
    columns: Int[Tensor, "nnz"],
    row_pointers: Int[Tensor, "pointers"],
    x: Float[Tensor, "in"],
) -> Float[Tensor, "out"]:
    """y = W x from the encoding: nnz multiplications, and no dense W.

    Args:
        values, columns, row_pointers: as `encode_csr` returns them.
        x: [in], any floating type.

    Returns:
        [out], computed in float32 (float64 where values or x is). Zero for an empty row.

    Raises:
        TypeError: values or x is not a floating-point tensor.
        ValueError: the pointers do not rise from 0 to nnz; a column is not below in.

    Example:
        >>> w = torch.tensor([[0.0, 5.0], [0.0, 0.0], [1.0, 2.0]])
        >>> matvec_csr(*encode_csr(w), torch.tensor([10.0, 1.0])).tolist()
        [5.0, 0.0, 12.0]
    """
    x = require_dims(require_floating(x, "x"), 1, "x")
    rows = csr_rows(row_pointers, values.numel())
    columns = require_columns(columns, values.numel(), x.numel())
    products = require_floating(values, "values") * x[columns]
    return products.new_zeros(row_pointers.numel() - 1).index_add(0, rows, products)


def require_columns(columns: Int[Tensor, "nnz"], nonzeros: int, in_features: int) -> Tensor:
    """Return `columns` as int64 (a uint8 index would be read as a mask), if there is one a value.

    Raises:
        ValueError: another number of them, or one that is not in [0, in_features - 1].
    """
    columns = require_dims(columns, 1, "columns").to(torch.int64)
    if columns.shape != (nonzeros,):
        raise ValueError(f"columns must have shape {(nonzeros,)}, got {tuple(columns.shape)}")
    if nonzeros and (int(columns.min()) < 0 or int(columns.max()) >= in_features):
        raise ValueError(
            f"columns must lie between 0 and {in_features - 1}, "
            f"got {int(columns.min())} to {int(columns.max())}"
        )
    return columns
