"""A model that generates on these kernels: its weights and its cache in fewer bits, in CUDA graphs.

Pope et al. 2022, "Efficiently scaling transformer inference" (arXiv 2211.05102): to read one new
token in each row of a batch, a model moves all of its weights once, and the cache of every row:

    seconds a step  >=  (bytes of the weights + rows * tokens * bytes of a cached token) / bandwidth

Here both can be in fewer bits. The weights are those of `packed_llama`. The cache is that of KIVI
(Liu et al. 2024, arXiv 2402.02750): the latest 1 to 64 tokens as they are, those before them in 8
or 4 bits. Keys are quantized as they are attended to, rotated.

A step is hundreds of kernels, each shorter than the time that Python takes to launch it. A CUDA
graph launches them all at once, again and again with the same arguments. So whatever changes from
step to step, how many tokens there are for instance, is itself in the memory of the GPU (`State`),
and no number comes back to Python until all is done.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

from fewer.kernels.decode_quantized import decode_attention_quantized
from fewer.kernels.flash_decode import decode_attention
from fewer.kernels.packed_llama import Weights, forward, pack_model, rotations
from fewer.kernels.quantized_kv import QuantizedKV, quantize_kv
from fewer.models import Llama
from fewer.validate import require_int

GROUP = 64  # tokens that share the scales of their keys, and are quantized together

T = TypeVar("T")

CACHES = {"torch": 0, "full": 0, "int8": 8, "int4": 4}  # bits; 0: those of the model


class State(NamedTuple):
    """What a model has read so far, in buffers that stay where they are; `empty_state` makes it."""

    token: Int64[Tensor, "batch 1"]  # to be read next
    read: Int64[Tensor, "batch"]  # how many tokens are; the same number for each row
    stored: Int64[Tensor, "batch"]  # how many of them are in codes
    kv: Float[Tensor, "layers batch kv_heads_twice places d"]  # rotated keys, then values: the rest
    codes: QuantizedKV | None  # each with a dimension more, the layer, in front
    turns: Float[Tensor, "2 tokens 1 d"]  # `rotations` of every position
    by_torch: bool  # attention by torch's own function


def empty_state(weights: Weights, batch: int, tokens: int, cache: str = "full") -> State:
    """Room for so many tokens of each row.

    Args:
        weights: of `pack_model`; in bfloat16 or float16 unless the cache is "torch".
        batch, tokens: at least 1.
        cache: "full" (keys and values as they are), "int8", "int4", or "torch": full, but read by
            torch's scaled_dot_product_attention, with a mask.

    Raises:
        TypeError, ValueError: no such cache, or sizes out of their range.

    Example:
        >>> from fewer.models import tiny_llama
        >>> model = tiny_llama(head_dim=16).bfloat16()
        >>> state = empty_state(pack_model(model), batch=3, tokens=100, cache="int4")
        >>> state.kv.shape, state.codes.key_codes.shape  # in 2 layers, of 2 heads
        (torch.Size([2, 3, 4, 64, 16]), torch.Size([2, 3, 2, 128, 8]))
    """
    if cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
    require_int(batch, "batch", 1)
    require_int(tokens, "tokens", 1)
    config, bits, like = weights.config, CACHES[cache], weights.embedding
    kv_heads, d, rows = config.n_kv_heads, config.head_dim, (config.n_layers, batch)
    tokens = -(-tokens // GROUP) * GROUP
    codes = None
    if bits:
        zeros = like.new_zeros(1, 1, GROUP, d)
        one_group = quantize_kv(zeros, zeros, bits, GROUP)[:6]
        groups = tokens // GROUP
        codes = QuantizedKV._make(
            [x.new_zeros(*rows, kv_heads, groups * x.shape[2], *x.shape[3:]) for x in one_group]
            + [bits, GROUP]
        )
    positions = torch.arange(tokens, device=like.device)
    return State(
        token=positions.new_zeros(batch, 1),
        read=positions.new_zeros(batch),
        stored=positions.new_zeros(batch),
        kv=like.new_zeros(*rows, 2 * kv_heads, GROUP if bits else tokens, d),
        codes=codes,
        turns=rotations(config, positions).to(like),
        by_torch=cache == "torch",
    )


@torch.no_grad()
def prefill(
    weights: Weights, state: State, prompts: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch vocab"]:
    """Read the prompts into a state, whatever was in there; leave the likeliest token behind them.

    Returns:
        The logits of the next token of each row.

    Raises:
        ValueError: not as many rows as the state has, no token, or more than it has room for.
    """
    (batch, n), room = prompts.shape, state.turns.shape[1]
    if batch != len(state.token) or not 1 <= n <= room:
        raise ValueError(
            f"prompts must be {len(state.token)} rows of 1 to {room} tokens, got shape "
            f"{tuple(prompts.shape)}"
        )
    stored = (n - 1) // GROUP * GROUP if state.codes else 0
    kv_heads = weights.config.n_kv_heads

    def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
        q, kv = q.transpose(1, 2), kv.transpose(1, 2)
        state.kv[layer, :, :, : n - stored] = kv[:, :, stored:]
        if state.codes and stored:
            old_k, old_v = kv[:, :, :stored].chunk(2, 1)
            new = quantize_kv(old_k, old_v, state.codes.bits, GROUP)
            for to, x in zip(state.codes[:6], new[:6], strict=True):
                to[layer, :, :, : x.shape[2]] = x
        k, v = kv.split(kv_heads, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    state.read.fill_(n)
    state.stored.fill_(stored)
    logits = forward(weights, prompts, state.turns[:, :n], attend)
    state.token.copy_(logits.argmax(-1, keepdim=True))
    return logits


@torch.no_grad()
def decode(weights: Weights, state: State) -> Float[Tensor, "batch vocab"]:
    """Read `state.token`, and leave the likeliest token behind it there. Nothing comes to the host.

    There must be room: with a quantized cache `flush` makes it, whenever 64 tokens are not in codes
    (`stepper` sees to that).

    Returns:
        The logits of the next token of each row.
    """
    lengths = state.read - state.stored + 1
    place = lengths[:1] - 1
    mask = None
    if state.by_torch:
        hidden = torch.arange(state.kv.shape[3], device=place.device) > place
        mask = torch.zeros_like(hidden, dtype=state.kv.dtype).masked_fill_(hidden, -torch.inf)

    def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
        state.kv[layer].index_copy_(2, place, kv.transpose(1, 2))
        k, v = state.kv[layer].chunk(2, 1)
        q = q[:, 0]
        if state.codes:
            codes = QuantizedKV._make([*(x[layer] for x in state.codes[:6]), *state.codes[6:]])
            return decode_attention_quantized(
                q, codes, state.stored, recent=(k, v), recent_lengths=lengths
            )
        if mask is None:
            return decode_attention(q, k, v, lengths)
        grouped = q.unflatten(1, (k.shape[1], -1))  # queries of a key head as if they were tokens
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask[None, None, None])

    turns = state.turns.index_select(1, state.read[:1])
    logits = forward(weights, state.token, turns, attend)
    state.token.copy_(logits.argmax(-1, keepdim=True))
    state.read.add_(1)
    return logits


@torch.no_grad()
def flush(state: State) -> None:
    """Put the 64 tokens that are not in codes yet behind those that are, in all layers at once."""
    if state.codes is None:
        raise ValueError("state must have a quantized cache")
    k, v = state.kv.flatten(0, 1).chunk(2, 1)
    new = quantize_kv(k, v, state.codes.bits, GROUP)
    first = state.stored[:1]
    tokens, group = first + torch.arange(GROUP, device=first.device), first // GROUP
    for to, x in zip(state.codes[:6], new[:6], strict=True):
        place = tokens if x.shape[2] == GROUP else group
        to.flatten(0, 1).index_copy_(2, place, x)
    state.stored.add_(GROUP)


def graphed(state: State, work: Callable[[], T]) -> Callable[[], T]:
    """`work` as a CUDA graph: one launch for all of its kernels. On the CPU, `work` itself.

    It is run before, on a stream of its own, so that kernels get compiled and tables made: what is
    recorded may only launch. That leaves nonsense in the state; read a prompt afterwards.

    Args:
        work: works on this state alone, and never waits for the GPU.

    Returns:
        A function that gives the same tensors at every call, with new numbers in them.
    """
    if not state.token.is_cuda:
        return work
    stream = torch.cuda.Stream(state.token.device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            state.token.zero_()
            state.read.zero_()
            state.stored.zero_()
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()

    def replay() -> T:
        graph.replay()
        return made

    return replay


def stepper(weights: Weights, state: State) -> Callable[[int], Float[Tensor, "batch vocab"]]:
    """`decode`, and `flush` where it is due, as CUDA graphs: to be made before the prompt is read.

    Returns:
        A function of how many tokens have been read, at least one, which is what Python knows
        without asking the GPU; it returns the logits (in the same memory at every call) and raises
        ValueError where there is no room for one more token.
    """
    one = graphed(state, partial(decode, weights, state))
    store = graphed(state, partial(flush, state)) if state.codes else None
    room = state.turns.shape[1]

    def step(read: int) -> Float[Tensor, "batch vocab"]:
        require_int(read, "read", 1, room - 1)
        if store and read % GROUP == 0:
            store()
        return one()

    return step


def generate_graphed(
    model: Llama,
    prompts: Int[Tensor, "batch n"],
    new_tokens: int,
    weights: str = "full",
    cache: str = "full",
) -> Int64[Tensor, "batch new"]:
    """Continue every prompt with its likeliest tokens; no token ends a row.

    Args:
        model: as for `pack_model`, on a GPU or not.
        prompts: of equal lengths, at least one token, on the model's device.
        new_tokens: at least 1.
        weights: "full", "w8", "w4", "w4s" or "nf4": see `pack_model`.
        cache: "full", "int8", "int4" or "torch": see `empty_state`.

    Raises:
        TypeError, ValueError: as these.

    Example:
        >>> from fewer.models import tiny_llama, generate
        >>> model, prompts = tiny_llama(), torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> new = generate_graphed(model, prompts, 5, cache="torch")
        >>> torch.equal(new, generate(model, prompts, 5))
        True
    """
    require_int(new_tokens, "new_tokens", 1)
    batch, n = prompts.shape
    packed = pack_model(model, weights)
    state = empty_state(packed, batch, n + new_tokens, cache)
    step = stepper(packed, state)
    prefill(packed, state, prompts)
    said = [state.token.clone()]
    for read in range(n, n + new_tokens - 1):
        step(read)
        said.append(state.token.clone())
    return torch.cat(said, 1)
