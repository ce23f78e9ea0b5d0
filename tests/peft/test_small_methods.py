"""BitFit, IA3, adapters, prompts, prefixes and probes: each one's own promises."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewer.models import tiny_bert, tiny_llama
from fewer.models.llama import RMSNorm
from fewer.peft.adapters import adapters, bottleneck, parallel_adapters
from fewer.peft.attach import attach
from fewer.peft.bitfit import BitFit, bitfit
from fewer.peft.ia3 import fold_input_scale, fold_output_scale, ia3
from fewer.peft.prefix_tuning import prefix_tuning, reparameterized_prefix
from fewer.peft.probe import cached_features, class_means, cosine_logits, linear_probe
from fewer.peft.prompt_tuning import label_prompt, prompt_tuning, random_prompt, vocabulary_prompt

TOKENS = torch.tensor([[5, 3, 8, 1, 9], [2, 7, 7, 4, 6]])
SEEDS = st.integers(0, 1000)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- how many numbers are trained -----------------------------------------------------------------


def test_counts_equal_the_papers_formulas():
    llama, bert = tiny_llama(n_layers=3), tiny_bert(n_layers=3)
    d, kv, hidden = 16, 16, 24
    for model, layers in ((llama, 3), (bert, 3)):
        with attach(model, adapters(model, 5)) as attached:
            assert attached.count() == layers * 2 * (2 * d * 5 + d + 5)
        with attach(model, parallel_adapters(model, 5)) as attached:
            assert attached.count() == layers * (2 * d * 5 + d + 5)
        with attach(model, prompt_tuning(model, 7)) as attached:
            assert attached.count() == 7 * d
    with attach(llama, prefix_tuning(llama, 7, reparameterize=None)) as attached:
        assert attached.count() == 3 * 2 * 7 * kv
    with attach(llama, ia3(llama)) as attached:
        assert attached.count() == 3 * (kv + kv + hidden)


def test_bitfit_trains_one_number_for_every_bias_of_the_model():
    bert = tiny_bert()
    biases = sum(p.numel() for name, p in bert.named_parameters() if name.endswith("bias"))
    with attach(bert, bitfit(bert)) as attached:
        assert attached.count() == biases > 0


# --- BitFit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.LayerNorm(4)])
def test_a_trained_bias_merges_into_the_module(base: nn.Module):
    x, old = torch.randn(5, 4), copy.deepcopy(base.state_dict())
    wrapper = BitFit(base)
    nn.init.normal_(wrapper.bias)
    torch.testing.assert_close(wrapper.merged()(x), wrapper(x))
    assert all(torch.equal(old[name], value) for name, value in base.state_dict().items())


def test_an_rmsnorm_has_no_place_for_a_bias():
    with pytest.raises(TypeError, match="RMSNorm"):
        BitFit(RMSNorm(4, 1e-5)).merged()


# --- IA3 ------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 5), st.integers(1, 5))
def test_scaling_outputs_or_inputs_folds_into_the_weight(seed: int, n_in: int, n_out: int):
    draw = generator(seed)
    w, b = torch.randn(n_out, n_in, generator=draw), torch.randn(n_out, generator=draw)
    x = torch.randn(3, n_in, generator=draw)
    outer, inner = torch.randn(n_out, generator=draw), torch.randn(n_in, generator=draw)
    scaled = F.linear(x, *fold_output_scale(w, b, outer))
    torch.testing.assert_close(scaled, F.linear(x, w, b) * outer)
    torch.testing.assert_close(
        F.linear(x, fold_input_scale(w, inner), b), F.linear(x * inner, w, b)
    )


def test_ia3_agrees_with_peft():
    peft = pytest.importorskip("peft")
    ours, theirs = tiny_bert(), tiny_bert()
    config = peft.IA3Config(
        target_modules=["key", "value", "mlp.down"], feedforward_modules=["mlp.down"]
    )
    wrapped = peft.get_peft_model(theirs, config)
    with attach(ours, ia3(ours)) as attached:
        scales = {n: p for n, p in wrapped.named_parameters() if "ia3_l" in n}
        assert len(scales) == len(attached.trained)
        for i, (name, p) in enumerate(attached.trained.items()):
            nn.init.normal_(p, mean=1.0, std=0.5, generator=generator(i))
            [match] = [s for n, s in scales.items() if f".{name.removesuffix('.scale')}." in n]
            match.data.copy_(p.data.reshape(match.shape))
        torch.testing.assert_close(ours.hidden(TOKENS), theirs.hidden(TOKENS))


# --- adapters -------------------------------------------------------------------------------------


def test_a_bottleneck_is_two_linear_layers_around_a_relu():
    down, up = nn.Linear(6, 2), nn.Linear(2, 6)
    h = torch.randn(3, 4, 6)
    ours = bottleneck(h, down.weight, down.bias, up.weight, up.bias)
    torch.testing.assert_close(ours, nn.Sequential(down, nn.ReLU(), up)(h))


def test_the_parallel_adapter_reads_what_the_mlp_reads_and_the_sequential_what_it_writes():
    """With the MLP's output zeroed, only the parallel one still sees anything."""
    for wraps, sees in ((parallel_adapters, True), (adapters, False)):
        model = tiny_llama(n_layers=1)
        for part in (model.layers[0].mlp.down_proj, model.layers[0].self_attn.o_proj):
            part.weight.data.zero_()
        before = model.hidden(TOKENS)
        with attach(model, wraps(model, 4)) as attached:
            for name, p in attached.trained.items():
                if name.endswith("w_up"):
                    nn.init.normal_(p)
            assert torch.allclose(model.hidden(TOKENS), before) is not sees


def test_the_scale_of_a_parallel_adapter_multiplies_what_it_adds():
    model = tiny_llama(n_layers=1)
    x = torch.randn(2, 16)
    plain = model.layers[0].mlp(x)
    added = []
    for scale in (1.0, 4.0):
        with attach(model, parallel_adapters(model, 4, scale=scale)) as attached:
            nn.init.ones_(attached.trained["layers.0.mlp.w_up"])
            added.append(model.layers[0].mlp(x) - plain)
    torch.testing.assert_close(added[1], 4 * added[0], atol=1e-4, rtol=1e-4)


# --- prompts --------------------------------------------------------------------------------------


def test_a_prompt_of_real_tokens_is_those_tokens_in_front_of_the_text():
    for model in (tiny_llama(), tiny_bert()):
        front = torch.tensor([[11, 12]]).expand(2, -1)
        text = model.hidden(torch.cat([front, TOKENS], dim=1))
        wraps = prompt_tuning(model, 2, start="label", labels=[[11], [12]])
        with attach(model, wraps):
            torch.testing.assert_close(model.hidden(TOKENS), text)


@given(SEEDS, st.integers(1, 9))
def test_starts_of_a_prompt(seed: int, length: int):
    embedding = torch.randn(12, 4, generator=generator(seed))
    words = vocabulary_prompt(embedding, length, generator(seed))
    matches = (words[:, None] == embedding).all(-1)
    assert matches.sum(1).eq(1).all(), "rows of the embedding"
    assert matches.any(0).sum() == length, "each another one"
    names = label_prompt(embedding, [[3, 5], [7]], length)
    want = [[3, 5, 7][i % 3] for i in range(length)]
    assert torch.equal(names, embedding[want])
    words.zero_()
    names.zero_()
    assert embedding.any(), "copies"


def test_a_random_prompt_is_as_large_as_the_embeddings_are():
    embedding = 0.03 * torch.randn(1000, 64, generator=generator(0))
    prompt = random_prompt(embedding, 100, generator(1))
    assert math.isclose(prompt.std().item(), 0.03, rel_tol=0.03)
    assert prompt.abs().max() <= 0.03 * math.sqrt(3) * 1.01
    assert torch.equal(prompt, random_prompt(embedding, 100, generator(1)))


def test_bad_prompts_are_refused():
    model = tiny_llama()
    for arguments, says in (
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"length": 2, "start": "zeros"}, "start must be"),
        ({"length": 2, "start": "label"}, "labels must be given"),
    ):
        with pytest.raises(ValueError, match=says):
            prompt_tuning(model, **arguments)


# --- prefixes -------------------------------------------------------------------------------------


def test_a_prefix_is_seen_by_every_token_as_more_keys_and_values():
    """One head, by hand: softmax over the prefix and the tokens up to one's own."""
    model = tiny_llama(n_layers=1, n_heads=1, n_kv_heads=1, rope_base=1e30)
    attention, x = model.layers[0].self_attn, torch.randn(1, 4, 16)
    from fewer.models import KVCache
    from fewer.models.llama import rotate

    with attach(model, prefix_tuning(model, 3, reparameterize=None, seed=1)) as attached:
        keys, values = (nn.init.normal_(p) for p in attached.parameters())
        got = model.layers[0].self_attn(x, torch.arange(4), KVCache())
    positions = torch.arange(-3, 4)
    q, k, v = (part(x)[0] for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    k = rotate(torch.cat([keys[0], k]), positions, 1e30)
    scores = rotate(q, positions[3:], 1e30) @ k.T / math.sqrt(q.shape[-1])
    scores[positions[3:, None] < positions] = -math.inf
    want = attention.o_proj(scores.softmax(-1) @ torch.cat([values[0], v]))
    torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-4)


def test_the_networks_output_is_cut_into_heads_keys_first():
    p_small, w_1 = torch.eye(3), 100 * torch.eye(3)  # tanh(100) = 1: W_2's columns come out
    w_2 = torch.arange(24.0).reshape(8, 3)  # 2 x 2 heads x 2
    keys, values = reparameterized_prefix(p_small, w_1, w_2, heads=2)
    for token in range(3):
        column = w_2[:, token]
        assert torch.equal(keys[:, token], column[:4].reshape(2, 2))
        assert torch.equal(values[:, token], column[4:].reshape(2, 2))


# --- probes ---------------------------------------------------------------------------------------


def test_a_probe_finds_the_optimum_that_scikit_learn_finds():
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = generator(0)
    features = torch.randn(60, 5, generator=draw) * torch.tensor([1.0, 10, 0.1, 1, 3]) + 2
    labels = (features[:, 0] + torch.randn(60, generator=draw) > 2).long() + (features[:, 3] > 3)
    W, b = linear_probe(features, labels, classes=3, decay=0.1, steps=500)
    x = (features - features.mean(0)) / features.std(0, correction=0)
    theirs = linear_model.LogisticRegression(C=1 / (0.1 * 60), tol=1e-8, max_iter=2000)
    theirs.fit(x.numpy(), labels.numpy())
    want = torch.from_numpy(theirs.predict_proba(x.numpy())).float()
    torch.testing.assert_close((features @ W.T + b).softmax(-1), want, atol=2e-3, rtol=0)


@given(SEEDS, st.floats(0.1, 100))
def test_cosine_logits_do_not_depend_on_lengths(seed: int, factor: float):
    draw = generator(seed)
    features, labels = torch.randn(6, 4, generator=draw), torch.tensor([0, 1, 2, 0, 1, 2])
    directions = class_means(features, labels, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(class_means(factor * features, labels, 3), directions)
    logits = cosine_logits(features, directions, tau=10.0)
    torch.testing.assert_close(cosine_logits(factor * features, directions), logits)
    assert logits.abs().max() <= 10.0001


def test_features_are_read_in_parts_and_in_order():
    seen = []

    def features(tokens):
        seen.append(len(tokens))
        return tokens.float()

    tokens = torch.arange(14).view(7, 2)
    assert torch.equal(cached_features(features, tokens, batch=3), tokens.float())
    assert seen == [3, 3, 1]


def test_a_class_without_texts_and_a_probe_without_decay_are_refused():
    with pytest.raises(ValueError, match="each of the 3 classes"):
        class_means(torch.ones(2, 2), torch.tensor([0, 1]), 3)
    with pytest.raises(ValueError, match="decay must be above 0, got 0"):
        linear_probe(torch.ones(2, 2), torch.tensor([0, 1]), 2, decay=0)
