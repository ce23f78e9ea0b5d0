"""A course folder of nbgrader's, made from the labs and graded by this course's own judge.

`create_course` writes the folder, `release` makes what students get, `grade` grades a class with
nbgrader's own steps in one process, and `OraclePreprocessor` where nbgrader would execute the
notebook. The folder is a stock one: formgrader, late penalties, manual grading and every nbgrader
command work there. Plain ``nbgrader autograde`` gives honest submissions the same points (and
trusts dishonest ones).

Grading again gives the same points: a grade is a function of submission, course version and seed.
Points that a person entered stay, marked by nbgrader for another look.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import logging
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps import NbGrader
from nbgrader.converters import Autograde, BaseConverter, GenerateAssignment, GenerateFeedback
from nbgrader.plugins import CsvExportPlugin
from nbgrader.preprocessors import Execute

import fewer
from autograder import sandbox
from autograder.build import CODE_STUB, TEXT_STUB, labs, source_notebook
from autograder.oracle import GraderFault, OraclePreprocessor
from autograder.remote import GraderError, Zygote
from autograder.submission import judge_notebook
from autograder.verdict import Verdict

LOG = "grading.log"
NO_SANDBOX = (
    "Student code ran without a sandbox: in processes of its own, but with your user's rights. "
    "Grade only submissions you trust with your files."
)
CONFIG = f"""\
# A stock nbgrader course. Every setting of nbgrader works here, as do its commands and formgrader.
c = get_config()  # noqa: F821

c.CourseDirectory.course_id = "fewer"

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


@dataclass(frozen=True)
class CellScore:
    """Points of one graded cell; ``waiting`` for a person to look at it."""

    points: float
    possible: float
    waiting: bool


@dataclass(frozen=True)
class Score:
    """A submission's points as the gradebook has them.

    Attributes:
        points: what the student gets, late penalty subtracted.
        cells: by the grade cell's name, such as ``check_quantize_symmetric``.
    """

    student: str
    points: float
    possible: float
    late_penalty: float
    cells: dict[str, CellScore]

    @property
    def waiting(self) -> bool:
        """Whether a person has yet to grade something."""
        return any(cell.waiting for cell in self.cells.values())


@dataclass
class GradeSummary:
    """What became of a class.

    Attributes:
        scores: one a submission in the gradebook, by student.
        failed: submissions that could not be graded, and why: no grade of theirs was written.
        notices: sentences the instructor must see.
        csv: nbgrader's export of the gradebook for this assignment.
        feedback: the folder of the feedback pages.
        log: what nbgrader said.
    """

    assignment: str
    seed: int
    version: str
    csv: Path
    feedback: Path
    log: Path
    scores: list[Score] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


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


def release(course: Path, lab: str) -> Path:
    """Make the students' version of an assignment and enter it in the gradebook.

    Returns:
        The released notebook.

    Raises:
        CourseError: there is no such assignment in ``source``, or nbgrader refuses (it does where
            cells were added or removed after students had handed in).
    """
    with _nbgrader(course) as app:
        app.coursedir.assignment_id = lab
        source = app.coursedir.format_path(app.coursedir.source_directory, ".", lab)
        if not list(Path(source).glob("*.ipynb")):
            raise CourseError(f"no notebook in {source}: make the course with the lab first")
        _convert(GenerateAssignment, app, ".")
        folder = app.coursedir.format_path(app.coursedir.release_directory, ".", lab)
        return Path(os.path.normpath(folder)) / f"{lab}.ipynb"


def grade(
    course: Path,
    assignment: str,
    *,
    seed: int = 0,
    jobs: int = 1,
    walled: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
    verbose: bool = False,
) -> GradeSummary:
    """Grade every submission of an assignment: gradebook, feedback pages, CSV.

    A submission that cannot be graded stops nobody else's: it is listed with the reason. Students
    the gradebook does not know are added.

    Args:
        seed: of the inputs of the checks.
        jobs: how many submissions are judged at the same time. The gradebook has one writer. Each
            job takes several seconds to start, which only a large class wins back.
        walled: run student code in a sandbox (`autograder.sandbox`). Without, it has your user's
            rights, and every report says so.
        progress: called as ``progress(done, total, student)``, once before and once after each.
        verbose: show nbgrader's messages, which otherwise go to the log only.

    Raises:
        CourseError: nothing was submitted, or the assignment was not released; or this machine
            cannot isolate student code, and it should be ``walled``.
    """
    if walled and (reason := sandbox.missing()):
        raise CourseError(
            f"student code cannot be isolated on this machine: {reason}. If you trust every "
            "submission with your files, or this is a machine of its own, there is "
            "--unsafe-no-sandbox"
        )
    tell = progress or (lambda done, total, student: None)
    with _nbgrader(course, verbose) as app:
        app.coursedir.assignment_id = assignment
        submitted = _submitted(app, assignment)
        _require_released(app, assignment)
        root = Path(app.coursedir.root)
        summary = GradeSummary(
            assignment=assignment,
            seed=seed,
            version=fewer.__version__,
            csv=root / f"{assignment}.csv",
            feedback=root / app.coursedir.feedback_directory,
            log=root / LOG,
            notices=[] if walled else [NO_SANDBOX],
        )
        with _Judge(seed, walled) as judge:
            if jobs > 1:
                judge.work_ahead(submitted.values(), jobs)
            oracle = OraclePreprocessor(judge, seed, walled)
            for done, (student, folder) in enumerate(submitted.items()):
                tell(done, len(submitted), student)
                try:
                    _require_notebook(app, assignment, folder)
                    _convert(Autograde, app, student, oracle)
                    _convert(GenerateFeedback, app, student)
                except CourseError as error:
                    summary.failed[student] = str(error)
                tell(done + 1, len(submitted), student)
        with _gradebook(app) as gradebook:
            for student in summary.failed:
                gradebook.update_or_create_student(student)
            summary.scores = _scores(gradebook, assignment)
            for score in summary.scores:
                if score.student in summary.failed:
                    summary.failed[score.student] += "; the gradebook keeps the earlier grade"
            export = CsvExportPlugin(parent=app, to=str(summary.csv), assignment=[assignment])
            export.export(gradebook)
    return summary


def scores(course: Path, assignment: str) -> list[Score]:
    """The points of every submission in the gradebook, by student."""
    with _nbgrader(course) as app, _gradebook(app) as gradebook:
        return _scores(gradebook, assignment)


def _scores(gradebook: Gradebook, assignment: str) -> list[Score]:
    found = []
    for submission in gradebook.assignment_submissions(assignment):
        grades = [grade for notebook in submission.notebooks for grade in notebook.grades]
        if not any(map(_has_grade, grades)):  # nbgrader enters a submission before it can fail
            continue
        penalty = submission.late_submission_penalty or 0.0
        found.append(
            Score(
                student=submission.student.id,
                points=max(0.0, submission.score - penalty),
                possible=submission.max_score,
                late_penalty=penalty,
                cells={
                    grade.name: CellScore(grade.score, grade.max_score, grade.needs_manual_grade)
                    for grade in sorted(grades, key=lambda grade: grade.name)
                },
            )
        )
    return sorted(found, key=lambda score: score.student)


def _has_grade(grade: Any) -> bool:
    return grade.auto_score is not None or grade.manual_score is not None


@contextlib.contextmanager
def _nbgrader(course: Path, verbose: bool = False) -> Iterator[NbGrader]:
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


def _gradebook(app: NbGrader) -> Gradebook:
    return Gradebook(app.coursedir.db_url, app.coursedir.course_id)


def _convert(
    kind: type[BaseConverter], app: NbGrader, student: str, oracle: OraclePreprocessor | None = None
) -> None:
    """Run one of nbgrader's converters on one student's work, always anew.

    Raises:
        CourseError: with what really went wrong, which nbgrader itself only writes to its log.
    """
    trouble: list[Exception] = []

    class Converter(kind):
        def init_assignment(self, *args: Any) -> None:
            with _remembered(trouble):
                super().init_assignment(*args)

        def convert_single_notebook(self, filename: str) -> None:
            with _remembered(trouble):
                super().convert_single_notebook(filename)

    app.coursedir.student_id = glob.escape(student)
    converter = Converter(coursedir=app.coursedir, parent=app, force=True)
    if oracle is not None:
        converter.autograde_preprocessors = [
            oracle if step in (Execute, "nbgrader.preprocessors.Execute") else step
            for step in converter.autograde_preprocessors
        ]
    try:
        converter.start()
    except Exception as error:
        cause = trouble[0] if trouble else error
        message = "".join(str(cause).strip().splitlines()[:1])
        if isinstance(cause, GraderFault):
            raise CourseError(f"the grader's own fault: {message}") from cause
        what = f"{type(cause).__name__}: {message}"
        raise CourseError(f"nbgrader cannot process it ({what}), see {LOG}") from cause


@contextlib.contextmanager
def _remembered(trouble: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        trouble.append(error)
        raise


def _submitted(app: NbGrader, assignment: str) -> dict[str, Path]:
    """The folders handed in, by student."""
    where = functools.partial(app.coursedir.format_path, app.coursedir.submitted_directory)
    pattern = where("(?P<student>[^/]+)", re.escape(assignment), escape=True)
    found = {}
    for folder in sorted(glob.glob(where("*", glob.escape(assignment)))):
        if (match := re.fullmatch(pattern, folder)) and os.path.isdir(folder):
            found[match["student"]] = Path(folder)
    if not found:
        raise CourseError(f"nothing was handed in: no folder matches {where('*', assignment)}")
    return found


def _require_released(app: NbGrader, assignment: str) -> None:
    with _gradebook(app) as gradebook:
        try:
            released = gradebook.find_assignment(assignment).notebooks
        except MissingEntry:
            released = []
    if not released:
        raise CourseError(f"{assignment} is not in the gradebook: release it before grading")


def _require_notebook(app: NbGrader, assignment: str, folder: Path) -> None:
    """Say plainly what is wrong with a submission that nbgrader could not even read."""
    with _gradebook(app) as gradebook:
        names = [n.name for n in gradebook.find_assignment(assignment).notebooks]
    paths = [folder / f"{name}.ipynb" for name in names]
    if not any(path.is_file() for path in paths):
        others = sorted(path.name for path in folder.iterdir())
        instead = f"; there is {', '.join(others[:5])}" if others else ": the folder is empty"
        raise CourseError(f"no {' or '.join(path.name for path in paths)} was handed in{instead}")
    for path in paths:
        try:
            if path.is_file():
                nbformat.read(path, as_version=4)
        except Exception as error:
            kind = type(error).__name__
            raise CourseError(f"{path.name} is not a readable notebook ({kind})") from error


class _Judge:
    """Judges notebooks, remembers what it has seen, and with ``jobs`` above 1 works ahead.

    A verdict depends on the code of a notebook and nothing else, so equal ones (a class always has
    a few that are untouched) are judged once. What nbgrader changes before the judge sees it (a
    check cell that was tampered with) is simply not found among those judged ahead.
    """

    def __init__(self, seed: int, walled: bool) -> None:
        self.seed = seed
        self.walled = walled
        self.zygote: Zygote | None = Zygote(walled)
        self.known: dict[str, dict[str, Verdict]] = {}
        self.futures: dict[str, Future[dict[str, Any]]] = {}
        self.pool: ProcessPoolExecutor | None = None

    def work_ahead(self, folders: Iterable[Path], jobs: int) -> None:
        """Begin to judge what lies in ``folders``, in ``jobs`` processes."""
        # Spawned, because a fork of a process that has used torch may hang.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(jobs, context, _start_worker, (self.walled,))
        for path in sorted(path for folder in folders for path in folder.glob("*.ipynb")):
            with contextlib.suppress(Exception):  # unreadable: reported when its turn comes
                notebook = nbformat.read(path, as_version=4)
                key = _code_of(notebook)
                if key not in self.futures:
                    self.futures[key] = self.pool.submit(_judge_in_worker, notebook, self.seed)

    def __call__(self, notebook: NotebookNode) -> dict[str, Verdict]:
        """The verdicts of a notebook.

        Raises:
            GraderFault: judging itself is broken; the next notebook gets a fresh process.
            GraderError: not even that can be started.
        """
        key = _code_of(notebook)
        if key not in self.known:
            self.known[key] = self._from_worker(key) or self._here(notebook)
        return self.known[key]

    def _from_worker(self, key: str) -> dict[str, Verdict] | None:
        if key not in self.futures:
            return None
        try:
            answer = self.futures[key].result()
        except (BrokenExecutor, GraderError):  # a worker was killed, by want of memory perhaps
            return None
        return {name: Verdict.from_json(verdict) for name, verdict in answer.items()}

    def _here(self, notebook: NotebookNode) -> dict[str, Verdict]:
        self.zygote = self.zygote or Zygote(self.walled)
        try:
            return judge_notebook(notebook, self.zygote, seed=self.seed)
        except GraderError as error:
            self.zygote.close()
            self.zygote = None
            raise GraderFault(str(error)) from error

    def __enter__(self) -> _Judge:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        if self.zygote:
            self.zygote.close()


def _code_of(notebook: NotebookNode) -> str:
    """All of a notebook that a verdict can depend on, as a hash."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            about = cell.metadata.get("nbgrader", {})
            role = [about.get(key) for key in ("grade_id", "grade", "solution")]
            parts.append([cell.source, role, cell.metadata.get("tags")])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


_worker_zygote: Zygote | None = None


def _start_worker(walled: bool) -> None:
    global _worker_zygote
    _worker_zygote = Zygote(walled)  # it ends when this process does


def _judge_in_worker(notebook: NotebookNode, seed: int) -> dict[str, Any]:
    assert _worker_zygote is not None
    verdicts = judge_notebook(notebook, _worker_zygote, seed=seed)
    return {name: verdict.to_json() for name, verdict in verdicts.items()}
