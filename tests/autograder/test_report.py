"""The class report: its numbers, and that nothing a student wrote can act in it."""

from __future__ import annotations

import random
import re
import sqlite3
import statistics
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from parsed import Page

from autograder.course import CONFIG, CourseError
from autograder.report import (
    LARGE,
    Adjustment,
    ClassReport,
    Student,
    read_class,
    render,
    verdicts,
    write_report,
)
from autograder.verdict import MIME, Failure, Result, Verdict

ATTACK = '"><img src=x onerror=alert(1)></pre></style><script>alert(1)</script>{{ 7 * 7 }}'
CHECKS = {"fold": ["zero_stays", "sign_stays", "order_stays"], "spin": ["turns", "returns"]}


def verdict(exercise: str, *statuses: str, mistake: str = "", text: str = "off by 1") -> Verdict:
    """A verdict of one point a check; ``mistake`` is recognised in every failed one."""
    results = []
    for name, status in zip(CHECKS[exercise], statuses, strict=True):
        failed = status == "failed"
        results.append(
            Result(
                name,
                f"{name} always.",
                1,
                status,
                hint=text if failed else "",
                diagnosis=f"You did {mistake}." if mistake and failed else "",
                misconception=mistake if failed else "",
                failure=Failure(text, text, text, text, text) if failed else None,
            )
        )
    return Verdict(exercise, results, seed=3)


def student(name: str, *found: Verdict, by_hand: float = 0.0) -> Student:
    score = sum(v.points for v in found) + by_hand
    return Student(name.lower(), name, score, 9.0, {v.exercise: v for v in found})


def a_class(seed: int, size: int = 12) -> ClassReport:
    rng = random.Random(seed)
    students = []
    worth = {"fold": 3.0, "spin": 2.0, "essay": 4.0}
    for i in range(size):
        found = []
        for exercise, checks in CHECKS.items():
            statuses = rng.choices(["passed", "failed", "todo"], k=len(checks))
            found.append(verdict(exercise, *statuses, mistake=rng.choice(["", "it upside down"])))
        essay = rng.choice([0, 0.5, 3])
        marks = {v.exercise: float(v.points) for v in found}
        if rng.random() < 0.8:  # of the others, a person has yet to read it
            marks["essay"] = essay
        students.append(replace(student(f"S{i}", *found, by_hand=essay), marks=marks))
    students.append(Student("absent", "Absent", None, 9.0))
    return ClassReport("lab1", "Lab 1", students, 9.0, ["fewer 0.1.0, seed 3"], worth=worth)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_mean_and_median_are_those_of_who_handed_in(seed: int) -> None:
    report = a_class(seed)
    scores = [s.score for s in report.students if s.score is not None]
    assert report.mean == pytest.approx(np.mean(scores))
    assert report.median == pytest.approx(np.median(scores))
    assert len(report.students) == 13
    assert len(report.submitted) == 12
    assert [s.name for s in report.missing] == ["Absent"]


@pytest.mark.parametrize(
    "possible", [1.0, 5.0, 9.0, 16.0, 17.0, 40.0, 41.5, 100.0, 250.0], ids=lambda p: f"{p:g}"
)
def test_every_score_is_in_exactly_one_bar_of_the_histogram(possible: float) -> None:
    rng = random.Random(possible)
    scores = [0.0, possible, possible / 2, *(rng.uniform(0, possible) for _ in range(50))]
    students = [Student(str(i), str(i), score, possible) for i, score in enumerate(scores)]
    bars = ClassReport("lab", "Lab", students, possible).histogram
    edges = [bar.low for bar in bars] + [bars[-1].high]
    assert edges[0] == 0
    assert edges[-2] < possible <= edges[-1]
    assert len(set(np.diff(edges))) == 1
    assert len(bars) <= 16
    assert [bar.students for bar in bars] == np.histogram(scores, edges)[0].tolist()


def test_a_score_above_the_points_possible_still_has_a_bar() -> None:
    bars = ClassReport("lab", "Lab", [Student("a", "A", 12.5, 10.0)], 10.0).histogram
    assert sum(bar.students for bar in bars) == 1


@pytest.mark.parametrize("seed", range(5))
def test_pass_rates_count_each_check_of_each_exercise(seed: int) -> None:
    report = a_class(seed)
    seen = 0
    for exercise, rates in report.rates.items():
        for rate in rates:
            statuses = [
                r.status
                for s in report.students
                if exercise in s.verdicts
                for r in s.verdicts[exercise].results
                if r.title == rate.title
            ]
            assert (rate.passed, rate.failed, rate.todo) == (
                statuses.count("passed"),
                statuses.count("failed"),
                statuses.count("todo"),
            )
            assert rate.passed + rate.failed + rate.todo == 12
            seen += 1
    assert seen == 5


@pytest.mark.parametrize("seed", range(5))
def test_the_weakest_exercise_and_the_weakest_check_come_first(seed: int) -> None:
    rates = a_class(seed).rates
    means = [statistics.fmean(rate.rate for rate in group) for group in rates.values()]
    assert means == sorted(means)
    for group in rates.values():
        assert [r.rate for r in group] == sorted(r.rate for r in group)


def test_a_student_counts_once_for_a_misconception_however_many_checks_show_it() -> None:
    students = [
        student("Ada", verdict("fold", "failed", "failed", "failed", mistake="squint")),
        student("Ben", verdict("fold", "failed", "passed", "passed", mistake="squint")),
        student("Cleo", verdict("spin", "failed", "passed", mistake="squint")),
        student("Dan", verdict("spin", "failed", "passed")),
    ]
    mistakes = ClassReport("lab", "Lab", students, 9.0).mistakes
    assert [(m.exercise, [s.name for s in m.students]) for m in mistakes] == [
        ("fold", ["Ada", "Ben"]),
        ("spin", ["Cleo"]),
    ]
    assert mistakes[0].says == "You did squint."


@pytest.mark.parametrize("seed", range(5))
def test_exercise_statistics_are_those_of_the_points_that_count(seed: int) -> None:
    report = a_class(seed, size=40)
    assert [item.name for item in report.by_item] == ["fold", "spin", "essay"]
    for item in report.by_item:
        those = [s.marks for s in report.students if item.name in s.marks]
        own = np.array([marks[item.name] for marks in those])
        rest = np.array([sum(v for k, v in marks.items() if k != item.name) for marks in those])
        assert (item.count, item.mean) == (len(own), pytest.approx(own.mean()))
        assert item.median == np.median(own)
        assert item.full == pytest.approx((own >= item.possible).mean())
        assert item.zero == pytest.approx((own == 0).mean())
        assert item.discrimination == pytest.approx(np.corrcoef(own, rest)[0, 1])


def test_an_exercise_that_tells_students_apart_is_told_from_one_that_does_not() -> None:
    marks = [{"good": float(i), "odd": -i % 7.0, "rest": 3.0 * i} for i in range(40)]
    students = [Student(f"{i}", f"{i}", 1, 9, marks=m) for i, m in enumerate(marks)]
    good, odd, _ = ClassReport(
        "lab", "Lab", students, 9.0, worth={"good": 39, "odd": 6, "rest": 120}
    ).by_item
    assert good.discrimination is not None
    assert odd.discrimination is not None
    assert good.discrimination > 0.9
    assert abs(odd.discrimination) < 0.2


def test_where_all_have_the_same_points_there_is_no_correlation() -> None:
    students = [Student(f"{i}", f"{i}", 3, 9, marks={"fold": 3, "essay": i}) for i in range(5)]
    report = ClassReport("lab", "Lab", students, 9.0, worth={"fold": 3, "essay": 4, "none": 2})
    assert [item.discrimination for item in report.by_item] == [None] * 3
    text = Page(render(report)).text
    assert "fold 3 of 3 3 100 % 0 % –" in text
    assert "none waits for a person, of 2" in text


def test_notices_are_told_once_with_everybody_they_are_about() -> None:
    some = [student(name, verdict("fold", "passed", "passed", "passed")) for name in "ABC"]
    a, b, c = some
    a.notices.extend(["was edited", "was edited"])
    b.notices.extend(["came twice", "was edited"])
    report = ClassReport("lab", "Lab", [a, b, c], 9.0)
    assert report.notices == [("was edited", [a, b]), ("came twice", [b])]
    text = Page(render(report)).text
    assert "Worth a look" in text
    assert "was edited 2 students: A , B came twice B" in text
    assert "Worth a look" not in Page(render(ClassReport("lab", "Lab", [c], 9.0))).text


def test_hidden_checks_are_marked() -> None:
    seen = verdict("spin", "passed", "failed")
    unseen = replace(seen, results=[seen.results[0], replace(seen.results[1], hidden=True)])
    text = Page(render(ClassReport("lab", "Lab", [student("Ada", unseen)], 9.0))).text
    assert "returns hidden" in text
    assert " turns hidden" not in text


@pytest.mark.parametrize("size", [LARGE - 1, LARGE + 1])
def test_the_page_of_a_large_class_names_what_failed_without_the_cards(size: int) -> None:
    report = a_class(0, size=size - 1)
    page = Page(render(report))
    cards = [value for value in page.all("class") if "fewer-verdict" in value]
    assert bool(cards) == (size <= LARGE)
    assert len([place for place in page.all("id") if place.startswith("student-")]) == size
    for s in report.students:
        assert f"{s.name} {s.id}" in page.text


def test_a_student_more_makes_the_page_of_a_large_class_little_longer() -> None:
    small, large = (len(render(a_class(0, size=size))) for size in (2 * LARGE, 4 * LARGE))
    assert (large - small) / (2 * LARGE) < 3_000


def test_the_page_shows_the_numbers() -> None:
    report = ClassReport(
        "lab1",
        "Lab 1. Folding",
        [
            student("Ada", verdict("fold", "passed", "passed", "passed")),
            student("Ben", verdict("fold", "failed", "passed", "failed", mistake="squint")),
            Student("cleo", "Cleo", None, 9.0),
        ],
        9.0,
        ["fewer 0.1.0, seed 3"],
    )
    text = Page(render(report)).text
    assert "Lab 1. Folding" in text
    assert "students 3 handed in 2 mean 2 of 9 median 2 of 9" in text
    assert "Not handed in: Cleo" in text
    assert "median 2 " in text
    assert "zero stays 1 of 2" in text
    assert "1 50 % You did squint. fold · Ben" in text
    assert "Graded with fewer 0.1.0, seed 3." in text
    assert "ran without a sandbox" in text
    assert "ran in a sandbox" in Page(render(replace(report, walled=True))).text


def test_the_page_shows_what_people_and_rules_changed() -> None:
    changes = [
        Adjustment("essay: graded by hand", 2.5, "well argued"),
        Adjustment("late penalty", -1.0, "5.0 hours after the due date"),
        Adjustment("sketch: to be graded by hand", None),
    ]
    passed = verdict("fold", "passed", "passed", "passed")
    one = Student("ada", "Ada", 4.5, 9.0, {"fold": passed}, changes)
    text = Page(render(ClassReport("lab", "Lab", [one], 9.0))).text
    assert "Checks 3" in text
    assert "essay: graded by hand (well argued) +2.5" in text
    assert "late penalty (5.0 hours after the due date) −1" in text
    assert "sketch: to be graded by hand waiting" in text
    assert "4.5 of 9" in text
    assert "1 written answer still waits for a person" in text


# --- classes of every kind -----------------------------------------------------------------------

KINDS = {
    "no students": [],
    "nobody handed in": [Student("a", "A", None, 9.0), Student("b", "B", None, 9.0, ungraded=True)],
    "one student": [student("Ada", verdict("fold", "failed", "passed", "todo", mistake="squint"))],
    "nothing written": [student("Ada", verdict("fold", "todo", "todo", "todo"))],
    "all perfect": [student("Ada", verdict("fold", "passed", "passed", "passed"))] * 2,
    "no verdicts": [Student("a", "A", 0.0, 9.0)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_of_any_kind_has_a_report(kind: str) -> None:
    page = Page(render(ClassReport("lab", "Lab", KINDS[kind], 9.0)))
    assert "Lab" in page.text
    assert "None" not in page.text
    assert "nan" not in " ".join(page.all("width") + page.all("x1") + page.all("style"))


def test_a_class_without_misconceptions_is_told_so() -> None:
    text = Page(render(ClassReport("lab", "Lab", KINDS["all perfect"], 9.0))).text
    assert "No misconception was recognised" in text


def test_possible_points_of_zero_do_not_break_the_histogram() -> None:
    assert render(ClassReport("lab", "Lab", [Student("a", "A", 0.0, 0.0)], 0.0))


# --- nothing acts, nothing is fetched ------------------------------------------------------------


def hostile_class(size: int = 12) -> ClassReport:
    bad = verdict("fold", "failed", "failed", "failed", mistake=ATTACK, text=ATTACK)
    evil = Student(ATTACK, ATTACK, 1.0, 9.0, {"fold": bad}, [Adjustment(ATTACK, 1.0, ATTACK)])
    absent = Student("\u202eevil " + ATTACK, ATTACK, None, 9.0)
    evil.notices.append(ATTACK)
    evil.marks.update({"fold": 1.0, ATTACK: 1.0})
    worth = {"fold": 3.0, ATTACK: 2.0}
    students = [evil, absent, *a_class(1, size).students]
    return ClassReport(ATTACK, ATTACK, students, 9.0, [ATTACK], worth=worth)


@pytest.mark.parametrize("size", [12, 2 * LARGE], ids=["small", "large"])
def test_whatever_a_student_wrote_or_is_called_is_shown_and_never_acts(size: int) -> None:
    normal = a_class(1, size)
    normal.students[0].notices.append("harmless")
    normal.students[0].adjustments.append(Adjustment("remark", 1.0, "harmless"))
    harmless, hostile = Page(render(normal)), Page(render(hostile_class(size)))
    assert hostile.tags.keys() == harmless.tags.keys()
    assert not {"script", "img", "iframe", "link", "object"} & hostile.tags.keys()
    assert {name for name, _ in hostile.attributes} == {name for name, _ in harmless.attributes}
    assert hostile.text.count("<script>alert(1)</script>{{ 7 * 7 }}") > 10


def test_every_link_leads_to_exactly_one_place_in_the_page() -> None:
    page = Page(render(hostile_class()))
    places = Counter(page.all("id"))
    assert set(places.values()) == {1}
    assert all(re.fullmatch(r"[a-z0-9-]+", place) for place in places)
    links = page.all("href")
    assert all(link[0] == "#" and link[1:] in places for link in links)
    assert len([link for link in links if link.startswith("#student-")]) >= 15


def test_the_page_asks_nothing_of_the_network() -> None:
    html = render(a_class(2))
    page = Page(html)
    assert not page.all("src")
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'" in html


# --- reading a course ----------------------------------------------------------------------------


def cell(grade_id: str, grade: bool = True, data: object = None) -> nbformat.NotebookNode:
    flags = {"grade": grade, "solution": not grade, "locked": grade, "task": False}
    about = {**flags, "schema_version": 3, "grade_id": grade_id}
    outputs = [new_output("execute_result", {MIME: data, "text/plain": "1"})] if data else []
    return new_code_cell("check(fold)", metadata={"nbgrader": about}, outputs=outputs)


def test_only_grade_cells_carry_verdicts() -> None:
    good = verdict("fold", "passed", "passed", "failed")
    boast = verdict("spin", "passed", "passed").to_json()
    forged = new_code_cell("display(...)", outputs=[new_output("display_data", {MIME: boast})])
    nb = new_notebook(
        cells=[
            cell("check_fold", data=good.to_json()),
            cell("spin", grade=False, data=boast),
            forged,
            new_markdown_cell("words"),
            cell("check_other"),
        ]
    )
    assert verdicts(nb) == {"fold": good}


@pytest.mark.parametrize("data", ["text", {"results": 3}, {"nothing": 1}, {"results": [{}]}, [1]])
def test_what_cannot_be_read_as_a_verdict_is_left_out(data: object) -> None:
    assert verdicts(new_notebook(cells=[cell("check_fold", data=data)])) == {}


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A graded course: Ada is late and was graded by hand, Ben waits, Cleo's file was broken."""
    from nbgrader.api import Gradebook

    works = {
        "ada": verdict("fold", "passed", "passed", "failed", mistake="squint"),
        "ben": verdict("fold", "todo", "todo", "todo"),
    }
    for name, found in works.items():
        path = tmp_path / "autograded" / name / "lab1" / "lab1.ipynb"
        path.parent.mkdir(parents=True)
        nb = new_notebook(cells=[cell("check_fold", data=found.to_json())])
        nb.metadata["fewer"] = {"version": "0.1.0", "seed": 3, "notices": [f"odd: {name}"]}
        nbformat.write(nb, path)
    released = tmp_path / "release" / "lab1" / "lab1.ipynb"
    released.parent.mkdir(parents=True)
    heading = new_markdown_cell("# Lab 1. Folding\n\nThe story.")
    nbformat.write(new_notebook(cells=[heading]), released)
    (tmp_path / "submitted" / "cleo" / "lab1").mkdir(parents=True)
    (tmp_path / "nbgrader_config.py").write_text(CONFIG, "utf-8")
    with sqlite3.connect(tmp_path / "gradebook.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")  # saves 5 s
    with warnings.catch_warnings(), Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as book:
        warnings.simplefilter("ignore")  # nbgrader's own, about SQLAlchemy
        book.add_assignment("lab1", duedate="2030-01-01 12:00:00 UTC")
        book.add_notebook("lab1", "lab1")
        for name, kind, worth in (("check_fold", "code", 3), ("essay", "markdown", 4)):
            book.add_grade_cell(name, "lab1", "lab1", max_score=worth, cell_type=kind)
        book.add_solution_cell("fold", "lab1", "lab1")
        book.add_student("ada", first_name="Ada", last_name="Okafor")
        for name in ("ben", "cleo", "dan"):
            book.add_student(name)
        for name, found in works.items():
            late = "2030-01-01 15:00:00 UTC" if name == "ada" else "2030-01-01 11:00:00 UTC"
            book.add_submission("lab1", name, timestamp=late)
            grade = book.find_grade("check_fold", "lab1", "lab1", name)
            grade.auto_score, grade.needs_manual_grade = found.points, False
            book.find_grade("essay", "lab1", "lab1", name).needs_manual_grade = name == "ben"
        essay = book.find_grade("essay", "lab1", "lab1", "ada")
        essay.manual_score, essay.extra_credit = 3.0, 0.5
        code = book.find_grade("check_fold", "lab1", "lab1", "ada")
        code.manual_score = 3.0
        comment = book.find_comment("fold", "lab1", "lab1", "ada")
        comment.manual_comment = "I see what you mean"
        notebook = book.find_submission_notebook("lab1", "lab1", "ada")
        notebook.late_submission_penalty = 2.0
        book.db.commit()
    return tmp_path


def test_points_come_from_the_gradebook_with_manual_grades_and_late_penalty(course: Path) -> None:
    report = read_class(course, "lab1")
    ada, ben, cleo, dan = report.students
    assert report.possible == 7
    assert report.title == "Lab 1. Folding"
    assert report.graded_with == ["fewer 0.1.0, seed 3"]
    assert ada.name == "Ada Okafor"
    assert ada.score == 3 + 3 + 0.5 - 2
    assert ada.checked + sum(a.points or 0 for a in ada.adjustments) == ada.score
    assert {(a.what, a.points, a.detail) for a in ada.adjustments} == {
        ("fold: adjusted by hand", 1.0, "I see what you mean"),
        ("essay: graded by hand", 3.0, ""),
        ("essay: extra credit", 0.5, ""),
        ("late penalty", -2.0, "3.0 hours after the due date"),
    }
    assert not ada.waiting
    assert ada.marks == {"fold": 3, "essay": 3.5}
    assert ben.marks == {"fold": 0}
    assert report.worth == {"fold": 3, "essay": 4}
    assert report.notices == [("odd: ada", [ada]), ("odd: ben", [ben])]
    assert (ben.score, ben.waiting, report.waiting) == (0, True, 1)
    assert (cleo.score, cleo.ungraded) == (None, True)
    assert (dan.score, dan.ungraded) == (None, False)


def test_the_report_is_one_file_and_the_same_every_time(course: Path) -> None:
    first = write_report(course, "lab1", course / "new" / "folder" / "a.html")
    second = write_report(course, "lab1", course / "b.html")
    assert first.read_bytes() == second.read_bytes()
    text = Page(first.read_text("utf-8")).text
    assert "Handed in, but could not be graded: cleo" in text
    assert "Not handed in: dan" in text


def test_a_wrong_course_or_assignment_is_named_with_what_would_be_right(
    course: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ValueError, match=r"one of the gradebook's \(lab1\), got 'lab9'"):
        read_class(course, "lab9")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CourseError, match="is no course folder"):
        read_class(empty, "lab1")
    (empty / "nbgrader_config.py").write_text(CONFIG, "utf-8")
    with pytest.raises(FileNotFoundError, match=r"a folder with a gradebook\.db"):
        read_class(empty, "lab1")
    assert not (empty / "gradebook.db").exists()
    with (empty / "nbgrader_config.py").open("a") as config:
        config.write(f"c.CourseDirectory.db_url = 'sqlite:///{__file__}'\n")
    with pytest.raises(CourseError, match="the gradebook cannot be opened"):
        read_class(empty, "lab1")


def test_gradebook_and_folders_are_where_the_configuration_says(course: Path) -> None:
    before = read_class(course, "lab1")
    (course / "gradebook.db").rename(course / "elsewhere.sqlite")
    (course / "autograded").rename(course / "graded")
    with (course / "nbgrader_config.py").open("a") as config:
        config.write(f"c.CourseDirectory.db_url = 'sqlite:///{course / 'elsewhere.sqlite'}'\n")
        config.write("c.CourseDirectory.autograded_directory = 'graded'\n")
    assert read_class(course, "lab1") == before


def test_a_broken_notebook_costs_nobody_the_report(course: Path) -> None:
    for name, data in (("a", b"{"), ("b", b"[]"), ("c", b"\xff")):
        (course / "autograded" / "ada" / "lab1" / f"{name}.ipynb").write_bytes(data)
    assert read_class(course, "lab1").students[0].score == 4.5
