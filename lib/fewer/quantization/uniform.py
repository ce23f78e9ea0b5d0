"""Uniform (affine) quantization: a tensor as small integers, a scale and perhaps a zero-point.

Jacob et al. 2018, "Quantization and training of neural networks for efficient
integer-arithmetic-only inference" (arXiv 1712.05877), equation 1; Krishnamoorthi 2018 (arXiv
1806.08342), section 2; Nagel et al. 2021 (arXiv 2106.08295), section 2.2.

    r = S (q - Z)

r is the real number (`x`), q the stored code (`codes`), S the step between two neighbouring codes
(`scale`, in the unit of x), Z the code that stands for r = 0 (`zero_point`; symmetric quantization
fixes it at 0). The papers leave the rounding of ties open; here, as in torch, a tie goes to the
even code.

Precision: float16 and bfloat16 are computed in float32, float64 in float64, and the scale has the
type of the computation. Codes and scales carry no gradient: rounding has none that is of use
(quantization-aware training puts one there).
"""

import torch
from jaxtyping import Float, Int, Int8, Int32, UInt8
from torch import Tensor

from fewer.quantization.validate import require_bits, require_clip, require_finite, require_integer


def quantize_symmetric(
    x: Float[Tensor, "*shape"],
    bits: int = 8,
    dim: int | None = None,
    clip: Tensor | float | None = None,
) -> tuple[Int8[Tensor, "*shape"], Float[Tensor, "*scale"]]:
    """Quantize around zero: x is close to scale * codes.

    With the largest code Q = 2^(bits-1) - 1 and the threshold alpha = max |x|:

        scale = alpha / Q,    codes = round(clamp(x, -alpha, alpha) / scale)

    The range is *restricted*: codes lie in [-Q, Q], and -2^(bits-1) is not used, so that x and -x
    get opposite codes and zero is exact. round takes ties to the even code (as `torch.round`).

    Args:
        x: any shape, any floating type, finite, not empty. It is not modified.
        bits: 2 to 8. Q is 1 for 2 bits, 7 for 4, 127 for 8.
        dim: None gives the whole tensor one scale (0-d). `dim=d` gives one to each slice along d:
            the maximum is taken along d, and the scale keeps that dimension with size 1. dim=-1
            means one scale per output channel for W [out, in] (scale [out, 1]), and one per token
            for X [tokens, features].
        clip: a threshold alpha >= 0 to use in place of max |x|: a number, or a tensor that
            broadcasts to the scale. Values beyond it saturate at -Q or Q.

    Returns:
        codes: int8, the shape of x, in [-Q, Q].
        scale: float32 (float64 for a float64 x), in the unit of x, always positive. An all-zero
            slice (or one so small that its scale would be subnormal), or clip = 0, gets scale 1 and
            codes 0.

    Raises:
        TypeError: x is not a floating-point tensor, or bits is not an int.
        ValueError: x is empty or holds NaN or infinity; bits out of range; clip negative, not
            finite or of a wrong shape.
        IndexError: x has no dimension `dim`.

    Example:
        >>> codes, scale = quantize_symmetric(torch.tensor([-1.0, 0.0, 0.4, 3.5]), bits=4)
        >>> codes.tolist(), scale.item()
        ([-2, 0, 1, 7], 0.5)
    """
    x = require_finite(x, "x")
    largest = 2 ** (require_bits(bits) - 1) - 1
    absmax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    alpha = absmax if clip is None else require_clip(clip, like=absmax)
    scale = alpha / largest
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)  # a slice of zeros
    codes = torch.round(x.clamp(-alpha, alpha) / scale)
    return codes.to(torch.int8), scale


def quantize_asymmetric(
    x: Float[Tensor, "*shape"],
    bits: int = 8,
    dim: int | None = None,
) -> tuple[UInt8[Tensor, "*shape"], Float[Tensor, "*scale"], Int32[Tensor, "*scale"]]:
    """Quantize a range that need not be centred: x is close to scale * (codes - zero_point).

    With the largest code Q = 2^bits - 1 and the range of x *widened to contain 0*,
    lo = min(min x, 0) and hi = max(max x, 0):

        scale = (hi - lo) / Q
        zero_point = clamp(round(-lo / scale), 0, Q)
        codes = clamp(round(x / scale) + zero_point, 0, Q)

    The zero-point is an integer, so x = 0 comes back as exactly 0: padding, ReLU and pruned weights
    stay what they are. round takes ties to the even integer (as `torch.round`).

    Args:
        x: any shape, any floating type, finite, not empty. It is not modified.
        bits: 2 to 8. Q is 3 for 2 bits, 15 for 4, 255 for 8.
        dim: None gives the whole tensor one scale and one zero-point (0-d). `dim=d` gives them to
            each slice along d: the minimum and maximum are taken along d, and scale and zero_point
            keep that dimension with size 1.

    Returns:
        codes: uint8, the shape of x, in [0, Q].
        scale: float32 (float64 for a float64 x), in the unit of x, always positive.
        zero_point: int32, the shape of scale, in [0, Q].
        An all-zero slice (or one so small that its scale would be subnormal) gets scale 1,
        zero-point 0 and codes 0. A constant slice c > 0 gets zero-point 0 and codes Q; c < 0 gets
        zero-point Q and codes 0: both come back as c, up to the rounding of scale.

    Raises:
        TypeError: x is not a floating-point tensor, or bits is not an int.
        ValueError: x is empty or holds NaN or infinity; bits out of range; hi - lo overflows.
        IndexError: x has no dimension `dim`.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 0.6, 6.5])
        >>> codes, scale, zero_point = quantize_asymmetric(x, bits=4)
        >>> codes.tolist(), scale.item(), zero_point.item()
        ([0, 2, 3, 15], 0.5, 2)
    """
    x = require_finite(x, "x")
    largest = 2 ** require_bits(bits) - 1
    low, high = torch.aminmax(x, dim=dim, keepdim=dim is not None)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = require_finite(high - low, "the range of x") / largest
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)  # a slice of zeros
    zero_point = torch.round(-low / scale).clamp(0, largest)
    codes = (torch.round(x / scale) + zero_point).clamp(0, largest)
    return codes.to(torch.uint8), scale, zero_point.to(torch.int32)


def dequantize(
    codes: Int[Tensor, "*shape"],
    scale: Float[Tensor, "*scale"],
    zero_point: Int[Tensor, "*scale"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Real numbers from codes: r = S (q - Z), with Z = 0 where zero_point is None.

    Args:
        codes: integers of any width, below 2^24 in size, any shape (empty gives empty).
        scale: of any floating type, broadcast against codes. A gradient flows into it if it wants
            one.
        zero_point: integers, broadcast against codes.

    Returns:
        float32, or float64 where scale is float64; the shape of codes.

    Raises:
        TypeError: codes or zero_point is not an integer tensor, scale is not a floating-point one.

    Example:
        >>> dequantize(torch.tensor([-2, 0, 7]), torch.tensor(0.5)).tolist()
        [-1.0, 0.0, 3.5]
    """
    if not scale.is_floating_point():
        raise TypeError(f"scale must be a floating-point tensor, got {scale.dtype}")
    dtype = torch.float64 if scale.dtype == torch.float64 else torch.float32
    # Converted first: uint8 codes minus a zero-point would wrap around below 0.
    shifted = require_integer(codes, "codes").to(dtype)
    if zero_point is not None:
        shifted = shifted - require_integer(zero_point, "zero_point").to(dtype)
    return shifted * scale.to(dtype)
