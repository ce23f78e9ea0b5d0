"""Grading a class: submissions go to workers, what comes back goes to the gradebook.

A grade is a function of submission, course version and seed, and carries all three. A submission
that was graded with the same ones is not judged again. That is also how grading resumes: killed at
any moment and started again, it ends with the gradebook of a run that nobody interrupted, because
a batch is written to the gradebook first and marked as done (by its graded notebooks) last.

Workers (`autograder.executors`) know neither the gradebook nor the course folder. This process is
the only one that writes, and holds a few submissions at a time, however large the class.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import re
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
from nbformat import NotebookNode
from nbgrader.api import MissingEntry
from nbgrader.apps import NbGrader
from nbgrader.preprocessors import AssignLatePenalties
from nbgrader.utils import parse_utc
from sqlalchemy.exc import SQLAlchemyError

from autograder import executors, feedback, sandbox, worker
from autograder.course import LOG, CourseError, open_course
from autograder.gradebook import Book, Entry, Score, marks
from autograder.intake import Released, Unusable, pick, read, released, strange_id
from autograder.worker import Graded, GraderFault, Order, course_version

NO_SANDBOX = (
    "Student code ran without a sandbox: in processes of its own, but with your user's rights. "
    "Grade only submissions you trust with your files."
)
BATCH = 32  # submissions in one transaction of the gradebook
BATCH_SECONDS = 2.0  # ... or as many as came in this time
AHEAD = 4  # submissions that wait for each worker
FAULTS = 20  # of the grader itself in a row, after which it stops
TRIES = 2  # how often a submission may be at hand when a worker dies

Progress = Callable[[int, int, str], None]


@dataclass
class GradeSummary:
    """What became of a class.

    Attributes:
        version: of the course, as it is recorded with each grade.
        judged: how many submissions were judged in this run; the others had their grade.
        scores: one a submission in the gradebook, by student.
        failed: submissions that could not be graded, and why: no grade of theirs was written.
        remarks: what the instructor should know about a submission, by student.
        notices: sentences the instructor must see.
        csv: the gradebook's rows for this assignment, as nbgrader exports them.
        feedback: the folder of the feedback pages.
        log: what nbgrader said.
    """

    assignment: str
    seed: int
    version: str
    csv: Path
    feedback: Path
    log: Path
    judged: int = 0
    scores: list[Score] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def grade(
    course: Path,
    assignment: str,
    *,
    seed: int = 0,
    jobs: int | None = None,
    walled: bool = True,
    again: bool = False,
    execute: bool = False,
    executor: str = "",
    progress: Progress | None = None,
    verbose: bool = False,
) -> GradeSummary:
    """Grade every submission of an assignment: gradebook, feedback pages, CSV.

    A submission that cannot be graded stops nobody else's: it is listed with the reason. Students
    the gradebook does not know are added. Points that a person entered stay.

    Args:
        seed: of the inputs of the checks.
        jobs: how many submissions are judged at the same time; None: one a core in a large class,
            else one. The gradebook has one writer.
        walled: run student code in a sandbox (`autograder.sandbox`). Without, it has your user's
            rights, and every report says so.
        again: judge everything, also what has a grade of this course version and seed.
        execute: also run each notebook from top to bottom, so that the feedback page shows the
            student's own figures. That takes a minute or more a submission and changes no grade.
        executor: ``dask://HOST:PORT`` to judge on a Dask cluster.
        progress: called as ``progress(done, total, student)``, before and after each.
        verbose: show nbgrader's messages, which otherwise go to the log only.

    Raises:
        CourseError: nothing was submitted, or the assignment was not released; another process
            is grading; no executor answers; or this machine cannot isolate student code, and it
            should be ``walled``.
    """
    if not executor:  # on a cluster, each worker refuses by itself
        require_walls(walled)
    if executor and not executor.startswith(executors.PREFIX):
        raise CourseError(f"executor must be {executors.PREFIX}HOST:PORT, got {executor!r}")
    with open_course(course, verbose) as app, contextlib.ExitStack() as stack:
        app.coursedir.assignment_id = assignment
        submitted = _submitted(app, assignment)
        root = Path(app.coursedir.root)
        stack.enter_context(_nobody_else(root, assignment))
        book = stack.enter_context(open_book(app, assignment))
        summary = GradeSummary(
            assignment=assignment,
            seed=seed,
            version=course_version(),
            csv=root / f"{assignment}.csv",
            feedback=root / app.coursedir.feedback_directory,
            log=root / LOG,
            notices=[] if walled else [NO_SANDBOX],
        )
        order = Order(handed_out(app, book, assignment), summary.version, seed, walled, execute)
        folders = Folders(app, assignment)
        workers = stack.enter_context(_Workers(executor, jobs, len(submitted), walled))
        run = _Run(book, order, folders, workers, summary, again)
        run.over(submitted, progress or (lambda done, total, student: None))
        book.add_students(s for s in summary.failed if not strange_id(s))
        book.penalize(_late_rule(app))
        summary.scores = book.scores()
        there = {score.student for score in summary.scores}
        for student in summary.failed.keys() & there:
            summary.failed[student] += "; the gradebook keeps the earlier grade"
        summary.failed = dict(sorted(summary.failed.items()))
        _write_feedback(book, folders, order, [s for s in summary.scores if s.student in submitted])
        book.write_csv(summary.csv, summary.scores)
    return summary


def require_walls(walled: bool) -> None:
    """Refuse where student code should be isolated and cannot be.

    Raises:
        CourseError: what is missing, and how to get it.
    """
    if walled and (reason := sandbox.missing()):
        raise CourseError(
            f"student code cannot be isolated on this machine: {reason}. If you trust every "
            "submission with your files, or this is a machine of its own, there is "
            "--unsafe-no-sandbox"
        )


def scores(course: Path, assignment: str) -> list[Score]:
    """The points of every submission in the gradebook, by student."""
    with open_course(course) as app, open_book(app, assignment) as book:
        return book.scores()


class _Run:
    """One run over a class."""

    def __init__(
        self,
        book: Book,
        order: Order,
        folders: Folders,
        workers: _Workers,
        summary: GradeSummary,
        again: bool,
    ) -> None:
        self.book = book
        self.order = order
        self.folders = folders
        self.workers = workers
        self.summary = summary
        self.again = again
        self._jobs: dict[Future[dict[str, Graded]], _Job] = {}
        self._same: dict[str, str] = {}  # by key: the first student who handed that in
        self._copies: dict[str, list[_Job]] = defaultdict(list)  # by student: who handed in equal
        self._batch: list[tuple[Entry, dict[str, bytes]]] = []
        self._flushed = time.monotonic()
        self._faults = 0
        self._entered: set[str] = set()

    def over(self, submitted: Mapping[str, Path], tell: Progress) -> None:
        """Grade what lies in the folders ``submitted``, by student."""
        done = 0

        def finish(students: list[str]) -> None:
            nonlocal done
            for student in students:
                done += 1
                tell(done, len(submitted), student)

        for student, folder in submitted.items():
            tell(done, len(submitted), student)
            try:
                finish(self._begin(student, folder))
            except Unusable as error:
                self.summary.failed[student] = str(error)
                finish([student])
            while len(self._jobs) >= self.workers.window:
                finish(self._collect())
        while self._jobs:
            finish(self._collect())
        self._flush()

    def _begin(self, student: str, folder: Path) -> list[str]:
        """Hand a submission to a worker; return whose grading is done with that."""
        if why := strange_id(student):
            raise Unusable(why)
        picked = pick(folder, self.order.released)
        timestamp, remark = _timestamp(folder)
        remarks = [*picked.notices, *remark]
        files = {name: read(path) for name, path in picked.paths.items()}
        job = _Job(student, timestamp, files, self.order.key(files), remarks)
        first = self._same.setdefault(job.key, student)
        if not self.again and self._has_its_grade(job):
            return [student]
        if first in {running.student for running in self._jobs.values()} and first != student:
            job.files = {}
            self._copies[first].append(job)
            return []
        judged = first != student and (not self.again or first in self._entered)
        if judged:
            self._flush()
            if (graded := self._graded(first, job)) is not None:
                self._enter(job, graded)
                return [student]
        self._submit(job)
        return []

    def _has_its_grade(self, job: _Job) -> bool:
        """Whether a submission was graded by the same order, and the gradebook has it."""
        graded = self._graded(job.student, job)
        if graded is None:
            return False
        found = {name: notebook.marks for name, notebook in graded.items()}
        if not self.book.has(Entry(job.student, job.timestamp, found)):
            return False
        self._remark(job, graded)
        return True

    def _graded(self, student: str, job: _Job) -> dict[str, Graded] | None:
        """The graded notebooks of a student, if they are those that ``job`` would come to."""
        graded = {}
        for name in job.files:
            try:
                data = (self.folders.autograded(student) / f"{name}.ipynb").read_bytes()
                notebook = worker.from_bytes(data)
            except (OSError, ValueError):
                return None
            made = notebook.metadata.get("fewer") or {}
            if made.get("key") != job.key:
                return None
            if made.pop("remarks", None):  # about that file, not about this one
                data = worker.to_bytes(notebook)
            graded[name] = Graded(data, marks(notebook), made["notices"])
        return graded

    def _submit(self, job: _Job) -> None:
        job.tries += 1
        self._jobs[self.workers.submit(worker.judge, job.files, self.order)] = job

    def _collect(self) -> list[str]:
        """Wait for a worker and enter what it found; return whose grading is done with that."""
        finished: list[str] = []
        ready, _ = wait(self._jobs, return_when=FIRST_COMPLETED)
        died: list[_Job] = []
        for future in ready:
            job = self._jobs.pop(future)
            if isinstance(future.exception(), BrokenExecutor):
                died.append(job)
            else:
                finished += self._finish(job, future)
        if died:  # and with them all that a broken pool will never finish
            lost = [*died, *self._jobs.values()]
            self._jobs.clear()
            finished += self._revive(lost)
        return finished

    def _finish(self, job: _Job, future: Future[dict[str, Graded]]) -> list[str]:
        """Enter what a worker found, or why it found nothing; return whose grading that was."""
        jobs = [job, *self._copies.pop(job.student, ())]
        try:
            graded = future.result()
        except Unusable as error:
            why = str(error)
        except BrokenExecutor:
            self.workers.restart()
            why = self._fault("the process that judges it is killed every time")
        except GraderFault as error:
            why = self._fault(str(error))
        except Exception as error:  # a cluster has many ways to fail
            why = self._fault(f"{type(error).__name__}: {error}")
        else:
            self._faults = 0
            for one in jobs:
                self._enter(one, graded)
            return [one.student for one in jobs]
        for one in jobs:
            self.summary.failed[one.student] = why
        return [one.student for one in jobs]

    def _fault(self, why: str) -> str:
        """Count a fault of the grader; so many in a row will not end by themselves."""
        self._faults += 1
        if self._faults == FAULTS:
            self._flush()
            raise CourseError(f"grading stops after {FAULTS} faults of its own in a row: {why}")
        return f"the grader's own fault: {why}"

    def _revive(self, jobs: list[_Job]) -> list[str]:
        """New workers after one was killed, by want of memory perhaps. Who was at hand is tried
        again, at last alone, so that nobody pays for another; who kills a worker then is given up.
        """
        finished: list[str] = []
        self.workers.restart()
        for job in jobs:  # before any other is under way again
            if job.tries >= TRIES:
                alone = self.workers.submit(worker.judge, job.files, self.order)
                finished += self._finish(job, alone)
        for job in jobs:
            if job.tries < TRIES:
                self._submit(job)
        return finished

    def _enter(self, job: _Job, graded: dict[str, Graded]) -> None:
        found = {name: notebook.marks for name, notebook in graded.items()}
        files = {name: _remarked(notebook.data, job.remarks) for name, notebook in graded.items()}
        self._remark(job, graded)
        self.summary.judged += 1
        self._entered.add(job.student)
        self._batch.append((Entry(job.student, job.timestamp, found), files))
        late = time.monotonic() - self._flushed > BATCH_SECONDS
        if len(self._batch) >= BATCH or late:
            self._flush()

    def _flush(self) -> None:
        """Write a batch: to the gradebook, then the notebooks that mark it as done."""
        batch, self._batch = self._batch, []
        self._flushed = time.monotonic()
        if not batch:
            return
        try:
            self.book.write([entry for entry, _ in batch])
        except SQLAlchemyError as error:
            if len(batch) == 1:
                why = str(getattr(error, "orig", None) or error).splitlines()[0]
                self.summary.failed[batch[0][0].student] = f"the gradebook refuses it: {why}"
                return
            for one in batch:  # one of them is to blame
                self._batch = [one]
                self._flush()
            return
        for entry, files in batch:
            folder = self.folders.autograded(entry.student)
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                _replace(folder / f"{name}.ipynb", data, self.folders.read_only)
            if entry.timestamp:
                text = f"{entry.timestamp:%Y-%m-%d %H:%M:%S.%f} UTC"
                _replace(folder / "timestamp.txt", text.encode(), self.folders.read_only)

    def _remark(self, job: _Job, graded: dict[str, Graded]) -> None:
        said = [notice for notebook in graded.values() for notice in notebook.notices]
        if remarks := [*job.remarks, *said]:
            self.summary.remarks[job.student] = remarks


@dataclass
class _Job:
    """A submission on its way."""

    student: str
    timestamp: Any
    files: dict[str, bytes]
    key: str
    remarks: list[str]
    tries: int = 0


class _Workers:
    """An executor that starts when the first submission needs it, and can start again."""

    def __init__(self, address: str, jobs: int | None, submissions: int, walled: bool) -> None:
        self.address = address
        self.jobs = executors.processes(jobs, submissions)
        self.walled = walled
        self._stack = contextlib.ExitStack()
        self._executor: Executor | None = None

    @property
    def window(self) -> int:
        """How many submissions to have under way."""
        return 1 if self.jobs == 1 else AHEAD * self.jobs

    def submit(self, *work: Any) -> Future[Any]:
        for _ in range(TRIES):
            try:
                return self._start().submit(*work)
            except BrokenExecutor:
                self.restart()
        return self._start().submit(*work)

    def _start(self) -> Executor:
        if self._executor is None:
            if self.address:
                try:
                    cluster = self._stack.enter_context(executors.dask(self.address))
                except executors.NoExecutor as error:
                    raise CourseError(str(error)) from None
                self._executor, self.jobs = cluster
            else:
                self._executor = executors.local(self.jobs, self.walled)
        return self._executor

    def restart(self) -> None:
        executor, self._executor = self._executor, None
        if executor and not self.address:  # a cluster goes on without us
            executor.shutdown(cancel_futures=True)
        self._stack.close()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.restart()


class Folders:
    """Where the course folder keeps what belongs to a student."""

    def __init__(self, app: NbGrader, assignment: str) -> None:
        self._where = functools.partial(app.coursedir.format_path, assignment_id=assignment)
        self._autograded = app.coursedir.autograded_directory
        self._feedback = app.coursedir.feedback_directory
        shared = app.coursedir.groupshared
        self.read_only = 0o664 if shared else 0o444
        self.writable = 0o664 if shared else 0o644

    def autograded(self, student: str) -> Path:
        return Path(self._where(self._autograded, student))

    def feedback(self, student: str) -> Path:
        return Path(self._where(self._feedback, student))


def _write_feedback(book: Book, folders: Folders, order: Order, scores: list[Score]) -> None:
    """Write the feedback page of every notebook that has a grade."""
    names, late = book.names(), book.hours_late()
    for score in scores:
        for name in order.released:
            try:
                notebook = load(folders.autograded(score.student) / f"{name}.ipynb")
            except (OSError, ValueError):
                continue  # not handed in
            page = feedback.page(
                notebook, score, names.get(score.student, score.student), late.get(score.student)
            )
            path = folders.feedback(score.student) / f"{name}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, page.encode("utf-8", "replace"), folders.writable)


def _submitted(app: NbGrader, assignment: str) -> dict[str, Path]:
    """The folders handed in, by student."""
    where = functools.partial(app.coursedir.format_path, app.coursedir.submitted_directory)
    pattern = where("(?P<student>[^/]+)", re.escape(assignment), escape=True)
    found = {}
    for folder in sorted(glob.glob(where("*", glob.escape(assignment)))):
        if match := re.fullmatch(pattern, folder, re.DOTALL):
            found[match["student"]] = Path(folder)
    if not found:
        raise CourseError(f"nothing was handed in: no folder matches {where('*', assignment)}")
    return found


def open_book(app: NbGrader, assignment: str) -> Book:
    try:
        return Book(app.coursedir.db_url, app.coursedir.course_id, assignment)
    except MissingEntry:
        raise CourseError(
            f"{assignment} is not in the gradebook: release it before grading"
        ) from None
    except SQLAlchemyError as error:
        why = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise CourseError(f"the gradebook cannot be opened: {why}") from error


def handed_out(app: NbGrader, book: Book, assignment: str) -> dict[str, Released]:
    """What students got, by the notebook's name."""
    folder = app.coursedir.format_path(app.coursedir.release_directory, ".", assignment)
    return released(book.gradebook, assignment, Path(folder))


def _late_rule(app: NbGrader) -> Any:
    """The course's plugin for late penalties."""
    rules = AssignLatePenalties(parent=app)
    rules.init_plugin()
    return rules.plugin_inst


@contextlib.contextmanager
def _nobody_else(root: Path, assignment: str) -> Iterator[None]:
    """Keep a second grading of the same assignment out. A process that was killed keeps nobody
    out: the system gives its lock back."""
    lock = filelock.FileLock(root / f".{assignment}.grading.lock", timeout=0)
    try:
        with lock:
            yield
    except filelock.Timeout:
        raise CourseError(
            f"another process is grading {assignment} in {root}: wait for it"
        ) from None


def _timestamp(folder: Path) -> tuple[Any, list[str]]:
    """When a submission was handed in, and what is wrong with the file that says so."""
    path = folder / "timestamp.txt"
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > 1000:
            raise ValueError
        return parse_utc(path.read_text("utf-8").strip() or None), []
    except FileNotFoundError:
        return None, []
    except (OSError, ValueError, OverflowError):
        return None, ["timestamp.txt holds no date: taken as handed in on time"]


def _remarked(data: bytes, remarks: list[str]) -> bytes:
    """A graded notebook with what is to be said about its file."""
    if not remarks:
        return data
    notebook = worker.from_bytes(data)
    notebook.metadata["fewer"]["remarks"] = remarks
    return worker.to_bytes(notebook)


def load(path: Path) -> NotebookNode:
    return worker.from_bytes(path.read_bytes())


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Write a file so that at every moment there is the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.write_bytes(data)
    new.chmod(mode)
    new.replace(path)
