"""Workers ahead of their consumer: order, errors, deaths, ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from vidcls.data import ahead as ahead_module
from vidcls.data.ahead import Ahead, WorkerError, worker_place


class OddError(Exception):
    """Cannot be pickled: its arguments are not what it is made of."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def do(number: int) -> tuple[int, int]:
    if number == 7:
        raise KeyError("seven")
    if number == 8:
        raise OddError(8, 8)
    return number, os.getpid()


def big(task: bytes) -> bytes:
    return task


def hang(number: int) -> int:
    if number:
        time.sleep(60)
    return number


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        os._exit(5)
    return number


def place(number: int) -> tuple[int, int]:
    return worker_place()


class Poison:
    """Cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("none",)


def swallow(task: object) -> None: ...


def large(path: Path) -> bytes:
    with path.open("a") as file:
        file.write("begun\n")
    return bytes(3_000_000)


def workers_of(process: psutil.Process | None = None) -> list[psutil.Process]:
    return (process or psutil.Process()).children()


@pytest.fixture(autouse=True)
def no_workers_are_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("per_worker", [1, 2])
def test_results_come_in_order_and_each_worker_has_its_turn(workers: int, per_worker: int) -> None:
    done = list(
        Ahead(do, [n for n in range(20) if n not in (7, 8)], workers=workers, per_worker=per_worker, seconds=30)
    )
    assert [number for number, _ in done] == [n for n in range(20) if n not in (7, 8)]
    pids = [pid for _, pid in done]
    assert len({*pids}) == workers
    assert os.getpid() not in pids
    assert pids == [pids[number % workers] for number in range(len(pids))]


def test_no_more_tasks_are_taken_than_may_be_under_way() -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for _ in range(99):
            taken += 1
            yield 0

    ahead = Ahead(do, tasks(), workers=2, per_worker=3, seconds=30)
    assert taken == 6
    for count in range(1, 4):
        next(ahead)
        assert taken == 6 + count
    ahead.close()


def test_workers_know_their_place() -> None:
    assert list(Ahead(place, range(5), workers=3, per_worker=1, seconds=30)) == [(0, 3), (1, 3), (2, 3), (0, 3), (1, 3)]
    assert worker_place() == (0, 1)


def test_a_result_that_nobody_has_taken_yet_keeps_no_task_from_beginning(tmp_path: Path) -> None:
    ahead = Ahead(large, [tmp_path / "log"] * 3, workers=1, per_worker=2, seconds=30)
    until = time.monotonic() + 30
    while not (tmp_path / "log").exists() or (tmp_path / "log").read_text() != "begun\n" * 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert list(map(len, ahead)) == [3_000_000] * 3


def test_a_task_that_cannot_be_read_ends_its_worker_at_once() -> None:
    ahead = Ahead(swallow, [0, Poison()], workers=1, per_worker=2, seconds=30)
    assert next(ahead) is None
    with pytest.raises(WorkerError, match="ended with code 0"):
        next(ahead)
    ahead.close()


def test_closed_there_is_nothing_more() -> None:
    ahead = Ahead(do, range(5), workers=1, per_worker=2, seconds=30)
    assert next(ahead)[0] == 0
    ahead.close()
    assert list(ahead) == []


def test_workers_that_are_closed_end_at_once_whoever_was_forked_later() -> None:
    first = Ahead(do, range(5), workers=2, per_worker=1, seconds=30)
    second = Ahead(do, range(5), workers=2, per_worker=1, seconds=30)
    processes = [*first._processes]
    next(first), next(second)
    first.close()
    assert [process.exitcode for process in processes] == [0, 0]
    second.close()


def test_no_tasks_no_results() -> None:
    assert list(Ahead(do, [], workers=2, per_worker=2, seconds=30)) == []


def test_an_error_comes_in_its_turn_and_the_next_result_after_it() -> None:
    ahead = Ahead(do, range(6, 10), workers=1, per_worker=2, seconds=30)
    assert next(ahead)[0] == 6
    with pytest.raises(KeyError, match="seven") as caught:
        next(ahead)
    (note,) = caught.value.__notes__
    assert note.startswith("in a loader worker:")
    assert 'raise KeyError("seven")' in note
    with pytest.raises(RuntimeError, match="OddError: 8 and 8"):
        next(ahead)
    assert next(ahead)[0] == 9
    assert next(ahead, None) is None


def test_tasks_and_results_larger_than_a_socket_holds_do_not_wait_for_each_other() -> None:
    tasks = [bytes([n]) * 4_000_000 for n in range(8)]
    ahead = Ahead(big, tasks, workers=1, per_worker=4, seconds=30)
    assert list(ahead) == tasks


@pytest.mark.parametrize(
    ("tasks", "word"), [([0, 1, 2, 0], r"was killed by signal 9 \(Killed\)"), ([0, 1, 3, 0, 0, 0], "ended with code 5")]
)
def test_a_death_is_told_where_its_result_is_waited_for(tasks: list[int], word: str) -> None:
    ahead = Ahead(die, tasks, workers=1, per_worker=2, seconds=30)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(WorkerError, match=word):
        next(ahead)
    ahead.close()


def test_a_death_within_a_result_is_one() -> None:
    ahead = Ahead(big, [bytes(50_000_000)], workers=1, per_worker=1, seconds=30)
    (worker,) = multiprocessing.active_children()
    assert ahead._ends[0].poll(30)  # it has begun to send
    worker.kill()
    with pytest.raises(WorkerError, match=r"was killed by signal 9 \(Killed\)"):
        next(ahead)
    ahead.close()


def test_a_worker_that_gives_nothing_is_told_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "END_SECONDS", 0.5)
    ahead = Ahead(hang, [0, 1], workers=1, per_worker=2, seconds=2)
    assert next(ahead) == 0
    with pytest.raises(WorkerError, match="gave nothing for 2 seconds"):
        next(ahead)
    start = time.monotonic()
    ahead.close()
    assert time.monotonic() - start < 20


def test_workers_end_when_nobody_refers_to_them() -> None:
    ahead = Ahead(do, range(5), workers=2, per_worker=1, seconds=30)
    workers = workers_of()
    assert len(workers) == 2
    next(ahead)
    del ahead
    assert psutil.wait_procs(workers, 10)[1] == []


def test_workers_die_with_a_rank_that_is_killed() -> None:
    script = """
    import os
    from tests.data.test_ahead import Ahead, hang
    ahead = Ahead(hang, [0, 0, 1, 1], workers=2, per_worker=2, seconds=30)
    print(next(ahead), flush=True)
    next(ahead), next(ahead)
    """
    rank = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "0\n"
    workers = workers_of(psutil.Process(rank.pid))
    assert len(workers) == 2
    rank.kill()
    rank.communicate(timeout=30)
    assert psutil.wait_procs(workers, 10)[1] == []


def test_a_fork_that_inherits_workers_does_not_end_them() -> None:
    ahead = Ahead(do, range(5), workers=1, per_worker=1, seconds=30)
    other = multiprocessing.get_context("fork").Process(target=partial(ahead.close))
    other.start()
    other.join(30)
    assert other.exitcode == 0
    assert [number for number, _ in ahead] == [*range(5)]
