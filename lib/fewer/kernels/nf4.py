"""y = x W^T with W in NF4, looked up in registers; scales stay in 8 bits until they are used.

Dettmers, Pagnoni, Holtzman & Zettlemoyer 2023, "QLoRA" (arXiv 2305.14314); what NF4 is, and how a
matrix gets into it: `fewer.peft.nf4`. With blocks b of 64 columns, and their scales in 8 bits with
a scale of their own for 256 of them (double quantization):

    y[m, n] = sum over b of  c[n, b] * sum over k in b of  level[q[n, k]] x[m, k]
    c[n, b] = dynamic[code[n, b]] * outer[(n blocks + b) // 256] + mean

The frame is that of `w4a16`: words of 16 bits have a code of each of four slices of a block of
columns, sums are in float32, and few rows of x share the work on a tile of y. The levels are
rounded to the type of x, as any 16-bit product needs.

**The table** has 16 entries of two bytes. prmt takes four bytes at once out of eight, by four
selectors of four bits, the lower three of which count. So the levels' lower bytes and upper bytes
are looked up apart, among codes 0 to 7 and among 8 to 15, and bit 3 of the code says which of the
two is right. For that, two neighbouring words share their codes:

    even word   q0[c]  q0[c + 1]  q1[c]  q1[c + 1]     of slices 0 and 1, c even; lowest bits first
    odd word    q2[c]  q2[c + 1]  q3[c]  q3[c + 1]     of slices 2 and 3
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float, Int16, Int32, UInt8
from torch import Tensor

from fewer.kernels.launch import config, fall_back
from fewer.kernels.split_k import default_settings, scratch, store_sum
from fewer.kernels.w4a16 import DTYPES, block_of, has_ptx, load_of_slices
from fewer.peft.nf4 import NF4, dynamic_levels, nf4_levels, unpack_nibbles

BLOCK = 64  # columns that share a scale
OUTER = 256  # scales that share one of their own


# The levels, in the order in which the kernel numbers them: see `_look_up`.
ORDER = (0, 4, 1, 2, 8, 12, 9, 10, 3, 6, 5, 7, 11, 15, 13, 14)


def _look_up(dtype: torch.dtype) -> str:
    """PTX: eight codes in, in one register; four times two levels out.

    A selector of prmt with its upper bit set gives bit 7 of the byte that it selects, eight times
    over. So among the levels of codes 0 to 7, a code above gives 0x00 or 0xFF, and the other way
    round with that bit flipped. ORDER is such that the levels of i and i + 8 agree in their sign,
    and mostly in bit 7 of the lower byte too. Then one instruction joins what the two have found:
    bit 7 from either, the others by exclusive or (the table is kept flipped where it meets 0xFF).
    """
    bits = nf4_levels()[list(ORDER)].to(dtype)
    bits[ORDER.index(7)] = -0.0  # to be among the negative ones
    planes = {"low": 0, "high": 8}
    values = {
        name: [value >> shift & 0xFF for value in bits.view(torch.int16).tolist()]
        for name, shift in planes.items()
    }
    half = ""
    for name, v in values.items():
        agree = all((v[i] ^ v[i + 8]) < 0x80 for i in range(8))
        if agree:
            v = [value ^ 0x7F if value & 0x80 else value for value in v]
        t = [f"0x{int.from_bytes(v[i : i + 4], 'little'):08X}" for i in (0, 4, 8, 12)]
        half += f"prmt.b32 {name}, {t[0]}, {t[1]}, w;\nprmt.b32 other, {t[2]}, {t[3]}, x;\n"
        if agree:  # 0xB4 is z ? x : x ^ y, bit by bit
            half += f"lop3.b32 {name}, {name}, other, 0x80808080, 0xB4;\n"
        else:  # bit 3 of the code becomes a mask; 0xCA is x ? y : z
            half += "shr.u32 mask, w, 3;\nand.b32 mask, mask, 0x1111;\n"
            half += "prmt.b32 mask, 0x0000FF00, 0, mask;\n"
            half += f"lop3.b32 {name}, mask, other, {name}, 0xCA;\n"
    # Bytes 0 and 1 of both, then 2 and 3, as two pairs of levels.
    half += "prmt.b32 {first}, low, high, 0x5140;\nprmt.b32 {second}, low, high, 0x7362;\n"
    return (
        "{\n.reg .b32 w, x, low, high, other, mask;\n"
        "mov.b32 w, $4;\nxor.b32 x, w, 0x88888888;\n"
        + half.format(first="$0", second="$1")
        + "shr.u32 w, w, 16;\nshr.u32 x, x, 16;\n"
        + half.format(first="$2", second="$3")
        + "}"
    )


SLICES_BF16 = tl.constexpr(_look_up(torch.bfloat16))
SLICES_FP16 = tl.constexpr(_look_up(torch.float16))
FOUR_OF_ONE = tl.constexpr("=&r,=&r,=&r,=&r,r")


class WNF4(NamedTuple):
    """A matrix W [n, k] in NF4, as the kernel reads it: the bits of `NF4` in another order."""

    packed: Int16[Tensor, "n words"]  # k / 4 words a row
    absmax_codes: UInt8[Tensor, "blocks n"]
    absmax_scale: Float[Tensor, "outer"]
    absmax_mean: Float[Tensor, ""]


def for_kernel(stored: NF4, shape: tuple[int, int]) -> WNF4:
    """Put the codes of a matrix in the order of the kernel. Once, when the weights are loaded.

    Args:
        stored: from `fewer.peft.nf4.quantize_nf4`.
        shape: of the matrix, [n, k], k a multiple of 64.

    Raises:
        ValueError: another shape, or one that does not fit.

    Example:
        >>> from fewer.peft.nf4 import quantize_nf4
        >>> w = for_kernel(quantize_nf4(torch.randn(8, 128)), (8, 128))
        >>> tuple(w.packed.shape), tuple(w.absmax_codes.shape)
        ((8, 32), (2, 8))
    """
    n, k = shape
    if k % BLOCK or k == 0 or n * k != 2 * stored.packed.numel():
        raise ValueError(
            f"shape must be a matrix of {2 * stored.packed.numel()} codes with a multiple of "
            f"{BLOCK} columns, got {tuple(shape)}"
        )
    width = block_of(k, BLOCK, 4) // 4
    number = torch.tensor(ORDER, device=stored.packed.device).argsort().int()
    codes = number[unpack_nibbles(stored.packed, n * k).int()]
    codes = codes.view(n, -1, 2, 2, width // 2, 2)
    # [n, block, two pairs of slices, two slices, pair of columns, two columns]
    q = codes.permute(0, 1, 4, 2, 3, 5).flatten(4).flatten(1, 3)
    words = q[..., 0] | q[..., 1] << 4 | q[..., 2] << 8 | q[..., 3] << 12
    return WNF4(
        words.to(torch.int16), stored.absmax_codes.view(n, k // BLOCK).T.contiguous(), *stored[2:]
    )


def dequantize_for_kernel(w: WNF4, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n k"]:
    """The float32 matrix that `w` stands for, with levels rounded to this type."""
    n, k = len(w.packed), 4 * w.packed.shape[1]
    width = block_of(k, BLOCK, 4) // 4
    words = w.packed.view(n, -1, width // 2, 2).int()
    q = torch.stack([words >> 4 * i & 15 for i in range(4)], dim=-1).unflatten(-1, (2, 2))
    codes = q.permute(0, 1, 3, 4, 2, 5).reshape(n, k)
    levels, dynamic = _tables(dtype, w.packed.device)
    inner = dynamic[w.absmax_codes.T.flatten().int()]
    outer = w.absmax_scale.repeat_interleave(OUTER)[: inner.numel()]
    c = (inner * outer + w.absmax_mean).view(n, k // BLOCK, 1)
    return (c * levels.float()[codes].view(n, k // BLOCK, BLOCK)).flatten(1)


@cache
def _tables(
    dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "16"], Float[Tensor, "256"]]:
    """The levels as the kernel numbers them, and those of their scales."""
    return nf4_levels()[list(ORDER)].to(device, dtype), dynamic_levels().to(device)


@triton.jit
def _slices(words, levels_ptr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Four tiles of levels in this type, from a tile of words."""
    if ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            SLICES_BF16,
            FOUR_OF_ONE,
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            SLICES_FP16,
            FOUR_OF_ONE,
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even, odd = tl.split(words.reshape(words.shape[0], words.shape[1] // 2, 2))
        return (
            tl.load(levels_ptr + tl.join(even & 15, even >> 4 & 15).reshape(words.shape)),
            tl.load(levels_ptr + tl.join(even >> 8 & 15, even >> 12 & 15).reshape(words.shape)),
            tl.load(levels_ptr + tl.join(odd & 15, odd >> 4 & 15).reshape(words.shape)),
            tl.load(levels_ptr + tl.join(odd >> 8 & 15, odd >> 12 & 15).reshape(words.shape)),
        )


@triton.jit
def _scales(codes, dynamic_ptr, outer_ptr, mean, block):
    """c of four slices, in blocks counted through the whole matrix; `block` is the first one's.

    The slices are of one block, two or four, and rows are a multiple of that: so the 256 blocks
    that share an outer scale begin with a first slice, and one serves the four.
    """
    outer = tl.load(outer_ptr + (block >> 8))
    return (
        tl.load(dynamic_ptr + codes[0].to(tl.int32)) * outer + mean,
        tl.load(dynamic_ptr + codes[1].to(tl.int32)) * outer + mean,
        tl.load(dynamic_ptr + codes[2].to(tl.int32)) * outer + mean,
        tl.load(dynamic_ptr + codes[3].to(tl.int32)) * outer + mean,
    )


@triton.jit(do_not_specialize=["m"])
def _kernel(
    x_ptr,
    packed_ptr,
    codes_ptr,
    outer_ptr,
    mean_ptr,
    levels_ptr,
    dynamic_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    m,
    n,
    k,
    stride_x,
    stride_w,
    WIDTH: tl.constexpr,  # of a slice
    TILE: tl.constexpr,  # words that are unpacked at a time, at most WIDTH
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = WIDTH // TILE
    split, tile_n, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    some_row = tl.minimum(row, n - 1)
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, TILE)
    words_ptr = packed_ptr + some_row.to(tl.int64)[:, None] * stride_w + c[None, :]
    tokens_ptr = x_ptr + token.to(tl.int64)[:, None] * stride_x
    blocks = some_row * (k // 64)  # before this row
    mean = tl.load(mean_ptr)

    steps = k // (4 * WIDTH) * CHUNKS
    first, last = split * steps // SPLIT, (split + 1) * steps // SPLIT
    begin = tl.minimum(first, steps - 1) // CHUNKS * (4 * WIDTH)
    codes = load_of_slices(codes_ptr, begin, some_row, n, 64, WIDTH, 4)
    scales = _scales(codes, dynamic_ptr, outer_ptr, mean, blocks + begin // 64)
    begin = tl.minimum(first + 1, steps - 1) // CHUNKS * (4 * WIDTH)
    codes = load_of_slices(codes_ptr, begin, some_row, n, 64, WIDTH, 4)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(first, last):
        words = tl.load(words_ptr + step * TILE)
        # A step ahead, codes of scales become scales; two ahead, they are loaded.
        ahead = tl.minimum(step + 1, steps - 1) // CHUNKS * (4 * WIDTH)
        next_scales = _scales(codes, dynamic_ptr, outer_ptr, mean, blocks + ahead // 64)
        ahead = tl.minimum(step + 2, steps - 1) // CHUNKS * (4 * WIDTH)
        codes = load_of_slices(codes_ptr, ahead, some_row, n, 64, WIDTH, 4)
        slices = _slices(words, levels_ptr, dtype, ASM)
        column = step // CHUNKS * (4 * WIDTH) + step % CHUNKS * TILE + c
        for j in tl.static_range(4):
            live = (token < m)[:, None]
            x = tl.trans(tl.load(tokens_ptr + (column + j * WIDTH)[None, :], live, other=0.0))
            acc += scales[j][:, None] * tl.dot(slices[j], x)
        scales = next_scales
    tile = tile_m * tl.num_programs(1) + tile_n
    store_sum(acc, out_ptr, partial_ptr, counter_ptr, split, tile, row, token, m, n, SPLIT)


def _launch(
    x: Float[Tensor, "m k"],
    w: WNF4,
    out: Float[Tensor, "m n"],
    partial: Float[Tensor, "split m n"],
    counter: Int32[Tensor, "tiles"],
    settings: dict[str, int],
) -> None:
    """Write y to `out`, which has consecutive elements, as x has along k."""
    (m, n), k = out.shape, 4 * w.packed.shape[1]
    width = block_of(k, BLOCK, 4) // 4
    settings = {**settings, "TILE": min(settings["TILE"], width)}
    grid = (settings["SPLIT"], -(-n // settings["BLOCK_N"]), -(-m // settings["BLOCK_M"]))
    _kernel[grid](
        *(x, *w, *_tables(x.dtype, x.device), out, partial, counter),
        *(m, n, k, x.stride(0), w.packed.stride(0)),
        WIDTH=width,
        ASM=has_ptx(),
        **settings,
    )


@torch.library.custom_op("fewer::nf4_matmul", mutates_args=())
def _nf4_matmul(x: Tensor, packed: Tensor, codes: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    (m, k), n = x.shape, len(packed)
    out = x.new_empty(m, n)
    if out.numel():
        settings = config("nf4", default_settings(m, n, k), m=m, n=n, k=k)
        x = x if x.stride(1) == 1 else x.contiguous()
        partial, counter = scratch(m, n, settings, x.device)
        _launch(x, WNF4(packed, codes, scale, mean), out, partial, counter, settings)
    return out


@_nf4_matmul.register_kernel("cpu")
def _(x: Tensor, packed: Tensor, codes: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    fall_back("nf4_matmul")
    return nf4_matmul_reference(x, WNF4(packed, codes, scale, mean))


@_nf4_matmul.register_fake
def _(x: Tensor, packed: Tensor, codes: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def nf4_matmul(x: Float[Tensor, "*rows k"], w: WNF4) -> Float[Tensor, "*rows n"]:
    """x W^T, with sums in float32; no copy of W in more bits is ever in memory. No gradient.

    Args:
        x: bfloat16 or float16.
        w: from `for_kernel`, on the same device.

    Returns:
        in the type of x. The same bits at every call.

    Raises:
        TypeError: x of another type.
        ValueError: x has not k columns, or lies on another device.

    Example:
        >>> from fewer.peft.nf4 import quantize_nf4
        >>> w = for_kernel(quantize_nf4(torch.eye(64)), (64, 64))
        >>> nf4_matmul(torch.arange(64, dtype=torch.float16), w)[:4].tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    k = 4 * w.packed.shape[1]
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be bfloat16 or float16, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x must have {k} columns as w has, got shape {tuple(x.shape)}")
    if x.device != w.packed.device:
        raise ValueError(f"x must be on {w.packed.device} as w is, got {x.device}")
    return _nf4_matmul(x.reshape(-1, k), *w).view(*x.shape[:-1], len(w.packed))


def nf4_matmul_reference(x: Float[Tensor, "*rows k"], w: WNF4) -> Float[Tensor, "*rows n"]:
    """The same in plain torch, with W in float32, of levels in the type of x."""
    return F.linear(x.float(), dequantize_for_kernel(w, x.dtype)).to(x.dtype)
