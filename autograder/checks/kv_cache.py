"""The exercises of lab 9, the key-value cache: checks, misconceptions, correct variants.

A check asks for one thing and takes the rest as the candidate has it: operations of a chunk are
judged by her own operations token by token, several heads by her own results for one, codes by her
own scale. So one mistake mostly costs points once.

In-place work cannot be seen from outside (candidates get copies).

The misconceptions refuse bad input as the references do, so that they are recognized by their
mistake and not by a missing error message.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from autograder.compare import (
    Mismatch,
    as_double,
    expect,
    expect_close,
    expect_equal,
    expect_error,
    expect_integers,
    expect_shape,
)
from autograder.exercise import Exercise
from autograder.strategies import LAYOUTS, arrange, given, tensors
from fewer.inference import (
    accumulate_attention,
    cache_bytes,
    forward_work,
    h2o_scores,
    kept_tokens,
    quantize_range,
    softmax_off_by_one,
    streaming_llm_scores,
)

SEEDS = st.integers(0, 2**16 - 1)
LEADS = st.sampled_from(((2,), (2, 3), (3, 1), (1, 2), (3,), (2, 1, 2)))
INF = math.inf
LAST = "the last dimension is the default"  # why some mutants change nothing


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def floats(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array)).float()


def rows_of(x: Tensor) -> list[Tensor]:
    """The vectors along the last dimension."""
    return list(x.reshape(-1, x.shape[-1]))


# --- 1. cache_bytes ------------------------------------------------------------------------------

memory = Exercise(
    cache_bytes,
    paper="Pope et al. 2022 (arXiv 2211.05102), section 2; Ainslie et al. 2023 (arXiv 2305.13245)",
    difficulty=1,
    minutes=5,
)

Sizes = tuple[int, int, int, int]  # tokens, layers, key heads, width of a head


def sizes(even: int = 1) -> st.SearchStrategy[Sizes]:
    """Sizes of a text and of a model, the width a multiple of ``even``."""
    return st.tuples(
        st.sampled_from((1, 2, 3, 10, 100, 8192)),
        st.sampled_from((1, 2, 3, 30, 80)),
        st.sampled_from((1, 2, 3, 8, 64)),
        st.sampled_from((1, 2, 3, 8, 64, 128)).map(lambda width: width * even),
    )


@memory.check(
    points=3,
    hint="Write down what a layer must remember of a token so that later tokens can attend to it. "
    "How many vectors are that, and how many bytes has a number of 16 bits?",
    head_dim=[1, 2, 3, 8, 64, 128],
)
def a_key_and_a_value_are_kept_of_a_token(candidate, head_dim):
    """One layer with one key head keeps of one token a key and a value of head_dim numbers, and if
    nothing is said, a number has 16 bits, which are 2 bytes."""
    candidate(1, 1, 1, 8, bits=8)  # not judged: it tells keys alone from numbers for bytes
    got = candidate(1, 1, 1, head_dim)
    expect_close(got, 2 * head_dim * 2, "the number of bytes", rtol=1e-9, reveal=True)


@memory.check(
    points=3,
    hint="Double one size and leave the others. Each of them should double the cache: there are so "
    "many more vectors, or vectors so much longer.",
    drawn=sizes(),
    which=st.integers(0, 3),
    factor=st.sampled_from((2, 3, 10, 0)),
)
def each_size_multiplies_the_cache(candidate, drawn, which, factor):
    """With so many times the tokens, the layers, the key heads or the width of a head, the cache
    takes so many times the bytes; without tokens or layers, none."""
    factor = 2 if which > 1 and factor == 0 else factor
    name = ("tokens", "layers", "kv_heads", "head_dim")[which]
    more = [size * factor if i == which else size for i, size in enumerate(drawn)]
    want = factor * float(candidate(*drawn))
    what = f"the cache with {factor} times the {name}"
    expect_close(candidate(*more), want, what, rtol=1e-9, reveal=True)
    expect(float(candidate(1, 1, 1, 8)) > 0, "the cache of one token is empty")


@memory.check(
    points=2,
    hint="Two texts are generated at the same time. Is there anything in the cache of one that the "
    "other could use?",
    drawn=sizes(),
    sequences=st.sampled_from((2, 1, 3, 64)),
)
def every_text_has_a_cache_of_its_own(candidate, drawn, sequences):
    """Several texts take as many times the bytes of one; if nothing is said, there is one."""
    alone = float(candidate(*drawn))
    got = candidate(*drawn, sequences=sequences)
    expect_close(got, sequences * alone, f"the cache of {sequences}", rtol=1e-9, reveal=True)
    expect(alone > 0, "the cache of a text is empty")


@memory.check(
    points=2,
    hint="Take numbers of 4 bits. How many bytes are two of them, and in which order must you "
    "multiply and divide so that nothing is lost on the way?",
    drawn=sizes(even=8),
    bits=st.sampled_from((8, 4, 32, 2, 1)),
)
def fewer_bits_take_fewer_bytes(candidate, drawn, bits):
    """Numbers of other widths take as many times the bytes as they have times the bits: with 8 bits
    half as many as with 16, with 4 a quarter."""
    usual = float(candidate(*drawn, bits=16))
    got = candidate(*drawn, bits=bits)
    expect_close(got, usual * bits / 16, f"the cache with {bits} bits", rtol=1e-9, reveal=True)
    expect(usual > 0, "the cache with 16 bits is empty")


@memory.check(
    points=1,
    hint="What is the least that each size can be? Look at the docstring, and at what checks these "
    "things in the library.",
    bad=[
        (ValueError, (-1, 2, 3, 4)),
        (ValueError, (5, -1, 3, 4)),
        (ValueError, (5, 2, 0, 4)),
        (ValueError, (5, 2, 3, 0)),
        (ValueError, (5, 2, 3, 4, 0)),
        (ValueError, (5, 2, 3, 4, 1, 0)),
        (TypeError, (5.5, 2, 3, 4)),
        (TypeError, (5, 2.5, 3, 4)),
        (TypeError, (5, 2, 1.5, 4)),
        (TypeError, (5, 2, 3, 4.5)),
        (TypeError, (5, 2, 3, 4, 1.5)),
        (TypeError, (5, 2, 3, 4, 1, 16.5)),
    ],
)
def sizes_that_cannot_be_are_refused(candidate, bad):
    """A size below its least raises ValueError; one that is no whole number raises TypeError."""
    kind, args = bad
    expect_error(candidate, kind, *args)


def _numbers(tokens, layers, kv_heads, head_dim, sequences, bits):
    """How many numbers all keys have; what is out of range is refused."""
    cache_bytes(tokens, layers, kv_heads, head_dim, sequences, bits)
    return tokens * layers * kv_heads * head_dim * sequences


@memory.misconception(
    "You keep the keys only. A token that is attended to gives its value as well: two vectors for "
    "every head."
)
def keys_only(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    return _numbers(tokens, layers, kv_heads, head_dim, sequences, bits) * bits // 8


@memory.misconception(
    "You keep three vectors of a token. Its query is needed only once, when the token itself is "
    "read: later tokens ask for its key and its value."
)
def queries_too(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    return 3 * _numbers(tokens, layers, kv_heads, head_dim, sequences, bits) * bits // 8


@memory.misconception("You count bits. A byte has 8 of them.")
def counts_bits(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    return 2 * _numbers(tokens, layers, kv_heads, head_dim, sequences, bits) * bits


@memory.misconception("You count numbers. Each has bits / 8 bytes.")
def counts_numbers(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    return 2 * _numbers(tokens, layers, kv_heads, head_dim, sequences, bits)


@memory.misconception(
    "You divide the bits of one number by 8 and drop the rest: with 4 bits that makes 0 bytes. "
    "Divide at the end, when all numbers are counted."
)
def whole_bytes_a_number(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    return 2 * _numbers(tokens, layers, kv_heads, head_dim, sequences, bits) * (bits // 8)


@memory.misconception(
    "You let every number have 2 bytes, however many bits are asked for. A cache may be quantized: "
    "that is what the argument is for."
)
def always_two_bytes(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    return 4 * _numbers(tokens, layers, kv_heads, head_dim, sequences, bits)


@memory.misconception(
    "You count one layer. Every layer has keys and values of its own, made from its own input."
)
def one_layer(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    cache = _numbers(tokens, layers, kv_heads, head_dim, sequences, bits)
    return 2 * cache // max(layers, 1) * bits // 8


@memory.misconception(
    "You count one text. The weights serve all texts at once, but each text has its own cache: "
    "that is why many texts at once need so much memory."
)
def one_text(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    _numbers(tokens, layers, kv_heads, head_dim, sequences, bits)
    return 2 * tokens * layers * kv_heads * head_dim * bits // 8


@memory.misconception(
    "Your cache grows with the square of the tokens. So do the operations of attention; but of "
    "every token one key and one value are kept, however many others look at it."
)
def square_of_the_tokens(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    cache = _numbers(tokens, layers, kv_heads, head_dim, sequences, bits)
    return 2 * cache * tokens * bits // 8


@memory.accepts("the elements of a tensor that is never made")
def elements_of_a_tensor(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    _numbers(tokens, layers, kv_heads, head_dim, sequences, bits)
    shape = (layers, 2, sequences, kv_heads, tokens, head_dim)
    return torch.empty(shape, device="meta").numel() * bits / 8


@memory.accepts("a sum over layers and texts")
def sum_over_layers_and_texts(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    _numbers(tokens, layers, kv_heads, head_dim, sequences, bits)
    total_bits = 0
    for _layer in range(layers):
        for _text in range(sequences):
            keys = values = tokens * kv_heads * head_dim
            total_bits += (keys + values) * bits
    return total_bits / 8


@memory.accepts("NumPy's product, as an integer of 64 bits")
def numpy_product(tokens, layers, kv_heads, head_dim, sequences=1, bits=16):
    _numbers(tokens, layers, kv_heads, head_dim, sequences, bits)
    factors = [2, tokens, layers, kv_heads, head_dim, sequences, bits]
    return np.prod(np.array(factors, dtype=np.int64)) // 8


# --- 2. forward_work -----------------------------------------------------------------------------

work = Exercise(
    forward_work,
    paper="Kaplan et al. 2020 (arXiv 2001.08361), section 2.1; Williams et al. 2009 (CACM 52-4)",
    difficulty=2,
    minutes=15,
)

Model = tuple[int, int, int, int]  # layers, query heads, key heads, width of a head
WEIGHTS = st.sampled_from((1000, 8, 4096, 1_000_000, 69_000_000_000))
PASTS = st.sampled_from((0, 1, 2, 10, 100, 2048))
TEXTS = st.sampled_from((1, 2, 3, 64))


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Sizes of a model whose query heads share key heads, as a rule."""
    kv_heads = draw(st.sampled_from((1, 2, 8)))
    group = draw(st.sampled_from((2, 1, 4, 8)))
    layers, width = draw(st.sampled_from((1, 2, 30))), draw(st.sampled_from((1, 8, 64)))
    return layers, kv_heads * group, kv_heads, width


def layerless(model: Model) -> Model:
    return (0, *model[1:])


@work.check(
    points=2,
    hint="A number of the input meets a weight: it is multiplied, and the product is added to a "
    "sum. How many operations are that?",
    past=PASTS,
    weights=WEIGHTS,
    model=models(),
)
def a_weight_costs_two_operations(candidate, past, weights, model):
    """Without attention (no layers have it), reading one token takes two operations for each
    weight."""
    got = candidate(past, 1, weights, *layerless(model))[0]
    expect_close(got, 2 * weights, "the number of operations", rtol=1e-9, reveal=True)


@work.check(
    points=2,
    hint="One query head, one new token: how many keys does it look at, its own included? What "
    "does the product with a key cost, and what follows after the softmax?",
    past=PASTS,
    weights=WEIGHTS,
    model=models(),
)
def a_new_token_attends_to_the_past_and_to_itself(candidate, past, weights, model):
    """Reading one token, attention adds in every layer and query head two products over head_dim
    numbers for each token of the past and one for the new token itself."""
    layers, heads, _, width = model
    without = float(candidate(past, 1, weights, *layerless(model))[0])
    more = float(candidate(past, 1, weights, *model)[0]) - without
    want = 2 * 2 * width * heads * layers * (past + 1)
    expect_close(more, want, "what attention adds to the operations", rtol=1e-6, reveal=True)


@work.check(
    points=2,
    hint="Read three tokens at once. To how many does the first of them attend, to how many the "
    "last? And what do other texts have to do with it?",
    past=PASTS,
    new=st.sampled_from((2, 1, 3, 8)),
    weights=WEIGHTS,
    model=models(),
    texts=TEXTS,
)
def tokens_at_once_take_the_operations_of_one_after_the_other(
    candidate, past, new, weights, model, texts
):
    """Reading some tokens of some texts in one call takes as many operations as reading them one by
    one: each new token attends to those before it and to itself."""
    alone = [float(candidate(past + i, 1, weights, *model)[0]) for i in range(new)]
    got = candidate(past, new, weights, *model, sequences=texts)[0]
    what = f"the operations for {new} tokens of {texts} texts"
    expect_close(got, texts * sum(alone), what, rtol=1e-6, reveal=True)
    expect(min(alone) > 0, "reading a token takes no operations")


@work.check(
    points=2,
    hint="A matrix was fetched from memory, and two texts wait for it. Must it be fetched twice? "
    "And for two tokens of one text?",
    past=PASTS,
    new=st.sampled_from((1, 2, 100)),
    weights=WEIGHTS,
    model=models(),
    texts=TEXTS,
    bits=st.sampled_from((None, 16, 8, 4, 32)),
)
def weights_move_once_for_all(candidate, past, new, weights, model, texts, bits):
    """Without a cache (no layers have one), the bytes are those of the weights, however many tokens
    and texts are read."""
    got = candidate(past, new, weights, *layerless(model), **given(sequences=texts, bits=bits))[1]
    want = weights * (16 if bits is None else bits) // 8
    expect_close(got, want, "the number of bytes", rtol=1e-9, reveal=True)


@work.check(
    points=2,
    hint="Which keys and values are read, and which are written? How many key heads has a layer, "
    "and whose cache is it?",
    past=PASTS,
    new=st.sampled_from((1, 2, 100)),
    weights=WEIGHTS,
    model=models(),
    texts=TEXTS,
    bits=st.sampled_from((None, 8, 4, 32)),
)
def keys_and_values_of_all_tokens_move(candidate, past, new, weights, model, texts, bits):
    """The cache adds its bytes for the past and the new tokens of every text."""
    options = given(sequences=texts, bits=bits)
    without = float(candidate(past, new, weights, *layerless(model), **options)[1])
    more = float(candidate(past, new, weights, *model, **options)[1]) - without
    want = cache_bytes(past + new, model[0], *model[2:], **options)
    expect_close(more, want, "what the cache adds to the bytes", rtol=1e-6, reveal=True)


@work.check(
    points=1,
    hint="How many tokens can there be before, how many new ones at least, and how many texts? "
    "Look at the docstring under Raises.",
    bad=[
        (ValueError, (-1, 2, 1000, 2, 4, 2, 8)),
        (ValueError, (0, 0, 1000, 2, 4, 2, 8)),
        (ValueError, (5, -1, 1000, 2, 4, 2, 8)),
        (ValueError, (5, 0, 1000, 2, 4, 2, 8)),
        (ValueError, (5, 2, 1000, 2, 4, 2, 8, 0)),
        (TypeError, (1.5, 2, 1000, 2, 4, 2, 8)),
        (TypeError, (5, 1.5, 1000, 2, 4, 2, 8)),
        (TypeError, (0.5, 1.5, 1000, 2, 4, 2, 8)),
        (TypeError, (5, 2, 1000, 2, 4, 2, 8, 1.5)),
    ],
)
def impossible_counts_are_refused(candidate, bad):
    """A past below 0, no new tokens or no texts raise ValueError; what is no whole number raises
    TypeError."""
    kind, args = bad
    expect_error(candidate, kind, *args)


def _work(
    past,
    new,
    weights,
    layers,
    heads,
    kv_heads,
    head_dim,
    sequences,
    bits,
    pairs=None,  # of a query and a key that it looks at
    a_weight=2,  # operations
    a_pair=4,  # operations for each number of a head
    weights_move=1,  # times
    in_cache=None,  # tokens whose keys and values move
    caches=None,
):
    """forward_work, open where people go wrong; what is out of range is refused."""
    forward_work(past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    pairs = new * past + new * (new + 1) // 2 if pairs is None else pairs
    in_cache = past + new if in_cache is None else in_cache
    caches = sequences if caches is None else caches
    operations = a_weight * weights * new + a_pair * layers * heads * head_dim * pairs
    moved = weights * weights_move * bits // 8
    return operations * sequences, moved + 4 * layers * kv_heads * head_dim * in_cache * caches * (
        bits
    ) // 16


@work.misconception(
    "You count a multiplication and the addition that follows as one operation. They are two, for "
    "a weight as for a pair of a query and a key."
)
def multiply_and_add_is_one(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    return _work(*sizes, a_weight=1, a_pair=2)


@work.misconception(
    "You count one product of attention. There are two: queries with keys, and weights with values."
)
def one_product_of_attention(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    return _work(*sizes, a_pair=2)


@work.misconception(
    "You let every new token attend to all new tokens. It sees itself and those before it: of n "
    "new ones the first sees 1 and the last n."
)
def sees_what_comes_later(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    return _work(*sizes, pairs=new * (past + new))


@work.misconception(
    "You leave out that a token attends to itself. Its own key is in the cache by then."
)
def does_not_see_itself(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    return _work(*sizes, pairs=new * past + new * (new - 1) // 2)


@work.misconception(
    "Your new tokens attend to each other only. The cache is there so that they can attend to the "
    "past without its being read again."
)
def forgets_the_past(past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    return _work(*sizes, pairs=new * (new + 1) // 2)


@work.misconception(
    "You count the operations of attention by key heads. Grouped queries share keys, so fewer "
    "bytes move; but every query head still does its own products."
)
def operations_by_key_heads(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, kv_heads, kv_heads, head_dim, sequences, bits)
    return _work(*sizes)


@work.misconception(
    "Your cache has a key for every query head. Query heads of a group share one: only kv_heads "
    "keys and values are kept."
)
def a_key_for_every_query_head(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, heads, head_dim, sequences, bits)
    return _work(*sizes)


@work.misconception(
    "You move the weights once for each text. They are fetched once and serve all texts of the "
    "call: that is what makes generating many texts at once cheap."
)
def weights_move_for_every_text(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    return _work(*sizes, weights_move=sequences)


@work.misconception(
    "You move the weights once for each new token. In one call they are fetched once: that is why "
    "prefill is limited by operations and not by bytes."
)
def weights_move_for_every_token(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    return _work(*sizes, weights_move=new)


@work.misconception(
    "You count one cache for all texts. The weights are shared, the cache is not: every text has "
    "its own tokens."
)
def one_cache_for_all_texts(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    return _work(*sizes, caches=1)


@work.misconception(
    "You move the cache of the past only. The keys and values of the new tokens must be written."
)
def new_tokens_are_not_written(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    return _work(*sizes, in_cache=past)


@work.misconception(
    "You count the operations of one text. Weights move once for all texts, but every text is "
    "multiplied by them."
)
def operations_of_one_text(
    past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16
):
    sizes = (past, new, weights, layers, heads, kv_heads, head_dim)
    _, moved = _work(*sizes, sequences, bits)
    return _work(*sizes, 1, bits)[0], moved


@work.accepts("a loop over the new tokens, one text after the other")
def token_by_token(past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16):
    _work(past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    operations = 0
    for _text in range(sequences):
        for i in range(new):
            seen = past + i + 1
            products = [head_dim * seen] * 2
            operations += 2 * (weights + layers * heads * sum(products))
    cache = cache_bytes(past + new, layers, kv_heads, head_dim, sequences, bits)
    return operations, weights * bits // 8 + cache


@work.accepts("the formula with floats, in a list")
def formula(past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16):
    _work(past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    N, B, L, h, d, m, n = weights, sequences, layers, heads, head_dim, past, new
    operations = 2.0 * N * n * B + 4.0 * L * h * d * (n * m + n * (n + 1) / 2) * B
    return [operations, (N + 2 * L * kv_heads * d * (m + n) * B) * bits / 8]


@work.accepts("the pairs counted in a mask")
def pairs_of_a_mask(past, new, weights, layers, heads, kv_heads, head_dim, sequences=1, bits=16):
    _work(past, new, weights, layers, heads, kv_heads, head_dim, sequences, bits)
    pairs = torch.ones(new, past + new).tril(past).sum().long()
    flops = 2 * sequences * (weights * new + 2 * layers * heads * head_dim * pairs)
    return flops, np.int64(weights) * bits // 8 + cache_bytes(
        past + new, layers, kv_heads, head_dim, sequences, bits
    )


# --- 3. softmax_off_by_one -----------------------------------------------------------------------

CANCELS = "what is subtracted cancels; 1 above or below the largest score is as good"

quiet = Exercise(
    softmax_off_by_one,
    paper="Miller 2023 (evanmiller.org/attention-is-off-by-one.html)",
    difficulty=2,
    minutes=10,
    equivalent={
        "m = scores.amax(dim=-1, keepdim=True).clamp(min=0)  ->  m = scores.amax(dim=-1, "
        f"keepdim=True).clamp(min={other})": CANCELS
        for other in (1, -1)
    },
)

MILD = ("whole", "normal", "positive", "negative", "ties", "sparse", "constant", "zeros")


@quiet.check(
    points=3,
    hint="Let all scores of a row be far below 0. What are the exponentials, and what is left of "
    "the fraction: a row of zeros, or a row that sums to 1 as ever?",
    scores=tensors(st.integers(1, 6).map(lambda n: (n,)), MILD),
    shift=st.sampled_from((0.0, -20.0, 2.0, -3.0, -200.0)),
)
def a_row_may_sum_to_less_than_1(candidate, scores, shift):
    """With s the sum of the exponentials of a row, the result sums to s / (1 + s)."""
    got = as_double(candidate(scores + shift))
    expect_shape(got, scores.shape, "the result")
    s = as_double(scores + shift).exp().sum()
    expect_close(got.sum(), s / (1 + s), "the sum of the row", atol=1e-6, reveal=True)


@quiet.check(
    points=2,
    hint="Take two tokens of a row. Does the 1 in the denominator change which has more, or how "
    "many times more?",
    scores=tensors(st.integers(2, 6).map(lambda n: (n,)), MILD),
)
def tokens_share_as_in_softmax(candidate, scores):
    """Whatever a row sums to, each token's part of it is what softmax gives the token."""
    got = as_double(candidate(scores))
    expect_shape(got, scores.shape, "the result")
    expect(got.sum() > 0, "the row sums to 0 or less, or is not a number", got=got)
    want = as_double(scores).softmax(0)
    expect_close(got / got.sum(), want, "a token's part of the row", rtol=1e-4, atol=1e-5)


@quiet.check(
    points=2,
    hint="Over which dimension does the sum in the denominator run, and which must it leave alone?",
    lead=LEADS,
    tokens=st.integers(1, 5),
    seed=SEEDS,
    layout=st.sampled_from(LAYOUTS),
)
def every_row_is_by_itself(candidate, lead, tokens, seed, layout):
    """With any number of dimensions, the result has the shape of the scores, and each row along the
    last dimension is the result for that row alone, with numbers between 0 and 1."""
    scores = arrange(floats(generator(seed).standard_normal((*lead, tokens)).round(2) * 3), layout)
    alone = torch.stack([as_double(candidate(row)) for row in rows_of(scores)])
    got = as_double(candidate(scores))
    expect_shape(got, scores.shape, "the result")
    expect_close(got.reshape(alone.shape), alone, "a row", rtol=1e-4)
    expect((got >= 0) & (got <= 1 + 1e-6), "a number is not between 0 and 1", got=got)


@quiet.check(
    points=2,
    hint="How large may a number be before its exponential is infinite in float32? Softmax has the "
    "same trouble: what can both halves of the fraction be multiplied by?",
    scores=tensors(st.integers(1, 5).map(lambda n: (n,)), MILD),
    shift=st.sampled_from((150.0, 500.0, 3000.0)),
    low=st.booleans(),
)
def large_scores_do_not_overflow(candidate, scores, shift, low):
    """Where a score is in the hundreds or thousands, all numbers are finite, and tokens share as in
    softmax; and so are those of another row with small scores."""
    scores = scores + shift
    if low:
        scores = torch.cat([scores, scores[:1] - 400])
    got = as_double(candidate(scores))
    expect_shape(got, scores.shape, "the result")
    expect(torch.isfinite(got), "a number is not finite", got=got)
    expect(got.sum() > 0, "the row sums to 0 or less", got=got)
    want = as_double(scores).softmax(0)
    expect_close(got / got.sum(), want, "a token's part of the row", rtol=1e-3, atol=1e-4)
    both = as_double(candidate(torch.stack([scores, torch.zeros_like(scores)])))
    expect(both.isfinite(), "a number is not finite", got=both)


@quiet.check(
    points=1,
    hint="What is the exponential of minus infinity? If nothing else is in the row, what do you "
    "subtract from it before you take the exponential?",
    scores=tensors(st.integers(0, 4).map(lambda n: (n,)), MILD),
    masked=st.integers(1, 3),
)
def hidden_tokens_get_nothing(candidate, scores, masked):
    """A score of -inf makes a 0 and leaves the others as they were; a row of nothing else makes
    zeros."""
    row = torch.cat([scores, torch.full((masked,), -INF)])
    got = as_double(candidate(row))
    expect_shape(got, row.shape, "the result")
    expect_equal(got[len(scores) :], torch.zeros(masked), "what hidden tokens get", reveal=True)
    if len(scores):
        expect_close(got[: len(scores)], candidate(scores), "what the others get", rtol=1e-4)


@quiet.check(
    points=1,
    hint="What type have scores? Look at the docstring under Raises.",
    dtype=[torch.int64, torch.int32, torch.int8, torch.bool],
    shape=[(2,), (2, 3)],
)
def scores_of_whole_numbers_are_refused(candidate, dtype, shape):
    """Scores of an integer type raise TypeError."""
    expect_error(candidate, TypeError, torch.ones(shape, dtype=dtype))


def _shifted(scores, m):
    """exp(x - m), and the sum over each row; whole numbers are refused."""
    softmax_off_by_one(scores)
    e = (scores - m).exp()
    return e, e.sum(dim=-1, keepdim=True)


@quiet.misconception(
    "This is softmax: every row sums to 1, and a head with nothing to say must still look "
    "somewhere. The denominator has a 1 more."
)
def plain_softmax(scores):
    softmax_off_by_one(scores)
    return scores.softmax(-1).nan_to_num(0.0)


@quiet.misconception(
    "You subtract the largest score, as a stable softmax does, but leave the 1 as it was. Both "
    "halves of the fraction are multiplied by exp(-m): the 1 becomes exp(-m) too."
)
def one_is_not_shifted(scores):
    e, total = _shifted(scores, scores.amax(-1, keepdim=True).clamp(min=-1e30))
    return e / (1 + total)


@quiet.misconception(
    "You add 1 to the exponentials' sum as they are, and large scores overflow: infinity over "
    "infinity is not a number. Subtract the largest score first, and mind what becomes of the 1."
)
def overflows(scores):
    e, total = _shifted(scores, 0)
    return e / (1 + total)


@quiet.misconception(
    "You take the sigmoid of every score. So it is for a row of one token; the others of a row "
    "belong into the denominator too."
)
def sigmoid_of_each(scores):
    softmax_off_by_one(scores)
    return scores.sigmoid()


@quiet.misconception(
    "You add the 1 after the softmax. Its row sums to 1 already, so that halves everything. The 1 "
    "stands beside the exponentials."
)
def one_after_the_softmax(scores):
    p = plain_softmax(scores)
    return p / (1 + p.sum(-1, keepdim=True))


@quiet.misconception(
    "You add 1 for each token: 1 + exp(x) in the sum. There is one 1 in a row, that of the key "
    "that is not there."
)
def a_one_for_every_token(scores):
    m = scores.amax(-1, keepdim=True).clamp(min=0)
    e, total = _shifted(scores, m)
    return e / (scores.shape[-1] * (-m).exp() + total)


@quiet.misconception(
    "You subtract the largest score even where it is -inf: -inf minus -inf is not a number. The 1 "
    "in the denominator has a score as well, 0; take the largest of them all."
)
def largest_of_a_hidden_row(scores):
    m = scores.amax(-1, keepdim=True)
    e, total = _shifted(scores, m)
    return e / ((-m).exp() + total)


@quiet.misconception(
    "Your sum runs over the first dimension. It runs over the tokens, the last dimension."
)
def sum_over_the_first_dimension(scores):
    softmax_off_by_one(scores)
    return softmax_off_by_one(scores.transpose(0, -1)).transpose(0, -1)


@quiet.misconception(
    "You sum over everything that was passed. Every row along the last dimension has a denominator "
    "of its own."
)
def one_denominator_for_all(scores):
    return softmax_off_by_one(scores.flatten()).reshape(scores.shape)


@quiet.misconception(
    "Your result has one number more: that of the score 0 you put beside the others. It is what "
    "the head does not give to anybody; leave it out at the end."
)
def keeps_the_zero(scores):
    softmax_off_by_one(scores)
    return F.pad(scores, (0, 1)).softmax(-1)


@quiet.accepts("softmax with a score of 0 more, which is cut off again")
def zero_beside_the_others(scores):
    if not scores.is_floating_point():
        raise TypeError("floats, please")
    return F.pad(scores, (1, 0)).softmax(dim=-1)[..., 1:]


@quiet.accepts("logarithms: x - log(1 + sum exp)")
def logarithms(scores):
    if not torch.is_floating_point(scores):
        raise TypeError("floats, please")
    x = scores.double()
    return (x - F.softplus(x.logsumexp(dim=-1, keepdim=True))).exp().to(scores.dtype)


@quiet.accepts("rows one after the other, NumPy")
def numpy_rows(scores):
    if not torch.is_floating_point(scores):
        raise TypeError("floats, please")
    x = scores.double().numpy()
    result = np.empty_like(x)
    for place in np.ndindex(x.shape[:-1]):
        top = max(0.0, x[place].max())
        e = np.exp(x[place] - top)
        result[place] = e / (np.exp(-top) + e.sum())
    return result


# --- 4. kept_tokens ------------------------------------------------------------------------------

keep = Exercise(
    kept_tokens,
    paper="Zhang et al. 2023 (arXiv 2306.14048), section 4; Xiao et al. 2023 (arXiv 2309.17453)",
    difficulty=2,
    minutes=10,
    equivalent={
        "order = scores.argsort(dim=-1, stable=True)  ->  order = "
        "scores.argsort(stable=True)": LAST,
        "return order[..., -budget:].sort(dim=-1).values  ->  return order[..., "
        "-budget:].sort().values": LAST,
    },
)


@st.composite
def distinct(
    draw: st.DrawFn, lead: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]] = (), most: int = 8
) -> Tensor:
    """At least 2 scores in each row, no two of which are equal; the largest may be infinite."""
    lead = lead if isinstance(lead, tuple) else draw(lead)
    tokens = draw(st.integers(2, most))
    rng = generator(draw(SEEDS))
    scores = rng.permuted(np.broadcast_to(np.arange(tokens), (*lead, tokens)).copy(), axis=-1)
    step, low = draw(st.sampled_from(((1.0, 0.0), (0.25, -1.0), (100.0, -700.0))))
    scores = scores * step + low
    if draw(st.booleans()):
        scores[scores == scores.max()] = INF
    return arrange(floats(scores), draw(st.sampled_from(LAYOUTS)))


def places(got: Tensor, count: int, what: str = "the result") -> list[float]:
    """Places in ascending order, whatever order they come in."""
    got = as_double(got)
    expect_shape(got, (count,), what)
    return sorted(got.tolist())


@keep.check(
    points=3,
    hint="Sort the scores by hand and mark the largest. What is asked for: these scores, or where "
    "they stand?",
    scores=distinct(),
    share=st.floats(0, 0.99),
)
def the_largest_scores_are_kept(candidate, scores, share):
    """Of different scores in a row, the places of the `budget` largest are returned (here in any
    order)."""
    budget = 1 + int(share * (len(scores) - 1))
    got = places(candidate(scores, budget), budget)
    want = sorted(scores.topk(budget).indices.tolist())
    expect_equal(got, want, "the places", reveal=True)


@keep.check(
    points=2,
    hint="The cache reads in the order of the text. In which order are your places: by score, or "
    "from left to right?",
    scores=distinct(),
    share=st.floats(0, 0.99),
)
def places_go_from_left_to_right(candidate, scores, share):
    """The result holds `budget` different places of the row, in ascending order."""
    budget = min(2 + int(share * (len(scores) - 1)), len(scores) - 1) or 1
    got = candidate(scores, budget)
    expect_shape(got, (budget,), "the result")
    expect_integers(got, "the places", 0, len(scores) - 1)
    expect(as_double(got).diff() > 0, "the places do not ascend", got=got)


@keep.check(
    points=2,
    hint="Let all scores be equal. Which tokens should stay, and which do you keep? Does your way "
    "of sorting leave equals in their order?",
    ranks=st.lists(st.integers(0, 2), min_size=2, max_size=12)
    | st.lists(st.integers(0, 2), min_size=24, max_size=40),  # sorting is another matter then
    share=st.floats(0, 0.99),
    top=st.sampled_from((2.0, INF)),
)
def of_equal_scores_the_later_is_kept(candidate, ranks, share, top):
    """Where some of several equal scores are kept and some are not, it is the later ones that are;
    infinite scores are equal too."""
    scores = torch.tensor([(0.5, 1.0, top)[rank] for rank in ranks])
    budget = 1 + int(share * (len(ranks) - 1))
    got = places(candidate(scores, budget), budget)
    for value in scores.unique():
        alike = [i for i, score in enumerate(scores) if score == value]
        kept = [i for i in got if i in alike]
        later = alike[len(alike) - len(kept) :]
        expect(kept == later, f"of those that score {value:g}, others are kept", got, later)
    expect(set(got) <= set(range(len(ranks))), "the result holds other things than places", got)


@keep.check(
    points=2,
    hint="Two heads may want different tokens. Along which dimension do you sort, and along which "
    "do you cut off?",
    scores=distinct(LEADS, most=6),
    share=st.floats(0, 0.99),
)
def every_head_keeps_its_own(candidate, scores, share):
    """With any number of leading dimensions, each row of scores gets the places it gets alone."""
    budget = 1 + int(share * (scores.shape[-1] - 1))
    alone = [places(candidate(row, budget), budget, "a row alone") for row in rows_of(scores)]
    got = as_double(candidate(scores, budget))
    expect_shape(got, (*scores.shape[:-1], budget), "the result")
    expect_integers(got, "the places", 0, scores.shape[-1] - 1)
    together = got.reshape(len(alone), budget).sort().values
    expect_equal(together, alone, "the places", reveal=True)


@keep.check(
    points=1,
    hint="A text has just begun, and there is room for all of it. What should stay, and does your "
    "function take a budget that is larger than the row?",
    scores=distinct(),
    more=st.sampled_from((0, 1, 5, 100)),
)
def a_large_budget_keeps_all(candidate, scores, more):
    """Where the budget is not below the number of tokens, the places of all are returned."""
    got = places(candidate(scores, len(scores) + more), len(scores))
    expect_equal(got, list(range(len(scores))), "the places", reveal=True)


@keep.check(
    points=1,
    hint="What would be left of a cache with a budget of 0, and what does the docstring say of it?",
    budget=[0, -1, -2],
    shape=[(4,), (2, 4)],
)
def a_budget_below_1_is_refused(candidate, budget, shape):
    """A budget of 0 or less raises ValueError."""
    expect_error(candidate, ValueError, torch.arange(math.prod(shape)).float().view(shape), budget)


def _order(scores, budget):
    """Places of ascending scores, of equals the later last; a budget below 1 is refused."""
    kept_tokens(scores, budget)
    return scores.argsort(dim=-1, stable=True)


@keep.misconception(
    "You return the places by score. The cache gathers tokens in the order it is given: they must "
    "stay in the order of the text."
)
def sorted_by_score(scores, budget):
    return _order(scores, budget).flip(-1)[..., :budget]


@keep.misconception(
    "You keep the smallest scores. A high score is a reason to stay: it is the smallest that go."
)
def keeps_the_smallest(scores, budget):
    return kept_tokens(-scores, budget)


@keep.misconception(
    "Of equal scores you keep the earlier. A descending sort leaves equals in the order they stood "
    "in, so that the first of them comes out on top."
)
def earlier_of_equals(scores, budget):
    _order(scores, budget)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :budget].sort(dim=-1).values


@keep.misconception("You return which tokens go. Asked for are the places of those that stay.")
def those_that_go(scores, budget):
    return _order(scores, budget)[..., : max(scores.shape[-1] - budget, 0)].sort(dim=-1).values


@keep.misconception(
    "You return the scores that are kept. The cache must know where they stand, to gather keys and "
    "values there."
)
def scores_for_places(scores, budget):
    return scores.gather(-1, kept_tokens(scores, budget))


@keep.misconception(
    "You return a mask, with an element for every token. Asked for are the places of those that "
    "stay."
)
def mask_for_places(scores, budget):
    index = kept_tokens(scores, budget)
    return torch.zeros_like(scores).scatter(-1, index, 1.0).bool()


@keep.misconception(
    "You let the heads agree: the scores are summed over them, and all keep the same tokens. Every "
    "head keeps what it needs itself."
)
def heads_agree(scores, budget):
    together = scores.reshape(-1, scores.shape[-1]).sum(0)
    return kept_tokens(together.expand(scores.shape).contiguous(), budget)


@keep.misconception(
    "You keep the latest tokens whatever they score. That is a window; here the scores decide, "
    "and the place only between equals."
)
def latest_tokens(scores, budget):
    return kept_tokens(torch.zeros_like(scores), budget)


@keep.misconception(
    "You ask topk for more than there is, which it refuses. A cache that is not full yet keeps "
    "everything: take the smaller of the budget and the number of tokens."
)
def more_than_there_is(scores, budget):
    _order(scores, budget)
    scores.topk(budget)
    return kept_tokens(scores, budget)


@keep.accepts("topk from the right, with the place as a tie-break")
def topk_of_pairs(scores, budget):
    if budget < 1:
        raise ValueError("at least 1")
    n = scores.shape[-1]
    ranks = (scores.unsqueeze(-1) > scores.unsqueeze(-2)).sum(-1) * n + torch.arange(n)
    return ranks.topk(min(budget, n)).indices.sort().values


@keep.accepts("sorted() on pairs of score and place")
def pairs_in_python(scores, budget):
    if budget <= 0:
        raise ValueError("at least 1")
    kept = []
    for row in scores.reshape(-1, scores.shape[-1]).tolist():
        pairs = sorted((score, place) for place, score in enumerate(row))
        kept.append(sorted(place for _, place in pairs[-budget:]))
    return torch.tensor(kept).reshape(*scores.shape[:-1], -1)


@keep.accepts("NumPy, one token evicted after the other")
def one_after_the_other(scores, budget):
    if budget < 1:
        raise ValueError("at least 1")
    rows = scores.double().numpy().reshape(-1, scores.shape[-1])
    kept = []
    for row in rows:
        left = list(range(len(row)))
        while len(left) > budget:
            left.pop(int(np.argmin(row[left])))  # the first of the smallest
        kept.append(left)
    return np.array(kept, dtype=np.int64).reshape(*scores.shape[:-1], -1)


# --- 5. streaming_llm_scores ---------------------------------------------------------------------

sinks_stay = Exercise(
    streaming_llm_scores,
    paper="Xiao et al. 2023 (arXiv 2309.17453), section 3.2",
    difficulty=1,
    minutes=5,
    equivalent={
        "…sinks, torch.inf, indices.float())  ->  …sinks, torch.inf, indices)": "infinity is a "
        "float32, and so is the result",
    },
)

Held = tuple[Tensor, int]  # indices of the tokens held, and how many of the first are sinks


@st.composite
def held(draw: st.DrawFn, heads: tuple[int, ...] = (), first: str = "all", gap: int = 1) -> Held:
    """Of the first tokens, which are sinks, "all", "some" or "any" number; and later ones, the
    earliest of which stands at least ``gap`` after the last sink."""
    sinks = draw(st.integers(2 if first == "some" else 1, 5))
    tokens = sinks + draw(st.integers(2, 6))
    rng = generator(draw(SEEDS))
    rows = []
    for _ in range(math.prod(heads)):
        most = sinks - (first == "some")
        count = sinks if first == "all" else int(rng.integers(1, most + 1))
        early = rng.choice(sinks, size=count, replace=False)
        late = sinks - 1 + gap + rng.choice(16, size=tokens - count, replace=False)
        rows.append(np.sort(np.concatenate([early, late])))
    indices = torch.from_numpy(np.array(rows)).reshape(*heads, -1)
    return arrange(indices, draw(st.sampled_from(LAYOUTS))), sinks


def told_apart(got: Tensor, indices: Tensor, sinks: int) -> Tensor:
    """The scores, after a look at whether those of the sinks are anything special: where not, the
    rest of a check has nothing to judge."""
    got = as_double(got)
    expect_shape(got, indices.shape, "the result")
    expect(not got.isnan().any(), "a score is not a number", got=got)
    others = got[(indices > sinks) & got.isfinite()].abs()
    largest = float(others.max()) if len(others) else 0.0
    expect(got[indices < sinks].abs() > largest, "the first tokens do not stand out", got=got)
    return got


@sinks_stay.check(
    points=3,
    hint="What must the score of a token be so that no other, however late, can ever be above it?",
    drawn=held(gap=2),
)
def the_first_tokens_of_the_text_are_infinite(candidate, drawn):
    """Tokens whose index is below `sinks` score plus infinity."""
    indices, sinks = drawn
    got = as_double(candidate(indices, sinks))
    expect_shape(got, indices.shape, "the result")
    expect(got[indices < sinks] == INF, "a score of the first tokens is not infinite", got=got)


@sinks_stay.check(
    points=2,
    hint="Let the first token be lost and the second be held. What does `indices` say of it, and "
    "what its place in the cache? And with one sink, which index does it have?",
    drawn=held() | held(first="some"),
)
def no_other_token_is_protected(candidate, drawn):
    """Tokens whose index is `sinks` or above have finite scores, wherever they stand in the cache;
    without sinks, all tokens have."""
    indices, sinks = drawn
    got = as_double(candidate(indices, 0))
    expect_shape(got, indices.shape, "the result")
    expect(got.isfinite(), "without sinks, the score of a token is infinite", got=got)
    got = told_apart(candidate(indices, sinks), indices, sinks)
    expect(got[indices >= sinks].isfinite(), "the score of another token is infinite", got=got)


@sinks_stay.check(
    points=2,
    hint="Of the tokens after the sinks, which should go first, and which should have the lowest "
    "score then?",
    drawn=held(gap=2),
)
def the_later_the_higher(candidate, drawn):
    """Of the tokens after the sinks, a later one scores higher."""
    indices, sinks = drawn
    got = told_apart(candidate(indices, sinks), indices, sinks)
    later = got[indices > sinks].diff()
    expect(later > 0, "a later token does not score higher than an earlier one", got=got)


@sinks_stay.check(
    points=1,
    hint="How many different whole numbers can your type tell apart? Half precision ends at 2048.",
    start=st.sampled_from((3000, 70_000, 1_000_000, 2**24 - 10)),
    count=st.integers(2, 8),
)
def neighbours_late_in_a_text_are_told_apart(candidate, start, count):
    """Millions of tokens into a text, two that follow each other have different finite scores."""
    indices = torch.tensor([0, *range(start, start + count)])
    got = told_apart(candidate(indices, 1), indices, 1)
    expect(got[1:].isfinite(), "a score is not finite", got=got)
    expect(len(got[1:].unique()) == count, "two tokens have the same score", got=got)


@sinks_stay.check(
    points=2,
    hint="Heads hold different tokens. Which of your steps looks at one row only, or takes "
    "something from all of them together?",
    drawn=LEADS.flatmap(lambda heads: held(heads, first="any", gap=2)),
)
def every_head_has_its_own_tokens(candidate, drawn):
    """With any number of leading dimensions, each row is treated as alone: the same tokens are
    protected, and the others stand in the same order."""
    indices, sinks = drawn
    got = told_apart(candidate(indices, sinks), indices, sinks)
    for row, scores in zip(rows_of(indices), rows_of(got), strict=True):
        alone = as_double(candidate(row, sinks))
        expect_shape(alone, row.shape, "the result for a row alone")
        expect_equal(scores.isinf(), alone.isinf(), "which tokens of a row are infinite")
        order = alone.argsort(stable=True)
        expect_equal(scores.argsort(stable=True), order, "the order of a row's scores")


@sinks_stay.check(
    points=1,
    hint="How many sinks can there be at least? Look at the docstring under Raises.",
    bad=[(ValueError, -1), (ValueError, -4), (TypeError, 1.5), (TypeError, 2.0)],
)
def a_number_of_sinks_that_cannot_be_is_refused(candidate, bad):
    """Fewer than 0 sinks raise ValueError; a number that is not whole raises TypeError."""
    kind, sinks = bad
    expect_error(candidate, kind, torch.arange(5), sinks)


def _protected(indices, sinks, where, rest=None, score=INF):
    """`score` where a token is protected, and the others' scores; a bad count is refused."""
    streaming_llm_scores(indices, sinks)
    return torch.where(where, score, indices.float() if rest is None else rest)


@sinks_stay.misconception(
    "You look at the place in the cache. The sinks are the first tokens of the *text*: `indices` "
    "says when each token was read."
)
def place_in_the_cache(indices, sinks):
    return _protected(indices, sinks, torch.arange(indices.shape[-1]) < sinks)


@sinks_stay.misconception(
    "You protect one token too many: counted from 0, the first `sinks` tokens end at sinks - 1."
)
def one_too_many(indices, sinks):
    return _protected(indices, sinks, indices <= sinks)


@sinks_stay.misconception(
    "Earlier tokens score higher in your window. It is the oldest that leaves: its score must be "
    "the lowest."
)
def earlier_is_higher(indices, sinks):
    return _protected(indices, sinks, indices < sinks, -indices.float())


@sinks_stay.misconception(
    "You give the sinks minus infinity, as a mask does that hides tokens. Here the largest scores "
    "are kept."
)
def minus_infinity(indices, sinks):
    return _protected(indices, sinks, indices < sinks, score=-INF)


@sinks_stay.misconception(
    "You forget the sinks: that is a plain window. The first tokens must stay however late it gets."
)
def plain_window(indices, sinks):
    return _protected(indices, sinks, indices < 0)


@sinks_stay.misconception(
    "You protect the latest tokens. They have the highest scores anyway; it is the first of the "
    "text that would go."
)
def protects_the_latest(indices, sinks):
    latest = torch.arange(indices.shape[-1]) >= indices.shape[-1] - sinks
    return _protected(indices, sinks, latest)


@sinks_stay.misconception(
    "You give the sinks a large score, and all is well until the text is longer than that. No "
    "index is above infinity."
)
def large_is_not_infinite(indices, sinks):
    return _protected(indices, sinks, indices < sinks, score=1e9)


@sinks_stay.misconception(
    "All your other tokens score alike. A cache that keeps the later of equals would hide it, but "
    "asked for are scores that grow with the index."
)
def others_are_alike(indices, sinks):
    return _protected(indices, sinks, indices < sinks, torch.zeros(indices.shape))


@sinks_stay.misconception(
    "You score in half precision. Above 2048 it cannot tell a token from the next, and above 65504 "
    "every token is infinite."
)
def half_precision(indices, sinks):
    return _protected(indices, sinks, indices < sinks, indices.half()).half()


@sinks_stay.misconception(
    "You look at the indices of one head and use them for all. Heads may hold different tokens."
)
def one_head_for_all(indices, sinks):
    first = indices.reshape(-1, indices.shape[-1])[0].expand(indices.shape)
    return _protected(first, sinks, first < sinks)


@sinks_stay.accepts("distance to the latest token, in float64")
def distance_to_the_latest(indices, sinks):
    if not isinstance(sinks, int):
        raise TypeError("a whole number")
    if sinks < 0:
        raise ValueError("at least 0")
    scores = indices.double() - indices.max()
    scores[indices < sinks] = INF
    return scores


@sinks_stay.accepts("a loop over Python numbers")
def python_numbers(indices, sinks):
    if not isinstance(sinks, int):
        raise TypeError("a whole number")
    if sinks < 0:
        raise ValueError("at least 0")
    scores = [float(i) if i >= sinks else INF for i in indices.flatten().tolist()]
    return torch.tensor(scores).reshape(indices.shape)


@sinks_stay.accepts("NumPy, 1 / 0 for infinity")
def one_over_zero(indices, sinks):
    streaming_llm_scores(indices, sinks)
    i = indices.numpy().astype(np.float64)
    return np.divide(i + 1, i >= sinks)


# --- 6. accumulate_attention ---------------------------------------------------------------------

heavy = Exercise(
    accumulate_attention,
    paper="Zhang et al. 2023 (arXiv 2306.14048), section 4, algorithm 1",
    difficulty=2,
    minutes=10,
)

Attended = tuple[Tensor, Tensor]  # sums [batch, heads, tokens], weights [.., group, new, tokens]


@st.composite
def attended(
    draw: st.DrawFn,
    batch: tuple[int, int] = (1, 1),
    heads: tuple[int, int] = (1, 1),
    group: tuple[int, int] = (1, 1),
    new: tuple[int, int] = (1, 1),
) -> Attended:
    """Sums, and attention weights in which no query sees a token after its own."""
    b, h, g, n = (draw(st.integers(*span)) for span in (batch, heads, group, new))
    tokens = n + draw(st.integers(1, 4))
    rng = generator(draw(SEEDS))
    scores = floats(rng.standard_normal((b, h, g, n, tokens)) * 2)
    later = torch.ones(n, tokens, dtype=torch.bool).triu(tokens - n + 1)
    weights = scores.masked_fill(later, -INF).softmax(-1)
    sums = floats(rng.uniform(0, 5, (b, h, tokens)).round(2))
    return sums, arrange(weights, draw(st.sampled_from(LAYOUTS)))


def added(candidate, attention: Tensor) -> Tensor:
    """What the candidate makes of some attention if there was none before."""
    b, h, _, _, tokens = attention.shape
    got = as_double(candidate(torch.zeros(b, h, tokens), attention))
    expect_shape(got, (b, h, tokens), "the result")
    expect(got.sum() > 0, "attention adds nothing to sums of 0", got=got)
    return got


@heavy.check(
    points=2,
    hint="Take one query and one head. What has a token received before, what does it receive now?",
    drawn=attended(),
)
def attention_is_added_to_what_was_there(candidate, drawn):
    """For one query of one head, each token's sum grows by the weight that the query gives it."""
    sums, attention = drawn
    got = candidate(sums, attention)
    want = as_double(sums) + as_double(attention)[:, :, 0, 0]
    expect_close(got, want, "the sums", reveal=True)


@heavy.check(
    points=3,
    hint="A prompt of three tokens is read. How many rows of weights are there, and which of them "
    "count?",
    drawn=attended(new=(2, 5)),
)
def all_new_queries_are_summed(candidate, drawn):
    """Several queries add as much as the same queries add one after the other."""
    _, attention = drawn
    alone = [added(candidate, attention[:, :, :, i : i + 1]) for i in range(attention.shape[3])]
    expect_close(added(candidate, attention), sum(alone), "what they add", reveal=True)


@heavy.check(
    points=2,
    hint="Two query heads share a key head: it keeps one set of tokens for both. How much does a "
    "token matter that both of them look at?",
    drawn=attended(group=(2, 4)),
)
def the_heads_of_a_group_are_summed(candidate, drawn):
    """Query heads that share a key head add as much together as each of them adds alone."""
    _, attention = drawn
    alone = [added(candidate, attention[:, :, i : i + 1]) for i in range(attention.shape[2])]
    expect_close(added(candidate, attention), sum(alone), "what they add", reveal=True)


@heavy.check(
    points=2,
    hint="Which of the five dimensions are summed away? The others must still be there afterwards, "
    "in their order.",
    drawn=attended(batch=(1, 3), heads=(2, 3)),
)
def texts_and_key_heads_stay_apart(candidate, drawn):
    """Every key head of every text has the sums that it would have if it were alone."""
    _, attention = drawn
    alone = [
        torch.cat([added(candidate, head[None, None])[0] for head in text]) for text in attention
    ]
    expect_close(added(candidate, attention), torch.stack(alone), "what is added", reveal=True)


@heavy.check(
    points=1,
    hint="Add up a hundred numbers that have three digits each. How many digits has the sum, and "
    "in which type do you hold it?",
    examples=20,
    new=st.sampled_from((16, 64, 100)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=SEEDS,
)
def weights_in_half_precision_are_summed_in_float32(candidate, new, dtype, seed):
    """Weights in half precision add as much to sums in float32 as the same numbers in float32."""
    weights = floats(generator(seed).uniform(0.1, 1, (1, 1, 1, new, 3))).to(dtype)
    got, want = added(candidate, weights), added(candidate, weights.float())
    what = f"what {new} queries in {str(dtype).removeprefix('torch.')} add"
    expect_close(got, want, what, rtol=2e-5)


@heavy.check(
    points=1,
    hint="PyTorch repeats a dimension of 1 without a word. Which dimensions of the two tensors "
    "must be the same?",
    bad=[
        ((1, 2, 3), (1, 2, 1, 1, 4)),
        ((1, 2, 3), (1, 2, 1, 1, 1)),
        ((1, 2, 1), (1, 2, 1, 1, 3)),
        ((1, 2, 3), (1, 1, 2, 1, 3)),
        ((1, 2, 3), (2, 2, 1, 1, 3)),
        ((2, 2, 3), (1, 2, 1, 1, 3)),
        ((1, 2, 3), (1, 2, 1, 3)),
        ((1, 2, 3), (1, 2, 3)),
    ],
)
def attention_that_does_not_fit_is_refused(candidate, bad):
    """Attention of another batch, of other key heads or tokens than the sums have raises
    ValueError."""
    sums, attention = bad
    expect_error(candidate, ValueError, torch.zeros(sums), torch.ones(attention) / attention[-1])


def _weights(sums, attention):
    """The weights in the type of sums; what does not fit is refused."""
    accumulate_attention(sums, attention)
    return attention.to(sums.dtype)


@heavy.misconception(
    "You forget what was there: only the attention of the new queries is left. A token that was "
    "looked at long ago keeps what it has received."
)
def forgets_the_past_sums(sums, attention):
    return _weights(sums, attention).sum((2, 3))


@heavy.misconception(
    "You take the mean over the new queries. F is a sum: a chunk of ten queries counts ten times "
    "as much as a single one, or chunks of other lengths would keep other tokens."
)
def mean_over_queries(sums, attention):
    return sums + _weights(sums, attention).mean(3).sum(2)


@heavy.misconception(
    "You count the last query only. That is all there is when tokens come one by one; of a prompt "
    "every query counts."
)
def last_query_only(sums, attention):
    return sums + _weights(sums, attention)[:, :, :, -1].sum(2)


@heavy.misconception(
    "You take the mean over the heads of a group. They are summed, as the queries are."
)
def mean_over_the_group(sums, attention):
    return sums + _weights(sums, attention).sum(3).mean(2)


@heavy.misconception(
    "You take the largest weight of a group. All of its heads have a say: they are summed."
)
def largest_of_the_group(sums, attention):
    return sums + _weights(sums, attention).sum(3).amax(2)


@heavy.misconception(
    "You count the first head of each group only. Its key head serves the others too: all are "
    "summed."
)
def first_of_the_group(sums, attention):
    return sums + _weights(sums, attention)[:, :, 0].sum(2)


@heavy.misconception(
    "You sum over the key heads too. Each of them keeps tokens of its own: only the query heads of "
    "a group, and the new queries, are summed."
)
def all_heads_together(sums, attention):
    return sums + _weights(sums, attention).sum((1, 2, 3))[:, None]


@heavy.misconception(
    "You sum over the texts of the batch too. They have nothing to do with each other."
)
def all_texts_together(sums, attention):
    return sums + _weights(sums, attention).sum((0, 2, 3))


@heavy.misconception(
    "You sum over the tokens: what a query gives away sums to 1, always. Asked for is what each "
    "token receives; `tokens` is the dimension that stays."
)
def what_queries_give(sums, attention):
    return sums + _weights(sums, attention).sum((2, 4)).mean(2, keepdim=True)


@heavy.misconception(
    "You sum in half precision and widen the result. The digits are lost by then: widen first, or "
    "tell the sum which type to use."
)
def sums_in_half(sums, attention):
    _weights(sums, attention)
    return sums + attention.sum((2, 3))


@heavy.accepts("einsum")
def einsum(sums, attention):
    if attention.ndim != 5 or sums.shape != torch.Size([*attention.shape[:2], attention.shape[-1]]):
        raise ValueError("other shapes")
    return sums + torch.einsum("bhgqt->bht", attention.float())


@heavy.accepts("one query after the other, in place")
def one_query_after_the_other(sums, attention):
    if attention.dim() != 5:
        raise ValueError("five dimensions")
    b, h, group, new, tokens = attention.shape
    if sums.shape != (b, h, tokens):
        raise ValueError("other shapes")
    for g in range(group):
        for q in range(new):
            sums += attention[:, :, g, q]
    return sums


@heavy.accepts("NumPy in float64, groups and queries in one dimension")
def flattened_numpy(sums, attention):
    if attention.dim() != 5:
        raise ValueError("five dimensions")
    weights = attention.double().flatten(2, 3).numpy().sum(axis=2)
    if weights.shape != tuple(sums.shape):
        raise ValueError("other shapes")
    return sums.double().numpy() + weights


# --- 7. h2o_scores -------------------------------------------------------------------------------

hitters = Exercise(
    h2o_scores,
    paper="Zhang et al. 2023 (arXiv 2306.14048), section 4",
    difficulty=1,
    minutes=5,
)


@st.composite
def received(draw: st.DrawFn, heads: tuple[int, ...] = ()) -> tuple[Tensor, int]:
    """What at least 4 tokens received, and a number of recent ones, from 2 to one fewer than
    tokens."""
    tokens = draw(st.integers(4, 8))
    rng = generator(draw(SEEDS))
    sums = floats(rng.uniform(0, 4, (*heads, tokens)).round(2))
    return arrange(sums, draw(st.sampled_from(LAYOUTS))), draw(st.integers(2, tokens - 2))


def expect_protection(got: Tensor, sums: Tensor) -> None:
    """Fail if no token is protected in any way: the rest of a check has nothing to judge then."""
    expect_shape(got, sums.shape, "the result")
    got = as_double(got)
    latest = bool((got[..., -1] >= got.amax(-1)).all())
    expect(latest or bool(got.isinf().any()), "no token is protected", got=got)


@hitters.check(
    points=3,
    hint="An older token stays or goes by what it received. Is that number changed by anything, "
    "and which tokens are not older?",
    drawn=received(),
)
def older_tokens_score_what_they_received(candidate, drawn):
    """The score of every token but the latest `recent` is its sum."""
    sums, recent = drawn
    got = candidate(sums, recent)
    expect_protection(got, sums)
    expect_close(got[:-recent], sums[:-recent], "the score of older tokens", reveal=True)


@hitters.check(
    points=3,
    hint="The latest tokens must stay whatever the others have received. Where in a row do they "
    "stand, how many are they, and which score wins against any?",
    drawn=received(),
)
def the_latest_are_infinite(candidate, drawn):
    """The latest `recent` tokens, at the end of the row, score plus infinity."""
    sums, recent = drawn
    got = as_double(candidate(sums, recent))
    expect_shape(got, sums.shape, "the result")
    expect(got[-recent:] == INF, f"of the latest {recent}, one is not infinite", got=got)


@hitters.check(
    points=2,
    hint="What does a slice mean that begins at minus 0? And one that begins before the row does?",
    drawn=received(),
    more=st.sampled_from((1, 2, 10)),
)
def none_and_all_may_be_recent(candidate, drawn, more):
    """With recent = 0 no token is protected: no score is infinite. Where there are fewer tokens
    than `recent`, all are protected alike."""
    sums, _ = drawn
    none, every = candidate(sums, 0), candidate(sums, len(sums) + more)
    expect_shape(none, sums.shape, "the result")
    expect_shape(every, sums.shape, "the result")
    expect(as_double(none).isfinite(), "with recent = 0, a score is infinite", got=none)
    expect(as_double(every) == float(every[0]), "all are recent, and score differently", got=every)


@hitters.check(
    points=2,
    hint="In a tensor of texts, heads and tokens, which dimension holds the latest tokens at its "
    "end?",
    drawn=LEADS.flatmap(received),
)
def every_head_is_treated_alike(candidate, drawn):
    """With any number of leading dimensions, each row gets the scores that it gets alone."""
    sums, recent = drawn
    alone = torch.stack([as_double(candidate(row, recent)) for row in rows_of(sums)])
    got = as_double(candidate(sums, recent))
    expect_protection(got, sums)
    expect_equal(got.reshape(alone.shape).isinf(), alone.isinf(), "which tokens are infinite")
    finite = alone.isfinite()
    expect_close(got.reshape(alone.shape)[finite], alone[finite], "a finite score", reveal=True)


@hitters.check(
    points=1,
    hint="How many recent tokens can there be at least? Look at the docstring under Raises.",
    bad=[(ValueError, -1), (ValueError, -3), (TypeError, 1.5), (TypeError, 2.0)],
)
def a_number_of_recent_tokens_that_cannot_be_is_refused(candidate, bad):
    """Fewer than 0 recent tokens raise ValueError; a number that is not whole raises TypeError."""
    kind, recent = bad
    expect_error(candidate, kind, torch.ones(5), recent)


def _scored(sums, first, recent, older=None, score=INF):
    """`score` from place `first` on, and the sums before it; a bad count is refused."""
    h2o_scores(sums, recent)
    where = torch.arange(sums.shape[-1]) >= first
    return torch.where(where, score, sums if older is None else older)


@hitters.misconception(
    "You protect the first tokens, which are sinks. The latest stand at the end: they had little "
    "time yet to be looked at."
)
def protects_the_first(sums, recent):
    return h2o_scores(sums.flip(-1), recent).flip(-1)


@hitters.misconception(
    "You protect one token too few. Of n tokens, the latest r have the places n - r to n - 1."
)
def one_too_few(sums, recent):
    return _scored(sums, sums.shape[-1] - recent + 1, recent)


@hitters.misconception(
    "You protect one token too many. Of n tokens, the latest r have the places n - r to n - 1."
)
def one_recent_too_many(sums, recent):
    return _scored(sums, sums.shape[-1] - recent - 1, recent)


@hitters.misconception(
    "Your slice begins at -recent, which for recent = 0 is 0, the beginning: everything is "
    "protected. Count from the front, or treat 0 by itself."
)
def minus_zero(sums, recent):
    _scored(sums, 0, recent)
    sums[..., -recent:] = INF
    return sums


@hitters.misconception(
    "You give the latest tokens minus infinity, so that they go first. The largest scores are kept."
)
def latest_go_first(sums, recent):
    return _scored(sums, sums.shape[-1] - recent, recent, score=-INF)


@hitters.misconception(
    "You give the latest tokens the largest sum there is. Others may have as much, and then it is "
    "left to chance or habit who stays. Nothing is above infinity."
)
def as_much_as_the_largest(sums, recent):
    highest = sums.amax(-1, keepdim=True).expand(sums.shape)
    return _scored(sums, sums.shape[-1] - recent, recent, score=highest)


@hitters.misconception(
    "You divide the sums by the time each token has been there. That would be fairer to young "
    "tokens, but the paper's F is the plain sum; its window is what protects the young."
)
def mean_over_time(sums, recent):
    age = torch.arange(sums.shape[-1], 0, -1)
    return _scored(sums, sums.shape[-1] - recent, recent, sums / age)


@hitters.misconception(
    "You score what was looked at least the highest. Heavy hitters are to stay: the most looked at "
    "have the highest scores."
)
def least_looked_at(sums, recent):
    return _scored(sums, sums.shape[-1] - recent, recent, -sums)


@hitters.misconception(
    "You count the tokens along the first dimension. With texts and heads in front, the tokens are "
    "the last."
)
def tokens_come_first(sums, recent):
    return _scored(sums, sums.shape[0] - recent, recent)


@hitters.accepts("a slice from the front, written to in place")
def slice_from_the_front(sums, recent):
    if not isinstance(recent, int):
        raise TypeError("a whole number")
    if recent < 0:
        raise ValueError("at least 0")
    sums[..., max(sums.size(-1) - recent, 0) :] = INF
    return sums


@hitters.accepts("two parts put together")
def two_parts(sums, recent):
    if not isinstance(recent, int):
        raise TypeError("a whole number")
    if recent < 0:
        raise ValueError("at least 0")
    tokens = sums.shape[-1]
    older, latest = sums.split([max(tokens - recent, 0), min(recent, tokens)], dim=-1)
    return torch.cat([older, torch.full_like(latest, INF)], dim=-1)


@hitters.accepts("NumPy, infinity added where a place from the end is below recent")
def numpy_from_the_end(sums, recent):
    h2o_scores(sums, recent)
    from_the_end = np.arange(sums.shape[-1])[::-1]
    return sums.double().numpy() + np.where(from_the_end < recent, np.inf, 0.0)


# --- 8. quantize_range ---------------------------------------------------------------------------

WIDER = "float32 meets a shorter type, and the result is float32 anyway"
CENTRE = 0.5 + 1e-3  # the nearest code is this close; rounding in float32 may decide near ties

asymmetric = Exercise(
    quantize_range,
    paper="Liu et al. 2024 (arXiv 2402.02750), section 3",
    difficulty=2,
    minutes=15,
    equivalent={
        "x = x.float()  ->  (removed)": WIDER,
        "…dim, keepdim=True) - low.float()) / largest).half()  ->  …dim, keepdim=True) - low) / "
        "largest).half()": WIDER,
        "scale = torch.where(scale > 0, scale, 1.0).half()  ->  scale = torch.where(scale > 0, "
        "scale, 1.0)": "it is float16 before, and a number does not widen it",
        "codes = ((x - low.float()) / scale.float()).round…  ->  codes = ((x - low) / "
        "scale.float()).round…": WIDER,
        "…x - low.float()) / scale.float()).round().clamp(0, largest…  ->  …x - low.float()) / "
        "scale).round().clamp(0, largest…": WIDER,
    },
)

BITS = st.sampled_from((2, 4, 8, 3, 1))
Sliced = tuple[Tensor, int]  # x, and the dimension whose numbers share a scale


def along(x: Tensor, dim: int, name: str) -> Tensor:
    """The smallest ("amin") or largest ("amax") number of each slice, in float64."""
    return getattr(as_double(x), name)(dim, keepdim=True)


@st.composite
def sliced(draw: st.DrawFn, constant: bool = False) -> Sliced:
    """Numbers that float16 holds, and a dimension none of whose slices is constant; or some of
    whose are, and one is certainly."""
    shape = draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    rng = generator(draw(SEEDS))
    x = rng.integers(-64, 65, shape)
    lane = np.moveaxis(x, dim, -1).reshape(-1, x.shape[dim])  # a copy or a view, as it comes
    if constant:
        lane[0] = lane[0, 0]
    else:
        flat = lane.min(1) == lane.max(1)
        lane[flat, 0] += 1
    front = [side for i, side in enumerate(shape) if i != dim % len(shape)]
    numbers = np.moveaxis(lane.reshape(*front, -1), -1, dim) / 8
    numbers = numbers + draw(st.sampled_from((0, 20, -20)))
    return arrange(floats(numbers), draw(st.sampled_from(LAYOUTS))), dim


def spread(part: Tensor, x: Tensor, dim: int, what: str) -> Tensor:
    """A scale or low for every number of x, in float64, whether `dim` was kept or not."""
    part, kept = as_double(part), list(x.shape)
    kept[dim] = 1
    if part.dim() != x.dim() and part.numel() == math.prod(kept):
        part = part.reshape(kept)
    try:
        return part.broadcast_to(x.shape)
    except RuntimeError:
        raise Mismatch(f"{what} has shape {tuple(part.shape)}, expected {tuple(kept)}") from None


def ideal(x: Tensor, dim: int, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """Codes before they are rounded, with the candidate's own scale and low."""
    wide = spread(scale, x, dim, "the scale")
    expect(wide > 0, "a scale is not positive", got=scale)
    exact = (as_double(x) - spread(low, x, dim, "low")) / wide
    expect(exact.isfinite(), "a scale or a low is not finite", got=scale)
    return exact.clamp(0, 2**bits - 1)


def expect_codes(codes: Tensor, want: Tensor, steps: float, bits: int) -> None:
    """Fail unless all codes are whole numbers of so many bits, within ``steps`` of ``want``."""
    expect_shape(codes, want.shape, "the codes")
    expect_integers(codes, "the codes", 0, 2**bits - 1)
    off = (as_double(codes) - want).abs()
    if bool((off > steps).any()):
        i = int(off.argmax())
        code, right = (float(part.flatten()[i]) for part in (as_double(codes), want))
        raise Mismatch(f"a code is {code:g}, where (x - low) / scale is {right:.6g}", got=codes)


@asymmetric.check(
    points=2,
    hint="Which number should the code 0 stand for? Look at one slice, that is at numbers that "
    "differ only in their place along `dim`.",
    drawn=sliced(),
    bits=BITS,
)
def low_is_the_smallest_of_each_slice(candidate, drawn, bits):
    """Where float16 holds all numbers, low is the smallest number of each slice along `dim`."""
    x, dim = drawn
    low = spread(candidate(x, bits, dim)[2], x, dim, "low")
    want = along(x, dim, "amin").expand(x.shape)
    expect_close(low, want, "low", rtol=1e-3, atol=1e-3, reveal=True)


@asymmetric.check(
    points=2,
    hint="With two bits there are the codes 0, 1, 2 and 3. How many steps is it from the first to "
    "the last, and from which number to which?",
    drawn=sliced(),
    bits=BITS,
)
def the_codes_span_each_slice(candidate, drawn, bits):
    """The scale is the range of each slice over 2^bits - 1 steps, and like low it has the shape of
    x with 1 in place of `dim`."""
    x, dim = drawn
    _, scale, low = candidate(x, bits, dim)
    want = (along(x, dim, "amax") - along(x, dim, "amin")) / (2**bits - 1)
    expect_close(scale, want, "the scale", rtol=1e-3, atol=1e-4, reveal=True)
    expect_shape(low, want.shape, "low")


@asymmetric.check(
    points=2,
    hint="Take the first code of your result. Which number does low + scale * code give, and would "
    "the code next to it have been nearer? Which codes are there at all?",
    drawn=sliced(),
    bits=BITS,
)
def each_code_is_the_nearest(candidate, drawn, bits):
    """The codes are whole numbers from 0 to 2^bits - 1, and with your scale and low each is the one
    nearest to (x - low) / scale."""
    x, dim = drawn
    codes, scale, low = candidate(x, bits, dim)
    # Where the scale was rounded to float16 only after its use, codes are off by this much more.
    steps = CENTRE + (2**bits - 1) / 2048
    expect_codes(codes, ideal(x, dim, scale, low, bits), steps, bits)


@asymmetric.check(
    points=2,
    hint="All numbers of a slice are the same. What is its range, what is divided by it, and what "
    "does the docstring say?",
    drawn=sliced(constant=True),
    bits=BITS,
)
def equal_numbers_have_the_scale_1(candidate, drawn, bits):
    """Where all numbers of a slice are equal, its scale is 1 and its codes are 0."""
    x, dim = drawn
    codes, scale, _ = candidate(x, bits, dim)
    expect_shape(codes, x.shape, "the codes")
    alike = (along(x, dim, "amin") == along(x, dim, "amax")).expand(x.shape)
    scale = spread(scale, x, dim, "the scale")[alike]
    expect_equal(scale, torch.ones(scale.shape), "the scale of equal numbers", reveal=True)
    of_equals = as_double(codes)[alike]
    expect_equal(of_equals, of_equals * 0, "the codes of equal numbers", reveal=True)


@asymmetric.check(
    points=2,
    hint="Around 1000, which numbers does float16 hold? If low is stored as one of them, from "
    "which low must the codes be counted so that they stand for x? And how is a code stored?",
    place=st.sampled_from(((1000.0, 2.0), (100.0, 2.0), (-300.0, 2.0), (3000.0, 2.0), (0.0, 1e-8))),
    bits=st.sampled_from((8, 7, 6)),
    shape=st.sampled_from(((8,), (2, 8), (3, 4, 8))),
    seed=SEEDS,
)
def codes_belong_to_what_float16_holds(candidate, place, bits, shape, seed):
    """Scale and low are numbers that float16 holds, the scale positive, and the codes, of type
    uint8, are computed with these: be it far from 0, or all numbers tiny, no code is more than 1
    from (x - low) / scale, between 0 and 2^bits - 1."""
    low, span = place
    x = floats(generator(seed).uniform(0, span, shape)) + low
    codes, scale, low = candidate(x, bits, -1)
    for part, what in ((scale, "the scale"), (low, "low")):
        stored = as_double(part.half())
        expect_equal(part, stored, f"{what}, beside what float16 makes of it")
    expect_codes(codes, ideal(x, -1, scale, low, bits), 1.01, bits)
    expect(codes.dtype == torch.uint8, f"the codes are {codes.dtype}, expected torch.uint8")


@asymmetric.check(
    points=1,
    hint="How many bits fit into a code of type uint8, and how many does a code have at least?",
    bad=[(ValueError, 0), (ValueError, 9), (ValueError, 16), (ValueError, -1), (TypeError, 2.5)],
)
def bits_that_cannot_be_are_refused(candidate, bad):
    """Fewer than 1 or more than 8 bits raise ValueError; a number that is not whole raises
    TypeError."""
    kind, bits = bad
    expect_error(candidate, kind, torch.tensor([1.0, 2.0, 4.0]), bits, 0)


def _range(
    x,
    bits,
    dim,
    ends=lambda x, dim: (x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)),
    steps=lambda bits: 2**bits - 1,
    start=lambda low: low,  # what is taken off before codes are counted
    stored=lambda part: part.half(),
    guard=True,
    round=torch.round,
    first=0,  # the code of the lowest number
    dtype=torch.uint8,
):
    """quantize_range, open where people go wrong; bits that cannot be are refused."""
    quantize_range(x, bits, dim)
    low, high = ends(x.float(), dim)
    low = stored(low)
    scale = stored((high - low.float()) / steps(bits))
    if guard:
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = round((x - start(low).float()) / scale.float()) + first
    codes = codes.nan_to_num(0.0).clamp(first, 2**bits - 1 + first)
    return codes.to(dtype), scale, low


@asymmetric.misconception(
    "Your range lies symmetrically around 0. Keys and values have no reason to: it goes from the "
    "smallest number to the largest, and none of the codes is wasted."
)
def symmetric(x, bits, dim):
    def ends(x, dim):
        return -x.abs().amax(dim, keepdim=True), x.abs().amax(dim, keepdim=True)

    return _range(x, bits, dim, ends=ends)


@asymmetric.misconception(
    "You divide the range by 2^bits, the number of codes. Between the first code and the last "
    "there is one step fewer."
)
def as_many_steps_as_codes(x, bits, dim):
    return _range(x, bits, dim, steps=lambda bits: 2**bits)


@asymmetric.misconception(
    "You forget to subtract low before you divide: the codes count steps from 0 and not from the "
    "lowest number."
)
def counts_from_0(x, bits, dim):
    return _range(x, bits, dim, start=torch.zeros_like)


@asymmetric.misconception(
    "You cut off what is behind the point. The nearest code is up to half a step away; cutting "
    "off makes it up to a whole one."
)
def cuts_off(x, bits, dim):
    return _range(x, bits, dim, round=torch.floor)


@asymmetric.misconception(
    "You have one scale for the whole tensor. Every slice along `dim` has its own: an outlier "
    "should cost its own slice only."
)
def one_scale_for_all(x, bits, dim):
    def ends(x, dim):
        shape = x.amin(dim, keepdim=True).shape
        return x.amin().expand(shape), x.amax().expand(shape)

    return _range(x, bits, dim, ends=ends)


@asymmetric.misconception(
    "You take the range over all dimensions but `dim`. It is the numbers along `dim` that share a "
    "scale: that dimension becomes 1."
)
def all_other_dimensions(x, bits, dim):
    def ends(x, dim):
        others = [i for i in range(x.dim()) if i != dim % x.dim()]
        if not others:
            return x, x
        return x.amin(others, keepdim=True), x.amax(others, keepdim=True)

    return _range(x, bits, dim, ends=ends)


@asymmetric.misconception(
    "You divide by a range of 0 where all numbers are equal. Look for such slices and give them "
    "the scale 1."
)
def divides_by_0(x, bits, dim):
    return _range(x, bits, dim, guard=False)


@asymmetric.misconception(
    "Your codes go from -2^(bits-1) to 2^(bits-1) - 1. Asymmetric codes begin at 0, which stands "
    "for low."
)
def signed_codes(x, bits, dim):
    return _range(x, bits, dim, first=-(2 ** (bits - 1)), dtype=torch.int16)


@asymmetric.misconception(
    "You put the codes into int8, which ends at 127. With 8 bits there are codes up to 255."
)
def codes_in_int8(x, bits, dim):
    codes, scale, low = quantize_range(x, bits, dim)
    return codes.view(torch.int8), scale, low


@asymmetric.misconception(
    "You return scale and low in float32. A group of 32 numbers of 2 bits takes 8 bytes; that "
    "would take as many again. They are kept in float16."
)
def kept_in_float32(x, bits, dim):
    return _range(x, bits, dim, stored=lambda part: part)


@asymmetric.misconception(
    "You compute the codes with the exact range and round scale and low to float16 afterwards. "
    "Whoever reads the codes has only the rounded ones: count from those."
)
def rounds_afterwards(x, bits, dim):
    codes, scale, low = _range(x, bits, dim, stored=lambda part: part)
    return codes, scale.half(), low.half()


@asymmetric.misconception(
    "You return low before the scale. Asked for are codes, scale and low, in this order."
)
def low_before_scale(x, bits, dim):
    codes, scale, low = quantize_range(x, bits, dim)
    return codes, low, scale


@asymmetric.misconception(
    "You drop the dimension `dim` from scale and low. Keep it, with length 1, so that they fit to "
    "x."
)
def drops_the_dimension(x, bits, dim):
    codes, scale, low = quantize_range(x, bits, dim)
    return codes, scale.squeeze(dim), low.squeeze(dim)


@asymmetric.accepts("aminmax, and the range of the numbers as they are")
def range_as_it_is(x, bits, dim):
    if not isinstance(bits, int):
        raise TypeError("a whole number")
    if not 1 <= bits <= 8:
        raise ValueError("1 to 8")
    low, high = torch.aminmax(x.double(), dim=dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).to(torch.float16)
    scale[scale <= 0] = 1
    low = low.to(torch.float16)
    codes = torch.clamp((x.double() - low) / scale + 0.5, 0, 2**bits - 0.5).floor()
    return codes.to(torch.uint8), scale, low


@asymmetric.accepts("NumPy, with float16 as NumPy has it")
def numpy_halves(x, bits, dim):
    quantize_range(x, bits, dim)
    a = x.double().numpy()
    low = a.min(axis=dim, keepdims=True).astype(np.float16)
    scale = ((a.max(axis=dim, keepdims=True) - low) / (2**bits - 1)).astype(np.float16)
    scale = np.where(scale > 0, scale, np.float16(1))
    codes = np.rint((a - low.astype(np.float64)) / scale).clip(0, 2**bits - 1)
    return codes.astype(np.uint8), scale, low


@asymmetric.accepts("the nearest of all levels, one slice after the other")
def nearest_level(x, bits, dim):
    quantize_range(x, bits, dim)
    rows = x.transpose(dim, -1).reshape(-1, x.shape[dim])
    codes, scales, lows = [], [], []
    for row in rows:
        low = row.min().half()
        scale = ((row.max() - low.float()) / (2**bits - 1)).half()
        if scale <= 0:
            scale = torch.ones_like(scale)
        levels = low.float() + scale.float() * torch.arange(2**bits)
        codes.append((row[:, None] - levels).abs().argmin(dim=1))
        scales.append(scale)
        lows.append(low)
    shape = x.transpose(dim, -1).shape

    def back(parts, last):
        return torch.stack(parts).reshape(*shape[:-1], last).transpose(dim, -1)

    return back(codes, x.shape[dim]).byte(), back(scales, 1), back(lows, 1)
