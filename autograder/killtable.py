"""The kill table: the checks themselves, tested.

A check set is good if it rejects what is wrong and accepts what is right. For each exercise:

- every misconception must fail a check, and the student must read that misconception's sentence;
- of the automatic mutants of the reference (`autograder.mutants`), at least 95% of those that
  differ from it must fail; the others are named in ``Exercise.equivalent`` with the reason;
- every correct variant must pass under many seeds: those written for the exercise, and the
  reference in other clothes (`autograder.costumes`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from autograder.battery import battery
from autograder.bounded import Bounded, RanAway
from autograder.candidate import Call, Local
from autograder.costumes import costumes
from autograder.exercise import Check, Exercise, Misconception, exercises, find
from autograder.judge import DIAGNOSE_ON, SEED, Attempt, diagnose
from autograder.mutants import mutants

GOAL = 0.95  # share of the mutants that differ from the reference
FEW = 2  # inputs of each check for what is listed as equivalent, if the table is not thorough
SEEDS_A_PART = 5

Function = Callable[..., Any]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Target:
    """A wrong implementation and what became of it.

    Attributes:
        fate: 'killed', 'equivalent' or 'survived'.
        by: the checks that failed it (one is enough unless the table is thorough).
        note: why a mutant is equivalent.
    """

    name: str
    fate: str
    by: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Rejection:
    """A correct variant that a check did not accept."""

    variant: str
    seed: int
    check: str
    message: str


@dataclass
class Row:
    """The kill table of one exercise. ``errors`` make it fail, ``hints`` are for its author."""

    exercise: str
    misconceptions: list[Target] = field(default_factory=list)
    mutants: list[Target] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)
    seeds: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def count(self, fate: str) -> int:
        return sum(mutant.fate == fate for mutant in self.mutants)

    @property
    def rate(self) -> float:
        """The share of mutants killed, of those that differ from the reference."""
        return _share(self.count("killed"), len(self.mutants) - self.count("equivalent"))

    @property
    def problems(self) -> list[str]:
        """What keeps the exercise from being well checked, a sentence each."""
        found = [
            f"the misconception {m.name} passes every check"
            for m in self.misconceptions
            if m.fate != "killed"
        ]
        if self.rate < GOAL:
            found.append(f"{self.rate:.1%} of the mutants are killed, less than {GOAL:.0%}")
        rejected = sorted({r.variant for r in self.rejections})
        found += [f"the correct variant {name!r} is rejected" for name in rejected]
        return [f"{self.exercise}: {text}" for text in found + self.errors]


@dataclass
class KillTable:
    """One row an exercise; printed by rich, exported by `to_json`."""

    rows: list[Row]

    @property
    def raw_rate(self) -> float:
        """Killed mutants over all mutants, equivalent ones included."""
        return _share(self._sum("killed"), sum(len(row.mutants) for row in self.rows))

    @property
    def rate(self) -> float:
        """Killed mutants over those that differ from the reference."""
        return _share(self._sum("killed"), self._sum("killed") + self._sum("survived"))

    @property
    def ok(self) -> bool:
        return not self.problems()

    def problems(self) -> list[str]:
        """What makes `ok` false, a sentence each."""
        return [problem for row in self.rows for problem in row.problems]

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "rate": self.rate,
            "raw_rate": self.raw_rate,
            "problems": self.problems(),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def _sum(self, fate: str) -> int:
        return sum(row.count(fate) for row in self.rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table()
        for row in self.rows:
            for title, style, lines in _details(row):
                yield Text(f"{row.exercise}: {title}", style=style)
                yield from (Text(f"  {line}") for line in lines)
        killed, equivalent = self._sum("killed"), self._sum("equivalent")
        yield Text(
            f"{killed} of the {killed + self._sum('survived')} mutants that differ from the "
            f"reference are killed ({self.rate:.1%}); with the {equivalent} equivalent ones "
            f"counted as well, {self.raw_rate:.1%}."
        )
        for problem in self.problems():
            yield Text(f"✗ {problem}", style="red")
        if self.ok:
            yield Text("✓ the checks reject what is wrong and accept what is right", style="green")

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("exercise")
        columns = ("misconceptions", "mutants", "killed", "equivalent", "survived", "rate")
        for column in (*columns, "variants x seeds", "rejected"):
            table.add_column(column, justify="right")
        for row in self.rows:
            caught = sum(m.fate == "killed" for m in row.misconceptions)
            table.add_row(
                row.exercise,
                f"{caught}/{len(row.misconceptions)}",
                str(len(row.mutants)),
                *(str(row.count(fate)) for fate in ("killed", "equivalent", "survived")),
                f"{row.rate:.1%}",
                f"{len(row.variants)} x {row.seeds}",
                str(len(row.rejections)),
                style="red" if row.problems else "",
            )
        return table


def kill_table(
    names: Sequence[str] | None = None,
    seeds: int = 200,
    jobs: int | None = None,
    progress: Progress | None = None,
    thorough: bool = True,
) -> KillTable:
    """Measure the checks of the named exercises (default: all).

    Args:
        seeds: every correct variant is judged with the seeds 0 to seeds - 1.
        jobs: processes; by default one a core. 1 works in this process.
        progress: called as ``progress(done, total, what)`` after each part of the work.
        thorough: run every check on every mutant, which is needed to tell idle checks; otherwise a
            mutant is done with at the first check that fails it, a misconception where it is called
            by its name, and what is listed as equivalent after two inputs of each check.

    Raises:
        KeyError: no exercise has one of the names.
        ValueError: seeds or jobs is below 1.
    """
    jobs = (os.cpu_count() or 1) if jobs is None else jobs
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    chosen = [find(name).name for name in (exercises() if names is None else names)]
    rows = {name: Row(name, seeds=seeds) for name in chosen}
    tasks: list[tuple[str, range | None]] = [(name, None) for name in chosen]
    for start in range(0, seeds, SEEDS_A_PART):
        tasks += [(name, range(start, min(start + SEEDS_A_PART, seeds))) for name in chosen]
    tell = progress or (lambda done, total, what: None)
    tell(0, len(tasks), "")
    for done, (name, part) in enumerate(_work(tasks, min(jobs, len(tasks)), thorough), start=1):
        _merge(rows[name], part)
        tell(done, len(tasks), name)
    return KillTable(list(rows.values()))


def _work(
    tasks: list[tuple[str, range | None]], jobs: int, thorough: bool
) -> Iterator[tuple[str, Row]]:
    """The parts as they are finished, here or in other processes."""
    if jobs == 1:
        yield from ((name, _part(name, seeds, thorough)) for name, seeds in tasks)
        return
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork with threads
    with concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        waiting = {pool.submit(_part, name, seeds, thorough): name for name, seeds in tasks}
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _part(name: str, seeds: range | None, thorough: bool) -> Row:
    exercise = find(name)
    return attack(exercise, thorough) if seeds is None else accept(exercise, seeds)


def _merge(row: Row, part: Row) -> None:
    row.misconceptions += part.misconceptions
    row.mutants += part.mutants
    row.variants = part.variants or row.variants
    row.rejections = sorted(row.rejections + part.rejections, key=lambda r: (r.variant, r.seed))
    row.errors += part.errors
    row.hints += part.hints


# What is wrong must be rejected


def attack(exercise: Exercise, thorough: bool = True, seed: int = SEED) -> Row:
    """Run the checks on every misconception and every automatic mutant of an exercise."""
    row = Row(exercise.name)
    made = mutants(inspect.unwrap(exercise.reference))
    exercise = remembering(exercise)
    for misconception in exercise.misconceptions:
        by: list[str] = []
        named: list[Misconception] = []
        for check, calls in _failing_calls(exercise, misconception.function, seed):
            by.append(check)
            found = diagnose(exercise, calls, named[0].name if named else "")
            named += [found] if found else []
            if named == [misconception] and not thorough:
                break
        fate = "killed" if by else "survived"
        row.misconceptions.append(Target(misconception.name, fate, tuple(by)))
        first = named[0] if named else None  # this is the one the student reads
        if by and first is None:
            row.errors.append(f"the misconception {misconception.name} is never diagnosed")
        elif first and first is not misconception:
            text = f"the misconception {misconception.name} is diagnosed as {first.name}"
            if misconception in named:
                row.errors.append(f"{text}, although a later check tells them apart")
            else:
                row.hints.append(f"{text}: no check tells them apart")
    for mutant in made:
        bounded = Bounded(exercise.decorated(mutant.function), exercise.decorator is not None)
        reason = exercise.equivalent.get(mutant.text, "")
        few = FEW if reason and not thorough else None
        by = list(_killers(exercise, bounded, seed, thorough, few))
        if by and not thorough:  # what kills one mutant of a line mostly kills the next one, too
            exercise.checks.sort(key=lambda check: check.name != by[0])
        fate = "killed" if by else "equivalent" if reason else "survived"
        row.mutants.append(Target(mutant.text, fate, tuple(by), "" if by else reason))
        if by and reason:
            row.errors.append(f"listed as equivalent, but {by[0]} kills it: {mutant.text}")
    gone = exercise.equivalent.keys() - {mutant.name for mutant in row.mutants}
    row.errors += [f"listed as equivalent, but no longer a mutant: {text}" for text in sorted(gone)]
    if thorough:
        row.hints += _idle(exercise, [*row.misconceptions, *row.mutants])
    return row


def _idle(exercise: Exercise, targets: list[Target]) -> Iterator[str]:
    """Checks that the exercise could do without, as far as catching mistakes goes."""
    names = [check.name for check in exercise.checks]
    kill = {name for target in targets for name in target.by}
    alone = {target.by[0] for target in targets if len(target.by) == 1}
    if idle := [name for name in names if name not in kill]:
        yield f"checks that kill nothing: {', '.join(idle)}"
    if idle := [name for name in names if name in kill - alone]:
        yield f"checks that kill only what another one kills too: {', '.join(idle)}"


def _killers(
    exercise: Exercise,
    candidate: Local,
    seed: int,
    thorough: bool = True,
    inputs: int | None = None,
) -> Iterator[str]:
    """Names of the checks that fail the candidate, on all inputs or so many of each check."""
    for check in exercise.checks:
        if first_failure(exercise, check, candidate, seed, inputs):
            yield check.name
            if not thorough:
                return


def first_failure(
    exercise: Exercise, check: Check, candidate: Local, seed: int, inputs: int | None = None
) -> tuple[int, str] | None:
    """The number, from 1, of the first inputs on which the check fails, and what it says of them;
    None if it never does."""
    for number, drawn in enumerate(battery(check, seed)[:inputs], start=1):
        try:
            attempt = Attempt(exercise, check, candidate, drawn)
        except RanAway as error:
            return number, str(error)
        if attempt.todo or attempt.failure:
            said = attempt.failure.message if attempt.failure else "nothing was written yet"
            return number, said
    return None


def _failing_calls(
    exercise: Exercise, function: Function, seed: int
) -> Iterator[tuple[str, list[Call]]]:
    """The checks that fail, each with the calls that a diagnosis looks at."""
    for check in exercise.checks:
        attempts = (Attempt(exercise, check, Local(function), d) for d in battery(check, seed))
        calls = [attempt.calls for attempt in attempts if attempt.failure]
        if calls:
            yield check.name, [call for some in calls[:DIAGNOSE_ON] for call in some]


# What is right must be accepted


def accept(exercise: Exercise, seeds: range) -> Row:
    """Run the checks on every correct variant of an exercise, with every seed."""
    exercise = remembering(
        exercise
    )  # the costumes, too, ask the reference what it was asked before
    written = {variant.how: variant.function for variant in exercise.variants}
    memory = exercise.decorator is not None
    variants = {**costumes(exercise.reference, memory), **written}
    row = Row(exercise.name, variants=list(variants), seeds=len(seeds))
    for seed in seeds:
        for how, function in variants.items():
            for check in exercise.checks:
                if failure := first_failure(exercise, check, Local(function), seed):
                    row.rejections.append(Rejection(how, seed, check.name, failure[1]))
        battery.cache_clear()  # a seed's inputs are not needed again
    return row


def remembering(exercise: Exercise) -> Exercise:
    """The exercise with a reference that works out each answer once.

    Every answer of a candidate is brought into the form of the reference's (`compare.like`), and
    here hundreds of candidates are asked the same. Kernels take their time, and always answer the
    same: so their misconceptions, which are judged and then diagnosed, remember as well.
    """
    misconceptions = exercise.misconceptions
    if exercise.decorator is not None:
        misconceptions = [
            dataclasses.replace(m, function=_remembering(m.function)) for m in misconceptions
        ]
    return dataclasses.replace(
        exercise,
        reference=_remembering(exercise.reference),
        checks=list(exercise.checks),
        misconceptions=misconceptions,
    )


def _remembering(function: Function) -> Function:
    known: dict[Any, Any] = {}

    @functools.wraps(function)
    def answer(*args: Any, **kwargs: Any) -> Any:
        key = _key((args, kwargs))
        if key not in known:
            try:
                known[key] = function(*args, **kwargs)
            except Exception as error:
                known[key] = error
        if isinstance(known[key], Exception):
            raise known[key]
        return known[key]

    return answer


def _key(value: Any) -> Any:
    """Something to look a value up by."""
    if isinstance(value, Tensor):
        # As text: NaN equals nothing, but it reads the same.
        return value.dtype, value.shape, value.stride(), repr(value.detach().flatten().tolist())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(v)) for name, v in value.items())
    return type(value), repr(value)


# In words


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _details(row: Row) -> Iterator[tuple[str, str, list[str]]]:
    """Title, style and lines of what the table's row does not show."""
    survivors = [m.name for m in row.mutants if m.fate == "survived"]
    if survivors:
        yield "mutants that pass every check", "yellow", survivors
    equivalent = [f"{m.name}\n      {m.note}" for m in row.mutants if m.fate == "equivalent"]
    if equivalent:
        yield "equivalent mutants", "dim", equivalent
    rejected: dict[tuple[str, str], list[Rejection]] = {}
    for rejection in row.rejections:
        rejected.setdefault((rejection.variant, rejection.check), []).append(rejection)
    if rejected:
        lines = [
            f"{variant}: {check} with seed {some[0].seed} ({len(some)} in all): {some[0].message}"
            for (variant, check), some in rejected.items()
        ]
        yield "correct variants that are rejected", "red", lines
    if row.hints:
        yield "hints for the author", "dim", row.hints
