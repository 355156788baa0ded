"""Stored vision features: what a frozen tower makes of clips, read instead of their frames.

    DIR/KEY/cache.json                what the features depend on, whose digest is KEY, and how they lie
    DIR/KEY/part-00000.safetensors    those of a run of consecutive clips
    DIR/KEY/part-00000.json           its seal, written last: without it the part is not there

A part holds `tokens` [T, D] of all its clips and, for each clip, where they end, what else a batch needs of the clip,
and a checksum over both. Parts are written by feature_parts.py.

Shape suffixes: V video tokens of several clips, D width of a token.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from vidcls.data.index import Sha256, ShardError, Texts

FORMAT = 1
HEADER_NAME = "cache.json"
KEY_LETTERS = 16  # of a cache's key that its folder is named by
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENS, ENDS, CHECKSUMS, FACTS = "tokens", "ends", "crc32", "facts"
MISSING_NAMED = 3

Count = Annotated[int, Field(ge=0)]


class FeatureError(ShardError):
    """Features that are not there, are of something else, or are damaged."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FeatureOrigin(_Strict):
    """What the features of a data set depend on: of equal origins they are equal but for rounding.

    tower: digest of its weights. vision: its configuration. frames: which of a clip's stored frames are used. shards:
    digest of the data set.
    """

    tower: Sha256
    vision: dict[str, Any]
    frames: str
    video_min_pixels: int
    video_max_pixels: int
    image_max_pixels: int | None
    dtype: Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]
    shards: Sha256

    @property
    def key(self) -> str:
        text = json.dumps({"format": FORMAT, **self.model_dump()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def width(self) -> int:
        """Of a token: D."""
        return int(self.vision["out_hidden_size"])

    @property
    def token_bytes(self) -> int:
        return self.width * self.torch_dtype.itemsize

    def clip_bytes(self, grid: tuple[int, int, int]) -> int:
        """Of a clip of this grid of patches."""
        return math.prod(grid) // int(self.vision["spatial_merge_size"]) ** 2 * self.token_bytes

    def differences(self, other: FeatureOrigin) -> list[str]:
        """Where `other` is something else, in words."""
        mine, others = self.model_dump(), other.model_dump()
        return [
            f"{name} is {_short(others[name])} there and {_short(mine[name])} here"
            for name in mine
            if mine[name] != others[name]
        ]


class Header(_Strict):
    """cache.json. place: where the shards were, for people."""

    format_version: int
    place: str
    clips: Annotated[int, Field(ge=1)]
    clips_per_part: Annotated[int, Field(ge=1)]
    origin: FeatureOrigin


class Seal(_Strict):
    """part-00000.json, about the file beside it. bad: clips that could not be read, which have no tokens."""

    clips: Annotated[int, Field(ge=1)]
    bad: Count
    bytes: Annotated[int, Field(ge=8)]
    sha256: Sha256


@dataclass(frozen=True)
class ClipFacts:
    """What a batch needs of a clip beside its tokens and its row in the index. bad: why it could not be read."""

    seconds_per_grid: float = 0.0
    answer: str | None = None
    bad: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ClipFacts:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class _Table:
    """Of a part: clip i has the tokens ends[i-1] to ends[i] of those that begin at byte `start` of the file."""

    start: int
    ends: np.ndarray
    crc32: np.ndarray
    facts: Texts


@dataclass(frozen=True)
class FeatureCache:
    """The features of one data set, of which parts may be missing. Reads like ShardReader: nothing stays open."""

    folder: Path
    header: Header
    _tables: dict[int, _Table] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, top: Path, origin: FeatureOrigin) -> FeatureCache:
        """The cache of this origin below the folder `top`, complete or not.

        Raises:
            FeatureError: there is none; says in what those that are there differ.
        """
        folder = top / origin.key[:KEY_LETTERS]
        if not (folder / HEADER_NAME).is_file():
            raise FeatureError(f"{top} has no features of these shards{_others(top, origin)}")
        header = read_header(folder)
        if differing := origin.differences(header.origin):
            raise FeatureError(f"{folder / HEADER_NAME} is another cache's, or damaged: {'; '.join(differing)}")
        return cls(folder, header)

    @property
    def origin(self) -> FeatureOrigin:
        return self.header.origin

    @property
    def parts(self) -> int:
        return -(-self.header.clips // self.header.clips_per_part)

    def clips_of(self, part: int) -> range:
        first = part * self.header.clips_per_part
        return range(first, min(first + self.header.clips_per_part, self.header.clips))

    def part_path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.safetensors"

    def seal_path(self, part: int) -> Path:
        return self.part_path(part).with_suffix(".json")

    def seal(self, part: int) -> Seal:
        """Raises FeatureError unless the part is there, with the size that its seal says; it is not read."""
        path, seal_path = self.part_path(part), self.seal_path(part)
        try:
            seal = Seal.model_validate_json(seal_path.read_bytes())
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise FeatureError(f"{error.filename} is missing") from None
        except OSError as error:
            raise FeatureError(f"{error.filename} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            raise FeatureError(f"{seal_path} is damaged: {error.errors()[0]['msg']}") from None
        if size != seal.bytes or seal.clips != len(self.clips_of(part)):
            raise FeatureError(
                f"{path} is damaged: {size} bytes with {seal.clips} clips, not {seal.bytes} with "
                f"{len(self.clips_of(part))}"
            )
        return seal

    def check_complete(self) -> None:
        """Raise FeatureError that names the first parts that are missing or damaged, as `seal` sees it."""
        faults = []
        for part in range(self.parts):
            try:
                self.seal(part)
            except FeatureError as error:
                faults.append(str(error))
        if faults:
            more = f" and {len(faults) - MISSING_NAMED} more" if len(faults) > MISSING_NAMED else ""
            raise FeatureError(
                f"{self.folder} is not complete, {len(faults)} of {self.parts} parts cannot be used: "
                f"{'; '.join(faults[:MISSING_NAMED])}{more}"
            )

    def read(self, sample: int, out: np.ndarray) -> ClipFacts:
        """Put the tokens of a clip into `out`, uint8 of just their size.

        Raises:
            FeatureError: the clip could not be read when the cache was made, or the part is damaged; names it.
        """
        part, row = divmod(sample, self.header.clips_per_part)
        path = self.part_path(part)
        if part not in self._tables:
            self._tables[part] = self._read_table(part)
        table = self._tables[part]
        text = table.facts[row]
        first, end = (int(table.ends[row - 1]) if row else 0, int(table.ends[row]))
        size = (end - first) * self.origin.token_bytes
        where = f"{path}: clip {row}: "
        other_size = f"{where}{size} bytes of tokens, the clip has {len(out)}"
        if size > len(out):
            raise FeatureError(other_size)
        data = out[:size]
        try:
            # preadv, not mmap: a disk error or a file cut short is an exception here, not a SIGBUS without a name.
            descriptor = os.open(path, os.O_RDONLY)
            try:
                got = os.preadv(descriptor, [data.data], table.start + first * self.origin.token_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise FeatureError(f"{where}cannot be read: {error.strerror}") from error
        if got != len(data) or checksum(data, text) != table.crc32[row]:
            raise FeatureError(f"{where}checksum differs: the file was changed or is damaged")
        facts = ClipFacts.from_json(text)
        if facts.bad is not None:
            raise FeatureError(facts.bad)
        if size != len(out):
            raise FeatureError(other_size)
        return facts

    def tensor(self, data: np.ndarray) -> torch.Tensor:
        """features_VD from their bytes, uint8, whose memory they share."""
        return torch.from_numpy(data).view(self.origin.torch_dtype).view(-1, self.origin.width)

    def _read_table(self, part: int) -> _Table:
        path, clips = self.part_path(part), len(self.clips_of(part))
        try:
            with path.open("rb") as raw:
                header_bytes = int.from_bytes(raw.read(8), "little")
                with safe_open(path, "np") as file:  # checks the header's length and offsets
                    start = json.loads(raw.read(header_bytes))[TOKENS]["data_offsets"][0] + 8 + header_bytes
                    shape = file.get_slice(TOKENS).get_shape()
                    ends, crc32 = file.get_tensor(ENDS), file.get_tensor(CHECKSUMS)
                    facts = Texts(file.get_tensor(f"{FACTS}.utf8").tobytes(), file.get_tensor(f"{FACTS}.ends"))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise FeatureError(f"{path} cannot be read: {error}") from error
        rises = len(ends) > 0 and ends[0] >= 0 and bool(np.all(np.diff(ends) >= 0)) and ends[-1] == shape[0]
        if not rises or len(shape) != 2 or shape[1] != self.origin.width:
            raise FeatureError(f"{path} is damaged: its clips do not end where its {shape} tokens do")
        if {len(ends), len(crc32), len(facts)} != {clips}:
            raise FeatureError(f"{path} is damaged: it must have {clips} clips")
        return _Table(start, ends, crc32, facts)


def checksum(data: np.ndarray, facts: str) -> int:
    """Of a clip's bytes, uint8, and its facts as stored."""
    return zlib.crc32(facts.encode(), zlib.crc32(data.data))


def read_header(folder: Path) -> Header:
    path = folder / HEADER_NAME
    try:
        stored = json.loads(path.read_bytes())
        version = stored.get("format_version") if isinstance(stored, dict) else None
        if version != FORMAT:
            raise FeatureError(f"{path}: format_version = {version!r}: this program reads {FORMAT}; make it anew")
        return Header.model_validate(stored)
    except OSError as error:
        raise FeatureError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error)
    raise FeatureError(f"{path} is damaged: {reason}; remove {folder} to have it made anew")


def _others(top: Path, origin: FeatureOrigin) -> str:
    """How the cache that comes closest differs from what is wanted: ": ...", or "" where there is none."""
    found = list(_headers(top))
    if not found:
        return ""
    differences = {path: origin.differences(header.origin) for path, header in found}
    path, header = min(found, key=lambda each: len(differences[each[0]]))
    return f"; {path} is of {header.place}, but {'; '.join(differences[path])}"


def _headers(top: Path) -> Iterator[tuple[Path, Header]]:
    for path in sorted(top.glob(f"*/{HEADER_NAME}")):
        try:
            yield path.parent, read_header(path.parent)
        except FeatureError:
            continue  # nobody asked for this one


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..." if isinstance(value, str) else text
