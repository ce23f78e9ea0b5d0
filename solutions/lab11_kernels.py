# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lab 11. GPU kernels in Triton
#
# A GPU computes much faster than it reads. An H100 reads 3.35 TB from its memory in a second, and does 989 · 10¹²
# operations on 16-bit numbers in the same second (NVIDIA's data sheet, SXM, dense). That is 295 operations in the
# time of one byte. A model that writes one token needs about one operation for each byte of its weights (lab 9). So
# fewer bits, a smaller cache, and all the rest of this course pay only if fewer **bytes move**. Whether they do is
# decided in the *kernel*: the program that runs on the GPU.
#
# In this lab you write eight kernels, from a sum of two vectors to attention over a cache. The question is always the
# same:
# **which program touches which bytes, and how often?**
#
# Each exercise is *picture → equation → your code → check*. Fill in a function, run its cell, run the check below it.
# You may check as often as you like, and a mistake in one exercise never costs another.
#
# **You need no GPU.** The language is *Triton* (Tillet et al. 2019): Python whose values are tiles of numbers. Triton
# comes with an *interpreter*, which runs kernels on the CPU, with numpy, one program after the other. We have put an
# observer beside it, which sees every load and every store.
#
# | | shown here | not shown here |
# |---|---|---|
# | results | yes, on any size of tile | the last digits may differ: a GPU sums in another order |
# | memory | every byte: who loads it, who stores it, how often | caches; which loads are served together |
# | mistakes | a program outside of its tensors; two that race | what the compiler refuses |
# | speed | **nothing at all** | measured on an H100, at the end |

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # kernels run in the interpreter, also where there is a GPU
from autograder import check

# %% tags=["demo"]
import inspect
import json
import math
import textwrap
import time
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from torch.overrides import TorchFunctionMode

import fewer
import fewer.kernels.simple as library
from fewer.kernels.interpreter import OutOfBounds, Race, on_copies, watched
from fewer.plots import GREY, GRID, INK, PALETTE, RULE, direct_label, figure, frame, log_axis, style
from fewer.sizes import sized

import triton  # after fewer.kernels.interpreter, which gets the interpreter ready
import triton.language as tl

style()
torch.manual_seed(0)
COLORS = [PALETTE[name] for name in ("blue", "vermilion", "green", "amber", "purple", "sky")]
PALE = [0.45 * np.array(to_rgb(color)) + 0.55 for color in COLORS]
SHADES = np.array([*PALE, to_rgb(RULE), to_rgb("#F4F5F7")])  # -2: several programs, -1: nobody


def launch(kernel, grid, *arguments, memory=None, **constants):
    """Run a kernel on these very tensors, and return the Trace of who touched what."""
    names = inspect.signature(kernel).parameters
    pairs = zip(names, arguments, strict=False)
    given = {name.removesuffix("_ptr"): x for name, x in pairs if torch.is_tensor(x)}
    with watched(memory or given) as trace, np.errstate(all="ignore"):
        triton.jit(kernel.__wrapped__)[grid](*arguments, **constants)
    return trace


def cells(ax, owners, title, words=None):
    """A tensor as a grid. Each element has the colour of its program."""
    owners = torch.atleast_2d(owners).numpy()
    rows, cols = owners.shape
    ax.imshow(SHADES[np.where(owners < 0, owners, owners % len(COLORS))])
    if max(rows, cols) <= 32:  # more would be a blur
        width = 1.2 if max(rows, cols) <= 24 else 0.4
        ax.hlines(np.arange(1, rows) - 0.5, -0.5, cols - 0.5, color="white", linewidth=width)
        ax.vlines(np.arange(1, cols) - 0.5, -0.5, rows - 0.5, color="white", linewidth=width)
    for (row, col), word in np.ndenumerate(np.array(words if words is not None else [[]])):
        ax.text(col, row, word, ha="center", va="center", fontsize=7)
    ax.set_title(title, fontsize=9, fontweight="normal", pad=4)
    ax.axis("off")


def outline(ax, row, col, rows, cols, **options):
    corner = (col - 0.5, row - 0.5)
    ax.add_patch(
        plt.Rectangle(
            corner, cols, rows, fill=False, **{"ec": INK, "lw": 1.6, "zorder": 5, **options}
        )
    )


def note(fig, text):
    """Small grey print below a figure of several panels."""
    wrapped = textwrap.fill(text, int(fig.get_size_inches()[0] * 17))
    fig.supxlabel(wrapped, x=0.02, ha="left", fontsize=7, color=GREY, linespacing=1.4)


def headline(fig, text):
    fig.suptitle(text, x=0.02, ha="left", fontsize=11, fontweight="bold")


class Moved(TorchFunctionMode):
    """Counts what plain torch moves: each operation loads its tensors and stores its result."""

    bytes = 0

    def __torch_function__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in (result, *args) if torch.is_tensor(x)]
        memory = [x.untyped_storage().data_ptr() for x in tensors]
        if torch.is_tensor(result) and memory[0] not in memory[1:]:  # else: the same bytes
            self.bytes += sum(x.nbytes for x in tensors)
        return result


def moved(function, *arguments):
    with Moved() as counter:
        function(*arguments)
    return counter.bytes


# %% [markdown]
# ## 11.1 A program, a tile, a mask
#
# A kernel is the program of **one tile**. You *launch* it with a *grid*: with a grid of 3, three copies of the
# program run, in no order that you can rely on, or at the same time. All get the same arguments. Each can ask for its
# number, and from the number it finds its tile. Here is a whole kernel, which doubles the numbers of a vector in
# their place:


# %% tags=["demo"]
@on_copies
def double_kernel(x_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0)  # which one am I? 0, 1, 2, ...
    at = program * BLOCK + tl.arange(0, BLOCK)  # the places of my tile: a tile of numbers
    x = tl.load(x_ptr + at)  # from memory: a tile of numbers
    tl.store(x_ptr + at, 2 * x)  # to memory


x = torch.arange(12.0)
after = double_kernel(3, x, BLOCK=4)[0]  # three programs, of four elements each
print(after.tolist())

# %% [markdown]
# Read it line by line:
#
# - `x_ptr` is a *pointer*: the address of the tensor's first element. `x_ptr + at` is a tile of addresses. One counts
#   in elements, not in bytes, and the tensor's shape is not known to the kernel.
# - `BLOCK` is a `tl.constexpr`: known when the kernel is compiled. The shape of a tile must be such a constant, and a
#   power of two.
# - `tl.load` brings a tile from memory into the program's own registers, where arithmetic is cheap. `tl.store` writes
#   one back.
# - `@on_copies` is ours. It makes the kernel a function: `kernel(grid, *arguments, **constants)` launches it on
#   *copies* of the tensors, under the observer, and returns the copies, all and in order. With `seed=1` the programs
#   run in another order. (In Triton itself one writes `kernel[grid](*arguments)`, and the tensors are changed.)
# - In the interpreter you may `print(at)` in the middle of a kernel. A GPU would not do you that favour.
#
# And if the vector has eleven elements? The last of the three tiles reaches over its end.

# %% tags=["demo"]
try:
    double_kernel(3, torch.arange(11.0), BLOCK=4)
except OutOfBounds as error:
    print(f"OutOfBounds: {error}")

# %% [markdown]
# On a GPU nobody would have told you. What lies there belongs to somebody else. It may be read, it may be
# overwritten, or the whole process ends. So loads and stores take a *mask*, a tile of true and false: where it is
# false, nothing is touched. `tl.load(pointers, mask=inside, other=0.0)` puts `other` there; without `other`, it is
# anything at all.
#
# Your first kernel adds two vectors. Here is who touches what, as the observer saw it.

# %% tags=["demo"]
n, BLOCK = 11, 4
vectors = [torch.zeros(16) for _ in range(3)]  # each is 11 elements and 5 of somebody else
trace = launch(library.add_kernel, (3,), *vectors, n, BLOCK=BLOCK)
fig, axes = plt.subplots(3, 1, figsize=(7.4, 2.7))
for ax, name, owners in zip(
    axes,
    ("x", "y", "out"),
    (trace.reader("x"), trace.reader("y"), trace.writer("out")),
    strict=True,
):
    words = [[str(i) if i < n else "" for i in range(16)]]
    cells(ax, owners, "", words)
    ax.text(
        -0.9, 0, f"{name} {'stored' if name == 'out' else 'loaded'} by", ha="right", va="center"
    )
    for p in range(3):
        outline(ax, 0, p * BLOCK, 1, BLOCK)
for p in range(3):
    axes[0].text(p * BLOCK + 1.5, -0.8, f"program {p}", ha="center", fontsize=8, color=COLORS[p])
axes[0].text(13.5, -0.8, "somebody else's", ha="center", fontsize=8, color=GREY)
headline(fig, "Each program has a tile; the mask cuts off the last one")
note(
    fig,
    f"n = {n}, BLOCK = {BLOCK}. Frames: tiles. Colours: who touched it, as observed in the interpreter.",
)
plt.show()

# %% [markdown]
# Program $p$ has the places $i = p B, \dots, (p + 1) B - 1$, with $B$ for `BLOCK`, and
#
# $$
# \text{out}_i = x_i + y_i \qquad \text{for all of its places with } i < n .
# $$
#
# **Words of Triton** that you need in this lab. `a`, `b` are tiles:
#
# | | |
# |---|---|
# | `tl.program_id(0)`, `tl.num_programs(0)` | my number, and how many we are; with 1 in place of 0: along the second axis of the grid, where it has two |
# | `tl.arange(0, B)` | 0, 1, ..., B − 1, with a constant B; `[:, None]` makes a column, `[None, :]` a row, as in torch |
# | `tl.load(ptr, mask=, other=)`, `tl.store(ptr, a, mask=)` | from memory, to memory; a pointer that is no tile loads or stores a single number |
# | `tl.zeros((B, C), tl.float32)`, `a.to(tl.float32)` | new tile; another type |
# | `tl.max(a)`, `tl.sum(a, axis=1)`, `tl.abs(a)`, `tl.exp(a)`, `tl.floor(a)` | as in torch; without an axis, of the whole tile |
# | `tl.maximum(a, b)`, `tl.where(mask, a, b)` | of two, element by element |
# | `-float("inf")` | less than all numbers |
# | `for start in range(0, n, B):` | loops are Python's; bounds and step may be computed |
# | `tl.dot(a, b)` | product of two tiles, `a @ b`, of one type; float16 in, float32 out; no side below 16 |
# | `tl.atomic_add(ptr, a, mask=)` | `memory += a` in one step |
#
# Four traps. There is no `x_ptr[i]`: whatever comes from memory comes by `tl.load`. Masks are combined with `&` and
# `|`, with brackets around each comparison: `(i < n) & (j < m)`, never `and`. A tile is neither true nor false:
# `tl.where` in place of `if`. And a variable that a loop changes must keep its type and shape.

# %% tags=["exercise"]
from fewer.kernels.simple import add_kernel

# %% tags=["check"]
check(add_kernel)

# %% tags=["demo"]
x, y = torch.arange(float(n)), torch.full((n,), 100.0)
print(add_kernel(3, x, y, torch.zeros(n), n, BLOCK=4)[2].tolist())
print("in another order:", add_kernel(3, x, y, torch.zeros(n), n, BLOCK=4, seed=1)[2].tolist())

programs = sized(500, 50)
x = torch.zeros(4 * programs)
begin = time.perf_counter()
launch(library.add_kernel, (programs,), x, x, x.clone(), len(x), BLOCK=4)
print(
    f"the interpreter needs {1000 * (time.perf_counter() - begin) / programs:.2f} ms for a program"
)

# %% [markdown]
# That time says nothing about a GPU. It is why all tensors in this lab are small.
#
# ## 11.2 One program, one row
#
# To quantize activations, each row gets a scale of its own: its largest magnitude over 127 (lab 1; Dettmers et al.
# 2022). In plain torch:


# %% tags=["demo"]
def quantized(x):
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round().to(torch.int8), scale


# %% [markdown]
# Each of these operations (`abs`, `amax`, `/`, `round`, `to`) is a launch of its own, and most read all of x, or
# something as large, from memory. A kernel that holds the row in registers reads it once. So each program takes a
# whole row. A tile's length is a power of two, and a row's need not be: the tile may be longer. And the rows of x may
# lie apart, with something else in between, as those of the slice `x[:, :10]` of a wider matrix do: from one row to
# the next it is `row_stride` elements.

# %% tags=["demo"]
rows, cols, stride, BLOCK = 4, 10, 12, 16
memory = torch.randn(rows, stride)  # x is memory[:, :cols]
codes, scale = torch.zeros(rows, cols, dtype=torch.int8), torch.zeros(rows)
trace = launch(
    library.quantize_rows_kernel, (rows,), memory, codes, scale, cols, stride, BLOCK=BLOCK
)
fig, axes = plt.subplots(1, 3, figsize=(7.6, 2.3), width_ratios=(12, 10, 1))
cells(axes[0], trace.reader("x"), "x, with gaps: loaded by")
outline(axes[0], 1, 0, 1, stride, ls="--")
outline(axes[0], 2, 0, 1, BLOCK - stride, ls="--")
cells(axes[1], trace.writer("codes"), "codes, without gaps: stored by")
cells(axes[2], trace.writer("scale")[:, None], "scale")
for row in range(rows):
    axes[0].text(-0.8, row, f"program {row}", ha="right", va="center", fontsize=8)
headline(fig, "A program holds a row; its tile is longer and reaches into the next one")
note(
    fig,
    f"{rows} rows of {cols}, row_stride = {stride}, BLOCK = {BLOCK}. Dashed: the tile of program 1 without its mask.",
)
plt.show()

# %% [markdown]
# With $s$ for the scale of row $r$,
#
# $$
# s_r = \max_c |x_{rc}| \, / \, 127 , \qquad \text{code}_{rc} = \operatorname{round}(x_{rc} / s_r) .
# $$
#
# Places of your tile that lie behind the end of the row take part in its maximum, unless `other` is chosen well. And
# a row of zeros must not be divided by zero.

# %% tags=["exercise"]
from fewer.kernels.simple import quantize_rows_kernel

# %% tags=["check"]
check(quantize_rows_kernel)

# %% tags=["demo"]
x = torch.randn(sized(64, 16), 512)
codes, scale = torch.zeros_like(x, dtype=torch.int8), torch.zeros(len(x))
trace = launch(quantize_rows_kernel, (len(x),), x, codes, scale, 512, 512, BLOCK=512)
error = (x - scale[:, None] * codes).abs().max() / scale.max()
print(f"largest error: {error:.3f} steps")
amounts = {
    "plain torch": moved(quantized, x),
    "your kernel": trace.loaded + trace.stored,
    "at least": x.nbytes + codes.nbytes + scale.nbytes,
}
fig, ax = figure(
    "What is in registers needs no trip to memory",
    "bytes moved (for each number of x)",
    None,
    note=f"x of {len(x)} rows of 512 in float32. Plain torch: what its operations load and store. Your kernel: counted by the "
    "observer. At least: x once, codes and scales once.",
    size=(6.4, 2.4),
)
for y, (name, amount) in enumerate(reversed(amounts.items())):
    color = PALETTE["blue"] if name == "your kernel" else RULE
    ax.barh(y, amount / x.numel(), color=color, height=0.6)
    ax.text(amount / x.numel() + 0.3, y, f"{amount / x.numel():.1f}", va="center")
ax.set_yticks(range(3), reversed(amounts))
ax.grid(False)
plt.show()

# %% [markdown]
# You have *fused* the operations of plain torch into one kernel. (`torch.compile` does that too, where it finds how.)
#
# ## 11.3 A row that does not fit
#
# Softmax needs the largest value of a row before the first exponential: $e^{89}$ is too large for a float32. And a
# row may be too long for registers: SmolLM2 has 49,152 logits, a tile of 65,536, or 256 KB in float32. That is all
# the registers that a multiprocessor of an H100 has (NVIDIA's H100 whitepaper), and nothing is left to compute with.
# Must one read the row three times, for the maximum, for the sum, and for the quotient? Milakov and Gimelshein (2018)
# keep both **while they read**: the largest value so far, $m$, and the sum so far, $d$. When a larger value comes
# along, the sum is corrected.

# %% tags=["demo"]
row = torch.tensor(
    [0.2, 1.0, 0.5, -0.4, 1.5, 0.3, 2.2, 1.1, 0.6, 1.9, -0.3, 0.9, 3.0, 2.1, 1.2, 2.6]
)
m, d, history = torch.tensor(-math.inf), torch.tensor(0.0), []
for tile in row.split(4):
    larger = torch.maximum(m, tile.max())
    kept, new = d * torch.exp(m - larger), torch.exp(tile - larger).sum()
    m, d = larger, kept + new
    history.append((m.item(), kept.item(), new.item()))
print("as torch does it:", torch.allclose(row.softmax(0), torch.exp(row - m) / d))

fig, axes = plt.subplots(2, 1, figsize=(6.8, 4.9), sharex=True, height_ratios=(3, 2))
frame(axes[0], "The sum shrinks whenever the maximum grows", None, "value (logit)")
axes[0].bar(range(16), row, color=[COLORS[i // 4] for i in range(16)], alpha=0.75, width=0.7)
for t, (largest, kept, new) in enumerate(history):
    axes[0].hlines(largest, 4 * t - 0.5, 4 * t + 3.5, color=INK)
    axes[0].text(4 * t - 0.4, largest + 0.07, f"m = {largest:.1f}", fontsize=8)
    axes[1].bar(4 * t + 1.5, kept, color=RULE, width=3)
    axes[1].bar(4 * t + 1.5, new, bottom=kept, color=COLORS[t], alpha=0.75, width=3)
    axes[1].text(4 * t + 1.5, kept + new + 0.12, f"d = {kept + new:.2f}", ha="center", fontsize=8)
    if t:
        before = sum(history[t - 1][1:])
        axes[1].text(
            4 * t + 1.5, kept / 2, f"{before:.2f} × {kept / before:.2f}", ha="center", va="center", fontsize=8
        )  # fmt: skip
axes[0].set_yticks(range(4))
axes[1].set_ylabel("sum so far (of exponentials)", rotation=0, ha="left", va="bottom")
axes[1].yaxis.set_label_coords(0, 1.02)
axes[1].set_ylim(0, 1.15 * max(kept + new for _, kept, new in history))
axes[1].set_xticks([1.5, 5.5, 9.5, 13.5], [f"tile {t}" for t in range(4)])
note(
    fig,
    "16 values in tiles of 4. Grey: the sum so far, times the exponential of the old maximum minus the new one. Colour: what the tile adds.",
)
plt.show()

# %% [markdown]
# For each tile, with $m = -\infty$ and $d = 0$ at first,
#
# $$
# m' = \max(m, \max_i x_i) , \qquad d' = d \, e^{m - m'} + \sum_i e^{x_i - m'} .
# $$
#
# That is the loop in the cell above. A second sweep writes $e^{x_i - m} / d$. Again the last tile may reach over the
# end of the row. Which `other` changes neither a maximum nor a sum of exponentials?

# %% tags=["exercise"]
from fewer.kernels.simple import softmax_kernel

# %% tags=["check"]
check(softmax_kernel)

# %% tags=["demo"]
x = torch.tensor([[0.0, 0.0, 1000.0, 999.0, 1000.0, 0.0]])
print("exp(x) / sum:", (x.exp() / x.exp().sum()).tolist())
ours = softmax_kernel(1, x, torch.zeros_like(x), 6, 6, BLOCK=4)[1]
print("yours       :", [round(p, 3) for p in ours[0].tolist()])

x = torch.randn(4, sized(1000, 100))
trace = launch(softmax_kernel, (4,), x, torch.zeros_like(x), x.shape[1], x.shape[1], BLOCK=64)


def softmax_in_steps(x):
    weights = (x - x.amax(1, keepdim=True)).exp()
    return weights / weights.sum(1, keepdim=True)


print(f"each number is loaded {trace.loads('x').unique().tolist()} times")
moves = (moved(softmax_in_steps, x), trace.loaded + trace.stored, 2 * x.nbytes)
print(
    "bytes for each number: step by step in torch {:.0f}, yours {:.0f}, at least {:.0f}".format(
        *(b / x.numel() for b in moves)
    )
)

# %% [markdown]
# ## 11.4 A tile of a product
#
# A matrix product $C = A B$ is cut into tiles of $C$, one for each program. The grid has two axes now: program $(i,
# j)$ makes the tile in row $i$ and column $j$ of tiles. What must it read?

# %% tags=["demo"]
SIZE, TILE = 48, 16
a, b, c = (torch.randn(SIZE, SIZE).half() for _ in range(3))
tiles = {"BLOCK_M": TILE, "BLOCK_N": TILE, "BLOCK_K": TILE}
strides = [SIZE, 1] * 3
every = launch(library.matmul_kernel, (3, 3), a, b, c, SIZE, SIZE, SIZE, *strides, **tiles)
i, j = 1, 2  # and once more, this program alone
mine = (a[i * TILE :], b[:, j * TILE :], c[i * TILE :, j * TILE :])
one = launch(
    library.matmul_kernel, (1, 1), *mine, TILE, TILE, SIZE, *strides, **tiles, memory={"a": a, "b": b, "c": c}
)  # fmt: skip
fig, axes = plt.subplots(2, 2, figsize=(5.6, 5.6))
axes[0, 0].axis("off")
number = 3 * i + j
for ax, name, touched in (
    (axes[1, 0], "A", one.reader("a")),
    (axes[0, 1], "B", one.reader("b")),
):
    cells(ax, torch.where(touched == 0, number, touched), f"{name}: loaded by program ({i}, {j})")
cells(axes[1, 1], every.writer("c"), "C: stored by")
for p in range(9):
    axes[1, 1].text(
        TILE * (p % 3) + 7.5, TILE * (p // 3) + 7.5, f"({p // 3}, {p % 3})", ha="center", va="center"
    )  # fmt: skip
outline(axes[1, 1], i * TILE, j * TILE, TILE, TILE)
for step in range(3):
    middle = TILE * step + 7.5
    axes[1, 0].text(middle, TILE * i + 7.5, f"step {step}", ha="center", va="center", fontsize=8)
    axes[0, 1].text(TILE * j + 7.5, middle, f"step {step}", ha="center", va="center", fontsize=8)
times = every.loads("a").unique().tolist()
headline(fig, "A tile of C needs a band of A and a band of B")
note(
    fig,
    f"{SIZE} × {SIZE}, tiles of {TILE}. Its neighbours need the same bands again: all nine programs together load each number of A {times[0]} times.",
)
plt.show()

# %% [markdown]
# With $B_M \times B_N$ for the tile of $C$ and steps of $B_K$ along the inner dimension,
#
# $$
# C_{\text{tile}} = \sum_s A_{\text{rows}, s} \, B_{s, \text{columns}} , \qquad
# \text{numbers loaded} = m n k \Bigl( \frac{1}{B_M} + \frac{1}{B_N} \Bigr) .
# $$
#
# Each number of $A$ is loaded once for every column of tiles, $n / B_N$ times. Larger tiles load less. The limit is
# set by the registers, which hold the sum of the tile. It is held in float32: in float16, 2048 + 1 is 2048.
#
# A matrix is a pointer and two *strides*: element $(r, c)$ is $r \cdot \text{stride}_0 + c \cdot \text{stride}_1$
# elements behind the first. A transposed matrix is the same memory with its strides exchanged.

# %% tags=["exercise"]
from fewer.kernels.simple import matmul_kernel

# %% tags=["check"]
check(matmul_kernel)

# %% tags=["demo"]
SIZE = sized(128, 32)
a, b = torch.randn(SIZE, SIZE).half(), torch.randn(SIZE, SIZE).half().T  # b is stored by columns
BLOCKS = sized((16, 32, 64, 128), (16, 32))
loaded = []
for block in BLOCKS:
    c = torch.zeros(SIZE, SIZE)
    grid = (SIZE // block, SIZE // block)
    trace = launch(
        matmul_kernel, grid, a, b, c, SIZE, SIZE, SIZE, *a.stride(), *b.stride(), *c.stride(),
        BLOCK_M=block, BLOCK_N=block, BLOCK_K=16,
    )  # fmt: skip
    loaded.append(trace.loaded)
    print(f"tiles of {block:3}: largest error {(c - a.float() @ b.float()).abs().max():.1e}")
fig, ax = figure(
    "Twice the tile, half the bytes",
    "side of a tile of C (elements)",
    "loaded (KiB)",
    note=f"C = A B, all {SIZE} × {SIZE}, float16. Points: your kernel, counted by the observer. Line: the equation above. 1 KiB = 1024 bytes.",
    size=(6.2, 3.8),
)
ax.plot(BLOCKS, [2 * SIZE**3 * 2 / block / 1024 for block in BLOCKS], color=PALETTE["blue"])
ax.plot(BLOCKS, [amount / 1024 for amount in loaded], "o", color=PALETTE["blue"], markersize=7)
floor = (a.nbytes + b.nbytes) / 1024
ax.axhline(floor, color=INK, linewidth=1.2, linestyle="--")
ax.text(BLOCKS[0], floor * 1.06, f"A and B once: {floor:.0f}", fontsize=8)
ax.set_xscale("log", base=2)
ax.set_yscale("log", base=2)
ax.set_xticks(BLOCKS, BLOCKS)
ax.set_yticks([amount / 1024 for amount in loaded], [f"{amount / 1024:.0f}" for amount in loaded])
ax.minorticks_off()
ax.set_ylim(0.8 * floor, None)
plt.show()

# %% [markdown]
# A tile of side $B$ does $2 B^2$ operations for every $4 B$ bytes that it loads, $B / 2$ for a byte. Not all of these
# bytes come from memory: a neighbour may have loaded them just before, and then they are in the *cache* (50 MB on an
# H100, by the same whitepaper as above). The interpreter has none, so the observer counts what is *asked for*.
#
# ## 11.5 Four bits
#
# With one token, $m = 1$, there is nothing to share: each weight is used once. Then the time of a layer is that of
# reading its weights, and only smaller weights help. GPTQ's kernel (Frantar et al. 2022) reads them as they are
# stored, two codes a byte, and makes numbers of them in registers.

# %% tags=["demo"]
codes = torch.tensor([[3, 12, 7, 0, 15, 8]])
packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
fig, axes = plt.subplots(2, 1, figsize=(7.4, 2.5))
cells(
    axes[0],
    torch.tensor([[0, 1] * 3]),
    "codes of six weights",
    [[f"weight {i}:  {code}" for i, code in enumerate(codes[0])]],
)
axes[0].set_aspect("auto")
bits = [f"{byte:08b}" for byte in packed[0].tolist()]
owners = torch.tensor([[1] * 4 + [0] * 4] * 3).reshape(1, -1)
cells(
    axes[1],
    owners,
    "the same in three bytes, as one writes bits: the highest comes first",
    [list("".join(bits))],
)
axes[1].set_aspect("auto")
for byte in range(3):
    outline(axes[1], 0, 8 * byte, 1, 8)
    axes[1].text(
        8 * byte + 3.5, 0.72, f"byte {byte} = {packed[0, byte]}", ha="center", va="top", fontsize=8
    )
headline(fig, "Two codes a byte: the even weight is in the low four bits")
plt.show()


# %% tags=["demo"]
def unpacked(packed):
    """[n, k / 2] bytes -> [n, k] codes"""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


print(unpacked(packed).tolist())

# %% [markdown]
# `& 15` keeps the lowest four bits, `>> 4` moves the highest four down. Weights in a group of, say, 128 along a row
# share a scale and a zero:
#
# $$
# y = x W^\top , \qquad W_{ji} = s_{jg} \, (\text{code}_{ji} - z_{jg}) , \qquad g = \lfloor i / \text{GROUP} \rfloor .
# $$
#
# The kernel is the product of 11.4, one group a step. What is new: the tile of $W^\top$ has to be made. Weight $i$ of
# row $j$ is in byte $\lfloor i / 2 \rfloor$ of that row. You may load a tile of bytes in which each byte occurs
# twice, once for each of its weights, and shift it by a tile of zeros and fours.

# %% tags=["exercise"]
from fewer.kernels.simple import dequantize_matmul_kernel

# %% tags=["check"]
check(dequantize_matmul_kernel)

# %% tags=["demo"]
N, K, GROUP = sized((64, 512, 128), (32, 64, 32))
w, x = torch.randn(N, K), torch.randn(1, K).half()
groups = w.reshape(N, -1, GROUP)
low, high = groups.amin(-1), groups.amax(-1)
scale = (high - low) / 15
zero = -low / scale
codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15).reshape(N, K)
packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
y, y_half, half = torch.zeros(1, N), torch.zeros(1, N), w.half()
sixteen = launch(
    library.matmul_kernel, (1, N // 16), x, half.T, y_half, 1, N, K, K, 1, *half.T.stride(), N, 1,
    BLOCK_M=16, BLOCK_N=16, BLOCK_K=32,
)  # fmt: skip
four = launch(
    dequantize_matmul_kernel, (1, N // 16), x, packed, scale, zero, y, 1, N, K,
    GROUP=GROUP, BLOCK_M=16, BLOCK_N=16,
)  # fmt: skip
made = scale.repeat_interleave(GROUP, 1) * (codes - zero.repeat_interleave(GROUP, 1))
print(
    f"error of the kernel {(y - x.float() @ made.T).abs().max():.1e}, of the four bits {(y - y_half).abs().max():.2f}; y is as large as {y.abs().max():.0f}"
)


def touched(trace, **tensors):
    """Bytes of memory that anybody loaded: each counts once."""
    return sum(
        (trace.loads(name) > 0).sum().item() * x.element_size() for name, x in tensors.items()
    )


parts = {
    "16 bits": {"weights": touched(sixteen, b=half), "x": touched(sixteen, a=x)},
    "4 bits": {
        "weights": touched(four, packed=packed),
        "scales and zeros": touched(four, scale=scale, zero=zero),
        "x": touched(four, x=x),
    },
}
fig, ax = figure(
    "A quarter of the weights' bytes, and a little for the scales",
    "memory that is read (KiB)",
    None,
    note=f"One token, W of {N} × {K}, groups of {GROUP} with a scale and a zero in float32. Counted by the observer, each byte once.",
    size=(7.0, 2.2),
)
shades = {
    "weights": PALETTE["blue"],
    "scales and zeros": PALETTE["vermilion"],
    "x": PALETTE["amber"],
}
for y_at, amounts in enumerate(reversed(parts.values())):
    left = 0
    for part, amount in amounts.items():
        ax.barh(y_at, amount / 1024, left=left, color=shades[part], height=0.55)
        left += amount / 1024
    text = ", ".join(f"{part} {amount / 1024:.1f}" for part, amount in amounts.items())
    ax.text(
        left + 0.8 * sum(parts["16 bits"].values()) / 65536, y_at, text, va="center", fontsize=8
    )
ax.set_yticks(range(2), reversed(parts))
ax.set_xlim(0, 1.35 * sum(parts["16 bits"].values()) / 1024)
ax.grid(False)
plt.show()
print(
    f"asked for: {four.loads('packed').sum():,} bytes of codes; different ones: {packed.numel():,}"
)

# %% [markdown]
# The last line shows what the count cannot decide. The tile of the reference has every byte twice, so each byte is
# asked for twice. A GPU serves 32 neighbouring threads together, in pieces of 32 bytes (CUDA C++ Best Practices
# Guide, "Coalesced access to global memory"), and asks its memory once. But what is asked for has to pass through the
# program's registers. The fast kernel of this package, `fewer.kernels.w4a16`, loads words of four codes each, once.
#
# ## 11.6 Too few programs
#
# With one token a layer has as many outputs as rows of $W$. At 64 rows a program, how many programs is that? An H100
# has 132 *multiprocessors* (NVIDIA's H100 whitepaper, SXM5), each of which runs programs of its own.

# %% tags=["demo"]
LAYERS = {"SmolLM2: 576 rows": 576, "Llama 2 7B: 4,096 rows": 4096, "Llama 2 70B: 8,192 rows": 8192}
fig, ax = figure(
    "One token makes few programs; sharing rows makes more",
    "programs (with 64 rows each)",
    None,
    note="The layer behind attention in each model, one token. Blue: one program for 64 rows. Green: eight programs share them, each with an eighth of k.",
    size=(7.0, 2.7),
)
for y_at, count in enumerate(reversed(LAYERS.values())):
    alone = count / 64
    ax.plot([alone, 8 * alone], [y_at, y_at], color=RULE, linewidth=1.2, zorder=1)
    for value, color in ((alone, "blue"), (8 * alone, "green")):
        ax.plot(value, y_at, "o", color=PALETTE[color], markersize=8)
        ax.annotate(
            f"{value:,.0f}", (value, y_at), xytext=(-11, 6), textcoords="offset points", ha="center", color=PALETTE[color]
        )  # fmt: skip
ax.axvline(132, color=INK, linewidth=1.2, linestyle="--")
ax.text(136, 2.45, "132 multiprocessors", fontsize=8)
log_axis(ax.xaxis)
ax.set_ylim(-0.5, 2.8)
ax.set_yticks(range(3), reversed(LAYERS))
ax.grid(False)
plt.show()

# %% [markdown]
# So several programs share the same rows: $S$ of them split the inner dimension $k$ (*split-K*; Osama et al. 2023).
# The second axis of the grid says which of the $S$ a program is.

# %% tags=["demo"]
w, x = torch.randn(8, 32), torch.randn(32)
fig, axes = plt.subplots(2, 1, figsize=(6.8, 4.2))
for ax, share in zip(axes, (1, 3), strict=True):
    trace = launch(
        library.split_k_kernel, (2, share), w, x, torch.zeros(8), 8, 32, BLOCK_N=4, BLOCK_K=4
    )
    programs = [
        str((p // share, p % share)) if share > 1 else f"({p}, 0)" for p in range(2 * share)
    ]
    cells(ax, trace.reader("w"), f"S = {share}: {2 * share} programs; W, loaded by")
    for top in range(2):
        for tile in range(8):
            p = trace.reader("w")[4 * top, 4 * tile]
            ax.text(
                4 * tile + 1.5, 4 * top + 1.5, programs[p], ha="center", va="center", fontsize=8
            )
    times = trace.stores("y").unique().tolist()
    ax.set_xlim(-0.5, 37)
    ax.text(
        32.2,
        3.5,
        f"each y[j]:\nadded to\n{times[0]} time{'s' * (times[0] > 1)}",
        va="center",
        fontsize=8,
    )
headline(fig, "Programs that share rows take turns with the tiles of k")
note(fig, "W of 8 × 32, tiles of 4 × 4. Program (i, s) takes the tiles s, s + S, s + 2 S, ...")
plt.show()

# %% [markdown]
# $$
# y_j = \sum_{s < S} \Bigl( \sum_{t = s, s + S, s + 2S, \dots} W_{j t} \, x_t \Bigr) \qquad \text{with } t \text{ for a tile of columns} .
# $$
#
# (`tl.dot` wants 16 columns, and x is one: multiply, and `tl.sum` along the rows of the tile.)
#
# Now $S$ programs add to the same $y_j$. Adding is three steps: load, add, store. Let two programs do it to a zero,
# one with 3 and the other with 4, in every order in which their loads and stores can fall.

# %% tags=["demo"]
outcomes = []
for mine in combinations(range(4), 2):  # when program 0 loads and stores; program 1 at the others
    y, held, steps = 0, {}, []
    for when in range(4):
        program = 0 if when in mine else 1
        if program not in held:
            held[program] = y
            steps.append((program, f"load {y}"))
        else:
            y = held[program] + (3, 4)[program]
            steps.append((program, f"store {y}"))
    outcomes.append((steps, y))
fig, ax = plt.subplots(figsize=(6.4, 3.0))
cells(
    ax,
    torch.tensor([[p for p, _ in steps] for steps, _ in outcomes]),
    "",
    [[word for _, word in steps] for steps, _ in outcomes],
)
ax.set_aspect("auto")
for row, (_, y) in enumerate(outcomes):
    ax.text(
        3.6,
        row,
        f"y = {y}" + ("" if y == 7 else ", one is lost"),
        va="center",
        color=INK if y == 7 else PALETTE["vermilion"],
    )
ax.set_xlim(-0.5, 4.8)
ax.set_title(
    "time →      Blue: program 0 adds 3.  Orange: program 1 adds 4.",
    fontsize=9,
    fontweight="normal",
)
right = sum(y == 7 for _, y in outcomes)
headline(fig, f"{right} of {len(outcomes)} orders come out right")
plt.show()

# %% [markdown]
# This is a *race*. The interpreter runs one program after the other, so it meets only the first and the last of these
# orders, and a kernel with a race comes out right. The observer does not ask whether it did, but whether anything
# *made* it:


# %% tags=["demo"]
def count(counter_ptr):
    tl.store(counter_ptr, tl.load(counter_ptr) + 1)


def count_atomically(counter_ptr):
    tl.atomic_add(counter_ptr, 1)


counter = torch.zeros(1, dtype=torch.int32)
triton.jit(count)[(8,)](counter)
print("eight programs count, nobody watches:", counter.item())
try:
    on_copies(count)(8, torch.zeros_like(counter))
except Race as error:
    print(f"watched, Race: {error}")
print("with tl.atomic_add:", on_copies(count_atomically)(8, torch.zeros_like(counter))[0].item())

# %% [markdown]
# `tl.atomic_add` does load, add and store in one step that nobody can come between. It adds a whole tile at once and
# takes a mask, too.

# %% tags=["exercise"]
from fewer.kernels.simple import split_k_kernel

# %% tags=["check"]
check(split_k_kernel)

# %% tags=["demo"]
w, x = torch.randn(1, sized(1024, 64)), torch.randn(sized(1024, 64))
right = (w.double() @ x.double()).item()
ORDERS = sized(24, 3)
off = []
for seed in range(ORDERS):
    y = split_k_kernel((1, 16), w, x, torch.zeros(1), 1, len(x), BLOCK_N=1, BLOCK_K=16, seed=seed)[
        2
    ]
    off.append(1e6 * (y.item() - right))
fig, ax = figure(
    "Another order, another last digit",
    "order of the programs (seed)",
    "y minus the exact sum (millionths)",
    note=f"One row of {len(x)} weights, {right:.4f} exactly; 16 programs add to it, in {ORDERS} random orders; float32.",
    size=(6.4, 3.2),
)
ax.axhline(0, color=INK, linewidth=0.8)
ax.plot(range(ORDERS), off, "o", color=PALETTE["blue"])
plt.show()
worst = max(map(abs, off)) / abs(1e6 * right)
print(
    f"{len(set(off))} different results of {ORDERS} orders, all within {worst:.0e} of the exact sum"
)

# %% [markdown]
# None of these results is wrong: each is what float32 gives in that order. $(a + b) + c$ is not $a + (b + c)$ when
# sums are rounded, and nothing fixes the order on a GPU. So the same question, twice, may get two answers. Who wants
# the same bits every time lets each program store its part in a place of its own, and the *last one to arrive* adds
# them up in a fixed order. `fewer.kernels.split_k` does that.
#
# ## 11.7 Butterflies
#
# One large value in a row makes the scale of all others coarse (11.2). A *Hadamard matrix* spreads it: its entries
# are all $\pm 1$, so each output gets a share of each input. QuaRot (Ashkboos et al. 2024) puts such matrices in
# front of its quantizers. Most of them can be merged into weights; some have to be done again for every token. This
# is the matrix, by Sylvester:
#
# $$
# H_1 = [1] , \qquad H_{2n} = \begin{bmatrix} H_n & H_n \\ H_n & -H_n \end{bmatrix} .
# $$
#
# As a product it takes $n^2$ sums and differences. Below is a row with a single 1, on its way through three steps.

# %% tags=["demo"]
n, one = 8, 5  # the length, and the place of the 1
x = torch.zeros(n)
x[one] = 1
columns = [x]
for _ in range(3):
    x = torch.cat([x[0::2] + x[1::2], x[0::2] - x[1::2]])
    columns.append(x)

fig, ax = plt.subplots(figsize=(7.0, 4.2))
for step in range(3):
    for i in range(n // 2):
        for source in (2 * i, 2 * i + 1):
            for target in (i, i + n // 2):
                minus = source % 2 == 1 and target >= n // 2
                active = columns[step][source] != 0
                ax.plot(
                    [step, step + 1],
                    [source, target],
                    color=(PALETTE["vermilion"] if minus else PALETTE["blue"]) if active else RULE,
                    linestyle="--" if minus else "-",
                    linewidth=1.8 if active else 0.8,
                    zorder=2 if active else 1,
                )
for step, column in enumerate(columns):
    for place, value in enumerate(column.tolist()):
        color = "white" if value == 0 else PALE[0] if value > 0 else PALE[1]
        ax.plot(
            step, place, "o", markersize=17, markerfacecolor=color, markeredgecolor=RULE, zorder=3
        )
        ax.text(
            step,
            place,
            f"{value:+.0f}" if value else "0",
            ha="center",
            va="center",
            fontsize=8,
            zorder=4,
        )
for place in range(n):
    ax.text(-0.16, place, f"x{place}", ha="right", va="center", color=GREY, fontsize=8)
ax.set_xlim(-0.35, 3.2)
ax.invert_yaxis()
ax.set_xticks(range(4), ["x", "after step 1", "after step 2", "after step 3"])
ax.set_yticks([])
ax.grid(False)
ax.spines[:].set_visible(False)
headline(fig, "Three steps of sums and differences, and every output knows every input")
note(
    fig,
    "Neighbours are added and subtracted; all sums go up, all differences down. Dashed: minus. Thick: where the 1 goes. All steps are the same.",
)
plt.show()

# %% [markdown]
# Each step takes neighbours and moves their sum to the first half of the row and their difference to the second:
#
# $$
# x \leftarrow [\, x_0 + x_1 , \; x_2 + x_3 , \; \dots , \; x_0 - x_1 , \; x_2 - x_3 , \; \dots \,] , \qquad \log_2 n \text{ times, then } x / \sqrt n .
# $$
#
# After $\log_2 n$ steps this is $H_n x / \sqrt n$. That is $n \log_2 n$ sums and differences: 2,048 in place of
# 65,536 for $n = 256$. The spec in torch is one line, repeated (you see it in the cell above):
#
#     x = torch.cat([x[0::2] + x[1::2], x[0::2] - x[1::2]])
#
# In a kernel, registers cannot be sliced like this. A tile can be given another shape:
#
# | | |
# |---|---|
# | `tl.reshape(x, (n // 2, 2))` | pairs of neighbours, one in each row |
# | `a, b = tl.split(pairs)` | the first of each pair, and the second: two tiles of n / 2 |
# | `tl.join(a, b)` | the reverse: a tile of (n / 2, 2) |
# | `tl.trans(pairs)` | transposed: (2, n / 2) |
#
# `n` is a constant, so a `while` loop over numbers (not tiles) is fine. Nothing goes to memory between the steps.

# %% tags=["exercise"]
from fewer.kernels.simple import hadamard_kernel

# %% tags=["check"]
check(hadamard_kernel)

# %% tags=["demo"]
n = sized(256, 16)
small = hadamard_kernel(16, torch.eye(16), torch.zeros(16, 16), n=16)[1]
row = torch.randn(1, n)
row[0, n // 3] = 40
spread = hadamard_kernel(1, row, torch.zeros_like(row), n=n)[1]
back = hadamard_kernel(1, spread, torch.zeros_like(row), n=n)[1]
print(f"twice is nothing: off by {(back - row).abs().max():.0e}")


def after_int8(x):
    """x through your quantizer of 11.2 and back."""
    rows, cols = x.shape
    blank = torch.zeros(rows, cols, dtype=torch.int8)
    _, codes, scale = quantize_rows_kernel(
        rows, x, blank, torch.zeros(rows), cols, cols, BLOCK=cols
    )
    return scale[:, None] * codes


plain = after_int8(row) - row
turned = hadamard_kernel(1, after_int8(spread), torch.zeros_like(row), n=n)[1] - row
fig, axes = plt.subplots(1, 3, figsize=(8.2, 3.2), width_ratios=(1, 1.4, 1.4))
axes[0].imshow(small.sign(), cmap="gray", interpolation="nearest")
axes[0].set_title(
    "your kernel on the rows of\nthe identity; white: +", fontsize=9, fontweight="normal"
)
axes[0].axis("off")
for ax, values, error, name in (
    (axes[1], row, plain, "as it is"),
    (axes[2], spread, turned, "after the transform"),
):
    ax.plot(values[0], color=PALETTE["blue"], linewidth=0.9)
    ax.set_title(
        f"{name}: largest {values.abs().max():.1f},\nint8 error {error.square().mean().sqrt():.3f}",
        fontsize=9,
        fontweight="normal",
    )
    ax.set_ylim(-10, 45)
    ax.set_xlabel("place in the row (element)")
headline(fig, "The transform spreads one large value over the whole row")
note(
    fig,
    f"{n} normal values, one of 40. Error: root of the mean square, quantized with your kernel of 11.2, and transformed back where it was transformed.",
)
plt.show()

# %% [markdown]
# ## 11.8 Attention that reads the cache once
#
# The last kernel puts things together. One new token asks, and each head scores all tokens of the cache, takes the
# softmax, and adds up the values with these weights. Plain torch writes scores and weights to memory and reads them
# again. FlashAttention (Dao et al. 2022) keeps a running maximum and a running sum, as in 11.3, and a running
# *weighted sum of values*, which is corrected together with them. Keys and values are read once, no score is ever
# stored.
#
# With *grouped queries* (lab 9), several query heads read the same keys.

# %% tags=["demo"]
heads, tokens, DIM = 8, 6, 4
q, out = torch.randn(heads, DIM), torch.zeros(heads, DIM)
fig, axes = plt.subplots(1, 2, figsize=(7.4, 4.4))
for ax, group in zip(axes, (1, 4), strict=True):
    k = torch.randn(heads // group, tokens, DIM)
    trace = launch(
        library.decode_attention_kernel, (heads,), q, k, k.clone(), out, tokens, group, DIM=DIM, BLOCK=2
    )  # fmt: skip
    owners = (
        trace.reader("k").transpose(1, 2).reshape(-1, tokens)
    )  # heads from above, tokens to the right
    times = trace.loads("k").unique().tolist()
    cells(
        ax,
        owners,
        f"{heads // group} key heads: each key is loaded {times[0]} time{'s' * (times[0] > 1)}",
    )
    ax.set_aspect("auto")
    for head in range(heads // group):
        outline(ax, DIM * head, 0, DIM, tokens, lw=1)
        first = head * group
        by = f"program {first}" if group == 1 else f"programs {first} to {first + group - 1}"
        ax.text(
            tokens / 2 - 0.5,
            DIM * head + DIM / 2 - 0.5,
            f"key head {head}: {by}",
            ha="center",
            va="center",
            fontsize=8,
            bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 2},
        )
headline(fig, "Query heads that share a key head load the same keys")
note(
    fig,
    f"{heads} query heads, one program each; {tokens} tokens from left to right. Grey: loaded by several programs.",
)
plt.show()

# %% [markdown]
# With $s = K q / \sqrt{\text{DIM}}$ for the scores of a tile of tokens, $V$ for its values, and $m' = \max(m, \max
# s)$,
#
# $$
# d' = d \, e^{m - m'} + \sum_t e^{s_t - m'} , \qquad
# o' = o \, e^{m - m'} + \sum_t e^{s_t - m'} \, V_t , \qquad \text{and at the end } \; \text{out} = o / d .
# $$
#
# (Again one query is too few for `tl.dot`: multiply and sum.) Places behind the last token must have no weight.
# `other` of a load cannot see to that here, since scores are computed, not loaded. But `tl.where` can.

# %% tags=["exercise"]
from fewer.kernels.simple import decode_attention_kernel

# %% tags=["check"]
check(decode_attention_kernel)


# %% tags=["demo"]
def attention(q, k, v):
    """Plain torch: [heads, DIM], [kv heads, tokens, DIM] twice -> [heads, DIM]"""
    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (k @ q[:, :, None])[..., 0] / q.shape[1] ** 0.5
    return (scores.softmax(1)[:, None] @ v)[:, 0]


heads, group, DIM, BLOCK = 8, 4, sized(64, 8), sized(64, 8)
LENGTHS = sized((64, 128, 256, 512), (8, 16))
amounts = {"plain torch": [], "your kernel": [], "the cache once": []}
for tokens in LENGTHS:
    q = torch.randn(heads, DIM)
    k, v = torch.randn(2, heads // group, tokens, DIM)
    out = torch.zeros(heads, DIM)
    trace = launch(
        decode_attention_kernel, (heads,), q, k, v, out, tokens, group, DIM=DIM, BLOCK=BLOCK
    )
    amounts["plain torch"].append(moved(attention, q, k, v) / 1024)
    amounts["your kernel"].append((trace.loaded + trace.stored) / 1024)
    amounts["the cache once"].append((k.nbytes + v.nbytes) / 1024)
    print(f"{tokens:4} tokens: largest error {(out - attention(q, k, v)).abs().max():.0e}")
fig, ax = figure(
    "No copies, no scores in memory; but each head reads for itself",
    "tokens in the cache (count)",
    "moved (KiB)",
    note=f"{heads} query heads, {heads // group} key heads, DIM = {DIM}, float32, BLOCK = {BLOCK}. Plain torch: what its operations load and store; it "
    "copies keys and values for each query head. Your kernel: counted by the observer.",
    size=(7.0, 3.9),
)
for (name, values), color in zip(
    amounts.items(), (GREY, PALETTE["blue"], PALETTE["green"]), strict=True
):
    (line,) = ax.plot(LENGTHS, values, marker="o", color=color)
    direct_label(ax, line, name)
log_axis(ax.xaxis)
log_axis(ax.yaxis)
ax.set_xticks(LENGTHS, LENGTHS)
ax.set_yticks((100, 300, 1000, 3000), ("100", "300", "1k", "3k"))
plt.show()

# %% [markdown]
# Your kernel asks for the cache once for each *query* head, that is as many times as heads share a key head. The
# cache of the GPU may serve the others. It is safer not to ask: `fewer.kernels.decode_attention` gives all query
# heads of a group to one program, as the rows of a `tl.dot`. And as there are few heads, too few programs (11.6), it
# splits the tokens among several programs (*flash-decoding*).
#
# ## 11.9 What it is worth
#
# Now a GPU. The kernels of `fewer.kernels` are the same ideas, made for speed, and they were measured on an H100
# together with what others offer for the same task (`benchmarks/gpu_kernels.py`). These are stored results: the only
# numbers of this lab that were not made on your machine just now. First a layer as in 11.5, but as large as in Llama
# 2 70B, for one token and for more (those of a prompt, or of several texts at a time).


# %% tags=["demo"]
def newest_results():
    """The newest stored measurement, or None: benchmarks/results above this folder, or of the package's source."""
    above = [Path.cwd(), *Path.cwd().parents, Path(fewer.__file__).parents[2]]
    for folder in above:
        found = (folder / "benchmarks" / "results").glob("gpu_kernels_*.json")
        stored = [json.loads(file.read_text("utf-8")) for file in found]
        if stored := [result for result in stored if result["results"]]:
            return max(stored, key=lambda result: result["date"])
    print("There is no benchmarks/results/gpu_kernels_*.json here: see the project's repository.")
    return None


gpu = newest_results()
tasks = {}  # (kernel, shape) -> who -> result
for result in gpu["results"] if gpu else ():
    tasks.setdefault((result["kernel"], result["shape"]), {})[result["who"]] = result
LAYER, TOKENS = "28672 x 8192", (1, 4, 16, 64, 256)
SETUP = f"{gpu['device']}, {gpu['date'][:10]}, nothing in its cache beforehand" if gpu else ""
WEIGHTS = {  # name in the figures: kernel, who, colour, style
    "16 bits: cuBLAS": ("w4a16", "cuBLAS bf16", INK, "-"),
    "8 bits: fewer": ("w8a16", "fewer", PALETTE["vermilion"], "-"),
    "4 bits: fewer": ("w4a16", "fewer", PALETTE["blue"], "-"),
    "NF4: fewer": ("nf4", "fewer", PALETTE["green"], "-"),
    "4 bits: tinygemm": ("w4a16", "tinygemm int4", "#9AA1AB", "-"),
    "4 bits: gemlite": ("w4a16", "gemlite A16W4", "#9AA1AB", "--"),
    "NF4: bitsandbytes": ("nf4", "bitsandbytes NF4", "#9AA1AB", ":"),
}


def by_tokens(kernel, who):
    """[(tokens, result), ...] of one layer"""
    found = [(m, tasks.get((kernel, f"{LAYER}, M = {m}"), {}).get(who)) for m in TOKENS]
    return [(m, result) for m, result in found if result]


def at_copy_speed(result):
    """Microseconds in which a copy would have moved the bytes that this task must move."""
    return result["bytes"] / gpu["copy_gb_s"] / 1e3


# %% tags=["demo"]
if tasks:
    fig, ax = figure(
        "For few tokens, fewer bits are less time; for many they are not",
        "tokens in one go (count)",
        "time (µs)",
        note=f"{SETUP}. A layer of {LAYER.replace('x', '×')}, weights of 4 and 8 bits in groups of 128, NF4 in blocks of 64, products in 16 bits. Medians. "
        "Grey: kernels of others. Thin lines: the bytes of 16 and of 4 bits at the speed of a copy.",
        size=(7.4, 5.0),
    )
    for name, (kernel, who, color, look) in WEIGHTS.items():
        if points := by_tokens(kernel, who):
            times = [(m, result["us"]) for m, result in points]
            width = 1.3 if color == "#9AA1AB" else 2
            (line,) = ax.plot(*zip(*times, strict=True), look, marker="o", color=color, lw=width)
            direct_label(ax, line, name)
    for name in ("16 bits: cuBLAS", "4 bits: fewer"):
        kernel, who, color, _ = WEIGHTS[name]
        floor = [(m, at_copy_speed(result)) for m, result in by_tokens(kernel, who)]
        ax.plot(*zip(*floor, strict=True), color=color, linewidth=0.8, zorder=1)
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    ax.set_xticks(TOKENS, TOKENS)
    ax.set_yticks(
        (50, 100, 200, 500, 1000, 2000, 5000), ("50", "100", "200", "500", "1k", "2k", "5k")
    )
    plt.show()

    def time_of(kernel, who, m):
        return dict(by_tokens(kernel, who))[m]

    for m in TOKENS:
        ours, dense = time_of("w4a16", "fewer", m), time_of("w4a16", "cuBLAS bf16", m)
        print(
            f"{m:3} tokens: 4 bits move {ours['bytes'] / dense['bytes']:.0%} of the bytes and take {ours['us'] / dense['us']:.0%} of the time; "
            f"{ours['operations'] / ours['us'] / 1e6:3.0f} of {gpu['matmul_tflop_s']:.0f} · 10¹² operations a second"
        )

# %% [markdown]
# - **Few tokens.** Memory is the limit. A quarter of the bytes takes less than a third of the time, and 16 tokens
#   cost hardly more than one. The kernels of others come near that for one token only; with more, most are slower
#   than 16 bits.
# - **Many tokens.** At 256, cuBLAS on 16-bit weights is faster than all that unpack. Our kernel does about half as
#   many operations a second as the GPU can. It does not wait for memory (the thin blue line is far below), but for
#   the arithmetic of unpacking: each program makes numbers of codes before it can multiply them, and the next tile
#   of tokens is another program's, which makes them again. A long prompt is better read with weights that are unpacked
#   once for all of it.
# - **NF4** has as many bits and takes longer: its sixteen levels do not lie at equal distances, so a code has to be
#   looked up in a table, where otherwise one subtraction will do.
#
# Now all kernels, each beside its floor and beside the best of the others.

# %% tags=["demo"]
ROWS = (
    ("w4a16", "28672 x 8192, M = 1", "4-bit weights, 28,672 × 8,192, 1 token", "blue"),
    ("w4a16", "14336 x 4096, M = 1", "14,336 × 4,096, 1 token", "blue"),
    ("w4a16", "28672 x 8192, M = 256", "28,672 × 8,192, 256 tokens", "blue"),
    ("w8a16", "28672 x 8192, M = 1", "8-bit weights, 28,672 × 8,192, 1 token", "vermilion"),
    ("nf4", "28672 x 8192, M = 1", "NF4 weights, 28,672 × 8,192, 1 token", "green"),
    ("int8", "16384 x 4096", "rows to int8, 16,384 × 4,096", "amber"),
    ("hadamard", "16384 x 4096", "Hadamard, 16,384 × 4,096", "purple"),
    ("hadamard + int8", "16384 x 4096", "Hadamard and int8", "purple"),
    ("decode bf16", "16 x 8192 tokens", "attention, 16-bit cache, 16 × 8,192 tokens", "sky"),
    ("decode int8", "16 x 8192 tokens", "8-bit cache", "sky"),
    ("decode int4", "16 x 8192 tokens", "4-bit cache", "sky"),
    ("decode int4", "1 x 32768 tokens", "4-bit cache, 1 × 32,768 tokens", "sky"),
)
if tasks:
    shown = [row for row in ROWS if "fewer" in tasks.get(row[:2], {})][::-1]
    fig, ax = plt.subplots(figsize=(10.2, 1.7 + 0.3 * len(shown)))
    ax.set_xlabel("time (µs)")
    near = sum(
        at_copy_speed(tasks[row[:2]]["fewer"]) > 0.75 * tasks[row[:2]]["fewer"]["us"]
        for row in shown
    )
    headline(
        fig, f"{near} of {len(shown)} tasks run at three quarters of the copy's speed, or more"
    )
    note(
        fig,
        f"{SETUP}. Medians. Floor: the bytes that the task must move, in our format, at the speed of a copy ({gpu['copy_gb_s']:,.0f} GB/s). "
        "Grey: others on the same task, in their own format (SDPA and cuDNN: PyTorch's attention, over 16 bits throughout; matmul: a product with the Hadamard matrix).",
    )
    for y_at, (kernel, shape, _, color) in enumerate(shown):
        ours = tasks[kernel, shape]["fewer"]
        others = [r for who, r in tasks[kernel, shape].items() if who != "fewer"]
        ax.axhline(y_at, color=GRID, linewidth=0.8, zorder=0)
        ax.plot([r["us"] for r in others], [y_at] * len(others), "o", color="#9AA1AB", markersize=5)
        ax.plot(ours["us"], y_at, "o", color=PALETTE[color], markersize=8)
        ax.plot(at_copy_speed(ours), y_at, "|", color=INK, markersize=13, markeredgewidth=1.8)
        best = min(others, key=lambda r: r["us"])
        times = best["us"] / ours["us"]
        columns = {
            1.08: (f"{at_copy_speed(ours) / ours['us']:.0%}", INK, "right"),
            1.165: (f"{times:.2g} ×", INK if times >= 1 else PALETTE["vermilion"], "right"),
            1.175: (best["who"], GREY, "left"),
        }
        if y_at == len(shown) - 1:
            columns |= {1.081: ("of the copy's\nspeed\n\n", GREY, "right")}
            columns |= {1.11: ("times as fast as the\nbest of the others\n\n", GREY, "left")}
        for x_at, (text, ink, side) in columns.items():
            at = {"xycoords": ("axes fraction", "data"), "annotation_clip": False}
            low = "bottom" if "\n" in text else "center"
            ax.annotate(text, (x_at, y_at), va=low, ha=side, color=ink, fontsize=8, **at)
        if shape.endswith("256"):  # where there is room
            words = ((at_copy_speed(ours), "floor", INK), (ours["us"], "fewer", PALETTE[color]))
            for x_at, text, ink in (*words, (max(r["us"] for r in others), "others", GREY)):
                at = {"xytext": (0, 6), "textcoords": "offset points", "fontsize": 8}
                ax.annotate(text, (x_at, y_at), ha="center", color=ink, **at)
    log_axis(ax.xaxis)
    ax.set_xticks(
        (10, 20, 50, 100, 200, 500, 1000, 5000), ("10", "20", "50", "100", "200", "500", "1k", "5k")
    )
    ax.set_yticks(range(len(shown)), [name for _, _, name, _ in shown])
    ax.set_ylim(-0.6, len(shown) - 0.3)
    ax.grid(False)
    plt.show()

# %% [markdown]
# - **Near the floor** are the tasks that do little with what they read: rows to int8, 8-bit weights, attention over
#   16 bits. In fewer bits there is more to be done for each byte, and a kernel reaches less of the memory's speed.
#   But there are fewer bytes, and it is faster all the same.
# - **Small tasks** are further from it: the smaller matrix, and a cache of a single text. To start all programs, and
#   to wait for their first bytes, takes some millionths of a second however little there is to do.
# - **Where nothing is gained**: attention over a cache of 16 bits reads what PyTorch's own attention reads (SDPA),
#   and both are at the limit. Ours is no faster. What it adds is that it can read 8 and 4 bits as well. And with 256
#   tokens we lose, as above.
#
# And the figure that sums up the course: each kernel against *both* limits of the machine. A task that does $I$
# operations for each byte that it moves (its *intensity*) cannot be done faster than
#
# $$
# \text{operations a second} \le \min ( \text{peak} , \; I \cdot \text{bytes a second} ) .
# $$

# %% tags=["demo"]
if tasks:
    copied, peak = gpu["copy_gb_s"] / 1e3, gpu["matmul_tflop_s"]
    fig, ax = figure(
        "The same layer in fewer bits: further right, and up the slope",
        "intensity (operations a byte)",
        "speed (10¹² operations a second)",
        note=f"{SETUP}. Lines: a layer of {LAYER.replace('x', '×')} for {', '.join(map(str, TOKENS))} tokens, from left to right; rings: for one token. Squares: the "
        "other tasks of the figure above. Grey: kernels of others. Limits, both measured in the same run: a plain copy, and a product of two large matrices in 16 bits.",
        size=(8.2, 5.4),
    )
    place = lambda r: (r["operations"] / r["bytes"], r["operations"] / r["us"] / 1e6)  # noqa: E731
    reach = np.array([0.5, peak / copied, 3000])
    ax.plot(reach, np.minimum(peak, reach * copied), color=RULE, linewidth=5, zorder=1)
    ax.text(
        8 * peak / copied, 1.12 * peak, f"product: {peak:,.0f}", ha="center", fontsize=8, color=GREY
    )
    ax.text(0.75, 1.5, f"copy: {gpu['copy_gb_s']:,.0f} GB/s", fontsize=8, color=GREY)
    for name, (kernel, who, color, _) in WEIGHTS.items():
        if points := [place(result) for _, result in by_tokens(kernel, who)]:
            if color == "#9AA1AB":
                ax.plot(*zip(*points, strict=True), "o", color=color, markersize=4, zorder=2)
                continue
            (line,) = ax.plot(*zip(*points, strict=True), "o-", color=color, lw=1.2, ms=5, zorder=4)
            ax.plot(*points[0], "o", color=color, ms=10, mfc="none", mew=1.5, zorder=4)
            direct_label(ax, line, name)
    names = {"int8": "rows to int8", "hadamard": "Hadamard"}
    names |= {
        f"decode {kind}": f"attention, {bits} bits"
        for kind, bits in (("bf16", 16), ("int8", 8), ("int4", 4))
    }
    for (kernel, shape), by in tasks.items():
        if (
            (kernel, shape) in {row[:2] for row in ROWS}
            and kernel in names
            and not shape.startswith("1 x")
        ):
            x_at, y_at = place(by["fewer"])
            ax.plot(x_at, y_at, "s", color=PALETTE["purple"], markersize=5, zorder=5)
            ax.annotate(
                names[kernel], (x_at, y_at), xytext=(-28, 16), textcoords="offset points", ha="right", fontsize=8,
                color=PALETTE["purple"], arrowprops={"arrowstyle": "-", "color": RULE, "lw": 0.7, "relpos": (1, 0.5)},
            )  # fmt: skip
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    ax.set(xlim=(0.3, 4000), ylim=(1, 1.7 * peak))
    plt.show()

# %% [markdown]
# How to read it: look at the rings, the same work in 16, 8 and 4 bits. On the slope memory is the limit, and only
# fewer bytes help. In a quarter of the bytes the work is nearly four times as far to the right, and as much higher
# up, if the kernel keeps up. At the flat part arithmetic is the limit, and fewer bits no longer help (unless one also
# computes in fewer bits): there, 16-bit weights come nearest to it. A language model that writes, token after token,
# is at the lower left, with all of its layers. That is why this course asks for fewer bytes.

# %% [markdown] tags=["written"] id="what_bytes_tell" points=5
# **Question.** (a) A kernel passes all checks in the interpreter, under the observer, in every order of its programs.
# Name two things that may still be wrong with it on a GPU, and say for one of them how you would find out. (b) For
# one token, a product with 16-bit weights moves its bytes at 90% of the speed of a copy, and your 4-bit kernel
# (groups of 128, a scale and a zero of 16 bits each) at 60%. Which one is faster, and by what factor? At how many
# percent would they take the same time? (c) A colleague replaces the atomic additions of 11.6 by parts that are
# stored and added up by the last program to arrive. What is gained, and what does it cost in bytes for $n$ rows and
# $S$ programs a row? Is that much beside the weights, for $n = 8192$, $k = 8192$ in 4 bits and $S = 8$?
#
# **Answer.** (a) It may be slow (the interpreter shows no time: too few programs, loads that are not served together,
# a tile that does not fit into the registers): measure it on the GPU, against a plain copy. The compiler may refuse
# it (something that is Python but not Triton, such as `break` in a loop): compile it. Its last digits may differ, as
# a GPU sums in another order: compare with float64, with a tolerance. Its inputs in the checks are small: places
# beyond 2³¹ may overflow, so try a large tensor. (b) Four bits and 32 / 128 = 0.25 for scale and zero are 4.25 bits a
# weight, 16 / 4.25 = 3.76 times fewer bytes. At 60 instead of 90% it takes 90 / 60 = 1.5 times as long for each byte:
# 3.76 / 1.5 = 2.5 times as fast in all. The same time: at 90 / 3.76 = 24%. (c) The result no longer depends on the
# order in which the programs run: the same bits every time. Each of the $S$ programs stores 4 bytes for each of its
# rows, and the last one loads them: $8 n S$ bytes, plus $4 n$ for the result. (And a counter for each tile.) Here 8 ·
# 8192 · 8 = 0.5 MB, beside 8192 · 8192 / 2 = 34 MB of codes: 1.6%. (Atomic additions move bytes, too: a load and a
# store for each part.)
#
# **Rubric.** (a) 1 point for two valid things; 1 point for a way to find out that would work. (b) 1 point for the
# factor (2.5; 2.7 without scales earns half), half a point for 24%. (c) Half a point for: the same bits every time; 1
# point for the bytes and that they are few (any count within a factor of two).
