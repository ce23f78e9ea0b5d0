"""Where submissions are judged: in this process, in several of this machine, or on a Dask cluster.

All three are executors as `concurrent.futures` has them, so grading itself is written once.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from autograder import worker

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
        worker.close()


def local(jobs: int, walled: bool) -> Executor:
    """``jobs`` processes, each with a warm zygote; for one, this process itself."""
    if jobs == 1:
        return Inline()
    # From a server that imported torch once and never used it: a process that did may hang after
    # a fork, and one that starts from nothing imports for seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["autograder.worker", "autograder.submission"])
    return ProcessPoolExecutor(jobs, context, worker.start, (walled,))


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
