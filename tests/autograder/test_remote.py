"""A student's process may do what it likes: the grader goes on, and the words are the student's."""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autograder import remote, wire
from autograder.candidate import Local
from autograder.compare import CandidateDied, CandidateError, expect, expect_close, expect_error
from autograder.exercise import Check, Exercise
from autograder.foresight import Plan, Replay
from autograder.judge import judge
from autograder.remote import Child, GraderError, Zygote
from autograder.strategies import tensors
from autograder.verdict import Verdict

pytestmark = pytest.mark.xdist_group("zygote")


def halve(x: torch.Tensor) -> torch.Tensor:
    """Half of x."""
    if x.numel() == 0:
        raise ValueError("x must not be empty")
    return x / 2


EXERCISE = Exercise(halve, paper="Nobody 2020", difficulty=1, minutes=1)


@EXERCISE.check(points=2, hint="Divide.", x=tensors())
def twice_the_half_is_the_whole(candidate: Any, x: torch.Tensor) -> None:
    """Adding the result to itself gives the input back."""
    expect_close(candidate(x) + candidate(x), x, what="half + half")


@EXERCISE.check(points=1, hint="Is there anything to halve?")
def nothing_has_no_half(candidate: Any) -> None:
    """An empty tensor is refused."""
    expect_error(candidate, ValueError, torch.zeros(0))


@EXERCISE.check(points=1, hint="Look again.", x=tensors())
def the_larger_has_the_larger_half(candidate: Any, x: torch.Tensor) -> None:
    """Halving keeps the order, also of what was halved before."""
    y = candidate(x + 1)
    expect(candidate(y) >= candidate(candidate(x)), "the order is lost", got=y)


@EXERCISE.misconception("The sign is lost.")
def forgets_the_sign(x: torch.Tensor) -> torch.Tensor:
    return x.abs() / 2


RIGHT = """
def halve(x):
    if x.numel() == 0:
        raise ValueError("x must not be empty")
    return x / 2
"""


@pytest.fixture
def child(zygote: Zygote) -> Iterator[Child]:
    with zygote.child(cell_seconds=10, call_seconds=10) as child:
        yield child


def run(child: Child, source: str, label: str = "halve") -> None:
    child.run_cell(textwrap.dedent(source), label)


def locally(source: str) -> Local:
    """The function of a cell in this process, with the cell's file name."""
    source = textwrap.dedent(source)
    linecache.cache["<cell halve>"] = (len(source), None, source.splitlines(True), "<cell halve>")
    scope: dict[str, Any] = {}
    exec(compile(source, "<cell halve>", "exec", dont_inherit=True), scope)
    return Local(scope["halve"])


def numbered(number: int, value: Any) -> bytes:
    """What a child sends as the answer to the request of this number."""
    return number.to_bytes(4, "little") + wire.pack(value)


def without_addresses(verdict: Verdict) -> str:
    """The verdict as JSON, where an object that is no data is told by its type alone."""
    return re.sub(r"<(an object of type )?(\w+)[^>]*>", r"<\2>", json.dumps(verdict.to_json()))


@pytest.mark.parametrize(
    "source",
    [
        RIGHT,
        "def halve(x):\n    return x.abs() / 2",
        "def halve(x):\n    return x / 2",
        RIGHT.replace("return x / 2", "print('noise' * 1000); return (x / 2).double().numpy()"),
        "def halve(x):\n    return (x.tolist(), 'text')",
        "def halve(x):\n    return object()",
        "def halve(x):\n    return {'a': x}",
        "def halve(x):\n    return None",
        "def halve(x):\n    x /= 2\n    return x",
        "def halve(x):\n    if x.min() < 0:\n        return 1 / 0\n    return x / 2",
        "def halve(x):\n    raise NotImplementedError",
        "def halve(x):\n    raise KeyError('no such thing')",
        "def halve(x):\n    import no_such_package",
        "def halve(x):\n    return x.as_strided(x.shape, x.stride()) / 2",
        "seen = []\ndef halve(x):\n    seen.append(x)\n    return x / (2 if len(seen) < 50 else 3)",
    ],
    ids=range(15),
)
def test_the_verdict_is_the_same_as_at_home(child: Child, source: str) -> None:
    run(child, source)
    there = judge(EXERCISE, child.candidate("halve"), seed=3)
    here = judge(EXERCISE, locally(source), seed=3)
    assert without_addresses(there) == without_addresses(here)


def test_a_right_function_is_judged_without_a_single_live_call(child: Child) -> None:
    run(child, RIGHT)
    candidate = child.candidate("halve")
    assert judge(EXERCISE, candidate).passed
    assert candidate.live == 0


def asking(*calls: tuple[Any, ...]) -> Plan:
    """A plan that has these calls, as one set of inputs."""

    def f(*args: Any) -> None: ...

    def asks(candidate: Any) -> None:
        for args in calls:
            candidate(*args)

    check = Check("asks", "", 1, "", asks, {}, 1)
    return Plan(Exercise(f, paper="", difficulty=1, minutes=1, checks=[check]), check, seed=0)


def foreseen(child: Child, *calls: tuple[Any, ...]) -> Replay:
    """``f`` as a candidate, the answers to these calls at hand."""
    plan, candidate = asking(*calls), child.candidate("f")
    (answers,) = candidate.foresee(plan)
    return Replay(plan, plan.parts[0], answers, candidate)


def test_an_answer_is_replayed_once_and_then_asked_again(child: Child) -> None:
    run(child, "count = 0\ndef f(x):\n    global count\n    count += 1\n    return count")
    candidate = foreseen(child, (1,), (2,), (1,))
    assert [candidate(2), candidate(1), candidate(1)] == [2, 1, 3]
    assert candidate.live == 0
    assert candidate(1) == 4
    assert candidate.live == 1


def test_other_arguments_are_other_calls(child: Child) -> None:
    """Equal values in another layout or type must not be answered from memory."""
    run(child, "def f(x):\n    return [str(x.dtype), *x.stride()]")
    candidate = foreseen(child, (torch.zeros(2, 2),))
    assert candidate(torch.zeros(2, 2).t()) == ["torch.float32", 1, 2]
    assert candidate(torch.zeros(2, 2).half()) == ["torch.float16", 2, 1]
    assert candidate.live == 2


def test_more_calls_than_the_socket_holds_do_not_block(child: Child) -> None:
    run(child, "def f(x):\n    return x")
    calls = [(torch.full((100_000,), i),) for i in range(20)]
    candidate = foreseen(child, *calls)
    assert all(int(candidate(*args)[0]) == i for i, args in enumerate(calls))


def test_an_answer_is_what_it_was_when_it_was_returned(child: Child) -> None:
    run(child, "import torch\nkept = torch.zeros(1)\ndef f():\n    kept.add_(1)\n    return kept")
    candidate = foreseen(child, (), ())
    assert [float(candidate()), float(candidate())] == [1.0, 2.0]


def test_what_a_zygote_keeps_is_asked_once_and_sent_if_it_is_asked_again() -> None:
    with Zygote() as zygote:
        plan = asking((torch.ones(2),), (torch.zeros(3),))
        for kept in (False, True):  # sent to the first child, kept for the second
            if kept:
                zygote.keep(plan)
            with zygote.child() as child:
                run(child, "def f(x):\n    return x.add_(1).sum()")
                for _ in range(2):
                    (answers,) = child.candidate("f").foresee(plan)
                    assert [wire.unpack(a.frame)["value"].item() for a in answers] == [4, 3]
        assert list(zygote.kept) == [plan.key]


DEADLY = {
    "import os; os._exit(0)": r"your code ended the process \(exit code 0\)",
    "import os; os._exit(3)": r"ended the process \(exit code 3\)",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": r"signal 9 \(out of memory, or",
    "import ctypes; ctypes.string_at(0)": r"signal 11",
    "import os; os.abort()": r"signal 6",
    "import os; os.close(3); import time; time.sleep(9)": "closed the connection",
    "import os; os.write(3, b'x' * 100)": "to nothing that was asked",
    "import os; os.write(3, NUMBER + b'x' * 100)": "larger than",
    "import os; os.write(3, NUMBER + bytes(8))": "malformed",
    "import os; os.write(3, NUMBER + b'\\x02' + bytes(7) + b'{}')": "malformed",
    "import os; os.write(3, NUMBER + b'\\x02' + bytes(7) + b'[]')": "no answer",
    "import builtins; vars(builtins).clear()": "ended the process",
    "import os; os.killpg(0, 9)": "signal 9",
}


@pytest.mark.parametrize("deed", DEADLY)
@pytest.mark.parametrize("when", ["in a cell", "in a call"])
def test_a_process_that_dies_is_told_in_the_students_terms(
    child: Child, deed: str, when: str
) -> None:
    number = 2 if when == "in a cell" else 3  # a call has one of its own
    deed_done = deed.replace("NUMBER", repr(numbered(number, None)[:4]))
    run(child, f"def f(x):\n    {deed_done}")
    with pytest.raises(CandidateDied, match=DEADLY[deed]):
        run(child, deed_done) if when == "in a cell" else child.candidate("f")(1)
    assert child.dead
    with pytest.raises(CandidateDied):
        child.run_cell("1", "later")


def test_the_deadly_call_is_shown(child: Child) -> None:
    run(child, "import os\ndef f(x):\n    return x if x < 3 else os._exit(1)")
    with pytest.raises(CandidateDied, match=r"exit code 1\) \(when called as f\(3\)\)"):
        child.candidate("f").foresee(asking(*[(i,) for i in range(6)]))


@pytest.mark.parametrize(
    "source", ["while True: pass", "import time\ntime.sleep(99)", "import signal\nsignal.pause()"]
)
def test_an_endless_loop_is_ended(zygote: Zygote, source: str) -> None:
    with zygote.child(cell_seconds=0.3) as child:
        with pytest.raises(CandidateDied, match=r"took longer than 0\.3 s: an endless loop\?"):
            child.run_cell(source, "1")
        assert gone(child._pid)


def test_an_endless_call_is_ended_and_what_stubbornly_ignores_signals_too(zygote: Zygote) -> None:
    with zygote.child(call_seconds=0.3) as child:
        run(child, "import signal\nfor s in (2, 15):\n    signal.signal(s, signal.SIG_IGN)")
        run(child, "def f():\n    while True:\n        try:\n            f()\n        except: pass")
        with pytest.raises(CandidateDied, match=r"longer than 0\.3 s"):
            child.candidate("f")()
        assert gone(child._pid)


def endless(child: Child, source: str, patience: float = 0.3) -> float:
    """How long it takes until ``f`` is found endless, in seconds of processor time."""
    run(child, source)
    before = cpu_seconds(child._pid)
    with pytest.raises(CandidateDied, match="as long as it should: an endless loop"):
        list(child.calls("f", [wire.pack(((1,), {}))], patience=patience))
    assert child.slow  # no second try
    return cpu_seconds(child.zygote._process.pid, of_children=True) - before


def cpu_seconds(pid: int, of_children: bool = False) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    own = 13 if of_children else 11
    return sum(map(int, fields[own : own + 2])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import torch\n    while True: x = torch.as_tensor(x) + 1",
        "import time, threading\n    while True: threading.Thread(target=int).start()",
    ],
)
def test_a_child_gives_up_what_takes_too_much_processor_time(zygote: Zygote, body: str) -> None:
    """Long before the grader's clock does, and without being asked twice."""
    with zygote.child() as child:
        began = time.monotonic()
        endless(child, f"def f(x):\n    {body}")
        assert time.monotonic() - began < 9  # and not the 10 s of the grader's clock


def test_a_loop_costs_about_as_much_as_there_is_patience() -> None:
    with Zygote() as zygote, zygote.child() as child:
        assert endless(child, "def f(x):\n    while True: pass") < 1.0


@pytest.mark.parametrize(
    "deed",
    [
        "signal.signal(signal.SIGPROF, signal.SIG_IGN)",
        "signal.setitimer(signal.ITIMER_PROF, 0)",
        "sys.setswitchinterval(9999); sum(iter(int, 1))",  # a loop in C
    ],
)
def test_where_code_prevents_that_the_graders_clock_decides(zygote: Zygote, deed: str) -> None:
    with zygote.child(call_seconds=1) as child:
        run(child, f"import os, signal, sys\ndef f(x):\n    {deed}\n    while True: pass")
        with pytest.raises(CandidateDied, match="endless loop"):
            list(child.calls("f", [wire.pack(((1,), {}))], patience=0.2))
        assert child.slow


def test_waiting_and_importing_take_no_patience(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text(
        "import time\nbegan = time.process_time()\nwhile time.process_time() < began + 0.5: pass"
    )
    with zygote.child() as child:
        run(child, f"import sys, time\nsys.path.insert(0, {str(tmp_path)!r})")
        run(child, "def f(x):\n    import slow_module\n    time.sleep(0.3)\n    return x")
        (answer,) = child.calls("f", [wire.pack(((1,), {}))], patience=0.2)
        assert answer.value == 1


def test_each_call_has_its_own_patience(child: Child) -> None:
    busy = "t = time.process_time()\n    while time.process_time() < t + 0.1: pass"
    run(child, f"import time\ndef f(x):\n    {busy}\n    return x")
    answers = child.calls("f", [wire.pack(((i,), {})) for i in range(6)], patience=0.3)
    assert [answer.value for answer in answers] == list(range(6))


def test_an_endless_cell_is_given_up_too(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CELL_PATIENCE", 0.2)
    with zygote.child() as child, pytest.raises(CandidateDied, match="s of processor time"):
        run(child, "while True: pass")


def test_an_answer_given_in_advance_is_no_answer_to_the_next_call(child: Child) -> None:
    """The number would be right, but then the true answer is one too many."""
    forged = numbered(4, {"value": "forged"})
    run(child, f"import os\ndef f(x):\n    if x == 1: os.write(3, {forged!r})\n    return x")
    with pytest.raises(CandidateDied, match="to nothing that was asked"):
        list(child.calls("f", [wire.pack(((i,), {})) for i in range(3)]))


def test_many_slow_calls_are_bounded_together(
    zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHECK_SECONDS", 0.3)
    with zygote.child() as child:
        run(child, "import time\ndef f(x):\n    time.sleep(0.05)")
        with pytest.raises(CandidateDied, match=r"longer than 0\.3 s in all"):
            child.candidate("f").foresee(asking(*[(i,) for i in range(100)]))


def test_a_deadline_ends_whatever_goes_on(zygote: Zygote) -> None:
    with (
        zygote.child(deadline=time.monotonic() + 0.5) as child,
        pytest.raises(CandidateDied, match="the time for the whole notebook is up"),
    ):
        child.run_cell("while True: pass", "1")


def gone(pid: int) -> bool:
    """Whether no process, and no zombie either, has this id."""
    return not Path(f"/proc/{pid}").exists()


def test_what_a_child_started_dies_with_it_and_no_zombie_stays(zygote: Zygote) -> None:
    with zygote.child() as child:
        run(child, "import subprocess\nsleeper = subprocess.Popen(['sleep', '99'])")
        run(child, "import os\ndef pids():\n    return [os.getpid(), sleeper.pid]")
        pid, sleeper = child.candidate("pids")()
    assert gone(pid)
    until = time.monotonic() + 5  # init takes a moment to reap it
    while not gone(sleeper) and "State:\tZ" not in Path(f"/proc/{sleeper}/status").read_text():
        assert time.monotonic() < until


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("torch.zeros(200 << 20, dtype=torch.uint8)", "the answer is larger than 64 MB"),
        ("'x' * (200 << 20)", "the answer is larger than 2 MB of numbers and text"),
        ("[0] * (10 << 20)", "the answer is larger than 2 MB of numbers and text"),
        ("Liar()", "the answer cannot be sent"),
    ],
)
def test_an_answer_that_cannot_be_sent_is_refused(child: Child, value: str, words: str) -> None:
    run(child, "import torch\nclass Liar:\n    __class__ = int")
    run(child, f"def f():\n    return {value}")
    with pytest.raises(CandidateDied, match=words):
        child.candidate("f")()


def test_many_large_answers_are_bounded_together(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHECK_BYTES", 20 << 20)
    run(child, "import torch\ndef f(x):\n    return torch.zeros(1 << 20)")
    with pytest.raises(CandidateDied, match="the answers are larger than 20 MB"):
        child.candidate("f").foresee(asking(*[(i,) for i in range(100)]))


def test_a_memory_hog_gets_an_error_or_dies(zygote: Zygote) -> None:
    with zygote.child(memory=256 << 20) as child:
        run(child, "import torch\ndef f():\n    return torch.ones(1 << 30).sum()")
        with pytest.raises((CandidateError, CandidateDied)):
            child.candidate("f")()
        run(child, "def g():\n    return len([bytes(1000) for _ in range(10**9)])")
        with pytest.raises((CandidateError, CandidateDied), match="MemoryError"):
            child.candidate("g")()


HARMLESS = [
    "import torch; torch.equal = torch.allclose = lambda *a, **k: True",
    "import torch; torch.Tensor.__eq__ = lambda a, b: True",
    "import builtins; builtins.abs = builtins.all = builtins.isinstance = None",
    "import os; os.chdir('/')",
    "import os; os.environ.clear()",
    "import sys; print('x' * (5 << 20)); print('x' * (5 << 20), file=sys.stderr)",
    "import os; os.write(1, b'x' * (5 << 20)); os.write(2, b'x' * (5 << 20))",
    "import os; os.system('echo noise; echo noise >&2')",
    "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
    "import warnings; warnings.simplefilter('error'); import torch; torch.tensor(torch.ones(1))",
    "import sys; sys.stdout.close(); sys.stderr.close()",
    "import atexit; atexit.register(lambda: 1 / 0)",
    "import sys; sys.setrecursionlimit(60)",
    "import random, torch; random.seed(1); torch.manual_seed(1)",
    "import json, socket, struct; json.dumps = socket.socket = struct.pack = None",
    "import linecache; linecache.cache = None",
    "import sys; sys.modules.clear()",
]


@pytest.mark.parametrize("deed", HARMLESS)
def test_what_a_cell_does_to_its_process_stays_there(child: Child, deed: str) -> None:
    """A wrong function is still wrong, and the grader is unharmed."""
    here = os.getcwd(), dict(os.environ), torch.equal, torch.Tensor.__eq__, abs, isinstance
    for source in (deed, "def halve(x):\n    return x / 3"):
        with contextlib.suppress(CandidateError, CandidateDied):  # it may harm itself
            run(child, source)
    assert judge(EXERCISE, child.candidate("halve"), explain=False).points <= 1
    assert (os.getcwd(), dict(os.environ), torch.equal, torch.Tensor.__eq__) == here[:4]
    assert (abs, isinstance) == here[4:]


@pytest.mark.parametrize("deed", HARMLESS[4:8])
def test_a_right_function_that_is_noisy_gets_its_points(child: Child, deed: str) -> None:
    noisy = RIGHT.replace("    return", f"    {deed}\n    return")
    run(child, noisy.replace("5 << 20", "1 << 15"))
    assert judge(EXERCISE, child.candidate("halve")).passed


@pytest.mark.parametrize(
    "value",
    [
        "(i for i in range(3))",
        "lambda: 1",
        "AlwaysRight",
        "AlwaysRight()",
        "[AlwaysRight()]",
        "AlwaysRight().as_tensor()",
    ],
)
def test_an_object_that_claims_to_be_equal_earns_nothing(child: Child, value: str) -> None:
    run(
        child,
        """
        import os, torch
        class AlwaysRight:
            def __eq__(self, other): return True
            def __reduce__(self): return os._exit, (0,)
            def __float__(self): return 1.0
            def __ge__(self, other): return True
            def __add__(self, other): return other
            def as_tensor(self):
                class T(torch.Tensor):
                    @classmethod
                    def __torch_function__(cls, f, types, args=(), kwargs=None): return True
                return torch.full((2,), float("nan")).as_subclass(T)
        """,
        "1",
    )
    run(child, f"def halve(x):\n    return {value}")
    assert judge(EXERCISE, child.candidate("halve")).points == 0


def test_an_exception_crosses_as_names_words_and_the_students_lines(child: Child) -> None:
    run(
        child,
        """

        class Mine(ValueError):
            pass

        def helper(x):
            raise Mine("no\\ud800 good")

        def f(x):
            return helper(x)
        """,
        "f",
    )
    with pytest.raises(CandidateError) as caught:
        child.candidate("f")(1)
    assert caught.value.kinds[:3] == ["Mine", "ValueError", "Exception"]
    assert caught.value.message == "no? good"
    assert caught.value.trace == 'line 10: return helper(x)\nline 7: raise Mine("no\\ud800 good")'


def test_a_syntax_error_names_its_line(child: Child) -> None:
    with pytest.raises(CandidateError) as caught:
        run(child, "\nx = 1\ny = = 2\n")
    assert caught.value.kinds[0] == "SyntaxError"
    assert caught.value.trace == "line 3: y = = 2"


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "exit()",
        "raise KeyboardInterrupt",
        "raise BaseException",
        "def f(): f()\nf()",
        "class E(Exception):\n    def __str__(self): raise E\nraise E",
        "class E(Exception):\n    __name__ = 3\nraise E('x' * (5 << 20))",
    ],
)
def test_whatever_is_raised_is_an_error_and_the_child_goes_on(child: Child, source: str) -> None:
    with pytest.raises(CandidateError):
        run(child, source)
    run(child, "def f(x):\n    return x + 1")
    assert child.candidate("f")(1) == 2


def test_a_missing_function_is_called_missing(child: Child) -> None:
    run(child, "g = 3")
    with pytest.raises(CandidateError, match="there is no function called f"):
        child.candidate("f")(1)
    with pytest.raises(CandidateError, match="g is no function, but an object of type int"):
        child.candidate("g")(1)


def test_one_can_look_at_a_name_without_calling_it(child: Child) -> None:
    run(child, "import torch\ng = 3\n@torch.no_grad()\ndef f():\n    pass", "abc")
    assert child.look("f") == ("function", True, "<cell abc>")
    assert child.look("g") == ("int", False, "")
    assert child.look("h") == ("", False, "")


def test_cells_run_as_in_a_notebook(child: Child) -> None:
    """Magics, shell lines, pickles, dataclasses, source code, `check`: what honest cells use."""
    run(
        child,
        """
        %matplotlib inline
        %load_ext autoreload
        !pip install nothing
        files = !ls
        get_ipython().kernel.anything[3] if False else None
        from autograder import check
        from IPython.display import display, HTML
        import matplotlib.pyplot as plt
        plt.plot([1, 2]); plt.show()
        display(HTML("<b>hello</b>"))
        quantize?
        """,
        "1",
    )
    run(child, "%%time\n\ndef timed(x):\n    return 1 / x", "2")
    run(child, "%%capture\nfor i in range(3):\n    print(i)", "3")
    run(child, "%%bash\nrm -rf /nowhere", "4")
    run(child, "%time y = timed(2)\ncheck(timed)\ncheck(timed, seed=3)\n1 + 1", "5")
    run(
        child,
        """
        import __main__, inspect, pickle
        from dataclasses import dataclass

        @dataclass
        class Point:
            x: int

        def f():
            assert __name__ == "__main__" and __main__.f is f
            assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
            return inspect.getsource(f).splitlines()[0], y, f.__annotations__ == {}
        """,
        "6",
    )
    assert child.candidate("f")() == ("def f():", 0.5, True)
    with pytest.raises(CandidateError) as caught:
        child.candidate("timed")(0)
    assert caught.value.trace == "line 4: return 1 / x"


def test_annotations_are_evaluated_as_in_a_notebook(child: Child) -> None:
    """The server's own `from __future__ import annotations` must not leak into cells."""
    run(child, "def f(x: int): return [type(a).__name__ for a in f.__annotations__.values()]")
    assert child.candidate("f")(1) == ["type"]


def test_the_grader_cannot_be_imported_in_the_child(child: Child) -> None:
    run(
        child,
        """
        import sys
        def f():
            return [n for n in sys.modules if n.split(".")[0] in ("autograder", "hypothesis")]
        """,
        "f",
    )
    assert child.candidate("f")() == ["autograder"]
    with pytest.raises(CandidateError, match="ModuleNotFoundError"):
        run(child, "import autograder.checks.quantization")


def test_children_know_nothing_of_each_other(zygote: Zygote) -> None:
    with zygote.child() as one, zygote.child() as two:
        run(one, "x = 1\nopen('note', 'w').write('the answer')")
        run(one, "import torch; torch.secret = 1")
        run(two, "import os, torch\ndef f():\n    return os.listdir(), hasattr(torch, 'secret')")
        run(two, "def fds():\n    return sorted(map(int, os.listdir('/proc/self/fd')))")
        assert two.candidate("f")() == ([], False)
        assert two.look("x")[0] == ""
        assert two.candidate("fds")()[:4] == [0, 1, 2, 3]
        assert len(two.candidate("fds")()) <= 5  # the fifth is the listing itself
        folder = Path(one._folder)
        assert (folder / "note").exists()
    assert not folder.exists()


def test_whatever_a_student_leaves_behind_is_deleted(zygote: Zygote, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("of the course")
    with zygote.child() as child:
        run(child, f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nos.mkdir('locked', 0)")
        run(child, "for _ in range(1500):\n    os.mkdir('deep'); os.chdir('deep')")
        folder = Path(child._folder)
        assert folder.exists()
    assert not folder.exists()
    assert precious.read_text() == "of the course"


def test_random_numbers_are_those_of_the_seed(zygote: Zygote) -> None:
    draw = "import random, numpy, torch\ndef f():\n    return random.random(), numpy.random.rand()"
    draws = []
    for seed in (0, 0, 1):
        with zygote.child(seed=seed) as child:
            run(child, draw + ", torch.rand(2), hash('text')")
            first = child.candidate("f")()
            child.guard("anything")  # each exercise starts afresh, whatever was drawn before
            assert str(child.candidate("f")()) == str(first)
            draws.append(str(first[:3]))
    assert draws[0] == draws[1] != draws[2]


GUARDED = """
import functools, torch
import fewer.quantization
import fewer.quantization.uniform as u
from fewer.quantization import quantize_symmetric, mse
from fewer.quantization import quantize_symmetric as alias
partial = functools.partial(quantize_symmetric, bits=4)
x = torch.tensor([1.0, 2.0])
def by_name(): return quantize_symmetric(x)
def by_alias(): return alias(x, 4, dim=None)
def by_module(): return u.quantize_symmetric(x=x)
def by_package(): return fewer.quantization.quantize_symmetric(x)
def by_partial(): return partial(x)
def another(): return mse(x, x)
"""


def test_the_library_cannot_be_handed_in(child: Child) -> None:
    run(child, GUARDED, "1")
    ways = ["by_name", "by_alias", "by_module", "by_package", "by_partial"]
    for way in ways:
        assert child.candidate(way)()[0].tolist()
    child.guard("quantize_symmetric")
    for way in ways:
        with pytest.raises(CandidateError, match="library's quantize_symmetric is what you are"):
            child.candidate(way)()
    assert child.candidate("another")() == 0
    child.guard("mse")  # the guard before is lifted
    for way in ways:
        assert child.candidate(way)()[0].tolist()
    with pytest.raises(CandidateError, match="library's mse"):
        child.candidate("another")()
    child.guard(None)
    assert child.candidate("another")() == 0


def test_what_is_taken_out_of_sight_is_guarded_all_the_same(child: Child) -> None:
    run(
        child,
        "import sys\nimport fewer.quantization as q\nmine = q.mse\ndef f(x): return mine(x, x)",
    )
    run(child, "for n in [n for n in sys.modules if n.startswith('fewer')]: del sys.modules[n]")
    run(child, "from fewer.quantization import mse as again\ndef g(x): return again(x, x)")
    x = torch.ones(2)
    for name in ("f", "g"):
        assert child.candidate(name)(x) == 0
    child.guard("mse")
    for name in ("f", "g"):
        with pytest.raises(CandidateError, match="library's mse"):
            child.candidate(name)(x)
    child.guard(None)
    for name in ("f", "g"):
        assert child.candidate(name)(x) == 0


def test_what_is_printed_is_put_into_words_where_somebody_reads_it(child: Child) -> None:
    run(
        child,
        """
        import contextlib, io, sys
        class Shown:
            count = 0
            def __str__(self):
                Shown.count += 1
                return "shown"
        def f():
            print(Shown(), 1, sep="-")
            print(Shown(), file=sys.stderr, end="", flush=True)
            text = io.StringIO()
            print(Shown(), 2, sep="-", file=text)
            with contextlib.redirect_stdout(text):
                print(Shown())
            return text.getvalue(), Shown.count
        """,
    )
    assert child.candidate("f")() == ("shown-2\nshown\n", 2)
    with pytest.raises(CandidateError, match="TypeError"):
        run(child, "print(1, colour='red')")


def test_every_kind_of_function_can_be_guarded_and_restored_without_any_check_at_hand() -> None:
    """In a process of its own, for the guard swaps code of functions in place."""
    program = """
    import functools, inspect, sys, types
    from autograder.child import Server
    ours = {name for name in sys.modules if name.startswith("autograder.")}
    names = "child wire candidate compare sandbox landlock".split()
    alone = {f"autograder.{name}" for name in names}
    assert ours == alone, ours
    assert "hypothesis" not in sys.modules
    module = sys.modules["fewer.fake"] = types.ModuleType("fewer.fake")
    def decorated(f):
        @functools.wraps(f)
        def wrapper(*args, **kwargs):
            return f(*args, **kwargs)
        return wrapper
    def closure(n, m):
        def f(x, a=1, *, b=2):
            return x + a + b + n + m
        return f
    class Small:
        def __init__(self, x=3): self.x = x
    cases = {
        "plain": (lambda x=1: x, ()), "closure": (closure(1, 2), (1,)),
        "decorated": (decorated(closure(1, 2)), (1,)),
        "cached": (functools.cache(lambda x: x), (1,)), "small": (Small, ()),
        "generator": (lambda: (yield 1), ()), "defaults": (lambda a=1, b=2, *c, d=4: (a, b, d), ()),
        "builtin": (len, ([],)),
    }
    server = Server(None, 0)
    for name, (function, args) in cases.items():
        vars(module)[name] = function
        before = str(function(*args)) if name not in ("small", "generator") else ""
        server.guard(name)
        try:
            function(*args)
            assert name == "builtin", name
        except RuntimeError as error:
            assert f"the library's {name} is" in str(error), name
            str(inspect.signature(function))
        server.guard(None)
        assert before == (str(function(*args)) if before else ""), name
    assert list(inspect.signature(closure(1, 2)).parameters) == ["x", "a", "b"]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


JUDGED = {  # what a function does to halve x: its points of 4, and a word of what it is told
    "a NaN": ("y = x / 2; y[..., 0] = float('nan'); return y", 1, "off by up to inf"),
    "an infinity": ("return x / 0 * 0.5 + float('inf')", 1, "off by up to"),
    "another dtype": ("return (x / 2).double()", 4, ""),
    "another shape": ("return (x / 2)[None]", 2, "has shape"),
    "another form": ("return [x / 2, x]", 1, "is a list (a tensor, a tensor), expected a tensor"),
    "a parameter": ("return torch.nn.Parameter(x / 2)", 4, ""),
    "a subclass": ("return (x / 2).as_subclass(Liar)", 4, ""),
    "a subclass that lies": ("return x.as_subclass(Liar)", 2, "off by"),
    "sparse": ("return (x / 2).to_sparse()", 1, "object of type tensor that is sparse"),
    "on no device": ("return (x / 2).to('meta')", 1, "tensor that is on the meta device"),
    "a generator": ("return (v / 2 for v in x)", 1, "an object of type generator"),
    "something lazy": ("return Lazy(x)", 1, "an object of type Lazy"),
    "a view of one buffer": ("return aliased(x)", 4, ""),
    "in place": ("return x.div_(2)", 4, ""),
    "a view of the input": ("x /= 2; return x[:]", 4, ""),
    "requires grad": ("return x.clone().requires_grad_() / 2", 4, ""),
    "changed afterwards": ("y = x / 2; later(y); return y", 4, ""),
}


@pytest.mark.parametrize("what", JUDGED)
def test_whatever_a_function_returns_is_judged_as_it_was_when_it_returned(
    child: Child, what: str
) -> None:
    body, points, words = JUDGED[what]
    run(
        child,
        """
        import threading, time, torch

        class Liar(torch.Tensor):
            @classmethod
            def __torch_function__(cls, f, types, args=(), kwargs=None): return True

        class Lazy:
            def __init__(self, x): self.x = x
            def __float__(self): return self.x / 2

        buffer = torch.zeros(1000)

        def aliased(x):
            buffer.fill_(99)
            buffer[: x.numel()] = x.flatten() / 2
            return buffer[: x.numel()].reshape(x.shape)

        returned = []
        later = returned.append

        def spoil():
            while True:
                time.sleep(0.1)
                for y in list(returned):
                    y.fill_(99)

        threading.Thread(target=spoil, daemon=True).start()
        """,
        "1",
    )
    refuse = "    if x.numel() == 0:\n        raise ValueError\n"
    run(child, f"def halve(x):\n{refuse}    {body}")
    verdict = judge(EXERCISE, child.candidate("halve"))
    assert verdict.points == points
    if words:
        worst = verdict.first_failure
        assert worst is not None
        assert worst.failure is not None
        assert words in worst.failure.message


def test_a_cell_of_many_megabytes_is_an_error(child: Child) -> None:
    with pytest.raises(CandidateError, match="the cell is larger than 2 MB"):
        child.run_cell("#" * (3 << 20), "1")


def test_unasked_words_are_noticed_before_the_next_request(child: Child) -> None:
    assert child.idle()
    forged = numbered(3, {"value": 1})
    run(child, f"import os\ndef f():\n    os.write(3, {forged!r})\n    return 2")
    assert child.candidate("f")() == 1  # its own answer, only sooner
    until = time.monotonic() + 10
    while child.idle():
        assert time.monotonic() < until
    assert "no answer" in child.dead


def test_a_death_between_two_requests_is_noticed(child: Child) -> None:
    run(child, "import os, threading\nthreading.Timer(0.1, os._exit, [4]).start()")
    until = time.monotonic() + 10
    while child.idle():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert child.dead == "your code ended the process (exit code 4)"


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        None,
        {"value": 1, "error": 2},
        {"error": []},
        {"error": ([], "", "")},
        {"error": (["E"], 1, "")},
        {"error": ([1], "", "")},
        {"error": (["E"], "")},
        {"refused": 1},
        {"refused": "", "more": 1},
    ],
    ids=repr,
)
def test_an_answer_of_another_form_is_no_answer(child: Child, answer: Any) -> None:
    frame = numbered(1, answer)
    with pytest.raises(CandidateDied, match="no answer"):
        run(child, f"import os\nos.write(3, {frame!r})\nimport time\ntime.sleep(5)")


def test_endless_words_in_an_error_are_cut(child: Child) -> None:
    frame = numbered(1, {"error": (["E" * 9999] * 99, "m" * 9999, "t" * 9999)})
    with pytest.raises(CandidateError) as caught:
        run(child, f"import os\nos.write(3, {frame!r})\nimport time\ntime.sleep(5)")
    assert len(caught.value.kinds) == 20
    assert len(caught.value.message) == len(caught.value.trace) == 2000
    assert len(str(caught.value)) < 2200


class TestAZygoteOfItsOwn:
    """What ends a zygote is tried on one that nobody else needs."""

    def test_its_death_is_the_graders_error(self) -> None:
        with Zygote() as zygote:
            with zygote.child() as child:
                run(child, "import os, time\ndef f():\n    os.kill(os.getppid(), 9); time.sleep(9)")
                pid = child._pid
                with pytest.raises(GraderError, match="the grading process is gone"):
                    child.candidate("f").foresee(asking((), ()))
            with pytest.raises(GraderError):
                zygote.child()
            until = time.monotonic() + 5
            while not gone(pid):
                assert time.monotonic() < until

    def test_its_end_is_the_end_of_its_children(self) -> None:
        with Zygote() as zygote:
            child = zygote.child()
            child._send([wire.pack({"do": "run", "source": "while True: pass", "label": ""})], 1)
            time.sleep(0.1)
        assert gone(child._pid)
        assert gone(zygote._process.pid)
        with pytest.raises(GraderError):
            child.close()
        assert not Path(child._folder).exists()

    def test_a_zygote_that_cannot_start_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(remote.ENVIRONMENT, "PYTHONHASHSEED", "nonsense")
        with pytest.raises(GraderError, match="PYTHONHASHSEED"):
            Zygote()
