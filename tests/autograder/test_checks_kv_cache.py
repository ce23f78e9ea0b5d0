"""What is special to the exercises of lab 9; what holds for all is in test_every_exercise.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judged import lost

from autograder.candidate import Local
from autograder.checks import kv_cache
from autograder.exercise import Exercise, exercises
from autograder.judge import judge
from fewer.inference import (
    accumulate_attention,
    cache_bytes,
    forward_work,
    h2o_scores,
    kept_tokens,
    quantize_range,
    softmax_off_by_one,
    streaming_llm_scores,
)

LAB = [value for value in vars(kv_cache).values() if isinstance(value, Exercise)]


# --- one mistake costs one check -----------------------------------------------------------------

COSTS = {
    "keys_only": "a_key_and_a_value_are_kept_of_a_token",
    "queries_too": "a_key_and_a_value_are_kept_of_a_token",
    "counts_bits": "a_key_and_a_value_are_kept_of_a_token",
    "whole_bytes_a_number": "fewer_bits_take_fewer_bytes",
    "always_two_bytes": "fewer_bits_take_fewer_bytes",
    "one_layer": "each_size_multiplies_the_cache",
    "one_text": "every_text_has_a_cache_of_its_own",
    "square_of_the_tokens": "each_size_multiplies_the_cache",
    "one_product_of_attention": "a_new_token_attends_to_the_past_and_to_itself",
    "sees_what_comes_later": "tokens_at_once_take_the_operations_of_one_after_the_other",
    "does_not_see_itself": "a_new_token_attends_to_the_past_and_to_itself",
    "operations_by_key_heads": "a_new_token_attends_to_the_past_and_to_itself",
    "a_key_for_every_query_head": "keys_and_values_of_all_tokens_move",
    "weights_move_for_every_text": "weights_move_once_for_all",
    "weights_move_for_every_token": "weights_move_once_for_all",
    "one_cache_for_all_texts": "keys_and_values_of_all_tokens_move",
    "new_tokens_are_not_written": "keys_and_values_of_all_tokens_move",
    "operations_of_one_text": "tokens_at_once_take_the_operations_of_one_after_the_other",
    "plain_softmax": "a_row_may_sum_to_less_than_1",
    "one_is_not_shifted": "a_row_may_sum_to_less_than_1",
    "overflows": "large_scores_do_not_overflow",
    "one_after_the_softmax": "a_row_may_sum_to_less_than_1",
    "largest_of_a_hidden_row": "hidden_tokens_get_nothing",
    "sum_over_the_first_dimension": "every_row_is_by_itself",
    "one_denominator_for_all": "every_row_is_by_itself",
    "sorted_by_score": "places_go_from_left_to_right",
    "keeps_the_smallest": "the_largest_scores_are_kept",
    "earlier_of_equals": "of_equal_scores_the_later_is_kept",
    "heads_agree": "every_head_keeps_its_own",
    "latest_tokens": "the_largest_scores_are_kept",
    "more_than_there_is": "a_large_budget_keeps_all",
    "place_in_the_cache": "no_other_token_is_protected",
    "one_too_many": "no_other_token_is_protected",
    "earlier_is_higher": "the_later_the_higher",
    "minus_infinity": "the_first_tokens_of_the_text_are_infinite",
    "large_is_not_infinite": "the_first_tokens_of_the_text_are_infinite",
    "half_precision": "neighbours_late_in_a_text_are_told_apart",
    "one_head_for_all": "every_head_has_its_own_tokens",
    "forgets_the_past_sums": "attention_is_added_to_what_was_there",
    "mean_over_queries": "all_new_queries_are_summed",
    "last_query_only": "all_new_queries_are_summed",
    "mean_over_the_group": "the_heads_of_a_group_are_summed",
    "largest_of_the_group": "the_heads_of_a_group_are_summed",
    "first_of_the_group": "the_heads_of_a_group_are_summed",
    "all_heads_together": "texts_and_key_heads_stay_apart",
    "all_texts_together": "texts_and_key_heads_stay_apart",
    "sums_in_half": "weights_in_half_precision_are_summed_in_float32",
    "one_too_few": "the_latest_are_infinite",
    "minus_zero": "none_and_all_may_be_recent",
    "latest_go_first": "the_latest_are_infinite",
    "as_much_as_the_largest": "the_latest_are_infinite",
    "mean_over_time": "older_tokens_score_what_they_received",
    "least_looked_at": "older_tokens_score_what_they_received",
    "tokens_come_first": "every_head_is_treated_alike",
    "as_many_steps_as_codes": "the_codes_span_each_slice",
    "cuts_off": "each_code_is_the_nearest",
    "kept_in_float32": "codes_belong_to_what_float16_holds",
    "rounds_afterwards": "codes_belong_to_what_float16_holds",
    "drops_the_dimension": "the_codes_span_each_slice",
}


@pytest.mark.parametrize("exercise", LAB, ids=[exercise.name for exercise in LAB])
def test_one_mistake_costs_one_check(exercise):
    for mistake in exercise.misconceptions:
        if mistake.name in COSTS:
            assert lost(exercise.reference, mistake.function) == [COSTS[mistake.name]], mistake.name


def test_the_table_of_costs_names_misconceptions_of_this_lab():
    assert COSTS.keys() <= {m.name for exercise in LAB for m in exercise.misconceptions}


def trusting_bytes(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    return 2 * tokens * layers * kv_heads * head_dim * sequences * bits / 8


def trusting_work(past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16):
    pairs = new * past + new * (new + 1) / 2
    operations = (2 * weights * new + 4 * layers * heads * head_dim * pairs) * sequences
    cache = trusting_bytes(past + new, layers, kv_heads, head_dim, sequences, bits)
    return operations, weights * bits / 8 + cache


def trusting_softmax(scores):
    return F.pad(scores.float(), (0, 1)).softmax(-1)[..., :-1]


def trusting_choice(scores, budget):
    return scores.argsort(stable=True).flip(-1)[..., :budget].sort().values


def trusting_sinks(indices, sinks):
    return indices.float().masked_fill(indices < sinks, torch.inf)


def trusting_sums(sums, attention):
    return sums + attention.float().flatten(2, -2).sum(2)


def trusting_recent(sums, recent):
    tokens = sums.shape[-1]
    return sums.masked_fill(torch.arange(tokens) >= tokens - recent, torch.inf)


def trusting_range(x, bits, dim):
    low = x.amin(dim, keepdim=True).half()
    scale = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half()
    scale[scale <= 0] = 1
    return ((x - low) / scale).round().clamp(0, 2**bits - 1).byte(), scale, low


TRUSTING = [
    (cache_bytes, trusting_bytes),
    (forward_work, trusting_work),
    (softmax_off_by_one, trusting_softmax),
    (kept_tokens, trusting_choice),
    (streaming_llm_scores, trusting_sinks),
    (accumulate_attention, trusting_sums),
    (h2o_scores, trusting_recent),
    (quantize_range, trusting_range),
]


@pytest.mark.parametrize(("reference", "trusting"), TRUSTING, ids=[f.__name__ for f, _ in TRUSTING])
def test_a_missing_refusal_costs_the_refusals_alone_and_is_not_misdiagnosed(reference, trusting):
    exercise = exercises()[reference.__name__]
    verdict = judge(exercise, Local(trusting))
    failed = [result for result in verdict.results if result.status == "failed"]
    assert [result.check for result in failed] == [exercise.checks[-1].name]
    assert failed[0].misconception == ""


# --- mistakes that are no misconception: nobody would make them, or nobody would need a tutor ----


def four_bytes(tokens, layers, kv_heads, head_dim, sequences=1, bits=32):
    return cache_bytes(tokens, layers, kv_heads, head_dim, sequences, bits)


def one_token_more(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    cache_bytes(tokens, layers, kv_heads, head_dim, sequences, bits)
    return cache_bytes(tokens + 1, layers, kv_heads, head_dim, sequences, bits)


def in_kilobytes(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    return cache_bytes(tokens, layers, kv_heads, head_dim, sequences, bits) // 1024


def backward_too(past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    operations, moved = forward_work(*sizes)
    return 3 * operations, moved


def bytes_first(past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    return tuple(forward_work(*sizes))[::-1]


def weights_in_sixteen_bits(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    operations, moved = forward_work(*sizes)
    return operations, moved + 2 * weights - weights * bits // 8


def one_minus_softmax(scores):
    softmax_off_by_one(scores)
    return (1 - scores.softmax(-1)).nan_to_num(0)


def two_in_the_denominator(scores):
    softmax_off_by_one(scores)
    return F.pad(scores, (0, 2)).softmax(-1)[..., :-2]


def spread_evenly(scores):
    p = softmax_off_by_one(scores)
    return p.mean(-1, keepdim=True).expand(p.shape)


def clamped_at_80(scores):
    softmax_off_by_one(scores)
    return softmax_off_by_one(scores.clamp(max=80))


def infinity_is_but_a_number(scores, budget):
    return kept_tokens(scores.nan_to_num(0.0, 0.0), budget)


def one_token_fewer(scores, budget):
    return kept_tokens(scores, budget)[..., 1:]


def counted_from_1(scores, budget):
    return kept_tokens(scores, budget) + 1


def unstable(scores, budget):
    kept_tokens(scores, budget)
    return scores.argsort(dim=-1)[..., -budget:].sort().values


def first_sink_only(indices, sinks):
    return streaming_llm_scores(indices, min(sinks, 1))


def always_four_sinks(indices, sinks):
    streaming_llm_scores(indices, sinks)
    return streaming_llm_scores(indices, 4)


def one_sink_at_least(indices, sinks):
    streaming_llm_scores(indices, sinks)
    return streaming_llm_scores(indices, max(sinks, 1))


def all_infinite(indices, sinks):
    streaming_llm_scores(indices, sinks)
    return torch.full(indices.shape, torch.inf)


def twice_the_attention(sums, attention):
    return accumulate_attention(accumulate_attention(sums, attention), attention)


def squares(sums, attention):
    return accumulate_attention(sums, attention**2)


def from_the_last_token(sums, attention):
    return accumulate_attention(sums, attention.flip(-1))


def heads_from_the_last(sums, attention):
    return accumulate_attention(sums, attention.flip(1))


def running_mean(sums, attention):
    return accumulate_attention(sums, attention) / 2


def square_roots(sums, recent):
    return h2o_scores(sums, recent).sqrt()


def one_at_least(sums, recent):
    h2o_scores(sums, recent)
    return h2o_scores(sums, max(recent, 1))


def nothing_known_of_the_latest(sums, recent):
    return h2o_scores(sums, recent).masked_fill(h2o_scores(sums, recent).isinf(), torch.nan)


def twice_as_many(sums, recent):
    return h2o_scores(sums, 2 * recent)


def one_code_up(x, bits, dim):
    codes, scale, low = quantize_range(x, bits, dim)
    return (codes + 1).clamp(max=2**bits - 1), scale, low


def never_the_last_code(x, bits, dim):
    codes, scale, low = quantize_range(x, bits, dim)
    return codes.clamp(max=2**bits - 2), scale, low


def upside_down(x, bits, dim):
    codes, scale, low = quantize_range(x, bits, dim)
    return 2**bits - 1 - codes, -scale, low + scale * (2**bits - 1)


def always_the_last_dimension(x, bits, dim):
    return quantize_range(x, bits, -1)


def codes_of_64_bits(x, bits, dim):
    codes, scale, low = quantize_range(x, bits, dim)
    return codes.long(), scale, low


def a_little_in_the_scale(x, bits, dim):
    codes, scale, low = quantize_range(x, bits, dim)
    return codes, torch.where(scale == 1, scale + 0.01, scale), low


UNLISTED = [
    (cache_bytes, four_bytes),
    (cache_bytes, one_token_more),
    (cache_bytes, in_kilobytes),
    (forward_work, backward_too),
    (forward_work, bytes_first),
    (forward_work, weights_in_sixteen_bits),
    (softmax_off_by_one, one_minus_softmax),
    (softmax_off_by_one, two_in_the_denominator),
    (softmax_off_by_one, spread_evenly),
    (softmax_off_by_one, clamped_at_80),
    (kept_tokens, infinity_is_but_a_number),
    (kept_tokens, one_token_fewer),
    (kept_tokens, counted_from_1),
    (kept_tokens, unstable),
    (streaming_llm_scores, first_sink_only),
    (streaming_llm_scores, always_four_sinks),
    (streaming_llm_scores, one_sink_at_least),
    (streaming_llm_scores, all_infinite),
    (accumulate_attention, twice_the_attention),
    (accumulate_attention, squares),
    (accumulate_attention, from_the_last_token),
    (accumulate_attention, heads_from_the_last),
    (accumulate_attention, running_mean),
    (h2o_scores, square_roots),
    (h2o_scores, one_at_least),
    (h2o_scores, nothing_known_of_the_latest),
    (h2o_scores, twice_as_many),
    (quantize_range, one_code_up),
    (quantize_range, never_the_last_code),
    (quantize_range, upside_down),
    (quantize_range, always_the_last_dimension),
    (quantize_range, codes_of_64_bits),
    (quantize_range, a_little_in_the_scale),
]


@pytest.mark.parametrize(("reference", "wrong"), UNLISTED, ids=[f.__name__ for _, f in UNLISTED])
def test_other_wrong_work_fails_too(reference, wrong):
    for seed in (0, 1):
        assert lost(reference, wrong, seed)


# --- correct work that is easily refused ---------------------------------------------------------


def test_scores_of_a_window_may_be_any_that_grow_with_the_index():
    def logarithms(indices, sinks):
        streaming_llm_scores(indices, sinks)
        return torch.where(indices < sinks, torch.inf, (indices.double() + 1).log())

    assert not lost(streaming_llm_scores, logarithms)


def test_places_may_be_of_any_integer_type():
    assert not lost(kept_tokens, lambda scores, budget: kept_tokens(scores, budget).int())
    assert not lost(kept_tokens, lambda scores, budget: kept_tokens(scores, budget).numpy())


def test_work_may_be_a_plain_pair_of_tensors():
    def tensors(*sizes, **options):
        return [torch.tensor(part) for part in forward_work(*sizes, **options)]

    assert not lost(forward_work, tensors)


def test_ties_may_be_rounded_either_way_and_scales_kept_in_wider_types():
    def half_up(x, bits, dim):
        _, scale, low = quantize_range(x, bits, dim)
        codes = np.floor((x.double() - low) / scale + 0.5).clamp(0, 2**bits - 1)
        return codes.byte(), scale.double(), low.float()

    assert not lost(quantize_range, half_up)


def test_the_sum_of_attention_may_be_taken_in_any_order():
    def backwards(sums, attention):
        accumulate_attention(sums, attention)
        for q in reversed(range(attention.shape[3])):
            sums = sums + attention[:, :, :, q].float().flip(2).sum(2)
        return sums

    assert not lost(accumulate_attention, backwards)


def test_a_mask_for_places_is_told_which_shape_is_asked_for():
    exercise = exercises()["kept_tokens"]
    mistake = next(m for m in exercise.misconceptions if m.name == "mask_for_places")
    verdict = judge(exercise, Local(mistake.function))
    assert "has shape" in verdict.first_failure.failure.message
