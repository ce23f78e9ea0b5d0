"""Attention of one new token over its cache: the tokens of a head are split among many programs.

Dao et al. 2023, "Flash-Decoding for long-context inference" (pytorch.org/blog/flash-decoding). Each
program keeps a running maximum and sum over its part p of the tokens, as in FlashAttention (Dao et
al. 2022, arXiv 2205.14135); the log-sum-exps put the parts together exactly. In base 2:

    x_t = scale log2(e) q.k_t,   lse_p = log2 sum 2^x_t,    o_p = sum 2^(x_t - lse_p) v_t   (t in p)

    lse = log2 sum_p 2^lse_p,     out = sum_p 2^(lse_p - lse) o_p

Each key and value is read once for all the query heads that share it: these are the rows of the
products on tensor cores, padded to 16. With `observe`, the first pass leaves its scores x_t behind,
and the weights that H2O adds up are 2^(x_t - lse).

`decode_quantized` is the same over a quantized cache.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from fewer.kernels.launch import config, fall_back

ROWS = 16  # the fewest rows of a product on tensor cores, so the most heads of a group
LOG2_E = math.log2(math.e)
DEFAULT = {"BLOCK": 64, "STAGES": 3, "per_processor": 4, "num_warps": 4}


@triton.jit
def share(tokens, lengths_ptr, batch, BLOCK: tl.constexpr):
    """The tokens of this split: whole tiles of BLOCK, equally many for all splits but the last."""
    length = tokens
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + batch), tokens).to(tl.int32)
    each = tl.cdiv(tl.cdiv(length, BLOCK), tl.num_programs(1)) * BLOCK
    first = tl.program_id(1) * each
    return first, tl.minimum(first + each, length)


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, part_ptr, lse_ptr, scores_ptr,
    tokens, kv_heads, slot, slots, place, places, factor,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    GROUP: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (pair, split) reads its share of the tokens of one key head and leaves a part."""
    pair, batch, head = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    first, last = share(tokens, lengths_ptr, batch, BLOCK)
    row, token, channel = tl.arange(0, 16), tl.arange(0, BLOCK), tl.arange(0, D)
    rows = pair * GROUP + row
    real, inside = (row < GROUP)[:, None], (channel < d)[None, :]
    q = tl.load(q_ptr + rows[:, None] * d + channel[None, :], real & inside, other=0.0)
    k_ptr += batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
    v_ptr += batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
    key_place = token[None, :] * k_token + channel[:, None]
    value_place = token[:, None] * v_token + channel[None, :]
    largest = tl.full((16,), -float("inf"), tl.float32)
    total = tl.zeros((16, BLOCK), tl.float32)  # one sum for each place of a tile, until the end
    acc = tl.zeros((16, D), tl.float32)
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        t = start + token
        k = tl.load(
            k_ptr + tl.cast(start, tl.int64) * k_token + key_place,
            (t < last)[None, :] & (channel < d)[:, None],
            other=0.0,
        )
        x = tl.dot(q, k) * factor
        if scores_ptr is not None:
            tl.store(
                scores_ptr + rows[:, None].to(tl.int64) * places + (place + t)[None, :],
                x,
                real & (t < last)[None, :],
            )
        x = tl.where((t < last)[None, :], x, -float("inf"))
        new = tl.maximum(largest, tl.max(x, axis=1))
        shrink, p = tl.exp2(largest - new), tl.exp2(x - new[:, None])
        largest = new
        total = total * shrink[:, None] + p
        v = tl.load(
            v_ptr + tl.cast(start, tl.int64) * v_token + value_place,
            (t < last)[:, None] & inside,
            other=0.0,
        )
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    total = tl.sum(total, axis=1)
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    spot = rows * slots + slot + tl.program_id(1)
    tl.store(part_ptr + spot[:, None] * d + channel[None, :], out, real & inside)
    tl.store(lse_ptr + spot, largest + tl.log2(tl.where(total > 0, total, 1.0)), row < GROUP)


@triton.jit
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, total_ptr, slots,
    d: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Program h puts the parts of query head h together; no tokens at all give 0."""
    head, slot, channel = tl.program_id(0), tl.arange(0, SLOTS), tl.arange(0, D)
    lse = tl.load(lse_ptr + head * slots + slot, slot < slots, other=-float("inf"))
    largest = tl.max(lse, axis=0)
    total = tl.sum(tl.exp2(lse - tl.where(largest > -float("inf"), largest, 0.0)), axis=0)
    lse = largest + tl.log2(tl.where(total > 0, total, 1.0))
    acc = tl.zeros((16, D), tl.float32)
    for start in range(0, slots, 16):
        s = start + tl.arange(0, 16)
        weight = tl.load(lse_ptr + head * slots + s, s < slots, other=-float("inf"))
        weight = tl.exp2(weight - tl.where(total > 0, lse, 0.0))
        part = tl.load(
            part_ptr + (head * slots + s)[:, None] * d + channel[None, :],
            (s < slots)[:, None] & (channel < d)[None, :],
            other=0.0,
        )
        acc += weight[:, None] * part
    out = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head * d + channel, out, channel < d)
    tl.store(total_ptr + head, lse)


@triton.jit
def weights_kernel(
    scores_ptr, total_ptr, weights_ptr, places, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (pair, tile): attention weights from scores, summed over the heads of the group."""
    pair, t = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(GROUP):
        lse = tl.load(total_ptr + pair * GROUP + head)
        at = (pair * GROUP + head).to(tl.int64) * places + t
        score = tl.load(scores_ptr + at, t < places, other=-float("inf"))
        total += tl.exp2(score - tl.where(lse > -float("inf"), lse, 0.0))
    tl.store(weights_ptr + pair.to(tl.int64) * places + t, total, t < places)


def split(
    kernel: str, q: Tensor, kv_heads: int, tokens: int, longest: int, constants: dict[str, int]
) -> tuple[int, dict[str, int]]:
    """How many programs share the tokens of a key head, and the kernel's constants.

    Args:
        kernel: its name in configs.json.
        q: [batch, heads, d].
        longest: a tile has at most so many tokens.
        constants: in place of the stored ones.
    """
    if tokens == 0:
        return 0, {}
    batch, heads, d = q.shape
    pairs = batch * kv_heads
    shape = {"pairs": pairs, "rows": heads // kv_heads, "d": d, "tokens": tokens}
    chosen = config(kernel, DEFAULT, **shape) | constants
    chosen["BLOCK"] = min(chosen["BLOCK"], longest)
    processors = 1
    if q.is_cuda:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = processors * chosen.pop("per_processor") // pairs
    return max(1, min(programs, -(-tokens // chosen["BLOCK"]), 1024)), chosen


def read_tokens(
    q: Float[Tensor, "batch heads d"],
    k: Float[Tensor, "batch kv_heads tokens d"],
    v: Float[Tensor, "batch kv_heads tokens d"],
    lengths: Int[Tensor, "batch"] | None,
    scale: float,
    part: Float32[Tensor, "rows slots d"],
    lse: Float32[Tensor, "rows slots"],
    scores: Float32[Tensor, "rows places"] | None,
    slots: int,
    constants: dict[str, int],
) -> None:
    """Fill the last `slots` parts, and the last places of scores."""
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    lengths = None if lengths is None else lengths.contiguous()
    (batch, heads, d), (kv_heads, tokens) = q.shape, k.shape[1:3]
    places = tokens if scores is None else scores.shape[1]
    decode_kernel[(batch * kv_heads, slots)](
        q, k, v, lengths, part, lse, scores,
        tokens, kv_heads, lse.shape[1] - slots, lse.shape[1], places - tokens, places,
        scale * LOG2_E, *k.stride()[:3], *v.stride()[:3],
        GROUP=heads // kv_heads, d=d, D=triton.next_power_of_2(d), **constants,
    )  # fmt: skip


def combine(
    q: Float[Tensor, "batch heads d"],
    kv_heads: int,
    part: Float32[Tensor, "rows slots d"],
    lse: Float32[Tensor, "rows slots"],
    scores: Float32[Tensor, "rows places"] | None,
) -> tuple[Float[Tensor, "batch heads d"], Float32[Tensor, "batch kv_heads places"]]:
    """(out, weights or nothing) from the parts."""
    (batch, heads, d), slots = q.shape, lse.shape[1]
    out, total = torch.empty_like(q), lse.new_empty(batch * heads)
    combine_kernel[(batch * heads,)](
        part, lse, out, total, slots,
        d=d, D=triton.next_power_of_2(d), SLOTS=max(16, triton.next_power_of_2(slots)),
    )  # fmt: skip
    places = 0 if scores is None else scores.shape[1]
    weights = lse.new_empty((batch, kv_heads, places))
    if scores is not None:
        weights_kernel[(batch * kv_heads, triton.cdiv(places, 1024))](
            scores, total, weights, places, GROUP=heads // kv_heads, BLOCK=1024
        )
    return out, weights


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scale: float,
    observe: bool,
    **constants: int,
) -> tuple[Tensor, Tensor]:
    """(out, weights or nothing). Constants replace the stored ones."""
    q = q.contiguous()
    (batch, heads, d), (kv_heads, tokens) = q.shape, k.shape[1:3]
    places = tokens if observe else 0
    if batch == 0 or tokens == 0:
        return torch.zeros_like(q), q.new_zeros((batch, kv_heads, places), dtype=torch.float32)
    slots, chosen = split("decode_attention_16", q, kv_heads, tokens, 1024, constants)
    part = q.new_empty((batch * heads, slots, d), dtype=torch.float32)
    lse = q.new_empty((batch * heads, slots), dtype=torch.float32)
    scores = None
    if observe:
        scores = q.new_full((batch * heads, places), -math.inf, dtype=torch.float32)
    read_tokens(q, k, v, lengths, scale, part, lse, scores, slots, chosen)
    return combine(q, kv_heads, part, lse, scores)


@torch.library.custom_op("fewer::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, observe: bool
) -> tuple[Tensor, Tensor]:
    return _launch(q, k, v, lengths, scale, observe)


@_decode_attention.register_kernel("cpu")
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, observe: bool
) -> tuple[Tensor, Tensor]:
    fall_back("decode_attention")
    out, weights = decode_attention_reference(q, k, v, lengths, scale)
    return out, weights if observe else weights[..., :0].clone()


@_decode_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, observe: bool
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    weights = (*k.shape[:2], k.shape[2] if observe else 0)
    return out, q.new_empty(weights, dtype=torch.float32)


def decode_attention(
    q: Float[Tensor, "batch heads d"],
    k: Float[Tensor, "batch kv_heads tokens d"],
    v: Float[Tensor, "batch kv_heads tokens d"],
    lengths: Int[Tensor, "batch"] | None = None,
    scale: float | None = None,
    *,
    observe: bool = False,
) -> Any:
    """softmax(scale q K^T) V for one query in each head, over the first `lengths` tokens.

    Args:
        q: float16 or bfloat16; d a multiple of 16 up to 256. Query head h attends to key head
            h // (heads / kv_heads), of which at most 16 share one.
        k, v: of the type of q. Strides may be any while the numbers of a token lie side by side, as
            in a slice of a longer cache; otherwise they are copied first.
        lengths: how many tokens each row of the batch has, int32 or int64, on the same device; more
            than there are count as all. None: all. They are not looked at on the host.
        scale: by default 1 / sqrt(d).
        observe: return the weights as well.

    Returns:
        out: [batch, heads, d] in the type of q; 0 for a row without tokens. Sums are in float32;
        the weights are rounded to the type of v before they meet it.
        With observe, (out, weights): float32, [batch, kv_heads, tokens], the attention weights
        summed over the query heads of a key head, which is what `fewer.inference.h2o` accumulates;
        0 for tokens behind the length.
        Without a GPU: `decode_attention_reference`.

    Raises:
        TypeError: q, k or v is of another type, or lengths not of integers.
        ValueError: shapes do not fit, or sizes are not as said.

    Example:
        >>> q, k = torch.zeros(1, 4, 16).half(), torch.randn(1, 2, 3, 16).half()
        >>> v = torch.tensor([0.0, 3.0, 6.0]).half()[:, None].expand(1, 2, 3, 16)
        >>> out, weights = decode_attention_reference(q, k, v, torch.tensor([2]))
        >>> out[0, :, 0].tolist(), weights[0, 0].tolist()
        ([1.5, 1.5, 1.5, 1.5], [1.0, 1.0, 0.0])
    """
    require_query(q, k.shape[1] if k.ndim == 4 else 0)
    require_full(q, k, v, "k", "v")
    require_lengths(q, lengths, "lengths")
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    out, weights = _decode_attention(q, k, v, lengths, scale, observe)
    return (out, weights) if observe else out


def decode_attention_reference(
    q: Float[Tensor, "batch heads d"],
    k: Float[Tensor, "batch kv_heads tokens d"],
    v: Float[Tensor, "batch kv_heads tokens d"],
    lengths: Int[Tensor, "batch"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "batch heads d"], Float[Tensor, "batch kv_heads tokens"]]:
    """`decode_attention` with observe, in plain torch."""
    return attend(q, k, v, inside(k, lengths), scale)


def inside(k: Tensor, lengths: Tensor | None) -> Bool[Tensor, "batch tokens"]:
    tokens = torch.arange(k.shape[2], device=k.device)
    return (tokens < (k.shape[2] if lengths is None else lengths[:, None])).expand(len(k), -1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, inside: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    grouped = q.to(exact).unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k.to(exact).mT * scale).masked_fill(~inside[:, None, None], -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # nan: no token at all
    return (weights @ v.to(exact)).flatten(1, 2).to(q.dtype), weights.sum(2)


def require_query(q: Tensor, kv_heads: int) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"q must be float16 or bfloat16, got {q.dtype}")
    if q.ndim != 3 or q.shape[2] % 16 or not 16 <= q.shape[2] <= 256:
        wanted = "[batch, heads, d], d a multiple of 16 up to 256"
        raise ValueError(f"q must be {wanted}, got {list(q.shape)}")
    heads = q.shape[1]
    if kv_heads < 1 or heads % kv_heads or heads // kv_heads > ROWS:
        raise ValueError(
            f"heads must be 1 to {ROWS} times the key heads, got {heads} for {kv_heads} key heads"
        )


def require_full(q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str) -> None:
    for name, x in ((k_name, k), (v_name, v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must be of the type of q, {q.dtype}, got {x.dtype}")
        if x.shape != k.shape or x.ndim != 4 or (x.shape[0], x.shape[3]) != (len(q), q.shape[2]):
            raise ValueError(
                f"{k_name} and {v_name} must be [batch, kv_heads, tokens, d] for q "
                f"{list(q.shape)}, got {list(k.shape)} and {list(v.shape)}"
            )


def require_lengths(q: Tensor, lengths: Tensor | None, name: str) -> None:
    if lengths is None:
        return
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {lengths.dtype}")
    if lengths.shape != q.shape[:1]:
        raise ValueError(
            f"{name} must be [{len(q)}], one for each row of q, got {list(lengths.shape)}"
        )
