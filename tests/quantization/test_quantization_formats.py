"""`fewer.quantization.formats` against the bits of torch and ml_dtypes, code by code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.quantization import (
    FORMATS,
    decode_minifloat,
    encode_minifloat,
    how_stored,
    round_to_minifloat,
)

TORCH = {
    "fp16": (torch.float16, torch.int16),
    "bf16": (torch.bfloat16, torch.int16),
    "fp8_e5m2": (torch.float8_e5m2, torch.uint8),
    "fp8_e4m3": (torch.float8_e4m3fn, torch.uint8),
}
ML_DTYPES = {
    "bf16": "bfloat16",
    "fp8_e5m2": "float8_e5m2",
    "fp8_e4m3": "float8_e4m3fn",
    "fp6_e3m2": "float6_e3m2fn",
    "fp6_e2m3": "float6_e2m3fn",
    "fp4_e2m1": "float4_e2m1fn",
}


def width(name: str) -> int:
    return 1 + FORMATS[name].exponent_bits + FORMATS[name].mantissa_bits


def all_codes(name: str) -> torch.Tensor:
    return torch.arange(2 ** width(name))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal values, equal signs of zero, NaN in the same places."""
    numbers = ~theirs.isnan()
    return (
        torch.equal(ours.isnan(), theirs.isnan())
        and torch.equal(ours[numbers], theirs[numbers])
        and torch.equal(ours[numbers].signbit(), theirs[numbers].signbit())
    )


def interesting_numbers(name: str) -> torch.Tensor:
    """Every finite value, every midpoint between two of them, and float64's neighbours of those."""
    values = decode_minifloat(all_codes(name), *FORMATS[name])
    values = values[values.isfinite()].double().unique()
    midpoints = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, midpoints, torch.tensor([-0.0], dtype=torch.float64)])
    up, down = torch.tensor(math.inf).double(), torch.tensor(-math.inf).double()
    return torch.cat([points, points.nextafter(up), points.nextafter(down)])


@pytest.mark.parametrize("name", TORCH)
def test_every_code_means_what_it_means_in_torch(name):
    dtype, integers = TORCH[name]
    codes = all_codes(name)
    theirs = codes.to(integers).view(dtype).float()
    assert same(decode_minifloat(codes, *FORMATS[name]), theirs)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_means_what_it_means_in_ml_dtypes(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = all_codes(name)
    integers = np.uint16 if width(name) == 16 else np.uint8
    theirs = codes.numpy().astype(integers).view(getattr(ml_dtypes, ML_DTYPES[name]))
    ours = decode_minifloat(codes, *FORMATS[name])
    assert same(ours, torch.from_numpy(theirs.astype(np.float32)))


@pytest.mark.parametrize("name", FORMATS)
def test_encode_inverts_decode_for_every_code_that_is_a_number(name):
    codes = all_codes(name)
    values = decode_minifloat(codes, *FORMATS[name])
    numbers = ~values.isnan()
    assert torch.equal(encode_minifloat(values[numbers], *FORMATS[name]), codes[numbers])


@pytest.mark.parametrize("name", FORMATS)
def test_every_tie_goes_to_the_even_code(name):
    codes = all_codes(name)[: 2 ** (width(name) - 1)]
    values = decode_minifloat(codes, *FORMATS[name]).double()
    last = int(values.isfinite().sum()) - 1
    midpoints = (values[:last] + values[1 : last + 1]) / 2
    even = codes[:last] + codes[:last] % 2
    assert torch.equal(encode_minifloat(midpoints, *FORMATS[name]), even)
    assert torch.equal(encode_minifloat(-midpoints, *FORMATS[name]), even + 2 ** (width(name) - 1))


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e5m2", "fp8_e4m3"])
def test_rounding_equals_the_cast_of_torch(name):
    x = interesting_numbers(name).float()  # torch casts float64 to fp8 through float32
    if name in ("fp16", "bf16"):  # their finest midpoints need the neighbours in float64
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator)
        x = torch.cat([x, bits.to(torch.int32).view(torch.float32)])
        x = x[~x.isnan()]
    theirs = x.to(TORCH[name][0]).float()
    ours = round_to_minifloat(x, *FORMATS[name])
    if name == "fp8_e4m3":  # torch: NaN beyond the range; ours saturates, as documented
        inside = x.abs() <= 464  # the tie between 448 and 480, which goes to 448, the even code
        assert (ours[~inside].abs() == 448).all()
        assert theirs[~inside].isnan().all()
        ours, theirs = ours[inside], theirs[inside]
    assert same(ours, theirs)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_rounding_equals_the_cast_of_ml_dtypes(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = torch.cat([interesting_numbers(name), torch.tensor([1e9, -1e9, 1e-30]).double()]).float()
    theirs = torch.from_numpy(
        x.numpy().astype(getattr(ml_dtypes, ML_DTYPES[name])).astype(np.float32)
    )
    ours = round_to_minifloat(x, *FORMATS[name])
    if name == "fp8_e4m3":
        beyond = theirs.isnan()
        assert (ours[beyond].abs() == 448).all()
        ours, theirs = ours[~beyond], theirs[~beyond]
    assert same(ours, theirs)


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(FORMATS)), st.floats(-50, 12))
def test_no_other_number_of_the_format_is_nearer(seed, name, exponent):
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)).double() * 2.0**exponent
    values = decode_minifloat(all_codes(name), *FORMATS[name])
    values = values[values.isfinite()].double()
    if name in ("fp16", "bf16"):
        values = values[torch.randperm(values.numel())[:500]]
    x = x.clamp(-4, 4)  # within the range of every format
    error = (round_to_minifloat(x, *FORMATS[name]).double() - x).abs()
    assert (error <= (values[:, None] - x).abs().amin(0)).all()


@given(st.floats(width=32, allow_nan=False))
def test_fp32_itself_is_a_minifloat(value):
    x = torch.tensor(value, dtype=torch.float64)
    code = encode_minifloat(x, 8, 23)
    bits = np.float32(value).view(np.uint32).item()
    assert code.item() == bits
    assert same(decode_minifloat(code, 8, 23), x.float())


@given(st.integers(1, 7), st.integers(1, 8), st.sampled_from(["ieee", "fn", "none"]))
def test_positive_codes_are_sorted_in_any_format(exponent_bits, mantissa_bits, specials):
    codes = torch.arange(2 ** (exponent_bits + mantissa_bits))
    values = decode_minifloat(codes, exponent_bits, mantissa_bits, specials)
    assert (values[~values.isnan()].diff() > 0).all()
    nans = {"ieee": 2**mantissa_bits - 1, "fn": 1, "none": 0}[specials]
    assert int(values.isnan().sum()) == nans
    assert int(values.isinf().sum()) == (specials == "ieee")
    back = encode_minifloat(values[~values.isnan()], exponent_bits, mantissa_bits, specials)
    assert torch.equal(back, codes[~values.isnan()])


def test_one_exponent_bit_gives_a_uniform_grid():
    values = decode_minifloat(torch.arange(8), 1, 2, "none")
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]


def test_overflow_becomes_infinity_or_saturates():
    x = torch.tensor([65519.0, 65520.0, -math.inf, 1e300], dtype=torch.float64)
    assert round_to_minifloat(x, *FORMATS["fp16"]).tolist() == [
        65504,
        math.inf,
        -math.inf,
        math.inf,
    ]
    assert round_to_minifloat(x, *FORMATS["fp8_e4m3"]).tolist() == [448, 448, -448, 448]
    assert round_to_minifloat(x, *FORMATS["fp4_e2m1"]).tolist() == [6, 6, -6, 6]


def test_nan_keeps_its_sign_and_is_quiet():
    x = torch.tensor([math.nan, -math.nan]).copysign(torch.tensor([1.0, -1.0]))
    assert encode_minifloat(x, *FORMATS["fp16"]).tolist() == [0x7E00, 0xFE00]
    assert encode_minifloat(x, *FORMATS["fp8_e5m2"]).tolist() == [0x7E, 0xFE]
    assert encode_minifloat(x, *FORMATS["fp8_e4m3"]).tolist() == [0x7F, 0xFF]
    with pytest.raises(ValueError, match="x must not hold NaN where specials is 'none'"):
        encode_minifloat(x, *FORMATS["fp4_e2m1"])


def test_shapes_views_and_emptiness_are_kept():
    codes = torch.arange(6, dtype=torch.uint8).reshape(2, 3).T
    assert decode_minifloat(codes, 2, 1, "none").shape == (3, 2)
    assert decode_minifloat(codes, 2, 1, "none")[2, 1] == 3  # code 5 = 0b0_10_1
    assert decode_minifloat(torch.tensor(2), 2, 1, "none") == 1.0
    assert decode_minifloat(torch.zeros(0, 4, dtype=torch.int64), 4, 3, "fn").shape == (0, 4)
    assert encode_minifloat(torch.zeros(0, 4), 4, 3, "fn").shape == (0, 4)


@pytest.mark.parametrize(
    ("codes", "exponent_bits", "mantissa_bits", "specials", "error", "message"),
    [
        (torch.tensor([16]), 2, 1, "none", ValueError, "codes must lie between 0 and 15, got 16"),
        (torch.tensor([-1]), 5, 10, "ieee", ValueError, "codes must lie between 0 and 65535"),
        (torch.tensor([1.0]), 5, 10, "ieee", TypeError, "codes must be an integer tensor"),
        (torch.tensor([1]), 9, 10, "ieee", ValueError, "exponent_bits must be between 1 and 8"),
        (torch.tensor([1]), 8, 10, "fn", ValueError, "exponent_bits must be between 1 and 7"),
        (torch.tensor([1]), 5, 0, "ieee", ValueError, "mantissa_bits must be between 1 and 23"),
        (torch.tensor([1]), 5, 2, "e4m3", ValueError, "specials must be"),
    ],
)
def test_bad_codes_and_formats_are_refused(
    codes, exponent_bits, mantissa_bits, specials, error, message
):
    with pytest.raises(error, match=message):
        decode_minifloat(codes, exponent_bits, mantissa_bits, specials)


def test_encode_refuses_integers():
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        encode_minifloat(torch.tensor([1]), 5, 10)


def test_how_stored_agrees_with_the_bits_of_torch():
    for value in (math.pi, -0.1, 6e-8):
        row = next(line for line in how_stored(value).splitlines() if line.startswith("fp16"))
        bits = int(torch.tensor(value, dtype=torch.float16).view(torch.int16)) & 0xFFFF
        assert "".join(row.split()[1:4]) == f"{bits:016b}"
    with pytest.raises(ValueError, match="value must be finite"):
        how_stored(math.nan)
