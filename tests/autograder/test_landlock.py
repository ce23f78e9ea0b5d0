"""Landlock alone: the walls of a process where no mount hides anything."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from autograder import landlock, sandbox

pytestmark = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")

TRY = '''
def attempt(what):
    """What an expression gives, or the error it meets, in words."""
    try:
        return str(eval(what))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

def tell(*whats):
    print(*map(attempt, whats), sep="\\n")

'''


def told(*lines: str) -> list[str]:
    """What a fresh process says."""
    argv = [sys.executable, "-P", "-c", TRY + "\n".join(lines)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_only_what_is_listed_can_be_read_or_written(tmp_path: Path) -> None:
    for name in ("open", "shown", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rules = f"read=[{str(tmp_path / 'shown')!r}], write=[{str(tmp_path / 'open')!r}, '/missing']"
    lines = told(
        "import os",
        "from pathlib import Path",
        "from autograder import landlock",
        f"folder = Path({str(tmp_path)!r})",
        f"landlock.enter(landlock.ruleset({rules}))",
        "tell('(folder / \"open/file\").read_text()', '(folder / \"shown/file\").read_text()')",
        'tell(\'(folder / "open/new").write_text("abc")\', \'(folder / "open/new").unlink()\')',
        "tell('(folder / \"other/file\").read_text()', '(folder / \"shown/new\").touch()')",
        "tell('(folder / \"shown/file\").write_text(\"abc\")', 'os.listdir(folder)')",
        "tell('(folder / \"shown/file\").unlink()', '(folder / \"other/new\").mkdir()')",
    )
    assert lines[:4] == ["open", "shown", "3", "None"]
    assert all("PermissionError" in line for line in lines[4:]), lines
    assert (tmp_path / "shown" / "file").read_text() == "shown"


def test_a_hidden_folder_can_be_seen_but_not_read(tmp_path: Path) -> None:
    (tmp_path / "package" / "checks").mkdir(parents=True)
    (tmp_path / "package" / "checks" / "secret.py").write_text("secret = 1")
    (tmp_path / "package" / "fine.py").write_text("fine = 2")
    lines = told(
        "from pathlib import Path",
        "from autograder import landlock",
        f"folder = Path({str(tmp_path)!r})",
        "hidden = folder / 'package' / 'checks'",
        "landlock.enter(landlock.ruleset(read=[str(folder)], write=[], hidden=[hidden]))",
        "tell('(folder / \"package/fine.py\").read_text()')",
        "tell('(hidden / \"secret.py\").read_text()')",
        "tell('[path.name for path in folder.iterdir()]')",
    )
    assert lines[0] == "fine = 2"
    assert "PermissionError" in lines[1]
    assert lines[2] == "['package']"


@pytest.mark.skipif(
    Path(__file__).is_relative_to("/tmp"), reason="it leaves /tmp open: there, mounts alone hide"
)
def test_it_stands_where_no_mount_hides_anything() -> None:
    """The second wall by itself: the files of this machine are all there."""
    checks = Path(sandbox.__file__).parent / "checks" / "quantization.py"
    left = Path(__file__).with_name("left-by-a-test")
    lines = told(
        "from autograder import landlock, sandbox",
        "landlock.enter(sandbox.second_wall())",
        "tell('open(\"/etc/passwd\").read()', 'open(\"/etc/hostname\").read()')",
        f"tell({f'open({str(checks)!r}).read()'!r}, {f'open({str(left)!r}, chr(119))'!r})",
        f"tell({f'open({__file__!r}).read()'!r})",
        "import json, tempfile, numpy, fewer.quantization",
        'tell(\'tempfile.TemporaryFile().write(b"abc")\', \'open("/dev/null", "w").write("a")\')',
    )
    assert all("PermissionError" in line for line in lines[:5]), lines
    assert lines[5:] == ["3", "1"]
    assert not left.exists()


@pytest.mark.skipif(landlock.version() < 4, reason="this kernel's Landlock knows no TCP")
def test_no_server_on_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        lines = told(
            "import socket",
            "from autograder import landlock",
            f"tell('socket.create_connection((\"127.0.0.1\", {port}), 5)')",
            "landlock.enter(landlock.ruleset(read=[], write=[]))",
            f"tell('socket.create_connection((\"127.0.0.1\", {port}), 5)')",
            "tell('socket.create_server((\"127.0.0.1\", 0))')",
        )
    assert "socket.socket" in lines[0]
    assert all("PermissionError" in line for line in lines[1:]), lines


@pytest.mark.skipif(landlock.version() < 6, reason="this kernel's Landlock knows no signals")
def test_no_process_outside_can_be_sent_a_signal() -> None:
    lines = told(
        "import os",
        "from autograder import landlock",
        "landlock.enter(landlock.ruleset(read=[], write=[]))",
        f"tell('os.kill({os.getpid()}, 0)', 'os.kill(os.getpid(), 0)')",
    )
    assert "PermissionError" in lines[0]
    assert lines[1] == "None"


@pytest.mark.parametrize("known", range(1, landlock.version() + 1))
def test_older_kernels_are_asked_for_no_more_than_they_know(known: int) -> None:
    lines = told(
        "from autograder import landlock",
        f"landlock.version = lambda: {known}",
        "landlock.enter(landlock.ruleset(read=['/usr'], write=['/tmp']))",
        "tell('open(\"/etc/passwd\").read()')",
    )
    assert "PermissionError" in lines[0]
