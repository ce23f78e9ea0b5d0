"""Softmax of rows that do not fit into registers: a maximum and a sum that run along.

Milakov, Gimelshein 2018, "Online normalizer calculation for softmax" (arXiv 1805.02867), algorithm
3. Without the maximum m, exp overflows; and m is known only at the end of the row. So m and
d = sum exp(x - m) are kept for what was read so far, and d is corrected whenever m grows:

    m' = max(m, max of the tile),    d' = d exp(m - m') + sum over the tile of exp(x - m')

Then out = exp(x - m) / d in a second sweep: the row is read twice in place of three times.
"""

import triton.language as tl

from fewer.kernels.interpreter import on_copies


@on_copies
def softmax_kernel(x_ptr, out_ptr, cols, row_stride, BLOCK: tl.constexpr):
    """out = softmax(x) along each row, in tiles of BLOCK; program r has row r.

    Launched with one program for each row. It holds one tile at a time, and in float32 the maximum
    m and the sum d = sum exp(x - m) of what it has read, from m = -inf and d = 0 on. With each tile

        m' = max(m, max of the tile),    d' = d exp(m - m') + sum over the tile of exp(x - m')

    and a second sweep along the row writes exp(x - m) / d. No exp may overflow, however large x is.

    Args:
        x_ptr: to [rows, cols], float32 or float16, finite. Element (r, c) is r * row_stride + c
            elements behind the first.
        out_ptr: to [rows, cols] of the type of x, to be written. It is contiguous, as x need not
            be: (r, c) is at r * cols + c.
        cols: length of a row, at least 1: less than BLOCK, or many times as much.
        row_stride: from a row of x to the next one, in elements.
        BLOCK: length of a tile, a power of two.

    Example:
        >>> import torch
        >>> x, out = torch.tensor([[0.0, 0.0, 1000.0, 1000.0, 1000.0, 0.0]]), torch.zeros(1, 6)
        >>> softmax_kernel(1, x, out, 6, 6, BLOCK=2)[1].tolist()
        [[0.0, 0.0, 0.3333, 0.3333, 0.3333, 0.0]]
    """
    row = tl.program_id(0)
    largest = -float("inf")
    total = 0.0
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * row_stride + col, mask=col < cols, other=-float("inf"))
        x = x.to(tl.float32)
        larger = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger))
        largest = larger
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * row_stride + col, mask=col < cols).to(tl.float32)
        tl.store(out_ptr + row * cols + col, tl.exp(x - largest) / total, mask=col < cols)
