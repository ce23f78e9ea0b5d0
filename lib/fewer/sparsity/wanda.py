"""Wanda: a weight matters as much as it is large and its input is loud.

Sun, Liu, Bair & Kolter 2023, "A simple and effective pruning approach for large language models"
(arXiv 2306.11695), equation 1:

    S_ij = |W_ij| * ||X_j||_2

X_j is input j over all calibration tokens. Scores are compared within an output row (or a group of
M weights of it), never across rows: ||X_j|| says how loud the inputs are, not how much an output
counts. Nothing is updated; it is one pass over the weights.

S_ij^2 is what the output loses when W_ij alone is set to zero: the score of SparseGPT with every
correlation between inputs ignored.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.sparsity.magnitude import row_mask
from fewer.sparsity.structured import n_m_mask
from fewer.sparsity.validate import require_dims, require_finite


def wanda_scores(
    w: Float[Tensor, "out in"], x: Float[Tensor, "*batch in"]
) -> Float[Tensor, "out in"]:
    """S_ij = |W_ij| * ||X_j||_2, where X_j is input j on all the tokens of x.

    Args:
        w: [out, in], any floating type, finite.
        x: the layer's inputs, any number of leading dimensions (they are all tokens; with none, x
            is one token), finite.

    Returns:
        [out, in], float32 (float64 if w or x is), not negative.

    Raises:
        TypeError: w or x is not a floating-point tensor.
        ValueError: w or x is not finite, w is not a matrix, or they disagree on `in`.

    Example:
        >>> x = torch.tensor([[3.0, 0.1], [4.0, 0.0]])
        >>> wanda_scores(torch.tensor([[-1.0, 20.0]]), x).tolist()  # a small weight, a loud input
        [[5.0, 2.0]]
    """
    w, x = require_dims(require_finite(w, "w"), 2, "w"), require_finite(x, "x")
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x must have {w.shape[1]} features for w {tuple(w.shape)}, got shape {tuple(x.shape)}"
        )
    return w.abs() * torch.linalg.vector_norm(x.reshape(-1, w.shape[1]), dim=0)


def wanda_mask(
    w: Float[Tensor, "out in"],
    x: Float[Tensor, "*batch in"],
    sparsity: float = 0.5,
    n_m: tuple[int, int] | None = None,
) -> Bool[Tensor, "out in"]:
    """Prune each output row by Wanda's scores.

    Args:
        w: [out, in], any floating type, finite.
        x: the layer's inputs on calibration tokens, finite.
        sparsity: share of each row to prune, 0 to 1; not used with n_m.
        n_m: (n, m) keeps n of every m consecutive weights of a row, such as (2, 4).

    Returns:
        bool, [out, in], True = kept. The pruned weight is w * mask.

    Raises:
        TypeError, ValueError: as `wanda_scores`, `row_mask` and `n_m_mask`.

    Example:
        >>> w = torch.tensor([[1.0, 20.0, 3.0, 2.0]])
        >>> x = torch.tensor([[5.0, 0.1, 1.0, 1.0]])
        >>> wanda_mask(w, x, sparsity=0.5).tolist()  # magnitude would keep the second
        [[True, False, True, False]]
    """
    scores = wanda_scores(w, x)
    return row_mask(scores, sparsity) if n_m is None else n_m_mask(scores, *n_m)
