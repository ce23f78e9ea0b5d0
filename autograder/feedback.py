"""The feedback page: one HTML file that a student can read alone.

It shows points, what each check found, and the student's own work beside it. All of it comes from
the graded notebook and the gradebook; the checks' code is in neither. The page holds its own style,
runs nothing and asks nothing of the network. Whatever a student wrote or is called is text in it:
Markdown and HTML of theirs are shown as they were typed, never rendered.
"""

from __future__ import annotations

import base64
import functools
import html
import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup
from nbformat import NotebookNode
from nbgrader import utils

from autograder.report import environment
from autograder.verdict import GRADE_ID, Verdict, verdicts

if TYPE_CHECKING:
    from autograder.gradebook import Score

# A page is for reading: what is longer is cut. In characters.
LONGEST_WORK = 20_000  # of one cell, or one comment
LONGEST_OUTPUT = 3_000  # of one output
MOST_OUTPUTS = 200
LARGEST_IMAGES = 12_000_000  # of all images together, as base64
LONGEST_NAME = 120


@dataclass(frozen=True)
class Part:
    """One graded cell of the notebook.

    Attributes:
        name: the exercise's, or the written question's.
        automatic: points that the checks gave; None for what a person grades.
        code: the student's, if it is code.
        answer: the student's, if it is words.
        own: it is a written question, which asked ``question``.
        empty: nothing was written.
    """

    anchor: str
    title: str
    name: str
    points: float
    possible: float
    waiting: bool
    automatic: float | None
    verdict: Verdict | None
    code: Markup
    answer: str
    own: bool
    question: str
    empty: bool
    comments: list[str]

    @property
    def full(self) -> bool:
        return self.points >= self.possible and not self.waiting

    @property
    def by_hand(self) -> bool:
        """Whether a person changed what the checks gave."""
        return self.automatic is not None and self.points != self.automatic


@dataclass(frozen=True)
class Shown:
    """An output of the student's: a text, or an image as a data URI."""

    kind: str  # "text", "error" or "image"
    content: str


@dataclass
class Section:
    """What lies between two headings of the notebook."""

    title: str
    parts: list[Part] = field(default_factory=list)
    outputs: list[Shown] = field(default_factory=list)


def page(notebook: NotebookNode, score: Score, name: str, hours_late: float | None = None) -> str:
    """The feedback page of a graded notebook.

    Args:
        notebook: as grading wrote it, with verdicts as the outputs of its grade cells.
        score: the submission's points in the gradebook, of persons and rules too.
        name: what the student is called.
        hours_late: how long after the due date it was handed in, if it was.
    """
    made = notebook.metadata.get("fewer") or {}
    sections = _sections(notebook, score, executed=made.get("executed") is True)
    parts = [part for section in sections for part in section.parts]
    here = {cell.metadata.nbgrader.grade_id for cell in notebook.cells if _is_graded(cell)}
    others = [cell for grade_id, cell in score.cells.items() if grade_id not in here]
    return _template().render(
        title=_headings(notebook, "# ") or "Feedback",
        name=_cut(name, LONGEST_NAME),
        score=score,
        hours_late=hours_late,
        parts=parts,
        sections=[section for section in sections if section.parts or section.outputs],
        waiting=sum(part.waiting for part in parts),
        elsewhere=(sum(c.points for c in others), sum(c.possible for c in others)),
        hidden=any(r.hidden for part in parts if part.verdict for r in part.verdict.results),
        graded_with=f"fewer {made['version']}, seed {made['seed']}" if made else "",
        walled=made.get("sandbox") is True,
    )


@functools.cache
def _template() -> jinja2.Template:
    return environment().get_template("feedback.html.j2")


def _is_graded(cell: NotebookNode) -> bool:
    return bool(utils.is_grade(cell) or utils.is_task(cell))


def _sections(notebook: NotebookNode, score: Score, executed: bool) -> list[Section]:
    found = verdicts(notebook)
    sections = [Section("")]
    sources: dict[str, str] = {}  # the student's code by the solution cell's name
    before = ""  # the Markdown cell just above
    number = 0
    show = _Outputs()
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and not cell.metadata.get("nbgrader"):
            if title := _heading(cell.source, "## "):
                sections.append(Section(title))
            before = cell.source
            continue
        if _is_graded(cell):
            number += 1
            about = cell.metadata.nbgrader
            exercise = about.grade_id.removeprefix(GRADE_ID)
            verdict = None if about.get("solution") else found.get(exercise)
            work = sources.get(exercise, "") if verdict else cell.source
            sections[-1].parts.append(
                _part(cell, f"part-{number}", sections[-1].title, score, verdict, work, before)
            )
        elif cell.cell_type == "code":
            if utils.is_solution(cell):
                sources[cell.metadata.nbgrader.grade_id] = cell.source
            if executed:
                sections[-1].outputs += show(cell)
        before = ""
    return sections


def _part(
    cell: NotebookNode,
    anchor: str,
    title: str,
    score: Score,
    verdict: Verdict | None,
    work: str,
    question: str,
) -> Part:
    about = cell.metadata.nbgrader
    name = about.grade_id.removeprefix(GRADE_ID) if verdict else about.grade_id
    entry = score.cells.get(about.grade_id)
    automatic = float(verdict.points) if verdict else None
    own = verdict is None and utils.is_solution(cell)
    said = (score.comments.get(key) for key in dict.fromkeys((name, about.grade_id)))
    return Part(
        anchor=anchor,
        title=title,
        name=name if verdict else name.replace("_", " "),
        points=entry.points if entry else automatic or 0.0,
        possible=entry.possible if entry else float(about.points),
        waiting=entry.waiting if entry else verdict is None,
        automatic=automatic,
        verdict=verdict,
        code=highlighted(work) if cell.cell_type == "code" else Markup(""),
        answer=_cut(work, LONGEST_WORK) if own and cell.cell_type != "code" else "",
        own=own,
        question=_cut(question, LONGEST_WORK) if own else "",
        empty=verdict.todo if verdict else own and _untouched(cell),
        comments=[_cut(text, LONGEST_WORK) for text in said if text],
    )


def _untouched(cell: NotebookNode) -> bool:
    """Whether an answer is empty, or still what was handed out."""
    if not cell.source.strip():
        return True
    checksum = cell.metadata.nbgrader.get("checksum")
    return checksum is not None and checksum == utils.compute_checksum(cell)


def _headings(notebook: NotebookNode, mark: str) -> str:
    texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return next(filter(None, (_heading(text, mark) for text in texts)), "")


def _heading(source: str, mark: str) -> str:
    """The first heading of a Markdown text at the level of ``mark``."""
    for line in source[:LONGEST_WORK].splitlines():
        if line.startswith(mark):
            return _cut(line.removeprefix(mark).replace("`", "").strip(), LONGEST_NAME)
    return ""


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + " ..."


# ------------------------------------------------------------------------------------- code

# Pygments knows Python far better, and takes 15 ms for the code of one lab: a class of 1,000 would
# wait a quarter of a minute for colours. No alternative here can fail late, so this is linear.
_PYTHON = re.compile(
    rf"""
    (?P<comment>\#[^\n]*)
    | (?P<string>
        \"\"\"[^"\\]*(?:(?:\\.|""?(?!"))[^"\\]*)*(?:\"\"\"|\\?\Z)
        | \'\'\'[^'\\]*(?:(?:\\.|''?(?!'))[^'\\]*)*(?:\'\'\'|\\?\Z)
        | "[^"\\\n]*(?:\\.[^"\\\n]*)*"?
        | '[^'\\\n]*(?:\\.[^'\\\n]*)*'? )
    | (?P<keyword>(?:{"|".join(keyword.kwlist)})\b)
    | \w+
    """,
    re.VERBOSE | re.DOTALL,
)


def highlighted(source: str) -> Markup:
    """Python with its comments, strings and keywords in ``<i>`` of a class.

    >>> print(highlighted("return a < b  # less"))
    <i class="keyword">return</i> a &lt; b  <i class="comment"># less</i>
    """
    # Escaped first: what follows puts constant tags around pieces that hold no "<". Quotes may
    # stay as they are outside of attributes.
    text = html.escape(_cut(source, LONGEST_WORK), quote=False)
    return Markup(_PYTHON.sub(_in_colour, text))


def _in_colour(found: re.Match[str]) -> str:
    return f'<i class="{found.lastgroup}">{found[0]}</i>' if found.lastgroup else found[0]


# ---------------------------------------------------------------------------------- outputs

_IMAGES = ("image/png", "image/jpeg")


class _Outputs:
    """Outputs of a notebook's cells as they are shown, within limits for the whole page.

    What `autograder.kernel` wrote was looked at there; here it only has to be text or an image.
    """

    def __init__(self) -> None:
        self.count = MOST_OUTPUTS
        self.images = LARGEST_IMAGES

    def __call__(self, cell: NotebookNode) -> Iterator[Shown]:
        for output in cell.get("outputs", ()):
            shown = self._show(output)
            if shown.content.strip() and self.count > 0:
                self.count -= 1
                yield shown

    def _show(self, output: NotebookNode) -> Shown:
        data = output.get("data") or {}
        if kind := next((kind for kind in _IMAGES if kind in data), None):
            return self._image(kind, str(data[kind]))
        if output.get("output_type") == "error":
            trace = "\n".join(map(str, output.get("traceback") or ()))
            text = trace or f"{output.get('ename')}: {output.get('evalue')}"
            # What went wrong stands at the end of a traceback.
            return Shown("error", text[-LONGEST_OUTPUT:])
        text = str(output.get("text") or data.get("text/plain") or "")
        return Shown("text", _cut(text, LONGEST_OUTPUT))

    def _image(self, kind: str, content: str) -> Shown:
        self.images -= len(content)
        if self.images < 0:
            return Shown("text", "(an image: there are too many to be shown here)")
        try:
            data = base64.b64decode("".join(content.split()), validate=True)
        except ValueError:
            return Shown("text", "(an image that cannot be read)")
        # The page holds our own encoding, which has no characters but letters, digits and +/=.
        return Shown("image", f"data:{kind};base64,{base64.b64encode(data).decode()}")
