"""The guardian of one rank: a small process that sees what the rank itself no longer can.

A rank that is stopped, deadlocked or killed says nothing. Its guardian reads the board (board.py), and

- past a phase's limit has the rank dump the stacks of all threads, writes the report, and makes the rank leave;
- the same when the rank's launcher is gone, or another rank has reported its end and this one does not follow;
- writes the last words of a rank that vanished without any.

It ends with its rank.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from vidcls.faults.board import Board, Status
from vidcls.faults.exits import Exit
from vidcls.faults.processes import forks_of, start_of, state_of, words_of
from vidcls.faults.reports import Report, out_of_memory_kills, read_reports, write_report

DUMP_SIGNAL = signal.SIGRTMIN + 5  # a rank answers with the stacks of all its threads, without needing Python's lock
LOOK_SECONDS = 0.5
PEERS_SECONDS = 2.0  # between looks for the reports of other ranks, on a disk that many share
FOLLOW_SECONDS = 15.0  # in which a rank should notice by itself that another one has left
LEAVE_SECONDS = 3.0  # in which a rank that was told to leave does so; then it is killed
ASLEEP_SECONDS = 5.0  # a look that takes longer was held up, not busy
DUMP_SECONDS = 0.5  # for the stacks to be written
MAX_STACKS = 2**20


@dataclass
class Guardian:
    """stacks: the file that the rank's faulthandler writes to. launchers: (pid, start) of what must stay alive."""

    pid: int
    started: int
    board: Board
    stacks: int
    output_dir: Path | None
    launchers: list[tuple[int, int | None]]

    def watch(self) -> None:
        """Until the rank is gone, and what it forked."""
        words = words_of(self.pid)
        self.board.watch()
        self._watch()
        # Loader workers end with their rank, unless they were still being forked.
        until = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < until and start_of(self.pid) == self.started:
            time.sleep(0.1)
        for pid in forks_of(self.pid, words, self.board.descriptor):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _watch(self) -> None:
        ended = os.pidfd_open(self.pid)
        kills_before = out_of_memory_kills()
        status: Status | None = None
        peer_seen, looked = None, 0.0
        deadline, forgiven, last = None, 0.0, time.monotonic()
        while not select.select([ended], [], [], LOOK_SECONDS)[0]:
            status = self.board.read() or status
            if status is None:
                continue
            now = time.monotonic()
            if status.deadline != deadline:
                deadline, forgiven = status.deadline, 0.0
            # Where the guardian itself was stopped, so was the rank: a cluster manager suspends whole jobs.
            forgiven += max(0.0, now - last - ASLEEP_SECONDS)
            last = now
            if deadline is not None and now > deadline + forgiven:
                self._end_stuck(status)
                return
            if status.leaving or status.stopping:
                continue
            if any(start is None or start_of(pid) != start for pid, start in self.launchers):
                self._end(status, "launcher_gone", Exit.PEER_LOST, "the launcher, or the SSH session to it, is gone")
                return
            if peer_seen is None and now - looked > PEERS_SECONDS:
                looked, peer_seen = now, self._peer(status)
                seen_at = now
            if peer_seen is not None and now - seen_at > FOLLOW_SECONDS:
                self._end(status, "peer_lost", Exit.PEER_LOST, peer_seen)
                return
        status = self.board.read() or status
        if status is None or not status.leaving:
            self._report_vanished(status, kills_before)

    def _peer(self, status: Status) -> str | None:
        """The end of another rank of this launch, in words."""
        if self.output_dir is None or not status.launch:
            return None
        for report in read_reports(self.output_dir, status.launch):
            if report["rank"] != status.rank:
                return f"rank {report['rank']} on {report['host']} has left ({report['kind']}: {report['message']})"
        return None

    def _end_stuck(self, status: Status) -> None:
        state = state_of(self.pid)
        if status.leaving:  # all is said: only the interpreter does not come to its end
            self._make_leave(Exit.STUCK)
            return
        about = f"phase {status.phase} took longer than {status.limit:g} s"
        if status.stopping:
            about += ", or the stop that was asked for longer than stop_timeout"
        if state in ("T", "t"):
            about += "; the process is stopped (SIGSTOP, or a debugger)"
        elif state == "D":
            about += "; the process waits for a disk or a network file system"
        if status.code:
            about += f"; it was about to leave ({Exit(status.code).name.lower()}: {status.message})"
        self._end(status, "stuck", Exit.STUCK, about)

    def _end(self, status: Status, kind: str, code: Exit, message: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, DUMP_SIGNAL)
        time.sleep(DUMP_SECONDS)
        self._report(status, kind, code, message)
        self._make_leave(code)

    def _report_vanished(self, status: Status | None, kills_before: int | None) -> None:
        message = "the process vanished without a word: killed from outside (SIGKILL), or it crashed"
        kills = out_of_memory_kills()
        if kills is not None and kills_before is not None and kills > kills_before:
            message += f"; the kernel has meanwhile killed {kills - kills_before} processes for want of memory"
        status = status or Status(rank=-1)
        if status.code:  # it had an error, and did not come to reporting it
            message = f"{status.message}; written by its guardian: {message}"
            self._report(status, Exit(status.code).name.lower(), status.code, message)
        else:
            self._report(status, "killed", 137, message)  # 128 + 9 is what a shell says of a killed process

    def _report(self, status: Status, kind: str, code: int, message: str) -> None:
        stacks = os.pread(self.stacks, MAX_STACKS, 0).decode(errors="replace")
        report = Report(
            launch=status.launch,
            rank=status.rank,
            world_size=status.world_size,
            pid=self.pid,
            kind=kind,
            code=code,
            message=message,
            phase=status.phase,
            step=status.step,
            clips=status.clips,
        )
        report.say(write_report(self.output_dir, report, stacks))

    def _make_leave(self, code: int) -> None:
        """First as it would itself, so that the launcher sees why; then for certain."""
        self.board.order_to_leave(code)
        until = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < until:
            if start_of(self.pid) != self.started:
                return
            time.sleep(0.1)
        if start_of(self.pid) == self.started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def main() -> None:
    # The launcher signals all processes below it at once; the guardian is needed until its rank is gone.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pid, started, board, stacks, output_dir, *launchers = sys.argv[1:]
    if start_of(int(pid)) != int(started):
        return
    Guardian(
        pid=int(pid),
        started=int(started),
        board=Board(int(board)),
        stacks=int(stacks),
        output_dir=Path(output_dir) if output_dir else None,
        launchers=[(int(each), start_of(int(each))) for each in launchers],
    ).watch()


if __name__ == "__main__":
    main()
