import argparse
import hashlib
from pathlib import Path

import pytest

from vidcls.sharding.readers.folder import add_arguments, read, read_folder
from vidcls.sharding.records import RecordError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ["run/1.mp4", "run/deep/er/2.MP4", "run/3.avi", "run/4.webm", "walk/1.mp4", "one/1.mp4"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ["README.txt", "run/notes.txt", "run/.5.mp4"]:
        (tmp_path / name).touch()
    (tmp_path / "walk/2.mp4").symlink_to(tmp_path / "walk/1.mp4")
    return tmp_path


def test_folder(folder: Path) -> None:
    labels, records = read_folder(folder)
    assert labels.names == ("one", "run", "walk")
    sources = ["one/1.mp4", "run/1.mp4", "run/3.avi", "run/4.webm", "run/deep/er/2.MP4", "walk/1.mp4", "walk/2.mp4"]
    assert [record.source for record in records] == sources
    assert [record.label for record in records] == [0, 1, 1, 1, 1, 2, 2]
    assert records[4].key == "run_deep_er_2"


def test_split_is_stratified_and_fixed(folder: Path) -> None:
    _, train = read_folder(folder, "train")
    _, test = read_folder(folder, "test")
    _, both = read_folder(folder)
    assert sorted(train + test, key=lambda record: record.source) == both  # keys included
    by_hash = sorted(
        (record.source for record in both if record.class_name == "run"),
        key=lambda source: hashlib.sha256(source.encode()).hexdigest(),
    )
    assert [record.source for record in test if record.class_name == "run"] == by_hash[:1]
    assert [record.class_name for record in test] == ["run", "walk"]  # a class with one clip only trains
    _, most = read_folder(folder, "test", 0.99)
    assert [record.class_name for record in most].count("run") == 3  # one is left to train on


def test_options(folder: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = ["--videos", str(folder), "--split", "test", "--test-fraction", "0.99"]
    assert read(parser.parse_args(options)) == read_folder(folder, "test", 0.99)
    assert read(parser.parse_args(options[:2])) == read_folder(folder)


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="split = 'valid'"):
        read_folder(folder, "valid")
    with pytest.raises(RecordError, match=r"test_fraction = 1\.0"):
        read_folder(folder, "test", 1.0)
    with pytest.raises(RecordError, match="is not a folder"):
        read_folder(folder / "none")
    (folder / "empty").mkdir()
    with pytest.raises(RecordError, match="no video files for empty"):
        read_folder(folder)
    with pytest.raises(RecordError, match="no class folders"):
        read_folder(folder / "empty")
    (folder / "empty/only.mp4").touch()
    (tmp_path / "new/c").mkdir(parents=True)
    (tmp_path / "new/c/1.mp4").touch()
    with pytest.raises(RecordError, match="test split is empty"):
        read_folder(tmp_path / "new", "test")
