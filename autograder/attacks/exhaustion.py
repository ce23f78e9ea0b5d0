"""Attacks that use up what there is: memory, disk, handles, threads, output, time, patience."""

from __future__ import annotations

from autograder.attacks.attack import PAIR, Attack, at_once, in_call
from autograder.attacks.machine import native

MEMORY = "exhausting memory"
DISK = "exhausting the disk"
HANDLES = "exhausting handles and threads"
OUTPUT = "exhausting output"
GRADER = "exhausting the grader"

ATTACKS = (
    Attack(
        "more and more lists",
        MEMORY,
        "Takes memory until there is none left.",
        in_call("""
            kept = []
            while True: kept.append(bytes(64 << 20))
        """),
    ),
    Attack(
        "a tensor larger than the machine",
        MEMORY,
        "Asks for 100 TB at once, in torch, in NumPy and of the kernel.",
        in_call("""
            import mmap, numpy, torch
            for take in (lambda: torch.empty(10**13, 10), lambda: numpy.zeros(10**14, dtype=bool),
                         lambda: mmap.mmap(-1, 100 << 40), lambda: mmap.mmap(-1, 8 << 30)):
                try: take()
                except (RuntimeError, MemoryError, OSError, ValueError): continue
                brag("more than the limit")
        """),
    ),
    Attack(
        "memory in files without names",
        MEMORY,
        "Fills files that lie in memory and have no name, which no limit of a process counts.",
        native("""
            try: file = os.memfd_create("@MARK@")
            except OSError: pass
            else: brag(os.write(file, bytes(1 << 20)))
            if call(447, 447, 0) >= 0: brag("memfd_secret")
        """),
    ),
    Attack(
        "memory that outlives its process",
        MEMORY,
        "Takes shared memory, semaphores and message queues, which stay when it is gone.",
        native("""
            for numbers, arguments in {
                (29, 194): (0, 1 << 20, 0o1600), (64, 190): (0, 1, 0o1600), (68, 186): (0, 0o1600),
                (240, 180): (b"@MARK@", 0o102, 0o600, None),
            }.items():
                if call(*numbers, *arguments) >= 0: brag(numbers)
        """),
    ),
    Attack(
        "no end of recursion",
        MEMORY,
        "Calls itself without an end, in Python and below it, until the stack is gone.",
        in_call("""
            sys.setrecursionlimit(10**9)
            def deeper(x): return deeper(deeper(x) if x else [x])
            nested = []
            for _ in range(10**6): nested = [nested]
            repr(nested)
            return deeper(1)
        """),
    ),
    Attack(
        "fills the disk",
        DISK,
        "Writes into /tmp and /dev/shm until nothing fits, also behind names that are gone.",
        at_once("""
            held = []
            for folder in ("/tmp", "/dev/shm", "/dev", "."):
                try:
                    for number in range(1000):
                        held.append(open(f"{folder}/@MARK@{number}", "wb", buffering=0))
                        os.remove(held[-1].name)
                        if held[-1].write(bytes(16 << 20)) < 16 << 20: break
                        if number > 100: brag(folder)
                except OSError: pass
        """),
    ),
    Attack(
        "more names than a command takes",
        DISK,
        "Leaves thousands of files with long names, for whoever must clean up.",
        at_once("""
            for number in range(12000):
                open("/tmp/" + f"@MARK@{number:05d}".ljust(240, "x"), "w").close()
        """),
    ),
    Attack(
        "a million names",
        DISK,
        "Leaves as many empty files as fit into a minute, which take no room that is counted.",
        at_once("""
            import time
            until = time.monotonic() + 25
            folder = number = 0
            while time.monotonic() < until:
                folder += 1
                os.mkdir(f"/tmp/@MARK@{folder}")
                for number in range(10000):
                    os.mknod(f"/tmp/@MARK@{folder}/{number}")
        """),
        slow=True,
    ),
    Attack(
        "a locked disk",
        DISK,
        "Fills the disk inside a folder that nobody may enter, and leaves it to the next ones.",
        at_once("""
            for folder in ("/tmp/@MARK@", "/dev/shm/@MARK@"):
                os.mkdir(folder)
                try:
                    for number in range(5):
                        open(f"{folder}/{number}", "wb", buffering=0).write(bytes(64 << 20))
                except OSError: pass
                os.chmod(folder, 0)
        """),
    ),
    Attack(
        "folders in folders",
        DISK,
        "Nests folders thousands deep, which tools that walk through them do not survive.",
        at_once("""
            os.mkdir("/tmp/@MARK@")
            os.chdir("/tmp/@MARK@")
            for _ in range(3000):
                os.mkdir("d")
                os.chdir("d")
        """),
    ),
    Attack(
        "all file handles",
        HANDLES,
        "Opens files, sockets and pipes until the machine has none left.",
        at_once("""
            import socket
            kept = []
            for start in (lambda: open("/dev/null"), os.pipe, socket.socketpair):
                try:
                    for _ in range(2000): kept.append(start())
                    brag("a thousand handles")
                except OSError: pass
        """),
    ),
    Attack(
        "too many threads",
        HANDLES,
        "Starts a thousand threads, that others may start no process.",
        at_once("""
            import threading, time
            threading.stack_size(32768)
            try:
                for _ in range(1000):
                    threading.Thread(target=time.sleep, args=[3600], daemon=True).start()
            except RuntimeError: pass
            # Who counts them looks now and then.
            time.sleep(0.5)
            if threading.active_count() > 900: brag("a thousand threads")
        """),
    ),
    Attack(
        "prints without an end",
        OUTPUT,
        "Prints gigabytes, to all outputs, by all ways.",
        at_once("""
            import logging, warnings
            for _ in range(200):
                much = "x" * (1 << 20)
                os.write(1, much.encode()); os.write(2, much.encode())
                print(much); print(much, file=sys.stderr)
                display(much); warnings.warn(much); logging.error(much)
        """),
    ),
    Attack(
        "an answer of 200 MB",
        OUTPUT,
        "Returns tensors that are larger than any notebook.",
        in_call("import torch\nreturn torch.zeros(50 << 20), torch.zeros(1 << 20)"),
    ),
    Attack(
        "an answer of a million parts",
        OUTPUT,
        "Returns lists, dicts and texts of millions of parts, and parts in parts.",
        in_call("""
            nested = []
            for _ in range(1000): nested = [nested, nested]
            many = {str(i): i for i in range(10**5)}
            odd = [list(range(10**6)), many, "x" * 10**7, nested, 10**5000]
            return odd[len(repr(args)) % len(odd)], None
        """),
    ),
    Attack(
        "an answer of thousands of tensors",
        OUTPUT,
        "Returns thousands of small tensors, each of which would be printed whole.",
        in_call("import torch\nreturn [torch.rand(64) for _ in range(4000)]"),
    ),
    Attack(
        "keys that fill a page",
        OUTPUT,
        "Returns a dict whose keys would fill the feedback page, if it listed them.",
        in_call("return {'@MARK@' * 1000 + str(i): i for i in range(300)}"),
    ),
    Attack(
        "an exception of 100 MB",
        OUTPUT,
        "Raises exceptions that are too large to tell.",
        in_call("raise type('E' * 10**6, (Exception,), {})('x' * (100 << 20))"),
    ),
    Attack(
        "an exception that cannot be shown",
        OUTPUT,
        "Raises exceptions whose words fail, are no words, or raise others.",
        in_call("""
            class Odd(Exception):
                def __str__(self): return [1, "\\ud800", None, b"", 10**9][len(repr(args)) % 5]
                __repr__ = __format__ = __str__
                @property
                def __traceback__(self): raise self
            raise Odd()
        """),
    ),
    Attack(
        "an exception that never ends",
        OUTPUT,
        "Raises an exception that takes for ever to put into words.",
        in_call("""
            class Endless(Exception):
                def __str__(self):
                    while True: pass
            raise Endless()
        """),
    ),
    Attack(
        "loops for ever",
        GRADER,
        "Loops, and catches whatever would end the loop.",
        in_call("""
            while True:
                try:
                    while True: pass
                except BaseException: pass
        """),
    ),
    Attack(
        "one outer product",
        GRADER,
        "Returns scales of odd shapes, whose product with the codes has no place in memory.",
        in_call(
            """
            import torch
            codes = torch.zeros(args[0].shape, dtype=torch.uint8)
            ones = [1] * args[0].dim()
            zero_point = torch.zeros((30000, 1, *ones), dtype=torch.int32)
            return codes, torch.ones((30000, *ones)), zero_point
            """,
            "quantize_asymmetric",
        ),
    ),
    Attack(
        "a billion rows of nothing",
        GRADER,
        "Returns tensors without elements that have a billion rows, for whoever walks over them.",
        in_call(
            """
            import torch
            return torch.zeros(1 << 40, 0, dtype=torch.int8), torch.zeros(0, 1 << 40)
        """,
            PAIR,
        ),
    ),
    Attack(
        "sixty dimensions",
        GRADER,
        "Returns tensors of sixty dimensions, of a few elements.",
        in_call(
            "import torch\nreturn torch.zeros([1] * 60, dtype=torch.int8), torch.ones([1] * 60)",
            PAIR,
        ),
    ),
    Attack(
        "slow enough",
        GRADER,
        "Answers each call right before the grader loses patience.",
        at_once("import time", "time.sleep(9)"),
        slow=True,
    ),
)
