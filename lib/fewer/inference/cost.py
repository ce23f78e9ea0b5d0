"""What generating costs: bytes of weights and cache, prefill and decode, and the roofline.

Williams, Waterman & Patterson 2009, "Roofline: An insightful visual performance model for multicore
architectures" (Communications of the ACM 52(4)). A machine does at most `peak` operations a second
and moves at most `bandwidth` bytes a second, so work that takes so many operations for each byte,

    intensity  =  operations / bytes,        attainable  =  min(peak, intensity * bandwidth)

A transformer with N weights in its matrices, L layers, h query heads and h_kv key heads of width d
reads n new tokens after m old ones, in each of B texts (a multiplication and an addition are two):

    operations  =  2 N n B  +  4 L h d (n m + n (n + 1) / 2) B
    bytes       =  (N  +  2 L h_kv d (m + n) B) * bytes a number

The weights move once for all texts; every text has its own cache. *Prefill* (n large) does many
operations for each byte and is limited by `peak`; *decode* (n = 1) reads all weights and all of the
cache for one token and is limited by `bandwidth`. More texts at once help the weights' part, never
the cache's.

The lecture's model has 70 billion weights: 140 GB in 16 bits (1 GB = 10^9 bytes). Its cache of 80
layers, 8 key heads of 128, for 64 texts of 8192 tokens takes 160 GiB (2^30 bytes; 172 GB), more
than the weights. If each of its 64 query heads had a key head of its own, it would take 1280 GiB.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewer.models.llama import KVCache, Llama, LlamaConfig
from fewer.validate import require_int

# Touvron et al. 2023, "Llama 2" (arXiv 2307.09288). Its output layer is not tied to its embedding;
# a step of generation reads only one of the two in full.
LLAMA_70B = LlamaConfig(
    vocab_size=32_000,
    d_model=8192,
    d_ffn=28_672,
    n_layers=80,
    n_heads=64,
    n_kv_heads=8,
    head_dim=128,
    context_length=4096,
)


def cache_bytes(
    tokens: int, layers: int, kv_heads: int, head_dim: int, sequences: int = 1, bits: int = 16
) -> int:
    """Bytes of the keys and values of some texts: a vector of each for every layer and key head.

    Args:
        tokens: read in each text, at least 0.
        layers: of the model, at least 0.
        kv_heads: key heads of a layer, at least 1, and as many heads of values. With grouped
            queries, they are fewer than the query heads.
        head_dim: numbers in the key or the value of a head, at least 1.
        sequences: texts that are generated at the same time, at least 1.
        bits: of a number, at least 1. All numbers together are whole bytes.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is below its least value.

    Example:
        >>> cache_bytes(8192, layers=80, kv_heads=8, head_dim=128, sequences=64) / 2**30
        160.0
        >>> cache_bytes(8192, layers=80, kv_heads=64, head_dim=128, sequences=64) / 2**30  # no GQA
        1280.0
    """
    require_int(tokens, "tokens", 0)
    require_int(layers, "layers", 0)
    require_int(kv_heads, "kv_heads", 1)
    require_int(head_dim, "head_dim", 1)
    require_int(sequences, "sequences", 1)
    require_int(bits, "bits", 1)
    return 2 * tokens * layers * kv_heads * head_dim * sequences * bits // 8


def weight_bytes(weights: int, bits: int = 16) -> int:
    """Bytes of a model's weights.

    Example:
        >>> weight_bytes(70_000_000_000) / 1e9
        140.0
    """
    return weights * bits // 8


def matrix_weights(config: LlamaConfig) -> int:
    """N: weights that every token is multiplied by, those of all blocks and of the output layer.

    Example:
        >>> matrix_weights(LLAMA_70B)
        68713185280
    """
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    block = config.d_model * (2 * q + 2 * kv + 3 * config.d_ffn)
    return config.n_layers * block + config.vocab_size * config.d_model


class Work(NamedTuple):
    """Operations to do and bytes to move."""

    operations: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes


def forward_work(
    past: int,
    new: int,
    weights: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    sequences: int = 1,
    bits: int = 16,
) -> Work:
    """Operations and bytes of one call of the model, 2 N n B + 4 L h d (n m + n (n + 1) / 2) B and
    (N + 2 L h_kv d (m + n) B) * bytes a number.

    Decoding is new = 1, prefill past = 0. A multiplication and an addition are two operations. A
    new token attends to those before it and to itself, in each query head by two products over d
    numbers: of the query with each key, and of each weight with its value. The weights move once.
    Keys and values move as often as they must: those of the `past` tokens are read and those of the
    new ones written. Activations are left out, as if they never left the chip.

    Args:
        past: m, tokens in the cache of each text, at least 0.
        new: n, tokens that each text reads now, at least 1.
        weights: N, that every token is multiplied by, see `matrix_weights`.
        layers: L, with attention, at least 0.
        heads, kv_heads, head_dim: h, h_kv and d of a layer.
        sequences: B, at least 1.
        bits: of a number, in weights and cache alike.

    Returns:
        Work(operations, bytes).

    Raises:
        TypeError: past, new or sequences is not an int.
        ValueError: past, new or sequences is below its least value.

    Example:
        >>> llama_70b = dict(layers=80, heads=64, kv_heads=8, head_dim=128)
        >>> forward_work(past=0, new=2048, weights=69 * 10**9, **llama_70b).operations / 1e12
        288.1...
        >>> forward_work(past=2048, new=1, weights=69 * 10**9, **llama_70b).intensity
        1.0...
    """
    require_int(past, "past", 0)
    require_int(new, "new", 1)
    pairs = new * past + new * (new + 1) // 2  # a new token sees itself and those before it
    attention = 4 * layers * heads * head_dim * pairs
    return Work(
        operations=(2 * weights * new + attention) * sequences,
        bytes=weight_bytes(weights, bits)
        + cache_bytes(past + new, layers, kv_heads, head_dim, sequences, bits),
    )


def model_work(
    config: LlamaConfig, past: int, new: int, sequences: int = 1, bits: int = 16
) -> Work:
    """`forward_work` of a model with these sizes.

    Example:
        >>> round(model_work(LLAMA_70B, past=0, new=2048).intensity)
        2078
        >>> model_work(LLAMA_70B, past=2048, new=1).intensity
        1.0...
    """
    c = config
    sizes = (matrix_weights(c), c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim)
    return forward_work(past, new, *sizes, sequences, bits)


class Machine(NamedTuple):
    """What a machine can do at most."""

    peak: float  # operations a second
    bandwidth: float  # bytes a second


def attainable(intensity: float, machine: Machine) -> float:
    """The roofline: min(peak, intensity * bandwidth), in operations a second.

    Args:
        intensity: operations a byte.
        machine: its two limits.

    Example:
        >>> laptop = Machine(peak=200e9, bandwidth=20e9)
        >>> attainable(1.0, laptop), attainable(50.0, laptop)
        (20000000000.0, 200000000000.0)
    """
    return min(machine.peak, intensity * machine.bandwidth)


def least_seconds(work: Work, machine: Machine) -> float:
    """How long some work takes where the limit of the roofline is reached.

    Example:
        >>> least_seconds(Work(operations=10**9, bytes=10**9), Machine(peak=4e9, bandwidth=2e9))
        0.5
    """
    return work.operations / attainable(work.intensity, machine)


def measure_machine(
    dtype: torch.dtype = torch.float32,
    matrix: int = 1024,
    megabytes: int = 256,
    repeats: int = 5,
    device: str = "cpu",
) -> Machine:
    """This machine's two limits, with the number of threads that PyTorch uses now.

    The peak is that of a product of two square matrices, 2 n^3 operations. The bandwidth is that of
    a copy, which reads and writes every byte. Of some runs the fastest counts.

    Args:
        dtype: of the matrices.
        matrix: n. On a GPU take at least 8192.
        megabytes: to copy; more than fits into the machine's caches.
        repeats: runs of each.
        device: where to measure.

    Example:
        >>> machine = measure_machine(matrix=64, megabytes=1, repeats=1)
        >>> machine.peak > 0 and machine.bandwidth > 0
        True
    """
    a = torch.randn(matrix, matrix, device=device).to(dtype)
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = fastest(lambda: a @ a, repeats)
    copy = fastest(lambda: target.copy_(source), repeats)
    return Machine(peak=2 * matrix**3 / product, bandwidth=2 * source.numel() / copy)


@torch.no_grad()
def measure_forward(
    model: Llama, past: int, new: int, sequences: int = 1, repeats: int = 3
) -> float:
    """Seconds of one call that reads `new` tokens after `past` others, the fastest of some runs.

    Compare with `least_seconds(model_work(...), measure_machine())`; of the logits only those of
    the last token are made, as in generation, so prefill is spared some of the work counted there.

    Example:
        >>> from fewer.models import tiny_llama
        >>> measure_forward(tiny_llama(), past=8, new=1, repeats=1) > 0
        True
    """
    device = next(model.parameters()).device
    tokens = torch.zeros(sequences, past + new, dtype=torch.long, device=device)
    held = KVCache()
    if past:
        model.hidden(tokens[:, :past], held)

    def call() -> Tensor:
        cache = KVCache()
        cache.keys, cache.values = list(held.keys), list(held.values)
        cache.positions = list(held.positions)
        return model.logits(model.hidden(tokens[:, past:], cache)[:, -1])

    return fastest(call, repeats)


def fastest(call: Callable[[], Tensor], repeats: int) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    best = float("inf")
    for run in range(repeats + 1):
        begin = time.perf_counter()
        if call().is_cuda:
            torch.cuda.synchronize()
        if run:
            best = min(best, time.perf_counter() - begin)
    return best
