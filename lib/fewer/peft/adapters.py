"""Adapters: a small bottleneck after each part of a layer, or beside it.

Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP" (arXiv 1902.00751), section
2.1: after attention and after the feed-forward part, before what they write is added to the stream,

    h <- h + W_up f(W_down h + b_down) + b_up,     W_down [m, d],  W_up [d, m],  m << d

W_up and b_up start at zero here, so that the model starts as it was (the paper starts them near
zero). An adapter has 2 d m + d + m trained numbers, and a layer two of them.

He et al. 2022, "Towards a unified view of parameter-efficient transfer learning" (arXiv
2110.04366), section 4.6, puts it *beside* the feed-forward part instead: it reads x, what that part
reads, and adds to what it writes, times s (4 in the paper):

    ffn(x) + s (W_up f(W_down x + b_down) + b_up)

f is ReLU in the parallel adapter and in most implementations of both. An adapter has a nonlinearity
between its two matrices, so it cannot be merged: it costs time at inference. (LoRA is what is left
of the parallel one without f.)
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fewer.peft.attach import Wrap


def bottleneck(
    h: Float[Tensor, "*batch d"],
    w_down: Float[Tensor, "m d"],
    b_down: Float[Tensor, "m"],
    w_up: Float[Tensor, "d m"],
    b_up: Float[Tensor, "d"],
) -> Float[Tensor, "*batch d"]:
    """W_up ReLU(W_down h + b_down) + b_up, what an adapter adds to h.

    Args:
        h: [..., d], any number of leading dimensions, or none.
        w_down, b_down: [m, d] and [m], into the bottleneck.
        w_up, b_up: [d, m] and [d], out of it.

    Returns:
        [..., d], without h itself.

    Raises:
        ValueError: shapes that do not fit together, biases of one number for all included.

    Example:
        >>> h = torch.tensor([[1.0, -2.0]])
        >>> bottleneck(h, torch.eye(2), torch.zeros(2), torch.eye(2), torch.ones(2)).tolist()
        [[2.0, 1.0]]
    """
    m, d = w_down.shape
    if (h.shape[-1:], b_down.shape, w_up.shape, b_up.shape) != ((d,), (m,), (d, m), (d,)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (h, w_down, b_down, w_up, b_up))
        raise ValueError(f"shapes must be [..., d], [m, d], [m], [d, m] and [d], got {shapes}")
    return F.linear(F.relu(F.linear(h, w_down, b_down)), w_up, b_up)


class Adapter(nn.Module):
    """A bottleneck after a module (sequential) or beside it (parallel)."""

    def __init__(
        self,
        base: nn.Module,
        d: int,
        bottleneck_width: int,
        generator: torch.Generator,
        parallel: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.base, self.parallel, self.scale = base, parallel, scale
        like, m = next(base.parameters()), bottleneck_width
        first = torch.randn(m, d, generator=generator) / math.sqrt(d)
        self.w_down = nn.Parameter(first.to(like))
        self.b_down = nn.Parameter(torch.zeros(m).to(like))
        self.w_up = nn.Parameter(torch.zeros(d, m).to(like))
        self.b_up = nn.Parameter(torch.zeros(d).to(like))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch d"]:
        y = self.base(x)
        h = x if self.parallel else y
        return y + self.scale * bottleneck(h, self.w_down, self.b_down, self.w_up, self.b_up)


AFTER_ATTENTION = ("o_proj", "attention.output")  # as Llama and as Bert call it
AFTER_MLP = ("down_proj", "mlp.down")


def adapters(model: nn.Module, bottleneck_width: int, seed: int = 0) -> dict[str, Wrap]:
    """Houlsby's two adapters for every layer of a `Llama` or a `Bert`, for `attach`.

    Args:
        model: its layers' last matrices of attention and MLP are wrapped.
        bottleneck_width: m, at least 1.
        seed: of W_down. PyTorch's generator is left alone.

    Raises:
        ValueError: bottleneck_width is below 1.

    Example:
        >>> from fewer.models import tiny_llama
        >>> from fewer.peft import attach
        >>> model = tiny_llama(n_layers=1)  # d = 16
        >>> with attach(model, adapters(model, bottleneck_width=4)) as attached:
        ...     attached.count() == 2 * (2 * 16 * 4 + 16 + 4)
        True
    """
    _require_width(bottleneck_width)
    generator = torch.Generator().manual_seed(seed)

    def wrap(base: nn.Module) -> Adapter:
        assert isinstance(base, nn.Linear)
        return Adapter(base, base.out_features, bottleneck_width, generator)

    names = AFTER_ATTENTION + AFTER_MLP
    return {name: wrap for name, _ in model.named_modules() if name.endswith(names)}


def parallel_adapters(
    model: nn.Module, bottleneck_width: int, scale: float = 4.0, seed: int = 0
) -> dict[str, Wrap]:
    """One adapter beside the feed-forward part of every layer of a `Llama` or a `Bert`.

    Args:
        model: its submodules `mlp` are wrapped.
        bottleneck_width: m, at least 1.
        scale: s. The paper uses 4.
        seed: of W_down. PyTorch's generator is left alone.

    Raises:
        ValueError: bottleneck_width is below 1.

    Example:
        >>> from fewer.models import tiny_llama
        >>> list(parallel_adapters(tiny_llama(n_layers=1), bottleneck_width=4))
        ['layers.0.mlp']
    """
    _require_width(bottleneck_width)
    generator = torch.Generator().manual_seed(seed)

    def wrap(base: nn.Module) -> Adapter:
        # The matrix that writes the stream, [d, hidden], is the last one of the MLP.
        d = [module for module in base.modules() if isinstance(module, nn.Linear)][-1].out_features
        return Adapter(base, d, bottleneck_width, generator, parallel=True, scale=scale)

    return {name: wrap for name, _ in model.named_modules() if name.split(".")[-1] == "mlp"}


def _require_width(bottleneck_width: int) -> None:
    if bottleneck_width < 1:
        raise ValueError(f"bottleneck_width must be at least 1, got {bottleneck_width}")
