"""Lecture 1 and 2: fewer bits. From the bits of one number to a whole model in 4 of them.

One tensor: `formats` (fp16 to fp4), `uniform` (scale and zero-point), `granularity` (groups),
`error`, `clipping`, `activations` (int8 matmul), `packing` (real bytes), `validate` (what all of
them refuse). A whole model: `model` (any scheme on all layers, and a report), `llm_int8`,
`smoothquant`, `hadamard`, `gptq`.
"""

from fewer.quantization.activations import calibrate_absmax, linear_w8a8, matmul_int8
from fewer.quantization.clipping import clip_by_entropy, clip_by_mse
from fewer.quantization.error import mse, relative_output_error, sqnr
from fewer.quantization.formats import (
    FORMATS,
    Minifloat,
    decode_minifloat,
    encode_minifloat,
    how_stored,
    require_format,
    round_to_minifloat,
)
from fewer.quantization.gptq import gptq_block, quantize_gptq, quantize_to_grid
from fewer.quantization.granularity import dequantize_per_group, quantize_per_group
from fewer.quantization.hadamard import (
    fwht,
    hadamard_factor,
    hadamard_matrix,
    hadamard_rotate,
    paley_matrix,
    random_signs,
    rotated,
)
from fewer.quantization.llm_int8 import matmul_llm_int8, outlier_features
from fewer.quantization.model import (
    ActivationStatistics,
    LayerReport,
    Scheme,
    activation_statistics,
    quantized_activations,
    quantized_weights,
    round_to_nearest,
)
from fewer.quantization.packing import (
    bits_per_weight,
    pack_codes,
    require_packable,
    stored_bytes,
    unpack_codes,
)
from fewer.quantization.smoothquant import (
    calibrate_smoothing,
    fold_scales,
    search_alpha,
    smoothed,
    smoothing_groups,
    smoothing_scales,
)
from fewer.quantization.uniform import dequantize, quantize_asymmetric, quantize_symmetric
from fewer.quantization.validate import (
    require_bits,
    require_clip,
    require_codes,
    require_finite,
    require_floating,
    require_int,
    require_int8_matrices,
    require_integer,
    require_matrix,
    require_row_scale,
    require_same_shape,
)

__all__ = [
    "FORMATS",
    "ActivationStatistics",
    "LayerReport",
    "Minifloat",
    "Scheme",
    "activation_statistics",
    "bits_per_weight",
    "calibrate_absmax",
    "calibrate_smoothing",
    "clip_by_entropy",
    "clip_by_mse",
    "decode_minifloat",
    "dequantize",
    "dequantize_per_group",
    "encode_minifloat",
    "fold_scales",
    "fwht",
    "gptq_block",
    "hadamard_factor",
    "hadamard_matrix",
    "hadamard_rotate",
    "how_stored",
    "linear_w8a8",
    "matmul_int8",
    "matmul_llm_int8",
    "mse",
    "outlier_features",
    "pack_codes",
    "paley_matrix",
    "quantize_asymmetric",
    "quantize_gptq",
    "quantize_per_group",
    "quantize_symmetric",
    "quantize_to_grid",
    "quantized_activations",
    "quantized_weights",
    "random_signs",
    "relative_output_error",
    "require_bits",
    "require_clip",
    "require_codes",
    "require_finite",
    "require_floating",
    "require_format",
    "require_int",
    "require_int8_matrices",
    "require_integer",
    "require_matrix",
    "require_packable",
    "require_row_scale",
    "require_same_shape",
    "rotated",
    "round_to_minifloat",
    "round_to_nearest",
    "search_alpha",
    "smoothed",
    "smoothing_groups",
    "smoothing_scales",
    "sqnr",
    "stored_bytes",
    "unpack_codes",
]
