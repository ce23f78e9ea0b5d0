"""Reading a text of any length: its losses token by token, whatever cache is used.

The measurement of Xiao et al. 2023, "Efficient streaming language models with attention sinks"
(arXiv 2309.17453), sections 3 and 4: a model reads one token after another and is scored on the
next,

    l_t = -log p(x_t+1 | what the cache holds of x_0 ... x_t),    perplexity = exp(mean l)

With a cache of constant size, memory is constant and every token takes the same time. The slow
baseline reads the last tokens anew for every one, at the positions 0, 1, ... ("sliding window with
re-computation"): as good as it gets with that many tokens, at their number times the work.
"""

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewer.models.llama import KVCache, Llama
from fewer.progress import track
from fewer.validate import require_int


class StreamLosses(NamedTuple):
    """What reading a text gave."""

    losses: Float[Tensor, "scored"]  # of the next token, in nats, float32
    seconds: list[float]  # of each call of the model


@torch.no_grad()
def stream_losses(
    model: Llama,
    tokens: Int[Tensor, "n"],
    cache: KVCache,
    chunk: int = 1,
    progress: bool = False,
) -> StreamLosses:
    """Read a text through a cache, `chunk` tokens a call, and score every next token.

    Args:
        model: the language model.
        tokens: ids of the text, 2 or more.
        cache: of any policy, empty or after the text before. It has read all but the last token
            afterwards.
        chunk: tokens a call, at least 1. A larger one is faster, and lets a token see up to
            chunk - 1 tokens more than a cache of constant size holds.
        progress: show a progress bar on stderr.

    Returns:
        losses: n - 1 of them, loss t is that of token t + 1.
        seconds: a number for each call.

    Raises:
        TypeError: chunk is not an int.
        ValueError: tokens is not a vector of 2 or more, or chunk is below 1.

    Example:
        >>> from fewer.inference.streaming_llm import streaming_llm
        >>> from fewer.models import tiny_llama
        >>> cache, text = streaming_llm(budget=16), torch.arange(50)
        >>> stream_losses(tiny_llama(), text, cache).losses.shape, cache.keys[0].shape
        (torch.Size([49]), torch.Size([1, 2, 16, 8]))
    """
    require_int(chunk, "chunk", 1)
    losses, seconds = torch.empty(len(_text(tokens)) - 1), []
    starts = range(0, len(losses), chunk)
    for start in track(starts, "reading", progress=progress):
        begin = time.perf_counter()
        end = min(start + chunk, len(losses))
        logits = model(tokens[None, start:end], cache)[0]
        targets = tokens[start + 1 : end + 1]
        losses[start:end] = F.cross_entropy(logits.float(), targets, reduction="none")
        seconds.append(time.perf_counter() - begin)
    return StreamLosses(losses, seconds)


@torch.no_grad()
def recomputed_losses(
    model: Llama,
    tokens: Int[Tensor, "n"],
    window: int,
    steps: Iterable[int] | None = None,
    progress: bool = False,
) -> StreamLosses:
    """Score next tokens, reading for each the last `window` tokens anew and without a cache.

    Args:
        model: the language model.
        tokens: ids of the text, 2 or more.
        window: how many tokens each is predicted from (fewer near the start), at least 1.
        steps: which tokens t, each 0 to n - 2, to read last and score the next of; by default all.
        progress: show a progress bar on stderr.

    Returns:
        losses: one for each step, that of token t + 1.
        seconds: a number for each step.

    Raises:
        TypeError: window is not an int.
        ValueError: tokens is not a vector of 2 or more, window is below 1, or a step is out of its
            range.

    Example:
        >>> from fewer.models import tiny_llama
        >>> recomputed_losses(tiny_llama(), torch.arange(50), window=8, steps=[20, 40]).losses.shape
        torch.Size([2])
    """
    require_int(window, "window", 1)
    last = len(_text(tokens)) - 2
    steps = list(range(last + 1) if steps is None else steps)
    losses, seconds = torch.empty(len(steps)), []
    for i, t in enumerate(track(steps, "reading", progress=progress)):
        require_int(t, "a step", 0, last)
        begin = time.perf_counter()
        hidden = model.hidden(tokens[None, max(t + 1 - window, 0) : t + 1])[0, -1]
        losses[i] = F.cross_entropy(model.logits(hidden).float(), tokens[t + 1])
        seconds.append(time.perf_counter() - begin)
    return StreamLosses(losses, seconds)


def _text(tokens: Tensor) -> Tensor:
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(
            f"tokens must be a vector of 2 or more ids, got shape {tuple(tokens.shape)}"
        )
    return tokens
