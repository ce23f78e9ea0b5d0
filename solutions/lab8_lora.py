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
# # Lab 8. LoRA and after
#
# A model of 65 billion weights takes 130 GB to read from and 780 GB to train: every weight wants a
# gradient and two numbers for Adam. But must every weight be free to move? **LoRA** writes the change
# of a matrix as a product of two thin ones and trains only those. It has become the usual way to adapt
# a large model, and a family has grown around it: **DoRA** turns direction and size apart, **QLoRA**
# keeps the frozen weights in 4 bits, **SparsePEFT** respects the zeros of a pruned model. Here you build
# all four, take them apart, and weigh them at the end: accuracy against the memory of training.
#
# Each exercise is *picture → equation → your code → check*. Fill in a function, run its cell, run the
# check below it. You may check as often as you like, and a mistake in one exercise never costs another.
#
# The model is the MiniLM encoder (6 layers, 22.6 million weights). It was trained to see what a sentence
# *means*, and so we teach it what it was never asked for: **word order**. Every other passage of the
# State of the Union addresses gets 6 of its 11 pairs of neighbouring tokens exchanged. Which ones are
# disturbed? (Why not the eras of lab 7? In the seconds that we have, nothing that we attach gets beyond
# what a linear probe on frozen features knows of them. That takes the longer training on a GPU whose
# table is at the end.)
#
# One trick makes it quick, and it is a real one: **only the two upper layers are adapted**, so what the
# four below them write never changes. We read it once and keep it.

# %%
from autograder import check

# %% tags=["demo"]
import copy
import math
import tempfile
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import fewer.peft as library
from fewer.data import passages
from fewer.models import linear_layers, load_minilm
from fewer.plots import GREY, INK, PALETTE, RULE, direct_label, figure, frame, log_axis, style
from fewer.progress import track
from fewer.sizes import sized
from fewer.sparsity import magnitude_mask

style()
LENGTH, FROZEN_LAYERS = 24, 4
STEPS, BATCH = sized(45, 3), 12  # every passage is read once
encoder, tokenizer = load_minilm()
split = passages(tokenizer, "era", LENGTH, per_speech=sized(8, 1))
generator = torch.Generator().manual_seed(0)


def note(fig, text):
    """What was measured, in small grey print below."""
    wrapped = textwrap.fill(text, int(fig.get_figwidth() * 17))
    fig.supxlabel(wrapped, x=0.02, ha="left", fontsize=7, color=GREY, linespacing=1.4)


def level(*axes):
    """Titles side by side at one height, whether or not there is a y label below."""
    for ax in axes:
        ax.set_title(ax.get_title(loc="left"), loc="left", pad=22)


def disturbed(tokens):
    """Every other text with 6 of its 11 pairs of neighbours exchanged, and which texts these are."""
    tokens, labels = tokens.clone(), torch.arange(len(tokens)) % 2
    for i in labels.nonzero().flatten().tolist():
        at = 1 + 2 * torch.randperm((LENGTH - 2) // 2, generator=generator)[:6]  # [CLS] stays
        tokens[i, at], tokens[i, at + 1] = tokens[i, at + 1], tokens[i, at]
    return tokens, labels


def read_once(tokens):
    """What the frozen layers write, [texts, tokens, 384]."""
    hidden = encoder.embed(tokens)
    for layer in encoder.layers[:FROZEN_LAYERS]:
        hidden = layer(hidden)
    return hidden


class Upper(nn.Module):
    """The layers above, and a head on the mean over the tokens."""

    def __init__(self, layers, head):
        super().__init__()
        self.layers, self.head = layers, head

    def features(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.mean(dim=1)

    def forward(self, hidden):
        return self.head(self.features(hidden))


def new_head(classes=2):
    """A head whose logits are zero: whatever the model knows then, it learns now."""
    head = nn.Linear(encoder.config.d_model, classes).requires_grad_(False)
    head.weight.zero_()
    head.bias.zero_()
    return head


(tokens, y), (test_tokens, test_y) = (
    disturbed(part.tokens[: sized(most, 48)])
    for part, most in ((split.train, STEPS * BATCH), (split.test, 352))
)
x, test_x = (library.cached_features(read_once, t) for t in (tokens, test_tokens))
upper = encoder.layers[FROZEN_LAYERS:]
MATRICES = [f"layers.{name}" for name in linear_layers(upper)]
for text, name in ((tokens[0], "as it was"), (tokens[1], "disturbed")):
    print(f"{name + ':':11}", tokenizer.decode(text.tolist()))
features = [
    library.cached_features(Upper(upper, new_head()).features, part) for part in (x, test_x)
]
W, b = library.linear_probe(features[0], y, classes=2, decay=0.1, steps=200)
probe_accuracy = ((features[1] @ W.T + b).argmax(-1) == test_y).double().mean().item()
print(
    f"{len(y)} passages to train on, {len(test_y)} to test; linear probe: {100 * probe_accuracy:.1f}% right"
)

# %% [markdown]
# The probe is the thing to beat: features of the frozen model and the best linear head on them. It is
# better than chance, so some order is left in the mean over the tokens, but not much.
#
# ## 8.1 What training changes
#
# Train both layers fully, and look not at the weights but at their *change*,
# $\Delta W = W_{after} - W_{before}$. Any matrix is a sum of directions, each with a strength (its
# singular values). How many does one need for most of it?

# %% tags=["demo"]
SEEDS = list(range(sized(3, 1)))
EVERY = ("query", "key", "value", "attention.output", "mlp.up", "mlp.down")
RATES = {"full": 1e-3, "LoRA": 5e-3, "DoRA": 5e-3, "QLoRA": 5e-3}  # see the end of 8.10


class Trained(NamedTuple):
    attached: library.Attachment  # put aside: `attach_again` brings it back
    accuracy: float


def train(wraps, seed, lr, layers=upper, task=None):
    """Attach, train with a new head, test, and take off again."""
    texts, labels, test_texts, test_labels = task or (x, y, test_x, test_y)
    model = Upper(layers, new_head(int(labels.max()) + 1))
    with library.attach(model, wraps) as attached:
        trained = [*attached.parameters(), *model.head.requires_grad_(True).parameters()]
        library.fine_tune(model, trained, texts, labels, steps=STEPS, lr=lr, batch=BATCH, seed=seed)
        return Trained(attached, library.accuracy(model, test_texts, test_labels))


def low_rank(method, rank=8, targets=EVERY, seed=0, layers=upper):
    """The wraps of a method for the upper layers; alpha = 2 r, so that s = 2 for every rank."""
    return method(
        Upper(layers, new_head()), rank=rank, alpha=2.0 * rank, targets=targets, seed=seed
    )


def weights(attached):
    """The weight that each adapted matrix works with."""
    attached.attach_again()
    modules = (attached.model.get_submodule(name) for name in MATRICES)
    found = [(m.merged() if hasattr(m, "merged") else m).weight.detach().clone() for m in modules]
    attached.detach()
    return found


four_bit = copy.deepcopy(upper)
library.quantize_model_nf4(four_bit)
METHODS = {
    "full": lambda seed: (library.whole("layers"), upper),
    "LoRA": lambda seed: (low_rank(library.lora, seed=seed), upper),
    "DoRA": lambda seed: (low_rank(library.dora, seed=seed), upper),
    "QLoRA": lambda seed: (low_rank(library.lora, seed=seed, layers=four_bit), four_bit),
}
runs = {}
for method, seed in track([(m, s) for m in METHODS for s in SEEDS], "train"):
    wraps, layers = METHODS[method](seed)
    runs[method, seed] = train(wraps, seed, RATES[method], layers)
for method in METHODS:
    found = [100 * runs[method, seed].accuracy for seed in SEEDS]
    print(f"{method:6} accuracy {', '.join(f'{a:.1f}' for a in found)}%")
before = [linear_layers(upper)[name.removeprefix("layers.")].weight for name in MATRICES]
change = [
    after - start for after, start in zip(weights(runs["full", 0].attached), before, strict=True)
]

# %% tags=["demo"]
shares = []
for matrices in (before, change):
    squares = [torch.linalg.svdvals(matrix) ** 2 for matrix in matrices[: sized(12, 2)]]
    shares.append(torch.stack([100 * q.cumsum(0) / q.sum() for q in squares]))
of_matrix, of_change = (float(share[:, 7].median()) for share in shares)
fig, ax = figure(
    f"Eight of 384 directions hold {of_change:.0f}% of a change, {of_matrix:.0f}% of a matrix",
    "directions (count)",
    "share of the sum of squares (%)",
    note=f"The {len(change)} matrices of two layers, changed by {STEPS} steps of full fine-tuning. Squares of singular values, "
    "summed from the largest on. The title has the medians.",
)
for share, color in zip(shares, (RULE, PALETTE["blue"]), strict=True):
    ax.plot(range(1, share.shape[1] + 1), share.T, color=color, linewidth=0.9)
ax.text(1, 84, "changes ΔW", color=PALETTE["blue"])
ax.text(60, 20, "matrices W", color=GREY)
ax.axvline(8, color=GREY, linewidth=0.8, linestyle=":")
log_axis(ax.xaxis)
plt.show()

# %% [markdown]
# So let the change have $r$ directions and no more. With $A \in \mathbb{R}^{r \times in}$ and
# $B \in \mathbb{R}^{out \times r}$, a layer computes
#
# $$
# h = W x + \Delta W x, \qquad \Delta W = s\, B A, \qquad
# s = \frac{\alpha}{r} \ \text{ (LoRA)} \quad\text{or}\quad s = \frac{\alpha}{\sqrt r} \ \text{ (rsLoRA)},
# $$
#
# $W$ is frozen. $r\,(in + out)$ numbers are trained in place of $in \cdot out$: for our matrices of
# 384 × 384 and $r = 8$, 6,144 in place of 147,456. $s$ is a constant, chosen once.

# %% tags=["exercise"]
from fewer.peft import lora_delta

# %% tags=["check"]
check(lora_delta)

# %% [markdown]
# **Where to start?** With $B = 0$ the change is zero and the model begins as it was. But then why is $A$
# random? Since $\partial L / \partial B = s\, G A^\top$ and $\partial L / \partial A = s\, B^\top G$ (with
# $G$ the gradient of $\Delta W$): where both are zero, both gradients are, and nothing ever moves.
#
# **What is s for?** Of two adapters that differ in rank, trained with the same learning rate, the larger
# should not need another rate. The right panel measures how far $\Delta W$ gets in a few steps.

# %% tags=["demo"]
few, FEW_STEPS = slice(0, 16), sized(10, 3)
probe_head = new_head()
probe_head.weight.copy_(W)
probe_head.bias.copy_(b)
STARTS = {
    "both random": ("random", "random", "vermilion"),
    "both zero": ("zero", "zero", "ink"),
    "A zero, B random": ("zero", "random", "green"),
    "A random, B zero": ("random", "zero", "blue"),
}


def adapt_a_little(
    rank=8, alpha=16.0, rank_stabilized=False, start=("random", "zero"), steps=FEW_STEPS
):
    """A few steps on the same 16 texts, the probe's head frozen: the losses and the wrappers."""
    model, draw = Upper(upper, probe_head), torch.Generator().manual_seed(0)
    wraps = library.lora(model, rank, alpha, EVERY, rank_stabilized=rank_stabilized)
    with library.attach(model, wraps) as attached:
        for name, parameter in attached.trained.items():
            if start["AB".index(name[-1])] == "zero":
                nn.init.zeros_(parameter)
            elif name.endswith("B"):
                nn.init.normal_(parameter, std=0.02, generator=draw)
        losses = library.fine_tune(
            model, attached.parameters(), x[few], y[few], steps=steps, lr=3e-3
        )
    return losses, attached.wrappers


fig, axes = plt.subplots(1, 2, figsize=(9.0, 3.9))
frame(axes[0], "One of the two must be random", "step (count)", "loss (nats)")
for name, (*start, color) in STARTS.items():
    losses, _ = adapt_a_little(start=start)
    (line,) = axes[0].plot(range(1, len(losses) + 1), losses, color=PALETTE[color])
    direct_label(axes[0], line, name)
axes[0].set_ylim(bottom=0)
frame(axes[1], "α/√r keeps the step, α/r shrinks it", "rank r (count)", "size of ΔW (% of W)")
ranks = sized((1, 4, 16, 64), (1, 4))
for name, stabilized, color in (("s = 16/√r", True, "amber"), ("s = 16/r", False, "blue")):
    sizes = []
    for rank in ranks:
        _, wrappers = adapt_a_little(rank, rank_stabilized=stabilized, steps=sized(4, 2))
        with torch.no_grad():
            deltas = [
                library.lora_delta(w.A, w.B, w.alpha, w.rank_stabilized) for w in wrappers.values()
            ]
        sizes.append(
            100
            * sum(float(d.norm() / w.norm()) for d, w in zip(deltas, before, strict=True))
            / len(before)
        )
    (line,) = axes[1].plot(ranks, sizes, marker="o", color=PALETTE[color])
    direct_label(axes[1], line, name)
axes[1].set_xscale("log", base=2)
axes[1].set_xticks(ranks, ranks)
axes[1].minorticks_off()
log_axis(axes[1].yaxis)
note(
    fig,
    f"Two layers of MiniLM, LoRA on all {len(MATRICES)} matrices, learning rate 0.003, always the same 16 passages, the probe's head frozen. "
    f"Left: r = 8, α = 16. Right: after {sized(4, 2)} steps, mean of ‖ΔW‖ / ‖W‖ (Frobenius norms).",
)
plt.show()

# %% [markdown]
# Left: with both zero the loss stays where the probe left it, for ever; one random factor is enough. With
# both random (here a small $B$) the loss falls as well, but the first model is not the one that you had.
#
# Right: Adam moves every entry of $B$ by about the learning rate, whatever the gradient's size. $B A$
# is then a sum of $r$ nearly orthogonal terms and grows like $\sqrt r$; $\alpha / r$ turns that into
# $1/\sqrt r$, and $\alpha / \sqrt r$ leaves it as it is. In practice many avoid the matter and set
# $\alpha = 2r$, so that $s = 2$ always. So does this lab from here on.
#
# ## 8.2 Merge, and take turns
#
# While it learns, an adapter is a detour: two more products in every layer. They are small, but a
# product is not free because it is small:

# %% tags=["demo"]
some = x[: sized(32, 8)]


@torch.no_grad()
def milliseconds(model, repeats=sized(5, 2)):
    """The quickest of a few passes: on a shared machine the others say more about the neighbours."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        model(some)
        times.append(1000 * (time.perf_counter() - begin))
    return min(times)


took, outputs = {"no adapter": milliseconds(Upper(upper, new_head()))}, {}
for method in ("LoRA", "DoRA"):
    attached = runs[method, 0].attached
    attached.attach_again()
    took[method] = milliseconds(attached.model)
    if method == "LoRA":
        with torch.no_grad():
            outputs["beside"] = attached.model(some)
            attached.merge()
            outputs["merged"] = attached.model(some)
            took["LoRA, merged"] = milliseconds(attached.model)
            attached.unmerge()
    attached.detach()
fig, ax = figure(
    "Merged, LoRA costs nothing; beside the weights it does",
    "time of the two layers (ms)",
    None,
    note=f"{some.shape[0]} passages of {LENGTH} tokens, r = 8, {torch.get_num_threads()} thread(s), the quickest of a few passes.",
    size=(6.4, 2.5),
)
names = ["DoRA", "LoRA", "LoRA, merged", "no adapter"]
bars = ax.barh(
    names,
    [took[name] for name in names],
    color=[PALETTE[c] for c in ("green", "blue", "sky", "ink")],
)
ax.bar_label(bars, fmt="%.0f", padding=4)
ax.grid(False)
ax.tick_params(axis="x", length=3)
plt.show()
difference = float((outputs["merged"] - outputs["beside"]).abs().max())
print(f"merged or beside: logits differ by at most {difference:.1e}")

# %% [markdown]
# A frozen matrix and its change are both matrices, so after training one may add them up:
#
# $$
# W' = W + s\, B A .
# $$
#
# The result goes where $W$ was, in $W$'s type, and must not disturb $W$ itself: somebody else may use it.

# %% tags=["exercise"]
from fewer.peft import lora_merge

# %% tags=["check"]
check(lora_merge)

# %% [markdown]
# To get $W$ back one could subtract the change again, but floats do not forgive: $(W + \Delta W) - \Delta W$
# is not quite $W$. Better is to keep $W$. Then one base serves any number of tasks, each with an adapter of
# its own, which are swapped without loading the model again. Here is a second task for the same passages,
# disturbed or not: do they speak of *we*, *us* or *our*?

# %% tags=["demo"]
ours = torch.tensor([tokenizer.token_to_id(word) for word in ("we", "us", "our")])
of_us = (
    x,
    torch.isin(tokens, ours).any(1).long(),
    test_x,
    torch.isin(test_tokens, ours).any(1).long(),
)
adapters = {
    "order": (runs["LoRA", 0].attached, (x, y, test_x, test_y)),
    "us": (train(low_rank(library.lora, seed=1), 0, RATES["LoRA"], task=of_us).attached, of_us),
}
chance = [
    100 * max(float(t.double().mean()), 1 - float(t.double().mean())) for t in (test_y, of_us[3])
]
original = before[0].clone()
A, B = (adapters["order"][0].trained[f"{MATRICES[0]}.{name}"].detach() for name in "AB")
there_and_back = library.lora_unmerge(library.lora_merge(original, A, B, 16.0), A, B, 16.0)
print(
    f"added and subtracted again: {100 * (there_and_back != original).double().mean():.0f}% of the weights differ"
)

grid = torch.zeros(2, 3)
with tempfile.TemporaryDirectory() as folder:
    for name, (attached, _) in adapters.items():
        attached.save(Path(folder) / name)
    kilobytes = (Path(folder) / "order").stat().st_size / 1000
for row, (owner, task) in enumerate(adapters.values()):
    for column, lent in enumerate((None, "order", "us")):
        begin = time.perf_counter()
        if lent:
            adapters[lent][0].attach_again()
        swap = 1000 * (time.perf_counter() - begin)
        grid[row, column] = 100 * library.accuracy(owner.model, *task[2:])
        if lent:
            adapters[lent][0].detach()
assert torch.equal(before[0], original)
print(
    f"an adapter on disk: {kilobytes:.0f} kB; to put it in: {swap:.1f} ms; the base is what it was, bit for bit"
)
fig, ax = plt.subplots(figsize=(6.4, 3.0))
image = ax.imshow(
    grid - torch.tensor(chance)[:, None], vmin=0, vmax=50, aspect="auto", cmap="Blues", alpha=0.75
)
for row in range(2):
    for column in range(3):
        ax.text(column, row, f"{grid[row, column]:.0f}%", ha="center", va="center", fontsize=13)
ax.set_xticks(range(3), ["no adapter", "adapter for order", "adapter for us"])
ax.set_yticks(
    range(2),
    [f"order disturbed?\n(chance {chance[0]:.0f}%)", f"we, us, our?\n(chance {chance[1]:.0f}%)"],
)
ax.xaxis.tick_top()
ax.tick_params(length=0)
ax.grid(False)
ax.spines[:].set_visible(False)
ax.set_title("One base, two adapters: each works for its own task alone", loc="left", pad=12)
note(
    fig,
    f"Test accuracy, {len(test_y)} passages. Each task's own head; the adapters of the two layers are swapped. Seed 0.",
)
plt.show()

# %% [markdown]
# ## 8.3 DoRA: direction and size
#
# Each output of a layer reads with one row of $W$. A row has a *direction* (what it looks for) and a
# *magnitude* (how loudly it answers). LoRA cannot turn one without changing the other unless $B A$ is
# just right. DoRA gives the size a number of its own:

# %% tags=["demo"]
fig, ax = plt.subplots(figsize=(6.4, 3.5))
w0, v = torch.tensor([2.0, 1.0]), torch.tensor([1.3, 2.6])
m = float(w0.norm()) * 1.12
turned = v / v.norm() * m
circle = torch.linspace(0, math.pi / 2, 80)
for radius, dashes in ((float(w0.norm()), ":"), (m, "-")):
    ax.plot(radius * circle.cos(), radius * circle.sin(), dashes, color=RULE, linewidth=1)
for start, end, color in (
    ((0, 0), w0, INK),
    (w0, v, PALETTE["amber"]),
    ((0, 0), v, PALETTE["vermilion"]),
    ((0, 0), turned, PALETTE["blue"]),
):
    ax.annotate(
        "",
        tuple(map(float, end)),
        tuple(map(float, start)),
        arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2, "shrinkA": 0, "shrinkB": 0},
    )
ax.text(2.1, 0.95, "W, a row as it was", va="center")
ax.text(1.78, 1.85, "s B A, the change", color=PALETTE["amber"])
ax.text(1.38, 2.62, "V' = W + s B A: what LoRA uses", color=PALETTE["vermilion"], va="center")
ax.text(
    turned[0] - 0.42,
    turned[1] - 0.5,
    "W' = m V' / ‖V'‖:\nwhat DoRA uses",
    color=PALETTE["blue"],
    ha="right",
    va="center",
)
ax.text(m * 0.995, 0.12, "  length m, trained", color=GREY, fontsize=8)
ax.set(xlim=(-1.0, 4.2), ylim=(-0.05, 2.9), aspect="equal", xticks=[], yticks=[])
ax.spines[:].set_visible(False)
ax.grid(False)
ax.set_title("The low-rank change turns the row, m says how long it is", loc="left")
plt.show()

# %% [markdown]
# $$
# W' = m \odot \frac{V'}{\lVert V' \rVert}, \qquad V' = W + s\, B A ,
# $$
#
# with one number $m_i$ and one norm $\lVert V'_i \rVert$ a row $i$ (the paper writes $W$ transposed and says
# columns). At the start $B = 0$ and $m = \lVert W \rVert$, so $W' = W$. In the backward pass, the paper
# treats $\lVert V' \rVert$ as a constant (`detach_norm`): the gradient of the direction is then only
# scaled, and the norm need not be kept.

# %% tags=["exercise"]
from fewer.peft import dora_weight

# %% tags=["check"]
check(dora_weight)

# %% [markdown]
# Why should that be better? The authors looked at what full training and LoRA do to the two: $\Delta D$,
# how far the rows turned (one minus the cosine), and $\Delta M$, how much longer or shorter they became.
# On their model, full training showed a *falling* line, LoRA a *rising* one (who turns more also grows more),
# and DoRA fell like full training. And on ours?

# %% tags=["demo"]
fig, axes = plt.subplots(1, 3, figsize=(9.0, 3.6), sharey=True)
for ax, method, color in zip(
    axes, ("full", "LoRA", "DoRA"), ("vermilion", "blue", "green"), strict=True
):
    turns, grows = [], []
    for old, new in zip(before, weights(runs[method, 0].attached), strict=True):
        turns.append(float(1 - F.cosine_similarity(old, new, dim=1).mean()))
        grows.append(100 * float((library.row_norm(new) / library.row_norm(old) - 1).abs().mean()))
    r = float(torch.corrcoef(torch.tensor([turns, grows]))[0, 1])
    frame(
        ax,
        f"{method}: correlation {r:+.2f}",
        "turned, ΔD (1 − cosine)",
        "longer or shorter, ΔM (%)" if ax is axes[0] else None,
    )
    ax.tick_params(axis="x", length=3)
    ax.plot(turns, grows, "o", color=PALETTE[color])
level(*axes)
note(
    fig,
    f"Means over the rows of each of the {len(MATRICES)} adapted matrices, {STEPS} steps, seed 0.",
)
plt.show()

# %% [markdown]
# All three rise here: on this small encoder, in a few steps, we do *not* find the falling line of full
# training that the paper starts from. What can be seen is what $m$ is for: DoRA's rows get
# longer or shorter by a percent or more even where they hardly turn, while LoRA's do so only as far as they
# turn. Whether that is worth something, 8.10 will say.
#
# ## 8.4 NF4: levels where the weights are
#
# LoRA saves the gradients and Adam's states of what is frozen, but not the frozen weights themselves:
# beside the activations, they are now nearly all that is left. QLoRA keeps them in 4 bits, that is, 16 levels. Which
# sixteen? Here are real weights, in blocks of 64, each divided by the largest magnitude of its block. The
# usual integers put their levels at equal distances, NF4 where the weights are:

# %% tags=["demo"]
LEVELS = {
    "INT4": torch.arange(-7, 8) / 7,
    "FP4": torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6,
    "NF4": library.nf4_levels(),
}
COLORS = {"INT4": "vermilion", "FP4": "amber", "NF4": "blue"}
up = linear_layers(encoder)["layers.4.mlp.up"].weight
blocks = up.reshape(-1, 64)
scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True)).flatten()
outer = 100 * float((scaled.abs() > 4.5 / 7).double().mean())  # beyond, ±5/7 is nearer than ±4/7
fig, axes = plt.subplots(2, 1, figsize=(6.8, 4.6), sharex=True)
for ax, name, finding in (
    (axes[0], "INT4", f"INT4: its six outer levels of 15 share {outer:.0f}% of the weights"),
    (axes[1], "NF4", "NF4: close together in the middle, far apart outside"),
):
    frame(
        ax,
        finding,
        "weight (fraction of its block's largest magnitude)" if name == "NF4" else None,
        "weights (count)",
    )
    ax.hist(scaled.numpy(), bins=160, color=PALETTE["sky"], alpha=0.6)
    ax.vlines(LEVELS[name], 0, ax.get_ylim()[1], color=PALETTE[COLORS[name]], linewidth=1.1)
axes[1].tick_params(axis="x", length=3)
note(
    fig,
    f"layers.4.mlp.up of MiniLM, {up.numel():,} weights. Lines: the levels. The peaks at ±1 are the largest weights themselves.",
)
plt.show()

# %% [markdown]
# The middle looks like a normal distribution. Levels that are all used equally often lie at its
# *quantiles* $Q(p)$ for evenly spaced $p$ ($Q$ is the inverse of the distribution function,
# `torch.special.ndtri`). Two wishes spoil the symmetry: $p$ must stay away from 0 and 1, where $Q$ is
# infinite, and one level must be exactly 0. So the halves are made apart and share the zero:
#
# $$
# Q\big(\text{8 even steps from } d \text{ to } \tfrac12\big), \quad
# Q\big(\text{9 even steps from } \tfrac12 \text{ to } 1 - d\big), \qquad
# d = \tfrac12\left(\tfrac1{30} + \tfrac1{32}\right),
# $$
#
# where "steps" counts both ends, and all are divided by the largest, $Q(1 - d)$: 16 levels that rise from
# −1 to 1. (The paper's formula is another and does not give the table in its appendix. This one, from
# the authors' code, does.)

# %% tags=["exercise"]
from fewer.peft import nf4_levels

# %% tags=["check"]
check(nf4_levels)

# %% tags=["demo"]
fig, ax = figure(
    "NF4 uses its levels far more evenly, but not equally",
    "level (rank, the 0 is the 8th)",
    "weights at this level (%)",
    note="layers.4.mlp.up in blocks of 64. Dashed: all sixteen alike. One weight of each block (1.6%) is the largest and lands at an end.",
    size=(6.8, 3.5),
)
for shift, name in ((-0.2, "INT4"), (0.2, "NF4")):
    codes, _ = library.quantize_blockwise(up, LEVELS[name], 64)
    share = codes.flatten().bincount(minlength=len(LEVELS[name])) / codes.numel()
    bits = float(-(share * share.clamp(min=1e-9).log2()).sum())
    ax.bar(
        torch.arange(1, len(share) + 1) + shift, 100 * share, width=0.4, color=PALETTE[COLORS[name]]
    )
    ax.text(
        0.02,
        0.92 - 0.5 * (shift + 0.2) / 2,
        f"{name}: codes carry {bits:.2f} of 4 bits",
        color=PALETTE[COLORS[name]],
        transform=ax.transAxes,
    )
ax.axhline(100 / 16, color=INK, linestyle="--", linewidth=0.8)
ax.set_xticks(range(1, 17))
plt.show()

# %% [markdown]
# Why not equally? The levels are quantiles of *one* normal distribution. But each block is divided by
# its own largest weight, and that makes a mixture with a sharper middle and two peaks at the ends. NF4
# is a good guess, not an optimum.
#
# ## 8.5 A scale for every block
#
# What are blocks good for? If one scale $c$ served the whole matrix, its largest weight would decide
# for all. In fact hardly any block comes near it:

# %% tags=["demo"]
largest = blocks.abs().amax(dim=1)
fig, ax = figure(
    f"The median block needs {100 * float(largest.median() / largest.max()):.0f}% of the range that the whole matrix needs",
    "largest magnitude of a block (% of the matrix's largest)",
    "blocks (count)",
    note=f"layers.4.mlp.up: {len(blocks):,} blocks of 64 consecutive weights of a row.",
    size=(6.4, 3.0),
)
ax.hist((100 * largest / largest.max()).numpy(), bins=80, color=PALETTE["sky"])
ax.set_xlim(0, 101)
ax.tick_params(axis="x", length=3)
plt.show()

# %% [markdown]
# Read the tensor row by row and cut it into blocks of 64 (the last one may be shorter). With levels
# $q_0 < q_1 < \dots$ in $[-1, 1]$, each block keeps its
#
# $$
# c = \max_i |x_i|, \qquad \text{code}_i = \arg\min_j \left| q_j - x_i / c \right|, \qquad
# \hat x_i = c\, q_{\text{code}_i} .
# $$
#
# The nearest of sorted levels need not be searched among all of them: between two levels, the middle
# decides (`torch.bucketize`). And mind the block of zeros.

# %% tags=["exercise"]
from fewer.peft import quantize_blockwise

# %% tags=["check"]
check(quantize_blockwise)

# %% tags=["demo"]
every = list(linear_layers(encoder).values())[: sized(36, 2)]
errors = {name: [] for name in LEVELS}
for layer in every:
    w = layer.weight.reshape(-1, 64)
    for name, levels in LEVELS.items():
        codes, absmax = library.quantize_blockwise(w, levels, 64)
        back = library.dequantize_blockwise(codes, absmax, levels, 64)
        errors[name].append(100 * (w - back).norm(dim=1) / w.norm(dim=1))
errors = {name: torch.cat(found) for name, found in errors.items()}
better = 100 * (errors["NF4"] < errors["INT4"]).double().mean()
fig, ax = figure(
    f"NF4 has the smaller error in {better:.0f}% of all blocks",
    "error of a block, ‖W − Ŵ‖ / ‖W‖ (%)",
    "blocks (% per bin)",
    note=f"All {len(every)} matrices of MiniLM's layers, {len(errors['NF4']):,} blocks of 64. INT4: 15 even levels. FP4: a float of 1 + 2 + 1 bits.",
    size=(6.8, 3.6),
)
bins = torch.linspace(4, 20, 129)
for name in ("NF4", "INT4", "FP4"):
    share = 100 * torch.histogram(errors[name], bins).hist / len(errors[name])
    ax.stairs(share, bins, color=PALETTE[COLORS[name]], linewidth=1.6)
    middle = float(errors[name].median())
    ax.text(
        0.72,
        {"NF4": 0.9, "INT4": 0.8, "FP4": 0.7}[name],
        f"{name}: median {middle:.1f}%",
        color=PALETTE[COLORS[name]],
        transform=ax.transAxes,
    )
plt.show()

# %% [markdown]
# ## 8.6 Quantize the scales too
#
# Small blocks follow the weights closely, but each has a $c$ of 32 bits: with 64 weights that is half a
# bit a weight, an eighth of everything. Yet the $c$ are a tame lot, all positive, near each other. Take away
# their mean, and they are numbers around zero, which 8 bits are plenty for:

# %% tags=["demo"]
fig, axes = plt.subplots(1, 2, figsize=(9.0, 3.2), sharey=True)
for ax, values, title, label in (
    (
        axes[0],
        largest,
        "As they are, half of the signed levels idle",
        "c of a block (without unit)",
    ),
    (
        axes[1],
        largest - largest.mean(),
        "Without their mean, both signs are used",
        "c − mean (without unit)",
    ),
):
    frame(ax, title, label, "blocks (count)" if ax is axes[0] else None)
    counts, _, _ = ax.hist(values.numpy(), bins=80, color=PALETTE["sky"])
    levels = library.dynamic_levels() * values.abs().max()
    ax.plot(
        levels,
        torch.full_like(levels, -0.04 * counts.max()),
        "|",
        color=PALETTE["vermilion"],
        markersize=6,
        alpha=0.6,
    )
    ax.tick_params(axis="x", length=3)
level(*axes)
note(
    fig,
    "layers.4.mlp.up. Red: the 256 dynamic levels, stretched to the largest magnitude (in truth, for every 256 blocks anew).",
)
plt.show()

# %% [markdown]
# This is double quantization: the function that you have just written, once more, on $c - \bar c$, with the
# 256 levels of `dynamic_levels()` and blocks of 256 scales. The bits a weight:
#
# $$
# 4 + \frac{32}{64} = 4.5 \qquad\text{becomes}\qquad 4 + \frac{8}{64} + \frac{32}{64 \cdot 256} = 4.127 .
# $$

# %% tags=["exercise"]
from fewer.peft import double_quantize

# %% tags=["check"]
check(double_quantize)

# %% tags=["demo"]
fig, ax = figure(
    "Double quantization: the same error for fewer bits",
    "size (bits per weight)",
    "error, ‖W − Ŵ‖ / ‖W‖ (%)",
    note="layers.4.mlp.up in NF4; beside the dots the size of a block. The scales' own blocks: 256.",
    size=(6.8, 3.8),
)
block_sizes = (16, 32, 64, 128, 256)
for name, color in (("scales in 32 bits", "amber"), ("scales in 8 bits", "blue")):
    sizes, found = [], []
    for block_size in block_sizes:
        codes, c = library.quantize_blockwise(up, LEVELS["NF4"], block_size)
        if name == "scales in 8 bits":
            c = library.undo_double_quantize(*library.double_quantize(c))
        back = library.dequantize_blockwise(codes, c, LEVELS["NF4"], block_size)
        found.append(100 * float((up - back).norm() / up.norm()))
        sizes.append(library.nf4_bits(block_size, 256 if name == "scales in 8 bits" else None))
    (line,) = ax.plot(sizes[::-1], found[::-1], marker="o", color=PALETTE[color])
    direct_label(ax, line, name)
    for size, error, block_size in zip(sizes, found, block_sizes, strict=True):
        below = name == "scales in 8 bits"
        ax.annotate(
            block_size,
            (size, error),
            xytext=(-6, -4) if below else (4, 4),
            textcoords="offset points",
            ha="right" if below else "left",
            fontsize=7,
            color=GREY,
        )
ax.set(xlim=(3.9, 6.05), ylim=(7.95, 10.7))
ax.tick_params(axis="x", length=3)
plt.show()

# %% [markdown]
# ## 8.7 QLoRA, and what cannot be merged
#
# Put it together. The base is in NF4; a weight is a float only while its layer computes, forward or
# backward, since the base does not learn and of the gradients only
# $\partial L / \partial x = \hat W^\top \partial L / \partial y$ needs it. LoRA beside it stays in float. You
# trained this in 8.1 already, and QLoRA was as good as LoRA within the noise.
#
# But the merging of 8.2? $\hat W + s B A$ is a float matrix: there is no 4-bit matrix to add it to. One
# can merge and **quantize again**. What is left of the learning then? Rounding moves each weight by up to
# half a gap between levels, and asks nobody how much of the change was smaller than that:


# %% tags=["demo"]
def after_rounding(frozen, change):
    """The size of a change (% of W), and how much of it survives quantizing W + change (%)."""
    merged = frozen + change
    again = library.dequantize_nf4(library.quantize_nf4(merged), merged.shape)
    survives = (change * (again - frozen)).sum() / change.square().sum()
    return again, 100 * float(change.norm() / frozen.norm()), 100 * float(survives)


survival = {factor: [] for factor in (0.125, 0.25, 0.5, 1)}
rows = {"adapter beside it": [], "merged,\n4 bits again": [], "adapter taken off": []}
for seed in SEEDS:
    attached = runs["QLoRA", seed].attached
    model = attached.model
    rows["adapter beside it"].append(runs["QLoRA", seed].accuracy)
    rows["adapter taken off"].append(library.accuracy(model, test_x, test_y))
    attached.attach_again()
    attached.merge()
    for name, wrapper in attached.wrappers.items():
        weight, frozen = model.get_submodule(name).weight, wrapper.frozen
        change = weight - frozen
        if seed == 0:
            for factor, found in survival.items():
                found.append(after_rounding(frozen, factor * change)[1:])
        weight.copy_(after_rounding(frozen, change)[0])
    rows["merged,\n4 bits again"].append(library.accuracy(model, test_x, test_y))
    attached.unmerge()
    attached.detach()


def mean_error(values):
    """Mean and standard error over the seeds, in percent; one seed has no error."""
    values = 100 * torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(
        values
    ) > 1 else 0.0


fig, axes = plt.subplots(1, 2, figsize=(9.0, 3.8))
frame(
    axes[0],
    "Small changes are rounded away",
    "size of the change, s B A (% of W)",
    "what is left of it after rounding (%)",
)
words = ("an eighth of it", "a quarter", "a half", "the change as learned")
for i, (found, color) in enumerate(
    zip(survival.values(), ("amber", "sky", "blue", "ink"), strict=True)
):
    axes[0].plot(*zip(*found, strict=True), "o", color=PALETTE[color])
    axes[0].text(0.03, 0.7 + 0.08 * i, words[i], color=PALETTE[color], transform=axes[0].transAxes)
log_axis(axes[0].xaxis)
axes[0].set_ylim(-3, 103)
axes[0].tick_params(axis="x", length=3)
losses = [
    a - b for a, b in zip(rows["adapter beside it"], rows["merged,\n4 bits again"], strict=True)
]
lost, lost_error = mean_error(losses)
frame(
    axes[1],
    f"Quantized again: {lost:.1f} ± {lost_error:.1f} points lost",
    None,
    "test accuracy (%)",
)
for i, found in enumerate(rows.values()):
    mean, error = mean_error(found)
    color = ("blue", "vermilion", "ink")[i]
    axes[1].errorbar(i, mean, error, marker="o", color=PALETTE[color], capsize=2, elinewidth=1.2)
    axes[1].annotate(
        f"{mean:.1f}",
        (i, mean),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=PALETTE[color],
    )
axes[1].set_xticks(
    range(len(rows)), [name.replace(", ", ",\n").replace("adapter ", "adapter\n") for name in rows]
)
axes[1].set_xlim(-0.4, len(rows) - 0.3)
level(*axes)
note(
    fig,
    f"QLoRA, r = 8, on NF4, {len(SEEDS)} seeds; bars: standard error. Left: the 12 matrices of seed 0, their change as it is and made smaller. Right: all with the head that was trained beside the adapter.",
)
plt.show()
kept = [left for _, left in survival[1]]
print(
    f"after rounding, {sum(kept) / len(kept):.0f}% of the change is left (mean of {len(kept)} matrices)"
)

# %% [markdown]
# ## 8.8 A pruned base
#
# The other base that is not just a float matrix is a **pruned** one. Its zeros are what pruning was done
# for (lab 4). $B A$ has none:

# %% tags=["demo"]
SPARSITY = 0.6
pruned = copy.deepcopy(upper)
for layer in linear_layers(pruned).values():
    layer.weight.mul_(magnitude_mask(layer.weight, SPARSITY))
tuned = {
    name: [
        train(low_rank(method, seed=seed, layers=pruned), seed, RATES["LoRA"], pruned)
        for seed in SEEDS[:2]
    ]
    for name, method in (("LoRA", library.lora), ("SparsePEFT", library.sparse_peft))
}
patch = (slice(0, 24), slice(0, 40))
pictures = {
    "pruned": linear_layers(pruned)["0.attention.query"].weight,
    **{f"with {name} merged": weights(runs_[0].attached)[0] for name, runs_ in tuned.items()},
}
fig, axes = plt.subplots(1, 3, figsize=(9.0, 2.6))
for ax, (name, w) in zip(axes, pictures.items(), strict=True):
    shown = (w[patch] != 0).float()
    ax.imshow(shown, cmap="Blues", vmin=0, vmax=1.4)
    ax.set_title(
        f"{name}: {100 * float((w == 0).double().mean()):.0f}% zeros", loc="left", fontsize=9.5
    )
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
note(
    fig,
    f"24 × 40 weights of layers.0.attention.query of the two; blue: not zero. {100 * SPARSITY:.0f}% of each matrix pruned by magnitude.",
)
plt.show()

# %% [markdown]
# SparsePEFT multiplies the change by the mask of the weight it belongs to, while it is trained:
#
# $$
# W' = W + s\,(B A) \odot M, \qquad M_{ij} = [\,W_{ij} \neq 0\,] .
# $$
#
# $A$ and $B$ then learn to do with the places that are there. The price: $B A$ has to be formed as a
# whole matrix in every step, for the way through the narrow middle knows no mask.

# %% tags=["exercise"]
from fewer.peft import sparse_peft_delta

# %% tags=["check"]
check(sparse_peft_delta)

# %% [markdown]
# Could one not train LoRA as usual, merge, and prune by the old mask afterwards? Let us see:

# %% tags=["demo"]
rows = {
    "LoRA beside it\n(or merged: no zeros)": [],
    "LoRA merged,\nthen masked": [],
    "SparsePEFT\nmerged": [],
}
keep = [layer.weight != 0 for layer in linear_layers(pruned).values()]
for lora_run, sparse_run in zip(*tuned.values(), strict=True):
    for name, run in zip(rows, (lora_run, lora_run, sparse_run), strict=True):
        attached = run.attached
        attached.attach_again()
        if "merged" in name.split("\n")[0] or "SparsePEFT" in name:
            attached.merge()
        if "masked" in name:
            for layer, mask in zip(MATRICES, keep, strict=True):
                attached.model.get_submodule(layer).weight.mul_(mask)
        rows[name].append(library.accuracy(attached.model, test_x, test_y))
        attached.unmerge()
        attached.detach()
fig, ax = figure(
    "Masked while it learns, the change survives; masked afterwards, it suffers",
    None,
    "test accuracy (%)",
    note=f"Two layers of MiniLM pruned to {100 * SPARSITY:.0f}% zeros by magnitude, r = 8, {STEPS} steps, {len(tuned['LoRA'])} seeds (all shown, mean as a line).",
    size=(6.8, 3.6),
)
for i, found in enumerate(rows.values()):
    color = PALETTE[("vermilion", "amber", "green")[i]]
    ax.plot([i] * len(found), [100 * a for a in found], "o", color=color)
    mean = 100 * sum(found) / len(found)
    ax.hlines(mean, i - 0.2, i + 0.2, color=color)
    zeros = 0 if i == 0 else SPARSITY
    ax.annotate(
        f"{mean:.1f}%\n{100 * zeros:.0f}% zeros",
        (i + 0.22, mean),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=color,
    )
ax.set_xticks(range(len(rows)), rows)
ax.set_xlim(-0.5, len(rows) - 0.3)
plt.show()

# %% [markdown]
# One could, at a price: $A$ and $B$ had counted on places that are gone. (In other settings that we tried,
# the price was 10 to 25 points.) Masked from the start, they make do without. Between SparsePEFT and LoRA,
# two seeds can tell no difference.
#
# (And the 4-bit base? There, too, one can train *through* the rounding, so that what is merged fits the
# grid. SparsePEFT's authors do so, and call it QA-SparsePEFT.)
#
# ## 8.9 The bill
#
# What lies in memory while one trains? All weights. For each *trained* one its gradient and what the
# optimizer remembers (Adam: two numbers). And the activations, which do not depend on how many weights are
# trained but on the batch:

# %% tags=["demo"]
PARTS = {"weights": "ink", "gradients": "amber", "optimizer": "vermilion", "activations": "sky"}


def one_step(method):
    """Train for a step and count what is there: the bytes of each part, and how many are trained."""
    wraps, layers = METHODS[method](0)
    model = Upper(copy.deepcopy(layers), new_head())
    with library.attach(model, wraps) as attached:
        trained = [*attached.parameters(), *model.head.requires_grad_(True).parameters()]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)

        def loss():
            return F.cross_entropy(model(x[:BATCH]), y[:BATCH])

        activations = library.saved_activation_bytes(loss, model)
        loss().backward()
        optimizer.step()
        return (*library.measured_memory(model, optimizer), activations), sum(
            p.numel() for p in trained
        )


measured = {method: one_step(method) for method in METHODS}
fig, ax = figure(
    "LoRA saves what learning needs, QLoRA also what is there anyway",
    "memory while training (MB)",
    None,
    note=f"Measured: two layers of MiniLM and a head, Adam, float32 but for QLoRA's base, a batch of {BATCH} passages of {LENGTH} tokens; r = 8.",
    size=(7.2, 3.0),
)
for i, (method, (parts, _)) in enumerate(reversed(measured.items())):
    left = 0
    for size, (part, color) in zip(parts, PARTS.items(), strict=True):
        ax.barh(i, size / 1e6, left=left, color=PALETTE[color], height=0.6)
        if method == "full":
            ax.text(
                left + size / 2e6,
                i + 0.36,
                part,
                ha="center",
                va="bottom",
                color=PALETTE[color],
                fontsize=8,
            )
        left += size / 1e6
    ax.text(left + 0.6, i, f"{left:.0f} MB", va="center")
ax.set_yticks(range(len(measured)), reversed(measured))
ax.grid(False)
ax.tick_params(axis="x", length=3)
plt.show()

# %% [markdown]
# For $n_t$ trained weights of $b_t$ bits, $n_f$ frozen ones of $b_f$ bits, and an optimizer with $k$ states
# of $b_s$ bits:
#
# $$
# \text{weights} = \frac{n_t b_t + n_f b_f}{8}, \qquad \text{gradients} = \frac{n_t b_t}{8}, \qquad
# \text{optimizer} = \frac{n_t\, k\, b_s}{8} \quad \text{bytes.}
# $$

# %% tags=["exercise"]
from fewer.peft import training_memory

# %% tags=["check"]
check(training_memory)

# %% tags=["demo"]
print("method   trained     by the formula   measured (without activations)")
in_matrices = sum(w.numel() for w in before)
others = (
    sum(p.numel() for p in upper.parameters()) - in_matrices
)  # biases and norms stay in float32
for method, (parts, trained) in measured.items():
    frozen = 0 if method == "full" else in_matrices + others
    bits = 32.0
    if method == "QLoRA":
        bits = (in_matrices * library.nf4_bits() + 32 * others) / frozen
    formula = sum(library.training_memory(trained, frozen, frozen_bits=bits))
    print(f"{method:6} {trained:9,} {formula / 1e6:14.3f} MB {sum(parts[:3]) / 1e6:13.3f} MB")
print("\nLLaMA 65B, weights in 16 bits, LoRA with 400 million numbers in all, in GB:")
for method, memory in (
    ("full", library.training_memory(65 * 10**9, trained_bits=16)),
    ("LoRA", library.training_memory(4 * 10**8, 65 * 10**9, 16, 16)),
    ("QLoRA", library.training_memory(4 * 10**8, 65 * 10**9, 16, library.nf4_bits())),
):
    print(
        f"{method:6} {sum(memory) / 1e9:5.0f}   "
        + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in memory._asdict().items())
    )

# %% [markdown]
# Two things to see. The formula is right to a few bytes (Adam also counts its steps). And *activations*
# are the larger part of the bill here, which no method of this lab was made to save: gradients have to flow
# through the frozen layers as well. DoRA keeps even more of them, for its detour through the base's output.
# With 65 billion weights it is the weights that count, and QLoRA fits a GPU of 48 GB.
#
# ## 8.10 Accuracy and memory
#
# And how well does it all work? First the question that everybody asks, *which rank?*, with a second one
# that is asked too seldom: *at which learning rate?*

# %% tags=["demo"]
by_rank = {}
settings = [(rank, lr) for lr in (RATES["LoRA"], 1.5e-2) for rank in sized((1, 8, 32), (1, 8))]
for rank, lr in track(settings, "ranks"):
    by_rank[rank, lr] = [
        runs["LoRA", seed].accuracy
        if (rank, lr) == (8, RATES["LoRA"])
        else train(low_rank(library.lora, rank, seed=seed), seed, lr).accuracy
        for seed in SEEDS[:2]
    ]

# %% tags=["demo"]
fig, axes = plt.subplots(1, 2, figsize=(9.6, 4.6), width_ratios=(1.25, 1))
accuracies = {method: mean_error([runs[method, s].accuracy for s in SEEDS]) for method in METHODS}
with_all = {method: sum(parts) / 1e6 for method, (parts, _) in measured.items()}
without = {method: sum(parts[:3]) / 1e6 for method, (parts, _) in measured.items()}
frame(
    axes[0],
    f"Full training needs {without['full']:.0f} MB, QLoRA {without['QLoRA']:.1f} MB",
    "memory while training (MB)",
    "test accuracy (%)",
)
for (method, (mean, error)), color in zip(
    accuracies.items(), ("vermilion", "blue", "green", "purple"), strict=True
):
    color = PALETTE[color]
    axes[0].plot([without[method], with_all[method]], [mean, mean], color=color, linewidth=1)
    axes[0].plot(with_all[method], mean, "o", color=color, markerfacecolor="white", markersize=6)
    axes[0].errorbar(
        without[method],
        mean,
        error,
        marker="o",
        markersize=7,
        color=color,
        capsize=3,
        elinewidth=1.4,
    )
    axes[0].annotate(
        f"{method}  {mean:.1f}",
        (without[method], mean),
        xytext=(7, 7) if method in ("full", "QLoRA", "DoRA") else (7, -13),
        textcoords="offset points",
        color=color,
    )
log_axis(axes[0].xaxis)
axes[0].set_xlim(2.5, 150)
frame(axes[1], "Each rank has its learning rate", "rank r (count)", "test accuracy (%)")
for lr, color in ((RATES["LoRA"], "blue"), (1.5e-2, "amber")):
    points = [(rank, *mean_error(found)) for (rank, at), found in by_rank.items() if at == lr]
    r, means, bars = zip(*points, strict=True)
    axes[1].errorbar(r, means, bars, color=PALETTE[color], linewidth=0, elinewidth=1.4, capsize=3)
    (line,) = axes[1].plot(r, means, marker="o", color=PALETTE[color])
    direct_label(axes[1], line, f"rate {lr:g}")
axes[1].set_xscale("log", base=2)
axes[1].set_xticks([1, 8, 32], ["1", "8", "32"])
axes[1].minorticks_off()
axes[0].set_ylim(60, 92)
axes[1].set_ylim(45, 92)
for ax in axes:
    ax.axhline(100 * probe_accuracy, color=GREY, linewidth=0.8, zorder=0)
axes[0].text(2.7, 100 * probe_accuracy - 0.8, "linear probe", color=GREY, va="top")
note(
    fig,
    f"Disturbed or not? {len(y)} passages of {LENGTH} tokens, {STEPS} steps of {BATCH}, {len(test_y)} test passages; two layers of MiniLM adapted. "
    f"Left: r = 8, {len(SEEDS)} seeds; filled: weights, gradients and Adam's states; hollow: with the activations. "
    "Right: LoRA, 2 seeds. Bars: standard error over the seeds.",
)
plt.show()
print(
    "full - LoRA, the same seeds: {:+.1f} ± {:.1f} points".format(
        *mean_error([runs["full", s].accuracy - runs["LoRA", s].accuracy for s in SEEDS])
    )
)

# %% [markdown]
# - **Memory.** QLoRA learns with a fifteenth of what full training needs for weights, gradients and Adam, and
#   as well as LoRA: its frozen 4-bit weights do no measurable harm. With the activations, it is two fifths.
# - **LoRA and DoRA** cannot be told apart here (the stored runs below agree).
# - **Rank.** At a rate of 0.005 rank 1 looks poor; at 0.015 it does as well as any other, and higher ranks
#   fall to chance. A figure with the first curve alone would be a figure about the learning rate.
# - **Full training** comes out below LoRA, and this deserves no trust at all. How the rates were chosen: a
#   few were tried on the *validation* passages with seed 0 (0.0001 to 0.003 for full training, 0.001 to 0.015
#   for the others). For full training 0.003 looked best, and the next two seeds fell to chance with it, so we
#   took 0.001. And with 50 steps of 16 passages and LoRA at 0.003, it was full training that led (by 3.5 ±
#   1.1 points).
#
# A longer comparison was made for you on a GPU; it is stored, and its tables are in `docs/results.md`
# (`benchmarks/peft.py` makes them): the whole of MiniLM and of SmolLM2, the four eras of lab 7, passages of
# 64 tokens, for each method the best of several rates, five seeds. There, too, LoRA, DoRA and QLoRA cannot be
# told apart, and neither can the ranks from 1 to 16. Full training is below them on MiniLM and level with
# them on SmolLM2.
#
# With a rate of its own, no rank stands out. And with 1,120 passages to learn from, fewer trained numbers
# are no loss.

# %% [markdown] tags=["written"] id="which_rank_and_which_base" points=5
# **Question.** (a) A classmate shows the right panel's curve for the rate 0.005 alone: "Rank 1 is far
# below rank 8, so it has too few numbers to learn this." What does the other curve say to that, and how would you plan an
# experiment that may be called a comparison of ranks? (b) You have trained QLoRA and want to ship *one* model
# of 4 bits without adapters beside it. Look at the left panel of 8.7. For which adapters is quantizing again
# most dangerous, those that changed the base much or little? Why, and what two other ways are there to ship?
# (c) A company offers a pruned 4-bit base, and a customer's LoRA "merged at no cost". Name the two things
# that this merge costs, with the figure that shows each.
#
# **Answer.** (a) At 0.015 it is rank 1 that works, about as well as the best of the first curve, and higher
# ranks diverge. So what the first curve shows is that 0.005 is too small for rank 1 in so few steps. To compare
# ranks, choose the rate for each rank by validation accuracy, from the same number of candidates, with more
# than one seed per candidate; then test several new seeds at the chosen rates, and report how close to each
# rank's edge its rate is. Scaling with the rank (α/√r) may bring the best rates together, but has to be tried,
# too. (b) Those that changed it little. Where the change of a weight is less than half the gap between two
# levels, it is rounded back to where it was: at a few percent of W hardly anything of the change survives, while
# of larger ones most does. (An adapter that changed much survives as a whole with rounding noise added.) Other
# ways: keep the adapter beside the 4-bit base, at a cost in time; or merge into floats, at a cost in memory. Or
# train with the rounding in the loop. (c) The zeros: merged, LoRA leaves 0% of them (8.8, the masks), and
# restoring them costs accuracy (the figure after it). And the grid: the sum is no 4-bit matrix; it takes
# floats, or loses by being rounded again (8.7).
#
# **Rubric.** (a) 1 point: the other curve shows rank 1 level with the others at its own rate. 1 point: a rate for
# each rank chosen on validation data, with several seeds. (b) 1 point: small changes, because of the
# half gap. 1 point: two of the other ways. (c) 1 point: zeros and grid, each with its figure.
