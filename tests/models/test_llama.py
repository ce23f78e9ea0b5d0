"""Properties of the model on tiny random weights; the real ones are in test_smollm2.py."""

import pytest
import torch

from fewer.models import KVCache, generate, stream, tiny_llama, token_probabilities
from fewer.models.llama import rotate

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def tokens():
    return torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(1))


def read_in_chunks(model, tokens, sizes, cache=None):
    cache = KVCache() if cache is None else cache
    return torch.cat([model(chunk, cache) for chunk in tokens.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_equal_those_of_transformers(tokens, seed, kv_heads):
    transformers = pytest.importorskip("transformers")
    model = tiny_llama(seed, n_kv_heads=kv_heads)
    c = model.config
    config = transformers.LlamaConfig(
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
    )
    peer = transformers.LlamaForCausalLM(config).eval()
    peer.model.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens), peer(tokens).logits, **TOLERANCE)


def test_cached_logits_equal_uncached_logits(tokens):
    model = tiny_llama()
    one_by_one = read_in_chunks(model, tokens, [1] * 12)
    torch.testing.assert_close(one_by_one, model(tokens), **TOLERANCE)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 11], [11, 1], [3, 1, 4, 4]])
def test_chunked_prefill_equals_one_shot(tokens, sizes):
    model = tiny_llama()
    torch.testing.assert_close(read_in_chunks(model, tokens, sizes), model(tokens), **TOLERANCE)


def test_rows_of_a_batch_are_independent(tokens):
    model = tiny_llama()
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, **TOLERANCE)


class Prepending(torch.nn.Module):
    """What prompt tuning puts at `embed_tokens`, with the embeddings of real tokens for prompt."""

    def __init__(self, base, prompt):
        super().__init__()
        self.base, self.prompt = base, prompt
        self.weight = base.weight

    def forward(self, tokens):
        return self.base(torch.cat([self.prompt.expand(len(tokens), -1), tokens], dim=1))


def test_vectors_that_an_embedding_prepends_count_as_the_first_positions(tokens):
    model = tiny_llama()
    prompt = torch.tensor([[9, 30, 7]])
    written_out = model(torch.cat([prompt.expand(3, -1), tokens], dim=1))
    model.embed_tokens = Prepending(model.embed_tokens, prompt)
    assert model(tokens).shape == (3, 15, 64)
    torch.testing.assert_close(model(tokens), written_out)


def test_a_token_does_not_see_later_tokens(tokens):
    model = tiny_llama()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 64
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], **TOLERANCE)
    assert ((before[:, 7:] - after[:, 7:]).abs().amax(-1) > 1e-3).all()


def test_only_distances_of_positions_matter(tokens):
    model = tiny_llama()
    shifted = model(tokens, positions=torch.arange(12) + 40)
    torch.testing.assert_close(shifted, model(tokens), atol=1e-4, rtol=1e-3)
    stretched = model(tokens, positions=torch.arange(12) * 2)
    assert not torch.allclose(stretched, model(tokens), atol=1e-2)


def test_rotation_keeps_lengths_adds_up_and_leaves_position_0_alone():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    p, q = torch.tensor([0, 1, 5, 9, 700]), torch.tensor([3, 0, 2, 8, 100])
    once = rotate(x, p + q, 1e4)
    torch.testing.assert_close(rotate(rotate(x, p, 1e4), q, 1e4), once, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(once.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(x, p, 1e4)[:, 0], x[:, 0])


class Evicting(KVCache):
    """Keeps the `sinks` first and the `recent` last tokens of every layer, after each update."""

    sinks, recent = 2, 3

    def update(self, layer, keys, values, positions):
        seen = super().update(layer, keys, values, positions)
        if seen[0].shape[-2] > self.sinks + self.recent:
            for entry in (self.keys, self.values):
                entry[layer] = torch.cat(
                    [entry[layer][..., : self.sinks, :], entry[layer][..., -self.recent :, :]], -2
                )
            p = self.positions[layer]
            self.positions[layer] = torch.cat([p[: self.sinks], p[-self.recent :]])
        return seen  # the new token still sees what is evicted after it


class Masking(KVCache):
    """Keeps all, and hides from the one new token what `Evicting` would have dropped before."""

    def update(self, layer, keys, values, positions):
        k, v, p = super().update(layer, keys, values, positions)
        newest = p[-1]
        hidden = (p >= Evicting.sinks) & (p < newest - Evicting.recent)
        return k, v, torch.where(hidden, 10_000, p)


def test_an_evicted_cache_equals_dense_attention_masked_to_the_same_keys(tokens):
    model = tiny_llama()
    evicting = Evicting()
    evicted = read_in_chunks(model, tokens, [1] * 12, evicting)
    masked = read_in_chunks(model, tokens, [1] * 12, Masking())
    torch.testing.assert_close(evicted, masked, **TOLERANCE)
    assert evicting.keys[0].shape[-2] == 5
    assert evicting.next_position == 12
    assert not torch.allclose(evicted, model(tokens), atol=1e-2)


def test_a_cache_may_renumber_its_keys(tokens):
    model, cache = tiny_llama(), KVCache()
    model(tokens[:, :6], cache)
    cache.positions = [p + 100 for p in cache.positions]
    # The queries move with them (positions go on at 106), and only distances matter.
    renumbered = model(tokens[:, 6:], cache)
    torch.testing.assert_close(renumbered, model(tokens)[:, 6:], atol=1e-4, rtol=1e-3)


class PerHead(KVCache):
    """Positions for every row and head apart; key head 1 cannot see token 0."""

    def update(self, layer, keys, values, positions):
        k, v, p = super().update(layer, keys, values, positions)
        p = p.expand(*k.shape[:2], -1).clone()
        p[:, 1, 0] = 10_000 if self.hide else 0
        return k, v, p

    def __init__(self, hide):
        super().__init__()
        self.hide = hide


def test_key_positions_may_differ_between_heads(tokens):
    model = tiny_llama(n_layers=1)
    torch.testing.assert_close(model(tokens, PerHead(hide=False)), model(tokens), **TOLERANCE)

    # Hiding token 0 from key head 1 must change queries 2 and 3 (its group) and no others.
    # o_proj of the tiny model reads the query heads in order, so its input shows them one by one.
    seen = []
    model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens, PerHead(hide=True))
    model(tokens)
    with_hidden, dense = (x.view(3, 12, 4, 8)[:, 1:] for x in seen)
    changed = (with_hidden - dense).abs().amax(dim=(0, 1, 3)) > 1e-4
    assert changed.tolist() == [False, False, True, True]


class Ragged(KVCache):
    """Rows whose first tokens are padding: nobody sees it, and positions begin after it."""

    def __init__(self, padding):
        super().__init__()
        self.padding = torch.tensor(padding)[:, None]

    def update(self, layer, keys, values, positions):
        keys, values, positions = super().update(layer, keys, values, positions)
        shown = torch.where(positions < 0, 10_000, positions)[:, None]
        return keys, values, shown.expand(*keys.shape[:2], -1)


def test_rows_may_be_at_different_positions(tokens):
    model, padding = tiny_llama(), [0, 2, 5]
    positions = torch.arange(12) - torch.tensor(padding)[:, None]
    got = model(tokens, Ragged(padding), positions)
    for row, p in enumerate(padding):
        alone = model(tokens[row : row + 1, p:])[0]
        torch.testing.assert_close(got[row, p:], alone, **TOLERANCE)


class Twins(KVCache):
    """Lets nobody see an odd position but its own token."""

    def visible(self, key_positions, positions):
        before = super().visible(key_positions, positions)
        itself = key_positions[..., None, :] == positions[:, None]
        return before & ((key_positions % 2 == 0) | itself)


def test_a_cache_decides_what_is_seen(tokens):
    model = tiny_llama()
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 64
    same = (model(tokens, Twins()) - model(changed, Twins())).abs().amax((0, 2)) < 1e-6
    assert same.tolist() == [position != 3 for position in range(12)]


class Watching(KVCache):
    observes = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def observe(self, layer, attention):
        self.seen.append((layer, attention))


def test_an_observing_cache_is_told_what_was_attended_to(tokens):
    model, cache = tiny_llama(), Watching()
    logits = read_in_chunks(model, tokens, [5, 7], cache)
    torch.testing.assert_close(logits, model(tokens), **TOLERANCE)
    assert [layer for layer, _ in cache.seen] == [0, 1, 0, 1]
    attention = cache.seen[2][1]  # layer 0, the second chunk
    assert attention.shape == (3, 2, 2, 7, 12)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 2, 7))
    assert (attention[..., 0, 6:] == 0).all()  # the future
    # Query heads 2g and 2g + 1 belong to key head g.
    block = model.layers[0]
    x = block.input_layernorm(model.embed_tokens(tokens))
    q = rotate(
        block.self_attn.q_proj(x).view(3, 12, 4, 8).transpose(1, 2), torch.arange(12), 10_000.0
    )
    k = rotate(cache.keys[0], torch.arange(12), 10_000.0)
    last = (q[:, 3, -1:] @ k[:, 1].mT / 8**0.5).softmax(-1)[:, 0]
    torch.testing.assert_close(attention[:, 1, 1, -1], last, **TOLERANCE)


def test_token_probabilities_are_what_is_drawn_from():
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)) * 2
    for temperature, top_p in [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7), (0.0, 1.0)]:
        p = token_probabilities(logits, temperature, top_p)
        torch.testing.assert_close(p.sum(-1), torch.ones(2))
        if temperature:
            full = (logits / temperature).softmax(-1)
            kept = p > 0
            torch.testing.assert_close(
                p, torch.where(kept, full / (full * kept).sum(-1, True), 0.0)
            )
            # The fewest tokens that reach top_p: they do, and without the least of them do not.
            mass = (full * kept).sum(-1)
            least = torch.where(kept, full, 2.0).amin(-1)
            assert (mass >= top_p - 1e-6).all()
            assert (mass - least < top_p).all()
        else:
            assert p.argmax(-1).equal(logits.argmax(-1))


def test_hidden_and_logits_make_up_the_model(tokens):
    model = tiny_llama()
    torch.testing.assert_close(model.logits(model.hidden(tokens)), model(tokens))


def test_a_replaced_linear_is_used(tokens):
    model = tiny_llama()
    before = model(tokens)
    model.layers[1].mlp.down_proj = torch.nn.Linear(24, 16, bias=False)
    assert not torch.allclose(model(tokens), before)


def test_every_parameter_takes_part_and_gets_a_gradient(tokens):
    model = tiny_llama()
    model(tokens).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_bfloat16_stays_close_to_float32(tokens):
    exact, rough = tiny_llama()(tokens), tiny_llama().bfloat16()(tokens)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_greedy_generation_equals_reading_everything_again_for_each_token(tokens):
    model = tiny_llama()
    text = tokens
    for _ in range(6):
        text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert generate(model, tokens, 6).equal(text[:, 12:])
    assert torch.stack(list(stream(model, tokens, 6)), 1).equal(text[:, 12:])


def test_generation_goes_on_from_a_cache_that_has_read_the_beginning(tokens):
    model, cache = tiny_llama(), KVCache()
    model(tokens[:, :5], cache)
    assert generate(model, tokens[:, 5:], 4, cache=cache).equal(generate(model, tokens, 4))
    assert cache.next_position == 12 + 4 - 1  # the last new token was never read


def test_a_row_that_stopped_repeats_its_stop_token_and_leaves_others_alone(tokens):
    model = tiny_llama()
    free = generate(model, tokens, 8)
    stop = int(free[0, 2])
    stopped = generate(model, tokens, 8, stop=[stop])
    for row, expected in zip(stopped, free, strict=True):
        ends = (expected == stop).nonzero()
        end = int(ends[0]) if len(ends) else 8
        length = min(end + 1, stopped.shape[1])
        assert row[:length].equal(expected[:length])
        assert (row[end:] == stop).all()
    first_row = generate(model, tokens[:1], 8, stop={stop})
    assert first_row[0, -1] == stop
    assert first_row.shape[1] <= 3


def test_sampling_follows_the_softmax_of_the_logits_over_the_temperature():
    model, prompt = tiny_llama(vocab_size=8), torch.tensor([[1, 2, 3]]).repeat(20_000, 1)
    g = torch.Generator().manual_seed(0)
    for temperature in (0.7, 2.0):
        drawn = generate(model, prompt, 1, temperature=temperature, generator=g)[:, 0]
        share = torch.bincount(drawn, minlength=8) / len(drawn)
        expected = (model(prompt[:1])[0, -1] / temperature).softmax(-1)
        torch.testing.assert_close(share, expected, atol=0.02, rtol=0.0)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.8, 0.95])
def test_top_p_draws_from_the_fewest_tokens_that_reach_it(top_p):
    model, prompt = tiny_llama(vocab_size=8), torch.tensor([[1, 2, 3]])
    p = (model(prompt)[0, -1] / 2).softmax(-1).detach()
    nucleus, total = set(), 0.0
    for token in p.argsort(descending=True).tolist():
        if total >= top_p:
            break
        nucleus.add(token)
        total += float(p[token])
    g = torch.Generator().manual_seed(0)
    drawn = generate(model, prompt.repeat(5000, 1), 1, temperature=2.0, top_p=top_p, generator=g)
    assert set(drawn[:, 0].tolist()) == nucleus


def test_the_same_generator_seed_draws_the_same_text_and_leaves_the_global_one_alone(tokens):
    model, state = tiny_llama(), torch.get_rng_state()
    first, second = (
        generate(model, tokens, 9, temperature=1.0, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert first.equal(second)
    tiny_llama(seed=3)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"max_new_tokens": 1, "temperature": -0.5}, "temperature must be 0 or more, got -0.5"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature"),
        ({"max_new_tokens": 1, "top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_generation_arguments_are_named(tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_llama(), tokens, **arguments)


@pytest.mark.parametrize("bad", [torch.tensor([1, 2]), torch.zeros(2, 0, dtype=torch.long)])
def test_tokens_that_are_no_matrix_are_refused(bad):
    with pytest.raises(ValueError, match="tokens must have shape"):
        tiny_llama()(bad)
