"""Properties of quantizing whole models: exact restoration, honest reports, statistics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.models import linear_layers, replaced_weights, tiny_llama
from fewer.models.hooks import linear_inputs
from fewer.quantization.error import relative_output_error
from fewer.quantization.granularity import dequantize_per_group
from fewer.quantization.hadamard import rotated
from fewer.quantization.model import (
    activation_statistics,
    quantized_activations,
    quantized_weights,
    round_to_nearest,
)
from fewer.quantization.packing import unpack_codes
from fewer.quantization.uniform import dequantize, quantize_asymmetric, quantize_symmetric

SEEDS = st.integers(0, 2**32 - 1)
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.integers(2, 8), st.sampled_from([None, 1, 5, 8, 100]), st.booleans())
def test_what_is_computed_with_can_be_had_from_what_is_stored(seed, bits, group_size, symmetric):
    w = normal(seed, 3, 20)
    w_hat, stored = round_to_nearest(w, bits, group_size, symmetric)
    assert [tensor.dtype for tensor in stored] == [torch.uint8, torch.float16, torch.uint8][
        : 2 if symmetric else 3
    ]
    groups = -(-20 // (group_size or 20))
    codes = unpack_codes(stored[0], bits, 20, signed=symmetric)
    zero_point = None if symmetric else unpack_codes(stored[2], bits, groups, signed=False)
    restored = dequantize_per_group(codes, stored[1].float(), zero_point, group_size or 20)
    assert torch.equal(restored, w_hat)
    assert stored[1].shape == (3, groups)


@given(SEEDS, st.integers(2, 8), st.booleans())
def test_every_weight_is_within_half_a_step(seed, bits, symmetric):
    w = normal(seed, 4, 16)
    w_hat, stored = round_to_nearest(w, bits, symmetric=symmetric)
    # 2^-11 is the rounding of the scale to float16, times the largest code.
    assert ((w - w_hat).abs() <= stored[1].float() * (0.51 + 2**bits * 2**-11)).all()


def test_scales_that_float16_cannot_hold_are_refused():
    for w in (torch.full((1, 2), 1e-8), torch.tensor([[1e9, 0.0]])):
        with pytest.raises(ValueError, match="w must have scales between 6e-8 and 65504, got"):
            round_to_nearest(w)
    w_hat, _ = round_to_nearest(torch.zeros(2, 3))
    assert torch.equal(w_hat, torch.zeros(2, 3))


def test_inside_the_block_every_layer_has_the_weight_of_the_scheme():
    model = tiny_llama()
    originals = {name: layer.weight for name, layer in linear_layers(model).items()}
    bits = {name: 4 if "down" in name else 8 for name in originals}
    before = model(TOKENS)
    with quantized_weights(model, lambda name, w: round_to_nearest(w, bits[name]), TOKENS):
        for name, layer in linear_layers(model).items():
            assert torch.equal(layer.weight, round_to_nearest(originals[name], bits[name])[0])
    assert all(layer.weight is originals[name] for name, layer in linear_layers(model).items())
    assert torch.equal(model(TOKENS), before)


def test_a_report_counts_real_bytes_and_measures_the_layers_own_output():
    model = tiny_llama()
    inputs = linear_inputs(model, TOKENS)
    with quantized_weights(model, lambda _, w: round_to_nearest(w, 4, 8), TOKENS) as reports:
        pass
    assert [report.layer for report in reports] == list(linear_layers(model))
    for report in reports:
        w = model.get_submodule(report.layer).weight
        assert report.weights == w.numel()
        assert report.stored_bytes == w.numel() // 2 + w.numel() // 8 * 2
        assert report.bits_per_weight == 6
        expected = relative_output_error(w, round_to_nearest(w, 4, 8)[0], inputs[report.layer])
        assert report.output_error == pytest.approx(expected)


def test_a_lossless_scheme_has_no_error_and_changes_nothing():
    model = tiny_llama()
    before = model(TOKENS)
    with quantized_weights(model, lambda _, w: (w, [w]), TOKENS) as reports:
        assert torch.equal(model(TOKENS), before)
    assert all(report.output_error == 0 for report in reports)
    assert all(report.bits_per_weight == 32 for report in reports)


def test_a_scheme_may_work_in_place_and_a_failing_one_leaves_the_model_alone():
    model = tiny_llama()
    before = model(TOKENS)
    with quantized_weights(model, lambda _, w: (w.mul_(0), [w]), TOKENS) as reports:
        assert all(report.output_error == pytest.approx(1) for report in reports)
    assert torch.equal(model(TOKENS), before)
    with pytest.raises(ValueError, match="must have the same shape"):
        quantized_weights(model, lambda _, w: (w.T, [w]), TOKENS).__enter__()
    assert torch.equal(model(TOKENS), before)


def test_a_report_inside_a_rotation_measures_rotated_inputs_and_weights():
    model = tiny_llama()
    with (
        rotated(model),
        quantized_weights(model, lambda _, w: round_to_nearest(w, 8), TOKENS) as reports,
    ):
        pass
    assert all(0 < report.output_error < 0.02 for report in reports)


@given(SEEDS, st.sampled_from([None, -1]), st.booleans())
def test_layers_read_quantized_inputs(seed, dim, symmetric):
    model = tiny_llama(seed)
    scheme = quantize_symmetric if symmetric else quantize_asymmetric
    with quantized_activations(model, lambda x: scheme(x, 4, dim=dim)):
        inputs = linear_inputs(model, TOKENS[:1])
    x = model.layers[0].input_layernorm(model.embed_tokens(TOKENS[:1]))[0]
    expected = dequantize(*scheme(x, 4, dim=dim))
    torch.testing.assert_close(inputs["layers.0.self_attn.q_proj"], expected)
    for x_hat in inputs.values():
        values = x_hat if dim == -1 else x_hat.reshape(1, -1)
        assert all(len(row.unique()) <= 16 for row in values)


def test_activations_keep_their_dtype_and_the_model_comes_back():
    model = tiny_llama().bfloat16()
    before = model(TOKENS)
    with quantized_activations(model, lambda x: quantize_symmetric(x, dim=-1)):
        logits = model(TOKENS)
    assert logits.dtype == torch.bfloat16
    assert not torch.equal(logits, before)
    assert torch.equal(model(TOKENS), before)


def test_weights_and_activations_are_quantized_together():
    model = tiny_llama()
    with (
        quantized_weights(model, lambda _, w: round_to_nearest(w, 8), TOKENS),
        quantized_activations(model, lambda x: quantize_symmetric(x, dim=-1)),
    ):
        both = model(TOKENS)
    with replaced_weights(model, lambda _, w: round_to_nearest(w, 8)[0]):
        weights_only = model(TOKENS)
    exact = model(TOKENS)
    assert not torch.equal(both, weights_only)
    assert (both - exact).norm() / exact.norm() < 0.1


def test_statistics_are_those_of_a_channel_that_stands_out():
    model = tiny_llama()
    with torch.no_grad():
        model.layers[1].post_attention_layernorm.weight[5] *= 1000
    statistics = activation_statistics(model, TOKENS)
    inputs = linear_inputs(model, TOKENS)
    assert list(statistics) == list(linear_layers(model))
    for name, (absmax, median, largest) in statistics.items():
        columns = [max(abs(v) for v in column) for column in inputs[name].T.tolist()]
        assert absmax.tolist() == pytest.approx(columns)
        assert median == pytest.approx(sorted(columns)[(len(columns) - 1) // 2])
        assert largest == pytest.approx(max(columns))
    assert statistics["layers.1.mlp.up_proj"].absmax.argmax() == 5
    assert statistics["layers.1.mlp.up_proj"].max > 100 * statistics["layers.1.mlp.up_proj"].median


def test_statistics_can_leave_out_the_first_tokens_of_every_row():
    model = tiny_llama()
    inputs = linear_inputs(model, TOKENS)
    for name, (absmax, _, _) in activation_statistics(model, TOKENS, ignore_first=1).items():
        assert torch.equal(absmax, inputs[name][[1, 2, 3, 5, 6, 7]].abs().amax(0))
