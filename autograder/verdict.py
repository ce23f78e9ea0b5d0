"""What a student reads after `check`: points, one line a property, and help with the first failure.

A `Verdict` is plain data (strings and numbers), so it can be stored in a notebook, sent from a
grading process and shown again later: as a card in Jupyter, as text in a terminal. In a notebook
its text/plain form is the number of points, which is what nbgrader reads as partial credit.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jinja2
from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from autograder.candidate import Call
from autograder.compare import CandidateError

MIME = "application/vnd.fewer.verdict+json"
GRADE_ID = "check_"  # the grade cell of `halve` has the grade_id check_halve
LONGEST = 4000  # characters of a text in a verdict
# What a terminal takes for a command, or what turns the direction of all that follows.
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def legible(text: str) -> str:
    """A student's words as a page or a terminal can show them: not too many, and no commands.

    >>> legible("a\\x1b[2Jb")
    'a\ufffd[2Jb'
    """
    text = COMMANDS.sub("\ufffd", text[: LONGEST + 1])
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


@dataclass(frozen=True)
class Failure:
    """Why a check failed, in the student's terms. Empty strings where there is nothing to say."""

    message: str
    call: str = ""
    got: str = ""
    expected: str = ""
    trace: str = ""

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            object.__setattr__(self, name, legible(text))


@dataclass(frozen=True)
class Result:
    """One check's outcome: 'passed', 'failed', or 'todo' where nothing was written yet.

    That of a hidden check is seen after grading only.
    """

    check: str
    statement: str
    points: int
    status: str
    hint: str = ""
    diagnosis: str = ""
    misconception: str = ""
    failure: Failure | None = None
    hidden: bool = False

    @property
    def title(self) -> str:
        return self.check.replace("_", " ")

    @property
    def earned(self) -> int:
        return self.points if self.status == "passed" else 0


@dataclass(frozen=True)
class Verdict:
    """The judgement of one exercise.

    Attributes:
        note: what the reader should know about the verdict as a whole (why nothing could run).
        seed: the seed of the inputs: the same function and seed give the same verdict.
        hidden_points: what the checks are worth that are not in this installation.
    """

    exercise: str
    results: list[Result]
    seed: int = 0
    note: str = ""
    error: str = field(default="", repr=False)
    hidden_points: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "note", legible(self.note))

    @property
    def points(self) -> int:
        return sum(result.earned for result in self.results)

    @property
    def possible(self) -> int:
        return sum(result.points for result in self.results)

    @property
    def passed(self) -> bool:
        return all(result.status == "passed" for result in self.results)

    @property
    def todo(self) -> bool:
        return bool(self.results) and all(result.status == "todo" for result in self.results)

    @property
    def to_come(self) -> str:
        """What a student is told of the checks that are not in this installation."""
        if not self.hidden_points:
            return ""
        unit = "point" if self.hidden_points == 1 else "points"
        return f"and {self.hidden_points} {unit} from hidden checks, seen at grading"

    @property
    def first_failure(self) -> Result | None:
        """The failed check to talk about: the first one, or the first with a diagnosis."""
        failed = [result for result in self.results if result.status == "failed"]
        return next((r for r in failed if r.diagnosis), failed[0] if failed else None)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Verdict:
        """The inverse of `to_json`. Raises KeyError or TypeError for anything else."""
        results = [
            Result(**{**r, "failure": Failure(**r["failure"]) if r["failure"] else None})
            for r in data["results"]
        ]
        return cls(**{**data, "results": results})

    def __float__(self) -> float:
        return float(self.points)

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=100, highlight=False).print(self)
        return out.getvalue().rstrip()

    def __rich__(self) -> Panel:
        marks = {"passed": ("✓", "green"), "failed": ("✗", "red"), "todo": ("·", "dim")}
        lines = []
        for result in self.results:
            mark, color = marks[result.status]
            line = Text(f"{mark} ", style=color)
            line.append(result.title, style="" if result.status == "passed" else color)
            hidden = " (hidden check)" if result.hidden else ""
            line.append(f"  {result.earned}/{result.points}{hidden}", style="dim")
            lines.append(line)
        if self.to_come:
            lines.append(Text(self.to_come, style="dim"))
        if self.note:
            lines.append(Text(self.note, style="yellow"))
        if worst := self.first_failure:
            lines += [Text(), Text(worst.statement, style="bold")]
            for label, value in worst_lines(worst):
                lines.append(Text.assemble((f"{label}: ", "dim"), value))
        title = f"{self.exercise}: {self.points} of {self.possible} points"
        return Panel(Group(*lines), title=title, title_align="left", expand=False)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/plain": str(self.points), "text/html": self.html(), MIME: self.to_json()}

    def html(self) -> str:
        """The card as a piece of HTML with its own style; everything in it is escaped."""
        return _CARD.render(verdict=self, worst=self.first_failure, lines=worst_lines)


def verdicts(nb: Mapping[str, Any]) -> dict[str, Verdict]:
    """The verdicts stored as outputs of a notebook's grade cells, by exercise.

    Outputs of other cells do not count (a student may display anything there), nor does what
    cannot be read as a verdict.
    """
    found = {}
    for cell in nb.get("cells", ()):
        about = cell.get("metadata", {}).get("nbgrader", {})
        if not about.get("grade") or not str(about.get("grade_id", "")).startswith(GRADE_ID):
            continue
        for output in cell.get("outputs", []):
            if data := output.get("data", {}).get(MIME):
                try:
                    verdict = Verdict.from_json(data)
                except (KeyError, TypeError, AttributeError):
                    continue
                found[about["grade_id"].removeprefix(GRADE_ID)] = verdict
    return found


def worst_lines(result: Result) -> list[tuple[str, str]]:
    """What to say about a failed check, as (label, text) pairs in reading order."""
    failure = result.failure or Failure("")
    pairs = [
        ("when called as", failure.call),
        ("what happened", failure.message),
        ("your result", failure.got),
        ("expected", failure.expected),
        ("your code", failure.trace),
        ("what it looks like", result.diagnosis),
        ("hint", result.hint),
    ]
    return [(label, text) for label, text in pairs if text]


def show(value: Any, whole: int = 64) -> str:
    """A value as a student can read it: small tensors whole, large ones by shape and range.

    >>> import torch
    >>> show(torch.tensor([1.0, 2.0]))
    'tensor([1., 2.])'
    >>> show(torch.zeros(10, 10))
    'float32 tensor of shape (10, 10), from 0 to 0'
    """
    if isinstance(value, Tensor):
        value = value.detach()
        if value.numel() <= whole:
            return repr(value)
        kind = str(value.dtype).removeprefix("torch.")
        low, high = value.double().min(), value.double().max()
        return f"{kind} tensor of shape {tuple(value.shape)}, from {low:.4g} to {high:.4g}"
    if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
        inner = ", ".join(show(v, whole) for v in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    # An object's address would make the same failure read differently every time.
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return text if len(text) <= 500 else text[:500] + " ..."


def show_call(name: str, call: Call) -> str:
    """A call as it would be typed: ``f(tensor([1.]), bits=4)``."""
    parts = [show(a) for a in call.args] + [f"{k}={show(v)}" for k, v in call.kwargs.items()]
    layout = "" if all(_plain(a) for a in call.args) else "   # not contiguous in memory"
    return f"{name}({', '.join(parts)}){layout}"


def show_error(error: CandidateError) -> str:
    return f"your function raised {error}"


def _plain(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.is_contiguous()


# Styled in place, as notebooks show it anywhere; the classes let a page of ours restyle it.
_CARD = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """
{% set status = 'passed' if verdict.passed else 'todo' if verdict.todo else 'failed' %}
<div class="fewer-verdict is-{{ status }}" style="font: 14px/1.45 system-ui, sans-serif;
 max-width: 62em; border: 1px solid #d0d7de; border-left: 5px solid {{ {'passed': '#009E73',
 'todo': '#999999', 'failed': '#D55E00'}[status] }}; border-radius: 6px; padding: .7em 1em;
 margin: .3em 0; color: #1f2328; background: #ffffff">
<div style="display: flex; justify-content: space-between">
<b style="font-family: ui-monospace, monospace">{{ verdict.exercise }}</b>
<b>{{ verdict.points }} / {{ verdict.possible }} points</b></div>
{% for r in verdict.results %}
<div class="fewer-{{ r.status }}" style="color: {{ {'passed': '#00734f', 'failed': '#b34700',
 'todo': '#6e7781'}[r.status] }}">
{{ {'passed': '✓', 'failed': '✗', 'todo': '·'}[r.status] }} {{ r.title }}
<span class="fewer-soft" style="color: #6e7781">{{ r.earned }}/{{ r.points }}
{{- ' (hidden check)' if r.hidden }}</span></div>
{% endfor %}
{% if verdict.to_come %}
<div class="fewer-soft" style="color: #6e7781">{{ verdict.to_come }}</div>
{% endif %}
{% if verdict.note %}
<div class="fewer-note" style="color: #7a5b00; margin-top: .4em">{{ verdict.note }}</div>
{% endif %}
{% if worst %}
<div class="fewer-why" style="margin-top: .7em; padding-top: .6em; border-top: 1px solid #e5e8eb">
<div style="font-weight: 600; margin-bottom: .3em">{{ worst.statement }}</div>
{% for label, text in lines(worst) %}
<div class="fewer-row" style="display: flex; gap: .8em; margin: .15em 0">
<div class="fewer-soft" style="flex: 0 0 8.5em; color: #6e7781">{{ label }}</div>
{% if label in ('when called as', 'your result', 'expected', 'your code') %}
<pre style="margin: 0; white-space: pre-wrap; font-size: 12.5px; background: #f6f8fa;
 padding: .1em .5em; border-radius: 4px; color: #1f2328">{{ text }}</pre>
{% elif label == 'what it looks like' %}
<div class="fewer-says" style="background: #fff4e5; padding: .1em .5em; border-radius: 4px">
{{- text }}</div>
{% else %}<div>{{ text }}</div>{% endif %}
</div>
{% endfor %}
</div>
{% endif %}
</div>
""".strip()
)
