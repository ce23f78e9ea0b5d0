"""Decode attention over a cache of 8 or 4 bits: the codes themselves go to the tensor cores.

The cache is that of KIVI (Liu et al. 2024, arXiv 2402.02750; see `quantized_kv`), the split of the
tokens that of `decode_attention`. No key and no value is ever dequantized: scales and lows move to
the small side of each product. With codes c, for the tokens t of a group

    q.k_t         =  (q * scale).c_t  +  q.low            scale, low: of the channels, in that group
    sum_t p_t v_t =  sum_t (p_t scale_t) c_t  +  sum_t p_t low_t

A code becomes a number for free: the 16 bits of an integer c < 1024, read as float16, are c 2^-24.
(Subnormal, which tensor cores take, and exact.) To unpack is to mask, and sometimes to shift; 2^24
is put back into the sums, which are float32. Two numbers meet codes as float16 and must stay in
its range: q * scale, for which q is divided by its largest entry before, and p_t scale_t, which is
below 2 since the running maximum is that of x_t + floor(log2 scale_t) in place of x_t.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fewer.kernels.flash_decode import (
    LOG2_E,
    attend,
    combine,
    grow,
    inside,
    read_tokens,
    require_full,
    require_lengths,
    require_query,
    share,
    split,
)
from fewer.kernels.interpreter import interpreted
from fewer.kernels.launch import fall_back
from fewer.kernels.quantized_kv import QuantizedKV, dequantize_kv, require_quantized


@triton.jit
def _unpack(words, BITS: tl.constexpr, ASM: tl.constexpr):
    """The 16 / BITS codes of each int16 word, as tiles of float16: a code c is the number c 2^-24.

    Of 4 bits, the second and fourth are 16 times that: they are masked where they are. Of 8 bits,
    only two are meant.
    """
    if BITS == 4:
        if ASM:  # two words at once
            a, b, c, e = tl.inline_asm_elementwise(
                """{ .reg .b32 high;
                and.b32 $0, $4, 0x000F000F;
                and.b32 $1, $4, 0x00F000F0;
                shr.u32 high, $4, 8;
                and.b32 $2, high, 0x000F000F;
                and.b32 $3, high, 0x00F000F0; }""",
                "=&r,=&r,=&r,=&r,r",
                [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            a, b = words & 0xF, words & 0xF0
            c, e = (words >> 8) & 0xF, (words >> 8) & 0xF0
            a, b = a.to(tl.float16, bitcast=True), b.to(tl.float16, bitcast=True)
            c, e = c.to(tl.float16, bitcast=True), e.to(tl.float16, bitcast=True)
        return a, b, c, e
    else:
        if ASM:
            a, b = tl.inline_asm_elementwise(
                "prmt.b32 $0, $2, 0, 0x4240; prmt.b32 $1, $2, 0, 0x4341;",
                "=&r,=&r,r",
                [words],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            a = (words & 0xFF).to(tl.float16, bitcast=True)
            b = ((words >> 8) & 0xFF).to(tl.float16, bitcast=True)
        return a, b, a, b


@triton.jit
def decode_quantized_kernel(
    q_ptr, kc_ptr, ks_ptr, kl_ptr, vc_ptr, vs_ptr, vl_ptr, lengths_ptr,
    part_ptr, lse_ptr, scores_ptr,
    tokens, groups, kv_heads, slots, places, factor,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    GROUP: tl.constexpr, d: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The same of codes: int16 words of W channels each, word w of the channels W w, W w + 1, ...

    What a mask leaves of the words is a tile of every W-th channel: so W products in place of one,
    and W parts of q and of the output.
    """
    W: tl.constexpr = 16 // BITS
    D: tl.constexpr = W * WIDE
    pair, batch, head = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    length = tokens
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + batch), tokens).to(tl.int32)
    first, last = share(length, BLOCK)
    row, token, word = tl.arange(0, 16), tl.arange(0, BLOCK), tl.arange(0, WIDE)
    rows = pair * GROUP + row
    channel = tl.arange(0, D)
    real, inside = (row < GROUP)[:, None], channel < d
    sixteenth = tl.where(channel % 2 == 0, 1.0, 0.0625) if BITS == 4 else 1.0
    q = tl.load(q_ptr + rows[:, None] * d + channel[None, :], real & inside[None, :], other=0.0)
    q = q.to(tl.float32)
    size = tl.max(tl.abs(q), axis=1)
    size = tl.where(size > 0, size, 1.0)
    q = q / size[:, None]
    factor *= size
    kc_ptr += batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
    vc_ptr += batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
    key_place = token[None, :] * k_token + word[:, None]
    value_place = token[:, None] * v_token + word[None, :]
    ks_ptr += pair.to(tl.int64) * groups * d
    kl_ptr += pair.to(tl.int64) * groups * d
    vs_ptr += pair.to(tl.int64) * tokens
    vl_ptr += pair.to(tl.int64) * tokens
    largest = tl.full((16,), -float("inf"), tl.float32)
    total = tl.zeros((16, BLOCK), tl.float32)  # one sum for each place of a tile, until the end
    lows = tl.zeros((16, BLOCK), tl.float32)
    acc0 = tl.zeros((16, WIDE), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        t = start + token
        words = tl.load(
            kc_ptr + tl.cast(start, tl.int64) * k_token + key_place,
            (t < last)[None, :] & (word < d // W)[:, None],
            other=0,
        )
        k0, k1, k2, k3 = _unpack(words, BITS, ASM)
        of_group = start // G * d + channel
        scale = tl.load(ks_ptr + of_group, inside, other=0.0).to(tl.float32) * sixteenth
        low = tl.load(kl_ptr + of_group, inside, other=0.0).to(tl.float32)
        steps = (q * scale[None, :]).to(tl.float16)
        if BITS == 4:
            even, odd = tl.split(steps.reshape(16, WIDE, 2, 2))
            a0, a2 = tl.split(even)
            a1, a3 = tl.split(odd)
        else:
            a0, a1 = tl.split(steps.reshape(16, WIDE, 2))
        x = tl.dot(a0, k0)
        x = tl.dot(a1, k1, x)
        if BITS == 4:
            x = tl.dot(a2, k2, x)
            x = tl.dot(a3, k3, x)
        x *= (factor * 16777216.0)[:, None]
        x += (tl.sum(q * low[None, :], axis=1) * factor)[:, None]
        if scores_ptr is not None:
            tl.store(
                scores_ptr + rows[:, None].to(tl.int64) * places + t[None, :],
                x,
                real & (t < last)[None, :],
            )
        # scale = 2^exponent * fraction, 1 <= fraction < 2, taken from the bits of a float32
        bits = tl.load(vs_ptr + t, t < last, other=1.0).to(tl.float32).to(tl.int32, bitcast=True)
        low = tl.load(vl_ptr + t, t < last, other=0.0).to(tl.float32)
        exponent = tl.where(t < last, ((bits >> 23) - 127).to(tl.float32), -float("inf"))
        fraction = (bits & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True)
        power = ((254 << 23) - (bits & 0x7F800000)).to(tl.float32, bitcast=True)  # 2^-exponent
        largest, shrink, p = grow(x + exponent[None, :], largest)
        total = total * shrink[:, None] + p * power[None, :]
        lows = lows * shrink[:, None] + p * (power * low)[None, :]
        p = (p * fraction[None, :]).to(tl.float16)
        words = tl.load(
            vc_ptr + tl.cast(start, tl.int64) * v_token + value_place,
            (t < last)[:, None] & (word < d // W)[None, :],
            other=0,
        )
        v0, v1, v2, v3 = _unpack(words, BITS, ASM)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None])
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None])
        if BITS == 4:
            acc2 = tl.dot(p, v2, acc2 * shrink[:, None])
            acc3 = tl.dot(p, v3, acc3 * shrink[:, None])
    total = tl.sum(total, axis=1)
    inverse = (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    lows = tl.sum(lows, axis=1)[:, None] * inverse
    even = 16777216.0 * inverse
    odd = even * 0.0625 if BITS == 4 else even
    spot = rows * slots + tl.program_id(1)
    part_ptr += spot[:, None] * d + word[None, :] * W
    stored = real & (word < d // W)[None, :]
    tl.store(part_ptr, acc0 * even + lows, stored)
    tl.store(part_ptr + 1, acc1 * odd + lows, stored)
    if BITS == 4:
        tl.store(part_ptr + 2, acc2 * even + lows, stored)
        tl.store(part_ptr + 3, acc3 * odd + lows, stored)
    tl.store(lse_ptr + spot, largest + tl.log2(tl.where(total > 0, total, 1.0)), row < GROUP)


def _launch(
    q: Tensor,
    cache: QuantizedKV,
    lengths: Tensor | None,
    recent: list[Tensor],
    recent_lengths: Tensor | None,
    scale: float,
    observe: bool,
    **constants: int,
) -> tuple[Tensor, Tensor]:
    """(out, weights or nothing). Constants replace the stored ones."""
    q = q.contiguous()
    (batch, heads, d), (kv_heads, before) = q.shape, cache.key_codes.shape[1:3]
    behind = recent[0].shape[2] if recent else 0
    places = before + behind
    if batch == 0 or places == 0:
        weights = (batch, kv_heads, places if observe else 0)
        return torch.zeros_like(q), q.new_zeros(weights, dtype=torch.float32)
    name = f"decode_attention_{cache.bits}"
    slots, chosen = split(name, q, kv_heads, before, cache.group, constants)
    recent_slots, of_recent = split("decode_attention_16", q, kv_heads, behind, 1024, constants)
    all_slots = slots + recent_slots
    part = q.new_empty((batch * heads, all_slots, d), dtype=torch.float32)
    lse = q.new_empty((batch * heads, all_slots), dtype=torch.float32)
    scores = None
    if observe:
        scores = q.new_full((batch * heads, places), -math.inf, dtype=torch.float32)
    if slots:
        key_codes, value_codes = _words(cache.key_codes), _words(cache.value_codes)
        scales = cache.key_scale, cache.key_low, cache.value_scale, cache.value_low
        key_scale, key_low, value_scale, value_low = (x.contiguous() for x in scales)
        decode_quantized_kernel[(batch * kv_heads, slots)](
            q, key_codes, key_scale, key_low, value_codes, value_scale, value_low, lengths,
            part, lse, scores,
            before, key_scale.shape[2], kv_heads, all_slots, places, scale * LOG2_E,
            *key_codes.stride()[:3], *value_codes.stride()[:3],
            GROUP=heads // kv_heads, d=d, BITS=cache.bits, G=cache.group,
            WIDE=max(16, triton.next_power_of_2(d) * cache.bits // 16),
            ASM=not interpreted(), **chosen,
        )  # fmt: skip
    if recent_slots:
        k, v = recent
        read_tokens(q, k, v, recent_lengths, scale, part, lse, scores, recent_slots, of_recent)
    return combine(q, kv_heads, part, lse, scores)


def _words(codes: Tensor) -> Tensor:
    """The same memory as int16, two bytes a word."""
    even = codes.stride(3) == 1 and not any(s % 2 for s in codes.stride()[:3])
    if not even or codes.storage_offset() % 2:
        codes = codes.clone(memory_format=torch.contiguous_format)
    return codes.view(torch.int16)


@torch.library.custom_op("fewer::decode_attention_quantized", mutates_args=())
def _decode_attention_quantized(
    q: Tensor,
    cache: list[Tensor],
    bits: int,
    group: int,
    lengths: Tensor | None,
    recent: list[Tensor],
    recent_lengths: Tensor | None,
    scale: float,
    observe: bool,
) -> tuple[Tensor, Tensor]:
    codes = QuantizedKV._make([*cache, bits, group])
    return _launch(q, codes, lengths, recent, recent_lengths, scale, observe)


@_decode_attention_quantized.register_kernel("cpu")
def _(
    q: Tensor,
    cache: list[Tensor],
    bits: int,
    group: int,
    lengths: Tensor | None,
    recent: list[Tensor],
    recent_lengths: Tensor | None,
    scale: float,
    observe: bool,
) -> tuple[Tensor, Tensor]:
    fall_back("decode_attention_quantized")
    out, weights = decode_attention_quantized_reference(
        q,
        QuantizedKV._make([*cache, bits, group]),
        lengths,
        scale,
        (recent[0], recent[1]) if recent else None,
        recent_lengths,
    )
    return out, weights if observe else weights[..., :0].clone()


@_decode_attention_quantized.register_fake
def _(
    q: Tensor,
    cache: list[Tensor],
    bits: int,
    group: int,
    lengths: Tensor | None,
    recent: list[Tensor],
    recent_lengths: Tensor | None,
    scale: float,
    observe: bool,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    places = cache[0].shape[2] + (recent[0].shape[2] if recent else 0)
    weights = (*cache[0].shape[:2], places if observe else 0)
    return out, q.new_empty(weights, dtype=torch.float32)


def decode_attention_quantized(
    q: Float[Tensor, "batch heads d"],
    cache: QuantizedKV,
    lengths: Int[Tensor, "batch"] | None = None,
    scale: float | None = None,
    recent: tuple[Tensor, Tensor] | None = None,
    recent_lengths: Int[Tensor, "batch"] | None = None,
    *,
    observe: bool = False,
) -> Any:
    """`decode_attention` over a quantized cache, and over recent tokens that are not quantized yet.

    Args:
        q: as there.
        cache: of `quantize_kv`, or slices of such: codes of a longer cache are read where they are.
        lengths: how many of its tokens each row of the batch has.
        scale: by default 1 / sqrt(d).
        recent: keys and values [batch, kv_heads, recent, d] behind them, of the type of q.
        recent_lengths: how many of those each row has.
        observe: return the weights as well, of the tokens of the cache and then the recent ones.

    Returns:
        As `decode_attention`. scale_c q_c of a channel and the weights times the values' scales
        are rounded to float16 before they meet codes; nothing else is rounded.
        Without a GPU: `decode_attention_quantized_reference`.

    Raises:
        TypeError, ValueError: as there, or the cache's parts do not fit.

    Example:
        >>> from fewer.kernels.flash_decode import decode_attention_reference
        >>> from fewer.kernels.quantized_kv import quantize_kv
        >>> q, k, v = torch.randn(1, 4, 16).half(), *torch.randn(2, 1, 2, 40, 16).half()
        >>> out, _ = decode_attention_quantized_reference(q, quantize_kv(k, v, 8, group=32))
        >>> exact, _ = decode_attention_reference(q, k, v)
        >>> bool((out - exact).abs().max() < 0.02)
        True
    """
    require_query(q, cache.key_codes.shape[1] if cache.key_codes.ndim == 4 else 0)
    require_quantized(cache, q)
    require_lengths(q, lengths, "lengths")
    if recent is not None:
        require_full(q, *recent, "recent[0]", "recent[1]")
        if recent[0].shape[1] != cache.key_codes.shape[1]:
            raise ValueError(
                f"recent must have the {cache.key_codes.shape[1]} key heads of the cache, "
                f"got {recent[0].shape[1]}"
            )
    require_lengths(q, recent_lengths, "recent_lengths")
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    out, weights = _decode_attention_quantized(
        q,
        list(cache[:6]),
        cache.bits,
        cache.group,
        lengths,
        list(recent or ()),
        recent_lengths,
        scale,
        observe,
    )
    return (out, weights) if observe else out


def decode_attention_quantized_reference(
    q: Float[Tensor, "batch heads d"],
    cache: QuantizedKV,
    lengths: Int[Tensor, "batch"] | None = None,
    scale: float | None = None,
    recent: tuple[Tensor, Tensor] | None = None,
    recent_lengths: Int[Tensor, "batch"] | None = None,
) -> tuple[Float[Tensor, "batch heads d"], Float[Tensor, "batch kv_heads tokens"]]:
    """`decode_attention_quantized` with observe, in plain torch: dequantized, then attended to."""
    k, v = dequantize_kv(cache)
    of_row = inside(k, lengths)
    if recent is not None:
        k, v = torch.cat([k, recent[0]], 2), torch.cat([v, recent[1]], 2)
        of_row = torch.cat([of_row, inside(recent[0], recent_lengths)], 1)
    return attend(q, k, v, of_row, scale)
