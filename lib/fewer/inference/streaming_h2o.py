"""StreamingH2O: heavy hitters and recent tokens, their positions squeezed together.

Zhang et al. 2023 (arXiv 2306.14048), section 5.3, go on to texts of any length with what Xiao et
al. 2023 (arXiv 2309.17453) do in StreamingLLM. Scores are those of H2O, but a token's position is
its place inside the cache:

    after tokens 0, 17, 90, 91 are kept, they stand at 0, 1, 2, 3 and token 92 at 4

so no query is ever farther from a key than the cache is long, and the model never sees a position
it was not trained on. In every head other tokens close ranks, so the same token may stand at
different places in two heads.
"""

from fewer.inference.eviction import EvictingCache, FullCache
from fewer.inference.h2o import h2o


def streaming_h2o(
    budget: int, recent: int | None = None, store: FullCache | None = None
) -> EvictingCache:
    """H2O's cache with positions counted inside it.

    Args:
        budget, recent, store: as for `h2o`.

    Raises:
        TypeError, ValueError: as `h2o`.

    Example:
        >>> import torch
        >>> from fewer.models import tiny_llama
        >>> model, cache = tiny_llama(n_kv_heads=1), streaming_h2o(budget=4)
        >>> _ = model(torch.tensor([[5, 6, 7, 8, 9, 10]]), cache)
        >>> cache.positions[0].tolist(), cache.next_position
        ([[[0, 1, 2, 3]]], 4)
    """
    return h2o(budget, recent, renumber=True, store=store)
