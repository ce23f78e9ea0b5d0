"""A course with one small lab of two exercises and a written question, and who hands in what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbgrader import api
from nbgrader.api import Gradebook
from sqlalchemy import select

from autograder.build import source_notebook
from autograder.course import create_course, release
from autograder.exercise import exercises

LAB = "lab7_small"
FIRST, SECOND = "quantize_symmetric", "quantize_asymmetric"
SCRIPT = f"""\
# %% [markdown]
# # Lab 7. Small

# %%
from autograder import check

# %% tags=["exercise"]
from fewer.quantization import {FIRST}

# %% tags=["check"]
check({FIRST})

# %% tags=["demo"]
raise RuntimeError("demo cells are not for grading")

# %% tags=["exercise"]
from fewer.quantization import {SECOND}

# %% tags=["check"]
check({SECOND})

# %% [markdown] tags=["written"] id="why" points=4
# **Question.** Why?
#
# **Answer.** The model answer.
#
# **Rubric.** 4 points for it.
"""
COLUMNS = ("name", "auto_score", "manual_score", "extra_credit", "score", "needs_manual_grade")
MAX = {name: exercises()[name].points for name in (FIRST, SECOND)}
BOTH = MAX[FIRST] + MAX[SECOND]


def write_root(root: Path) -> Path:
    """A folder with the sources of the lab."""
    (root / "solutions").mkdir()
    (root / "solutions" / f"{LAB}.py").write_text(SCRIPT)
    return root


def make_course(course: Path, root: Path) -> tuple[Any, Any]:
    """A course in which the lab is released; the released notebook and the one with solutions."""
    assert create_course(course, root, [7]) == [LAB]
    released = nbformat.read(release(course, LAB), as_version=4)
    return released, source_notebook(root / "solutions" / f"{LAB}.py")


def cell_of(notebook: Any, grade_id: str) -> Any:
    return next(
        cell
        for cell in notebook.cells
        if cell.metadata.get("nbgrader", {}).get("grade_id") == grade_id
    )


def solved(released: Any, source: Any, *names: str) -> Any:
    """The released notebook with the reference's solution of some exercises typed in."""
    notebook = nbformat.from_dict(released)
    for name in names:
        cell_of(notebook, name).source = cell_of(source, name).source
    return notebook


def hand_in(
    course: Path, student: str, notebook: Any, timestamp: str = "2030-01-01 12:00:00 UTC"
) -> Path:
    folder = course / "submitted" / student / LAB
    folder.mkdir(parents=True)
    (folder / "timestamp.txt").write_text(timestamp)
    if notebook is not None:
        nbformat.write(notebook, folder / f"{LAB}.ipynb")
    return folder


def contents(url: str) -> dict[str, Any]:
    """All that a gradebook says about students, without the random ids of its rows."""
    found: dict[str, Any] = {}
    with Gradebook(url) as book:
        for student in book.db.scalars(select(api.Student)):
            found[student.id] = {}
            for submission in student.submissions:
                for nb in submission.notebooks:
                    found[student.id][submission.assignment.name, nb.name] = {
                        "timestamp": submission.timestamp,
                        "penalty": nb.late_submission_penalty,
                        "grades": sorted(
                            (
                                g.name,
                                g.auto_score,
                                g.manual_score,
                                g.extra_credit,
                                g.score,
                                g.needs_manual_grade,
                            )
                            for g in nb.grades
                        ),
                        "comments": sorted(
                            (c.name, c.auto_comment, c.manual_comment) for c in nb.comments
                        ),
                    }
    return found
