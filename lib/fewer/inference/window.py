"""A sliding window: every head remembers the latest tokens and nothing else.

Beltagy et al. 2020, "Longformer: The long-document transformer" (arXiv 2004.05150), section 3.1, as
a cache policy:

    score(i) = i

Tokens keep their positions. A model that was not trained with a window fails the moment its first
token leaves: Xiao et al. 2023 (arXiv 2309.17453) found out why, see `sinks` and `streaming_llm`.
"""

from jaxtyping import Float, Int
from torch import Tensor

from fewer.inference.eviction import EvictingCache, FullCache


def window_scores(indices: Int[Tensor, "*heads tokens"]) -> Float[Tensor, "*heads tokens"]:
    """The later a token was read, the higher its score.

    Args:
        indices: when each token was read, 0 for the first of the text. Below 2^24.

    Returns:
        float32, the shape of indices.

    Example:
        >>> import torch
        >>> window_scores(torch.tensor([0, 3, 4])).tolist()
        [0.0, 3.0, 4.0]
    """
    return indices.float()


def window(budget: int, store: FullCache | None = None) -> EvictingCache:
    """A cache that holds the latest `budget` tokens at their own positions.

    Args:
        budget: tokens kept after every call, at least 1.
        store: where they lie, such as a `QuantizedCache`; by default in full precision.

    Raises:
        TypeError, ValueError: as `EvictingCache`.

    Example:
        >>> import torch
        >>> from fewer.models import tiny_llama
        >>> cache = window(budget=2)
        >>> _ = tiny_llama(n_kv_heads=1)(torch.tensor([[5, 6, 7, 8, 9]]), cache)
        >>> cache.indices[0].tolist(), cache.positions[0].tolist()
        ([[[3, 4]]], [[[3, 4]]])
    """
    return EvictingCache(lambda indices, _: window_scores(indices), budget, store=store)
