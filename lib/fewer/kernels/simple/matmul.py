"""A matrix product: every program makes one tile of it, and sums in float32.

Tillet, Kung, Cox 2019, "Triton: An intermediate language and compiler for tiled neural network
computations" (MAPL 2019, doi 10.1145/3315508.3329973), section 2. A tile of C needs a band of rows
of A and a band of columns of B. Both are walked along k, BLOCK_K at a time:

    C[tile] = sum over the steps s of  A[rows, s] B[s, cols]

`tl.dot` multiplies two tiles on the tensor cores: float16 in, sums in float32. A sum that is held
in float16 loses the small terms as soon as it is large.
"""

import triton.language as tl

from fewer.kernels.interpreter import on_copies


@on_copies
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    m,
    n,
    k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_cn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C = A B; program (i, j) makes the tile that is i-th from above and j-th from the left.

    Launched with a grid of (m / BLOCK_M, n / BLOCK_N) programs, both rounded up. Each walks along
    k, BLOCK_K at a time. A step takes a tile of A, BLOCK_M by BLOCK_K, and one of B, BLOCK_K by
    BLOCK_N, and adds their product to the tile of C, which is held in float32 to the end:

        C[rows, cols] = sum over the steps s of  A[rows, s] B[s, cols]

    Matrices come with both strides, in elements, so that transposed ones need no copy: A[r, c] is
    r * stride_am + c * stride_ak elements behind the first, and so on.

    Args:
        a_ptr: to float16 [m, k].
        b_ptr: to float16 [k, n].
        c_ptr: to float32 or float16 [m, n], to be written.
        m, n, k: any sizes of at least 1; they need not be multiples of the tiles'.
        stride_am, ..., stride_cn: how many elements it is to the next one in that dimension.
        BLOCK_M, BLOCK_N: of the tile of C, BLOCK_K: of a step; powers of two of at least 16.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, 3).half(), torch.arange(6.0).reshape(3, 2).half()
        >>> strides = [*a.stride(), *b.stride(), 2, 1]
        >>> c = matmul_kernel(
        ...     (1, 1), a, b, torch.zeros(2, 2), 2, 2, 3, *strides,
        ...     BLOCK_M=16, BLOCK_N=16, BLOCK_K=16,
        ... )[2]
        >>> c.tolist()
        [[6.0, 9.0], [6.0, 9.0]]
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        along = start + tl.arange(0, BLOCK_K)[None, :]
        down = start + tl.arange(0, BLOCK_K)[:, None]
        a = tl.load(
            a_ptr + row * stride_am + along * stride_ak, mask=(row < m) & (along < k), other=0.0
        )
        b = tl.load(
            b_ptr + down * stride_bk + col * stride_bn, mask=(down < k) & (col < n), other=0.0
        )
        total += tl.dot(a, b)
    tl.store(c_ptr + row * stride_cm + col * stride_cn, total, mask=(row < m) & (col < n))
