"""Find the fastest configuration of each kernel on this GPU, and store it in configs.json.

A kernel's tiles, warps and stages are constants that it is compiled with, and which ones are best
depends on the sizes. `fewer.kernels.launch.config` looks them up in lib/fewer/kernels/configs.json,
which this script writes: every candidate is compiled (in parallel), then timed in a CUDA graph over
operands that do not fit in the cache; the fastest one is stored. What is stored of other shapes and
kernels stays.

    python benchmarks/tune_kernels.py w4a16 nf4 --rows 1 --rows 16 --shape 28672x8192
    python benchmarks/tune_kernels.py hadamard_16 decode_attention_4      # their usual sizes
    python benchmarks/tune_kernels.py                                     # all, many minutes
"""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "0")

import torch
import typer
from torch import Tensor

from fewer.kernels import (
    decode_quantized,
    fast_hadamard,
    flash_decode,
    nf4,
    quantized_kv,
    w4a16,
    w8a16,
)
from fewer.kernels.split_k import scratch, usual_split
from fewer.progress import track

STORED = Path(w4a16.__file__).parent / "configs.json"
SHAPES = ("28672x8192", "14336x4096", "4096x14336", "3072x576", "576x1536")
ROWS = (1, 16, 32, 64, 256)
WEIGHT_ONLY = ("w4a16", "w4a16_zeros", "w8a16", "nf4")
ATTENTION = ("decode_attention_16", "decode_attention_8", "decode_attention_4")
HADAMARD = ("hadamard_16", "hadamard_32")
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
Settings = dict[str, int]


class Case(NamedTuple):
    """One kernel at one shape."""

    kernel: str
    shape: dict[str, int]


def cases(kernels: list[str], rows: list[int], shapes: list[str]) -> list[Case]:
    """What is to be tuned."""
    found = []
    for kernel in kernels:
        if kernel in WEIGHT_ONLY:
            for shape, m in product(shapes, rows):
                n, k = map(int, shape.split("x"))
                if kernel != "nf4" or k % 64 == 0:
                    found.append(Case(kernel, {"m": m, "n": n, "k": k}))
        elif kernel in HADAMARD:
            for n in (128, 1024, 4096, 8192, 16384, 32768):
                found.append(Case(kernel, {"rows": 2**26 // n, "n": n}))
        elif kernel in ATTENTION:
            for pairs, tokens in ((128, 8192), (8, 32768), (8, 2048)):
                found.append(Case(kernel, {"pairs": pairs, "rows": 4, "d": 128, "tokens": tokens}))
            found.append(Case(kernel, {"pairs": 48, "rows": 3, "d": 64, "tokens": 4096}))
        else:
            known = ", ".join((*WEIGHT_ONLY, *HADAMARD, *ATTENTION))
            raise typer.BadParameter(f"kernels must be among {known}, got {kernel}")
    return found


def candidates(case: Case) -> Iterator[Settings]:
    """What could be fast. Of the weight-only kernels, SPLIT is left to a second round."""
    if case.kernel in HADAMARD:
        for lines, stages, each, warps in product((64, 128), (1, 2, 3), (1, 2, 3, 4, 5, 8), (4, 8)):
            if lines * 64 * 8 >= case.shape["n"]:
                yield {"LINES": lines, "STAGES": stages, "per_processor": each, "num_warps": warps}
    elif case.kernel in ATTENTION:
        blocks = (32, 64, 128) if case.kernel == "decode_attention_16" else (32, 64)
        for block, stages, each, warps in product(blocks, (2, 3), (2, 4, 8, 12), (1, 2, 4)):
            yield {"BLOCK": block, "STAGES": stages, "per_processor": each, "num_warps": warps}
    else:
        m, wide = case.shape["m"], 64 if case.kernel == "nf4" else 128
        block_m = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
        for bm, bn, tile, warps, stages in product(
            {block_m} if m <= 64 else {64, 128},
            (16, 32, 64, 128) if m <= 8 else (32, 64, 128) if m <= 16 else (64, 128),
            (wide, wide // 2) if m <= 16 else (wide, wide // 2, 32) if m <= 64 else (64, 32),
            (1, 2, 4, 8) if m <= 16 else (4, 8),
            (2, 3, 4, 6) if m <= 16 else (2, 3, 4),
        ):
            idle = bn // 16 < warps and bn < 64
            registers = bn * bm // (32 * warps)
            buffers = stages * 4 * bm * tile * 2 + (stages - 1) * bn * tile * 2
            if not (idle or registers > 64 or bn // warps > 32 or buffers > 220_000):
                tiles = {"BLOCK_M": bm, "BLOCK_N": bn, "TILE": tile}
                split = usual_split(**case.shape, block_m=bm, block_n=bn)
                yield {**tiles, "num_warps": warps, "num_stages": stages, "SPLIT": split}


def launches(case: Case, copies: int) -> list[Callable[[Settings], object]]:
    """The kernel on so many sets of random operands."""
    shape = case.shape
    if case.kernel in HADAMARD:
        dtype = torch.bfloat16 if case.kernel == "hadamard_16" else torch.float32
        x = torch.randn(copies, shape["rows"], shape["n"], device="cuda", dtype=dtype)

        def transform(x: Tensor, settings: Settings) -> object:
            return fast_hadamard._launch(x, False, **settings)

        return [partial(transform, one) for one in x]
    if case.kernel in ATTENTION:
        return [_attention(case) for _ in range(copies)]
    m, n, k = shape["m"], shape["n"], shape["k"]
    x = torch.randn(m, k, device="cuda").bfloat16()
    out = x.new_empty(m, n)
    module = {"w8a16": w8a16, "nf4": nf4}.get(case.kernel, w4a16)

    def launch(w: tuple[Tensor, ...], settings: Settings) -> None:
        shared = scratch(m, n, settings, x.device)
        module._launch(x, w, out, *shared, settings)

    weights = [_weights(case) for _ in range(copies)]
    return [partial(launch, w) for w in weights]


def _weights(case: Case) -> tuple:
    n, k = case.shape["n"], case.shape["k"]
    words = torch.randint(-(2**15), 2**15, (n, k // 4), device="cuda", dtype=torch.int16)
    group = 128 if k % 128 == 0 else 64
    scale = (torch.rand(k // group, n, device="cuda") + 0.5).bfloat16()
    if case.kernel == "w4a16":
        return w4a16.W4(words, scale, None, k)
    if case.kernel == "w4a16_zeros":
        zero = torch.randint(16, scale.shape, device="cuda").to(torch.uint8)
        return w4a16.W4(words, scale, zero, k)
    if case.kernel == "w8a16":
        return w8a16.W8(torch.cat([words, words.flip(1)], 1), scale, k)
    blocks = n * k // 64
    codes = torch.randint(256, (k // 64, n), device="cuda").to(torch.uint8)
    outer = torch.rand(-(-blocks // 256), device="cuda") + 0.1
    return nf4.WNF4(words, codes, outer, torch.ones((), device="cuda"))


def _attention(case: Case) -> Callable[[Settings], object]:
    bits, shape = int(case.kernel.split("_")[-1]), case.shape
    kv_heads = 3 if shape["rows"] == 3 else 8
    batch, tokens, d = shape["pairs"] // kv_heads, shape["tokens"], shape["d"]
    q = torch.randn(batch, kv_heads * shape["rows"], d, device="cuda").bfloat16()
    full = (batch, kv_heads, tokens, d)
    if bits == 16:
        k, v = torch.randn(2, *full, device="cuda", dtype=torch.bfloat16)
        return lambda s: flash_decode._launch(q, k, v, None, 0.1, False, **s)
    codes = torch.randint(256, (2, *full[:3], d * bits // 8), device="cuda").to(torch.uint8)
    scales = (torch.rand(2, batch, kv_heads, -(-tokens // 64), d, device="cuda") / 10).half()
    of_values = (torch.rand(2, *full[:3], device="cuda") / 10).half()
    cache = quantized_kv.QuantizedKV._make([codes[0], *scales, codes[1], *of_values, bits, 64])
    return lambda s: decode_quantized._launch(q, cache, None, [], None, 0.1, False, **s)


def compile_one(job: tuple[Case, Settings]) -> str | None:
    """Fill Triton's cache on disk; what went wrong, if anything."""
    case, settings = job
    try:
        launches(case, 1)[0](settings)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{case.kernel} {case.shape} {settings}: {str(error)[:200]}"
    return None


def microseconds(each: list[Callable[[Settings], object]], settings: Settings) -> float:
    """Median of five replays of a graph of launches on one set of operands after the other."""
    for launch in each:
        launch(settings)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 20 // len(each))
    with torch.cuda.graph(graph):
        for launch in each * rounds:
            launch(settings)
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (rounds * len(each)))
    return sorted(times)[2]


def tune(case: Case, settings: list[Settings]) -> dict[str, float]:
    """Microseconds by candidate, as JSON; what fails takes forever."""
    one = sum(x.nbytes for x in _operands(case))
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    each = launches(case, min(max(2, math.ceil(4 * l2 / one)), 400))
    times = {}
    for candidate in settings:
        try:
            times[json.dumps(candidate)] = microseconds(each, candidate)
        except Exception as error:
            print(f"{case.kernel} {case.shape} {candidate}: {str(error)[:150]}")
            torch.cuda.synchronize()
    return times


def _operands(case: Case) -> list[Tensor]:
    """What is read."""
    if case.kernel in WEIGHT_ONLY:
        return [x for x in _weights(case) if isinstance(x, Tensor)]
    numbers = math.prod(case.shape.values())
    bits = int(case.kernel.split("_")[-1])
    if case.kernel in ATTENTION:
        numbers = 2 * numbers // case.shape["rows"]
    return [torch.empty(numbers * bits // 8, dtype=torch.uint8)]


def store(case: Case, settings: Settings) -> None:
    """Put it in configs.json, in place of what is there for this shape."""
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    others = [entry for entry in stored.get(case.kernel, []) if entry[0] != case.shape]
    entries = sorted([*others, [case.shape, settings]], key=lambda entry: list(entry[0].values()))
    stored = dict(sorted({**stored, case.kernel: entries}.items()))
    blocks = [
        f'"{name}": [\n' + ",\n".join(f"  {json.dumps(e)}" for e in entries) + "\n]"
        for name, entries in stored.items()
    ]
    STORED.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def main(
    kernels: Annotated[
        list[str] | None, typer.Argument(help="Names as in configs.json; all of them by default.")
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(help="Rows of x, of weight-only products.")
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Their weights, as NxK.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes that compile.")] = 14,
) -> None:
    """Tune kernels on this GPU; print the three fastest configurations of each shape, store one."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here that PyTorch can use")
    names = kernels or [*WEIGHT_ONLY, *HADAMARD, *ATTENTION]
    wanted = cases(names, rows or list(ROWS), shape or list(SHAPES))
    first = [(case, settings) for case in wanted for settings in candidates(case)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        failed = _compile(pool, first)
        for case in wanted:
            tried = tune(
                case, [s for c, s in first if c == case and (str(c), str(s)) not in failed]
            )
            if case.kernel in WEIGHT_ONLY:
                best = [json.loads(s) for s in sorted(tried, key=tried.__getitem__)[:4]]
                parts = [c for c in SPLITS if 128 * c <= case.shape["k"]]
                more = [{**s, "SPLIT": c} for s, c in product(best, parts) if c != s["SPLIT"]]
                failed = _compile(pool, [(case, s) for s in more])
                tried |= tune(case, [s for s in more if (str(case), str(s)) not in failed])
            if not tried:
                continue
            order = sorted(tried, key=tried.__getitem__)
            for settings in order[:3]:
                print(
                    f"{case.kernel} {case.shape}: {tried[settings]:.2f} us {settings}", flush=True
                )
            store(case, json.loads(order[0]))


def _compile(pool: ProcessPoolExecutor, jobs: list[tuple[Case, Settings]]) -> set[tuple[str, str]]:
    """Those that cannot be compiled or launched."""
    apart: dict[
        tuple[str, str], list[tuple[Case, Settings]]
    ] = {}  # by all that a kernel is compiled with
    for case, settings in jobs:
        constants = {name: value for name, value in settings.items() if name != "per_processor"}
        apart.setdefault((str(case), str(constants)), []).append((case, settings))
    failed = set()
    results = pool.map(compile_one, [same[0] for same in apart.values()], chunksize=2)
    for same, error in zip(track(apart.values(), "compiling"), results, strict=True):
        if error:
            print(error)
            failed |= {(str(case), str(settings)) for case, settings in same}
    return failed


if __name__ == "__main__":
    typer.run(main)
