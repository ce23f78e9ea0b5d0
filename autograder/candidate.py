"""What is being judged, seen from the checks: something one can call.

`Local` runs a function in this process (a student checking herself, the kill table);
`autograder.remote` has the one that lives in a child process. Both give checks the same view: fresh
copies of the arguments, plain data back, and `CandidateError` for whatever the function raised.
"""

from __future__ import annotations

import contextlib
import copy
import io
import linecache
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from autograder.compare import CandidateError, like

if TYPE_CHECKING:
    from autograder.foresight import Answer, Plan


class Candidate(Protocol):
    """Anything that answers calls. ``foresee`` may fetch the answers to many calls at once: those
    of an `autograder.foresight.Plan`, for each set of inputs; None if calls cost nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def foresee(self, plan: Plan) -> list[list[Answer]] | None: ...


@dataclass
class Call:
    """One call a check made, and what came of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any = None
    error: Exception | None = None


def fresh(value: Any) -> Any:
    """A deep copy in which tensors keep their memory layout but share nothing.

    >>> fresh(torch.zeros(2, 3).t()).is_contiguous()
    False
    """
    if isinstance(value, Tensor):
        return copy_layout(value).requires_grad_(value.requires_grad)
    if isinstance(value, tuple | list):
        return type(value)(fresh(v) for v in value)
    if isinstance(value, dict):
        return {k: fresh(v) for k, v in value.items()}
    return copy.deepcopy(value)


def copy_layout(x: Tensor) -> Tensor:
    """A copy of ``x`` with the same strides (an expanded tensor becomes a plain one)."""
    x = x.detach()
    if 0 in x.stride():
        return x.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


class Local:
    """A function of this process as a candidate. What it prints or warns is swallowed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        quiet = io.StringIO()
        try:
            with (
                contextlib.redirect_stdout(quiet),
                contextlib.redirect_stderr(quiet),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                return self.function(*fresh(args), **fresh(kwargs))
        except Exception as error:
            raise CandidateError.of(error, student_lines(error)) from error

    def foresee(self, plan: Plan) -> None:
        """Nothing to fetch: calls are made when they are needed."""


class Judged:
    """The candidate as a check sees it: answers in the reference's form, every call remembered."""

    def __init__(self, candidate: Callable[..., Any], reference: Callable[..., Any]) -> None:
        self.candidate = candidate
        self.reference: Callable[..., Any] = Local(reference)
        self.calls: list[Call] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(fresh(args), fresh(kwargs))
        self.calls.append(call)
        try:
            call.value = self.candidate(*args, **kwargs)
        except CandidateError as error:
            call.error = error
            raise
        try:
            model = self.reference(*args, **kwargs)
        except CandidateError:
            return call.value
        call.value = like(call.value, model)
        return call.value


def student_lines(error: BaseException, limit: int = 3) -> str:
    """The innermost lines of a traceback that are in code typed into a cell or a script.

    Frames of installed packages are left out: the student can only change her own.
    """
    lines = []
    for frame, number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code  # `extract_tb` would look at the files of all the others, too
        if code.co_filename.startswith(("<", "/tmp/ipykernel")):
            linecache.checkcache(code.co_filename)
            if line := linecache.getline(code.co_filename, number, frame.f_globals).strip():
                lines.append(f"line {number}: {line}")
    return "\n".join(lines[-limit:])
