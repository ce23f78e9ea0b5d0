"""KIVI: keys quantized per channel, values per token, and the latest tokens not at all.

Liu et al. 2024, "KIVI: A tuning-free asymmetric 2bit quantization for KV cache" (arXiv 2402.02750),
section 3. Keys have a few channels that are large in every token. A scale shared across channels is
wasted on these, so each channel has its own, over a group of G consecutive tokens. Values have no
such channels, and attention mixes few of them: each token has its own scale. Both asymmetric:

    low = min x,    scale = (max x - low) / (2^bits - 1),    codes = round((x - low) / scale)

A group of keys can be quantized only when its G tokens are there. So the latest `residual` tokens
and those whose group is not full yet stay in full precision (the paper finds that it is the recent
ones whose precision matters most), and queries read each new token exactly at first.

Codes of 2 or 4 bits are packed along head_dim, so that a token's row is whole bytes and evicting a
token means leaving out its row. Scales and lows are kept in float16. A group's scales stay as long
as one of its tokens does: heads that keep scattered tokens pay for it (`nbytes` shows how much).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fewer.inference.eviction import FullCache, gather_tokens
from fewer.validate import require_int


def quantize_range(
    x: Float[Tensor, "*shape"], bits: int, dim: int
) -> tuple[UInt8[Tensor, "*shape"], Float[Tensor, "*scale"], Float[Tensor, "*scale"]]:
    """Codes, scale and low of each slice along `dim`: x is close to low + scale * codes.

    low = min x and scale = (max x - low) / (2^bits - 1) along dim, both rounded to float16 before
    codes = round((x - low) / scale), clamped to [0, 2^bits - 1], are computed with them. A scale
    that is not positive then (as where all numbers of a slice are equal) is replaced by 1.

    Args:
        x: finite, below 65504 in size.
        bits: 1 to 8.
        dim: the dimension whose numbers share a scale.

    Returns:
        codes: uint8, the shape of x.
        scale, low: float16, the shape of x with 1 in place of dim. scale is positive.

    Raises:
        TypeError: bits is not an int.
        ValueError: bits is out of its range.

    Example:
        >>> codes, scale, low = quantize_range(torch.tensor([-1.0, 0.2, 2.0]), bits=2, dim=0)
        >>> codes.tolist(), scale.tolist(), low.tolist()
        ([0, 1, 3], [1.0], [-1.0])
    """
    require_int(bits, "bits", 1, 8)
    x = x.float()
    largest = 2**bits - 1
    low = x.amin(dim, keepdim=True).half()
    scale = ((x.amax(dim, keepdim=True) - low.float()) / largest).half()
    scale = torch.where(scale > 0, scale, 1.0).half()
    codes = ((x - low.float()) / scale.float()).round().clamp(0, largest)
    return codes.to(torch.uint8), scale, low


def dequantize_range(
    codes: UInt8[Tensor, "*shape"], scale: Float[Tensor, "*scale"], low: Float[Tensor, "*scale"]
) -> Float[Tensor, "*shape"]:
    """low + scale * codes, in float32.

    Example:
        >>> codes = torch.tensor([0, 1, 3], dtype=torch.uint8)
        >>> dequantize_range(codes, torch.tensor([1.0]), torch.tensor([-1.0])).tolist()
        [-1.0, 0.0, 2.0]
    """
    return low.float() + scale.float() * codes.float()


def pack_rows(codes: UInt8[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows packed"]:
    """Put 8 / bits codes into each byte, the first of them in its lowest bits.

    Args:
        codes: [..., n], each in [0, 2^bits - 1]; 8 / bits divides n.
        bits: 2, 4 or 8 (8 changes nothing).

    Returns:
        uint8, [..., n * bits / 8].

    Raises:
        ValueError: bits is none of these, or 8 / bits does not divide n.

    Example:
        >>> pack_rows(torch.tensor([[1, 2, 3, 0], [15, 0, 0, 15]], dtype=torch.uint8), 4).tolist()
        [[33, 3], [15, 240]]
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits}")
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        raise ValueError(f"a row must hold a multiple of {per_byte} codes, got {codes.shape[-1]}")
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    return (codes.unflatten(-1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_rows(packed: UInt8[Tensor, "*rows packed"], bits: int) -> UInt8[Tensor, "*rows n"]:
    """The inverse of `pack_rows`.

    Example:
        >>> unpack_rows(torch.tensor([33, 3], dtype=torch.uint8), bits=4).tolist()
        [1, 2, 3, 0]
    """
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


class Packed(NamedTuple):
    """The quantized tokens of a layer."""

    key_codes: UInt8[Tensor, "batch kv_heads tokens packed"]
    key_scale: Float[Tensor, "batch kv_heads groups head_dim"]  # float16, as the three others
    key_low: Float[Tensor, "batch kv_heads groups head_dim"]
    group: Int[Tensor, "batch kv_heads tokens"]  # int32: whose key_scale a token has
    value_codes: UInt8[Tensor, "batch kv_heads tokens packed"]
    value_scale: Float[Tensor, "batch kv_heads tokens 1"]
    value_low: Float[Tensor, "batch kv_heads tokens 1"]


def pack_tokens(
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens head_dim"],
    bits: int,
    group: int,
) -> Packed:
    """Quantize whole groups of tokens: a multiple of `group` of them."""
    key_codes, key_scale, key_low = quantize_range(keys.unflatten(2, (-1, group)), bits, dim=3)
    value_codes, value_scale, value_low = quantize_range(values, bits, dim=3)
    number = torch.arange(keys.shape[2], device=keys.device, dtype=torch.int32) // group
    return Packed(
        pack_rows(key_codes.flatten(2, 3), bits),
        key_scale.squeeze(3),
        key_low.squeeze(3),
        number.expand(keys.shape[:3]),
        pack_rows(value_codes, bits),
        value_scale,
        value_low,
    )


def unpack_tokens(
    packed: Packed, bits: int
) -> tuple[
    Float[Tensor, "batch kv_heads tokens head_dim"], Float[Tensor, "batch kv_heads tokens head_dim"]
]:
    """Keys and values again, in float32, close to those that were packed."""
    of_group = packed.group.long()
    scale, low = (gather_tokens(x, of_group) for x in (packed.key_scale, packed.key_low))
    keys = dequantize_range(unpack_rows(packed.key_codes, bits), scale, low)
    values = dequantize_range(
        unpack_rows(packed.value_codes, bits), packed.value_scale, packed.value_low
    )
    return keys, values


def join(first: Packed, second: Packed) -> Packed:
    """Tokens of `second` after those of `first`, in groups of their own."""
    second = second._replace(group=second.group + first.key_scale.shape[2])
    return Packed(*(torch.cat(pair, dim=2) for pair in zip(first, second, strict=True)))


def select(packed: Packed, index: Int[Tensor, "batch kv_heads kept"]) -> Packed:
    """Only the chosen tokens (ascending), and only the scales of groups that one of them is in.

    Heads may be left with unequally many groups; the tables are as long as the longest.
    """
    group = packed.group.gather(-1, index)
    starts = torch.ones_like(group)
    starts[..., 1:] = group[..., 1:] != group[..., :-1]
    renamed = starts.cumsum(-1) - 1  # groups that are left, counted from 0 in every head
    groups = int(renamed.max()) + 1 if renamed.numel() else 0
    left = torch.zeros(*group.shape[:2], groups, dtype=torch.long, device=group.device)
    left.scatter_(-1, renamed, group.long())
    return Packed(
        gather_tokens(packed.key_codes, index),
        gather_tokens(packed.key_scale, left),
        gather_tokens(packed.key_low, left),
        renamed.to(torch.int32),
        gather_tokens(packed.value_codes, index),
        gather_tokens(packed.value_scale, index),
        gather_tokens(packed.value_low, index),
    )


class QuantizedCache(FullCache):
    """Keeps tokens as packed codes, all but the latest `residual` to `residual + group - 1`.

    By itself it forgets nothing. As the `store` of an `EvictingCache` it holds what any policy
    keeps; tokens that are not quantized yet are not evicted, so the budget must have room for
    `residual + group - 1` of them.

    Args:
        bits: of a code: 8, 4 or 2.
        group: G, how many consecutive tokens share the scales of their keys, at least 1.
        residual: how many of the latest tokens stay in full precision, at least 0.

    Attributes:
        keys, values: for each layer the tokens in full precision.
        packed: for each layer the others.
        positions: of all.

    Raises:
        TypeError: group or residual is not an int.
        ValueError: an argument is out of its range; 8 / bits does not divide head_dim (at the first
            update).

    Example:
        >>> from fewer.models import tiny_llama
        >>> model, text = tiny_llama(), torch.randint(64, (1, 200))
        >>> exact, cache = FullCache(), QuantizedCache(bits=2, group=32, residual=0)
        >>> _ = model(text, exact), model(text, cache)
        >>> cache.packed[0].key_codes.shape, cache.keys[0].shape
        (torch.Size([1, 2, 192, 2]), torch.Size([1, 2, 8, 8]))
        >>> round(exact.nbytes / cache.nbytes, 1)  # with head_dim 8, scales take much of it
        4.3
    """

    def __init__(self, bits: int = 4, group: int = 32, residual: int = 32) -> None:
        super().__init__()
        if bits not in (2, 4, 8):
            raise ValueError(f"bits must be 2, 4 or 8, got {bits}")
        self.bits = bits
        self.group = require_int(group, "group", 1)
        self.residual = require_int(residual, "residual", 0)
        self.protected = residual + group - 1
        self.packed: list[Packed] = []

    def update(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new head_dim"],
        positions: Int[Tensor, "*batch new"],
    ) -> tuple[
        Float[Tensor, "batch kv_heads tokens head_dim"],
        Float[Tensor, "batch kv_heads tokens head_dim"],
        Int[Tensor, "*batch_and_kv_heads tokens"],
    ]:
        """Return the quantized tokens and the exact ones; then quantize the groups that are full.

        So the queries of a chunk see each other's keys and values in full precision.
        """
        if layer == len(self.packed):
            none = slice(0, 0)
            empty = pack_tokens(keys[:, :, none], values[:, :, none], self.bits, self.group)
            self.packed.append(empty)
        exact_keys, exact_values, all_positions = super().update(layer, keys, values, positions)
        old_keys, old_values = unpack_tokens(self.packed[layer], self.bits)
        read = (
            torch.cat([old_keys.to(keys.dtype), exact_keys], dim=2),
            torch.cat([old_values.to(values.dtype), exact_values], dim=2),
            all_positions,
        )
        full = max(exact_keys.shape[2] - self.residual, 0) // self.group * self.group
        if full:
            new = pack_tokens(
                exact_keys[:, :, :full], exact_values[:, :, :full], self.bits, self.group
            )
            self.packed[layer] = join(self.packed[layer], new)
            # Cloned, or the quantized tokens would stay in memory behind a view of the others.
            self.keys[layer] = exact_keys[:, :, full:].clone()
            self.values[layer] = exact_values[:, :, full:].clone()
        return read

    def keep(self, layer: int, index: Int[Tensor, "batch kv_heads kept"]) -> None:
        """Drop all tokens of a layer but these; those in full precision must all stay.

        Raises:
            ValueError: one of them is dropped.
        """
        exact, quantized = self.keys[layer].shape[2], self.packed[layer].group.shape[-1]
        left = index.shape[-1] - exact
        if left < 0 or (exact and (index[..., left] != quantized).any()):
            raise ValueError(f"index must hold the last {exact} tokens, which are not quantized")
        self.packed[layer] = select(self.packed[layer], index[..., :left])
        self.positions[layer] = self.positions[layer].gather(-1, index)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers: codes, scales, lows, group numbers, residual."""
        codes = sum(tensor.nbytes for packed in self.packed for tensor in packed)
        return super().nbytes + codes
