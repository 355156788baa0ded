"""Checkpoint folders: what counts as whole, which one is chosen, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn

from vidcls.manifest import (
    COMPLETE_NAME,
    FORMAT,
    MANIFEST_NAME,
    CheckpointError,
    StorageError,
    check_space,
    faults,
    storage_errors,
    verify,
)
from vidcls.training.checkpoint import check_average, check_fits, load_weights
from vidcls.training.folders import (
    find_latest,
    list_checkpoints,
    publish,
    remove_old,
    set_aside_after,
    temporary_folder,
)
from vidcls.training.saving import check_all_there
from vidcls.training.sharded_state import (
    STATE_NAME,
    RunState,
    StoredState,
    owners,
    read_state,
    write_state,
    write_tensors,
)

SHARD = "training_state-00001-of-00001.safetensors"
STATE = RunState(step=4, adam_steps=3, stream={"seed": 42, "global_batch": 8, "a/data_digest": "d" * 16})
TENSORS = {"weight/a": torch.arange(6.0).reshape(2, 3), "exp_avg/a": torch.ones(2, 3)}


def write_checkpoint(output_dir: Path, step: int) -> Path:
    folder = temporary_folder(output_dir)
    write_state(folder, replace(STATE, step=step))
    write_tensors(folder, TENSORS, 0, 1)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary.txt").write_text("a b c\n")
    return publish(folder, output_dir, step)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4)
    assert folder == tmp_path / "checkpoint-4"
    verify(folder)
    assert read_state(folder) == STATE
    found = StoredState.open(folder)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_the_manifest_holds_every_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert manifest["files"].keys() == {STATE_NAME, SHARD, "tokenizer/vocabulary.txt"}
    assert (manifest["format"], manifest["step"]) == (FORMAT, 4)


def test_a_checkpoint_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path, 4) / "stale").write_text("x")
    write_checkpoint(tmp_path, 4)
    remove_old(tmp_path, keep=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert not (tmp_path / "checkpoint-4" / "stale").exists()


def without_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()


def without_complete(folder: Path) -> None:
    (folder / COMPLETE_NAME).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text((folder / MANIFEST_NAME).read_text()[:40])


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[-3] ^= 1
    (folder / SHARD).write_bytes(data)


def remove_a_file(folder: Path) -> None:
    (folder / "tokenizer" / "vocabulary.txt").unlink()


def empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_manifest, r"checkpoint-10 is not a whole checkpoint: it has no MANIFEST\.json"),
        (without_complete, r"checkpoint-10 is not a whole checkpoint: it has no COMPLETE"),
        (cut_manifest, r"checkpoint-10/MANIFEST\.json or COMPLETE beside it is damaged"),
        (truncate, r"checkpoint-10/training_state-00001-of-00001\.safetensors is damaged: it has \d+ bytes"),
        (flip_a_bit, r"checkpoint-10/training_state-00001-of-00001\.safetensors is damaged: its digest"),
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
    write_state(temporary_folder(tmp_path), replace(STATE, step=8))
    assert find_latest(tmp_path) == (older, [])
    assert list_checkpoints(tmp_path) == [older]
    newest = write_checkpoint(tmp_path, 4)  # which takes the room of the half-written one
    assert set(tmp_path.iterdir()) == {older, newest}


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


def test_a_checkpoint_that_cannot_be_deleted_is_deleted_after_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As over NFS, while somebody reads it: no reason to end a run that has just saved."""
    for step in (4, 8):
        write_checkpoint(tmp_path, step)

    def refuse(folder: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        remove_old(tmp_path, keep=1)
    assert "checkpoint-4 cannot be deleted now" in capsys.readouterr().out
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-8"]
    newest = write_checkpoint(tmp_path, 12)
    remove_old(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == [newest]


def test_the_newest_are_kept_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (8, 100, 9):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    remove_old(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-100"]
    assert (tmp_path / "checkpoint-best").is_dir()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": 1}', '{"format": 2, "versions": {"vidcls": "1"}}'])
def test_a_state_that_cannot_be_read_names_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=r"training_state\.json cannot be read"):
        read_state(tmp_path)


def test_a_state_of_another_format_names_its_writer(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    path = tmp_path / STATE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9, "versions": {"vidcls": "7.0"}}))
    with pytest.raises(CheckpointError, match=rf"format 9, written by vidcls 7\.0; vidcls .* reads format {FORMAT}"):
        read_state(tmp_path)


def test_every_fault_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4)
    flip_a_bit(folder)
    remove_a_file(folder)
    named = {each.split(" is ")[0] for each in faults(folder)}
    assert named == {str(folder / SHARD), str(folder / "tokenizer" / "vocabulary.txt")}
    with pytest.raises(CheckpointError, match=r"\(and 1 more\)"):
        verify(folder)
    verify(folder, skip=(SHARD, "tokenizer"))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_a_manifest_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, 4)
    content = json.loads((folder / MANIFEST_NAME).read_text())
    content["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    (folder / COMPLETE_NAME).write_text(hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest() + "\n")
    with pytest.raises(CheckpointError, match="which is not in the checkpoint's folder"):
        verify(folder)


def test_files_that_change_after_the_rename_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses what it was given; the older checkpoint is still there, because nothing was rotated yet."""
    older = write_checkpoint(tmp_path, 2)
    monkeypatch.setattr("vidcls.training.folders.fsync", lambda folder: truncate(folder / "checkpoint-4"))
    with pytest.raises(StorageError, match=r"safetensors was written with \d+ bytes and now has \d+"):
        write_checkpoint(tmp_path, 4)
    assert find_latest(tmp_path)[0] == older


def test_a_file_that_the_main_rank_does_not_see_is_named(tmp_path: Path) -> None:
    digests = [write_tensors(tmp_path, TENSORS, rank, 2) for rank in (0, 1)]
    check_all_there(tmp_path, [*digests, ("", None)])
    os.truncate(tmp_path / digests[0][0], 9)
    with pytest.raises(StorageError, match=r"which rank 0 wrote with \d+ bytes, has 9 bytes on .*: output_dir must be"):
        check_all_there(tmp_path, digests)
    for name, _ in digests:
        (tmp_path / name).unlink()
    with pytest.raises(StorageError, match=r"00001-of-00002\.safetensors, which rank 0 wrote .*, is not there on "):
        check_all_there(tmp_path, digests)


def test_space_is_looked_at_before() -> None:
    with pytest.raises(StorageError, match=rf"^/: the disk is too full: {10**18} bytes are needed, \d+ bytes are"):
        check_space(Path("/"), 10**18)
    check_space(Path("/"), 1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left", "/a/b"), "^/a/b cannot be written: No space left on device; 7 bytes"),
        (OSError(errno.EDQUOT, "Quota"), "/runs cannot be written: Disk quota exceeded"),
        (OSError(errno.EROFS, "Read-only"), "Read-only file system"),
        (PermissionError(errno.EACCES, "no"), "Permission denied"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (Exception("Read-only file system (os error 30)"), "Read-only file system"),  # the tokenizers package
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 17344 vs 17236"), "to its end"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_a_disk_refuses_is_a_storage_error(error: Exception, said: str) -> None:
    with pytest.raises(StorageError, match=said), storage_errors(Path("/runs"), 7):
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), FileNotFoundError(errno.ENOENT, "no"), SafetensorError("header")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), storage_errors(Path("/runs")):
        raise error


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 1000), min_size=1), st.integers(1, 9))
def test_parameters_are_spread_evenly(sizes: dict[str, int], ranks: int) -> None:
    found = owners(sizes, ranks)
    assert found == owners(dict(reversed(sizes.items())), ranks)
    assert found.keys() == sizes.keys()
    loads = [sum(sizes[name] for name in sizes if found[name] == rank) for rank in range(ranks)]
    # The fullest rank was the emptiest one before it got its last parameter (up to the 1 that an empty one counts).
    assert max(loads) <= sum(sizes.values()) / ranks + max(sizes.values()) + len(sizes)
    assert {*found.values()} == {*range(min(ranks, len(sizes)))}  # so that those write a file, and no others


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_files_reads_alike(tmp_path: Path, ranks: int) -> None:
    tensors = {f"{kind}/{name}": torch.rand(2, 3) for kind in ("weight", "exp_avg") for name in "abc"}
    owner = owners(dict.fromkeys("abc", 6), ranks)
    for rank in range(ranks):
        write_tensors(tmp_path, {k: t for k, t in tensors.items() if owner[k[-1]] == rank}, rank, ranks)
    found = StoredState.open(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert found.shapes == dict.fromkeys(tensors, (2, 3))
    assert {name: t.tolist() for name, t in found.kind("weight").items()} == {
        name: tensors[f"weight/{name}"].tolist() for name in "abc"
    }


def test_a_missing_file_of_the_state_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path, TENSORS, 0, 3)
    with pytest.raises(CheckpointError, match="has 1 of 3 files"):
        StoredState.open(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for rank in (0, 1):
        write_tensors(tmp_path, TENSORS, rank, 2)
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors: exp_avg/a is in .*00001-of-00002"):
        StoredState.open(tmp_path)


@pytest.fixture
def layer() -> nn.Linear:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    layer.bias.requires_grad_(False)
    return layer


def stored(shape: tuple[int, ...] = (2, 3)) -> dict[str, torch.Tensor]:
    return {f"{kind}/weight": torch.full(shape, 1 / 3) for kind in ("weight", "exp_avg", "exp_avg_sq")}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_weights_are_rounded_to_the_models_dtype(layer: nn.Linear) -> None:
    load_weights(layer, {"weight": torch.full((2, 3), 1 / 3)})
    assert torch.equal(layer.weight, torch.full((2, 3), 1 / 3).to(torch.bfloat16))


def test_a_tensor_the_checkpoint_lacks_is_named(layer: nn.Linear) -> None:
    tensors = stored()
    del tensors["exp_avg/weight"]
    with pytest.raises(CheckpointError, match=r"exp_avg/weight: stored not at all, needed \(2, 3\)"):
        check_fits(layer, shapes(tensors), averaged=False)


def test_a_tensor_the_model_lacks_is_named(layer: nn.Linear) -> None:
    with pytest.raises(CheckpointError, match=r"weight/bias: stored \(2,\), needed not at all"):
        check_fits(layer, shapes({**stored(), "weight/bias": torch.zeros(2)}), averaged=False)


def test_a_tensor_of_another_shape_is_named(layer: nn.Linear) -> None:
    check_fits(layer, shapes(stored()), averaged=False)
    with pytest.raises(CheckpointError, match=r"3 tensors differ .* stored \(2, 4\), needed \(2, 3\)"):
        check_fits(layer, shapes(stored((2, 4))), averaged=False)


@pytest.mark.parametrize("averaged", [False, True])
def test_averages_that_are_stored_and_not_wanted_are_refused(tmp_path: Path, averaged: bool) -> None:
    write_tensors(tmp_path, {**stored(), **({"average/weight": torch.zeros(2, 3)} if averaged else {})}, 0, 1)
    state = StoredState.open(tmp_path)
    check_average(state, wanted=averaged)
    found, wanted = ("with", "without") if averaged else ("without", "with")
    with pytest.raises(CheckpointError, match=rf"written {found} ema_decay, this run is {wanted};"):
        check_average(state, wanted=not averaged)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path, step) for step in (1, 2, 3, 4)]
    remove_old(tmp_path, keep=2, best=folders[0])
    assert list_checkpoints(tmp_path) == [folders[0], *folders[2:]]


def test_a_checkpoint_without_training_state_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no training state: it was written with save_only_model"):
        read_state(tmp_path)
    for read in (read_state, verify):
        with pytest.raises(CheckpointError, match=r"there is no (such )?folder"):
            read(tmp_path / "elsewhere")
