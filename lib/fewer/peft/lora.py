"""LoRA: the change of a weight is a product of two thin matrices, and only those are trained.

Hu et al. 2021, "LoRA: Low-rank adaptation of large language models" (arXiv 2106.09685), equation 3:

    h = W0 x + dW x = W0 x + s B A x        A [r, in], B [out, r], r small
    s = alpha / r                           (section 4.1)
    s = alpha / sqrt(r)                     rsLoRA: Kalajdzievski 2023 (arXiv 2312.03732)

W0 stays as it is. B begins at zero, so the model begins unchanged; A begins at random, so that B
has a gradient. The paper draws A from a normal distribution and does not say how wide; we do as its
authors' code (and peft): uniform, |a| <= 1/sqrt(in).

A matrix of in * out weights costs r (in + out) trained numbers. After training, W0 + s B A is a
matrix like W0: merged, LoRA costs nothing at inference.
"""

import math
from collections.abc import Collection, Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.peft.attach import Wrap
from fewer.validate import require_int


def lora_rank(A: Float[Tensor, "r in"], B: Float[Tensor, "out r"]) -> int:
    """The rank r on which the two factors agree.

    Raises:
        ValueError: A or B is not a matrix, they disagree, or r is 0.
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise ValueError(
            "A [r, in] and B [out, r] must be matrices with the same r of at least 1, "
            f"got shapes {tuple(A.shape)} and {tuple(B.shape)}"
        )
    return A.shape[0]


def lora_scale(alpha: float, rank: int, rank_stabilized: bool = False) -> float:
    """s = alpha / r, or alpha / sqrt(r) if rank-stabilized (rsLoRA).

    The rsLoRA paper shows that with alpha / r the adapter's output and gradients shrink as r grows,
    so that high ranks hardly learn more than low ones, and that alpha / sqrt(r) keeps their size.

    Raises:
        TypeError, ValueError: rank is not an int of at least 1.

    Example:
        >>> lora_scale(16, 4), lora_scale(16, 4, rank_stabilized=True)
        (4.0, 8.0)
    """
    rank = require_int(rank, "rank", 1)
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def lora_delta(
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    alpha: float,
    rank_stabilized: bool = False,
) -> Float[Tensor, "out in"]:
    """The change of the weight as one matrix: dW = s B A, with s = alpha / r (`lora_scale`).

    Args:
        A, B: the two factors; the rank r is the number of rows of A. Gradients flow into both.
        alpha: the numerator of s, any number.
        rank_stabilized: s = alpha / sqrt(r) in place of alpha / r.

    Raises:
        ValueError: A and B are not matrices that agree on r.

    Example:
        >>> lora_delta(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]), alpha=2).tolist()
        [[6.0, 12.0], [0.0, 0.0]]
    """
    return lora_scale(alpha, lora_rank(A, B), rank_stabilized) * (B @ A)


def lora_output(
    x: Float[Tensor, "*batch in"],
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    alpha: float,
    rank_stabilized: bool = False,
) -> Float[Tensor, "*batch out"]:
    """What LoRA adds to the output of a layer: s B (A x), through the narrow middle.

    The same as `x @ lora_delta(A, B, alpha).T`, but r (in + out) multiplications a token in place
    of in * out, and no [out, in] matrix is made or kept for the backward pass.

    Args:
        x: the input of the layer, any number of leading dimensions.
        A, B, alpha, rank_stabilized: as for `lora_delta`.

    Raises:
        ValueError: A and B are not matrices that agree on r, or x has not `in` features.

    Example:
        >>> A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
        >>> lora_output(torch.tensor([1.0, 1.0]), A, B, alpha=2).tolist()
        [18.0, 0.0]
    """
    scale = lora_scale(alpha, lora_rank(A, B), rank_stabilized)
    if x.ndim == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(f"x must have {A.shape[1]} features, got shape {tuple(x.shape)}")
    return scale * (x @ A.T @ B.T)


def lora_merge(
    W: Float[Tensor, "out in"],
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    alpha: float,
    rank_stabilized: bool = False,
) -> Float[Tensor, "out in"]:
    """W + s B A: one matrix that does what W and the adapter do together; s as in `lora_delta`.

    Args:
        W: the weight of the layer, any floating type; it may be a parameter.
        A, B, alpha, rank_stabilized: as for `lora_delta`, in the type of W or another one.

    Returns:
        [out, in], the type of W. W itself is not modified.

    Raises:
        ValueError: A and B are not matrices that agree on r, or B A has not the shape of W.

    Example:
        >>> A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
        >>> lora_merge(torch.eye(2), A, B, alpha=2).tolist()
        [[7.0, 12.0], [0.0, 1.0]]
    """
    delta = lora_delta(A, B, alpha, rank_stabilized)
    if delta.shape != W.shape:
        raise ValueError(f"W must have shape {tuple(delta.shape)} as B A, got {tuple(W.shape)}")
    return W + delta.to(W.dtype)


def lora_unmerge(
    W: Float[Tensor, "out in"],
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    alpha: float,
    rank_stabilized: bool = False,
) -> Float[Tensor, "out in"]:
    """W - s B A: take an adapter out of a merged matrix, up to rounding.

    (W + d) - d is not W bit for bit: the sum was rounded, and what it lost of W where d is large
    does not come back. `Attachment.unmerge` is exact because it puts the old matrix back.

    Example:
        >>> W, (A, B) = torch.tensor([[0.1]]), (torch.tensor([[1.0]]), torch.tensor([[999.0]]))
        >>> lora_unmerge(lora_merge(W, A, B, alpha=1), A, B, alpha=1).item()  # W was 0.1
        0.099976
    """
    return lora_merge(W, A, B, -alpha, rank_stabilized)


def lora_count(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """How many numbers LoRA trains: the sum of r (out + in) over the adapted matrices.

    For square matrices this is the paper's 2 * (number of matrices) * d_model * r (section 5.1).

    Example:
        >>> lora_count([(12288, 12288)] * 2 * 96, rank=1)  # GPT-3's W_q and W_v: 4.7M in table 4
        4718592
    """
    return sum(rank * (out + into) for out, into in shapes)


def lora_start(
    weight: Float[Tensor, "out in"], rank: int, seed: int
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """A uniform in [-1/sqrt(in), 1/sqrt(in)] and B = 0, in the type and on the device of `weight`.

    The values are drawn on the CPU, the same everywhere; the global generator is not used.

    Example:
        >>> A, B = lora_start(torch.zeros(3, 4), rank=2, seed=0)
        >>> A.shape, bool(A.abs().max() <= 0.5), B.tolist()
        (torch.Size([2, 4]), True, [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    """
    out_features, in_features = weight.shape
    generator = torch.Generator().manual_seed(seed)
    A = torch.rand(require_int(rank, "rank", 1), in_features, generator=generator)
    return ((2 * A - 1) / math.sqrt(in_features)).to(weight), weight.new_zeros(out_features, rank)


def same_linear(base: nn.Module, weight: Float[Tensor, "out in"]) -> nn.Linear:
    """An `nn.Linear` with this weight, and the bias and the mode of `base`; not to be trained."""
    out_features, in_features = weight.shape
    bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
    linear = nn.Linear(in_features, out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear.train(base.training)


class LowRankLinear(nn.Module):
    """A frozen linear layer and the factors A and B of a trained change of its weight.

    What LoRA, DoRA and SparsePEFT have in common; what they make of A and B is theirs.

    Args:
        base: an `nn.Linear`, or another layer with `in_features`, `out_features`, `weight` and
            `bias`, such as `NF4Linear`. It is not modified.
        rank: r, at least 1.
        alpha: s = alpha / r.
        seed: of A.
    """

    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 16.0, seed: int = 0) -> None:
        super().__init__()
        self.base, self.alpha = base, alpha
        A, B = lora_start(self.frozen, rank, seed)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    @property
    def frozen(self) -> Float[Tensor, "out in"]:
        """W0, the weight of the base."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight.detach()


class LoRALinear(LowRankLinear):
    """A frozen linear layer with a trained low-rank change beside it.

    Args:
        base, rank, alpha, seed: as for `LowRankLinear`.
        rank_stabilized: s = alpha / sqrt(r).

    Example:
        >>> layer = LoRALinear(nn.Linear(4, 3), rank=2)
        >>> [(name, p.numel()) for name, p in layer.named_parameters() if name in "AB"]
        [('A', 8), ('B', 6)]
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        seed: int = 0,
        rank_stabilized: bool = False,
    ) -> None:
        super().__init__(base, rank, alpha, seed)
        self.rank_stabilized = rank_stabilized

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.base(x) + lora_output(x, self.A, self.B, self.alpha, self.rank_stabilized)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A linear layer with the weight W + s B A, in W's type.

        On a 4-bit base this is a float layer: it computes the same, but its weight is no longer
        4-bit. Quantizing it again would change what was learned.
        """
        weight = lora_merge(self.frozen, self.A, self.B, self.alpha, self.rank_stabilized)
        return same_linear(self.base, weight)


def targets_and_seeds(
    model: nn.Module, targets: Collection[str], seed: int
) -> list[tuple[str, int]]:
    """The layers meant by `targets`, by dotted name in the model's order, each with its own seed.

    A target is the end of a dotted name: "q_proj", or "attention.output" where "output" alone would
    be another layer too. Only layers with `in_features` count, that is `nn.Linear` and `NF4Linear`.

    Raises:
        TypeError: targets is a string.
        ValueError: a target that no layer has.

    Example:
        >>> from fewer.models import tiny_llama
        >>> [name for name, _ in targets_and_seeds(tiny_llama(), ["o_proj"], seed=0)]
        ['layers.0.self_attn.o_proj', 'layers.1.self_attn.o_proj']
    """
    if isinstance(targets, str):
        raise TypeError(f"targets must be a collection of names such as ({targets!r},), got a str")
    names = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(f"targets must name linear layers of the model, got {target!r}")
    names = [name for name in names if f".{name}".endswith(tuple(f".{end}" for end in targets))]
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (len(names),), generator=generator).tolist()
    return list(zip(names, seeds, strict=True))


def lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Collection[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    rank_stabilized: bool = False,
) -> dict[str, Wrap]:
    """LoRA for `attach`, on all layers whose dotted names end in one of `targets`.

    Args:
        model: holds the layers; it is not modified.
        rank, alpha, rank_stabilized: as for `LoRALinear`.
        targets: the ends of dotted names. The paper adapts W_q and W_v (section 7.1).
        seed: of all the A; the same seed gives the same A each time the wrappers are made.

    Raises:
        TypeError: targets is a string.
        ValueError: a target that no linear layer has; rank below 1 (when attached).

    Example:
        >>> from fewer.models import tiny_llama
        >>> from fewer.peft import attach
        >>> model = tiny_llama()
        >>> attach(model, lora(model, rank=2, targets=["o_proj"])).count()  # two of [16, 32]
        192
    """

    layer = partial(LoRALinear, rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
    return {name: partial(layer, seed=own) for name, own in targets_and_seeds(model, targets, seed)}
