"""A Llama-architecture language model in plain PyTorch, with its key-value cache and `generate`.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, arXiv:2302.13971.
SmolLM2 (Allal et al., 2025, arXiv:2502.02737) has this architecture. One block computes

    h = x + W_o Attention(W_q n, W_k n, W_v n),        n = RMSNorm(x)
    y = h + W_down( SiLU(W_gate m) * (W_up m) ),       m = RMSNorm(h)

with rotary positions (Su et al., 2021, arXiv:2104.09864), grouped queries (Ainslie et al., 2023,
arXiv:2305.13245) and the gated feed-forward layer SwiGLU (Shazeer, 2020, arXiv:2002.05202).

Every matrix of a block is an `nn.Linear` under its usual name (q_proj, k_proj, v_proj, o_proj,
gate_proj, up_proj, down_proj), so it can be replaced or hooked like any other PyTorch layer.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model. They are read from the model's file and never change."""

    vocab_size: int
    d_model: int  # width of the residual stream
    d_ffn: int  # width inside the feed-forward layer
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int  # key/value heads; n_heads / n_kv_heads queries share one
    head_dim: int
    rope_base: float = 10_000.0  # theta in the RoPE paper
    norm_eps: float = 1e-5
    context_length: int = 2048  # the longest text seen in training, in tokens


class KVCache:
    """Keys, values and positions of the tokens already read, a growing tensor a layer.

    Keys are kept *before* rotation and turned at attention time by the positions kept beside them.
    A cache may therefore forget tokens (eviction) or renumber them (StreamingLLM) by overriding
    `update` alone: attention rotates and masks by the key positions that `update` returns, whatever
    they are. One that lets queries see other keys than those before them (a tree of drafts)
    overrides `visible`; one that wants to know what was attended to (H2O) sets `observes` and gets
    it by `observe`.

    Attributes:
        observes: whether attention calls `observe`. It then computes its weights one by one, which
            takes more time and memory.
        keys: for each layer seen so far, a tensor of shape (batch, kv_heads, tokens, head_dim).
        values: the same for the values.
        positions: for each layer, the positions of its keys, integers of shape (tokens,), or
            (batch, kv_heads, tokens) in a subclass that keeps other tokens in every head.

    Example:
        >>> model, cache = tiny_llama(), KVCache()
        >>> _ = model(torch.tensor([[5, 6, 7]]), cache)
        >>> cache.keys[0].shape, cache.next_position
        (torch.Size([1, 2, 3, 8]), 3)
    """

    observes = False

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions: list[Tensor] = []

    @property
    def next_position(self) -> int | Int[Tensor, "batch 1"]:
        """The position of the next token to be read: one more than the latest position kept.

        A subclass whose rows have read unequally many tokens returns one for each row.
        """
        return int(self.positions[0].max()) + 1 if self.positions else 0

    def update(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new head_dim"],
        positions: Int[Tensor, "*batch new"],
    ) -> tuple[
        Float[Tensor, "batch kv_heads tokens head_dim"],
        Float[Tensor, "batch kv_heads tokens head_dim"],
        Int[Tensor, "*batch_and_kv_heads tokens"],
    ]:
        """Append what `layer` computed for new tokens; return all that its queries may attend to.

        Layers must be updated in order, 0 first. The returned positions decide two things: by how
        much each key is rotated, and which queries see it (those at the same position or later).
        """
        if layer == len(self.keys):
            self.keys.append(keys)
            self.values.append(values)
            self.positions.append(positions)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], keys], dim=-2)
            self.values[layer] = torch.cat([self.values[layer], values], dim=-2)
            self.positions[layer] = torch.cat([self.positions[layer], positions], dim=-1)
        return self.keys[layer], self.values[layer], self.positions[layer]

    def visible(
        self,
        key_positions: Int[Tensor, "*batch_and_kv_heads tokens"],
        positions: Int[Tensor, "*batch new"],
    ) -> Bool[Tensor, "*batch_and_kv_heads new tokens"]:
        """Which keys each new token may attend to: those at its own position or before it.

        A key that nobody should see any more can stay where it is, at a position beyond all others.
        """
        if positions.ndim == 2:
            positions = positions[:, None]  # the same for all heads
        return key_positions[..., None, :] <= positions[..., :, None]

    def observe(
        self, layer: int, attention: Float[Tensor, "batch kv_heads group new tokens"]
    ) -> None:
        """What the queries of `layer` attended to, after each `update`, if `observes` is set.

        Each row over tokens sums to 1. The `group` query heads of a key head stand beside it.
        """


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), in float32.

    Zhang & Sennrich, 2019, arXiv:1910.07467.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotate(
    x: Float[Tensor, "*batch tokens head_dim"],
    positions: Int[Tensor, "*batch tokens"],
    base: float,
) -> Float[Tensor, "*batch tokens head_dim"]:
    """RoPE: turn the pair (x_i, x_{i + head_dim/2}) at position p by p * base^(-2i/head_dim).

    The product of a rotated query and a rotated key depends on the distance of their positions
    only.

    Example:
        >>> q, k = torch.randn(1, 8), torch.randn(1, 8)
        >>> here = rotate(q, torch.tensor([7]), 1e4) @ rotate(k, torch.tensor([5]), 1e4).T
        >>> there = rotate(q, torch.tensor([102]), 1e4) @ rotate(k, torch.tensor([100]), 1e4).T
        >>> torch.allclose(here, there, atol=1e-4)
        True
    """
    head_dim = x.shape[-1]
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, device=x.device) / head_dim)
    angles = positions[..., None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal attention with grouped queries: n_heads / n_kv_heads query heads share a key head."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, q_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch new d_model"],
        positions: Int[Tensor, "*batch new"],
        cache: KVCache,
    ) -> Float[Tensor, "batch new d_model"]:
        batch, new, _ = x.shape
        kv_heads, head_dim, base = (
            self.config.n_kv_heads,
            self.config.head_dim,
            self.config.rope_base,
        )
        q = self.q_proj(x).view(batch, new, -1, head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, new, kv_heads, head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, new, kv_heads, head_dim).transpose(1, 2)
        k, v, key_positions = cache.update(self.layer, k, v, positions)
        for_heads = positions if positions.ndim == 1 else positions[:, None]
        q, k = rotate(q, for_heads, base), rotate(k, key_positions, base)
        visible = cache.visible(key_positions, positions)

        # Query heads that share a key head are stacked below each other as if they were more
        # tokens, so that the keys need not be copied for each of them.
        group = self.config.n_heads // kv_heads
        q = q.reshape(batch, kv_heads, group * new, head_dim)
        repeats = [1] * (visible.ndim - 2) + [group, 1]
        visible = visible.repeat(repeats)
        if cache.observes:
            scores = (q @ k.mT / head_dim**0.5).masked_fill(~visible, -torch.inf)
            weights = scores.softmax(-1)
            cache.observe(self.layer, weights.unflatten(2, (group, new)))
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.o_proj(
            out.reshape(batch, -1, new, head_dim).transpose(1, 2).reshape(batch, new, -1)
        )


class MLP(nn.Module):
    """SwiGLU: W_down( SiLU(W_gate x) * (W_up x) )."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ffn, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ffn, bias=False)
        self.down_proj = nn.Linear(config.d_ffn, config.d_model, bias=False)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the feed-forward part; each reads the normalised stream and adds to it."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "batch new d_model"],
        positions: Int[Tensor, "*batch new"],
        cache: KVCache,
    ) -> Float[Tensor, "batch new d_model"]:
        h = x + self.self_attn(self.input_layernorm(x), positions, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class Llama(nn.Module):
    """Embedding, blocks, final norm, and the embedding again as the output layer (tied).

    `model(tokens)` gives the logits of every next token. `model.hidden(tokens)` stops before the
    output layer, which costs a fifth of SmolLM2's work, and `model.logits(hidden)` is that layer.

    Example:
        >>> tiny_llama()(torch.tensor([[1, 2, 3], [4, 5, 6]])).shape
        torch.Size([2, 3, 64])
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        tokens: Int[Tensor, "batch new"],
        cache: KVCache | None = None,
        positions: Int[Tensor, "*batch new"] | None = None,
    ) -> Float[Tensor, "batch new vocab"]:
        """Read `tokens` after what `cache` holds; return the logits of the token that follows each.

        Args:
            tokens: token ids of rows of equal length (there is no padding).
            cache: what earlier calls have read. It is updated in place. None reads the tokens by
                themselves.
            positions: positions of the tokens, the same for all rows or a row of them for each; by
                default they go on from the cache.

        Raises:
            ValueError: if `tokens` is not a matrix of at least one column.
        """
        return self.logits(self.hidden(tokens, cache, positions))

    def hidden(
        self,
        tokens: Int[Tensor, "batch new"],
        cache: KVCache | None = None,
        positions: Int[Tensor, "*batch new"] | None = None,
    ) -> Float[Tensor, "batch new d_model"]:
        """The normalised output of the last block, from which `logits` reads the next token.

        Whatever stands at `embed_tokens` may return more vectors than it is given tokens: prompt
        tuning puts p learned ones before them. Positions are then counted from the first of these,
        and the result has p + new rows. It does so in every call, so such a model reads its texts
        whole, not bit by bit into a cache. (For `logits` it has to offer a `weight` as well.)
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens must have shape (batch, 1 or more), got {tuple(tokens.shape)}"
            )
        cache = KVCache() if cache is None else cache
        x = self.embed_tokens(tokens)
        if positions is None:
            positions = cache.next_position + torch.arange(x.shape[1], device=tokens.device)
        for block in self.layers:
            x = block(x, positions, cache)
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """The output layer, tied to the embedding: hidden @ embedding^T."""
        return F.linear(hidden, self.embed_tokens.weight)


def generate(
    model: Llama,
    tokens: Int[Tensor, "batch prompt"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
) -> Int[Tensor, "batch new"]:
    """Continue every row of `tokens` and return the new tokens alone (without the prompt).

    Arguments are those of `stream`. Ends early when every row has produced a stop token; a row that
    stopped before the others repeats its stop token until then.

    Example:
        >>> generate(tiny_llama(), torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape
        torch.Size([1, 4])
    """
    new = list(
        stream(
            model,
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            generator=generator,
            cache=cache,
        )
    )
    return torch.stack(new, dim=1)


@torch.no_grad()
def stream(
    model: Llama,
    tokens: Int[Tensor, "batch prompt"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
) -> Iterator[Int[Tensor, "batch"]]:
    """Yield the new tokens one step at a time: prefill the prompt once, then decode a token a call.

    Args:
        model: the language model.
        tokens: prompts of equal length.
        max_new_tokens: how many tokens to produce at most, 1 or more.
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it before
            sampling.
        top_p: sample among the fewest tokens whose probabilities sum to at least this, in (0, 1]
            (Holtzman et al., 2020, arXiv:1904.09751). 1 keeps all.
        stop: token ids that end a row.
        generator: source of randomness for sampling; PyTorch's global one by default.
        cache: an empty cache of another policy, or one that has read what comes before `tokens`.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    cache = KVCache() if cache is None else cache
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    last = None
    while max_new_tokens > 0 and not stopped.all():
        # Only the last position predicts a new token, so the large output layer sees that one
        # alone.
        logits = model.logits(model.hidden(tokens, cache)[:, -1])
        new = _choose(logits, temperature, top_p, generator)
        last = new if last is None else torch.where(stopped, last, new)
        yield last
        stopped |= torch.isin(last, torch.tensor(list(stop), dtype=last.dtype, device=last.device))
        tokens, max_new_tokens = last[:, None], max_new_tokens - 1


def token_probabilities(
    logits: Float[Tensor, "*batch vocab"], temperature: float = 1.0, top_p: float = 1.0
) -> Float[Tensor, "*batch vocab"]:
    """The distribution that `stream` draws the next token from.

    Args:
        logits: of the next token.
        temperature, top_p: as for `stream`. At temperature 0 all probability is the likeliest
            token's.

    Returns:
        float32, the shape of logits; each row sums to 1.

    Example:
        >>> token_probabilities(torch.tensor([4.0, 4.0, 3.0, 0.0]).log(), top_p=0.5).tolist()
        [0.5, 0.5, 0.0, 0.0]
    """
    if temperature == 0:
        likeliest = logits.argmax(-1)
        return F.one_hot(likeliest, logits.shape[-1]).float()
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p == 1:
        return probabilities  # a large vocabulary takes long to sort
    probabilities, order = probabilities.sort(-1, descending=True)
    # A token stays if those before it have not yet reached top_p; so the likeliest always stays.
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < top_p)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _choose(
    logits: Float[Tensor, "batch vocab"],
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> Int[Tensor, "batch"]:
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = token_probabilities(logits, temperature, top_p)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def tiny_llama(seed: int = 0, **sizes: int) -> Llama:
    """A random model of a few thousand parameters, with every part of the real one.

    Args:
        seed: same seed, same weights. PyTorch's global generator is left as it was.
        sizes: fields of `LlamaConfig` to set otherwise, such as n_layers=1.

    Example:
        >>> sum(p.numel() for p in tiny_llama().parameters())
        6480
    """
    defaults = {
        "vocab_size": 64,
        "d_model": 16,
        "d_ffn": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
    }
    config = LlamaConfig(**{**defaults, **sizes})
    with torch.device("meta"):
        model = Llama(config)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights spread around 1 and matrices of gain above 1 make every part matter in a
            # test.
            scale = 2.0 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.2
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, scale, generator=generator)
    return model.eval()
