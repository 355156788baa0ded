"""What ranks tell each other before, while and after they meet."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.launch import ROOT, free_port
from vidcls import distributed
from vidcls.distributed import LaunchError

LIMIT = 90.0  # seconds; importing DeepSpeed takes most of them on a busy machine
SCRIPT = """
import os, sys, time
from vidcls import distributed
rank, mistaken, limit, file_limit, slow = int(os.environ["RANK"]), sys.argv[1], *map(float, sys.argv[2:])
try:
    with distributed.joining(limit, file_limit):
        if str(rank) in mistaken:
            raise ValueError(f"dataset: nothing there on {rank}")
    with distributed.all_or_none("writing"):
        time.sleep(slow * rank)
    print("done", flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
os._exit(0)
"""


def ranks(mistaken: str, *, limit: float = 60, file_limit: float = 60, slow: float = 0, hosts: int = 2) -> list[str]:
    """What each of two ranks says at its end, as if each had a host of its own."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SCRIPT, mistaken, str(limit), str(file_limit), str(slow)]
    processes = [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": "0", "CROSS_SIZE": str(hosts)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [process.communicate(timeout=LIMIT)[0].splitlines()[-1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.launch
def test_a_mistake_on_one_host_ends_all() -> None:
    """Whoever waits for that host in the rendezvous would wait until its limit, and never learn why."""
    said = ranks("1")
    assert said[0].startswith(
        "ValueError checking recipe, data and model failed on rank 1: dataset: nothing there on 1"
    )
    assert said[1] == "ValueError dataset: nothing there on 1"


@pytest.mark.launch
def test_a_mistake_on_the_only_host_is_raised_at_once() -> None:
    """No rendezvous, which here would wait for ever: rank 1 never comes."""
    assert ranks("01", hosts=1) == ["ValueError dataset: nothing there on 0", "ValueError dataset: nothing there on 1"]


@pytest.mark.launch
def test_waiting_for_files_has_a_limit_of_its_own() -> None:
    """A slow disk on one rank, at more than twice the limit of a collective."""
    assert ranks("", limit=3, slow=8) == ["done", "done"]
    first, _ = ranks("", limit=3, file_limit=3, slow=8)
    assert "Timed out" in first


def test_another_version_on_one_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another_host(mine: tuple[str, dict[str, str]]) -> list[Any]:
        host, versions = mine
        return [(host, versions), ("node2", {**versions, "peft": "0.0.1"}), ("node3", versions)]

    monkeypatch.setattr(distributed, "gather_objects", with_another_host)
    with pytest.raises(LaunchError, match=r"versions differ between ranks: peft is 0\.0\.1 on node2 \(rank 1\) and "):
        distributed._check_equal_versions()
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, mine])
    distributed._check_equal_versions()


AGAIN = """
import resource, torch
from vidcls import distributed
distributed.start(60)
def faults():
    for _ in range(10):
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults() for _ in range(4)]
print(min(after - before for before, after in zip(counts, counts[1:])))
distributed.stop()
"""


@pytest.mark.launch
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_that_was_freed_is_used_again() -> None:
    """100 MB ten times are 244,000 pages of 4 kB, or 500 of 2 MB. The least of three times: what another thread takes
    in between can make the heap grow once."""
    words = [sys.executable, "-c", AGAIN]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=True)
    assert int(done.stdout.splitlines()[-1]) < 100
