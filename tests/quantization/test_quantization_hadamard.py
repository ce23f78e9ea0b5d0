"""Properties of the Walsh-Hadamard transform and of rotated layers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.models import replaced_weights, tiny_llama
from fewer.models.hooks import replaced_inputs
from fewer.quantization.hadamard import (
    fwht,
    hadamard_factor,
    hadamard_matrix,
    hadamard_rotate,
    paley_matrix,
    random_signs,
    rotated,
)
from fewer.quantization.uniform import dequantize, quantize_symmetric

SEEDS = st.integers(0, 2**32 - 1)
SIZES = [1, 2, 4, 8, 64, 256, 12, 24, 48, 28, 36, 72, 60, 76, 576]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", SIZES)
def test_the_matrix_has_entries_of_size_one_is_symmetric_and_has_orthogonal_rows(n):
    H = hadamard_matrix(n)
    assert H.shape == (n, n)
    assert torch.equal(H.abs(), torch.ones(n, n))
    assert torch.equal(H, H.T)
    assert torch.equal(H @ H, n * torch.eye(n))  # sums of n ones: exact in float32


@pytest.mark.parametrize("n", [2**k for k in range(9)])
def test_powers_of_two_equal_scipys_matrix(n):
    linalg = pytest.importorskip("scipy.linalg")
    assert hadamard_matrix(n).tolist() == linalg.hadamard(n).tolist()


@pytest.mark.parametrize("n", [24, 48, 576])
def test_other_sizes_are_kronecker_products_with_paleys_matrix_inside(n):
    m = hadamard_factor(n)
    expected = torch.kron(hadamard_matrix(n // m), paley_matrix(m))
    assert torch.equal(hadamard_matrix(n), expected)


@given(SEEDS, st.sampled_from(SIZES))
def test_the_fast_transform_is_the_product_with_the_matrix(seed, n):
    x = normal(seed, 2, 3, n)
    expected = x @ hadamard_matrix(n).double() / math.sqrt(n)
    torch.testing.assert_close(fwht(x), expected, rtol=1e-12, atol=1e-12)


@given(SEEDS, st.sampled_from([*SIZES, 1536]))
def test_the_transform_is_its_own_inverse_and_keeps_lengths_and_angles(seed, n):
    x = normal(seed, 4, n)
    y = fwht(x)
    torch.testing.assert_close(fwht(y), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-11)


def test_one_far_value_becomes_n_small_ones():
    x = torch.zeros(576)
    x[100] = 1000.0
    torch.testing.assert_close(fwht(x).abs(), torch.full((576,), 1000 / 24))


def test_any_memory_layout_dtype_and_batch():
    x = normal(0, 24, 5)
    torch.testing.assert_close(fwht(x.T), fwht(x.T.contiguous()), rtol=0, atol=0)
    assert fwht(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.float32
    assert fwht(torch.ones(0, 12)).shape == (0, 12)
    before = x.clone()
    fwht(x.T)
    assert torch.equal(x, before)


def test_the_number_of_additions_is_that_of_the_docstring(monkeypatch):
    """Counted on 1536 = 128 * 12, by the shapes that pass through + and -."""
    count = 0

    class Counted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            nonlocal count
            result = super().__torch_function__(function, types, args, kwargs or {})
            name = function.__name__.strip("_")  # an operator is add or __add__, by version
            if name in ("add", "sub"):
                count += result.numel()
            if name == "matmul":
                count += result.numel() * (args[0].shape[-1] - 1)
            return result

    fwht(torch.ones(1536).as_subclass(Counted))
    assert count == 1536 * (7 + 11)


@pytest.mark.parametrize("n", [3, 6, 9, 18, 20, 44, 52, 100])
def test_sizes_without_a_factor_are_refused(n):
    with pytest.raises(ValueError, match=f"n must be a power of two, or .* got {n} ="):
        hadamard_factor(n)
    with pytest.raises(ValueError, match="n must be"):
        fwht(torch.ones(n))


def test_what_cannot_be_transformed_is_refused_by_name():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        fwht(torch.ones(2, 0))
    with pytest.raises(ValueError, match="x must have at least one dimension"):
        fwht(torch.tensor(1.0))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        fwht(torch.ones(4, dtype=torch.int64))
    for m in (1, 2, 20, 24):
        with pytest.raises(ValueError, match=r"m must be 2 \(q \+ 1\)|n must be"):
            paley_matrix(m)
    with pytest.raises(ValueError, match=r"signs must be \[4\] values of 1 or -1"):
        hadamard_rotate(torch.ones(2, 4), torch.ones(2))
    with pytest.raises(ValueError, match=r"signs must be \[2\] values of 1 or -1"):
        hadamard_rotate(torch.ones(2, 2), torch.tensor([1.0, 0.0]))


def test_signs_are_repeatable_of_both_kinds_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    signs = random_signs(1000, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(signs, random_signs(1000, seed=3))
    assert not torch.equal(signs, random_signs(1000, seed=4))
    assert 400 < (signs == 1).sum() < 600
    assert 400 < (signs == -1).sum() < 600


@given(SEEDS, st.sampled_from([8, 12, 24, 36]))
def test_rotating_both_sides_leaves_the_output_as_it_was(seed, n):
    x, w, signs = normal(seed, 2, 3, n), normal(seed + 1, 5, n), random_signs(n, seed)
    rotated_output = hadamard_rotate(x, signs) @ hadamard_rotate(w, signs).T
    torch.testing.assert_close(rotated_output, x @ w.T, rtol=1e-10, atol=1e-10)


def test_a_row_of_the_matrix_itself_is_spread_by_the_signs():
    row = hadamard_matrix(64)[5]
    assert fwht(row).abs().max() == 8  # all of its energy in one value
    assert hadamard_rotate(row, random_signs(64)).abs().max() < 4


@given(SEEDS, st.sampled_from([4, 8]))
def test_an_outlier_channel_costs_far_less_after_the_rotation(seed, bits):
    x, w, signs = normal(seed, 16, 64), normal(seed + 1, 8, 64), random_signs(64, seed)
    x[:, 7] *= 20

    def error(x, w):
        x_hat = dequantize(*quantize_symmetric(x, bits, dim=-1))
        return ((x_hat - x) @ w.T).norm()

    # 0.17 to 0.43 over 200 seeds; without a rotation of W as well, far above 1.
    assert error(hadamard_rotate(x, signs), hadamard_rotate(w, signs)) < 0.6 * error(x, w)


def test_a_rotated_model_is_the_same_function_and_comes_back_bit_for_bit():
    model, tokens = tiny_llama(), torch.tensor([[1, 2, 3, 60], [4, 5, 6, 0]])
    before = model(tokens)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with rotated(model, seed=5):
        torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)
        down = model.layers[0].mlp.down_proj.weight
        expected = hadamard_rotate(weights["layers.0.mlp.down_proj.weight"], random_signs(24, 5))
        torch.testing.assert_close(down.detach(), expected.detach())
    assert torch.equal(model(tokens), before)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_inner_blocks_see_rotated_weights_and_inputs():
    model, tokens, seen = tiny_llama(), torch.tensor([[1, 2, 3]]), {}

    def see(kind):
        def transform(name, tensor):
            seen[kind, name] = tensor.detach().clone()
            return tensor

        return transform

    with replaced_weights(model, see("plain w")), replaced_inputs(model, see("plain x")):
        model(tokens)
    with (
        rotated(model),
        replaced_weights(model, see("rotated w")),
        replaced_inputs(model, see("rotated x")),
    ):
        model(tokens)
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        for kind in "xw":
            plain, turned = seen[f"plain {kind}", name], seen[f"rotated {kind}", name]
            assert not torch.allclose(plain, turned, atol=0.1)
            torch.testing.assert_close(plain.norm(dim=-1), turned.norm(dim=-1))
