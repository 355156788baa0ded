"""A rank's own side of its guarding: phases with limits, requests to stop, and last words.

`with guarded(output_dir, limits):` goes around everything that a command does after its arguments are read. Inside,
`phase(...)` says what comes now; outside it does nothing, so that the same code runs in a notebook or a test.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from vidcls.faults.board import CLIPS_LENGTH, MESSAGE_LENGTH, Board, Status
from vidcls.faults.causes import RankFailedError, exit_of
from vidcls.faults.exits import Exit
from vidcls.faults.guardian import DUMP_SECONDS, DUMP_SIGNAL, MAX_STACKS
from vidcls.faults.processes import exit_now, forks_of, launchers, rank_from_environment, start_of, words_of
from vidcls.faults.reports import Report, read_reports, write_report
from vidcls.options import RunOptions

STOP_NAME = "STOP"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 5.0  # the launcher and the cluster manager may both signal every process
LOOK_SECONDS = 0.25
LINGER_SECONDS = 4.0  # for which a rank that lost a peer waits, so that the launcher sees the peer's exit code first
GLOO_ADVICE = " This is typically caused by"  # and so on: general, and longer than what happened
GUARDIAN_SECONDS = 20.0  # for the guardian to start on a busy host
DATA_GRACE_SECONDS = 10.0
RESERVE_BYTES, RESERVE_PIECE = 2**21, 2**16  # small pieces come from the heap, where Python finds them again
LEAVE_SECONDS = 60.0  # for leaving the process group and ending the interpreter


@dataclass(frozen=True)
class Limits:
    """Seconds that each phase may take. stop: from a request to stop until the rank is gone."""

    start: float = 1800.0
    data: float = 300.0
    step: float = 600.0
    save: float = 1800.0
    stop: float = 300.0

    @classmethod
    def from_options(cls, options: RunOptions) -> Limits:
        # The loader's own time-out names the worker; the guard is there for a rank that cannot even raise it.
        return cls(
            start=options.start_timeout,
            data=options.data_timeout + DATA_GRACE_SECONDS,
            step=options.step_timeout,
            save=options.save_timeout,
            stop=options.stop_timeout,
        )

    def of(self, phase: str) -> float:
        # A rank waits for the others in a rendezvous, and for its data in an evaluation.
        known = {"data": self.data, "save": self.save, "start": self.start, "evaluate": self.data + self.step}
        return known.get(phase, self.step)


class Guard:
    def __init__(self, output_dir: Path | None, rank: int, limits: Limits, launch: str = "") -> None:
        self.output_dir = output_dir
        self.limits = limits
        self.stop_wanted: str | None = None  # why, once somebody asks
        self._asked_at = 0.0
        self._until = 0.0  # time.monotonic() at which the phase's limit is reached
        self._can_save = False
        self._failing = False
        self._reserve = [bytearray(RESERVE_PIECE) for _ in range(RESERVE_BYTES // RESERVE_PIECE)]  # for last words
        self._status = Status(rank=rank, launch=launch)
        self._lock = threading.Lock()  # main thread and _look; never a signal handler
        self._board = Board.create()
        self._stacks = tempfile.TemporaryFile(prefix="vidcls-stacks-")  # noqa: SIM115 - as long as the process lives

    def start(self) -> None:
        above = launchers()
        if above is None:
            raise RankFailedError("the launcher that started this rank is gone already")
        faulthandler.enable(self._stacks, all_threads=True)
        faulthandler.register(DUMP_SIGNAL, self._stacks, all_threads=True, chain=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        self.phase("start")
        descriptors = (self._board.descriptor, self._stacks.fileno())
        package = Path(__file__).parents[2]
        path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
        words = [sys.executable, "-m", "vidcls.faults.guardian", os.getpid(), start_of(os.getpid()), *descriptors]
        words += [str(self.output_dir.absolute()) if self.output_dir else "", *above]
        guardian = subprocess.Popen(
            [str(word) for word in words],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
        )
        # From here on nothing can happen unseen; a tenth of a second, before the seconds that imports take.
        until = time.monotonic() + GUARDIAN_SECONDS
        while not self._board.is_watched() and guardian.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        threading.Thread(target=self._look, name="guard", daemon=True).start()

    def joined(self, rank: int, world_size: int, launch: str) -> None:
        self._set(rank=rank, world_size=world_size, launch=self.launch or launch)

    @property
    def launch(self) -> str:
        return self._status.launch

    def phase(self, name: str, step: int | None = None, clips: str = "") -> None:
        limit = self.limits.of(name)
        self._until = time.monotonic() + limit
        self._set(phase=name, step=step, clips=clips[:CLIPS_LENGTH], limit=limit)

    def can_save(self, value: bool) -> None:
        """Whether a request to stop finds something that would save and leave; otherwise it ends the rank at once."""
        self._can_save = value

    def request_stop(self, why: str) -> None:
        """Takes no lock, and so may be called by a signal handler; the board hears of it from `_look`."""
        if self.stop_wanted is None:
            self._asked_at = time.monotonic()
            self.stop_wanted = why

    def leave(self) -> None:
        """All is said: what ends the rank now needs no report."""
        with self._lock:
            until = time.monotonic() + LEAVE_SECONDS
            self._status = replace(self._status, phase="leave", leaving=True, limit=LEAVE_SECONDS, deadline=until)
            self._board.write(self._status)

    def fail(self, error: BaseException) -> None:
        """Say why, write the report, and end the process."""
        self._failing = True
        self._reserve.clear()
        code = Exit.OUT_OF_MEMORY  # if there is too little of it to find that out
        try:
            code = exit_of(error)
            self._last_words(error, code)
        except Exception:  # no memory, most likely; the guardian has some, and says what is on the board
            with contextlib.suppress(Exception):
                traceback.print_exc()
        exit_now(code)

    def _last_words(self, error: BaseException, code: Exit) -> None:
        message = ": ".join(filter(None, [type(error).__name__, str(error)])).partition(GLOO_ADVICE)[0].strip()
        self._set(code=int(code), message=message[:MESSAGE_LENGTH])
        with contextlib.suppress(OSError, ValueError):  # whoever read it, ssh perhaps, is gone
            traceback.print_exception(error)
        if code == Exit.PEER_LOST:
            message = self._linger(message)
        status = self._status
        report = Report(
            launch=status.launch,
            rank=status.rank,
            world_size=status.world_size,
            pid=os.getpid(),
            kind=code.name.lower(),
            code=int(code),
            message=message,
            phase=status.phase,
            step=status.step,
            clips=status.clips,
        )
        stacks = "".join(traceback.format_exception(error))
        if code == Exit.DATA:
            stacks += self._stacks_of_forks()
        report.say(write_report(self.output_dir, report, stacks))
        self.leave()

    def _stacks_of_forks(self) -> str:
        """What the loader workers do, by the fault handler that they were forked with."""
        for pid in forks_of(os.getpid(), words_of(os.getpid()), self._board.descriptor):
            with contextlib.suppress(ProcessLookupError):  # several may be dying
                os.kill(pid, DUMP_SIGNAL)
        time.sleep(DUMP_SECONDS)
        dumped = os.pread(self._stacks.fileno(), MAX_STACKS, 0).decode(errors="replace")
        return f"\nloader workers:\n{dumped}" if dumped else ""

    def _linger(self, message: str) -> str:
        """Wait for the launcher, and for the report of the rank that was lost; the message with what that says."""
        until = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < until and self.stop_wanted is None:
            time.sleep(0.2)
        if self.output_dir is None or not self._status.launch:
            return message
        others = [r for r in read_reports(self.output_dir, self._status.launch) if r["rank"] != self._status.rank]
        if not others:
            return message
        first = others[0]
        return f"{message}; first, rank {first['rank']} on {first['host']}: {first['kind']}: {first['message']}"

    def _set(self, **changes: Any) -> None:
        """Change the status and put it on the board."""
        with self._lock:
            if self._status.leaving:
                return
            stopping = self.stop_wanted is not None
            until = min(self._until, self._asked_at + self.limits.stop) if stopping else self._until
            self._status = replace(self._status, **changes, stopping=stopping, deadline=until)
            self._board.write(self._status)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.stop_wanted is None:
            self.request_stop(name)
            if not self._can_save and not self._failing:
                self._leave_at_once(Exit.STOPPED)
        elif time.monotonic() - self._asked_at > SAME_REQUEST_SECONDS:
            self._leave_at_once(128 + number)

    def _leave_at_once(self, code: int) -> None:
        """From a signal handler, which may have interrupted whoever holds the lock."""
        self._status = replace(self._status, leaving=True)
        self._board.write(self._status)
        os._exit(code)

    def _look(self) -> None:
        """A thread: obey the guardian, and the STOP file."""
        looked = 0.0
        while True:
            time.sleep(LOOK_SECONDS)
            if code := self._board.ordered():
                os._exit(code)  # not flushed: another thread may hold the stream
            if self.stop_wanted and not self._status.stopping:
                self._set()
            now = time.monotonic()
            if self._can_save and self.output_dir and self._status.rank == 0 and now - looked > 1.0:
                looked = now
                if (self.output_dir / STOP_NAME).exists():
                    self.request_stop(f"the file {self.output_dir / STOP_NAME}")


_current: Guard | None = None


@contextlib.contextmanager
def guarded(output_dir: Path | None, limits: Limits, launch: str = "") -> Iterator[None]:
    """Guard this process from here on. An error inside ends the process, with a report and an exit code of its kind.

    launch: a text that all ranks of this launch were given, and no others; without it they agree on one as they meet.
    SystemExit and Ctrl-C go on as they are: whoever raises them has said why.
    """
    global _current
    assert _current is None
    guard = _current = Guard(output_dir, rank_from_environment(), limits, launch)
    try:
        guard.start()
        yield
    except (SystemExit, KeyboardInterrupt):
        guard.leave()
        raise
    except BaseException as error:
        guard.fail(error)
    guard.leave()


def phase(name: str, step: int | None = None, clips: str = "") -> None:
    """This rank now does `name`: start, data, forward, backward, step, save or evaluate; its limit begins anew."""
    if _current is not None:
        _current.phase(name, step, clips)


def joined(rank: int, world_size: int, launch: str) -> None:
    """The process group is there. launch: the same text on all its ranks, and on no others; an earlier one stays."""
    if _current is not None:
        _current.joined(rank, world_size, launch)


def launch() -> str:
    return "" if _current is None else _current.launch


def stop_wanted() -> str | None:
    """Why this rank was asked to stop; None when it was not."""
    return None if _current is None else _current.stop_wanted


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, a request to stop only sets `stop_wanted`: whoever looks at it saves and leaves."""
    if _current is not None:
        _current.can_save(True)
    try:
        yield
    finally:
        if _current is not None:
            _current.can_save(False)
