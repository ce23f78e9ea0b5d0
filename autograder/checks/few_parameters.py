"""The exercises of lab 7, from prompts to adapters: checks, misconceptions, correct variants.

A check asks for one thing and takes the rest as the candidate has it: how scores of tokens add up
is judged by her own scores of single tokens, what a bottleneck adds by her own result for a W_up of
zeros. So one mistake mostly costs points once.

In-place work cannot be seen from outside (candidates get copies), except that PyTorch itself
refuses to write into a parameter.

The misconceptions refuse bad input as the references do, so that they are recognized by their
mistake and not by a missing error message.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
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
from autograder.strategies import LAYOUTS, arrange, tensors
from fewer.peft import (
    bottleneck,
    class_means,
    fold_input_scale,
    fold_output_scale,
    label_prompt,
    reparameterized_prefix,
    sequence_log_probability,
    training_flops,
    transformer_flops,
)

PLAIN = ("whole", "normal", "positive", "ties", "sparse")  # no sum of them is delicate
SEEDS = st.integers(0, 2**16 - 1)
LAST = "the same dimension: there are two"  # why some mutants change nothing


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def floats(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array)).float()


# --- 1. sequence_log_probability -----------------------------------------------------------------

sequence = Exercise(
    sequence_log_probability,
    paper="Brown et al. 2020 (arXiv 2005.14165), section 2.4",
    difficulty=1,
    minutes=10,
    equivalent={
        "return logits.log_softmax(-1).gather(1, tokens[:, None…  ->  "
        "return logits.log_softmax(1).gather(1, tokens[:, None…": LAST,
    },
)

Said = tuple[Tensor, Tensor]  # logits [m, vocab], and the tokens [m] that came


@st.composite
def said(draw: st.DrawFn, rows: tuple[int, int], least: int = 2) -> Said:
    """Logits of which no probability is too small for float32, and tokens."""
    m, vocab = draw(st.integers(*rows)), draw(st.integers(least, 6))
    logits = draw(tensors((m, vocab), (*PLAIN, "negative", "constant")))
    tokens = draw(st.lists(st.integers(0, vocab - 1), min_size=m, max_size=m))
    return logits, torch.tensor(tokens)


def ask_twice(candidate, logits: Tensor, tokens: Tensor) -> None:
    """Ask for the same row twice, which is not judged: it tells a softmax over the rows from a
    shift by one, as one row cannot."""
    candidate(torch.cat([logits, logits]), torch.cat([tokens, tokens]))


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """The right answer, in float64."""
    return as_double(logits).log_softmax(-1)[torch.arange(len(tokens)), tokens].sum()


@sequence.check(
    points=3,
    hint="Take one row of two equal logits. What is the probability of either token, what is its "
    "natural logarithm, and which sign has that?",
    drawn=said(rows=(1, 1)),
)
def one_token_has_the_logarithm_of_its_probability(candidate, drawn):
    """For a single row, the result is the logarithm of what the softmax over the vocabulary gives
    to the token."""
    logits, tokens = drawn
    ask_twice(candidate, logits, tokens)
    got = candidate(logits, tokens)
    expect_close(got, log_probability(logits, tokens), "the log-probability", atol=1e-5)


@sequence.check(
    points=3,
    hint="Ask for each token alone, with its own row, and then for all together. How do logarithms "
    "of probabilities make the logarithm of their product?",
    drawn=said(rows=(2, 5), least=3),
)
def log_probabilities_of_tokens_add_up(candidate, drawn):
    """The result for m tokens is the sum of the m results for each token alone with its own row of
    the logits."""
    logits, tokens = drawn
    alone = [as_double(candidate(logits[i : i + 1], tokens[i : i + 1])) for i in range(len(tokens))]
    for one in alone:
        expect_shape(one, (), "the result for one token")
    got = candidate(logits, tokens)
    expect_close(got, sum(alone), "the result for all tokens", atol=1e-4)


@sequence.check(
    points=2,
    hint="How small may a number in float32 be before it is 0, and what is the logarithm then? Do "
    "you need the probability itself at all?",
    vocab=st.integers(2, 5),
    token=st.integers(0, 4),
    depth=st.sampled_from((150.0, 200.0, 500.0, 3000.0)),
    lift=st.sampled_from((0.0, 300.0, -300.0)),
)
def next_to_impossible_tokens_have_a_finite_one(candidate, vocab, token, depth, lift):
    """Where the logit of a token is hundreds below another, its log-probability is about minus that
    difference, however large the logits are."""
    token %= vocab
    logits = torch.full((1, vocab), lift)
    logits[0, token] = lift - depth
    want = depth + math.log(vocab - 1)
    ask_twice(candidate, logits, torch.tensor([token]))
    got = as_double(candidate(logits, torch.tensor([token])))
    expect_close(got.abs(), want, "the magnitude of the log-probability", atol=1e-3, reveal=True)


@sequence.check(
    points=1,
    hint="How many digits has a number in half precision, and what does the docstring say of the "
    "type that is computed in?",
    drawn=said(rows=(1, 1), least=3),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float64)),
)
def half_precision_is_computed_in_float32(candidate, drawn, dtype):
    """One row of logits in half precision gives what the same numbers give in float32; one in
    float64 is computed in float64."""
    logits, tokens = drawn
    logits = (logits.double() / 7).to(dtype)
    ask_twice(candidate, logits, tokens)
    got, want = as_double(candidate(logits, tokens)), log_probability(logits, tokens)
    exact = 1e-10 if dtype == torch.float64 else 1e-5
    what = f"the magnitude of the result for {str(dtype).removeprefix('torch.')}"
    expect_close(got.abs(), want.abs(), what, rtol=exact, atol=10 * exact)


@sequence.check(
    points=1,
    hint="How many rows do the logits have, and how many tokens are there?",
    bad=[
        (torch.zeros(3, 4), torch.tensor([1, 2])),
        (torch.zeros(2, 4), torch.tensor([1, 2, 3])),
        (torch.zeros(1, 4), torch.tensor([1, 2])),
        (torch.zeros(2, 4), torch.tensor([1])),
    ],
)
def another_number_of_tokens_is_refused(candidate, bad):
    """Logits that have not one row for each token raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _each_token(logits, tokens, dim=-1, log=True):
    """Of each token its (log-)probability in its row; what does not fit is refused."""
    sequence_log_probability(logits, tokens)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rows = logits.log_softmax(dim) if log else logits.softmax(dim)
    return rows.gather(1, tokens[:, None]).flatten()


@sequence.misconception(
    "You add up the logits themselves. A logit says nothing by itself: only the softmax over the "
    "vocabulary makes a probability of it."
)
def adds_up_logits(logits, tokens):
    _each_token(logits, tokens)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.gather(1, tokens[:, None]).sum()


@sequence.misconception(
    "You shift: token i + 1 is looked up in row i. So it is in the loss of a language model, whose "
    "row i comes *after* token i. Here row i is already what was said before token i."
)
def shifts_by_one(logits, tokens):
    _each_token(logits, tokens)
    return _each_token(logits[:-1], tokens[1:]).sum()


@sequence.misconception(
    "You look every token up in every row: an index such as [:, tokens] makes a square. Each token "
    "belongs to its own row."
)
def every_token_in_every_row(logits, tokens):
    _each_token(logits, tokens)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1)[:, tokens].sum()


@sequence.misconception(
    "You take the mean over the tokens. The logarithm of a product is the sum; a mean would make "
    "long labels as likely as short ones."
)
def mean_over_tokens(logits, tokens):
    return _each_token(logits, tokens).mean()


@sequence.misconception(
    "Your sign is that of a loss. Cross-entropy is *minus* the log-probability; a log-probability "
    "is never above 0, and the larger is the likelier."
)
def sign_of_a_loss(logits, tokens):
    return -_each_token(logits, tokens).sum()


@sequence.misconception(
    "You return the probability, the product over the tokens. Wanted is its logarithm, which does "
    "not run out of numbers when texts get long."
)
def probability_itself(logits, tokens):
    return _each_token(logits, tokens).sum().exp()


@sequence.misconception(
    "You multiply the log-probabilities. Probabilities are multiplied; their logarithms are added."
)
def product_of_logarithms(logits, tokens):
    return _each_token(logits, tokens).prod()


@sequence.misconception(
    "Your softmax runs over the tokens of the text. It runs over the vocabulary: the probabilities "
    "of a row add up to 1."
)
def softmax_over_the_rows(logits, tokens):
    return _each_token(logits, tokens, dim=0).sum()


@sequence.misconception(
    "You take the logarithm of a softmax. A small probability is 0 in float32, and its logarithm "
    "minus infinity. Take both steps at once: the logarithm of the softmax has a form without any "
    "small number."
)
def logarithm_of_a_softmax(logits, tokens):
    return _each_token(logits, tokens, log=False).log().sum()


@sequence.misconception(
    "You subtract the logarithm of a plain sum of exponentials, which overflows for large logits "
    "and vanishes for very negative ones. Take the row's largest logit off first, or use a "
    "function that does."
)
def overflowing_sum(logits, tokens):
    _each_token(logits, tokens)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide.gather(1, tokens[:, None])[:, 0] - wide.exp().sum(1).log()).sum()


@sequence.misconception(
    "You compute in half precision, which has three digits at most: log-probabilities of labels "
    "that lie near each other come out alike. Widen the logits to float32 first."
)
def computes_in_half(logits, tokens):
    _each_token(logits, tokens)
    return logits.log_softmax(-1).gather(1, tokens[:, None]).sum()


@sequence.accepts("minus the cross-entropy, summed up")
def cross_entropy(logits, tokens):
    if len(logits) != len(tokens):
        raise ValueError("as many rows as tokens")
    return -F.cross_entropy(logits.double(), tokens, reduction="sum")


@sequence.accepts("a loop over the tokens, with logsumexp")
def loop_with_logsumexp(logits, tokens):
    if len(logits) != len(tokens):
        raise ValueError("as many rows as tokens")
    total = torch.zeros((), dtype=torch.float64)
    for row, token in zip(logits.double(), tokens, strict=True):
        total += row[token] - torch.logsumexp(row, dim=0)
    return total


@sequence.accepts("Python numbers, the largest logit taken off")
def python_numbers(logits, tokens):
    if logits.shape[0] != tokens.shape[0]:
        raise ValueError("as many rows as tokens")
    total = 0.0
    for row, token in zip(logits.double().tolist(), tokens.tolist(), strict=True):
        top = max(row)
        total += row[token] - top - math.log(sum(math.exp(x - top) for x in row))
    return total


# --- 2. class_means ------------------------------------------------------------------------------

means = Exercise(
    class_means,
    paper="Gidaris & Komodakis 2018 (arXiv 1804.09458), section 3.2",
    difficulty=1,
    minutes=10,
    equivalent={
        "if (members.sum(1) == 0).any():  ->  if (members.mean(1) == 0).any():": "a mean is "
        "0 where the sum is",
        "…normalize(features, dim=-1), dim=-1)  ->  …normalize(features, dim=-1))": LAST,
        "…members @ F.normalize(features, dim=-1), dim=-1)  ->  …members @ "
        "F.normalize(features), dim=-1)": LAST,
    },
)

Labelled = tuple[Tensor, Tensor, int]  # features [texts, d], labels [texts], classes


@st.composite
def labelled(draw: st.DrawFn, least: int = 1, order: str = "sorted") -> Labelled:
    """Features of length 1, none of whose classes has members that cancel each other."""
    classes, d = draw(st.integers(least, 4)), draw(st.integers(2, 5))
    rng = generator(draw(SEEDS))
    counts = rng.integers(1, 5, classes)
    labels = np.repeat(np.arange(classes), counts)
    centre = rng.standard_normal((classes, d))
    centre[np.linalg.norm(centre, axis=1) < 0.5] += 1
    x = centre[labels] / np.linalg.norm(centre[labels], axis=1, keepdims=True)
    x = x + rng.uniform(-0.6, 0.6, x.shape) / math.sqrt(d)  # shorter than 1: none turns round
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    if order == "any":
        shuffled = rng.permutation(len(labels))
        x, labels = x[shuffled], labels[shuffled]
    layout = draw(st.sampled_from(LAYOUTS))
    return arrange(floats(x), layout), torch.from_numpy(labels), classes


def pulled(features: Tensor, seed: int) -> Tensor:
    """The same directions, with other lengths."""
    factors = 10 ** generator(seed).uniform(-1, 2, (len(features), 1))
    return features * floats(factors)


def directions(got: Tensor, shape: tuple[int, int]) -> Tensor:
    """The rows of a result with their lengths taken off."""
    got = as_double(got)
    expect_shape(got, shape, "the result")
    length = torch.linalg.vector_norm(got, dim=1, keepdim=True)
    expect(length > 1e-6, "a row of the result is zero", got=got)
    return got / length


@means.check(
    points=2,
    hint="Measure the length of each row of your result. The mean of different directions is "
    "shorter than any of them.",
    drawn=labelled(),
    seed=SEEDS,
)
def each_row_has_the_length_1(candidate, drawn, seed):
    """The result has a row for each class, and each row has the length 1."""
    features, labels, classes = drawn
    got = as_double(candidate(pulled(features, seed), labels, classes))
    expect_shape(got, (classes, features.shape[1]), "the result")
    length = torch.linalg.vector_norm(got, dim=1)
    expect_close(length, torch.ones(classes), "the length of a row", rtol=1e-4, reveal=True)


@means.check(
    points=3,
    hint="Add the features of one class up by hand. Which rows are those, and along which "
    "dimension is the sum?",
    drawn=labelled(),
)
def each_row_points_where_the_mean_of_its_class_does(candidate, drawn):
    """For features of length 1, sorted by class, row c points where the mean of the features of
    class c does."""
    features, labels, classes = drawn
    got = directions(candidate(features, labels, classes), (classes, features.shape[1]))
    want = torch.stack([as_double(features[labels == c]).mean(0) for c in range(classes)])
    want /= torch.linalg.vector_norm(want, dim=1, keepdim=True)
    expect_close(got, want, "the direction of the rows", atol=1e-4)


@means.check(
    points=2,
    hint="Make one feature vector ten times as long, in the same direction. What should become of "
    "the mean direction?",
    drawn=labelled(),
    seed=SEEDS,
)
def long_features_count_no_more_than_short_ones(candidate, drawn, seed):
    """Multiplying each feature vector by a positive number of its own changes no direction."""
    features, labels, classes = drawn
    shape = (classes, features.shape[1])
    plain = directions(candidate(features, labels, classes), shape)
    got = directions(candidate(pulled(features, seed), labels, classes), shape)
    expect_close(got, plain, "the direction of the rows", atol=1e-4)


@means.check(
    points=2,
    hint="Which row belongs to the label 0, if the first text that comes has the label 2?",
    drawn=labelled(least=2, order="any"),
    seed=SEEDS,
)
def row_c_belongs_to_the_label_c(candidate, drawn, seed):
    """In whatever order labels come, row c is that of label c: giving the classes other numbers
    gives the same rows in another order."""
    features, labels, classes = drawn
    other = torch.from_numpy(generator(seed).permutation(classes))
    shape = (classes, features.shape[1])
    plain = directions(candidate(features, labels, classes), shape)
    got = directions(candidate(features, other[labels], classes), shape)
    expect_close(got[other], plain, "the direction of the rows", atol=1e-4)


@means.check(
    points=1,
    hint="What is the mean of no texts, and what does the docstring say of it?",
    bad=[
        (torch.eye(2), torch.tensor([0, 0]), 2),
        (torch.eye(2), torch.tensor([1, 1]), 2),
        (torch.eye(3), torch.tensor([0, 2, 2]), 3),
        (torch.eye(3), torch.tensor([0, 1, 0]), 3),
    ],
)
def a_class_without_texts_is_refused(candidate, bad):
    """If one of the classes has no text, ValueError is raised."""
    expect_error(candidate, ValueError, *bad)


def _directed(features, labels, classes, before=None, total=None, after=None):
    """class_means, open at its three steps; a class without texts is refused."""
    class_means(features, labels, classes)
    x = F.normalize(features, dim=-1) if before is None else before(features)
    total = total or (lambda some: some.mean(0))
    rows = torch.stack([total(x[labels == c]) for c in range(classes)])
    return F.normalize(rows, dim=-1) if after is None else after(rows)


@means.misconception(
    "You take the mean of the features as they are: a long one pulls it towards itself. Only the "
    "direction of a text is to count, so bring each to the length 1 first."
)
def lengths_are_left_in(features, labels, classes):
    return _directed(features, labels, classes, before=lambda x: x)


@means.misconception(
    "You forget to bring the mean back to the length 1. The mean of different directions is "
    "shorter than 1, and the shorter the more they differ."
)
def mean_is_left_short(features, labels, classes):
    return _directed(features, labels, classes, after=lambda rows: rows)


@means.misconception(
    "Your features are scaled along the wrong dimension: over the texts, each feature for itself. "
    "The length is that of a text's own vector, the last dimension."
)
def normalizes_over_the_texts(features, labels, classes):
    return _directed(features, labels, classes, before=lambda x: F.normalize(x, dim=0))


@means.misconception(
    "You scale the class means along the wrong dimension: over the classes. Each row is to have "
    "the length 1."
)
def normalizes_over_the_classes(features, labels, classes):
    return _directed(features, labels, classes, after=lambda rows: F.normalize(rows, dim=0))


@means.misconception(
    "You divide by the sum of the magnitudes. The length of a vector is the root of the sum of its "
    "squares."
)
def sum_of_magnitudes(features, labels, classes):
    def divided(x):
        return F.normalize(x, p=1, dim=-1)

    return _directed(features, labels, classes, before=divided, after=divided)


@means.misconception(
    "You subtract the mean over all texts first, as for a linear probe. Cosines are taken between "
    "the vectors as the model gives them."
)
def centres_the_features(features, labels, classes):
    return _directed(features, labels, classes, before=lambda x: F.normalize(x - x.mean(0), dim=-1))


@means.misconception(
    "Your rows are in the order in which classes first come up. Row c must belong to the label c, "
    "or the largest cosine names the wrong class."
)
def order_of_appearance(features, labels, classes):
    rows = _directed(features, labels, classes)
    return rows[torch.tensor(list(dict.fromkeys(labels.tolist())))]


@means.misconception(
    "You keep one text for each class, the last one that was written over the others. Add up all "
    "of a class: an assignment with an index that repeats does not add."
)
def last_text_of_each_class(features, labels, classes):
    return _directed(features, labels, classes, total=lambda some: some[-1])


@means.accepts("class by class, the sum in place of the mean")
def sums_of_each_class(features, labels, classes):
    unit = features / features.norm(dim=1, keepdim=True)
    rows = []
    for c in range(classes):
        mine = unit[labels == c]
        if not len(mine):
            raise ValueError(f"class {c} has no text")
        rows.append(mine.sum(0) / mine.sum(0).norm())
    return torch.stack(rows)


@means.accepts("index_add, a tiny number added to the lengths")
def index_add(features, labels, classes):
    if (torch.bincount(labels, minlength=classes) == 0).any():
        raise ValueError("a class has no text")
    unit = features / (features.norm(dim=-1, keepdim=True) + 1e-8)
    total = torch.zeros(classes, features.shape[1]).index_add(0, labels, unit)
    return total / (total.norm(dim=-1, keepdim=True) + 1e-8)


@means.accepts("NumPy in float64")
def numpy_means(features, labels, classes):
    x, y = features.double().numpy(), labels.numpy()
    if set(range(classes)) - set(y.tolist()):
        raise ValueError("a class has no text")
    x = x / np.sqrt((x**2).sum(1, keepdims=True))
    rows = np.array([x[y == c].mean(axis=0) for c in range(classes)])
    return rows / np.linalg.norm(rows, axis=1)[:, None]


# --- 3. training_flops ---------------------------------------------------------------------------

flops = Exercise(
    training_flops,
    paper="Kaplan et al. 2020 (arXiv 2001.08361), section 2.1",
    difficulty=2,
    minutes=10,
)

TOKENS = st.sampled_from((1, 10, 2, 7, 128))
LAYERS = st.sampled_from((1, 2, 6, 30))
WIDTHS = st.sampled_from((1, 8, 64, 384))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[int, int]:
    """N, and how many of them are trained."""
    weights = draw(st.sampled_from((1000, 1, 12, 4096, 10_000_000)))
    share = draw(st.sampled_from((0.0, 1.0, 0.5, 0.001, 0.25)))
    return weights, int(weights * share)


@flops.check(
    points=3,
    hint="Begin with the forward pass. Which two gradients does a matrix need that is trained, and "
    "what does each cost beside its forward product?",
    tokens=TOKENS,
    weights=st.sampled_from((1000, 1, 12, 4096, 10_000_000)),
    width=WIDTHS,
)
def trained_matrices_cost_three_passes(candidate, tokens, weights, width):
    """Without attention (no layers have it) and with everything trained, a step costs three times
    the forward pass."""
    got = candidate(tokens, weights, 0, width, weights)
    want = 3 * transformer_flops(tokens, weights, 0, width)
    expect_close(got, want, "the operations", rtol=1e-9, reveal=True)


@flops.check(
    points=3,
    hint="Freeze a matrix, with something trained below it. Which of the things that were computed "
    "for it is not needed any more, and which still is?",
    tokens=TOKENS,
    matrix=matrices(),
    width=WIDTHS,
)
def a_frozen_weight_saves_one_pass_of_three(candidate, tokens, matrix, width):
    """Without attention, freezing some of the weights saves what a forward pass through just these
    costs, and no more."""
    weights, trained = matrix
    full = float(candidate(tokens, weights, 0, width, weights))
    for some in (trained, 0):
        saved = full - float(candidate(tokens, weights, 0, width, some))
        want = transformer_flops(tokens, weights - some, 0, width)
        what = f"what is saved by {weights - some} frozen weights of {weights}"
        expect_close(saved, want, what, rtol=1e-6, reveal=True)


@flops.check(
    points=3,
    hint="Q and K are both made from the text. Through how many of the factors of a product must "
    "the gradient go, and what does each of these ways cost?",
    tokens=TOKENS,
    matrix=matrices(),
    layers=LAYERS,
    width=WIDTHS,
)
def attention_costs_three_passes(candidate, tokens, matrix, layers, width):
    """Layers with attention add three times the forward cost of their attention, whatever is
    trained."""
    weights, trained = matrix
    without = float(candidate(tokens, weights, 0, width, trained))
    more = float(candidate(tokens, weights, layers, width, trained)) - without
    want = 3 * transformer_flops(tokens, 0, layers, width)
    expect_close(more, want, "what attention adds", rtol=1e-6, reveal=True)


@flops.check(
    points=1,
    hint="How many weights can be trained at most? Look at the docstring under Raises, and at what "
    "checks these things in the library.",
    bad=[
        (ValueError, 10, 100, 2, 8, 101),
        (ValueError, 10, 100, 2, 8, -1),
        (ValueError, 0, 100, 2, 8, 50),
        (ValueError, 10, -1, 2, 8, 0),
        (ValueError, 10, 100, -1, 8, 50),
        (ValueError, 10, 100, 2, 0, 50),
        (TypeError, 10, 100, 2, 8, 50.0),
        (TypeError, 10, 100, 2, 8, True),
        (TypeError, 10.0, 100, 2, 8, 50),
    ],
)
def impossible_counts_are_refused(candidate, bad):
    """More trained weights than there are, or counts below their least, raise ValueError; what is
    no whole number raises TypeError."""
    kind, *args = bad
    expect_error(candidate, kind, *args)


def _parts(tokens, matrix_weights, layers, width, trained_weights):
    """Forward through all matrices, through the trained ones, and attention; what is out of range
    is refused."""
    training_flops(tokens, matrix_weights, layers, width, trained_weights)
    return 2 * tokens * matrix_weights, 2 * tokens * trained_weights, 4 * tokens**2 * width * layers


@flops.misconception(
    "You charge the backward pass for the trained weights only. But the gradient must come down "
    "through every frozen matrix too: that is why training 0.1% of the weights saves a third of "
    "the operations and not nearly all."
)
def backward_through_trained_weights_only(tokens, matrix_weights, layers, width, trained_weights):
    every, trained, attention = _parts(tokens, matrix_weights, layers, width, trained_weights)
    return every + 2 * trained + 3 * attention


@flops.misconception(
    "You charge three forward passes whatever is trained. A frozen matrix needs no gradient of its "
    "weights: that part is saved."
)
def three_passes_always(tokens, matrix_weights, layers, width, trained_weights):
    every, _, attention = _parts(tokens, matrix_weights, layers, width, trained_weights)
    return 3 * (every + attention)


@flops.misconception(
    "You let attention cost twice its forward in all. It has two factors, and both are computed "
    "from the text: each needs its gradient, so backward alone is twice the forward."
)
def attention_backward_once(tokens, matrix_weights, layers, width, trained_weights):
    every, trained, attention = _parts(tokens, matrix_weights, layers, width, trained_weights)
    return 2 * every + trained + 2 * attention


@flops.misconception(
    "You charge attention for its forward pass only. It has no weights, but the gradient comes "
    "down through both of its products."
)
def attention_forward_only(tokens, matrix_weights, layers, width, trained_weights):
    every, trained, attention = _parts(tokens, matrix_weights, layers, width, trained_weights)
    return 2 * every + trained + attention


@flops.misconception(
    "You scale the backward pass of attention with the share of the weights that are trained. "
    "Attention has no weights: what it costs does not depend on what is trained."
)
def attention_by_the_trained_share(tokens, matrix_weights, layers, width, trained_weights):
    every, trained, attention = _parts(tokens, matrix_weights, layers, width, trained_weights)
    share = trained_weights / matrix_weights if matrix_weights else 0
    return 2 * every + trained + attention * (2 + share)


@flops.misconception("You count the backward pass alone. A step begins with the forward pass.")
def backward_alone(tokens, matrix_weights, layers, width, trained_weights):
    every, trained, attention = _parts(tokens, matrix_weights, layers, width, trained_weights)
    return every + trained + 2 * attention


@flops.misconception(
    "You add the trained weights to the others. They are among the N already, which are those of "
    "the model with what is attached to it."
)
def trained_weights_counted_twice(tokens, matrix_weights, layers, width, trained_weights):
    every, trained, attention = _parts(tokens, matrix_weights, layers, width, trained_weights)
    return 2 * (every + trained) + trained + 3 * attention


@flops.misconception(
    "Your attention grows with the number of tokens. Every token attends to every other: it grows "
    "with the square."
)
def attention_linear_in_tokens(tokens, matrix_weights, layers, width, trained_weights):
    every, trained, attention = _parts(tokens, matrix_weights, layers, width, trained_weights)
    return 2 * every + trained + 3 * attention // tokens


@flops.accepts("the formula written out")
def formula(tokens, matrix_weights, layers, width, trained_weights):
    _parts(tokens, matrix_weights, layers, width, trained_weights)
    n, N = tokens, matrix_weights
    return 4 * n * N + 2 * n * trained_weights + 12 * n**2 * width * layers


@flops.accepts("forward passes of models that are parts of this one, as a float")
def sum_of_passes(tokens, matrix_weights, layers, width, trained_weights):
    _parts(tokens, matrix_weights, layers, width, trained_weights)
    forward = transformer_flops(tokens, matrix_weights, layers, width)
    attention = transformer_flops(tokens, 0, layers, width)
    return 2.0 * forward + transformer_flops(tokens, trained_weights, 0, width) + attention


@flops.accepts("trained and frozen weights apart, NumPy")
def trained_and_frozen_apart(tokens, matrix_weights, layers, width, trained_weights):
    _parts(tokens, matrix_weights, layers, width, trained_weights)
    weights = np.array([trained_weights, matrix_weights - trained_weights], dtype=np.int64)
    return (weights * [3, 2]).sum() * 2 * tokens + 3 * 4 * tokens * tokens * width * layers


# --- 4. bottleneck -------------------------------------------------------------------------------

squeeze = Exercise(
    bottleneck,
    paper="Houlsby et al. 2019 (arXiv 1902.00751), section 2.1",
    difficulty=1,
    minutes=5,
)

Weights = tuple[Tensor, Tensor, Tensor, Tensor]


@st.composite
def adapter(draw: st.DrawFn, kinds: tuple[str, ...] = PLAIN) -> Weights:
    """W_down [m, d], b_down, W_up [d, m] and b_up."""
    m, d = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    shapes = ((m, d), (m,), (d, m), (d,))
    return tuple(draw(tensors(shape, kinds)) for shape in shapes)  # type: ignore[return-value]


@st.composite
def adapted(draw: st.DrawFn) -> tuple[Tensor, Weights]:
    """Some rows to read, and the adapter that reads them."""
    weights = draw(adapter())
    return draw(tensors((draw(st.integers(1, 4)), weights[0].shape[1]), PLAIN)), weights


def inside(candidate, h: Tensor, weights: Weights) -> Tensor:
    """What W_up writes: the result without what does not depend on it."""
    w_down, b_down, w_up, b_up = weights
    got = as_double(candidate(h, w_down, b_down, w_up, b_up))
    expect_shape(got, h.shape, "the result")
    rest = as_double(candidate(h, w_down, b_down, w_up * 0, b_up))
    expect_shape(rest, h.shape, "the result for a W_up of zeros")
    return got - rest


def expect_at_work(candidate, h: Tensor, weights: Weights) -> None:
    """Fail if W_up makes no difference where all numbers are 1."""
    ones = tuple(torch.ones_like(x) for x in weights)
    expect(inside(candidate, torch.ones_like(h), ones) != 0, "W_up makes no difference")  # type: ignore[arg-type]


def expect_written(got: Tensor, w_up: Tensor, narrow: Tensor) -> None:
    """Fail unless W_up wrote what it should have for the numbers in the bottleneck."""
    want = narrow @ as_double(w_up).T
    size = float((narrow.abs() @ as_double(w_up).abs().T).max())
    expect_close(got, want, "what W_up adds", atol=1e-5 * (1 + size))


@squeeze.check(
    points=2,
    hint="W_up is zero at the start of training. What should be left then: what does the docstring "
    "say of h?",
    drawn=adapted(),
)
def a_w_up_of_zeros_leaves_b_up(candidate, drawn):
    """If W_up is zero, every row of the result is b_up: h itself is not in it."""
    h, (w_down, b_down, w_up, b_up) = drawn
    candidate(h, w_down, b_down, w_up, b_up)  # not judged: it tells two mistakes apart
    got = candidate(h, w_down, b_down, w_up * 0, b_up)
    expect_close(got, b_up.expand(h.shape), "the result", reveal=True)


@squeeze.check(
    points=3,
    hint="Where in the formula does ReLU stand, and what does it make of a number below zero? "
    "Compute W_down h by hand for a small example.",
    drawn=adapted(),
)
def negative_numbers_do_not_pass_the_bottleneck(candidate, drawn):
    """With b_down = 0, what W_up adds to the result is W_up times W_down h, with negative numbers
    of the latter set to zero."""
    h, (w_down, b_down, w_up, b_up) = drawn
    got = inside(candidate, h, (w_down, b_down * 0, w_up, b_up))
    expect_written(got, w_up, (as_double(h) @ as_double(w_down).T).clamp(min=0))


@squeeze.check(
    points=2,
    hint="Let h be zero. What is in the bottleneck then, before and after ReLU?",
    drawn=adapted(),
)
def b_down_is_added_before_the_relu(candidate, drawn):
    """The bias b_down does what one channel more would do that is 1 in every row of h: W_up adds
    the same to the result if b_down is a column of W_down instead."""
    h, (w_down, b_down, w_up, b_up) = drawn
    expect_at_work(candidate, h, drawn[1])
    got = inside(candidate, h, (w_down, b_down, w_up, b_up))
    wider = inside(
        candidate,
        torch.cat([h, h.new_ones(len(h), 1)], dim=1),
        (
            torch.cat([w_down, b_down[:, None]], dim=1),
            b_down * 0,
            torch.cat([w_up, w_up.new_zeros(1, w_up.shape[1])]),
            torch.cat([b_up, b_up.new_zeros(1)]),
        ),
    )
    inner = as_double(h).abs() @ as_double(w_down).abs().T + as_double(b_down).abs()
    size = float((inner @ as_double(w_up).abs().T).max())
    expect_close(got, wider[:, :-1], "what W_up adds", atol=1e-5 * (1 + size))


@squeeze.check(
    points=2,
    hint="A model calls this with texts, tokens and channels, three dimensions; somebody else with "
    "one vector. Which of your operations cares about how many dimensions there are?",
    weights=adapter(kinds=("positive",)),
    lead=st.sampled_from(((), (2, 3), (3,), (2, 1, 2), (1,))),
    seed=SEEDS,
)
def leading_dimensions_pass_through(candidate, weights, lead, seed):
    """The input h may have any number of leading dimensions: the result has the same ones, and each
    vector in it is the result for that vector alone."""
    h = floats(generator(seed).uniform(0.1, 2, (*lead, weights[0].shape[1])).round(2))
    rows = h.reshape(-1, h.shape[-1])
    # As rows, each by itself: other checks look at several rows.
    alone = torch.cat([as_double(candidate(row[None], *weights)) for row in rows])
    got = as_double(candidate(h, *weights))
    expect_shape(got, h.shape, "the result")
    expect_close(got.reshape(rows.shape), alone, "the result for a vector", rtol=1e-4, atol=1e-4)
    expect_at_work(candidate, h, weights)


@squeeze.check(
    points=1,
    hint="A bias of one number fits everything, as PyTorch sees it. Write down the five shapes and "
    "compare them.",
    bad=[
        ((2, 3), (2, 4), (2,), (4, 2), (4,)),
        ((2, 3), (2, 3), (1,), (3, 2), (3,)),
        ((2, 3), (2, 3), (3,), (3, 2), (3,)),
        ((2, 3), (2, 3), (2,), (3, 1), (3,)),
        ((2, 3), (2, 3), (2,), (4, 2), (4,)),
        ((2, 3), (2, 3), (2,), (3, 2), (1,)),
        ((2, 3), (2, 3), (2,), (3, 2), (2,)),
    ],
)
def shapes_that_do_not_fit_are_refused(candidate, bad):
    """Weights and biases whose shapes do not fit each other or h raise ValueError."""
    expect_error(candidate, ValueError, *(torch.ones(shape) for shape in bad))


def _squeezed(h, w_down, b_down, w_up, b_up, f=F.relu, g=None):
    """bottleneck with another f in it, or g after it; what does not fit is refused."""
    bottleneck(h, w_down, b_down, w_up, b_up)
    y = F.linear(f(F.linear(h, w_down, b_down)), w_up, b_up)
    return y if g is None else g(y)


@squeeze.misconception(
    "You add h. The adapter's module does that, after a scale in some cases; this function returns "
    "only what is added."
)
def adds_h(h, w_down, b_down, w_up, b_up):
    return h + _squeezed(h, w_down, b_down, w_up, b_up)


@squeeze.misconception(
    "Your bottleneck has no ReLU: two matrices after each other are one matrix of low rank. The "
    "nonlinearity is what makes an adapter more than that (and what keeps it from being merged)."
)
def forgets_the_relu(h, w_down, b_down, w_up, b_up):
    return _squeezed(h, w_down, b_down, w_up, b_up, f=lambda x: x)


@squeeze.misconception(
    "You apply ReLU once more at the end. What the adapter adds must be able to be negative."
)
def relu_at_the_end_too(h, w_down, b_down, w_up, b_up):
    return _squeezed(h, w_down, b_down, w_up, b_up, g=F.relu)


@squeeze.misconception(
    "Your ReLU is at the end only. It stands in the bottleneck, between the two matrices."
)
def relu_at_the_end_only(h, w_down, b_down, w_up, b_up):
    return _squeezed(h, w_down, b_down, w_up, b_up, f=lambda x: x, g=F.relu)


@squeeze.misconception("You apply ReLU to h. It stands after W_down h + b_down, in the bottleneck.")
def relu_before_the_bottleneck(h, w_down, b_down, w_up, b_up):
    return _squeezed(F.relu(h), w_down, b_down, w_up, b_up, f=lambda x: x)


@squeeze.misconception("You use GELU. Many models do inside, but the f of this adapter is ReLU.")
def gelu(h, w_down, b_down, w_up, b_up):
    return _squeezed(h, w_down, b_down, w_up, b_up, f=F.gelu)


@squeeze.misconception(
    "You leave b_down out. It says for each number in the bottleneck where ReLU begins to let it "
    "through."
)
def forgets_b_down(h, w_down, b_down, w_up, b_up):
    return _squeezed(h, w_down, b_down, w_up, b_up, f=lambda x: F.relu(x - b_down))


@squeeze.misconception(
    "You add b_down after the ReLU. It belongs to the first layer: add it before."
)
def b_down_after_the_relu(h, w_down, b_down, w_up, b_up):
    return _squeezed(h, w_down, b_down, w_up, b_up, f=lambda x: F.relu(x - b_down) + b_down)


@squeeze.misconception("You leave b_up out, the bias of the second layer.")
def forgets_b_up(h, w_down, b_down, w_up, b_up):
    return _squeezed(h, w_down, b_down, w_up, b_up, g=lambda y: y - b_up)


@squeeze.misconception(
    "You turn h around to put W_down on its left, which works for a matrix only. Keep the channels "
    "last and put the transposed matrix on the right, or use a function for linear layers."
)
def matrices_only(h, w_down, b_down, w_up, b_up):
    bottleneck(h, w_down, b_down, w_up, b_up)
    inner = F.relu(torch.mm(w_down, h.t()) + b_down[:, None])
    return (torch.mm(w_up, inner) + b_up[:, None]).t()


def _refuse_shapes(h, w_down, b_down, w_up, b_up):
    m, d = w_down.shape
    for x, shape in ((b_down, (m,)), (w_up, (d, m)), (b_up, (d,)), (h, (*h.shape[:-1], d))):
        if tuple(x.shape) != shape:
            raise ValueError(f"expected {shape}, got {tuple(x.shape)}")


@squeeze.accepts("matrix products with the transposes, clamp")
def products_with_transposes(h, w_down, b_down, w_up, b_up):
    _refuse_shapes(h, w_down, b_down, w_up, b_up)
    return (h @ w_down.T + b_down).clamp(min=0) @ w_up.T + b_up


@squeeze.accepts("einsum in float64, where for ReLU")
def einsum_and_where(h, w_down, b_down, w_up, b_up):
    _refuse_shapes(h, w_down, b_down, w_up, b_up)
    x = torch.einsum("md,...d->...m", w_down.double(), h.double()) + b_down
    return torch.einsum("dm,...m->...d", w_up.double(), torch.where(x > 0, x, 0.0)) + b_up


@squeeze.accepts("NumPy, one number of the bottleneck after the other")
def numpy_loop(h, w_down, b_down, w_up, b_up):
    _refuse_shapes(h, w_down, b_down, w_up, b_up)
    x, down, up = (part.double().numpy() for part in (h, w_down, w_up))
    y = np.zeros(x.shape) + b_up.double().numpy()
    for k in range(len(down)):
        y += np.maximum((x * down[k]).sum(-1) + float(b_down[k]), 0)[..., None] * up[:, k]
    return y


# --- 5. label_prompt -----------------------------------------------------------------------------

prompt = Exercise(
    label_prompt,
    paper="Lester et al. 2021 (arXiv 2104.08691), section 3.2",
    difficulty=1,
    minutes=5,
)

Named = tuple[Tensor, list[list[int]]]


@st.composite
def named(draw: st.DrawFn, least: int = 1, longest: int = 3) -> Named:
    """An embedding whose rows are all different, and names of a few of its tokens."""
    vocab, d = draw(st.integers(4, 9)), draw(st.integers(1, 3))
    rows = torch.arange(float(vocab * d)).view(vocab, d) - draw(st.integers(0, 9))
    name = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=longest)
    names = st.lists(name, min_size=1, max_size=4).filter(lambda x: sum(map(len, x)) >= least)
    return arrange(rows, draw(st.sampled_from(LAYOUTS))), draw(names)


def in_a_row(names: list[list[int]]) -> list[int]:
    return [token for name in names for token in name]


def expect_prompt(got: Tensor, embedding: Tensor, length: int) -> Tensor:
    """The prompt, if it has the right shape."""
    expect_shape(got, (length, embedding.shape[1]), f"the prompt of length {length}")
    return as_double(got)


@prompt.check(
    points=3,
    hint="Write the tokens of the first name down, then those of the second. How many rows has the "
    "prompt if all of them just fit?",
    drawn=named(),
)
def the_names_come_one_after_another(candidate, drawn):
    """If p is the number of all the names' tokens, the prompt is the embedding of each: all tokens
    of the first name, then all of the second, and so on."""
    embedding, names = drawn
    ids = in_a_row(names)
    got = candidate(embedding, names, len(ids))
    expect_equal(got, embedding[torch.tensor(ids)], "the prompt")


@prompt.check(
    points=3,
    hint="Three tokens, and a prompt of eight. Which token is in the fourth row, and which in the "
    "last?",
    drawn=named(longest=1),
    more=st.integers(1, 9),
)
def a_short_list_begins_again(candidate, drawn, more):
    """With n names of one token each and p larger than n, the prompt still has p rows, and each is
    the same as the one n rows before it."""
    embedding, names = drawn
    n = len(in_a_row(names))
    got = expect_prompt(candidate(embedding, names, n + more), embedding, n + more)
    expect_equal(got[n:], got[:more], "the prompt from there on where the list begins again")


@prompt.check(
    points=2,
    hint="Five tokens, and a prompt of two. Which two?",
    drawn=named(least=2),
    part=st.integers(0, 99),
)
def of_a_long_list_the_first_are_used(candidate, drawn, part):
    """If p is smaller than the number n of the names' tokens, the prompt is the first p rows of the
    one of length n."""
    embedding, names = drawn
    n = len(in_a_row(names))
    length = 1 + part % (n - 1)
    full = expect_prompt(candidate(embedding, names, n), embedding, n)
    got = expect_prompt(candidate(embedding, names, length), embedding, length)
    expect_equal(got, full[:length], "the prompt")


@prompt.check(
    points=1,
    hint="One name may have three tokens and another none. Does your code count names or tokens?",
    drawn=named(least=2),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
def where_one_name_ends_makes_no_difference(candidate, drawn, cuts):
    """Where p is the number of tokens, cutting them into names in another way, some of these
    without any token, makes the same prompt."""
    embedding, names = drawn
    ids = in_a_row(names)
    ends = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    others = [ids[a:b] for a, b in itertools.pairwise(ends)]
    want = expect_prompt(candidate(embedding, names, len(ids)), embedding, len(ids))
    expect_equal(candidate(embedding, others, len(ids)), want, "the prompt")


@prompt.check(
    points=1,
    hint="What is there to be repeated if no name has a token?",
    examples=20,
    names=st.sampled_from(([], [[]], [[], []])),
    length=st.integers(1, 5),
)
def names_without_tokens_are_refused(candidate, names, length):
    """If there is no token in any name, ValueError is raised."""
    expect_error(candidate, ValueError, torch.ones(4, 2), names, length)


def _rows(embedding, labels, length, ids):
    """The rows of these ids, as many as are given; names without tokens are refused."""
    label_prompt(embedding, labels, length)
    return embedding[torch.tensor(ids, dtype=torch.int64)]


@prompt.misconception(
    "Your prompt is as short as the names are. It must have p rows: begin again with the first "
    "name until there are as many."
)
def never_repeats(embedding, labels, length):
    return _rows(embedding, labels, length, in_a_row(labels)[:length])


@prompt.misconception(
    "You repeat whole lists of names and do not cut the last one off: the prompt is longer than p."
)
def never_cuts(embedding, labels, length):
    ids = in_a_row(labels)
    return _rows(embedding, labels, length, ids * -(-length // max(len(ids), 1)))


@prompt.misconception(
    "You repeat each token several times before the next one comes. The whole list is gone through "
    "again and again."
)
def repeats_each_token(embedding, labels, length):
    ids = in_a_row(labels)
    times = -(-length // max(len(ids), 1))
    return _rows(embedding, labels, length, [i for i in ids for _ in range(times)][:length])


@prompt.misconception(
    "You use only the first token of each name. A name may have several, and the docstring wants "
    "them all."
)
def first_token_of_each_name(embedding, labels, length):
    ids = [name[0] for name in labels if name]
    times = -(-length // max(len(ids), 1))
    return _rows(embedding, labels, length, (ids * times)[:length])


@prompt.misconception(
    "You make one vector of each name, the mean of its tokens. Here each token keeps its own."
)
def mean_of_each_name(embedding, labels, length):
    label_prompt(embedding, labels, length)
    vectors = [embedding[torch.tensor(name)].mean(0) for name in labels if name]
    return torch.stack([vectors[i % len(vectors)] for i in range(length)])


@prompt.misconception(
    "You take the first tokens of all names, then the second ones. A name's tokens stay together: "
    "one name after another."
)
def names_interleaved(embedding, labels, length):
    longest = max(map(len, labels), default=0)
    ids = [name[i] for i in range(longest) for name in labels if i < len(name)]
    times = -(-length // max(len(ids), 1))
    return _rows(embedding, labels, length, (ids * times)[:length])


@prompt.misconception("You keep the last p of the tokens. Wanted are the first p.")
def keeps_the_last(embedding, labels, length):
    ids = in_a_row(labels)
    times = -(-length // max(len(ids), 1))
    return _rows(embedding, labels, length, (ids * times)[-length:])


@prompt.misconception(
    "You fill the prompt up with zeros. No token is embedded as zeros: begin again with the names."
)
def fills_up_with_zeros(embedding, labels, length):
    rows = _rows(embedding, labels, length, in_a_row(labels)[:length])
    return F.pad(rows, (0, 0, 0, length - len(rows)))


@prompt.misconception(
    "You fill the prompt up with the last token, over and over. Begin again with the first name."
)
def repeats_the_last_token(embedding, labels, length):
    ids = in_a_row(labels)
    return _rows(embedding, labels, length, (ids + ids[-1:] * length)[:length])


@prompt.accepts("the remainder of each row's number")
def by_remainder(embedding, labels, length):
    ids = list(itertools.chain.from_iterable(labels))
    if not ids:
        raise ValueError("no tokens")
    return torch.stack([embedding[ids[i % len(ids)]] for i in range(length)])


@prompt.accepts("the embedded names, repeated and cut")
def embedded_then_repeated(embedding, labels, length):
    names = [embedding[torch.tensor(name)] for name in labels if name]
    if not names:
        raise ValueError("no tokens")
    rows = torch.cat(names)
    return rows.repeat(math.ceil(length / len(rows)), 1)[:length].clone()


@prompt.accepts("NumPy resize, which repeats")
def numpy_resize(embedding, labels, length):
    ids = np.array([token for name in labels for token in name], dtype=np.int64)
    if ids.size == 0:
        raise ValueError("no tokens")
    return embedding.numpy()[np.resize(ids, length)]


# --- 6. reparameterized_prefix -------------------------------------------------------------------

prefix = Exercise(
    reparameterized_prefix,
    paper="Li & Liang 2021 (arXiv 2101.00190), section 4.3",
    difficulty=2,
    minutes=15,
    equivalent={
        "keys, values = both.unflatten(-1, (2, heads, -1)).unbind(1)  ->  "
        "keys, values = both.unflatten(1, (2, heads, -1)).unbind(1)": LAST,
    },
)

Network = tuple[Tensor, Tensor, Tensor, int]  # P', W_1, W_2 and the number of heads
SMALL = ("normal", "ties", "positive")


@st.composite
def networks(
    draw: st.DrawFn,
    positions: tuple[int, int] = (1, 4),
    heads: tuple[int, int] = (1, 3),
    kinds: tuple[str, ...] = SMALL,
) -> Network:
    p, r, hidden = draw(st.integers(*positions)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    n, head_dim = draw(st.integers(*heads)), draw(st.integers(1, 3))
    p_small, w_1 = draw(tensors((p, r), kinds)) / 4, draw(tensors((hidden, r), kinds)) / 4
    return p_small, w_1, draw(tensors((2 * n * head_dim, hidden), kinds)), n


def network_output(p_small: Tensor, w_1: Tensor, w_2: Tensor) -> Tensor:
    """[p, 2 heads head_dim] in float64."""
    return torch.tanh(as_double(p_small) @ as_double(w_1).T) @ as_double(w_2).T


def expect_count(keys: Tensor, values: Tensor, p_small: Tensor, w_2: Tensor) -> None:
    """Fail unless keys and values together have as many numbers as the network makes."""
    numbers, want = keys.numel() + values.numel(), len(p_small) * len(w_2)
    expect(numbers == want, f"keys and values hold {numbers} numbers together, expected {want}")


@prefix.check(
    points=3,
    hint="Which dimension counts the positions in what you return, and which one in what the "
    "network makes? A change of shape does not move a dimension: it only cuts the numbers anew.",
    net=networks(positions=(2, 4)),
)
def each_row_of_p_small_makes_one_position(candidate, net):
    """Keys and values have the shape [heads, p, head_dim], and what is at position i of them is the
    result for row i of P' alone."""
    p_small, w_1, w_2, heads = net
    p, head_dim = len(p_small), len(w_2) // (2 * heads)
    got = candidate(p_small, w_1, w_2, heads)
    for name, part in zip(("keys", "values"), got, strict=True):
        expect_shape(part, (heads, p, head_dim), name)
    for i in range(p):
        alone = candidate(p_small[i : i + 1], w_1, w_2, heads)
        for name, part, one in zip(("keys", "values"), got, alone, strict=True):
            expect_shape(one, (heads, 1, head_dim), name)
            what = f"the {name} of position {i}"
            expect_close(part[:, i], one[:, 0], what, rtol=1e-4, atol=1e-4)


@prefix.check(
    points=3,
    hint="What stands between the two matrices, and what after the second one? Follow one row of "
    "P' through the network by hand.",
    net=networks(),
)
def the_numbers_are_those_the_network_makes(candidate, net):
    """Keys and values together are the numbers that W_2 tanh(W_1 P') has, in whatever order."""
    p_small, w_1, w_2, heads = net
    keys, values = (as_double(part) for part in candidate(p_small, w_1, w_2, heads))
    expect_count(keys, values, p_small, w_2)
    got = torch.cat([keys.flatten(), values.flatten()]).sort().values
    want = network_output(p_small, w_1, w_2).flatten().sort().values
    expect_close(got, want, "the row of all numbers, sorted,", rtol=1e-4, atol=1e-4)


@prefix.check(
    points=2,
    hint="Set the second half of the rows of W_2 to zero. What must be zero in the result?",
    net=networks(heads=(1, 1), kinds=("positive",)),
    half=st.integers(0, 1),
)
def the_first_half_of_w_2_makes_the_keys(candidate, net, half):
    """With one head, the keys come from the first half of the rows of W_2 and the values from the
    second: where one half is zero, so are all of these, and none of the others."""
    p_small, w_1, w_2, heads = net
    w_2 = w_2.clone()
    middle = len(w_2) // 2
    w_2[slice(middle) if half == 0 else slice(middle, None)] = 0
    keys, values = candidate(p_small, w_1, w_2, heads)
    expect_count(keys, values, p_small, w_2)
    for name, part in (("keys", keys), ("values", values)):
        zero = (name == "keys") == (half == 0)
        where = f"where the {'second' if half else 'first'} half of W_2 is zero"
        says = "not all zero" if zero else "zero too, or some of them are"
        expect((as_double(part) == 0) == zero, f"{where}, the {name} are {says}", got=part)


@prefix.check(
    points=2,
    hint="Two heads of three numbers each: a half of W_2 has six rows. Which of them belong to the "
    "second head?",
    net=networks(positions=(1, 1), heads=(2, 4), kinds=("positive",)),
    row=st.integers(0, 99),
)
def each_head_has_consecutive_rows_of_w_2(candidate, net, row):
    """In a half of the rows of W_2, the first head_dim are those of head 0, the next those of
    head 1, and so on: where all rows but one are zero, only that head's number is not."""
    p_small, w_1, w_2, heads = net
    head_dim = len(w_2) // (2 * heads)
    row %= len(w_2)
    single = torch.zeros_like(w_2)
    single[row] = w_2[row]
    keys, values = (as_double(part) for part in candidate(p_small, w_1, single, heads))
    expect_count(keys, values, p_small, w_2)
    expect_shape(keys, tuple(values.shape), "the keys, beside the values,")
    # Which of the two it is in, and in which order their dimensions are, other checks judge.
    found = (keys.abs() + values.abs()).flatten().nonzero().flatten().tolist()
    expect(len(found) == 1, f"{len(found)} numbers are not zero, expected one", got=keys + values)
    want = row % (heads * head_dim)
    places = [divmod(place, head_dim) for place in (found[0], want)]
    (head, k), (right_head, right_k) = places
    expect(
        found[0] == want,
        f"row {row} of W_2 makes number {k} of head {head}, expected number {right_k} of head "
        f"{right_head}",
    )


@prefix.check(
    points=1,
    hint="Half of the rows of W_2 are shared out among the heads. When does that leave a rest?",
    bad=[(6, 2), (4, 4), (5, 1), (8, 3), (3, 3), (2, 2), (10, 4)],
)
def heads_that_do_not_divide_are_refused(candidate, bad):
    """If half of the rows of W_2 cannot be shared out evenly among the heads, ValueError is
    raised."""
    rows, heads = bad
    expect_error(
        candidate, ValueError, torch.ones(3, 2), torch.ones(4, 2), torch.ones(rows, 4), heads
    )


def _made(p_small, w_1, w_2, heads, f=torch.tanh, g=None, cut=None):
    """reparameterized_prefix with another network or cut; heads that do not divide are refused.

    Args:
        cut: makes keys and values, [p, heads, head_dim] each, of [p, 2 heads head_dim].
    """
    reparameterized_prefix(p_small, w_1, w_2, heads)
    both = f(p_small @ w_1.T) @ w_2.T
    both = both if g is None else g(both)
    cut = cut or (lambda x: x.reshape(len(x), 2, heads, -1).unbind(1))
    return tuple(part.transpose(0, 1) for part in cut(both))


@prefix.misconception(
    "Your network has no tanh: it is one linear map, and could as well be left out."
)
def forgets_the_tanh(p_small, w_1, w_2, heads):
    return _made(p_small, w_1, w_2, heads, f=lambda x: x)


@prefix.misconception("Your network has a ReLU in its middle. The paper's has tanh.")
def relu_for_tanh(p_small, w_1, w_2, heads):
    return _made(p_small, w_1, w_2, heads, f=F.relu)


@prefix.misconception(
    "You apply tanh after W_2 as well. Then no key or value could be larger than 1: the last layer "
    "is linear."
)
def tanh_at_the_end_too(p_small, w_1, w_2, heads):
    return _made(p_small, w_1, w_2, heads, g=torch.tanh)


@prefix.misconception(
    "You apply tanh to P' itself and not to W_1 P'. It stands between the two matrices."
)
def tanh_before_w_1(p_small, w_1, w_2, heads):
    return _made(torch.tanh(p_small), w_1, w_2, heads, f=lambda x: x)


@prefix.misconception(
    "Keys and values are swapped: the first half of the rows of W_2 makes the keys."
)
def values_first(p_small, w_1, w_2, heads):
    return _made(p_small, w_1, w_2, heads)[::-1]


@prefix.misconception(
    "You cut into heads first, and each head's numbers into keys and values. It is the other way "
    "round: first the half of the keys and that of the values, then each half into heads."
)
def heads_before_halves(p_small, w_1, w_2, heads):
    return _made(p_small, w_1, w_2, heads, cut=lambda x: x.reshape(len(x), heads, 2, -1).unbind(2))


@prefix.misconception(
    "You deal the numbers out to the heads in turn. A head has head_dim numbers that follow each "
    "other: the last dimension is head_dim, and not heads."
)
def numbers_dealt_out_to_heads(p_small, w_1, w_2, heads):
    return _made(
        p_small,
        w_1,
        w_2,
        heads,
        cut=lambda x: x.reshape(len(x), 2, -1, heads).transpose(2, 3).unbind(1),
    )


@prefix.misconception(
    "Keys and values take turns among the rows of W_2 as you read them. The first half is the "
    "keys, the second the values."
)
def keys_and_values_in_turn(p_small, w_1, w_2, heads):
    return _made(
        p_small,
        w_1,
        w_2,
        heads,
        cut=lambda x: x.reshape(len(x), heads, -1, 2).unbind(3),
    )


@prefix.misconception(
    "Your shape is [p, heads, head_dim]. Attention wants the heads first: transpose the two."
)
def positions_first(p_small, w_1, w_2, heads):
    return tuple(part.transpose(0, 1) for part in _made(p_small, w_1, w_2, heads))


@prefix.misconception(
    "You change [p, heads, head_dim] into [heads, p, head_dim] by giving it another shape. That "
    "cuts the same row of numbers at other places and mixes positions with heads; to exchange two "
    "dimensions, transpose."
)
def reshaped_for_transposed(p_small, w_1, w_2, heads):
    keys, values = _made(p_small, w_1, w_2, heads)
    return (
        keys.transpose(0, 1).reshape(keys.shape),
        values.transpose(0, 1).reshape(values.shape),
    )


@prefix.accepts("chunk and view")
def chunk_and_view(p_small, w_1, w_2, heads):
    if w_2.shape[0] % 2 or w_2.shape[0] // 2 % heads:
        raise ValueError("heads must divide half the rows")
    both = F.linear(F.linear(p_small, w_1).tanh(), w_2)
    keys, values = both.chunk(2, dim=-1)
    p = p_small.shape[0]
    return [part.reshape(p, heads, -1).permute(1, 0, 2).contiguous() for part in (keys, values)]


@prefix.accepts("head by head, in float64")
def head_by_head(p_small, w_1, w_2, heads):
    if len(w_2) % (2 * heads):
        raise ValueError("heads must divide half the rows")
    inner, size = torch.tanh(p_small.double() @ w_1.double().t()), len(w_2) // (2 * heads)
    parts = [inner @ block.double().t() for block in w_2.split(size)]
    return torch.stack(parts[:heads]), torch.stack(parts[heads:])


@prefix.accepts("einsum over a W_2 that is cut first")
def einsum_over_cut_w_2(p_small, w_1, w_2, heads):
    if len(w_2) % (2 * heads):
        raise ValueError("heads must divide half the rows")
    cut = w_2.reshape(2, heads, -1, w_2.shape[1])
    both = torch.einsum("thdk,pk->thpd", cut, torch.tanh(torch.einsum("kr,pr->pk", w_1, p_small)))
    return both[0], both[1]


# --- 7. fold_output_scale ------------------------------------------------------------------------

outputs = Exercise(
    fold_output_scale,
    paper="Liu et al. 2022 (arXiv 2205.05638), section 3.3",
    difficulty=1,
    minutes=5,
)

SCALES = ("normal", "whole", "ties", "positive", "negative", "sparse")
Scaled = tuple[Tensor, Tensor, Tensor]


@st.composite
def scaled(draw: st.DrawFn, on: str, square: bool = False) -> Scaled:
    """A weight, a bias, and a scale on the outputs or the inputs. Where the weight is square,
    mistaking one for the other is no error of shapes."""
    out, into = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    into = out if square else into
    w, b = draw(tensors((out, into), PLAIN)), draw(tensors((out,), PLAIN))
    return w, b, draw(tensors((out if on == "outputs" else into,), SCALES))


def reading(seed: int, size: int) -> Tensor:
    """Something for a layer to read."""
    return torch.from_numpy(generator(seed).integers(-4, 5, size).astype(float))


def expect_reads(got: Tensor, w: Tensor, x: Tensor, want: Tensor, bound: Tensor) -> None:
    """Fail unless the new weight makes ``want`` of x; ``bound`` is as large as a result can be."""
    expect_shape(got, w.shape, "the new weight")
    atol = 1e-5 * (1 + float(bound.abs().max()))
    expect_close(as_double(got) @ x, want, "what the new weight makes of an input", atol=atol)


@outputs.check(
    points=3,
    hint="Give the layer an input with one 1 and zeros. Which row of the weight makes output i, "
    "and what should it be multiplied by?",
    layer=scaled("outputs"),
    bias=st.booleans(),
    seed=SEEDS,
)
def the_new_weight_gives_the_scaled_outputs(candidate, layer, bias, seed):
    """For every input x, the new weight gives l * (W x)."""
    w, b, scale = layer
    x = reading(seed, w.shape[1])
    new, _ = candidate(w, b if bias else b * 0, scale)
    wide, factor = as_double(w), as_double(scale)
    bound = factor.abs() * (wide.abs() @ x.abs())
    expect_reads(new, w, x, factor * (wide @ x), bound)


@outputs.check(
    points=2,
    hint="Multiply W x + b by l. What stands beside the product with x then?",
    layer=scaled("outputs", square=True),
)
def the_new_bias_is_scaled_too(candidate, layer):
    """The new bias is l * b."""
    w, b, scale = layer
    _, new = candidate(w, b, scale)
    expect_close(new, as_double(scale) * as_double(b), "the new bias")


@outputs.check(
    points=2,
    hint="The layers of Llama have no bias. What comes in its place, and what is to be returned?",
    layer=scaled("outputs", square=True),
)
def a_layer_without_a_bias_has_none_afterwards(candidate, layer):
    """If b is None, the new bias is None as well, and the new weight is that of a layer with a
    bias."""
    w, b, scale = layer
    new, none = candidate(w, None, scale)
    expect(none is None, "the new bias is not None", got=none)
    with_bias, _ = candidate(w, b, scale)
    expect_equal(new, with_bias, "the new weight")


@outputs.check(
    points=1,
    hint="Weight and bias of a layer are parameters, and the unfolded layer may be needed again. "
    "Do you make new tensors?",
    examples=20,
    layer=scaled("outputs", square=True),
)
def parameters_are_not_written_to(candidate, layer):
    """W and b may be parameters that want a gradient: nothing is written into them."""
    w, b, scale = layer
    new, bias = candidate(w.requires_grad_(), b.requires_grad_(), scale)
    expect_shape(new, w.shape, "the new weight")
    expect_shape(bias, b.shape, "the new bias")


@outputs.check(
    points=1,
    hint="How many outputs are there, and how many numbers has the scale? PyTorch spreads some "
    "shapes without being asked.",
    bad=[((3, 2), (2,)), ((3, 2), (1,)), ((3, 2), ()), ((3, 2), (3, 1)), ((3, 3), (1, 3))],
    bias=[False, True],
)
def a_scale_of_another_shape_is_refused(candidate, bad, bias):
    """A scale that has not one number for each output raises ValueError."""
    shape, scale = bad
    b = torch.ones(shape[0]) if bias else None
    expect_error(candidate, ValueError, torch.ones(shape), b, torch.ones(scale))


def _folded_output(w, b, scale, weight=None, bias=None):
    """fold_output_scale with another weight or bias; a scale that does not fit is refused."""
    fold_output_scale(w, b, scale)
    new = scale[:, None] * w if weight is None else weight(w, scale)
    if b is None:
        return new, None
    return new, scale * b if bias is None else bias(b, scale)


@outputs.misconception(
    "You forget the bias. It is part of the output, l * (W x + b), and is multiplied too."
)
def bias_stays(w, b, scale):
    return _folded_output(w, b, scale, bias=lambda b, s: b)


@outputs.misconception(
    "You scale the columns of the weight: a [out] times an [out, in] is spread along the last "
    "dimension, the inputs. Outputs are the rows: give the scale a second dimension."
)
def scales_the_columns(w, b, scale):
    return _folded_output(w, b, scale, weight=lambda w, s: w * s)


@outputs.misconception("You divide by the scale. Folding it in multiplies by it.")
def divides(w, b, scale):
    return _folded_output(w, b, scale, lambda w, s: w / s[:, None], lambda b, s: b / s)


@outputs.misconception(
    "You multiply by 1 + l. The vectors of IA3 start at one and not at zero: l itself is the "
    "factor."
)
def one_plus_the_scale(w, b, scale):
    return _folded_output(w, b, scale, lambda w, s: w * (1 + s[:, None]), lambda b, s: b * (1 + s))


@outputs.misconception(
    "You add the scale to the bias. It multiplies: l * (W x + b) has l * b in it."
)
def scale_added_to_the_bias(w, b, scale):
    return _folded_output(w, b, scale, bias=lambda b, s: b + s)


@outputs.misconception(
    "You return a bias of zeros for a layer that has none. None stays None, or the layer grows."
)
def zeros_for_no_bias(w, b, scale):
    new, bias = _folded_output(w, b, scale)
    return new, torch.zeros_like(scale) if b is None else bias


@outputs.misconception(
    "You do not expect that b may be None, as it is in most layers of Llama. Such a layer has no "
    "bias to scale."
)
def fails_without_a_bias(w, b, scale):
    fold_output_scale(w, b, scale)
    return scale[:, None] * w, scale * b


@outputs.misconception(
    "You write into the weight or the bias you were given. They are parameters of the layer, which "
    "may be needed as it was, and PyTorch refuses: make new tensors."
)
def writes_into_the_layer(w, b, scale):
    fold_output_scale(w, b, scale)
    w *= scale[:, None]
    if b is not None:
        b *= scale
    return w, b


@outputs.accepts("a product with the diagonal matrix")
def diagonal_matrix(w, b, scale):
    if tuple(scale.shape) != (w.shape[0],):
        raise ValueError("one number an output")
    return torch.diag(scale) @ w, b * scale if b is not None else None


@outputs.accepts("row by row")
def scaled_row_by_row(w, b, scale):
    if scale.shape != (len(w),):
        raise ValueError("one number an output")
    rows = torch.stack([factor * row for factor, row in zip(scale, w, strict=True)])
    return [rows, None if b is None else torch.mul(b, scale)]


@outputs.accepts("the transpose, einsum, NumPy for the bias")
def transposed_and_back(w, b, scale):
    if scale.dim() != 1 or len(scale) != len(w):
        raise ValueError("one number an output")
    new = torch.einsum("io,o->oi", w.T.double(), scale.double())
    return new, None if b is None else b.detach().numpy() * scale.detach().numpy()


# --- 8. fold_input_scale -------------------------------------------------------------------------

inputs = Exercise(
    fold_input_scale,
    paper="Liu et al. 2022 (arXiv 2205.05638), section 3.3",
    difficulty=1,
    minutes=5,
)


@inputs.check(
    points=3,
    hint="Which numbers of the weight meet input i: a row or a column? Those are multiplied by "
    "its scale.",
    layer=scaled("inputs").filter(lambda layer: bool(layer[0].any())),
)
def each_column_becomes_a_multiple_of_itself(candidate, layer):
    """Column i of the new weight is a multiple of column i of W, and the multiples depend on the
    scale."""
    w, _, scale = layer
    got, other = as_double(candidate(w, scale)), as_double(candidate(w, scale + 1))
    expect_shape(got, w.shape, "the new weight")
    wide = as_double(w)
    square = wide.square().sum(0)
    factor = (got * wide).sum(0) / torch.where(square > 0, square, 1.0)
    atol = 1e-5 * (1 + float(got.abs().max()))
    expect_close(got, factor * wide, "the new weight, beside multiples of the columns,", atol=atol)
    expect(not torch.equal(got, other), "the scale makes no difference", got=got)


@inputs.check(
    points=2,
    hint="Turn one input up, and leave the others as they are. Which column should notice?",
    layer=scaled("inputs", square=True),
    place=st.integers(0, 4),
)
def a_scale_concerns_its_own_column_only(candidate, layer, place):
    """If one number of the scale changes, no other column of the new weight does, and its own
    column does unless it is zero."""
    w, _, scale = layer
    i = place % len(scale)
    changed = scale.clone()
    changed[i] += 1
    before, after = as_double(candidate(w, scale)), as_double(candidate(w, changed))
    expect_shape(before, w.shape, "the new weight")
    expect_shape(after, w.shape, "the new weight")
    others = torch.arange(len(scale)) != i
    expect_equal(after[:, others], before[:, others], f"the columns beside column {i}")
    moves = not torch.equal(after[:, i], before[:, i]) or not bool(w[:, i].any())
    expect(moves, f"column {i} stays as it was", got=after)


@inputs.check(
    points=3,
    hint="Twice the input is twice what W makes of it. What about a scale of 0, and one of 1?",
    layer=scaled("inputs", square=True),
    c=st.sampled_from((2.0, -1.0, 0.5, 0.0, 1.0, -4.0, 10.0, 0.3, 1.75)),
)
def equal_scales_multiply_the_whole_weight(candidate, layer, c):
    """If all inputs have the same scale c, the new weight is c W."""
    w, _, scale = layer
    got = candidate(w, torch.full_like(scale, c))
    expect_close(got, c * as_double(w), f"the new weight for scales of {c:g}")


@inputs.check(
    points=1,
    hint="The weight of a layer is a parameter, and the unfolded layer may be needed again. Do you "
    "make a new tensor?",
    examples=20,
    layer=scaled("inputs", square=True),
)
def a_parameter_is_not_written_to(candidate, layer):
    """W may be a parameter that wants a gradient: nothing is written into it."""
    w, _, scale = layer
    expect_shape(candidate(w.requires_grad_(), scale), w.shape, "the new weight")


@inputs.check(
    points=1,
    hint="How many inputs are there, and how many numbers has the scale? PyTorch spreads some "
    "shapes without being asked.",
    bad=[((3, 2), (3,)), ((3, 2), (1,)), ((3, 2), ()), ((3, 2), (3, 1)), ((3, 2), (1, 2))],
)
def a_scale_that_does_not_fit_is_refused(candidate, bad):
    """A scale that has not one number for each input raises ValueError."""
    shape, scale = bad
    expect_error(candidate, ValueError, torch.ones(shape), torch.ones(scale))


def _folded_input(w, scale, weight):
    """Another weight; a scale that does not fit is refused."""
    fold_input_scale(w, scale)
    return weight(w, scale)


@inputs.misconception(
    "You scale the rows of the weight, which are its outputs. Input i meets column i."
)
def scales_the_rows(w, scale):
    return _folded_input(w, scale, lambda w, s: s[:, None] * w)


@inputs.misconception("You divide by the scale. Folding it in multiplies by it.")
def divides_the_inputs(w, scale):
    return _folded_input(w, scale, lambda w, s: w / s)


@inputs.misconception(
    "You multiply by 1 + l. The vectors of IA3 start at one and not at zero: l itself is the "
    "factor."
)
def one_plus_the_input_scale(w, scale):
    return _folded_input(w, scale, lambda w, s: w * (1 + s))


@inputs.misconception(
    "You return the weight as [in, out]: turned around to scale its rows, and not turned back."
)
def left_transposed(w, scale):
    return _folded_input(w, scale, lambda w, s: s[:, None] * w.T)


@inputs.misconception("You fold the scale in twice: the columns are multiplied by its square.")
def scales_twice(w, scale):
    return _folded_input(w, scale, lambda w, s: w * s * s)


@inputs.misconception(
    "You return W times l, a vector: the output for one input. Folding keeps the matrix and "
    "multiplies each of its columns."
)
def product_with_the_scale(w, scale):
    return _folded_input(w, scale, lambda w, s: w @ s)


@inputs.misconception(
    "You write into the weight you were given. It is a parameter of the layer, which may be needed "
    "as it was, and PyTorch refuses: make a new tensor."
)
def writes_into_the_weight(w, scale):
    fold_input_scale(w, scale)
    w *= scale
    return w


@inputs.accepts("a product with the diagonal matrix")
def diagonal_on_the_right(w, scale):
    if tuple(scale.shape) != (w.shape[1],):
        raise ValueError("one number an input")
    return w @ torch.diag(scale)


@inputs.accepts("column by column")
def column_by_column(w, scale):
    if scale.dim() != 1 or len(scale) != w.shape[-1]:
        raise ValueError("one number an input")
    return torch.stack([w[:, i] * scale[i] for i in range(len(scale))], dim=1)


@inputs.accepts("NumPy in float64")
def numpy_broadcast(w, scale):
    if scale.shape != (w.size(1),):
        raise ValueError("one number an input")
    return w.detach().double().numpy() * scale.double().numpy()[None, :]
