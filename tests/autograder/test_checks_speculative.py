"""What is special to the exercises of lab 10; what holds for all is in test_every_exercise.py."""

import pytest
import torch
import torch.nn.functional as F
from judged import lost

import autograder.judge
from autograder.candidate import Local
from autograder.checks import speculative
from autograder.exercise import Exercise, exercises
from autograder.judge import judge
from fewer.inference import (
    acceptance_probability,
    best_draft_length,
    expected_tokens,
    look_up,
    residual_distribution,
    tree_mask,
    verify_candidates,
    verify_draft,
)

LAB = [value for value in vars(speculative).values() if isinstance(value, Exercise)]


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    """A few steps towards the simplest counter-example are enough here."""
    monkeypatch.setattr(autograder.judge, "SHRINK_RUNS", 5)


# --- one mistake costs one check -----------------------------------------------------------------

COSTS = {
    "ratio_above_1": "what_the_draft_says_too_seldom_is_always_accepted",
    "nought_divided_by_nought": "what_the_model_never_says_is_never_accepted",
    "every_token_in_every_distribution": "each_token_is_looked_up_in_its_own_distribution",
    "dimension_left_over": "each_token_is_looked_up_in_its_own_distribution",
    "one_minus_the_difference": "what_the_draft_says_too_often_is_accepted_less",
    "left_unnormalised": "each_residual_sums_to_1",
    "magnitude_of_the_gap": "what_the_draft_gave_enough_of_is_not_drawn",
    "p_where_it_is_above": "what_is_missing_is_drawn_in_proportion",
    "sum_over_the_batch": "each_residual_sums_to_1",
    "equal_gives_nan": "where_both_are_equal_p_is_returned",
    "equal_gives_zeros": "where_both_are_equal_p_is_returned",
    "equal_batch_only": "where_both_are_equal_p_is_returned",
    "counts_after_a_rejection": "tokens_count_up_to_the_first_rejection",
    "replaces_from_p": "a_rejected_token_is_replaced_from_the_residual",
    "accepts_at_the_edge": "an_impossible_token_is_rejected_even_if_u_is_0",
    "all_or_nothing": "tokens_count_up_to_the_first_rejection",
    "counts_the_models_own_token": "tokens_count_up_to_the_first_rejection",
    "row_after_the_rejected": "a_rejected_token_is_replaced_from_the_residual",
    "residual_after_the_whole_draft": "a_draft_without_rejection_gives_one_token_more",
    "accepted_tokens_only": "a_call_gives_one_token_at_least",
    "each_token_by_itself": "the_kth_token_adds_the_chance_that_all_k_are_accepted",
    "whole_drafts_only": "the_kth_token_adds_the_chance_that_all_k_are_accepted",
    "division_by_nought": "a_sure_draft_gives_all_its_tokens",
    "k_if_sure": "a_sure_draft_gives_all_its_tokens",
    "longest_left_out": "a_free_draft_is_as_long_as_allowed",
    "largest_of_equals": "of_equally_fast_lengths_the_smallest_is_taken",
    "most_recent_place": "of_equally_long_matches_the_first_wins",
    "no_limit": "of_equally_long_matches_the_first_wins",
    "gives_up_at_once": "a_longer_match_beats_a_shorter_one",
    "filled_up": "where_the_text_ends_fewer_are_proposed",
    "skips_short_ones": "where_the_text_ends_fewer_are_proposed",
    "no_overlap": "where_the_text_ends_fewer_are_proposed",
    "blind_to_itself": "each_node_sees_itself",
    "parents_only": "each_node_sees_its_ancestors",
    "causal_mask": "no_node_sees_another_branch",
    "symmetric": "no_node_sees_what_follows_it",
    "siblings_see_each_other": "no_node_sees_another_branch",
    "node_0_left_out": "each_node_sees_its_ancestors",
    "mask_of_numbers": "the_mask_is_boolean",
    "accepted_at_the_edge": "what_has_become_impossible_is_not_accepted",
}


@pytest.mark.parametrize("exercise", LAB, ids=[exercise.name for exercise in LAB])
def test_one_mistake_costs_one_check(exercise):
    for mistake in exercise.misconceptions:
        if mistake.name in COSTS:
            assert lost(exercise.reference, mistake.function) == [COSTS[mistake.name]], mistake.name


def test_the_table_of_costs_names_misconceptions_of_this_lab():
    assert COSTS.keys() <= {m.name for exercise in LAB for m in exercise.misconceptions}


def trusting_acceptance(p, q, tokens):
    p, q = torch.broadcast_tensors(p, q) if p.shape[-1] == q.shape[-1] else (p, q)
    rows, x = p.reshape(-1, p.shape[-1]), tokens.reshape(-1)
    at = torch.arange(len(x))
    p_x, q_x = rows[at, x], q.reshape(-1, q.shape[-1])[at, x]
    return torch.where(p_x > 0, (p_x / q_x).clamp(max=1), 0.0).reshape(tokens.shape)


def trusting_residual(p, q):
    v = max(p.shape[-1], q.shape[-1])
    p, q = (F.pad(d, (0, v - d.shape[-1])) for d in (p, q))
    gap = F.relu(p - q)
    return torch.where(gap.sum(-1, keepdim=True) > 0, gap / gap.sum(-1, keepdim=True), p)


def trusting_verdict(p, q, tokens, u):
    for i, (p_i, q_i, x, v) in enumerate(zip(p, q, tokens, u, strict=False)):
        if v * q_i[x] >= p_i[x]:
            return i, trusting_residual(p_i, q_i)
    return len(tokens), p[-1]


def trusting_tokens(a, k):
    return sum(a**i for i in range(int(k) + 1))


def trusting_length(a, c, longest=32):
    speeds = [trusting_tokens(a, k) / (1 + k * c) for k in range(int(longest) + 1)]
    return speeds.index(max(speeds)) if speeds else 0


def trusting_search(text, length, longest):
    ids = text.flatten().tolist()
    for n in range(int(longest), 0, -1):
        for i in range(len(ids) - n):
            if ids[i : i + n] == ids[-n:]:
                return torch.tensor(ids[i + n : i + n + int(length)])
    return text[:0]


def trusting_mask(parents):
    mask = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if 0 <= parent < len(parents):
            mask[i] |= mask[parent]
    return mask


TRUSTING = [
    (acceptance_probability, trusting_acceptance),
    (residual_distribution, trusting_residual),
    (verify_draft, trusting_verdict),
    (expected_tokens, trusting_tokens),
    (best_draft_length, trusting_length),
    (look_up, trusting_search),
    (tree_mask, trusting_mask),
]


@pytest.mark.parametrize(("reference", "trusting"), TRUSTING, ids=[f.__name__ for f, _ in TRUSTING])
def test_a_missing_refusal_costs_the_refusals_alone_and_is_not_misdiagnosed(reference, trusting):
    exercise = exercises()[reference.__name__]
    verdict = judge(exercise, Local(trusting))
    failed = [result for result in verdict.results if result.status == "failed"]
    assert [result.check for result in failed] == [exercise.checks[-1].name]
    assert failed[0].misconception == ""


# --- mistakes that are no misconception: nobody would make them, or nobody would need a tutor ----


def squared_ratio(p, q, tokens):
    return acceptance_probability(p, q, tokens) ** 2


def never_quite_sure(p, q, tokens):
    return acceptance_probability(p, q, tokens).clamp(max=0.999)


def first_token_for_all(p, q, tokens):
    return acceptance_probability(p, q, tokens.flatten()[0].expand(tokens.shape))


def squared_gap(p, q):
    residual_distribution(p, q)
    gap = F.relu(p - q) ** 2
    return torch.where(gap.sum(-1, keepdim=True) > 0, gap / gap.sum(-1, keepdim=True), p)


def all_on_the_largest_gap(p, q):
    residual_distribution(p, q)
    sure = F.one_hot((p - q).argmax(-1), p.shape[-1]).to(p)
    return torch.where((p == q).all(-1, keepdim=True), p, sure)


def uniform_where_equal(p, q):
    r = residual_distribution(p, q)
    same = (p == q).all(-1, keepdim=True)
    return torch.where(same, torch.full_like(p, 1 / p.shape[-1]), r)


def never_more_than_three(p, q, tokens, u):
    n, following = verify_draft(p, q, tokens, u)
    return min(n, 3), following


def random_numbers_from_the_last(p, q, tokens, u):
    return verify_draft(p, q, tokens, u.flip(0))


def half_a_chance(p, q, tokens, u):
    return verify_draft(p, q, tokens, u / 2)


def first_row_after_a_whole_draft(p, q, tokens, u):
    n, following = verify_draft(p, q, tokens, u)
    return n, p[0] if n == len(tokens) else following


def one_more_power(a, k):
    return expected_tokens(a, k + 1)


def at_most_ten_tokens(a, k):
    return expected_tokens(a, min(k, 10))


def never_more_than_sixteen(a, c, longest=32):
    return min(16, best_draft_length(a, c, longest))


def default_of_ten(a, c, longest=10):
    return best_draft_length(a, c, longest)


def one_off_the_peak(a, c, longest=32):
    k = best_draft_length(a, c, longest)
    return k + 1 if 0 < k < longest else k


def reversed_proposal(text, length, longest):
    return look_up(text, length, longest).flip(0)


def at_most_two_tokens(text, length, longest):
    return look_up(text, length, longest)[:2]


def at_most_two_matched(text, length, longest):
    look_up(text, length, longest)
    return look_up(text, length, min(longest, 2))


def any_order_of_the_matched(text, length, longest):
    look_up(text, length, longest)
    ids = text.tolist()
    for n in range(longest, 0, -1):
        for i in range(len(ids) - n):
            if sorted(ids[i : i + n]) == sorted(ids[-n:]):
                return text[i + n : i + n + length]
    return text[:0]


def empty_for_short_texts(text, length, longest):
    found = look_up(text, length, longest)
    return found if len(text) > 6 else found[:0]


def two_generations(parents):
    mask = tree_mask(parents)
    depth = mask.sum(1)
    return mask & (depth[:, None] - depth[None] < 3)


def root_sees_all(parents):
    mask = tree_mask(parents)
    mask[:1] = True
    return mask


def cousins(parents):
    mask = tree_mask(parents)
    depth = mask.sum(1)
    return mask | (depth[:, None] > depth[None] + 1)


def only_two_candidates(p, q, tokens, u):
    return verify_candidates(p, q[:2], tokens[:2], u[:2])


def from_the_last(p, q, tokens, u):
    index, after = verify_candidates(p, q.flip(0), tokens.flip(0), u.flip(0))
    return None if index is None else len(tokens) - 1 - index, after


def duplicates_left_out(p, q, tokens, u):
    """A wrong rule: the first candidate comes again with another number, and may be accepted."""
    for i, x in enumerate(tokens):
        if u[i] < acceptance_probability(p, q[i], x):
            return i, p
        if x not in tokens[:i]:
            p = residual_distribution(p, q[i])
    return None, p


def one_residual_is_enough(p, q, tokens, u):
    for i, x in enumerate(tokens):
        if u[i] < acceptance_probability(p, q[i], x):
            return i, p
        p = residual_distribution(p, q[i]) if i == 0 else p
    return None, p


UNLISTED = [
    (acceptance_probability, squared_ratio),
    (acceptance_probability, never_quite_sure),
    (acceptance_probability, first_token_for_all),
    (residual_distribution, squared_gap),
    (residual_distribution, all_on_the_largest_gap),
    (residual_distribution, uniform_where_equal),
    (verify_draft, never_more_than_three),
    (verify_draft, random_numbers_from_the_last),
    (verify_draft, half_a_chance),
    (verify_draft, first_row_after_a_whole_draft),
    (expected_tokens, one_more_power),
    (expected_tokens, at_most_ten_tokens),
    (best_draft_length, never_more_than_sixteen),
    (best_draft_length, default_of_ten),
    (best_draft_length, one_off_the_peak),
    (look_up, reversed_proposal),
    (look_up, at_most_two_tokens),
    (look_up, at_most_two_matched),
    (look_up, any_order_of_the_matched),
    (look_up, empty_for_short_texts),
    (tree_mask, two_generations),
    (tree_mask, root_sees_all),
    (tree_mask, cousins),
    (verify_candidates, only_two_candidates),
    (verify_candidates, from_the_last),
    (verify_candidates, duplicates_left_out),
    (verify_candidates, one_residual_is_enough),
]


@pytest.mark.parametrize(("reference", "wrong"), UNLISTED, ids=[f.__name__ for _, f in UNLISTED])
def test_other_wrong_work_fails_too(reference, wrong):
    for seed in (0, 1):
        assert lost(reference, wrong, seed)


# --- correct work that is easily refused ---------------------------------------------------------


def test_what_cannot_be_drawn_may_be_accepted_or_not():
    def never_where_q_is_0(p, q, tokens):
        accepted = acceptance_probability(p, q, tokens)
        return torch.where(q.gather(-1, tokens[..., None])[..., 0] > 0, accepted, 0.0)

    assert not lost(acceptance_probability, never_where_q_is_0)


def test_numbers_may_be_tensors():
    def tensors(p, q, tokens, u):
        n, following = verify_draft(p, q, tokens, u)
        return torch.tensor(n), following.double()

    assert not lost(verify_draft, tensors)

    def places(p, q, tokens, u):
        index, after = verify_candidates(p, q, tokens, u)
        return None if index is None else torch.tensor(index), after.double()

    assert not lost(verify_candidates, places)


def test_a_draft_of_sure_tokens_is_among_the_candidates():
    """Or to strike a rejected token out would be as good as the residual, or as bad."""
    calls = [
        call.args
        for check in exercises()["verify_candidates"].checks
        for call in autograder.judge.foreseen(exercises()["verify_candidates"], check, 0)
    ]
    sure = [bool((q == 1).any(1).any()) for _, q, _, _ in calls if len(q)]
    assert any(sure)
    assert not all(sure)
