"""A guarded process that says nothing any more has its last words said for it, and is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import session_processes, wait_until_gone
from vidcls.faults.board import Board, Status
from vidcls.faults.exits import Exit
from vidcls.faults.guard import DATA_GRACE_SECONDS, Limits
from vidcls.faults.processes import forks_of, start_of, words_of
from vidcls.options import RunOptions

ROOT = Path(__file__).parents[2]
RANK = """
import ctypes, os, resource, sys, time
from pathlib import Path
from vidcls.faults import guard
with guard.guarded(Path(sys.argv[1]), guard.Limits(start=30, data=1, step=1, stop=float(sys.argv[3]))):
    guard.joined(3, 4, "abc")
    act = sys.argv[2]
    with guard.stoppable():
        guard.phase("data" if act in ("sleep", "lock", "stopped") else "start", 17, "shard-000001.tar: clip_a")
        print("ready", flush=True)
        if act == "lock":
            c, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
            c.pthread_mutex_lock(mutex)
            c.pthread_mutex_lock(mutex)  # for ever, and holding Python's lock
        elif act == "segfault":
            ctypes.string_at(0)
        elif act == "raise":
            raise MemoryError("no room")
        elif act == "mute":
            guard.write_report = None
            raise MemoryError("no room")
        elif act == "starve":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
            hoard = []
            while True:
                hoard.append(bytes(64))
        elif act == "finish":
            sys.exit(0)
        elif act == "fork":
            if os.fork() == 0:
                time.sleep(60)
            os.kill(os.getpid(), 9)
        elif act == "obey":
            while guard.stop_wanted() is None:
                time.sleep(0.05)
            sys.exit(75)
        time.sleep(60)
"""


def start(folder: Path, act: str, stop_seconds: float = 20) -> subprocess.Popen:
    words = [sys.executable, "-c", RANK, str(folder), act, str(stop_seconds)]
    errors = (folder.parent / "errors").open("w")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def end_of(process: subprocess.Popen) -> int:
    """The exit code; nothing of the session may outlive it for long."""
    code = process.wait(30)
    left = wait_until_gone(process.pid, 15)
    for other in session_processes(process.pid):
        other.kill()
    assert not left
    return code


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (folder / "failures").glob("*.json")]


def stacks(folder: Path) -> str:
    (path,) = (folder / "failures").glob("*.stacks.txt")
    return path.read_text()


pytestmark = pytest.mark.launch


def test_a_phase_past_its_limit(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "sleep")
    assert end_of(process) == Exit.STUCK
    (report,) = reports(tmp_path / "out")
    expected = {"kind": "stuck", "code": 72, "rank": 3, "world_size": 4, "launch": "abc", "phase": "data", "step": 17}
    assert {name: report[name] for name in expected} == expected
    assert report["clips"] == "shard-000001.tar: clip_a"
    assert report["message"] == "phase data took longer than 1 s"
    assert report["memory"]["available"] > 0
    assert report["disk"]["free"] > 0
    assert "time.sleep" in stacks(tmp_path / "out") or "<string>" in stacks(tmp_path / "out")
    assert "rank 3 on" in (tmp_path / "errors").read_text()


def test_a_deadlock_that_holds_pythons_lock(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "lock")
    assert end_of(process) == -signal.SIGKILL
    (report,) = reports(tmp_path / "out")
    assert report["kind"] == "stuck"
    assert "<string>" in stacks(tmp_path / "out")


def test_a_process_that_is_stopped(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "stopped")
    process.send_signal(signal.SIGSTOP)
    assert end_of(process) == -signal.SIGKILL
    (report,) = reports(tmp_path / "out")
    assert "the process is stopped (SIGSTOP, or a debugger)" in report["message"]


def test_a_process_that_is_killed_and_what_it_forked(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "fork")
    assert end_of(process) == -signal.SIGKILL
    (report,) = reports(tmp_path / "out")
    assert (report["kind"], report["step"]) == ("killed", 17)
    assert "vanished without a word" in report["message"]


def test_a_crash_leaves_its_stacks(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "segfault")
    assert end_of(process) == -signal.SIGSEGV
    (report,) = reports(tmp_path / "out")
    assert report["kind"] == "killed"
    assert "Segmentation fault" in stacks(tmp_path / "out")


def test_an_error_has_the_code_of_its_kind(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "raise")
    assert end_of(process) == Exit.OUT_OF_MEMORY
    (report,) = reports(tmp_path / "out")
    assert (report["kind"], report["message"]) == ("out_of_memory", "MemoryError: no room")
    assert 'raise MemoryError("no room")' in stacks(tmp_path / "out") or "MemoryError" in stacks(tmp_path / "out")


def test_a_process_without_any_memory_left(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "starve")
    assert end_of(process) == Exit.OUT_OF_MEMORY
    (report,) = reports(tmp_path / "out")
    assert (report["kind"], report["step"], report["message"]) == ("out_of_memory", 17, "MemoryError")


def test_last_words_that_fail_are_said_by_the_guardian(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "mute")
    assert end_of(process) == Exit.OUT_OF_MEMORY
    (report,) = reports(tmp_path / "out")
    assert (report["kind"], report["code"], report["step"]) == ("out_of_memory", 77, 17)
    assert report["message"].startswith("MemoryError: no room; written by its guardian: the process vanished")


def test_who_ends_well_leaves_nothing(tmp_path: Path) -> None:
    assert end_of(start(tmp_path / "out", "finish")) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_is_heard(tmp_path: Path, number: int) -> None:
    process = start(tmp_path / "out", "obey")
    process.send_signal(number)
    assert end_of(process) == Exit.STOPPED
    assert not (tmp_path / "out").exists()


def test_a_second_signal_stops_at_once_but_not_an_echo_of_the_first(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "wait")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.poll() is None
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == 128 + signal.SIGTERM


def test_a_request_to_stop_that_is_not_obeyed_in_time(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "wait", stop_seconds=2)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == Exit.STUCK
    assert reports(tmp_path / "out")[0]["kind"] == "stuck"


def test_limits_are_those_of_the_recipe() -> None:
    options = RunOptions(
        output_dir="x", start_timeout=1, data_timeout=2, step_timeout=3, save_timeout=4, stop_timeout=5
    )
    limits = Limits.from_options(options)
    assert limits == Limits(start=1, data=2 + DATA_GRACE_SECONDS, step=3, save=4, stop=5)
    assert [limits.of(name) for name in ("start", "data", "forward", "backward", "step", "save")] == [1, 12, 3, 3, 3, 4]


def test_the_board_is_read_as_it_was_written() -> None:
    board = Board.create()
    assert Board(board.descriptor).read() is None
    status = Status(rank=2, phase="data", step=5, clips="ü" * 1000, deadline=1.5)
    board.write(status)
    assert Board(board.descriptor).read() == status
    assert board.ordered() == 0
    Board(board.descriptor).order_to_leave(Exit.STUCK)
    assert board.ordered() == Exit.STUCK


def test_a_fork_is_known_by_what_it_shares(tmp_path: Path) -> None:
    words = words_of(os.getpid())
    board, other = Board.create(), Board.create()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        assert forks_of(os.getpid(), words, board.descriptor) == [child]
        later = Board.create()  # another run's of the same words
        assert forks_of(os.getpid(), words, later.descriptor) == []
        assert forks_of(os.getpid(), ["another"], other.descriptor) == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert start_of(child) is None
