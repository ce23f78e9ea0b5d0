"""LLM.int8(): multiply in int8, except for the few features whose values are far out.

Dettmers, Lewis, Belkada & Zettlemoyer 2022, "LLM.int8(): 8-bit matrix multiplication for
transformers at scale" (arXiv 2208.07339), section 3.

    Y  =  sum_{h in O} X[:, h] W[:, h]^T   +   S_x S_w  sum_{h not in O} X_int8[:, h] W_int8[:, h]^T

O (`outlier_features`) holds the features, columns of X, with a value of magnitude 6 or more. The
paper finds at most 7 of them in models of up to 13B parameters, about 0.1% of the features; left
in, they would give a token a scale many times larger than its other values deserve. The rest is the
int8 product with a scale for each token and each output channel ("vector-wise").

X decides, not W: which features are kept is known only when X is there, batch by batch.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.quantization.activations import matmul_int8
from fewer.quantization.uniform import quantize_symmetric
from fewer.quantization.validate import require_finite, require_matrix


def outlier_features(x: Float[Tensor, "*tokens in"], threshold: float = 6.0) -> Bool[Tensor, "in"]:
    """The features (columns) of X in which some token has |x| >= threshold.

    Args:
        x: [..., in], any floating type, finite, not empty; all leading dimensions count as tokens.
        threshold: 0 or more, in the unit of x; a value equal to it is an outlier. 0 makes every
            feature one, `math.inf` none.

    Returns:
        bool, [in].

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x is 0-d, empty or holds NaN or infinity; threshold is negative or NaN.

    Example:
        >>> outlier_features(torch.tensor([[1.0, -6.0, 5.9], [2.0, 0.0, 0.1]])).tolist()
        [False, True, False]
    """
    x = require_finite(x, "x")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a 0-d tensor")
    if not threshold >= 0:
        raise ValueError(f"threshold must be 0 or more, got {threshold}")
    return (x.abs() >= threshold).reshape(-1, x.shape[-1]).any(dim=0)


def matmul_llm_int8(
    x: Float[Tensor, "*tokens in"],
    w: Float[Tensor, "out in"],
    threshold: float = 6.0,
) -> tuple[Float[Tensor, "*tokens out"], float]:
    """X W^T with the outlier features in full precision and the rest in int8.

    The features are split by `outlier_features`. Both matrices are then quantized symmetrically to
    8 bits *without* the outlier features, X with one scale a token and W with one an output
    channel, so that no outlier has a say in any scale; `matmul_int8` multiplies them. The outlier
    features of X and W are multiplied as they are, and the two products are added.

    Args:
        x: [..., in], any floating type, finite, not empty; all leading dimensions count as tokens.
        w: [out, in], as a linear layer stores its weight; finite, not empty.
        threshold: as in `outlier_features`.

    Returns:
        y: [..., out], float32 (float64 where x or w is float64).
        kept: the fraction of features kept in full precision, between 0 and 1.

    Raises:
        TypeError: x or w is not a floating-point tensor.
        ValueError: x is 0-d, w is not a matrix, `in` differs, one is empty or holds NaN or
            infinity; threshold is negative or NaN.

    Example:
        >>> x, w = torch.tensor([[0.0, 100.0, 0.5, 1.0]]), torch.ones(1, 4)
        >>> matmul_llm_int8(x, w)  # 1.5 from codes 64 and 127, scale 1 / 127; 100 as it is
        (tensor([[101.5039]]), 0.25)
    """
    x, w = require_finite(x, "x"), require_matrix(w, "w")
    outlier = outlier_features(x, threshold)
    if len(outlier) != w.shape[1]:
        raise ValueError(
            f"x [..., in] and w [out, in] must agree on in, got {len(outlier)} and {w.shape[1]}"
        )
    dtype = torch.promote_types(x.dtype, w.dtype)
    rows, w = x.reshape(-1, x.shape[-1]).to(dtype), w.to(dtype)
    y = rows[:, outlier] @ w[:, outlier].T
    if not outlier.all():
        x_parts = quantize_symmetric(rows[:, ~outlier], dim=-1)
        w_parts = quantize_symmetric(w[:, ~outlier], dim=-1)
        y = y + matmul_int8(*x_parts, *w_parts)
    return y.reshape(*x.shape[:-1], -1), outlier.double().mean().item()
