import pytest
import torch

from fewer.models import (
    compressed_sequentially,
    input_hessian,
    inverse_cholesky,
    linear_layers,
    output_error,
    tiny_llama,
)

TOKENS = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(1))


def bits(model):
    return {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}


def same(left, right):
    return left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left)


def coarse(name, w, x):
    return (w * 2).round() / 2


def inputs_of(model, name, tokens):
    """What a layer reads, a window at a time: nothing but an ordinary forward pass."""
    seen = []
    hook = linear_layers(model)[name].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    for window in tokens:
        model(window[None])
    hook.remove()
    return torch.cat(seen)


def test_each_layer_is_given_the_inputs_it_has_once_all_layers_before_it_are_compressed():
    model, given = tiny_llama(), {}

    def compress(name, w, x):
        given[name] = x
        return coarse(name, w, x)

    with compressed_sequentially(model, TOKENS, compress):
        pass
    assert list(given) == list(linear_layers(model))
    slow = tiny_llama().requires_grad_(False)
    for name, layer in linear_layers(slow).items():
        expected = inputs_of(slow, name, TOKENS).reshape(-1, layer.in_features)
        torch.testing.assert_close(given[name], expected, rtol=1e-4, atol=1e-5)
        layer.weight.copy_(coarse(name, layer.weight, None))


def test_inside_the_block_the_weights_are_those_returned_and_the_hooks_are_gone():
    model, calls = tiny_llama(), []

    def compress(name, w, x):
        calls.append(name)
        return w.mul_(3)  # in place, on a copy

    before = bits(model)
    with compressed_sequentially(model, TOKENS, compress):
        for name, layer in linear_layers(model).items():
            original = before[f"{name}.weight"].view(torch.float32)
            assert layer.weight.equal(original * 3)
            assert not layer._forward_pre_hooks
        assert model.norm.weight.equal(before["norm.weight"].view(torch.float32))
        model(TOKENS)
    assert len(calls) == len(linear_layers(model))
    assert same(bits(model), before)


def test_weights_come_back_bit_for_bit_after_the_block_after_an_error_in_it_and_in_compress():
    model = tiny_llama()
    before, parameters = bits(model), dict(model.named_parameters())

    def fails_late(name, w, x):
        if name == "layers.1.mlp.up_proj":
            raise RuntimeError("late")
        return w + 1

    with compressed_sequentially(model, TOKENS, coarse):
        assert not same(bits(model), before)
    assert same(bits(model), before)
    with (
        pytest.raises(RuntimeError, match="inside"),
        compressed_sequentially(model, TOKENS, coarse),
    ):
        raise RuntimeError("inside")
    assert same(bits(model), before)
    with (
        pytest.raises(RuntimeError, match="late"),
        compressed_sequentially(model, TOKENS, fails_late),
    ):
        pass
    assert same(bits(model), before)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert not any(layer._forward_pre_hooks for layer in linear_layers(model).values())


def test_a_model_in_bfloat16_calibrates_in_float32_and_stays_bfloat16():
    model, dtypes = tiny_llama().bfloat16(), set()

    def compress(name, w, x):
        dtypes.add(x.dtype)
        return w.double()

    with compressed_sequentially(model, TOKENS, compress):
        assert model(TOKENS).dtype == torch.bfloat16
    assert dtypes == {torch.float32}


def test_wrong_arguments_are_refused_by_name():
    model, message = tiny_llama(), r"compress must return a weight of shape \(32, 16\)"
    with (
        pytest.raises(ValueError, match=message),
        compressed_sequentially(model, TOKENS, lambda _, w, x: w.T),
    ):
        pass
    for tokens in (TOKENS[0], TOKENS[:, :0]):
        with (
            pytest.raises(ValueError, match="tokens must be"),
            compressed_sequentially(model, tokens, coarse),
        ):
            pass


def test_the_hessian_turns_a_change_of_weights_into_the_squared_error_of_the_output():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    w, w_hat = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    H = input_hessian(x)
    expected = ((w - w_hat) @ x.reshape(-1, 6).T).square().sum().item()
    assert output_error(w, w_hat, H) == pytest.approx(expected)
    assert torch.allclose(H, sum(input_hessian(part) for part in x))
    assert input_hessian(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_the_factor_is_upper_triangular_and_squares_to_the_inverse_of_the_damped_hessian(damp):
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 3, 9)
    H = input_hessian(x).double()
    U = inverse_cholesky(H, damp)
    assert U.dtype == torch.float64
    assert U.tril(-1).eq(0).all()
    assert (U.diagonal() > 0).all()
    damped = H + damp * H.diagonal().mean() * torch.eye(9)
    torch.testing.assert_close(U @ damped @ U.T, torch.eye(9).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(inverse_cholesky(H * 9, damp), U / 3)


def test_every_tail_of_the_factor_belongs_to_the_hessian_of_the_columns_left():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    U, H = inverse_cholesky(x.T @ x, 0.0), x.T @ x
    for j in range(6):
        left = torch.linalg.inv(H[j:, j:])
        torch.testing.assert_close(U[j, j] * U[j, j:], left[0])


def test_a_hessian_without_data_counts_as_the_identity_and_a_singular_one_needs_damping():
    assert inverse_cholesky(torch.zeros(3, 3)).equal(torch.eye(3).double())
    with pytest.raises(ValueError, match="a larger damp helps"):
        inverse_cholesky(torch.ones(3, 3), damp=0.0)
    inverse_cholesky(torch.ones(3, 3), damp=0.01)


@pytest.mark.parametrize(
    ("hessian", "damp", "message"),
    [
        (torch.ones(2, 3), 0.01, "hessian must be a square matrix"),
        (torch.full((2, 2), float("nan")), 0.01, "hessian must be finite"),
        (torch.eye(2), -0.1, "damp must be at least 0, got -0.1"),
        (torch.eye(2), float("nan"), "damp must be at least 0, got nan"),
    ],
)
def test_a_hessian_or_damp_that_makes_no_sense_is_refused(hessian, damp, message):
    with pytest.raises(ValueError, match=message):
        inverse_cholesky(hessian, damp)
