import hashlib
import json
import os
import pickle
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.clips import class_folder
from vidcls.data.decode import DecodeSettings, decode_jpegs
from vidcls.data.packing import write_shards
from vidcls.data.records import read_folder
from vidcls.data.shards import ShardError, ShardIndex, ShardReader, StoredSample

SETTINGS = DecodeSettings(frames=4, short_side=32, quality=90)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 clips of 2 classes in 2 shards."""
    folder = tmp_path_factory.mktemp("made")
    labels, records = read_folder(class_folder(folder / "videos"))
    write_shards(records, labels, SETTINGS, folder / "shards", workers=0, samples_per_shard=4)
    return folder / "shards"


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return Path(shutil.copytree(made, tmp_path / "shards"))


def test_index(shards: Path) -> None:
    index = ShardIndex.open(shards)
    assert len(index) == 6
    assert index.labels.names == ("a", "b")
    assert index.settings == SETTINGS
    assert index.keys[5] == "b_clip2"
    assert index.label.tolist() == [0, 0, 0, 1, 1, 1]
    assert index.prompts is None
    assert index.digest == hashlib.sha256((shards / "index.json").read_bytes()).hexdigest()


def test_samples_are_what_tarfile_finds(shards: Path) -> None:
    """Read in another order than stored."""
    found: dict[str, bytes] = {}
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    index = ShardIndex.open(shards)
    reader = ShardReader(index)
    for i in (5, 0, 3, 1, 4, 2):
        sample, key = reader.read(i), index.keys[i]
        about = json.loads(found[f"{key}.json"])
        assert sample.key == key
        assert sample.jpegs == [found[f"{key}.{j:03d}.jpg"] for j in range(4)]
        assert sample.frame_times == about["frame_times"]
        assert (sample.label, sample.class_name) == (about["label"], about["class_name"])
        assert (sample.source, sample.decoder) == (about["source"], about["decoder"])
        assert (sample.original_size, sample.prompt, sample.damage) == ((64, 64), None, None)
        assert decode_jpegs(sample.jpegs).shape == (4, 32, 32, 3)
    for outside in (-1, 6):
        with pytest.raises(IndexError, match="samples 0 to 5"):
            reader.read(outside)


def test_reader_survives_fork_and_pickling(shards: Path) -> None:
    reader = ShardReader(ShardIndex.open(shards))
    expected = reader.read(4)
    assert pickle.loads(pickle.dumps(reader)).read(4) == expected
    child = os.fork()
    if child == 0:
        os._exit(0 if reader.read(4) == expected else 1)
    assert reader.read(4) == expected
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_missing_and_wrong_shards_are_one_error(shards: Path) -> None:
    (shards / "shard-000000.tar").unlink()
    with open(shards / "shard-000001.tar", "ab") as file:
        file.write(b"more")
    with pytest.raises(ShardError, match=r"2 of 2 shards .*000000.tar is missing; shard-000001.tar has \d+ bytes"):
        ShardIndex.open(shards)


def test_every_flipped_byte_of_a_sample_is_found(shards: Path) -> None:
    index = ShardIndex.open(shards)
    path = shards / index.shard_names[0]
    whole = path.read_bytes()
    start, size = int(index.offset[1]), int(index.size[1])
    for position in (start, start + 700, start + size - 1):
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(ShardError, match=r"shard-000000.tar: a_clip1: checksum differs"):
            ShardReader(index).read(1)
        ShardReader(index).read(0)


def test_shard_cut_or_removed_after_opening_is_found(shards: Path) -> None:
    index = ShardIndex.open(shards)
    os.truncate(shards / "shard-000000.tar", int(index.offset[1]) + 600)
    with pytest.raises(ShardError, match=r"shard-000000.tar: a_clip1: checksum differs"):
        ShardReader(index).read(1)
    (shards / "shard-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000000.tar: a_clip1: cannot be read"):
        ShardReader(index).read(1)


def edited(shards: Path, change: Callable[[Any], object]) -> Path:
    """Change index.json by hand."""
    index = json.loads((shards / "index.json").read_text())
    change(index)
    (shards / "index.json").write_text(json.dumps(index))
    return shards


def setter(path: str, value: object) -> Callable[[Any], None]:
    """setter("samples.label.2", 7)(index) sets index["samples"]["label"][2] = 7."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]

    def change(index: Any) -> None:
        for part in parents:
            index = index[part]
        index[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setter("format_version", 2), "format_version = 2: this program reads 1"),
        (lambda index: index.pop("settings"), "'settings' is missing"),
        (lambda index: index["samples"]["label"].pop(), "columns must have one length"),
        (lambda index: [column.clear() for column in index["samples"].values()], "at least 1"),
        (setter("counts.samples", 5), "columns must have one length"),
        (setter("samples.label.2", 2), r"label\[2\] = 2: must be less than 2"),
        (setter("samples.label.2", -1), r"label\[2\] = -1: must be at least 0"),
        (setter("samples.label.2", 0.5), "label: must be a list of whole numbers"),
        (setter("samples.label.2", "0"), "label: must be a list of whole numbers"),
        (setter("samples.shard.2", 9), r"shard\[2\] = 9"),
        (setter("samples.offset.2", 512 * 10**6), r"samples\[2\]: bytes"),
        (setter("samples.offset.2", 1), r"samples\[2\]: bytes 1"),
        (setter("samples.offset.2", 0), "overlap"),
        (setter("samples.key.2", "a_clip1"), "no two the same"),
        (setter("samples.prompt", [1] * 6), "samples.prompt"),
        (setter("settings.frames", 0), "frames = 0"),
        (setter("label_space.names.0", "c"), "changed by hand"),
        (setter("shards.0.name", "../shard-000000.tar"), "plain name"),
        (setter("shards.0.bytes", "many"), "shards.bytes"),
        (setter("samples", []), "damaged"),
    ],
)
def test_wrong_index_is_refused_with_field_and_file(shards: Path, change: Callable, message: str) -> None:
    with pytest.raises(ShardError, match=rf"index.json: .*{message}"):
        ShardIndex.open(edited(shards, change))


def test_index_that_is_no_json(shards: Path) -> None:
    (shards / "index.json").write_bytes((shards / "index.json").read_bytes()[:-20])
    with pytest.raises(ShardError, match=r"index.json: is damaged"):
        ShardIndex.open(shards)


def replaced(shards: Path, old: bytes, new: bytes) -> Path:
    """Sample 0 changed by somebody who also mends the checksum in the index."""
    assert len(old) == len(new)
    path = shards / "shard-000000.tar"
    data = path.read_bytes()
    size = json.loads((shards / "index.json").read_text())["samples"]["bytes"][0]
    assert old in data[:size]
    path.write_bytes(data[:size].replace(old, new) + data[size:])
    return edited(shards, setter("samples.crc32.0", zlib.crc32(path.read_bytes()[:size])))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"label":0', b'"label":1', r"label 1 \('a'\) in a_clip0.json, but 0 \('a'\) in the index"),
        (b'"class_name":"a"', b'"class_name":"b"', r"label 0 \('b'\)"),
        (b'"label":0', b'"table":0', "'label'"),
        (b'"frame_times":[', b'"frame_times":]', "Expecting value"),
        (b'"decoder":', b'"prompt" :', "prompt '(pyav|decord)' in a_clip0.json is not that of the index"),
        (b"a_clip0.002.jpg", b"a_clip0.003.jpg", "bad checksum"),
    ],
)
def test_sample_that_contradicts_the_index_is_refused(shards: Path, old: bytes, new: bytes, message: str) -> None:
    index = ShardIndex.open(replaced(shards, old, new))
    with pytest.raises(ShardError, match=f"shard-000000.tar: a_clip0: .*{message}"):
        ShardReader(index).read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a_clip0.003.jpg"}, "members must be"),
        ({"name": "../a_clip0.002.jpg"}, "members must be"),
        ({"type": tarfile.SYMTYPE}, "not a whole regular file"),
        ({"size": 10**9}, "not a whole regular file"),
        ({"size": -512}, "not a whole regular file|invalid header"),
    ],
)
def test_odd_members_are_refused(shards: Path, change: dict[str, Any], message: str) -> None:
    with tarfile.open(shards / "shard-000000.tar") as tar:
        member = tar.getmember("a_clip0.002.jpg")
    data = (shards / "shard-000000.tar").read_bytes()[member.offset : member.offset + 512]
    for name, value in change.items():
        setattr(member, name, value)
    odd = member.tobuf(tarfile.GNU_FORMAT)[:512]
    index = ShardIndex.open(replaced(shards, data, odd))
    with pytest.raises(ShardError, match=f"shard-000000.tar: a_clip0: .*({message})"):
        ShardReader(index).read(0)


@pytest.mark.parametrize("times", [[0.0], [0.0, float("nan")], [-1.0, 0.0]])
def test_frame_times_must_fit(times: list[float]) -> None:
    with pytest.raises(ShardError, match="frame_times"):
        StoredSample("k", 0, "a", None, times, [b"", b""], "s", "pyav", (1, 1), None)


def test_index_of_200000_samples_opens_quickly(tmp_path: Path) -> None:
    samples, per_shard, size = 200_000, 2048, 9216
    count = -(-samples // per_shard)
    names = [f"shard-{i:06d}.tar" for i in range(count)]
    for name in names:
        with open(tmp_path / name, "wb") as file:
            file.truncate(per_shard * size)  # sparse
    index = {
        "format_version": 1,
        "counts": {"samples": samples},
        "settings": SETTINGS.to_dict(),
        "label_space": {"names": ["a"], "fingerprint": hashlib.sha256(b'["a"]').hexdigest()},
        "shards": [{"name": name, "bytes": per_shard * size} for name in names],
        "samples": {
            "key": [f"class_with_a_name_clip{i}" for i in range(samples)],
            "label": [0] * samples,
            "shard": [i // per_shard for i in range(samples)],
            "offset": [i % per_shard * size for i in range(samples)],
            "bytes": [size] * samples,
            "crc32": list(range(samples)),
            "height": [128] * samples,
            "width": [170] * samples,
        },
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    started = time.process_time()
    assert len(ShardIndex.open(tmp_path)) == samples
    assert time.process_time() - started < 5
