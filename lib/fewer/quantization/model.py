"""From a tensor to a model: quantize every linear layer, every activation, and see what it did.

Nagel et al. 2021, "A white paper on neural network quantization" (arXiv 2106.08295), section 3, for
weights and activations together; Xiao et al. 2023 (arXiv 2211.10438), section 3, for where the
activations' outliers are.

Everything here is a `with` block that changes a model and gives it back as it was, so that methods
are put together by putting one block into another:

    with rotated(model), quantized_weights(model, scheme), quantized_activations(model, quantize):
        ...

A scheme is any function from a layer's name and weight W to (W_hat, stored): the weight as it is
computed with, and the tensors that would go to disk, which is where the bits a weight come from.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor, nn

from fewer.models import replaced_weights
from fewer.models.hooks import linear_inputs, replaced_inputs
from fewer.quantization.error import relative_output_error
from fewer.quantization.granularity import dequantize_per_group, quantize_per_group
from fewer.quantization.packing import bits_per_weight, pack_codes, stored_bytes
from fewer.quantization.uniform import dequantize
from fewer.quantization.validate import require_matrix

Scheme: TypeAlias = Callable[
    [str, Float[Tensor, "out in"]], tuple[Float[Tensor, "out in"], list[Tensor]]
]


def round_to_nearest(
    w: Float[Tensor, "out in"],
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
) -> tuple[Float[Tensor, "out in"], list[Tensor]]:
    """The scheme to beat: each weight goes to the nearest code, whatever the layer's inputs are.

    Codes, scales and zero-points are those of `quantize_per_group`. Scales are then kept in float16
    and the weight is restored with the rounded ones, so what is computed is what is stored. Codes
    and zero-points are stored by `pack_codes`.

    Args:
        w: [out, in], any floating type, finite, not empty. It is not modified.
        bits: 2 to 8.
        group_size: weights of a row that share a scale; None: the whole row (per channel).
        symmetric: restricted symmetric codes, or asymmetric codes with zero-points.

    Returns:
        w_hat: [out, in], float32 (float64 for a float64 w).
        stored: a list of the packed codes (uint8, [out, ceil(in * bits / 8)]), the scales (float16,
            [out, groups]) and, if not symmetric, the packed zero-points (uint8,
            [out, ceil(groups * bits / 8)]).

    Raises:
        TypeError, ValueError: as `quantize_per_group`; and ValueError where a scale does not fit in
            float16, in which it would be infinite or zero.

    Example:
        >>> import torch
        >>> w_hat, stored = round_to_nearest(torch.tensor([[-1.0, 0.0, 0.4, 3.5]]), bits=4)
        >>> w_hat.tolist(), [tensor.tolist() for tensor in stored]
        ([[-1.0, 0.0, 0.5, 3.5]], [[[14, 113]], [[0.5]]])
    """
    w = require_matrix(w, "w")
    group_size = w.shape[1] if group_size is None else group_size
    codes, scale, zero_point = quantize_per_group(w, bits, group_size, symmetric)
    half = scale.half()
    if half.isinf().any() or (half == 0).any():
        raise ValueError(
            f"w must have scales between 6e-8 and 65504, got {scale.min():.1e} to {scale.max():.1e}"
        )
    w_hat = dequantize_per_group(codes, half.to(w.dtype), zero_point, group_size)
    stored = [pack_codes(codes, bits), half]
    return w_hat, stored if zero_point is None else [*stored, pack_codes(zero_point, bits)]


class LayerReport(NamedTuple):
    """What a scheme did to one linear layer."""

    layer: str  # dotted name
    weights: int  # how many
    stored_bytes: int  # codes, scales and all
    bits_per_weight: float  # 8 stored_bytes / weights
    output_error: float  # ||X W^T - X W_hat^T|| / ||X W^T||


@contextmanager
def quantized_weights(
    model: nn.Module, scheme: Scheme, tokens: Int[Tensor, "batch n"]
) -> Iterator[list[LayerReport]]:
    """In a `with` block, every linear layer has the weight of `scheme`; then the weights are back.

    Args:
        model: any module that maps tokens; its linear layers are those of `linear_layers`.
        scheme: from a layer's dotted name and weight to (w_hat, stored), for instance
            `lambda name, w: round_to_nearest(w, bits=4)`.
        tokens: token ids on which a layer's output error is measured. Its inputs X are those of the
            model as it is when the block begins: smoothed or rotated, not yet quantized.

    Yields:
        A report for each layer, in the model's order.

    Raises:
        ValueError: `scheme` returns a weight of another shape, or one that is not finite.

    Example:
        >>> import torch
        >>> from fewer.models import tiny_llama
        >>> model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
        >>> scheme = lambda name, w: round_to_nearest(w, bits=4)
        >>> with quantized_weights(model, scheme, tokens) as reports:
        ...     logits = model(tokens)
        >>> reports[0].layer, reports[0].stored_bytes, reports[0].bits_per_weight
        ('layers.0.self_attn.q_proj', 320, 5.0)
        >>> 0 < reports[0].output_error < 0.2
        True
    """
    inputs = linear_inputs(model, tokens)
    reports = []

    def quantize(name: str, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        w_hat, stored = scheme(name, w.clone())
        reports.append(
            LayerReport(
                name,
                w.numel(),
                stored_bytes(*stored),
                bits_per_weight(w.numel(), *stored),
                relative_output_error(w, w_hat, inputs[name]),
            )
        )
        return w_hat

    with replaced_weights(model, quantize):
        inputs.clear()  # hundreds of megabytes for a real model
        yield reports


@contextmanager
def quantized_activations(
    model: nn.Module,
    quantize: Callable[[Float[Tensor, "*tokens in"]], tuple[Tensor, ...]],
) -> Iterator[None]:
    """In a `with` block, every linear layer reads its input as quantized and restored.

    It computes X_hat W^T with X_hat = dequantize(*quantize(X)) in floating point, which is what an
    integer kernel computes, up to rounding.

    Args:
        model: any module; its linear layers are those of `linear_layers`.
        quantize: from an input [..., in] to what `dequantize` takes: codes, scale and perhaps a
            zero-point. `lambda x: quantize_symmetric(x, bits=8, dim=-1)` is dynamic, one scale a
            token; without `dim` the tensor has one.

    Example:
        >>> import torch
        >>> from fewer.models import tiny_llama
        >>> from fewer.quantization import quantize_symmetric
        >>> model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
        >>> before = model(tokens)
        >>> with quantized_activations(model, lambda x: quantize_symmetric(x, bits=8, dim=-1)):
        ...     error = (model(tokens) - before).norm() / before.norm()
        >>> 0 < error.item() < 0.1
        True
    """

    def restored(_: str, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens in"]:
        return dequantize(*quantize(x)).to(x.dtype)

    with replaced_inputs(model, restored):
        yield


class ActivationStatistics(NamedTuple):
    """How large the inputs of one linear layer are."""

    absmax: Float[Tensor, "in"]  # max |x| of each channel over the tokens
    median: float  # of absmax: a usual channel
    max: float  # of absmax: the worst channel


def activation_statistics(
    model: nn.Module, tokens: Int[Tensor, "batch n"], ignore_first: int = 0
) -> dict[str, ActivationStatistics]:
    """The largest magnitudes that each linear layer reads, a channel and in all.

    A max many times the median is an outlier channel: with one scale for all channels, 8 bits leave
    the usual channel 127 median / max steps on each side of zero.

    Args:
        model: any module that maps tokens; its linear layers are those of `linear_layers`.
        tokens: token ids.
        ignore_first: leave out the first positions of each row. SmolLM2's largest activations, of
            2,000 and more, are all those of the first token.

    Returns:
        By dotted name, in the order in which the layers are called. The median is the lower one of
        two middle values.

    Raises:
        ValueError: ignore_first is not between 0 and n - 1.

    Example:
        >>> import torch
        >>> from fewer.models import tiny_llama
        >>> statistics = activation_statistics(tiny_llama(), torch.tensor([[1, 2, 3]]))
        >>> absmax, median, largest = statistics["layers.0.mlp.down_proj"]
        >>> absmax.shape, median < largest
        (torch.Size([24]), True)
    """
    statistics = {}
    for name, x in linear_inputs(model, tokens, ignore_first).items():
        absmax = x.float().abs().amax(dim=0)
        statistics[name] = ActivationStatistics(absmax, absmax.median().item(), absmax.max().item())
    return statistics
