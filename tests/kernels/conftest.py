"""Where the tests of kernels run: on a GPU where there is one, else in the interpreter."""

import pytest
import torch

# Before any test imports triton: it says whether kernels are interpreted.
from fewer.kernels.interpreter import interpreted


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors that a kernel is given must be."""
    return "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
