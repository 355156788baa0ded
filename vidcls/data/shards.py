"""A folder of WebDataset tar shards with an index beside them, and how clips are read from it.

    shard-000000.tar      for each clip key.000.jpg ... (or webp, png, npy) and then key.json
    failed.jsonl          the clips that could not be decoded, with the reason; only if there are any
    samples.safetensors   the table of samples (index.py)
    index.json            written last: a folder without it is not a data set

Clips are read by byte range, so their order is free; the tars are plain, and any WebDataset reader takes them.
Nothing in a tar is ever unpacked to disk, executed or unpickled, and no name in it is used as a path.
"""

import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vidcls.data.index import BLOCK, ShardError, ShardIndex
from vidcls.data.places import PlaceError

MAX_ABOUT_BYTES = 2**20
HEADER_TAIL = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[156:]
"""From the type on, every header that the writer makes is the same: a regular file of nobody."""
KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a named pipe",
}

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=1)]


class ClipInfo(BaseModel):
    """key.json: what is known of one stored clip.

    source: its place below the data set's folder, for people. frame_times: seconds since the video's first frame, one
    per frame. start, end: the part of the video that the clip is, in seconds. original_size: (width, height) in
    pixels. damage: why only the beginning of the clip could be decoded. prompt, answer: the clip's own.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    key: str
    label: int
    class_name: str
    source: str
    frame_times: list[Seconds]
    decoder: str
    original_size: tuple[Pixels, Pixels]
    start: Seconds | None = None
    end: Seconds | None = None
    prompt: str | None = None
    answer: str | None = None
    damage: str | None = None

    def to_json(self) -> bytes:
        return self.model_dump_json(exclude_none=True).encode()


@dataclass(frozen=True)
class StoredSample:
    """One clip as stored; frames are encoded (index.settings.codec), as many as about.frame_times."""

    about: ClipInfo
    frames: list[bytes]


def member_names(key: str, frames: int, suffix: str) -> list[str]:
    """What the tar holds for one clip, in order."""
    return [f"{key}.{i:03d}.{suffix}" for i in range(frames)] + [f"{key}.json"]


class ShardReader:
    """Reads samples by number. Keeps nothing open: works across forks and threads, with any number of shards."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def read(self, sample: int) -> StoredSample:
        """Sample `sample` of [0, len(index)); ShardError names shard, key and reason."""
        if not 0 <= sample < len(self.index):
            raise IndexError(f"sample {sample}: the data set has samples 0 to {len(self.index) - 1}")
        key = self.index.keys[sample]
        where = f"{self.index.folder.name}/{self.index.shards[self.index.shard[sample]].name}: {key}"
        try:
            return self.parse(sample, self._read_range(sample))
        except OSError as error:
            raise ShardError(f"{where}: cannot be read: {error}") from error
        except (PlaceError, ShardError) as error:
            raise ShardError(f"{where}: {error}") from error

    def _read_range(self, sample: int) -> bytes:
        shard = self.index.shards[self.index.shard[sample]]
        place = shard.name, shard.bytes, shard.sha256
        data = self._read_bytes(sample, place)
        if zlib.crc32(data) == self.index.crc32[sample]:
            return data
        if self.index.folder.mend(*place):
            data = self._read_bytes(sample, place)
            if zlib.crc32(data) == self.index.crc32[sample]:
                return data
        raise ShardError("checksum differs from the index: the shard was changed or is damaged")

    def _read_bytes(self, sample: int, place: tuple[str, int, str]) -> bytes:
        # pread, not mmap: a disk error or a file cut short is an exception here, not a SIGBUS without a name.
        descriptor = self.index.folder.open(*place)
        try:
            return os.pread(descriptor, int(self.index.size[sample]), int(self.index.offset[sample]))
        finally:
            os.close(descriptor)

    def parse(self, sample: int, data: bytes) -> StoredSample:
        """Sample `sample` from its bytes in the tar; ShardError unless they are what the index promises."""
        index, key = self.index, self.index.keys[sample]
        expected = member_names(key, int(index.frames[sample]), index.settings.suffix)
        members = list(tar_members(data, expected))
        about = parse_info(members.pop())
        label = int(index.label[sample])
        stored = {"key": key, "label": label, "class_name": index.labels.names[label]}
        stored["prompt"] = index.prompt_of(sample)  # type: ignore[assignment]
        for name, value in stored.items():
            if getattr(about, name) != value:
                raise ShardError(f"{name} = {getattr(about, name)!r} in {key}.json, but {value!r} in the index")
        if len(about.frame_times) != len(members):
            raise ShardError(f"frame_times in {key}.json: {len(about.frame_times)} for {len(members)} frames")
        return StoredSample(about, members)


def parse_info(data: bytes) -> ClipInfo:
    """A key.json; ShardError names the first field that is wrong."""
    if len(data) > MAX_ABOUT_BYTES:
        raise ShardError(f"the clip's json has {len(data)} bytes, at most {MAX_ABOUT_BYTES} are read")
    try:
        return ClipInfo.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ShardError(f"the clip's json: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def tar_members(data: bytes, expected: list[str]) -> Iterator[bytes]:
    """The contents of a run of whole tar members that must have exactly these names, in this order; else ShardError."""
    position = 0
    for name in expected:
        # tarfile takes ten times as long, a fifth of all the time that a small clip takes. The header's own checksum is
        # not looked at: the index has one over the whole sample.
        if data.startswith(name.encode().ljust(100, b"\0"), position) and data.startswith(HEADER_TAIL, position + 156):
            digits = data[position + 124 : position + 135]
            size = int(digits, 8) if digits.isdigit() and max(digits) < ord("8") else -1
            if 0 <= size <= len(data) - position - BLOCK:
                yield data[position + BLOCK : position + BLOCK + size]
                position += BLOCK + -(-size // BLOCK) * BLOCK
                continue
        try:
            header = tarfile.TarInfo.frombuf(data[position : position + BLOCK], "ascii", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise ShardError(f"member {name!r}: no tar header at byte {position} of the sample: {error}") from error
        if header.type != tarfile.REGTYPE:
            kind = KINDS.get(header.type, f"of the special type {header.type!r}")
            raise ShardError(f"member {header.name[:100]!r} is {kind}; only regular files are read")
        if header.name != name:
            raise ShardError(f"member {header.name[:100]!r} stands where {name!r} belongs")
        start = position + BLOCK
        if not 0 <= header.size <= len(data) - start:
            raise ShardError(f"member {name!r}: claims {header.size} bytes, {len(data) - start} are left in the sample")
        yield data[start : start + header.size]
        position = start + -(-header.size // BLOCK) * BLOCK
    if position != len(data):
        raise ShardError(f"{len(data) - position} bytes follow the last member {expected[-1]!r}")
