"""Work beside a rank that computes: on cores that are free, and like any other as soon as that is too slow."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import threading
import time

import pytest

from vidcls.data import background
from vidcls.data.background import SCHED_IDLE, Background

PATIENCE = 60.0  # seconds, for other processes of the machine
pytestmark = pytest.mark.skipif(SCHED_IDLE is None, reason="SCHED_IDLE is Linux's")


def policy() -> tuple[int, bool]:
    """The calling thread's, and whether it is the main one."""
    return os.sched_getscheduler(0), threading.current_thread() is threading.main_thread()


def run(beside: Background) -> tuple[int, bool]:
    return beside.run(policy, instead=lambda: (-1, False))


def test_after_a_short_call_the_next_leaves_the_cores_to_others() -> None:
    beside = Background(PATIENCE)
    assert run(beside) == (os.SCHED_OTHER, True)
    assert run(beside) == (SCHED_IDLE, False)
    assert run(beside) == (SCHED_IDLE, False)
    assert policy() == (os.SCHED_OTHER, True)
    beside.hurry()
    assert run(beside) == (os.SCHED_OTHER, True)


def test_a_long_call_is_followed_by_an_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "SHORT_SECONDS", 0.02)

    def long() -> None:
        until = time.thread_time() + 0.025
        while time.thread_time() < until:
            pass

    beside = Background(PATIENCE)
    run(beside)
    beside.run(long, instead=long)
    assert run(beside) == (os.SCHED_OTHER, True)
    assert run(beside) == (SCHED_IDLE, False)


def test_an_error_comes_out_of_the_thread() -> None:
    beside = Background(PATIENCE)
    run(beside)
    with pytest.raises(ZeroDivisionError):
        beside.run(lambda: 1 // 0, instead=lambda: 0)
    assert run(beside) == (SCHED_IDLE, False)


def test_a_parent_hurries_its_children() -> None:
    beside = Background(PATIENCE)
    run(beside)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        for _ in range(2):
            there.send(run(beside))
            there.recv()

    process = context.Process(target=child)
    process.start()
    there.close()
    assert here.poll(60)
    assert here.recv() == (SCHED_IDLE, False)
    beside.hurry()
    here.send(None)
    assert here.poll(60)
    assert here.recv() == (os.SCHED_OTHER, True)
    here.send(None)
    process.join(10)
    assert process.exitcode == 0


def test_a_call_that_finds_no_core_is_replaced() -> None:
    beside, done = Background(patience=0.2), threading.Event()
    run(beside)
    assert beside.run(lambda: done.wait(60) and "late", instead=lambda: "instead") == "instead"
    assert run(beside) == (os.SCHED_OTHER, True)
    done.set()


def test_the_thread_keeps_its_disk_priority() -> None:
    """SCHED_IDLE would bring the idle class, which is served when nobody else wants the disk."""
    beside = Background(PATIENCE)
    run(beside)

    def priority() -> str:
        done = subprocess.run(
            ["ionice", "-p", str(threading.get_native_id())], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert beside.run(priority, instead=str) == "best-effort: prio 4"
