"""The autograder: exercises, checks, verdicts, grading with nbgrader, and reports.

In a notebook, `check` is all one needs::

    from autograder import check
    check(quantize_symmetric)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autograder.exercise import Exercise, exercises, find
    from autograder.judge import check
    from autograder.verdict import Verdict

__all__ = ["Exercise", "Verdict", "check", "exercises", "find"]

_HOME = {"Verdict": "verdict", "check": "judge"}  # the others live in autograder.exercise


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `fewer --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'autograder' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autograder.{_HOME.get(name, 'exercise')}"), name)
