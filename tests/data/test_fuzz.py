"""Shards made by an enemy who knows the format and mends every checksum: a ShardError, or a sample that is consistent.

FUZZ_CASES=5000 python -m pytest tests/data/test_fuzz.py     5000 cases of each of the 5 tests; 60 if not said
"""

import hashlib
import json
import os
import resource
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.clips import class_folder
from vidcls.data.codecs import FrameError, decode_frames, encode_frames
from vidcls.data.index import ShardError, ShardIndex
from vidcls.data.places import LocalFolder, PlaceError
from vidcls.data.settings import LOSSY, SUFFIXES, DecodeSettings
from vidcls.data.shards import ShardReader
from vidcls.sharding.readers.folder import read_folder
from vidcls.sharding.writer import Plan, write_shards

CASES = int(os.environ.get("FUZZ_CASES", 60))
fuzz = settings(
    max_examples=CASES, deadline=2000, database=None, derandomize=CASES == 60, suppress_health_check=list(HealthCheck)
)
MOST_GROWTH_KB = 500_000


class Files(dict[str, bytes]):
    def __repr__(self) -> str:
        return "the files of a folder of shards"  # a failing case is printed with it


class Memory:
    """A ShardFolder whose files are bytes."""

    name = "memory"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def read(self, file: str, limit: int) -> bytes:
        if len(self.files[file]) > limit:
            raise PlaceError(f"{file}: more than {limit} bytes")
        return self.files[file]

    def check(self, sizes: dict[str, int]) -> None:
        if any(len(self.files.get(file, b"")) != size for file, size in sizes.items()):
            raise PlaceError("wrong size")

    def open(self, file: str, size: int, sha256: str) -> int:
        descriptor = os.memfd_create(file)
        os.write(descriptor, self.files[file])
        return descriptor

    def mend(self, file: str, size: int, sha256: str) -> bool:
        return False

    def prefetch(self, files: Iterable[tuple[str, int, str]]) -> None:
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """4 clips of 2 classes in 2 shards; and memory must not grow much over all cases."""
    folder = tmp_path_factory.mktemp("made")
    labels, records = read_folder(class_folder(folder / "videos", per_class=2))
    write_shards(Plan(records, labels, DecodeSettings(frames=3, short_side=32), 2), folder / "shards", workers=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield Files({path.name: path.read_bytes() for path in (folder / "shards").iterdir()})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH_KB


def survives(files: dict[str, bytes]) -> None:
    """Open and read everything; only errors with a name may come out, and only what fits together."""
    try:
        index = ShardIndex.read(Memory(files))
    except (ShardError, PlaceError) as error:
        assert len(str(error)) < 2000  # noqa: PT017
        return
    reader = ShardReader(index)
    assert len(set(index.keys)) == len(index)
    for i in range(len(index)):
        assert 0 <= index.label[i] < len(index.labels)
        try:
            sample = reader.read(i)
            height, width = int(index.height[i]), int(index.width[i])
            frames = decode_frames(sample.frames, index.settings.codec, height, width)
        except (ShardError, FrameError) as error:
            assert len(str(error)) < 2000  # noqa: PT017
            continue
        assert frames.shape == (index.frames[i], height, width, 3)
        assert len(sample.about.frame_times) == len(frames)
        assert all(0 <= time < float("inf") for time in sample.about.frame_times)
        assert (sample.about.key, sample.about.label) == (index.keys[i], index.label[i])


def sealed(files: dict[str, bytes], header: Any, tensors: dict[str, np.ndarray] | bytes) -> dict[str, bytes]:
    """The same folder with this index, its checksums mended."""
    table = tensors if isinstance(tensors, bytes) else safetensors.numpy.save(tensors)
    if isinstance(header, dict) and isinstance(header.get("table"), dict):
        header["table"].update(bytes=len(table), sha256=hashlib.sha256(table).hexdigest())
    return {**files, "samples.safetensors": table, "index.json": json.dumps(header).encode()}


def parts(files: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tensors = safetensors.numpy.load(files["samples.safetensors"])
    return json.loads(files["index.json"]), {name: tensor.copy() for name, tensor in tensors.items()}


NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 511, 512, 2**31 - 1, 2**31, 2**32, 2**63 - 512, 2**63 - 1, -(2**63)]),
    st.integers(-(2**63), 2**63 - 1),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=20), st.just("../../etc/passwd")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def edit_json(data: st.DataObject, value: Any) -> Any:
    """Walks to a random place of a JSON value and puts, removes or adds something there."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 4)):
        name = data.draw(st.sampled_from(sorted(value)))
        action = data.draw(st.sampled_from(["deeper", "deeper", "deeper", "remove", "rename"]))
        if action == "deeper":
            return {**value, name: edit_json(data, value[name])}
        rest = {key: entry for key, entry in value.items() if key != name}
        return rest if action == "remove" else {**rest, data.draw(st.text(max_size=8)): value[name]}
    if isinstance(value, list) and value and data.draw(st.integers(0, 4)):
        i = data.draw(st.integers(0, len(value) - 1))
        return [*value[:i], edit_json(data, value[i]), *value[i + data.draw(st.integers(0, 1)) :]]
    return data.draw(JSON)


def edit_bytes(data: st.DataObject, old: bytes, keep_size: bool = False) -> bytes:
    """Flips, cuts, doubles or overwrites a few places."""
    new = bytearray(old)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(new) - 1)))
        length = data.draw(st.sampled_from([1, 2, 8, 12, 100, 512]))
        kind = data.draw(
            st.sampled_from(["set", "set", "fill", "copy"] + ([] if keep_size else ["cut", "double", "end"]))
        )
        piece = bytes(new[at : at + length])
        if kind == "set":
            new[at : at + len(piece)] = data.draw(st.binary(min_size=len(piece), max_size=len(piece)))
        elif kind == "fill":
            new[at : at + len(piece)] = bytes([data.draw(st.sampled_from([0, 0x20, 0x37, 0x80, 0xFF]))]) * len(piece)
        elif kind == "copy":
            to = data.draw(st.integers(0, max(0, len(new) - len(piece))))
            new[to : to + len(piece)] = piece
        elif kind == "cut":
            del new[at : at + length]
        elif kind == "double":
            new[at:at] = piece
        else:
            del new[at:]
    return bytes(new)


@fuzz
@given(data=st.data())
def test_header(files: dict[str, bytes], data: st.DataObject) -> None:
    header, tensors = parts(files)
    for _ in range(data.draw(st.integers(1, 3))):
        header = edit_json(data, header)
    survives(sealed(files, header, tensors))


@fuzz
@given(data=st.data())
def test_table(files: dict[str, bytes], data: st.DataObject) -> None:
    header, tensors = parts(files)
    if data.draw(st.booleans()):
        survives(sealed(files, header, edit_bytes(data, files["samples.safetensors"])))
        return
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        action = data.draw(st.sampled_from(["value", "value", "value", "value", "type", "shape", "longer"]))
        if action == "value" and tensor.size:
            number = data.draw(NUMBERS)
            tensor.reshape(-1)[data.draw(st.integers(0, tensor.size - 1))] = np.array(number).astype(tensor.dtype)
        elif action == "type":
            tensors[name] = tensor.astype(data.draw(st.sampled_from([np.float64, np.int64, np.uint8, np.float16])))
        elif action == "shape":
            tensors[name] = tensor.reshape(data.draw(st.sampled_from([(1, -1), (-1, 1)])))
        elif action == "longer":
            tensors[name] = np.concatenate([tensor.reshape(-1)] * data.draw(st.integers(1, 3)))
    survives(sealed(files, header, tensors))


def with_sample(files: dict[str, bytes], new: bytes) -> dict[str, bytes]:
    """Sample 0, the first of shard 0, replaced by other bytes, with all that the index says about it."""
    header, tensors = parts(files)
    old = int(tensors["bytes"][0])
    new += bytes(-len(new) % 512) or (b"" if new else bytes(512))
    name = header["shards"][0]["name"]
    shard = new + files[name][old:]
    header["shards"][0].update(bytes=len(shard), sha256=hashlib.sha256(shard).hexdigest())
    tensors["bytes"][0], tensors["crc32"][0] = len(new), zlib.crc32(new)
    tensors["offset"][1] += len(new) - old
    return {**sealed(files, header, tensors), name: shard}


@fuzz
@given(data=st.data())
def test_tar(files: dict[str, bytes], data: st.DataObject) -> None:
    _, tensors = parts(files)
    old = files["shard-000000.tar"][: int(tensors["bytes"][0])]
    if data.draw(st.booleans()):  # a header, with its own checksum mended
        at = 512 * data.draw(st.integers(0, len(old) // 512 - 1))
        block = bytearray(edit_bytes(data, old[at : at + 512], keep_size=True))
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        survives(with_sample(files, old[:at] + bytes(block) + old[at + 512 :]))
    else:
        survives(with_sample(files, edit_bytes(data, old)))


@fuzz
@given(data=st.data())
def test_clip_json(files: dict[str, bytes], data: st.DataObject) -> None:
    _, tensors = parts(files)
    old = files["shard-000000.tar"][: int(tensors["bytes"][0])]
    at = old.rindex(b'{"key"')
    text = old[at:].rstrip(b"\0")
    new = json.dumps(edit_json(data, json.loads(text))).encode() if data.draw(st.booleans()) else edit_bytes(data, text)
    header = bytearray(old[at - 512 : at])
    header[124:136] = b"%011o\0" % len(new)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    survives(with_sample(files, old[: at - 512] + bytes(header) + new))


@fuzz
@given(data=st.data(), codec=st.sampled_from(sorted(SUFFIXES)))
def test_frames(data: st.DataObject, codec: str) -> None:
    """Damaged frames of every codec, and those of another: an error, or a picture of the size that was promised."""
    settings = DecodeSettings(frames=1, codec=codec, quality=90 if codec in LOSSY else None)
    pixels = np.random.default_rng(data.draw(st.integers(0, 9))).integers(0, 256, (1, 24, 32, 3), dtype=np.uint8)
    (stored,) = encode_frames(pixels, settings)
    other = data.draw(st.sampled_from(sorted(SUFFIXES)))
    try:
        frames = decode_frames([edit_bytes(data, stored)], other, 24, 32)
    except FrameError as error:
        assert str(error).startswith("frame 0: ")  # noqa: PT017
        return
    assert frames.shape == (1, 24, 32, 3)


def test_untouched_shards_survive(files: dict[str, bytes], tmp_path: Path) -> None:
    """The cases above start from a folder that is read without an error."""
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for folder in (
        Memory(with_sample(files, files["shard-000000.tar"][: int(parts(files)[1]["bytes"][0])])),
        LocalFolder(tmp_path),
    ):
        reader = ShardReader(ShardIndex.read(folder))
        assert [reader.read(i).about.key for i in range(4)] == ["a_clip0", "a_clip1", "b_clip0", "b_clip1"]
