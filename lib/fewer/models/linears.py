"""Reach the linear layers of a model, and put other weights in them for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All `nn.Linear` layers by dotted name, in the model's order.

    For a `Llama` these are the seven matrices of each block. Its output layer is not among them: it
    is the embedding, used again.

    Example:
        >>> from fewer.models import tiny_llama
        >>> list(linear_layers(tiny_llama()))[:2]
        ['layers.0.self_attn.q_proj', 'layers.0.self_attn.k_proj']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def replaced_weights(
    model: nn.Module,
    transform: Callable[[str, Float[Tensor, "out in"]], Float[Tensor, "out in"]],
) -> Iterator[None]:
    """In a `with` block, each linear layer's weight W is `transform(name, W)`; then W is back.

    The original parameters are set aside, not copied, so they return bit for bit, also after an
    error. While the block runs, the memory of one more set of linear weights is in use.

    Args:
        model: any module; its linear layers are those of `linear_layers`.
        transform: gets a layer's dotted name and a copy of its weight (changing the copy in place
            is harmless), returns the weight to use, of the same shape. It is converted to the
            layer's dtype.

    Raises:
        ValueError: if `transform` returns another shape.

    Example:
        >>> from fewer.models import tiny_llama
        >>> model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
        >>> before = model(tokens)
        >>> with replaced_weights(model, lambda name, weight: weight.round()):
        ...     rounded = model(tokens)
        >>> torch.equal(rounded, before), torch.equal(model(tokens), before)
        (False, True)
    """
    layers = linear_layers(model)
    originals = {name: layer.weight for name, layer in layers.items()}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                old = originals[name]
                new = transform(name, old.detach().clone())
                if new.shape != old.shape:
                    raise ValueError(
                        f"transform must return a weight of shape {tuple(old.shape)} for {name}, "
                        f"got {tuple(new.shape)}"
                    )
                layer.weight = nn.Parameter(new.detach().to(old), requires_grad=False)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = originals[name]
