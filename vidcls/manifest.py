"""A folder that can prove that it is whole.

MANIFEST.json holds size and sha256 of every file; COMPLETE, written last, holds the manifest's own sha256, so that a
bit that flips in the manifest is seen too. Everything that reads a checkpoint goes through `verify`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST_NAME = "MANIFEST.json"
COMPLETE_NAME = "COMPLETE"
FORMAT = 2  # 1 had no COMPLETE and the training state in one file
SEALED_NAMES = re.compile(r"checkpoint-\d+|best")
THREADS = 4  # that digest files; sha256 leaves Python's lock
REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE),  # a disk or a file server that fails
)
# Rust's words (safetensors, tokenizers) for an errno, and torch's for a file that could not be written to its end.
RUST_ERRNO = re.compile(r"os error (\d+)")
TORCH_CUT_SHORT = re.compile(r"inline_container.*unexpected pos|PytorchStreamWriter failed", re.DOTALL)


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or of another run; names the file and the difference."""


class StorageError(RuntimeError):
    """Output cannot be written: the disk is full, read-only, or not the same on all hosts; names path and bytes."""


@dataclass(frozen=True)
class FileDigest:
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileDigest:
        digest, size = hashlib.sha256(), 0  # hashlib.file_digest is Python 3.11's
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
        return cls(size, digest.hexdigest())


def seal(folder: Path, about: Mapping[str, Any] | None = None, known: Mapping[str, FileDigest] | None = None) -> None:
    """Write MANIFEST.json over everything in `folder`, each file on disk before it (fsync), then COMPLETE.

    Args:
        about: what else the manifest shall say, such as the step.
        known: digests that the writers of some files took, by name; those are on disk already and not read again.
    """
    known = known or {}
    manifest, complete = folder / MANIFEST_NAME, folder / COMPLETE_NAME
    for stale in (complete, manifest):
        stale.unlink(missing_ok=True)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def digest(name: str) -> FileDigest:
        if name in known:
            return known[name]
        fsync(paths[name])
        return FileDigest.of(paths[name])

    with ThreadPoolExecutor(THREADS, thread_name_prefix="digests") as pool:
        files = dict(zip(paths, pool.map(digest, paths), strict=True))
    head = {"format": FORMAT, "vidcls": importlib.metadata.version("vidcls"), **(about or {})}
    content = {**head, "files": {name: asdict(entry) for name, entry in files.items()}}
    manifest.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fsync(manifest)
    for inner in {path.parent for path in paths.values()} | {folder}:
        fsync(inner)
    complete.write_bytes(_seal_of(manifest.read_bytes()))
    fsync(complete)
    fsync(folder)


def is_sealed(folder: Path) -> bool:
    """Whether `folder` claims to be whole, so that it must `verify`: by its files, or by a name that only sealed
    folders have."""
    marked = any((folder / name).exists() for name in (MANIFEST_NAME, COMPLETE_NAME))
    return marked or SEALED_NAMES.fullmatch(folder.resolve().name) is not None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whose own digest is checked; the files that it names are not looked at.

    Raises:
        CheckpointError: it is missing, damaged, or of another format, whose vidcls is named.
    """
    path, complete = folder / MANIFEST_NAME, folder / COMPLETE_NAME
    unfinished = f"{folder} is not a whole checkpoint: it has no"
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a whole checkpoint: there is no such folder") from None
        raise CheckpointError(f"{unfinished} {MANIFEST_NAME}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    try:
        sealed = complete.read_bytes()
    except FileNotFoundError:
        sealed = None
    except OSError as error:
        raise CheckpointError(f"{complete} cannot be read: {error}") from None
    if sealed is not None and sealed != _seal_of(raw):
        raise CheckpointError(f"{path} or {COMPLETE_NAME} beside it is damaged: the digest of one is not in the other")
    try:
        content = json.loads(raw)
        found, files = content.get("format", 1), content["files"]
        sizes = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from None
    if found != FORMAT:
        writer = f"vidcls {content['vidcls']}" if "vidcls" in content else "an earlier vidcls"
        raise CheckpointError(
            f"{folder} is a checkpoint of format {found}, written by {writer}; vidcls "
            f"{importlib.metadata.version('vidcls')} reads format {FORMAT}"
        )
    if sealed is None:
        raise CheckpointError(f"{unfinished} {COMPLETE_NAME}")
    for name, _, _ in sizes:
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts:
            raise CheckpointError(f"{path} names {name!r}, which is not in the checkpoint's folder")
    return content


def faults(folder: Path, *, skip: tuple[str, ...] = ()) -> list[str]:
    """Everything that is wrong with a sealed folder, each naming its file; files beside the manifest are no fault.

    Args:
        skip: do not look at files whose names begin so.
    """
    try:
        files = read_manifest(folder)["files"]
    except CheckpointError as error:
        return [str(error)]

    def fault(name: str) -> str | None:
        member, expected = folder / name, FileDigest(files[name]["bytes"], files[name]["sha256"])
        try:
            if not member.is_file():
                return f"{member} is missing"
            found = member.stat().st_size
            if found != expected.bytes:
                return f"{member} is damaged: it has {found} bytes, {MANIFEST_NAME} says {expected.bytes}"
            if FileDigest.of(member) != expected:
                return f"{member} is damaged: its digest differs from {MANIFEST_NAME}"
        except OSError as error:
            return f"{member} cannot be read: {error.strerror}"
        return None

    with ThreadPoolExecutor(THREADS, thread_name_prefix="digests") as pool:
        found = pool.map(fault, [name for name in files if not name.startswith(skip)])
        return [each for each in found if each is not None]


def verify(folder: Path, *, skip: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError naming the first file that is missing or differs; `skip` as in `faults`."""
    if found := faults(folder, skip=skip):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise CheckpointError(f"{found[0]}{more}")


def check_sizes(folder: Path) -> None:
    """Raise StorageError where a folder that was just sealed does not have its files at their sizes; reads none."""
    for name, entry in read_manifest(folder)["files"].items():
        member = folder / name
        found = member.stat().st_size if member.is_file() else None
        if found != entry["bytes"]:
            raise StorageError(f"{member} was written with {entry['bytes']} bytes and now has {found}")


def check_space(folder: Path, needed: int) -> None:
    """Raise StorageError unless `needed` bytes are free for this user where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(f"{folder}: the disk is too full: {needed} bytes are needed, {free} bytes are free")


@contextlib.contextmanager
def storage_errors(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what a disk refuses inside, whoever met it (Python, safetensors, tokenizers, torch), into StorageError.

    Free space says nothing about quotas, and another program may fill the disk after it was looked at.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        wanted = "" if needed is None else f"{needed} bytes are needed, "
        raise StorageError(f"{_place(error, folder)} cannot be written: {reason}; {wanted}{_free(folder)}") from error


def fsync(path: Path) -> None:
    """Have the kernel put a file or a folder's entries on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seal_of(manifest: bytes) -> bytes:
    """What COMPLETE holds."""
    return f"{hashlib.sha256(manifest).hexdigest()}\n".encode()


def _refusal(error: Exception) -> str | None:
    """What the disk said, where it was the disk."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := RUST_ERRNO.search(text)):
        number = int(found[1])
    if number in REFUSALS:
        return os.strerror(number)
    if TORCH_CUT_SHORT.search(text):
        return "a file could not be written to its end"
    return None


def _place(error: Exception, folder: Path) -> str:
    return str(error.filename) if isinstance(error, OSError) and error.filename else str(folder)


def _free(folder: Path) -> str:
    for place in (folder, *folder.parents):  # a temporary folder may not have come to be
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(place).free} bytes are free"
    return "free bytes unknown"
