"""A sample class of twelve, graded from an empty folder to the class report.

The class shows what grading must cope with: right work in several styles, honest mistakes, and
work that crashes, hangs or does not even parse. What each student deserves is worked out here from
the functions they wrote, in this process and without notebooks, so that it can be held against
what grading found.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import textwrap
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbformat import NotebookNode
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from autograder.battery import battery
from autograder.build import global_names
from autograder.candidate import Judged, Local, fresh
from autograder.compare import CandidateError
from autograder.exercise import Check, Exercise, exercises, find
from autograder.report import ClassReport, points, read_class, write_report

LAB = 1
OURS = ".fewer-demo"  # marks a folder that a demo made, and may clear away
WRITTEN = (
    "Because one large weight stretches the scale for everybody, and the small ones pay for it."
)


@dataclass(frozen=True)
class SampleStudent:
    """One student of the sample class.

    Attributes:
        wrote: what the student did, in words.
        cells: the source of a solution cell by exercise; an exercise left out was not touched.
        works: for each exercise that returns anything at all: the function it comes down to.
    """

    id: str
    first: str
    last: str
    wrote: str
    cells: dict[str, str]
    works: dict[str, Callable[..., Any]] = field(repr=False)


def the_twelve(solution: NotebookNode) -> list[SampleStudent]:
    """The sample class for the lab whose notebook with solutions is ``solution``.

    Raises:
        ValueError: if the lab has fewer than four exercises with misconceptions.
    """
    found = [find(name) for name in solution_cells(solution) if name in exercises()]
    right = {e.name: solution_cells(solution)[e.name] for e in found}
    works = {e.name: e.reference for e in found}
    mistaken = _spread([e for e in found if e.misconceptions], 4)
    loops = {e.name: _loops(e) for e in found}
    middle = found[len(found) // 2].name
    half = [e.name for e in found[: len(found) // 2]]

    def but(name: str, source: str) -> tuple[dict[str, str], dict[str, Callable[..., Any]]]:
        """Right everywhere but in ``name``, where the cell reads ``source`` and nothing works."""
        return right | {name: source}, {k: f for k, f in works.items() if k != name}

    def body(name: str, lines: str) -> str:
        return f"def {name}(*args, **kwargs):\n{textwrap.indent(lines, '    ')}\n"

    work: list[tuple[str, dict[str, str], dict[str, Callable[..., Any]]]] = [
        ("everything right", right, works),
        (
            "right, in NumPy and loops",
            {e.name: as_cell(e, loops[e.name]) for e in found},
            loops,
        ),
    ]
    for exercise in mistaken:
        mistake = exercise.misconceptions[0]
        work.append(
            (
                f"{exercise.name}: {mistake.name.replace('_', ' ')}",
                right | {exercise.name: as_cell(exercise, mistake.function)},
                works | {exercise.name: mistake.function},
            )
        )
    work += [
        ("the first half only", {n: right[n] for n in half}, {n: works[n] for n in half}),
        ("nothing", {}, {}),
        (
            f"a syntax error in {found[0].name}",
            *but(found[0].name, right[found[0].name] + "\n    return ("),
        ),
        (f"ends the process in {middle}", *but(middle, body(middle, "import os\nos._exit(0)"))),
        (
            f"loops forever in {found[-1].name}",
            *but(found[-1].name, body(found[-1].name, "while True:\n    pass")),
        ),
        ("right, and very noisy", {name: _noisy(name, right[name]) for name in right}, works),
    ]
    return [
        SampleStudent(first.lower(), first, last, *done)
        for (first, last), done in zip(NAMES, work, strict=True)
    ]


NAMES = (
    ("Ada", "Okafor"),
    ("Ben", "Larsen"),
    ("Chika", "Mori"),
    ("Dario", "Conti"),
    ("Elif", "Kaya"),
    ("Farid", "Haddad"),
    ("Grace", "Lim"),
    ("Hana", "Novak"),
    ("Ines", "Duarte"),
    ("Jonas", "Weber"),
    ("Kofi", "Mensah"),
    ("Lena", "Petrov"),
)


def expected_points(
    student: SampleStudent, found: Sequence[Exercise], seed: int = 0
) -> dict[str, int]:
    """The points a sample student deserves in each of the exercises ``found``.

    Nothing for what does not work, everything for the reference and for an accepted variant; for a
    misconception, the points of the checks whose property it satisfies on every input.
    """
    deserved = {}
    for exercise in found:
        function = student.works.get(exercise.name)
        if function is None:
            deserved[exercise.name] = 0
        elif function in [m.function for m in exercise.misconceptions]:
            held = [c.points for c in exercise.checks if _holds(exercise, c, function, seed)]
            deserved[exercise.name] = sum(held)
        else:
            deserved[exercise.name] = exercise.points
    return deserved


def _holds(exercise: Exercise, check: Check, function: Callable[..., Any], seed: int) -> bool:
    for drawn in battery(check, seed):
        try:
            check.property(Judged(Local(function), exercise.reference), **fresh(drawn))
        except (AssertionError, CandidateError):
            return False
    return True


def sample_class(course: Path, assignment: str) -> list[SampleStudent]:
    """Write the twelve submissions into ``course/submitted``, their names into the gradebook.

    Args:
        course: a course folder in which ``assignment`` was released.
    """
    from nbgrader.api import Gradebook

    file = f"{assignment}.ipynb"
    released = nbformat.read(course / "release" / assignment / file, as_version=4)
    students = the_twelve(nbformat.read(course / "source" / assignment / file, as_version=4))
    with Gradebook(f"sqlite:///{(course / 'gradebook.db').resolve()}") as book:
        for student in students:
            book.update_or_create_student(
                student.id, first_name=student.first, last_name=student.last
            )
    for student in students:
        path = course / "submitted" / student.id / assignment / file
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(_fill_in(released, student), path)
    return students


def _fill_in(released: NotebookNode, student: SampleStudent) -> NotebookNode:
    """The notebook as the student hands it in."""
    nb = nbformat.from_dict(released)
    for cell in nb.cells:
        about = cell.metadata.get("nbgrader", {})
        if about.get("solution") and about.get("grade") and student.cells:
            cell.source = WRITTEN
        elif about.get("grade_id") in student.cells:
            cell.source = student.cells[about["grade_id"]]
    return nb


def solution_cells(nb: NotebookNode) -> dict[str, str]:
    """The solution cells of an instructor's notebook by exercise, without nbgrader's markers."""
    found = {}
    for cell in nb.cells:
        about = cell.metadata.get("nbgrader", {})
        if cell.cell_type == "code" and about.get("solution"):
            lines = [line for line in cell.source.splitlines() if " SOLUTION" not in line]
            found[about["grade_id"]] = "\n".join(lines)
    return found


def _spread(items: Sequence[Exercise], count: int) -> list[Exercise]:
    if len(items) < count:
        raise ValueError(
            f"the lab must have {count} exercises with misconceptions, has {len(items)}"
        )
    return [items[i * len(items) // count] for i in range(count)]


def _loops(exercise: Exercise) -> Callable[..., Any]:
    """The variant that looks most like NumPy and loops; the reference where there is none."""
    plain = [v for v in exercise.variants if "numpy" in v.how.lower() or "loop" in v.how.lower()]
    variants = plain or exercise.variants
    return variants[0].function if variants else exercise.reference


def _noisy(name: str, source: str) -> str:
    return f"""import sys
import warnings

print("working on {name} ...")
warnings.warn("this cell is noisy", stacklevel=1)

{source}

quietly_{name} = {name}


def {name}(*args, **kwargs):
    print("called with", args, kwargs)
    print("still fine", file=sys.stderr)
    warnings.warn("nothing to see here", stacklevel=2)
    return quietly_{name}(*args, **kwargs)
"""


def as_cell(exercise: Exercise, function: Callable[..., Any]) -> str:
    """Source that defines ``function`` under the exercise's name, with all it needs.

    References of exercises are imported inside the function: at a notebook's top level they would
    overwrite what the student wrote for those exercises. So its defaults cannot use them.

    Raises:
        ValueError: if ``function`` uses a global that cannot be written down.
    """
    head: dict[str, None] = {"from __future__ import annotations": None}
    below: dict[str, None] = {}

    def define(function: Callable[..., Any], called: str) -> None:
        source, function = exercise.source(function), inspect.unwrap(function)
        tree = ast.parse(source)
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        renamed = {function.__name__: called}
        # Under another name: a call of the exercise's own reference must count as a global.
        anonymous = source.replace(f"def {exercise.name}(", "def _(", 1)
        for name in sorted(global_names(anonymous) & function.__globals__.keys()):
            value = function.__globals__[name]
            origin = getattr(value, "__module__", None)
            if value is function:
                continue
            if isinstance(value, types.ModuleType):
                head[f"import {value.__name__} as {name}"] = None
            elif value is exercise.reference:  # one may not call the library's in its own exercise
                renamed[name] = f"right_{name}"
                define(value, f"right_{name}")
            elif name in exercises():
                inside = ast.parse(f"from {origin} import {value.__name__} as {name}")
                definition.body[:0] = inside.body
            elif inspect.isfunction(value) and origin == function.__module__:
                define(value, name)
            elif origin and hasattr(value, "__name__"):
                head[f"from {origin} import {value.__name__} as {name}"] = None
            elif isinstance(value, torch.Tensor):
                head.update({"import torch as torch": None, "from math import inf, nan": None})
                below[f"{name} = torch.tensor({value.tolist()})"] = None
            elif isinstance(value, int | float | str | tuple | list | dict):
                head["import torch as torch"] = None  # there may be types among its items
                below[f"{name} = {value!r}"] = None
            else:
                raise ValueError(f"{function.__name__} uses {name}, which cannot be written down")
        for node in names:
            node.id = renamed.get(node.id, node.id)
        definition.name = called
        below[ast.unparse(tree)] = None

    define(function, exercise.name)
    return "\n".join(head) + "\n\n\n" + "\n\n\n".join(below) + "\n"


def run_demo(folder: Path, root: Path, console: Console, seed: int = 0) -> Path:
    """Build the lab, make the sample class, grade it, print what came of it; return the report.

    Args:
        folder: where the sample course is made. A folder left by an earlier demo is made anew.
        root: the folder with the course's ``solutions/``.

    Raises:
        FileExistsError: if ``folder`` holds anything that no demo made.
    """
    from autograder import sandbox
    from autograder.build import build, labs
    from autograder.course import create_course, release
    from autograder.grading import grade

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / OURS).is_file():
            raise FileExistsError(f"--folder must be new or empty, and {folder} holds other things")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OURS).write_text(
        "Made by `fewer demo`, which clears this folder when it runs again.\n"
    )

    begin = time.monotonic()
    with Steps(console) as step:
        step("building the lab")
        build(root)
        lab = next(lab for lab in labs(root) if lab.number == LAB)
        step("making a course and releasing the lab")
        create_course(folder, root, [LAB])
        release(folder, lab.name)
        step("twelve students hand in")
        students = sample_class(folder, lab.name)
        step("grading")
        grade(folder, lab.name, seed=seed, walled=not (open_because := sandbox.missing()))
        step("writing the class report")
        path = write_report(folder, lab.name, folder / "report" / f"{lab.name}.html")
    report = read_class(folder, lab.name)
    found = [find(name) for name in report.exercises]
    deserved = {s.id: sum(expected_points(s, found, seed).values()) for s in students}
    console.print(result_table(report, students, deserved))
    wrong = [s.id for s in report.students if s.score != deserved.get(s.id)]
    if open_because:
        console.print(f"[yellow]Graded without a sandbox:[/] {escape(open_because)}")
    if wrong:
        console.print(f"[bold red]Not the points they deserve: {', '.join(wrong)}[/]")
    else:
        console.print("All twelve got exactly the points they deserve.")
    console.print(f"From an empty folder to the report in {time.monotonic() - begin:.0f} s.\n")
    feedback = folder / "feedback" / students[2].id / lab.name / f"{lab.name}.html"
    for what, where in (
        ("class report", path),
        ("feedback", feedback),
        ("gradebook", folder / "gradebook.db"),
    ):
        console.print(f"[dim]{what:>12}[/]  {escape(str(where))}", soft_wrap=True)
    console.print(
        f"[dim]{'by hand':>12}[/]  cd {escape(str(folder))} && jupyter lab   (Formgrader)"
    )
    return path


class Steps(Progress):
    """One line a step, with its time; call it with the name of the next step."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
        )

    def __call__(self, what: str) -> None:
        self._finish()
        self.add_task(what, total=1)

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._finish()
        super().__exit__(*error)

    def _finish(self) -> None:
        for task in self.tasks:
            self.update(task.id, completed=1)


def result_table(
    report: ClassReport, students: Sequence[SampleStudent], deserved: dict[str, int]
) -> Table:
    """What came of the class: student, work, points, points deserved, first diagnosis."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("student")
    table.add_column("handed in", max_width=38)
    table.add_column("points", justify="right")
    table.add_column("deserved", justify="right")
    table.add_column("")
    table.add_column("first thing the student reads", ratio=1)
    results = {student.id: student for student in report.students}
    for sample in students:
        result = results[sample.id]
        agreed = result.score == deserved[sample.id]
        table.add_row(
            sample.first,
            sample.wrote,
            points(result.score),
            points(deserved[sample.id]),
            "[green]✓[/]" if agreed else "[bold red]✗[/]",
            escape(first_words(result.verdicts.values())),
        )
    return table


def first_words(verdicts: Any) -> str:
    """The diagnosis, or else the trouble, in the first exercise that went wrong."""
    for verdict in verdicts:
        if worst := verdict.first_failure:
            trouble = worst.failure.message if worst.failure else ""
            words = re.split(r"(?<=[.!?]) ", worst.diagnosis)[0] or verdict.note or trouble
            return textwrap.shorten(words, 100, placeholder=" ...")
    return ""
