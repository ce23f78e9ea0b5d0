"""SmoothQuant: move the outliers of the activations into the weights, where they do less harm.

Xiao, Lin, Seznec, Wu, Demouth & Han 2023, "SmoothQuant: Accurate and efficient post-training
quantization for large language models" (arXiv 2211.10438), equations 3 and 4.

    Y = (X diag(s)^-1) (diag(s) W^T),    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

X_j is input channel j over calibration tokens, W_j the column of the weight that meets it. With
alpha = 1 every channel of X / s has maximum 1 and the weight carries all of the difficulty; with
alpha = 0 it is the other way round. In between both are a little hard. A scale a token or a tensor
of X cannot do this, since it cannot depend on j and leave the sum (see `activations`).

Dividing X costs nothing where the layer before can do it (`fold_scales`). The RMSNorm before
q_proj, k_proj and v_proj divides its weight by an s that the three share, the one before gate_proj
and up_proj by one that those two share. The input of down_proj, SiLU(gate) * up, is linear in up,
so each output row of up_proj is divided: the paper smooths behind norms only, but in SwiGLU models
the worst outliers are down_proj's. o_proj is left as it is: with grouped queries one value channel
feeds several of its inputs, which would have to share one s_j.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewer.models import Llama
from fewer.models.hooks import linear_inputs
from fewer.quantization.error import sqnr
from fewer.quantization.uniform import dequantize, quantize_symmetric
from fewer.quantization.validate import require_finite, require_matrix, require_same_shape


def smoothing_scales(
    x_absmax: Float[Tensor, "in"], w_absmax: Float[Tensor, "in"], alpha: float = 0.5
) -> Float[Tensor, "in"]:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), what channel j of W takes over from X.

    Args:
        x_absmax: [in], max|X_j| over calibration tokens, 0 or more.
        w_absmax: [in], max|W_j| over the output channels of all layers that read X, 0 or more.
        alpha: the migration strength, between 0 and 1. 0.5 in the paper for most models.

    Returns:
        s, [in], positive, float32 (float64 where x_absmax or w_absmax is). A channel that is all
        zeros in X or in W gets 1: there is nothing to balance.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes differ, a value is negative, NaN or infinite, alpha is out of range.

    Example:
        >>> x_absmax, w_absmax = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 2.0])
        >>> smoothing_scales(x_absmax, w_absmax, alpha=0.5).tolist()
        [4.0, 0.5, 1.0]
    """
    x_absmax, w_absmax = require_finite(x_absmax, "x_absmax"), require_finite(w_absmax, "w_absmax")
    require_same_shape(x_absmax, w_absmax, "x_absmax and w_absmax")
    if (x_absmax < 0).any() or (w_absmax < 0).any():
        raise ValueError("x_absmax and w_absmax must not be negative")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    s = x_absmax**alpha / w_absmax ** (1 - alpha)
    return torch.where((x_absmax == 0) | (w_absmax == 0), 1.0, s)


def search_alpha(
    x: Float[Tensor, "tokens in"],
    w: Float[Tensor, "out in"],
    alphas: list[float],
    bits: int = 8,
    per_token: bool = False,
) -> float:
    """The alpha with the least error of the layer's output, X and W smoothed and then quantized.

    For each alpha: s = `smoothing_scales` of the largest magnitudes of the columns of x and w;
    x / s is quantized symmetrically, with one scale for the tensor or one a token; w * s with one
    scale an output channel. The error is that of x_hat w_hat^T against x w^T.

    Args:
        x: [tokens, in], the layer's input on calibration tokens.
        w: [out, in]; where several layers read x, their weights below each other.
        alphas: candidates between 0 and 1, at least one.
        bits: 2 to 8, of both x and w.
        per_token: one scale a token in place of one for all of x.

    Returns:
        The best of `alphas`; the first of equally good ones.

    Raises:
        TypeError: x or w is not a floating-point tensor.
        ValueError: x or w is not a matrix, is empty, holds NaN or infinity, or the shapes do not
            fit; alphas is empty or holds one out of range; bits out of range.

    Example:
        >>> x = torch.tensor([[1.0, 50.0], [-0.9, 40.0]])
        >>> w = torch.tensor([[1.0, 0.1], [0.9, 0.2]])
        >>> search_alpha(x, w, alphas=[0.0, 0.5, 1.0])
        0.5
    """
    x, w = require_matrix(x, "x"), require_matrix(w, "w")
    if len(alphas) == 0:
        raise ValueError("alphas must hold at least one candidate, got none")
    y, qualities = x @ w.T, []
    for alpha in alphas:
        s = smoothing_scales(x.abs().amax(dim=0), w.abs().amax(dim=0), alpha)
        x_hat = dequantize(*quantize_symmetric(x / s, bits, dim=-1 if per_token else None))
        w_hat = dequantize(*quantize_symmetric(w * s, bits, dim=-1))
        qualities.append(sqnr(y, x_hat @ w_hat.T))
    return alphas[qualities.index(max(qualities))]


def fold_scales(
    s: Float[Tensor, "in"],
    producer: Float[Tensor, "in *rest"],
    consumers: list[Float[Tensor, "out in"]],
) -> tuple[Float[Tensor, "in *rest"], list[Float[Tensor, "out in"]]]:
    """Put 1/s into the layer that makes X and s into the weights of the layers that read it.

    Args:
        s: [in], positive.
        producer: the weight that X is linear in: a norm's [in], or a linear layer's [in, d], whose
            output row j is X_j.
        consumers: the weights of *all* layers that read X, each [out, in] with an `out` of its own.

    Returns:
        The new producer, X_j now X_j / s_j, and a list of the new consumers in the same order, so
        that what the consumers compute is what it was. float32 (float64 where an argument is). The
        arguments are not modified.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: s is not positive, an argument holds NaN or infinity, or a shape does not fit.

    Example:
        >>> s, norm, w = torch.tensor([4.0, 0.5]), torch.ones(2), torch.ones(1, 2)
        >>> norm, [w] = fold_scales(s, norm, [w])
        >>> norm.tolist(), w.tolist()
        ([0.25, 2.0], [[4.0, 0.5]])
    """
    s = require_finite(s, "s")
    if s.ndim != 1 or (s <= 0).any():
        raise ValueError(f"s must be a vector of positive numbers, got shape {tuple(s.shape)}")
    producer = require_finite(producer, "producer")
    consumers = [require_matrix(w, "consumers") for w in consumers]
    if producer.shape[:1] != s.shape or any(w.shape[1:] != s.shape for w in consumers):
        raise ValueError(
            f"producer [in, ...] and consumers [out, in] must agree with s on in = {len(s)}, "
            f"got {[tuple(w.shape) for w in (producer, *consumers)]}"
        )
    return producer / s.reshape(-1, *[1] * (producer.ndim - 1)), [w * s for w in consumers]


def smoothing_groups(model: Llama) -> dict[str, list[str]]:
    """Which layers can be smoothed: the name of the producer, and those of all its consumers.

    Example:
        >>> from fewer.models import tiny_llama
        >>> for producer, consumers in smoothing_groups(tiny_llama(n_layers=1)).items():
        ...     print(producer.split(".", 2)[2], [name.split(".")[-1] for name in consumers])
        input_layernorm ['q_proj', 'k_proj', 'v_proj']
        post_attention_layernorm ['gate_proj', 'up_proj']
        mlp.up_proj ['down_proj']
    """
    groups = {}
    for i in range(len(model.layers)):
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        groups[f"layers.{i}.input_layernorm"] = [f"{attention}.{part}_proj" for part in "qkv"]
        groups[f"layers.{i}.post_attention_layernorm"] = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        groups[f"{mlp}.up_proj"] = [f"{mlp}.down_proj"]
    return groups


def calibrate_smoothing(
    model: Llama,
    tokens: Int[Tensor, "batch n"],
    alphas: list[float] | None = None,
    bits: int = 8,
    per_token: bool = False,
) -> dict[str, Float[Tensor, "in"]]:
    """The s of every group of `smoothing_groups`, each with the alpha that suits it best.

    Args:
        model: the unquantized model.
        tokens: calibration tokens; they should not come from the text of the evaluation.
        alphas: candidates for `search_alpha`: 0, 0.1, ... 1 by default. With a single one there is
            nothing to search.
        bits, per_token: how `search_alpha` is to quantize.

    Returns:
        By the producer's name: s, [in], for `smoothed`.
    """
    alphas = [step / 10 for step in range(11)] if alphas is None else alphas
    inputs = linear_inputs(model, tokens)
    scales = {}
    for producer, consumers in smoothing_groups(model).items():
        x = inputs[consumers[0]]
        w = torch.cat([model.get_parameter(f"{name}.weight") for name in consumers])
        alpha = alphas[0] if len(alphas) == 1 else search_alpha(x, w, alphas, bits, per_token)
        scales[producer] = smoothing_scales(x.abs().amax(dim=0), w.abs().amax(dim=0), alpha)
    return scales


@contextmanager
def smoothed(model: Llama, scales: Mapping[str, Float[Tensor, "in"]]) -> Iterator[None]:
    """In a `with` block, the model has the scales folded into its weights; then they are back.

    The model's function stays what it was, up to rounding. What an inner block quantizes, weights
    or inputs, is smoothed. The original parameters are set aside, not copied, and return bit for
    bit, also after an error.

    Args:
        model: a `Llama`.
        scales: from `calibrate_smoothing`, or a part of it: groups that are left out stay as they
            are.

    Raises:
        ValueError: a name that is no producer of `smoothing_groups`, or scales of a wrong shape.

    Example:
        >>> from fewer.models import tiny_llama
        >>> model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
        >>> before = model(tokens)
        >>> with smoothed(model, calibrate_smoothing(model, tokens, alphas=[0.5])):
        ...     torch.allclose(model(tokens), before, atol=1e-4)
        True
    """
    groups = smoothing_groups(model)
    if unknown := scales.keys() - groups.keys():
        raise ValueError(f"scales must be of the model's smoothing groups, got {sorted(unknown)}")
    originals: dict[str, nn.Parameter] = {}
    try:
        for producer, s in scales.items():
            names = [producer, *groups[producer]]
            old = [model.get_parameter(f"{name}.weight") for name in names]
            first, rest = fold_scales(s, old[0], [*old[1:]])
            for name, before, after in zip(names, old, [first, *rest], strict=True):
                originals.setdefault(name, before)  # up_proj is a consumer, then a producer
                weight = nn.Parameter(after.to(before.dtype), requires_grad=False)
                model.get_submodule(name).weight = weight
        yield
    finally:
        for name, before in originals.items():
            model.get_submodule(name).weight = before
