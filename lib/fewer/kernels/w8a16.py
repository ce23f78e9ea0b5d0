"""y = x W^T with W in 8 bits: half of the bytes, in the frame of `w4a16`.

Dettmers, Lewis, Belkada & Zettlemoyer 2022, "LLM.int8()" (arXiv 2208.07339), made vector-wise int8
weights common; the magic numbers are of Kim, Henry, Fahim & Awadalla 2022 (arXiv 2211.10017). With
a scale for each row of W, or for each group G of its columns:

    y[m, n] = sum over G of  scale[G, n] * sum over k in G of  q[n, k] x[m, k],     |q| <= 127

Two codes a word of 16 bits, of two slices of a block of columns, as `w4a16` has four. The kernel is
its `packed_kernel`, with another function to unpack.

**Unpacking.** float16 holds 1024 + 128 + q exactly: of the bits of q in two's complement the sign
bit is flipped, and 0x6400 set. bfloat16 has room for 7 bits behind 0x43, which is 128; but the bit
above them is the lowest of the exponent, which makes 256 of 128. So the two parts of q, its lower 7
bits and -128 if it is negative, are masked out of the same byte:

    q  =  (0x4300 | q & 0x7F)  -  (0x4300 | q & 0x80)   =   (128 + lower bits) - (128 or 256)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float, Int8, Int16, Int32
from torch import Tensor

from fewer.kernels.launch import config, fall_back
from fewer.kernels.split_k import default_settings, scratch
from fewer.kernels.w4a16 import (
    DTYPES,
    GROUPS,
    block_of,
    launch_packed,
    require_group,
    require_operands,
)
from fewer.quantization import quantize_per_group

# lop3 with 0xEA is (x & y) | z, with 0x6A (x & y) ^ z
SLICES_BF16 = tl.constexpr("""{
.reg .b32 h, low, sign, minus;
shr.u32 h, $2, 8;
mov.b32 minus, 0xBF80BF80;
lop3.b32 low, $2, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, sign, minus, low;
lop3.b32 low, h, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 sign, h, 0x00800080, 0x43004300, 0xEA;
fma.rn.bf16x2 $1, sign, minus, low;
}""")
SLICES_FP16 = tl.constexpr("""{
.reg .b32 h, one, minus;
shr.u32 h, $2, 8;
mov.b32 one, 0x3C003C00;
mov.b32 minus, 0xE480E480;
lop3.b32 $0, $2, 0x00FF00FF, 0x64806480, 0x6A;
lop3.b32 $1, h, 0x00FF00FF, 0x64806480, 0x6A;
fma.rn.f16x2 $0, $0, one, minus;
fma.rn.f16x2 $1, $1, one, minus;
}""")
TWO_OF_ONE = tl.constexpr("=&r,=&r,r")
WHOLE_ROW = 1 << 30  # columns of a group that no row reaches the end of


class W8(NamedTuple):
    """A matrix W [n, k] in 8 bits, as the kernel reads it."""

    packed: Int16[Tensor, "n words"]  # two codes a word; k / 2 words, or a little more
    scale: Float[Tensor, "groups n"]  # in the type of x, bfloat16 or float16
    columns: int  # k


def pack_w8(codes: Int8[Tensor, "n k"], scale: Float[Tensor, "n groups"]) -> W8:
    """Codes from any quantizer in the layout of the kernel.

    Args:
        codes: int8.
        scale: bfloat16 or float16, one column, or one for each group of 16, 32, 64, 128 or 256.

    Raises:
        TypeError: codes or scale of another type.
        ValueError: shapes that do not fit.

    Example:
        >>> codes = torch.arange(32, dtype=torch.int8).view(1, 32)
        >>> w = pack_w8(codes, torch.ones(1, 1, dtype=torch.float16))
        >>> hex(w.packed[0, 0]), hex(w.packed[0, 5])  # columns 0 and 16, columns 5 and 21
        ('0x1000', '0x1505')
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {codes.dtype}")
    if scale.dtype not in DTYPES:
        raise TypeError(f"scale must be bfloat16 or float16, got {scale.dtype}")
    (n, k), groups = codes.shape, scale.shape[1]
    if scale.shape[0] != n or (groups != 1 and (k % groups or k // groups not in GROUPS)):
        raise ValueError(
            f"scale must have a row for each of the {n} rows of codes, and one column, or one for "
            f"each 16, 32, 64, 128 or 256 of their {k} columns, got shape {tuple(scale.shape)}"
        )
    group = k // groups if groups > 1 else WHOLE_ROW
    block = block_of(k, group, 2)
    codes = F.pad(codes, (0, -k % block))
    slices = codes.view(n, codes.shape[1] // block, 2, block // 2).to(torch.int16)
    words = (slices[:, :, 0] & 0xFF | slices[:, :, 1] << 8).flatten(1)
    more = codes.shape[1] // group - groups if groups > 1 else 0
    return W8(words, F.pad(scale, (0, more)).T.contiguous(), k)


def quantize_w8(w: Float[Tensor, "n k"], group: int | None = None) -> W8:
    """Round a weight matrix to 8 bits, with a scale for each row, or each `group` weights of one.

    The scale is max |w| / 127, rounded to the type of w; then the weights are rounded to multiples
    of that.

    Args:
        w: bfloat16 or float16, finite; k a multiple of the group.
        group: 16, 32, 64, 128 or 256 weights; None: whole rows.

    Raises:
        TypeError: another type.
        ValueError: not a matrix, empty or not finite; a group that does not divide k.

    Example:
        >>> w = quantize_w8(torch.tensor([[0.5, -127.0], [1.0, 2.0]], dtype=torch.float16))
        >>> dequantize_w8(w).tolist()
        [[0.0, -127.0], [1.0, 2.0]]
    """
    if w.dtype not in DTYPES:
        raise TypeError(f"w must be bfloat16 or float16, got {w.dtype}")
    if group is not None:
        require_group(w.shape[-1], group)
    _, scale, _ = quantize_per_group(w, 8, group or w.shape[-1])
    stored = scale.to(w.dtype)
    codes = w.float().view(*scale.shape, -1) / stored.float()[..., None]
    return pack_w8(codes.round().clamp(-127, 127).to(torch.int8).view(w.shape), stored)


def dequantize_w8(w: W8) -> Float[Tensor, "n k"]:
    """The float32 matrix that `w` stands for."""
    packed, scale, k = w
    block, _ = _layout(packed, scale, k)
    words = packed.view(len(packed), -1, 1, block // 2)
    codes = torch.cat([words << 8 >> 8, words >> 8], dim=2)  # the sign bit comes down with it
    groups = codes.view(len(packed), len(scale), -1).float()
    return (groups * scale.T[..., None].float()).flatten(1)[:, :k]


def _layout(packed: Tensor, scale: Tensor, columns: int) -> tuple[int, int]:
    """The block and the group of a packed matrix."""
    group = 2 * packed.shape[1] // len(scale) if len(scale) > 1 else WHOLE_ROW
    return block_of(columns, group, 2), group


@triton.jit
def _unpack(words, dtype: tl.constexpr, ASM: tl.constexpr):
    """Two tiles of q in this type, from a tile of words."""
    if ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            SLICES_BF16,
            TWO_OF_ONE,
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            SLICES_FP16,
            TWO_OF_ONE,
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return (((words & 255) ^ 128) - 128).to(dtype), (words >> 8).to(dtype)


def _launch(
    x: Float[Tensor, "m k"],
    w: W8,
    out: Float[Tensor, "m n"],
    partial: Float[Tensor, "split m n"],
    counter: Int32[Tensor, "tiles"],
    settings: dict[str, int],
) -> None:
    """Write y to `out`, which has consecutive elements, as x has along k."""
    block, group = _layout(*w)
    launch_packed(
        *(x, w.packed, w.scale, None, w.columns, out, partial, counter, settings),
        block=block,
        GROUP=group,
        SLICES=2,
        UNPACK=_unpack,
    )


@torch.library.custom_op("fewer::w8a16_matmul", mutates_args=())
def _w8a16_matmul(x: Tensor, packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    (m, k), n = x.shape, len(packed)
    out = x.new_empty(m, n)
    if out.numel():
        settings = config("w8a16", default_settings(m, n, k), m=m, n=n, k=k)
        x = x if x.stride(1) == 1 else x.contiguous()
        partial, counter = scratch(m, n, settings, x.device)
        _launch(x, W8(packed, scale, columns), out, partial, counter, settings)
    return out


@_w8a16_matmul.register_kernel("cpu")
def _(x: Tensor, packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    fall_back("w8a16_matmul")
    return w8a16_matmul_reference(x, W8(packed, scale, columns))


@_w8a16_matmul.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def w8a16_matmul(x: Float[Tensor, "*rows k"], w: W8) -> Float[Tensor, "*rows n"]:
    """x W^T, with sums in float32. No gradient.

    Args:
        x: in the type of w.scale.
        w: from `quantize_w8` or `pack_w8`, on the same device.

    Returns:
        in the type of x. The same bits at every call.

    Raises:
        TypeError: x is of another type than w.scale.
        ValueError: x has not k columns, or lies on another device.

    Example:
        >>> w = quantize_w8(torch.eye(32, dtype=torch.float16))
        >>> w8a16_matmul(torch.arange(32, dtype=torch.float16), w)[:4].tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    require_operands(x, w.scale, w.columns)
    y = _w8a16_matmul(x.reshape(-1, w.columns), w.packed, w.scale, w.columns)
    return y.view(*x.shape[:-1], len(w.packed))


def w8a16_matmul_reference(x: Float[Tensor, "*rows k"], w: W8) -> Float[Tensor, "*rows n"]:
    """The same in plain torch, with W in float32."""
    return F.linear(x.float(), dequantize_w8(w)).to(x.dtype)
