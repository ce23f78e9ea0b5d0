"""Build the notebooks of the labs, and the tables about them, from the authored scripts.

A lab is written as ``solutions/lab<N>_<topic>.py``, a jupytext percent script that runs as plain
Python. Its first cell is markdown with the title (``# Lab 1. ...``). Four tags say what becomes of
a cell; a cell without one is kept as it is::

    # %% tags=["exercise"]
    from fewer.quantization import quantize_symmetric

becomes a line with difficulty, minutes, points and paper, and the solution cell: the imports that
the reference needs, its signature, its docstring and, between nbgrader's markers, its body.
Students get ``raise NotImplementedError`` in place of the body. ::

    # %% tags=["check"]
    check(quantize_symmetric)

becomes the locked grade cell with the points of the exercise. ::

    # %% tags=["demo"]
    plot(...)

is for people: kept with its tag, not run for grades. ::

    # %% [markdown] tags=["written"] id="why_a_zero_point" points=4
    # **Question.** What everybody reads.
    #
    # **Answer.** The model answer.
    #
    # **Rubric.** Points for what.

becomes the question and a cell that is graded by hand. From the line that begins with
``**Answer.**`` on, only the instructor's version has it.

Two rules about imports. In a solution cell, functions that are themselves exercises are imported
inside the function's body, in stub and solution alike: so one mistake costs one exercise, and a
student's own function of that name is not overwritten by the library's. For the same reason an
untagged or demo cell must not import, at its top level, the function of an exercise of its lab;
``import fewer.quantization as library`` and ``library.dequantize`` gets at the reference.

What students open, ``labs/*.ipynb``, is what nbgrader's own preprocessors make of the instructor's
notebook, byte for byte what ``nbgrader generate_assignment`` releases.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import json
import re
import symtable
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from traitlets.config import Config

from autograder.exercise import Exercise, exercises
from autograder.verdict import GRADE_ID

CODE_STUB = "# Your code here\nraise NotImplementedError"
TEXT_STUB = "*Your answer here*"
TAGS = ("exercise", "check", "demo", "written")
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class LabError(ValueError):
    """A lab's script says something the builder does not understand; the message says where."""


@dataclass(frozen=True)
class Lab:
    """One lab: its number, its name (``lab1_quantization``), and where its two forms are."""

    number: int
    name: str
    title: str
    script: Path
    notebook: Path


def labs(root: Path) -> list[Lab]:
    """The labs of the course at ``root``, in order of their numbers.

    Raises:
        LabError: a script has no title, or two labs have the same number.
    """
    found: dict[int, Lab] = {}
    for script in sorted((root / "solutions").glob("lab*.py")):
        name = re.fullmatch(r"lab(\d+)_\w+", script.stem)
        if not name:
            raise LabError(f"{script}: a lab is called lab<number>_<topic>.py")
        title = re.search(r"^# # (.+)$", script.read_text("utf-8"), re.MULTILINE)
        if not title:
            raise LabError(f"{script}: the first cell must be markdown with a title, '# # Lab ...'")
        number = int(name[1])
        if number in found:
            raise LabError(f"{script}: {found[number].script.name} has the same number")
        notebook = root / "labs" / f"{script.stem}.ipynb"
        found[number] = Lab(number, script.stem, title[1].strip(), script, notebook)
    return [found[number] for number in sorted(found)]


def build(root: Path, check: bool = False) -> list[Path]:
    """Write every generated file of the course at ``root``: the labs, and the tables in the README
    and in docs/.

    Args:
        check: write nothing.

    Returns:
        The files that were stale; with ``check``, the files that are. A notebook in ``labs/`` whose
        script is gone is stale too, and is removed.

    Raises:
        LabError: a script cannot be built.
    """
    wanted: dict[Path, str | None] = {}  # None: not wanted at all
    for notebook in (root / "labs").glob("lab*_*.ipynb"):
        wanted[notebook] = None
    sources = [(lab, source_notebook(lab.script)) for lab in labs(root)]
    for lab, source in sources:
        wanted[lab.notebook] = _text(released(source))
    tables = {"exercises": _exercise_table(sources), "labs": _lab_table(sources)}
    tables |= _result_tables(root / "benchmarks" / "results")
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if page.exists():
            wanted[page] = _fill_tables(page, tables)

    stale = [path for path, text in wanted.items() if text is None or not _holds(path, text)]
    for path in [] if check else stale:
        text = wanted[path]
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
    return stale


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_bytes() == text.encode()


def student_notebook(script: Path) -> NotebookNode:
    """The notebook that students open: stubs in place of solutions."""
    return released(source_notebook(script))


def released(source: NotebookNode) -> NotebookNode:
    """What nbgrader releases of an instructor's notebook: its own preprocessors, in its order.

    Those that need a gradebook (SaveCells), a kernel (InstantiateTests) or extra files
    (IncludeHeaderFooter) are left out; they change nothing in a notebook that does not use them.
    """
    # Imported where it is used: it takes a second or two, and `labs` is called by quick commands.
    from nbgrader import preprocessors as steps

    notebook = nbformat.from_dict(source)
    stubs = {"code_stub": {"python": CODE_STUB}, "text_stub": TEXT_STUB}
    config = Config({"ClearSolutions": stubs})
    resources: dict[str, Any] = {}
    for step in (
        steps.LockCells,
        steps.ClearSolutions,
        steps.ClearOutput,
        steps.CheckCellMetadata,
        steps.ClearHiddenTests,
        steps.ClearMarkScheme,
        steps.ComputeChecksums,
        steps.CheckCellMetadata,
    ):
        notebook, resources = step(config=config).preprocess(notebook, resources)
    return notebook


def source_notebook(script: Path) -> NotebookNode:
    """The instructor's notebook: solutions, model answers, and nbgrader's metadata.

    The same script gives the same notebook, byte for byte: cell ids come from names and positions.

    Raises:
        LabError: naming the file, the cell and its line.
    """
    script = Path(script)
    authored = jupytext.read(script, fmt="py:percent").cells
    text = script.read_text("utf-8").splitlines()
    starts = [number for number, line in enumerate(text, 1) if line.startswith("# %%")]
    todo: dict[str, Exercise] = {}  # exercises whose check has not come yet
    done: dict[str, Exercise] = {}
    cells: list[NotebookNode] = []
    for index, cell in enumerate(authored):
        line = f" (line {starts[index]})" if len(starts) == len(authored) else ""
        try:
            cells += _build_cell(cell, index, todo, done)
        except LabError as error:
            raise LabError(f"{script}, cell {index + 1}{line}: {error}") from None
    if todo:
        raise LabError(f"{script}: no check cell for {', '.join(todo)}")
    for cell in cells:
        overwritten = set() if "nbgrader" in cell.metadata else _imported(cell) & done.keys()
        for name in sorted(overwritten):
            raise LabError(
                f"{script}: the cell that begins with {cell.source.splitlines()[0]!r} imports "
                f"{name}, which would overwrite the student's own {name}; write "
                f"'import fewer.{done[name].topic} as library' and 'library.{name}'"
            )
    ids = [cell.id for cell in cells]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise LabError(f"{script}: two cells are called {', '.join(twice)}: names are unique")
    notebook = new_notebook(cells=cells)
    notebook.nbformat_minor = 5
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    nbformat.validate(notebook)
    return notebook


def _build_cell(
    cell: NotebookNode, index: int, todo: dict[str, Exercise], done: dict[str, Exercise]
) -> list[NotebookNode]:
    """The cells that one authored cell becomes."""
    if index == 0 and not (cell.cell_type == "markdown" and cell.source.startswith("# ")):
        raise LabError("the first cell must be markdown with a title, '# # Lab ...'")
    tags = cell.metadata.get("tags", [])
    for tag in tags:
        if tag not in TAGS:
            raise LabError(f"unknown tag {tag!r}; there are {', '.join(TAGS)}")
    if len(tags) > 1:
        raise LabError(f"a cell has at most one tag, got {', '.join(tags)}")
    tag = tags[0] if tags else ""
    known = {"tags", "id", "points"} if tag == "written" else {"tags"}
    known |= {"lines_to_next_cell"}  # jupytext notes where a cell ends in more or fewer blank lines
    if unknown := sorted(cell.metadata.keys() - known):
        raise LabError(f"unknown option {unknown[0]!r}")
    if tag and cell.cell_type != ("markdown" if tag == "written" else "code"):
        raise LabError(f"a cell tagged {tag!r} cannot be a {cell.cell_type} cell")

    if tag == "exercise":
        exercise = _exercise(cell.source)
        if exercise.name in todo | done:
            raise LabError(f"the exercise {exercise.name} is in this lab already")
        todo[exercise.name] = exercise
        return [_about_cell(exercise), _solution_cell(exercise)]
    if tag == "check":
        name = _checked_name(cell.source)
        if name in done:
            raise LabError(f"{name} has a check cell already")
        if name not in todo:
            raise LabError(f"no exercise called {name} stands before its check")
        done[name] = todo.pop(name)
        return [_grade_cell(done[name])]
    if tag == "written":
        return _written_cells(cell)
    _imported(cell)  # for its error, should the cell not be Python
    new = new_markdown_cell if cell.cell_type == "markdown" else new_code_cell
    metadata = {"tags": tags} if tags else {}
    return [new(cell.source, id=f"cell_{index + 1}", metadata=metadata)]


def _exercise(source: str) -> Exercise:
    """The exercise that a cell ``from fewer.topic import name`` means."""
    example = "'from fewer.quantization import quantize_symmetric'"
    try:
        nodes = ast.parse(source).body
    except SyntaxError:
        nodes = []
    node = nodes[0] if len(nodes) == 1 else None
    if not isinstance(node, ast.ImportFrom) or not node.module or node.level:
        raise LabError(f"an exercise cell is one import and nothing else, as {example}")
    names = [alias.name for alias in node.names]
    if len(names) > 1:
        raise LabError(f"an exercise cell imports one function, got {', '.join(names)}")
    if node.names[0].asname or names == ["*"]:
        raise LabError(f"an exercise cell imports its function by its own name, as {example}")
    exercise = exercises().get(names[0])
    if exercise is None:
        raise LabError(f"no exercise is called {names[0]!r}; there are: {', '.join(exercises())}")
    try:
        imported = getattr(importlib.import_module(node.module), names[0], None)
    except ImportError as error:
        raise LabError(str(error)) from None
    if imported is not exercise.reference:
        raise LabError(f"{node.module} has no function {names[0]} that is the exercise's reference")
    if not exercise.checks:
        raise LabError(f"the exercise {names[0]} has no checks")
    return exercise


def _checked_name(source: str) -> str:
    match = re.fullmatch(r"check\((\w+)\)", source.strip())
    if not match:
        raise LabError("a check cell is one line, as 'check(quantize_symmetric)'")
    return match[1]


def _about_cell(exercise: Exercise) -> NotebookNode:
    unit = "point" if exercise.points == 1 else "points"
    line = (
        f"{_dots(exercise)} · {exercise.minutes} min · {exercise.points} {unit} · {exercise.paper}"
    )
    return new_markdown_cell(line, id=f"about_{exercise.name}"[:64])


def _solution_cell(exercise: Exercise) -> NotebookNode:
    at_top, inside = needed_imports(exercise)
    head, body = split_source(exercise)
    indent = re.match(r"\s*", body)[0]  # type: ignore[index]
    lines = [*at_top, "", ""] if at_top else []
    lines.append(head)
    if inside:
        lines += [indent + line for line in inside] + [""]
    lines += [f"{indent}### BEGIN SOLUTION", body, f"{indent}### END SOLUTION"]
    metadata = nbgrader_metadata(exercise.name, solution=True)
    return new_code_cell("\n".join(lines), id=exercise.name[:64], metadata=metadata)


def _grade_cell(exercise: Exercise) -> NotebookNode:
    grade_id = f"{GRADE_ID}{exercise.name}"
    metadata = nbgrader_metadata(grade_id, grade=True, locked=True, points=exercise.points)
    return new_code_cell(f"check({exercise.name})", id=grade_id[:64], metadata=metadata)


def _written_cells(cell: NotebookNode) -> list[NotebookNode]:
    name, points = cell.metadata.get("id"), cell.metadata.get("points")
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w{0,40}", name)):
        raise LabError(f"a written question needs an id of letters, digits and _, got {name!r}")
    if name in exercises() or name.startswith((GRADE_ID, "about_", "cell_", "question_")):
        raise LabError(f"a written question cannot be called {name!r}: the name is taken")
    if not isinstance(points, int) or points < 1:
        raise LabError(f"a written question needs points, a whole number, got {points!r}")
    parts = re.fullmatch(
        r"(.+?)^(\*\*Answer\.\*\*.+?^\*\*Rubric\.\*\*.+)", cell.source, re.DOTALL | re.MULTILINE
    )
    if not parts:
        raise LabError(
            "a written question is a text, then a line that begins with '**Answer.**', "
            "then one that begins with '**Rubric.**'"
        )
    answer = f"<!-- BEGIN SOLUTION -->\n{parts[2].strip()}\n<!-- END SOLUTION -->"
    metadata = nbgrader_metadata(name, grade=True, solution=True, points=points)
    return [
        new_markdown_cell(parts[1].strip(), id=f"question_{name}"),
        new_markdown_cell(answer, id=name, metadata=metadata),
    ]


def nbgrader_metadata(grade_id: str, **values: Any) -> dict[str, Any]:
    """A cell's metadata as nbgrader's format 3 wants it."""
    flags = {"grade": False, "solution": False, "locked": False, "task": False}
    return {"nbgrader": {**flags, **values, "grade_id": grade_id, "schema_version": 3}}


def _imported(cell: NotebookNode) -> set[str]:
    """The names that a code cell imports at its top level."""
    if cell.cell_type != "code":
        return set()
    lines = [line for line in cell.source.splitlines() if not line.startswith(("%", "!"))]
    try:
        nodes = ast.parse("\n".join(lines)).body
    except SyntaxError as error:
        raise LabError(f"a cell cannot be parsed: {error}") from None
    return {name for node in nodes for name in _bound(node)}


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name.split(".")[0]


def split_source(exercise: Exercise) -> tuple[str, str]:
    """The source of a reference in two: signature with docstring, and body, as they are written.

    Raises:
        LabError: the reference has no docstring, or nothing behind it.
    """
    source = exercise.source()
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is None or len(function.body) < 2:
        raise LabError(f"{exercise.name} needs a docstring (the task) and a body (the solution)")
    lines = source.rstrip().splitlines()
    end = function.body[0].end_lineno
    body = lines[end:]
    while not body[0].strip():
        del body[0]
    return "\n".join(lines[:end]), "\n".join(body)


def needed_imports(exercise: Exercise) -> tuple[list[str], list[str]]:
    """The import lines that the source of a reference needs: for the cell's top, and for its body.

    They are those of the reference's own module, for the global names its source uses. What is
    itself an exercise belongs into the body (see the top of this file). A name of the course's
    library is imported from its topic where the topic offers it: ``fewer.quantization`` rather than
    ``fewer.quantization.validate``.
    """
    module = sys.modules[exercise.reference.__module__]
    statements = _import_statements(module)
    references = {id(other.reference) for other in exercises().values()}
    top: set[tuple[str, str, str]] = set()
    inside: set[tuple[str, str, str]] = set()
    for name in global_names(exercise.source()) - {exercise.name}:
        value = getattr(module, name, None)
        if name not in vars(module):
            if not hasattr(builtins, name):
                raise LabError(
                    f"{exercise.name} uses {name}, which {module.__name__} does not have"
                )
            continue
        origin, original, asname = statements.get(name, (module.__name__, name, ""))
        package = ".".join(origin.split(".")[:2])
        if original and package.startswith("fewer."):
            offered = getattr(importlib.import_module(package), original, None)
            origin = package if offered is value else origin
        (inside if id(value) in references else top).add((origin, original, asname))
    return _import_lines(top), _import_lines(inside)


def _import_statements(module: Any) -> dict[str, tuple[str, str, str]]:
    """What a module imports: bound name -> (module, name in it or '', its 'as' name or '')."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                found[bound] = (alias.name, "", alias.asname or "")
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            origin = importlib.util.resolve_name(origin, module.__package__)
            for alias in node.names:
                found[alias.asname or alias.name] = (origin, alias.name, alias.asname or "")
    return found


def global_names(source: str) -> set[str]:
    """The names that a piece of source looks up outside itself: annotations and defaults too."""
    table = symtable.symtable(source, "<reference>", "exec")
    defined = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}
    names: set[str] = set()
    tables = [table]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        at_top = table.get_type() == "module"
        names |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (at_top or symbol.is_global())
        }
    return names - defined


def _import_lines(wanted: set[tuple[str, str, str]]) -> list[str]:
    """Import statements in the usual order: the standard library, other packages, this one."""
    lines: list[tuple[int, bool, str, str]] = []  # group, is a from-import, module, text
    for origin in sorted({origin for origin, _, _ in wanted}):
        root = origin.split(".")[0]
        group = 2 if root == "fewer" else int(root not in sys.stdlib_module_names)
        bound = sorted((name, asname) for o, name, asname in wanted if o == origin)
        names = []
        for name, asname in bound:
            renamed = f" as {asname}" if asname else ""
            if name:
                names.append(name + renamed)
            else:
                lines.append((group, False, origin, f"import {origin}{renamed}"))
        if names:
            text = f"from {origin} import {', '.join(names)}"
            lines.append((group, True, origin, text))
    return [text for *_, text in sorted(lines)]


def _dots(exercise: Exercise) -> str:
    return "●" * exercise.difficulty + "○" * (3 - exercise.difficulty)


def _exercises_of(notebook: NotebookNode) -> list[Exercise]:
    """The exercises of an instructor's notebook, in its order."""
    graded = [cell.metadata.get("nbgrader", {}) for cell in notebook.cells]
    names = [entry["grade_id"] for entry in graded if entry.get("solution")]
    return [exercises()[name] for name in names if name in exercises()]


def _exercise_table(notebooks: Sequence[tuple[Lab, NotebookNode]]) -> str:
    lines = [
        "| lab | exercise | paper | difficulty | minutes | points |",
        "|---|---|---|---|---|---|",
    ]
    for lab, notebook in notebooks:
        for e in _exercises_of(notebook):
            paper = e.paper.replace("|", "\\|")
            about = f"{_dots(e)} | {e.minutes} | {e.points}"
            lines.append(f"| {lab.number} | `{e.name}` | {paper} | {about} |")
    return "\n".join(lines) + "\n"


def _lab_table(notebooks: Sequence[tuple[Lab, NotebookNode]]) -> str:
    lines = ["| lab | exercises | minutes | points |", "|---|---|---|---|"]
    for lab, notebook in notebooks:
        graded = [cell.metadata.get("nbgrader", {}) for cell in notebook.cells]
        points = sum(entry["points"] for entry in graded if entry.get("grade"))
        coded = _exercises_of(notebook)
        minutes = sum(exercise.minutes for exercise in coded)
        link = f"[{lab.title}](labs/{lab.notebook.name})"
        lines.append(f"| {link} | {len(coded)} | {minutes} | {points} |")
    return "\n".join(lines) + "\n"


def _result_tables(folder: Path) -> dict[str, str]:
    """Of each benchmark the newest stored table, by its file's name without the date.

    A benchmark writes <name>_<date>_<time>.json; those with a "table" (a caption, columns, rows of
    strings) can be shown as ``<!-- generated: <name> -->``.
    """
    tables = {}
    for path in sorted(folder.glob("*.json")):  # the newest comes last
        result = json.loads(path.read_text("utf-8"))
        if "table" in result:
            table = result["table"]
            rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
            cells = ["| " + " | ".join(row) + " |" for row in rows]
            on = f"Measured on {result['date'][:10]}, {result['device']}"
            name = re.sub(r"_\d{8}_\d{6}$", "", path.stem)
            tables[name] = "\n".join([f"{table['caption']}. {on} (`{path.name}`).", "", *cells, ""])
    return tables


def _fill_tables(path: Path, tables: dict[str, str]) -> str:
    """The text of a file, each ``<!-- generated: name -->`` ... ``<!-- end -->`` filled anew."""
    text = path.read_text("utf-8")
    begin = r"<!-- generated: (\w+) -->\n"
    for name in re.findall(begin, text):
        if name not in tables:
            raise LabError(f"{path}: no table is called {name!r}; there are {', '.join(tables)}")
    if len(re.findall(begin, text)) != len(re.findall(begin + r".*?<!-- end -->", text, re.DOTALL)):
        raise LabError(f"{path}: a generated table has no '<!-- end -->'")
    return re.sub(
        f"({begin}).*?(<!-- end -->)", lambda m: m[1] + tables[m[2]] + m[3], text, flags=re.DOTALL
    )


def _text(notebook: NotebookNode) -> str:
    """A notebook as nbgrader writes it: stable JSON with a newline at its end."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"
