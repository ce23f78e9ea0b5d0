"""Attacks on the machine: signals, files to read and to write, the network, other processes."""

from __future__ import annotations

import textwrap

from autograder.attacks.attack import Attack, at_once, in_call

SIGNALS = "signals"
READING = "reading files"
WRITING = "writing files"
NETWORK = "the network"
PROCESSES = "other processes"

# Functions of the C library for those that Python does not offer.
LIBC = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
def call(x86, other, *arguments):
    return libc.syscall(x86 if X86 else other, *arguments)
"""


def native(code: str) -> dict[str, str]:
    """Cells that use system calls as the cell is run."""
    return at_once(LIBC + textwrap.dedent(code))


ATTACKS = (
    Attack(
        "kills its parent",
        SIGNALS,
        "Sends every signal to its parent, to the first process and to the grader.",
        at_once("""
            import signal
            for pid in (os.getppid(), 1, KNOWN["grader"]):
                for number in signal.valid_signals():
                    try: os.kill(pid, number)
                    except (ProcessLookupError, PermissionError): pass
        """),
    ),
    Attack(
        "kills everybody",
        SIGNALS,
        "Kills every process that it may, itself last.",
        in_call("""
            import signal
            try: os.kill(-1, signal.SIGKILL)
            except OSError: pass
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try: signal.pidfd_send_signal(os.pidfd_open(int(pid)), signal.SIGKILL)
                except OSError: pass
            os.killpg(0, signal.SIGKILL)
        """),
    ),
    Attack(
        "no death with the parent",
        SIGNALS,
        "Takes back that it dies with its parent, and leaves its session and process group.",
        at_once("""
            import ctypes, threading, time
            ctypes.CDLL(None).prctl(1, 0)
            ctypes.CDLL(None).prctl(15, b"@MARK@")
            for leave in (os.setsid, lambda: os.setpgid(0, 0)):
                try: leave()
                except OSError: pass
            threading.Thread(target=time.sleep, args=[600], name="@MARK@").start()
        """),
    ),
    Attack(
        "reads the checks",
        READING,
        "Looks for the source of the checks, and for compiled copies of it.",
        at_once("""
            for folder in (KNOWN["checks"], KNOWN["checks"] + "/__pycache__"):
                try: found = os.listdir(folder)
                except OSError: continue
                if found: brag(found)
        """),
    ),
    Attack(
        "reads the course",
        READING,
        "Reads the gradebook, the solutions and what a neighbour handed in.",
        at_once("""
            for path in KNOWN["files"]:
                if found := readable(path): brag((path, found))
            for path in (KNOWN["course"], KNOWN["outside"]):
                if os.path.exists(path): brag(path)
        """),
    ),
    Attack(
        "reads secrets of this machine",
        READING,
        "Reads keys and tokens in every home, passwords, and disks.",
        at_once("""
            import glob
            names = (".ssh", ".aws", ".netrc", ".git-credentials", ".config", ".bash_history")
            for home in ("/root", "/home/*", KNOWN["home"]):
                for name in names:
                    if found := glob.glob(f"{home}/{name}"): brag(found)
            for path in ("/etc/shadow", "/etc/passwd", "/var", "/dev/mem", "/dev/sda", "/dev/vda"):
                if os.path.exists(path): brag(path)
            for path in ("/proc/kcore", "/proc/kmsg", os.path.join("/proc/1/root", "etc/passwd")):
                if readable(path): brag(path)
        """),
    ),
    Attack(
        "reads environments",
        READING,
        "Reads the environment and the memory of every process, for a token of the grader's.",
        at_once("""
            import glob
            for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/task/*/environ"):
                if KNOWN["variable"].encode() in readable(path): brag(path)
            if KNOWN["variable"] in os.environ: brag("the environment")
            for pid in filter(str.isdigit, os.listdir("/proc")):
                if int(pid) == os.getpid(): continue
                for name in ("mem", "maps", "stack", "syscall", "auxv"):
                    if readable(f"/proc/{pid}/{name}"): brag((pid, name))
                try: brag(os.readlink(f"/proc/{pid}/fd/3"))
                except OSError: pass
        """),
    ),
    Attack(
        "finds what was left",
        READING,
        "Looks everywhere for what a friend may have left who was graded before.",
        at_once("""
            import glob
            own = os.path.basename(os.getcwd())
            for folder in ("/tmp", "/dev/shm", "/dev/mqueue", "/var/tmp", "/run", "/dev"):
                for path in glob.glob(folder + "/*") + glob.glob(folder + "/.*"):
                    name = os.path.basename(path)
                    if folder == "/dev" and not name.startswith("zq") or name == own: continue
                    if any(f"{it}/".startswith(f"{path}/") for it in KNOWN["shown"]): continue
                    if not name.startswith(("matplotlib-", "torchinductor_")): brag(path)
        """),
    ),
    Attack(
        "leaves a locked folder",
        READING,
        "Leaves answers for a friend in folders that nobody may enter or remove.",
        at_once("""
            for place in ("/tmp", "/dev/shm", "/dev", "/dev/mqueue", "."):
                try:
                    os.mkdir(place + "/@MARK@")
                    open(place + "/@MARK@/answers", "w").write("42")
                    os.chmod(place + "/@MARK@", 0)
                except OSError: pass
        """),
    ),
    Attack(
        "links and handles to outside",
        READING,
        "Reaches for files outside by links, by handles, and over the roots of other processes.",
        native("""
            for number, path in enumerate(KNOWN["files"]):
                for make in (os.symlink, os.link):
                    try: make(path, f"/tmp/@MARK@{number}")
                    except OSError: continue
                    if found := readable(f"/tmp/@MARK@{number}"): brag(found)
                for root in ("/proc/1/root", "/proc/1/cwd", "/newroot", "/oldroot", "/tmp/../.."):
                    if found := readable(root + path): brag(found)
            if call(304, 265, -100, ctypes.create_string_buffer(128), 0) >= 0: brag("a handle")
        """),
    ),
    Attack(
        "writes outside",
        WRITING,
        "Writes into the gradebook, the course, homes and folders for everybody.",
        at_once("""
            for path in KNOWN["files"]:
                try: os.close(os.open(path, os.O_RDWR | os.O_APPEND))
                except OSError: continue
                brag(path)
            places = [KNOWN["outside"], KNOWN["course"], KNOWN["home"], "/", "/etc", "/usr"]
            for folder in (*places, "/root", "/var/tmp", "/proc", "/dev", "/sys/fs/cgroup"):
                try: open(folder + "/@MARK@", "w").write("here")
                except OSError: continue
                if not folder.startswith("/tmp/"): brag(folder)  # /tmp is its own: see what is left
            open("/tmp/@MARK@", "w").write("this stays inside")
        """),
    ),
    Attack(
        "poisons the library",
        WRITING,
        "Changes the library, Python and what Python runs at every start.",
        at_once("""
            import site, fewer.quantization, torch
            places = [os.path.dirname(module.__file__) for module in (fewer, torch, os)]
            places += [sys.prefix, KNOWN["checks"], os.path.dirname(KNOWN["checks"])]
            for folder in places + site.getsitepackages():
                for name in ("@MARK@.pth", "@MARK@.py", "__pycache__/@MARK@.pyc"):
                    try: open(os.path.join(folder, name), "w").close()
                    except OSError: continue
                    brag((folder, name))
            for path in (fewer.quantization.__file__, torch.__file__, os.__file__, sys.executable):
                try: os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
                except OSError: continue
                brag(path)
        """),
    ),
    Attack(
        "settings of the kernel",
        WRITING,
        "Opens the kernel's settings for writing, such as the program that is run at a crash.",
        at_once("""
            import glob
            paths = ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/mtrr"]
            paths += ["/proc/1/oom_score_adj", "/proc/1/comm", "/proc/1/timerslack_ns"]
            for path in paths + glob.glob("/proc/sys/**", recursive=True):
                try: os.close(os.open(path, os.O_WRONLY))
                except OSError: continue
                brag(path)
        """),
    ),
    Attack(
        "mounts and roots",
        WRITING,
        "Mounts, unmounts, changes its root, makes devices and namespaces.",
        native("""
            tried = {
                "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
                "remount": lambda: libc.mount(b"none", b"/usr", None, 32 | 4096, None),
                "umount": lambda: libc.umount2(KNOWN["checks"].encode(), 2),
                "chroot": lambda: libc.chroot(b"/tmp"),
                "pivot_root": lambda: call(155, 41, b"/tmp", b"/tmp"),
                "unshare": lambda: libc.unshare(0x10000000),
                "clone": lambda: call(56, 220, 0x10000000 | 17, 0, 0, 0, 0),
                "setns": lambda: libc.setns(os.open("/proc/self/ns/user", os.O_RDONLY), 0),
                "mknod": lambda: libc.mknod(b"/tmp/@MARK@", 0o60666, 0xFE00),
                "open_tree": lambda: call(428, 428, -100, b"/", 1),
                "fsopen": lambda: call(430, 430, b"tmpfs", 0),
                "keyctl": lambda: call(250, 219, 0, -3, 1),
                "bpf": lambda: call(321, 280, 0, 0, 0),
                "io_uring": lambda: call(425, 425, 1, ctypes.create_string_buffer(256)),
                "userfaultfd": lambda: call(323, 282, 0),
                "sethostname": lambda: libc.sethostname(b"mine", 4),
                "setuid": lambda: libc.setresuid(12345, 12345, 12345),
            }
            for name, attempt in tried.items():
                if attempt() >= 0: brag(name)
        """),
    ),
    Attack(
        "connects to the grader",
        NETWORK,
        "Sends its mark to servers of this machine: TCP, UDP, sockets in files and without.",
        at_once("""
            import socket
            address = ("127.0.0.1", KNOWN["port"])
            for family, kind, address in (
                (socket.AF_UNIX, socket.SOCK_STREAM, KNOWN["socket"]),
                (socket.AF_UNIX, socket.SOCK_STREAM, KNOWN["abstract"]),
                (socket.AF_INET, socket.SOCK_STREAM, address),
                (socket.AF_INET, socket.SOCK_DGRAM, address),
            ):
                try:
                    with socket.socket(family, kind) as sock:
                        sock.settimeout(0.2)
                        sock.connect(address)
                        sock.send(b"@MARK@")
                except OSError: continue
                if kind == socket.SOCK_STREAM: brag(address)
        """),
    ),
    Attack(
        "calls home",
        NETWORK,
        "Asks for names, and connects to the world, over IPv4 and IPv6.",
        at_once("""
            import socket
            for name in ("example.com", "localhost.localdomain"):
                try: brag(socket.getaddrinfo(name, 80))
                except OSError: pass
            for family, host in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
                try:
                    with socket.socket(family, socket.SOCK_DGRAM) as sock:
                        sock.connect((host, 80))
                        brag(host)
                except OSError: pass
        """),
    ),
    Attack(
        "other families of sockets",
        NETWORK,
        "Opens raw sockets, and sockets of families that no namespace holds: to the hypervisor.",
        at_once("""
            import socket
            for family in [*range(3, 10), 11, 12, 13, *range(17, 46)]:
                for kind in range(1, 6):
                    try: socket.socket(family, kind).close()
                    except OSError: continue
                    brag((family, kind))
            for family in (socket.AF_INET, socket.AF_INET6):
                try: socket.socket(family, socket.SOCK_RAW, 1)
                except OSError: continue
                brag("raw sockets")
        """),
    ),
    Attack(
        "fork bomb",
        PROCESSES,
        "Forks, and each fork forks.",
        native("""
            import subprocess
            spawn = lambda: os.posix_spawn("/bin/true", ["true"], {})
            for start in (os.fork, os.forkpty, spawn, lambda: subprocess.Popen(["true"])):
                try: started = start()
                except OSError: continue
                if started == 0: os._exit(0)
                brag(started)
            for flags in (17, 0x100 | 17, 0x4000 | 0x100 | 17, 0x8000 | 17, 0x80000000 | 17):
                started = call(56, 220, flags, 0, 0, 0, 0)
                if started == 0: os._exit(0)
                if started > 0: brag(started)
        """),
    ),
    Attack(
        "orphans",
        PROCESSES,
        "Leaves a process that nobody waits for, to work on after grading.",
        in_call("""
            import ctypes, multiprocessing, time
            ctypes.CDLL(None).prctl(15, b"@MARK@")
            try:
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0:
                        ctypes.CDLL(None).prctl(15, b"@MARK@")
                        time.sleep(600)
                    os._exit(0)
            except OSError: pass
            multiprocessing.get_context("fork").Process(target=time.sleep, args=[600]).start()
        """),
    ),
    Attack(
        "another program",
        PROCESSES,
        "Becomes another program that keeps the connection to the grader.",
        in_call("""
            code = "import os; os.write(3, bytes([9, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]) + b'true')"
            os.set_inheritable(3, True)
            os.execv(sys.executable, [sys.executable, "-c", code])
        """),
    ),
    Attack(
        "programs that become root",
        PROCESSES,
        "Becomes sudo, su, mount, or bubblewrap itself.",
        in_call("""
            import shutil
            os.set_inheritable(3, True)
            commands = ["sudo -n id", "su -c id", "pkexec id", "newuidmap 1 0 0 1"]
            commands.append("bwrap --unshare-all --bind / / true")
            first = len(repr(args)) % len(commands)
            for name, *more in map(str.split, commands[first:] + commands[:first]):
                if path := shutil.which(name): os.execv(path, [name, *more])
        """),
    ),
    Attack(
        "pries into the zygote",
        PROCESSES,
        "Attaches to the first process, and reads and writes its memory.",
        native("""
            for request in (16, 0x4206, 0):
                if libc.ptrace(request, 1, 0, 0) >= 0: brag("ptrace")
            here = ctypes.create_string_buffer(64)
            part = ctypes.byref((ctypes.c_size_t * 2)(ctypes.addressof(here), 64))
            for numbers in ((310, 270), (311, 271)):
                if call(*numbers, 1, part, 1, part, 1, 0) >= 0: brag(numbers)
            if call(438, 438, os.pidfd_open(1), 3, 0) >= 0: brag("pidfd_getfd")
            for name in ("mem", "maps", "environ", "fd/3", "fdinfo/3", "root", "cwd"):
                try: brag(os.open("/proc/1/" + name, os.O_RDONLY))
                except OSError: pass
        """),
    ),
    Attack(
        "starves the zygote",
        PROCESSES,
        "Gives the first process other limits, another priority, another processor.",
        native("""
            import resource
            tried = {
                "limits": lambda: resource.prlimit(1, resource.RLIMIT_NOFILE, (4, 4)),
                "priority": lambda: os.setpriority(os.PRIO_PROCESS, 1, 19),
                "everybody's priority": lambda: os.setpriority(os.PRIO_USER, 0, 19),
                "processor": lambda: os.sched_setaffinity(1, {0}),
                "scheduler": lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)),
            }
            if call(251, 30, 1, 1, 0x6000) >= 0: brag("priority at the disk")
            for name, attempt in tried.items():
                try: attempt()
                except OSError: continue
                # The wall may say yes and do nothing.
                if name != "scheduler" or os.sched_getscheduler(1) == os.SCHED_IDLE: brag(name)
        """),
    ),
)
