"""Whatever is handed in, what is graded is the student's work, by what was released."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import random
import re
import socket
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbgrader import preprocessors
from nbgrader.api import Gradebook
from nbgrader.nbgraderformat import MetadataValidator
from nbgrader.utils import compute_checksum
from small_course import FIRST, LAB, SECOND, cell_of, make_course, solved, write_root
from sqlalchemy import text

from autograder.course import release
from autograder.intake import (
    Released,
    ReleasedCell,
    Unusable,
    pick,
    read,
    released,
    restore,
    strange_id,
)
from autograder.ipynb import MAX_BYTES, MAX_CELLS, MAX_TEXT, compact, same
from autograder.submission import judge_notebook

pytestmark = pytest.mark.xdist_group("zygote")
ROOT = Path(__file__).parents[2]
EXERCISES = (FIRST, SECOND)
ANSWER = "Because it is so: é, 量, 🙂."


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course in which the small lab is released."""
    root = write_root(tmp_path_factory.mktemp("root"))
    course = tmp_path_factory.mktemp("course") / "term"
    make_course(course, root)
    return course


@pytest.fixture(scope="module")
def lab(course: Path) -> Released:
    with Gradebook(f"sqlite:///{course}/gradebook.db") as gradebook:
        return released(gradebook, LAB, course / "release" / LAB)[LAB]


@pytest.fixture(scope="module")
def untouched(course: Path) -> Any:
    return nbformat.read(course / "release" / LAB / f"{LAB}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def right(course: Path, untouched: Any) -> Any:
    """The notebook of somebody who did everything right."""
    source = nbformat.read(course / "source" / LAB / f"{LAB}.ipynb", as_version=4)
    notebook = solved(untouched, source, *EXERCISES)
    cell_of(notebook, "why").source = ANSWER
    return notebook


def released_of(notebook: Any) -> Released:
    """What was released, by a notebook alone."""
    found, above = [], ""
    for cell in notebook.cells:
        if about := cell.metadata.get("nbgrader"):
            values = {
                key: about.get(key) for key in ("locked", "points", "grade", "solution", "task")
            }
            kept = ReleasedCell(
                name=about.grade_id,
                cell_type=cell.cell_type,
                source=cell.source,
                checksum=about.checksum,
                above=above,
                **values,
            )
            found.append(kept)
        above = same(cell.source)
    plain = [cell for cell in notebook.cells if "nbgrader" not in cell.metadata]
    demos = tuple(same(cell.source) for cell in plain if "tags" in cell.metadata)
    texts = tuple(same(cell.source) for cell in plain)
    return Released("lab", notebook.metadata.kernelspec, tuple(found), demos, texts)


def as_bytes(notebook: Any) -> bytes:
    return json.dumps(notebook, ensure_ascii=False).encode("utf-8", "surrogatepass")


def cells(notebook: Any) -> dict[str, Any]:
    """The cells with an id of nbgrader's, by it."""
    found = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
    names = [cell.metadata.nbgrader.grade_id for cell in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


def assert_sound(notebook: Any, lab: Released) -> None:
    """What holds for every notebook that is to be graded."""
    nbformat.validate(notebook, relax_add_props=False)
    MetadataValidator().validate_nb(notebook)
    json.dumps(notebook, ensure_ascii=False).encode()  # no lone surrogates
    there = cells(notebook)
    about = {cell.name: cell for cell in lab.cells}
    assert there.keys() <= about.keys()
    for name, cell in about.items():
        if cell.grade or cell.locked:
            assert name in there
    for name, cell in there.items():
        expected = about[name]
        said = cell.metadata.nbgrader
        flags = (said.grade, said.solution, said.locked, said.task, said.get("points"))
        assert flags == (
            expected.grade,
            expected.solution,
            expected.locked,
            expected.task,
            expected.points,
        )
        assert said.checksum == expected.checksum
        assert cell.cell_type == expected.cell_type
        assert "tags" not in cell.metadata
        if expected.locked:
            assert cell.source == expected.source
            assert compute_checksum(cell) == expected.checksum
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert notebook.metadata.kernelspec == lab.kernelspec


def judged_sources(notebook: Any) -> dict[str, str]:
    """What defines each exercise where its check stands, as Python has it."""
    defined, found = {}, {}
    for cell in notebook.cells:
        if cell.cell_type != "code" or "demo" in cell.metadata.get("tags", []):
            continue
        about = cell.metadata.get("nbgrader", {})
        if about.get("grade"):
            name = about["grade_id"].removeprefix("check_")
            found[name] = defined.get(name, "")
        for name in re.findall(r"^def (\w+)", cell.source, re.M):
            defined[name] = cell.source
    return found


def restored(notebook: Any, lab: Released) -> Any:
    """The notebook to be graded of one that may be changed in any way; with its notices."""
    result = restore(as_bytes(notebook), lab)
    assert_sound(result.notebook, lab)
    again = restore(as_bytes(result.notebook), lab)
    assert again.notebook == result.notebook  # nothing is left to do
    return result


# --- what was released --------------------------------------------------------------------------


def test_what_was_released_is_what_the_released_notebook_says(
    lab: Released, untouched: Any
) -> None:
    there = cells(untouched)
    assert [cell.name for cell in lab.cells] == list(there)
    for cell in lab.cells:
        said = there[cell.name].metadata.nbgrader
        assert cell.source == there[cell.name].source
        assert (cell.points, cell.checksum) == (said.get("points"), said.checksum)
        assert (cell.locked, cell.grade, cell.solution) == (said.locked, said.grade, said.solution)
    assert lab.kernelspec == untouched.metadata.kernelspec
    assert lab.demos == ('raise RuntimeError("demo cells are not for grading")',)
    assert lab.cells[-1].above == "**Question.** Why?"
    assert pickle.loads(pickle.dumps(lab)) == lab
    assert json.dumps(dataclasses.asdict(lab))


def test_the_order_of_cells_is_that_of_the_latest_release(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    course = tmp_path / "course"
    make_course(course, write_root(root))
    with Gradebook(f"sqlite:///{course}/gradebook.db") as gradebook:
        gradebook.add_student("ada")
        gradebook.add_submission(LAB, "ada")  # so nbgrader changes rows and adds none
    path = course / "source" / LAB / f"{LAB}.ipynb"
    source = nbformat.read(path, as_version=4)
    source.cells = [source.cells[0], *reversed(source.cells[1:])]
    nbformat.write(source, path)
    release(course, LAB)
    with Gradebook(f"sqlite:///{course}/gradebook.db") as gradebook:
        in_rows = released(gradebook, LAB)[LAB]
        right = released(gradebook, LAB, course / "release" / LAB)[LAB]
        assert released(gradebook, "lab8_none") == {}
        elsewhere = released(gradebook, LAB, tmp_path)[LAB]
        gradebook.db.execute(text("ANALYZE"))
    names = [cell.name for cell in right.cells]
    assert names[0] == "why"
    assert [cell.name for cell in in_rows.cells] == names[::-1]  # what the folder is good for
    assert elsewhere == in_rows


# --- what is graded -----------------------------------------------------------------------------


def test_an_untouched_notebook_is_restored_to_itself(untouched: Any, lab: Released) -> None:
    result = restored(untouched, lab)
    assert result.notebook == untouched
    assert result.notices == []


def test_honest_work_is_restored_to_what_nbgrader_makes_of_it(
    right: Any, lab: Released, course: Path
) -> None:
    handed_in = copy.deepcopy(right)
    for cell in handed_in.cells:
        if cell.cell_type == "code":
            cell.execution_count = 7
            cell.outputs = [nbformat.v4.new_output("stream", text="step\n" * 9)]
    handed_in.metadata.kernelspec = {"name": "conda-env-dl", "display_name": "my environment"}
    check = cell_of(handed_in, f"check_{SECOND}")
    check.source = "100"
    check.metadata.nbgrader.points = 100
    theirs = copy.deepcopy(handed_in)
    where = {"notebook": LAB, "assignment": LAB, "db_url": f"sqlite:///{course}/gradebook.db"}
    for step in ("ClearOutput", "DeduplicateIds", "OverwriteKernelspec", "OverwriteCells"):
        theirs, _ = getattr(preprocessors, step)().preprocess(theirs, {"nbgrader": where})
    result = restored(handed_in, lab)
    assert result.notebook == theirs
    assert result.notices == [
        f"The points of check_{SECOND} had been changed and were put right.",
        f"Locked cells had been changed and were put right: check_{SECOND}.",
    ]


def take(notebook: Any, grade_id: str) -> Any:
    """A cell, taken out of its notebook."""
    cell = cell_of(notebook, grade_id)
    notebook.cells.remove(cell)
    return cell


def beside(notebook: Any, grade_id: str, cell: Any, below: int) -> None:
    """Put a cell above or ``below`` another."""
    notebook.cells.insert(notebook.cells.index(cell_of(notebook, grade_id)) + below, cell)


def plain(source: str) -> Any:
    return nbformat.v4.new_code_cell(source)


def stub(notebook: Any, name: str) -> Any:
    """A copy of a solution cell before anything was done in it, with its id."""
    cell = copy.deepcopy(cell_of(notebook, name))
    head = cell.source.split("### BEGIN SOLUTION")[0].rstrip()
    cell.source = f"{head}\n    # Your code here\n    raise NotImplementedError"
    return cell


def delete_everything_graded(nb: Any) -> None:
    nb.cells = [cell for cell in nb.cells if not cell.metadata.get("nbgrader", {}).get("grade")]


def delete_the_second_check(nb: Any) -> None:
    take(nb, f"check_{SECOND}")


def move_the_solution_below_its_check(nb: Any) -> None:
    cell = take(nb, FIRST)
    beside(nb, f"check_{FIRST}", cell, below=1)


def move_all_solutions_to_the_end(nb: Any) -> None:
    nb.cells += [take(nb, name) for name in EXERCISES]


def turn_it_upside_down(nb: Any) -> None:
    nb.cells.reverse()


def keep_the_stub_above(nb: Any) -> None:
    beside(nb, FIRST, stub(nb, FIRST), below=0)


def keep_the_stub_below(nb: Any) -> None:
    beside(nb, FIRST, stub(nb, FIRST), below=1)


def keep_the_stub_at_the_end(nb: Any) -> None:
    nb.cells.append(stub(nb, FIRST))


def solve_in_a_new_cell_below_the_check(nb: Any) -> None:
    source = cell_of(nb, FIRST).source
    cell_of(nb, FIRST).source = stub(nb, FIRST).source
    beside(nb, f"check_{FIRST}", plain(source), below=1)


def solve_in_a_new_cell_and_empty_the_old(nb: Any) -> None:
    beside(nb, f"check_{FIRST}", plain(cell_of(nb, FIRST).source), below=1)
    cell_of(nb, FIRST).source = ""


def solve_inside_the_check(nb: Any) -> None:
    check = cell_of(nb, f"check_{FIRST}")
    check.source = f"{take(nb, FIRST).source}\n\n{check.source}"


def merge_solution_and_check(nb: Any) -> None:
    cell_of(nb, FIRST).source += "\n\n" + take(nb, f"check_{FIRST}").source


def merge_all_solutions(nb: Any) -> None:
    cell_of(nb, FIRST).source += "\n\n" + take(nb, SECOND).source


def try_something_wrong_at_the_end(nb: Any) -> None:
    wrong = copy.deepcopy(cell_of(nb, FIRST))
    wrong.source = f"def {FIRST}(x):\n    return x"
    nb.cells.append(wrong)


def split_the_solution(nb: Any) -> None:
    cell = cell_of(nb, FIRST)
    beside(nb, FIRST, copy.deepcopy(cell), below=1)
    cell.source = "import torch"


def copy_the_check(nb: Any) -> None:
    beside(nb, f"check_{FIRST}", copy.deepcopy(cell_of(nb, f"check_{FIRST}")), below=0)
    nb.cells.insert(1, copy.deepcopy(cell_of(nb, f"check_{FIRST}")))


def tag_everything_demo(nb: Any) -> None:
    for cell in nb.cells:
        cell.metadata["tags"] = ["demo"]


def swap_the_ids_of_the_solutions(nb: Any) -> None:
    first, second = (cell_of(nb, name) for name in EXERCISES)
    first.metadata, second.metadata = second.metadata, first.metadata
    first.id, second.id = second.id, first.id


def swap_the_ids_of_the_checks(nb: Any) -> None:
    first, second = (cell_of(nb, f"check_{name}") for name in EXERCISES)
    first.metadata, second.metadata = second.metadata, first.metadata


def rename_the_ids(nb: Any) -> None:
    for name in (*EXERCISES, f"check_{FIRST}"):
        cell_of(nb, name).metadata.nbgrader.grade_id += "_mine"


def lose_the_metadata(nb: Any) -> None:
    for cell in nb.cells:
        cell.metadata = {}


def lose_metadata_and_ids(nb: Any) -> None:
    lose_the_metadata(nb)
    nb.nbformat_minor = 4
    for cell in nb.cells:
        del cell["id"]


def lose_both_and_the_checks(nb: Any) -> None:
    delete_everything_graded(nb)
    lose_metadata_and_ids(nb)


def change_every_flag(nb: Any) -> None:
    for cell in nb.cells:
        if about := cell.metadata.get("nbgrader"):
            about |= {"grade": not about.grade, "solution": not about.solution, "locked": 1}
            about |= {"points": 1000, "checksum": "0" * 32, "task": True, "schema_version": 9}


def change_every_type(nb: Any) -> None:
    for cell in nb.cells:
        cell["cell_type"] = "raw" if cell.cell_type == "code" else "code"


def write_windows_line_ends(nb: Any) -> None:
    for cell in nb.cells:
        cell.source = cell.source.replace("\n", "\r\n") + "\r\n"


def write_lists_of_lines(nb: Any) -> None:
    for cell in nb.cells:
        cell["source"] = cell.source.splitlines(keepends=True)


def claim_more_points(nb: Any) -> None:
    cell = plain("100")
    cell.metadata.nbgrader = dict(cell_of(nb, f"check_{FIRST}").metadata.nbgrader)
    cell.metadata.nbgrader |= {"grade_id": "check_bonus<script>", "points": 100}
    nb.cells.append(cell)


STILL_RIGHT = {
    delete_everything_graded: r"deleted .* put back: check_\w+, check_\w+, why",
    delete_the_second_check: f"deleted .* put back: check_{SECOND}",
    move_the_solution_below_its_check: f"stood above the solution .*: {FIRST}",
    move_all_solutions_to_the_end: f"stood above the solution .*: {FIRST}, {SECOND}",
    turn_it_upside_down: f"stood above the solution .*: {FIRST}, {SECOND}",
    keep_the_stub_above: "",
    keep_the_stub_below: "",
    keep_the_stub_at_the_end: "",
    solve_in_a_new_cell_below_the_check: f"stood above the solution .*: {FIRST}",
    solve_in_a_new_cell_and_empty_the_old: f"stood above the solution .*: {FIRST}",
    solve_inside_the_check: f"what stood in them was run above: check_{FIRST}",
    merge_solution_and_check: f"deleted .* put back: check_{FIRST}",
    merge_all_solutions: "",
    try_something_wrong_at_the_end: f"more than once: {FIRST}. As in Python",
    split_the_solution: "",
    copy_the_check: "",
    tag_everything_demo: "",
    swap_the_ids_of_the_solutions: "",
    swap_the_ids_of_the_checks: "stood above the solution",
    rename_the_ids: f"Never released, .* call themselves {FIRST}_mine, check_",
    lose_the_metadata: "",
    lose_metadata_and_ids: "ids were lost",
    lose_both_and_the_checks: "ids were lost",
    change_every_flag: "points of .* had been changed",
    change_every_type: "",
    write_windows_line_ends: "",
    write_lists_of_lines: "",
    claim_more_points: "Never released, .* call themselves check_bonus<script>",
}


@pytest.mark.parametrize("change", STILL_RIGHT, ids=lambda change: change.__name__)
def test_right_work_is_judged_however_the_cells_were_changed(
    change: Any, right: Any, lab: Released
) -> None:
    notebook = copy.deepcopy(right)
    change(notebook)
    result = restored(notebook, lab)
    wanted = judged_sources(right)
    found = judged_sources(result.notebook)
    for name in EXERCISES:
        definition = wanted[name][wanted[name].index(f"def {name}") :]
        assert definition in found[name].replace("\r\n", "\n")
    if change not in (delete_everything_graded, lose_both_and_the_checks):
        assert cells(result.notebook)["why"].source.rstrip() == ANSWER
    said = "\n".join(result.notices)
    assert re.search(STILL_RIGHT[change], said) if STILL_RIGHT[change] else not said


@pytest.mark.parametrize(
    "change",
    [
        turn_it_upside_down,
        lose_metadata_and_ids,
        solve_inside_the_check,
        solve_in_a_new_cell_below_the_check,
        keep_the_stub_below,
        tag_everything_demo,
        swap_the_ids_of_the_solutions,
        write_windows_line_ends,
    ],
    ids=lambda change: change.__name__,
)
def test_right_work_gets_its_points_however_the_cells_were_changed(
    change: Any, right: Any, lab: Released, zygote: Any
) -> None:
    notebook = copy.deepcopy(right)
    change(notebook)
    verdicts = judge_notebook(restore(as_bytes(notebook), lab).notebook, zygote)
    assert {name: verdicts[name].passed for name in EXERCISES} == dict.fromkeys(EXERCISES, True)


def test_what_was_never_written_gets_no_points_and_the_verdict_says_why(
    right: Any, lab: Released, zygote: Any
) -> None:
    notebook = copy.deepcopy(right)
    take(notebook, FIRST)
    cell_of(notebook, SECOND).source = stub(notebook, SECOND).source
    result = restored(notebook, lab)
    assert f"No cell has or defines {FIRST}." in result.notices
    verdicts = judge_notebook(result.notebook, zygote)
    assert [verdicts[name].points for name in EXERCISES] == [0, 0]
    why = verdicts[FIRST].first_failure.failure.message
    assert why == f"no function is called {FIRST}, and its cell is missing"
    assert verdicts[SECOND].todo


def test_a_cell_that_holds_several_solutions_keeps_its_own_id(right: Any, lab: Released) -> None:
    notebook = copy.deepcopy(right)
    cell_of(notebook, SECOND).source += "\n\n" + take(notebook, FIRST).source
    result = restored(notebook, lab)
    assert cells(result.notebook).keys() == cells(right).keys() - {FIRST}
    assert all(judged_sources(result.notebook).values())


def test_checks_find_their_solutions_whatever_order_the_gradebook_has(
    right: Any, lab: Released
) -> None:
    notebook = copy.deepcopy(right)
    delete_everything_graded(notebook)
    first, first_check, second, second_check, why = lab.cells
    mixed = dataclasses.replace(lab, cells=(first, second_check, second, first_check, why))
    result = restored(notebook, mixed)
    assert judged_sources(result.notebook) == judged_sources(right)


def test_what_has_no_place_comes_first_if_it_is_needed_and_last_if_it_is_judged(
    lab: Released,
) -> None:
    setup = ReleasedCell("setup", "code", "import torch", True, None, False, False, False, "0" * 32)
    check = next(cell for cell in lab.cells if cell.name == f"check_{FIRST}")
    both = dataclasses.replace(lab, cells=(setup, check))
    work = f"{FIRST} = lambda x: (x, 1)"  # nothing here looks like a definition
    notebook = nbformat.v4.new_notebook(cells=[plain(work)])
    result = restore(as_bytes(notebook), dataclasses.replace(lab, cells=(check,)))
    assert [cell.source for cell in result.notebook.cells] == [work, check.source]
    notebook.cells.append(nbformat.v4.new_code_cell("", id="setup"))
    result = restore(as_bytes(notebook), both)
    assert [cell.source for cell in result.notebook.cells] == [work, setup.source, check.source]
    del notebook.cells[1]
    notebook.cells.append(plain(check.source))
    result = restore(as_bytes(notebook), both)
    assert [cell.source for cell in result.notebook.cells] == [setup.source, work, check.source]


def test_a_deleted_question_comes_back_empty(right: Any, lab: Released, untouched: Any) -> None:
    notebook = copy.deepcopy(right)
    take(notebook, "why")
    result = restored(notebook, lab)
    assert cells(result.notebook)["why"] == cell_of(untouched, "why")
    assert result.notices == ["Cells had been deleted and were put back: why."]


def test_of_several_answers_the_last_that_was_worked_on_counts(
    right: Any, lab: Released, untouched: Any
) -> None:
    notebook = copy.deepcopy(right)
    notebook.cells.append(copy.deepcopy(cell_of(untouched, "why")))
    result = restored(notebook, lab)
    assert cells(result.notebook)["why"].source == ANSWER
    assert result.notices == ["There more than once: why. The last that was worked on counts."]
    notebook.cells[-1].source = "I changed my mind."
    result = restored(notebook, lab)
    assert cells(result.notebook)["why"].source == "I changed my mind."
    assert ANSWER in [cell.source for cell in result.notebook.cells]  # a person can still see it


def test_an_answer_in_the_question_is_pointed_out(untouched: Any, lab: Released) -> None:
    notebook = copy.deepcopy(untouched)
    question = next(cell for cell in notebook.cells if cell.source == "**Question.** Why?")
    question.source += " Because."
    result = restored(notebook, lab)
    assert result.notices == [
        "No answer to why, but its question was changed: perhaps it is there."
    ]


def test_cells_that_are_only_like_an_answer_are_not_taken_for_one(
    right: Any, lab: Released
) -> None:
    notebook = copy.deepcopy(right)
    lose_metadata_and_ids(notebook)
    del notebook.cells[-1]  # the answer
    notebook.cells.append(notebook.cells[0])  # what stands below the question now is the title
    result = restored(notebook, lab)
    assert cells(result.notebook)["why"].source == "*Your answer here*"


def test_demo_cells_are_known_without_their_tags(right: Any, lab: Released) -> None:
    notebook = copy.deepcopy(right)
    lose_metadata_and_ids(notebook)
    demos = [
        c for c in restored(notebook, lab).notebook.cells if c.metadata.get("tags") == ["demo"]
    ]
    assert [cell.source for cell in demos] == list(lab.demos)


def test_another_notebook_is_called_so(lab: Released) -> None:
    notebook = nbformat.v4.new_notebook(cells=[plain("1 + 1")])
    result = restored(notebook, lab)
    assert result.notices == [
        "Nothing of this lab is in it: perhaps another notebook was handed in."
    ]
    assert judged_sources(result.notebook) == {FIRST: "", SECOND: ""}


def test_pasted_images_stay_and_nothing_else_that_is_attached(right: Any, lab: Released) -> None:
    notebook = copy.deepcopy(right)
    image = {"image/png": "iVBORw0KGgo="}
    cell_of(notebook, "why")["attachments"] = {
        "a.png": image | {"text/html": "<script>"},
        "b.png": {'image/png" onload="': "iVBO"},
        "c.png": {"image/png": '"><script>'},
        "d.png": 3,
        "e\ud800.png": image,
        "f.svg": {"image/svg+xml": "aaaa"},
    }
    result = restore(json.dumps(notebook).encode(), lab)
    assert_sound(result.notebook, lab)
    kept = cells(result.notebook)["why"].attachments
    assert kept == {"a.png": image, "e\ufffd.png": image}


# --- what a file may be -------------------------------------------------------------------------


def version_3(notebook: Any) -> Any:
    """The notebook as Jupyter wrote it ten years ago."""
    return json.loads(nbformat.v3.writes_json(nbformat.v4.downgrade(copy.deepcopy(notebook))))


def changed(notebook: Any, **values: Any) -> bytes:
    return as_bytes(json.loads(json.dumps(notebook)) | values)


def with_output(notebook: Any, output: str) -> bytes:
    return as_bytes(notebook).replace(b'"outputs": []', f'"outputs": [{output}]'.encode())


READABLE = {
    "as it is": as_bytes,
    "byte order mark": lambda nb: b"\xef\xbb\xbf" + as_bytes(nb),
    "UTF-16": lambda nb: as_bytes(nb).decode().encode("utf-16"),
    "UTF-16 without a mark": lambda nb: as_bytes(nb).decode().encode("utf-16-le"),
    "UTF-32": lambda nb: as_bytes(nb).decode().encode("utf-32"),
    "padded with zeros": lambda nb: as_bytes(nb) + bytes(5000),
    "NaN in an output": lambda nb: with_output(nb, '{"data": {"a": [NaN, -Infinity]}}'),
    "lone surrogates in an output": lambda nb: with_output(nb, r'{"text": "\ud800"}'),
    "not UTF-8 in an output": lambda nb: as_bytes(nb).replace(
        b'"outputs": []', b'"outputs": ["\xff\xfe"]'
    ),
    "line breaks within strings": lambda nb: with_output(nb, '{"text": "a\nb\tc"}'),
    "a huge integer": lambda nb: with_output(nb, "NaN, 1" + "0" * 5000),
    "deep, but not too deep": lambda nb: with_output(nb, "[" * 300 + "]" * 300),
    "the future": lambda nb: changed(nb, nbformat=4, nbformat_minor=99),
    "nbformat is missing": lambda nb: changed(nb, nbformat=None, metadata=3),
    "nbformat is 5": lambda nb: changed(nb, nbformat=5),
    "nbformat 3": lambda nb: as_bytes(version_3(nb)),
    "a key twice": lambda nb: as_bytes(nb).replace(b'"cells": [', b'"cells": [], "cells": [', 1),
    "cells that are none": lambda nb: as_bytes(nb).replace(
        b'"cells": [', b'"cells": [3, null, [], ', 1
    ),
}


@pytest.mark.parametrize("how", READABLE)
def test_a_notebook_is_read_in_whatever_way_it_was_written(
    how: str, right: Any, lab: Released
) -> None:
    result = restore(READABLE[how](right), lab)
    assert_sound(result.notebook, lab)
    assert judged_sources(result.notebook) == judged_sources(right)
    assert cells(result.notebook)["why"].source == ANSWER


def test_latin_1_is_read_as_such_and_pointed_out(right: Any, lab: Released) -> None:
    notebook = copy.deepcopy(right)
    cell_of(notebook, "why").source = "Déjà vu"
    result = restore(as_bytes(notebook).decode().encode("latin-1", "replace"), lab)
    assert cells(result.notebook)["why"].source == "Déjà vu"
    assert "not UTF-8" in result.notices[0]


def test_characters_that_no_program_can_hold_are_replaced(right: Any, lab: Released) -> None:
    notebook = copy.deepcopy(right)
    cell_of(notebook, "why").source = "a\0b\ud800c"
    result = restore(json.dumps(notebook).encode(), lab)
    assert_sound(result.notebook, lab)
    assert cells(result.notebook)["why"].source == "a\ufffdb\ufffdc"


UNREADABLE = {
    "is empty": b"",
    "is empty: ask": b" \n\n",
    "holds nothing but zero bytes": bytes(10000),
    "is a zip archive": b"PK\x03\x04\x14\0\0\0",
    "is a PDF": b"%PDF-1.7 ...",
    "is a web page": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    "looks like a Python script": b"# Lab 7\nimport torch\n\ndef f(x):\n    return x\n",
    "is JSON, but no notebook, for it has no cells": b'{"a": 1}',
    "is JSON, but no notebook: ask": b"[1, 2]",
    "no notebook, for it has no cells": b'{"cells": {}, "worksheets": 3}',
    "breaks off after": b'{"cells": [{"cell_type": "code", "source": "def f',
    "is damaged in line 1": b'{"cells": [}]}',
    "marks of an unfinished merge": b'{"cells": [\n<<<<<<< HEAD\n1\n=======\n2\n>>>>>>> b\n]}',
    "nested too deeply to be": b'{"cells": [{"outputs": ' + b"[" * 9000 + b"]" * 9000 + b"}]}",
    "nested too deeply": b'{"cells": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
    "begins with 'hello": b"hello there",
    "is no notebook, but begins with '.x89HDF": b"\x89HDF\r\n\x1a\n\0\0",
    f"more than {MAX_CELLS} cells": b'{"cells": [' + b"{}," * MAX_CELLS + b"{}]}",
    f"more than {MAX_CELLS} cells: ask": b'{"cells": [3' + b",{}" * (MAX_CELLS + 1) + b"]}",
    "16 MB of text even without its outputs": b'{"cells": [{"source": "'
    + b"x" * MAX_TEXT
    + b'"}]}',
    "has 16 MB and is no proper JSON": b'{"cells": [NaN, "' + b"x" * MAX_TEXT + b'"]}',
}


@pytest.mark.parametrize("why", UNREADABLE)
def test_what_is_no_notebook_is_named(why: str, lab: Released) -> None:
    with pytest.raises(Unusable) as error:
        restore(UNREADABLE[why], lab)
    said = str(error.value)
    assert re.match(rf"{LAB}.ipynb .*{why}", said)
    assert "ask the student" in said
    assert "\n" not in said


def test_outputs_cost_nothing(right: Any, lab: Released) -> None:
    notebook = copy.deepcopy(right)
    wide = "x" * (MAX_TEXT // 2) + "🙂"
    for name in (*EXERCISES, f"check_{FIRST}"):
        cell_of(notebook, name).outputs = [
            {"output_type": "stream", "name": "stdout", "text": [wide]}
        ]
    data = as_bytes(notebook)
    assert len(data) > MAX_TEXT
    assert len(compact(data, LAB, [])) < 20_000
    assert restore(data, lab) == restore(as_bytes(right), lab)
    # Of images there can be too many: then they go, and the words stay.
    cell_of(notebook, "why")["attachments"] = {"a.png": {"image/png": "a" * MAX_TEXT}}
    assert restore(as_bytes(notebook), lab) == restore(as_bytes(right), lab)


def test_what_would_fill_the_memory_is_refused_while_it_is_read() -> None:
    for begin in (b'{"cells": [{}', b'{"worksheets": [{}', b'{"worksheets": [{"cells": [{}'):
        with pytest.raises(Unusable, match=f"more than {MAX_CELLS} cells"):
            compact(begin + b",{}" * MAX_CELLS, LAB, [])  # no need to read to the end


# --- anything at all ----------------------------------------------------------------------------

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [FIRST, f"check_{FIRST}", "why", "code", "markdown", "cells", "\ud800", "\0"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON tree."""
    keys = (
        list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    )
    return [place for key in keys for place in [(tree, key), *places(tree[key])]]


def mutate(tree: Any, data: st.DataObject) -> None:
    """Change one thing in a notebook as JSON."""
    if not (there := places(tree)):
        return
    container, key = there[data.draw(st.integers(0, len(there) - 1))]
    what = data.draw(st.sampled_from(["delete", "junk", "again", "shuffle", "from elsewhere"]))
    if what == "delete":
        del container[key]
    elif what == "again" and isinstance(container, list):
        container.insert(data.draw(st.integers(0, len(container))), copy.deepcopy(container[key]))
    elif what == "shuffle" and isinstance(container[key], list):
        random.Random(data.draw(st.integers(0, 99))).shuffle(container[key])
    elif what == "from elsewhere":
        other, where = there[data.draw(st.integers(0, len(there) - 1))]
        container[key] = copy.deepcopy(other[where])
    else:
        container[key] = data.draw(JUNK)


def restored_if_usable(data: bytes, lab: Released) -> Any:
    """A sound notebook with its notices, or None if one sentence says why there is none."""
    said = ""
    try:
        result = restore(data, lab)
    except Unusable as unusable:
        said = str(unusable)
    if said:
        assert re.fullmatch(rf"{LAB}\.ipynb .+", said)
        assert said.isprintable()
        return None
    assert_sound(result.notebook, lab)
    for notice in result.notices:
        assert re.fullmatch(r"[A-Zn].{20,600}\.", notice)
        assert notice.isprintable()
    return result


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_becomes_of_a_notebook_the_result_is_sound(
    right: Any, lab: Released, data: st.DataObject
) -> None:
    tree = json.loads(json.dumps(right))
    for _ in range(data.draw(st.integers(1, 12))):
        mutate(tree, data)
    result = restored_if_usable(json.dumps(tree).encode(), lab)
    if result:
        again = restore(as_bytes(result.notebook), lab)
        assert again.notebook == result.notebook


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_the_bytes_are_there_is_a_notebook_or_one_sentence(
    right: Any, lab: Released, data: st.DataObject
) -> None:
    pieces = bytearray(
        data.draw(st.sampled_from([as_bytes(right), as_bytes(version_3(right)), b""]))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(pieces)))
        end = begin + data.draw(st.sampled_from([0, 1, 2, 50, 10**6]))
        token = st.sampled_from(
            [b"[", b"}", b'"', b"\\", b"\0", b"NaN", b"1e999", b"\\ud800", b"<<<<<<< "]
        )
        pieces[begin:end] = data.draw(st.binary(max_size=8) | token)
    restored_if_usable(bytes(pieces), lab)


NOISE = (
    plain("print('hello')"),
    plain("%%time\nx = 3"),
    plain(f"check({FIRST})"),
    plain(f"{FIRST}(torch.ones(3), 4)"),
    nbformat.v4.new_markdown_cell(f"def {FIRST}(x): ..."),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_shuffled_noisy_and_copied_right_work_stays_right(
    right: Any, lab: Released, data: st.DataObject
) -> None:
    notebook = copy.deepcopy(right)
    notebook.cells += copy.deepcopy(data.draw(st.lists(st.sampled_from(NOISE), max_size=4)))
    copied = data.draw(st.lists(st.sampled_from(range(len(right.cells))), max_size=4))
    notebook.cells += [copy.deepcopy(right.cells[i]) for i in copied]
    stubs = data.draw(st.lists(st.sampled_from(EXERCISES), max_size=2))
    notebook.cells += [stub(right, name) for name in stubs]
    if data.draw(st.booleans()):
        random.Random(data.draw(st.integers(0, 10**6))).shuffle(notebook.cells)
    for name in data.draw(st.sets(st.sampled_from([f"check_{n}" for n in EXERCISES]))):
        notebook.cells = [c for c in notebook.cells if c.id != name]
    lose = data.draw(st.sampled_from([lambda nb: None, lose_the_metadata, tag_everything_demo]))
    lose(notebook)
    result = restore(as_bytes(notebook), lab)
    assert_sound(result.notebook, lab)
    assert judged_sources(result.notebook) == judged_sources(right)
    assert cells(result.notebook)["why"].source == ANSWER


def test_every_lab_is_restored_to_itself() -> None:
    for path in sorted((ROOT / "labs").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        lab = released_of(notebook)
        assert restored(notebook, lab).notebook == notebook
        lose_metadata_and_ids(notebook)
        bare = restored(notebook, lab)
        assert list(cells(bare.notebook)) == [cell.name for cell in lab.cells]
        assert bare.notices == ["nbgrader's ids were lost: cells were told by what they define."]


# --- files --------------------------------------------------------------------------------------

NAME = "lab1_quantization"
MEANT = {
    "exactly": (f"{NAME}.ipynb", "notes.txt", "timestamp.txt"),
    "case": (NAME.title() + ".IPYNB",),
    "gaps": ("lab1 quantization.ipynb",),
    "downloaded twice": (f"{NAME} (1).ipynb",),
    "macOS": (f"{NAME} Kopie.ipynb", f"._{NAME}.ipynb"),
    "jupyter": (f"{NAME}-Copy1.ipynb",),
    "from a learning platform": (f"ada_12345_{NAME}.ipynb",),
    "another name": ("Untitled.ipynb",),
    "like it rather than near it": (f"{NAME.upper()}.ipynb", f"{NAME}-1.ipynb"),
    "near it rather than not": (f"{NAME}-final.ipynb", "Untitled.ipynb"),
}


def folder_of(tmp_path: Path, *files: str) -> Path:
    folder = tmp_path / "submitted" / "ada" / NAME
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


@pytest.mark.parametrize("why", MEANT)
def test_the_file_that_is_plainly_meant_counts(why: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *MEANT[why])
    picked = pick(folder, [NAME])
    assert picked.paths == {NAME: folder / MEANT[why][0]}
    said = "\n".join(picked.notices)
    assert (f"There is no {NAME}.ipynb; {MEANT[why][0]} was graded" in said) == (why != "exactly")
    others = [file for file in MEANT[why][1:] if file.endswith(".ipynb") and file[0] != "."]
    for file in others:
        assert f"{file} was not graded" in said


def test_of_several_the_exact_name_counts_and_the_others_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, f"{NAME}.ipynb", f"{NAME} (1).ipynb", "z.ipynb")
    picked = pick(folder, [NAME])
    assert picked.paths == {NAME: folder / f"{NAME}.ipynb"}
    assert picked.notices == [
        f"{NAME} (1).ipynb, z.ipynb was not graded: by their names, what counts is {NAME}.ipynb."
    ]


def test_what_cannot_be_told_is_not_guessed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, f"{NAME} (1).ipynb", f"{NAME} (2).ipynb")
    with pytest.raises(Unusable, match=r"\(1\).ipynb, .* could each be .*: remove all but one"):
        pick(folder, [NAME])
    with pytest.raises(Unusable, match=r"no other.ipynb was handed in; there is lab1_quant"):
        pick(folder, ["other"])


def test_where_nothing_is_the_folder_is_described(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "timestamp.txt")
    with pytest.raises(Unusable, match=rf"^no {NAME}.ipynb was handed in: the folder is empty$"):
        pick(folder, [NAME])
    (folder / "lab").mkdir()
    (folder / "lab1.pdf").touch()
    with pytest.raises(Unusable, match=r"handed in; there is lab \(a folder\), lab1.pdf: ask"):
        pick(folder, [NAME])
    with pytest.raises(Unusable, match="cannot be read: No such file"):
        pick(folder / "none", [NAME])


def test_several_notebooks_are_told_apart(tmp_path: Path) -> None:
    names = ["part1", "part1_more", "part2"]
    folder = folder_of(tmp_path, "part1.ipynb", "ada_part1_more.ipynb", "solution.ipynb")
    picked = pick(folder, names)
    assert {name: path.name for name, path in picked.paths.items()} == {
        "part1": "part1.ipynb",
        "part1_more": "ada_part1_more.ipynb",
        "part2": "solution.ipynb",
    }
    (folder / "solution.ipynb").unlink()
    assert pick(folder, names).notices[-1] == "Not handed in, and not graded: part2.ipynb."


def test_links_pipes_sockets_and_folders_are_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.ipynb"
    secret.write_text("{}")
    folder = folder_of(tmp_path)
    exact = folder / f"{NAME}.ipynb"
    makers = {
        "link": lambda: exact.symlink_to(secret),
        "device or pipe": lambda: os.mkfifo(exact),
        "folder": exact.mkdir,
    }
    for kind, make in makers.items():
        make()
        with pytest.raises(Unusable, match=rf"there is {NAME}.ipynb \(a {kind}\)"):
            pick(folder, [NAME])
        with pytest.raises(Unusable, match=rf"^{NAME}.ipynb (is a {kind}|cannot be read)"):
            read(exact)
        (folder / "other.ipynb").write_text("{}")
        picked = pick(folder, [NAME])
        assert picked.paths[NAME].name == "other.ipynb"
        assert any(f"{NAME}.ipynb is a {kind}" in notice for notice in picked.notices)
        (folder / "other.ipynb").unlink()
        exact.rmdir() if kind == "folder" else exact.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)  # the path of a socket must be short
        listener.bind(exact.name)
        with pytest.raises(Unusable):
            read(exact)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(Unusable, match="the submission is a link where a folder must be"):
        pick(link, [NAME])
    with pytest.raises(Unusable, match="the submission is a file where a folder must be"):
        pick(secret, [NAME])


def test_what_may_not_be_read_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, f"{NAME}.ipynb")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(Unusable, match="may not be read: change its permissions"):
        pick(folder, [NAME])


def test_reading_gives_the_bytes_and_of_large_files_what_is_graded(
    tmp_path: Path, right: Any, lab: Released
) -> None:
    path = tmp_path / "a.ipynb"
    path.write_bytes(as_bytes(right))
    assert read(path) == as_bytes(right)
    cell_of(large := copy.deepcopy(right), FIRST).outputs = ["x" * MAX_TEXT]
    path.write_bytes(as_bytes(large))
    assert len(read(path)) < 20_000
    assert restore(read(path), lab) == restore(as_bytes(right), lab)
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(
        Unusable, match=r"a.ipynb has 512 MB, more than 512 MB: ask the student to clear"
    ):
        read(path)
    with pytest.raises(Unusable, match=r"b.ipynb cannot be read: No such file"):
        read(tmp_path / "b.ipynb")


@settings(max_examples=50, deadline=None)
@given(
    names=st.sets(
        st.binary(min_size=1, max_size=20).filter(lambda b: not set(b) & set(b"\0/")), max_size=4
    )
)
def test_file_names_may_hold_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, names: set[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    for name in names - {b".", b".."}:
        Path(folder, os.fsdecode(name) + ".ipynb").touch()
    try:
        said = " ".join(pick(folder, [NAME]).notices)
    except Unusable as error:
        said = str(error)
    assert said.isprintable()


def test_ids_that_would_do_harm_are_named() -> None:
    for harmful in (
        "",
        ".",
        "..",
        "a/b",
        "..\\a",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "a\u202eb",
        "x" * 129,
    ):
        said = strange_id(harmful)
        assert said.isprintable()
        assert "cannot be a student's id" in said
        assert len(said) < 250
    assert "not UTF-8" in strange_id(os.fsdecode(b"J\xf6rg"))
    for harmless in (
        "ada",
        "-rf",
        "Jörg",
        "李",
        "a b",
        "<b onclick=x>",
        "%s{0}",
        "x" * 128,
    ):
        assert strange_id(harmless) == ""
