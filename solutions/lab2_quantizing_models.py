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
# # Lab 2. Quantizing a whole model
#
# Lab 1 took one tensor apart. Now the whole model: 210 matrices, and what flows between them. Two
# things go wrong on the way, and each has its own cures:
#
# - **Activations have outliers.** One value of 2,000 among values of 2 leaves nothing for the rest.
#   LLM.int8() sets the large ones aside, SmoothQuant hands them to the weights, a Hadamard rotation
#   spreads them over all channels.
# - **Below 4 bits, rounding weights to nearest is not good enough.** GPTQ rounds them one column
#   after the other, and lets the columns still to come make up for the error.
#
# You build the heart of all four, and the last figure puts them side by side: perplexity against
# bits, on a speech that no method was calibrated on.
#
# The model is SmolLM2-135M-Instruct, from a file in which the weights already lie on a 4-bit grid
# (groups of 32, asymmetric). We take them as ordinary floats and use other grids. So "unquantized"
# below means: as they are in that file.

# %%
from autograder import check

# %% tags=["demo"]
from itertools import pairwise

import matplotlib.pyplot as plt
import torch

import fewer.quantization as library
from fewer.data import calibration_text, evaluation_text
from fewer.evaluate import perplexity
from fewer.models import (
    compressed_sequentially,
    input_hessian,
    inverse_cholesky,
    linear_inputs,
    linear_layers,
    load_smollm2,
    replaced_products,
    replaced_weights,
)
from fewer.plots import GREY, INK, PALETTE, RULE, direct_label, figure, frame, log_axis, style
from fewer.sizes import sized

style()
model, tokenizer = load_smollm2()
model.layers = model.layers[: sized(30, 2)]  # all blocks; two where tests run the lab small
layers = linear_layers(model)
count = sum(layer.weight.numel() for layer in layers.values())

calibration = torch.tensor(tokenizer.encode(calibration_text().text).ids)
sample = calibration[None, : sized(256, 32)]  # a short stretch, enough to look at
text = evaluation_text()
reading = torch.tensor(tokenizer.encode(text.text[:20_000]).ids)[: sized(1024, 64) + 1]
results = {}


def measure(name):
    """The perplexity of the model as it is now: printed, and kept for the last figure."""
    results[name] = perplexity(model, reading, text_id=text.id, context=sized(512, 32))
    print(f"{name:42} {results[name]}")


print(f"{len(layers)} matrices, {count / 1e6:.0f} million weights")
measure("unquantized")

# %% [markdown]
# ## 2.1 The scheme to beat
#
# *Round to nearest* (RTN): each weight goes to the nearest point of its grid, one matrix at a time,
# whatever the matrix reads. It needs no data and a few seconds, and every paper has to beat it. What
# it costs is decided by who shares a scale:

# %% tags=["demo"]
weight = layers[f"layers.{sized(10, 1)}.mlp.down_proj"].weight
settings = {
    "4 bits, one scale a channel, symmetric": (4, None, True),
    "4 bits, one scale a channel, asymmetric": (4, None, False),
    "4 bits, groups of 64, asymmetric": (4, 64, False),
    "4 bits, groups of 16, asymmetric": (4, 16, False),
    "3 bits, groups of 64, asymmetric": (3, 64, False),
}
fig, ax = figure(
    "“4 bits” is anything from 4.01 to 5.25",
    "size (bits per weight)",
    None,
    note="down_proj of block 10, 576 x 1536: what round_to_nearest stores. Scales in float16, codes and "
    "zero-points packed.",
    size=(6.4, 2.9),
)
for row, setting in enumerate(reversed(settings.values())):
    _, stored = library.round_to_nearest(weight, *setting)
    left = 0.0
    for part, color in zip(stored, ("sky", "blue", "vermilion"), strict=False):
        width = library.bits_per_weight(weight.numel(), part)
        ax.barh(row, width, left=left, height=0.62, color=PALETTE[color])
        left += width
    ax.text(left + 0.06, row, f"{left:.2f}", va="center")
ax.set_yticks(range(len(settings)), reversed(settings))
for x, name, color in (
    (0.05, "codes", "sky"),
    (4.02, "scales", "blue"),
    (5.02, "zeros", "vermilion"),
):
    ax.text(x, 4.42, name, color=PALETTE[color], fontsize=8, va="bottom")
ax.set(xlim=(0, 5.7), ylim=(-0.5, 4.9))
ax.grid(False)
plt.show()

# %% [markdown]
# Scales are stored in float16, so the weights must be *restored* with the float16 ones, or the
# perplexity is that of a model nobody has on disk. With codes $q$, scale $s$ and zero-point $z$ of
# `quantize_per_group`:
#
# $$
# \hat W = \mathrm{float16}(s)\,(q - z), \qquad
# \mathrm{stored} = \big[\mathrm{pack}(q),\ \mathrm{float16}(s),\ \mathrm{pack}(z)\big].
# $$

# %% tags=["exercise"]
from fewer.quantization import round_to_nearest

# %% tags=["check"]
check(round_to_nearest)

# %% [markdown]
# A *scheme* is any function from a layer's name and weight to the pair you just returned. In a
# `with` block every matrix of the model has its restored weight; when the block ends the old ones
# are back, bit for bit. The report says for each layer what it weighs and how far its output moved,
# $\lVert XW^\top - X\hat W^\top\rVert / \lVert XW^\top\rVert$:

# %% tags=["demo"]
before = {name: layer.weight.clone() for name, layer in layers.items()}


def scheme(name, w):
    return library.round_to_nearest(w, bits=4, symmetric=False)


with library.quantized_weights(model, scheme, sample[:, : sized(64, 32)]) as reports:
    measure("RTN, 4 bits a channel")
same = all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())
print(f"afterwards all {len(layers)} weights are what they were, bit for bit: {same}\n")
del before

kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
print("layers      matrices        MB   bits a weight   output error: mean   worst")
for kind in kinds:
    rows = [report for report in reports if report.layer.endswith(kind)]
    size = sum(report.stored_bytes for report in rows)
    bits = 8 * size / sum(report.weights for report in rows)
    errors = [report.output_error for report in rows]
    print(
        f"{kind:12}{len(rows):8}{size / 1e6:10.2f}{bits:16.3f}"
        f"{sum(errors) / len(errors):21.3f}{max(errors):8.3f}"
    )
sizes = {"4 bits a channel": 8 * sum(report.stored_bytes for report in reports) / count}
print(f"all: {sizes['4 bits a channel']:.3f} bits a weight")

# %% tags=["demo"]
error_of = {report.layer: report.output_error for report in reports}
grid = [[error_of[name] for name in layers if name.endswith(kind)] for kind in kinds]
fig, ax = figure(
    "At 4 bits, v_proj loses twice as much of its output as q_proj and k_proj",
    "block (index)",
    "colour: error of the output (fraction)",
    note="Asymmetric 4-bit codes, one scale an output channel; inputs of the unquantized model, 64 "
    f"tokens of {calibration_text().id}.",
    size=(7.0, 3.2),
)
image = ax.imshow(grid, aspect="auto", cmap="magma_r", vmin=0)
ax.set_yticks(range(len(kinds)), kinds)
ax.grid(False)
bar = fig.colorbar(image, ax=ax, pad=0.015, aspect=14)
bar.outline.set_visible(False)
plt.show()

# %% [markdown]
# ## 2.2 Where the outliers live
#
# So far the activations were floats. To multiply integers (lab 1), they must be quantized too, and
# there the trouble starts. For the input of every layer: how many times larger is the largest
# channel than a usual one?

# %% tags=["demo"]
inputs = linear_inputs(model, sample)  # what each layer reads
parts = {
    "q, k, v": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "gate, up": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
blocks = range(len(model.layers))
absmax = {name: x.abs().amax(0) for name, x in inputs.items()}  # of each channel, over the tokens
ratio = {
    part: [float(m.max() / m.median()) for m in (absmax[f"layers.{i}.{end}"] for i in blocks)]
    for part, end in parts.items()
}
fig, ax = figure(
    "Two inputs of down_proj are in a class of their own",
    "block (index)",
    "largest channel (multiple of the median channel)",
    note=f"Of each channel the largest magnitude over {sample.shape[1]} tokens of {calibration_text().id}.",
)
for part, values in ratio.items():
    (line,) = ax.plot(values, marker="o", markersize=3)
    direct_label(ax, line, part)
for i in sorted(blocks, key=lambda i: -ratio["down"][i])[:2]:
    found = absmax[f"layers.{i}.mlp.down_proj"]
    ax.annotate(
        f"{found.max():,.0f}; usual {found.median():.1f}",
        (i, ratio["down"][i]),
        xytext=(-7, 0),
        textcoords="offset points",
        ha="right",
        va="center",
    )
log_axis(ax.yaxis)
plt.show()

# %% [markdown]
# They are of two kinds. Look at the inputs of two layers, every token and every channel:

# %% tags=["demo"]
stripe = max(blocks, key=lambda i: ratio["q, k, v"][i])
worst = max(blocks, key=lambda i: ratio["down"][i])
shown = {
    "One channel, every token": f"layers.{stripe}.self_attn.q_proj",
    "One token, two channels": f"layers.{worst}.mlp.down_proj",
}
fig, axes = plt.subplots(1, 2, figsize=(7.6, 4.4))
for ax, (title, name) in zip(axes, shown.items(), strict=True):
    x = inputs[name][:32].abs()
    token, channel = divmod(int(x.argmax()), x.shape[1])
    frame(
        ax,
        title,
        f"channel of {name.split('.', 2)[2]}, block {name.split('.')[1]} (index)",
        "token (index)",
    )
    wide = x.shape[1] // 96  # a pixel shows the largest of so many channels: one would be too thin
    image = ax.imshow(
        x.unflatten(1, (-1, wide)).amax(2),
        aspect="auto",
        cmap="inferno",
        norm="log",
        vmin=0.1,
        vmax=100,
        extent=(0, x.shape[1], len(x), 0),
        interpolation="nearest",
    )
    ax.annotate(
        f"token {token}, channel {channel}: {x.max():,.0f}",
        (channel + wide, token + 0.8),
        xytext=(0.52, 0.4),
        textcoords="axes fraction",
        ha="center",
        color="white",
        weight="bold",
        arrowprops={"arrowstyle": "-|>", "color": "white"},
    )
    ax.grid(False)
bar = fig.colorbar(image, ax=axes, pad=0.02, aspect=26, extend="max")
bar.outline.set_visible(False)
fig.supxlabel(
    "Colour: magnitude, from 0.1 to 100 and more. A pixel shows the largest of 6 (left) or 16 channels.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
)
plt.show()

# %% [markdown]
# On the left, channel 247 behind the norm: the largest of all for every token but the first, and so
# in most of the middle blocks. On the right, one row: the *first* token, which later ones attend to
# when there is nothing better to attend to (the attention sink). Not the word matters but its place:
# begin the text elsewhere, and the same two channels of the new first token light up.
#
# What do 8 bits make of this? A scale for the whole input must reach the first token's largest value,
# so the step is 1/127 of that, and the other tokens round to nearly nothing. A scale for each *token*
# saves the others. A scale for each *channel* would cure both, but it cannot leave the sum of a
# matrix product (lab 1):

# %% tags=["demo"]
# a byte a weight, and a float16 scale for each row
sizes["8 bits a channel"] = 8 + 16 * sum(len(layer.weight) for layer in layers.values()) / count


def eight_bits(name, w):
    return library.dequantize(*library.quantize_symmetric(w, 8, -1))


def a_tensor(x):
    return library.quantize_symmetric(x, 8)


def a_token(x):
    return library.quantize_symmetric(x, 8, -1)


with replaced_weights(model, eight_bits):
    measure("RTN, 8 bits a channel")
    with library.quantized_activations(model, a_tensor):
        measure("W8A8, one scale a tensor")
    with library.quantized_activations(model, a_token):
        measure("W8A8, one scale a token")

# %% [markdown]
# Weights at 8 bits cost next to nothing; activations with one scale for the tensor cost a lot. A scale a
# token looks like the end of the story, but it must be found anew for every token, while one scale for
# the tensor can be fixed before the model runs. The next three sections are three ways out.
#
# ## 2.3 Set the outliers aside: LLM.int8()
#
# Dettmers et al. saw that outliers sit in few features (columns of $X$). So find the columns with a
# value of magnitude 6 or more, multiply those few in full precision, and everything else in int8:
#
# $$
# O = \{h : \max_t |X_{th}| \ge 6\}, \qquad
# Y = \sum_{h \in O} X_{:h} W_{:h}^\top
#   + \underbrace{s^x s^w \sum_{h \notin O} q^x_{:h} (q^w_{:h})^\top}_{\text{int8, a scale a token and a channel}}
# $$

# %% tags=["exercise"]
from fewer.quantization import outlier_features

# %% tags=["check"]
check(outlier_features)

# %% [markdown]
# The order of things matters: first the outlier columns go, then the scales are computed from what is
# left. Otherwise the outliers are gone, but the scale they spoiled is still there.

# %% tags=["exercise"]
from fewer.quantization import matmul_llm_int8

# %% tags=["check"]
check(matmul_llm_int8)

# %% [markdown]
# Which features are kept is known only when $X$ is there. Here is how many it was:

# %% tags=["demo"]
kept = {}


def product(name, x, w):
    y, fraction = library.matmul_llm_int8(x, w)
    kept[name] = max(fraction, kept.get(name, 0.0))
    return y


with replaced_products(model, product):
    measure("LLM.int8()")

fig, ax = figure(
    "A threshold of 6 fits inputs behind a norm, not those of down_proj",
    "block (index)",
    "features in full precision (%)",
    note=f"Magnitude 6 or more in any token of a window; the larger of {sized('two windows of 512', 'all windows')} "
    f"tokens of {text.id}.",
)
for part, end in parts.items():
    values = [100 * kept[f"layers.{i}.{end}"] for i in blocks]
    (line,) = ax.plot(values, marker="o", markersize=3)
    direct_label(ax, line, part)
plt.show()

# %% [markdown]
# The paper reports at most 7 outlier features, about 0.1%. Behind the norms we find no more than 2 of
# 576. The last down_proj are another matter: there even a usual channel reaches 3 or 4, so a threshold
# of 6 keeps a good part of the matrix in full precision, and gives away as much of the gain in speed. A
# threshold is a number in the unit of $X$; this one was chosen for other layers of other models.
#
# ## 2.4 Hand the outliers to the weights: SmoothQuant
#
# Weights are easy to quantize and activations are hard, so share the difficulty. Divide each channel
# of $X$ by a number and multiply the column of $W$ that meets it by the same number; the product
# stays what it was:
#
# $$
# Y = \big(X\,\mathrm{diag}(s)^{-1}\big)\big(\mathrm{diag}(s)\,W^\top\big), \qquad
# s_j = \frac{\max|X_j|^{\alpha}}{\max|W_j|^{1-\alpha}}.
# $$
#
# Here is what that does to the worst layer of all:

# %% tags=["demo"]
name = f"layers.{worst}.mlp.down_proj"
x, w = inputs[name], layers[name].weight
x_absmax, w_absmax = x.abs().amax(0), w.abs().amax(0)
s = library.smoothing_scales(x_absmax, w_absmax, alpha=0.75)
order = x_absmax.argsort(descending=True)
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.7))
for ax, title, old, new in (
    (axes[0], "The activation becomes flat ...", x_absmax, x_absmax / s),
    (axes[1], "... and the weight takes over its hills", w_absmax, w_absmax * s),
):
    frame(ax, title, "channel (rank by activation)", "largest magnitude (without unit)")
    place = torch.arange(1, len(order) + 1)
    for values, color, label, height in (
        (old, GREY, "before", 0.94),
        (new, PALETTE["blue"], "after", 0.87),
    ):
        ax.plot(place, values[order], color=color, linewidth=0.8)
        ax.text(
            0.98,
            height,
            f"{label}: up to {values.max():,.0f}, usual {values.median():.2f}",
            color=color,
            ha="right",
            transform=ax.transAxes,
        )
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
fig.supxlabel(f"Input channels of {name}, α = 0.75.", x=0.02, ha="left", fontsize=7, color=GREY)
plt.show()

# %% tags=["exercise"]
from fewer.quantization import smoothing_scales

# %% tags=["check"]
check(smoothing_scales)

# %% [markdown]
# Dividing $X$ costs nothing when the layer that *makes* $X$ can do it. An RMSNorm multiplies by a
# weight: divide that. SwiGLU makes $\mathrm{SiLU}(gate) \cdot up$, which is linear in $up$: divide the
# *rows* of up_proj. All layers that read the same $X$ must share one $s$:
#
# $$
# \text{producer}_j \leftarrow \text{producer}_j / s_j, \qquad
# W_{:j} \leftarrow W_{:j}\, s_j \quad \text{for every consumer } W.
# $$

# %% tags=["exercise"]
from fewer.quantization import fold_scales

# %% tags=["check"]
check(fold_scales)

# %% [markdown]
# Folding must leave the model's *function* as it was: that is checked first, before anything is
# quantized. Then perplexity, with one $\alpha$ for all layers:

# %% tags=["demo"]
scales = library.calibrate_smoothing(model, sample, alphas=[0.75])
probe = reading[None, : sized(64, 16)]
with torch.no_grad():
    logits = model(probe)
    with library.smoothed(model, scales):
        change = (model(probe) - logits).abs().max() / logits.abs().max()
print(f"largest change of a logit by smoothing alone: {change:.1e} of the largest logit\n")
with (
    library.smoothed(model, scales),
    replaced_weights(model, eight_bits),
    library.quantized_activations(model, a_tensor),
):
    measure("W8A8 a tensor, SmoothQuant")

# %% [markdown]
# The paper smooths what comes out of a norm and leaves the rest. Here that is not enough: the same run
# without the up_proj → down_proj groups gave 38.1 (same text, measured outside this lab), little better
# than no smoothing at all, because the worst outliers are those of down_proj. And $\alpha$? It says who
# is to bear the trouble, and there is a best:

# %% tags=["demo"]
alphas = [step / 10 for step in range(11)]
groups = library.smoothing_groups(model)


def errors_of(x, w):
    """Errors of the output, the first token aside: only X in 8 bits, only W, both; for each alpha."""
    y = x @ w.T
    rows = []
    for alpha in alphas:
        s = library.smoothing_scales(x.abs().amax(0), w.abs().amax(0), alpha)
        x_hat = library.dequantize(*library.quantize_symmetric(x / s, 8)) * s
        w_hat = library.dequantize(*library.quantize_symmetric(w * s, 8, -1)) / s
        outputs = (x_hat @ w.T, x @ w_hat.T, x_hat @ w_hat.T)
        rows.append([float((out - y)[1:].norm() / y[1:].norm()) for out in outputs])
    return list(zip(*rows, strict=True))


last = blocks[-1]
chosen = {
    f"down of {worst}": f"layers.{worst}.mlp.up_proj",
    f"gate, up of {last}": f"layers.{last}.post_attention_layernorm",
    f"down of {last // 2}": f"layers.{last // 2}.mlp.up_proj",
    f"q, k, v of {stripe}": f"layers.{stripe}.input_layernorm",
}
fig, axes = plt.subplots(1, 2, figsize=(8.0, 4.0))
frame(
    axes[0],
    "What X gains, W loses",
    "migration strength α (fraction)",
    "error of the output (fraction)",
)
frame(
    axes[1],
    "Each layer has its best α",
    "migration strength α (fraction)",
    "error of the output (fraction)",
)
for label, producer in chosen.items():
    x = inputs[groups[producer][0]]
    w = torch.cat([layers[consumer].weight for consumer in groups[producer]])
    only_x, only_w, both = errors_of(x, w)
    (line,) = axes[1].plot(alphas, both, marker="o", markersize=3)
    direct_label(axes[1], line, label)
    best = alphas.index(library.search_alpha(x, w, alphas))
    ring = {"markersize": 10, "fillstyle": "none", "color": line.get_color()}
    axes[1].plot(alphas[best], both[best], "o", **ring)
    if producer == chosen[f"down of {worst}"]:
        for part, errors, color in (
            ("only X", only_x, "sky"),
            ("only W", only_w, "amber"),
            ("both", both, "blue"),
        ):
            (line,) = axes[0].plot(alphas, errors, color=PALETTE[color])
            direct_label(axes[0], line, f"{part} in 8 bits")
for ax in axes:
    log_axis(ax.yaxis)
fig.supxlabel(
    f"Left: down_proj of block {worst}. X with one scale, W with one an output channel; error without the first "
    f"token; {sample.shape[1]} tokens\nof {calibration_text().id}. Rings: search_alpha, which "
    "counts the first token too.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
    linespacing=1.4,
)
plt.show()

# %% [markdown]
# ## 2.5 Spread the outliers: Hadamard rotation
#
# A product does not change when both sides are rotated, $XW^\top = (XR)(WR)^\top$ for orthogonal $R$.
# Choose an $R$ that mixes every channel with every other, in equal parts: a matrix of plus and
# minus ones with orthogonal rows.

# %% tags=["demo"]
fig, axes = plt.subplots(1, 3, figsize=(7.4, 2.8))
for ax, n, title in (
    (axes[0], 16, "16: Sylvester"),
    (axes[1], 36, "36: Paley"),
    (axes[2], 144, "144 = 4 x 36: both"),
):
    ax.imshow(library.hadamard_matrix(n), cmap="gray", interpolation="nearest")
    ax.set_title(title, loc="left")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.grid(False)
fig.supxlabel(
    "White is 1, black is -1; any two rows agree in half of their places.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
)
plt.show()

# %% [markdown]
# $$
# H_{2n} = \begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix}, \qquad
# R = \mathrm{diag}(\pm 1)\, H_n / \sqrt n, \qquad R R^\top = I.
# $$
#
# An outlier of 1,000 in one of $n = 1536$ channels becomes $1000/\sqrt{1536} = 26$ in each of them: the
# same energy, a step 39 times finer. The recursion makes the product cheap, too: $k$ rounds of sums
# and differences for $n = 2^k m$, in place of a matrix. SmolLM2's widths are $576 = 16 \cdot 36$ and
# $1536 = 128 \cdot 12$; the factor that is no power of two is a small matrix of Paley's.

# %% tags=["exercise"]
from fewer.quantization import fwht

# %% tags=["check"]
check(fwht)

# %% [markdown]
# What it does to each down_proj at 8 bits, one scale for the whole input; and below, the input where
# it helps most, seen from near:

# %% tags=["demo"]
errors = {"as it is": [], "rotated": []}


def error_at_8_bits(x, w):
    """Error of the output, the first token aside: it is large, and would speak for all."""
    x_hat = library.dequantize(*library.quantize_symmetric(x, 8))
    w_hat = library.dequantize(*library.quantize_symmetric(w, 8, -1))
    exact = (x @ w.T)[1:]
    return float(((x_hat @ w_hat.T)[1:] - exact).norm() / exact.norm())


for i in blocks:
    name = f"layers.{i}.mlp.down_proj"
    x, w = inputs[name], layers[name].weight
    signs = library.random_signs(x.shape[1])
    errors["as it is"].append(error_at_8_bits(x, w))
    errors["rotated"].append(
        error_at_8_bits(library.hadamard_rotate(x, signs), library.hadamard_rotate(w, signs))
    )
fig, ax = figure(
    "A rotation rescues every down_proj but one",
    "block (index)",
    "error of the output, first token aside (fraction)",
    note=f"W8A8, one scale for the input; {sample.shape[1]} tokens of {calibration_text().id}.",
)
for label, values in errors.items():
    (line,) = ax.plot(values, marker="o", markersize=3)
    direct_label(ax, line, label)
log_axis(ax.yaxis)
plt.show()

# %% tags=["demo"]
helped = max(blocks, key=lambda i: errors["as it is"][i] / errors["rotated"][i])
x = inputs[f"layers.{helped}.mlp.down_proj"]
turned = library.hadamard_rotate(x, library.random_signs(x.shape[1]))
fig, axes = plt.subplots(1, 2, figsize=(7.6, 4.0), sharey=True)
for ax, title, values in (
    (axes[0], f"Before: the largest is {x.abs().max():,.0f}", x),
    (axes[1], f"Rotated: {turned.abs().max():,.1f}", turned),
):
    frame(ax, title, "channel (index)", "magnitude (without unit)")
    magnitudes = values.abs()
    ax.plot(magnitudes[-1], ".", color=PALETTE["sky"], markersize=2.5)
    ax.plot(magnitudes[0], ".", color=PALETTE["vermilion"], markersize=2.5)
    step = magnitudes.max() / 127
    ax.axhline(step / 2, color=INK, linewidth=0.9)
    lost = (magnitudes[1:] < step / 2).double().mean()
    ax.text(
        x.shape[1],
        1.4e-3,
        f"{lost:.0%} of the other tokens' values\nround to zero",
        ha="right",
        bbox={"color": "white", "alpha": 0.85, "pad": 2},
    )
    log_axis(ax.yaxis)
    ax.set_ylim(1e-3, 200)
axes[1].text(20, 6.0, "first token", color=PALETTE["vermilion"], weight="bold")
axes[1].text(20, 1.05, "last token", color=PALETTE["sky"], weight="bold")
fig.supxlabel(
    f"Input of down_proj in block {helped}. The line is half a step of the 8-bit grid with one scale.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
)
plt.show()

# %% tags=["demo"]
with (
    library.rotated(model),
    replaced_weights(model, eight_bits),
    library.quantized_activations(model, a_tensor),
):
    measure("W8A8 a tensor, rotated")
x = inputs[f"layers.{worst}.mlp.down_proj"]
turned = library.hadamard_rotate(x, library.random_signs(x.shape[1])).abs()
print(
    f"\nThe one that is not rescued, block {worst}: its largest value goes from {x.abs().max():,.0f} "
    f"to {turned.max():.0f},\nand {(turned[1:] < turned.max() / 254).double().mean():.0%} of the other "
    "tokens' values still round to zero."
)

# %% [markdown]
# There is the limit: an outlier several thousand times out is still a hundred times out when spread over
# 1,536 channels. Where the scale is a token's own, nobody else suffers from it, and rotations let one go
# down to activations of *4* bits: 30.9 with, 3,156 without (a scale a token, weights as they are; same
# text, measured outside this lab).
#
# ## 2.6 Let the other weights make up for it: GPTQ
#
# Back to weights alone, with fewer bits. Rounding to nearest makes the error of each *weight* small.
# What matters is the error of the *output*, and there errors can cancel: if two inputs rise and fall
# together, one weight too high and the other too low is nearly right. With $H = X^\top X$,
#
# $$
# \lVert X \Delta W^\top \rVert^2 = \mathrm{tr}\big(\Delta W\, H\, \Delta W^\top\big).
# $$
#
# Two weights of a real layer, the grid they must go to, and the lines of equal output error:

# %% tags=["demo"]
name = f"layers.{sized(24, 1)}.mlp.gate_proj"
x, w = inputs[name], layers[name].weight
H = input_hessian(x)
size = H.diagonal().sqrt()
alike = (size[:, None] / size).log().abs() < 0.5  # only among inputs of about equal size
correlation = H / size.outer(size) * alike * (1 - torch.eye(len(H)))
pair = list(divmod(int(correlation.abs().argmax()), len(H)))
h = H[pair][:, pair]
_, scale, zero = library.quantize_per_group(w, 3, w.shape[1], symmetric=False)
two, steps, zeros = w[:, pair], scale.expand(-1, 2), zero.expand(-1, 2)
nearest = library.dequantize(library.quantize_to_grid(two, steps, zeros, 3), steps, zeros)
codes, _ = library.gptq_block(two, inverse_cholesky(h, damp=0).float(), steps, zeros, 3)
corrected = library.dequantize(codes, steps, zeros)


def loss(change):
    return ((change @ h) * change).sum(-1)


row = int((loss(two - nearest) - loss(two - corrected)).argmax())  # where it helps most
unit = float(scale[row])
rtn, best = ((v[row] - two[row]) / unit for v in (nearest, corrected))
valley = -rtn[0] * h[0, 1] / h[1, 1]  # where the second should be, with the first rounded
axis = torch.linspace(-1.75, 1.75, 200)
plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
fig, ax = figure(
    "The nearest grid point is not the best one",
    "change of the first weight (steps)",
    "change of the second weight (steps)",
    note=f"Row {row} of {name}, the weights of inputs {pair[0]} and {pair[1]} (correlation "
    f"{float(correlation[pair[0], pair[1]]):.2f}), 3 bits. Grey: the grid; lines of equal output error, each "
    "4 times the last.",
    size=(5.8, 5.0),
)
levels = [float(loss(best)) * 4.0**k for k in range(-2, 5)]
ax.contour(axis, axis, loss(plane), levels=levels, colors=RULE, linewidths=0.9)
ticks = [torch.arange(-4, 5) + float(r - r.round()) for r in rtn]
for point in torch.cartesian_prod(*ticks):
    if point.abs().max() < 1.75:
        ax.plot(*point, "o", color=GREY, markersize=3)
path = [(0, 0), (rtn[0], 0), (rtn[0], valley), tuple(best)]
for start, end in pairwise(path):
    arrow = {"arrowstyle": "-|>", "color": PALETTE["blue"], "lw": 1.3, "shrinkA": 2, "shrinkB": 2}
    ax.annotate("", end, start, arrowprops=arrow)
ax.plot(0, 0, "*", color=INK, markersize=12)
ax.annotate("the weights", (0, 0), xytext=(0, 9), textcoords="offset points", ha="center")
for point, label, color in ((rtn, "nearest", "vermilion"), (best, "GPTQ", "blue")):
    ax.plot(*point, "o", color=PALETTE[color], markersize=9)
    ax.annotate(
        f"{label}: error {float(loss(point) / loss(rtn)):.2f}",
        tuple(point.tolist()),
        xytext=(0, 11 if point[1] > 0 else -18),
        textcoords="offset points",
        color=PALETTE[color],
        weight="bold",
        ha="center",
        bbox={"color": "white", "alpha": 0.85, "pad": 1},
    )
ax.set_aspect("equal")
ax.grid(False)
plt.show()

# %% [markdown]
# Once the first weight is rounded, the best place for the second is no longer where it was: it slides
# along the valley, and only then is rounded. GPTQ does this for all columns of $W$, from left to
# right. Two pieces. First, the grid is fixed before the walk, so rounding to a *given* grid:
#
# $$
# q = \mathrm{clamp}\big(\mathrm{round}(x/s) + z,\ 0,\ 2^b - 1\big),
# \qquad \text{or without zero-point}\quad
# q = \mathrm{clamp}\big(\mathrm{round}(x/s),\ -Q,\ Q\big),\ Q = 2^{b-1} - 1.
# $$
#
# The clamp is needed now: a weight that has taken over others' errors may lie beyond the grid.

# %% tags=["exercise"]
from fewer.quantization import quantize_to_grid

# %% tags=["check"]
check(quantize_to_grid)

# %% [markdown]
# Second, the walk. How far each error must push each later column is in $U$, the upper triangle with
# $(H + \lambda I)^{-1} = U^\top U$:
#
# $$
# e_j = \frac{W_{:j} - \hat W_{:j}}{U_{jj}}, \qquad
# W_{:,j+1:} \leftarrow W_{:,j+1:} - e_j\, U_{j,j+1:}.
# $$

# %% tags=["exercise"]
from fewer.quantization import gptq_block

# %% tags=["check"]
check(gptq_block)

# %% [markdown]
# The rest of the algorithm is a loop over blocks of columns. `quantize_gptq` of the library has all of
# it; here it is once more, in short, so that we can watch. *act-order* walks the columns in the
# order of falling $H_{jj}$: the inputs that matter most are rounded first, while most weights
# are still free to make up for them.

# %% tags=["demo"]
watched = f"layers.{sized(10, 1)}.mlp.gate_proj"  # the layer to look at more closely


def gptq(w, hessian, bits, group_size, act_order=True, block=32, watch=None):
    """GPTQ of one layer: the restored weight. `watch` sees the weight after every block."""
    order = torch.arange(w.shape[1])
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    u = inverse_cholesky(hessian[order][:, order]).float()
    _, scale, zero = library.quantize_per_group(w, bits, group_size, symmetric=False)
    group = order // group_size
    scale, zero = scale.half().float()[:, group], zero[:, group]  # one for each column, walked
    w = w[:, order]
    for s in range(0, w.shape[1], block):
        e = min(s + block, w.shape[1])
        codes, errors = library.gptq_block(
            w[:, s:e], u[s:e, s:e], scale[:, s:e], zero[:, s:e], bits
        )
        w[:, s:e] = library.dequantize(codes, scale[:, s:e], zero[:, s:e])
        w[:, e:] -= errors @ u[s:e, e:]
        if watch:
            watch(e, w[:, order.argsort()])
    return w[:, order.argsort()]


nearest, seen, stored = {}, {}, {}  # what there is to compare and to draw afterwards

# %% [markdown]
# Now the model, *sequentially*: the calibration tokens walk through the blocks, each matrix is quantized
# when they reach it, and they go on through the quantized one. So each layer is fitted to the inputs
# it will really get, with the errors of all layers before it. In *one shot*, with every $H$ taken from
# the unquantized model, each layer's own error is as small, and the model is worse: 40.1 in place of
# 37.3 at 3 bits (and 41.6 in place of 40.1, 49.6 in place of 39.9 with other calibration windows;
# measured outside this lab, same text). Note the spread: what a 3-bit model is worth depends on the two
# thousand tokens it was calibrated on.
#
# Two more things are easily got wrong. The first token of a window dominates $H$, and must stay in
# it: left out, perplexity was 476 where rounding to nearest has 55. And without act-order GPTQ
# hardly beat rounding (54.0; with it 36.7, in the same run of four windows of 512 tokens).
#
# With every layer we also ask how well it does on a window of text that is not in its $H$:

# %% tags=["demo"]
n, length = sized(8, 2), sized(256, 32)
windows = calibration[: len(calibration) // length * length].view(-1, length)
chosen = torch.linspace(0, len(windows) - 1, n).long().tolist()
tokens = windows[[*chosen, len(windows) // 2]]  # the last one is not in H


def output_errors(w, x, *restored):
    y = x @ w.T
    return [float((y - x @ w_hat.T).norm() / y.norm()) for w_hat in restored]


def compress(bits, group_size):
    def one_layer(name, w, x):
        size = group_size or w.shape[1]
        fit, unseen = x[:-length], x[-length:]
        w_hat = gptq(w, input_hessian(fit), bits, size)
        if bits == 3:  # 4 bits were compared with in 2.1
            nearest[name], parts = library.round_to_nearest(w, bits, size, symmetric=False)
            stored[name] = library.stored_bytes(*parts)  # GPTQ: other codes, equally long
            seen[name] = [
                output_errors(w, part[::16], nearest[name], w_hat) for part in (fit, unseen)
            ]
            if name == watched:
                seen["watched"] = w, fit, unseen
        return w_hat

    return one_layer


with compressed_sequentially(model, tokens, compress(4, None), progress=True):
    measure("GPTQ, 4 bits a channel")
with compressed_sequentially(model, tokens, compress(3, 64), progress=True):
    measure("GPTQ, 3 bits, groups of 64")
with replaced_weights(model, lambda name, w: nearest[name]):
    measure("RTN, 3 bits, groups of 64")
sizes["3 bits, groups of 64"] = 8 * sum(stored.values()) / count
nearest.clear()

# %% [markdown]
# One layer of them, column by column. From left to right, the error jumps where a large channel (507)
# comes at a time when few columns are left to make up for it; in act-order that one was the first:

# %% tags=["demo"]
w, fit, unseen = seen["watched"]
H = input_hessian(fit)
order = H.diagonal().argsort(descending=True)
restored, _ = library.round_to_nearest(w, 3, 64, symmetric=False)
curves = {label: [] for label in ("round to nearest", "GPTQ, left to right", "GPTQ, act-order")}
for end in range(24, w.shape[1] + 1, 24):
    part = w.clone()
    part[:, order[:end]] = restored[:, order[:end]]
    curves["round to nearest"].append(
        (end, *(output_errors(w, x[::8], part)[0] for x in (fit, unseen)))
    )
for label, act_order in (("GPTQ, left to right", False), ("GPTQ, act-order", True)):

    def watch(end, now, curve=curves[label]):
        curve.append((end, *(output_errors(w, x[::8], now)[0] for x in (fit, unseen))))

    gptq(w, H, 3, 64, act_order, block=24, watch=watch)
fig, ax = figure(
    "GPTQ pays less for every column; act-order leaves no dear one to the end",
    "columns rounded so far (count)",
    "error of the output (fraction)",
    note=f"{watched}, 3 bits in groups of 64. Solid: tokens that H was computed from; dotted: tokens it has not "
    "seen. Round to nearest: in act-order as well.",
)
for label, points in curves.items():
    ends, on_fit, on_unseen = zip(*points, strict=True)
    (line,) = ax.plot(ends, on_fit)
    ax.plot(ends, on_unseen, ":", color=line.get_color(), linewidth=1.4)
    direct_label(ax, line, label)
ax.set_ylim(bottom=0)
plt.show()

# %% [markdown]
# And all of them: a dot is a matrix, below the line GPTQ wins. On tokens it was fitted to, it wins
# everywhere. On unseen ones it loses some of the widest: a row of down_proj has 1,536 weights to fit to
# 2,048 tokens, and learns them by heart.

# %% tags=["demo"]
errors = torch.tensor([seen[name] for name in layers])  # [layer, tokens, method]
fig, axes = plt.subplots(1, 2, figsize=(7.6, 4.3), sharex=True, sharey=True)
for ax, where, pairs in (
    (axes[0], "Tokens in H", errors[:, 0]),
    (axes[1], "Unseen tokens", errors[:, 1]),
):
    wins = int((pairs[:, 1] < pairs[:, 0]).sum())
    frame(
        ax,
        f"{where}: GPTQ better in {wins} of {len(pairs)}",
        "error by rounding to nearest (fraction)",
        "error by GPTQ (fraction)",
    )
    for kind, color in zip(kinds, PALETTE.values(), strict=True):
        mine = torch.tensor([name.endswith(kind) for name in layers])
        ax.plot(*pairs[mine].T, "o", color=color, markersize=3, label=kind)
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    ends = [float(errors.min()) * 0.9, float(errors.max()) * 1.1]
    ax.plot(ends, ends, color=GREY, linewidth=0.8)
axes[0].legend(frameon=False, fontsize=7, markerscale=1.4, handletextpad=0.2)
fig.supxlabel(
    "3 bits, groups of 64; every matrix with the inputs that the quantized layers before it make.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
)
plt.show()

# %% [markdown]
# ## 2.7 Side by side
#
# Everything measured above, in one figure. On the left only the weights are quantized: that saves
# memory, and time where reading the weights is what takes it. On the right weights *and* activations
# have 8 bits, so that integers can be multiplied; how activations are brought there is what the
# columns differ in.

# %% tags=["demo"]
base = results["unquantized"].value
fig, axes = plt.subplots(
    1, 2, figsize=(9.0, 4.9), sharey=True, gridspec_kw={"width_ratios": [1.15, 1]}
)
left, right = axes
frame(
    left,
    "Weights only: GPTQ saves most of a bit",
    "size (bits per weight)",
    "perplexity (per token)",
)
frame(right, "Weights and activations in 8 bits", None, "perplexity (per token)")

red, blue = PALETTE["vermilion"], PALETTE["blue"]
for label in ("3 bits, groups of 64", "4 bits a channel"):
    high, low = (results[f"{method}, {label}"].value for method in ("RTN", "GPTQ"))
    size = sizes[label]
    arrow = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 7, "shrinkB": 6, "lw": 1.2}
    left.annotate("", (size, low), (size, high), arrowprops=arrow)
    left.plot(size, high, "o", color=red, markersize=9)
    left.plot(size, low, "o", color=blue, markersize=9)
    left.text(size + 0.16, high, f"round to nearest, {label}: {high:.1f}", va="center", color=red)
    left.text(size, low * 0.965, f"GPTQ {low:.1f}", ha="center", va="top", color=blue)
size, value = sizes["8 bits a channel"], results["RTN, 8 bits a channel"].value
left.plot(size, value, "o", color=red, markersize=9)
left.text(
    size, value * 1.03, f"round to nearest,\n8 bits a channel: {value:.1f}", color=red, ha="center"
)
left.set_xlim(2.7, 9.1)

columns = {
    "as it is": ("W8A8, one scale a tensor", "vermilion", 0),
    "Smooth-\nQuant": ("W8A8 a tensor, SmoothQuant", "purple", 1),
    "rotated": ("W8A8 a tensor, rotated", "green", 2),
    "as it is ": ("W8A8, one scale a token", "vermilion", 3.6),
    "LLM.int8()": ("LLM.int8()", "amber", 4.7),
}
for name, color, place in columns.values():
    value = results[name].value
    right.vlines(place, base, value, color=PALETTE[color], linewidth=6, alpha=0.35)
    right.plot(place, value, "o", color=PALETTE[color], markersize=9)
    right.text(place, value * 1.03, f"{value:.1f}", ha="center", color=PALETTE[color])
right.set_xticks([place for _, _, place in columns.values()], columns)
right.set_xlim(-0.6, 5.4)
for x, label in ((1, "one scale for all of X"), (4.15, "one scale a token")):
    right.text(x, 0.95, label, transform=right.get_xaxis_transform(), ha="center", color=GREY)
right.axvline(2.8, color=RULE, linewidth=0.8, linestyle=(0, (2, 3)))
for ax in axes:
    ax.axhline(base, color=GREY, linewidth=1)
right.text(5.4, base * 0.985, f"unquantized {base:.1f}", ha="right", va="top", color=GREY)
log_axis(left.yaxis)
top = max(result.value for name, result in results.items() if "A4" not in name)
left.set_yticks(
    [t for t in (25, 30, 40, 50) if t < top], [f"{t}" for t in (25, 30, 40, 50) if t < top]
)
left.set_ylim(base * 0.935, top * 1.12)
largest = max(kept.values())
fig.supxlabel(
    f"SmolLM2-135M-Instruct; {results['unquantized'].tokens:,} tokens of {text.id}, context "
    f"{results['unquantized'].context}, one run each: differences of 1 or 2% mean nothing. Weights of 3 and 4 bits\n"
    f"asymmetric, of 8 bits symmetric with one scale a channel. GPTQ: act-order, {n} x {length} calibration tokens. "
    f"LLM.int8() keeps up to {largest:.0%} of a layer's\nfeatures in full precision, the others none.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
    linespacing=1.4,
)
plt.show()

# %% [markdown] tags=["written"] id="what_the_panels_say" points=5
# **Question.** (a) On the right, LLM.int8() stands a little below "one scale a token, as it is".
# Somebody concludes that it is the better method. What does the figure allow you to say, and what would
# you measure before you agree? (b) Of the two panels of dots in 2.6, which one is fair to GPTQ's
# rival, and why is the other one too kind? Does either tell you the model's perplexity? (c) Why are the
# methods drawn in two panels, although all those on the right could stand at "8 bits" on the left? Which
# of the points help when one user waits for token after token, and which when a long prompt is read?
#
# **Answer.** (a) Hardly anything. The two differ by about 1%, on 1,024 tokens of a single text, with one
# run each; another speech may turn them round. Nor is it an equal comparison: LLM.int8() keeps up to
# 39% of the features of a late down_proj in full precision, which costs time and shows nowhere in
# the figure. One would read more tokens of several texts (and compare the losses token by token, so that
# hard tokens count the same for both), and set perplexity against the measured time. (b) The one with
# unseen tokens. GPTQ chose its codes to make the error small on exactly the tokens in H; that is a
# training error, while rounding to nearest has never seen them. Neither tells the perplexity: an
# output error weighs every direction of the output alike, the layers' errors add up or cancel on
# the way, and calibrated in one shot the model is worse with errors that look just as good. (c) Because
# something else is quantized. On the left the multiplication stays in floating point, and what
# is saved is bytes read: it helps where reading the weights takes the time, as it does for one user's
# next token; the fewer bits, the better. On the right the weights have the 8 bits of the last point on
# the left, and the same help; quantized activations add integer multiplication, which pays where
# arithmetic takes the time, as in a long prompt or a large batch. On one axis all would be one heap
# above 8, and what differs between them would have no axis.
#
# **Rubric.** 1 point: the difference is too small for one text of 1,024 tokens and one run. 1 point: unequal
# cost, the features kept in full precision. 1 point: unseen tokens, the other panel is a training
# error. 1 point: a layer's output error is not perplexity, with a reason. 1 point: weights alone save
# reading (next token), activations in 8 bits buy integer arithmetic (long prompt, large batch).
