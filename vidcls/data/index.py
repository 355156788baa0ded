"""What is in a folder of shards: index.json and the table of samples beside it. No tar is opened here.

    index.json            settings, classes, shards with size and sha256, and the table's size and sha256
    samples.safetensors   the table: for each clip its key, label, frames, size, prompt and where its bytes are

The table is binary because a data set of 200,000 clips has to open at once on every rank.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from vidcls.data.labels import LabelSpace
from vidcls.data.places import CacheSettings, PlaceError, ShardFolder, open_folder
from vidcls.data.settings import MAX_PIXELS, DecodeSettings

FORMAT_VERSION = 2
INDEX, SAMPLES, FAILED = "index.json", "samples.safetensors", "failed.jsonl"
COLUMNS = {
    "label": np.int32,
    "shard": np.int32,
    "offset": np.int64,
    "bytes": np.int64,
    "crc32": np.uint32,
    "frames": np.int32,
    "height": np.int32,
    "width": np.int32,
    "prompt": np.int32,
}
"""One number per sample. prompt is a row of the table's prompts, -1 for none."""
BLOCK = 512  # of a tar file
# Limits on what a file may make a reader allocate; the largest legal data sets stay far below.
MAX_INDEX_BYTES = 2**26
MAX_TABLE_BYTES = 2**30
MAX_SAMPLE_BYTES = 2**30
MAX_CLIP_BYTES = 2**31  # decoded

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardError(ValueError):
    """A folder of shards that cannot be written or read."""


class Texts(Sequence[str]):
    """Texts in one block of bytes: 200,000 of them cost no more than their letters."""

    def __init__(self, utf8: bytes, ends: np.ndarray) -> None:
        """Text i is utf8[ends[i-1]:ends[i]]. ShardError if the ends are not that, or the bytes not UTF-8."""
        if ends.ndim != 1 or ends.dtype != np.int64:
            raise ShardError(f"ends: must be int64 [N], got {ends.dtype} {ends.shape}")
        if (len(ends) and (ends[0] < 0 or np.any(np.diff(ends) < 0))) or (ends[-1] if len(ends) else 0) != len(utf8):
            raise ShardError(f"ends: must rise from 0 to the {len(utf8)} bytes of the texts")
        self._utf8, self._ends = utf8, ends
        try:
            for text in self:
                del text
        except UnicodeDecodeError as error:
            raise ShardError(f"texts: not UTF-8: {error}") from error

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return self._utf8[self._ends[i - 1] if i else 0 : self._ends[i]].decode()

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends.tolist():
            yield self._utf8[start:end].decode()
            start = end

    @staticmethod
    def pack(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(utf8 as uint8 [bytes], ends as int64 [N])"""
        encoded = [text.encode() for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return np.frombuffer(b"".join(encoded), dtype=np.uint8), ends


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShardFile(_Strict):
    """One tar file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")]
    samples: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=BLOCK)]
    sha256: Sha256


class Table(_Strict):
    bytes: Annotated[int, Field(ge=8, le=MAX_TABLE_BYTES)]
    sha256: Sha256


class Counts(_Strict):
    """failed: clips left out. damaged: clips of which only the beginning could be decoded."""

    samples: Annotated[int, Field(ge=1)]
    failed: Count
    damaged: Count


class Header(_Strict):
    """index.json. plan: what the shards were made from (writer.py); the same plan makes the same bytes."""

    format_version: int
    plan: Sha256
    counts: Counts
    decoders: dict[str, Count]
    settings: dict[str, Any]
    label_space: dict[str, Any]
    shards: list[ShardFile]
    table: Table

    def to_json(self) -> bytes:
        return json.dumps(self.model_dump(), separators=(",", ":")).encode()


@dataclass(frozen=True)
class ShardIndex:
    """Sample i has keys[i], label[i], frames[i] and so on (NumPy, one row per sample).

    offset, size, crc32: its byte range in shards[shard[i]], and their checksum. height, width: of its frames, in
    pixels. digest: sha256 of index.json, which names the data set with all its bytes.
    """

    folder: ShardFolder
    digest: str
    header: Header
    labels: LabelSpace
    settings: DecodeSettings
    keys: Texts
    prompts: Texts
    label: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    prompt: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shards(self) -> list[ShardFile]:
        return self.header.shards

    def prompt_of(self, sample: int) -> str | None:
        row = int(self.prompt[sample])
        return None if row < 0 else self.prompts[row]

    @classmethod
    def open(cls, place: Path | str, cache: CacheSettings | None = None) -> "ShardIndex":
        """Reads and checks the index of a folder or URL (places.py); ShardError says what is wrong.

        Of a local folder every shard must be there with its size. Tars are not read: see inspection.py for that.
        """
        try:
            return cls.read(open_folder(place, cache))
        except PlaceError as error:
            raise ShardError(f"{error}; a folder without a readable {INDEX} is not a finished data set") from error

    @classmethod
    def read(cls, folder: ShardFolder) -> "ShardIndex":
        """`open` for a folder that is open already; PlaceError if a file cannot be had."""
        header, digest = read_header(folder)
        data = folder.read(SAMPLES, limit=header.table.bytes)
        if hashlib.sha256(data).hexdigest() != header.table.sha256:
            raise ShardError(f"{folder.name}: {SAMPLES} does not belong to this {INDEX}, or is damaged")
        try:
            index = cls(folder=folder, digest=digest, **_checked(header, data))
        except (SafetensorError, ValueError, KeyError, OverflowError) as error:
            raise ShardError(f"{folder.name}: {INDEX} or {SAMPLES}: {_reason(error)}") from error
        try:
            folder.check({shard.name: shard.bytes for shard in header.shards})
        except PlaceError as error:
            raise ShardError(str(error)) from error
        return index


def read_header(folder: ShardFolder) -> tuple[Header, str]:
    """index.json and its sha256; ShardError or PlaceError."""
    data = folder.read(INDEX, limit=MAX_INDEX_BYTES)
    try:
        stored = json.loads(data)
        version = stored.get("format_version") if isinstance(stored, dict) else None
        if version != FORMAT_VERSION:
            raise ShardError(f"format_version = {version!r}: this program reads {FORMAT_VERSION}; make the shards anew")
        return Header.model_validate(stored), hashlib.sha256(data).hexdigest()
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{folder.name}: {INDEX}: {_reason(error)}") from error


def pack_table(columns: dict[str, Sequence[int]], keys: Sequence[str], prompts: Sequence[str]) -> bytes:
    """The bytes of samples.safetensors. columns: COLUMNS; prompts: those that the column `prompt` points to."""
    tensors = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}
    for name, texts in (("key", keys), ("prompts", prompts)):
        tensors[f"{name}.utf8"], tensors[f"{name}.ends"] = Texts.pack(texts)
    return safetensors.numpy.save(tensors)


def _checked(header: Header, data: bytes) -> dict[str, Any]:
    """The fields of a ShardIndex. Whatever the files claim, what comes out is consistent."""
    labels = LabelSpace.from_dict(header.label_space)
    settings = DecodeSettings.from_dict(header.settings)
    tensors = safetensors.numpy.load(data)
    expected = {
        **COLUMNS,
        "key.utf8": np.uint8,
        "key.ends": np.int64,
        "prompts.utf8": np.uint8,
        "prompts.ends": np.int64,
    }
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    if found != {name: np.dtype(dtype) for name, dtype in expected.items()}:
        raise ShardError(f"the table must have the columns {', '.join(expected)}, each of its own type; got {found}")
    columns = {name: tensors[name] for name in COLUMNS}
    keys = Texts(tensors["key.utf8"].tobytes(), tensors["key.ends"])
    prompts = Texts(tensors["prompts.utf8"].tobytes(), tensors["prompts.ends"])
    lengths = {"key": len(keys), **{name: column.shape for name, column in columns.items()}}
    if {*lengths.values()} != {len(keys), (len(keys),)} or len(keys) != header.counts.samples:
        raise ShardError(f"columns must have one length, that of counts.samples ({header.counts.samples}): {lengths}")
    _check_keys(keys)
    sizes = np.array([shard.bytes for shard in header.shards], dtype=np.int64)
    _check_between("label", columns["label"], 0, len(labels))
    _check_between("shard", columns["shard"], 0, len(sizes))
    _check_between("prompt", columns["prompt"], -1, len(prompts))
    _check_between("frames", columns["frames"], 1, settings.most_frames + 1)
    _check_between("height", columns["height"], 1, MAX_PIXELS + 1)
    _check_between("width", columns["width"], 1, MAX_PIXELS + 1)
    _check_between("bytes", columns["bytes"], BLOCK, MAX_SAMPLE_BYTES + 1)
    pixels = columns["height"].astype(np.int64) * columns["width"]
    _check_between("height x width", pixels, 1, MAX_PIXELS + 1)
    _check_between("decoded bytes", 3 * pixels * columns["frames"], 1, MAX_CLIP_BYTES + 1)
    _check_ranges(columns, sizes, header.shards)
    columns["size"] = columns.pop("bytes")
    return {
        "header": header,
        "labels": labels,
        "settings": settings,
        "keys": keys,
        "prompts": prompts,
        **columns,
    }


def _check_keys(keys: Texts) -> None:
    seen = set()
    for i, key in enumerate(keys):
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key):
            raise ShardError(f"key[{i}] = {key[:100]!r}: must be 1 to 80 characters of A-Z a-z 0-9 _ -")
        seen.add(key)
        if len(seen) <= i:
            raise ShardError(f"key[{i}] = {key!r}: another sample has it too")


def _check_between(name: str, values: np.ndarray, low: int, limit: int) -> None:
    wrong = (values < low) | (values >= limit)
    if wrong.any():
        i = int(wrong.argmax())
        raise ShardError(f"{name}[{i}] = {values[i]}: must be at least {low} and less than {limit}")


def _check_ranges(columns: dict[str, np.ndarray], sizes: np.ndarray, shards: list[ShardFile]) -> None:
    """Every byte range is whole tar blocks within its shard, no two share a byte, and each shard has its count."""
    shard, offset, size = columns["shard"], columns["offset"], columns["bytes"]
    # A hostile offset near 2**63 would overflow a sum, so it is compared with what is left behind it.
    wrong = (offset < 0) | (offset % BLOCK != 0) | (size % BLOCK != 0) | (offset > sizes[shard] - size)
    if wrong.any():
        sample = int(wrong.argmax())
        raise ShardError(
            f"sample {sample}: {size[sample]} bytes from {offset[sample]} must be whole blocks of {BLOCK} within the "
            f"{sizes[shard[sample]]} bytes of {shards[shard[sample]].name}"
        )
    order = np.lexsort((offset, shard))
    ends = (offset + size)[order][:-1]
    clash = (shard[order][1:] == shard[order][:-1]) & (offset[order][1:] < ends)
    if clash.any():
        raise ShardError(f"sample {int(order[1:][clash][0])}: its bytes overlap those of another sample")
    if len({entry.name for entry in shards}) != len(shards):
        raise ShardError("shards: two have the same name")
    for number, (entry, count) in enumerate(zip(shards, np.bincount(shard, minlength=len(shards)), strict=True)):
        if entry.samples != count:
            raise ShardError(f"shards[{number}].samples = {entry.samples}: the table has {count} samples in it")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {str(first['input'])[:80]}"
    return str(error)
