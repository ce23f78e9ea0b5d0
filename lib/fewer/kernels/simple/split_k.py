"""A matrix times one vector: several programs for each row, who add up what they have.

Osama et al. 2023, "Stream-K: Work-centric parallel decomposition for dense matrix-matrix
multiplication on the GPU" (arXiv 2301.03598), section 3 (fixed-split). One token through a layer
has few rows of output, too few programs to keep a GPU busy, and each would walk a long way along k.
So k is split among S programs, and their sums meet in memory:

    y[j] = sum over s < S of  (sum over the tiles t = s, s + S, s + 2 S, ... of k of  W[j, t] x[t])

y += part is a load, a sum and a store, and another program may store in between: its part is lost.
`tl.atomic_add` does the three in one step.
"""

import triton.language as tl

from fewer.kernels.interpreter import on_copies


@on_copies
def split_k_kernel(w_ptr, x_ptr, y_ptr, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y = y + W x; program (i, s) has BLOCK_N rows of W, and the tiles s, s + S, s + 2 S, ... of k.

    Launched with a grid of (n / BLOCK_N, S) programs, the first rounded up and S any number, which
    `tl.num_programs(1)` tells. With 5 tiles along k and S = 3, program (i, 0) has the tiles 0 and
    3, program (i, 1) has 1 and 4, and program (i, 2) has tile 2. Where S is larger than the number
    of tiles, some programs have none. Each sums in float32 and adds to y once, by `tl.atomic_add`.

    `tl.dot` does not fit here: it takes 16 columns or more, and x is one. Multiply, and `tl.sum`.

    Args:
        w_ptr: to float32 or float16 [n, k], contiguous, row by row.
        x_ptr: to [k] of the same type.
        y_ptr: to float32 [n], zeros when the kernel is launched.
        n, k: any sizes of at least 1.
        BLOCK_N: rows of a tile, BLOCK_K: columns of it; powers of two.

    Example:
        >>> import torch
        >>> w, x = torch.arange(10.0).reshape(2, 5), torch.ones(5)
        >>> split_k_kernel((1, 3), w, x, torch.zeros(2), 2, 5, BLOCK_N=2, BLOCK_K=2)[2].tolist()
        [10.0, 35.0]
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, k, tl.num_programs(1) * BLOCK_K):
        col = start + tl.arange(0, BLOCK_K)
        inside = (row[:, None] < n) & (col[None, :] < k)
        w = tl.load(w_ptr + row[:, None] * k + col[None, :], mask=inside, other=0.0)
        x = tl.load(x_ptr + col, mask=col < k, other=0.0)
        total += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    tl.atomic_add(y_ptr + row, total, mask=row < n)
