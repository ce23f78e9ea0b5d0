"""The inputs a check is run on: drawn once for a (check, seed), the same in every process.

A grade must not depend on who draws, so Hypothesis is pinned down: no example database, no health
checks that look at the clock, and a backend without the one source of variation that is left
(Hypothesis mixes constants found in the source of *imported local modules* into its draws).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from autograder.exercise import Check


class SteadyProvider(providers.HypothesisProvider):
    """Hypothesis' own way of drawing, without constants taken from whatever code is imported."""

    def _maybe_draw_constant(self, *args: Any, **kwargs: Any) -> None:
        return None


providers.AVAILABLE_PROVIDERS["steady"] = f"{__name__}.SteadyProvider"

Drawn = dict[str, Any]


def run(check: Check, seed: int, test: Callable[[Drawn], None], shrink: bool = False) -> None:
    """Draw the inputs of ``check`` for ``seed``, or take its cases, and call ``test`` on each.

    With ``shrink``, Hypothesis goes on after the first failure to look for a simpler one, and the
    simplest is the last that ``test`` sees before its error is raised. Of cases it is the first.
    """
    if check.cases:
        for drawn in check.cases:
            test(drawn)
        return

    @hypothesis.seed(zlib.crc32(f"{seed}/{check.name}".encode()))
    @settings(
        max_examples=check.examples,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        backend="steady",
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.fixed_dictionaries(check.strategies))
    def each(drawn: Drawn) -> None:
        test(drawn)

    each()


@functools.lru_cache(maxsize=4096)
def battery(check: Check, seed: int) -> list[Drawn]:
    """The inputs of a check for a seed, drawn once a process and never changed by anyone.

    Candidates get copies (see `autograder.candidate`), so the list can be shared by a whole class.
    """
    examples: list[Drawn] = []
    run(check, seed, examples.append)
    return examples
