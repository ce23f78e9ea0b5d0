"""Each exercise of a notebook gets what its own code deserves, whatever the other cells do."""

from __future__ import annotations

import json
import time
from typing import Any

import nbformat
import pytest
import torch
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import autograder.submission
from autograder.compare import expect_close, expect_error
from autograder.exercise import Exercise
from autograder.remote import Child, Zygote
from autograder.strategies import tensors
from autograder.submission import judge_notebook
from autograder.verdict import Verdict
from fewer.quantization import mse as library_mse

pytestmark = pytest.mark.xdist_group("zygote")


def double(x: torch.Tensor) -> torch.Tensor:
    """Twice x."""
    return x + x


def halve(x: torch.Tensor) -> torch.Tensor:
    """Half of x."""
    if x.numel() == 0:
        raise ValueError("x must not be empty")
    return x / 2


def negate(x: torch.Tensor) -> torch.Tensor:
    """Minus x."""
    return -x


DOUBLE, HALVE, NEGATE, MSE = (
    Exercise(function, paper="Nobody 2020", difficulty=1, minutes=1)
    for function in (double, halve, negate, library_mse)
)
EXERCISES = {exercise.name: exercise for exercise in (DOUBLE, HALVE, NEGATE, MSE)}


@DOUBLE.check(points=2, hint="Add.", examples=8, x=tensors())
def half_of_the_double_is_the_whole(candidate: Any, x: torch.Tensor) -> None:
    """Half of the double is the input."""
    expect_close(candidate(x) / 2, x, what="half of the double")


@HALVE.check(points=2, hint="Divide.", examples=8, x=tensors())
def twice_the_half_is_the_whole(candidate: Any, x: torch.Tensor) -> None:
    """Twice the half is the input."""
    expect_close(candidate(x) * 2, x, what="twice the half")


@HALVE.check(points=1, hint="Raise.")
def nothing_has_no_half(candidate: Any) -> None:
    """An empty tensor is refused."""
    expect_error(candidate, ValueError, torch.zeros(0))


@HALVE.check(points=1, hint="Zero.")
def half_of_zero_is_zero(candidate: Any) -> None:
    """Zero stays zero."""
    expect_close(candidate(torch.zeros(1)), torch.zeros(1), what="half of zero")


@NEGATE.check(points=3, hint="Subtract.", examples=8, x=tensors())
def the_sum_with_the_negative_is_zero(candidate: Any, x: torch.Tensor) -> None:
    """The sum with the negative is zero."""
    expect_close(candidate(x) + x, torch.zeros_like(x), what="the sum")


@MSE.check(points=1, hint="Square.", examples=4, x=tensors())
def no_error_is_zero(candidate: Any, x: torch.Tensor) -> None:
    """The error of x against itself is zero."""
    expect_close(candidate(x, x), 0.0, what="the error")


RIGHT = {
    "double": "def double(x):\n    return 2 * x",
    "halve": "def halve(x):\n    if not x.numel():\n        raise ValueError\n    return x * 0.5",
    "negate": "def negate(x):\n    return 0 - x",
}


def code(source: str, tags: list[str] | None = None, **nbgrader: Any) -> NotebookNode:
    metadata: dict[str, Any] = {"tags": tags} if tags else {}
    if nbgrader:
        metadata["nbgrader"] = {"schema_version": 3, "locked": False, "task": False} | nbgrader
    return new_code_cell(source, metadata=metadata)


def solution(name: str, source: str) -> NotebookNode:
    return code(source, grade=False, solution=True, grade_id=name)


def grade(name: str) -> NotebookNode:
    return code(f"check({name})", grade=True, solution=False, grade_id=f"check_{name}", points=1)


def notebook(*cells: NotebookNode) -> NotebookNode:
    setup = code("import torch\nfrom autograder import check")
    return new_notebook(cells=[new_markdown_cell("# A lab"), setup, *cells])


def class_work(**changed: str) -> NotebookNode:
    """The notebook of three exercises, right but for what is changed."""
    cells = []
    for name, source in (RIGHT | changed).items():
        cells += [solution(name, source), grade(name)]
    return notebook(*cells)


def judged(zygote: Zygote, nb: NotebookNode, **options: Any) -> dict[str, Verdict]:
    limits = {"cell_seconds": 20, "call_seconds": 20} | options
    return judge_notebook(nb, zygote, find=EXERCISES.__getitem__, **limits)


def points(verdicts: dict[str, Verdict]) -> dict[str, int]:
    return {name: verdict.points for name, verdict in verdicts.items()}


FULL = {"double": 2, "halve": 4, "negate": 3}


def test_right_work_gets_every_point(zygote: Zygote) -> None:
    seen: list[str] = []
    assert points(judged(zygote, class_work(), progress=seen.append)) == FULL
    assert seen == ["double", "halve", "negate"]


def test_the_library_under_another_name_earns_nothing(zygote: Zygote) -> None:
    handed_in = "from fewer.quantization import mse as m\ndef mse(*args):\n    return m(*args)"
    imported = "from fewer.quantization import mse"
    own = "def mse(x, y):\n    return ((x - y) ** 2).mean()"
    for source, earned in ((handed_in, 0), (imported, 0), (own, 1)):
        verdict = judged(zygote, notebook(solution("mse", source), grade("mse")))["mse"]
        assert verdict.points == earned
    # It is there for the exercises above and below.
    use = f"{imported}\ndef halve(x):\n    assert mse(x, x) == 0\n    return x / 2"
    cells = [solution("mse", own), grade("mse"), solution("halve", use), grade("halve")]
    assert judged(zygote, notebook(*cells))["halve"].points == 4


LOST = {
    "syntax error": ("def halve(x)\n    return x / 2", "SyntaxError: expected ':'"),
    "error above": ("y = 1 / 0\n" + RIGHT["halve"], "ZeroDivisionError: division by zero"),
    "exit": ("import os; os._exit(0)\n", "your code ended the process (exit code 0)"),
    "sys.exit": ("import sys; sys.exit()\n", "SystemExit"),
    "kill": ("import os; os.kill(os.getpid(), 9)", "killed by signal 9 (out of memory, or"),
    "loop": ("while True:\n    pass", "took longer than 1 s: an endless loop?"),
    "deadly call": ("import os\ndef halve(x):\n    os._exit(5)", "exit code 5) (when called as"),
    "endless call": ("def halve(x):\n    while True:\n        pass", "an endless loop? (when"),
    "late death": (
        "import os\ndef halve(x):\n    return x / 2 if x.numel() else os._exit(0)",
        "exit code 0) (when called as halve(tensor([])))",
    ),
    "huge answer": (
        "import torch\ndef halve(x):\n    return torch.zeros(60 << 20)",
        "the answer is larger than 64 MB (when called as",
    ),
    "no function": ("x = 3", "no function is called halve"),
    "renamed": ("def half(x):\n    return x / 2", "no function is called halve"),
    "no callable": ("halve = 0.5", "halve is no function, but an object of type float"),
    "deleted": (RIGHT["halve"] + "\ndel halve", "no function is called halve"),
    "garbage": (
        "import os; os.write(3, b'garbage!' * 9)",
        "the answer is to nothing that was asked",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_what_goes_wrong_in_one_exercise_costs_that_exercise_alone(
    zygote: Zygote, case: str
) -> None:
    source, words = LOST[case]
    limits = {"cell_seconds": 1, "call_seconds": 1} if "1 s" in words else {}
    verdicts = judged(zygote, class_work(halve=source), **limits)
    assert points(verdicts) == FULL | {"halve": 2 if case == "late death" else 0}
    verdict = verdicts["halve"]
    assert all(result.status != "todo" for result in verdict.results)
    assert verdict.first_failure is not None
    assert verdict.first_failure.failure is not None
    assert words in verdict.first_failure.failure.message
    assert not any(v.note for name, v in verdicts.items() if name != "halve")
    json.dumps(verdict.to_json())


def test_a_cell_that_raises_says_where(zygote: Zygote) -> None:
    source = "\n\nlimit = 3\nassert limit > 5, 'too low'\ndef halve(x):\n    return x / 2"
    verdict = judged(zygote, class_work(halve=source))["halve"]
    assert verdict.first_failure is not None
    assert verdict.first_failure.failure is not None
    assert verdict.first_failure.failure.trace == "line 4: assert limit > 5, 'too low'"
    assert verdict.note == ""


def test_a_function_counts_even_if_its_cell_raises_below_it(zygote: Zygote) -> None:
    """As in a notebook: the function is there, and the grade cell judges it."""
    below = "\nprint(halve(torch.zeros(0)))"
    verdicts = judged(zygote, class_work(halve=RIGHT["halve"] + below))
    assert points(verdicts) == FULL
    verdicts = judged(zygote, class_work(halve="def halve(x):\n    return x" + below + "\n1 / 0"))
    assert "Below the function, your cell raised ZeroDivisionError" in verdicts["halve"].note


def test_what_another_cell_defined_does_not_stand_in_for_a_cell_that_raised(
    zygote: Zygote,
) -> None:
    nb = class_work(double=RIGHT["double"] + "\n" + RIGHT["halve"], halve="def halve(x) return 3")
    assert points(judged(zygote, nb)) == FULL | {"halve": 0}


def test_the_untouched_stub_is_to_be_done(zygote: Zygote) -> None:
    stub = 'def halve(x):\n    """Half of x."""\n    raise NotImplementedError'
    verdicts = judged(zygote, class_work(halve=stub))
    assert verdicts["halve"].todo
    assert points(verdicts) == FULL | {"halve": 0}


def test_a_missing_solution_cell_is_called_missing(zygote: Zygote) -> None:
    verdicts = judged(zygote, notebook(grade("halve"), solution("double", RIGHT["double"])))
    assert list(verdicts) == ["halve"]
    assert "no function is called halve, and its cell is missing" in str(verdicts["halve"])


def test_an_unknown_exercise_is_a_verdict_without_points(zygote: Zygote) -> None:
    verdict = judged(zygote, notebook(grade("halbe")))["halbe"]
    assert (verdict.points, verdict.possible) == (0, 0)
    assert "halbe" in verdict.note


def test_cells_in_between_count_and_demo_cells_do_not(zygote: Zygote) -> None:
    nb = notebook(
        code("raise RuntimeError('training, for people only')", tags=["demo"]),
        solution("halve", "def halve(x):\n    return factor * x"),
        code("factor = 0.5"),
        code("factor = 99", tags=["demo"]),
        grade("halve"),
        code("factor = 99"),
    )
    assert judged(zygote, nb)["halve"].points == 3


def test_a_helper_cell_that_raises_is_named_where_points_are_lost(zygote: Zygote) -> None:
    nb = notebook(
        code("import no_such_package\nfactor = 2"),
        solution("double", "def double(x):\n    return factor * x"),
        grade("double"),
        solution("negate", RIGHT["negate"]),
        grade("negate"),
    )
    verdicts = judged(zygote, nb)
    assert points(verdicts) == {"double": 0, "negate": 3}
    assert verdicts["double"].note.startswith("Code cell 2 above raised ModuleNotFoundError")
    assert not verdicts["negate"].note


def test_the_last_grade_cell_of_an_exercise_counts(zygote: Zygote) -> None:
    nb = notebook(grade("double"), solution("double", RIGHT["double"]), grade("double"))
    assert points(judged(zygote, nb)) == {"double": 2}


def test_a_function_may_use_what_earlier_cells_define_after_a_crash_too(zygote: Zygote) -> None:
    nb = notebook(
        code("factor = 2\nruns = []"),
        solution("double", "runs.append(1)\ndef double(x):\n    return factor * x"),
        grade("double"),
        solution("halve", "import os\nfactor = 7\ndef halve(x):\n    os._exit(1)"),
        grade("halve"),
        solution("negate", "assert len(runs) == 1\ndef negate(x):\n    return x - double(x)"),
        grade("negate"),
    )
    # The cell that defined the deadly function was harmless, and so it is run again: factor is 7.
    assert points(judged(zygote, nb)) == {"double": 2, "halve": 0, "negate": 0}
    nb.cells[5].source = "import os\nos._exit(1)"
    assert points(judged(zygote, nb)) == {"double": 2, "halve": 0, "negate": 3}


def test_a_crash_during_explanations_costs_no_point(zygote: Zygote) -> None:
    """A wrong function that dies only when a counter-example is made simpler."""
    source = """
        import os
        calls = 0
        def halve(x):
            global calls
            calls += 1
            if calls > 8 and x.abs().sum() > 0:
                os._exit(0)
            if not x.numel():
                raise ValueError
            return x * (0.5 if (x == 0).all() else 3)
    """
    nb = class_work(halve="\n".join(line[8:] for line in source.splitlines()))
    for explain in (False, True):
        assert points(judged(zygote, nb, explain=explain)) == FULL | {"halve": 2}


def test_what_a_function_leaves_running_harms_nobody_else(zygote: Zygote) -> None:
    bomb = "import os, threading\ndef double(x):\n"
    bomb += "    threading.Timer(0.2, os._exit, [3]).start()\n    return x * 2"
    wait = "import time\ntime.sleep(0.5)\n"
    in_a_cell = class_work(double=bomb, halve=wait + RIGHT["halve"])
    assert points(judged(zygote, in_a_cell)) | {"double": 2} == FULL
    slow = RIGHT["halve"].replace("raise", "import time; time.sleep(0.5); raise")
    in_a_call = class_work(double=bomb, halve=slow)
    assert points(judged(zygote, in_a_call)) | {"double": 2} == FULL


def test_tampering_in_one_cell_gives_no_points_in_another(zygote: Zygote) -> None:
    tamper = """
import torch, autograder, builtins
torch.equal = torch.allclose = torch.Tensor.allclose = lambda *a, **k: True
torch.Tensor.all = lambda self: True
autograder.check = autograder.judge = autograder.Verdict = None
builtins.AssertionError = Exception
def double(x):
    return x * 3
"""
    assert points(judged(zygote, class_work(double=tamper))) == FULL | {"double": 0}


def test_a_verdict_depends_on_notebook_and_seed_alone(zygote: Zygote) -> None:
    """Not on the child's age, on other exercises, on explanations asked for, or on the clock."""
    wrong = "import random\ndef halve(x):\n    return x * (0.5 + (random.random() > 0.9))"
    whole = class_work(halve=wrong, double="import os\ndef double(x):\n    os._exit(1)")
    first, again = judged(zygote, whole, seed=3), judged(zygote, whole, seed=3)
    assert as_json(first) == as_json(again)
    alone = judged(zygote, notebook(solution("halve", wrong), grade("halve")), seed=3)
    assert alone["halve"].to_json() == first["halve"].to_json()
    assert points(judged(zygote, whole, seed=3, explain=False)) == points(first)
    assert judged(zygote, whole, seed=4)["halve"].seed == 4


def as_json(verdicts: dict[str, Verdict]) -> str:
    return json.dumps({name: verdict.to_json() for name, verdict in verdicts.items()})


def test_many_endless_cells_are_bounded_together(zygote: Zygote) -> None:
    nb = notebook(
        solution("double", RIGHT["double"]),
        grade("double"),
        *[code("while True:\n    pass") for _ in range(30)],
        solution("halve", RIGHT["halve"]),
        grade("halve"),
    )
    began = time.monotonic()
    verdicts = judged(zygote, nb, cell_seconds=0.5, notebook_seconds=3)
    assert time.monotonic() - began < 10  # and not 30 times a half
    assert points(verdicts) == {"double": 2, "halve": 0}
    assert "the time for the whole notebook is up" in str(verdicts["halve"])


def test_one_child_serves_a_notebook_without_accidents(
    zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Counted(Child):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            started.append(self._pid)

    monkeypatch.setattr("autograder.remote.Child", Counted)
    judged(zygote, class_work(halve="raise ValueError"))
    assert len(started) == 1
    started.clear()
    judged(zygote, class_work(halve="import os; os._exit(0)"))
    assert len(started) == 3  # the second, to see that `double` had not left the death behind


@pytest.mark.parametrize(
    "metadata",
    [
        {"nbgrader": None},
        {"nbgrader": []},
        {"nbgrader": {}},
        {"nbgrader": {"grade": True}},
        {"nbgrader": {"grade": True, "grade_id": 3}},
        {"nbgrader": {"grade": True, "grade_id": "something"}},
        {"nbgrader": {"solution": True, "grade": True, "grade_id": "check_halve"}},
        {"tags": "demo"},
        {"tags": None},
    ],
    ids=repr,
)
def test_strange_metadata_is_an_ordinary_cell(zygote: Zygote, metadata: dict[str, Any]) -> None:
    nb = class_work(double="def double(x):\n    return factor * x")
    nb.cells.insert(2, code("factor = 2"))
    nb.cells[2].metadata = nbformat.from_dict(metadata)
    assert points(judged(zygote, nb)) == FULL


def test_the_exercises_of_the_course_are_found_by_default() -> None:
    assert judge_notebook.__kwdefaults__ is None
    defaults = judge_notebook.__defaults__
    assert defaults is not None
    assert defaults[-1] is autograder.submission.autograder.exercise.find


def test_every_child_has_the_same_at_hand_whoever_was_judged_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Code can look for the inputs that its zygote keeps: no grade may depend on when it looks."""
    seen = []
    fork = Zygote.child

    def child(zygote: Zygote, **limits: Any) -> Child:
        seen.append(set(zygote.kept))
        return fork(zygote, **limits)

    monkeypatch.setattr(Zygote, "child", child)
    with Zygote() as fresh:
        judged(fresh, class_work(halve="import os; os._exit(0)"))
        judged(fresh, class_work())
    assert len(seen) >= 3
    assert all(kept == seen[0] for kept in seen)
    assert len(seen[0]) == sum(len(e.checks) for e in (DOUBLE, HALVE, NEGATE))
