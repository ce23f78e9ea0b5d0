"""Codes of 2, 3 or 4 bits in real bytes, and what a quantized weight really costs.

No paper: this is what makes "4 bits" true, since a tensor of int8 holds 4-bit codes in 8 bits each.
A row of n codes becomes a stream of n * bits bits, lowest first, and the stream is cut into bytes,
lowest bit first:

    bit k of code i         is  bit i * bits + k of the stream
    bit t of the stream     is  bit t mod 8 of byte t // 8

    4 bits:  byte 0 = c1 c1 c1 c1 c0 c0 c0 c0     the even code is the low nibble
    3 bits:  byte 0 = c2 c2 c1 c1 c1 c0 c0 c0     code 2 crosses into
             byte 1 = c5 c4 c4 c4 c3 c3 c3 c2     the next byte

Each row starts on a byte of its own, so that rows can be read alone; the last byte is filled up
with zero bits.
"""

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from fewer.quantization.validate import require_bits, require_codes, require_int


def require_packable(codes: Int[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows n"]:
    """Return codes as uint8, negative ones as their two's complement, if each fits in `bits` bits.

    They fit if all lie in [0, 2^bits - 1] (unsigned), or all in [-2^(bits-1), 2^(bits-1) - 1]
    (signed).

    Raises:
        TypeError: not an integer tensor.
        ValueError: 0-d, a code that does not fit, or bits out of range.
    """
    require_bits(bits)
    low, high = -(2 ** (bits - 1)), 2**bits - 1
    codes = require_codes(codes, low, high)
    if codes.ndim == 0:
        raise ValueError("codes must have at least one dimension, got a 0-d tensor")
    if (codes < 0).any() and (codes > high // 2).any():
        raise ValueError(
            f"codes must all lie between 0 and {high}, or all between {low} and {high // 2}, "
            f"got {int(codes.min())} to {int(codes.max())}"
        )
    return codes.to(torch.uint8)


def pack_codes(codes: Int[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows packed"]:
    """Pack each row of codes into ceil(n * bits / 8) bytes.

    A row is a stream of bits. Code i fills bits i * bits to i * bits + bits - 1 of it, its lowest
    bit first; bit t of the stream is bit t mod 8 (bit 0 is the lowest) of byte t // 8. So two 4-bit
    codes share a byte with the even one in the low nibble, and a 3-bit code may begin in one byte
    and end in the next. The bits that are left over in the last byte are 0.

    Args:
        codes: [..., n] integers of any width. Unsigned codes lie in [0, 2^bits - 1]; signed ones
            lie in [-2^(bits-1), 2^(bits-1) - 1] and are stored as two's complement in `bits` bits
            (-1 in 3 bits is 0b111).
        bits: 2 to 8 (8 is a plain copy of the bytes).

    Returns:
        uint8, [..., ceil(n * bits / 8)]: rows never share a byte. n = 0 gives 0 bytes.

    Raises:
        TypeError: codes is not an integer tensor, or bits is not an int.
        ValueError: codes is 0-d or does not fit in `bits` bits; bits out of range.

    Example:
        >>> pack_codes(torch.tensor([1, 2, 15]), bits=4).tolist()  # 0x21, 0x0f
        [33, 15]
        >>> pack_codes(torch.tensor([1, -1, 2]), bits=3).tolist()  # the stream 100 111 01|0
        [185, 0]
    """
    codes = require_packable(codes, bits)
    stream = torch.stack([(codes >> k) & 1 for k in range(bits)], dim=-1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    octets = stream.unflatten(-1, (stream.shape[-1] // 8, 8))
    return torch.stack([octets[..., t] << t for t in range(8)]).sum(0, dtype=torch.uint8)


def unpack_codes(
    packed: UInt8[Tensor, "*rows packed"], bits: int, n: int, signed: bool
) -> Int[Tensor, "*rows n"]:
    """The inverse of `pack_codes`.

    Args:
        packed: uint8, [..., ceil(n * bits / 8)].
        bits: 2 to 8, as packed.
        n: how many codes a row holds (the bytes alone do not tell).
        signed: read a code as two's complement.

    Returns:
        [..., n], int8 if signed, else uint8.

    Raises:
        TypeError: packed is not uint8, or bits or n is not an int.
        ValueError: packed has not ceil(n * bits / 8) bytes a row; bits out of range.

    Example:
        >>> packed = torch.tensor([185, 0], dtype=torch.uint8)
        >>> unpack_codes(packed, bits=3, n=3, signed=True).tolist()
        [1, -1, 2]
    """
    require_bits(bits)
    require_int(n, "n", 0)
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        got = packed.dtype if isinstance(packed, Tensor) else type(packed).__name__
        raise TypeError(f"packed must be a uint8 tensor, got {got}")
    row_bytes = -(-n * bits // 8)
    if packed.ndim == 0 or packed.shape[-1] != row_bytes:
        raise ValueError(
            f"packed must have {row_bytes} bytes a row for {n} codes of {bits} bits, "
            f"got shape {tuple(packed.shape)}"
        )
    stream = torch.stack([(packed >> t) & 1 for t in range(8)], dim=-1).flatten(-2)
    code_bits = stream[..., : n * bits].unflatten(-1, (n, bits))
    codes = torch.stack([code_bits[..., k] << k for k in range(bits)]).sum(0, dtype=torch.uint8)
    if not signed:
        return codes
    # Shifted to the top of its byte, the sign bit of the code is that of an int8; shifting back
    # down copies it.
    return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)


def stored_bytes(*tensors: Tensor | None) -> int:
    """The bytes that tensors fill: elements times the size of one. None counts 0.

    Example:
        >>> stored_bytes(torch.zeros(3, dtype=torch.uint8), torch.zeros(2).half(), None)
        7
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def bits_per_weight(weights: int, *stored: Tensor | None) -> float:
    """True bits a weight: 8 * bytes of everything that is stored, over the number of weights.

    Pass the tensors as they go to disk: packed codes, scales in the type in which they are kept
    (and used: dequantize with the same rounded scales), zero-points packed too if that is how they
    are kept.

    Args:
        weights: how many weights the stored tensors stand for.
        stored: packed codes, scales, zero-points; None (no zero-points) counts nothing.

    Raises:
        TypeError: weights is not an int.
        ValueError: weights below 1.

    Example:
        >>> codes, scale = torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 1).half()
        >>> bits_per_weight(codes.numel(), pack_codes(codes, 4), scale)  # 4 + 16 / 64
        4.25
    """
    return 8 * stored_bytes(*stored) / require_int(weights, "weights", 1)
