"""Absmax int8: each token, or each group of its features, with a scale of its own, in one pass.

Dettmers, Lewis, Belkada & Zettlemoyer 2022, "LLM.int8()" (arXiv 2208.07339), sections 2.1 (absmax
quantization) and 3 (vector-wise); in plain torch it is
`fewer.quantization.quantize_symmetric`. For the row x of a token, or g consecutive values of one:

    scale = max |x| / 127,    codes = round(x / scale),    x is close to scale * codes

Nothing but bytes to move: x is read once and stays in registers between its maximum and its codes,
so float16 costs 3 bytes a value. A program takes whole groups, as many as make about 4096 values.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from fewer.kernels.launch import config, fall_back
from fewer.quantization import dequantize, quantize_symmetric

LONGEST = 32768  # values of a group; they must fit in the registers of one program
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _places(groups, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Program p has groups p ROWS to (p + 1) ROWS - 1, each of GROUP values, in WIDTH columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    place = row[:, None] * GROUP + column[None, :]
    return row, place, (row < groups)[:, None] & (column < GROUP)[None, :]


@triton.jit(do_not_specialize=["groups"])
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    groups,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, place, inside = _places(groups, GROUP, WIDTH, ROWS)
    x = tl.load(x_ptr + place, inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), 127.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)  # zeros, as quantize_symmetric
    tl.store(scale_ptr + row, scale, row < groups)
    # x / scale, rounded as a division is, without one for each value (Markstein 1990).
    inverse = tl.div_rn(1.0, scale)[:, None]
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-quotient, scale[:, None], x), inverse, quotient)
    # Around 1.5 * 2^23 floats have steps of 1: the sum is rounded, a tie to the even integer, and
    # its lowest byte is the code in two's complement.
    codes = (quotient + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(codes_ptr + place, codes, inside)


@triton.jit(do_not_specialize=["groups"])
def _dequantize_kernel(
    codes_ptr,
    scale_ptr,
    out_ptr,
    groups,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, place, inside = _places(groups, GROUP, WIDTH, ROWS)
    scale = tl.load(scale_ptr + row, row < groups, other=0.0)
    codes = tl.load(codes_ptr + place, inside, other=0).to(tl.float32)
    tl.store(out_ptr + place, (codes * scale[:, None]).to(out_ptr.dtype.element_ty), inside)


def _launch_quantize(
    x: Float[Tensor, "*shape"], codes: Int8[Tensor, "*shape"], scale: Float32[Tensor, "*groups"]
) -> None:
    """Write codes and scale; all three have consecutive elements, x as many groups as scale."""
    group = x.numel() // scale.numel()
    width, rows, options = _tile(group, x.numel())
    _quantize_kernel[(triton.cdiv(scale.numel(), rows),)](
        x, codes, scale, scale.numel(), GROUP=group, WIDTH=width, ROWS=rows, **options
    )


def _launch_dequantize(
    codes: Int8[Tensor, "*shape"], scale: Float32[Tensor, "*groups"], out: Float[Tensor, "*shape"]
) -> None:
    """Write out; all three have consecutive elements."""
    group = codes.numel() // scale.numel()
    width, rows, options = _tile(group, codes.numel())
    _dequantize_kernel[(triton.cdiv(scale.numel(), rows),)](
        codes, scale, out, scale.numel(), GROUP=group, WIDTH=width, ROWS=rows, **options
    )


def _tile(group: int, size: int) -> tuple[int, int, dict[str, int]]:
    """The tile of a program: columns, rows; and the options of the compiler."""
    width = triton.next_power_of_2(group)
    settings = config("int8", {"VALUES": 4096, "num_warps": 4}, group=group, size=size)
    rows = max(1, settings.pop("VALUES") // width)
    settings["num_warps"] = max(settings["num_warps"], width // 1024)  # 32 values a thread
    return width, rows, settings


@torch.library.custom_op("fewer::quantize_int8", mutates_args=())
def _quantize_int8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    codes, scale = _results(x, group)
    if x.numel():
        _launch_quantize(x.contiguous(), codes, scale)
    return codes, scale


@_quantize_int8.register_kernel("cpu")
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    fall_back("quantize_int8")
    return quantize_int8_reference(x, group)


@_quantize_int8.register_fake
def _results(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], x.shape[-1] // group, dtype=torch.float32, device=x.device)
    return codes, scale


@torch.library.custom_op("fewer::dequantize_int8", mutates_args=())
def _dequantize_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        _launch_dequantize(codes.contiguous(), scale.contiguous(), out)
    return out


@_dequantize_int8.register_kernel("cpu")
def _(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    fall_back("dequantize_int8")
    return dequantize_int8_reference(codes, scale, dtype)


@_dequantize_int8.register_fake
def _(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def quantize_int8(
    x: Float[Tensor, "*rows k"], group: int | None = None
) -> tuple[Int8[Tensor, "*rows k"], Float32[Tensor, "*rows groups"]]:
    """Codes from -127 to 127, and a scale for each row, or each `group` values of a row.

    Args:
        x: float32, float16 or bfloat16, finite (not looked at). It is not modified.
        group: divides k; None: k, the whole row. At most 32768.

    Returns:
        codes: int8, ties rounded to even.
        scale: float32, [..., k / group], positive; 1 where all values are 0.

    Raises:
        TypeError: x of another type.
        ValueError: a group that does not divide k or is too large; x is 0-d.

    Example:
        >>> codes, scale = quantize_int8(torch.tensor([[127.0, -3.4], [0.0, 0.0]]))
        >>> codes.tolist(), scale.tolist()
        ([[127, -3], [0, 0]], [[1.0], [1.0]])
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a 0-d tensor")
    group = x.shape[-1] or 1 if group is None else group
    if not 1 <= group <= LONGEST or x.shape[-1] % group:
        raise ValueError(
            f"group must divide the {x.shape[-1]} columns of x and be between 1 and {LONGEST}, "
            f"got {group}"
        )
    return _quantize_int8(x, group)


def quantize_int8_reference(
    x: Float[Tensor, "*rows k"], group: int
) -> tuple[Int8[Tensor, "*rows k"], Float32[Tensor, "*rows groups"]]:
    """The same in plain torch."""
    if x.numel() == 0:
        return _results(x, group)
    codes, scale = quantize_symmetric(x.unflatten(-1, (-1, group)), bits=8, dim=-1)
    return codes.flatten(-2), scale.squeeze(-1)


def dequantize_int8(
    codes: Int8[Tensor, "*rows k"],
    scale: Float32[Tensor, "*rows groups"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*rows k"]:
    """scale * codes, each with the scale of its group, in this type.

    Raises:
        TypeError: codes are not int8, scale is not float32, or dtype is none that x can have.
        ValueError: shapes that do not fit.

    Example:
        >>> dequantize_int8(*quantize_int8(torch.tensor([[127.0, -3.4]]))).tolist()
        [[127.0, -3.0]]
    """
    if codes.dtype != torch.int8 or scale.dtype != torch.float32:
        raise TypeError(
            f"codes must be int8 and scale float32, got {codes.dtype} and {scale.dtype}"
        )
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    k, groups = codes.shape[-1], scale.shape[-1]
    if codes.shape[:-1] != scale.shape[:-1] or (k % groups if groups else k):
        raise ValueError(
            f"scale must have shape {(*codes.shape[:-1], '...')} with a last dimension that "
            f"divides {k}, got {tuple(scale.shape)}"
        )
    return _dequantize_int8(codes, scale, dtype)


def dequantize_int8_reference(
    codes: Int8[Tensor, "*rows k"], scale: Float32[Tensor, "*rows groups"], dtype: torch.dtype
) -> Float[Tensor, "*rows k"]:
    """The same in plain torch."""
    if codes.numel() == 0:
        return codes.to(dtype)
    grouped = codes.unflatten(-1, (scale.shape[-1], -1))
    return dequantize(grouped, scale[..., None]).flatten(-2).to(dtype)
