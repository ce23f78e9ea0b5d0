"""Whole notebooks in a Jupyter kernel behind the walls, for pages with the student's own plots.

A grade needs no kernel (`autograder.submission`). To show a student what the notebook does,
`execute` runs all of it: solutions, demonstrations, and checks, which show nothing. Three processes
take part:

    the grader    `execute`: what it reads is bounded, and no message of a kernel gets to it
    the client    ``python -m autograder.kernel``: nbclient, in memory of its own that is bounded
    the kernel    `autograder.kernel_child`, behind the walls of `autograder.sandbox`

Only the client talks to the kernel, over sockets that nothing else reaches.

What is kept of the outputs is plain text and pictures (PNG and JPEG), each looked at and bounded.
HTML, JavaScript, SVG, LaTeX, Markdown and widgets are dropped: a page may show the rest as it is,
if it escapes text.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import copy
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import nbformat.v4
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from PIL import Image
from traitlets import Bool, Integer

from autograder import sandbox

CELL_SECONDS = 120.0
NOTEBOOK_SECONDS = 900.0
START_SECONDS = 120.0
GRACE_SECONDS = 5.0  # from the interruption of a cell to the end of its kernel
WATCH_SECONDS = 0.1
CLIENT_MEMORY = 3 << 30  # bytes of address space

TEXT = 20_000  # characters of one output that are kept
PICTURE = 2 << 20  # bytes of one picture
PIXELS = 40_000_000
CELL = 4 << 20  # bytes of all the outputs of a cell
NOTEBOOK = 20 << 20  # and of a notebook
OUTPUTS = 100  # of a cell

NAME = "fewer-walled"  # of the provisioner
PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG"}
COLORS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def execute(
    notebook: NotebookNode,
    walled: bool = True,
    cell_seconds: float = CELL_SECONDS,
    notebook_seconds: float = NOTEBOOK_SECONDS,
    progress: Callable[[str], None] | None = None,
) -> NotebookNode:
    """Run a notebook's cells in a fresh kernel, whatever its metadata says about kernels.

    Args:
        notebook: of format 4. Only its code is looked at, and it stays as it is.
        walled: whether the kernel runs behind the walls of `autograder.sandbox`.
        cell_seconds, notebook_seconds: how long one cell, and all of them, may take.
        progress: is told about each cell that was run.

    Returns:
        A copy with the outputs of this run. A cell that raised or took too long says so, and the
        next one is run; if the kernel ended, the rest says that it was not run.

    Raises:
        sandbox.NoSandbox: it should be walled, and this machine cannot do that.
        GraderError: no kernel starts here, whatever the notebook.
    """
    from autograder.remote import ENVIRONMENT, MEMORY, GraderError  # the client needs no torch

    if walled and (reason := sandbox.missing()):
        raise sandbox.NoSandbox(reason)
    done = copy.deepcopy(notebook)
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    request = {
        # A notebook can hold halves of characters, which no message can.
        "sources": [cell.source.encode(errors="replace").decode() for cell in cells],
        "walled": walled,
        "memory": MEMORY,
        "cell_seconds": cell_seconds,
        "notebook_seconds": notebook_seconds,
        # Plots belong into the page here.
        "environment": {k: v for k, v in ENVIRONMENT.items() if k != "MPLBACKEND"},
    }
    with (
        tempfile.TemporaryFile() as log,
        tempfile.TemporaryFile() as asked,
        tempfile.TemporaryDirectory(prefix="fewer-", dir=_short_folder()) as folder,
    ):
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        client = subprocess.Popen(
            [sys.executable, "-P", "-m", "autograder.kernel"],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {"TMPDIR": folder},
            start_new_session=True,  # Ctrl-C is for the grader
        )
        # The client keeps the time; this is for one that does not.
        patience = threading.Timer(START_SECONDS + notebook_seconds + 60, client.kill)
        patience.start()
        try:
            if _line(client) != "ready":
                log.seek(0)
                said = log.read().decode(errors="replace")[-2000:]
                raise GraderError(f"no kernel starts here: {said}".strip())
            _fill(cells, client, progress)
        finally:
            patience.cancel()
            client.kill()
            client.wait()
            assert client.stdout
            client.stdout.close()
    return done


def _fill(
    cells: list[NotebookNode],
    client: subprocess.Popen[bytes],
    progress: Callable[[str], None] | None,
) -> None:
    """Put what the client tells about each cell into it, and a line into those not run."""
    why, room = "", NOTEBOOK
    for number, cell in enumerate(cells, 1):
        if not why:
            told = _line(client) or {"outputs": [], "ended": "what it sent cannot be read"}
            outputs, why = told["outputs"], told["ended"]
            room -= len(json.dumps(outputs))
            if room < 0:
                outputs = [note("left out: the outputs of this notebook are too large")]
            cell.outputs = [NotebookNode(nbformat.from_dict(one)) for one in outputs]
            cell.execution_count = number
            if progress:
                progress(f"cell {number} of {len(cells)}")
        elif cell.source.strip():
            cell.outputs = [note(f"not run: {why}")]


def _line(client: subprocess.Popen[bytes]) -> Any:
    """The next thing that the client says; None if it is gone."""
    assert client.stdout
    try:
        return json.loads(client.stdout.readline(8 * CELL))
    except ValueError:
        return None


def note(text: str) -> NotebookNode:
    """A line of ours among the outputs of a cell."""
    return nbformat.v4.new_output("stream", name="stderr", text=f"[{text}]\n")


# The client.


def main() -> None:
    """Run the cells asked for on the standard input; a line of JSON for each is the answer."""
    asked = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (CLIENT_MEMORY, CLIENT_MEMORY))
    # Whoever reads the answer can trust that no one else writes to it.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what: Any) -> None:
        print(json.dumps(what), file=answer, flush=True)

    asyncio.run(_run(asked, say))


async def _run(asked: dict[str, Any], say: Callable[[Any], None]) -> None:
    class OneSpec(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            config = {"walled": asked["walled"], "memory": asked["memory"]}
            return KernelSpec(
                language="python",
                env=asked["environment"],
                metadata={"kernel_provisioner": {"provisioner_name": NAME, "config": config}},
            )

    point = EntryPoint(NAME, "autograder.kernel:WalledProvisioner", "")
    KernelProvisionerFactory.instance().provisioners[NAME] = point  # were we not installed anew
    manager = AsyncKernelManager(kernel_spec_manager=OneSpec())
    cells = [nbformat.v4.new_code_cell(source) for source in asked["sources"]]
    client = Client(
        nbformat.v4.new_notebook(cells=cells),
        km=manager,
        timeout=None,
        startup_timeout=START_SECONDS,
        allow_errors=True,
        store_widget_state=False,
        record_timing=False,
    )
    try:
        await client.async_start_new_kernel()
        await client.async_start_new_kernel_client()
        say("ready")
        until = time.monotonic() + asked["notebook_seconds"]
        for index, cell in enumerate(cells):
            left = max(0.0, until - time.monotonic())
            ended = await client.run(cell, index, min(asked["cell_seconds"], left))
            if not ended and time.monotonic() >= until:
                ended = "the time for the whole notebook is up"
            say({"outputs": tidy(cell.outputs), "ended": ended})
            if ended:
                break
    finally:
        await manager.shutdown_kernel(now=True)


class Client(NotebookClient):
    """Runs cells of a kernel that is not trusted."""

    async def run(self, cell: NotebookNode, index: int, seconds: float) -> str:
        """Run a cell. Returns why the kernel ended; '' if it did not."""
        running = asyncio.ensure_future(self.async_execute_cell(cell, index))
        manager: Any = self.km  # an asynchronous one, of the provisioner below
        provisioner = manager.provisioner
        until, remark, why = time.monotonic() + seconds, "", ""
        while not running.done():
            await asyncio.wait({running}, timeout=WATCH_SECONDS)
            if running.done() or why:
                continue
            if sandbox.threads(provisioner.leaf) > sandbox.THREADS:
                why = "your code started too many threads"
                await provisioner.kill()
            elif time.monotonic() >= until and remark:
                why = "your code could not be interrupted"
                await provisioner.kill()
            elif time.monotonic() >= until:
                remark = f"took longer than {seconds:g} s, and was interrupted"
                until += GRACE_SECONDS
                await manager.interrupt_kernel()
        try:
            running.result()
        except DeadKernelError:
            why = why or provisioner.how_it_ended()
        except Exception as error:  # an answer that is none
            why = f"the kernel sent what is no message ({type(error).__name__})"
        cell.outputs = [*cell.outputs, *(note(said) for said in (remark, why) if said)]
        return why

    def process_message(
        self, msg: dict[str, Any], cell: NotebookNode, cell_index: int
    ) -> NotebookNode | None:
        """Take in a message about a cell, without what is not to be kept."""
        if msg["msg_type"].startswith("comm"):  # of widgets
            return None
        if "data" in msg["content"]:
            msg["content"] |= {"data": harmless(msg["content"]["data"]), "metadata": {}}
        return super().process_message(msg, cell, cell_index)

    def output(
        self, outs: list[NotebookNode], msg: dict[str, Any], display_id: str | None, cell_index: int
    ) -> NotebookNode | None:
        """Add an output, if there is room; one stream's texts become one."""
        held = [] if self.clear_before_next_output else outs
        last = held[-1] if held else {}
        name = msg["content"].get("name")
        if msg["msg_type"] == "stream" and name == last.get("name"):
            if len(last["text"]) <= TEXT:
                last["text"] = seen(last["text"] + msg["content"]["text"][: 4 * TEXT])
            return None
        if len(held) > OUTPUTS or sum(map(_size, held)) > CELL:
            return None
        return super().output(outs, msg, display_id, cell_index)


def seen(text: str) -> str:
    """What is left of a text when carriage returns have taken effect, as of progress bars.

    Example:
        >>> seen("10 %\\r20 %\\ndone\\r\\n")
        '20 %\\ndone\\n'
    """
    lines = text.replace("\r\n", "\n").split("\n")
    # One at the end of the text still waits for what will come.
    return "\n".join(
        line.rstrip("\r").rsplit("\r", 1)[-1] + "\r" * line.endswith("\r") for line in lines
    )


def _size(output: NotebookNode) -> int:
    return len(output.get("text", "")) + sum(map(len, output.get("data", {}).values()))


def harmless(data: dict[str, Any]) -> dict[str, str]:
    """What is kept of the forms in which a thing is shown: text and pictures.

    Example:
        >>> harmless({"text/html": "<script>steal()</script>", "text/plain": "<b>3</b>"})
        {'text/plain': '<b>3</b>'}
    """
    kept = {}
    for mime in FORMATS:
        if mime in data and (picture := _picture(data[mime], mime)):
            kept[mime] = picture
    if isinstance(text := data.get("text/plain"), str):
        kept["text/plain"] = shortened(text)
    return kept


def _picture(encoded: Any, mime: str) -> str:
    """A picture as Base64, if it is one; '' if not, or if it is too large."""
    try:
        if len(encoded) > PICTURE * 4 / 3:
            return ""
        found = base64.b64decode("".join(encoded.split()), validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(io.BytesIO(found), formats=[FORMATS[mime]]) as picture:
                width, height = picture.size
    except (binascii.Error, AttributeError, TypeError, ValueError, OSError, SyntaxError, Warning):
        return ""
    except Image.DecompressionBombError:
        return ""
    return base64.b64encode(found).decode() if width * height <= PIXELS else ""


def shortened(text: str) -> str:
    """Text without colors, cut where it gets too long."""
    text = COLORS.sub("", text[: 2 * TEXT])
    return text if len(text) <= TEXT else text[:TEXT] + "\n[cut here]\n"


def tidy(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs of a cell made anew, of nothing but what we know and within the bounds."""
    new = nbformat.v4.new_output
    kept: list[NotebookNode] = []
    room = CELL
    for number, output in enumerate(outputs):
        match output:
            case {"output_type": "stream", "name": "stdout" | "stderr" as name, "text": str(text)}:
                one = new("stream", name=name, text=shortened(seen(text[: 4 * TEXT])))
            case {"output_type": "error", "ename": str(ename), "evalue": str(evalue)}:
                trace = "\n".join(map(str, output.get("traceback", [])))
                names = {"ename": shortened(ename), "evalue": shortened(evalue)}
                one = new("error", **names, traceback=shortened(trace).split("\n"))
            case {"output_type": "display_data" | "execute_result", "data": dict(data)}:
                one = new("display_data", data=harmless(data))
                if not one["data"]:
                    continue
            case _:
                continue
        room -= len(json.dumps(one))
        if room < 0 or number >= OUTPUTS:
            return [*kept, note("the rest of the output is left out")]
        kept.append(one)
    return kept


class WalledProvisioner(LocalProvisioner):
    """Starts Python kernels behind the walls.

    It serves any program of Jupyter's, by the name ``fewer-walled`` in the kernelspec, or by
    JUPYTER_DEFAULT_PROVISIONER_NAME. The kernel is always of the Python that runs the program.

    Attributes:
        leaf: the process id of the kernel itself, which bubblewrap is the parent of.
    """

    walled = Bool(True, help="whether there are walls").tag(config=True)
    memory = Integer(2 << 30, help="bytes it may map, besides torch").tag(config=True)
    leaf = 0
    _handle = -1  # of that process: its id may be given to another one
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _made: dict[str, socket.socket]

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Make the sockets that the kernel will listen on, in a folder that it does not see."""
        if self._folder is None:  # not if the kernel is started again
            self._folder = tempfile.TemporaryDirectory(prefix="fewer-", dir=_short_folder())
        manager = self.parent
        manager.transport, manager.ip = "ipc", os.path.join(self._folder.name, "socket")
        manager.connection_file = os.path.join(self._folder.name, "connection.json")
        manager.cache_ports = False
        self._made = {}
        for number, port in enumerate(PORTS, 1):
            setattr(manager, port, number)
            path = f"{manager.ip}-{number}"
            made = socket.socket(socket.AF_UNIX)
            made.bind(path)
            made.listen(64)
            self._made[f"ipc://{path}"] = made
        return await super().pre_launch(**kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Start the kernel; what the kernelspec says of its command does not matter."""
        connection = self.connection_info
        told = {
            "memory": self.memory,
            "connection": {k: _text(v) for k, v in connection.items()},
            "sockets": {address: made.fileno() for address, made in self._made.items()},
        }
        handed = list(told["sockets"].values())
        argv = [sys.executable, "-P", "-m", "autograder.kernel_child"]
        heard, spoken = os.pipe()
        with tempfile.TemporaryFile() as stdin, sandbox.seccomp_file() as rules:
            stdin.write(json.dumps(told).encode())
            stdin.seek(0)
            if self.walled:
                if not shutil.which("bwrap"):
                    raise sandbox.NoSandbox(sandbox.missing())
                # The threads of ipykernel would take half a gigabyte of addresses otherwise.
                wanted = {"MALLOC_ARENA_MAX": "2", **self.kernel_spec.env}
                argv = sandbox.command([*argv, "walled"], wanted, rules.fileno(), info=spoken)
                handed += [rules.fileno(), spoken]
            kwargs |= {"stdin": stdin, "stdout": subprocess.DEVNULL, "pass_fds": handed}
            await super().launch_kernel(argv, **kwargs)
        os.close(spoken)
        for made in self._made.values():
            made.close()
        assert self.process is not None
        self.leaf = _child_pid(heard) if self.walled else self.process.pid
        os.close(heard)
        if not self.leaf:
            raise sandbox.NoSandbox(sandbox.missing() or "bubblewrap started no kernel")
        self._handle = os.pidfd_open(self.leaf)
        return connection

    async def send_signal(self, signum: int) -> None:
        """Send a signal to the kernel itself: bubblewrap passes none on."""
        with contextlib.suppress(OSError):  # it may be gone
            signal.pidfd_send_signal(self._handle, signum)

    async def kill(self, restart: bool = False) -> None:
        """End the kernel, and all in its namespace."""
        await self.send_signal(signal.SIGKILL)
        if self.process is not None:
            self.process.kill()

    async def terminate(self, restart: bool = False) -> None:
        """The same: the first process of a namespace heeds no milder signal."""
        await self.kill(restart)

    async def cleanup(self, restart: bool = False) -> None:
        """Remove what was made for the kernel."""
        await super().cleanup(restart)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if self._folder is not None and not restart:
            self._folder.cleanup()
            self._folder = None

    def how_it_ended(self) -> str:
        """In words, for one that ended by itself."""
        code = self.process.poll() if self.process is not None else None
        if code is None:
            return "the kernel is gone"
        number = code - 128 if self.walled and code > 128 else -code
        if number > 0:
            guess = "(a crash in compiled code, or out of memory?)"
            return f"the kernel was killed by signal {number} {guess}"
        return f"your code ended the process (exit code {code})"


def _short_folder() -> str:
    """Where to make temporary files: the names of sockets have at most 107 bytes."""
    return folder if len(folder := tempfile.gettempdir()) < 60 else "/tmp"


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _child_pid(heard: int) -> int:
    """What bubblewrap says about the process that it started; 0 if it started none."""
    said = b""
    while b"}" not in said and select.select([heard], [], [], 10)[0]:
        if not (more := os.read(heard, 4096)):
            break
        said += more
    try:
        return int(json.loads(said)["child-pid"])
    except (ValueError, KeyError):
        return 0


if __name__ == "__main__":
    main()
