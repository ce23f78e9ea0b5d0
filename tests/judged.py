"""What several tests of exercises ask about a piece of student's work."""

from __future__ import annotations

from typing import Any

from autograder.candidate import Local
from autograder.exercise import Exercise, exercises
from autograder.judge import judge


def points_of(exercise: Exercise, function: Any, seed: int = 0) -> dict[str, int]:
    """The points of each check, by its name."""
    verdict = judge(exercise, Local(function), seed, explain=False)
    return {result.check: result.earned for result in verdict.results}


def lost(reference: Any, function: Any, seed: int = 0) -> list[str]:
    """The names of the checks that ``function`` fails."""
    earned = points_of(exercises()[reference.__name__], function, seed)
    return [name for name, points in earned.items() if not points]
