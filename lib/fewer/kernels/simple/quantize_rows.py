"""Rows to int8, each with a scale of its own: one pass over memory.

Dettmers et al. 2022, "LLM.int8(): 8-bit matrix multiplication for transformers at scale" (arXiv
2208.07339), section 2.1, vector-wise. In plain torch it takes a pass for the maximum and another
for the codes. A program that holds the row in registers reads it once:

    scale = max |x| / 127,    codes = round(x / scale)
"""

import triton.language as tl

from fewer.kernels.interpreter import on_copies


@on_copies
def quantize_rows_kernel(x_ptr, codes_ptr, scale_ptr, cols, row_stride, BLOCK: tl.constexpr):
    """Absmax int8: x is close to scale * codes in each row; program r has row r.

    Launched with one program for each row. What is behind the end of a row must not count for its
    maximum. A row of zeros has codes of 0 (and any scale, but a finite one).

    Args:
        x_ptr: to [rows, cols], float32 or float16, finite. Element (r, c) is r * row_stride + c
            elements behind the first.
        codes_ptr: to int8 [rows, cols], to be written: round(x / scale). They are contiguous, as x
            need not be: (r, c) is at r * cols + c.
        scale_ptr: to float32 [rows], to be written: max |x| / 127 over the row.
        cols: length of a row, at most BLOCK.
        row_stride: from a row of x to the next one, in elements.
        BLOCK: a power of two.

    The codes are computed in float32 and rounded to the nearest integer; of two that are equally
    near, either (floor(x / scale + 1/2) will do).

    Example:
        >>> import torch
        >>> x = torch.tensor([[127.0, -3.2, 0.0], [0.5, 1.0, -2.0]])
        >>> codes, scale = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2)
        >>> _, codes, scale = quantize_rows_kernel(2, x, codes, scale, 3, 3, BLOCK=4)
        >>> codes.tolist(), (127 * scale).tolist()
        ([[127, -3, 0], [32, 64, -127]], [127.0, 2.0])
    """
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    inside = col < cols
    x = tl.load(x_ptr + row * row_stride + col, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x))
    scale = tl.where(largest > 0, largest / 127, 1.0)
    codes = tl.floor(x / scale + 0.5)
    tl.store(codes_ptr + row * cols + col, codes.to(tl.int8), mask=inside)
    tl.store(scale_ptr + row, scale)
