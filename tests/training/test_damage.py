"""Checkpoints of real runs: every byte counts, foreign ones are refused by name, and a disk that refuses costs nothing
that was saved before."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from tests.support import launch
from tools import checkpoint as tool
from tools.make_random_checkpoint import write_checkpoint
from vidcls.config import config_from_values
from vidcls.manifest import COMPLETE_NAME, MANIFEST_NAME, CheckpointError, faults, seal, verify
from vidcls.model.pretrained import load_model
from vidcls.model.stored import read_shapes
from vidcls.training.folders import find_latest
from vidcls.training.setup import Run, setup
from vidcls.training.sharded_state import STATE_NAME, StoredState

pytestmark = pytest.mark.launch

DISKS = ("seen", "met", "pickles", "other", "readonly", "apart")
RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_rank": 4,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "plot_loss": False,
    "report_to": "none",
    "self_check": False,
    "ddp_timeout": 60,
}


def write_recipe(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(path.with_suffix("")), **values}))
    return path


@pytest.fixture(scope="module")
def runs(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zero2 and zero3, each with checkpoints 1 and 2, which two ranks wrote; DeepSpeed's own state is in them."""
    top = tmp_path_factory.mktemp("damage")
    recipes = []
    for stage in (2, 3):
        values = {"deepspeed": f"ds_configs/zero{stage}.json", "save_deepspeed_state": True, "ema_decay": 0.9}
        recipes.append(write_recipe(top / f"zero{stage}.yaml", dataset=str(small_shards), **values))
    done = launch.deepspeed(2, "tests/support/trainings.py", *recipes, log=top / "log")
    assert done.code == 0, done.output[-4000:]
    return top


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
def test_damage_to_any_file_is_named_and_the_older_checkpoint_taken(
    runs: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "zero2", run)
    older, newest = run / "checkpoint-1", run / "checkpoint-2"
    assert find_latest(run) == (newest, [])
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    names = {str(path.relative_to(newest)) for path in files}
    assert names > {MANIFEST_NAME, COMPLETE_NAME, STATE_NAME, "config.yaml", "deepspeed/latest", "tokenizer.json"}
    assert {f"training_state-0000{rank}-of-00002.safetensors" for rank in (1, 2)} < names
    for path in files:
        whole = path.read_bytes()
        damage(path)
        with pytest.raises(CheckpointError) as refused:
            verify(newest)
        assert path.name in str(refused.value)
        assert str(newest) in str(refused.value)
        assert find_latest(run) == (older, [str(refused.value)])
        path.write_bytes(whole)
    verify(newest)


@pytest.mark.parametrize("stage", [2, 3])
def test_each_rank_wrote_its_half_and_no_parameter_of_the_other(runs: Path, stage: int) -> None:
    files = sorted((runs / f"zero{stage}" / "checkpoint-2").glob("training_state-*-of-00002.safetensors"))
    names = [{name.partition("/")[2] for name in read_shapes(path)} for path in files]
    assert len(names) == 2
    assert not names[0] & names[1]
    assert all(len(read_shapes(path)) == 4 * len(own) for path, own in zip(files, names, strict=True))
    small, large = sorted(path.stat().st_size for path in files)
    assert large < 1.1 * small


def test_a_folder_that_cannot_prove_itself_is_not_evaluated(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs / "zero2" / "checkpoint-2", tmp_path / "checkpoint-2"))
    for path in copy.glob("training_state*"):  # what inference does not read may be gone
        path.unlink()
    load_model(copy)
    for name in (COMPLETE_NAME, MANIFEST_NAME):
        (copy / name).unlink()
        with pytest.raises(CheckpointError, match=f"is not a whole checkpoint: it has no {name}"):
            load_model(copy)


@pytest.fixture
def resume(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """setup() of a run that goes on from a checkpoint, as the only process."""
    monkeypatch.setattr("vidcls.distributed.start", lambda *limits: None)
    monkeypatch.setattr("vidcls.distributed.world_size", lambda: 1)
    monkeypatch.setattr("vidcls.distributed.rank", lambda: 0)
    values = {**RECIPE, "ema_decay": 0.9, "dataset": str(small_shards), "output_dir": str(tmp_path / "out")}

    def run(checkpoint: Path, **changes: Any) -> Run:
        return setup(config_from_values({**values, "resume_from_checkpoint": str(checkpoint), **changes}))

    return run


def test_what_is_foreign_is_named(
    runs: Path, resume: Callable[..., Run], up_down: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = runs / "zero3" / "checkpoint-1"
    assert resume(half).start.step == 1
    assert resume(half, train_batch_size=None, per_device_train_batch_size=4, save_steps=7).start.step == 1
    backbone = write_checkpoint(tmp_path / "model", "tiny")
    with pytest.raises(CheckpointError, match=r"^resume_from_checkpoint: base_weights is '\w+' in the checkpoint and"):
        resume(half, model_name_or_path=str(backbone))
    with pytest.raises(CheckpointError, match=r"default/label_fingerprint is '\w+' in the checkpoint and '\w+' in"):
        resume(half, dataset=str(up_down))
    other = Path(shutil.copytree(half, tmp_path / "checkpoint-1"))
    state = json.loads((other / STATE_NAME).read_text())
    for content, said in (
        ({"format": 3}, r"training_state\.json is of format 3, written by vidcls .* reads format 2"),
        ({"stream": None}, r"training_state\.json cannot be read"),
    ):
        (other / STATE_NAME).write_text(json.dumps({**state, **content}))
        seal(other)
        with pytest.raises(CheckpointError, match=said):
            resume(other)
    (other / STATE_NAME).write_text(json.dumps(state))
    monkeypatch.setattr("vidcls.manifest.FORMAT", 3)
    seal(other)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"is a checkpoint of format 3, written by vidcls \S+; vidcls \S+ reads"):
        verify(other)
    (other / COMPLETE_NAME).unlink()
    (other / MANIFEST_NAME).write_text(json.dumps({"files": {}}))
    with pytest.raises(CheckpointError, match=r"is a checkpoint of format 1, written by an earlier vidcls; vidcls "):
        verify(other)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_tools_find_the_same_weights(runs: Path, stage: int) -> None:
    """save_deepspeed_state: its zero_to_fp32 gives our masters, bit by bit, from either stage."""
    folder = runs / f"zero{stage}" / "checkpoint-2"
    found = get_fp32_state_dict_from_zero_checkpoint(str(folder / "deepspeed"), exclude_frozen_parameters=True)
    expected = StoredState.open(folder).kind("weight")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not expected[name].equal(found[name].cpu())] == []
    assert (folder / "deepspeed" / "zero_to_fp32.py").is_file()


def test_what_the_tool_says_of_real_checkpoints(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    newest = Path(shutil.copytree(runs / "zero2" / "checkpoint-2", tmp_path / "checkpoint-2"))
    assert tool.show(newest) == 0
    said = capsys.readouterr().out
    for part in (
        f"{newest}: whole, ",
        "step      2 of 2, 2 of them applied",
        "layout    2 ranks, ZeRO-2, 4 clips = 2 x 1 accumulation x 2 ranks",
        "tensors   average: ",
        "tensors   exp_avg_sq: ",
        "file      training_state-00002-of-00002.safetensors: ",
    ):
        assert part in said, said
    assert tool.diff(newest, runs / "zero2" / "checkpoint-2") == 0
    assert "tensors  weight: all " in capsys.readouterr().out
    assert tool.diff(newest, runs / "zero3" / "checkpoint-1") == 1
    said = capsys.readouterr().out
    assert "recipe   deepspeed: 'ds_configs/zero2.json' in the first, 'ds_configs/zero3.json' in the second" in said
    assert "tensors  weight: " in said
    assert " differ, by " in said
    flip(newest / STATE_NAME)
    (newest / "config.yaml").unlink()
    assert tool.verify(newest) == 1
    assert capsys.readouterr().out.splitlines() == faults(newest)
    assert len(faults(newest)) == 2


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a small file system for each of DISKS."""
    top = tmp_path_factory.mktemp("disks")
    mounted = []
    try:
        for name in DISKS:
            (top / name).mkdir()
            words = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(top / name)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = f"cannot mount a file system to fill: {done.stderr.strip()}"
                if os.environ.get("CI") == "true":
                    pytest.fail(reason)
                pytest.skip(reason)
            mounted.append(top / name)
        yield top
    finally:
        for folder in mounted:
            subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def refused(disks: Path, small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two ranks was told when its disk refused checkpoint 2: NAME.rankN.json."""
    top = tmp_path_factory.mktemp("refused")
    recipes = [
        write_recipe(
            top / f"{name}.yaml",
            dataset=str(small_shards),
            output_dir=str(disks / name),
            save_deepspeed_state=name == "pickles",
        )
        for name in DISKS
    ]
    done = launch.deepspeed(2, "tests/support/refusing_disks.py", *recipes, log=top / "log")
    assert done.code == 0, done.output[-4000:]
    return top


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("seen", r"the disk is too full: \d+ bytes are needed, \d+ bytes are free"),
        ("met", r"cannot be written: No space left on device; \d+ bytes are needed, \d+ bytes are free"),
        ("pickles", r"cannot be written: .*; \d+ bytes are needed, \d+ bytes are free"),
        ("other", r"a shard of rank 1 cannot be written: No space left on device; \d+ bytes are needed, \d+ bytes are"),
        ("readonly", r"cannot be written: Read-only file system; \d+ bytes are needed, \d+ bytes are free"),
        (
            "apart",
            r"checkpoint\.tmp-\w+, which the main rank has made, is not there on .*: output_dir must be on",
        ),
    ],
)
def test_a_disk_that_refuses_leaves_the_older_checkpoint(disks: Path, refused: Path, name: str, said: str) -> None:
    """Every rank learns that it was the disk, and of which file; all of them went on to the next run afterwards."""
    for rank in (0, 1):
        told = json.loads((refused / f"{name}.rank{rank}.json").read_text())
        assert told["kind"] == "StorageError", told
        assert re.search(said, told["message"]), told
        assert "checkpoint" in told["message"] or name == "other"
    assert find_latest(disks / name) == (disks / name / "checkpoint-1", [])
    assert {path.name for path in (disks / name).iterdir()} <= {"checkpoint-1", "filler"}
