"""Properties of calibration and of the int8 matmul."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.quantization import (
    calibrate_absmax,
    dequantize,
    linear_w8a8,
    matmul_int8,
    quantize_symmetric,
)

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 9)


def int8(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


@given(SEEDS, SIZES, st.integers(1, 400), SIZES, st.booleans(), st.booleans())
def test_matmul_equals_the_sum_in_int64(seed, tokens, inner, out, per_token, per_channel):
    generator = torch.Generator().manual_seed(seed)
    x, w = int8(generator, inner, tokens).T, int8(generator, out, inner)
    x_scale = torch.rand((tokens, 1) if per_token else (), generator=generator) + 0.01
    w_scale = torch.rand((out, 1) if per_channel else (), generator=generator) + 0.01
    y = matmul_int8(x, x_scale, w, w_scale)
    assert y.shape == (tokens, out)
    assert y.dtype == torch.float32
    exact = x.long() @ w.long().T
    expected = exact * x_scale.double().reshape(-1, 1) * w_scale.double().reshape(1, -1)
    torch.testing.assert_close(y.double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("inner", [1025, 8192, 2**17 - 1])
@pytest.mark.parametrize("value", [-128, 127])
def test_long_sums_stay_exact(inner, value):
    x = torch.full((1, inner), value, dtype=torch.int8)
    one = torch.tensor(1.0, dtype=torch.float64)
    assert matmul_int8(x, one, x, one).item() == inner * value**2
    # Above 2^24 float32 cannot tell neighbouring integers apart: only an exact sum ends in 1.
    w = x.clone()
    w[0, 0] = 1
    assert matmul_int8(x, one, w, one).item() == (inner - 1) * value**2 + value


def test_scales_that_are_powers_of_two_leave_nothing_to_round():
    generator = torch.Generator().manual_seed(0)
    x, w = int8(generator, 4, 300), int8(generator, 5, 300)
    x_scale = torch.tensor([[0.5], [2.0], [0.125], [1.0]])
    y = matmul_int8(x, x_scale, w, torch.tensor(4.0))
    assert torch.equal(y.double(), (x.long() @ w.long().T) * x_scale.double() * 4)


@given(SEEDS)
def test_matmul_equals_the_matmul_of_the_dequantized_matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(5, 32, generator=generator), torch.randn(7, 32, generator=generator)
    x_parts, w_parts = quantize_symmetric(x, dim=-1), quantize_symmetric(w, dim=-1)
    expected = dequantize(*x_parts).double() @ dequantize(*w_parts).double().T
    torch.testing.assert_close(
        matmul_int8(*x_parts, *w_parts).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_int_mm_of_torch_gives_the_same_sums():
    generator = torch.Generator().manual_seed(0)
    x, w = int8(generator, 32, 64), int8(generator, 16, 64)
    one = torch.tensor(1.0)
    theirs = torch._int_mm(x, w.T.contiguous())
    assert torch.equal(matmul_int8(x, one, w, one), theirs.float())


def test_bad_matrices_and_scales_are_refused_by_name():
    x, w, one = torch.ones(2, 3).to(torch.int8), torch.ones(4, 3).to(torch.int8), torch.tensor(1.0)
    with pytest.raises(TypeError, match=r"x_codes must be an int8 tensor, got torch\.uint8"):
        matmul_int8(x.to(torch.uint8), one, w, one)
    with pytest.raises(TypeError, match=r"w_codes must be an int8 tensor, got torch\.float32"):
        matmul_int8(x, one, w.float(), one)
    with pytest.raises(ValueError, match="must agree on in, got 3 and 4"):
        matmul_int8(x, one, w.T, one)
    with pytest.raises(ValueError, match="x_codes must be a matrix"):
        matmul_int8(x[0], one, w, one)
    with pytest.raises(
        ValueError, match="w_scale must be 0-d or of shape \\(4, 1\\), got \\(1, 4\\)"
    ):
        matmul_int8(x, one, w, torch.ones(1, 4))
    with pytest.raises(
        ValueError, match="x_scale must be 0-d or of shape \\(2, 1\\), got \\(2,\\)"
    ):
        matmul_int8(x, torch.ones(2), w, one)
    with pytest.raises(TypeError, match="x_scale must be a floating-point tensor"):
        matmul_int8(x, torch.tensor(1), w, one)
    with pytest.raises(ValueError, match="w_scale must be finite"):
        matmul_int8(x, one, w, one / 0)
    long = torch.zeros(1, 2**17, dtype=torch.int8)
    with pytest.raises(ValueError, match="in must be between 1 and 131071, got 131072"):
        matmul_int8(long, one, long, one)


@given(SEEDS, st.sampled_from([torch.float32, torch.float16]))
def test_dynamic_linear_is_near_the_real_one_for_any_leading_shape(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 64, generator=generator).to(dtype)
    w = torch.randn(8, 64, generator=generator)
    y = linear_w8a8(x, *quantize_symmetric(w, dim=-1))
    exact = x.float() @ w.T
    assert y.shape == (2, 3, 8)
    assert (y - exact).norm() / exact.norm() < 0.03
    assert torch.equal(y[1, 2], linear_w8a8(x[1, 2], *quantize_symmetric(w, dim=-1)))


def test_dynamic_tokens_do_not_disturb_each_other_and_static_ones_saturate():
    w_codes, w_scale = quantize_symmetric(torch.eye(2), dim=-1)
    x = torch.tensor([[1.0, 0.5], [1000.0, 0.0]])
    dynamic = linear_w8a8(x, w_codes, w_scale)
    torch.testing.assert_close(dynamic, x, rtol=0, atol=0.005)
    static = linear_w8a8(x, w_codes, w_scale, x_scale=torch.tensor(2.0 / 127))
    torch.testing.assert_close(static, x.clamp(max=2), rtol=0, atol=0.01)


@given(SEEDS, st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 1000))
def test_percentile_is_the_nearest_rank_over_all_batches(seed, sizes, tenths):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(size, generator=generator) for size in sizes]
    values = sorted(abs(v) for batch in batches for v in batch.tolist())
    alpha = calibrate_absmax(iter(batches), tenths / 10)
    rank = -(-tenths * len(values) // 1000)
    assert alpha == values[rank - 1]
    assert calibrate_absmax(batches) == values[-1]


def test_percentile_is_not_thrown_off_by_the_last_bit_of_a_float():
    # 99.9 / 100 * 1000 is 999.0000000000001 in floating point; the 999th value is meant.
    assert calibrate_absmax([torch.arange(1.0, 1001.0)], percentile=99.9) == 999


def test_calibration_refuses_nothing_and_nan():
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        calibrate_absmax([])
    with pytest.raises(ValueError, match="batch must be finite"):
        calibrate_absmax([torch.ones(2), torch.tensor([float("nan")])])
    for percentile in (0, -1, 100.5, float("nan")):
        with pytest.raises(ValueError, match="percentile must be above 0 and at most 100"):
            calibrate_absmax([torch.ones(2)], percentile)
