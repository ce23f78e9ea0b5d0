"""The speed of every kernel of `fewer.kernels` on a GPU, beside its floor and beside others.

The floor of a kernel is the time in which a plain copy moves the bytes that it must read or write
once. Every output is compared with a reference in float64 first: a wrong one is an error, not a
row. Then the call is captured in a CUDA graph, over so many copies of its inputs that none is still
in the cache when its turn comes again; the graph is replayed, and timed with events.

    python benchmarks/gpu_kernels.py --quick --only w4a16                              # a look
    python benchmarks/gpu_kernels.py --jobs 6 --plot docs/gpu_kernels.png              # all of it
    python benchmarks/gpu_kernels.py --stored benchmarks/results/gpu_kernels_X.json    # its tables

Peers that are installed are measured too: torch's own (cuBLAS, tinygemm, SDPA), bitsandbytes and
gemlite. They get the same matrices and caches, as far as their formats allow it. (SDPA returns no
weights, which H2O needs: there it does less.) Results go to benchmarks/results/, after each row.
What failed is said at the end, and by the exit code.

Rows: µs (median; tenth to ninetieth percentile), GB/s and their part of the copy's, how many times
faster than the same in bfloat16, and than the best of the others.
"""

import contextlib
import copy
import datetime
import functools
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewer.kernels import (
    W8,
    WNF4,
    QuantizedKV,
    decode_attention,
    decode_attention_quantized,
    decode_attention_reference,
    dequantize_int8,
    dequantize_kv,
    for_kernel,
    hadamard,
    hadamard_quantize,
    nf4_matmul,
    pack_w4,
    pack_w8,
    quantize_int8,
    quantize_kv,
    w4a16_matmul,
    w8a16_matmul,
)
from fewer.peft.nf4 import dequantize_nf4, quantize_nf4
from fewer.progress import track
from fewer.quantization import fwht

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "fewer"
PEERS = ("bitsandbytes", "gemlite")  # packages that may be missing
SHAPES = ((28672, 8192), (14336, 4096))  # of weights, [n, k]
CACHE_SIZES = ((16, 8192), (1, 32768))  # sequences, tokens of each
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
GRAPH_US = 2000.0  # a graph lasts at least that long, or its launch would count
REPEATS = 15
OUR_LIMIT, PEER_LIMIT = 5e-3, 2e-2  # of the relative error; peers add up in bfloat16, some of them


class Prepared(NamedTuple):
    """A call, ready to be checked and timed."""

    call: Callable[..., Any]
    arguments: tuple  # copied until the copies are too many for the cache
    reads: int  # bytes that the call must read once; the outputs' are added
    operations: float
    expected: tuple[Tensor, ...]
    outputs: Callable[..., tuple[Tensor, ...]] = lambda *outputs: outputs  # as compared with those


class Entry(NamedTuple):
    """A row of the table that is still to be measured. Entries of one `prepare` are one row."""

    kernel: str
    shape: str
    who: str
    prepare: functools.partial[Prepared]
    needs: str | None = None  # a package


class Unavailable(Exception):
    """What should be measured is not there, or refuses such inputs."""


# --- the matrices ---------------------------------------------------------------------------------


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def rows_of_x(m: int, k: int) -> Tensor:
    return torch.randn(m, k, device=DEVICE).bfloat16()


def product(
    call: Callable[..., Any], arguments: tuple, x: Tensor, W: Tensor, stored: int
) -> Prepared:
    """x W^T, from `stored` bytes of weights."""
    (m, k), n = x.shape, len(W)
    expected = F.linear(x.double(), W.double())
    return Prepared(call, arguments, nbytes(x) + stored, 2.0 * m * n * k, (expected,))


@functools.lru_cache(maxsize=1)  # entries of one matrix follow each other
def four_bits(n: int, k: int, group: int, zeros: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, zero points, and the matrix in float32."""
    codes = torch.randint(16, (n, k), dtype=torch.uint8, device=DEVICE)
    scale = ((torch.rand(n, k // group, device=DEVICE) + 0.5) / 64).bfloat16()
    zero = torch.full_like(scale, 8, dtype=torch.int32)
    if zeros:
        zero = torch.randint_like(zero, 16)
    W = (codes.view(n, -1, group).float() - zero[..., None]) * scale[..., None].float()
    return codes, scale, zero, W.view(n, k)


def cublas(n: int, k: int, m: int) -> Prepared:
    x, W = rows_of_x(m, k), torch.randn(n, k, device=DEVICE).bfloat16()
    return product(lambda W: F.linear(x, W), (W,), x, W, W.nbytes)


def our_w4(n: int, k: int, m: int, group: int, zeros: bool) -> Prepared:
    codes, scale, zero, W = four_bits(n, k, group, zeros)
    x, w = rows_of_x(m, k), pack_w4(codes, scale, zero if zeros else None)
    stored = nbytes(w.packed, w.scale, w.zero)
    return product(lambda w: w4a16_matmul(x, w), (w,), x, W, stored)


def tinygemm(n: int, k: int, m: int, group: int, zeros: bool) -> Prepared:
    """torch's own: (q - 8) scale + zero, with zero in bfloat16."""
    if DEVICE != "cuda":
        raise Unavailable("tinygemm on the CPU has another layout")
    codes, scale, zero, W = four_bits(n, k, group, zeros)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    both = torch.stack([scale.T, ((8 - zero) * scale.float()).bfloat16().T], dim=2).contiguous()
    x = rows_of_x(m, k)

    def call(packed: Tensor, both: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed, group, both)

    return product(call, (packed, both), x, W, nbytes(packed, both))


def gemlite_w4(n: int, k: int, m: int, group: int, zeros: bool) -> Prepared:
    gemlite = importlib.import_module("gemlite")
    codes, scale, zero, W = four_bits(n, k, group, zeros)
    layer = gemlite.helper.A16W4_HQQ_INT(device="cuda:0").from_weights(
        codes, scale, zero.to(scale.dtype)
    )
    tensors, meta = [t.detach() for t in layer.get_tensor_args()], layer.get_meta_args()
    x = rows_of_x(m, k)
    return product(
        lambda *tensors: gemlite.forward_functional(x, None, list(tensors), meta),
        tuple(tensors),
        x,
        W,
        nbytes(*tensors),
    )


@functools.lru_cache(maxsize=1)
def eight_bits(n: int, k: int, group: int) -> tuple[W8, Tensor]:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=DEVICE)
    scale = ((torch.rand(n, k // group, device=DEVICE) + 0.5) / 1024).bfloat16()
    W = codes.view(n, -1, group).float() * scale[..., None].float()
    return pack_w8(codes, scale), W.view(n, k)


def our_w8(n: int, k: int, m: int, group: int) -> Prepared:
    w, W = eight_bits(n, k, group)
    x = rows_of_x(m, k)
    return product(lambda w: w8a16_matmul(x, w), (w,), x, W, nbytes(w.packed, w.scale))


@functools.lru_cache(maxsize=1)
def normal_weights(n: int, k: int) -> Tensor:
    return (torch.randn(n, k, device=DEVICE) / math.sqrt(k)).bfloat16()


@functools.lru_cache(maxsize=1)
def nf4_weights(n: int, k: int) -> tuple[WNF4, Tensor]:
    stored = quantize_nf4(normal_weights(n, k))
    return for_kernel(stored, (n, k)), dequantize_nf4(stored, (n, k))


def our_nf4(n: int, k: int, m: int) -> Prepared:
    w, W = nf4_weights(n, k)
    x = rows_of_x(m, k)
    return product(lambda w: nf4_matmul(x, w), (w,), x, W, nbytes(*w))


def bitsandbytes_nf4(n: int, k: int, m: int, gemv: bool) -> Prepared:
    """Scales in 8 bits as ours; for its gemv in 32, since it would need another launch for them."""
    bitsandbytes = importlib.import_module("bitsandbytes")
    if gemv and DEVICE != "cuda":
        raise Unavailable("bitsandbytes: its gemv on the CPU has another layout")
    functional = bitsandbytes.functional
    packed, state = functional.quantize_4bit(
        normal_weights(n, k), blocksize=64, compress_statistics=not gemv, quant_type="nf4"
    )
    W = functional.dequantize_4bit(packed, state)
    x = rows_of_x(m, k)
    scales = [state.absmax] + ([] if gemv else [state.state2.absmax])
    multiply = functional.gemv_4bit if gemv else bitsandbytes.matmul_4bit
    named = "state" if gemv else "quant_state"
    return product(
        lambda packed, state: multiply(x, packed, **{named: state}),
        (packed, state),
        x,
        W,
        nbytes(packed, *scales),
    )


# --- activations ----------------------------------------------------------------------------------


def dequantized(codes: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    grouped = codes.double().unflatten(-1, (scale.shape[-1], -1))
    return ((grouped * scale[..., None]).flatten(-2),)


def exact_int8(x: Tensor, group: int) -> tuple[Tensor, ...]:
    """What codes and scale of x should stand for."""
    grouped = x.double().unflatten(-1, (-1, group))
    scale = grouped.abs().amax(-1).float() / 127
    return dequantized((grouped / scale[..., None].double()).round().flatten(-2), scale)


def torch_quantize(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """As one would write it in torch, operation by operation."""
    grouped = x.unflatten(-1, (-1, group))
    scale = grouped.abs().amax(-1).float() / 127
    return (grouped / scale[..., None]).round().to(torch.int8).flatten(-2), scale


def torch_dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    grouped = codes.unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale[..., None]).flatten(-2).bfloat16()


def quantize(rows: int, n: int, group: int, ours: bool) -> Prepared:
    x = rows_of_x(rows, n)
    call = quantize_int8 if ours else torch_quantize
    return Prepared(
        lambda x: call(x, group), (x,), x.nbytes, 3.0 * x.numel(), exact_int8(x, group), dequantized
    )


def dequantize(rows: int, n: int, group: int, ours: bool) -> Prepared:
    codes = torch.randint(-127, 128, (rows, n), dtype=torch.int8, device=DEVICE)
    scale = torch.rand(rows, n // group, device=DEVICE) + 0.5
    call = functools.partial(dequantize_int8, dtype=torch.bfloat16) if ours else torch_dequantize
    return Prepared(
        call, (codes, scale), nbytes(codes, scale), 1.0 * codes.numel(), dequantized(codes, scale)
    )


def our_hadamard(rows: int, n: int) -> Prepared:
    x = rows_of_x(rows, n)
    operations = x.numel() * math.log2(n)
    return Prepared(hadamard, (x,), x.nbytes, operations, (fwht(x.double()),))


def hadamard_by_matmul(rows: int, n: int) -> Prepared:
    x, H = rows_of_x(rows, n), torch.ones(1, 1, dtype=torch.bfloat16, device=DEVICE)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    H = H / math.sqrt(n)
    return Prepared(
        lambda x: F.linear(x, H), (x,), nbytes(x, H), 2.0 * rows * n * n, (fwht(x.double()),)
    )


def our_hadamard_quantize(rows: int, n: int, fused: bool) -> Prepared:
    x = rows_of_x(rows, n)
    call = hadamard_quantize if fused else lambda x: quantize_int8(hadamard(x))
    y = fwht(x.double())
    if not fused:  # two roundings
        y = y.bfloat16()
    operations = x.numel() * (math.log2(n) + 3)
    return Prepared(call, (x,), x.nbytes, operations, exact_int8(y, n), dequantized)


# --- the cache ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def full_cache(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    shape = (2, batch, KV_HEADS, tokens, HEAD_DIM)
    keys, values = torch.randn(shape, device=DEVICE).bfloat16()
    return keys.contiguous(), values.contiguous()


@functools.lru_cache(maxsize=1)
def quantized_cache(batch: int, tokens: int, bits: int) -> QuantizedKV:
    return quantize_kv(*full_cache(batch, tokens), bits)


def queries(batch: int) -> Tensor:
    return torch.randn(batch, HEADS, HEAD_DIM, device=DEVICE).bfloat16()


def attention_operations(batch: int, tokens: int) -> float:
    return 4.0 * batch * HEADS * tokens * HEAD_DIM


def our_decode(batch: int, tokens: int, bits: int, observe: bool) -> Prepared:
    q = queries(batch)
    cache: tuple
    if bits == 16:
        k, v = cache = full_cache(batch, tokens)
        stored = nbytes(k, v)
    else:
        of_codes = quantized_cache(batch, tokens, bits)
        k, v = dequantize_kv(of_codes)
        cache, stored = (of_codes,), nbytes(*of_codes[:6])
    call = decode_attention if bits == 16 else decode_attention_quantized
    expected = decode_attention_reference(q.double(), k.double(), v.double())
    return Prepared(
        lambda *cache: call(q, *cache, observe=observe),
        cache,
        q.nbytes + stored,
        attention_operations(batch, tokens),
        expected if observe else expected[:1],
    )


def sdpa(batch: int, tokens: int, backend: str | None) -> Prepared:
    q, (k, v) = queries(batch), full_cache(batch, tokens)

    def call(k: Tensor, v: Tensor) -> Tensor:
        chosen = sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext()
        with chosen:
            return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    try:
        call(k, v)
    except RuntimeError as error:
        raise Unavailable(f"SDPA {backend}: {str(error).splitlines()[0]}") from None
    expected = decode_attention_reference(q.double(), k.double(), v.double())[:1]
    operations = attention_operations(batch, tokens)
    return Prepared(call, (k, v), nbytes(q, k, v), operations, expected)


# --- what is measured -----------------------------------------------------------------------------


def matrix(n: int, k: int, m: int, more: str = "") -> str:
    return f"{n} x {k}, M = {m}{more}"


def entries(small: bool = False, quick: bool = False) -> list[Entry]:
    """All rows, so that those of one matrix follow each other."""
    shapes, ms = list(SHAPES), [1, 4, 16, 64, 256]
    numbers, widths = 16384 * 4096, [4096, 1024, 8192, 32768]  # of activations
    batches = list(CACHE_SIZES)
    if quick:
        shapes, ms, widths, batches = shapes[:1], [1, 16, 64], widths[:1], batches[:1]
    if small:
        shapes, ms, numbers, widths, batches = [(256, 512)], [1, 64], 2**15, [4096, 64], [(2, 96)]
    found: list[Entry] = []

    def add(kernel: str, shape: str, who: str, function: Callable, *arguments: Any) -> None:
        needs = next((name for name in PEERS if who.startswith(name)), None)
        prepare = functools.partial(function, *arguments)
        found.append(Entry(kernel, shape, who, prepare, needs))

    for n, k in shapes:
        for group, zeros, more in ((128, False, ""), (64, False, ", g64"), (128, True, ", zeros")):
            for m in ms if not more else ms[:1]:
                name, sizes = matrix(n, k, m, more), (n, k, m, group, zeros)
                add("w4a16", name, OURS, our_w4, *sizes)
                add("w4a16", name, "cuBLAS bf16", cublas, n, k, m)
                add("w4a16", name, "tinygemm int4", tinygemm, *sizes)
                if not more:
                    add("w4a16", name, "gemlite A16W4", gemlite_w4, *sizes)
        for m in ms:
            add("w8a16", matrix(n, k, m), OURS, our_w8, n, k, m, 128)
            add("w8a16", matrix(n, k, m), "cuBLAS bf16", cublas, n, k, m)
        for m in ms:
            add("nf4", matrix(n, k, m), OURS, our_nf4, n, k, m)
            add("nf4", matrix(n, k, m), "cuBLAS bf16", cublas, n, k, m)
            add("nf4", matrix(n, k, m), "bitsandbytes NF4", bitsandbytes_nf4, n, k, m, False)
            if m == 1:
                add("nf4", matrix(n, k, m), "bitsandbytes gemv", bitsandbytes_nf4, n, k, m, True)

    for n in widths:
        size = (numbers // n, n)
        name = f"{size[0]} x {n}"
        if n == widths[0]:
            for group, shape in ((n, name), (128, name + ", g128")):
                for kernel, function in (("int8", quantize), ("int8 back", dequantize)):
                    add(kernel, shape, OURS, function, *size, group, True)
                    add(kernel, shape, "torch eager", function, *size, group, False)
        add("hadamard", name, OURS, our_hadamard, *size)
        add("hadamard", name, "matmul bf16", hadamard_by_matmul, *size)
        add("hadamard + int8", name, OURS, our_hadamard_quantize, *size, True)
        add("hadamard + int8", name, "in two launches", our_hadamard_quantize, *size, False)

    for batch, tokens in batches:
        name = f"{batch} x {tokens} tokens"
        for bits, observe in ((16, False), (16, True), (8, False), (4, False), (4, True)):
            kernel = f"decode {'bf16' if bits == 16 else f'int{bits}'}{', H2O' if observe else ''}"
            add(kernel, name, OURS, our_decode, batch, tokens, bits, observe)
            add(kernel, name, "SDPA bf16", sdpa, batch, tokens, None)
            add(kernel, name, "cuDNN bf16", sdpa, batch, tokens, "CUDNN_ATTENTION")
    return found


# --- how ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to yet is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def relative_error(prepared: Prepared, outputs: tuple[Tensor, ...]) -> float:
    """||out - expected|| / ||expected||, of the worst output."""
    pairs = zip(prepared.outputs(*outputs), prepared.expected, strict=True)
    errors = [float((out.double() - exact).norm() / exact.norm()) for out, exact in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def timed(
    call: Callable[..., Any], arguments: tuple, reads: int, repeats: int, graphs: bool = True
) -> tuple[list[float], int, str]:
    """Microseconds a call in each repeat; how many calls a repeat has; what was wrong, if anything.

    Args:
        reads: bytes of the arguments. They are copied until that is four times the L2 cache.
    """
    if DEVICE != "cuda":  # to try the script; says nothing
        return [_host_us(call, arguments) for _ in range(repeats)], 1, "no GPU"
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = [arguments]
    while len(copies) * reads < 4 * cache:
        copies.append(copy.deepcopy(arguments))

    def rounds(n: int) -> None:
        for _ in range(n):
            for one in copies:
                call(*one)

    def replays(run: Callable[[], None], n: int) -> list[float]:
        found = []
        for _ in range(n):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(1000 * begin.elapsed_time(end))
        return found

    stream = (
        torch.cuda.Stream()
    )  # libraries set up what they need for a stream before it is captured
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rounds(1)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        if not graphs:
            raise RuntimeError("not wanted")
        once = captured(rounds, 1)
        n = math.ceil(GRAPH_US / statistics.median(replays(once.replay, 5)))
        run, trouble = (captured(rounds, n) if n > 1 else once).replay, ""
    except RuntimeError as error:
        torch.cuda.synchronize()
        trouble = f"no graph: {str(error).splitlines()[0]}"
        n = math.ceil(GRAPH_US / statistics.median(replays(lambda: rounds(1), 5)))
        run = functools.partial(rounds, n)
    replays(run, 3)
    calls = n * len(copies)
    return [us / calls for us in replays(run, repeats)], calls, trouble


def captured(rounds: Callable[[int], None], n: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rounds(n)
    return graph


def _host_us(call: Callable[..., Any], arguments: tuple) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return 1e6 * (time.perf_counter() - begin)


def measured(entry: Entry, repeats: int) -> dict:
    """A row. Raises what the call raises, Unavailable, and ArithmeticError for a wrong output."""
    prepared = entry.prepare()
    with poisoned() if entry.who == OURS else contextlib.nullcontext():
        outputs = as_tuple(prepared.call(*prepared.arguments))
        error = relative_error(prepared, outputs)
    if not error < (OUR_LIMIT if entry.who == OURS else PEER_LIMIT):
        raise ArithmeticError(f"a relative error of {error:.1e}")
    writes = nbytes(*outputs)
    del outputs
    us, calls, trouble = timed(prepared.call, prepared.arguments, prepared.reads, repeats)
    us.sort()
    return {
        "kernel": entry.kernel,
        "shape": entry.shape,
        "who": entry.who,
        "us": round(statistics.median(us), 3),
        "low": round(us[len(us) // 10], 3),
        "high": round(us[-1 - len(us) // 10], 3),
        "bytes": prepared.reads + writes,
        "operations": prepared.operations,
        "error": float(f"{error:.2e}"),
        "calls": calls,
        "note": trouble,
    }


def try_once(entry: Entry) -> None:
    """Compile what an entry needs, in a process of its own: Triton keeps it on disk."""
    with contextlib.suppress(Exception):  # it will fail again where that is said
        prepared = entry.prepare()
        prepared.call(*prepared.arguments)
    torch.cuda.empty_cache()


def compile_all(of: list[Entry], jobs: int) -> None:
    """`try_once` for what is in Triton, those first that try many configurations."""
    of = [entry for entry in of if entry.who == OURS or entry.needs == "gemlite"]
    of.sort(key=lambda entry: entry.needs != "gemlite")
    # Forked workers would share the GPU's context, which does not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    # One that dies takes the pool with it; what is not compiled yet is then compiled when measured.
    with contextlib.suppress(BrokenExecutor), ProcessPoolExecutor(jobs, spawn) as pool:
        for _ in track(pool.map(try_once, of), "compile", total=len(of)):
            pass


def ceilings(small: bool, repeats: int) -> tuple[float, float]:
    """GB/s of a large copy, read and written; 10^12 operations a second of a large bf16 product."""
    size, n = (2**20, 128) if small else (2**31, 8192)
    a = torch.randint(-128, 128, (size,), dtype=torch.int8, device=DEVICE)
    b = torch.empty_like(a)
    # A copy in a graph is slower than one alone, and than a kernel that copies: the fastest counts.
    ways: list[tuple[Callable[..., Any], bool]] = [
        (lambda a: b.copy_(a), False),
        (lambda a: b.copy_(a), True),
        (lambda a: torch.neg(a.view(torch.int32), out=b.view(torch.int32)), True),
    ]
    us = min(statistics.median(timed(way, (a,), size, repeats, g)[0]) for way, g in ways)
    copied = 2 * size / us / 1e3
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    products, _, _ = timed(lambda a: a @ b, (a,), a.nbytes, repeats)
    return round(copied, 1), round(2 * n**3 / statistics.median(products) / 1e6, 1)


def alive() -> bool:
    """Whether the GPU still works; after a kernel touched what it may not, it does not."""
    try:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def missing_peers() -> dict[str, str]:
    """Packages that cannot be imported, and why."""
    found = {}
    for name in PEERS:
        try:
            importlib.import_module(name)
        except Exception as error:  # gemlite, for one, looks for a GPU when it is imported
            found[name] = f"{type(error).__name__}: {error}"
    return found


def versions(missing: dict[str, str]) -> dict[str, str]:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "CUDA": torch.version.cuda or "none",
        "driver": driver,
        **{p: importlib.metadata.version(p) for p in PEERS if p not in missing},
    }


# --- the tables -----------------------------------------------------------------------------------


def by_task(result: dict) -> dict[tuple[str, str], dict[str, dict]]:
    """(kernel, shape) -> who -> row"""
    tasks: dict[tuple[str, str], dict[str, dict]] = {}
    for row in result["results"]:
        tasks.setdefault((row["kernel"], row["shape"]), {})[row["who"]] = row
    return tasks


def fastest(rows: dict[str, dict], which: str = "") -> float | None:
    """The least time of those others whose name has `which` in it."""
    return min((r["us"] for who, r in rows.items() if who != OURS and which in who), default=None)


def gb_s(row: dict) -> float:
    return row["bytes"] / row["us"] / 1e3


def print_results(result: dict, console: Console) -> None:
    copied = result["copy_gb_s"]
    table = Table(
        title=f"{result['device']}, {result['date'][:10]}: a copy moves {copied:,.0f} GB/s, a bf16 "
        f"product makes {result['matmul_tflop_s']:,.0f} TFLOP/s. Floor: a kernel's bytes at the "
        "speed of the copy. x: times faster"
    )
    columns = ("kernel", "shape", "who", "µs (low-high)", "floor µs", "GB/s", "% of copy", "x bf16")
    for name in (*columns, "x best peer", "error"):
        left = name in ("kernel", "shape", "who")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for (kernel, shape), rows in by_task(result).items():
        in_bf16, best = fastest(rows, "bf16"), fastest(rows)
        for who, row in rows.items():
            ours, us = who == OURS, row["us"]
            table.add_row(
                kernel if ours else "",
                shape if ours else "",
                who + (" (no graph)" if row.get("note") else ""),
                f"{us:,.1f} ({row['low']:,.1f}-{row['high']:,.1f})",
                f"{row['bytes'] / copied / 1e3:,.1f}",
                f"{gb_s(row):,.0f}",
                f"{100 * gb_s(row) / copied:.0f}",
                f"{in_bf16 / us:.2f}" if in_bf16 and "bf16" not in who else "",
                f"{best / us:.2f}" if best and ours else "",
                f"{row['error']:.0e}" if "error" in row else "",
                style="bold" if ours else "",
                end_section=row is list(rows.values())[-1],
            )
    console.print(table)


def tabulated(result: dict) -> dict:
    """For the documentation: a caption, the columns' names, and a row for each of our rows."""
    copied, lines = result["copy_gb_s"], []
    for (kernel, shape), rows in by_task(result).items():
        if OURS not in rows:
            continue
        ours, in_bf16, best = rows[OURS], fastest(rows, "bf16"), fastest(rows)
        name = next((who for who, r in rows.items() if r["us"] == best and who != OURS), "")
        lines.append(
            [
                kernel,
                shape,
                f"{ours['us']:,.1f}",
                f"{ours['bytes'] / copied / 1e3:,.1f}",
                f"{100 * gb_s(ours) / copied:.0f}%",
                f"{in_bf16 / ours['us']:.2f}x" if in_bf16 else "",
                f"{best / ours['us']:.2f}x {name}" if best else "",
            ]
        )
    caption = (
        "Median microseconds in a CUDA graph over inputs that are not in the cache; the floor, "
        f"which is the time of a copy of as many bytes (a copy moves {copied:,.0f} GB/s in the "
        "same run); how near the kernel comes to it; how many times faster it is than the fastest "
        "in bfloat16, and than the fastest other"
    )
    columns = ["kernel", "shape", "µs", "floor", "of the copy", "bf16", "fastest other"]
    return {"caption": caption, "columns": columns, "rows": lines}


def targets(result: dict) -> list[list[str]]:
    """Kernel, shape, what is wanted, what was measured, and whether it is met."""
    tasks, copied, found = by_task(result), result["copy_gb_s"], []

    def want(kernel: str, shape: str, over: str | None, least: float) -> None:
        """At least so much of the copy's speed, or so many times faster than `over`."""
        rows = tasks.get((kernel, shape), {})
        ours, value, than = rows.get(OURS), None, "of the copy's speed"
        if ours and over is None:
            value = gb_s(ours) / copied
        elif ours and (other := fastest(rows, over or "")):
            value = other / ours["us"]
            than = "x " + next(who for who, r in rows.items() if r["us"] == other and who != OURS)
        elif over is not None:
            than = f"x {over or 'the best peer'}"
        show = (lambda v: f"{100 * v:.0f}%") if over is None else (lambda v: f"{v:.2f}")
        wanted = f"{show(least)} {than}"
        if value is None:
            found.append([kernel, shape, wanted, "", "not measured"])
        else:
            found.append([kernel, shape, wanted, show(value), ("missed", "met")[value >= least]])

    for n, k in SHAPES:
        want("w4a16", matrix(n, k, 1), None, 0.80)
        want("w4a16", matrix(n, k, 1), "", 1.25)
        want("w4a16", matrix(n, k, 16), "bf16", 2.0)
        want("w4a16", matrix(n, k, 64), "bf16", 1.2)
        want("nf4", matrix(n, k, 1), "bitsandbytes", 1.3)
    want("hadamard", "16384 x 4096", None, 0.85)
    want("decode int8", "16 x 8192 tokens", "SDPA", 1.7)
    want("decode int4", "16 x 8192 tokens", "SDPA", 2.8)
    return found


def print_targets(result: dict, console: Console) -> None:
    table = Table(title="Targets")
    for name in ("kernel", "shape", "at least", "measured", ""):
        table.add_column(name, justify="right" if name == "measured" else "left", no_wrap=True)
    for row in targets(result):
        table.add_row(*row)
    console.print(table)


def plot(result: dict, path: Path) -> None:
    """The roofline. Of each kernel its first shape: of weights with every M, as a line."""
    import numpy as np

    from fewer.plots import GREY, INK, PALETTE, direct_label, figure, log_axis, save

    copied, peak = result["copy_gb_s"], result["matmul_tflop_s"]
    families = {"w4": "blue", "w8": "sky", "nf4": "green", "int8": "amber"}
    families |= {"hadamard": "vermilion", "decode": "purple"}
    first: dict[str, str] = {}  # kernel -> its first shape, without M
    for kernel, shape in by_task(result):
        first.setdefault(kernel, shape.split(",")[0])
    sizes = first.get("w4a16", "")
    fig, ax = figure(
        "Under the slope, the memory is the limit: there, fewer bytes are less time",
        "intensity (operations a byte)",
        "speed (10¹² operations a second)",
        note=f"{result['device']}, {result['date'][:10]}. The roof, measured: a plain copy, and a "
        f"product of bf16 matrices. Weights of {sizes}, and 1 to 256 rows of x from left to right; "
        "the others as in the first rows of the table. Colour: fewer. Grey: others on these tasks.",
        size=(8.4, 5.2),
    )
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in result["results"]:
        kernel, shape = row["kernel"], row["shape"]
        if not re.fullmatch(re.escape(first[kernel]) + r"(, M = \d+)?", shape) or "H2O" in kernel:
            continue
        at = row["operations"] / row["bytes"], row["operations"] / row["us"] / 1e6
        if row["who"] == OURS:
            curves.setdefault(kernel, []).append(at)
        else:
            ax.plot(*at, "o", color="#B4B9C1", markersize=4, zorder=1)
    lowest = min([i for points in curves.values() for i, _ in points], default=1.0)
    reach = np.geomspace(lowest / 2, 4000, 200)
    ax.plot(reach, np.minimum(peak, reach * copied / 1e3), color=INK, linewidth=1.2, zorder=1)
    for kernel, points in curves.items():
        points.sort()
        color = PALETTE[next(c for name, c in families.items() if kernel.startswith(name))]
        ax.plot(*zip(*points, strict=True), "o-", color=color, linewidth=1.0, markersize=6)
        direct_label(ax, points[-1], kernel, color)
    ax.text(reach[-1], 1.12 * peak, f"product: {peak:,.0f}", ha="right", color=GREY)
    ax.text(reach[0], 5 * reach[0] * copied / 1e3, f"copy: {copied:,.0f} GB/s", color=GREY)
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    save(fig, path)
    print(f"Written: {path}")


def show(result: dict, plot_to: Path | None) -> None:
    console = Console(width=170)
    print_results(result, console)
    print_targets(result, console)
    if plot_to:
        plot(result, plot_to)


def main(
    only: str = typer.Option("", help="kernels whose name begins so, such as w4a16,hadamard"),
    without: str = typer.Option("", help="peers not to measure, such as gemlite"),
    quick: bool = typer.Option(False, help="one shape of each, M = 1, 16, 64"),
    small: bool = typer.Option(False, help="tiny shapes, to try the script; on the CPU too"),
    repeats: int = typer.Option(REPEATS, min=1, help="of each graph"),
    jobs: int = typer.Option(1, min=1, help="processes that compile side by side, before"),
    seed: int | None = typer.Option(None, help="of the inputs; new ones by default"),
    plot_to: Path | None = typer.Option(None, "--plot", help="a PNG of the roofline"),
    stored: Path | None = typer.Option(None, exists=True, help="show this result, measure nothing"),
    out: Path | None = typer.Option(
        None, help="folder for the JSON file; by default results, and none for --small"
    ),
) -> None:
    """Measure the kernels of fewer on this GPU, and others on the same tasks."""
    if stored:
        show(json.loads(stored.read_text("utf-8")), plot_to)
        return
    if DEVICE != "cuda" and not small:
        raise typer.BadParameter("there is no GPU here; --small tries the script without one")
    names = tuple(name.strip() for name in only.split(",") if name.strip())
    unwanted = tuple(name.strip() for name in without.split(",") if name.strip())
    todo = [
        entry
        for entry in entries(small, quick)
        if (not names or entry.kernel.startswith(names))
        and not (unwanted and entry.who.startswith(unwanted))
    ]
    if not todo:
        raise typer.BadParameter(f"no kernel's name begins with {only!r}")
    missing = missing_peers()
    for name, why in missing.items():
        print(f"skipped: {name} cannot be imported ({why})")
    todo = [entry for entry in todo if entry.needs not in missing]
    if jobs > 1:
        compile_all(todo, jobs)

    seed = torch.seed() % 2**32 if seed is None else seed
    torch.manual_seed(seed)
    begin, now = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    copied, peak = ceilings(small, repeats)
    result: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "versions": versions(missing),
        "settings": {
            "only": only,
            "without": without,
            "quick": quick,
            "small": small,
            "repeats": repeats,
            "seed": seed,
        },
        "copy_gb_s": copied,
        "matmul_tflop_s": peak,
        "skipped": [f"{name}: {why}" for name, why in missing.items()],
        "failed": [],
        "results": [],
    }
    path = None
    if out or not small:
        folder = out or Path(__file__).parent / "results"
        folder.mkdir(parents=True, exist_ok=True)
        device = re.sub(r"\W+", "_", result["device"].lower())
        path = folder / f"gpu_kernels_{device}_{now:%Y%m%d_%H%M%S}.json"
    print(f"copy {copied:,.0f} GB/s, product {peak:,.0f} TFLOP/s", flush=True)

    known: dict[tuple, dict] = {}  # the same call on the same sizes is measured once
    refused: set[tuple] = set()
    for entry in (bar := track(todo, "rows")):
        task = (entry.prepare.func, entry.prepare.args)
        label = f"{entry.kernel:16} {entry.shape:30} {entry.who:18}"
        if task in refused:
            continue
        try:
            row = known.get(task) or measured(entry, repeats)
        except Unavailable as error:
            refused.add(task)
            result["skipped"].append(str(error))
            bar.write(f"{label} skipped: {error}")
            continue
        except Exception as error:  # the other rows are still wanted
            refused.add(task)
            why = f"{type(error).__name__}: {str(error)[:300]}"
            result["failed"].append(f"{entry.kernel}, {entry.shape}, {entry.who}: {why}")
            bar.write(f"{label} FAILED: {why}")
            if not alive():
                result["failed"].append(
                    "the GPU: it no longer answers, and what came later is missing"
                )
                break
            continue
        known[task] = row
        result["results"].append({**row, "kernel": entry.kernel, "shape": entry.shape})
        bar.write(
            f"{label} {row['us']:9.1f} µs  {gb_s(row):6,.0f} GB/s  {100 * gb_s(row) / copied:3.0f}%"
            f"  error {row['error']:.1e}  {row['note']}"
        )
        if path:  # a run broken off keeps its rows
            path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    result["settings"]["seconds"] = round(time.perf_counter() - begin)
    result |= {"targets": targets(result), "table": tabulated(result)}
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    show(result, plot_to)
    for line in result["failed"]:
        print(f"FAILED: {line}")
    if path:
        print(f"Written: {path}")
    if result["failed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
