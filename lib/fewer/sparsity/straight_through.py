"""The straight-through estimator: forward with a hard function, backward as if it were not there.

Bengio, Leonard & Courville 2013, "Estimating or propagating gradients through stochastic neurons
for conditional computation" (arXiv 1308.3432). Rounding, signs, masks and top-k have a gradient
that is zero almost everywhere; the estimator puts the identity in its place:

    y = h(x),        dL/dx := dL/dy

It is biased, and it works. With a mask, the *dense* weight gets the gradient of the *masked* one:
pruned weights keep learning, and may come back when the mask is computed anew. Zhou et al. 2021,
"Learning N:M fine-grained structured sparse neural networks from scratch" (arXiv 2102.04010),
section 3, found that the mask then never settles, and let the pruned weights decay (SR-STE):

    W_{t+1} = W_t - gamma_t (g(W~_t) + lambda_W (not E_t) * W_t),      W~ = E * W
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.sparsity.validate import require_floating, require_mask, require_number


def straight_through(
    x: Float[Tensor, "*shape"], hard: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The value of `hard`, with the gradient of `x`.

    Written as hard + (x - x), where neither `hard` nor the subtracted x has a gradient: the bracket
    is exactly 0 and its derivative is 1. The more usual x + (hard - x) rounds twice, and its value
    need not be exactly `hard`.

    Args:
        x: any shape, any floating type, finite: where the gradient goes.
        hard: the shape of x, any type (a bool mask becomes 0.0 and 1.0). It gets no gradient.

    Returns:
        the values of hard, in the dtype of x; dL/dx is the gradient that arrives, unchanged.

    Raises:
        TypeError: x is not a floating-point tensor, hard not a tensor.
        ValueError: the shapes differ.

    Example:
        >>> x = torch.tensor([0.2, 1.7], requires_grad=True)
        >>> y = straight_through(x, x.round())
        >>> (3 * y).sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 2.0], [3.0, 3.0])
    """
    require_floating(x, "x")
    if not isinstance(hard, Tensor):
        raise TypeError(f"hard must be a torch.Tensor, got {type(hard).__name__}")
    if hard.shape != x.shape:
        raise ValueError(f"hard must have shape {tuple(x.shape)}, got {tuple(hard.shape)}")
    return hard.detach().to(x.dtype) + (x - x.detach())


def ste(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function of one tensor trainable: its own values, the gradient of the identity.

    Args:
        function: returns a tensor of its input's shape (`torch.round`, `torch.sign`, a quantizer
            followed by its inverse). It runs without autograd.

    Returns:
        x -> straight_through(x, function(x)).

    Raises:
        ValueError: when called, if function changes the shape.

    Example:
        >>> x = torch.tensor([-0.3, 0.8], requires_grad=True)
        >>> y = ste(torch.sign)(x)
        >>> (y * torch.tensor([1.0, 10.0])).sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([-1.0, 1.0], [1.0, 10.0])
    """

    def estimator(x: Tensor) -> Tensor:
        with torch.no_grad():
            hard = function(x)
        return straight_through(x, hard)

    return estimator


def masked_weight(
    w: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The masked weight for the forward pass, the dense gradient for the backward pass.

    w * mask alone would give pruned weights the gradient 0.

    Args:
        w: the dense weight, finite, any floating type.
        mask: bool, its shape, True = kept.

    Returns:
        w where the mask is True, 0 elsewhere; dL/dw is the gradient that arrives, at pruned weights
        too.

    Raises:
        TypeError: w is not a floating-point tensor, mask not a bool tensor.
        ValueError: the shapes differ.

    Example:
        >>> w = torch.tensor([2.0, 0.5], requires_grad=True)
        >>> y = masked_weight(w, w.abs() >= 1)
        >>> (y * torch.tensor([3.0, 4.0])).sum().backward()
        >>> y.tolist(), w.grad.tolist()
        ([2.0, 0.0], [3.0, 4.0])
    """
    return straight_through(w, w.where(require_mask(mask, w.shape), 0))


def sr_ste_gradient(
    grad: Float[Tensor, "*shape"],
    w: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    decay: float = 2e-4,
) -> Float[Tensor, "*shape"]:
    """The gradient of SR-STE: pruned weights are drawn towards zero, kept ones are left alone.

    Between `loss.backward()` with `masked_weight` and `optimizer.step()`:
    `w.grad = sr_ste_gradient(w.grad, w, mask)`.

    Args:
        grad: the straight-through gradient g(W~).
        w: the dense weight W.
        mask: E, bool, True = kept.
        decay: lambda_W, at least 0; 0 is the plain straight-through estimator, 2e-4 the paper's.

    Returns:
        grad + decay * w where the mask is False, grad elsewhere; no gradient history.

    Raises:
        TypeError: grad or w is not a floating-point tensor, mask not a bool tensor.
        ValueError: the shapes differ, or decay is negative.

    Example:
        >>> grad, w = torch.tensor([1.0, 1.0]), torch.tensor([8.0, 8.0])
        >>> sr_ste_gradient(grad, w, torch.tensor([True, False]), decay=0.5).tolist()
        [1.0, 5.0]
    """
    if require_number(decay, "decay") < 0:
        raise ValueError(f"decay must be at least 0, got {decay}")
    if require_floating(grad, "grad").shape != require_floating(w, "w").shape:
        raise ValueError(f"grad must have shape {tuple(w.shape)}, got {tuple(grad.shape)}")
    pruned = ~require_mask(mask, w.shape)
    return grad.detach() + decay * (w.detach() * pruned)
