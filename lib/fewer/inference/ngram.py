"""A model of n-grams as the draft: it counts, and costs next to nothing.

Leviathan et al. 2023 (arXiv 2211.17192), section 3.6, name n-gram models as drafts of negligible
cost; Ou et al. 2024 (arXiv 2404.08698) count while the text is written, as here. With #(c x) for
how often x followed the context c,

    q(x | text) = #(c x) / #(c)     with c the longest end of the text that was seen before,

at most `order` - 1 tokens long: where a context is new, back off to a shorter one. (Estimates that
give something to unseen tokens have better perplexity. A draft loses nothing by zeros in q: what it
never proposes, the residual distribution makes up.)
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.inference.speculative import Proposal
from fewer.validate import require_int

Counts = dict[tuple[int, ...], Counter[int]]


def ngram_counts(text: Sequence[int], order: int) -> Counts:
    """For every context of 0 to order - 1 tokens in the text, how often each token followed it.

    Example:
        >>> counts = ngram_counts([1, 2, 1, 3, 1, 2], order=2)
        >>> sorted(counts[(1,)].items()), sorted(counts[()].items())
        ([(2, 2), (3, 1)], [(1, 3), (2, 2), (3, 1)])
    """
    counts: Counts = {}
    _count(counts, text, 0, order)
    return counts


def _count(counts: Counts, text: Sequence[int], start: int, order: int) -> None:
    """Count the tokens from `start` on."""
    for i in range(start, len(text)):
        for n in range(min(i, order - 1) + 1):
            counts.setdefault(tuple(text[i - n : i]), Counter())[text[i]] += 1


def backoff(
    text: Sequence[int], order: int, *tables: Mapping[tuple[int, ...], Counter[int]]
) -> Counter[int]:
    """What has followed the longest end of the text that any table knows; the tables' counts add.

    Empty if nothing was ever counted.

    Example:
        >>> backoff([7, 1], 3, ngram_counts([1, 2, 1, 3, 1, 2], order=3))  # (7, 1) is unknown
        Counter({2: 2, 3: 1})
    """
    for n in range(min(len(text), order - 1), -1, -1):
        context = tuple(text[len(text) - n :])
        found = sum((table.get(context, Counter()) for table in tables), Counter[int]())
        if found:
            return found
    return Counter()


class NGramDraft:
    """Proposes what has mostly followed, in the text so far and in a training text.

    Args:
        order: n, 2 or more: contexts have up to n - 1 tokens.
        length: tokens to propose.
        vocab: size of the vocabulary.
        greedy: propose the token counted most often (of equals the first seen), sure of it; else
            draw from q.
        training: token ids of a text to count beforehand.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> draft = NGramDraft(order=3, length=4, vocab=10)
        >>> draft(torch.tensor([1, 2, 3, 1, 2, 3, 1])).tokens.tolist()
        [2, 3, 1, 2]
    """

    def __init__(
        self,
        order: int = 4,
        length: int = 8,
        *,
        vocab: int,
        greedy: bool = True,
        training: Sequence[int] = (),
    ) -> None:
        self.order, self.length = require_int(order, "order", 2), require_int(length, "length", 1)
        self.vocab, self.greedy = require_int(vocab, "vocab", 1), greedy
        self.trained = ngram_counts(training, order)
        self.read: list[int] = []
        self.counts: Counts = {}

    def __call__(
        self, text: Int[Tensor, "tokens"], generator: torch.Generator | None = None
    ) -> Proposal:
        """Count what is new in the text, then propose."""
        said = text.tolist()
        if said[: len(self.read)] != self.read:  # another text
            self.read, self.counts = [], {}
        _count(self.counts, said, len(self.read), self.order)
        self.read = list(said)
        rows = []
        for _ in range(self.length):
            followed = backoff(said, self.order, self.counts, self.trained)
            if self.greedy:
                said.append(max(followed, key=followed.__getitem__))
            else:
                rows.append(self.probabilities(followed).to(text.device))
                said.append(int(torch.multinomial(rows[-1], 1, generator=generator)))
        tokens = torch.tensor(said[len(text) :], device=text.device)
        return Proposal(tokens, None if self.greedy else torch.stack(rows))

    def probabilities(self, followed: Counter[int]) -> Float[Tensor, "vocab"]:
        """The counts as a distribution over the vocabulary."""
        q = torch.zeros(self.vocab)
        q[list(followed)] = torch.tensor(list(followed.values()), dtype=q.dtype)
        return q / q.sum()
