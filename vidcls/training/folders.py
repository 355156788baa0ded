"""Checkpoint folders of a run: made under a temporary name, published by one rename, found again, deleted in turn."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vidcls.manifest import CheckpointError, FileDigest, check_sizes, fsync, seal, verify

CONFIG_NAME = "config.yaml"
FOLDER_PATTERN = re.compile(r"checkpoint-(\d+)")
TEMPORARY = "checkpoint.tmp-"


def temporary_folder(output_dir: Path) -> Path:
    """A new folder to write a checkpoint in; only `publish` gives it a name that anyone reads.

    What killed runs left half-written goes first: the space may be needed.
    """
    _remove_leftovers(output_dir)
    folder = _temporary(output_dir)
    folder.mkdir(parents=True)
    return folder


def _temporary(output_dir: Path) -> Path:
    return output_dir / f"{TEMPORARY}{uuid.uuid4().hex[:8]}"


def publish(
    folder: Path,
    output_dir: Path,
    step: int,
    known: Mapping[str, FileDigest] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Make a finished temporary folder the checkpoint of `step`: seal it (`known`, `about`), then one rename.

    Raises:
        StorageError: what lies on the disk afterwards has not the sizes that were written.
    """
    seal(folder, {"step": step, **(about or {})}, known)
    target = output_dir / f"checkpoint-{step}"
    if target.exists():
        set_aside(target)
    folder.rename(target)
    fsync(output_dir)
    check_sizes(target)
    return target


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name; None for a folder of another name."""
    found = FOLDER_PATTERN.fullmatch(folder.name)
    return int(found[1]) if found else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-N folders, oldest first, whole or not."""
    if not output_dir.is_dir():
        return []
    found = [(step, path) for path in output_dir.iterdir() if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def find_latest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over."""
    passed_over: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            verify(folder)
            return folder, passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved recipe that a checkpoint was written with. Raises CheckpointError when it cannot be read."""
    path = folder / CONFIG_NAME
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not `key: value` lines")
    return values


def set_aside(folder: Path) -> None:
    """Rename a checkpoint so that it is never chosen or counted; `remove_old` deletes it once a newer one is whole."""
    aside = folder.with_name(f"{folder.name}.superseded")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def set_aside_after(output_dir: Path, step: int) -> list[Path]:
    """Set aside the checkpoints beyond `step`: a run that goes on from there writes its own, and rotation by number
    would delete the new ones for being older."""
    beyond = [path for path in list_checkpoints(output_dir) if (step_of(path) or 0) > step]
    for folder in beyond:
        set_aside(folder)
    return beyond


def remove_old(output_dir: Path, keep: int | None, best: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and `best`, those set aside, and what killed runs left half-written.

    Call it right after `publish`: then the newest one is whole.
    """
    _remove_leftovers(output_dir)
    for superseded in output_dir.glob("checkpoint-*.superseded"):
        _remove(superseded)
    if keep is not None:
        for folder in list_checkpoints(output_dir)[:-keep]:
            if folder != best:
                _remove(folder)


def _remove_leftovers(output_dir: Path) -> None:
    for leftover in output_dir.glob(f"{TEMPORARY}*"):
        _remove(leftover)


def _remove(folder: Path) -> None:
    """What cannot be deleted now, perhaps because somebody reads it over NFS, is no reason to end a run: the next save
    tries again. It loses its name first: one that was deleted by half would look like a damaged checkpoint."""
    try:
        shutil.rmtree(folder if folder.name.startswith(TEMPORARY) else folder.rename(_temporary(folder.parent)))
    except OSError as error:
        print(f"vidcls: {folder} cannot be deleted now: {error}", flush=True)
