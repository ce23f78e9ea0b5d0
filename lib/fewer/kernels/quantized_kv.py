"""Keys and values in 8 or 4 bits, as `decode_quantized` reads them.

Liu et al. 2024, "KIVI: A tuning-free asymmetric 2bit quantization for KV cache" (arXiv 2402.02750).
Keys have a scale and low for each channel over a group of G tokens, values for each token:

    low = min x,    scale = (max x - low) / (2^bits - 1),    codes = round((x - low) / scale)

The layout is that of `fewer.inference.quantized_cache`, whose tokens were not evicted: codes packed
along the channels, the first of them in the lowest bits.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float16, Float32, UInt8
from torch import Tensor

from fewer.inference.quantized_cache import dequantize_range, pack_rows, quantize_range, unpack_rows


class QuantizedKV(NamedTuple):
    """Keys and values as codes; `quantize_kv` makes them."""

    key_codes: UInt8[Tensor, "batch kv_heads tokens packed"]
    key_scale: Float16[Tensor, "batch kv_heads groups d"]
    key_low: Float16[Tensor, "batch kv_heads groups d"]
    value_codes: UInt8[Tensor, "batch kv_heads tokens packed"]
    value_scale: Float16[Tensor, "batch kv_heads tokens"]
    value_low: Float16[Tensor, "batch kv_heads tokens"]
    bits: int
    group: int


def quantize_kv(
    k: Float[Tensor, "batch kv_heads tokens d"],
    v: Float[Tensor, "batch kv_heads tokens d"],
    bits: int = 4,
    group: int = 64,
) -> QuantizedKV:
    """Keys by channel over groups of tokens, values by token (`quantize_range`), packed along d.

    As `fewer.inference.quantized_cache.pack_tokens`, but the last group may have fewer tokens, and
    the scale of a token whose values are all equal is 2^-24, not 1.

    Args:
        k, v: any floating type; tokens without a gap, d a multiple of 16.
        bits: 8 or 4.
        group: G, how many tokens share the scales of their keys: a power of two, at least 16.

    Raises:
        ValueError: bits or group is none of these.

    Example:
        >>> cache = quantize_kv(torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16))
        >>> cache.key_codes.shape, cache.key_scale.shape, cache.value_scale.shape
        (torch.Size([1, 2, 100, 8]), torch.Size([1, 2, 2, 16]), torch.Size([1, 2, 100]))
    """
    _require_bits(bits, group)
    tokens = k.shape[2]
    missing = -tokens % group
    padded = torch.cat([k, k[:, :, tokens - 1 :].expand(-1, -1, missing, -1)], 2) if missing else k
    key_codes, key_scale, key_low = quantize_range(padded.unflatten(2, (-1, group)), bits, dim=3)
    value_codes, value_scale, value_low = quantize_range(v, bits, dim=3)
    # A token of equal values has no codes but 0, and may not set the scale for what others weigh.
    value_scale = torch.where((value_codes > 0).any(3, keepdim=True), value_scale, 2.0**-24)
    return QuantizedKV(
        pack_rows(key_codes.flatten(2, 3)[:, :, :tokens], bits),
        key_scale.squeeze(3),
        key_low.squeeze(3),
        pack_rows(value_codes, bits),
        value_scale.squeeze(3),
        value_low.squeeze(3),
        bits,
        group,
    )


def dequantize_kv(
    cache: QuantizedKV,
) -> tuple[Float32[Tensor, "batch kv_heads tokens d"], Float32[Tensor, "batch kv_heads tokens d"]]:
    """Keys and values again, close to those that were quantized."""
    tokens = cache.key_codes.shape[2]
    scale, low = (
        x.repeat_interleave(cache.group, 2)[:, :, :tokens] for x in (cache.key_scale, cache.key_low)
    )
    keys = dequantize_range(unpack_rows(cache.key_codes, cache.bits), scale, low)
    scale, low = cache.value_scale[..., None], cache.value_low[..., None]
    return keys, dequantize_range(unpack_rows(cache.value_codes, cache.bits), scale, low)


def require_quantized(cache: QuantizedKV, q: Tensor) -> None:
    """Refuse a cache whose parts do not fit each other or q."""
    _require_bits(cache.bits, cache.group)
    batch, kv_heads, tokens = cache.key_codes.shape[:3]
    codes, half = (*cache.key_codes.shape[:3], q.shape[2] * cache.bits // 8), torch.float16
    groups = (batch, kv_heads, -(-tokens // cache.group), q.shape[2])
    wanted = {
        "key_codes": (codes, torch.uint8),
        "key_scale": (groups, half),
        "key_low": (groups, half),
        "value_codes": (codes, torch.uint8),
        "value_scale": (codes[:3], half),
        "value_low": (codes[:3], half),
    }
    for (name, (shape, dtype)), x in zip(wanted.items(), cache[:6], strict=True):
        if x.dtype != dtype:
            raise TypeError(f"cache.{name} must be {dtype}, got {x.dtype}")
        if x.shape != shape or batch != len(q):
            raise ValueError(
                f"cache.{name} must be {[len(q), *shape[1:]]} for q {list(q.shape)} and {tokens} "
                f"tokens in groups of {cache.group}, got {list(x.shape)}"
            )


def _require_bits(bits: int, group: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if group < 16 or group & (group - 1):
        raise ValueError(f"group must be a power of two of at least 16, got {group}")
