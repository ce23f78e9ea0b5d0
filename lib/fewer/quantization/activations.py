"""Activations in 8 bits: where their scale comes from, and the integer matmul it makes possible.

Jacob et al. 2018 (arXiv 1712.05877), section 2.2, for integer arithmetic with one rescale; Wu et
al. 2020, "Integer quantization for deep learning inference" (arXiv 2004.09602), section 3, for
calibration; Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 3.1, for one scale a
token (row-wise X) and one an output channel of W.

    Y[t, o] = s_x[t] s_w[o]  sum_i  q_x[t, i] q_w[o, i]

The sum is of integers and exact. A scale can leave it because it does not depend on i: this is why
X has a scale a token or a tensor, W one an output channel or a tensor, and neither one an input
channel.

Static: alpha of X is measured once, on calibration data (`calibrate_absmax`). Dynamic: it is
measured on the X at hand, `quantize_symmetric(x)` per tensor or `quantize_symmetric(x, dim=-1)` per
token.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from fewer.quantization.uniform import quantize_symmetric
from fewer.quantization.validate import require_finite, require_int8_matrices, require_row_scale


def calibrate_absmax(batches: Iterable[Float[Tensor, "..."]], percentile: float = 100.0) -> float:
    """The static threshold alpha of an activation, from calibration data.

    alpha is the given percentile of |x| over all values of all batches: 100 is the maximum; 99.9
    lets the largest thousandth saturate. The percentile is the nearest rank: the smallest value
    such that at least that share of the values is no larger. Below 100 all values are held in
    memory at once, since a percentile of percentiles would be another number.

    Args:
        batches: activation tensors of any shapes, each finite and not empty; an iterator is used
            up.
        percentile: in (0, 100].

    Returns:
        alpha, a float in the unit of x, for `quantize_symmetric(x, clip=alpha)`; `linear_w8a8`
        wants x_scale = alpha / 127.

    Raises:
        TypeError: a batch is not a floating-point tensor.
        ValueError: no batches, a batch that is empty or holds NaN or infinity, percentile out of
            range.

    Example:
        >>> batches = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([[4.0, -100.0]])]
        >>> calibrate_absmax(batches), calibrate_absmax(batches, percentile=80)
        (100.0, 4.0)
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {percentile}")
    magnitudes = (require_finite(batch, "batch").abs().flatten() for batch in batches)
    if percentile == 100:
        magnitudes = (magnitude.max().reshape(1) for magnitude in magnitudes)
    collected = list(magnitudes)
    if not collected:
        raise ValueError("batches must hold at least one batch, got none")
    values = torch.cat(collected)
    # torch.quantile refuses more than 2^24 values; kthvalue does not.
    # Rounded, or 99.9% of 1000 values might be the 1000th: 99.9 / 100 * 1000 = 999.0000000000001.
    rank = max(1, math.ceil(round(percentile / 100 * values.numel(), 6)))
    return values.kthvalue(rank).values.item()


def matmul_int8(
    x_codes: Int8[Tensor, "tokens in"],
    x_scale: Float[Tensor, "*x_scale"],
    w_codes: Int8[Tensor, "out in"],
    w_scale: Float[Tensor, "*w_scale"],
) -> Float[Tensor, "tokens out"]:
    """Multiply quantized activations by quantized weights: integers inside, one rescale at the end.

        Y[t, o] = x_scale[t] * w_scale[o] * sum_i x_codes[t, i] * w_codes[o, i]

    The products and their sum are int32, and so exact: int8 would overflow at the first product,
    and float32 rounds once a sum passes 2^24. Only the finished sum is converted to floating point
    and multiplied, once, by the product of its two scales.

    Args:
        x_codes: [tokens, in], int8; in at most 131071, which keeps every sum below 2^31.
        x_scale: [tokens, 1] (one a token) or 0-d (one for the tensor), floating.
        w_codes: [out, in], int8, stored as a linear layer stores its weight.
        w_scale: [out, 1] (one an output channel) or 0-d, floating.

    Returns:
        [tokens, out], float32 (float64 where a scale is float64).

    Raises:
        TypeError: codes that are not int8, scales that are not floating.
        ValueError: shapes that do not fit; `in` too long; scales that are not finite.

    Example:
        >>> x_codes = torch.tensor([[100, 100], [1, -2]], dtype=torch.int8)
        >>> w_codes = torch.tensor([[100, 27]], dtype=torch.int8)
        >>> x_scale, w_scale = torch.tensor([[0.5], [2.0]]), torch.tensor([[0.25]])
        >>> matmul_int8(x_codes, x_scale, w_codes, w_scale).tolist()  # sums 12700 and 46
        [[1587.5], [23.0]]
    """
    require_int8_matrices(x_codes, w_codes)
    x_scale = require_row_scale(x_scale, x_codes, "x_scale")
    w_scale = require_row_scale(w_scale, w_codes, "w_scale")
    accumulator = x_codes.to(torch.int32) @ w_codes.to(torch.int32).T
    return accumulator * (x_scale * w_scale.T)


def linear_w8a8(
    x: Float[Tensor, "*tokens in"],
    w_codes: Int8[Tensor, "out in"],
    w_scale: Float[Tensor, "*w_scale"],
    x_scale: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "*tokens out"]:
    """A linear layer without bias: int8 weight, and an input quantized to int8 on the way in.

    Args:
        x: [..., in], any floating type, finite, not empty.
        w_codes, w_scale: the weight, [out, in], from `quantize_symmetric(w, dim=-1)` or
            `quantize_symmetric(w)`.
        x_scale: None: dynamic, one scale a token of this x. A 0-d tensor: static, alpha / 127 of
            `calibrate_absmax`; larger values saturate.

    Returns:
        [..., out], float32.

    Raises:
        TypeError, ValueError: as `quantize_symmetric` and `matmul_int8`.

    Example:
        >>> w_codes, w_scale = quantize_symmetric(torch.tensor([[1.0, -0.5]]), dim=-1)
        >>> y = linear_w8a8(torch.tensor([[1.0, 4.0], [0.1, 0.0]]), w_codes, w_scale)
        >>> [round(value, 3) for value in y.flatten().tolist()]  # -1 and 0.1 before quantization
        [-1.008, 0.1]
    """
    x = require_finite(x, "x")
    rows = x.reshape(-1, x.shape[-1])
    if x_scale is None:
        codes, x_scale = quantize_symmetric(rows, dim=-1)
    else:
        codes, x_scale = quantize_symmetric(rows, clip=x_scale * 127)
    return matmul_int8(codes, x_scale, w_codes, w_scale).reshape(*x.shape[:-1], -1)
