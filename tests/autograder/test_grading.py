"""Grading that is interrupted, spread over processes and machines, or repeated."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook
from parsed import Page
from small_course import (
    BOTH,
    FIRST,
    LAB,
    MAX,
    SECOND,
    cell_of,
    contents,
    hand_in,
    make_course,
    solved,
    write_root,
)

from autograder import executors, grading, sandbox, worker
from autograder.course import CourseError
from autograder.explain import explain
from autograder.gradebook import Book
from autograder.grading import grade, scores

pytestmark = pytest.mark.xdist_group("course")  # grades whole classes, as test_course does

WALLED = not sandbox.missing()
KINDS = {"both": BOTH, "first": MAX[FIRST], "second": MAX[SECOND], "none": 0}
STUDENTS = [f"{kind}-{i}" for i in range(4) for kind in KINDS]


@pytest.fixture(scope="module")
def handed_in(tmp_path_factory):
    """Sixteen submissions, no two of them equal, not graded yet."""
    course = tmp_path_factory.mktemp("grading") / "course"
    root = write_root(tmp_path_factory.mktemp("root"))
    released, source = make_course(course, root)
    done = {"both": (FIRST, SECOND), "first": (FIRST,), "second": (SECOND,), "none": ()}
    for student in STUDENTS:
        notebook = solved(released, source, *done[student.split("-")[0]])
        cell_of(notebook, "why").source += f"\n{student}"
        hand_in(course, student, notebook)
    return course


@pytest.fixture(scope="module")
def graded(handed_in, tmp_path_factory):
    """The same class graded without any interruption."""
    course = shutil.copytree(handed_in, tmp_path_factory.mktemp("graded") / "course")
    summary = grade(course, LAB, walled=WALLED)
    assert {s.student: s.points for s in summary.scores} == {
        student: KINDS[student.split("-")[0]] for student in STUDENTS
    }
    assert summary.judged == len(STUDENTS)
    return course


@pytest.fixture
def course(handed_in, tmp_path):
    return shutil.copytree(handed_in, tmp_path / "course")


def url(course):
    return f"sqlite:///{course}/gradebook.db"


def notebooks(course):
    """The graded notebooks, by student."""
    found = (course / "autograded").glob(f"*/{LAB}/{LAB}.ipynb")
    return {path.parts[-3]: json.loads(path.read_bytes()) for path in found}


def same_as(course, graded):
    assert contents(url(course)) == contents(url(graded))
    assert notebooks(course) == notebooks(graded)
    assert (course / f"{LAB}.csv").read_text() == (graded / f"{LAB}.csv").read_text()
    pages = {path.relative_to(course) for path in (course / "feedback").rglob("*.html")}
    assert pages == {path.relative_to(graded) for path in (graded / "feedback").rglob("*.html")}


class Crash(BaseException):
    """The process is gone: nothing catches this, and nothing is tidied up by hand."""


def test_stopped_between_any_two_writes_the_same_command_ends_with_the_same_gradebook(
    course, graded, monkeypatch
):
    """Every write of a batch and of a file is a place to stop; so many crashes in a row do no
    harm. Judging is replayed from the graded class: here it is about what is written when."""
    known = notebooks(graded)
    monkeypatch.setattr(worker, "judge", replayed(known))
    monkeypatch.setattr(grading, "BATCH", 3)
    steps = {"left": 0}

    def counted(function):
        def step(*args, **kwargs):
            if not steps["left"]:
                raise Crash
            steps["left"] -= 1
            return function(*args, **kwargs)

        return step

    monkeypatch.setattr(grading, "_replace", counted(grading._replace))
    monkeypatch.setattr(Book, "write", counted(Book.write))
    monkeypatch.setattr(Book, "penalize", counted(Book.penalize))
    crashes = 0
    for allowed in [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]:
        steps["left"] = allowed
        try:
            grade(course, LAB, walled=WALLED)
        except Crash:
            crashes += 1
        else:
            break
    assert crashes >= 5
    same_as(course, graded)


def replayed(known):
    """`worker.judge` that answers from notebooks graded before, by their written answer."""
    by_answer = {
        cell_of(nbformat.from_dict(nb), "why").source: nbformat.from_dict(nb)
        for nb in known.values()
    }

    def judge(files, order):
        notebook = nbformat.reads(files[LAB].decode(), as_version=4)
        graded = by_answer[cell_of(notebook, "why").source]
        assert graded.metadata["fewer"]["key"] == order.key(files)
        marks = worker.marks(graded)
        return {LAB: worker.Graded(worker.to_bytes(graded), marks, [])}

    return judge


SCRIPT = """
import sys, time
from pathlib import Path
from autograder import grading

write = grading._replace

def slowly(*args):
    time.sleep(0.2)
    write(*args)

if __name__ == "__main__":
    grading.BATCH, grading._replace = 2, slowly  # so that there is a middle to be killed in
    grading.grade(Path(sys.argv[1]), sys.argv[2], walled=sys.argv[3] == "True", jobs=2)
"""


@pytest.mark.slow  # starts the whole grading twice
def test_killed_in_the_middle_grading_goes_on_and_leaves_no_process_behind(
    course, graded, tmp_path, monkeypatch
):
    script = tmp_path / "grade.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, course, LAB, str(WALLED)],
        env=os.environ | {"FEWER_TEST": str(tmp_path)},
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while len(list((course / "autograded").glob("*"))) < 2 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.undo()
    until = time.monotonic() + 30
    while left := running(str(tmp_path)):
        assert time.monotonic() < until, f"still running: {left}"
        time.sleep(0.1)
    summary = grade(course, LAB, walled=WALLED, jobs=1)
    assert 0 < summary.judged < len(STUDENTS)
    same_as(course, graded)


def running(mark):
    """Processes with FEWER_TEST=mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FEWER_TEST={mark}".encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" "))
        except OSError:
            continue
    return [line for line in found if line]


def test_what_has_its_grade_is_not_judged_again_unless_asked_or_changed(
    graded, tmp_path, monkeypatch
):
    course = shutil.copytree(graded, tmp_path / "course")
    before = contents(url(course))
    with Gradebook(url(course)) as book:
        answer = book.find_grade("why", LAB, LAB, "both-0")
        answer.manual_score, answer.needs_manual_grade = 3, False
        book.db.commit()
    judged = []
    genuine = worker.judge

    def judge(files, order):
        judged.append(files)
        return genuine(files, order)

    monkeypatch.setattr(worker, "judge", judge)
    assert grade(course, LAB, walled=WALLED).judged == 0
    assert not judged
    [kept] = [score for score in scores(course, LAB) if score.student == "both-0"]
    assert kept.points == BOTH + 3
    assert not kept.waiting  # nothing was graded again, so there is nothing to look at again

    path = course / "submitted" / "none-0" / LAB / f"{LAB}.ipynb"
    shutil.copy(course / "submitted" / "both-1" / LAB / f"{LAB}.ipynb", path)
    summary = grade(course, LAB, walled=WALLED)
    assert summary.judged == 1
    assert len(judged) == 0  # the same notebook was judged for another student
    assert {s.student: s.points for s in summary.scores}["none-0"] == BOTH

    (course / "gradebook.db").unlink()
    shutil.copy(graded / "gradebook.db", course / "gradebook.db")
    with Gradebook(url(course)) as book:
        book.remove_submission(LAB, "first-0")
    assert grade(course, LAB, walled=WALLED).judged == 2  # none-0 and the one that was removed
    after = contents(url(course))
    assert {k: v for k, v in after.items() if k != "none-0"} == {
        k: v for k, v in before.items() if k != "none-0"
    }


def test_a_repaired_course_grades_anew(graded, tmp_path, monkeypatch):
    course = shutil.copytree(graded, tmp_path / "course")
    monkeypatch.setattr(grading, "course_version", lambda: "0.1.0+repaired")
    monkeypatch.setattr(worker, "course_version", lambda: "0.1.0+repaired")
    monkeypatch.setattr(worker, "_judge", judged_by_number)
    summary = grade(course, LAB, walled=WALLED)
    assert summary.judged == len(STUDENTS)
    assert {s.points for s in summary.scores} == {0}


def judged_by_number(notebook, order):
    from autograder.exercise import find
    from autograder.verdict import Result, Verdict

    return notebook, {
        name: Verdict(name, [Result(c.name, "", c.points, "todo") for c in find(name).checks])
        for name in (FIRST, SECOND)
    }


@pytest.mark.slow  # a cluster's workers import torch
def test_a_cluster_that_loses_a_worker_ends_with_the_same_gradebook(course, graded):
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
    )
    with cluster:
        address = cluster.scheduler_address.removeprefix("tcp://")
        pids = [w.process.process.pid for w in cluster.workers.values()]
        killed = []

        def half_way(done, total, student):
            if done >= total // 2 and not killed:
                os.kill(pids[0], signal.SIGKILL)
                killed.append(done)

        summary = grade(course, LAB, walled=WALLED, executor=f"dask://{address}", progress=half_way)
    assert killed
    assert killed[0] < len(STUDENTS)
    assert not summary.failed
    same_as(course, graded)


def test_executors_that_are_not_there_are_named(course):
    pytest.importorskip("distributed")
    with pytest.raises(CourseError, match=r"must be dask://HOST:PORT, got 'spark://here'"):
        grade(course, LAB, walled=WALLED, executor="spark://here")
    with pytest.raises(CourseError, match=r"no Dask scheduler answers at dask://127.0.0.1:9"):
        grade(course, LAB, walled=WALLED, executor="dask://127.0.0.1:9")


def test_two_gradings_of_one_assignment_do_not_meet(course, monkeypatch):
    def second(files, order):
        with pytest.raises(CourseError, match="another process is grading"):
            grade(course, LAB, walled=WALLED)
        raise Crash

    monkeypatch.setattr(worker, "judge", second)
    with pytest.raises(Crash):
        grade(course, LAB, walled=WALLED)


def test_a_worker_that_is_killed_costs_nobody_a_grade(course, graded, monkeypatch):
    """Who is at hand when a worker dies is tried again; only who kills it every time is lost."""
    monkeypatch.setattr(grading.executors, "local", lambda jobs, walled: Fragile(deadly))
    known = notebooks(graded)
    replay = replayed(known)
    deadly = "both-3"

    class Fragile:
        """A pool of which every worker dies at one submission, and takes the next with it."""

        def __init__(self, deadly):
            self.deadly = deadly
            self.broken = False

        def submit(self, judge, files, order):
            if self.broken:
                raise BrokenExecutor
            future = Future()
            if self.deadly.encode() in files[LAB]:
                self.broken = True
                future.set_exception(BrokenExecutor())
            else:
                future.set_result(replay(files, order))
            return future

        def shutdown(self, wait=True, cancel_futures=False):
            pass

    summary = grade(course, LAB, walled=WALLED, jobs=2)
    assert summary.failed.keys() == {deadly}
    assert "killed every time" in summary.failed[deadly]
    expected, found = contents(url(graded)), contents(url(course))
    assert found.pop(deadly) == {}
    expected.pop(deadly)
    assert found == expected


def test_who_handed_in_the_same_gets_the_same_though_a_worker_died_at_it(
    course, graded, monkeypatch
):
    path = "submitted/{}/" + f"{LAB}/{LAB}.ipynb"
    shutil.copy(course / path.format("both-0"), course / path.format("none-3"))
    replay = replayed(notebooks(graded))
    deaths = []

    class Unlucky(executors.Inline):
        """A pool of which the worker at the first submission dies, as often as told."""

        def submit(self, judge, files, order):
            if b"both-0" in files[LAB] and len(deaths) < often:
                deaths.append(order)
                future = Future()
                future.set_exception(BrokenExecutor())
                return future
            return super().submit(replay, files, order)

    monkeypatch.setattr(grading.executors, "local", lambda jobs, walled: Unlucky())
    # Nobody waits before all have begun, so that the copy is told from what is under way.
    monkeypatch.setattr(grading, "AHEAD", len(STUDENTS))
    for often in (1, 2):
        deaths.clear()
        summary = grade(course, LAB, walled=WALLED, jobs=2, again=True)
        points = {score.student: score.points for score in summary.scores}
        assert len(deaths) == often
        assert (points["both-0"], points["none-3"]) == (BOTH, BOTH)
        assert not summary.failed
        shutil.rmtree(course / "autograded")
        with Gradebook(url(course)) as book:
            for student in STUDENTS:
                book.remove_submission(LAB, student)


def test_what_nbgrader_itself_graded_before_is_judged(course, graded, monkeypatch):
    """Also where one who handed in the same had it graded so."""
    monkeypatch.setattr(worker, "judge", replayed(notebooks(graded)))
    released = nbformat.read(course / "release" / LAB / f"{LAB}.ipynb", as_version=4)
    for student in STUDENTS:
        path = course / "autograded" / student / LAB / f"{LAB}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(released, path)
    path = "submitted/{}/" + f"{LAB}/{LAB}.ipynb"
    shutil.copy(course / path.format("both-0"), course / path.format("both-1"))
    summary = grade(course, LAB, walled=WALLED)
    assert summary.judged == len(STUDENTS)
    assert {s.student: s.points for s in summary.scores}["both-1"] == BOTH


def test_explain_shows_the_recorded_verdict_again(graded, tmp_path):
    found = explain(graded, LAB, "first-2", SECOND, walled=WALLED)
    assert found.same
    assert found.again.todo
    assert not found.changed
    with pytest.raises(CourseError, match=f"EXERCISE must be one of {FIRST}, {SECOND}, got 'x'"):
        explain(graded, LAB, "first-2", "x", walled=WALLED)
    with pytest.raises(CourseError, match="'nobody' handed in nothing"):
        explain(graded, LAB, "nobody", FIRST, walled=WALLED)
    course = shutil.copytree(graded, tmp_path / "course")
    path = course / "submitted" / "first-2" / LAB / f"{LAB}.ipynb"
    shutil.copy(course / "submitted" / "both-1" / LAB / f"{LAB}.ipynb", path)
    found = explain(course, LAB, "first-2", SECOND, walled=WALLED)
    assert not found.same
    assert "the submission, or what was released, is not what was graded" in found.changed[0]


@pytest.mark.slow  # two kernels start
def test_a_class_graded_with_its_own_figures_has_the_same_points(handed_in, tmp_path):
    course = shutil.copytree(handed_in, tmp_path / "course")
    for student in STUDENTS:
        if student not in ("both-0", "first-1"):
            shutil.rmtree(course / "submitted" / student)
    path = course / "submitted" / "both-0" / LAB / f"{LAB}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cell_of(notebook, FIRST).source += (
        "\n\nimport matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.show()\n"
        "print('words of my own')\n"
        "from IPython.display import HTML, display\n"
        "display(HTML('<script>alert(1)</script>'))\n"
    )
    nbformat.write(notebook, path)
    pages = {}
    for execute in (False, True):
        summary = grade(course, LAB, walled=WALLED, execute=execute)
        assert summary.judged == 2
        assert {s.student: s.points for s in summary.scores} == {
            "both-0": BOTH,
            "first-1": MAX[FIRST],
        }
        page = course / "feedback" / "both-0" / LAB / f"{LAB}.html"
        pages[execute] = Page(page.read_text())
    pictures = {
        execute: [source for source in page.all("src") if source.startswith("data:image/png;")]
        for execute, page in pages.items()
    }
    assert [len(pictures[False]), len(pictures[True])] == [0, 1]
    assert "words of my own" in pages[True].text
    assert not pages[True].tags["script"]
    made = notebooks(course)["both-0"]
    assert made["metadata"]["fewer"]["executed"] is True
    shown = cell_of(nbformat.from_dict(made), FIRST).outputs
    assert shown
    assert not any("text/html" in output.get("data", {}) for output in shown)
