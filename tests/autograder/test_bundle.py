"""The students' bundle: what is in it, what is not, and that one can work with it."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import fewer
from autograder import bundle as bundling
from autograder import cli
from autograder.bundle import BundleError, cut, student_wheel
from autograder.candidate import Local
from autograder.compare import expect_close
from autograder.exercise import Exercise, exercises
from autograder.judge import judge
from autograder.strategies import tensors
from autograder.verdict import Verdict

ROOT = Path(__file__).parents[2]
HIDDEN = {check.name: e.name for e in exercises().values() for check in e.checks if check.hidden}


@pytest.fixture(scope="session")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course of two labs: one with hidden checks, and the quickest to run."""
    folder = tmp_path_factory.mktemp("course")
    source = folder / "source" / "lab1_quantization"
    source.mkdir(parents=True)
    (source / "weights.csv").write_text("1,2\n")  # data that an instructor adds
    for lab in ("1", "5"):
        with contextlib.chdir(ROOT):
            done = CliRunner().invoke(cli.app, ["release", lab, "--course", str(folder)])
        assert done.exit_code == 0, done.output
        assert f"Hand out {folder}/bundles/lab{lab}_" in done.stdout
    return folder


def unpacked(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def opened(course: Path, lab: str) -> tuple[dict[str, bytes], str, dict[str, bytes]]:
    """The files of a bundle, the name of the wheel among them, and the wheel's own files."""
    files = unpacked((course / "bundles" / f"{lab}.zip").read_bytes())
    (wheel,) = (name for name in files if name.endswith(".whl"))
    return files, wheel, unpacked(files[wheel])


# --- the bundle ----------------------------------------------------------------------------------


def test_a_bundle_is_one_folder_with_lab_instructions_wheel_and_data(course: Path) -> None:
    files, wheel, _ = opened(course, "lab1_quantization")
    assert sorted(files) == sorted(
        f"lab1_quantization/{name}"
        for name in ("INSTRUCTIONS.md", "lab1_quantization.ipynb", "weights.csv", Path(wheel).name)
    )
    released = course / "release" / "lab1_quantization" / "lab1_quantization.ipynb"
    assert files["lab1_quantization/lab1_quantization.ipynb"] == released.read_bytes()


def test_the_instructions_are_about_this_lab(course: Path) -> None:
    files, wheel, _ = opened(course, "lab1_quantization")
    text = " ".join(files["lab1_quantization/INSTRUCTIONS.md"].decode().split())
    assert text.startswith("# Lab 1. Quantization of a tensor")
    assert f"pip install ./{Path(wheel).name}" in text
    assert "The lab is worth 79 points. 2 of them come from hidden checks" in text
    assert "fewer fetch" in text
    files, _, _ = opened(course, "lab5_sparse_training")
    other = files["lab5_sparse_training/INSTRUCTIONS.md"].decode()
    assert "hidden" not in other
    assert "fewer fetch" not in other
    assert not re.search(r"[{}]|\n\n\n", other)


def test_nothing_of_a_hidden_check_and_no_solution_is_in_a_bundle(course: Path) -> None:
    assert HIDDEN  # or this test says nothing
    files, _, wheel = opened(course, "lab1_quantization")
    shown = {path: data.decode(errors="replace") for path, data in (files | wheel).items()}
    sources = [path.read_text("utf-8") for path in (ROOT / "autograder" / "checks").glob("*.py")]
    told = "\n".join(sources)
    for name in HIDDEN:
        body = told.split(f"def {name}(")[1].split("\n\n\n")[0].splitlines()[1:]
        own = [line.strip() for line in body if told.count(line.strip()) == 1]
        assert len(own) >= 3
        for part in (name, *own):
            assert part in told
            assert [path for path, text in shown.items() if part in text] == []
    for lab, labs in (("lab1_quantization", 1), ("lab5_sparse_training", 2)):  # as released
        _, _, wheel = opened(course, lab)
        scripts = [data.decode() for path, data in wheel.items() if "/solutions/" in path]
        assert [script.count("\n") for script in scripts] == [2] * labs  # the titles alone


def test_what_only_instructors_need_is_not_in_the_wheel(course: Path) -> None:
    _, _, wheel = opened(course, "lab1_quantization")
    theirs = ("bundle", "course", "demo", "export", "gradebook", "grading", "intake", "killtable")
    assert not {f"autograder/{name}.py" for name in theirs} & wheel.keys()
    assert {"autograder/judge.py", "autograder/child.py"} <= wheel.keys()


def test_record_holds_the_hash_and_size_of_every_file(course: Path) -> None:
    _, _, wheel = opened(course, "lab1_quantization")
    (record,) = (path for path in wheel if path.endswith("/RECORD"))
    rows = list(csv.reader(io.StringIO(wheel[record].decode())))
    assert [path for path, _, _ in rows] == list(wheel)
    assert rows.pop() == [record, "", ""]
    for path, digest, size in rows:
        kind, value = digest.split("=")
        padded = value + "=" * (-len(value) % 4)
        assert base64.urlsafe_b64decode(padded) == hashlib.new(kind, wheel[path]).digest()
        assert int(size) == len(wheel[path])


def test_the_same_sources_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    name, data = student_wheel(ROOT, {})
    code = (
        "import hashlib, pathlib, sys; from autograder.bundle import student_wheel; "
        "name, data = student_wheel(pathlib.Path(sys.argv[1]), {}); "
        "print(name, hashlib.sha256(data).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, ROOT],
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.split() == [name, hashlib.sha256(data).hexdigest()]


def test_other_content_has_another_version_and_all_are_the_students(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("All yours.")
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (tmp_path / "pyproject.toml").write_text(project.replace('"gguf>=0.17"', '"gguf>=0.18"'))
    one, other = student_wheel(ROOT, {}), student_wheel(tmp_path, {})
    pattern = rf"fewer-{re.escape(fewer.__version__)}\+students\.c[0-9a-f]{{8}}-py3-none-any\.whl"
    assert re.fullmatch(pattern, one[0])
    assert re.fullmatch(pattern, other[0])
    assert one[0] != other[0]
    assert b"gguf>=0.18" in b"".join(unpacked(other[1]).values())
    version = one[0].split("-")[1]
    assert f'__version__ = "{version}"\n' in unpacked(one[1])["fewer/__init__.py"].decode()


INSTALLED = """
import contextlib, io, json, sys
from pathlib import Path

import nbformat

import autograder, fewer
from autograder import check, exercises
from autograder.cli import app
from fewer.quantization import sqnr
from typer.testing import CliRunner

site = Path(sys.prefix).resolve()
assert site in Path(autograder.__file__).resolve().parents, autograder.__file__
assert site in Path(fewer.__file__).resolve().parents, fewer.__file__


def run(path):
    said, scope = io.StringIO(), {"__name__": "__main__"}
    with contextlib.redirect_stdout(said):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, cell.id, "exec"), scope)
    return said.getvalue()


scope = {}
exec("from autograder import check\\nimport math\\ndef sqnr(x, x_hat):\\n"
     "    x, e = x.double(), x.double() - x_hat.double()\\n"
     "    return 20 * math.log10(x.square().sum() / e.square().sum())\\n", scope)
with contextlib.redirect_stdout(io.StringIO()):
    right, wrong = check(sqnr), check(scope["sqnr"])
found = exercises()
print(json.dumps({
    "labs": CliRunner().invoke(app, ["labs"]).stdout,
    "version": fewer.__version__,
    "points": {name: exercise.points for name, exercise in found.items()},
    "hidden": {name: e.hidden_points for name, e in found.items() if e.hidden_points},
    "right": [right.points, right.possible, str(right)],
    "wrong": [wrong.points, str(wrong)],
    "lab": run(sys.argv[1]),
}))
"""


def test_a_student_installs_the_wheel_and_works_through_a_lab(course: Path, tmp_path: Path) -> None:
    files, wheel, _ = opened(course, "lab5_sparse_training")
    for name, data in files.items():
        (tmp_path / Path(name).name).write_bytes(data)
    solved = nbformat.reads(files["lab5_sparse_training/lab5_sparse_training.ipynb"].decode(), 4)
    source = course / "source" / "lab5_sparse_training" / "lab5_sparse_training.ipynb"
    answers = {
        cell.metadata.nbgrader.grade_id: cell.source
        for cell in nbformat.read(source, as_version=4).cells
        if cell.metadata.get("nbgrader", {}).get("solution")
    }
    for cell in solved.cells:
        about = cell.metadata.get("nbgrader", {})
        cell.source = answers[about["grade_id"]] if about.get("solution") else cell.source
    nbformat.write(solved, tmp_path / "solved.ipynb")

    # A fresh environment that borrows the large packages of this one, but not the course: what a
    # .pth adds comes after its own site-packages, and a .pth in there does not count.
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrowed = "\n".join(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (home / "lib" / version / "site-packages" / "borrowed.pth").write_text(borrowed)
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    install = ["install", "--no-deps", "--no-index", "--quiet", tmp_path / Path(wheel).name]
    subprocess.run([*pip, *install], check=True)

    def in_there(*command: Any) -> str:
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "FEWER_SMALL": "1", "MPLBACKEND": "Agg", "PYTHONPATH": ""}
            | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    seen = json.loads(in_there(python, "-c", INSTALLED, "solved.ipynb").splitlines()[-1])
    assert seen["version"] == Path(wheel).name.split("-")[1]
    here = exercises()
    assert seen["points"] == {name: exercise.points for name, exercise in here.items()}
    hidden = {name: [c for c in e.checks if c.hidden] for name, e in here.items()}
    assert seen["hidden"] == {n: sum(c.points for c in cs) for n, cs in hidden.items() if cs}
    assert seen["right"][:2] == [7, 7]
    assert "and 1 point from hidden checks, seen at grading" in seen["right"][2]
    assert seen["wrong"][0] < 7
    assert "You take 20 log10 of a ratio of energies" in " ".join(
        line.strip("│ ") for line in seen["wrong"][1].splitlines()
    )
    assert seen["lab"].count("✓") > 30
    assert "✗" not in seen["lab"]
    left = b"".join(
        p.read_bytes() for p in (home / "lib" / version / "site-packages").rglob("*.py")
    )
    assert not [name for name in HIDDEN if name.encode() in left]
    assert re.search(r"1 +Quantization of a tensor +8 +105 +79", seen["labs"])
    shown = in_there(home / "bin/fewer", "--help")
    assert "check" in shown
    assert "Instructors" not in shown


# --- cutting -------------------------------------------------------------------------------------

PIECES = {
    "import torch\n": None,
    "# about the section\n\nx = 1  # a remark\n": None,
    '@e.check(points=2, hint="no")\ndef seen(candidate):\n    """It is."""\n\n    # why\n': None,
    "# why it is here\n@e.check(points=3, hidden=True, hint='h')\n"
    "def unseen(candidate):\n    '''It is.\n\nby all means.'''\n    pass\n": (
        "e.hidden_points += 3  # here stood a check, seen at grading\n"
    ),
    "@e.check(points=1, hidden=False, hint='h')\ndef open(c):\n    '''No.'''  # é\n": None,
}


@given(st.lists(st.sampled_from(list(PIECES))))
def test_cutting_takes_out_hidden_checks_and_leaves_every_other_byte(pieces: list[str]) -> None:
    source = "\n\n".join(pieces)
    kept = "\n\n".join(piece if PIECES[piece] is None else str(PIECES[piece]) for piece in pieces)
    assert cut(source, bundling._hidden_check) == kept


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("@e.check(points=1, hidden=SECRET)\ndef f(c): pass", "write hidden=True or hidden=False"),
        ("@e.check(points=1, hidden=True)\n@g.check(points=1)\ndef f(c): pass", "no other decor"),
    ],
)
def test_what_cannot_be_cut_for_sure_is_an_error(source: str, why: str) -> None:
    with pytest.raises(BundleError, match=why):
        cut(source, bundling._hidden_check)


def test_a_trace_of_a_hidden_check_stops_the_bundle() -> None:
    name = next(iter(HIDDEN))
    with pytest.raises(BundleError, match=f"a.py would tell students of {name}"):
        bundling._keeps_secrets({"a.py": f"# as in {name}".encode()})
    bundling._keeps_secrets({"a.py": f"{name}_too = 1".encode()})


# --- hidden checks in grading --------------------------------------------------------------------


def halve(x: Any) -> Any:
    """Half of x."""
    return x / 2


def exercise(hidden: bool) -> Exercise:
    made = Exercise(halve, paper="none", difficulty=1, minutes=1)

    @made.check(points=3, hidden=hidden, hint="Is the sign kept?", x=tensors())
    def twice_the_half_is_the_whole(candidate: Callable[..., Any], x: Any) -> None:
        """Adding the result to itself gives the input back."""
        expect_close(candidate(x) + candidate(x), x, what="half + half")

    return made


def test_a_hidden_check_counts_and_its_feedback_shows_all_but_its_code() -> None:
    made = exercise(hidden=True)
    assert made.points == 3
    verdict = judge(made, Local(lambda x: x.abs() / 2))
    assert (verdict.points, verdict.possible) == (0, 3)
    assert Verdict.from_json(verdict.to_json()) == verdict
    for shown in (str(verdict), verdict.html()):
        shown = " ".join(re.sub(r"<[^>]*>|│", " ", shown).split())
        for part in ("(hidden check)", "gives the input back", "half + half", "Is the sign kept?"):
            assert part in shown
        assert "halve(tensor(" in shown
        assert "expect_close" not in shown
    plain = judge(exercise(hidden=False), Local(lambda x: x.abs() / 2))
    assert "hidden" not in str(plain) + plain.html()


def test_points_that_are_not_here_are_told_and_belong_to_the_exercise() -> None:
    made = exercise(hidden=False)
    made.hidden_points += 2
    assert made.points == 5
    verdict = judge(made, Local(halve))
    assert (verdict.points, verdict.possible, verdict.passed) == (3, 3, True)
    for shown in (str(verdict), verdict.html()):
        assert "and 2 points from hidden checks, seen at grading" in shown


def test_an_argument_of_a_check_cannot_be_called_hidden() -> None:
    made = Exercise(halve, paper="none", difficulty=1, minutes=1)
    with pytest.raises(TypeError, match="hidden must be True or False, got integers"):
        made.check(points=1, hint="", hidden=st.integers())  # type: ignore[arg-type]
