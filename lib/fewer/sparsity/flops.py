"""What training sparse costs, in floating-point operations (FLOPs), counted honestly.

Evci et al. 2020 (arXiv 1911.11134), appendix on FLOPs. With f_S and f_D the FLOPs of one forward
pass of the sparse and of the dense network:

    dense, small-dense          3 f_D (of its own f_D)
    static, SET                 3 f_S
    RigL                        (3 f_S Delta T + 2 f_S + f_D) / (Delta T + 1)
    gradual pruning             mean over the steps of 3 f_D (1 - s_t)

A backward pass is two forward passes: one product for the gradient of the layer's inputs, one for
that of its weights. RigL's update step needs the latter for the *dense* layer: f_S forward, f_S for
the inputs, f_D for the weights.

A multiplication and an addition are two operations. As in the paper, left out are biases,
activations, the optimizer, and the sorting of an update; and the first layer's inputs are charged
for a gradient that nobody needs. The numbers say what an implementation that skips the zeros would
compute. Ours, like nearly all, multiplies by them, and takes as long as a dense network.
"""

from fewer.sparsity.validate import require_int, require_sparsity


def forward_flops(connections: list[int], positions: list[int] | None = None) -> int:
    """FLOPs of one forward pass of one example: 2 for every use of every connection.

    Args:
        connections: the number of non-zero weights of each layer.
        positions: how often each weight of a layer is used: 1 for a linear layer (the default),
            height x width of the output for a convolution, the tokens for a sequence.

    Raises:
        ValueError: the two lists differ in length.

    Example:
        >>> forward_flops([78_400, 1_000])
        158800
    """
    if positions is None:
        positions = [1] * len(connections)
    return sum(2 * nonzero * times for nonzero, times in zip(connections, positions, strict=True))


def step_flops(forward: float) -> float:
    """One training step of one example: forward, and a backward of twice that.

    Args:
        forward: f_S or f_D, the FLOPs of a forward pass.

    Example:
        >>> step_flops(158_800)
        476400
    """
    return 3 * forward


def rigl_step_flops(f_S: float, f_D: float, delta_T: int) -> float:
    """The mean cost of a step of RigL: Delta T sparse steps, then one with a dense gradient.

        (3 f_S Delta T + 2 f_S + f_D) / (Delta T + 1)

    Args:
        f_S: forward FLOPs of the sparse network.
        f_D: forward FLOPs of the dense network.
        delta_T: sparse steps between two updates of the connections, at least 1.

    Raises:
        TypeError: delta_T is not an int.
        ValueError: delta_T below 1.

    Example:
        >>> rigl_step_flops(f_S=10, f_D=100, delta_T=99)  # 30 were it not for the dense gradient
        30.9
    """
    require_int(delta_T, "delta_T", 1)
    return (3 * f_S * delta_T + 2 * f_S + f_D) / (delta_T + 1)


def pruning_step_flops(f_D: float, sparsities: list[float]) -> float:
    """The mean cost of a step while a dense network is pruned: 3 f_D (1 - s_t), averaged.

    Args:
        f_D: forward FLOPs of the dense network.
        sparsities: s_t of every step (or of steps evenly spaced), in [0, 1], at least one.

    Raises:
        ValueError: a sparsity out of range, or none at all.

    Example:
        >>> pruning_step_flops(100, [0.0, 0.5, 1.0])
        150.0
    """
    if not sparsities:
        raise ValueError("sparsities must hold at least one value, got none")
    kept = [1 - require_sparsity(s, "sparsities") for s in sparsities]
    return step_flops(f_D) * sum(kept) / len(kept)
