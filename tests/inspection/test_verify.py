import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.clips import class_folder, text_as_video
from tests.support.forgery import forge, forge_sample
from vidcls.data.index import ShardIndex
from vidcls.data.settings import DecodeSettings
from vidcls.data.shards import ShardReader
from vidcls.inspection import verify as inspection
from vidcls.inspection.verify import Findings, Problem, check_sample, verify
from vidcls.sharding.readers.folder import read_folder
from vidcls.sharding.writer import Plan, write_shards


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 clips of 2 classes in 2 shards, and one that failed."""
    folder = tmp_path_factory.mktemp("made")
    text_as_video(class_folder(folder / "videos") / "b" / "clip2.mp4")
    labels, records = read_folder(folder / "videos")
    write_shards(Plan(records, labels, DecodeSettings(frames=4, short_side=32), 3), folder / "shards", workers=0)
    return folder / "shards"


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return Path(shutil.copytree(made, tmp_path / "shards"))


def told(shards: Path) -> list[str]:
    return [str(problem) for problem in verify(shards, workers=0)]


def rehash(shards: Path) -> None:
    """The index agrees with the shards' bytes as a whole again."""

    def change(header: dict, tensors: dict) -> None:
        for shard in header["shards"]:
            shard["sha256"] = hashlib.sha256((shards / shard["name"]).read_bytes()).hexdigest()

    forge(shards, change)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_good_data_set_has_no_problems(shards: Path, workers: int) -> None:
    progress: list[tuple[int, int]] = []
    assert list(verify(shards, workers, lambda done, of: progress.append((done, of)))) == []
    assert progress == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize("codec", ["webp", "png", "raw"])
def test_the_other_codecs(tmp_path: Path, codec: str) -> None:
    labels, records = read_folder(class_folder(tmp_path / "videos", per_class=1))
    settings = DecodeSettings(frames=2, short_side=32, codec=codec, quality=80 if codec == "webp" else None)
    write_shards(Plan(records, labels, settings, 3), tmp_path / "shards", workers=0)
    assert told(tmp_path / "shards") == []


def test_all_damage_is_found_and_named(shards: Path) -> None:
    """A frame of one clip, a header of another, and both shards' ends."""
    index = ShardIndex.open(shards)
    first, second = (shards / shard.name for shard in index.shards)
    flip(first, int(index.offset[0]) + 512)  # of the first frame's first byte
    flip(first, int(index.offset[2]))
    flip(second, int(index.offset[4] + index.size[4]) + 700)
    flip(first, first.stat().st_size - 1)
    problems = told(shards)
    expected = [
        rf"{first.name}: its sha256 is {hashlib.sha256(first.read_bytes()).hexdigest()}, \w{{64}} in the index",
        rf"{first.name}: byte {first.stat().st_size - 1} belongs to no sample and is not zero",
        rf"{second.name}: its sha256 is ",
        rf"{second.name}: byte {int(index.offset[4] + index.size[4]) + 700} belongs to no sample",
        rf"{first.name}: a_clip0: checksum differs",
        rf"{first.name}: a_clip0: a_clip0.000.jpg: ",
        rf"{first.name}: a_clip2: checksum differs",
        rf"{first.name}: a_clip2: member 'a_clip2.000.jpg': no tar header",
    ]
    assert len(problems) == len(expected), problems
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.match(pattern, problem), (problem, pattern)


def test_shard_cut_short_while_it_is_checked(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex.open(shards)
    cut = int(index.offset[4]) + 100

    class Opened:
        """The index as it was when the tool began."""

        open = staticmethod(lambda place: index)

    monkeypatch.setattr(inspection, "ShardIndex", Opened)
    monkeypatch.setattr("vidcls.inspection.sweep.ShardIndex", Opened)
    os.truncate(shards / index.shards[1].name, cut)
    problems = told(shards)
    assert problems[0] == f"{index.shards[1].name}: has {cut} bytes, {index.shards[1].bytes} in the index"
    assert any(re.search(r"b_clip1: checksum differs", problem) for problem in problems)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"label":0', b'"label":1', "label = 1 in a_clip0.json, but 0 in the index"),
        (b'"frame_times":[', b'"frame_times":]', "a_clip0: the clip's json: "),
        (b"a_clip0.002.jpg", b"a_clip0.003.jpg", "a_clip0: member"),
    ],
)
def test_sample_that_contradicts_the_index(shards: Path, old: bytes, new: bytes, message: str) -> None:
    """With every checksum mended."""

    problems = told(forge_sample(shards, lambda sample: sample.replace(old, new)))
    assert len(problems) == 1
    assert message in problems[0]


def test_frame_of_another_size_and_falling_times(shards: Path) -> None:
    def taller(header: dict, tensors: dict[str, np.ndarray]) -> None:
        tensors["height"][1] = 40

    problems = told(forge(shards, taller))
    assert len(problems) == 4
    assert problems[2] == "shard-000000.tar: a_clip1: a_clip1.002.jpg: is 32x32 pixels, must be 32x40"

    def fall(sample: bytes) -> bytes:
        about = sample.index(b'"frame_times":[') + len(b'"frame_times":[')
        first = sample[about : sample.index(b",", about)]
        return sample[:about] + b"9" + first[1:] + sample[about + len(first) :]

    assert "shard-000000.tar: a_clip0: a_clip0.json: frame_times must not fall" in told(forge_sample(shards, fall))


def test_tar_without_its_end(shards: Path) -> None:
    def change(header: dict, tensors: dict) -> None:
        header["shards"][0]["bytes"] = end + 512

    index = ShardIndex.open(shards)
    end = int(index.offset[2] + index.size[2])
    os.truncate(shards / index.shards[0].name, end + 512)
    forge(shards, change)
    rehash(shards)
    assert told(shards) == ["shard-000000.tar: does not end in two empty blocks, as a tar file must"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, _: header["counts"].update(damaged=1), "counts.damaged = 1, but 0 samples"),
        (lambda header, _: header.update(decoders={"decord": 4}), "decoders = {'decord': 4}, but the samples say"),
        (lambda header, _: header["counts"].update(failed=2), "lists 1 clips, the index has 2 failed"),
    ],
)
def test_wrong_counts(shards: Path, change: Callable, message: str) -> None:
    problems = told(forge(shards, change))
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "failed.jsonl.*the index has 1 failed"),
        ('{"key": "x"}\n', "line 1: must have the texts"),
        ("[" * 100_000 + "\n", "line 1: is not JSON"),
        ("nonsense\n", "line 1: is not JSON"),
        (json.dumps({"key": "a_clip0", "path": "", "class_name": "", "reason": ""}) + "\n", "a_clip0: line 1: this"),
        ('{"key": "x", "path": "", "class_name": "", "reason": ""}', "cut short"),
        ("", "lists 0 clips|cut short"),
    ],
)
def test_wrong_list_of_failures(shards: Path, text: str | None, message: str) -> None:
    (shards / "failed.jsonl").unlink()
    if text is not None:
        (shards / "failed.jsonl").write_text(text)
    problems = told(shards)
    assert problems
    assert re.search(message, "\n".join(problems))


def killed_by_1(reader: ShardReader, sample: int) -> Findings:
    if sample == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return check_sample(reader, sample)


@pytest.mark.timeout(60)
def test_crash_is_a_problem_of_its_clip(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "check_sample", killed_by_1)
    (problem,) = verify(shards, workers=2)
    assert (problem.shard, problem.key) == ("shard-000000.tar", "a_clip1")
    assert "crashed its worker process" in problem.reason


def test_problem_is_one_line() -> None:
    assert str(Problem("s.tar", None, None, "is odd")) == "s.tar: is odd"
    assert str(Problem("s.tar", "k", "k.json", "is odd")) == "s.tar: k: k.json: is odd"
