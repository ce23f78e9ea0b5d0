"""The other side of the boundary: the process that runs a student's code.

``python -m autograder.child FD [walled]`` starts the *zygote*: it imports torch and the library
once, and forks a child each time the grader asks for one, in milliseconds. A child runs the cells
of one notebook and answers calls to the functions that they define. Nothing of the checks is
imported here, and nothing that a child says is believed: what decides over points is in
`autograder.remote` and behind it, in the grader's process.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import importlib
import inspect
import linecache
import mmap
import os
import pkgutil
import random
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from signal import ITIMER_PROF, setitimer
from time import monotonic
from typing import Any, NoReturn

import numpy as np
import torch
from IPython.core.inputtransformer2 import TransformerManager

import fewer
from autograder import wire
from autograder.candidate import student_lines
from autograder.compare import CandidateError
from autograder.landlock import enter
from autograder.sandbox import THREADS, empty, forbid_processes, second_wall, threads

LONGEST_MESSAGE = 2000  # characters of what an exception says
FLUSH_BYTES = 1 << 15  # of answers that are sent together
FLUSH_SECONDS = 0.01  # ... unless they take longer than that
AGAIN_SECONDS = 0.05  # of processor time, after which patience is lost once more
WATCH_SECONDS = 0.1
LIMITS = {  # behind walls
    resource.RLIMIT_FSIZE: 256 << 20,
    resource.RLIMIT_NOFILE: 512,
}
NUMBER = struct.Struct("<I")
IMPORTING = "<frozen importlib._bootstrap>"  # the file name of Python's own code for that
RUN_THEIR_CELL = {"capture", "prun", "time", "timeit"}  # magics whose body is still the student's


def main(fd: int, walled: bool) -> None:
    """Import what notebooks use, then fork children until the grader hangs up.

    Args:
        fd: of the socket to the grader.
        walled: whether this is the first process of a namespace (`autograder.sandbox`), in which
            nothing must be left when a child has ended.
    """
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(fewer.__path__, "fewer."):
        # Some topics need what not every machine has, such as triton.
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)
    with contextlib.suppress(ImportError):
        importlib.import_module("matplotlib.pyplot")
    hide_the_grader()
    library = Library()
    Server(None, 0, Shared(library=library))  # what that loads is loaded once, and here
    wire.unpack(wire.pack(torch.zeros(1)))
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page it looks at
    control = socket.socket(fileno=fd)
    if walled:
        second_wall()
        let_others_look(False)
        # The first process gets no signal from inside, except those that it has handlers for.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    wire.send(control, wire.pack("ready"))
    children: dict[int, mmap.mmap] = {}
    kept: dict[str, list[Any]] = {}
    try:
        while True:
            while children and not select.select([control], [], [], WATCH_SECONDS)[0]:
                for pid in children:
                    if threads(pid) > THREADS:  # the machine has only so many
                        os.kill(pid, signal.SIGKILL)
            request = wire.unpack(wire.receive(control))
            if request["do"] == "fork":
                at = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the child
                library.look()
                pid = fork(control, request, Shared(at, kept, library), children.values())
                children[pid] = at
                wire.send(control, wire.pack(pid))
            elif request["do"] == "keep":
                frames = [wire.receive(control) for _ in range(request["count"])]
                kept[request["key"]] = [wire.unpack(frame) for frame in frames]
                rehearse(request["module"], request["name"], frames[:1])
                gc.freeze()
                wire.send(control, wire.pack(None))
            else:
                status = end(request["pid"], request["patience"])
                with children.pop(request["pid"]) as at:
                    (number,) = NUMBER.unpack_from(at)
                if walled and not children:
                    sweep()
                wire.send(control, wire.pack((status, number)))
    except (EOFError, OSError):
        for pid in children:
            end(pid, patience=0)


def hide_the_grader() -> None:
    """Leave only a `check` that does nothing of the package `autograder`."""
    for name in [name for name in sys.modules if name.split(".")[0] == "autograder"]:
        del sys.modules[name]
    stub = types.ModuleType("autograder")
    stub.check = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    sys.modules["autograder"] = stub


def rehearse(module: str, name: str, frames: list[bytes]) -> None:
    """Call the library's function as children will: what PyTorch loads and sets up when it first
    does something is then there for all of them."""
    for frame in frames:
        args, kwargs = wire.unpack(frame)
        with contextlib.suppress(Exception):  # those that it should raise, or there is no such one
            wire.pack({"value": getattr(sys.modules[module], name)(*args, **kwargs)})


def fork(
    control: socket.socket,
    request: dict[str, Any],
    shared: Shared,
    of_others: Iterable[mmap.mmap],
) -> int:
    """Start a child that serves on the socket that follows the request; its process id."""
    _, (fd, *_), _, _ = socket.recv_fds(control, 1, 1)
    pid = os.fork()
    if pid == 0:
        try:
            for at in of_others:
                at.close()
            become_child(fd, request, shared)
        finally:
            os._exit(70)  # only if the serving itself broke down
    os.close(fd)
    return pid


def let_others_look(allowed: bool) -> None:
    """Whether processes of the same user may look into this one's memory, and change it."""
    import ctypes

    ctypes.CDLL(None).prctl(4, int(allowed), 0, 0, 0)  # PR_SET_DUMPABLE


def sweep() -> None:
    """End every process of this namespace but this one, its first, and empty what all may write."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)  # orphans too: they became this process' children
        except ChildProcessError:
            break
    for folder in ("/tmp", "/dev/shm"):
        empty(folder)


def end(pid: int, patience: float) -> int | None:
    """Kill a child and all of its process group, and reap it.

    Returns:
        Its wait status if it ended by itself within ``patience`` seconds, else None.
    """
    until = time.monotonic() + patience
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done or time.monotonic() >= until:
            break
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if done:
        return status
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # it may not yet have a group of its own
    os.waitpid(pid, 0)
    return None


def become_child(fd: int, request: dict[str, Any], shared: Shared) -> NoReturn:
    """Leave everything of the zygote behind, then serve until the grader hangs up."""
    os.setsid()
    die_with_parent()
    if request["folder"] is None:
        enter(second_wall())
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.dup2(fd, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    os.chdir(request["folder"] or tempfile.mkdtemp(prefix="fewer-"))
    if request["folder"] is None:
        let_others_look(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for what, most in LIMITS.items():
            resource.setrlimit(what, (most, most))
        forbid_processes()
    sys.path.insert(0, "")  # as in a notebook
    sys.argv = [""]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory(request["memory"])
    Server(socket.socket(fileno=3), request["seed"], shared).serve()
    os._exit(0)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the zygote dies; elsewhere the closed socket must do."""
    if sys.platform == "linux":
        import ctypes

        zygote = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != zygote:
            os._exit(0)


def limit_memory(extra: int) -> None:
    """Allow ``extra`` bytes of address space beyond what the zygote already maps."""
    with contextlib.suppress(OSError, ValueError):  # not every system has /proc, or the limit
        with open("/proc/self/statm") as statm:
            mapped = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + extra, mapped + extra))


class Library:
    """The library's modules: all that there ever were, for cells can remove one from `sys.modules`
    or import it anew."""

    def __init__(self) -> None:
        self.modules: list[tuple[str, types.ModuleType]] = []
        self._count = 0  # of all modules, when they were looked at

    def functions(self, name: str) -> Iterator[types.FunctionType]:
        """Every function called ``name``, the wrapped ones inside of others included."""
        self.look()
        seen: set[int] = set()
        for _, module in self.modules:
            layer = vars(module).get(name)
            if isinstance(layer, type):
                layer = vars(layer).get("__init__")
            while layer is not None and id(layer) not in seen:
                seen.add(id(layer))
                if isinstance(layer, types.FunctionType):
                    yield layer
                elif hasattr(layer, "cache_clear"):
                    layer.cache_clear()
                layer = getattr(layer, "__wrapped__", None)

    def look(self) -> None:
        """Take note of modules that are new."""
        known = sys.modules
        if len(known) == self._count and all(known.get(p) is m for p, m in self.modules):
            return
        here = {id(module) for _, module in self.modules}
        for path, module in list(known.items()):
            if path.split(".")[0] == "fewer" and id(module) not in here:
                self.modules.append((path, module))
        self._count = len(known)


@dataclass
class Shared:
    """What a child has from its zygote.

    Attributes:
        at: where it leaves the number of what it is at; the zygote sees that, too.
        kept: arguments of calls that the grader need not send, by the name of their plan.
    """

    at: Any = field(default_factory=lambda: bytearray(NUMBER.size))
    kept: dict[str, list[Any]] = field(default_factory=dict)
    library: Library = field(default_factory=Library)


class Server:
    """Answers the grader's requests about one notebook, in the order they come.

    Answers that are quick to come are sent together. So that a sudden death can be told as that of
    one call, the number of what is done at the moment is left in shared memory.

    A call or cell that takes more processor time than the grader has patience for ends the process
    with a word of farewell. That saves time and is no wall: code can prevent it, and then the
    grader's own clock decides.
    """

    def __init__(self, sock: socket.socket | None, seed: int, shared: Shared | None = None) -> None:
        self.sock = sock
        self.seed = seed
        self.shared = shared or Shared()
        self.patience = 0.0
        self.known = 0  # modules at the last look
        self.waiting: list[tuple[int, bytes]] = []  # answers
        self.size = 0  # of those
        self.flushed = 0.0
        self.guarded: list[tuple[types.FunctionType, Any, Any, Any]] = []
        # The cells run in a module that looks like that of a notebook.
        self.main = types.ModuleType("__main__")
        sys.modules["__main__"] = self.main
        shell = Shell(self)
        vars(self.main).update(get_ipython=lambda: shell, display=lambda *args, **kwargs: None)
        if ipython := sys.modules.get("IPython"):
            ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
        warnings.simplefilter("ignore")
        self.reseed()

    def reseed(self) -> None:
        random.seed(self.seed)
        np.random.seed(self.seed)  # noqa: NPY002  (the generator that old-style code draws from)
        torch.default_generator.manual_seed(self.seed)  # the one there is without other devices

    def serve(self) -> None:
        """Do what is asked until the grader hangs up."""
        assert self.sock is not None
        self.stream = wire.Stream(self.sock)
        signal.signal(signal.SIGPROF, self.out_of_patience)
        hush()
        while True:
            try:
                number, frame = self.stream.receive()
            except (EOFError, OSError):
                return
            request = wire.unpack(frame)
            self.patience = request.get("patience", 0.0)
            self.flushed = monotonic()
            if request["do"] == "run":
                self.reply(number, self.run_cell, request["source"], request["label"])
            elif request["do"] == "guard":
                self.reply(number, self.guard, request["name"])
            elif request["do"] == "look":
                self.reply(number, self.look, request["name"])
            elif request["do"] == "call":
                for i, (args, kwargs) in enumerate(self.asked(request), number + 1):
                    self.reply(i, self.call, request["name"], args, kwargs)
            self.flush()

    def asked(self, request: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of the calls of a request: kept ones, or those that follow it."""
        if "kept" in request:
            kept, start = self.shared.kept[request["kept"]], request["start"]
            for i in range(start, start + request["count"]):
                arguments, kept[i] = kept[i], None
                yield arguments
        else:
            # Read them all before the first is answered: if both sides wrote, both would wait.
            frames = [self.stream.receive()[1] for _ in range(request["count"])]
            yield from map(wire.unpack, frames)

    def reply(self, number: int, work: Callable[..., Any], *args: Any) -> None:
        """Answer with what ``work`` returns, as it is at this moment, or with what it raised."""
        NUMBER.pack_into(self.shared.at, 0, number)
        self.known = len(sys.modules)
        setitimer(ITIMER_PROF, self.patience, AGAIN_SECONDS)
        try:
            answer = {"value": work(*args)}
        except BaseException as error:
            answer = {"error": told(error)}
        try:
            frame = wire.pack(answer)
        except wire.WireError as error:
            frame = wire.pack({"refused": f"the answer is {error}"})
        except Exception as error:  # an object that lies about what it is
            frame = wire.pack({"refused": f"the answer cannot be sent ({type(error).__name__})"})
        setitimer(ITIMER_PROF, 0.0)
        self.waiting.append((number, frame))
        self.size += len(frame)
        if self.size > FLUSH_BYTES or monotonic() > self.flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the answers that wait."""
        waiting, self.waiting, self.size = self.waiting, [], 0
        if waiting:
            self.stream.send(waiting)
        self.flushed = monotonic()

    def out_of_patience(self, _: int, frame: types.FrameType | None) -> None:
        """End the process, unless the time went into importing something."""
        try:
            sys.setrecursionlimit(sys.getrecursionlimit() + 1000)
            known, self.known = self.known, len(sys.modules)
            while frame is not None and frame.f_code.co_filename != IMPORTING:
                frame = frame.f_back
            if frame is not None or known != self.known:
                setitimer(ITIMER_PROF, self.patience, AGAIN_SECONDS)
                return
            self.waiting.append((*NUMBER.unpack_from(self.shared.at), wire.pack({"endless": True})))
            self.flush()
        except RecursionError:  # even for the words above: there is a next time
            return
        except BaseException:
            os._exit(70)
        os._exit(0)

    def run_cell(self, source: str, label: str) -> None:
        """Run a code cell as a notebook would; magics and shell commands do nothing."""
        self.run_python(source, f"<cell {label}>")

    def run_python(self, source: str, filename: str) -> None:
        try:
            code = compile(source, filename, "exec", dont_inherit=True)
            pasted = "In [" in source  # with IPython's prompts, which may look like an annotation
        except (SyntaxError, ValueError):
            pasted = True
        if pasted:
            source = to_python(source)
            code = compile(source, filename, "exec", dont_inherit=True)
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        with warnings.catch_warnings():
            exec(code, vars(self.main))

    def look(self, name: str) -> tuple[str, bool, str]:
        """The type of what is called ``name`` ('' if nothing is), whether it can be called, and
        the file name of its code ('' if it has none)."""
        if name not in vars(self.main):
            return "", False, ""
        value = vars(self.main)[name]
        code = getattr(inspect.unwrap(value), "__code__", None)
        home = code.co_filename if isinstance(code, types.CodeType) else ""
        return type(value).__name__, callable(value), home

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = vars(self.main).get(name)
        if function is None:
            raise NameError(f"there is no function called {name}")
        if not callable(function):
            raise TypeError(
                f"{name} is no function, but an object of type {type(function).__name__}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    def guard(self, name: str | None) -> None:
        """Make the library's functions called ``name`` raise, by whatever alias one holds them.

        The guard before is lifted. Random numbers start afresh, so that what was judged before does
        not matter.
        """
        for function, code, defaults, kwdefaults in self.guarded:
            function.__code__ = code
            function.__defaults__, function.__kwdefaults__ = defaults, kwdefaults
        self.guarded.clear()
        for function in self.shared.library.functions(name) if name else ():
            self.guarded.append(
                (function, function.__code__, function.__defaults__, function.__kwdefaults__)
            )
            function.__code__ = refusal(str(name), len(function.__code__.co_freevars))
            function.__defaults__ = function.__kwdefaults__ = None
        if interpreter := sys.modules.get("triton.runtime.interpreter"):
            interpreter.InterpretedFunction.rewritten_fn.clear()
        self.reseed()


def to_python(source: str) -> str:
    """A cell without IPython's own syntax. Blank lines at the top stay, for the line numbers."""
    blank = len(source) - len(source.lstrip("\n"))
    return "\n" * blank + TransformerManager().transform_cell(source)


def hush() -> None:
    """Have `print` do nothing where nobody reads it: to put tensors into words takes long."""
    unread, spoken = (sys.stdout, sys.stderr), builtins.print

    @functools.wraps(spoken)
    def print(*args: Any, file: Any = None, **kwargs: Any) -> None:
        to = sys.stdout if file is None else file
        if kwargs.keys() - {"sep", "end", "flush"} or not any(to is one for one in unread):
            spoken(*args, file=file, **kwargs)

    builtins.print = print


@functools.cache
def refusal(name: str, free: int) -> types.CodeType:
    """Code that raises, with as many free variables as the code that it stands in for."""
    cells = [f"_{i}" for i in range(free)]
    source = (
        f"def outside({', '.join(cells)}):\n"
        f"    def {name}(*args, **kwargs):\n"
        f"        raise RuntimeError('the library\\'s {name} is what you are asked to write')\n"
        f"        ({', '.join([*cells, 'None'])})\n"
        f"    return {name}\n"
    )
    scope: dict[str, Any] = {}
    exec(compile(source, "<the library>", "exec"), scope)
    return scope["outside"](*cells).__code__


def told(error: BaseException) -> tuple[list[str], str, str]:
    """An exception as (names of its class and parents, message, lines of the student's code)."""
    try:
        trace = student_lines(error)
        if isinstance(error, SyntaxError) and str(error.filename).startswith("<cell"):
            trace = f"line {error.lineno}: {(error.text or '').strip()}"
            message = str(error.msg)
        else:
            message = str(error)
        kinds = CandidateError.of(error).kinds
        return kinds[:20], message[:LONGEST_MESSAGE], trace[:LONGEST_MESSAGE]
    except BaseException:  # the student may have written the exception, too
        return ["Exception"], "an exception that cannot be shown", ""


class Shell:
    """Stands in for IPython's shell: magics are ignored, but for those that run their own cell."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def run_cell_magic(self, name: str, line: str, cell: str, **_: Any) -> None:
        if name in RUN_THEIR_CELL:
            self._run(cell, below=1)

    def run_line_magic(self, name: str, line: str, *_: Any, **__: Any) -> None:
        if name == "time":
            self._run(line, below=0)

    def _run(self, source: str, below: int) -> None:
        filename = sys._getframe(2).f_code.co_filename  # the cell that has the magic
        self._server.run_python("\n" * below + source, filename)

    def __getattr__(self, name: str) -> Shell:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Shell:
        return self


if __name__ == "__main__":
    main(int(sys.argv[1]), walled="walled" in sys.argv[2:])
