"""Attention of one new token over a cache, which is read once.

Dao et al. 2022, "FlashAttention: Fast and memory-efficient exact attention with IO-awareness"
(arXiv 2205.14135), section 3.1, for one query; Ainslie et al. 2023 (arXiv 2305.13245) for heads
that share keys. The running maximum m and sum d of softmax serve a weighted mean of values as well,
if this is corrected together with d. With s = K q / sqrt(dim) of a tile and m' = max(m, max s):

    d'   = d exp(m - m')   + sum exp(s - m')
    acc' = acc exp(m - m') + exp(s - m') V            and at the end  out = acc / d
"""

import triton.language as tl

from fewer.kernels.interpreter import on_copies


@on_copies
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, tokens, group, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """out = softmax(q K^T / sqrt(DIM)) V of one query in each head; program h has query head h.

    Launched with one program for each query head. It walks over the tokens, BLOCK at a time, and
    loads each key and each value once. It never holds all scores, but in float32 a maximum m, a sum
    d and DIM values acc, from -inf, 0 and zeros on. With s = K q / sqrt(DIM), a tile's scores,

        m'   = max(m, max s)
        d'   = d exp(m - m')   + sum exp(s - m')
        acc' = acc exp(m - m') + exp(s - m') V            and at the end  out = acc / d

    Places behind the last token have no weight. `tl.dot` does not fit here: it takes 16 rows or
    more, and q is one. Multiply, and `tl.sum`.

    Args:
        q_ptr: to [heads, DIM], float32 or float16; this and all others contiguous, row by row.
        k_ptr, v_ptr: to [heads / group, tokens, DIM], of the same type.
        out_ptr: to [heads, DIM] of the same type, to be written.
        tokens: how many there are in the cache, at least 1.
        group: how many query heads share a key head: head h reads key head h // group.
        DIM: of a head, a power of two.
        BLOCK: tokens of a tile, a power of two.

    Example:
        >>> import torch
        >>> q, k = torch.zeros(2, 4), torch.randn(1, 3, 4)
        >>> v = torch.tensor([0.0, 3.0, 6.0]).reshape(1, 3, 1).expand(1, 3, 4).contiguous()
        >>> decode_attention_kernel(
        ...     2, q, k, v, torch.zeros(2, 4), 3, 2, DIM=4, BLOCK=2
        ... )[3].tolist()  # q = 0 attends to all tokens alike
        [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]
    """
    head = tl.program_id(0)
    dim = tl.arange(0, DIM)
    q = tl.load(q_ptr + head * DIM + dim).to(tl.float32) / DIM**0.5
    first = head // group * tokens * DIM
    largest = -float("inf")
    total = 0.0
    out = tl.zeros((DIM,), tl.float32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        at = first + token[:, None] * DIM + dim[None, :]
        inside = token < tokens
        k = tl.load(k_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
        scores = tl.where(inside, tl.sum(k * q[None, :], axis=1), -float("inf"))
        larger = tl.maximum(largest, tl.max(scores))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(scores - larger)
        total = total * shrink + tl.sum(weights)
        out = out * shrink + tl.sum(weights[:, None] * v, axis=0)
        largest = larger
    tl.store(out_ptr + head * DIM + dim, out / total)
