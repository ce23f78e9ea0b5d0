"""Hypothesis strategies for tensors, written once for every topic.

They draw a *seed, a shape and a kind* rather than a list of floats: that is quick, shrinks to small
readable tensors, and reaches the corners where implementations differ: signs, zeros, ties,
outliers, size-1 dimensions, non-contiguous memory, half precision. Values are rounded to a few
digits, so that a counter-example can be read and typed in again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

# From the plainest to the meanest: Hypothesis shrinks towards the first.
KINDS = (
    "whole",  # small whole numbers of both signs: ties and zeros abound
    "normal",
    "positive",
    "negative",
    "ties",  # multiples of one half: every rounding rule shows
    "sparse",  # mostly zeros
    "outlier",  # one element a hundred times the others
    "tiny",  # around 1e-3
    "large",  # around 1e+3
    "constant",
    "zeros",
)
LAYOUTS = ("contiguous", "transposed", "strided")


def values(kind: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """A float64 array of the given kind: the same for a seed on every machine.

    >>> values("whole", (3,), seed=0).shape
    (3,)
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    normal = rng.standard_normal(shape)
    if kind == "whole":
        x = rng.integers(-8, 9, size=shape).astype(float)
    elif kind == "normal":
        x = normal
    elif kind == "positive":
        x = np.abs(normal) + 0.1
    elif kind == "negative":
        x = -np.abs(normal) - 0.1
    elif kind == "ties":
        x = rng.integers(-16, 17, size=shape) / 2
    elif kind == "sparse":
        x = normal * (rng.random(shape) < 0.3)
    elif kind == "outlier":
        x = normal.copy()
        if x.size:
            x.flat[rng.integers(x.size)] *= 100
    elif kind == "tiny":
        x = normal * 1e-3
    elif kind == "large":
        x = normal * 1e3
    elif kind == "constant":
        x = np.full(shape, rng.integers(-4, 5) or 1.0)
    elif kind == "zeros":
        x = np.zeros(shape)
    else:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return np.asarray(x).round(6 if kind == "tiny" else 3)


def arrange(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; contiguous where the shape allows no other."""
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided" and x.dim() >= 1:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 99, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def shapes(
    min_dims: int = 1, max_dims: int = 2, max_side: int = 8
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes without empty dimensions; sides of 1 included."""
    return st.lists(st.integers(1, max_side), min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | tuple[int, ...] | None = None,
    kinds: Sequence[str] = KINDS,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    layouts: Sequence[str] = LAYOUTS,
) -> Tensor:
    """Float tensors of every kind, layout and (where asked) precision.

    Args:
        shape: a shape, or a strategy of shapes (default: one or two dimensions of 1 to 8).
        kinds: which of `KINDS` to draw from.
        dtypes: element types; the default is float32 alone.
        layouts: which of `LAYOUTS` to draw from.
    """
    if shape is None:
        shape = shapes()
    if isinstance(shape, st.SearchStrategy):
        shape = draw(shape)
    kind = draw(st.sampled_from(kinds))
    dtype = draw(st.sampled_from(dtypes))
    layout = draw(st.sampled_from(layouts))
    seed = draw(st.integers(0, 2**16 - 1))
    return arrange(torch.from_numpy(values(kind, shape, seed)).to(dtype), layout)


@st.composite
def integer_tensors(
    draw: st.DrawFn,
    low: int,
    high: int,
    shape: st.SearchStrategy[tuple[int, ...]] | tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.int8,
    layouts: Sequence[str] = LAYOUTS,
) -> Tensor:
    """Tensors of whole numbers from ``low`` to ``high``, both included and often reached."""
    if shape is None:
        shape = shapes()
    if isinstance(shape, st.SearchStrategy):
        shape = draw(shape)
    layout = draw(st.sampled_from(layouts))
    edges = draw(st.booleans())
    rng = np.random.Generator(np.random.PCG64(draw(st.integers(0, 2**16 - 1))))
    x = rng.integers(low, high + 1, size=shape)
    if edges:
        x = np.where(rng.random(shape) < 0.4, rng.choice([low, high], size=shape), x)
    return arrange(torch.from_numpy(np.asarray(x)).to(dtype), layout)


def given(**options: Any) -> dict[str, Any]:
    """The options that were drawn; those that are None are left to the function's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def nonzero(*args: Any, **kwargs: Any) -> st.SearchStrategy[Tensor]:
    """`tensors` that are not zero everywhere."""
    return tensors(*args, **kwargs).filter(lambda x: bool(x.any()))
