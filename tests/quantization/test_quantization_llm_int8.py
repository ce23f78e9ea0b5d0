"""Properties of the int8 product that keeps outlier features."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.quantization.activations import matmul_int8
from fewer.quantization.llm_int8 import matmul_llm_int8, outlier_features
from fewer.quantization.uniform import quantize_symmetric

SEEDS = st.integers(0, 2**32 - 1)


def with_outliers(seed, tokens=5, features=32, out=7, columns=(3, 20)):
    """Values below 6, but for one far value, of either sign, in each of some columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator).clamp(-5, 5)
    for i, column in enumerate(columns):
        x[i % tokens, column] = 80.0 * (-1) ** i
    return x, torch.randn(out, features, generator=generator)


@given(SEEDS, st.floats(0, 4))
def test_an_outlier_feature_has_one_value_at_least_as_large_as_the_threshold(seed, threshold):
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(seed))
    expected = [any(abs(v) >= threshold for v in x[:, :, j].flatten().tolist()) for j in range(9)]
    assert outlier_features(x, threshold).tolist() == expected


def test_the_threshold_itself_is_an_outlier_and_so_is_its_opposite():
    x = torch.tensor([[6.0, 0.0, 5.999, 0.0], [0.0, -6.0, 0.0, 0.0]])
    assert outlier_features(x).tolist() == [True, True, False, False]
    assert outlier_features(x, 0).all()
    assert not outlier_features(x, math.inf).any()


@given(SEEDS)
def test_without_outliers_it_is_the_int8_product(seed):
    x, w = with_outliers(seed, columns=())
    y, kept = matmul_llm_int8(x, w)
    assert kept == 0
    plain = matmul_int8(*quantize_symmetric(x, dim=-1), *quantize_symmetric(w, dim=-1))
    assert torch.equal(y, plain)


@given(SEEDS)
def test_with_threshold_zero_nothing_is_quantized(seed):
    x, w = with_outliers(seed)
    y, kept = matmul_llm_int8(x, w, threshold=0.0)
    assert kept == 1
    torch.testing.assert_close(y, x @ w.T)


@given(SEEDS)
def test_the_outlier_features_add_their_exact_product_to_that_of_the_others(seed):
    x, w = with_outliers(seed)
    y, kept = matmul_llm_int8(x, w)
    assert kept == 2 / 32
    rest = [j for j in range(32) if j not in (3, 20)]
    others, none = matmul_llm_int8(x[:, rest], w[:, rest])
    assert none == 0
    exact = x[:, [3, 20]].double() @ w[:, [3, 20]].double().T
    torch.testing.assert_close((y - others).double(), exact, rtol=1e-5, atol=1e-4)


@given(SEEDS, st.floats(10, 1e4))
def test_how_far_out_an_outlier_is_does_not_matter_to_the_error(seed, factor):
    x, w = with_outliers(seed)
    x, w = x.double(), w.double()
    further = x.clone()
    further[:, [3, 20]] *= factor
    error = matmul_llm_int8(x, w)[0] - x @ w.T
    error_further = matmul_llm_int8(further, w)[0] - further @ w.T
    # A scale taken over all features would grow with the outlier, and the error with it.
    torch.testing.assert_close(error, error_further, rtol=1e-6, atol=1e-8)
    assert error.norm() / (x @ w.T).norm() < 0.01


@given(SEEDS)
def test_outlier_columns_of_the_weight_have_no_say_in_its_scales(seed):
    x, w = with_outliers(seed)
    w[:, 3] *= 1000
    error = matmul_llm_int8(x.double(), w.double())[0] - x.double() @ w.double().T
    assert error.norm() < 0.1 * w.shape[0]


def test_leading_dimensions_are_tokens_and_dtypes_follow_the_wider_argument():
    x, w = with_outliers(0, tokens=6)
    y, kept = matmul_llm_int8(x, w)
    batched, also = matmul_llm_int8(x.reshape(2, 3, 32), w)
    assert torch.equal(batched, y.reshape(2, 3, 7))
    assert kept == also
    assert matmul_llm_int8(x.half(), w.half())[0].dtype == torch.float32
    assert matmul_llm_int8(x.double(), w)[0].dtype == torch.float64
    assert matmul_llm_int8(x, w.double())[0].dtype == torch.float64


def test_arguments_are_not_modified():
    x, w = with_outliers(0)
    before = x.clone(), w.clone()
    matmul_llm_int8(x, w)
    assert torch.equal(x, before[0])
    assert torch.equal(w, before[1])


def test_what_does_not_fit_is_refused_by_name():
    x, w = with_outliers(0)
    with pytest.raises(ValueError, match="must agree on in, got 32 and 7"):
        matmul_llm_int8(x, w.T)
    for threshold in (-1.0, math.nan):
        with pytest.raises(ValueError, match="threshold must be 0 or more, got"):
            matmul_llm_int8(x, w, threshold)
    with pytest.raises(ValueError, match="x must be finite"):
        outlier_features(x / 0)
    with pytest.raises(ValueError, match="x must have at least one dimension"):
        outlier_features(torch.tensor(1.0))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        outlier_features(torch.ones(2, 3, dtype=torch.int64))


def test_bitsandbytes_gives_the_same_codes_and_outlier_features():
    functional = pytest.importorskip("bitsandbytes.functional")
    x, _ = with_outliers(0, tokens=16)
    codes, absmax, outliers = functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    kept = outlier_features(x.half())
    assert outliers.tolist() == kept.nonzero().flatten().tolist()
    ours, scale = quantize_symmetric(x.half()[:, ~kept], dim=-1)
    torch.testing.assert_close(absmax / 127, scale.flatten(), rtol=1e-3, atol=0)
    assert (codes[:, ~kept].int() - ours.int()).abs().max() <= 1  # theirs rounds in float16
