"""Properties of the straight-through estimator.

Its gradient is wrong on purpose, so `torch.autograd.gradcheck` cannot be asked about it. What can
be checked is the rest of the chain: the gradient at x must be the true one of what follows, taken
at the hard value. That one is computed by finite differences.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autograder.strategies import shapes, tensors
from fewer.sparsity import masked_weight, n_m_mask, sr_ste_gradient, ste, straight_through

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ANY = tensors(dtypes=DTYPES)
DOUBLES = tensors(shapes(1, 2, 4), dtypes=(torch.float64,), kinds=("whole", "normal", "ties"))
HARD = st.sampled_from([torch.round, torch.sign, torch.floor, torch.zeros_like, lambda x: x * 1e6])


def after(y):
    """A loss that follows, with a different slope at every element and value."""
    weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype).reshape(y.shape)
    return (weights * y.sin() + y * y).sum()


def slope(function, y, eps=1e-6):
    """Central differences."""
    gradient = torch.zeros_like(y)
    for place in range(y.numel()):
        step = torch.zeros(y.numel(), dtype=y.dtype)
        step[place] = eps
        step = step.reshape(y.shape)
        gradient.view(-1)[place] = (function(y + step) - function(y - step)) / (2 * eps)
    return gradient


@given(ANY, HARD)
def test_the_value_is_exactly_the_hard_one(x, function):
    hard = function(x)
    y = straight_through(x.clone().requires_grad_(), hard)
    assert y.dtype == x.dtype
    assert torch.equal(y, hard)


def test_the_value_is_exact_where_the_usual_formula_rounds():
    x, hard = torch.tensor([1e8]), torch.tensor([0.1])
    assert (x + (hard - x)).item() == 0.0
    assert torch.equal(straight_through(x, hard), hard)


@given(DOUBLES, st.sampled_from([torch.round, torch.sign, torch.floor, torch.zeros_like]))
def test_the_gradient_is_that_of_what_follows_at_the_hard_value(x, function):
    hard = function(x).contiguous()
    x = x.clone().requires_grad_()
    after(straight_through(x, hard)).backward()
    assert torch.allclose(x.grad, slope(after, hard), rtol=1e-4, atol=1e-4)


@given(DOUBLES)
def test_the_gradient_reaches_what_came_before(x):
    x = x.clone().requires_grad_()
    inner = 3 * x  # dL/dx = 3 dL/dy
    straight_through(inner, inner.round()).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


@given(DOUBLES)
def test_the_hard_value_gets_no_gradient(x):
    x, hard = x.clone().requires_grad_(), x.clone().requires_grad_()
    straight_through(x, 2 * hard).sum().backward()
    assert hard.grad is None
    assert torch.equal(x.grad, torch.ones_like(x))


@given(DOUBLES, HARD)
def test_a_wrapped_function_has_its_own_values_and_the_gradient_of_the_identity(x, function):
    expected = function(x)
    x = x.clone().requires_grad_()
    y = ste(function)(x)
    assert torch.equal(y, expected)
    (y * torch.arange(x.numel()).reshape(x.shape)).sum().backward()
    assert torch.equal(x.grad, torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape))


def test_a_wrapped_function_does_not_add_its_own_gradient():
    x = torch.tensor([2.0], requires_grad=True)
    ste(torch.square)(x).sum().backward()
    assert x.grad.item() == 1  # not 1 + 2 x


def test_a_wrapped_function_runs_without_recording_a_graph():
    recorded = []

    def function(x):
        recorded.append(x.exp().requires_grad)
        return x.round()

    ste(function)(torch.ones(2, requires_grad=True))
    assert recorded == [False]


def test_a_mask_becomes_a_number():
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    y = straight_through(x, x > 0)
    assert y.tolist() == [0.0, 1.0]
    assert y.dtype == torch.float32


# --- masked weights


@given(ANY, st.data())
def test_a_masked_weight_learns_everywhere(w, data):
    kept = data.draw(st.lists(st.booleans(), min_size=w.numel(), max_size=w.numel()))
    mask = torch.tensor(kept).reshape(w.shape)
    leaf = w.clone().requires_grad_()
    y = masked_weight(leaf, mask)
    assert torch.equal(y, w * mask)
    y.backward(torch.full_like(y, 3))
    assert torch.equal(leaf.grad, torch.full_like(w, 3))


def test_a_pruned_weight_can_come_back():
    w = torch.tensor([1.0, 0.9], requires_grad=True)  # the loss wants the second one
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        y = masked_weight(w, n_m_mask(w.detach().abs(), 1, 2))
        (y - torch.tensor([0.0, 2.0])).square().sum().backward()
        optimizer.step()
    assert n_m_mask(w.detach().abs(), 1, 2).tolist() == [False, True]


@given(tensors((3, 4), dtypes=(torch.float64,)), st.integers(0, 2**16), st.floats(0, 1))
def test_sr_ste_is_weight_decay_of_the_pruned_ones_alone(w, seed, decay):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=generator) < 0.5
    refined = sr_ste_gradient(grad, w, mask, decay)
    assert torch.equal(refined[mask], grad[mask])
    assert torch.allclose(refined[~mask], (grad + decay * w)[~mask])
    # ... which is the gradient of the penalty decay / 2 * sum of squares of the pruned weights.
    penalized = w.clone().requires_grad_()
    (decay / 2 * penalized[~mask].square().sum() + (grad * penalized).sum()).backward()
    assert torch.allclose(refined, penalized.grad)


def test_sr_ste_shrinks_the_pruned_weights_that_no_gradient_holds():
    w, mask = torch.tensor([4.0, 4.0]), torch.tensor([True, False])
    for _ in range(10):
        w = w - 0.5 * sr_ste_gradient(torch.zeros(2), w, mask, decay=0.2)
    assert w[0] == 4
    assert w[1].item() == pytest.approx(4 * 0.9**10)


# --- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: straight_through(x, x[:2]), r"hard must have shape \(3,\), got \(2,\)"),
        (lambda x: straight_through(x, x.sum()), r"hard must have shape \(3,\), got \(\)"),
        (lambda x: ste(torch.sum)(x), r"hard must have shape \(3,\), got \(\)"),
        (lambda x: masked_weight(x, x[:2] > 0), r"mask must have shape \(3,\), got \(2,\)"),
        (lambda x: sr_ste_gradient(x[:2], x, x > 0), r"grad must have shape \(3,\), got \(2,\)"),
        (lambda x: sr_ste_gradient(x, x, x > 0, -1), "decay must be at least 0, got -1"),
        (lambda x: sr_ste_gradient(x, x, x > 0, math.nan), "decay must be finite, got nan"),
    ],
)
def test_wrong_values_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: straight_through(x.int(), x),
            "x must be a floating-point tensor, got torch.int",
        ),
        (lambda x: straight_through(x, 1.0), "hard must be a torch.Tensor, got float"),
        (lambda x: masked_weight(x, x), "mask must be a bool tensor .*, got torch.float32"),
        (lambda x: sr_ste_gradient(None, x, x > 0), "grad must be a torch.Tensor, got NoneType"),
    ],
)
def test_wrong_types_are_refused_by_name(call, message):
    with pytest.raises(TypeError, match=message):
        call(torch.ones(3))
