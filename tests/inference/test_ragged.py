"""The cache of rows that have read unequally many tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.inference.ragged import HOLE, RaggedCache, compact_order, ragged_rows
from fewer.models import KVCache, generate, tiny_llama

TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}


def texts(rows, length=40, seed=0):
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_holds(cache, model, rows):
    """In every row the cache has the keys and values of its text, in order, and nothing else."""
    for i, text in enumerate(rows):
        held = cache.positions[0][i] != HOLE
        assert cache.positions[0][i][held].tolist() == list(range(len(text)))
        if not len(text):
            continue
        dense = KVCache()
        model(text[None], dense)
        for layer in range(len(cache.keys)):
            assert cache.positions[layer].equal(cache.positions[0])
            for ours, theirs in ((cache.keys, dense.keys), (cache.values, dense.values)):
                torch.testing.assert_close(ours[layer][i][:, held], theirs[layer][0], **TOLERANCE)


def test_a_batch_without_raggedness_is_read_as_by_any_cache():
    model, tokens, cache = tiny_llama(), texts(3, 12), RaggedCache()
    assert cache.next_position == 0
    logits = torch.cat([model(chunk, cache) for chunk in tokens.split([5, 1, 6], dim=1)], 1)
    torch.testing.assert_close(logits, model(tokens), **TOLERANCE)
    assert cache.next_position.tolist() == [[12]] * 3
    assert generate(model, tokens, 5, cache=RaggedCache()).equal(generate(model, tokens, 5))


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4]))
@settings(max_examples=15)
def test_after_any_reading_and_cropping_every_row_continues_as_if_alone(seed, kv_heads):
    model, tokens = tiny_llama(n_kv_heads=kv_heads), texts(3, 60, seed)
    g = torch.Generator().manual_seed(seed)
    cache, lengths = RaggedCache(), [0, 0, 0]
    for _ in range(7):
        sizes = torch.randint(1, 8, (3,), generator=g).tolist()
        new = [row[n : n + size] for row, n, size in zip(tokens, lengths, sizes, strict=True)]
        logits = model(*_read(cache, new, lengths))
        for i, (n, size) in enumerate(zip(lengths, sizes, strict=True)):
            alone = model(tokens[i : i + 1, : n + size])[0, n:]
            torch.testing.assert_close(logits[i, :size], alone, **TOLERANCE)
        kept = [int(torch.randint(size + 1, (1,), generator=g)) for size in sizes]
        lengths = [n + k for n, k in zip(lengths, kept, strict=True)]
        cache.crop(lengths)
        assert_holds(cache, model, [row[:n] for row, n in zip(tokens, lengths, strict=True)])
        assert cache.keys[0].shape[2] <= 1.25 * max(lengths) + 8
        if any(lengths):
            assert cache.next_position[:, 0].tolist() == lengths
    cache.compact()
    assert cache.keys[0].shape[2] == max(lengths)
    assert_holds(cache, model, [row[:n] for row, n in zip(tokens, lengths, strict=True)])


def _read(cache, new, starts):
    tokens, positions = ragged_rows(new, starts)
    return tokens, cache, positions


def test_rows_can_be_read_that_get_no_new_token():
    model, tokens, cache = tiny_llama(), texts(2, 10), RaggedCache()
    model(tokens[:, :4], cache)
    model(*_read(cache, [tokens[0, 4:10], tokens[1, :0]], [4, 4]))
    cache.crop([10, 4])
    assert_holds(cache, model, [tokens[0], tokens[1, :4]])


def test_rows_can_be_selected():
    model, tokens, cache = tiny_llama(), texts(3, 8), RaggedCache()
    model(tokens, cache)
    cache.crop([8, 3, 5])
    cache.select([2, 0])
    assert_holds(cache, model, [tokens[2, :5], tokens[0]])


def test_everything_can_be_forgotten():
    model, tokens, cache = tiny_llama(), texts(2, 8), RaggedCache()
    cache.crop([0, 0])
    model(tokens, cache)
    cache.crop([0, 0])
    assert cache.keys[0].shape[2] == 0
    assert cache.next_position.tolist() == [[0], [0]]
    torch.testing.assert_close(model(tokens, cache), model(tokens), **TOLERANCE)


def test_holes_between_tokens_are_closed_up_when_they_are_many():
    model, tokens, cache = tiny_llama(), texts(2, 30), RaggedCache()
    model(tokens, cache)
    kept = torch.ones(2, 30, dtype=torch.bool)
    kept[:, 5:8] = False
    cache.keep(kept)
    assert cache.keys[0].shape[2] == 30  # a few may stay
    kept[:, 3:28] = False
    cache.keep(kept)
    assert cache.keys[0].shape[2] == 5
    assert cache.positions[0].tolist() == [[0, 1, 2, 28, 29]] * 2


def test_compact_order_keeps_the_order_of_the_tokens():
    positions = torch.tensor([[HOLE, 4, HOLE, 6, 5], [1, HOLE, HOLE, HOLE, 2]])
    order = compact_order(positions)
    assert positions.gather(1, order).tolist() == [[4, 6, 5], [1, 2, HOLE]]


def test_ragged_rows_have_a_start_each():
    with pytest.raises(ValueError, match=r"starts must be as many as rows \(1\), got 2"):
        ragged_rows([torch.tensor([1])], [0, 1])
