"""See and change what goes into the linear layers of a model, for as long as a `with` block lasts.

Beside `linears`, which changes their weights. Each block undoes itself at its end, so blocks nest:
rotate in the outer one, quantize in the inner one.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewer.models.linears import linear_layers


@contextmanager
def replaced_inputs(
    model: nn.Module,
    transform: Callable[[str, Float[Tensor, "*tokens in"]], Float[Tensor, "*tokens in"]],
) -> Iterator[None]:
    """In a `with` block, each linear layer reads `transform(name, x)` in place of its input x.

    Blocks nest: the transform of an outer block is applied first. To look without changing, return
    x itself.

    Args:
        model: any module; its linear layers are those of `linear_layers`.
        transform: gets a layer's dotted name and its input [..., in], returns what the layer is to
            read. Layers may share an input (q_proj, k_proj and v_proj do): it must not change x in
            place.

    Example:
        >>> from fewer.models import tiny_llama
        >>> model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
        >>> before = model(tokens)
        >>> with replaced_inputs(model, lambda name, x: x.round()):
        ...     rounded = model(tokens)
        >>> torch.equal(rounded, before), torch.equal(model(tokens), before)
        (False, True)
    """
    with ExitStack() as stack:
        for name, layer in linear_layers(model).items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> Tensor:
                return transform(name, args[0])

            stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def replaced_products(
    model: nn.Module,
    product: Callable[
        [str, Float[Tensor, "*tokens in"], Float[Tensor, "out in"]], Float[Tensor, "*tokens out"]
    ],
) -> Iterator[None]:
    """In a `with` block, each linear layer computes `product(name, x, W)` in place of x W^T.

    For methods that cannot be told apart into a change of x and a change of W, such as one that
    decides by the values of x which columns of W to quantize. A layer's bias, where it has one, is
    added afterwards. Blocks do not nest: the inner one wins.

    Args:
        model: any module; its linear layers are those of `linear_layers`.
        product: gets a layer's dotted name, its input [..., in] and its weight [out, in]; returns
            [..., out].

    Example:
        >>> from fewer.models import tiny_llama
        >>> model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
        >>> with replaced_products(model, lambda name, x, w: x @ w.T):
        ...     by_hand = model(tokens)
        >>> torch.allclose(by_hand, model(tokens), atol=1e-5)
        True
    """
    with ExitStack() as stack:
        for name, layer in linear_layers(model).items():

            def forward(x: Tensor, name: str = name, layer: nn.Linear = layer) -> Tensor:
                y = product(name, x, layer.weight)
                return y if layer.bias is None else y + layer.bias

            before = vars(layer).get("forward")  # of an outer block; usually the class has it
            vars(layer)["forward"] = forward
            if before is None:
                stack.callback(vars(layer).pop, "forward")
            else:
                stack.callback(vars(layer).__setitem__, "forward", before)
        yield


@torch.no_grad()
def linear_inputs(
    model: nn.Module, tokens: Int[Tensor, "batch n"], ignore_first: int = 0
) -> dict[str, Float[Tensor, "tokens in"]]:
    """What each linear layer reads while the model reads `tokens`, one row a token.

    Layers that read the same tensor share its memory here too, so do not change one in place. For
    SmolLM2 they take 0.4 MB a token in float32: some hundred tokens are a good number.

    Args:
        model: maps tokens to anything; each of its linear layers must be called exactly once.
        tokens: token ids.
        ignore_first: leave out the first positions of each row, 0 to n - 1. The first token of a
            text carries activations a thousand times the usual (Sun et al. 2024, "Massive
            activations", arXiv 2402.17762).

    Returns:
        By dotted name, in the order of the calls: [batch * (n - ignore_first), in], the dtype of
        the activations.

    Raises:
        ValueError: ignore_first is out of range.

    Example:
        >>> from fewer.models import tiny_llama
        >>> inputs = linear_inputs(tiny_llama(), torch.tensor([[1, 2, 3], [4, 5, 6]]))
        >>> inputs["layers.1.mlp.down_proj"].shape
        torch.Size([6, 24])
    """
    if not 0 <= ignore_first < tokens.shape[1]:
        raise ValueError(
            f"ignore_first must be between 0 and {tokens.shape[1] - 1}, got {ignore_first}"
        )
    inputs = {}

    def record(name: str, x: Tensor) -> Tensor:
        inputs[name] = x[:, ignore_first:].flatten(0, -2)
        return x

    with replaced_inputs(model, record):
        model(tokens)
    return inputs
