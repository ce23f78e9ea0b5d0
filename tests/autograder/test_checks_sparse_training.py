"""What is special to the exercises of lab 5; what holds for all is in test_every_exercise.py."""

import math

import pytest
import torch
from judged import lost, points_of

import autograder.judge
from autograder.candidate import Local
from autograder.checks import sparse_training
from autograder.exercise import Exercise, exercises
from autograder.judge import judge
from fewer.sparsity import (
    capped_densities,
    carry_over,
    drop_fraction,
    drop_smallest,
    erk_densities,
    grow_largest,
    prune_surviving,
    rigl_step_flops,
    rigl_update,
)

LAB = [value for value in vars(sparse_training).values() if isinstance(value, Exercise)]


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    """A few steps towards the simplest counter-example are enough here."""
    monkeypatch.setattr(autograder.judge, "SHRINK_RUNS", 5)


@pytest.mark.parametrize("reference", [drop_smallest, rigl_update, prune_surviving])
def test_leaving_the_mask_as_it_is_earns_less_than_half(reference):
    exercise = exercises()[reference.__name__]
    assert sum(points_of(exercise, lambda weight, mask, *rest: mask).values()) < exercise.points / 2


# --- mistakes that are no misconception: nobody would make them, or nobody would need a tutor ----


def rounded_down(weights, masks, fraction):
    n = sum(int(mask.sum()) for mask in masks)
    return prune_surviving(weights, masks, math.floor(fraction * n) / n if n else fraction)


def rounded_up(weights, masks, fraction):
    n = sum(int(mask.sum()) for mask in masks)
    return prune_surviving(weights, masks, math.ceil(fraction * n) / n if n else fraction)


def first_mask_only(weights, masks, fraction):
    return prune_surviving(weights, masks, fraction)[:1]


def two_rounds(sizes, ratios, sparsity):
    densities = capped_densities(sizes, ratios, sparsity)
    left, dense = (1 - sparsity) * sum(sizes), []
    for _ in range(2):
        free = [l for l in range(len(sizes)) if l not in dense]
        epsilon = (left - sum(sizes[l] for l in dense)) / (
            sum(sizes[l] * ratios[l] for l in free) or 1
        )
        dense += [l for l in free if epsilon * ratios[l] > 1]
    return [1.0 if l in dense else epsilon * ratios[l] for l in range(len(densities))]


def the_densest_first(sizes, ratios, sparsity):
    return sorted(capped_densities(sizes, ratios, sparsity), reverse=True)


def one_kernel_side(shapes, sparsity):
    return erk_densities([shape[:3] for shape in shapes], sparsity)


def the_example_alone(shapes, sparsity):
    known = dict(zip([8, 18, 48], erk_densities([(2, 4), (3, 6), (2, 4, 6)], 0.5), strict=True))
    erk_densities(shapes, sparsity)
    return [known.get(math.prod(shape), 1 - sparsity) for shape in shapes]


def only_contiguous(weight, mask, count):
    weight.view(-1)
    return drop_smallest(weight, mask, count)


def one_too_few(weight, mask, count):
    return drop_smallest(weight, mask, max(count - 1, 0) if count > 0 else count)


def in_float32(values, old_mask, new_mask):
    return carry_over(values.float(), old_mask, new_mask)


def without_its_sign(values, old_mask, new_mask):
    return carry_over(values.abs(), old_mask, new_mask)


def ends_a_step_early(t, alpha, T_end):
    return drop_fraction(t, alpha, max(T_end - 1, 1) if T_end > 0 else T_end)


def stays_at_the_last_value(t, alpha, T_end):
    return drop_fraction(min(t, T_end - 1) if t >= 0 and T_end > 0 else t, alpha, T_end)


def rounds_to_nearest(weight, mask, gradient, fraction):
    n = int(mask.sum())
    rigl_update(weight, mask, gradient, fraction)
    return rigl_update(weight, mask, gradient, round(fraction * n) / n + 1e-9 if n > 0 else 0)


def leaves_the_rest_empty(weight, mask, gradient, fraction):
    rigl_update(weight, mask, gradient, fraction)
    return drop_smallest(weight, mask, int(fraction * int(mask.sum())))


def grows_the_smallest(weight, mask, gradient, fraction):
    rigl_update(weight, mask, gradient, fraction)
    count = int(fraction * int(mask.sum()))
    return grow_largest(drop_smallest(weight, mask, count), -gradient.abs(), count)


def whole_flops(f_S, f_D, delta_T):
    return math.floor(rigl_step_flops(f_S, f_D, delta_T))


def dense_gradient_left_out(f_S, f_D, delta_T):
    return rigl_step_flops(f_S, f_S, delta_T)


UNLISTED = [
    (prune_surviving, rounded_down),
    (prune_surviving, rounded_up),
    (prune_surviving, first_mask_only),
    (capped_densities, two_rounds),
    (capped_densities, the_densest_first),
    (erk_densities, one_kernel_side),
    (erk_densities, the_example_alone),
    (drop_smallest, only_contiguous),
    (drop_smallest, one_too_few),
    (carry_over, in_float32),
    (carry_over, without_its_sign),
    (drop_fraction, ends_a_step_early),
    (drop_fraction, stays_at_the_last_value),
    (rigl_update, rounds_to_nearest),
    (rigl_update, leaves_the_rest_empty),
    (rigl_update, grows_the_smallest),
    (rigl_step_flops, whole_flops),
    (rigl_step_flops, dense_gradient_left_out),
]


@pytest.mark.parametrize(("reference", "wrong"), UNLISTED, ids=[f.__name__ for _, f in UNLISTED])
def test_other_wrong_work_fails_too(reference, wrong):
    for seed in (0, 1):
        assert sum(points_of(exercises()[reference.__name__], wrong, seed).values()) < (
            exercises()[reference.__name__].points
        )


# --- one mistake costs one check -----------------------------------------------------------------

COSTS = {
    "fraction_of_the_whole": "the_fraction_is_of_the_connections_that_are_left",
    "layer_by_layer": "all_layers_compete_with_each_other",
    "pruned_connections_come_back": "what_was_pruned_stays_pruned",
    "cuts_off_what_is_above_1": "the_network_has_the_sparsity_asked_for",
    "hands_out_only_once": "no_layer_has_more_connections_than_places",
    "hands_out_in_equal_parts": "densities_go_with_the_ratios",
    "without_the_kernel": "the_sides_of_a_kernel_count_too",
    "cuts_off_without_making_up": "a_small_layer_may_be_dense",
    "drops_by_signed_value": "the_smallest_magnitudes_go",
    "ranks_unconnected_zeros_too": "exactly_count_connections_go",
    "keeps_what_was_never_connected": "only_connections_are_left",
    "grown_connections_wake_up": "grown_connections_start_at_zero",
    "dropped_connections_live_on": "where_no_connection_is_there_is_nothing",
    "zeroes_everything": "kept_connections_keep_their_value",
    "falls_along_a_line": "it_falls_along_half_a_cosine",
    "rises_again_after_the_end": "from_the_end_on_it_is_zero",
    "fraction_of_all_places": "the_fraction_of_the_connections_is_replaced",
    "drops_by_gradient": "the_smallest_weights_are_dropped",
    "grows_by_signed_gradient": "the_largest_gradients_are_grown",
    "excludes_what_was_just_dropped": "what_was_dropped_may_come_straight_back",
    "grows_a_fraction_of_the_rest": "there_are_as_many_connections_as_before",
    "the_whole_update_is_dense": "one_product_in_an_interval_is_dense",
}


@pytest.mark.parametrize("seed", [0, 1])
def test_one_mistake_costs_one_check(seed):
    for exercise in LAB:
        for mistake in exercise.misconceptions:
            if mistake.name in COSTS:
                earned = points_of(exercise, mistake.function, seed)
                wrong = [name for name, points in earned.items() if not points]
                assert wrong == [COSTS[mistake.name]], mistake.name


def test_a_mask_of_numbers_costs_the_check_of_the_type_alone():
    def dropped(weight, mask, count):
        return drop_smallest(weight, mask, count).float()

    def updated(weight, mask, gradient, fraction):
        return rigl_update(weight, mask, gradient, fraction).to(torch.uint8)

    def survivors(weights, masks, fraction):
        return [mask.double() for mask in prune_surviving(weights, masks, fraction)]

    assert lost(drop_smallest, dropped) == ["the_result_is_a_bool_mask"]
    assert lost(rigl_update, updated) == ["there_are_as_many_connections_as_before"]
    assert lost(prune_surviving, survivors) == ["each_layer_gets_a_bool_mask_of_its_shape"]


def test_a_missing_refusal_costs_the_refusals_alone_and_is_not_misdiagnosed():
    def trusting(weight, mask, gradient, fraction):
        count = int(fraction * int(mask.sum()))
        order = torch.where(mask, weight.abs(), math.inf).flatten().argsort()
        kept = mask.flatten().clone()
        kept[order[:count]] = False
        wanted = torch.where(kept, -math.inf, gradient.abs().flatten()).argsort(descending=True)
        kept[wanted[:count]] = True
        return kept.reshape(mask.shape)

    verdict = judge(exercises()["rigl_update"], Local(trusting))
    failed = [result for result in verdict.results if result.status == "failed"]
    assert [result.check for result in failed] == ["what_cannot_be_updated_is_refused"]
    assert failed[0].misconception == ""
