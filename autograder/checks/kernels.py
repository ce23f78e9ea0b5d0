"""The exercises of lab 11, kernels in Triton: checks, misconceptions, correct variants.

A kernel is called as a function, from memory before a launch to memory after it (`on_copies`), in
the interpreter, which raises where a program touches what is not its own. So a check looks at
results, at memory that must stay as it is (whatever a kernel is to write is NaN, and `OWNED` by
somebody else where it must not write), and at tensors that end where the data ends. A check asks
for one thing and takes the rest as the candidate has it: what she makes of a row that ends within a
tile is judged by what she makes of the row filled up with zeros. So one mistake mostly costs points
once.

Data are small whole numbers where a rounding would be no mistake. Programs take a millisecond: few
inputs, few programs.

Most misconceptions are the reference with one line wrong (`Exercise.slip`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton.language as tl
from hypothesis import strategies as st
from torch import Tensor

from autograder.compare import (
    as_double,
    expect,
    expect_close,
    expect_equal,
    expect_integers,
    expect_shape,
)
from autograder.exercise import Exercise
from autograder.strategies import given, values
from fewer.kernels.interpreter import on_copies
from fewer.kernels.simple import (
    add_kernel,
    decode_attention_kernel,
    dequantize_matmul_kernel,
    hadamard_kernel,
    matmul_kernel,
    quantize_rows_kernel,
    softmax_kernel,
    split_k_kernel,
)

SEEDS = st.integers(0, 2**16 - 1)
KINDS = st.sampled_from(("whole", "normal"))
ORDERS = st.sampled_from((None, 0, 1, 2))  # of the programs; None: as the grid counts them
OWNED = 77.0  # what is in memory of somebody else
NAN = float("nan")
# Why some mutants change nothing.
PROMOTED = "the other operand is float32, and so is the result"
DIVIDED = "Triton divides numbers of float16 in float32"
REBOUND = "0 is 0, and float16 plus float32 is float32 (compiled, Triton refuses that in a loop)"
HIDDEN = "its scores are replaced by minus infinity"
TIMES_ZERO = "what it is multiplied with is 0 there"
LAST_AXIS = "of two axes, 1 is the last one"
FIRST_TILE = "the first tile multiplies it by the exponential of minus infinity"
ANY_SCALE = "a row of zeros may have any scale, and 0 / 0 becomes the code 0 here as on a GPU"
STORED_AS_INT8 = "the store converts to the type of the pointer"

HALF_SUMS = (  # the same mistake in three kernels
    "You sum in half precision. It has 11 bits: whatever is 2048 times smaller than the sum so "
    "far is lost."
)


def data(
    seed: int, *shape: int, kind: str = "normal", dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.from_numpy(values(kind, shape, seed)).to(dtype)


def small(seed: int, *shape: int) -> Tensor:
    """Whole numbers from -4 to 4 in float16: sums of some hundred products are exact even there."""
    return data(seed, *shape, kind="whole", dtype=torch.float16).div(2, rounding_mode="trunc")


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that a kernel is to write: no right result is NaN."""
    return torch.full(shape, NAN if dtype.is_floating_point else 99, dtype=dtype)


def filled_up(x: Tensor, *sizes: int) -> Tensor:
    """The matrix with zeros behind its rows and columns."""
    whole = torch.zeros(sizes, dtype=x.dtype)
    whole[: x.shape[0], : x.shape[1]] = x
    return whole


def up(size: int, block: int) -> int:
    """How many blocks cover so many elements."""
    return -(-size // block)


def apart(x: Tensor, gap: int, owned: float = OWNED) -> Tensor:
    """Memory in which the rows of x lie, each followed by ``gap`` elements of somebody else."""
    return torch.cat([x, torch.full((len(x), gap), owned, dtype=x.dtype)], 1)


def expect_out(
    got: Tensor,
    want: Tensor,
    what: str,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    reveal: bool = True,
) -> None:
    """Fail unless what was NaN before the launch is, within a tolerance, what is wanted."""
    expect_shape(as_double(got), want.shape, what)
    empty = as_double(got).isnan() & ~as_double(want).isnan()
    where = f" in {int(empty.sum())} of {empty.numel()} places" if empty.numel() > 1 else ""
    expect(~empty, f"{what} is NaN{where}: NaN was stored there, or nothing, as before the launch")
    expect_close(got, want, what, rtol=rtol, atol=atol, reveal=reveal)


def expect_same(got: Tensor, own: Tensor, what: str, rtol: float = 1e-5) -> None:
    """Fail unless a result is what the candidate herself made of the same thing put otherwise."""
    expect(as_double(own).isfinite(), f"{what} is not finite, or not written everywhere", got=own)
    expect_out(got, own, what, rtol=rtol, atol=rtol)


def expect_unchanged(after: Tensor, before: Tensor, name: str) -> None:
    expect_equal(after, before, f"after the launch, {name}, which the kernel is only to read,")


# --- 1. add_kernel -------------------------------------------------------------------------------

add = Exercise(
    add_kernel,
    paper="Tillet et al. 2019 (MAPL, doi 10.1145/3315508.3329973)",
    difficulty=1,
    minutes=10,
    decorator=on_copies,
)

BLOCKS = st.sampled_from((4, 2, 8, 1))


@add.check(
    points=3,
    hint="Which elements belong to program 0, which to program 1? Write down the places of the "
    "elements that program p has, for tiles of four.",
    examples=8,
    programs=st.integers(1, 4),
    block=BLOCKS,
    seed=SEEDS,
    kind=KINDS,
)
def whole_tiles_are_added(candidate, programs, block, seed, kind):
    """Where the programs have exactly one tile each, out is x + y, and x and y stay as they are."""
    n = programs * block
    x, y = data(seed, n, kind=kind), data(seed + 1, n, kind=kind)
    x_after, y_after, out = candidate(programs, x, y, unwritten(n), n, BLOCK=block)
    expect_out(out, x + y, "out")
    expect_unchanged(x_after, x, "x")
    expect_unchanged(y_after, y, "y")


@add.check(
    points=2,
    hint="The last tile reaches over the end of the vectors. What keeps a program from storing "
    "there?",
    examples=8,
    block=st.sampled_from((4, 8, 2)),
    n=st.integers(1, 11),
    seed=SEEDS,
)
def what_lies_behind_the_end_stays(candidate, block, n, seed):
    """Only the first n elements of out are written, though its memory goes on."""
    programs = up(n, block)
    whole = programs * block
    x, y = data(seed, whole, kind="whole"), data(seed + 1, whole, kind="whole")
    out = candidate(programs, x, y, torch.full((whole,), OWNED), n, BLOCK=block)[2]
    want = torch.full((whole,), OWNED)
    want[:n] = (x + y)[:n]
    expect_close(out, want, "the memory of out, its end included,", reveal=True)


@add.check(
    points=2,
    hint="Loads are like stores: an address behind the end is nobody's. Are x and y, too, read "
    "only as far as they go?",
    examples=8,
    block=st.sampled_from((4, 8, 2)),
    n=st.integers(1, 11),
    seed=SEEDS,
)
def vectors_end_where_they_end(candidate, block, n, seed):
    """Nothing is loaded or stored behind the end of the vectors, wherever in a tile that is."""
    x, y = data(seed, n, kind="whole"), data(seed + 1, n, kind="whole")
    out = candidate(up(n, block), x, y, unwritten(n), n, BLOCK=block)[2]
    expect_out(out, x + y, "out")


@add.check(
    points=1,
    hint="There may be more programs than tiles. What should one do that has nothing to do?",
    examples=6,
    tiles=st.integers(1, 2),
    more=st.integers(1, 2),
    block=BLOCKS,
    seed=SEEDS,
)
def programs_behind_the_end_do_nothing(candidate, tiles, more, block, seed):
    """With more programs than tiles, out is x + y all the same."""
    n = tiles * block
    x, y = data(seed, n, kind="whole"), data(seed + 1, n, kind="whole")
    out = candidate(tiles + more, x, y, unwritten(n), n, BLOCK=block)[2]
    expect_out(out, x + y, "out")


add.slip(
    "adds_to_out",
    "You add to what is in out. That is whatever was in this memory before: it is to be "
    "overwritten.",
    ("x + y", "tl.load(out_ptr + i, mask=inside) + x + y"),
)
add.slip(
    "tiles_overlap",
    "Your programs start one element apart, so that their tiles overlap, and several programs "
    "store the same elements. Program p starts where the p tiles before it end.",
    ("tl.program_id(0) * BLOCK", "tl.program_id(0)"),
)
add.slip(
    "one_tile_for_all",
    "All your programs take the first tile: they race for its elements, and nobody adds the "
    "others. A program learns its number from Triton, and its tile from its number.",
    ("tl.program_id(0) * BLOCK + ", ""),
)
add.slip(
    "mask_within_the_tile",
    "Your mask compares the place within the tile to n. It must compare the place in the vector, "
    "which also counts the tiles before.",
    ("inside = i < n", "inside = tl.arange(0, BLOCK) < n"),
)
add.slip(
    "loads_without_mask",
    "You store with a mask and load without. A load behind the end of a vector is no better: the "
    "memory may not exist.",
    ("x = tl.load(x_ptr + i, mask=inside)", "x = tl.load(x_ptr + i)"),
    ("y = tl.load(y_ptr + i, mask=inside)", "y = tl.load(y_ptr + i)"),
)
add.slip(
    "one_too_many",
    "Your mask lets the element with the number n pass. They are numbered from 0: the last one "
    "is n - 1.",
    ("i < n", "i <= n"),
)
add.slip(
    "no_mask",
    "The last tile reaches over the end of the vectors, and you load and store there: a mask is "
    "missing.",
    ("x = tl.load(x_ptr + i, mask=inside)", "x = tl.load(x_ptr + i)"),
    ("y = tl.load(y_ptr + i, mask=inside)", "y = tl.load(y_ptr + i)"),
    ("tl.store(out_ptr + i, x + y, mask=inside)", "tl.store(out_ptr + i, x + y)"),
)


@add.accepts("a loop: each program takes every so many tiles")
def every_so_many_tiles(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, at < n)
        y = tl.load(y_ptr + at, at < n)
        tl.store(out_ptr + at, x + y, at < n)


@add.accepts("pointers to the tile are made first, and it is counted what is left")
def pointers_first(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    here = tl.arange(0, BLOCK)
    left = n - first
    x = tl.load(x_ptr + first + here, mask=here < left, other=0.0)
    y = tl.load(y_ptr + first + here, mask=here < left, other=0.0)
    tl.store(out_ptr + first + here, x + y, mask=here < left)


# --- 2. quantize_rows_kernel ---------------------------------------------------------------------

rows8 = Exercise(
    quantize_rows_kernel,
    paper="Dettmers et al. 2022 (arXiv 2208.07339), section 2.1",
    difficulty=2,
    minutes=15,
    decorator=on_copies,
    equivalent={
        "… mask=inside, other=0.0).to(tl.float32)  ->  … mask=inside, other=0.0)": DIVIDED,
        "scale = tl.where(largest > 0, largest / 127, 1.0)  ->  scale = largest / 127": ANY_SCALE,
        "scale = tl.where(largest > 0, largest / 127, 1.0)  "
        "->  scale = tl.where(largest >= 0, largest / 127, 1.0)": ANY_SCALE,
        "scale = tl.where(largest > 0, largest / 127, 1.0)  "
        "->  scale = tl.where(largest > -1, largest / 127, 1.0)": ANY_SCALE,
        "scale = tl.where(largest > 0, largest / 127, 1.0)  "
        "->  scale = tl.where(largest > 0, largest / 127, 2.0)": ANY_SCALE,
        "scale = tl.where(largest > 0, largest / 127, 1.0)  "
        "->  scale = tl.where(largest > 0, largest / 127, 0.0)": ANY_SCALE,
        "… row * cols + col, codes.to(tl.int8), mask=inside)  "
        "->  … row * cols + col, codes, mask=inside)": STORED_AS_INT8,
        "…cols + col, codes.to(tl.int8), mask=inside)  "
        "->  …cols + col, codes.to(tl.uint8), mask=inside)": STORED_AS_INT8,
        "…cols + col, codes.to(tl.int8), mask=inside)  "
        "->  …cols + col, codes.to(tl.int16), mask=inside)": STORED_AS_INT8,
    },
)

ROWS = st.integers(1, 3)


def quantized(candidate, x: Tensor, block: int, memory: Tensor | None = None):
    """The candidate's codes and scales of the matrix x, which lies in ``memory``."""
    rows, cols = x.shape
    memory = x if memory is None else memory
    codes, scale = unwritten(rows, cols, dtype=torch.int8), unwritten(rows)
    stride = memory.shape[1]
    after, codes, scale = candidate(rows, memory, codes, scale, cols, stride, BLOCK=block)
    expect_unchanged(after, memory, "x")
    return as_double(codes), as_double(scale)


def expect_scales(scale: Tensor, x: Tensor) -> None:
    want = x.double().abs().amax(1) / 127
    expect_out(scale, want, "the scale", atol=1e-9)


def expect_near(codes: Tensor, scale: Tensor, x: Tensor) -> None:
    """Each code is the nearest that there is, by the candidate's own scale."""
    expect_integers(codes, "the codes", -127, 127)
    gap = (x.double() - scale[:, None] * codes).abs()
    limit = scale[:, None].abs() * (0.5 + 1e-4)
    expect(gap <= limit, "x is farther than half a step from scale * codes", got=codes)


@rows8.check(
    points=2,
    hint="Take the row 1, -2, 0, 1. Which of its values must become a code of 127 or -127?",
    examples=6,
    rows=ROWS,
    block=BLOCKS,
    seed=SEEDS,
    kind=st.sampled_from(("whole", "normal", "negative")),
)
def a_scale_is_the_largest_magnitude_over_127(candidate, rows, block, seed, kind):
    """The scale of a row is its largest magnitude divided by 127, whatever the other rows have."""
    x = data(seed, rows, block, kind=kind) * torch.tensor([[1.0], [8.0], [0.5]])[:rows]
    x[:, 0] = torch.where(x.abs().amax(1) > 0, x[:, 0], -3.0)
    expect_scales(quantized(candidate, x, block)[1], x)


@rows8.check(
    points=3,
    hint="What does a conversion to an integer do to 0.9, and to -0.9? And which codes does a "
    "signed byte have?",
    examples=6,
    rows=ROWS,
    block=st.sampled_from((8, 4, 2)),
    seed=SEEDS,
)
def each_code_is_the_nearest(candidate, rows, block, seed):
    """Scale times code is at most half a step away from x, and no code leaves -127 ... 127."""
    x = data(seed, rows, block)
    codes, scale = quantized(candidate, x, block)
    expect_near(codes, scale, x)


@rows8.check(
    points=2,
    hint="The tile is longer than the row. What is behind the row's end in memory, and what in "
    "the tile? What would it do to the maximum?",
    examples=8,
    rows=ROWS,
    cols=st.integers(1, 7),
    seed=SEEDS,
)
def a_row_may_be_shorter_than_the_tile(candidate, rows, cols, seed):
    """What follows behind a row, be it the next row or nothing, counts for nothing and is not
    touched: the row gets the codes and the scale that it has if zeros follow."""
    x = data(seed, rows, cols) + 0.01
    own, own_scale = quantized(candidate, apart(x, 8 - cols, owned=0.0), 8)
    codes, scale = quantized(candidate, x, 8)
    expect_same(scale, own_scale, "the scale")
    expect_equal(codes, own[:, :cols], "the codes", reveal=True)


@rows8.check(
    points=2,
    hint="How many elements is it from one row of x to the next, and how many from one row of "
    "codes to the next? They need not be the same.",
    examples=5,
    rows=st.integers(2, 3),
    block=st.sampled_from((4, 2, 8)),
    gap=st.integers(1, 3),
    seed=SEEDS,
)
def rows_of_x_may_lie_apart(candidate, rows, block, gap, seed):
    """Between the rows of x may be something else; codes and scales have no gaps, and are the same
    as without."""
    x = data(seed, rows, block) + 0.01
    own, own_scale = quantized(candidate, x, block)
    codes, scale = quantized(candidate, x, block, apart(x, gap))
    expect_same(scale, own_scale, "the scale")
    expect_equal(codes, own, "the codes", reveal=True)


@rows8.check(
    points=1,
    hint="The scale is a float32, also where x is not. In which precision is it divided? And what "
    "is divided in a row of zeros?",
    examples=6,
    rows=ROWS,
    block=st.sampled_from((8, 4, 2)),
    zero=st.integers(0, 2),
    seed=SEEDS,
)
def half_precision_and_zeros(candidate, rows, block, zero, seed):
    """Rows of float16 have the scale that they have in float32; a row of zeros has codes of 0 and a
    finite scale."""
    x = data(seed, rows, block, dtype=torch.float16)
    x[zero:] = 0
    own = quantized(candidate, x.float(), block)[1]
    codes, scale = quantized(candidate, x, block)
    expect_same(scale, own, "the scale")
    empty = codes[~x.any(1)]
    expect_equal(empty, torch.zeros_like(empty), "the codes of a row of zeros")


rows8.slip(
    "loses_the_sign",
    "You take the largest value. A row can reach farther down than up: it is the largest "
    "magnitude that must fit.",
    ("tl.max(tl.abs(x))", "tl.max(x)"),
)
rows8.slip(
    "over_128",
    "You divide by 128. Then the largest value gets the code 128, which a signed byte does not "
    "have: it becomes -128.",
    ("largest / 127", "largest / 128"),
)
rows8.slip(
    "cuts_off",
    "You convert to integers without rounding: that cuts off what is behind the point, and an "
    "error can be as large as a whole step.",
    ("tl.floor(x / scale + 0.5)", "x / scale"),
)
rows8.slip(
    "rounds_down",
    "You round down. The nearest integer may be the one above.",
    ("tl.floor(x / scale + 0.5)", "tl.floor(x / scale)"),
)
rows8.slip(
    "infinite_padding",
    "You fill the tile behind the row's end with minus infinity. That is right for a maximum, "
    "but not for one of magnitudes.",
    ("other=0.0", "other=-float('inf')"),
)
rows8.slip(
    "loads_without_mask",
    "Your tile is longer than the row, and what you load behind its end takes part in the maximum: "
    "a mask is missing, or the place for what it leaves out.",
    ("mask=inside, other=0.0", "mask=col < BLOCK"),
)
rows8.slip(
    "x_without_gaps",
    "You expect the next row of x right behind this one. How far it is you are told: row_stride.",
    ("row * row_stride", "row * cols"),
)
rows8.slip(
    "codes_with_gaps",
    "You store codes at the places that the values have in x. The rows of codes follow one another "
    "without gaps.",
    ("codes_ptr + row * cols", "codes_ptr + row * row_stride"),
)


@rows8.accepts("multiplies by the inverse scale, rounds half away from zero")
def half_away_from_zero(x_ptr, codes_ptr, scale_ptr, cols, row_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + r * row_stride + c, mask=c < cols, other=0).to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30)
    steps = x * (127.0 / top)
    steps = tl.where(steps < 0, steps - 0.5, steps + 0.5)
    tl.store(scale_ptr + r, top / 127.0)
    tl.store(codes_ptr + r * cols + c, steps.to(tl.int8), mask=c < cols)


@rows8.accepts("the largest and the smallest value, in place of magnitudes")
def largest_and_smallest(x_ptr, codes_ptr, scale_ptr, cols, row_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < cols
    x = tl.load(x_ptr + r * row_stride + c, mask=inside).to(tl.float32)
    high = tl.max(tl.where(inside, x, -float("inf")))
    low = tl.min(tl.where(inside, x, float("inf")))
    scale = tl.maximum(high, -low) / 127
    if scale == 0:
        scale = scale + 1.0
    codes = tl.ceil(x / scale - 0.5)
    tl.store(codes_ptr + r * cols + c, codes.to(tl.int8), mask=inside)
    tl.store(scale_ptr + r, scale)


# --- 3. softmax_kernel ---------------------------------------------------------------------------

online = Exercise(
    softmax_kernel,
    paper="Milakov, Gimelshein 2018 (arXiv 1805.02867), algorithm 3",
    difficulty=2,
    minutes=25,
    decorator=on_copies,
    equivalent={
        "total = 0.0  ->  total = 1.0": FIRST_TILE,
        "total = 0.0  ->  total = -1.0": FIRST_TILE,
        "x = x.to(tl.float32)  ->  (removed)": PROMOTED,
        "…stride + col, mask=col < cols).to(tl.float32)  "
        "->  …stride + col, mask=col < cols)": PROMOTED,
    },
)


def softmax_of(candidate, x: Tensor, block: int, memory: Tensor | None = None) -> Tensor:
    """What the candidate makes of the matrix x, which lies in ``memory``."""
    rows, cols = x.shape
    memory = x if memory is None else memory
    stride = memory.shape[1]
    out = unwritten(rows, cols, dtype=x.dtype)
    after, out = candidate(rows, memory, out, cols, stride, BLOCK=block)
    expect_unchanged(after, memory, "x")
    return out


def expect_softmax(candidate, x: Tensor, block: int) -> None:
    want = x.double().softmax(1)
    got = softmax_of(candidate, x, block)
    expect_out(got, want, "out")


@online.check(
    points=2,
    hint="A row as long as the tile: largest value, exponentials, their sum. Which of them does a "
    "program know after its first loop?",
    examples=5,
    rows=ROWS,
    block=BLOCKS,
    seed=SEEDS,
    kind=KINDS,
)
def a_row_of_one_tile(candidate, rows, block, seed, kind):
    """Rows as long as the tile become their softmax."""
    expect_softmax(candidate, data(seed, rows, block, kind=kind), block)


@online.check(
    points=3,
    hint="The sum so far was taken with the maximum so far. A larger one comes along: by which "
    "factor is every summand too large?",
    examples=6,
    rows=st.integers(1, 2),
    tiles=st.integers(2, 4),
    block=st.sampled_from((4, 2)),
    seed=SEEDS,
    kind=KINDS,
)
def a_row_of_several_tiles(candidate, rows, tiles, block, seed, kind):
    """Rows of several tiles become their softmax, wherever the largest value is."""
    expect_softmax(candidate, data(seed, rows, tiles * block, kind=kind), block)


@online.check(
    points=2,
    hint="The last tile reaches over the end of the row. What must stand there so that it changes "
    "neither the maximum nor the sum? And whose memory is behind the end of out?",
    examples=7,
    rows=st.integers(1, 2),
    cols=st.sampled_from((3, 5, 1, 6, 7)),
    block=st.sampled_from((4, 8)),
    seed=SEEDS,
)
def a_row_may_end_within_a_tile(candidate, rows, cols, block, seed):
    """A row that is no multiple of the tile becomes what it becomes if the tile is filled up with
    values of -10000, whose exponentials are nothing."""
    x = -data(seed, rows, cols, kind="positive")
    filled = apart(x, up(cols, block) * block - cols, owned=-10_000.0)
    own = softmax_of(candidate, filled, block)[:, :cols]
    expect_same(softmax_of(candidate, x, block), own, "out")


@online.check(
    points=1,
    hint="How many elements is it from one row of x to the next, and how many in out?",
    examples=4,
    rows=st.integers(2, 3),
    cols=st.sampled_from((4, 8)),
    gap=st.integers(1, 3),
    seed=SEEDS,
)
def rows_of_x_may_be_apart(candidate, rows, cols, gap, seed):
    """Between the rows of x may be something else; out has no gaps, and is the same as without."""
    x = data(seed, rows, cols)
    own = softmax_of(candidate, x, 4)
    expect_same(softmax_of(candidate, x, 4, apart(x, gap)), own, "out")


@online.check(
    points=2,
    hint="The exponential of 100 is too large for a float32, and all exponentials are 0 if too "
    "much is subtracted. What is the largest exponent that occurs in your sums, and is there "
    "always an exponent of 0 among them?",
    examples=9,
    rows=st.integers(1, 2),
    tiles=st.integers(1, 3),
    shift=st.sampled_from((1000.0, -1000.0)),
    slope=st.sampled_from((0.0, 200.0, -200.0)),
    seed=SEEDS,
    half=st.booleans(),
)
def no_exponential_overflows(candidate, rows, tiles, shift, slope, seed, half):
    """Values may be large, of either sign, and far apart; and if all grow by the same, nothing
    changes."""
    x = data(seed, rows, 4 * tiles, kind="whole") + slope * (torch.arange(4 * tiles) // 4)
    own = softmax_of(candidate, x, 4)
    x = x + shift
    got = softmax_of(candidate, x.half() if half else x, 4)
    expect_same(got, own, "out", rtol=2e-3 if half else 1e-5)
    expect(as_double(got).isfinite(), "out is not finite everywhere", got=got)


online.slip(
    "sum_is_not_corrected",
    "The maximum grows, but the sum still has the summands that were taken with the old one. They "
    "are too large by a factor, and so is the sum so far.",
    ("total * tl.exp(largest - larger)", "total"),
)
online.slip(
    "last_tile_only",
    "Your sum is that of the last tile. It must go on over all tiles of the row.",
    ("total = total * tl.exp(largest - larger) + tl.sum", "total = tl.sum"),
)
online.slip(
    "zeros_in_the_padding",
    "You fill the last tile with zeros. The exponential of 0 is 1: they take part in the sum, and "
    "perhaps in the maximum. Minus infinity does neither.",
    ("other=-float('inf')", "other=0.0"),
)
online.slip(
    "stores_without_mask",
    "You store behind the end of the row: there begins the next one, which belongs to another "
    "program.",
    ("tl.exp(x - largest) / total, mask=col < cols", "tl.exp(x - largest) / total"),
)
online.slip(
    "x_without_gaps",
    "You expect the next row of x right behind this one. How far it is you are told: row_stride.",
    ("row * row_stride + col, mask=col < cols, other", "row * cols + col, mask=col < cols, other"),
    ("row * row_stride + col, mask=col < cols).to", "row * cols + col, mask=col < cols).to"),
)
online.slip(
    "starts_at_zero",
    "Your maximum starts at 0. In a row of large negative values 0 remains the maximum, and every "
    "exponential is 0. Start with what is smaller than all numbers.",
    ("largest = -float('inf')", "largest = 0.0"),
)
online.slip(
    "maximum_of_the_tile",
    "You take the maximum of each tile by itself, so that it can fall from one tile to the next, "
    "and the correction of the sum overflows. A running maximum never falls.",
    ("tl.maximum(largest, tl.max(x))", "tl.max(x)"),
)
online.slip(
    "no_maximum",
    "You take the exponential of the values as they are. That of 89 is larger than any float32: "
    "subtract the running maximum first.",
    ("larger = tl.maximum(largest, tl.max(x))", "larger = 0.0"),
)
online.slip(
    "wrong_way_round",
    "You correct the sum by the exponential of the new maximum minus the old one. The sum must "
    "shrink when the maximum grows: it is the old one minus the new.",
    ("tl.exp(largest - larger)", "tl.exp(larger - largest)"),
)


@online.accepts("three sweeps: maximum, sum, quotient")
def three_sweeps(x_ptr, out_ptr, cols, row_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    top = -float("inf")
    for first in range(0, cols, BLOCK):
        inside = first + c < cols
        x = tl.load(x_ptr + r * row_stride + first + c, inside, -float("inf"))
        top = tl.maximum(top, tl.max(x.to(tl.float32)))
    total = 0.0
    for first in range(0, cols, BLOCK):
        inside = first + c < cols
        x = tl.load(x_ptr + r * row_stride + first + c, inside, 0.0)
        total += tl.sum(tl.where(inside, tl.exp(x.to(tl.float32) - top), 0.0))
    for first in range(0, cols, BLOCK):
        inside = first + c < cols
        x = tl.load(x_ptr + r * row_stride + first + c, inside, 0.0)
        tl.store(out_ptr + r * cols + first + c, tl.exp(x.to(tl.float32) - top) / total, inside)


@online.accepts("the logarithm of the sum runs along, in base 2")
def logarithm_in_base_2(x_ptr, out_ptr, cols, row_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    log2e = 1.4426950408889634
    lse = -float("inf")
    for first in range(0, cols, BLOCK):
        at = r * row_stride + first + c
        x = tl.load(x_ptr + at, first + c < cols, -float("inf")).to(tl.float32)
        x = x - tl.load(x_ptr + r * row_stride).to(tl.float32)
        top = tl.maximum(lse, tl.max(x) * log2e)
        total = tl.exp2(lse - top) + tl.sum(tl.exp2(x * log2e - top))
        lse = top + tl.log2(total)
    for first in range(0, cols, BLOCK):
        at = r * row_stride + first + c
        x = tl.load(x_ptr + at, first + c < cols).to(tl.float32)
        x = x - tl.load(x_ptr + r * row_stride).to(tl.float32)
        tl.store(out_ptr + r * cols + first + c, tl.exp2(x * log2e - lse), first + c < cols)


# --- 4. matmul_kernel ----------------------------------------------------------------------------

product = Exercise(
    matmul_kernel,
    paper="Tillet et al. 2019 (MAPL, doi 10.1145/3315508.3329973), section 2",
    difficulty=2,
    minutes=25,
    decorator=on_copies,
    equivalent={
        "total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  "
        "->  total = tl.zeros((BLOCK_M, BLOCK_N), tl.float16)": REBOUND,
        "…m) & (along < k), other=0.0)  ->  …m) & (along < k), other=1.0)": TIMES_ZERO,
        "…m) & (along < k), other=0.0)  ->  …m) & (along < k), other=-1.0)": TIMES_ZERO,
        "…< k) & (col < n), other=0.0)  ->  …< k) & (col < n), other=1.0)": TIMES_ZERO,
        "…< k) & (col < n), other=0.0)  ->  …< k) & (col < n), other=-1.0)": TIMES_ZERO,
    },
)

MORE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}  # the tiles, if nothing is said


def product_of(candidate, a: Tensor, b: Tensor, c: Tensor | None = None, **tiles: int) -> Tensor:
    """What the candidate makes of A and B; ``c`` is what is to be written, in its own layout."""
    (m, k), n = a.shape, b.shape[1]
    c = unwritten(m, n) if c is None else c
    sizes = MORE | tiles
    grid = (up(m, sizes["BLOCK_M"]), up(n, sizes["BLOCK_N"]))
    strides = [*a.stride(), *b.stride(), *c.stride()]
    a_after, b_after, c_after = candidate(grid, a, b, c, m, n, k, *strides, **sizes)
    expect_unchanged(a_after, a, "A")
    expect_unchanged(b_after, b, "B")
    return c_after


def expect_product(candidate, a: Tensor, b: Tensor, step: int = 16) -> None:
    want = a.double() @ b.double()
    got = product_of(candidate, a, b, BLOCK_K=step)
    expect_out(got, want, "C", rtol=1e-3, atol=1e-3, reveal=False)


@product.check(
    points=2,
    hint="One tile, one step along k. Which rows and columns of A and of B does it need, and at "
    "which addresses are they?",
    examples=4,
    seed=SEEDS,
)
def one_tile_of_one_step(candidate, seed):
    """Matrices as large as the tiles are multiplied by one program."""
    expect_product(candidate, small(seed, 16, 16), small(seed + 1, 16, 32))


@product.check(
    points=2,
    hint="A grid of two axes has programs with two numbers. Which of them says which rows, and "
    "which says which columns?",
    examples=5,
    grid=st.sampled_from(((2, 1), (1, 2), (2, 2))),
    seed=SEEDS,
)
def each_program_has_a_tile(candidate, grid, seed):
    """A grid of programs makes a matrix of tiles."""
    m, n = 16 * grid[0], 32 * grid[1]
    expect_product(candidate, small(seed, m, 16), small(seed + 1, 16, n))


@product.check(
    points=2,
    hint="After one step along k, what of A and of B comes next, and what becomes of the products "
    "so far?",
    examples=4,
    steps=st.integers(2, 3),
    wide=st.booleans(),
    seed=SEEDS,
)
def products_are_summed_along_k(candidate, steps, wide, seed):
    """The inner dimension may be several steps long."""
    block = 32 if wide else 16
    a, b = small(seed, 16, steps * block), small(seed + 1, steps * block, 32)
    expect_product(candidate, a, b, step=block)


@product.check(
    points=2,
    hint="Three sizes may end within a tile. Which of them concern A, which B, and which C? And "
    "what must stand in for what is not there?",
    examples=8,
    m=st.sampled_from((16, 5, 17)),
    n=st.sampled_from((32, 9, 1)),
    k=st.sampled_from((16, 7, 20, 1)),
    seed=SEEDS,
)
def sizes_may_end_within_a_tile(candidate, m, n, k, seed):
    """No size need be a multiple of its tile's: nothing outside of the matrices is touched, and C
    is the same as with zeros behind the rows and columns of A and B."""
    a, b = small(seed, m, k) + 1, small(seed + 1, k, n) + 1
    rows, inner = up(m, 16) * 16, up(k, 16) * 16
    own = product_of(candidate, filled_up(a, rows, inner), filled_up(b, inner, 32))[:m, :n]
    expect_same(product_of(candidate, a, b), own, "C")


@product.check(
    points=2,
    hint="A matrix that is stored column by column has a step of 1 from row to row. Is there any "
    "place where you take for granted how a matrix is stored?",
    examples=6,
    columns=st.sampled_from(((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))),
    gap=st.sampled_from((0, 3)),
    seed=SEEDS,
)
def matrices_may_be_stored_by_columns(candidate, columns, gap, seed):
    """A, B and C may each be stored column by column, with something else between the columns: C is
    the same as with matrices that are stored row by row."""
    stored = [small(seed, 16, 32), small(seed + 1, 32, 32), unwritten(16, 32)]
    own = product_of(candidate, stored[0], stored[1])
    for i, by_column in enumerate(columns):
        if by_column:
            x = stored[i]
            stored[i] = torch.empty_strided(x.shape, (1, len(x) + gap), dtype=x.dtype).copy_(x)
    expect_same(product_of(candidate, *stored), own, "C")


@product.check(
    points=1,
    hint="To 4096 a float16 can add 4, but not 1. In which type is the sum between two steps along "
    "k, and in which are the products of a tile added?",
    examples=3,
    large=st.sampled_from((4096.0, -8192.0)),
    seed=SEEDS,
)
def sums_are_float32(candidate, large, seed):
    """Small products are not lost where the sum is large already."""
    a, b = small(seed, 16, 16), small(seed + 1, 16, 32)
    a[:, 0], b[0] = 1.0, large
    want = a.double() @ b.double()
    expect_out(product_of(candidate, a, b), want, "C", rtol=0.0, atol=0.25, reveal=False)


product.slip(
    "half_sums",
    HALF_SUMS,
    ("total += tl.dot(a, b)", "total = (total + tl.dot(a, b)).to(tl.float16)"),
)
product.slip(
    "last_step_only",
    "You keep the product of the last step along k. Those of all steps must be added up.",
    ("total += tl.dot(a, b)", "total = tl.dot(a, b)"),
)
product.slip(
    "same_step_again",
    "Every step along k takes the same columns of A and rows of B. They must move on with the "
    "loop.",
    ("along = start + tl.arange", "along = tl.arange"),
    ("down = start + tl.arange", "down = tl.arange"),
)
product.slip(
    "without_strides",
    "You expect matrices that are stored row by row without gaps. Transposed ones are not: use the "
    "strides that you are given.",
    ("row * stride_am + along * stride_ak", "row * k + along"),
    ("down * stride_bk + col * stride_bn", "down * n + col"),
    ("row * stride_cm + col * stride_cn", "row * n + col"),
)
product.slip(
    "strides_swapped",
    "You have mixed up the two strides of A: the first one is the step from a row to the next.",
    ("row * stride_am + along * stride_ak", "row * stride_ak + along * stride_am"),
)
product.slip(
    "axes_swapped",
    "Your rows come from the program's second number and the columns from its first, but the grid "
    "counts tiles from above first.",
    ("row = tl.program_id(0)", "row = tl.program_id(1)"),
    ("col = tl.program_id(1)", "col = tl.program_id(0)"),
)
product.slip(
    "one_tile_for_all",
    "All your programs make the first tile. Each has a tile of its own, whose rows and columns "
    "depend on the program's two numbers.",
    ("row = tl.program_id(0) * BLOCK_M + ", "row = "),
    ("col = tl.program_id(1) * BLOCK_N + ", "col = "),
)
product.slip(
    "no_mask_along_k",
    "Your masks keep to the rows of A and to the columns of B. The last step along k, too, may "
    "reach over an end, and what it meets there enters every sum.",
    ("mask=(row < m) & (along < k)", "mask=(row < m) & (along >= 0)"),
    ("mask=(down < k) & (col < n)", "mask=(down >= 0) & (col < n)"),
)
product.slip(
    "no_mask",
    "Your tiles reach over the edges of the matrices, and you load and store there: masks are "
    "missing.",
    (", mask=(row < m) & (along < k), other=0.0", ""),
    (", mask=(down < k) & (col < n), other=0.0", ""),
    (", mask=(row < m) & (col < n)", ""),
)


@product.accepts("pointers that move along, with the sum handed to the product")
def moving_pointers(
    a_ptr, b_ptr, c_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + i[:, None] * stride_am + s[None, :] * stride_ak
    b_ptrs = b_ptr + s[:, None] * stride_bk + j[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(k, BLOCK_K)):
        left = s < k - step * BLOCK_K
        a = tl.load(a_ptrs, mask=left[None, :] & (i < m)[:, None], other=0.0)
        b = tl.load(b_ptrs, mask=left[:, None] & (j < n)[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    c_ptrs = c_ptr + stride_cm * i[:, None] + stride_cn * j[None, :]
    tl.store(c_ptrs, acc, mask=(i < m)[:, None] & (j < n)[None, :])


@product.accepts("one column of A and one row of B at a time, without tl.dot")
def outer_products(
    a_ptr, b_ptr, c_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for s in range(k):
        a = tl.load(a_ptr + i * stride_am + s * stride_ak, mask=i < m, other=0.0)
        b = tl.load(b_ptr + s * stride_bk + j * stride_bn, mask=j < n, other=0.0)
        acc += a.to(tl.float32)[:, None] * b.to(tl.float32)[None, :]
    at = stride_cm * i[:, None] + stride_cn * j[None, :]
    tl.store(c_ptr + at, acc, mask=(i < m)[:, None] & (j < n)[None, :])


# --- 5. dequantize_matmul_kernel -----------------------------------------------------------------

four_bits = Exercise(
    dequantize_matmul_kernel,
    paper="Frantar et al. 2022 (arXiv 2210.17323), section 4",
    difficulty=3,
    minutes=30,
    decorator=on_copies,
    equivalent={
        "total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  "
        "->  total = tl.zeros((BLOCK_M, BLOCK_N), tl.float16)": REBOUND,
        "w = scale * (codes.to(tl.float32) - zero)  ->  w = scale * (codes - zero)": PROMOTED,
        "w = scale * (codes.to(tl.float32) - zero)  "
        "->  w = scale * (codes.to(tl.float16) - zero)": PROMOTED,
    },
)


def layer_of(
    candidate, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, group: int = 16
) -> Tensor:
    """What the candidate makes of a layer with these codes."""
    (m, k), n = x.shape, len(codes)
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    grid = (up(m, 16), up(n, 16))
    tiles = {"GROUP": group, "BLOCK_M": 16, "BLOCK_N": 16}
    before = (x.contiguous(), packed, scale.contiguous(), zero.contiguous())
    *after, y = candidate(grid, *before, unwritten(m, n), m, n, k, **tiles)
    for name, old, new in zip(("x", "packed", "scale", "zero"), before, after, strict=True):
        expect_unchanged(new, old, name)
    return y


def nibbles(seed: int, n: int, k: int) -> Tensor:
    return torch.from_numpy(values("normal", (n, k), seed)).mul(5).add(8).round().clamp(0, 15).int()


def levels(seed: int, n: int, groups: int) -> tuple[Tensor, Tensor]:
    """Scales that are powers of two and differ from group to group, and zeros between the codes."""
    scale = 2.0 ** data(seed, n, groups, kind="whole").div(4).round()
    return scale, 7.5 + data(seed + 1, n, groups, kind="ties").clamp(-4, 4)


@four_bits.check(
    points=2,
    hint="Two codes are in a byte. How many bytes has a row, in which one is weight 5, and in "
    "which half of it?",
    examples=4,
    group=st.sampled_from((16, 32)),
    seed=SEEDS,
)
def a_byte_has_two_codes(candidate, group, seed):
    """With a scale of 1 and a zero of 0, the weights are the codes, of which a byte has that of an
    even place in its low half and the next one in its high half."""
    x, codes = small(seed, 16, group), nibbles(seed + 1, 16, group)
    ones = torch.ones(16, 1)
    y = layer_of(candidate, x, codes, ones, 0 * ones, group)
    expect_out(y, x.double() @ codes.double().T, "y", rtol=1e-3, atol=1e-3, reveal=False)


@four_bits.check(
    points=2,
    hint="Which number does a code stand for that equals the zero? And one that is larger by 1?",
    examples=4,
    seed=SEEDS,
)
def a_weight_is_scale_times_distance_from_zero(candidate, seed):
    """Where a row is one group and all its codes are the same, each row of weights has its own
    scale and zero."""
    scale, zero = levels(seed, 16, 1)
    x, code = small(seed + 2, 16, 16), nibbles(seed + 3, 16, 1)
    y = layer_of(candidate, x, code.expand(16, 16), scale, zero)
    want = x.double().sum(1)[:, None] * (scale * (code - zero)).double().T
    expect_out(y, want, "y", rtol=2e-3, atol=1e-2, reveal=False)


@four_bits.check(
    points=3,
    hint="Each row of weights has as many scales as it has groups. How many is that, and where is "
    "the scale of row 1, group 0?",
    examples=4,
    groups=st.sampled_from((2, 3)),
    seed=SEEDS,
)
def each_group_has_its_own_scale(candidate, groups, seed):
    """Each group of weights along a row has its own scale and zero: y is the sum of what the groups
    give, each as a layer by itself."""
    scale, zero = levels(seed, 16, groups)
    x, codes = small(seed + 2, 16, 16 * groups), nibbles(seed + 3, 16, 16 * groups)
    parts = [
        as_double(layer_of(candidate, part, some, scale[:, g : g + 1], zero[:, g : g + 1]))
        for g, (part, some) in enumerate(zip(x.split(16, 1), codes.split(16, 1), strict=True))
    ]
    y = layer_of(candidate, x, codes, scale, zero)
    expect_same(y, torch.stack(parts).sum(0), "y", rtol=1e-3)


@four_bits.check(
    points=2,
    hint="The program's first number counts tiles of tokens, the second one tiles of rows of W. On "
    "which of the two does each load depend?",
    examples=4,
    grid=st.sampled_from(((2, 1), (1, 2), (2, 2))),
    seed=SEEDS,
)
def each_program_makes_a_tile(candidate, grid, seed):
    """A grid of programs makes a matrix of tiles, each the same as if it were alone."""
    m, n = 16 * grid[0], 16 * grid[1]
    scale, zero = levels(seed, n, 1)
    x, codes = small(seed + 2, m, 16), nibbles(seed + 3, n, 16)
    first = layer_of(candidate, x[:16], codes[:16], scale[:16], zero[:16])
    last = layer_of(candidate, x[-16:], codes[-16:], scale[-16:], zero[-16:])
    y = layer_of(candidate, x, codes, scale, zero)
    expect_same(y[-16:, -16:], last, "the last tile of y")
    expect_same(y[:16, :16], first, "the first tile of y")
    expect(as_double(y).isfinite(), "y is not written everywhere", got=y)


@four_bits.check(
    points=2,
    hint="A tile may reach over the last token and over the last row of W. Which of the five "
    "matrices end there?",
    examples=6,
    m=st.sampled_from((1, 16, 5, 17)),
    n=st.sampled_from((16, 7, 1, 18)),
    seed=SEEDS,
)
def tokens_and_rows_may_end_within_a_tile(candidate, m, n, seed):
    """There may be any number of tokens and of rows: nothing behind them is touched, and y is the
    same as if more of them followed."""
    rows, tokens = up(n, 16) * 16, up(m, 16) * 16
    scale, zero = levels(seed, rows, 1)
    x, codes = small(seed + 2, tokens, 16), nibbles(seed + 3, rows, 16)
    own = layer_of(candidate, x, codes, scale, zero)[:m, :n]
    expect_same(layer_of(candidate, x[:m], codes[:n], scale[:n], zero[:n]), own, "y")


@four_bits.check(
    points=1,
    hint="To 4096 a float16 can add 4, but not 1. In which type is the sum between two groups?",
    examples=3,
    large=st.sampled_from((4096.0, -8192.0)),
    seed=SEEDS,
)
def sums_do_not_lose_small_products(candidate, large, seed):
    """Small products are not lost where the sum is large already. The weights are all 1."""
    x = small(seed, 16, 16)
    x[:, 0] = large
    ones = torch.ones(16, 1)
    y = layer_of(candidate, x, torch.ones(16, 16, dtype=torch.int32), ones, 0 * ones)
    want = x.double().sum(1)[:, None].expand(16, 16)
    expect_out(y, want, "y", rtol=0.0, atol=0.25, reveal=False)


SCALE = "scale_ptr + col * (k // GROUP) + group"
ZERO = "zero_ptr + col * (k // GROUP) + group"

four_bits.slip(
    "high_half_first",
    "You take the high half of a byte for the even places. The low half comes first.",
    ("down % 2 * 4", "(1 - down % 2) * 4"),
)
four_bits.slip(
    "halves_of_a_row",
    "You take the low halves of all bytes for the first half of the group, and the high halves for "
    "the second. The two codes of a byte are neighbours.",
    ("+ down // 2,", "+ (group * GROUP // 2 + (down - group * GROUP) % (GROUP // 2)),"),
    ("down % 2 * 4", "(down - group * GROUP) // (GROUP // 2) * 4"),
)
four_bits.slip(
    "keeps_the_other_code",
    "You shift, but what was above the code is still there. Only its four bits are to remain.",
    ("byte >> down % 2 * 4 & 15", "byte >> down % 2 * 4"),
)
four_bits.slip(
    "signed_codes",
    "You take 8 off the codes. Where 0 is, the zero says: it is taken off once.",
    ("byte >> down % 2 * 4 & 15", "(byte >> down % 2 * 4 & 15).to(tl.int32) - 8"),
)
four_bits.slip(
    "zero_after_the_scale",
    "You scale first and take off the zero then. The zero is a code: take it off the code, and "
    "scale the difference.",
    ("scale * (codes.to(tl.float32) - zero)", "scale * codes.to(tl.float32) - zero"),
)
four_bits.slip(
    "adds_the_zero",
    "You add the zero. A code that equals it must become a weight of 0.",
    ("codes.to(tl.float32) - zero", "codes.to(tl.float32) + zero"),
)
four_bits.slip(
    "one_scale_for_a_row",
    "You take the scale and the zero of the first group for all groups of a row. Each group has "
    "its own.",
    (SCALE, "scale_ptr + col * (k // GROUP)"),
    (ZERO, "zero_ptr + col * (k // GROUP)"),
)
four_bits.slip(
    "groups_come_first",
    "You look for the scales as if all rows' scales of group 0 came first. They are stored row by "
    "row: all groups of row 0, then those of row 1.",
    (SCALE, "scale_ptr + group * n + col"),
    (ZERO, "zero_ptr + group * n + col"),
)
four_bits.slip(
    "half_sums",
    HALF_SUMS,
    ("total += tl.dot(x, w.to(tl.float16))",
     "total = (total + tl.dot(x, w.to(tl.float16))).to(tl.float16)"),
)  # fmt: skip
four_bits.slip(
    "no_mask",
    "Your tile reaches over the last token or the last row of W, and you load and store there: "
    "masks are missing.",
    ("along, mask=row < m", "along"),
    ("down // 2, mask=col < n", "down // 2"),
    (f"{SCALE}, mask=col < n", SCALE),
    (f"{ZERO}, mask=col < n", ZERO),
    (", mask=(row < m) & (col < n)", ""),
)  # fmt: skip


@four_bits.accepts("low and high halves by themselves, with every other column of x")
def halves_by_themselves(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, y_ptr, m, n, k,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.arange(0, GROUP // 2)
    rows, cols = (i < m)[:, None], (j < n)[None, :]
    groups = k // GROUP
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for g in range(groups):
        at = i[:, None] * k + g * GROUP + 2 * pair[None, :]
        even = tl.load(x_ptr + at, mask=rows, other=0.0).to(tl.float32)
        odd = tl.load(x_ptr + at + 1, mask=rows, other=0.0).to(tl.float32)
        at = j[None, :] * (k // 2) + g * (GROUP // 2) + pair[:, None]
        byte = tl.load(packed_ptr + at, mask=cols, other=0)
        low, high = (byte % 16).to(tl.float32), (byte // 16).to(tl.float32)
        scale = tl.load(scale_ptr + j * groups + g, mask=j < n, other=0.0)[None, :]
        zero = tl.load(zero_ptr + j * groups + g, mask=j < n, other=0.0)[None, :]
        acc += tl.sum(even[:, :, None] * (scale * (low - zero))[None, :, :], axis=1)
        acc += tl.sum(odd[:, :, None] * (scale * (high - zero))[None, :, :], axis=1)
    tl.store(y_ptr + i[:, None] * n + j[None, :], acc, mask=rows & cols)


@four_bits.accepts("scale and zero after the product with the codes")
def scaled_afterwards(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, y_ptr, m, n, k,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, GROUP)
    rows, cols = (i < m)[:, None], (j < n)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for g in range(k // GROUP):
        x = tl.load(x_ptr + i[:, None] * k + g * GROUP + s[None, :], mask=rows, other=0.0)
        at = j[:, None] * (k // 2) + (g * GROUP + s[None, :]) // 2
        byte = tl.load(packed_ptr + at, mask=cols, other=0)
        codes = tl.where(s[None, :] % 2 == 0, byte & 0xF, byte >> 4)
        at = j * (k // GROUP) + g
        scale = tl.load(scale_ptr + at, mask=j < n, other=0.0)
        zero = tl.load(zero_ptr + at, mask=j < n, other=0.0)
        part = tl.dot(x, tl.trans(codes.to(tl.float16)))
        offset = tl.sum(x.to(tl.float32), axis=1)[:, None] * zero[None, :]
        acc += scale[None, :] * (part - offset)
    tl.store(y_ptr + i[:, None] * n + j[None, :], acc, mask=rows & (j < n)[None, :])


# --- 6. split_k_kernel ---------------------------------------------------------------------------

shared_rows = Exercise(
    split_k_kernel,
    paper="Osama et al. 2023 (arXiv 2301.03598), section 3",
    difficulty=2,
    minutes=20,
    decorator=on_copies,
    equivalent={
        "total = tl.zeros((BLOCK_N,), tl.float32)  "
        "->  total = tl.zeros((BLOCK_N,), tl.float16)": REBOUND,
        "… :], mask=inside, other=0.0)  ->  … :], mask=inside, other=1.0)": TIMES_ZERO,
        "… :], mask=inside, other=0.0)  ->  … :], mask=inside, other=-1.0)": TIMES_ZERO,
        "x = tl.load(x_ptr + col, mask=col < k, other=0.0)  "
        "->  x = tl.load(x_ptr + col, mask=col < k, other=1.0)": TIMES_ZERO,
        "x = tl.load(x_ptr + col, mask=col < k, other=0.0)  "
        "->  x = tl.load(x_ptr + col, mask=col < k, other=-1.0)": TIMES_ZERO,
        "total += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None…  "
        "->  total += tl.sum(w * x.to(tl.float32)[None…": PROMOTED,
        "…sum(w.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)  "
        "->  …sum(w.to(tl.float32) * x[None, :], axis=1)": PROMOTED,
        "…float32)[None, :], axis=1)  ->  …float32)[None, :], axis=-1)": LAST_AXIS,
    },
)


def matvec_of(candidate, w: Tensor, x: Tensor, share: int, order: int | None = None) -> Tensor:
    """What the candidate makes of W and x, in tiles of 4 by 4, so many programs for each row."""
    n, k = w.shape
    grid = (up(n, 4), share)
    options = given(seed=order)
    w_after, x_after, y = candidate(
        grid, w, x, torch.zeros(n), n, k, BLOCK_N=4, BLOCK_K=4, **options
    )
    expect_unchanged(w_after, w, "W")
    expect_unchanged(x_after, x, "x")
    return y


def expect_matvec(
    candidate, w: Tensor, x: Tensor, share: int = 1, order: int | None = None
) -> None:
    want = w.double() @ x.double()
    got = matvec_of(candidate, w, x, share, order)
    expect_close(got, want, "y", rtol=1e-5, atol=1e-4, reveal=True)


@shared_rows.check(
    points=2,
    hint="One program for a few rows, without any help: it walks along k to the end. What does it "
    "keep from tile to tile?",
    examples=5,
    rows=st.integers(1, 2),
    tiles=st.integers(1, 3),
    seed=SEEDS,
)
def one_program_walks_all_the_way(candidate, rows, tiles, seed):
    """Where nobody shares a row, each program makes its elements of W x alone."""
    w = data(seed, 4 * rows, 4 * tiles, kind="whole")
    expect_matvec(candidate, w, data(seed + 1, 4 * tiles, kind="whole"))


@shared_rows.check(
    points=3,
    hint="Two programs have a part of the same sum, and they run at the same time. What may happen "
    "between the moment when one of them reads y and the moment when it writes?",
    examples=6,
    share=st.integers(2, 3),
    each=st.integers(1, 2),
    seed=SEEDS,
    order=ORDERS,
)
def several_programs_share_the_rows(candidate, share, each, seed, order):
    """Several programs add up W x in any order, each with as many tiles as the others."""
    k = 4 * share * each
    w, x = data(seed, 4, k, kind="whole"), data(seed + 1, k, kind="whole")
    expect_matvec(candidate, w, x, share, order)


@shared_rows.check(
    points=2,
    hint="Seven tiles for three programs: who takes which? And what does the fourth of four "
    "programs do if there are three tiles?",
    examples=7,
    share=st.integers(2, 4),
    tiles=st.sampled_from((1, 3, 5, 2)),
    seed=SEEDS,
)
def tiles_need_not_come_out_even(candidate, share, tiles, seed):
    """Some programs may have a tile more than others, and some none at all: y is the same as with
    tiles of zeros that make it come out even."""
    w, x = data(seed, 4, 4 * tiles, kind="whole"), data(seed + 1, 1, 4 * tiles, kind="whole")
    even = up(tiles, share) * share * 4
    own = matvec_of(candidate, filled_up(w, 4, even), filled_up(x, 1, even)[0], share)
    expect_same(matvec_of(candidate, w, x[0], share), own, "y")


@shared_rows.check(
    points=2,
    hint="The last tile reaches over the end of a row: what is there in memory? And the last "
    "program reaches over the end of y.",
    examples=8,
    n=st.sampled_from((4, 3, 5, 1)),
    k=st.sampled_from((8, 6, 3, 1)),
    seed=SEEDS,
)
def both_sizes_may_end_within_a_tile(candidate, n, k, seed):
    """Neither size need be a multiple of its tile's: nothing outside is touched, and y is the same
    as with zeros behind the rows and columns."""
    w = data(seed, n, k, kind="whole").abs() + 1
    x = data(seed + 1, 1, k, kind="whole").abs() + 1
    rows, inner = up(n, 4) * 4, up(k, 4) * 4
    own = matvec_of(candidate, filled_up(w, rows, inner), filled_up(x, 1, inner)[0], 1)[:n]
    expect_same(matvec_of(candidate, w, x[0], 1), own, "y")


@shared_rows.check(
    points=1,
    hint="Memory may have float16, and y is float32. Where on the way do numbers become wider, and "
    "does any of them become narrower?",
    examples=6,
    seed=SEEDS,
    half=st.booleans(),
)
def products_are_summed_in_float32(candidate, seed, half):
    """Whether weights and inputs are float16 or float32, their products are summed in float32."""
    dtype = torch.float16 if half else torch.float32
    w, x = data(seed, 4, 4, dtype=dtype), data(seed + 1, 4, dtype=dtype)
    if half:
        w[:, 0], x[0] = 300.0, 300.0
    expect_matvec(candidate, w, x)


shared_rows.slip(
    "all_of_k",
    "Each of your programs walks along all of k, so that the result is counted as often as there "
    "are programs for a row. They are to share the tiles.",
    ("range(tl.program_id(1) * BLOCK_K, k, tl.num_programs(1) * BLOCK_K)", "range(0, k, BLOCK_K)"),
)
shared_rows.slip(
    "every_tile_from_there_on",
    "Your programs start at different tiles, but each takes every tile from there on, and those "
    "at the end are counted several times. A step is as many tiles as there are programs.",
    ("tl.num_programs(1) * BLOCK_K", "BLOCK_K"),
)
shared_rows.slip(
    "first_tile_only",
    "Each of your programs takes one tile and stops. There may be more tiles than programs.",
    ("range(tl.program_id(1) * BLOCK_K, k, tl.num_programs(1) * BLOCK_K)",
     "range(tl.program_id(1) * BLOCK_K, tl.program_id(1) * BLOCK_K + 1, BLOCK_K)"),
)  # fmt: skip
shared_rows.slip(
    "drops_the_rest",
    "You cut k into as many equal parts as there are programs, rounded down: what is left over at "
    "the end belongs to nobody, and a part may end within a tile.",
    ("range(tl.program_id(1) * BLOCK_K, k, tl.num_programs(1) * BLOCK_K)",
     "range(tl.program_id(1) * (k // tl.num_programs(1)), "
     "(tl.program_id(1) + 1) * (k // tl.num_programs(1)), BLOCK_K)"),
)  # fmt: skip
shared_rows.slip(
    "same_rows_for_all",
    "All your programs have the first rows. The program's first number says which rows it has.",
    ("tl.program_id(0) * BLOCK_N + ", ""),
)
shared_rows.slip(
    "no_atomic",
    "Several programs write the same elements of y, and what one of them stores is lost when the "
    "next one stores. It does not help to load y and add to it first: another program may store "
    "in between.",
    ("tl.atomic_add", "tl.store"),
)
shared_rows.slip(
    "half_sums",
    HALF_SUMS,
    ("total += tl.sum", "total = (total + tl.sum"),
    ("[None, :], axis=1)", "[None, :], axis=1)).to(tl.float16)"),
)
shared_rows.slip(
    "no_mask_along_k",
    "Your masks keep to the rows. The last tile may reach over the end along k as well: there the "
    "next row of W begins.",
    ("inside = (row[:, None] < n) & (col[None, :] < k)",
     "inside = (row[:, None] < n) & (col[None, :] >= 0)"),
    ("mask=col < k", "mask=col >= 0"),
)  # fmt: skip
shared_rows.slip(
    "no_mask",
    "Your tiles reach over the end of W, x and y, and you load and add there: masks are missing.",
    (", mask=inside, other=0.0", ""),
    (", mask=col < k, other=0.0", ""),
    (", mask=row < n", ""),
)


@shared_rows.accepts("each program has tiles that follow one another")
def tiles_in_a_row(w_ptr, x_ptr, y_ptr, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    each = tl.cdiv(tl.cdiv(k, BLOCK_K), tl.num_programs(1))
    part = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for tile in range(tl.program_id(1) * each, (tl.program_id(1) + 1) * each):
        j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (i < n)[:, None] & (j < k)[None, :]
        w = tl.load(w_ptr + i[:, None] * k + j[None, :], mask=inside, other=0)
        x = tl.load(x_ptr + j, mask=j < k, other=0)
        part += w.to(tl.float32) * x.to(tl.float32)[None, :]
    tl.atomic_add(y_ptr + i, tl.sum(part, axis=1), mask=i < n)


@shared_rows.accepts("adds to y after each tile")
def adds_after_each_tile(w_ptr, x_ptr, y_ptr, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    first, step = tl.program_id(1) * BLOCK_K, tl.num_programs(1) * BLOCK_K
    while first < k:
        j = first + tl.arange(0, BLOCK_K)[None, :]
        w = tl.load(w_ptr + i * k + j, mask=(i < n) & (j < k), other=0).to(tl.float32)
        x = tl.load(x_ptr + j, mask=j < k, other=0).to(tl.float32)
        part = tl.sum(w * x, axis=1, keep_dims=True)
        tl.atomic_add(y_ptr + i, part, mask=i < n, sem="relaxed")
        first += step


# --- 7. hadamard_kernel --------------------------------------------------------------------------

butterflies = Exercise(
    hadamard_kernel,
    paper="Pease 1968 (JACM 15); Ashkboos et al. 2024 (arXiv 2404.00456), section 4",
    difficulty=3,
    minutes=25,
    decorator=on_copies,
)

LENGTHS = st.sampled_from((4, 8, 2, 16))


def hadamard(n: int) -> Tensor:
    """The matrix, with its rows in the order of Sylvester."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def transformed(candidate, x: Tensor) -> Tensor:
    after, out = candidate(len(x), x, unwritten(*x.shape, dtype=x.dtype), n=x.shape[1])
    expect_unchanged(after, x, "x")
    return out


@butterflies.check(
    points=2,
    hint="Of two numbers there is a sum and a difference. Which of them comes first, and what is "
    "taken off what?",
    examples=5,
    seed=SEEDS,
    kind=KINDS,
)
def two_become_their_sum_and_difference(candidate, seed, kind):
    """Rows of length 2 become their sum and their difference, but for a factor: the one by which
    the row 1, 0 becomes two equal numbers."""
    x = data(seed, 1, 2, kind=kind)
    factor = as_double(transformed(candidate, torch.tensor([[1.0, 0.0]])))[0, 0]
    expect(factor > 0, "the first element of what the row 1, 0 becomes is not positive", got=factor)
    want = factor * torch.stack([x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], 1)
    expect_out(transformed(candidate, x), want, "out", atol=1e-5)


@butterflies.check(
    points=2,
    hint="How much longer does one step make a vector, and how many steps are there? By what must "
    "you divide at the end?",
    examples=6,
    n=LENGTHS,
    seed=SEEDS,
    kind=KINDS,
)
def lengths_stay(candidate, n, seed, kind):
    """The sum of a row's squares stays what it was."""
    x = data(seed, 1, n, kind=kind)
    out = as_double(transformed(candidate, x))
    square = x.double().square().sum()
    expect_close(out.square().sum(), square, "the sum of squares", rtol=1e-4, reveal=True)


@butterflies.check(
    points=3,
    hint="Follow a single 1 at the place 1 of a row of four, on paper. Each step must take on "
    "another bit of the place, and at the end every bit must be where it was.",
    examples=8,
    n=st.sampled_from((4, 8, 16)),
    place=st.integers(0, 15),
    size=st.sampled_from((1.0, 2.0, 0.5)),
)
def signs_are_those_of_the_matrix(candidate, n, place, size):
    """A row that is 0 but at the place i becomes row i of the Hadamard matrix in Sylvester's order,
    times one positive number."""
    x = size * torch.eye(n)[place % n][None]
    out = as_double(transformed(candidate, x))
    factor = out[0, 0].abs()
    expect(factor > 0, "the first element is 0", got=out)
    expect_out(out, factor * hadamard(n)[place % n][None], "out")


@butterflies.check(
    points=2,
    hint="Which elements of memory belong to program 2?",
    examples=4,
    rows=st.integers(2, 3),
    n=st.sampled_from((2, 4, 8)),
    seed=SEEDS,
)
def every_row_has_a_program(candidate, rows, n, seed):
    """Several rows are transformed each by itself, as it would be alone."""
    x = data(seed, rows, n, kind="whole")
    alone = torch.cat([as_double(transformed(candidate, row[None])) for row in x])
    expect_same(transformed(candidate, x), alone, "out")


@butterflies.check(
    points=1,
    hint="Two numbers fit into a float16 and their sum does not. In which type are the steps?",
    examples=4,
    n=st.sampled_from((4, 8)),
    large=st.sampled_from((40_000.0, -35_000.0)),
    at=st.integers(0, 2),
)
def steps_are_in_float32(candidate, n, large, at):
    """A row of float16 becomes what it becomes in float32, rounded, though a float16 may not hold
    the sums on the way."""
    x = torch.zeros(1, n, dtype=torch.float16)
    x[0, at : at + 2] = large
    own = as_double(transformed(candidate, x.float())).half()
    expect(~own.isnan(), "out is not written everywhere", got=own)
    expect_out(transformed(candidate, x), own, "out", rtol=2e-3, atol=1e-3)


butterflies.slip(
    "steps_in_half",
    "You do the steps in the type of x. In half precision a sum of two numbers may be too large "
    "for it, though the result is not.",
    (".to(tl.float32)", ""),
)
butterflies.slip(
    "not_divided",
    "Sums and differences make a vector longer, by the root of n in all: you do not divide by it.",
    ("x / n ** 0.5", "x"),
)
butterflies.slip(
    "divided_by_n",
    "You divide by n. That would be right after transforming twice; once, it is the root of n.",
    ("x / n ** 0.5", "x / n"),
)
butterflies.slip(
    "second_minus_first",
    "Your differences are the second minus the first: it is the other way round.",
    ("even - odd", "odd - even"),
)
butterflies.slip(
    "one_step_only",
    "You do one step. One step takes sums and differences of pairs; it takes log2 n of them until "
    "each element depends on all.",
    ("while done < n", "while done < 2"),
)
butterflies.slip(
    "one_step_too_few",
    "You do one step less than it takes. There are log2 n of them: 2 for a length of 4.",
    ("while done < n", "while done < n // 2"),
)
butterflies.slip(
    "same_pairs_again",
    "Sums and differences go back to the places of their pair, so that the next step has the same "
    "pairs again. The sums must come first and the differences behind them all.",
    ("tl.trans(tl.join(even + odd, even - odd))", "tl.join(even + odd, even - odd)"),
)
butterflies.slip(
    "one_row_for_all",
    "All your programs have the first row: they race for its elements, and nobody does the others.",
    ("tl.program_id(0) * n + ", ""),
)


@butterflies.accepts("the matrix of signs, made from the bits that two places share")
def matrix_of_signs(x_ptr, out_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.load(x_ptr + tl.program_id(0) * n + i).to(tl.float32)
    both = i[:, None] & i[None, :]
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    both = both ^ (both >> 4)
    signs = 1 - 2 * (both & 1)
    out = tl.sum(signs * x[None, :], axis=1) * (1.0 / n**0.5)
    tl.store(out_ptr + tl.program_id(0) * n + i, out)


@butterflies.accepts("first half plus and minus second half, interleaved")
def first_and_second_half(x_ptr, out_ptr, n: tl.constexpr):
    i = tl.program_id(0) * n + tl.arange(0, n)
    x = tl.load(x_ptr + i).to(tl.float32)
    half = n
    while half > 1:
        first, second = tl.split(tl.trans(tl.reshape(x, (2, n // 2))))
        x = tl.reshape(tl.join(first + second, first - second), (n,))
        x = x * 0.7071067811865476
        half = half // 2
    tl.store(out_ptr + i, x)


# --- 8. decode_attention_kernel ------------------------------------------------------------------

decode = Exercise(
    decode_attention_kernel,
    paper="Dao et al. 2022 (arXiv 2205.14135), section 3.1; Ainslie et al. 2023 (arXiv 2305.13245)",
    difficulty=3,
    minutes=35,
    decorator=on_copies,
    equivalent={
        "…q_ptr + head * DIM + dim).to(tl.float32) / DIM ** 0.5  "
        "->  …q_ptr + head * DIM + dim) / DIM ** 0.5": DIVIDED,
        "total = 0.0  ->  total = 1.0": FIRST_TILE,
        "total = 0.0  ->  total = -1.0": FIRST_TILE,
        "out = tl.zeros((DIM,), tl.float32)  ->  out = tl.zeros((DIM,), tl.float16)": REBOUND,
        "…inside[:, None], other=0.0).to(tl.float32)  ->  …inside[:, None], other=0.0)": PROMOTED,
        "…at, mask=inside[:, None], other=0.0).to(tl.float32)  "
        "->  …at, mask=inside[:, None]).to(tl.float32)": HIDDEN,
        "…mask=inside[:, None], other=0.0).to(tl.float32)  "
        "->  …mask=inside[:, None], other=1.0).to(tl.float32)": HIDDEN,
        "…mask=inside[:, None], other=0.0).to(tl.float32)  "
        "->  …mask=inside[:, None], other=-1.0).to(tl.float32)": HIDDEN,
        "…inside[:, None], other=0.0).to(tl.float32)  "
        "->  …inside[:, None], other=0.0)  (2)": PROMOTED,
        "…mask=inside[:, None], other=0.0).to(tl.float32)  "
        "->  …mask=inside[:, None], other=1.0).to(tl.float32)  (2)": TIMES_ZERO,
        "…mask=inside[:, None], other=0.0).to(tl.float32)  "
        "->  …mask=inside[:, None], other=-1.0).to(tl.float32)  (2)": TIMES_ZERO,
        "…sum(k * q[None, :], axis=1), -float('inf'))  "
        "->  …sum(k * q[None, :], axis=-1), -float('inf'))": LAST_AXIS,
    },
)


def attended(candidate, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    (heads, dim), (kv_heads, tokens, _) = q.shape, k.shape
    sizes = (tokens, heads // kv_heads)
    out = unwritten(heads, dim, dtype=q.dtype)
    *after, out = candidate(heads, q, k, v, out, *sizes, DIM=dim, BLOCK=block)
    for name, old, new in zip("qkv", (q, k, v), after, strict=True):
        expect_unchanged(new, old, name)
    return out


def preferring(seed: int, heads: int, dim: int) -> Tensor:
    """Queries that score keys apart."""
    return 2 * data(seed, heads, dim)


def cache(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    return data(seed, *shape), data(seed + 1, *shape)


@decode.check(
    points=2,
    hint="A query of zeros scores all keys alike. What weight has each token then, and what is the "
    "sum of values with these weights?",
    examples=4,
    heads=st.integers(1, 2),
    tokens=st.sampled_from((2, 4, 1)),
    dim=st.sampled_from((4, 2, 8)),
    seed=SEEDS,
)
def a_query_of_zeros_gets_the_mean(candidate, heads, tokens, dim, seed):
    """Where no key is preferred, each head gets the mean of its values."""
    k, v = cache(seed, heads, tokens, dim)
    out = attended(candidate, torch.zeros(heads, dim), k, v, tokens)
    expect_out(out, v.double().mean(1), "out", rtol=1e-4, atol=1e-5)


@decode.check(
    points=2,
    hint="How is a score made from a query and a key, and what is it divided by, so that it does "
    "not grow with the number of dimensions?",
    examples=5,
    heads=st.integers(1, 2),
    tokens=st.sampled_from((4, 2)),
    dim=st.sampled_from((4, 2, 8)),
    seed=SEEDS,
)
def weights_are_the_softmax_of_scores(candidate, heads, tokens, dim, seed):
    """The weights of the values are to each other as the exponentials of the scores: of query times
    key, divided by the root of DIM. The first element of each value is 1 here, and out is compared
    divided by its first element, so that the sum of the weights does not matter."""
    q, (k, v) = preferring(seed + 2, heads, dim), cache(seed, heads, tokens, dim)
    v[..., 0] = 1.0
    weights = ((k.double() @ q.double()[:, :, None])[..., 0] / dim**0.5).softmax(1)
    want = (weights[:, None] @ v.double())[:, 0]
    out = as_double(attended(candidate, q, k, v, tokens))
    ratio = out / out[:, :1]
    expect_out(
        ratio, want, "out, divided by its first element,", rtol=1e-4, atol=1e-5, reveal=False
    )


@decode.check(
    points=3,
    hint="The maximum grew from one tile to the next. Which two things were made with the old one, "
    "and by which factor are they too large?",
    examples=5,
    tokens=st.sampled_from((4, 8)),
    tiles=st.sampled_from((2, 4)),
    seed=SEEDS,
)
def tokens_may_take_several_tiles(candidate, tokens, tiles, seed):
    """The result does not depend on the tiles: several give what a single one gives."""
    q, (k, v) = preferring(seed + 2, 1, 4), cache(seed, 1, tokens, 4)
    own = attended(candidate, q, k, v, tokens)
    expect_same(attended(candidate, q, k, v, tokens // tiles), own, "out", rtol=1e-4)


@decode.check(
    points=2,
    hint="The last tile reaches over the last token. What score do places have that are none, "
    "and what is the exponential of that?",
    examples=6,
    heads=st.integers(1, 2),
    tokens=st.sampled_from((3, 1, 5, 6)),
    block=st.sampled_from((4, 8)),
    seed=SEEDS,
)
def tokens_may_end_within_a_tile(candidate, heads, tokens, block, seed):
    """What lies behind the last token has no weight, and is not touched: a query of zeros gets the
    mean of the tokens that there are."""
    k, v = cache(seed, heads, tokens, 4)
    out = attended(candidate, torch.zeros(heads, 4), k, v, block)
    expect_out(out, v.double().mean(1), "out", rtol=1e-4, atol=1e-5)


@decode.check(
    points=2,
    hint="Six query heads and two key heads: which key head has query head 0, which query head 3?",
    examples=4,
    kv_heads=st.sampled_from((2, 3)),
    group=st.sampled_from((2, 3)),
    seed=SEEDS,
)
def heads_share_keys(candidate, kv_heads, group, seed):
    """Query heads that follow one another share a key head: each gets what it gets alone, with
    the key head of its group."""
    q, (k, v) = preferring(seed + 2, kv_heads * group, 4), cache(seed, kv_heads, 4, 4)
    heads = {group - 1: 0, group: 1, len(q) - 1: kv_heads - 1}
    alone = {
        head: attended(candidate, q[head][None], k[shared][None], v[shared][None], 4)[0]
        for head, shared in heads.items()
    }
    out = attended(candidate, q, k, v, 4)
    for head, own in alone.items():
        expect_same(out[head], own, f"head {head}", rtol=1e-4)


@decode.check(
    points=1,
    hint="Scores may be hundreds, of either sign. What must be subtracted before the exponential, "
    "and with what must it start?",
    examples=8,
    tiles=st.integers(1, 3),
    shift=st.sampled_from((-300.0, 300.0)),
    slope=st.sampled_from((0.0, 30.0, -30.0)),
    seed=SEEDS,
    half=st.booleans(),
)
def large_scores_do_not_overflow(candidate, tiles, shift, slope, seed, half):
    """Scores may be large, of either sign, and far apart, also in half precision; and if all grow
    by the same, nothing changes."""
    k = data(seed, 1, 2 * tiles, 4, kind="whole")
    q, v = torch.tensor([[4.0, 0.25, -0.25, 0.0]]), data(seed + 1, 1, 2 * tiles, 4)
    k[..., 0] = slope * (torch.arange(2 * tiles) // 2)
    own = attended(candidate, q, k, v, 2)
    k[..., 0] += shift
    if half:
        q, k, v = q.half(), k.half(), v.half()
    got = attended(candidate, q, k, v, 2)
    expect_same(got, own, "out", rtol=2e-3 if half else 1e-4)
    expect(as_double(got).isfinite(), "out is not finite", got=got)


decode.slip(
    "not_divided",
    "You add up weighted values, but never divide by the sum of the weights.",
    ("out / total", "out"),
)
decode.slip(
    "scores_are_not_scaled",
    "You take the products of query and keys as they are. They are divided by the root of DIM.",
    (" / DIM ** 0.5", ""),
)
decode.slip(
    "divided_by_dim",
    "You divide the scores by DIM. It is the root of DIM.",
    (" / DIM ** 0.5", " / DIM"),
)
decode.slip(
    "values_are_not_corrected",
    "When the maximum grows, you correct the sum of the weights. The weighted values so far were "
    "made with the old maximum, too.",
    ("out * shrink", "out"),
)
decode.slip(
    "sum_is_not_corrected",
    "When the maximum grows, you correct the weighted values. The sum of the weights so far was "
    "made with the old maximum, too.",
    ("total * shrink", "total"),
)
decode.slip(
    "last_tile_only",
    "You keep the last tile alone: what came before it must be corrected and added to.",
    ("total * shrink + ", ""),
    ("out * shrink + ", ""),
)
decode.slip(
    "padding_has_weight",
    "Where the last tile has no tokens, your scores are 0, and the exponential of 0 minus the "
    "maximum is a weight. A score of minus infinity has none.",
    ("tl.where(inside, tl.sum(k * q[None, :], axis=1), -float('inf'))",
     "tl.sum(k * q[None, :], axis=1)"),
)  # fmt: skip
decode.slip(
    "no_mask",
    "Your last tile reaches over the last token, and you load what is behind it: a mask is "
    "missing.",
    ("k_ptr + at, mask=inside[:, None], other=0.0", "k_ptr + at"),
    ("v_ptr + at, mask=inside[:, None], other=0.0", "v_ptr + at"),
)
decode.slip(
    "a_key_head_for_each",
    "You give each query head a key head of its own. There are fewer of those: as many query "
    "heads as a group has share one.",
    ("head // group", "head"),
)
decode.slip(
    "heads_take_turns",
    "Your query heads take the key heads in turn. Those that follow one another share one.",
    ("head // group", "head % (tl.num_programs(0) // group)"),
)
decode.slip(
    "starts_at_zero",
    "Your maximum starts at 0. If all scores are far below it, every weight is 0. Start with what "
    "is smaller than all numbers.",
    ("largest = -float('inf')", "largest = 0.0"),
)
decode.slip(
    "no_maximum",
    "You take the exponential of the scores as they are. That of 89 is larger than any float32: "
    "subtract the running maximum first.",
    ("larger = tl.maximum(largest, tl.max(scores))", "larger = 0.0"),
)


@decode.accepts("two sweeps: softmax first, then the values")
def two_sweeps(q_ptr, k_ptr, v_ptr, out_ptr, tokens, group, DIM: tl.constexpr, BLOCK: tl.constexpr):
    h = tl.program_id(0)
    d = tl.arange(0, DIM)
    q = tl.load(q_ptr + h * DIM + d).to(tl.float32)
    first = (h // group) * tokens
    top = -float("inf")
    for t in range(tokens):
        k = tl.load(k_ptr + (first + t) * DIM + d).to(tl.float32)
        top = tl.maximum(top, tl.sum(k * q))
    total = 0.0
    out = tl.zeros((DIM,), dtype=tl.float32)
    for t in range(tokens):
        k = tl.load(k_ptr + (first + t) * DIM + d).to(tl.float32)
        v = tl.load(v_ptr + (first + t) * DIM + d).to(tl.float32)
        weight = tl.exp((tl.sum(k * q) - top) / DIM**0.5)
        total += weight
        out += weight * v
    tl.store(out_ptr + h * DIM + d, out / total)


@decode.accepts("the result so far is a mean, moved by each tile; base 2")
def running_mean(
    q_ptr, k_ptr, v_ptr, out_ptr, tokens, group, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    h = tl.program_id(0)
    d = tl.arange(0, DIM)[None, :]
    q = tl.load(q_ptr + h * DIM + d).to(tl.float32) * (1.4426950408889634 / DIM**0.5)
    lse = -float("inf")
    mean = tl.zeros((1, DIM), dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        t = start + tl.arange(0, BLOCK)[:, None]
        at = ((h // group) * tokens + t) * DIM + d
        k = tl.load(k_ptr + at, mask=t < tokens, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=t < tokens, other=0.0).to(tl.float32)
        scores = tl.sum(k * q, axis=1, keep_dims=True) + tl.where(t < tokens, 0.0, -float("inf"))
        top = tl.maximum(tl.max(scores), lse)
        weights = tl.exp2(scores - top)
        old = tl.exp2(lse - top)
        total = old + tl.sum(weights)
        mean = mean * (old / total) + tl.sum(weights * v, axis=0, keep_dims=True) / total
        lse = top + tl.log2(total)
    tl.store(out_ptr + h * DIM + d, mean)
