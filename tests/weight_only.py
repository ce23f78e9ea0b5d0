"""What the tests of products with quantized weights share: how a kernel is launched and watched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from launched import launched
from torch import Tensor

from fewer.kernels import nf4, w4a16
from fewer.kernels.interpreter import Trace
from fewer.kernels.split_k import scratch

SMALL = {"BLOCK_M": 8, "BLOCK_N": 64, "TILE": 128, "num_warps": 4, "num_stages": 3}


def launch(
    launcher: Callable[..., None],
    x: Tensor,
    weights: Any,
    n: int,
    settings: dict[str, int],
    seed: int | None = None,
) -> tuple[Tensor, Trace | None]:
    """y and what was touched, with poison wherever the kernel must write, and guards around all."""
    m = x.shape[0]
    out = torch.full((m, n), float("nan"), dtype=x.dtype, device=x.device)
    partial, counter = scratch(m, n, settings, x.device)
    module, name = (nf4, "_kernel") if launcher is nf4._launch else (w4a16, "packed_kernel")
    with pytest.MonkeyPatch.context() as patch:
        kernel = launched(patch, module, name, "out partial", seed)
        launcher(x, weights, out, partial, counter, settings)
    if settings["SPLIT"] > 1:
        assert not counter.any(), "the last program must set its counter back"
    return out, kernel.traces[-1]


def excess(y: Tensor, x: Tensor, w: Tensor) -> float:
    """The largest error of y = x w^T, as a part of what is allowed: above 1 is too much.

    Allowed is one rounding of the result, and 2^-18 of sum |x| |w|, as sums in float32 may be off.
    """
    x, w = x.double(), w.double()
    wanted = x @ w.T
    allowed = 2.0**-18 * (x.abs() @ w.abs().T)
    allowed += torch.finfo(y.dtype).eps * wanted.abs() + torch.finfo(y.dtype).tiny
    return float(((y.double() - wanted).abs() / allowed).max())
