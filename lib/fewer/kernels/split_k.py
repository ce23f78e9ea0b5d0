"""Several programs for one tile of a product: each adds up a part of k, the last one to arrive all.

Osama et al. 2023, "Stream-K" (arXiv 2301.03598), section 2, calls it fixed-split. With few rows of
x, the tiles of y are too few to keep a GPU busy, so k is cut into SPLIT parts:

    y = sum over s of  partial_s,      partial_s = the product over the s-th part of k

Atomic additions to y would add in the order of arrival, and floating-point sums depend on their
order. Here each program stores its part and counts itself. Who counts SPLIT - 1 before it knows
that all parts are there, and adds them in their order: the same bits, whoever it is.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from fewer.kernels.launch import counters

RESIDENT = 4 * 132  # programs that an H100 runs at a time: four on each multiprocessor


def default_settings(m: int, n: int, k: int) -> dict[str, int]:
    """A configuration of the weight-only products where none is stored.

    Tiles of few rows of x leave room for four programs on a multiprocessor; of those there should
    be as many as run at a time, and each should have at least 512 columns.

    Example:
        >>> default_settings(1, 14336, 4096)["SPLIT"], default_settings(256, 14336, 4096)["SPLIT"]
        (2, 1)
    """
    if m <= 8:
        tiles = {"BLOCK_M": 8, "BLOCK_N": 64, "TILE": 128, "num_warps": 4, "num_stages": 3}
    elif m <= 32:
        block_m = 16 if m <= 16 else 32
        tiles = {"BLOCK_M": block_m, "BLOCK_N": 64, "TILE": 64, "num_warps": 4, "num_stages": 3}
    else:
        tiles = {"BLOCK_M": 64, "BLOCK_N": 128, "TILE": 32, "num_warps": 8, "num_stages": 3}
    return {**tiles, "SPLIT": usual_split(m, n, k, tiles["BLOCK_M"], tiles["BLOCK_N"])}


def usual_split(m: int, n: int, k: int, block_m: int, block_n: int) -> int:
    """So many parts of k that as many programs as run at a time have something to do.

    Example:
        >>> usual_split(1, 4096, 14336, 8, 64)
        8
    """
    programs = -(-n // block_n) * -(-m // block_m)
    return max(1, min(RESIDENT // programs, k // 512, 16))


def scratch(
    m: int, n: int, settings: dict[str, int], device: torch.device
) -> tuple[Float[Tensor, "split m n"], Int32[Tensor, "tiles"]]:
    """What the programs of one launch share: their partial sums, and a counter for each tile of y.

    Args:
        m, n: the shape of y.
        settings: BLOCK_M, BLOCK_N and SPLIT; without a split there is nothing to share.

    Example:
        >>> cpu = torch.device("cpu")
        >>> partial, counter = scratch(1, 100, {"BLOCK_M": 8, "BLOCK_N": 64, "SPLIT": 4}, cpu)
        >>> tuple(partial.shape), tuple(counter.shape)
        ((4, 1, 100), (2,))
    """
    if settings["SPLIT"] == 1:
        empty = torch.empty(1, dtype=torch.float32, device=device)
        return empty.view(1, 1, 1), empty.view(torch.int32)
    tiles = -(-m // settings["BLOCK_M"]) * -(-n // settings["BLOCK_N"])
    partial = torch.empty(settings["SPLIT"], m, n, dtype=torch.float32, device=device)
    return partial, counters(tiles, device)


@triton.jit
def store_sum(
    acc, out_ptr, partial_ptr, counter_ptr, split, tile, row, token, m, n, SPLIT: tl.constexpr
):
    """Store acc, the transposed tile [rows, tokens] of this program, and add all if it is the last.

    Args:
        acc: float32, [BLOCK_N, BLOCK_M]: this program's sums.
        out_ptr: y [m, n], any floating type.
        partial_ptr: float32 [SPLIT, m, n].
        counter_ptr: int32, one a tile, 0 before and after.
        split, tile: which part of k, which tile of y.
        row, token: which columns and rows of y, [BLOCK_N] and [BLOCK_M].
    """
    inside = (row < n)[:, None] & (token < m)[None, :]
    place = token.to(tl.int64)[None, :] * n + row[:, None]
    if SPLIT == 1:
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), inside)
    else:
        size = m.to(tl.int64) * n
        tl.store(partial_ptr + split * size + place, acc, inside)
        tl.debug_barrier()  # one thread counts for all: they must have stored
        if tl.atomic_add(counter_ptr + tile, 1) == SPLIT - 1:
            total = tl.zeros(acc.shape, tl.float32)
            for s in tl.static_range(SPLIT):
                total += tl.load(partial_ptr + s * size + place, inside, cache_modifier=".cg")
            tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), inside)
            tl.atomic_xchg(counter_ptr + tile, 0)
