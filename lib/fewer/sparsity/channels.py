"""Channel pruning: hidden channels go, and two consecutive layers really become smaller.

Li et al. 2017, "Pruning filters for efficient convnets" (arXiv 1608.08710), section 3.1: a channel
is judged by the norm of the weights that compute it, and with it goes what the next layer read from
it. For y = W_out f(W_in x + b_in) with an elementwise f, channel h is row h of W_in and b_in, and
column h of W_out:

    s_h = sum_i |W_in[h, i]|                 (`w_in`: [hidden, in])
    W_in' = W_in[keep, :],   b_in' = b_in[keep],   W_out' = W_out[:, keep]

The result is dense: no index, no special kernel, fewer bytes and fewer multiplications.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.sparsity.validate import require_dims, require_finite, require_floating, require_mask


def channel_norms(w_in: Float[Tensor, "hidden in"], p: int = 1) -> Float[Tensor, "hidden"]:
    """The score of each hidden channel: the L1 or L2 norm of its row of weights.

    `top_k_mask(channel_norms(w_in), k)` is then the `keep` of `shrink_channels`.

    Args:
        w_in: [hidden, in], as `nn.Linear` stores its weight, finite.
        p: 1 for sum |w| (the paper's choice), 2 for the square root of the sum of squares.

    Returns:
        [hidden], float32 (float64 for a float64 w_in), in the unit of w_in.

    Raises:
        TypeError: w_in is not a floating-point tensor.
        ValueError: w_in is not a matrix, or holds NaN or infinity; p is neither 1 nor 2.

    Example:
        >>> w_in = torch.tensor([[3.0, -4.0], [0.0, 6.0]])
        >>> channel_norms(w_in, p=1).tolist(), channel_norms(w_in, p=2).tolist()
        ([7.0, 6.0], [5.0, 6.0])
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    w_in = require_dims(require_finite(w_in, "w_in"), 2, "w_in")
    return torch.linalg.vector_norm(w_in, ord=p, dim=1)


def shrink_channels(
    w_in: Float[Tensor, "hidden in"],
    b_in: Float[Tensor, "hidden"] | None,
    w_out: Float[Tensor, "out hidden"],
    keep: Bool[Tensor, "hidden"],
) -> tuple[Float[Tensor, "kept in"], Float[Tensor, "kept"] | None, Float[Tensor, "out kept"]]:
    """Remove hidden channels from two consecutive linear layers.

    With any elementwise f between the layers, the smaller pair computes what the large one does
    once the outputs of the pruned channels are set to zero. So the function is unchanged where
    these channels were dead: column of w_out zero; or row of w_in and entry of b_in zero and f(0) =
    0 (ReLU, GELU and SiLU, but not the sigmoid). The bias of the second layer stays as it is. A
    gated MLP has two layers that write the hidden channels: shrink each with the same `keep`.

    Args:
        w_in: [hidden, in], the weight of the first layer; any floating type.
        b_in: [hidden], its bias, or None.
        w_out: [out, hidden], the weight of the second layer.
        keep: bool, [hidden], True = kept.

    Returns:
        w_in [kept, in], b_in [kept] (None if it was None), w_out [out, kept]: copies in the types
        they came in, kept channels in their old order. A gradient flows back through them.

    Raises:
        TypeError: a weight or b_in is not a floating-point tensor, keep is not a bool tensor.
        ValueError: shapes that do not fit together.

    Example:
        >>> w_in, b_in = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]), torch.zeros(3)
        >>> w_out = torch.tensor([[5.0, 6.0, 7.0]])
        >>> keep = torch.tensor([True, False, True])
        >>> [part.tolist() for part in shrink_channels(w_in, b_in, w_out, keep)]
        [[[1.0, 2.0], [3.0, 4.0]], [0.0, 0.0], [[5.0, 7.0]]]
    """
    hidden = require_dims(require_floating(w_in, "w_in"), 2, "w_in").shape[0]
    require_mask(keep, torch.Size([hidden]), "keep")
    if require_dims(require_floating(w_out, "w_out"), 2, "w_out").shape[1] != hidden:
        raise ValueError(f"w_out must have {hidden} columns, got shape {tuple(w_out.shape)}")
    if b_in is not None and require_floating(b_in, "b_in").shape != keep.shape:
        raise ValueError(f"b_in must have shape {(hidden,)}, got {tuple(b_in.shape)}")
    return w_in[keep], None if b_in is None else b_in[keep], w_out[:, keep]
