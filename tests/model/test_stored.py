"""Damaged, foreign and hostile files: each is answered with its name."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidcls.model.stored import INDEX_NAME, StoredTensors, differing_shapes, read_shapes, read_tensors


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three tensors in two files, and their index."""
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half()}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(5).bfloat16()}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("remap_bytes", [None, 1, 30])
def test_every_tensor_streams_once(folder, remap_bytes):
    stored = StoredTensors.open(folder)
    assert stored.shapes == {"a": (2, 3), "b": (4,), "c": (5,)}
    found = dict(stored.stream(remap_bytes=remap_bytes))
    assert list(found) == ["a", "b", "c"]
    assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(stored.read("c"), found["c"])


def test_a_single_file_comes_first(folder):
    save_file({"d": torch.zeros(1)}, folder / "model.safetensors")
    assert set(StoredTensors.open(folder).files) == {"d"}


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "three.safetensors"}, r"three.safetensors does not exist, though model.safetensors.index.json names it"),
        ({"a": "two.safetensors", "c": "two.safetensors"}, r"two.safetensors: a is not in it, though .* says so"),
        ({"a": "one.safetensors", "z": "one.safetensors"}, r"one.safetensors: z is not in it"),
        ({"a": "../one.safetensors"}, r"names '../one.safetensors'; it must be a .safetensors file beside the index"),
        ({"a": "/etc/passwd"}, r"names '/etc/passwd'"),
        ({"a": "one.bin"}, r"names 'one.bin'"),
        ({"a": 3}, r"weight_map must hold a file name per tensor"),
        ({}, r"weight_map must hold"),
        ([], r"weight_map must hold"),
    ],
)
def test_an_index_that_is_wrong(folder, weight_map, reason):
    write_index(folder, weight_map)
    with pytest.raises(ValueError, match=reason):
        StoredTensors.open(folder)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"weight_map": null}'])
def test_an_index_that_is_damaged(folder, text):
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(ValueError, match=INDEX_NAME):
        StoredTensors.open(folder)


def test_a_tensor_in_two_files(folder):
    save_file({"c": torch.zeros(5), "a": torch.zeros(1)}, folder / "two.safetensors")
    with pytest.raises(ValueError, match=r"two.safetensors: a is in one.safetensors too; a tensor must be stored once"):
        StoredTensors.open(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:5],
        lambda raw: raw[:-3],
        lambda raw: raw[:8] + b"xx" + raw[10:],
        lambda raw: (2**40).to_bytes(8, "little") + raw[8:],
        lambda raw: b"PK\x03\x04" + raw[4:],
        lambda raw: pickle.dumps({"a": 1}),
    ],
)
def test_a_damaged_file(folder, damage):
    path = folder / "one.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"one.safetensors is damaged or no safetensors file: "):
        StoredTensors.open(folder)


def test_a_file_that_git_did_not_fetch(folder):
    (folder / "one.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="it is a git-lfs pointer: run `git lfs pull`"):
        StoredTensors.open(folder)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_pickles_are_refused_and_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has pickled weights only \(pytorch_model.bin\), which can run code"):
        StoredTensors.open(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match=r"has no weights; it must have model.safetensors, or model.safetensors.index"):
        StoredTensors.open(tmp_path)


def test_the_fingerprint_follows_names_and_values(folder, tmp_path_factory):
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "model")
    assert StoredTensors.open(folder).fingerprint() == StoredTensors.open(copy).fingerprint()
    save_file({"c": torch.zeros(5).half()}, copy / "two.safetensors")
    assert StoredTensors.open(folder).fingerprint() != StoredTensors.open(copy).fingerprint()


def test_one_file_and_its_header_alone(folder):
    path = folder / "one.safetensors"
    assert torch.equal(read_tensors(path)["a"], torch.arange(6.0).reshape(2, 3))
    assert read_shapes(path) == {"a": (2, 3), "b": (4,)}
    path.write_bytes(path.read_bytes()[:-1])
    for read in (read_tensors, read_shapes):
        with pytest.raises(ValueError, match=r"one\.safetensors cannot be read"):
            read(path)
        with pytest.raises(ValueError, match=r"none\.safetensors does not exist"):
            read(folder / "none.safetensors")


def test_shapes_that_differ_are_counted_and_the_first_is_named():
    needed = {"a": (2, 3), "b": (4,), "c": ()}
    assert differing_shapes(dict(needed), needed) is None
    assert differing_shapes({"d": (1,), **needed, "b": (5,)}, needed) == (
        "2 tensors differ from this model, the first is b: stored (5,), needed (4,)"
    )
    assert differing_shapes({"a": (2, 3), "c": ()}, needed) == (
        "1 tensor differs from this model, the first is b: stored not at all, needed (4,)"
    )
