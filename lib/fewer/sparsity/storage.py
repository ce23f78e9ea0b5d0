"""What zeros save once they are stored: bits, bytes, and where each format breaks even.

No paper: this is bookkeeping, for a matrix of `out` x `in` weights, nnz of them not zero, with v
bits a value and i bits a column index:

    dense     out * in * v
    csr       nnz * (v + i)  +  32 (out + 1)             a column for each value, a pointer a row
    bitmap    nnz * v  +  8 out * ceil(in / 8)           a bit for each weight; rows fill bytes
    2:4       out * (in / 2) * v  +  8 out * ceil(in / 8)    2 bits for each of the two kept of four

So above which sparsity s = 1 - nnz / (out * in) is less stored than dense? For large matrices csr:
i / (v + i); bitmap: 1 / v. The 2:4 format always stores half of the weights, and needs as much as a
bitmap does at one half, to the bit; what it buys is that hardware can compute with it.
"""

import math

from fewer.sparsity.validate import require_int, require_pair


def storage_bits(
    storage: str, shape: tuple[int, int], nonzeros: int, value_bits: int = 16, index_bits: int = 32
) -> int:
    """Bits that a format fills: the formulas at the top of this file.

    For values of whole bytes this is 8 times the `stored_bytes` of what the encoder returns.

    Args:
        storage: "dense", "csr", "bitmap" or "2:4".
        shape: (out, in), each at least 1; in a multiple of 4 for "2:4".
        nonzeros: weights that are not zero; only csr and bitmap depend on it.
        value_bits: v, bits a weight, at least 1.
        index_bits: i, bits a column index of csr, enough to number all columns.

    Raises:
        TypeError: a number is not an int.
        ValueError: an unknown format; a number out of range; "2:4" where in is not a multiple of 4.

    Example:
        >>> [storage_bits(name, (8, 32), 128) / (8 * 32) for name in ("dense", "bitmap", "2:4")]
        [16.0, 9.0, 9.0]
    """
    rows, columns = require_pair(shape, "shape")
    require_int(nonzeros, "nonzeros", 0, rows * columns)
    require_int(value_bits, "value_bits", 1)
    require_int(index_bits, "index_bits", (columns - 1).bit_length())
    bitmap = 8 * rows * -(-columns // 8)
    if storage == "dense":
        return rows * columns * value_bits
    if storage == "csr":
        return nonzeros * (value_bits + index_bits) + 32 * (rows + 1)
    if storage == "bitmap":
        return nonzeros * value_bits + bitmap
    if storage == "2:4" and columns % 4 == 0:
        return rows * columns // 2 * value_bits + bitmap
    if storage == "2:4":
        raise ValueError(f"shape must be a multiple of 4 in its columns for 2:4, got {columns}")
    raise ValueError(f"storage must be 'dense', 'csr', 'bitmap' or '2:4', got {storage!r}")


def break_even_sparsity(
    storage: str, shape: tuple[int, int], value_bits: int = 16, index_bits: int = 32
) -> float:
    """The sparsity from which a format is smaller than the dense matrix.

    With D dense bits, E bits of the format for a matrix of zeros, and b more for each non-zero,
    E + b nnz < D gives s > 1 - (D - E) / (b * out * in).

    Args:
        storage: "csr", "bitmap" or "2:4".
        shape: (out, in), each at least 1; in a multiple of 4 for "2:4".
        value_bits: v, bits a weight, at least 1.
        index_bits: i, bits a column index of csr.

    Returns:
        csr and bitmap: s in [0, 1); they are smaller than dense above it, and exactly as large at
        it. "2:4": 0.5, the sparsity it needs and pays at. math.inf where even zeros do not pay.

    Raises:
        TypeError, ValueError: as `storage_bits`.

    Example:
        >>> [round(break_even_sparsity("csr", (4096, 4096), 16, bits), 3) for bits in (16, 32)]
        [0.5, 0.667]
        >>> break_even_sparsity("bitmap", (4096, 4096)), break_even_sparsity("2:4", (4096, 4096))
        (0.0625, 0.5)
    """
    dense = storage_bits("dense", shape, 0, value_bits, index_bits)
    empty, one = (storage_bits(storage, shape, n, value_bits, index_bits) for n in (0, 1))
    if empty >= dense:
        return math.inf
    if storage == "2:4":
        return 0.5
    return 1 - (dense - empty) / ((one - empty) * shape[0] * shape[1])
