"""How many connections each layer gets: uniform, Erdős-Rényi (ER) and Erdős-Rényi-Kernel (ERK).

Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science" (arXiv 1707.04780), equation 1; Evci et al. 2020,
"Rigging the lottery" (arXiv 1911.11134), section 3 (1) and appendix.

    ER:   d_l = epsilon (n_in + n_out) / (n_in n_out)
    ERK:  d_l = epsilon (n_in + n_out + w + h) / (n_in n_out w h)

d_l is the density of layer l, w and h the sides of its convolution kernel, and epsilon the one
number that gives the whole network the density 1 - S. Layers with few inputs and outputs (the last
one above all) come out denser, so that no unit is starved; for a fully connected layer ER and ERK
are the same.

A small layer may come out with d_l > 1. It is then kept dense, and epsilon is raised for the others
until the network's total is right again: d_l = min(1, epsilon r_l).

The literal example that other implementations carry, shapes (2, 4), (3, 6), (2, 4, 6) at S = 0.5:
ERK gives the sparsities 0, 0.31, 0.655. ER gives 0.21, 0.47, 0.56 if the third shape is read as
[kernel, in, out], kernel first; torch's order is [out, in, kernel] and gives other ones, hence the
argument `channels` of `er_densities`.
"""

import math

from fewer.sparsity.validate import require_sparsity


def uniform_densities(shapes: list[tuple[int, ...]], sparsity: float) -> list[float]:
    """The same density 1 - S for every layer.

    Evci et al. keep a convolutional network's first layer dense beside it (it is small there and
    matters much); leave it out of `shapes` for that.

    Args:
        shapes: one shape a layer, at least one.
        sparsity: S, the fraction of zeros, in [0, 1].

    Raises:
        ValueError: sparsity out of range, no layer, or a side below 1.

    Example:
        >>> uniform_densities([(300, 784), (10, 300)], sparsity=0.75)
        [0.25, 0.25]
    """
    return [1 - require_sparsity(sparsity) for _ in layer_sizes(shapes)]


def erk_densities(shapes: list[tuple[int, ...]], sparsity: float) -> list[float]:
    """Erdős-Rényi-Kernel: each layer's density goes with the sum of its sides over their product.

        r_l = sum(shape) / prod(shape),    d_l = min(1, epsilon r_l)

    with the one epsilon for which sum d_l N_l = (1 - S) sum N_l, N_l = prod(shape).
    `capped_densities` finds it.

    Args:
        shapes: one shape a layer, at least one, of any number of dimensions and in any order of
            them: [out, in] for a linear layer, [out, in, h, w] for a convolution.
        sparsity: S, the fraction of zeros in the whole network, in [0, 1].

    Returns:
        One density a layer, in [0, 1]. `connection_counts` makes whole numbers of them.

    Raises:
        ValueError: sparsity out of range, no layer, or a side below 1.

    Example:
        >>> [round(1 - d, 3) for d in erk_densities([(2, 4), (3, 6), (2, 4, 6)], sparsity=0.5)]
        [0.0, 0.31, 0.655]
    """
    sizes = layer_sizes(shapes)
    ratios = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    return capped_densities(sizes, ratios, sparsity)


def er_densities(
    shapes: list[tuple[int, ...]], sparsity: float, channels: tuple[int, int] = (0, 1)
) -> list[float]:
    """Erdős-Rényi: as ERK, but only the two channel sides count, not the kernel's.

        r_l = (n_in + n_out) / (n_in n_out),    d_l = min(1, epsilon r_l)

    Args:
        shapes: one shape a layer, at least one, each with at least two dimensions.
        sparsity: S, the fraction of zeros in the whole network, in [0, 1].
        channels: where n_out and n_in stand in a shape. (0, 1) is torch's [out, in, h, w];
            (-2, -1) is the order [h, w, in, out] of TensorFlow and JAX.

    Returns:
        One density a layer, in [0, 1].

    Raises:
        ValueError: sparsity out of range, no layer, or a side below 1.
        IndexError: a shape without such dimensions.

    Example:
        >>> shapes = [(2, 4), (3, 6), (2, 4, 6)]
        >>> [round(1 - d, 2) for d in er_densities(shapes, sparsity=0.5, channels=(-2, -1))]
        [0.21, 0.47, 0.56]
    """
    sides = [[shape[c] for c in channels] for shape in shapes]
    return capped_densities(layer_sizes(shapes), [sum(s) / math.prod(s) for s in sides], sparsity)


def capped_densities(sizes: list[int], ratios: list[float], sparsity: float) -> list[float]:
    """Densities in proportion to `ratios`, none above 1, that together make the sparsity asked for.

    d_l = min(1, epsilon r_l). Whoever comes out above 1 is kept dense and taken out of the budget;
    epsilon is then worked out anew for those that are left, until nobody is above 1.

    Args:
        sizes: N_l, the number of weights of each layer.
        ratios: r_l > 0, one a layer, in any unit.
        sparsity: S, the fraction of zeros of all layers together, in [0, 1].

    Returns:
        One density a layer, in [0, 1], with sum d_l N_l = (1 - S) sum N_l up to rounding.

    Raises:
        ValueError: sparsity out of range, or the two lists differ in length.

    Example:
        >>> capped_densities([10, 100], [5.0, 1.0], sparsity=0.5)  # 5/3 would not fit: 10 + 45
        [1.0, 0.45]
    """
    budget = (1 - require_sparsity(sparsity)) * sum(sizes)
    layers = list(zip(sizes, ratios, strict=True))
    dense: set[int] = set()
    while len(dense) < len(layers):
        free = [l for l in range(len(layers)) if l not in dense]
        left = budget - sum(sizes[l] for l in dense)
        epsilon = left / sum(sizes[l] * ratios[l] for l in free)
        too_dense = {l for l in free if epsilon * ratios[l] > 1}
        if not too_dense:
            return [1.0 if l in dense else epsilon * r for l, (_, r) in enumerate(layers)]
        dense |= too_dense
    return [1.0] * len(layers)


def connection_counts(shapes: list[tuple[int, ...]], densities: list[float]) -> list[int]:
    """Whole numbers of connections from densities, so that the network's total is exact.

    Each layer gets floor(d_l N_l); the connections that are still missing to
    round(sum d_l N_l) go one each to the layers with the largest fractions lost (of equals, to
    the earlier layer). Rounding each layer by itself would let the totals of two methods differ.

    Args:
        shapes: one shape a layer.
        densities: one a layer, in [0, 1].

    Returns:
        One count a layer, between 0 and N_l, within 1 of d_l N_l.

    Raises:
        ValueError: a density out of range, or the two lists differ in length.

    Example:
        >>> connection_counts([(5, 2), (5, 2), (5, 2)], [0.25, 0.25, 0.25])  # 7.5 in all, so 8
        [3, 3, 2]
    """
    if not all(0 <= density <= 1 for density in densities):
        raise ValueError(f"densities must lie between 0 and 1, got {list(densities)}")
    wanted = [d * size for d, size in zip(densities, layer_sizes(shapes), strict=True)]
    counts = [math.floor(w) for w in wanted]
    missing = round(sum(wanted)) - sum(counts)
    by_loss = sorted(range(len(counts)), key=lambda l: counts[l] - wanted[l])
    for l in by_loss[:missing]:
        counts[l] += 1
    return counts


def layer_sizes(shapes: list[tuple[int, ...]]) -> list[int]:
    """N_l, the number of weights of each layer: the products of the shapes.

    Raises:
        ValueError: no layer, or a side below 1.

    Example:
        >>> layer_sizes([(2, 4), (2, 4, 6)])
        [8, 48]
    """
    if not shapes or any(side < 1 for shape in shapes for side in shape):
        raise ValueError(f"shapes must be one or more shapes with sides >= 1, got {list(shapes)}")
    return [math.prod(shape) for shape in shapes]
