"""What the kernels of this folder share where they are launched: notice, configuration, counters.

No paper. A kernel is fast in one configuration (tile sizes, warps, stages) and slow in others, and
which one is best depends on the shape. A search takes minutes, so its result is stored, in
configs.json beside this file, which benchmarks/tune_kernels.py wrote on an H100. A kernel that is
not in there has the default that it comes with:

    {"w4a16": [[{"m": 1, "n": 28672, "k": 8192}, {"BLOCK_N": 64, "num_warps": 4}], ...], ...}
"""

import json
import math
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import resources

import torch
from jaxtyping import Int32
from torch import Tensor

COUNTERS = 1 << 20

_told: set[str] = set()
_rings: dict[torch.device, tuple[Tensor, list[int]]] = {}


def fall_back(name: str) -> None:
    """Say, the first time, that `name` computes with plain torch here, since there is no GPU.

    To be called by what a custom op does on the CPU, in front of the reference.

    Example:
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     fall_back("an example"), fall_back("an example")
        (None, None)
        >>> len(told)
        1
    """
    if name in _told:
        return
    _told.add(name)
    warnings.warn(
        f"{name} has its kernel on CUDA tensors alone; on others it is plain torch, right but slow",
        UserWarning,
        stacklevel=3,
    )


def config(kernel: str, default: Mapping[str, int], **shape: int) -> dict[str, int]:
    """The stored configuration of the shape that is nearest to this one, over the default one.

    Near is meant in factors: the distance of two shapes is the sum of |log2 (a / b)| over their
    sizes. Of two that are equally near, the one that is stored first.

    Args:
        kernel: its name in configs.json. What must not be mixed (another type, another group) has a
            name of its own.
        default: every constant that the kernel needs; used where nothing is stored.
        shape: sizes of at least 0, called as in configs.json; empty dimensions count as 1.

    Returns:
        default, with what is stored in place of it: the constants, num_warps, num_stages.

    Example:
        >>> config("no such kernel", {"BLOCK": 64, "num_warps": 4}, n=1000)
        {'BLOCK': 64, 'num_warps': 4}
    """
    return {**default, **_stored(kernel, tuple(shape.items()))}


@cache  # a dictionary look-up in place of a search, at every launch
def _stored(kernel: str, shape: tuple[tuple[str, int], ...]) -> dict[str, int]:
    def distance(entry: list[dict[str, int]]) -> float:
        return sum(abs(math.log2(max(n, 1) / max(entry[0].get(name, n), 1))) for name, n in shape)

    return min(_configs().get(kernel, [[{}, {}]]), key=distance)[1]


@cache
def _configs() -> dict[str, list[list[dict[str, int]]]]:
    stored = resources.files("fewer.kernels") / "configs.json"
    return json.loads(stored.read_text()) if stored.is_file() else {}


def counters(n: int, device: torch.device) -> Int32[Tensor, "n"]:
    """n counters that are 0, for programs of one launch to see which of them arrives last.

    The one that does must set its counter back to 0. To make zeros anew would be a second launch;
    so they are cut from a ring of a million of them, the next ones at each call. Launches that
    run at the same time, on other streams or in other CUDA graphs, then have counters of their own.

    Raises:
        ValueError: more counters than there are.

    Example:
        >>> counters(3, torch.device("cpu")).tolist()
        [0, 0, 0]
    """
    if n > COUNTERS:
        raise ValueError(f"n must be at most {COUNTERS}, got {n}")
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32, device=device)
    if device not in _rings:
        if torch.cuda.is_current_stream_capturing():  # they would be zeros only when it is replayed
            return torch.zeros(n, dtype=torch.int32, device=device)
        _rings[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device), [0]
        torch.cuda.synchronize(device)  # before another stream counts with them; once a process
    ring, start = _rings[device]
    if start[0] + n > COUNTERS:
        start[0] = 0
    start[0] += n
    return ring[start[0] - n : start[0]]
