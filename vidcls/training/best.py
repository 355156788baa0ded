"""The best checkpoint of a run as a folder of its own: what evaluation and prediction read, and nothing to resume."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from vidcls.manifest import fsync, read_manifest, seal, storage_errors, verify
from vidcls.model.pretrained import TRAINING_ONLY

BEST_NAME = "best"
ABOUT_NAME = "best.json"
LEFT_BEHIND = (f"{BEST_NAME}.tmp-*", f"{BEST_NAME}.superseded-*")  # by killed runs


def publish_best(checkpoint: Path, output_dir: Path, about: dict[str, Any]) -> Path:
    """Make output_dir/best from a checkpoint, in place of an earlier one; returns it. One process calls it.

    Files are hard links where the disk can, so they cost nothing while the checkpoint is there. `about` (JSON) is
    written beside them, as best.json, and the folder is sealed anew.

    Raises:
        CheckpointError: the checkpoint is not whole; best/ stays as it was.
        StorageError: the disk refuses to hold it; best/ stays as it was.
    """
    verify(checkpoint, skip=TRAINING_ONLY)
    listed = read_manifest(checkpoint)["files"]
    for pattern in LEFT_BEHIND:
        for leftover in output_dir.glob(pattern):
            shutil.rmtree(leftover)
    mark = uuid.uuid4().hex[:8]
    folder, target = output_dir / f"{BEST_NAME}.tmp-{mark}", output_dir / BEST_NAME
    try:
        with storage_errors(folder):
            folder.mkdir()
            for name in listed:
                if not name.startswith(TRAINING_ONLY):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    _link(checkpoint / name, folder / name)
            (folder / ABOUT_NAME).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            seal(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    superseded = output_dir / f"{BEST_NAME}.superseded-{mark}"
    with contextlib.suppress(FileNotFoundError):
        target.rename(superseded)
    folder.rename(target)
    fsync(output_dir)
    shutil.rmtree(superseded, ignore_errors=True)
    return target


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copyfile(source, target)
