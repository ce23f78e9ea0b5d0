"""The builder: what an authored lab becomes, and what it refuses."""

import builtins
import inspect
import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import nbformat
import pytest
import torch
from nbgrader.utils import is_grade, is_solution

import fewer.quantization as quantization
from autograder import build as builder
from autograder.build import LabError, build, labs, released, source_notebook, student_notebook
from autograder.exercise import Exercise, exercises
from autograder.strategies import tensors
from autograder.verdict import Verdict

ROOT = Path(__file__).parents[2]
LABS = labs(ROOT)

HEAD = """\
# %% [markdown]
# # Lab 9. Everything at once

# %%
from autograder import check
"""
SYMMETRIC = """
# %% tags=["exercise"]
from fewer.quantization import quantize_symmetric

# %% tags=["check"]
check(quantize_symmetric)
"""
CLIP = SYMMETRIC.replace("quantize_symmetric", "clip_by_mse")
WRITTEN = """
# %% [markdown] tags=["written"] id="why" points=4
# **Question.** Why?
#
# **Answer.** Because of the secret.
#
# **Rubric.** 4 points for the secret.
"""


@pytest.fixture
def few_exercises(monkeypatch):
    """Two exercises, one of which calls the other, whatever the course has."""
    made = {}
    for name in ("quantize_symmetric", "clip_by_mse"):
        reference = getattr(quantization, name)
        exercise = Exercise(reference, paper="Author 2020 | section 2", difficulty=2, minutes=7)

        @exercise.check(points=3, hint="none", x=tensors())
        def holds(candidate, x):
            """It holds."""

        made[name] = exercise
    monkeypatch.setattr(builder, "exercises", lambda: made)
    return made


def author(folder: Path, *parts: str) -> Path:
    path = folder / "solutions" / "lab9_all.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(parts))
    return path


def by_id(notebook, cell_id):
    return next(cell for cell in notebook.cells if cell.id == cell_id)


def outside_markers(source: str) -> str:
    return re.sub(r"(?s)^[^\n]*BEGIN SOLUTION.*?END SOLUTION[^\n]*$", "", source, flags=re.M)


@pytest.mark.usefixtures("few_exercises")
def test_an_exercise_becomes_an_about_line_a_solution_cell_and_a_grade_cell(tmp_path):
    notebook = source_notebook(author(tmp_path, HEAD, SYMMETRIC))
    assert [cell.id for cell in notebook.cells[2:]] == [
        "about_quantize_symmetric",
        "quantize_symmetric",
        "check_quantize_symmetric",
    ]
    about, solution, grade = notebook.cells[2:]
    assert about.source == "●●○ · 7 min · 3 points · Author 2020 | section 2"
    assert solution.metadata.nbgrader == {
        "grade": False,
        "solution": True,
        "locked": False,
        "task": False,
        "grade_id": "quantize_symmetric",
        "schema_version": 3,
    }
    assert grade.metadata.nbgrader == {
        "grade": True,
        "solution": False,
        "locked": True,
        "task": False,
        "points": 3,
        "grade_id": "check_quantize_symmetric",
        "schema_version": 3,
    }
    assert grade.source == "check(quantize_symmetric)"


@pytest.mark.usefixtures("few_exercises")
def test_the_stub_has_signature_docstring_and_imports_and_raises(tmp_path):
    notebook = student_notebook(author(tmp_path, HEAD, SYMMETRIC))
    names: dict = {}
    exec(by_id(notebook, "quantize_symmetric").source, names)
    stub = names["quantize_symmetric"]
    assert stub.__doc__ == quantization.quantize_symmetric.__doc__
    wanted = inspect.signature(quantization.quantize_symmetric)
    assert str(inspect.signature(stub)) == str(wanted)
    with pytest.raises(NotImplementedError):
        stub(torch.ones(2))
    grade = by_id(notebook, "check_quantize_symmetric")
    assert (grade.metadata.editable, grade.metadata.deletable) == (False, False)


@pytest.mark.usefixtures("few_exercises")
def test_an_earlier_exercise_is_taken_from_the_library_and_the_students_own_is_left_alone(tmp_path):
    script = author(tmp_path, HEAD, SYMMETRIC, CLIP)
    x = torch.tensor([-1.0, 1.0] * 50 + [4.0])
    for notebook in (source_notebook(script), student_notebook(script)):

        def mine(*args, **kwargs):
            raise AssertionError("the student's own function must not be called")

        names: dict = {"quantize_symmetric": mine}
        exec(by_id(notebook, "clip_by_mse").source, names)
        assert names["quantize_symmetric"] is mine
        assert "dequantize" in names  # not an exercise here: imported at the cell's top
    exec(by_id(source_notebook(script), "clip_by_mse").source, names)
    assert names["clip_by_mse"](x, bits=2, steps=4) == 1.0
    stub = by_id(student_notebook(script), "clip_by_mse").source
    assert "    from fewer.quantization import quantize_symmetric\n" in stub


@pytest.mark.usefixtures("few_exercises")
def test_a_model_answer_and_its_rubric_are_in_the_instructors_version_only(tmp_path):
    script = author(tmp_path, HEAD, WRITTEN)
    source, student = source_notebook(script), student_notebook(script)
    assert "secret" in by_id(source, "why").source
    assert "secret" not in nbformat.writes(student)
    assert by_id(student, "why").source == "*Your answer here*"
    assert by_id(student, "question_why").source == "**Question.** Why?"
    answer = by_id(student, "why")
    assert answer.cell_type == "markdown"
    assert is_grade(answer)
    assert is_solution(answer)
    assert answer.metadata.nbgrader.points == 4


@pytest.mark.usefixtures("few_exercises")
def test_demo_cells_keep_their_tag_and_plain_cells_their_source(tmp_path):
    cells = '\n# %% tags=["demo"]\nx = 1\n\n# %% [markdown]\n# a *text*\n'
    notebook = student_notebook(author(tmp_path, HEAD, cells))
    assert by_id(notebook, "cell_3").metadata == {"tags": ["demo"]}
    assert by_id(notebook, "cell_4").source == "a *text*"
    assert by_id(notebook, "cell_4").metadata == {}


@pytest.mark.usefixtures("few_exercises")
def test_building_twice_gives_the_same_bytes(tmp_path):
    script = author(tmp_path, HEAD, SYMMETRIC, CLIP, WRITTEN)
    assert nbformat.writes(source_notebook(script)) == nbformat.writes(source_notebook(script))
    assert nbformat.writes(student_notebook(script)) == nbformat.writes(student_notebook(script))


@pytest.mark.usefixtures("few_exercises")
def test_releasing_leaves_the_source_notebook_as_it_was(tmp_path):
    source = source_notebook(author(tmp_path, HEAD, SYMMETRIC, WRITTEN))
    before = nbformat.writes(source)
    released(source)
    assert nbformat.writes(source) == before


@pytest.mark.usefixtures("few_exercises")
def test_build_writes_labs_and_tables_once_and_check_notices_a_removed_line(tmp_path):
    author(tmp_path, HEAD, SYMMETRIC, CLIP, WRITTEN)
    readme = tmp_path / "README.md"
    readme.write_text(
        "# A\n<!-- generated: exercises -->\nold\n<!-- end -->\nmiddle\n"
        "<!-- generated: labs -->\n<!-- end -->\nend\n"
    )
    notebook = tmp_path / "labs" / "lab9_all.ipynb"
    assert build(tmp_path, check=True) == [notebook, readme]
    assert not notebook.exists()
    assert build(tmp_path) == [notebook, readme]
    assert build(tmp_path) == []
    text = readme.read_text()
    assert "old" not in text
    assert ("| 9 | `clip_by_mse` | Author 2020 \\| section 2 | ●●○ | 7 | 3 |\n<!-- end -->") in text
    assert (
        "| [Lab 9. Everything at once](labs/lab9_all.ipynb) | 2 | 14 | 10 |\n<!-- end -->" in text
    )
    assert text.startswith("# A\n")
    assert text.endswith("<!-- end -->\nend\n")
    assert "<!-- end -->\nmiddle\n" in text

    whole = notebook.read_text()
    lines = whole.splitlines(keepends=True)
    for removed in (5, len(lines) // 2, len(lines) - 1):
        notebook.write_text("".join(lines[:removed] + lines[removed + 1 :]))
        assert build(tmp_path, check=True) == [notebook]
    build(tmp_path)
    assert notebook.read_text() == whole


@pytest.mark.usefixtures("few_exercises")
def test_a_notebook_whose_script_is_gone_is_stale(tmp_path):
    author(tmp_path, HEAD)
    build(tmp_path)
    orphan = tmp_path / "labs" / "lab8_gone.ipynb"
    shutil.copy(tmp_path / "labs" / "lab9_all.ipynb", orphan)
    mine = tmp_path / "labs" / "notes.ipynb"
    mine.write_text("{}")
    assert build(tmp_path, check=True) == [orphan]
    build(tmp_path)
    assert not orphan.exists()
    assert mine.exists()


TWO = "\n# %% tags=['exercise']\nfrom fewer.quantization import {}\n".replace("'", '"')


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        (
            '\n# %% tags=["exercize"]\n1\n',
            "cell 3 .line 7.: unknown tag 'exercize'; there are exer",
        ),
        ('\n# %% tags=["check", "demo"]\n1\n', "at most one tag, got check, demo"),
        ('\n# %% tags=["demo"] point=2\n1\n', "unknown option 'point'"),
        ('\n# %% [markdown] tags=["demo"]\n# a\n', "tagged 'demo' cannot be a markdown cell"),
        ('\n# %% tags=["written"] id="a" points=2\n1\n', "tagged 'written' cannot be a code cell"),
        (TWO.format("mse, clip_by_mse"), "imports one function, got mse, clip_by_mse"),
        (TWO.format("mse"), "no exercise is called 'mse'; there are: quantize_symmetric, clip"),
        (TWO.format("clip_by_mse as c"), "by its own name"),
        (TWO.format("clip_by_mse") + "x = 1\n", "one import and nothing else"),
        (TWO.format("clip_by_mse").replace(".quantization", ".data"), "fewer.data has no function"),
        (TWO.format("clip_by_mse"), "no check cell for clip_by_mse"),
        (SYMMETRIC + TWO.format("quantize_symmetric"), "quantize_symmetric is in this lab already"),
        (
            '\n# %% tags=["check"]\ncheck(clip_by_mse)\n',
            "no exercise called clip_by_mse stands befo",
        ),
        (SYMMETRIC + '\n# %% tags=["check"]\ncheck(quantize_symmetric)\n', "a check cell already"),
        (SYMMETRIC.replace("check(quantize_symmetric)", "check()"), "a check cell is one line"),
        (WRITTEN.replace(' id="why"', ""), "needs an id of letters, digits and _, got None"),
        (
            WRITTEN.replace('"why"', '"clip_by_mse"'),
            "cannot be called 'clip_by_mse': the name is ta",
        ),
        (WRITTEN.replace("=4", '="4"'), "needs points, a whole number, got '4'"),
        (WRITTEN.replace("Answer.", "Answer"), "begins with '..Answer...'"),
        (WRITTEN.replace("Rubric", "Points"), "begins with '..Rubric...'"),
        (WRITTEN + WRITTEN, "two cells are called question_why, why"),
        (
            SYMMETRIC + "\n# %%\nfrom fewer.quantization import mse, quantize_symmetric\n",
            "would overwrite the student's own quantize_symmetric; write 'import fewer.quant",
        ),
        ("\n# %%\n1 +\n", "cell 3 .line 7.: .* cannot be parsed"),
    ],
)
@pytest.mark.usefixtures("few_exercises")
def test_a_mistake_in_a_script_is_named_with_its_place(tmp_path, cells, says):
    script = author(tmp_path, HEAD, cells)
    with pytest.raises(LabError, match=says) as caught:
        source_notebook(script)
    assert str(script) in str(caught.value)


@pytest.mark.usefixtures("few_exercises")
def test_a_lab_needs_a_title_a_proper_name_and_its_own_number(tmp_path):
    script = author(tmp_path, HEAD.split("\n\n")[1])
    with pytest.raises(LabError, match="title"):
        labs(tmp_path)
    with pytest.raises(LabError, match="title"):
        source_notebook(script)
    author(tmp_path, HEAD)
    script.with_name("lab9_again.py").write_text(HEAD)
    with pytest.raises(LabError, match=r"lab9_again\.py has the same number"):
        labs(tmp_path)
    script.with_name("lab9_again.py").rename(script.with_name("labs_again.py"))
    with pytest.raises(LabError, match=r"lab<number>_<topic>\.py"):
        labs(tmp_path)


def test_an_exercise_without_checks_is_refused(tmp_path, few_exercises):
    few_exercises["clip_by_mse"].checks.clear()
    with pytest.raises(LabError, match="the exercise clip_by_mse has no checks"):
        source_notebook(author(tmp_path, HEAD, CLIP))


@pytest.mark.usefixtures("few_exercises")
def test_a_page_of_docs_shows_the_newest_stored_result(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("# A\n<!-- generated: speed_of_things -->\n<!-- end -->\n")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for day, speed in (("20260103", "new"), ("20251230", "old")):
        stored = {
            "date": f"{day[:4]}-{day[4:6]}-{day[6:]}T01:02:03",
            "device": "A Machine",
            "table": {"caption": "Speeds", "columns": ["a", "b"], "rows": [["x", speed]]},
        }
        (results / f"speed_of_things_{day}_010203.json").write_text(json.dumps(stored))
    (results / "without_a_table_20270101_000000.json").write_text("{}")
    assert build(tmp_path, check=True) == [page]
    build(tmp_path)
    assert page.read_text() == (
        "# A\n<!-- generated: speed_of_things -->\n"
        "Speeds. Measured on 2026-01-03, A Machine (`speed_of_things_20260103_010203.json`).\n\n"
        "| a | b |\n| --- | --- |\n| x | new |\n<!-- end -->\n"
    )


def test_a_table_without_an_end_or_of_an_unknown_name_is_refused(tmp_path):
    author(tmp_path, HEAD)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generated: exercises -->\n| a |\n")
    with pytest.raises(LabError, match="no '<!-- end -->'"):
        build(tmp_path)
    readme.write_text("<!-- generated: exercize -->\n<!-- end -->\n")
    with pytest.raises(LabError, match="no table is called 'exercize'"):
        build(tmp_path)


def reads_everywhere(
    batches: Iterable[torch.Tensor], top: float = math.pi, scale: float | None = None
) -> float:
    """One of everything that a reference may do with names."""

    # A comment between docstring and body is part of the solution.
    def inner(value: torch.Tensor) -> float:
        return math.floor(abs(value.sum().item())) + bound

    bound = top
    return max(inner(batch) for batch in batches)


def test_the_imports_are_those_of_the_references_module_for_the_names_it_uses():
    exercise = Exercise(reads_everywhere, paper="none", difficulty=1, minutes=1)
    at_top, inside = builder.needed_imports(exercise)
    assert at_top == ["import math", "from collections.abc import Iterable", "import torch"]
    assert inside == []
    head, body = builder.split_source(exercise)
    assert head.endswith('"""One of everything that a reference may do with names."""')
    assert body.startswith("    # A comment between docstring and body")


@pytest.mark.parametrize("name", list(exercises()))
def test_a_solution_cell_imports_every_name_it_uses(name):
    source = builder._solution_cell(exercises()[name]).source
    names: dict = {}
    exec(source, names)
    assert builder.global_names(source) - names.keys() - set(dir(builtins)) == set()


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_no_line_of_a_solution_reaches_the_students(lab):
    source, student = source_notebook(lab.script), student_notebook(lab.script)
    handed_out = "\n".join(cell.source for cell in student.cells)
    shown = {
        line.strip() for cell in source.cells for line in outside_markers(cell.source).split("\n")
    }
    for cell in source.cells:
        if not is_solution(cell):
            assert cell.source == by_id(student, cell.id).source
            continue
        hidden = cell.source.split("BEGIN SOLUTION")[1].split("\n", 1)[1].rsplit("\n", 1)[0]
        assert hidden not in handed_out
        for line in hidden.splitlines():
            if line.strip() and line.strip() not in shown:
                assert line.strip() not in handed_out
        assert "SOLUTION" not in by_id(student, cell.id).source


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_the_cells_of_the_source_notebook_get_full_points_and_those_of_the_students_none(lab):
    for notebook, full in (
        (source_notebook(lab.script), True),
        (student_notebook(lab.script), False),
    ):
        names: dict = {}
        for cell in notebook.cells:
            if cell.cell_type != "code" or "demo" in cell.metadata.get("tags", []):
                continue
            if not is_grade(cell):
                exec(cell.source, names)
                continue
            verdict = eval(cell.source, names)
            assert isinstance(verdict, Verdict)
            assert verdict.points == (cell.metadata.nbgrader.points if full else 0)


def test_the_course_as_it_stands_is_not_stale():
    assert build(ROOT, check=True) == []
