"""Read a Llama-architecture model and its tokenizer from a GGUF file, the format of llama.cpp.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file holds metadata (sizes,
vocabulary, merges, chat template) and tensors, most of them in small blocks of quantized numbers. A
Q4_1 block is 32 weights in 20 bytes: a scale d and a minimum m in float16, and 32 integers q of 4
bits, w = d q + m.

llama.cpp rotates neighbouring pairs (x_2i, x_2i+1) where this library, like the Llama of Hugging
Face, rotates (x_i, x_{i + head_dim/2}). Its files therefore keep the rows of W_q and W_k in another
order, undone here.
"""

from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from jaxtyping import Float, Shaped
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from fewer.models.llama import LlamaConfig

# GGUF's names of the parts of block i, and ours.
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFModel(NamedTuple):
    """Contents of a GGUF file; the weights are float32 and named as in `Llama.state_dict()`."""

    config: LlamaConfig
    weights: dict[str, Float[Tensor, "..."]]
    tokenizer: Tokenizer


def read_gguf(path: str | Path) -> GGUFModel:
    """Read a model of architecture "llama" with tied embeddings and SmolLM's tokenizer.

    Raises:
        ValueError: if the file is of another architecture or kind of tokenizer.
    """
    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }
    for key, value in expected.items():
        if meta.get(key) != value:
            raise ValueError(f"{path}: {key} must be {value!r}, got {meta.get(key)!r}")
    config = _config(meta)
    weights = {}
    for tensor in reader.tensors:
        name, weight = _name(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            weight = unpermute(weight, config.n_heads)
        if name.endswith("k_proj.weight"):
            weight = unpermute(weight, config.n_kv_heads)
        weights[name] = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32).copy())
    return GGUFModel(config, weights, _tokenizer(meta))


def unpermute(
    weight: Shaped[np.ndarray, "heads*head_dim d_in"], heads: int
) -> Shaped[np.ndarray, "heads*head_dim d_in"]:
    """Undo llama.cpp's order of rows: in each head, rows 0, 2, 4, ... first, then 1, 3, 5, ...

    Example:
        >>> unpermute(np.arange(8)[:, None], heads=2)[:, 0].tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _config(meta: dict[str, Any]) -> LlamaConfig:
    d_model, n_heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        d_model=d_model,
        d_ffn=meta["llama.feed_forward_length"],
        n_layers=meta["llama.block_count"],
        n_heads=n_heads,
        n_kv_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta.get("llama.rope.dimension_count", d_model // n_heads),
        rope_base=meta["llama.rope.freq_base"],
        norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        context_length=meta["llama.context_length"],
    )


def _name(name: str) -> str:
    if name == "token_embd.weight":
        return "embed_tokens.weight"
    if name == "output_norm.weight":
        return "norm.weight"
    _, layer, part, weight = name.split(".")
    return f"layers.{layer}.{_PARTS[part]}.{weight}"


def _tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Byte-pair encoding on bytes, with every digit a token of its own."""
    pieces = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    control = [p for p, kind in zip(pieces, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in control])
    return tokenizer
