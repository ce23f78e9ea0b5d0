"""The tensors that checks are run on reach the corners where implementations differ."""

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from autograder.candidate import fresh
from autograder.strategies import KINDS, arrange, integer_tensors, tensors, values

QUICK = settings(max_examples=2000, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(
    "corner",
    [
        lambda x: (x == 0).all(),
        lambda x: (x < 0).all() and x.numel() > 1,
        lambda x: (x > 0).all() and x.numel() > 1,
        lambda x: (x == 0).any() and (x > 0).any() and (x < 0).any(),
        lambda x: x.abs().max() > 30 * x.abs().median() > 0,
        lambda x: not x.is_contiguous(),
        lambda x: x.dim() == 2 and x.shape[0] == 1 and x.shape[1] > 1,
        lambda x: x.dim() == 2 and x.shape[1] == 1 and x.shape[0] > 1,
        lambda x: x.numel() == 1,
        lambda x: x.numel() > 1 and (x == x.flatten()[0]).all() and x.flatten()[0] != 0,
        lambda x: ((x * 2) % 2 == 1).any(),
        lambda x: x.abs().max() > 500,
        lambda x: 0 < x.abs().max() < 0.01,
        lambda x: x.dtype == torch.bfloat16,
        lambda x: x.dtype == torch.float16,
    ],
)
def test_every_corner_is_reached(corner):
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    find(tensors(dtypes=dtypes), corner, settings=QUICK)


@given(tensors())
def test_tensors_are_finite_and_not_empty(x):
    assert x.isfinite().all()
    assert x.numel() > 0


@given(st.sampled_from(KINDS), st.integers(0, 100))
def test_a_seed_always_gives_the_same_values(kind, seed):
    assert (values(kind, (3, 4), seed) == values(kind, (3, 4), seed)).all()


@given(integer_tensors(-3, 5))
def test_whole_numbers_stay_in_range(x):
    assert x.min() >= -3
    assert x.max() <= 5


def test_both_ends_of_the_range_are_reached():
    strategy = integer_tensors(-8, 7, shape=(4, 4))
    find(strategy, lambda x: (x == -8).any() and (x == 7).any(), settings=QUICK)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_a_layout_changes_memory_and_not_values(layout):
    x = torch.arange(12.0).reshape(3, 4)
    y = arrange(x, layout)
    assert torch.equal(x, y)
    assert y.is_contiguous() == (layout == "contiguous")
    copy = fresh(y)
    assert copy.stride() == y.stride()
    copy.zero_()
    assert torch.equal(x, y)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'odd'"):
        values("odd", (1,), 0)
