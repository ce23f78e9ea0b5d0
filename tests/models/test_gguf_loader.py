import gguf
import pytest
import torch

from fewer.models import Llama, tiny_llama
from fewer.models.gguf_loader import read_gguf, unpermute


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (1, 8), (3, 4), (9, 64)])
def test_unpermute_undoes_what_llama_cpp_did(heads, head_dim):
    weight = torch.arange(heads * head_dim * 3).view(-1, 3)
    half = head_dim // 2
    order = [h * head_dim + i + s * half for h in range(heads) for i in range(half) for s in (0, 1)]
    assert (unpermute(weight[order].numpy(), heads) == weight.numpy()).all()


def test_a_file_gives_back_its_sizes_weights_and_logits(tiny_gguf, tiny_sizes):
    config, weights, _ = read_gguf(tiny_gguf)
    original = tiny_llama(**tiny_sizes)
    assert {**vars(original.config), "context_length": 128} == pytest.approx(vars(config))
    model = Llama(config)
    model.load_state_dict(weights)
    for name, weight in original.state_dict().items():
        if weight.ndim == 1:
            assert weights[name].equal(weight)
        else:
            # At most half a step of the widest block: 15 steps for Q4_1, 254 for Q8_0.
            steps = 254 if "embed" in name else 15
            limit = 0.55 * 2 * weight.abs().max() / steps
            assert (weights[name] - weight).abs().max() <= limit, name
    tokens = torch.arange(40)[None]
    error = (model(tokens) - original(tokens)).norm() / original(tokens).norm()
    assert (
        error < 0.5
    )  # 4 bits on random weights; with q or k rows in the wrong order it is above 1


def test_the_tokenizer_splits_digits_merges_bytes_and_keeps_special_tokens_whole(tiny_gguf):
    tokenizer = read_gguf(tiny_gguf).tokenizer
    pieces = tokenizer.encode("the 12<|im_end|>é").tokens
    assert pieces == ["the", "Ġ", "1", "2", "<|im_end|>", "Ã", "©"]
    text = "the theatre\n\t costs 100 €, naïve 🤗"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("architecture", "kind", "pre", "message"),
    [
        ("gpt2", "gpt2", "smollm", "general.architecture must be 'llama', got 'gpt2'"),
        ("llama", "llama", "smollm", "tokenizer.ggml.model must be 'gpt2', got 'llama'"),
        ("llama", "gpt2", "qwen2", "tokenizer.ggml.pre must be 'smollm', got 'qwen2'"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, architecture, kind, pre, message):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=message):
        read_gguf(tmp_path / "other.gguf")
