"""The Walsh-Hadamard transform, read once and written once: two small products for each tile.

Agarwal et al. 2024, "HadaCore: Tensor core accelerated Hadamard transform kernel" (arXiv
2412.08832), which has the idea to take tensor cores for it. What it is for, and the transform in
plain torch: `fewer.quantization.hadamard`.

Sylvester's matrix is a Kronecker product, H_{ab} = H_a (x) H_b. So with the n = a b values of a row
written as a matrix X [a, b],

    x H_n  =  H_a X H_b,    (H_n)_ij = (-1)^popcount(i & j)

Here every tile is 64 x 64 (or 128 x 64), 4096 consecutive numbers, whatever n is:

    n = 4096    L X R with L = R = H_64
    n < 4096    4096 / n whole rows in a tile: b = min(n, 64), a = n / b, and L and R have H_a and
                H_b in blocks along their diagonal
    n > 4096    a row is n / 4096 tiles; after L X R of each, butterflies (u, v) -> (u + v, u - v)
                between tiles, number against number

Numbers stay where they are from the first load to the store, and the factors are made once a
program, which then goes through many tiles.

Precision. All sums are in float32. Tensor cores take 16 bits, so L X is cut into a sum of two
bfloat16 before it is multiplied by R: 16 bits of it, an error of at most 2^-15 before the output
is rounded to bfloat16 (2^-9) or float16 (2^-12). Of a float32 x, all 24 bits are taken, cut into
three bfloat16, and so of L X: the result differs from that of `fwht` by the order of additions.
"""

# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005 (the compiler knows no stars in tuples, and mypy no tuples that grow)

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from fewer.kernels.launch import config, fall_back
from fewer.quantization.hadamard import fwht

LARGEST = 32768
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _diagonal_blocks(size: tl.constexpr, n: tl.constexpr):
    """[size, size] with H_n in blocks along the diagonal, 0 elsewhere; powers of two up to 128."""
    i, j = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    both = i & j & (n - 1)
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return tl.where((i ^ j) < n, 1.0 - 2.0 * (both & 1).to(tl.float32), 0.0)


@triton.jit
def _cut(x):
    """(the first 8 bits of float32 numbers, as bfloat16; what is left of them), nothing rounded."""
    first = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return first.to(tl.bfloat16), x - first


@triton.jit
def _both_sides(left, x, right):
    """left x right in float32; left and right hold 0, 1 and -1."""
    if x.dtype == tl.float32:
        high, rest = _cut(x)
        middle, rest = _cut(rest)
        y = tl.dot(left, rest.to(tl.bfloat16))
        y = tl.dot(left, middle, y)
        y = tl.dot(left, high, y)
        high, rest = _cut(y)
        middle, rest = _cut(rest)
        out = tl.dot(rest.to(tl.bfloat16), right)
        out = tl.dot(middle, right, out)
    else:
        high, rest = _cut(tl.dot(left, x))
        out = tl.dot(rest.to(tl.bfloat16), right)
    return tl.dot(high, right, out)


@triton.jit
def _row_maximum(y, n: tl.constexpr):
    """The largest size in each row of n, at its places: [lines, 1], or [lines, 64] for n < 64."""
    lines: tl.constexpr = y.shape[0]
    if n < 64:
        rows = tl.max(tl.abs(y).reshape(lines, 64 // n, n), axis=2, keep_dims=True)
        return tl.broadcast_to(rows, (lines, 64 // n, n)).reshape(lines, 64)
    else:
        a: tl.constexpr = n // 64 if n < lines * 64 else lines
        rows = tl.max(tl.max(tl.abs(y), axis=1).reshape(lines // a, a), axis=1, keep_dims=True)
        return tl.broadcast_to(rows, (lines // a, a)).reshape(lines, 1)


@triton.jit
def hadamard_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    tiles,
    numbers,
    factor,
    n: tl.constexpr,
    QUANTIZE: tl.constexpr,
    LINES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program i takes tiles i, i + programs, ... of LINES x 64; of a longer row, all C at once."""
    TILE: tl.constexpr = LINES * 64
    C: tl.constexpr = n // TILE if n > TILE else 1
    kind: tl.constexpr = x_ptr.dtype.element_ty
    half: tl.constexpr = tl.bfloat16 if kind == tl.float32 else kind
    left = _diagonal_blocks(LINES, n // C // 64 if n > 64 else 1).to(half)
    right = _diagonal_blocks(64, n if n < 64 else 64).to(tl.bfloat16)
    line, column = tl.arange(0, LINES)[:, None], tl.arange(0, 64)[None, :]
    place = line * 64 + column
    part = place if n < 64 else line * 64  # what is inside and in which row: whole lines, if it can
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * (TILE * C)
        inside = part < (tl.minimum(numbers - start, TILE).to(tl.int32) if n < TILE else TILE)
        ys = ()
        for c in tl.static_range(C):
            x = tl.load(x_ptr + start + c * TILE + place, inside, other=0.0)
            ys = ys + (_both_sides(left, x, right),)
        for bit in tl.static_range(3):
            if C >> bit > 1:
                pairs = ()
                for c in tl.static_range(C):
                    if c & (1 << bit):
                        pairs = pairs + (ys[c ^ (1 << bit)] - ys[c],)
                    else:
                        pairs = pairs + (ys[c] + ys[c ^ (1 << bit)],)
                ys = pairs
        if QUANTIZE:
            largest = _row_maximum(ys[0], n)
            for c in tl.static_range(1, C):
                largest = tl.maximum(largest, _row_maximum(ys[c], n))
            scale = largest * (factor / 127)
            scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
            tl.store(scale_ptr + (start + part) // n, scale, inside & (part % n == 0))
            steps = factor / scale
            for c in tl.static_range(C):
                # 1.5 * 2^23 + z is rounded to whole numbers, halves to even: z in its last bits.
                code = (ys[c] * steps + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
                tl.store(out_ptr + start + c * TILE + place, code, inside)
        else:
            for c in tl.static_range(C):
                y = (ys[c] * factor).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + start + c * TILE + place, y, inside)


def _launch(
    x: Float[Tensor, "rows n"], quantize: bool, **constants: int
) -> tuple[Tensor, Float32[Tensor, "rows"]]:
    """(out, nothing) or (codes, scale). Constants replace the stored ones."""
    rows, n = x.shape
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.int8 if quantize else x.dtype)
    scale = torch.empty(rows if quantize else 0, dtype=torch.float32, device=x.device)
    if rows == 0:
        return out, scale
    default = DEFAULT if n <= 8192 else DEFAULT_LARGE
    chosen = config(f"hadamard_{8 * x.element_size()}", default, rows=rows, n=n) | constants
    tiles = -(-rows // max(chosen["LINES"] * 64 // n, 1))
    processors = 1
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(tiles, processors * chosen.pop("per_processor"))
    hadamard_kernel[(programs,)](
        x, out, scale, tiles, x.numel(), 1 / math.sqrt(n), n=n, QUANTIZE=quantize, **chosen
    )
    return out, scale


DEFAULT = {"LINES": 64, "STAGES": 3, "per_processor": 4, "num_warps": 4}
DEFAULT_LARGE = {"LINES": 128, "STAGES": 2, "per_processor": 1, "num_warps": 8}


@torch.library.custom_op("fewer::hadamard", mutates_args=())
def _hadamard(x: Tensor) -> Tensor:
    return _launch(x.reshape(-1, x.shape[-1]), False)[0].view(x.shape)


@_hadamard.register_kernel("cpu")
def _(x: Tensor) -> Tensor:
    fall_back("hadamard")
    return hadamard_reference(x)


@_hadamard.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fewer::hadamard_quantize", mutates_args=())
def _hadamard_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = _launch(x.reshape(-1, x.shape[-1]), True)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


@_hadamard_quantize.register_kernel("cpu")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    fall_back("hadamard_quantize")
    return hadamard_quantize_reference(x)


@_hadamard_quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def hadamard(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """x H_n / sqrt(n) along the last dimension; its own inverse, up to rounding.

    Args:
        x: [..., n], float32, float16 or bfloat16; n a power of two up to 32768, and the sums of n
            values below 3e38. Rows that are not consecutive in memory are copied first.

    Returns:
        The shape and type of x. Without a GPU: `hadamard_reference`.

    Raises:
        TypeError: x is of another type.
        ValueError: n is none of these.

    Example:
        >>> x = torch.tensor([8.0, 0.0, 0.0, 4.0])
        >>> hadamard_reference(x).tolist()  # hadamard(x), where there is a GPU
        [6.0, 2.0, 2.0, 6.0]
    """
    _require(x)
    return _hadamard(x)


def hadamard_quantize(
    x: Float[Tensor, "*batch n"],
) -> tuple[Int8[Tensor, "*batch n"], Float32[Tensor, "*batch 1"]]:
    """`hadamard`, then quantized to 8 bits with a scale for each row, without the values between.

        y = x H_n / sqrt(n),    scale = max |y| / 127,    codes = round(y / scale)

    Args:
        x: as for `hadamard`.

    Returns:
        codes: int8, the shape of x, from -127 to 127, halves rounded to even; y is not rounded
            to the type of x before.
        scale: float32, [..., 1]. 1 where it would be below 1.2e-38, as for a row of zeros.

    Raises:
        TypeError, ValueError: as `hadamard`.

    Example:
        >>> codes, scale = hadamard_quantize_reference(torch.tensor([8.0, 0.0, 0.0, 4.0]))
        >>> codes.tolist(), scale.tolist()
        ([127, 42, 42, 127], [0.047])
    """
    _require(x)
    return _hadamard_quantize(x)


def hadamard_reference(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """`hadamard` in plain torch: log2(n) rounds of butterflies in float32."""
    return fwht(x).to(x.dtype)


def hadamard_quantize_reference(
    x: Float[Tensor, "*batch n"],
) -> tuple[Int8[Tensor, "*batch n"], Float32[Tensor, "*batch 1"]]:
    """`hadamard_quantize` in plain torch."""
    y = fwht(x)
    scale = y.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)
    return (y / scale).round().to(torch.int8), scale


def _require(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    n = x.shape[-1] if x.ndim else 0
    if n & (n - 1) or not 1 <= n <= LARGEST:
        raise ValueError(f"n must be a power of two up to {LARGEST}, got {n} (x {list(x.shape)})")
