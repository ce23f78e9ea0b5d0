import pytest
import torch
from torch import nn

from fewer.models import linear_layers, replaced_weights, tiny_llama
from fewer.models.hooks import linear_inputs, replaced_inputs, replaced_products

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def as_it_was(model):
    return all(
        not layer._forward_pre_hooks and "forward" not in vars(layer)
        for layer in linear_layers(model).values()
    )


def test_every_linear_layer_reads_the_transformed_input_under_its_own_name():
    model, called = tiny_llama(), []

    def double(name, x):
        called.append(name)
        return 2 * x

    with replaced_inputs(model, double):
        doubled = model(TOKENS)
    assert called == list(linear_layers(model))
    with replaced_weights(model, lambda _, w: 2 * w):
        torch.testing.assert_close(doubled, model(TOKENS))
    assert as_it_was(model)


def test_of_nested_blocks_the_outer_one_changes_the_input_first():
    layer, seen = nn.Sequential(nn.Linear(1, 1)), []

    def add(_, x):
        return x + 1

    def triple(_, x):
        seen.append(x.item())
        return 3 * x

    with replaced_inputs(layer, add), replaced_inputs(layer, triple):
        y = layer(torch.tensor([[1.0]]))
    assert seen == [2]
    torch.testing.assert_close(y, nn.functional.linear(torch.tensor([[6.0]]), *layer.parameters()))


def test_a_product_takes_the_place_of_the_layers_own_and_its_bias_is_added():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False)), torch.randn(5, 3)
    names = []

    def negated(name, x, w):
        names.append(name)
        return -(x @ w.T)

    with replaced_products(model, negated):
        y = model(x)
    assert names == ["0", "1"]
    hidden = -(x @ model[0].weight.T) + model[0].bias
    torch.testing.assert_close(y, -(hidden @ model[1].weight.T))
    assert as_it_was(model)


def test_products_see_the_inputs_and_weights_of_the_blocks_around_them():
    model, before = tiny_llama(), tiny_llama()(TOKENS)
    with (
        replaced_inputs(model, lambda _, x: 4 * x),
        replaced_weights(model, lambda _, w: w / 4),
        replaced_products(model, lambda _, x, w: x @ w.T),
    ):
        torch.testing.assert_close(model(TOKENS), before)


def test_of_nested_products_the_inner_one_wins_and_the_outer_one_comes_back():
    layer, x = nn.Sequential(nn.Linear(1, 1, bias=False)), torch.ones(1, 1)
    with replaced_products(layer, lambda *_: torch.tensor(1.0)):
        with replaced_products(layer, lambda *_: torch.tensor(2.0)):
            assert layer(x) == 2
        assert layer(x) == 1
    assert layer(x) == layer[0].weight


@pytest.mark.parametrize("block", [replaced_inputs, replaced_products])
def test_the_layers_are_as_they_were_after_an_error(block):
    model = tiny_llama()
    before = model(TOKENS)

    def fails(name, *_):
        raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="q_proj"), block(model, fails):
        model(TOKENS)
    assert as_it_was(model)
    assert torch.equal(model(TOKENS), before)


def test_inputs_are_what_the_layers_read_row_by_row():
    model = tiny_llama()
    inputs = linear_inputs(model, TOKENS)
    assert list(inputs) == list(linear_layers(model))
    block = model.layers[0]
    x = model.embed_tokens(TOKENS)
    expected = block.input_layernorm(x).flatten(0, 1)
    torch.testing.assert_close(inputs["layers.0.self_attn.k_proj"], expected.detach())
    alone = linear_inputs(model, TOKENS[1:])
    for name, layer in linear_layers(model).items():
        assert inputs[name].shape == (6, layer.in_features)
        assert not inputs[name].requires_grad
        torch.testing.assert_close(inputs[name][3:], alone[name])
    assert as_it_was(model)


def test_the_first_tokens_of_every_row_can_be_left_out():
    model = tiny_llama()
    inputs, later = linear_inputs(model, TOKENS), linear_inputs(model, TOKENS, ignore_first=2)
    for name, x in inputs.items():
        assert torch.equal(later[name], x[[2, 5]])
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"ignore_first must be between 0 and 2, got {wrong}"):
            linear_inputs(model, TOKENS, ignore_first=wrong)
