"""Prefix tuning: learned keys and values, in every layer, that all tokens may attend to.

Li & Liang 2021, "Prefix-tuning: Optimizing continuous prompts for generation" (arXiv 2101.00190),
section 4. The attention of layer l sees p keys and values more than there are tokens:

    softmax( Q [P_K; K]^T / sqrt(d) ) [P_V; V],     P_K, P_V [heads, p, head_dim] of each layer

Training them directly was unstable for the authors (section 4.3). So in training they are made by
a small network from a smaller matrix P' [p, r], which is thrown away afterwards, when P_K and P_V
are computed once and for all:

    [P_K, P_V] = W_2 tanh(W_1 P')

The paper has one such network for all layers; here each layer has its own. A prefix takes no
positions from the text: with rotary embeddings it lies at -p, ..., -1, in front of the first token.
Folded, a layer has 2 p d_kv trained numbers; prompt tuning is the special case in which all layers'
keys and values are what the model itself makes of p input vectors.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.models.llama import Attention, KVCache
from fewer.models.minilm import BertAttention
from fewer.peft.attach import Wrap


def reparameterized_prefix(
    p_small: Float[Tensor, "p r"],
    w_1: Float[Tensor, "hidden r"],
    w_2: Float[Tensor, "kv2 hidden"],
    heads: int,
) -> tuple[Float[Tensor, "heads p head_dim"], Float[Tensor, "heads p head_dim"]]:
    """P_K and P_V from the small matrix P': W_2 tanh(W_1 P'), the keys' half first.

    W_1, the elementwise tanh and W_2 make 2 heads head_dim numbers of each row of P'. The first
    half of these is the position's keys, the second its values; in each half the first head_dim
    numbers are those of head 0, the next those of head 1, and so on.

    Args:
        p_small: P' [p, r], a row a position.
        w_1: [hidden, r].
        w_2: [2 heads head_dim, hidden].
        heads: key heads, which divide half the rows of w_2. At least 1.

    Returns:
        keys, values: [heads, p, head_dim] each.

    Raises:
        ValueError: heads does not divide half the rows of w_2.

    Example:
        >>> keys, values = reparameterized_prefix(torch.ones(5, 3), torch.ones(4, 3),
        ...                                       torch.zeros(2 * 2 * 8, 4), heads=2)
        >>> keys.shape, values.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 8]))
    """
    if len(w_2) % (2 * heads):
        raise ValueError(f"w_2 must have a multiple of 2 x {heads} rows, got {len(w_2)}")
    both = torch.tanh(p_small @ w_1.T) @ w_2.T  # [p, 2 heads head_dim]
    keys, values = both.unflatten(-1, (2, heads, -1)).unbind(1)
    return keys.transpose(0, 1), values.transpose(0, 1)


class _Prefixed(KVCache):
    """What a cache returns, with the prefix in front; the cache itself does not hold it."""

    def __init__(self, cache: KVCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.cache, self.prefix_keys, self.prefix_values = cache, keys, values

    def update(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, positions = self.cache.update(layer, keys, values, positions)
        p = self.prefix_keys.shape[-2]
        front = torch.arange(-p, 0, device=positions.device).expand(*positions.shape[:-1], p)
        return (
            torch.cat([self.prefix_keys.expand(len(keys), -1, -1, -1), keys], dim=-2),
            torch.cat([self.prefix_values.expand(len(values), -1, -1, -1), values], dim=-2),
            torch.cat([front, positions], dim=-1),
        )


class PrefixedAttention(nn.Module):
    """Attention whose tokens also see a prefix; subclasses say how it is parameterized."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        assert isinstance(base, Attention | BertAttention)
        self.base = base

    def prefix(self) -> tuple[Float[Tensor, "heads p d"], Float[Tensor, "heads p d"]]:
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch n d_model"], *args: object) -> Tensor:
        if isinstance(self.base, BertAttention):
            return self.base(x, prefix=self.prefix())
        positions, cache = args  # of Llama
        assert isinstance(cache, KVCache)
        return self.base(x, positions, _Prefixed(cache, *self.prefix()))


class Prefix(PrefixedAttention):
    """The keys and values themselves: what is kept after training, or trained directly."""

    def __init__(self, base: nn.Module, keys: Tensor, values: Tensor) -> None:
        super().__init__(base)
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    def prefix(self) -> tuple[Float[Tensor, "heads p d"], Float[Tensor, "heads p d"]]:
        return self.keys, self.values


class ReparameterizedPrefix(PrefixedAttention):
    """Keys and values made by a small network, for training."""

    def __init__(
        self, base: nn.Module, length: int, r: int, hidden: int, generator: torch.Generator
    ) -> None:
        super().__init__(base)
        self.heads, head_dim, like = _heads(base)

        def start(*shape: int) -> nn.Parameter:
            numbers = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
            return nn.Parameter(numbers.to(like))

        self.p_small, self.w_1 = start(length, r), start(hidden, r)
        self.w_2 = start(2 * self.heads * head_dim, hidden)

    def prefix(self) -> tuple[Float[Tensor, "heads p d"], Float[Tensor, "heads p d"]]:
        return reparameterized_prefix(self.p_small, self.w_1, self.w_2, self.heads)

    @torch.no_grad()
    def merged(self) -> Prefix:
        """The prefix computed once and for all; the network is no longer needed."""
        keys, values = self.prefix()
        return Prefix(self.base, keys.clone(), values.clone()).requires_grad_(False)


def _heads(base: nn.Module) -> tuple[int, int, Tensor]:
    """Key heads, their width, and a tensor of the module's type and device."""
    if isinstance(base, BertAttention):
        return base.key.out_features // base.head_dim, base.head_dim, base.key.weight
    assert isinstance(base, Attention)
    return base.config.n_kv_heads, base.config.head_dim, base.k_proj.weight


def prefix_tuning(
    model: nn.Module,
    length: int,
    reparameterize: tuple[int, int] | None = (64, 128),
    seed: int = 0,
) -> dict[str, Wrap]:
    """p trained keys and values for every layer of a `Llama` or a `Bert`, for `attach`.

    After training with a reparameterization, `Attachment.merge` folds it: the small networks are
    gone, the keys and values stay.

    Args:
        model: its attention modules are wrapped.
        length: p, at least 1.
        reparameterize: (r, hidden) of the network that makes them, or None to train them directly.
        seed: of the start. PyTorch's generator is left alone.

    Raises:
        ValueError: length is below 1.

    Example:
        >>> from fewer.models import tiny_llama
        >>> from fewer.peft import attach
        >>> model = tiny_llama(n_layers=1)  # d_kv = 16
        >>> with attach(model, prefix_tuning(model, length=5, reparameterize=None)) as attached:
        ...     attached.count(), model(torch.tensor([[1, 2, 3]])).shape
        (160, torch.Size([1, 3, 64]))
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    generator = torch.Generator().manual_seed(seed)

    def wrap(base: nn.Module) -> PrefixedAttention:
        if reparameterize:
            return ReparameterizedPrefix(base, length, *reparameterize, generator)
        heads, head_dim, like = _heads(base)
        keys, values = torch.randn(2, heads, length, head_dim, generator=generator).to(like) * 0.02
        return Prefix(base, keys.clone(), values.clone())

    kinds = (Attention, BertAttention)
    return {name: wrap for name, module in model.named_modules() if isinstance(module, kinds)}
