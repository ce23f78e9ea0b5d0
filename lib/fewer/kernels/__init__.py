"""Lecture 11: fewer bytes moved. Kernels in Triton, each beside its reference in plain torch.

Weights: `w4a16`, `w8a16` and `nf4` (products with 4 and 8 bit weights; `split_k` for few rows).
Activations: `int8`, `fast_hadamard`. The cache: `flash_decode`, `decode_quantized`, `quantized_kv`.
A model on them: `packed_llama`, `generate`.
`simple` has eight kernels to begin with. `interpreter` and `trace` run them without a GPU, and see
what they touch; `launch` is what the launchers share.

On tensors that are not on a GPU, the functions here compute in plain torch, and say so once.
"""

import fewer.kernels.interpreter  # noqa: F401  (before triton: whether it is to interpret)
from fewer.kernels.decode_quantized import (
    decode_attention_quantized,
    decode_attention_quantized_reference,
)
from fewer.kernels.fast_hadamard import (
    hadamard,
    hadamard_quantize,
    hadamard_quantize_reference,
    hadamard_reference,
)
from fewer.kernels.flash_decode import decode_attention, decode_attention_reference
from fewer.kernels.generate import generate_graphed
from fewer.kernels.int8 import dequantize_int8, quantize_int8
from fewer.kernels.nf4 import WNF4, for_kernel, nf4_matmul, nf4_matmul_reference
from fewer.kernels.packed_llama import pack_model
from fewer.kernels.quantized_kv import QuantizedKV, dequantize_kv, quantize_kv
from fewer.kernels.w4a16 import (
    W4,
    dequantize_w4,
    pack_w4,
    quantize_w4,
    w4a16_matmul,
    w4a16_matmul_reference,
)
from fewer.kernels.w8a16 import (
    W8,
    dequantize_w8,
    pack_w8,
    quantize_w8,
    w8a16_matmul,
    w8a16_matmul_reference,
)

__all__ = [
    "W4",
    "W8",
    "WNF4",
    "QuantizedKV",
    "decode_attention",
    "decode_attention_quantized",
    "decode_attention_quantized_reference",
    "decode_attention_reference",
    "dequantize_int8",
    "dequantize_kv",
    "dequantize_w4",
    "dequantize_w8",
    "for_kernel",
    "generate_graphed",
    "hadamard",
    "hadamard_quantize",
    "hadamard_quantize_reference",
    "hadamard_reference",
    "nf4_matmul",
    "nf4_matmul_reference",
    "pack_model",
    "pack_w4",
    "pack_w8",
    "quantize_int8",
    "quantize_kv",
    "quantize_w4",
    "quantize_w8",
    "w4a16_matmul",
    "w4a16_matmul_reference",
    "w8a16_matmul",
    "w8a16_matmul_reference",
]
