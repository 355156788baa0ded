"""A folder that can prove that it is whole: MANIFEST.json holds size and sha256 of every file, and is written last."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

MANIFEST_NAME = "MANIFEST.json"


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or of another run; names the file and the difference."""


class StorageError(RuntimeError):
    """Output cannot be written: the disk is full, read-only, or not the same on all hosts; names path and bytes."""


def seal(folder: Path) -> None:
    """Write the manifest of everything in `folder`, each file on disk before it (fsync)."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fsync(path)
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST_NAME
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    fsync(manifest)
    fsync(folder)


def verify(folder: Path, *, skip_prefix: str | None = None) -> None:
    """Raise CheckpointError naming the first file that is missing or differs from the manifest.

    Args:
        skip_prefix: do not look at files whose names begin so.
    """
    path = folder / MANIFEST_NAME
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {MANIFEST_NAME}") from None
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    for name, expected in files.items():
        if skip_prefix is not None and name.startswith(skip_prefix):
            continue
        member = folder / name
        if not member.is_file():
            raise CheckpointError(f"{member} is missing")
        if member.stat().st_size != expected["bytes"] or _sha256(member) != expected["sha256"]:
            raise CheckpointError(f"{member} is damaged: its size or digest differs from {MANIFEST_NAME}")


def fsync(path: Path) -> None:
    """Have the kernel put a file or a folder's entries on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest is Python 3.11's
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
