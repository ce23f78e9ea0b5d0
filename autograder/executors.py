"""Where submissions are judged: in this process, in several of this machine, or on a Dask cluster.

All three are executors as `concurrent.futures` has them, so grading itself is written once.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

ALONE = 30  # a class so small is judged by one process: others take seconds to start
FORK = "forkserver"
PREFIX = "dask://"
CONNECT_SECONDS = 5
TRIES = 3  # workers that may die at a submission before it is given up


class NoExecutor(Exception):
    """The place to run does not answer, or cannot be used; the message says what to do."""


class Inline(Executor):
    """Does what it is given at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        from autograder import worker

        worker.close()


def processes(jobs: int | None, submissions: int) -> int:
    """How many processes to judge in: ``jobs``, or one a core in a class that is worth it."""
    if jobs is not None or submissions < ALONE:
        return jobs or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local(jobs: int, walled: bool) -> Executor:
    """``jobs`` processes, each with a warm zygote; for one, this process itself."""
    if jobs == 1:
        return Inline()
    from autograder import worker

    prepare()
    return ProcessPoolExecutor(jobs, multiprocessing.get_context(FORK), worker.start, (walled,))


def prepare() -> None:
    """Start the server that `local` has its processes from, if there is none yet. It imports what
    they need while its caller does other things.

    It imports torch once and never uses it: a process that did may hang after a fork, and one that
    starts from nothing imports for seconds.
    """
    checks = pkgutil.iter_modules(importlib.import_module("autograder.checks").__path__)
    needed = ["autograder.worker", "autograder.submission"]
    needed += [f"autograder.checks.{module.name}" for module in checks]
    multiprocessing.get_context(FORK).set_forkserver_preload(needed)
    forkserver.ensure_running()


@contextmanager
def dask(address: str) -> Iterator[tuple[Executor, int]]:
    """A Dask cluster, and how many submissions it judges at a time.

    Args:
        address: ``dask://HOST:PORT`` of its scheduler. The course must be installed on the workers
            in the same version as here; they need no other part of this machine.

    Raises:
        NoExecutor: Dask is not installed, or there is no scheduler at that address.
    """
    try:
        from distributed import Client
    except ImportError:
        raise NoExecutor(
            f"{address} needs Dask, which is not installed: pip install 'fewer[dask]'"
        ) from None
    try:
        client = Client("tcp://" + address.removeprefix(PREFIX), timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise NoExecutor(f"no Dask scheduler answers at {address} ({error})") from error
    with client:
        workers = len(client.nthreads())  # each judges one submission at a time
        if not workers:
            raise NoExecutor(f"the Dask scheduler at {address} has no workers")
        yield client.get_executor(pure=False, retries=TRIES), workers
