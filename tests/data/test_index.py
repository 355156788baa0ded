import hashlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.forgery import forge
from vidcls.data.index import COLUMNS, ShardError, ShardIndex, Texts, pack_table
from vidcls.data.settings import DecodeSettings


def test_index(shards: Path) -> None:
    index = ShardIndex.open(shards)
    assert len(index) == 6
    assert index.labels.names == ("a", "b")
    assert index.settings == DecodeSettings(frames=4, short_side=32)
    assert list(index.keys) == [f"{name}_clip{i}" for name in "ab" for i in range(3)]
    assert (index.keys[5], index.keys[-1], index.keys[1:3]) == ("b_clip2", "b_clip2", ["a_clip1", "a_clip2"])
    assert index.label.tolist() == [0, 0, 0, 1, 1, 1]
    assert index.frames.tolist() == [4] * 6
    assert index.prompt_of(3) is None
    assert index.digest == hashlib.sha256((shards / "index.json").read_bytes()).hexdigest()


def test_missing_and_wrong_shards_are_one_error(shards: Path) -> None:
    (shards / "shard-000000.tar").unlink()
    with open(shards / "shard-000001.tar", "ab") as file:
        file.write(b"more")
    with pytest.raises(ShardError, match=r"2 of 2 files .*000000.tar is missing; shard-000001.tar has \d+ bytes"):
        ShardIndex.open(shards)


def setter(path: str, value: object) -> Callable[[Any, Any], None]:
    """setter("label.2", 7)(header, tensors) sets tensors["label"][2] = 7, or else header["label"][2]."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]

    def change(header: Any, tensors: Any) -> None:
        place = tensors if (parents or [last])[0] in tensors else header
        for part in parents:
            place = place[part]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setter("format_version", 1), "format_version = 1: this program reads 2; make the shards anew"),
        (lambda header, _: header.pop("settings"), "settings: Field required"),
        (setter("pickle", "x"), "pickle: Extra inputs"),
        (setter("label", np.zeros(5, np.int32)), "columns must have one length"),
        (setter("label", np.zeros((6, 1), np.int32)), "columns must have one length"),
        (setter("label", np.zeros(6, np.float32)), "each of its own type"),
        (lambda _, tensors: tensors.pop("crc32"), "must have the columns"),
        (setter("counts/samples", 5), "columns must have one length"),
        (setter("counts/samples", 0), "counts.samples: "),
        (setter("counts/failed", -1), "counts.failed: "),
        (setter("label/2", 2), r"label\[2\] = 2: must be at least 0 and less than 2"),
        (setter("label/2", -1), r"label\[2\] = -1"),
        (setter("shard/2", 9), r"shard\[2\] = 9"),
        (setter("shard/0", 1), "its bytes overlap"),
        (setter("offset/2", 512 * 10**6), "sample 2: .* within the"),
        (setter("offset/2", 2**63 - 512), "sample 2: "),
        (setter("offset/2", -512), "sample 2: "),
        (setter("offset/2", 1), "sample 2: .* from 1 must be whole blocks"),
        (setter("offset/2", 0), "overlap"),
        (setter("bytes/2", 2**40), r"bytes\[2\] = "),
        (setter("bytes/2", 0), r"bytes\[2\] = 0"),
        (setter("frames/2", 5), r"frames\[2\] = 5: must be at least 1 and less than 5"),
        (setter("height/2", 2**30), r"height\[2\]"),
        (lambda _, t: (t["height"].fill(2**20), t["width"].fill(2**20)), r"height x width\[0\] = 1099511627776"),
        (setter("prompt/2", 0), r"prompt\[2\] = 0"),
        (lambda _, t: t["key.utf8"].__setitem__(slice(7, 14), t["key.utf8"][:7]), r"key\[1\] = 'a_clip0': another"),
        (lambda _, t: t["key.utf8"].__setitem__(0, ord("/")), r"key\[0\] = '/_clip0': must be"),
        (lambda _, t: t["key.utf8"].__setitem__(0, 0xFF), "not UTF-8"),
        (setter("key.ends/0", 70), "must rise from 0 to the 42 bytes"),
        (setter("key.ends/5", 41), "must rise from 0 to the 42 bytes"),
        (setter("settings/frames", 0), "frames = 0"),
        (setter("settings/codec", "pkl"), "codec = 'pkl'"),
        (setter("label_space/names/0", "c"), "changed by hand"),
        (setter("shards/0/name", "../shard-000000.tar"), "shards.0.name: "),
        (setter("shards/0/name", "shard-000001.tar"), "same name"),
        (setter("shards/0/bytes", "many"), "shards.0.bytes: "),
        (setter("shards/0/samples", 3), r"shards\[0\].samples = 3: the table has 4"),
    ],
)
def test_index_that_lies_is_refused_with_the_field(shards: Path, change: Callable, message: str) -> None:
    with pytest.raises(ShardError, match=rf"shards: index.json.*: .*{message}"):
        ShardIndex.open(forge(shards, change))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"format_version": NaN}', b"0" * 5000])
def test_index_that_is_no_json(shards: Path, text: bytes) -> None:
    (shards / "index.json").write_bytes(text)
    with pytest.raises(ShardError, match=r"index.json: "):
        ShardIndex.open(shards)


def test_damaged_and_foreign_tables_are_refused(shards: Path) -> None:
    data = bytearray((shards / "samples.safetensors").read_bytes())
    data[-1] ^= 1
    (shards / "samples.safetensors").write_bytes(data)
    with pytest.raises(ShardError, match=r"samples.safetensors does not belong to this index.json, or is damaged"):
        ShardIndex.open(shards)
    (shards / "samples.safetensors").unlink()
    with pytest.raises(ShardError, match=r"samples.safetensors: .* is not a finished data set"):
        ShardIndex.open(shards)


def test_huge_files_are_not_read(shards: Path) -> None:
    os.truncate(shards / "index.json", 2**40)  # sparse
    tracemalloc.start()
    with pytest.raises(ShardError, match=r"index.json: has 1099511627776 bytes, more than the \d+"):
        ShardIndex.open(shards)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


@pytest.mark.parametrize("place", ["pipe:touch pwned", "pipe:cat index.json", "file:///etc", "gs://b/x", "exec:id"])
def test_commands_and_other_protocols_are_refused(tmp_path: Path, monkeypatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardError, match="must be a local folder, or a URL that starts with http"):
        ShardIndex.open(place)
    assert list(tmp_path.iterdir()) == []


def test_texts() -> None:
    written = ["", "ä", "two words", ""]
    utf8, ends = Texts.pack(written)
    texts = Texts(utf8.tobytes(), ends)
    assert list(texts) == [texts[i] for i in range(4)] == texts[:] == written
    assert "ä" in texts
    with pytest.raises(IndexError):
        texts[4]
    assert list(Texts(b"", np.zeros(0, np.int64))) == []


def test_table_is_the_same_bytes_whatever_the_order_of_its_columns() -> None:
    columns = {name: [1, 2] for name in COLUMNS}
    backwards = dict(reversed(columns.items()))
    assert pack_table(columns, ["a", "b"], []) == pack_table(backwards, ["a", "b"], [])
