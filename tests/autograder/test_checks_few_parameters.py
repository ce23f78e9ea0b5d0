"""What is special to the exercises of lab 7; what holds for all is in test_every_exercise.py."""

import pytest
import torch
import torch.nn.functional as F
from judged import lost

from autograder.candidate import Local
from autograder.checks import few_parameters
from autograder.exercise import Exercise, exercises
from autograder.judge import judge
from fewer.peft import (
    bottleneck,
    class_means,
    fold_input_scale,
    fold_output_scale,
    label_prompt,
    reparameterized_prefix,
    sequence_log_probability,
    training_flops,
    transformer_flops,
)

LAB = [value for value in vars(few_parameters).values() if isinstance(value, Exercise)]


# --- one mistake costs one check -----------------------------------------------------------------

COSTS = {
    "every_token_in_every_row": "log_probabilities_of_tokens_add_up",
    "mean_over_tokens": "log_probabilities_of_tokens_add_up",
    "sign_of_a_loss": "one_token_has_the_logarithm_of_its_probability",
    "logarithm_of_a_softmax": "next_to_impossible_tokens_have_a_finite_one",
    "overflowing_sum": "next_to_impossible_tokens_have_a_finite_one",
    "computes_in_half": "half_precision_is_computed_in_float32",
    "lengths_are_left_in": "long_features_count_no_more_than_short_ones",
    "mean_is_left_short": "each_row_has_the_length_1",
    "order_of_appearance": "row_c_belongs_to_the_label_c",
    "last_text_of_each_class": "each_row_points_where_the_mean_of_its_class_does",
    "backward_through_trained_weights_only": "a_frozen_weight_saves_one_pass_of_three",
    "three_passes_always": "a_frozen_weight_saves_one_pass_of_three",
    "attention_backward_once": "attention_costs_three_passes",
    "attention_by_the_trained_share": "attention_costs_three_passes",
    "adds_h": "a_w_up_of_zeros_leaves_b_up",
    "forgets_the_relu": "negative_numbers_do_not_pass_the_bottleneck",
    "gelu": "negative_numbers_do_not_pass_the_bottleneck",
    "forgets_b_down": "b_down_is_added_before_the_relu",
    "b_down_after_the_relu": "b_down_is_added_before_the_relu",
    "forgets_b_up": "a_w_up_of_zeros_leaves_b_up",
    "matrices_only": "leading_dimensions_pass_through",
    "never_repeats": "a_short_list_begins_again",
    "repeats_each_token": "a_short_list_begins_again",
    "keeps_the_last": "of_a_long_list_the_first_are_used",
    "forgets_the_tanh": "the_numbers_are_those_the_network_makes",
    "values_first": "the_first_half_of_w_2_makes_the_keys",
    "heads_before_halves": "each_head_has_consecutive_rows_of_w_2",
    "numbers_dealt_out_to_heads": "each_head_has_consecutive_rows_of_w_2",
    "positions_first": "each_row_of_p_small_makes_one_position",
    "reshaped_for_transposed": "each_row_of_p_small_makes_one_position",
    "scales_the_columns": "the_new_weight_gives_the_scaled_outputs",
    "bias_stays": "the_new_bias_is_scaled_too",
    "zeros_for_no_bias": "a_layer_without_a_bias_has_none_afterwards",
    "writes_into_the_layer": "parameters_are_not_written_to",
    "one_plus_the_input_scale": "equal_scales_multiply_the_whole_weight",
    "writes_into_the_weight": "a_parameter_is_not_written_to",
}


@pytest.mark.parametrize("exercise", LAB, ids=[exercise.name for exercise in LAB])
def test_one_mistake_costs_one_check(exercise):
    for mistake in exercise.misconceptions:
        if mistake.name in COSTS:
            assert lost(exercise.reference, mistake.function) == [COSTS[mistake.name]], mistake.name


def test_the_table_of_costs_names_misconceptions_of_this_lab():
    assert COSTS.keys() <= {m.name for exercise in LAB for m in exercise.misconceptions}


def trusting_score(logits, tokens):
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return sum(row.log_softmax(0)[t] for row, t in zip(wide, tokens, strict=False))


def trusting_means(features, labels, classes):
    unit = F.normalize(features, dim=1)
    return F.normalize(torch.stack([unit[labels == c].sum(0) for c in range(classes)]), dim=1)


def trusting_flops(tokens, matrix_weights, layers, width, trained_weights):
    matrices = 2 * tokens * (2 * matrix_weights + trained_weights)
    return matrices + 12 * tokens**2 * width * layers


def trusting_bottleneck(h, w_down, b_down, w_up, b_up):
    return F.linear(F.relu(F.linear(h, w_down, b_down)), w_up, b_up)


def trusting_prompt(embedding, labels, length):
    ids = [token for name in labels for token in name]
    return embedding[torch.tensor((ids * length)[:length], dtype=torch.int64)]


def trusting_prefix(p_small, w_1, w_2, heads):
    keys, values = torch.tanh(p_small @ w_1.T).matmul(w_2.T).chunk(2, dim=1)
    return tuple(part.unflatten(1, (heads, -1)).transpose(0, 1) for part in (keys, values))


def trusting_outputs(w, b, scale):
    return scale.reshape(-1, 1) * w, None if b is None else b * scale


def trusting_inputs(w, scale):
    return w * scale


TRUSTING = [
    (sequence_log_probability, trusting_score),
    (class_means, trusting_means),
    (training_flops, trusting_flops),
    (bottleneck, trusting_bottleneck),
    (label_prompt, trusting_prompt),
    (reparameterized_prefix, trusting_prefix),
    (fold_output_scale, trusting_outputs),
    (fold_input_scale, trusting_inputs),
]


@pytest.mark.parametrize(("reference", "trusting"), TRUSTING, ids=[f.__name__ for f, _ in TRUSTING])
def test_a_missing_refusal_costs_the_refusals_alone_and_is_not_misdiagnosed(reference, trusting):
    exercise = exercises()[reference.__name__]
    verdict = judge(exercise, Local(trusting))
    failed = [result for result in verdict.results if result.status == "failed"]
    assert [result.check for result in failed] == [exercise.checks[-1].name]
    assert failed[0].misconception == ""


# --- mistakes that are no misconception: nobody would make them, or nobody would need a tutor ----


def base_2(logits, tokens):
    return sequence_log_probability(logits, tokens) / 0.6931471805599453


def never_below_minus_100(logits, tokens):
    return sequence_log_probability(logits, tokens).clamp(min=-100)


def a_little_in_the_logarithm(logits, tokens):
    sequence_log_probability(logits, tokens)
    p = logits.double().softmax(-1)[torch.arange(len(tokens)), tokens]
    return (p + 1e-9).log().sum()


def always_float32(logits, tokens):
    return sequence_log_probability(logits.float(), tokens)


def likeliest_tokens(logits, tokens):
    return sequence_log_probability(logits, logits.argmax(1)[: len(tokens)])


def median_direction(features, labels, classes):
    class_means(features, labels, classes)
    unit = F.normalize(features, dim=1)
    rows = [unit[labels == c].median(0).values for c in range(classes)]
    return F.normalize(torch.stack(rows), dim=1)


def opposite_directions(features, labels, classes):
    return -class_means(features, labels, classes)


def mean_over_all_texts(features, labels, classes):
    class_means(features, labels, classes)
    return class_means(features, labels * 0, 1).expand(classes, -1)


def one_multiplication(tokens, matrix_weights, layers, width, trained_weights):
    return training_flops(tokens, matrix_weights, layers, width, trained_weights) / 2


def forward_only(tokens, matrix_weights, layers, width, trained_weights):
    training_flops(tokens, matrix_weights, layers, width, trained_weights)
    return transformer_flops(tokens, matrix_weights, layers, width)


def one_layer(tokens, matrix_weights, layers, width, trained_weights):
    return training_flops(tokens, matrix_weights, min(layers, 1), width, trained_weights)


def leaky(h, w_down, b_down, w_up, b_up):
    bottleneck(h, w_down, b_down, w_up, b_up)
    return F.linear(F.leaky_relu(F.linear(h, w_down, b_down)), w_up, b_up)


def b_up_twice(h, w_down, b_down, w_up, b_up):
    return bottleneck(h, w_down, b_down, w_up, b_up) + b_up


def relu6(h, w_down, b_down, w_up, b_up):
    bottleneck(h, w_down, b_down, w_up, b_up)
    return F.linear(F.relu6(F.linear(h, w_down, b_down)), w_up, b_up)


def first_of_the_batch(h, w_down, b_down, w_up, b_up):
    y = bottleneck(h, w_down, b_down, w_up, b_up)
    return y if y.dim() < 3 else y[:1].expand(y.shape)


def each_name_repeated(embedding, labels, length):
    label_prompt(embedding, labels, length)
    ids = [token for name in labels for token in name * length]
    return embedding[torch.tensor(ids[:length])]


def tokens_sorted(embedding, labels, length):
    label_prompt(embedding, labels, length)
    return label_prompt(embedding, [sorted(token for name in labels for token in name)], length)


def each_token_once(embedding, labels, length):
    label_prompt(embedding, labels, length)
    return label_prompt(embedding, [list(dict.fromkeys(sum(labels, [])))], length)  # noqa: RUF017


def back_and_forth(embedding, labels, length):
    label_prompt(embedding, labels, length)
    ids = sum(labels, [])  # noqa: RUF017
    return label_prompt(embedding, [ids, ids[::-1]], length)


def sigmoid(p_small, w_1, w_2, heads):
    reparameterized_prefix(p_small, w_1, w_2, heads)
    keys, values = torch.sigmoid(p_small @ w_1.T).matmul(w_2.T).chunk(2, dim=1)
    return tuple(part.unflatten(1, (heads, -1)).transpose(0, 1) for part in (keys, values))


def keys_twice(p_small, w_1, w_2, heads):
    keys, _ = reparameterized_prefix(p_small, w_1, w_2, heads)
    return keys, keys


def heads_from_the_last(p_small, w_1, w_2, heads):
    keys, values = reparameterized_prefix(p_small, w_1, w_2, heads)
    return keys.flip(0), values.flip(0)


def positions_from_the_last(p_small, w_1, w_2, heads):
    keys, values = reparameterized_prefix(p_small, w_1, w_2, heads)
    return keys.flip(1), values.flip(1)


def numbers_from_the_last(p_small, w_1, w_2, heads):
    keys, values = reparameterized_prefix(p_small, w_1, w_2, heads)
    return keys.flip(2), values.flip(2)


def magnitude_of_the_scale(w, b, scale):
    return fold_output_scale(w, b, scale.abs())


def scale_of_the_first_output(w, b, scale):
    fold_output_scale(w, b, scale)
    return fold_output_scale(w, b, scale[:1].expand(scale.shape))


def bias_scaled_twice(w, b, scale):
    new, bias = fold_output_scale(w, b, scale)
    return new, None if bias is None else bias * scale


def weight_stays_without_a_bias(w, b, scale):
    new, bias = fold_output_scale(w, b, scale)
    return (w if b is None else new), bias


def magnitude_of_the_input_scale(w, scale):
    return fold_input_scale(w, scale.abs())


def scale_from_the_last(w, scale):
    fold_input_scale(w, scale)
    return fold_input_scale(w, scale.flip(0))


def scale_over_its_mean(w, scale):
    fold_input_scale(w, scale)
    return fold_input_scale(w, scale / scale.mean())


def divided_by_the_inputs(w, scale):
    return fold_input_scale(w, scale) / len(scale)


def nothing_folded(w, scale):
    fold_input_scale(w, scale)
    return w.clone()


UNLISTED = [
    (sequence_log_probability, base_2),
    (sequence_log_probability, never_below_minus_100),
    (sequence_log_probability, a_little_in_the_logarithm),
    (sequence_log_probability, always_float32),
    (sequence_log_probability, likeliest_tokens),
    (class_means, median_direction),
    (class_means, opposite_directions),
    (class_means, mean_over_all_texts),
    (training_flops, one_multiplication),
    (training_flops, forward_only),
    (training_flops, one_layer),
    (bottleneck, leaky),
    (bottleneck, b_up_twice),
    (bottleneck, relu6),
    (bottleneck, first_of_the_batch),
    (label_prompt, each_name_repeated),
    (label_prompt, tokens_sorted),
    (label_prompt, each_token_once),
    (label_prompt, back_and_forth),
    (reparameterized_prefix, sigmoid),
    (reparameterized_prefix, keys_twice),
    (reparameterized_prefix, heads_from_the_last),
    (reparameterized_prefix, positions_from_the_last),
    (reparameterized_prefix, numbers_from_the_last),
    (fold_output_scale, magnitude_of_the_scale),
    (fold_output_scale, scale_of_the_first_output),
    (fold_output_scale, bias_scaled_twice),
    (fold_output_scale, weight_stays_without_a_bias),
    (fold_input_scale, magnitude_of_the_input_scale),
    (fold_input_scale, scale_from_the_last),
    (fold_input_scale, scale_over_its_mean),
    (fold_input_scale, divided_by_the_inputs),
    (fold_input_scale, nothing_folded),
]


@pytest.mark.parametrize(("reference", "wrong"), UNLISTED, ids=[f.__name__ for _, f in UNLISTED])
def test_other_wrong_work_fails_too(reference, wrong):
    for seed in (0, 1):
        assert lost(reference, wrong, seed)


# --- correct work that is easily refused ---------------------------------------------------------


def test_the_log_probability_may_be_a_python_number_and_its_sum_in_any_order():
    def numbers(logits, tokens):
        if len(logits) != len(tokens):
            raise ValueError("as many rows as tokens")
        parts = logits.double().log_softmax(-1)
        return float(sum(reversed([parts[i, t] for i, t in enumerate(tokens.tolist())])))

    assert not lost(sequence_log_probability, numbers)


def test_folded_parameters_may_keep_their_history():
    def with_history(w, b, scale):
        if scale.shape != w.shape[:1]:
            raise ValueError("one number an output")
        w = torch.nn.Parameter(w.detach().clone())
        return w * scale.unsqueeze(-1), b if b is None else torch.nn.Parameter(b.detach() * scale)

    assert not lost(fold_output_scale, with_history)


def test_a_position_is_told_what_its_shape_should_be():
    exercise = exercises()["reparameterized_prefix"]
    mistake = next(m for m in exercise.misconceptions if m.name == "positions_first")
    verdict = judge(exercise, Local(mistake.function))
    assert verdict.first_failure.failure.message.startswith("keys has shape")
