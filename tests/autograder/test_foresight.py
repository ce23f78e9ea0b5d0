"""What is remembered for a class changes nobody's verdict: it is that of a judge without memory."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import autograder.judge
from autograder import foresight, wire
from autograder.candidate import Local
from autograder.compare import CandidateError, expect, expect_close, expect_error
from autograder.exercise import Exercise, exercises
from autograder.foresight import SMALL, Answer, Memory, Plan, planned
from autograder.judge import judge
from autograder.killtable import remembering
from autograder.strategies import tensors


def small(exercise: Exercise) -> Exercise:
    """The exercise with a few inputs a check, and a reference that answers the same once."""
    exercise = remembering(exercise)
    few = [dataclasses.replace(check, examples=FEW) for check in exercise.checks]
    return dataclasses.replace(exercise, checks=few)


FEW = 6
EXERCISES = [small(exercise) for exercise in exercises().values()]
NAMES = list(exercises())


class Distant(Local):
    """A function of this process whose answers arrive in frames, as a child's do."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.live = 0

    def foresee(self, plan: Plan) -> list[list[Answer]]:  # type: ignore[override]
        answers = list(map(self.answer, plan.frames, plan.right, plan.kinds))
        return [answers[part.start : part.end] for part in plan.parts]

    def answer(self, frame: bytes, right: bytes, kinds: list[str]) -> Answer:
        args, kwargs = wire.unpack(frame)
        try:
            answered = wire.pack({"value": super().__call__(*args, **kwargs)})
        except CandidateError as error:
            told = wire.pack({"error": (error.kinds, error.message, error.trace)})
            return Answer(told, error, error.kinds == kinds)
        return Answer(answered, wire.unpack(answered)["value"], answered == right)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.live += 1
        args, kwargs = wire.unpack(wire.pack((args, kwargs)))
        return wire.unpack(wire.pack(super().__call__(*args, **kwargs)))


@pytest.fixture(autouse=True)
def short_search(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(autograder.judge, "SHRINK_RUNS", 5)
    monkeypatch.setattr(autograder.judge, "KERNEL_SHRINK_RUNS", 1)
    forget()
    yield
    forget()


def forget() -> None:
    autograder.judge._outcomes = Memory()
    autograder.judge._simplest_of.cache_clear()


def works(exercise: Exercise) -> Iterator[Callable[..., Any]]:
    """Some of all that is handed in: wrong in a known way, right in another style, and nonsense."""
    yield exercise.misconceptions[-1].function
    if exercise.decorator is None:
        yield exercise.variants[0].function
        yield lambda *args, **kwargs: args[0]


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_a_verdict_is_that_of_a_judge_who_remembers_nothing(exercise: Exercise) -> None:
    alone = []
    for work in works(exercise):
        forget()
        alone.append(judge(exercise, Local(work)).to_json())
    forget()
    for order in (1, -1):  # the second time, everything has been seen before
        for work, verdict in list(zip(works(exercise), alone, strict=True))[::order]:
            assert judge(exercise, Distant(work)).to_json() == verdict


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_a_property_knows_inputs_answers_and_kinds_of_exceptions_alone(exercise: Exercise) -> None:
    """No random numbers of its own, and not the words of an exception."""

    @functools.wraps(exercise.reference)
    def in_other_words(*args: Any, **kwargs: Any) -> Any:
        try:
            return exercise.reference(*args, **kwargs)
        except Exception as error:
            raise type(error)("xyzzy") from None

    for check in exercise.checks:
        plan = planned(exercise, check, 0)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        again = Plan(exercise, check, 0)
        assert again.frames == plan.frames
        assert again.right == plan.right
        for part in plan.parts:
            if any(plan.kinds[part.start : part.end]):
                told = autograder.judge.Attempt(exercise, check, Local(in_other_words), part.drawn)
                assert not told.failure


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_of_right_answers_no_property_is_asked_twice(
    exercise: Exercise, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judge(exercise, Distant(exercise.reference)).passed
    monkeypatch.setattr(autograder.judge, "Attempt", None)  # to run a property
    candidate = Distant(exercise.reference)
    assert judge(exercise, candidate).passed
    assert candidate.live == 0


def halve(x: torch.Tensor) -> torch.Tensor:
    """Half of x."""
    if x.numel() == 0:
        raise ValueError("x must not be empty")
    return x / 2


HALVE = Exercise(halve, paper="Nobody 2020", difficulty=1, minutes=1)


@HALVE.check(points=1, hint="Divide.", x=tensors())
def a_quarter_is_half_of_a_half(candidate: Any, x: torch.Tensor) -> None:
    """Halving twice gives a quarter."""
    half = candidate(x)
    expect(half.abs().sum() <= x.abs().sum(), "that is no half")
    expect_close(candidate(half), x / 4, "a quarter")


@HALVE.check(points=1, hint="Raise.")
def nothing_has_no_half(candidate: Any) -> None:
    """An empty tensor is refused."""
    expect_error(candidate, ValueError, torch.zeros(0))


def in_double(x: torch.Tensor) -> torch.Tensor:
    return halve(x).double()


def wrong_where_it_is_not_foreseen(x: torch.Tensor) -> torch.Tensor:
    return halve(x).double() if x.dtype == torch.float32 else x


def test_equal_answers_to_foreseen_calls_do_not_make_other_calls_right() -> None:
    """The reference answers in float32, so that half of a float64 is nothing that was foreseen."""
    for _ in range(2):
        for work, points in ((in_double, 2), (wrong_where_it_is_not_foreseen, 1)):
            candidate = Distant(work)
            assert judge(HALVE, candidate).points == points
            assert candidate.live > 0


def test_a_failure_tells_the_words_of_its_own_exception() -> None:
    def says(words: str) -> Callable[..., Any]:
        def work(x: torch.Tensor) -> torch.Tensor:
            raise KeyError(words)

        return work

    for words in ("one", "two"):
        failure = judge(HALVE, Distant(says(words))).results[1].failure
        assert failure is not None
        assert words in failure.message


def test_an_exception_of_another_kind_is_not_taken_for_a_refusal() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            raise TypeError("x must not be empty")
        return x / 2

    assert judge(HALVE, Distant(halve)).points == 2
    assert judge(HALVE, Distant(work)).points == 1


def test_the_simplest_failure_of_a_misconception_is_shown_only_if_it_is_the_candidates() -> None:
    exercise = Exercise(halve, paper="Nobody 2020", difficulty=1, minutes=1)

    @exercise.check(points=1, hint="Divide.", x=tensors())
    def twice_the_half_is_the_whole(candidate: Any, x: torch.Tensor) -> None:
        """Twice the half is the whole."""
        expect_close(candidate(x) * 2, x, "the double")

    @exercise.misconception("The sign is lost.")
    def forgets_the_sign(x: torch.Tensor) -> torch.Tensor:
        return x.abs() / 2

    def rarely_right(x: torch.Tensor) -> torch.Tensor:
        """As the misconception, but where there is one number only, as in its simplest failure."""
        return x / 2 if x.numel() == 1 else x.abs() / 2

    calls = []
    for work in (forgets_the_sign, rarely_right, forgets_the_sign):
        verdict = judge(exercise, Distant(work))
        assert verdict == judge(exercise, Local(work))
        assert verdict.results[0].failure is not None
        calls.append(verdict.results[0].failure.call)
    assert calls[0] == calls[2] != calls[1]


def test_a_search_that_takes_too_long_shows_the_first_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x / 3

    found = []
    for seconds in (0.0, -1.0):
        monkeypatch.setattr(autograder.judge, "SHRINK_SECONDS", seconds)
        found.append(judge(HALVE, Local(wrong)).results[0].failure)
    monkeypatch.setattr(autograder.judge, "_shrink", lambda *args: None)
    assert found == [judge(HALVE, Local(wrong)).results[0].failure] * 2


def test_memory_is_bounded_whatever_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "REMEMBERED", 100 << 10)
    memory: Memory[int] = Memory()
    memory.put("large", 1, SMALL + 1)
    assert memory.get("large") is None
    for i in range(1000):
        memory.put(i, i, SMALL if i % 2 else 0)
        assert memory.get(i) == i
    assert memory.get(0) is None
    assert len(memory) < 30
