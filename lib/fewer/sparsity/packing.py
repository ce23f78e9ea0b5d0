"""Codes of 1, 2 or 4 bits in real bytes: the bit masks and 2-bit places of the sparse formats.

No paper: a tensor of bool holds each bit in a byte of its own, and so would hide what a format
costs. 8 / bits codes share a byte, the first in the lowest bits:

    1 bit:   byte 0 = c7 c6 c5 c4 c3 c2 c1 c0
    2 bits:  byte 0 = c3 c3 c2 c2 c1 c1 c0 c0

Each row starts on a byte of its own; the last byte is filled up with zero bits.
"""

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from fewer.sparsity.validate import require_code_bits, require_codes, require_int


def pack_bits(codes: Int[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows packed"]:
    """Pack each row of small codes into bytes, the first code in the lowest bits.

    Args:
        codes: [..., n], bool or integers in [0, 2^bits - 1].
        bits: 1, 2, 4 or 8: a code never crosses a byte.

    Returns:
        uint8, [..., ceil(n * bits / 8)]; what is left over in a row's last byte is 0.

    Raises:
        TypeError: codes is not a bool or integer tensor.
        ValueError: bits is none of these, codes is 0-d, or a code does not fit.

    Example:
        >>> pack_bits(torch.tensor([True, False, True]), 1).tolist()  # 0b101
        [5]
        >>> pack_bits(torch.tensor([[0, 3, 1, 2, 1]]), 2).tolist()  # 0b10_01_11_00, 0b01
        [[156, 1]]
    """
    per_byte = 8 // require_code_bits(bits)
    codes = require_codes(codes, bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    octets = codes.unflatten(-1, (codes.shape[-1] // per_byte, per_byte))
    return (octets << torch.arange(0, 8, bits, device=codes.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "*rows packed"], bits: int, n: int) -> Tensor:
    """The inverse of `pack_bits`: n codes a row.

    Args:
        packed: uint8, [..., ceil(n * bits / 8)].
        bits: 1, 2, 4 or 8, as packed.
        n: codes in a row (the bytes alone do not tell).

    Returns:
        uint8, [..., n].

    Raises:
        TypeError: packed is not uint8, or n is not an int.
        ValueError: bits is none of these, or packed has another number of bytes a row.

    Example:
        >>> unpack_bits(torch.tensor([[156, 1]], dtype=torch.uint8), bits=2, n=5).tolist()
        [[0, 3, 1, 2, 1]]
    """
    require_code_bits(bits)
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        got = packed.dtype if isinstance(packed, Tensor) else type(packed).__name__
        raise TypeError(f"packed must be a uint8 tensor, got {got}")
    row_bytes = -(-require_int(n, "n", 0) * bits // 8)
    if packed.ndim == 0 or packed.shape[-1] != row_bytes:
        raise ValueError(
            f"packed must have {row_bytes} bytes a row for {n} codes of {bits} bits, "
            f"got shape {tuple(packed.shape)}"
        )
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :n]


def stored_bytes(*tensors: Tensor) -> int:
    """The bytes that the tensors of an encoding fill: elements times the size of one.

    Example:
        >>> stored_bytes(torch.zeros(3).half(), torch.zeros(2, dtype=torch.uint8))
        8
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
