"""The exercises of lab 8, LoRA and what came after it: checks, misconceptions, correct variants.

A wrong scale is a mistake of its own: checks of a product judge it up to a factor where that can
be, and codes are judged against the candidate's *own* absmax and mean. So it costs points once.

In-place work cannot be seen from outside (candidates get copies), except that PyTorch itself
refuses to write into a parameter; that is what `lora_merge` is asked with.

The misconceptions refuse bad input as the references do, so that they are recognized by their
mistake and not by a missing error message.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
import statistics

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
from autograder.strategies import LAYOUTS, arrange, given, tensors, values
from fewer.peft import (
    TrainingMemory,
    dora_weight,
    double_quantize,
    dynamic_levels,
    lora_delta,
    lora_merge,
    lora_rank,
    nf4_levels,
    quantize_blockwise,
    require_floating,
    row_norm,
    sparse_peft_delta,
    training_memory,
)

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PLAIN = ("whole", "normal", "positive", "ties", "sparse")  # of factors: no sum of them is delicate
ALPHAS = st.sampled_from((16, 2, 1, 3.0, 0.5, -4, 32.0))
FLAGS = st.sampled_from((None, False, True))  # None: nothing is said
Factors = tuple[Tensor, Tensor]


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@st.composite
def factors(draw: st.DrawFn, ranks: tuple[int, int] = (1, 4)) -> Factors:
    """A [r, in] and B [out, r] whose product is not zero."""
    r, into, out = draw(st.integers(*ranks)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    pair = st.tuples(tensors((r, into), PLAIN), tensors((out, r), PLAIN))
    return draw(pair.filter(lambda ab: bool((ab[1] @ ab[0]).any())))


def product(A: Tensor, B: Tensor) -> Tensor:
    return as_double(B) @ as_double(A)


def rounding(A: Tensor, B: Tensor, scale: float = 1.0) -> float:
    """What float32 may lose of scale times B A."""
    return 1e-6 + 1e-5 * abs(scale) * float((as_double(B).abs() @ as_double(A).abs()).max())


def padded(A: Tensor, B: Tensor, times: int) -> Factors:
    """Factors of times the rank with the same product: rows of A that are zero are added."""
    more = (times - 1) * A.shape[0]
    return torch.cat([A, A.new_zeros(more, A.shape[1])]), torch.cat(
        [B, B.new_ones(B.shape[0], more)], dim=1
    )


# --- 1. lora_delta -------------------------------------------------------------------------------

delta = Exercise(
    lora_delta,
    paper="Hu et al. 2021 (arXiv 2106.09685), equation 3; Kalajdzievski 2023 (arXiv 2312.03732)",
    difficulty=1,
    minutes=5,
)


@delta.check(
    points=3,
    hint="Write down the shapes: A takes the in inputs of the layer to r numbers, B takes those to "
    "its out outputs. Which one is applied first, and so stands on the right?",
    AB=factors(),
    alpha=ALPHAS,
)
def the_change_is_a_multiple_of_b_times_a(candidate, AB, alpha):
    """The result has the shape [out, in] and is the matrix product B A, up to a factor that is the
    same everywhere."""
    A, B = AB
    got, want = as_double(candidate(A, B, alpha)), product(A, B)
    expect_shape(got, want.shape, "the change")
    factor = float((got * want).sum() / want.square().sum())
    atol = rounding(A, B, factor)
    expect_close(got, factor * want, f"the change, as {factor:.4g} times B A,", atol=atol)
    expect(factor != 0, "the change is zero", got=got)


@delta.check(
    points=2,
    hint="What does the scale come to if r is 1? Try two values of alpha.",
    AB=factors(ranks=(1, 1)),
    alpha=ALPHAS,
)
def with_rank_1_the_scale_is_alpha(candidate, AB, alpha):
    """For factors of rank 1 the change is alpha times B A: so are its sum and its norm."""
    A, B = AB
    got, want = as_double(candidate(A, B, alpha)), alpha * product(A, B)
    atol = got.numel() * rounding(A, B, alpha)
    # Both are those of the transpose, too, which another check marks down.
    expect_close(got.norm(), want.norm(), "the norm of the change", atol=atol)
    expect_close(got.sum(), want.sum(), "the sum of the change", atol=atol)


@delta.check(
    points=2,
    hint="Add a row of zeros to A: the product stays what it is, and the rank grows. What should "
    "become of the change?",
    AB=factors(),
    alpha=ALPHAS,
    times=st.integers(2, 4),
)
def twice_the_rank_halves_the_scale(candidate, AB, alpha, times):
    """With k times the rank and the same product B A, the change is k times smaller."""
    A, B = AB
    narrow, wide = (as_double(candidate(*ab, alpha)) for ab in (AB, padded(A, B, times)))
    what = f"{times} times the change of {times} times the rank"
    expect_close(times * wide, narrow, what, atol=rounding(A, B, times * alpha))


@delta.check(
    points=2,
    hint="The last argument chooses between two scales. By which number is alpha divided then?",
    AB=factors(),
    alpha=ALPHAS,
    root=st.integers(2, 3),
)
def rank_stabilized_the_scale_falls_with_the_root(candidate, AB, alpha, root):
    """If rank-stabilized, k^2 times the rank makes the change only k times smaller; with rank 1
    the scale is alpha as before."""
    A, B = AB
    narrow, wide = (as_double(candidate(*ab, alpha, True)) for ab in (AB, padded(A, B, root**2)))
    what = f"{root} times the rank-stabilized change of {root**2} times the rank"
    expect_close(root * wide, narrow, what, atol=rounding(A, B, root * alpha))


@delta.check(
    points=1,
    hint="Look at the docstring under Raises. The library has a function that reads the rank off.",
    bad=[
        (torch.ones(2, 3), torch.ones(4, 3)),
        (torch.ones(3, 2), torch.ones(2, 4)),
        (torch.ones(3), torch.ones(2, 1)),
        (torch.ones(1, 3), torch.ones(2)),
        (torch.ones(1, 1, 3), torch.ones(2, 1)),
        (torch.ones(0, 3), torch.ones(2, 0)),
    ],
)
def factors_that_do_not_fit_are_refused(candidate, bad):
    """Factors that are no matrices, that differ in r, or whose r is 0 raise ValueError."""
    expect_error(candidate, ValueError, *bad, 2.0)


def _divisor(A, B, stable):
    """What alpha is divided by; factors that do not fit are refused."""
    r = lora_rank(A, B)
    return math.sqrt(r) if stable else r


@delta.misconception(
    "You get the change transposed, [in, out]: you multiply the transposes, A first. PyTorch keeps "
    "a weight as [out, in], and so must its change be: B stands on the left, A on the right."
)
def transposed_product(A, B, alpha, rank_stabilized=False):
    return alpha / _divisor(A, B, rank_stabilized) * (A.T @ B.T)


@delta.misconception(
    "Your scale is alpha alone. It is alpha / r: with more rank come more terms of the sum, and "
    "the division keeps the change as large, so that the learning rate need not be tuned again."
)
def scale_is_alpha(A, B, alpha, rank_stabilized=False):
    s = alpha / _divisor(A, B, True) if rank_stabilized else alpha
    lora_rank(A, B)
    return s * (B @ A)


@delta.misconception("Your scale is upside down: it is alpha / r, not r / alpha.")
def scale_upside_down(A, B, alpha, rank_stabilized=False):
    return _divisor(A, B, rank_stabilized) / alpha * (B @ A)


@delta.misconception(
    "You leave the scale out and return B A. The change is s B A, with s = alpha / r."
)
def no_scale(A, B, alpha, rank_stabilized=False):
    lora_rank(A, B)
    return B @ A


@delta.misconception(
    "You divide by the root of r always. That is rsLoRA's scale, and only asked for if "
    "rank_stabilized; LoRA's own is alpha / r."
)
def always_the_root(A, B, alpha, rank_stabilized=False):
    return alpha / _divisor(A, B, True) * (B @ A)


@delta.misconception(
    "You pass over rank_stabilized. If it is true, alpha is divided by the root of r."
)
def never_the_root(A, B, alpha, rank_stabilized=False):
    return alpha / _divisor(A, B, False) * (B @ A)


@delta.misconception(
    "You divide by the number of outputs. r is the dimension that A and B share: the rows of A, "
    "the columns of B."
)
def divides_by_the_outputs(A, B, alpha, rank_stabilized=False):
    lora_rank(A, B)
    out = B.shape[0]
    return alpha / (math.sqrt(out) if rank_stabilized else out) * (B @ A)


@delta.accepts("a sum of outer products, one for each of the r")
def sum_of_outer_products(A, B, alpha, rank_stabilized=False):
    s = alpha / _divisor(A, B, rank_stabilized)
    return sum(s * torch.outer(B[:, k], A[k]) for k in range(A.shape[0]))


@delta.accepts("einsum, alpha into B first")
def einsum_of_scaled_b(A, B, alpha, rank_stabilized=False):
    r = lora_rank(A, B)
    return torch.einsum("or,ri->oi", B * alpha * r ** (-0.5 if rank_stabilized else -1.0), A)


@delta.accepts("NumPy in float64")
def numpy_product(A, B, alpha, rank_stabilized=False):
    s = alpha / _divisor(A, B, rank_stabilized)
    return s * np.dot(B.double().numpy(), A.double().numpy())


# --- 2. lora_merge -------------------------------------------------------------------------------

merge = Exercise(
    lora_merge,
    paper="Hu et al. 2021 (arXiv 2106.09685), section 4.1",
    difficulty=1,
    minutes=5,
)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, in any memory layout, and the factors of a change of it."""
    A, B = draw(factors())
    return draw(tensors((B.shape[0], A.shape[1]), PLAIN)), A, B


def expect_merged(got: Tensor) -> None:
    """Fail if nothing was added to a weight of zeros."""
    expect(as_double(got).any(), "nothing was merged into a weight of zeros", got=got)


def change(A: Tensor, B: Tensor, alpha: float, stable: bool | None = False) -> Tensor:
    """s B A in float64."""
    return lora_delta(A.double(), B.double(), alpha, bool(stable))


@merge.check(
    points=3,
    hint="Merge into a weight of zeros and look at the result: what is left of the adapter, and "
    "with which sign and scale?",
    AB=factors(),
    alpha=ALPHAS,
    stable=FLAGS,
)
def into_zeros_merges_the_change_itself(candidate, AB, alpha, stable):
    """Merged into a weight of zeros, the result is the change s B A, with LoRA's scale or the
    rank-stabilized one."""
    A, B = AB
    W = torch.zeros(B.shape[0], A.shape[1])
    got = candidate(W, A, B, alpha, **given(rank_stabilized=stable))
    expect_close(got, change(A, B, alpha, stable), "the merged weight", atol=rounding(A, B, alpha))


@merge.check(
    points=2,
    hint="What is B before training, and what should a merge do then?",
    layer=layers(),
    alpha=ALPHAS,
)
def with_a_b_of_zeros_the_weight_stays(candidate, layer, alpha):
    """Where B is zero, as before training, the merged weight is W exactly; otherwise it is not."""
    W, A, B = layer
    expect_equal(candidate(W, A, B * 0, alpha), W, "the merged weight")
    expect_merged(candidate(W * 0, A, B, alpha))


@merge.check(
    points=2,
    hint="Give the layer an input by hand, with the adapter beside it and with the merged weight.",
    layer=layers(),
    alpha=ALPHAS,
    seed=st.integers(0, 2**16 - 1),
)
def the_merged_weight_does_what_both_do(candidate, layer, alpha, seed):
    """For every input x, the merged weight gives W x and the change's s B A x together, up to one
    factor on the change."""
    W, A, B = layer
    x = torch.from_numpy(values("whole", (A.shape[1],), seed))
    got = as_double(candidate(W, A, B, alpha))
    expect_shape(got, W.shape, "the merged weight")
    alone = as_double(candidate(W * 0, A, B, alpha))
    expect_merged(alone)
    want = W.double() @ x + alone @ x
    atol = 30 * rounding(A, B, alpha) + 1e-5 * float(W.double().abs().sum(1).max() * 8)
    expect_close(got @ x, want, "the output of the merged weight", atol=atol)


@merge.check(
    points=2,
    hint="W may be in half precision while A and B are not. What does the docstring say of the "
    "result's type?",
    AB=factors(),
    alpha=ALPHAS,
    dtype=st.sampled_from(FLOATS),
)
def the_merged_weight_has_the_type_of_the_weight(candidate, AB, alpha, dtype):
    """The result has the element type of W, whatever the type of A and B."""
    A, B = AB
    got = candidate(torch.zeros(B.shape[0], A.shape[1], dtype=dtype), A, B, alpha)
    expect_merged(got)
    expect(got.dtype == dtype, f"the merged weight is {got.dtype}, expected {dtype}")


@merge.check(
    points=1,
    hint="The weight of a layer is a parameter, and somebody may need it afterwards. Do you make a "
    "new tensor?",
    examples=20,
    AB=factors(),
    alpha=ALPHAS,
)
def a_parameter_is_not_written_to(candidate, AB, alpha):
    """W may be a parameter that wants a gradient: nothing is written into it."""
    A, B = AB
    W = torch.zeros(B.shape[0], A.shape[1], requires_grad=True)
    expect_merged(candidate(W, A, B, alpha))


@merge.check(
    points=1,
    hint="Look at the docstring under Raises. Some shapes that differ PyTorch would add all the "
    "same.",
    bad=[
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1)),
        (torch.ones(3), torch.ones(1, 3), torch.ones(2, 1)),
        (torch.ones(1, 3), torch.ones(1, 3), torch.ones(2, 1)),
        (torch.ones(2, 1), torch.ones(1, 3), torch.ones(2, 1)),
        (torch.ones(3, 2), torch.ones(1, 3), torch.ones(2, 1)),
        (torch.ones(2, 3), torch.ones(1, 3), torch.ones(1, 1)),
    ],
)
def a_change_of_another_shape_is_refused(candidate, bad):
    """Factors that disagree on r, or whose product has not the shape of W, raise ValueError."""
    expect_error(candidate, ValueError, *bad, 2.0)


def _change_of(W, A, B, alpha, rank_stabilized):
    """s B A; what does not fit is refused."""
    lora_merge(W.detach(), A, B, alpha, rank_stabilized)
    return lora_delta(A, B, alpha, rank_stabilized)


@merge.misconception(
    "You subtract the change. That takes an adapter out again; to merge is to add it."
)
def subtracts_the_change(W, A, B, alpha, rank_stabilized=False):
    return W - _change_of(W, A, B, alpha, rank_stabilized).to(W.dtype)


@merge.misconception(
    "You write into W. The caller may need the old weight, for instance to take the adapter out; "
    "and PyTorch does not let you write into a parameter. Return a new tensor."
)
def merges_in_place(W, A, B, alpha, rank_stabilized=False):
    W += _change_of(W, A, B, alpha, rank_stabilized)
    return W


@merge.misconception(
    "The merged weight has another type than W: half precision and float32 add up to float32. "
    "Bring the change to W's type, or the model grows by being merged."
)
def loses_the_type(W, A, B, alpha, rank_stabilized=False):
    return W.to(torch.promote_types(torch.float32, A.dtype)) + _change_of(
        W, A, B, alpha, rank_stabilized
    )


@merge.misconception("You return the change alone. Merged, it is W and the change together.")
def forgets_the_weight(W, A, B, alpha, rank_stabilized=False):
    return _change_of(W, A, B, alpha, rank_stabilized).to(W.dtype)


@merge.misconception(
    "You add B A without its scale. The adapter was trained with s B A, s = alpha / r; anything "
    "else is another model."
)
def forgets_the_scale(W, A, B, alpha, rank_stabilized=False):
    _change_of(W, A, B, alpha, rank_stabilized)
    return W + (B @ A).to(W.dtype)


@merge.misconception(
    "You scale the weight too: it looks like s (W + B A). The scale belongs to the change alone."
)
def scales_the_weight_too(W, A, B, alpha, rank_stabilized=False):
    delta = _change_of(W, A, B, alpha, rank_stabilized)
    r = A.shape[0]
    return (W * (alpha / (math.sqrt(r) if rank_stabilized else r)) + delta).to(W.dtype)


@merge.misconception(
    "You do not pass rank_stabilized on: such an adapter was trained with alpha over the root of r."
)
def forgets_rank_stabilized(W, A, B, alpha, rank_stabilized=False):
    return W + _change_of(W, A, B, alpha, False).to(W.dtype)


@merge.accepts("addmm")
def addmm(W, A, B, alpha, rank_stabilized=False):
    _change_of(W, A, B, alpha, rank_stabilized)
    s = alpha / (math.sqrt(len(A)) if rank_stabilized else len(A))
    return torch.addmm(W.float(), B.float(), A.float(), alpha=s).to(W.dtype)


@merge.accepts("in float64, rounded once")
def in_float64(W, A, B, alpha, rank_stabilized=False):
    lora_merge(W, A, B, alpha, rank_stabilized)
    s = alpha / (len(A) ** 0.5 if rank_stabilized else len(A))
    return (W.double() + s * (B.double() @ A.double())).to(W.dtype)


@merge.accepts("a copy of W, and one outer product after the other added to it")
def adds_outer_products(W, A, B, alpha, rank_stabilized=False):
    lora_merge(W, A, B, alpha, rank_stabilized)
    s = alpha / (math.sqrt(len(A)) if rank_stabilized else len(A))
    merged = W.detach().clone().double()
    for a, b in zip(A, B.T, strict=True):
        merged += s * torch.outer(b, a)
    return merged.to(W.dtype)


# --- 3. dora_weight ------------------------------------------------------------------------------

dora = Exercise(
    dora_weight,
    paper="Liu et al. 2024 (arXiv 2402.09353), equation 5",
    difficulty=2,
    minutes=15,
)


@st.composite
def decomposed(draw: st.DrawFn, most: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, A, B and m of a layer in which no row of W or of what LoRA makes of it is near zero."""
    r, into, out = draw(st.integers(1, most)), draw(st.integers(2, 5)), draw(st.integers(1, 5))
    rng = generator(draw(st.integers(0, 2**16 - 1)))
    W, A, B = (rng.standard_normal(s).round(2) for s in ((out, into), (r, into), (out, r)))
    W[np.linalg.norm(W, axis=1) < 0.5, 0] += 2
    W[np.linalg.norm(W + B @ A, axis=1) < 0.3] *= 3  # the sum is twice as long as W was
    m = (rng.random(out) * 4 + 0.5).round(2)
    return tuple(torch.from_numpy(x).float() for x in (W, A, B, m))  # type: ignore[return-value]


def sum_of(W: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """V' in float64."""
    return W.double() + change(A, B, alpha)


def expect_direction(got: Tensor, V: Tensor) -> None:
    """Fail unless the rows of the candidate's weight point where those of V do."""
    got = as_double(got)
    expect_shape(got, V.shape, "the weight")
    length = row_norm(got)[:, None]
    expect(length > 0, "a row of the weight is zero", got=got)
    expect_close(got / length, V / row_norm(V)[:, None], "the direction of the rows", atol=1e-4)


@dora.check(
    points=3,
    hint="Take your result and measure the length of each output's row. Which of the arguments "
    "says what it should be?",
    layer=decomposed(),
    detach_norm=FLAGS,
)
def every_row_has_the_length_m(candidate, layer, detach_norm):
    """The norm of row i of the result is m_i."""
    W, A, B, m = layer
    got = as_double(candidate(W, A, B, m, alpha=A.shape[0], **given(detach_norm=detach_norm)))
    expect_shape(got, W.shape, "the weight")
    expect_close(row_norm(got), m, "the norm of the rows", rtol=1e-4, reveal=True)


@dora.check(
    points=3,
    hint="Dividing a row by its length changes its length only. Which matrix gives the rows, and "
    "is a single number taken for each row?",
    layer=decomposed(most=1),
    detach_norm=FLAGS,
)
def rows_point_where_lora_points(candidate, layer, detach_norm):
    """With alpha = 1 and r = 1, each row of the result is a positive multiple of that row of
    W + B A."""
    W, A, B, m = layer
    got = candidate(W, A, B, m, alpha=1, **given(detach_norm=detach_norm))
    expect_direction(got, sum_of(W, A, B, 1))


@dora.check(
    points=2,
    hint="By which number is B A multiplied before it is added? The docstring names it s.",
    layer=decomposed(),
    times=st.sampled_from((0.5, 0.25, 0.125, 2.0, 0.0)),
)
def the_change_is_scaled_as_in_lora(candidate, layer, times):
    """With alpha = c r, each row of the result points where that row of W + c B A does."""
    W, A, B, m = layer
    V = sum_of(W, A, B, times * A.shape[0])
    V[row_norm(V) < 0.1] = 0
    got = as_double(candidate(W, A, B, m, alpha=times * A.shape[0]))
    expect_shape(got, W.shape, "the weight")
    clear = row_norm(V) > 0
    expect_direction(got[clear], V[clear])


@dora.check(
    points=1,
    hint="A row of zeros points nowhere, and its length is zero. What becomes of your division?",
    examples=20,
    layer=decomposed(),
    row=st.integers(0, 4),
)
def a_row_of_zeros_stays_one(candidate, layer, row):
    """Where W and B have a row of zeros, so has the result; nothing in it is NaN or infinite."""
    W, A, B, m = layer
    row %= W.shape[0]
    W, B = W.clone(), B.clone()
    W[row], B[row] = 0, 0
    got = as_double(candidate(W, A, B, m, alpha=A.shape[0]))
    expect_shape(got, W.shape, "the weight")
    expect(torch.isfinite(got), "the weight holds NaN or infinity", got=got)
    expect_equal(got[row], torch.zeros(W.shape[1]), "the row", reveal=True)


@dora.check(
    points=1,
    hint="How many magnitudes are there, and what does the docstring say under Raises?",
    bad=[
        (torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1), torch.ones(3)),
        (torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1), torch.ones(1)),
        (torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1), torch.ones(2, 1)),
        (torch.ones(2, 2), torch.ones(1, 2), torch.ones(2, 1), torch.ones(1, 2)),
        (torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 2), torch.ones(2)),
        (torch.ones(2, 3), torch.ones(1, 1), torch.ones(2, 1), torch.ones(2)),
        (torch.ones(2, 3), torch.ones(1, 3), torch.ones(1, 1), torch.ones(2)),
    ],
)
def what_does_not_fit_is_refused(candidate, bad):
    """Magnitudes that are not one an output, and factors that do not fit each other or W, raise
    ValueError."""
    expect_error(candidate, ValueError, *bad, 2.0)


def _dora(W, A, B, m, alpha, direction=None, norm=None):
    """dora_weight, open at its two ends; what does not fit is refused.

    Args:
        direction: the matrix whose rows are stretched; V' if nothing is said.
        norm: what its rows are divided by.
    """
    dora_weight(W, A, B, m, alpha)
    V = lora_merge(W, A, B, alpha)
    direction = V if direction is None else direction
    norm = row_norm(V) if norm is None else norm
    return m[:, None] * direction / torch.where(norm == 0, 1.0, norm)[:, None]


@dora.misconception(
    "You take the norm over the outputs, one for each input. The paper's columns are the rows "
    "here: PyTorch keeps the weight as [out, in], and each output has one norm."
)
def norm_of_the_columns(W, A, B, m, alpha, detach_norm=True):
    dora_weight(W, A, B, m, alpha)
    V = lora_merge(W, A, B, alpha)
    norm = torch.linalg.vector_norm(V, dim=0)
    return m[:, None] * V / torch.where(norm == 0, 1.0, norm)


@dora.misconception("You take one norm for the whole matrix. Each output's row has its own length.")
def norm_of_the_matrix(W, A, B, m, alpha, detach_norm=True):
    dora_weight(W, A, B, m, alpha)
    return _dora(W, A, B, m, alpha, norm=lora_merge(W, A, B, alpha).norm().expand(len(W)))


@dora.misconception(
    "You divide by the norm of W. It is the norm of the sum W + s B A: only then is what is "
    "multiplied by m a pure direction."
)
def norm_of_the_frozen_weight(W, A, B, m, alpha, detach_norm=True):
    _dora(W, A, B, m, alpha)
    return _dora(W, A, B, m, alpha, norm=row_norm(W))


@dora.misconception(
    "You take the norm of W as the magnitude. It is where m begins; m is trained, and given."
)
def magnitude_of_the_frozen_weight(W, A, B, m, alpha, detach_norm=True):
    dora_weight(W, A, B, m, alpha)
    return _dora(W, A, B, row_norm(W), alpha)


@dora.misconception(
    "You return the direction alone: every row has the length 1. Multiply each by its magnitude m."
)
def forgets_the_magnitude(W, A, B, m, alpha, detach_norm=True):
    dora_weight(W, A, B, m, alpha)
    return _dora(W, A, B, torch.ones_like(m), alpha)


@dora.misconception(
    "You multiply by m without dividing by the norm. Then m is a factor and not the length of the "
    "row."
)
def forgets_the_norm(W, A, B, m, alpha, detach_norm=True):
    return _dora(W, A, B, m, alpha, norm=torch.ones_like(m))


@dora.misconception(
    "You leave the adapter out: your directions are those of W. LoRA is what trains them."
)
def direction_of_the_frozen_weight(W, A, B, m, alpha, detach_norm=True):
    return _dora(W, A, B, m, alpha, direction=W, norm=row_norm(W))


@dora.misconception("Your s is alpha alone. As in LoRA, it is alpha / r.")
def dora_scale_is_alpha(W, A, B, m, alpha, detach_norm=True):
    dora_weight(W, A, B, m, alpha)
    return dora_weight(W, A, B, m, alpha * len(A))


@dora.misconception(
    "You divide zero by zero: a row of zeros becomes NaN, and with it all that the model computes. "
    "Such a row should stay as it is."
)
def zeros_become_nan(W, A, B, m, alpha, detach_norm=True):
    dora_weight(W, A, B, m, alpha)
    V = lora_merge(W, A, B, alpha)
    return m[:, None] * V / row_norm(V)[:, None]


@dora.accepts("normalize of the library of PyTorch")
def normalize(W, A, B, m, alpha, detach_norm=True):
    dora_weight(W, A, B, m, alpha)
    V = W + alpha / A.shape[0] * (B @ A)
    return m.unsqueeze(1) * torch.nn.functional.normalize(V, dim=1)


@dora.accepts("one row after the other")
def row_by_row(W, A, B, m, alpha, detach_norm=True):
    dora_weight(W, A, B, m, alpha)
    rows = []
    for w, b, length in zip(W.double(), B.double(), m, strict=True):
        v = w + alpha / len(A) * (b @ A.double())
        norm = v.square().sum().sqrt()
        rows.append(v if norm == 0 else length * v / norm)
    return torch.stack(rows)


@dora.accepts("NumPy, a tiny number added to the norm")
def numpy_with_epsilon(W, A, B, m, alpha, detach_norm=True):
    dora_weight(W, A, B, m, alpha)
    w, a, b, length = (x.double().numpy() for x in (W, A, B, m))
    v = w + alpha / len(a) * b @ a
    return np.diag(length / (np.linalg.norm(v, axis=1) + 1e-9)) @ v


# --- 4. nf4_levels -------------------------------------------------------------------------------

# Why some mutants change nothing that counts:
ROUNDING = "the levels are off by less than 1e-6, as much as a correct float32 solution is"
WIDER = "PyTorch compares float64 with float32 levels as well, and no value is that near a middle"
BELOW = (
    "below = torch.linspace(d, 0.5, 8, dtype=torch.float64)  ->  below = torch.linspace(d, 0.5, 8"
)
ABOVE = (
    "above = torch.linspace(0.5, 1 - d, 9, dtype=torch.float64)  ->  "
    "above = torch.linspace(0.5, 1 - d, 9"
)

levels4 = Exercise(
    nf4_levels,
    paper="Dettmers et al. 2023 (arXiv 2305.14314), section 3 and appendix E",
    difficulty=2,
    minutes=15,
    equivalent={
        f"{step}{dtype})": ROUNDING
        for step in (BELOW, ABOVE)
        for dtype in ("", ", dtype=torch.float32")
    },
)

OUTERMOST = 1 - (1 / 30 + 1 / 32) / 2  # the probability of the last level
PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


@levels4.check(
    points=2,
    hint="Count your levels. Which one is counted in both halves, and what are all of them divided "
    "by in the end?",
)
def there_are_16_levels_from_minus_1_to_1(candidate):
    """The result has 16 levels; the lowest is -1 and the highest is 1."""
    got = candidate()
    expect_shape(got, (16,), "the result")
    ends = as_double(got)[[0, -1]]
    expect_close(ends, [-1.0, 1.0], "the first and the last level", reveal=True)


@levels4.check(
    points=2,
    hint="At which probability is the quantile of the normal distribution 0? Is it among yours, "
    "and how often?",
)
def zero_is_a_level(candidate):
    """Exactly one level is 0, without any rounding."""
    zeros = int((as_double(candidate()) == 0).sum())
    expect(zeros == 1, f"{zeros} levels are exactly 0, expected one")


@levels4.check(
    points=1,
    hint="One half has more levels than the other. Which one, and by how many?",
)
def seven_levels_are_below_zero_and_eight_above(candidate):
    """Seven levels are negative, eight are positive."""
    got = as_double(candidate())
    below, above = int((got < 0).sum()), int((got > 0).sum())
    expect((below, above) == (7, 8), f"{below} levels are below zero and {above} above")


@levels4.check(
    points=3,
    hint="Draw the bell curve and cut each of its halves into slices of equal area. Where do the "
    "cuts lie close together? And where do the outermost ones lie: not at infinity.",
)
def each_half_has_even_probabilities(candidate):
    """Among the levels of one sign, one next to the other, the normal distribution has the same
    probability between any two: for the quantile d of the docstring, and whatever the levels are
    divided by."""
    got = as_double(candidate())
    largest = float(got.abs().max())
    expect(0 < largest < math.inf, "the levels are not finite numbers of both signs", got=got)
    probability = torch.special.ndtr(got / largest * statistics.NormalDist().inv_cdf(OUTERMOST))
    for name, half in (("negative", probability[got < 0]), ("positive", probability[got > 0])):
        steps = half.diff()
        expect(len(steps) > 0, f"there are fewer than two {name} levels", got=got)
        expect_close(steps, steps.mean().expand(len(steps)), f"a step of the {name} half", 1e-3)


@levels4.check(
    points=1,
    hint="Which probability does the outermost level have? It is a mean of two numbers, and the "
    "same on both sides.",
)
def the_levels_are_the_published_ones(candidate):
    """The levels are those of the paper's appendix E."""
    expect_close(candidate(), PUBLISHED, "the levels", rtol=0.0, atol=1e-5)


@levels4.check(
    points=1,
    hint="Which order and which element type does the docstring promise?",
)
def the_levels_rise_and_are_float32(candidate):
    """The result is one row of float32 numbers, none smaller than the one before it."""
    got = candidate()
    expect(got.dim() == 1, f"the result has {got.dim()} dimensions, expected one")
    expect(got.dtype == torch.float32, f"the result is {got.dtype}, expected torch.float32")
    expect(as_double(got).diff() >= 0, "the levels do not rise", got=got)


def _quantiles(below=8, above=9, d=1 - OUTERMOST, divide=True):
    """nf4_levels, open where people go wrong: how many levels a half has, counting zero, and d."""
    low = torch.linspace(d, 0.5, below, dtype=torch.float64)
    high = torch.linspace(0.5, 1 - d, above, dtype=torch.float64)
    found = torch.special.ndtri(torch.cat([low, high[1:]]))
    return (found / found[-1] if divide else found).float()


@levels4.misconception(
    "Your 16 probabilities are evenly spaced from end to end. Then no level is 0, and a weight "
    "of 0 does not stay 0. Make the two halves apart, and let them share the level 0."
)
def symmetric_without_a_zero():
    found = torch.special.ndtri(torch.linspace(1 - OUTERMOST, OUTERMOST, 16, dtype=torch.float64))
    return (found / found[-1]).float()


@levels4.misconception(
    "Your levels are evenly spaced, which is plain 4-bit quantization. Weights are normal, most of "
    "them near zero: the *probabilities* are evenly spaced, and the levels are their quantiles."
)
def uniform_levels():
    return torch.linspace(-1, 1, 16)


@levels4.misconception(
    "Each half is evenly spaced in value. It should be so in probability: take the quantiles."
)
def uniform_halves():
    return torch.cat([torch.linspace(-1, 0, 8), torch.linspace(0, 1, 9)[1:]])


@levels4.misconception(
    "Your probabilities go from 0 to 1, where the quantiles are infinite, and clipping them piles "
    "levels up at -1 and 1. Begin at d and end at 1 - d."
)
def infinities_clipped():
    return _quantiles(d=0.0, divide=False).clamp(-1, 1)


@levels4.misconception(
    "You have 15 levels: eight and eight with the zero in both. A code of 4 bits has room for 16; "
    "the upper half gets nine."
)
def eight_and_eight():
    return _quantiles(8, 8)


@levels4.misconception(
    "You return the quantiles themselves. Blocks are divided by their largest magnitude, so the "
    "levels must end at -1 and 1: divide by the largest."
)
def not_normalized():
    return _quantiles(divide=False)


@levels4.misconception(
    "Your halves are swapped: eight levels below zero and seven above. It is the other way round."
)
def halves_swapped():
    return _quantiles(9, 8)


@levels4.misconception(
    "Your d is that of one half. So that both halves end at the same magnitude, d is the mean of "
    "1/30 and 1/32."
)
def d_of_one_half():
    return _quantiles(d=1 / 30)


@levels4.accepts("the table of the paper")
def published_table():
    return torch.tensor(PUBLISHED)


@levels4.accepts("quantiles of Python's statistics, one after the other")
def python_statistics():
    d, q = (1 / 30 + 1 / 32) / 2, statistics.NormalDist().inv_cdf
    below = [q(d + i * (0.5 - d) / 7) for i in range(7)]
    above = [q(0.5 + i * (0.5 - d) / 8) for i in range(1, 9)]
    return torch.tensor([level / above[-1] for level in (*below, 0.0, *above)])


@levels4.accepts("erfinv in float32, the halves with opposite signs")
def erfinv_of_halves():
    top = 1 - (1 / 30 + 1 / 32)  # 2 (1 - d) - 1
    below, above = (torch.erfinv(torch.linspace(0, top, n)) for n in (8, 9))
    return torch.cat([-below.flip(0)[:-1] / below[-1], above / above[-1]])


# --- 5. quantize_blockwise -----------------------------------------------------------------------

blockwise = Exercise(
    quantize_blockwise,
    paper="Dettmers et al. 2021 (arXiv 2110.02861), Dettmers et al. 2023 (arXiv 2305.14314)",
    difficulty=2,
    minutes=20,
    equivalent={
        "absmax = blocks.abs().amax(dim=1)  ->  absmax = blocks.abs().amax(dim=-1)": "the same "
        "dimension: there are two",
        "…torch.where(absmax == 0, 1.0, absmax)[:, None]  ->  …torch.where(absmax == 0, 2.0, "
        "absmax)[:, None]": "0 / 2 is 0 as well",
        "…bucketize(scaled, middles.to(x)).flatten()[:x.numel()]  ->  …bucketize(scaled, "
        "middles).flatten()[:x.numel()]": WIDER,
    },
)

LEVELS = st.sampled_from(
    (
        nf4_levels(),
        torch.tensor([-1.0, 0.0, 1.0]),
        torch.tensor([-0.5, 0.0, 0.25, 1.0]),
        torch.tensor([-1.0, 1.0]),
        torch.tensor([-1.0, -0.75, -0.125, 0.0, 0.5, 0.875]),
        dynamic_levels(),
    )
)


@st.composite
def blocks(
    draw: st.DrawFn, short: bool = False, most: int = 4, least: int = 1
) -> tuple[Tensor, int]:
    """A row of whole blocks, each of another size of numbers, and the block size. Short: a block
    that is not whole comes last."""
    size, count = draw(st.integers(2, 8)), draw(st.integers(least, most))
    rest = draw(st.integers(1, size - 1)) if short else 0
    count -= short and count > 1 and draw(st.booleans())
    rng = generator(draw(st.integers(0, 2**16 - 1)))
    x = rng.standard_normal(count * size + rest) + 0.01
    lift = draw(st.sampled_from((0.0, 0.0, 3.0, -3.0)))  # blocks of one sign
    exponents = rng.integers(-2, 3, count + 1).repeat(size)[: len(x)]
    x = (x + lift).round(3) * 10.0**exponents
    x[x == 0] = 0.001
    return torch.from_numpy(x).float(), size


@st.composite
def shaped(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A tensor of two or three dimensions, and the size of blocks that it is a whole number of."""
    shape = tuple(draw(st.lists(st.integers(2, 5), min_size=2, max_size=3)))
    n = math.prod(shape)
    size = draw(st.sampled_from([size for size in range(1, n + 1) if n % size == 0]))
    return draw(tensors(shape, ("normal", "outlier", "ties", "positive"), FLOATS)), size


def largest(x: Tensor, size: int) -> Tensor:
    """The largest magnitude of each block, the last of which may be short."""
    return torch.stack([block.abs().max() for block in as_double(x).flatten().split(size)])


def own(absmax: Tensor, right: Tensor) -> Tensor:
    """The candidate's number of each block, as far as it has one for each."""
    got = as_double(absmax).flatten()
    return got if got.shape == right.shape else got.expand(len(right)) if len(got) == 1 else right


def expect_nearest(x: Tensor, codes: Tensor, absmax: Tensor, levels: Tensor, size: int) -> None:
    """Fail unless each value of the row x has the level nearest to it, in units of its absmax."""
    expect_shape(codes, x.shape, "codes")
    code, n = as_double(codes), len(levels)
    expect(
        (code == code.round()) & (code >= 0) & (code < n), "a code is no index into levels", code
    )
    unit = absmax.repeat_interleave(size)[: len(x)]
    exact = as_double(x) / torch.where(unit == 0, 1.0, unit)
    gap = (exact[:, None] - as_double(levels)).abs()
    mine, best = gap.gather(1, code.long()[:, None])[:, 0], gap.amin(dim=1)
    wrong = mine > best + 2e-7 + 2e-6 * exact.abs()
    if bool(wrong.any()):
        i = int((mine - best).argmax())
        level = float(levels[int(code[i])])
        raise Mismatch(
            f"the value {float(x[i]):.4g} is {float(exact[i]):.4g} of the absmax of its block, and "
            f"got the level {level:.4g}, which is not the nearest",
            got=codes,
        )


@blockwise.check(
    points=2,
    hint="Cut the row by hand after every block_size values. What is the number of each block, and "
    "can it be negative?",
    row=blocks(),
    levels=LEVELS,
    zeros=st.booleans(),
)
def absmax_is_the_largest_magnitude_of_each_block(candidate, row, levels, zeros):
    """For a row of whole blocks, absmax has one number a block: the largest magnitude in it, 0 for
    a block of zeros."""
    x, size = row
    x[:size] *= 1 - zeros
    _, absmax = candidate(x, levels, size)
    expect_close(absmax, largest(x, size), "absmax", reveal=True)


@blockwise.check(
    points=3,
    hint="Take one value, divide it by the absmax of its block, and look the levels through. Which "
    "of its two neighbours is nearer, and is the code its place in the row of levels?",
    row=blocks(),
    levels=LEVELS,
)
def each_value_gets_the_nearest_level(candidate, row, levels):
    """A code is the index of the level that is nearest to the value, divided by its block's absmax
    (yours)."""
    x, size = row
    codes, absmax = candidate(x, levels, size)
    expect_nearest(x, codes, own(absmax, largest(x, size)), levels, size)


@blockwise.check(
    points=2,
    hint="Take 10 values in blocks of 4. How many blocks are that, and what is in the last one?",
    row=blocks(short=True),
    levels=LEVELS,
)
def the_last_block_may_be_short(candidate, row, levels):
    """Where the values do not fill the last block, it has a code for each of its values and an
    absmax too."""
    x, size = row
    codes, absmax = candidate(x, levels, size)
    right = largest(x, size)
    expect_shape(codes, x.shape, "codes")
    expect_shape(absmax, right.shape, "absmax")
    # What is in the last block, in units of the candidate's own absmax: others judge the rest.
    last = len(x) - len(x) % size
    expect_nearest(x[last:], codes[last:], as_double(absmax)[-1:], levels, size)


@blockwise.check(
    points=2,
    hint="A weight is a matrix, and blocks pay no heed to where its rows end. Which shape and "
    "which types does the docstring promise?",
    drawn=shaped(),
    levels=LEVELS,
)
def any_shape_is_read_row_by_row(candidate, drawn, levels):
    """The result for x of any shape and memory layout is that for its values in one row, with codes
    of x's shape; codes are uint8, absmax is float32 (float64 for a float64 x)."""
    x, size = drawn
    flat, plain = candidate(x.flatten(), levels, size)
    codes, absmax = candidate(x, levels, size)
    expect_shape(codes, x.shape, "codes")
    expect_equal(as_double(codes).flatten(), flat, "the row of codes")
    expect_equal(absmax, plain, "absmax")
    expect(codes.dtype == torch.uint8, f"codes are {codes.dtype}, expected torch.uint8")
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    expect(absmax.dtype == kind, f"absmax is {absmax.dtype} for {x.dtype}, expected {kind}")


@blockwise.check(
    points=1,
    hint="Pruned weights come in blocks of zeros. What do you divide by then?",
    row=blocks(),
    levels=LEVELS,
    place=st.integers(0, 3),
)
def a_block_of_zeros_gets_the_level_nearest_to_zero(candidate, row, levels, place):
    """In a block of zeros each code is that of the level nearest to 0, and absmax is no NaN."""
    x, size = row
    start = place * size % len(x)
    x = x.clone()
    x[start : start + size] = 0
    codes, absmax = candidate(x, levels, size)
    expect_shape(codes, x.shape, "codes")
    zeros = as_double(codes)[start : start + size]
    expect((zeros >= 0) & (zeros < len(levels)), "a code is no index into levels", got=codes)
    got = levels[zeros.long()].abs().max()
    expect_equal(got, levels.abs().min(), "the magnitude of the level", reveal=True)
    expect(torch.isfinite(as_double(absmax)), "absmax holds NaN or infinity", got=absmax)


@blockwise.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        (TypeError, torch.ones(4, dtype=torch.int64), 2),
        (ValueError, torch.ones(0), 2),
        (ValueError, torch.tensor([1.0, math.nan]), 2),
        (ValueError, torch.tensor([-math.inf, 1.0]), 2),
        (ValueError, torch.ones(4), 0),
        (ValueError, torch.ones(4), -2),
    ],
)
def what_cannot_be_quantized_is_refused(candidate, bad):
    """A tensor of whole numbers raises TypeError; an empty one, one with NaN or infinity, and a
    block_size below 1 raise ValueError."""
    kind, x, size = bad
    expect_error(candidate, kind, x, nf4_levels(), size)


def _cut(x, block_size):
    """The values of x in blocks, zeros after the last; what cannot be quantized is refused."""
    quantize_blockwise(x, nf4_levels(), block_size)
    x = require_floating(x, "x")
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % block_size)).view(-1, block_size)


def _nearest(scaled, levels):
    """The index of the nearest level; of two equally near ones the lower."""
    return torch.bucketize(scaled, ((levels[1:] + levels[:-1]) / 2).to(scaled))


def _coded(x, block_size, absmax, code, safe=True):
    """Codes and absmax of x, once it is decided what absmax is and how a code is found."""
    cut = _cut(x, block_size)
    absmax = absmax(cut)
    divisor = torch.where(absmax == 0, 1.0, absmax) if safe else absmax
    codes = code(cut / divisor[:, None]).flatten()[: x.numel()]
    return codes.to(torch.uint8).view(x.shape), absmax


def _amax(cut):
    return cut.abs().amax(dim=1)


@blockwise.misconception(
    "You take one absmax for all blocks. Blocks are there so that an outlier spoils its own block "
    "only: each has its own largest magnitude."
)
def one_absmax_for_all(x, levels, block_size):
    return _coded(
        x, block_size, lambda c: c.abs().max().repeat(len(c)), lambda s: _nearest(s, levels)
    )


@blockwise.misconception(
    "You take the largest value, not the largest magnitude: in a block of negative numbers that is "
    "the one nearest to zero."
)
def largest_value(x, levels, block_size):
    # Without the zeros that fill the last block up.
    def top(cut):
        return torch.stack([part.max() for part in cut.flatten()[: x.numel()].split(block_size)])

    return _coded(x, block_size, top, lambda s: _nearest(s, levels))


@blockwise.misconception(
    "You drop what does not fill a block. The last block may be shorter; it is quantized like any "
    "other."
)
def last_short_block_dropped(x, levels, block_size):
    codes, absmax = quantize_blockwise(x, levels, block_size)
    whole = x.numel() // block_size
    if whole * block_size == x.numel():
        return codes, absmax
    return codes.flatten()[: whole * block_size], absmax[:whole]


@blockwise.misconception(
    "Your codes count from the highest level down. Code 0 stands for the first level, the lowest."
)
def codes_count_down(x, levels, block_size):
    codes, absmax = quantize_blockwise(x, levels, block_size)
    return (len(levels) - 1 - codes.int()).to(torch.uint8), absmax


@blockwise.misconception(
    "You take the level below each value. The nearest one may be above: the border lies in the "
    "middle between two levels."
)
def level_below(x, levels, block_size):
    return _coded(
        x,
        block_size,
        _amax,
        lambda s: (torch.bucketize(s, levels.to(s), right=True) - 1).clamp(min=0),
    )


@blockwise.misconception(
    "You round as if levels were evenly spaced from -1 to 1. They may lie anywhere: compare with "
    "the levels themselves."
)
def evenly_spaced_codes(x, levels, block_size):
    n = len(levels)
    return _coded(x, block_size, _amax, lambda s: ((s + 1) / 2 * (n - 1)).round())


@blockwise.misconception(
    "You compare the values themselves with the levels. Divide each by the absmax of its block "
    "first: the levels are fractions of it."
)
def forgets_to_divide(x, levels, block_size):
    cut = _cut(x, block_size)
    codes = _nearest(cut, levels).flatten()[: x.numel()]
    return codes.to(torch.uint8).view(x.shape), _amax(cut)


@blockwise.misconception(
    "Your blocks begin anew in each row of x. They run on over the ends of rows: block_size values "
    "after each other in memory order, read row by row."
)
def blocks_begin_anew_in_each_row(x, levels, block_size):
    _cut(x, block_size)
    if x.dim() < 2:
        return quantize_blockwise(x, levels, block_size)
    rows = x.reshape(-1, x.shape[-1])
    parts = [quantize_blockwise(row, levels, block_size) for row in rows]
    codes, absmax = zip(*parts, strict=True)
    return torch.stack(codes).view(x.shape), torch.cat(absmax)


@blockwise.misconception(
    "You divide zero by zero: in a block of zeros you compare NaN with the levels. Divide such a "
    "block by anything else."
)
def divides_zero_by_zero(x, levels, block_size):
    return _coded(x, block_size, _amax, lambda s: _nearest(s, levels), safe=False)


@blockwise.accepts("distances to all levels, the smallest of them")
def argmin_of_distances(x, levels, block_size):
    cut = _cut(x, block_size)
    absmax = cut.abs().max(dim=1).values
    scaled = cut / absmax.clamp(min=1e-30)[:, None]
    codes = (scaled[..., None] - levels.to(scaled)).abs().argmin(dim=-1)
    return codes.flatten()[: x.numel()].reshape(x.shape).to(torch.uint8), absmax


@blockwise.accepts("block by block in a loop, in float64; of equally near levels the upper")
def loops_over_blocks(x, levels, block_size):
    quantize_blockwise(x, levels, block_size)
    codes, absmax = [], []
    for block in x.double().flatten().split(block_size):
        c = block.abs().max().item()
        absmax.append(c)
        for value in block.tolist():
            far = [(abs(q - (value / c if c else 0.0)), -j) for j, q in enumerate(levels.tolist())]
            codes.append(-min(far)[1])
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.tensor(codes, dtype=torch.uint8).reshape(x.shape), torch.tensor(absmax, dtype=kind)


@blockwise.accepts("levels times absmax instead of values divided by it, NumPy searchsorted")
def numpy_scaled_levels(x, levels, block_size):
    quantize_blockwise(x, levels, block_size)
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    values, q = x.double().numpy().reshape(-1), levels.double().numpy()
    parts = [values[i : i + block_size] for i in range(0, len(values), block_size)]
    absmax = [np.abs(part).max() for part in parts]
    codes = [
        np.searchsorted((q[1:] + q[:-1]) / 2 * c, part) if c else np.abs(q).argmin() + 0 * part
        for part, c in zip(parts, absmax, strict=True)
    ]
    return np.concatenate(codes).astype(np.uint8).reshape(x.shape), np.array(absmax, dtype=kind)


# --- 6. double_quantize --------------------------------------------------------------------------

double = Exercise(
    double_quantize,
    paper="Dettmers et al. 2023 (arXiv 2305.14314), section 3",
    difficulty=2,
    minutes=10,
    equivalent={
        "…- mean, dynamic_levels().to(absmax), block_size)  ->  …- mean, dynamic_levels(), "
        "block_size)": WIDER,
    },
)


@st.composite
def scales(draw: st.DrawFn, low: int = 2, high: int = 40) -> Tensor:
    """Block scales, positive and not all alike."""
    rng = generator(draw(st.integers(0, 2**16 - 1)))
    x = np.abs(rng.standard_normal(draw(st.integers(low, high)))) + 0.2
    x[0] += 1.5
    return torch.from_numpy((x * draw(st.sampled_from((1.0, 0.01, 30.0)))).round(4)).float()


def spread(absmax: Tensor, mean: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """c minus the candidate's mean (or the right one, if it has many); its largest magnitudes."""
    got, c = as_double(mean).flatten(), as_double(absmax)
    centred = c - (got if len(got) == 1 else c.mean())
    return centred, largest(centred, size)


SIZES = st.integers(2, 16)


@double.check(
    points=2,
    hint="How many means are there, and of which numbers?",
    absmax=scales(),
    size=SIZES,
)
def the_mean_is_that_of_all(candidate, absmax, size):
    """The third result is one number: the mean of all block scales."""
    _, _, mean = candidate(absmax, size)
    expect_close(mean, as_double(absmax).mean(), "the mean", rtol=1e-4, reveal=True)


@double.check(
    points=2,
    hint="The numbers that are quantized lie on both sides of zero. What is the largest magnitude "
    "of each block of them?",
    absmax=scales(),
    size=SIZES,
)
def each_scale_is_the_largest_distance_from_the_mean(candidate, absmax, size):
    """Each block of block_size scales c has the largest |c - mean| of them (with your mean)."""
    _, scale, mean = candidate(absmax, size)
    _, right = spread(absmax, mean, size)
    tolerance = 1e-5 * float(absmax.max())
    expect_close(scale, right, "the scale", atol=tolerance, rtol=1e-4, reveal=True)


@double.check(
    points=3,
    hint="Undo it: the level of a code, times the scale of its block, plus the mean. Would another "
    "of the 256 levels come nearer to c? Look at the docstring for which levels they are.",
    absmax=scales(),
    size=SIZES,
)
def codes_are_those_of_the_nearest_dynamic_level(candidate, absmax, size):
    """Each code is that of the dynamic level nearest to c - mean, in units of its scale (with your
    mean and scale)."""
    codes, scale, mean = candidate(absmax, size)
    expect_shape(codes, absmax.shape, "codes")
    centred, right = spread(absmax, mean, size)
    code, levels = as_double(codes), as_double(dynamic_levels())
    expect((code >= 0) & (code < 256) & (code == code.round()), "a code is no index", got=codes)
    unit = own(scale, right).repeat_interleave(size)[: len(centred), None]
    gap = (unit * levels - centred[:, None]).abs()
    mine, best = gap.gather(1, code.long()[:, None])[:, 0], gap.amin(dim=1)
    wrong = int((mine > best + 2e-6 * float(absmax.max())).sum())
    expect(wrong == 0, f"{wrong} of {len(code)} codes are not those of the nearest level", codes)


@double.check(
    points=2,
    hint="Which block size does the signature name? And what does the docstring say of types?",
    examples=15,
    absmax=scales(250, 600),
)
def there_is_a_scale_for_each_256(candidate, absmax):
    """If nothing is said of block_size, 256 scales share one; codes are uint8."""
    codes, scale, _ = candidate(absmax)
    expect_shape(codes, absmax.shape, "codes")
    expect_shape(scale, (math.ceil(len(absmax) / 256),), "the scale")
    expect(codes.dtype == torch.uint8, f"codes are {codes.dtype}, expected torch.uint8")


@double.check(
    points=1,
    hint="Look at the docstring under Raises, and at what the mean of nothing is.",
    bad=[
        (TypeError, torch.ones(4, dtype=torch.int32), 2),
        (ValueError, torch.ones(0), 2),
        (ValueError, torch.tensor([1.0, math.nan]), 2),
        (ValueError, torch.tensor([math.inf, 1.0]), 2),
        (ValueError, torch.ones(4), 0),
    ],
)
def what_is_no_row_of_scales_is_refused(candidate, bad):
    """Whole numbers raise TypeError; no numbers at all, NaN, infinity and a block_size below 1
    raise ValueError."""
    kind, *args = bad
    expect_error(candidate, kind, *args)


@double.misconception(
    "You quantize the scales with their mean in them. They are all positive: half of the levels "
    "would never be used. Subtract the mean first."
)
def forgets_to_subtract(absmax, block_size=256):
    double_quantize(absmax, block_size)
    return *quantize_blockwise(absmax, dynamic_levels(), block_size), absmax.mean()


@double.misconception(
    "You store a mean for each block. One mean of all scales will do: every number that is stored "
    "costs bits."
)
def a_mean_for_each_block(absmax, block_size=256):
    double_quantize(absmax, block_size)
    parts = absmax.split(block_size)
    means = torch.stack([part.mean() for part in parts])
    centred = torch.cat([part - mean for part, mean in zip(parts, means, strict=True)])
    return *quantize_blockwise(centred, dynamic_levels(), block_size), means


@double.misconception(
    "Your 8-bit levels are evenly spaced, as in int8. Here they are the dynamic ones, fine near "
    "zero, where most of the distances from the mean are."
)
def evenly_spaced_levels(absmax, block_size=256):
    mean = double_quantize(absmax, block_size)[2]
    levels = torch.linspace(-1, 1, 256).to(absmax)
    return *quantize_blockwise(absmax - mean, levels, block_size), mean


@double.misconception(
    "You quantize the scales to the 16 levels of NF4. There are few scales and much depends on "
    "them: they get 8 bits, and the dynamic levels."
)
def levels_of_nf4(absmax, block_size=256):
    mean = double_quantize(absmax, block_size)[2]
    return *quantize_blockwise(absmax - mean, nf4_levels(), block_size), mean


@double.misconception(
    "You keep one scale for all. Each block_size of the distances from the mean have their own."
)
def one_scale_for_everything(absmax, block_size=256):
    double_quantize(absmax, block_size)
    return double_quantize(absmax, len(absmax))


@double.misconception(
    "Your blocks are of 64 unless told otherwise. That is the block size of weights; scales share "
    "theirs with 256."
)
def blocks_of_64(absmax, block_size=64):
    return double_quantize(absmax, block_size)


@double.misconception(
    "You subtract the median. What is stored is the mean of all scales: with another number the "
    "bits differ from those of the paper's code."
)
def median_for_mean(absmax, block_size=256):
    double_quantize(absmax, block_size)
    middle = absmax.median()
    return *quantize_blockwise(absmax - middle, dynamic_levels(), block_size), middle


@double.accepts("sum over count, distances to all levels")
def distances_to_all_levels(absmax, block_size=256):
    double_quantize(absmax, block_size)
    mean = absmax.sum() / absmax.numel()
    codes, scale = [], []
    for part in (absmax - mean).split(block_size):
        scale.append(part.abs().max())
        far = part[:, None] / scale[-1].clamp(min=1e-30) - dynamic_levels().to(part)
        codes.append(far.abs().argmin(dim=1))
    return torch.cat(codes).to(torch.uint8), torch.stack(scale), mean


@double.accepts("NumPy in float64")
def numpy_float64(absmax, block_size=256):
    double_quantize(absmax, block_size)
    c, levels = absmax.double().numpy(), dynamic_levels().double().numpy()
    centred, codes, scale = c - c.mean(), np.zeros(len(c), dtype=np.uint8), []
    for i in range(0, len(c), block_size):
        part = centred[i : i + block_size]
        scale.append(np.abs(part).max())
        codes[i : i + block_size] = np.searchsorted(
            (levels[1:] + levels[:-1]) / 2, part / (scale[-1] or 1.0)
        )
    return codes, np.array(scale), c.mean()


# --- 7. sparse_peft_delta ------------------------------------------------------------------------

sparse = Exercise(
    sparse_peft_delta,
    paper="Munoz et al. 2024 (arXiv 2410.03750), section 2.3",
    difficulty=1,
    minutes=5,
)


@st.composite
def pruned(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Factors whose product is nowhere zero, and a mask of some of its places, in any layout."""
    r, into, out = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(2, 5))
    rng = generator(draw(st.integers(0, 2**16 - 1)))
    A, B = (rng.standard_normal(shape).round(2) for shape in ((r, into), (out, r)))
    A[np.abs(A) < 0.1] = 0.5
    B[np.abs(B) < 0.1] = 0.5
    B[:, 0] += 3 * np.sign(B[:, 0])
    mask = rng.random((out, into)) < draw(st.sampled_from((0.5, 0.25, 0.75)))
    mask.flat[rng.permutation(mask.size)[:2]] = [True, False]
    return (
        torch.from_numpy(A).float(),
        torch.from_numpy(B).float(),
        arrange(torch.from_numpy(mask), draw(st.sampled_from(LAYOUTS))),
    )


@sparse.check(
    points=3,
    hint="A place of B A depends on a whole row of B and a whole column of A. Can zeros in A or B "
    "make one place zero and leave its neighbours?",
    layer=pruned(),
    alpha=ALPHAS,
)
def where_nothing_is_kept_nothing_changes(candidate, layer, alpha):
    """Where the mask is False, the change is exactly 0."""
    A, B, mask = layer
    got = as_double(candidate(A, B, mask, alpha))
    expect_shape(got, mask.shape, "the change")
    expect_equal(got[~mask], torch.zeros(int((~mask).sum())), "the change where the mask is False")


@sparse.check(
    points=3,
    hint="Which change do the places get that are kept? Does it depend on how many of them there "
    "are?",
    layer=pruned(),
)
def what_is_kept_changes_as_in_lora(candidate, layer):
    """With alpha = r, the change is that of B A wherever the mask is True."""
    A, B, mask = layer
    got, want = as_double(candidate(A, B, mask, float(len(A)))), product(A, B)
    expect_shape(got, mask.shape, "the change")
    expect_close(got[mask], want[mask], "the change where the mask is True", atol=rounding(A, B))


@sparse.check(
    points=2,
    hint="Compare with LoRA's own change for a mask that keeps everything, and try another rank.",
    AB=factors(),
    alpha=ALPHAS,
)
def with_everything_kept_it_is_lora(candidate, AB, alpha):
    """With a mask that is True everywhere the change is LoRA's, with the scale alpha / r."""
    A, B = AB
    mask = torch.ones(B.shape[0], A.shape[1], dtype=torch.bool)
    got = candidate(A, B, mask, alpha)
    expect_close(got, change(A, B, alpha), "the change", atol=rounding(A, B, alpha))


@sparse.check(
    points=1,
    hint="Look at the docstring under Raises. Some masks of other shapes PyTorch would take.",
    bad=[
        (TypeError, torch.ones(1, 3), torch.ones(2, 1), torch.ones(2, 3)),
        (TypeError, torch.ones(1, 3), torch.ones(2, 1), torch.ones(2, 3, dtype=torch.int64)),
        (ValueError, torch.ones(1, 3), torch.ones(2, 1), torch.ones(1, 3) > 0),
        (ValueError, torch.ones(1, 3), torch.ones(2, 1), torch.ones(2, 1) > 0),
        (ValueError, torch.ones(1, 3), torch.ones(2, 1), torch.ones(3) > 0),
        (ValueError, torch.ones(1, 3), torch.ones(2, 1), torch.ones(3, 2) > 0),
        (ValueError, torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3) > 0),
    ],
)
def masks_that_do_not_fit_are_refused(candidate, bad):
    """A mask that is not boolean raises TypeError; shapes that do not fit raise ValueError."""
    kind, *args = bad
    expect_error(candidate, kind, *args, 2.0)


@sparse.misconception(
    "You do not mask the change. B A has no zeros: merged, it would make the pruned weight dense "
    "again, and all that pruning saved is lost."
)
def no_mask(A, B, mask, alpha):
    sparse_peft_delta(A, B, mask, alpha)
    return lora_delta(A, B, alpha)


@sparse.misconception(
    "You mask A, by whole columns: a column of the mask that keeps anything keeps all. A cannot "
    "say which single places are zero; mask the product."
)
def masks_a(A, B, mask, alpha):
    sparse_peft_delta(A, B, mask, alpha)
    return lora_delta(A * mask.any(dim=0), B, alpha)


@sparse.misconception(
    "You mask B, by whole rows: a row of the mask that keeps anything keeps all. B cannot say "
    "which single places are zero; mask the product."
)
def masks_b(A, B, mask, alpha):
    sparse_peft_delta(A, B, mask, alpha)
    return lora_delta(A, B * mask.any(dim=1)[:, None], alpha)


@sparse.misconception(
    "Your mask is the wrong way round: True is where a weight is kept, and where it may change."
)
def mask_inverted(A, B, mask, alpha):
    sparse_peft_delta(A, B, mask, alpha)
    return lora_delta(A, B, alpha) * ~mask


@sparse.misconception(
    "You make the change larger where fewer places are kept, as dropout does. Nothing is to be "
    "made up for here: a place that is kept has LoRA's own change."
)
def makes_up_for_the_zeros(A, B, mask, alpha):
    return sparse_peft_delta(A, B, mask, alpha) / mask.double().mean().clamp(min=1e-9)


@sparse.misconception(
    "You keep only where the change is positive too. The mask alone decides, and it is True "
    "wherever the weight is not zero, negative weights included."
)
def keeps_only_what_is_positive(A, B, mask, alpha):
    return sparse_peft_delta(A, B, mask, alpha).clamp(min=0)


@sparse.misconception("Your scale is alpha alone. As in LoRA, it is alpha / r.")
def sparse_scale_is_alpha(A, B, mask, alpha):
    return sparse_peft_delta(A, B, mask, alpha) * len(A)


@sparse.misconception("You leave the scale out: the change is s (B A) * M with s = alpha / r.")
def sparse_without_scale(A, B, mask, alpha):
    sparse_peft_delta(A, B, mask, alpha)
    return (B @ A) * mask


@sparse.accepts("where")
def with_where(A, B, mask, alpha):
    sparse_peft_delta(A, B, mask, alpha)
    return torch.where(mask, alpha / A.shape[0] * (B @ A), 0.0)


@sparse.accepts("only the products that are kept, written into zeros")
def only_what_is_kept(A, B, mask, alpha):
    sparse_peft_delta(A, B, mask, alpha)
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for o, i in mask.nonzero().tolist():
        result[o, i] = alpha * torch.dot(B[o].double(), A[:, i].double()) / len(A)
    return result


@sparse.accepts("masked_fill")
def with_masked_fill(A, B, mask, alpha):
    sparse_peft_delta(A, B, mask, alpha)
    return ((alpha * B) @ A / B.shape[1]).masked_fill(~mask, 0.0)


# --- 8. training_memory --------------------------------------------------------------------------

memory = Exercise(
    training_memory,
    paper="Dettmers et al. 2023 (arXiv 2305.14314), section 1 and figure 6",
    difficulty=1,
    minutes=10,
)

COUNTS = st.integers(0, 10**6) | st.sampled_from((65 * 10**9, 1000))
SOME = st.integers(1, 10**6) | st.sampled_from((7 * 10**9, 1000))
BITS = st.sampled_from((16, 8, 32, 64))
FROZEN_BITS = st.sampled_from((4.127, 4, 16, 32))


def expect_bytes(got: float, want: float, what: str) -> None:
    """Fail unless a number of bytes is right, however it is rounded to whole ones."""
    expect_close(got, want, what, rtol=1e-9, atol=1.0, reveal=True)


@memory.check(
    points=2,
    hint="Count what lies in memory for a model of two weights, one trained and one frozen. In "
    "which unit is your result?",
    trained=COUNTS,
    frozen=SOME,
    trained_bits=BITS,
    frozen_bits=FROZEN_BITS,
)
def all_weights_are_stored(candidate, trained, frozen, trained_bits, frozen_bits):
    """The weights take trained_bits for each trained one and frozen_bits for each frozen one, in
    bytes."""
    got = candidate(trained, frozen, trained_bits, frozen_bits)
    want = (trained * trained_bits + frozen * frozen_bits) / 8
    expect_bytes(got.weights, want, "the bytes of the weights")


@memory.check(
    points=2,
    hint="For which weights does the backward pass keep a gradient, and in which type?",
    trained=SOME,
    frozen=SOME,
    trained_bits=BITS,
    frozen_bits=FROZEN_BITS,
)
def only_trained_weights_have_a_gradient(candidate, trained, frozen, trained_bits, frozen_bits):
    """There is one gradient for each trained weight, of the weight's own bits, and none for frozen
    ones."""
    got = candidate(trained, frozen, trained_bits, frozen_bits)
    expect_bytes(got.gradients, trained * trained_bits / 8, "the bytes of the gradients")


@memory.check(
    points=3,
    hint="What does the optimizer remember of one weight, how many numbers is that, and of how "
    "many bits each?",
    trained=SOME,
    frozen=SOME,
    trained_bits=BITS,
    states=st.sampled_from((2, 1, 0, 3)),
    state_bits=st.sampled_from((32, 8, 16)),
)
def each_trained_weight_has_its_states(
    candidate, trained, frozen, trained_bits, states, state_bits
):
    """The optimizer keeps `states` numbers of state_bits each for a trained weight, none for a
    frozen one."""
    got = candidate(trained, frozen, trained_bits, states=states, state_bits=state_bits)
    expect_bytes(got.optimizer, trained * states * state_bits / 8, "the bytes of the optimizer")


@memory.check(
    points=1,
    hint="Which numbers does the signature give to arguments that nobody names?",
    examples=20,
    trained=SOME,
    frozen=st.sampled_from((None, 1000, 1)),
)
def the_defaults_are_adam_in_float32(candidate, trained, frozen):
    """If nothing is said, nothing is frozen, all is in 32 bits, and the optimizer is Adam with two
    states."""
    got = candidate(trained, **given(frozen=frozen))
    expect_bytes(got.weights, 4 * trained + 4 * (frozen or 0), "the bytes of the weights")
    expect_bytes(got.gradients, 4 * trained, "the bytes of the gradients")
    expect_bytes(got.optimizer, trained * 8, "the bytes of the optimizer")


@memory.check(
    points=1,
    hint="Can there be a third of a byte?",
    trained=COUNTS,
    frozen=SOME,
    trained_bits=st.sampled_from((1, 4, 5, 16)),
    state_bits=st.sampled_from((1, 3, 8)),
)
def bytes_are_whole_numbers(candidate, trained, frozen, trained_bits, state_bits):
    """Each of the three numbers is a whole one."""
    got = candidate(trained, frozen, trained_bits, 4.127, 1, state_bits)
    for name, number in zip(("weights", "gradients", "optimizer"), got, strict=True):
        expect(float(number).is_integer(), f"{name} is {number}, which is no whole number")


def _bytes(weight_bits, gradient_bits, state_bits, divide=8):
    """The three, from their bits."""
    return TrainingMemory(*(round(b / divide) for b in (weight_bits, gradient_bits, state_bits)))


@memory.misconception(
    "You count a gradient for the frozen weights too. They do not learn: no gradient of theirs is "
    "computed or kept, which is most of what is saved."
)
def gradients_of_frozen_weights(
    trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32
):
    weights = trained * trained_bits + frozen * frozen_bits
    return _bytes(weights, weights, trained * states * state_bits)


@memory.misconception(
    "You count optimizer states for the frozen weights too. An optimizer is given only what is "
    "trained."
)
def states_of_frozen_weights(
    trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32
):
    weights = trained * trained_bits + frozen * frozen_bits
    return _bytes(weights, trained * trained_bits, (trained + frozen) * states * state_bits)


@memory.misconception(
    "Your optimizer states are of the weights' type. They have bits of their own: often 32 for "
    "weights of 16, or 8."
)
def states_of_the_weights_type(
    trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32
):
    weights = trained * trained_bits + frozen * frozen_bits
    return _bytes(weights, trained * trained_bits, trained * states * trained_bits)


@memory.misconception("You count bits. A byte has eight of them.")
def bits_for_bytes(trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32):
    weights = trained * trained_bits + frozen * frozen_bits
    return _bytes(weights, trained * trained_bits, trained * states * state_bits, divide=1)


@memory.misconception(
    "You count one optimizer state a weight. Adam keeps two, the mean of the gradient and that of "
    "its square; how many it is, is an argument."
)
def states_counted_once(
    trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32
):
    weights = trained * trained_bits + frozen * frozen_bits
    return _bytes(weights, trained * trained_bits, trained * min(states, 1) * state_bits)


@memory.misconception(
    "You leave the frozen weights out. They are not trained, but the model cannot do without them: "
    "in QLoRA they are most of what is left."
)
def frozen_weights_left_out(
    trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32
):
    return _bytes(trained * trained_bits, trained * trained_bits, trained * states * state_bits)


@memory.misconception(
    "You store the frozen weights with the bits of the trained ones. They have their own: 4 in "
    "QLoRA, where the trained ones have 16 or 32."
)
def frozen_weights_of_the_trained_type(
    trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32
):
    weights = (trained + frozen) * trained_bits
    return _bytes(weights, trained * trained_bits, trained * states * state_bits)


@memory.misconception(
    "Your gradients are of 32 bits always. A gradient is of the type of its weight."
)
def gradients_of_32_bits(
    trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32
):
    weights = trained * trained_bits + frozen * frozen_bits
    return _bytes(weights, trained * 32, trained * states * state_bits)


@memory.accepts("a plain tuple, rounded down by whole divisions")
def plain_tuple(trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32):
    weights = trained * trained_bits + frozen * frozen_bits
    return weights // 8, trained * trained_bits // 8, trained * states * state_bits // 8


@memory.accepts("rounded up, bytes of one weight first")
def bytes_of_one_weight(
    trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32
):
    return TrainingMemory(
        weights=math.ceil(trained_bits / 8 * trained + frozen_bits / 8 * frozen),
        gradients=math.ceil(trained_bits / 8 * trained),
        optimizer=math.ceil(state_bits / 8 * states * trained),
    )


@memory.accepts("NumPy, rounded at the end")
def numpy_rint(trained, frozen=0, trained_bits=32, frozen_bits=32, states=2, state_bits=32):
    bits = [[trained, frozen], [trained, 0], [trained * states, 0]]
    sizes = [[trained_bits, frozen_bits], [trained_bits, 0], [state_bits, 0]]
    return tuple(np.rint((np.array(bits, float) * np.array(sizes, float)).sum(1) / 8))
