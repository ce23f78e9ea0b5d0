"""H2O: keep the tokens that were attended to most so far (the heavy hitters), and recent ones.

Zhang et al. 2023, "H2O: Heavy-hitter oracle for efficient generative inference of large language
models" (arXiv 2306.14048), section 4, algorithm 1. With A_q the attention weights of query q,

    F(i) = sum over the queries q read so far  of  A_q(i)

and after every step the token of least F goes, in each head by itself. Half of the budget is kept
for the latest tokens whatever they sum to, since they had little time to be attended to. The choice
is greedy: what is gone is gone, and no later query can ask for it, so A_q is taken over the tokens
that were still there.

Query heads that share a key head are summed: they must agree on what it keeps. A prompt is summed
over all its queries before anything is evicted, or chunk by chunk. Older tokens have been summed
over more queries, which favours them; that is the paper's rule.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.inference.eviction import EvictingCache, FullCache
from fewer.validate import require_int


def accumulate_attention(
    sums: Float[Tensor, "batch kv_heads tokens"],
    attention: Float[Tensor, "batch kv_heads group new tokens"],
) -> Float[Tensor, "batch kv_heads tokens"]:
    """F after some new queries: F(i) + sum of A_q(i) over them, and over the heads of the group.

    Args:
        sums: F before, of every token held and every new one (for which it is 0).
        attention: A_q(i), q along `new` and i along `tokens`; each row sums to 1.

    Returns:
        F of every token, in the type of sums, in which the weights are added up as well. `sums`
        itself is not changed.

    Raises:
        ValueError: attention is not that of the batch, key heads and tokens of sums.

    Example:
        >>> attention = torch.tensor([[1.0, 0.0], [0.25, 0.75]]).reshape(1, 1, 1, 2, 2)
        >>> accumulate_attention(torch.tensor([[[2.0, 0.0]]]), attention).tolist()
        [[[3.25, 0.75]]]
    """
    if attention.dim() != 5 or (*attention.shape[:2], attention.shape[4]) != sums.shape:
        wanted = f"[batch, kv_heads, group, new, tokens] for sums {list(sums.shape)}"
        raise ValueError(f"attention must be {wanted}, got {list(attention.shape)}")
    return sums + attention.sum(dim=(2, 3), dtype=sums.dtype)


def h2o_scores(sums: Float[Tensor, "*heads tokens"], recent: int) -> Float[Tensor, "*heads tokens"]:
    """The attention that each token received; infinite for the latest `recent` tokens.

    Args:
        sums: F of the tokens held, in the order of the text. Not changed.
        recent: how many of the latest are kept whatever they received, at least 0. Where there are
            fewer tokens, all are kept.

    Returns:
        The shape and type of sums.

    Raises:
        TypeError: recent is not an int.
        ValueError: recent is below 0.

    Example:
        >>> h2o_scores(torch.tensor([3.0, 0.5, 0.25, 0.125]), recent=1).tolist()
        [3.0, 0.5, 0.25, inf]
    """
    require_int(recent, "recent", 0)
    tokens = sums.shape[-1]
    latest = torch.arange(tokens, device=sums.device) >= tokens - recent
    return sums.masked_fill(latest, torch.inf)


def h2o(
    budget: int,
    recent: int | None = None,
    *,
    renumber: bool = False,
    store: FullCache | None = None,
) -> EvictingCache:
    """A cache of the `recent` latest tokens and of the others that received most attention.

    Args:
        budget: tokens kept after every call.
        recent: how many of them are the latest, 0 to budget; by default half (rounded up). At least
            as many as `store` cannot drop yet.
        renumber: count positions inside the cache (see `streaming_h2o`); by default tokens keep
            those they had in the text.
        store: where they lie, such as a `QuantizedCache`; by default in full precision.

    Raises:
        TypeError, ValueError: as `EvictingCache`, or recent is out of range.

    Example:
        >>> from fewer.models import tiny_llama
        >>> model, cache = tiny_llama(), h2o(budget=4)
        >>> _ = model(torch.tensor([[5, 6, 7, 8, 9, 10]]), cache)
        >>> cache.indices[0][..., -2:].tolist()  # in both heads, the latest two
        [[[4, 5], [4, 5]]]
    """
    require_int(budget, "budget", 1)
    recent = (budget + 1) // 2 if recent is None else recent
    require_int(recent, "recent", store.protected if store else 0, budget)
    return EvictingCache(
        lambda _, sums: h2o_scores(sums, recent),
        budget,
        renumber=renumber,
        accumulate=accumulate_attention,
        store=store,
    )
