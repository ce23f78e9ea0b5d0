"""The grader's side of the boundary: a warm process, its children, and candidates that live there.

    with Zygote() as zygote, zygote.child() as child:
        child.run_cell("def halve(x):\\n    return x / 2", "halve")
        verdict = judge(find("halve"), child.candidate("halve"))

A child belongs to the student: it may crash, hang, lie, or send garbage. All of that is
`CandidateDied` here. What no check may blame on a function, such as a zygote that is gone, is
`GraderError`.

An answer is the bytes of a frame (`autograder.wire`), made in the child when the function returns
and never made again. So, whatever a function returns:

    NaN, infinity        values like others: a check says where they are right (NaN equals NaN)
    another dtype        kindly taken where a check is about values; judged where it is about types
    another shape, form  a failure in words: "the result has shape (3,), expected (2, 3)"
    tensor subclass      its data; nothing that it overrides reaches the grader
    lazy, sparse, meta   not computed for the student: "an object of type ..., expected a tensor"
    aliases              of each other, of arguments, of earlier answers: each answer is a copy
    changed afterwards   by a thread, by the next call: what counts was packed when it returned
    arguments in place   may be changed: child and check have copies of their own
    requires_grad        kept; the answer arrives as a leaf
    threads left running may go on until the exercises above have their verdicts, and end with the
                         child; if one ends the child, the exercise below gets a fresh one
    malformed, too late, too large, not asked for: the failure of the exercise, and the child's end

No check hands over modules or functions, and none gets any back: only plain data travels.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from autograder import sandbox, wire
from autograder.candidate import Call
from autograder.compare import CandidateDied, CandidateError
from autograder.foresight import PATIENCE, Answer, Part, Plan
from autograder.verdict import show_call

MEMORY = 2 << 30  # bytes a child may map beyond what torch and the library take
CELL_SECONDS = 30.0
CALL_SECONDS = 10.0
CELL_PATIENCE = 10.0  # seconds of processor time for a cell; those for a call are the plan's
CHECK_SECONDS = 30.0  # for all the calls of one check together
START_SECONDS = 120.0
NO_ANSWER = "your code sent what is no answer"
ENDLESS_CELL = f"took longer than {CELL_PATIENCE:g} s of processor time: an endless loop?"
ENDLESS = "took hundreds of times as long as it should: an endless loop?"
GRACE_SECONDS = 0.5  # from a closed connection to the process' own end
CHECK_BYTES = 256 << 20  # for all the answers to one check together
KEPT_BYTES = 256 << 20  # of packed calls that a zygote keeps


class GraderError(BaseException):
    """Grading itself is broken. As with Ctrl-C, no check may swallow it, so it is no `Exception`:
    those that a strange answer causes in a check make the check fail."""


class Zygote:
    """A warm process with torch and the library loaded, which forks children in milliseconds.

    Use it as a context manager, from one thread.

    Args:
        walled: whether it and its children run behind the walls of `autograder.sandbox`.

    Raises:
        GraderError: the process does not start, or is gone.
        sandbox.NoSandbox: it should be walled, and this machine cannot do that.
    """

    def __init__(self, walled: bool = False) -> None:
        if walled and (reason := sandbox.missing()):
            raise sandbox.NoSandbox(reason)
        self.walled = walled
        self.kept: dict[str, int] = {}  # the plans whose calls it has at hand: how many bytes
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (open for as long as the zygote)
        self._control, theirs = socket.socketpair()
        with theirs, sandbox.seccomp_file() if walled else contextlib.nullcontext() as rules:
            argv = [sys.executable, "-P", "-m", "autograder.child", str(theirs.fileno())]
            inherited = [theirs.fileno()]
            if rules is not None:
                argv = sandbox.command([*argv, "walled"], ENVIRONMENT, rules.fileno())
                inherited.append(rules.fileno())
            self._process = subprocess.Popen(
                argv,
                pass_fds=inherited,
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is for the grader, which then hangs up
            )
        if self._ask(None, START_SECONDS) != "ready":
            raise GraderError("the grading process does not start")

    def child(
        self,
        memory: int = MEMORY,
        seed: int = 0,
        cell_seconds: float = CELL_SECONDS,
        call_seconds: float = CALL_SECONDS,
        deadline: float = math.inf,
    ) -> Child:
        """Fork a fresh child.

        Args:
            memory: bytes of address space it may take.
            seed: of its random numbers (`random`, NumPy, torch).
            cell_seconds, call_seconds: how long one cell and one call may take.
            deadline: when everything must be over, as `time.monotonic` counts.
        """
        return Child(self, memory, seed, cell_seconds, call_seconds, deadline)

    def keep(self, plan: Plan) -> None:
        """Have the calls of a plan at hand in every child that is forked from now on.

        Code can find them there before it is asked, as it can find the library, whose answers to
        them are right: that is copying, and helps nobody else. But no grade may depend on who was
        judged before. So keep what a notebook needs before its first child is forked.
        """
        if plan.key in self.kept:
            return
        size = sum(map(len, plan.frames))
        if sum(self.kept.values()) + size <= KEPT_BYTES:
            reference = plan.exercise.reference
            names = {"module": reference.__module__, "name": reference.__name__}
            request = {"do": "keep", "key": plan.key, "count": len(plan.frames)}
            self._ask(request | names, frames=plan.frames)
            self.kept[plan.key] = size

    def _fork(self, sock: socket.socket, folder: str | None, memory: int, seed: int) -> int:
        request = {"do": "fork", "folder": folder, "memory": memory, "seed": seed}
        return self._ask(request, fd=sock.fileno())

    def _end(self, pid: int, patience: float) -> tuple[int | None, int]:
        return self._ask({"do": "end", "pid": pid, "patience": patience})

    def _ask(
        self,
        request: Any,
        seconds: float = 30.0,
        fd: int | None = None,
        frames: Sequence[bytes] = (),
    ) -> Any:
        until = time.monotonic() + seconds
        try:
            if request is not None:
                wire.send(self._control, wire.pack(request), until)
            for frame in frames:
                wire.send(self._control, frame, until)
            if fd is not None:
                socket.send_fds(self._control, [b"."], [fd])
            return wire.unpack(wire.receive(self._control, until))
        except (OSError, EOFError, wire.WireError) as error:  # TimeoutError is an OSError
            self.close()
            said = ""
            if not self._log.closed:
                self._log.seek(0)
                said = self._log.read().decode(errors="replace")[-2000:]
            raise GraderError(f"the grading process is gone ({error!r}) {said}".strip()) from None

    def close(self) -> None:
        """Hang up: the zygote kills and reaps its children, and goes."""
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._log.close()


# One thread: a process that has started more cannot be forked. The rest makes runs repeatable.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "PYTHONHASHSEED": "0",
    "TRITON_INTERPRET": "1",  # kernels are judged on the CPU, also where there is a GPU
}


class Child:
    """A process that runs one student's cells and answers calls to the functions they define.

    Every method raises CandidateDied when the process is gone, takes too long, or answers with
    something that is no answer.

    Attributes:
        dead: why the process is gone; '' while it lives.
        slow: whether it was ended because it took too long.
        first: number of the first call of the last batch.
        reached: number of what it was at when it ended.
    """

    def __init__(
        self,
        zygote: Zygote,
        memory: int,
        seed: int,
        cell_seconds: float,
        call_seconds: float,
        deadline: float,
    ) -> None:
        self.cell_seconds = cell_seconds
        self.call_seconds = call_seconds
        self.deadline = deadline
        self.dead = ""
        self.slow = False
        self.first = self.reached = 0
        self.zygote = zygote
        self._kept = dict.fromkeys(zygote.kept, 0)  # and which call of each is the next
        self._number = 0
        # Behind walls the zygote makes the folder, in a /tmp of its own.
        self._folder = None if zygote.walled else tempfile.mkdtemp(prefix="fewer-")
        self._sock, theirs = socket.socketpair()
        try:
            with theirs:
                self._pid = zygote._fork(theirs, self._folder, memory, seed)
        except GraderError:
            _remove(self._folder)
            raise
        self._stream = wire.Stream(self._sock)

    def run_cell(self, source: str, label: str) -> None:
        """Run a code cell; ``label`` names it in tracebacks.

        Raises:
            CandidateError: the cell raised an exception.
        """
        try:
            request = {"do": "run", "source": source, "label": label, "patience": CELL_PATIENCE}
            frame = wire.pack(request)
        except wire.WireError as error:
            raise CandidateError(["ValueError"], f"the cell is {error}") from None
        number = self._send([frame], self.cell_seconds)
        self._answer(number, self.cell_seconds, ENDLESS_CELL)

    def guard(self, name: str | None) -> None:
        """Make the library's own function ``name`` raise while it is judged; None lifts that."""
        number = self._send([wire.pack({"do": "guard", "name": name})], self.call_seconds)
        self._answer(number, self.call_seconds)

    def look(self, name: str) -> tuple[str, bool, str]:
        """What the cells call ``name``: (its type or '', whether it can be called, the file name
        of its code or ''). The file name is ``<cell LABEL>`` for a function of a cell."""
        number = self._send([wire.pack({"do": "look", "name": name})], self.call_seconds)
        answer = self._answer(number, self.call_seconds)
        match answer:
            case (str(kind), bool(can_be_called), str(home)):
                return kind, can_be_called, home
        return self._die(NO_ANSWER, patience=0.0)

    def calls(
        self,
        name: str,
        frames: Sequence[bytes],
        right: Sequence[bytes] = (),
        patience: float = PATIENCE,
        kept: str = "",
        start: int = 0,
    ) -> Iterator[Answer]:
        """Call ``name`` with each of ``frames``, packed (args, kwargs).

        Args:
            right: the answers that are not looked into.
            patience: seconds of processor time after which the child itself gives up a call.
            kept: what the zygote calls the plan that the frames are from, if it keeps it.
            start: number of the first frame in that plan.
        """
        request = {"do": "call", "name": name, "count": len(frames), "patience": patience}
        if self._kept.get(kept) == start:
            self._kept[kept] += len(frames)  # each is there once
            packed = [wire.pack(request | {"kept": kept, "start": start})]
        else:
            packed = [wire.pack(request), *frames]
        self.first = self._number + 2  # the request itself has a number, too
        self._send(packed, self.call_seconds)
        self._number = self.first + len(frames) - 1
        for i in range(len(frames)):
            frame = self._receive(self.first + i, self.call_seconds)
            if i < len(right) and frame == right[i]:
                yield Answer(frame, None, True)
                continue
            try:
                yield Answer(frame, self._read(self.first + i, frame), False)
            except CandidateError as error:
                yield Answer(frame, error, False)

    def candidate(self, name: str) -> Remote:
        """What the cells call ``name``, for `autograder.judge.judge`."""
        return Remote(self, name)

    def idle(self) -> bool:
        """Whether the process lives and says nothing unasked; if not, it is buried."""
        if self.dead:
            return False
        if self._stream.pending():
            with contextlib.suppress(CandidateDied):
                self._die(NO_ANSWER, GRACE_SECONDS)
            return False
        self._sock.settimeout(0)
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        with contextlib.suppress(CandidateDied):
            self._die(NO_ANSWER, GRACE_SECONDS)
        return False

    def close(self) -> None:
        """End the process and all that it started."""
        if not self.dead:
            self.dead = "the process was closed"
            self._gone(0.0)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, frames: Sequence[bytes], seconds: float) -> int:
        """Send frames, each with the number after that of the one before; the last number."""
        if self.dead:
            raise CandidateDied(self.dead)
        until = min(time.monotonic() + seconds, self.deadline)
        first = self._number + 1
        self._number += len(frames)
        try:
            self._stream.send(enumerate(frames, first), until)
        except TimeoutError:
            self._die(self._too_long(seconds), patience=0.0)
        except OSError:
            self._die("", GRACE_SECONDS)
        return self._number

    def _answer(self, number: int, seconds: float, endless: str = ENDLESS) -> Any:
        """The answer to a request: what the student's code returned, or raised (CandidateError)."""
        return self._read(number, self._receive(number, seconds), endless)

    def _receive(self, number: int, seconds: float) -> bytes:
        """The frame that answers the request of this number."""
        if self.dead:
            raise CandidateDied(self.dead)
        until = min(time.monotonic() + seconds, self.deadline)
        try:
            return self._stream.receive(until, number)[1]
        except TimeoutError:
            self._die(self._too_long(seconds), patience=0.0)
        except wire.WireError as error:
            self._die(f"the answer is {error}", GRACE_SECONDS, number)
        except (EOFError, OSError):
            self._die("", GRACE_SECONDS)

    def _read(self, number: int, frame: bytes, endless: str = ENDLESS) -> Any:
        try:
            answer = wire.unpack(frame)
        except wire.WireError as error:
            self._die(f"the answer is {error}", GRACE_SECONDS, number)
        match answer:
            case {"value": value, **rest} if not rest:
                return value
            case {"error": ([str(), *_] as kinds, str(message), str(trace)), **rest} if (
                not rest and all(isinstance(kind, str) for kind in kinds)
            ):
                short = [kind[:100] for kind in kinds[:20]]
                raise CandidateError(short, message[:2000], trace[:2000])
            case {"refused": str(why), **rest} if not rest:
                self._die(why[:200], 0.0, number)
            case {"endless": True, **rest} if not rest:
                self.slow = True
                self._die(endless, 0.0, number)
        return self._die(NO_ANSWER, 0.0, number)

    def _too_long(self, seconds: float) -> str:
        self.slow = True
        if time.monotonic() >= self.deadline:
            return "the time for the whole notebook is up"
        return f"took longer than {seconds:g} s: an endless loop?"

    def _die(self, why: str, patience: float, number: int | None = None) -> NoReturn:
        """Bury the process. If it ends by itself in ``patience`` seconds, that is the reason;
        without any patience, ``why`` is.

        Args:
            number: of the request that was its end; None: the one that it was at.
        """
        self.dead = why or "your code closed the connection to the grader"
        status, at = self._gone(patience)
        self.reached = at if number is None else number
        if status is not None and patience:
            self.dead = _how_it_ended(status)
        raise CandidateDied(self.dead)

    def _gone(self, patience: float) -> tuple[int | None, int]:
        try:
            return self.zygote._end(self._pid, patience)
        finally:
            self._sock.close()  # not before: a process that is hung up on ends by itself
            _remove(self._folder)


def _remove(folder: str | None) -> None:
    """Delete a folder with whatever was left in it, were it nested too deep for `shutil.rmtree`."""
    if folder is None:
        return
    try:
        os.rmdir(folder)
    except OSError:
        subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False)


def _how_it_ended(status: int) -> str:
    if os.WIFEXITED(status):
        return f"your code ended the process (exit code {os.WEXITSTATUS(status)})"
    number = os.WTERMSIG(status)
    guess = {
        signal.SIGKILL: " (out of memory, or too many threads?)",
        signal.SIGSEGV: " (a crash in compiled code, or too deep a recursion?)",
        signal.SIGABRT: " (a crash in compiled code?)",
    }
    return f"your code was killed by signal {number}{guess.get(signal.Signals(number), '')}"


class Remote:
    """A function in a child process as a candidate.

    Attributes:
        live: how many calls were not foreseen.
    """

    def __init__(self, child: Child, name: str) -> None:
        self.child = child
        self.name = name
        self.live = 0
        self._written = False
        self._patience = PATIENCE
        self._waited = 0.0
        self._received = 0

    def foresee(self, plan: Plan) -> list[list[Answer]]:
        """Fetch the answers to all calls of a plan, for each set of inputs. Of what is still to be
        written, those to the first set are enough."""
        self._waited = 0.0
        self._received = 0
        self._patience = plan.patience
        answers = []
        if not self._written:
            answers += self._fetch(plan, plan.parts[:1])
            if answers and _todo(answers[0]):
                return answers
            self._written = True
        return answers + self._fetch(plan, plan.parts[len(answers) :])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.live += 1
        batch = self.child.calls(self.name, [wire.pack((args, kwargs))], (), self._patience)
        (answer,) = self._within_bounds(batch, [Call(args, kwargs)])
        if isinstance(answer.value, CandidateError):
            raise answer.value
        return answer.value

    def _fetch(self, plan: Plan, parts: Sequence[Part]) -> list[list[Answer]]:
        calls = [call for part in parts for call in part.calls]
        if not calls:
            return [[] for _ in parts]
        start, end = parts[0].start, parts[-1].end
        asked, right = plan.frames[start:end], plan.right[start:end]
        batch = self.child.calls(self.name, asked, right, self._patience, plan.key, start)
        answers = self._within_bounds(batch, calls)
        for i, answer in enumerate(answers):
            error = answer.value
            if isinstance(error, CandidateError) and error.kinds == plan.kinds[start + i]:
                answers[i] = answer._replace(right=True)
        return [answers[part.start - start : part.end - start] for part in parts]

    def _within_bounds(self, answers: Iterator[Answer], calls: Sequence[Call]) -> list[Answer]:
        """The child's answers, as long as it keeps within the bounds of one check."""
        told: list[Answer] = []
        try:
            while len(told) < len(calls):
                began = time.monotonic()
                told.append(next(answers))
                self._waited += time.monotonic() - began
                self._received += told[-1].weight
                number = self.child.first + len(told) - 1
                if self._waited > CHECK_SECONDS:
                    self.child.slow = True
                    why = f"the calls took longer than {CHECK_SECONDS:g} s in all"
                    self.child._die(why, 0.0, number)
                if self._received > CHECK_BYTES:
                    why = f"the answers are larger than {CHECK_BYTES >> 20} MB"
                    self.child._die(why, 0.0, number)
        except CandidateDied as death:
            at = min(max(self.child.reached - self.child.first, 0), len(calls) - 1)
            called = show_call(self.name, calls[at])
            raise CandidateDied(f"{death} (when called as {called})") from None
        return told


def _todo(answers: list[Answer]) -> bool:
    """Whether the first thing that was asked says that nothing was written yet."""
    error = answers[0].value if answers else None
    return isinstance(error, CandidateError) and "NotImplementedError" in error.kinds
