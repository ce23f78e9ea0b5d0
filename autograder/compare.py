"""What a check says when the candidate's answer is not right.

Checks are ordinary Python: they call the candidate and raise `Mismatch` through the helpers here.
The helpers judge values strictly and types kindly: a NumPy array, a float64, or a 0-d tensor where
a number was expected is no mistake, a wrong value is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOM = 64  # how many times as large as the reference's an answer may be before a check looks at it


class Mismatch(AssertionError):
    """A property does not hold. ``got`` and ``expected`` are shown to the student where given."""

    def __init__(self, message: str, got: Any = None, expected: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.got = got
        self.expected = expected


class CandidateError(Exception):
    """The candidate raised an exception. Its kind crosses the process boundary as names only.

    Args:
        kinds: names of the exception's class and its parents, nearest first.
        message: what it said.
        trace: the lines of the student's own code that led there, innermost last.
    """

    def __init__(self, kinds: list[str], message: str, trace: str = "") -> None:
        super().__init__(f"{kinds[0]}: {message}" if message else kinds[0])
        self.kinds = kinds
        self.message = message
        self.trace = trace

    @classmethod
    def of(cls, error: BaseException, trace: str = "") -> CandidateError:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind is not object]
        return cls(kinds, str(error), trace)


class CandidateDied(Exception):
    """The process of the candidate is gone: it crashed, hung, or sent what nobody can read."""


def expect(condition: bool | Tensor, message: str, got: Any = None, expected: Any = None) -> None:
    """Fail with ``message`` unless ``condition`` holds (for a tensor: everywhere)."""
    if isinstance(condition, Tensor):
        condition = bool(condition.all())
    if not condition:
        raise Mismatch(message, got, expected)


def expect_shape(value: Tensor, shape: tuple[int, ...] | torch.Size, what: str) -> None:
    """Fail unless ``value`` has exactly ``shape``."""
    if tuple(value.shape) != tuple(shape):
        raise Mismatch(f"{what} has shape {tuple(value.shape)}, expected {tuple(shape)}")


def expect_close(
    got: Any, want: Any, what: str, rtol: float = 1e-5, atol: float = 1e-6, reveal: bool = False
) -> None:
    """Fail unless ``got`` equals ``want`` within ``atol + rtol * |want|``, in float64.

    NaN equals NaN.

    Args:
        reveal: show the expected value to the student; not where that gives the answer away.
    """
    a, b = as_double(got), as_double(want)
    expect_shape(a, b.shape, what)
    if not torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True):
        gap = (a - b).abs().nan_to_num(float("inf"), float("inf"), float("inf"))
        size = f"by up to {float(gap.max()):.3g}"
        wrong = int((gap > atol + rtol * b.abs().nan_to_num(0.0)).sum())
        where = f" in {wrong} of {a.numel()} places" if a.numel() > 1 else ""
        raise Mismatch(f"{what} is off {size}{where}", got, want if reveal else None)


def expect_equal(got: Any, want: Any, what: str, reveal: bool = False) -> None:
    """Fail unless ``got`` equals ``want`` exactly, whatever the number type; NaN equals NaN."""
    expect_close(got, want, what, rtol=0.0, atol=0.0, reveal=reveal)


def expect_integers(codes: Tensor, what: str, low: int, high: int) -> None:
    """Fail unless every element is a whole number between ``low`` and ``high`` (both included)."""
    values = as_double(codes)
    expect(torch.isfinite(values), f"{what} contain NaN or infinity", got=codes)
    expect(values == values.round(), f"{what} are not whole numbers", got=codes)
    expect(
        (values >= low) & (values <= high),
        f"{what} go from {values.min():.0f} to {values.max():.0f}, outside {low} ... {high}"
        if values.numel()
        else what,
        got=codes,
    )


def expect_error(candidate: Any, kind: type[Exception], *args: Any, **kwargs: Any) -> None:
    """Fail unless calling the candidate so raises ``kind`` (or a subclass of it)."""
    try:
        result = candidate(*args, **kwargs)
    except CandidateError as error:
        if kind.__name__ not in error.kinds:
            raise Mismatch(f"raised {error}, where a {kind.__name__} is expected") from None
    else:
        raise Mismatch(f"returned a value, where a {kind.__name__} is expected", got=result)


def as_double(value: Any) -> Tensor:
    """A float64 tensor of a tensor, array, number or nested list.

    >>> as_double([1, 2]).dtype
    torch.float64
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64)
    try:
        return torch.as_tensor(np.asarray(value, dtype=np.float64))
    except OverflowError:  # a whole number beyond the range of floats
        return torch.tensor(float("inf"), dtype=torch.float64)


def like(value: Any, model: Any, where: str = "the result") -> Any:
    """``value`` in the form of ``model`` (what the reference returned), kindly converted.

    Tuples, named ones too, and lists are the same, NumPy values become tensors or numbers, a number
    stands for a 0-d tensor and the reverse. Anything else is a `Mismatch` that says what was
    expected.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(model, Tensor):
        if isinstance(value, Tensor):
            # Shapes are a check's business, but checks broadcast: no product may fill the memory.
            if math.prod(max(size, 1) for size in value.shape) > ROOM * (model.numel() + 4):
                shapes = f"{tuple(value.shape)}, expected {tuple(model.shape)}"
                raise Mismatch(f"{where} has shape {shapes}")
            return value
        if isinstance(value, bool | int | float) and model.dim() == 0:
            return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    elif isinstance(model, bool | int | float):
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool | int | float):
            return value
    elif isinstance(model, str):
        if isinstance(value, str):
            return value
    elif model is None:
        if value is None:
            return None
    elif isinstance(model, tuple | list):
        if isinstance(value, tuple | list) and len(value) == len(model):
            parts = [
                like(v, m, f"part {i + 1} of {where}")
                for i, (v, m) in enumerate(zip(value, model, strict=True))
            ]
            return type(model)(*parts) if hasattr(model, "_fields") else type(model)(parts)
    elif isinstance(model, dict) and isinstance(value, dict) and value.keys() == model.keys():
        return {key: like(value[key], model[key], f"{where}[{key!r}]") for key in model}
    raise Mismatch(f"{where} is {describe(value)}, expected {describe(model)}")


def describe(value: Any) -> str:
    """The form of a value in words.

    >>> describe((torch.zeros(2), 1.0))
    'a tuple (a tensor, a number)'
    """
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, bool | int | float | np.generic):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} ({', '.join(map(describe, value))})"
    if isinstance(value, dict):
        return f"a dict with the keys {sorted(map(str, value))}"
    return f"an object of type {type(value).__name__}"
