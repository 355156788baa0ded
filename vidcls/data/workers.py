"""Worker processes that may crash or hang one at a time."""

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import TimeoutError as TaskTimeoutError
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

Task = TypeVar("Task")
Result = TypeVar("Result")
TASKS_IN_FLIGHT = 16  # per worker: enough that a slow task does not stop the others, little enough to stay small
START_SECONDS = 10.0  # of all workers, at most


@dataclass(frozen=True)
class Lost:
    """A task without a result."""

    reason: str


def run_all(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, seconds: float
) -> Generator[Result | Lost, None, None]:
    """function(task) for each task, in order; Lost where it crashed its worker, ran out of memory or time.

    Any other exception goes on. seconds: for one task. Closing the generator ends the workers.
    """
    if workers == 0:
        for task in tasks:
            yield function(task)
        return
    # forkserver: a plain fork of a process with threads (the pool's, a progress bar's) can deadlock in the child.
    context = multiprocessing.get_context("forkserver")
    ready = context.Semaphore(0)
    pool = ProcessPool(max_workers=workers, context=context, initializer=_report, initargs=(ready,))
    in_flight: deque[ProcessFuture] = deque()
    coming = iter(tasks)

    def schedule(count: int) -> None:
        for task in islice(coming, count):
            in_flight.append(pool.schedule(function, args=(task,), timeout=seconds))

    def wait_until_started() -> None:
        # A worker that is stopped while it starts, since the others did all the work, dies with a traceback.
        until = time.monotonic() + START_SECONDS
        for _ in range(workers):
            ready.acquire(timeout=max(0.0, until - time.monotonic()))

    try:
        schedule(TASKS_IN_FLIGHT * workers)
        while in_flight:
            yield _outcome(in_flight.popleft(), seconds)
            schedule(1)
        wait_until_started()
    except GeneratorExit:  # also after the last outcome, when nobody asks whether there is another
        wait_until_started()
        raise
    finally:
        pool.stop()
        pool.join()


def _report(ready: Any) -> None:
    ready.release()


def _outcome(future: ProcessFuture, seconds: float) -> Any:
    try:
        return future.result()
    except TaskTimeoutError:
        return Lost(f"took more than {seconds:g} seconds")
    except ProcessExpired as error:
        return Lost(f"crashed its worker process (exit code {error.exitcode})")
    except MemoryError:
        return Lost("ran out of memory")
