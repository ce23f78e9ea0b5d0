"""Every lab runs from top to bottom with its solutions: as a script, and as the built notebook."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from autograder.build import labs, source_notebook
from autograder.verdict import MIME, Verdict

ROOT = Path(__file__).parents[1]
LABS = [pytest.param(lab, id=lab.name) for lab in labs(ROOT)]
SMALL = {**os.environ, "FEWER_SMALL": "1", "MPLBACKEND": "Agg"}


@pytest.mark.parametrize("lab", LABS[:1])  # the notebooks below run the same cells of all labs
def test_the_script_runs_and_passes_its_own_checks(lab):
    run = subprocess.run(
        [sys.executable, lab.script], env=SMALL, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "✓" in run.stdout
    assert "✗" not in run.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lab", LABS)
def test_the_solution_notebook_runs_in_a_kernel_and_every_check_is_full(lab, monkeypatch, tmp_path):
    monkeypatch.setenv("FEWER_SMALL", "1")
    notebook = source_notebook(lab.script)
    # A cell that hangs is interrupted before pytest gives up, so that its traceback says where.
    NotebookClient(
        notebook,
        timeout=200,
        interrupt_on_timeout=True,
        resources={"metadata": {"path": tmp_path}},
    ).execute()
    verdicts = {
        cell.id: Verdict.from_json(output.data[MIME])
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if MIME in output.get("data", {})
    }
    grade_cells = [
        cell.id
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("grade")
    ]
    assert sorted(verdicts) == sorted(grade_cells)
    assert all(verdict.passed for verdict in verdicts.values())
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(figures) >= len(grade_cells) / 2  # a lab shows pictures


@pytest.mark.parametrize("lab", LABS)
def test_the_students_notebook_holds_no_line_of_a_solution(lab):
    student = nbformat.read(lab.notebook, as_version=4)
    stubs = {cell.id: cell.source for cell in student.cells}
    for cell in source_notebook(lab.script).cells:
        if not cell.metadata.get("nbgrader", {}).get("solution"):
            continue
        solution = (
            cell.source.split("BEGIN SOLUTION")[1].split("END SOLUTION")[0].splitlines()[1:-1]
        )
        for line in (line.strip() for line in solution):
            if len(line) > 12:  # shorter ones, such as `else:`, mean nothing
                assert line not in stubs[cell.id], f"{cell.id} shows {line!r}"
