"""Our gradebook against nbgrader's own API, on SQLite and on a real PostgreSQL server."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.plugins import CsvExportPlugin
from small_course import contents
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from autograder.gradebook import Book, Entry, Marks

LAB = "lab"
CELLS = {"one": 3.0, "two": 5.0}  # in notebook a; "asked" is a question there; b has "three"
DUE = datetime(2030, 1, 1, 12)


def new_gradebook(url):
    with Gradebook(url, "fewer") as book:
        book.add_assignment(LAB, duedate=DUE.isoformat())
        for notebook in ("a", "b"):
            book.add_notebook(notebook, LAB)
        for name, points in CELLS.items():
            book.add_grade_cell(name, "a", LAB, max_score=points, cell_type="code")
            book.add_solution_cell(f"solve_{name}", "a", LAB)
        book.add_grade_cell("asked", "a", LAB, max_score=4, cell_type="markdown")
        book.add_solution_cell("asked", "a", LAB)
        book.add_grade_cell("three", "b", LAB, max_score=2, cell_type="code")
        book.add_task_cell("task", "b", LAB, max_score=1, cell_type="markdown")


@pytest.fixture(scope="module", autouse=True)
def alembic_on_path():
    """nbgrader calls a bare ``alembic`` when it makes a gradebook."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        yield


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    path = tmp_path_factory.mktemp("gradebook") / "gradebook.db"
    new_gradebook(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite(empty, tmp_path):
    return f"sqlite:///{shutil.copy(empty, tmp_path)}"


@pytest.fixture(scope="session")
def server():
    """A PostgreSQL server of our own on a free port, with its data in a temporary folder."""
    pytest.importorskip("psycopg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (found and str(found[-1]))
    if not initdb:
        pytest.skip("no PostgreSQL server is installed")
    folder = Path(tempfile.mkdtemp(prefix="fewer-postgres-"))
    user = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "nobody")
        user = {"user": "nobody"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": folder, **user}
    subprocess.run(
        [initdb, "-D", folder / "data", "-U", "fewer", "-A", "trust", "--no-sync"],
        check=True,
        **quiet,
    )
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    postgres = Path(os.path.realpath(initdb)).parent / "postgres"
    postgres = postgres if postgres.exists() else shutil.which("postgres")
    settings = ["-c", "fsync=off", "-c", "listen_addresses=127.0.0.1", "-k", folder]
    process = subprocess.Popen(
        [postgres, "-D", folder / "data", "-p", str(port), *settings], **quiet
    )
    url = f"postgresql+psycopg://fewer@127.0.0.1:{port}/"
    try:
        until = time.monotonic() + 30
        while True:
            try:
                create_engine(f"{url}postgres").connect().close()
                break
            except SQLAlchemyError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < until, "the server does not answer"
                time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # SIGTERM would wait for who is still connected
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture
def postgres(server):
    engine = create_engine(f"{server}postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS course WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE course"))
    new_gradebook(f"{server}course")
    return f"{server}course"


class NoCredit:
    """Half of the score for each hour, more than all of it later on."""

    def late_submission_penalty(self, student, score, seconds):
        return score / 2 * seconds / 3600


points = st.none() | st.sampled_from([0.0, 1.0, 2.5, 3.0])
notebook_a = st.builds(
    Marks,
    st.fixed_dictionaries(dict.fromkeys((*CELLS, "asked"), points)),
    st.fixed_dictionaries(
        {n: st.sampled_from([None, "No response."]) for n in ("solve_one", "solve_two", "asked")}
    ),
)
notebook_b = st.builds(
    Marks, st.fixed_dictionaries({"three": points, "task": points}), st.just({"task": None})
)
entries = st.builds(
    Entry,
    st.sampled_from(["ada", "ben", "o'hara; drop", "ζήνων"]),
    st.none() | st.integers(-2, 3).map(lambda hours: DUE + timedelta(hours=hours)),
    st.fixed_dictionaries({}, optional={"a": notebook_a, "b": notebook_b}),
)
batches = st.lists(
    st.lists(entries, unique_by=lambda e: e.student, min_size=1, max_size=3), min_size=1, max_size=3
)
by_hand = st.lists(
    st.tuples(st.sampled_from([*CELLS, "asked"]), points, points), max_size=2
)  # cell, manual score, extra credit; given to everybody between two batches


def as_nbgrader_does(url, batch, rule):
    """What `nbgrader autograde` does with its API for each of the entries."""
    with Gradebook(url, "fewer") as book:
        for entry in batch:
            book.update_or_create_student(entry.student)
            when = {"timestamp": entry.timestamp} if entry.timestamp else {}
            submission = book.update_or_create_submission(LAB, entry.student, **when)
            for notebook in submission.notebooks:
                found = entry.notebooks.get(notebook.name)
                for grade in notebook.grades:
                    grade.auto_score = found.points[grade.name] if found else 0
                    decide = grade.manual_score is not None or grade.auto_score is None
                    grade.needs_manual_grade = bool(found) and decide
                for comment in notebook.comments:
                    comment.auto_comment = found.comments[comment.name] if found else None
            book.db.commit()
        for submission in book.assignment_submissions(LAB):  # ours does this for the whole class
            for notebook in submission.notebooks:
                penalty = None
                if submission.total_seconds_late > 0:
                    late = submission.total_seconds_late
                    penalty = rule.late_submission_penalty("", notebook.score, late)
                    penalty = min(penalty, notebook.score)
                notebook.late_submission_penalty = penalty
            book.db.commit()


def grade_by_hand(url, given):
    with Gradebook(url, "fewer") as book:
        for submission in book.assignment_submissions(LAB):
            for notebook in submission.notebooks:
                for grade in notebook.grades:
                    for cell, score, extra in given:
                        if grade.name == cell:
                            grade.manual_score, grade.extra_credit = score, extra
                            grade.needs_manual_grade = False
        book.db.commit()


@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(batches, by_hand)
def test_batches_write_what_nbgraders_own_api_writes(empty, tmp_path, batches, given):
    ours, theirs = (f"sqlite:///{shutil.copy(empty, tmp_path / name)}" for name in ("a.db", "b.db"))
    for batch in batches:
        with Book(ours, "fewer", LAB) as book:
            book.write(batch)
            book.penalize(NoCredit())
        as_nbgrader_does(theirs, batch, NoCredit())
        if batch is batches[-1]:
            assert contents(ours) == contents(theirs)
        grade_by_hand(ours, given)
        grade_by_hand(theirs, given)
    check_scores(ours)


def check_scores(url):
    with Book(url, "fewer", LAB) as book, Gradebook(url, "fewer") as theirs:
        for score in book.scores():
            submission = theirs.find_submission(LAB, score.student)
            penalty = submission.late_submission_penalty
            assert score.points == max(0.0, submission.score - penalty)
            assert score.possible == submission.max_score == 15
            assert score.late_penalty == penalty
            assert score.waiting == submission.needs_manual_grade
            assert {n: c.points for n, c in score.cells.items()} == {
                g.name: g.score for n in submission.notebooks for g in n.grades
            }


ADA = Entry("ada", DUE, {"a": Marks({"one": 3.0, "two": 0.0, "asked": None}, {})})
BEN = Entry("ben", DUE + timedelta(hours=1), {"a": Marks({"one": 1.0, "two": 1.0}, {})})


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_same_on_every_database(kind, request):
    url = request.getfixturevalue(kind)
    with Book(url, "fewer", LAB) as book:
        assert not book.has(ADA)
        book.write([ADA, BEN])
        book.add_students(["ben", "zoe"])
        book.penalize(NoCredit())
        found = {score.student: score for score in book.scores()}
    assert found["ada"].points == 3
    assert found["ada"].waiting
    assert found["ben"].points == 1
    assert found["ben"].late_penalty == 1
    with Gradebook(url, "fewer") as theirs:
        comment = theirs.find_comment("asked", "a", LAB, "ada")
        comment.manual_comment = "Well said."
        theirs.db.commit()
        assert [student.id for student in theirs.students] == ["ada", "ben", "zoe"]
    with Book(url, "fewer", LAB) as book:
        assert book.scores()[0].comments == {"asked": "Well said."}
        assert book.names()["zoe"] == "zoe"
    check_scores(url)


def test_a_batch_is_written_whole_or_not_at_all(postgres):
    bad = Entry("nul\0byte", DUE, {})  # PostgreSQL takes no such text
    with Book(postgres, "fewer", LAB) as book:
        with pytest.raises((SQLAlchemyError, ValueError)):
            book.write([ADA, bad])
        assert book.scores() == []
        book.write([ADA])
        assert [score.student for score in book.scores()] == ["ada"]


def test_an_extension_lifts_the_penalty(sqlite):
    with Book(sqlite, "fewer", LAB) as book:
        book.write([BEN])
        book.penalize(NoCredit())
        assert book.scores()[0].late_penalty == 1
    with Gradebook(sqlite, "fewer") as theirs:
        theirs.grant_extension(LAB, "ben", hours=2)
    with Book(sqlite, "fewer", LAB) as book:
        book.penalize(NoCredit())
        assert book.scores()[0].late_penalty == 0


def test_the_csv_says_what_nbgraders_own_says_and_survives_commas(sqlite, tmp_path):
    with Gradebook(sqlite, "fewer") as theirs:
        theirs.add_student("zoe", first_name="Zoë", last_name="Last", email="z@x.org")
    with Book(sqlite, "fewer", LAB) as book:
        book.write([ADA, BEN])
        book.penalize(NoCredit())
        book.write_csv(tmp_path / "ours.csv", book.scores())
        CsvExportPlugin(to=str(tmp_path / "theirs.csv")).export(book.gradebook)

    def rows(name):
        with (tmp_path / name).open(newline="", encoding="utf-8") as file:
            return sorted(csv.DictReader(file), key=lambda row: row["student_id"])

    assert rows("ours.csv") == rows("theirs.csv")
    with Gradebook(sqlite, "fewer") as theirs:
        theirs.update_or_create_student("zoe", last_name='La"st, Jr.')
    with Book(sqlite, "fewer", LAB) as book:
        book.write_csv(tmp_path / "ours.csv", book.scores())
    assert rows("ours.csv")[2]["last_name"] == 'La"st, Jr.'


def test_an_assignment_that_was_never_released_is_missing(sqlite):
    with pytest.raises(MissingEntry):
        Book(sqlite, "fewer", "lab99")
