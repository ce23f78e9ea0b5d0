"""Properties of layer densities and of the FLOPs of training sparse."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fewer.sparsity import (
    Network,
    capped_densities,
    connection_counts,
    er_densities,
    erk_densities,
    forward_flops,
    initial_network,
    layer_sizes,
    logits,
    pruning_step_flops,
    random_masks,
    rigl_step_flops,
    step_flops,
    uniform_densities,
)

SHAPES = st.lists(
    st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
)
SPARSITIES = st.floats(0, 1)
LITERAL = [(2, 4), (3, 6), (2, 4, 6)]


def test_the_literal_fixture_of_erk():
    sparsities = [1 - d for d in erk_densities(LITERAL, 0.5)]
    assert sparsities == pytest.approx([0, 0.31, 0.655], abs=5e-4)


def test_the_literal_fixture_without_kernel_sizes():
    # The third shape is [kernel, in, out]; the same in torch's order [out, in, kernel].
    for shapes, channels in ((LITERAL, (-2, -1)), ([s[::-1] for s in LITERAL], (0, 1))):
        sparsities = [1 - d for d in er_densities(shapes, 0.5, channels)]
        assert sparsities == pytest.approx([0.21, 0.47, 0.56], abs=5e-3)


@given(SHAPES, SPARSITIES, st.sampled_from([uniform_densities, er_densities, erk_densities]))
def test_no_layer_is_denser_than_dense_and_the_total_is_exact(shapes, sparsity, method):
    densities = method(shapes, sparsity)
    sizes = layer_sizes(shapes)
    assert len(densities) == len(shapes)
    assert all(0 <= d <= 1 for d in densities)
    total = sum(d * n for d, n in zip(densities, sizes, strict=True))
    assert total == pytest.approx((1 - sparsity) * sum(sizes))
    counts = connection_counts(shapes, densities)
    assert abs(sum(counts) - (1 - sparsity) * sum(sizes)) <= 0.5 + 1e-6
    for count, d, n in zip(counts, densities, sizes, strict=True):
        assert 0 <= count <= n
        assert abs(count - d * n) < 1 + 1e-6


@given(SHAPES, SPARSITIES, st.sampled_from([er_densities, erk_densities]))
def test_layers_below_the_cap_keep_the_proportions_of_the_formula(shapes, sparsity, method):
    def ratio(shape):
        sides = shape[:2] if method is er_densities else shape
        return sum(sides) / math.prod(sides)

    densities = method(shapes, sparsity)
    epsilons = [d / ratio(shape) for d, shape in zip(densities, shapes, strict=True)]
    free = [e for e, d in zip(epsilons, densities, strict=True) if d < 1]
    capped = [e for e, d in zip(epsilons, densities, strict=True) if d == 1]
    assert free == pytest.approx([free[0]] * len(free) if free else [])
    # A layer is dense only because the common epsilon would take it there or beyond.
    assert all(e <= free[0] * (1 + 1e-9) for e in capped if free)


@given(SHAPES, SPARSITIES, SPARSITIES)
def test_more_sparsity_makes_no_layer_denser(shapes, one, other):
    low, high = sorted((one, other))
    denser, sparser = erk_densities(shapes, low), erk_densities(shapes, high)
    assert all(s <= d + 1e-9 for d, s in zip(denser, sparser, strict=True))


@given(SHAPES)
def test_sparsities_0_and_1_are_exact(shapes):
    for method in (uniform_densities, er_densities, erk_densities):
        assert connection_counts(shapes, method(shapes, 0.0)) == layer_sizes(shapes)
        assert method(shapes, 1.0) == [0.0] * len(shapes)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1), SPARSITIES)
def test_er_and_erk_are_the_same_for_linear_layers_in_either_order_of_sides(shapes, sparsity):
    erk = erk_densities(shapes, sparsity)
    assert erk == er_densities(shapes, sparsity)
    assert erk == erk_densities([s[::-1] for s in shapes], sparsity)


def test_the_small_last_layer_is_the_densest():
    hidden, last = erk_densities([(300, 784), (10, 100)], 0.95)
    assert last > 5 * hidden
    assert uniform_densities([(300, 784), (10, 100)], 0.95) == pytest.approx([0.05, 0.05])


def test_wrong_shapes_and_sparsities_are_named():
    with pytest.raises(ValueError, match="sparsity must be between 0 and 1"):
        erk_densities([(2, 3)], 1.2)
    with pytest.raises(ValueError, match="shapes must be one or more"):
        uniform_densities([], 0.5)
    with pytest.raises(ValueError, match="shapes must be one or more"):
        erk_densities([(2, 0)], 0.5)
    with pytest.raises(ValueError, match="densities must lie between 0 and 1"):
        connection_counts([(2, 2)], [1.5])
    with pytest.raises(ValueError, match="shorter"):
        capped_densities([3, 4], [1.0], 0.5)


# FLOPs


def sparse_step_by_hand(masks, weight_masks):
    """Multiply-adds of a training step of one example, one connection at a time.

    `weight_masks` says for which places the gradient of the weight is wanted.
    """
    count = 0
    for mask, wanted in zip(masks, weight_masks, strict=True):
        for o in range(mask.shape[0]):
            for i in range(mask.shape[1]):
                count += bool(mask[o, i])  # z[o] += w[o, i] * a[i]
                count += bool(mask[o, i])  # da[i] += w[o, i] * dz[o]
                count += bool(wanted[o, i])  # dw[o, i] += dz[o] * a[i]
    return count


@pytest.mark.parametrize("delta_T", [1, 3, 10])
def test_flops_equal_a_count_by_hand(delta_T):
    widths, connections = [6, 9, 4], [13, 7]
    masks = [m[0] for m in random_masks(widths, connections, [0])]
    everything = [torch.ones_like(m) for m in masks]
    f_S, f_D = forward_flops(connections), forward_flops([54, 36])
    sparse = 2 * sparse_step_by_hand(masks, masks)
    assert step_flops(f_S) == sparse
    update = 2 * sparse_step_by_hand(masks, everything)
    period = delta_T * sparse + update
    assert rigl_step_flops(f_S, f_D, delta_T) == pytest.approx(period / (delta_T + 1))


def test_dense_flops_equal_those_that_torch_counts():
    widths, batch = [6, 9, 4], 5
    network = initial_network(widths, [0])
    weights = [w.requires_grad_() for w in network.weights]
    x = torch.randn(1, batch, 6, requires_grad=True)
    f_D = forward_flops([a * b for a, b in pairwise(widths)])
    with FlopCounterMode(display=False) as counter:
        output = logits(Network(weights, network.biases), x)
    assert counter.get_total_flops() == batch * f_D
    with FlopCounterMode(display=False) as counter:
        logits(Network(weights, network.biases), x).sum().backward()
    assert counter.get_total_flops() == batch * step_flops(f_D)
    assert output.shape == (1, batch, 4)


def test_a_convolution_uses_each_weight_at_every_position():
    layer, x = torch.nn.Conv2d(3, 8, 3, bias=False), torch.randn(1, 3, 10, 12)
    with FlopCounterMode(display=False) as counter:
        out = layer(x)
    positions = out.shape[2] * out.shape[3]
    assert counter.get_total_flops() == forward_flops([layer.weight.numel()], [positions])


@given(st.integers(1, 1000), st.floats(0, 1), st.integers(1, 10**6))
def test_rigl_lies_between_sparse_and_dense_and_nears_sparse_as_updates_get_rare(
    delta_T, density, f_D
):
    f_S = density * f_D
    cost = rigl_step_flops(f_S, f_D, delta_T)
    tolerance = 1e-9 * f_D
    assert step_flops(f_S) - tolerance <= cost <= step_flops(f_D) + tolerance
    assert cost - step_flops(f_S) == pytest.approx((f_D - f_S) / (delta_T + 1), abs=tolerance)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1))
def test_pruning_costs_what_its_steps_cost(sparsities):
    each = [step_flops(forward_flops([round(1000 * (1 - s))])) for s in sparsities]
    mean = sum(each) / len(each)
    assert pruning_step_flops(forward_flops([1000]), sparsities) == pytest.approx(mean)


def test_pruning_flops_need_a_step():
    with pytest.raises(ValueError, match="at least one value"):
        pruning_step_flops(100, [])
