"""Walls around student code: it sees little of this machine, and can change none of it.

bubblewrap (github.com/containers/bubblewrap) starts the zygote, which forks the children, in
namespaces of its own:

    files      the system's libraries, Python and the library, to read; no course folder, no
               gradebook, no home, no checks; an empty /tmp in memory, bounded
    processes  none but its own. The zygote is the first process of its namespace: signals from
               inside do not reach it, and what a child leaves running is ended with the child
    network    none
    rights     no capabilities; a filter refuses the system calls that pry into other processes,
               mount, make namespaces, or talk to parts of the kernel that no exercise needs

Memory is bounded for each process (`limit_memory` in `autograder.child`), time by the grader. How
many processes a child starts, and what they take together, is watched from outside (`Watcher`): ten
times a second, so that one may go beyond for a moment.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import shutil
import signal
import site
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import fewer
from fewer.models.fetch import cache_home

DISK = 256 << 20  # bytes that fit in /tmp, and in /dev/shm
SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf"),
    *("/etc/ld.so.conf.d", "/etc/alternatives", "/etc/fonts", "/etc/localtime"),
)
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "FEWER_SMALL", "FEWER_HOME")

# System calls by number, on x86_64 and aarch64; None: there is none.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_setup": (425, 425),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
}
MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, arch, clone
CLONE3, CLONE_NEWUSER = 435, 0x10000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # of seccomp; REFUSE with an errno


PROCESSES = 64  # that a child may have at a time, threads not counted
ALL_MEMORY = 4 << 30  # bytes that they may take together
PERIOD = 0.1  # seconds


class Watcher(threading.Thread):
    """Ends the processes of a child that are too many, or take too much memory together.

    Limits of the kernel would be better, but no process that root starts has one on its number, and
    a control group is not to be had everywhere. What is ended is the student's, never the zygote.

    Args:
        bubblewrap: process id of bubblewrap, whose child is the zygote.
    """

    def __init__(self, bubblewrap: int) -> None:
        super().__init__(daemon=True, name="sandbox watcher")
        self.bubblewrap = bubblewrap
        self.over = threading.Event()

    def run(self) -> None:
        """Look every now and then, until `over` is set or the zygote is gone."""
        while not self.over.wait(PERIOD):
            for zygote in children(self.bubblewrap):
                for _ in range(100):  # new ones may come while the others are ended
                    found = descendants(zygote)
                    if len(found) <= PROCESSES and memory_of(found) <= ALL_MEMORY:
                        break
                    for process in found:
                        with contextlib.suppress(ProcessLookupError, PermissionError):
                            os.kill(process, signal.SIGKILL)


def children(process: int) -> list[int]:
    """Process ids of those that a process started and that live; [] if it is gone itself."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{process}/task"):
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{process}/task/{task}/children") as file,
            ):
                found += map(int, file.read().split())
    return found


def descendants(process: int) -> list[int]:
    """Those, those that they started, and so on."""
    found = children(process)
    for one in found:  # the list grows as it is gone through
        found += children(one)
    return found


def memory_of(processes: list[int]) -> int:
    """Bytes of memory that processes take together; what they share is shared out among them.

    That takes milliseconds a process, so it is done only if a quick look finds too much: there
    each has all that it shares.
    """
    quick = sum(map(_resident, processes))
    return sum(map(_proportional, processes)) if quick > ALL_MEMORY else quick


def _resident(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def _proportional(process: int) -> int:
    try:
        with open(f"/proc/{process}/smaps_rollup") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return _resident(process)


class NoSandbox(Exception):
    """This machine cannot isolate student code; the message says what is missing."""


def filter_program(machine: str) -> bytes:
    """The seccomp filter, as the kernel takes it: instructions of (code, jump, jump, number).

    Raises:
        NoSandbox: for a processor whose system calls are not listed here.

    Example:
        >>> len(filter_program("x86_64")) % 8
        0
    """
    if machine not in MACHINES:
        raise NoSandbox(f"there is no filter of system calls for {machine} processors")
    column, arch, clone = MACHINES[machine]
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the calls of x32 are the same ones under other numbers
        steps += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    # clone3 has its flags where no filter sees them: without it, libraries call clone.
    steps += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    steps += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, CLONE_NEWUSER)]
    steps += [(RETURN, 0, 0, REFUSE | errno.EPERM), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def command(argv: list[str], environment: Mapping[str, str], seccomp: int) -> list[str]:
    """How to start ``argv`` behind the walls.

    Args:
        environment: what it finds in its environment, besides a few of our own variables.
        seccomp: a file descriptor to read `filter_program` from, inherited.
    """
    own = Path(__file__).parent
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, *site.getsitepackages()}
    readable = [
        *SYSTEM,
        *sorted({os.path.realpath(path) for path in python} | python),
        str(Path(fewer.__file__).parent),
        str(own),
        str(cache_home()),
    ]
    bounded = ["--size", str(DISK), "--tmpfs"]
    wanted = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    wanted |= {**environment, "HOME": "/tmp", "USER": "student", "LOGNAME": "student"}
    return [
        *("bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session"),
        *("--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"),
        *(part for name, value in wanted.items() for part in ("--setenv", name, value)),
        *(part for path in readable for part in ("--ro-bind-try", path, path)),
        *("--tmpfs", str(own / "checks"), "--remount-ro", str(own / "checks")),
        *("--proc", "/proc", "--dev", "/dev", *bounded, "/dev/shm", *bounded, "/tmp"),
        *("--remount-ro", "/", "--chdir", "/tmp", "--seccomp", str(seccomp), "--", *argv),
    ]


@functools.cache
def missing() -> str:
    """What this machine lacks to isolate student code, and how to get it; '' if nothing."""
    if sys.platform != "linux":
        return "the sandbox needs Linux"
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed: apt install bubblewrap (or dnf, pacman, zypper)"
    try:
        with seccomp_file() as file:
            probe = command([sys.executable, "-c", "import fewer"], {}, file.fileno())
            done = subprocess.run(
                probe, pass_fds=[file.fileno()], capture_output=True, text=True, timeout=60
            )
    except NoSandbox as error:
        return str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not start ({error})"
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return (
        f"bubblewrap cannot make its walls here ({said[0]}). Ordinary users need user namespaces: "
        "sysctl kernel.unprivileged_userns_clone=1 (Debian), or an AppArmor profile for bwrap "
        "(Ubuntu 24.04). Containers need --security-opt seccomp=unconfined, or more rights"
    )


def seccomp_file() -> IO[bytes]:
    """A file with `filter_program`, at its beginning. Its descriptor is to be inherited."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (whoever asks for it closes it)
    file.write(filter_program(platform.machine()))
    file.seek(0)
    return file
