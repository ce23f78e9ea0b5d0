"""The step that judges a submission inside nbgrader's pipeline, in place of executing the notebook.

nbgrader reads the points of a grade cell from its output: a number as the result of the cell. Here
that output is a verdict, reached without running anything in this process. All that follows in the
pipeline (gradebook, late penalty, formgrader, feedback, export) is nbgrader's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from nbgrader.api import Gradebook
from nbgrader.preprocessors import NbGraderPreprocessor
from nbgrader.utils import is_grade, is_solution

import fewer
from autograder.build import nbgrader_metadata
from autograder.verdict import MIME, Verdict

Judge = Callable[[NotebookNode], dict[str, Verdict]]


class GraderFault(Exception):
    """The course, not the student, is to blame: no grade is given until that is mended."""


class OraclePreprocessor(NbGraderPreprocessor):
    """Writes each grade cell's verdict as its output: points, card, and data.

    The version of the course and the seed go to the notebook's metadata, under ``fewer``: with the
    submission they determine the grade.

    Args:
        judge: verdicts of a notebook by exercise, such as `submission.judge_notebook` with its
            other arguments bound. Whatever the student did, it answers with verdicts; what it
            raises is the grader's own fault and stops the grading of this submission.
        seed: the seed ``judge`` uses.
        walled: whether student code runs in a sandbox; recorded with the grade.
    """

    def __init__(self, judge: Judge, seed: int, walled: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.judge = judge
        self.seed = seed
        self.walled = walled

    def preprocess(
        self, nb: NotebookNode, resources: dict[str, Any]
    ) -> tuple[NotebookNode, dict[str, Any]]:
        _restore_grade_cells(nb, resources)
        verdicts = self.judge(nb)
        for cell in nb.cells:
            # A grade cell that is a solution too is a written question: a person grades it.
            if is_grade(cell) and not is_solution(cell):
                cell.outputs = [_output(cell, verdicts)]
        nb.metadata["fewer"] = {
            "version": fewer.__version__,
            "seed": self.seed,
            "sandbox": self.walled,
        }
        return nb, resources


def _output(cell: NotebookNode, verdicts: dict[str, Verdict]) -> NotebookNode:
    grade_id = cell.metadata.nbgrader["grade_id"]
    verdict = verdicts.get(grade_id.removeprefix("check_"))
    if verdict is None or not verdict.results:
        raise GraderFault(f"nothing judges the cell {grade_id!r}: this course has no such exercise")
    if verdict.possible != cell.metadata.nbgrader["points"]:
        raise GraderFault(
            f"{verdict.exercise} was released with {cell.metadata.nbgrader['points']:g} points, "
            f"but this version of the course ({fewer.__version__}) gives {verdict.possible}"
        )
    data = {"text/plain": str(verdict.points), "text/html": verdict.html(), MIME: verdict.to_json()}
    return new_output("execute_result", data=data)


def _restore_grade_cells(nb: NotebookNode, resources: dict[str, Any]) -> None:
    """Put back, at the end, the check cells that the student deleted.

    Deleting a check must not cost the points of a right solution. nbgrader can do this too
    (OverwriteCells.add_missing_cells), but fails where the cell before is gone as well.
    """
    where = resources["nbgrader"]
    there = {cell.metadata.get("nbgrader", {}).get("grade_id") for cell in nb.cells}
    with Gradebook(where["db_url"]) as gradebook:
        notebook = gradebook.find_notebook(where["notebook"], where["assignment"])
        sources = {cell.name: cell.source for cell in notebook.source_cells}
        written = {cell.name for cell in notebook.solution_cells}
        for grade_cell in sorted(notebook.grade_cells, key=lambda cell: cell.name):
            name = grade_cell.name
            if name not in there and name not in written:
                about = nbgrader_metadata(
                    name, grade=True, locked=True, points=grade_cell.max_score
                )
                nb.cells.append(new_code_cell(sources[name], id=name[:64], metadata=about))
                if (nb.nbformat, nb.nbformat_minor) < (4, 5):  # cells had no id then
                    del nb.cells[-1]["id"]
