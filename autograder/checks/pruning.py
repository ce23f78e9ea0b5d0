"""The exercises of lab 4, pruning: checks, misconceptions, correct variants.

Three habits keep one mistake from costing everything. Where ties, signs or rounding decide, a check
of its own asks about them, and the others draw scores that are positive, different from each other
and pruned by a whole number. A mask of numbers 0 and 1 is as good as one of bools everywhere but in
one check. And what SparseGPT hands out is judged against the candidate's *own* mask and errors, so
that a wrong choice of weights is not a wrong update as well.

Ties are among at most 16 scores: so few are sorted by insertion, and a grade does not depend on
which other way of sorting a machine has for those who forget to ask for a stable one.

A misconception is the right method with one thing wrong in it. What those of an exercise have in
common is in a helper in front of them, open at the places where people go wrong. They refuse bad
input as the references do, so that they are recognized by their mistake and not by a missing error
message.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from autograder.compare import (
    Mismatch,
    as_double,
    expect,
    expect_close,
    expect_equal,
    expect_error,
    expect_shape,
)
from autograder.exercise import Exercise
from autograder.strategies import LAYOUTS, arrange, given, integer_tensors, shapes, tensors
from fewer.sparsity import (
    cubic_sparsity,
    encode_2_4,
    encode_csr,
    global_masks,
    n_m_mask,
    number_kept,
    pack_bits,
    require_dims,
    require_finite,
    require_floating,
    require_groups,
    require_int,
    require_layers,
    require_number,
    require_scores,
    require_sparsity,
    row_mask,
    sparsegpt_block,
    top_k_mask,
    wanda_scores,
)

NAN, INF = torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 1.0])
SMALL_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = st.integers(0, 2**16 - 1)
QUARTERS = st.sampled_from((0.5, 0.25, 0.75, 0.0, 1.0))
# Why some mutants change nothing:
ONLY_A_NAME = "only the name in an error message changes"
SAME_NUMBERS = "the values are the same; whether they remember where they come from, nobody asks"
SAME_ORDER = "squares and magnitudes are in the same order"
LAST = "the last dimension is the default, and of a matrix dimension 1"


def shuffled(seed: int, n: int) -> np.ndarray:
    """The whole numbers 0 to n - 1 in random order: the same for a seed on every machine."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(n)


@st.composite
def distinct(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    layouts: Sequence[str] = LAYOUTS,
    signed: bool = False,
) -> Tensor:
    """Different scores, 1, 2, 3 ... in random order; signed, they go from below zero to above."""
    size = draw(shape if shape is not None else shapes())
    n = math.prod(size)
    order = shuffled(draw(SEEDS), n) + 1 - (n // 2 + 1 if signed else 0)
    x = torch.from_numpy(order).reshape(size).to(draw(st.sampled_from(dtypes)))
    return arrange(x, draw(st.sampled_from(layouts)))


def with_infinity(x: Tensor) -> Tensor:
    """x with its largest score made infinite, and its smallest too, below all others."""
    high, low = x == x.max(), x == x.min()
    return torch.where(high, math.inf, torch.where(low, -math.inf, x))


def largest(scores: Tensor, k: int) -> Tensor:
    """The right answer for one ranking: among equals, what comes first stays."""
    flat = scores.flatten().tolist()
    best_first = sorted(range(len(flat)), key=lambda i: -flat[i])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[best_first[:k]] = True
    return mask.reshape(scores.shape)


def largest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """The right answer for n of every m consecutive scores of a row."""
    groups = [largest(group, n) for group in scores.reshape(-1, m)]
    return torch.stack(groups).reshape(scores.shape)


def expect_mask(got: Tensor, want: Tensor, scores: Tensor, what: str = "the mask") -> None:
    """Fail with the first score that is wrongly kept or pruned; a number 1 is as good as True."""
    expect_shape(got, want.shape, what)
    kept, right = as_double(got), as_double(want)
    expect((kept == 0) | (kept == 1), f"{what} holds something else than True and False", got)
    expect(
        kept.sum() == right.sum(),
        f"{what} keeps {kept.sum():.0f} of {kept.numel()} scores, where {right.sum():.0f} of them "
        "should stay",
    )
    wrong = (kept != right).nonzero().tolist()
    if wrong:
        place = tuple(wrong[0])
        done, other = ("kept", "pruned") if kept[place] else ("pruned", "kept")
        raise Mismatch(
            f"{what} is wrong in {len(wrong)} places: the score {float(scores[place]):g} at "
            f"{list(place)} is {done}, and should be {other}"
        )


def expect_bools(mask: Tensor, what: str = "the mask") -> None:
    expect(mask.dtype == torch.bool, f"{what} is {mask.dtype}, expected torch.bool")


# --- 1. top_k_mask -------------------------------------------------------------------------------

top_k = Exercise(
    top_k_mask,
    paper="Zhu & Gupta 2017 (arXiv 1710.01878), section 3",
    difficulty=1,
    minutes=10,
    equivalent={
        "if require_int(k, 'k', 0, flat.numel()) == 0:  ->  "
        "if require_int(k, '', 0, flat.numel()) == 0:": ONLY_A_NAME,
    },
)


@st.composite
def with_k(draw: st.DrawFn, scores: st.SearchStrategy[Tensor]) -> tuple[Tensor, int]:
    """Scores, and how many of them to keep: at least one."""
    x = draw(scores)
    return x, draw(st.integers(1, x.numel()))


@top_k.check(
    points=2,
    hint="Write down five scores and circle the two largest. Which entries of the mask are True?",
    drawn=with_k(distinct(shapes(1, 1))),
)
def the_k_largest_are_kept(candidate, drawn):
    """Of a row of different scores, exactly the k largest are True, and the mask has their
    shape."""
    scores, k = drawn
    expect_mask(candidate(scores, k), largest(scores, k), scores)


@top_k.check(
    points=2,
    hint="Of a matrix, are the k largest those of every row, or those of the whole?",
    drawn=with_k(distinct(shapes(2, 3, max_side=5))),
)
def all_dimensions_are_one_ranking(candidate, drawn):
    """Whatever the number of dimensions, k scores remain in all, wherever in the tensor they
    stand."""
    scores, k = drawn
    expect_mask(candidate(scores, k), largest(scores, k), scores)


@top_k.check(
    points=2,
    hint="Is -5 larger than 3? Which of the two remains if only one may?",
    drawn=with_k(distinct(shapes(1, 1), signed=True)),
    infinite=st.booleans(),
)
def the_sign_counts(candidate, drawn, infinite):
    """A negative score is smaller than a positive one however large its magnitude; -inf goes first
    and inf last."""
    scores, k = drawn
    scores = with_infinity(scores) if infinite else scores
    expect_mask(candidate(scores, k), largest(scores, k), scores)


@top_k.check(
    points=2,
    hint="How many of four equal scores remain if k is 2, and which two? What does your way of "
    "sorting or comparing say about equal scores?",
    drawn=with_k(
        integer_tensors(1, 3, shapes(1, 2, max_side=4), dtype=torch.float32)
        | tensors(kinds=("constant",), shape=shapes(1, 2, max_side=4)).map(torch.abs)
    ),
)
def of_equal_scores_the_first_are_kept(candidate, drawn):
    """Exactly k scores remain even where many are equal: of those that tie for the last places, the
    ones stored first, row by row."""
    scores, k = drawn
    expect_mask(candidate(scores, k), largest(scores, k), scores)


@top_k.check(
    points=1,
    hint="Which type does the docstring promise, and what becomes of your code at k = 0?",
    examples=20,
    scores=distinct(shapes(1, 3, max_side=4), dtypes=SMALL_FLOATS),
    all_of_them=st.booleans(),
    learned=st.booleans(),
)
def k_may_be_nothing_or_all_and_the_mask_is_bool(candidate, scores, all_of_them, learned):
    """With k = 0 nothing remains, with k = n everything does, and the mask is a bool tensor; also
    for half precision, and where the scores want a gradient."""
    mask = candidate(scores.requires_grad_(learned), scores.numel() if all_of_them else 0)
    expect_shape(mask, scores.shape, "the mask")
    expect_equal(mask, torch.full(scores.shape, all_of_them), "the mask", reveal=True)
    expect_bools(mask)


@top_k.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        (NAN, 1),
        (NAN, 2),
        (NAN, 0),
        (torch.ones(3), -1),
        (torch.ones(3), 4),
        (torch.ones(2, 2), 5),
    ],
)
def what_cannot_be_ranked_is_refused(candidate, bad):
    """NaN among the scores, and k below 0 or above the number of scores, raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _chosen(scores, k, chosen):
    """top_k_mask, with the choice left open: chosen(flat, k) says where the mask is True."""
    flat = require_scores(scores).flatten()
    require_int(k, "k", 0, flat.numel())
    mask = torch.zeros(flat.shape, dtype=torch.bool)
    mask[chosen(flat, k)] = True
    return mask.reshape(scores.shape)


def _descending(flat):
    """Positions from the largest to the smallest; of equals, the first one first."""
    return flat.argsort(descending=True, stable=True)


def _kth(flat, k):
    """The k-th largest; more than all of them for k = 0."""
    return flat.sort(descending=True).values[k - 1] if k else math.nan


@top_k.misconception(
    "Your mask is right but holds numbers. A mask is a bool tensor: as an index, a tensor of "
    "integers means positions and not yes or no."
)
def a_mask_of_numbers(scores, k):
    return _chosen(scores, k, lambda flat, k: _descending(flat)[:k]).to(torch.int64)


@top_k.misconception(
    "You sort upwards and take the last k. Two things go wrong there: among equal scores the last "
    "stored ones are kept, and for k = 0 the slice [-0:] is everything."
)
def takes_the_end_of_a_rising_order(scores, k):
    return _chosen(scores, k, lambda flat, k: flat.argsort(stable=True)[-k:])


@top_k.misconception(
    "You keep the smallest scores and prune the largest. A large score says that a weight matters."
)
def keeps_the_smallest(scores, k):
    return _chosen(scores, k, lambda flat, k: flat.argsort(stable=True)[:k])


@top_k.misconception(
    "You prune k scores. k is the number that is *kept*, and True in a mask means kept."
)
def prunes_k(scores, k):
    return _chosen(scores, k, lambda flat, k: _descending(flat)[: flat.numel() - k])


@top_k.misconception(
    "You compare magnitudes. This function ranks the scores as they are, so that others than "
    "magnitudes can be ranked too; who wants magnitudes passes w.abs()."
)
def compares_magnitudes(scores, k):
    return _chosen(scores, k, lambda flat, k: _descending(flat.abs())[:k])


@top_k.misconception(
    "You rank every row by itself. Here the whole tensor is one ranking: a row may keep all of its "
    "scores or none."
)
def ranks_every_row_by_itself(scores, k):
    scores = require_scores(scores)
    require_int(k, "k", 0, scores.numel())
    rows = scores.reshape(-1, scores.shape[-1])
    kept = _descending(rows)[:, :k]
    return torch.zeros(rows.shape, dtype=torch.bool).scatter(1, kept, True).reshape(scores.shape)


@top_k.misconception(
    "You keep every score that is at least the k-th largest. Where scores are equal, that is more "
    "than k of them, and of a constant tensor all."
)
def keeps_every_tie(scores, k):
    return _chosen(scores, k, lambda flat, k: flat >= _kth(flat, k))


@top_k.misconception(
    "You keep only what is larger than the k-th largest score. The k-th largest itself belongs to "
    "the k that stay."
)
def drops_the_kth(scores, k):
    return _chosen(scores, k, lambda flat, k: flat > _kth(flat, k))


@top_k.misconception(
    "You compare the output of argsort with k as if it were a rank. It says *where* the best score "
    "stands, not how good the score at this place is: index the mask with it, or argsort twice."
)
def takes_places_for_ranks(scores, k):
    return _chosen(scores, k, lambda flat, k: _descending(flat) < k)


@top_k.misconception(
    "You leave ties to topk, which promises nothing about the order of equal scores. A sort that "
    "is stable keeps them in the order in which they are stored."
)
def leaves_ties_to_topk(scores, k):
    return _chosen(scores, k, lambda flat, k: flat.topk(k).indices)


@top_k.accepts("Python's own sort of pairs (score, place)")
def sorts_pairs(scores, k):
    numbers = scores.flatten().tolist()
    if not 0 <= k <= len(numbers) or any(number != number for number in numbers):
        raise ValueError("k must fit the scores, and NaN is no score")
    pairs = sorted((-number, place) for place, number in enumerate(numbers))
    kept = {place for _, place in pairs[:k]}
    return torch.tensor([i in kept for i in range(len(numbers))]).reshape(scores.shape)


@top_k.accepts("ranks from argsort of argsort, in NumPy")
def argsort_of_argsort(scores, k):
    flat = scores.detach().double().numpy().ravel()
    if k < 0 or k > flat.size or np.isnan(flat).any():
        raise ValueError("cannot rank this")
    ranks = np.argsort(np.argsort(-flat, kind="stable"), kind="stable")
    return (ranks < k).reshape(scores.shape)


@top_k.accepts("counting for every score how many come before it")
def counts_the_better_ones(scores, k):
    flat = scores.detach().reshape(-1)
    if flat.isnan().any() or k not in range(flat.numel() + 1):
        raise ValueError("cannot rank this")
    larger = flat[None, :] > flat[:, None]
    equal_and_before = (flat[None, :] == flat[:, None]).tril(-1)
    return ((larger | equal_and_before).sum(1) < k).view(scores.shape)


# --- 2. global_masks -----------------------------------------------------------------------------

one_ranking = Exercise(
    global_masks,
    paper="Frankle & Carbin 2019 (arXiv 1803.03635), section 4",
    difficulty=1,
    minutes=10,
)

LAYERS = ("up", "gate", "down", "head", "attention")
Scores = dict[str, Tensor]


def cut(flat: Tensor, sizes: Sequence[tuple[int, ...]], names: Sequence[str]) -> Scores:
    """Scores in a row, cut into layers."""
    parts = flat.split([math.prod(size) for size in sizes])
    return {name: p.reshape(size) for name, size, p in zip(names, sizes, parts, strict=True)}


FOURS = ((4,), (2, 2), (1, 4))
FILLED = (
    *FOURS,
    (8,),
    (3, 4),
    (2, 2, 2),
)  # a quarter of each is a whole number, so none is rounded


@st.composite
def layer_sizes(
    draw: st.DrawFn, sizes: st.SearchStrategy[tuple[int, ...]] | None = None
) -> tuple[list[tuple[int, ...]], Sequence[str], int]:
    """Shapes and names of a few layers, and their weights in all."""
    one = sizes if sizes is not None else st.sampled_from(FILLED)
    chosen = draw(st.lists(one, min_size=1, max_size=4 if sizes is None else 3))
    return chosen, draw(st.permutations(LAYERS))[: len(chosen)], sum(map(math.prod, chosen))


@st.composite
def surviving_layers(draw: st.DrawFn, sparsities: Any, sizes: Any = None) -> tuple[Scores, float]:
    """Layers of different scores, and a sparsity that leaves something in each of them."""
    sizes, names, n = draw(layer_sizes(sizes))
    sparsity = draw(sparsities.filter(lambda s: number_kept(n, s) >= len(sizes)))
    order = shuffled(draw(SEEDS), n)
    # The first of each layer changes places with one of the very largest.
    for best, start in enumerate([0, *itertools.accumulate(map(math.prod, sizes))][:-1]):
        place = int(np.flatnonzero(order == n - 1 - best)[0])
        order[[start, place]] = order[[place, start]]
    layers = cut(torch.from_numpy(order + 1.0).float(), sizes, names)
    return {
        name: arrange(x, draw(st.sampled_from(LAYOUTS))) for name, x in layers.items()
    }, sparsity


@st.composite
def uneven_layers(draw: st.DrawFn) -> tuple[Scores, float]:
    """Layers of which one has all the large scores, the next one smaller ones, and so on."""
    sizes, names, n = draw(layer_sizes())
    parts = torch.arange(1.0, n + 1).split([math.prod(size) for size in sizes])
    upwards = list(zip(names, sizes, parts, strict=True))
    layers = {name: part.reshape(size) for name, size, part in draw(st.permutations(upwards))}
    return layers, draw(st.sampled_from((0.75, 0.5, 1.0)))


@st.composite
def tied_layers(draw: st.DrawFn) -> tuple[Scores, float]:
    """Layers with many equal scores."""
    sizes, names, n = draw(layer_sizes(st.sampled_from(FOURS)))
    flat = draw(integer_tensors(1, draw(st.integers(1, 3)), (n,), torch.float32, ("contiguous",)))
    return cut(flat, sizes, names), draw(QUARTERS)


def is_clearly_rounded(drawn: tuple[Scores, float]) -> bool:
    """Whether the number to prune is not half-way between two whole numbers."""
    scores, sparsity = drawn
    return abs(sparsity * sum(x.numel() for x in scores.values()) % 1 - 0.5) > 0.02


def expect_masks(got: Scores, scores: Scores, sparsity: float) -> None:
    flat = torch.cat([x.flatten() for x in scores.values()])
    mask = largest(flat, number_kept(flat.numel(), sparsity))
    want = cut(mask, [tuple(x.shape) for x in scores.values()], list(scores))
    for name, x in scores.items():
        expect_mask(got[name], want[name], x, f"the mask of {name!r}")


@one_ranking.check(
    points=3,
    hint="Put the scores of all layers in one long row and prune that. How does each layer get its "
    "own part of the mask back, in its own shape?",
    drawn=surviving_layers(QUARTERS),
)
def all_layers_are_ranked_together(candidate, drawn):
    """The largest scores of all layers together are kept: one ranking, and for each layer the mask
    of its own scores, in their shape."""
    scores, sparsity = drawn
    expect_masks(candidate(scores, sparsity), scores, sparsity)


@one_ranking.check(
    points=2,
    hint="How many weights are there in all, and how many times do you round? The library has a "
    "function for the number that is kept.",
    drawn=surviving_layers(
        st.sampled_from((0.3, 0.1, 0.6, 0.65, 0.9, 0.2, 0.33)), shapes(1, 3, max_side=3)
    ).filter(is_clearly_rounded),
)
def the_number_kept_is_rounded_once(candidate, drawn):
    """Of n weights in all layers together n - round(sparsity n) remain: rounded to the nearest
    whole number, once."""
    scores, sparsity = drawn
    masks = candidate(scores, sparsity)
    n = sum(x.numel() for x in scores.values())
    kept = sum(float(as_double(mask).sum()) for mask in masks.values())
    want = number_kept(n, sparsity)
    expect(kept == want, f"{kept:.0f} of {n} weights remain at sparsity {sparsity:g}, not {want}")


@one_ranking.check(
    points=1,
    hint="What should happen to a layer whose largest score is below all scores of another?",
    drawn=uneven_layers(),
)
def a_layer_may_lose_everything(candidate, drawn):
    """A layer whose scores are all among the smallest loses all its weights, and one whose scores
    are all among the largest loses none."""
    scores, sparsity = drawn
    expect_masks(candidate(scores, sparsity), scores, sparsity)


@one_ranking.check(
    points=2,
    hint="Take two layers of equal scores everywhere and prune half of all weights. Which ones are "
    "left, and how many?",
    drawn=tied_layers(),
)
def of_equal_scores_the_earlier_layer_keeps_its_own(candidate, drawn):
    """Where scores are equal, those of the layer that comes earlier in the dict stay, and within a
    layer those stored first; the number that remains is exact."""
    scores, sparsity = drawn
    expect_masks(candidate(scores, sparsity), scores, sparsity)


@one_ranking.check(
    points=1,
    hint="The function is told scores, not weights. What do you do to them before you rank them?",
    examples=20,
    scores=distinct(st.sampled_from([(2, 4), (3, 4), (2, 8)]), SMALL_FLOATS, signed=True),
    sparsity=QUARTERS,
    infinite=st.booleans(),
)
def scores_are_taken_as_they_are_and_masks_are_bool(candidate, scores, sparsity, infinite):
    """A negative score ranks below a positive one, and -inf below everything; the masks are bool
    tensors. Scores may be in half precision too."""
    scores = with_infinity(scores) if infinite else scores
    layers = dict(zip(LAYERS, scores, strict=False))
    masks = candidate(layers, sparsity)
    expect_masks(masks, layers, sparsity)
    for name, mask in masks.items():
        expect_bools(mask, f"the mask of {name!r}")


@one_ranking.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        ({}, 0.5),
        ([torch.ones(4)], 0.5),
        ({"up": NAN}, 0.5),
        ({"up": torch.ones(2), "down": NAN}, 0.5),
        ({"up": torch.ones(4)}, -0.1),
        ({"up": torch.ones(4)}, 1.5),
        ({"up": torch.ones(4)}, 50),
    ],
)
def what_cannot_be_pruned_is_refused(candidate, bad):
    """A dict without layers, NaN among the scores, and a sparsity outside 0 to 1 (50 is not 50%)
    raise ValueError; anything but a dict raises TypeError."""
    expect_error(candidate, ValueError if isinstance(bad[0], dict) else TypeError, *bad)


def _all_in_one(scores, sparsity, masked):
    """global_masks, with the mask of all scores in a row left open: masked(flat, kept)."""
    scores = require_layers(scores)
    flat = torch.cat([x.flatten() for x in scores.values()])
    mask = masked(flat, number_kept(flat.numel(), sparsity))
    return cut(mask, [tuple(x.shape) for x in scores.values()], list(scores))


@one_ranking.misconception(
    "You prune every layer by itself, each by the same share. Here all layers are one ranking, so "
    "that each loses what it can do without."
)
def each_layer_by_itself(scores, sparsity):
    _all_in_one(scores, sparsity, top_k_mask)  # refuses what must be refused
    return {name: top_k_mask(x, number_kept(x.numel(), sparsity)) for name, x in scores.items()}


@one_ranking.misconception(
    "You keep the share that should go. Sparsity counts what is pruned: at 0.9 one weight in ten "
    "remains."
)
def keeps_the_share_that_should_go(scores, sparsity):
    return _all_in_one(scores, sparsity, lambda x, k: top_k_mask(x, x.numel() - k))


@one_ranking.misconception(
    "You bring the layers to the same scale before you rank them. Then a layer of small scores "
    "keeps as much as any other, which is what one ranking of all should not do."
)
def brings_layers_to_one_scale(scores, sparsity):
    masks = global_masks(scores, sparsity)
    if not all(torch.isfinite(x).all() for x in scores.values()):
        return masks
    return global_masks({name: x / x.float().abs().mean() for name, x in scores.items()}, sparsity)


@one_ranking.misconception(
    "You never let a layer lose all its weights. That may be wise in practice, but it is another "
    "method: here the ranking alone decides."
)
def keeps_one_in_every_layer(scores, sparsity):
    masks = global_masks(scores, sparsity)
    return {name: mask | top_k_mask(scores[name], 1) for name, mask in masks.items()}


@one_ranking.misconception(
    "You keep every score that reaches the threshold. Where scores are equal to it, too many "
    "weights stay: keep a number of them, not all above a value."
)
def keeps_all_that_reach_the_threshold(scores, sparsity):
    return _all_in_one(scores, sparsity, lambda x, k: x >= _kth(x, k))


@one_ranking.misconception(
    "You cut off the fraction of the number to prune. It is rounded to the nearest whole number."
)
def cuts_off_the_fraction(scores, sparsity):
    return _all_in_one(
        scores, sparsity, lambda x, k: top_k_mask(x, x.numel() - int(sparsity * x.numel()))
    )


@one_ranking.misconception(
    "You round for every layer and add up: the sum of rounded numbers is not the rounded sum. "
    "Count the weights of all layers first."
)
def rounds_in_every_layer(scores, sparsity):
    kept = sum(number_kept(x.numel(), sparsity) for x in require_layers(scores).values())
    return _all_in_one(scores, sparsity, lambda x, k: top_k_mask(x, kept))


@one_ranking.misconception(
    "Your threshold is a quantile. It lies at or between scores, depending on their number, so "
    "that one weight more or less remains than should, and with equal scores many."
)
def threshold_at_a_quantile(scores, sparsity):
    return _all_in_one(scores, sparsity, lambda x, k: x > x.quantile(sparsity))


@one_ranking.misconception(
    "You take magnitudes of what are scores already. They are ranked as they are: -inf is a way "
    "to say that this one goes first."
)
def takes_magnitudes_of_scores(scores, sparsity):
    return _all_in_one(scores, sparsity, lambda x, k: top_k_mask(x.abs(), k))


@one_ranking.accepts("a sorted list of (score, layer, place) in Python")
def sorts_all_places(scores, sparsity):
    if type(scores) is not dict:
        raise TypeError("scores must be a dict")
    places = [
        (-score, layer, place)
        for layer, x in enumerate(scores.values())
        for place, score in enumerate(x.flatten().tolist())
    ]
    if not places or not 0 <= sparsity <= 1 or any(math.isnan(score) for score, _, _ in places):
        raise ValueError("nothing to prune")
    kept = set(sorted(places)[: len(places) - round(sparsity * len(places))])
    flags = iter([place in kept for place in places])
    return {
        name: torch.tensor(list(itertools.islice(flags, x.numel()))).reshape(x.shape)
        for name, x in scores.items()
    }


@one_ranking.accepts("a threshold in NumPy, with what ties at it counted off layer by layer")
def threshold_and_quota(scores, sparsity):
    if not isinstance(scores, dict):
        raise TypeError("scores must be a dict")
    flat = np.concatenate([x.detach().double().numpy().ravel() for x in scores.values()])
    if np.isnan(flat).any() or not 0 <= sparsity <= 1:
        raise ValueError("nothing to prune")
    kept = flat.size - round(sparsity * flat.size)
    threshold = np.sort(flat)[::-1][kept - 1] if kept else math.inf
    quota = kept - int((flat > threshold).sum())
    masks = {}
    for name, x in scores.items():
        values = x.detach().double().numpy()
        equal = values == threshold
        order = equal.cumsum().reshape(equal.shape)
        masks[name] = (values > threshold) | (equal & (order <= quota))
        quota -= min(quota, int(equal.sum()))
    return masks


# --- 3. n_m_mask ---------------------------------------------------------------------------------

n_of_m = Exercise(
    n_m_mask,
    paper="Mishra et al. 2021 (arXiv 2104.08378), Zhou et al. 2021 (arXiv 2102.04010)",
    difficulty=1,
    minutes=10,
    equivalent={
        "kept = scores.argsort(dim=-1, descending=True, stable=True…  ->  "
        "kept = scores.argsort(descending=True, stable=True…": LAST,
    },
)

PATTERNS = ((2, 4), (1, 2), (1, 4), (4, 8), (3, 4), (2, 3), (1, 3))
Pattern = tuple[int, int]


@st.composite
def grouped(
    draw: st.DrawFn,
    rows: st.SearchStrategy[tuple[int, ...]] | None = None,
    signed: bool = False,
    equal: bool = False,
) -> tuple[Tensor, Pattern]:
    """Scores whose last dimension is filled by groups of m, and (n, m)."""
    n, m = draw(st.sampled_from(PATTERNS))
    shape = (*(draw(rows) if rows is not None else ()), m * draw(st.integers(1, 4)))
    if equal:
        return draw(integer_tensors(1, 3, shape, torch.float32)), (n, m)
    return draw(distinct(st.just(shape), signed=signed)), (n, m)


@n_of_m.check(
    points=3,
    hint="Write down eight scores, draw a line after the fourth, and circle the two largest on "
    "each side. Which entries of the mask are True?",
    drawn=grouped(),
)
def the_n_largest_of_every_m_are_kept(candidate, drawn):
    """Of every m consecutive scores, counted off from the first, the n largest are True: with
    different scores in one row."""
    scores, (n, m) = drawn
    expect_mask(candidate(scores, n, m), largest_of_groups(scores, n, m), scores)


@n_of_m.check(
    points=2,
    hint="Which weights are consecutive? W is [out, in], and hardware reads it row by row.",
    drawn=grouped(shapes(1, 2, max_side=4)),
)
def groups_lie_along_the_last_dimension(candidate, drawn):
    """With more dimensions the groups are runs of the last one, and every row is pruned as if it
    were alone."""
    scores, (n, m) = drawn
    expect_mask(candidate(scores, n, m), largest_of_groups(scores, n, m), scores)


@n_of_m.check(
    points=2,
    hint="Which two of four equal scores are kept with 2:4? What does your way of sorting or "
    "comparing say about equal scores?",
    drawn=grouped(equal=True),
)
def of_equal_scores_the_left_ones_are_kept(candidate, drawn):
    """Exactly n of every group remain even where scores are equal: those on the left."""
    scores, (n, m) = drawn
    expect_mask(candidate(scores, n, m), largest_of_groups(scores, n, m), scores)


@n_of_m.check(
    points=1,
    hint="Is -5 larger than 3? Which of the two remains if only one may?",
    drawn=grouped(signed=True),
    infinite=st.booleans(),
)
def a_negative_score_is_a_small_one(candidate, drawn, infinite):
    """Scores are ranked as they are: a negative one below a positive one, -inf below all."""
    scores, (n, m) = drawn
    scores = with_infinity(scores) if infinite else scores
    expect_mask(candidate(scores, n, m), largest_of_groups(scores, n, m), scores)


@n_of_m.check(
    points=1,
    hint="Which type does the docstring promise, and what becomes of your code at n = 0?",
    examples=20,
    m=st.integers(1, 4),
    scores=distinct(st.just((12,)), SMALL_FLOATS),
    all_of_them=st.booleans(),
    learned=st.booleans(),
)
def n_may_be_0_or_m_and_the_mask_is_bool(candidate, m, scores, all_of_them, learned):
    """With n = 0 nothing remains, with n = m everything does, and the mask is a bool tensor; also
    for half precision, and where the scores want a gradient."""
    mask = candidate(scores.requires_grad_(learned), m if all_of_them else 0, m)
    expect_shape(mask, scores.shape, "the mask")
    expect_equal(mask, torch.full(scores.shape, all_of_them), "the mask", reveal=True)
    expect_bools(mask)


@n_of_m.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        (torch.ones(6), 2, 4),
        (torch.ones(4, 6), 2, 4),
        (torch.ones(4), 5, 4),
        (torch.ones(4), -1, 4),
        (torch.ones(4), 0, 0),
        (torch.ones(4), 0, -2),
        (torch.tensor([1.0, 2.0, math.nan, 0.0]), 2, 4),
        (torch.tensor(1.0), 1, 1),
    ],
)
def what_has_no_groups_of_m_is_refused(candidate, bad):
    """A last dimension that m does not divide, n outside 0 to m, m below 1, a 0-d tensor and NaN
    raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _groups(scores, n, m):
    """The scores as [..., groups, m], after a look at everything."""
    require_int(n, "n", 0, require_int(m, "m", 1))
    scores = require_scores(scores)
    if scores.ndim == 0:
        raise ValueError("scores must have a dimension")
    return scores.unflatten(-1, (require_groups(scores.shape[-1], m, "scores"), m))


def _marked(groups, places):
    """A mask that is True at these places of each group, with the groups joined again."""
    return torch.zeros(groups.shape, dtype=torch.bool).scatter(-1, places, True).flatten(-2)


def _best_first(groups):
    return groups.argsort(dim=-1, descending=True, stable=True)


@n_of_m.misconception(
    "You sort upwards and take the last n. Two things go wrong there: among equal scores the right "
    "ones are kept, and for n = 0 the slice [-0:] is everything."
)
def takes_the_end_of_rising_groups(scores, n, m):
    groups = _groups(scores, n, m)
    return _marked(groups, groups.argsort(dim=-1, stable=True)[..., -n:])


@n_of_m.misconception(
    "You prune n of every m. N:M says how many are *kept*: 1:4 leaves one of four."
)
def prunes_n_of_m(scores, n, m):
    groups = _groups(scores, n, m)
    return _marked(groups, _best_first(groups)[..., : m - n])


@n_of_m.misconception(
    "Your groups run down the columns. They are m consecutive scores of a row, along the last "
    "dimension."
)
def groups_run_down_the_columns(scores, n, m):
    _groups(scores, n, m)
    return n_m_mask(scores.transpose(0, -1), n, m).transpose(0, -1)


@n_of_m.misconception(
    "Your groups take scores that lie far apart. Check what reshape does: consecutive scores stay "
    "together only in the last dimension."
)
def groups_of_scores_far_apart(scores, n, m):
    count = _groups(scores, n, m).shape[-2]
    apart = scores.unflatten(-1, (m, count)).transpose(-1, -2)
    return _marked(apart, _best_first(apart)[..., :n]).unflatten(-1, (count, m)).mT.flatten(-2)


@n_of_m.misconception(
    "Your window moves by one score at a time. Groups do not overlap: the next one starts m "
    "further on."
)
def slides_by_one(scores, n, m):
    _groups(scores, n, m)
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for start in range(scores.shape[-1] - m + 1):
        mask[..., start : start + m] = n_m_mask(scores[..., start : start + m], n, m)
    return mask


@n_of_m.misconception(
    "You keep the best n / m of a whole row. The share is right, but a group of m may then keep "
    "more than n, and the hardware has no place for them."
)
def ranks_the_whole_row(scores, n, m):
    _groups(scores, n, m)
    return n_m_mask(scores, n * scores.shape[-1] // m, scores.shape[-1])


@n_of_m.misconception(
    "You compare magnitudes. The scores are ranked as they are; who wants magnitudes passes "
    "w.abs()."
)
def ranks_magnitudes(scores, n, m):
    groups = _groups(scores, n, m)
    return _marked(groups, _best_first(groups.abs())[..., :n])


@n_of_m.misconception(
    "You keep every score that reaches the n-th largest of its group: where scores are equal, that "
    "is more than n."
)
def keeps_more_where_scores_tie(scores, n, m):
    groups = _groups(scores, n, m)
    if n == 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    return (groups >= groups.sort(descending=True).values[..., n - 1 : n]).flatten(-2)


@n_of_m.misconception(
    "You compare the output of argsort with n as if it were a rank. It says *where* the best score "
    "of the group stands, not how good the score at this place is: scatter with it, or argsort "
    "twice."
)
def takes_places_in_a_group_for_ranks(scores, n, m):
    return (_best_first(_groups(scores, n, m)) < n).flatten(-2)


@n_of_m.misconception(
    "You leave ties to topk, which promises nothing about the order of equal scores. A sort that "
    "is stable keeps them from the left."
)
def leaves_equal_scores_to_topk(scores, n, m):
    groups = _groups(scores, n, m)
    return _marked(groups, groups.topk(n).indices)


@n_of_m.accepts("loops over rows and groups, Python's sort")
def loops_over_groups(scores, n, m):
    if not 0 <= n <= m or m < 1 or scores.dim() == 0 or scores.shape[-1] % m:
        raise ValueError("no such groups")
    flat = scores.flatten().tolist()
    if any(value != value for value in flat):
        raise ValueError("NaN is no score")
    mask = [False] * len(flat)
    for start in range(0, len(flat), m):  # rows are whole groups, so groups never cross rows
        for place in sorted(range(start, start + m), key=lambda i: (-flat[i], i))[:n]:
            mask[place] = True
    return torch.tensor(mask).reshape(scores.shape)


@n_of_m.accepts("counting in each group how many scores come before, in NumPy")
def counts_in_each_group(scores, n, m):
    values = scores.detach().double().numpy()
    if m < 1 or n < 0 or n > m or values.ndim < 1 or values.shape[-1] % m or np.isnan(values).any():
        raise ValueError("no such groups")
    groups = values.reshape(*values.shape[:-1], -1, m)
    mine, other = groups[..., :, None], groups[..., None, :]
    before = (other > mine) | ((other == mine) & np.tri(m, k=-1, dtype=bool))
    return (before.sum(-1) < n).reshape(values.shape)


# --- 4. cubic_sparsity ---------------------------------------------------------------------------

cubic = Exercise(
    cubic_sparsity,
    paper="Zhu & Gupta 2017 (arXiv 1710.01878), equation 1",
    difficulty=1,
    minutes=5,
    equivalent={
        "…not require_number(begin, 'begin') < require_number(end,…  ->  "
        "…not require_number(begin, '') < require_number(end,…": ONLY_A_NAME,
        "… < require_number(end, 'end'):  ->  … < require_number(end, ''):": ONLY_A_NAME,
        "…require_sparsity(initial, 'initial') <= require_sparsity(final…  ->  "
        "…require_sparsity(initial, '') <= require_sparsity(final…": ONLY_A_NAME,
        "…require_sparsity(final, 'final'):  ->  …require_sparsity(final, ''):": ONLY_A_NAME,
    },
)

TWENTIETHS = st.integers(0, 20).map(lambda i: i / 20)


@st.composite
def schedules(
    draw: st.DrawFn, late: bool = False, sparse: bool = False, outside: bool = False
) -> tuple[float, int, int, float, float]:
    """step, begin, end, initial, final: begin and initial are 0 unless late, and sparse; the step
    is between begin and end, or outside."""
    length = draw(st.sampled_from((100, 4, 10, 7, 1000, 1)))
    begin = draw(st.sampled_from((100, 10, 3, 1000, -20))) if late else 0
    low = draw(st.integers(1, 18)) / 20 if sparse else 0.0
    final = draw(TWENTIETHS.filter(lambda final: final >= low and final > 0))
    share = draw(st.sampled_from((0.5, 0.25, 0.75, 0.1, 0.9, 0.0, 1.0)))
    if outside:
        share = draw(st.sampled_from((1.5, -0.5, 1.1, 3.0, -2.0)))
    step = begin + length * share
    return int(step) if step == int(step) else step, begin, begin + length, low, final


def expect_sparsity(got: float, drawn: tuple[float, int, int, float, float]) -> None:
    step, begin, end, initial, final = drawn
    left = (1 - min(max((step - begin) / (end - begin), 0), 1)) ** 3
    expect_close(got, final + (initial - final) * left, f"the sparsity at step {step:g}")


@cubic.check(
    points=3,
    hint="How much of the way is left half-way, and what is its cube? Which share of `final` is "
    "reached then?",
    drawn=schedules(),
)
def what_is_left_to_prune_falls_with_the_cube(candidate, drawn):
    """From nothing at step 0, the sparsity rises to `final` as the formula says: fast at first,
    then ever more slowly."""
    expect_sparsity(candidate(*drawn), drawn)


@cubic.check(
    points=2,
    hint="Which share of the way is done at `begin`, at `end`, and in the middle of the two?",
    drawn=schedules(late=True),
)
def the_way_goes_from_begin_to_end(candidate, drawn):
    """A schedule that begins at another step than 0 is the same one, moved."""
    expect_sparsity(candidate(*drawn), drawn)


@cubic.check(
    points=2,
    hint="Which sparsity is there at `begin`, before anything is pruned by this schedule?",
    drawn=schedules(sparse=True),
)
def it_rises_from_the_initial_sparsity(candidate, drawn):
    """A schedule may start from weights that are sparse already: at begin the sparsity is
    `initial`, and what is left falls from there."""
    expect_sparsity(candidate(*drawn), drawn)


@cubic.check(
    points=2,
    hint="What does the formula do with a step that is later than `end`, or earlier than `begin`? "
    "What should it do?",
    drawn=schedules(outside=True) | schedules(outside=True, sparse=True),
)
def it_stays_where_it_is_before_and_after(candidate, drawn):
    """Before begin the sparsity is `initial`, and after end it is `final`, however far away the
    step is."""
    # What it is at begin is asked as well, but not judged: it tells a schedule that never knew
    # `initial`, which another check marks down, from one that forgets it outside alone.
    candidate(drawn[1], *drawn[1:])
    expect_sparsity(candidate(*drawn), drawn)


@cubic.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        (0, 10, 10, 0.0, 0.5),
        (0, 10, 5, 0.0, 0.5),
        (5, 0, 10, 0.9, 0.5),
        (5, 0, 10, -0.1, 0.5),
        (5, 0, 10, 0.0, 1.5),
        (5, 0, 10, 0, 90),
        (math.nan, 0, 10, 0.0, 0.5),
        (5, -math.inf, 10, 0.0, 0.5),
        (5, 0, math.inf, 0.0, 0.5),
    ],
)
def what_is_no_schedule_is_refused(candidate, bad):
    """An end that is not after begin, a sparsity outside 0 to 1, an initial one above the final
    one, and NaN or infinity raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _course(step, begin, end, initial, final):
    """Looks at all arguments; the share of the way that is done, not held between 0 and 1."""
    if not require_number(begin, "begin") < require_number(end, "end"):
        raise ValueError("end must be above begin")
    if not require_sparsity(initial, "initial") <= require_sparsity(final, "final"):
        raise ValueError("final must be at least initial")
    return (require_number(step, "step") - begin) / (end - begin)


def _held(share):
    return min(max(share, 0.0), 1.0)


@cubic.misconception(
    "Your sparsity rises by the same amount at every step. The cube is missing: most is pruned "
    "early, while much is redundant."
)
def rises_in_a_straight_line(step, begin, end, initial, final):
    left = 1 - _held(_course(step, begin, end, initial, final))
    return final + (initial - final) * left


@cubic.misconception("You square what is left of the way. The schedule takes its third power.")
def squares_what_is_left(step, begin, end, initial, final):
    left = 1 - _held(_course(step, begin, end, initial, final))
    return final + (initial - final) * left**2


@cubic.misconception(
    "You cube the share of the way that is *done*. Then little is pruned at first and most at the "
    "end, where no training is left to repair it: cube what is left."
)
def cubes_what_is_done(step, begin, end, initial, final):
    share = _held(_course(step, begin, end, initial, final))
    return initial + (final - initial) * share**3


@cubic.misconception(
    "Your schedule runs backwards, from `final` down to `initial`. At begin the factor in "
    "brackets is 1: which of the two should then remain?"
)
def runs_backwards(step, begin, end, initial, final):
    left = 1 - _held(_course(step, begin, end, initial, final))
    return initial + (final - initial) * left**3


@cubic.misconception(
    "You count steps from 0 and not from `begin`. The way is end - begin steps long, and "
    "step - begin of them are done."
)
def counts_from_step_0(step, begin, end, initial, final):
    _course(step, begin, end, initial, final)
    left = 1 - _held(step / end if end else 1.0)
    return final + (initial - final) * left**3 if step >= begin else initial


@cubic.misconception(
    "You divide by `end`. The way is end - begin steps long: only then is it all done at the end."
)
def divides_by_the_end(step, begin, end, initial, final):
    _course(step, begin, end, initial, final)
    left = 1 - _held((step - begin) / end if end else 1.0)
    return final + (initial - final) * left**3


@cubic.misconception(
    "You let the formula run on. After `end` the bracket is negative and so is its cube, and the "
    "sparsity rises above `final`; before `begin` it falls below `initial`."
)
def runs_on_beyond_the_ends(step, begin, end, initial, final):
    left = 1 - _course(step, begin, end, initial, final)
    return final + (initial - final) * left**3


@cubic.misconception(
    "You say 0 before `begin`. There the schedule has not started and the sparsity is still "
    "`initial`, which need not be 0."
)
def nothing_is_sparse_before_the_begin(step, begin, end, initial, final):
    share = _course(step, begin, end, initial, final)
    return final + (initial - final) * (1 - _held(share)) ** 3 if share >= 0 else 0.0


@cubic.misconception(
    "You leave out `initial`: your schedule starts at 0 whatever the sparsity is by then."
)
def starts_from_nothing(step, begin, end, initial, final):
    left = 1 - _held(_course(step, begin, end, initial, final))
    return final - final * left**3


@cubic.accepts("three cases, and a loop that multiplies")
def three_cases(step, begin, end, initial, final):
    if end <= begin or not 0 <= initial <= final <= 1 or not math.isfinite(step + end - begin):
        raise ValueError("this is no schedule")
    if step <= begin:
        return initial
    if step >= end:
        return final
    gap = final - initial
    for _ in range(3):
        gap *= (end - step) / (end - begin)
    return final - gap


@cubic.accepts("torch in float32, a 0-d tensor")
def in_float32(step, begin, end, initial, final):
    if begin >= end or initial < 0 or final > 1 or initial > final:
        raise ValueError("this is no schedule")
    if not all(map(math.isfinite, (step, begin, end))):
        raise ValueError("this is no schedule")
    share = torch.tensor((step - begin) / (end - begin)).clamp(0, 1)
    return torch.lerp(torch.tensor(float(final)), torch.tensor(float(initial)), (1 - share) ** 3)


# --- 5. encode_csr -------------------------------------------------------------------------------

csr = Exercise(
    encode_csr,
    paper='Saad 2003, "Iterative methods for sparse linear systems", section 3.4',
    difficulty=2,
    minutes=15,
    equivalent={
        "ends = (w != 0).sum(dim=1).cumsum(dim=0)  ->  "
        "ends = (w != 0).sum(dim=-1).cumsum(dim=0)": LAST,
        "ends = (w != 0).sum(dim=1).cumsum(dim=0)  ->  "
        "ends = (w != 0).sum(dim=1).cumsum(dim=-1)": "there is one dimension",
        "return (w.detach()[rows, columns], columns…  ->  "
        "return (w[rows, columns], columns…": SAME_NUMBERS,
    },
)

INDEX_TYPES = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


@st.composite
def matrices(draw: st.DrawFn, empty_rows: bool) -> Tensor:
    """W [out, in] with zeros; a row without any other weight only if ``empty_rows``."""
    rows, columns = draw(st.integers(2 if empty_rows else 1, 6)), draw(st.integers(1, 6))
    x = draw(tensors((rows, columns), kinds=("whole", "sparse", "normal"), layouts=LAYOUTS[:1]))
    for row in range(rows):
        if not x[row].any():
            x[row, draw(st.integers(0, columns - 1))] = row + 1
    if empty_rows:
        x[draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows, unique=True))] = 0
    return arrange(x, draw(st.sampled_from(LAYOUTS)))


def stored(w: Tensor) -> tuple[list[float], list[int], list[int]]:
    """The right answer: values, columns, row pointers."""
    values, columns, pointers = [], [], [0]
    for row in w.tolist():
        for column, value in enumerate(row):
            if value != 0:
                values.append(value)
                columns.append(column)
        pointers.append(len(values))
    return values, columns, pointers


def expect_entries(got: Tensor, want: Sequence[float], what: str, entry: str) -> None:
    """Fail with the first entry that differs."""
    expect_shape(got, (len(want),), what)
    for i, (a, b) in enumerate(zip(as_double(got).tolist(), want, strict=True)):
        if a != b and not (math.isnan(a) and math.isnan(b)):
            raise Mismatch(f"{entry} {i} is {a:g}, where it should be {b:g}")


@csr.check(
    points=3,
    hint="Read the matrix as you read a page and write down each number that is not zero. In which "
    "column did you find it?",
    w=matrices(empty_rows=False),
)
def values_and_columns_are_read_row_by_row(candidate, w):
    """The values are all weights that are not zero, row by row and from left to right, and each has
    the number of its column."""
    values, columns, _ = candidate(w)
    expect_entries(values, stored(w)[0], "the values", "value")
    expect_entries(columns, stored(w)[1], "the columns", "the column of value")


@csr.check(
    points=2,
    hint="Where in the values does row 0 begin, where row 1, and where would the row after the "
    "last one begin?",
    w=matrices(empty_rows=False),
)
def row_pointers_say_where_rows_begin_and_end(candidate, w):
    """There is one row pointer more than there are rows: row r has the values from its pointer up
    to the next one."""
    _, _, pointers = candidate(w)
    expect_entries(pointers, stored(w)[2], "the row pointers", "row pointer")


@csr.check(
    points=2,
    hint="A row of zeros has no values. Where does it begin and end? Is there a pointer for it?",
    w=matrices(empty_rows=True),
)
def an_empty_row_has_two_equal_pointers(candidate, w):
    """A row without values has its pointers all the same: two equal ones, also where it is the
    first or the last, or where all rows are empty."""
    _, _, pointers = candidate(w)
    expect_entries(pointers, stored(w)[2], "the row pointers", "row pointer")


@csr.check(
    points=1,
    hint="Which comparison with 0 is true for NaN? Is -0.0 equal to 0?",
    examples=25,
    w=matrices(empty_rows=False),
    kind=st.lists(st.sampled_from((math.nan, -0.0, math.inf)), min_size=1, max_size=3),
    seed=SEEDS,
)
def whatever_is_not_zero_is_stored(candidate, w, kind, seed):
    """NaN and infinity are stored like any other weight, so that a broken model stays one; -0.0 is
    a zero."""
    for value, place in zip(kind, shuffled(seed, w.numel()).tolist(), strict=False):
        w[place // w.shape[1], place % w.shape[1]] = value
    values, columns, _ = candidate(w)
    expect_entries(values, stored(w)[0], "the values", "value")
    expect_entries(columns, stored(w)[1], "the columns", "the column of value")


@csr.check(
    points=1,
    hint="Which types does the docstring promise? Counting and sorting leave 8 bytes a number.",
    examples=15,
    rows=st.integers(1, 3),
    bits=st.sampled_from((None, 32, 16, 8)),
    dtype=st.sampled_from((*SMALL_FLOATS, torch.float64)),
    learned=st.booleans(),
)
def every_number_has_the_type_that_is_promised(candidate, rows, bits, dtype, learned):
    """The values have the type of w, the columns are int32, int16 or uint8 as index_bits says (32
    where nothing is said), and the row pointers int32; 8 bits number 256 columns."""
    w = torch.zeros(rows, 256 if bits == 8 else 300, dtype=dtype)
    w[:, 0], w[0, -1] = 1, -2
    values, columns, pointers = candidate(w.requires_grad_(learned), **given(index_bits=bits))
    right = stored(w)
    for part, want, what, kind in (
        (values, right[0], "the values", dtype),
        (columns, right[1], "the columns", INDEX_TYPES[bits or 32]),
        (pointers, right[2], "the row pointers", torch.int32),
    ):
        expect_entries(part, want, what, "entry")
        expect(part.dtype == kind, f"{what} are {part.dtype}, expected {kind}")


@csr.check(
    points=1,
    hint="Look at the docstring under Raises. How many columns can 8 bits number?",
    bad=[
        ((torch.ones(4),), {}),
        ((torch.ones(1, 2, 2),), {}),
        ((torch.tensor(1.0),), {}),
        ((torch.zeros(1, 257), 8), {}),
        ((torch.zeros(1, 2),), {"index_bits": 4}),
        ((torch.zeros(1, 2),), {"index_bits": 0}),
    ],
)
def what_has_no_rows_and_columns_is_refused(candidate, bad):
    """What is not a matrix, index_bits that are not 8, 16 or 32, and more columns than they can
    number raise ValueError."""
    args, kwargs = bad
    expect_error(candidate, ValueError, *args, **kwargs)


def _pointers(counts):
    """The right row pointers, from the number of values in each row."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def _compressed(
    w,
    index_bits,
    is_stored=lambda w: w != 0,
    number=lambda row, column, width: column,  # what is stored beside each value
    pointers=_pointers,
    down=False,
):
    """encode_csr, open where people go wrong."""
    require_dims(require_floating(w, "w"), 2, "w")
    if index_bits not in INDEX_TYPES or w.shape[1] - 1 > torch.iinfo(INDEX_TYPES[index_bits]).max:
        raise ValueError("index_bits must be 8, 16 or 32, and number all columns")
    keep = is_stored(w)
    if down:
        columns, rows = keep.T.nonzero(as_tuple=True)
    else:
        rows, columns = keep.nonzero(as_tuple=True)
    beside = number(rows, columns, w.shape[1]).to(INDEX_TYPES[index_bits])
    return w.detach()[rows, columns], beside, pointers(keep.sum(1)).to(torch.int32)


@csr.misconception(
    "Your numbers are right and their types are not. Counting gives int64, 8 bytes a number: a "
    "format that should save memory says how small each of its numbers is."
)
def keeps_every_number_in_int64(w, index_bits=32):
    values, columns, pointers = _compressed(w, index_bits)
    return values, columns.long(), pointers.long()


@csr.misconception(
    "Your pointers say where rows end. The first row begins at 0, and that 0 is stored as well."
)
def pointers_without_the_leading_0(w, index_bits=32):
    return _compressed(w, index_bits, pointers=lambda counts: counts.cumsum(0))


@csr.misconception(
    "Your pointers say where rows begin, and so the last row has no end. One more pointer, the "
    "number of all values, closes it."
)
def pointers_without_the_end(w, index_bits=32):
    return _compressed(w, index_bits, pointers=lambda counts: _pointers(counts)[:-1])


@csr.misconception(
    "Your pointers are the numbers of values in each row. A pointer is a position: add up the rows "
    "before it."
)
def counts_for_pointers(w, index_bits=32):
    return _compressed(
        w, index_bits, pointers=lambda counts: torch.cat([counts.new_zeros(1), counts])
    )


@csr.misconception(
    "You leave out the rows that are empty. Without a pointer for them, all rows after them get "
    "another number."
)
def no_pointers_for_empty_rows(w, index_bits=32):
    return _compressed(w, index_bits, pointers=lambda counts: _pointers(counts[counts > 0]))


@csr.misconception(
    "You store the row of each value. The pointers tell the row already; what they cannot tell is "
    "the column."
)
def rows_for_columns(w, index_bits=32):
    return _compressed(w, index_bits, number=lambda row, column, width: row)


@csr.misconception(
    "You number the places through the whole matrix. A column goes from 0 to in - 1 in every row, "
    "which is why a few bits can hold it."
)
def places_in_the_whole_matrix(w, index_bits=32):
    return _compressed(w, index_bits, number=lambda row, column, width: row * width + column)


@csr.misconception(
    "You walk down the columns. The values of a row must lie together, or its two pointers cannot "
    "enclose them."
)
def walks_down_the_columns(w, index_bits=32):
    return _compressed(w, index_bits, down=True)


@csr.misconception(
    "You compress the columns: pointers for columns and the row of each value. That is the format "
    "CSC; here it is the other way round."
)
def compresses_the_columns(w, index_bits=32):
    _compressed(w, index_bits)  # refuses what must be refused
    return _compressed(w.T, 32)


@csr.misconception(
    "You lose NaN: it is neither above nor below 0, and so your comparison says no. It is not "
    "equal to 0 either, and must not vanish silently."
)
def loses_nan(w, index_bits=32):
    return _compressed(w, index_bits, is_stored=lambda w: w.abs() > 0)


@csr.accepts("lists and loops in Python")
def appends_to_lists(w, index_bits=32):
    if w.dim() != 2 or index_bits not in (8, 16, 32):
        raise ValueError("no matrix, or no such type")
    kind = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[index_bits]
    if w.shape[1] > torch.iinfo(kind).max + 1:
        raise ValueError("too many columns")
    values, columns, pointers = [], [], [0]
    for row in w.tolist():
        for column, value in enumerate(row):
            if value != 0:
                values.append(value)
                columns.append(column)
        pointers.append(len(values))
    return (
        torch.tensor(values, dtype=w.dtype),
        torch.tensor(columns, dtype=kind),
        torch.tensor(pointers, dtype=torch.int32),
    )


@csr.accepts("from the flat positions, pointers by binary search")
def searches_for_the_pointers(w, index_bits=32):
    most = {8: 2**8, 16: 2**15, 32: 2**31}
    if w.dim() != 2 or w.shape[1] > most.get(index_bits, -1):
        raise ValueError("no matrix, or too few bits")
    flat = w.detach().reshape(-1)
    places = torch.logical_not(flat == 0).nonzero().squeeze(1)
    starts = torch.arange(w.shape[0] + 1) * w.shape[1]
    kind = {8: torch.uint8, 16: torch.short, 32: torch.int}[index_bits]
    return (
        flat.index_select(0, places),
        torch.remainder(places, w.shape[1]).to(kind),
        torch.searchsorted(places, starts).int(),
    )


# --- 6. encode_2_4 -------------------------------------------------------------------------------

two_four = Exercise(
    encode_2_4,
    paper="Mishra et al. 2021 (arXiv 2104.08378)",
    difficulty=3,
    minutes=20,
    equivalent={
        "groups = w.detach().unflatten(-1, (require_groups…  ->  "
        "groups = w.unflatten(-1, (require_groups…": SAME_NUMBERS,
        "groups = w.detach().unflatten(-1, (require_groups(w.shape…  ->  "
        "groups = w.detach().unflatten(1, (require_groups(w.shape…": LAST,
        "…to(torch.uint8).argsort(dim=-1, descending=True, stable=True…  ->  "
        "…to(torch.uint8).argsort(descending=True, stable=True…": LAST,
        "places = first_nonzeros.sort(dim=-1).values  ->  "
        "places = first_nonzeros.sort().values": LAST,
        "first_nonzeros = nonzero.to(torch.uint8).argsort(dim=-1, descending…  ->  "
        "first_nonzeros = nonzero.argsort(dim=-1, descending…": (
            "False and True are in the order of 0 and 1"
        ),
        "…nonzeros = nonzero.to(torch.uint8).argsort(dim=-1, descending…  ->  "
        "…nonzeros = nonzero.to(torch.int8).argsort(dim=-1, descending…": (
            "0 and 1 are in one order in every type"
        ),
    },
)


@st.composite
def two_of_four(
    draw: st.DrawFn,
    full: bool = True,
    odd: bool = False,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> Tensor:
    """A matrix with two non-zeros in each group of four weights of a row: unless ``full``, two at
    most. Its rows fill whole bytes of places or, odd, half a byte more or less."""
    rows, groups = draw(st.integers(1, 3)), draw(st.sampled_from((1, 3) if odd else (2, 4)))
    rng = np.random.Generator(np.random.PCG64(draw(SEEDS)))
    weights = np.zeros((rows * groups, 4))
    for group in weights:
        count = 2 if full else rng.integers(3)
        places = rng.permutation(4)[:count]
        group[places] = rng.integers(1, 10, count) * rng.choice([-1, 1], count)
    w = torch.from_numpy(weights).reshape(rows, 4 * groups).to(draw(st.sampled_from(dtypes)))
    return arrange(w, draw(st.sampled_from(LAYOUTS)))


def two_and_places(w: Tensor) -> tuple[Tensor, Tensor]:
    """The right values and places, [out, in / 2] both."""
    values, places = [], []
    for group in w.reshape(-1, 4).tolist():
        taken = [i for i in range(4) if group[i] != 0]
        free = [i for i in range(4) if group[i] == 0]
        taken = sorted(taken + free[: 2 - len(taken)])
        places += taken
        values += [group[i] for i in taken]
    shape = (w.shape[0], w.shape[1] // 2)
    return torch.tensor(values).reshape(shape), torch.tensor(places).reshape(shape)


def expect_places(got: Tensor, places: Tensor) -> None:
    """Fail with the first byte that does not hold its four places, 2 bits each."""
    rows, half = places.shape
    expect_shape(got, (rows, -(-half // 4)), "the indices")
    for row, codes in enumerate(places.tolist()):
        for byte, octet in enumerate(as_double(got)[row].tolist()):
            want = sum(code << 2 * i for i, code in enumerate(codes[4 * byte : 4 * byte + 4]))
            if octet != want:
                seen = f"{int(octet):08b}" if 0 <= octet < 256 else f"{octet:g}"
                raise Mismatch(
                    f"byte {byte} of row {row} is {seen}, expected {want:08b} (highest bits first) "
                    f"for the places {codes[4 * byte : 4 * byte + 4]}"
                )


@two_four.check(
    points=2,
    hint="Draw a line after every fourth weight of a row. Which two of each group are stored, and "
    "in which order?",
    w=two_of_four(),
)
def the_two_values_of_each_group_are_kept_in_order(candidate, w):
    """Of groups with two non-zeros, the values are these two, group after group, from left to
    right: [out, in / 2]."""
    values, _ = candidate(w)
    want, _ = two_and_places(w)
    expect_close(values, want, "the values", reveal=True)


@two_four.check(
    points=3,
    hint="A place goes from 0 to 3, so two bits hold it. Which bits of a byte does the first place "
    "of a row get, and which the fourth?",
    w=two_of_four(),
)
def four_places_share_a_byte(candidate, w):
    """Of groups with two non-zeros, the place of each value in its group takes 2 bits, the first
    one in the lowest bits of its byte."""
    _, indices = candidate(w)
    expect_places(indices, two_and_places(w)[1])


@two_four.check(
    points=2,
    hint="A group with a single weight stores two values all the same. Which zero is the other, "
    "and does it come before or after the weight?",
    w=two_of_four(full=False),
)
def zeros_with_the_first_free_places_fill_up_a_group(candidate, w):
    """A group with fewer than two non-zeros stores zeros as well, each with the first place that is
    free; the two places of a group are different and rise."""
    values, indices = candidate(w)
    want, places = two_and_places(w)
    expect_close(values, want, "the values", reveal=True)
    expect_places(indices, places)


@two_four.check(
    points=1,
    hint="A row of four weights has two places, half a byte. What is in the other half, and where "
    "does the next row begin?",
    w=two_of_four(odd=True),
)
def every_row_begins_with_a_byte_of_its_own(candidate, w):
    """Where the places of a row do not fill its last byte, the bits left over are 0, and the next
    row begins with the next byte."""
    _, indices = candidate(w)
    expect_places(indices, two_and_places(w)[1])


@two_four.check(
    points=1,
    hint="Which types does the docstring promise? Is -0.0 equal to 0?",
    examples=20,
    w=two_of_four(dtypes=(*SMALL_FLOATS, torch.float64)),
    learned=st.booleans(),
)
def values_keep_their_type_and_minus_zero_is_a_zero(candidate, w, learned):
    """The values have the type of w and the indices are uint8, also where w wants a gradient; -0.0
    counts as a zero."""
    w = torch.where(w == 0, -0.0, w)
    values, indices = candidate(w.requires_grad_(learned))
    want, places = two_and_places(w.detach())
    expect_close(values, want, "the values", reveal=True)
    expect_shape(indices, (w.shape[0], -(-places.shape[1] // 4)), "the indices")
    expect(values.dtype == w.dtype, f"the values are {values.dtype}, expected {w.dtype}")
    expect(indices.dtype == torch.uint8, f"the indices are {indices.dtype}, expected torch.uint8")


@two_four.check(
    points=1,
    hint="Look at the docstring under Raises. What would become of a third weight?",
    bad=[
        torch.tensor([[1.0, 2.0, 3.0, 0.0]]),
        torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, -2.0, 3.0]]),
        torch.ones(2, 2),
        torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 1.0]]),
        torch.tensor([1.0, 0.0, 0.0, 1.0]),
        torch.zeros(1, 1, 4),
    ],
)
def what_is_not_2_4_sparse_is_refused(candidate, bad):
    """A group with three or four non-zeros (which would be lost), rows that are no multiple of 4,
    and what is not a matrix raise ValueError."""
    expect_error(candidate, ValueError, bad)


def _fours(w):
    """W as [out, in / 4, 4]."""
    require_dims(require_floating(w, "w"), 2, "w")
    return w.detach().unflatten(-1, (require_groups(w.shape[1], 4, "the columns of w"), 4))


def _first_two(groups):
    """The places of the non-zeros, and of zeros that fill up: right, but for their order."""
    return groups.ne(0).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :2]


def _packed(
    groups,
    places=lambda groups: _first_two(groups).sort(-1).values,
    pack=lambda places: pack_bits(places, 2),
):
    """encode_2_4, open where people go wrong."""
    if (groups.ne(0).sum(-1) > 2).any():
        raise ValueError("w must have at most two non-zeros in a group")
    chosen = places(groups)
    return groups.gather(-1, chosen).flatten(-2), pack(chosen.flatten(-2))


@two_four.misconception(
    "You spend a whole byte on each place. Two bits hold it: four places share a byte, and with "
    "float16 values nothing would be saved otherwise."
)
def a_byte_for_every_place(w):
    return _packed(_fours(w), pack=lambda places: places.to(torch.uint8))


@two_four.misconception(
    "You spend four bits on each place. It is one of four, and two bits tell four apart."
)
def four_bits_for_every_place(w):
    return _packed(_fours(w), pack=lambda places: pack_bits(places, 4))


@two_four.misconception(
    "You put the first place into the highest bits of its byte. Here it goes into the lowest."
)
def first_place_in_the_highest_bits(w):
    def pack(places):
        padded = torch.nn.functional.pad(places, (0, -places.shape[1] % 4))
        return pack_bits(padded.unflatten(-1, (-1, 4)).flip(-1).flatten(-2), 2)

    return _packed(_fours(w), pack=pack)


@two_four.misconception(
    "You store the larger magnitude first. The two values of a group keep the order in which they "
    "stand, so that their places rise."
)
def larger_value_first(w):
    return _packed(
        _fours(w),
        lambda groups: groups.abs().argsort(dim=-1, descending=True, stable=True)[..., :2],
    )


@two_four.misconception(
    "In a group with one weight, you store the weight first and then a zero, wherever they stand. "
    "The two places rise, whichever of them is the zero's."
)
def the_zero_comes_last(w):
    return _packed(_fours(w), _first_two)


@two_four.misconception(
    "You fill up a group with its last zeros: a sort that rises puts them next to the weights. The "
    "first free places are asked for."
)
def the_last_free_places(w):
    def last_two(groups):
        rising = groups.ne(0).to(torch.uint8).argsort(dim=-1, stable=True)
        return rising[..., -2:].sort(-1).values

    return _packed(_fours(w), last_two)


@two_four.misconception(
    "A zero that fills up a group gets the place 0 from you, whatever is there. Two values then "
    "claim one place, and who decodes them may write the zero over the weight."
)
def a_zero_is_always_at_place_0(w):
    groups = _fours(w)
    filled = torch.arange(2) < groups.ne(0).sum(-1, keepdim=True)
    values, _ = _packed(groups, _first_two)
    places = torch.where(filled, _first_two(groups), 0).flatten(-2)
    return torch.where(filled.flatten(-2), values, 0), pack_bits(places, 2)


@two_four.misconception(
    "You drop the last byte of a row if its places do not fill it. Round the number of bytes up."
)
def drops_the_half_full_byte(w):
    return _packed(
        _fours(w), pack=lambda places: pack_bits(places, 2)[..., : places.shape[-1] // 4]
    )


@two_four.misconception(
    "Your groups take weights that lie far apart in a row. Check what reshape does: four "
    "consecutive weights stay together only in the last dimension."
)
def fours_that_lie_far_apart(w):
    groups = _fours(w)
    return _packed(w.detach().unflatten(-1, (4, groups.shape[1])).mT)


@two_four.accepts("loops over groups, and shifts of Python integers")
def loops_and_shifts(w):
    if w.dim() != 2 or w.shape[1] % 4:
        raise ValueError("w must be a matrix in fours")
    values, octets = [], []
    for row in w.tolist():
        bits, shift = 0, 0
        for start in range(0, len(row), 4):
            group = row[start : start + 4]
            places = [i for i in range(4) if group[i] != 0]
            if len(places) > 2:
                raise ValueError("too many weights in a group")
            for i in range(4):
                if len(places) < 2 and i not in places:
                    places.append(i)
            for place in sorted(places):
                values.append(group[place])
                bits |= place << shift
                shift += 2
        octets.append(list(bits.to_bytes(-(-shift // 8), "little")))
    stored_values = torch.tensor(values, dtype=w.dtype).reshape(w.shape[0], -1)
    return stored_values, torch.tensor(octets, dtype=torch.uint8)


@two_four.accepts("a table of all patterns of a group")
def looks_up_the_pattern(w):
    if w.dim() != 2 or w.shape[1] % 4:
        raise ValueError("w must be a matrix in fours")
    # The pattern of a group: bit i is set where weight i is not zero.
    pairs = {0: (0, 1), 1: (0, 1), 2: (0, 1), 4: (0, 2), 8: (0, 3), 3: (0, 1), 5: (0, 2)}
    pairs |= {9: (0, 3), 6: (1, 2), 10: (1, 3), 12: (2, 3)}
    groups = w.detach().reshape(w.shape[0], -1, 4)
    patterns = ((groups != 0) * torch.tensor([1, 2, 4, 8])).sum(-1).flatten().tolist()
    if any(pattern not in pairs for pattern in patterns):
        raise ValueError("too many weights in a group")
    places = torch.tensor([pairs[p] for p in patterns]).reshape(w.shape[0], -1, 2)
    values = torch.take_along_dim(groups, places, dim=-1).reshape(w.shape[0], -1)
    codes = torch.nn.functional.pad(places.reshape(w.shape[0], -1), (0, w.shape[1] // 2 % 4))
    a, b, c, d = codes.reshape(w.shape[0], -1, 4).unbind(-1)
    return values, (a + 4 * b + 16 * c + 64 * d).byte()


# --- 7. wanda_scores -----------------------------------------------------------------------------

loudness = Exercise(
    wanda_scores,
    paper="Sun, Liu, Bair & Kolter 2023 (arXiv 2306.11695), equation 1",
    difficulty=1,
    minutes=5,
)


@st.composite
def layers_and_inputs(
    draw: st.DrawFn,
    batch: st.SearchStrategy[tuple[int, ...]],
    kinds: Sequence[str] = ("whole", "normal", "sparse", "outlier", "large", "tiny"),
    signs: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> tuple[Tensor, Tensor]:
    """W [out, in], not negative unless ``signs`` are drawn for it, and inputs [..., in] of it."""
    out, inside = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    w = draw(tensors((out, inside), signs or kinds, dtypes))
    x = draw(tensors((*draw(batch), inside), kinds, dtypes))
    return (w if signs else w.abs()), x


def expect_scores(got: Tensor, w: Tensor, x: Tensor, rtol: float = 1e-5) -> None:
    norms = x.double().reshape(-1, w.shape[1]).square().sum(0).sqrt()
    expect_close(got, w.double().abs() * norms, "the scores", rtol=rtol)


@loudness.check(
    points=3,
    hint="How long is the vector of all values that input 0 takes? There is one length for each "
    "input, and so for each column of W.",
    drawn=layers_and_inputs(st.integers(1, 6).map(lambda tokens: (tokens,))),
)
def a_score_is_the_weight_times_the_norm_of_its_input(candidate, drawn):
    """Every score is the weight times the L2 norm of its input over all tokens: for weights that
    are not negative."""
    w, x = drawn
    expect_scores(candidate(w, x), w, x)


@loudness.check(
    points=2,
    hint="How many tokens are there in a batch of 2 texts of 3 tokens? And in a single vector?",
    drawn=layers_and_inputs(shapes(2, 3, max_side=3) | st.just(())),
)
def all_leading_dimensions_are_tokens(candidate, drawn):
    """Inputs of a whole batch, or of a single token without a dimension for it, give the same
    scores as their tokens one below the other."""
    w, x = drawn
    expect_scores(candidate(w, x), w, x)


@loudness.check(
    points=2,
    hint="Does a weight of -3 matter less than one of 2?",
    drawn=layers_and_inputs(
        st.integers(1, 4).map(lambda tokens: (tokens,)), signs=("negative", "whole", "normal")
    ),
)
def the_sign_of_a_weight_does_not_count(candidate, drawn):
    """A negative weight has the score of a positive one of the same magnitude."""
    w, x = drawn
    got = candidate(w, x)
    expect(as_double(got) >= 0, "a score is negative")
    expect_scores(got, w, x)


@loudness.check(
    points=1,
    hint="What is the square of 300 in float16, and that of 0.0001? Which type is promised?",
    examples=25,
    drawn=layers_and_inputs(
        st.just((4,)), ("large", "tiny", "normal"), dtypes=(torch.float16, torch.bfloat16)
    ),
    learned=st.booleans(),
)
def half_precision_is_computed_in_float32(candidate, drawn, learned):
    """Half precision, float16 or bfloat16, is computed in float32, and that is the type of the
    scores; also where w wants a gradient."""
    w, x = drawn
    got = candidate(w.clone().requires_grad_(learned), x)
    expect_scores(got, w, x, rtol=1e-4)
    right = got.dtype in (torch.float32, torch.float64)
    expect(right, f"the scores are {got.dtype}, expected torch.float32")


@loudness.check(
    points=1,
    hint="Would another number of features be broadcast without a word? What would infinity do to "
    "a ranking?",
    bad=[
        (torch.ones(2, 3), torch.ones(4, 2)),
        (torch.ones(2, 3), torch.ones(4, 1)),
        (torch.ones(2, 1), torch.ones(4, 3)),
        (torch.ones(2, 1), torch.tensor(1.0)),
        (torch.ones(3), torch.ones(4, 3)),
        (torch.ones(2, 2), NAN),
        (torch.ones(2, 2), INF.reshape(1, 2)),
        (NAN.reshape(1, 2), torch.ones(2, 2)),
        (INF.reshape(1, 2), torch.ones(2, 2)),
    ],
)
def what_does_not_belong_together_is_refused(candidate, bad):
    """Inputs with another number of features than W, a W that is not a matrix, and NaN or infinity
    in either raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _scored(w, x, norm, magnitude=torch.abs):
    """wanda_scores, with the norm of the tokens [tokens, in] and the magnitude left open."""
    w, x = require_dims(require_finite(w, "w"), 2, "w"), require_finite(x, "x")
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError("x must have as many features as w")
    return magnitude(w) * norm(x)


def _l2(x):
    return x.reshape(-1, x.shape[-1]).norm(dim=0)


@loudness.misconception(
    "You forget that weights have signs: a large negative one gets the smallest score of all."
)
def forgets_the_magnitude_of_weights(w, x):
    return _scored(w, x, _l2, magnitude=lambda w: w)


@loudness.misconception(
    "You add up magnitudes: that is the L1 norm. The score needs the L2 norm, the root of the sum "
    "of squares, because the loss is a sum of squares."
)
def l1_norm(w, x):
    return _scored(w, x, lambda x: x.reshape(-1, x.shape[-1]).abs().sum(0))


@loudness.misconception(
    "You forget the root: your scores have the squared norm of the input, which counts loudness "
    "twice as much as the weight."
)
def forgets_the_root(w, x):
    return _scored(w, x, lambda x: _l2(x).square())


@loudness.misconception(
    "Your scores are squared. S^2 is what the output loses, and it ranks the weights the same way; "
    "asked for is S itself."
)
def squared_scores(w, x):
    return _scored(w, x, lambda x: _l2(x).square(), torch.square)


@loudness.misconception(
    "You divide by the number of tokens. The ranking stays the same, but a norm is the root of a "
    "sum and not of a mean."
)
def mean_over_tokens(w, x):
    return _scored(w, x, lambda x: x.reshape(-1, x.shape[-1]).square().mean(0).sqrt())


@loudness.misconception(
    "You take the norm of each token over its features. Every input of W, every column, has a norm "
    "of its own, over all tokens."
)
def norm_of_each_token(w, x):
    return _scored(w, x, lambda x: x.norm(dim=-1))


@loudness.misconception(
    "You take one norm of all inputs together. Then it changes nothing, and what is left is the "
    "ranking by magnitude."
)
def one_norm_of_everything(w, x):
    return _scored(w, x, torch.norm)


@loudness.misconception(
    "You take the norm along the first dimension alone. In a batch that is the number of the text: "
    "all leading dimensions hold tokens, so flatten them first."
)
def norm_along_the_first_dimension(w, x):
    return _scored(w, x, lambda x: x.norm(dim=0))


@loudness.misconception(
    "You look at the first text of a batch only. All leading dimensions hold tokens: flatten them."
)
def first_text_only(w, x):
    return _scored(w, x, lambda x: _l2(x[(0,) * max(0, x.ndim - 2)]))


@loudness.accepts("a loop over inputs, Python numbers")
def loops_over_inputs(w, x):
    if w.dim() != 2 or x.dim() == 0 or x.size(-1) != w.size(1):
        raise ValueError("w and x do not fit")
    rows = x.reshape(-1, w.size(1)).tolist()
    norms = [math.sqrt(math.fsum(row[j] ** 2 for row in rows)) for j in range(w.size(1))]
    scores = [[abs(v) * norm for v, norm in zip(row, norms, strict=True)] for row in w.tolist()]
    if not all(map(math.isfinite, itertools.chain(*scores))):
        raise ValueError("NaN or infinity")
    return torch.tensor(scores)


@loudness.accepts("the diagonal of the Gram matrix in float64")
def diagonal_of_the_gram_matrix(w, x):
    if x.dim() < 1 or w.dim() != 2 or w.shape[-1] != x.shape[-1]:
        raise ValueError("w and x do not fit")
    if not torch.isfinite(w).all() or not torch.isfinite(x).all():
        raise ValueError("NaN or infinity")
    tokens = x.detach().double().reshape(-1, x.shape[-1])
    return (w.detach().double().square() * (tokens.T @ tokens).diagonal()).sqrt()


# --- 8. sparsegpt_block --------------------------------------------------------------------------

surgeon = Exercise(
    sparsegpt_block,
    paper="Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1",
    difficulty=3,
    minutes=30,
    equivalent={
        "w, errors, diagonal = (w.clone(), torch.zeros_like(w), u…  ->  "
        "w, errors, diagonal = (w, torch.zeros_like(w), u…": (
            "arguments are copied on their way to a function that is judged, so that no check sees "
            "what it does to them"
        ),
        "…diagonal = (w.clone(), torch.zeros_like(w), u.diagonal())  ->  "
        "…diagonal = (w.clone(), torch.ones_like(w), u.diagonal())": (
            "every column of errors is written"
        ),
        "if n_m is None:  ->  if True:": "with n_m the mask is written again, group by group",
        "…top_k_mask((w / diagonal).square(), number_kept(w.numel(…  ->  "
        "…top_k_mask((w / diagonal).abs(), number_kept(w.numel(…": SAME_ORDER,
        "…group] / diagonal[group]).square(), *n_m)  ->  "
        "…group] / diagonal[group]).abs(), *n_m)": SAME_ORDER,
    },
)

Block = tuple[Tensor, Tensor, dict[str, Any]]


@st.composite
def blocks(
    draw: st.DrawFn,
    columns: st.SearchStrategy[int],
    options: st.SearchStrategy[dict[str, Any]],
    equal_diagonal: bool = False,
) -> Block:
    """W [out, columns], U of its columns, and what to prune."""
    chosen, width = draw(options), draw(columns)
    m = chosen.get("n_m", (1, 1))[1]
    width, rows = width * m, draw(st.integers(1, 4))
    rng = np.random.Generator(np.random.PCG64(draw(SEEDS)))
    w = rng.standard_normal((rows, width))  # not rounded: no update should give 0 by accident
    diagonal = rng.choice([1.0, 0.5, 2.0, 0.7, 1.6], width)
    if equal_diagonal:
        diagonal[:] = diagonal[0]
    u = np.triu(np.round(rng.uniform(-1, 1, (width, width)), 2), 1) + np.diag(diagonal)
    layout = draw(st.sampled_from(LAYOUTS))
    return arrange(torch.from_numpy(w).float(), layout), torch.from_numpy(u).float(), chosen


SHARES = st.sampled_from((None, 0.5, 0.25, 0.75)).map(lambda share: given(sparsity=share))
GROUPS = st.sampled_from(((2, 4), (1, 2), (1, 4), (3, 4), (2, 3))).map(lambda n_m: {"n_m": n_m})
ONE_OF_A_GROUP = st.sampled_from((2, 3, 4)).map(lambda m: {"n_m": (m - 1, m)})


def pruned_places(result: Tensor, errors: Tensor) -> Tensor:
    """Where the candidate has pruned: a mistake in one of its results does not hide it."""
    return (as_double(result) == 0) | (as_double(errors) != 0)


def expect_block(result: Tensor, errors: Tensor, w: Tensor) -> None:
    expect_shape(result, w.shape, "the weights")
    expect_shape(errors, w.shape, "the errors")


def expect_cheapest(cost: Tensor, pruned: Tensor, place: str, slack: float = 0.0) -> None:
    """Fail if a weight stays that costs clearly less than one that is pruned."""
    if pruned.any() and not pruned.all():
        dearest, cheapest = float(cost[pruned].max()), float(cost[~pruned].min())
        expect(
            dearest <= cheapest * (1 + 1e-3) + slack,
            f"in {place} a weight is pruned whose S is {dearest:.4g}, and one stays whose S is "
            f"{cheapest:.4g}",
        )


@surgeon.check(
    points=2,
    hint="How many weights remain, of the block or of each group? And is a pruned weight still "
    "anything but 0 in what you hand out?",
    drawn=blocks(st.sampled_from((4, 8)), SHARES) | blocks(st.integers(1, 3), GROUPS),
)
def the_right_number_of_weights_becomes_exactly_zero(candidate, drawn):
    """Of the whole block round(sparsity n) weights become exactly 0 (half of them where nothing is
    said), and with n_m all but n in each group of m."""
    w, u, options = drawn
    result, errors = candidate(w, u, **options)
    expect_block(result, errors, w)
    zeros = as_double(result) == 0
    if "n_m" in options:
        n, m = options["n_m"]
        counts = zeros.reshape(-1, m).sum(1)
        expect(counts == m - n, f"{n} of {m} weights should stay, and {m - n} be 0, in each group")
    else:
        want = round(options.get("sparsity", 0.5) * w.numel())
        expect(zeros.sum() == want, f"{int(zeros.sum())} of {w.numel()} weights are 0, not {want}")


@surgeon.check(
    points=2,
    hint="Compute S for a few weights by hand. Is it the small ones or the large ones that go, and "
    "which weights compete with each other?",
    drawn=blocks(st.sampled_from((4, 3, 6, 8)), SHARES) | blocks(st.just(1), GROUPS),
)
def the_weights_of_least_cost_are_pruned(candidate, drawn):
    """No weight that stays has a smaller S than one that is pruned: in the whole block or, with
    n_m, in its group of a row."""
    w, u, options = drawn
    result, errors = candidate(w, u, **options)
    expect_block(result, errors, w)
    pruned = pruned_places(result, errors)
    cost = (as_double(w) / as_double(u).diagonal()).square()
    if "n_m" in options:
        for row in range(len(w)):
            expect_cheapest(cost[row], pruned[row], f"row {row}")
    else:
        expect_cheapest(cost, pruned, "the block")


@surgeon.check(
    points=3,
    hint="Prune the first of two columns by hand. By how much does the second one change, in which "
    "direction, and what if it is pruned next?",
    drawn=blocks(st.sampled_from((2, 4, 3, 8)), SHARES) | blocks(st.integers(1, 2), GROUPS),
)
def every_loss_is_passed_on_to_the_columns_after_it(candidate, drawn):
    """A weight that stays is what it was, less e U of every column before it; one that is pruned
    had become e times its U_jj by then, in the same way."""
    w, u, options = drawn
    result, errors = candidate(w, u, **options)
    expect_block(result, errors, w)
    pruned = pruned_places(result, errors)
    given_up, size = as_double(errors) @ as_double(u), as_double(errors).abs() @ as_double(u).abs()
    off = (as_double(w) - given_up - torch.where(pruned, 0.0, as_double(result))).abs()
    off = off.nan_to_num(math.inf) - 1e-5 * (as_double(w).abs() + size) - 1e-6
    if bool((off > 0).any()):
        place = divmod(int(off.argmax()), w.shape[1])
        fate = "is pruned" if pruned[place] else f"becomes {float(result[place]):.4g}"
        raise Mismatch(
            f"the weight {float(w[place]):.4g} at {list(place)} {fate}, which does not go with the "
            "errors of its row"
        )


@surgeon.check(
    points=1,
    hint="A single weight of a row is lost. What is its error, and what are the errors of those "
    "that stay?",
    examples=25,
    drawn=blocks(st.just(1), ONE_OF_A_GROUP),
)
def the_error_of_a_loss_is_counted_in_units_of_u(candidate, drawn):
    """Where one weight of a row is pruned, its error is the weight divided by U_jj; the error of a
    weight that stays is 0."""
    w, u, options = drawn
    result, errors = candidate(w, u, **options)
    expect_block(result, errors, w)
    lost = torch.where(pruned_places(result, errors), as_double(w) / as_double(u).diagonal(), 0.0)
    expect_close(errors, lost, "the errors")


@surgeon.check(
    points=2,
    hint="The second group of m columns has changed by the time the walk reaches it. Which weights "
    "decide what is pruned there?",
    drawn=blocks(st.integers(2, 3), GROUPS, equal_diagonal=True),
)
def with_n_m_a_group_is_chosen_when_the_walk_reaches_it(candidate, drawn):
    """With n_m the weights of least S in each group of a row are pruned, as they are when the
    columns before the group are done."""
    w, u, options = drawn
    result, errors = candidate(w, u, **options)
    expect_block(result, errors, w)
    pruned, m = pruned_places(result, errors), options["n_m"][1]
    wide, e, scale = as_double(w), as_double(errors), as_double(u)
    for start in range(0, w.shape[1], m):
        group = slice(start, start + m)
        by_then = wide[:, group] - e[:, :start] @ scale[:start, group]
        cost = (by_then / scale.diagonal()[group]).square()
        for row in range(len(w)):
            place = f"columns {start} to {start + m - 1} of row {row}"
            expect_cheapest(cost[row], pruned[row, group], place, slack=1e-5)


@surgeon.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        ((torch.ones(2, 4), torch.eye(4), 50), {}),
        ((torch.ones(2, 4), torch.eye(4), -0.5), {}),
        ((torch.ones(2, 4), torch.eye(4)), {"n_m": (5, 4)}),
        ((torch.ones(2, 4), torch.eye(4)), {"n_m": (-1, 2)}),
        ((torch.ones(2, 6), torch.eye(6)), {"n_m": (2, 4)}),
        ((torch.ones(2, 3), torch.eye(3)), {"n_m": (1, 2)}),
    ],
)
def what_cannot_be_pruned_so_is_refused(candidate, bad):
    """A sparsity outside 0 to 1 (50 is not 50%), n outside 0 to m, and columns that are no multiple
    of m raise ValueError."""
    args, kwargs = bad
    expect_error(candidate, ValueError, *args, **kwargs)


def _walk(
    w,
    u,
    sparsity,
    n_m,
    cost=lambda w, diagonal: (w / diagonal).square(),
    block_mask=lambda cost, sparsity: top_k_mask(cost, number_kept(cost.numel(), sparsity)),
    late=True,  # with n_m, choose a group when the walk reaches it
    error=lambda lost, diagonal: lost / diagonal,
    change=lambda step, keep: -step,  # what is added to the columns after, from e U
):
    """sparsegpt_block, open where people go wrong: the weights with those pruned still in them,
    the mask and the errors."""
    w, errors, diagonal = w.clone(), torch.zeros_like(w), u.diagonal()
    if n_m is None:
        keep = block_mask(cost(w, diagonal), sparsity)
    else:
        keep = n_m_mask(cost(w, diagonal), *n_m)
        keep |= late  # nothing of the groups ahead is known yet
    for j in range(w.shape[1]):
        if n_m is not None and late and j % n_m[1] == 0:
            group = slice(j, j + n_m[1])
            keep[:, group] = n_m_mask(cost(w[:, group], diagonal[group]), *n_m)
        errors[:, j] = torch.where(keep[:, j], 0.0, error(w[:, j], diagonal[j]))
        w[:, j + 1 :] += change(errors[:, j : j + 1] * u[j, j + 1 :], keep[:, j + 1 :])
    return w, keep, errors


def _zeroed(w, keep, errors):
    return torch.where(keep, w, 0.0), errors


@surgeon.misconception(
    "You prune and pass nothing on: the weights that stay are what they were. Row j of U, to the "
    "right of the diagonal, says what the columns after j take over (below the diagonal, in its "
    "column, there are only zeros)."
)
def passes_nothing_on(w, u, sparsity=0.5, n_m=None):
    return _zeroed(*_walk(w, u, sparsity, n_m, change=lambda step, keep: 0 * step))


@surgeon.misconception(
    "You pass losses on with the wrong sign: the columns after a lost weight move away from what "
    "would replace it. e U is subtracted."
)
def adds_what_should_be_subtracted(w, u, sparsity=0.5, n_m=None):
    return _zeroed(*_walk(w, u, sparsity, n_m, change=lambda step, keep: step))


@surgeon.misconception(
    "You do not divide the lost weight by U_jj, and so what is passed on has the wrong size: too "
    "much where U_jj is above 1, too little below."
)
def loss_not_divided_by_u(w, u, sparsity=0.5, n_m=None):
    return _zeroed(*_walk(w, u, sparsity, n_m, error=lambda lost, diagonal: lost))


@surgeon.misconception(
    "You hand out the lost weights themselves. Your update is right, but the columns after the "
    "block need the e_j, which are divided by U_jj."
)
def hands_out_the_lost_weights(w, u, sparsity=0.5, n_m=None):
    result, errors = _zeroed(*_walk(w, u, sparsity, n_m))
    return result, errors * u.diagonal()


@surgeon.misconception(
    "You rank weights by magnitude. What a loss costs depends on the inputs as well: S divides by "
    "U_jj squared, so that a weight others can replace is cheap."
)
def ranks_by_magnitude(w, u, sparsity=0.5, n_m=None):
    return _zeroed(*_walk(w, u, sparsity, n_m, cost=lambda w, diagonal: w.abs()))


@surgeon.misconception(
    "In S you square the weight and not U_jj. Both are squared: U_jj^2 is what the inverse of H "
    "has on its diagonal once the columns before are done."
)
def squares_only_the_weight(w, u, sparsity=0.5, n_m=None):
    return _zeroed(*_walk(w, u, sparsity, n_m, cost=lambda w, diagonal: w.square() / diagonal))


@surgeon.misconception(
    "You prune the weights of largest S. S is what a loss costs: the cheapest ones go."
)
def prunes_the_dearest(w, u, sparsity=0.5, n_m=None):
    return _zeroed(*_walk(w, u, sparsity, n_m, cost=lambda w, diagonal: -(w / diagonal).square()))


@surgeon.misconception(
    "You prune the same share of every row. Without n_m, all rows and columns of the block compete "
    "with each other."
)
def ranks_each_row_by_itself(w, u, sparsity=0.5, n_m=None):
    return _zeroed(*_walk(w, u, sparsity, n_m, block_mask=row_mask))


@surgeon.misconception(
    "With n_m, you choose all groups before the walk. A group is chosen when the walk reaches it: "
    "by then its weights have taken over losses, and others may be the cheapest."
)
def chooses_all_groups_at_the_start(w, u, sparsity=0.5, n_m=None):
    return _zeroed(*_walk(w, u, sparsity, n_m, late=False))


@surgeon.misconception(
    "You update only the weights that stay. One that is pruned later takes over losses too, and "
    "passes them on with its own."
)
def leaves_out_those_pruned_later(w, u, sparsity=0.5, n_m=None):
    return _zeroed(*_walk(w, u, sparsity, n_m, change=lambda step, keep: -step * keep))


@surgeon.misconception(
    "You pass on what is lost, but the pruned weights are still there in what you hand out. They "
    "have to be 0."
)
def leaves_the_pruned_weights_in_place(w, u, sparsity=0.5, n_m=None):
    w, _, errors = _walk(w, u, sparsity, n_m)
    return w, errors


@surgeon.accepts("looks back from each column instead of forward, in NumPy and float64")
def looks_back(w, u, sparsity=0.5, n_m=None):
    wide, scale = w.detach().double().numpy(), u.detach().double().numpy()
    rows, columns = wide.shape
    if n_m is None:
        if not 0 <= sparsity <= 1:
            raise ValueError("sparsity is a share")
        cost = (wide / np.diag(scale)) ** 2
        order = np.argsort(cost, axis=None, kind="stable")
        gone = np.zeros(rows * columns, dtype=bool)
        gone[order[: round(sparsity * cost.size)]] = True
        gone = gone.reshape(rows, columns)
    elif not 0 <= n_m[0] <= n_m[1] or columns % n_m[1]:
        raise ValueError("no such groups")
    else:
        gone = np.zeros((rows, columns), dtype=bool)
    result, errors = wide.copy(), np.zeros_like(wide)
    for j in range(columns):
        if n_m is not None and j % n_m[1] == 0:
            group = slice(j, j + n_m[1])
            by_then = wide[:, group] - errors[:, :j] @ scale[:j, group]
            order = np.argsort(np.abs(by_then) / np.diag(scale)[group], axis=1)
            np.put_along_axis(gone[:, group], order[:, : n_m[1] - n_m[0]], True, axis=1)
        result[:, j] -= errors[:, :j] @ scale[:j, j]
        errors[:, j] = np.where(gone[:, j], result[:, j] / scale[j, j], 0)
    result[gone] = 0
    return result, errors


@surgeon.accepts("solves for all errors of a row at once")
def solves_for_the_errors(w, u, sparsity=0.5, n_m=None):
    columns = w.shape[1]
    n, m = n_m or (0, columns)
    if not 0 <= sparsity <= 1 or not 0 <= n <= m or columns % m:
        raise ValueError("cannot prune so")
    errors, gone = torch.zeros_like(w), torch.zeros(w.shape, dtype=torch.bool)
    for start in range(0, columns, m):
        group = slice(start, start + m)
        now = w[:, group] - errors @ u[:, group]
        cost = now.abs() / u.diagonal()[group]
        if n_m is None:
            cheapest = cost.flatten().argsort()[: round(sparsity * w.numel())]
            gone.view(-1)[cheapest] = True
        else:
            gone[:, group].scatter_(1, cost.argsort(dim=1)[:, : m - n], True)
        for row in range(len(w)):
            j = gone[row, group].nonzero().flatten()
            # The lost weights are e U over the pruned columns alone: a triangle of equations.
            triangle = u[group, group][j][:, j]
            solved = torch.linalg.solve_triangular(triangle.T, now[row, j, None], upper=False)
            errors[row, start + j] = solved.squeeze(1)
    return torch.where(gone, 0.0, w - errors @ u), errors
