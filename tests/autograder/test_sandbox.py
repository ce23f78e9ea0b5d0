"""Code that means harm, behind the walls: it gets nothing, changes nothing, and its neighbour is
judged as ever."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autograder import sandbox
from autograder.compare import CandidateDied
from autograder.exercise import find
from autograder.judge import judge
from autograder.remote import Child, Zygote
from fewer.models.fetch import cache_home

pytestmark = pytest.mark.xdist_group("sandbox")

TRY = '''
import ctypes, os, signal, socket, subprocess, sys, threading, time

def attempt(what):
    """What an expression gives, or the error it meets, in words."""
    try:
        return str(eval(what))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    """A function of the C library: 'done', or its errno in words."""
    return "done" if getattr(libc, name)(*arguments) >= 0 else os.strerror(ctypes.get_errno())
'''
OTHERS = "[p for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()]"


@pytest.fixture(scope="module")
def walled() -> Iterator[Zygote]:
    if reason := sandbox.missing():
        pytest.skip(reason)
    with Zygote(walled=True) as zygote:
        yield zygote


@pytest.fixture
def child(walled: Zygote) -> Iterator[Child]:
    with walled.child() as child:
        child.run_cell(TRY, "try")
        yield child


def attempt(child: Child, what: str) -> str:
    return child.candidate("attempt")(what)


def test_where_bubblewrap_works_our_walls_stand() -> None:
    """Otherwise a mistake in how it is called would only skip the other tests."""
    rest = ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "true"]
    try:
        done = subprocess.run(["bwrap", "--unshare-all", *rest], capture_output=True, check=False)
    except FileNotFoundError:
        assert "bubblewrap is not installed" in sandbox.missing()
    else:
        assert bool(sandbox.missing()) == bool(done.returncode), sandbox.missing()


@pytest.mark.usefixtures("walled")
def test_a_python_that_is_not_seen_is_told_from_walls_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = sandbox.readable()
    for left_out in (sys.base_prefix, str(Path(sandbox.__file__).parent)):
        paths = [path for path in shown if not path.startswith(left_out)]
        monkeypatch.setattr(sandbox, "readable", lambda paths=paths: paths)
        said = sandbox.missing.__wrapped__()
        assert "Python does not run behind the walls" in said, said
    monkeypatch.setattr(sandbox, "DISK", 0)  # which bubblewrap refuses
    assert "user namespaces" in sandbox.missing.__wrapped__()


def test_honest_work_gets_the_points_that_it_gets_without_walls(walled: Zygote) -> None:
    name = "quantize_symmetric"
    with walled.child() as child:
        child.run_cell(f"from fewer.quantization import {name}", name)
        child.run_cell(f"def {name}(x, bits, dim=None):\n    return x, x", "wrong")
        wrong = judge(find(name), child.candidate(name))
    assert not wrong.passed
    with walled.child() as child:
        child.run_cell(f"from fewer.quantization import {name} as given", name)
        child.run_cell(f"def {name}(*args, **kwargs):\n    return given(*args, **kwargs)", name)
        right = judge(find(name), child.candidate(name))
    assert right.passed
    assert right.points == right.possible


def test_files_of_this_machine_are_not_there(child: Child, tmp_path: Path) -> None:
    secret = tmp_path / "gradebook.db"
    secret.write_text("everybody's points")
    for path in (secret, Path(__file__), Path.home() / ".ssh", Path("/etc/shadow")):
        assert "No such file" in attempt(child, f"open({str(path)!r}).read()"), path
    checks = Path(sandbox.__file__).parent / "checks"
    assert attempt(child, f"os.listdir({str(checks)!r})") == "[]"
    assert "ModuleNotFound" in attempt(child, "__import__('autograder.checks.quantization')")


def test_models_are_where_they_were(child: Child) -> None:
    found = attempt(child, "__import__('fewer.models.fetch').models.fetch.cache_home()")
    assert found == str(cache_home())
    assert attempt(child, f"os.path.isdir({found!r})") == str(cache_home().is_dir())


def test_nothing_but_its_own_folder_can_be_written(child: Child) -> None:
    import fewer

    for folder in (
        "/",
        "/usr",
        "/etc",
        str(Path(fewer.__file__).parent),
        os.path.dirname(__file__),
    ):
        told = attempt(child, f"open({folder!r} + '/left', 'w')")
        assert "Read-only" in told or "No such file" in told, folder
    assert attempt(child, "open('mine', 'w').write('abc')") == "3"


def test_what_it_leaves_is_gone_before_the_next_one_comes(walled: Zygote) -> None:
    with walled.child() as first:
        first.run_cell(TRY, "try")
        for place in ("/tmp/left", "/dev/shm/left"):
            assert attempt(first, f"open({place!r}, 'w').write('abc')") == "3"
    with walled.child() as second:
        second.run_cell(TRY, "try")
        assert "left" not in attempt(second, "os.listdir('/tmp') + os.listdir('/dev/shm')")
        assert attempt(second, OTHERS) == "['1']"


def test_there_is_no_network_and_no_neighbour_to_talk_to(child: Child) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = attempt(child, f"socket.create_connection(('127.0.0.1', {port}), 1)")
        assert "refused" in told or "unreachable" in told or "denied" in told  # by Landlock
    told = attempt(child, "socket.create_connection(('192.0.2.1', 80), 1)")
    assert "unreachable" in told or "denied" in told
    for family in (38, 40):  # to the kernel's ciphers, and to the machine that hosts this one
        assert "PermissionError" in attempt(child, f"socket.socket({family}, socket.SOCK_STREAM)")


def test_the_process_that_starts_the_others_is_out_of_reach(walled: Zygote, child: Child) -> None:
    signals = "[s for s in signal.valid_signals() if s not in (signal.SIGSTOP, signal.SIGCONT)]"
    assert attempt(child, f"[os.kill(1, s) for s in {signals}] and os.kill(1, signal.SIGSTOP)")
    assert "PermissionError" in attempt(child, "open('/proc/1/mem', 'rb')")
    assert "PermissionError" in attempt(
        child, "os.readlink('/proc/1/fd/' + os.listdir('/proc/1/fd')[-1])"
    )
    with walled.child() as neighbour:
        neighbour.run_cell(TRY, "try")
        assert attempt(neighbour, "1 + 1") == "2"


@pytest.mark.parametrize(
    "what",
    [
        "call('ptrace', 16, 1, 0, 0)",
        "call('unshare', 0x10000000)",
        "call('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
        "call('chroot', b'/tmp')",
        "call('syscall', 310 if os.uname().machine == 'x86_64' else 270, 1, 0, 0, 0, 0, 0)",
        "call('syscall', 425, 1, 0)",
        "call('sethostname', b'mine', 4)",
        "call('personality', 0)",
        "call('memfd_create', b'mine', 0)",
        "call('shmget', 0, 1 << 30, 0o1600)",
        "call('msgget', 0, 0o1600)",
    ],
)
def test_system_calls_that_pry_are_refused(what: str, child: Child) -> None:
    assert attempt(child, what) == "Operation not permitted"


def test_a_namespace_of_its_own_cannot_be_cloned(child: Child) -> None:
    number = "(56 if os.uname().machine == 'x86_64' else 220)"
    told = attempt(child, f"call('syscall', {number}, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)")
    assert told == "Operation not permitted"


def test_the_disk_and_files_are_bounded(child: Child) -> None:
    for folder in ("/tmp", "/dev/shm"):
        fill = f"[open('{folder}/%d' % i, 'wb').write(bytes(64 << 20)) for i in range(8)]"
        told = attempt(child, fill)
        assert "No space left" in told, told
        attempt(child, f"[os.remove('{folder}/%d' % i) for i in range(8)]")
    assert "Too many open files" in attempt(child, "[open('/dev/null') for _ in range(2000)]")


def test_threads_may_be_started_but_no_processes(child: Child) -> None:
    for what in (
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run(['true'])",
        "call('vfork')",
        "__import__('multiprocessing').get_context('fork').Process().start()",
    ):
        assert "not permitted" in attempt(child, what), what
    child.run_cell("def twice(x):\n    done.append(2 * x)\ndone = []", "twice")
    child.run_cell("t = threading.Thread(target=twice, args=[4]); t.start(); t.join()", "thread")
    assert attempt(child, "done") == "[8]"
    assert attempt(child, "__import__('torch').ones(999, 999).sum().item()") == "998001.0"


def test_threads_without_end_are_ended_before_the_machine_has_none_left(walled: Zygote) -> None:
    with walled.child() as child:
        child.run_cell("import _thread, threading, time\nthreading.stack_size(32768)", "import")
        child.run_cell(
            "def many(number):\n"
            "    for _ in range(number):\n"
            "        _thread.start_new_thread(time.sleep, (1000,))\n"
            "    time.sleep(1)\n",
            "many",
        )
        child.candidate("many")(100)
        with pytest.raises(CandidateDied, match="too many threads"):
            child.candidate("many")(20_000)
    with walled.child() as next_one:
        next_one.run_cell(TRY, "try")
        assert attempt(next_one, "2 + 2") == "4"


@pytest.mark.usefixtures("walled")
def test_secrets_of_the_environment_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "1234")
    with Zygote(walled=True) as zygote, zygote.child() as child:
        child.run_cell(TRY, "try")
        assert "1234" not in attempt(child, "dict(os.environ)")


def test_one_that_ends_itself_harms_no_other(walled: Zygote) -> None:
    with walled.child() as child:
        child.run_cell(TRY, "try")
        with pytest.raises(CandidateDied, match="ended the process"):
            attempt(child, "os._exit(0)")
    with walled.child() as next_one:
        next_one.run_cell(TRY, "try")
        assert attempt(next_one, "2 + 2") == "4"


def test_the_filter_jumps_to_no_wrong_place() -> None:
    """Run it, as the kernel does, on every listed call and on some that it must let through."""
    for machine, (column, arch, clone) in sandbox.MACHINES.items():
        program = sandbox.filter_program(machine)
        refused = {n[column] for n in sandbox.REFUSED.values() if n[column] is not None}
        only = {n[column]: n[2] for n in sandbox.ONLY.values()}
        for number, values in only.items():
            for argument in range(50):
                told = _run(program, number, arch, argument)
                assert (told == sandbox.ALLOW) == (argument in values), (machine, number, argument)
        for number in sorted((refused | set(range(700)) | {0x40000000 + 101}) - set(only)):
            outside = machine == "x86_64" and number >= 0x40000000
            expected = sandbox.ALLOW
            if number in refused or outside:
                expected = sandbox.REFUSE | 1
            elif number == sandbox.CLONE3:
                expected = sandbox.REFUSE | 38
            assert _run(program, number, arch, 0) == expected, (machine, number)
        assert _run(program, clone, arch, sandbox.CLONE_NEWUSER) == sandbox.REFUSE | 1
        assert _run(program, clone, arch, 0x11) == sandbox.ALLOW
        assert _run(program, 0, 0x40000003, 0) == sandbox.KILL
        child = sandbox.no_processes(machine)
        assert _run(child, clone, arch, 0x11) == sandbox.REFUSE | 1
        assert _run(child, clone, arch, 0x3D0F00) == sandbox.ALLOW  # a thread of glibc's
        others = set(range(500)) - {clone} - ({57, 58} if machine == "x86_64" else set())
        assert {_run(child, number, arch, 0) for number in others} == {sandbox.ALLOW}
    with pytest.raises(sandbox.NoSandbox, match="no filter of system calls for z80"):
        sandbox.filter_program("z80")


def _run(program: bytes, number: int, arch: int, argument: int) -> int:
    """The verdict of a filter, by a little interpreter of classic BPF."""
    data, at, value = {0: number, 4: arch, 16: argument}, 0, 0
    steps = list(struct.iter_unpack("HBBI", program))
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == sandbox.LOAD:
            value = data[k]
        elif code == sandbox.RETURN:
            return k
        else:
            true = {
                sandbox.EQUAL: value == k,
                sandbox.AT_LEAST: value >= k,
                sandbox.ANY_BIT: bool(value & k),
            }[code]
            at += yes if true else no
