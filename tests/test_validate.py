"""What every topic refuses: the quick look at all values, held to the slow one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.validate import all_finite

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
numbers = st.sampled_from([0.0, -0.0, 1.0, -3.5, 1e-45, 6e4, -6e4, 3e38, -3e38])
odd = st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.lists(numbers, max_size=40), st.lists(odd, max_size=3), st.sampled_from(DTYPES))
def test_all_finite_finds_nan_and_infinity_and_nothing_else(plain, strange, dtype):
    # Sums of large numbers overflow, and infinities of both signs cancel: neither may decide.
    for values in (plain, plain + strange, strange + plain):
        x = torch.tensor(values, dtype=torch.float64).to(dtype)
        assert all_finite(x) == bool(torch.isfinite(x).all())


@pytest.mark.parametrize("values", [[3e38, 3e38], [-3e38, -3e38, -3e38], []])
def test_a_sum_that_overflows_is_no_infinity_among_the_values(values):
    assert all_finite(torch.tensor(values))
