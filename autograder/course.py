"""A course folder of nbgrader's, made from the labs.

`create_course` writes the folder, `release` makes what students get; `autograder.grading` grades
what comes back. The folder is a stock one: formgrader, late penalties, manual grading and every
nbgrader command work there. Plain ``nbgrader autograde`` gives honest submissions the same points
(and trusts dishonest ones).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbgrader.apps import NbGrader
from nbgrader.converters import GenerateAssignment

from autograder.build import CODE_STUB, TEXT_STUB, labs, source_notebook

LOG = "grading.log"
SEED_FILE = ".seed"
CONFIG = f"""\
# A stock nbgrader course. Every setting of nbgrader works here, as do its commands and formgrader.
c = get_config()  # noqa: F821

c.CourseDirectory.course_id = "fewer"

# The gradebook is gradebook.db beside this file. For PostgreSQL, pip install 'fewer[postgres]' and
# c.CourseDirectory.db_url = "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"

# What stands in place of solutions. The labs are built with the same words.
c.ClearSolutions.code_stub = {{"python": {CODE_STUB!r}}}
c.ClearSolutions.text_stub = {TEXT_STUB!r}

# Cells tagged "demo" are for people: plain `nbgrader autograde` does not run them either.
c.Execute.skip_cells_with_tag = "demo"
c.Execute.timeout = 120

# Late work: nbgrader's own rule. Set an assignment's due date in formgrader or with
#   nbgrader db assignment add NAME --duedate="2030-01-31 23:59:59 UTC"
# c.LateSubmissionPlugin.penalty_method = "zero"
"""


class CourseError(Exception):
    """The course folder is not as it must be; the message says what to do."""


def create_course(folder: Path, root: Path, labs_wanted: Sequence[int] = ()) -> list[str]:
    """Make (or bring up to date) the nbgrader course in ``folder`` from the labs at ``root``.

    A configuration that is there already is kept; the instructor's notebooks are written anew.

    Args:
        labs_wanted: numbers of the labs; all of them where none is named.

    Returns:
        The names of the assignments.

    Raises:
        ValueError: there is no lab of that number.
    """
    there = {lab.number: lab for lab in labs(root)}
    for number in labs_wanted:
        if number not in there:
            known = ", ".join(map(str, there)) or "none"
            raise ValueError(f"labs must be among those of {root} ({known}), got {number}")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nbgrader_config.py"
    if not config.exists():
        config.write_text(CONFIG, "utf-8")
    chosen = [there[number] for number in labs_wanted or there]
    for lab in chosen:
        target = folder / "source" / lab.name / f"{lab.name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(source_notebook(lab.script), target)
    return [lab.name for lab in chosen]


def course_seed(course: Path) -> int:
    """The seed that a course grades with, drawn once: students who try theirs at home with another
    one cannot know the inputs, and the class is graded with the same ones for good."""
    path = course / SEED_FILE
    with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write(f"{secrets.randbelow(10**9)}\n")
        path.chmod(0o600)
    try:
        return int(path.read_text("utf-8"))
    except ValueError:
        raise CourseError(f"{path} must hold a whole number, the seed of this course") from None


def release(course: Path, lab: str) -> Path:
    """Make the students' version of an assignment and enter it in the gradebook.

    Returns:
        The released notebook.

    Raises:
        CourseError: there is no such assignment in ``source``, or nbgrader refuses (it does where
            cells were added or removed after students had handed in).
    """
    with open_course(course) as app:
        app.coursedir.assignment_id = lab
        source = app.coursedir.format_path(app.coursedir.source_directory, ".", lab)
        if not list(Path(source).glob("*.ipynb")):
            raise CourseError(f"no notebook in {source}: make the course with the lab first")
        _generate(app)
        folder = app.coursedir.format_path(app.coursedir.release_directory, ".", lab)
        return Path(os.path.normpath(folder)) / f"{lab}.ipynb"


@contextlib.contextmanager
def open_course(course: Path, verbose: bool = False) -> Iterator[NbGrader]:
    """nbgrader's application object for a course folder: its configuration, and a quiet log.

    For its time, this Python's own scripts come first on PATH: nbgrader calls a bare ``alembic``
    when it makes a gradebook.
    """
    course = course.resolve()
    if not (course / "nbgrader_config.py").exists():
        raise CourseError(f"{course} is no course folder: it has no nbgrader_config.py")
    log = logging.Logger("nbgrader", logging.INFO)
    handlers: list[logging.Handler] = [logging.FileHandler(course / LOG, encoding="utf-8")]
    if verbose:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    path, search = os.environ.get("PATH", ""), list(sys.path)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nbgrader's own, about SQLAlchemy and datetime
            app = NbGrader(log=log)
            try:
                with contextlib.chdir(course):  # nbgrader reads the configuration of where it is
                    app.initialize([], root=str(course))
            except SystemExit:  # how nbgrader says that its configuration is wrong
                raise CourseError(f"{course / 'nbgrader_config.py'} is wrong: see {LOG}") from None
            yield app
    finally:
        os.environ["PATH"] = path
        sys.path[:] = search
        for handler in handlers:
            handler.close()


def _generate(app: NbGrader) -> None:
    """Run nbgrader's converter for releases, always anew.

    Raises:
        CourseError: with what really went wrong, which nbgrader itself only writes to its log.
    """
    trouble: list[Exception] = []

    class Converter(GenerateAssignment):
        def init_assignment(self, *args: Any) -> None:
            with _remembered(trouble):
                super().init_assignment(*args)

        def convert_single_notebook(self, filename: str) -> None:
            with _remembered(trouble):
                super().convert_single_notebook(filename)

    app.coursedir.student_id = "."
    try:
        Converter(coursedir=app.coursedir, parent=app, force=True).start()
    except Exception as error:
        cause = trouble[0] if trouble else error
        what = f"{type(cause).__name__}: {''.join(str(cause).strip().splitlines()[:1])}"
        raise CourseError(f"nbgrader cannot process it ({what}), see {LOG}") from cause


@contextlib.contextmanager
def _remembered(trouble: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        trouble.append(error)
        raise
