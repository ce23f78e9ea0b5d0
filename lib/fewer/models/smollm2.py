"""SmolLM2-135M-Instruct, the language model of the course, loaded from the local cache.

Allal et al., "SmolLM2: When Smol Goes Big", 2025, arXiv:2502.02737. 134.5 million parameters in 30
layers. The published file holds the matrices in 4 bits (GGUF Q4_1), so the float32 weights loaded
here are **already those of a 4-bit model**: each group of 32 weights takes at most 16 values.
"""

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from fewer.models.fetch import fetch_smollm2
from fewer.models.llama import Llama, LlamaConfig

_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class SmolLM2(NamedTuple):
    """The model and its tokenizer: `model, tokenizer = load_smollm2()`."""

    model: Llama
    tokenizer: Tokenizer


def load_smollm2(dtype: torch.dtype = torch.float32, progress: bool = True) -> SmolLM2:
    """Load the model and its tokenizer; the first call on a machine fetches them (93 MB).

    The parameters are frozen (`requires_grad` is False); whoever trains some of them says so.

    Args:
        dtype: type of the weights. float32 takes 538 MB of memory, bfloat16 half of it.
        progress: show a bar while fetching.

    Raises:
        ModelNotFetched: if the cache is empty and the model cannot be downloaded.
    """
    folder = fetch_smollm2(progress)
    config = LlamaConfig(**json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        model = Llama(config)
    model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    model = model.to(dtype).eval().requires_grad_(False)
    return SmolLM2(model, Tokenizer.from_file(str(folder / "tokenizer.json")))


def chat_prompt(messages: Iterable[Mapping[str, str]]) -> str:
    """Write a conversation as the Instruct model was taught to read it, up to its answer.

    The model ends its answer with the token <|im_end|>: pass its id as `stop` to `generate`.

    Args:
        messages: in order, each with a "role" (system, user or assistant) and a "content". The
            model's own system message comes first unless another is given.

    Example:
        >>> print(chat_prompt([{"role": "user", "content": "Hi"}]))
        <|im_start|>system
        You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
        <|im_start|>user
        Hi<|im_end|>
        <|im_start|>assistant
        <BLANKLINE>
    """
    messages = list(messages)
    if not messages or messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _SYSTEM})
    said = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(said) + "<|im_start|>assistant\n"
