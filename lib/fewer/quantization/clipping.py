"""Where to clip: a smaller threshold buys a finer step and pays with the values beyond it.

Two searches for the threshold alpha of symmetric quantization (`quantize_symmetric(x, bits,
clip=alpha)`):

- by mean squared error: Nagel et al. 2021 (arXiv 2106.08295), section 3.1,
  alpha* = argmin over alpha of  sum (x - x_hat(alpha))^2;
- by entropy: Migacz 2017, "8-bit inference with TensorRT" (GTC 2017),
  alpha* = argmin over alpha of  KL(P || Q) = sum P log(P / Q),
  where P is the histogram of |x| clipped at alpha and Q the same histogram after quantization.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.quantization.error import mse
from fewer.quantization.uniform import dequantize, quantize_symmetric
from fewer.quantization.validate import require_bits, require_finite, require_int


def clip_by_mse(x: Float[Tensor, "*shape"], bits: int, steps: int = 100) -> float:
    """The clipping threshold with the least mean squared error, found by trying `steps` of them.

    The candidates are alpha_k = max |x| * k / steps for k = 1, ..., steps; each is judged by the
    mean squared error between x and what comes back from symmetric quantization of the whole tensor
    clipped at alpha_k. Of equally good ones, the largest is taken.

    Args:
        x: any shape, any floating type, finite, not empty. It is not modified.
        bits: 2 to 8.
        steps: the number of candidates, at least 1. With 1 the answer is max |x|: no clipping.

    Returns:
        alpha, a float in the unit of x, in (0, max |x|]. An all-zero x gives 0.0 (which
        `quantize_symmetric` accepts).

    Raises:
        TypeError: x is not a floating-point tensor; bits or steps is not an int.
        ValueError: x is empty or holds NaN or infinity; bits or steps out of range.

    Example:
        >>> x = torch.tensor([-1.0, 1.0] * 50 + [4.0])
        >>> clip_by_mse(x, bits=2, steps=4)  # better to lose one 4.0 than a hundred 1.0
        1.0
    """
    absmax = require_finite(x, "x").abs().max().item()
    require_int(steps, "steps", 1)

    def error(alpha: float) -> float:
        return mse(x, dequantize(*quantize_symmetric(x, bits, clip=alpha)))

    return min((absmax * k / steps for k in range(steps, 0, -1)), key=error)


def clip_by_entropy(x: Float[Tensor, "*shape"], bits: int = 8, bins: int = 2048) -> float:
    """The clipping threshold whose quantized histogram loses the least information.

    This is TensorRT's calibration. The histogram of |x| has `bins` bins of equal width from 0 to
    max |x|. For each number of kept bins i, from 2^(bits-1) (one bin for each level) to `bins` (no
    clipping): P is the first i bins, with the mass of all the others folded into its last bin, as
    saturation does. Q merges the first i bins, *without* that mass, into 2^(bits-1) levels and
    spreads each level evenly over those of its bins that P has mass in. Both are normalized; the i
    with the least KL(P || Q) wins (the largest of equals), and alpha is the upper edge of the last
    kept bin.

    What the slides leave open, and what is done here:
    - i not divisible by the number of levels: bin j goes to level floor(j * levels / i), so that
      sizes differ by one at most;
    - Q zero where P is not, which happens only to the last level when it holds nothing but folded
      mass: the divergence would be infinite, and one far outlier would forbid every threshold but
      its own. Q is given 1e-4 there, the smoothing of MXNet's implementation;
    - the first bin: exact zeros (ReLU, padding) are exact at every threshold, and thousands of them
      would drown the rest, so they are not counted;
    - the slides stop before i = bins and return (i + 1/2) bin widths; here no clipping is a
      candidate as well and the answer is the edge, so that it never exceeds max |x|.

    Args:
        x: any shape, any floating type, finite, not empty; thousands of values, for the histogram
            to mean something.
        bits: 2 to 8.
        bins: at least 2^(bits-1).

    Returns:
        alpha, a float in the unit of x, in (0, max |x|]. An all-zero x gives 0.0.

    Raises:
        TypeError: x is not a floating-point tensor; bits or bins is not an int.
        ValueError: x is empty or holds NaN or infinity; bits or bins out of range.

    Example:
        >>> x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
        >>> x[0] = 100.0
        >>> clip_by_entropy(x)  # 128 of the 2048 bins: no smaller threshold is tried
        6.25
    """
    magnitude = require_finite(x, "x").abs().flatten()
    levels = 2 ** (require_bits(bits) - 1)
    require_int(bins, "bins", levels)
    absmax = magnitude.max().item()
    magnitude = magnitude[magnitude > 0].double()
    if absmax == 0:
        return 0.0
    bin_of = (magnitude / absmax * bins).long().clamp(max=bins - 1)
    histogram = torch.bincount(bin_of, minlength=bins).double().cpu()

    def divergence(i: int) -> float:
        kept = histogram[:i]
        p = kept.clone()
        p[-1] += histogram[i:].sum()
        used = p > 0
        level_of = torch.arange(i) * levels // i
        mass = torch.bincount(level_of, weights=kept, minlength=levels)
        width = torch.bincount(level_of, weights=used.double(), minlength=levels)
        q = torch.where(mass > 0, mass / kept.sum() / width, 1e-4)[level_of]
        p, q = p[used] / p.sum(), q[used] / q[used].sum()  # 0 log 0 = 0
        return (p * (p / q).log()).sum().item()

    return absmax * min(range(bins, levels - 1, -1), key=divergence) / bins
