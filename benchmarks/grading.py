"""What grading a class costs: stock `nbgrader autograde` and `fewer grade` on the same notebooks.

The class is the sample class of `fewer demo` again and again (right work in two styles, four
misconceptions, half of it, nothing, a syntax error, a crash, an endless loop, noise), every
submission made different from all others by a comment in each cell, so that no two are equal.

    python benchmarks/grading.py --ours 12 --stock 0                            # a look
    python benchmarks/grading.py --ours 100,1000 --stock 100                    # the README's table
    python benchmarks/grading.py --ours 10,30,100,300,1000,3000 --stock 0       # growth

Each is the command that an instructor would type, in a process of its own, started cold. Prints
submissions a minute, processor seconds a submission (of all processes) and the most memory that all
processes held together (PSS: shared pages count once), and writes benchmarks/results/. Stock takes
several seconds a submission, so it is asked for fewer; its rate does not depend on their number.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import nbformat
import psutil
import typer
from rich.console import Console
from rich.table import Table
from sparse_training import processor

import fewer
from autograder.course import create_course, release
from autograder.demo import LAB, expected_points, sample_class
from autograder.exercise import find
from autograder.grading import scores

RESULTS = Path(__file__).parent / "results"
console = Console(highlight=False)


def main(
    ours: Annotated[str, typer.Option(help="Sizes of the class for `fewer grade`.")] = "100,1000",
    stock: Annotated[str, typer.Option(help="Sizes for stock nbgrader; 0 for none.")] = "100",
    jobs: Annotated[int, typer.Option(help="Processes of `fewer grade`; 0: its default.")] = 0,
    write: Annotated[bool, typer.Option(help="Write benchmarks/results/.")] = True,
) -> None:
    """Grade classes of several sizes with both, and print what it cost."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in filter(None, map(int, stock.split(","))):
            rows.append(measure("nbgrader autograde", Path(folder), size, jobs))
        for size in filter(None, map(int, ours.split(","))):
            rows.append(measure("fewer grade", Path(folder), size, jobs))
    table = Table(box=None, header_style="dim")
    for name in ("", "submissions", "a minute", "seconds", "CPU-s each", "peak MB", "as deserved"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        table.add_row(
            row["command"],
            str(row["submissions"]),
            f"{row['per_minute']:.0f}",
            f"{row['seconds']:.0f}",
            f"{row['cpu_seconds'] / row['submissions']:.3f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['as_deserved']} of {row['submissions']}",
        )
    console.print(table)
    if write:
        now = datetime.datetime.now()
        about = {
            "date": now.isoformat(timespec="seconds"),
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "fewer": fewer.__version__,
            "lab": LAB,
        }
        path = RESULTS / f"grading_{now:%Y%m%d_%H%M%S}.json"
        path.write_text(json.dumps({"about": about, "runs": rows}, indent=1) + "\n")
        console.print(f"Wrote {path}")


def measure(command: str, folder: Path, size: int, jobs: int) -> dict[str, Any]:
    """Run one command on a fresh class and watch it."""
    console.print(f"[dim]{command}, {size} submissions ...[/]")
    course = folder / f"{command.split()[0]}-{size}"
    deserved, lab = make_class(course, size)
    if command.startswith("fewer"):
        argv = ["autograder.cli", "grade", str(course), "--seed", "0"]
        argv += ["--jobs", str(jobs)] if jobs else []
        argv = [sys.executable, "-c", "from autograder.cli import app; app()", *argv[1:]]
    else:
        argv = [sys.executable, "-m", "nbgrader", "autograde", lab, "--force"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what it leaves is ours
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    with (course / "bench.log").open("w") as log:
        process = subprocess.Popen(
            argv, cwd=course, env=os.environ | {"PATH": path}, stdout=log, stderr=log
        )
        peak = Peak(process.pid)
        process.wait()
    seconds = time.monotonic() - begin
    peak.stop()
    adopt_and_wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    got = {score.student: score.points for score in scores(course, lab)}
    shutil.rmtree(course)
    return {
        "command": command,
        "submissions": size,
        "seconds": seconds,
        "per_minute": 60 * size / seconds,
        "cpu_seconds": sum(
            getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime")
        ),
        "peak_bytes": peak.bytes,
        "as_deserved": sum(got.get(student) == points for student, points in deserved.items()),
    }


def adopt_and_wait() -> None:
    """Wait for the processes that a command left behind: only then is their time counted."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.05)
        except ChildProcessError:
            return


def make_class(course: Path, size: int) -> tuple[dict[str, float], str]:
    """A course whose class has handed in; what each deserves, and the assignment's name."""
    [lab] = create_course(course, Path(__file__).parents[1], [LAB])
    # Plain nbgrader waits as long as it does by default.
    config = course / "nbgrader_config.py"
    config.write_text(config.read_text().replace("c.Execute.timeout = 120\n", ""))
    release(course, lab)
    twelve = sample_class(course, lab)
    solution = nbformat.read(course / "source" / lab / f"{lab}.ipynb", as_version=4)
    names = [cell.metadata.nbgrader.grade_id for cell in solution.cells if is_exercise(cell)]
    points = {s.id: sum(expected_points(s, [find(n) for n in names]).values()) for s in twelve}
    submitted = course / "submitted"
    work = {s.id: (submitted / s.id / lab / f"{lab}.ipynb").read_text() for s in twelve}
    shutil.rmtree(submitted)
    deserved = {}
    for i in range(size):
        sample = twelve[i % len(twelve)]
        student = f"{sample.id}-{i:05}"
        notebook = nbformat.reads(work[sample.id], as_version=4)
        for cell in notebook.cells:
            if is_exercise(cell):
                cell.source += f"\n# {student}"
        path = submitted / student / lab / f"{lab}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_text(nbformat.writes(notebook))
        deserved[student] = float(points[sample.id])
    return deserved, lab


def is_exercise(cell: Any) -> bool:
    return cell.cell_type == "code" and bool(cell.metadata.get("nbgrader", {}).get("solution"))


class Peak(threading.Thread):
    """The most memory that a process and all below it hold together, looked at twice a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._root = psutil.Process(pid)
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.5):
            total = 0
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in processes:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)

    def stop(self) -> None:
        self._over.set()
        self.join()


if __name__ == "__main__":
    typer.run(main)
