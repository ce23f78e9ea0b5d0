import pytest
import torch

from fewer.models import linear_layers, replaced_weights, tiny_llama


def bits(model):
    return {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}


def same(left, right):
    return left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left)


def test_linear_layers_are_the_seven_matrices_of_each_block_in_order():
    model = tiny_llama(n_layers=3)
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    assert list(linear_layers(model)) == [f"layers.{i}.{part}" for i in range(3) for part in parts]
    for name, layer in linear_layers(model).items():
        assert model.get_submodule(name) is layer


def test_replaced_weights_are_those_of_the_transform_and_nothing_else_changes():
    model, before = tiny_llama(), bits(tiny_llama())
    with replaced_weights(model, lambda name, w: w * (2 if "down" in name else 1)):
        for name, p in model.named_parameters():
            expected = before[name].view(torch.float32) * (2 if "down" in name else 1)
            assert p.equal(expected), name


def test_weights_come_back_bit_for_bit_even_those_that_compare_oddly():
    model = tiny_llama()
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[0, :2] = torch.tensor([float("nan"), -0.0])
    before, parameters = bits(model), dict(model.named_parameters())
    with replaced_weights(model, lambda _, w: torch.zeros_like(w)):
        pass
    assert same(bits(model), before)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_weights_come_back_after_an_error_inside_the_block_or_the_transform():
    model = tiny_llama()
    before = bits(model)
    with pytest.raises(RuntimeError, match="inside"), replaced_weights(model, lambda _, w: w + 1):
        raise RuntimeError("inside")
    assert same(bits(model), before)

    def fails_late(name, w):
        if name.startswith("layers.1"):
            raise RuntimeError("late")
        return w + 1

    with pytest.raises(RuntimeError, match="late"), replaced_weights(model, fails_late):
        pass
    assert same(bits(model), before)


def test_a_transform_that_works_in_place_does_no_harm():
    model = tiny_llama()
    before = bits(model)
    with replaced_weights(model, lambda _, w: w.mul_(3)):
        assert not same(bits(model), before)
    assert same(bits(model), before)


def test_another_shape_is_refused_by_name():
    model = tiny_llama()
    message = r"transform must return a weight of shape \(32, 16\) for layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=message), replaced_weights(model, lambda _, w: w.T):
        pass


def test_another_dtype_is_converted_to_the_layers():
    model = tiny_llama().bfloat16()
    with replaced_weights(model, lambda _, w: w.double()):
        assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16
