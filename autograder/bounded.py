"""Running code that may not end: a mutant's endless loop must cost seconds, not the afternoon."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from autograder.candidate import Local
from autograder.mutants import FILENAME

MAX_LINES = 1_000_000  # a mutant that runs more lines than this in a call has run away
MAX_SECONDS = 20.0  # of processor time in a call, for what runs away without running lines
KERNEL_SECONDS = 0.5  # the same for a kernel in Triton's interpreter, which takes 20 ms as a rule
MAX_MEMORY = 4 * 2**30  # bytes a call may ask for


class RanAway(BaseException):
    """A mutant that would not end; BaseException, so that no mutant catches it."""


class Bounded(Local):
    """A mutant as a candidate: a call ends with `RanAway` after so many lines or so much time.

    The bound on lines makes the table the same on every machine; processor time is for loops in the
    functions that a mutant calls. Memory is bounded where a process can bound its own (Linux). A
    loop inside a single C function, such as ``sum(itertools.repeat(1))``, is not stopped.

    Args:
        kernel: it runs in Triton's interpreter, where counting lines would take longer than running
            them: its time is bounded, more tightly, and its lines are not.
    """

    def __init__(self, function: Callable[..., Any], kernel: bool = False) -> None:
        super().__init__(function)
        self.kernel = kernel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lines = contextlib.nullcontext() if self.kernel else _line_limit()
        with lines, _time_limit(KERNEL_SECONDS if self.kernel else MAX_SECONDS), _memory_limit():
            return super().__call__(*args, **kwargs)


@contextlib.contextmanager
def _line_limit() -> Iterator[None]:
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(FILENAME):
            return None
        lines += 1
        if lines > MAX_LINES:
            raise RanAway(f"more than {MAX_LINES} lines in a call")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise RanAway(f"more than {seconds:.0f} seconds in a call")

    if (
        not hasattr(signal, "SIGVTALRM")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + MAX_MEMORY
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
