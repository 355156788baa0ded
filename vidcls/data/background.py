"""Reading in the moments in which a computing rank leaves a core free.

On a CPU, loader workers want the cores that the rank computes with, and each of its matrix products waits for the
slowest of its threads: a worker that takes one core for a millisecond holds up all of them. Between products there are
moments in which most cores have nothing to do. Under Linux's SCHED_IDLE a thread runs in those, and leaves at once when
another wants the core (sched(7)).

Where busy processes that are not the rank's leave no core free at all, such a thread gets 0.3 % of one or less, and may
keep Python's lock meanwhile. So it has short work only, there is an end to waiting for it, and a rank that waits says
so.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import psutil

Result = TypeVar("Result")
SHORT_SECONDS = 0.1  # of a core, that work like it took before
HURRY_SECONDS = 60.0
SCHED_IDLE: int | None = getattr(os, "SCHED_IDLE", None)  # Linux


class Background:
    """Made before worker processes are forked, so that `hurry` in the parent reaches them.

    patience: seconds after which a call is too long in coming.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        # Of time.monotonic(), which all processes of a host share.
        self._hurry_until = memoryview(mmap.mmap(-1, 8)).cast("d")
        self._thread: ThreadPoolExecutor | None = None
        self._seconds = float("inf")  # of a core, that the last call took
        self._given_up = False

    def hurry(self) -> None:
        """For a minute calls run as any other code does."""
        self._hurry_until[0] = time.monotonic() + HURRY_SECONDS

    @property
    def hurried(self) -> bool:
        return time.monotonic() < self._hurry_until[0]

    def run(self, function: Callable[[], Result], instead: Callable[[], Result]) -> Result:
        """function(), in a thread that leaves the cores to others if the call before was short, else in this one.

        Where the patience ends, instead(), and never again in such a thread; function() goes on meanwhile.
        """
        if SCHED_IDLE is None or self._given_up or self._seconds > SHORT_SECONDS or self.hurried:
            return self._timed(function)
        if self._thread is None:
            _keep_disk_priority()
            # A thread of its own: without privileges there is no way back from SCHED_IDLE.
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="background", initializer=_leave_cores_to_others)
        future = self._thread.submit(self._timed, function)
        if not wait([future], self._patience).done:
            self._given_up = True
            return instead()
        return future.result()

    def _timed(self, function: Callable[[], Result]) -> Result:
        start = time.thread_time()
        try:
            return function()
        finally:
            self._seconds = time.thread_time() - start


def seconds_without_core() -> float:
    """That the calling thread was ready and waited for a core, in all; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _keep_disk_priority() -> None:
    """A thread without one of its own has that of its process; else SCHED_IDLE would bring the disk's idle class."""
    process = psutil.Process()
    with contextlib.suppress(OSError, psutil.Error):
        if process.ionice().ioclass == psutil.IOPRIO_CLASS_NONE:
            process.ionice(psutil.IOPRIO_CLASS_BE, 4)  # what it has by default


def _leave_cores_to_others() -> None:
    assert SCHED_IDLE is not None
    with contextlib.suppress(OSError):  # a sandbox that forbids it: an ordinary thread, then
        os.sched_setscheduler(0, SCHED_IDLE, os.sched_param(0))  # 0: this thread
