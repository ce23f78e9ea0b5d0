"""How much was lost: mean squared error, signal-to-noise ratio, error of a layer's output.

Bennett 1948, "Spectra of quantized signals" (Bell System Technical Journal 27), for the noise of a
uniform quantizer; Nagel et al. 2021 (arXiv 2106.08295), section 2.

    SQNR = 10 log10( sum x^2 / sum (x - x_hat)^2 )  in dB

A step s spreads the error evenly over [-s/2, s/2], so its mean square is s^2 / 12: each bit halves
s and is worth 20 log10 2 = 6.02 dB.
"""

import math

from jaxtyping import Float
from torch import Tensor

from fewer.quantization.validate import require_finite, require_matrix, require_same_shape


def mse(x: Float[Tensor, "*shape"], x_hat: Float[Tensor, "*shape"]) -> float:
    """Mean of (x - x_hat)^2, in the square of the unit of x, summed in float64.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes differ, or an argument is empty or holds NaN or infinity.

    Example:
        >>> import torch
        >>> mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        2.0
    """
    x, x_hat = require_finite(x, "x"), require_finite(x_hat, "x_hat")
    require_same_shape(x, x_hat, "x and x_hat")
    return (x.double() - x_hat.double()).square().mean().item()


def sqnr(x: Float[Tensor, "*shape"], x_hat: Float[Tensor, "*shape"]) -> float:
    """Signal-to-quantization-noise ratio in decibels: higher is better.

        SQNR = 10 log10( sum x^2 / sum (x - x_hat)^2 )

    The sums run over all elements, in float64: the squares of small float16 values would vanish in
    float16. For values spread evenly over the range, one bit more is worth about 6.02 dB.

    Args:
        x: the signal, any shape, any floating type, finite, not empty.
        x_hat: the same numbers after quantization, the same shape.

    Returns:
        A float in dB. `inf` where x_hat equals x everywhere (also for a signal of zeros); `-inf`
        where the signal is zero everywhere and x_hat is not.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes differ, or an argument is empty or holds NaN or infinity.

    Example:
        >>> import torch
        >>> round(sqnr(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -4.5])), 6)
        20.0
    """
    signal, restored = require_finite(x, "x").double(), require_finite(x_hat, "x_hat").double()
    require_same_shape(signal, restored, "x and x_hat")
    signal_power = signal.square().sum().item()
    noise_power = (signal - restored).square().sum().item()
    if noise_power == 0:
        return math.inf
    if signal_power == 0:
        return -math.inf
    return 10 * math.log10(signal_power / noise_power)


def relative_output_error(
    w: Float[Tensor, "out in"],
    w_hat: Float[Tensor, "out in"],
    x: Float[Tensor, "tokens in"],
) -> float:
    """What quantizing W does to the output of its layer: ||X W^T - X W_hat^T|| / ||X W^T||.

    The norms are Frobenius norms, in float64. 0 is no error, 1 is as large as the output itself.
    Where X W^T is zero it is 0 if the error is zero too, else `inf`.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: an argument is not a matrix, is empty, holds NaN or infinity, or the shapes do
            not fit.

    Example:
        >>> import torch
        >>> w = torch.tensor([[3.0, 4.0]])
        >>> relative_output_error(w, torch.tensor([[3.0, 0.0]]), torch.eye(2))
        0.8
    """
    w, w_hat, x = require_matrix(w, "w"), require_matrix(w_hat, "w_hat"), require_matrix(x, "x")
    require_same_shape(w, w_hat, "w and w_hat")
    if x.shape[1] != w.shape[1]:
        raise ValueError(
            f"x [tokens, in] and w [out, in] must agree on in, got {x.shape[1]} and {w.shape[1]}"
        )
    output = (x.double() @ w.double().T).norm().item()
    error = (x.double() @ (w.double() - w_hat.double()).T).norm().item()
    if output == 0:
        return 0.0 if error == 0 else math.inf
    return error / output
