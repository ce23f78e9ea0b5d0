"""The 2:4 format: two values of every four, and two bits for the place of each.

Mishra et al. 2021, "Accelerating sparse deep neural networks" (arXiv 2104.08378). For
W [out, in] with at most two non-zeros in each group of four consecutive weights of a row:

    values [out, in / 2]                  the two kept weights of group 0, of group 1, ...
    index of a value, in {0, 1, 2, 3}     its place within its group; 2 bits, four to a byte

    W[r, 4 g + index] = value

The two indices of a group are different and rise. A group with fewer than two non-zeros stores a
zero with the first free place. Unlike CSR, the shape of what is stored is known before the matrix
is: this is why a matrix unit can read it.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fewer.sparsity.packing import pack_bits, unpack_bits
from fewer.sparsity.validate import require_dims, require_floating, require_groups


def encode_2_4(
    w: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out half"], UInt8[Tensor, "out row_bytes"]]:
    """Store a 2:4 sparse matrix as half of its values and their places.

    A place is the index of a value within its group of four, 0 to 3. The two of a group rise; a
    group with fewer than two non-zeros stores zeros too, each with the first place that is free.

    Args:
        w: [out, in], any floating type, in a multiple of 4, at most two non-zeros in a group of
            four (prune with `n_m_mask(scores, 2, 4)` first). -0.0 is a zero.

    Returns:
        values: [out, in / 2], the type of w.
        indices: uint8, [out, ceil(in / 8)]: the places, 2 bits each and four to a byte, the first
            in the lowest bits (`pack_bits` does that); in a row's last byte, bits left over are 0.

    Raises:
        TypeError: w is not a floating-point tensor.
        ValueError: w is not a matrix; in is not a multiple of 4; a group has three or four
            non-zeros.

    Example:
        >>> values, indices = encode_2_4(torch.tensor([[0.0, 5.0, 0.0, 6.0, 0.0, 0.0, 7.0, 0.0]]))
        >>> values.tolist(), indices.tolist()  # places 1, 3 and 0, 2: 0b10_00_11_01
        ([[5.0, 6.0, 0.0, 7.0]], [[141]])
    """
    require_dims(require_floating(w, "w"), 2, "w")
    groups = w.detach().unflatten(-1, (require_groups(w.shape[1], 4, "the columns of w"), 4))
    nonzero = groups != 0
    if (nonzero.sum(-1) > 2).any():
        row, group = (nonzero.sum(-1) > 2).nonzero()[0].tolist()
        raise ValueError(
            "w must have at most 2 non-zeros in every 4 consecutive weights of a row, "
            f"got {groups[row, group].tolist()} in row {row} from column {4 * group}"
        )
    first_nonzeros = nonzero.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :2]
    places = first_nonzeros.sort(dim=-1).values
    return groups.gather(-1, places).flatten(-2), pack_bits(places.flatten(-2), 2)


def columns_2_4(indices: UInt8[Tensor, "out row_bytes"], half: int) -> Tensor:
    """The column of each of a row's `half` values: 4 g + index, with two values in a group g.

    Example:
        >>> columns_2_4(torch.tensor([[0b10_00_11_01]], dtype=torch.uint8), half=4).tolist()
        [[1, 3, 4, 6]]
    """
    places = unpack_bits(require_dims(indices, 2, "indices"), 2, half).long()
    return places + 4 * (torch.arange(half, device=indices.device) // 2)


def require_values_2_4(values: Tensor, indices: Tensor) -> Float[Tensor, "out half"]:
    """Return `values` if it is a matrix of an even width, with as many rows as `indices`.

    Raises:
        ValueError: it is not.
    """
    if values.ndim != 2 or values.shape[1] % 2 or values.shape[0] != indices.shape[0]:
        raise ValueError(
            f"values must have {indices.shape[0]} rows and an even number of columns, "
            f"got shape {tuple(values.shape)}"
        )
    return values


def decode_2_4(
    values: Float[Tensor, "out half"], indices: UInt8[Tensor, "out row_bytes"]
) -> Float[Tensor, "out in"]:
    """The inverse of `encode_2_4`: the dense matrix.

    Args:
        values, indices: as `encode_2_4` returns them.

    Returns:
        [out, in], in = twice the columns of values, the type of values.

    Raises:
        TypeError: indices is not uint8.
        ValueError: shapes that do not fit.

    Example:
        >>> decode_2_4(*encode_2_4(torch.tensor([[0.0, 5.0, 0.0, 6.0]]))).tolist()
        [[0.0, 5.0, 0.0, 6.0]]
    """
    rows, half = require_values_2_4(values, indices).shape
    return values.new_zeros(rows, 2 * half).scatter(-1, columns_2_4(indices, half), values)


def matvec_2_4(
    values: Float[Tensor, "out half"],
    indices: UInt8[Tensor, "out row_bytes"],
    x: Float[Tensor, "in"],
) -> Float[Tensor, "out"]:
    """y = W x from the encoding: half of the multiplications, and no dense W.

    Args:
        values, indices: as `encode_2_4` returns them.
        x: [in], any floating type.

    Returns:
        [out], computed in float32 (float64 where values or x is).

    Raises:
        TypeError: values or x is not a floating-point tensor, indices is not uint8.
        ValueError: shapes that do not fit.

    Example:
        >>> w = torch.tensor([[0.0, 5.0, 0.0, 6.0]])
        >>> matvec_2_4(*encode_2_4(w), torch.tensor([1.0, 10.0, 100.0, 1000.0])).tolist()
        [6050.0]
    """
    half = require_values_2_4(values, indices).shape[1]
    x = require_floating(x, "x")
    if x.shape != (2 * half,):
        raise ValueError(f"x must have shape {(2 * half,)}, got {tuple(x.shape)}")
    return (require_floating(values, "values") * x[columns_2_4(indices, half)]).sum(dim=-1)
