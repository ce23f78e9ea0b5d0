"""The reference in other clothes: correct implementations that every check must accept."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


def costumes(reference: Function, memory: bool = False) -> dict[str, Function]:
    """The reference in other styles, by what they do; each is as right as the reference itself.

    Args:
        memory: tensors are memory to it, whose strides and types it is told: they stay as they are.
    """

    def style(function: Function) -> Function:
        return functools.wraps(reference)(function)

    @style
    def noisy(*args: Any, **kwargs: Any) -> Any:
        print("x =", args)
        print("almost there", file=sys.stderr)
        warnings.warn("this is a warning", stacklevel=2)
        if not memory:
            args, kwargs = _each(args, Tensor.contiguous), _each(kwargs, Tensor.contiguous)
        with torch.no_grad():
            return reference(*args, **kwargs)

    @style
    def numpy(*args: Any, **kwargs: Any) -> Any:
        result = _each(reference(*args, **kwargs), _to_numpy)
        return list(result) if isinstance(result, tuple) else result

    @style
    def double(*args: Any, **kwargs: Any) -> Any:
        model = result = reference(*args, **kwargs)
        if not memory:
            result = reference(*_each(args, _to_double), **_each(kwargs, _to_double))
        return _each(result, _like, model)

    return {
        "the reference itself": reference,
        "prints, warns on stderr, copies its arguments": noisy,
        "returns NumPy arrays, and lists for tuples": numpy,
        f"{'' if memory else 'computes in float64, '}returns tensors with gaps in memory": double,
    }


def _each(value: Any, change: Callable[..., Any], *models: Any) -> Any:
    """The same data with every tensor changed (with its counterpart in ``models`` in hand)."""
    if isinstance(value, Tensor):
        return change(value, *models)
    if isinstance(value, tuple | list):
        parts = zip(value, *models, strict=True)
        changed = [_each(v, change, *m) for v, *m in parts]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if isinstance(value, dict):
        return {k: _each(v, change, *(model[k] for model in models)) for k, v in value.items()}
    return value


def _to_numpy(x: Tensor) -> Any:
    return x if x.dtype == torch.bfloat16 else x.detach().numpy()


def _to_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _like(x: Tensor, model: Tensor) -> Tensor:
    """The same values in the model's type, in a tensor that is not contiguous."""
    return x.to(model.dtype).unsqueeze(-1).repeat_interleave(2, dim=-1)[..., 0]
