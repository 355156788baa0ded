"""Checks every byte of a folder of shards against its index. Whatever is wrong becomes a Problem; nothing stops it."""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vidcls.data.codecs import FrameError, decode_frames
from vidcls.data.index import BLOCK, FAILED, INDEX, ShardError, ShardIndex
from vidcls.data.places import PlaceError
from vidcls.data.shards import ShardReader, member_names, tar_members
from vidcls.data.workers import Lost, run_all
from vidcls.inspection.sweep import opened, sweep

CHUNK = 2**20
END = 2 * BLOCK  # of a tar file, at least
SHARD_SECONDS = 3600.0  # hashing one, and fetching it first if it is remote
MAX_FAILED_BYTES = 2**28
FAILURE_FIELDS = {"key", "path", "class_name", "reason"}


@dataclass(frozen=True)
class Problem:
    """shard: a file of the folder. key, member: what of it, where that can be told."""

    shard: str
    key: str | None
    member: str | None
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.shard, self.key, self.member, self.reason) if part)


@dataclass
class Findings:
    """What checking samples gave. read: those whose json could be, and damaged and decoders as it says."""

    problems: list[Problem] = field(default_factory=list)
    read: int = 0
    damaged: int = 0
    decoders: Counter[str] = field(default_factory=Counter)


Progress = Callable[[int, int], None]
"""Called as progress(samples done, samples in all)."""


def verify(place: Path | str, workers: int, progress: Progress | None = None) -> Iterator[Problem]:
    """All problems of the data set, shard by shard, as they are found.

    A shard's size, its sha256 and the zeros around its samples; of every sample the checksum, members, json and its
    agreement with the index, frames that decode to the size stated, frame times that do not fall; failed.jsonl and the
    index's counts. workers: processes; 0: none, and no protection against crashes. ShardError if there is no readable
    index.
    """
    index = ShardIndex.open(place)
    total = Findings()
    names = [shard.name for shard in index.shards]
    whole = run_all(partial(check_shard, place), range(len(names)), workers, SHARD_SECONDS)
    for name, found in zip(names, whole, strict=True):
        yield from [Problem(name, None, None, found.reason)] if isinstance(found, Lost) else found
    order = np.lexsort((index.offset, index.shard)).tolist()  # as the bytes lie
    for done, (sample, findings) in enumerate(sweep(place, order, check_sample, workers), start=1):
        if isinstance(findings, Lost):
            yield Problem(names[index.shard[sample]], index.keys[sample], None, f"checking it {findings.reason}")
        else:
            yield from findings.problems
            total.read += findings.read
            total.damaged += findings.damaged
            total.decoders += findings.decoders
        if progress is not None:
            progress(done, len(order))
    if total.read == len(index):  # or the counts could not be right
        yield from _check_counts(index, total)
    yield from _check_failed(index)


def check_shard(place: Path | str, number: int) -> list[Problem]:
    """The bytes of one shard as a whole."""
    index = opened(place).index
    shard = index.shards[number]
    found = partial(Problem, shard.name, None, None)
    mine = np.flatnonzero(index.shard == number)
    mine = mine[np.argsort(index.offset[mine])]
    starts, ends = index.offset[mine].tolist(), (index.offset[mine] + index.size[mine]).tolist()
    gaps = list(zip([0, *ends], [*starts, shard.bytes], strict=True))
    try:
        descriptor = index.folder.open(shard.name, shard.bytes, shard.sha256)
    except PlaceError as error:
        return [found(str(error))]
    problems = []
    try:
        if (size := os.fstat(descriptor).st_size) != shard.bytes:
            problems.append(found(f"has {size} bytes, {shard.bytes} in the index"))
        digest = hashlib.sha256()
        for position in range(0, min(size, shard.bytes), CHUNK):
            digest.update(os.pread(descriptor, min(CHUNK, shard.bytes - position), position))
        if digest.hexdigest() != shard.sha256:
            problems.append(found(f"its sha256 is {digest.hexdigest()}, {shard.sha256} in the index"))
        if shard.bytes - gaps[-1][0] < END:
            problems.append(found("does not end in two empty blocks, as a tar file must"))
        for start, end in gaps:
            for position in range(start, min(end, size), CHUNK):
                if any(data := os.pread(descriptor, min(CHUNK, end - position), position)):
                    first = position + next(i for i, byte in enumerate(data) if byte)
                    problems.append(found(f"byte {first} belongs to no sample and is not zero"))
                    break
    except OSError as error:
        problems.append(found(f"cannot be read: {error}"))
    finally:
        os.close(descriptor)
    return problems


def check_sample(reader: ShardReader, sample: int) -> Findings:
    findings = Findings()
    _check_sample(reader, sample, findings)
    return findings


def _check_sample(reader: ShardReader, sample: int, findings: Findings) -> None:
    index = reader.index
    shard, key = index.shards[index.shard[sample]], index.keys[sample]

    def found(reason: object, member: str | None = None) -> None:
        findings.problems.append(Problem(shard.name, key, member, str(reason)))

    try:
        descriptor = index.folder.open(shard.name, shard.bytes, shard.sha256)
        try:
            data = os.pread(descriptor, int(index.size[sample]), int(index.offset[sample]))
        finally:
            os.close(descriptor)
    except (PlaceError, OSError) as error:
        return found(f"cannot be read: {error}")
    # What else is wrong tells where the damage is, so a wrong checksum is not the end.
    if zlib.crc32(data) != index.crc32[sample]:
        found("checksum differs from the index: the shard was changed or is damaged")
    names = member_names(key, int(index.frames[sample]), index.settings.suffix)
    height, width = int(index.height[sample]), int(index.width[sample])
    try:
        for name, content in zip(names, tar_members(data, names), strict=False):
            if name == names[-1]:
                break
            try:
                decode_frames([content], index.settings.codec, height, width)
            except FrameError as error:
                found(str(error).removeprefix("frame 0: "), name)
    except ShardError:
        pass  # parse says it too
    try:
        about = reader.parse(sample, data).about
    except ShardError as error:
        return found(error)
    if any(later < earlier for earlier, later in zip(about.frame_times, about.frame_times[1:], strict=False)):
        found("frame_times must not fall", names[-1])
    findings.read += 1
    findings.damaged += about.damage is not None
    findings.decoders[about.decoder] += 1
    return None


def _check_counts(index: ShardIndex, total: Findings) -> Iterator[Problem]:
    header = index.header
    if total.damaged != header.counts.damaged:
        reason = f"counts.damaged = {header.counts.damaged}, but {total.damaged} samples say that they are"
        yield Problem(INDEX, None, None, reason)
    if dict(total.decoders) != {name: count for name, count in header.decoders.items() if count}:
        reason = f"decoders = {header.decoders}, but the samples say {dict(sorted(total.decoders.items()))}"
        yield Problem(INDEX, None, None, reason)


def _check_failed(index: ShardIndex) -> Iterator[Problem]:
    expected = index.header.counts.failed
    try:
        text = index.folder.read(FAILED, limit=MAX_FAILED_BYTES)
    except PlaceError as error:
        if expected:
            yield Problem(FAILED, None, None, f"{error}; the index has {expected} failed clips")
        return
    lines = text.split(b"\n")
    if lines.pop() != b"":
        yield Problem(FAILED, None, None, "is cut short: its last line does not end")
    seen = set(index.keys)
    for number, line in enumerate(lines, start=1):
        try:
            failure = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Problem(FAILED, None, f"line {number}", f"is not JSON: {error}")
            continue
        if not isinstance(failure, dict) or {*failure} != FAILURE_FIELDS or {*map(type, failure.values())} != {str}:
            yield Problem(FAILED, None, f"line {number}", f"must have the texts {', '.join(sorted(FAILURE_FIELDS))}")
        elif failure["key"] in seen:
            yield Problem(FAILED, failure["key"], f"line {number}", "this clip is there already")
        else:
            seen.add(failure["key"])
    if len(lines) != expected:
        yield Problem(FAILED, None, None, f"lists {len(lines)} clips, the index has {expected} failed ones")
