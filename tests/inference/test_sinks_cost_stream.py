"""Attention sinks, what generating costs, and long streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fewer.inference.cost import (
    Machine,
    Work,
    attainable,
    cache_bytes,
    least_seconds,
    matrix_weights,
    model_work,
    weight_bytes,
)
from fewer.inference.eviction import FullCache
from fewer.inference.long_stream import recomputed_losses, stream_losses
from fewer.inference.sinks import first_token_attention, first_value_norm, softmax_off_by_one
from fewer.inference.streaming_llm import streaming_llm
from fewer.inference.window import window
from fewer.models import KVCache, tiny_llama
from fewer.models.llama import rotate


def text(rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


# --- sinks ----------------------------------------------------------------------------------------

SCORE = st.floats(-200, 200, width=32) | st.just(-float("inf"))


@given(st.lists(SCORE, min_size=1, max_size=6))
def test_softmax_off_by_one_is_softmax_beside_a_score_of_0(scores: list[float]):
    x = torch.tensor(scores)
    expected = F.pad(x.double(), (1, 0)).softmax(-1)[1:].float()
    torch.testing.assert_close(softmax_off_by_one(x), expected)


def test_a_row_that_sees_nothing_looks_nowhere_and_a_sure_one_as_in_softmax():
    assert softmax_off_by_one(torch.full((2, 3), -torch.inf)).equal(torch.zeros(2, 3))
    sure = torch.tensor([[500.0, 499.0], [90.0, -90.0]])
    torch.testing.assert_close(softmax_off_by_one(sure), sure.softmax(-1))
    half = torch.randn(4, 5).bfloat16()
    assert softmax_off_by_one(half).dtype == torch.bfloat16


def test_softmax_off_by_one_is_taken_over_the_last_dimension_of_each_row():
    x = torch.randn(2, 3, 4)
    by_rows = torch.stack([softmax_off_by_one(row) for row in x.flatten(0, 1)])
    torch.testing.assert_close(softmax_off_by_one(x), by_rows.view(2, 3, 4))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_first_token_attention_is_that_of_every_query_head_and_query(kv_heads: int):
    model, tokens = tiny_llama(n_layers=1, n_kv_heads=kv_heads), text(2, 9)
    block, where = model.layers[0], torch.arange(9)
    x = block.input_layernorm(model.embed_tokens(tokens))
    q = rotate(block.self_attn.q_proj(x).view(2, 9, 4, 8).transpose(1, 2), where, 1e4)
    k = rotate(block.self_attn.k_proj(x).view(2, 9, kv_heads, 8).transpose(1, 2), where, 1e4)
    k = k.repeat_interleave(4 // kv_heads, dim=1)
    scores = q @ k.mT / 8**0.5 + torch.full((9, 9), -torch.inf).triu(1)
    first = scores.softmax(-1)[..., 0]  # [2, 4, 9]
    for skip in (0, 1, 5, 8):
        expected = first[..., skip:].mean(dim=(0, 2))[None]
        torch.testing.assert_close(first_token_attention(model, tokens, skip), expected)
    with pytest.raises(ValueError, match="skip must be between 0 and 8, got 9"):
        first_token_attention(model, tokens, skip=9)


def test_a_short_first_value_is_seen():
    model, tokens = tiny_llama(n_layers=1), text(3, 6)
    tokens[:, 0], tokens[:, 1:] = 0, tokens[:, 1:].clamp(min=1)
    cache = KVCache()
    model(tokens, cache)
    lengths = [
        [cache.values[0][b, h, t].norm().item() for b in range(3) for h in range(2)]
        for t in range(6)
    ]
    mean = [sum(of_token) / 6 for of_token in lengths]
    expected = mean[0] / (sum(mean[1:]) / 5)
    torch.testing.assert_close(first_value_norm(model, tokens), torch.tensor([expected]))


# --- cost -----------------------------------------------------------------------------------------


class Observing(KVCache):
    """Makes the model compute attention by plain products, which the counter sees."""

    observes = True


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("past", "new", "rows"), [(0, 1, 1), (7, 1, 3), (0, 6, 2), (5, 4, 2)])
def test_operations_are_those_that_torch_counts_less_the_half_that_is_masked(
    kv_heads: int, past: int, new: int, rows: int
):
    model, cache = tiny_llama(n_kv_heads=kv_heads), Observing()
    tokens = text(rows, past + new)
    if past:
        model(tokens[:, :past], cache)
    with FlopCounterMode(display=False) as counter:
        model(tokens[:, past:], cache)
    masked = 4 * 2 * 4 * 8 * (new * (new - 1) // 2) * rows
    work = model_work(model.config, past, new, rows)
    assert work.operations == counter.get_total_flops() - masked


def test_bytes_are_those_of_the_weights_and_of_a_real_cache():
    model, cache = tiny_llama(), FullCache()
    model(text(3, 11), cache)
    c = model.config
    assert cache_bytes(11, c.n_layers, c.n_kv_heads, c.head_dim, 3, bits=32) == cache.nbytes
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert matrix_weights(c) == weights
    assert weight_bytes(weights, 4) == weights / 2
    assert model_work(c, 8, 3, 3, bits=32).bytes == 4 * weights + cache.nbytes


def test_more_texts_help_the_weights_part_of_decoding_and_not_the_caches():
    c = tiny_llama().config
    few, many = model_work(c, 100, 1, 1), model_work(c, 100, 1, 50)
    assert many.operations == 50 * few.operations
    weights = weight_bytes(matrix_weights(c))
    assert many.bytes - weights == 50 * (few.bytes - weights)
    assert model_work(c, 0, 100).intensity > 10 * few.intensity


@given(st.floats(1, 1e15), st.floats(1, 1e15), st.integers(1, 10**15), st.integers(1, 10**15))
def test_the_roofline_is_the_slower_of_computing_and_moving(
    peak: float, bandwidth: float, operations: int, moved: int
):
    machine, work = Machine(peak, bandwidth), Work(operations, moved)
    assert attainable(work.intensity, machine) <= peak
    slower = max(operations / peak, moved / bandwidth)
    assert least_seconds(work, machine) == pytest.approx(slower)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"past": -1, "new": 1}, "past must be at least 0, got -1"),
        ({"past": 0, "new": 0}, "new must be at least 1, got 0"),
        ({"past": 0, "new": 1, "sequences": 0}, "sequences must be at least 1, got 0"),
    ],
)
def test_work_out_of_range_is_refused(arguments: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        model_work(tiny_llama().config, **arguments)


# --- long streams ---------------------------------------------------------------------------------


def dense_losses(model: Callable, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")


@settings(max_examples=30)
@given(st.integers(2, 40), st.integers(1, 50))
def test_a_stream_through_a_full_cache_has_the_losses_of_one_reading(n: int, chunk: int):
    model, tokens = tiny_llama(), text(1, n)[0]
    stream = stream_losses(model, tokens, KVCache(), chunk)
    torch.testing.assert_close(stream.losses, dense_losses(model, tokens), atol=1e-4, rtol=1e-4)
    assert len(stream.seconds) == -(-(n - 1) // chunk)


def test_recomputing_predicts_each_token_from_a_window_of_its_own():
    model, tokens = tiny_llama(), text(1, 30)[0]
    got = recomputed_losses(model, tokens, window=5)
    for t in range(29):
        alone = dense_losses(model, tokens[max(t - 4, 0) : t + 2])[-1]
        torch.testing.assert_close(got.losses[t], alone, atol=1e-4, rtol=1e-4)
    some = recomputed_losses(model, tokens, 5, steps=(t for t in (28, 3)))
    torch.testing.assert_close(some.losses, got.losses[[28, 3]])
    assert len(some.seconds) == 2
    everything = recomputed_losses(model, tokens, window=29)
    torch.testing.assert_close(everything.losses, dense_losses(model, tokens), atol=1e-4, rtol=1e-4)


def test_with_one_layer_a_cached_window_is_as_good_as_a_recomputed_one():
    """Keys and values of the first layer know their own token only."""
    one, two = (tiny_llama(n_layers=layers) for layers in (1, 2))
    tokens = text(1, 40)[0]
    for model, same in ((one, True), (two, False)):
        cached = stream_losses(model, tokens, window(7)).losses
        squeezed = stream_losses(model, tokens, streaming_llm(7, sinks=0)).losses
        anew = recomputed_losses(model, tokens, 8).losses
        assert torch.allclose(cached, anew, atol=1e-4) is same
        torch.testing.assert_close(squeezed, cached, atol=1e-4, rtol=1e-4)


def test_a_long_stream_takes_constant_memory_and_goes_on_from_its_cache():
    model, cache, tokens = tiny_llama(), streaming_llm(32), text(1, 20_001)[0]
    stream_losses(model, tokens[:2001], cache, chunk=40)
    early = cache.nbytes
    losses = stream_losses(model, tokens[2000:], cache, chunk=40).losses
    assert losses.isfinite().all()
    assert cache.nbytes == early
    assert cache.indices[0][0, 0, -1] == 19_999
    assert cache.next_position == 32


@pytest.mark.parametrize("bad", [torch.tensor([3]), torch.zeros(2, 3, dtype=torch.long)])
@pytest.mark.parametrize("read", [stream_losses, recomputed_losses])
def test_a_text_that_is_no_vector_of_two_is_refused(bad: Tensor, read: Callable):
    with pytest.raises(ValueError, match="tokens must be a vector of 2 or more"):
        read(tiny_llama(), bad, KVCache() if read is stream_losses else 4)


def test_chunks_windows_and_steps_out_of_range_are_refused():
    model, tokens = tiny_llama(), text(1, 5)[0]
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        stream_losses(model, tokens, KVCache(), chunk=0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        recomputed_losses(model, tokens, window=0)
    with pytest.raises(ValueError, match="a step must be between 0 and 3, got 4"):
        recomputed_losses(model, tokens, window=2, steps=[4])
