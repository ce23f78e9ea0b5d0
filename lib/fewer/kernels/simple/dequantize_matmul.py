"""A layer whose weights are 4 bits: they become numbers in registers, never in memory.

Frantar et al. 2022, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers" (arXiv 2210.17323), section 4 ("quantized-matrix full-precision-vector product"). The
time of a layer at few tokens is that of reading its weights. So they are read as they are stored,
two codes a byte, and dequantized beside the product:

    y = x W^T,    W[j, i] = scale[j, g] (code[j, i] - zero[j, g])    with g = i // GROUP
"""

import triton.language as tl

from fewer.kernels.interpreter import on_copies


@on_copies
def dequantize_matmul_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    m,
    n,
    k,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = x W^T of 4-bit weights; program (i, j) makes a tile of y, BLOCK_M by BLOCK_N.

    Launched with a grid of (m / BLOCK_M, n / BLOCK_N) programs, both rounded up. Each walks along
    k, one group of weights at a time:

        W[j, i] = scale[j, g] * (code[j, i] - zero[j, g])    with g = i // GROUP

    Both factors of `tl.dot` have one type: these weights are rounded to float16. Sums are float32.

    Args:
        x_ptr: to float16 [m, k]; this and all others contiguous, row by row.
        packed_ptr: to uint8 [n, k / 2]: byte i of a row has the code of weight 2 i in its low four
            bits, and that of weight 2 i + 1 in its high four; 0 to 15.
        scale_ptr: to float32 [n, k / GROUP].
        zero_ptr: to float32 [n, k / GROUP]: the code, not always a whole number, that means 0.
        y_ptr: to float32 or float16 [m, n], to be written.
        m, n: any sizes of at least 1.
        k: a multiple of GROUP.
        GROUP: weights that share a scale and a zero, a power of two of at least 16.
        BLOCK_M, BLOCK_N: of the tile of y; powers of two of at least 16.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 16).half()
        >>> x[0, 0], x[0, 1] = 1, 100
        >>> packed = torch.full((2, 8), 0x31, dtype=torch.uint8)
        >>> scale, zero = torch.tensor([[1.0], [0.5]]), torch.tensor([[0.0], [1.0]])
        >>> dequantize_matmul_kernel(
        ...     (1, 1), x, packed, scale, zero, torch.zeros(1, 2), 1, 2, 16,
        ...     GROUP=16, BLOCK_M=16, BLOCK_N=16,
        ... )[4].tolist()  # row 0 of W is 1, 3, 1, 3, ..., row 1 is 0, 1, 0, 1, ...
        [[301.0, 100.0]]
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(k // GROUP):
        along = group * GROUP + tl.arange(0, GROUP)[None, :]
        down = group * GROUP + tl.arange(0, GROUP)[:, None]
        x = tl.load(x_ptr + row * k + along, mask=row < m)
        byte = tl.load(packed_ptr + col * (k // 2) + down // 2, mask=col < n)
        codes = (byte >> (down % 2 * 4)) & 15
        scale = tl.load(scale_ptr + col * (k // GROUP) + group, mask=col < n)
        zero = tl.load(zero_ptr + col * (k // GROUP) + group, mask=col < n)
        w = scale * (codes.to(tl.float32) - zero)
        total += tl.dot(x, w.to(tl.float16))
    tl.store(y_ptr + row * n + col, total, mask=(row < m) & (col < n))
