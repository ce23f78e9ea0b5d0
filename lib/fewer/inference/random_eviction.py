"""Random eviction: the baseline that a policy has to beat.

No paper. Every token gets a new random score at every step, but the latest is safe:

    score(i) ~ U(0, 1),    infinity for the latest token

With one token read a step, each of the others survives a step with chance 1 - 1/budget: what is
held gets sparser with age, over a memory of about `budget` steps (a window would cut it off there).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.inference.eviction import EvictingCache, FullCache


def random_scores(
    indices: Int[Tensor, "*heads tokens"], generator: torch.Generator
) -> Float[Tensor, "*heads tokens"]:
    """A random number for each token, of every head by itself; infinite for the last.

    Args:
        indices: of the tokens held; only its shape is used.
        generator: source of the numbers, on the CPU.

    Returns:
        float32 in [0, 1) and infinity, the shape of indices.

    Example:
        >>> random_scores(torch.arange(3), torch.Generator().manual_seed(0)).tolist()
        [0.4962..., 0.7682..., inf]
    """
    scores = torch.rand(indices.shape, generator=generator)
    scores[..., -1] = torch.inf
    return scores.to(indices.device)


def random_eviction(budget: int, seed: int = 0, store: FullCache | None = None) -> EvictingCache:
    """A cache that evicts any token but the latest.

    Args:
        budget: tokens kept after every call, at least 1.
        seed: same seed, same choices. PyTorch's generator is left alone.
        store: where they lie, such as a `QuantizedCache`; by default in full precision.

    Raises:
        TypeError, ValueError: as `EvictingCache`.

    Example:
        >>> from fewer.models import tiny_llama
        >>> cache = random_eviction(budget=3)
        >>> _ = tiny_llama()(torch.tensor([[5, 6, 7, 8, 9]]), cache)
        >>> cache.indices[0].shape
        torch.Size([1, 2, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    return EvictingCache(lambda indices, _: random_scores(indices, generator), budget, store=store)
