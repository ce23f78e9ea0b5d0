"""Attention sinks: where a head looks that has nothing to look for.

Xiao et al. 2023, "Efficient streaming language models with attention sinks" (arXiv 2309.17453),
section 3.1. Attention weights sum to 1, so a head that finds nothing it wants must still look
somewhere. Trained models learn to look at the first token, which every query can see, and to make
its value short, so that looking there adds next to nothing to the stream.

Miller 2023, "Attention is off by one" (https://www.evanmiller.org/attention-is-off-by-one.html),
would let a head look nowhere, with a 1 in the denominator:

    softmax_1(x)_i = exp(x_i) / (1 + sum_j exp(x_j))

It is a softmax beside one more key whose score is always 0 and whose value is zero. A model must be
trained with it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.models.llama import KVCache, Llama
from fewer.validate import require_floating


def softmax_off_by_one(scores: Float[Tensor, "*rows tokens"]) -> Float[Tensor, "*rows tokens"]:
    """softmax_1(x)_i = exp(x_i) / (1 + sum_j exp(x_j)), along the last dimension.

    Args:
        scores: [..., tokens]. -inf hides a token; a row of nothing else gives zeros. Large scores
            do not overflow.

    Returns:
        The shape and type of scores. A row sums to less than 1 (in floating point, to 1 at most),
        and to nearly 0 where all its scores are far below 0.

    Raises:
        TypeError: scores are not of a floating type.

    Example:
        >>> softmax_off_by_one(torch.tensor([[0.0, 0.0], [-20.0, -20.0]])).sum(-1).tolist()
        [0.6666..., 4.122...e-09]
    """
    require_floating(scores, "scores")
    # Both halves of the fraction times exp(-m), with the largest score m, the unseen 0 included.
    m = scores.amax(dim=-1, keepdim=True).clamp(min=0)
    e = (scores - m).exp()
    return e / ((-m).exp() + e.sum(dim=-1, keepdim=True))


class _FirstToken(KVCache):
    """Notes how much attention each head gives to the first token, on average over the queries."""

    observes = True

    def __init__(self, skip: int) -> None:
        super().__init__()
        self.skip = skip
        self.by_layer: list[Tensor] = []

    def observe(
        self, layer: int, attention: Float[Tensor, "batch kv_heads group new tokens"]
    ) -> None:
        self.by_layer.append(attention[..., self.skip :, 0].mean(dim=(0, 3)).flatten())


@torch.no_grad()
def first_token_attention(
    model: Llama, tokens: Int[Tensor, "batch n"], skip: int = 1
) -> Float[Tensor, "layers heads"]:
    """How much of its attention each head gives to the first token.

    Args:
        model: read once, whole; attention of all queries to all tokens is made, a layer at a time.
        tokens: texts of equal length.
        skip: so many first queries are left out of the mean, 0 to n - 1: early ones have little
            else to look at. Spread evenly, a query at position t would give 1 / (t + 1).

    Returns:
        Between 0 and 1: the mean over texts and queries, of every query head.

    Raises:
        ValueError: skip is out of its range.

    Example:
        >>> from fewer.models import tiny_llama
        >>> first_token_attention(tiny_llama(), torch.tensor([[1, 2, 3, 4]])).shape
        torch.Size([2, 4])
    """
    if not 0 <= skip < tokens.shape[1]:
        raise ValueError(f"skip must be between 0 and {tokens.shape[1] - 1}, got {skip}")
    cache = _FirstToken(skip)
    model.hidden(tokens, cache)
    return torch.stack(cache.by_layer)


@torch.no_grad()
def first_value_norm(model: Llama, tokens: Int[Tensor, "batch n"]) -> Float[Tensor, "layers"]:
    """The length of the first token's value, beside the mean length of the others', by layer.

    Far below 1, attention to it moves the stream little: looking there is looking away.

    Args:
        model: read once, whole.
        tokens: texts of equal length, of at least 2 tokens.

    Returns:
        A ratio for every layer, each length being the mean over texts and heads.

    Example:
        >>> from fewer.models import tiny_llama
        >>> first_value_norm(tiny_llama(), torch.tensor([[1, 2, 3, 4]])).shape
        torch.Size([2])
    """
    cache = KVCache()
    model.hidden(tokens, cache)
    lengths = torch.stack(cache.values).norm(dim=-1).mean(dim=(1, 2))  # [layers, tokens]
    return lengths[:, 0] / lengths[:, 1:].mean(dim=1)
