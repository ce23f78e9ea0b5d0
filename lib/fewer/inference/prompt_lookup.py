"""Prompt lookup: the text so far is the draft of what comes next.

Saxena 2023, "Prompt lookup decoding" (https://github.com/apoorvumang/prompt-lookup-decoding); also
in transformers. Who rewrites, summarises or corrects a text says again what stands in it. So take
the last n tokens, find where they have stood before, and propose what followed there:

    draft = text[i + n : i + n + k]     with the first i where text[i : i + n] = text[-n:],

with the largest n <= longest that is found. It costs no model and no training.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from fewer.inference.speculative import Proposal
from fewer.validate import require_int


def look_up(text: Int[Tensor, "tokens"], length: int, longest: int) -> Int[Tensor, "k"]:
    """What followed when the end of the text stood in it before.

    Args:
        text: token ids.
        length: tokens to propose at most, 1 or more.
        longest: match at most this many tokens at the end of the text, 1 or more. Longer matches
            are tried first; of equally long ones the first in the text is taken. A match may
            overlap the end of the text.

    Returns:
        At most `length` tokens, fewer where the text ends before; none if the last token of the
        text is new to it.

    Raises:
        TypeError: length or longest is not an int.
        ValueError: text is no vector, or length or longest is less than 1.

    Example:
        >>> look_up(torch.tensor([1, 2, 3, 4, 9, 2, 3]), length=2, longest=3).tolist()
        [4, 9]
    """
    if text.ndim != 1:
        raise ValueError(f"text must be a vector of token ids, got shape {tuple(text.shape)}")
    require_int(length, "length", 1)
    for n in range(min(require_int(longest, "longest", 1), len(text) - 1), 0, -1):
        # The last n tokens themselves are no match: nothing follows them yet.
        stretches = text[:-1].unfold(0, n, 1)
        found = (stretches == text[-n:]).all(1).nonzero()
        if len(found):
            begin = int(found[0]) + n
            return text[begin : begin + length]
    return text[:0]


def prompt_lookup(
    text: Int[Tensor, "tokens"],
    generator: torch.Generator | None = None,
    *,
    length: int = 10,
    longest: int = 3,
) -> Proposal:
    """`look_up` as a draft: `speculate(model, tokens, prompt_lookup, ...)`.

    For other lengths: `functools.partial(prompt_lookup, length=20)`. Nothing random is in it.

    Example:
        >>> prompt_lookup(torch.tensor([5, 6, 7, 5])).tokens.tolist()
        [6, 7, 5]
    """
    return Proposal(look_up(text, length, longest))
