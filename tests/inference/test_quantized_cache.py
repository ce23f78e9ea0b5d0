"""The quantized cache: its codes against loops over groups, and below every policy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewer.inference.eviction import FullCache, gather_tokens
from fewer.inference.h2o import h2o
from fewer.inference.quantized_cache import (
    QuantizedCache,
    dequantize_range,
    pack_rows,
    quantize_range,
    select,
    unpack_rows,
    unpack_tokens,
)
from fewer.inference.random_eviction import random_eviction
from fewer.inference.streaming_h2o import streaming_h2o
from fewer.inference.streaming_llm import streaming_llm
from fewer.inference.window import window
from fewer.models import KVCache, Llama, generate, tiny_llama

BITS = st.sampled_from([2, 4, 8])


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(rows: int, tokens: int) -> Tensor:
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor:
    """Token by token."""
    return torch.cat([model(chunk, cache) for chunk in tokens.split(1, dim=1)], dim=1)


def slice_error(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """The error, and half a step plus what float16 does to low and scale."""
    codes, scale, low = quantize_range(x, bits, dim)
    rounding = 2.0**-11 * (low.float().abs() + (2**bits - 1) * scale.float()) + 2.0**-24
    rounding = rounding + (2**bits - 1) * 2.0**-25  # a very small scale is rounded to 2^-24
    return (dequantize_range(codes, scale, low) - x).abs(), scale.float() / 2 + 2 * rounding


# --- codes ----------------------------------------------------------------------------------------


@given(st.integers(0, 1000), BITS, st.sampled_from([0, 1, 2]), st.floats(-3, 3), st.floats(-9, 9))
def test_the_error_is_at_most_half_a_step(
    seed: int, bits: int, dim: int, magnitude: float, shift: float
):
    x = draw((3, 5, 4), seed) * 10**magnitude + shift
    error, bound = slice_error(x, bits, dim)
    assert (error <= bound).all()
    # The step is no coarser than the range asks for, where float16 can tell its ends apart.
    _, scale, _ = quantize_range(x, bits, dim)
    spread = x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)
    wide = spread > 0.01 * x.abs().amax(dim, keepdim=True)
    assert (scale.float() * (2**bits - 1) <= 1.06 * spread)[wide].all()


@given(st.integers(0, 1000), BITS)
def test_the_least_gets_the_first_code_and_the_largest_the_last(seed: int, bits: int):
    x = draw((4, 50), seed)
    codes, _, _ = quantize_range(x, bits, dim=1)
    rows = torch.arange(4)
    assert (codes[rows, x.argmin(1)] == 0).all()
    assert (codes[rows, x.argmax(1)] == 2**bits - 1).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -0.125, 1e-30])
def test_equal_numbers_are_exact(value: float):
    x = torch.full((2, 6), value)
    codes, scale, low = quantize_range(x, 2, dim=1)
    torch.testing.assert_close(dequantize_range(codes, scale, low), x, atol=1e-7, rtol=0.0)
    assert (scale > 0).all()


def test_scales_do_not_reach_across_slices():
    x = draw((8, 6))
    x[:, 2] *= 1000
    error, _ = slice_error(x, 4, dim=0)
    plain, _ = slice_error(draw((8, 6)), 4, dim=0)
    others = [0, 1, 3, 4, 5]
    assert error[:, others].equal(plain[:, others])


@given(st.data(), BITS)
def test_rows_unpack_to_what_was_packed_and_fill_whole_bytes(data: st.DataObject, bits: int):
    n = data.draw(st.integers(0, 5)) * (8 // bits)
    row = st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n)
    codes = torch.tensor(data.draw(st.lists(row, min_size=2, max_size=2)), dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (2, n * bits // 8)
    assert unpack_rows(packed, bits).equal(codes)
    for r in range(2):
        number = sum(int(code) << (bits * i) for i, code in enumerate(codes[r]))
        assert list(number.to_bytes(n * bits // 8, "little")) == packed[r].tolist()


@pytest.mark.parametrize("make", [lambda: QuantizedCache(3), lambda: pack_rows(torch.zeros(8), 3)])
def test_other_widths_are_refused(make: Callable):
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8, got 3"):
        make()


def test_rows_that_are_no_whole_bytes_are_refused():
    with pytest.raises(ValueError, match="multiple of 4 codes, got 6"):
        pack_rows(torch.zeros(6, dtype=torch.uint8), 2)


# --- the cache ------------------------------------------------------------------------------------


def fill(cache: KVCache, keys: Tensor, values: Tensor, sizes: list[int]) -> None:
    """Update layer 0 with ready-made keys and values; H2O gets attention that is made up too."""
    start = 0
    for i, size in enumerate(sizes):
        new = slice(start, start + size)
        k, _, p = cache.update(0, keys[:, :, new], values[:, :, new], torch.arange(start, new.stop))
        assert k.shape[2] == p.shape[-1]
        if cache.observes:
            cache.observe(0, draw((*k.shape[:2], 2, size, k.shape[2]), i).softmax(-1))
        start += size


def content(cache: QuantizedCache) -> tuple[Tensor, Tensor]:
    """Keys and values of layer 0 as a query would read them."""
    keys, values = unpack_tokens(cache.packed[0], cache.bits)
    return torch.cat([keys, cache.keys[0]], 2), torch.cat([values, cache.values[0]], 2)


@settings(max_examples=40)
@given(
    st.integers(0, 1000),
    BITS,
    st.integers(1, 6),
    st.integers(0, 5),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
)
def test_keys_are_quantized_by_channel_in_groups_values_by_token_and_the_latest_not_at_all(
    seed: int, bits: int, group: int, residual: int, sizes: list[int]
):
    n = sum(sizes)
    keys, values = draw((2, 3, n, 8), seed), draw((2, 3, n, 8), seed + 1)
    cache = QuantizedCache(bits, group, residual)
    fill(cache, keys, values, sizes)
    quantized = max(n - residual, 0) // group * group
    expected_keys, expected_values = keys.clone(), values.clone()
    for start in range(0, quantized, group):
        tokens = slice(start, start + group)
        expected_keys[:, :, tokens] = dequantize_range(*quantize_range(keys[:, :, tokens], bits, 2))
    for t in range(quantized):
        expected_values[:, :, t] = dequantize_range(*quantize_range(values[:, :, t], bits, 2))
    read_keys, read_values = content(cache)
    assert read_keys.equal(expected_keys)
    assert read_values.equal(expected_values)
    assert n - quantized == cache.keys[0].shape[2] >= min(n, residual)
    assert cache.positions[0].tolist() == list(range(n))


def test_queries_read_the_tokens_of_their_own_chunk_exactly():
    keys, values = draw((1, 2, 40, 8)), draw((1, 2, 40, 8), 1)
    cache = QuantizedCache(bits=2, group=8, residual=0)
    fill(cache, keys[:, :, :20], values[:, :, :20], [20])
    read_keys, read_values, _ = cache.update(
        0, keys[:, :, 20:], values[:, :, 20:], torch.arange(20, 40)
    )
    assert read_keys[:, :, 16:].equal(keys[:, :, 16:])
    assert read_values[:, :, 16:].equal(values[:, :, 16:])
    assert not torch.allclose(read_keys[:, :, :16], keys[:, :, :16], atol=1e-2)


def test_a_text_shorter_than_the_residual_window_and_a_group_is_read_exactly():
    model, tokens = tiny_llama(), text(2, 19)
    cache = QuantizedCache(bits=2, group=8, residual=12)
    logits = read(model, tokens, cache)
    torch.testing.assert_close(logits, model(tokens), atol=2e-5, rtol=1e-4)
    assert cache.packed[0].group.numel() == 0
    model(tokens[:, :1], cache)  # the twentieth
    assert cache.packed[0].group.shape == (2, 2, 8)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_of_codes_scales_and_the_residual(bits: int):
    batch, heads, d, layers, n, group = 2, 3, 16, 2, 100, 32
    cache = QuantizedCache(bits, group, residual=10)
    for layer in range(layers):
        x = draw((batch, heads, n, d))
        cache.update(layer, x, x, torch.arange(n))
    quantized, groups = 64, 2
    codes = 2 * quantized * d * bits // 8
    key_scales, value_scales, numbers = groups * d * 2 * 2, quantized * 2 * 2, quantized * 4
    residual = 2 * (n - quantized) * d * 4
    head = codes + key_scales + value_scales + numbers + residual
    assert cache.nbytes == layers * batch * heads * head
    stored = [*cache.keys, *cache.values, *(x for packed in cache.packed for x in packed)]
    assert all(x.untyped_storage().nbytes() <= x.nbytes for x in stored)


def test_more_bits_read_closer_logits():
    model, tokens = tiny_llama(), text(2, 60)
    errors = []
    for bits in (2, 4, 8):
        cache = QuantizedCache(bits, group=8, residual=0)
        logits = read(model, tokens, cache)
        errors.append((logits - model(tokens)).norm() / model(tokens).norm())
    assert errors[0] > 2 * errors[1] > 8 * errors[2] > 0
    assert errors[2] < 0.02


# --- below a policy -------------------------------------------------------------------------------

POLICIES = {
    "window": window,
    "streaming_llm": streaming_llm,
    "h2o": h2o,
    "streaming_h2o": streaming_h2o,
    "random": random_eviction,
}


@settings(max_examples=15)
@given(
    st.integers(0, 1000),
    BITS,
    st.lists(st.integers(1, 9), min_size=2, max_size=6).map(lambda sizes: sizes + [1] * 12),
)
@pytest.mark.parametrize("name", POLICIES)
def test_what_a_policy_keeps_reads_as_if_nothing_had_been_evicted(
    name: str, seed: int, bits: int, sizes: list[int]
):
    n = sum(sizes)
    keys, values = draw((2, 3, n, 8), seed), draw((2, 3, n, 8), seed + 1)
    whole = QuantizedCache(bits, group=3, residual=2)
    fill(whole, keys, values, sizes)
    # The pending tokens, 4 at most, are within the 5 that H2O keeps of itself.
    cache = POLICIES[name](10, store=QuantizedCache(bits, group=3, residual=2))
    fill(cache, keys, values, sizes)
    kept = cache.indices[0]
    assert kept.shape == (2, 3, 10)
    for here, there in zip(content(cache.store), content(whole), strict=True):
        assert here.equal(gather_tokens(there, kept))
    if name != "random":
        exact = POLICIES[name](10)
        fill(exact, keys, values, sizes)
        assert kept.equal(exact.indices[0])  # the store does not change what is kept
        assert cache.positions[0].equal(exact.positions[0])


@pytest.mark.parametrize("name", POLICIES)
def test_a_scale_is_kept_as_long_as_one_of_its_tokens(name: str):
    n, group = 60, 4
    keys, values = draw((2, 3, n, 8)), draw((2, 3, n, 8), 1)
    cache = POLICIES[name](16, store=QuantizedCache(4, group, residual=3))
    fill(cache, keys, values, [20] + [1] * 40)
    packed = cache.store.packed[0]
    quantized = packed.group.shape[-1]
    alive = [
        {int(t) // group for t in cache.indices[0][b, h, :quantized]}
        for b in range(2)
        for h in range(3)
    ]
    assert packed.key_scale.shape[2] == packed.key_low.shape[2] == max(map(len, alive))


@pytest.mark.parametrize("name", POLICIES)
def test_quantized_and_evicted_memory_is_bounded(name: str):
    model, cache = tiny_llama(), POLICIES[name](24, store=QuantizedCache(2, group=4, residual=4))
    generate(model, text(1, 40), 150, cache=cache)
    codes, scales = 17 * (2 * 2 + 4 + 4), 17 * 8 * 2 * 2  # every token with a group of its own
    exact = 2 * 7 * 8 * 4
    assert cache.nbytes <= 2 * 2 * 24 / 17 * (codes + scales + exact)
    assert cache.keys[0].shape[2] <= 7


def test_with_8_bits_an_evicting_model_reads_nearly_as_in_full_precision():
    model, tokens = tiny_llama(), text(2, 50)
    logits = []
    for store in (FullCache(), QuantizedCache(8, group=4, residual=4)):
        cache = streaming_llm(20, store=store)
        logits.append(read(model, tokens, cache))
    assert (logits[0] - logits[1]).norm() < 0.02 * logits[0].norm()


def test_selecting_tokens_twice_is_selecting_them_once():
    cache = QuantizedCache(4, group=3, residual=0)
    fill(cache, draw((1, 2, 12, 8)), draw((1, 2, 12, 8), 1), [12])
    first = torch.tensor([[[0, 1, 4, 5, 9, 11], [2, 3, 6, 7, 8, 10]]])
    second = torch.tensor([[[1, 3, 5], [0, 2, 4]]])
    twice = select(select(cache.packed[0], first), second)
    once = select(cache.packed[0], first.gather(-1, second))
    for a, b in zip(unpack_tokens(twice, 4), unpack_tokens(once, 4), strict=True):
        assert a.equal(b)


def test_tokens_that_are_not_quantized_yet_must_stay():
    cache = QuantizedCache(4, group=4, residual=2)
    fill(cache, draw((1, 1, 7, 8)), draw((1, 1, 7, 8)), [7])
    with pytest.raises(ValueError, match="last 3 tokens"):
        cache.keep(0, torch.tensor([[[0, 1, 2, 3, 5, 6]]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (window, "budget must be at least 63, got 62"),
        (lambda budget, store: streaming_llm(budget + 4, 4, store), "between 0 and 3, got 4"),
        (lambda budget, store: h2o(2 * budget, store=store), "between 63 and 124, got 62"),
    ],
)
def test_a_budget_without_room_for_them_beside_what_the_policy_keeps_is_refused(
    make: Callable, message: str
):
    with pytest.raises(ValueError, match=message):
        make(62, store=QuantizedCache(4, group=32, residual=32))
