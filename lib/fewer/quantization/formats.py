"""Floating-point formats from their bits: fp16, bf16, fp8, fp6, fp4.

IEEE 754-2019, section 3.4; Micikevicius et al. 2022, "FP8 formats for deep learning" (arXiv
2209.05433), table 1; OCP Microscaling Formats (MX) v1.0 (2023), section 5.3, for fp6 and fp4.

A code is, from the top bit down, sign s (1 bit), exponent e (E bits), mantissa m (M bits). With
bias = 2^(E-1) - 1:

    value = (-1)^s 2^(e - bias) (1 + m / 2^M)     e > 0, normal
    value = (-1)^s 2^(1 - bias) (m / 2^M)         e = 0, subnormal (and zero)

The formats differ in what they give up for numbers that are not numbers (`specials`):

    "ieee"  e all ones: infinity if m = 0, else NaN          fp16, bf16, fp8 e5m2
    "fn"    e and m all ones: NaN; no infinity ("finite")    fp8 e4m3
    "none"  every code is a finite number                    fp6, fp4
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.quantization.validate import require_codes, require_floating, require_int


class Minifloat(NamedTuple):
    """The three facts that make a format; unpack it into the functions of this file."""

    exponent_bits: int
    mantissa_bits: int
    specials: str = "ieee"


FORMATS = {
    "fp16": Minifloat(5, 10),
    "bf16": Minifloat(8, 7),
    "fp8_e5m2": Minifloat(5, 2),
    "fp8_e4m3": Minifloat(4, 3, "fn"),
    "fp6_e3m2": Minifloat(3, 2, "none"),
    "fp6_e2m3": Minifloat(2, 3, "none"),
    "fp4_e2m1": Minifloat(2, 1, "none"),
}


def require_format(exponent_bits: int, mantissa_bits: int, specials: str) -> int:
    """Return the width of a code in bits, 1 + exponent_bits + mantissa_bits.

    Raises:
        ValueError: exponent_bits not in 1..8 (1..7 unless "ieee"), mantissa_bits not in 1..23
            (within these float32 holds every value), or specials not "ieee", "fn" or "none".
    """
    if specials not in ("ieee", "fn", "none"):
        raise ValueError(f'specials must be "ieee", "fn" or "none", got {specials!r}')
    require_int(exponent_bits, "exponent_bits", 1, 8 if specials == "ieee" else 7)
    require_int(mantissa_bits, "mantissa_bits", 1, 23)
    return 1 + exponent_bits + mantissa_bits


def decode_minifloat(
    codes: Int[Tensor, "*shape"],
    exponent_bits: int,
    mantissa_bits: int,
    specials: str = "ieee",
) -> Float[Tensor, "*shape"]:
    """The numbers that bit patterns stand for.

    A code is an integer whose low 1 + E + M bits are, from the top, sign s, exponent e and mantissa
    m. With bias = 2^(E-1) - 1:

        value = (-1)^s 2^(e - bias) (1 + m / 2^M)     if e > 0
        value = (-1)^s 2^(1 - bias) (m / 2^M)         if e = 0 (subnormal)

    A subnormal with m = 0 is zero, and -0.0 if s = 1.

    Args:
        codes: integers of any width in [0, 2^(1+E+M) - 1], any shape (empty gives empty).
        exponent_bits: E, 1 to 8 (to 7 unless specials is "ieee").
        mantissa_bits: M, 1 to 23.
        specials: which codes are not numbers. "ieee": an exponent of all ones is infinity with the
            sign s if m = 0, and NaN otherwise. "fn": the codes whose exponent and mantissa are all
            ones (one of each sign) are NaN, every other one is a number. "none": every code is a
            number.

    Returns:
        float32, the shape of codes: exact for every format allowed here, subnormals included.

    Raises:
        TypeError: codes is not an integer tensor.
        ValueError: a code, exponent_bits, mantissa_bits or specials out of range.

    Example:
        >>> fp4_codes = torch.tensor([0b0_00_1, 0b0_01_0, 0b1_11_1])
        >>> decode_minifloat(fp4_codes, 2, 1, "none").tolist()
        [0.5, 1.0, -6.0]
        >>> e4m3_codes = torch.tensor([0b0_1111_110, 0b0_1111_111])
        >>> decode_minifloat(e4m3_codes, 4, 3, "fn").tolist()
        [448.0, nan]
    """
    width = require_format(exponent_bits, mantissa_bits, specials)
    codes = require_codes(codes, 0, 2**width - 1)
    bias, all_ones = 2 ** (exponent_bits - 1) - 1, 2**exponent_bits - 1
    sign = torch.where(codes >> (width - 1) == 1, -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & all_ones
    mantissa = codes & (2**mantissa_bits - 1)
    significand = (exponent > 0) + mantissa / 2**mantissa_bits  # the leading 1 is not stored
    value = sign * torch.ldexp(significand, exponent.clamp(min=1) - bias)
    if specials == "ieee":
        value = torch.where(exponent == all_ones, sign * math.inf, value)
        value = torch.where((exponent == all_ones) & (mantissa > 0), math.nan, value)
    if specials == "fn":
        all_set = (exponent == all_ones) & (mantissa == 2**mantissa_bits - 1)
        value = torch.where(all_set, math.nan, value)
    return value


def encode_minifloat(
    x: Float[Tensor, "*shape"],
    exponent_bits: int,
    mantissa_bits: int,
    specials: str = "ieee",
) -> Int[Tensor, "*shape"]:
    """The code whose value is nearest to x; a tie goes to the even code.

    Overflow, that is |x| which rounds to the first number past the largest finite one, becomes
    infinity for "ieee"; for "fn" and "none" it saturates at the largest finite number, and so does
    infinity (the saturating conversion of the OCP FP8 and MX specifications).
    `x.to(torch.float8_e4m3fn)` and ml_dtypes do not saturate in e4m3: there overflow and infinity
    become NaN; in fp6 and fp4 ml_dtypes saturates, as here. fp16, bf16 and e5m2 agree with torch on
    every number.

    Args:
        x: any floating type, any shape (empty gives empty). NaN becomes the quiet NaN (only the top
            bit of the mantissa set) for "ieee", the one NaN for "fn", both with the sign of x. -0.0
            keeps its sign.

    Returns:
        int64 codes in [0, 2^(1+E+M) - 1], the shape of x.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x holds NaN and specials is "none"; exponent_bits, mantissa_bits or specials out
            of range.

    Example:
        >>> encode_minifloat(torch.tensor([1.0, -0.3, 1e9]), 4, 3, "fn").tolist()
        [56, 170, 126]
    """
    width = require_format(exponent_bits, mantissa_bits, specials)
    x = require_floating(x, "x")
    nan = x.isnan()
    if specials == "none" and nan.any():
        raise ValueError("x must not hold NaN where specials is 'none': no code stands for it")
    bias, top = 2 ** (exponent_bits - 1) - 1, 2 ** (width - 1) - 1
    infinity = (2**exponent_bits - 1) << mantissa_bits
    # 2^(all ones - bias + 1) is past every finite value; the cap keeps infinity out of the sums.
    magnitude = x.abs().double().nan_to_num(0.0).clamp(max=2.0 ** (2**exponent_bits - bias))
    # Zero and the subnormals share the exponent, and so the step, of the smallest normal number.
    exponent = torch.frexp(magnitude.clamp(min=2.0 ** (1 - bias))).exponent.long() - 1
    steps = torch.round(torch.ldexp(magnitude, (mantissa_bits - exponent).double())).long()
    # Neighbouring codes are neighbouring numbers: a mantissa that rounds up to 2^M carries into the
    # exponent by itself, and what follows the largest finite number is the code of infinity.
    codes = ((exponent + bias - 1) << mantissa_bits) + steps
    codes = codes.clamp(max={"ieee": infinity, "fn": top - 1, "none": top}[specials])
    quiet_nan = infinity + 2 ** (mantissa_bits - 1) if specials == "ieee" else top
    codes = torch.where(nan, quiet_nan, codes)
    return codes + (torch.signbit(x).long() << (width - 1))


def round_to_minifloat(
    x: Float[Tensor, "*shape"],
    exponent_bits: int,
    mantissa_bits: int,
    specials: str = "ieee",
) -> Float[Tensor, "*shape"]:
    """The nearest number of a format, as float32: what storing x in that format keeps of it.

    Arguments and errors are those of `encode_minifloat`.

    Example:
        >>> round_to_minifloat(torch.tensor([3.14159, 0.1]), *FORMATS["fp8_e4m3"]).tolist()
        [3.25, 0.1015625]
    """
    codes = encode_minifloat(x, exponent_bits, mantissa_bits, specials)
    return decode_minifloat(codes, exponent_bits, mantissa_bits, specials)


def how_stored(value: float = math.pi) -> str:
    """How is pi stored? A line a format: sign, exponent and mantissa bits, the value, the error.

    Example:
        >>> print(how_stored(math.pi))
        format    s exponent mantissa           value       error
        fp16      0 10000    1001001000      3.140625   -9.68e-04
        bf16      0 10000000 1001001         3.140625   -9.68e-04
        fp8_e5m2  0 10000    10                     3      -0.142
        fp8_e4m3  0 1000     101                 3.25      +0.108
        fp6_e3m2  0 100      10                     3      -0.142
        fp6_e2m3  0 10       101                 3.25      +0.108
        fp4_e2m1  0 10       1                      3      -0.142

    Raises:
        ValueError: value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ValueError(f"value must be finite, got {value}")
    lines = [f"{'format':<9} s {'exponent':<8} {'mantissa':<10} {'value':>13} {'error':>11}"]
    for name, form in FORMATS.items():
        code = encode_minifloat(torch.tensor(value, dtype=torch.float64), *form)
        bits = f"{int(code):0{1 + form.exponent_bits + form.mantissa_bits}b}"
        exponent, mantissa = bits[1:][: form.exponent_bits], bits[1:][form.exponent_bits :]
        stored = decode_minifloat(code, *form).item()
        columns = f"{name:<9} {bits[0]} {exponent:<8} {mantissa:<10}"
        lines.append(f"{columns} {stored:>13.8g} {stored - value:>+11.3g}")
    return "\n".join(lines)
