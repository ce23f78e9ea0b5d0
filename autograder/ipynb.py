"""What a file that should be a notebook holds: its cells, of whatever version of the format.

`read_cells` takes any bytes, and answers with cells or with `Unusable` and one sentence. Time and
memory are bounded whatever the bytes are: outputs, most of a notebook, are skipped in C and never
become objects, and the rest must be small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

MAX_BYTES = 512 << 20  # of a file
MAX_TEXT = 16 << 20  # bytes of it without outputs
MAX_CELLS = 5000
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
AGAIN = "ask the student to hand in again"
CLEAR = "ask the student to clear all outputs and hand in again"


class Unusable(Exception):
    """A submission that cannot be graded; the message says what is wrong and what to do."""


@dataclass(eq=False)
class Cell:
    """A cell as it was handed in.

    Attributes:
        kind: ``code``, ``markdown`` or ``raw``.
        nbgrader: nbgrader's metadata, or what stands there.
        demo: whether it has the tag ``demo``.
        images: attachments, as nbformat has them.
    """

    kind: str
    source: str
    id: str = ""
    nbgrader: dict[str, Any] = field(default_factory=dict)
    demo: bool = False
    images: dict[str, dict[str, str]] = field(default_factory=dict)

    @cached_property
    def same(self) -> str:
        return same(self.source)

    @cached_property
    def defines(self) -> frozenset[str]:
        """The functions and classes that it defines, by the look of it: also where it has magics or
        a syntax error."""
        found = r"^(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)"
        return frozenset(re.findall(found, self.source, re.M) if self.kind == "code" else ())


def same(source: str) -> str:
    """A source without what editors change by themselves: line ends, and blanks before them."""
    return "\n".join(line.rstrip() for line in source.strip().splitlines())


def read_cells(data: bytes, name: str, notices: list[str]) -> list[Cell]:
    """The cells of a notebook.

    Args:
        name: of the file.
        notices: where sentences about how it came are added.

    Raises:
        Unusable: it is no notebook, but something else.
    """
    text = _decode(compact(data, name, notices), notices)
    try:
        # Python's own parser takes what others refuse: NaN, lone surrogates, raw line breaks.
        tree = json.loads(text, strict=False, parse_int=lambda digits: int(digits[:20]))
    except RecursionError:
        raise Unusable(f"{name} is nested too deeply to be a notebook: {AGAIN}") from None
    except json.JSONDecodeError as error:
        where = f"is damaged in line {error.lineno} ({error.msg})"
        raise Unusable(f"{name} {_damage(data, where)}") from None
    if not isinstance(tree, dict):
        raise Unusable(f"{name} is JSON, but no notebook: {AGAIN}")
    entries = tree.get("cells")
    if not isinstance(entries, list):
        sheets = tree.get("worksheets")
        sheets = [s for s in sheets if isinstance(s, dict)] if isinstance(sheets, list) else []
        entries = [c for s in sheets if isinstance(s.get("cells"), list) for c in s["cells"]]
        if not sheets:
            raise Unusable(f"{name} is JSON, but no notebook, for it has no cells: {AGAIN}")
        notices.append("The notebook is of an old format, with worksheets, and was converted.")
    if len(entries) > MAX_CELLS:
        raise Unusable(f"{name} has more than {MAX_CELLS} cells: {AGAIN}")
    version = tree.get("nbformat")
    if isinstance(version, int) and version > 4:
        notices.append(f"The notebook says that it is of nbformat {version}; it was read as 4.")
    return [_cell(entry) for entry in entries if isinstance(entry, dict)]


def _cell(entry: dict[str, Any]) -> Cell:
    """A cell; what is odd about it is left out."""
    kind, cell_id = entry.get("cell_type"), entry.get("id")
    metadata = _dict(entry.get("metadata"))
    source = _joined(next((entry[key] for key in ("source", "input") if key in entry), ""))
    if kind == "heading":  # nbformat 3
        level = entry.get("level")
        level = min(max(level, 1), 6) if isinstance(level, int) else 1
        kind, source = "markdown", f"{'#' * level} {source}"
    if kind not in ("code", "markdown", "raw"):
        kind = "code" if "execution_count" in entry or "input" in entry else "markdown"
    tags = metadata.get("tags")
    images = {}
    for name, bundle in _dict(entry.get("attachments")).items():
        # They become addresses in a page: nothing but an image may be in them.
        texts = {mime: _joined(_dict(bundle)[mime]) for mime in IMAGES if mime in _dict(bundle)}
        kept = {mime: t for mime, t in texts.items() if re.fullmatch(r"[A-Za-z0-9+/=\s]+", t)}
        if kept:
            images[_clean(name)] = kept
    return Cell(
        kind=kind,
        source=_clean(source),
        id=cell_id if isinstance(cell_id, str) else "",
        nbgrader=_dict(metadata.get("nbgrader")),
        demo=isinstance(tags, list) and "demo" in tags,
        images=images,
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _joined(value: Any) -> str:
    """A text that may be a list of lines."""
    if isinstance(value, list):
        return "".join(line for line in value if isinstance(line, str))
    return value if isinstance(value, str) else ""


def _clean(text: str) -> str:
    """Text without what cannot be written as UTF-8, or be in a program at all."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)


# From bytes to JSON


class _Counted(Struct):
    def __post_init__(self) -> None:
        if next(_left.get(), None) is None:
            raise _TooMany


class _SlimCell(_Counted, omit_defaults=True):
    """What is read of a cell. Outputs are skipped, without memory, as all else is."""

    cell_type: Raw | UnsetType = UNSET
    source: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET
    attachments: Raw | UnsetType = UNSET
    id: Raw | UnsetType = UNSET
    execution_count: Raw | UnsetType = UNSET
    input: Raw | UnsetType = UNSET  # nbformat 3
    level: Raw | UnsetType = UNSET


class _SlimSheet(_Counted, omit_defaults=True):
    cells: list[_SlimCell] | UnsetType = UNSET


class _Slim(Struct, omit_defaults=True):
    nbformat: Raw | UnsetType = UNSET
    cells: list[_SlimCell] | UnsetType = UNSET
    worksheets: list[_SlimSheet] | UnsetType = UNSET


class _TooMany(Exception):
    """More cells than anybody writes."""


_left: ContextVar[Iterator[int]] = ContextVar("_left")
MAGIC = {
    b"PK\x03\x04": "a zip archive or an Office document",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"{\\rtf": "an RTF document",
    b"\x00\x05\x16\x07": "what macOS writes beside a file",
    b"version https://git-lfs": "the address of a file in Git LFS",
}


def compact(data: bytes, name: str, notices: list[str]) -> bytes:
    """The bytes of a notebook as UTF-8 and, where it is proper JSON, without outputs.

    Raises:
        Unusable: it is something else, or too big.
    """
    if len(data) > MAX_BYTES:
        raise Unusable(too_big(name, len(data)))
    if not data[:4096].strip(b"\0 \t\r\n") and not data.strip(b"\0 \t\r\n"):
        what = "is empty" if not data.strip() else "holds nothing but zero bytes"
        raise Unusable(f"{name} {what}: {AGAIN}")
    for magic, what in MAGIC.items():
        if data.startswith(magic):
            raise Unusable(f"{name} is {what}, not a notebook: {AGAIN}")
    encoding = json.detect_encoding(data)
    if not encoding.startswith("utf-8") and len(data) <= MAX_TEXT:
        notices.append(f"The notebook was written as {encoding.upper()} and was converted.")
        data = data.decode(encoding, "replace").encode("utf-8", "replace")
    data = data.removeprefix(b"\xef\xbb\xbf")
    data = data.rstrip(b"\0") if data.endswith(b"\0") else data
    slim = _without_outputs(data, name)
    if slim is None and len(data) > MAX_TEXT:
        raise Unusable(f"{name} {_damage(data, f'has {size(len(data))} and is no proper JSON')}")
    if slim is not None and len(slim) > MAX_TEXT:
        raise Unusable(f"{name} has {size(len(slim))} of text even without its outputs: {AGAIN}")
    return data if slim is None else slim


def _without_outputs(data: bytes, name: str) -> bytes | None:
    """The JSON of a notebook without anything that is not graded; None if it is no strict JSON.

    Raises:
        Unusable: it has too many cells.
    """
    token = _left.set(iter(range(MAX_CELLS)))
    try:
        slim = msgspec.json.decode(data, type=_Slim)
    except _TooMany:
        raise Unusable(f"{name} has more than {MAX_CELLS} cells: {AGAIN}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    finally:
        _left.reset(token)
    encoded = msgspec.json.encode(slim)
    if len(encoded) > MAX_TEXT and slim.cells:
        for cell in slim.cells:
            cell.attachments = UNSET
        encoded = msgspec.json.encode(slim)
    return encoded


def _damage(data: bytes, otherwise: str) -> str:
    """What something that is no JSON looks like."""
    begin = data[:4096].lstrip().lower()
    if re.search(rb"^<{7}[ \r\n]", data, re.MULTILINE):
        return "holds the marks of an unfinished merge (<<<<<<<): ask the student to resolve it"
    if begin.startswith(b"<"):
        return f"is a web page (HTML or XML), not a notebook: {AGAIN}"
    if begin.startswith(b"{"):
        if not data[-4096:].rstrip().endswith(b"}"):
            return f"breaks off after {size(len(data))}: {AGAIN}"
        return f"{otherwise}: {CLEAR}"
    if re.search(rb"^(#!.*python|# %%|(import|from|def|class) \w)", data[:65536], re.MULTILINE):
        return f"looks like a Python script, not a notebook: {AGAIN}"
    return f"is no notebook, but begins with {repr(data[:20])[1:]}: {AGAIN}"


def _decode(data: bytes, notices: list[str]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        notices.append("The notebook is not UTF-8: letters with accents may have been lost.")
    text = data.decode("utf-8", "replace")
    return text if re.search("[^\x00-\x7f\ufffd]", text) else data.decode("latin-1")


# Words


def shown(text: str) -> str:
    """A student's words within a sentence of ours: short, and of letters that can be seen."""
    text = text if len(text) <= 80 else f"{text[:40]}...{text[-30:]}"
    return text if text.isprintable() else repr(text)


def some(names: Iterable[str]) -> str:
    """A list of names in a sentence, a long one cut short."""
    names = [shown(name) for name in names]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def size(count: int) -> str:
    return f"{count / 2**20:.0f} MB" if count >= 2**20 else f"{count} bytes"


def too_big(name: str, count: int) -> str:
    return f"{name} has {size(count)}, more than {size(MAX_BYTES)}: {CLEAR}"
