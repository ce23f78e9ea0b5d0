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
# # Lab 4. Pruning a trained network
#
# The first labs gave every number fewer bits. This one asks for **fewer numbers**: most weights of a
# trained network can be set to zero, if one knows which. You choose them by size, by what they read,
# and by what the others can make up for; you store what is left in real bytes; and at the end you
# take half of the weights out of a language model, in three ways and two shapes, and measure what is
# left of it.
#
# Two questions stay with us all along. *Which* weights go, and what does that cost? And what does a
# zero *save*? The second has a sobering answer: by itself, nothing.
#
# Each exercise is *picture → equation → your code → check*. Fill in a function, run its cell, run
# the check below it. You may check as often as you like, and a mistake in one exercise never costs
# another. In the whole lab a **mask** is a bool tensor, True = kept, and the **sparsity** is the
# share of the weights that are pruned.

# %%
from autograder import check

# %% tags=["demo"]
import math
import time
import warnings
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap

import fewer.sparsity as library
from fewer.data import calibration_text, evaluation_text, mnist1d
from fewer.evaluate import perplexity
from fewer.models import (
    input_hessian,
    inverse_cholesky,
    linear_inputs,
    linear_layers,
    load_smollm2,
    replaced_weights,
)
from fewer.plots import GREY, INK, PALETTE, RULE, direct_label, figure, frame, log_axis, style
from fewer.progress import track
from fewer.sizes import sized

style()
model, tokenizer = load_smollm2()
layers = linear_layers(model)
count = sum(layer.weight.numel() for layer in layers.values())
NAME = "layers.9.self_attn.q_proj"  # the weight that we look at closely
weight = layers[NAME].weight


def heading(fig, words):
    """A title for several axes."""
    fig.suptitle(words, x=0.01, ha="left", fontsize=11, fontweight="bold")


def note(fig, words):
    """The small print below several axes."""
    fig.supxlabel(words, x=0.01, ha="left", fontsize=7, color=GREY)


def box(ax, x, y, text, face, ink="white", width=0.92):
    """A number in a coloured square, for the pictures of formats."""
    ax.add_patch(plt.Rectangle((x, y), width, 0.92, color=face))
    ax.text(x + width / 2, y + 0.46, str(text), ha="center", va="center", color=ink)


print(f"{len(layers)} matrices, {count / 1e6:.0f} million weights")
print(f"{NAME}: {weight.numel():,} weights, {len(weight.abs().unique()):,} different magnitudes")

# %% [markdown]
# ## 4.1 Which weights?
#
# The simplest answer is more than thirty years old and hard to beat: the small ones. Here is why it is not
# absurd. Half of the weights go, and with them a few percent of the sum of squares:

# %% tags=["demo"]
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.5), width_ratios=(1, 1.1))
kept = library.magnitude_mask(weight, 0.5)
frame(axes[0], "The smaller half is the middle", "weight (without unit)", "weights (count)")
bins = torch.linspace(-0.4, 0.4, 81).tolist()
axes[0].hist(weight.flatten().tolist(), bins=bins, color=PALETTE["blue"])
axes[0].hist(weight[~kept].tolist(), bins=bins, color=RULE)
axes[0].text(0.1, 0.72, "kept", color=PALETTE["blue"], transform=axes[0].transAxes)
axes[0].text(0.62, 0.9, "pruned", color=GREY, transform=axes[0].transAxes)
frame(axes[1], "... and holds little", "weights pruned (%)", "sum of squares lost (%)")
shares = torch.linspace(0, 100, 101)
generator = torch.Generator().manual_seed(0)
for name, w, color in (
    ("normal noise", torch.randn(weight.shape, generator=generator), GREY),
    ("this weight", weight, PALETTE["blue"]),
):
    lost = w.abs().flatten().sort().values.square().cumsum(0) / w.square().sum()
    lost = torch.cat([torch.zeros(1), lost])[(shares / 100 * w.numel()).long()]
    (line,) = axes[1].plot(shares, 100 * lost, color=color)
    if name == "this weight":
        half = 100 * float(lost[50])
        axes[1].plot(50, half, "o", color=color)
        axes[1].annotate(
            f"half of the weights:\n{half:.1f}% of the squares",
            (50, half),
            xytext=(8, 36),
            textcoords="data",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": RULE},
        )
        axes[1].text(75, 14, name, color=color, ha="left", va="top")
    else:
        axes[1].text(82, 46, name, color=color, ha="right")
note(fig, f"{NAME} of SmolLM2.")
plt.show()

# %% [markdown]
# With a score for each of the $n$ weights (here $|w_i|$) and a sparsity $s$, keep the $k$ largest:
#
# $$
# k = n - \mathrm{round}(s\,n), \qquad
# m_i = \begin{cases} 1 & \text{score}_i \text{ is among the } k \text{ largest} \\ 0 & \text{else}
# \end{cases}, \qquad w' = m \odot w .
# $$
#
# Exactly $k$ weights shall stay, also where scores tie. That is no idle worry: our model comes from
# a file of 4-bit weights, and in the matrix above hundreds of thousands of weights share some twenty
# thousand magnitudes (the numbers are printed at the top). "Everything above a threshold" keeps too
# many or too few.

# %% tags=["exercise"]
from fewer.sparsity import top_k_mask

# %% tags=["check"]
check(top_k_mask)

# %% [markdown]
# ## 4.2 Who competes with whom?
#
# Half of every matrix, or half of all weights wherever they are? If all layers are ranked together,
# each gets the sparsity that its magnitudes suggest:

# %% tags=["demo"]
blocks = range(0, model.config.n_layers, sized(3, 15))
KINDS = (
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)
names = {kind: [f"layers.{i}.{kind}_proj" for i in blocks] for kind in KINDS}
masks = library.global_masks(
    {name: layers[name].weight.abs() for several in names.values() for name in several}, 0.5
)
fig, ax = figure(
    "One ranking for all: block 0 all but loses its queries and keys",
    "block (index)",
    "weights pruned (%)",
    note=f"Magnitude, 50% of all weights together; every third block of SmolLM2, {len(masks)} matrices.",
    size=(6.8, 4.0),
)
for kind, several in names.items():
    pruned = [100 - 100 * float(masks[name].float().mean()) for name in several]
    color = PALETTE["blue" if kind.startswith("mlp") else "vermilion"]
    (line,) = ax.plot(blocks, pruned, marker="o", markersize=3, color=color)
    direct_label(ax, line, kind.split(".")[1])
ax.axhline(50, color=GREY, linewidth=0.8)
global_mask = masks.get(NAME, library.magnitude_mask(weight, 0.5))
plt.show()

# %% [markdown]
# The equation is the one above, with $n$ and the ranking taken over all layers $l$:
#
# $$
# m_{l,i} = 1 \quad\text{if}\quad \text{score}_{l,i} \text{ is among the } k \text{ largest of all
# layers},\qquad k = n - \mathrm{round}(s\,n),\quad n = \textstyle\sum_l n_l .
# $$
#
# Is a large weight in one layer worth a large weight in another? Only where layers are scaled alike,
# and nobody made sure of that. We tried it on all 210 matrices (1,024 tokens of the text that ends
# this lab, perplexity 23.6 before): at 30% the one ranking is worse than each matrix by itself, 33.4
# against 31.2; at 50% it is better, 291 against 332, and both are ruins.

# %% tags=["exercise"]
from fewer.sparsity import global_masks

# %% tags=["check"]
check(global_masks)

# %% [markdown]
# ## 4.3 Masks with a shape
#
# Hardware likes zeros whose places it can foresee. Here is one and the same weight, halved in six
# ways. The more the rule says, the less is left to choose, and the more is lost:

# %% tags=["demo"]
magnitudes = weight.abs()
styles = {
    "whole layer": library.magnitude_mask(weight, 0.5),
    "all layers": global_mask,
    "each row": library.row_mask(magnitudes, 0.5),
    "2:4": library.n_m_mask(magnitudes, 2, 4),
    "blocks of 4 × 4": library.block_mask(magnitudes, (4, 4), 0.5),
    "whole rows": library.block_mask(magnitudes, (1, weight.shape[1]), 0.5),
}
fig, axes = plt.subplots(1, len(styles), figsize=(9.6, 2.75))
for ax, (name, mask) in zip(axes, styles.items(), strict=True):
    ax.imshow(mask[:32, :32], cmap=ListedColormap(["#EEF0F3", PALETTE["blue"]]), vmin=0, vmax=1)
    ax.set_title(name, fontsize=9, loc="center")
    held = 100 * float((weight * mask).square().sum() / weight.square().sum())
    pruned = 100 * float(1 - mask.float().mean())
    ax.set_xlabel(f"{pruned:.0f}% pruned,\nkeeps {held:.1f}% of Σw²", color=INK, fontsize=8)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
heading(fig, "The stricter the shape, the less it keeps")
note(
    fig,
    f"Top left corner of {NAME}, 32 × 32 of its {weight.shape[0]} × {weight.shape[1]}; blue is kept. "
    "The numbers are those of the whole matrix.",
)
plt.show()

# %% [markdown]
# The shape that GPUs compute with is **N:M**: of every $M$ consecutive weights of a row, keep the
# $N$ with the largest scores. For 2:4, the groups are $\{w_0..w_3\}, \{w_4..w_7\}, \dots$
#
# $$
# m_i = 1 \quad\text{if}\quad \text{score}_i \text{ is among the } N \text{ largest of }
# \{\text{score}_{jM}, \dots, \text{score}_{jM+M-1}\}, \qquad j = \lfloor i / M \rfloor .
# $$
#
# Mind that $N$ counts what *stays*.

# %% tags=["exercise"]
from fewer.sparsity import n_m_mask

# %% tags=["check"]
check(n_m_mask)

# %% [markdown]
# ## 4.4 When?
#
# All at once after training, or bit by bit during it? While a network trains it can repair what
# pruning broke, and early on there is much that it doesn't need. So let the sparsity rise quickly at
# first and ever more slowly towards the end:

# %% tags=["demo"]
fig, ax = figure(
    "Fast while much is redundant, slow at the end",
    "training step (% of the pruning phase)",
    "sparsity (%)",
    note="From 0 to 90%, pruned every 4% of the way (dots).",
    size=(6.4, 3.4),
)


def asked(t):
    return 100 * library.cubic_sparsity(t, begin=0, end=100, initial=0.0, final=0.9)


every, pruning = range(-15, 126), range(0, 101, 4)
(line,) = ax.plot(every, [asked(t) for t in every], color=PALETTE["blue"])
ax.plot(pruning, [asked(t) for t in pruning], "o", color=PALETTE["blue"])
direct_label(ax, line, "cubic")
ax.plot([-15, 0, 100, 125], [0, 0, 90, 90], "--", color=GREY, linewidth=1)
ax.text(52, 40, "in a straight line", color=GREY)
plt.show()

# %% [markdown]
# Zhu and Gupta's schedule, from sparsity $s_i$ at step $t_0$ to $s_f$ at step $t_1$, constant before
# and after:
#
# $$
# s_t = s_f + (s_i - s_f)\left(1 - \frac{t - t_0}{t_1 - t_0}\right)^{3} .
# $$

# %% tags=["exercise"]
from fewer.sparsity import cubic_sparsity

# %% tags=["check"]
check(cubic_sparsity)

# %% [markdown]
# Now let it race. A small network learns to tell the ten curves of MNIST-1D apart, and all rivals
# have the same number of training steps. *At once*: train, then prune, done (with one ranking for
# all layers, or each layer alike). *At once, half-way*: train for half of the steps, prune, train on
# with what is left. *Gradually*: along the cubic schedule, finished after three quarters.

# %% tags=["demo"]
data = mnist1d()
WIDTHS, SEEDS = [40, 100, 100, 10], list(range(sized(4, 2)))
STEPS, EVERY = sized(500, 60), sized(20, 10)
SPARSITIES = sized((0.5, 0.8, 0.9, 0.95), (0.5, 0.9))
start = library.initial_network(WIDTHS, SEEDS)
everything = [torch.ones_like(w, dtype=torch.bool) for w in start.weights]


def train(network, masks, rewire=None, **when):
    """One network a seed, all trained side by side; the learning rate falls over STEPS."""
    return library.train_sparse(
        data, network, masks, rewire, seeds=SEEDS, steps=STEPS, delta_T=EVERY, **when
    )


def cut_together(network, sparsity):
    """Magnitude masks for every seed's network, its layers in one ranking."""
    ones = [torch.ones_like(w[0], dtype=torch.bool) for w in network.weights]
    masks = [
        library.prune_surviving([w[s] for w in network.weights], ones, sparsity)
        for s in range(len(SEEDS))
    ]
    return [torch.stack(layer) for layer in zip(*masks, strict=True)]


def cut_alike(network, sparsity):
    """The same with each layer by itself."""
    return [
        torch.stack([library.magnitude_mask(one, sparsity) for one in w]) for w in network.weights
    ]


def tested(network, masks):
    pruned = library.Network(library.rewind(network.weights, masks), network.biases)
    return library.accuracies(pruned, data.x_test, data.y_test)


dense = train(start, everything)
midway = train(start, everything, stop=STEPS // 2).network
last = (3 * STEPS // 4 - 1) // EVERY * EVERY  # the last step that prunes
race = {"at once, each layer alike": [], "at once": [], "at once, half-way": [], "gradually": []}
for sparsity in SPARSITIES:
    race["at once, each layer alike"].append(
        tested(dense.network, cut_alike(dense.network, sparsity))
    )
    race["at once"].append(tested(dense.network, cut_together(dense.network, sparsity)))
    trained_on = train(midway, cut_together(midway, sparsity), start=STEPS // 2)
    race["at once, half-way"].append(trained_on.accuracy)
    gradual = train(start, everything, library.rewire_gradual(sparsity, last))
    race["gradually"].append(gradual.accuracy)
    print(
        f"{100 * sparsity:.0f}%:",
        ", ".join(f"{name} {100 * runs[-1].mean():.1f}" for name, runs in race.items()),
    )

# %% tags=["demo"]
fig, ax = figure(
    "The sparser it shall be, the more it pays to go gradually",
    "weights pruned (%)",
    "test accuracy (%)",
    note=f"MNIST-1D, widths {'-'.join(map(str, WIDTHS))}, {STEPS} steps in all; mean and standard error "
    f"of {len(SEEDS)} seeds. Layers are ranked together but for one curve. Grey: dense.",
    size=(6.8, 4.2),
)


def percent(accuracies):
    """Mean and its standard error over the seeds."""
    return 100 * float(accuracies.mean()), 100 * float(accuracies.std()) / len(accuracies) ** 0.5


left = [100 * (1 - s) for s in SPARSITIES]
for (name, runs), color in zip(race.items(), ("amber", "vermilion", "blue", "green"), strict=True):
    means, errors = zip(*map(percent, runs), strict=True)
    ax.errorbar(left, means, errors, color=PALETTE[color], marker="o", capsize=2)
    direct_label(ax, (left[-1], means[-1]), name, color=PALETTE[color])
ax.axhline(percent(dense.accuracy)[0], color=GREY, linewidth=0.8)
ax.set_xscale("log")
ax.invert_xaxis()
ax.set_xticks(left, [f"{100 * s:.0f}" for s in SPARSITIES])  # each step halves what is left
ax.minorticks_off()
plt.show()

# %% [markdown]
# Nothing repairs a network like training it further. At 50% one clean cut half-way is even a little
# better than the gradual way; the sparser it shall be, the more the gradual way is ahead. How the
# layers are ranked matters little next to that.
#
# ## 4.5 Learning through a mask
#
# A mask has no useful gradient: whether a weight is kept changes in jumps, and a pruned weight in
# $m \odot w$ gets the gradient zero, so it never learns that it might have been useful. The
# **straight-through estimator** lets the forward pass see the masked weight and hands the backward
# pass's gradient to the *dense* one, as if the mask were not there:
#
# $$
# \tilde W = m \odot W, \qquad \frac{\partial L}{\partial W} := \frac{\partial L}{\partial \tilde W} .
# $$
#
# Pruned weights go on moving, and when the mask is computed anew at each step they may come back.
# They may also never settle. SR-STE adds a pull towards zero on what is pruned,
# $\lambda\,(1 - m) \odot W$, so that leaving is for longer. Below, the four weights of one group of a
# network that is 1:4 sparse from its first step to its last; the one that is kept is drawn thick.

# %% tags=["demo"]
STE_STEPS, N, M = sized(500, 30), 1, 4


def train_n_m(estimator, decay):
    """Train with N:M masks in both hidden layers. Returns the accuracies and a film of weights."""
    network = library.initial_network(WIDTHS, SEEDS)
    weights, biases = ([p.clone().requires_grad_() for p in part] for part in network)
    optimizer = torch.optim.SGD([*weights, *biases], lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    masks = [library.n_m_mask(w.detach().abs(), N, M) for w in weights[:2]]
    film, flips = [], 0
    for t in range(STE_STEPS):
        if estimator:
            old, masks = masks, [library.n_m_mask(w.detach().abs(), N, M) for w in weights[:2]]
            flips += sum(int((a & ~b).sum()) for a, b in zip(masks, old, strict=True))
            masked = [library.masked_weight(w, m) for w, m in zip(weights, masks, strict=False)]
        else:
            masked = [w * m for w, m in zip(weights, masks, strict=False)]
        film.append((weights[1][0].detach().clone(), masks[1][0]))
        batch = torch.randint(len(data.x_train), (len(SEEDS), 128), generator=generator)
        x, y = data.x_train[batch], data.y_train[batch]
        out = library.logits(library.Network([*masked, weights[2]], biases), x)
        loss = F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum") / 128
        optimizer.zero_grad()
        loss.backward()
        if decay:
            for w, m in zip(weights, masks, strict=False):
                w.grad = library.sr_ste_gradient(w.grad, w, m, decay)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * t / STE_STEPS))
        optimizer.step()
    trained = [w.detach() * m for w, m in zip(weights, masks, strict=False)]
    trained = library.Network([*trained, weights[2].detach()], [b.detach() for b in biases])
    kept = sum(int(m.sum()) for m in masks)
    return library.accuracies(trained, data.x_test, data.y_test), film, flips / kept


DECAY = 2e-3
ways = {
    "fixed mask": train_n_m(False, 0),
    "straight through": train_n_m(True, 0),
    f"SR-STE, λ = {DECAY:g}": train_n_m(True, DECAY),
}
for name, (accuracy, _, flips) in ways.items():
    mean, error = percent(accuracy)
    print(f"{name:18} {mean:.1f} ± {error:.1f}% right; a place changes hands {flips:.1f} times")

# %% tags=["demo"]
_, film, _ = ways["straight through"]
swaps = sum((a[1] ^ b[1]).float() for a, b in pairwise(film))
group = int(swaps.unflatten(-1, (-1, 4)).sum(-1).argmax())  # the busiest group of four
row, column = divmod(4 * group, swaps.shape[1])
fig, axes = plt.subplots(1, 3, figsize=(9.2, 3.3), sharey=True)
for ax, (name, (accuracy, film, _)) in zip(axes, ways.items(), strict=True):
    mean, error = percent(accuracy)
    frame(
        ax,
        f"{name}: {mean:.1f} ± {error:.1f}%",
        "training step (count)",
        "weight (without unit)" if ax is axes[0] else None,
    )
    ax.set_title(ax.get_title(loc="left"), loc="left", fontsize=9, fontweight="normal", pad=22)
    values = torch.stack([w[row, column : column + 4] for w, _ in film])
    keeps = torch.stack([m[row, column : column + 4] for _, m in film])
    for i, color in enumerate(("blue", "vermilion", "green", "amber")):
        ax.plot(values[:, i], color=PALETTE[color], linewidth=0.8, alpha=0.55)
        on = values[:, i].clone()
        on[~keeps[:, i]] = float("nan")
        ax.plot(on, color=PALETTE[color], linewidth=2.6)
    ax.axhline(0, color=RULE, linewidth=0.8)
heading(fig, "A fixed mask shuts three weights out; the others let them compete")
note(
    fig,
    f"MNIST-1D, widths {'-'.join(map(str, WIDTHS))}, 1:4 in both hidden layers; test accuracy, mean and "
    f"standard error of {len(SEEDS)} seeds. Four weights of the second layer, seed 0.",
)
plt.show()

# %% [markdown]
# Both estimators beat the mask that was drawn at the start, and SR-STE's mask is the calmer one: fewer
# places change hands. In a training as short as this one that is not yet worth any accuracy; its
# authors saw a gain in far longer ones.
#
# ## 4.6 What does a zero save?
#
# So far every pruned network computed as much as before: a multiplication by zero takes as long as
# any other. There are two ways out. Store and visit only what is left: a *sparse format*. Or remove
# whole hidden channels, so that the matrices really are smaller: rows of the weights that write a
# channel, the column of the one that reads it. Both for one MLP of SmolLM2, timed on this machine:

# %% tags=["demo"]
ids = torch.tensor(tokenizer.encode(calibration_text().text).ids)
LENGTH = sized(512, 32)
windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
windows = windows[torch.linspace(0, len(windows) - 1, sized(4, 2)).long()]  # from four addresses
inputs = linear_inputs(model, windows)  # what each layer reads, also for the rest of the lab

x = inputs["layers.10.mlp.gate_proj"][: sized(256, 32)]
gate, up, down = (layers[f"layers.10.mlp.{kind}_proj"].weight for kind in ("gate", "up", "down"))


def milliseconds(work, repeats=sized(5, 2)):
    """The quickest of a few runs: on a shared machine the others say more about the neighbours."""
    times = []
    for _ in range(repeats):
        before = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - before))
    return min(times)


def mlp(gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def sparse_mlp(gate, up, down):
    return (down @ (F.silu(gate @ x.T) * (up @ x.T))).T


warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
shares = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
took = {"zeros in the dense matrices": [], "sparse rows (CSR)": [], "channels removed": []}
exact = mlp(gate, up, down)
for sparsity in shares:
    zeros = [w * library.magnitude_mask(w, sparsity) for w in (gate, up, down)]
    rows = [w.to_sparse_csr() for w in zeros]
    loudness = library.channel_norms(gate) + library.channel_norms(up)
    keep = library.top_k_mask(loudness, library.number_kept(len(gate), sparsity))
    small_gate, _, small_down = library.shrink_channels(gate, None, down, keep)
    small_up, _, _ = library.shrink_channels(up, None, down, keep)
    took["zeros in the dense matrices"].append(milliseconds(lambda z=zeros: mlp(*z)))
    took["sparse rows (CSR)"].append(milliseconds(lambda r=rows: sparse_mlp(*r), sized(2, 1)))
    small = small_gate, small_up, small_down
    took["channels removed"].append(milliseconds(lambda s=small: mlp(*s)))
    if sparsity == 0.5:
        print("half of the weights, or half of the channels:")
        for name, parts in (("zeros", zeros), ("channels", small)):
            error = float((mlp(*parts) - exact)[1:].norm() / exact[1:].norm())
            numbers = sum(part.numel() for part in parts)
            print(f"  {name:9} {numbers:9,} numbers in memory, output off by {100 * error:.0f}%")

# %% tags=["demo"]
fig, ax = figure(
    "Zeros save no time; smaller matrices do",
    "weights pruned (%)",
    "time of one MLP (ms)",
    note=f"layers.10.mlp of SmolLM2 on {len(x)} tokens, float32, torch {torch.__version__}, "
    f"{torch.get_num_threads()} thread(s), the quickest of a few runs.",
    size=(6.8, 4.0),
)
for (name, times), color in zip(took.items(), ("ink", "vermilion", "green"), strict=True):
    (line,) = ax.plot([100 * s for s in shares], times, marker="o", color=PALETTE[color])
    direct_label(ax, line, name)
log_axis(ax.yaxis)
plt.show()

# %% [markdown]
# Removing channels pays for every one of them, with no format and no special code. But it is the
# coarsest choice there is, and the output suffers most (the numbers above). The sparse format on a
# CPU is *slower* than the dense product until nearly everything is gone, for a dense product reads
# memory in long straight runs.
#
# ## 4.7 Storing what is left
#
# Memory is easier to save than time. The classic: *compressed sparse rows* keeps each value, its
# column, and for each row where it begins.

# %% tags=["demo"]
example = torch.tensor(
    [[0, 5, 0, 0, 0, 2], [0, 0, 0, 0, 0, 0], [7, 0, 0, 4, 1, 0], [0, 0, 3, 0, 0, 0]]
).float()
values, columns, pointers = library.encode_csr(example)
colors = [PALETTE[name] for name in ("blue", "vermilion", "green", "purple")]
PALE = "#F1F2F4"
small = {"fontsize": 7, "color": GREY}
fig, ax = plt.subplots(figsize=(8.6, 2.5))
for r, row in enumerate(example.int().tolist()):
    ax.text(-0.25, 3.46 - r, f"row {r}", ha="right", va="center", color=colors[r], fontsize=8)
    for c, v in enumerate(row):
        box(ax, c, 3 - r, v, colors[r] if v else PALE, "white" if v else RULE)
owner = library.csr_rows(pointers, len(values)).tolist()
for y, words, numbers, faces in (
    (3, "values", values, [colors[r] for r in owner]),
    (1.95, "columns", columns, [colors[r] for r in owner]),
    (0.5, "row_pointers", pointers, [GREY] * len(pointers)),
):
    ax.text(10.4, y + 0.46, words, ha="right", va="center")
    for j, number in enumerate(numbers.int().tolist()):
        box(ax, 10.7 + j, y, number, faces[j])
for j in range(len(values)):
    ax.text(11.16 + j, 4.1, f"j = {j}", ha="center", va="bottom", **small)
ends = "row r: from row_pointers[r] up to, not including, row_pointers[r + 1]"
ax.text(8.3, 0.2, ends, va="top", **small)
ax.set(xlim=(-1.8, 18.2), ylim=(-0.3, 4.7), xticks=[], yticks=[], aspect="equal")
ax.set_title("Of 24 numbers, six are stored; an empty row costs a pointer", loc="left")
ax.spines[:].set_visible(False)
ax.grid(False)
plt.show()

# %% [markdown]
# With $z$ non-zeros, $v$ bits a value, $i$ bits a column and 32 a pointer, a matrix of $o$ rows takes
#
# $$
# \text{bits} = z\,(v + i) + 32\,(o + 1) .
# $$
#
# A product is $y_r = \sum_{j = p_r}^{p_{r+1} - 1} \text{values}_j \, x_{\text{columns}_j}$: as many
# multiplications as there are non-zeros.

# %% tags=["exercise"]
from fewer.sparsity import encode_csr

# %% tags=["check"]
check(encode_csr)

# %% [markdown]
# ## 4.8 Two of four
#
# If it is known that two of every four are kept, no column is needed: *which* two of the four takes
# 2 bits each. The size is known before the matrix is, and this is why a matrix unit can read it.

# %% tags=["demo"]
example = torch.tensor([[0, 5, 0, 6, 0, 0, 7, 0]]).float()
values, packed = library.encode_2_4(example)
places = library.unpack_bits(packed, 2, 4)[0].tolist()
fig, ax = plt.subplots(figsize=(8.6, 2.05))
for words, y in (("weights", 2.66), ("values", 1.26), ("indices", 0.4)):
    ax.text(-0.3, y, words, ha="right", va="center")
for c, v in enumerate(example[0].int().tolist()):
    x = c + 0.5 * (c // 4)
    box(ax, x, 2.2, v, colors[c // 4] if v else PALE, "white" if v else RULE)
    ax.text(x + 0.46, 3.2, f"place {c % 4}", ha="center", va="bottom", **small)
for k, (v, place) in enumerate(zip(values[0].int().tolist(), places, strict=True)):
    x = 0.5 + 2 * k + 0.5 * (k // 2)
    box(ax, x, 0.8, v, colors[k // 2])
    ax.text(x + 0.46, 0.4, f"{place} = {place:02b}", ha="center", va="center", fontsize=8)
byte = int(packed[0, 0])
for bit in range(8):
    box(ax, 10.8 + 0.85 * (7 - bit), 0.8, byte >> bit & 1, colors[bit // 4], width=0.79)
for k in range(4):
    x = 10.8 + 0.85 * (7 - 2 * k) - 0.03
    ax.text(x, 0.4, f"index {k}", ha="center", va="center", **small)
ax.text(10.8, 1.95, "one byte, the first index in its lowest bits", **small)
ax.text(17.8, 1.26, f"= {byte}", va="center")
ax.set(xlim=(-1.6, 19.2), ylim=(0, 3.7), xticks=[], yticks=[], aspect="equal")
ax.set_title("A group with a single non-zero stores a zero too: the first free place", loc="left")
ax.spines[:].set_visible(False)
ax.grid(False)
plt.show()

# %% [markdown]
# For $W \in \mathbb{R}^{o \times n}$ there are $o\,n/2$ values, and for each an index $\in
# \{0,1,2,3\}$ into its group $g$, rising within the group:
#
# $$
# W_{r,\;4g + \text{index}} = \text{value}, \qquad
# \text{bits} = \tfrac{1}{2}\,o\,n\,v + 2 \cdot \tfrac{1}{2}\,o\,n .
# $$

# %% tags=["exercise"]
from fewer.sparsity import encode_2_4

# %% tags=["check"]
check(encode_2_4)

# %% [markdown]
# Which format when? The lines are arithmetic; each dot is a layer of SmolLM2, pruned, encoded,
# decoded again to be sure, and its bytes counted. A *bitmap* spends one bit on each weight, there or
# not, and then lists the values.

# %% tags=["demo"]
wide = layers["layers.10.mlp.down_proj"].weight.half()
shape = tuple(wide.shape)


def bits_a_weight(*parts):
    return 8 * library.stored_bytes(*parts) / wide.numel()


fig, ax = figure(
    "Up to half zeros, only a bitmap or 2:4 is smaller than dense",
    "weights pruned (%)",
    "size (bits per weight)",
    note=f"float16 values. Lines: storage_bits for {shape[0]} × {shape[1]}; dots: bytes of the encoded "
    "layers.10.mlp.down_proj. Triangles: from here on smaller than dense.",
    size=(7.2, 4.4),
)
grid = [k / 50 for k in range(51)]
for kind, index_bits, color, words, at in (
    ("dense", 32, "ink", "dense", (94, 17)),
    ("csr", 32, "vermilion", "CSR, 32-bit columns", (12, 43.5)),
    ("csr", 16, "amber", "CSR, 16-bit columns", (22, 26.5)),
    ("bitmap", 32, "blue", "bitmap", (22, 10.5)),
):
    nonzeros = [library.number_kept(wide.numel(), s) for s in grid]
    sizes = [library.storage_bits(kind, shape, z, 16, index_bits) / wide.numel() for z in nonzeros]
    ax.plot([100 * s for s in grid], sizes, color=PALETTE[color])
    ax.text(*at, words, color=PALETTE[color])
    if kind != "dense":
        even = 100 * library.break_even_sparsity(kind, shape, 16, index_bits)
        ax.plot(even, 16, "v", color=PALETTE[color], markersize=7)
        ax.text(even, 17.6, f"{even:.0f}%", ha="center", color=PALETTE[color])
for sparsity in (0.1, 0.3, 0.5, 0.7, 0.9):
    pruned = wide * library.magnitude_mask(wide, sparsity)
    encodings = {
        "vermilion": (library.encode_csr(pruned), library.decode_csr),
        "amber": (library.encode_csr(pruned, 16), library.decode_csr),
        "blue": (library.encode_bitmap(pruned), library.decode_bitmap),
    }
    for color, (parts, decode) in encodings.items():
        assert torch.equal(decode(*parts, shape[1]), pruned)
        ax.plot(100 * sparsity, bits_a_weight(*parts), "o", color=PALETTE[color])
pruned = wide * library.n_m_mask(wide.abs(), 2, 4)
parts = library.encode_2_4(pruned)
assert torch.equal(library.decode_2_4(*parts), pruned)
two_four = bits_a_weight(*parts)
ax.plot(50, two_four, "D", color=PALETTE["green"], markersize=7)
ax.text(48, two_four - 3, "2:4", ha="right", color=PALETTE["green"])
ax.set_ylim(0, 50)
plt.show()
bitmap = bits_a_weight(*library.encode_bitmap(pruned))
print(f"2:4: {two_four:.2f} bits a weight; a bitmap of the same matrix: {bitmap:.2f}")

# %% [markdown]
# CSR was made for matrices with a few non-zeros in a thousand. At the sparsities that a language
# model survives it is larger than the matrix it replaces, and the humble bitmap wins. 2:4 needs as
# much as a bitmap does at one half, to the bit: what it buys is not memory but arithmetic.
#
# ## 4.9 What a weight reads
#
# A weight of 0.01 that reads an input of 100 does more than a weight of 0.1 that reads an input of
# 1. And the inputs of a language model are *not* alike:

# %% tags=["demo"]
x = inputs[NAME]
loud = x.norm(dim=0)
size, product = library.magnitude_mask(weight, 0.5), library.wanda_mask(weight, x, 0.5)
order = loud.argsort(descending=True)
fig, axes = plt.subplots(1, 2, figsize=(9.0, 3.7))
frame(
    axes[0],
    f"One input is {float(loud.max() / loud.median()):.0f} times the median",
    "input (rank by loudness)",
    "loudness ‖X_j‖ (without unit)",
)
axes[0].plot(range(1, len(loud) + 1), loud[order], ".", color=PALETTE["blue"], markersize=3)
log_axis(axes[0].yaxis)
log_axis(axes[0].xaxis)
frame(
    axes[1],
    "Wanda keeps what the loud ones reach",
    "input (rank by loudness)",
    "weights of this input that stay (%)",
)
rank = torch.arange(1, len(loud) + 1)
for name, mask, color in (("magnitude", size, "vermilion"), ("Wanda", product, "blue")):
    stay = 100 * mask.float().mean(0)[order]
    axes[1].plot(rank, stay, ".", color=PALETTE[color], markersize=3, alpha=0.6)
    ends = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, len(rank)]
    middles = [math.sqrt((a + 1) * b) for a, b in pairwise(ends)]
    means = [float(stay[a:b].mean()) for a, b in pairwise(ends)]
    axes[1].plot(middles, means, color=PALETTE[color])
    where = (6.5, 91) if name == "Wanda" else (12, 36)
    axes[1].text(*where, name, color=PALETTE[color])
log_axis(axes[1].xaxis)
axes[1].set_ylim(0, 104)
note(
    fig,
    f"{NAME}, {len(x):,} tokens of {len(windows)} windows of the calibration addresses; half of the weights pruned.",
)
plt.show()

# %% [markdown]
# With $X_j$ all values that input $j$ took while the model read the calibration text, Wanda scores
#
# $$
# S_{ij} = |W_{ij}| \cdot \lVert X_j \rVert_2
# $$
#
# and keeps the best of each row $i$ (or the best two of each four). $S_{ij}^2$ is exactly what the
# output loses if this one weight goes and nothing else changes. No training, no update, one pass.
#
# Look again at the right picture: magnitude spares the weights of the loudest inputs *least*. Training
# had made these weights small, because their inputs are large, and size mistakes that for idleness.

# %% tags=["exercise"]
from fewer.sparsity import wanda_scores

# %% tags=["check"]
check(wanda_scores)

# %% [markdown]
# ## 4.10 The others make up for it
#
# Inputs also *resemble* each other. If a pruned weight read nearly what its neighbour reads, the
# neighbour can take over. SparseGPT walks along the columns: where a weight goes, all weights to the
# right of it in the row are adjusted so that the output changes as little as possible.

# %% tags=["demo"]
BLOCK = 128  # columns whose mask is chosen together, as in the paper


def sparsegpt(w, u, sparsity=0.5, n_m=None):
    """The walk over a whole layer: your next function does each step of it."""
    w = w.clone()
    for start in range(0, w.shape[1], BLOCK):
        here, after = slice(start, start + BLOCK), slice(start + BLOCK, None)
        w[:, here], errors = library.sparsegpt_block(w[:, here], u[here, here], sparsity, n_m)
        w[:, after] -= errors @ u[here, after]
    return w


hessian = input_hessian(inputs[NAME])
u = inverse_cholesky(hessian).float()
pruned = sparsegpt(weight, u)
some = slice(BLOCK - 48, BLOCK)
moved = ((pruned - weight) * (pruned != 0))[:, some].abs().sum(dim=1)
row = int(moved.argmax())  # where it shows best
before, after = weight[row, some], pruned[row, some]
fig, ax = figure(
    "Where some go, the others move",
    "column (index)",
    "weight (without unit)",
    note=f"Row {row} of {NAME} (the one that moves most), the last 48 columns of the first block of {BLOCK}; half of the block pruned.",
    size=(8.6, 3.3),
)
place = torch.arange(some.start, some.stop)
gone = after == 0
ax.bar(place, before, width=0.8, color="#D5D9DF")
ax.bar(place[~gone], after[~gone], width=0.42, color=PALETTE["green"])
ax.plot(place[gone], torch.zeros(int(gone.sum())), "x", color=PALETTE["vermilion"], markersize=4)
for at, words, color in (
    (0.72, "grey: before", GREY),
    (0.83, "green: after", PALETTE["green"]),
    (0.94, "× pruned", PALETTE["vermilion"]),
):
    ax.text(at, 1.04, words, color=color, transform=ax.transAxes, ha="left")
plt.show()

# %% [markdown]
# The loss of output is quadratic: with $H = X^\top X$, a change $\delta W$ costs
# $\mathrm{tr}(\delta W H \delta W^\top)$. All that the walk needs from $H$ is one triangular matrix,
# $(H + \lambda I)^{-1} = U^\top U$, computed once a layer. In a block of columns, first choose the
# mask: the lowest
#
# $$
# S_{ij} = \frac{W_{ij}^2}{U_{jj}^2}
# $$
#
# of the whole block go (with N:M: of each group of $M$, when the walk reaches it). Then for each
# column $j$ from left to right,
#
# $$
# e_i = \begin{cases} W_{ij} / U_{jj} & \text{pruned} \\ 0 & \text{kept} \end{cases}, \qquad
# W_{:,\,j+1:} \leftarrow W_{:,\,j+1:} - e\, U_{j,\,j+1:} .
# $$
#
# $1/U_{jj}^2$ is what is left of $\lVert X_j \rVert^2$ once the inputs to the right have explained
# what they can: were they all unrelated, SparseGPT would be Wanda.

# %% tags=["exercise"]
from fewer.sparsity import sparsegpt_block

# %% tags=["check"]
check(sparsegpt_block)

# %% tags=["demo"]
text = evaluation_text()
EVALUATED = sized(512, 32)
tokens = torch.tensor(tokenizer.encode(text.text[:20_000]).ids)[: EVALUATED + 1]
unseen = linear_inputs(model, tokens[None, : sized(128, 32)])[NAME]


def by_size(w, sparsity, n_m):
    return w * (library.n_m_mask(w.abs(), *n_m) if n_m else library.magnitude_mask(w, sparsity))


methods = {
    "magnitude": by_size,
    "Wanda": lambda w, s, n_m: w * library.wanda_mask(w, inputs[NAME], s, n_m),
    "SparseGPT": lambda w, s, n_m: sparsegpt(w, u, s, n_m),
}
COLORS = dict(zip(methods, map(PALETTE.get, ("vermilion", "blue", "green")), strict=True))


def off(pruned, x):
    """The error of the layer's output, relative to its size (root of a quotient of sums)."""
    return 100 * float((x @ (pruned - weight).T).norm() / (x @ weight.T).norm())


fig, ax = figure(
    "One layer: knowing the inputs more than halves the error",
    "weights pruned (%)",
    "error of the output (% of its norm)",
    note=f"{NAME}. Error on {len(unseen)} tokens of {text.id}, which no method has seen; dashed: SparseGPT's on "
    f"its own {len(inputs[NAME]):,} calibration tokens. Diamonds: 2:4.",
    size=(6.8, 4.4),
)
levels = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
for name, prune in methods.items():
    layer = [prune(weight, s, None) for s in levels]
    places = [100 * s for s in levels]
    (line,) = ax.plot(places, [off(w, unseen) for w in layer], marker="o", color=COLORS[name])
    direct_label(ax, line, name)
    two_four = off(prune(weight, 0.5, (2, 4)), unseen)
    ax.plot(50, two_four, "D", color=COLORS[name], fillstyle="none", markersize=7)
    if name == "SparseGPT":
        fitted = [off(w, inputs[NAME]) for w in layer]
        ax.plot(places, fitted, "--", color=COLORS[name], linewidth=1)
log_axis(ax.yaxis)
plt.show()

# %% [markdown]
# ## 4.11 A whole language model
#
# All 210 matrices of SmolLM2, by the three methods. One pass over four stretches of the calibration
# addresses tells Wanda the loudness of each input and SparseGPT each layer's $U$; then the pruned
# model reads an address that neither has seen. This cell takes a minute or two.

# %% tags=["demo"]
PRUNED = [name for name in layers if int(name.split(".")[1]) < sized(model.config.n_layers, 1)]
loudness, factors, seen = {}, {}, {}
for name in track(PRUNED, "Hessians"):
    x = inputs[name]
    if x.data_ptr() not in seen:  # q, k and v read the same input, and so do gate and up
        seen[x.data_ptr()] = x.norm(dim=0), inverse_cholesky(input_hessian(x)).float()
    loudness[name], factors[name] = seen[x.data_ptr()]


def by_magnitude(name, w, sparsity, n_m):
    return by_size(w, sparsity, n_m)


def by_wanda(name, w, sparsity, n_m):
    scores = library.wanda_scores(w, loudness[name][None])  # one token as loud as all of them
    if n_m:
        return w * library.n_m_mask(scores, *n_m)
    lowest = scores.kthvalue(round(sparsity * w.shape[1]), dim=1, keepdim=True).values
    return w * (scores > lowest)  # row_mask without its sort, which here takes longer than the rest


def by_sparsegpt(name, w, sparsity, n_m):
    return sparsegpt(w, factors[name], sparsity, n_m)


def measure(prune=None, sparsity=0.0, n_m=None):
    def transform(name, w):
        return prune(name, w, sparsity, n_m) if prune and name in factors else w

    with replaced_weights(model, transform):
        return perplexity(model, tokens, text_id=text.id, context=512)


baseline = measure()
print(f"dense      {baseline}")
results = {}
for name, prune, levels in (
    ("magnitude", by_magnitude, (0.3, 0.5)),
    ("Wanda", by_wanda, (0.3, 0.5, 0.6)),
    ("SparseGPT", by_sparsegpt, (0.5, 0.6)),
):
    for setting in [*sized(levels, (0.5,)), (2, 4)]:
        n_m = setting if setting == (2, 4) else None
        results[name, setting] = measure(prune, 0.5 if n_m else setting, n_m).value
        label = "2:4" if n_m else f"{100 * setting:.0f}%"
        print(f"{name:10} {label:>4}  {results[name, setting]:8.1f}")

# %% tags=["demo"]
by_size_alone, with_inputs, with_repair = (results[name, 0.5] for name in COLORS)
fig, ax = figure(
    f"Half gone: {by_size_alone:.0f} by size, {with_inputs:.0f} knowing the inputs, {with_repair:.0f} with repair",
    "weights pruned (%)",
    "perplexity (per token)",
    note=f"SmolLM2-135M-Instruct; dense {baseline}. All {len(PRUNED)} matrices of the blocks; calibrated on {windows.numel():,} "
    "tokens of four other addresses, all layers at once. Hollow diamonds: 2:4.",
    size=(7.2, 4.8),
)
ax.axvline(50, color=RULE, linewidth=0.8)
ax.axhline(baseline.value, color=GREY, linewidth=0.8)
ax.set_xlim(-2, 62)
direct_label(ax, (62, baseline.value), f"dense, {baseline.value:.0f}", color=GREY)
for name, color in COLORS.items():
    curve = {100 * s: y for (who, s), y in results.items() if who == name and s != (2, 4)}
    if name != "SparseGPT":  # between 0 and 50% it was not measured: no line there
        curve = {0: baseline.value, **curve}
    (line,) = ax.plot(curve.keys(), curve.values(), marker="o", color=color)
    direct_label(ax, line, name)
    two_four = results[name, (2, 4)]
    ax.plot(50, two_four, "D", color=color, markerfacecolor="white", markersize=8)
    for y, words, offset in (
        (two_four, f"2:4   {two_four:,.0f}", (-9, -1)),
        (curve[50], f"{curve[50]:,.0f}", (7, -9) if name == "SparseGPT" else (-7, 7)),
    ):
        ax.annotate(
            words,
            (50, y),
            xytext=offset,
            textcoords="offset points",
            ha="left" if offset[0] > 0 else "right",
            va="center",
            color=color,
        )
log_axis(ax.yaxis)
plt.show()

# %% [markdown]
# With half of its weights the model still reads, if less well; pruned by size alone it does not.
# Three cautions before you quote this figure.
#
# *It is one short text.* `benchmarks/compression.py` scores 8,192 tokens: dense 24.7, and at 50%
# magnitude 384, Wanda 49.0, SparseGPT 39.5; at 2:4, 1,294, 132 and 68.8. The order is the same.
#
# *Not all of Wanda's lead is due to the inputs.* It also compares within rows, where our magnitude
# compares within the whole matrix. Magnitude within rows gets 238 in place of 332 at 50% (1,024
# tokens, where Wanda has 41): some of the lead is about who competes with whom, most of it is not.
#
# *The papers prune layer by layer*, and let each layer see what those before it have become. We took
# all inputs from the dense model, because one pass then serves every curve. For Wanda this is the same
# (1,024 tokens, same calibration: 41.6 in place of 41.4 at 50%, 116.5 in place of 117.8 at 2:4), and for
# SparseGPT at 50% (37.5 in place of 38.3). At 2:4 it costs SparseGPT much: 72.1 in place of 57.2. If you
# have another minute:
#
# ```python
# from fewer.models import compressed_sequentially
#
# def prune(name, w, x):
#     return library.prune_sparsegpt(w, input_hessian(x), n_m=(2, 4))
#
# with compressed_sequentially(model, windows, prune, progress=True):
#     print(perplexity(model, tokens, text_id=text.id, context=512))
# ```

# %% [markdown] tags=["written"] id="what_half_is_worth" points=5
# **Question.** (a) At 50%, a bitmap stores the unstructured model in as many bits as the 2:4 format
# stores the 2:4 model, and the figure says that the first one is much better. Why would anybody want
# the second, and what would one have to measure to see it? (b) The file that our weights come from
# takes 5 bits a weight: 4-bit codes, and a scale and a minimum of 16 bits each for every 32 weights.
# How many bits a weight does the model take at 50% as a bitmap with 16-bit values? And with the 4-bit
# codes as values, scales and minima as before? For which of the three methods is the latter possible
# without changing the model once more? (c) All methods were calibrated on State of the Union addresses
# and evaluated on another one. What does the figure therefore not show, for whom does this matter most,
# and how would you find out?
#
# **Answer.** (a) For time, not for size: matrix units can compute with 2:4 and skip the zeros, because
# exactly two of each four are there and every row has the same length. Zeros in arbitrary places are
# smaller in memory but are not multiplied faster (section 4.6). The figure shows perplexity alone; one
# would measure the time of a matrix product, or of the whole model, on such hardware, and plot
# perplexity against that. (b) 0.5 · 16 + 1 = 9 bits: more than the 5 bits of the *dense* 4-bit file, at a
# worse perplexity. With the codes: 0.5 · 4 + 1 + 1 = 4 bits, a fifth less than dense. Magnitude and Wanda
# leave the surviving weights as they were, so their codes are still right; SparseGPT has moved them off
# the grid, and they would have to be quantized again, with a further loss. (c) It does not show what is
# left of everything that such addresses don't need: chat, code, arithmetic. Wanda and SparseGPT chose
# (and SparseGPT even fitted) with inputs of that kind, so they may have kept what this text needs at
# the expense of the rest; magnitude, which saw no text, cannot have. One would evaluate the same
# pruned models on other texts, and calibrate on those, to see whether the order and the distances stay.
#
# **Rubric.** 1 point: 2:4 is for hardware that computes with it. 1 point: the figure has no time in it,
# and says what to measure. 1 point: 9 bits and 4 bits. 1 point: magnitude and Wanda keep the codes,
# SparseGPT does not. 1 point: same kind of text for both; the calibrated methods profit; evaluate
# elsewhere.
