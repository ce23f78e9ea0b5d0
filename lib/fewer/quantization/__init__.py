"""Lecture 1: fewer bits. Quantization of one tensor, from number formats to packed bytes.

`formats` (fp16 to fp4), `uniform` (scale and zero-point), `granularity` (groups), `error`,
`clipping`, `activations` (int8 matmul), `packing` (real bytes), `validate` (what all of them
refuse).
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
from fewer.quantization.granularity import dequantize_per_group, quantize_per_group
from fewer.quantization.packing import (
    bits_per_weight,
    pack_codes,
    require_packable,
    stored_bytes,
    unpack_codes,
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
    "Minifloat",
    "bits_per_weight",
    "calibrate_absmax",
    "clip_by_entropy",
    "clip_by_mse",
    "decode_minifloat",
    "dequantize",
    "dequantize_per_group",
    "encode_minifloat",
    "how_stored",
    "linear_w8a8",
    "matmul_int8",
    "mse",
    "pack_codes",
    "quantize_asymmetric",
    "quantize_per_group",
    "quantize_symmetric",
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
    "round_to_minifloat",
    "sqnr",
    "stored_bytes",
    "unpack_codes",
]
