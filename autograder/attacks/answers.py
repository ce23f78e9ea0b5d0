"""Attacks on what is judged, the answers: hiding where they come from, and the protocol they take.

A word on copying. The library is open, its solutions can be read, and a function that was copied
from it is right: no grader can tell it from one that was written, and an instructor sees the copy
in the notebook. So what *calls* the library's own function gets nothing (it raises while it is
judged), and what brings a copy of its code gets what the code is worth. Those that take the copy by
machine are listed with the points they get, so that nobody takes the guard for more than it is.
"""

from __future__ import annotations

import base64
import pickle
import textwrap
from typing import Any

from nbformat import NotebookNode

from autograder.attacks.attack import HEAD, TARGET, Attack, Scene, at_once, in_call

HIDING = "hiding"
COPYING = "copying the library"
PROTOCOL = "guessing the protocol"

FULL = {TARGET: 10}
FRAME = """
import json, struct
def number():
    above = sys._getframe(1)
    while above and not ("number" in above.f_locals and "work" in above.f_locals):
        above = above.f_back
    return above.f_locals["number"] if above else 0
def frame(text, blob=b"", ahead=0):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<III", number() + ahead, len(text), len(blob)) + text + blob
"""


def speaks(code: str, call: str) -> dict[str, str]:
    """Cells that write frames of their own."""
    return at_once(FRAME + textwrap.dedent(code), call)


def answers_by_heart(nb: NotebookNode, scene: Scene) -> None:
    """A table of the right answers to all inputs that students see at home, where the seed is 0."""
    from autograder.candidate import Local
    from autograder.compare import CandidateError
    from autograder.exercise import find
    from autograder.judge import foreseen

    exercise = find(TARGET)
    right = Local(exercise.reference)
    table: dict[str, Any] = {}
    for check in exercise.checks:
        for call in foreseen(exercise, check, 0):
            try:
                table[repr((call.args, call.kwargs))] = right(*call.args, **call.kwargs)
            except CandidateError:
                table[repr((call.args, call.kwargs))] = None
    code = base64.b64encode(pickle.dumps(table)).decode()
    source = HEAD + (
        f"import base64, pickle\nANSWERS = pickle.loads(base64.b64decode('{code}'))\n"
        f"def {TARGET}(*args, **kwargs):\n    known = ANSWERS.get(repr((args, kwargs)), 0)\n"
        "    if known is None: raise ValueError\n    return known\n"
    )
    for cell in nb.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == TARGET:
            cell.source = source.replace("@KNOWN@", "{}")


ATTACKS = (
    Attack(
        "hands in the library",
        HIDING,
        "Imports the library's function under the name of its own.",
        {TARGET: f"{HEAD}from fewer.quantization import {TARGET}"},
    ),
    Attack(
        "aliases",
        HIDING,
        "Calls the library's function by other names: alias, partial, module, default argument.",
        at_once(
            f"""
            import functools, fewer.quantization, fewer.quantization.formats as formats
            from fewer.quantization import {TARGET} as alias
            WAYS = [
                alias, functools.partial(alias), alias.__call__, alias.__get__(None, object),
                functools.wraps(alias)(lambda *a, **k: alias(*a, **k)),
                lambda *a, kept=alias, **k: kept(*a, **k),
                getattr(formats, "{TARGET}"), vars(fewer.quantization)["{TARGET}"],
            ]
            """,
            """
            for way in WAYS:
                try: return way(*args, **kwargs)
                except RuntimeError: pass
            """,
        ),
    ),
    Attack(
        "the library found by gc",
        HIDING,
        "Finds the library's function among all objects, and what wraps or refers to it.",
        at_once(
            f"""
            import gc, types
            gc.unfreeze()
            FOUND = [thing for thing in gc.get_objects() if isinstance(thing, types.FunctionType)
                     and thing.__name__ == "{TARGET}" and "fewer" in str(thing.__module__)]
            FOUND += [getattr(thing, "__wrapped__", thing) for thing in FOUND]
            FOUND += [thing for thing in gc.get_referrers(*FOUND) if callable(thing)]
            """,
            """
            for way in FOUND:
                try: return way(*args, **kwargs)
                except RuntimeError: pass
            """,
        ),
    ),
    Attack(
        "the library through a neighbour",
        HIDING,
        "Has another function of the library call the one that it should write.",
        in_call("""
            from fewer.quantization import formats
            formats.encode_minifloat = lambda codes, *args: codes
            return formats.round_to_minifloat(*args, **kwargs)
        """),
    ),
    Attack(
        "answers by heart",
        HIDING,
        "Knows by heart the right answers to all the inputs that checks draw at home.",
        # What must be refused is a list of few cases, and those it knows.
        {},
        deserves={TARGET: 1},
        forge=answers_by_heart,
    ),
    Attack(
        "right when it counts",
        HIDING,
        "Looks whether it is being graded, and only then brings the answers of the library.",
        in_call(f"""
            import autograder, fewer.quantization
            if not hasattr(autograder, "__path__"):
                return fewer.quantization.{TARGET}(*args, **kwargs)
        """),
    ),
    Attack(
        "not written yet",
        HIDING,
        "Claims that nothing was written yet whenever it does not know an answer.",
        in_call("raise type('NotImplementedError', (ValueError,), {})('not yet')"),
    ),
    Attack(
        "source read and run",
        COPYING,
        "Reads the library's source when it is run, and defines the function from that.",
        {
            TARGET: f"""{HEAD}import inspect, fewer.quantization.formats as formats
exec(inspect.getsource(formats.{TARGET}), vars(formats) | globals(), globals())"""
        },
        deserves=FULL,
    ),
    Attack(
        "code of the function",
        COPYING,
        "Makes a function of its own from the library's code object.",
        {
            TARGET: f"""{HEAD}import types, fewer.quantization.formats as formats
taken = formats.{TARGET}
{TARGET} = types.FunctionType(taken.__code__, vars(formats), "{TARGET}", taken.__defaults__)"""
        },
        deserves=FULL,
    ),
    Attack(
        "library loaded again",
        COPYING,
        "Loads the library's module a second time, while the first is guarded.",
        in_call(f"""
            import importlib.util, fewer.quantization.formats as formats
            spec = importlib.util.spec_from_file_location("again", formats.__file__)
            again = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(again)
            return again.{TARGET}(*args, **kwargs)
        """),
        deserves=FULL,
    ),
    Attack(
        "guard lifted",
        COPYING,
        "Finds among its callers what keeps the library's code, and puts it back.",
        in_call(f"""
            frame = sys._getframe()
            while frame:
                server = frame.f_locals.get("self")
                for function, *kept in getattr(server, "guarded", ()):
                    function.__code__, function.__defaults__, function.__kwdefaults__ = kept
                frame = frame.f_back
            import fewer.quantization
            return fewer.quantization.{TARGET}(*args, **kwargs)
        """),
        deserves=FULL,
    ),
    Attack(
        "answers ahead of time",
        PROTOCOL,
        "Writes answers to questions that are still to come.",
        speaks("", "for i in range(99): os.write(3, frame({'value': [10, 10]}, b'', i))"),
    ),
    Attack(
        "answers that are late",
        PROTOCOL,
        "Writes answers from a thread while the exercises below are judged.",
        speaks(
            "import threading, time",
            """
            def late(first):
                for i in range(10**6):
                    os.write(3, frame({"value": 10.0}, b"", first + i))
                    time.sleep(0.01)
            threading.Thread(target=late, args=[number()], daemon=True).start()
            return None
            """,
        ),
    ),
    Attack(
        "lengths that lie",
        PROTOCOL,
        "Sends frames that claim to be huge, or longer than they are, and stops half-way.",
        speaks(
            "",
            """
            heads = [(0xFFFFFFFF, 0xFFFFFFFF), (1 << 20, 0), (0, 0), (0, 1 << 26), (0x80000000, 1)]
            os.write(3, struct.pack("<III", number(), *heads[len(repr(args)) % len(heads)]) + b"{")
            os._exit(0)
            """,
        ),
    ),
    Attack(
        "frames of garbage",
        PROTOCOL,
        "Sends what is no JSON, or JSON of odd forms: deep, huge numbers, keys twice, NaN.",
        speaks(
            "",
            """
            odd = [
                b"\\xff" * 99, b"[" * 10**6, b"9" * 10**6, b'"\\\\ud800"', b"null",
                b'{"error": []}',
                b'{"value": 1e999, "value": NaN}', b'{"value": {"tensor": [0, false, null]}}',
                b'{"value": {"tuple": 1, "dict": 2}}', b'{"value": {"dict": {"a": {}}}}',
            ]
            os.write(3, frame(odd[len(repr(args)) % len(odd)]))
            return None
            """,
        ),
    ),
    Attack(
        "tensors that lie",
        PROTOCOL,
        "Sends tensors whose headers lie about sizes, offsets and types, or overlap.",
        speaks(
            "",
            """
            def tensor(header, data):
                header = json.dumps(header).encode()
                blob = struct.pack("<Q", len(header)) + header + data
                return frame({"value": {"tensor": [0, False, [1 << 40]]}}, blob)
            def one(dtype, shape, end, data=b"\\2\\3\\4\\5"):
                about = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
                return tensor({"0": about}, data)
            odd = [
                one("F32", [1 << 40], 4), one("F32", [1], 1 << 40), one("BOOL", [4], 4),
                one("F64", [1 << 62, 0], 0, b""), one("F32", [1] * 99, 4), one("F13", [1], 4),
                frame({"value": 1}, struct.pack("<Q", 1 << 63) + b"{}"),
                frame({"value": 1}, b"x" * 7),
            ]
            os.write(3, odd[len(repr(args)) % len(odd)])
            return None
            """,
        ),
    ),
    Attack(
        "errors made to measure",
        PROTOCOL,
        "Sends errors of every kind, where bad input must be refused.",
        speaks(
            "",
            """
            refused = [["ValueError", "TypeError", "IndexError"], "no", ""]
            os.write(3, frame({"error": {"tuple": refused}}))
            return None
            """,
        ),
    ),
    Attack(
        "objects that unpickle",
        PROTOCOL,
        "Returns objects that run code where they are unpickled, copied or shown.",
        in_call("""
            def hit(*args): open(KNOWN["outside"] + "/@MARK@", "w").write("hit")
            class Evil:
                def __reduce__(self): return (os.system, ("touch " + KNOWN["outside"] + "/@MARK@",))
                __reduce_ex__ = lambda self, version: self.__reduce__()
                __deepcopy__ = __copy__ = __getstate__ = lambda self, *args: hit()
            return Evil(), Evil()
        """),
    ),
    Attack(
        "takes the connection",
        PROTOCOL,
        "Closes, copies and redirects the connection to the grader, and reads what comes over it.",
        at_once(
            """
            import socket, threading
            taken = socket.socket(fileno=os.dup(3))
            def listen():
                while True: taken.recv(1 << 16)
            """,
            """
            threading.Thread(target=listen, daemon=True).start()
            os.dup2(os.open("/dev/null", os.O_RDWR), 3)
            return None
            """,
        ),
    ),
    Attack(
        "handles for the grader",
        PROTOCOL,
        "Sends file handles and out-of-band bytes over the connection.",
        at_once(
            "import socket\ntaken = socket.socket(fileno=os.dup(3))",
            """
            handles = [os.open("/dev/zero", os.O_RDONLY) for _ in range(100)]
            socket.send_fds(taken, [b"x" * 8], handles)
            return None
            """,
        ),
    ),
)
