import errno
import hashlib
import json
import os
import tarfile
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.support.clips import class_folder, mpeg4_avi, text_as_video, truncated
from vidcls.data.index import ShardError, ShardIndex
from vidcls.data.labels import LabelSpace
from vidcls.data.settings import DecodeSettings
from vidcls.data.shards import ShardReader
from vidcls.sharding.readers.folder import read_folder
from vidcls.sharding.records import ClipRecord
from vidcls.sharding.writer import Plan, ShardSummary, write_shards

SETTINGS = DecodeSettings(frames=4, short_side=32, quality=90)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 classes; a/clip1 is no video, b/clip3 an AVI."""
    folder = class_folder(tmp_path_factory.mktemp("videos"))
    text_as_video(folder / "a" / "clip1.mp4")
    mpeg4_avi(folder / "b" / "clip3.avi")
    return folder


def plan_of(videos: Path, **changes: Any) -> Plan:
    labels, records = read_folder(videos)
    return replace(Plan(records, labels, SETTINGS, 2), **changes)


def write(plan: Plan, out: Path, workers: int = 0, **options: Any) -> ShardSummary:
    return write_shards(plan, out, workers=workers, **options)


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run makes."""
    out = tmp_path_factory.mktemp("whole")
    write(plan_of(videos), out)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_do_not_depend_on_the_number_of_workers(videos: Path, whole: dict, tmp_path: Path, workers: int) -> None:
    summary = write(plan_of(videos), tmp_path, workers)
    assert contents(tmp_path) == whole
    assert (summary.samples, summary.failed, summary.damaged, summary.shards) == (6, 1, 0, 4)
    assert sum(summary.decoders.values()) == 6
    assert summary.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))


def test_tars_and_index_agree(videos: Path, tmp_path: Path) -> None:
    """Everything in the index, recomputed with plain tarfile, zlib and hashlib."""
    write(plan_of(videos), tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    table = safetensors.numpy.load((tmp_path / "samples.safetensors").read_bytes())
    # records: a0 a1 | a2 b0 | b1 b2 | b3, and a1 is no video
    assert [shard["samples"] for shard in index["shards"]] == [1, 2, 2, 1]
    keys = ["a_clip0", "a_clip2", "b_clip0", "b_clip1", "b_clip2", "b_clip3"]
    assert table["key.utf8"].tobytes().decode() == "".join(keys)
    assert table["label"].tolist() == [0, 0, 1, 1, 1, 1]
    assert table["shard"].tolist() == [0, 1, 1, 2, 2, 3]
    assert table["prompt"].tolist() == [-1] * 6
    assert index["counts"] == {"samples": 6, "failed": 1, "damaged": 0}
    for shard in index["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert len(data) % 10240 == 0  # whole records, as tar programs write them
    for i, key in enumerate(keys):
        path = tmp_path / index["shards"][table["shard"][i]]["name"]
        start, size = int(table["offset"][i]), int(table["bytes"][i])
        assert zlib.crc32(path.read_bytes()[start : start + size]) == table["crc32"][i]
        with tarfile.open(path) as tar:
            ours = [member for member in tar.getmembers() if start <= member.offset < start + size]
        assert [member.name for member in ours] == [f"{key}.{j:03d}.jpg" for j in range(4)] + [f"{key}.json"]


def test_failed_clips_are_listed(videos: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, int]] = []
    write(plan_of(videos), tmp_path, progress=lambda *numbers: calls.append(numbers))
    (line,) = (tmp_path / "failed.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert (failure["key"], failure["class_name"]) == ("a_clip1", "a")
    assert failure["path"] == str(videos / "a" / "clip1.mp4")
    assert "Invalid data" in failure["reason"]
    assert calls == [(1, 0, 7), *((done, 1, 7) for done in range(2, 8))]


def test_damaged_clips_are_counted_and_marked(tmp_path: Path) -> None:
    full = mpeg4_avi(tmp_path / "videos" / "a" / "whole.avi", 60)
    truncated(tmp_path / "videos" / "a" / "cut.avi", full, 0.5)
    assert write(plan_of(tmp_path / "videos"), tmp_path / "out").damaged == 1
    reader = ShardReader(ShardIndex.open(tmp_path / "out"))
    assert (reader.read(0).about.damage or "").startswith("the file ends after")
    assert reader.read(1).about.damage is None


def test_no_clip_at_all_is_an_error(videos: Path, tmp_path: Path) -> None:
    plan = plan_of(videos)
    with pytest.raises(ShardError, match=r"not one of 1 clips could be decoded, see .*failed.jsonl"):
        write(replace(plan, records=[plan.records[1]]), tmp_path)
    assert not (tmp_path / "index.json").exists()


class Stop(BaseException):
    pass


@pytest.mark.parametrize("clips", range(1, 8))
def test_stopped_after_any_clip_it_goes_on_with_the_same_bytes(
    videos: Path, whole: dict, tmp_path: Path, clips: int
) -> None:
    def stop(done: int, failed: int, of: int) -> None:
        if done == clips:
            raise Stop

    with pytest.raises(Stop):
        write(plan_of(videos), tmp_path, progress=stop)
    with pytest.raises(ShardError, match="not a finished data set"):
        ShardIndex.open(tmp_path)
    summary = write(plan_of(videos), tmp_path)
    assert contents(tmp_path) == whole
    assert summary.made == 7 - 2 * ((clips - 1) // 2)  # whole shards of 2 stay; one is made again


@pytest.mark.parametrize("writes", range(1, 20))
def test_killed_between_any_two_files_it_goes_on_with_the_same_bytes(
    videos: Path, whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """os.replace and unlink are where the folder changes: stop before the n-th of them, as a SIGKILL would."""
    with monkeypatch.context() as patched:
        left = writes

        def counted(function: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left <= 0:  # nothing is cleaned up either
                    raise Stop
                return function(*arguments, **options)

            return call

        patched.setattr(os, "replace", counted(os.replace))
        patched.setattr(Path, "unlink", counted(Path.unlink))
        try:
            write(plan_of(videos), tmp_path)
            finished = True
        except Stop:
            finished = False
    # The plan, 4 shards with their notes, the failures, the table and the index are renamed, then the notes removed.
    assert finished == (writes > 12 + 5)
    write(plan_of(videos), tmp_path)
    assert contents(tmp_path) == whole


def test_finished_data_set_is_left_as_it_is(videos: Path, whole: dict, tmp_path: Path) -> None:
    write(plan_of(videos), tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    summary = write(plan_of(videos), tmp_path)
    assert (summary.made, summary.samples, summary.failed) == (0, 6, 1)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    other = plan_of(videos, settings=DecodeSettings(frames=2, short_side=32))
    with pytest.raises(ShardError, match=r"already holds another finished data set; .* --overwrite"):
        write(other, tmp_path)
    assert contents(tmp_path) == whole
    write(replace(other, records=other.records[2:4]), tmp_path, overwrite=True)
    # the old failed.jsonl is gone too
    assert sorted(contents(tmp_path)) == ["index.json", "samples.safetensors", "shard-000000.tar"]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"settings": DecodeSettings(frames=2, short_side=32)}, "frames: 4 there, 2 now"),
        ({"samples_per_shard": 3}, "samples_per_shard: 2 there, 3 now"),
        ({"labels": LabelSpace(("a", "b", "c"))}, "label_space: "),
        ({"records": "prompts"}, "other clips, labels or prompts"),
    ],
)
def test_unfinished_data_set_of_another_plan_is_refused(
    videos: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], difference: str
) -> None:
    def stop(done: int, failed: int, of: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        write(plan_of(videos), tmp_path, progress=stop)
    before = contents(tmp_path)
    if changes.get("records") == "prompts":
        changes = {"records": [replace(record, prompt="?") for record in plan_of(videos).records]}
    with pytest.raises(ShardError, match=rf"beginning of another data set \({difference}.*--overwrite"):
        write(plan_of(videos, **changes), tmp_path)
    assert contents(tmp_path) == before
    write(plan_of(videos, **changes), tmp_path, overwrite=True)
    alone = tmp_path_factory.mktemp("alone")
    write(plan_of(videos, **changes), alone)
    assert contents(tmp_path) == contents(alone)


def test_files_of_others_are_never_deleted(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "shard-000000.tar").write_text("ours?")
    with pytest.raises(ShardError, match=r"not shards \(thesis.tex\)"):
        write(plan_of(videos), tmp_path, overwrite=True)
    (tmp_path / "thesis.tex").rename(tmp_path.parent / "thesis.tex")
    with pytest.raises(ShardError, match=r"another data set \(files without plan.json: shard-000000.tar\)"):
        write(plan_of(videos), tmp_path)
    assert sorted(contents(tmp_path)) == ["shard-000000.tar"]
    with pytest.raises(ShardError, match="is a file"):
        write(plan_of(videos), tmp_path.parent / "thesis.tex")


def test_two_writers_do_not_share_a_folder(videos: Path, tmp_path: Path) -> None:
    def other(done: int, failed: int, of: int) -> None:
        with pytest.raises(ShardError, match="another process is writing there"):
            write(plan_of(videos), tmp_path)

    write(plan_of(videos), tmp_path, progress=other)
    assert len(ShardIndex.open(tmp_path)) == 6


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_named_and_can_be_gone_on_from(
    videos: Path, whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    flushed = 0

    def full(descriptor: int) -> None:
        nonlocal flushed
        flushed += 1
        if flushed == 7:
            raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ShardError, match="the disk is full; make space, then the same command goes on"):
            write(plan_of(videos), tmp_path)
    assert not [name for name in contents(tmp_path) if name.endswith(".tmp")]
    write(plan_of(videos), tmp_path)
    assert contents(tmp_path) == whole


def test_prompts_are_stored_once(videos: Path, tmp_path: Path) -> None:
    plan = plan_of(videos)
    prompts = ["What?", None, "How?", "What?", None, None, "How?"]
    records = [replace(record, prompt=prompt) for record, prompt in zip(plan.records, prompts, strict=True)]
    write(replace(plan, records=records), tmp_path)
    index = ShardIndex.open(tmp_path)
    assert list(index.prompts) == ["What?", "How?"]
    assert [index.prompt_of(i) for i in range(6)] == ["What?", "How?", "What?", None, None, "How?"]
    assert [ShardReader(index).read(i).about.prompt for i in (0, 3)] == ["What?", None]


def test_wrong_plans_are_refused_before_anything_is_written(videos: Path, tmp_path: Path) -> None:
    labels, records = read_folder(videos)
    for wrong, message in [
        ([], "no clips"),
        ([records[0], records[0]], "a_clip0': two clips"),
        ([replace(records[0], label=1)], "do not agree"),
        ([replace(records[0], label=2)], "do not agree"),
    ]:
        with pytest.raises(ShardError, match=message):
            Plan(wrong, labels, SETTINGS, 2)
    with pytest.raises(ShardError, match="samples_per_shard = 0"):
        Plan(records, labels, SETTINGS, 0)
    with pytest.raises(ShardError, match="workers = -1"):
        write(plan_of(videos), tmp_path / "out", workers=-1)
    assert not (tmp_path / "out").exists()


class Threads:
    """A team of threads, to see what each member of a team does."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, shared: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.shared = rank, size, barrier, shared

    def share(self, value: Any) -> Any:
        if self.rank == 0:
            self.shared[0] = value
        self.wait()
        return self.shared[0]

    def wait(self) -> None:
        self.barrier.wait(60)

    def end(self, code: int) -> None:
        self.barrier.abort()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_bytes_do_not_depend_on_the_number_of_processes(videos: Path, whole: dict, tmp_path: Path, size: int) -> None:
    barrier, shared = threading.Barrier(size), [None]
    tried: dict[int, int] = dict.fromkeys(range(size), 0)

    def member(rank: int) -> None:
        def count(done: int, failed: int, of: int) -> None:
            tried[rank] = done

        write(plan_of(videos), tmp_path, team=Threads(rank, size, barrier, shared), progress=count)

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert contents(tmp_path) == whole
    assert list(tried.values()) == {2: [4, 3], 3: [3, 2, 2], 5: [2, 2, 2, 1, 0]}[size]


def test_every_change_of_a_record_changes_the_plan() -> None:
    labels = LabelSpace(("a", "b"))
    record = ClipRecord("k", Path("v/k.mp4"), 0, "a", "p", "k.mp4", "said", 1.0, 2.0)
    plan = Plan([record], labels, SETTINGS, 2)
    changes: dict[str, Any] = {
        "key": "l",
        "path": Path("w/k.mp4"),
        "prompt": None,
        "source": "l.mp4",
        "answer": None,
        "start": 1.5,
        "end": None,
    }
    digests = {replace(plan, records=[replace(record, **{name: value})]).digest for name, value in changes.items()}
    assert len(digests | {plan.digest}) == len(changes) + 1
    assert plan.digest == Plan([record], labels, SETTINGS, 2).digest


def test_empty_part_leaves_no_shard(tmp_path: Path) -> None:
    """A shard all of whose clips fail has no file; the numbers of the others stay."""
    class_folder(tmp_path / "videos", classes=("a",), per_class=6)
    for i in (2, 3):
        text_as_video(tmp_path / "videos" / "a" / f"clip{i}.mp4")
    write(plan_of(tmp_path / "videos"), tmp_path / "out")
    index = ShardIndex.open(tmp_path / "out")
    assert [shard.name for shard in index.shards] == ["shard-000000.tar", "shard-000002.tar"]
    assert np.array_equal(index.shard, [0, 0, 1, 1])
    assert ShardReader(index).read(2).about.key == "a_clip4"
