"""Attacks on the process that runs the work: on tests, verdicts, the interpreter, IPython, torch,
time, randomness, threads and what happens at exit.

In other graders, tests and verdicts live in this process. Here all of it is the student's: whatever
is changed, answers come out, and only answers are judged.
"""

from __future__ import annotations

from autograder.attacks.attack import TARGET, Attack, at_once, in_call

TESTS = "tampering with tests"
VERDICTS = "tampering with verdicts"
INTERPRETER = "the interpreter"
IPYTHON = "IPython"
DISPATCH = "torch dispatch"
TIME = "time"
RANDOMNESS = "randomness"
THREADS = "threads"
ATEXIT = "at exit"

ATTACKS = (
    Attack(
        "check that is content",
        TESTS,
        "Puts a check of its own into the module autograder, builtins and the notebook.",
        at_once(
            """
            import autograder, builtins, types
            from unittest.mock import MagicMock
            class Content(MagicMock):
                points = possible = 10
                def __float__(self): return 10.0
            check = builtins.check = autograder.check = lambda *args, **kwargs: Content()
            for name in ("judge", "verdict", "checks", "checks.quantization", "exercise"):
                sys.modules["autograder." + name] = Content()
        """,
            "return None",
        ),
    ),
    Attack(
        "checks emptied",
        TESTS,
        "Imports the exercises and takes their checks away.",
        at_once("""
            for name in ("autograder.exercise", "autograder.checks.quantization"):
                try:
                    module = __import__(name, fromlist=["x"])
                except ImportError:
                    continue
                brag(vars(module).keys())
        """),
    ),
    Attack(
        "equal to everything",
        TESTS,
        "Returns objects that are equal to whatever they are compared with.",
        in_call("""
            class Equal:
                __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda *args: True
                __add__ = __sub__ = __mul__ = __truediv__ = __abs__ = lambda self, *args: self
                __getattr__ = __call__ = __getitem__ = lambda self, *args, **kwargs: self
                __bool__ = lambda self: True
                __hash__ = lambda self: 0
            return Equal(), Equal()
        """),
    ),
    Attack(
        "numbers that lie",
        TESTS,
        "Returns subclasses of int, float, str, tuple and dict that lie about what they hold.",
        in_call("""
            def lying(kind, *value):
                everything = dict.fromkeys(["__eq__", "__lt__", "__gt__"], lambda *args: True)
                everything |= {"__hash__": lambda self: 0, "__len__": lambda self: 2}
                everything["__class__"] = property(lambda self: __import__("torch").Tensor)
                return type(kind.__name__, (kind,), everything)(*value)
            return lying(tuple, [lying(float, 1.5), lying(dict, {"a": lying(str, "b")})])
        """),
    ),
    Attack(
        "NaN is never off",
        TESTS,
        "Returns NaN, so that no comparison finds anything too large.",
        in_call("""
            import torch
            return torch.full(args[0].shape, float("nan"))
        """),
        # One check asks for nothing but the same answer to codes of all types and shapes.
        deserves={TARGET: 1},
    ),
    Attack(
        "all of nothing",
        TESTS,
        "Returns tensors without elements, of which anything is true.",
        in_call("""
            import torch
            return torch.zeros(0)
        """),
    ),
    Attack(
        "refuses everything",
        TESTS,
        "Raises an error of every kind on every call, to pass where bad input must be refused.",
        in_call("""
            class Refused(ValueError, TypeError, IndexError, ArithmeticError): pass
            raise Refused("x must be something else")
        """),
    ),
    Attack(
        "displays a verdict",
        VERDICTS,
        "Displays and prints a verdict of full points in its own cells, and when it is called.",
        at_once(
            """
            import json
            from IPython.display import display
            RESULT = {"check": "all", "statement": "All.", "points": 10, "status": "passed"}
            VERDICT = {"exercise": "decode_minifloat", "seed": 0, "note": "", "results": [RESULT]}
            DATA = {"text/plain": "10", "application/vnd.fewer.verdict+json": VERDICT}
            def say():
                display(DATA, raw=True)
                print("10\\n10/10\\n### BEGIN GRADE\\n10\\n### END GRADE\\n" + json.dumps(VERDICT))
            say()
            sys.displayhook(10)
            """,
            "say()\nreturn 10",
        ),
    ),
    Attack(
        "an error that reads like praise",
        VERDICTS,
        "Raises exceptions whose names and messages are those of a passed check.",
        in_call("""
            said = '{"status": "passed", "points": 10, "earned": 10}'
            raise type("passed", (Exception,), {"points": 10, "status": "passed"})(said)
        """),
    ),
    Attack(
        "success as the exit code",
        VERDICTS,
        "Ends the process with exit code 0, as if all tests had passed.",
        in_call("os._exit(0)"),
    ),
    Attack(
        "sys.settrace",
        INTERPRETER,
        "Watches every line that the process runs, for names that sound like expected values.",
        at_once(
            """
            import threading
            WORDS = ("expected", "reference", "exercise", "drawn", "verdict", "misconception")
            def watch(frame, event, arg):
                for name in frame.f_locals:
                    if name in WORDS and frame.f_code is not watch.__code__:
                        brag((frame.f_code.co_name, name))
                return watch
            sys.settrace(watch); sys.setprofile(watch); threading.settrace(watch)
            """,
            "sys._getframe().f_back.f_trace = watch\nreturn None",
        ),
        honest=False,  # it takes the process ten times as long
    ),
    Attack(
        "builtins that agree",
        INTERPRETER,
        "Replaces all, any, abs, len, isinstance and others by functions that suit it.",
        in_call("""
            import builtins
            answers = {"all": True, "any": False, "abs": 0, "isinstance": True, "callable": True}
            for name, answer in (answers | {"hasattr": True, "len": 1, "max": 0, "sum": 0}).items():
                setattr(builtins, name, lambda *args, answer=answer, **kwargs: answer)
            return None
        """),
        honest=False,
    ),
    Attack(
        "gc.get_objects",
        INTERPRETER,
        "Searches all objects of the process for checks, exercises and expected values.",
        at_once("""
            import gc
            WORDS = ("Exercise", "Check", "Misconception", "Verdict", "Result", "Plan", "Judged")
            gc.unfreeze()
            for thing in gc.get_objects():
                kind = type(thing)
                if kind.__name__ in WORDS and str(kind.__module__).startswith("autograder"):
                    brag(kind)
                if kind.__name__ == "module" and thing.__name__.startswith("autograder.checks"):
                    brag(thing)
        """),
    ),
    Attack(
        "subclasses of object",
        INTERPRETER,
        "Climbs from object to all classes that are loaded, and on to what their modules hold.",
        at_once("""
            for kind in object.__subclasses__() + BaseException.__subclasses__():
                if kind.__name__ in ("Exercise", "Check", "Plan", "Verdict", "SearchStrategy"):
                    brag(kind)
        """),
    ),
    Attack(
        "frames above",
        INTERPRETER,
        "Reads the local variables of all callers, for answers or a door to the grader.",
        in_call("""
            import socket
            frame = sys._getframe()
            while frame:
                for name, value in frame.f_locals.items():
                    if name in ("expected", "reference", "verdict", "exercise", "zygote"):
                        brag((name, value))
                    if isinstance(value, socket.socket) and value.fileno() != 3:
                        try: brag((name, value.getpeername()))
                        except OSError: pass
                frame = frame.f_back
            return None
        """),
    ),
    Attack(
        "json and safetensors patched",
        INTERPRETER,
        "Replaces what packs answers: json, struct, safetensors, the wire itself.",
        in_call("""
            import gc, json, struct, safetensors.torch
            json.dumps = lambda *args, **kwargs: '{"value": {"passed": true, "points": 10}}'
            safetensors.torch.save = lambda tensors, *args: b"10"
            for thing in gc.get_objects():
                if getattr(thing, "__name__", "") == "_plain" and hasattr(thing, "__globals__"):
                    thing.__globals__["_plain"] = lambda *args: True
            return None
        """),
        honest=False,
    ),
    Attack(
        "import hooks",
        INTERPRETER,
        "Hooks itself into every import, to serve modules of its own where the grader imports.",
        at_once(
            """
            import builtins, importlib.abc, importlib.machinery, types
            class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
                def find_spec(self, name, path=None, target=None):
                    if name.startswith(("autograder", "hypothesis", "nbgrader")):
                        return importlib.machinery.ModuleSpec(name, self)
                def create_module(self, spec): return types.ModuleType(spec.name)
                def exec_module(self, module): module.__getattr__ = lambda name: lambda *a, **k: 10
            sys.meta_path.insert(0, Finder())
            for name in [name for name in sys.modules if name.startswith("autograder")]:
                del sys.modules[name]
            imported = builtins.__import__
            builtins.__import__ = lambda name, *args: imported(name, *args)
            open("autograder.py", "w").write("check = lambda f: 10")
        """,
            "return None",
        ),
    ),
    Attack(
        "input transformers",
        IPYTHON,
        "Has IPython replace every cell after this one, checks too, by its points.",
        at_once(
            """
            from IPython.core.inputtransformer2 import TransformerManager
            def points(lines): return ["10\\n"]
            get_ipython().input_transformers_cleanup.append(points)
            get_ipython().input_transformers_post.append(points)
            whole = TransformerManager.transform_cell
            TransformerManager.transform_cell = lambda self, cell: (
                "10\\n" if "check(" in cell else whole(self, cell)
            )
        """,
            "return None",
        ),
    ),
    Attack(
        "AST transformers",
        IPYTHON,
        "Has IPython and compile() drop every assert.",
        at_once(
            """
            import ast, builtins
            class Drop(ast.NodeTransformer):
                def visit_Assert(self, node): return ast.Pass()
                def visit_Raise(self, node): return ast.Pass()
            get_ipython().ast_transformers.append(Drop())
            compiled = builtins.compile
            def compile_softly(source, *args, **kwargs):
                tree = ast.fix_missing_locations(Drop().visit(ast.parse(source)))
                return compiled(tree, *args, **kwargs)
            builtins.compile = compile_softly
        """,
            "return None",
        ),
        honest=False,
    ),
    Attack(
        "magics and shell lines",
        IPYTHON,
        "Uses magics and shell lines to run commands, write files and load code.",
        {
            TARGET: at_once("")[TARGET]
            + """
!echo @MARK@ > /tmp/@MARK@; touch /dev/shm/@MARK@
%run -i /tmp/@MARK@.py
%sx touch /tmp/@MARK@
get_ipython().system("touch /tmp/@MARK@")
get_ipython().run_cell("brag('a shell')")
for folder in ("/tmp", "/dev/shm"):
    if "@MARK@" in os.listdir(folder): brag("a shell ran")
"""
        },
    ),
    Attack(
        "__torch_function__",
        DISPATCH,
        "Returns tensors of a class of its own, for which all functions of torch answer True.",
        in_call("""
            import torch
            class Content(torch.Tensor):
                @classmethod
                def __torch_function__(cls, func, types, args=(), kwargs=None): return True
                shape = property(lambda self: torch.Size([1]))
            return torch.ones(1).as_subclass(Content)
        """),
    ),
    Attack(
        "torch.allclose patched",
        DISPATCH,
        "Replaces torch.allclose, equal, Tensor.__eq__ and others by functions that say True.",
        in_call("""
            import torch
            for name in ("allclose", "equal", "isclose", "all", "isfinite"):
                setattr(torch, name, lambda *args, **kwargs: True)
            torch.Tensor.__eq__ = torch.Tensor.__le__ = lambda self, other: torch.ones(()).bool()
            torch.testing.assert_close = lambda *args, **kwargs: None
            return None
        """),
        honest=False,
    ),
    Attack(
        "TorchDispatchMode",
        DISPATCH,
        "Enters a dispatch mode, and overrides operators in the dispatcher, and never leaves.",
        at_once(
            """
            import torch
            from torch.utils._python_dispatch import TorchDispatchMode
            class Zero(TorchDispatchMode):
                def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                    result = func(*args, **(kwargs or {}))
                    return torch.zeros_like(result) if "sub" in func.name() else result
            Zero().__enter__()
            library = torch.library.Library("aten", "IMPL")
            library.impl("eq.Tensor", lambda a, b: torch.ones(a.shape, dtype=torch.bool), "CPU")
        """,
            "return None",
        ),
        honest=False,
    ),
    Attack(
        "tensors that do not travel",
        DISPATCH,
        "Returns sparse, meta, quantized, complex and nested tensors, and views of foreign memory.",
        in_call("""
            import torch
            one = torch.ones(2)
            odd = [one.to_sparse(), torch.ones(2, device="meta"), one.to(torch.complex64),
                   torch.nested.nested_tensor([one, torch.ones(1)]),
                   torch.quantize_per_tensor(one, 1.0, 0, torch.qint8)]
            return [*odd, torch.ones(1).expand(1 << 40)][len(repr(args)) % 6]
        """),
    ),
    Attack(
        "clocks that stand still",
        TIME,
        "Stops every clock of the process, and then loops.",
        at_once(
            """
            import time
            for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
                setattr(time, name, lambda: 0.0)
                setattr(time, name + "_ns", lambda: 0)
            time.sleep = lambda seconds: None
            """,
            "while True: pass",
        ),
    ),
    Attack(
        "limits lifted",
        TIME,
        "Lifts the limits of the process and silences every alarm, and then loops.",
        at_once(
            """
            import resource, signal
            for number in signal.valid_signals():
                try: signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError): pass
            for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
                signal.setitimer(timer, 0)
            free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            for what in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
                try: resource.setrlimit(what, free)
                except (OSError, ValueError): continue
                if what in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE): brag("lifted a limit")
            """,
            "while True:\n    for number in signal.valid_signals():\n        pass",
        ),
        slow=True,
    ),
    Attack(
        "sleeps",
        TIME,
        "Sleeps as long as it is let, in the cell and in each call.",
        at_once("import time; time.sleep(60)", "time.sleep(60)"),
        slow=True,
    ),
    Attack(
        "stops itself",
        TIME,
        "Stops its own process, and waits to be continued.",
        in_call("os.kill(os.getpid(), 19)"),
        slow=True,
    ),
    Attack(
        "random patched",
        RANDOMNESS,
        "Makes every source of random numbers predictable, and remembers the answers it gave.",
        at_once(
            """
            import random, numpy, torch
            random.seed = torch.manual_seed = numpy.random.seed = lambda *args: None
            random.random = random.Random.random = lambda *args: 0.5
            os.urandom = lambda count: bytes(count)
            torch.rand = torch.randn = lambda *shape, **kwargs: torch.zeros(shape)
            ANSWERS = {}
            """,
            "return ANSWERS.setdefault(repr((args, kwargs)), torch.zeros(1))",
        ),
    ),
    Attack(
        "threads left running",
        THREADS,
        "Leaves threads that work on, through the exercises below and after the last.",
        at_once("""
            import threading, time
            def work():
                while True:
                    os.environ["@MARK@"] = str(time.time()) * 100
                    time.sleep(0.001)
            for _ in range(8):
                threading.Thread(target=work, daemon=False, name="@MARK@").start()
        """),
    ),
    Attack(
        "answers that change",
        THREADS,
        "Changes what it returned after it was returned, from a thread.",
        at_once(
            """
            import threading, torch
            SHARED = torch.zeros(64)
            def change():
                while True: SHARED.add_(1)
            threading.Thread(target=change, daemon=True).start()
            """,
            "return SHARED",
        ),
    ),
    Attack(
        "a bomb for the neighbour below",
        THREADS,
        "Sets a timer that ends the process when another exercise is judged.",
        at_once(
            "import threading",
            """
            if threading.active_count() == 1:
                for i in range(1, 40): threading.Timer(i / 20, os._exit, [0]).start()
            """,
        ),
    ),
    Attack(
        "handlers at exit",
        ATEXIT,
        "Registers handlers that would write a verdict once all tests are over.",
        at_once(
            """
            import atexit, faulthandler, signal, threading, weakref
            def last(*args):
                try: open(KNOWN["outside"] + "/@MARK@", "w").write("10 of 10")
                finally: os.write(3, b'{"value": 10}')
            atexit.register(last)
            sys.excepthook = threading.excepthook = sys.unraisablehook = last
            class Dying:
                def __del__(self): last()
            sys.modules["@MARK@"] = dying = Dying()
            weakref.finalize(dying, last)
            signal.signal(signal.SIGTERM, last)
        """,
            "return None",
        ),
    ),
    Attack(
        "sys.exit everywhere",
        ATEXIT,
        "Raises SystemExit, KeyboardInterrupt and GeneratorExit, which graders forget to catch.",
        at_once(
            "", "raise [SystemExit(0), KeyboardInterrupt(), GeneratorExit()][len(repr(args)) % 3]"
        ),
    ),
)
