# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lab 5. Training sparse
#
# Pruning begins with a dense network that somebody had to train. Must it? Could a network be
# **sparse from the first step to the last**, and so be cheaper to train as well? That a sparse
# network good enough *exists* was shown with lottery tickets; this lab begins there. Then it finds
# such networks without the dense one: it decides how many connections each layer gets, moves them
# while the network learns, watches them move, and counts what it all costs. At the end stands the
# figure of the field: accuracy against sparsity, every method in it.
#
# Each exercise is *picture → equation → your code → check*. Fill in a function, run its cell, run
# the check below it. You may check as often as you like, and a mistake in one exercise never costs
# another.
#
# A *mask* is a tensor of booleans, True where a connection is. The data are MNIST-1D: noisy curves
# of 40 points, ten classes. The networks are small (40-300-100-10 units, 43,000 weights), so that
# five of them, which differ in their seed, are trained side by side in seconds: accuracies come
# as a mean over five seeds ± its standard error. And a warning: we store the zeros and multiply
# by them, as most research on the matter does. Section 5.6 counts what an implementation that
# skips them would compute; nothing here runs faster.

# %%
from autograder import check

# %% tags=["demo"]
import re
from itertools import pairwise

import matplotlib.pyplot as plt
import torch

import fewer.sparsity as library
from fewer.data import mnist1d
from fewer.plots import GREY, GRID, INK, PALETTE, direct_label, figure, log_axis, style
from fewer.sizes import sized

style()
split = mnist1d()
WIDTHS = [40, *sized((300, 100), (40, 20)), 10]
SHAPES = [(n_out, n_in) for n_in, n_out in pairwise(WIDTHS)]
WEIGHTS = sum(library.layer_sizes(SHAPES))
LEVELS = (0.8, 0.9, 0.95, 0.98)  # the sparsities to compare at
SEEDS = list(range(sized(5, 2)))
STEPS, DELTA_T, ALPHA = sized(1000, 60), sized(25, 10), 0.3
T_END = 3 * STEPS // 4
SETUP = f"MNIST-1D, {'-'.join(map(str, WIDTHS))} units, {STEPS:,} steps of 64, {len(SEEDS)} seeds"


def train(network, masks=None, rewire=None, seeds=SEEDS, **when):
    """The same training for every method; without masks, a dense one."""
    if masks is None:
        masks = [torch.ones_like(w, dtype=torch.bool) for w in network.weights]
    common = {"seeds": seeds, "steps": STEPS, "delta_T": DELTA_T, "batch": 64}
    return library.train_sparse(split, network, masks, rewire, **common, **when)


def mean_error(accuracy):
    """Mean over the seeds (the last dimension) and its standard error, in percent."""
    return 100 * accuracy.mean(-1), 100 * accuracy.std(-1) / accuracy.shape[-1] ** 0.5


def report(name, accuracy):
    """A line for each method as soon as it is trained."""
    pairs = zip(*(x.reshape(-1).tolist() for x in mean_error(accuracy)), strict=True)
    print(f"{name:22}", "   ".join(f"{mean:5.1f} ± {error:3.1f}" for mean, error in pairs))


def sparsity_axis(ax):
    """The sparsities as equal steps of a logarithm: each is half (at last 2/5) of the one before."""
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.set_xticks([1 - s for s in LEVELS], [f"{100 * s:g}" for s in LEVELS])
    ax.minorticks_off()


start = library.initial_network(WIDTHS, SEEDS)
dense = train(start)
report("dense, accuracy (%)", dense.accuracy)

# %% [markdown]
# ## 5.1 The lottery ticket
#
# Train the dense network. Cut the weights that training left small. Set the others **back to what
# they were early in training**, and train again: only those, from there. Do it over and over. In
# the picture each dot is a weight, from early (across) to late (up). The cut looks at the height
# alone; what is kept goes back to where it was across.

# %% tags=["demo"]
K = sized(50, 10)  # the step that tickets go back to
early = train(start, stop=K).network
late_weights = [w[0] for w in dense.network.weights]
threshold = torch.cat([w.abs().flatten() for w in late_weights]).quantile(0.3).item()
fig, ax = figure(
    "The cut looks at what a weight became, not at what it was",
    f"weight after {K} steps (without unit)",
    f"weight after {STEPS:,} steps (without unit)",
    note=f"{SETUP}: seed 0, every eighth weight. In the grey band: the 30% of smallest magnitude.",
    size=(6.4, 4.6),
)
ax.axhspan(-threshold, threshold, color=GRID, zorder=0)
for l, color in reversed(list(enumerate(("blue", "vermilion", "green")))):
    before, after = early.weights[l][0].flatten(), late_weights[l].flatten()
    ax.plot(before[::8], after[::8], ".", color=PALETTE[color], markersize=3, alpha=0.6, mew=0)
    share = 100 * (after.abs() < threshold).float().mean()
    ax.text(
        0.02,
        0.96 - 0.06 * l,
        f"layer {l + 1}: {share:.0f}% fall into the band",
        transform=ax.transAxes,
        color=PALETTE[color],
    )
plt.show()

# %% [markdown]
# With $m$ the mask, $W_k$ the weights after $k$ steps and $W_T$ those at the end of the training of
# $m \odot W_k$, one round is
#
# $$
# m \leftarrow m \ \text{without the fraction } p \text{ of its connections with the smallest } |W_T| ,
# $$
#
# and $m \odot W_k$ is the ticket. All layers compete with each other, so nobody has to say how many
# weights each is to keep. Two things to mind: the fraction is one of the *surviving* connections,
# and nothing comes back that was cut before, whatever its weight says.

# %% tags=["exercise"]
from fewer.sparsity import prune_surviving

# %% tags=["check"]
check(prune_surviving)

# %% [markdown]
# Is it the ticket that wins, or would any network so sparse do as well? Two controls. *Same
# connections, new weights*: the ticket's mask with weights drawn anew. *Other connections*: in every
# layer as many as the ticket has, but at random places. Both train from step 0 to the end.

# %% tags=["demo"]
DENSITIES = sized([1, 0.45, 0.2, 0.141, 0.1, 0.0707, 0.05, 0.0316, 0.02], [1, 0.2, 0.1, 0.05, 0.02])
AT_LEVELS = [DENSITIES.index(round(1 - s, 2)) for s in LEVELS]


def each_seed(weights, masks, fraction):
    """One round of pruning for each seed's network by itself."""
    new = [
        library.prune_surviving([w[s] for w in weights], [m[s] for m in masks], fraction)
        for s in range(len(SEEDS))
    ]
    return [torch.stack(layer) for layer in zip(*new, strict=True)]


def side_by_side(masks):
    """Several sets of masks, [sets][layers], as one stack of networks."""
    return [torch.cat(layer) for layer in zip(*masks, strict=True)]


tickets = []


def train_from_k(weights, masks):
    tickets.append(train(library.Network(weights, early.biases), masks, start=K))
    report(f"{100 * DENSITIES[len(tickets) - 1]:5.1f}% of the weights", tickets[-1].accuracy)
    return tickets[-1].network.weights


fractions = [1 - after / before for before, after in pairwise(DENSITIES)]
last = library.lottery_ticket(train_from_k, early.weights, fractions, prune=each_seed)[-1]
train_from_k(library.rewind(early.weights, last), last)

ticket_masks = [tickets[i].masks for i in AT_LEVELS]
generator = torch.Generator().manual_seed(200)
other_masks = [
    [
        torch.stack([library.random_mask(m.shape, int(m.sum()), generator) for m in layer])
        for layer in masks
    ]
    for masks in ticket_masks
]
anew = library.initial_network(WIDTHS, [1000 + seed for seed in SEEDS] * len(LEVELS))
again = library.initial_network(WIDTHS, SEEDS * len(LEVELS))
controls = {}
for name, network, masks in (
    ("same connections, new weights", anew, ticket_masks),
    ("other connections", again, other_masks),
):
    run = train(network, side_by_side(masks), seeds=SEEDS * len(LEVELS))
    controls[name] = run.accuracy.view(len(LEVELS), -1)
    report(name, controls[name])

# %% tags=["demo"]
fig, ax = figure(
    "A ticket wins by its connections and by their early weights",
    "weights left (% of all)",
    "test accuracy (%)",
    note=f"{SETUP}; bars: standard error. {len(DENSITIES)} trainings for the last ticket, each back to "
    f"step {K}. Controls: as many connections in each layer as the ticket has.",
)
curves = {"ticket": (DENSITIES, torch.stack([ticket.accuracy for ticket in tickets]))}
curves |= {name: ([1 - s for s in LEVELS], accuracy) for name, accuracy in controls.items()}
for (name, (density, accuracy)), color in zip(
    curves.items(), ("amber", "green", "vermilion"), strict=True
):
    mean, error = mean_error(accuracy)
    percent = [100 * d for d in density]
    ax.errorbar(percent, mean, error, color=PALETTE[color], linewidth=0, elinewidth=1)
    (line,) = ax.plot(percent, mean, marker="o", color=PALETTE[color])
    direct_label(ax, line, name.replace(", ", ",\n").replace("other c", "other\nc"))
ax.set_xscale("log")
ax.set_xticks([100, 50, 20, 10, 5, 2], ["100", "50", "20", "10", "5", "2"])
ax.minorticks_off()
ax.invert_xaxis()
plt.show()

# %% [markdown]
# Down to a tenth of its weights the ticket loses next to nothing. The controls, with as many, lose a
# lot: *which* connections is worth much, *with which weights they begin* as much again or more. (Frankle and
# colleagues needed $k > 0$ for deep networks. In this small one, $k = 0$ is as good as $k = 50$ down to
# 5% of the weights, both at 66.6%; at 2% it has 59.7 ± 0.6 against 61.3 ± 0.5%.)
#
# But mind the price: every dot took one more training, the first of them dense. The ticket proves
# that sparse networks *can* be trained. It does not say how to find one cheaply.

# %% [markdown]
# ## 5.2 How many connections for each layer?
#
# A network that is sparse from the start has to be told. The same density everywhere, *uniform*,
# starves small layers: at 98%, our last layer of 1,000 weights would keep 20, two for each class.
# *Erdős-Rényi-Kernel* (ERK) gives a layer a density in proportion to
# $r_l$, the sum of the sides of its shape over their product, which is large for small layers.
# Sometimes too large:

# %% tags=["demo"]
CONV = {
    "conv1\n16×3×3×3": (16, 3, 3, 3),
    "conv2\n32×16×3×3": (32, 16, 3, 3),
    "conv3\n64×32×3×3": (64, 32, 3, 3),
    "linear\n10×64": (10, 64),
}
conv_shapes = list(CONV.values())
sizes = library.layer_sizes(conv_shapes)
ratios = [sum(shape) / size for shape, size in zip(conv_shapes, sizes, strict=True)]
epsilon = 0.2 * sum(sizes) / sum(r * n for r, n in zip(ratios, sizes, strict=True))
fig, ax = figure(
    "Plain proportion asks small layers for more than they have",
    None,
    "density (fraction of a layer's weights)",
    note="A small convolutional network that is to become 80% sparse. Above each bar: connections "
    "asked for, of places. Dashed: those that do not fit.",
    size=(6.4, 3.4),
)
for i, (r, n) in enumerate(zip(ratios, sizes, strict=True)):
    ax.bar(i, min(1, epsilon * r), color=PALETTE["blue"], width=0.6)
    if epsilon * r > 1:
        ax.bar(
            i,
            epsilon * r - 1,
            bottom=1,
            width=0.6,
            fill=False,
            edgecolor=PALETTE["vermilion"],
            linestyle="--",
        )
    ax.text(i, epsilon * r + 0.03, f"{epsilon * r * n:,.0f} of {n:,}", ha="center", va="bottom")
ax.axhline(1, color=INK, linewidth=0.8)
ax.set_xticks(range(len(CONV)), CONV)
plt.show()

# %% [markdown]
# A layer cannot be denser than dense. So whoever comes out above 1 is kept dense and leaves the
# budget, and $\varepsilon$ is worked out anew for the others, who get more. That may lift another one
# above 1; so repeat until nobody is:
#
# $$
# d_l = \min(1, \varepsilon\, r_l) \quad\text{with the one } \varepsilon \text{ for which}\quad
# \sum_l d_l N_l = (1 - S) \sum_l N_l .
# $$
#
# $N_l$ is the number of weights of layer $l$, and $S$ the sparsity of all together.

# %% tags=["exercise"]
from fewer.sparsity import capped_densities

# %% tags=["check"]
check(capped_densities)

# %% [markdown]
# Now ERK is one line more: for a layer with sides $n_{out}, n_{in}, h, w$ (a linear one has only the
# first two)
#
# $$
# r_l = \frac{n_{out} + n_{in} + h + w}{n_{out} \, n_{in} \, h \, w} .
# $$

# %% tags=["exercise"]
from fewer.sparsity import erk_densities

# %% tags=["check"]
check(erk_densities)

# %% tags=["demo"]
fig, ax = figure(
    "ERK takes from large layers and gives to small ones, up to dense",
    None,
    "density (fraction of a layer's weights)",
    note="The same network. Lines: uniform density. Both have the same number of connections in all: "
    + "; ".join(f"{layer.split()[0]} {n:,}" for layer, n in zip(CONV, sizes, strict=True))
    + " weights.",
    size=(6.4, 3.6),
)
for j, (sparsity, color) in enumerate(((0.8, "sky"), (0.9, "blue"), (0.98, "purple"))):
    places = [i + 0.27 * (j - 1) for i in range(len(CONV))]
    densities = library.erk_densities(conv_shapes, sparsity)
    ax.bar(places, densities, width=0.24, color=PALETTE[color])
    ax.hlines([1 - sparsity] * 4, [p - 0.12 for p in places], [p + 0.12 for p in places], color=INK)
    for place, density in zip(places, densities, strict=True):
        top = max(density, 1 - sparsity) + 0.015
        ax.text(place, top, f"{density:.2g}", ha="center", fontsize=7, color=PALETTE[color])
    ax.text(1.5, 0.9 - 0.1 * j, f"{100 * sparsity:g}% sparse", color=PALETTE[color], ha="center")
ax.set_xticks(range(len(CONV)), CONV)
plt.show()

# %% [markdown]
# What is the distribution alone worth? Connections at random places that never move (*static*
# training), our network on MNIST-1D, every sparsity and seed side by side:

# %% tags=["demo"]
results, flops = {}, {}


def counts(densities, sparsity):
    return library.connection_counts(SHAPES, densities(SHAPES, sparsity))


def at_all_levels(densities, rewire=None):
    """Train the networks of every sparsity and seed, from random connections: [level, seed]."""
    masks = [library.random_masks(WIDTHS, counts(densities, s), SEEDS) for s in LEVELS]
    run = train(again, side_by_side(masks), rewire, seeds=SEEDS * len(LEVELS))
    return run.accuracy.view(len(LEVELS), -1)


static_erk = at_all_levels(library.erk_densities)
results["static"] = at_all_levels(library.uniform_densities)
report("static, uniform", results["static"])
report("static, ERK", static_erk)
fig, ax = figure(
    "Without moving a connection, ERK makes the better static network",
    "sparsity (% of all weights)",
    "test accuracy (%)",
    note=f"{SETUP}; bars: standard error.",
    size=(6.4, 3.2),
)
for name, accuracy, color in (
    ("ERK", static_erk, "blue"),
    ("uniform", results["static"], "vermilion"),
):
    mean, error = mean_error(accuracy)
    ax.errorbar(
        [1 - s for s in LEVELS], mean, error, color=PALETTE[color], linewidth=0, elinewidth=1
    )
    (line,) = ax.plot([1 - s for s in LEVELS], mean, marker="o", color=PALETTE[color])
    direct_label(ax, line, name)
sparsity_axis(ax)
plt.show()

# %% [markdown]
# ## 5.3 SET: drop the weakest, grow others
#
# Random places are mostly bad places. *Sparse evolutionary training* (SET) trains for a while, drops
# the connections that stayed small, grows as many new ones at random, and trains on. The number of
# connections never changes.

# %% tags=["demo"]
half = STEPS // 2
uniform_masks = library.random_masks(WIDTHS, counts(library.uniform_densities, 0.9), SEEDS)
halfway = train(start, uniform_masks, stop=half)
piece = (slice(0, 14), slice(0, 40))  # of the first layer of seed 0: 14 of its units, all inputs
old, weight = halfway.masks[0][0], halfway.network.weights[0][0]
dropping = int(ALPHA * int(old.sum()))
survivors = library.drop_smallest(weight, old, dropping)


def show_update(ax, grown, background=None):
    """A piece of a mask: kept (grey), dropped (a red cross) and grown (a green square)."""
    if background is not None:
        image = ax.imshow(background[piece], cmap="Blues", vmin=0, aspect="auto")
        bar = ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=12)
        bar.outline.set_visible(False)
        bar.set_label("|gradient| (loss per unit of weight)", fontsize=7, color=GREY)
    for mask, look in (
        (survivors & grown, {"marker": "s", "color": GREY, "markersize": 5}),
        (old & ~survivors, {"marker": "x", "color": PALETTE["vermilion"], "markersize": 5}),
        (grown & ~survivors, {"marker": "s", "color": PALETTE["green"], "markersize": 5}),
    ):
        units, inputs = mask[piece].nonzero(as_tuple=True)
        ax.plot(inputs, units, linestyle="none", **look)
    ax.set(xlim=(-0.7, 39.7), ylim=(13.7, -0.7))
    ax.grid(False)
    ax.set_yticks(range(0, 14, 4))
    ax.tick_params(length=0)


def legend_of_update(ax):
    """Which mark is which, above the axes, to the right of the y label."""
    for x, text, color in (
        (0.42, "■ kept", GREY),
        (0.55, "× dropped", "vermilion"),
        (0.72, "■ grown", "green"),
    ):
        ax.text(x, 1.02, text, transform=ax.transAxes, color=PALETTE.get(color, color), va="bottom")


fig, ax = figure(
    "SET drops what is small and grows anywhere",
    "input (index)",
    "hidden unit (index)",
    note=f"First layer of seed 0 after {half} of {STEPS:,} static steps at 90% sparsity: 14 of its units, "
    f"one update of {100 * ALPHA:g}% of the connections.",
    size=(6.8, 3.2),
)
generator = torch.Generator().manual_seed(200)
grown = library.grow_largest(survivors, torch.rand(old.shape, generator=generator), dropping)
show_update(ax, grown)
legend_of_update(ax)
plt.show()

# %% [markdown]
# With $\theta$ the weights and $k = \lfloor \zeta \cdot \text{connections} \rfloor$,
#
# $$
# I_{drop} = \text{the } k \text{ connections with the smallest } |\theta| , \qquad
# I_{grow} = k \text{ of the empty places, at random.}
# $$
#
# The first half is yours. Only what is connected can be dropped: an empty place holds a zero,
# the smallest magnitude of all, but there is nothing to drop there.

# %% tags=["exercise"]
from fewer.sparsity import drop_smallest

# %% tags=["check"]
check(drop_smallest)

# %% [markdown]
# Where do the new connections begin, and what becomes of the optimizer's memory of the old? After
# an update from the mask $m$ to $m'$, every tensor that holds one number a weight (the weights
# themselves, the momentum, Adam's moments) becomes
#
# $$
# v' = \begin{cases} v & \text{where } m \text{ and } m' \\ 0 & \text{elsewhere.} \end{cases}
# $$
#
# So a grown connection starts at zero, which leaves the function of the network as it is, and
# without a push from an earlier life.

# %% tags=["exercise"]
from fewer.sparsity import carry_over

# %% tags=["check"]
check(carry_over)

# %% [markdown]
# How much does such an update hurt? The loss just before it and just after, and what it would be had
# we dropped at random, or let the grown weights begin like new ones:

# %% tags=["demo"]
weights = halfway.network.weights


def training_loss(weights):
    """Of every seed's network, on all the training data."""
    network = library.Network(weights, halfway.network.biases)
    outputs = library.logits(network, split.x_train.expand(len(SEEDS), *split.x_train.shape))
    labels = split.y_train.expand(len(SEEDS), -1)
    return (
        torch.nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
        .view(len(SEEDS), -1)
        .mean(-1)
    )


def updated(score):
    """Masks after dropping ALPHA of the connections of least score, and after growing at random."""
    both = []
    for layer, weights in zip(halfway.masks, halfway.network.weights, strict=True):
        kept = [
            library.drop_smallest(score(w), m, int(ALPHA * int(m.sum())))
            for w, m in zip(weights, layer, strict=True)
        ]
        grown = [
            library.grow_largest(k, torch.rand(k.shape, generator=generator), int((m & ~k).sum()))
            for k, m in zip(kept, layer, strict=True)
        ]
        both.append((torch.stack(kept), torch.stack(grown)))
    return zip(*both, strict=True)


kept, grown = updated(lambda w: w)
kept_at_random, _ = updated(lambda w: torch.rand(w.shape, generator=generator))
losses = {
    "before": training_loss(weights),
    "smallest dropped,\ngrown at zero": training_loss(
        [library.carry_over(w, m, g) for w, m, g in zip(weights, halfway.masks, grown, strict=True)]
    ),
    "smallest dropped,\ngrown like new weights": training_loss(
        [
            torch.where(g & ~k, fresh, w * k)
            for w, k, g, fresh in zip(weights, kept, grown, start.weights, strict=True)
        ]
    ),
    "as many dropped\nat random": training_loss(
        [w * k for w, k in zip(weights, kept_at_random, strict=True)]
    ),
}
fig, ax = figure(
    "An update that drops the small and grows at zero is almost free",
    None,
    "training loss (nats per example)",
    note=f"Static training at 90% sparsity up to step {half}, then one update of {100 * ALPHA:g}% in every "
    f"layer. {len(SEEDS)} seeds, bars: standard error.",
    size=(6.4, 3.2),
)
for i, loss in enumerate(losses.values()):
    color = PALETTE["vermilion" if i > 1 else "blue"] if i else GREY
    ax.bar(i, loss.mean(), yerr=loss.std() / len(SEEDS) ** 0.5, color=color, width=0.6)
    ax.annotate(
        f"{loss.mean():.2f}",
        (i, loss.mean() + loss.std() / len(SEEDS) ** 0.5),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
    )
ax.set_xticks(range(len(losses)), losses)
plt.show()

# %% [markdown]
# ## 5.4 When to stop moving
#
# Early on, much is to be found and little to be lost; late in training, a new connection has no time
# left to become useful. So let the fraction that is replaced fall, along half a cosine, to zero at
# $T_{end}$ (three quarters of the training), and leave the connections alone after that:
#
# $$
# f(t) = \frac{\alpha}{2}\left(1 + \cos\frac{\pi t}{T_{end}}\right) \quad (t \le T_{end}), \qquad
# f(t) = 0 \quad (t > T_{end}).
# $$

# %% tags=["exercise"]
from fewer.sparsity import drop_fraction

# %% tags=["check"]
check(drop_fraction)

# %% tags=["demo"]
fig, ax = figure(
    "Bold early, cautious late, still at the end",
    "step (index)",
    "connections replaced (% of a layer's)",
    note=f"Dots: one update every ΔT = {DELTA_T} of {STEPS:,} steps; T_end = {T_END}. In brackets: the sum "
    "of all updates, as a multiple of the layer's connections.",
    size=(6.4, 3.2),
)
updates = list(range(DELTA_T, T_END, DELTA_T))
for alpha, color in ((0.1, "sky"), (0.3, "blue"), (0.5, "purple")):
    fall = [100 * library.drop_fraction(t, alpha, T_END) for t in range(STEPS)]
    ax.plot(fall, color=PALETTE[color], linewidth=1)
    at_updates = [fall[t] for t in updates]
    ax.plot(updates, at_updates, "o", color=PALETTE[color], markersize=3.5)
    turnover = sum(at_updates) / 100
    ax.annotate(
        f"α = {alpha} ({turnover:.1f}×)",
        (T_END * 0.12, 100 * library.drop_fraction(int(T_END * 0.12), alpha, T_END)),
        xytext=(6, 6),
        textcoords="offset points",
        color=PALETTE[color],
    )
ax.set_ylim(0, 60)
plt.show()

# %% [markdown]
# ## 5.5 RigL: grow where the loss would fall
#
# Most random places are as useless as those that were dropped. But the network can say where it
# would like a connection: the gradient of the loss with respect to a weight that is *not there*
# tells how fast the loss would fall if it were. It takes a backward pass of the dense layer, and
# only at an update. The same connections dropped as before, and those grown in their place:

# %% tags=["demo"]
pretend = [w[:1].clone().requires_grad_() for w in halfway.network.weights]
outputs = library.logits(
    library.Network(pretend, [b[:1] for b in halfway.network.biases]), split.x_train[None]
)
loss = torch.nn.functional.cross_entropy(outputs[0], split.y_train)
gradient = torch.autograd.grad(loss, pretend[:1])[0][0]
fig, ax = figure(
    "RigL drops what is small and grows where the gradient is large",
    "input (index)",
    "hidden unit (index)",
    note="As the figure of SET; the gradient is that of all training data, where RigL itself has one "
    "batch. A dropped connection may come straight back: a square under a cross.",
    size=(6.8, 3.2),
)
show_update(ax, library.rigl_update(weight, old, gradient, ALPHA), gradient.abs())
legend_of_update(ax)
plt.show()

# %% [markdown]
# Of SET, *rigging the lottery* (RigL) changes one line. With $k = \lfloor f(t) \cdot
# \text{connections} \rfloor$,
#
# $$
# I_{drop} = \mathrm{ArgTopK}_{\,i \in \theta}\big({-|\theta_i|},\, k\big), \qquad
# I_{grow} = \mathrm{ArgTopK}_{\,i \notin \theta \setminus I_{drop}}\big(|\nabla_{\theta_i} L|,\, k\big) .
# $$
#
# Read the second index with care: the only places where nothing can be grown are those of the
# *surviving* connections.

# %% tags=["exercise"]
from fewer.sparsity import rigl_update

# %% tags=["check"]
check(rigl_update)

# %% [markdown]
# ### The film
#
# What does RigL find? Handwritten digits, and a network that lacks 98% of its connections. Around every image we put two blank pixels, as MNIST has a blank border, so that there is
# something to find: **a connection to a blank pixel is wasted**. For each pixel we count the
# connections that lead away from it, and watch the count while the network learns.
#
# One network never moves a connection. Two run RigL: one from the usual initial weights (He et al.,
# as everywhere in this lab), one from a first layer ten times smaller. Press ▶ and watch the border.

# %% tags=["demo"]
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fewer.data import LabelledSplit

SIDE = 12
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16
images = torch.nn.functional.pad(images, (2, 2, 2, 2)).flatten(1)
x_train, x_test, y_train, y_test = train_test_split(
    images, torch.tensor(labels), stratify=labels, random_state=0
)
framed_digits = LabelledSplit(x_train, y_train, x_test, y_test)
blank = (x_train == 0).all(0)

film_widths, film_steps, film_delta = [SIDE**2, 100, 10], sized(600, 60), 10
film_shapes = [(n_out, n_in) for n_in, n_out in pairwise(film_widths)]
film_counts = library.connection_counts(film_shapes, library.erk_densities(film_shapes, 0.98))
usual = library.initial_network(film_widths, SEEDS)
small = library.Network([0.1 * usual.weights[0], *usual.weights[1:]], usual.biases)
move = library.rewire_rigl(0.2, 3 * film_steps // 4)
runs = {}
for name, network, rewire in (
    ("static", usual, None),
    ("RigL", usual, move),
    ("RigL, small start", small, move),
):
    runs[name] = library.train_sparse(
        framed_digits,
        network,
        library.random_masks(film_widths, film_counts, SEEDS),
        rewire,
        seeds=SEEDS,
        steps=film_steps,
        delta_T=film_delta,
        batch=64,
    )
    report(f"{name}, accuracy (%)", runs[name].accuracy)
film_times = [t for t, _ in runs["RigL"].film]


def reach(mask):
    """How many connections each pixel has: [seeds, pixels]."""
    return mask.sum(1)


def wasted(mask):
    """The share of connections that lead to a blank pixel, in percent: [seeds]."""
    return 100 * reach(mask)[:, blank].sum(-1) / reach(mask).sum(-1)


reels = {name: [mask for _, mask in run.film] for name, run in runs.items()}
reels["static"] *= len(film_times)
for name, reel in reels.items():
    print(f"{name:17} wasted at the end: {wasted(reel[-1]).mean():4.1f}% of the first layer")

# %% tags=["demo"]
from IPython.display import HTML, display
from matplotlib.animation import FuncAnimation

FILM_COLORS = {"static": "vermilion", "RigL": "blue", "RigL, small start": "green"}
most = int(torch.stack([reach(reel[-1])[0].max() for reel in reels.values()]).max())
screen, axes = plt.subplot_mosaic(
    [["the average digit", *reels], ["below"] * 4],
    figsize=(7.4, 4.1),
    dpi=80,
    height_ratios=(1.7, 1),
)
pictures, curves = {}, {}
for name, ax in list(axes.items())[:-1]:
    shown = reach(reels[name][0])[0] if name in reels else x_train.mean(0)
    pictures[name] = ax.imshow(shown.view(SIDE, SIDE), vmin=0, vmax=most if name in reels else None)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if name not in reels:
        ax.set_title(name, fontsize=9)
        continue
    (curves[name],) = axes["below"].plot([], [], color=PALETTE[FILM_COLORS[name]])
    accuracy = 100 * runs[name].accuracy.mean()
    ax.set_title(f"{name} ({accuracy:.0f}%)", fontsize=9, color=PALETTE[FILM_COLORS[name]])
bar = screen.colorbar(pictures["static"], ax=axes["RigL, small start"], fraction=0.05)
bar.outline.set_visible(False)
bar.set_label("connections of a pixel (count)", fontsize=7, color=GREY)
axes["below"].set(xlim=(0, film_times[-1]), ylim=(0, 70))
axes["below"].set_xlabel("step (index)", fontsize=8)
axes["below"].set_title(
    "wasted: connections to blank pixels (% of the first layer)",
    fontsize=8,
    fontweight="normal",
    color=GREY,
)
headline = screen.suptitle("at first", x=0.02, ha="left", fontsize=11, fontweight="bold")
screen.draw_without_rendering()
screen.set_layout_engine("none")  # everything stays where it is now


def show_frame(i):
    headline.set_text(f"Where the connections are, step {film_times[i]}")
    for name, reel in reels.items():
        pictures[name].set_data(reach(reel[i])[0].view(SIDE, SIDE))
        curves[name].set_data(film_times[: i + 1], [wasted(m)[0] for m in reel[: i + 1]])


def player(animation, fps):
    """The animation as HTML that needs no network: matplotlib's own fetches the icons of its buttons."""
    with plt.rc_context({"savefig.dpi": "figure"}):
        html = animation.to_jshtml(fps=fps, default_mode="once")
    html = re.sub(r'<link rel="stylesheet"\s+href="[^"]*">', "", html)
    signs = {
        "minus": "−",
        "fast-backward": "|◀",
        "step-backward": "◁",
        "play fa-flip-horizontal": "◀",
    }
    signs |= {"pause": "❚❚", "play": "▶", "step-forward": "▷", "fast-forward": "▶|", "plus": "+"}
    for icon, sign in signs.items():
        html = html.replace(f'<i class="fa fa-{icon}"></i>', sign)
    return HTML(html)


film = FuncAnimation(screen, show_frame, frames=len(film_times))
display(player(film, fps=6))
plt.close(screen)
# To keep it for a talk: film.save("rigl.gif", writer="pillow", fps=6, dpi=80)

# %% [markdown]
# In brackets stands the test accuracy at the end, mean of the seeds; the pictures are seed 0. With
# one connection in fifty, where they are is nearly everything. And *nobody told RigL about pixels*: a
# gradient does not grow where nothing is ever lit. But look at the curves: from the usual start,
# about a quarter of the connections stays on blank pixels for good. (Why? The question at the end
# asks you.)
#
# The film as stills:

# %% tags=["demo"]
moments = [round(f * (len(film_times) - 1)) for f in (0, 0.1, 0.25, 0.5, 1)]
fig, axes = plt.subplots(3, len(moments), figsize=(7.2, 4.9))
for row, (name, reel) in zip(axes.tolist(), reels.items(), strict=True):
    for ax, i in zip(row, moments, strict=True):
        ax.imshow(reach(reel[i])[0].view(SIDE, SIDE), vmin=0, vmax=most)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if name == "static":
            ax.set_title(f"step {film_times[i]}", fontsize=9, fontweight="normal", color=GREY)
    row[0].set_ylabel(
        f"{name.replace(', ', ',' + chr(10))}\n({100 * runs[name].accuracy.mean():.0f}%)",
        color=PALETTE[FILM_COLORS[name]],
    )
fig.suptitle(
    "RigL finds the pixels that say something", x=0.02, ha="left", fontsize=11, fontweight="bold"
)
plt.show()

# %% [markdown]
# ## 5.6 What it costs
#
# A step of training is a forward pass and a backward pass of twice its size. For a sparse network
# with a forward pass of $f_S$ floating-point operations (FLOPs) that makes $3 f_S$, as long as it
# needs only the gradients of its own connections. RigL's updates need the gradient of *every*
# weight: $f_S$ forward, $f_S$ for the gradient of the inputs, $f_D$ (dense!) for that of the
# weights. That happens once in $\Delta T + 1$ steps, so a step costs on average
#
# $$
# \frac{3 f_S \, \Delta T + 2 f_S + f_D}{\Delta T + 1} .
# $$

# In $f_S$, a connection counts as often as it is used: once in a linear layer, at every position in a
# convolution. (So ERK, whose densest layers are often early ones with many positions, is not free in
# a convolutional network. In ours, it costs what uniform densities cost.)

# %% tags=["exercise"]
from fewer.sparsity import rigl_step_flops

# %% tags=["check"]
check(rigl_step_flops)

# %% tags=["demo"]
dense_forward = library.forward_flops(library.layer_sizes(SHAPES))
fig, ax = figure(
    "The sparser the network, the rarer its updates must be",
    "sparse steps between two updates, ΔT (count)",
    "RigL's FLOPs beyond those of static training (%)",
    note=f"A step of {'-'.join(map(str, WIDTHS))} units. Dotted: what this lab takes, and the paper's 100.",
    size=(6.4, 3.4),
)
intervals = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
for sparsity, color in zip(LEVELS, ("sky", "blue", "purple", "vermilion"), strict=True):
    sparse_forward = library.forward_flops(counts(library.uniform_densities, sparsity))
    extra = [
        100
        * (
            library.rigl_step_flops(sparse_forward, dense_forward, d)
            / library.step_flops(sparse_forward)
            - 1
        )
        for d in intervals
    ]
    (line,) = ax.plot(intervals, extra, color=PALETTE[color])
    direct_label(ax, line, f"{100 * sparsity:g}% sparse")
log_axis(ax.xaxis)
log_axis(ax.yaxis)
for interval in (DELTA_T, 100):
    ax.axvline(interval, color=GREY, linestyle=":", linewidth=1)
plt.show()

# %% [markdown]
# Three more to compare with. *Gradual pruning* starts dense and prunes during the one training there
# is, along Zhu and Gupta's cubic schedule: cheaper than dense, never as cheap as sparse.
# *Small-dense* is no sparse network at all, but a narrower one with as many parameters; who loses
# to it might as well not be sparse. And the *lottery ticket* pays for every round that led to it.
#
# ## 5.7 Every method
#
# The same number of steps and the same batches for all, and for each seed the same initial weights.

# %% tags=["demo"]
last_update = (T_END - 1) // DELTA_T * DELTA_T
rigl = library.rewire_rigl(ALPHA, T_END)
results["SET"] = at_all_levels(library.uniform_densities, library.rewire_set(ALPHA, T_END))
report("SET", results["SET"])
results["RigL"] = at_all_levels(library.uniform_densities, rigl)
report("RigL", results["RigL"])
results["RigL, ERK"] = at_all_levels(library.erk_densities, rigl)
report("RigL, ERK", results["RigL, ERK"])
results["gradual pruning"] = torch.stack(
    [train(start, rewire=library.rewire_gradual(s, last_update)).accuracy for s in LEVELS]
)
report("gradual pruning", results["gradual pruning"])
results["lottery ticket"] = torch.stack([tickets[i].accuracy for i in AT_LEVELS])
narrow = [
    library.small_dense_widths(
        WIDTHS, sum(counts(library.uniform_densities, s)) + library.mlp_parameters(WIDTHS) - WEIGHTS
    )
    for s in LEVELS
]
results["small-dense"] = torch.stack(
    [train(library.initial_network(widths, SEEDS)).accuracy for widths in narrow]
)
report("small-dense", results["small-dense"])

# %% tags=["demo"]
COLORS = {
    "lottery ticket": "amber",
    "gradual pruning": "purple",
    "RigL, ERK": "blue",
    "RigL": "sky",
    "small-dense": "ink",
    "SET": "green",
    "static": "vermilion",
}
at_98 = {name: 100 * accuracy[-1].mean() for name, accuracy in results.items()}
fig, ax = figure(
    f"With 2% of the weights: static {at_98['static']:.0f}%, RigL {at_98['RigL']:.0f}%, "
    f"RigL with ERK {at_98['RigL, ERK']:.0f}%",
    "sparsity (% of all weights)",
    "test accuracy (%)",
    note=f"{SETUP}; bars: standard error. ΔT = {DELTA_T}, α = {ALPHA}, uniform densities unless ERK. "
    "Small-dense: a dense network with as many parameters. The ticket takes up to "
    f"{len(DENSITIES)} trainings, all others one.",
    size=(7.2, 4.8),
)
mean, error = mean_error(dense.accuracy)
ax.axhspan(mean - error, mean + error, color=GRID, zorder=0)
ax.axhline(mean, color=GREY, linewidth=0.8)
ax.text(1 - LEVELS[-1], mean + 0.8, "dense", color=GREY, ha="right")
for name, color in COLORS.items():
    mean, error = mean_error(results[name])
    ax.errorbar(
        [1 - s for s in LEVELS],
        mean,
        error,
        color=PALETTE[color],
        linewidth=0,
        elinewidth=1.2,
        capsize=2,
    )
    (line,) = ax.plot(
        [1 - s for s in LEVELS],
        mean,
        marker="o",
        color=PALETTE[color],
        linestyle="--" if name == "small-dense" else "-",
        linewidth=2.4 if name == "RigL, ERK" else 1.5,
    )
    direct_label(ax, line, name)
sparsity_axis(ax)
plt.show()

# %% [markdown]
# How much of the order that Evci et al. published holds here? Differences of the *same seeds*, since
# those share their batches and, where the widths are the same, their initial weights:

# %% tags=["demo"]
CLAIMS = (
    ("SET", "static"),
    ("RigL", "SET"),
    ("RigL, ERK", "RigL"),
    ("RigL, ERK", "small-dense"),
)
fig, axes = plt.subplots(1, len(CLAIMS), figsize=(7.2, 3.6), sharey=True)
for ax, (better, worse) in zip(axes, CLAIMS, strict=True):
    mean, error = mean_error(results[better] - results[worse])
    for i, (m, e) in enumerate(zip(mean.tolist(), error.tolist(), strict=True)):
        says = ("reversed" if m < 0 else "holds") if abs(m) > 2 * e else "not resolved"
        color = {"holds": "blue", "reversed": "vermilion"}.get(says)
        color = PALETTE[color] if color else GREY
        face = "white" if says == "not resolved" else color
        ax.errorbar(i, m, 2 * e, color=color, marker="o", mfc=face, elinewidth=1.2)
        print(f"{better:>9} - {worse:11} at {100 * LEVELS[i]:g}%: {m:+5.1f} ± {e:.1f}  {says}")
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set_xticks(range(len(LEVELS)), [f"{100 * s:g}" for s in LEVELS])
    ax.set_xlim(-0.5, len(LEVELS) - 0.5)
    ax.set_title(f"{better}\n− {worse}", fontsize=9)
axes[0].set_ylabel("difference (points of accuracy)")
axes[0].set_xlabel("sparsity (% of all weights)", loc="left")
fig.supxlabel(
    f"{SETUP}.\nBars: ±2 standard errors. Hollow: less than 2 from zero. Red: reversed.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
)
fig.suptitle(
    "Moving helps, the gradient helps more; for the rest it depends on the sparsity",
    x=0.02,
    ha="left",
    fontsize=11,
    fontweight="bold",
)
plt.show()

# %% [markdown]
# Five seeds are few, and 1,000 steps are short. So here is a longer run that was made for you on a GPU
# (`benchmarks/sparse_training.py`, same widths): ten seeds, 2,000 steps, $\Delta T = 50$, mean ±
# standard error of the differences, in points:
#
# | sparsity | 80% | 90% | 95% | 98% |
# |---|---|---|---|---|
# | SET − static | +1.9 ± 0.5 | +3.1 ± 0.4 | +6.8 ± 0.8 | +10.3 ± 1.0 |
# | RigL − SET | +1.8 ± 0.7 | +6.8 ± 0.7 | +11.1 ± 0.4 | +22.7 ± 1.2 |
# | RigL, ERK − RigL | +1.1 ± 0.6 | −0.2 ± 0.5 | −0.5 ± 1.0 | +1.4 ± 0.8 |
# | RigL, ERK − small-dense | +2.4 ± 0.5 | +3.3 ± 0.6 | +1.3 ± 1.0 | +3.2 ± 1.5 |
#
# - **What holds.** Connections that move beat those that stay (SET over static), and the gradient
#   beats chance by far (RigL over SET), the more so the fewer there are.
# - **What holds in part.** Whether ERK improves RigL, ten seeds leave nearly open: two standard errors
#   at 80%, less elsewhere. In our short run it even seemed to do harm at 90%; the long one does not
#   confirm it for this network, but does for one of 100-100 units (−1.9 ± 0.8). (The paper's networks
#   are deep and convolutional, with layers of very different sizes.) Where nothing moves, ERK pays
#   everywhere (5.2): in the long run, static ERK is level with uniform SET or ahead of it at all four
#   sparsities (by 0.5 to 1.3 points, ± 0.4 to 0.8). A good distribution was worth as much as moving at
#   random.
# - **What takes time.** A small dense network is a strong rival on these data. In 1,000 steps,
#   RigL with ERK beats it at 98% alone; in 2,000 it leads at 80 and 90% as well. The authors too find
#   that sparse training gains from training longer.
# - **What costs more** is better still: gradual pruning, most of all at 95%, and the ticket. There
#   *are* networks with a tenth of the weights that do as well as dense ones; RigL does not find them.
#
# And the price? The same accuracies, against the FLOPs of the whole training, all rounds of the ticket
# included:

# %% tags=["demo"]
sparse_forwards = [library.forward_flops(counts(library.uniform_densities, s)) for s in LEVELS]


def over_dense(forward_of_a_step):
    """The FLOPs of a training, relative to a dense one of the same length."""
    return library.step_flops(forward_of_a_step) / library.step_flops(dense_forward)


flops = {name: [over_dense(f) for f in sparse_forwards] for name in ("static", "SET")}
share = T_END / STEPS  # connections rest after that
flops["RigL"] = flops["RigL, ERK"] = [
    share
    * library.rigl_step_flops(f, dense_forward, DELTA_T - 1)
    / library.step_flops(dense_forward)
    + (1 - share) * over_dense(f)
    for f in sparse_forwards
]
updates = [t // DELTA_T * DELTA_T for t in range(STEPS)]
flops["gradual pruning"] = [
    library.pruning_step_flops(
        dense_forward, [library.cubic_sparsity(t, 0, last_update, 0.0, s) for t in updates]
    )
    / library.step_flops(dense_forward)
    for s in LEVELS
]
flops["small-dense"] = [
    over_dense(library.forward_flops([a * b for a, b in pairwise(widths)])) for widths in narrow
]
flops["lottery ticket"] = [K / STEPS + (1 - K / STEPS) * sum(DENSITIES[: i + 1]) for i in AT_LEVELS]
fig, ax = figure(
    "Counted in FLOPs, RigL's rival is a small dense network",
    "FLOPs of the training (relative to dense)",
    "test accuracy (%)",
    note=f"{SETUP}. Each curve from {100 * LEVELS[-1]:g}% sparsity (left, but the ticket's right) to "
    f"{100 * LEVELS[0]:g}%. Only connections counted, as if zeros cost nothing.",
    size=(7.2, 4.4),
)
offsets = {
    "RigL, ERK": (0, 8),
    "RigL": (6, -7),
    "small-dense": (-8, -4),
    "lottery ticket": (0, -10),
    "gradual pruning": (8, 0),
}
for name, color in COLORS.items():
    mean, error = mean_error(results[name])
    ax.errorbar(flops[name], mean, error, color=PALETTE[color], linewidth=0, elinewidth=1)
    ax.plot(
        flops[name],
        mean,
        marker="o",
        color=PALETTE[color],
        linestyle="--" if name == "small-dense" else "-",
        linewidth=2.4 if name == "RigL, ERK" else 1.5,
    )
    ax.annotate(
        name,
        (flops[name][-1], mean[-1]),
        xytext=offsets.get(name, (-8, 0)),
        textcoords="offset points",
        ha="left" if name in ("RigL", "gradual pruning") else "right",
        va="center",
        color=PALETTE[color],
    )
mean, error = mean_error(dense.accuracy)
ax.errorbar(1, mean, error, color=GREY, marker="o")
ax.annotate("dense", (1, mean), xytext=(0, 7), textcoords="offset points", ha="center", color=GREY)
log_axis(ax.xaxis)
ax.set_xlim(left=0.009)
plt.show()

# %% [markdown] tags=["written"] id="what_the_film_and_the_figures_show" points=5
# **Question.** (a) In the film, RigL from the usual initial weights keeps about a quarter of its
# connections on blank pixels for good. What does the gradient of such a connection look like, why
# does RigL not drop it, why does the small start help, and what else would? (b) A classmate
# sums up: "ERK improves RigL." What do the four points of "RigL, ERK − RigL" allow one to say, and
# what would you measure before you say more? (c) The abstract of a paper: "With 2% of the weights,
# RigL trains for a thirtieth of the FLOPs of dense training." Name two reasons why the figure of
# FLOPs is no proof that one should train this way.
#
# **Answer.** (a) Its input is always zero, so its gradient is exactly zero. Nothing is grown there;
# but what is there never changes either and keeps the weight it was drawn with. RigL drops by
# magnitude, not by use, and drops ever fewer: who was drawn large is never among the smallest. After
# the small start, whatever did not learn *is* small, and goes. Weight decay would help as well (it
# shrinks what no gradient holds up), or another measure for dropping, such as |weight × gradient|.
# (b) That it depends on the sparsity: the sign is not the same at all four, and some bars cross zero.
# The bars are ±2 standard errors of five differences; with five seeds, 95% confidence takes ±2.8, and
# who looks at four sparsities looks four times. And all this is one small network, one data set, one
# length of training. One would measure more seeds and longer training (the table does: the harm at 90%
# is gone, and so is the certainty at 98%), and networks whose layers differ more in size.
# (c) Any two of: the accuracy is far below that of dense training, so the comparison has to be at
# equal accuracy or at equal FLOPs; a small dense network comes close for the same FLOPs; the FLOPs
# are those of a program that skips every zero, which this one does not, and scattered zeros are hard
# to skip on real hardware; the updates need a dense gradient, hence the memory for one; the trials it
# takes to choose ΔT, α and the densities are not counted.
#
# **Rubric.** (a) 1 point: the gradient is zero, so the weight never changes, and dropping looks at
# magnitude alone. 1 point: why the small start helps, and another remedy that works. (b) 1 point:
# reads from the bars that it depends on the sparsity or is not resolved, and names a measurement that
# would resolve it. (c) 1 point for each of two valid reasons.
