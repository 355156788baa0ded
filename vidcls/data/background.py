"""Reading in the moments in which a computing rank leaves a core free.

On a CPU, loader workers want the cores that the rank computes with, and each of its matrix products waits for the
slowest of its threads: a worker that takes one core for a millisecond holds up all of them. Between products there are
moments in which most cores have nothing to do. Under Linux's SCHED_IDLE a thread runs in those, and leaves at once when
another wants the core (sched(7)).

Where busy processes that are not the rank's leave no core free at all, such a thread gets some 0.3 % of one. So it is
used for short work only, and no longer once the rank says that it waits.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
SHORT_SECONDS = 0.1  # of a core; at 0.3 % of one half a minute, which is within data_timeout
SCHED_IDLE: int | None = getattr(os, "SCHED_IDLE", None)  # Linux


class Background:
    """Made before worker processes are forked, so that `hurry` in the parent reaches them."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1)
        self._thread: ThreadPoolExecutor | None = None
        self._seconds = float("inf")  # of a core, that the last call took

    def hurry(self) -> None:
        """From now on calls run as any other code does."""
        self._shared[0] = 1

    @property
    def hurried(self) -> bool:
        return bool(self._shared[0])

    def run(self, function: Callable[[], Result]) -> Result:
        """function(), in a thread that leaves the cores to others if the call before was short, else in this one."""
        if SCHED_IDLE is None or self.hurried or self._seconds > SHORT_SECONDS:
            return self._timed(function)
        if self._thread is None:
            # A thread of its own: without privileges there is no way back from SCHED_IDLE.
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="background", initializer=_leave_cores_to_others)
        return self._thread.submit(self._timed, function).result()

    def _timed(self, function: Callable[[], Result]) -> Result:
        start = time.thread_time()
        try:
            return function()
        finally:
            self._seconds = time.thread_time() - start


def _leave_cores_to_others() -> None:
    assert SCHED_IDLE is not None
    with contextlib.suppress(OSError):  # a sandbox that forbids it: an ordinary thread, then
        os.sched_setscheduler(0, SCHED_IDLE, os.sched_param(0))  # 0: this thread
