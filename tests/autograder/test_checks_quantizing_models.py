"""What is special to the exercises of lab 2; what holds for all is in test_every_exercise.py."""

import inspect
import math

import pytest
import torch
from judged import lost

import autograder.judge
from autograder.candidate import Local
from autograder.checks import quantizing_models
from autograder.exercise import Exercise, exercises
from autograder.judge import judge
from fewer.quantization import (
    dequantize,
    fold_scales,
    fwht,
    gptq_block,
    hadamard_factor,
    hadamard_matrix,
    matmul_llm_int8,
    outlier_features,
    quantize_to_grid,
    require_floating,
    round_to_nearest,
    smoothing_scales,
)

LAB = [e for e in vars(quantizing_models).values() if isinstance(e, Exercise)]
NAMES = [e.name for e in LAB]


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    """A few steps towards the simplest counter-example are enough here."""
    monkeypatch.setattr(autograder.judge, "SHRINK_RUNS", 5)


# --- one mistake costs what it has to do with ----------------------------------------------------

COSTS = {
    "restores_with_unrounded_scales": ["the_weight_is_restored_with_the_scale_that_is_stored"],
    "stores_float32_scales": ["what_is_stored_takes_its_real_bytes"],
    "none_is_groups_of_64": ["each_group_stores_the_scale_of_its_own_weights"],
    "restores_without_zero_points": ["asymmetric_codes_come_back_through_their_zero_points"],
    "forgets_negative_outliers": ["the_sign_does_not_matter"],
    "strictly_above_the_threshold": ["the_threshold_itself_is_an_outlier"],
    "all_tokens_must_be_large": ["one_large_value_makes_its_column_an_outlier"],
    "reduces_the_first_dimension_only": ["all_leading_dimensions_are_tokens"],
    "scales_of_w_see_the_outliers": ["outliers_have_no_say_in_the_scales"],
    "counts_the_kept_features": ["kept_is_the_fraction_of_outlier_features"],
    "a_small_number_for_zero": ["a_channel_of_zeros_gets_1"],
    "columns_of_the_producer": ["a_linear_producer_is_divided_row_by_row"],
    "only_the_first_consumer": ["every_consumer_gets_its_share"],
    "is_not_normalized": ["one_value_is_spread_over_all"],
    "divides_by_n": ["one_value_is_spread_over_all"],
    "forgets_the_factor": ["other_sizes_have_a_factor_inside"],
    "along_the_first_dimension": ["every_row_is_transformed_by_itself"],
    "cuts_off_the_fraction": ["the_nearest_code_is_taken"],
    "subtracts_the_zero_point": ["a_zero_point_shifts_the_codes"],
    "the_full_symmetric_range": ["values_beyond_the_grid_get_its_last_code"],
    "passes_the_errors_on_undivided": ["errors_times_u_is_all_that_was_lost"],
    "forgets_the_zero_point": ["zero_points_belong_to_the_grid"],
    "the_grid_of_the_first_column": [
        "without_correlations_every_weight_goes_to_the_nearest_code",
    ],
}


@pytest.mark.parametrize("name", COSTS)
def test_a_mistake_costs_the_one_check_it_has_to_do_with(name):
    [(exercise, mistake)] = [(e, m) for e in LAB for m in e.misconceptions if m.name == name]
    for seed in (0, 1):
        assert lost(exercise.reference, mistake.function, seed) == COSTS[name]


def test_what_is_wrong_with_the_feedback_of_gptq_is_never_rounding_nor_zero_points():
    feedback = {"later_columns_make_up_for_the_error", "errors_times_u_is_all_that_was_lost"}
    for mistake in exercises()["gptq_block"].misconceptions[:8]:
        failed = set(lost(gptq_block, mistake.function))
        assert failed <= feedback | {"errors_are_measured_in_units_of_the_diagonal"}


# --- correct work that a stricter check would reject ---------------------------------------------


def halves_go_up(w, u, scale, zero_point, bits):
    gptq_block(w, u, scale, zero_point, bits)
    w, codes, errors = w.clone(), [], []
    low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    if zero_point is not None:
        low, high = 0, 2**bits - 1
    for j in range(w.shape[1]):
        zero = 0 if zero_point is None else zero_point[:, j]
        code = (torch.floor(w[:, j] / scale[:, j] + 0.5) + zero).clamp(low, high)
        codes.append(code)
        errors.append((w[:, j] - (code - zero) * scale[:, j]) / u[j, j])
        w[:, j + 1 :] -= errors[j][:, None] * u[j, j + 1 :]
    return torch.stack(codes, 1), torch.stack(errors, 1)


def test_a_tie_that_goes_the_other_way_is_followed_through_the_block():
    w, u = torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    block = (w, u, torch.ones(1, 2), None, 4)
    assert not halves_go_up(*block)[0].equal(gptq_block(*block)[0].float())
    for seed in (0, 1):
        assert lost(gptq_block, halves_go_up, seed) == []


def test_codes_may_come_from_the_scale_before_or_after_it_is_rounded():
    [variant] = [
        v for v in exercises()["round_to_nearest"].variants if v.name == "rounds_the_scales_first"
    ]
    torch.manual_seed(0)
    w = torch.randn(64, 256)
    ours, theirs = round_to_nearest(w, bits=8)[0], variant.function(w, bits=8)[0]
    assert 0 < (ours - theirs).abs().max() < 1.01 * w.abs().max() / 127
    # Seed 49 draws a group whose last code saturates after its scale was rounded down.
    assert lost(round_to_nearest, variant.function, 49) == []


# --- another type, another form: its own check, and no wrong sentence ----------------------------


def wide_codes(x, scale, zero_point, bits):
    return quantize_to_grid(x, scale, zero_point, bits).to(torch.int16)


def wide_bytes(w, bits=4, group_size=None, symmetric=True):
    w_hat, stored = round_to_nearest(w, bits, group_size, symmetric)
    return w_hat, [stored[0].int(), *stored[1:]]


def ones_and_zeros(x, threshold=6.0):
    return outlier_features(x, threshold).float()


@pytest.mark.parametrize(
    ("reference", "function", "check"),
    [
        (quantize_to_grid, wide_codes, "codes_are_stored_in_a_byte"),
        (round_to_nearest, wide_bytes, "what_is_stored_takes_its_real_bytes"),
        (outlier_features, ones_and_zeros, "the_result_is_a_mask"),
    ],
)
def test_another_type_costs_its_own_check_and_is_not_misdiagnosed(reference, function, check):
    for seed in (0, 1):
        verdict = judge(exercises()[reference.__name__], Local(function), seed)
        failed = [result for result in verdict.results if result.status == "failed"]
        assert [result.check for result in failed] == [check]
        assert failed[0].misconception == ""


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_work_that_refuses_nothing_loses_the_refusals_alone(exercise):
    parameters = inspect.signature(exercise.reference).parameters

    def trusting(*args, **kwargs):
        try:
            return exercise.reference(*args, **kwargs)
        except ValueError:
            return torch.zeros(len(parameters))

    verdict = judge(exercise, Local(trusting))
    failed = [result for result in verdict.results if result.status == "failed"]
    assert [result.check for result in failed] == [exercise.checks[-1].name]
    assert exercise.checks[-1].points == 1
    assert failed[0].misconception == ""


# --- mistakes that are no misconception: nobody would make them, or nobody would need a tutor ----


def eight_bits_by_default(w, bits=8, group_size=None, symmetric=True):
    return round_to_nearest(w, bits, group_size, symmetric)


def asymmetric_by_default(w, bits=4, group_size=None, symmetric=False):
    return round_to_nearest(w, bits, group_size, symmetric)


def rows_read_backwards(w, bits=4, group_size=None, symmetric=True):
    w_hat, stored = round_to_nearest(w, bits, group_size, symmetric)
    _, flipped = round_to_nearest(w.flip(-1), bits, None, symmetric)
    return w_hat, [flipped[0], *stored[1:]]


def twice_the_step(w, bits=4, group_size=None, symmetric=True):
    w_hat, stored = round_to_nearest(w, bits, group_size, symmetric)
    step = stored[1].to(w_hat.dtype)
    if step.shape[1] > 1:
        return w_hat, stored
    return (w_hat / step / 2).round() * 2 * step, stored


def five_by_default(x, threshold=5.0):
    return outlier_features(x, threshold)


def indices(x, threshold=6.0):
    return outlier_features(x, threshold).nonzero().flatten()


def six_always(x, threshold=6.0):
    return outlier_features(x, 6.0 if threshold > 0 else threshold)


def threshold_is_ignored(x, w, threshold=6.0):
    return matmul_llm_int8(x, w, min(threshold, 6.0))


def never_quantizes(x, w, threshold=6.0):
    y, kept = matmul_llm_int8(x, w, threshold)
    return (x.to(y.dtype) @ w.to(y.dtype).T).reshape(y.shape), kept


def outliers_of_each_sequence(x, w, threshold=6.0):
    if x.dim() < 3:
        return matmul_llm_int8(x, w, threshold)
    parts = [outliers_of_each_sequence(part, w, threshold) for part in x]
    return torch.stack([y for y, _ in parts]), sum(kept for _, kept in parts) / len(parts)


def a_fixed_alpha(x_absmax, w_absmax, alpha=0.5):
    return smoothing_scales(x_absmax, w_absmax, 0.5 if 0 < alpha < 1 else alpha)


def never_below_1(x_absmax, w_absmax, alpha=0.5):
    return smoothing_scales(x_absmax, w_absmax, alpha).clamp(min=1)


def eighty_by_default(x_absmax, w_absmax, alpha=0.8):
    return smoothing_scales(x_absmax, w_absmax, alpha)


def in_the_other_order(s, producer, consumers):
    producer, consumers = fold_scales(s, producer, consumers)
    return producer, consumers[::-1]


def root_of_the_scale(s, producer, consumers):
    return fold_scales(s.sqrt(), producer, consumers)


def difference_the_other_way(x):
    y = fwht(x)
    n = x.shape[-1] // hadamard_factor(x.shape[-1])
    odd = torch.tensor([(-1.0) ** bin(i).count("1") for i in range(n)])
    return y * odd.repeat_interleave(x.shape[-1] // n).to(y)


def pairs_side_by_side(x):
    y = fwht(x)
    n = x.shape[-1]
    half = torch.arange(n).reshape(2, -1).T.flatten() if n % 2 == 0 else torch.arange(n)
    return y[..., half]


def over_all_dimensions(x):
    y = fwht(x)
    if x.dim() == 2 and x.shape[0] in (1, 2, 4):
        y = fwht(y.T.contiguous()).T
    return y


def in_half_precision(x):
    require_floating(x, "x")
    return fwht(x).to(x.dtype).float() if x.dtype == torch.bfloat16 else fwht(x)


def no_dimension_left_out(x):
    return hadamard_matrix(x.shape[-1]).to(require_floating(x, "x"))[0] * fwht(x)


def one_code_short(x, scale, zero_point, bits):
    codes = quantize_to_grid(x, scale, zero_point, bits)
    return codes if zero_point is None else codes.clamp(max=2**bits - 2)


def one_zero_point_for_all(x, scale, zero_point, bits):
    point = None if zero_point is None else zero_point.flatten()[0]
    return quantize_to_grid(x, scale, point, bits)


def from_right_to_left(w, u, scale, zero_point, bits):
    gptq_block(w, u, scale, zero_point, bits)
    point = None if zero_point is None else zero_point.flip(1)
    codes, errors = gptq_block(w.flip(1), u.flip(0, 1).T, scale.flip(1), point, bits)
    return codes.flip(1), errors.flip(1)


def weights_for_errors(w, u, scale, zero_point, bits):
    codes, _ = gptq_block(w, u, scale, zero_point, bits)
    return codes, dequantize(codes, scale, zero_point)


def magnitudes_of_errors(w, u, scale, zero_point, bits):
    codes, errors = gptq_block(w, u, scale, zero_point, bits)
    return codes, errors.abs()


def first_row_decides(w, u, scale, zero_point, bits):
    codes, errors = gptq_block(w, u, scale, zero_point, bits)
    _, feedback = gptq_block(
        w[:1], u, scale[:1], None if zero_point is None else zero_point[:1], bits
    )
    return codes, feedback.expand_as(errors)


def rounds_in_the_end(w, u, scale, zero_point, bits):
    """Right errors beside the codes of plain rounding."""
    _, errors = gptq_block(w, u, scale, zero_point, bits)
    return quantize_to_grid(w, scale, zero_point, bits), errors


UNLISTED = [
    (round_to_nearest, eight_bits_by_default),
    (round_to_nearest, asymmetric_by_default),
    (round_to_nearest, rows_read_backwards),
    (round_to_nearest, twice_the_step),
    (outlier_features, five_by_default),
    (outlier_features, indices),
    (outlier_features, six_always),
    (matmul_llm_int8, threshold_is_ignored),
    (matmul_llm_int8, never_quantizes),
    (matmul_llm_int8, outliers_of_each_sequence),
    (smoothing_scales, a_fixed_alpha),
    (smoothing_scales, never_below_1),
    (smoothing_scales, eighty_by_default),
    (fold_scales, in_the_other_order),
    (fold_scales, root_of_the_scale),
    (fwht, difference_the_other_way),
    (fwht, pairs_side_by_side),
    (fwht, over_all_dimensions),
    (fwht, in_half_precision),
    (fwht, no_dimension_left_out),
    (quantize_to_grid, one_code_short),
    (quantize_to_grid, one_zero_point_for_all),
    (gptq_block, from_right_to_left),
    (gptq_block, weights_for_errors),
    (gptq_block, magnitudes_of_errors),
    (gptq_block, first_row_decides),
    (gptq_block, rounds_in_the_end),
]


@pytest.mark.parametrize(("reference", "wrong"), UNLISTED, ids=[f.__name__ for _, f in UNLISTED])
def test_other_wrong_work_fails_too(reference, wrong):
    for seed in (0, 1):
        assert lost(reference, wrong, seed)


# --- what a student reads ------------------------------------------------------------------------


def test_a_wrong_code_is_shown_with_its_place_and_the_value_on_the_grid():
    def off_by_two(w, u, scale, zero_point, bits):
        codes, errors = gptq_block(w, u, scale, zero_point, bits)
        codes[-1, -1] += 2 if codes[-1, -1] < 0 else -2
        return codes, errors

    worst = judge(exercises()["gptq_block"], Local(off_by_two)).first_failure
    assert worst.failure.message.startswith("the code at [")
    assert "where its value lies at " in worst.failure.message
    assert math.isfinite(float(worst.failure.message.split()[-4]))
