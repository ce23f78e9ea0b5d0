"""Evicting caches against a slow model that masks dense attention and keeps its own books."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewer.inference.eviction import EvictingCache, FullCache, gather_tokens, kept_tokens
from fewer.inference.h2o import accumulate_attention, h2o, h2o_scores
from fewer.inference.random_eviction import random_eviction, random_scores
from fewer.inference.streaming_h2o import streaming_h2o
from fewer.inference.streaming_llm import streaming_llm, streaming_llm_scores
from fewer.inference.window import window, window_scores
from fewer.models import KVCache, Llama, generate, tiny_llama
from fewer.models.llama import rotate

TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
SINKS = 2
# What a head keeps: (tokens held and new, ascending; attention each received; budget) -> kept.
Rule = Callable[[list[int], Tensor, int], list[int]]


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: Llama, tokens: Tensor, cache: KVCache, sizes: list[int]) -> Tensor:
    return torch.cat([model(chunk, cache) for chunk in tokens.split(sizes, dim=1)], dim=1)


# --- the slow model -------------------------------------------------------------------------------


def keep_latest(tokens: list[int], received: Tensor, budget: int) -> list[int]:
    return tokens[-budget:]


def keep_sinks(tokens: list[int], received: Tensor, budget: int) -> list[int]:
    sinks = [t for t in tokens if t < SINKS]
    return sinks + [t for t in tokens if t >= SINKS][-(budget - len(sinks)) :]


def keep_heavy(tokens: list[int], received: Tensor, budget: int) -> list[int]:
    recent = (budget + 1) // 2
    older, latest = tokens[:-recent], tokens[-recent:]
    heavy = sorted(older, key=lambda t: (float(received[t]), t))[len(older) - (budget - recent) :]
    return sorted(heavy) + latest


@torch.no_grad()
def masked_dense(
    model: Llama,
    tokens: Tensor,
    sizes: list[int],
    budget: int,
    rule: Rule | list[list[Tensor]],
    renumber: bool,
) -> tuple[Tensor, list[list[list[list[int]]]]]:
    """Logits, and for each layer, row and head the tokens kept at the end.

    No cache: a layer computes the keys of the whole text, and every query looks at a row of scores
    over all of it, where those that its head does not hold are -inf. `rule` chooses what is kept,
    or lists it ([chunk][layer], as an `EvictingCache` had it).
    """
    c, (batch, length) = model.config, tokens.shape
    group = c.n_heads // c.n_kv_heads
    x, kept = model.embed_tokens(tokens), []
    for layer, block in enumerate(model.layers):
        n, attention = block.input_layernorm(x), block.self_attn
        q, k, v = (
            p(n).view(batch, length, -1, c.head_dim)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = torch.zeros_like(q)
        kept.append([])
        for b in range(batch):
            kept[-1].append([])
            for h in range(c.n_kv_heads):
                held: list[int] = []
                received = torch.zeros(length)
                heads = slice(h * group, (h + 1) * group)
                for chunk, new in enumerate(torch.arange(length).split(sizes)):
                    positions = torch.arange(length)
                    seen = held + new.tolist()
                    if renumber:
                        positions[seen] = torch.arange(len(seen))
                    mask = torch.full((len(new), length), -torch.inf)
                    mask[:, held] = 0.0
                    for i, t in enumerate(new):
                        mask[i, new[0] : t + 1] = 0.0
                    keys = rotate(k[b, :, h], positions, c.rope_base)
                    queries = rotate(q[b, new, heads].transpose(0, 1), positions[new], c.rope_base)
                    weights = (queries @ keys.T / c.head_dim**0.5 + mask).softmax(-1)
                    out[b, new, heads] = (weights @ v[b, :, h]).transpose(0, 1)
                    received += weights.sum((0, 1))
                    if not callable(rule):
                        held = rule[chunk][layer][b, h].tolist()
                    elif len(seen) > budget:
                        held = rule(seen, received, budget)
                    else:
                        held = seen
                kept[-1][-1].append(held)
        x = x + attention.o_proj(out.flatten(2))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.logits(model.norm(x)), kept


def cache_of(policy: str, budget: int, renumber: bool) -> EvictingCache:
    """Every policy at original or renumbered positions, also where its own function has one."""
    scores = {
        "window": lambda indices, _: window_scores(indices),
        "sinks": lambda indices, _: streaming_llm_scores(indices, SINKS),
    }
    if policy == "h2o":
        return (streaming_h2o if renumber else h2o)(budget)
    if policy == "random":
        generator = torch.Generator().manual_seed(budget)
        return EvictingCache(
            lambda indices, _: random_scores(indices, generator), budget, renumber=renumber
        )
    return EvictingCache(scores[policy], budget, renumber=renumber)


RULES = {"window": keep_latest, "sinks": keep_sinks, "h2o": keep_heavy}
SIZES = st.lists(st.integers(1, 6), min_size=3, max_size=6)


@settings(max_examples=12)
@given(
    st.integers(0, 1000),
    SIZES | st.lists(st.just(1), min_size=12, max_size=12),
    st.sampled_from([1, 2, 4]),
    st.integers(SINKS + 1, 8),
    st.booleans(),
)
@pytest.mark.parametrize("policy", ["window", "sinks", "h2o", "random"])
def test_an_evicted_cache_equals_dense_attention_masked_to_the_same_keys(
    policy: str, seed: int, sizes: list[int], kv_heads: int, budget: int, renumber: bool
):
    model = tiny_llama(seed, n_kv_heads=kv_heads)
    tokens = text(2, sum(sizes), seed)
    cache = cache_of(policy, budget, renumber)
    logits, history = [], []
    for chunk in tokens.split(sizes, dim=1):
        with torch.no_grad():
            logits.append(model(chunk, cache))
        history.append(list(cache.indices))
    expected, kept = masked_dense(
        model, tokens, sizes, budget, RULES.get(policy, history), renumber
    )
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **TOLERANCE)
    assert [indices.tolist() for indices in cache.indices] == kept


@pytest.mark.parametrize(
    ("make", "policy", "renumber"),
    [
        (window, "window", False),
        (lambda budget: streaming_llm(budget, sinks=SINKS), "sinks", True),
        (h2o, "h2o", False),
        (streaming_h2o, "h2o", True),
    ],
)
def test_each_papers_cache_has_its_papers_positions(make: Callable, policy: str, renumber: bool):
    model, tokens, sizes = tiny_llama(), text(1, 14), [5] + [1] * 9
    expected, kept = masked_dense(model, tokens, sizes, 6, RULES[policy], renumber)
    cache = make(6)
    torch.testing.assert_close(read(model, tokens, cache, sizes), expected, **TOLERANCE)
    assert [indices.tolist() for indices in cache.indices] == kept
    positions = [0, 1, 2, 3, 4, 5] if renumber else kept[0][0][0]
    assert cache.positions[0][0, 0].tolist() == positions
    assert cache.next_position == (6 if renumber else 14)


# --- what is kept ---------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf")]), min_size=1), st.data())
def test_the_largest_scores_are_kept_in_order_and_of_equals_the_later(
    scores: list[float], data: st.DataObject
):
    budget = data.draw(st.integers(1, len(scores) + 2))
    best = sorted(range(len(scores)), key=lambda i: (scores[i], i))[-budget:]
    assert kept_tokens(torch.tensor(scores), budget).tolist() == sorted(best)


def test_every_head_of_every_row_keeps_its_own_largest_scores():
    scores = draw((3, 2, 9))
    kept = kept_tokens(scores, 4)
    for b in range(3):
        for h in range(2):
            assert kept[b, h].equal(kept_tokens(scores[b, h], 4))


def test_gathering_takes_each_heads_own_tokens():
    x, index = draw((2, 3, 7, 4)), kept_tokens(draw((2, 3, 7), 1), 3)
    gathered = gather_tokens(x, index)
    for b in range(2):
        for h in range(3):
            for j in range(3):
                assert gathered[b, h, j].equal(x[b, h, index[b, h, j]])


def test_sums_are_the_attention_of_all_queries_and_heads_of_a_group():
    attention, sums = draw((2, 3, 4, 5, 6)).softmax(-1), draw((2, 3, 6), 1).abs()
    before = sums.clone()
    result = accumulate_attention(sums, attention)
    for b in range(2):
        for h in range(3):
            for i in range(6):
                received = sum(float(attention[b, h, g, q, i]) for g in range(4) for q in range(5))
                assert float(result[b, h, i]) == pytest.approx(received + float(before[b, h, i]))
    assert sums.equal(before)


def test_sums_stay_precise_where_the_model_computes_in_bfloat16():
    attention = torch.full((1, 1, 1, 1, 4), 0.25).bfloat16()
    sums = torch.zeros(1, 1, 4)
    for _ in range(3000):
        sums = accumulate_attention(sums, attention)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, torch.full((1, 1, 4), 750.0))


def test_scores_do_not_change_what_they_are_made_of():
    sums = draw((1, 1, 6))
    before = sums.clone()
    scores = h2o_scores(sums, recent=2)
    assert sums.equal(before)
    assert scores[..., :4].equal(before[..., :4])
    assert scores[..., 4:].isposinf().all()
    assert h2o_scores(sums, recent=0).equal(before)


def test_random_eviction_keeps_the_latest_and_drops_each_other_equally_often():
    generator = torch.Generator().manual_seed(0)
    kept = kept_tokens(random_scores(torch.arange(5).expand(8000, 5), generator), 4)
    times = torch.bincount(kept.flatten(), minlength=5) / 8000
    assert times[4] == 1.0
    torch.testing.assert_close(times[:4], torch.full((4,), 0.75), atol=0.03, rtol=0.0)


def test_random_eviction_repeats_by_its_seed_and_leaves_the_global_generator_alone():
    model, tokens, state = tiny_llama(), text(2, 20), torch.get_rng_state()
    caches = [random_eviction(8, seed=seed) for seed in (3, 3, 4)]
    for cache in caches:
        read(model, tokens, cache, [1] * 20)
    same, again, other = (cache.indices[0] for cache in caches)
    assert same.equal(again)
    assert not same.equal(other)
    assert torch.get_rng_state().equal(state)


def test_h2o_heads_and_rows_and_layers_keep_different_tokens():
    cache = h2o(8)
    read(tiny_llama(), text(2, 30), cache, [10] + [1] * 20)
    sets = {tuple(head) for layer in cache.indices for row in layer.tolist() for head in row}
    assert len(sets) > 4


# --- the cache ------------------------------------------------------------------------------------

MAKERS = {
    "window": window,
    "streaming_llm": streaming_llm,
    "h2o": h2o,
    "streaming_h2o": streaming_h2o,
    "random": random_eviction,
}


@pytest.mark.parametrize("name", MAKERS)
def test_memory_is_bounded_by_the_budget(name: str):
    model, cache, sizes = tiny_llama(), MAKERS[name](8), [1] * 5 + [7] + [1] * 50
    tokens, seen = text(2, sum(sizes)), 0
    for chunk in tokens.split(sizes, dim=1):
        model(chunk, cache)
        seen += chunk.shape[1]
        for layer in range(2):
            held = min(seen, 8)
            for x in (cache.keys[layer], cache.values[layer]):
                assert x.shape == (2, 2, held, 8)
                assert x.untyped_storage().nbytes() == x.nbytes  # no view of something larger
            assert cache.positions[layer].shape == (2, 2, held)
            assert cache.sums[layer].shape == (2, 2, held)
    assert cache.nbytes == 2 * 2 * (2 * 2 * 8 * 8) * 4


@pytest.mark.parametrize("name", MAKERS)
def test_below_the_budget_nothing_changes(name: str):
    model, tokens = tiny_llama(), text(2, 12)
    logits = read(model, tokens, MAKERS[name](12), [5, 1, 1, 5])
    torch.testing.assert_close(logits, model(tokens), **TOLERANCE)


@pytest.mark.parametrize("name", ["window", "streaming_llm", "h2o", "streaming_h2o"])
def test_rows_of_a_batch_do_not_touch_each_other(name: str):
    model, tokens, sizes = tiny_llama(), text(3, 16), [6] + [1] * 10
    together = read(model, tokens, MAKERS[name](5), sizes)
    alone = torch.cat([read(model, row[None], MAKERS[name](5), sizes) for row in tokens])
    torch.testing.assert_close(together, alone, **TOLERANCE)


@pytest.mark.parametrize("renumber", [False, True])
def test_the_next_position_does_not_depend_on_what_was_evicted(renumber: bool):
    """The least recent are kept here, so the latest position is not in the cache."""
    cache = EvictingCache(lambda indices, _: -indices.float(), 3, renumber=renumber)
    model, tokens = tiny_llama(), text(1, 9)
    expected, _ = masked_dense(
        model, tokens, [4, 1, 1, 3], 3, lambda seen, _, budget: seen[:budget], renumber
    )
    logits = read(model, tokens, cache, [4, 1, 1, 3])
    assert cache.next_position == (3 if renumber else 9)
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_positions_may_be_given_and_may_differ_between_rows():
    model, tokens = tiny_llama(), text(2, 10)
    positions = torch.arange(10) + torch.tensor([[0], [30]])
    cache = window(4)
    logits = torch.cat([model(tokens[:, [t]], cache, positions[:, [t]]) for t in range(10)], dim=1)
    for row in range(2):
        alone = window(4)
        expected = torch.cat(
            [model(tokens[[row], t : t + 1], alone, positions[row, [t]]) for t in range(10)], dim=1
        )
        torch.testing.assert_close(logits[[row]], expected, **TOLERANCE)
    assert cache.positions[0][:, 0].tolist() == [[6, 7, 8, 9], [36, 37, 38, 39]]
    assert cache.indices[0][:, 0].tolist() == [[6, 7, 8, 9], [6, 7, 8, 9]]


def test_generation_goes_on_far_beyond_the_budget():
    model, cache = tiny_llama(), streaming_llm(16)
    new = generate(model, text(2, 5), 400, cache=cache)
    assert new.shape == (2, 400)
    assert cache.keys[0].shape[2] == 16
    assert cache.indices[0][0, 0].tolist() == [0, 1, 2, 3, *range(392, 404)]


def test_a_full_cache_drops_what_it_is_told_to():
    cache, keys = FullCache(), draw((1, 2, 6, 4))
    cache.update(0, keys, -keys, torch.arange(6).expand(1, 2, 6))
    index = torch.tensor([[[0, 5], [2, 3]]])
    cache.keep(0, index)
    assert cache.keys[0].equal(gather_tokens(keys, index))
    assert cache.values[0].equal(-cache.keys[0])
    assert cache.positions[0].tolist() == [[[0, 5], [2, 3]]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window(0), "budget must be at least 1, got 0"),
        (lambda: streaming_llm(0), "budget must be at least 1, got 0"),
        (lambda: streaming_llm(4, sinks=4), "sinks must be between 0 and 3, got 4"),
        (lambda: h2o(4, recent=5), "recent must be between 0 and 4, got 5"),
        (lambda: kept_tokens(torch.zeros(3), 0), "budget must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_named(make: Callable, message: str):
    with pytest.raises(ValueError, match=message):
        make()


# --- peers ----------------------------------------------------------------------------------------


def test_a_window_equals_the_sliding_window_of_transformers():
    """Its windows count the query's own token: budget + 1."""
    transformers = pytest.importorskip("transformers")
    model, tokens = tiny_llama(), text(2, 20)
    c = model.config
    config = transformers.MistralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ffn,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        tie_word_embeddings=True,
        sliding_window=6,
    )
    peer = transformers.MistralForCausalLM(config).eval()
    peer.model.load_state_dict(model.state_dict())
    ours = read(model, tokens, window(5), [1] * 20)
    torch.testing.assert_close(ours, peer(tokens).logits, **TOLERANCE)
    assert not torch.allclose(ours, model(tokens), atol=1e-2)


def test_scores_choose_what_those_of_kvpress_choose():
    """Its H2O is a mean over the queries that could see a token, and over the heads of a group."""
    kvpress = pytest.importorskip("kvpress")
    keys, tokens = draw((2, 3, 12, 4)), 12
    causal = torch.full((tokens, tokens), -torch.inf).triu(1)
    attention = (draw((2, 3, 2, tokens, tokens)) + causal).softmax(-1)
    theirs = kvpress.ObservedAttentionPress().score(
        None, None, keys, None, attention.flatten(1, 2), {}
    )
    ours = accumulate_attention(torch.zeros(2, 3, tokens), attention)
    queries = torch.arange(tokens, 0, -1)
    torch.testing.assert_close(ours / queries / 2, theirs)

    press = kvpress.StreamingLLMPress(compression_ratio=0.5, n_sink=2)
    chosen = press.score(None, None, keys, None, None, {}).topk(6).indices.sort().values
    indices = torch.arange(tokens).expand(2, 3, tokens)
    assert kept_tokens(streaming_llm_scores(indices, 2), 6).equal(chosen)
