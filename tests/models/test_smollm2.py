"""The real model against transformers, an independent reader of the same file."""

import gguf
import pytest
import torch

from fewer.data import evaluation_text
from fewer.models import KVCache, chat_prompt, generate, linear_layers
from fewer.models.fetch import GGUF_NAME, fetch_smollm2
from fewer.models.gguf_loader import read_gguf

pytestmark = pytest.mark.xdist_group("smollm2")  # one process loads both models

CHAT = [
    {"role": "user", "content": "What is 7 x 12?"},
    {"role": "assistant", "content": "84"},
    {"role": "user", "content": "And doubled?\n"},
]

STRINGS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand a tab\n\n\nthree lines\r\n",
    "1234567890 3.14159 1,000,000 0x1F 2²",
    "don't we'll I'M",
    "naïve café Ångström Größe",
    "日本語 中文 한국어 العربية עברית हिन्दी ๑๒๓ ١٢٣",
    "🤗👩‍👩‍👧‍👦 zero\u200bwidth \ufeff bom e\u0301",
    "def f(x):\n    return x**2  # square\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|not_special|> <repo_name>x",
    "<fim_prefix><|im_end|><|im_end|>",
    "\x00\x01\x7f",
    chat_prompt(CHAT),
]


@pytest.fixture(scope="module")
def tokens(smollm2):
    return torch.tensor([smollm2.tokenizer.encode(evaluation_text().text[:1200]).ids[:256]])


@pytest.fixture(scope="module")
def logits(smollm2, tokens):
    return smollm2.model(tokens)


@torch.no_grad()
def test_logits_equal_those_of_transformers(logits, transformers_smollm2, tokens):
    peer = transformers_smollm2[0](tokens).logits
    torch.testing.assert_close(logits, peer, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("part", "heads"), [("q_proj", 9), ("k_proj", 3)])
def test_rows_of_q_or_k_in_the_order_of_the_file_would_be_noticed(
    smollm2, logits, tokens, part, heads
):
    """The comparison above must see a forgotten permutation, even in one layer's k alone."""
    layer = smollm2.model.layers[0].self_attn.get_submodule(part)
    right = layer.weight
    try:
        rows = right.view(heads, 2, 32, -1).transpose(1, 2).reshape(right.shape)
        layer.weight = torch.nn.Parameter(rows, requires_grad=False)
        wrong = smollm2.model(tokens)
    finally:
        layer.weight = right
    assert (wrong - logits).abs().max() > 1


def test_tokens_equal_those_of_transformers(smollm2, transformers_smollm2):
    peer = transformers_smollm2[1]
    for text in [*STRINGS, evaluation_text().text[:20_000]]:
        ids = smollm2.tokenizer.encode(text).ids
        assert ids == peer.encode(text), text[:80]
        assert smollm2.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_chat_prompt_equals_the_models_own_template(transformers_smollm2):
    peer = transformers_smollm2[1]
    metadata = gguf.GGUFReader(fetch_smollm2(progress=False) / GGUF_NAME).fields
    peer.chat_template = metadata["tokenizer.chat_template"].contents()
    for chat in (CHAT, CHAT[:1], [{"role": "system", "content": "Be brief."}, *CHAT]):
        theirs = peer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert chat_prompt(chat) == theirs


def test_cached_logits_equal_uncached_logits(smollm2, logits, tokens):
    cache = KVCache()
    parts = [smollm2.model(chunk, cache) for chunk in tokens[:, :80].split([50, 1, 1, 28], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits[:, :80], atol=2e-3, rtol=1e-4)


def test_it_knows_the_capital_of_france(smollm2):
    prompt = torch.tensor([smollm2.tokenizer.encode("The capital of France is").ids])
    assert smollm2.tokenizer.decode(generate(smollm2.model, prompt, 2)[0].tolist()) == " Paris."


def test_it_answers_a_chat_and_stops(smollm2):
    prompt = chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
    end = smollm2.tokenizer.token_to_id("<|im_end|>")
    ids = torch.tensor([smollm2.tokenizer.encode(prompt).ids])
    answer = generate(smollm2.model, ids, 40, stop=[end])[0]
    assert "Paris" in smollm2.tokenizer.decode(answer.tolist())
    assert answer[-1] == end


def test_the_cached_weights_are_those_of_the_file_and_of_a_4_bit_model(smollm2):
    weights = read_gguf(fetch_smollm2(progress=False) / GGUF_NAME).weights
    for name, weight in smollm2.model.state_dict().items():
        assert weight.equal(weights[name]), name
    for name, layer in linear_layers(smollm2.model).items():
        groups = layer.weight.view(-1, 32).sort(-1).values
        assert ((groups.diff(dim=-1) != 0).sum(-1) < 16).all(), name
