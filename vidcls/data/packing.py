"""Clips -> a folder of shards (its layout: shards.py), by worker processes that may crash or hang."""

import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import TimeoutError as ClipTimeoutError
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from vidcls.data.decode import (
    DecodeError,
    DecodeSettings,
    decode_clip,
    encode_jpegs,
    resize_frames,
    target_size,
)
from vidcls.data.labels import LabelSpace
from vidcls.data.records import ClipRecord
from vidcls.data.shards import COLUMNS, FAILED, FORMAT_VERSION, INDEX, ShardError

OUR_FILES = re.compile(r"(shard-\d{6}\.tar|failed\.jsonl|index\.json)(\.tmp)?")
CLIPS_IN_FLIGHT = 16  # per worker: enough that one slow clip does not stop the others, little enough to stay small


@dataclass(frozen=True)
class ShardSummary:
    """What write_shards did. decoders: clips per decoder. damaged: clips of which only the beginning decoded."""

    samples: int
    failed: int
    damaged: int
    shards: int
    bytes: int
    seconds: float
    decoders: dict[str, int]


def write_shards(
    records: Sequence[ClipRecord],
    labels: LabelSpace,
    settings: DecodeSettings,
    out: Path,
    *,
    workers: int,
    samples_per_shard: int,
    progress: Callable[[int, int], None] | None = None,
    clip_timeout: float = 120.0,
    overwrite: bool = False,
) -> ShardSummary:
    """Decode all clips into `out`. The bytes do not depend on `workers`.

    Record i goes to shard i // samples_per_shard. A clip that cannot be decoded, crashes its worker or takes more
    than `clip_timeout` seconds is left out and listed in failed.jsonl. workers: processes; 0 decodes in this
    process, without protection against crashes and hangs. progress(done, failed) is called after each clip.

    What an interrupted run left in `out` is removed first. Raises ShardError if `out` holds a data set (unless
    `overwrite`) or files of others, if another process is writing there, or if not one clip could be decoded.
    """
    started = time.monotonic()
    _check_plan(records, labels, workers, samples_per_shard)
    with _locked_folder(out):
        _clear_folder(out, overwrite)
        ledger = _Ledger()
        with contextlib.closing(_pack_all(records, settings, workers, clip_timeout)) as outcomes:
            clips = zip(records, outcomes, strict=True)
            for number in range(math.ceil(len(records) / samples_per_shard)):
                good = ledger.take(islice(clips, samples_per_shard), progress)
                _write_shard(out / f"shard-{number:06d}.tar", good, ledger)
        ledger.write_failures(out)
        if not ledger.keys:
            raise ShardError(f"{out}: not one of {len(records)} clips could be decoded, see {out / FAILED}")
        ledger.write_index(out, labels, settings)
    return ShardSummary(
        samples=len(ledger.keys),
        failed=len(ledger.failures),
        damaged=ledger.damaged,
        shards=len(ledger.shards),
        bytes=sum(shard["bytes"] for shard in ledger.shards),
        seconds=time.monotonic() - started,
        decoders=dict(sorted(ledger.decoders.items())),
    )


@dataclass(frozen=True)
class _Packed:
    """One clip as it goes into a tar: member suffix -> bytes. frame_size: (height, width) as stored."""

    members: dict[str, bytes]
    frame_size: tuple[int, int]
    decoder: str
    damaged: bool


def _pack(record: ClipRecord, settings: DecodeSettings) -> _Packed:
    """Runs in a worker process. Raises DecodeError, OSError or MemoryError."""
    clip = decode_clip(record.path, settings.frames)
    _, height, width, _ = clip.frames.shape
    size = target_size(height, width, settings.short_side)
    jpegs = encode_jpegs(resize_frames(clip.frames, size), settings.quality)
    about: dict[str, Any] = {
        "key": record.key,
        "label": record.label,
        "class_name": record.class_name,
        "source": record.source or record.path.name,
        "frame_times": [round(seconds, 6) for seconds in clip.times.tolist()],
        "decoder": clip.decoder,
        "original_size": clip.original_size,
    }
    if record.prompt is not None:
        about["prompt"] = record.prompt
    if clip.damage is not None:
        about["damage"] = clip.damage
    members = {f"{i:03d}.jpg": jpeg for i, jpeg in enumerate(jpegs)}
    members["json"] = json.dumps(about, separators=(",", ":")).encode()
    return _Packed(members, size, clip.decoder, clip.damage is not None)


def _pack_all(
    records: Sequence[ClipRecord], settings: DecodeSettings, workers: int, clip_timeout: float
) -> Generator[_Packed | str, None, None]:
    """The packed clip, or the reason why there is none, for each record in order. Closing it ends the workers."""
    if workers == 0:
        for record in records:
            yield _outcome(partial(_pack, record, settings), clip_timeout)
        return
    # forkserver: a plain fork of a process with threads (the pool's, a progress bar's) can deadlock in the child.
    pool = ProcessPool(max_workers=workers, context=multiprocessing.get_context("forkserver"))
    in_flight: deque[ProcessFuture] = deque()
    coming = iter(records)

    def schedule(count: int) -> None:
        for record in islice(coming, count):
            in_flight.append(pool.schedule(_pack, args=(record, settings), timeout=clip_timeout))

    try:
        schedule(CLIPS_IN_FLIGHT * workers)
        while in_flight:
            yield _outcome(in_flight.popleft().result, clip_timeout)
            schedule(1)
    finally:
        pool.stop()
        pool.join()


def _outcome(result: Callable[[], _Packed], clip_timeout: float) -> _Packed | str:
    """What failed because of the clip becomes a reason; any other exception is a bug and goes on."""
    try:
        return result()
    except ClipTimeoutError:
        return f"decoding took more than {clip_timeout:g} seconds"
    except ProcessExpired as error:
        return f"the decoder crashed (exit code {error.exitcode})"
    except DecodeError as error:
        return error.reason
    except (OSError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"


@dataclass
class _Ledger:
    """What was written so far: the columns of the index, the shards and the failures."""

    keys: list[str] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)
    columns: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    shards: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    decoders: Counter[str] = field(default_factory=Counter)
    damaged: int = 0
    seen: int = 0

    def take(
        self,
        clips: Iterator[tuple[ClipRecord, _Packed | str]],
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[tuple[ClipRecord, _Packed]]:
        """Passes the good clips on and notes the others."""
        for record, outcome in clips:
            if isinstance(outcome, str):
                self.failures.append(
                    {
                        "key": record.key,
                        "path": str(record.path),
                        "class_name": record.class_name,
                        "reason": outcome,
                    }
                )
            else:
                self.decoders[outcome.decoder] += 1
                self.damaged += outcome.damaged
                yield record, outcome
            self.seen += 1
            if progress is not None:
                progress(self.seen, len(self.failures))

    def add_sample(self, record: ClipRecord, frame_size: tuple[int, int], offset: int, size: int, crc32: int) -> None:
        self.keys.append(record.key)
        self.prompts.append(record.prompt)
        row = (record.label, len(self.shards), offset, size, crc32, *frame_size)
        for name, value in zip(COLUMNS, row, strict=True):
            self.columns[name].append(value)

    def write_failures(self, out: Path) -> None:
        if self.failures:
            lines = "".join(json.dumps(failure) + "\n" for failure in self.failures)
            _write_file(out / FAILED, lines.encode())

    def write_index(self, out: Path, labels: LabelSpace, settings: DecodeSettings) -> None:
        samples: dict[str, Any] = {"key": self.keys, **self.columns}
        if any(prompt is not None for prompt in self.prompts):
            samples["prompt"] = self.prompts
        index = {
            "format_version": FORMAT_VERSION,
            "counts": {"samples": len(self.keys), "failed": len(self.failures), "damaged": self.damaged},
            "bytes": sum(shard["bytes"] for shard in self.shards),
            "decoders": dict(sorted(self.decoders.items())),
            "settings": settings.to_dict(),
            "label_space": labels.to_dict(),
            "shards": self.shards,
            "samples": samples,
        }
        _write_file(out / INDEX, json.dumps(index, separators=(",", ":")).encode())


def _write_shard(path: Path, clips: Iterator[tuple[ClipRecord, _Packed]], ledger: _Ledger) -> None:
    """Write one tar and note it in the ledger; no file at all if there is no clip."""
    first = next(clips, None)
    if first is None:
        return
    from webdataset import TarWriter  # here, because it imports torch: seconds, while the workers are busy already

    temporary = path.with_name(path.name + ".tmp")
    written: list[tuple[ClipRecord, tuple[int, int], int, int]] = []
    with open(temporary, "wb") as file:
        # Fixed times and owners: the same clips give the same bytes.
        with TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for record, packed in chain([first], clips):
                start = tar.tarstream.offset
                tar.write({"__key__": record.key, **packed.members})
                written.append((record, packed.frame_size, start, tar.tarstream.offset - start))
        file.flush()
        os.fsync(file.fileno())
    sha256 = hashlib.sha256()
    with open(temporary, "rb") as file:
        for record, frame_size, start, size in written:  # back to back from offset 0
            assert file.tell() == start, (file.tell(), start)
            data = file.read(size)
            sha256.update(data)
            ledger.add_sample(record, frame_size, start, size, zlib.crc32(data))
        sha256.update(file.read())
        total = file.tell()
    os.replace(temporary, path)
    ledger.shards.append({"name": path.name, "samples": len(written), "bytes": total, "sha256": sha256.hexdigest()})


def _check_plan(records: Sequence[ClipRecord], labels: LabelSpace, workers: int, samples_per_shard: int) -> None:
    if workers < 0:
        raise ShardError(f"workers = {workers}: must be at least 0")
    if samples_per_shard < 1:
        raise ShardError(f"samples_per_shard = {samples_per_shard}: must be at least 1")
    if not records:
        raise ShardError("records: there are no clips to write")
    keys = set()
    for record in records:
        if record.key in keys:
            raise ShardError(f"key = {record.key!r}: two clips have it")
        keys.add(record.key)
        if not record.label < len(labels) or labels.names[record.label] != record.class_name:
            raise ShardError(
                f"{record.key}: label {record.label} and class {record.class_name!r} do not agree with the label space"
            )


@contextlib.contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Create `out` and keep other writers away. The kernel drops the lock with the process, however it ends."""
    if out.exists() and not out.is_dir():
        raise ShardError(f"{out}: is a file, must be a folder")
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{out}: another process is writing there") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _clear_folder(out: Path, overwrite: bool) -> None:
    """Remove what an earlier run of ours left; never anything else."""
    names = sorted(os.listdir(out))
    foreign = [name for name in names if not OUR_FILES.fullmatch(name)]
    if foreign:
        raise ShardError(f"{out}: holds files that are not shards ({', '.join(foreign[:5])}); use an empty folder")
    if INDEX in names:
        if not overwrite:
            raise ShardError(f"{out}: already holds a finished data set; use another folder, or --overwrite")
        (out / INDEX).unlink()  # first: from here on there is no data set
    for name in names:
        (out / name).unlink(missing_ok=True)


def _write_file(path: Path, data: bytes) -> None:
    """Whole or not at all, and on disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the folder's entries: this file and the shards renamed before it
    finally:
        os.close(descriptor)
