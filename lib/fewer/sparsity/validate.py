"""What the pruning functions refuse, said once.

Each helper checks one argument, names it in its error, and returns it ready for use, so that a
method spends one line on it. Scores may be infinite (a score of -inf says "this one goes first"),
but never NaN: NaN has no place in an order, and a mask that swallowed one would hide a broken
model.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.validate import all_finite, require_floating, require_int


def require_scores(scores: Tensor, name: str = "scores") -> Float[Tensor, "*shape"]:
    """Return `scores` as `require_floating` does, if they can be put in an order.

    Raises:
        TypeError: `scores` is not a tensor, or not of a floating type.
        ValueError: `scores` hold NaN.

    Example:
        >>> require_scores(torch.tensor([1.0, float("nan")]))
        Traceback (most recent call last):
        ValueError: scores must not hold NaN, got 1 among its 2 values
    """
    scores = require_floating(scores, name)
    nan = int(scores.isnan().sum())
    if nan:
        raise ValueError(f"{name} must not hold NaN, got {nan} among its {scores.numel()} values")
    return scores


def require_layers(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `scores`, of one or more layers by name, each as `require_scores` returns it.

    Raises:
        TypeError: not a dict, or a layer's scores are not a tensor of a floating type.
        ValueError: no layer, or a layer's scores hold NaN.
    """
    if not isinstance(scores, dict):
        raise TypeError(f"scores must be a dict of tensors by name, got {type(scores).__name__}")
    if not scores:
        raise ValueError("scores must hold at least one layer, got none")
    return {name: require_scores(x, f"scores[{name!r}]") for name, x in scores.items()}


def require_finite(x: Tensor, name: str) -> Float[Tensor, "*shape"]:
    """Return `x` as `require_floating` does, if it holds neither NaN nor infinity.

    Raises:
        TypeError: `x` is not a tensor, or not of a floating type.
        ValueError: `x` holds NaN or infinity.
    """
    x = require_floating(x, name)
    if not all_finite(x):
        nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
        raise ValueError(
            f"{name} must be finite, got {nan} NaN and {inf} infinite among its {x.numel()} values"
        )
    return x


def require_dims(x: Tensor, dims: int, name: str) -> Tensor:
    """Return `x` if it has `dims` dimensions.

    Raises:
        TypeError: not a tensor.
        ValueError: another number of dimensions.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != dims:
        wanted = {1: "one dimension", 2: "two dimensions"}[dims]
        raise ValueError(f"{name} must have {wanted}, got shape {tuple(x.shape)}")
    return x


def require_pair(pair: tuple[int, int], name: str) -> tuple[int, int]:
    """Return `pair` if it holds two ints, each at least 1: rows and columns.

    Raises:
        TypeError: not a tuple or list of two, or one of them is not an int.
        ValueError: one of them is below 1.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (rows, columns), got {pair!r}")
    return require_int(pair[0], name, 1), require_int(pair[1], name, 1)


def require_number(value: float, name: str) -> float:
    """Return `value` if it is a finite int or float; TypeError or ValueError otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def require_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Return `sparsity` if it is a share of the weights, between 0 and 1.

    Example:
        >>> require_sparsity(50)
        Traceback (most recent call last):
        ValueError: sparsity must be between 0 and 1 (0.9 prunes 90%), got 50
    """
    if not 0 <= require_number(sparsity, name) <= 1:
        raise ValueError(f"{name} must be between 0 and 1 (0.9 prunes 90%), got {sparsity}")
    return sparsity


def require_mask(mask: Tensor, shape: torch.Size, name: str = "mask") -> Bool[Tensor, "*shape"]:
    """Return `mask` if it is a bool tensor of that shape.

    Raises:
        TypeError: not a bool tensor (a float mask of 0.0 and 1.0 is `mask != 0`).
        ValueError: another shape.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor (True = kept), got {got}")
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    return mask


def require_groups(size: int, m: int, name: str) -> int:
    """Return how many groups of `m` fill `size` exactly.

    Raises:
        ValueError: a remainder is left.

    Example:
        >>> require_groups(10, 4, "the last dimension of scores")
        Traceback (most recent call last):
        ValueError: the last dimension of scores must be a multiple of 4, got 10 (2 too many)
    """
    if size % m:
        raise ValueError(f"{name} must be a multiple of {m}, got {size} ({size % m} too many)")
    return size // m


def require_code_bits(bits: int) -> int:
    """Return `bits` if codes of that width fill a byte: 1, 2, 4 or 8; ValueError otherwise."""
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"bits must be 1, 2, 4 or 8, got {bits}")
    return bits


def require_codes(codes: Tensor, bits: int) -> Int[Tensor, "*rows n"]:
    """Return `codes` as int64 if they are rows of bool or whole numbers in [0, 2^bits - 1].

    Raises:
        TypeError: not a bool or integer tensor.
        ValueError: 0-d, or a code that does not fit.
    """
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes must be a torch.Tensor, got {type(codes).__name__}")
    if codes.is_floating_point() or codes.is_complex():
        raise TypeError(f"codes must be a bool or integer tensor, got {codes.dtype}")
    if codes.ndim == 0:
        raise ValueError("codes must have at least one dimension, got a 0-d tensor")
    codes = codes.to(torch.int64)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(
            f"codes must lie between 0 and {2**bits - 1}, "
            f"got {int(codes.min())} to {int(codes.max())}"
        )
    return codes
