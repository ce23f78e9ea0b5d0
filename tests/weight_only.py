"""What the tests of products with quantized weights share: how a kernel is launched and watched."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fewer.kernels.interpreter import Trace, interpreted, watched
from fewer.kernels.split_k import scratch

SMALL = {"BLOCK_M": 8, "BLOCK_N": 64, "TILE": 128, "num_warps": 4, "num_stages": 3}


def launch(
    kernel: Callable[..., None],
    x: Tensor,
    weights: Any,
    n: int,
    settings: dict[str, int],
    tables: dict[str, Tensor] | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Trace | None]:
    """y and what was touched, with poison wherever the kernel must write, and guards around all."""
    m = x.shape[0]
    out = torch.full((m, n), float("nan"), dtype=x.dtype, device=x.device)
    partial, counter = scratch(m, n, settings, x.device)
    if settings["SPLIT"] > 1:
        partial.fill_(float("nan"))
    named = {name: t for name, t in weights._asdict().items() if isinstance(t, Tensor)}
    named |= {"x": x, "out": out, "partial": partial, "counter": counter, **(tables or {})}
    with ExitStack() as stack:
        trace = stack.enter_context(watched(named, seed)) if interpreted() else None
        kernel(x, weights, out, partial, counter, settings)
    if settings["SPLIT"] > 1:
        assert not counter.any(), "the last program must set its counter back"
    return out, trace


def excess(y: Tensor, x: Tensor, w: Tensor) -> float:
    """The largest error of y = x w^T, as a part of what is allowed: above 1 is too much.

    Allowed is one rounding of the result, and 2^-18 of sum |x| |w|, as sums in float32 may be off.
    """
    x, w = x.double(), w.double()
    wanted = x @ w.T
    allowed = 2.0**-18 * (x.abs() @ w.abs().T)
    allowed += torch.finfo(y.dtype).eps * wanted.abs() + torch.finfo(y.dtype).tiny
    return float(((y.double() - wanted).abs() / allowed).max())
