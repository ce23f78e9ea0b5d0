"""The exercises of lab 10, speculative decoding: checks, misconceptions, correct variants.

Probabilities are drawn in steps of 1/20, random numbers in hundredths that are not near the
probability they are compared with: so no rounding decides about a token, and examples can be read.
What happens on the edge (a token that is impossible, u = 0) is asked for in checks of its own.

A check asks for one thing and takes the rest as the candidate has it: what follows a draft is
judged at the candidate's own count of accepted tokens, a residual up to a factor. So one mistake
mostly costs points once.

The misconceptions refuse bad input as the references do, so that they are recognized by their
mistake and not by a missing error message.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from typing import Any

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
from autograder.strategies import LAYOUTS, arrange, given
from fewer.inference import (
    acceptance_probability,
    best_draft_length,
    expected_speedup,
    expected_tokens,
    look_up,
    residual_distribution,
    tree_mask,
    verify_candidates,
    verify_draft,
)

SEEDS = st.integers(0, 2**16 - 1)
UNITS = 20  # probabilities are multiples of 1 / UNITS
SHAPES = st.sampled_from([(2,), (3,), (4,), (1,), (2, 3), (3, 2), (1, 2), (2, 1)])  # of batches
REFUSED = "acceptance_probability refuses what is left: p[:-1] and q of different shapes"
EMPTY = "max refuses the lengths below 0 with a ValueError, too, and range what is no int"
Row = tuple[np.ndarray, np.ndarray, int, float]  # p, q, a token drawn from q, its probability


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def floats(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array)).float()


def distribution(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """A distribution in steps of 1 / UNITS: some are even, some have zeros, some are one-hot."""
    even = rng.choice([0.3, 1.0, 3.0])
    return rng.multinomial(UNITS, rng.dirichlet(np.full(vocab, even))) / UNITS


def two_distributions(rng: np.random.Generator, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Two that differ."""
    p = q = distribution(rng, vocab)
    while (p == q).all():
        q = distribution(rng, vocab)
    return p, q


def missing(p: Any, q: Any) -> Tensor:
    """max(0, p - q), in float64 and without the rounding of float32."""
    gap = as_double(p) - as_double(q)
    return torch.where(gap > 1e-6, gap, 0.0)


def residual(p: Any, q: Any) -> Tensor:
    """norm(max(0, p - q)) of two that differ, in float64."""
    gap = missing(p, q)
    return gap / gap.sum(-1, keepdim=True)


def expect_distribution(got: Any, want: Any, what: str) -> None:
    expect_close(got, want, what, rtol=0, atol=1e-5)


# --- 1. acceptance_probability -------------------------------------------------------------------

acceptance = Exercise(
    acceptance_probability,
    paper="Leviathan et al. 2023 (arXiv 2211.17192), section 2.3",
    difficulty=1,
    minutes=10,
    equivalent={
        "…tokens[..., None])[..., 0] for d in (p, q))  ->  "
        "…tokens[..., None])[..., -1] for d in (p, q))": "the dimension has the size 1",
        "return (p_x / q_x).nan_to_num(nan=0.0).clamp(max=1)  ->  "
        "return (p_x / q_x).nan_to_num().clamp(max=1)": "0 is what NaN becomes if nothing is said",
    },
)


def one_row(rng: np.random.Generator, vocab: int, ratio: tuple[float, float]) -> Row:
    """p, q and a token x drawn from q, with p(x) / q(x) in a range, both ends included."""
    while True:
        p, q = two_distributions(rng, vocab)
        x = int(rng.choice(vocab, p=q))
        if ratio[0] <= p[x] / q[x] <= ratio[1]:
            return p, q, x, min(1.0, p[x] / q[x])


@st.composite
def drafted(draw: st.DrawFn, ratio: tuple[float, float]) -> tuple[Tensor, Tensor, int]:
    """p and q over a vocabulary, and a token x that they give about this ratio."""
    p, q, x, _ = one_row(generator(draw(SEEDS)), draw(st.integers(2, 5)), ratio)
    return floats(p), floats(q), x


def ask(candidate, p: Tensor, q: Tensor, x: int) -> Tensor:
    """The answer for one token, whatever its shape is; shapes have a check of their own."""
    got = as_double(candidate(p, q, torch.tensor(x)))
    expect(got.numel() == 1, "the result for one token is not one number", got=got)
    return got.reshape(())


@acceptance.check(
    points=3,
    hint="Suppose the model says x a quarter of the time, and the draft half of it. How often must "
    "you accept an x, so that it comes out as often as the model says it?",
    drawn=drafted((0.01, 0.99)),
)
def what_the_draft_says_too_often_is_accepted_less(candidate, drawn):
    """Where q(x) is above p(x), the token x is accepted with the probability p(x) / q(x)."""
    p, q, x = drawn
    # Not judged: p(x) alone and the smaller of p(x) and q(x) differ at another token only.
    ask(candidate, p, q, int((p - q).argmax()))
    got = ask(candidate, p, q, x)
    expect_close(got, p[x].double() / q[x].double(), "the probability", reveal=True)


@acceptance.check(
    points=2,
    hint="A probability is never above 1. Which token does the draft not say often enough?",
    drawn=drafted((1.0, math.inf)),
)
def what_the_draft_says_too_seldom_is_always_accepted(candidate, drawn):
    """Where p(x) is q(x) or more, the token x is accepted with probability 1."""
    p, q, x = drawn
    got = ask(candidate, p, q, x)
    expect_close(got, 1.0, "the probability", reveal=True)


@acceptance.check(
    points=2,
    hint="What is the shape of the result? Take two distributions and two tokens, and then do each "
    "alone with its own token.",
    shape=SHAPES,
    vocab=st.integers(2, 5),
    seed=SEEDS,
    layout=st.sampled_from(LAYOUTS),
)
def each_token_is_looked_up_in_its_own_distribution(candidate, shape, vocab, seed, layout):
    """For a batch of distributions and as many tokens, the result has one number for each token:
    the one it gets alone."""
    rng = generator(seed)
    rows = [one_row(rng, vocab, (0.0, math.inf)) for _ in range(math.prod(shape))]
    p, q = (floats(np.stack([row[i] for row in rows])) for i in (0, 1))
    ids = [row[2] for row in rows]
    alone = torch.stack([ask(candidate, p[i], q[i], x) for i, x in enumerate(ids)])
    tokens = torch.tensor(ids).reshape(shape)
    p, q = (arrange(d.reshape(*shape, vocab), layout) for d in (p, q))
    got = as_double(candidate(p, q, tokens))
    expect_shape(got, shape, "the result")
    expect_close(got, alone.reshape(shape), "the result for the batch")


@acceptance.check(
    points=2,
    hint="What is 0 divided by 0? What should come out where the model never says x?",
    vocab=st.integers(2, 5),
    seed=SEEDS,
)
def what_the_model_never_says_is_never_accepted(candidate, vocab, seed):
    """Where p(x) is 0 the probability is 0, even if q(x) is 0 too."""
    rng = generator(seed)
    p = q = np.ones(vocab)
    while (p > 0).all() or (p == q).all():
        p, q = distribution(rng, vocab), distribution(rng, vocab)
    for x in np.flatnonzero(p == 0).tolist():
        got = ask(candidate, floats(p), floats(q), x)
        expect_close(got, 0.0, f"the probability where q(x) is {q[x]:g}", reveal=True)


@acceptance.check(
    points=1,
    hint="Some shapes that differ PyTorch would broadcast.",
    bad=[
        (torch.full((3,), 1 / 3), torch.full((4,), 0.25), torch.tensor(0)),
        (torch.full((4,), 0.25), torch.full((3,), 1 / 3), torch.tensor(1)),
        (torch.full((2, 2), 0.5), torch.full((1, 2), 0.5), torch.tensor([0, 1])),
        (torch.full((2, 2), 0.5), torch.full((3, 2), 0.5), torch.tensor([0, 1])),
    ],
)
def distributions_of_different_shapes_are_refused(candidate, bad):
    """Distributions p and q of different shapes raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _at(p, q, tokens):
    """p(x) and q(x); what does not fit is refused."""
    acceptance_probability(p, q, tokens)
    return (d.gather(-1, tokens[..., None])[..., 0] for d in (p, q))


@acceptance.misconception(
    "Your ratio is upside down. It is p(x) / q(x): the more the *draft* likes a token beyond what "
    "the model gives it, the less often it is accepted."
)
def ratio_upside_down(p, q, tokens):
    p_x, q_x = _at(p, q, tokens)
    return (q_x / p_x).nan_to_num(nan=0.0).clamp(max=1)


@acceptance.misconception(
    "You accept with the probability p(x), whatever q is. The token was drawn from q already: what "
    "has to be made up for is only by how much q(x) is above p(x)."
)
def model_alone(p, q, tokens):
    p_x, _ = _at(p, q, tokens)
    return p_x


@acceptance.misconception(
    "Your result can be above 1, which is no probability. Where p(x) is above q(x), the token is "
    "always accepted: take the smaller of the ratio and 1."
)
def ratio_above_1(p, q, tokens):
    p_x, q_x = _at(p, q, tokens)
    return (p_x / q_x).nan_to_num(nan=0.0, posinf=math.inf)


@acceptance.misconception(
    "You return the smaller of p(x) and q(x). That is how often x is drawn *and* accepted. It has "
    "been drawn; divide by q(x), how often that happens."
)
def smaller_of_both(p, q, tokens):
    return torch.minimum(*_at(p, q, tokens))


@acceptance.misconception(
    "You return the same for every token of the vocabulary: the sum of the smaller of p and q. "
    "That is how often a token is accepted on average; wanted is it for the token x."
)
def average_over_the_vocabulary(p, q, tokens):
    acceptance_probability(p, q, tokens)
    return torch.minimum(p, q).sum(-1)


@acceptance.misconception(
    "You accept only the model's likeliest token, and always. That is right at temperature 0, "
    "where p is one-hot; in general p leaves room for others."
)
def likeliest_only(p, q, tokens):
    acceptance_probability(p, q, tokens)
    return (p.argmax(-1) == tokens).to(p.dtype)


@acceptance.misconception(
    "You get NaN where p(x) and q(x) are both 0. A token the model never says is never accepted: "
    "the probability is 0."
)
def nought_divided_by_nought(p, q, tokens):
    p_x, q_x = _at(p, q, tokens)
    return (p_x / q_x).clamp(max=1)


@acceptance.misconception(
    "You look every token up in every distribution: an index such as [..., tokens] makes a square. "
    "Each token belongs to its own row."
)
def every_token_in_every_distribution(p, q, tokens):
    acceptance_probability(p, q, tokens)
    return (p[..., tokens] / q[..., tokens]).nan_to_num(nan=0.0).clamp(max=1)


@acceptance.misconception(
    "Your result has one dimension too many, of size 1: it has the shape of the tokens, one number "
    "for each."
)
def dimension_left_over(p, q, tokens):
    return acceptance_probability(p, q, tokens)[..., None]


@acceptance.misconception(
    "You subtract where you should divide: 1 - (q(x) - p(x)). Of a token that comes twice as often "
    "as it should, half must be accepted, whether it is frequent or rare."
)
def one_minus_the_difference(p, q, tokens):
    p_x, q_x = _at(p, q, tokens)
    return torch.where(p_x > 0, (1 - (q_x - p_x)).clamp(0, 1), 0.0)


@acceptance.accepts("the ratio of all tokens, then the drafted ones; q never quite 0")
def ratio_of_all(p, q, tokens):
    if p.shape != q.shape:
        raise ValueError("p and q must have one shape")
    ratio = torch.minimum(torch.ones(()), p / q.clamp(min=1e-9))
    return torch.take_along_dim(ratio, tokens.unsqueeze(-1), dim=-1).squeeze(-1)


@acceptance.accepts("a loop over Python numbers")
def loop_over_tokens(p, q, tokens):
    if p.shape != q.shape:
        raise ValueError("p and q must have one shape")
    vocab = p.shape[-1]
    found = []
    rows = p.reshape(-1, vocab).tolist(), q.reshape(-1, vocab).tolist(), tokens.flatten().tolist()
    for ps, qs, x in zip(*rows, strict=True):
        found.append(1.0 if ps[x] >= qs[x] and ps[x] > 0 else ps[x] / qs[x] if qs[x] > 0 else 0.0)
    return torch.tensor(found).reshape(tokens.shape)


@acceptance.accepts("NumPy in float64, where nothing is divided by 0")
def numpy_where(p, q, tokens):
    if p.shape != q.shape:
        raise ValueError("p and q must have one shape")
    index = tokens.numpy()[..., None]
    p_x, q_x = (np.take_along_axis(d.double().numpy(), index, -1)[..., 0] for d in (p, q))
    return np.where(p_x < q_x, p_x / np.where(q_x > 0, q_x, 1.0), np.where(p_x > 0, 1.0, 0.0))


# --- 2. residual_distribution --------------------------------------------------------------------

rest = Exercise(
    residual_distribution,
    paper="Leviathan et al. 2023 (arXiv 2211.17192), section 2.3",
    difficulty=1,
    minutes=10,
)


@st.composite
def pairs(draw: st.DrawFn, shapes: Any = st.just(())) -> tuple[Tensor, Tensor]:
    """p and q that differ in every row."""
    shape, vocab = draw(shapes), draw(st.integers(2, 5))
    rng = generator(draw(SEEDS))
    rows = [two_distributions(rng, vocab) for _ in range(math.prod(shape))]
    both = (floats(np.stack([row[i] for row in rows]).reshape(*shape, vocab)) for i in (0, 1))
    p, q = (arrange(d, draw(st.sampled_from(LAYOUTS))) for d in both)
    return p, q


def expect_residual(candidate) -> None:
    """Fail if p itself comes out where it is not the residual."""
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    got = as_double(candidate(p, q))
    expect(got.shape != p.shape or (got - p).abs().max() > 0, "p itself is returned", got=got)


@rest.check(
    points=2,
    hint="Which tokens did the draft say often enough or too often? Should they be said once more?",
    pq=pairs(),
)
def what_the_draft_gave_enough_of_is_not_drawn(candidate, pq):
    """Where q is p or more, the residual is 0."""
    p, q = pq
    got = as_double(candidate(p, q))
    expect_shape(got, p.shape, "the result")
    enough = missing(p, q) == 0
    expect_close(got[enough], torch.zeros(int(enough.sum())), "the residual where q is enough")


@rest.check(
    points=3,
    hint="How much of p is missing at each token, once the draft has given what it gives? And "
    "which of two tokens is then drawn twice as often as the other?",
    pq=pairs(),
)
def what_is_missing_is_drawn_in_proportion(candidate, pq):
    """Where q is less than p, the residual is in proportion to p - q."""
    p, q = pq
    got = as_double(candidate(p, q))
    expect_shape(got, p.shape, "the result")
    less = missing(p, q) > 0
    expect(got[less] > 0, "a token that q gives too little of has no positive residual", got=got)
    share = got[less] / got[less].sum()
    expect_distribution(share, residual(p, q)[less], "the share of each token where q is less")


@rest.check(
    points=2,
    hint="What do the probabilities of a distribution add up to, in each row?",
    pq=pairs(SHAPES),
)
def each_residual_sums_to_1(candidate, pq):
    """In a batch the residuals of each row add up to 1."""
    expect_residual(candidate)
    p, q = pq
    got = as_double(candidate(p, q))
    expect_shape(got, p.shape, "the result")
    what = "the sum of a row"
    expect_close(got.sum(-1), torch.ones(p.shape[:-1]), what, rtol=0, atol=1e-5, reveal=True)


@rest.check(
    points=2,
    hint="If p and q are equal, nothing is missing, and what would you divide by? Look at the "
    "docstring, and at a batch in which only one row is so.",
    pq=pairs(SHAPES),
    seed=SEEDS,
)
def where_both_are_equal_p_is_returned(candidate, pq, seed):
    """A row whose p and q are equal gives p; the rows beside it need not be equal."""
    expect_residual(candidate)
    p, q = pq
    rng = generator(seed)
    equal = torch.from_numpy(np.asarray(rng.random(p.shape[:-1]) < 0.4))
    equal.view(-1)[rng.integers(equal.numel())] = True
    candidate(p, p)  # not judged: it tells who never returns p from who does so for a whole batch
    q = torch.where(equal[..., None], p, q)
    got = as_double(candidate(p, q))
    expect_shape(got, p.shape, "the result")
    expect_distribution(got[equal], p[equal], "the result where p and q are equal")


@rest.check(
    points=1,
    hint="Some shapes that differ PyTorch would broadcast.",
    bad=[
        (torch.full((3,), 1 / 3), torch.full((4,), 0.25)),
        (torch.full((2, 2), 0.5), torch.tensor([0.25, 0.75])),
        (torch.full((2, 2), 0.5), torch.tensor([[0.25, 0.75]])),
        (torch.full((1,), 1.0), torch.full((3,), 1 / 3)),
    ],
)
def residuals_of_different_shapes_are_refused(candidate, bad):
    """Distributions p and q of different shapes raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _lack(p, q):
    return (p - q).clamp(min=0)


def _residual(p, q, gap=_lack, equal=None):
    """residual_distribution, open where people go wrong: gap is a function of p and q."""
    residual_distribution(p, q)
    total = gap(p, q).sum(-1, keepdim=True)
    return torch.where(total > 0, gap(p, q) / total, p if equal is None else equal)


@rest.misconception(
    "You do not normalise. What is left over of p adds up to the probability of a rejection; as a "
    "distribution to draw from it must add up to 1."
)
def left_unnormalised(p, q):
    residual_distribution(p, q)
    return torch.where((p == q).all(-1, keepdim=True), p, _lack(p, q))


@rest.misconception(
    "You take the magnitude of p - q: tokens that the draft says too often get a share as well, "
    "and would be said even more often. Where q is above p there is nothing to make up for."
)
def magnitude_of_the_gap(p, q):
    return _residual(p, q, lambda p, q: (p - q).abs())


@rest.misconception(
    "Your difference is the wrong way round: q - p is what the draft has too much of. Wanted is "
    "what it has too little of."
)
def excess_for_lack(p, q):
    return _residual(p, q, lambda p, q: _lack(q, p))


@rest.misconception(
    "You draw from p again after a rejection. But what the draft got right has been accepted "
    "before, so that those tokens would come out too often: subtract q."
)
def p_itself(p, q):
    residual_distribution(p, q)
    return p.clone()


@rest.misconception(
    "You choose the tokens where p is above q, but give them the whole of p. A part of it, q, has "
    "come by accepted tokens already: only p - q is missing."
)
def p_where_it_is_above(p, q):
    return _residual(p, q, lambda p, q: torch.where(p > q, p, 0.0))


@rest.misconception(
    "You normalise by a softmax. It makes probabilities of logits, and gives something to tokens "
    "whose share is 0. Divide by the sum."
)
def softmax_of_the_gap(p, q):
    residual_distribution(p, q)
    equal = (p == q).all(-1, keepdim=True)
    return torch.where(equal, p, _lack(p, q).softmax(-1))


@rest.misconception(
    "You divide by the sum over the whole batch. Each row is a distribution of its own: sum along "
    "the vocabulary, and keep the dimension."
)
def sum_over_the_batch(p, q):
    residual_distribution(p, q)
    equal = (p == q).all(-1, keepdim=True)
    return torch.where(equal, p, _lack(p, q) / _lack(p, q).sum())


@rest.misconception(
    "You get NaN where p and q are equal: 0 divided by 0. Nothing is ever rejected there; return p."
)
def equal_gives_nan(p, q):
    return _residual(p, q, equal=torch.full_like(p, math.nan))


@rest.misconception(
    "Where p and q are equal, your result is 0 everywhere, which is no distribution: a small "
    "number in the denominator only hides the division by 0. Return p there."
)
def equal_gives_zeros(p, q):
    return _residual(p, q, equal=torch.zeros_like(p))


@rest.misconception(
    "You return p only if nothing is missing in the whole batch. A single row whose p and q are "
    "equal divides 0 by 0: decide for each row."
)
def equal_batch_only(p, q):
    nan = torch.full_like(p, math.nan)
    return _residual(p, q, equal=p if torch.equal(p, q) else nan)


@rest.accepts("relu, and rows without a sum written over")
def with_relu(p, q):
    if p.shape != q.shape:
        raise ValueError("p and q must have one shape")
    left = torch.relu(p - q)
    total = left.sum(dim=-1, keepdim=True).expand_as(left)
    result = left / total
    result[total == 0] = p[total == 0]
    return result


@rest.accepts("p minus the smaller of both, row by row, in float64")
def row_by_row(p, q):
    if p.shape != q.shape:
        raise ValueError("p and q must have one shape")
    vocab, rows = p.shape[-1], []
    for a, b in zip(p.reshape(-1, vocab).double(), q.reshape(-1, vocab).double(), strict=True):
        left = a - torch.minimum(a, b)
        rows.append(a if left.sum() == 0 else left / left.sum())
    return torch.stack(rows).reshape(p.shape)


@rest.accepts("NumPy")
def numpy_maximum(p, q):
    if p.shape != q.shape:
        raise ValueError("p and q must have one shape")
    left = np.maximum(0.0, p.numpy() - q.numpy())
    total = left.sum(axis=-1, keepdims=True)
    return np.where(total == 0, p.numpy(), left / np.where(total == 0, 1.0, total))


# --- 3. verify_draft -----------------------------------------------------------------------------

verify = Exercise(
    verify_draft,
    paper="Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv "
    "2302.01318), algorithm 2",
    difficulty=2,
    minutes=15,
    equivalent={
        "if len(p) != len(tokens) + 1 or len(q) != len(tokens):  ->  "
        "if len(p) != len(tokens) + 1 and len(q) != len(tokens):": REFUSED,
        "if len(p) != len(tokens) + 1 or len(q) != len(tokens):  ->  "
        "if len(p) != len(tokens) + 1:": REFUSED,
        "if len(p) != len(tokens) + 1 or len(q) != len(tokens):  ->  "
        "if len(q) != len(tokens):": REFUSED,
        "n = int(accepted.cumprod(0).sum())  ->  n = int(accepted.cumprod(-1).sum())": "the same "
        "dimension: there is one",
    },
)

Judgement = tuple[Tensor, Tensor, Tensor, Tensor]  # p, q, tokens, u


def chance(rng: np.random.Generator, accept: float, wanted: bool) -> float | None:
    """A random number in hundredths that accepts (or not), if there is one not near the edge."""
    u = np.arange(100) / 100
    fit = u[u < accept - 0.009] if wanted else u[u > accept + 0.009]
    return float(rng.choice(fit)) if len(fit) else None


def judged_row(rng: np.random.Generator, vocab: int, wanted: bool) -> tuple[Row, float]:
    while True:
        row = one_row(rng, vocab, (0.0, math.inf))
        u = chance(rng, row[3], wanted)
        if u is not None:
            return row, u


def a_draft(rng: np.random.Generator, vocab: int, wanted: list[bool]) -> Judgement:
    """A draft of which exactly the wanted tokens pass by themselves."""
    rows = [judged_row(rng, vocab, one) for one in wanted]
    p = np.stack([*(row[0] for row, _ in rows), distribution(rng, vocab)])
    q = np.reshape([row[1] for row, _ in rows], (len(rows), vocab))
    tokens = torch.tensor([row[2] for row, _ in rows], dtype=torch.int64)
    return floats(p), floats(q), tokens, floats([u for _, u in rows])


@st.composite
def drafts(draw: st.DrawFn, rejected: bool | None = None) -> tuple[Judgement, int]:
    """A draft and how many of its tokens are accepted: some are rejected, or none, or either."""
    k = draw(st.integers(1, 5))
    low, high = (0, k) if rejected is None else (0, k - 1) if rejected else (k, k)
    n = draw(st.integers(low, high))
    rng = generator(draw(SEEDS))
    after = (rng.random(k) < 0.6).tolist()
    wanted = [True] * n + [False] * (n < k) + after[n + 1 :]
    return a_draft(rng, draw(st.integers(2, 5)), wanted), n


def after(p: Tensor, q: Tensor, n: int) -> Tensor:
    """What follows n accepted tokens, in float64."""
    return as_double(p[n]) if n == len(q) else residual(p[n], q[n])


@verify.check(
    points=3,
    hint="Go through the draft by hand, token by token. What is the fate of the tokens after the "
    "first that is rejected, and what do you compare with u?",
    drawn=drafts(),
)
def tokens_count_up_to_the_first_rejection(candidate, drawn):
    """Accepted are the tokens before the first one whose random number is not less than its
    acceptance probability."""
    args, n = drawn
    p, q, tokens, u = args
    # Not judged: one token alone tells whole drafts thrown away from a comparison turned round.
    candidate(p[:2], q[:1], tokens[:1], u[:1])
    got, _ = candidate(*args)
    expect_equal(got, n, "the number of accepted tokens", reveal=True)


@verify.check(
    points=2,
    hint="Which distribution is drawn from after a rejection? You have written it before. And "
    "which rows of p and q belong to the token that was rejected?",
    drawn=drafts(rejected=True),
)
def a_rejected_token_is_replaced_from_the_residual(candidate, drawn):
    """After a rejection the next token is drawn from the residual of p and q at the rejected
    token."""
    (p, q, tokens, u), n = drawn
    got, following = candidate(p, q, tokens, u)
    expect_shape(following, p.shape[1:], "the distribution")
    rows = {n, min(max(int(got), 0), len(tokens))}  # a wrong count is marked down elsewhere
    fits = [(as_double(following) - after(p, q, i)).abs().max() < 1e-5 for i in rows]
    expect(any(fits), f"what follows {n} accepted tokens is not the residual", got=following)


@verify.check(
    points=2,
    hint="The model has read the whole draft in one call. What does it know then that no drafted "
    "token has needed?",
    drawn=drafts(rejected=False),
)
def a_draft_without_rejection_gives_one_token_more(candidate, drawn):
    """If all k tokens are accepted, the next is drawn from the last row of p."""
    (p, q, tokens, u), _ = drawn
    _, following = candidate(p, q, tokens, u)
    expect_distribution(following, p[-1], "the distribution after a whole draft")


@verify.check(
    points=1,
    hint="With which comparison can a random number of exactly 0 accept a token whose probability "
    "is 0?",
    vocab=st.integers(2, 5),
    seed=SEEDS,
    before=st.integers(0, 2),
)
def an_impossible_token_is_rejected_even_if_u_is_0(candidate, vocab, seed, before):
    """A token is accepted if u is less than its acceptance probability: where that is 0, never."""
    rng = generator(seed)
    p, q, tokens, u = a_draft(rng, vocab, [True] * before + [False])
    p[-2] = floats(np.eye(vocab)[(int(tokens[-1]) + 1) % vocab])
    # A wrong count is marked down elsewhere: it must not be larger than for another random number.
    usual, _ = candidate(p, q, tokens, u)
    u[-1] = 0
    got, _ = candidate(p, q, tokens, u)
    expect(int(got) <= int(usual), "a token that the model never says is accepted", got=got)


@verify.check(
    points=1,
    hint="A draft may find nothing to propose. What is left for the model to say?",
    examples=20,
    vocab=st.integers(2, 5),
    seed=SEEDS,
)
def an_empty_draft_leaves_plain_decoding(candidate, vocab, seed):
    """With k = 0 nothing is accepted, and the next token is drawn from the only row of p."""
    p, q, tokens, u = a_draft(generator(seed), vocab, [])
    got, following = candidate(p, q, tokens, u)
    expect(int(got) <= 1, "more tokens are accepted than there are", got=got)
    expect_distribution(following, p[0], "the distribution after an empty draft")


@verify.check(
    points=1,
    hint="How many rows have p and q for k tokens?",
    bad=[(2, 2, 2), (4, 2, 2), (3, 1, 2), (3, 3, 2), (1, 0, 1), (2, 1, 0)],
)
def rows_that_do_not_fit_the_draft_are_refused(candidate, bad):
    """For k tokens p must have k + 1 rows and q must have k; otherwise ValueError is raised."""
    rows, of_q, k = bad
    p, q = torch.full((rows, 2), 0.5), torch.full((of_q, 2), 0.5)
    expect_error(candidate, ValueError, p, q, torch.zeros(k, dtype=torch.int64), torch.zeros(k))


def _judge(p, q, tokens, u, accepted=None, count=None, following=None):
    """verify_draft, open where people go wrong; each of the three last may be a function."""
    verify_draft(p, q, tokens, u)
    if accepted is None:
        accepted = u < acceptance_probability(p[:-1], q, tokens)
    n = int(accepted.cumprod(0).sum()) if count is None else count(accepted)
    if following is None:
        return n, (p[n] if n == len(tokens) else residual_distribution(p[n], q[n]))
    return n, following(n)


@verify.misconception(
    "You count every token that passes, even after one that was rejected. What comes after it was "
    "drafted, and judged, for a text that is not written now: stop at the first rejection."
)
def counts_after_a_rejection(p, q, tokens, u):
    return _judge(p, q, tokens, u, count=lambda accepted: int(accepted.sum()))


@verify.misconception(
    "After a rejection you draw from p. Accepted drafts have had their part of p already; the "
    "replacement comes from the residual."
)
def replaces_from_p(p, q, tokens, u):
    return _judge(p, q, tokens, u, following=lambda n: p[n])


@verify.misconception(
    "Your comparison is the wrong way round: a token is accepted if u is *less* than the "
    "acceptance probability. A uniform number is less than 0.9 nine times out of ten."
)
def accepts_what_is_to_be_rejected(p, q, tokens, u):
    verify_draft(p, q, tokens, u)
    return _judge(p, q, tokens, u, u >= acceptance_probability(p[:-1], q, tokens))


@verify.misconception(
    "You accept if u equals the acceptance probability too. Uniform numbers in [0, 1) include 0: a "
    "token that the model never says would get through. The comparison is strict."
)
def accepts_at_the_edge(p, q, tokens, u):
    verify_draft(p, q, tokens, u)
    return _judge(p, q, tokens, u, u <= acceptance_probability(p[:-1], q, tokens))


@verify.misconception(
    "You compare u with p(x). The token was drawn from q already: it is accepted with the "
    "probability min(1, p(x) / q(x)), not with p(x)."
)
def compares_with_p(p, q, tokens, u):
    verify_draft(p, q, tokens, u)
    return _judge(p, q, tokens, u, u < p[:-1].gather(1, tokens[:, None])[:, 0])


@verify.misconception(
    "You accept a token if it is the model's likeliest, and pass over u. That is right at "
    "temperature 0 alone."
)
def accepts_the_likeliest(p, q, tokens, u):
    verify_draft(p, q, tokens, u)
    return _judge(p, q, tokens, u, p[:-1].argmax(1) == tokens)


@verify.misconception(
    "You throw the whole draft away if any of its tokens is rejected. Those before the first "
    "rejection are as good as the model's own."
)
def all_or_nothing(p, q, tokens, u):
    return _judge(p, q, tokens, u, count=lambda accepted: len(tokens) * int(accepted.all()))


@verify.misconception(
    "You count the model's own token among the accepted ones. Accepted are between 0 and k tokens "
    "of the draft; the one more is drawn afterwards from what you return."
)
def counts_the_models_own_token(p, q, tokens, u):
    n, following = verify_draft(p, q, tokens, u)
    return n + 1, following


@verify.misconception(
    "You take the row of p after the rejected token. That one supposes that the token was said; "
    "its replacement is drawn from the row *before* it, p[n]."
)
def row_after_the_rejected(p, q, tokens, u):
    def following(n):
        return p[n] if n == len(tokens) else residual_distribution(p[n + 1], q[n])

    return _judge(p, q, tokens, u, following=following)


@verify.misconception(
    "After a draft that was accepted as a whole you take a residual again. Nothing was rejected: "
    "the last row of p has no row of q, and is what the next token is drawn from."
)
def residual_after_the_whole_draft(p, q, tokens, u):
    def following(n):
        return residual_distribution(p[n], q[min(n, len(q) - 1)]) if len(q) else p[n]

    return _judge(p, q, tokens, u, following=following)


@verify.misconception(
    "You judge all tokens with the first random number. Then they are accepted together or not, "
    "and the text is no longer distributed as the model's: each token has its own u."
)
def one_random_number_for_all(p, q, tokens, u):
    verify_draft(p, q, tokens, u)
    return _judge(p, q, tokens, u, u[:1] < acceptance_probability(p[:-1], q, tokens))


@verify.accepts("a loop that returns at the first rejection")
def loop_until_rejected(p, q, tokens, u):
    k = len(tokens)
    if p.shape[0] != k + 1 or q.shape[0] != k:
        raise ValueError("rows do not fit the draft")
    for i in range(k):
        x = int(tokens[i])
        if not u[i] < min(1.0, float(p[i, x]) / float(q[i, x])):
            return i, residual_distribution(p[i], q[i])
    return k, p[k]


@verify.accepts("q with a row of zeros at its end, of which the residual is p")
def padded_by_zeros(p, q, tokens, u):
    if not len(p) - 1 == len(q) == len(tokens):
        raise ValueError("rows do not fit the draft")
    ratio = p[:-1].gather(1, tokens[:, None]) / q.gather(1, tokens[:, None])
    rejected = [i for i, (r, v) in enumerate(zip(ratio[:, 0], u, strict=True)) if v >= r]
    n = rejected[0] if rejected else len(q)
    left = (p[n] - torch.cat([q, torch.zeros_like(p[:1])])[n]).clamp(min=0)
    return n, left / left.sum()


@verify.accepts("NumPy in float64, u q(x) < p(x)")
def numpy_products(p, q, tokens, u):
    p, q, x, u = p.double().numpy(), q.double().numpy(), tokens.numpy(), u.double().numpy()
    if len(p) != len(x) + 1 or len(q) != len(x):
        raise ValueError("rows do not fit the draft")
    at = np.arange(len(x))
    bad = np.flatnonzero(u * q[at, x] >= p[at, x])
    if len(bad) == 0:
        return len(x), p[-1]
    left = np.maximum(p[bad[0]] - q[bad[0]], 0)
    return bad[0], left / left.sum()


# --- 4. expected_tokens --------------------------------------------------------------------------

tokens_a_call = Exercise(
    expected_tokens,
    paper="Leviathan et al. 2023 (arXiv 2211.17192), equation 1",
    difficulty=1,
    minutes=5,
)

RATES = st.integers(5, 95).map(lambda percent: percent / 100)
LENGTHS = st.integers(1, 20)


@tokens_a_call.check(
    points=2,
    hint="What does a call give if nothing is drafted, or nothing ever accepted?",
    a=RATES,
    k=LENGTHS,
    nothing=st.sampled_from(("drafted", "accepted")),
)
def a_call_gives_one_token_at_least(candidate, a, k, nothing):
    """With k = 0, or with a = 0, a call gives the one token of plain decoding."""
    got = candidate(a, 0) if nothing == "drafted" else candidate(0.0, k)
    expect_close(got, 1.0, f"the number if nothing is {nothing}", reveal=True)


@tokens_a_call.check(
    points=3,
    hint="When does the last token of a draft bring one more? How likely is it that it and all "
    "before it are accepted?",
    a=RATES,
    k=LENGTHS,
)
def the_kth_token_adds_the_chance_that_all_k_are_accepted(candidate, a, k):
    """A draft of k tokens gives a^k more than one of k - 1."""
    shorter, longer = as_double(candidate(a, k - 1)), as_double(candidate(a, k))
    what = f"what the token number {k} adds"
    expect_close(longer - shorter, a**k, what, rtol=0, atol=1e-4, reveal=True)


@tokens_a_call.check(
    points=2,
    hint="What does the formula divide by if a is 1? What is then the sum of the powers of a that "
    "it stands for?",
    k=st.integers(0, 40),
    whole=st.booleans(),
)
def a_sure_draft_gives_all_its_tokens(candidate, k, whole):
    """With a = 1 a draft of k tokens gives k more than no draft."""
    a = 1 if whole else 1.0
    got = as_double(candidate(a, k))
    ordinary = as_double(candidate(0.5, 0))
    expect_close(got - ordinary, k, "what a sure draft adds", reveal=True)


@tokens_a_call.check(
    points=1,
    hint="What do the docstring's Args allow?",
    bad=[
        (ValueError, 1.5, 2),
        (ValueError, -0.5, 2),
        (ValueError, 1.01, 0),
        (ValueError, 0.5, -1),
        (ValueError, 1.0, -2),
        (TypeError, 0.5, 1.5),
    ],
)
def rates_and_lengths_that_cannot_be_are_refused(candidate, bad):
    """A rate outside 0 ... 1 and a negative length raise ValueError; a length that is no int raises
    TypeError."""
    kind, a, k = bad
    expect_error(candidate, kind, a, k)


def _tokens(a, k, formula, sure=None):
    """The formula, except where a is 1 (there k + 1, if nothing else is said)."""
    expected_tokens(a, k)
    return (k + 1.0 if sure is None else sure) if a == 1 else formula


@tokens_a_call.misconception(
    "Your exponent is k where it should be k + 1. Besides the k drafted tokens each call gives one "
    "of the model's own: even a call without a draft gives 1, not 0."
)
def exponent_one_too_small(a, k):
    return _tokens(a, k, (1 - a**k) / (1 - a) if a < 1 else 0, sure=float(k))


@tokens_a_call.misconception(
    "You count the accepted tokens only. Each call gives one more, of the model's own: in the "
    "place of the first rejected token, or after the last."
)
def accepted_tokens_only(a, k):
    return expected_tokens(a, k) - 1


@tokens_a_call.misconception(
    "You count every token that would pass by itself, a of each. But a token counts only if all "
    "before it are accepted too: the i-th with the probability a^i."
)
def each_token_by_itself(a, k):
    return _tokens(a, k, 1 + k * a)


@tokens_a_call.misconception(
    "You count the draft only if all of it is accepted. The tokens before the first rejection are "
    "kept."
)
def whole_drafts_only(a, k):
    return _tokens(a, k, 1 + k * a**k)


@tokens_a_call.misconception(
    "You divide by 0 if a is 1. There the sum 1 + a + ... + a^k, for which the formula stands, is "
    "k + 1."
)
def division_by_nought(a, k):
    expected_tokens(a, k)
    return (1 - a ** (k + 1)) / (1 - a)


@tokens_a_call.misconception(
    "Your number is that of an endless draft, 1 / (1 - a). A draft of k tokens stops after k."
)
def endless_draft(a, k):
    return _tokens(a, k, 1 / (1 - a) if a < 1 else 0)


@tokens_a_call.misconception(
    "For a = 1 you return k. The draft gives k, and the model one of its own."
)
def k_if_sure(a, k):
    expected_tokens(a, k)
    return float(k) if a == 1 else expected_tokens(a, k)


@tokens_a_call.accepts("the sum of the powers")
def sum_of_powers(a, k):
    if not isinstance(k, int):
        raise TypeError("k must be an int")
    if k < 0 or a < 0 or a > 1:
        raise ValueError("out of range")
    return sum(a**i for i in range(k + 1))


@tokens_a_call.accepts("each number of accepted tokens, times its probability")
def mean_over_outcomes(a, k):
    if not isinstance(k, int):
        raise TypeError("k must be an int")
    if k < 0 or not 0 <= a <= 1:
        raise ValueError("out of range")
    rejected = sum((n + 1) * a**n * (1 - a) for n in range(k))
    return rejected + (k + 1) * a**k


@tokens_a_call.accepts("Horner's rule, in float32")
def horner(a, k):
    if not isinstance(k, int):
        raise TypeError("k must be an int")
    if k < 0 or not 0 <= a <= 1:
        raise ValueError("out of range")
    total = torch.ones(())
    for _ in range(k):
        total = 1 + a * total
    return total


# --- 5. best_draft_length ------------------------------------------------------------------------

best_length = Exercise(
    best_draft_length,
    paper="Leviathan et al. 2023 (arXiv 2211.17192), section 3.5",
    difficulty=1,
    minutes=10,
    equivalent={
        "lengths = range(require_int(longest, 'longest', 0) + 1)  ->  "
        "lengths = range(longest + 1)": EMPTY,
        "lengths = range(require_int(longest, 'longest', 0) + 1)  ->  "
        "lengths = range(require_int(longest, 'longest', -1) + 1)": EMPTY,
    },
)


def speed(a: float, k: int, c: float) -> float:
    """Theorem 3.8."""
    return sum(a**i for i in range(k + 1)) / (1 + k * c)


def fastest(a: float, c: float, longest: int) -> int:
    return max(range(longest + 1), key=lambda k: speed(a, k, c))


COSTS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
PAYING = [
    (a / 100, c) for a in range(25, 96, 5) for c in COSTS if 1 <= fastest(a / 100, c, 40) <= 20
]


def tell(candidate) -> None:
    """Ask for a length that is not judged: where the right one is 0, many mistakes look alike."""
    candidate(0.9, 0.01, 20)


@best_length.check(
    points=3,
    hint="Compute the speed-up for every length by hand, for a = 0.5 and c = 0.1. Which is the "
    "greatest, and what do you return: the speed-up, or the length that has it?",
    a_c=st.sampled_from(PAYING),
    longest=st.sampled_from((None, 32, 24, 40)),
)
def no_other_length_is_faster(candidate, a_c, longest):
    """The length has the greatest expected speed-up, expected tokens / (1 + k c)."""
    a, c = a_c
    got = float(candidate(a, c, **given(longest=longest)))
    expect(got.is_integer() and got >= 0, f"{got:g} is no length of a draft")
    k = fastest(a, c, 32 if longest is None else longest)
    own, best = speed(a, int(got), c), speed(a, k, c)
    expect(
        own >= best * (1 - 1e-6),
        f"a draft of {got:g} tokens is {own:.4g} times as fast as plain decoding, another length "
        f"{best:.4g} times",
    )


@best_length.check(
    points=2,
    hint="If the draft is nearly as slow as the model, or mostly wrong, is there a length that "
    "pays for itself? Is it among those that you try?",
    c=st.sampled_from((0.2, 0.5, 0.8, 1.0)),
    share=st.sampled_from((0.0, 0.3, 0.6, 0.9)),
    longest=st.sampled_from((None, 0, 3, 10)),
)
def a_draft_that_does_not_pay_is_left_out(candidate, c, share, longest):
    """Where a is less than c, the length is 0."""
    a = round(share * c, 3)
    tell(candidate)
    got = candidate(a, c, **given(longest=longest))
    expect_equal(got, 0, f"the length for a rate of {a:g} and a cost of {c:g}", reveal=True)


@best_length.check(
    points=2,
    hint="Drafts that cost nothing can only help: the longer the better. How long may they be, and "
    "do you try that length too?",
    a=st.sampled_from((0.7, 0.8, 0.9, 1.0)),
    longest=st.integers(1, 12) | st.none(),
)
def a_free_draft_is_as_long_as_allowed(candidate, a, longest):
    """With c = 0 the length is longest; that is 32 if nothing is said."""
    a = 1.0 if longest is None else a
    got = candidate(a, 0.0, **given(longest=longest))
    expect_equal(got, 32 if longest is None else longest, "the length of a free draft", reveal=True)


@best_length.check(
    points=1,
    hint="What do you do if two lengths have the same speed-up? Try a = 1 and c = 1.",
    a_c=st.sampled_from([(0.0, 0.0), (1.0, 1.0), (0.5, 0.5), (0.25, 0.25), (0.75, 0.75)]),
    longest=st.integers(1, 8),
)
def of_equally_fast_lengths_the_smallest_is_taken(candidate, a_c, longest):
    """Where several lengths are equally fast, the result is the smallest of them."""
    tell(candidate)
    got = candidate(*a_c, longest)
    expect_equal(got, 0, "the length where no draft gains or loses", reveal=True)


@best_length.check(
    points=1,
    hint="What may a, c and longest be? Do the functions you call look after some of it?",
    bad=[
        (ValueError, 1.5, 0.1, 4),
        (ValueError, -0.5, 0.1, 4),
        (ValueError, 0.5, -0.1, 4),
        (ValueError, 0.5, 0.1, -1),
        (TypeError, 0.5, 0.1, 2.5),
    ],
)
def rates_costs_and_limits_that_cannot_be_are_refused(candidate, bad):
    """A rate outside 0 ... 1, a negative cost and a negative longest raise ValueError; a longest
    that is no int raises TypeError."""
    kind, *args = bad
    expect_error(candidate, kind, *args)


def _longest_of(a, c, longest, first=0, last=0, score=expected_speedup, better=max):
    """The best length between first and longest + last; what cannot be is refused."""
    best_draft_length(a, c, longest)
    lengths = range(min(first, longest), longest + last + 1)
    return better(lengths or [0], key=lambda k: score(a, k, c))


@best_length.misconception(
    "You choose the length with the most tokens a call, and leave out what the drafts cost. Longer "
    "drafts always give more tokens; divide by the time, 1 + k c."
)
def cost_left_out(a, c, longest=32):
    return _longest_of(a, c, longest, score=lambda a, k, c: expected_speedup(a, k, 0.0))


@best_length.misconception(
    "You never try the length 0. If the draft is slow or mostly wrong, no drafting at all is the "
    "fastest, and 0 says so."
)
def never_nought(a, c, longest=32):
    best_draft_length(a, c, longest)
    return _longest_of(a, c, longest, first=1) if longest else 1


@best_length.misconception(
    "You stop one short: longest itself is allowed, and range leaves its end out."
)
def longest_left_out(a, c, longest=32):
    return _longest_of(a, c, longest, last=-1)


@best_length.misconception("You return the speed-up. Wanted is the length that has it.")
def speedup_for_length(a, c, longest=32):
    return expected_speedup(a, best_draft_length(a, c, longest), c)


@best_length.misconception(
    "Of equally fast lengths you take the largest. The smallest drafts no more than it must."
)
def largest_of_equals(a, c, longest=32):
    best_draft_length(a, c, longest)
    return max(range(longest + 1), key=lambda k: (expected_speedup(a, k, c), k))


@best_length.misconception(
    "You charge for k + 1 drafted tokens. Of the k + 1 tokens a call may give, one is the model's "
    "own: the time is 1 + k c."
)
def one_draft_too_many(a, c, longest=32):
    return _longest_of(
        a, c, longest, score=lambda a, k, c: expected_tokens(a, k) / (1 + (k + 1) * c)
    )


@best_length.misconception(
    "You count a draft only if all of it is accepted. A call gives `expected_tokens`: those before "
    "the first rejection are kept."
)
def whole_drafts_counted(a, c, longest=32):
    return _longest_of(a, c, longest, score=lambda a, k, c: (1 + k * a**k) / (1 + k * c))


@best_length.misconception(
    "You return the place in the list, counted from 1. Your list begins with the length 0: its "
    "first entry is no draft at all."
)
def counted_from_1(a, c, longest=32):
    return best_draft_length(a, c, longest) + 1


@best_length.misconception("You choose the smallest speed-up: the slowest of all lengths.")
def slowest(a, c, longest=32):
    return _longest_of(a, c, longest, better=min)


@best_length.accepts("the index of the greatest in a list")
def index_in_a_list(a, c, longest=32):
    if not isinstance(longest, int):
        raise TypeError("longest must be an int")
    if longest < 0:
        raise ValueError("longest must not be negative")
    speeds = [expected_speedup(a, k, c) for k in range(longest + 1)]
    return speeds.index(max(speeds))


@best_length.accepts("longer as long as it gets faster: after the peak it never does again")
def climbs_to_the_peak(a, c, longest=32):
    if not isinstance(longest, int):
        raise TypeError("longest must be an int")
    if longest < 0 or c < 0 or not 0 <= a <= 1:
        raise ValueError("out of range")
    k = 0
    while k < longest and speed(a, k + 1, c) > speed(a, k, c):
        k += 1
    return k


@best_length.accepts("NumPy, all lengths at once")
def numpy_argmax(a, c, longest=32):
    if not isinstance(longest, int):
        raise TypeError("longest must be an int")
    if longest < 0 or c < 0 or not 0 <= a <= 1:
        raise ValueError("out of range")
    k = np.arange(longest + 1)
    return np.argmax(np.cumsum(float(a) ** k) / (1 + k * c))


# --- 6. look_up ----------------------------------------------------------------------------------

lookup = Exercise(
    look_up,
    paper="Saxena 2023, prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding)",
    difficulty=2,
    minutes=15,
    equivalent={
        "stretches = text[:-1].unfold(0, n, 1)  ->  stretches = text[:-1].unfold(-1, n, 1)": "the "
        "text has one dimension, the first and the last",
    },
)

Searched = tuple[Tensor, int, int]  # text, length, longest


def places(text: list[int], n: int) -> list[int]:
    """Where the last n tokens stand in the text before its end."""
    return [i for i in range(len(text) - n) if text[i : i + n] == text[len(text) - n :]]


def matches(text: list[int]) -> int:
    """How many tokens at the end of the text are found before it, at most."""
    return max((n for n in range(1, len(text)) if places(text, n)), default=0)


def follows(text: list[int], n: int, which: int = 0) -> list[int]:
    """What comes after the first (or another) place of the last n tokens."""
    return text[places(text, n)[which] + n :]


@st.composite
def texts(draw: st.DrawFn, what: str) -> tuple[Searched, list[int]]:
    """A text to search, and what is to be found in it.

    Args:
        what: "once", the last token stands in it once before; "longer", a longer match stands
            elsewhere than a shorter one; "limit", the same, but the longer one is not allowed;
            "twice", the longest match has several places; "end", less follows than is wanted.
    """
    rng = generator(draw(SEEDS))
    length = draw(st.integers(2 if what == "end" else 1, 4))
    longest = 1 if what == "once" else draw(st.integers(2 if what == "longer" else 1, 3))
    planted = {
        "once": (1,),
        "longer": (longest, 1),
        "limit": (longest + 1, longest),
        "twice": (longest, longest),
        "end": (longest,),
    }
    while True:
        size = int(rng.integers(longest + 1, 15))
        text = rng.integers(1, rng.integers(3, 7), size).tolist()
        for n in planted[what]:
            back = int(rng.integers(1, length if what == "end" else size))  # how far before the end
            for i in range(size - 1 - back, max(size - n - back, 0) - 1, -1):
                text[i] = text[i + back]
        most = matches(text)
        n = min(most, longest)
        if n == 0:
            continue
        found = follows(text, n)
        apart = places(text, n)[-1] + n <= len(text) - n  # the match does not overlap the end
        if what == "end":
            fits = len(found) < length and n == most == longest and len(places(text, n)) == 1
        elif len(found) < length or not apart:
            continue
        elif what == "once":
            fits = len(places(text, 1)) == 1
        elif what == "longer":
            fits = n == most > 1 and len(places(text, n)) == 1
            fits = fits and follows(text, 1)[:length] != found[:length]
        else:  # a shorter match finds the same
            fits = n == longest and len(follows(text, 1)) == len(found)
            other = follows(text, n, -1) if what == "twice" else follows(text, most)
            fits = fits and (n == most) == (what == "twice") and other[:length] != found[:length]
        if fits:
            return (torch.tensor(text), length, longest), found[:length]


def expect_proposed(got: Any, want: list[int]) -> None:
    """Fail unless exactly these tokens are proposed."""
    got = as_double(got)
    expect(got.dim() == 1, f"the result has shape {tuple(got.shape)}, which is no vector")
    expect_equal(got, torch.tensor(want, dtype=torch.float64), "the proposal", reveal=True)


@lookup.check(
    points=2,
    hint="Find the last token earlier in the text, with a finger. What stands after it, and how "
    "much of that was asked for?",
    drawn=texts("once"),
)
def what_followed_is_proposed(candidate, drawn):
    """With longest = 1, where the last token has stood in the text once before, the tokens that
    followed it are proposed, as many as length says."""
    args, want = drawn
    # Not judged: a match of two tokens tells a start at the match from a start one token too early.
    candidate(torch.tensor([1, 2, 3, 1, 2]), 1, 2)
    expect_proposed(candidate(*args), want)


@lookup.check(
    points=3,
    hint="How many tokens do you try to match first, and how many if that fails?",
    drawn=texts("longer"),
)
def a_longer_match_beats_a_shorter_one(candidate, drawn):
    """Of all matches of at most longest tokens the longest is used, wherever it stands."""
    args, want = drawn
    expect_proposed(candidate(*args), want)


@lookup.check(
    points=2,
    hint="The end of the text may have stood in several places. Which of them does the docstring "
    "want, and does it matter whether still more tokens agree there?",
    drawn=texts("twice") | texts("limit"),
)
def of_equally_long_matches_the_first_wins(candidate, drawn):
    """Where the last longest tokens have stood in several places the first of them is used, even if
    at another one more than longest tokens agree."""
    args, want = drawn
    expect_proposed(candidate(*args), want)


@lookup.check(
    points=1,
    hint="If the text ends before enough tokens have followed, what is left to propose?",
    drawn=texts("end"),
)
def where_the_text_ends_fewer_are_proposed(candidate, drawn):
    """Where fewer than length tokens follow the match, those are proposed and no more; the match
    may overlap the end of the text."""
    args, want = drawn
    expect_proposed(candidate(*args), want)


@lookup.check(
    points=1,
    hint="A token that is new to the text has never been followed by anything. What is an empty "
    "proposal?",
    vocab=st.integers(1, 4),
    size=st.integers(0, 8),
    length=st.integers(1, 4),
    longest=st.integers(1, 4),
    seed=SEEDS,
)
def after_a_new_token_nothing_is_proposed(candidate, vocab, size, length, longest, seed):
    """If the last token stands nowhere else in the text, as in a text of one token, the result is
    an empty vector."""
    text = [*generator(seed).integers(1, vocab + 1, size).tolist(), 9]
    expect_proposed(candidate(torch.tensor(text), length, longest), [])


@lookup.check(
    points=1,
    hint="How many dimensions has a text, and how small may the two numbers be?",
    bad=[
        (ValueError, torch.ones(1, 4, dtype=torch.int64), 2, 2),
        (ValueError, torch.ones(2, 2, dtype=torch.int64), 2, 2),
        (ValueError, torch.ones(4, dtype=torch.int64), 0, 2),
        (ValueError, torch.ones(4, dtype=torch.int64), -1, 2),
        (ValueError, torch.ones(4, dtype=torch.int64), 2, 0),
        (TypeError, torch.ones(4, dtype=torch.int64), 1.5, 2),
        (TypeError, torch.ones(4, dtype=torch.int64), 2, 1.5),
    ],
)
def texts_and_lengths_that_cannot_be_are_refused(candidate, bad):
    """A text that is no vector, and a length or longest below 1, raise ValueError; one that is no
    int raises TypeError."""
    kind, *args = bad
    expect_error(candidate, kind, *args)


def _search(
    text,
    length,
    longest,
    orders=None,  # the numbers of tokens to match, in the order they are tried
    which=0,  # of the places
    shift=0,  # of what is proposed
    room=0,  # tokens that must follow a match
    overlap=True,
):
    """look_up, open where people go wrong."""
    look_up(text, length, longest)
    ids = text.tolist()
    for n in orders or range(min(longest, len(ids) - 1), 0, -1):
        found = [i for i in places(ids, n) if i + n + room <= len(ids)]
        if not overlap:
            found = [i for i in found if i + n <= len(ids) - n]
        if found:
            begin = max(0, found[which] + n + (shift if shift >= -1 else -n))
            return text[begin : begin + length]
    return text[:0]


@lookup.misconception(
    "You take the last place where the end of the text has stood. The docstring wants the first."
)
def most_recent_place(text, length, longest):
    return _search(text, length, longest, which=-1)


@lookup.misconception(
    "You try short matches first, and a single token is nearly always found. The more tokens "
    "agree, the likelier it is that the text goes on as it did: begin with the longest."
)
def shortest_match_first(text, length, longest):
    look_up(text, length, longest)
    return _search(text, length, longest, range(1, max(2, min(longest, len(text) - 1) + 1)))


@lookup.misconception(
    "You give up if the last `longest` tokens are not found, or find them at the end of the text "
    "itself, where nothing follows. Try fewer of them, down to a single one."
)
def gives_up_at_once(text, length, longest):
    return _search(text, length, longest, [longest])


@lookup.misconception(
    "You match as many tokens as you can. No more than `longest` are to be matched."
)
def no_limit(text, length, longest):
    look_up(text, length, longest)
    return _search(text, length, len(text) + 1)


@lookup.misconception(
    "Your proposal begins with the match itself. Those tokens are at the end of the text already: "
    "propose what stands *after* the match."
)
def begins_with_the_match(text, length, longest):
    return _search(text, length, longest, shift=-2)


@lookup.misconception(
    "Your proposal begins one token too late: what follows a match of n tokens at i is at i + n."
)
def one_too_late(text, length, longest):
    return _search(text, length, longest, shift=1)


@lookup.misconception(
    "Your proposal begins one token too early, with the last token of the match: what follows a "
    "match of n tokens at i is at i + n."
)
def one_too_early(text, length, longest):
    return _search(text, length, longest, shift=-1)


@lookup.misconception(
    "You fill the proposal up where the text ends. Tokens that are made up are a waste of the "
    "model's time: fewer are allowed."
)
def filled_up(text, length, longest):
    found = look_up(text, length, longest)
    return torch.cat([found, found[-1:].expand(length - len(found))]) if len(found) else found


@lookup.misconception(
    "You skip matches after which fewer than `length` tokens stand. They are as good as others; "
    "the proposal is just shorter."
)
def skips_short_ones(text, length, longest):
    return _search(text, length, longest, room=length)


@lookup.misconception(
    "You search only in front of the last n tokens. A match may overlap them: in 7 7 7 the last "
    "two tokens have stood one place earlier."
)
def no_overlap(text, length, longest):
    return _search(text, length, longest, overlap=False)


@lookup.misconception(
    "You propose everything up to the end of the text. At most `length` tokens are wanted."
)
def all_that_follows(text, length, longest):
    look_up(text, length, longest)
    return look_up(text, len(text) + 1, longest)


@lookup.accepts("lists, place by place")
def lists_of_tokens(text, length, longest):
    if not (isinstance(length, int) and isinstance(longest, int)):
        raise TypeError("not an int")
    if text.dim() != 1 or length < 1 or longest < 1:
        raise ValueError("out of range")
    ids = text.tolist()
    for n in range(longest, 0, -1):
        for i in range(len(ids) - n):
            if ids[i : i + n] == ids[-n:]:
                return torch.tensor(ids[i + n : i + n + length])
    return torch.tensor([])


@lookup.accepts("how far each place agrees with the end, counted backwards")
def agreement_of_each_place(text, length, longest):
    if type(length) is not int or type(longest) is not int:
        raise TypeError("not an int")
    if len(text.shape) != 1 or min(length, longest) < 1:
        raise ValueError("out of range")
    best, begin = 0, len(text)
    for end in range(1, len(text)):
        n = 0
        while n < min(longest, end) and text[end - 1 - n] == text[-1 - n]:
            n += 1
        if n > best:
            best, begin = n, end
    return text[begin : begin + length].clone()


@lookup.accepts("NumPy's windows")
def numpy_windows(text, length, longest):
    for number in (length, longest):
        if not isinstance(number, int):
            raise TypeError("not an int")
        if number < 1:
            raise ValueError("at least 1")
    if text.ndim != 1:
        raise ValueError("no vector")
    ids = text.numpy()
    for n in range(min(longest, len(ids) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(ids, n)
        hits = np.flatnonzero((windows == ids[-n:]).all(axis=1))
        if hits[0] + n < len(ids):  # the end finds itself, last of all
            return ids[hits[0] + n :][:length]
    return ids[:0]


# --- 7. tree_mask --------------------------------------------------------------------------------

tree = Exercise(
    tree_mask,
    paper="Miao et al. 2024 (arXiv 2305.09781), section 4.2",
    difficulty=2,
    minutes=10,
)


@st.composite
def trees(draw: st.DrawFn, least: int = 1) -> list[int]:
    """The parents of the nodes of a tree, deep or wide."""
    nodes, seed = draw(st.integers(least, 8)), draw(SEEDS)
    rng = generator(seed)
    deep = rng.choice([0.0, 0.5, 0.8])
    return [i - 1 if rng.random() < deep else int(rng.integers(-1, i)) for i in range(nodes)]


def ancestors(parents: list[int]) -> list[set[int]]:
    """Of each node those above it, without itself."""
    found: list[set[int]] = []
    for parent in parents:
        found.append(set() if parent < 0 else {parent} | found[parent])
    return found


def seen(candidate, parents: list[int]) -> Tensor:
    """The candidate's mask as booleans, whatever its type is; that has a check of its own."""
    mask = as_double(candidate(parents))
    expect_shape(mask, (len(parents), len(parents)), "the mask")
    return mask != 0


@tree.check(
    points=1,
    hint="Does a token attend to itself?",
    parents=trees(),
)
def each_node_sees_itself(candidate, parents):
    """The diagonal of the mask is True."""
    for i, one in enumerate(seen(candidate, parents).diagonal().tolist()):
        expect(one, f"node {i} does not see itself")


@tree.check(
    points=3,
    hint="Go up from a node: from parent to parent, until the text is reached. Does it see all of "
    "those, the first node of the tree included?",
    parents=trees(least=3),
)
def each_node_sees_its_ancestors(candidate, parents):
    """A node sees its parent, the parent of that, and so on to the top of the tree."""
    mask = seen(candidate, parents)
    for i, above in enumerate(ancestors(parents)):
        for j in sorted(above):
            expect(mask[i, j], f"node {i} does not see its ancestor {j}", got=mask)


@tree.check(
    points=2,
    hint="Two candidates for the same place exclude each other. May one of them know what the "
    "other says? What does -1 stand for, and what is at the index -1 of a list?",
    parents=trees(least=2),
)
def no_node_sees_another_branch(candidate, parents):
    """Of two nodes neither of which is an ancestor of the other, none sees the other."""
    mask, above = seen(candidate, parents), ancestors(parents)
    for i in range(len(parents)):
        for j in set(range(len(parents))) - above[i] - {i}:
            if i not in above[j]:
                expect(~mask[i, j], f"node {i} sees node {j} of another branch", got=mask)


@tree.check(
    points=2,
    hint="Can a token attend to one that comes after it? Which index of the mask is the node that "
    "looks, and which the one that is looked at?",
    parents=trees(least=2),
)
def no_node_sees_what_follows_it(candidate, parents):
    """A node sees none of the nodes below it: the row is the node that attends."""
    mask = seen(candidate, parents)
    for i, above in enumerate(ancestors(parents)):
        for j in above:
            expect(~mask[j, i], f"node {j} sees node {i}, which follows it", got=mask)


@tree.check(
    points=1,
    hint="Which element type has a mask in the signature?",
    examples=20,
    parents=trees() | st.just([]),
)
def the_mask_is_boolean(candidate, parents):
    """The element type of the mask is bool; a tree without nodes has a mask of 0 x 0."""
    got = candidate(parents)
    expect_shape(got, (len(parents), len(parents)), "the mask")
    expect(got.dtype == torch.bool, f"the mask is of {got.dtype}")


@tree.check(
    points=1,
    hint="Between which numbers lies the parent of node i?",
    bad=[[0], [-2], [-1, 1], [-1, 2, 0], [-1, 0, 3], [-1, 0, 1, -2], [1, -1]],
)
def parents_that_do_not_come_before_are_refused(candidate, bad):
    """A parent that is the node itself or a later one, or is below -1, raises ValueError."""
    expect_error(candidate, ValueError, bad)


def _mask(parents, see):
    """A mask of the places where see(i, j, ancestors of each node) holds; refuses bad parents."""
    tree_mask(parents)
    above = ancestors(parents)
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for i in range(len(parents)):
        for j in range(len(parents)):
            mask[i, j] = bool(see(i, j, above))
    return mask


@tree.misconception(
    "Your nodes do not see themselves. A token attends to itself as to its ancestors: the diagonal "
    "is True."
)
def blind_to_itself(parents):
    return _mask(parents, lambda i, j, above: j in above[i])


@tree.misconception(
    "Your nodes see their parent, but not what is above it. Go on from parent to parent, up to the "
    "text; or take over the whole row of the parent."
)
def parents_only(parents):
    return _mask(parents, lambda i, j, above: j in (i, parents[i]))


@tree.misconception(
    "Your mask is that of a plain text: each node sees all before it. In a tree some of those are "
    "in other branches, and must not be seen."
)
def causal_mask(parents):
    return _mask(parents, lambda i, j, above: j <= i)


@tree.misconception(
    "Your mask is transposed: the rows are the nodes that attend, the columns those that are "
    "attended to. A node sees its ancestors, and not what follows it."
)
def transposed(parents):
    return tree_mask(parents).T


@tree.misconception(
    "Your mask is symmetric: a node sees its ancestors, but they see it as well. What comes later "
    "in the text is not to be seen."
)
def symmetric(parents):
    mask = tree_mask(parents)
    return mask | mask.T


@tree.misconception(
    "Siblings see each other in your mask. They are candidates for the same place, of which one at "
    "most is said."
)
def siblings_see_each_other(parents):
    return _mask(parents, lambda i, j, above: j in above[i] or parents[j] == parents[i])


@tree.misconception(
    "You use -1 as an index, and Python takes it for the last node. It says that nothing is above "
    "the node but the text."
)
def minus_1_as_an_index(parents):
    tree_mask(parents)
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        mask[node] |= mask[parent]
    return mask


@tree.misconception(
    "Your way up stops in front of node 0, as if 0 were the text. The text is -1; node 0 is a "
    "token like others."
)
def node_0_left_out(parents):
    return _mask(parents, lambda i, j, above: i == j or (j in above[i] and j > 0))


@tree.misconception(
    "Your mask has numbers. Attention takes a boolean mask for what may be seen, and a mask of "
    "numbers for something to add to the scores: 0 and 1 would hide nothing."
)
def mask_of_numbers(parents):
    return tree_mask(parents).float()


@tree.accepts("walks up from each node")
def walks_up(parents):
    mask = torch.zeros(len(parents), len(parents)).bool()
    for i in range(len(parents)):
        if parents[i] >= i or parents[i] < -1:
            raise ValueError("a parent comes before its child")
        j = i
        while j != -1:
            mask[i, j] = True
            j = parents[j]
    return mask


@tree.accepts("powers of the matrix of parents")
def powers_of_a_matrix(parents):
    n = len(parents)
    step = np.zeros((n, n), dtype=int)
    for i, parent in enumerate(parents):
        if not -1 <= parent < i:
            raise ValueError("a parent comes before its child")
        if parent != -1:
            step[i, parent] = 1
    reach, power = np.eye(n, dtype=int), np.eye(n, dtype=int)
    for _ in range(n):
        power = power @ step
        reach = reach + power
    return reach > 0


@tree.accepts("rows made of the parent's row")
def rows_of_rows(parents):
    rows: list[list[bool]] = []
    for i, parent in enumerate(parents):
        if parent not in range(-1, i):
            raise ValueError("a parent comes before its child")
        row = list(rows[parent]) if parent >= 0 else [False] * len(parents)
        row[i] = True
        rows.append(row)
    return torch.tensor(rows, dtype=torch.bool).reshape(len(parents), len(parents))


# --- 8. verify_candidates ------------------------------------------------------------------------

candidates = Exercise(
    verify_candidates,
    paper="Miao et al. 2024 (arXiv 2305.09781), section 4.3, algorithm 2",
    difficulty=2,
    minutes=10,
)


def several(
    rng: np.random.Generator, vocab: int, wanted: list[bool]
) -> tuple[Judgement, list[np.ndarray], list[bool]]:
    """Candidates tried one after the other, and accepted as wanted.

    Returns:
        p, q, tokens, u; what p has become before each candidate, and in the end; and who would be
        accepted if all were judged by the first p.
    """
    while True:
        p = distribution(rng, vocab)
        now, q, tokens, u, plain = [p], [], [], [], []
        for one in wanted:
            sure = rng.random() < 0.25
            row = np.eye(vocab)[rng.integers(vocab)] if sure else distribution(rng, vocab)
            x = int(rng.choice(vocab, p=row))
            number = chance(rng, min(1.0, now[-1][x] / row[x]), one)
            if number is None or abs(number - min(1.0, p[x] / row[x])) < 0.009:
                break
            q.append(row)
            tokens.append(x)
            u.append(number)
            plain.append(number < min(1.0, p[x] / row[x]))
            now.append(now[-1] if one else residual(now[-1], row).numpy())
        else:
            rows = floats(np.reshape(q, (len(q), vocab)))
            return (floats(p), rows, torch.tensor(tokens, dtype=torch.int64), floats(u)), now, plain


def some_candidates(draw: st.DrawFn, wanted: list[bool], agree: bool | None = None) -> Any:
    rng, vocab = generator(draw(SEEDS)), draw(st.integers(3, 5))
    while True:
        args, now, plain = several(rng, vocab, wanted)
        first = [*plain, True].index(True)
        if agree is None or agree == (first == [*wanted, True].index(True)):
            return args, now


@st.composite
def first_accepted(draw: st.DrawFn) -> Any:
    rng = generator(draw(SEEDS))
    after = (rng.random(draw(st.integers(0, 2))) < 0.5).tolist()
    return some_candidates(draw, [True, *after])


@st.composite
def all_rejected(draw: st.DrawFn, least: int, most: int, agree: bool | None = None) -> Any:
    return some_candidates(draw, [False] * draw(st.integers(least, most)), agree)


@st.composite
def later_accepted(draw: st.DrawFn, agree: bool | None = None) -> Any:
    """One is accepted after one or two that were not; another one may come after it."""
    before, after = draw(st.integers(1, 2)), draw(st.sampled_from(([], [True], [False])))
    args, now = some_candidates(draw, [False] * before + [True, *after], agree)
    return args, now[: before + 1]


@candidates.check(
    points=2,
    hint="If the very first candidate is accepted, what is there to be changed in p? And does the "
    "docstring want the candidate's token or its place?",
    drawn=first_accepted(),
)
def an_accepted_candidate_ends_the_search(candidate, drawn):
    """If the first candidate is accepted, the index is 0 and p is as it was."""
    args, _ = drawn
    index, after = candidate(*args)
    expect_equal(index, 0, "the index of the accepted candidate", reveal=True)
    expect_distribution(after, args[0], "what p has become")


@candidates.check(
    points=2,
    hint="There is only one candidate, so this is speculative decoding as you know it. What is "
    "drawn from after a rejection?",
    drawn=all_rejected(1, 1),
)
def a_rejected_candidate_leaves_the_residual(candidate, drawn):
    """If there is one candidate and it is rejected, the index is None and the rest is the residual
    of p and q."""
    args, now = drawn
    index, after = candidate(*args)
    expect(index is None, "a rejected candidate has an index", got=index)
    expect_distribution(after, now[-1], "what p has become")


@candidates.check(
    points=3,
    hint="The first candidate had its chance, and used up a part of p. By which distribution is "
    "the second one judged, and by which random number?",
    drawn=later_accepted() | later_accepted(agree=False) | all_rejected(2, 3, agree=False),
)
def the_next_candidate_is_judged_by_what_is_left(candidate, drawn):
    """After a rejection the next candidate is accepted with the probability that the residual gives
    it, by its own q and u."""
    args, now = drawn
    index, _ = candidate(*args)
    want = None if len(now) == len(args[2]) + 1 else len(now) - 1
    expect(index == want, "another candidate is accepted", got=index, expected=want)


@candidates.check(
    points=2,
    hint="Each rejection takes something off p. Is it taken off what the rejection before has "
    "left, and with which row of q?",
    drawn=later_accepted(agree=True) | all_rejected(2, 3, agree=True),
)
def every_rejection_takes_its_part_off_p(candidate, drawn):
    """After several rejections, p has become the residual of the residual, each with the q of its
    own candidate."""
    args, now = drawn
    _, after = candidate(*args)
    expect_distribution(after, now[-1], "what p has become")


@candidates.check(
    points=1,
    hint="A sure candidate that was rejected has no probability left. What if the same token comes "
    "again, and u is 0?",
    drawn=all_rejected(1, 1),
)
def what_has_become_impossible_is_not_accepted(candidate, drawn):
    """A candidate whose probability has become 0 is rejected even if its u is 0: such is the same
    token from the same q again."""
    (p, q, tokens, u), _ = drawn
    # The same with another random number is asked for, but not judged, as in verify_draft.
    args = p, q.repeat(2, 1), tokens.repeat(2)
    candidate(*args, torch.cat([u, torch.tensor([0.5])]))
    index, _ = candidate(*args, torch.cat([u, torch.zeros(1)]))
    expect(index is None, "an impossible candidate is accepted", got=index)


@candidates.check(
    points=1,
    hint="If nobody stands for election, what is left to do?",
    examples=20,
    vocab=st.integers(1, 5),
    seed=SEEDS,
)
def without_candidates_p_is_left(candidate, vocab, seed):
    """With m = 0 the index is None and the rest is p."""
    p = floats(distribution(generator(seed), vocab))
    nothing = torch.zeros(0)
    index, after = candidate(p, torch.zeros(0, vocab), nothing.long(), nothing)
    expect(index is None, "there is no candidate, but an index", got=index)
    expect_distribution(after, p, "the rest")


def _try(p, q, tokens, u, judge=None, update=residual_distribution):
    """verify_candidates, open where people go wrong.

    Args:
        judge: says whether candidate i is accepted, given p as it has become.
        update: makes p what it becomes by a rejection, given the candidate's q.
    """
    for i in range(len(tokens)):
        accept = u[i] < acceptance_probability(p, q[i], tokens[i]) if judge is None else judge(i, p)
        if accept:
            return i, p
        p = update(p, q[i])
    return None, p


@candidates.misconception(
    "You judge every candidate by the p of the beginning. What the earlier ones could have given "
    "is used up: after a rejection the residual takes the place of p, for judging too."
)
def judged_by_the_first_p(p, q, tokens, u):
    return _try(p, q, tokens, u, lambda i, _: u[i] < acceptance_probability(p, q[i], tokens[i]))


@candidates.misconception(
    "You start each time from the p of the beginning, and only the last rejection shows in the "
    "rest. Each takes its part off what the one before has left."
)
def only_the_last_rejection(p, q, tokens, u):
    first = p
    return _try(p, q, tokens, u, update=lambda _, q_i: residual_distribution(first, q_i))


@candidates.misconception(
    "You take off q without normalising. The residual is a distribution again: its sum is 1, and "
    "the next candidate is judged by it."
)
def residual_without_norm(p, q, tokens, u):
    return _try(p, q, tokens, u, update=lambda p, q_i: (p - q_i).clamp(min=0))


@candidates.misconception(
    "You set the rejected token to 0 and normalise. That is right where the draft is sure, q being "
    "one-hot; in general all of q is taken off: the residual."
)
def rejected_token_struck_out(p, q, tokens, u):
    now = p
    for i, x in enumerate(tokens):
        if u[i] < acceptance_probability(now, q[i], x):
            return i, now
        left = now.index_fill(0, x.long(), 0.0)
        now = left / left.sum() if left.sum() > 0 else now
    return None, now


@candidates.misconception(
    "You change p by the accepted candidate too. The rest is what the *rejected* ones have left."
)
def changed_by_the_accepted(p, q, tokens, u):
    index, after = verify_candidates(p, q, tokens, u)
    return index, after if index is None else residual_distribution(after, q[index])


@candidates.misconception(
    "You return the token. Wanted is the place of the accepted candidate among them, counted from "
    "0, or None."
)
def token_for_index(p, q, tokens, u):
    index, after = verify_candidates(p, q, tokens, u)
    return None if index is None else int(tokens[index]), after


@candidates.misconception(
    "You try all candidates with the first random number. Then the second one hardly ever gets "
    "through where the first did not: each has its own u."
)
def first_random_number_only(p, q, tokens, u):
    def judge(i, p):
        return u[0] < acceptance_probability(p, q[i], tokens[i])

    return _try(p, q, tokens, u, judge)


@candidates.misconception(
    "You use the first row of q for all candidates. Each has been drawn from its own."
)
def first_q_only(p, q, tokens, u):
    return verify_candidates(p, q[:1].expand(q.shape), tokens, u)


@candidates.misconception(
    "You return the p of the beginning where all were rejected. What the candidates could have "
    "given must be taken off, or it would come twice as often as it should."
)
def p_of_the_beginning(p, q, tokens, u):
    index, after = verify_candidates(p, q, tokens, u)
    return index, p if index is None else after


@candidates.misconception(
    "You accept if u equals the acceptance probability too. Uniform numbers in [0, 1) include 0: a "
    "token that cannot be would get through. The comparison is strict."
)
def accepted_at_the_edge(p, q, tokens, u):
    return _try(p, q, tokens, u, lambda i, p: u[i] <= acceptance_probability(p, q[i], tokens[i]))


@candidates.misconception(
    "You go on after a candidate was accepted, and the last one that passes wins. They are tried "
    "in their order, and the first that passes ends it."
)
def last_that_passes(p, q, tokens, u):
    index, after = None, p
    now = p
    for i in range(len(tokens)):
        if u[i] < acceptance_probability(now, q[i], tokens[i]):
            index, after = i, now
        else:
            now = residual_distribution(now, q[i])
    return index, now if index is None else after


@candidates.accepts("recursion: the first candidate, then the others with the residual")
def recursion(p, q, tokens, u):
    if len(tokens) == 0:
        return None, p
    if u[0] < acceptance_probability(p, q[0], tokens[0]):
        return 0, p
    index, left = recursion(residual_distribution(p, q[0]), q[1:], tokens[1:], u[1:])
    return None if index is None else index + 1, left


@candidates.accepts("NumPy in float64, u q(x) < p(x)")
def numpy_loop(p, q, tokens, u):
    now = p.double().numpy()
    for i, (row, x, v) in enumerate(
        zip(q.double().numpy(), tokens.tolist(), u.tolist(), strict=True)
    ):
        if v * row[x] < now[x] - 1e-9:
            return i, now
        left = np.clip(now - row, 0, None)
        left[left < 1e-9] = 0
        now = left / left.sum()
    return None, now


@candidates.accepts("verify_draft, a candidate at a time")
def one_draft_at_a_time(p, q, tokens, u):
    for i in range(tokens.shape[0]):
        both = torch.stack([p, p])
        accepted, following = verify_draft(both, q[i : i + 1], tokens[i : i + 1], u[i : i + 1])
        if accepted == 1:
            return i, p
        p = following
    return None, p
