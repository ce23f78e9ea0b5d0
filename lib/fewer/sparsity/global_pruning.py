"""Global pruning: one ranking for all layers, so that each layer gets the sparsity it can bear.

Frankle & Carbin 2019, "The lottery ticket hypothesis" (arXiv 1803.03635), section 4: where layers
differ in size and scale, pruning each by the same share makes the small ones a bottleneck; there,
the smallest weights of all layers together go.

    mask_l,i = 1  if score_l,i is among the k largest of all layers,    k = n - round(s n)
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.sparsity.magnitude import number_kept, top_k_mask
from fewer.sparsity.validate import require_layers


def global_masks(
    scores: dict[str, Float[Tensor, "..."]], sparsity: float
) -> dict[str, Bool[Tensor, "..."]]:
    """Prune several layers with one ranking: the largest scores of all layers together are kept.

    Layers with small scores lose more than their share, and may lose everything.

    Args:
        scores: name -> scores of a layer (any shapes; |w| for magnitude pruning). For ties, a layer
            that comes earlier in the dict counts as stored first.
        sparsity: share to prune of all weights together, 0 to 1.

    Returns:
        name -> bool mask of the layer's shape, in the same order; in all masks together
        `number_kept(total, sparsity)` are True.

    Raises:
        TypeError: scores is not a dict, or a layer's are not a floating-point tensor.
        ValueError: scores is empty; NaN in a layer; sparsity out of range.

    Example:
        >>> first, second = torch.tensor([5.0, 4.0, 3.0]), torch.tensor([[1.0], [2.0]])
        >>> masks = global_masks({"first": first, "second": second}, sparsity=0.6)
        >>> masks["first"].tolist(), masks["second"].tolist()
        ([True, True, False], [[False], [False]])
    """
    scores = require_layers(scores)
    flat = torch.cat([x.flatten() for x in scores.values()])
    mask = top_k_mask(flat, number_kept(flat.numel(), sparsity))
    parts = mask.split([x.numel() for x in scores.values()])
    return {
        name: part.reshape(x.shape) for (name, x), part in zip(scores.items(), parts, strict=True)
    }
