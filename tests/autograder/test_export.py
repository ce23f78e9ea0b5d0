"""Points for Canvas, Moodle and spreadsheets: nobody else's, no other byte changed, nobody lost."""

from __future__ import annotations

import csv
import io
import re
import string
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from typer.testing import CliRunner

from autograder import cli
from autograder.build import nbgrader_metadata
from autograder.course import CONFIG, open_course
from autograder.export import (
    CANVAS,
    ExportError,
    Pupil,
    Sheet,
    canvas,
    export,
    harmless,
    moodle,
    number,
    plain,
)
from autograder.gradebook import CellScore, Score

LAB = "lab1_quantization"
CANVAS_FILE = '''\
Student,ID,SIS User ID,SIS Login ID,Section,Notes,lab1_quantization (77),Essay (78),Final Score
,,,,,,Manual Posting,,
    Points Possible,,,,,,79.00,10.00,(read only)
"Okafor, Ada",101,s-1,ada,"L1, and L2",,,"8,50",
"Larsen, ""Ben""",102,s-2,ben,L1,"two
lines",12.00,,44.1
"Mori, Chika",103,s-3,chika,L1,,EX,,
"=""=2+2""",104,s-4,dario,L1,,,,
"Student, Test",105,,8f3a,L1,,,,
'''
MOODLE_FILE = (
    "\ufeffIdentifier,Full name,Email address,Status,Grade,Maximum Grade,"
    "Grade can be changed,Last modified (submission),Last modified (grade),Feedback comments\r\n"
    "Participant 901,Ada Okafor,ada@uni.example,Submitted,,79.00,Yes,"
    '"Friday, 3 May 2030, 10:00 AM",-,\r\n'
    "Participant 902,Ben Larsen,Ben@uni.example,Submitted,12.00,79.00,Yes,-,-,Well argued.\r\n"
    "Participant 903,Chika Mori,chika@uni.example,No submission,,79.00,Yes,-,-,\r\n"
)


def score(student: str, points: float, late: float = 0.0) -> Score:
    cells = {"check_sqnr": CellScore(points + late, 79.0, False)}
    return Score(student, points, 79.0, late, cells, {})


def pupil(id: str, points: float | None = None, **about: str) -> Pupil:
    return Pupil(id, **about, score=None if points is None else score(id, points))


def table(text: str, delimiter: str = ",") -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))


def differing(one: str, other: str) -> dict[tuple[int, int], str]:
    """The cells of ``other`` that are not those of ``one``, by row and column."""
    rows = zip(table(one), table(other), strict=True)
    pairs = [(i, zip(a, b, strict=True)) for i, (a, b) in enumerate(rows)]
    return {(i, j): b for i, cells in pairs for j, (a, b) in enumerate(cells) if a != b}


# --- cells ---------------------------------------------------------------------------------------

STRANGE = st.sampled_from("ab\"',;\t\r\n =é\u2028")
CELLS = st.text(STRANGE | st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


QUOTING = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, list[list[str]], str]:
    """A CSV as some program may write it, its cells, and its delimiter."""
    comma = draw(st.sampled_from(",;"))
    width = draw(st.integers(2, 4))
    header = [*string.ascii_uppercase[:width]]
    rows = [header, *draw(st.lists(st.lists(CELLS, min_size=width, max_size=width), max_size=4))]
    # Python leaves a lone carriage return unquoted, and then reads it as the end of a line.
    returns = any("\r" in cell for row in rows for cell in row)
    out = io.StringIO()
    csv.writer(
        out,
        delimiter=comma,
        lineterminator=draw(st.sampled_from(("\n", "\r\n"))),
        quoting=csv.QUOTE_ALL if returns else draw(st.sampled_from(QUOTING)),
    ).writerows(rows)
    text = out.getvalue()
    bom = draw(st.sampled_from(("", "\ufeff")))
    end = draw(st.booleans())
    return bom + (text if end else text.rstrip("\r\n")), rows, comma


@given(files())
def test_a_sheet_reads_what_pythons_own_reader_reads_and_writes_every_byte_back(
    drawn: tuple[str, list[list[str]], str],
) -> None:
    text, _, comma = drawn
    sheet = Sheet(text)
    assert sheet.text == text
    cells = [[sheet.get(i, j) for j in range(len(sheet.header))] for i in (0, *sheet.rows)]
    read = [row for row in table(text.removeprefix("\ufeff"), comma) if row]
    assert [row for row in cells if row != [""]] == [r for r in read if r != [""]]


@given(files(), CELLS, st.data())
def test_setting_a_cell_changes_that_cell_alone(
    drawn: tuple[str, list[list[str]], str], value: str, data: st.DataObject
) -> None:
    text, rows, _ = drawn
    sheet = Sheet(text)
    row = data.draw(st.sampled_from([0, *sheet.rows]))
    column = data.draw(st.integers(0, len(rows[0]) - 1))
    old = sheet.get(row, column)
    sheet.set(row, column, value)
    after = Sheet(sheet.text)
    assert after.get(row, column) == value
    after.set(row, column, old)
    again = Sheet(text)
    again.set(row, column, old)  # once written by us, quotes may differ: of this cell only
    assert after.text == again.text


def test_a_quote_that_is_never_closed_is_said_with_its_line() -> None:
    with pytest.raises(ExportError, match="never closed from line 2"):
        Sheet('Student,ID\nAda,"1\nBen,2\n')


@pytest.mark.parametrize("text", ["=1+1", "+49", "-x", "@SUM(A1)", "\t=1", "  =1", "\r=1"])
def test_what_a_spreadsheet_takes_for_a_formula_gets_an_apostrophe(text: str) -> None:
    assert harmless(text) == f"'{text}"
    pupils = [pupil(text, 3.0, first=text, last=text, email=text)]
    for made in (plain(pupils, 79), canvas(pupils, text, 79), moodle(pupils, text, 79)):
        cells = [cell for row in table(made.text) for cell in row]
        assert any(text in cell for cell in cells)
        assert not [cell for cell in cells if re.match(r"\s*[=+@-]|[\t\r\n]", cell)]


@given(st.floats(0, 1e4))
def test_points_come_back_as_exactly_as_moodle_stores_them(points: float) -> None:
    assert abs(float(number(points)) - points) <= 5.1e-6
    assert number(points) == "0" or not number(points).startswith("-")


# --- without a roster ----------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
PUPILS = st.lists(
    st.builds(
        lambda id, first, last, email, points: pupil(
            id, points, first=first, last=last, email=email
        ),
        NAMES.filter(bool),
        NAMES,
        NAMES,
        NAMES,
        st.none() | st.integers(0, 316).map(lambda quarter: quarter / 4),
    ),
    unique_by=lambda pupil: pupil.id,
    max_size=5,
)


@given(PUPILS)
def test_every_student_is_there_once_in_order_with_points_or_an_empty_cell(
    pupils: list[Pupil],
) -> None:
    want = [(harmless(p.id), "" if p.score is None else p.score.points) for p in pupils]
    for made, id_at, points_at, first in (
        (plain(pupils, 79), 0, 4, 1),
        (canvas(pupils, LAB, 79), 3, 5, 2),
        (moodle(pupils, LAB, 79), 2, 4, 1),
    ):
        rows = table(made.text)
        assert len({len(row) for row in rows}) == 1
        got = [(row[id_at], row[points_at]) for row in rows[first:]]
        assert [(id, float(points) if points else "") for id, points in got] == want
        assert made.written == sum(p.score is not None for p in pupils)


def test_the_columns_are_those_that_the_importers_look_for() -> None:
    rows = table(canvas([pupil("ada", 70)], LAB, 79).text)
    assert rows[0] == [*CANVAS, LAB]
    assert rows[1] == ["    Points Possible", "", "", "", "", "79"]
    assert rows[2] == ["ada", "", "", "ada", "", "70"]
    rows = table(moodle([pupil("ada", 70, first="Ada", email="a@b.example")], LAB, 79).text)
    assert rows[0] == [
        *("Identifier", "Full name", "ID number", "Email address", "Grade", "Maximum Grade"),
        "Feedback comments",
    ]
    assert rows[1][1:6] == ["Ada", "ada", "a@b.example", "70", "79"]


# --- Canvas --------------------------------------------------------------------------------------

CLASS = [pupil("ada", 70.5), pupil("ben", 0), pupil("dario")]


def test_points_go_into_canvas_own_column_and_all_else_stays() -> None:
    made = canvas(CLASS, LAB, 79, CANVAS_FILE)
    assert differing(CANVAS_FILE, made.text) == {(3, 6): "70.5", (4, 6): "0"}
    assert made.text.replace(",,70.5,", ",,,").replace(",0,,44.1", ",12.00,,44.1") == CANVAS_FILE
    assert (made.written, made.unmatched) == (2, {})
    assert made.notices == ["Students were found by SIS Login ID, which is the id here."]


def test_who_is_excused_in_canvas_stays_so_and_is_told() -> None:
    made = canvas([*CLASS, pupil("chika", 3)], LAB, 79, CANVAS_FILE)
    assert (5, 6) not in differing(CANVAS_FILE, made.text)
    assert made.unmatched == {"chika": "Canvas has EX for them, which was left"}


def test_students_that_canvas_does_not_know_are_listed() -> None:
    made = canvas([*CLASS, pupil("zoe", 3)], LAB, 79, CANVAS_FILE)
    assert made.unmatched == {"zoe": "no row has this SIS Login ID: zoe"}
    assert made.written == 2


def test_ids_are_compared_in_one_column_so_that_nobody_gets_anothers_points() -> None:
    # 101 is no SIS User ID here, but Ada's ID in Canvas: that must not count.
    people = [pupil("s-1", 1), pupil("s-2", 2), pupil("101", 3)]
    made = canvas(people, LAB, 79, CANVAS_FILE)
    assert differing(CANVAS_FILE, made.text) == {(3, 6): "1", (4, 6): "2"}
    assert list(made.unmatched) == ["101"]


def test_two_students_who_would_be_one_row_are_both_listed() -> None:
    made = canvas([pupil("ada", 1), pupil("ADA", 2), pupil("ben", 3)], LAB, 79, CANVAS_FILE)
    assert differing(CANVAS_FILE, made.text) == {(4, 6): "3"}
    assert set(made.unmatched) == {"ada", "ADA"}


def test_an_assignment_that_canvas_lacks_becomes_a_last_column() -> None:
    made = canvas(CLASS, "lab9", 79, CANVAS_FILE)
    assert [row[-1] for row in table(made.text)] == ["lab9", "", "79", "70.5", "0", "", "", ""]
    assert [row[:-1] for row in table(made.text)] == table(CANVAS_FILE)
    assert any("offer to make it" in notice for notice in made.notices)


@pytest.mark.parametrize("column", ["Essay", "essay", "Essay (78)"])
def test_the_assignment_may_have_another_name_in_canvas(column: str) -> None:
    made = canvas(CLASS, LAB, 10, CANVAS_FILE, column)
    assert differing(CANVAS_FILE, made.text) == {(3, 7): "70.5", (4, 7): "0"}


def test_an_unknown_or_doubtful_column_is_answered_with_those_there_are() -> None:
    with pytest.raises(ExportError, match=r"no assignment called 'Lab'.*'Essay \(78\)'"):
        canvas(CLASS, LAB, 79, CANVAS_FILE, "Lab")
    twice = CANVAS_FILE.replace("Essay (78)", "lab1_quantization (78)")
    with pytest.raises(ExportError, match="several assignments called 'lab1_quantization'"):
        canvas(CLASS, LAB, 79, twice)
    made = canvas(CLASS, LAB, 10, twice, "lab1_quantization (78)")
    assert set(differing(twice, made.text)) == {(3, 7), (4, 7)}


def test_another_maximum_is_told_and_left() -> None:
    made = canvas(CLASS, LAB, 100, CANVAS_FILE)
    assert any("Canvas has 79 as the most points, and the lab has 100" in n for n in made.notices)
    assert (2, 6) not in differing(CANVAS_FILE, made.text)


def test_a_canvas_file_with_semicolons_is_read_as_well() -> None:
    out = io.StringIO()
    csv.writer(out, delimiter=";", lineterminator="\n").writerows(table(CANVAS_FILE))
    rows = table(canvas(CLASS, LAB, 79, out.getvalue()).text, ";")
    assert [row[6] for row in rows[3:5]] == ["70.5", "0"]


def test_a_file_that_is_not_canvas_is_refused() -> None:
    with pytest.raises(ExportError, match="it must have the columns Student, ID and Section"):
        canvas(CLASS, LAB, 79, MOODLE_FILE)
    with pytest.raises(ExportError, match=r"none of the 1 students with points, such as 'zoe'"):
        canvas([pupil("zoe", 3)], LAB, 79, CANVAS_FILE)


# --- Moodle --------------------------------------------------------------------------------------

MAILED = [
    Pupil("u1", email="ada@uni.example", score=score("u1", 64.5, late=6)),
    Pupil("u2", email="ben@UNI.example", score=score("u2", 79)),
    Pupil("u3", email="chika@uni.example"),
]


def test_grades_and_comments_go_into_moodles_worksheet_and_all_else_stays() -> None:
    made = moodle(MAILED, LAB, 79, MOODLE_FILE)
    assert differing(MOODLE_FILE, made.text) == {
        (1, 4): "64.5",
        (1, 9): f"fewer {LAB}: sqnr 70.5/79; late penalty 6",
        (2, 4): "79",  # and the comment that a person wrote stays
    }
    assert made.text.startswith("\ufeffIdentifier,")
    assert made.text.count("\r\n") == MOODLE_FILE.count("\r\n") == made.text.count("\n")
    assert made.notices == ["Students were found by Email address, which is the e-mail here."]


def test_a_later_export_replaces_its_own_comment() -> None:
    once = moodle(MAILED, LAB, 79, MOODLE_FILE).text
    assert moodle(MAILED, LAB, 79, once).text == once
    better = [Pupil("u1", email="ada@uni.example", score=score("u1", 79))]
    assert moodle(better, LAB, 79, once).text.count(f"fewer {LAB}: sqnr 79/79") == 1
    assert "70.5" not in moodle(better, LAB, 79, once).text


def test_moodles_participant_numbers_are_ids_too() -> None:
    made = moodle([pupil("901", 5), pupil("903", 6)], LAB, 79, MOODLE_FILE)
    assert {k: v for k, v in differing(MOODLE_FILE, made.text).items() if k[1] == 4} == {
        (1, 4): "5",
        (3, 4): "6",
    }


def test_a_worksheet_without_what_the_importer_needs_is_refused() -> None:
    with pytest.raises(ExportError, match=r"it has no Identifier, Last modified \(grade\)"):
        moodle(MAILED, LAB, 79, "Name,Grade\nAda,\n")


def test_another_maximum_in_moodle_is_told() -> None:
    made = moodle(MAILED, LAB, 100, MOODLE_FILE)
    assert any("Moodle has 79 as the most points" in notice for notice in made.notices)


# --- from a gradebook ----------------------------------------------------------------------------


def graded(points: int) -> NotebookNode:
    about = nbgrader_metadata("check_sqnr", grade=True, locked=True, points=8)
    output = new_output("execute_result", {"text/plain": str(points)}, execution_count=1)
    return new_notebook(cells=[new_code_cell("check(sqnr)", metadata=about, outputs=[output])])


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graded course: ada has 5 of 8 points, 2 of them lost for being late; ben has no work."""
    tmp_path = tmp_path_factory.mktemp("course")
    (tmp_path / "nbgrader_config.py").write_text(CONFIG)
    nbformat.write(graded(5), tmp_path / "graded.ipynb")
    (tmp_path / "autograded" / "ada" / "lab1").mkdir(parents=True)
    with open_course(tmp_path) as app:
        from nbgrader.api import Gradebook

        with Gradebook(app.coursedir.db_url, app.coursedir.course_id) as book:
            book.add_assignment("lab1")
            book.add_notebook("lab1", "lab1")
            book.add_grade_cell("check_sqnr", "lab1", "lab1", max_score=8, cell_type="code")
            book.add_student("ada", first_name="Ada", last_name="Okafor", email="ada@uni.example")
            book.add_student("ben")
            submission = book.add_submission("lab1", "ada")
            notebook = submission.notebooks[0]
            notebook.late_submission_penalty = 2.0
            book.find_grade("check_sqnr", "lab1", "lab1", "ada").auto_score = 5.0
            book.db.commit()
    return tmp_path


def test_points_are_those_of_the_gradebook_less_the_late_penalty(course: Path) -> None:
    rows = table(export(course, "lab1", "csv").text)
    by_id = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert by_id["ada"] == dict(
        zip(
            ["student", "last name", "first name", "e-mail", "points", "possible"],
            ["ada", "Okafor", "Ada", "ada@uni.example", "3", "8"],
            strict=True,
        ),
        **{"late penalty": "2", "sqnr": "5"},
    )
    assert (by_id["ben"]["points"], by_id["ben"]["sqnr"]) == ("", "")


def test_the_command_writes_beside_the_roster_and_lists_who_is_missing(course: Path) -> None:
    def run(*args: object) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["export", str(course), *map(str, args)])
        return done.exit_code, " ".join((done.stdout + done.stderr).split())

    code, said = run("--to", "canvas")
    assert code == 0
    assert "Points of 1 student in" in said
    assert "Okafor, Ada" in (course / "exports" / "lab1-canvas.csv").read_text()

    roster = course / "roster.csv"
    roster.write_text(CANVAS_FILE.replace(LAB, "lab1").replace("79.00", "8.00"))
    before = roster.read_bytes()
    out = course / "new" / "up.csv"
    assert run("--to", "canvas", "--roster", roster, "--out", out)[0] == 0
    assert differing(before.decode(), out.read_bytes().decode()) == {(3, 6): "3"}
    code, said = run("--to", "canvas", "--roster", roster, "--out", roster)
    assert (code, roster.read_bytes()) == (2, before)
    assert "--out must be another file than the roster" in said

    roster.write_text(roster.read_text().replace(",ada,", ",ben,"))
    code, said = run("--to", "canvas", "--roster", roster)
    assert code == 2
    assert "the roster has none of the 1 students with points, such as 'ada'" in said
    roster.write_text(CANVAS_FILE.replace(',,,"8,50"', ',,EX,"8,50"'))
    code, said = run("--to", "canvas", "--roster", roster, "--column", LAB)
    assert code == 1
    assert "ada is not in it: Canvas has EX for them" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--to", "excel"), "--to must be one of csv, canvas, moodle, got 'excel'"),
        (("--to", "csv", "--roster", "latin1.csv"), "must be a CSV in UTF-8, and"),
        (("--to", "csv", "--roster", "graded.ipynb"), "--roster is Canvas's or Moodle's own file"),
        (("--to", "moodle", "--column", "x"), "--column names an assignment of Canvas"),
        (("--to", "canvas", "--roster", "none.csv"), "none.csv cannot be read or written: No such"),
    ],
)
def test_a_mistake_gets_one_line(course: Path, options: tuple[str, ...], why: str) -> None:
    (course / "latin1.csv").write_bytes("é".encode("latin-1"))
    args = [str(course / o) if "." in o else o for o in options]
    done = CliRunner().invoke(cli.app, ["export", str(course), *args])
    assert done.exit_code == 2
    assert why in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
