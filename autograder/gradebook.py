"""The gradebook of one assignment: nbgrader's own tables, read and written for a whole class.

nbgrader's API commits after every cell, which takes longer than judging. Here a few statements
write a batch of submissions in one transaction: either all of it is in the gradebook or nothing.
What stands there afterwards is what ``nbgrader autograde`` would have written: scores of persons
stay and are marked for another look, and late penalties follow the course's own rule.

Any database that SQLAlchemy knows will do; the URL is nbgrader's ``c.CourseDirectory.db_url``.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from nbgrader import api, utils
from nbgrader.api import Gradebook, MissingEntry
from sqlalchemy import insert, select, update

COLUMNS = (  # those of nbgrader's own export
    *("assignment", "duedate", "timestamp", "student_id", "last_name", "first_name", "email"),
    *("raw_score", "late_submission_penalty", "score", "max_score"),
)


@dataclass(frozen=True)
class CellScore:
    """Points of one graded cell; ``waiting`` for a person to look at it."""

    points: float
    possible: float
    waiting: bool


@dataclass(frozen=True)
class Score:
    """A submission's points as the gradebook has them.

    Attributes:
        points: what the student gets, late penalty subtracted.
        cells: by the grade cell's name, such as ``check_quantize_symmetric``.
        comments: what a person wrote, by the cell's name.
    """

    student: str
    points: float
    possible: float
    late_penalty: float
    cells: dict[str, CellScore]
    comments: dict[str, str]

    @property
    def waiting(self) -> bool:
        """Whether a person has yet to grade something."""
        return any(cell.waiting for cell in self.cells.values())


@dataclass(frozen=True)
class ByHand:
    """What a person gave for one cell.

    Attributes:
        automatic: the points that stood there before.
        manual: the points instead of these; None where they stand.
        extra: credit on top of either.
    """

    automatic: float | None
    manual: float | None
    extra: float


@dataclass(frozen=True)
class Marks:
    """What grading found in one notebook.

    Attributes:
        points: by the grade cell's name; None where a person has to decide.
        comments: "No response." by the solution cell's name, or None.
    """

    points: dict[str, float | None]
    comments: dict[str, str | None]


@dataclass(frozen=True)
class Entry:
    """What grading found in a submission: marks by notebook; a notebook not handed in has none.

    Attributes:
        timestamp: when it was handed in, in UTC without saying so, as nbgrader keeps it.
    """

    student: str
    timestamp: datetime | None
    notebooks: dict[str, Marks]


def marks(notebook: NotebookNode) -> Marks:
    """The marks that the outputs of an autograded notebook's grade cells say, as nbgrader reads
    them."""
    points: dict[str, float | None] = {}
    comments: dict[str, str | None] = {}
    for cell in notebook.cells:
        if utils.is_grade(cell):
            points[cell.metadata.nbgrader.grade_id] = utils.determine_grade(cell)[0]
        if utils.is_solution(cell) or utils.is_task(cell):
            about = cell.metadata.nbgrader
            untouched = about.get("checksum") == utils.compute_checksum(cell)
            silent = untouched and not utils.is_task(cell)
            comments[about.grade_id] = "No response." if silent else None
    return Marks(points, comments)


class Book:
    """The gradebook of a course, opened at one assignment.

    Raises:
        MissingEntry: the assignment was never released.
    """

    def __init__(self, url: str, course_id: str, assignment: str) -> None:
        self.gradebook = Gradebook(url, course_id)
        self.db = self.gradebook.db
        try:
            self.assignment = self.gradebook.find_assignment(assignment)
            if not self.assignment.notebooks:
                raise MissingEntry(f"{assignment} has no notebooks")
        except MissingEntry:
            self.close()
            raise
        notebooks = {nb.id: nb for nb in self.assignment.notebooks}
        self._notebook_ids = {nb.name: id for id, nb in notebooks.items()}
        # Cells by notebook: name to id of those that get points, and of those that get comments.
        self._graded: dict[str, dict[str, str]] = {}
        self._commented: dict[str, dict[str, str]] = {}
        self._cell: dict[str, tuple[str, float]] = {}  # by id: name, points possible
        for id, nb in notebooks.items():
            graded = [*nb.grade_cells, *nb.task_cells]
            self._graded[id] = {cell.name: cell.id for cell in graded}
            self._cell |= {cell.id: (cell.name, cell.max_score or 0.0) for cell in graded}
            commented = [*nb.solution_cells, *nb.task_cells]
            self._commented[id] = {cell.name: cell.id for cell in commented}
        self.possible = sum(points for _, points in self._cell.values())

    # -------------------------------------------------------------------------------- writing

    def add_students(self, students: Iterable[str]) -> None:
        """Enter who is not in the gradebook yet."""
        wanted = dict.fromkeys(students)
        new = [{"id": id} for id in wanted if id not in self._known(api.Student.id, wanted)]
        if new:
            self.db.execute(insert(api.Student), new)
        self.db.commit()

    def write(self, entries: Sequence[Entry]) -> None:
        """Write what grading found, all of it in one transaction."""
        try:
            self._write(entries)
        except BaseException:
            self.db.rollback()
            raise

    def _write(self, entries: Sequence[Entry]) -> None:
        students = [entry.student for entry in entries]
        known = self._known(api.Student.id, students)
        rows = _Rows()
        rows.new[api.Student] = [{"id": id} for id in students if id not in known]
        submissions = self._submissions(students)
        notebooks = self._submitted_notebooks([id for id, _ in submissions.values()])
        theirs = list(notebooks.values())
        grades = self._by_notebook(api.Grade, theirs, "auto_score", "manual_score")
        comments = self._by_notebook(api.Comment, theirs)
        for entry in entries:
            id, timestamp = submissions.get(entry.student, (None, None))
            if id is None:
                id = rows.add(
                    api.SubmittedAssignment,
                    assignment_id=self.assignment.id,
                    student_id=entry.student,
                    timestamp=entry.timestamp,
                )
            elif entry.timestamp and entry.timestamp != timestamp:
                rows.change(api.SubmittedAssignment, id, timestamp=entry.timestamp)
            for name, notebook_id in self._notebook_ids.items():
                nb = notebooks.get((id, notebook_id))
                if nb is None:
                    nb = rows.add(api.SubmittedNotebook, assignment_id=id, notebook_id=notebook_id)
                found = entry.notebooks.get(name)
                for cell, cell_id in self._graded[notebook_id].items():
                    auto = _automatic(entry, name, cell)
                    grade = grades.get((nb, cell_id))
                    # As nbgrader has it: where a person decided before, one should look again.
                    by_hand = auto is None or (grade is not None and grade.manual_score is not None)
                    rows.put(
                        api.Grade,
                        grade.id if grade else None,
                        {"notebook_id": nb, "cell_id": cell_id},
                        auto_score=auto,
                        needs_manual_grade=bool(found and by_hand),
                    )
                for cell, cell_id in self._commented[notebook_id].items():
                    said = found.comments.get(cell) if found else None
                    comment = comments.get((nb, cell_id))
                    where = {"notebook_id": nb, "cell_id": cell_id}
                    rows.put(api.Comment, comment.id if comment else None, where, auto_comment=said)
        rows.execute(self.db)
        self.db.commit()

    def penalize(self, rule: Any) -> None:
        """Set every late penalty anew, by one of nbgrader's plugins for that."""
        parts = self._parts()
        late = select(
            *(api.SubmittedAssignment.student_id, api.SubmittedAssignment.timestamp),
            *(api.SubmittedAssignment.extension, api.SubmittedNotebook.id),
            api.SubmittedNotebook.late_submission_penalty,
        ).join(
            api.SubmittedNotebook,
            api.SubmittedNotebook.assignment_id == api.SubmittedAssignment.id,
        )
        rows = _Rows()
        for student, timestamp, extension, nb, before in self.db.execute(
            late.where(api.SubmittedAssignment.assignment_id == self.assignment.id)
        ):
            due, penalty = self.assignment.duedate, None
            if due and timestamp and timestamp > (due := due + extension if extension else due):
                score = sum(_points(grade) for grade in parts.get(nb, ()))
                penalty = rule.late_submission_penalty(
                    student, score, (timestamp - due).total_seconds()
                )
                penalty = None if penalty is None else min(max(penalty, 0.0), score)
            if penalty != before:
                rows.change(api.SubmittedNotebook, nb, late_submission_penalty=penalty)
        rows.execute(self.db)
        self.db.commit()

    # -------------------------------------------------------------------------------- reading

    def has(self, entry: Entry) -> bool:
        """Whether the gradebook says the same as ``entry``, up to what persons added."""
        expected = {
            (notebook_id, cell): _automatic(entry, name, cell)
            for name, notebook_id in self._notebook_ids.items()
            for cell in self._graded[notebook_id]
        }
        return self._automatic.get(entry.student) == expected

    @property
    def _automatic(self) -> dict[str, dict[tuple[str, str], float | None]]:
        """Automatic points by student, (notebook, cell); read once, before anything is written."""
        if not hasattr(self, "_read"):
            self._read: dict[str, dict[tuple[str, str], float | None]] = defaultdict(dict)
            for student, nb, cell_id, points in self.db.execute(
                select(
                    api.SubmittedAssignment.student_id,
                    api.SubmittedNotebook.notebook_id,
                    api.Grade.cell_id,
                    api.Grade.auto_score,
                )
                .join(
                    api.SubmittedNotebook,
                    api.SubmittedNotebook.assignment_id == api.SubmittedAssignment.id,
                )
                .join(api.Grade, api.Grade.notebook_id == api.SubmittedNotebook.id)
                .where(api.SubmittedAssignment.assignment_id == self.assignment.id)
            ):
                if cell_id in self._cell:
                    self._read[student][nb, self._cell[cell_id][0]] = points
        return self._read

    def scores(self) -> list[Score]:
        """The points of every graded submission, by student."""
        parts = self._parts()
        submissions: dict[str, list[Any]] = defaultdict(list)
        comments: dict[str, dict[str, str]] = defaultdict(dict)
        for student, nb, penalty in self.db.execute(
            select(
                api.SubmittedAssignment.student_id,
                api.SubmittedNotebook.id,
                api.SubmittedNotebook.late_submission_penalty,
            )
            .join(
                api.SubmittedNotebook,
                api.SubmittedNotebook.assignment_id == api.SubmittedAssignment.id,
            )
            .where(api.SubmittedAssignment.assignment_id == self.assignment.id)
        ):
            submissions[student].append((nb, penalty or 0.0))
        for nb, name, comment in self.db.execute(
            select(api.Comment.notebook_id, api.BaseCell.name, api.Comment.manual_comment)
            .join(api.BaseCell, api.BaseCell.id == api.Comment.cell_id)
            .where(api.Comment.manual_comment.is_not(None))
        ):
            comments[nb][name] = comment
        found = []
        for student, notebooks in submissions.items():
            grades = [grade for nb, _ in notebooks for grade in parts.get(nb, ())]
            if all(g.auto_score is None and g.manual_score is None for g in grades):
                continue  # entered, and never graded
            cells = {
                self._cell[grade.cell_id][0]: CellScore(
                    _points(grade), self._cell[grade.cell_id][1], grade.needs_manual_grade
                )
                for grade in grades
            }
            penalty = sum(penalty for _, penalty in notebooks)
            found.append(
                Score(
                    student=student,
                    points=max(0.0, sum(cell.points for cell in cells.values()) - penalty),
                    possible=self.possible,
                    late_penalty=penalty,
                    cells=dict(sorted(cells.items())),
                    comments={k: v for nb, _ in notebooks for k, v in comments[nb].items()},
                )
            )
        return sorted(found, key=lambda score: score.student)

    def write_csv(self, path: Path, scores: Sequence[Score]) -> None:
        """nbgrader's export: a row for every student of the gradebook, 0 for who has no grade."""
        from autograder.export import harmless  # imports this module

        points = {score.student: score for score in scores}
        timestamps = {student: at for student, (_, at) in self._submissions(None).items()}
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            for person in self.db.scalars(
                select(api.Student).order_by(
                    api.Student.last_name, api.Student.first_name, api.Student.id
                )
            ):
                score = points.get(person.id)
                penalty = score.late_penalty if score else 0.0
                table.writerow(
                    {
                        "assignment": self.assignment.name,
                        "duedate": self.assignment.duedate,
                        "timestamp": timestamps.get(person.id),
                        "student_id": harmless(person.id),
                        "last_name": harmless(person.last_name or ""),
                        "first_name": harmless(person.first_name or ""),
                        "email": harmless(person.email or ""),
                        "raw_score": sum(c.points for c in score.cells.values()) if score else 0.0,
                        "late_submission_penalty": penalty,
                        "score": score.points if score else 0.0,
                        "max_score": self.possible,
                    }
                )

    def names(self) -> dict[str, str]:
        """What students are called, by id: the id itself for who has no name."""
        people = self.db.execute(
            select(api.Student.id, api.Student.first_name, api.Student.last_name)
        )
        return {id: " ".join(filter(None, name)) or id for id, *name in people}

    def by_hand(self) -> dict[str, dict[str, ByHand]]:
        """What persons gave, by student and cell's name."""
        parts = self._parts()
        found: dict[str, dict[str, ByHand]] = defaultdict(dict)
        for student, nb in self.db.execute(
            select(api.SubmittedAssignment.student_id, api.SubmittedNotebook.id)
            .join(
                api.SubmittedNotebook,
                api.SubmittedNotebook.assignment_id == api.SubmittedAssignment.id,
            )
            .where(api.SubmittedAssignment.assignment_id == self.assignment.id)
        ):
            for grade in parts.get(nb, ()):
                if grade.manual_score is not None or grade.extra_credit:
                    name = self._cell[grade.cell_id][0]
                    found[student][name] = ByHand(
                        grade.auto_score, grade.manual_score, grade.extra_credit or 0.0
                    )
        return found

    def hours_late(self) -> dict[str, float]:
        """Hours after the due date, or after a student's own; who was in time is left out."""
        table = api.SubmittedAssignment
        query = select(table.student_id, table.timestamp, table.extension)
        found = {}
        for student, timestamp, extension in self.db.execute(
            query.where(table.assignment_id == self.assignment.id)
        ):
            due = self.assignment.duedate
            if due and timestamp and timestamp > (due := due + extension if extension else due):
                found[student] = (timestamp - due).total_seconds() / 3600
        return found

    def _parts(self) -> dict[str, list[Any]]:
        """The grades of the assignment by the submitted notebook's id."""
        found: dict[str, list[Any]] = defaultdict(list)
        columns = (
            *(api.Grade.notebook_id, api.Grade.cell_id, api.Grade.auto_score),
            *(api.Grade.manual_score, api.Grade.extra_credit, api.Grade.needs_manual_grade),
        )
        query = (
            select(*columns)
            .join(api.SubmittedNotebook, api.SubmittedNotebook.id == api.Grade.notebook_id)
            .where(api.SubmittedNotebook.notebook_id.in_(self._notebook_ids.values()))
        )
        for grade in self.db.execute(query):
            if grade.cell_id in self._cell:
                found[grade.notebook_id].append(grade)
        return found

    def _known(self, column: Any, wanted: Collection[str]) -> set[str]:
        return set(self.db.scalars(select(column).where(column.in_(wanted))))

    def _submissions(
        self, students: Collection[str] | None
    ) -> dict[str, tuple[str, datetime | None]]:
        """(id, timestamp) of the submissions of some students, or of all."""
        table = api.SubmittedAssignment
        query = select(table.student_id, table.id, table.timestamp).where(
            table.assignment_id == self.assignment.id
        )
        if students is not None:
            query = query.where(table.student_id.in_(students))
        return {student: (id, timestamp) for student, id, timestamp in self.db.execute(query)}

    def _submitted_notebooks(self, submissions: Collection[str]) -> dict[tuple[str, str], str]:
        table = api.SubmittedNotebook
        query = select(table.assignment_id, table.notebook_id, table.id)
        found = self.db.execute(query.where(table.assignment_id.in_(submissions)))
        return {(submission, notebook): id for submission, notebook, id in found}

    def _by_notebook(
        self, table: Any, notebooks: Collection[str], *columns: str
    ) -> dict[tuple[str, str], Any]:
        wanted = [getattr(table, column) for column in ("id", "notebook_id", "cell_id", *columns)]
        found = self.db.execute(select(*wanted).where(table.notebook_id.in_(notebooks)))
        return {(row.notebook_id, row.cell_id): row for row in found}

    def close(self) -> None:
        self.gradebook.close()

    def __enter__(self) -> Book:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Rows:
    """Rows to add and to change, gathered by table and written with one statement each."""

    def __init__(self) -> None:
        # Parents first: rows refer to those of the tables above.
        tables = (api.Student, api.SubmittedAssignment, api.SubmittedNotebook)
        every = (*tables, api.Grade, api.Comment)
        self.new: dict[Any, list[dict[str, Any]]] = {table: [] for table in every}
        self.changed: dict[Any, list[dict[str, Any]]] = {table: [] for table in every}

    def add(self, table: Any, **values: Any) -> str:
        id = api.new_uuid()
        self.new[table].append({"id": id, **values})
        return id

    def change(self, table: Any, id: str, **values: Any) -> None:
        self.changed[table].append({"id": id, **values})

    def put(self, table: Any, id: str | None, where: dict[str, Any], **values: Any) -> None:
        if id is None:
            self.add(table, **where, **values)
        else:
            self.change(table, id, **values)

    def execute(self, db: Any) -> None:
        for table, rows in self.new.items():
            if rows:
                db.execute(insert(table), rows)
        for table, rows in self.changed.items():
            if rows:
                db.execute(update(table), rows)


def _automatic(entry: Entry, notebook: str, cell: str) -> float | None:
    """The points of a cell without any person's: none for a notebook that was not handed in."""
    found = entry.notebooks.get(notebook)
    return found.points.get(cell) if found else 0.0


def _points(grade: Any) -> float:
    """A cell's points: a person's if there are any, and extra credit in any case."""
    given = grade.manual_score if grade.manual_score is not None else grade.auto_score
    return 0.0 if given is None else given + (grade.extra_credit or 0.0)
