"""Worker processes that do tasks ahead of whoever wants the results, which come in the order of the tasks.

What torch's DataLoader does, for a consumer that computes on the cores itself: the threads of its queues would take
Python's lock from it at every task, and a worker's death would interrupt whatever it does at that moment. Here it is
the worker that has threads, and a death is noticed by whoever waits for the result.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import torch

from vidcls.faults.processes import die_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")
SETTLE_SECONDS = 0.2
"""Before a fork. After a collective has returned a thread of gloo may still enter Python to drop a tensor; a child that
is forked in that moment inherits a locked list of threads, and CPython 3.11 waits for it in os.fork, for ever."""
END_SECONDS = 5.0  # for the task under way of a worker that is not needed any more
_END = object()  # instead of a task, and of a result
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # that come to all processes of a job, or of a terminal
# A worker closes all that it inherits: one left open would hide from another worker that its rank has closed it.
_rank_ends: weakref.WeakSet[Connection] = weakref.WeakSet()
_place = (0, 1)


def worker_place() -> tuple[int, int]:
    """(number, count) of this worker among those of its `Ahead`; (0, 1) in a process that is none."""
    return _place


class WorkerError(RuntimeError):
    """A worker died, or gave nothing for too long."""


@dataclass(frozen=True)
class _Failed:
    error: Exception


class Ahead(Generic[Task, Result]):
    """An iterator of function(task) for each task, in order; each of `workers` processes has `per_worker` under way.

    The workers are forked at once, and with them whatever function refers to. An exception of function is raised
    where its result would have come. seconds: without a result, after which WorkerError is raised. Tasks and results
    are pickled; another task goes out when a result has come in.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        workers: int,
        per_worker: int,
        seconds: float,
    ) -> None:
        self._tasks = iter(tasks)
        self._seconds = seconds
        self._sent = self._received = 0
        self._ends: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self.close = weakref.finalize(self, _end, self._ends, self._processes, os.getpid())
        """End the workers; waits up to 5 s for their tasks under way. Also happens when nobody refers to this."""
        self.close.atexit = False  # multiprocessing ends them then
        time.sleep(SETTLE_SECONDS)
        # Blocked before the fork, and so in every thread that a worker ever has.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for number in range(workers):
                self._start(function, (number, workers))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for task in islice(self._tasks, workers * per_worker):
            self._send(task)

    def __iter__(self) -> Ahead[Task, Result]:
        return self

    def __next__(self) -> Result:
        if self._received == self._sent or not self.close.alive:
            self.close()
            raise StopIteration
        worker = self._received % len(self._ends)
        if not self._ends[worker].poll(self._seconds):
            raise WorkerError(f"gave nothing for {self._seconds:g} seconds")
        try:
            result = self._ends[worker].recv()
        except (EOFError, OSError):  # before a result, or within one
            raise WorkerError(_how_it_ended(self._processes[worker])) from None
        self._received += 1
        for task in islice(self._tasks, 1):
            self._send(task)
        if isinstance(result, _Failed):
            raise result.error
        return result

    def _start(self, function: Callable[[Task], Result], place: tuple[int, int]) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        _rank_ends.add(ours)
        self._ends.append(ours)
        process = context.Process(target=_work, args=(function, theirs, place, os.getpid()), daemon=True)
        process.start()
        self._processes.append(process)
        theirs.close()

    def _send(self, task: Task) -> None:
        with contextlib.suppress(ConnectionError):  # it has died; what it did before comes first
            self._ends[self._sent % len(self._ends)].send(task)
        self._sent += 1


def _end(ends: list[Connection], processes: list[BaseProcess], parent: int) -> None:
    if os.getpid() != parent:  # a fork that has inherited them
        return
    for end in ends:
        end.close()
    until = time.monotonic() + END_SECONDS
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join(1)  # not for ever, where the kernel keeps it


def _how_it_ended(process: BaseProcess) -> str:
    process.join(1)
    code = process.exitcode
    if code is not None and code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with code {code}"


def _work(function: Callable[[Any], Any], rank: Connection, place: tuple[int, int], rank_pid: int) -> None:
    """What a worker runs. It ends with its rank, or when that says so, and by nobody else: cluster managers signal
    every process of a job, and a rank that is asked to stop still needs its batches for the step under way."""
    global _place
    _place = place
    threading.Thread(target=_obey, args=(rank_pid,), name="signals", daemon=True).start()
    die_with_parent()  # elsewhere than on Linux a worker sees that nobody is at the other end any more
    if os.getppid() != rank_pid:  # it died before the kernel was asked
        os._exit(1)
    for end in list(_rank_ends):
        end.close()
    torch.set_num_threads(1)
    # Threads, so that neither side waits for the other to read, whatever the size of what it sends.
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(rank, tasks), name="tasks", daemon=True).start()
    sender = threading.Thread(target=_send, args=(rank, results), name="results", daemon=True)
    sender.start()
    for task in iter(tasks.get, _END):
        results.put(ForkingPickler.dumps(_outcome(function, task)))
    results.put(_END)
    sender.join()


def _receive(rank: Connection, tasks: queue.SimpleQueue[Any]) -> None:
    try:
        with contextlib.suppress(EOFError, OSError):
            while True:
                tasks.put(rank.recv())
    finally:
        tasks.put(_END)


def _send(rank: Connection, results: queue.SimpleQueue[Any]) -> None:
    try:
        for result in iter(results.get, _END):
            rank.send_bytes(result)
    except OSError:  # nobody wants any more
        os._exit(0)


def _outcome(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except Exception as error:
        error.add_note(f"in a loader worker:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return _Failed(RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        return _Failed(error)


def _obey(rank_pid: int) -> None:
    """A thread: a rank that ends, also one with an error, terminates its workers and waits for them."""
    while True:
        about = signal.sigwaitinfo(SIGNALS)
        if about.si_pid == rank_pid and about.si_signo == signal.SIGTERM:
            os._exit(0)  # anything else would be reported as an accident
