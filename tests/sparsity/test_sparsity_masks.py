"""Properties of masks, and of layers that shrink.

`expected_top_k` and its kin are slow and plain on purpose: Python's sort of (score, place).
"""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn.utils import prune

from autograder.strategies import shapes, tensors
from fewer.sparsity import (
    block_mask,
    channel_norms,
    global_masks,
    magnitude_mask,
    n_m_mask,
    number_kept,
    row_mask,
    shrink_channels,
    threshold_mask,
    top_k_mask,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SCORES = tensors(dtypes=DTYPES)
MATRICES = tensors(shapes(2, 2), dtypes=DTYPES)
SPARSITIES = st.sampled_from([0, 1, 0.0, 0.5, 1.0]) | st.floats(0, 1)
SEEDS = st.integers(0, 2**32 - 1)


def expected_top_k(scores, k):
    """The places of the k largest, an earlier place before a later one, as a list of bools."""
    flat = scores.double().flatten().tolist()
    kept = sorted(range(len(flat)), key=lambda place: (-flat[place], place))[:k]
    return [place in kept for place in range(len(flat))]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- how many


@given(st.integers(0, 10**6), SPARSITIES)
def test_the_number_kept_is_within_a_half_of_the_wish(n, sparsity):
    kept = number_kept(n, sparsity)
    assert 0 <= kept <= n
    assert abs(kept - n * (1 - sparsity)) <= 0.5 + 1e-6
    assert number_kept(n, 0) == number_kept(n, 0.0) == n
    assert number_kept(n, 1) == number_kept(n, 1.0) == 0


@given(st.integers(0, 1000), SPARSITIES, SPARSITIES)
def test_more_sparsity_never_keeps_more(n, a, b):
    assert number_kept(n, max(a, b)) <= number_kept(n, min(a, b))


def test_half_a_weight_is_rounded_to_an_even_number_of_pruned_ones():
    assert [number_kept(n, 0.5) for n in (1, 3, 5, 7)] == [1, 1, 3, 3]
    assert number_kept(15, 0.9) == 1  # 13.5 pruned; 15 * (1 - 0.9) is 1.4999999999999996


# --- threshold


@given(SCORES, st.sampled_from([0.0, 0.5, 1.0, 3.0, math.inf]))
def test_a_threshold_keeps_what_reaches_it_on_either_side_of_zero(w, threshold):
    mask = threshold_mask(w, threshold)
    assert mask.dtype == torch.bool
    assert mask.shape == w.shape
    assert mask.flatten().tolist() == [abs(v) >= threshold for v in w.double().flatten().tolist()]


@given(SCORES)
def test_threshold_zero_keeps_all_and_infinity_none(w):
    assert threshold_mask(w, 0).all()
    assert not threshold_mask(w, math.inf).any()


# --- top-k


@given(SCORES, st.data())
def test_top_k_keeps_exactly_the_k_largest_and_ties_in_order(scores, data):
    k = data.draw(st.integers(0, scores.numel()))
    before = scores.clone()
    mask = top_k_mask(scores, k)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert mask.flatten().tolist() == expected_top_k(scores, k)
    assert torch.equal(scores, before)


@given(
    st.lists(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 2.0, math.inf]), max_size=8), st.data()
)
def test_infinite_scores_have_their_place_in_the_order(values, data):
    scores = torch.tensor(values)
    k = data.draw(st.integers(0, len(values)))
    assert top_k_mask(scores, k).tolist() == expected_top_k(scores, k)


def test_top_k_of_a_scalar_and_of_nothing():
    assert top_k_mask(torch.tensor(3.0), 1).tolist() is True
    assert top_k_mask(torch.tensor(3.0), 0).tolist() is False
    assert top_k_mask(torch.empty(0, 4), 0).shape == (0, 4)


def test_scores_with_a_gradient_give_a_mask_without():
    scores = normal(4, 4).requires_grad_()
    assert not top_k_mask(scores, 3).requires_grad


@pytest.mark.parametrize("sparsity", [0, 0.25, 0.5, 0.9, 1])
def test_equal_weights_are_pruned_to_the_exact_count(sparsity):
    mask = magnitude_mask(torch.full((7, 9), 0.3), sparsity)
    assert int(mask.sum()) == number_kept(63, sparsity)


@given(SCORES, SPARSITIES)
def test_magnitude_keeps_the_same_as_top_k_of_absolute_values(w, sparsity):
    expected = expected_top_k(w.abs(), number_kept(w.numel(), sparsity))
    assert magnitude_mask(w, sparsity).flatten().tolist() == expected


@given(tensors(dtypes=DTYPES, kinds=("normal", "whole", "ties")), SPARSITIES)
def test_pruning_by_magnitude_leaves_the_least_error(w, sparsity):
    mask = magnitude_mask(w, sparsity)
    dropped, kept = w.abs()[~mask], w.abs()[mask]
    if dropped.numel() and kept.numel():
        assert dropped.max() <= kept.min()


@given(st.integers(1, 60), st.integers(1, 30), SEEDS, SPARSITIES)
def test_magnitude_masks_equal_those_of_torch_prune(rows, columns, seed, sparsity):
    layer = torch.nn.Linear(columns, rows)
    layer.weight.data = normal(rows, columns, seed=seed)
    assume(layer.weight.abs().unique().numel() == layer.weight.numel())  # it leaves ties open
    mask = magnitude_mask(layer.weight, sparsity)
    if round(sparsity * layer.weight.numel()) == 0:
        assert mask.all()
    else:
        prune.l1_unstructured(layer, "weight", amount=float(sparsity))
        assert torch.equal(mask, layer.weight_mask.bool())


# --- global


@st.composite
def layers(draw):
    drawn = draw(st.lists(SCORES, min_size=1, max_size=4))
    return {f"layer{i}": scores for i, scores in enumerate(drawn)}


@given(layers(), SPARSITIES)
def test_global_masks_are_one_ranking_cut_at_one_place(scores, sparsity):
    masks = global_masks(scores, sparsity)
    assert list(masks) == list(scores)
    assert all(masks[name].shape == scores[name].shape for name in scores)
    flat = torch.cat([x.double().flatten() for x in scores.values()])
    expected = expected_top_k(flat, number_kept(flat.numel(), sparsity))
    assert torch.cat([mask.flatten() for mask in masks.values()]).tolist() == expected


@given(SCORES, SPARSITIES)
def test_global_masks_of_one_layer_are_its_own(scores, sparsity):
    alone = top_k_mask(scores, number_kept(scores.numel(), sparsity))
    assert torch.equal(global_masks({"only": scores}, sparsity)["only"], alone)


def test_global_masks_equal_those_of_torch_prune():
    layers = {"a": torch.nn.Linear(20, 30), "b": torch.nn.Linear(30, 5)}
    for seed, layer in enumerate(layers.values()):
        layer.weight.data = normal(*layer.weight.shape, seed=seed) * (1 + seed)
    masks = global_masks({name: layer.weight.abs() for name, layer in layers.items()}, 0.7)
    prune.global_unstructured(
        [(layer, "weight") for layer in layers.values()], prune.L1Unstructured, amount=0.7
    )
    for name, layer in layers.items():
        assert torch.equal(masks[name], layer.weight_mask.bool())
    assert masks["a"].float().mean() < 0.3 < masks["b"].float().mean()


# --- per row, N:M


@given(MATRICES, SPARSITIES)
def test_every_row_is_a_top_k_of_its_own(scores, sparsity):
    mask = row_mask(scores, sparsity)
    k = number_kept(scores.shape[1], sparsity)
    assert mask.tolist() == [expected_top_k(row, k) for row in scores]


@st.composite
def groups(draw):
    m = draw(st.integers(1, 8))
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = (*lead, m * draw(st.integers(1, 3)))
    return draw(tensors(shape, dtypes=DTYPES)), draw(st.integers(0, m)), m


@given(groups())
def test_every_group_of_m_keeps_its_n_largest(drawn):
    scores, n, m = drawn
    mask = n_m_mask(scores, n, m)
    assert mask.shape == scores.shape
    for group, kept in zip(scores.reshape(-1, m), mask.reshape(-1, m).tolist(), strict=True):
        assert kept == expected_top_k(group, n)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_is_the_number_kept(n, m):
    assert n_m_mask(normal(6, 32), n, m).float().mean() == n / m


def test_two_of_four_is_also_four_of_eight():
    mask = n_m_mask(normal(6, 32), 2, 4)
    assert (mask.unflatten(-1, (4, 8)).sum(-1) == 4).all()


@given(MATRICES, SPARSITIES)
def test_a_group_as_long_as_the_row_is_the_row_mask(scores, sparsity):
    columns = scores.shape[1]
    expected = row_mask(scores, sparsity)
    assert torch.equal(n_m_mask(scores, number_kept(columns, sparsity), columns), expected)


# --- blocks


@st.composite
def blocks(draw):
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = (height * draw(st.integers(1, 4)), width * draw(st.integers(1, 4)))
    # Sums of whole numbers are exact in every order.
    kinds = ("whole", "ties", "constant", "zeros")
    return draw(tensors(shape, kinds=kinds)), (height, width), draw(SPARSITIES)


@given(blocks())
def test_blocks_stay_or_go_as_one_by_their_sum(drawn):
    scores, (height, width), sparsity = drawn
    mask = block_mask(scores, (height, width), sparsity)
    assert mask.shape == scores.shape
    places = [
        (slice(i, i + height), slice(j, j + width))
        for i in range(0, scores.shape[0], height)
        for j in range(0, scores.shape[1], width)
    ]
    sums = torch.stack([scores[place].sum() for place in places])
    expected = expected_top_k(sums, number_kept(len(places), sparsity))
    assert [mask[place].unique().tolist() for place in places] == [[kept] for kept in expected]


@given(tensors(shapes(2, 2), kinds=("whole", "normal")), SPARSITIES)
def test_blocks_of_one_weight_are_unstructured(scores, sparsity):
    expected = top_k_mask(scores, number_kept(scores.numel(), sparsity))
    assert torch.equal(block_mask(scores, (1, 1), sparsity), expected)


# --- channels


@given(MATRICES)
def test_channel_norms_belong_to_the_rows(w):
    rows = w.double().tolist()
    ones = torch.tensor([math.fsum(map(abs, row)) for row in rows], dtype=torch.float64)
    twos = torch.tensor([math.hypot(*row) for row in rows], dtype=torch.float64)
    assert torch.allclose(channel_norms(w, 1).double(), ones, rtol=1e-5)
    assert torch.allclose(channel_norms(w, 2).double(), twos, rtol=1e-5)


def test_l1_and_l2_can_prefer_different_channels():
    w = torch.tensor([[3.0, 3.0, 3.0], [0.0, 8.0, 0.0]])
    assert channel_norms(w, 1).argmax() == 0
    assert channel_norms(w, 2).argmax() == 1


@st.composite
def networks(draw):
    hidden = draw(st.integers(1, 8))
    seed = draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    w_in, b_in, w_out, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((hidden, 3), (hidden,), (2, hidden), (5, 3))
    )
    keep = torch.tensor(draw(st.lists(st.booleans(), min_size=hidden, max_size=hidden)))
    return w_in, draw(st.sampled_from([b_in, None])), w_out, keep, x


def network(w_in, b_in, w_out, x, f):
    return torch.nn.functional.linear(f(torch.nn.functional.linear(x, w_in, b_in)), w_out)


FUNCTIONS = st.sampled_from([torch.relu, torch.nn.functional.silu, torch.tanh])


@given(networks(), FUNCTIONS)
def test_shrinking_dead_inputs_leaves_the_function_unchanged(drawn, f):
    w_in, b_in, w_out, keep, x = drawn
    w_in = w_in * keep[:, None]
    b_in = None if b_in is None else b_in * keep
    small = shrink_channels(w_in, b_in, w_out, keep)
    assert small[0].shape == (int(keep.sum()), 3)
    assert small[2].shape == (2, int(keep.sum()))
    assert torch.allclose(network(*small, x, f), network(w_in, b_in, w_out, x, f))


@given(networks(), st.sampled_from([torch.sigmoid, torch.relu]))
def test_shrinking_unread_channels_leaves_the_function_unchanged(drawn, f):
    w_in, b_in, w_out, keep, x = drawn
    w_out = w_out * keep
    small = shrink_channels(w_in, b_in, w_out, keep)
    assert torch.allclose(network(*small, x, f), network(w_in, b_in, w_out, x, f))


@given(networks())
def test_shrinking_alive_channels_is_silencing_them(drawn):
    w_in, b_in, w_out, keep, x = drawn
    small = shrink_channels(w_in, b_in, w_out, keep)
    silenced = network(w_in, b_in, w_out, x, lambda h: torch.sigmoid(h) * keep)
    assert torch.allclose(network(*small, x, torch.sigmoid), silenced)


def test_shrunk_layers_are_smaller_copies_in_their_own_type():
    w_in, b_in, w_out = normal(4, 3).half(), normal(4).half(), normal(2, 4).half()
    small = shrink_channels(w_in, b_in, w_out, torch.tensor([True, False, False, True]))
    assert [part.dtype for part in small] == [torch.float16] * 3
    assert sum(part.numel() for part in small) == 6 + 2 + 4
    small[0].zero_()
    assert w_in.count_nonzero() == 12


def test_a_smaller_network_can_be_trained_into_the_old_weights():
    w_in, w_out = normal(4, 3).requires_grad_(), normal(2, 4).requires_grad_()
    keep = torch.tensor([True, False, True, True])
    new_in, _, new_out = shrink_channels(w_in, None, w_out, keep)
    (new_in.sum() + new_out.sum()).backward()
    assert torch.equal(w_in.grad, keep.float()[:, None].expand(4, 3))
    assert torch.equal(w_out.grad, keep.float().expand(2, 4))


# --- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: number_kept(-1, 0.5), "n must be at least 0, got -1"),
        (lambda w: number_kept(4, 50), "sparsity must be between 0 and 1 .*, got 50"),
        (lambda w: number_kept(4, -0.1), "sparsity must be between 0 and 1 .*, got -0.1"),
        (lambda w: number_kept(4, math.nan), "sparsity must be finite, got nan"),
        (lambda w: threshold_mask(w, -1), "threshold must be at least 0, got -1"),
        (lambda w: threshold_mask(w, math.nan), "threshold must be at least 0, got nan"),
        (lambda w: threshold_mask(w * math.nan, 1), "w must not hold NaN, got 12 among its 12"),
        (lambda w: top_k_mask(w, 13), "k must be between 0 and 12, got 13"),
        (lambda w: top_k_mask(w, -1), "k must be between 0 and 12, got -1"),
        (lambda w: top_k_mask(w * math.nan, 1), "scores must not hold NaN"),
        (lambda w: magnitude_mask(w, 2), "sparsity must be between 0 and 1"),
        (lambda w: global_masks({}, 0.5), "scores must hold at least one layer, got none"),
        (lambda w: global_masks({"a": w * math.nan}, 0.5), r"scores\['a'\] must not hold NaN"),
        (lambda w: row_mask(w[0], 0.5), r"scores must have two dimensions, got shape \(6,\)"),
        (lambda w: n_m_mask(w, 2, 4), "must be a multiple of 4, got 6 .2 too many"),
        (lambda w: n_m_mask(w, 4, 3), "n must be between 0 and 3, got 4"),
        (lambda w: n_m_mask(w, 0, 0), "m must be at least 1, got 0"),
        (lambda w: n_m_mask(w[0, 0], 1, 1), "scores must have at least one dimension"),
        (lambda w: block_mask(w, (3, 2), 0.5), "number of rows of scores must be a multiple of 3"),
        (lambda w: block_mask(w, (2, 4), 0.5), "columns of scores must be a multiple of 4, got 6"),
        (lambda w: block_mask(w, (0, 2), 0.5), "block must be at least 1, got 0"),
        (lambda w: block_mask(w / 0, (1, 1), 0.5), "scores must be finite"),
        (lambda w: channel_norms(w, 3), "p must be 1 or 2, got 3"),
        (
            lambda w: shrink_channels(w, None, w, w[0] > 0),
            r"keep must have shape \(2,\), got \(6,\)",
        ),
        (
            lambda w: shrink_channels(w, None, w, w[:, 0] > 0),
            "w_out must have 2 columns, got shape",
        ),
        (lambda w: shrink_channels(w, w[0], w.T, w[:, 0] > 0), r"b_in must have shape \(2,\)"),
    ],
)
def test_wrong_values_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(12.0).reshape(2, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: number_kept(4.0, 0.5), "n must be an int, got 4.0"),
        (lambda w: number_kept(4, "0.5"), "sparsity must be a number, got '0.5'"),
        (lambda w: number_kept(4, True), "sparsity must be a number, got True"),
        (
            lambda w: threshold_mask(w.int(), 1),
            "w must be a floating-point tensor, got torch.int32",
        ),
        (lambda w: top_k_mask(w, 0.5), "k must be an int, got 0.5"),
        (lambda w: top_k_mask(w.tolist(), 1), "scores must be a torch.Tensor, got list"),
        (lambda w: magnitude_mask(w.long(), 0.5), "w must be a floating-point tensor"),
        (lambda w: n_m_mask(w, 2, 4.0), "m must be an int, got 4.0"),
        (lambda w: global_masks([w, w], 0.5), "scores must be a dict of tensors by name, got list"),
        (lambda w: block_mask(w, 2, 0.5), "block must be a pair .rows, columns., got 2"),
        (lambda w: block_mask(w, (2, 2.0), 0.5), "block must be an int, got 2.0"),
        (lambda w: shrink_channels(w, None, w.T, w[:, 0]), "keep must be a bool tensor"),
    ],
)
def test_wrong_types_are_refused_by_name(call, message):
    with pytest.raises(TypeError, match=message):
        call(torch.arange(12.0).reshape(2, 6))
