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
# # Lab 1. Quantization of a tensor
#
# A language model is a few hundred matrices of numbers. To write a token it reads all of them from
# memory once, so **fewer bits a number is fewer seconds a token**. This lab takes one tensor apart:
# what its bits mean, how to keep it in 4 of them, what that costs, and how to measure the cost
# honestly. At the end you quantize every matrix of a real language model and draw the curve that
# the field lives by: quality against size.
#
# Each exercise is *picture → equation → your code → check*. Fill in a function, run its cell, run
# the check below it. A failed check shows you the smallest input it found that goes wrong. You may
# check as often as you like, and a mistake in one exercise never costs another.
#
# The model is SmolLM2-135M-Instruct. It comes from a file in which its weights are *already* kept
# in 4 bits (groups of 32, a scale and a float minimum each). We use them as ordinary floats and
# quantize with other grids; the last section comes back to what this means.

# %%
from autograder import check

# %% tags=["demo"]
import matplotlib.pyplot as plt
import torch

import fewer.quantization as library
from fewer.data import calibration_text, evaluation_text
from fewer.evaluate import perplexity
from fewer.models import linear_layers, load_smollm2, replaced_weights
from fewer.plots import GREY, PALETTE, direct_label, figure, frame, log_axis, style
from fewer.sizes import sized

style()
model, tokenizer = load_smollm2()
layers = linear_layers(model)
count = sum(layer.weight.numel() for layer in layers.values())
print(
    f"{len(layers)} matrices, {count / 1e6:.0f} million weights, {count * 2 / 1e6:.0f} MB in bf16"
)

# %% [markdown]
# ## 1.1 What the bits of a float mean
#
# A float is a sign, an exponent and a mantissa, packed side by side. Fewer exponent bits give less
# range, fewer mantissa bits less precision. Here is how the formats of deep learning keep $\pi$:

# %% tags=["demo"]
print(library.how_stored(3.14159265))

# %% [markdown]
# And these are *all* the positive numbers that the small formats can hold, up to 8. Integers are
# evenly spaced; floats crowd around zero, where most weights are.

# %% tags=["demo"]
fig, ax = figure(
    "Every positive value of the small formats, up to 8",
    "value (without unit)",
    None,
    note="Integers with scale 1; floats from decode_minifloat applied to every code.",
    size=(6.4, 2.9),
)
rows = {"int4": torch.arange(8.0)}
for name in ("fp4_e2m1", "fp6_e3m2", "fp6_e2m3", "fp8_e4m3"):
    form = library.FORMATS[name]
    every_code = torch.arange(2 ** (1 + form.exponent_bits + form.mantissa_bits))
    decoded = library.decode_minifloat(every_code, *form)
    rows[name] = decoded[(decoded >= 0) & (decoded <= 8)]
for height, numbers in enumerate(reversed(rows.values())):
    color = list(PALETTE.values())[height]
    ax.vlines(numbers, height - 0.32, height + 0.32, color=color, linewidth=1.1)
ax.set_yticks(range(len(rows)), reversed(rows))
ax.grid(False)
plt.show()

# %% [markdown]
# With exponent bits $E$, mantissa bits $M$ and bias $b = 2^{E-1} - 1$, a code with sign $s$,
# exponent $e$ and mantissa $m$ stands for
#
# $$
# (-1)^s \, 2^{e-b} \, (1 + m/2^M) \quad (e > 0), \qquad
# (-1)^s \, 2^{1-b} \, (m/2^M) \quad (e = 0).
# $$
#
# The second form, *subnormal* numbers, fills the gap between zero and the smallest normal number.

# %% tags=["exercise"]
from fewer.quantization import decode_minifloat

# %% tags=["check"]
check(decode_minifloat)

# %% [markdown]
# ## 1.2 Symmetric quantization
#
# Integers are cheaper than floats, and one float beside them brings the size back: keep small
# whole numbers $q$ (*codes*) and a *scale* $s$, and read $\hat x = s\,q$. The scale must stretch the
# grid over the largest magnitude, so a single large weight widens every step:

# %% tags=["demo"]
weight = layers["layers.10.self_attn.q_proj"].weight
row = int((weight.abs().amax(1) / weight.std(1)).argmax())  # the row with the worst outlier
fig, axes = plt.subplots(2, 1, figsize=(6.4, 4.4), sharex=True)
for ax, bits in zip(axes, (3, 4), strict=True):
    codes, scale = library.quantize_symmetric(weight[row], bits)
    frame(
        ax,
        f"{bits} bits: {len(codes.unique())} of {2**bits - 1} codes in use",
        "weight (without unit)" if bits == 4 else None,
        "weights (count)",
    )
    grid = scale * torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
    ax.hist(weight[row].numpy(), bins=80, color=PALETTE["sky"])
    ax.vlines(grid, *ax.get_ylim(), color=PALETTE["vermilion"], linewidth=0.8)
axes[1].tick_params(axis="x", length=3)
fig.supxlabel(
    f"Row {row} of layers.10.self_attn.q_proj; the red lines are the grid.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
)
plt.show()

# %% [markdown]
# With $b$ bits the largest code is $Q = 2^{b-1} - 1$, and
#
# $$
# s = \frac{\max |x|}{Q}, \qquad q = \mathrm{round}\!\left(\frac{x}{s}\right) \in [-Q, Q].
# $$
#
# `dim` says who shares a scale: nobody else (`None`: the whole tensor has one), or each slice for
# itself (`dim=-1` of a weight $[out, in]$: one scale for each output channel).

# %% tags=["exercise"]
from fewer.quantization import quantize_symmetric

# %% tags=["check"]
check(quantize_symmetric)

# %% [markdown]
# ## 1.3 Asymmetric quantization
#
# After an activation function the numbers are no longer centred. Symmetric codes then waste nearly
# half of the grid on values that never come:

# %% tags=["demo"]
ids = torch.tensor(tokenizer.encode(calibration_text().text[:20_000]).ids)
inputs = {}  # what each layer reads, for a stretch of the calibration text


def remember(name):
    def hook(layer, args):
        inputs[name] = args[0][0].detach()

    return hook


hooks = [layer.register_forward_pre_hook(remember(name)) for name, layer in layers.items()]
with torch.no_grad():
    model(ids[None, : sized(256, 32)])
for hook in hooks:
    hook.remove()

gate = layers["layers.10.mlp.gate_proj"]
with torch.no_grad():
    activated = torch.nn.functional.silu(gate(inputs["layers.10.mlp.gate_proj"]))
fig, axes = plt.subplots(2, 1, figsize=(6.4, 4.4), sharex=True)
_, scale = library.quantize_symmetric(activated, 4)
symmetric_grid = scale * torch.arange(-7, 8)
_, scale, zero_point = library.quantize_asymmetric(activated, 4)
asymmetric_grid = scale * (torch.arange(16) - zero_point)
for ax, title, grid in (
    (axes[0], "Symmetric, 4 bits: seven codes wait for values that never come", symmetric_grid),
    (axes[1], "Asymmetric, 4 bits: the grid is where the values are", asymmetric_grid),
):
    frame(ax, title, "SiLU(gate) (without unit)" if ax is axes[1] else None, "values (count)")
    ax.hist(activated.flatten().numpy(), bins=200, color=PALETTE["sky"])
    ax.set_yscale("log")
    ax.vlines(grid, *ax.get_ylim(), color=PALETTE["vermilion"], linewidth=0.8)
axes[1].tick_params(axis="x", length=3)
plt.show()

# %% [markdown]
# So let the grid begin where the values begin. With $Q = 2^b - 1$ and the range widened to contain
# zero, $lo = \min(\min x, 0)$ and $hi = \max(\max x, 0)$:
#
# $$
# s = \frac{hi - lo}{Q}, \qquad z = \mathrm{round}(-lo / s), \qquad
# q = \mathrm{clamp}\big(\mathrm{round}(x / s) + z,\ 0,\ Q\big), \qquad \hat x = s\,(q - z).
# $$
#
# The *zero-point* $z$ is the code that stands for zero. It is a whole number, so zero comes back as
# exactly zero.

# %% tags=["exercise"]
from fewer.quantization import quantize_asymmetric

# %% tags=["check"]
check(quantize_asymmetric)

# %% [markdown]
# ## 1.4 How much was lost?
#
# An error of 0.01 is nothing for a weight of 10 and everything for one of 0.01. The
# *signal-to-quantization-noise ratio* compares the power of the numbers with the power of the error,
# in decibels:
#
# $$
# \mathrm{SQNR} = 10 \log_{10} \frac{\sum x^2}{\sum (x - \hat x)^2}.
# $$
#
# One bit more halves the step, quarters the power of the error, and is worth $20 \log_{10} 2 = 6.02$
# dB: every curve below has that slope. What differs is where a curve starts, and the largest value
# decides that.

# %% tags=["exercise"]
from fewer.quantization import sqnr

# %% tags=["check"]
check(sqnr)

# %% tags=["demo"]
generator = torch.Generator().manual_seed(0)
tensors = {
    "uniform noise": torch.rand(4096, generator=generator) * 2 - 1,
    "normal noise": torch.randn(4096, generator=generator),
    "a weight (q_proj)": layers["layers.10.self_attn.q_proj"].weight,
    "an input (down_proj)": inputs["layers.10.mlp.down_proj"],
}
widths = list(range(2, 9))
fig, ax = figure(
    "A bit is worth 6 dB; an outlier costs many",
    "code width (bits)",
    "SQNR (dB)",
    note="Symmetric quantization, one scale for the whole tensor. Weight and input: layer 10.",
)
for name, x in tensors.items():
    quality = [
        library.sqnr(x, library.dequantize(*library.quantize_symmetric(x, b))) for b in widths
    ]
    (line,) = ax.plot(widths, quality, marker="o")
    direct_label(ax, line, name)
plt.show()

# %% [markdown]
# ## 1.5 Who shares a scale?
#
# If an outlier widens the step of everybody who shares its scale, let fewer share one: a scale for
# each output channel, or for each *group* of $g$ consecutive weights of a row,
#
# $$
# \hat W_{i,\,jg:(j+1)g} = s_{ij} \, q_{i,\,jg:(j+1)g}.
# $$
#
# The price is the scales themselves: a 16-bit scale for $g$ weights is $16/g$ bits a weight more.
# Where $g$ does not divide the row, the last group is shorter.

# %% tags=["exercise"]
from fewer.quantization import quantize_per_group

# %% tags=["check"]
check(quantize_per_group)

# %% tags=["demo"]
weight = layers["layers.10.self_attn.q_proj"].weight


def stored(codes, scale, bits):
    """What comes back from codes and float16 scales, and the true bits a weight."""
    packed, scale16 = library.pack_codes(codes, bits), scale.half()
    return scale16.float(), library.bits_per_weight(codes.numel(), packed, scale16)


fig, ax = figure(
    "Sharing a scale with fewer weights buys quality for little memory",
    "size (bits per weight)",
    "SQNR (dB)",
    note="layers.10.self_attn.q_proj, 4-bit symmetric codes, float16 scales, all bytes counted.",
)
for name, dim in (("one scale for all", None), ("one a row", -1)):
    codes, scale = library.quantize_symmetric(weight, 4, dim)
    scale, size = stored(codes, scale, 4)
    ax.plot(
        size,
        library.sqnr(weight, library.dequantize(codes, scale)),
        "o",
        color=PALETTE["vermilion"],
    )
    direct_label(ax, (size, library.sqnr(weight, library.dequantize(codes, scale))), name)
sizes, quality, group_sizes = [], [], (256, 128, 64, 32, 16)
for g in group_sizes:
    codes, scale, _ = library.quantize_per_group(weight, 4, g)
    scale, size = stored(codes, scale, 4)
    sizes.append(size)
    quality.append(library.sqnr(weight, library.dequantize_per_group(codes, scale, group_size=g)))
(line,) = ax.plot(sizes, quality, marker="o", color=PALETTE["blue"])
direct_label(ax, line, "groups of 16")
for g, x, y in zip(group_sizes[:-1], sizes, quality, strict=False):
    ax.annotate(f"{g}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center", color=GREY)
plt.show()

# %% [markdown]
# ## 1.6 Clipping
#
# Must the grid reach the largest value? If it stops at a threshold $\alpha$, values beyond it are
# *clipped* to $\pm\alpha$ and lose much, but all the others get a finer step. With few bits that is
# a good bargain:

# %% tags=["demo"]
weight = layers["layers.10.mlp.down_proj"].weight
sample = weight.flatten()[:: sized(8, 64)]
fractions = torch.linspace(0.05, 1, sized(40, 10)).tolist()
fig, ax = figure(
    "The fewer the bits, the more it pays to clip",
    "threshold α (fraction of the largest magnitude)",
    "noise (dB below the signal)",
    note="layers.10.mlp.down_proj, every 8th weight. Filled: least MSE. Ring: least KL divergence.",
)
for bits in (2, 3, 4, 6, 8):
    noise = [
        -library.sqnr(
            sample,
            library.dequantize(
                *library.quantize_symmetric(sample, bits, clip=f * sample.abs().max())
            ),
        )
        for f in fractions
    ]
    (line,) = ax.plot(fractions, noise)
    direct_label(ax, line, f"{bits} bits")
    for find, style_of_dot in (
        (library.clip_by_mse, {"markersize": 6}),
        (library.clip_by_entropy, {"markersize": 8, "fillstyle": "none"}),
    ):
        alpha = find(sample, bits)
        at = -library.sqnr(
            sample, library.dequantize(*library.quantize_symmetric(sample, bits, clip=alpha))
        )
        place = alpha / sample.abs().max()
        ax.plot(place, at, "o", color=line.get_color(), **style_of_dot)
plt.show()

# %% [markdown]
# The simplest way to find a good threshold is to try many and keep the best:
#
# $$
# \alpha^* = \operatorname*{arg\,min}_{\alpha_k = \max|x| \cdot k / K,\; k = 1 \dots K}
# \ \sum (x - \hat x(\alpha_k))^2 .
# $$
#
# (TensorRT keeps, in place of the least squared error, the least Kullback-Leibler divergence between
# the histograms before and after; the library has that one too, as `clip_by_entropy`.)

# %% tags=["exercise"]
from fewer.quantization import clip_by_mse

# %% tags=["check"]
check(clip_by_mse)

# %% [markdown]
# ## 1.7 Multiplying integers
#
# Codes are not only smaller, they also multiply faster. A scale can leave the sum of a matrix
# product as long as it does not depend on the index that is summed over:
#
# $$
# Y_{to} = \sum_i \big(s^x_t q^x_{ti}\big)\big(s^w_o q^w_{oi}\big)
#        = s^x_t \, s^w_o \underbrace{\sum_i q^x_{ti} \, q^w_{oi}}_{\text{int8} \times \text{int8}
#          \to \text{int32}}
# $$
#
# So a weight may have a scale for each output channel and an activation one for each token. That
# matters, because some tokens are hundreds of times larger than the rest. When they share one scale
# with all the others, nothing is left of those:

# %% tags=["exercise"]
from fewer.quantization import matmul_int8

# %% tags=["check"]
check(matmul_int8)

# %% tags=["demo"]
per_tensor, per_token, largest = [], [], []
for i in range(model.config.n_layers):
    x, w = inputs[f"layers.{i}.mlp.down_proj"], layers[f"layers.{i}.mlp.down_proj"].weight
    exact = x @ w.T
    w_codes, w_scale = library.quantize_symmetric(w, dim=-1)
    for dim, errors in ((None, per_tensor), (-1, per_token)):
        y = library.matmul_int8(*library.quantize_symmetric(x, dim=dim), w_codes, w_scale)
        errors.append(float((y - exact)[1:].norm() / exact[1:].norm()))
    largest.append(float(x.abs().max() / x.abs().median()))
fig, ax = figure(
    "One scale a token saves the other tokens",
    "layer (index)",
    "error of the output, first token aside (fraction)",
    note=f"down_proj in every layer: 8-bit weights a channel, 8-bit inputs; {len(x)} tokens of "
    f"{calibration_text().id[:22]}... The largest input is {max(largest):,.0f} times the median.",
)
for name, errors in (("per tensor", per_tensor), ("per token", per_token)):
    (line,) = ax.plot(errors, marker="o", markersize=3)
    direct_label(ax, line, name)
log_axis(ax.yaxis)
plt.show()

# %% [markdown]
# ## 1.8 Real bytes
#
# A tensor of int8 that holds 3-bit codes still takes 8 bits a weight. To save memory, codes must be
# *packed*: laid one after the other into a stream of bits, which is cut into bytes.

# %% tags=["demo"]
fig, ax = plt.subplots(figsize=(6.4, 2.1))
example = [5, 2, 7, 0, 3, 6, 1, 4]
for i, code in enumerate(example):
    for j in range(3):
        t = 3 * i + j
        ax.barh(0, 1, left=t, height=0.9, color=list(PALETTE.values())[i % 6], edgecolor="white")
        ax.text(t + 0.5, 0, str(code >> j & 1), ha="center", va="center", color="white", fontsize=8)
    ax.text(3 * i + 1.5, 0.62, f"code {i} = {code}", ha="center", va="bottom", fontsize=7)
packed = library.pack_codes(torch.tensor(example), 3).tolist()
for k, byte in enumerate(packed):
    ax.annotate(
        "", (8 * k, -0.6), (8 * k + 8, -0.6), arrowprops={"arrowstyle": "|-|", "color": GREY}
    )
    ax.text(8 * k + 4, -0.8, f"byte {k} = {byte}", ha="center", va="top", fontsize=8, color=GREY)
ax.set(xlim=(0, 24), ylim=(-1.3, 1), xticks=[], yticks=[])
ax.set_title("Eight 3-bit codes in three bytes, lowest bit first", loc="left")
ax.spines[:].set_visible(False)
ax.grid(False)
plt.show()

# %% tags=["exercise"]
from fewer.quantization import pack_codes

# %% tags=["check"]
check(pack_codes)

# %% [markdown]
# ## 1.9 A whole language model
#
# Everything together: each of the 210 matrices of SmolLM2 is quantized, packed, counted to the last
# byte, and unpacked again; then the model reads a speech it was never calibrated on, and we note its
# *perplexity*: how many words, so to speak, it hesitates between. Lower is better.

# %% tags=["demo"]
BITS = sized((3, 4, 6, 8), (4, 8))
text = evaluation_text()
tokens = torch.tensor(tokenizer.encode(text.text[:20_000]).ids)[: sized(768, 64) + 1]
GROUP = 64


def quantized(weight, bits, who, symmetric):
    """The weight after a round trip through packed bytes, and the number of those bytes."""
    if who == "group":
        codes, scale, zero_point = library.quantize_per_group(weight, bits, GROUP, symmetric)
    elif symmetric:
        codes, scale = library.quantize_symmetric(weight, bits, -1 if who == "channel" else None)
        zero_point = None
    else:
        codes, scale, zero_point = library.quantize_asymmetric(
            weight, bits, -1 if who == "channel" else None
        )
    scale = scale.half()  # as it is stored, so as it must be used
    kept = [library.pack_codes(codes, bits), scale]
    if zero_point is not None:
        kept.append(library.pack_codes(zero_point.reshape(1, -1), bits))
    if who == "group":
        back = library.dequantize_per_group(codes, scale, zero_point, group_size=GROUP)
    else:
        back = library.dequantize(codes, scale, zero_point)
    return back, library.stored_bytes(*kept)


def measure(bits, who, symmetric):
    """Bits a weight and perplexity of the model under one scheme."""
    total = 0

    def transform(name, weight):
        nonlocal total
        back, size = quantized(weight, bits, who, symmetric)
        total += size
        return back

    with replaced_weights(model, transform):
        result = perplexity(model, tokens, text_id=text.id, context=256)
    return 8 * total / count, result


baseline = perplexity(model, tokens, text_id=text.id, context=256)
curves = {}
for who in ("tensor", "channel", "group"):
    for symmetric in (True, False):
        curves[who, symmetric] = [measure(bits, who, symmetric) for bits in BITS]
        line = [f"{size:5.2f} bits: {result.value:8.4g}" for size, result in curves[who, symmetric]]
        print(f"{who:8} {'symmetric' if symmetric else 'asymmetric':11}", "   ".join(line))

# %% tags=["demo"]
fig, ax = figure(
    "Who shares a scale decides what four bits are worth",
    "size of the linear layers (bits per weight, scales and zero-points included)",
    "perplexity (per token)",
    note=f"SmolLM2-135M-Instruct; unquantized {baseline}. Its weights come from a 4-bit file (groups "
    "of 32 with a float minimum), so 16 bits is what they are used in, not what they know. Above 10k is drawn at 10k.",
    size=(7.2, 4.6),
)
names = {"tensor": "one scale a tensor", "channel": "one a channel", "group": f"groups of {GROUP}"}
colors = {"tensor": "vermilion", "channel": "blue", "group": "green"}
for (who, symmetric), points in curves.items():
    sizes = [size for size, _ in points]
    values = [min(result.value, 1e4) for _, result in points]
    ax.plot(
        sizes,
        values,
        marker="o" if symmetric else "s",
        linestyle="-" if symmetric else "--",
        color=PALETTE[colors[who]],
        fillstyle="full" if symmetric else "none",
    )
    if who != "tensor" or symmetric:  # the two of a tensor begin at the same place
        kind = "" if who == "tensor" else ", symmetric" if symmetric else ", asymmetric"
        ax.annotate(
            names[who] + kind,
            (sizes[0], values[0]),
            xytext=(-9, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=PALETTE[colors[who]],
        )
ax.set_xlim(left=min(BITS) - 1.9)
ax.axhline(baseline.value, color=GREY, linewidth=0.8)
log_axis(ax.yaxis)
plt.show()

# %% [markdown] tags=["written"] id="what_is_four_bit" points=4
# **Question.** A model card says "4-bit". (a) How many bits a weight does the model really take with
# groups of 64, 4-bit symmetric codes and float16 scales? And with asymmetric codes whose zero-points
# are packed into 4 bits as well? (b) In the last figure, groups of 64 at 4 bits beat one scale a
# channel at 4 bits. Is that a fair comparison, and what would be one? (c) Why is SmolLM2, loaded from
# *this* file, a kinder test for groups of 32 asymmetric 4-bit codes than a model trained in bf16?
#
# **Answer.** (a) 4 + 16/64 = 4.25 bits; with zero-points 4 + 16/64 + 4/64 = 4.3125 bits.
# (b) Not quite: the groups are given 0.25 bits more. A fair comparison is at equal size, so one reads
# the figure along a vertical line, or compares with what one scale a channel reaches at 4.25 bits
# (between its points at 4 and 6 bits). The groups win that one too. (c) Its weights already lie on
# 16 levels in each group of 32. A quantizer with the same groups, and a minimum as fine as that of
# the file, can reproduce those levels almost without loss, while weights trained in bf16 lie
# anywhere between them. The result would say more about the file than about the method.
#
# **Rubric.** 1 point: 4.25 with the scale counted. 1 point: 4.3125, the zero-points counted as packed.
# 1 point: names the unequal size and compares at equal bits a weight. 1 point: sees that the
# weights are already on such a grid, and that this flatters a matching quantizer.
