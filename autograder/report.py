"""The class report: one HTML file for the lecturer, made from a graded course folder.

Points come from nbgrader's gradebook (so manual grades and late penalties count), everything else
from what grading stored in the autograded notebooks. `read_class` gathers, `render` writes: the
page holds its own style, asks nothing of the network, and escapes whatever a student wrote or is
called.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from autograder.verdict import GRADE_ID, Result, Verdict, verdicts

if TYPE_CHECKING:
    from nbgrader.apps import NbGrader

    from autograder.gradebook import Book, ByHand, Score

BINS = 16  # bars of the histogram, at most
LARGE = 100  # students of a class whose report shows no cards: a feedback page has them
FEW = 20  # students whose points say little about an exercise
NAMED = 12  # students that are named in one place before the rest is folded


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
        marks: points by exercise and written question, of persons too; what waits is left out.
        notices: what grading remarked about the notebook.
    """

    id: str
    name: str
    score: float | None
    possible: float
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    adjustments: list[Adjustment] = field(default_factory=list)
    ungraded: bool = False
    marks: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

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
    hidden: bool = False

    @property
    def rate(self) -> float:
        """Fraction of the graded submissions that passed."""
        return self.passed / max(1, self.passed + self.failed + self.todo)


@dataclass(frozen=True)
class ItemStatistics:
    """What the class's points say about one exercise or written question.

    Attributes:
        count: students who have points in it.
        full, zero: fractions of them with all points and with none.
        discrimination: correlation of its points with the sum of the student's others; None where
            either is the same for everybody.
    """

    name: str
    possible: float
    count: int
    mean: float
    median: float
    full: float
    zero: float
    discrimination: float | None


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
    worth: dict[str, float] = field(default_factory=dict)  # points possible, as ``Student.marks``

    @property
    def large(self) -> bool:
        return len(self.students) > LARGE

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
        seen: dict[str, dict[str, Result]] = {name: {} for name in self.exercises}
        count: Counter[tuple[str, str, str]] = Counter()
        for student in self.students:
            for exercise, verdict in student.verdicts.items():
                for result in verdict.results:
                    seen[exercise][result.check] = result
                    count[exercise, result.check, result.status] += 1
        rates = {
            exercise: sorted(
                (
                    CheckRate(
                        exercise,
                        result.title,
                        result.statement,
                        count[exercise, check, "passed"],
                        count[exercise, check, "failed"],
                        count[exercise, check, "todo"],
                        result.hidden,
                    )
                    for check, result in checks.items()
                ),
                key=lambda rate: rate.rate,
            )
            for exercise, checks in seen.items()
        }
        return dict(sorted(rates.items(), key=lambda item: _mean([r.rate for r in item[1]])))

    @cached_property
    def by_item(self) -> list[ItemStatistics]:
        """How each exercise did, in the order of the notebook, then the written questions."""
        return [_statistics(name, worth, self.submitted) for name, worth in self.worth.items()]

    @cached_property
    def notices(self) -> list[tuple[str, list[Student]]]:
        """What grading remarked, commonest first, and about whose work."""
        found: dict[str, list[Student]] = {}
        for student in self.students:
            for notice in dict.fromkeys(student.notices):
                found.setdefault(notice, []).append(student)
        return sorted(found.items(), key=lambda item: -len(item[1]))

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
        CourseError: if ``course`` is no course folder, or its database does not answer.
    """
    page = render(read_class(course, assignment))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")
    return out


def read_class(course: Path, assignment: str) -> ClassReport:
    """Gather a class from the gradebook and the autograded notebooks of ``course``."""
    from autograder.course import open_course  # takes a second: only who reads pays

    with open_course(course) as app, _book(app, course, assignment) as book:
        folders = app.coursedir
        scores = {score.student: score for score in book.scores()}
        by_hand, hours_late = book.by_hand(), book.hours_late()
        students = []
        graded_with, walled = set(), []
        worth: dict[str, float] = {}
        for id, name in book.names().items():
            student = Student(id, name, None, book.possible)
            score = scores.get(id)
            if score is None:
                handed_in = folders.format_path(folders.submitted_directory, id, assignment)
                students.append(replace(student, ungraded=Path(handed_in).exists()))
                continue
            found: dict[str, Verdict] = {}
            notices: list[str] = []
            folder = folders.format_path(folders.autograded_directory, id, assignment)
            for nb in _notebooks(Path(folder)):
                found |= verdicts(nb)
                if made := nb.get("metadata", {}).get("fewer"):
                    version = made.get("course") or made["version"]
                    graded_with.add(f"fewer {version}, seed {made['seed']}")
                    walled.append(made.get("sandbox") is True)
                    notices += [*(made.get("remarks") or []), *(made.get("notices") or [])]
            cells = {name.removeprefix(GRADE_ID): cell for name, cell in score.cells.items()}
            for name in [*found, *sorted(cells.keys() - found)]:
                if name in cells:
                    worth.setdefault(name, cells[name].possible)
            students.append(
                replace(
                    student,
                    score=score.points,
                    verdicts=found,
                    adjustments=_adjustments(score, by_hand.get(id, {}), hours_late.get(id, 0.0)),
                    marks={name: c.points for name, c in cells.items() if not c.waiting},
                    notices=notices,
                )
            )
        students.sort(key=lambda student: (student.name.casefold(), student.id))
        return ClassReport(
            assignment,
            _title(app, assignment),
            students,
            book.possible,
            sorted(graded_with),
            walled=bool(walled) and all(walled),
            worth=worth,
        )


def _book(app: NbGrader, course: Path, assignment: str) -> Book:
    """The gradebook of a course, wherever its configuration says that it is."""
    from nbgrader.api import Gradebook, MissingEntry
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from autograder.course import CourseError
    from autograder.gradebook import Book

    try:
        url = make_url(app.coursedir.db_url)
        # SQLite would make one where there is none.
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise FileNotFoundError(
                f"course must be a folder with a gradebook.db, got {course}: "
                "run `fewer grade` first"
            )
        try:
            return Book(app.coursedir.db_url, app.coursedir.course_id, assignment)
        except MissingEntry:
            with Gradebook(app.coursedir.db_url, app.coursedir.course_id) as gradebook:
                known = ", ".join(a.name for a in gradebook.assignments) or "none yet"
            raise ValueError(
                f"assignment must be one of the gradebook's ({known}), got {assignment!r}"
            ) from None
    except SQLAlchemyError as error:
        why = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise CourseError(f"the gradebook cannot be opened: {why}") from error


def _notebooks(folder: Path) -> Iterator[dict[str, Any]]:
    """The notebooks of a folder as plain data: nbformat takes ten times as long to read them.

    They are grading's own, so they need no repair. What is no notebook is left out.
    """
    for path in sorted(folder.glob("*.ipynb")):
        try:
            nb = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(nb, dict):
            yield nb


def _adjustments(
    score: Score, by_hand: Mapping[str, ByHand], hours_late: float
) -> list[Adjustment]:
    """What persons and rules did to the automatic points of a submission."""
    changes = []
    said = dict(score.comments)
    for name, cell in score.cells.items():
        exercise = name.removeprefix(GRADE_ID)
        comment = said.pop(exercise, "") or said.pop(name, "")
        hand = by_hand.get(name)
        if cell.waiting:
            changes.append(Adjustment(f"{exercise}: to be graded by hand", None, comment))
        elif hand and hand.manual is not None:
            how = "adjusted by hand" if name.startswith(GRADE_ID) else "graded by hand"
            by = hand.manual - (hand.automatic or 0.0)
            changes.append(Adjustment(f"{exercise}: {how}", by, comment))
        elif comment:
            changes.append(Adjustment(f"{exercise}: remark", 0.0, comment))
        if hand and hand.extra:
            changes.append(Adjustment(f"{exercise}: extra credit", hand.extra))
    changes += [Adjustment(f"{cell}: remark", 0.0, comment) for cell, comment in said.items()]
    if score.late_penalty:
        late = f"{hours_late:.1f} hours after the due date"
        changes.append(Adjustment("late penalty", -score.late_penalty, late))
    return changes


def _title(app: NbGrader, assignment: str) -> str:
    """The first heading of the released notebook, or the assignment's name."""
    folders = app.coursedir
    for folder in (folders.release_directory, folders.source_directory):
        for nb in _notebooks(Path(folders.format_path(folder, ".", assignment))):
            for cell in nb.get("cells", ()):
                text = "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""
                for line in text.splitlines():
                    if line.startswith("# "):
                        return line.removeprefix("# ").strip()
    return assignment


def _statistics(name: str, possible: float, students: Sequence[Student]) -> ItemStatistics:
    """The numbers of one exercise, over the students who have points in it."""
    marks = [student.marks[name] for student in students if name in student.marks]
    others = [sum(s.marks.values()) - s.marks[name] for s in students if name in s.marks]
    varied = len(set(marks)) > 1 and len(set(others)) > 1
    return ItemStatistics(
        name=name,
        possible=possible,
        count=len(marks),
        mean=_mean(marks),
        median=statistics.median(marks) if marks else 0.0,
        full=_mean([mark >= possible for mark in marks]),
        zero=_mean([mark <= 0 for mark in marks]),
        discrimination=statistics.correlation(marks, others) if varied else None,
    )


def render(report: ClassReport) -> str:
    """The report as one HTML page."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            # Ids may hold anything, so anchors are numbers.
            anchor={
                student.id: f"student-{i}" for i, student in enumerate(report.students, start=1)
            },
            worth={name: v.possible for s in report.students for name, v in s.verdicts.items()},
            few=FEW,
            named=NAMED,
            axis=_ticks(max((bar.students for bar in report.histogram), default=0)),
        )
    )


@functools.cache
def environment() -> jinja2.Environment:
    """Where the pages' templates are; everything in them is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autograder"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["points"] = points
    environment.filters["card"] = lambda verdict: Markup(verdict.html())  # escapes by itself
    return environment


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
