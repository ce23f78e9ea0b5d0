"""What grading does with one submission: a function of bytes, run wherever there is room for it.

`judge` knows neither the course folder nor the gradebook: what was handed in comes as bytes, what
was released as plain data, and the graded notebook goes back as bytes. So it runs in a process of
this machine or on another one alike, and its answer depends on (submission, course, seed) alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4.rwbase import rejoin_lines

import fewer
from autograder.gradebook import Marks, marks
from autograder.intake import Released, restore
from autograder.verdict import GRADE_ID, MIME, Verdict

MATTERS = ("torch", "numpy", "hypothesis")  # whose versions decide what a check sees


class GraderFault(Exception):
    """The course, not the student, is to blame: no grade is given until that is mended."""


@dataclass(frozen=True)
class Order:
    """What one grading run is: with a submission, it determines the grade.

    Attributes:
        released: the notebooks as they were handed out, by name.
        course: `course_version` of who gives the order.
        walled: whether student code runs in a sandbox.
        execute: whether the whole notebook is run too, for the student's own figures. It changes no
            grade.
    """

    released: Mapping[str, Released]
    course: str
    seed: int
    walled: bool
    execute: bool = False

    def key(self, files: Mapping[str, bytes]) -> str:
        """Names the grade of a submission: equal keys, equal grades."""
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
        return hashlib.sha256(json.dumps([self._digest, digests]).encode()).hexdigest()

    @functools.cached_property
    def _digest(self) -> str:
        released = [asdict(r) for r in self.released.values()]
        parts = [self.course, self.seed, self.walled, self.execute, released]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Graded:
    """One notebook as it was graded.

    Attributes:
        data: the notebook, with verdicts as the outputs of its grade cells.
        notices: what the instructor should know about it.
    """

    data: bytes
    marks: Marks
    notices: list[str]


def judge(files: Mapping[str, bytes], order: Order) -> dict[str, Graded]:
    """Judge the notebooks of one submission.

    Args:
        files: what was handed in, by the notebook's name.

    Raises:
        Unusable: the submission cannot be graded; the message says what to do.
        GraderFault: the course is to blame, or this process has another version of it.
    """
    if order.course != course_version():
        raise GraderFault(
            f"this process has version {course_version()} of the course, grading runs with "
            f"{order.course}: install the same everywhere"
        )
    key = order.key(files)
    graded = {}
    for name, data in files.items():
        restored = restore(data, order.released[name])
        notebook, verdicts = _judge(restored.notebook, order)
        record(notebook, verdicts)
        notebook.metadata["fewer"] = {
            "version": fewer.__version__,
            "course": order.course,
            "seed": order.seed,
            "sandbox": order.walled,
            "executed": order.execute,
            "key": key,
            "notices": restored.notices,
        }
        graded[name] = Graded(to_bytes(notebook), marks(notebook), restored.notices)
    return graded


def record(notebook: NotebookNode, verdicts: Mapping[str, Verdict]) -> None:
    """Write verdicts as the outputs of their grade cells: points, card, and data.

    nbgrader reads the points from the number; the rest is for people and for reports.

    Raises:
        GraderFault: a grade cell that nothing judges, or whose points are not those released.
    """
    for cell in notebook.cells:
        about = cell.metadata.get("nbgrader", {})
        # A grade cell that is a solution too is a written question: a person grades it.
        if cell.cell_type != "code" or not about.get("grade") or about.get("solution"):
            continue
        verdict = verdicts.get(about["grade_id"].removeprefix(GRADE_ID))
        if verdict is None or not verdict.results:
            raise GraderFault(
                f"nothing judges the cell {about['grade_id']!r}: this course has no such exercise"
            )
        if verdict.possible != about["points"]:
            raise GraderFault(
                f"{verdict.exercise} was released with {about['points']:g} points, but this "
                f"version of the course ({fewer.__version__}) gives {verdict.possible}"
            )
        card = {"text/html": verdict.html(), MIME: verdict.to_json()}
        data = {"text/plain": str(verdict.points), **card}
        output = {"output_type": "execute_result", "metadata": {}, "data": data}
        cell.outputs = [nbformat.from_dict(output | {"execution_count": None})]


def to_bytes(notebook: NotebookNode) -> bytes:
    """A notebook as a file; without nbformat's validation, which takes longer than judging, and in
    one line, which takes half of what many take."""
    return (json.dumps(notebook, ensure_ascii=False) + "\n").encode(errors="replace")


def from_bytes(data: bytes) -> NotebookNode:
    """A notebook that `to_bytes` or nbgrader wrote. Nobody validates it: that takes ten times as
    long."""
    return rejoin_lines(nbformat.from_dict(json.loads(data)))


@functools.cache
def course_version() -> str:
    """Version of the course and a digest of all that decides over grades: the sources of checks
    and library, and the versions of the libraries below them."""
    digest = hashlib.sha256()
    for top in (Path(__file__).parent, Path(fewer.__file__).parent):
        for path in sorted(path for path in top.rglob("*.py") if path.parent.name != "attacks"):
            digest.update(path.relative_to(top).as_posix().encode() + b"\0" + path.read_bytes())
    for name in MATTERS:
        digest.update(importlib.metadata.version(name).split("+")[0].encode())
    return f"{fewer.__version__}+{digest.hexdigest()[:12]}"


# A zygote of each kind, warm for as long as this process lives, and used by one thread at a time.
_zygotes: dict[bool, Any] = {}
_one_at_a_time = threading.Lock()


def _judge(notebook: NotebookNode, order: Order) -> tuple[NotebookNode, dict[str, Verdict]]:
    """The notebook, with the outputs of a run if one is asked for, and its verdicts."""
    from autograder.remote import GraderError  # imports torch
    from autograder.sandbox import NoSandbox
    from autograder.submission import judge_notebook

    with _one_at_a_time, _one_thread():
        try:
            verdicts = judge_notebook(notebook, warm(order.walled), seed=order.seed)
            if order.execute:
                from autograder.kernel import execute  # only who asks for it waits for Jupyter

                notebook = execute(notebook, order.walled)
        except (GraderError, NoSandbox) as error:
            close()
            raise GraderFault(str(error)) from error
    return notebook, verdicts


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute in one thread: sums keep one order, and every process has its core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warm(walled: bool) -> Any:
    """This process' zygote, started if need be."""
    from autograder.remote import Zygote

    if walled not in _zygotes:
        _zygotes[walled] = Zygote(walled)
    return _zygotes[walled]


def close() -> None:
    """End what `warm` started."""
    while _zygotes:
        _zygotes.popitem()[1].close()


def start(walled: bool) -> None:
    """Begin a worker process: everything that takes time before the first submission."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that grades
    _die_with_parent()
    from autograder.exercise import exercises
    from autograder.remote import GraderError

    exercises()
    with contextlib.suppress(Exception, GraderError):  # `judge` will say what is wrong
        warm(walled)


def _die_with_parent() -> None:
    """End this process when the one that grades is gone, killed for instance."""
    parent = multiprocessing.parent_process()  # which need not be the one that forked this one
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
