"""What is special to the exercises of lab 8; what holds for all is in test_every_exercise.py."""

import pytest
import torch
from judged import lost, points_of

from autograder.candidate import Local
from autograder.checks import lora
from autograder.compare import Mismatch, like
from autograder.exercise import Exercise, exercises
from autograder.judge import judge
from autograder.wire import pack, unpack
from fewer.peft import (
    TrainingMemory,
    dora_weight,
    double_quantize,
    dynamic_levels,
    lora_delta,
    lora_merge,
    nf4_levels,
    quantize_blockwise,
    sparse_peft_delta,
    training_memory,
)

LAB = [value for value in vars(lora).values() if isinstance(value, Exercise)]


# --- one mistake costs one check -----------------------------------------------------------------

COSTS = {
    "transposed_product": "the_change_is_a_multiple_of_b_times_a",
    "scale_is_alpha": "twice_the_rank_halves_the_scale",
    "always_the_root": "twice_the_rank_halves_the_scale",
    "never_the_root": "rank_stabilized_the_scale_falls_with_the_root",
    "merges_in_place": "a_parameter_is_not_written_to",
    "loses_the_type": "the_merged_weight_has_the_type_of_the_weight",
    "forgets_rank_stabilized": "into_zeros_merges_the_change_itself",
    "norm_of_the_matrix": "every_row_has_the_length_m",
    "magnitude_of_the_frozen_weight": "every_row_has_the_length_m",
    "forgets_the_magnitude": "every_row_has_the_length_m",
    "dora_scale_is_alpha": "the_change_is_scaled_as_in_lora",
    "zeros_become_nan": "a_row_of_zeros_stays_one",
    "one_absmax_for_all": "absmax_is_the_largest_magnitude_of_each_block",
    "last_short_block_dropped": "the_last_block_may_be_short",
    "blocks_begin_anew_in_each_row": "any_shape_is_read_row_by_row",
    "divides_zero_by_zero": "a_block_of_zeros_gets_the_level_nearest_to_zero",
    "evenly_spaced_levels": "codes_are_those_of_the_nearest_dynamic_level",
    "median_for_mean": "the_mean_is_that_of_all",
    "blocks_of_64": "there_is_a_scale_for_each_256",
    "no_mask": "where_nothing_is_kept_nothing_changes",
    "makes_up_for_the_zeros": "what_is_kept_changes_as_in_lora",
    "gradients_of_32_bits": "only_trained_weights_have_a_gradient",
    "states_of_the_weights_type": "each_trained_weight_has_its_states",
}


@pytest.mark.parametrize("exercise", LAB, ids=[exercise.name for exercise in LAB])
def test_one_mistake_costs_one_check(exercise):
    for mistake in exercise.misconceptions:
        if mistake.name in COSTS:
            assert lost(exercise.reference, mistake.function) == [COSTS[mistake.name]], mistake.name


def test_the_wrong_element_type_costs_one_check():
    def wide_codes(x, levels, block_size):
        codes, absmax = quantize_blockwise(x, levels, block_size)
        return codes.long(), absmax

    def double_levels():
        return nf4_levels().double()

    assert lost(quantize_blockwise, wide_codes) == ["any_shape_is_read_row_by_row"]
    assert lost(nf4_levels, double_levels) == ["the_levels_rise_and_are_float32"]


def test_a_missing_refusal_costs_the_refusals_alone_and_is_not_misdiagnosed():
    def trusting(A, B, mask, alpha):
        return alpha / len(A) * (B @ A) * mask

    verdict = judge(exercises()["sparse_peft_delta"], Local(trusting))
    failed = [result for result in verdict.results if result.status == "failed"]
    assert [result.check for result in failed] == ["masks_that_do_not_fit_are_refused"]
    assert failed[0].misconception == ""


# --- mistakes that are no misconception: nobody would make them, or nobody would need a tutor ----


def twice_the_change(A, B, alpha, rank_stabilized=False):
    return 2 * lora_delta(A, B, alpha, rank_stabilized)


def only_the_first_of_r(A, B, alpha, rank_stabilized=False):
    return lora_delta(A, B, alpha, rank_stabilized) * 0 + alpha / len(A) * B[:, :1] @ A[:1]


def magnitude_of_the_scale(A, B, alpha, rank_stabilized=False):
    return lora_delta(A, B, abs(alpha), rank_stabilized)


def half_of_the_weight(W, A, B, alpha, rank_stabilized=False):
    return lora_merge(W / 2, A, B, alpha, rank_stabilized)


def float32_always(W, A, B, alpha, rank_stabilized=False):
    return lora_merge(W, A, B, alpha, rank_stabilized).float()


def sum_of_magnitudes(W, A, B, m, alpha, detach_norm=True):
    result = dora_weight(W, A, B, m, alpha)
    return m[:, None] * result / result.abs().sum(dim=1).clamp(min=1e-9)[:, None]


def squared_norm(W, A, B, m, alpha, detach_norm=True):
    V = lora_merge(W, A, B, alpha)
    dora_weight(W, A, B, m, alpha)
    return m[:, None] * V / V.square().sum(dim=1).clamp(min=1e-9)[:, None]


def clipped_rows(W, A, B, m, alpha, detach_norm=True):
    return dora_weight(W, A, B, m.clamp(max=2.0), alpha)


def rounded_to_two_digits():
    return (nf4_levels() * 100).round() / 100


def falling():
    return nf4_levels().flip(0)


def mean_magnitude(x, levels, block_size):
    codes, absmax = quantize_blockwise(x, levels, block_size)
    return codes, absmax * 0.9


def read_column_by_column(x, levels, block_size):
    codes, absmax = quantize_blockwise(x.transpose(0, -1), levels, block_size)
    return codes.transpose(0, -1), absmax


def in_memory_order(x, levels, block_size):
    return quantize_blockwise(x.view(-1), levels, block_size)


def neighbouring_codes(absmax, block_size=256):
    codes, scale, mean = double_quantize(absmax, block_size)
    return (codes.int() - 1).clamp(min=0).to(torch.uint8), scale, mean


def mean_of_magnitudes_as_scale(absmax, block_size=256):
    codes, scale, mean = double_quantize(absmax, block_size)
    return codes, (absmax - mean).abs().mean().expand(len(scale)), mean


def fp4_levels_in_the_scale(absmax, block_size=256):
    _, scale, mean = double_quantize(absmax, block_size)
    coarse = dynamic_levels()[::2].contiguous()
    return quantize_blockwise(absmax - mean, coarse, block_size)[0], scale, mean


def mask_as_a_sum(A, B, mask, alpha):
    return sparse_peft_delta(A, B, mask, alpha) + mask.float()


def rows_of_the_mask(A, B, mask, alpha):
    return sparse_peft_delta(A, B, mask.all(dim=1)[:, None].expand(mask.shape), alpha)


def one_and_a_half_bytes(trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, **more):
    right = training_memory(trained, frozen, trained_bits, frozen_bits, states, **more)
    return right._replace(optimizer=right.optimizer * 1.5)


def not_rounded(trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32):
    weights = (trained * trained_bits + frozen * frozen_bits) / 8
    return weights, trained * trained_bits / 8, trained * states * state_bits / 8


def gradients_and_states_swapped(*args, **kwargs):
    weights, gradients, optimizer = training_memory(*args, **kwargs)
    return weights, optimizer, gradients


UNLISTED = [
    (lora_delta, twice_the_change),
    (lora_delta, only_the_first_of_r),
    (lora_delta, magnitude_of_the_scale),
    (lora_merge, half_of_the_weight),
    (lora_merge, float32_always),
    (dora_weight, sum_of_magnitudes),
    (dora_weight, squared_norm),
    (dora_weight, clipped_rows),
    (nf4_levels, rounded_to_two_digits),
    (nf4_levels, falling),
    (quantize_blockwise, mean_magnitude),
    (quantize_blockwise, read_column_by_column),
    (quantize_blockwise, in_memory_order),
    (double_quantize, neighbouring_codes),
    (double_quantize, mean_of_magnitudes_as_scale),
    (double_quantize, fp4_levels_in_the_scale),
    (sparse_peft_delta, mask_as_a_sum),
    (sparse_peft_delta, rows_of_the_mask),
    (training_memory, one_and_a_half_bytes),
    (training_memory, not_rounded),
    (training_memory, gradients_and_states_swapped),
]


@pytest.mark.parametrize(("reference", "wrong"), UNLISTED, ids=[f.__name__ for _, f in UNLISTED])
def test_other_wrong_work_fails_too(reference, wrong):
    for seed in (0, 1):
        assert lost(reference, wrong, seed)


def test_half_of_the_work_of_a_merge_earns_less_than_half():
    exercise = exercises()["lora_merge"]
    earned = points_of(exercise, lambda W, A, B, alpha, rank_stabilized=False: W.clone())
    assert sum(earned.values()) < exercise.points / 2


# --- what these exercises are the first to need --------------------------------------------------


def test_a_plain_tuple_stands_for_a_named_one_also_from_another_process():
    model = TrainingMemory(weights=1, gradients=2, optimizer=3)
    for value in ((1, 2, 3), [1, 2.0, 3], torch.tensor([1, 2, 3]).tolist(), unpack(pack(model))):
        got = like(value, model)
        assert isinstance(got, TrainingMemory)
        assert got == model
    with pytest.raises(Mismatch, match="the result is a tuple"):
        like((1, 2), model)


def test_an_exercise_without_arguments_is_judged_by_one_call_a_check():
    exercise = exercises()["nf4_levels"]
    verdict = judge(exercise, Local(lambda: torch.linspace(-1, 1, 16)))
    assert verdict.first_failure.failure.call == "nf4_levels()"
    assert not verdict.passed
