"""The class report: one HTML file for the lecturer, made from a graded course folder.

Points come from nbgrader's gradebook (so manual grades and late penalties count), everything else
from the verdicts that grading stored in the autograded notebooks. `read_class` gathers, `render`
writes: the page holds its own style, asks nothing of the network, and escapes whatever a student
wrote or is called.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from markupsafe import Markup
from nbformat import NotebookNode

from autograder.verdict import MIME, Verdict

BINS = 16  # bars of the histogram, at most


@dataclass(frozen=True)
class Adjustment:
    """Points that did not come from the checks: a person's, or a rule's such as the late penalty.

    Attributes:
        points: added to (or taken from) the automatic points; None while a person has yet to
        decide.
    """

    what: str
    points: float | None
    detail: str = ""


@dataclass(frozen=True)
class Student:
    """One student's result.

    Attributes:
        score: None for who did not hand in, or handed in what could not be graded (``ungraded``).
    """

    id: str
    name: str
    score: float | None
    possible: float
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    adjustments: list[Adjustment] = field(default_factory=list)
    ungraded: bool = False

    @property
    def checked(self) -> int:
        """Points the checks gave, before anybody adjusted them."""
        return sum(verdict.points for verdict in self.verdicts.values())

    @property
    def waiting(self) -> bool:
        return any(adjustment.points is None for adjustment in self.adjustments)


@dataclass(frozen=True)
class CheckRate:
    """How many students passed, failed and never reached a check."""

    exercise: str
    title: str
    statement: str
    passed: int
    failed: int
    todo: int

    @property
    def rate(self) -> float:
        """Fraction of the graded submissions that passed."""
        return self.passed / max(1, self.passed + self.failed + self.todo)


@dataclass(frozen=True)
class CommonMistake:
    """A misconception that was recognised, and in whose work."""

    exercise: str
    misconception: str
    says: str
    students: list[Student]


@dataclass(frozen=True)
class Bar:
    """Students whose score is at least ``low`` and below ``high`` (the last bar includes it)."""

    low: float
    high: float
    students: int


@dataclass(frozen=True)
class ClassReport:
    """A graded assignment of a class; the numbers of the page are properties of it."""

    assignment: str
    title: str
    students: list[Student]
    possible: float
    graded_with: list[str] = field(default_factory=list)
    walled: bool = False  # whether all student code ran in a sandbox

    @cached_property
    def submitted(self) -> list[Student]:
        return [student for student in self.students if student.score is not None]

    @cached_property
    def missing(self) -> list[Student]:
        return [student for student in self.students if student.score is None]

    @cached_property
    def scores(self) -> list[float]:
        return [student.score for student in self.students if student.score is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def median(self) -> float | None:
        return statistics.median(self.scores) if self.scores else None

    @property
    def waiting(self) -> int:
        """Submissions with an answer that a person has yet to read."""
        return sum(student.waiting for student in self.students)

    @cached_property
    def exercises(self) -> list[str]:
        """Names of the exercises, in the order of the notebook."""
        return list(dict.fromkeys(name for s in self.students for name in s.verdicts))

    @cached_property
    def histogram(self) -> list[Bar]:
        """Bars of equal, round width from 0 to the points possible."""
        top = max([self.possible, *self.scores, 1.0])
        width = _round_up(top / BINS)
        bars = []
        for i in range(math.ceil(top / width)):
            low, high = i * width, (i + 1) * width
            last = high >= top
            inside = [s for s in self.scores if low <= s < high or (last and s >= high)]
            bars.append(Bar(low, high, len(inside)))
        return bars

    @cached_property
    def rates(self) -> dict[str, list[CheckRate]]:
        """Every check by exercise: the weakest exercise first, and in it the weakest check."""
        rates: dict[str, list[CheckRate]] = {}
        for exercise in self.exercises:
            verdicts = [s.verdicts[exercise] for s in self.students if exercise in s.verdicts]
            found: dict[str, CheckRate] = {}
            for name, result in {r.check: r for v in verdicts for r in v.results}.items():
                all_of_it = [r.status for v in verdicts for r in v.results if r.check == name]
                count = {s: all_of_it.count(s) for s in ("passed", "failed", "todo")}
                found[name] = CheckRate(exercise, result.title, result.statement, **count)
            rates[exercise] = sorted(found.values(), key=lambda rate: rate.rate)
        return dict(sorted(rates.items(), key=lambda item: _mean([r.rate for r in item[1]])))

    @cached_property
    def mistakes(self) -> list[CommonMistake]:
        """The misconceptions that were recognised, commonest first."""
        found: dict[tuple[str, str], CommonMistake] = {}
        for student in self.students:
            for exercise, verdict in student.verdicts.items():
                said = {r.misconception: r.diagnosis for r in verdict.results if r.misconception}
                for name, says in said.items():
                    new = CommonMistake(exercise, name, says, [])
                    found.setdefault((exercise, name), new).students.append(student)
        return sorted(found.values(), key=lambda mistake: -len(mistake.students))


def write_report(course: Path, assignment: str, out: Path) -> Path:
    """Write the report of a graded assignment to ``out`` and return it.

    Args:
        course: a course folder in which `fewer grade` has run.
        assignment: the name of the lab, such as ``lab1_quantization``.
        out: the HTML file to write; its folder is made if need be.

    Raises:
        FileNotFoundError: if ``course`` has no gradebook.
        ValueError: if the gradebook has no such assignment; the message lists those it has.
    """
    page = render(read_class(course, assignment))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def read_class(course: Path, assignment: str) -> ClassReport:
    """Gather a class from the gradebook and the autograded notebooks of ``course``."""
    from nbgrader.api import Gradebook, MissingEntry  # takes a second: only who reads pays

    database = course / "gradebook.db"
    if not database.is_file():
        raise FileNotFoundError(
            f"course must be a folder with a gradebook.db, got {course}: run `fewer grade` first"
        )
    with Gradebook(f"sqlite:///{database.resolve()}") as book:
        try:
            entry = book.find_assignment(assignment)
        except MissingEntry:
            known = ", ".join(a.name for a in book.assignments) or "none yet"
            raise ValueError(
                f"assignment must be one of the gradebook's ({known}), got {assignment!r}"
            ) from None
        students = []
        graded_with, walled = set(), []
        for person in book.students:
            name = " ".join(part for part in (person.first_name, person.last_name) if part)
            student = Student(person.id, name or person.id, None, entry.max_score)
            notebooks = sorted((course / "autograded" / person.id / assignment).glob("*.ipynb"))
            try:
                submission = book.find_submission(assignment, person.id)
            except MissingEntry:
                submission = None
            if submission is None or not notebooks:
                handed_in = (course / "submitted" / person.id / assignment).exists()
                students.append(replace(student, ungraded=handed_in))
                continue
            found: dict[str, Verdict] = {}
            for nb in (nbformat.read(path, as_version=4) for path in notebooks):
                found |= verdicts(nb)
                if made := nb.metadata.get("fewer"):
                    graded_with.add(f"fewer {made['version']}, seed {made['seed']}")
                    walled.append(made.get("sandbox") is True)
            score = max(0.0, submission.score - submission.late_submission_penalty)
            adjustments = _adjustments(submission)
            students.append(replace(student, score=score, verdicts=found, adjustments=adjustments))
        students.sort(key=lambda student: (student.name.casefold(), student.id))
        title = _title(course, assignment)
        return ClassReport(
            assignment,
            title,
            students,
            entry.max_score,
            sorted(graded_with),
            walled=bool(walled) and all(walled),
        )


def verdicts(nb: NotebookNode) -> dict[str, Verdict]:
    """The verdicts stored as outputs of a notebook's grade cells, by exercise.

    Outputs of other cells do not count (a student may display anything there), nor does what
    cannot be read as a verdict.
    """
    found = {}
    for cell in nb.cells:
        about = cell.metadata.get("nbgrader", {})
        if not about.get("grade") or not str(about.get("grade_id", "")).startswith("check_"):
            continue
        for output in cell.get("outputs", []):
            if data := output.get("data", {}).get(MIME):
                try:
                    verdict = Verdict.from_json(data)
                except (KeyError, TypeError, AttributeError):
                    continue
                found[about["grade_id"].removeprefix("check_")] = verdict
    return found


def _adjustments(submission: Any) -> list[Adjustment]:
    """What persons and rules did to the automatic points of a submission in the gradebook."""
    changes = []
    for notebook in submission.notebooks:
        said = {c.name: c.manual_comment for c in notebook.comments if c.manual_comment}
        for grade in notebook.grades:
            automatic = grade.auto_score
            exercise = grade.name.removeprefix("check_")
            comment = said.pop(exercise, "") or said.pop(grade.name, "")
            if grade.needs_manual_grade:
                changes.append(Adjustment(f"{exercise}: to be graded by hand", None, comment))
            elif grade.manual_score is not None:
                by = grade.manual_score - (automatic or 0.0)
                how = "adjusted by hand" if grade.name.startswith("check_") else "graded by hand"
                changes.append(Adjustment(f"{exercise}: {how}", by, comment))
            elif comment:
                changes.append(Adjustment(f"{exercise}: remark", 0.0, comment))
            if grade.extra_credit:
                changes.append(Adjustment(f"{exercise}: extra credit", grade.extra_credit))
        changes += [Adjustment(f"{cell}: remark", 0.0, comment) for cell, comment in said.items()]
    if penalty := submission.late_submission_penalty:
        hours = submission.total_seconds_late / 3600
        changes.append(
            Adjustment("late penalty", -penalty, f"{hours:.1f} hours after the due date")
        )
    return changes


def _title(course: Path, assignment: str) -> str:
    """The first heading of the released notebook, or the assignment's name."""
    for folder in ("release", "source"):
        for path in sorted((course / folder / assignment).glob("*.ipynb")):
            for cell in nbformat.read(path, as_version=4).cells:
                for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
                    if line.startswith("# "):
                        return line.removeprefix("# ").strip()
    return assignment


def render(report: ClassReport) -> str:
    """The report as one HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autograder"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["points"] = points
    return environment.get_template("report.html.j2").render(
        report=report,
        # Ids may hold anything, so anchors are numbers.
        anchor={student.id: f"student-{i}" for i, student in enumerate(report.students, start=1)},
        worth={name: v.possible for s in report.students for name, v in s.verdicts.items()},
        card=lambda verdict: Markup(verdict.html()),  # escapes by itself
        axis=_ticks(max((bar.students for bar in report.histogram), default=0)),
    )


def points(value: float | None) -> str:
    """A number of points as people write it: whole where it is whole, one decimal otherwise.

    >>> points(12.0), points(7.25), points(None)
    ('12', '7.2', '–')
    """
    if value is None:
        return "–"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def _round_up(width: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50 ... : bars start at numbers one can read."""
    steps = (m * 10**e for e in range(9) for m in (1, 2, 5))
    return float(next(step for step in steps if step >= width))


def _ticks(top: int) -> list[int]:
    """Some whole numbers from 0 to at least ``top``.

    >>> _ticks(5)
    [0, 2, 4, 6]
    """
    step = int(_round_up(max(1, top) / 4))
    return [step * i for i in range(math.ceil(max(1, top) / step) + 1)]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
