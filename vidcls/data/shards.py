"""A folder of WebDataset tar shards with an index beside them, and how clips are read from it.

    shard-000000.tar   for each clip key.000.jpg ... and then key.json
    failed.jsonl       the clips that could not be decoded, with the reason; only if there are any
    index.json         written last: settings, classes, and for each clip its key, label and byte range

A folder without index.json is not a data set. Clips are read by byte range, so their order is free; the tars are
plain, and any WebDataset reader takes them. packing.py writes such folders.
"""

import hashlib
import json
import math
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidcls.data.decode import DecodeSettings
from vidcls.data.labels import LabelSpace

FORMAT_VERSION = 1
INDEX, FAILED = "index.json", "failed.jsonl"
# Whole numbers, one per sample, in index.json.
COLUMNS = ("label", "shard", "offset", "bytes", "crc32", "height", "width")
BLOCK = tarfile.BLOCKSIZE


class ShardError(ValueError):
    """A folder of shards that cannot be written or read."""


@dataclass(frozen=True)
class ShardIndex:
    """What is in a folder of shards; sample i has keys[i], label[i] (int64) and so on.

    height, width: of its frames, in pixels. offset, size, crc32: the sample's byte range in shard_names[shard[i]], and
    its checksum. digest: sha256 of index.json, which names the data set. prompts: None if no sample has its own.
    """

    folder: Path
    digest: str
    labels: LabelSpace
    settings: DecodeSettings
    shard_names: tuple[str, ...]
    keys: tuple[str, ...]
    label: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    height: np.ndarray
    width: np.ndarray
    prompts: tuple[str | None, ...] | None

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def open(cls, folder: Path | str) -> "ShardIndex":
        """Reads and checks index.json, and that every shard is there with its size; ShardError otherwise."""
        folder = Path(folder)
        path = folder / INDEX
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ShardError(
                f"{path}: cannot be read ({error.strerror}); a folder without it is not a finished data set"
            ) from error
        try:
            return cls._from_json(folder, data)
        except ShardError as error:
            raise ShardError(f"{path}: {error}") from error
        except KeyError as error:
            raise ShardError(f"{path}: field {error} is missing") from error
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ShardError(f"{path}: is damaged: {error}") from error

    @classmethod
    def _from_json(cls, folder: Path, data: bytes) -> "ShardIndex":
        index = json.loads(data)
        if index["format_version"] != FORMAT_VERSION:
            raise ShardError(f"format_version = {index['format_version']!r}: this program reads {FORMAT_VERSION}")
        samples, shards = index["samples"], index["shards"]
        keys, prompts = samples["key"], samples.get("prompt")
        columns = {name: _whole_numbers(name, samples[name]) for name in COLUMNS}
        lengths = {name: len(values) for name, values in samples.items()}
        if len({*lengths.values(), index["counts"]["samples"]}) != 1 or not keys:
            raise ShardError(f"samples: columns must have one length, at least 1 and that of counts: {lengths}")
        if not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
            raise ShardError("samples.key: must be texts, no two the same")
        if prompts is not None and not all(prompt is None or isinstance(prompt, str) for prompt in prompts):
            raise ShardError("samples.prompt: must be texts or null")
        labels = LabelSpace.from_dict(index["label_space"])
        _check_below("label", columns["label"], len(labels))
        _check_below("shard", columns["shard"], len(shards))
        sizes = _whole_numbers("shards.bytes", [shard["bytes"] for shard in shards])
        _check_ranges(columns, sizes)
        if min(columns["height"].min(), columns["width"].min()) < 1:
            raise ShardError("samples.height and samples.width: must be at least 1")
        _check_files(folder, [shard["name"] for shard in shards], sizes)
        return cls(
            folder=folder,
            digest=hashlib.sha256(data).hexdigest(),
            labels=labels,
            settings=DecodeSettings.from_dict(index["settings"]),
            shard_names=tuple(shard["name"] for shard in shards),
            keys=tuple(keys),
            prompts=None if prompts is None else tuple(prompts),
            label=columns["label"],
            shard=columns["shard"],
            offset=columns["offset"],
            size=columns["bytes"],
            crc32=columns["crc32"],
            height=columns["height"],
            width=columns["width"],
        )


def _whole_numbers(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind != "i"):
        raise ShardError(f"{name}: must be a list of whole numbers")
    if array.size and array.min() < 0:
        raise ShardError(f"{name}[{int(array.argmin())}] = {array.min()}: must be at least 0")
    array = array.astype(np.int64)
    array.setflags(write=False)
    return array


def _check_below(name: str, values: np.ndarray, limit: int) -> None:
    if values.max() >= limit:
        raise ShardError(f"samples.{name}[{int(values.argmax())}] = {values.max()}: must be less than {limit}")


def _check_ranges(columns: dict[str, np.ndarray], sizes: np.ndarray) -> None:
    """Every byte range is whole tar blocks, within its shard, and no two share a byte."""
    shard, offset, size = columns["shard"], columns["offset"], columns["bytes"]
    wrong = (offset % BLOCK != 0) | (size % BLOCK != 0) | (size == 0) | (offset + size > sizes[shard])
    if wrong.any():
        sample = int(wrong.argmax())
        raise ShardError(
            f"samples[{sample}]: bytes {offset[sample]} to {offset[sample] + size[sample]} must be blocks of {BLOCK} "
            f"within the {sizes[shard[sample]]} bytes of shard {shard[sample]}"
        )
    order = np.lexsort((offset, shard))
    ends = (offset + size)[order][:-1]
    clash = (shard[order][1:] == shard[order][:-1]) & (offset[order][1:] < ends)
    if clash.any():
        raise ShardError(f"samples[{int(order[1:][clash][0])}]: its bytes overlap those of another sample")


def _check_files(folder: Path, names: list[str], sizes: np.ndarray) -> None:
    wrong = []
    for name, size in zip(names, sizes.tolist(), strict=True):
        if not re.fullmatch(r"[A-Za-z0-9_-]+\.tar", name):
            raise ShardError(f"shards: name {name!r} is not the plain name of a tar file")
        try:
            found = (folder / name).stat().st_size
        except OSError:
            wrong.append(f"{name} is missing")
            continue
        if found != size:
            wrong.append(f"{name} has {found} bytes instead of {size}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ShardError(f"{len(wrong)} of {len(names)} shards cannot be used: {'; '.join(wrong[:5])}{more}")


@dataclass(frozen=True)
class StoredSample:
    """One clip as stored. frame_times: seconds since the video's first frame, one per JPEG."""

    key: str
    label: int
    class_name: str
    prompt: str | None
    frame_times: list[float]
    jpegs: list[bytes]
    source: str
    decoder: str
    original_size: tuple[int, int]
    damage: str | None

    def __post_init__(self) -> None:
        times = self.frame_times
        if len(times) != len(self.jpegs) or not all(math.isfinite(t) and t >= 0 for t in times):
            raise ShardError(f"frame_times: must be {len(self.jpegs)} finite numbers, got {times}")


class ShardReader:
    """Reads samples by number. Keeps nothing open: works across forks and threads, with any number of shards."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def read(self, sample: int) -> StoredSample:
        """Sample `sample` of [0, len(index)); ShardError names shard, key and reason."""
        if not 0 <= sample < len(self.index):
            raise IndexError(f"sample {sample}: the data set has samples 0 to {len(self.index) - 1}")
        key = self.index.keys[sample]
        path = self.index.folder / self.index.shard_names[self.index.shard[sample]]
        try:
            return self._parse(sample, key, self._read_range(path, sample))
        except OSError as error:
            raise ShardError(f"{path}: {key}: cannot be read: {error}") from error
        except (ValueError, TypeError, KeyError, tarfile.TarError) as error:
            raise ShardError(f"{path}: {key}: {error}") from error

    def _read_range(self, path: Path, sample: int) -> bytes:
        # pread, not mmap: a disk error or a file cut short is an exception here, not a SIGBUS without a name.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, int(self.index.size[sample]), int(self.index.offset[sample]))
        finally:
            os.close(descriptor)
        if zlib.crc32(data) != self.index.crc32[sample]:
            raise ShardError("checksum differs from the index: the shard was changed or is damaged")
        return data

    def _parse(self, sample: int, key: str, data: bytes) -> StoredSample:
        members = list(_members(data))
        frames = self.index.settings.frames
        expected = [f"{key}.{i:03d}.jpg" for i in range(frames)] + [f"{key}.json"]
        if [name for name, _ in members] != expected:
            raise ShardError(f"members must be {key}.000.jpg to {expected[-2]} and {key}.json")
        about = json.loads(members[-1][1])
        label = int(self.index.label[sample])
        if about["label"] != label or about["class_name"] != self.index.labels.names[label]:
            raise ShardError(
                f"label {about['label']!r} ({about['class_name']!r}) in {key}.json, but {label} "
                f"({self.index.labels.names[label]!r}) in the index"
            )
        prompts = self.index.prompts
        if about.get("prompt") != (prompts[sample] if prompts else None):
            raise ShardError(f"prompt {about.get('prompt')!r} in {key}.json is not that of the index")
        width, height = about["original_size"]
        return StoredSample(
            key=key,
            label=label,
            class_name=about["class_name"],
            prompt=about.get("prompt"),
            frame_times=about["frame_times"],
            jpegs=[data for _, data in members[:-1]],
            source=about["source"],
            decoder=about["decoder"],
            original_size=(width, height),
            damage=about.get("damage"),
        )


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of the regular files in a run of whole tar members; anything else raises."""
    position = 0
    while position < len(data):
        header = tarfile.TarInfo.frombuf(data[position : position + BLOCK], "ascii", "strict")
        start = position + BLOCK
        if header.type != tarfile.REGTYPE or not 0 <= header.size <= len(data) - start:
            raise ShardError(f"member {header.name!r} is not a whole regular file")
        yield header.name, data[start : start + header.size]
        position = start + math.ceil(header.size / BLOCK) * BLOCK
