"""What functions of every topic refuse, said once; each topic's own `validate` adds to it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def require_floating(x: Tensor, name: str) -> Float[Tensor, "*shape"]:
    """Return `x` without its gradient history, in the precision the library computes in.

    float64 stays float64; float32, float16, bfloat16 and float8 become float32, which holds all of
    them exactly.

    Raises:
        TypeError: `x` is not a tensor, or not of a floating type.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {x.dtype}; convert it with {name}.float()"
        )
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def all_finite(x: Tensor) -> bool:
    """Whether `x` holds neither NaN nor infinity.

    Example:
        >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([1.0, float("nan")]))
        (True, False)
    """
    # The terms of a finite sum are finite, and to add them up takes a fraction of the time.
    return math.isfinite(x.sum()) or bool(torch.isfinite(x).all())


def require_int(value: int, name: str, low: int, high: int | None = None) -> int:
    """Return `value` if it is an int in [low, high], both included; `high` None means no upper end.

    Raises:
        TypeError: not an int (a bool is not one either).
        ValueError: out of range.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value
