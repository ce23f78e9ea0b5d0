"""Train a small fully connected network whose connections stay, move or shrink.

The loop of Evci et al. 2020 (arXiv 1911.11134), algorithm 1. Of every Delta T steps, one changes
the connections *in place of* the weights; a method is nothing but how (`Rewire`):

    static      no rewiring at all
    SET         rewire_set       drop by magnitude, grow at random
    RigL        rewire_rigl      drop by magnitude, grow by the dense gradient
    gradual     rewire_gradual   from dense, drop by magnitude (Zhu & Gupta 2017, arXiv 1710.01878)

Two things keep the loop this short. Weights are *stored* as zeros where no connection is: the
backward pass then gives the gradient of the dense layer, which RigL wants, and the optimizer gets
it masked. And every tensor has a first dimension of seeds: networks that differ in their seed are
trained side by side, as one batched product, and never touch. A real sparse implementation would
not compute with the zeros at all (see `flops.py`).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.data import LabelledSplit
from fewer.sparsity.lottery import prune_surviving, rewind
from fewer.sparsity.magnitude import number_kept
from fewer.sparsity.rigl import drop_fraction, rigl_update
from fewer.sparsity.schedule import cubic_sparsity
from fewer.sparsity.set import carry_over, set_update
from fewer.sparsity.static import random_mask

# One network's (weights, masks, dense gradients, step, generator) -> its new masks.
Rewire = Callable[[list[Tensor], list[Tensor], list[Tensor], int, torch.Generator], list[Tensor]]


class Network(NamedTuple):
    """Fully connected layers with ReLU between them, one network a seed, each parameter stacked."""

    weights: list[Float[Tensor, "seeds out in"]]
    biases: list[Float[Tensor, "seeds out"]]


class SparseRun(NamedTuple):
    """What training leaves behind."""

    network: Network
    masks: list[Bool[Tensor, "seeds out in"]]
    accuracy: Float[Tensor, "seeds"]  # on the test inputs, 0 to 1
    # (step, the first layer's mask from then on), at the start and at each update
    film: list[tuple[int, Bool[Tensor, "seeds out in"]]]


def initial_network(widths: list[int], seeds: list[int]) -> Network:
    """Dense networks as He et al. 2015 (arXiv 1502.01852) start them: N(0, 2 / in), biases 0.

    Args:
        widths: units of the input, of each hidden layer and of the output.
        seeds: one network each; the same seed gives the same one, whoever is beside it.

    Example:
        >>> [tuple(w.shape) for w in initial_network([40, 100, 10], seeds=[0, 1]).weights]
        [(2, 100, 40), (2, 10, 100)]
    """
    shapes = [(n_out, n_in) for n_in, n_out in pairwise(widths)]
    networks = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(*shape, generator=generator) for shape in shapes]
        networks.append([w * math.sqrt(2 / w.shape[1]) for w in draws])
    weights = [torch.stack(layer) for layer in zip(*networks, strict=True)]
    return Network(weights, [torch.zeros(w.shape[:2]) for w in weights])


def random_masks(
    widths: list[int], connections: list[int], seeds: list[int]
) -> list[Bool[Tensor, "seeds out in"]]:
    """Random connections for every seed's network, exactly `connections[l]` of them in layer l.

    They are independent of the weights that `initial_network` draws with the same seed.

    Example:
        >>> [mask.sum((1, 2)).tolist() for mask in random_masks([4, 8, 2], [5, 3], seeds=[0, 1])]
        [[5, 5], [3, 3]]
    """
    shapes = [(n_out, n_in) for n_in, n_out in pairwise(widths)]
    # From the same stream as the weights, the masks would keep the weights of certain sizes.
    generators = [torch.Generator().manual_seed(100 + seed) for seed in seeds]
    return [
        torch.stack([random_mask(shape, count, generator) for generator in generators])
        for shape, count in zip(shapes, connections, strict=True)
    ]


def logits(
    network: Network, x: Float[Tensor, "seeds batch in"]
) -> Float[Tensor, "seeds batch classes"]:
    """The outputs of every seed's network for its own batch."""
    last = len(network.weights) - 1
    for l, (weight, bias) in enumerate(zip(*network, strict=True)):
        x = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
        x = x if l == last else x.relu()
    return x


def accuracies(
    network: Network, x: Float[Tensor, "batch in"], y: Int[Tensor, "batch"]
) -> Float[Tensor, "seeds"]:
    """The fraction of right answers of every seed's network, all asked the same questions."""
    with torch.no_grad():
        answers = logits(network, x.expand(len(network.weights[0]), *x.shape)).argmax(-1)
    return (answers == y).float().mean(-1)


def train_sparse(
    split: LabelledSplit,
    network: Network,
    masks: list[Bool[Tensor, "seeds out in"]],
    rewire: Rewire | None = None,
    *,
    seeds: list[int],
    steps: int,
    start: int = 0,
    stop: int | None = None,
    delta_T: int = 100,
    T_end: int | None = None,
    lr: float = 0.1,
    batch: int = 128,
) -> SparseRun:
    """Train the connections in `masks`, rewiring every delta_T steps; cross-entropy, SGD.

    The optimizer is SGD with momentum 0.9, its learning rate falling from lr to 0 in a half cosine
    over `steps`. Batches are drawn with replacement, and depend on seed and step alone.

    Args:
        split: data to train and test on, on the device of the network.
        network: where to start. It is not modified.
        masks: True where a connection is, one a layer. All True is dense training.
        rewire: how connections change; None leaves them as they are.
        seeds: one for each network, for its batches and random growth.
        steps: the length of the whole training.
        start, stop: train only these steps of it, for lottery tickets: [start, stop).
        delta_T: an update of the connections at every multiple of it, in place of a step of the
            optimizer, except at 0 and from T_end on.
        T_end: default three quarters of `steps`, as in the paper.
        lr: the learning rate at step 0.
        batch: examples a step and network.

    Returns:
        The trained network (weights zero where no connection is), the final masks, test accuracy,
        and the film of the first layer.

    Raises:
        TypeError, ValueError: masks do not fit the network's weights, or seeds its number.

    Example:
        >>> from fewer.data import digits
        >>> widths, seeds = [64, 32, 10], [0, 1]
        >>> network = initial_network(widths, seeds)
        >>> masks = random_masks(widths, [200, 60], seeds)
        >>> rigl = rewire_rigl(alpha=0.3, T_end=150)
        >>> run = train_sparse(digits(), network, masks, rigl, seeds=seeds, steps=200, delta_T=25)
        >>> [mask.sum((1, 2)).tolist() for mask in run.masks], bool((run.accuracy > 0.8).all())
        ([[200, 200], [60, 60]], True)
        >>> [t for t, first_mask in run.film]
        [0, 25, 50, 75, 100, 125]
    """
    x, y = split.x_train, split.y_train
    stop = steps if stop is None else stop
    T_end = 3 * steps // 4 if T_end is None else T_end
    if len(seeds) != len(network.weights[0]):
        raise ValueError(f"seeds must be {len(network.weights[0])}, one a network, got {seeds}")
    weights = [w.detach().requires_grad_() for w in rewind(network.weights, masks)]
    biases = [b.detach().clone().requires_grad_() for b in network.biases]
    network = Network(weights, biases)
    optimizer = torch.optim.SGD([*weights, *biases], lr=lr, momentum=0.9)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    batches = torch.stack(
        [torch.randint(len(x), (steps, batch), generator=g) for g in generators], dim=1
    ).to(x.device)
    film = [(start, masks[0])]

    for t in range(start, stop):
        chosen = batches[t]  # [seeds, batch]
        output = logits(network, x[chosen])
        loss = F.cross_entropy(output.flatten(0, 1), y[chosen].flatten(), reduction="sum") / batch
        optimizer.zero_grad()
        loss.backward()  # summed over the seeds: each network gets its own gradient
        gradients = [w.grad for w in weights if w.grad is not None]
        if rewire and 0 < t < T_end and t % delta_T == 0:
            values = [w.detach() for w in weights]
            new = [
                rewire(
                    _network(values, s), _network(masks, s), _network(gradients, s), t, generator
                )
                for s, generator in enumerate(generators)
            ]
            old, masks = masks, [torch.stack(layer) for layer in zip(*new, strict=True)]
            for weight, before, after in zip(weights, old, masks, strict=True):
                carry_over_parameter(weight, optimizer, before, after)
            film.append((t, masks[0]))
        else:
            for gradient, mask in zip(gradients, masks, strict=True):
                gradient.mul_(mask)
            optimizer.param_groups[0]["lr"] = lr / 2 * (1 + math.cos(math.pi * t / steps))
            optimizer.step()

    network = Network([w.detach() for w in weights], [b.detach() for b in biases])
    return SparseRun(network, masks, accuracies(network, split.x_test, split.y_test), film)


def _network(stacks: list[Tensor], s: int) -> list[Tensor]:
    return [stack[s] for stack in stacks]


def carry_over_parameter(
    parameter: Tensor,
    optimizer: torch.optim.Optimizer,
    old_mask: Bool[Tensor, "*shape"],
    new_mask: Bool[Tensor, "*shape"],
) -> None:
    """`carry_over`, in place, for a parameter and whatever its optimizer remembers about it.

    Everything of the parameter's shape counts as its state: SGD's momentum, Adam's two moments.
    Adam's step count has another shape and stays.

    Example:
        >>> w = torch.tensor([1.0, 2.0, 0.0], requires_grad=True)
        >>> optimizer = torch.optim.SGD([w], lr=0.5, momentum=0.9)
        >>> w.sum().backward(); optimizer.step()
        >>> old, new = torch.tensor([True, True, False]), torch.tensor([True, False, True])
        >>> carry_over_parameter(w, optimizer, old, new)
        >>> w.tolist(), optimizer.state[w]["momentum_buffer"].tolist()
        ([0.5, 0.0, 0.0], [1.0, 0.0, 0.0])
    """
    state = [s for s in optimizer.state[parameter].values() if isinstance(s, Tensor)]
    with torch.no_grad():
        for values in (parameter, *state):
            if values.shape == parameter.shape:
                values.copy_(carry_over(values, old_mask, new_mask))


def rewire_set(alpha: float, T_end: int) -> Rewire:
    """SET with RigL's decaying fraction, so that growth is the only difference between the two."""
    return lambda weights, masks, gradients, t, generator: [
        set_update(weight, mask, drop_fraction(t, alpha, T_end), generator)
        for weight, mask in zip(weights, masks, strict=True)
    ]


def rewire_rigl(alpha: float, T_end: int) -> Rewire:
    """RigL, layer by layer."""
    return lambda weights, masks, gradients, t, generator: [
        rigl_update(weight, mask, gradient, drop_fraction(t, alpha, T_end))
        for weight, mask, gradient in zip(weights, masks, gradients, strict=True)
    ]


def rewire_gradual(sparsity: float, end: int) -> Rewire:
    """Gradual magnitude pruning along the cubic schedule, from dense at step 0 to `end`.

    All layers compete with each other, so no layer is given a density beforehand. `end` has to be a
    step at which the connections are updated, or one such step has to follow it.
    """

    def rewire(
        weights: list[Tensor],
        masks: list[Tensor],
        gradients: list[Tensor],
        t: int,
        generator: torch.Generator,
    ) -> list[Tensor]:
        total, connected = sum(m.numel() for m in masks), sum(int(m.sum()) for m in masks)
        kept = number_kept(total, cubic_sparsity(t, 0, end, 0.0, sparsity))
        return prune_surviving(weights, masks, 1 - kept / max(connected, 1))

    return rewire
