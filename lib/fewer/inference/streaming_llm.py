"""StreamingLLM: a window and, always, the first few tokens of the text.

Xiao et al. 2023, "Efficient streaming language models with attention sinks" (arXiv 2309.17453),
section 3.2. Heads that have nothing to look for put their attention on the first tokens, whatever
these say (`sinks` measures it). A window that loses them takes away what the softmax of most heads
mostly sums over, and the model breaks; kept, they mend it:

    score(i) = infinity    for the first `sinks` tokens,    i  for the others

Positions are counted *inside the cache*. After [0 1 2 3 6 7 8], token 9 stands at position 7, not
9. So no distance is ever longer than the cache, and a text may be of any length.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.inference.eviction import EvictingCache, FullCache
from fewer.validate import require_int


def streaming_llm_scores(
    indices: Int[Tensor, "*heads tokens"], sinks: int
) -> Float[Tensor, "*heads tokens"]:
    """Infinite for the first `sinks` tokens of the text; for the others, the later the higher.

    Args:
        indices: of the tokens held: when each was read, 0 for the first of the text. Below 2^24.
        sinks: how many tokens are never evicted, at least 0.

    Returns:
        float32, the shape of indices. The score of the others is finite.

    Raises:
        TypeError: sinks is not an int.
        ValueError: sinks is below 0.

    Example:
        >>> streaming_llm_scores(torch.tensor([0, 1, 7, 8]), sinks=1).tolist()
        [inf, 1.0, 7.0, 8.0]
    """
    require_int(sinks, "sinks", 0)
    return torch.where(indices < sinks, torch.inf, indices.float())


def streaming_llm(budget: int, sinks: int = 4, store: FullCache | None = None) -> EvictingCache:
    """A cache of the first `sinks` and the latest `budget - sinks` tokens, at positions of its own.

    Args:
        budget: tokens kept after every call, the sinks included.
        sinks: 0 to budget - 1, and no more than leave room for the tokens that `store` cannot drop
            yet. The paper's 4 are enough for models that were not trained to use one.
        store: where they lie, such as a `QuantizedCache`; by default in full precision.

    Raises:
        TypeError, ValueError: as `EvictingCache`, or sinks is out of range.

    Example:
        >>> from fewer.models import tiny_llama
        >>> cache = streaming_llm(budget=3, sinks=1)
        >>> _ = tiny_llama(n_kv_heads=1)(torch.tensor([[5, 6, 7, 8, 9]]), cache)
        >>> cache.indices[0].tolist(), cache.positions[0].tolist(), cache.next_position
        ([[[0, 3, 4]]], [[[0, 1, 2]]], 3)
    """
    pending = store.protected if store else 0
    require_int(budget, "budget", pending + 1)
    require_int(sinks, "sinks", 0, budget - max(1, pending))
    return EvictingCache(
        lambda indices, _: streaming_llm_scores(indices, sinks), budget, renumber=True, store=store
    )
