"""Checkpoints written behind training: the bytes of those for which training stands, and what goes wrong meanwhile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import launch
from vidcls.manifest import read_manifest, verify
from vidcls.training.folders import find_latest
from vidcls.training.sharded_state import StoredState

pytestmark = pytest.mark.launch

WAYS = [f"{stage}-{how}" for stage in (2, 3) for how in ("standing", "behind")]
SCRIPT = "tests/support/background_saves.py"


@pytest.fixture(scope="module")
def alone(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process wrote, which a SIGKILL ended in its last case."""
    top = tmp_path_factory.mktemp("alone")
    words = [sys.executable, SCRIPT, small_shards, top, *WAYS, "waits", "diverged", "stuck", "killed"]
    done = subprocess.run(
        [str(word) for word in words], cwd=launch.ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == -9, done.stdout[-2000:] + done.stderr[-2000:]
    return top


@pytest.fixture(scope="module")
def pair(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("pair")
    done = launch.deepspeed(2, SCRIPT, small_shards, top, *WAYS, "refused", log=top / "log")
    assert done.code == 0, done.output[-4000:]
    return top


def told(top: Path, case: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((top / f"rank{rank}.json").read_text())[case]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", ["alone", "pair"])
def test_the_files_are_those_of_a_save_for_which_training_stands(
    ranks: str, stage: int, request: pytest.FixtureRequest
) -> None:
    """The other way takes every tensor from DeepSpeed's own getters."""
    top: Path = request.getfixturevalue(ranks)
    for step in (2, 4):
        behind, standing = (top / f"{stage}-{how}" / f"checkpoint-{step}" for how in ("behind", "standing"))
        verify(behind)
        files = read_manifest(behind)["files"], read_manifest(standing)["files"]
        assert len([name for name in files[0] if name.startswith("training_state-")]) == (2 if ranks == "pair" else 1)
        differing = {name for name in files[0].keys() | files[1] if files[0].get(name) != files[1].get(name)}
        assert differing == {"config.yaml"}  # output_dir and async_save
    kinds = ("weight", "exp_avg", "exp_avg_sq", "average")
    first, last = (StoredState.open(top / f"{stage}-behind" / f"checkpoint-{step}") for step in (2, 4))
    assert all(len(last.kind(kind)) == len(last) // 4 for kind in kinds)
    assert any(not first[name].equal(last[name]) for name in last)  # the copy is taken anew


def test_a_line_is_said_when_the_checkpoint_is_whole(alone: Path) -> None:
    """The first is slow, so the second waits for it, and the end of the run for the second."""
    standing, lines = (
        [line for line in told(alone, name)["lines"] if "checkpoint-" in line] for name in ("2-standing", "waits")
    )
    assert standing[0].startswith(f"saved {alone / '2-standing' / 'checkpoint-2'} (training")
    assert lines[0] == "checkpoint-2 waits for checkpoint-1, which is still being written"
    assert lines[2] == "training waits for checkpoint-2, which is still being written"
    found = re.fullmatch(r"saved \S+/checkpoint-1 \(training stood for (\S+) s, written in (\S+) s\)", lines[1])
    assert found
    assert 0.2 < float(found[1]) <= float(found[2])
    assert lines[3].startswith(f"saved {alone / 'waits' / 'checkpoint-2'} (")


def test_no_thread_stays_behind(alone: Path) -> None:
    """One that has computed with torch slows all others' OpenMP barriers down for as long as it lives."""
    assert told(alone, "2-behind")["threads"] == told(alone, "2-standing")["threads"]


def test_the_log_tells_for_how_long_training_stood(alone: Path) -> None:
    rows = [json.loads(line) for line in (alone / "2-standing" / "train_log.jsonl").read_text().splitlines()]
    assert ["save_stall_seconds" in row for row in rows] == [False, False, True, False]
    assert rows[2]["save_stall_seconds"] > 0


def test_a_refusal_stops_all_ranks_at_one_step(pair: Path) -> None:
    """Between two saves, and nothing of the refused one is left."""
    ends = [told(pair, "refused", rank) for rank in (0, 1)]
    for end in ends:
        assert end["error"].startswith("StorageError: ")
        assert "a shard of the last rank cannot be written: No space left on device" in end["error"]
    assert ends[0]["steps"] == ends[1]["steps"] > 30
    assert {path.name for path in (pair / "refused").glob("checkpoint*")} == {"checkpoint-15"}
    assert find_latest(pair / "refused") == (pair / "refused" / "checkpoint-15", [])


def test_a_run_that_diverges_leaves_the_checkpoint_under_way_whole(alone: Path) -> None:
    assert told(alone, "diverged")["error"] == "DivergedError: planted"
    assert find_latest(alone / "diverged") == (alone / "diverged" / "checkpoint-2", [])
    assert told(alone, "diverged")["lines"][-1].startswith(f"saved {alone / 'diverged' / 'checkpoint-2'} (")


def test_a_disk_that_hangs_ends_the_run(alone: Path) -> None:
    assert re.fullmatch(
        r"StuckError: \S+/checkpoint-30 has not been written within save_timeout: 1 seconds",
        told(alone, "stuck")["error"],
    )
    assert find_latest(alone / "stuck") == (alone / "stuck" / "checkpoint-15", [])


def test_a_kill_while_writing_leaves_the_checkpoint_before(alone: Path) -> None:
    folder = alone / "killed"
    (half,) = folder.glob("checkpoint.tmp-*")
    assert (half / "half").is_file()
    assert find_latest(folder) == (folder / "checkpoint-15", [])
