"""A key-value cache whose rows have read unequally many tokens.

Speculative decoding accepts 5 drafted tokens in one row of a batch and none in the next. The keys
of what was rejected need not be cut out, which would move the others: they become *holes*. A hole
stands at a position later than any query's, and so by the ordinary causal rule

    query at position s sees key at position t   if and only if   t <= s

nobody sees it. What fills up a short row to the length of the longest is a hole from the beginning.
Now and then the cache is compacted. (Chen et al. 2023, arXiv 2302.01318, and Leviathan et al. 2023,
arXiv 2211.17192, decode one text at a time; what a batch needs is ours.)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fewer.models import KVCache

HOLE = 2**30  # a position later than all others


def ragged_rows(
    rows: Sequence[Int[Tensor, "_"]], starts: Sequence[int]
) -> tuple[Int[Tensor, "batch longest"], Int[Tensor, "batch longest"]]:
    """Rows of unequal length as one matrix of tokens, and the positions at which to read them.

    Row i begins at position `starts[i]`. The ends of short rows are filled up with token 0 at
    position `HOLE`.

    Raises:
        ValueError: not as many starts as rows.

    Example:
        >>> tokens, positions = ragged_rows([torch.tensor([5, 6]), torch.tensor([7])], [10, 20])
        >>> tokens.tolist(), (positions == HOLE).tolist(), positions[:, 0].tolist()
        ([[5, 6], [7, 0]], [[False, False], [False, True]], [10, 20])
    """
    if len(rows) != len(starts):
        raise ValueError(f"starts must be as many as rows ({len(rows)}), got {len(starts)}")
    positions = [
        torch.arange(start, start + len(row), device=row.device)
        for row, start in zip(rows, starts, strict=True)
    ]
    return (
        pad_sequence(list(rows), batch_first=True),
        pad_sequence(positions, batch_first=True, padding_value=HOLE),
    )


def compact_order(positions: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch longest"]:
    """Where each row has its tokens, in their order; short rows are filled up with holes.

    `positions.gather(1, order)` is the smallest matrix that still has every token of every row.

    Example:
        >>> compact_order(torch.tensor([[0, 1, HOLE, 2], [0, HOLE, HOLE, HOLE]])).tolist()
        [[0, 1, 3], [0, 1, 2]]
    """
    holes = positions == HOLE
    longest = int((~holes).sum(1).amax())
    return holes.int().argsort(dim=1, stable=True)[:, :longest]


class RaggedCache(KVCache):
    """A `KVCache` with positions of its own for each row, shape (batch, tokens) in every layer.

    Read as with any cache; where rows are to read unequally many tokens, pass the positions of
    `ragged_rows`. Then `crop` or `keep` takes back what should not have been read.

    Example:
        >>> from fewer.models import tiny_llama
        >>> model, cache = tiny_llama(), RaggedCache()
        >>> _ = model(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache)
        >>> cache.crop([3, 1])  # the second row takes back two tokens
        >>> cache.next_position.tolist(), (cache.positions[0] == HOLE).tolist()
        ([[3], [1]], [[False, False, False], [False, True, True]])
    """

    @property
    def next_position(self) -> int | Int[Tensor, "batch 1"]:
        """For each row, one more than its latest position; 0 if it holds nothing."""
        if not self.positions:
            return 0
        positions = self.positions[0].where(self.positions[0] != HOLE, -1)
        return F.pad(positions, (1, 0), value=-1).amax(1, keepdim=True) + 1

    def update(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `KVCache.update`; positions may be one row for all, or a row for each."""
        keys, values, positions = super().update(
            layer, keys, values, positions.expand(len(keys), -1)
        )
        return keys, values, positions[:, None]

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget, in row i, every token at position `lengths[i]` or later."""
        if self.positions:
            ends = torch.tensor(lengths, device=self.positions[0].device)
            self.keep(self.positions[0] < ends[:, None])

    def keep(self, kept: Bool[Tensor, "batch tokens"]) -> None:
        """Forget every token that is not `kept`, in all layers."""
        positions = self.positions[0].where(kept, HOLE)
        order = compact_order(positions)
        # Columns at the end that are holes in all rows cost nothing to drop. Holes between tokens
        # stay while they are few, since to close them up moves all keys and values.
        end = int((positions != HOLE).any(0).nonzero().amax()) + 1 if order.shape[1] else 0
        if end <= 1.25 * order.shape[1] + 8:
            self.keys = [keys[..., :end, :] for keys in self.keys]
            self.values = [values[..., :end, :] for values in self.values]
            self.positions = [positions[:, :end]] * len(self.keys)
        else:
            self._gather(positions, order)

    def compact(self) -> None:
        """Close up the holes between tokens; the rows become as long as the longest."""
        self._gather(self.positions[0], compact_order(self.positions[0]))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch alone, in this order."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.positions = [self.positions[0][rows]] * len(self.keys)

    def _gather(
        self, positions: Int[Tensor, "batch tokens"], order: Int[Tensor, "batch longest"]
    ) -> None:
        def gathered(x: Tensor) -> Tensor:
            return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        self.keys = [gathered(keys) for keys in self.keys]
        self.values = [gathered(values) for values in self.values]
        self.positions = [positions.gather(1, order)] * len(self.keys)
