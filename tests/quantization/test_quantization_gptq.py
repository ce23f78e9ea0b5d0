import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.models import input_hessian, output_error
from fewer.quantization import (
    dequantize_per_group,
    quantize_gptq,
    quantize_per_group,
    quantize_to_grid,
)


def problem(seed, rows=8, columns=24, tokens=200, rank=6):
    """A layer whose inputs are correlated and differ in size, as real ones are; in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, rank, generator=generator, dtype=torch.float64) @ mix
    x += 0.3 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x *= torch.rand(columns, generator=generator, dtype=torch.float64) * 3 + 0.1
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return w, input_hessian(x)


def restored(result, w, group_size):
    return dequantize_per_group(*result, group_size=group_size or w.shape[1])


def same(left, right):
    """Codes and zero-points equal, scales equal up to the rounding of float64."""
    for a, b in zip(left, right, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


def obq_column_loop(w, H, bits, group_size, symmetric, damp):
    """Optimal Brain Quantization in fixed order: a fresh inverse at every step, no Cholesky."""
    w, columns = w.clone(), w.shape[1]
    H = H + damp * H.diagonal().mean() * torch.eye(columns, dtype=H.dtype)
    codes, scales, zeros = [], [], []
    for j in range(columns):
        if j % group_size == 0:
            group = w[:, j : j + group_size]
            if symmetric:
                scale, zero = group.abs().amax(1) / (2 ** (bits - 1) - 1), 0
                low, high = 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
            else:
                least, most = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                low, high = 0, 2**bits - 1
                scale = (most - least) / high
                zero = (-least / scale).round()
                zeros.append(zero)
            scales.append(scale)
        q = ((w[:, j] / scale).round() + zero).clamp(low, high)
        inverse = torch.linalg.inv(H[j:, j:])
        change = (w[:, j] - (q - zero) * scale) / inverse[0, 0]
        w[:, j:] -= change[:, None] * inverse[0]
        codes.append(q)
    zero_point = None if symmetric else torch.stack(zeros, 1).int()
    codes = torch.stack(codes, 1).to(torch.int8 if symmetric else torch.uint8)
    return codes, torch.stack(scales, 1), zero_point


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([1, 5, 8, 24]),
    symmetric=st.booleans(),
    block=st.sampled_from([1, 3, 8, 128]),
)
def test_gptq_is_optimal_brain_quantization_in_column_order(
    seed, bits, group_size, symmetric, block
):
    w, H = problem(seed)
    expected = obq_column_loop(w, H, bits, group_size, symmetric, damp=0.01)
    same(quantize_gptq(w, H, bits, group_size, symmetric, block=block), expected)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    group_size=st.sampled_from([None, 5, 8, 16]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    block=st.sampled_from([1, 2, 7, 8, 23, 24]),
)
def test_the_block_size_changes_nothing(seed, group_size, symmetric, act_order, block):
    w, H = problem(seed)
    blocked = quantize_gptq(w, H, 3, group_size, symmetric, act_order, block=block)
    same(blocked, quantize_gptq(w, H, 3, group_size, symmetric, act_order, block=128))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([1, 5, 24, 100]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
)
def test_inputs_without_correlation_leave_rounding_to_nearest(
    seed, bits, group_size, symmetric, act_order
):
    w, H = problem(seed)
    rounded = quantize_per_group(w, bits, group_size, symmetric)
    for diagonal in (torch.ones(24), torch.rand(24) * 100, torch.zeros(24)):
        H = torch.diag(diagonal).double()
        same(quantize_gptq(w, H, bits, group_size, symmetric, act_order), rounded)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, None), (3, 8), (3, None)])
def test_the_output_error_is_below_that_of_rounding_to_nearest(
    bits, group_size, symmetric, act_order
):
    ratios = []
    for seed in range(25):
        w, H = problem(seed, rows=16, columns=32)
        nearest = quantize_per_group(w, bits, group_size or 32, symmetric)
        ours = quantize_gptq(w, H, bits, group_size, symmetric, act_order)
        error = output_error(w, restored(ours, w, group_size), H)
        ratios.append(error / output_error(w, restored(nearest, w, group_size), H))
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.6


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), symmetric=st.booleans())
def test_with_act_order_the_order_of_the_inputs_makes_no_difference(seed, symmetric):
    w, H = problem(seed)
    codes, scale, zero = quantize_gptq(w, H, 4, None, symmetric, act_order=True)
    p = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    same(
        quantize_gptq(w[:, p], H[p][:, p], 4, None, symmetric, act_order=True),
        (codes[:, p], scale, zero),
    )
    largest_first = H.diagonal().argsort(descending=True)
    sorted_codes, *_ = quantize_gptq(
        w[:, largest_first], H[largest_first][:, largest_first], 4, None
    )
    if symmetric:
        assert sorted_codes.equal(codes[:, largest_first])


def test_with_act_order_groups_keep_the_scales_of_the_original_weights():
    w, H = problem(3)
    codes, scale, zero = quantize_gptq(w, H, 3, 5, symmetric=False, act_order=True)
    _, expected_scale, expected_zero = quantize_per_group(w, 3, 5, symmetric=False)
    assert scale.equal(expected_scale)
    assert zero.equal(expected_zero)
    first = int(H.diagonal().argmax())  # the column walked first is rounded to nearest
    nearest, *_ = quantize_per_group(w, 3, 5, symmetric=False)
    assert codes[:, first].equal(nearest[:, first])


def test_act_order_pays_where_inputs_differ_much_in_size():
    better = 0
    for seed in range(20):
        w, H = problem(seed, rows=16, columns=32)
        sizes = torch.logspace(-2, 1, 32, dtype=torch.float64)  # the largest last
        H = H * sizes * sizes[:, None]
        plain, ordered = (quantize_gptq(w, H, 3, act_order=a) for a in (False, True))
        better += output_error(w, restored(ordered, w, None), H) < output_error(
            w, restored(plain, w, None), H
        )
    assert better >= 18


def test_an_input_that_never_occurs_is_rounded_to_nearest_and_disturbs_nobody():
    w, H = problem(0)
    dead = [3, 11]
    H[dead] = 0
    H[:, dead] = 0
    nearest, *_ = quantize_per_group(w, 4, 24)
    codes, scale, _ = quantize_gptq(w, H, 4)
    assert codes[:, dead].equal(nearest[:, dead])
    other = w.clone()
    other[:, dead] *= -1  # the scale of the row stays
    assert quantize_gptq(other, H, 4)[0].ne(codes).any(0).nonzero().flatten().tolist() == dead
    assert scale.isfinite().all()


def test_the_scale_of_the_hessian_makes_no_difference_and_much_damping_is_rounding_to_nearest():
    w, H = problem(1)
    same(quantize_gptq(w, H * 1024, 4), quantize_gptq(w, H, 4))
    same(quantize_gptq(w, H, 4, 8, damp=1e9), quantize_per_group(w, 4, 8))
    assert not quantize_gptq(w, H, 4)[0].equal(quantize_per_group(w, 4, 24)[0])


def test_nothing_given_is_modified_and_small_types_are_computed_in_float32():
    w, H = problem(2)
    w = w.bfloat16()
    kept, kept_H = w.clone(), H.clone()
    codes, scale, zero = quantize_gptq(w, H, 4, 8, symmetric=False)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float32, torch.int32)
    assert (codes.shape, scale.shape, zero.shape) == ((8, 24), (8, 3), (8, 3))
    assert w.equal(kept)
    assert H.equal(kept_H)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_made_from_the_tensor_itself_gives_the_codes_of_quantizing_it(symmetric):
    w, _ = problem(4)
    codes, scale, zero = quantize_per_group(w, 4, 24, symmetric)
    assert quantize_to_grid(w, scale, zero, 4).equal(codes)
    beyond = quantize_to_grid(w * 100, scale, zero, 4)
    assert (int(beyond.min()), int(beyond.max())) == ((-7, 7) if symmetric else (0, 15))
    assert beyond.dtype == codes.dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.eye(3)}, r"hessian must be \(24, 24\), got \(3, 3\)"),
        ({"bits": 9}, "bits must be between 2 and 8, got 9"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"damp": -1.0}, "damp must be at least 0"),
        ({"w": torch.full((8, 24), float("inf"))}, "w must be finite"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    w, H = problem(0)
    with pytest.raises(ValueError, match=message):
        quantize_gptq(**{"w": w, "hessian": H, **change})
