"""Checkpoint folders: what counts as whole, which one is chosen, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from vidcls.manifest import MANIFEST_NAME, CheckpointError, verify
from vidcls.training.checkpoint import (
    STATE_NAME,
    TENSORS_NAME,
    RunState,
    check_average,
    find_latest,
    list_checkpoints,
    load_weights,
    publish,
    read_state,
    read_tensors,
    remove_old,
    set_aside_after,
    temporary_folder,
    write_state,
)

STATE = RunState(step=4, adam_steps=3, stream={"seed": 42, "global_batch": 8, "a/data_digest": "d" * 16})
TENSORS = {"weight/a": torch.arange(6.0).reshape(2, 3), "exp_avg/a": torch.ones(2, 3)}


def write_checkpoint(output_dir: Path, step: int) -> Path:
    folder = temporary_folder(output_dir)
    write_state(folder, replace(STATE, step=step), TENSORS)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary.txt").write_text("a b c\n")
    return publish(folder, output_dir, step)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4)
    assert folder == tmp_path / "checkpoint-4"
    verify(folder)
    assert read_state(folder) == STATE
    found = read_tensors(folder)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_the_manifest_holds_every_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4)
    listed = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    assert listed.keys() == {STATE_NAME, TENSORS_NAME, "tokenizer/vocabulary.txt"}


def test_a_checkpoint_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path, 4) / "stale").write_text("x")
    write_checkpoint(tmp_path, 4)
    remove_old(tmp_path, keep=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert not (tmp_path / "checkpoint-4" / "stale").exists()


def without_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text((folder / MANIFEST_NAME).read_text()[:40])


def truncate(folder: Path) -> None:
    os.truncate(folder / TENSORS_NAME, (folder / TENSORS_NAME).stat().st_size - 1)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / TENSORS_NAME).read_bytes())
    data[-3] ^= 1
    (folder / TENSORS_NAME).write_bytes(data)


def remove_a_file(folder: Path) -> None:
    (folder / "tokenizer" / "vocabulary.txt").unlink()


def empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_manifest, r"checkpoint-10 is not a whole checkpoint: it has no MANIFEST\.json"),
        (cut_manifest, r"checkpoint-10/MANIFEST\.json cannot be read: "),
        (truncate, r"checkpoint-10/training_state\.safetensors is damaged"),
        (flip_a_bit, r"checkpoint-10/training_state\.safetensors is damaged"),
        (remove_a_file, r"checkpoint-10/tokenizer/vocabulary\.txt is missing"),
        (empty, r"checkpoint-10 is not a whole checkpoint: it has no MANIFEST\.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    older, newest = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    assert find_latest(tmp_path) == (newest, [])
    damage(newest)
    with pytest.raises(CheckpointError, match=reason):
        verify(newest)
    found, passed_over = find_latest(tmp_path)
    assert found == older
    assert len(passed_over) == 1


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "never made") == (None, [])
    flip_a_bit(write_checkpoint(tmp_path, 1))
    found, passed_over = find_latest(tmp_path)
    assert found is None
    assert len(passed_over) == 1


def test_a_killed_writers_folder_never_counts(tmp_path: Path) -> None:
    older = write_checkpoint(tmp_path, 2)
    write_state(temporary_folder(tmp_path), replace(STATE, step=8), TENSORS)
    assert find_latest(tmp_path) == (older, [])
    assert list_checkpoints(tmp_path) == [older]
    remove_old(tmp_path, keep=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_run_that_goes_on_from_an_older_checkpoint_keeps_what_it_saves(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write_checkpoint(tmp_path, step)
    flip_a_bit(tmp_path / "checkpoint-12")
    assert [p.name for p in set_aside_after(tmp_path, 4)] == ["checkpoint-8", "checkpoint-12"]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-4"]
    newest = write_checkpoint(tmp_path, 6)
    remove_old(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    assert find_latest(tmp_path) == (newest, [])


def test_the_newest_are_kept_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (8, 100, 9):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    remove_old(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-100"]
    assert (tmp_path / "checkpoint-best").is_dir()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": 1}'])
def test_a_state_that_cannot_be_read_names_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=r"training_state\.json cannot be read"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 43), ("global_batch", 16), ("a/data_digest", "e" * 16), ("b/data_digest", "d" * 16)],
)
def test_another_stream_of_samples_is_refused(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"^resume_from_checkpoint: {field} is .* in the checkpoint and "):
        STATE.check_continues(replace(STATE, stream={**STATE.stream, field: value}))


def test_another_step_is_not_another_stream() -> None:
    STATE.check_continues(replace(STATE, step=0, adam_steps=0))


@pytest.fixture
def layer() -> nn.Linear:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    layer.bias.requires_grad_(False)
    return layer


def stored(shape: tuple[int, ...] = (2, 3)) -> dict[str, torch.Tensor]:
    return {f"{kind}/weight": torch.full(shape, 1 / 3) for kind in ("weight", "exp_avg", "exp_avg_sq")}


def test_weights_are_rounded_to_the_models_dtype(layer: nn.Linear) -> None:
    load_weights(layer, stored(), averaged=False)
    assert torch.equal(layer.weight, torch.full((2, 3), 1 / 3).to(torch.bfloat16))


def test_a_tensor_the_checkpoint_lacks_is_named(layer: nn.Linear) -> None:
    tensors = stored()
    del tensors["exp_avg/weight"]
    with pytest.raises(CheckpointError, match=r"exp_avg/weight: stored not at all, needed \(2, 3\)"):
        load_weights(layer, tensors, averaged=False)


def test_a_tensor_the_model_lacks_is_named(layer: nn.Linear) -> None:
    with pytest.raises(CheckpointError, match=r"weight/bias: stored \(2,\), needed not at all"):
        load_weights(layer, {**stored(), "weight/bias": torch.zeros(2)}, averaged=False)


def test_a_tensor_of_another_shape_is_named(layer: nn.Linear) -> None:
    before = layer.weight.clone()
    with pytest.raises(CheckpointError, match=r"3 tensors differ .* stored \(2, 4\), needed \(2, 3\)"):
        load_weights(layer, stored((2, 4)), averaged=False)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("averaged", [False, True])
def test_averages_that_are_stored_and_not_wanted_are_refused(tmp_path: Path, averaged: bool) -> None:
    tensors = {**stored(), **({"average/weight": torch.zeros(2, 3)} if averaged else {})}
    write_state(tmp_path, STATE, tensors)
    check_average(tmp_path, wanted=averaged)
    found, wanted = ("with", "without") if averaged else ("without", "with")
    with pytest.raises(CheckpointError, match=rf"written {found} ema_decay, this run is {wanted};"):
        check_average(tmp_path, wanted=not averaged)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path, step) for step in (1, 2, 3, 4)]
    remove_old(tmp_path, keep=2, best=folders[0])
    assert list_checkpoints(tmp_path) == [folders[0], *folders[2:]]


def test_a_checkpoint_without_training_state_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no training state: it was written with save_only_model"):
        read_state(tmp_path)
