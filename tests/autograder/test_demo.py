"""The sample class, graded for real: the twelve get exactly the points they deserve, every time."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import autograder.checks.quantization  # the demo's lab
import autograder.demo
from autograder import sandbox
from autograder.candidate import Local
from autograder.cli import app
from autograder.demo import SampleStudent, as_cell, expected_points, run_demo, the_twelve
from autograder.exercise import Exercise, exercises, find
from autograder.grading import grade, scores
from autograder.judge import judge
from autograder.report import read_class, verdicts
from autograder.verdict import Verdict
from fewer.quantization import quantize_symmetric

ROOT = Path(__file__).parents[2]
LAB = "lab1_quantization"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a busy machine may take its time
    pytest.mark.xdist_group("demo"),
]


class Demo:
    """A demo that ran, what it said, and the class it made."""

    def __init__(self, folder: Path) -> None:
        root = folder / "root"  # a copy: a test must not write into the checkout
        shutil.copytree(ROOT / "solutions", root / "solutions")
        self.course = folder / "course"
        said = io.StringIO()
        self.report = run_demo(self.course, root, Console(file=said, width=160))
        self.said = said.getvalue()
        source = self.course / "source" / LAB / f"{LAB}.ipynb"
        self.students = the_twelve(nbformat.read(source, as_version=4))
        self.exercises = [find(name) for name in self.verdicts("ada")]

    def verdicts(self, student: str) -> dict[str, Verdict]:
        path = self.course / "autograded" / student / LAB / f"{LAB}.ipynb"
        return verdicts(nbformat.read(path, as_version=4))

    def submission(self, student: str) -> Path:
        return self.course / "submitted" / student / LAB / f"{LAB}.ipynb"

    def all_verdicts(self) -> dict[str, dict[str, Any]]:
        return {
            s.id: {name: v.to_json() for name, v in self.verdicts(s.id).items()}
            for s in self.students
        }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    # About 50 seconds of CPU: the real thing, once for all tests below.
    return Demo(tmp_path_factory.mktemp("demo"))


def test_the_twelve_get_exactly_the_points_they_deserve(demo: Demo) -> None:
    booked = {score.student: score for score in scores(demo.course, LAB)}
    for student in demo.students:
        deserved = expected_points(student, demo.exercises)
        assert {n: v.points for n, v in demo.verdicts(student.id).items()} == deserved, student.id
        assert booked[student.id].points == sum(deserved.values()), student.id
    assert len(booked) == 12
    assert demo.said.count("✓") >= 12
    assert "✗" not in demo.said


def test_what_the_twelve_deserve_is_what_their_stories_say(demo: Demo) -> None:
    full = sum(e.points for e in demo.exercises)
    total = {s.id: sum(expected_points(s, demo.exercises).values()) for s in demo.students}
    worth = {e.name: e.points for e in demo.exercises}
    half = demo.exercises[: len(demo.exercises) // 2]
    assert total["ada"] == total["ben"] == total["lena"] == full
    for mistaken in ("chika", "dario", "elif", "farid"):
        assert full - max(worth.values()) <= total[mistaken] < full
    assert total["grace"] == sum(e.points for e in half)
    assert total["hana"] == 0
    for lost in ("ines", "jonas", "kofi"):  # syntax error, crash, endless loop
        missing = [
            n for n, p in expected_points(by_id(demo, lost), demo.exercises).items() if not p
        ]
        assert len(missing) == 1
        assert total[lost] == full - worth[missing[0]]


def by_id(demo: Demo, student: str) -> SampleStudent:
    return next(s for s in demo.students if s.id == student)


def test_each_of_four_misconceptions_is_recognised_and_read(demo: Demo) -> None:
    report = read_class(demo.course, LAB)
    found = {m.students[0].id: m for m in report.mistakes}
    assert sorted(found) == ["chika", "dario", "elif", "farid"]
    assert len({m.exercise for m in found.values()}) == 4
    for student, mistake in found.items():
        known = {m.name: m.says for m in find(mistake.exercise).misconceptions}
        assert mistake.says == known[mistake.misconception]
        wrong = [v for v in demo.verdicts(student).values() if not v.passed]
        assert [v.exercise for v in wrong] == [mistake.exercise]
        assert wrong[0].first_failure is not None
        assert wrong[0].first_failure.diagnosis == mistake.says


def test_grading_again_gives_the_same_verdicts(demo: Demo) -> None:
    before = demo.all_verdicts()
    shutil.rmtree(demo.course / "autograded")
    summary = grade(demo.course, LAB, walled=not sandbox.missing())
    assert not summary.failed
    assert demo.all_verdicts() == before


def test_the_report_names_everyone_and_is_linked_from_what_the_demo_says(demo: Demo) -> None:
    page = demo.report.read_text("utf-8")
    for student in demo.students:
        assert f"{student.first} {student.last}" in page
    assert str(demo.report) in demo.said
    feedback = demo.course / "feedback" / "chika" / LAB / f"{LAB}.html"
    assert str(feedback) in demo.said
    assert feedback.is_file()


def test_a_student_who_checks_at_home_sees_what_grading_will_find(demo: Demo) -> None:
    perfect = CliRunner().invoke(app, ["check", str(demo.submission("ada"))])
    assert perfect.exit_code == 0
    full = sum(e.points for e in demo.exercises)
    assert f"{full}/{full}" in perfect.output
    mistaken = CliRunner().invoke(app, ["check", str(demo.submission("dario"))])
    assert mistaken.exit_code == 1
    got = sum(v.points for v in demo.verdicts("dario").values())
    assert f"{got}/{full}" in mistaken.output
    wrong = next(v for v in demo.verdicts("dario").values() if not v.passed)
    assert wrong.first_failure is not None
    assert wrong.first_failure.diagnosis.split(".")[0].split()[0] in mistaken.output


def test_a_demo_never_clears_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    with pytest.raises(FileExistsError, match="must be new or empty"):
        run_demo(tmp_path, ROOT, Console(file=io.StringIO()))
    with pytest.raises(FileExistsError, match="must be new or empty"):
        run_demo(thesis, ROOT, Console(file=io.StringIO()))
    assert thesis.read_text() == "years of work"


def chosen(kind: str) -> list[tuple[Exercise, Callable[..., Any]]]:
    """For each exercise, what the sample class hands in as loops, or could as a misconception."""
    found = [e for e in vars(autograder.checks.quantization).values() if isinstance(e, Exercise)]
    if kind == "loops":
        return [(e, autograder.demo._loops(e)) for e in found]
    return [(e, e.misconceptions[0].function) for e in found if e.misconceptions]


@pytest.mark.parametrize("kind", ["loops", "misconceptions"])
def test_a_function_written_into_a_cell_does_what_it_did_in_the_checks(kind: str) -> None:
    for exercise, function in chosen(kind):
        cell: dict[str, Any] = {}
        exec(compile(as_cell(exercise, function), "<cell>", "exec", dont_inherit=True), cell)
        assert not (cell.keys() & exercises().keys()) - {exercise.name}
        typed = judge(exercise, Local(cell[exercise.name]), explain=False)
        assert typed == judge(exercise, Local(function), explain=False)


def test_a_variant_that_calls_the_reference_becomes_a_cell_that_ends() -> None:
    exercise = find("quantize_symmetric")

    def doubles_the_scale(x, bits=8, dim=None, clip=None):  # type: ignore[no-untyped-def]
        codes, scale = quantize_symmetric(x, bits, dim, clip)
        return codes, scale * 2

    scope: dict[str, Any] = {}
    exec(as_cell(exercise, doubles_the_scale), scope)
    codes, scale = scope["quantize_symmetric"](torch.tensor([1.0, -7.0]), bits=4)
    assert codes.tolist() == [1, -7]
    assert scale.item() == 2.0
