"""Judge a notebook: run its cells in a child process, and judge each exercise at its grade cell.

A verdict depends on the notebook and the seed alone. Code that crashes or hangs costs its exercise
and a child: a fresh one runs the other cells again, and the exercises below are judged as if
nothing had been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from nbformat import NotebookNode

import autograder.exercise
from autograder.compare import CandidateDied, CandidateError
from autograder.exercise import Exercise
from autograder.foresight import Answer, Plan, planned
from autograder.judge import SEED, judge
from autograder.remote import CALL_SECONDS, CELL_SECONDS, MEMORY, Child, Remote, Zygote
from autograder.verdict import GRADE_ID, Failure, Result, Verdict

NOTEBOOK_SECONDS = 600.0


def judge_notebook(
    nb: NotebookNode,
    zygote: Zygote,
    seed: int = SEED,
    cell_seconds: float = CELL_SECONDS,
    call_seconds: float = CALL_SECONDS,
    notebook_seconds: float = NOTEBOOK_SECONDS,
    memory: int = MEMORY,
    explain: bool = True,
    progress: Callable[[str], None] | None = None,
    find: Callable[[str], Exercise] = autograder.exercise.find,
) -> dict[str, Verdict]:
    """The verdict of every exercise that has a grade cell in the notebook, by the exercise's name.

    Cells tagged ``demo`` and the grade cells themselves are not run. An exercise is judged where
    its (last) grade cell stands, with what the cells above it define.

    Args:
        nb: notebook of nbformat 4.
        cell_seconds, call_seconds: how long one cell, and one call of a function, may take.
        notebook_seconds: how long everything may take; what is not judged by then fails.
        memory: bytes that the student's process may take beyond what torch and the library need.
        explain: look for the simplest counter-example and the misconception behind a failure.
        progress: called with the name of each exercise before it is judged.
        find: where exercises come from.

    Raises:
        GraderError: the zygote is gone.
    """
    cells = [cell for cell in nb.cells if cell.cell_type == "code"]
    graded = {name: i for i, cell in enumerate(cells) if (name := _graded(cell)) is not None}
    verdicts: dict[str, Verdict] = {}
    limits = {
        "seed": seed,
        "memory": memory,
        "cell_seconds": cell_seconds,
        "call_seconds": call_seconds,
        "deadline": time.monotonic() + notebook_seconds,
    }
    for name in graded:
        with contextlib.suppress(KeyError):  # there is no such exercise: said below
            for check in find(name).checks:
                zygote.keep(planned(find(name), check, seed))
    with Session(zygote, limits) as session:
        for i, cell in enumerate(cells):
            name = _graded(cell)
            if _is_demo(cell):
                continue
            if name is None:
                own = _solved(cell)
                session.run_cell("".join(cell.source), own if own in graded else str(i + 1))
            elif graded[name] == i:
                if progress:
                    progress(name)
                verdicts[name] = _judge(name, session, seed, explain, find)
                if session.in_doubt():
                    verdicts[name] = _judge(name, session, seed, explain, find)
                session.guarded = None
    return verdicts


def _judge(
    name: str, session: Session, seed: int, explain: bool, find: Callable[[str], Exercise]
) -> Verdict:
    try:
        exercise = find(name)
    except KeyError as error:
        return Verdict(name, [], seed, note=str(error.args[0]))
    trouble = session.troubles.get(name)
    if isinstance(trouble, CandidateDied):
        return _lost(exercise, seed, f"your cell did not run to its end: {trouble}")
    try:
        kind, can_be_called, home = session.alive().look(name)
        candidate = Phoenix(session, name)
    except (CandidateDied, CandidateError) as error:
        return _lost(exercise, seed, str(error))
    if trouble and home != f"<cell {name}>":
        return _lost(exercise, seed, f"your cell raised {trouble}", trouble.trace)
    if not kind:
        missing = "" if name in session.labels else ", and its cell is missing"
        return _lost(exercise, seed, f"no function is called {name}{missing}", "", session.report())
    if not can_be_called:
        return _lost(exercise, seed, f"{name} is no function, but an object of type {kind}")
    verdict = judge(exercise, candidate, seed, explain)
    note = f"Below the function, your cell raised {trouble}" if trouble else session.report()
    return verdict if verdict.passed else dataclasses.replace(verdict, note=note)


def _lost(exercise: Exercise, seed: int, why: str, trace: str = "", note: str = "") -> Verdict:
    """A verdict where nothing could be judged. No hints: they are about the method."""
    failure = Failure(why, trace=trace)
    results = [
        Result(c.name, c.statement, c.points, "failed", failure=failure, hidden=c.hidden)
        for c in exercise.checks
    ]
    return Verdict(exercise.name, results, seed, note, hidden_points=exercise.hidden_points)


class Session:
    """The cells of one notebook in one child; after a death, in a fresh one without the culprit.

    Attributes:
        troubles: what came of the cells that did not run to their end, by label.
        labels: of the cells that were run.
        guarded: the exercise that is being judged.
        called: the exercises whose functions were called in the present child.
    """

    def __init__(self, zygote: Zygote, limits: dict[str, Any]) -> None:
        self.zygote = zygote
        self.limits = limits
        self.troubles: dict[str, CandidateError | CandidateDied] = {}
        self.labels: set[str] = set()
        self.guarded: str | None = None
        self.called: set[str] = set()
        self._past: list[tuple[str, str]] = []
        self._child: Child | None = None
        self._guard: str | None = None

    def run_cell(self, source: str, label: str) -> None:
        """Run a cell, remember how it went, and never repeat one that kills or hangs the child."""
        self.labels.add(label)
        self.troubles.pop(label, None)
        try:
            self.alive().run_cell(source, label)
        except CandidateError as error:
            self.troubles[label] = error
        except CandidateDied as death:
            if self.in_doubt():
                return self.run_cell(source, label)
            self.troubles[label] = death
            return None
        return self._past.append((source, label))

    def in_doubt(self) -> bool:
        """Whether the child died, and perhaps by what another exercise left running in it. Then a
        second try in a fresh child tells."""
        died = self._child is not None and self._child.dead and not self._child.slow
        in_time = time.monotonic() < self.limits["deadline"]
        return bool(died and in_time and self.called - {self.guarded})

    def alive(self) -> Child:
        """A living child that has run all that was run so far, with the guard as it should be.

        Raises:
            CandidateDied: the time for the notebook is up.
        """
        while True:
            if time.monotonic() > self.limits["deadline"]:
                raise CandidateDied("the time for the whole notebook is up")
            if self._child is None or not self._child.idle():
                self.close()
                self._guard = None
                self.called.clear()
                self._child = self.zygote.child(**self.limits)
                if not self._repeat(self._child):
                    continue
            if self._guard != self.guarded:
                self._child.guard(self.guarded)
                self._guard = self.guarded
            return self._child

    def _repeat(self, child: Child) -> bool:
        """Run the past in a fresh child. A cell that dies this time has no place in it."""
        for i, (source, label) in enumerate(self._past):
            try:
                child.run_cell(source, label)
            except CandidateError:
                pass  # as it did the first time
            except CandidateDied as death:
                if time.monotonic() < self.limits["deadline"]:
                    self.troubles[label] = death
                    del self._past[i]
                return False
        return True

    def report(self) -> str:
        """What to tell about cells that belong to no exercise and did not run to their end."""
        for label, trouble in self.troubles.items():
            if label.isdigit():
                died = isinstance(trouble, CandidateDied)
                how = "did not run to its end:" if died else "raised"
                return f"Code cell {label} above {how} {trouble}"
        return ""

    def close(self) -> None:
        if self._child is not None:
            self._child.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Phoenix(Remote):
    """A candidate that gets a fresh child for the next check, if one died while a counter-example
    was made simpler: points do not depend on explanations."""

    def __init__(self, session: Session, name: str) -> None:
        session.guarded = name
        super().__init__(session.alive(), name)
        self.session = session
        session.called.add(name)

    def foresee(self, plan: Plan) -> list[list[Answer]]:
        self.child = self.session.alive()
        self.session.called.add(self.name)
        return super().foresee(plan)


def _metadata(cell: NotebookNode) -> dict[str, Any]:
    nbgrader = cell.metadata.get("nbgrader")
    return nbgrader if isinstance(nbgrader, dict) else {}


def _is_demo(cell: NotebookNode) -> bool:
    tags = cell.metadata.get("tags")
    return isinstance(tags, list) and "demo" in tags


def _graded(cell: NotebookNode) -> str | None:
    """The exercise that a grade cell is for; None for any other cell."""
    about = _metadata(cell)
    grade_id = about.get("grade_id")
    if not (about.get("grade") and not about.get("solution") and isinstance(grade_id, str)):
        return None
    return grade_id.removeprefix(GRADE_ID) if grade_id.startswith(GRADE_ID) else None


def _solved(cell: NotebookNode) -> str:
    """The exercise whose solution a cell is for; '' for any other cell."""
    about = _metadata(cell)
    return str(about.get("grade_id")) if about.get("solution") else ""
