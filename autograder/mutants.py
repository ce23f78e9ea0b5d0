"""Automatic mutants of a function: the same code with one small thing wrong.

DeMillo, Lipton, Sayward 1978, "Hints on test data selection" (IEEE Computer 11): tests that tell a
program from all its one-step mutants mostly tell it from real mistakes too. Which mistakes are made
is in `autograder.slips`.

Never touched: the signature, docstrings, annotations, f-strings and ``raise`` statements.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from autograder.exercise import define
from autograder.slips import DEFENSIVE, alternatives

FILENAME = "<mutant"  # how the names of the files begin that mutants pretend to come from
REMOVED = "(removed)"
WIDTH, AROUND = 60, 24  # lines longer than this are shown by the change and so much around it


@dataclass(frozen=True)
class Mutant:
    """A function with one mistake. ``text`` says which, as ``code before  ->  code after``."""

    text: str
    function: Callable[..., Any]


def mutants(function: Callable[..., Any]) -> list[Mutant]:
    """All mutants of a plain function, in the order of its source; the same list every time.

    Each is compiled beside the function's own globals, so that the helpers it calls are found, and
    keeps name and signature. Mutants with the same code are one. Where two have the same text, the
    later one's ends in ``(2)``.
    """
    outer = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    name = function.__name__
    made: list[Mutant] = []
    for text, source in mutations(textwrap.dedent(inspect.getsource(function))):
        filename = f"{FILENAME} {len(made) + 1} of {name}>"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # such as 1.0[0]: wrong is what we want
            made.append(Mutant(text, define(source, name, filename, dict(outer), flags)))
    return made


def mutations(source: str) -> Iterator[tuple[str, str]]:
    """Text and source of every mutant of the function that ``source`` defines.

    >>> [text for text, code in mutations("def f(x): return x.abs() + y")]
    ['return x.abs() + y  ->  return x.abs() - y', 'return x.abs() + y  ->  return x + y']
    """
    tree = ast.parse(source)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    bound = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    seen, texts = {ast.unparse(tree)}, Counter[str]()
    for index, statement in enumerate(function.body):
        for text in _walk(function, "body", index, statement, [], bound):
            code = ast.unparse(tree)  # while _walk waits, the tree is the mutant
            if code not in seen:
                seen.add(code)
                texts[text] += 1
                yield (text if texts[text] == 1 else f"{text}  ({texts[text]})"), code


def _walk(
    parent: Any, field: str, index: int | None, node: Any, above: list[ast.AST], bound: set[str]
) -> Iterator[str]:
    """Put the alternatives of ``node``, and of all that is inside it, in place, one at a time."""
    if isinstance(node, ast.Raise | ast.JoinedStr) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ):
        return
    trail = [node] if isinstance(node, ast.stmt) else [*above, node]
    before = _line(trail[0])
    for new in alternatives(node, trail, bound):
        _put(parent, field, index, new)
        yield _change(before, _line(new if len(trail) == 1 else trail[0]))
        _put(parent, field, index, node)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "args") and isinstance(value, ast.AST):
            continue  # of a nested function or a lambda
        if isinstance(node, ast.If) and name == "body" and isinstance(value[-1], ast.Raise):
            continue  # it prepares a message
        if isinstance(node, ast.keyword) and node.arg in ("dim", "axis", *DEFENSIVE):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                spot = i if isinstance(value, list) else None
                yield from _walk(node, name, spot, child, trail, bound)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        bound.add(node.id)


def _put(parent: Any, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _change(before: str, after: str) -> str:
    """``before  ->  after``, long lines cut down to the change and what is near it."""
    if max(len(before), len(after)) > WIDTH and after != REMOVED:
        head = _common(before, after)
        start = max(0, head - AROUND)
        end = max(0, _common(before[head:][::-1], after[head:][::-1]) - AROUND)
        while start and before[start - 1].isalnum():
            start -= 1
        while end and before[-end].isalnum():
            end -= 1
        before, after = (
            "…" * bool(start) + code[start : len(code) - end] + "…" * bool(end)
            for code in (before, after)
        )
    return f"{before}  ->  {after}"


def _common(a: str, b: str) -> int:
    """How many characters two strings have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _line(node: ast.AST) -> str:
    """The code of a node; of a compound statement its first line, of a removed one the fact."""
    if isinstance(node, ast.Pass):
        return REMOVED
    if isinstance(node, ast.stmt):
        node = copy.copy(node)
        for block in ("body", "orelse", "finalbody"):
            if hasattr(node, block):
                setattr(node, block, [])
    return ast.unparse(node)
