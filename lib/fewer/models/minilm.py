"""all-MiniLM-L6-v2, the sentence encoder of the course: BERT in plain PyTorch, and its loader.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
2019, arXiv:1810.04805. One layer computes, with every token seeing every other,

    h = LayerNorm(x + W_output Attention(W_query x, W_key x, W_value x))
    y = LayerNorm(h + W_down GELU(W_up h))

where every product with a W also adds a bias. The sum is normalised, not the input as in `llama`.

The weights are those of sentence-transformers (Reimers & Gurevych, 2019, arXiv:1908.10084). They
began as MiniLM (Wang et al., 2020, arXiv:2002.10957) and were trained until the mean of a
sentence's last hidden states told its meaning: 6 layers, 384 wide, 22.6 million parameters.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from fewer.models.fetch import fetch_minilm


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a model. They are read from the model's file and never change."""

    vocab_size: int
    d_model: int  # width of the residual stream
    d_ffn: int  # width inside the feed-forward layer
    n_layers: int
    n_heads: int
    norm_eps: float = 1e-12
    context_length: int = 512  # the longest text, in tokens: positions are learned up to here

    @property
    def head_dim(self) -> int:
        """Width of one head; the heads together are as wide as the model."""
        return self.d_model // self.n_heads


class BertEmbedding(nn.Module):
    """LayerNorm(token + position + type): position and type are learned vectors like the tokens'.

    The type tells the first from the second text of a pair. There is only a first one here.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.context_length, config.d_model)
        self.types = nn.Embedding(2, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.context_length = config.context_length

    def forward(self, tokens: Int[Tensor, "batch n"]) -> Float[Tensor, "batch n d_model"]:
        x = self.tokens(tokens)
        if x.shape[1] > self.context_length:
            raise ValueError(f"tokens must be at most {self.context_length}, got {x.shape[1]}")
        positions = torch.arange(x.shape[1], device=tokens.device)
        return self.norm(x + self.positions(positions) + self.types(torch.zeros_like(positions)))


class BertAttention(nn.Module):
    """Attention of every token to every token, in n_heads heads."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)

    def forward(
        self,
        x: Float[Tensor, "batch n d_model"],
        prefix: tuple[Float[Tensor, "heads p head_dim"], Float[Tensor, "heads p head_dim"]]
        | None = None,
    ) -> Float[Tensor, "batch n d_model"]:
        """Attend to x and, where a prefix (keys, values) is given, to its p tokens as well.

        The prefix stands before the tokens of every row (Li & Liang, 2021, arXiv:2101.00190).
        """
        batch, n, d_model = x.shape
        q, k, v = (
            linear(x).view(batch, n, -1, self.head_dim).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        if prefix is not None:
            k, v = (
                torch.cat([before.expand(batch, -1, -1, -1), own], dim=-2)
                for before, own in zip(prefix, (k, v), strict=True)
            )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.output(out.transpose(1, 2).reshape(batch, n, d_model))


class BertMLP(nn.Module):
    """W_down GELU(W_up x + b_up) + b_down."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ffn)
        self.down = nn.Linear(config.d_ffn, config.d_model)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.down(F.gelu(self.up(x)))


class BertLayer(nn.Module):
    """Attention, then the feed-forward part; each adds to the stream, which is then normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.attention_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.mlp = BertMLP(config)
        self.mlp_norm = nn.LayerNorm(config.d_model, config.norm_eps)

    def forward(self, x: Float[Tensor, "batch n d_model"]) -> Float[Tensor, "batch n d_model"]:
        h = self.attention_norm(x + self.attention(x))
        return self.mlp_norm(h + self.mlp(h))


class Bert(nn.Module):
    """Embedding and layers; `model(tokens)`, or `model.hidden(tokens)`, is the last one's output.

    Rows have equal length: there is no padding, hence no mask. BERT was trained with dropout, which
    is left out here, so that training mode computes what evaluation mode does.

    Whatever stands at `embed.tokens` may return more vectors than it is given tokens: prompt tuning
    puts p learned ones before them. They count as the first positions, and the result has p + n
    rows.

    Example:
        >>> tiny_bert()(torch.tensor([[1, 2, 3], [4, 5, 6]])).shape
        torch.Size([2, 3, 16])
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = BertEmbedding(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.n_layers))

    def forward(self, tokens: Int[Tensor, "batch n"]) -> Float[Tensor, "batch n d_model"]:
        """The hidden states of the last layer.

        Args:
            tokens: token ids of rows of equal length; a text begins with [CLS] and ends with [SEP].

        Raises:
            ValueError: if `tokens` is not a matrix of 1 to `context_length` columns.
        """
        return self.hidden(tokens)

    def hidden(self, tokens: Int[Tensor, "batch n"]) -> Float[Tensor, "batch n d_model"]:
        """The same under the name it has in `Llama`."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens must have shape (batch, 1 or more), got {tuple(tokens.shape)}"
            )
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class MiniLM(NamedTuple):
    """The model and its tokenizer: `model, tokenizer = load_minilm()`."""

    model: Bert
    tokenizer: Tokenizer


# Our name of a part of a layer: its name in the file.
_PARTS = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_EMBEDDING = {
    "tokens": "word_embeddings",
    "positions": "position_embeddings",
    "types": "token_type_embeddings",
    "norm": "LayerNorm",
}


def name_in_file(name: str) -> str:
    """The name that a parameter of `Bert` has in the published file.

    Example:
        >>> name_in_file("layers.3.mlp.up.bias")
        'encoder.layer.3.intermediate.dense.bias'
    """
    module, _, parameter = name.rpartition(".")
    if module.startswith("embed."):
        return f"embeddings.{_EMBEDDING[module.removeprefix('embed.')]}.{parameter}"
    _, layer, part = module.split(".", 2)
    return f"encoder.layer.{layer}.{_PARTS[part]}.{parameter}"


def load_minilm(dtype: torch.dtype = torch.float32, progress: bool = True) -> MiniLM:
    """Load the model and its tokenizer; the first call on a machine fetches them (84 MB).

    The parameters are frozen (`requires_grad` is False); whoever trains some of them says so. The
    tokenizer puts [CLS] before a text and [SEP] after it; it neither cuts nor fills up.

    Args:
        dtype: type of the weights. float32 takes 90 MB of memory, bfloat16 half of it.
        progress: show a bar while fetching.

    Raises:
        ModelNotFetched: if the cache is empty and the model cannot be downloaded.
    """
    folder = fetch_minilm(progress)
    sizes = json.loads((folder / "config.json").read_text())
    config = BertConfig(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["hidden_size"],
        d_ffn=sizes["intermediate_size"],
        n_layers=sizes["num_hidden_layers"],
        n_heads=sizes["num_attention_heads"],
        norm_eps=sizes["layer_norm_eps"],
        context_length=sizes["max_position_embeddings"],
    )
    with torch.device("meta"):
        model = Bert(config)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(
        {name: weights[name_in_file(name)] for name in model.state_dict()}, assign=True
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()  # the file asks for 128 tokens, cut or filled up with [PAD]
    tokenizer.no_padding()
    return MiniLM(model.to(dtype).eval().requires_grad_(False), tokenizer)


def tiny_bert(seed: int = 0, **sizes: int) -> Bert:
    """A random model of a few thousand parameters, with every part of the real one.

    Args:
        seed: same seed, same weights. PyTorch's global generator is left as it was.
        sizes: fields of `BertConfig` to set otherwise, such as n_layers=1.

    Example:
        >>> sum(p.numel() for p in tiny_bert().parameters())
        5520
    """
    defaults = {
        "vocab_size": 64,
        "d_model": 16,
        "d_ffn": 24,
        "n_layers": 2,
        "n_heads": 4,
        "context_length": 32,
    }
    with torch.device("meta"):
        model = Bert(BertConfig(**{**defaults, **sizes}))
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As in `tiny_llama`: every part is to matter in a test, biases too.
            scale = 2.0 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.2
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.normal_(mean, scale, generator=generator)
    return model.eval()
