"""Attacks by what is handed in: forged notebooks, broken files, links, folders, names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from autograder.attacks.attack import HONEST, TARGET, Attack, Scene
from autograder.verdict import MIME

METADATA = "forged metadata"
CELLS = "forged cells"
FILES = "broken files"
FOLDERS = "forged submissions"

WRITTEN = "what_is_four_bit"  # the question of lab 1 that a person grades
VERDICT: dict[str, Any] = {
    "exercise": TARGET,
    "seed": 0,
    "note": "@MARK@",
    "error": "",
    "results": [{"check": "all", "statement": "All.", "points": 1000, "status": "passed"}],
}


def about(cell: Any) -> dict[str, Any]:
    return cell["metadata"].get("nbgrader") or {}


def cell_of(nb: NotebookNode, grade_id: str) -> NotebookNode:
    return next(cell for cell in nb.cells if about(cell).get("grade_id") == grade_id)


def verdict_output() -> NotebookNode:
    return new_output("execute_result", {"text/plain": "1000", "text/html": "1000", MIME: VERDICT})


def each(change: Callable[[NotebookNode], object]) -> Callable[[NotebookNode, Scene], None]:
    """A forgery that does something to each cell that nbgrader knows."""

    def forge(nb: NotebookNode, scene: Scene) -> None:
        for cell in nb.cells:
            if about(cell):
                change(cell)

    return forge


def forged_outputs(nb: NotebookNode, scene: Scene) -> None:
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [new_output("stream", text="1000\n"), verdict_output()]
        else:
            cell["outputs"] = [verdict_output()]
    for name in ("fewer", "nbgrader", "celltoolbar"):
        nb.metadata[name] = {"version": "9.9", "seed": 0, "sandbox": True, "key": "0" * 64}


def swapped(nb: NotebookNode, scene: Scene) -> None:
    """The honest cell claims to be the check of the target, and the reverse."""
    one, other = cell_of(nb, f"check_{HONEST}"), cell_of(nb, f"check_{TARGET}")
    one.metadata, other.metadata = other.metadata, one.metadata
    one.source, other.source = f"check({TARGET})", f"check({HONEST})"


def without_checks(nb: NotebookNode, scene: Scene) -> None:
    nb.cells = [
        cell for cell in nb.cells if not (about(cell).get("grade") and about(cell)["locked"])
    ]


def twice(nb: NotebookNode, scene: Scene) -> None:
    for cell in [cell for cell in nb.cells if about(cell)]:
        nb.cells += [nbformat.from_dict(cell), nbformat.from_dict(cell)]


def own_checks(nb: NotebookNode, scene: Scene) -> None:
    """More cells that would be graded: new ones, tasks, exercises of other labs."""
    template = dict(cell_of(nb, f"check_{HONEST}").metadata.nbgrader)
    for name in (
        "bonus",
        "check_bonus",
        "check_rmsnorm",
        f"check_{HONEST} ",
        f"check_check_{HONEST}",
    ):
        more = template | {"grade_id": name, "points": 1000}
        nb.cells.append(
            new_code_cell("1000", metadata={"nbgrader": more}, outputs=[verdict_output()])
        )
    task: dict[str, Any] = {
        "task": True,
        "grade": False,
        "solution": False,
        "locked": False,
        "points": 1000,
    }
    task |= {"grade_id": "task", "schema_version": 3}
    nb.cells.append(new_markdown_cell("done", metadata={"nbgrader": task}))


def graded_markdown(nb: NotebookNode, scene: Scene) -> None:
    """The check becomes words that hold a verdict, the written question code that gives points."""
    cell = cell_of(nb, f"check_{TARGET}")
    cell.cell_type, cell["outputs"] = "markdown", [verdict_output()]
    written = cell_of(nb, WRITTEN)
    written.cell_type, written.source = "code", "4"
    written["outputs"], written["execution_count"] = (
        [new_output("execute_result", {"text/plain": "4"})],
        1,
    )
    written.metadata["nbgrader"] = dict(written.metadata["nbgrader"], solution=False, locked=True)


def checks_that_pay(nb: NotebookNode, scene: Scene) -> None:
    for cell in nb.cells:
        if about(cell).get("locked"):
            cell.source = "print(1000)\n1000"


def another_kernel(nb: NotebookNode, scene: Scene) -> None:
    touch = f"touch {scene.outside}/@MARK@"
    nb.metadata["kernelspec"] = {
        "name": "bash",
        "display_name": touch,
        "language": "bash",
        "argv": ["sh", "-c", touch],
    }
    nb.metadata["language_info"] = {
        "name": "bash",
        "file_extension": "/../../@MARK@",
        "nbconvert_exporter": touch,
    }


def tag_all(nb: NotebookNode, scene: Scene) -> None:
    for cell in nb.cells:
        cell.metadata["tags"] = ["demo", "skip", "remove_cell", "hide-cell"]


def wrong_types(nb: NotebookNode, scene: Scene) -> bytes:
    """Whatever a reader believes about types is wrong somewhere."""
    tree = json.loads(nbformat.writes(nb))
    odd: list[Any] = [None, 1, True, "x", [], {}, [[]], {"a": {}}, 1e300, [None]]
    for number, cell in enumerate(tree["cells"]):
        if about(cell).get("grade_id") in (HONEST, f"check_{HONEST}"):
            continue
        value = odd[number % len(odd)]
        key = ("metadata", "source", "outputs", "cell_type", "id", "attachments")[number % 6]
        cell[key] = value
        if key != "metadata":
            cell["metadata"]["tags"] = value
            cell["metadata"]["nbgrader"] = value
    tree["cells"] += odd
    tree["metadata"] = {"kernelspec": ["python3"], "language_info": None, "fewer": odd}
    return json.dumps(tree).encode()


def odd_words(nb: NotebookNode, scene: Scene) -> bytes:
    """Characters that no file holds, in source, ids and names."""
    tree = json.loads(nbformat.writes(nb))
    for cell in tree["cells"]:
        if about(cell).get("grade_id") == TARGET:
            cell["source"] = "x = '\ud800 \0 \x1b[2J \u202e'"
    tree["cells"].append(
        {"cell_type": "markdown", "id": "\ud800", "metadata": {"\ud800": "\0"}, "source": "\udfff"}
    )
    return json.dumps(tree).encode()


def deep(nb: NotebookNode, scene: Scene) -> bytes:
    nested = "[" * 200_000 + "]" * 200_000
    return (
        nbformat.writes(nb).replace('"metadata": {', f'"metadata": {{"x": {nested}, ', 1).encode()
    )


def large_outputs(nb: NotebookNode, scene: Scene) -> None:
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [new_output("stream", text="x" * (10 << 20))]


def as_version_3(nb: NotebookNode, scene: Scene) -> bytes:
    return nbformat.writes(nbformat.convert(nb, 3), version=3).encode()


def link_to(path: Callable[[Scene], Path]) -> Callable[[Path, bytes, Scene], None]:
    """Hand in a link in place of the notebook, and one as another file."""

    def hand_in(file: Path, data: bytes, scene: Scene) -> None:
        file.symlink_to(path(scene))
        (file.parent / "data.csv").symlink_to(scene.outside / "secret.txt")

    return hand_in


def linked_folder(file: Path, data: bytes, scene: Scene) -> None:
    file.parent.rmdir()
    file.parent.symlink_to(neighbour(scene).parent, target_is_directory=True)


def neighbour(scene: Scene) -> Path:
    return scene.course / "submitted" / NEIGHBOUR / scene.lab / f"{scene.lab}.ipynb"


NEIGHBOUR = "a-perfect-neighbour"


def no_file(file: Path, data: bytes, scene: Scene) -> None:
    os.mkfifo(file)


def as_folder(file: Path, data: bytes, scene: Scene) -> None:
    file.mkdir()
    (file / file.name).write_bytes(data)


def more_files(file: Path, data: bytes, scene: Scene) -> None:
    """The notebook, among files that a grader or a page might use."""
    file.write_bytes(data)
    folder = file.parent
    harm = f"open({str(scene.outside / scene.mark)!r}, 'w')"
    for name in (
        "nbgrader_config.py",
        "sitecustomize.py",
        "autograder.py",
        "conftest.py",
        "torch.py",
    ):
        (folder / name).write_text(harm)
    (folder / "secret.csv").symlink_to(scene.outside / "secret.txt")
    (folder / "all").symlink_to(scene.course, target_is_directory=True)
    (folder / "timestamp.txt").symlink_to(scene.outside / "secret.txt")
    os.mkfifo(folder / "pipe")


def early(file: Path, data: bytes, scene: Scene) -> None:
    file.write_bytes(data)
    (file.parent / "timestamp.txt").write_text("0001-01-01 00:00:00 UTC\n" * 20)


LOST: None = None  # what a submission deserves that cannot be graded

ATTACKS = (
    Attack(
        "a thousand points",
        METADATA,
        "Claims a thousand points for every check and for the written question.",
        forge=each(lambda cell: cell.metadata.nbgrader.update(points=1000)),
    ),
    Attack(
        "outputs with verdicts",
        METADATA,
        "Fills all outputs, and the notebook's own metadata, with verdicts of full points.",
        forge=forged_outputs,
    ),
    Attack(
        "unlocked checks",
        METADATA,
        "Unlocks the checks, makes them solutions, and writes the points into them.",
        forge=each(
            lambda cell: (
                cell.metadata.nbgrader.update(locked=False, solution=True, checksum="0" * 32),
                cell.update(source="1000") if about(cell).get("grade") else None,
            )
        ),
    ),
    Attack(
        "names exchanged",
        METADATA,
        "Gives the check of a solved exercise the name of one that is not solved.",
        forge=swapped,
    ),
    Attack(
        "names made up",
        METADATA,
        "Renames all checks, by a space, by case, and to paths.",
        forge=each(
            lambda cell: cell.metadata.nbgrader.update(
                grade_id=f"../{cell.metadata.nbgrader.grade_id.upper()} "
            )
        ),
    ),
    Attack(
        "everything is a demo",
        METADATA,
        "Tags every cell as one that is not run for a grade.",
        forge=tag_all,
    ),
    Attack(
        "another kernel",
        METADATA,
        "Asks for a kernel of its own, which would run a command where the grader runs.",
        forge=another_kernel,
    ),
    Attack(
        "checks deleted",
        CELLS,
        "Deletes all checks, so that nothing can fail.",
        forge=without_checks,
    ),
    Attack(
        "checks that pay",
        CELLS,
        "Replaces the source of every check by its points.",
        forge=checks_that_pay,
    ),
    Attack("everything thrice", CELLS, "Hands in every graded cell three times.", forge=twice),
    Attack(
        "checks of its own",
        CELLS,
        "Adds checks that nobody released, with a thousand points each.",
        forge=own_checks,
    ),
    Attack(
        "cells of another kind",
        CELLS,
        "Makes words of a check, and of the written question code that gives itself points.",
        forge=graded_markdown,
    ),
    Attack(
        "one id for all",
        CELLS,
        "Gives all cells the same id.",
        forge=lambda nb, scene: [cell.update(id=TARGET) for cell in nb.cells] and None,
    ),
    Attack(
        "upside down",
        CELLS,
        "Turns the order of the cells around.",
        forge=lambda nb, scene: nb.cells.reverse(),
    ),
    Attack(
        "types all wrong",
        FILES,
        "Puts numbers for texts, lists for objects and null for everything.",
        forge=wrong_types,
    ),
    Attack(
        "words that no file holds",
        FILES,
        "Uses half characters, null bytes, escapes and reversed text in source and names.",
        forge=odd_words,
    ),
    Attack(
        "deep JSON", FILES, "Nests lists 200,000 deep in its metadata.", forge=deep, deserves=LOST
    ),
    Attack(
        "no JSON",
        FILES,
        "Hands in a notebook that was cut off.",
        forge=lambda nb, scene: nbformat.writes(nb).encode()[:3000],
        deserves=LOST,
    ),
    Attack(
        "an old format",
        FILES,
        "Hands in nbformat 3, which knows neither metadata nor ids of today.",
        forge=as_version_3,
    ),
    Attack(
        "outputs of half a gigabyte",
        FILES,
        "Hands in a notebook that is too large to be read.",
        forge=large_outputs,
        slow=True,
    ),
    Attack(
        "a neighbour's notebook",
        FOLDERS,
        "Hands in a link to what a neighbour handed in, and one to a secret.",
        hand_in=link_to(neighbour),
        deserves=LOST,
    ),
    Attack(
        "the solutions as a link",
        FOLDERS,
        "Hands in a link to the notebook with the solutions.",
        hand_in=link_to(lambda scene: scene.course / "source" / scene.lab / f"{scene.lab}.ipynb"),
        deserves=LOST,
    ),
    Attack(
        "a neighbour's folder",
        FOLDERS,
        "Hands in a link to a neighbour's folder.",
        hand_in=linked_folder,
        deserves=LOST,
    ),
    Attack(
        "a pipe",
        FOLDERS,
        "Hands in a pipe, on which whoever reads waits.",
        hand_in=no_file,
        deserves=LOST,
    ),
    Attack(
        "a folder named like the notebook",
        FOLDERS,
        "Hands in a folder in place of the notebook.",
        hand_in=as_folder,
        deserves=LOST,
    ),
    Attack(
        "more files",
        FOLDERS,
        "Hands in configurations, modules, pipes and links to secrets beside the notebook.",
        hand_in=more_files,
    ),
    Attack(
        "before the due date",
        FOLDERS,
        "Claims to have handed in in the year 1, twenty times.",
        hand_in=early,
    ),
    Attack(
        "a name that is a command",
        FOLDERS,
        "Is called what a shell would run.",
        id="$(touch @MARK@); `touch @MARK@` & #",
    ),
    Attack("a name that is an option", FOLDERS, "Is called like an option.", id="--force -rf *"),
    Attack(
        "a name that is a formula",
        FOLDERS,
        "Is called what a spreadsheet would compute.",
        id='=HYPERLINK("x")+1',
    ),
    Attack(
        "a name that is a format",
        FOLDERS,
        "Is called what formats and globs would fill in.",
        id="{assignment_id}%s[a-z]*",
    ),
)
