"""The exercises of lab 5, training sparse: checks, misconceptions, correct variants.

Which of several equal magnitudes goes or comes is open: no check asks for a particular one, only
for the right number of them. What an update does is judged by the order it leaves behind (nothing
that stays is weaker than what went), whatever number of connections the candidate changes; that
number has a check of its own. So a wrong count is not also a wrong choice.

The misconceptions refuse bad input as the references do, so that they are recognized by their
mistake and not by a missing error message.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from autograder.compare import (
    as_double,
    expect,
    expect_close,
    expect_equal,
    expect_error,
    expect_shape,
)
from autograder.exercise import Exercise
from autograder.strategies import KINDS, LAYOUTS, arrange, shapes, tensors
from fewer.sparsity import (
    capped_densities,
    carry_over,
    drop_fraction,
    drop_smallest,
    erk_densities,
    grow_largest,
    layer_sizes,
    prune_surviving,
    require_int,
    require_mask,
    require_sparsity,
    rigl_step_flops,
    rigl_update,
    top_k_mask,
)

WEAKEST = "a connection of magnitude {} went, and one of magnitude {} stayed"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DENSE_PLACES = torch.tensor([True, True])


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Bool tensors, sparse to full, in any memory layout."""
    rng = generator(draw(st.integers(0, 2**16 - 1)))
    share = draw(st.sampled_from((0.5, 0.25, 0.75, 1.0)))
    return arrange(torch.from_numpy(rng.random(shape) < share), draw(st.sampled_from(LAYOUTS)))


def as_mask(mask: Tensor, shape: torch.Size, what: str = "the mask") -> Tensor:
    """The bool tensor that ``mask`` means (0.0 and 1.0 will do), or a failure."""
    values = as_double(mask)
    expect_shape(values, shape, what)
    expect((values == 0) | (values == 1), f"{what} holds more than True and False", got=mask)
    return values == 1


def expect_order(score: Tensor, lower: Tensor, upper: Tensor, message: str) -> None:
    """Fail if a score of the places ``lower`` is above one of the places ``upper``.

    ``message`` has room for the two scores.
    """
    low, high = as_double(score)[lower], as_double(score)[upper]
    if low.numel() and high.numel():
        a, b = float(low.max()), float(high.min())
        expect(a <= b, message.format(f"{a:g}", f"{b:g}"))


# --- 1. prune_surviving --------------------------------------------------------------------------

surviving = Exercise(
    prune_surviving,
    paper="Frankle & Carbin 2018 (arXiv 1803.03635), Frankle et al. 2019 (arXiv 1912.05671)",
    difficulty=2,
    minutes=15,
)

Layers = tuple[list[Tensor], list[Tensor]]


@st.composite
def networks(draw: st.DrawFn, rivals: bool = False) -> Layers:
    """Weights and masks of one to three layers, no two weights of the same magnitude.

    Places without a connection hold weights too, of any size. Rivals are two or three layers, each
    with some connections, whose number can be divided by 4.
    """
    sides = st.integers(2, 4)
    shape_of = st.tuples(sides, sides) if rivals else shapes(1, 2, max_side=4)
    sizes = draw(st.lists(shape_of, min_size=1 + rivals, max_size=3))
    rng = generator(draw(st.integers(0, 2**16 - 1)))
    total = sum(math.prod(shape) for shape in sizes)
    magnitude = iter((rng.permutation(total) + 1) / 8)
    weights, connections = [], []
    for shape in sizes:
        n = math.prod(shape)
        values = np.array([next(magnitude) for _ in range(n)]) * rng.choice([-1, 1], n)
        count = 4 * rng.integers(1, n // 4 + 1) if rivals else rng.integers(0, n + 1)
        mask = rng.permutation(n) < count
        weights.append(torch.from_numpy(values).float().reshape(shape))
        connections.append(torch.from_numpy(mask).reshape(shape))
    return weights, connections


def joined(layers: list[Tensor]) -> Tensor:
    return torch.cat([layer.flatten() for layer in layers])


def surviving_masks(new: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The candidate's masks, all layers in one row."""
    named = enumerate(zip(new, weights, strict=True), start=1)
    return joined([as_mask(m, w.shape, f"the mask of layer {l}") for l, (m, w) in named])


@surviving.check(
    points=2,
    hint="In the second round some connections are gone already. Of which number is the fraction "
    "taken then, and is it the part that goes or the part that stays?",
    network=networks(rivals=True),
    fraction=st.sampled_from((0.25, 0.5, 0.75, 0.0, 1.0)),
)
def the_fraction_is_of_the_connections_that_are_left(candidate, network, fraction):
    """With n connections left in all layers together, fraction times n of them go, however many
    places have been pruned before."""
    weights, old = network
    new = surviving_masks(candidate(weights, old, fraction), weights)
    n, left = int(joined(old).sum()), int(new.sum())
    expect(left == n - fraction * n, f"{left} of {n} connections are left")


@surviving.check(
    points=3,
    hint="Line up the connections of all layers in one row and sort them by magnitude. From which "
    "layers do the first ones come?",
    network=networks(rivals=True),
    fraction=st.sampled_from((0.25, 0.5, 0.75)),
)
def all_layers_compete_with_each_other(candidate, network, fraction):
    """No connection that stays, in whichever layer, has a smaller magnitude than one that goes, in
    the same layer or in another."""
    weights, old = network
    new, before = surviving_masks(candidate(weights, old, fraction), weights), joined(old)
    expect_order(joined(weights).abs(), before & ~new, before & new, WEAKEST)
    expect((before & ~new).any(), f"nothing went of {int(before.sum())} connections")


@surviving.check(
    points=2,
    hint="A place that was pruned may still hold a large number. Does your function look at it?",
    network=networks(),
    fraction=st.sampled_from((0.25, 0.5, 0.75, 0.0, 0.2)),
)
def what_was_pruned_stays_pruned(candidate, network, fraction):
    """A place without a connection has none afterwards, whatever its weight."""
    weights, old = network
    new = surviving_masks(candidate(weights, old, fraction), weights)
    back = int((new & ~joined(old)).sum())
    expect(back == 0, f"{back} of the connections that were pruned before are there again")


@surviving.check(
    points=1,
    hint="How many of ten weights of the same magnitude should go if the fraction is one half? "
    "And which whole number is nearest to a fifth of 8?",
    weight=tensors(shapes(1, 2, max_side=6), kinds=("constant", "ties", "whole", "sparse")),
    fraction=st.sampled_from((0.2, 0.5, 0.1, 0.3, 0.7, 0.9, 0.35)),
)
def the_number_is_exact_also_among_equals(candidate, weight, fraction):
    """The number that goes is fraction times n rounded to the nearest whole number (of x.5 either),
    also where many weights have the same magnitude."""
    old = torch.ones(weight.shape, dtype=torch.bool)
    new = surviving_masks(candidate([weight], [old], fraction), [weight])
    exact, gone = fraction * weight.numel(), int((~new).sum())
    expect(abs(gone - exact) < 0.5 + 1e-5, f"{gone} went, where fraction times n is {exact:g}")


@surviving.check(
    points=1,
    hint="Training wants gradients, and half precision is common. What shape and type does the "
    "docstring promise for the masks?",
    examples=20,
    weights=st.sampled_from(FLOATS).flatmap(
        lambda dtype: st.lists(tensors(shapes(1, 4, max_side=3), dtypes=(dtype,)), max_size=3)
    ),
    learned=st.booleans(),
)
def each_layer_gets_a_bool_mask_of_its_shape(candidate, weights, learned):
    """The result has one bool mask a layer, of the layer's shape, for weights of any floating type
    and for weights that want a gradient."""
    weights = [*weights, torch.ones(2, 1, dtype=weights[0].dtype if weights else torch.float32)]
    old = [torch.ones(weight.shape, dtype=torch.bool) for weight in weights]
    new = candidate([weight.requires_grad_(learned) for weight in weights], old, 0.5)
    for mask, weight in zip(new, weights, strict=True):
        expect_shape(mask, weight.shape, "a mask")
        expect(mask.dtype == torch.bool, f"a mask is {mask.dtype}, expected torch.bool")


@surviving.check(
    points=1,
    hint="Look at the docstring under Raises. The library has functions that check a mask.",
    bad=[
        (ValueError, [torch.ones(2)], [DENSE_PLACES], 1.5),
        (ValueError, [torch.ones(2)], [DENSE_PLACES], -0.1),
        (ValueError, [torch.ones(2), torch.ones(2)], [DENSE_PLACES], 0.5),
        (ValueError, [torch.ones(2)], [DENSE_PLACES, DENSE_PLACES], 0.5),
        (ValueError, [torch.ones(3)], [DENSE_PLACES], 0.5),
        (ValueError, [torch.ones(1, 2)], [DENSE_PLACES], 0.5),
        (TypeError, [torch.ones(2)], [torch.ones(2)], 0.5),
    ],
)
def what_is_no_network_is_refused(candidate, bad):
    """A fraction outside 0 to 1, and masks that do not match the weights in number or shape, raise
    ValueError; a mask that is not boolean raises TypeError."""
    kind, *args = bad
    expect_error(candidate, kind, *args)


def _row(weights, masks, fraction):
    """All weights in a row, all connections in a row, and how many should go; all of them right."""
    require_sparsity(fraction, "fraction")
    pairs = zip(weights, masks, strict=True)
    mask = torch.cat([require_mask(m, w.shape).flatten() for w, m in pairs])
    return joined(weights).detach().double(), mask, round(fraction * int(mask.sum()))


def _split(row, masks):
    """A row of all layers cut into layers again."""
    parts = row.split([mask.numel() for mask in masks])
    return [part.reshape(mask.shape) for part, mask in zip(parts, masks, strict=True)]


@surviving.misconception(
    "You take the fraction of all places, pruned ones included. It is a fraction of the "
    "connections that are left: after rounds of 0.2 the density is 0.8, 0.64, 0.51, ..."
)
def fraction_of_the_whole(weights, masks, fraction):
    weight, mask, _ = _row(weights, masks, fraction)
    count = min(round(fraction * mask.numel()), int(mask.sum()))
    return _split(drop_smallest(weight, mask, count), masks)


@surviving.misconception(
    "You prune each layer by itself, the same fraction in each. Here the layers compete: the "
    "weakest connections of the whole network go, wherever they are."
)
def layer_by_layer(weights, masks, fraction):
    _row(weights, masks, fraction)
    pairs = zip(weights, masks, strict=True)
    return [prune_surviving([w], [m], fraction)[0] for w, m in pairs]


@surviving.misconception(
    "Connections that were pruned come back: you keep the largest of all weights, those of pruned "
    "places too. What is gone must stay gone; rank only what is connected."
)
def pruned_connections_come_back(weights, masks, fraction):
    weight, mask, count = _row(weights, masks, fraction)
    return _split(top_k_mask(weight.abs(), int(mask.sum()) - count), masks)


@surviving.misconception(
    "You sort by the weights as they are, so that the most negative go first. A weight of -5 is a "
    "strong connection: sort by magnitude."
)
def smallest_value_instead_of_magnitude(weights, masks, fraction):
    weight, mask, count = _row(weights, masks, fraction)
    return _split(drop_smallest(weight - weight.min() + 1, mask, count), masks)


@surviving.misconception(
    "You cut at a threshold, and everything that is as small as that goes. Where magnitudes are "
    "equal this is more than the fraction: take exactly as many as were asked for."
)
def a_threshold_takes_all_equals(weights, masks, fraction):
    weight, mask, count = _row(weights, masks, fraction)
    threshold = weight.abs()[mask].sort().values[count - 1] if count else -1
    return _split(mask & (weight.abs() > threshold), masks)


@surviving.misconception(
    "You take away the largest weights. Magnitude pruning keeps those: a small weight is the one "
    "that the output misses least."
)
def prunes_the_largest(weights, masks, fraction):
    weight, mask, count = _row(weights, masks, fraction)
    return _split(drop_smallest(1 / (weight.abs() + 1), mask, count), masks)


@surviving.misconception(
    "You keep the fraction where you should take it away: with 0.2 a fifth of the connections "
    "goes, and four fifths stay."
)
def keeps_the_fraction(weights, masks, fraction):
    weight, mask, _ = _row(weights, masks, fraction)
    connections = int(mask.sum())
    count = connections - round(fraction * connections)
    return _split(drop_smallest(weight, mask, count), masks)


@surviving.accepts("Python lists of magnitude, layer and place, sorted; of equals the first goes")
def sorts_triples(weights, masks, fraction):
    if not 0 <= fraction <= 1 or len(weights) != len(masks):
        raise ValueError("no such fraction, or lists of different length")
    triples = []
    for layer, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        if mask.dtype != torch.bool:
            raise TypeError("a mask must be bool")
        if weight.shape != mask.shape:
            raise ValueError("a mask and its weights must have the same shape")
        pairs = zip(weight.flatten().tolist(), mask.flatten().tolist(), strict=True)
        triples += [(abs(w), layer, place) for place, (w, m) in enumerate(pairs) if m]
    new = [mask.flatten().tolist() for mask in masks]
    for _, layer, place in sorted(triples)[: int(fraction * len(triples) + 0.5)]:
        new[layer][place] = False
    return [torch.tensor(n).reshape(m.shape) for n, m in zip(new, masks, strict=True)]


@surviving.accepts("indices of the connections, argsort, float64; of equals the last goes")
def argsorts_the_connections(weights, masks, fraction):
    weight, mask, _ = _row(weights, masks, fraction)
    places = mask.nonzero().flatten().flip(0)
    weakest_first = places[weight[places].abs().argsort(stable=True)]
    new = mask.clone()
    new[weakest_first[: math.ceil(fraction * len(places) - 0.5)]] = False
    return _split(new, masks)


@surviving.accepts("NumPy, the number of survivors instead of the number that goes")
def numpy_survivors(weights, masks, fraction):
    weight, mask, count = _row(weights, masks, fraction)
    score = np.where(mask.numpy(), np.abs(weight.numpy()), -1.0)
    kept = np.argsort(-score)[: int(mask.sum()) - count]
    new = np.zeros(mask.shape, dtype=bool)
    new[kept] = True
    return [part.numpy() for part in _split(torch.from_numpy(new), masks)]


# --- 2. capped_densities -------------------------------------------------------------------------

capped = Exercise(
    capped_densities,
    paper="Evci et al. 2020 (arXiv 1911.11134), section 3 (1)",
    difficulty=3,
    minutes=20,
    equivalent={
        "too_dense = {l for l in free if epsilon * ratios[l] > 1}  ->  "
        "too_dense = {l for l in free if epsilon * ratios[l] >= 1}": (
            "a layer that comes out at exactly 1 gets 1, and the others the same epsilon again"
        ),
    },
)

SPARSITIES = st.sampled_from((0.5, 0.9, 0.8, 0.75, 0.6, 0.3, 0.1, 0.98))
Budget = tuple[list[int], list[float], float]  # sizes, ratios, sparsity


@st.composite
def budgets(
    draw: st.DrawFn, least: int = 1, sparsities: st.SearchStrategy[float] = SPARSITIES
) -> Budget:
    """Sizes and ratios of some layers, the ratios in any unit, and a sparsity."""
    n = draw(st.integers(least, 5))
    sizes = draw(st.lists(st.integers(1, 200), min_size=n, max_size=n))
    unit = draw(st.sampled_from((1.0, 0.01, 100.0)))
    steps = st.sampled_from((1.0, 2.0, 3.0, 0.5, 5.0, 20.0, 0.1))
    ratios = [unit * draw(steps) for _ in range(n)]
    return sizes, ratios, draw(sparsities)


def rounds(sizes: list[int], ratios: list[float], sparsity: float) -> int:
    """How often layers come out above 1 before nobody does."""
    left, free, done = (1 - sparsity) * sum(sizes), list(zip(sizes, ratios, strict=True)), 0
    while free:
        epsilon = left / sum(n * r for n, r in free)
        above = [(n, r) for n, r in free if epsilon * r > 1 + 1e-6]
        if not above:
            break
        left -= sum(n for n, _ in above)
        free = [pair for pair in free if pair not in above]
        done += 1
    return done


# Budgets in which a layer held at 1 pushes another one above 1.
CASCADES = budgets(3, st.sampled_from((0.5, 0.3, 0.4, 0.6, 0.2))).filter(lambda b: rounds(*b) > 1)


def expect_total(sizes: list[int], densities: list[float], sparsity: float) -> None:
    """Fail unless the layers together have the density 1 - sparsity."""
    total = sum(d * n for d, n in zip(densities, sizes, strict=True)) / sum(sizes)
    expect_close(total, 1 - sparsity, "the density of all layers together", reveal=True)


def expect_proportion(densities: list[float], ratios: list[float]) -> None:
    """Fail unless the layers below 1 go with the ratios, and those at 1 deserve it."""
    expect(min(densities) > 0, f"a density is {min(densities):.4g}")
    below = [l for l, d in enumerate(densities) if d < 1 - 1e-6]
    for a, b in itertools.pairwise(below):
        x, y = densities[a] / densities[b], ratios[a] / ratios[b]
        expect(
            math.isclose(x, y, rel_tol=1e-4),
            f"densities of two layers are as {x:.4g} to 1, and their ratios as {y:.4g} to 1",
        )
    expect(bool(below), "every layer is dense, in a network that should be sparse")
    epsilon = densities[below[0]] / ratios[below[0]]
    least = min((r for l, r in enumerate(ratios) if l not in below), default=math.inf)
    expect(epsilon * least > 1 - 1e-4, f"a layer is dense whose share is {epsilon * least:.4g}")


@capped.check(
    points=3,
    hint="Count the connections of all layers. Where a layer had to be held at 1, who uses the "
    "connections that it could not take?",
    budget=budgets(sparsities=st.just(0.0) | SPARSITIES),
)
def the_network_has_the_sparsity_asked_for(candidate, budget):
    """The connections of all layers, density times size, are together (1 - S) times the number of
    weights, also where a layer is held at 1."""
    sizes, _, sparsity = budget
    expect_total(sizes, candidate(*budget), sparsity)


@capped.check(
    points=2,
    hint="There is one number epsilon for the whole network. Divide each density by its ratio: "
    "which layers should give that number?",
    budget=budgets(2),
)
def densities_go_with_the_ratios(candidate, budget):
    """Of two layers below 1, the one with twice the ratio has twice the density; a layer is at 1
    only where its ratio times epsilon is at least 1."""
    expect_proportion(candidate(*budget), budget[1])


@capped.check(
    points=2,
    hint="When one layer is held at 1, the others come out denser than before. What may that do to "
    "the next one?",
    budget=CASCADES,
)
def no_layer_has_more_connections_than_places(candidate, budget):
    """No density is above 1, also where a layer comes out above 1 only after another one has been
    held there."""
    densities = candidate(*budget)
    expect(max(densities) <= 1 + 1e-6, f"a density is {max(densities):.4g}")


@capped.check(
    points=1,
    hint="How many connections are there at sparsity 0, and how many at sparsity 1?",
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=5),
    ratio=st.sampled_from((1.0, 0.01, 0.1, 0.3, 7.0, 100.0)),
    sparsity=st.sampled_from((0.0, 1.0)),
)
def the_ends_are_a_dense_and_an_empty_network(candidate, sizes, ratio, sparsity):
    """At sparsity 0 every density is 1, at sparsity 1 every density is 0 (here with equal
    ratios)."""
    densities = candidate(sizes, [ratio] * len(sizes), sparsity)
    expect_close(densities, [1 - sparsity] * len(sizes), "the densities", reveal=True)


@capped.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        ([10, 20], [1.0, 2.0], 1.5),
        ([10, 20], [1.0, 2.0], -0.1),
        ([10, 20], [1.0], 0.5),
        ([10], [1.0, 2.0], 0.5),
    ],
)
def what_is_no_budget_is_refused(candidate, bad):
    """A sparsity outside 0 to 1, and lists of different length, raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _budget(sizes, ratios, sparsity):
    """How many connections there are to give, after a look at the arguments."""
    if len(sizes) != len(ratios):
        raise ValueError("sizes and ratios must have the same length")
    return (1 - require_sparsity(sparsity)) * sum(sizes)


def _once(sizes, ratios, budget):
    """epsilon r_l, with nobody held at 1."""
    epsilon = budget / sum(n * r for n, r in zip(sizes, ratios, strict=True))
    return [epsilon * r for r in ratios]


def _held(sizes, ratios, budget, dense=(), keep=1):
    """One round: the layers ``dense`` are at 1, the others share what is left of the budget.

    ``keep`` is the part of the dense layers' connections that is taken out of the budget.
    """
    free = [l for l in range(len(sizes)) if l not in dense]
    left = budget - keep * sum(sizes[l] for l in dense)
    shares = _once([sizes[l] for l in free], [ratios[l] for l in free], left) if free else []
    densities = dict(zip(free, shares, strict=True))
    return [densities.get(l, 1.0) for l in range(len(sizes))]


@capped.misconception(
    "You cut off what is above 1 and leave it at that. The connections cut off are missing from "
    "the total: the other layers should get them."
)
def cuts_off_what_is_above_1(sizes, ratios, sparsity):
    densities = _once(sizes, ratios, _budget(sizes, ratios, sparsity))
    return [min(1.0, d) for d in densities]


@capped.misconception(
    "You hand out once what the dense layers leave over. That may lift another layer above 1: go "
    "on until nobody is."
)
def hands_out_only_once(sizes, ratios, sparsity):
    budget = _budget(sizes, ratios, sparsity)
    dense = [l for l, d in enumerate(_once(sizes, ratios, budget)) if d > 1]
    return _held(sizes, ratios, budget, dense)


@capped.misconception(
    "You give what is left over in equal parts: every other layer becomes denser by the same "
    "amount. Work out epsilon anew, so that densities stay in proportion to the ratios."
)
def hands_out_in_equal_parts(sizes, ratios, sparsity):
    budget = _budget(sizes, ratios, sparsity)
    densities = _once(sizes, ratios, budget)
    while max(densities) > 1:
        densities = [min(1.0, d) for d in densities]
        free = [l for l, d in enumerate(densities) if d < 1]
        missing = budget - sum(d * n for d, n in zip(densities, sizes, strict=True))
        more = missing / sum(sizes[l] for l in free) if free else 0.0
        densities = [d + more if l in free else 1.0 for l, d in enumerate(densities)]
    return densities


@capped.misconception(
    "You hold dense layers at 1 but let the others share the whole budget: what the dense layers "
    "use is spent twice. Take it out first."
)
def spends_the_budget_twice(sizes, ratios, sparsity):
    budget = _budget(sizes, ratios, sparsity)
    dense: set[int] = set()
    while True:
        densities = _held(sizes, ratios, budget, dense, keep=0)
        above = {l for l, d in enumerate(densities) if d > 1}
        if not above:
            return densities
        dense |= above


@capped.misconception(
    "You make the mean of the densities 1 - S, so that every layer counts alike. A layer with ten "
    "times the weights weighs ten times as much: epsilon depends on the sizes."
)
def every_layer_counts_alike(sizes, ratios, sparsity):
    _budget(sizes, ratios, sparsity)
    return capped_densities([1] * len(sizes), ratios, sparsity)


@capped.misconception(
    "Your network has the density S. S is the sparsity, the fraction of zeros: of 100 weights at "
    "S = 0.9, ten remain."
)
def sparsity_read_as_density(sizes, ratios, sparsity):
    _budget(sizes, ratios, sparsity)
    return capped_densities(sizes, ratios, 1 - sparsity)


@capped.misconception(
    "You scale all densities down until the largest is 1, so that the network is sparser than "
    "asked for. Only the layer that is above 1 is held there; the others become denser."
)
def scales_everything_down(sizes, ratios, sparsity):
    densities = _once(sizes, ratios, _budget(sizes, ratios, sparsity))
    return [d / max(1.0, *densities) for d in densities]


@capped.misconception(
    "You share out the connections in proportion to the ratios. It is the densities that go with "
    "them: a layer has density times size connections."
)
def ratios_of_connections(sizes, ratios, sparsity):
    _budget(sizes, ratios, sparsity)
    return capped_densities(sizes, [r / n for r, n in zip(ratios, sizes, strict=True)], sparsity)


@capped.accepts("layers in the order of their ratios, one at a time")
def one_layer_at_a_time(sizes, ratios, sparsity):
    left = _budget(sizes, ratios, sparsity)
    order = sorted(range(len(sizes)), key=lambda l: -ratios[l])
    densities = [0.0] * len(sizes)
    for i, l in enumerate(order):
        epsilon = left / sum(sizes[k] * ratios[k] for k in order[i:])
        densities[l] = min(1.0, epsilon * ratios[l])
        left -= densities[l] * sizes[l]
    return densities


@capped.accepts("bisection for epsilon")
def bisects(sizes, ratios, sparsity):
    budget = _budget(sizes, ratios, sparsity)
    low, high = 0.0, 1 / min(ratios)
    for _ in range(100):
        epsilon = (low + high) / 2
        total = sum(n * min(1.0, epsilon * r) for n, r in zip(sizes, ratios, strict=True))
        low, high = (epsilon, high) if total < budget else (low, epsilon)
    return [min(1.0, high * r) if budget else 0.0 for r in ratios]


@capped.accepts("NumPy arrays, and recursion on the layers that are left")
def recursive(sizes, ratios, sparsity):
    budget = _budget(sizes, ratios, sparsity)

    def fill(n, r, left):
        if n.size == 0:
            return r
        shares = r * left / (n * r).sum()
        above = shares > 1
        if above.any():
            shares[above] = 1.0
            shares[~above] = fill(n[~above], r[~above], left - n[above].sum())
        return shares

    return list(fill(np.array(sizes, float), np.array(ratios, float), budget))


# --- 3. erk_densities ----------------------------------------------------------------------------

erk = Exercise(
    erk_densities,
    paper="Mocanu et al. 2018 (arXiv 1707.04780), Evci et al. 2020 (arXiv 1911.11134)",
    difficulty=2,
    minutes=10,
)

Shapes = list[tuple[int, ...]]


def ratios_of(shape_list: Shapes) -> list[float]:
    return [sum(shape) / math.prod(shape) for shape in shape_list]


@st.composite
def roomy(draw: st.DrawFn, dims: tuple[int, ...]) -> tuple[Shapes, float]:
    """Shapes of two or more layers, and a sparsity at which no layer needs to be held at 1."""
    shape = st.sampled_from(dims).flatmap(
        lambda d: st.tuples(
            *[st.integers(2, 40)] * min(d, 2), *[st.sampled_from((3, 1, 5, 2))] * max(d - 2, 0)
        )
    )
    layers = draw(st.lists(shape, min_size=2, max_size=4))
    # At epsilon = 1 / max r the densest layer is just full.
    most = sum(sum(s) for s in layers) / max(ratios_of(layers)) / sum(map(math.prod, layers))
    return layers, 1 - most * draw(st.sampled_from((0.5, 0.9, 0.2, 0.05)))


@erk.check(
    points=2,
    hint="For a linear layer of 3 inputs and 6 outputs, what is the sum of its sides, and what "
    "their product? Which of two layers should come out denser, the small or the large one?",
    network=roomy((2,)),
)
def linear_layers_go_with_inputs_plus_outputs(candidate, network):
    """The densities of linear layers are in proportion to (n_in + n_out) / (n_in n_out)."""
    expect_proportion(candidate(*network), ratios_of(network[0]))


@erk.check(
    points=3,
    hint="How many sides has the weight of a convolution? Look at both places of the formula where "
    "they appear.",
    network=roomy((4, 3, 2, 4)),
)
def the_sides_of_a_kernel_count_too(candidate, network):
    """The densities of convolutions are in proportion to the sum of all sides over the product of
    all sides, the kernel's among them, whatever the number of dimensions."""
    expect_proportion(candidate(*network), ratios_of(network[0]))


@erk.check(
    points=2,
    hint="Density times size is a number of connections. Add them up over the layers.",
    network=roomy((2, 4)),
)
def the_layers_together_have_the_sparsity(candidate, network):
    """The connections of all layers together are (1 - S) times the number of all weights."""
    layers, sparsity = network
    expect_total([math.prod(shape) for shape in layers], candidate(*network), sparsity)


@erk.check(
    points=2,
    hint="In the docstring's example one of the layers is dense. What would its density be without "
    "a limit, and where did the rest go?",
    layers=st.permutations([(2, 4), (3, 6), (2, 4, 6)]),
    larger=st.sampled_from((1, 2, 3)),
    sparsity=st.sampled_from((0.5, 0.4, 0.3)),
)
def a_small_layer_may_be_dense(candidate, layers, larger, sparsity):
    """A layer that would come out above 1 has the density 1, and the others make up for it: the
    total is right. The order of the layers does not matter."""
    layers = [tuple(side * larger if len(s) > 2 else side for side in s) for s in layers]
    densities = candidate(layers, sparsity)
    expect(max(densities) <= 1 + 1e-6, f"a density is {max(densities):.4g}")
    expect_total([math.prod(shape) for shape in layers], densities, sparsity)


@erk.check(
    points=1,
    hint="Look at the docstring under Raises. Which function of the library counts the weights of "
    "layers, and what does it refuse?",
    bad=[
        ([(2, 4), (3, 6)], 1.5),
        ([(2, 4), (3, 6)], -0.1),
        ([], 0.5),
        ([(2, 4), (0, 6)], 0.5),
        ([(2, -4), (3, 6)], 0.5),
    ],
)
def what_has_no_density_is_refused(candidate, bad):
    """A sparsity outside 0 to 1, a network without layers and a side below 1 raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _by_ratio(shape_list, sparsity, ratio):
    """erk_densities, with the ratio of a shape left open."""
    sizes = layer_sizes(shape_list)
    return capped_densities(sizes, [ratio(shape) for shape in shape_list], sparsity)


@erk.misconception(
    "You count inputs and outputs and leave out the kernel: that is Erdős-Rényi. The K in ERK says "
    "that the kernel's sides count as well, in the sum and in the product."
)
def without_the_kernel(shapes, sparsity):
    return _by_ratio(shapes, sparsity, lambda s: sum(s[:2]) / math.prod(s[:2]))


@erk.misconception(
    "The kernel's sides are in your product but not in your sum. In ERK it is n_in + n_out + w + h "
    "over n_in n_out w h."
)
def kernel_missing_from_the_sum(shapes, sparsity):
    return _by_ratio(shapes, sparsity, lambda s: sum(s[:2]) / math.prod(s))


@erk.misconception(
    "The kernel's sides are in your sum but not in your product. In ERK it is n_in + n_out + w + h "
    "over n_in n_out w h."
)
def kernel_missing_from_the_product(shapes, sparsity):
    return _by_ratio(shapes, sparsity, lambda s: sum(s) / math.prod(s[:2]))


@erk.misconception(
    "Your ratio is upside down: product over sum. Large layers are to come out sparser, small ones "
    "denser."
)
def product_over_sum(shapes, sparsity):
    return _by_ratio(shapes, sparsity, lambda s: math.prod(s) / sum(s))


@erk.misconception(
    "Your epsilon is 1 - S over the mean of the ratios, so that a layer of ten weights counts as "
    "much as one of a million. It is the total of the connections that has to be right."
)
def epsilon_from_the_mean_ratio(shapes, sparsity):
    layer_sizes(shapes)
    return capped_densities([1] * len(shapes), ratios_of(shapes), sparsity)


@erk.misconception(
    "You cut off what is above 1 and leave it at that: the network becomes sparser than asked for. "
    "The other layers should get what was cut off."
)
def cuts_off_without_making_up(shapes, sparsity):
    sizes = layer_sizes(shapes)
    densities = _once(sizes, ratios_of(shapes), (1 - require_sparsity(sparsity)) * sum(sizes))
    return [min(1.0, d) for d in densities]


@erk.misconception(
    "You give every layer the same density. That is the uniform distribution; here it goes with "
    "the layer's sides."
)
def the_same_for_every_layer(shapes, sparsity):
    return _by_ratio(shapes, sparsity, lambda s: 1.0)


@erk.misconception(
    "You give sparsities, the fractions of zeros. Densities are asked for, the fractions of "
    "connections."
)
def sparsities_instead_of_densities(shapes, sparsity):
    return [1 - d for d in erk_densities(shapes, sparsity)]


@erk.accepts("loops, one layer held at 1 at a time")
def loops_over_layers(shapes, sparsity):
    sizes, ratios = [], []
    for shape in shapes:
        size, side_sum = 1, 0
        for side in shape:
            if side < 1:
                raise ValueError("a side must be at least 1")
            size, side_sum = size * side, side_sum + side
        sizes.append(size)
        ratios.append(side_sum / size)
    if not sizes:
        raise ValueError("there must be a layer")
    return one_layer_at_a_time(sizes, ratios, sparsity)


@erk.accepts("tensors in float32, ratios as sums of reciprocal products")
def tensors_of_ratios(shapes, sparsity):
    sizes = torch.tensor(layer_sizes(shapes))
    sums = torch.tensor([float(sum(shape)) for shape in shapes])
    return capped_densities(sizes.tolist(), (sums / sizes).tolist(), sparsity)


# --- 4. drop_smallest ----------------------------------------------------------------------------

dropping = Exercise(
    drop_smallest,
    paper="Mocanu et al. 2018 (arXiv 1707.04780), algorithm 1",
    difficulty=2,
    minutes=10,
    equivalent={
        "…torch.where(mask, weight.detach().abs(), -math.inf)  ->  "
        "…torch.where(mask, weight.abs(), -math.inf)": (
            "the mask that is made from them has no gradient anyway"
        ),
    },
)

Layer = tuple[Tensor, Tensor]


@st.composite
def layers(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> Layer:
    """Weights and a mask; places without a connection hold weights too."""
    weight = draw(tensors(shapes(1, 3, max_side=5), kinds=kinds))
    return weight, draw(masks(tuple(weight.shape)))


def share_of(mask: Tensor, share: float) -> int:
    return round(share * int(mask.sum()))


SHARES = st.sampled_from((0.5, 0.25, 0.75, 0.0, 1.0))


@dropping.check(
    points=2,
    hint="How many connections go if five of them have the same magnitude and count is 2? And if "
    "most places hold a zero and no connection?",
    layer=layers(("constant", "whole", "ties", "sparse", "zeros", "normal")),
    share=SHARES,
    trained=st.booleans(),
)
def exactly_count_connections_go(candidate, layer, share, trained):
    """There are count fewer True than before, whatever the weights: also among equals, and where
    the places without a connection hold zeros."""
    weight, old = layer
    weight = torch.where(old, weight, 0.0) if trained else weight
    count = share_of(old, share)
    new = as_mask(candidate(weight, old, count), weight.shape)
    before, left = int(old.sum()), int(new.sum())
    expect(left == before - count, f"{left} of {before} connections are left, and count is {count}")


@dropping.check(
    points=3,
    hint="Sort the connections by how far their weights are from 0. Which are the first, and does "
    "a connection with the weight 0 take part?",
    layer=layers(),
    share=st.sampled_from((0.5, 0.25, 0.75)),
)
def the_smallest_magnitudes_go(candidate, layer, share):
    """No connection that stays has a smaller magnitude than one that goes; one whose weight happens
    to be 0 is the first to go."""
    weight, old = layer
    count = share_of(old, share)
    new = as_mask(candidate(weight, old, count), weight.shape)
    expect_order(weight.abs(), old & ~new, old & new, WEAKEST)
    if count and old.all():
        expect((~new).any(), f"nothing went, though count is {count}")


@dropping.check(
    points=2,
    hint="Where there is no connection, the weight is just a number that nobody uses. Can it make "
    "a connection appear?",
    layer=layers(),
    share=SHARES,
)
def only_connections_are_left(candidate, layer, share):
    """Every True of the result is True in the mask: places without a connection stay so, whatever
    their weight."""
    weight, old = layer
    new = as_mask(candidate(weight, old, share_of(old, share)), weight.shape)
    back = int((new & ~old).sum())
    expect(back == 0, f"{back} places have a connection that had none before")


@dropping.check(
    points=1,
    hint="A mask is a tensor of True and False. What becomes of yours if the weights are in half "
    "precision, or want a gradient?",
    examples=20,
    weight=tensors(shapes(1, 4, max_side=3), dtypes=FLOATS),
    learned=st.booleans(),
)
def the_result_is_a_bool_mask(candidate, weight, learned):
    """The result is a bool tensor of the mask's shape, for weights of any floating type and for
    weights that want a gradient."""
    old = torch.ones(weight.shape, dtype=torch.bool)
    new = candidate(weight.requires_grad_(learned), old, weight.numel() // 2)
    expect_shape(new, weight.shape, "the mask")
    expect(new.dtype == torch.bool, f"the mask is {new.dtype}, expected torch.bool")


BAD_LAYERS = [
    (TypeError, torch.ones(2), torch.ones(2), 1),
    (ValueError, torch.ones(3), DENSE_PLACES, 1),
    (ValueError, torch.ones(1, 2), DENSE_PLACES, 1),
]


@dropping.check(
    points=1,
    hint="Look at the docstring under Raises. How many connections can be dropped at most?",
    bad=[
        *BAD_LAYERS,
        (ValueError, torch.ones(2), DENSE_PLACES, 3),
        (ValueError, torch.ones(2), DENSE_PLACES, -1),
        (ValueError, torch.ones(2), torch.tensor([True, False]), 2),
        (ValueError, torch.ones(2), torch.tensor([True, False]), -1),
        (TypeError, torch.ones(2), DENSE_PLACES, 0.5),
    ],
)
def what_cannot_be_dropped_is_refused(candidate, bad):
    """A count below 0 or above the number of connections, and a mask of another shape, raise
    ValueError; a mask that is not boolean, or a count that is no int, raises TypeError."""
    kind, *args = bad
    expect_error(candidate, kind, *args)


def _connections(weight, mask, count):
    """The number of connections, after a look at the arguments."""
    connections = int(require_mask(mask, weight.shape).sum())
    require_int(count, "count", 0, connections)
    return connections


def _weakest(score, count):
    """The count places of smallest score, those stored first of equals."""
    return top_k_mask(-score.detach().float(), count)


@dropping.misconception(
    "You sort by the weights as they are, so that negative ones go first. A large negative weight "
    "is a strong connection: sort by magnitude."
)
def drops_by_signed_value(weight, mask, count):
    _connections(weight, mask, count)
    return mask & ~_weakest(torch.where(mask, weight, math.inf), count)


@dropping.misconception(
    "You rank all places. Those without a connection hold zeros, so they are the smallest and use "
    "up the count: too few connections go, or none. Rank only what is connected."
)
def ranks_unconnected_zeros_too(weight, mask, count):
    _connections(weight, mask, count)
    return mask & ~_weakest(torch.where(mask, weight.abs(), 0.0), count)


@dropping.misconception(
    "You drop the largest magnitudes. The smallest should go: they change the output least."
)
def drops_the_largest(weight, mask, count):
    _connections(weight, mask, count)
    return mask & ~_weakest(torch.where(mask, -weight.abs(), math.inf), count)


@dropping.misconception(
    "You change the mask in place and hand nothing back. Whoever called still needs the old mask: "
    "make a new one, and return it."
)
def changes_the_mask_and_returns_nothing(weight, mask, count):
    _connections(weight, mask, count)
    mask &= ~_weakest(torch.where(mask, weight.abs(), math.inf), count)


@dropping.misconception(
    "You keep the largest of all weights, those without a connection too, so that new connections "
    "appear. Dropping only takes away: rank only what is connected."
)
def keeps_what_was_never_connected(weight, mask, count):
    return top_k_mask(weight.abs(), _connections(weight, mask, count) - count)


@dropping.misconception(
    "You cut at a threshold, and everything as small as that goes. Where magnitudes are equal that "
    "is more than count: drop exactly count."
)
def a_threshold_drops_all_equals(weight, mask, count):
    _connections(weight, mask, count)
    threshold = weight.detach().abs()[mask].sort().values[count - 1] if count else -1
    return mask & (weight.abs() > threshold)


@dropping.misconception(
    "You take a weight of 0 for a missing connection. The mask says where a connection is; one "
    "whose weight happens to be 0 is the first to go."
)
def zero_weights_are_not_connections(weight, mask, count):
    _connections(weight, mask, count)
    last = float(weight.detach().abs().max()) + 1
    score = torch.where(weight == 0, last, weight.abs())
    return mask & ~_weakest(torch.where(mask, score, math.inf), count)


@dropping.misconception(
    "You give back the connections that are dropped. The mask of those that are left is asked for."
)
def returns_what_is_dropped(weight, mask, count):
    _connections(weight, mask, count)
    return _weakest(torch.where(mask, weight.abs(), math.inf), count)


@dropping.accepts("a loop that takes away the weakest, one at a time; of equals the last")
def one_at_a_time(weight, mask, count):
    _connections(weight, mask, count)
    magnitude, left = weight.abs().flatten().tolist(), mask.flatten().tolist()
    for _ in range(count):
        left[min((m, -i) for i, m in enumerate(magnitude) if left[i])[1] * -1] = False
    return torch.tensor(left).reshape(mask.shape)


@dropping.accepts("topk of the smallest among the connections, scattered into a clone")
def topk_of_the_connections(weight, mask, count):
    _connections(weight, mask, count)
    places = mask.flatten().nonzero().flatten()
    weakest = weight.detach().abs().flatten()[places].topk(count, largest=False).indices
    new = mask.flatten().clone()
    new[places[weakest]] = False
    return new.reshape(mask.shape)


@dropping.accepts("NumPy in float64, argsort with infinity where nothing is")
def numpy_argsort(weight, mask, count):
    _connections(weight, mask, count)
    score = np.where(mask.numpy(), np.abs(weight.detach().double().numpy()), np.inf)
    new = mask.numpy().copy().reshape(-1)
    new[score.reshape(-1).argsort(kind="stable")[:count]] = False
    return new.reshape(mask.shape)


# --- 5. carry_over -------------------------------------------------------------------------------

carrying = Exercise(
    carry_over,
    paper="Evci et al. 2020 (arXiv 1911.11134), section 3",
    difficulty=1,
    minutes=5,
)

Update = tuple[Tensor, Tensor, Tensor]  # values, the mask before, the mask after


@st.composite
def updates(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Update:
    """Values without a zero, and the masks before and after an update."""
    shape = draw(shapes(1, 3, max_side=5))
    kinds = ("normal", "positive", "negative", "large", "constant")
    values = draw(tensors(shape, kinds, dtypes))
    values = torch.where(values == 0, 1.0, values).to(values.dtype)
    return values, draw(masks(shape)), draw(masks(shape))


def expect_zero(carried: Tensor, where: Tensor, what: str) -> None:
    expect_shape(carried, where.shape, "the result")
    alive = int((as_double(carried)[where] != 0).sum())
    expect(alive == 0, f"{alive} {what} are not zero", got=carried)


@carrying.check(
    points=2,
    hint="Which connections are there before and after? Nothing happened to them.",
    update=updates(),
)
def kept_connections_keep_their_value(candidate, update):
    """Where a connection is in both masks, the value is the same as before, bit for bit."""
    values, old, new = update
    carried = candidate(*update)
    expect_shape(carried, values.shape, "the result")
    kept = old & new
    expect_equal(as_double(carried)[kept], values[kept], "the value of a kept connection")


@carrying.check(
    points=2,
    hint="A place without a connection may hold a number from long ago. What should a connection "
    "that is grown there start with?",
    update=updates(),
)
def grown_connections_start_at_zero(candidate, update):
    """Where a connection is in the new mask alone, the result is zero, whatever the value was."""
    _, old, new = update
    expect_zero(candidate(*update), ~old & new, "grown connections")


@carrying.check(
    points=2,
    hint="What is left of a connection that is dropped, or of a place that has none?",
    update=updates(),
)
def where_no_connection_is_there_is_nothing(candidate, update):
    """Where the new mask has no connection, the result is zero, whether one was dropped there or
    there was none before."""
    _, _, new = update
    expect_zero(candidate(*update), ~new, "places without a connection")


@carrying.check(
    points=1,
    hint="Momentum in float64, a parameter that wants a gradient: compare the type of what comes "
    "in with that of what comes out, and leave what came in as it is.",
    examples=20,
    update=updates(),
    learned=st.booleans(),
)
def the_result_is_a_new_tensor_of_the_same_type(candidate, update, learned):
    """The result has the shape and the type of values, also where values want a gradient (which
    cannot be changed in place)."""
    values, old, new = update
    carried = candidate(values.requires_grad_(learned), old, new)
    expect_shape(carried, values.shape, "the result")
    expect(carried.dtype == values.dtype, f"the result is {carried.dtype}, expected {values.dtype}")


@carrying.check(
    points=1,
    hint="Look at the docstring under Raises. There are two masks to look at.",
    bad=[
        (TypeError, torch.ones(2), torch.ones(2), DENSE_PLACES),
        (TypeError, torch.ones(2), DENSE_PLACES, torch.ones(2)),
        (ValueError, torch.ones(2), DENSE_PLACES[:1], DENSE_PLACES),
        (ValueError, torch.ones(2), DENSE_PLACES, DENSE_PLACES[:1]),
        (ValueError, torch.ones(1, 2), DENSE_PLACES, DENSE_PLACES),
    ],
)
def what_does_not_fit_is_refused(candidate, bad):
    """Masks of another shape than values raise ValueError, masks that are not boolean
    TypeError."""
    kind, *args = bad
    expect_error(candidate, kind, *args)


def _kept_where(places, values, old_mask, new_mask):
    """carry_over, with the places that keep their value left open: places(old, new)."""
    old = require_mask(old_mask, values.shape, "old_mask")
    new = require_mask(new_mask, values.shape, "new_mask")
    return torch.where(places(old, new), values, torch.zeros_like(values))


@carrying.misconception(
    "Grown connections keep the value that lay at their place. It is from a former life, or was "
    "never trained: a connection that is grown starts at zero."
)
def grown_connections_wake_up(values, old_mask, new_mask):
    return _kept_where(lambda old, new: new, values, old_mask, new_mask)


@carrying.misconception(
    "Dropped connections keep their value: you look at the old mask alone. What is dropped is gone."
)
def dropped_connections_live_on(values, old_mask, new_mask):
    return _kept_where(lambda old, new: old, values, old_mask, new_mask)


@carrying.misconception(
    "You set to zero what is in both masks. These are the connections that were kept, or came "
    "straight back: they go on with what they have."
)
def zeroes_what_is_kept(values, old_mask, new_mask):
    return _kept_where(lambda old, new: ~(old & new), values, old_mask, new_mask)


@carrying.misconception(
    "You set everything to zero. Kept connections keep their value: the update should not undo "
    "their training."
)
def zeroes_everything(values, old_mask, new_mask):
    return _kept_where(lambda old, new: old & ~old, values, old_mask, new_mask)


@carrying.misconception(
    "You keep what is in either mask. Only a connection that is in both was kept: a dropped one is "
    "gone, and a grown one starts at zero."
)
def keeps_what_is_in_either_mask(values, old_mask, new_mask):
    return _kept_where(lambda old, new: old | new, values, old_mask, new_mask)


@carrying.misconception(
    "You swap the roles: grown connections keep the value that lay there, and the kept ones are "
    "set to zero. It is the grown ones that start at zero."
)
def resets_the_kept_instead_of_the_grown(values, old_mask, new_mask):
    return _kept_where(lambda old, new: new & ~old, values, old_mask, new_mask)


@carrying.misconception(
    "You change values in place. Where they are a parameter that wants a gradient torch refuses "
    "that, and elsewhere the caller loses what she had: make a new tensor."
)
def changes_values_in_place(values, old_mask, new_mask):
    _kept_where(lambda old, new: old, values, old_mask, new_mask)
    values[~(old_mask & new_mask)] = 0
    return values


@carrying.accepts("multiplied by both masks")
def multiplies_by_the_masks(values, old_mask, new_mask):
    _kept_where(lambda old, new: new, values, old_mask, new_mask)
    return values * old_mask * new_mask


@carrying.accepts("a loop over Python numbers")
def loops_over_numbers(values, old_mask, new_mask):
    _kept_where(lambda old, new: new, values, old_mask, new_mask)
    triples = zip(*(x.flatten().tolist() for x in (values, old_mask, new_mask)), strict=True)
    kept = [v if a and b else 0.0 for v, a, b in triples]
    return torch.tensor(kept, dtype=values.dtype).reshape(values.shape)


@carrying.accepts("a clone, filled in place")
def fills_a_clone(values, old_mask, new_mask):
    _kept_where(lambda old, new: new, values, old_mask, new_mask)
    carried = values.detach().clone()
    carried[~old_mask] = 0
    carried[torch.logical_not(new_mask)] = 0
    return carried


# --- 6. drop_fraction ----------------------------------------------------------------------------

schedule = Exercise(
    drop_fraction,
    paper="Evci et al. 2020 (arXiv 1911.11134), section 3 (2)",
    difficulty=1,
    minutes=5,
)

ALPHAS = st.sampled_from((0.3, 0.5, 1.0, 0.1, 0.2))


@schedule.check(
    points=2,
    hint="What is the cosine of 0?",
    alpha=ALPHAS | st.just(0.0),
    end=st.integers(1, 1000),
)
def it_starts_at_alpha(candidate, alpha, end):
    """At step 0 the fraction is alpha."""
    expect_close(candidate(0, alpha, end), alpha, "the fraction at step 0", reveal=True)


@schedule.check(
    points=3,
    hint="Draw half a wave of the cosine. Where is it at a half of the way, and at a quarter? "
    "Which unit does the cosine take?",
    alpha=ALPHAS,
    end_t=st.integers(2, 1000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))),
)
def it_falls_along_half_a_cosine(candidate, alpha, end_t):
    """Between 0 and T_end the fraction falls as alpha/2 (1 + cos(t pi / T_end))."""
    end, t = end_t
    want = alpha * math.cos(math.pi * t / end / 2) ** 2
    expect_close(candidate(t, alpha, end), want, f"the fraction at step {t} of {end}")


@schedule.check(
    points=2,
    hint="A cosine goes up again. What should happen after T_end?",
    alpha=ALPHAS,
    end=st.integers(1, 300),
    later=st.integers(0, 1000),
)
def from_the_end_on_it_is_zero(candidate, alpha, end, later):
    """At T_end and at every later step the fraction is 0."""
    got = candidate(end + later, alpha, end)
    expect_close(got, 0.0, f"the fraction {later} steps after T_end", reveal=True)


@schedule.check(
    points=1,
    hint="Look at the docstring under Raises and at the ranges under Args.",
    bad=[
        (ValueError, -1, 0.3, 10),
        (ValueError, 0, 0.3, 0),
        (ValueError, 5, 0.3, -10),
        (ValueError, 5, 1.5, 10),
        (ValueError, 5, -0.3, 10),
        (TypeError, 2.5, 0.3, 10),
        (TypeError, 5, 0.3, 10.5),
    ],
)
def what_is_no_step_is_refused(candidate, bad):
    """A step below 0, T_end below 1 and alpha outside 0 to 1 raise ValueError; t or T_end that is
    no int raises TypeError."""
    kind, *args = bad
    expect_error(candidate, kind, *args)


def _part(t, alpha, T_end):
    """How much of the way to T_end is behind step t, at most 1; after a look at the arguments."""
    require_int(t, "t", 0)
    require_int(T_end, "T_end", 1)
    require_sparsity(alpha, "alpha")
    return min(t / T_end, 1)


@schedule.misconception(
    "Your fraction falls along a straight line. It should be half a cosine, slow at both ends."
)
def falls_along_a_line(t, alpha, T_end):
    return alpha * (1 - _part(t, alpha, T_end))


@schedule.misconception(
    "After T_end your cosine goes up again, and connections change to the end of training. From "
    "T_end on the fraction is 0."
)
def rises_again_after_the_end(t, alpha, T_end):
    _part(t, alpha, T_end)
    return alpha / 2 * (1 + math.cos(math.pi * t / T_end))


@schedule.misconception(
    "Your fraction starts at twice alpha. 1 + cos goes from 2 to 0, so alpha has to be halved."
)
def alpha_is_not_halved(t, alpha, T_end):
    return alpha * (1 + math.cos(math.pi * _part(t, alpha, T_end)))


@schedule.misconception(
    "Your fraction counts up, from 0 to alpha. Early on many connections change, in the end none: "
    "it should fall."
)
def counts_up(t, alpha, T_end):
    return alpha / 2 * (1 - math.cos(math.pi * _part(t, alpha, T_end)))


@schedule.misconception(
    "Your wave is a quarter of a cosine, which ends steeply. Half a cosine, raised by 1 and "
    "halved, ends flat."
)
def a_quarter_of_a_cosine(t, alpha, T_end):
    return alpha * math.cos(math.pi / 2 * _part(t, alpha, T_end))


@schedule.misconception(
    "You give the cosine degrees. It takes radians: half a wave is pi, not 180."
)
def cosine_of_degrees(t, alpha, T_end):
    return alpha / 2 * (1 + math.cos(180 * _part(t, alpha, T_end)))


@schedule.misconception(
    "You divide t by T_end as whole numbers, which is 0 all the way to T_end: the fraction stays "
    "at alpha and then falls at once."
)
def divides_whole_numbers(t, alpha, T_end):
    return alpha / 2 * (1 + math.cos(math.pi * math.floor(_part(t, alpha, T_end))))


@schedule.accepts("an early exit, and the square of a cosine of half the angle")
def squares_the_cosine(t, alpha, T_end):
    _part(t, alpha, T_end)
    if t >= T_end:
        return 0
    return alpha * math.cos(t * math.pi / (2 * T_end)) ** 2


@schedule.accepts("torch in float32, a 0-d tensor")
def torch_cosine(t, alpha, T_end):
    angle = torch.tensor(_part(t, alpha, T_end)) * torch.pi
    return alpha / 2 * (1 + torch.cos(angle))


# --- 7. rigl_update ------------------------------------------------------------------------------

rigl = Exercise(
    rigl_update,
    paper="Evci et al. 2020 (arXiv 1911.11134), section 3 and algorithm 1",
    difficulty=2,
    minutes=15,
    equivalent={
        "require_mask(mask, gradient.shape)  ->  (removed)": (
            "growing by the gradient looks at its shape as well"
        ),
        "count = int(fraction * int(require_mask(mask, weight.shape).sum()))  ->  "
        "count = int(fraction * int(mask.sum()))": "dropping looks at the mask as well",
    },
)

Rewiring = tuple[Tensor, Tensor, Tensor]  # weight, mask, gradient
FRACTIONS = st.sampled_from((0.5, 0.25, 0.3, 0.75, 0.7, 1.0, 0.1))


@st.composite
def rewirings(draw: st.DrawFn, gradients: str, signed: bool = False) -> Rewiring:
    """A layer and its dense gradient, of which no two values have the same magnitude.

    At most half of the places are connected, unless the large gradients are inside.

    Args:
        gradients: where the large ones are: "outside" the connections, so that nothing that is
            dropped comes back; "inside", so that all of it does; or "anywhere".
        signed: whether some are negative.
    """
    kinds = ("normal", "whole", "positive", "negative", "large")
    weight = draw(tensors(shapes(1, 3, max_side=6), kinds))
    shape, n = tuple(weight.shape), weight.numel()
    rng = generator(draw(st.integers(0, 2**16 - 1)))
    connections = draw(st.integers(0, n if gradients == "inside" else n // 2))
    mask = torch.from_numpy(rng.permutation(n) < connections).reshape(shape)
    gradient = torch.from_numpy(rng.permutation(n) + 1.0).float().reshape(shape)
    if gradients != "anywhere":
        gradient = gradient + torch.where(mask == (gradients == "inside"), 2.0 * n, 0.0)
    if signed:
        gradient = gradient * torch.from_numpy(rng.choice([-1.0, 1.0], shape)).float()
    return weight, mask, gradient / 8


def changed(candidate, rewiring: Rewiring, fraction: float) -> Tensor:
    return as_mask(candidate(*rewiring, fraction), rewiring[0].shape)


@rigl.check(
    points=2,
    hint="Is the fraction one of the connections or of all places? And what is a third of 8 "
    "connections, if only whole ones can go?",
    rewiring=rewirings("outside"),
    fraction=FRACTIONS,
)
def the_fraction_of_the_connections_is_replaced(candidate, rewiring, fraction):
    """With n connections, k = fraction times n, rounded down, are dropped. Where the gradients of
    all empty places are larger than those of the connections, k others are there afterwards."""
    _, old, _ = rewiring
    new, exact = changed(candidate, rewiring, fraction), fraction * int(old.sum())
    gone = int((old & ~new).sum())
    expect(
        math.floor(exact - 1e-5) <= gone <= math.floor(exact + 1e-5),
        f"{gone} connections were replaced, where fraction times their number is {exact:g}",
    )


@rigl.check(
    points=2,
    hint="By which number are connections dropped, and by which are they grown?",
    rewiring=rewirings("outside"),
    fraction=FRACTIONS,
)
def the_smallest_weights_are_dropped(candidate, rewiring, fraction):
    """No connection that is gone afterwards had a larger magnitude than one that stays (where the
    empty places have the larger gradients, so that nothing comes straight back)."""
    weight, old, _ = rewiring
    new = changed(candidate, rewiring, fraction)
    expect_order(weight.abs(), old & ~new, old & new, WEAKEST)


@rigl.check(
    points=3,
    hint="The gradient is that of the dense layer. Which empty places would lower the loss most, "
    "and does it matter whether their gradient is positive or negative?",
    rewiring=rewirings("outside", signed=True),
    fraction=FRACTIONS,
)
def the_largest_gradients_are_grown(candidate, rewiring, fraction):
    """No empty place that stays empty has a gradient of larger magnitude than one that is grown;
    and where connections are dropped, some are grown."""
    _, old, gradient = rewiring
    new = changed(candidate, rewiring, fraction)
    message = "a place with the gradient +-{} was left empty, and one with +-{} was grown"
    expect_order(gradient.abs(), ~old & ~new, ~old & new, message)
    if fraction * (1 - fraction) * int(old.sum()) >= 1 + 1e-5:
        expect((~old & new).any(), "nothing was grown, though empty places have large gradients")


@rigl.check(
    points=2,
    hint="The places that the drop has just emptied are empty places too.",
    rewiring=rewirings("inside") | rewirings("anywhere"),
    fraction=FRACTIONS,
)
def what_was_dropped_may_come_straight_back(candidate, rewiring, fraction):
    """A connection that was just dropped is a candidate for growing like any other: none stays away
    while a place with a smaller gradient is grown."""
    _, old, gradient = rewiring
    new = changed(candidate, rewiring, fraction)
    message = "a connection with the gradient {} stayed away, and a place with {} was grown"
    expect_order(gradient, old & ~new, ~old & new, message)


@rigl.check(
    points=1,
    hint="Count the True before and after, where many gradients are equal or zero, and look at the "
    "type of the mask.",
    rewiring=rewirings("anywhere"),
    kind=st.sampled_from(("zeros", "equal", "whole")),
    fraction=FRACTIONS,
    dtype=st.sampled_from(FLOATS),
)
def there_are_as_many_connections_as_before(candidate, rewiring, kind, fraction, dtype):
    """The result is a bool mask with exactly as many True as the mask, also where weights or
    gradients are equal or zero, and for any floating type."""
    weight, old, gradient = rewiring
    slope = {"zeros": gradient * 0, "equal": gradient * 0 + 0.5, "whole": gradient.floor()}[kind]
    new = candidate(weight.sign().to(dtype), old, slope.to(dtype), fraction)
    expect(new.dtype == torch.bool, f"the mask is {new.dtype}, expected torch.bool")
    expect_shape(new, old.shape, "the mask")
    before, after = int(old.sum()), int(new.sum())
    expect(after == before, f"there are {after} connections, and there were {before}")


@rigl.check(
    points=1,
    hint="Look at the docstring under Raises. The gradient is one for every place.",
    bad=[
        (TypeError, torch.ones(2), torch.ones(2), torch.ones(2), 0.5),
        (ValueError, torch.ones(3), DENSE_PLACES, torch.ones(2), 0.5),
        (ValueError, torch.ones(2), DENSE_PLACES, torch.ones(3), 0.5),
        (ValueError, torch.ones(1, 2), DENSE_PLACES, torch.ones(1, 2), 0.5),
        (ValueError, torch.ones(2), DENSE_PLACES, torch.ones(2), 1.5),
        (ValueError, torch.ones(2), DENSE_PLACES, torch.ones(2), -0.25),
        (ValueError, torch.ones(2), torch.tensor([True, False]), torch.ones(2), 1.5),
    ],
)
def what_cannot_be_updated_is_refused(candidate, bad):
    """Shapes that differ and a fraction outside 0 to 1 raise ValueError, a mask that is not boolean
    raises TypeError."""
    kind, *args = bad
    expect_error(candidate, kind, *args)


def _start(weight, mask, gradient, fraction):
    """The connections, and how many of them are replaced; after a look at the arguments."""
    require_sparsity(fraction, "fraction")
    require_mask(mask, gradient.shape)
    connections = int(require_mask(mask, weight.shape).sum())
    return connections, int(fraction * connections)


def _grown(kept, score, count):
    """kept with up to count more connections, of the places that the score does not rule out."""
    allowed = int((~kept & (score > -math.inf)).sum())
    return grow_largest(kept, score, min(count, allowed))


@rigl.misconception(
    "You grow where the gradient is largest as a number, so that strongly negative ones are the "
    "last. A weight can go up or down: the magnitude of the gradient counts."
)
def grows_by_signed_gradient(weight, mask, gradient, fraction):
    _, count = _start(weight, mask, gradient, fraction)
    return _grown(drop_smallest(weight, mask, count), gradient, count)


@rigl.misconception(
    "You grow only where no connection was before the update. What was just dropped is a candidate "
    "too: the paper leaves out only the connections that survive."
)
def excludes_what_was_just_dropped(weight, mask, gradient, fraction):
    _, count = _start(weight, mask, gradient, fraction)
    score = torch.where(mask, -math.inf, gradient.abs())
    return _grown(drop_smallest(weight, mask, count), score, count)


@rigl.misconception(
    "You take the fraction of all places. It is a fraction of the connections: a layer with one "
    "place in ten connected changes ten times fewer than you do."
)
def fraction_of_all_places(weight, mask, gradient, fraction):
    connections, _ = _start(weight, mask, gradient, fraction)
    count = min(int(fraction * mask.numel()), connections)
    return _grown(drop_smallest(weight, mask, count), gradient.abs(), count)


@rigl.misconception(
    "You grow by the gradient of the sparse layer, which is zero where no connection is: then what "
    "was dropped comes back, and nothing is ever explored. Use the gradient of every place."
)
def grows_by_masked_gradient(weight, mask, gradient, fraction):
    _, count = _start(weight, mask, gradient, fraction)
    return _grown(drop_smallest(weight, mask, count), gradient.abs() * mask, count)


@rigl.misconception(
    "You grow by the magnitude of the weights. Where no connection is the weight says nothing; the "
    "gradient says where the loss would fall."
)
def grows_by_weight(weight, mask, gradient, fraction):
    _, count = _start(weight, mask, gradient, fraction)
    score = torch.where(mask, 0.0, weight.abs())
    return _grown(drop_smallest(weight, mask, count), score, count)


@rigl.misconception("You round the number of replaced connections up. Here it is rounded down.")
def rounds_up(weight, mask, gradient, fraction):
    connections, _ = _start(weight, mask, gradient, fraction)
    count = math.ceil(fraction * connections)
    return _grown(drop_smallest(weight, mask, count), gradient.abs(), count)


@rigl.misconception(
    "You drop the connections with the smallest gradient. RigL drops by the magnitude of the "
    "weight, and only grows by the gradient."
)
def drops_by_gradient(weight, mask, gradient, fraction):
    _, count = _start(weight, mask, gradient, fraction)
    return _grown(drop_smallest(gradient, mask, count), gradient.abs(), count)


@rigl.misconception(
    "You count the connections again after the drop, and grow the fraction of those: every update "
    "loses some. Grow exactly as many as were dropped."
)
def grows_a_fraction_of_the_rest(weight, mask, gradient, fraction):
    connections, count = _start(weight, mask, gradient, fraction)
    kept = drop_smallest(weight, mask, count)
    return _grown(kept, gradient.abs(), int(fraction * (connections - count)))


@rigl.accepts("Python loops over places; of equals the last")
def loops_over_places(weight, mask, gradient, fraction):
    _, count = _start(weight, mask, gradient, fraction)
    w, g, old = (x.flatten().tolist() for x in (weight.abs(), gradient.abs(), mask))
    dropped = sorted((w[i], -i) for i, m in enumerate(old) if m)[:count]
    new = list(old)
    for _, i in dropped:
        new[-i] = False
    grown = sorted(((g[i], i) for i, m in enumerate(new) if not m), reverse=True)[:count]
    for _, i in grown:
        new[i] = True
    return torch.tensor(new).reshape(mask.shape)


@rigl.accepts("topk of scores with infinity where nothing may happen, in float64")
def topk_of_scores(weight, mask, gradient, fraction):
    connections, count = _start(weight, mask, gradient, fraction)
    strength = torch.where(mask, weight.double().abs(), -1.0).flatten()
    new = torch.zeros(mask.numel(), dtype=torch.bool)
    new[strength.topk(connections - count).indices] = True
    wanted = torch.where(new, -1.0, gradient.double().abs().flatten())
    new[wanted.topk(count).indices] = True
    return new.view(mask.shape)


@rigl.accepts("NumPy, floor, lexsort")
def numpy_lexsort(weight, mask, gradient, fraction):
    connections, _ = _start(weight, mask, gradient, fraction)
    count = math.floor(fraction * connections)
    w, g = (x.double().numpy().reshape(-1) for x in (weight.abs(), gradient.abs()))
    new = mask.numpy().reshape(-1).copy()
    new[np.lexsort((w, ~new))[:count]] = False
    new[np.lexsort((-g, new))[:count]] = True
    return new.reshape(mask.shape)


# --- 8. rigl_step_flops --------------------------------------------------------------------------

cost = Exercise(
    rigl_step_flops,
    paper="Evci et al. 2020 (arXiv 1911.11134), appendix on FLOPs",
    difficulty=1,
    minutes=5,
)

FLOPS = st.integers(1, 10**6) | st.sampled_from((1.5, 2.5e9))
INTERVALS = st.integers(1, 1000)


@cost.check(
    points=2,
    hint="What does a training step cost, forward and backward, if nothing is updated?",
    sparse=FLOPS,
    times=st.integers(1, 20),
    delta_T=st.integers(10**8, 10**9),
)
def if_updates_are_rare_a_step_costs_three_forward_passes(candidate, sparse, times, delta_T):
    """Where an update comes once in a hundred million steps, the mean cost of a step is that of
    sparse training: one forward pass, and a backward pass of twice that."""
    got = candidate(sparse, sparse * times, delta_T)
    expect_close(got, 3 * sparse, "the mean cost of a step", rtol=1e-4, reveal=True)


@cost.check(
    points=2,
    hint="Over how many steps is the mean taken, counting the one with the update?",
    forward=FLOPS,
    delta_T=INTERVALS,
)
def a_network_that_is_not_sparse_costs_three_forward_passes(candidate, forward, delta_T):
    """Where the sparse network costs as much as the dense one, every step costs three forward
    passes, with or without an update, and so does their mean."""
    got = candidate(forward, forward, delta_T)
    expect_close(got, 3 * forward, "the mean cost of a step", reveal=True)


@cost.check(
    points=3,
    hint="A backward pass is two products: one for the layer's inputs, one for its weights. Which "
    "of them is dense in an update?",
    sparse=FLOPS,
    times=st.integers(2, 20),
    delta_T=INTERVALS,
)
def one_product_in_an_interval_is_dense(candidate, sparse, times, delta_T):
    """If the dense network costs a FLOPs more, the mean cost of a step is a / (delta_T + 1) more:
    in the delta_T + 1 steps of an interval a single product is dense."""
    more = candidate(sparse, sparse * times, delta_T) - candidate(sparse, sparse, delta_T)
    got = more * (delta_T + 1) / (sparse * (times - 1))
    expect_close(got, 1.0, "the number of dense products in an interval", rtol=1e-2)


@cost.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[(ValueError, 10, 100, 0), (ValueError, 10, 100, -1), (TypeError, 10, 100, 2.5)],
)
def what_is_no_interval_is_refused(candidate, bad):
    """A delta_T below 1 raises ValueError, one that is no int TypeError."""
    kind, *args = bad
    expect_error(candidate, kind, *args)


def _mean(f_S, f_D, delta_T, step=3, update=None, steps=1, divide=True):
    """rigl_step_flops, open where people go wrong.

    Args:
        step: forward passes in a sparse step.
        update: the cost of the step with the update.
        steps: how many steps of an interval are not among the delta_T sparse ones.
    """
    require_int(delta_T, "delta_T", 1)
    update = 2 * f_S + f_D if update is None else update
    return (step * f_S * delta_T + update) / (delta_T + steps if divide else 1)


@cost.misconception(
    "You charge a dense gradient in every step. It is needed for the update alone, once in "
    "Delta T + 1 steps; that is what makes RigL cheap."
)
def a_dense_gradient_every_step(f_S, f_D, delta_T):
    _mean(f_S, f_D, delta_T)
    return 2 * f_S + f_D


@cost.misconception(
    "You count the backward pass once. It is two products, one for the inputs and one for the "
    "weights: a step costs three forward passes."
)
def backward_counted_once(f_S, f_D, delta_T):
    return _mean(f_S, f_D, delta_T, step=2, update=f_S + f_D)


@cost.misconception(
    "You divide by Delta T. An interval has Delta T sparse steps and then the one with the dense "
    "gradient, so it is Delta T + 1 steps long."
)
def divides_by_delta_T(f_S, f_D, delta_T):
    return _mean(f_S, f_D, delta_T, steps=0)


@cost.misconception(
    "You make the whole update dense. Forward and the gradient of the inputs are those of the "
    "sparse network; only the gradient of the weights is dense."
)
def the_whole_update_is_dense(f_S, f_D, delta_T):
    return _mean(f_S, f_D, delta_T, update=3 * f_D)


@cost.misconception(
    "You make the whole backward pass of the update dense. The gradient of the inputs goes through "
    "the sparse weights; only that of the weights is dense."
)
def the_whole_backward_is_dense(f_S, f_D, delta_T):
    return _mean(f_S, f_D, delta_T, update=f_S + 2 * f_D)


@cost.misconception(
    "You add the dense gradient to a whole sparse step. It takes the place of the sparse gradient "
    "of the weights: an update costs 2 f_S + f_D."
)
def the_dense_gradient_comes_on_top(f_S, f_D, delta_T):
    return _mean(f_S, f_D, delta_T, update=3 * f_S + f_D)


@cost.misconception(
    "You give the cost of a whole interval. The mean cost of one of its steps is asked for."
)
def the_sum_instead_of_the_mean(f_S, f_D, delta_T):
    return _mean(f_S, f_D, delta_T, divide=False)


@cost.accepts("three sparse passes, and the share of the dense one that comes on top")
def the_excess_on_top(f_S, f_D, delta_T):
    _mean(f_S, f_D, delta_T)
    return 3 * f_S + (f_D - f_S) / (delta_T + 1)


@cost.accepts("a weighted mean in NumPy")
def numpy_average(f_S, f_D, delta_T):
    _mean(f_S, f_D, delta_T)
    return np.average([3.0 * f_S, 2.0 * f_S + f_D], weights=[delta_T, 1])
