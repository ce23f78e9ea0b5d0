"""Whole notebooks in a kernel behind the walls."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from autograder import kernel, sandbox
from autograder.kernel import execute, harmless, seen, shortened, tidy

pytestmark = pytest.mark.xdist_group("sandbox")


@pytest.fixture(scope="module", autouse=True)
def _walls() -> None:
    if reason := sandbox.missing():
        pytest.skip(reason)


def run(*sources: str, cell_seconds: float = 60, walled: bool = True) -> list[list[NotebookNode]]:
    """The outputs of each cell."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    before = json.dumps(notebook)
    done = execute(notebook, walled=walled, cell_seconds=cell_seconds)
    assert json.dumps(notebook) == before
    nbformat.validate(done)
    assert [cell.source for cell in done.cells] == list(sources)
    return [cell.outputs for cell in done.cells]


def text(outputs: list[NotebookNode]) -> str:
    """All that is said, in one piece."""
    return "".join(
        one.get("text", "") + one.get("evalue", "") + one.get("data", {}).get("text/plain", "")
        for one in outputs
    )


def test_a_notebook_is_run_as_in_jupyter_but_for_its_checks() -> None:
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 4, 9])\nplt.show()"
    cells = [
        new_markdown_cell("# a title"),
        new_code_cell("from autograder import check\nimport fewer.quantization, torch"),
        new_code_cell("def double(x):\n    return 2 * x"),
        new_code_cell("check(double)"),
        new_code_cell(plot, metadata={"tags": ["demo"]}),
        new_code_cell(
            "import sys\nprint('out')\nprint('err', file=sys.stderr)\ndouble(torch.ones(2))"
        ),
        new_code_cell(""),
        new_code_cell("1 / 0"),
        new_code_cell("double(4)"),
    ]
    spec = {"name": "no-such-kernel", "display_name": "none"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": spec})
    cells[8].outputs = [new_output("stream", name="stdout", text="of another time")]
    said: list[str] = []
    done = execute(notebook, progress=said.append)
    nbformat.validate(done)
    outputs = [cell.get("outputs", []) for cell in done.cells]
    assert [len(some) for some in outputs] == [0, 0, 0, 0, 1, 3, 0, 1, 1]
    picture = Image.open(io.BytesIO(base64.b64decode(outputs[4][0].data["image/png"])))
    assert picture.size[0] > 200
    assert text(outputs[5]) == "out\nerr\ntensor([2., 2.])"
    assert outputs[7][0].ename == "ZeroDivisionError"
    assert "1 / 0" in "".join(outputs[7][0].traceback)
    assert "\x1b" not in "".join(outputs[7][0].traceback)
    assert text(outputs[8]) == "8"
    assert [cell.execution_count for cell in done.cells[1:]] == list(range(1, 9))
    assert said == [f"cell {number} of 8" for number in range(1, 9)]
    assert done.metadata == notebook.metadata
    assert done.cells[4].metadata.tags == ["demo"]


def test_the_walls_hold_for_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "1234")
    (tmp_path / "gradebook.db").write_text("everybody's points")
    own = Path(sandbox.__file__).parent
    forbidden = [
        f"open({str(tmp_path / 'gradebook.db')!r}).read()",
        "open('/etc/passwd').read()",
        f"open({str(own / 'checks' / 'quantization.py')!r}).read()",
        "import autograder.checks.quantization",
        "from autograder.judge import judge",
        f"open({str(own / 'left')!r}, 'w')",
        f"open({str(Path.home() / 'left')!r}, 'w')",
        "import socket; socket.create_connection(('192.0.2.1', 80), 1)",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "!true",
        "input('name')",
        "bytes(20 << 30)",
        "for i in range(8): open(f'/tmp/{i}', 'wb').write(bytes(64 << 20))",
    ]
    allowed = [
        "import os; print(sorted(p for p in os.listdir('/proc') if p.isdigit()))",
        "print('1234' in os.environ.values(), os.getcwd())",
        "open('mine', 'w').write('abc')",
        "[n for f in os.listdir('/proc/self/fd') if os.path.lexists(l := '/proc/self/fd/' + f)"
        " and (n := os.readlink(l)).startswith('/') and not n.startswith(('/dev', '/proc'))]",
    ]
    outputs = run(*forbidden, *allowed)
    for source, some in zip(forbidden, outputs[: len(forbidden)], strict=True):
        assert some[-1].output_type == "error", source
    said = [text(some) for some in outputs[len(forbidden) :]]
    assert said == ["['1']\n", "False /tmp\n", "3", "[]"]


def test_a_cell_that_takes_too_long_is_interrupted_and_the_rest_goes_on() -> None:
    outputs = run(
        "print('before')\nwhile True:\n    pass",
        "while True:\n    print('x' * 1000)",
        "print('x' * 100_000_000)",
        "for i in range(1000):\n    display(i)",
        "for i in range(1000):\n    print(f'\\r{i} %', end='')",
        "print('last')",
        cell_seconds=5,
    )
    assert "before\n" in text(outputs[0])
    for some in outputs[:2]:
        assert "[took longer than 5 s, and was interrupted]" in text(some)
    assert len(json.dumps(outputs)) < 200_000
    assert text(outputs[2]).endswith("[cut here]\n")
    assert text(outputs[3]).endswith("[the rest of the output is left out]\n")
    assert text(outputs[4]) == "999 %"
    assert text(outputs[5]) == "last\n"


ENDINGS = {
    "exit": ("import os; os._exit(3)", r"your code ended the process \(exit code 3\)"),
    "crash": ("import ctypes; ctypes.string_at(0)", "killed by signal 11"),
    "stubborn": (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
        "took longer than 3 s.*could not be interrupted",
    ),
    "threads": (
        "import _thread, threading, time\nthreading.stack_size(32768)\n"
        "while True: _thread.start_new_thread(time.sleep, (1000,))",
        "too many threads",
    ),
    "forged": (
        "k = get_ipython().kernel\n"
        "k.session.send(k.iopub_thread.socket, 'stream', {'name': 5, 'text': []},"
        " parent=k.get_parent())",
        "no message",
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_when_the_kernel_ends_the_rest_says_that_it_was_not_run(name: str) -> None:
    source, why = ENDINGS[name]
    began = time.monotonic()
    outputs = run("print('first')", source, "", "print('after')", cell_seconds=3)
    assert time.monotonic() - began < 60
    assert text(outputs[0]) == "first\n"
    assert re.search(why, text(outputs[1]), re.DOTALL), outputs[1]
    assert outputs[2] == []
    assert text(outputs[3]).startswith("[not run: ")


def test_a_message_without_end_harms_no_grader() -> None:
    began = time.monotonic()
    outputs = run(
        "s = get_ipython().kernel.iopub_thread.socket\nx = bytes(200 << 20)",
        "while True:\n    s.send(x, 2, copy=False)",  # ever more parts
        cell_seconds=5,
    )
    assert time.monotonic() - began < 60
    assert outputs[1]


def test_the_whole_notebook_has_a_time_and_leaves_nothing_behind() -> None:
    began, before = time.monotonic(), set(os.listdir("/tmp"))
    sleep = "import time; time.sleep(1.5)"
    notebook = new_notebook(cells=[new_code_cell(sleep) for _ in range(20)])
    done = execute(notebook, notebook_seconds=4)
    assert time.monotonic() - began < 60
    assert "the time for the whole notebook is up" in text(done.cells[-1].outputs)
    assert done.cells[0].outputs == []
    left = set(os.listdir("/tmp")) - before
    assert not [name for name in left if list(Path("/tmp", name).glob("*/connection.json"))]


def test_what_a_page_would_run_is_not_kept() -> None:
    outputs = run(
        "from IPython.display import *\n"
        "display(HTML('<script>1</script>'), SVG('<svg onload=\"1\"/>'), Javascript('1'))",
        "bad = '\"><script>1</script>'\n"
        "display({'image/png': bad, 'image/jpeg': bad, 'text/plain': 'text'}, raw=True,"
        " metadata={'image/png': {'width': bad}})",
        "shown = display('first', display_id=True)\n"
        "shown.update({'text/html': '<script>', 'text/plain': 'second'}, raw=True)",
        "display({'application/vnd.fewer.verdict+json': {'points': 10}}, raw=True)",
        "%%html\n<script>1</script>",
    )
    kept = {mime for some in outputs for one in some for mime in one.get("data", {})}
    assert kept == {"text/plain"}
    assert "<script>" not in json.dumps(outputs[:2])
    assert [text(some) for some in outputs[1:4]] == ["text", "second", ""]


def test_only_pictures_of_a_size_pass_as_pictures() -> None:
    def encoded(width: int, height: int, kind: str) -> str:
        buffer = io.BytesIO()
        Image.new("1" if kind == "PNG" else "L", (width, height)).save(buffer, kind)
        return base64.b64encode(buffer.getvalue()).decode()

    small = encoded(20, 10, "PNG")
    assert harmless({"image/png": small + "\n"}) == {"image/png": small}
    assert harmless({"image/jpeg": encoded(9, 9, "JPEG")}).keys() == {"image/jpeg"}
    for refused in (
        encoded(9, 9, "JPEG"),  # not what it says
        encoded(20_000, 10_000, "PNG"),  # small as a file only
        base64.b64encode(bytes(100)).decode(),
        small + '"><script>',
        small[:20],
        "A" * 4_000_000,
        "é",
        ["a"],
        5,
        None,
    ):
        assert harmless({"image/png": refused}) == {}, refused


def test_outputs_that_are_none_are_dropped_and_long_ones_cut() -> None:
    assert tidy([{"output_type": "stream", "name": "<b>", "text": "x"}]) == []
    assert tidy([{"output_type": "display_data", "data": [], "metadata": {}}]) == []
    assert tidy([{"output_type": "error", "ename": "A", "evalue": 5}]) == []
    assert tidy([{}]) == []
    assert len(shortened("a" * 10**6)) < kernel.TEXT + 20
    (one,) = tidy([{"output_type": "execute_result", "data": {"text/plain": "3"}, "x": "<script>"}])
    assert one == {"output_type": "display_data", "data": {"text/plain": "3"}, "metadata": {}}
    assert seen("\r1\r2\r") == "2\r"
    assert seen("a\r" + "b" * 10) == "b" * 10


def test_without_walls_it_runs_as_well_and_says_when_it_cannot_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert text(run("print(2 + 2)", walled=False)[0]) == "4\n"
    monkeypatch.setattr(sandbox, "missing", lambda: "no walls here")
    with pytest.raises(sandbox.NoSandbox, match="no walls here"):
        run("print(2 + 2)")


def test_any_program_of_jupyters_finds_the_walls_by_their_name(tmp_path: Path) -> None:
    """As `jupyter nbconvert --execute` does, of which this is the essence."""
    found = entry_points(group="jupyter_client.kernel_provisioners", name=kernel.NAME)
    assert [point.load() for point in found] == [kernel.WalledProvisioner]
    program = (
        "from nbclient import NotebookClient; from nbformat.v4 import *\n"
        "cell = new_code_cell('import os; print(os.uname().nodename, os.listdir(\"/home\"))')\n"
        "print(NotebookClient(new_notebook(cells=[cell])).execute().cells[0].outputs)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JUPYTER_DEFAULT_PROVISIONER_NAME": kernel.NAME},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "FileNotFoundError" in done.stderr + done.stdout or "sandbox" in done.stdout, done.stderr
