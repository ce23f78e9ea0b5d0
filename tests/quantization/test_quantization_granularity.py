"""Properties of quantization per group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.quantization import (
    dequantize_per_group,
    mse,
    quantize_asymmetric,
    quantize_per_group,
    quantize_symmetric,
)


@st.composite
def matrices(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    w = torch.randn(columns, rows, generator=generator) + draw(st.sampled_from([0.0, 2.0]))
    if draw(st.booleans()):
        w[: columns // 2] = draw(st.sampled_from([0.0, -1.5]))
    return w.T.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))


GROUPS = st.integers(1, 24)
BITS = st.integers(2, 8)


@given(matrices(), BITS, GROUPS, st.booleans())
def test_a_group_is_quantized_as_if_it_were_alone(w, bits, group_size, symmetric):
    codes, scale, zero_point = quantize_per_group(w, bits, group_size, symmetric)
    starts = range(0, w.shape[1], group_size)
    assert scale.shape == (w.shape[0], len(starts))
    assert (zero_point is None) == symmetric
    for i in range(w.shape[0]):
        for j, start in enumerate(starts):
            group = slice(start, start + group_size)
            alone = (quantize_symmetric if symmetric else quantize_asymmetric)(w[i, group], bits)
            assert torch.equal(codes[i, group], alone[0])
            assert scale[i, j] == alone[1]
            if not symmetric:
                assert zero_point[i, j] == alone[2]


@given(matrices(), BITS, GROUPS, st.booleans())
def test_error_is_at_most_half_the_step_of_its_group(w, bits, group_size, symmetric):
    codes, scale, zero_point = quantize_per_group(w, bits, group_size, symmetric)
    restored = dequantize_per_group(codes, scale, zero_point, group_size)
    assert restored.dtype == scale.dtype
    for start in range(0, w.shape[1], group_size):
        step = scale[:, [start // group_size]].double()
        group = slice(start, start + group_size)
        error = (restored[:, group].double() - w[:, group].double()).abs()
        assert (error <= step / 2 + 1e-5).all()


@given(matrices(), BITS, st.integers(20, 40))
def test_one_group_is_a_channel(w, bits, group_size):
    codes, scale, _ = quantize_per_group(w, bits, group_size)
    expected = quantize_symmetric(w, bits, dim=-1)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


@given(matrices(), BITS)
def test_a_group_of_one_is_almost_exact(w, bits):
    codes, scale, _ = quantize_per_group(w, bits, 1)
    restored = dequantize_per_group(codes, scale, group_size=1)
    torch.testing.assert_close(restored, w.to(restored.dtype), rtol=1e-6, atol=0)


def test_an_outlier_spoils_only_its_own_group():
    w = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    spoiled = w.clone()
    spoiled[0, 20] = 100.0
    before = dequantize_per_group(*quantize_per_group(w, 4, 16), 16)
    after = dequantize_per_group(*quantize_per_group(spoiled, 4, 16), 16)
    changed = (before != after).any(0).nonzero().flatten()
    assert changed.min() >= 16
    assert changed.max() < 32


def test_smaller_groups_lose_less():
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        mse(w, dequantize_per_group(*quantize_per_group(w, 4, g), g)) for g in (256, 64, 16, 4)
    ]
    assert errors == sorted(errors, reverse=True)


def test_codes_and_scales_equal_those_of_torchao():
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    codes, scale, zero_point = quantize_per_group(w, 4, 16, symmetric=False)
    their_scale, their_zero = primitives.choose_qparams_affine(
        w, primitives.MappingType.ASYMMETRIC, (1, 16), torch.uint8, 0, 15, eps=1e-12
    )
    torch.testing.assert_close(their_scale, scale, rtol=1e-6, atol=0)
    assert torch.equal(their_zero.int(), zero_point)
    theirs = primitives.quantize_affine(w, (1, 16), their_scale, their_zero, torch.uint8, 0, 15)
    assert torch.equal(theirs, codes)
    restored = primitives.dequantize_affine(
        theirs, (1, 16), their_scale, their_zero, torch.uint8, 0, 15
    )
    torch.testing.assert_close(dequantize_per_group(codes, scale, zero_point, 16), restored)


@pytest.mark.parametrize(
    ("w", "group_size", "error", "message"),
    [
        (torch.ones(4), 2, ValueError, "w must have two dimensions, got shape \\(4,\\)"),
        (torch.ones(0, 4), 2, ValueError, "w must have at least one element"),
        (torch.full((1, 4), float("nan")), 2, ValueError, "w must be finite, got 4 NaN"),
        (torch.ones(2, 4, dtype=torch.int8), 2, TypeError, "w must be a floating-point tensor"),
        (torch.ones(2, 4), 0, ValueError, "group_size must be at least 1, got 0"),
        (torch.ones(2, 4), 2.0, TypeError, "group_size must be an int, got 2.0"),
    ],
)
def test_bad_input_is_refused_by_name(w, group_size, error, message):
    with pytest.raises(error, match=message):
        quantize_per_group(w, 4, group_size)


def test_the_wrong_group_size_is_noticed():
    codes, scale, _ = quantize_per_group(torch.ones(2, 64), 4, 16)
    with pytest.raises(ValueError, match="scale must have shape \\(2, 2\\) for groups of 32"):
        dequantize_per_group(codes, scale, group_size=32)
