"""For tests of kernels: what a launcher launches runs watched, into poisoned outputs.

A launcher makes its own outputs, with torch.empty, where no test can reach them before the kernel.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.kernels.interpreter import interpreted, watched


class Launched:
    """Stands for a kernel: kernel[grid](...) fills outputs with NaN or 127, then runs it, watched.

    On a GPU it only fills them; not if an argument `slot` says that an earlier kernel has written
    to them. `grids` has the grid of every launch, `traces` what it touched.
    """

    def __init__(self, kernel: Any, outputs: Sequence[str], seed: int | None) -> None:
        self.kernel, self.outputs, self.seed = kernel, outputs, seed
        self.grids: list[tuple[int, ...]] = []
        self.traces: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            named = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **constants}
            tensors = {n.removesuffix("_ptr"): x for n, x in named.items() if isinstance(x, Tensor)}
            for name in self.outputs:
                if name in tensors and not named.get("slot"):
                    x = tensors[name]
                    x.fill_(float("nan") if x.is_floating_point() else 127)
            self.grids.append(grid)
            with watched(tensors, self.seed) if interpreted() else nullcontext() as trace:
                self.traces.append(trace)
                self.kernel[grid](*arguments, **constants)

        return launch


def launched(
    patch: pytest.MonkeyPatch,
    module: ModuleType,
    kernel: str,
    outputs: str,
    seed: int | None = None,
) -> Launched:
    """Put a `Launched` in the place of a module's kernel. outputs: names, separated by blanks."""
    found = getattr(module, kernel)
    stand_in = Launched(
        found.kernel if isinstance(found, Launched) else found, outputs.split(), seed
    )
    patch.setattr(module, kernel, stand_in)
    return stand_in


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|, Euclidean, in float64; NaN stays NaN."""
    difference = (x.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp(min=torch.finfo(torch.float32).tiny))
