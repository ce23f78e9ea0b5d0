"""The first kernel: a sum of vectors, tile by tile.

Tillet, Kung, Cox 2019, "Triton: An intermediate language and compiler for tiled neural network
computations" (MAPL 2019, doi 10.1145/3315508.3329973). A kernel is the program of one tile. The
grid says how many programs run, and `tl.program_id` tells each of them which one it is:

    program p:   out[i] = x[i] + y[i]   for i in p BLOCK, ..., (p + 1) BLOCK - 1,   as long as i < n
"""

import triton.language as tl

from fewer.kernels.interpreter import on_copies


@on_copies
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = x + y; program p adds the p-th tile of BLOCK elements.

    Launched with at least n / BLOCK programs, one axis. A tile may reach over the end of the
    vectors, or lie behind it: what is there belongs to somebody else and is neither loaded nor
    stored.

    Args:
        x_ptr, y_ptr: to the first of n elements each, float32 or float16, contiguous: x[i] is i
            elements behind the first.
        out_ptr: to n elements of the same type, contiguous, to be written.
        n: how many, any number.
        BLOCK: how many a program takes, a power of two.

    Example:
        >>> import torch
        >>> x, y, out = torch.arange(6.0), torch.full((6,), 10.0), torch.zeros(6)
        >>> add_kernel(2, x, y, out, 6, BLOCK=4)[2].tolist()
        [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(x_ptr + i, mask=inside)
    y = tl.load(y_ptr + i, mask=inside)
    tl.store(out_ptr + i, x + y, mask=inside)
