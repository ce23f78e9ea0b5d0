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
# # Lab 10. Speculative decoding
#
# A language model writes one token a call, and for each call reads all of its weights from memory. It
# could as well have looked at ten tokens meanwhile: the arithmetic hardly counts. But which ten? Those
# that are to come are not known yet. So let somebody **guess** them, cheaply; let the model judge all
# guesses in *one* call; keep those it would have said itself. Nothing is lost if the guesses are bad,
# and not a word of the text changes. The surprise of this lab is that this holds for *sampling* too:
# what comes out has exactly the model's distribution, whoever guesses.
#
# Each exercise is *picture → equation → your code → check*. Fill in a function, run its cell, run
# the check below it. You may check as often as you like, and a mistake in one exercise never costs
# another.
#
# The model is SmolLM2 (135 million weights, float32). A *call* is one forward pass; a *draft* is
# what guesses, and also what it guessed. All times are of your machine, now.

# %%
from autograder import check

# %% tags=["demo"]
import time
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import fewer.inference as library
from fewer.data import calibration_text
from fewer.inference.ragged import HOLE, RaggedCache, ragged_rows
from fewer.models import (
    KVCache,
    chat_prompt,
    load_smollm2,
    replaced_weights,
    stream,
    tiny_llama,
    token_probabilities,
)
from fewer.plots import GREY, INK, PALETTE, RULE, direct_label, figure, frame, log_axis, style
from fewer.quantization import round_to_nearest
from fewer.sizes import sized

style()
model, tokenizer = load_smollm2()
LAYERS, VOCAB = model.config.n_layers, model.config.vocab_size
WEIGHTS = sum(p.numel() for p in model.parameters())

# %% [markdown]
# ## 10.1 A call waits for its weights
#
# How long does a call take that reads 1 token, 2, 4, ... at once, after 64 others?

# %% tags=["demo"]
NEW_AT_ONCE = sized((1, 2, 3, 5, 9, 17, 33, 65), (1, 9))
seconds_of = {}
for n in NEW_AT_ONCE[::-1]:  # more tokens never take less time: where they seem to, it is noise
    seconds = library.measure_forward(model, past=64, new=n, repeats=sized(5, 1))
    seconds_of = {n: min([seconds, *seconds_of.values()]), **seconds_of}


def call_time(n):
    """The time of a call on n tokens, in calls on one; between measured ones a straight line."""
    return float(np.interp(n, list(seconds_of), list(seconds_of.values())) / seconds_of[1])


LAST = NEW_AT_ONCE[-1]
fig, ax = figure(
    f"Nine tokens at once take {call_time(9):.1f} times as long as one",
    "tokens read in one call (count)",
    "time of the call (calls on one token)",
    note=f"SmolLM2 in float32, {torch.get_num_threads()} threads, 64 tokens in the cache, the fastest of some runs. "
    f"One token: {1000 * seconds_of[1]:.0f} ms for {4 * WEIGHTS / 1e6:.0f} MB of weights, {4 * WEIGHTS / seconds_of[1] / 1e9:.1f} GB/s.",
)
(one_by_one,) = ax.plot([1, LAST], [1, LAST], color=GREY, linestyle=":")
(free,) = ax.plot([1, LAST], [1, 1], color=GREY, linestyle="--")
(at_once,) = ax.plot(NEW_AT_ONCE, [call_time(n) for n in NEW_AT_ONCE], marker="o")
direct_label(ax, one_by_one, "one by one")
direct_label(ax, at_once, "measured")
direct_label(ax, free, "if all were free")
log_axis(ax.xaxis)
log_axis(ax.yaxis)
plt.show()

# %% [markdown]
# The dashed line is what a GPU does up to dozens of tokens: it waits for the weights, whatever it
# computes meanwhile. A CPU has less arithmetic to spare for each byte: further tokens are *cheap* here, not
# free. Everything below uses this measured curve.
#
# ## 10.2 One token, two distributions
#
# To see what can be won we need texts. The model continues four prompts, token by token, likeliest token
# first (*greedy*), as in every lab so far. These are the texts to get faster, and the times to beat.

# %% tags=["demo"]
NEW = sized(40, 5)
QUOTE = (
    "Little more than 100 weeks ago I assumed the office of President of the United States. In "
    "seeking the help of the Congress and our countrymen, I pledged no easy answers. I pledged--and "
    "asked--only toil and dedication. These the Congress and the people have given in good measure."
)
CODE = """class Vector:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def add(self, other):
        return Vector(self.x + other.x, self.y + other.y)

    def subtract(self, other):
"""


def ask(question):
    return chat_prompt([{"role": "user", "content": question}])


PROMPTS = {
    "rewriting": ask(f"Repeat this text word by word, but write numbers as words.\n\n{QUOTE}"),
    "code": CODE,
    "list": ask("Write a shopping list for a party, with quantities."),
    "answer": ask("Why does bread rise?"),
}
KINDS = list(PROMPTS)[: sized(4, 2)]
prompts = {kind: torch.tensor(tokenizer.encode(PROMPTS[kind]).ids) for kind in KINDS}


def timed(calls):
    """What each call of a run gives, and its time in seconds."""
    given, times, begin = [], [], time.perf_counter()
    for one in calls:
        given.append(one)
        times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return given, times


plain, texts = {}, {}
for kind in KINDS:
    said, plain[kind] = timed(stream(model, prompts[kind][None], NEW))
    texts[kind] = torch.cat([prompts[kind], *said])
    speed = (NEW - 1) / sum(plain[kind][1:])  # the first call reads the prompt
    answer = tokenizer.decode(texts[kind][len(prompts[kind]) :].tolist())
    print(f"--- {kind}, {speed:.1f} tokens/s\n{answer}\n")

# %% [markdown]
# Now two readers of the same text: the model, whose distribution of the next token is $p$, and something
# cheaper, whose distribution is $q$. Here the cheaper one is the same model left early, after 27 of its 30 layers. Both read
# all texts; the picture shows a place in the last one where they agree by half or so.

# %% tags=["demo"]
DEPTHS = sized((3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29), (27,))


@torch.no_grad()
def read_at_all_depths(kind):
    """Logits of each new token after some layers, and after all: {layers: [new, vocab]}."""
    text, first = texts[kind][:-1], len(prompts[kind]) - 1
    x, cache, states = model.embed_tokens(text[None]), KVCache(), {}
    for i, block in enumerate(model.layers):
        x = block(x, torch.arange(len(text)), cache)
        if i + 1 in (*DEPTHS, LAYERS):
            states[i + 1] = model.norm(x)[0, first:]
    return states


hidden = {kind: read_at_all_depths(kind) for kind in KINDS}


def distributions(kind, layers):
    """What is said to follow each token of a text, after some of the layers."""
    with torch.no_grad():
        return model.logits(hidden[kind][layers]).softmax(-1)


def word(token):
    return repr(tokenizer.decode([int(token)]))[1:-1].replace(" ", "␣")


SHOWN = KINDS[-1]
p_all, q_all = distributions(SHOWN, LAYERS), distributions(SHOWN, 27)
overlap = library.acceptance_rate(p_all, q_all)
place = int((overlap - 0.55).abs().argmin())
p, q = p_all[place], q_all[place]
top = (p + q).topk(8).indices
fig, ax = figure(
    f"They have {100 * overlap[place]:.0f}% in common",
    "probability of the next token (fraction)",
    None,
    note="“…"
    + tokenizer.decode(
        texts[SHOWN][
            len(prompts[SHOWN]) + place - min(place, 10) : len(prompts[SHOWN]) + place
        ].tolist()
    ).replace("\n", " ")
    + "” and then? p: SmolLM2. q: the same model after 27 of its 30 layers. The likeliest 8 tokens; what is in common is summed over all.",
    size=(6.4, 3.8),
)
rows = np.arange(len(top))
ax.barh(rows - 0.2, p[top], height=0.36, color=PALETTE["blue"])
ax.barh(rows + 0.2, q[top], height=0.36, color=PALETTE["vermilion"])
ax.barh(
    rows,
    torch.minimum(p, q)[top],
    height=0.76,
    color=PALETTE["green"],
    alpha=0.85,
    hatch="//",
    ec="white",
)
ax.set_yticks(rows, [word(token) for token in top])
ax.invert_yaxis()
ax.grid(False)
for height, (name, color) in enumerate(
    (("p, the model", "blue"), ("q, the draft", "vermilion"), ("min(p, q)", "green"))
):
    ax.text(
        0.97, 0.3 - 0.08 * height, name, color=PALETTE[color], transform=ax.transAxes, ha="right"
    )
plt.show()

# %% [markdown]
# The draft draws a token $x$ from $q$. Where $q(x)$ is above $p(x)$ (red beyond the green), it says $x$
# *too often*; to be right, some of these must be turned down. Accept $x$ with probability
#
# $$
# \min\!\left(1, \frac{p(x)}{q(x)}\right) ,
# $$
#
# and $x$ is drawn *and* accepted with probability $q(x) \min(1, p(x)/q(x)) = \min(p(x), q(x))$: the green part. A token that
# the model never says must never be accepted, even where both probabilities are 0.

# %% tags=["exercise"]
from fewer.inference import acceptance_probability

# %% tags=["check"]
check(acceptance_probability)

# %% [markdown]
# Summed over all tokens, the green part is the *acceptance rate* $a = \sum_x \min(p(x), q(x))$: how often a guess
# survives.
#
# ## 10.3 After a rejection
#
# So far every token comes out with probability $\min(p, q)$: never too often, but the blue beyond the green is
# missing. And all of what is missing adds up to $1 - a$, which is exactly how often we reject and have nothing to say yet.

# %% tags=["demo"]
fig, ax = figure(
    f"What is missing adds up to {100 * (1 - overlap[place]):.0f}%, as often as we reject",
    "probability of the next token (fraction)",
    None,
    note="The same place. Only tokens that the draft says too seldom are in the residual.",
    size=(6.4, 3.6),
)
common = torch.minimum(p, q)
missing = (1 - overlap[place]) * library.residual_distribution(p, q)
ax.barh(rows, common[top], height=0.6, color=PALETTE["green"])
ax.barh(rows, missing[top], left=common[top], height=0.6, color=PALETTE["sky"])
ax.plot(p[top], rows, "|", color=INK, markersize=17, mew=2)
ax.set_yticks(rows, [word(token) for token in top])
ax.invert_yaxis()
ax.grid(False)
for height, (name, color) in enumerate(
    (
        ("accepted: min(p, q)", PALETTE["green"]),
        ("after a rejection: max(0, p − q)", PALETTE["sky"]),
        ("| p, the model", INK),
    )
):
    ax.text(0.97, 0.3 - 0.09 * height, name, color=color, transform=ax.transAxes, ha="right")
plt.show()

# %% [markdown]
# After a rejection draw from what is missing, normalised:
#
# $$
# \mathrm{residual}(x) = \frac{\max(0, p(x) - q(x))}{\sum_y \max(0, p(y) - q(y))} ,
# $$
#
# and $\min(p, q) + (1 - a) \cdot \mathrm{residual} = p$. If $p = q$ nothing is ever rejected; let it be $p$ then.

# %% tags=["exercise"]
from fewer.inference import residual_distribution

# %% tags=["check"]
check(residual_distribution)

# %% [markdown]
# ## 10.4 Judge a whole draft
#
# Now $k$ tokens in a row, each drawn by the draft after its own earlier ones. One call of the model on all of
# them gives $k + 1$ distributions: before each of the tokens, and after the last. Each token has its acceptance probability (bar) and
# a random number $u$ (dot). The first dot above its bar ends it.

# %% tags=["demo"]
K = sized(6, 2)
listed = sized("list", KINDS[-1])
text = texts[listed][: len(prompts[listed]) + sized(22, 2)]
early = library.early_exit(model, 27)
draft = library.ModelDraft(early, length=K, temperature=1.0)
drafted, q_draft = draft(text, torch.Generator().manual_seed(1))
with torch.no_grad():
    judged = model.hidden(torch.cat([text, drafted])[None])[0, len(text) - 1 :]
    p_model = token_probabilities(model.logits(judged))
u = torch.rand(K, generator=torch.Generator().manual_seed(5))
bars = library.acceptance_probability(p_model[:-1], q_draft, drafted)
accepted, following = library.verify_draft(p_model, q_draft, drafted, u)
fig, ax = figure(
    f"{accepted} of {K} are accepted, then one is drawn from {'p' if accepted == K else 'the residual'}",
    "drafted tokens (in order)",
    "probability of acceptance, and u (fraction)",
    note=f"“…{tokenizer.decode(text[-10:].tolist())}” and then, drawn by the first 27 layers at temperature 1.".replace(
        "\n", " "
    ),
    size=(6.4, 3.4),
)
for i in range(K):
    color = "green" if i < accepted else "vermilion"
    ax.bar(i, bars[i], color=PALETTE[color], alpha=0.85 if i <= accepted else 0.25)
    ax.plot(i, u[i], "o", color=INK, alpha=1 if i <= accepted else 0.25, markersize=7)
ax.set_xticks(range(K), [word(token) for token in drafted])
ax.set_ylim(0, 1.05)
plt.show()

# %% [markdown]
# Count the tokens before the first that is rejected, and say what the next is to be drawn from: the residual
# *there*; or, if all are accepted, the last of the $k + 1$ distributions, which is a token for free.

# %% tags=["exercise"]
from fewer.inference import verify_draft

# %% tags=["check"]
check(verify_draft)

# %% [markdown]
# Is it exact? Do not sample: **enumerate**. Three tokens a, b, c in the vocabulary, two are drafted. Go through all nine drafts and,
# for each, through acceptance and rejection, each with its probability. The sum over everything that can happen is what
# comes out. Next to your function stand two rules that look sensible:


# %% tags=["demo"]
def redraw(p, q, tokens, u):
    """After a rejection, ask the model."""
    n = library.verify_draft(p, q, tokens, u)[0]
    return n, p[n]


def trust(p, q, tokens, u):
    """Accept x with probability p(x), whatever the draft is; after a rejection, ask the model."""
    n = int((u < p[: len(tokens)].gather(1, tokens[:, None])[:, 0]).int().cumprod(0).sum())
    return n, p[n]


def comes_out(verify, chance):
    """The probability of every pair of tokens: [3, 3]."""
    out = torch.zeros(3, 3)
    for draft in product(range(3), repeat=2):
        x = torch.tensor(draft)
        p_rows = torch.stack([p_first, p_second[x[0]], torch.full((3,), 1 / 3)])
        q_rows = torch.stack([q_first, q_second[x[0]]])
        a = chance(p_rows[:2], q_rows, x)
        for taken in product((True, False), repeat=2):
            weight = q_rows.gather(1, x[:, None]).prod()
            weight = weight * torch.where(torch.tensor(taken), a, 1 - a).prod()
            if weight > 0:
                u = torch.where(torch.tensor(taken), a / 2, (1 + a) / 2)
                n, following = verify(p_rows, q_rows, x, u)
                if n == 0:  # one more call of the model for the second token
                    out += weight * following[:, None] * p_second
                elif n == 1:
                    out[x[0]] += weight * following
                else:
                    out[x[0], x[1]] += weight
    return out


p_first, q_first = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
p_second = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [0.3, 0.3, 0.4]])
q_second = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.1, 0.7], [0.3, 0.3, 0.4]])
wanted = (p_first[:, None] * p_second).flatten()
RULES = (
    ("your verify_draft", verify_draft, library.acceptance_probability, "green"),
    ("redraw from p after a rejection", redraw, library.acceptance_probability, "amber"),
    (
        "accept with probability p(x)",
        trust,
        lambda p, q, x: p[:2].gather(1, x[:, None])[:, 0],
        "vermilion",
    ),
)
fig, axes = plt.subplots(3, 1, figsize=(6.4, 4.8), sharex=True)
for ax, (name, rule, chance, color) in zip(axes, RULES, strict=True):
    out = comes_out(rule, chance).flatten()
    wrong = (out - wanted).abs().sum() / 2
    frame(
        ax,
        f"{name}: {'exact' if wrong < 1e-6 else f'{100 * wrong:.0f}% of all texts are others'}",
        "text of two tokens (all nine)" if rule is trust else None,
        None,
    )
    ax.bar(range(9), out, color=PALETTE[color], width=0.6)
    ax.plot(range(9), wanted, "_", color=INK, markersize=24, mew=2)
    ax.set_xticks(range(9), ["".join(pair) for pair in product("abc", repeat=2)])
fig.supxlabel(
    "Bars: the probability of each text by enumeration. Lines: by the model alone. q is another distribution in every row.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
)
plt.show()

# %% [markdown]
# Both wrong rules drift towards what the draft likes to say; on one text nobody would notice. The
# right one holds for *any* draft, one that always says the same included. A draft decides about speed, never about text.
#
# ## 10.5 How many tokens does a call give?
#
# Say each guess is accepted with the same probability $a$, whatever happened before. The $i$-th token of
# a draft is reached *and* accepted with probability $a^i$; and one token always comes from the model itself:

# %% tags=["demo"]
RATE, LENGTH = 0.7, 6
fig, ax = figure(
    f"Each further guess is worth less: {sum(RATE**i for i in range(LENGTH + 1)):.2f} tokens in all",
    "token of the draft (0 = the model's own)",
    "probability that it is kept (fraction)",
    note=f"a = {RATE}, k = {LENGTH}. The area of all bars is the expected number of tokens a call.",
    size=(6.4, 3.0),
)
for i in range(LENGTH + 1):
    ax.bar(i, RATE**i, width=0.94, color=PALETTE["green" if i else "blue"], alpha=1 - 0.1 * i)
    ax.text(i, RATE**i + 0.02, f"{RATE**i:.2f}", ha="center", color=GREY, fontsize=8)
ax.set_ylim(0, 1.12)
plt.show()

# %% [markdown]
# $$
# E(a, k) = 1 + a + a^2 + \dots + a^k = \frac{1 - a^{k+1}}{1 - a} ,
# $$
#
# and $k + 1$ if $a = 1$.

# %% tags=["exercise"]
from fewer.inference import expected_tokens

# %% tags=["check"]
check(expected_tokens)

# %% [markdown]
# What does it cost? Let a drafted token take the time $c$ (in calls of the model on one token), and the
# judging call take 1, as on a GPU. Then it all goes
#
# $$
# \text{speed-up}(a, k, c) = \frac{E(a, k)}{1 + k c}
# $$
#
# times as fast. Dashed below. Solid: the same with the judging call as it was *measured* in 10.1.

# %% tags=["demo"]
LENGTHS = range(sized(33, 9))
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.9), sharey=True)
for ax, cost in zip(axes, (0.0, 0.2), strict=True):
    frame(
        ax,
        "A draft for nothing" if cost == 0 else f"A draft at c = {cost} a token",
        "length k of the draft (tokens)",
        "speed-up (times)",
    )
    for rate, color in ((0.95, "blue"), (0.8, "green"), (0.6, "amber"), (0.3, "vermilion")):
        ideal = [library.expected_speedup(rate, k, cost) for k in LENGTHS]
        here = [library.expected_speedup(rate, k, cost, call_time(k + 1)) for k in LENGTHS]
        ax.plot(LENGTHS, ideal, color=PALETTE[color], linestyle="--", linewidth=1)
        (line,) = ax.plot(LENGTHS, here, color=PALETTE[color])
        ax.plot(int(np.argmax(here)), max(here), "o", color=PALETTE[color], markersize=6)
        if cost:
            direct_label(ax, line, f"a = {rate}")
    ax.axhline(1, color=INK, linewidth=0.8)
    log_axis(ax.yaxis)
    ax.set_ylim(0.15, 20)
fig.supxlabel(
    "Dashed: a call on k + 1 tokens takes as long as on one (theorem 3.8 of Leviathan et al.).\nSolid: the call as measured in 10.1. Dot: its best length.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
)
plt.show()

# %% [markdown]
# Too short a draft gives little; too long a one costs more than it gives. Where even one guess costs more than it brings, the best length is
# 0: do not draft. Find the best $k$ among $0, \dots, \text{longest}$ (of equally good ones the smallest), by the formula, with 1 for the judging call.

# %% tags=["exercise"]
from fewer.inference import best_draft_length

# %% tags=["check"]
check(best_draft_length)

# %% tags=["demo"]
RATES = [0.2, 0.4, 0.6, 0.8, 0.9, 0.95]
print("best length k          " + "".join(f"a = {rate:<6}" for rate in RATES))
for cost in (0.02, 0.05, 0.2, 0.5, 0.9):
    best = [best_draft_length(rate, cost) for rate in RATES]
    print(f"  c = {cost:<17}" + "".join(f"{k:<10}" for k in best))
best = [
    max(range(33), key=lambda k: library.expected_speedup(rate, k, 0.02, call_time(k + 1)))
    for rate in RATES
]
print("  c = 0.02, as here    " + "".join(f"{k:<10}" for k in best))

# %% [markdown]
# ## 10.6 The text is the draft
#
# The cheapest draft needs no model. Who rewrites a text, mends code or sums up says again what
# stands there already. Take the last tokens, look where they stood before, propose what followed *there*:


# %% tags=["demo"]
def paint(tokens, colors, title, note, columns=92):
    """Write tokens as in a book, each on its colour."""
    places, x, y = [], 0, 0
    for token in tokens:
        shown = tokenizer.decode([int(token)])
        if x + len(shown.rstrip("\n")) > columns:
            x, y = 0, y + 1
        places.append((x, y, shown.replace("\n", "⏎")))
        x += len(shown)
        if "\n" in shown:
            x, y = 0, y + shown.count("\n")
    _, ax = figure(title, None, None, note=note, size=(7.2, 0.95 + 0.21 * (y + 1)))
    for (x, y, shown), color in zip(places, colors, strict=True):
        if color:
            ax.add_patch(plt.Rectangle((x, y), len(shown), 0.86, color=color, linewidth=0))
        ax.text(x, y + 0.43, shown, family="monospace", fontsize=8.4, va="center", parse_math=False)
    ax.set(xlim=(0, columns), ylim=(y + 1, 0))
    ax.axis("off")
    plt.show()


FOUND, GUESS, OWN = "#F5D9A0", "#BFE5D8", "#F3C3A5"
shown = texts[KINDS[0]]
begin = len(prompts[KINDS[0]])
at = next(  # the first place in the answer where three tokens are found again
    i for i in range(begin + 3, len(shown)) if len(library.look_up(shown[:i], 8, 3)) == 8
)
guess = library.look_up(shown[:at], 8, 3)
source = next(i for i in range(at) if shown[i : i + 8].equal(guess))
same = next(n for n in (3, 2, 1) if shown[source - n : source].equal(shown[at - n : at]))
colors = [None] * at + [GUESS] * 8
for i in range(same):
    colors[source - 1 - i] = colors[at - 1 - i] = FOUND
colors[source : source + 8] = [GUESS] * 8
paint(
    torch.cat([shown[:at], guess])[24:],
    colors[24:],
    f"The last {same} tokens stood there before: the next 8 may follow again",
    "Amber: what is looked up, and where it is found. Green: what followed there, and the draft.",
)

# %% [markdown]
# With the largest $n \le$ `longest` for which the last $n$ tokens are found earlier in the text, beginning at $i$ (the first
# such place),
#
# $$
# \text{draft} = \text{text}[\,i + n : i + n + \text{length}\,] .
# $$
#
# If not even the last token stood anywhere before, the draft is empty; that costs nothing. (The end of the text
# itself is no find, but a find may overlap it.)

# %% tags=["exercise"]
from fewer.inference import look_up

# %% tags=["check"]
check(look_up)

# %% [markdown]
# Greedy, a draft is accepted as far as it agrees with what the model says anyway. We *have* what it says: so one can see
# how any such draft would do on our texts without asking the model again. Here for your function:

# %% tags=["demo"]
GUESSES = 8


def played(draft, kind):
    """(tokens drafted, accepted) of each call but the first, for a draft that is sure of itself."""
    text, at, rounds = texts[kind], len(prompts[kind]) + 1, []
    while at < len(text):
        tokens = draft(text[:at])[: len(text) - at]
        right = int((tokens == text[at : at + len(tokens)]).int().cumprod(0).sum())
        rounds.append((len(tokens), right))
        at += right + 1
    return rounds


for kind in sized(("rewriting", "list"), KINDS[:1]):
    rounds = played(lambda text: look_up(text, GUESSES, 3), kind)
    new = texts[kind][len(prompts[kind]) :]
    colors = [OWN]
    for _, right in rounds:
        colors += [GUESS] * right + [OWN]
    paint(
        new,
        colors[: len(new)],
        f"{kind}: {len(new) - 1} tokens in {len(rounds)} calls",
        "Green: guessed and accepted. Red: the model's own, one a call.",
    )

# %% [markdown]
# ## 10.7 Who guesses how well, and who pays for it
#
# Lookup is one draft. An *n-gram model* counts what followed the last three tokens in some
# speeches and in the text so far; if it has never seen them, what followed the last two, and so on. It always has a guess. *Early exit* is the
# model without its last layers. And the model with its weights in 4 or 3 bits says nearly the same as itself. How
# often does each guess the greedy token?

# %% tags=["demo"]
training = tokenizer.encode(calibration_text().text[: sized(60_000, 2_000)]).ids
ngram = library.NGramDraft(4, GUESSES, vocab=VOCAB, training=training)


def lookup(text):
    return library.look_up(text, GUESSES, 3)


def share(rounds):
    """Of the judged tokens (up to the first that is wrong), those accepted."""
    judged = sum(min(right + 1, drafted) for drafted, right in rounds)
    return sum(right for _, right in rounds) / max(judged, 1)


truth = {kind: texts[kind][len(prompts[kind]) :] for kind in KINDS}
guessed = {  # draft -> kind -> share of right guesses
    "lookup": {kind: share(played(lookup, kind)) for kind in KINDS},
    "n-gram": {kind: share(played(lambda t: ngram(t).tokens, kind)) for kind in KINDS},
}
overlaps = {}  # layers -> acceptance rate at temperature 1
for kind in KINDS:
    p_model = distributions(kind, LAYERS)
    for depth in DEPTHS:
        q_exit = distributions(kind, depth)
        right = (q_exit.argmax(-1) == p_model.argmax(-1)).float().mean().item()
        guessed.setdefault(f"{depth} layers", {})[kind] = right
        overlaps.setdefault(depth, []).append(library.acceptance_rate(p_model, q_exit).mean())
for bits in sized((4, 3), ()):
    with replaced_weights(model, lambda _, w: round_to_nearest(w, bits, 64)[0]), torch.no_grad():  # noqa: B023
        for kind in KINDS:
            said = model.logits(model.hidden(texts[kind][None, :-1])[0, len(prompts[kind]) - 1 :])
            right = (said.argmax(-1) == truth[kind]).float().mean().item()
            guessed.setdefault(f"{bits} bits", {})[kind] = right

ROWS = ["lookup", "n-gram", "15 layers", "24 layers", "27 layers", "29 layers", "4 bits", "3 bits"]
ROWS = [name for name in ROWS if name in guessed]
table = np.array([[guessed[name][kind] for kind in KINDS] for name in ROWS])
fig, ax = figure(
    "What is easy to guess depends on the text and on who guesses",
    None,
    None,
    note=f"Guesses of the greedy token that are right (%), {NEW} tokens of each text. Lookup and n-gram: those judged in drafts of up to {GUESSES}, "
    "and lookup only where it finds something; the others: at every token.",
    size=(6.4, 4.0),
)
ax.imshow(table, vmin=0, vmax=1.2, cmap="Greens", aspect="auto")
for (row, column), value in np.ndenumerate(table):
    ax.text(
        column,
        row,
        f"{100 * value:.0f}",
        ha="center",
        va="center",
        color="white" if value > 0.8 else INK,
    )
ax.set_xticks(range(len(KINDS)), KINDS)
ax.set_yticks(range(len(ROWS)), ROWS)
ax.xaxis.tick_top()
ax.set_title(ax.get_title(loc="left"), loc="left", pad=24)
ax.tick_params(length=0)
ax.grid(False)
ax.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# An early exit guesses well only when nearly all layers are in. But are 27 of 30 layers a *cheap* guess? To
# pay, a draft must be right often **and** cost little. So draw the one against the other. For every pair of rate and cost
# the shade says how fast it can get at best, with the best $k$ and the judging call as measured.

# %% tags=["demo"]
seconds_at = {}
for depth in sized((LAYERS, 22, 14, 6), (LAYERS, 2)):
    seconds = library.measure_forward(
        library.early_exit(model, depth), past=64, new=1, repeats=sized(5, 1)
    )
    seconds_at[depth] = min([seconds, *seconds_at.values()])
per_layer, output = np.polyfit(list(seconds_at), list(seconds_at.values()), 1)


def cost_of(depth):
    """The time of a drafted token, in calls: a straight line through the measured depths."""
    return float((per_layer * depth + output) / (per_layer * LAYERS + output))


costs, rates = np.linspace(0, 1.1, sized(45, 9)), np.linspace(0, 1, sized(41, 9))
best = np.array(
    [
        [
            max(library.expected_speedup(a, k, c, call_time(k + 1)) for k in range(sized(17, 5)))
            for c in costs
        ]
        for a in rates
    ]
)
fig, ax = figure(
    "An early exit is cheap where it is bad, and good where it is dear",
    "cost c of a drafted token (calls of the model)",
    "acceptance rate a (fraction)",
    note=f"Greedy: mean over {len(KINDS)} kinds of text. Hollow: early exit at temperature 1, mean of Σ min(p, q). Grey: no length of draft is faster than none. "
    "The 4-bit model is drawn twice: as it ran here (weights turned back into floats), and as if its 4.25 bits a weight were all that costs.",
    size=(7.0, 4.8),
)
shades = ax.contourf(
    costs,
    rates,
    best,
    levels=[1.0001, 1.25, 1.5, 2, 3, 9],
    colors=["#E4F0EC", "#CBE4DB", "#AAD4C5", "#7FBEA8", "#56A78C"],
    extend="neither",
)
ax.set_facecolor("#EEEFF1")
ax.grid(False)
mean_right = {name: float(np.mean(list(by_kind.values()))) for name, by_kind in guessed.items()}
exits = [(cost_of(d), mean_right[f"{d} layers"]) for d in DEPTHS]
ax.plot(*zip(*exits, strict=True), marker="o", color=PALETTE["vermilion"])
ax.plot(
    [cost_of(d) for d in DEPTHS],
    [float(sum(overlaps[d]) / len(overlaps[d])) for d in DEPTHS],
    "o:",
    color=PALETTE["vermilion"],
    mfc="white",
    linewidth=1,
)
for depth, (x, y) in zip(DEPTHS, exits, strict=True):
    if depth in (3, 15, 24, 27, 29):
        ax.annotate(
            f"{depth} layers",
            (x, y),
            xytext=(6, -4) if depth == 29 else (-6, 6),
            textcoords="offset points",
            ha="left" if depth == 29 else "right",
            color=PALETTE["vermilion"],
            fontsize=8,
        )
for name, x, color in (
    ("lookup", 0.005, "green"),
    ("n-gram", 0.005, "blue"),
    ("4 bits", 4.25 / 32, "purple"),
    ("4 bits", 1.0, "purple"),
):
    if name not in mean_right:
        continue
    ax.plot(
        x,
        mean_right[name],
        "D",
        color=PALETTE[color],
        markersize=7,
        mfc="white" if x == 4.25 / 32 else None,
        clip_on=False,
    )
    label = {4.25 / 32: "4 bits, if all else were free", 1.0: "4 bits, here"}.get(x, name)
    ax.annotate(
        label,
        (x, mean_right[name]),
        xytext=(8, -3 if x < 1 else 8),
        ha="left" if x < 1 else "center",
        textcoords="offset points",
        color=PALETTE[color],
        fontsize=8,
    )
ax.set(xlim=(0, 1.1), ylim=(0, 1.02))
plt.show()

# %% [markdown]
# Untrained, the early exit never gets where it would pay. Its first 24 layers guess little, for the output layer has only ever
# read what comes after the thirtieth. With 27 it guesses well, and costs nine tenths of the model itself; a layer more does not even always
# help. (LayerSkip *trains* a model for it, with a loss at every exit. Then the curve bends up early.) The same with four bits: the best of all these
# guessers, as long as the text is no copy; but multiplied as floats it costs as much as what it guesses for. Drafts of negligible cost need not be good.
#
# ## 10.8 Trees
#
# If the first guess is wrong, the whole draft is lost. So hedge: several first tokens, several after each of
# these. Here 27 layers propose their 3 likeliest tokens, after each its 2 likeliest, and one after each of those:
# 15 tokens, read by the model in **one** call. For that each token may see its own ancestors, and not the other branches:

# %% tags=["demo"]
grown = library.ModelTreeDraft(early, sized((3, 2, 1), (2, 1)))(text)
NODES = len(grown.parents)
mask = library.tree_mask(grown.parents)
depth = mask.sum(1)


@torch.no_grad()
def tree_logits(mask):
    """Read text and tree in one call; logits after the text and after each node."""
    cache = library.TreeCache()
    model.hidden(text[None, :-1], cache)
    cache.tree = mask
    positions = torch.cat([torch.tensor([len(text) - 1]), len(text) - 1 + depth])
    read = torch.cat([text[-1:], grown.tokens])
    return model.logits(model.hidden(read[None], cache, positions)[0])


one_hot = F.one_hot(grown.tokens, VOCAB).float()
says = token_probabilities(tree_logits(mask), 0.0)
path, _ = library.verify_tree(says, one_hot, grown.tokens, grown.parents, torch.full((NODES,), 0.5))
order, heights = [], {}


def lay_out(node):
    """Leaves below each other, a parent in the middle of its children."""
    children = [i for i, parent in enumerate(grown.parents) if parent == node]
    for child in children:
        lay_out(child)
    if children:
        heights[node] = sum(heights[child] for child in children) / len(children)
    else:
        heights[node] = len(order)
        order.append(node)


lay_out(-1)
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.9), width_ratios=(1.25, 1))
frame(axes[0], f"A tree of {NODES} guesses, {len(path)} in a row right", None, None)
frame(axes[1], "Who sees whom", None, None)
for node, height in heights.items():
    x = 0 if node < 0 else int(depth[node])
    kept = node in path or node < 0
    if node >= 0:
        parent = grown.parents[node]
        axes[0].plot(
            [x - 1, x],
            [heights[parent], height],
            color=PALETTE["green"] if kept else RULE,
            linewidth=2.2 if kept else 1,
            zorder=1,
        )
    axes[0].text(
        x,
        height,
        word(grown.tokens[node]) if node >= 0 else word(text[-1]),
        ha="center",
        va="center",
        fontsize=8,
        bbox={
            "boxstyle": "round,pad=0.25",
            "facecolor": GUESS if kept else "white",
            "edgecolor": PALETTE["green"] if kept else RULE,
        },
    )
axes[0].set(xlim=(-0.4, int(depth.max()) + 0.5), ylim=(len(order) - 0.4, -0.6))
axes[0].axis("off")
axes[1].imshow(
    mask.float() * (1 + torch.tensor([i in path for i in range(NODES)]).float()[:, None]),
    cmap="Greens",
    vmax=2.6,
)
names = [word(token) for token in grown.tokens]
axes[1].set_xticks([])
axes[1].set_yticks(range(NODES), names, fontsize=7)
axes[1].tick_params(length=0)
axes[1].grid(False)
fig.supxlabel(
    f"After “…{tokenizer.decode(text[-9:].tolist())}”. Green: what SmolLM2 says itself, greedily.".replace(
        "\n", "⏎"
    )
    + "\nRight: a row sees the shaded columns, which stand in the order of the rows; all rows see the text.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
)
plt.show()

# %% [markdown]
# A tree is written down as the *parent* of each node, -1 for those that follow the text itself. A parent comes before its
# children. Node $i$ sees
#
# $$
# \mathrm{mask}_{ij} = 1 \iff j = i \ \text{ or } \ j \text{ is an ancestor of } i .
# $$

# %% tags=["exercise"]
from fewer.inference import tree_mask

# %% tags=["check"]
check(tree_mask)

# %% [markdown]
# One call with your mask against one call for every branch, by itself. (Siblings stand at the same *position*: a
# node's position is its depth.) And what if the nodes simply saw all that come before them, as tokens do?

# %% tags=["demo"]
in_one = tree_logits(tree_mask(grown.parents))[1:]
in_a_row = tree_logits(torch.ones(NODES, NODES).tril().bool())[1:]
difference = torch.zeros(2)
leaves = [i for i in range(NODES) if i not in grown.parents][: sized(6, 1)]
for leaf in leaves:
    branch = mask[leaf].nonzero()[:, 0]
    with torch.no_grad():
        alone = model.hidden(torch.cat([text, grown.tokens[branch]])[None])[0, len(text) :]
        alone = model.logits(alone)
    for i, both in enumerate((in_one, in_a_row)):
        difference[i] = max(difference[i], (both[branch] - alone).abs().max())
print(f"largest difference of a logit from {len(leaves)} calls, one for every branch:")
print(f"  with the tree's mask           {difference[0]:.5f}")
print(f"  with the mask of ordinary text {difference[1]:.5f}")

# %% [markdown]
# When tokens are sampled, a node has several *candidates* $x_1, x_2, \dots$, drawn from $q_1, q_2, \dots$ Try one after the other. After each rejection
# $p$ becomes what is still missing. Here each is drawn without putting the earlier ones back:

# %% tags=["demo"]
M = 3
tried, tried_q = library.draw_children(q, M, torch.Generator().manual_seed(4))
fig, axes = plt.subplots(1, M + 1, figsize=(7.2, 3.3), sharey=True)
current = p
names = [word(token) for token in top]
for i, ax in enumerate(axes):
    last = i == M
    ax.barh(rows - 0.2, current[top], height=0.38, color=PALETTE["blue"])
    if not last:
        ax.barh(rows + 0.2, tried_q[i][top], height=0.38, color=PALETTE["vermilion"], alpha=0.8)
        chance = library.acceptance_probability(current, tried_q[i], tried[i]).item()
        ax.set_title(f"“{word(tried[i])}”: {100 * chance:.0f}%", fontsize=9, fontweight="normal")
        current = library.residual_distribution(current, tried_q[i])
    else:
        ax.set_title("all rejected: draw", fontsize=9, fontweight="normal")
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1])
    ax.grid(False)
axes[0].set_yticks(rows, names)
axes[0].invert_yaxis()
fig.suptitle(
    "Each rejection leaves what is still missing", x=0.02, ha="left", fontsize=11, fontweight="bold"
)
fig.supxlabel(
    "The place of 10.2. Blue: p as it is when this candidate is tried (probability). Red: the q that it was drawn from.\n"
    "Above: the candidate, and how likely it is to be accepted if it comes to that.",
    x=0.02,
    ha="left",
    fontsize=7,
    color=GREY,
)
plt.show()

# %% [markdown]
# $$
# \text{accept } x_i \text{ with } \min\!\left(1, \frac{p_i(x_i)}{q_i(x_i)}\right) , \qquad
# p_{i+1} = \mathrm{norm}(\max(0, p_i - q_i)) , \qquad p_1 = p .
# $$
#
# Say which candidate is accepted (the first that is; or none), and what $p$ has become then. Every step is that of
# 10.3, so the token that comes out is still distributed as $p$.

# %% tags=["exercise"]
from fewer.inference import verify_candidates

# %% tags=["check"]
check(verify_candidates)

# %% [markdown]
# How much does a second candidate help, or an eighth? With your function, at all places of all texts:

# %% tags=["demo"]
WIDTHS = sized((1, 2, 3, 4, 6, 8), (1, 2))
generator = torch.Generator().manual_seed(0)
depth = sized(24, 27)
p_places = torch.cat([distributions(kind, LAYERS) for kind in KINDS])
q_places = torch.cat([distributions(kind, depth) for kind in KINDS])
with_back, without = torch.zeros(len(p_places)), torch.zeros(len(p_places))
for i, (p_place, q_place) in enumerate(zip(p_places, q_places, strict=True)):
    # Tokens that both hardly ever say are one token here: it is as exact, and quicker.
    few = torch.cat([p_place.topk(200).indices, q_place.topk(200).indices]).unique()
    p_place, q_place = (
        F.pad(d[few], (0, 1), value=(1 - d[few].sum()).clamp(min=0)) for d in (p_place, q_place)
    )
    u = torch.rand(WIDTHS[-1], generator=generator)
    again = torch.multinomial(q_place, WIDTHS[-1], replacement=True, generator=generator)
    for first, (ids, q_rows) in (
        (with_back, (again, q_place.expand(WIDTHS[-1], -1))),
        (without, library.draw_children(q_place, WIDTHS[-1], generator)),
    ):
        index, _ = verify_candidates(p_place, q_rows, ids, u[: len(ids)])
        first[i] = torch.inf if index is None else index
rank = (q_places > q_places.gather(1, p_places.argmax(1)[:, None])).sum(1)
fig, ax = figure(
    f"One guess is right {100 * (rank < 1).double().mean():.0f} times in 100; of {WIDTHS[-1]}, one is right {100 * (rank < WIDTHS[-1]).double().mean():.0f} times",
    "candidates for the next token (count)",
    "one of them is accepted (fraction)",
    note=f"{len(p_places)} places of {len(KINDS)} texts; the standard error is up to {0.5 / len(p_places) ** 0.5:.2f}. Draft: the first {depth} of {LAYERS} layers.",
    size=(6.4, 3.6),
)
for found, name, color in (
    (rank, "greedy: the m likeliest", "green"),
    (without, "sampled, none put back", "blue"),
    (with_back, "sampled, put back", "vermilion"),
):
    (line,) = ax.plot(
        WIDTHS, [(found < m).double().mean() for m in WIDTHS], marker="o", color=PALETTE[color]
    )
    direct_label(ax, line, name)
ax.set_ylim(0, 1)
plt.show()

# %% [markdown]
# The second candidate helps most; from then on each is worth less, and each has to be read: on a GPU that is free for a while,
# on a CPU for a much shorter one (10.1). Candidates that are put back
# hardly help: a draft that is sure, and wrong, says the same again.
#
# ## 10.9 Several texts at once
#
# A batch reads its weights once for all texts, as well. But now one row accepts eight tokens and the next none. Nothing
# needs to be moved for it: what was rejected stays in the cache as a *hole*, at a position later than all others, where by the ordinary
# causal rule nobody sees it. Now and then the holes are closed up.

# %% tags=["demo"]
CALLS = sized(6, 2)
length = max(len(prompt) for prompt in prompts.values())
speech = torch.tensor(training[:length])  # in front of shorter prompts: rows must begin alike
batch = torch.stack([torch.cat([speech, prompts[kind]])[-length:] for kind in KINDS])
together = library.speculative_stream(
    model, batch, partial(library.prompt_lookup, length=GUESSES), 100
)
seen = [call for _, call in zip(range(CALLS), together, strict=False)]
# The same reading and forgetting with a tiny model, to look into its cache.
tiny, cache, lengths = tiny_llama(), RaggedCache(), [0] * len(KINDS)
for i, call in enumerate(seen):
    read = [torch.ones((length if i == 0 else 1) + one.drafted, dtype=torch.long) for one in call]
    with torch.no_grad():
        rows_read, positions = ragged_rows(read, lengths)
        tiny.hidden(rows_read, cache, positions)
    before = cache.positions[0].clone()
    lengths = [
        length + sum(len(c[row].tokens) for c in seen[: i + 1]) - 1 for row in range(len(KINDS))
    ]
    if i + 1 < len(seen):
        cache.crop(lengths)
state = torch.zeros(len(KINDS), before.shape[1] - length + 4)
last = before[:, length - 4 :]
state[last != HOLE] = 1  # text
for row in range(len(KINDS)):
    state[row][(last[row] != HOLE) & (last[row] >= lengths[row])] = 2  # rejected just now
fig, ax = figure(
    "Rows move on at their own pace, around holes",
    "place in the cache (count, after the prompt)",
    None,
    note=f"{len(KINDS)} prompts, made equally long ({length} tokens) by some speech in front, go on together; the cache in call {len(seen)}, before what it rejects becomes holes. At the right: tokens added so far.",
    size=(7.0, 2.8),
)
colors = np.array([[0.93, 0.935, 0.945], [0.0, 0.40, 0.65], [0.76, 0.29, 0.0]])
ax.imshow(
    colors[state.int().numpy()],
    aspect="auto",
    extent=(-4.5, state.shape[1] - 4.5, len(KINDS) - 0.5, -0.5),
)
for row in range(len(KINDS)):
    added = sum(len(call[row].tokens) for call in seen)
    ax.text(state.shape[1] - 4, row, f"{added}", va="center", color=PALETTE["blue"], fontsize=9)
for x in np.arange(-4.5, state.shape[1] - 4.5):
    ax.axvline(x, color="white", linewidth=1)
for row in range(1, len(KINDS)):
    ax.axhline(row - 0.5, color="white", linewidth=5)
ax.axvline(-0.5, color=INK, linewidth=1)
ax.set_title(ax.get_title(loc="left"), loc="left", pad=24)
ax.set_yticks(range(len(KINDS)), KINDS)
ax.grid(False)
for x, (name, color) in zip(
    (0.0, 0.12, 0.37),
    (
        ("■ text", PALETTE["blue"]),
        ("■ rejected in this call", PALETTE["vermilion"]),
        ("■ hole", GREY),
    ),
    strict=True,
):
    ax.text(x, 1.03, name, color=color, transform=ax.transAxes, fontsize=8)
plt.show()

# %% [markdown]
# The row that accepts least has the most holes; a call takes as long as its longest draft. With many texts at once, there is less
# to win: the free arithmetic that guesses live on is used by the other texts already.
#
# ## 10.10 The clock
#
# Now everything for real: the four texts again, with drafts, greedily, and with the clock running. First of all, is it the same
# text?

# %% tags=["demo"]
FEW = sized(10, 3)  # tokens are enough to time what is slow
RUNS = [  # name, color, draft, texts, new tokens
    ("plain", INK, None, KINDS, FEW),
    ("lookup", "green", partial(library.prompt_lookup, length=GUESSES), KINDS, NEW),
    ("n-gram", "blue", ngram, KINDS, NEW),
    ("27 layers", "vermilion", library.ModelDraft(early, 2), KINDS[:: sized(3, 2)], FEW),
    ("15 layers", "amber", library.ModelDraft(library.early_exit(model, 15), 2), KINDS[-1:], FEW),
]
RUNS = RUNS[: sized(5, 2)]
fastest, rounds = {("plain", kind): plain[kind][:FEW] for kind in KINDS}, {}
for _ in range(sized(2, 1)):  # all runs are made twice: of each call the faster one counts
    for name, _, draft, kinds, new in RUNS:
        for kind in kinds:
            if draft is None:
                _, times = timed(stream(model, prompts[kind][None], new))
            else:
                given, times = timed(
                    library.speculative_stream(model, prompts[kind][None], draft, new)
                )
                rounds[name, kind] = [call[0] for call in given]
            before = fastest.get((name, kind), times)
            fastest[name, kind] = [min(pair) for pair in zip(before, times, strict=True)]

measured = []  # name, color, kind, acceptance, speed-up
print(f"{'':12}{'text':12}tokens a call   accepted   times as fast   same text")
for name, color, _, kinds, new in RUNS[1:]:
    for kind in kinds:
        after, times = rounds[name, kind][1:], fastest[name, kind][1:]  # without the prompt's call
        tokens = sum(len(one.tokens) for one in after)
        one_by_one = np.mean(fastest["plain", kind][1:])
        faster = one_by_one * tokens / max(sum(times), 1e-9)
        rate = sum(one.accepted for one in after) / max(sum(one.judged for one in after), 1)
        measured.append((name, color, kind, rate, faster))
        said = torch.cat([one.tokens for one in rounds[name, kind]])
        same = said.equal(texts[kind][len(prompts[kind]) :][:new])
        print(
            f"{name:12}{kind:12}{tokens / max(len(after), 1):8.2f}{rate:14.2f}{faster:13.2f}"
            f"            {'yes' if same else 'NO'}"
        )

# %% [markdown]
# And against what theory says for this machine: $E(a, k)$ tokens in the time of a call on $k + 1$ tokens and $k$
# drafted ones.

# %% tags=["demo"]
champion = max(measured, key=lambda one: one[4])
fig, ax = figure(
    f"{champion[0].capitalize()} makes {champion[2]} {champion[4]:.1f} times as fast; the curves are theory",
    "accepted of the judged guesses, a (fraction)",
    "tokens a second (times plain decoding)",
    note=f"SmolLM2, float32, greedy, {torch.get_num_threads()} threads, {NEW} new tokens a text ({FEW} for early exit), without the call that reads the prompt. "
    "Curves: E(a, k) / (call(k + 1) + k c) with the measured times; "
    f"dashed: k = {GUESSES} if a call took as long on {GUESSES + 1} tokens as on one and guesses were free.",
    size=(7.2, 5.0),
)
grid = np.linspace(0, 1, 101)
(ideal,) = ax.plot(
    grid,
    [library.expected_speedup(a, GUESSES, 0.0) for a in grid],
    color=GREY,
    linestyle="--",
    linewidth=1,
)
direct_label(ax, ideal, "the paper's")
for name, color, k, cost in (
    ("lookup, n-gram", GREY, GUESSES, 0.0),
    ("15 layers", PALETTE["amber"], 2, cost_of(15)),
    ("27 layers", PALETTE["vermilion"], 2, cost_of(27)),
):
    (line,) = ax.plot(
        grid, [library.expected_speedup(a, k, cost, call_time(k + 1)) for a in grid], color=color
    )
    direct_label(ax, line, name)
ax.axhline(1, color=INK, linewidth=0.8)
for name, color, kind, rate, faster in measured:
    ax.plot(rate, faster, "o", color=PALETTE[color], markersize=8, mec="white", zorder=3)
    above = name in ("lookup", "15 layers")
    ax.annotate(
        kind,
        (rate, faster),
        xytext=(-5 if above else 5, 6 if above else -12),
        ha="right" if above else "left",
        textcoords="offset points",
        color=PALETTE[color],
        fontsize=8,
    )
ax.text(0.02, 0.95, "● lookup", color=PALETTE["green"], transform=ax.transAxes)
ax.text(0.02, 0.89, "● n-gram", color=PALETTE["blue"], transform=ax.transAxes)
log_axis(ax.yaxis)
ax.set_ylim(0.25, 11)
plt.show()

# %% [markdown]
# The points lie near the curve of their draft, mostly a little below: the curve counts the model's calls alone, not what is done between them, and
# calls after a longer text take longer. The rest can be read off:
#
# - **The kind of text decides.** The same draft, the same model, the same machine: rewriting is several times as fast, a
#   free answer hardly at all, or slower.
# - **A guess that is never made costs nothing.** The n-gram model always has eight, right or not, and the model has to read them all. Lookup
#   is silent where it finds nothing; so it may lie *above* its curve, which pays for eight guesses in every call.
# - **A good guess can cost too much.** 27 of 30 layers are right more often than n-grams, and slower than no
#   draft at all. Their curve stays below 1 until nearly everything is accepted.
# - **The curve takes every guess for equally likely** to be right. Really they come in runs: in a quotation everything is accepted,
#   at its end nothing. Two texts of the same $a$ can give different numbers of tokens a call.
#
# On a GPU the measured curve is nearer to the dashed one, as a call on nine tokens takes hardly longer than a call on one.

# %% [markdown] tags=["written"] id="what_a_draft_changes" points=5
# **Question.** (a) A colleague lets a draft propose 4 tokens, drawn from $q$, but drops those with $q(x) < 0.1$ ("it isn't sure anyway") and hands on
# only those before the first that was dropped. Tokens are then verified as in 10.4. Is the text still distributed as the model's? Give a reason or a counterexample. What if the draft is
# greedy, and stops where its largest probability is below 0.1? (b) In the last figure a point lies above its curve, another one below. Name two
# causes that have nothing to do with noise, and say how you would tell them apart. (c) A service runs 64 texts at once on a GPU and is told to add speculative decoding,
# "measured 2.5 times as fast". What would you want to know about this number, and what do you expect?
#
# **Answer.** (a) No. Whether a token is judged at all now depends on *which* token was drawn. Take $q = (0.05, 0.95)$ and $p = (0.5, 0.5)$: a drawn
# first token is dropped, and something is drawn from $p$; the second is accepted with 0.53 and else replaced by the first. So the first comes out with
# $0.05 \cdot 0.5 + 0.95 \cdot 0.474 = 0.475$, not 0.5. (What was judged was really drawn from $q$ without its small values, normalised; with that as $q$
# it would be right again.) To stop by the *distribution* before anything is drawn is allowed: it does not depend on the token.
# The greedy draft is sure of its token, its $q$ is one-hot and the stop depends on nothing random, so it is exact.
# (b) Drafts shorter than $k$, or none (lookup finds nothing; then the call is cheaper than the curve says): count the drafted tokens of each call. Guesses that are not
# independent, with runs of accepted ones: compare the measured tokens a call with $E(a, k)$, or the acceptance at the first place of a draft with that at the fourth. (Also: longer
# texts make calls dearer than those measured after 64 tokens; time the calls themselves.)
# (c) On what texts, with which draft and length, at what *batch size*, at which temperature, against what baseline, with or without the prompt; the median or the mean over
# texts. Most such numbers are for one text at a time. With 64 texts the weights are read once for all of them, and the free arithmetic is used up already: reading 9 tokens of each is 576 tokens a call, and
# costs time. Rows also wait for the longest draft. I expect much less, perhaps a loss, and would try a shorter draft, and only when few texts are being served.
#
# **Rubric.** (a) 1 point for "no" with a valid reason or counterexample; 1 point for seeing that the greedy draft stays exact and why. (b) 1 point for two causes; (half each) with a measurement that would
# show one of them for the full point. (c) 1 point for two or more conditions of the number, batch size among them; 1 point for expecting less at 64 texts because the arithmetic isn't free any more.
