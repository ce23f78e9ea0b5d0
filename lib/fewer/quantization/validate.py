"""What the quantizers refuse, said once.

Each helper checks one argument, names it in its error, and returns it ready for use, so that a
method spends one line on it. A model has been known to hold a NaN; a quantizer that maps it
silently to code 0 hides the fault for good.
"""

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from fewer.validate import all_finite, require_floating, require_int


def require_finite(x: Tensor, name: str) -> Float[Tensor, "*shape"]:
    """Return `x` as `require_floating` does, after a look at every value.

    Raises:
        TypeError: `x` is not a tensor, or not of a floating type.
        ValueError: `x` has no elements, or holds NaN or infinity.

    Example:
        >>> require_finite(torch.tensor([1.0, float("nan")]), "w")
        Traceback (most recent call last):
        ValueError: w must be finite, got 1 NaN and 0 infinite among its 2 values
    """
    x = require_floating(x, name)
    if x.numel() == 0:
        raise ValueError(f"{name} must have at least one element, got shape {tuple(x.shape)}")
    if not all_finite(x):
        nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
        raise ValueError(
            f"{name} must be finite, got {nan} NaN and {inf} infinite among its {x.numel()} values"
        )
    return x


def require_bits(bits: int) -> int:
    """Return `bits` if it is a width the uniform quantizers and the packer know: 2 to 8.

    Example:
        >>> require_bits(9)
        Traceback (most recent call last):
        ValueError: bits must be between 2 and 8, got 9
    """
    return require_int(bits, "bits", 2, 8)


def require_integer(codes: Tensor, name: str) -> Int[Tensor, "*shape"]:
    """Return `codes` if its type is an integer one (bool is not); TypeError otherwise."""
    if not isinstance(codes, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(codes).__name__}")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {codes.dtype}")
    return codes


def require_codes(codes: Tensor, low: int, high: int, name: str = "codes") -> Int[Tensor, "*shape"]:
    """Return integer `codes` as int64 if all lie in [low, high]. No elements at all is fine.

    Raises:
        TypeError: not a tensor of an integer type.
        ValueError: a code out of range.
    """
    codes = require_integer(codes, name).to(torch.int64)
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(
            f"{name} must lie between {low} and {high}, "
            f"got {int(codes.min())} to {int(codes.max())}"
        )
    return codes


def require_matrix(w: Tensor, name: str) -> Float[Tensor, "rows columns"]:
    """Return `w` as `require_finite` does if it has two dimensions; ValueError otherwise."""
    w = require_finite(w, name)
    if w.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(w.shape)}")
    return w


def require_same_shape(x: Tensor, other: Tensor, names: str) -> None:
    """Raise ValueError where two tensors that are compared value by value differ in shape."""
    if x.shape != other.shape:
        raise ValueError(
            f"{names} must have the same shape, got {tuple(x.shape)} and {tuple(other.shape)}"
        )


def require_clip(clip: Tensor | float, like: Float[Tensor, "*scale"]) -> Float[Tensor, "*scale"]:
    """Return the threshold `clip` with the dtype and shape of `like`, one value a slice.

    Raises:
        ValueError: negative, NaN or infinite, or of a shape that does not broadcast to that of
            `like`.
    """
    alpha = torch.as_tensor(clip, device=like.device).detach().to(like.dtype)
    if alpha.numel() == 0 or not all_finite(alpha) or (alpha < 0).any():
        raise ValueError(f"clip must be finite and not negative, got {clip}")
    try:
        return alpha.expand_as(like)
    except RuntimeError as error:
        raise ValueError(
            f"clip must broadcast to {tuple(like.shape)}, got {tuple(alpha.shape)}"
        ) from error


def require_int8_matrices(
    x_codes: Int8[Tensor, "tokens in"], w_codes: Int8[Tensor, "out in"]
) -> None:
    """Raise unless X and W are int8 matrices with the same `in`, short enough for an int32 sum.

    The largest product of two int8 is (-128)(-128) = 2^14; 2^17 - 1 of them stay below 2^31.

    Raises:
        TypeError: another dtype.
        ValueError: not two dimensions, no elements, `in` differs, or `in` above 131071.
    """
    for name, codes in (("x_codes", x_codes), ("w_codes", w_codes)):
        if not isinstance(codes, Tensor) or codes.dtype != torch.int8:
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"{name} must be an int8 tensor, got {got}")
        if codes.ndim != 2 or codes.numel() == 0:
            raise ValueError(
                f"{name} must be a matrix with elements, got shape {tuple(codes.shape)}"
            )
    if x_codes.shape[1] != w_codes.shape[1]:
        raise ValueError(
            "x_codes [tokens, in] and w_codes [out, in] must agree on in, "
            f"got {x_codes.shape[1]} and {w_codes.shape[1]}"
        )
    require_int(x_codes.shape[1], "in", 1, 2**17 - 1)


def require_row_scale(
    scale: Float[Tensor, "*scale"], codes: Tensor, name: str
) -> Float[Tensor, "rows 1"]:
    """Return a scale as a column: [rows, 1] for one a row of `codes`, [1, 1] for one in all.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: neither 0-d nor [rows, 1], or not finite.
    """
    scale = require_finite(scale, name)
    if scale.ndim and tuple(scale.shape) != (codes.shape[0], 1):
        raise ValueError(
            f"{name} must be 0-d or of shape {(codes.shape[0], 1)}, got {tuple(scale.shape)}"
        )
    return scale.reshape(-1, 1)
