"""QLoRA: the frozen weights in 4 bits, the gradient passed through them, and LoRA on top.

Dettmers, Pagnoni, Holtzman & Zettlemoyer 2023, "QLoRA: Efficient finetuning of quantized LLMs"
(arXiv 2305.14314), equation 5:

    y = x dequantize(W_nf4)^T + s x A^T B^T

The base does not learn, so of its weight only the gradient of x needs anything, and a weight in 4
bits is enough to compute it:  dL/dx = dL/dy dequantize(W_nf4).  The float weight exists while one
layer computes, forward or backward, and is made again the next time.

    quantize_model_nf4(model)           # not to be undone: the float weights are gone
    attach(model, lora(model, rank=8))  # LoRA does not know the difference

QLoRA's third part, optimizer states that move to the CPU's memory when the GPU's is full, is not
here.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fewer.models import linear_layers
from fewer.peft.nf4 import NF4, dequantize_nf4, quantize_nf4


class NF4Product(torch.autograd.Function):
    """x W^T for a W in NF4, keeping for the backward pass only what is stored of W anyway.

    `F.linear(x, dequantize_nf4(...))` is the same function; but autograd would keep the float W of
    every layer until the backward pass, more than quantizing has saved.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*batch in"], shape: tuple[int, int], *stored: Tensor
    ) -> Float[Tensor, "*batch out"]:
        ctx.shape = shape
        ctx.save_for_backward(*stored)
        return F.linear(x, dequantize_nf4(NF4(*stored), shape).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "*batch out"]) -> tuple[Tensor | None, ...]:
        W = dequantize_nf4(NF4(*ctx.saved_tensors), ctx.shape)
        return gradient @ W.to(gradient.dtype), None, *[None] * len(NF4._fields)


class NF4Linear(nn.Module):
    """A linear layer with its weight in NF4, frozen for good: made from an `nn.Linear`.

    Its bias is the one of the linear layer, which keeps its own weight and can be thrown away.

    Attributes:
        weight: the float weight, [out, in], made anew each time it is read, in the dtype of the
            linear layer. There is nothing to train or to assign.

    Raises:
        TypeError: made from something else than an `nn.Linear`.

    Example:
        >>> layer = NF4Linear(nn.Linear(512, 512, bias=False))
        >>> layer(torch.zeros(3, 512)).shape, model_bytes(layer), 512 * 512 * 4
        (torch.Size([3, 512]), 135236, 1048576)
    """

    packed: Tensor
    absmax_codes: Tensor
    absmax_scale: Tensor
    absmax_mean: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        for name, tensor in quantize_nf4(linear.weight)._asdict().items():
            self.register_buffer(name, tensor)
        self.train(linear.training)

    @property
    def stored(self) -> NF4:
        return NF4(self.packed, self.absmax_codes, self.absmax_scale, self.absmax_mean)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        return dequantize_nf4(self.stored, (self.out_features, self.in_features)).to(self.dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = NF4Product.apply(x, (self.out_features, self.in_features), *self.stored)
        return y if self.bias is None else y + self.bias


def quantize_model_nf4(model: nn.Module) -> None:
    """Replace every `nn.Linear` inside a model by an `NF4Linear`, for good.

    The float weights are released, which is the point; so it cannot be undone. Load the model
    again, or quantize a copy. Embeddings and norms stay as they are, as in the paper. A head that
    is to be trained must stay a float layer: quantize the model without it (`classifier.body`).

    Raises:
        ValueError: the model has no linear layer inside it, or is one.

    Example:
        >>> from fewer.models import tiny_llama
        >>> model = tiny_llama(d_model=64, d_ffn=256)
        >>> before = model_bytes(model)
        >>> quantize_model_nf4(model)
        >>> before, model_bytes(model)
        (460032, 74800)
    """
    layers = linear_layers(model)
    if not layers or "" in layers:
        raise ValueError(f"model must have linear layers inside it, got {type(model).__name__}")
    for name in list(layers):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, NF4Linear(layers.pop(name)))


def model_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters and buffers; what two modules share counts once.

    Example:
        >>> model_bytes(nn.Linear(4, 3))  # float32: 4 * (12 + 3)
        60
    """
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


class TrainingMemory(NamedTuple):
    """Bytes that training needs besides activations."""

    weights: int
    gradients: int
    optimizer: int


def training_memory(
    trained: int,
    frozen: int = 0,
    trained_bits: int = 32,
    frozen_bits: float = 32,
    states: int = 2,
    state_bits: int = 32,
) -> TrainingMemory:
    """What the weights, their gradients and the optimizer's states take, in bytes of 8 bits.

    All weights are stored. Only the trained ones have a gradient (of their own type) and states.
    Activations come on top: they depend on the batch, not on how many weights are trained. Each of
    the three numbers is rounded to whole bytes, up or down.

    Args:
        trained: how many weights are trained.
        frozen: how many are not.
        trained_bits: of a trained weight, and of its gradient.
        frozen_bits: of a frozen weight: 16, or `nf4_bits()`.
        states: numbers that the optimizer keeps for a trained weight: 2 for Adam, 1 for SGD with
            momentum, 0 for plain SGD.
        state_bits: of such a number.

    Returns:
        a `TrainingMemory`: weights, gradients, optimizer.

    Example:
        >>> sum(training_memory(trained=65_000_000_000, trained_bits=16)) / 1e9  # LLaMA 65B
        780.0
        >>> qlora = training_memory(trained=400_000_000, frozen=65_000_000_000, frozen_bits=4.127)
        >>> [number / 1e9 for number in qlora]  # GB
        [35.1, 1.6, 3.2]
    """
    return TrainingMemory(
        weights=round((trained * trained_bits + frozen * frozen_bits) / 8),
        gradients=round(trained * trained_bits / 8),
        optimizer=round(trained * states * state_bits / 8),
    )


def measured_memory(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingMemory:
    """The same three, counted from the tensors that are there after an optimizer step.

    PyTorch's Adam also counts its steps, in 4 bytes a parameter tensor: `training_memory` does not.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> measured_memory(model, optimizer) == training_memory(trained=15, states=0)
        True
    """
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return TrainingMemory(
        weights=model_bytes(model),
        gradients=sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        optimizer=sum(value.nbytes for value in kept if isinstance(value, Tensor)),
    )
