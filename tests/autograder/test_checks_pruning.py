"""What is special to the exercises of lab 4; what holds for all is in test_every_exercise.py."""

import re

import pytest
import torch
from judged import lost

import autograder.judge
from autograder.candidate import Local
from autograder.checks import pruning
from autograder.exercise import Exercise, exercises
from autograder.judge import judge
from fewer.sparsity import (
    cubic_sparsity,
    encode_2_4,
    encode_csr,
    global_masks,
    n_m_mask,
    sparsegpt_block,
    top_k_mask,
    wanda_scores,
)

LAB = [value for value in vars(pruning).values() if isinstance(value, Exercise)]


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    """A few steps towards the simplest counter-example are enough here."""
    monkeypatch.setattr(autograder.judge, "SHRINK_RUNS", 5)


# --- mistakes that are no misconception: nobody would make them, or nobody would need a tutor ----


def largest_row_first(scores, k):
    return top_k_mask(scores.flip(0), k).flip(0)


def in_memory_order(scores, k):
    if scores.dim() < 2 or scores.is_contiguous():
        return top_k_mask(scores, k)
    return top_k_mask(scores.transpose(-1, -2), k).transpose(-1, -2)


def never_nothing(scores, k):
    return top_k_mask(scores, max(k, 1))


def later_layers_first(scores, sparsity):
    return global_masks(dict(reversed(scores.items())), sparsity)


def at_least_half(scores, sparsity):
    return global_masks(scores, min(sparsity, 0.5) if 0 <= sparsity <= 1 else sparsity)


def always_two_of_four(scores, n, m):
    n_m_mask(scores, n, m)
    return n_m_mask(scores, 2, 4) if scores.shape[-1] % 4 == 0 else n_m_mask(scores, n, m)


def whole_steps_only(step, begin, end, initial, final):
    return cubic_sparsity(int(step) if step == step else step, begin, end, initial, final)


def upper_half_only(step, begin, end, initial, final):
    return max(cubic_sparsity(step, begin, end, initial, final), final / 8)


def int8_columns(w, index_bits=32):
    values, columns, pointers = encode_csr(w, index_bits)
    return values, columns.to(torch.int8) if index_bits == 8 else columns, pointers


def no_more_than_one_text(w, x):
    return wanda_scores(w, x.reshape(-1, x.shape[-1])[:4] if x.dim() > 1 else x)


def first_row_alone(w):
    values, indices = encode_2_4(w)
    return values[:1].expand_as(values), indices[:1].expand_as(indices)


def without_the_diagonal(w, u, sparsity=0.5, n_m=None):
    return sparsegpt_block(w, u - u.diag().diag() + torch.eye(len(u)), sparsity, n_m)


def transposed_u(w, u, sparsity=0.5, n_m=None):
    return sparsegpt_block(w, u.T.contiguous(), sparsity, n_m)


def errors_of_all(w, u, sparsity=0.5, n_m=None):
    pruned, _ = sparsegpt_block(w, u, sparsity, n_m)
    return pruned, w / u.diagonal()


def no_errors(w, u, sparsity=0.5, n_m=None):
    pruned, errors = sparsegpt_block(w, u, sparsity, n_m)
    return pruned, torch.zeros_like(errors)


def next_column_only(w, u, sparsity=0.5, n_m=None):
    return sparsegpt_block(w, u.triu().tril(1), sparsity, n_m)


UNLISTED = [
    (top_k_mask, largest_row_first),
    (top_k_mask, in_memory_order),
    (top_k_mask, never_nothing),
    (global_masks, later_layers_first),
    (global_masks, at_least_half),
    (n_m_mask, always_two_of_four),
    (cubic_sparsity, whole_steps_only),
    (cubic_sparsity, upper_half_only),
    (encode_csr, int8_columns),
    (encode_2_4, first_row_alone),
    (wanda_scores, no_more_than_one_text),
    (sparsegpt_block, without_the_diagonal),
    (sparsegpt_block, transposed_u),
    (sparsegpt_block, errors_of_all),
    (sparsegpt_block, no_errors),
    (sparsegpt_block, next_column_only),
]


@pytest.mark.parametrize(("reference", "wrong"), UNLISTED, ids=[f.__name__ for _, f in UNLISTED])
def test_other_wrong_work_fails_too(reference, wrong):
    assert lost(reference, wrong)


# --- one mistake costs one check -----------------------------------------------------------------

ONE_CHECK = {
    "compares_magnitudes": "the_sign_counts",
    "keeps_every_tie": "of_equal_scores_the_first_are_kept",
    "a_mask_of_numbers": "k_may_be_nothing_or_all_and_the_mask_is_bool",
    "rounds_in_every_layer": "the_number_kept_is_rounded_once",
    "cuts_off_the_fraction": "the_number_kept_is_rounded_once",
    "groups_run_down_the_columns": "groups_lie_along_the_last_dimension",
    "ranks_magnitudes": "a_negative_score_is_a_small_one",
    "counts_from_step_0": "the_way_goes_from_begin_to_end",
    "nothing_is_sparse_before_the_begin": "it_stays_where_it_is_before_and_after",
    "keeps_every_number_in_int64": "every_number_has_the_type_that_is_promised",
    "loses_nan": "whatever_is_not_zero_is_stored",
    "no_pointers_for_empty_rows": "an_empty_row_has_two_equal_pointers",
    "the_zero_comes_last": "zeros_with_the_first_free_places_fill_up_a_group",
    "drops_the_half_full_byte": "every_row_begins_with_a_byte_of_its_own",
    "forgets_the_magnitude_of_weights": "the_sign_of_a_weight_does_not_count",
    "first_text_only": "all_leading_dimensions_are_tokens",
    "ranks_by_magnitude": "the_weights_of_least_cost_are_pruned",
    "squares_only_the_weight": "the_weights_of_least_cost_are_pruned",
    "ranks_each_row_by_itself": "the_weights_of_least_cost_are_pruned",
    "chooses_all_groups_at_the_start": "with_n_m_a_group_is_chosen_when_the_walk_reaches_it",
    "leaves_the_pruned_weights_in_place": "the_right_number_of_weights_becomes_exactly_zero",
}


def test_most_mistakes_cost_a_single_check():
    found = {}
    for exercise in LAB:
        for item in exercise.misconceptions:
            if item.name in ONE_CHECK:
                found[item.name] = lost(exercise.reference, item.function)
    assert found == {name: [check] for name, check in ONE_CHECK.items()}


def test_a_mask_of_floats_is_judged_like_one_of_bools_but_for_its_type():
    def floats(scores, n, m):
        return n_m_mask(scores, n, m).float()

    assert lost(n_m_mask, floats) == ["n_may_be_0_or_m_and_the_mask_is_bool"]


def test_wrong_places_do_not_make_the_values_wrong():
    def reversed_places(w):
        values, indices = encode_2_4(w)
        return values, 255 - indices

    assert "the_two_values_of_each_group_are_kept_in_order" not in lost(encode_2_4, reversed_places)


def test_an_update_that_never_comes_leaves_the_choice_of_weights_right():
    def plain_mask(w, u, sparsity=0.5, n_m=None):
        pruned, _ = sparsegpt_block(w, u * torch.eye(len(u)), sparsity, n_m)
        return pruned, torch.where(pruned == 0, w, 0) / u.diagonal()

    assert lost(sparsegpt_block, plain_mask) == [
        "every_loss_is_passed_on_to_the_columns_after_it",
        "with_n_m_a_group_is_chosen_when_the_walk_reaches_it",
    ]
    verdict = judge(exercises()["sparsegpt_block"], Local(plain_mask))
    assert verdict.first_failure.misconception == "passes_nothing_on"


def test_the_wrong_byte_and_the_wrong_score_are_shown():
    verdict = judge(
        exercises()["encode_2_4"], Local(lambda w: (encode_2_4(w)[0], ~encode_2_4(w)[1]))
    )
    message = verdict.first_failure.failure.message
    assert re.match(r"byte 0 of row 0 is [01]{8}, expected [01]{8}", message)

    verdict = judge(exercises()["top_k_mask"], Local(lambda scores, k: top_k_mask(-scores, k)))
    assert "is kept, and should be pruned" in verdict.first_failure.failure.message
