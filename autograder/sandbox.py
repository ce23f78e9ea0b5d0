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

A child may have threads but start no process: a second filter, set after the fork, sees to that.
(No limit of the kernel holds for what root starts, and a fork bomb starves whoever watches it.) So
the bound on the memory of one process (`limit_memory` in `autograder.child`) is one on all, as what
the kernel would keep for it outside of that bound is refused: shared memory with no file, message
queues. Threads are counted by the zygote, time by the grader. Where the kernel has Landlock, a
child puts itself behind that as well (`second_wall`), should a mount ever show too much.

No control groups: they would bound the same again, are writable for root in some setups and for
others in few, and leave folders behind when a grader is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import shutil
import site
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import platformdirs

import fewer
from autograder import landlock

DISK = 256 << 20  # bytes that fit in /tmp, and in /dev/shm
THREADS = 1000  # of a process, which the machine has only so many of
SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf"),
    *("/etc/ld.so.conf.d", "/etc/alternatives", "/etc/fonts", "/etc/localtime"),
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
OWN = Path(__file__).parent
PROBE = """
import importlib.util as there, autograder.sandbox
for name in ("torch", "numpy", "IPython"):
    if not there.find_spec(name):
        raise ModuleNotFoundError(f"there is no {name}")
"""
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "FEWER_SMALL")

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
    "ioprio_set": (251, 30),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
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
    "semget": (64, 190),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
}
# Of these the first argument must be one of some values: no process but oneself (0) may get other
# limits or another place in the queue, the zygote least of all. Of sockets there are those of UNIX,
# IP and netlink, which stay in their namespace.
ONLY: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "prlimit64": (302, 261, (0,)),
    "sched_setaffinity": (203, 122, (0,)),
    "sched_setattr": (314, 274, (0,)),
    "sched_setparam": (142, 118, (0,)),
    "sched_setscheduler": (144, 119, (0,)),
    "socket": (41, 198, (1, 2, 10, 16)),
    "socketpair": (53, 199, (1,)),
}
MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, arch, clone
CLONE3, CLONE_NEWUSER, CLONE_THREAD = 435, 0x10000000, 0x10000
FIRST = 16  # where a filter finds the lower half of the first argument
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # of seccomp; REFUSE with an errno


class NoSandbox(Exception):
    """This machine cannot isolate student code; the message says what is missing."""


def filter_program(machine: str) -> bytes:
    """The seccomp filter for all behind the walls, as the kernel takes it.

    Those are instructions of (code, jump, jump, number).

    Raises:
        NoSandbox: for a processor whose system calls are not listed here.

    Example:
        >>> len(filter_program("x86_64")) % 8
        0
    """
    if machine not in MACHINES:
        raise NoSandbox(f"there is no filter of system calls for {machine} processors")
    column, _, clone = MACHINES[machine]
    steps = []
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    for name, (*by_machine, values) in ONLY.items():
        # ZeroMQ names its own threads, and ends the process if refused: it hears that all is well.
        refusal = REFUSE | (0 if name == "sched_setscheduler" else errno.EPERM)
        one_of = [(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        steps += [(EQUAL, 0, len(values) + 3, by_machine[column]), (LOAD, 0, 0, FIRST), *one_of]
        steps += [(RETURN, 0, 0, refusal), (RETURN, 0, 0, ALLOW)]
    # clone3 has its flags where no filter sees them: without it, libraries call clone.
    steps += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    steps += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST), (ANY_BIT, 0, 1, CLONE_NEWUSER)]
    return _program(machine, [*steps, (RETURN, 0, 0, REFUSE | errno.EPERM)])


def no_processes(machine: str) -> bytes:
    """The filter for a child: threads yes, processes no."""
    clone = MACHINES[machine][2]
    steps = []
    if machine == "x86_64":
        for number in (57, 58):  # fork and vfork, which aarch64 does not have
            steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    steps += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST), (ANY_BIT, 1, 0, CLONE_THREAD)]
    return _program(machine, [*steps, (RETURN, 0, 0, REFUSE | errno.EPERM)])


def _program(machine: str, steps: list[tuple[int, int, int, int]]) -> bytes:
    """A filter that does the steps, with the number of a call at hand, for calls of this machine;
    what they do not refuse is allowed."""
    arch = MACHINES[machine][1]
    before = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the calls of x32 are the same ones under other numbers
        before += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    return b"".join(struct.pack("HBBI", *one) for one in [*before, *steps, (RETURN, 0, 0, ALLOW)])


def threads(pid: int) -> int:
    """How many threads a process has; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rsplit(b")", 1)[1].split()[17])
    except (OSError, IndexError):
        return 0


def forbid_processes() -> None:
    """From here on, this process starts no other. There is no way back."""
    steps = no_processes(platform.machine())
    buffer = ctypes.create_string_buffer(steps, len(steps))

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    program = Program(len(steps) // 8, ctypes.addressof(buffer))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    # PR_SET_NO_NEW_PRIVS; PR_SET_SECCOMP with SECCOMP_MODE_FILTER
    if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the filter of system calls cannot be set")


def empty(folder: str) -> None:
    """Remove all that is in a folder, but what is mounted there. What lies there may be locked,
    nested thousands deep, and too much for the arguments of a command."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            os.rmdir(os.path.join(folder, name))  # as a rule there is one empty folder
        return
    quietly = functools.partial(subprocess.run, stderr=subprocess.DEVNULL, check=False)
    quietly(["chmod", "-R", "u+rwx", "--", folder])
    quietly(["find", folder, "-xdev", "-mindepth", "1", "-delete"])


def cache_home() -> Path:
    """That of `fewer.models.fetch`, without waiting for torch."""
    return Path(os.environ.get("FEWER_HOME") or platformdirs.user_cache_dir("fewer")).expanduser()


def readable() -> list[str]:
    """What is shown behind the walls: folders and files of this machine, some of which may not
    exist."""
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, *site.getsitepackages()}
    # Packages of the user (pip install --user), or of modules that were loaded.
    python |= {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    return [
        *SYSTEM,
        *sorted({os.path.realpath(path) for path in python} | python),
        str(Path(fewer.__file__).parent),
        str(OWN),
        str(cache_home()),
    ]


def checks() -> list[str]:
    """The folder of the checks, by each of its names. It is not shown."""
    return sorted({str(OWN / "checks"), str((OWN / "checks").resolve())})


@functools.cache
def second_wall() -> int:
    """Landlock's rules that refuse again what the mounts do not show, for `landlock.enter`.

    They are made once: a descriptor that all children have of their zygote.
    """
    hidden = [Path(path) for path in checks()]
    return landlock.ruleset(
        read=[*readable(), "/proc", "/dev"], write=["/tmp", "/dev/shm", *DEVICES], hidden=hidden
    )


def command(
    argv: list[str], environment: Mapping[str, str], seccomp: int, info: int | None = None
) -> list[str]:
    """How to start ``argv`` behind the walls.

    Args:
        environment: what it finds in its environment, besides a few of our own variables.
        seccomp: a file descriptor to read `filter_program` from, inherited.
        info: one to write to, as JSON, which process was started.
    """
    bounded = ["--size", str(DISK), "--tmpfs"]
    wanted = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    wanted |= {**environment, "HOME": "/tmp", "USER": "student", "LOGNAME": "student"}
    # What a new HOME would change:
    wanted["FEWER_HOME"] = str(cache_home())
    if site.ENABLE_USER_SITE:
        wanted["PYTHONUSERBASE"] = site.getuserbase()
    return [
        *("bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session"),
        *("--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"),
        *(part for name, value in wanted.items() for part in ("--setenv", name, value)),
        # What may be written comes first: Python, or this folder, may lie somewhere below /tmp.
        *("--proc", "/proc", "--dev", "/dev", *bounded, "/dev/shm", *bounded, "/tmp"),
        # Settings of the kernel below /proc/sys belong to root, and so may the one who grades.
        *("--remount-ro", "/proc", "--remount-ro", "/dev"),
        *(part for path in readable() for part in ("--ro-bind-try", path, path)),
        *(part for path in checks() for part in ("--tmpfs", path, "--remount-ro", path)),
        *(() if info is None else ("--info-fd", str(info))),
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
            probe = command([sys.executable, "-P", "-c", PROBE], {}, file.fileno())
            done = subprocess.run(
                probe, pass_fds=[file.fileno()], capture_output=True, text=True, timeout=60
            )
    except NoSandbox as error:
        return str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not start ({error})"
    if done.returncode == 0:
        return ""
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if not said.startswith("bwrap:") or "execvp" in said:
        return (
            f"Python does not run behind the walls ({said}). There it finds {sys.prefix}, "
            f"{sys.base_prefix} and the folders site-packages of its path, if the files in them "
            "are yours, or for all to read. A virtual environment that you made has all in place"
        )
    return (
        f"bubblewrap cannot make its walls here ({said}). It may want user namespaces: "
        "sysctl kernel.unprivileged_userns_clone=1 (Debian), or an AppArmor profile for bwrap "
        "(Ubuntu 24.04). Containers need --security-opt seccomp=unconfined, or more rights"
    )


def seccomp_file() -> IO[bytes]:
    """A file with `filter_program`, at its beginning. Its descriptor is to be inherited."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (whoever asks for it closes it)
    file.write(filter_program(platform.machine()))
    file.seek(0)
    return file
