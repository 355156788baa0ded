import os
import signal
import time
from pathlib import Path

import pytest

from vidcls.data.index import ShardIndex
from vidcls.data.shards import ShardReader
from vidcls.inspection import sweep as sweep_module
from vidcls.inspection.sweep import Lost, run_all, sweep


def key_of(reader: ShardReader, sample: int) -> str:
    return reader.index.keys[sample]


def killed_by_3(reader: ShardReader, sample: int) -> str:
    if sample == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return reader.index.keys[sample]


def stuck_in_3(reader: ShardReader, sample: int) -> str:
    if sample == 3:
        time.sleep(600)
    return reader.index.keys[sample]


def without_memory(task: int) -> int:
    if task == 1:
        raise MemoryError
    return task


def with_a_bug(task: int) -> int:
    return 1 // task


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_in_the_order_asked(small_shards: Path, workers: int) -> None:
    keys = ShardIndex.open(small_shards).keys
    samples = [*range(len(keys))][::-1]
    assert list(sweep(small_shards, samples, key_of, workers)) == [(i, keys[i]) for i in samples]


@pytest.mark.timeout(60)
@pytest.mark.launch
@pytest.mark.parametrize(("visit", "reason"), [(killed_by_3, "crashed its worker"), (stuck_in_3, "took more than")])
def test_a_hostile_sample_costs_only_itself(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch, visit, reason: str
) -> None:
    monkeypatch.setattr(sweep_module, "TASK_SECONDS", 2.0)
    monkeypatch.setattr(sweep_module, "SAMPLE_SECONDS", 2.0)
    keys = ShardIndex.open(small_shards).keys
    results = dict(sweep(small_shards, range(20), visit, 2))
    lost = results.pop(3)
    assert isinstance(lost, Lost)
    assert lost.reason.startswith(reason)
    assert results == {i: keys[i] for i in range(20) if i != 3}


def test_no_memory_is_a_lost_task_but_a_bug_goes_on() -> None:
    assert list(run_all(without_memory, range(3), 1, 20)) == [0, Lost("ran out of memory"), 2]
    with pytest.raises(ZeroDivisionError):
        list(run_all(with_a_bug, range(3), 1, 20))
