"""Properties of the cubic schedule, and of pruning while training."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.sparsity import (
    apply_masks,
    cubic_sparsity,
    magnitude_mask,
    number_kept,
    prune_gradually,
)

SPARSITIES = st.floats(0, 1)


@st.composite
def schedules(draw):
    begin = draw(st.integers(0, 1000))
    end = begin + draw(st.integers(1, 1000))
    initial, final = sorted([draw(SPARSITIES), draw(SPARSITIES)])
    return begin, end, initial, final


def test_half_way_to_ninety_percent_is_0_7875():
    assert cubic_sparsity(50, 0, 100, 0.0, 0.9) == pytest.approx(0.7875)
    assert cubic_sparsity(1500, 1000, 2000, 0.0, 0.9) == pytest.approx(0.7875)


@given(schedules(), st.integers(0, 3000))
def test_the_schedule_is_the_equation_between_its_ends(schedule, step):
    begin, end, s_i, s_f = schedule
    s_t = cubic_sparsity(step, *schedule)
    if step <= begin:
        assert s_t == s_i
    elif step >= end:
        assert s_t == s_f
    else:
        assert s_t == pytest.approx(s_f + (s_i - s_f) * (1 - (step - begin) / (end - begin)) ** 3)


@given(schedules(), st.integers(0, 3000), st.integers(0, 3000))
def test_the_sparsity_never_falls(schedule, a, b):
    earlier, later = (cubic_sparsity(step, *schedule) for step in sorted([a, b]))
    assert earlier <= later + 1e-12
    assert schedule[2] - 1e-12 <= earlier <= schedule[3] + 1e-12


@given(schedules(), st.floats(0.01, 0.49))
def test_pruning_is_fast_at_first(schedule, share):
    begin, end, s_i, s_f = schedule
    first = cubic_sparsity(begin + share * (end - begin), *schedule) - s_i
    last = s_f - cubic_sparsity(end - share * (end - begin), *schedule)
    assert first >= last - 1e-12


# --- in training


def no_training(step):
    return None


def test_without_training_gradual_pruning_is_pruning_at_once():
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    expected = magnitude_mask(w, 0.9)
    before = w.clone()
    masks = prune_gradually(no_training, {"w": w}, 12, begin=2, end=11, every=3, final=0.9)
    assert torch.equal(masks["w"], expected)
    assert torch.equal(w, before * expected)


@given(
    st.integers(0, 5),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.tuples(SPARSITIES, SPARSITIES).map(sorted),
)
def test_the_mask_follows_the_schedule_and_changes_at_its_steps_only(
    begin, length, every, after, sparsities
):
    w = torch.arange(1.0, 101.0)
    end, alive = begin + length, []

    def train_step(t):
        alive.append(int(w.count_nonzero()))

    steps = end + after
    masks = prune_gradually(train_step, {"w": w}, steps, begin, end, every, *sparsities)
    alive = [*alive[1:], int(w.count_nonzero())]  # what each step left behind
    expected = 100
    for t in range(steps):
        if t == end or (begin <= t < end and (t - begin) % every == 0):
            expected = number_kept(100, cubic_sparsity(t, begin, end, *sparsities))
        assert alive[t] == expected
    assert int(masks["w"].sum()) == number_kept(100, sparsities[1])


def test_pruned_weights_stay_zero_under_momentum_and_never_return():
    torch.manual_seed(0)
    x, y = torch.randn(64, 10), torch.randn(64, 1)
    layer = torch.nn.Linear(10, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    zeros = []

    def train_step(t):
        zeros.append(layer.weight.detach() == 0)
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        assert layer.weight.count_nonzero() == 10  # the optimizer moves pruned weights too

    masks = prune_gradually(train_step, {"weight": layer.weight}, 40, 0, 30, every=2, final=0.7)
    assert torch.equal(layer.weight != 0, masks["weight"])
    assert int(masks["weight"].sum()) == 3
    for earlier, later in itertools.pairwise(zeros):
        assert (later | ~earlier).all()
    assert layer.bias.item() != 0


def test_a_live_zero_goes_before_a_pruned_weight_returns():
    w = torch.tensor([0.5, 1.0, 2.0, 3.0])

    def train_step(t):
        if t == 1:
            w[:] = torch.tensor([9.0, 0.0, 0.0, 9.0])  # 9 at a pruned place, zeros at live ones

    masks = prune_gradually(train_step, {"w": w}, 2, 0, 1, initial=0.25, final=0.25)
    assert masks["w"].tolist() == [False, True, True, True]


def test_every_layer_is_pruned_by_itself():
    weights = {"small": torch.rand(50) * 1e-3, "large": torch.rand(10, 20) + 1}
    masks = prune_gradually(no_training, weights, 5, begin=0, end=4, final=0.8)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"small": 10, "large": 40}


def test_the_final_step_prunes_even_where_the_stride_misses_it():
    w = torch.rand(100)
    prune_gradually(no_training, {"w": w}, 11, begin=0, end=10, every=7, final=0.9)
    assert w.count_nonzero() == 10


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_applying_masks_writes_zeros_in_place_and_touches_nothing_else(kept):
    w = torch.full((len(kept),), math.inf, requires_grad=True)
    apply_masks({"w": w}, {"w": torch.tensor(kept)})
    assert w.tolist() == [math.inf if keep else 0.0 for keep in kept]
    assert w.requires_grad
    assert w.is_leaf


# --- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cubic_sparsity(0, 5, 5, 0.0, 0.9), "end must be above begin = 5, got 5"),
        (
            lambda: cubic_sparsity(0, 0, 5, 0.9, 0.5),
            "final must be at least initial = 0.9, got 0.5",
        ),
        (lambda: cubic_sparsity(0, 0, 5, -0.1, 0.5), "initial must be between 0 and 1"),
        (lambda: cubic_sparsity(0, 0, 5, 0.0, 90), "final must be between 0 and 1 .*, got 90"),
        (lambda: cubic_sparsity(math.nan, 0, 5, 0.0, 0.9), "step must be finite, got nan"),
        (lambda: prune_gradually(no_training, {}, 5, 0, 5), "steps must be at least 6, got 5"),
        (lambda: prune_gradually(no_training, {}, 5, 3, 2), "end must be at least 4, got 2"),
        (lambda: prune_gradually(no_training, {}, 5, -1, 2), "begin must be at least 0, got -1"),
        (lambda: prune_gradually(no_training, {}, 5, 0, 2, 0), "every must be at least 1, got 0"),
        (
            lambda: prune_gradually(no_training, {"w": torch.tensor([math.nan])}, 5, 0, 2),
            "must not hold NaN",
        ),
        (
            lambda: apply_masks({"a": torch.ones(2)}, {"b": torch.ones(2).bool()}),
            r"masks must be for \['a'\], got \['b'\]",
        ),
        (
            lambda: apply_masks({"a": torch.ones(2)}, {"a": torch.ones(3).bool()}),
            r"masks\['a'\] must have shape \(2,\), got \(3,\)",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_refused_by_name():
    with pytest.raises(TypeError, match="step must be a number, got '3'"):
        cubic_sparsity("3", 0, 5, 0.0, 0.9)
    with pytest.raises(TypeError, match=r"every must be an int, got 0\.5"):
        prune_gradually(no_training, {}, 5, 0, 2, 0.5)
    with pytest.raises(TypeError, match="must be a bool tensor"):
        apply_masks({"a": torch.ones(2)}, {"a": torch.ones(2)})
