"""An exercise is three things: a reference, checks, and misconceptions.

Everything else (the student's stub, the solution cell, the grade cell, the kill table) is
derived from them. The file of a topic's exercises reads like this::

    halve = Exercise(fewer.topic.halve, paper="Author 2020, section 2", difficulty=1, minutes=5)

    @halve.check(points=2, hint="Is the sign kept?", x=tensors())
    def twice_the_half_is_the_whole(candidate, x):
        \"\"\"Adding the result to itself gives the input back.\"\"\"
        expect_close(candidate(x) + candidate(x), x, what="half + half")

    @halve.misconception("You return the magnitude: the sign of x is lost.")
    def forgets_the_sign(x):
        return x.abs() / 2

    @halve.accepts("a loop over Python numbers")
    def loops(x):
        return torch.tensor([v / 2 for v in x.flatten().tolist()]).reshape(x.shape)
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import linecache
import pkgutil
import platform
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

EXAMPLES = 40  # draws of a check's inputs, where it does not say otherwise


@dataclass(frozen=True, eq=False)
class Check:
    """One named property of an exercise: what it states, what it is worth, and how to recover.

    The property is a plain function ``property(candidate, **drawn)`` that raises AssertionError
    (mostly through `autograder.compare`) where the candidate breaks it. Its inputs are ``examples``
    draws from the strategies, or else the ``cases``, all of them. A hidden one counts in grading
    and is not in what students install (`autograder.bundle`).
    """

    name: str
    statement: str
    points: int
    hint: str
    property: Callable[..., None]
    strategies: dict[str, st.SearchStrategy[Any]]
    examples: int
    hidden: bool = False
    cases: tuple[dict[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """The name as a sentence: ``zero_stays_zero`` reads 'zero stays zero'."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Misconception:
    """A plausible wrong implementation and the sentence a tutor would say about it."""

    name: str
    says: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """A correct implementation in another style, which every check must accept."""

    name: str
    how: str
    function: Callable[..., Any]


@dataclass(eq=False)
class Exercise:
    """A public function of the library that students write themselves.

    Args:
        reference: the library's function. Its name is the exercise's name, its docstring the task.
        paper: where the method comes from, as shown beside the exercise.
        difficulty: 1 (warm-up) to 3 (hard).
        minutes: what a student who followed the lecture needs.
        decorator: what stands above the function in stub and solution, as it does above the
            reference: `on_copies` makes a kernel a function. Misconceptions and variants are
            written without it.
        equivalent: automatic mutants that change nothing one can observe, with the reason:
            ``{"the mutant's text": "why it is equivalent"}``. The kill table prints them.
        hidden_points: what the checks are worth that are not in this installation: a student's
            has none of the hidden ones, an instructor's has all.
    """

    reference: Callable[..., Any]
    paper: str
    difficulty: int
    minutes: int
    decorator: Callable[..., Any] | None = None
    equivalent: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    misconceptions: list[Misconception] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    hidden_points: int = 0

    def __post_init__(self) -> None:
        if self.difficulty not in (1, 2, 3):
            raise ValueError(f"difficulty must be 1, 2 or 3, got {self.difficulty!r}")
        if self.minutes < 1:
            raise ValueError(f"minutes must be at least 1, got {self.minutes!r}")

    @property
    def name(self) -> str:
        return self.reference.__name__

    @property
    def points(self) -> int:
        return sum(check.points for check in self.checks) + self.hidden_points

    @property
    def topic(self) -> str:
        """The folder of the library the reference lives in, such as ``quantization``."""
        return self.reference.__module__.split(".")[1]

    def check(
        self,
        *,
        points: int,
        hint: str,
        examples: int | None = None,
        hidden: bool = False,
        **inputs: st.SearchStrategy[Any] | list[Any],
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Add a check: the decorated function's docstring is its statement to the student.

        With ``hidden=True`` it is for what a careful student thinks of without being told. It is
        cut out of what students install, so write the word True, and keep out of the rest of the
        file what only this check needs.

        Args:
            examples: how often the inputs are drawn (40 times). As many as it takes for every
                mistake that this check is for to show, whatever the seed: benchmarks/escapes.py.
            inputs: where each argument of the property comes from: a strategy, or a list of all
                its values, plainest first. If they are lists, every combination is asked, once.
        """
        if not isinstance(hidden, bool):  # a strategy, for an argument of this name
            raise TypeError(f"hidden must be True or False, got {hidden!r}")
        for name, values in inputs.items():
            if not isinstance(values, st.SearchStrategy | list):
                raise TypeError(f"{name} must be a strategy or a list, got {values!r}")
        strategies = {n: s for n, s in inputs.items() if isinstance(s, st.SearchStrategy)}
        lists = {n: values for n, values in inputs.items() if isinstance(values, list)}
        cases: tuple[dict[str, Any], ...] = ()
        if lists and strategies:
            raise TypeError(f"{', '.join(lists)}: a list, beside strategies; use st.sampled_from")
        if not strategies:
            if examples is not None:
                raise ValueError("examples is for strategies: each value of a list is asked once")
            cases = tuple(
                dict(zip(lists, v, strict=True)) for v in itertools.product(*lists.values())
            )
            if not cases:
                raise ValueError("a list of inputs is empty: the check would ask nothing")

        def add(function: Callable[..., None]) -> Callable[..., None]:
            self.checks.append(
                Check(
                    name=function.__name__,
                    statement=_sentence(function),
                    points=points,
                    hint=hint,
                    property=function,
                    strategies=strategies,
                    examples=EXAMPLES if examples is None else examples,
                    hidden=hidden,
                    cases=cases,
                )
            )
            return function

        return add

    def misconception(self, says: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add a plausible wrong implementation; ``says`` is read by the student who wrote it."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            wrong = self.decorated(function)
            self.misconceptions.append(Misconception(function.__name__, says, wrong))
            return function

        return add

    def slip(self, name: str, says: str, *changes: tuple[str, str]) -> None:
        """Add the reference with something wrong in it, pairs of (right code, wrong code), as a
        misconception. For where one wrong line is to stand for itself.

        Raises:
            ValueError: a piece of right code is not in the reference, or more than once.
        """
        plain = inspect.unwrap(self.reference)
        tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        definition.name, definition.decorator_list = name, []
        if ast.get_docstring(definition) is not None:
            del definition.body[0]
        source = ast.unparse(tree)
        for right, wrong in changes:
            if source.count(right) != 1:
                raise ValueError(f"{right!r} is {source.count(right)} times in {self.name}")
            source = source.replace(right, wrong)
        function = define(source, name, f"<slip {name} of {self.name}>", dict(plain.__globals__))
        self.misconception(says)(function)

    def accepts(self, how: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add a correct implementation in another style (``how``), which must get full marks."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self.variants.append(Variant(function.__name__, how, self.decorated(function)))
            return function

        return add

    def decorated(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A plain function in the exercise's decorator, as the reference; without one, itself."""
        return self.decorator(function) if self.decorator else function

    def source(self, function: Callable[..., Any] | None = None) -> str:
        """Source of the reference, or of ``function`` renamed to the exercise's name.

        Decorators are dropped, but for the exercise's own: what remains can be pasted into a cell.
        """
        function = function or self.reference
        plain = inspect.unwrap(function)
        source = textwrap.dedent(inspect.getsource(plain))
        tree = ast.parse(source).body[0]
        assert isinstance(tree, ast.FunctionDef)
        lines = source.splitlines()[tree.lineno - 1 :]
        lines[0] = lines[0].replace(f"def {tree.name}(", f"def {self.name}(", 1)
        if self.decorator and plain is not function:
            lines.insert(0, f"@{self.decorator.__name__}")
        return "\n".join(lines) + "\n"


def define(
    source: str, name: str, filename: str, scope: dict[str, Any], flags: int = 0
) -> Callable[..., Any]:
    """The function ``name`` that ``source`` defines, in ``scope``; `inspect` finds its source."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec", flags, dont_inherit=True), scope)
    return scope[name]


def _sentence(function: Callable[..., Any]) -> str:
    doc = inspect.getdoc(function)
    if not doc:
        raise ValueError(f"the check {function.__name__} needs a docstring: its statement in words")
    return " ".join(doc.split())


@functools.cache
def exercises() -> dict[str, Exercise]:
    """Every exercise of `autograder.checks`, by name, in the order they were written.

    >>> exercises()["quantize_symmetric"].topic
    'quantization'
    """
    package = importlib.import_module("autograder.checks")
    found: dict[str, Exercise] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        try:
            module = importlib.import_module(f"autograder.checks.{info.name}")
        except ModuleNotFoundError as error:
            if error.name != "triton" or platform.system() == "Linux":  # it is for Linux
                raise
            continue
        for value in vars(module).values():
            if isinstance(value, Exercise):
                if value.name in found and found[value.name] is not value:
                    raise ValueError(f"two exercises are called {value.name!r}: names are unique")
                found[value.name] = value
    return found


def find(function: Callable[..., Any] | str) -> Exercise:
    """The exercise of a function, found by the function's name.

    Raises:
        KeyError: if no exercise has that name; the message lists the names there are.
    """
    name = function if isinstance(function, str) else getattr(function, "__name__", str(function))
    try:
        return exercises()[name]
    except KeyError:
        raise KeyError(
            f"no exercise is called {name!r}; there are: {', '.join(exercises())}"
        ) from None
