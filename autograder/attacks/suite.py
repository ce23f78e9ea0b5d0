"""All attackers in one class, and what came of it."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import html.parser
import json
import os
import re
import secrets
import select
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import autograder
import fewer
from autograder import sandbox
from autograder.attacks import answers, exhaustion, machine, notebooks, pages, process
from autograder.attacks.attack import BRAG, HONEST, MARK, Attack, Scene
from autograder.report import verdicts
from autograder.verdict import GRADE_ID, Verdict

if TYPE_CHECKING:
    from autograder.grading import GradeSummary

LAB = 1
SEED = 5  # of the class; what the checks ask with seed 0 is known to everybody
NEIGHBOURS = "honest neighbours"
VARIABLE = "FEWER_ATTACK_TOKEN"
LARGEST_PAGE = 2_000_000  # bytes: a page is for reading
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
FORMULA = re.compile(r"[=+@\t\r-]")


@dataclass
class Outcome:
    """What came of an attack.

    Attributes:
        earned: points by exercise, as the gradebook has them; empty if there is no grade.
        deserved: what the work in it is worth.
        harm: what it did that it must not, in words.
        told: what the instructor was told who cannot grade it.
    """

    attack: Attack
    earned: dict[str, float]
    deserved: dict[str, float]
    harm: list[str] = field(default_factory=list)
    told: str = ""

    @property
    def repelled(self) -> bool:
        """Whether everybody got what they deserve, and no harm was done."""
        return not self.harm and +Counter(self.earned) == +Counter(self.deserved)


def attacks(short: bool = False) -> list[Attack]:
    """All attacks; without the slow ones for the short form."""
    found = [
        a for m in (process, machine, exhaustion, answers, notebooks, pages) for a in m.ATTACKS
    ]
    return [attack for attack in found if not (short and attack.slow)]


def run_attacks(
    folder: Path,
    root: Path,
    progress: Callable[[int, int, str], None] | None = None,
    short: bool = False,
    chosen: Sequence[Attack] | None = None,
) -> list[Outcome]:
    """Grade a class of attackers and neighbours in ``folder``, which must be new or empty.

    Args:
        root: the folder with the course's ``solutions/``.
        progress: called as ``progress(done, total, student)``.
        short: leave out what takes as long as the bounds allow.
        chosen: these attacks in place of all.

    Returns:
        What came of each, then of the neighbours, and last of the class as a whole.

    Raises:
        CourseError: this machine cannot isolate student code. Nothing was run.
        FileExistsError: ``folder`` holds something.
    """
    from autograder.course import create_course, release
    from autograder.grading import grade, require_walls
    from autograder.report import write_report

    require_walls(True)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder must be new or empty, and {folder} holds other things")
    course = folder.resolve() / "course"
    (lab,) = create_course(course, root, [LAB])
    release(course, lab)
    with _scene(course, lab) as (scene, heard):
        class_ = [*(attacks(short) if chosen is None else chosen), *_neighbours(course, lab)]
        students = [a.student.replace("@MARK@", MARK.format(i)) for i, a in enumerate(class_)]
        for number, (attack, student) in enumerate(zip(class_, students, strict=True)):
            _hand_in(attack, student, replace(scene, mark=MARK.format(number)))
        before = _contents(scene)
        summary = grade(course, lab, seed=SEED, progress=progress)
        page = write_report(course, lab, folder / "report.html").read_text("utf-8")
        changed = sorted({path for path, _ in before.items() ^ _contents(scene).items()})
    outcomes = [
        _outcome(attack, student, scene, summary)
        for attack, student in zip(class_, students, strict=True)
    ]
    whole = Attack("the class as a whole", NEIGHBOURS, "Nothing around it is changed by grading.")
    outcomes.append(Outcome(whole, {}, {}))

    # Everything else bears the mark of who did it.
    evidence = [*_left(scene), *((f"was heard on {way}", said) for way, said in heard)]
    evidence += [("is part of the class report", part) for part in foreign_parts(page)]
    evidence += [("changed a file", path) for path in changed]
    evidence += [("left a formula in the table", cell) for cell in _formulas(summary.csv)]
    for outcome in outcomes[:-1]:
        evidence += [("bragged", word) for word in outcome.harm if re.search(MARK_FOUND, word)]
        outcome.harm = [word for word in outcome.harm if not re.search(MARK_FOUND, word)]
    for what, proof in evidence:
        found = re.search(MARK_FOUND, proof)
        outcomes[int(found[1]) if found else -1].harm.append(f"{what}: {proof[:200]}")
    return outcomes


MARK_FOUND = MARK.format(0).replace("000", r"(\d{3})")


@contextlib.contextmanager
def _scene(course: Path, lab: str) -> Iterator[tuple[Scene, list[tuple[str, str]]]]:
    """The scene of the attack, and a list of what is heard (on which way, what) as it happens."""
    from autograder.demo import solution_cells
    from autograder.exercise import find

    outside = course.parent / "outside"
    outside.mkdir()
    outside.chmod(0o777)
    secret = secrets.token_hex(16)
    (outside / "secret.txt").write_text(f"{secret}\n")
    solution = course / "source" / lab / f"{lab}.ipynb"
    solutions = solution_cells(nbformat.read(solution, as_version=4))
    files = [
        outside / "secret.txt",
        course / "gradebook.db",
        solution,
        course / "nbgrader_config.py",
    ]
    checks = Path(autograder.__file__).parent / "checks"
    files += [course / "submitted" / notebooks.NEIGHBOUR / lab / f"{lab}.ipynb"]
    known: dict[str, Any] = {
        "course": str(course),
        "outside": str(outside),
        "files": [*map(str, files), str(checks / "quantization.py")],
        "checks": str(checks),
        "shown": sandbox.readable(),  # which may lie below /tmp
        "home": str(Path.home()),
        "grader": os.getpid(),
        "variable": VARIABLE,
    }
    scene = Scene(
        course=course,
        outside=outside,
        lab=lab,
        released=nbformat.read(course / "release" / lab / f"{lab}.ipynb", as_version=4),
        solutions=solutions,
        known=known,
        secret=secret,
        worth={name: find(name).points for name in solutions},
    )
    heard: list[tuple[str, str]] = []
    os.environ[VARIABLE] = secret
    try:
        with _ears(outside, known, heard):
            yield scene, heard
    finally:
        del os.environ[VARIABLE]


@contextlib.contextmanager
def _ears(outside: Path, known: dict[str, Any], heard: list[tuple[str, str]]) -> Iterator[None]:
    """Servers that note what is sent to them."""
    with contextlib.ExitStack() as stack:
        tcp, udp, file, abstract = (
            stack.enter_context(socket.socket(family, kind))
            for family, kind in (
                (socket.AF_INET, socket.SOCK_STREAM),
                (socket.AF_INET, socket.SOCK_DGRAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
            )
        )
        tcp.bind(("127.0.0.1", 0))
        known["port"] = tcp.getsockname()[1]
        udp.bind(tcp.getsockname())
        known["abstract"] = f"\0fewer-{secrets.token_hex(8)}"
        abstract.bind(known["abstract"])
        known["socket"] = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "ear")
        file.bind(known["socket"])  # a path of a socket must be short
        for server in (tcp, file, abstract):
            server.listen(64)
        ways = {tcp: "TCP", udp: "UDP", file: "a socket", abstract: "an abstract socket"}
        done, wake = socket.socketpair()
        listener = threading.Thread(target=_listen, args=(ways, done, heard), daemon=True)
        listener.start()
        try:
            yield
        finally:
            wake.close()
            listener.join()
            done.close()


def _listen(
    ways: Mapping[socket.socket, str], done: socket.socket, heard: list[tuple[str, str]]
) -> None:
    """Until ``done`` is closed at its other end."""
    while done not in (ready := select.select([*ways, done], [], [])[0]):
        for server in ready:
            said = b""
            with contextlib.suppress(OSError):
                if server.type == socket.SOCK_DGRAM:
                    said = server.recv(1000)
                else:
                    with server.accept()[0] as connection:
                        connection.settimeout(1.0)
                        said = connection.recv(1000)
            heard.append((ways[server], said.decode("utf-8", "replace")))


def _neighbours(course: Path, lab: str) -> list[Attack]:
    """Honest students, whose points must be right whoever hands in beside them."""
    from autograder.demo import expected_points, solution_cells, the_twelve
    from autograder.exercise import find

    solution = nbformat.read(course / "source" / lab / f"{lab}.ipynb", as_version=4)
    exercises = [find(name) for name in solution_cells(solution)]
    twelve = the_twelve(solution)
    return [
        Attack(
            name,
            NEIGHBOURS,
            f"Hands in: {twelve[which].wrote}.",
            twelve[which].cells,
            deserves=expected_points(twelve[which], exercises, SEED),
            honest=False,
        )
        for name, which in {
            notebooks.NEIGHBOUR.replace("-", " "): 0,
            "half a neighbour": 6,
            "one mistaken neighbour": 2,
            "the perfect one's friend": 0,
        }.items()
    ]


def _hand_in(attack: Attack, student: str, scene: Scene) -> None:
    """Write the submission of an attack."""
    nb = nbformat.from_dict(scene.released)
    cells = {HONEST: scene.solutions[HONEST]} if attack.honest else {}
    known = repr({**scene.known, "mark": scene.mark})
    for name, source in (cells | dict(attack.cells)).items():
        notebooks.cell_of(nb, name).source = source.replace("@KNOWN@", known)
    made = (attack.forge(nb, scene) if attack.forge else None) or nb
    data = made if isinstance(made, bytes) else json.dumps(made).encode()
    path = scene.course / "submitted" / student / scene.lab / f"{scene.lab}.ipynb"
    path.parent.mkdir(parents=True)
    hand_in = attack.hand_in or (lambda path, data, scene: path.write_bytes(data))
    hand_in(path, data.replace(b"@MARK@", scene.mark.encode()), scene)


def _outcome(attack: Attack, student: str, scene: Scene, summary: GradeSummary) -> Outcome:
    """Points and pages of one submission."""
    deserved: dict[str, float] = {}
    if attack.deserves is not None:
        deserved = {HONEST: scene.worth[HONEST]} if attack.honest else {}
        deserved |= attack.deserves
    told = summary.failed.get(student, "")
    score = next((score for score in summary.scores if score.student == student), None)
    cells = score.cells if score else {}
    earned = {name.removeprefix(GRADE_ID): cell.points for name, cell in cells.items()}
    outcome = Outcome(attack, earned, deserved, told=told)
    if "own fault" in told:
        outcome.harm.append(f"the grader broke: {told}")
    for folder in ("feedback", "autograded"):
        for path in (scene.course / folder / student).rglob("*"):
            if path.is_file():
                outcome.harm += _harm_in(path, scene)
    outcome.harm = list(dict.fromkeys(outcome.harm))
    return outcome


def _harm_in(path: Path, scene: Scene) -> Iterator[str]:
    """What is wrong with a file that grading made of a submission."""
    text = path.read_text("utf-8", "replace")
    if scene.secret in text:
        yield f"a secret is in {path.name}"
    if path.suffix == ".html":
        yield from (f"is part of the feedback page: {part}" for part in foreign_parts(text))
        if len(text) > LARGEST_PAGE:
            yield f"the feedback page has {len(text) >> 20} MB"
    elif path.suffix == ".ipynb":
        for verdict in verdicts(nbformat.from_dict(json.loads(text))).values():
            for word in words(verdict):
                if BRAG in word:
                    yield word[word.index(BRAG) :]
                if found := CONTROL.search(word):
                    yield f"a verdict has the character {found[0]!r}, a command for terminals"


def words(verdict: Verdict) -> Iterator[str]:
    """All that a verdict says which may be a student's words."""
    yield verdict.note
    for result in verdict.results:
        if failure := result.failure:
            yield from vars(failure).values()


def foreign_parts(page: str) -> list[str]:
    """Tags, attributes and scripts of a page that bear the mark of an attack: text alone may.

    Example:
        >>> foreign_parts("<p title='zq001qz'>zq002qz</p><script>zq003qz</script>")
        ["title='zq001qz'", 'zq003qz']
    """
    return [part for part in _Parts(page).found if re.search(MARK_FOUND, part)]


class _Parts(html.parser.HTMLParser):
    """What of a page is not text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(f"{name}={value!r}" for name, value in attrs)]

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:  # of a script or a style
            self.found.append(data)


def _contents(scene: Scene) -> dict[str, str]:
    """Digests of files that nobody may change."""
    folders = (scene.outside, scene.course / "source", scene.course / "release")
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def _left(scene: Scene) -> Iterator[tuple[str, str]]:
    """Files, processes and threads that are there after grading and bear a mark."""
    wide = (scene.outside, Path(fewer.__file__).parent, Path(autograder.__file__).parent)
    flat = ("/tmp", "/var/tmp", "/dev/shm", "/dev", "/", tempfile.gettempdir(), Path.home(), "/etc")
    paths = [path for folder in wide for path in folder.rglob("*")]
    paths += [path for folder in flat if Path(folder).is_dir() for path in Path(folder).iterdir()]
    yield from (("left a file", str(path)) for path in paths if "zq" in path.name)
    for path in Path("/proc").glob("[0-9]*/task/*/comm"):
        with contextlib.suppress(OSError):  # it ended
            if "zq" in (name := path.read_text()):
                yield "left a process", name.strip()


def _formulas(path: Path) -> Iterator[str]:
    """Cells of a table that a spreadsheet would compute."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            yield from (cell for cell in row if FORMULA.match(cell) and not _is_number(cell))


def _is_number(text: str) -> bool:
    try:
        return bool(float(text)) or True
    except ValueError:
        return False


def table(outcomes: Iterable[Outcome]) -> Table:
    """The outcomes by family: what was tried, points earned and deserved, harm."""
    shown = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("attack", "what it tries"):
        shown.add_column(name, ratio=1 if name == "attack" else 3)
    for name in ("earned", "deserved"):
        shown.add_column(name, justify="right")
    shown.add_column("", width=1)
    by_family: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_family.setdefault(outcome.attack.family, []).append(outcome)
    for family, members in by_family.items():
        shown.add_section()
        shown.add_row(f"[bold]{escape(family)}[/]")
        for one in members:
            tries = Text(one.attack.tries)
            for harm in one.harm:
                tries.append(f"\n{CONTROL.sub(' ', harm)}", style="red")
            if one.told and one.attack.deserves is not None:
                tries.append(f"\nnot graded: {CONTROL.sub(' ', one.told)}", style="red")
            points = [f"{sum(p.values()):g}" for p in (one.earned, one.deserved)]
            if one.attack.deserves is None and one.told:
                points[0] = "none"
            mark = "[green]✓[/]" if one.repelled else "[bold red]✗[/]"
            shown.add_row(Text(one.attack.name), tries, *points, mark)
    return shown
