"""Work beside a rank that computes: on cores that are free, and like any other as soon as that is too slow."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

import pytest

from vidcls.data import background
from vidcls.data.background import SCHED_IDLE, Background

pytestmark = pytest.mark.skipif(SCHED_IDLE is None, reason="SCHED_IDLE is Linux's")


def policy() -> tuple[int, bool]:
    """The calling thread's, and whether it is the main one."""
    return os.sched_getscheduler(0), threading.current_thread() is threading.main_thread()


def test_after_a_short_call_the_next_leaves_the_cores_to_others() -> None:
    beside = Background()
    assert beside.run(policy) == (os.SCHED_OTHER, True)
    assert beside.run(policy) == (SCHED_IDLE, False)
    assert beside.run(policy) == (SCHED_IDLE, False)
    assert policy() == (os.SCHED_OTHER, True)
    beside.hurry()
    assert beside.run(policy) == (os.SCHED_OTHER, True)


def test_a_long_call_is_followed_by_an_ordinary_one() -> None:
    def long() -> None:
        until = time.thread_time() + 1.2 * background.SHORT_SECONDS
        while time.thread_time() < until:
            pass

    beside = Background()
    beside.run(policy)
    beside.run(long)
    assert beside.run(policy) == (os.SCHED_OTHER, True)
    assert beside.run(policy) == (SCHED_IDLE, False)


def test_an_error_comes_out_of_the_thread() -> None:
    beside = Background()
    beside.run(policy)
    with pytest.raises(ZeroDivisionError):
        beside.run(lambda: 1 // 0)
    assert beside.run(policy) == (SCHED_IDLE, False)


def test_a_parent_hurries_its_children() -> None:
    beside = Background()
    beside.run(policy)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        for _ in range(2):
            there.send(beside.run(policy))
            there.recv()

    process = context.Process(target=child)
    process.start()
    assert here.recv() == (SCHED_IDLE, False)
    beside.hurry()
    here.send(None)
    assert here.recv() == (os.SCHED_OTHER, True)
    here.send(None)
    process.join(10)
    assert process.exitcode == 0
