"""Properties of the error measures."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.quantization import dequantize, mse, quantize_symmetric, relative_output_error, sqnr

SEEDS = st.integers(0, 2**32 - 1)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_bit_is_worth_six_decibels():
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    measured = [sqnr(x, dequantize(*quantize_symmetric(x, bits))) for bits in range(2, 9)]
    for bits, value in zip(range(2, 9), measured, strict=True):
        # Uniform x in [-1, 1] has power 1/3; the step is 1/Q, the noise step^2 / 12.
        largest = 2 ** (bits - 1) - 1
        assert value == pytest.approx(20 * math.log10(2 * largest), abs=0.05)
    assert measured[-1] - measured[-2] == pytest.approx(6.02, abs=0.1)


@given(SEEDS, st.floats(-60, 60))
def test_sqnr_is_the_ratio_that_was_put_in(seed, decibels):
    x = randn(seed, 3, 4).double()
    noise = randn(seed + 1, 3, 4).double()
    noise *= x.norm() / noise.norm() * 10 ** (-decibels / 20)
    assert sqnr(x, x + noise) == pytest.approx(decibels, abs=1e-6)
    assert sqnr(1000 * x, 1000 * (x + noise)) == pytest.approx(decibels, abs=1e-6)


def test_sqnr_of_small_half_precision_numbers_does_not_underflow():
    x = torch.full((4,), 1e-5, dtype=torch.float16)
    assert sqnr(x, x * 0.9) == pytest.approx(20, abs=0.2)


def test_sqnr_weighs_all_elements_together():
    x = torch.tensor([[1.0, 1.0], [100.0, 100.0]])
    assert sqnr(x, x + 1) == pytest.approx(10 * math.log10(20002 / 4))


def test_sqnr_without_noise_or_signal():
    x, zeros = torch.tensor([1.0, -2.0]), torch.zeros(2)
    assert sqnr(x, x) == math.inf
    assert sqnr(zeros, zeros) == math.inf
    assert sqnr(zeros, x) == -math.inf
    assert sqnr(x, zeros) == 0
    assert isinstance(sqnr(x, x + 0.1), float)


@given(SEEDS)
def test_mse_is_a_mean_and_symmetric(seed):
    x, y = randn(seed, 5, 2).half(), randn(seed + 1, 2, 5).T
    assert mse(x, y) == pytest.approx(((x.double() - y.double()) ** 2).mean().item())
    assert mse(x, y) == pytest.approx(mse(y, x))
    assert mse(x, x) == 0


@given(SEEDS)
def test_output_error_is_the_weight_error_where_the_input_is_white(seed):
    w, w_hat = randn(seed, 4, 6), randn(seed + 1, 4, 6)
    x = torch.linalg.qr(randn(seed + 2, 6, 6).double()).Q
    expected = ((w - w_hat).double().norm() / w.double().norm()).item()
    assert relative_output_error(w, w_hat, x) == pytest.approx(expected)
    assert relative_output_error(3 * w, 3 * w_hat, 5 * x) == pytest.approx(expected, rel=1e-5)


def test_output_error_sees_only_the_inputs_that_occur():
    w, w_hat = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    assert relative_output_error(w, w_hat, torch.tensor([[1.0, 0.0]])) == 0
    assert relative_output_error(w, w_hat, torch.tensor([[0.0, 1.0]])) == 1
    assert relative_output_error(w, w_hat, torch.zeros(1, 2)) == 0
    assert relative_output_error(torch.zeros(1, 2), w_hat, torch.ones(1, 2)) == math.inf


def test_bad_input_is_refused_by_name():
    x, integers = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int32)
    for measure in (mse, sqnr):
        with pytest.raises(ValueError, match="x and x_hat must have the same shape"):
            measure(x, x[:1])  # would broadcast
        with pytest.raises(ValueError, match="x_hat must be finite"):
            measure(x, x / 0)
        with pytest.raises(ValueError, match="x must have at least one element"):
            measure(x[:0], x[:0])
        with pytest.raises(TypeError, match="x_hat must be a floating-point tensor"):
            measure(x, integers)
    with pytest.raises(ValueError, match="must agree on in, got 2 and 3"):
        relative_output_error(x, x, torch.ones(4, 2))
    with pytest.raises(ValueError, match="w and w_hat must have the same shape"):
        relative_output_error(x, x[:1], x)
    with pytest.raises(ValueError, match="x must have two dimensions"):
        relative_output_error(x, x, x[0])
