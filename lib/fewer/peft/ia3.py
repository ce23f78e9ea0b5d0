"""IA3: three vectors a layer, which turn single channels up or down.

Liu et al. 2022, "Few-shot parameter-efficient fine-tuning is better and cheaper than in-context
learning" (arXiv 2205.05638), section 3.3. With learned vectors l_k, l_v and l_ff, all ones at the
start, elementwise:

    softmax( Q (l_k * K)^T / sqrt(d) ) (l_v * V)          W_down ( l_ff * f(W_up x) )

K and V are outputs of linear layers, and f(...) is the input of one, so all three fold into
weights:

    l * (W x + b) = (diag(l) W) x + l * b                 W (l * x) = (W diag(l)) x

A layer has d_k + d_v + d_ff trained numbers.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.peft.attach import Wrap


def fold_output_scale(
    w: Float[Tensor, "out in"], b: Float[Tensor, "out"] | None, scale: Float[Tensor, "out"]
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out"] | None]:
    """diag(l) W and l * b: the layer whose *outputs* are multiplied by l, l * (W x + b).

    Args:
        w: [out, in], as `nn.Linear` stores its weight. Not modified.
        b: [out], its bias, or None. Not modified.
        scale: l, [out], one number an output.

    Returns:
        The new weight, and the new bias (None if b is None).

    Raises:
        ValueError: scale is not [out].

    Example:
        >>> w, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 1.0])
        >>> [part.tolist() for part in fold_output_scale(w, b, torch.tensor([10.0, 1.0]))]
        [[[10.0, 20.0], [3.0, 4.0]], [10.0, 1.0]]
    """
    if scale.shape != w.shape[:1]:
        raise ValueError(f"scale must have shape {tuple(w.shape[:1])}, got {tuple(scale.shape)}")
    return scale[:, None] * w, None if b is None else scale * b


def fold_input_scale(
    w: Float[Tensor, "out in"], scale: Float[Tensor, "in"]
) -> Float[Tensor, "out in"]:
    """W diag(l): the layer whose *inputs* are multiplied by l, W (l * x).

    Its bias, if it has one, stays as it is.

    Args:
        w: [out, in], as `nn.Linear` stores its weight. Not modified.
        scale: l, [in], one number an input.

    Returns:
        The new weight.

    Raises:
        ValueError: scale is not [in].

    Example:
        >>> w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> fold_input_scale(w, torch.tensor([10.0, 1.0])).tolist()
        [[10.0, 2.0], [30.0, 4.0]]
    """
    if scale.shape != w.shape[1:]:
        raise ValueError(f"scale must have shape {tuple(w.shape[1:])}, got {tuple(scale.shape)}")
    return w * scale


class IA3(nn.Module):
    """A linear layer whose outputs (K and V) or inputs (of W_down) are multiplied by l."""

    def __init__(self, base: nn.Module, on_input: bool = False) -> None:
        super().__init__()
        assert isinstance(base, nn.Linear)
        self.base, self.on_input = base, on_input
        size = base.in_features if on_input else base.out_features
        self.scale = nn.Parameter(torch.ones(size).to(base.weight))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.base(x * self.scale) if self.on_input else self.base(x) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear layer with l folded into its weight and bias."""
        merged = copy.deepcopy(self.base)
        w: Tensor = self.base.weight
        b: Tensor | None = self.base.bias
        if self.on_input:
            w = fold_input_scale(w, self.scale)
        else:
            w, b = fold_output_scale(w, b, self.scale)
        merged.weight = nn.Parameter(w.clone(), requires_grad=False)
        if b is not None:
            merged.bias = nn.Parameter(b.clone(), requires_grad=False)
        return merged


KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value")  # as Llama and as Bert call them
FEED_FORWARD = ("down_proj", "mlp.down")


def ia3(model: nn.Module) -> dict[str, Wrap]:
    """l_k, l_v and l_ff for every layer of a `Llama` or a `Bert`, for `attach`.

    Example:
        >>> from fewer.models import tiny_llama
        >>> from fewer.peft import attach
        >>> model = tiny_llama(n_layers=1)
        >>> with attach(model, ia3(model)) as attached:
        ...     {name.split(".")[-2]: p.numel() for name, p in attached.trained.items()}
        {'k_proj': 16, 'v_proj': 16, 'down_proj': 24}
    """
    wraps: dict[str, Wrap] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(KEYS_AND_VALUES):
            wraps[name] = IA3
        if isinstance(module, nn.Linear) and name.endswith(FEED_FORWARD):
            wraps[name] = lambda base: IA3(base, on_input=True)
    return wraps
