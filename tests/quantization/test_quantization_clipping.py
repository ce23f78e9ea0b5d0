"""Properties of the two searches for a clipping threshold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.quantization import (
    clip_by_entropy,
    clip_by_mse,
    dequantize,
    mse,
    quantize_symmetric,
)

SEEDS = st.integers(0, 2**32 - 1)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x: torch.Tensor, bits: int, alpha: float) -> float:
    return mse(x, dequantize(*quantize_symmetric(x, bits, clip=alpha)))


@given(SEEDS, st.integers(2, 8), st.integers(1, 30), st.sampled_from(["half", "float", "double"]))
def test_no_candidate_has_a_smaller_error(seed, bits, steps, dtype):
    x = getattr(randn(seed, 5, 7).T, dtype)()
    alpha = clip_by_mse(x, bits, steps)
    candidates = [x.abs().max().item() * k / steps for k in range(1, steps + 1)]
    errors = [error(x, bits, candidate) for candidate in candidates]
    assert alpha in candidates
    assert error(x, bits, alpha) == min(errors)
    assert errors[-1] >= min(errors)


def test_of_equally_good_thresholds_the_largest_is_taken():
    # Two bits store {-alpha, 0, alpha}. At 4 each 1.5 becomes 0 and costs 2.25; at 2 it costs 0.25
    # and the 4 costs 4: with two of them both thresholds cost 4.5.
    assert clip_by_mse(torch.tensor([1.5, -1.5, 4.0]), 2, steps=2) == 4.0
    assert clip_by_mse(torch.tensor([1.5, -1.5, 1.5, 4.0]), 2, steps=2) == 2.0


@given(SEEDS)
def test_one_step_means_no_clipping(seed):
    x = randn(seed, 20)
    assert clip_by_mse(x, 4, steps=1) == x.abs().max().item()


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([0.25, 2.0, 1024.0]))
def test_both_thresholds_scale_with_the_data_and_ignore_its_sign(seed, factor):
    x = randn(seed, 300)
    for clip in (lambda x: clip_by_mse(x, 3, 20), lambda x: clip_by_entropy(x, 4, 64)):
        assert clip(factor * x) == pytest.approx(factor * clip(x))
        assert clip(-x) == clip(x)


def test_fewer_bits_clip_more():
    x = randn(0, 20_000)
    by_mse = [clip_by_mse(x, bits) for bits in (2, 3, 4, 6, 8)]
    assert by_mse == sorted(by_mse)
    # The best uniform quantizer of a normal variable, in units of its standard deviation
    # (Banner et al. 2019, arXiv 1810.05723: 1.71, 2.15, 2.55 for 2, 3, 4 bits with all 2^b codes).
    assert by_mse[2] == pytest.approx(2.55, abs=0.15)


@settings(max_examples=10)
@given(SEEDS, st.sampled_from([20.0, 100.0, -1000.0]))
def test_entropy_ignores_an_outlier(seed, outlier):
    x = randn(seed, 20_000)
    x[7] = outlier
    assert clip_by_entropy(x) <= max(8, abs(outlier) * 128 / 2048)


def test_entropy_keeps_everything_where_nothing_is_gained():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert clip_by_entropy(x) >= 0.95
    # Codes that are levels already: 128 values, one to a level, nothing to lose.
    x = torch.arange(1, 129).repeat(50).float()
    assert clip_by_entropy(x, bits=8, bins=128) == 128


def test_entropy_keeps_a_second_mode():
    x = torch.cat([randn(0, 9000), randn(1, 1000) + 100])
    assert clip_by_entropy(x) > 95


def test_entropy_does_not_count_exact_zeros():
    x = randn(0, 5000).relu()
    assert clip_by_entropy(torch.cat([x, torch.zeros(100_000)])) == clip_by_entropy(x)


def reference_divergences(histogram: list[float], levels: int) -> dict[int, float]:
    """KL(P || Q) for each number of kept bins, in plain loops, straight from the slides."""
    divergences = {}
    for i in range(levels, len(histogram) + 1):
        p = list(histogram[:i])
        p[-1] += sum(histogram[i:])
        q = [0.0] * i
        kept = sum(histogram[:i])
        for level in range(levels):
            members = [j for j in range(i) if j * levels // i == level]
            used = [j for j in members if p[j] > 0]
            mass = sum(histogram[j] for j in members)
            for j in used:
                q[j] = mass / kept / len(used) if mass else 1e-4
        total_p, total_q = sum(p), sum(q)
        divergences[i] = sum(
            a / total_p * math.log((a / total_p) / (b / total_q))
            for a, b in zip(p, q, strict=True)
            if a > 0
        )
    return divergences


@settings(max_examples=30)
@given(SEEDS, st.integers(2, 4), st.integers(8, 40))
def test_entropy_equals_a_loop_over_bins(seed, bits, bins):
    generator = torch.Generator().manual_seed(seed)
    histogram = torch.randint(0, 30, (bins,), generator=generator)
    histogram[torch.rand(bins, generator=generator) < 0.3] = 0
    histogram[-1] = 1
    centres = (torch.arange(bins) + 0.5).repeat_interleave(histogram)
    centres[-1] = bins  # the maximum, which sets the width of a bin to 1
    divergences = reference_divergences(histogram.tolist(), 2 ** (bits - 1))
    best = min(divergences.values())
    alpha = clip_by_entropy(centres, bits, bins)
    assert divergences[round(alpha)] <= best + 1e-9


@pytest.mark.parametrize("clip", [clip_by_mse, clip_by_entropy])
def test_bad_input_is_refused_by_name(clip):
    assert clip(torch.zeros(5), 4) == 0.0
    assert clip(torch.tensor([-3.0]), 4) == 3.0
    with pytest.raises(ValueError, match="x must be finite"):
        clip(torch.tensor([float("inf")]), 4)
    with pytest.raises(ValueError, match="x must have at least one element"):
        clip(torch.zeros(0), 4)
    with pytest.raises(ValueError, match="bits must be between 2 and 8, got 1"):
        clip(torch.ones(3), 1)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        clip(torch.ones(3).int(), 4)


def test_steps_and_bins_are_checked():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        clip_by_mse(torch.ones(3), 4, steps=0)
    with pytest.raises(ValueError, match="bins must be at least 128, got 100"):
        clip_by_entropy(torch.ones(3), 8, bins=100)
