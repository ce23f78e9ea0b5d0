"""What an attack is: a submission that wants more than its due, and knows this machine well.

Nothing about the grader is secret but the seed. So attackers are told where everything lies, down
to the process that grades; in return, they brag of whatever they get hold of, and leave a mark on
whatever they can change.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

# The exercise that attackers attack, if not said otherwise: the first, and quickly judged.
TARGET = "decode_minifloat"
PAIR = "quantize_symmetric"  # one whose function returns two tensors, codes and scale
HONEST = "sqnr"  # one that each attacker solves honestly, below
MARK = "zq{:03d}qz"  # of an attack, by its number: short, as names of threads are
BRAG = "\N{BLACK FLAG}"  # begins what an attacker says that got hold of something

TO_DO = "raise NotImplementedError"  # in a function that is of no use to the attack

# Stands above the code of every attack. What is to hurt must not run outside of the sandbox.
HEAD = f"""\
import os, sys
KNOWN = @KNOWN@
class Brag(BaseException):
    pass
def brag(what):
    raise Brag(chr({ord(BRAG)}) + " " + repr(what)[:300])
if os.uname().nodename != "sandbox":
    brag("this runs outside of the sandbox")
for place in ("/tmp", "/dev/shm", "/dev"):
    for name in os.listdir(place):
        if name.startswith("zq"):
            brag(place + " still has " + name)
def readable(path):
    try:
        with open(path, "rb") as file:
            return file.read(1000)
    except OSError:
        return b""
"""


@dataclass
class Scene:
    """The course under attack, and what lies around it.

    Attributes:
        course: the course folder.
        outside: a folder beside it, where anybody may write.
        released: the notebook as it was handed out.
        solutions: right solution cells, by exercise.
        known: what attackers know, as plain data: paths, ports, the grader's process.
        secret: a word that stands where no student may look. A page that has it tells on someone.
        worth: points of each exercise.
        mark: of the attack that is being prepared.
    """

    course: Path
    outside: Path
    lab: str
    released: NotebookNode
    solutions: Mapping[str, str]
    known: Mapping[str, Any]
    secret: str
    worth: Mapping[str, int]
    mark: str = ""


Forge = Callable[[NotebookNode, Scene], NotebookNode | bytes | None]
HandIn = Callable[[Path, bytes, Scene], None]


@dataclass(frozen=True)
class Attack:
    """A submission, and what the work in it deserves.

    In source and in what `forge` makes, ``@MARK@`` stands for a word of this attack's own: files,
    threads and messages that bear it where they should not be are its doing, and so are elements of
    a page.

    Attributes:
        tries: what it tries, in a sentence.
        cells: source of solution cells by exercise. All others but `HONEST` are left as they are.
        deserves: points by exercise, where not 0 for those in ``cells`` and full for `HONEST`;
            None: the submission cannot be graded, and the instructor is told why.
        forge: makes something else of the notebook; in place if it returns None.
        honest: `HONEST` is solved as well. Not by those who break their own process.
        hand_in: puts the file where it belongs, or does not.
        id: of the student, if it is part of the attack.
        slow: takes as long as the bounds allow. Left out in the short form.
    """

    name: str
    family: str
    tries: str
    cells: Mapping[str, str] = field(default_factory=dict)
    deserves: Mapping[str, int] | None = field(default_factory=dict)
    forge: Forge | None = None
    honest: bool = True
    hand_in: HandIn | None = None
    id: str = ""
    slow: bool = False

    @property
    def student(self) -> str:
        return self.id or self.name.replace(" ", "-").replace("'", "").lower()


def at_once(code: str, call: str = TO_DO, name: str = TARGET) -> dict[str, str]:
    """Cells of an attack: ``code`` as the cell is run, and ``call`` whenever the function is called
    (with whatever arguments)."""
    head = f"def {name}(*args, **kwargs):\n"
    body = textwrap.indent(textwrap.dedent(call).strip(), "    ")
    return {name: f"{HEAD}{textwrap.dedent(code).strip()}\n\n{head}{body}\n"}


def in_call(call: str, name: str = TARGET) -> dict[str, str]:
    """Cells of an attack that begins when the function is called."""
    return at_once("", call, name)
