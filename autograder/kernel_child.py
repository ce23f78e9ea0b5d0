"""The inside of a notebook's kernel: what `autograder.kernel` starts, mostly behind the walls.

``python -m autograder.kernel_child [walled]`` finds on its standard input, as JSON, how to reach it
and its bounds. It leaves of the grader what a notebook may see (nothing but a `check` that does
nothing), puts on the bounds of a child that is graded, and becomes ipykernel.

ipykernel makes sockets in a folder. That folder would have to be one of the machine's, to be
written, without a bound. So they come made, and ipykernel is handed their descriptors.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
from typing import Any

import zmq

from autograder.child import LIMITS, die_with_parent, hide_the_grader, limit_memory
from autograder.landlock import enter
from autograder.sandbox import forbid_processes, second_wall


def main(walled: bool) -> None:
    """Become a kernel."""
    told = json.load(sys.stdin)
    leave_open(set(told["sockets"].values()))
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until a cell runs
    use_made_sockets(told["sockets"])
    connection = write_connection_file(told["connection"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if walled:
        for what, most in LIMITS.items():
            resource.setrlimit(what, (most, most))
        enter(second_wall())
        os.close(second_wall())
        forbid_processes()
    limit_memory(told["memory"])
    hide_the_grader()
    sys.argv = [sys.executable, "-f", connection, "--HistoryManager.hist_file=:memory:"]
    from ipykernel import kernelapp

    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # a log of the grader's until here
        os.dup2(null, standard)
    kernelapp.launch_new_instance()


def leave_open(wanted: set[int]) -> None:
    """Close all but the standard descriptors and some others: bubblewrap leaves its own ones."""
    for name in os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"):
        if int(name) > 2 and int(name) not in wanted:
            with contextlib.suppress(OSError):
                os.close(int(name))


def use_made_sockets(made: dict[str, int]) -> None:
    """Let ZeroMQ listen on descriptors, by address, in place of sockets that it would make."""
    bind = zmq.Socket.bind

    def bind_made(self: zmq.Socket[Any], address: str) -> Any:
        if address in made:
            self.setsockopt(zmq.USE_FD, made[address])
        return bind(self, address)

    zmq.Socket.bind = bind_made  # type: ignore[assignment,method-assign]


def write_connection_file(connection: dict[str, Any]) -> str:
    """A file as ipykernel wants it, in the private /tmp; its path."""
    handle, path = tempfile.mkstemp(prefix="kernel-", suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump(connection, file)
    return path


if __name__ == "__main__":
    main(walled="walled" in sys.argv[1:])
