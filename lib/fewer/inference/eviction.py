"""A key-value cache of constant size: a policy scores the tokens it holds, the least are evicted.

The frame that the policies of this folder share; each has its own file. After every call of the
model (a decoding step or a chunk of the prompt), every key head of every layer and row keeps

    S  <-  the `budget` tokens of largest score among S and the new ones

in the order of the text. So a new token attends to what its head held before, to the tokens of its
own chunk up to itself, and then one of them has to go. Forgetting is simple; what breaks is what
stands around it:

- *Positions.* RoPE turns a key by its position, so keys are kept unturned and a position beside
  each. It is either the token's own (the gaps stay), or its place inside the cache (`renumber`: the
  kept tokens close ranks, as in StreamingLLM). The next token's position must not be read off the
  tokens that happen to be left.
- *Grouped queries.* Query heads that share a key head share what it keeps.
- *Rows and heads* keep different tokens, though equally many.

Evicting must equal dense attention masked to the same keys at the same positions, at every step:
that is what the tests ask of every policy.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.models.llama import KVCache
from fewer.validate import require_int

# (indices of the tokens held, their sums) -> scores, each [batch, kv_heads, tokens]
Policy = Callable[[Tensor, Tensor], Tensor]
# (sums [batch, kv_heads, tokens], attention [batch, kv_heads, group, new, tokens]) -> sums
Accumulate = Callable[[Tensor, Tensor], Tensor]


def kept_tokens(
    scores: Float[Tensor, "*heads tokens"], budget: int
) -> Int[Tensor, "*heads budget"]:
    """Where the `budget` largest scores of each head stand, from left to right.

    Of equal scores the later token is kept.

    Args:
        scores: [..., tokens], infinite ones allowed.
        budget: at least 1. Where it is not below the number of tokens, all are kept.

    Returns:
        int64, [..., min(budget, tokens)], ascending along the last dimension.

    Raises:
        ValueError: budget below 1.

    Example:
        >>> kept_tokens(torch.tensor([0.9, 0.1, 0.5, 0.5, 0.2]), budget=2).tolist()
        [0, 3]
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    # Stable and ascending, the end of the order holds the largest, later ones of equals last.
    order = scores.argsort(dim=-1, stable=True)
    return order[..., -budget:].sort(dim=-1).values


def gather_tokens(
    x: Float[Tensor, "batch kv_heads tokens width"], index: Int[Tensor, "batch kv_heads kept"]
) -> Float[Tensor, "batch kv_heads kept width"]:
    """The vectors of the chosen tokens; every head of every row chooses its own.

    Args:
        x: [batch, kv_heads, tokens, width].
        index: which tokens of each head, 0 to tokens - 1.

    Returns:
        [batch, kv_heads, kept, width], of x's type: result[b, h, j] is x[b, h, index[b, h, j]].

    Example:
        >>> x = torch.tensor([[[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]]])  # two heads
        >>> gather_tokens(x, torch.tensor([[[0, 2], [1, 2]]])).flatten().tolist()
        [1.0, 3.0, 5.0, 6.0]
    """
    return torch.take_along_dim(x, index[..., None], dim=2)


class FullCache(KVCache):
    """Keeps all tokens in full precision, until it is told to drop some.

    Attributes:
        protected: so many of the latest tokens must not be dropped.
    """

    protected = 0

    def keep(self, layer: int, index: Int[Tensor, "batch kv_heads kept"]) -> None:
        """Drop all tokens of a layer but these, places in the cache in ascending order.

        Positions must have been given for every head ([batch, kv_heads, tokens]).
        """
        self.keys[layer] = gather_tokens(self.keys[layer], index)
        self.values[layer] = gather_tokens(self.values[layer], index)
        self.positions[layer] = self.positions[layer].gather(-1, index)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of all layers, counted from the tensors that hold them."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class EvictingCache(KVCache):
    """Holds `budget` tokens a head after every call, those that `policy` scores highest.

    Use the functions that make one: `window`, `streaming_llm`, `h2o`, `streaming_h2o`,
    `random_eviction`.

    Args:
        policy: called with the original index of each token held, [batch, kv_heads, tokens],
            ascending (0 is the first token read), and with their sums, float32, of the same shape.
            Returns scores, of that shape too. It may write into neither.
        budget: tokens kept after a call, at least 1. While the model runs there are as many more as
            the call reads, so a long prompt is better read in chunks.
        renumber: give the kept tokens the positions 0, 1, ..., and the next token the one after
            them, in place of those they had in the text.
        accumulate: makes new sums of the old ones and the attention weights that `KVCache.observe`
            gets. None leaves the sums 0 and spares the model the weights.
        store: where keys and values lie, empty; by default in full precision.

    Attributes:
        indices: for each layer the original indices of the tokens held, [batch, kv_heads, tokens].
        sums: for each layer what `accumulate` made, float32, of the same shape.

    Raises:
        TypeError: budget is not an int.
        ValueError: budget is below 1, or below the number of tokens that `store` cannot drop yet.

    Example:
        >>> from fewer.models import tiny_llama
        >>> oldest = EvictingCache(lambda indices, sums: -indices.float(), budget=3)
        >>> _ = tiny_llama()(torch.tensor([[5, 6, 7, 8, 9]]), oldest)
        >>> oldest.indices[0].tolist(), oldest.next_position  # of two key heads
        ([[[0, 1, 2], [0, 1, 2]]], 5)
    """

    def __init__(
        self,
        policy: Policy,
        budget: int,
        *,
        renumber: bool = False,
        accumulate: Accumulate | None = None,
        store: FullCache | None = None,
    ) -> None:
        self.store = FullCache() if store is None else store
        require_int(budget, "budget", max(1, self.store.protected))
        self.policy, self.budget = policy, budget
        self.renumber, self.accumulate = renumber, accumulate
        self.keys, self.values = self.store.keys, self.store.values
        self.positions = self.store.positions
        self.observes = accumulate is not None
        self.indices: list[Tensor] = []
        self.sums: list[Tensor] = []
        self._read: list[int] = []  # how many tokens each layer has seen
        self._next_position = 0

    @property
    def next_position(self) -> int:
        """Of the next token: after the latest one read, or with `renumber` after those held."""
        if self.renumber and self.indices:
            return self.indices[0].shape[-1]
        return self._next_position

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values. Indices, positions and sums come on top: they are counters."""
        return self.store.nbytes

    def update(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new head_dim"],
        positions: Int[Tensor, "*batch new"],
    ) -> tuple[
        Float[Tensor, "batch kv_heads tokens head_dim"],
        Float[Tensor, "batch kv_heads tokens head_dim"],
        Int[Tensor, "batch kv_heads tokens"],
    ]:
        """Return the tokens held and the new ones; keep `budget` of them for the next call."""
        batch, kv_heads, new, _ = keys.shape
        for_heads = positions if positions.ndim == 1 else positions[:, None]
        for_heads = for_heads.expand(batch, kv_heads, new)
        if layer == len(self.indices):
            self.indices.append(for_heads[..., :0])
            self.sums.append(torch.zeros(batch, kv_heads, 0, device=keys.device))
            self._read.append(0)
        if layer == 0:
            self._next_position = int(positions.max()) + 1
        first, self._read[layer] = self._read[layer], self._read[layer] + new
        index = torch.arange(first, first + new, device=keys.device).expand(batch, kv_heads, new)
        self.indices[layer] = torch.cat([self.indices[layer], index], dim=-1)
        self.sums[layer] = torch.nn.functional.pad(self.sums[layer], (0, new))
        seen = self.store.update(layer, keys, values, for_heads)
        if not self.observes:
            self._evict(layer)
        return seen  # the new tokens still attend to what has just been evicted

    def observe(
        self, layer: int, attention: Float[Tensor, "batch kv_heads group new tokens"]
    ) -> None:
        assert self.accumulate is not None
        self.sums[layer] = self.accumulate(self.sums[layer], attention)
        self._evict(layer)

    def _evict(self, layer: int) -> None:
        indices, sums = self.indices[layer], self.sums[layer]
        tokens = indices.shape[-1]
        if tokens <= self.budget:
            return
        latest = torch.arange(tokens, device=indices.device) >= tokens - self.store.protected
        scores = self.policy(indices, sums).masked_fill(latest, torch.inf)
        index = kept_tokens(scores, self.budget)
        self.indices[layer], self.sums[layer] = indices.gather(-1, index), sums.gather(-1, index)
        self.store.keep(layer, index)
        if self.renumber:
            places = torch.arange(self.budget, device=index.device)
            self.positions[layer] = places.expand_as(index)
