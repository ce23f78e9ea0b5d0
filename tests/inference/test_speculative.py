"""Speculative decoding: the rule itself, and the loop with drafts that are made up for the test."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.inference.ragged import RaggedCache
from fewer.inference.speculative import (
    Proposal,
    acceptance_probability,
    acceptance_rate,
    best_draft_length,
    expected_speedup,
    expected_tokens,
    residual_distribution,
    speculate,
    speculative_stream,
    until_stop,
    verify_draft,
)
from fewer.models import KVCache, generate, load_smollm2, tiny_llama, token_probabilities

seeds = st.integers(0, 10_000)


def distributions(seed, *shape, zeros=0.3):
    """Random ones in float64, some of whose probabilities are 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(*shape, generator=g, dtype=torch.float64)
    x = x * (torch.rand(*shape, generator=g) >= zeros)
    x[..., 0] += 1e-3
    return x / x.sum(-1, keepdim=True)


def threshold(decide):
    """The u at which a decision changes from yes to no."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if decide(middle) else (low, middle)
    return low


@given(seeds)
@settings(max_examples=50)
def test_accepted_and_resampled_tokens_together_are_distributed_as_p(seed):
    p, q = distributions(seed, 2, 5)
    tokens = torch.arange(5)
    accept = acceptance_probability(p.expand(5, 5), q.expand(5, 5), tokens)
    out = q * accept + (1 - (q * accept).sum()) * residual_distribution(p, q)
    torch.testing.assert_close(out, p)
    torch.testing.assert_close(acceptance_rate(p, q), (q * accept).sum())
    torch.testing.assert_close(1 - acceptance_rate(p, q), (p - q).abs().sum() / 2)


def test_nothing_is_accepted_that_the_model_never_says():
    p, q = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5, 0.5, 0.0])
    accept = [acceptance_probability(p, q, torch.tensor(x)).item() for x in range(3)]
    assert accept == [0.0, 1.0, 0.0]
    assert verify_draft(torch.stack([p, p]), q[None], torch.tensor([0]), torch.zeros(1))[0] == 0


def test_a_draft_with_the_models_own_distribution_is_always_accepted():
    p = distributions(3, 4, 6)
    assert acceptance_rate(p, p).tolist() == pytest.approx([1.0] * 4)
    torch.testing.assert_close(residual_distribution(p, p), p)
    accepted, following = verify_draft(p, p[:3], torch.zeros(3).long(), torch.full((3,), 1 - 1e-7))
    assert accepted == 3
    assert following.equal(p[3])


@given(seeds, st.integers(0, 3))
@settings(max_examples=30)
def test_a_draft_is_cut_at_its_first_rejection(seed, rejected):
    p, q = distributions(seed, 4, 5, zeros=0.0), distributions(seed + 1, 3, 5, zeros=0.0)
    tokens = torch.randint(5, (3,), generator=torch.Generator().manual_seed(seed))
    accept = (p[range(3), tokens] / q[range(3), tokens]).clamp(max=1)
    u = accept / 2
    if rejected < 3:
        q[rejected, tokens[rejected]] += 1  # so that it is rejected at times
        q[rejected] /= 2
        accept = (p[range(3), tokens] / q[range(3), tokens]).clamp(max=1)
        u = accept / 2
        u[rejected] = (1 + accept[rejected]) / 2
    n, following = verify_draft(p, q, tokens, u)
    if rejected < 3 and accept[rejected] < 1:
        assert n == rejected
        missing = [max(0.0, float(a - b)) for a, b in zip(p[n], q[n], strict=True)]
        expected = torch.tensor([m / sum(missing) for m in missing], dtype=torch.float64)
        torch.testing.assert_close(following, expected)
    elif rejected == 3:
        assert n == 3
        assert following.equal(p[3])


def test_verification_accepts_with_the_probability_of_the_rule():
    p, q = distributions(0, 4, 5, zeros=0.0), distributions(1, 3, 5, zeros=0.0)
    tokens = torch.tensor([0, 3, 2])
    for i in range(3):

        def decide(x, i=i):
            u = torch.zeros(3, dtype=torch.float64)
            u[i] = x
            return verify_draft(p, q, tokens, u)[0] > i

        expected = min(1.0, float(p[i, tokens[i]] / q[i, tokens[i]]))
        assert threshold(decide) == pytest.approx(expected, abs=1e-9)


def test_greedy_verification_accepts_what_the_model_would_have_said():
    p = F.one_hot(torch.tensor([4, 1, 2, 0]), 5).double()
    for q in (F.one_hot(torch.tensor([4, 1, 3]), 5).double(), distributions(0, 3, 5, zeros=0.0)):
        u = torch.full((3,), 0.999_999)
        accepted, following = verify_draft(p, q, torch.tensor([4, 1, 3]), u)
        assert accepted == 2
        torch.testing.assert_close(following, p[2])


def test_transformers_accepts_the_same_tokens_and_draws_the_same_next_one():
    utils = pytest.importorskip("transformers.generation.utils")
    counts = []
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        p_logits = torch.randn(5, 7, generator=g)
        q_logits = p_logits[:4] + torch.randn(4, 7, generator=g)
        p, q = p_logits.softmax(-1), q_logits.softmax(-1)
        draft = torch.multinomial(q, 1, generator=g)[:, 0]
        text = torch.cat([torch.tensor([1, 2]), draft])[None]
        torch.manual_seed(seed)
        theirs, matches = utils._speculative_sampling(text, q_logits[None], 4, p_logits[None])
        torch.manual_seed(seed)
        accepted, following = verify_draft(p, q, draft, torch.rand(1, 4)[0])
        own = torch.multinomial(following, 1)
        assert accepted == matches
        assert torch.cat([draft[:accepted], own]).equal(theirs[0])
        counts.append(accepted)
    assert set(counts) == {0, 1, 2, 3, 4}


@given(st.floats(0, 1), st.integers(0, 12))
def test_expected_tokens_are_the_mean_over_all_ways_a_draft_can_end(a, k):
    # n accepted and then a rejection, or all k; one token more in either case.
    mean = sum((n + 1) * a**n * (1 - a) for n in range(k)) + (k + 1) * a**k
    assert expected_tokens(a, k) == pytest.approx(mean, rel=1e-9)


def test_drafting_pays_if_the_acceptance_rate_exceeds_the_cost():
    # Corollary 3.9 of Leviathan et al.: some k gives a speed-up if and only if a > c.
    for a in (0.05, 0.3, 0.6, 0.95):
        for c in (0.0, 0.04, 0.29, 0.31, 0.59, 0.61, 0.96):
            k = best_draft_length(a, c)
            assert (k > 0) == (a > c)
            best = expected_speedup(a, k, c)
            assert all(best >= expected_speedup(a, other, c) for other in range(33))
            assert k == 0 or best > 1
    assert best_draft_length(0.5, 0.0, longest=9) == 9
    assert best_draft_length(0.0, 0.0) == 0
    assert expected_speedup(0.7, 3, 0.1, call=2.0) == pytest.approx(expected_tokens(0.7, 3) / 2.3)


class Reciting:
    """Proposes what greedy decoding says, with every `wrong`th token changed."""

    def __init__(self, text, length, wrong=3):
        self.text, self.length, self.wrong = text, length, wrong

    def __call__(self, text, generator=None):
        n = len(text)
        tokens = self.text[n : n + self.length].clone()
        for i in range(len(tokens)):
            if (n + i) % self.wrong == 0:
                tokens[i] = (tokens[i] + 1) % 64
        return Proposal(tokens)


def random_draft(text, generator=None):
    g = torch.Generator().manual_seed(len(text))
    k = int(torch.randint(5, (1,), generator=g))
    return Proposal(torch.randint(64, (k,), generator=g))


def prompts(rows, seed=1):
    return torch.randint(64, (rows, 9), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_greedy_output_equals_generate_and_every_row_goes_its_own_way(kv_heads):
    model, tokens = tiny_llama(n_kv_heads=kv_heads), prompts(4)
    plain = generate(model, tokens, 23)
    whole = torch.cat([tokens, plain], 1)
    drafts = [
        Reciting(whole[0], 4),
        Reciting(whole[1], 7, wrong=50),
        random_draft,
        lambda text, generator: Proposal(text[:0]),
    ]
    together = speculate(model, tokens, drafts, 23)
    assert together.tokens.equal(plain)
    assert together.calls.tolist()[3] == 23
    assert len(set(together.calls.tolist())) >= 3
    for row, draft in enumerate(drafts):
        alone = speculate(model, tokens[row : row + 1], draft, 23)
        assert alone.tokens[0].equal(together.tokens[row])
        for name in ("calls", "drafted", "judged", "accepted", "lengths"):
            assert getattr(alone, name)[0] == getattr(together, name)[row]


def test_a_right_draft_of_k_tokens_gives_k_plus_1_tokens_a_call():
    model, tokens = tiny_llama(), prompts(2)
    whole = torch.cat([tokens, generate(model, tokens, 20)], 1)
    drafts = [Reciting(row, 4, wrong=1000) for row in whole]
    done = speculate(model, tokens, drafts, 20)
    assert done.calls.tolist() == [4, 4]
    assert done.tokens_per_call == 5
    assert done.acceptance == 1
    assert done.drafted.tolist() == done.judged.tolist() == done.accepted.tolist() == [16, 16]


def test_a_wrong_draft_costs_calls_and_nothing_else():
    model, tokens = tiny_llama(), prompts(1)
    plain = generate(model, tokens, 8)
    done = speculate(model, tokens, Reciting(torch.cat([tokens, plain], 1)[0], 3, wrong=1), 8)
    assert done.tokens.equal(plain)
    assert done.calls.tolist() == [8]
    assert done.accepted.tolist() == [0]
    assert done.judged.tolist() == [8]
    assert math.isnan(speculate(model, tokens, lambda t, g: Proposal(t[:0]), 3).acceptance)


@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_stop_tokens_end_a_row_as_in_generate_also_inside_a_draft(at):
    model, tokens = tiny_llama(), prompts(3)
    free = generate(model, tokens, 16)
    whole = torch.cat([tokens, free], 1)
    stop = [int(free[0, at]), int(free[1, 7])]
    drafts = [Reciting(row, 6, wrong=7) for row in whole]
    plain = generate(model, tokens, 16, stop=stop)
    done = speculate(model, tokens, drafts, 16, stop=stop)
    assert done.tokens.equal(plain)
    for row, length in zip(done.tokens, done.lengths.tolist(), strict=True):
        ends = [i for i, token in enumerate(row.tolist()) if token in stop]
        assert length == (ends[0] + 1 if ends else 16)


def test_until_stop_keeps_the_stop_token():
    tokens = torch.tensor([4, 5, 6, 5])
    assert until_stop(tokens, {5}).tolist() == [4, 5]
    assert until_stop(tokens, set()).equal(tokens)


def test_rounds_say_what_was_accepted_and_what_the_model_added():
    model, tokens = tiny_llama(), prompts(2)
    whole = torch.cat([tokens, generate(model, tokens, 12)], 1)
    texts = list(tokens)
    for rounds in speculative_stream(model, tokens, [Reciting(r, 4) for r in whole], 12):
        for one in rounds:
            assert one.accepted <= one.judged <= one.drafted
            assert one.judged == min(one.accepted + 1, one.drafted)
            texts[one.row] = torch.cat([texts[one.row], one.tokens])
            assert len(one.tokens) == one.accepted + 1 or len(texts[one.row]) == 21
    assert torch.stack(texts).equal(whole)


def test_after_ragged_acceptance_the_cache_is_that_of_the_accepted_text(monkeypatch):
    model, tokens = tiny_llama(), prompts(3)
    whole = torch.cat([tokens, generate(model, tokens, 30)], 1)
    caches = []

    class Recorded(RaggedCache):
        def __init__(self):
            super().__init__()
            caches.append(self)

    monkeypatch.setattr("fewer.inference.speculative.RaggedCache", Recorded)
    drafts = [Reciting(whole[0], 5, 2), Reciting(whole[1], 3, 4), random_draft]
    texts = list(tokens)
    stream = speculative_stream(model, tokens, drafts, 30)
    for call in range(4):
        for one in next(stream):
            texts[one.row] = torch.cat([texts[one.row], one.tokens])
        if call == 0:
            continue  # what this call has rejected goes before the next
    next(stream)
    (cache,) = caches
    cache.crop([len(text) - 1 for text in texts])
    assert len({len(text) for text in texts}) > 1
    for row, text in enumerate(texts):
        dense = KVCache()
        model(text[None, :-1], dense)
        seen = cache.positions[0][row] < 1000
        assert cache.positions[0][row][seen].equal(torch.arange(len(text) - 1))
        for layer in range(2):
            torch.testing.assert_close(
                cache.keys[layer][row][:, seen], dense.keys[layer][0], atol=2e-5, rtol=1e-4
            )
            torch.testing.assert_close(
                cache.values[layer][row][:, seen], dense.values[layer][0], atol=2e-5, rtol=1e-4
            )


def chi_square(counts, expected):
    return ((counts - expected).square() / expected).sum().item()


def chi_square_limit(freedom):
    """What one in 10,000 right samplers exceeds (Wilson and Hilferty's cube)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9)])
def test_drawn_pairs_of_tokens_follow_the_model_by_chi_square(temperature, top_p):
    model, prompt, rows = tiny_llama(vocab_size=5), torch.tensor([[1, 2, 3]]), 3000

    def draft(text, generator):
        q = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.2, 0.5]])
        return Proposal(torch.multinomial(q, 1, generator=generator)[:, 0], q)

    g = torch.Generator().manual_seed(0)
    done = speculate(
        model, prompt.repeat(rows, 1), draft, 2, temperature=temperature, top_p=top_p, generator=g
    )
    counts = torch.bincount(done.tokens[:, 0] * 5 + done.tokens[:, 1], minlength=25)

    first = token_probabilities(model(prompt)[0, -1], temperature, top_p)
    after = model(torch.cat([prompt.expand(5, 3), torch.arange(5)[:, None]], 1))[:, -1]
    expected = (first[:, None] * token_probabilities(after, temperature, top_p)).flatten() * rows
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    limit = chi_square_limit(int(likely.sum()) - 1)
    assert chi_square(counts[likely], expected[likely]) < limit
    # The draft alone would be far beyond it.
    wrong = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])[:, None] * torch.tensor(
        [0.1, 0.1, 0.1, 0.2, 0.5]
    )
    assert chi_square(wrong.flatten()[likely] * rows, expected[likely]) > 3 * limit


@pytest.mark.xdist_group("smollm2")
def test_tokens_drawn_from_the_real_model_follow_it_by_chi_square():
    model, tokenizer = load_smollm2(progress=False)
    prompt = torch.tensor([tokenizer.encode("My favourite colour is").ids])
    rows, sampling = 192, {"temperature": 0.9, "top_p": 0.8}
    logits = model(prompt)[0, -1]
    p, q = token_probabilities(logits, **sampling), token_probabilities(logits, 1.6, 0.7)

    def draft(text, generator):
        return Proposal(torch.multinomial(q, 1, generator=generator), q[None])

    g = torch.Generator().manual_seed(0)
    done = speculate(model, prompt.repeat(rows, 1), draft, 1, **sampling, generator=g)
    assert 0.3 < done.acceptance < 0.9  # so both ways to a token are taken
    assert abs(done.acceptance - float(acceptance_rate(p, q))) < 0.12
    counts = torch.bincount(done.tokens[:, 0], minlength=len(p))
    assert counts[p == 0].sum() == 0
    likely = p * rows > 5
    bins = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = rows * torch.cat([p[likely], p[~likely].sum()[None]])
    assert len(bins) >= 4
    assert chi_square(bins, expected) < chi_square_limit(len(bins) - 1)
    alone = rows * torch.cat([q[likely], q[~likely].sum()[None]])  # the draft without the model
    assert chi_square(alone, expected) > 2 * chi_square_limit(len(bins) - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"draft": [random_draft]}, r"drafts must be as many as rows \(2\), got 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    usual = {"draft": random_draft, "max_new_tokens": 4}
    with pytest.raises(ValueError, match=message):
        speculate(tiny_llama(), prompts(2), **{**usual, **arguments})


def test_bad_arguments_of_the_rule_are_named():
    p = torch.full((2, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"q must have the shape of p, \(2, 3\), got \(3,\)"):
        residual_distribution(p, p[0])
    with pytest.raises(ValueError, match=r"q must have the shape of p, \(3,\), got \(2, 3\)"):
        acceptance_probability(p[0], p, torch.tensor(0))
    with pytest.raises(
        ValueError, match="p and q must have 3 and 2 rows for 2 tokens, got 2 and 2"
    ):
        verify_draft(p, p, torch.tensor([0, 1]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"a must be between 0 and 1, got 1\.2"):
        expected_tokens(1.2, 3)
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        expected_tokens(0.2, -1)
    with pytest.raises(ValueError, match="c must be 0 or more"):
        expected_speedup(0.2, 1, -0.1)
