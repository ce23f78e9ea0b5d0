"""A small class, graded by real nbgrader around our judge."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output
from nbgrader.api import Gradebook
from small_course import (
    BOTH,
    FIRST,
    LAB,
    MAX,
    SECOND,
    cell_of,
    hand_in,
    make_course,
    solved,
    write_root,
)

from autograder import remote, sandbox, submission
from autograder.build import build, student_notebook
from autograder.course import CourseError, course_seed, create_course, release
from autograder.exercise import exercises, find
from autograder.grading import NO_SANDBOX, grade, scores
from autograder.remote import GraderError
from autograder.report import read_class, render
from autograder.verdict import MIME, Result, Verdict
from autograder.worker import GraderFault, course_version, record

pytestmark = pytest.mark.xdist_group("course")  # the fixtures below grade whole classes

WALLED = not sandbox.missing()
HONEST = {"perfect": BOTH, "untouched": 0, "partial": MAX[FIRST]}
# On the board: late work gets nothing here, what the checks gave it is the raw score.
MENDED = {"deleted": BOTH, "tampered": MAX[FIRST], "renamed": 0, "corrupt": MAX[FIRST]}
POINTS = {**HONEST, **MENDED, "late": 0, "crash": MAX[SECOND]}
BROKEN = {"broken": "lab7_small.ipynb", "empty": "no lab7_small.ipynb was handed in"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def course(root, tmp_path_factory):
    """A course with eleven submissions, not graded yet."""
    course = tmp_path_factory.mktemp("course") / "spring term"
    released, source = make_course(course, root)
    with (course / "nbgrader_config.py").open("a") as config:
        config.write('c.LateSubmissionPlugin.penalty_method = "zero"\n')
    with Gradebook(f"sqlite:///{course}/gradebook.db") as gradebook:
        gradebook.update_or_create_assignment(LAB, duedate="2030-01-01 18:00:00 UTC")

    perfect = solved(released, source, FIRST, SECOND)
    cell_of(perfect, "why").source = "Because it is so."
    hand_in(course, "perfect", perfect)
    hand_in(course, "untouched", released)
    hand_in(course, "partial", solved(released, source, FIRST))
    hand_in(course, "late", perfect, "2030-01-01 18:00:01 UTC")

    deleted = solved(released, source, FIRST, SECOND)
    deleted.cells = [
        cell for cell in deleted.cells if cell.metadata.get("nbgrader", {}).get("grade") is not True
    ]
    hand_in(course, "deleted", deleted)

    tampered = solved(released, source, FIRST)
    check = cell_of(tampered, f"check_{SECOND}")
    check.source = "100"
    check.metadata.nbgrader.points = 100
    check.outputs = [new_output("execute_result", {"text/plain": "100"})]
    tampered.metadata["fewer"] = {"version": "9.9"}
    hand_in(course, "tampered", tampered)

    crash = solved(released, source, SECOND)
    cell_of(crash, FIRST).source = f"def {FIRST}(*args, **kwargs):\n    import os\n    os._exit(0)"
    crash.cells.insert(1, new_code_cell("import sys\nprint('<script>', file=sys.stderr)"))
    hand_in(course, "crash", crash)

    (hand_in(course, "broken", None) / f"{LAB}.ipynb").write_text("{ this is no JSON")
    hand_in(course, "renamed", released)
    folder = course / "submitted" / "renamed" / LAB
    (folder / f"{LAB}.ipynb").rename(folder / f"{LAB}-final.ipynb")
    hand_in(course, "empty", None)
    (course / "submitted" / "empty" / LAB / "timestamp.txt").unlink()
    corrupt = solved(released, source, FIRST)
    del cell_of(corrupt, FIRST).metadata.nbgrader["grade_id"]
    hand_in(course, "corrupt", corrupt)
    return course


@pytest.fixture(scope="module")
def graded(course):
    """The class graded once, with everything that `progress` was told."""
    told = []
    summary = grade(course, LAB, walled=WALLED, progress=lambda *said: told.append(said))
    return summary, told


def points_of(summary):
    return {score.student: score.points for score in summary.scores}


def test_labs_are_byte_for_byte_what_nbgrader_releases(root, course):
    build(root)
    released = course / "release" / LAB / f"{LAB}.ipynb"
    assert (root / "labs" / f"{LAB}.ipynb").read_bytes() == released.read_bytes()
    assert nbformat.read(released, 4) == student_notebook(root / "solutions" / f"{LAB}.py")


def test_everybody_gets_the_points_they_deserve(graded):
    summary, _ = graded
    assert points_of(summary) == POINTS
    of = {score.student: score for score in summary.scores}
    assert of["partial"].possible == BOTH + 4
    assert list(of["partial"].cells) == [f"check_{SECOND}", f"check_{FIRST}", "why"]
    assert of["partial"].cells[f"check_{FIRST}"].points == MAX[FIRST]
    assert not of["untouched"].waiting  # nothing was answered, so nobody has to read it
    assert of["perfect"].waiting
    assert of["late"].late_penalty == BOTH
    assert summary.notices == ([] if WALLED else [NO_SANDBOX])


def test_without_a_sandbox_grading_refuses_or_says_so_in_every_report(
    course, tmp_path, monkeypatch
):
    monkeypatch.setattr(sandbox, "missing", lambda: "bubblewrap is not installed: apt install it")
    with pytest.raises(CourseError, match=r"isolated .* bubblewrap is not .* --unsafe-no-sandbox"):
        grade(course, LAB)
    copy = shutil.copytree(course, tmp_path / "copy")
    summary = grade(copy, LAB, walled=False)
    assert summary.judged == len(POINTS)  # a grade of the sandbox is not one without it
    assert summary.notices == [NO_SANDBOX]
    assert not read_class(copy, LAB).walled
    assert "Student code ran without a sandbox" in render(read_class(copy, LAB))


def test_a_submission_that_cannot_be_graded_is_listed_and_stops_nobody(graded, course):
    summary, told = graded
    assert summary.failed.keys() == BROKEN.keys()
    for student, why in BROKEN.items():
        assert summary.failed[student].startswith(why)
        assert not (course / "autograded" / student / LAB).exists()
    assert summary.remarks.keys() == {"corrupt", "deleted", "renamed", "tampered"}
    total = len(POINTS) + len(BROKEN)
    assert {said[1] for said in told} == {total}
    assert told[-1][0] == total
    assert {said[2] for said in told} == POINTS.keys() | BROKEN.keys()


def test_the_csv_has_a_row_for_every_student(graded):
    summary, _ = graded
    with summary.csv.open() as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    assert rows.keys() == POINTS.keys() | BROKEN.keys()
    for student, points in POINTS.items():
        assert float(rows[student]["score"]) == points
    assert float(rows["late"]["raw_score"]) == BOTH
    assert float(rows["broken"]["score"]) == 0


def test_a_graded_notebook_holds_verdicts_seed_and_course_version(graded, course):
    notebook = nbformat.read(course / "autograded" / "tampered" / LAB / f"{LAB}.ipynb", 4)
    made = notebook.metadata["fewer"]
    assert (made["course"], made["seed"], made["sandbox"]) == (course_version(), 0, WALLED)
    check = cell_of(notebook, f"check_{SECOND}")
    assert check.source == f"check({SECOND})"
    assert check.metadata.nbgrader.points == MAX[SECOND]
    [output] = check.outputs
    verdict = Verdict.from_json(json.loads(json.dumps(output.data[MIME])))
    assert verdict.todo
    assert output.data["text/plain"] == "0"


def test_feedback_shows_the_card_and_neither_solutions_nor_what_students_printed(graded):
    summary, _ = graded
    for student in POINTS:
        page = (summary.feedback / student / LAB / f"{LAB}.html").read_text()
        assert page.count('<div class="fewer-verdict ') == 2
        assert "The model answer" not in page
    assert (
        "your code ended the process"
        in (summary.feedback / "crash" / LAB / f"{LAB}.html").read_text()
    )


@pytest.mark.slow  # nbgrader starts a kernel, which imports torch, for each submission
def test_plain_nbgrader_gives_honest_submissions_the_same_points(graded, course, tmp_path):
    stock = tmp_path / "stock"
    for part in ("source", "nbgrader_config.py", "gradebook.db"):
        copy = shutil.copytree if (course / part).is_dir() else shutil.copy
        stock.mkdir(exist_ok=True)
        copy(course / part, stock / part)
    for student in HONEST:
        shutil.copytree(course / "submitted" / student, stock / "submitted" / student)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", "autograde", LAB, "--force"],
        cwd=stock,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {score.student: score for score in scores(stock, LAB)}
    assert {student: found[student].points for student in HONEST} == HONEST
    notebook = nbformat.read(stock / "autograded" / "perfect" / LAB / f"{LAB}.ipynb", 4)
    assert MIME in cell_of(notebook, f"check_{FIRST}").outputs[0].data  # it was stock that ran it


@pytest.mark.slow  # each of two workers imports torch, and so does the process it forks from
def test_grading_again_in_two_processes_gives_the_same_and_keeps_what_a_person_entered(
    graded, course
):
    summary, _ = graded
    with Gradebook(f"sqlite:///{course}/gradebook.db") as gradebook:
        answer = gradebook.find_grade("why", LAB, LAB, "perfect")
        answer.manual_score = 3
        answer.needs_manual_grade = False
        gradebook.db.commit()
    assert {s.student: s.points for s in scores(course, LAB)}["perfect"] == BOTH + 3
    again = grade(course, LAB, jobs=2, walled=WALLED, again=True)
    assert points_of(again) == {**POINTS, "perfect": BOTH + 3}
    assert again.failed == summary.failed
    by_student = {score.student: score for score in again.scores}
    assert by_student["perfect"].waiting  # nbgrader asks for another look after grading again
    with Gradebook(f"sqlite:///{course}/gradebook.db") as gradebook:
        gradebook.find_grade("why", LAB, LAB, "perfect").manual_score = None
        gradebook.db.commit()


def test_a_fault_of_the_grader_is_no_zero_and_the_next_submission_gets_a_fresh_process(
    graded, course, monkeypatch
):
    summary, _ = graded
    before = {score.student: score for score in scores(course, LAB)}
    zygotes = []

    class FakeZygote:
        def __init__(self, walled):
            assert walled == WALLED
            zygotes.append(self)
            self.closed = False

        def close(self):
            self.closed = True

    def faulty(notebook, zygote, **kwargs):
        assert zygote is zygotes[-1]
        assert not zygote.closed
        raise GraderError("the grading process is gone")

    monkeypatch.setattr(remote, "Zygote", FakeZygote)
    monkeypatch.setattr(submission, "judge_notebook", faulty)
    again = grade(course, LAB, walled=WALLED, again=True)
    fault = (
        "the grader's own fault: the grading process is gone; the gradebook keeps the earlier grade"
    )
    assert again.failed == dict(sorted({**dict.fromkeys(POINTS, fault), **summary.failed}.items()))
    assert {score.student: score for score in again.scores} == before
    assert len(zygotes) == len(POINTS)
    assert all(zygote.closed for zygote in zygotes)


def test_points_that_differ_from_the_released_ones_are_a_fault_of_the_grader(course):
    checks = exercises()[FIRST].checks
    notebook = nbformat.read(course / "submitted" / "untouched" / LAB / f"{LAB}.ipynb", 4)
    second = Verdict(SECOND, [Result(c.name, "", c.points, "todo") for c in find(SECOND).checks])
    verdict = Verdict(FIRST, [Result(c.name, "", c.points, "todo") for c in [*checks, checks[0]]])
    with pytest.raises(GraderFault, match=f"was released with {MAX[FIRST]} points"):
        record(notebook, {FIRST: verdict, SECOND: second})
    with pytest.raises(GraderFault, match="no such exercise"):
        record(notebook, {FIRST: Verdict(FIRST, []), SECOND: second})


def test_what_cannot_be_graded_at_all_says_what_to_do(root, tmp_path):
    with pytest.raises(CourseError, match="no course folder"):
        grade(tmp_path, LAB, walled=WALLED)
    with pytest.raises(ValueError, match=r"labs must be among .*\(7\), got 3"):
        create_course(tmp_path / "a", root, [3])
    create_course(tmp_path / "a", root)
    config = tmp_path / "a" / "nbgrader_config.py"
    config.write_text(config.read_text() + "# mine\n")
    create_course(tmp_path / "a", root)
    assert config.read_text().endswith("# mine\n")
    with pytest.raises(CourseError, match="make the course with the lab first"):
        release(tmp_path / "a", "lab8_none")
    with pytest.raises(CourseError, match="nothing was handed in"):
        grade(tmp_path / "a", LAB, walled=WALLED)
    hand_in(tmp_path / "a", "x", None)
    with pytest.raises(CourseError, match="release it before grading"):
        grade(tmp_path / "a", LAB, walled=WALLED)


def test_a_course_draws_its_seed_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = course_seed(tmp_path / "a")
    assert course_seed(tmp_path / "a") == first
    assert course_seed(tmp_path / "b") != first
    (tmp_path / "a" / ".seed").write_text("spring")
    with pytest.raises(CourseError, match="must hold a whole number"):
        course_seed(tmp_path / "a")
