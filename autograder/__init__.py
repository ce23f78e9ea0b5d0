"""The autograder: exercises, checks, verdicts, grading with nbgrader, and reports.

In a notebook, `check` is all one needs::

    from autograder import check
    check(quantize_symmetric)
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autograder.exercise import Exercise, exercises, find
    from autograder.judge import check
    from autograder.verdict import Verdict

__all__ = ["Exercise", "Verdict", "check", "exercises", "find"]

# Kernels are judged in Triton's interpreter, which sees what they touch, also where there is a GPU.
# That is decided when triton is imported; for compiled ones set TRITON_INTERPRET=0 before.
if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

_HOME = {"Verdict": "verdict", "check": "judge"}  # the others live in autograder.exercise


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `fewer --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'autograder' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autograder.{_HOME.get(name, 'exercise')}"), name)
