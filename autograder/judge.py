"""Judge a candidate: run every check of an exercise on its battery of inputs, and explain failures.

`judge` is a pure function of the candidate's behaviour and the seed. `check` is what students call
in a notebook: the same judgement of a function in this process.

What a class has in common is worked out once: inputs, the reference's answers, what a property says
to answers that came before (`autograder.foresight`), and the simplest input on which each known
misconception fails. It is remembered by what it depends on, never by who was judged.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autograder.battery import Drawn, battery, run
from autograder.candidate import Call, Candidate, Judged, Local, fresh
from autograder.compare import CandidateDied, CandidateError, Mismatch, as_double
from autograder.exercise import Check, Exercise, Misconception, find
from autograder.foresight import Answer, Memory, Plan, Replay, named, planned
from autograder.verdict import Failure, Result, Verdict, show, show_call, show_error

SEED = 0
SHRINK_RUNS = 200  # how often a failing check is run again in search of a simpler failure
KERNEL_SHRINK_RUNS = 40  # the same for kernels, which take ten times as long in the interpreter
SHRINK_SECONDS = 5.0  # then the first failure is shown, however far the search came
RAISES = "your function raises whatever it is given, so it tells nothing apart"
DIAGNOSE_ON = 12  # failing inputs on which a misconception must behave like the candidate


def check(function: Callable[..., Any] | str, seed: int = SEED) -> Verdict:
    """Judge your function against the checks of the exercise of the same name.

    In a notebook the verdict is shown as a card; elsewhere it is printed. Its value as a number is
    the points.

    Args:
        function: the function you wrote; its name says which exercise it is.
        seed: other seeds draw other inputs.

    Raises:
        KeyError: if no exercise has the function's name.
    """
    exercise = find(function)
    if isinstance(function, str):
        raise TypeError(f"check takes the function itself: check({function}), without the quotes")
    verdict = judge(exercise, Local(function), seed)
    if not _in_notebook():
        print(verdict)
    return verdict


def _in_notebook() -> bool:
    """Whether a front end will show the verdict's card: a kernel does, a terminal does not."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


def judge(
    exercise: Exercise, candidate: Candidate, seed: int = SEED, explain: bool = True
) -> Verdict:
    """Run every check of ``exercise`` on ``candidate``.

    Args:
        explain: look for the simplest counter-example and for a misconception that behaves alike.
            The points are the same without; only the feedback is poorer.
    """
    results: list[Result] = []
    dead = suspect = ""
    returned = False
    for item in exercise.checks:
        if dead:
            results.append(_failed(item, Failure(dead)))
            continue
        try:
            result, returns = _judge_one(exercise, item, candidate, seed, explain, suspect)
            results.append(result)
            returned = returned or returns
            suspect = suspect or result.misconception
        except CandidateDied as death:
            dead = str(death)
            results.append(_failed(item, Failure(dead)))
    if not returned:  # then it does not refuse what is wrong: it refuses everything
        for i, item in enumerate(exercise.checks):
            if results[i].status == "passed":
                results[i] = _failed(item, Failure(RAISES))
    return Verdict(exercise.name, results, seed, hidden_points=exercise.hidden_points)


def _judge_one(
    exercise: Exercise, item: Check, candidate: Candidate, seed: int, explain: bool, suspect: str
) -> tuple[Result, bool]:
    """The result of one check, and whether the candidate returned anything where it should."""
    plan = planned(exercise, item, seed)
    answers = candidate.foresee(plan)
    failing: list[Outcome] = []
    returned = False
    for number, drawn in enumerate(battery(item, seed)):
        if answers is None:
            outcome = Outcome.of(Attempt(exercise, item, candidate, drawn))
        else:
            outcome = _outcome(plan, number, answers[number], candidate)
        if outcome.todo:
            todo = Result(
                item.name, item.statement, item.points, "todo", item.hint, hidden=item.hidden
            )
            return todo, returned
        if outcome.failure:
            failing.append(outcome)
            returned = returned or any(call.error is None for call in outcome.calls)
        elif not plan.refuses(number):
            returned = True
        if failing and returned and not explain:
            break
    if not failing:
        passed = Result(item.name, item.statement, item.points, "passed", hidden=item.hidden)
        return passed, returned
    if not explain:
        return _failed(item, failing[0].failure), returned
    calls = [call for outcome in failing[:DIAGNOSE_ON] for call in outcome.calls]
    misconception = diagnose(exercise, calls, suspect)
    try:
        simplest = _simplest(exercise, item, candidate, seed, misconception) or failing[0]
    except CandidateDied:  # a verdict must not depend on how far the search for a nicer one came
        simplest = failing[0]
    return _failed(item, simplest.failure, misconception), returned


@dataclass(frozen=True)
class Outcome:
    """What came of one set of inputs: an `Attempt` without its calls, where it passed."""

    todo: bool
    failure: Failure | None
    calls: list[Call]

    @classmethod
    def of(cls, attempt: Attempt) -> Outcome:
        return cls(attempt.todo, attempt.failure, attempt.calls if attempt.failure else [])


def _outcome(plan: Plan, number: int, answers: list[Answer], candidate: Candidate) -> Outcome:
    """The outcome under these answers: remembered, if no other call is made on the way to it."""
    key = plan, number, named(answers)
    if outcome := _outcomes.get(key):
        return outcome
    part = plan.parts[number]
    replay = Replay(plan, part, answers, candidate)
    outcome = Outcome.of(Attempt(plan.exercise, plan.check, replay, part.drawn))
    if not replay.live:
        _outcomes.put(key, outcome, sum(a.weight for a in answers) if outcome.failure else 0)
    return outcome


_outcomes: Memory[Outcome] = Memory()


class Attempt:
    """One run of a check's property on one set of inputs.

    Attributes:
        drawn: the inputs.
        failure: what to tell the student, or None where the property held.
        todo: the candidate says that nothing was written yet.
        calls: the calls the property made.
    """

    def __init__(
        self, exercise: Exercise, item: Check, candidate: Candidate | Replay, drawn: Drawn
    ) -> None:
        judged = Judged(candidate, exercise.reference)
        if isinstance(candidate, Replay):
            judged.reference = candidate.reference
        self.drawn = drawn
        self.failure: Failure | None = None
        self.todo = False
        self.calls = judged.calls
        trouble: Exception | None = None
        try:
            item.property(judged, **fresh(drawn))
        except CandidateDied:
            raise
        except (
            Exception
        ) as error:  # whatever a strange result does to a check, the student caused it
            trouble = error
        if any(_is_todo(call) for call in self.calls):
            self.todo = True
        elif trouble is not None:
            self.failure = _explain(exercise, trouble, self.calls)


def _is_todo(call: Call) -> bool:
    return isinstance(call.error, CandidateError) and "NotImplementedError" in call.error.kinds


def _explain(exercise: Exercise, trouble: Exception, calls: list[Call]) -> Failure:
    call = show_call(exercise.name, calls[-1]) if calls else ""
    got = show(_answer(exercise, calls[-1])) if calls and calls[-1].error is None else ""
    if isinstance(trouble, CandidateError):
        return Failure(show_error(trouble), call, trace=trouble.trace)
    if isinstance(trouble, Mismatch):
        expected = "" if trouble.expected is None else show(_single(trouble.expected))
        return Failure(trouble.message, call, got, expected)
    return Failure(f"the result could not be used: {trouble}", call, got)


def _answer(exercise: Exercise, call: Call) -> Any:
    """What a student is shown of a result: of a kernel, the tensors that it wrote."""
    if exercise.decorator is None or not isinstance(call.value, tuple):
        return call.value
    before = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)]
    if len(before) != len(call.value):
        return call.value
    pairs = zip(before, call.value, strict=True)
    written = tuple(after for x, after in pairs if not same(x, after))
    return written[0] if len(written) == 1 else written or call.value


def _single(value: Any) -> Any:
    """Checks compute in float64; a student need not read that in what was expected."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def _failed(item: Check, failure: Failure | None, diagnosis: Misconception | None = None) -> Result:
    return Result(
        check=item.name,
        statement=item.statement,
        points=item.points,
        status="failed",
        hint=item.hint,
        diagnosis=diagnosis.says if diagnosis else "",
        misconception=diagnosis.name if diagnosis else "",
        failure=failure,
        hidden=item.hidden,
    )


class _Enough(BaseException):
    """Stops Hypothesis' search for a simpler failure; BaseException, so that it is not caught."""


def _simplest(
    exercise: Exercise,
    item: Check,
    candidate: Candidate,
    seed: int,
    misconception: Misconception | None,
) -> Attempt | None:
    """The simplest failing attempt. That of a known misconception is the candidate's as well, if
    the candidate does the same there; otherwise it is searched for."""
    if misconception:
        model = _simplest_of(exercise, item, seed, misconception)
        if model:
            attempt = Attempt(exercise, item, candidate, model.drawn)
            pairs = zip(attempt.calls, model.calls, strict=False)
            alike = len(attempt.calls) == len(model.calls) and all(_same(a, b) for a, b in pairs)
            if attempt.failure and alike:
                return attempt
    return _shrink(exercise, item, candidate, seed)


@functools.lru_cache(maxsize=1024)
def _simplest_of(
    exercise: Exercise, item: Check, seed: int, misconception: Misconception
) -> Attempt | None:
    return _shrink(exercise, item, Local(misconception.function), seed)


def _shrink(exercise: Exercise, item: Check, candidate: Candidate, seed: int) -> Attempt | None:
    """The simplest failing attempt that Hypothesis finds within a fixed number of runs.

    The bound is a count, so that feedback too is the same on every machine. It is None if even that
    takes too long: what is shown must not depend on how far a search came.
    """
    simplest: Attempt | None = None
    until = time.monotonic() + SHRINK_SECONDS
    runs, most = 0, min(SHRINK_RUNS, KERNEL_SHRINK_RUNS) if exercise.decorator else SHRINK_RUNS

    def test(drawn: Drawn) -> None:
        nonlocal simplest, runs
        attempt = Attempt(exercise, item, candidate, drawn)
        if simplest is not None:
            runs += 1
        if attempt.failure:
            simplest = attempt
        if runs > most or time.monotonic() > until:
            raise _Enough
        if attempt.failure:
            raise Mismatch("")

    with contextlib.suppress(_Enough, Exception):
        run(item, seed, test, shrink=True)
    return simplest if time.monotonic() <= until else None


def foreseen(exercise: Exercise, item: Check, seed: int) -> list[Call]:
    """The calls a check makes when the reference answers: fetched from a child in one batch.

    A candidate that answers differently may be asked other things later; those calls go live.
    """
    return [call for part in planned(exercise, item, seed).parts for call in part.calls]


def diagnose(exercise: Exercise, calls: list[Call], suspect: str = "") -> Misconception | None:
    """The first misconception that does exactly what the candidate did in all of ``calls``.

    Args:
        suspect: the one that explained an earlier check, which is tried first.
    """
    if not calls:
        return None
    for misconception in sorted(exercise.misconceptions, key=lambda m: m.name != suspect):
        wrong = Local(misconception.function)
        if all(_same(outcome, call) for call, outcome in _replay(wrong, calls)):
            return misconception
    return None


def _replay(candidate: Local, calls: list[Call]) -> Iterator[tuple[Call, Call]]:
    for call in calls:
        again = Call(call.args, call.kwargs)
        try:
            again.value = candidate(*call.args, **call.kwargs)
        except CandidateError as error:
            again.error = error
        yield call, again


def _same(a: Call, b: Call) -> bool:
    if isinstance(a.error, CandidateError) or isinstance(b.error, CandidateError):
        both = isinstance(a.error, CandidateError) and isinstance(b.error, CandidateError)
        return both and a.error.kinds == b.error.kinds  # type: ignore[union-attr]
    return same(a.value, b.value)


def same(a: Any, b: Any) -> bool:
    """Whether two results are the same data, up to number types and float rounding.

    >>> same((torch.tensor([1, 2]), 3), (torch.tensor([1.0, 2.0]), 3.0))
    True
    """
    if isinstance(a, tuple | list):
        return (
            isinstance(b, tuple | list)
            and len(a) == len(b)
            and all(same(x, y) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Tensor | bool | int | float) and isinstance(b, Tensor | bool | int | float):
        x, y = as_double(a), as_double(b)
        return x.shape == y.shape and torch.allclose(x, y, rtol=1e-5, atol=1e-8, equal_nan=True)
    return bool(type(a) is type(b) and a == b)
