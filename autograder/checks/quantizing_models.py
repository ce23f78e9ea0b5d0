"""The exercises of lab 2, quantizing a whole model: checks, misconceptions, correct variants.

The habits are those of lab 1 (`autograder.checks.quantization`): codes are judged against the
candidate's *own* scales, and where a later code depends on the earlier ones (`gptq_block`) against
its own earlier codes; a tie may go either way, and one check of an exercise is strict about
rounding. Where an exercise is about directions (`fwht`), only the check of the length looks at the
length.

A misconception is the right method with one thing wrong in it; what those of an exercise have in
common is in a helper in front of them. That a function changes its arguments in place is not among
them: arguments cross a process, so no check can see it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from autograder.checks.quantization import FLOATS, HALF, INF, NAN, ONE
from autograder.compare import (
    Mismatch,
    as_double,
    expect,
    expect_close,
    expect_equal,
    expect_error,
    expect_integers,
    expect_shape,
)
from autograder.exercise import Exercise
from autograder.strategies import given, integer_tensors, nonzero, shapes, tensors
from fewer.quantization import (
    dequantize,
    dequantize_per_group,
    fold_scales,
    fwht,
    gptq_block,
    hadamard_factor,
    hadamard_matrix,
    matmul_int8,
    matmul_llm_int8,
    outlier_features,
    pack_codes,
    paley_matrix,
    quantize_per_group,
    quantize_symmetric,
    quantize_to_grid,
    require_bits,
    require_finite,
    require_floating,
    require_int,
    require_matrix,
    require_same_shape,
    round_to_nearest,
    smoothing_scales,
    unpack_codes,
)

BITS = st.sampled_from((4, 3, 8, 2, 5, 6, 7))


def ends(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest code."""
    largest = 2 ** (bits - int(symmetric)) - 1
    return (-largest if symmetric else 0), largest


def expect_near(
    steps: float, codes: Tensor, exact: Tensor, what: str = "the code", slack: float = 0.0
) -> None:
    """Fail unless every code is within ``steps`` of the value on its grid, before rounding.

    Args:
        slack: by what share of it the scale may have been another when the code was computed.
    """
    expect_shape(codes, exact.shape, what)
    off = (as_double(codes) - exact).abs().nan_to_num(math.inf) - slack * exact.abs()
    if bool((off > steps).any()):
        worst = int(off.argmax())
        place = [int(i) for i in np.unravel_index(worst, tuple(exact.shape))]
        raise Mismatch(
            f"{what} at {place} is {float(codes.flatten()[worst]):.6g}, where its value lies at "
            f"{float(exact.flatten()[worst]):.6g} on the grid"
        )


# --- 1. round_to_nearest -------------------------------------------------------------------------

nearest = Exercise(
    round_to_nearest,
    paper="Nagel et al. 2021 (arXiv 2106.08295), section 2",
    difficulty=2,
    minutes=15,
)

# All kinds but the tiny ones: their scales are subnormal in float16, where rounding is coarse.
ROOMY = ("whole", "normal", "positive", "negative", "ties", "sparse", "outlier", "large", "zeros")


ROUNDED = 2**-10  # the codes may come from the scale before it was rounded to float16, or after


@st.composite
def layers(
    draw: st.DrawFn,
    symmetric: bool = True,
    dtypes: Any = (torch.float32,),
    wide: bool = False,
    sizes: Any = (2, None, 3, 1, 4, 5),
) -> tuple[Tensor, int, int, dict[str, Any]]:
    """W, bits, weights a group, and the options that say so unless they are the defaults.

    Args:
        wide: rows without a group_size have more weights than a group has unless lab 1 is told.
    """
    size = draw(st.sampled_from(sizes))
    columns = draw(st.integers(1, 9)) + (64 if wide and size is None else size or 0)
    w = draw(tensors((draw(st.integers(1, 4)), columns), kinds=ROOMY, dtypes=dtypes))
    w = ((w.double() * 100).round() / 100).to(w.dtype)  # no scale is subnormal in float16
    bits = draw(st.sampled_from((4, 3, 2, 5, 6, 7, 8, None)))
    options = given(bits=bits, group_size=size, symmetric=None if symmetric else False)
    return w, bits or 4, size or columns, options


def by_weight(parameter: Any, size: int, w: Tensor, what: str) -> Tensor:
    """One value for each weight, from one for each group (or for the row: judged elsewhere)."""
    parameter = as_double(parameter)
    rows, columns = w.shape
    if parameter.shape == (rows, 1):
        return parameter.expand(rows, columns)
    expect_shape(parameter, (rows, -(-columns // size)), what)
    return parameter.repeat_interleave(size, dim=1)[:, :columns]


def expect_bytes(packed: Tensor, shape: tuple[int, int], bits: int, what: str) -> None:
    """Fail unless these are as many bytes as rows of so many codes take."""
    expect(packed.dtype == torch.uint8, f"the {what} are {packed.dtype}, expected torch.uint8")
    rows, count = shape
    expect_shape(packed, (rows, -(-count * bits // 8)), f"what is stored of the {what}")


@nearest.check(
    points=2,
    hint="Which weights share a scale when a group size is given, and which when none is?",
    drawn=layers() | layers(wide=True),
)
def each_group_stores_the_scale_of_its_own_weights(candidate, drawn):
    """The stored scales are [out, groups]: the largest magnitude of each group over 2^(bits-1) - 1,
    in half precision. Without group_size a row is one group."""
    w, bits, size, options = drawn
    _, stored = candidate(w, **options)
    absmax = torch.stack([group.abs().amax(1) for group in w.double().split(size, dim=1)], 1)
    want = torch.where(absmax == 0, 1.0, absmax / ends(bits, symmetric=True)[1])
    expect_close(stored[1], want, "the stored scale", rtol=2**-10, atol=6e-8, reveal=True)


@nearest.check(
    points=2,
    hint="Which numbers will be there when the weight is read back from disk?",
    drawn=layers(),
)
def the_weight_is_restored_with_the_scale_that_is_stored(candidate, drawn):
    """Every weight of w_hat is a whole number times the scale that is stored, to float32
    precision, and not times the scale before it was rounded."""
    w, _, size, options = drawn
    w_hat, stored = candidate(w, **options)
    expect_shape(w_hat, w.shape, "w_hat")
    steps = as_double(w_hat) / by_weight(stored[1], size, w, "the stored scale")
    off = (steps - steps.round()).abs().nan_to_num(math.inf) - 1e-6 * steps.abs()
    if bool((off > 2e-5).any()):
        worst = int(off.argmax())
        raise Mismatch(
            f"the weight {float(w_hat.flatten()[worst]):.9g} is {float(steps.flatten()[worst]):.7g}"
            " times the stored scale of its group",
        )


@nearest.check(
    points=1,
    hint="Divide one of the weights by the scale of its group. Which whole number is nearest?",
    drawn=layers(),
)
def every_weight_goes_to_the_nearest_code(candidate, drawn):
    """Every weight comes back as the nearest multiple of its scale."""
    w, _, size, options = drawn
    w_hat, stored = candidate(w, **options)
    expect_shape(w_hat, w.shape, "w_hat")
    own = by_weight(stored[1], size, w, "the stored scale")
    # Whether w_hat / scale is a whole number is for the check before.
    expect_near(HALF, (as_double(w_hat) / own).round(), w.double() / own, "w_hat / scale", ROUNDED)


@nearest.check(
    points=2,
    hint="Count the bytes of the tensors you store: how many should a row of codes take, and how "
    "many a scale?",
    data=st.tuples(st.just(True), layers(True, (*FLOATS, torch.float16), wide=True))
    | st.tuples(st.just(False), layers(False, FLOATS, sizes=(1, 2))),
)
def what_is_stored_takes_its_real_bytes(candidate, data):
    """The codes are stored as pack_codes packs them, uint8 [out, ceil(in bits / 8)], the scales as
    float16; w_hat is float64 for a float64 w."""
    symmetric, (w, bits, size, options) = data
    w_hat, stored = candidate(w, **options)
    codes, scale = stored[:2]
    expect_bytes(codes, (len(w), w.shape[1]), bits, "codes")
    expect(scale.dtype == torch.float16, f"the scales are {scale.dtype}, expected torch.float16")
    expect_shape(w_hat, w.shape, "w_hat")
    if w.dtype == torch.float64:
        expect(w_hat.dtype == w.dtype, f"w_hat is {w_hat.dtype} for a float64 w")
    if symmetric and scale.shape == (len(w), -(-w.shape[1] // size)):
        own = (as_double(w_hat) / by_weight(scale, size, w, "the stored scale")).round()
        unpacked = unpack_codes(codes.contiguous(), bits, w.shape[1], signed=True)
        expect_equal(unpacked, own, "a code, unpacked, against w_hat / scale,")


@nearest.check(
    points=2,
    hint="With symmetric=False, what else is needed to come back from the codes, and how many bits "
    "does it take?",
    drawn=layers(symmetric=False),
)
def asymmetric_codes_come_back_through_their_zero_points(candidate, drawn):
    """With symmetric=False the zero-points are stored as well, packed as the codes are, and
    scale * (code - zero_point) is w_hat, within half a scale of the weight."""
    w, bits, size, options = drawn
    w_hat, stored = candidate(w, **options)
    rows, columns = w.shape
    groups = -(-columns // size)
    own = by_weight(stored[1], size, w, "the stored scale")
    expect_bytes(stored[2], (rows, groups), bits, "zero-points")
    zeros = unpack_codes(stored[2].contiguous(), bits, groups, signed=False)
    zeros = by_weight(zeros, size, w, "the zero-point")
    lows = torch.stack([group.amin(1).clamp(max=0) for group in w.double().split(size, 1)], 1)
    top = ends(bits, symmetric=False)[1]
    exact = (-by_weight(lows, size, w, "the least weight") / own).clamp(0, top)
    expect_near(HALF, zeros, exact, "the zero-point of the weight", ROUNDED)
    steps = (as_double(w_hat) / own).round()
    # With both ends of a range rounded outwards, the last code can be one step short of it.
    exact = (w.double() / own).clamp(-zeros, top - zeros)
    expect_near(HALF, steps, exact, "w_hat / scale", ROUNDED)
    if stored[0].dtype == torch.uint8 and stored[0].shape[1] == -(-columns * bits // 8):
        codes = unpack_codes(stored[0].contiguous(), bits, columns, signed=False)
        expect_equal(codes - zeros, steps, "code - zero_point, against w_hat / scale,")


@nearest.check(
    points=1,
    hint="Look at the docstring under Raises. What are the largest and the smallest number that "
    "half precision can hold?",
    bad=[
        (torch.tensor([[1.0], [1e7]]), {}),
        (torch.tensor([[1e-9], [1.0]]), {}),
        (torch.tensor([[-1e-9], [1.0]]), {"symmetric": False}),
        (torch.tensor([[1.0, -1e8]]), {"symmetric": False}),
        (torch.ones(4), {}),
        (torch.ones(2, 4), {"group_size": 0}),
        (torch.ones(2, 4), {"bits": 1}),
        (torch.ones(2, 4), {"bits": 9}),
        (NAN.reshape(1, 2), {}),
        (INF.reshape(2, 1), {}),
    ],
)
def what_cannot_be_stored_is_refused(candidate, bad):
    """A scale that half precision would make infinite or zero, anything but a finite matrix, a
    group_size below 1 and bits outside 2 to 8 raise ValueError."""
    w, options = bad
    expect_error(candidate, ValueError, w, **options)


def _rounded(
    w,
    bits,
    group_size,
    symmetric,
    row=None,
    restore=None,
    keep=None,
    pack=pack_codes,
    pack_zero=None,
):
    """round_to_nearest, open where people go wrong.

    Args:
        row: the group size that stands for the whole row.
        restore: what w_hat is restored with: (scale, zero_point) -> (scale, zero_point).
        keep: the dtype of the scales that are stored.
        pack, pack_zero: how codes and zero-points are stored; the latter as codes are by default.
    """
    w = require_matrix(w, "w")
    row = w.shape[1] if row is None else row
    group_size = row if group_size is None else group_size
    codes, scale, zero_point = quantize_per_group(w, bits, group_size, symmetric)
    half = scale.half()
    if half.isinf().any() or (half == 0).any():
        raise ValueError("a scale does not fit in float16")
    kept = half.to(w.dtype) if keep is None else scale.to(keep)
    with_scale, with_zero = (kept, zero_point) if restore is None else restore(scale, zero_point)
    w_hat = dequantize_per_group(codes, with_scale, with_zero, group_size)
    stored = [pack(codes, bits), half if keep is None else kept]
    return w_hat, stored if zero_point is None else [*stored, (pack_zero or pack)(zero_point, bits)]


@nearest.misconception(
    "You restore the weight with the scales as they were before they became float16. What is on "
    "disk is the rounded scale: compute with that one, or you measure a model nobody can load."
)
def restores_with_unrounded_scales(w, bits=4, group_size=None, symmetric=True):
    return _rounded(w, bits, group_size, symmetric, restore=lambda scale, zero: (scale, zero))


@nearest.misconception(
    "You store each code in a byte of its own. Pack them in as many bits as they have: 4-bit codes "
    "that take 8 bits save only half of what they could."
)
def stores_codes_unpacked(w, bits=4, group_size=None, symmetric=True):
    return _rounded(w, bits, group_size, symmetric, pack=lambda codes, bits: codes)


@nearest.misconception(
    "You store the scales as float32. They take twice the bytes that way; with groups of 32 that "
    "is half a bit a weight."
)
def stores_float32_scales(w, bits=4, group_size=None, symmetric=True):
    return _rounded(w, bits, group_size, symmetric, keep=torch.float32)


@nearest.misconception(
    "Your scales do not look at group_size: every row has one. With group_size=g each run of g "
    "consecutive weights has a scale of its own."
)
def one_scale_a_row_whatever_the_group(w, bits=4, group_size=None, symmetric=True):
    if group_size is not None:
        require_int(group_size, "group_size", 1)
    return _rounded(w, bits, None, symmetric)


@nearest.misconception(
    "Without a group_size you still cut the rows into groups of 64, the default of "
    "quantize_per_group. None stands for the whole row here."
)
def none_is_groups_of_64(w, bits=4, group_size=None, symmetric=True):
    return _rounded(w, bits, group_size, symmetric, row=64)


@nearest.misconception(
    "You come back from asymmetric codes without their zero-points: every weight is off by the "
    "same number of steps. Hand them on when you dequantize."
)
def restores_without_zero_points(w, bits=4, group_size=None, symmetric=True):
    return _rounded(
        w, bits, group_size, symmetric, restore=lambda scale, zero: (scale.half().to(w.dtype), None)
    )


@nearest.misconception(
    "You pack the codes and store the zero-points as they come. They have as many bits as a code: "
    "pack them, too."
)
def stores_zero_points_unpacked(w, bits=4, group_size=None, symmetric=True):
    return _rounded(w, bits, group_size, symmetric, pack_zero=lambda zero_point, bits: zero_point)


@nearest.accepts("the scales rounded before the codes are computed, group by group, in float64")
def rounds_the_scales_first(w, bits=4, group_size=None, symmetric=True):
    w, (low, high) = require_matrix(w, "w"), ends(require_bits(bits), symmetric)
    size = w.shape[1] if group_size is None else require_int(group_size, "group_size", 1)
    restored, codes, scales, zeros = [], [], [], []
    for group in w.double().split(size, dim=1):
        least, most = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True)
        span = torch.maximum(-least, most) if symmetric else most.clamp(min=0) - least
        scale = torch.where(span == 0, 1.0, span / high).half()
        if not bool(((scale > 0) & (scale <= 65504)).all()):
            raise ValueError("a scale does not fit in half precision")
        step = scale.double()
        zero = torch.zeros_like(step) if symmetric else (-least / step).round().clamp(0, high)
        code = ((group / step).round() + zero).clamp(low, high)
        restored.append((code - zero) * step)
        codes.append(code.to(torch.int16))
        scales.append(scale)
        zeros.append(zero.to(torch.int16))
    stored = [pack_codes(torch.cat(codes, 1), bits), torch.cat(scales, 1)]
    if not symmetric:
        stored.append(pack_codes(torch.cat(zeros, 1), bits))
    return torch.cat(restored, 1), stored


@nearest.accepts("Python loops, and bytes from one long integer a row")
def loops_over_rows_and_groups(w, bits=4, group_size=None, symmetric=True):
    require_matrix(w, "w")
    low, high = ends(require_bits(bits), symmetric)
    size = w.shape[1] if group_size is None else require_int(group_size, "group_size", 1)
    w_hat: list[Any] = []
    codes: list[Any] = []
    zeros: list[Any] = []
    scales = []
    for row in w.tolist():
        groups = [row[j : j + size] for j in range(0, len(row), size)]
        spans = [
            max(map(abs, group)) if symmetric else max(*group, 0) - min(*group, 0)
            for group in groups
        ]
        scales.append([span / high or 1.0 for span in spans])
        zeros.append([])
        codes.append([])
        w_hat.append([])
        for group, scale in zip(groups, scales[-1], strict=True):
            kept = float(np.float32(scale).astype(np.float16))
            if not 0 < kept < math.inf:
                raise ValueError("a scale does not fit in float16")
            zero = 0 if symmetric else min(max(round(-min(*group, 0) / scale), 0), high)
            zeros[-1].append(zero)
            for value in group:
                code = min(max(round(value / scale) + zero, low), high)
                codes[-1].append(code)
                w_hat[-1].append((code - zero) * kept)

    def packed(rows):
        streams = [sum((c % 2**bits) << (i * bits) for i, c in enumerate(row)) for row in rows]
        size = -(-len(rows[0]) * bits // 8)
        octets = [list(stream.to_bytes(size, "little")) for stream in streams]
        return torch.tensor(octets, dtype=torch.uint8)

    stored = [packed(codes), torch.tensor(scales).half()]
    return torch.tensor(w_hat, dtype=torch.float64), stored + [packed(zeros)] * (not symmetric)


# --- 2. outlier_features -------------------------------------------------------------------------

outliers = Exercise(
    outlier_features,
    paper="Dettmers et al. 2022 (arXiv 2208.07339), section 3.2",
    difficulty=1,
    minutes=5,
)

THRESHOLDS = st.sampled_from((6.0, 2.0, 0.5, 100.0, 1.0, None))  # None: nothing is said
FAR = st.sampled_from((7.0, 6.5, 20.0))


@st.composite
def activations(draw: st.DrawFn, shape: Any, positive: bool = False) -> tuple[Tensor, float | None]:
    """X, whose values lie on both sides of the threshold but never on it, and the threshold."""
    threshold = draw(THRESHOLDS)
    x = draw(tensors(shape, kinds=("whole", "normal", "sparse", "outlier", "positive", "ties")))
    x = x * (threshold or 6.0) / 4
    x = torch.where(x.abs() == (threshold or 6.0), x / 2, x)
    return (x.abs() if positive else x), threshold


def expect_features(got: Tensor, want: Tensor) -> None:
    """Fail with the first feature that is wrongly one or wrongly none."""
    expect_shape(got, want.shape, "the result")
    got = as_double(got)
    for j, (a, b) in enumerate(zip(got.tolist(), want.tolist(), strict=True)):
        expect(a == b, f"feature {j} is {a:g}, expected {b}")


@outliers.check(
    points=2,
    hint="A feature is a column of X. How many of its tokens must be large?",
    drawn=activations(shapes(2, 2), positive=True),
)
def one_large_value_makes_its_column_an_outlier(candidate, drawn):
    """Of positive values, a feature is an outlier if at least one of its tokens exceeds the
    threshold, 6 unless said otherwise; the result has one entry for each feature."""
    x, threshold = drawn
    want = (x > (threshold or 6.0)).any(0)
    expect_features(candidate(x, **given(threshold=threshold)), want)


@outliers.check(
    points=2,
    hint="How far from zero is -100?",
    drawn=activations(shapes(2, 2)),
)
def the_sign_does_not_matter(candidate, drawn):
    """X and |X| have the same outlier features."""
    x, threshold = drawn
    options = given(threshold=threshold)
    got, plain = candidate(x, **options), candidate(x.abs(), **options)
    expect_features(got, as_double(plain).bool())


@outliers.check(
    points=1,
    hint="Read the definition again: is a value equal to the threshold beyond it?",
    threshold=THRESHOLDS | st.just(0.0),
    below=st.integers(0, 3),
    above=st.integers(0, 3),
)
def the_threshold_itself_is_an_outlier(candidate, threshold, below, above):
    """A feature whose largest value equals the threshold is an outlier, also for a threshold of 0,
    and one a little below it is not."""
    edge = 6.0 if threshold is None else threshold
    row = torch.tensor([edge * 0.9] * below + [edge] + [edge * 4] * above)
    got = candidate(row.reshape(1, -1), **given(threshold=threshold))
    expect_features(got, row >= edge)


@outliers.check(
    points=2,
    hint="A batch of sequences is [batch, n, in], a single token is [in]. How many features are "
    "there?",
    drawn=activations(shapes(3, 4, max_side=4) | shapes(1, 1), positive=True),
)
def all_leading_dimensions_are_tokens(candidate, drawn):
    """Whatever dimensions come before the last, the result is [in], the same as for the tokens in
    one long list."""
    x, threshold = drawn
    options = given(threshold=threshold)
    plain = candidate(x.reshape(-1, x.shape[-1]), **options)
    expect_features(candidate(x, **options), as_double(plain).bool())


@outliers.check(
    points=1,
    hint="Could you write X[:, mask] and X[:, ~mask] with your result?",
    examples=20,
    x=tensors(shapes(1, 3, max_side=4), kinds=("whole",)),
    threshold=st.sampled_from((6.0, 4.0, 2.0, None)),
)
def the_result_is_a_mask(candidate, x, threshold):
    """The result is a bool tensor, so that it picks columns and its opposite picks the others."""
    mask = candidate(x, **given(threshold=threshold))
    expect(mask.dtype == torch.bool, f"the result is {mask.dtype}, expected torch.bool")


@outliers.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        (torch.ones(2, 2), -1.0),
        (torch.ones(2, 2), -math.inf),
        (torch.ones(2, 2), math.nan),
        (torch.tensor(7.0), 6.0),
        (torch.ones(0, 2), 6.0),
        (NAN, 6.0),
        (INF, 6.0),
    ],
)
def what_has_no_features_is_refused(candidate, bad):
    """A negative or NaN threshold, a 0-d or empty x, NaN and infinity raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _tokens(x, threshold):
    """x as [tokens, in], after a look at both arguments."""
    x = require_finite(x, "x")
    if x.ndim == 0 or not threshold >= 0:
        raise ValueError("x has no features, or the threshold is not 0 or more")
    return x.reshape(-1, x.shape[-1])


@outliers.misconception(
    "You compare x itself with the threshold, so features that are far below zero are missed. What "
    "counts is the magnitude."
)
def forgets_negative_outliers(x, threshold=6.0):
    return (_tokens(x, threshold) >= threshold).any(0)


@outliers.misconception(
    "You leave out the values that equal the threshold: the definition says greater or equal."
)
def strictly_above_the_threshold(x, threshold=6.0):
    return (_tokens(x, threshold).abs() > threshold).any(0)


@outliers.misconception(
    "You find the tokens (rows) with a large value. LLM.int8() sets features apart, the columns: "
    "those are what X and W have in common."
)
def finds_tokens(x, threshold=6.0):
    return (_tokens(x, threshold).abs() >= threshold).any(1)


@outliers.misconception(
    "You ask that all tokens of a feature be large. One is enough: it would already stretch its "
    "token's scale."
)
def all_tokens_must_be_large(x, threshold=6.0):
    return (_tokens(x, threshold).abs() >= threshold).all(0)


@outliers.misconception(
    "You compare the mean magnitude of a feature with the threshold. A single large value "
    "disappears in a mean; look for the largest."
)
def compares_the_mean(x, threshold=6.0):
    return _tokens(x, threshold).abs().mean(0) >= threshold


@outliers.misconception(
    "You reduce the first dimension only. With a batch, [batch, n, in], the second one counts "
    "tokens as well; and a single token, [in], has features too."
)
def reduces_the_first_dimension_only(x, threshold=6.0):
    _tokens(x, threshold)
    return (x.abs() >= threshold).any(0)


@outliers.misconception(
    "You look for values that are many standard deviations out. The threshold of the paper is a "
    "magnitude in the unit of x, and nothing is measured relative to the other values."
)
def counts_standard_deviations(x, threshold=6.0):
    x = _tokens(x, threshold)
    spread = x.std(correction=0)
    return ((x - x.mean()).abs() >= threshold * spread).any(0)


@outliers.accepts("the largest magnitude of each column, in float64 NumPy")
def largest_magnitude_in_numpy(x, threshold=6.0):
    values = _tokens(x, threshold).double().numpy()
    return np.abs(values).max(axis=0) >= threshold


@outliers.accepts("Python loops over columns")
def loops_over_columns(x, threshold=6.0):
    columns = zip(*_tokens(x, threshold).tolist(), strict=True)
    return torch.tensor([max(max(c), -min(c)) >= threshold for c in columns])


@outliers.accepts("the features that appear among the indices of large values")
def indices_of_large_values(x, threshold=6.0):
    _tokens(x, threshold)
    mask = torch.zeros(x.shape[-1], dtype=torch.bool)
    mask[(x.float().abs() >= threshold).nonzero()[:, -1]] = True
    return mask


# --- 3. matmul_llm_int8 --------------------------------------------------------------------------

mixed_matmul = Exercise(
    matmul_llm_int8,
    paper="Dettmers et al. 2022 (arXiv 2208.07339), section 3",
    difficulty=3,
    minutes=20,
    equivalent={
        "x, w = (require_finite(x, 'x'), require_matrix(w, 'w'))  ->  "
        "x, w = (x, require_matrix(w, 'w'))": (
            "outlier_features refuses the same x, and w, float32 or wider, sets the type"
        ),
    },
)


def in_steps(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values over their row's int8 scale (1 for a row of zeros), before rounding; and the scale."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return rows / scale, scale


def mixed_product(x: Tensor, w: Tensor, outlier: Tensor) -> Tensor:
    """The right answer for [tokens, in] and [out, in], in float64."""
    x, w = x.double(), w.double()
    y = x[:, outlier] @ w[:, outlier].T
    if not bool(outlier.all()):
        (x_steps, x_scale), (w_steps, w_scale) = in_steps(x[:, ~outlier]), in_steps(w[:, ~outlier])
        y = y + (x_steps.round() @ w_steps.round().T) * x_scale * w_scale.T
    return y


def clear_of_ties(x: Tensor, w: Tensor, outlier: Tensor) -> bool:
    """Whether no value is so near a tie that rounding errors could decide its code."""
    if bool(outlier.all()):
        return True
    steps = torch.cat([in_steps(m.double()[:, ~outlier])[0] for m in (x, w)])
    return bool(((steps - steps.floor() - 0.5).abs() > 1e-3).all())


@st.composite
def linear(draw: st.DrawFn, far: str) -> tuple[Tensor, Tensor, float | None]:
    """X [tokens, in], W [out, in] and a threshold, with "no", "some" or "only" outlier features."""
    tokens, out = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    inside = draw(st.integers(2 if far == "some" else 1, 7))
    threshold = draw(st.sampled_from((None, 4.0, 10.0)))
    edge = threshold or 6.0
    x = draw(tensors((tokens, inside), kinds=("normal", "positive", "sparse")))
    x = (x / 4).clamp(-0.99, 0.99) * edge
    w = draw(tensors((out, inside), kinds=("normal", "negative", "outlier", "sparse")))
    outlier = torch.zeros(inside, dtype=torch.bool)
    if far == "some":
        picked = draw(st.sets(st.integers(0, inside - 1), min_size=1, max_size=inside - 1))
        outlier[sorted(picked)] = True
    elif far == "only":
        outlier[:] = True
    for j in outlier.nonzero().flatten().tolist():
        token = draw(st.integers(0, tokens - 1))
        x[token, j] = edge * draw(st.sampled_from((2.0, -1.5, 8.0, -20.0)))
        w[:, j] *= draw(st.sampled_from((1.0, 8.0)))
    x = (x * 1000).round() / 1000
    return x, w, threshold


def mask_of(x: Tensor, threshold: float | None) -> Tensor:
    return (x.abs() >= (threshold or 6.0)).flatten(0, -2).any(0)


def linears(far: str) -> st.SearchStrategy[tuple[Tensor, Tensor, float | None]]:
    """`linear` arguments without values near a tie."""
    return linear(far).filter(lambda d: clear_of_ties(d[0], d[1], mask_of(d[0], d[2])))


def expect_mixed(y: Tensor, drawn: tuple[Tensor, Tensor, float | None]) -> None:
    """Fail with the first output that is not the mixed product."""
    x, w, threshold = drawn
    want = mixed_product(x, w, mask_of(x, threshold))
    expect_shape(y, want.shape, "y")
    sums = x.double().abs() @ w.double().abs().T
    off = (as_double(y) - want).abs().nan_to_num(math.inf) - 2e-6 * sums
    if bool((off > 1e-6).any()):
        t, o = divmod(int(off.argmax()), want.shape[1])
        exact = float(x.double()[t] @ w.double()[o])
        raise Mismatch(
            f"token {t}, output {o} is {float(y[t, o]):.6g}, where LLM.int8() has "
            f"{want[t, o]:.6g} and X W^T is {exact:.6g}"
        )


@mixed_matmul.check(
    points=2,
    hint="Set the outliers aside for a moment: what is the int8 product of X and W, and which "
    "scales does each side have?",
    drawn=linears("no"),
)
def without_outliers_it_is_the_int8_product(candidate, drawn):
    """Where no value reaches the threshold, y is the product of 8-bit codes, with one scale for
    each token of X and one for each row of W."""
    x, w, threshold = drawn
    y, _ = candidate(x, w, **given(threshold=threshold))
    expect_mixed(y, drawn)


@mixed_matmul.check(
    points=2,
    hint="What is left to quantize when every feature is an outlier?",
    drawn=linears("only") | linears("no").map(lambda drawn: (*drawn[:2], 0.0)),
)
def with_outliers_only_nothing_is_quantized(candidate, drawn):
    """Where every feature is an outlier, as for a threshold of 0, y is X W^T in full precision."""
    x, w, threshold = drawn
    y, _ = candidate(x, w, **given(threshold=threshold))
    want, sums = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    expect_shape(y, want.shape, "y")
    off = (as_double(y) - want).abs().nan_to_num(math.inf) - 2e-6 * sums
    expect(off <= 1e-6, "y is not X W^T", expected=want)


@mixed_matmul.check(
    points=3,
    hint="Write down the columns that are left when the outlier features are gone, from X and from "
    "W. What are their largest magnitudes, row by row?",
    drawn=linears("some"),
)
def outliers_have_no_say_in_the_scales(candidate, drawn):
    """The outlier features are multiplied as they are, and added to the int8 product of the others,
    whose scales are computed without them on both sides."""
    x, w, threshold = drawn
    y, _ = candidate(x, w, **given(threshold=threshold))
    expect_mixed(y, drawn)


@mixed_matmul.check(
    points=1,
    hint="How many of the features are kept, and how many are there?",
    drawn=st.sampled_from(("some", "no", "only")).flatmap(linear),
)
def kept_is_the_fraction_of_outlier_features(candidate, drawn):
    """The second result is the number of outlier features over the number of all."""
    x, w, threshold = drawn
    _, kept = candidate(x, w, **given(threshold=threshold))
    want = float(mask_of(x, threshold).double().mean())
    expect(abs(kept - want) < 1e-5, f"kept is {kept:g}", expected=want)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, float | None, tuple[torch.dtype, ...]]:
    """Arguments with X as [batch, n, in], [1, 1, n, in] or [in], and types to try."""
    x, w, threshold = draw(linears("some"))
    tokens, inside = x.shape
    shape = draw(st.sampled_from([(1, 1, -1, inside), (-1, 1, inside), (tokens // 2, 2, inside)]))
    if tokens == 1 and draw(st.booleans()):
        shape = (inside,)
    dtypes = draw(st.sampled_from([(a, b) for a in FLOATS for b in FLOATS]))
    return x[: math.prod(s for s in shape[:-1]) if min(shape) > 0 else tokens], w, threshold, dtypes


@mixed_matmul.check(
    points=1,
    hint="Put all tokens in one long list first. What shape should y have in the end?",
    drawn=linears("some"),
    form=st.sampled_from(("batch of one", "one token each", "two by two", "a single token")),
    dtypes=st.sampled_from([(torch.float16,) * 2, *((a, b) for a in FLOATS for b in FLOATS)]),
)
def leading_dimensions_and_float_types_change_nothing(candidate, drawn, form, dtypes):
    """X of shape [..., in] gives y of shape [..., out], with the values that the tokens have in one
    list; where one of X and W is float64 too, and half precision is computed in float32."""
    x, w, threshold = drawn
    x, w = x.to(dtypes[0]).float(), w.to(dtypes[1]).float()
    if form == "two by two":
        x = torch.cat([x, x]).reshape(2, *x.shape)
    elif form == "a single token":
        x = x[0]
    else:
        x = x.unsqueeze(0 if form == "batch of one" else 1)
    options = given(threshold=threshold)
    plain, kept = candidate(x.reshape(-1, x.shape[-1]), w, **options)
    y, again = candidate(x.to(dtypes[0]), w.to(dtypes[1]), **options)
    expect_shape(y, (*x.shape[:-1], len(w)), "y")
    sums = float((x.double().abs() @ w.double().abs().T).max())
    # A value near a tie may get another code in float64: allow one step here.
    wide = 0.02 * sums if form == "a single token" else 4e-6 * sums
    expect_close(
        as_double(y).reshape(plain.shape), plain, "y, against the same tokens in one list,", 0, wide
    )
    expect(abs(kept - again) < 1e-6, f"kept is {again:g} here, and {kept:g} for the same list")


@mixed_matmul.check(
    points=1,
    hint="Look at the docstring under Raises.",
    bad=[
        (torch.ones(2, 3), torch.ones(2, 4)),
        (torch.ones(2, 3), torch.ones(3)),
        (torch.tensor(1.0), torch.ones(2, 1)),
        (torch.ones(2, 3), torch.ones(2, 3), -1.0),
        (torch.ones(2, 2), torch.ones(2, 2), math.nan),
        (NAN, torch.ones(2, 2)),
        (torch.ones(2), INF.reshape(1, 2)),
        (torch.zeros(0, 2), torch.ones(2, 2)),
    ],
)
def what_does_not_fit_is_refused(candidate, bad):
    """An x and a w that disagree on in, a 0-d x, a w that is no matrix, NaN, infinity and a
    negative threshold raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _mixed(
    x,
    w,
    threshold,
    by=None,  # which features: (rows, w, threshold) -> mask
    x_codes=None,  # (rows, outlier) -> codes and scale of the other features
    w_codes=None,
    full=None,  # the product of the outlier features
    fraction=None,  # what is said of the mask
):
    """matmul_llm_int8, open where people go wrong."""
    x, w = require_finite(x, "x"), require_matrix(w, "w")
    outlier = outlier_features(x, threshold)
    if len(outlier) != w.shape[1]:
        raise ValueError("x and w must agree on in")
    dtype = torch.promote_types(x.dtype, w.dtype)
    rows, w = x.reshape(-1, x.shape[-1]).to(dtype), w.to(dtype)
    outlier = outlier if by is None else by(rows, w, threshold)
    a, b = rows[:, outlier], w[:, outlier]
    y = a @ b.T if full is None else full(a, b)
    if x_codes == "all":
        y = y + matmul_int8(*quantize_symmetric(rows, dim=-1), *quantize_symmetric(w, dim=-1))
    elif not outlier.all():
        x_parts = (x_codes or _without)(rows, outlier)
        w_parts = (w_codes or _without)(w, outlier)
        y = y + matmul_int8(*x_parts, *w_parts)
    kept = outlier.double().mean().item() if fraction is None else fraction(outlier, rows)
    return y.reshape(*x.shape[:-1], -1), kept


def _without(rows, outlier):
    return quantize_symmetric(rows[:, ~outlier], dim=-1)


def _with_their_say(rows, outlier):
    codes, scale = quantize_symmetric(rows, dim=-1)
    return codes[:, ~outlier], scale


@mixed_matmul.misconception(
    "You quantize X before you set the outliers aside, so its scales are still theirs. Split "
    "first; then quantize what is left."
)
def scales_of_x_see_the_outliers(x, w, threshold=6.0):
    return _mixed(x, w, threshold, x_codes=_with_their_say)


@mixed_matmul.misconception(
    "The scales of W are computed from all its columns. The columns that meet outlier features are "
    "not quantized, so they should have no say in them either."
)
def scales_of_w_see_the_outliers(x, w, threshold=6.0):
    return _mixed(x, w, threshold, w_codes=_with_their_say)


@mixed_matmul.misconception(
    "The outlier features are counted twice: they are still in the int8 product, too."
)
def outliers_are_counted_twice(x, w, threshold=6.0):
    return _mixed(x, w, threshold, x_codes="all")


@mixed_matmul.misconception(
    "You drop the outlier features. They are few, but they carry the largest values: multiply them "
    "in full precision and add."
)
def drops_the_outliers(x, w, threshold=6.0):
    return _mixed(x, w, threshold, full=lambda a, b: torch.zeros(len(a), len(b)))


@mixed_matmul.misconception(
    "You quantize the outlier features as well, only apart from the others. They should stay in "
    "full precision."
)
def outliers_get_their_own_int8(x, w, threshold=6.0):
    def product(a, b):
        if not a.shape[1]:
            return a @ b.T
        return matmul_int8(*quantize_symmetric(a, dim=-1), *quantize_symmetric(b, dim=-1))

    return _mixed(x, w, threshold, full=product)


@mixed_matmul.misconception(
    "You quantize with one scale for all of X and one for all of W. Here each token and each "
    "output channel has its own."
)
def one_scale_a_matrix(x, w, threshold=6.0):
    def whole(rows, outlier):
        return quantize_symmetric(rows[:, ~outlier])

    return _mixed(x, w, threshold, x_codes=whole, w_codes=whole)


@mixed_matmul.misconception(
    "You return how many features are kept. A fraction is asked for: divide by the number of all "
    "features."
)
def counts_the_kept_features(x, w, threshold=6.0):
    return _mixed(x, w, threshold, fraction=lambda outlier, rows: outlier.sum().item())


@mixed_matmul.misconception(
    "You return the fraction of features that are quantized. kept are the others, those in full "
    "precision."
)
def fraction_of_the_quantized(x, w, threshold=6.0):
    return _mixed(x, w, threshold, fraction=lambda outlier, rows: (~outlier).double().mean().item())


@mixed_matmul.accepts("zeros in place of the other half's features, in float64")
def masks_with_zeros(x, w, threshold=6.0):
    x, w = require_finite(x, "x").double(), require_matrix(w, "w").double()
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError("x and w do not fit")
    outlier = outlier_features(x, threshold)
    far, near = x * outlier, x * ~outlier
    y = far @ w.T
    parts = []
    for matrix in (near, w * ~outlier):
        scale = matrix.abs().amax(-1, keepdim=True) / 127
        scale[scale == 0] = 1
        parts.append((matrix / scale).round() * scale)
    return y + parts[0] @ parts[1].T, outlier.float().mean()


@mixed_matmul.accepts("one token and one output at a time, in Python numbers")
def one_output_at_a_time(x, w, threshold=6.0):
    require_matrix(w, "w")
    mask = outlier_features(x, threshold).tolist()
    if len(mask) != w.shape[1]:
        raise ValueError("x and w do not fit")

    def codes(row):
        rest = [value for value, out in zip(row, mask, strict=True) if not out]
        scale = max(map(abs, rest), default=0) / 127 or 1.0
        return [round(value / scale) for value in rest], scale

    y = []
    for token in x.reshape(-1, len(mask)).tolist():
        a, step = codes(token)
        for row in w.tolist():
            b, width = codes(row)
            exact = sum(p * q for p, q, out in zip(token, row, mask, strict=True) if out)
            y.append(exact + sum(p * q for p, q in zip(a, b, strict=True)) * step * width)
    return torch.tensor(y).reshape(*x.shape[:-1], -1), sum(mask) / len(mask)


# --- 4. smoothing_scales -------------------------------------------------------------------------

smoothing = Exercise(
    smoothing_scales,
    paper="Xiao et al. 2023 (arXiv 2211.10438), equation 4",
    difficulty=1,
    minutes=10,
)

ONES = torch.ones(2)


@st.composite
def channels(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """max|X_j| and max|W_j| of some channels, all positive."""
    size = st.tuples(st.integers(1, 8))
    kinds = ("whole", "positive", "outlier", "tiny", "large", "normal")
    x = draw(tensors(size, kinds=kinds)).abs()
    w = draw(tensors(tuple(x.shape), kinds=kinds)).abs()
    return torch.where(x < 1e-4, 2.0, x), torch.where(w < 1e-4, 0.5, w)


@smoothing.check(
    points=2,
    hint="Put the two ends into equation 4 by hand: which of the two powers is 1 there?",
    drawn=channels(),
    number=st.sampled_from((float, int)),
)
def at_the_ends_one_side_becomes_flat(candidate, drawn, number):
    """With alpha = 1 every channel of X / s has the maximum 1; with alpha = 0 every channel of W s
    has."""
    x, w = drawn
    candidate(x, w, number(1))  # judged below; asked for first, it tells mistakes apart
    for alpha in (0, 1):
        s = candidate(x, w, number(alpha))
        expect_shape(s, x.shape, "s")
        flat, side = (x / as_double(s), "X / s") if alpha else (w * as_double(s), "W s")
        what = f"the maximum of each channel of {side}"
        expect_close(flat, torch.ones(x.shape), what, 1e-4, 0)


@smoothing.check(
    points=2,
    hint="An alpha of 0.5 shares a channel's difficulty equally: how large are the two maxima "
    "then?",
    drawn=channels(),
    alpha=st.sampled_from((None, 0.5)),
)
def at_one_half_both_sides_are_equal(candidate, drawn, alpha):
    """With alpha = 0.5, which is the default, X / s and W s have the same maximum in each
    channel."""
    x, w = drawn
    s = candidate(x, w, **given(alpha=alpha))
    expect_shape(s, x.shape, "s")
    expect_close(
        x.double() / as_double(s),
        w.double() * as_double(s),
        "max|X_j| / s_j, against max|W_j| s_j,",
        rtol=1e-4,
        atol=0,
    )


@smoothing.check(
    points=2,
    hint="Take logarithms of both sides of equation 4: what is log s for an alpha of 0.25?",
    drawn=channels(),
    alpha=st.sampled_from((0.25, 0.75, 0.9, 0.4, 0.1)),
)
def in_between_the_powers_are_those_of_equation_4(candidate, drawn, alpha):
    """For any alpha s_j is max|X_j| to the power alpha, divided by max|W_j| to the power
    1 - alpha."""
    x, w = drawn
    want = (alpha * x.double().log() - (1 - alpha) * w.double().log()).exp()
    expect_close(candidate(x, w, alpha), want, "s", rtol=1e-4, atol=0)


@smoothing.check(
    points=2,
    hint="A channel of X that was always zero, or a column of W that is: which s leaves it alone?",
    drawn=channels(),
    dead=st.lists(st.sampled_from(("x", "w", "both", "")), min_size=8, max_size=8),
    alpha=st.sampled_from((0.5, 1.0, 0.0, 0.75)),
)
def a_channel_of_zeros_gets_1(candidate, drawn, dead, alpha):
    """Where max|X_j| or max|W_j| is 0, s_j is 1: never 0, NaN or infinity. The other channels do
    not notice."""
    x, w = drawn
    lost_x = torch.tensor([part in ("x", "both") for part in dead[: len(x)]])
    lost_w = torch.tensor([part in ("w", "both") for part in dead[: len(x)]])
    lost = lost_x | lost_w
    s = candidate(torch.where(lost_x, 0.0, x), torch.where(lost_w, 0.0, w), alpha)
    expect_shape(s, x.shape, "s")
    expect_equal(as_double(s)[lost], torch.ones(int(lost.sum())), "s of a channel of zeros")
    if not bool(lost.all()):
        alone = candidate(x[~lost], w[~lost], alpha)
        expect_close(as_double(s)[~lost], alone, "s of the other channels", rtol=1e-4, atol=0)


@smoothing.check(
    points=1,
    hint="Look at the docstring under Raises. What would broadcasting hide?",
    bad=[
        (ONES, torch.ones(3)),
        (ONES, torch.ones(1)),
        (torch.ones(2, 1), ONES),
        (torch.tensor([1.0, -1.0]), ONES),
        (ONES, torch.tensor([-1.0, 1.0])),
        (ONES, ONES, -0.1),
        (ONES, ONES, 1.5),
        (ONES, ONES, math.nan),
        (NAN, ONES),
        (ONES, INF),
    ],
)
def what_has_no_scale_is_refused(candidate, bad):
    """Different shapes, negative or infinite magnitudes, NaN, and an alpha outside 0 to 1 raise
    ValueError."""
    expect_error(candidate, ValueError, *bad)


def _magnitudes(x_absmax, w_absmax, alpha):
    """Both magnitudes, and where they are not zero, after a look at all arguments."""
    x, w = require_finite(x_absmax, "x_absmax"), require_finite(w_absmax, "w_absmax")
    require_same_shape(x, w, "x_absmax and w_absmax")
    if (x < 0).any() or (w < 0).any() or not 0 <= alpha <= 1:
        raise ValueError("a magnitude is negative, or alpha is not between 0 and 1")
    return x, w, (x > 0) & (w > 0)


@smoothing.misconception(
    "Your alpha and 1 - alpha are exchanged: alpha = 1 should move all of the difficulty from X "
    "into W, and it moves none."
)
def alpha_the_wrong_way_round(x_absmax, w_absmax, alpha=0.5):
    x, w, alive = _magnitudes(x_absmax, w_absmax, alpha)
    return torch.where(alive, x ** (1 - alpha) / w**alpha, 1.0)


@smoothing.misconception(
    "Your s is the inverse of what it should be. X is divided by s, so a channel with large values "
    "needs a large s."
)
def the_inverse(x_absmax, w_absmax, alpha=0.5):
    x, w, alive = _magnitudes(x_absmax, w_absmax, alpha)
    return torch.where(alive, w ** (1 - alpha) / x**alpha, 1.0)


@smoothing.misconception(
    "You multiply the two powers. W takes over what X loses, so where W is already large, s must "
    "be smaller: divide."
)
def multiplies_the_powers(x_absmax, w_absmax, alpha=0.5):
    x, w, alive = _magnitudes(x_absmax, w_absmax, alpha)
    return torch.where(alive, x**alpha * w ** (1 - alpha), 1.0)


@smoothing.misconception(
    "You look at X alone. How much a channel of W can take over depends on how large it already is."
)
def forgets_the_weights(x_absmax, w_absmax, alpha=0.5):
    x, _, alive = _magnitudes(x_absmax, w_absmax, alpha)
    return torch.where(alive, x**alpha, 1.0)


@smoothing.misconception(
    "You use the power alpha on both sides. Equation 4 has alpha for X and 1 - alpha for W; only "
    "for 0.5 they are the same."
)
def alpha_on_both_sides(x_absmax, w_absmax, alpha=0.5):
    x, w, alive = _magnitudes(x_absmax, w_absmax, alpha)
    return torch.where(alive, (x / w) ** alpha, 1.0)


@smoothing.misconception(
    "A channel of zeros gets the scale that the formula gives: 0, infinity or NaN, and X / s has "
    "NaN in it. There is nothing to balance in it: its s is 1."
)
def zeros_as_the_formula_has_them(x_absmax, w_absmax, alpha=0.5):
    x, w, _ = _magnitudes(x_absmax, w_absmax, alpha)
    return x**alpha / w ** (1 - alpha)


@smoothing.misconception(
    "You keep zeros away by a small number in their place. The scale of such a channel is then far "
    "from 1, and whatever shows up in it later is blown up or crushed."
)
def a_small_number_for_zero(x_absmax, w_absmax, alpha=0.5):
    x, w, _ = _magnitudes(x_absmax, w_absmax, alpha)
    return x.clamp(min=1e-5) ** alpha / w.clamp(min=1e-5) ** (1 - alpha)


@smoothing.misconception(
    "You divide s by its geometric mean, or otherwise make it 1 on the average. AWQ does that; "
    "equation 4 does not, and then neither end is flat."
)
def made_one_on_the_average(x_absmax, w_absmax, alpha=0.5):
    x, w, alive = _magnitudes(x_absmax, w_absmax, alpha)
    s = torch.where(alive, x**alpha / w ** (1 - alpha), 1.0)
    return torch.where(alive, s / s[alive].log().mean().exp(), 1.0)


@smoothing.accepts("logarithms in float64, and only the channels that are alive")
def with_logarithms(x_absmax, w_absmax, alpha=0.5):
    x, w, alive = _magnitudes(x_absmax, w_absmax, alpha)
    s = torch.ones(len(x), dtype=torch.float64)
    s[alive] = torch.exp(alpha * x[alive].double().log() - (1 - alpha) * w[alive].double().log())
    return s


@smoothing.accepts("a loop over Python numbers")
def loops_over_channels(x_absmax, w_absmax, alpha=0.5):
    x, w, _ = _magnitudes(x_absmax, w_absmax, alpha)
    pairs = zip(x.tolist(), w.tolist(), strict=True)
    return torch.tensor([a**alpha / b ** (1 - alpha) if a and b else 1.0 for a, b in pairs])


# --- 5. fold_scales ------------------------------------------------------------------------------

folding = Exercise(
    fold_scales,
    paper="Xiao et al. 2023 (arXiv 2211.10438), equation 3 and section 4",
    difficulty=1,
    minutes=10,
)


@st.composite
def chains(
    draw: st.DrawFn, rest: int | None = 0, readers: int | None = 1
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """s, the producer [in, *rest] with so many more dimensions, and so many consumers."""
    inside = draw(st.integers(1, 4))
    s = torch.tensor(draw(st.lists(st.integers(1, 16), min_size=inside, max_size=inside))) / 4
    kinds = ("whole", "normal", "positive", "outlier")
    # A square weight tells rows from columns by the values alone.
    sides = [draw(st.sampled_from((inside, 1, 3))) for _ in range(rest or 0)]
    producer = draw(nonzero((inside, *sides), kinds=kinds))
    outs = [draw(st.sampled_from((inside, 2, 1, 5))) for _ in range(readers or 0)]
    return s, producer, [draw(nonzero((out, inside), kinds=kinds)) for out in outs]


@folding.check(
    points=2,
    hint="A norm multiplies channel j by its weight j. What must that weight be, for X_j to become "
    "X_j / s_j?",
    drawn=chains(rest=0),
)
def a_norm_makes_x_smaller(candidate, drawn):
    """A producer of shape [in], such as a norm's weight, is divided by s."""
    s, producer, consumers = drawn
    new, _ = candidate(s, producer, consumers)
    expect_close(new, producer.double() / s.double(), "the producer")


@folding.check(
    points=2,
    hint="Which row or column of a linear layer's weight makes the output X_j?",
    drawn=chains(rest=1) | chains(rest=2),
)
def a_linear_producer_is_divided_row_by_row(candidate, drawn):
    """Row j of a producer of shape [in, ...] makes X_j, and is divided by s_j, whatever its other
    dimensions are."""
    s, producer, consumers = drawn
    new, _ = candidate(s, producer, consumers)
    want = torch.stack([row.double() / step for row, step in zip(producer, s, strict=True)])
    expect_close(new, want, "the producer")


@folding.check(
    points=2,
    hint="Which weights of a consumer does X_j meet: a row or a column?",
    drawn=chains(readers=1),
)
def a_consumer_makes_up_for_it(candidate, drawn):
    """Column j of a consumer meets X_j, and is multiplied by s_j."""
    s, producer, consumers = drawn
    _, [new] = candidate(s, producer, consumers)
    columns = zip(consumers[0].double().T, s.double(), strict=True)
    expect_close(new, torch.stack([column * step for column, step in columns], 1), "the consumer")


@folding.check(
    points=2,
    hint="Work it through for q_proj, k_proj and v_proj, which all read the output of one norm.",
    drawn=chains(readers=2) | chains(readers=3),
)
def every_consumer_gets_its_share(candidate, drawn):
    """All layers that read X are changed in the same way, and come back in the order in which they
    were given."""
    s, producer, consumers = drawn
    _, new = candidate(s, producer, consumers)
    for i, w in enumerate(consumers):
        expect_shape(new[i], w.shape, f"consumer {i + 1}")
        _, [alone] = candidate(s, producer, [w])
        expect_close(new[i], alone, f"consumer {i + 1}, against the same one alone,")


@folding.check(
    points=1,
    hint="Look at the docstring under Raises. What would broadcasting hide?",
    bad=[
        (torch.tensor([1.0, 0.0]), ONES, [torch.ones(1, 2)]),
        (torch.tensor([1.0, -2.0]), ONES, [torch.ones(1, 2)]),
        (INF, ONES, [torch.ones(1, 2)]),
        (NAN, ONES, [torch.ones(1, 2)]),
        (torch.ones(1), ONES, [torch.ones(1, 2)]),
        (torch.ones(2, 1), ONES, [torch.ones(1, 2)]),
        (torch.tensor(2.0), ONES, [torch.ones(1, 2)]),
        (ONES, torch.ones(1), [torch.ones(1, 2)]),
        (ONES, torch.ones(3, 2), [torch.ones(1, 2)]),
        (ONES, ONES, [torch.ones(1, 2), torch.ones(2, 1)]),
        (ONES, ONES, [ONES]),
        (ONES, NAN, [torch.ones(1, 2)]),
        (ONES, ONES, [torch.ones(1, 2), INF.reshape(1, 2)]),
    ],
)
def what_cannot_be_folded_is_refused(candidate, bad):
    """An s that is no vector of positive numbers, a producer without a row for each of them, a
    consumer without a column for each, NaN and infinity raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _parts(s, producer, consumers):
    """All arguments, s also in the shape of the producer's rows, after a look at them."""
    s, producer = require_finite(s, "s"), require_finite(producer, "producer")
    consumers = [require_matrix(w, "consumers") for w in consumers]
    if s.ndim != 1 or (s <= 0).any() or producer.shape[:1] != s.shape:
        raise ValueError("s is not a vector of positive numbers, or the producer does not fit")
    if any(w.shape[1:] != s.shape for w in consumers):
        raise ValueError("a consumer does not fit")
    return s, s.reshape(-1, *[1] * (producer.ndim - 1)), producer, consumers


@folding.misconception(
    "You fold the wrong way round: the producer is to be divided by s, which makes X easy to "
    "quantize, and the consumers multiplied."
)
def the_wrong_way_round(s, producer, consumers):
    s, rows, producer, consumers = _parts(s, producer, consumers)
    return producer * rows, [w / s for w in consumers]


@folding.misconception(
    "You leave the producer as it is. Unless X really becomes X / s, multiplying the consumers by "
    "s changes what the model computes."
)
def the_producer_stays(s, producer, consumers):
    s, _, producer, consumers = _parts(s, producer, consumers)
    return producer, [w * s for w in consumers]


@folding.misconception(
    "You divide the columns of a linear producer. Its weight is [out, in] too, and what X_j comes "
    "from is its row j."
)
def columns_of_the_producer(s, producer, consumers):
    s, _, producer, consumers = _parts(s, producer, consumers)
    return producer / s, [w * s for w in consumers]


@folding.misconception(
    "You multiply the rows of a consumer. Its rows are output channels; X_j meets the weights of "
    "column j."
)
def rows_of_the_consumers(s, producer, consumers):
    s, rows, producer, consumers = _parts(s, producer, consumers)
    return producer / rows, [w * s[:, None] for w in consumers]


@folding.misconception(
    "Only the first consumer is changed. Every layer that reads X now reads X / s: all of them "
    "have to make up for it."
)
def only_the_first_consumer(s, producer, consumers):
    s, rows, producer, consumers = _parts(s, producer, consumers)
    return producer / rows, [w * s if i == 0 else w for i, w in enumerate(consumers)]


@folding.misconception(
    "You divide on both sides. The consumers have to undo what the producer does: they are "
    "multiplied by s."
)
def divides_on_both_sides(s, producer, consumers):
    s, rows, producer, consumers = _parts(s, producer, consumers)
    return producer / rows, [w / s for w in consumers]


@folding.accepts("products with diagonal matrices, in float64")
def diagonal_matrices(s, producer, consumers):
    s, _, producer, consumers = _parts(s, producer, consumers)
    inverse, times = torch.diag(1 / s.double()), torch.diag(s.double())
    flat = producer.double().reshape(len(s), -1)
    return (inverse @ flat).reshape(producer.shape), [w.double() @ times for w in consumers]


@folding.accepts("loops that change copies in place")
def loops_over_rows_and_columns(s, producer, consumers):
    _parts(s, producer, consumers)
    producer, consumers = producer.clone(), [w.clone() for w in consumers]
    for j, step in enumerate(s.tolist()):
        producer[j] /= step
        for w in consumers:
            w[:, j] *= step
    return producer, tuple(consumers)


# --- 6. fwht -------------------------------------------------------------------------------------

transform = Exercise(
    fwht,
    paper="Ashkboos et al. 2024 (arXiv 2404.00456), Tseng et al. 2024 (arXiv 2402.04396)",
    difficulty=3,
    minutes=20,
    equivalent={"if m > 1:  ->  if m > 2:": "m is 1, or 12 and more"},
)

POWERS = st.sampled_from((4, 2, 8, 1, 16, 32))
FACTORED = st.sampled_from((12, 24, 28, 48, 36))


@st.composite
def rows_of(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> Tensor:
    """One row of such a size, not all zero."""
    return draw(nonzero((draw(sizes),)))


def expect_direction(got: Tensor, want: Tensor) -> None:
    """Fail unless ``got`` is ``want`` times a positive number."""
    expect_shape(got, want.shape, "the result")
    got = as_double(got)
    expect(torch.isfinite(got), "the result contains NaN or infinity")
    factor = (got * want).sum() / got.square().sum().clamp(min=1e-300)
    off = (factor * got - want).abs()
    if not bool(factor > 0) or bool((off > 1e-5 * want.norm()).any()):
        worst = [int(i) for i in np.unravel_index(int(off.argmax()), tuple(want.shape))]
        place = worst[0] if len(worst) == 1 else tuple(worst)
        raise Mismatch(
            f"value {place} of the result stands out: whatever the whole is divided by, this is "
            "not x times the Hadamard matrix",
        )


def expected_transform(x: Tensor) -> Tensor:
    n = x.shape[-1]
    return x.double() @ hadamard_matrix(n).double() / math.sqrt(n)


@transform.check(
    points=3,
    hint="Do it by hand for four values: first the neighbours, then those two apart. Each pair "
    "becomes its sum and its difference, both of the old values. Where do they go?",
    x=rows_of(POWERS),
)
def powers_of_two_are_butterflies(candidate, x):
    """For n = 2^k the result is x times Sylvester's matrix in its natural order, whatever the whole
    is divided by."""
    expect_direction(candidate(x), expected_transform(x))


@transform.check(
    points=2,
    hint="Every entry of the Hadamard matrix is 1 or -1. How long is one of its rows, and what "
    "makes it a row of length 1?",
    n=st.sampled_from((2, 4, 8, 16, 12, 32, 24, 28)),
    value=st.sampled_from((1.0, -1.0, 100.0, 0.5, -3.0)),
    seed=st.integers(0, 31),
)
def one_value_is_spread_over_all(candidate, n, value, seed):
    """A value v among n - 1 zeros becomes n values of magnitude |v| / sqrt(n), so that the length
    of the row is kept."""
    x = torch.zeros(n)
    x[seed % n] = value
    got = as_double(candidate(x))
    expect_shape(got, (n,), "the result")
    size = abs(value) / math.sqrt(n)
    some = got[got.abs() > 1e-4 * size]  # that none are missing is for other checks
    expect(bool(len(some)), "the result is zero")
    expect_close(some.abs(), torch.full(some.shape, size), "the magnitude of a value", 1e-4)


@transform.check(
    points=3,
    hint="The size 576 is 16 times 36. What happens inside each of the 16 blocks of 36 neighbours, "
    "before the blocks meet?",
    x=rows_of(FACTORED),
)
def other_sizes_have_a_factor_inside(candidate, x):
    """For n = 2^k m each block of m consecutive values is multiplied by the Hadamard matrix of size
    m, and the butterflies run over the blocks, whatever the whole is divided by."""
    expect_direction(candidate(x), expected_transform(x))


@transform.check(
    points=1,
    hint="What should happen to the first row of a matrix when you change the second?",
    shape=st.sampled_from(
        [(4, 4), (2, 2), (2, 8), (3, 4), (1, 4), (2, 12), (2, 2, 2), (3, 1, 4), (2, 4, 4)]
    ),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)),
    data=st.integers(0, 2**16 - 1).flatmap(
        lambda seed: tensors((128,), kinds=("whole", "normal", "outlier", "large"))
    ),
)
def every_row_is_transformed_by_itself(candidate, shape, dtype, data):
    """With leading dimensions each row, along the last dimension, becomes what it becomes alone;
    half precision is computed in float32."""
    x = data[: math.prod(shape)].reshape(shape).to(dtype)
    got = candidate(x)
    expect_shape(got, shape, "the result")
    alone = torch.stack([as_double(candidate(row.float())) for row in x.reshape(-1, shape[-1])])
    atol = 1e-5 * float(x.double().norm())
    expect_close(got, alone.reshape(shape), "a row, against the same row alone,", 1e-5, atol)


@transform.check(
    points=1,
    hint="Which sizes have a Hadamard matrix here? Something in the library knows.",
    bad=[
        torch.ones(3),
        torch.ones(6),
        torch.ones(20),
        torch.ones(14),
        torch.ones(9),
        torch.ones(6, 6),
        torch.tensor(1.0),
    ],
)
def sizes_without_a_matrix_are_refused(candidate, bad):
    """A size that is neither a power of two nor one of a factor that the library knows, and a 0-d
    tensor, raise ValueError."""
    expect_error(candidate, ValueError, bad)


def _butterflies(x, pair=None, factor=True, length=None):
    """fwht, open where people go wrong: pair (a, b) -> two blocks, length (n, m) -> what the whole
    is divided by."""
    x = require_floating(x, "x")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    n, m = x.shape[-1], hadamard_factor(x.shape[-1])
    blocks, apart = x.unflatten(-1, (-1, m)), 1
    if m > 1 and factor:
        blocks = blocks @ paley_matrix(m).to(x)
    while apart < n // m:
        a, b = blocks.unflatten(-2, (-1, 2, apart)).unbind(-3)
        one, two = (a + b, a - b) if pair is None else pair(a, b)
        blocks = torch.stack([one, two], dim=-3).flatten(-4, -2)
        apart *= 2
    return blocks.flatten(-2) / (math.sqrt(n) if length is None else length(n, m))


@transform.misconception(
    "You do not divide by anything: each row comes out sqrt(n) times as long as it was. The matrix "
    "is orthogonal only with 1 / sqrt(n)."
)
def is_not_normalized(x):
    return _butterflies(x, length=lambda n, m: 1)


@transform.misconception(
    "You divide by n. A row of n ones has the length sqrt(n), so that is what makes the matrix "
    "orthogonal."
)
def divides_by_n(x):
    return _butterflies(x, length=lambda n, m: n)


@transform.misconception(
    "You divide by the square root of the number of blocks only. The factor's matrix has rows of m "
    "ones and minus ones: it needs its share, too."
)
def divides_for_the_butterflies_only(x):
    return _butterflies(x, length=lambda n, m: math.sqrt(n // m))


@transform.misconception(
    "You overwrite a before you compute b: the second value of your pair is a + b - b. Keep the "
    "old values until both new ones are there."
)
def overwrites_a(x):
    return _butterflies(x, pair=lambda a, b: (a + b, (a + b) - b))


@transform.misconception(
    "Your values are right and in another order: that of the number of sign changes (Walsh's). "
    "Here they stay in the natural order, in which the butterflies leave them."
)
def in_the_order_of_sign_changes(x):
    y = _butterflies(x)
    rows = hadamard_matrix(x.shape[-1])
    return y[..., (rows[:, 1:] != rows[:, :-1]).sum(1).argsort(stable=True)]


@transform.misconception(
    "You run the butterflies and leave out the factor: for n = 2^k m each block of m values must "
    "be multiplied by the small Hadamard matrix as well."
)
def forgets_the_factor(x):
    return _butterflies(x, factor=False)


@transform.misconception(
    "Factor and butterflies have changed places: you multiply values that lie 2^k apart by the "
    "small matrix, and run the butterflies among neighbours. The blocks of m neighbours belong to "
    "the small matrix."
)
def factor_outside(x):
    require_floating(x, "x")
    m = hadamard_factor(x.shape[-1]) if x.ndim else 1
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    y = _butterflies(x.unflatten(-1, (m, -1)).transpose(-1, -2).flatten(-2))
    return y.unflatten(-1, (-1, m)).transpose(-1, -2).flatten(-2)


@transform.misconception(
    "You transform along the first dimension. A row, along the last one, is what is to be spread."
)
def along_the_first_dimension(x):
    return _butterflies(x.movedim(0, -1) if x.ndim else x).movedim(-1, 0)


@transform.accepts("a product with the whole matrix, in float64")
def product_with_the_matrix(x):
    require_floating(x, "x")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    n = x.shape[-1]
    return x.double() @ (hadamard_matrix(n).double() / math.sqrt(n))


@transform.accepts("halves that call the function again, largest distance first")
def recursive_halves(x):
    require_floating(x, "x")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    m = hadamard_factor(x.shape[-1])
    if m == x.shape[-1]:
        return x.float() @ paley_matrix(m) / math.sqrt(m) if m > 1 else x.float()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([recursive_halves(a + b), recursive_halves(a - b)], -1) / math.sqrt(2)


@transform.accepts("loops that work in place on NumPy rows, divided in every round")
def loops_in_place(x):
    require_floating(x, "x")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    n, m = x.shape[-1], hadamard_factor(x.shape[-1])
    y = x.double().reshape(-1, n).numpy().copy()
    apart = m
    while apart < n:
        for start in range(0, n, 2 * apart):
            for i in range(start, start + apart):
                a, b = y[:, i].copy(), y[:, i + apart].copy()
                y[:, i], y[:, i + apart] = (a + b) / math.sqrt(2), (a - b) / math.sqrt(2)
        apart *= 2
    if m > 1:
        small = paley_matrix(m).double().numpy() / math.sqrt(m)
        y = (y.reshape(-1, m) @ small).reshape(-1, n)
    return y.reshape(tuple(x.shape))


# --- 7. quantize_to_grid -------------------------------------------------------------------------

to_grid = Exercise(
    quantize_to_grid,
    paper="Nagel et al. 2021 (arXiv 2106.08295), section 2.2",
    difficulty=1,
    minutes=10,
)

STEPS = st.sampled_from((0.5, 1.0, 0.25, 0.1, 2.0, 0.03, 7.0))


def on_the_grid(x: Tensor, scale: Any, zero_point: Any, bits: int) -> Tensor:
    """x in steps of the grid, before rounding, between the ends of the grid."""
    low, high = ends(bits, zero_point is None)
    shift = 0.0 if zero_point is None else as_double(zero_point)
    return (as_double(x) / as_double(scale) + shift).clamp(low, high)


@st.composite
def grids(
    draw: st.DrawFn, symmetric: bool, at: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Values all over a grid, one scale, one zero-point (``at`` a code) or None, and bits."""
    bits = draw(BITS)
    low, high = ends(bits, symmetric)
    point = draw(st.integers(low, high)) if at is None else at
    zero = None if symmetric else torch.tensor(point, dtype=torch.int32)
    steps = draw(integer_tensors(8 * low, 8 * high, shapes(1, 3, max_side=5), torch.int64)) / 8
    scale = torch.tensor(draw(STEPS))
    return (steps - (0 if zero is None else zero)) * scale, scale, zero, bits


@to_grid.check(
    points=2,
    hint="Divide one of the values by the scale. Which whole number is nearest, below zero too?",
    drawn=grids(symmetric=True) | grids(symmetric=False, at=0),
)
def the_nearest_code_is_taken(candidate, drawn):
    """Every code is the whole number nearest to x / scale, for the scale that is given: without a
    zero-point, and with a zero-point of 0, where x is positive."""
    codes = candidate(*drawn)
    expect_integers(codes, "the codes", -128, 255)
    expect_near(HALF, codes, on_the_grid(*drawn))


@to_grid.check(
    points=2,
    hint="A zero-point is the code of 0. Where do a positive and a negative value lie from there?",
    drawn=grids(symmetric=False),
)
def a_zero_point_shifts_the_codes(candidate, drawn):
    """With a zero-point every code is x / scale, rounded, plus the zero-point."""
    expect_near(ONE, candidate(*drawn), on_the_grid(*drawn))


@to_grid.check(
    points=2,
    hint="Which are the smallest and the largest code of each of the two grids? What should become "
    "of a value a thousand steps away?",
    bits=BITS,
    zero=st.sampled_from((None, 0.0, 0.5, 1.0, 0.3)),
    far=st.lists(st.sampled_from((1e4, -1e4, 1e6, -1e6)), min_size=1, max_size=4),
    scale=st.sampled_from((0.5, 1.0, 0.25, 2.0, 7.0)),
)
def values_beyond_the_grid_get_its_last_code(candidate, bits, zero, far, scale):
    """Values beyond the grid saturate: at -Q or Q = 2^(bits-1) - 1 without a zero-point, at 0 or
    2^bits - 1 with one, wherever the zero-point is."""
    low, high = ends(bits, zero is None)
    point = None if zero is None else torch.tensor(round(zero * high), dtype=torch.int32)
    codes = candidate(torch.tensor(far) * scale, torch.tensor(scale), point, bits)
    want = torch.tensor([low if value < 0 else high for value in far])
    expect_equal(codes, want, "a code", reveal=True)


@to_grid.check(
    points=1,
    hint="Does your function work for a scale of shape [out, 1], and for one of the shape of x?",
    x=nonzero(shapes(2, 2, max_side=4), kinds=("normal", "whole", "positive")),
    form=st.sampled_from(("row", "column", "full")),
    seed=st.integers(0, 999),
    zeros=st.booleans(),
    bits=st.sampled_from((8, 4)),
)
def every_value_has_the_grid_of_its_place(candidate, x, form, seed, zeros, bits):
    """Scale and zero-point broadcast against x: one a row, one a column or one for each value."""
    rows, columns = x.shape
    shape = {"row": (rows, 1), "column": (columns,), "full": (rows, columns)}[form]
    rng = np.random.default_rng(seed)
    scale = torch.from_numpy(rng.choice([0.25, 0.5, 1.0, 2.0, 8.0], shape)).float()
    zero = torch.from_numpy(rng.integers(0, 2**bits, shape)) if zeros else None
    got = candidate(x, scale, zero, bits)
    expect_shape(got, x.shape, "codes")
    # Against the same grid, one value at a time.
    wide = [None if part is None else part.expand(x.shape) for part in (scale, zero)]
    places = [(i, j) for i in range(rows) for j in range(columns)]
    alone = [candidate(x[at], *(None if p is None else p[at] for p in wide), bits) for at in places]
    want = torch.stack([as_double(code).reshape(()) for code in alone]).reshape(x.shape)
    expect_close(got, want, "a code, against that of the value alone,", 0, ONE - 1e-3)


@to_grid.check(
    points=1,
    hint="Codes without a zero-point have a sign, codes with one do not, and there may be 256 of "
    "them.",
    examples=20,
    x=nonzero(kinds=("large", "whole")),
    zero=st.integers(1, 255),
)
def codes_are_stored_in_a_byte(candidate, x, zero):
    """Codes are int8 without a zero-point and uint8 with one."""
    scale, point = torch.tensor(0.7), torch.tensor(zero)
    candidate(x, scale, None, 8)  # judged below; asked for first, it tells mistakes apart
    for shift, want in ((point, torch.uint8), (None, torch.int8)):
        codes = candidate(x, scale, shift, 8)
        expect(codes.dtype == want, f"the codes are {codes.dtype}, expected {want}")


@to_grid.check(
    points=1,
    hint="How many bits may a code have?",
    bits=[1, 9, 0, -1, 16],
    zero=[None, 3],
)
def widths_that_no_code_has_are_refused(candidate, bits, zero):
    """Bits outside 2 to 8 raise ValueError."""
    point = None if zero is None else torch.tensor(zero)
    expect_error(candidate, ValueError, torch.ones(2), torch.tensor(1.0), point, bits)


def _gridded(x, scale, zero_point, bits, way=torch.round, low=None, shift=None, last=None):
    """quantize_to_grid, open where people go wrong: the rounding, the smallest symmetric code, how
    the zero-point enters, and what is done in the end."""
    require_bits(bits)
    bottom, top = ends(bits, zero_point is None)
    codes = way(x / scale)
    if zero_point is None:
        bottom = low or bottom
    else:
        codes = codes + zero_point if shift is None else shift(codes, zero_point)
    kind = torch.int8 if zero_point is None else torch.uint8
    if last is None:
        return codes.clamp(bottom, top).to(kind)
    return last(codes, bottom, top, kind)


@to_grid.misconception(
    "You use the code -2^(bits-1). The symmetric grid is restricted: it ends at -Q, so that x and "
    "-x get opposite codes."
)
def the_full_symmetric_range(x, scale, zero_point, bits):
    return _gridded(x, scale, zero_point, bits, low=-(2 ** (bits - 1)))


@to_grid.misconception(
    "You cut off the fraction instead of rounding. The nearest code is at most half a step away."
)
def cuts_off_the_fraction(x, scale, zero_point, bits):
    return _gridded(x, scale, zero_point, bits, way=torch.trunc)


@to_grid.misconception(
    "You multiply by the scale. It is the size of a step: how many steps is x away from zero?"
)
def multiplies_by_the_scale(x, scale, zero_point, bits):
    return _gridded(x, 1 / scale, zero_point, bits)


@to_grid.misconception(
    "You subtract the zero-point. That belongs to the way back; the code of 0 is the zero-point "
    "itself."
)
def subtracts_the_zero_point(x, scale, zero_point, bits):
    return _gridded(x, scale, zero_point, bits, shift=lambda codes, zero: codes - zero)


@to_grid.misconception(
    "You clamp at 0 before you add the zero-point: all negative values get its code. Clamp in the "
    "end."
)
def clamps_before_the_zero_point(x, scale, zero_point, bits):
    return _gridded(x, scale, zero_point, bits, shift=lambda codes, zero: codes.clamp(min=0) + zero)


@to_grid.misconception(
    "You make codes into bytes before you clamp them: 300 becomes 44 in a byte, and no clamp can "
    "see that it was too large."
)
def wraps_around_before_the_clamp(x, scale, zero_point, bits):
    def last(codes, low, high, kind):
        return codes.to(torch.int64).to(kind).clamp(low, high)

    return _gridded(x, scale, zero_point, bits, last=last)


@to_grid.misconception(
    "You compute a scale of your own from x. The grid is already there: GPTQ rounds onto it one "
    "column at a time."
)
def makes_a_scale_of_its_own(x, scale, zero_point, bits):
    largest = 2 ** (require_bits(bits) - 1) - 1
    own = x.abs().max() / largest
    return _gridded(x, torch.where(own == 0, 1.0, own), zero_point, bits)


@to_grid.misconception(
    "You keep all codes in int8. With a zero-point they go up to 255, and from 128 on they turn "
    "negative there: uint8 has room."
)
def always_int8(x, scale, zero_point, bits):
    def last(codes, low, high, kind):
        return codes.clamp(low, high).to(torch.int64).to(torch.int8)

    return _gridded(x, scale, zero_point, bits, last=last)


@to_grid.accepts("float64 NumPy, clipped before it is rounded")
def clips_first_in_numpy(x, scale, zero_point, bits):
    low, high = ends(require_bits(bits), zero_point is None)
    zero = 0 if zero_point is None else zero_point.numpy().astype(np.float64)
    steps = x.double().numpy() / scale.double().numpy() + zero
    return np.rint(np.clip(steps, low, high)).astype(np.int8 if zero_point is None else np.uint8)


@to_grid.accepts("minimum and maximum, halves rounded up")
def halves_go_up(x, scale, zero_point, bits):
    low, high = ends(require_bits(bits), zero_point is None)
    codes = torch.floor(x / scale + 0.5) + (0 if zero_point is None else zero_point)
    codes = torch.minimum(torch.maximum(codes, torch.tensor(low)), torch.tensor(high))
    return codes.to(torch.int8 if zero_point is None else torch.uint8)


@to_grid.accepts("one Python number at a time")
def one_number_at_a_time(x, scale, zero_point, bits):
    low, high = ends(require_bits(bits), zero_point is None)
    zero = torch.zeros(()) if zero_point is None else zero_point
    parts = (part.expand(x.shape).flatten().tolist() for part in (x, scale, zero))
    codes = [
        min(max(round(value / step) + int(shift), low), high)
        for value, step, shift in zip(*parts, strict=True)
    ]
    kind = torch.int8 if zero_point is None else torch.uint8
    return torch.tensor(codes, dtype=kind).reshape(x.shape)


# --- 8. gptq_block -------------------------------------------------------------------------------

gptq = Exercise(
    gptq_block,
    paper="Frantar et al. 2023 (arXiv 2210.17323), algorithm 1",
    difficulty=3,
    minutes=20,
    equivalent={
        "w, codes, errors = (w.clone(), [], torch.zeros_like(w))  ->  "
        "w, codes, errors = (w, [], torch.zeros_like(w))": (
            "only the caller's w would differ, and checks send copies"
        ),
        "w, codes, errors = (w.clone(), [], torch.zeros_like(w))  ->  "
        "w, codes, errors = (w.clone(), [], torch.ones_like(w))": "every column is written later",
        "return (torch.stack(codes, dim=1), errors)  ->  "
        "return (torch.stack(codes, dim=-1), errors)": "the last dimension of a matrix is 1",
    },
)

Block = tuple[Tensor, Tensor, Tensor, Tensor | None, int]


@st.composite
def blocks(
    draw: st.DrawFn,
    diagonal: bool = True,
    above: bool = True,
    symmetric: bool = True,
    groups: bool = False,
) -> Block:
    """w, U, scale, zero-point and bits; with ``diagonal`` U_jj differ from 1, with ``above`` U_ji
    from 0.

    All numbers are easy to read. Scales differ from row to row, and with ``groups`` from column to
    column.
    """
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(2 if above else 1, 7))
    bits = draw(BITS)
    rng = np.random.Generator(np.random.PCG64(draw(st.integers(0, 2**16 - 1))))
    group = np.arange(columns) // draw(st.sampled_from((1, 2)))
    scale = rng.choice([0.5, 0.25, 1.0, 0.2], (rows, columns))[:, group if groups else 0 * group]
    zero = None
    if not symmetric:
        zero = torch.from_numpy(rng.integers(0, 2**bits, (rows, columns))[:, group]).to(torch.int32)
    kinds = ("whole", "normal", "ties", "positive", "negative", "sparse")
    w = draw(tensors((rows, columns), kinds=kinds))
    u = np.eye(columns)
    if diagonal:
        u = np.diag(rng.choice([0.5, 2.0, 1.5, 0.75, 3.0], columns))
    if above:
        sparse = rng.random((columns, columns)) < 0.9
        u += np.triu(rng.integers(-12, 13, (columns, columns)) / 8 * sparse, 1)
    return w, torch.from_numpy(u).float(), torch.from_numpy(scale).float(), zero, bits


def restored(block: Block, codes: Tensor) -> Tensor:
    """The weights that codes stand for."""
    w, _, scale, zero, _ = block
    expect_shape(codes, w.shape, "the codes")
    return (as_double(codes) - (0 if zero is None else as_double(zero))) * as_double(scale)


def walked(block: Block, codes: Tensor) -> Tensor:
    """The weights as the candidate's own codes in the columns before should have left them."""
    w, u = as_double(block[0]), as_double(block[1])
    w_hat, left = restored(block, codes), w.clone()
    for j in range(w.shape[1]):
        left[:, j + 1 :] -= torch.outer((left[:, j] - w_hat[:, j]) / u[j, j], u[j, j + 1 :])
    return left


def expect_errors(errors: Tensor, want: Tensor, size: Tensor, what: str) -> None:
    """Fail unless the errors are as wanted, to float32 precision of numbers of such a size."""
    off = (as_double(errors) - want).abs().nan_to_num(math.inf) - 1e-5 * size
    if bool((off > 1e-5).any()):
        i, j = divmod(int(off.argmax()), want.shape[1])
        raise Mismatch(f"row {i}, column {j}: {what} {float(errors[i, j]):.6g}")


@gptq.check(
    points=1,
    hint="Where U is diagonal no error is passed on. What is left of the method then?",
    block=blocks(above=False) | blocks(above=False, groups=True),
)
def without_correlations_every_weight_goes_to_the_nearest_code(candidate, block):
    """Where U is diagonal, each weight gets the nearest code of its own grid."""
    codes, _ = candidate(*block)
    w, _, scale, zero, bits = block
    expect_near(HALF, codes, on_the_grid(w, scale, zero, bits))


@gptq.check(
    points=2,
    hint="How far did rounding move the first column, and what is that number divided by?",
    block=blocks(),
)
def errors_are_measured_in_units_of_the_diagonal(candidate, block):
    """The errors of the first column, which nobody has touched before, are (W_0 - q_0) / U_00, with
    the q_0 that the codes stand for."""
    codes, errors = candidate(*block)
    w, u, *_ = block
    expect_shape(errors, w.shape, "the errors")
    want = (as_double(w) - restored(block, codes))[:, :1] / float(u[0, 0])
    expect_errors(as_double(errors)[:, :1], want, want.abs() + 1, "the error is")


@gptq.check(
    points=3,
    hint="Take two columns. The first is rounded and loses 0.4: by how much does the second "
    "change, which entry of U says so, and when is it rounded?",
    block=blocks(diagonal=False),
)
def later_columns_make_up_for_the_error(candidate, block):
    """Each column is rounded after every column before it has passed its error on: with all U_jj
    = 1, W_i changes by -e_j U_ji for each j < i."""
    codes, _ = candidate(*block)
    _, _, scale, zero, bits = block
    expect_near(ONE, codes, on_the_grid(walked(block, codes), scale, zero, bits))


@gptq.check(
    points=1,
    hint="What does a code stand for on a grid with a zero-point?",
    block=blocks(diagonal=False, above=False, symmetric=False),
)
def zero_points_belong_to_the_grid(candidate, block):
    """With zero-points the codes are those of the asymmetric grid, and an error is the distance of
    a weight from scale * (code - zero_point)."""
    codes, errors = candidate(*block)
    w, _, scale, zero, bits = block
    expect_near(ONE, codes, on_the_grid(w, scale, zero, bits))
    want = as_double(w) - restored(block, codes)
    expect_shape(errors, w.shape, "the errors")
    expect_errors(errors, want, want.abs() + 1, "the error is")


@gptq.check(
    points=2,
    hint="Add up what has happened to one column: the updates by the columns before it, and its "
    "own rounding. Which products of errors and entries of U are these?",
    block=blocks(),
)
def errors_times_u_is_all_that_was_lost(candidate, block):
    """W - W_hat, with the W_hat that the codes stand for, is the product of the errors and U."""
    codes, errors = candidate(*block)
    w, u, *_ = block
    expect_shape(errors, w.shape, "the errors")
    lost, e = as_double(w) - restored(block, codes), as_double(errors)
    expect_errors(
        e @ u.double(),
        lost,
        e.abs() @ u.double().abs() + lost.abs(),
        "W - W_hat is not what the errors times U say, which is",
    )


@gptq.check(
    points=1,
    hint="Look at the docstring under Raises. What would broadcasting hide?",
    bad=[
        (torch.ones(2, 3), torch.eye(2), torch.ones(2, 3), None, 4),
        (torch.ones(2, 3), torch.eye(4), torch.ones(2, 3), None, 4),
        (torch.ones(2, 3), torch.ones(3), torch.ones(2, 3), None, 4),
        (torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), None, 4),
        (torch.ones(2, 3), torch.eye(3), torch.ones(2, 1), None, 4),
        (torch.ones(2, 2), torch.eye(2), torch.ones(2, 2), torch.ones(1, 2).int(), 4),
        (torch.ones(2, 2), torch.eye(2), torch.ones(2, 2), torch.ones(2, 3).int(), 4),
        (torch.ones(2, 2), torch.eye(2), torch.ones(2, 2), None, 1),
        (torch.ones(2, 2), torch.eye(2), torch.ones(2, 2), None, 9),
    ],
)
def what_does_not_make_a_block_is_refused(candidate, bad):
    """A U that is not square or has another size than w has columns, scales and zero-points of
    another shape than w, and bits outside 2 to 8 raise ValueError."""
    expect_error(candidate, ValueError, *bad)


def _block(
    w,
    u,
    scale,
    zero_point,
    bits,
    error=lambda lost, diagonal: lost / diagonal,  # what is returned
    passed=None,  # what is passed on: (lost, diagonal)
    row=lambda u, j: u[j, j + 1 :],
    sign=-1,
    lost=lambda now, w, q: now - q,  # weight as it is now, original weight, rounded weight
    grid=lambda scale, j: scale[:, j],
    zero=lambda zero_point: zero_point,  # that codes are restored with
):
    """gptq_block, open where people go wrong."""
    if u.shape != (w.shape[1], w.shape[1]):
        raise ValueError("u must be [columns, columns]")
    require_same_shape(w, scale, "w and scale")
    if zero_point is not None:
        require_same_shape(w, zero_point, "w and zero_point")
    now, codes, errors = w.clone(), [], []
    for j in range(w.shape[1]):
        point, step = None if zero_point is None else zero_point[:, j], grid(scale, j)
        codes.append(quantize_to_grid(now[:, j], step, point, bits))
        away = lost(now[:, j], w[:, j], dequantize(codes[j], step, zero(point)))
        errors.append(error(away, u[j, j]))
        now[:, j + 1 :] += sign * torch.outer((passed or error)(away, u[j, j]), row(u, j))
    return torch.stack(codes, 1), torch.stack(errors, 1)


@gptq.misconception(
    "No error reaches the columns after it: this is rounding to nearest. If you do update them, "
    "look whether you take row j of U; below its diagonal U is zero, so from the column j nothing "
    "comes."
)
def rounds_to_nearest(w, u, scale, zero_point, bits):
    return _block(w, u, scale, zero_point, bits, sign=0)


@gptq.misconception(
    "Your updates have the wrong sign: the columns after add to the error in place of making up "
    "for it. They change by minus the error times U."
)
def adds_to_the_error(w, u, scale, zero_point, bits):
    return _block(w, u, scale, zero_point, bits, sign=1)


@gptq.misconception(
    "Your errors are W - q, nowhere divided by U_jj. The rows of U are scaled by their diagonal, "
    "and the updates only cancel the error if it is taken out."
)
def never_divides_by_the_diagonal(w, u, scale, zero_point, bits):
    return _block(w, u, scale, zero_point, bits, error=lambda lost, diagonal: lost)


@gptq.misconception(
    "You divide by U_jj squared. That is the diagonal of an inverse Hessian, as Optimal Brain "
    "Surgeon has it; a row of U already carries one U_jj."
)
def divides_by_the_square(w, u, scale, zero_point, bits):
    return _block(w, u, scale, zero_point, bits, error=lambda lost, diagonal: lost / diagonal**2)


@gptq.misconception(
    "You pass on the right errors and return W - q. The columns beyond this block are updated with "
    "what you return, so it must be divided by U_jj as well."
)
def returns_the_errors_undivided(w, u, scale, zero_point, bits):
    return _block(
        w,
        u,
        scale,
        zero_point,
        bits,
        error=lambda lost, diagonal: lost,
        passed=lambda lost, diagonal: lost / diagonal,
    )


@gptq.misconception(
    "You return the right errors and pass W - q on, not divided by U_jj. Both are the same e_j."
)
def passes_the_errors_on_undivided(w, u, scale, zero_point, bits):
    return _block(w, u, scale, zero_point, bits, passed=lambda lost, diagonal: lost)


@gptq.misconception(
    "Your errors are measured from the original weight. By the time a column is rounded it has "
    "taken over errors of the columns before: measure from what it is then."
)
def errors_from_the_original_weight(w, u, scale, zero_point, bits):
    return _block(w, u, scale, zero_point, bits, lost=lambda now, w, q: w - q)


@gptq.misconception(
    "An error is passed on to the next column only. Every column that is still to be rounded takes "
    "its part, as the rest of row j of U says."
)
def only_the_next_column(w, u, scale, zero_point, bits):
    def row(u, j):
        return torch.cat([u[j, j + 1 : j + 2], torch.zeros_like(u[j, j + 2 :])])

    return _block(w, u, scale, zero_point, bits, row=row)


@gptq.misconception(
    "You restore the weight without its zero-point, so that the error is off by zero_point steps."
)
def forgets_the_zero_point(w, u, scale, zero_point, bits):
    return _block(w, u, scale, zero_point, bits, zero=lambda zero_point: None)


@gptq.misconception(
    "You round every column on the grid of the first. A group ends within a block, and then the "
    "scale changes: each column has its own."
)
def the_grid_of_the_first_column(w, u, scale, zero_point, bits):
    return _block(w, u, scale, zero_point, bits, grid=lambda scale, j: scale[:, 0])


@gptq.accepts("each column by a sum over the errors before it, in float64")
def sums_over_the_errors_before(w, u, scale, zero_point, bits):
    _block(w, u, scale, zero_point, bits)
    w, u, scale = w.double(), u.double(), scale.double()
    codes, errors = torch.zeros(w.shape, dtype=torch.int64), torch.zeros_like(w)
    low, high = ends(bits, zero_point is None)
    zero = torch.zeros_like(codes) if zero_point is None else zero_point
    for j in range(w.shape[1]):
        now = w[:, j] - errors[:, :j] @ u[:j, j]
        codes[:, j] = ((now / scale[:, j]).round().long() + zero[:, j]).clamp(low, high)
        errors[:, j] = (now - (codes[:, j] - zero[:, j]) * scale[:, j]) / u[j, j]
    return codes, errors


@gptq.accepts("NumPy, one row at a time, U divided by its diagonal first")
def row_by_row_in_numpy(w, u, scale, zero_point, bits):
    _block(w, u, scale, zero_point, bits)
    low, high = ends(bits, zero_point is None)
    upper = u.numpy().astype(np.float64)
    scaled = upper / np.diag(upper)[:, None]
    codes, errors = np.zeros(w.shape, dtype=np.int16), np.zeros(w.shape)
    for i in range(len(w)):
        now = w[i].double().numpy().copy()
        for j in range(len(now)):
            step = float(scale[i, j])
            zero = 0 if zero_point is None else int(zero_point[i, j])
            codes[i, j] = min(max(round(now[j] / step) + zero, low), high)
            lost = now[j] - (codes[i, j] - zero) * step
            now -= lost * scaled[j] * (np.arange(len(now)) > j)
            errors[i, j] = lost / upper[j, j]
    return [codes, errors]


@gptq.accepts("a column after the other by matrix slices, its own entry included in the update")
def updates_its_own_entry_too(w, u, scale, zero_point, bits):
    _block(w, u, scale, zero_point, bits)
    w, codes, errors = w.clone(), [], []
    for j in range(w.shape[1]):
        here = slice(j, j + 1)
        zero = None if zero_point is None else zero_point[:, here]
        codes.append(quantize_to_grid(w[:, here], scale[:, here], zero, bits))
        errors.append((w[:, here] - dequantize(codes[-1], scale[:, here], zero)) / u[j, j])
        w[:, j:] = w[:, j:] - errors[-1] @ u[here, j:]
    return torch.cat(codes, 1), torch.cat(errors, 1)
