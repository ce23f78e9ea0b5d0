"""The exercises of lab 1, quantization of a tensor: checks, misconceptions, correct variants.

Three habits keep one mistake from costing everything. Codes are judged against the candidate's
*own* scale, so that a wrong scale is marked down once; one check of an exercise is strict about
rounding, the others allow the neighbouring code; and storage types have a check of their own. Ties
may go either way everywhere.

Two checks are hidden: they ask for what a docstring promises and a first try does not touch.

A misconception is the right method with one thing wrong in it. What those of an exercise have in
common is in a helper in front of them, open at the places where people go wrong. They refuse bad
input as the references do, so that they are recognized by their mistake and not by a missing error
message.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from autograder.compare import (
    Mismatch,
    as_double,
    expect,
    expect_close,
    expect_equal,
    expect_error,
    expect_integers,
    expect_shape,
)
from autograder.exercise import Exercise
from autograder.strategies import given, integer_tensors, nonzero, shapes, tensors
from fewer.quantization import (
    clip_by_mse,
    decode_minifloat,
    dequantize,
    matmul_int8,
    mse,
    pack_codes,
    quantize_asymmetric,
    quantize_per_group,
    quantize_symmetric,
    require_bits,
    require_clip,
    require_codes,
    require_finite,
    require_format,
    require_int,
    require_int8_matrices,
    require_matrix,
    require_packable,
    require_row_scale,
    require_same_shape,
    sqnr,
)

WIDTHS = st.sampled_from((4, 3, 2, 5, 6, 7, 8, None))  # None: nothing is said about bits
NAN, INF = torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 1.0])
FLOATS = (torch.float32, torch.float64)  # of a scale: a float64 inside is no mistake
HALF = 0.5 + 1e-3  # the nearest code is this close; rounding in float32 may decide near ties
ONE = 1.0 + 1e-3  # the nearest code or its neighbour
# Why two mutants of the uniform quantizers change nothing:
SMALLEST = "differs only where a scale is exactly 2^-126, the smallest normal float32"
NO_CLAMP = "-lo / scale lies between 0 and the largest code by itself"


@st.composite
def sliced(draw: st.DrawFn, dtypes: Any = (torch.float32,)) -> tuple[Tensor, int | None]:
    """A tensor, not all zero, and one of its dimensions, or None for the whole of it."""
    x = draw(nonzero(shapes(1, 3, max_side=5), dtypes=dtypes))
    return x, draw(st.sampled_from([None, *range(-x.dim(), x.dim())]))


def over(x: Tensor, dim: int | None, name: str) -> Tensor:
    """The reduction ``name`` ("amax", "amin") of x over all of it, or along dim, which is kept."""
    return getattr(x, name)() if dim is None else getattr(x, name)(dim, keepdim=True)


def expect_scale(scale: Tensor, span: Tensor, largest: int) -> None:
    """Fail unless the scale is span / largest; slices that span nothing have a check of their own.

    ``span`` is the largest magnitude, or hi - lo, of each slice.
    """
    expect_shape(scale, span.shape, "the scale")
    want = torch.where(span > 0, span / largest, 1.0)
    expect_close(torch.where(span > 0, as_double(scale), 1.0), want, "the scale", reveal=True)


def expect_codes_within(
    steps: float,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Any = 0.0,
    where: Tensor | None = None,
) -> None:
    """Fail unless every code is within ``steps`` of x / scale + zero_point (shapes broadcast).

    Args:
        where: judge only the codes where this holds.
    """
    exact = as_double(x) / as_double(scale) + as_double(zero_point)
    off = (exact.flatten() - as_double(codes).flatten()).abs().nan_to_num(math.inf)
    if where is not None:
        off = torch.where(where.expand(exact.shape).flatten(), off, 0.0)
    if bool((off > steps).any()):
        worst = int(off.argmax())
        value, code, right = (as_double(part).flatten()[worst] for part in (x, codes, exact))
        place = "x / scale" if isinstance(zero_point, float) else "x / scale + zero_point"
        raise Mismatch(
            f"the value {value:.6g} got the code {code:.6g}, where {place} is {right:.6g}"
        )


# --- 1. decode_minifloat -------------------------------------------------------------------------

minifloat = Exercise(
    decode_minifloat,
    paper="Micikevicius et al. 2022 (arXiv 2209.05433), IEEE 754",
    difficulty=2,
    minutes=15,
)

FORMATS = (
    *((2, 1, "none"), (4, 3, "fn"), (5, 2, "ieee"), (3, 2, "none"), (2, 3, "none"), (3, 4, "fn")),
    *((4, 2, "ieee"), (5, 10, "ieee"), (8, 7, "ieee"), (1, 2, "none"), (4, 3, "none")),
)
Fields = tuple[int, int, int]  # sign, exponent and mantissa of a code
Format = tuple[int, int, str]


@st.composite
def patterns(draw: st.DrawFn, part: str, signs: int = 0) -> tuple[Format, list[Fields]]:
    """A format, and fields of codes whose exponent is "normal", "zero", "top" or "finite"."""
    specials = draw(st.sampled_from(("none", "fn", "ieee")))
    form = draw(st.sampled_from([form for form in FORMATS if form[2] == specials]))
    top, ones = 2 ** form[0] - 1, 2 ** form[1] - 1
    last = top - 1 if form[2] == "ieee" else top
    low, high = {"normal": (1, last), "zero": (0, 0), "top": (top, top), "finite": (0, last)}[part]
    mantissas = st.sampled_from([0, 1, ones]) | st.integers(0, ones)
    field = st.tuples(st.integers(0, signs), st.integers(low, high), mantissas)
    if part != "top" and form[2] == "fn":
        field = field.filter(lambda f: f[1:] != (top, ones))
    return form, draw(st.lists(field, min_size=1, max_size=8))


def assembled(form: Format, fields: list[Fields]) -> Tensor:
    e, m, _ = form
    return torch.tensor([(((s << e) + x) << m) + f for s, x, f in fields])


def expect_values(form: Format, fields: list[Fields], got: Tensor, want: list[float]) -> None:
    """Fail with the bits of the first code of ``fields`` that is read as another number."""
    expect_shape(got, (len(want),), "the result")
    e, m, _ = form
    for (sign, exponent, mantissa), a, b in zip(
        fields, as_double(got).tolist(), want, strict=False
    ):
        if a != b:
            bits = f"{sign} {exponent:0{e}b} {mantissa:0{m}b}"
            raise Mismatch(f"{bits} (sign exponent mantissa) is read as {a:g}", expected=want)


@minifloat.check(
    points=2,
    hint="Read one code by hand. Which power of two does its exponent field stand for, and which "
    "digit of the number is never stored because it is always the same?",
    examples=24,
    drawn=patterns("normal"),
)
def normal_numbers_are_read_right(candidate, drawn):
    """A code whose exponent field e is not zero stands for 2^(e - bias) times (1 + m / 2^M)."""
    form, fields = drawn
    e, m, _ = form
    want = [math.ldexp(1 + f / 2**m, x - 2 ** (e - 1) + 1) for _, x, f in fields]
    expect_values(form, fields, candidate(assembled(form, fields), *form), want)


@minifloat.check(
    points=2,
    hint="What is special about the smallest exponent field? Below the smallest normal number the "
    "numbers go on to zero, in steps of equal size.",
    examples=20,
    drawn=patterns("zero"),
)
def subnormal_numbers_are_read_right(candidate, drawn):
    """A code whose exponent field is zero stands for 2^(1 - bias) times m / 2^M."""
    form, fields = drawn
    e, m, _ = form
    lowest = 2 - 2 ** (e - 1)
    # The smallest normal number is asked for as well, but not judged: it tells a wrong bias, which
    # another check marks down, from a wrong exponent of subnormal numbers alone.
    want = [*(math.ldexp(f / 2**m, lowest) for _, _, f in fields), 2.0**lowest]
    expect_values(form, fields, candidate(assembled(form, [*fields, (0, 1, 0)]), *form), want)


@minifloat.check(
    points=2,
    hint="The top bit alone is the sign. Compare what you get for a code with and without it.",
    examples=24,
    drawn=patterns("finite"),
)
def the_sign_bit_flips_the_sign(candidate, drawn):
    """Setting the top bit of a code changes the sign of the number and nothing else; zero becomes
    -0.0."""
    form, fields = drawn
    both = [(sign, x, f) for sign in (0, 1) for _, x, f in fields]
    got = candidate(assembled(form, both), *form)
    expect_shape(got, (len(both),), "the result")
    positive, negative = as_double(got).chunk(2)
    expect_equal(negative, -positive, "the number with the top bit set", reveal=True)
    expect(torch.signbit(negative), "a number with the top bit set is not negative")


@minifloat.check(
    points=2,
    hint="Look at the codes whose exponent field is all ones, one value of specials after the "
    "other: which are infinite, which are not a number, and which are quite ordinary?",
    examples=28,
    drawn=patterns("top", signs=1),
)
def infinity_and_nan_are_where_the_format_has_them(candidate, drawn):
    """With an exponent field of all ones, "ieee" has infinity (m = 0) and NaN (any other m), "fn"
    has NaN only where m is all ones too, and "none" has numbers only."""
    form, fields = drawn
    _, m, specials = form
    # "ieee" is the default, and need not be named.
    got = candidate(assembled(form, fields), *(form[:2] if specials == "ieee" else form))
    expect_shape(got, (len(fields),), "the result")
    for (sign, _, f), value in zip(fields, as_double(got).tolist(), strict=True):
        if specials == "ieee" and f == 0:
            right = value == (-math.inf if sign else math.inf)
        elif specials == "ieee" or (specials == "fn" and f == 2**m - 1):
            right = math.isnan(value)
        else:
            right = math.isfinite(value)
        expect(
            right,
            f'with specials="{specials}", sign {sign}, an exponent of all ones and the mantissa '
            f"{f:0{m}b} is read as {value:g}",
        )


@minifloat.check(
    points=1,
    hint="Which type do your intermediate results have? uint8 has no room below 0 or above 255.",
    examples=28,
    hidden=True,
    form=st.sampled_from([(4, 3, "fn"), (5, 2, "ieee")]),
    codes=integer_tensors(0, 255, shapes(1, 3, max_side=4), dtype=torch.uint8),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
)
def any_integer_type_and_any_shape_will_do(candidate, form, codes, dtype):
    """A code is the same number whatever integer type holds it, and the result has the shape of the
    codes."""
    plain = candidate(codes.flatten().long(), *form)
    got = candidate(codes.to(dtype), *form)
    expect_shape(got, codes.shape, "the result")
    kind = str(dtype).removeprefix("torch.")
    expect_equal(as_double(got).flatten(), plain, f"the result for {kind} codes")


@minifloat.check(
    points=1,
    hint="Which codes, field widths and specials does the docstring allow?",
    bad=[
        (torch.tensor([16]), 2, 1, "none"),
        (torch.tensor([-1]), 2, 1, "none"),
        (torch.tensor([3, 256]), 4, 3, "fn"),
        (torch.tensor([0]), 0, 3, "none"),
        (torch.tensor([0]), 9, 3, "none"),
        (torch.tensor([0]), 4, 0, "none"),
        (torch.tensor([0]), 4, 3, "finite"),
    ],
)
def codes_that_do_not_fit_the_format_are_refused(candidate, bad):
    """A code with bits beyond 1 + E + M, a negative one, or a format that does not exist raises
    ValueError."""
    expect_error(candidate, ValueError, *bad)


def _read(
    codes,
    exponent_bits,
    mantissa_bits,
    specials,
    leading=(0, 1),  # the digit before the point, of subnormal and of normal numbers
    lowest=1,  # the exponent field that subnormal numbers are read with
    bias=None,
    read_as=None,  # the specials that are really looked for
    dtype=torch.int64,
):
    """decode_minifloat, open where people go wrong."""
    width = require_format(exponent_bits, mantissa_bits, specials)
    codes = require_codes(codes, 0, 2**width - 1).to(dtype)
    top, ones = 2**exponent_bits - 1, 2**mantissa_bits - 1
    sign = 1.0 - 2.0 * (codes >> (width - 1))
    e, m = (codes >> mantissa_bits) & top, codes & ones
    significand = torch.where(e > 0, leading[1], leading[0]) + m / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1 if bias is None else bias
    value = sign * torch.ldexp(significand, e.clamp(min=lowest) - bias)
    specials = read_as or specials
    if specials == "ieee":
        value = torch.where(e == top, torch.where(m == 0, sign * math.inf, math.nan), value)
    if specials == "fn":
        value = torch.where((e == top) & (m == ones), math.nan, value)
    return value


@minifloat.misconception(
    "You give every number the hidden leading 1. Where the exponent field is zero the number is "
    "subnormal: it has no hidden 1, and its exponent is that of the smallest normal numbers."
)
def forgets_subnormals(codes, exponent_bits, mantissa_bits, specials="ieee"):
    return _read(codes, exponent_bits, mantissa_bits, specials, leading=(1, 1), lowest=0)


@minifloat.misconception(
    "Your subnormal numbers are half of what they should be: their exponent is 1 - bias, the same "
    "as that of the smallest normal numbers, and not 0 - bias."
)
def subnormals_one_exponent_too_low(codes, exponent_bits, mantissa_bits, specials="ieee"):
    return _read(codes, exponent_bits, mantissa_bits, specials, lowest=0)


@minifloat.misconception(
    "Your exponents are one too low everywhere: it looks as if your bias were 2^(E-1). It is one "
    "less, so that 1.0 has the exponent field 0 1...1."
)
def bias_off_by_one(codes, exponent_bits, mantissa_bits, specials="ieee"):
    return _read(codes, exponent_bits, mantissa_bits, specials, bias=2 ** (exponent_bits - 1))


@minifloat.misconception(
    "You leave out the hidden 1: a normal number is (1 + m / 2^M) times its power of two. The 1 is "
    "not stored just because it is always there."
)
def no_hidden_one(codes, exponent_bits, mantissa_bits, specials="ieee"):
    return _read(codes, exponent_bits, mantissa_bits, specials, leading=(0, 0))


@minifloat.misconception(
    "You read negative codes as two's complement, as integers are stored. Floating-point formats "
    "store a sign and a magnitude: the bits under the sign mean the same for x and -x."
)
def sign_as_twos_complement(codes, exponent_bits, mantissa_bits, specials="ieee"):
    width = require_format(exponent_bits, mantissa_bits, specials)
    codes, sign_bit = require_codes(codes, 0, 2**width - 1), 2 ** (width - 1)
    codes = torch.where(codes >= sign_bit, sign_bit | (2**width - codes), codes)
    return _read(codes, exponent_bits, mantissa_bits, specials)


@minifloat.misconception(
    "You read every code as a number. Some formats set codes aside for infinity and NaN: look "
    "again at what specials means."
)
def specials_are_numbers(codes, exponent_bits, mantissa_bits, specials="ieee"):
    return _read(codes, exponent_bits, mantissa_bits, specials, read_as="none")


@minifloat.misconception(
    'You treat "fn" like "ieee". "fn" means finite: it has no infinity, and its largest exponent '
    "holds numbers, all but the one code that is NaN."
)
def fn_is_read_as_ieee(codes, exponent_bits, mantissa_bits, specials="ieee"):
    read_as = "ieee" if specials == "fn" else specials
    return _read(codes, exponent_bits, mantissa_bits, specials, read_as=read_as)


@minifloat.misconception(
    "You compute in the integer type of the codes. In uint8, 3 - 7 is 252: convert the codes to a "
    "wide type first."
)
def computes_in_the_type_of_the_codes(codes, exponent_bits, mantissa_bits, specials="ieee"):
    return _read(codes, exponent_bits, mantissa_bits, specials, dtype=codes.dtype)


@minifloat.accepts("one code at a time, as text of zeros and ones")
def reads_strings_of_bits(codes, exponent_bits, mantissa_bits, specials="ieee"):
    width = require_format(exponent_bits, mantissa_bits, specials)
    require_codes(codes, 0, 2**width - 1)

    def read(code):
        bits = f"{code:0{width}b}"
        sign = -1.0 if bits[0] == "1" else 1.0
        e, m = bits[1 : 1 + exponent_bits], bits[1 + exponent_bits :]
        if specials == "ieee" and "0" not in e:
            return math.nan if "1" in m else sign * math.inf
        if specials == "fn" and "0" not in e + m:
            return math.nan
        bias = 2 ** (exponent_bits - 1) - 1
        if "1" not in e:
            return sign * int(m, 2) * 2.0 ** (1 - bias - mantissa_bits)
        return sign * int("1" + m, 2) * 2.0 ** (int(e, 2) - bias - mantissa_bits)

    return torch.tensor([read(code) for code in codes.flatten().tolist()]).reshape(codes.shape)


@minifloat.accepts("a table of all positive numbers in NumPy, in float64")
def looks_up_a_table(codes, exponent_bits, mantissa_bits, specials="ieee"):
    width = require_format(exponent_bits, mantissa_bits, specials)
    index = require_codes(codes, 0, 2**width - 1).numpy()
    m = 2**mantissa_bits
    table = [np.arange(m) / m * 2.0 ** (2 - 2 ** (exponent_bits - 1))]
    for e in range(1, 2**exponent_bits):
        table.append((1 + np.arange(m) / m) * 2.0 ** (e + 1 - 2 ** (exponent_bits - 1)))
    numbers = np.concatenate(table)
    if specials == "ieee":
        numbers[-m:] = np.nan
        numbers[-m] = np.inf
    elif specials == "fn":
        numbers[-1] = np.nan
    return np.concatenate([numbers, -numbers])[index]


# --- 2. quantize_symmetric -----------------------------------------------------------------------

symmetric = Exercise(
    quantize_symmetric,
    paper="Krishnamoorthi 2018 (arXiv 1806.08342), Nagel et al. 2021 (arXiv 2106.08295)",
    difficulty=1,
    minutes=15,
    equivalent={
        "scale = torch.where(scale < torch.finfo(scale.dtype…  ->  "
        "scale = torch.where(scale <= torch.finfo(scale.dtype…": SMALLEST,
    },
)


@symmetric.check(
    points=3,
    hint="How large is the largest magnitude, of negative values too, and which code should it "
    "get? With dim, ask that of each slice, and look at what keepdim does.",
    examples=24,
    x_dim=sliced(dtypes=(torch.float32, torch.float16, torch.bfloat16)),
    bits=WIDTHS,
)
def each_slice_has_the_scale_of_its_largest_magnitude(candidate, x_dim, bits):
    """The scale is the largest magnitude divided by the largest code 2^(bits-1) - 1: one number for
    the tensor, or with dim one for each slice along dim, which stays as a dimension of size 1. Half
    precision is computed in float32."""
    x, dim = x_dim
    codes, scale = candidate(x, **given(bits=bits, dim=dim))
    absmax = over(x.double().abs(), dim, "amax")
    expect_scale(scale, absmax, 2 ** ((bits or 8) - 1) - 1)
    expect_shape(codes, x.shape, "the codes")
    expect_codes_within(ONE, x, codes, scale, where=absmax > 0)


@symmetric.check(
    points=2,
    hint="Divide one of the values by the scale. Which whole number is nearest, below zero too?",
    examples=20,
    x=nonzero(shapes(1, 3)),
    bits=WIDTHS,
)
def every_value_gets_the_nearest_code(candidate, x, bits):
    """Every code is a whole number between -(2^(bits-1) - 1) and 2^(bits-1) - 1, and the nearest to
    x / scale."""
    codes, scale = candidate(x, **given(bits=bits))
    expect_shape(codes, x.shape, "the codes")
    largest = 2 ** ((bits or 8) - 1) - 1
    expect_integers(codes, "the codes", -largest, largest)
    expect(scale.numel() == 1, f"the scale has shape {tuple(scale.shape)}, expected one number")
    expect_codes_within(HALF, x, codes, scale.reshape(()))


@symmetric.check(
    points=2,
    hint="The threshold takes the place of the largest magnitude, also when it is the larger of "
    "the two. What should become of a value beyond it?",
    examples=24,
    x_dim=sliced(),
    share=st.sampled_from((0.5, 0.25, 0.75, 1.0, 1.5)),
    form=st.sampled_from(("number", "tensor")),
    bits=WIDTHS,
)
def values_beyond_the_clip_saturate(candidate, x_dim, share, form, bits):
    """With clip, the scale is clip / (2^(bits-1) - 1), and values beyond it get the largest code,
    of their own sign."""
    x, dim = x_dim
    largest = 2 ** ((bits or 8) - 1) - 1
    absmax = over(x.abs(), dim, "amax")
    alpha = torch.where(absmax > 0, absmax, 1.0) * share
    clip = alpha if form == "tensor" else float(alpha.max())
    codes, scale = candidate(x, **given(bits=bits, dim=dim), clip=clip)
    wide = torch.as_tensor(clip).double().expand(x.shape)
    step = as_double(scale)
    expect_close(
        step.expand(x.shape) if step.dim() in (0, x.dim()) else step,
        wide / largest,
        "the scale, at each value,",
    )
    expect_integers(codes, "the codes", -largest, largest)
    expect_codes_within(ONE, x.double().clamp(-wide, wide), codes, wide / largest)


@symmetric.check(
    points=1,
    hint="What do you divide by where every value is zero?",
    examples=28,
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    case=st.sampled_from(("all zero", "zero rows", "zero columns", "clip")),
    bits=WIDTHS,
)
def an_all_zero_slice_gets_scale_1_and_codes_0(candidate, rows, columns, case, bits):
    """A slice of zeros, or a clip of 0, gives scale 1 and codes 0: never NaN, infinity or a scale
    of zero. The other slices do not notice."""
    x = torch.arange(1.0, rows * columns + 1).reshape(rows, columns)
    dim, clip = None, None
    if case == "all zero":
        x.zero_()
    elif case == "zero rows":
        dim = -1
        x[::2] = 0
    elif case == "zero columns":
        dim = 0
        x[:, ::2] = 0
    else:
        clip = 0.0
    codes, scale = candidate(x, **given(bits=bits, dim=dim, clip=clip))
    expect_shape(codes, x.shape, "the codes")
    dead = torch.full_like(x, True, dtype=torch.bool) if clip == 0 else x == 0
    step = as_double(scale)
    step = step.expand(x.shape) if step.dim() in (0, 2) else step
    expect_shape(step, x.shape, "the scale, spread over x,")
    expect_equal(step[dead], torch.ones(int(dead.sum())), "the scale of a slice of zeros")
    expect_equal(codes[dead], torch.zeros(int(dead.sum())), "the code of a zero")
    expect(torch.isfinite(step) & (step > 0), "a scale is not a positive number")
    expect_codes_within(ONE, x, codes, step, where=~dead)


@symmetric.check(
    points=1,
    hint="Rounding leaves a float tensor of whole numbers. Which type is promised?",
    examples=10,
    x=nonzero(dtypes=(torch.float32, torch.float16)),
    bits=WIDTHS,
    learned=st.booleans(),
)
def codes_are_stored_as_int8(candidate, x, bits, learned):
    """The codes are an int8 tensor and the scale is a float32 one, also where x is a weight that
    wants a gradient."""
    codes, scale = candidate(x.requires_grad_(learned), **given(bits=bits))
    expect(codes.dtype == torch.int8, f"the codes are {codes.dtype}, expected torch.int8")
    expect(scale.dtype in FLOATS, f"the scale is {scale.dtype}, expected torch.float32")


@symmetric.check(
    points=1,
    hint="Look at the docstring under Raises. A NaN that becomes code 0 is a fault hidden for "
    "good.",
    bad=[
        ((NAN,), {}),
        ((INF,), {}),
        ((torch.zeros(0),), {}),
        ((torch.ones(2), 1), {}),
        ((torch.ones(2), 9), {}),
        ((torch.ones(2),), {"clip": -1.0}),
        ((torch.ones(2),), {"clip": math.nan}),
    ],
)
def what_cannot_be_quantized_is_refused(candidate, bad):
    """NaN, infinity, an empty tensor, bits outside 2 to 8 and a negative clip raise ValueError."""
    args, kwargs = bad
    expect_error(candidate, ValueError, *args, **kwargs)


def _prepared(x, bits, dim, clip):
    """x, the threshold of each slice, the largest code and the scale, all of them right."""
    x = require_finite(x, "x")
    largest = 2 ** (require_bits(bits) - 1) - 1
    absmax = over(x.abs(), dim, "amax")
    alpha = absmax if clip is None else require_clip(clip, like=absmax)
    return x, alpha, largest, torch.where(alpha == 0, 1.0, alpha / largest)


def _clipped_at(alpha, x, bits):
    """Codes and scale of x for a threshold that may not fit the slices of x."""
    largest, alpha = 2 ** (require_bits(bits) - 1) - 1, torch.as_tensor(alpha)
    if not torch.isfinite(alpha).all() or (alpha < 0).any():
        raise ValueError("clip must be finite and not negative")
    scale = torch.where(alpha == 0, 1.0, alpha / largest)
    return torch.round(x.clamp(-alpha, alpha) / scale).to(torch.int8), scale


@symmetric.misconception(
    "You take the maximum of x, not of |x|: where the largest magnitude is negative, codes leave "
    "the range."
)
def largest_value_instead_of_magnitude(x, bits=8, dim=None, clip=None):
    x, alpha, largest, _ = _prepared(x, bits, dim, clip)
    if clip is None:
        alpha = over(x, dim, "amax")
    scale = torch.where(alpha == 0, 1.0, alpha / largest)
    return torch.round(x / scale).clamp(-128, 127).to(torch.int8), scale


@symmetric.misconception(
    "Your scale divides by 2^(bits-1). The largest code is one less: otherwise the largest value "
    "would need a code that does not exist."
)
def divides_by_one_level_too_many(x, bits=8, dim=None, clip=None):
    x, alpha, largest, _ = _prepared(x, bits, dim, clip)
    scale = torch.where(alpha == 0, 1.0, alpha / (largest + 1))
    codes = torch.round(x.clamp(-alpha, alpha) / scale).clamp(-largest - 1, largest)
    return codes.to(torch.int8), scale


@symmetric.misconception(
    "You round down. The nearest code may be the one above: floor doubles the largest error and "
    "shifts every value to the same side."
)
def floors(x, bits=8, dim=None, clip=None):
    x, alpha, largest, scale = _prepared(x, bits, dim, clip)
    codes = torch.floor(x.clamp(-alpha, alpha) / scale).clamp(-largest, largest)
    return codes.to(torch.int8), scale


@symmetric.misconception(
    "You cut off the fraction: converting to an integer type rounds towards zero. Round to the "
    "nearest code first, then convert."
)
def truncates(x, bits=8, dim=None, clip=None):
    x, alpha, _, scale = _prepared(x, bits, dim, clip)
    return (x.clamp(-alpha, alpha) / scale).to(torch.int8), scale


@symmetric.misconception(
    "You give the whole tensor one scale although dim asks for one for each slice: an outlier in "
    "one row then spoils all the others."
)
def one_scale_although_dim_is_given(x, bits=8, dim=None, clip=None):
    x = require_finite(x, "x")
    return _clipped_at(x.abs().amax() if clip is None else clip, x, bits)


@symmetric.misconception(
    "Your slices run the wrong way: the maximum is taken *along* dim, which leaves one scale for "
    "each index of the other dimensions. You keep dim and reduce the others."
)
def keeps_dim_and_reduces_the_others(x, bits=8, dim=None, clip=None):
    x = require_finite(x, "x")
    others = [d for d in range(x.dim()) if dim is None or d != dim % x.dim()]
    absmax = x.abs().amax(others, keepdim=dim is not None) if others else x.abs()
    return _clipped_at(absmax if clip is None else clip, x, bits)


@symmetric.misconception(
    "Your reduction drops dim, so that the scale no longer lines up with x: it divides the wrong "
    "values, or none at all. Keep the dimension with size 1."
)
def forgets_keepdim(x, bits=8, dim=None, clip=None):
    x = require_finite(x, "x")
    absmax = x.abs().amax() if dim is None else x.abs().amax(dim)
    return _clipped_at(absmax if clip is None else clip, x, bits)


@symmetric.misconception(
    "Values beyond the clip are not held at it: their codes leave the range, and some wrap around "
    "in int8 and come back with the other sign."
)
def forgets_to_clamp(x, bits=8, dim=None, clip=None):
    x, alpha, _, scale = _prepared(x, bits, dim, clip)
    codes = torch.where(alpha == 0, 0.0, torch.round(x / scale))
    return codes.to(torch.int32).to(torch.int8), scale


@symmetric.misconception(
    "You divide by zero where a slice is all zeros: its scale is 0, and 0 / 0 is not a number. "
    "Such a slice needs some other scale, and the docstring names one."
)
def divides_by_zero(x, bits=8, dim=None, clip=None):
    x, alpha, largest, _ = _prepared(x, bits, dim, clip)
    scale = alpha / largest
    codes = torch.round(x.clamp(-alpha, alpha) / scale).nan_to_num(0.0)
    return codes.to(torch.int8), scale


def _nearest(v):
    """Round to the nearest whole number, ties away from zero."""
    return np.sign(v) * np.floor(np.abs(v) + 0.5)


@symmetric.accepts("NumPy in float64, ties away from zero, the codes clamped instead of x")
def numpy_with_ties_away_from_zero(x, bits=8, dim=None, clip=None):
    values = x.detach().double().numpy()
    if values.size == 0 or not np.isfinite(values).all() or not 2 <= bits <= 8:
        raise ValueError("cannot quantize this")
    largest = 2 ** (bits - 1) - 1
    alpha = np.abs(values).max(axis=dim, keepdims=dim is not None)
    if clip is not None:
        alpha = np.asarray(clip, dtype=np.float64) + 0 * alpha
        if not (alpha >= 0).all():
            raise ValueError("the clip cannot be negative")
    scale = np.where(alpha > 0, alpha / largest, 1.0)
    ratio = np.where(alpha > 0, values / scale, 0.0)
    codes = np.clip(_nearest(ratio), -largest, largest)
    return codes.astype(np.int8), scale.astype(np.float32)


@symmetric.accepts("Python loops over slices, numbers and comparisons")
def loops_over_slices(x, bits=8, dim=None, clip=None):
    if dim is None:
        codes, scale = loops_over_slices(x.reshape(1, -1), bits, -1, clip)
        return codes.reshape(x.shape), scale.reshape(())
    if x.numel() == 0 or bits < 2 or bits > 8:
        raise ValueError("nothing to quantize, or no such width")
    moved, largest = x.movedim(dim, -1), 2 ** (bits - 1) - 1
    rows = moved.reshape(-1, moved.shape[-1]).tolist()
    thresholds = [max(abs(v) for v in row) for row in rows]
    if clip is not None:
        # One threshold for each row: laid out as the scale, then read in the order of the rows.
        wide = torch.as_tensor(clip).expand_as(x.narrow(dim, 0, 1))
        thresholds = wide.movedim(dim, -1).flatten().tolist()
    codes, scales = [], []
    for row, alpha in zip(rows, thresholds, strict=True):
        if not all(math.isfinite(v) for v in [*row, alpha]) or alpha < 0:
            raise ValueError("NaN, infinity or a negative clip")
        scales.append(alpha / largest if alpha > 0 else 1.0)
        codes.append([round(max(-alpha, min(alpha, v)) / scales[-1]) for v in row])
    stored = torch.tensor(codes, dtype=torch.int8).reshape(moved.shape)
    scale = torch.tensor(scales).reshape(*moved.shape[:-1], 1)
    return stored.movedim(-1, dim), scale.movedim(-1, dim)


# --- 3. quantize_asymmetric ----------------------------------------------------------------------

asymmetric = Exercise(
    quantize_asymmetric,
    paper="Jacob et al. 2018 (arXiv 1712.05877), section 2.1",
    difficulty=2,
    minutes=15,
    equivalent={
        "scale = torch.where(scale < torch.finfo(scale.dtype…  ->  "
        "scale = torch.where(scale <= torch.finfo(scale.dtype…": SMALLEST,
        "zero_point = torch.round(-low / scale).clamp(0, largest)  ->  "
        "zero_point = torch.round(-low / scale)": NO_CLAMP,
        "zero_point = torch.round(-low / scale).clamp(0, largest)  ->  "
        "zero_point = torch.round(-low / scale).clamp(-1, largest)": NO_CLAMP,
        "…scale) + zero_point).clamp(0, largest)  ->  …scale) + zero_point).clamp(-1, largest)": (
            "round(lo / scale) is exactly minus the zero-point, so no code is below 0"
        ),
    },
)


@st.composite
def ranges_between_codes(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Values whose ends both lie half-way between two codes, and the bits for which they do."""
    bits = draw(st.integers(2, 8))
    largest, step = 2**bits - 1, draw(st.sampled_from([1.0, 0.5, 4.0]))
    below = draw(st.integers(0, largest - 1)) + 0.5
    inside = draw(st.lists(st.integers(-2, 2), max_size=4))
    ends = [-below, largest - below]
    return torch.tensor([*ends, *(min(max(v, ends[0]), ends[1]) for v in inside)]) * step, bits


@asymmetric.check(
    points=2,
    hint="From where to where must the codes reach, if 0 has to have one of its own?",
    examples=24,
    x_dim=sliced(dtypes=(torch.float32, torch.float16, torch.bfloat16)),
    bits=WIDTHS,
)
def the_scale_spans_the_range_and_zero(candidate, x_dim, bits):
    """The scale is (hi - lo) / (2^bits - 1), where lo and hi are the smallest and the largest
    value, or 0 where that lies outside. With dim each slice has its own, and dim stays with size 1.
    """
    x, dim = x_dim
    codes, scale, zero_point = candidate(x, **given(bits=bits, dim=dim))
    low = over(x.double(), dim, "amin").clamp(max=0)
    high = over(x.double(), dim, "amax").clamp(min=0)
    expect_scale(scale, high - low, 2 ** (bits or 8) - 1)
    expect_shape(zero_point, low.shape, "the zero-point")
    expect_shape(codes, x.shape, "the codes")
    expect_codes_within(2 * ONE, x, codes, scale, zero_point, where=high > low)


@asymmetric.check(
    points=2,
    hint="The zero-point is itself a code. Which one stands for the number 0?",
    examples=24,
    x=nonzero(
        kinds=("whole", "sparse", "ties", "normal", "positive", "negative", "outlier", "tiny")
    ),
    bits=WIDTHS,
)
def zero_has_a_code_of_its_own(candidate, x, bits):
    """The zero-point is a whole number from 0 to 2^bits - 1, the nearest to -lo / scale, and it is
    the code of every 0 in x: zeros come back as exactly 0."""
    codes, scale, zero_point = candidate(x, **given(bits=bits))
    expect_integers(zero_point, "the zero-points", 0, 2 ** (bits or 8) - 1)
    low = x.double().amin().clamp(max=0)
    off = (-low / as_double(scale) - as_double(zero_point)).abs()
    expect(off <= HALF, f"the zero-point is {float(off.max()):.3g} codes away from -lo / scale")
    zeros = codes[x == 0]
    expect_equal(zeros, as_double(zero_point).expand(zeros.shape), "the code of 0", reveal=True)


@asymmetric.check(
    points=3,
    hint="Let x come back as scale * (codes - zero_point): what is the largest error there should "
    "be, at the very ends of the range too?",
    examples=32,
    x_bits=st.tuples(nonzero(shapes(1, 3)), WIDTHS) | ranges_between_codes(),
)
def every_value_comes_back_within_half_a_step(candidate, x_bits):
    """Every code is a whole number from 0 to 2^bits - 1, and scale times (code - zero-point) is
    within half a scale of the value."""
    x, bits = x_bits
    codes, scale, zero_point = candidate(x, **given(bits=bits))
    expect_shape(codes, x.shape, "the codes")
    expect_integers(codes, "the codes", 0, 2 ** (bits or 8) - 1)
    expect_codes_within(HALF, x, codes, scale, zero_point)


@asymmetric.check(
    points=1,
    hint="How wide is the range of a slice whose values are all the same? And if they are all 0?",
    examples=28,
    constants=st.lists(
        st.sampled_from((0.0, 1.0, -1.0, 2.5, -3.0, 1000.0)), min_size=1, max_size=3
    ),
    columns=st.integers(1, 4),
    bits=WIDTHS,
)
def constant_slices_come_back_as_they_are(candidate, constants, columns, bits):
    """A slice of one value c comes back as c; a slice of zeros gets scale 1, zero-point 0 and codes
    0."""
    x = torch.tensor(constants).reshape(-1, 1).repeat(1, columns)
    codes, scale, zero_point = candidate(x, **given(bits=bits), dim=-1)
    step, zero = as_double(scale).reshape(-1, 1), as_double(zero_point).reshape(-1, 1)
    expect(torch.isfinite(step) & (step > 0), "a scale is not a positive number")
    restored = step * (as_double(codes) - zero)
    expect_close(restored, x, "scale * (codes - zero_point)", rtol=1e-4, reveal=True)
    dead = x[:, :1] == 0
    expect_equal(step[dead], torch.ones(int(dead.sum())), "the scale of a slice of zeros")
    expect_equal(zero[dead], torch.zeros(int(dead.sum())), "the zero-point of a slice of zeros")


@asymmetric.check(
    points=1,
    hint="Rounding leaves float tensors of whole numbers. Which types are promised?",
    examples=10,
    x=nonzero(dtypes=(torch.float32, torch.float16)),
    bits=WIDTHS,
    learned=st.booleans(),
)
def codes_are_stored_as_uint8(candidate, x, bits, learned):
    """The codes are a uint8 tensor, the zero-point an int32 one (any integer type will do) and the
    scale a float32 one, also where x is a weight that wants a gradient."""
    codes, scale, zero_point = candidate(x.requires_grad_(learned), **given(bits=bits))
    expect(codes.dtype == torch.uint8, f"the codes are {codes.dtype}, expected torch.uint8")
    expect(scale.dtype in FLOATS, f"the scale is {scale.dtype}, expected torch.float32")
    expect(
        not zero_point.is_floating_point(),
        f"the zero-point is {zero_point.dtype}, expected torch.int32",
    )


@asymmetric.check(
    points=1,
    hint="Look at the docstring under Raises. Can hi - lo be too large for float32?",
    bad=[
        (NAN,),
        (INF,),
        (torch.zeros(0),),
        (torch.ones(2), 1),
        (torch.ones(2), 9),
        (torch.tensor([-3e38, 3e38]),),
    ],
)
def what_has_no_range_is_refused(candidate, bad):
    """NaN, infinity, an empty tensor, bits outside 2 to 8, and a range that overflows raise
    ValueError."""
    expect_error(candidate, ValueError, *bad)


def _scaled(low, high, bits):
    """The scale of a range, and the largest code."""
    largest = 2 ** require_bits(bits) - 1
    scale = require_finite(high - low, "the range of x") / largest
    return torch.where(scale == 0, 1.0, scale), largest


def _range(x, bits, dim):
    """x, lo, the scale and the largest code, all of them right."""
    x = require_finite(x, "x")
    low, high = over(x, dim, "amin").clamp(max=0), over(x, dim, "amax").clamp(min=0)
    return x, low, *_scaled(low, high, bits)


def _coded(x, low, high, bits):
    """quantize_asymmetric for a range that may be the wrong one."""
    scale, largest = _scaled(low, high, bits)
    zero_point = torch.round(-low / scale)
    codes = (torch.round(x / scale) + zero_point).clamp(0, largest)
    return codes.to(torch.uint8), scale, zero_point.to(torch.int32)


@asymmetric.misconception(
    "Your range goes from min to max even where 0 lies outside. Then no code stands for 0: padding "
    "and ReLU zeros come back as something else. Widen the range to contain 0."
)
def range_without_zero(x, bits=8, dim=None):
    x = require_finite(x, "x")
    return _coded(x, over(x, dim, "amin"), over(x, dim, "amax"), bits)


@asymmetric.misconception(
    "Your zero-point is not a whole number. It is a code, and codes are integers: only then does 0 "
    "come back as exactly 0, and only then can it be stored as an integer."
)
def zero_point_not_rounded(x, bits=8, dim=None):
    x, low, scale, largest = _range(x, bits, dim)
    zero_point = -low / scale
    codes = torch.round(x / scale + zero_point).clamp(0, largest)
    return codes.to(torch.uint8), scale, zero_point


@asymmetric.misconception(
    "You measure codes from the minimum, round((x - lo) / scale), but hand out a rounded "
    "zero-point: the two disagree by up to half a step. Add the rounded zero-point to get the "
    "codes."
)
def shifts_by_the_minimum(x, bits=8, dim=None):
    x, low, scale, _ = _range(x, bits, dim)
    codes = torch.round((x - low) / scale)
    return codes.to(torch.uint8), scale, torch.round(-low / scale).to(torch.int32)


@asymmetric.misconception(
    "Your codes are signed, from -2^(bits-1) to 2^(bits-1) - 1. That is a convention too, but the "
    "one asked for here starts at 0."
)
def signed_codes(x, bits=8, dim=None):
    x, low, scale, _ = _range(x, bits, dim)
    half = 2 ** (bits - 1)
    zero_point = torch.round(-low / scale) - half
    codes = (torch.round(x / scale) + zero_point).clamp(-half, half - 1)
    return codes.to(torch.int8), scale, zero_point.to(torch.int32)


@asymmetric.misconception(
    "You do not clamp the codes. Two roundings can add up: the largest value may get a code one "
    "past the last, which in uint8 may even come back as 0."
)
def forgets_to_clamp_the_codes(x, bits=8, dim=None):
    x, low, scale, _ = _range(x, bits, dim)
    zero_point = torch.round(-low / scale)
    codes = torch.round(x / scale) + zero_point
    return codes.to(torch.int32).to(torch.uint8), scale, zero_point.to(torch.int32)


@asymmetric.misconception(
    "Your range is as wide below zero as above it: that is symmetric quantization with a "
    "zero-point in the middle. For values of one sign half of the codes are never used."
)
def range_around_zero(x, bits=8, dim=None):
    x = require_finite(x, "x")
    absmax = over(x.abs(), dim, "amax")
    return _coded(x, -absmax, absmax, bits)


@asymmetric.accepts("NumPy in float64, ties away from zero")
def numpy_affine(x, bits=8, dim=None):
    values = x.detach().double().numpy()
    if values.size == 0 or not np.isfinite(values).all() or not 2 <= bits <= 8:
        raise ValueError("cannot quantize this")
    low = np.minimum(values.min(axis=dim, keepdims=dim is not None), 0)
    high = np.maximum(values.max(axis=dim, keepdims=dim is not None), 0)
    if (high - low > np.finfo(np.float32).max).any():
        raise ValueError("the range does not fit in float32")
    largest = 2**bits - 1
    scale = np.where(high > low, (high - low) / largest, 1.0)
    zero_point = np.clip(_nearest(-low / scale), 0, largest)
    codes = np.clip(_nearest(values / scale) + zero_point, 0, largest)
    return codes.astype(np.uint8), scale, zero_point.astype(np.int64)


@asymmetric.accepts("float64 inside, one rounding after the zero-point is added")
def rounds_after_adding(x, bits=8, dim=None):
    if x.numel() == 0 or not torch.isfinite(x).all() or bits < 2 or bits > 8:
        raise ValueError("cannot quantize this")
    values, axes = x.detach().double(), () if dim is None else dim
    low = values.amin(axes, keepdim=dim is not None).clamp(max=0)
    high = values.amax(axes, keepdim=dim is not None).clamp(min=0)
    if (high - low > torch.finfo(torch.float32).max).any():
        raise ValueError("the range does not fit in float32")
    scale = ((high - low) / (2**bits - 1)).float() + (high == low)
    zero_point = (-low / scale).round().clamp(max=2**bits - 1)
    codes = (values / scale + zero_point).round().clamp(0, 2**bits - 1)
    return codes.byte(), scale, zero_point.int()


# --- 4. sqnr -------------------------------------------------------------------------------------

noise_ratio = Exercise(
    sqnr,
    paper="Bennett 1948, Nagel et al. 2021 (arXiv 2106.08295), section 2",
    difficulty=1,
    minutes=5,
)
noise_ratio.equivalent.update(
    {
        "… (require_finite(x, 'x').double(), require_finite(x_hat, …  ->  "
        "… (require_finite(x, 'x'), require_finite(x_hat, …": (
            "float32 sums agree to seven digits, and correct work may use them"
        ),
        "…require_finite(x_hat, 'x_hat').double())  ->  "
        "…require_finite(x_hat, 'x_hat'))": "float64 minus float32 is float64",
    }
)


@st.composite
def signals(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two different tensors of one shape, the first one not zero everywhere."""
    shape = draw(shapes(1, 3, max_side=5))
    x = draw(nonzero(shape, kinds=("whole", "normal", "outlier", "sparse", "positive")))
    x_hat = draw(tensors(shape, kinds=("whole", "normal", "sparse", "constant")))
    return x, x_hat if bool((x != x_hat).any()) else x_hat + 1


def energy(x: Tensor) -> float:
    """The sum of squares, in float64."""
    return float(x.double().square().sum())


@noise_ratio.check(
    points=2,
    hint="Take x = 1 and an error of 1/2. Which ratio of energies is that, and how many decibels?",
    examples=16,
    x=nonzero(),
    halvings=st.integers(0, 6),
    sign=st.sampled_from((1, -1)),
)
def halving_the_error_gains_6_decibels(candidate, x, halvings, sign):
    """Where every error is the value itself, SQNR is 0 dB; each time all errors are halved, it
    rises by 20 log10 2 = 6.02 dB."""
    ratio = candidate(x, x * (1 + sign * 0.5**halvings))
    expect_close(ratio, 20 * halvings * math.log10(2), "the SQNR", atol=1e-2, reveal=True)


@noise_ratio.check(
    points=3,
    hint="The energy of a signal is the sum of its squares. Of what do you take the ratio, and "
    "when the logarithm?",
    examples=16,
    pair=signals(),
)
def it_is_the_ratio_of_two_energies(candidate, pair):
    """SQNR is 10 log10 of the sum of x^2 over all elements, divided by the sum of (x - x_hat)^2
    over all elements."""
    x, x_hat = pair
    want = 10 * math.log10(energy(x) / energy(x.double() - x_hat.double()))
    expect_close(candidate(x, x_hat), want, "the SQNR", rtol=1e-4, atol=1e-3)


@noise_ratio.check(
    points=1,
    hint="What is the square of 300 in float16, and that of 0.0001?",
    examples=24,
    hidden=True,
    x=nonzero(kinds=("tiny", "large"), dtypes=(torch.float16, torch.bfloat16)),
    part=st.sampled_from((0.125, 0.25)),
)
def half_precision_is_no_excuse(candidate, x, part):
    """The sums are right for float16 and bfloat16 as well, where squares overflow, vanish or lose
    their digits."""
    x_hat = x + part * x
    error = x.double() - x_hat.double()
    if not bool(error.any()):
        return
    want = 10 * math.log10(energy(x) / energy(error))
    expect_close(candidate(x, x_hat), want, "the SQNR", rtol=1e-4, atol=1e-2, reveal=True)


@noise_ratio.check(
    points=1,
    hint="What should the ratio be where there is no error at all? And where there is no signal?",
    examples=16,
    x=tensors(kinds=("whole", "zeros", "normal")),
    zero=st.booleans(),
)
def no_error_is_infinitely_good(candidate, x, zero):
    """SQNR is inf where x_hat equals x everywhere, zeros included, and -inf where x is zero
    everywhere and x_hat is not."""
    if zero:
        ratio = candidate(torch.zeros_like(x), x.abs() + 1)
        expect_equal(ratio, -math.inf, "the SQNR of a signal of zeros", reveal=True)
    else:
        expect_equal(candidate(x, x), math.inf, "the SQNR of a perfect copy", reveal=True)


@noise_ratio.check(
    points=1,
    hint="Would a tensor of another shape be broadcast without a word?",
    bad=[
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(3), torch.ones(1)),
        (NAN, torch.ones(2)),
        (torch.ones(2), INF),
        (torch.ones(2), NAN),
        (torch.zeros(0), torch.zeros(0)),
    ],
)
def what_cannot_be_compared_is_refused(candidate, bad):
    """Tensors of different shapes, empty ones, and NaN or infinity raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _ratio(x, x_hat, decibels):
    """sqnr, with the formula left open: decibels(signal, noise), neither of them zero."""
    signal, restored = require_finite(x, "x").double(), require_finite(x_hat, "x_hat").double()
    require_same_shape(signal, restored, "x and x_hat")
    noise = signal - restored
    if not noise.any() or not signal.any():
        return -math.inf if noise.any() else math.inf
    return decibels(signal, noise)


@noise_ratio.misconception(
    "Your ratio is upside down: signal over noise, so that higher is better."
)
def noise_over_signal(x, x_hat):
    return _ratio(x, x_hat, lambda s, n: 10 * math.log10(energy(n) / energy(s)))


@noise_ratio.misconception(
    "You take 20 log10 of a ratio of energies. 20 goes with amplitudes: the square is already the "
    "second 10."
)
def twenty_times_the_logarithm(x, x_hat):
    return _ratio(x, x_hat, lambda s, n: 20 * math.log10(energy(s) / energy(n)))


@noise_ratio.misconception(
    "You use the natural logarithm. Decibels are counted with the logarithm to base 10."
)
def natural_logarithm(x, x_hat):
    return _ratio(x, x_hat, lambda s, n: 10 * math.log(energy(s) / energy(n)))


@noise_ratio.misconception(
    "You compare mean magnitudes. Energy is the sum of squares: one large error weighs more than "
    "many small ones."
)
def magnitudes_instead_of_squares(x, x_hat):
    return _ratio(x, x_hat, lambda s, n: 20 * math.log10(s.abs().mean() / n.abs().mean()))


@noise_ratio.misconception(
    "Your signal is the largest value squared. That is the peak signal-to-noise ratio of images; "
    "here the whole signal counts."
)
def peak_instead_of_energy(x, x_hat):
    return _ratio(x, x_hat, lambda s, n: 10 * math.log10(s.abs().max() ** 2 / n.square().mean()))


@noise_ratio.misconception(
    "You sum the squares in half precision, where they overflow or vanish. Convert first."
)
def sums_in_the_precision_of_x(x, x_hat):
    require_same_shape(require_finite(x, "x"), require_finite(x_hat, "x_hat"), "x and x_hat")
    noise = (x - x_hat).square().sum()
    if noise == 0 or not x.any():
        return math.inf if noise == 0 else -math.inf
    return 10 * torch.log10(x.square().sum() / noise).item()


@noise_ratio.accepts("a loop over Python numbers, means instead of sums")
def loops_over_numbers(x, x_hat):
    if x.shape != x_hat.shape or x.numel() == 0:
        raise ValueError("x and x_hat must have the same shape, and elements")
    pairs = list(zip(x.flatten().tolist(), x_hat.flatten().tolist(), strict=True))
    signal = math.fsum(a * a for a, _ in pairs) / len(pairs)
    noise = math.fsum((a - b) ** 2 for a, b in pairs) / len(pairs)
    if not math.isfinite(signal + noise):
        raise ValueError("x and x_hat must be finite")
    if noise == 0:
        return float("inf")
    return 10 * (math.log10(signal) - math.log10(noise)) if signal else float("-inf")


@noise_ratio.accepts("norms in float32, a 0-d tensor")
def ratio_of_norms(x, x_hat):
    x, x_hat = x.float(), x_hat.float()
    if x.shape != x_hat.shape or not x.numel() or not (x + x_hat).isfinite().all():
        raise ValueError("x and x_hat do not fit")
    error = torch.linalg.vector_norm(x - x_hat)
    return (
        20 * torch.log10(torch.linalg.vector_norm(x) / error) if error else torch.tensor(math.inf)
    )


# --- 5. quantize_per_group -----------------------------------------------------------------------

per_group = Exercise(
    quantize_per_group,
    paper="Shen et al. 2020 (arXiv 1909.05840), Frantar et al. 2023 (arXiv 2210.17323)",
    difficulty=2,
    minutes=15,
    equivalent={
        "…codes, scale, zero_point[0] if zero_point else None…  ->  "
        "…codes, scale, zero_point[-1] if zero_point else None…": "the list has one element",
    },
)


@st.composite
def weights(
    draw: st.DrawFn, ragged: bool, symmetric: bool | None = None
) -> tuple[Tensor, int, int, dict[str, Any]]:
    """W [out, in], bits, group size and the options that say so, unless they are the defaults.

    The group size divides `in` or, ragged, does not.
    """
    size = draw(st.sampled_from((2, 3, 1, 4, 5, None) if not ragged else (2, 3, 4, 5, None)))
    g = size or 64
    full = draw(st.integers(0 if ragged else 1, 4 if size else 2))
    tail = draw(st.integers(1, g - 1)) if ragged else 0
    w = draw(nonzero((draw(st.integers(1, 4)), full * g + tail)))
    bits = draw(WIDTHS)
    return w, bits or 4, g, given(bits=bits, group_size=size, symmetric=symmetric)


def spread(parameter: Tensor, group_size: int, columns: int, what: str) -> Tensor:
    """One value for each weight, from one for each group."""
    groups = -(-columns // group_size)
    shape = tuple(parameter.shape)
    expect(
        parameter.dim() == 2 and shape[1] == groups,
        f"{what} has shape {shape}, expected one column for each of the {groups} groups of a row",
    )
    return as_double(parameter).repeat_interleave(group_size, dim=1)[:, :columns]


def expect_group_scales(w: Tensor, bits: int, group_size: int, scale: Tensor) -> None:
    groups = w.double().abs().split(group_size, dim=1)
    expect_scale(scale, torch.stack([group.amax(1) for group in groups], 1), 2 ** (bits - 1) - 1)


@per_group.check(
    points=3,
    hint="Which weights share a scale? Write down W as 2 rows of 4 and circle the groups of 2.",
    examples=16,
    drawn=weights(ragged=False),
)
def consecutive_weights_of_a_row_share_a_scale(candidate, drawn):
    """Each run of group_size consecutive weights of a row has one scale, its largest magnitude over
    2^(bits-1) - 1: in all [out, in / group_size]."""
    w, bits, size, options = drawn
    codes, scale, _ = candidate(w, **options)
    expect_group_scales(w, bits, size, scale)
    expect_shape(codes, w.shape, "the codes")
    steps = spread(scale, size, w.shape[1], "the scale")
    expect_codes_within(ONE, w, codes, steps, where=w != 0)


@per_group.check(
    points=2,
    hint="What is left at the end of a row if 2 does not divide its 5 weights? Which weights "
    "should the scale of that rest depend on?",
    examples=16,
    drawn=weights(ragged=True),
)
def the_shorter_last_group_is_a_group_of_its_own(candidate, drawn):
    """Where group_size does not divide a row, its last group is shorter and has a scale from its
    own weights alone; no weight is dropped or added."""
    w, bits, size, options = drawn
    codes, scale, _ = candidate(w, **options)
    expect_shape(codes, w.shape, "the codes")
    expect_group_scales(w, bits, size, scale)
    steps = spread(scale, size, w.shape[1], "the scale")
    w, codes, steps = (whole.split(size, dim=1)[-1] for whole in (w, codes, steps))
    expect_codes_within(ONE, w, codes, steps, where=w != 0)


@per_group.check(
    points=1,
    hint="Divide one of the weights by the scale of its group. Which whole number is nearest?",
    examples=16,
    drawn=weights(ragged=False),
)
def every_weight_gets_the_nearest_code(candidate, drawn):
    """Every code is the whole number nearest to the weight over the scale of its group."""
    w, bits, size, options = drawn
    codes, scale, _ = candidate(w, **options)
    expect_shape(codes, w.shape, "the codes")
    largest = 2 ** (bits - 1) - 1
    expect_integers(codes, "the codes", -largest, largest)
    steps = spread(scale, size, w.shape[1], "the scale")
    expect_codes_within(HALF, w, codes, steps, where=w != 0)


@per_group.check(
    points=2,
    hint="With symmetric=False a group is quantized as in the exercise before: what else than "
    "codes and scale is needed to get its weights back?",
    examples=20,
    drawn=weights(ragged=False, symmetric=False) | weights(ragged=True, symmetric=False),
)
def asymmetric_groups_have_zero_points(candidate, drawn):
    """With symmetric=False codes go from 0 to 2^bits - 1, each group has a scale and a zero-point
    of its own, and every weight comes back within half a scale."""
    w, bits, size, options = drawn
    codes, scale, zero_point = candidate(w, **options)
    expect_shape(codes, w.shape, "the codes")
    expect_integers(codes, "the codes", 0, 2**bits - 1)
    expect_integers(zero_point, "the zero-points", 0, 2**bits - 1)
    groups = w.double().split(size, dim=1)
    spans = [group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0) for group in groups]
    expect_scale(scale, torch.stack(spans, 1), 2**bits - 1)
    steps = spread(scale, size, w.shape[1], "the scale")
    zeros = spread(zero_point, size, w.shape[1], "the zero-point")
    expect_codes_within(HALF, w, codes, steps, zeros)


@per_group.check(
    points=1,
    hint="What do you divide by in a group of zeros?",
    examples=16,
    rows=st.integers(1, 3),
    size=st.integers(1, 3),
    symmetric=st.sampled_from((None, True, False)),
    bits=WIDTHS,
)
def an_all_zero_group_gets_scale_1_and_codes_0(candidate, rows, size, symmetric, bits):
    """A group of zeros among others gets scale 1 and codes 0: never NaN, infinity or a scale of
    zero."""
    w = torch.arange(1.0, rows * size * 3 + 1).reshape(rows, 3 * size)
    w[:, size : 2 * size] = 0
    options = given(bits=bits, symmetric=symmetric)
    codes, scale, _ = candidate(w, group_size=size, **options)
    expect_shape(scale, (rows, 3), "the scale")
    expect_equal(scale[:, 1], torch.ones(rows), "the scale of a group of zeros", reveal=True)
    zeros = codes[:, size : 2 * size]
    expect_equal(zeros, torch.zeros(zeros.shape), "the codes of a group of zeros", reveal=True)
    expect(as_double(scale) > 0, "a scale is not positive")


@per_group.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        ((torch.ones(4),), {"group_size": 2}),
        ((torch.ones(2, 2, 2),), {"group_size": 2}),
        ((torch.ones(2, 4),), {"group_size": 0}),
        ((torch.ones(2, 4),), {"group_size": -2}),
        ((torch.ones(2, 4),), {"bits": 1}),
        ((torch.ones(2, 4),), {"bits": 9, "symmetric": False}),
        ((NAN.reshape(1, 2),), {}),
        ((INF.reshape(2, 1),), {"symmetric": False}),
        ((torch.zeros(0, 4),), {}),
    ],
)
def what_has_no_groups_is_refused(candidate, bad):
    """Anything but a matrix with elements, NaN and infinity, a group_size below 1 and bits outside
    2 to 8 raise ValueError."""
    args, kwargs = bad
    expect_error(candidate, ValueError, *args, **kwargs)


def _checked(w, group_size):
    """w, after a look at it and at the group size."""
    require_int(group_size, "group_size", 1)
    return require_matrix(w, "w")


def _joined(groups, bits, symmetric, dim=-1):
    """Matrices quantized one by one, with a scale for each slice along dim, and joined there."""
    quantize = quantize_symmetric if symmetric else quantize_asymmetric
    parts = [quantize(group, bits, dim=dim) for group in groups]
    codes, scale, *zero_point = (torch.cat(part, dim=dim) for part in zip(*parts, strict=True))
    return codes, scale, zero_point[0] if zero_point else None


@per_group.misconception(
    "Your groups run down the columns. W is [out, in], and a group is a run of consecutive "
    "inputs of one output: it lies in a row."
)
def groups_down_the_columns(w, bits=4, group_size=64, symmetric=True):
    w = _checked(w, group_size)
    return _joined(w.split(group_size, dim=0), bits, symmetric, dim=0)


@per_group.misconception(
    "Your groups take weights that lie far apart in a row. Check what reshape does: consecutive "
    "weights stay together only in the last dimension."
)
def every_nth_weight_is_a_group(w, bits=4, group_size=64, symmetric=True):
    w = _checked(w, group_size)
    count = -(-w.shape[1] // group_size)
    columns = [torch.arange(j, w.shape[1], count) for j in range(count)]
    codes, *rest = _joined([w[:, c] for c in columns], bits, symmetric)
    return codes[:, torch.cat(columns).argsort()], *rest


@per_group.misconception(
    "All groups of a row share one scale: that is quantization per channel. Each group should have "
    "its own."
)
def one_scale_for_the_row(w, bits=4, group_size=64, symmetric=True):
    w = _checked(w, group_size)
    codes, scale, zero_point = _joined([w], bits, symmetric)
    count = -(-w.shape[1] // group_size)
    return codes, scale.repeat(1, count), None if symmetric else zero_point.repeat(1, count)


@per_group.misconception(
    "You leave out what remains at the end of a row when group_size does not divide it: those "
    "weights are never quantized. The rest is a group too, a shorter one."
)
def drops_the_ragged_tail(w, bits=4, group_size=64, symmetric=True):
    w = _checked(w, group_size)
    codes, scale, zero_point = _joined(w.split(group_size, dim=-1), bits, symmetric)
    count = w.shape[1] // group_size
    codes[:, count * group_size :] = 0
    return codes, scale[:, :count], None if symmetric else zero_point[:, :count]


@per_group.misconception(
    "You fill up the last group with weights of the group before it, so that its scale is theirs "
    "too. The last group is simply shorter."
)
def last_group_borrows_from_the_one_before(w, bits=4, group_size=64, symmetric=True):
    w = _checked(w, group_size)
    *groups, last = w.split(group_size, dim=-1)
    codes, *rest = _joined([*groups, w[:, -group_size:]], bits, symmetric)
    kept, tail = len(groups) * group_size, last.shape[1]
    return torch.cat([codes[:, :kept], codes[:, -tail:]], dim=-1), *rest


@per_group.misconception(
    "Your scale keeps a dimension of size 1 behind the groups. It should be [out, groups]."
)
def scale_keeps_a_dimension_too_many(w, bits=4, group_size=64, symmetric=True):
    w = _checked(w, group_size)
    codes, scale, zero_point = _joined(w.split(group_size, dim=-1), bits, symmetric)
    return codes, scale[..., None], None if symmetric else zero_point[..., None]


@per_group.accepts("padded with zeros, reshaped to [out, groups, g], cut off again; float64")
def pads_and_reshapes(w, bits=4, group_size=64, symmetric=True):
    rows, columns = _checked(w, group_size).shape
    require_bits(bits)
    # Zeros change neither a largest magnitude nor a range that contains 0.
    padded = torch.nn.functional.pad(w.double(), (0, -columns % group_size))
    groups = padded.reshape(rows, -1, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        largest, span = 2 ** (bits - 1) - 1, torch.maximum(-low, high)
    else:
        largest, span = 2**bits - 1, high - low
    scale = torch.where(span == 0, 1.0, span / largest)
    zero_point = torch.zeros_like(scale) if symmetric else (-low / scale).round()
    codes = (groups / scale[..., None]).round() + zero_point[..., None]
    codes = codes.clamp(-largest if symmetric else 0, largest).reshape(rows, -1)[:, :columns]
    return codes.to(torch.int16), scale, None if symmetric else zero_point.to(torch.int16)


@per_group.accepts("Python loops, one group at a time, in NumPy")
def loops_over_groups(w, bits=4, group_size=64, symmetric=True):
    values = _checked(w, group_size).double().numpy()
    largest = 2 ** (require_bits(bits) - int(symmetric)) - 1
    lowest = -largest if symmetric else 0
    rows, columns = values.shape
    count = math.ceil(columns / group_size)
    codes = np.zeros((rows, columns), dtype=np.int64)
    scale, zero_point = np.ones((rows, count)), np.zeros((rows, count), dtype=np.int64)
    for i in range(rows):
        for j in range(count):
            cut = slice(j * group_size, (j + 1) * group_size)
            low, high = min(values[i, cut].min(), 0), max(values[i, cut].max(), 0)
            scale[i, j] = (max(-low, high) if symmetric else high - low) / largest or 1.0
            zero_point[i, j] = 0 if symmetric else round(-low / scale[i, j])
            stretched = np.rint(values[i, cut] / scale[i, j]) + zero_point[i, j]
            codes[i, cut] = np.clip(stretched, lowest, largest)
    return codes, scale, None if symmetric else zero_point


# --- 6. clip_by_mse ------------------------------------------------------------------------------

clipping = Exercise(
    clip_by_mse,
    paper="Nagel et al. 2021 (arXiv 2106.08295), section 3.1",
    difficulty=2,
    minutes=10,
    equivalent={
        "require_int(steps, 'steps', 1)  ->  "
        "(removed)": "without candidates min() raises ValueError too; only the message is worse",
        "require_int(steps, 'steps', 1)  ->  require_int(steps, 'steps', 0)": (
            "without candidates min() raises ValueError too; only the message is worse"
        ),
        "…steps for k in range(steps, 0, -1)), key=error)  ->  "
        "…steps for k in range(steps, -1, -1)), key=error)": (
            "a threshold of 0 loses everything, so it never wins; zeros have the threshold 0 anyway"
        ),
    },
)


def squared_error(x: Tensor, bits: int, alpha: float) -> float:
    """Mean squared error of symmetric quantization clipped at alpha, in float64."""
    x, step = x.double(), alpha / (2 ** (bits - 1) - 1)
    if step <= 0:
        return float(x.square().mean())
    return float((x - (x.clamp(-alpha, alpha) / step).round() * step).square().mean())


@clipping.check(
    points=2,
    hint="Try every threshold in turn: clip, quantize, come back, and compare all of x with what "
    "came back. Which error is the least?",
    examples=20,
    x=nonzero(
        shapes(1, 2, max_side=7).filter(lambda shape: math.prod(shape) >= 4),
        kinds=("normal", "outlier", "whole", "positive", "sparse", "negative", "tiny", "large"),
    ),
    bits=st.sampled_from((2, 3, 2, 3, 4)),  # clipping pays where bits are few,
    steps=st.sampled_from((4, 5, 8, 3, 10)),  # and the more thresholds there are
)
def no_other_threshold_has_a_smaller_error(candidate, x, bits, steps):
    """Of the thresholds max|x| k / steps, k = 1 ... steps, none gives a smaller mean squared error
    between x and what comes back from quantization."""
    alpha = candidate(x, bits, steps)
    expect(math.isfinite(alpha) and alpha > 0, f"the threshold is {alpha}")
    absmax = float(x.double().abs().max())
    got = squared_error(x, bits, alpha)
    best = min(squared_error(x, bits, absmax * k / steps) for k in range(1, steps + 1))
    expect(
        got <= best * (1 + 1e-4) + 1e-10 * absmax**2,
        f"clipped at {alpha:.6g} the mean squared error is {got:.4g}, and another threshold has "
        f"{best:.4g}",
    )


@clipping.check(
    points=1,
    hint="How many thresholds does the docstring have you try if nothing is said about it?",
    x=[torch.tensor([0.9, 0.8, 0.3, 0.3, 0.8])],
)
def steps_are_a_hundred_unless_said_otherwise(candidate, x):
    """If nothing is said about steps, the thresholds max|x| k / 100 are tried."""
    # Clipped at any other of the hundred, the error is 2% larger at least.
    expect_close(candidate(x, 3), 0.93 * x.abs().max(), "the threshold", 1e-4, reveal=True)


@clipping.check(
    points=2,
    hint="The threshold has the unit of x. What is it if steps is 1?",
    examples=12,
    x=nonzero(shapes(1, 2, max_side=5)),
    bits=st.sampled_from((2, 3, 4, 8)),
    steps=st.sampled_from((4, 1, 2, 3, 5, 10)),
)
def the_threshold_is_one_of_the_candidates(candidate, x, bits, steps):
    """The answer is max|x| times k / steps for a whole k from 1 to steps."""
    alpha = candidate(x, bits, steps)
    k = alpha / float(x.double().abs().max()) * steps
    expect(
        math.isfinite(k) and abs(k - round(k)) < 1e-3 * max(1, k / 100) and 1 <= round(k) <= steps,
        f"the threshold {alpha:.6g} is {k:.6g} / {steps} of the largest magnitude",
    )


@clipping.check(
    points=1,
    hint="In which order do you try the thresholds, and what do you do when two are as good?",
    examples=10,
    unit=st.sampled_from((1.0, 0.5, 4.0, -1.0, -2.0)),
    ones=st.integers(1, 3),
    more=st.integers(0, 2),
)
def of_equally_good_thresholds_the_largest_is_taken(candidate, unit, ones, more):
    """Where two thresholds have the same error, the larger one is the answer: nothing is clipped
    without need."""
    # 2 bits are the codes -1, 0, 1: clipped at 2 the 1s are off by 1, clipped at 1 the 2s are.
    alpha = candidate(torch.tensor([1.0] * ones + [2.0] * (ones + more)) * unit, 2, 2)
    expect_close(alpha, 2 * abs(unit), "the threshold", reveal=True)


@clipping.check(
    points=1,
    hint="What is the largest magnitude of a tensor of zeros?",
    examples=4,
    x=tensors(kinds=("zeros",)),
    bits=st.sampled_from((2, 4, 8)),
    steps=st.integers(1, 5),
)
def zeros_need_no_threshold(candidate, x, bits, steps):
    """A tensor of zeros has the threshold 0."""
    expect_equal(candidate(x, bits, steps), 0.0, "the threshold", reveal=True)


@clipping.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        (torch.ones(3), 4, 0),
        (torch.ones(3), 4, -1),
        (torch.ones(3), 1, 4),
        (torch.ones(3), 9, 4),
        (NAN, 4, 4),
        (INF, 4, 4),
        (torch.zeros(0), 4, 4),
    ],
)
def what_cannot_be_clipped_is_refused(candidate, bad):
    """NaN, infinity, an empty tensor, bits outside 2 to 8 and steps below 1 raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _least(x, bits, steps, error, rising=False):
    """clip_by_mse, with the error left open: error(x, x_hat, alpha)."""
    x = require_finite(x, "x")
    require_int(steps, "steps", 1)
    absmax = x.abs().max().item()
    alphas = [absmax * k / steps for k in range(1, steps + 1)]

    def judged(alpha):
        return error(x, dequantize(*quantize_symmetric(x, bits, clip=alpha)), alpha)

    return min(alphas if rising else reversed(alphas), key=judged)


@clipping.misconception(
    "You always return the largest magnitude: nothing is ever clipped. With few bits a smaller "
    "threshold often has the smaller error."
)
def never_clips(x, bits, steps=100):
    require_bits(bits)
    require_int(steps, "steps", 1)
    return require_finite(x, "x").abs().max().item()


@clipping.misconception(
    "You return the share of the largest magnitude, k / steps. The threshold has the unit of x: "
    "multiply the two."
)
def returns_the_share(x, bits, steps=100):
    alpha = _least(x, bits, steps, lambda x, x_hat, alpha: mse(x, x_hat))
    return alpha / x.abs().max().item() if alpha else 0.0


@clipping.misconception(
    "You minimize the largest error. One outlier then decides alone; the mean of the squares is "
    "asked for."
)
def minimizes_the_largest_error(x, bits, steps=100):
    return _least(x, bits, steps, lambda x, x_hat, alpha: (x - x_hat).abs().max())


@clipping.misconception(
    "You minimize the mean absolute error. It forgives large errors more than their squares do, "
    "and so it clips too much."
)
def minimizes_the_absolute_error(x, bits, steps=100):
    return _least(x, bits, steps, lambda x, x_hat, alpha: (x - x_hat).abs().mean())


@clipping.misconception(
    "Of equally good thresholds you keep the smallest: you try them in rising order and never look "
    "back. Take the largest, which clips least."
)
def takes_the_smallest_of_equals(x, bits, steps=100):
    return _least(x, bits, steps, lambda x, x_hat, alpha: mse(x, x_hat), rising=True)


@clipping.misconception(
    "You do not count the error of the values that are clipped, and so clipping seems to be free. "
    "What lies beyond the threshold pays for the finer step."
)
def looks_only_inside_the_threshold(x, bits, steps=100):
    def error(x, x_hat, alpha):
        return ((x - x_hat).square() * (x.abs() <= alpha)).mean()

    return _least(x, bits, steps, error)


@clipping.accepts("all thresholds at once, in float64 NumPy")
def all_thresholds_at_once(x, bits, steps=100):
    values = x.detach().double().numpy().reshape(1, -1)
    if not values.size or not np.isfinite(values).all() or not 2 <= bits <= 8 or steps < 1:
        raise ValueError("cannot search a threshold")
    absmax = np.abs(values).max()
    if absmax == 0:
        return 0.0
    alphas = absmax * np.arange(steps, 0, -1).reshape(-1, 1) / steps
    scales = alphas / (2 ** (bits - 1) - 1)
    codes = np.rint(np.clip(values, -alphas, alphas) / scales)
    errors = ((values - codes * scales) ** 2).sum(axis=1)
    return alphas[errors.argmin(), 0]


@clipping.accepts("a loop over Python numbers that keeps the best so far, ties away from zero")
def keeps_the_best_so_far(x, bits, steps=100):
    numbers = x.flatten().tolist()
    if not numbers or not all(map(math.isfinite, numbers)) or bits not in range(2, 9) or steps < 1:
        raise ValueError("cannot search a threshold")
    absmax = max(map(abs, numbers))
    best, least = 0.0, math.inf
    for k in range(1, steps + 1):
        alpha = absmax * k / steps
        scale = alpha / (2 ** (bits - 1) - 1)
        total = 0.0
        for v in numbers if scale else []:
            code = math.floor(min(abs(v), alpha) / scale + 0.5)
            total += (abs(v) - code * scale) ** 2
        if total <= least:
            best, least = alpha, total
    return best


# --- 7. matmul_int8 ------------------------------------------------------------------------------

int8_matmul = Exercise(
    matmul_int8,
    paper="Jacob et al. 2018 (arXiv 1712.05877), Dettmers et al. 2022 (arXiv 2208.07339)",
    difficulty=2,
    minutes=10,
)

CODES, ONE_SCALE = torch.ones(2, 3, dtype=torch.int8), torch.tensor(1.0)


@st.composite
def scales(draw: st.DrawFn, rows: int, column: bool) -> Tensor:
    """One scale a row, [rows, 1], or a single one, 0-d: positive, and easy to read."""
    drawn = draw(st.lists(st.integers(1, 40), min_size=rows, max_size=rows))
    return torch.tensor(drawn).reshape(-1, 1) / 20 if column else torch.tensor(drawn[0] / 20)


@st.composite
def products(
    draw: st.DrawFn, x_column: bool | None = None, w_column: bool | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of matmul_int8; a side whose column is None has the scale 1."""
    tokens, out, inside = (draw(st.integers(1, side)) for side in (5, 5, 8))
    x = draw(integer_tensors(-128, 127, (tokens, inside)))
    w = draw(integer_tensors(-128, 127, (out, inside)))
    x_scale = ONE_SCALE if x_column is None else draw(scales(tokens, x_column))
    w_scale = ONE_SCALE if w_column is None else draw(scales(out, w_column))
    return x, x_scale, w, w_scale


def expect_product(got: Tensor, arguments: tuple[Tensor, ...], exact: bool = False) -> None:
    """Fail unless ``got`` is the product; unless ``exact``, each term may be rounded in float32."""
    x, x_scale, w, w_scale = map(as_double, arguments)
    sums, rescale = x @ w.T, x_scale.reshape(-1, 1) * w_scale.reshape(1, -1)
    expect_shape(got, sums.shape, "the product")
    parts = (as_double(got) / rescale).nan_to_num(math.inf, math.inf, -math.inf)
    slack = 1e-5 * sums.abs() + (0 if exact else 1e-6 * (x.abs() @ w.abs().T))
    off = (parts - sums).abs() - slack
    if bool((off > 1e-9).any()):
        t, o = divmod(int(off.argmax()), sums.shape[1])
        raise Mismatch(
            f"token {t}, output {o}: the integers sum to {sums[t, o]:.0f}, and the result is "
            f"{parts[t, o]:.9g} times the two scales"
        )


@int8_matmul.check(
    points=2,
    hint="What is 100 times 100, and does your accumulator have room for it, and for many of them?",
    examples=16,
    arguments=products(),
)
def with_scales_of_1_it_is_the_integer_product(candidate, arguments):
    """With both scales 1 the result is X W^T in whole numbers: [tokens, out], exact."""
    expect_product(candidate(*arguments), arguments, exact=True)


@int8_matmul.check(
    points=2,
    hint="A token is a row of X. Which dimension of the result does it become?",
    examples=20,
    arguments=st.booleans().flatmap(lambda column: products(x_column=column)),
)
def each_token_is_rescaled_by_its_own_scale(candidate, arguments):
    """Row t of the result is multiplied by the scale of token t; a single scale multiplies all."""
    expect_product(candidate(*arguments), arguments)


@int8_matmul.check(
    points=2,
    hint="An output channel is a row of W. Which dimension of the result does it become?",
    examples=16,
    arguments=st.booleans().flatmap(lambda column: products(w_column=column)),
)
def each_output_is_rescaled_by_its_own_scale(candidate, arguments):
    """Column o of the result is multiplied by the scale of output channel o; a single scale
    multiplies all."""
    expect_product(candidate(*arguments), arguments)


@st.composite
def cancelling(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments whose large products cancel, so that a small whole number remains."""
    tokens, out, half = (draw(st.integers(1, side)) for side in (3, 3, 12))
    u = draw(integer_tensors(-127, 127, (tokens, half)))
    v = draw(integer_tensors(-127, 127, (out, half)))
    rest = draw(integer_tensors(1, 3, (tokens, 1)))
    x, w = torch.cat([u, -u, rest], 1), torch.cat([v, v, torch.ones(out, 1).to(torch.int8)], 1)
    x_scale, w_scale = draw(scales(tokens, True)), draw(scales(out, True))
    return x, x_scale / 7, w, w_scale / 3


@int8_matmul.check(
    points=2,
    hint="When do your integers become real numbers: before the sum, or after it?",
    examples=16,
    arguments=cancelling(),
)
def large_products_cancel_without_a_trace(candidate, arguments):
    """The sum over integers is exact: where large products cancel, what remains is a whole number
    times the two scales, and not the rounding errors of the products."""
    expect_product(candidate(*arguments), arguments, exact=True)


@int8_matmul.check(
    points=1,
    hint="X is [tokens, in] and W [out, in], and a scale has one value a row, as a column, or one "
    "in all. Which mistakes would broadcasting hide?",
    bad=[
        (CODES, ONE_SCALE, CODES[:, :1], ONE_SCALE),
        (CODES, torch.ones(2), CODES, ONE_SCALE),
        (CODES, ONE_SCALE, CODES, torch.ones(1, 2)),
        (CODES, ONE_SCALE, CODES, torch.tensor(math.nan)),
    ],
)
def what_does_not_fit_is_refused(candidate, bad):
    """Matrices that disagree on in, scales that are neither 0-d nor one a row, and scales that are
    not finite raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _columns(x_codes, x_scale, w_codes, w_scale):
    """Both scales as columns, after a look at all four arguments."""
    require_int8_matrices(x_codes, w_codes)
    x_scale = require_row_scale(x_scale, x_codes, "x_scale")
    return x_scale, require_row_scale(w_scale, w_codes, "w_scale")


@int8_matmul.misconception(
    "You multiply and add in int8, which ends at 127: the sums wrap around. The products need a "
    "wider type before they are made."
)
def accumulates_in_int8(x_codes, x_scale, w_codes, w_scale):
    x_scale, w_scale = _columns(x_codes, x_scale, w_codes, w_scale)
    return (x_codes @ w_codes.T) * (x_scale * w_scale.T)


@int8_matmul.misconception(
    "You add in float16, which keeps 11 bits of a sum and ends at 65504. Integer sums are exact in "
    "int32."
)
def accumulates_in_float16(x_codes, x_scale, w_codes, w_scale):
    x_scale, w_scale = _columns(x_codes, x_scale, w_codes, w_scale)
    return (x_codes.half() @ w_codes.half().T) * (x_scale * w_scale.T)


@int8_matmul.misconception(
    "You rescale by the scale of the activations only. The weights were divided by theirs, too."
)
def forgets_the_scale_of_the_weights(x_codes, x_scale, w_codes, w_scale):
    x_scale, _ = _columns(x_codes, x_scale, w_codes, w_scale)
    return (x_codes.int() @ w_codes.int().T) * x_scale


@int8_matmul.misconception(
    "You add the two scales. Each product is (s_x q_x)(s_w q_w): the scales multiply."
)
def adds_the_scales(x_codes, x_scale, w_codes, w_scale):
    x_scale, w_scale = _columns(x_codes, x_scale, w_codes, w_scale)
    return (x_codes.int() @ w_codes.int().T) * (x_scale + w_scale.T)


@int8_matmul.misconception(
    "Your token scales lie along the wrong dimension: tokens are the rows of the result, and a "
    "column [tokens, 1] already broadcasts over them as it is."
)
def token_scale_along_the_outputs(x_codes, x_scale, w_codes, w_scale):
    x_scale, w_scale = _columns(x_codes, x_scale, w_codes, w_scale)
    return (x_codes.int() @ w_codes.int().T) * (x_scale.T * w_scale.T)


@int8_matmul.misconception(
    "You leave the weights' scale as the column it is, [out, 1], so it meets the tokens and not "
    "the output channels. Its values belong to the columns of the result."
)
def weight_scale_not_transposed(x_codes, x_scale, w_codes, w_scale):
    x_scale, w_scale = _columns(x_codes, x_scale, w_codes, w_scale)
    return (x_codes.int() @ w_codes.int().T) * x_scale * w_scale


@int8_matmul.misconception(
    "You turn the codes into real numbers before you multiply. That is nearly right, but then "
    "every product is rounded, and none of it runs on integer hardware."
)
def dequantizes_first(x_codes, x_scale, w_codes, w_scale):
    x_scale, w_scale = _columns(x_codes, x_scale, w_codes, w_scale)
    return (x_codes * x_scale) @ (w_codes * w_scale).T


@int8_matmul.accepts("Python integers, one entry of the result at a time")
def sums_python_integers(x_codes, x_scale, w_codes, w_scale):
    x_scale, w_scale = _columns(x_codes, x_scale, w_codes, w_scale)
    y = (x_scale * w_scale.T).expand(len(x_codes), len(w_codes)).clone()
    for t, row in enumerate(x_codes.tolist()):
        for o, column in enumerate(w_codes.tolist()):
            y[t, o] *= sum(a * b for a, b in zip(row, column, strict=True))
    return y


@int8_matmul.accepts("einsum over int64 in NumPy, the scales one after the other")
def numpy_einsum(x_codes, x_scale, w_codes, w_scale):
    x_scale, w_scale = _columns(x_codes, x_scale, w_codes, w_scale)
    sums = np.einsum("ti,oi->to", x_codes.long().numpy(), w_codes.long().numpy())
    return sums * x_scale.double().numpy() * w_scale.double().numpy().T


# --- 8. pack_codes -------------------------------------------------------------------------------

packing = Exercise(
    pack_codes,
    paper="no paper: the bit stream of the library's own files",
    difficulty=3,
    minutes=20,
)

PACKED_BITS = (3, 4, 2, 5, 6, 7, 8)


@st.composite
def code_rows(
    draw: st.DrawFn, signed: bool | None = None, ragged: bool = False
) -> tuple[Tensor, int]:
    """Codes and their bits: one row that fills its bytes or, ragged, any rows that do not."""
    bits = draw(st.sampled_from(PACKED_BITS[:-1] if ragged else PACKED_BITS))
    if signed is None:
        signed = draw(st.booleans())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if ragged:
        odd = [n for n in range(1, 14) if n * bits % 8]
        shape = (*draw(shapes(0, 2, max_side=3)), draw(st.sampled_from(odd)))
    else:
        shape = (draw(st.sampled_from([n for n in range(1, 17) if n * bits % 8 == 0])),)
    kinds = [torch.int8, torch.int64] if signed else [torch.uint8, torch.int64]
    return draw(integer_tensors(low, high, shape, dtype=draw(st.sampled_from(kinds)))), bits


def expect_bytes(got: Tensor, want: Tensor) -> None:
    """Fail with the bits of the first byte that differs."""
    expect_shape(got, want.shape, "the result")
    for i, (a, b) in enumerate(zip(got.flatten().tolist(), want.flatten().tolist(), strict=True)):
        if a != b:
            row, byte = divmod(i, want.shape[-1])
            seen = f"{a:08b}" if isinstance(a, int) and 0 <= a < 256 else a
            place = f"byte {byte}" + (f" of row {row}" if want.dim() > 1 else "")
            raise Mismatch(f"{place} is {seen}, expected {b:08b} (highest bit first)")


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """The right answer, from Python integers of any length."""
    rows = codes.reshape(-1, codes.shape[-1]).tolist()
    size = -(-codes.shape[-1] * bits // 8)
    streams = [sum((c % 2**bits) << (i * bits) for i, c in enumerate(row)) for row in rows]
    octets = [list(stream.to_bytes(size, "little")) for stream in streams]
    return torch.tensor(octets, dtype=torch.uint8).reshape(*codes.shape[:-1], size)


@packing.check(
    points=2,
    hint="Write 1 and 2 as four bits each. Which of the two comes first in the stream, and where "
    "does the first bit of the stream go?",
    examples=12,
    pairs=st.lists(st.tuples(*[st.integers(0, 15)] * 2), min_size=1, max_size=4),
    dtype=st.sampled_from((torch.uint8, torch.int64)),
)
def two_codes_of_4_bits_share_a_byte(candidate, pairs, dtype):
    """With 4 bits, each byte holds two codes: the even one in its lower half, the odd one in its
    upper half."""
    codes = torch.tensor([code for pair in pairs for code in pair], dtype=dtype)
    expect_bytes(candidate(codes, bits=4), torch.tensor([a + 16 * b for a, b in pairs]))


@packing.check(
    points=2,
    hint="Lay out eight codes of 3 bits as one row of 24 bits, and draw a line after every eighth.",
    examples=16,
    drawn=code_rows(signed=False),
)
def a_code_may_cross_from_one_byte_to_the_next(candidate, drawn):
    """Bit k of code i is bit i bits + k of the stream, and bit t of the stream is bit t mod 8 of
    byte t // 8, at any width."""
    expect_bytes(candidate(*drawn), packed_rows(*drawn))


@packing.check(
    points=2,
    hint="How is -1 stored in 8 bits, and which of these bits still belong to it in 3?",
    examples=16,
    drawn=code_rows(signed=True),
)
def negative_codes_are_stored_as_twos_complement(candidate, drawn):
    """A negative code c is stored as c + 2^bits, in bits bits, and never touches its neighbours."""
    expect_bytes(candidate(*drawn), packed_rows(*drawn))


@packing.check(
    points=2,
    hint="A row whose bits do not fill its last byte: what goes there, and where does the next "
    "row begin?",
    examples=24,
    drawn=code_rows(ragged=True),
)
def every_row_starts_on_a_byte(candidate, drawn):
    """Each row is packed by itself into ceil(n bits / 8) bytes, and the bits left over at the end
    of its last byte are 0."""
    expect_bytes(candidate(*drawn), packed_rows(*drawn))


@packing.check(
    points=1,
    hint="How much memory does your result take? Look at its dtype and count.",
    examples=24,
    drawn=code_rows() | code_rows(ragged=True),
)
def the_bytes_are_real_bytes(candidate, drawn):
    """The result is a uint8 tensor of ceil(n bits / 8) bytes for each row of n codes."""
    codes, bits = drawn
    packed = candidate(codes, bits)
    expect(packed.dtype == torch.uint8, f"the result is {packed.dtype}, expected torch.uint8")
    size = math.prod(codes.shape[:-1]) * -(-codes.shape[-1] * bits // 8)
    expect(packed.numel() == size, f"the result takes {packed.numel()} bytes, expected {size}")


@packing.check(
    points=1,
    hint="Which codes fit in so many bits, signed or unsigned? Can one row hold -1 and 15 in 4 "
    "bits?",
    bad=[
        (torch.tensor([1, 16]), 4),
        (torch.tensor([-9, 0]), 4),
        (torch.tensor([-1, 15]), 4),
        (torch.tensor([4, -1]), 3),
        (torch.tensor(3), 4),
        (torch.tensor([1]), 1),
        (torch.tensor([1]), 9),
    ],
)
def codes_that_do_not_fit_are_refused(candidate, bad):
    """Codes that fit neither the signed nor the unsigned range, a 0-d tensor, and bits outside 2 to
    8 raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _stream(codes, bits, highest_first=False):
    """The bits of each row of codes, one code after the other."""
    codes = require_packable(codes, bits).long()
    stream = (codes.unsqueeze(-1) >> torch.arange(bits)) & 1
    return (stream.flip(-1) if highest_first else stream).flatten(-2)


def _octets(stream, highest_first=False):
    """Bytes from the bits of each row, with zeros after the last."""
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    stream = stream.flip(-1) if highest_first else stream
    return (stream << torch.arange(8)).sum(-1).to(torch.uint8)


@packing.misconception(
    "You put the first code into the upper half of a byte. Here the stream starts with the lowest "
    "bit, so the first code comes to lie lowest."
)
def first_code_highest(codes, bits):
    return _octets(_stream(codes, bits, highest_first=True), highest_first=True)


@packing.misconception(
    "The bits of each code are in reverse order: its lowest bit comes first in the stream, not its "
    "highest."
)
def highest_bit_of_a_code_first(codes, bits):
    return _octets(_stream(codes, bits, highest_first=True))


@packing.misconception(
    "The sign of a negative code spills into its neighbours: -1 is all ones, far beyond its own "
    "bits. Keep only the lowest bits of each code before you combine them."
)
def sign_bits_not_masked(codes, bits):
    require_packable(codes, bits)
    size = -(-codes.shape[-1] * bits // 8)
    octets = []
    for row in codes.reshape(-1, codes.shape[-1]).tolist():
        stream = 0
        for i, code in enumerate(row):
            stream |= code << (i * bits)
        octets.append([(stream >> (8 * j)) & 255 for j in range(size)])
    return torch.tensor(octets, dtype=torch.uint8).reshape(*codes.shape[:-1], size)


@packing.misconception(
    "Your zero bits come before the codes of a row. They fill up what is left over at its end."
)
def pads_at_the_front(codes, bits):
    stream = _stream(codes, bits)
    return _octets(torch.nn.functional.pad(stream, (-stream.shape[-1] % 8, 0)))


@packing.misconception(
    "You give a code of 3 bits 4 bits of room, or one of 5 to 7 bits a whole byte, so that no code "
    "crosses a byte. That is quicker to read, but the bits you meant to save are gone."
)
def pads_codes_to_4_or_8_bits(codes, bits):
    codes = require_packable(codes, bits) & (2**bits - 1)
    return _octets(_stream(codes, next(room for room in (2, 4, 8) if room >= bits)))


@packing.misconception(
    "Your rows share bytes: you pack all codes as one long row. A row should be readable on its "
    "own, so it starts on a byte."
)
def rows_share_bytes(codes, bits):
    packed = _octets(_stream(codes, bits).flatten())
    return packed.reshape(*codes.shape[:-1], -1) if codes.shape[-1] * bits % 8 == 0 else packed


@packing.accepts("one Python integer of any length for each row")
def one_long_integer(codes, bits):
    require_packable(codes, bits)
    rows = []
    for row in codes.reshape(-1, codes.shape[-1]).tolist():
        text = "".join(f"{code % 2**bits:0{bits}b}" for code in reversed(row))
        rows.append(list(int(text, 2).to_bytes(-(-len(text) // 8), "little")))
    return torch.tensor(rows, dtype=torch.uint8).reshape(*codes.shape[:-1], -1)


@packing.accepts("NumPy's packbits with little bit order")
def numpy_packbits(codes, bits):
    octets = require_packable(codes, bits).numpy()[..., None]
    stream = np.unpackbits(octets, axis=-1, bitorder="little")[..., :bits]
    stream = stream.reshape(*codes.shape[:-1], -1)
    return np.packbits(stream, axis=-1, bitorder="little")


@packing.accepts("byte by byte, carrying what does not fit")
def carries_from_byte_to_byte(codes, bits):
    require_packable(codes, bits)
    packed = []
    for row in codes.reshape(-1, codes.shape[-1]).tolist():
        pending, held, octets = 0, 0, []
        for code in row:
            pending |= (code & (2**bits - 1)) << held
            held += bits
            while held >= 8:
                octets.append(pending & 255)
                pending >>= 8
                held -= 8
        packed.append(octets + [pending] * (held > 0))
    return torch.tensor(packed, dtype=torch.uint8).reshape(*codes.shape[:-1], -1)
