"""The two things that a way of training sparse has to beat.

Evci et al. 2020 (arXiv 1911.11134), section 4, compare with both:
- *static*: connections drawn at random once, before training, and never changed;
- *small-dense*: no sparsity at all, but a narrower network with as many parameters.

A method that loses to the first has learned nothing about where connections belong; one that loses
to the second might as well not be sparse.
"""

import math
from itertools import pairwise

import torch
from jaxtyping import Bool
from torch import Tensor

from fewer.sparsity.magnitude import top_k_mask
from fewer.sparsity.validate import require_int


def random_mask(
    shape: tuple[int, ...], connections: int, generator: torch.Generator | None = None
) -> Bool[Tensor, "*shape"]:
    """A mask with exactly `connections` True, every such mask equally likely.

    Args:
        shape: of the layer.
        connections: between 0 and the layer's number of weights.
        generator: on the CPU; None takes torch's global one.

    Raises:
        TypeError: connections is not an int.
        ValueError: connections out of range.

    Example:
        >>> int(random_mask((3, 4), 5).sum())
        5
    """
    require_int(connections, "connections", 0, math.prod(shape))
    return top_k_mask(torch.rand(*shape, generator=generator), connections)


def mlp_parameters(widths: list[int]) -> int:
    """How many weights and biases a fully connected network has.

    Args:
        widths: units of the input, of each hidden layer and of the output.

    Example:
        >>> mlp_parameters([40, 100, 10])  # 4000 + 100 and 1000 + 10
        5110
    """
    return sum((a + 1) * b for a, b in pairwise(widths))


def small_dense_widths(widths: list[int], parameters: int) -> list[int]:
    """The widest network of the same depth and proportions within a budget of parameters.

    The hidden widths are floor(c * width), at least 1, with the largest c in [0, 1] that stays
    within the budget; input and output keep theirs. The biases are counted too: a wide sparse
    network has a dense bias for every unit, and they weigh something at 98%.

    Args:
        widths: units of the input, of each hidden layer and of the output.
        parameters: the budget, weights and biases together.

    Returns:
        The new widths.

    Raises:
        ValueError: even hidden layers of one unit cost more than the budget.

    Example:
        >>> small_dense_widths([40, 100, 10], 1000)  # (40 + 1) 19 + (19 + 1) 10 = 979
        [40, 19, 10]
    """
    first, *hidden, last = widths
    # Nothing changes between two values of c at which some floor(c * width) steps up.
    steps = sorted({k / width for width in hidden for k in range(1, width + 1)} | {0.0})
    for c in reversed(steps):
        # The 1e-9 keeps k / width * width from falling just below k.
        narrow = [first, *(max(1, math.floor(c * width + 1e-9)) for width in hidden), last]
        if mlp_parameters(narrow) <= parameters:
            return narrow
    raise ValueError(f"parameters must be at least {mlp_parameters(narrow)}, got {parameters}")
