"""Properties of SmoothQuant: scales, folding, the search of alpha, and the model as a function."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.models import linear_layers, replaced_weights, tiny_llama
from fewer.models.hooks import linear_inputs
from fewer.quantization.smoothquant import (
    calibrate_smoothing,
    fold_scales,
    search_alpha,
    smoothed,
    smoothing_groups,
    smoothing_scales,
)
from fewer.quantization.uniform import dequantize, quantize_symmetric

SEEDS = st.integers(0, 2**32 - 1)
ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]
MAGNITUDES = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=8)


def layer_with_outliers(seed, tokens=20, features=16, out=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    x[:, 3] *= 60
    return x, torch.randn(out, features, generator=generator)


def quantized_output_error(x, w, s, bits=8, dim=None):
    x_hat = dequantize(*quantize_symmetric(x / s, bits, dim=dim))
    w_hat = dequantize(*quantize_symmetric(w * s, bits, dim=-1))
    return (x_hat @ w_hat.T - x @ w.T).norm().item()


@given(MAGNITUDES, st.floats(0, 1))
def test_every_channel_has_the_scale_of_equation_4(magnitudes, alpha):
    x_absmax, w_absmax = (torch.tensor(column).double() for column in zip(*magnitudes, strict=True))
    s = smoothing_scales(x_absmax, w_absmax, alpha)
    expected = [x**alpha / w ** (1 - alpha) for x, w in magnitudes]
    torch.testing.assert_close(s, torch.tensor(expected).double(), rtol=1e-6, atol=0)


@given(MAGNITUDES)
def test_at_one_half_both_sides_of_a_channel_get_the_same_maximum(magnitudes):
    x_absmax, w_absmax = (torch.tensor(column) for column in zip(*magnitudes, strict=True))
    s = smoothing_scales(x_absmax, w_absmax, 0.5)
    torch.testing.assert_close(x_absmax / s, w_absmax * s)


def test_the_ends_put_all_of_the_difficulty_on_one_side():
    x_absmax, w_absmax = torch.tensor([8.0, 0.5]), torch.tensor([0.25, 4.0])
    assert torch.equal(x_absmax / smoothing_scales(x_absmax, w_absmax, 1.0), torch.ones(2))
    assert torch.equal(w_absmax * smoothing_scales(x_absmax, w_absmax, 0.0), torch.ones(2))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_channels_of_zeros_are_left_alone(alpha):
    s = smoothing_scales(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]), alpha)
    assert s.tolist() == [1, 1, 1]


def test_scales_refuse_what_they_cannot_be_made_of():
    one = torch.ones(2)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha must be between 0 and 1, got"):
            smoothing_scales(one, one, alpha)
    with pytest.raises(ValueError, match="x_absmax and w_absmax must have the same shape"):
        smoothing_scales(one, torch.ones(3))
    with pytest.raises(ValueError, match="must not be negative"):
        smoothing_scales(one, -one)
    with pytest.raises(ValueError, match="x_absmax must be finite"):
        smoothing_scales(one / 0, one)


@given(SEEDS, st.booleans())
def test_folding_leaves_what_the_consumers_compute_as_it_was(seed, norm):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(5, 6, generator=generator).double()
    producer = torch.randn((6,) if norm else (4, 6), generator=generator).double()
    size = 6 if norm else 4
    consumers = [torch.randn(out, size, generator=generator).double() for out in (3, 1)]
    s = torch.rand(size, generator=generator).double() * 10 + 0.01
    new, weights = fold_scales(s, producer, consumers)
    assert new.shape == producer.shape

    def x(weight):
        return z * weight if norm else z @ weight.T

    torch.testing.assert_close(x(new), x(producer) / s)
    for w, before in zip(weights, consumers, strict=True):
        torch.testing.assert_close(x(new) @ w.T, x(producer) @ before.T)


def test_folding_refuses_scales_and_shapes_that_do_not_fit():
    s, norm, w = torch.ones(2), torch.ones(2), torch.ones(3, 2)
    for bad in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0]), torch.ones(1, 2)):
        with pytest.raises(ValueError, match="s must be a vector of positive numbers"):
            fold_scales(bad, norm, [w])
    with pytest.raises(ValueError, match=r"must agree with s on in = 2, got \[\(2,\), \(2, 3\)\]"):
        fold_scales(s, norm, [w.T])
    with pytest.raises(ValueError, match="must agree with s on in = 2"):
        fold_scales(s, torch.ones(3, 2), [w])


@given(SEEDS, st.sampled_from([4, 8]), st.booleans())
def test_the_search_finds_the_alpha_of_least_output_error(seed, bits, per_token):
    x, w = layer_with_outliers(seed)
    best = search_alpha(x, w, ALPHAS, bits, per_token)
    dim = -1 if per_token else None
    absmax = x.abs().amax(0), w.abs().amax(0)
    errors = {
        alpha: quantized_output_error(x, w, smoothing_scales(*absmax, alpha), bits, dim)
        for alpha in ALPHAS
    }
    assert errors[best] <= min(errors.values()) * 1.0001


@given(SEEDS)
def test_smoothing_beats_no_smoothing_where_a_channel_is_far_out(seed):
    x, w = layer_with_outliers(seed)
    absmax = x.abs().amax(0), w.abs().amax(0)
    s = smoothing_scales(*absmax, search_alpha(x, w, ALPHAS))
    assert quantized_output_error(x, w, s) < 0.5 * quantized_output_error(x, w, torch.ones(16))


def test_equally_good_alphas_give_the_first_and_no_alphas_are_refused():
    x, w = layer_with_outliers(0)
    assert search_alpha(torch.zeros(2, 3), torch.zeros(1, 3), [0.7, 0.2]) == 0.7
    assert search_alpha(x, w, [0.3]) == 0.3
    with pytest.raises(ValueError, match="alphas must hold at least one candidate"):
        search_alpha(x, w, [])
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 2"):
        search_alpha(x, w, [0.5, 2])


def test_groups_hold_every_linear_layer_but_o_proj_once():
    model = tiny_llama(n_layers=3)
    consumers = [name for names in smoothing_groups(model).values() for name in names]
    assert len(consumers) == len(set(consumers))
    assert set(consumers) == {name for name in linear_layers(model) if "o_proj" not in name}


def test_the_consumers_of_a_group_read_the_same_input():
    model = tiny_llama()
    inputs = linear_inputs(model, torch.tensor([[1, 2, 3]]))
    for consumers in smoothing_groups(model).values():
        assert all(torch.equal(inputs[name], inputs[consumers[0]]) for name in consumers)


@given(SEEDS, st.sampled_from([[0.0], [0.5], [1.0], ALPHAS]))
def test_a_smoothed_model_is_the_same_function(seed, alphas):
    model = tiny_llama(seed).double()
    generator = torch.Generator().manual_seed(seed)
    calibration, tokens = torch.randint(0, 64, (2, 2, 9), generator=generator)
    before = model(tokens)
    with smoothed(model, calibrate_smoothing(model, calibration, alphas)):
        # Norms compute in float32 inside, whatever the dtype of the model.
        torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)


def test_inside_the_block_every_channel_is_divided_by_its_scale():
    model, tokens = tiny_llama(), torch.tensor([[1, 2, 3, 4]])
    scales = calibrate_smoothing(model, tokens, [0.5])
    before = linear_inputs(model, tokens)
    with smoothed(model, scales):
        after = linear_inputs(model, tokens)
    for producer, consumers in smoothing_groups(model).items():
        assert not torch.allclose(scales[producer], torch.ones_like(scales[producer]))
        for name in consumers:
            torch.testing.assert_close(
                after[name], before[name] / scales[producer], rtol=1e-4, atol=1e-5
            )
    torch.testing.assert_close(
        after["layers.1.self_attn.o_proj"], before["layers.1.self_attn.o_proj"]
    )


def test_calibrated_scales_balance_the_inputs_with_all_weights_that_read_them():
    model, tokens = tiny_llama(), torch.tensor([[1, 2, 3, 4]])
    scales = calibrate_smoothing(model, tokens, [0.5])
    with smoothed(model, scales):
        inputs = linear_inputs(model, tokens)
        for consumers in smoothing_groups(model).values():
            weights = torch.cat([model.get_submodule(name).weight for name in consumers])
            x_absmax = inputs[consumers[0]].abs().amax(0)
            if consumers[0].endswith("gate_proj"):
                continue  # up_proj's rows also carry down_proj's 1/s by now
            torch.testing.assert_close(x_absmax, weights.abs().amax(0), rtol=1e-4, atol=1e-5)


def test_the_model_comes_back_bit_for_bit_also_after_an_error():
    model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
    before, parameters = model(tokens), dict(model.named_parameters())
    scales = calibrate_smoothing(model, tokens)
    with pytest.raises(RuntimeError, match="inside"), smoothed(model, scales):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="must agree with s on in"):
        smoothed(model, {**scales, "layers.1.mlp.up_proj": torch.ones(3)}).__enter__()
    with pytest.raises(ValueError, match=r"scales must be of the model's .* got \['norm'\]"):
        smoothed(model, {"norm": torch.ones(16)}).__enter__()
    with smoothed(model, scales), replaced_weights(model, lambda _, w: w.round()):
        assert not torch.equal(model(tokens), before)
    assert torch.equal(model(tokens), before)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_a_part_of_the_groups_may_be_smoothed_alone():
    model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
    scales = calibrate_smoothing(model, tokens, [0.5])
    before, inputs = model(tokens), linear_inputs(model, tokens)
    with smoothed(model, {"layers.1.mlp.up_proj": scales["layers.1.mlp.up_proj"]}):
        torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)
        assert torch.equal(
            linear_inputs(model, tokens)["layers.1.mlp.up_proj"], inputs["layers.1.mlp.up_proj"]
        )
