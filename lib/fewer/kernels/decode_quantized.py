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

The scores are made transposed, x^T = K q^T: as columns, 8 query heads are enough for tensor cores
(as rows it takes 16), so there is half as much to exponentiate for none.
"""

# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 (the compiler knows no stars in tuples)

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

    Of 4 bits, the second and fourth are 16 times that: they are masked where they are.
    """
    if BITS == 8 and ASM:  # two words at once
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x4240; prmt.b32 $1, $2, 0, 0x4341;",
            "=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif BITS == 8:
        return (
            (words & 0xFF).to(tl.float16, bitcast=True),
            ((words >> 8) & 0xFF).to(tl.float16, bitcast=True),
        )
    elif ASM:
        return tl.inline_asm_elementwise(
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
        return (
            (words & 0xF).to(tl.float16, bitcast=True),
            (words & 0xF0).to(tl.float16, bitcast=True),
            ((words >> 8) & 0xF).to(tl.float16, bitcast=True),
            ((words >> 8) & 0xF0).to(tl.float16, bitcast=True),
        )


@triton.jit
def _of_channels(ptr, channel, inside, W: tl.constexpr):
    """W vectors: a scale (or low) for every W-th channel, from `channel` on."""
    a = tl.load(ptr + channel, inside, other=0.0)
    b = tl.load(ptr + channel + 1, inside, other=0.0)
    if W == 2:
        return a, b
    else:
        c = tl.load(ptr + channel + 2, inside, other=0.0)
        e = tl.load(ptr + channel + 3, inside, other=0.0)
        return a, b, c, e


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
    ROWS: tl.constexpr = 8 if GROUP <= 8 else 16
    # What q * scale may be multiplied with: float16 holds that of any keys that it holds. Of 4
    # bits, every other code is 16 times too large.
    LIFT: tl.constexpr = 64.0 if BITS == 8 else 4.0
    ODD: tl.constexpr = LIFT if BITS == 8 else LIFT / 16
    pair, batch, head = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    first, last = share(tokens, lengths_ptr, batch, BLOCK)
    row, token, word = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, WIDE)
    rows, channel = pair * GROUP + row, W * word
    real, inside = (row < GROUP)[None, :], word < d // W
    kc_ptr += batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
    vc_ptr += batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
    key_place = token[:, None] * k_token + word[None, :]
    value_place = token[:, None] * v_token + word[None, :]
    ks_ptr += pair.to(tl.int64) * groups * d
    kl_ptr += pair.to(tl.int64) * groups * d
    vs_ptr += pair.to(tl.int64) * tokens
    vl_ptr += pair.to(tl.int64) * tokens

    parts, q, acc = (), (), ()
    size = tl.zeros((ROWS,), tl.float32)
    for j in tl.static_range(W):
        of_part = rows[None, :] * d + channel[:, None] + j
        part = tl.load(q_ptr + of_part, inside[:, None] & real, other=0.0).to(tl.float32)
        size = tl.maximum(size, tl.max(tl.abs(part), axis=0))
        parts = parts + (part,)
    size = tl.where(size > 0, size, 1.0)
    factor *= size
    for j in tl.static_range(W):
        q = q + (parts[j] / size[None, :],)
        acc = acc + (tl.zeros((ROWS, WIDE), tl.float32),)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK, ROWS), tl.float32)  # one sum for each place of a tile, until the end
    lows = tl.zeros((BLOCK, ROWS), tl.float32)
    # Scales and lows are loaded a step ahead: the compiler does that for products' operands alone.
    some = word < tl.where(first < last, d // W, 0)
    key_scales = _of_channels(ks_ptr, first // G * d + channel, some, W)
    key_lows = _of_channels(kl_ptr, first // G * d + channel, some, W)
    value_scale = tl.load(vs_ptr + first + token, first + token < last, other=1.0)
    value_low = tl.load(vl_ptr + first + token, first + token < last, other=0.0)
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        t = start + token
        live = t < last
        stored = live[:, None] & inside[None, :]
        first_key = kc_ptr + tl.cast(start, tl.int64) * k_token
        keys = _unpack(tl.load(first_key + key_place, stored, other=0), BITS, ASM)
        x = tl.zeros((BLOCK, ROWS), tl.float32)
        of_lows = tl.zeros((WIDE, ROWS), tl.float32)
        for j in tl.static_range(W):
            steps = q[j] * (key_scales[j].to(tl.float32) * (ODD if j % 2 else LIFT))[:, None]
            x = tl.dot(keys[j], steps.to(tl.float16), x)
            of_lows += q[j] * key_lows[j].to(tl.float32)[:, None]
        x = (x * (16777216.0 / LIFT) + tl.sum(of_lows, axis=0)[None, :]) * factor[None, :]
        if scores_ptr is not None:
            of_score = rows[None, :].to(tl.int64) * places + t[:, None]
            tl.store(scores_ptr + of_score, x, real & live[:, None])
        # scale = 2^exponent * fraction, 1 <= fraction < 2, taken from the bits of a float32
        bits = value_scale.to(tl.float32).to(tl.int32, bitcast=True)
        exponent = tl.where(live, ((bits >> 23) - 127).to(tl.float32), -float("inf"))
        fraction = (bits & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True)
        power = ((254 << 23) - (bits & 0x7F800000)).to(tl.float32, bitcast=True)  # 2^-exponent
        x += exponent[:, None]
        new = tl.maximum(largest, tl.max(x, axis=0))
        shrink, p = tl.exp2(largest - new), tl.exp2(x - new[None, :])
        largest = new
        total = total * shrink[None, :] + p * power[:, None]
        lows = lows * shrink[None, :] + p * (power * value_low.to(tl.float32))[:, None]
        weights = tl.trans((p * fraction[:, None]).to(tl.float16))
        first_value = vc_ptr + tl.cast(start, tl.int64) * v_token
        words = tl.load(first_value + value_place, stored, other=0)
        values = _unpack(words, BITS, ASM)
        sums = ()
        for j in tl.static_range(W):
            sums = sums + (tl.dot(weights, values[j], acc[j] * shrink[:, None]),)
        acc = sums
        ahead, t = start + BLOCK, t + BLOCK
        some = word < tl.where(ahead < last, d // W, 0)
        key_scales = _of_channels(ks_ptr, ahead // G * d + channel, some, W)
        key_lows = _of_channels(kl_ptr, ahead // G * d + channel, some, W)
        value_scale = tl.load(vs_ptr + t, t < last, other=1.0)
        value_low = tl.load(vl_ptr + t, t < last, other=0.0)
    total = tl.sum(total, axis=0)
    inverse = 1.0 / tl.where(total > 0, total, 1.0)
    lows = tl.sum(lows, axis=0) * inverse
    spot = rows * slots + tl.program_id(1)
    part_ptr += spot[:, None] * d + channel[None, :]
    for j in tl.static_range(W):
        unit = inverse * (16777216.0 * ODD / LIFT if j % 2 else 16777216.0)
        tl.store(
            part_ptr + j,
            acc[j] * unit[:, None] + lows[:, None],
            (row < GROUP)[:, None] & inside[None, :],
        )
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
        lengths = None if lengths is None else lengths.contiguous()
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
