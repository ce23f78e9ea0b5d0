"""A Llama whose matrices are in fewer bits, and its forward pass in few kernels.

Touvron et al. 2023, "LLaMA" (arXiv 2302.13971); one block computes, as in `fewer.models.llama`,

    h = x + W_o Attention(W_q n, W_k n, W_v n),        n = RMSNorm(x)
    y = h + W_down( SiLU(W_gate m) * (W_up m) ),       m = RMSNorm(h)

With one new token a row, each product takes about as long as it takes to launch it. So W_q, W_k and
W_v are one matrix here, and W_gate and W_up another one. Matrices are those of `w4a16`, `w8a16` or
`nf4`, or plain tensors. The output layer, which is the embedding, stays as it is.

How attention gets at earlier tokens is left to an argument: see `generate`.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewer.kernels.nf4 import WNF4, for_kernel, nf4_matmul
from fewer.kernels.w4a16 import W4, quantize_w4, w4a16_matmul
from fewer.kernels.w8a16 import W8, quantize_w8, w8a16_matmul
from fewer.models import Llama, LlamaConfig
from fewer.models.llama import Block
from fewer.peft.nf4 import quantize_nf4

Matrix = Tensor | W4 | W8 | WNF4
Attend = Callable[[int, Tensor, Tensor], Tensor]

# How a matrix [n, k] is stored, by the name of its type.
WEIGHTS: dict[str, Callable[[Tensor, int], Matrix]] = {
    "full": lambda w, group: w,
    "w8": lambda w, group: quantize_w8(w),
    "w4": lambda w, group: quantize_w4(w, group, symmetric=False),
    "w4s": lambda w, group: quantize_w4(w, group),
    "nf4": lambda w, group: for_kernel(quantize_nf4(w), (w.shape[0], w.shape[1])),
}


class Layer(NamedTuple):
    """The parameters of one block."""

    attention_norm: Float[Tensor, "d_model"]
    qkv: Matrix  # rows of q, then of k, then of v
    o: Matrix
    mlp_norm: Float[Tensor, "d_model"]
    gate_up: Matrix
    down: Matrix


class Weights(NamedTuple):
    """A model's parameters; `pack_model` makes them."""

    config: LlamaConfig
    embedding: Float[Tensor, "vocab d_model"]
    layers: list[Layer]
    norm: Float[Tensor, "d_model"]


@torch.no_grad()
def pack_model(model: Llama, weights: str = "full", group: int = 64) -> Weights:
    """The model's parameters, with its matrices in this type, where its parameters are.

    Args:
        model: in bfloat16 or float16, or, if it is to be "full", in any type.
        weights: "full" (as they are), "w8" (a scale a row), "w4" (a scale and a zero-point for each
            `group` columns), "w4s" (symmetric: faster, and less exact) or "nf4".
        group: see `quantize_w4`.

    Raises:
        TypeError, ValueError: no such weights; a type or a shape that they do not come in.

    Example:
        >>> from fewer.models import tiny_llama
        >>> model = tiny_llama(d_model=64, d_ffn=128, head_dim=16).bfloat16()
        >>> w = pack_model(model, "w4").layers[0].gate_up
        >>> tuple(w.packed.shape), tuple(w.scale.shape)  # 256 rows of 64 columns
        ((256, 16), (1, 256))
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")

    def pack(*matrices: nn.Linear) -> Matrix:
        w = torch.cat([matrix.weight.detach() for matrix in matrices])
        return WEIGHTS[weights](w, group)

    layers = [
        Layer(
            block.input_layernorm.weight.detach(),
            pack(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
            pack(block.self_attn.o_proj),
            block.post_attention_layernorm.weight.detach(),
            pack(block.mlp.gate_proj, block.mlp.up_proj),
            pack(block.mlp.down_proj),
        )
        for block in cast(Iterable[Block], model.layers)
    ]
    return Weights(
        model.config, model.embed_tokens.weight.detach(), layers, model.norm.weight.detach()
    )


def rotations(
    config: LlamaConfig, positions: Int[Tensor, "tokens"]
) -> Float[Tensor, "2 tokens 1 d"]:
    """By what x and its swapped halves are multiplied to turn x: cos twice, and (-sin, sin).

    In float32; what `fewer.models.llama.rotate` computes at each call.

    Example:
        >>> from fewer.models import tiny_llama
        >>> from fewer.models.llama import rotate
        >>> config, x, positions = tiny_llama().config, torch.randn(5, 8), torch.arange(5)
        >>> cos, sin = rotations(config, positions)[:, :, 0]
        >>> turned = x * cos + x.roll(4, -1) * sin
        >>> torch.allclose(turned, rotate(x, positions, config.rope_base), atol=1e-6)
        True
    """
    d = config.head_dim
    frequencies = 1.0 / config.rope_base ** (torch.arange(0, d, 2, device=positions.device) / d)
    angles = positions[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


@torch.no_grad()
def forward(
    weights: Weights,
    tokens: Int[Tensor, "batch new"],
    turns: Float[Tensor, "2 new 1 d"],
    attend: Attend,
) -> Float[Tensor, "batch vocab"]:
    """The logits of the token behind the last one of each row.

    Args:
        turns: `rotations` of the tokens' positions, in the type of the embedding.
        attend: of the layer, q [batch, new, heads, d] and kv [batch, new, 2 kv_heads, d], which are
            rotated, makes what the heads read, [batch, new, heads, d] (or the same elements in
            another shape). To be called once a layer.
    """
    config, (cos, sin) = weights.config, turns
    kv_heads, d, eps = config.n_kv_heads, config.head_dim, config.norm_eps
    x = F.embedding(tokens, weights.embedding)
    for number, layer in enumerate(weights.layers):
        normed = F.rms_norm(x, x.shape[-1:], layer.attention_norm, eps)
        qkv = product(normed, layer.qkv).unflatten(-1, (-1, d))
        qk, swapped = qkv[:, :, :-kv_heads], qkv.roll(d // 2, -1)[:, :, :-kv_heads]
        torch.addcmul(qk * cos, swapped, sin, out=qk)
        q, kv = qkv.split([config.n_heads, 2 * kv_heads], 2)
        x = x + product(attend(number, q, kv).reshape(*x.shape[:2], -1), layer.o)
        normed = F.rms_norm(x, x.shape[-1:], layer.mlp_norm, eps)
        gate, up = product(normed, layer.gate_up).chunk(2, -1)
        x = x + product(F.silu(gate) * up, layer.down)
    last = F.rms_norm(x[:, -1], x.shape[-1:], weights.norm, eps)
    return F.linear(last, weights.embedding)


def product(x: Float[Tensor, "*rows k"], w: Matrix) -> Float[Tensor, "*rows n"]:
    """x W^T, of a matrix in any of these types."""
    if isinstance(w, W4):
        return w4a16_matmul(x, w)
    if isinstance(w, W8):
        return w8a16_matmul(x, w)
    if isinstance(w, WNF4):
        return nf4_matmul(x, w)
    return F.linear(x, w)
