"""Notebooks as they really come, and what of them is to be graded.

Students delete, copy, move and edit cells, graded ones too. Editors and learning platforms drop
metadata, rename files and convert formats. Some hand in a PDF, and some would like to see how many
points a cell may claim. `pick` finds the file among those in a folder, `read` reads it, and
`restore` makes of its bytes the notebook as it must be graded. What a notebook says about points,
ids and locks is never believed: that comes from `released`, which reads it from the gradebook.

Whatever a student wrote, the answer is a notebook or `Unusable` with one sentence. Restored
notebooks are of nbformat 4.5 with nbgrader's metadata (schema 3), as nbgrader's own sanitizing
would leave them, and always the same for the same bytes. Their cells hold source, attached images,
nbgrader's metadata and the tag ``demo``, and nothing else of what the student sent: no outputs.

Which cell counts:

- A *solution* is the cell with its id, or, where editors dropped the ids, the cell that defines the
  function that the exercise is called. Of several, as in Python, the last above the check counts,
  but one that was worked on before one that was not. All others are ordinary cells, and run.
- A *check* is put back as it was released, wherever it stands. If nothing above it defines its
  function, but something below does, it is moved there. A deleted one comes back.
- A *written answer* is the cell with its id, or the text below its question; of several, the last
  that was worked on. A deleted one comes back empty.
- What has an id is run, whatever its tags say.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook, MissingEntry

from autograder.handin import Picked, pick, read, strange_id
from autograder.ipynb import CLEAR, Cell, Unusable, read_cells, same, some
from autograder.verdict import GRADE_ID

__all__ = [
    "Picked",
    "Released",
    "ReleasedCell",
    "Restored",
    "Unusable",
    "pick",
    "read",
    "released",
    "restore",
    "strange_id",
]


@dataclass(frozen=True)
class ReleasedCell:
    """A cell that nbgrader knows by its ``name``, the grade_id, as it was released.

    Attributes:
        points: None where nothing is graded.
        above: source of the cell right above, as `same` has it; '' if that is not known.
    """

    name: str
    cell_type: str
    source: str
    locked: bool
    points: float | None
    grade: bool
    solution: bool
    task: bool
    checksum: str | None
    above: str = ""

    @property
    def is_code_solution(self) -> bool:
        return self.solution and self.cell_type == "code"

    @cached_property
    def same(self) -> str:
        return same(self.source)


@dataclass(frozen=True)
class Released:
    """What was released of a notebook.

    Attributes:
        cells: those that nbgrader knows, in the notebook's order.
        demos: sources of the code cells tagged ``demo``, as `same` has them, if that is known.
        plain: sources of all cells that nbgrader does not know, likewise.
    """

    name: str
    kernelspec: dict[str, Any] | None
    cells: tuple[ReleasedCell, ...]
    demos: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()


@dataclass
class Restored:
    """A notebook to be graded, and what the instructor should know about how it came."""

    notebook: NotebookNode
    notices: list[str] = field(default_factory=list)


def released(
    gradebook: Gradebook, assignment: str, folder: Path | None = None
) -> dict[str, Released]:
    """What was released of an assignment, by the notebook's name; nothing if it never was.

    Args:
        folder: of the released notebooks. The gradebook knows neither tags nor the cells that are
            not nbgrader's. Nor does it know the order of cells: nbgrader reads them without ORDER
            BY, and a second release changes the rows of the first. All that comes from the notebook
            in this folder; without it, the order is the gradebook's.
    """
    try:
        notebooks = gradebook.find_assignment(assignment).notebooks
    except MissingEntry:
        return {}
    return {notebook.name: _released(notebook, folder) for notebook in notebooks}


def _released(notebook: Any, folder: Path | None) -> Released:
    grades = {cell.name: cell.max_score for cell in notebook.grade_cells}
    tasks = {cell.name: cell.max_score for cell in notebook.task_cells}
    solutions = {cell.name for cell in notebook.solution_cells}
    known = {
        cell.name: ReleasedCell(
            name=cell.name,
            cell_type=cell.cell_type,
            source=cell.source or "",
            locked=bool(cell.locked),
            points=(grades | tasks).get(cell.name),
            grade=cell.name in grades,
            solution=cell.name in solutions,
            task=cell.name in tasks,
            checksum=cell.checksum,
        )
        for cell in notebook.source_cells
    }
    kernelspec = json.loads(notebook.kernelspec or "null") or None
    try:
        path = folder / f"{notebook.name}.ipynb" if folder else None
        cells = read_cells(read(path), path.name, []) if path else []
    except Unusable:
        cells = []
    ordered: dict[str, ReleasedCell] = {}
    plain: list[Cell] = []
    above = ""
    for cell in cells:
        name = str(cell.nbgrader.get("grade_id"))
        if name in known:
            ordered[name] = replace(known[name], above=above)
        else:
            plain.append(cell)
        above = cell.same
    return Released(
        name=notebook.name,
        kernelspec=kernelspec,
        cells=tuple((ordered | {k: v for k, v in known.items() if k not in ordered}).values()),
        demos=tuple(sorted({cell.same for cell in plain if cell.demo})),
        plain=tuple(sorted({cell.same for cell in plain})),
    )


@dataclass(eq=False)
class _Cell(Cell):
    """A cell of a student.

    Attributes:
        claim: which released cell it says that it is; '' for none.
        cell: which released cell it is found to be.
    """

    claim: str = ""
    cell: ReleasedCell | None = None


@dataclass
class _Work:
    """A notebook in the making: its cells, what was released by name, and what has been found."""

    cells: list[_Cell]
    about: dict[str, ReleasedCell]
    notices: list[str]
    found: dict[str, _Cell] = field(default_factory=dict)

    def say(self, sentence: str, names: Collection[str]) -> None:
        """Add a notice about some cells, if there are any."""
        if names:
            self.notices.append(sentence.format(some(names)))


def restore(data: bytes, released: Released) -> Restored:
    """The notebook as it must be graded, from the bytes of a file.

    Raises:
        Unusable: this is no notebook; nothing else is raised, whatever the bytes are.
    """
    notices: list[str] = []
    name = f"{released.name}.ipynb"
    try:
        cells = [_Cell(**vars(cell)) for cell in read_cells(data, name, notices)]
        work = _Work(cells, {cell.name: cell for cell in released.cells}, notices)
        _read_claims(work)
        _find_demos(work, released.demos)
        _find_locked(work)
        _find_written(work, released.plain)
        _find_solutions(work)
        _move_checks(work)
        _put_back(work)
        return Restored(_notebook(cells, released), notices)
    except MemoryError:
        raise Unusable(f"{name} does not fit into memory: {CLEAR}") from None


def _read_claims(work: _Work) -> None:
    """Which released cell each cell says that it is."""
    by_id = {name[:64]: name for name in work.about}  # labs are built so
    strangers, raised = [], []
    for cell in work.cells:
        said, points = cell.nbgrader.get("grade_id"), cell.nbgrader.get("points")
        cell.claim = by_id.get(cell.id, "")
        if isinstance(said, str) and said in work.about:
            cell.claim = said
            if points is not None and points != (work.about[said].points or 0):
                raised.append(said)
        elif any(cell.nbgrader.get(role) for role in ("grade", "solution", "task")):
            strangers.append(said if isinstance(said, str) else "nothing")
    work.say("Never released, and so not graded: the cells that call themselves {}.", strangers)
    work.say("The points of {} had been changed and were put right.", raised)


def _find_demos(work: _Work, demos: Collection[str]) -> None:
    """Find the cells that are for people, though their tag was lost."""
    for cell in work.cells:
        if cell.kind == "code" and cell.same in demos:
            cell.demo = True


def _find_locked(work: _Work) -> None:
    """Find the cells whose source no student may change, and put it back."""
    changed, with_code = [], []
    for name, cell in work.about.items():
        if not cell.locked:
            continue
        claimants = [c for c in work.cells if c.claim == name]
        alike = [c for c in work.cells if c.same == cell.same and c.kind == cell.cell_type]
        choice = [c for c in alike if c.claim == name] or [c for c in alike if not c.claim]
        if not (choice := choice or claimants):
            continue
        chosen = choice[-1]
        if chosen.same != cell.same:
            changed.append(name)
            if chosen.defines & work.about.keys():  # the solution was written into the check
                with_code.append(name)
                work.cells.insert(work.cells.index(chosen), _Cell("code", chosen.source))
        chosen.cell = cell
        work.found[name] = chosen
    work.say("Locked cells had been changed and were put right: {}.", changed)
    work.say("As they defined functions, what stood in them was run above: {}.", with_code)


def _find_written(work: _Work, plain: Collection[str]) -> None:
    """Find the written answers."""
    several, guessed, elsewhere = [], [], []
    for name, cell in work.about.items():
        if cell.locked or cell.is_code_solution:
            continue
        claimants = [c for c in work.cells if c.claim == name and c.cell is None]
        if len(claimants) > 1:
            several.append(name)
        question = [i for i, c in enumerate(work.cells) if cell.above and c.same == cell.above]
        if question and not claimants:
            below = work.cells[question[-1] + 1 : question[-1] + 2]
            claimants = [c for c in below if not (c.claim or c.cell or c.same in plain)]
            guessed += [name for c in claimants if c.same != cell.same]
        worked_on = [c for c in claimants if c.same != cell.same]
        if cell.above and not question and not worked_on:
            elsewhere.append(name)
        if choice := worked_on or claimants:
            choice[-1].cell = cell
            work.found[name] = choice[-1]
    work.say("There more than once: {}. The last that was worked on counts.", several)
    work.say("Taken for the answer, for it stands below its question: {}.", guessed)
    work.say(
        "No answer to {}, but its question was changed: perhaps it is there.",
        elsewhere if work.found else (),
    )


def _find_solutions(work: _Work) -> None:
    """Find, for each exercise, the cell that counts."""
    of: dict[str, list[_Cell]] = defaultdict(list)
    place = {}
    for i, cell in enumerate(work.cells):
        place[cell] = i
        for name in {cell.claim} | cell.defines if cell.cell is None else ():
            of[name].append(cell)
    several, lost = [], []
    for name, solution in work.about.items():
        if not solution.is_code_solution:
            continue
        ranked: dict[int, list[_Cell]] = defaultdict(list)
        for cell in of[name]:
            ranked[_rank(cell, solution, work.about)].append(cell)
        if not ranked:
            lost.append(name)
            continue
        best = ranked[min(ranked)]
        check = work.found.get(GRADE_ID + name)
        above = [c for c in best if check is None or place[c] < place[check]]
        chosen = work.found[name] = (above or best)[-1]
        if min(ranked) != ANOTHERS and chosen.cell is None:
            chosen.cell = solution
        if min(ranked) < ANOTHERS and len(best) > 1:
            several.append(name)
        for cell in ranked[UNTOUCHED]:
            if cell is not chosen:  # run below the work, it would hide it
                cell.demo = True
    work.say("There more than once: {}. As in Python, the last above the check counts.", several)
    work.say("No cell has or defines {}.", lost if work.found else ())


ANOTHERS, UNTOUCHED = 3, 4


def _rank(cell: _Cell, solution: ReleasedCell, about: dict[str, ReleasedCell]) -> int:
    """How likely a cell is somebody's work on an exercise; 0 is likeliest."""
    if cell.same == solution.same:
        return UNTOUCHED
    if cell.claim == solution.name:
        return 0 if solution.name in cell.defines else 2
    other = cell.claim in cell.defines and cell.claim in about
    return ANOTHERS if other else 1


def _move_checks(work: _Work) -> None:
    """Where an exercise is solved only below its check, put the check below the solution."""
    moved = []
    for name in work.about:
        check, solution = work.found.get(GRADE_ID + name), work.found.get(name)
        if check and solution and work.cells.index(check) < work.cells.index(solution):
            work.cells.remove(check)
            work.cells.insert(work.cells.index(solution) + 1, check)
            moved.append(name)
    work.say("The check stood above the solution and was moved below it: {}.", moved)


def _put_back(work: _Work) -> None:
    """Put back what was deleted: a check below its solution, all else where it was released.

    Deleted solutions stay deleted: a stub could hide what a student wrote elsewhere.
    """
    missing = []
    before: list[str] = []
    another = not work.found
    for name, cell in work.about.items():
        if name not in work.found and (cell.locked or cell.grade or cell.task):
            solution = name.removeprefix(GRADE_ID) if cell.grade else ""
            anchors = (work.found.get(n) for n in (solution, *reversed(before)))
            anchor = next(filter(None, anchors), None)
            nowhere = len(work.cells) if cell.points is not None else 0
            again = work.found[name] = _Cell(cell.cell_type, cell.source, cell=cell)
            work.cells.insert(work.cells.index(anchor) + 1 if anchor else nowhere, again)
            missing.append(name)
        before.append(name)
    if not any(cell.claim for cell in work.cells) and not another:
        work.notices.append("nbgrader's ids were lost: cells were told by what they define.")
    if another:
        work.notices.append("Nothing of this lab is in it: perhaps another notebook was handed in.")
    else:
        work.say("Cells had been deleted and were put back: {}.", missing)


def _notebook(cells: Sequence[_Cell], released: Released) -> NotebookNode:
    taken = {cell.name[:64] for cell in released.cells}
    nodes = []
    for number, cell in enumerate(cells, 1):
        node: dict[str, Any] = {"cell_type": cell.kind, "id": cell.id, "metadata": {}}
        node["source"] = cell.source
        if cell.cell is not None:
            node |= {"cell_type": cell.cell.cell_type, "id": cell.cell.name[:64]}
            node["metadata"] = _metadata(cell.cell)
            node["source"] = cell.cell.source if cell.cell.locked else cell.source
        else:
            if cell.demo:
                node["metadata"] = {"tags": ["demo"]}
            if cell.id in taken or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", cell.id):
                names = (f"cell-{number}" + f"-{i}" * bool(i) for i in count())
                node["id"] = next(name for name in names if name not in taken)
            taken.add(node["id"])
        if node["cell_type"] == "code":
            node |= {"execution_count": None, "outputs": []}
        elif cell.images:
            node["attachments"] = cell.images
        nodes.append(node)
    about: dict[str, Any] = {"kernelspec": released.kernelspec} if released.kernelspec else {}
    about["language_info"] = {"name": (released.kernelspec or {}).get("language", "python")}
    return nbformat.from_dict(
        {"cells": nodes, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    )


def _metadata(cell: ReleasedCell) -> dict[str, Any]:
    """A cell's metadata as nbgrader released it."""
    about: dict[str, Any] = {
        "cell_type": cell.cell_type,
        "grade": cell.grade,
        "grade_id": cell.name,
        "locked": cell.locked,
        "schema_version": 3,
        "solution": cell.solution,
        "task": cell.task,
    }
    if cell.checksum:
        about["checksum"] = cell.checksum
    if cell.points is not None:
        about["points"] = int(cell.points) if cell.points == int(cell.points) else cell.points
    return {"deletable": False, "nbgrader": about} | ({"editable": False} if cell.locked else {})
