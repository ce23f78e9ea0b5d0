"""The encoder on tiny random weights, and the real one against transformers on the same file."""

import pytest
import torch
import torch.nn.functional as F

from fewer.models import linear_layers, tiny_bert
from fewer.models.fetch import fetch_minilm
from fewer.models.minilm import name_in_file

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
real = pytest.mark.xdist_group("minilm")  # one process loads the real model

STRINGS = [
    "",
    "Hello, World!",
    "naïve CAFÉ Ångström 日本語 🤗",
    "  two  spaces\tand\n\nlines",
    "$1,000,000.50 isn't unbelievablyantidisestablishmentarian",
    "[CLS] written out [SEP]",
    "union " * 300,
]


@pytest.fixture
def tokens():
    return torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_hidden_states_equal_those_of_transformers(tokens, seed, heads):
    transformers = pytest.importorskip("transformers")
    model = tiny_bert(seed, n_heads=heads)
    c = model.config
    config = transformers.BertConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ffn,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        layer_norm_eps=c.norm_eps,
        max_position_embeddings=c.context_length,
    )
    peer = transformers.BertModel(config, add_pooling_layer=False).eval()
    renamed = {name_in_file(name): weight for name, weight in model.state_dict().items()}
    peer.load_state_dict(renamed)
    torch.testing.assert_close(model(tokens), peer(tokens).last_hidden_state, **TOLERANCE)


def test_rows_of_a_batch_are_independent(tokens):
    model = tiny_bert()
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, **TOLERANCE)


def test_every_token_sees_every_other_in_every_row(tokens):
    model = tiny_bert()
    for changed_at in (0, 7, 11):
        changed = tokens.clone()
        changed[:, changed_at] = (changed[:, changed_at] + 1) % 64
        assert ((model(tokens) - model(changed)).abs().amax(-1) > 1e-4).all()


def test_the_order_of_tokens_matters(tokens):
    model = tiny_bert()
    assert not torch.allclose(model(tokens.flip(1)).flip(1), model(tokens), atol=1e-2)


def test_a_prefix_acts_as_tokens_that_are_seen_but_do_not_look(tokens):
    attention = tiny_bert().layers[0].attention
    generator = torch.Generator().manual_seed(2)
    before, x = (
        torch.randn(1, 3, 16, generator=generator),
        torch.randn(2, 5, 16, generator=generator),
    )
    prefix = tuple(
        linear(before)[0].view(3, 4, 4).transpose(0, 1)  # heads p head_dim
        for linear in (attention.key, attention.value)
    )
    longer = attention(torch.cat([before.expand(2, -1, -1), x], dim=1))
    torch.testing.assert_close(attention(x, prefix), longer[:, 3:], **TOLERANCE)
    assert not torch.allclose(attention(x), longer[:, 3:], atol=1e-2)


class Prepending(torch.nn.Module):
    """What prompt tuning puts at `embed.tokens`, with the embeddings of real tokens for prompt."""

    def __init__(self, base, prompt):
        super().__init__()
        self.base, self.prompt = base, prompt

    def forward(self, tokens):
        return self.base(torch.cat([self.prompt.expand(len(tokens), -1), tokens], dim=1))


def test_vectors_that_an_embedding_prepends_count_as_the_first_positions(tokens):
    model = tiny_bert()
    prompt = torch.tensor([[9, 30, 7]])
    written_out = model(torch.cat([prompt.expand(3, -1), tokens], dim=1))
    model.embed.tokens = Prepending(model.embed.tokens, prompt)
    assert model(tokens).shape == (3, 15, 16)
    torch.testing.assert_close(model(tokens), written_out)
    with pytest.raises(ValueError, match="tokens must be at most 32, got 33"):
        model(torch.ones(1, 30, dtype=torch.long))


def test_the_linear_layers_have_the_names_that_methods_look_for():
    names = ["attention.query", "attention.key", "attention.value", "attention.output"]
    names += ["mlp.up", "mlp.down"]
    expected = [f"layers.{i}.{name}" for i in range(2) for name in names]
    assert list(linear_layers(tiny_bert())) == expected
    assert all(layer.bias is not None for layer in linear_layers(tiny_bert()).values())


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    first, same, other = (list(tiny_bert(seed).parameters()) for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(state)
    assert all(a.equal(b) for a, b in zip(first, same, strict=True))
    assert not any(a.equal(b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("bad", [torch.tensor([1, 2]), torch.zeros(2, 0, dtype=torch.long)])
def test_tokens_that_are_no_matrix_are_refused(bad):
    with pytest.raises(ValueError, match="tokens must have shape"):
        tiny_bert()(bad)


@real
@torch.no_grad()
def test_the_real_hidden_states_equal_those_of_transformers(minilm):
    transformers = pytest.importorskip("transformers")
    peer = transformers.BertModel.from_pretrained(fetch_minilm(progress=False)).eval()
    for text in STRINGS:
        ids = torch.tensor([minilm.tokenizer.encode(text).ids])
        torch.testing.assert_close(
            minilm.model(ids), peer(ids).last_hidden_state, atol=1e-5, rtol=0
        )


@real
def test_the_real_tokens_equal_those_of_transformers(minilm):
    transformers = pytest.importorskip("transformers")
    file = str(fetch_minilm(progress=False) / "tokenizer.json")
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    for text in STRINGS:
        encoded = minilm.tokenizer.encode(text)
        assert encoded.ids == peer.encode(text)
        assert (encoded.tokens[0], encoded.tokens[-1]) == ("[CLS]", "[SEP]")
        assert "[PAD]" not in encoded.tokens
    assert len(minilm.tokenizer.encode(STRINGS[-1]).ids) == 302


@real
def test_the_real_model_is_frozen_and_has_the_published_size(minilm):
    parameters = list(minilm.model.parameters())
    assert sum(p.numel() for p in parameters) == 22_565_376
    assert not any(p.requires_grad or p.is_meta for p in parameters)
    assert {p.dtype for p in parameters} == {torch.float32}


@real
@torch.no_grad()
def test_sentences_of_like_meaning_are_nearer_than_others(minilm):
    """Also where they share no word, and where others do."""
    near = [
        ("A cat sits on the mat.", "The kitten is resting upon a rug."),
        ("How do I bake bread?", "Instructions for making a loaf in an oven"),
        ("The senate passed the budget.", "Lawmakers approved public spending."),
        ("He plays the guitar on a stage.", "A musician performs at a concert."),
    ]
    first, second = (
        F.normalize(
            torch.stack(
                [
                    minilm.model(torch.tensor([minilm.tokenizer.encode(text).ids]))[0].mean(dim=0)
                    for text in texts
                ]
            ),
            dim=1,
        )
        for texts in zip(*near, strict=True)
    )
    cosines = first @ second.T
    assert (cosines.argmax(1) == torch.arange(4)).all()
    assert cosines.diag().min() > cosines[~torch.eye(4, dtype=torch.bool)].max() + 0.1
