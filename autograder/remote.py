"""The grader's side of the boundary: a warm process, its children, and candidates that live there.

    with Zygote() as zygote, zygote.child() as child:
        child.run_cell("def halve(x):\\n    return x / 2", "halve")
        verdict = judge(find("halve"), child.candidate("halve"))

A child belongs to the student: it may crash, hang, lie, or send garbage. All of that is
`CandidateDied` here. What no check may blame on a function, such as a zygote that is gone, is
`GraderError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any, NoReturn

from autograder import sandbox, wire
from autograder.candidate import Call
from autograder.compare import CandidateDied, CandidateError
from autograder.verdict import show_call

MEMORY = 2 << 30  # bytes a child may map beyond what torch and the library take
CELL_SECONDS = 30.0
CALL_SECONDS = 10.0
CHECK_SECONDS = 30.0  # for all the calls of one check together
START_SECONDS = 120.0
GRACE_SECONDS = 0.5  # from a closed connection to the process' own end
CHECK_BYTES = 256 << 20  # for all the answers to one check together
TEXT_WEIGHT = 40  # what a byte of JSON may take as Python objects


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

    def _fork(self, sock: socket.socket, folder: str | None, memory: int, seed: int) -> int:
        request = {"do": "fork", "folder": folder, "memory": memory, "seed": seed}
        return self._ask(request, fd=sock.fileno())

    def _end(self, pid: int, patience: float) -> int | None:
        return self._ask({"do": "end", "pid": pid, "patience": patience})

    def _ask(self, request: Any, seconds: float = 30.0, fd: int | None = None) -> Any:
        until = time.monotonic() + seconds
        try:
            if request is not None:
                wire.send(self._control, wire.pack(request), until)
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
        received: what the last answer may take in memory, in bytes.
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
        self.received = 0
        self._zygote = zygote
        # Behind walls the zygote makes the folder, in a /tmp of its own.
        self._folder = None if zygote.walled else tempfile.mkdtemp(prefix="fewer-")
        self._sock, theirs = socket.socketpair()
        try:
            with theirs:
                self._pid = zygote._fork(theirs, self._folder, memory, seed)
        except GraderError:
            _remove(self._folder)
            raise

    def run_cell(self, source: str, label: str) -> None:
        """Run a code cell; ``label`` names it in tracebacks.

        Raises:
            CandidateError: the cell raised an exception.
        """
        try:
            request = wire.pack({"do": "run", "source": source, "label": label})
        except wire.WireError as error:
            raise CandidateError(["ValueError"], f"the cell is {error}") from None
        self._send([request], self.cell_seconds)
        self._answer(self.cell_seconds)

    def guard(self, name: str | None) -> None:
        """Make the library's own function ``name`` raise while it is judged; None lifts that."""
        self._send([wire.pack({"do": "guard", "name": name})], self.call_seconds)
        self._answer(self.call_seconds)

    def look(self, name: str) -> tuple[str, bool, str]:
        """What the cells call ``name``: (its type or '', whether it can be called, the file name
        of its code or ''). The file name is ``<cell LABEL>`` for a function of a cell."""
        self._send([wire.pack({"do": "look", "name": name})], self.call_seconds)
        answer = self._answer(self.call_seconds)
        match answer:
            case (str(kind), bool(can_be_called), str(home)):
                return kind, can_be_called, home
        return self._die("your code sent what is no answer", patience=0.0)

    def calls(self, name: str, frames: list[bytes]) -> Iterator[Any | CandidateError]:
        """Call ``name`` with each of ``frames`` (packed (args, kwargs)): values or exceptions."""
        request = wire.pack({"do": "call", "name": name, "count": len(frames)})
        self._send([request, *frames], self.call_seconds)
        for _ in frames:
            try:
                yield self._answer(self.call_seconds)
            except CandidateError as error:
                yield error

    def candidate(self, name: str) -> Remote:
        """What the cells call ``name``, for `autograder.judge.judge`."""
        return Remote(self, name)

    def idle(self) -> bool:
        """Whether the process lives and says nothing unasked; if not, it is buried."""
        if self.dead:
            return False
        self._sock.settimeout(0)
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        with contextlib.suppress(CandidateDied):
            self._die("your code sent what is no answer", GRACE_SECONDS)
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

    def _send(self, frames: list[bytes], seconds: float) -> None:
        if self.dead:
            raise CandidateDied(self.dead)
        until = min(time.monotonic() + seconds, self.deadline)
        try:
            for frame in frames:
                wire.send(self._sock, frame, until)
        except TimeoutError:
            self._die(self._too_long(seconds), patience=0.0)
        except OSError:
            self._die("", GRACE_SECONDS)

    def _answer(self, seconds: float) -> Any:
        """The next answer: what the student's code returned, or raised as CandidateError."""
        if self.dead:
            raise CandidateDied(self.dead)
        until = min(time.monotonic() + seconds, self.deadline)
        try:
            frame = wire.receive(self._sock, until)
            self.received = len(frame) + TEXT_WEIGHT * wire.LENGTHS.unpack_from(frame)[0]
            answer = wire.unpack(frame)
        except TimeoutError:
            self._die(self._too_long(seconds), patience=0.0)
        except wire.WireError as error:
            self._die(f"the answer is {error}", GRACE_SECONDS)
        except (EOFError, OSError):
            self._die("", GRACE_SECONDS)
        match answer:
            case {"value": value, **rest} if not rest:
                return value
            case {"error": ([str(), *_] as kinds, str(message), str(trace)), **rest} if (
                not rest and all(isinstance(kind, str) for kind in kinds)
            ):
                short = [kind[:100] for kind in kinds[:20]]
                raise CandidateError(short, message[:2000], trace[:2000])
            case {"refused": str(why), **rest} if not rest:
                self._die(why[:200], patience=0.0)
        return self._die("your code sent what is no answer", patience=0.0)

    def _too_long(self, seconds: float) -> str:
        self.slow = True
        if time.monotonic() >= self.deadline:
            return "the time for the whole notebook is up"
        return f"took longer than {seconds:g} s: an endless loop?"

    def _die(self, why: str, patience: float) -> NoReturn:
        """Bury the process. If it ends by itself in ``patience`` seconds, that is the reason."""
        self.dead = why or "your code closed the connection to the grader"
        status = self._gone(patience)
        if status is not None:
            self.dead = _how_it_ended(status)
        raise CandidateDied(self.dead)

    def _gone(self, patience: float) -> int | None:
        try:
            return self._zygote._end(self._pid, patience)
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
        signal.SIGKILL: " (out of memory?)",
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
        self._answers: dict[bytes, deque[Any]] = defaultdict(deque)
        self._waited = 0.0
        self._received = 0

    def foresee(self, calls: list[Call]) -> None:
        """Fetch the answers to ``calls`` in one batch. Each is used once, by the same call."""
        self._answers.clear()
        self._waited = 0.0
        self._received = 0
        frames = [wire.pack((call.args, call.kwargs)) for call in calls]
        for frame, answer in zip(frames, self._calls(frames, calls), strict=True):
            self._answers[_key(frame)].append(answer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = wire.pack((args, kwargs))
        if answers := self._answers.get(_key(frame)):
            answer = answers.popleft()
        else:
            self.live += 1
            (answer,) = self._calls([frame], [Call(args, kwargs)])
        if isinstance(answer, CandidateError):
            raise answer
        return answer

    def _calls(self, frames: list[bytes], calls: list[Call]) -> Iterator[Any]:
        """The child's answers, one by one, as long as it keeps within the bounds of one check."""
        answers = self.child.calls(self.name, frames)
        for call in calls:
            began = time.monotonic()
            try:
                answer = next(answers)
                self._waited += time.monotonic() - began
                self._received += self.child.received
                if self._waited > CHECK_SECONDS:
                    self.child.slow = True
                    self.child._die(f"the calls took longer than {CHECK_SECONDS:g} s in all", 0.0)
                if self._received > CHECK_BYTES:
                    self.child._die(f"the answers are larger than {CHECK_BYTES >> 20} MB", 0.0)
            except CandidateDied as death:
                told = f"{death} (when called as {show_call(self.name, call)})"
                raise CandidateDied(told) from None
            yield answer


def _key(frame: bytes) -> bytes:
    return hashlib.blake2b(frame, digest_size=16).digest()
