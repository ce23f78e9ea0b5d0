"""y = x W^T with W in 4 bits: a quarter of the bytes, to be multiplied as they arrive.

Frantar, Castro, Chen, Hoefler & Alistarh 2024, "MARLIN: Mixed-precision auto-regressive parallel
inference on large language models" (arXiv 2408.11743), shows that a product with 4-bit weights can
run at the speed of the memory up to dozens of rows; the magic numbers are of Kim, Henry, Fahim &
Awadalla 2022, "Who says elephants can't run" (arXiv 2211.10017). Row n of W, group G of g columns:

    y[m, n] = sum over G of  scale[G, n] * sum over k in G of  (q[n, k] - z[G, n]) x[m, k]

with codes q from 0 to 15, and z = 8 where it is symmetric.

**The layout** spares every shuffle. A row is cut into blocks of B columns, a block into four slices
of B / 4; word c of a block, 16 bits, holds column c of each slice:

    word c  =  q[c]  +  q[B/4 + c] << 4  +  q[2B/4 + c] << 8  +  q[3B/4 + c] << 12

So from a tile of words come four tiles of weights, each where its words were, and each belongs to
consecutive columns of x. No slice crosses a group, so each product is scaled as a whole.

**Unpacking** makes no integer a float. A bfloat16 between 128 and 256 has steps of 1: the bits of
128 + q are 0x4300 | q (of 1024 + q in float16, 0x6400 | q). One instruction masks and sets them for
two weights, one takes off 136 = 128 + 8, exactly.

**The product** is made transposed, y^T = W x^T: weights are the left operand, which tensor cores
take from registers, where they are unpacked. With few rows of x, several programs share a tile of y
(`split_k`).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float, Int16, Int32, UInt8
from torch import Tensor

from fewer.kernels.interpreter import interpreted
from fewer.kernels.launch import config, fall_back
from fewer.kernels.split_k import default_settings, scratch, store_sum
from fewer.quantization import quantize_per_group
from fewer.validate import require_int

GROUPS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)

_SLICES = """{{
.reg .b32 a, b, c, one;
shr.u32 a, $4, 4;
shr.u32 b, $4, 8;
shr.u32 c, $4, 12;
lop3.b32 $0, $4, 0x000F000F, {magic}, 0xEA;
lop3.b32 $1, a, 0x000F000F, {magic}, 0xEA;
lop3.b32 $2, b, 0x000F000F, {magic}, 0xEA;
lop3.b32 $3, c, 0x000F000F, {magic}, 0xEA;
mov.b32 one, {one};
mov.b32 c, {minus};
fma.rn.{type} $0, $0, one, c;
fma.rn.{type} $1, $1, one, c;
fma.rn.{type} $2, $2, one, c;
fma.rn.{type} $3, $3, one, c;
}}"""  # 0xEA is (x & y) | z; multiplied by one since sub.bf16x2 came with the H100, fma before
SLICES_BF16 = tl.constexpr(
    _SLICES.format(magic="0x43004300", one="0x3F803F80", minus="0xC308C308", type="bf16x2")
)
SLICES_FP16 = tl.constexpr(
    _SLICES.format(magic="0x64006400", one="0x3C003C00", minus="0xE408E408", type="f16x2")
)
FOUR_OF_ONE = tl.constexpr("=&r,=&r,=&r,=&r,r")


class W4(NamedTuple):
    """A matrix W [n, k] in 4 bits, as the kernel reads it."""

    packed: Int16[Tensor, "n words"]  # four codes a word; k / 4 words, or a little more
    scale: Float[Tensor, "groups n"]  # in the type of x, bfloat16 or float16
    zero: UInt8[Tensor, "groups n"] | None  # 0 to 15; None: all are 8
    columns: int  # k


def block_of(columns: int, group: int, slices: int) -> int:
    """B, how many columns are packed together: so that no slice of B / `slices` crosses a group.

    The largest of few candidates that leaves the least to be filled up at the end of a row. A slice
    has 16 columns at least (tensor cores take no fewer), and 128 at most.

    Example:
        >>> block_of(8192, 128, 4), block_of(576, 64, 4), block_of(96, 32, 4)
        (512, 64, 128)
    """
    widths = [w for w in (128, 64, 32, 16) if group % w == 0]
    return min((slices * w for w in widths), key=lambda block: -(-columns // block) * block)


def pack_w4(
    codes: UInt8[Tensor, "n k"],
    scale: Float[Tensor, "n groups"],
    zero: Int32[Tensor, "n groups"] | None = None,
) -> W4:
    """Codes from any quantizer (rounding, GPTQ, ...) in the layout of the kernel.

    Args:
        codes: uint8, 0 to 15.
        scale: bfloat16 or float16, a column for each group of k / groups weights of a row.
        zero: the code that stands for 0 in each group; None: 8 everywhere.

    Raises:
        TypeError: scale is neither bfloat16 nor float16.
        ValueError: codes above 15, or zero outside of 0 to 15; shapes that do not fit; groups of a
            size other than 16, 32, 64, 128 or 256.

    Example:
        >>> codes = torch.arange(64, dtype=torch.uint8).view(1, 64) % 16
        >>> w = pack_w4(codes, torch.ones(1, 4, dtype=torch.float16))
        >>> hex(w.packed[0, 0]), hex(w.packed[0, 7])  # columns 0, 16, 32, 48; 7, 23, 39, 55
        ('0x0', '0x7777')
        >>> dequantize_w4(w)[0, :4].tolist()
        [-8.0, -7.0, -6.0, -5.0]
    """
    if scale.dtype not in DTYPES:
        raise TypeError(f"scale must be bfloat16 or float16, got {scale.dtype}")
    n, k = codes.shape
    group = k // scale.shape[1]
    if scale.shape[0] != n or k % scale.shape[1] or group not in GROUPS:
        raise ValueError(
            f"scale must have a row for each of the {n} rows of codes, and a column for each 16, "
            f"32, 64, 128 or 256 of their {k} columns, got shape {tuple(scale.shape)}"
        )
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"zero must have shape {tuple(scale.shape)}, got {tuple(zero.shape)}")
    for name, values in (("codes", codes), ("zero", zero)):
        if values is not None and values.numel() and not 0 <= values.min() <= values.max() <= 15:
            raise ValueError(
                f"{name} must be between 0 and 15, got {values.min()} to {values.max()}"
            )
    block = block_of(k, group, 4)
    codes = F.pad(codes, (0, -k % block), value=8)
    slices = codes.view(n, codes.shape[1] // block, 4, block // 4).to(torch.int32)
    words = sum(slices[:, :, j] << 4 * j for j in range(4)).flatten(1).to(torch.int16)  # type: ignore[union-attr]
    more = codes.shape[1] // group - scale.shape[1]
    return W4(
        words,
        F.pad(scale, (0, more)).T.contiguous(),
        None if zero is None else F.pad(zero.to(torch.uint8), (0, more), value=8).T.contiguous(),
        k,
    )


def quantize_w4(w: Float[Tensor, "n k"], group: int = 128, symmetric: bool = True) -> W4:
    """Round a weight matrix to 4 bits, with a scale for each `group` weights of a row.

    Scale and zero-point are those of `fewer.quantization.quantize_per_group`; the scale is rounded
    to the type of w, then the weights are rounded to multiples of that.

    Args:
        w: bfloat16 or float16, finite; k a multiple of the group.
        group: 16, 32, 64, 128 or 256 weights.
        symmetric: zero-points are all 8 and codes 1 to 15; else zero-points of their own.

    Raises:
        TypeError: another type.
        ValueError: not a matrix, empty or not finite; a group that does not divide k.

    Example:
        >>> w = torch.tensor([[0.5, -1.0, 3.5, 7.0] * 8], dtype=torch.float16)
        >>> dequantize_w4(quantize_w4(w, group=32))[0, :4].tolist()
        [0.0, -1.0, 4.0, 7.0]
    """
    if w.dtype not in DTYPES:
        raise TypeError(f"w must be bfloat16 or float16, got {w.dtype}")
    require_group(w.shape[-1], group)
    _, scale, zero = quantize_per_group(w, 4, group, symmetric)
    stored = scale.to(w.dtype)
    z = torch.full_like(scale, 8) if zero is None else zero
    codes = w.float().view(*scale.shape, group) / stored.float()[..., None]
    codes = (codes.round() + z[..., None]).clamp(1 if symmetric else 0, 15)
    return pack_w4(codes.to(torch.uint8).view(w.shape), stored, zero)


def require_group(columns: int, group: int) -> None:
    """Whether rows of so many columns can be cut into groups of this size; or raise."""
    require_int(group, "group", 16, 256)
    if group not in GROUPS:
        raise ValueError(f"group must be 16, 32, 64, 128 or 256, got {group}")
    if columns % group:
        raise ValueError(f"group must divide the {columns} columns of w, got {group}")


def dequantize_w4(w: W4) -> Float[Tensor, "n k"]:
    """The float32 matrix that `w` stands for."""
    packed, scale, zero, k = w
    block, group = _layout(packed, scale, k)
    words = packed.view(len(packed), -1, 1, block // 4).int()
    codes = torch.cat([words >> 4 * j & 15 for j in range(4)], dim=2).view(len(packed), -1, group)
    z = 8 if zero is None else zero.T[..., None].float()
    return ((codes.float() - z) * scale.T[..., None].float()).flatten(1)[:, :k]


def _layout(packed: Tensor, scale: Tensor, columns: int) -> tuple[int, int]:
    """The block and the group of a packed matrix."""
    group = 4 * packed.shape[1] // scale.shape[0]
    return block_of(columns, group, 4), group


@triton.jit
def _unpack(words, dtype: tl.constexpr, ASM: tl.constexpr):
    """Four tiles of q - 8 in this type, from a tile of words."""
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
        return (
            ((words & 15) - 8).to(dtype),
            ((words >> 4 & 15) - 8).to(dtype),
            ((words >> 8 & 15) - 8).to(dtype),
            ((words >> 12 & 15) - 8).to(dtype),
        )


@triton.jit
def load_of_slices(
    ptr, column, row, n, GROUP: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr
):
    """What a group has, of each slice of the block that begins in this column: for these rows."""
    first = ptr + row
    a = tl.load(first + column // GROUP * n)
    b = tl.load(first + (column + WIDTH) // GROUP * n)
    if SLICES == 2:
        return a, b
    else:
        c = tl.load(first + (column + 2 * WIDTH) // GROUP * n)
        d = tl.load(first + (column + 3 * WIDTH) // GROUP * n)
        return a, b, c, d


@triton.jit
def _sum_of_slice(ptr, column, token, m, k, TILE: tl.constexpr):
    """The sum of x over the tile that begins in this column, for these rows; 0 behind the last."""
    some = token < tl.where(column < k, m, 0)
    return tl.load(ptr + token * (k // TILE) + column // TILE, some, other=0.0)


@triton.jit
def _sums_of_slices(
    ptr, column, token, m, k, TILE: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr
):
    """`_sum_of_slice` of each slice's tile, the first of which begins in this column."""
    a = _sum_of_slice(ptr, column, token, m, k, TILE)
    b = _sum_of_slice(ptr, column + WIDTH, token, m, k, TILE)
    if SLICES == 2:
        return a, b
    else:
        c = _sum_of_slice(ptr, column + 2 * WIDTH, token, m, k, TILE)
        d = _sum_of_slice(ptr, column + 3 * WIDTH, token, m, k, TILE)
        return a, b, c, d


@triton.jit(do_not_specialize=["m"])
def packed_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    sums_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    m,
    n,
    k,
    stride_x,
    stride_w,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,  # of a slice
    TILE: tl.constexpr,  # words that are unpacked at a time, at most WIDTH
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,  # k is a multiple of the block
    SLICES: tl.constexpr,  # of a block
    UNPACK: tl.constexpr,  # the function that makes of words as many tiles of weights
    ASM: tl.constexpr,
):
    """A tile of y^T and a part of k: of packed weights, whatever they are unpacked to."""
    BLOCK: tl.constexpr = SLICES * WIDTH
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = WIDTH // TILE  # of a block
    # Those of more rows would take too many registers.
    SUMS_AHEAD: tl.constexpr = zero_ptr is not None and BLOCK_M <= 16
    split, tile_n, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    some_row = tl.minimum(row, n - 1)  # a mask would do; what the rows behind give is not stored
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, TILE)
    words_ptr = packed_ptr + some_row.to(tl.int64)[:, None] * stride_w + c[None, :]
    tokens_ptr = x_ptr + token.to(tl.int64)[:, None] * stride_x

    steps = tl.cdiv(k, BLOCK) * CHUNKS
    first, last = split * steps // SPLIT, (split + 1) * steps // SPLIT
    begin = tl.minimum(first, steps - 1) // CHUNKS * BLOCK
    scales = load_of_slices(scale_ptr, begin, some_row, n, GROUP, WIDTH, SLICES)
    zeros, sums = scales, scales
    if zero_ptr is not None:
        zeros = load_of_slices(zero_ptr, begin, some_row, n, GROUP, WIDTH, SLICES)
    if SUMS_AHEAD:
        begin += tl.minimum(first, steps - 1) % CHUNKS * TILE
        sums = _sums_of_slices(sums_ptr, begin, token, m, k, TILE, WIDTH, SLICES)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(first, last):
        words = tl.load(words_ptr + step * TILE)
        # Scales are loaded a step ahead: the compiler does that for operands of products alone.
        ahead = tl.minimum(step + 1, steps - 1) // CHUNKS * BLOCK
        next_scales = load_of_slices(scale_ptr, ahead, some_row, n, GROUP, WIDTH, SLICES)
        next_zeros, next_sums = next_scales, next_scales
        if zero_ptr is not None:
            next_zeros = load_of_slices(zero_ptr, ahead, some_row, n, GROUP, WIDTH, SLICES)
        if SUMS_AHEAD:
            ahead += tl.minimum(step + 1, steps - 1) % CHUNKS * TILE
            next_sums = _sums_of_slices(sums_ptr, ahead, token, m, k, TILE, WIDTH, SLICES)
        slices = UNPACK(words, dtype, ASM)
        start = step // CHUNKS * BLOCK + step % CHUNKS * TILE
        for j in tl.static_range(SLICES):
            column = start + j * WIDTH + c
            live = (token < m)[:, None]
            if not EVEN:
                live = live & (column < k)[None, :]
            x = tl.trans(tl.load(tokens_ptr + column[None, :], live, other=0.0))
            part = tl.dot(slices[j], x)
            if zero_ptr is not None:  # (q - z) x = (q - 8) x + (8 - z) x, here summed over columns
                if SUMS_AHEAD:
                    total = sums[j]
                else:
                    total = _sum_of_slice(sums_ptr, start + j * WIDTH, token, m, k, TILE)
                part += (8.0 - zeros[j].to(tl.float32))[:, None] * total[None, :]
            acc += scales[j].to(tl.float32)[:, None] * part
        scales = next_scales
        zeros = next_zeros
        sums = next_sums
    tile = tile_m * tl.num_programs(1) + tile_n
    store_sum(acc, out_ptr, partial_ptr, counter_ptr, split, tile, row, token, m, n, SPLIT)


def _launch(
    x: Float[Tensor, "m k"],
    w: W4,
    out: Float[Tensor, "m n"],
    partial: Float[Tensor, "split m n"],
    counter: Int32[Tensor, "tiles"],
    settings: dict[str, int],
) -> None:
    """Write y to `out`, which has consecutive elements, as x has along k."""
    block, group = _layout(w.packed, w.scale, w.columns)
    launch_packed(
        *(x, w.packed, w.scale, w.zero, w.columns, out, partial, counter, settings),
        block=block,
        GROUP=group,
        SLICES=4,
        UNPACK=_unpack,
    )


def launch_packed(
    x: Float[Tensor, "m k"],
    packed: Int16[Tensor, "n words"],
    scale: Float[Tensor, "groups n"],
    zero: UInt8[Tensor, "groups n"] | None,
    k: int,
    out: Float[Tensor, "m n"],
    partial: Float[Tensor, "split m n"],
    counter: Int32[Tensor, "tiles"],
    settings: dict[str, int],
    *,
    block: int,
    SLICES: int,
    **constants: Any,
) -> None:
    """Launch `packed_kernel` on weights of any number of bits."""
    m, n = out.shape
    width = block // SLICES
    settings = {**settings, "TILE": min(settings["TILE"], width)}
    sums = None
    if zero is not None:  # of x, in each tile of columns, as the kernel needs them
        sums = x.unflatten(1, (-1, settings["TILE"])).sum(2, dtype=torch.float32)
    grid = (settings["SPLIT"], -(-n // settings["BLOCK_N"]), -(-m // settings["BLOCK_M"]))
    packed_kernel[grid](
        *(x, packed, scale, zero, sums, out, partial, counter),
        *(m, n, k, x.stride(0), packed.stride(0)),
        WIDTH=width,
        EVEN=k % block == 0,
        SLICES=SLICES,
        ASM=has_ptx(),
        **settings,
        **constants,
    )


def has_ptx() -> bool:
    """Whether kernels may hold instructions of NVIDIA's: not in the interpreter, for one."""
    return not interpreted() and torch.version.cuda is not None


@torch.library.custom_op("fewer::w4a16_matmul", mutates_args=())
def _w4a16_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, columns: int
) -> Tensor:
    (m, k), n = x.shape, len(packed)
    out = x.new_empty(m, n)
    if out.numel():
        kernel = "w4a16" if zero is None else "w4a16_zeros"
        settings = config(kernel, default_settings(m, n, k), m=m, n=n, k=k)
        x = x if x.stride(1) == 1 else x.contiguous()
        partial, counter = scratch(m, n, settings, x.device)
        _launch(x, W4(packed, scale, zero, columns), out, partial, counter, settings)
    return out


@_w4a16_matmul.register_kernel("cpu")
def _(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, columns: int) -> Tensor:
    fall_back("w4a16_matmul")
    return w4a16_matmul_reference(x, W4(packed, scale, zero, columns))


@_w4a16_matmul.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def w4a16_matmul(x: Float[Tensor, "*rows k"], w: W4) -> Float[Tensor, "*rows n"]:
    """x W^T, with sums in float32. No gradient.

    Args:
        x: in the type of w.scale. Few rows are what it is made for: up to 16, the bytes of w are
            nearly all that there is to move.
        w: from `quantize_w4` or `pack_w4`, on the same device.

    Returns:
        in the type of x. The same bits at every call.

    Raises:
        TypeError: x is of another type than w.scale.
        ValueError: x has not k columns, or lies on another device.

    Example:
        >>> w = quantize_w4(torch.eye(32, dtype=torch.float16), group=32)
        >>> w4a16_matmul(torch.arange(32, dtype=torch.float16), w)[:4].tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    require_operands(x, w.scale, w.columns)
    y = _w4a16_matmul(x.reshape(-1, w.columns), w.packed, w.scale, w.zero, w.columns)
    return y.view(*x.shape[:-1], len(w.packed))


def require_operands(x: Tensor, scale: Tensor, columns: int) -> None:
    """Whether x can be multiplied with a matrix of so many columns and this scale; or raise."""
    if x.dtype != scale.dtype:
        raise TypeError(f"x must be {scale.dtype} as the scale of w is, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x must have {columns} columns as w has, got shape {tuple(x.shape)}")
    if x.device != scale.device:
        raise ValueError(f"x must be on {scale.device} as w is, got {x.device}")


def w4a16_matmul_reference(x: Float[Tensor, "*rows k"], w: W4) -> Float[Tensor, "*rows n"]:
    """The same in plain torch, with W in float32."""
    return F.linear(x.float(), dequantize_w4(w)).to(x.dtype)
