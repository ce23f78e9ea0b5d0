"""Which of the files that a student handed in is the notebook. Names decide; no link is followed,
and nothing is opened that is no file."""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from autograder.ipynb import AGAIN, MAX_BYTES, MAX_TEXT, Unusable, compact, shown, some, too_big

LONGEST_ID = 128  # characters that the gradebook's column takes


@dataclass
class Picked:
    """The files that count, by the notebook's name, and what the instructor should know."""

    paths: dict[str, Path]
    notices: list[str] = field(default_factory=list)


def strange_id(student: str) -> str:
    """Why nobody can be called so in folders and a gradebook; '' if nothing speaks against it.

    Example:
        >>> strange_id("ada"), strange_id("-O'Neill <b>")
        ('', '')
        >>> strange_id("../ada")
        "'../ada' cannot be a student's id: it holds '/', which separates folders"
    """
    why = ""
    if student in ("", ".", ".."):
        why = "no folder can be called so"
    elif found := re.search(r"[/\\]", student):
        why = f"it holds {found[0]!r}, which separates folders"
    elif re.search("[\ud800-\udfff]", student):
        why = "it is not UTF-8"
    elif any(_is_control(character) for character in student):
        why = "it holds characters that cannot be seen"
    elif len(student) > LONGEST_ID:
        why = f"it has {len(student)} characters, and the gradebook takes {LONGEST_ID}"
    short = student if len(student) <= 80 else f"{student[:77]}..."
    return f"{short!r} cannot be a student's id: {why}" if why else ""


def _is_control(character: str) -> bool:
    # Some scripts need format characters (Cf), but those that turn the direction of what follows
    # would let one id look like another.
    turns = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return turns or unicodedata.category(character) in ("Cc", "Zl", "Zp")


def pick(folder: Path, names: Collection[str]) -> Picked:
    """Which files of a submission count, by their names alone.

    For each of ``names``, the notebooks that were released, this is ``NAME.ipynb``. Where that is
    missing, another counts if it plainly is meant: only one has a name like it, or there is only
    one notebook.

    Raises:
        Unusable: no file is there that could be one of the notebooks, or it cannot be told which.
    """
    kinds, wanted = _listing(folder), sorted(names)
    files = {f for f, kind in kinds.items() if kind == "file" and not f.startswith(".")}
    found = {name: f"{name}.ipynb" for name in wanted if f"{name}.ipynb" in files}
    rest = sorted(f for f in files - set(found.values()) if f.lower().endswith(".ipynb"))
    notices, unclear = [], []
    for name in wanted:
        if name in found:
            continue
        meant = [f for f in rest if _like(f) == _like(f"{name}.ipynb")]
        meant = meant or [f for f in rest if _meant(f, wanted) == name]
        if not meant and len(rest) == 1 and len(wanted) == len(found) + 1:
            meant = list(rest)
        if len(meant) == 1:
            found[name] = meant[0]
            rest.remove(meant[0])
            notices.append(f"There is no {name}.ipynb; {shown(meant[0])} was graded in its place.")
        elif meant:
            unclear.append(f"{some(meant)} could each be {name}.ipynb: remove all but one")
    for file in found.values():
        if not os.access(folder / file, os.R_OK):
            raise Unusable(f"{shown(file)} may not be read: change its permissions")
    for f, kind in sorted(kinds.items()):
        if f.lower().endswith(".ipynb") and kind != "file":
            notices.append(f"{shown(f)} is a {kind}, which is not opened: {AGAIN}.")
    if not found:
        raise Unusable(unclear[0] if unclear else _nothing(kinds, wanted))
    notices += [f"{sentence}." for sentence in unclear]
    if rest and not unclear:
        graded = some(found[name] for name in sorted(found))
        notices.append(f"{some(rest)} was not graded: by their names, what counts is {graded}.")
    missing = [f"{name}.ipynb" for name in wanted if name not in found]
    if missing:
        notices.append(f"Not handed in, and not graded: {some(missing)}.")
    return Picked({name: folder / file for name, file in sorted(found.items())}, notices)


def read(path: Path) -> bytes:
    """The bytes of a notebook, if it is a file and no link; of a large one, those without outputs.

    Raises:
        Unusable: what it is instead, or why it cannot be read.
    """
    name = shown(path.name)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise Unusable(f"{name} is a {_kind(about.st_mode)}, no file: {AGAIN}")
            if about.st_size > MAX_BYTES:
                raise Unusable(too_big(name, about.st_size))
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise Unusable(f"{name} cannot be read: {why}") from error
    return data if len(data) <= MAX_TEXT else compact(data, name, [])


def _listing(folder: Path) -> dict[str, str]:
    """The names in a folder, and of what kind each is."""
    try:
        mode = folder.lstat().st_mode
        if not stat.S_ISDIR(mode):
            raise Unusable(f"the submission is a {_kind(mode)} where a folder must be: {AGAIN}")
        with os.scandir(folder) as entries:
            return {e.name: _kind(e.stat(follow_symlinks=False).st_mode) for e in entries}
    except OSError as error:
        raise Unusable(f"the submitted folder cannot be read: {error.strerror}") from error


def _kind(mode: int) -> str:
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    return kinds.get(stat.S_IFMT(mode), "device or pipe")


def _like(file: str) -> str:
    """A file's name without what differs from system to system: case, and kinds of gaps."""
    return re.sub(r"[\W_]+", "_", unicodedata.normalize("NFKC", file).casefold())


def _meant(file: str, names: Collection[str]) -> str | None:
    """Which of the names a file has in its own, as in ``ada_lab1_quantization (1).ipynb``."""
    within = [n for n in names if re.search(rf"(?<![^\W_]){_like(n)}(?![^\W_])", _like(file))]
    return max(within, key=len, default=None)


def _nothing(kinds: dict[str, str], names: Collection[str]) -> str:
    """What to say where no notebook is."""
    missing = " or ".join(f"{name}.ipynb" for name in names)
    there = {f: kind for f, kind in sorted(kinds.items()) if f != "timestamp.txt"}
    if not there:
        return f"no {missing} was handed in: the folder is empty"
    named = [f if kind == "file" else f"{f} (a {kind})" for f, kind in there.items()]
    return f"no {missing} was handed in; there is {some(named)}: {AGAIN}"
