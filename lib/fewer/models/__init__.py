"""The models of the course: fetch them, load them, generate, classify, replace their weights.

    model, tokenizer = load_smollm2()
    prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
    tokenizer.decode(generate(model, prompt, max_new_tokens=10)[0].tolist())

    encoder, tokenizer = load_minilm()
    classify = Classifier(encoder, nn.Linear(encoder.config.d_model, classes))

`tiny_llama()` and `tiny_bert()` are random models of the same architectures, small enough for tests
and first tries.
"""

from fewer.models.calibration import compressed_sequentially
from fewer.models.classifier import Classifier
from fewer.models.fetch import ModelNotFetched, cache_home, fetch_minilm, fetch_smollm2
from fewer.models.hessian import input_hessian, inverse_cholesky, output_error
from fewer.models.hooks import linear_inputs, replaced_inputs, replaced_products
from fewer.models.linears import linear_layers, replaced_weights
from fewer.models.llama import (
    KVCache,
    Llama,
    LlamaConfig,
    generate,
    stream,
    tiny_llama,
    token_probabilities,
)
from fewer.models.minilm import Bert, BertConfig, MiniLM, load_minilm, tiny_bert
from fewer.models.smollm2 import SmolLM2, chat_prompt, load_smollm2

__all__ = [
    "Bert",
    "BertConfig",
    "Classifier",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "MiniLM",
    "ModelNotFetched",
    "SmolLM2",
    "cache_home",
    "chat_prompt",
    "compressed_sequentially",
    "fetch_minilm",
    "fetch_smollm2",
    "generate",
    "input_hessian",
    "inverse_cholesky",
    "linear_inputs",
    "linear_layers",
    "load_minilm",
    "load_smollm2",
    "output_error",
    "replaced_inputs",
    "replaced_products",
    "replaced_weights",
    "stream",
    "tiny_bert",
    "tiny_llama",
    "token_probabilities",
]
