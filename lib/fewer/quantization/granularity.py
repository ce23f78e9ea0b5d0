"""One scale for every g consecutive weights of a row: quantization per group.

Shen et al. 2020, "Q-BERT" (arXiv 1909.05840), section 3.2, quantizes per group; Frantar et al.
2023, "GPTQ" (arXiv 2210.17323), section 4, made consecutive weights of a row the usual group. Row i
of W [out, in], group j:

    W[i, j g : (j+1) g]  is close to  scale[i, j] * (codes[i, j g : (j+1) g] - zero_point[i, j])

An outlier then spoils the step of its own g weights, and the price is one scale for g weights: 16 /
g bits a weight. Per tensor and per channel are `quantize_symmetric` and `quantize_asymmetric` with
dim=None and dim=-1.
"""

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from fewer.quantization.uniform import dequantize, quantize_asymmetric, quantize_symmetric
from fewer.quantization.validate import require_int, require_matrix


def quantize_per_group(
    w: Float[Tensor, "out in"],
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
) -> tuple[Int[Tensor, "out in"], Float[Tensor, "out groups"], Int32[Tensor, "out groups"] | None]:
    """Quantize each run of `group_size` consecutive weights of a row with a scale of its own.

    Row i is cut into groups along its last dimension: columns 0..g-1, g..2g-1, and so on. Each
    group is quantized as `quantize_symmetric` or `quantize_asymmetric` quantizes one slice. Where g
    does not divide `in`, the last group is simply shorter, with a scale from its own weights alone;
    a g larger than `in` gives one group a row.

    Args:
        w: [out, in], any floating type, finite, not empty. It is not modified.
        bits: 2 to 8.
        group_size: g, at least 1, in weights.
        symmetric: restricted symmetric codes, or asymmetric codes with zero-points.

    Returns:
        codes: [out, in], int8 if symmetric, else uint8.
        scale: [out, groups] with groups = ceil(in / g), float32 (float64 for a float64 w).
        zero_point: [out, groups], int32; None if symmetric.
        An all-zero group gets scale 1 and codes 0.

    Raises:
        TypeError: w is not a floating-point tensor; bits or group_size is not an int.
        ValueError: w is not a matrix, is empty, or holds NaN or infinity; bits or group_size out of
            range.

    Example:
        >>> w = torch.tensor([[1.0, -7.0, 0.5, 3.5, 70.0]])
        >>> codes, scale, zero_point = quantize_per_group(w, bits=4, group_size=2)
        >>> codes.tolist(), scale.tolist(), zero_point
        ([[1, -7, 1, 7, 7]], [[1.0, 0.5, 10.0]], None)
    """
    w = require_matrix(w, "w")
    require_int(group_size, "group_size", 1)
    quantize = quantize_symmetric if symmetric else quantize_asymmetric
    groups = [quantize(group, bits, dim=-1) for group in w.split(group_size, dim=-1)]
    codes, scale, *zero_point = (torch.cat(parts, dim=-1) for parts in zip(*groups, strict=True))
    return codes, scale, zero_point[0] if zero_point else None


def dequantize_per_group(
    codes: Int[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero_point: Int[Tensor, "out groups"] | None = None,
    group_size: int = 64,
) -> Float[Tensor, "out in"]:
    """The inverse of `quantize_per_group`: every weight with the scale and zero-point of its group.

    Args:
        codes: [out, in], integers.
        scale: [out, groups], groups = ceil(in / group_size).
        zero_point: [out, groups], or None for symmetric codes.
        group_size: the g it was quantized with, in weights.

    Returns:
        [out, in], float32, or float64 where scale is float64.

    Raises:
        ValueError: scale or zero_point is not [out, ceil(in / group_size)].

    Example:
        >>> codes, scale = torch.tensor([[1, -7, 1, 7, 7]]), torch.tensor([[1.0, 0.5, 10.0]])
        >>> dequantize_per_group(codes, scale, group_size=2).tolist()
        [[1.0, -7.0, 0.5, 3.5, 70.0]]
    """
    require_int(group_size, "group_size", 1)
    rows, columns = codes.shape
    shape = (rows, -(-columns // group_size))
    for name, parameter in (("scale", scale), ("zero_point", zero_point)):
        if parameter is not None and tuple(parameter.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} for groups of {group_size}, "
                f"got {tuple(parameter.shape)}"
            )

    def per_weight(parameter: Tensor) -> Tensor:
        return parameter.repeat_interleave(group_size, dim=-1)[:, :columns]

    return dequantize(
        codes, per_weight(scale), None if zero_point is None else per_weight(zero_point)
    )
