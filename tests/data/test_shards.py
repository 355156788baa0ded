import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.forgery import forge, forge_sample
from vidcls.data.codecs import decode_frames
from vidcls.data.index import ShardError, ShardIndex
from vidcls.data.places import LocalFolder
from vidcls.data.shards import ShardReader


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
        assert json.loads(found[f"{key}.json"]) == json.loads(sample.about.to_json())
        assert sample.frames == [found[f"{key}.{j:03d}.jpg"] for j in range(4)]
        assert (sample.about.key, sample.about.label) == (key, index.label[i])
        assert decode_frames(sample.frames, "jpg", int(index.height[i]), int(index.width[i])).shape == (4, 32, 32, 3)
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


def test_every_flipped_byte_of_a_sample_is_found(shards: Path) -> None:
    index = ShardIndex.open(shards)
    path = shards / index.shards[0].name
    whole = path.read_bytes()
    start, size = int(index.offset[1]), int(index.size[1])
    for position in (start, start + 700, start + size - 1):
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(ShardError, match=r"shard-000000.tar: a_clip1: checksum differs"):
            ShardReader(index).read(1)
        ShardReader(index).read(0)


@pytest.mark.parametrize("healed", [True, False])
def test_damaged_copy_that_can_be_fetched_again_is(shards: Path, healed: bool) -> None:
    whole = (shards / "shard-000000.tar").read_bytes()
    (shards / "shard-000000.tar").write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    asked = []

    class Copies(LocalFolder):
        def mend(self, file: str, size: int, sha256: str) -> bool:
            asked.append(file)
            if healed:
                (shards / file).write_bytes(whole)
            return True

    reader = ShardReader(ShardIndex.read(Copies(shards)))
    if healed:
        assert reader.read(0).about.key == "a_clip0"
    else:
        with pytest.raises(ShardError, match="a_clip0: checksum differs"):
            reader.read(0)
    assert asked == ["shard-000000.tar"]


def test_shard_cut_or_removed_after_opening_is_found(shards: Path) -> None:
    index = ShardIndex.open(shards)
    os.truncate(shards / "shard-000000.tar", int(index.offset[1]) + 600)
    with pytest.raises(ShardError, match=r"shard-000000.tar: a_clip1: checksum differs"):
        ShardReader(index).read(1)
    (shards / "shard-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000000.tar: a_clip1: .*No such file"):
        ShardReader(index).read(1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"label":0', b'"label":1', "label = 1 in a_clip0.json, but 0 in the index"),
        (b'"class_name":"a"', b'"class_name":"b"', "class_name = 'b' in a_clip0.json, but 'a' in the index"),
        (b'"key":"a_clip0"', b'"key":"a_clip1"', "key = 'a_clip1' in a_clip0.json, but 'a_clip0'"),
        (b'"label":0', b'"table":0', "label: Field required"),
        (b'"label":0', b'"label":"', "Invalid JSON"),
        (b'"frame_times":[', b'"frame_times":]', "Invalid JSON"),
        (b'"frame_times":[0', b'"frame_times":[-', "frame_times.0: Input should be greater|Invalid JSON"),
        (b'"source":"a/c', b'"prompt":"a/c', "source: Field required"),
        (b'"original_size":[64', b'"original_size":[00', "Invalid JSON"),
        (b"a_clip0.002.jpg", b"a_clip0.003.jpg", "member 'a_clip0.002.jpg': no tar header at byte .*: bad checksum"),
    ],
)
def test_sample_that_contradicts_the_index_is_refused(shards: Path, old: bytes, new: bytes, message: str) -> None:
    def change(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    with pytest.raises(ShardError, match=f"shard-000000.tar: a_clip0: .*({message})"):
        ShardReader(ShardIndex.open(forge_sample(shards, change))).read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a_clip0.003.jpg"}, "'a_clip0.003.jpg' stands where 'a_clip0.002.jpg' belongs"),
        ({"name": "../../a.002.jpg"}, "'../../a.002.jpg' stands where"),
        ({"name": "/etc/passwd"}, "'/etc/passwd' stands where"),
        ({"name": "a_clip0.pyd"}, "'a_clip0.pyd' stands where"),
        ({"name": "a_clip0.002.jpg", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a symbolic link"),
        ({"type": tarfile.LNKTYPE}, "'a_clip0.002.jpg' is a hard link"),
        ({"type": tarfile.CHRTYPE}, "is a character device"),
        ({"type": tarfile.FIFOTYPE}, "is a named pipe"),
        ({"type": tarfile.DIRTYPE}, "is a folder"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "of the special type b'S'"),
        ({"type": tarfile.XHDTYPE}, "of the special type b'x'"),
        ({"size": 10**9}, r"claims 1000000000 bytes, \d+ are left"),
        ({"size": 2**60}, r"claims 1152921504606846976 bytes"),
        ({"size": -512}, "claims -512 bytes|invalid header"),
        ({"size": 0}, "no tar header"),
    ],
)
def test_odd_members_are_refused(shards: Path, change: dict[str, Any], message: str) -> None:
    with tarfile.open(shards / "shard-000000.tar") as tar:
        member = tar.getmember("a_clip0.002.jpg")
    for name, value in change.items():
        setattr(member, name, value)
    odd = member.tobuf(tarfile.GNU_FORMAT)[:512]

    def put(data: bytes) -> bytes:
        return data[: member.offset] + odd + data[member.offset + 512 :]

    with pytest.raises(ShardError, match=f"shard-000000.tar: a_clip0: member .*({message})"):
        ShardReader(ShardIndex.open(forge_sample(shards, put))).read(0)


def test_what_follows_the_last_member_is_refused(shards: Path) -> None:
    """The range of one sample swallows the next."""

    def change(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["frames"][0] = 3

    with pytest.raises(ShardError, match=r"a_clip0: member 'a_clip0.003.jpg' stands where 'a_clip0.json' belongs"):
        ShardReader(ShardIndex.open(forge(shards, change))).read(0)
