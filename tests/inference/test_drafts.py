"""Drafts: prompt lookup, n-grams, other models, early exit."""

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.inference.early_exit import early_exit
from fewer.inference.model_draft import ModelDraft, common_prefix
from fewer.inference.ngram import NGramDraft, backoff, ngram_counts
from fewer.inference.prompt_lookup import look_up, prompt_lookup
from fewer.inference.speculative import speculate
from fewer.models import generate, tiny_llama, token_probabilities

texts = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@given(texts, st.integers(1, 6), st.integers(1, 4))
def test_lookup_finds_what_followed_the_longest_and_first_match(text, length, longest):
    expected = []
    for n in range(min(longest, len(text) - 1), 0, -1):
        starts = [i for i in range(len(text) - n) if text[i : i + n] == text[len(text) - n :]]
        if starts:
            expected = text[starts[0] + n :][:length]
            break
    assert look_up(torch.tensor(text), length, longest).tolist() == expected


@given(texts, st.integers(1, 6), st.integers(1, 4))
def test_lookup_agrees_with_transformers(text, length, longest):
    module = pytest.importorskip("transformers.generation.candidate_generator")
    theirs = module.PromptLookupCandidateGenerator(
        num_output_tokens=length, max_matching_ngram_size=longest, max_length=1000
    )
    found, _ = theirs.get_candidates(torch.tensor([text]))
    ours = look_up(torch.tensor(text), length, longest)
    assert found[0, len(text) :].tolist() == ours.tolist()


def test_bad_arguments_of_lookup_are_named():
    with pytest.raises(ValueError, match=r"text must be a vector of token ids, got shape \(1, 2\)"):
        look_up(torch.tensor([[1, 2]]), 3, 3)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        look_up(torch.tensor([1, 2]), 0, 3)
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        look_up(torch.tensor([1, 2]), 3, 0)


def counted(text, context):
    """By brute force: what followed a context wherever it stands."""
    n = len(context)
    return Counter(text[i + n] for i in range(len(text) - n) if text[i : i + n] == context)


@given(texts, st.integers(2, 4))
def test_ngrams_are_counted_by_brute_force(text, order):
    counts = ngram_counts(text, order)
    contexts = {tuple(text[i - n : i]) for i in range(len(text)) for n in range(order) if n <= i}
    assert counts == {context: counted(text, list(context)) for context in contexts}
    ends = [text[len(text) - n :] for n in range(min(order - 1, len(text)), -1, -1)]
    longest = next(c for c in ends if counted(text, c))
    assert backoff(text, order, counts) == counted(text, longest)


@given(st.lists(texts, min_size=1, max_size=4), texts)
@settings(max_examples=30)
def test_an_ngram_draft_that_follows_a_text_equals_a_new_one(parts, training):
    following, text = NGramDraft(3, 4, vocab=4, training=training), []
    for part in [*parts, [2, 1]]:
        text = text + part
        new = NGramDraft(3, 4, vocab=4, training=training)
        assert following(torch.tensor(text)).tokens.equal(new(torch.tensor(text)).tokens)
        assert following.counts == ngram_counts(text, 3)  # nothing twice, and no proposal
    other = torch.tensor([3, 3, 0, 1])  # not the same text any more
    assert following(other).tokens.equal(NGramDraft(3, 4, vocab=4, training=training)(other).tokens)


def test_an_ngram_draft_draws_from_the_counts_that_it_reports():
    text = torch.tensor([1, 2, 1, 2, 1, 3, 0, 1])
    draft = NGramDraft(2, 1, vocab=5, greedy=False)
    g = torch.Generator().manual_seed(0)
    drawn = [draft(text, g) for _ in range(400)]
    for proposal in drawn:
        torch.testing.assert_close(proposal.q, torch.tensor([[0.0, 0.0, 2 / 3, 1 / 3, 0.0]]))
    share = sum(int(proposal.tokens) == 2 for proposal in drawn) / 400
    assert abs(share - 2 / 3) < 0.1
    assert NGramDraft(2, 1, vocab=5)(text).tokens.tolist() == [2]


def test_a_training_text_adds_to_what_the_text_itself_says():
    draft = NGramDraft(2, 1, vocab=8, training=[1, 5, 1, 5, 6, 7])
    assert draft(torch.tensor([1, 4, 1])).tokens.tolist() == [5]  # 5 twice, 4 once
    assert draft(torch.tensor([1, 4, 1, 4, 1, 4, 1])).tokens.tolist() == [4]
    assert draft(torch.tensor([6])).tokens.tolist() == [7]


@given(st.integers(0, 10_000))
@settings(max_examples=10)
def test_a_model_draft_forgets_what_was_rejected(seed):
    model = tiny_llama(n_layers=1)
    draft, g = ModelDraft(model, length=3), torch.Generator().manual_seed(seed)
    text = torch.randint(64, (5,), generator=g)
    for _ in range(5):
        proposed = draft(text).tokens
        assert proposed.equal(generate(model, text[None], 3)[0])
        accepted = int(torch.randint(4, (1,), generator=g))
        other = torch.randint(64, (1,), generator=g)
        text = torch.cat([text, proposed[:accepted], other])
    other = torch.randint(64, (4,), generator=g)
    assert draft(other).tokens.equal(generate(model, other[None], 3)[0])


def test_a_model_draft_reads_new_tokens_only():
    model = tiny_llama(n_layers=1)
    read = []
    model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    draft, text = ModelDraft(model, length=3), torch.arange(6)
    text = torch.cat([text, draft(text).tokens, torch.tensor([7])])
    draft(text)
    assert read == [6, 1, 1, 2, 1, 1]  # the third drafted token was not read before
    draft(torch.cat([text[:7], torch.tensor([9])]))
    assert read[6:] == [1, 1, 1]


def test_a_drawing_model_draft_reports_what_it_drew_from():
    model, text = tiny_llama(vocab_size=6), torch.tensor([1, 2, 3])
    proposal = ModelDraft(model, 3, 0.7, 0.9)(text, torch.Generator().manual_seed(0))
    whole = torch.cat([text, proposal.tokens])
    expected = token_probabilities(model(whole[None])[0, 2:5], 0.7, 0.9)
    torch.testing.assert_close(proposal.q, expected)
    assert (proposal.q.gather(1, proposal.tokens[:, None]) > 0).all()


def test_common_prefix_ends_at_the_first_difference():
    a = torch.tensor([1, 2, 3, 4])
    assert common_prefix(a, torch.tensor([1, 2, 9, 4])) == 2
    assert common_prefix(a, a[:3]) == 3
    assert common_prefix(a[:0], a) == 0


def test_an_early_exit_is_the_first_layers_then_norm_and_output():
    model, tokens = tiny_llama(n_layers=3), torch.tensor([[1, 2, 3, 4]])
    x = model.embed_tokens(tokens)
    blocks = []
    hooks = [b.register_forward_hook(lambda _, __, out: blocks.append(out)) for b in model.layers]
    full = model(tokens)
    for hook in hooks:
        hook.remove()
    for layers in (1, 2, 3):
        shallow = early_exit(model, layers)
        expected = model.norm(blocks[layers - 1]) @ model.embed_tokens.weight.T
        torch.testing.assert_close(shallow(tokens), expected)
        assert {id(p) for p in shallow.parameters()} <= {id(p) for p in model.parameters()}
    torch.testing.assert_close(shallow(tokens), full)
    assert len(model.layers) == model.config.n_layers == 3
    assert not torch.allclose(early_exit(model, 1)(tokens), x @ model.embed_tokens.weight.T)
    with pytest.raises(ValueError, match="layers must be between 1 and 3, got 4"):
        early_exit(model, 4)


DRAFTS = {
    "prompt lookup": lambda model: partial(prompt_lookup, length=5),
    "n-grams": lambda model: NGramDraft(3, 4, vocab=64),
    "n-grams, drawn": lambda model: NGramDraft(2, 3, vocab=64, greedy=False),
    "another model": lambda model: ModelDraft(tiny_llama(seed=5, n_layers=1), 3),
    "another model, drawn": lambda model: ModelDraft(tiny_llama(seed=5), 3, 0.8, 0.9),
    "early exit": lambda model: ModelDraft(early_exit(model, 1), 3),
    "itself": lambda model: ModelDraft(model, 4),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_output_equals_generate_with_every_draft_and_batch(name):
    model = tiny_llama()
    tokens = torch.randint(64, (3, 7), generator=torch.Generator().manual_seed(2))
    tokens[1] = torch.tensor([5, 6, 5, 6, 5, 6, 5])
    plain = generate(model, tokens, 18)
    own = [DRAFTS[name](model) for _ in range(3)]
    done = speculate(model, tokens, own, 18)
    assert done.tokens.equal(plain)
    for row in range(3):
        alone = speculate(model, tokens[row : row + 1], DRAFTS[name](model), 18)
        assert alone.tokens[0].equal(plain[row])
        if "drawn" not in name:
            assert alone.calls[0] == done.calls[row]
    one_for_all = speculate(model, tokens, DRAFTS[name](model), 18)
    assert one_for_all.tokens.equal(plain)
    if name == "itself":
        assert done.acceptance == 1


def test_drawing_from_itself_every_token_is_accepted():
    model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
    g = torch.Generator().manual_seed(0)
    draft = ModelDraft(model, 4, temperature=1.3, top_p=0.8)
    done = speculate(model, tokens, draft, 25, temperature=1.3, top_p=0.8, generator=g)
    assert done.acceptance == 1
    assert done.calls.tolist() == [5]
    other = speculate(model, tokens, draft, 25, temperature=0.6, top_p=0.8, generator=g)
    assert other.acceptance < 1


def test_the_same_generator_seed_gives_the_same_text():
    model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
    state = torch.get_rng_state()
    first, second = (
        speculate(
            model,
            tokens,
            ModelDraft(tiny_llama(seed=1), 3, 1.0),
            12,
            temperature=1.0,
            generator=torch.Generator().manual_seed(4),
        ).tokens
        for _ in range(2)
    )
    assert first.equal(second)
    assert torch.get_rng_state().equal(state)
