"""The language model of the course: fetch it, load it, generate with it, replace its weights.

    model, tokenizer = load_smollm2()
    prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
    tokenizer.decode(generate(model, prompt, max_new_tokens=10)[0].tolist())

`tiny_llama()` is a random model of the same architecture, small enough for tests and first tries.
"""

from fewer.models.calibration import compressed_sequentially
from fewer.models.fetch import ModelNotFetched, cache_home, fetch_smollm2
from fewer.models.hessian import input_hessian, inverse_cholesky, output_error
from fewer.models.hooks import linear_inputs, replaced_inputs, replaced_products
from fewer.models.linears import linear_layers, replaced_weights
from fewer.models.llama import KVCache, Llama, LlamaConfig, generate, stream, tiny_llama
from fewer.models.smollm2 import SmolLM2, chat_prompt, load_smollm2

__all__ = [
    "KVCache",
    "Llama",
    "LlamaConfig",
    "ModelNotFetched",
    "SmolLM2",
    "cache_home",
    "chat_prompt",
    "compressed_sequentially",
    "fetch_smollm2",
    "generate",
    "input_hessian",
    "inverse_cholesky",
    "linear_inputs",
    "linear_layers",
    "load_smollm2",
    "output_error",
    "replaced_inputs",
    "replaced_products",
    "replaced_weights",
    "stream",
    "tiny_llama",
]
