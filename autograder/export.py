"""Points for other systems: a plain table, Canvas's gradebook, Moodle's grading worksheet.

Canvas and Moodle each read back what they wrote themselves, so the safe way is to hand in their own
file (the *roster*): its rows are found by an id, the points are put into their cells, and every
other byte stays. Without one, a file is written from the gradebook alone, in the columns that the
importers look for:

- Canvas, Grades > Import (lib/gradebook_importer.rb of canvas-lms): Student, ID, SIS User ID,
  SIS Login ID, Section, then one column an assignment, "Name (id)"; the row "Points Possible".
- Moodle, an assignment's "Upload grading worksheet" (mod/assign/feedback/offline of moodle): needs
  Identifier ("Participant 123", which only Moodle knows), Grade and Last modified (grade). Without
  its own worksheet: the gradebook's Grades > Import > CSV file, by ID number or e-mail.

Points are those of the gradebook, late penalties taken off. Who handed in nothing gets an empty
cell, not 0. Text that a spreadsheet would take for a formula gets an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autograder.course import open_course
from autograder.gradebook import Score
from autograder.grading import open_book
from autograder.verdict import GRADE_ID

FORMATS = ("csv", "canvas", "moodle")
CANVAS = ("Student", "ID", "SIS User ID", "SIS Login ID", "Section")
CANVAS_IDS = ("SIS Login ID", "SIS User ID", "ID", "Integration ID")
MOODLE = ("Identifier", "Full name", "ID number", "Email address", "Grade", "Maximum Grade")
MOODLE_IDS = ("Email address", "ID number", "Username", "Identifier")
COMMENTS = "Feedback comments"
EXCUSED = ("EX", "N/A")  # Canvas: excused, and not given this assignment


class ExportError(Exception):
    """The file cannot be written; the message says what to do."""


@dataclass(frozen=True)
class Pupil:
    """A student as the gradebook knows them, and their score if they handed in."""

    id: str
    first: str = ""
    last: str = ""
    email: str = ""
    lms_id: str = ""
    score: Score | None = field(default=None, compare=False)

    @property
    def keys(self) -> dict[str, str]:
        """What a roster may call them, by what it is."""
        return {"id": self.id, "e-mail": self.email, "LMS id": self.lms_id}


@dataclass
class Export:
    """What was made.

    Attributes:
        text: the file.
        written: how many students' points are in it.
        unmatched: students with points whom the roster does not have, and why.
        notices: sentences the instructor must see.
    """

    text: str
    written: int
    unmatched: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def export(
    course: Path,
    assignment: str,
    to: str,
    roster: str | None = None,
    column: str | None = None,
) -> Export:
    """The points of an assignment as the file that another system reads.

    Args:
        to: "csv", "canvas" or "moodle".
        roster: what Canvas or Moodle exported, as text.
        column: Canvas's assignment, where it is not called as ours: its name, or "name (id)".

    Raises:
        ExportError: the roster is none, or has nobody of this class.
        CourseError: there is no such course or assignment.
    """
    if to not in FORMATS:
        raise ExportError(f"--to must be one of {', '.join(FORMATS)}, got {to!r}")
    if to == "csv" and roster is not None:
        raise ExportError("--roster is Canvas's or Moodle's own file: it goes with --to of these")
    if to != "canvas" and column is not None:
        raise ExportError("--column names an assignment of Canvas: it goes with --to canvas")
    with open_course(course) as app, open_book(app, assignment) as book:
        scores = {score.student: score for score in book.scores()}
        possible = book.possible
        pupils = [
            Pupil(
                person.id,
                person.first_name or "",
                person.last_name or "",
                person.email or "",
                person.lms_user_id or "",
                scores.get(person.id),
            )
            for person in book.gradebook.students
        ]
    if to == "csv":
        made = plain(pupils, possible)
    elif to == "canvas":
        made = canvas(pupils, assignment, possible, roster, column)
    else:
        made = moodle(pupils, assignment, possible, roster)
    if waiting := sum(1 for score in scores.values() if score.waiting):
        who = "1 submission has" if waiting == 1 else f"{waiting} submissions have"
        made.notices.append(f"{who} an answer that a person has yet to grade: points are missing.")
    return made


# ----------------------------------------------------------------------------- the three formats


def plain(pupils: Sequence[Pupil], possible: float) -> Export:
    """A row a student, with the points of each graded cell."""
    scores = [pupil.score for pupil in pupils if pupil.score]
    cells = list(dict.fromkeys(name for score in scores for name in score.cells))
    head = ["student", "last name", "first name", "e-mail", "points", "possible", "late penalty"]
    rows = [[*head, *(name.removeprefix(GRADE_ID) for name in cells)]]
    for p in pupils:
        row = [harmless(text) for text in (p.id, p.last, p.first, p.email)]
        if p.score:
            row += [number(p.score.points), number(possible), number(p.score.late_penalty)]
            row += [number(p.score.cells[c].points) if c in p.score.cells else "" for c in cells]
        else:
            row += ["", number(possible), "", *([""] * len(cells))]
        rows.append(row)
    return Export(_written(rows), len(scores))


def canvas(
    pupils: Sequence[Pupil],
    assignment: str,
    possible: float,
    roster: str | None = None,
    column: str | None = None,
) -> Export:
    """Canvas's gradebook with the points of one assignment."""
    if roster is None:
        rows = [[*CANVAS, harmless(column or assignment)]]
        rows.append(["    Points Possible", "", "", "", "", number(possible)])
        for p in pupils:
            name = ", ".join(part for part in (p.last, p.first) if part) or p.id
            ids = (name, p.lms_id, "", p.id, "")
            points = number(p.score.points) if p.score else ""
            rows.append([*(harmless(text) for text in ids), points])
        notice = (
            "Canvas finds students by SIS Login ID, which is the student's id here. If that is not "
            "so, give Canvas's own export with --roster."
        )
        return Export(_written(rows), sum(p.score is not None for p in pupils), notices=[notice])

    sheet = Sheet(roster)
    if "Section" not in sheet.columns or not {"Student", "LastName"} & sheet.columns.keys():
        raise ExportError(
            "the roster is not Canvas's: it must have the columns Student, ID and Section. Take "
            "Grades > Export > Export Entire Gradebook as it is"
        )
    made = Export("", 0)
    place = _assignment_column(sheet, assignment, column, possible, made)
    for student, score, row in _matched(pupils, sheet, CANVAS_IDS, made):
        if (old := sheet.get(row, place).strip().upper()) in EXCUSED:
            made.unmatched[student] = f"Canvas has {old} for them, which was left"
        else:
            sheet.set(row, place, number(score.points))
            made.written += 1
    made.text = sheet.text
    return made


def _assignment_column(
    sheet: Sheet, assignment: str, wanted: str | None, possible: float, made: Export
) -> int:
    """Where the assignment's points belong; a new column where Canvas has no such assignment."""
    first = sheet.columns["Section"] + 1
    assignments = {i: name for i, name in enumerate(sheet.header) if i >= first and name}
    name = wanted or assignment
    found = [i for i, title in assignments.items() if title == name] or [
        i
        for i, title in assignments.items()
        if re.sub(r" \(\d+\)$", "", title).casefold() == name.casefold()
    ]
    if len(found) > 1 or (wanted and not found):
        there = ", ".join(repr(title) for title in assignments.values()) or "none"
        many = "several assignments" if found else "no assignment"
        raise ExportError(f"Canvas has {many} called {name!r}. --column can name one of: {there}")
    most = next((r for r in sheet.rows if "Points Possible" in sheet.get(r, 0)), None)
    if found:
        theirs = _value(sheet.get(most, found[0])) if most is not None else None
        if theirs is not None and theirs != possible:
            made.notices.append(_other_maximum("Canvas", theirs, possible))
        return found[0]
    new = len(sheet.header)
    sheet.set(0, new, harmless(name))
    for row in sheet.rows:
        sheet.set(row, new, number(possible) if row == most else "")
    made.notices.append(
        f"Canvas has no assignment called {name!r} and will offer to make it. If it is there under "
        "another name, give that with --column."
    )
    return new


def moodle(
    pupils: Sequence[Pupil], assignment: str, possible: float, roster: str | None = None
) -> Export:
    """Moodle's grading worksheet, with points and, as a comment, where they come from."""
    if roster is None:
        rows = [[*MOODLE, COMMENTS]]
        for p in pupils:
            name = " ".join(part for part in (p.first, p.last) if part) or p.id
            ids = [harmless(text) for text in (p.lms_id, name, p.id, p.email)]
            points = number(p.score.points) if p.score else ""
            comment = harmless(_comment(assignment, p.score)) if p.score else ""
            rows.append([*ids, points, number(possible), comment])
        notice = (
            "This is for Moodle's Grades > Import > CSV file, mapped by ID number or e-mail. For "
            "an assignment's own page, download its grading worksheet and give it with --roster."
        )
        return Export(_written(rows), sum(p.score is not None for p in pupils), notices=[notice])

    sheet = Sheet(roster)
    columns = {name.casefold(): i for name, i in sheet.columns.items()}
    needed = ("Identifier", "Grade", "Last modified (grade)")
    if missing := [name for name in needed if name.casefold() not in columns]:
        raise ExportError(
            f"the roster is not Moodle's worksheet: it has no {', '.join(missing)}. Take the "
            "assignment's Download grading worksheet, with Moodle in English, as it is"
        )
    made = Export("", 0)
    grade, most = columns["grade"], columns.get("maximum grade")
    if most is not None:
        values = {_value(sheet.get(row, most)) for row in sheet.rows}
        for theirs in sorted(value for value in values if value not in (None, possible)):
            made.notices.append(_other_maximum("Moodle", theirs, possible))
    ours = f"fewer {assignment}: "
    place = columns.get(COMMENTS.casefold())
    for _, score, row in _matched(pupils, sheet, MOODLE_IDS, made):
        sheet.set(row, grade, number(score.points))
        if place is not None and (not (old := sheet.get(row, place)) or old.startswith(ours)):
            sheet.set(row, place, _comment(assignment, score))
        made.written += 1
    made.text = sheet.text
    return made


def _comment(assignment: str, score: Score) -> str:
    """Where the points come from, in one line. It begins so that a later export may replace it."""
    parts = [
        f"{name.removeprefix(GRADE_ID)} {number(cell.points)}/{number(cell.possible)}"
        for name, cell in score.cells.items()
    ]
    late = f"; late penalty {number(score.late_penalty)}" if score.late_penalty else ""
    return f"fewer {assignment}: {', '.join(parts)}{late}"


def _other_maximum(system: str, theirs: float, ours: float) -> str:
    return (
        f"{system} has {number(theirs)} as the most points, and the lab has {number(ours)}: "
        f"set it to {number(ours)} there, or all grades will look wrong."
    )


def _matched(
    pupils: Sequence[Pupil], sheet: Sheet, names: Iterable[str], made: Export
) -> list[tuple[str, Score, int]]:
    """Students with points, and their rows in the roster, by one way for the whole class.

    Of all the columns with ids, and all the ids a student has here, the two are compared under
    which most students are found. Mixing them could take one student's number for another's.
    """
    graded = {pupil: pupil.score for pupil in pupils if pupil.score}
    best: dict[str, list[int]] = {}
    key = by = ""
    for name in names:
        there: dict[str, list[int]] = defaultdict(list)
        place = next((i for n, i in sheet.columns.items() if n.casefold() == name.casefold()), None)
        if place is None:
            continue
        for row in sheet.rows:
            value = sheet.get(row, place).strip().casefold()
            if name == "Identifier":  # "Participant 123", in Moodle's language
                value = (re.findall(r"\d+$", value) or [""])[0]
            there[value].append(row)
        for kind in ("id", "e-mail", "LMS id"):
            ids = {p.id: p.keys[kind].strip().casefold() for p in graded}
            found = {student: there[i] for student, i in ids.items() if i and i in there}
            if len(found) > len(best):
                best, key, by = found, kind, name
    if graded and not best:
        one = next(iter(graded)).id
        raise ExportError(
            f"the roster has none of the {len(graded)} students with points, such as {one!r}. Its "
            f"columns {', '.join(names)} were compared with id, e-mail and LMS id in the gradebook:"
            " add what is missing by `nbgrader db student add ID --email=... --lms-user-id=...`"
        )
    claims = Counter(row for rows in best.values() for row in rows)
    matched = []
    for pupil, score in graded.items():
        found_in = best.get(pupil.id, [])
        if len(found_in) == 1 and claims[found_in[0]] == 1:
            matched.append((pupil.id, score, found_in[0]))
            continue
        who = "more than one row has" if len(found_in) > 1 else "another student, too, has"
        what = f"{who} this {by}" if found_in else f"no row has this {by}"
        made.unmatched[pupil.id] = f"{what}: {pupil.keys[key] or 'it is empty'}"
    if graded:
        made.notices.append(f"Students were found by {by}, which is the {key} here.")
    return matched


# ----------------------------------------------------------------------------------------- cells


class Sheet:
    """A CSV file in which single cells can be set, and every other byte stays as it was.

    Attributes:
        header: the names in its first row, and ``columns`` their places.
        rows: numbers of the rows below.

    Raises:
        ExportError: it is no CSV.
    """

    def __init__(self, text: str) -> None:
        self._bom = "\ufeff" if text.startswith("\ufeff") else ""
        text = text.removeprefix(self._bom)
        first = re.split(r"[\r\n]", re.sub(r'"[^"]*"', "", text), maxsplit=1)[0]
        self._comma = comma = max(",;\t", key=first.count)
        cell = rf'"[^"]*(?:""[^"]*)*"[^{comma}\r\n]*|[^"{comma}\r\n][^{comma}\r\n]*|'
        pattern = re.compile(rf"({cell})({comma}|\r\n|\n|\r|\Z)")
        self._cells: list[list[str]] = [[]]  # as they are written
        self._ends: list[str] = []
        at = 0
        while True:
            found = pattern.match(text, at)
            if found is None:
                line = text.count("\n", 0, at) + 1
                raise ExportError(f"the roster is no CSV: a quote is never closed from line {line}")
            at = found.end()
            self._cells[-1].append(found[1])
            if found[2] == comma:
                continue
            self._ends.append(found[2])
            if at == len(text):
                break
            self._cells.append([])
        self.header = [self.get(0, i) for i in range(len(self._cells[0]))]
        self.columns = {name.strip(): i for i, name in reversed([*enumerate(self.header)])}
        self.rows = [i for i in range(1, len(self._cells)) if self._cells[i] != [""]]

    def get(self, row: int, column: int) -> str:
        """The value of a cell; of one that is not there, ''."""
        raw = self._cells[row][column] if column < len(self._cells[row]) else ""
        quoted = re.match(r'"([^"]*(?:""[^"]*)*)"', raw)
        return quoted[1].replace('""', '"') + raw[quoted.end() :] if quoted else raw

    def set(self, row: int, column: int, value: str) -> None:
        cells = self._cells[row]
        cells += [""] * (column + 1 - len(cells))
        special = re.search(r'["\r\n,;\t]', value)  # whatever the reader may take for a comma
        cells[column] = '"' + value.replace('"', '""') + '"' if special else value

    @property
    def text(self) -> str:
        lines = zip(self._cells, self._ends, strict=True)
        return self._bom + "".join(self._comma.join(cells) + end for cells, end in lines)


def harmless(text: str) -> str:
    """Text for a cell, with an apostrophe where a spreadsheet would see a formula.

    >>> harmless("=HYPERLINK(1)"), harmless("Ada")
    ("'=HYPERLINK(1)", 'Ada')
    """
    formula = text.lstrip()[:1] in tuple("=+-@") or text[:1] in tuple("\t\r\n")
    return f"'{text}" if formula else text


def number(points: float) -> str:
    """Points with a decimal point, as exactly as Moodle stores them.

    >>> number(8.0), number(7.25), number(1 / 3)
    ('8', '7.25', '0.33333')
    """
    return f"{points:.5f}".rstrip("0").rstrip(".")


def _value(cell: str) -> float | None:
    """A number as a person's language has it, or None."""
    try:
        return float(cell.strip().replace(",", "."))
    except ValueError:
        return None


def _written(rows: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerows(rows)
    return out.getvalue()
