"""Decode attention, full and quantized: against softmax in float64."""

import warnings

import pytest
import torch
from launched import Launched, launched, relative_error
from torch import Tensor

from fewer.inference.h2o import accumulate_attention
from fewer.inference.quantized_cache import pack_tokens
from fewer.kernels import decode_quantized as coded
from fewer.kernels import flash_decode as full
from fewer.kernels import launch
from fewer.kernels.decode_quantized import (
    decode_attention_quantized,
    decode_attention_quantized_reference,
)
from fewer.kernels.flash_decode import decode_attention, decode_attention_reference
from fewer.kernels.quantized_kv import dequantize_kv, quantize_kv

BF16, FP16 = torch.bfloat16, torch.float16
# batch, heads, kv_heads, tokens, d, type: tokens that fill no tile, groups of 1 to 16 heads, d that
# is no power of two, d whose words are fewer than a product takes.
SHAPES = [
    (2, 4, 2, 70, 64, FP16),
    (1, 8, 1, 33, 128, BF16),
    (1, 3, 3, 70, 80, BF16),
    (1, 16, 1, 5, 16, FP16),
    (1, 2, 1, 40, 256, BF16),
]
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(
    batch: int, heads: int, kv_heads: int, tokens: int, d: int, dtype: torch.dtype, device: str
) -> Inputs:
    """Queries that attend to few tokens, keys with a large channel, values with large tokens."""
    if device == "cuda":
        batch, tokens = batch * 5, tokens * 41
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(batch, heads, d, generator=generator) * 2
    k = torch.randn(batch, kv_heads, tokens, d, generator=generator)
    v = torch.randn(batch, kv_heads, tokens, d, generator=generator)
    k[..., 3] += 10
    v[:, :, ::7] *= 50
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def lengths_for(k: Tensor) -> Tensor:
    """One for each row: all tokens, none, some, ...; not side by side in memory."""
    batch, _, tokens, _ = k.shape
    lengths = torch.arange(batch, device=k.device) * 17 % (tokens + 1)
    lengths[-1] = 0
    lengths[0] = tokens - 1
    return torch.stack([lengths, torch.full_like(lengths, -7)], 1)[:, 0]


def expected(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    return decode_attention_reference(q.double(), k.double(), v.double(), lengths)


def watch(patch: pytest.MonkeyPatch, seed: int | None = None) -> dict[str, Launched]:
    return {
        "decode_kernel": launched(patch, full, "decode_kernel", "part lse", seed),
        "combine_kernel": launched(patch, full, "combine_kernel", "out total", seed),
        "weights_kernel": launched(patch, full, "weights_kernel", "weights", seed),
        "decode_quantized_kernel": launched(
            patch, coded, "decode_quantized_kernel", "part lse", seed
        ),
    }


def per_processor(q: Tensor, slots: int) -> int:
    """So that `slots` programs share the tokens of a head in the interpreter."""
    return slots * len(q) * q.shape[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slots", [1, 3])
def test_output_and_weights_are_those_of_softmax(
    shape: tuple, slots: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = watch(monkeypatch, seed=slots)
    q, k, v = inputs(*shape, device)
    scale = shape[4] ** -0.5
    for lengths in (None, lengths_for(k), lengths_for(k).int() + 10**6):
        out, weights = full._launch(
            q, k, v, lengths, scale, True, BLOCK=32, per_processor=per_processor(q, slots)
        )
        exact, exact_weights = expected(q, k, v, lengths)
        assert out.dtype == q.dtype
        assert relative_error(out, exact) < (3e-3 if q.dtype == BF16 else 5e-4)
        torch.testing.assert_close(weights.double(), exact_weights, rtol=1e-4, atol=1e-6)
    alone, nothing = full._launch(
        q, k, v, lengths, scale, False, BLOCK=32, per_processor=per_processor(q, slots)
    )
    assert torch.equal(alone, out)
    assert nothing.shape == (*k.shape[:2], 0)
    assert kernels["decode_kernel"].grids[0][1] > 1 or slots == 1 or k.shape[2] <= 32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_attended_to_as_what_they_stand_for(
    shape: tuple, bits: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, seed=bits)
    q, k, v = inputs(*shape, device)
    cache = quantize_kv(k, v, bits, group=32)
    scale = shape[4] ** -0.5
    keys, values = dequantize_kv(cache)
    for slots, block, lengths in ((1, 32, None), (3, 16, lengths_for(k))):
        constants = {"BLOCK": block, "per_processor": per_processor(q, slots)}
        out, weights = coded._launch(q, cache, lengths, [], None, scale, True, **constants)
        exact, exact_weights = expected(q, keys, values, lengths)
        assert relative_error(out, exact) < 3e-3
        torch.testing.assert_close(weights.double(), exact_weights, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_recent_tokens_are_one_softmax_with_those_of_the_cache(
    bits: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch)
    q, k, v = inputs(3, 4, 2, 60, 64, FP16, device)
    old = k.shape[2] - 13
    cache = quantize_kv(k[:, :, :old], v[:, :, :old], bits, group=16)
    recent = [k[:, :, old:], v[:, :, old:]]
    of_cache, of_recent = lengths_for(k[:, :, :old]), lengths_for(recent[0]).flip(0)
    out, weights = coded._launch(
        q, cache, of_cache, recent, of_recent, 0.125, True, BLOCK=16, per_processor=18
    )
    exact, exact_weights = decode_attention_quantized_reference(
        q.double(), cache, of_cache, 0.125, (recent[0], recent[1]), of_recent
    )
    assert relative_error(out, exact) < 2e-3
    assert weights.shape == (len(k), 2, old + 13)
    torch.testing.assert_close(weights, exact_weights.float(), rtol=2e-2, atol=1e-4)
    # The reference itself: as a softmax over the tokens that a row has, one row at a time.
    keys, values = dequantize_kv(cache)
    for row in range(len(q)):
        a, b = int(of_cache[row]), int(of_recent[row])
        chosen = torch.cat([keys[row, :, :a], recent[0][row, :, :b]], 1).double()
        mixed = torch.cat([values[row, :, :a], recent[1][row, :, :b]], 1).double()
        if a + b:
            p = (q[row].double().unflatten(0, (2, 2)) @ chosen.mT * 0.125).softmax(-1)
            torch.testing.assert_close(exact[row], (p @ mixed).flatten(0, 1))


@pytest.mark.parametrize("key_size", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("value_size", [1e-4, 1.0, 2e4])
def test_scales_of_any_size_leave_float16_unhurt(
    key_size: float, value_size: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch)
    q, k, v = inputs(1, 4, 1, 64, 64, BF16, device)
    q, v = q / key_size, v / 100 * torch.linspace(0.01, 1, k.shape[2], device=device)[:, None].to(v)
    v[:, :, 5] = 0.25  # all equal: its scale is 1
    for bits in (8, 4):
        cache = quantize_kv(k * key_size, v * value_size, bits, group=64)
        exact, _ = expected(q, *dequantize_kv(cache), None)
        out = coded._launch(q, cache, None, [], None, 0.125, False)[0]
        assert relative_error(out, exact) < 4e-3


def test_scores_may_grow_from_token_to_token_without_overflow(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch)
    q, k, v = inputs(1, 2, 1, 90, 32, FP16, device)
    q[:], k[:] = 4, torch.linspace(-8, 8, k.shape[2], device=device)[:, None].to(k)
    for slots in (1, 4):
        constants = {"BLOCK": 16, "per_processor": per_processor(q, slots)}
        out = full._launch(q, k, v, None, 1.0, False, **constants)[0]
        exact, _ = decode_attention_reference(q.double(), k.double(), v.double(), None, 1.0)
        assert relative_error(out, exact) < 1e-3
        cache = quantize_kv(k, v, 8, 16)
        out = coded._launch(q, cache, None, [], None, 1.0, False, **constants)[0]
        exact = decode_attention_quantized_reference(q.double(), cache, scale=1.0)[0]
        assert relative_error(out, exact) < 3e-3


def test_the_order_of_programs_changes_no_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(1, 4, 2, 40, 64, BF16, device)
    cache = quantize_kv(k, v, 4, 16)
    results = []
    for seed in (None, 0, 1):
        watch(monkeypatch, seed)
        constants = {"BLOCK": 16, "per_processor": per_processor(q, 3)}
        results.append(full._launch(q, k, v, None, 0.1, True, **constants))
        recent = [k[:, :, :20], v[:, :, :20]]
        results.append(coded._launch(q, cache, None, recent, None, 0.1, True, **constants))
    for a, b in zip(results[:-2], results[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_key_and_value_is_read_once_for_all_heads_of_a_group(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("only the interpreter can be watched")
    kernels = watch(monkeypatch)
    q, k, v = inputs(2, 8, 2, 70, 32, FP16, device)
    lengths = torch.tensor([70, 40])
    inside = (torch.arange(70) < lengths[:, None])[:, None, :, None]
    full._launch(q, k, v, lengths, 0.1, False, BLOCK=16, per_processor=per_processor(q, 3))
    trace = kernels["decode_kernel"].traces[0]
    for name in ("k", "v"):
        assert torch.equal(trace.loads(name), inside.expand_as(k).long())
    cache = quantize_kv(k, v, 4, 32)
    coded._launch(q, cache, lengths, [], None, 0.1, False, per_processor=per_processor(q, 2))
    trace = kernels["decode_quantized_kernel"].traces[0]
    for name in ("kc", "vc"):  # of 16 bits each
        assert torch.equal(trace.loads(name), inside.expand(2, 2, 70, 8).long())
    assert torch.equal(trace.loads("vs"), inside[..., 0].expand(2, 2, 70).long())


def test_slices_of_a_longer_cache_are_read_where_they_are(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = watch(monkeypatch)
    q, k, v = inputs(2, 4, 2, 50, 64, FP16, device)
    room = torch.full((2, k.shape[0], k.shape[2] + 30, 2, 64), torch.nan, device=device).to(k)
    longer = room[:, :, 7 : 7 + k.shape[2]].transpose(2, 3)  # [batch, tokens, heads, d] in memory
    longer[0], longer[1] = k, v
    out = full._launch(q, longer[0], longer[1], None, 0.1, False)[0]
    assert torch.equal(out, full._launch(q, k, v, None, 0.1, False)[0])
    cache = quantize_kv(k, v, 4, 32)
    codes = torch.full((k.shape[0], 2, k.shape[2] + 30, 32), 255, dtype=torch.uint8, device=device)
    codes[:, :, 4 : 4 + k.shape[2]] = cache.key_codes
    held = cache._replace(key_codes=codes[:, :, 4 : 4 + k.shape[2]])
    expected_out = coded._launch(q, cache, None, [], None, 0.1, False)[0]
    assert torch.equal(coded._launch(q, held, None, [], None, 0.1, False)[0], expected_out)
    # Where words of two bytes cannot be made of them, they are copied.
    odd = torch.zeros(*codes.shape[:2], k.shape[2], 33, dtype=torch.uint8, device=device)[..., 1:]
    odd.copy_(cache.key_codes)
    held = cache._replace(key_codes=odd)
    assert torch.equal(coded._launch(q, held, None, [], None, 0.1, False)[0], expected_out)
    mixed = q.mT.contiguous().mT, k.mT.contiguous().mT, v.mT.contiguous().mT
    assert torch.equal(full._launch(*mixed, None, 0.1, False)[0], out)
    assert kernels["decode_kernel"].grids


def test_rows_without_tokens_and_empty_batches_give_zeros(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch)
    q, k, v = inputs(2, 4, 2, 20, 32, BF16, device)
    cache = quantize_kv(k, v, 8, 16)
    none = torch.zeros(len(q), dtype=torch.int32, device=device)
    for out, weights in (
        full._launch(q, k, v, none, 0.1, True),
        coded._launch(q, cache, none, [], None, 0.1, True),
        full._launch(q, k[:, :, :0], v[:, :, :0], None, 0.1, True),
        coded._launch(q, quantize_kv(k[:, :, :0], v[:, :, :0]), None, [], None, 0.1, True),
        full._launch(q[:0], k[:0], v[:0], None, 0.1, True),
    ):
        assert not out.any()
        assert not weights.any()
        assert out.shape[1:] == q.shape[1:]
        assert out.dtype == q.dtype


def test_weights_are_what_heavy_hitters_are_chosen_by(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch)
    q, k, v = inputs(2, 8, 2, 60, 64, FP16, device)
    weights = full._launch(q, k, v, None, 0.125, True)[1]
    scores = q.float().unflatten(1, (2, 4))[:, :, :, None] @ k.float()[:, :, None].mT * 0.125
    sums = torch.zeros_like(weights)
    torch.testing.assert_close(weights, accumulate_attention(sums, scores.softmax(-1)))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_layout_is_that_of_the_quantized_cache(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 3, 64, 32, generator=generator)
    packed, cache = pack_tokens(k, v, bits, 32), quantize_kv(k, v, bits, 32)
    assert torch.equal(cache.key_codes, packed.key_codes)
    assert torch.equal(cache.key_scale, packed.key_scale)
    assert torch.equal(cache.key_low, packed.key_low)
    assert torch.equal(cache.value_codes, packed.value_codes)
    assert torch.equal(cache.value_scale, packed.value_scale.squeeze(3))
    assert torch.equal(cache.value_low, packed.value_low.squeeze(3))
    # A last group that is not full has the range of its own tokens.
    ragged = quantize_kv(k[:, :, :40], v[:, :, :40], bits, 32)
    assert torch.equal(ragged.key_codes[:, :, :32], cache.key_codes[:, :, :32])
    alone = quantize_kv(k[:, :, 32:40], v[:, :, 32:40], bits, 32)
    assert torch.equal(ragged.key_scale[:, :, 1:], alone.key_scale)
    assert torch.equal(ragged.key_codes[:, :, 32:], alone.key_codes)
    keys, values = dequantize_kv(ragged)
    assert (keys - k[:, :, :40]).abs().max() < 5 / 2**bits
    assert (values - v[:, :, :40]).abs().max() < 5 / 2**bits


def test_wrong_arguments_are_refused(device: str) -> None:
    q = torch.zeros(2, 4, 32, dtype=BF16, device=device)
    k = v = torch.zeros(2, 2, 9, 32, dtype=BF16, device=device)
    cache = quantize_kv(k, v, 4, 16)
    for wrong, message in (
        ((q.float(), k, v), "q must be float16 or bfloat16, got torch.float32"),
        ((q, k.half(), v), "k must be of the type of q, torch.bfloat16, got torch.float16"),
        ((q, k, v.float()), "v must be of the type of q"),
        ((q, k, v, torch.zeros(2, device=device)), "lengths must be int32 or int64"),
    ):
        with pytest.raises(TypeError, match=message):
            decode_attention(*wrong)
    for wrong, message in (
        ((q[:, :, :24], k[..., :24], v[..., :24]), "d a multiple of 16 up to 256, got"),
        ((q[:, :3], k, v), "heads must be 1 to 16 times the key heads, got 3 for 2"),
        ((q.repeat(1, 9, 1), k, v), "heads must be 1 to 16 times the key heads, got 36 for 2"),
        ((q, k[:1], v[:1]), r"must be \[batch, kv_heads, tokens, d\]"),
        ((q, k, v[:, :, :5]), r"must be \[batch, kv_heads, tokens, d\]"),
        ((q, k, v, torch.zeros(3, dtype=torch.int32, device=device)), r"lengths must be \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*wrong)
    with pytest.raises(
        TypeError, match=r"cache.key_scale must be torch.float16, got torch.float32"
    ):
        decode_attention_quantized(q, cache._replace(key_scale=cache.key_scale.float()))
    for wrong_cache, message in (
        (cache._replace(bits=8), "cache.key_codes must be"),
        (cache._replace(bits=2), "bits must be 4 or 8, got 2"),
        (cache._replace(group=24), "group must be a power of two of at least 16, got 24"),
        (cache._replace(value_low=cache.value_low[..., None]), "cache.value_low must be"),
        (cache._replace(key_low=cache.key_low[:, :, :0]), "cache.key_low must be"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention_quantized(q, wrong_cache)
    with pytest.raises(ValueError, match="recent must have the 2 key heads of the cache, got 1"):
        decode_attention_quantized(q, cache, recent=(k[:, :1], v[:, :1]))
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        quantize_kv(k, v, 3)


def test_operators_say_of_what_shape_their_results_are(device: str) -> None:
    q, k, v = inputs(2, 4, 2, 20, 32, FP16, device)
    lengths = lengths_for(k)
    cache = list(quantize_kv(k, v, 4, 16)[:6])
    checks = ("test_schema", "test_faketensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for observe in (False, True):
            for length in (None, lengths):
                arguments = (q, k, v, length, 0.1, observe)
                torch.library.opcheck(full._decode_attention, arguments, test_utils=checks)
            for recent in ([], [k, v]):
                arguments = (q, cache, 4, 16, lengths, recent, None, 0.1, observe)
                torch.library.opcheck(
                    coded._decode_attention_quantized, arguments, test_utils=checks
                )


def test_compiled_code_is_one_graph(device: str) -> None:
    q, k, v = inputs(2, 4, 2, 20, 32, FP16, device)
    cache = quantize_kv(k, v, 8, 16)

    def step(q: Tensor) -> Tensor:
        first, weights = decode_attention(q, k, v, observe=True)
        return first + decode_attention_quantized(q, cache) + weights.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(step, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(q), step(q))


def test_without_a_gpu_the_reference_computes_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_told", set())
    q, k, v = inputs(2, 4, 2, 20, 32, FP16, "cpu")
    cache, lengths = quantize_kv(k, v, 4, 16), lengths_for(k)
    with pytest.warns(UserWarning, match="decode_attention has its kernel on CUDA tensors alone"):
        out = decode_attention(q, k, v, lengths)
    with pytest.warns(UserWarning, match="decode_attention_quantized has its kernel on CUDA"):
        of_codes = decode_attention_quantized(q, cache, lengths, recent=(k, v))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = decode_attention(q, k, v, lengths, observe=True)
    assert torch.equal(out, both[0])
    assert torch.equal(both[1], decode_attention_reference(q, k, v, lengths)[1])
    exact = decode_attention_quantized_reference(q, cache, lengths, None, (k, v))[0]
    assert torch.equal(of_codes, exact)
