"""Landlock: a process gives up rights of its own, for good.

See landlock(7), and docs.kernel.org/userspace-api/landlock.html.

No mount, namespace or capability takes part, so that this wall stands where another has a hole. The
kernel says which version of Landlock it has; each version added kinds of rights:

    1  files and folders: read, write, make, remove      5  commands to devices
    2  moving them to another folder                     6  signals and abstract sockets
    3  truncating them                                      to processes outside
    4  TCP
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, on all processors
PATH_BENEATH, ASK_VERSION, NO_NEW_PRIVS = 1, 1, 38
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, DEVICE = (1 << n for n in (0, 1, 2, 3, 14, 15))
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | DEVICE
MAKE_DEVICES = 1 << 6 | 1 << 11
KNOWN = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # version: how many rights to files it knows
TCP, OUTSIDE = 0b11, 0b11  # bind and connect; abstract sockets and signals


def version() -> int:
    """The kernel's version of Landlock; 0 if it has none.

    Example:
        >>> version() >= 0
        True
    """
    if sys.platform != "linux":
        return 0
    return max(0, _libc().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ASK_VERSION))


def ruleset(read: Iterable[str], write: Iterable[str], hidden: Iterable[Path] = ()) -> int:
    """Write down what may still be done: to files what is listed, and nothing with TCP.

    Args:
        read: files and folders, with all below, to read and to execute.
        write: those where everything else is allowed as well, but to make devices.
        hidden: folders below those of ``read`` whose files are not to be read. Paths that do not
            exist are skipped.

    Returns:
        A file descriptor for `enter`; -1 if the kernel has no Landlock.

    Raises:
        OSError: the kernel has it, but refuses.
    """
    if not (known := version()):
        return -1
    everything = (1 << KNOWN.get(known, 16)) - 1
    tcp, outside = TCP if known >= 4 else 0, OUTSIDE if known >= 6 else 0
    size = 8 if known < 4 else 16 if known < 6 else 24  # older kernels take no larger one
    fields = struct.pack("QQQ", everything, tcp, outside)[:size]
    rules = _call(CREATE_RULESET, fields, ctypes.c_size_t(size), 0)
    hidden = list(hidden)
    for path in read:
        for part, rights in _around(Path(path), hidden):
            _allow(rules, part, rights & everything)
    for path in write:
        _allow(rules, Path(path), everything & ~MAKE_DEVICES)
    return rules


def enter(rules: int) -> None:
    """Give up all rights that a ruleset does not have; none if it is -1. There is no way back.

    It holds for the calling thread and for what that starts from now on.

    Raises:
        OSError: the kernel refuses.
    """
    if rules >= 0:
        if _libc().prctl(NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "new rights cannot be given up")
        _call(RESTRICT_SELF, rules, 0)


def _around(path: Path, hidden: list[Path]) -> Iterator[tuple[Path, int]]:
    """The parts of a folder that are not hidden, and the rights to each. Rights go down to all that
    is below, so a folder that holds a hidden one can only be listed: Python imports nothing from
    folders that it cannot list."""
    if path in hidden:
        return
    if not any(path in one.parents for one in hidden):
        yield path, EXECUTE | READ_FILE | READ_DIR
    elif path.is_dir():
        yield path, READ_DIR
        for entry in path.iterdir():
            yield from _around(entry, hidden)


def _allow(rules: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH)
    except OSError:
        return
    try:
        rights &= -1 if os.path.isdir(path) else OF_FILES
        _call(ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", rights, fd), 0)
    finally:
        os.close(fd)


def _call(number: int, *arguments: object) -> int:
    result = _libc().syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "Landlock: " + os.strerror(ctypes.get_errno()))
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
