import hashlib
import json
import os
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from tests.support.clips import (
    HangingPath,
    KillingPath,
    class_folder,
    mpeg4_avi,
    text_as_video,
    truncated,
)
from vidcls.data.decode import DecodeSettings, decode_clip, resize_frames, target_size
from vidcls.data.labels import LabelSpace
from vidcls.data.packing import ShardSummary, write_shards
from vidcls.data.records import ClipRecord, read_folder
from vidcls.data.shards import ShardError, ShardIndex

SETTINGS = DecodeSettings(frames=4, short_side=32, quality=90)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 classes; a/clip1 is no video, b/clip3 an AVI."""
    folder = class_folder(tmp_path_factory.mktemp("videos"))
    text_as_video(folder / "a" / "clip1.mp4")
    mpeg4_avi(folder / "b" / "clip3.avi")
    return folder


def write(records: list[ClipRecord], labels: LabelSpace, out: Path, workers: int = 0, **options) -> ShardSummary:
    return write_shards(records, labels, SETTINGS, out, workers=workers, samples_per_shard=2, **options)


def write_folder(videos: Path, out: Path, workers: int = 0, **options) -> ShardSummary:
    labels, records = read_folder(videos)
    return write(records, labels, out, workers, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_do_not_depend_on_the_number_of_workers(videos: Path, tmp_path: Path, workers: int) -> None:
    write_folder(videos, tmp_path / "alone")
    summary = write_folder(videos, tmp_path / "workers", workers)
    assert contents(tmp_path / "alone") == contents(tmp_path / "workers")
    assert (summary.samples, summary.failed, summary.damaged, summary.shards) == (6, 1, 0, 4)
    assert sum(summary.decoders.values()) == 6
    assert summary.bytes == sum(path.stat().st_size for path in (tmp_path / "workers").glob("*.tar"))


def test_tars_and_index_agree(videos: Path, tmp_path: Path) -> None:
    """Everything in the index, recomputed with plain tarfile, zlib and hashlib."""
    write_folder(videos, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    # records: a0 a1 | a2 b0 | b1 b2 | b3, and a1 is no video
    assert [shard["samples"] for shard in index["shards"]] == [1, 2, 2, 1]
    assert index["samples"]["key"] == ["a_clip0", "a_clip2", "b_clip0", "b_clip1", "b_clip2", "b_clip3"]
    assert index["samples"]["label"] == [0, 0, 1, 1, 1, 1]
    assert index["samples"]["shard"] == [0, 1, 1, 2, 2, 3]
    assert "prompt" not in index["samples"]
    assert index["counts"] == {"samples": 6, "failed": 1, "damaged": 0}
    for shard in index["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    for i, key in enumerate(index["samples"]["key"]):
        path = tmp_path / index["shards"][index["samples"]["shard"][i]]["name"]
        start, size = index["samples"]["offset"][i], index["samples"]["bytes"][i]
        assert zlib.crc32(path.read_bytes()[start : start + size]) == index["samples"]["crc32"][i]
        with tarfile.open(path) as tar:
            ours = [member for member in tar.getmembers() if start <= member.offset < start + size]
        assert [member.name for member in ours] == [f"{key}.{j:03d}.jpg" for j in range(4)] + [f"{key}.json"]
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in ours} == {(0, 0, 0, "")}


def test_plain_webdataset_reads_the_frames(videos: Path, tmp_path: Path) -> None:
    write_folder(videos, tmp_path)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples][:2] == ["a_clip0", "a_clip2"]
    assert len(samples) == 6
    clip = decode_clip(videos / "a" / "clip0.mp4", 4)
    expected = resize_frames(clip.frames, target_size(64, 64, 32))
    for i in range(4):
        assert np.abs(samples[0][f"{i:03d}.jpg"].astype(int) - expected[i]).mean() < 8
    about = samples[0]["json"]
    assert about == {
        "key": "a_clip0",
        "label": 0,
        "class_name": "a",
        "source": "a/clip0.mp4",
        "frame_times": [round(seconds, 6) for seconds in clip.times],
        "decoder": clip.decoder,
        "original_size": [64, 64],
    }


def test_failed_clips_are_listed(videos: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_folder(videos, tmp_path, progress=lambda done, failed: calls.append((done, failed)))
    (line,) = (tmp_path / "failed.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert (failure["key"], failure["class_name"]) == ("a_clip1", "a")
    assert failure["path"] == str(videos / "a" / "clip1.mp4")
    assert "Invalid data" in failure["reason"]
    assert calls == [(1, 0), *((done, 1) for done in range(2, 8))]


def test_damaged_clips_are_counted_and_marked(tmp_path: Path) -> None:
    whole = mpeg4_avi(tmp_path / "videos" / "a" / "whole.avi", 60)
    truncated(tmp_path / "videos" / "a" / "cut.avi", whole, 0.5)
    assert write_folder(tmp_path / "videos", tmp_path / "out").damaged == 1
    (cut, about) = webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False)
    assert b'"damage":"the file ends after' in cut["json"]
    assert b"damage" not in about["json"]


@pytest.mark.parametrize(
    ("path_type", "reason"),
    [(KillingPath, "crashed (exit code -9)"), (HangingPath, "more than 1 seconds")],
)
def test_crash_or_hang_costs_one_clip(videos: Path, tmp_path: Path, path_type: type, reason: str) -> None:
    labels, records = read_folder(videos)
    records = [record for record in records if record.key != "a_clip1"]
    records[2] = replace(records[2], path=path_type(records[2].path))
    summary = write(records, labels, tmp_path, workers=2, clip_timeout=1.0)
    assert (summary.samples, summary.failed) == (5, 1)
    failure = json.loads((tmp_path / "failed.jsonl").read_text())
    assert failure["key"] == records[2].key
    assert reason in failure["reason"]


def test_failures_of_our_own_are_not_blamed_on_the_clip(videos: Path, tmp_path: Path) -> None:
    labels, records = read_folder(videos)
    with pytest.raises(TypeError):
        write([replace(records[0], path=None)], labels, tmp_path, workers=1)  # type: ignore[arg-type]
    assert not (tmp_path / "index.json").exists()


def test_no_clip_at_all_is_an_error(videos: Path, tmp_path: Path) -> None:
    labels, records = read_folder(videos)
    with pytest.raises(ShardError, match=r"not one of 1 clips could be decoded, see .*failed.jsonl"):
        write([records[1]], labels, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["failed.jsonl"]


def test_finished_data_set_is_kept_unless_told_otherwise(videos: Path, tmp_path: Path) -> None:
    write_folder(videos, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ShardError, match="already holds a finished data set"):
        write_folder(videos, tmp_path)
    assert contents(tmp_path) == before
    labels, records = read_folder(videos)
    write(records[2:4], labels, tmp_path, overwrite=True)
    assert sorted(contents(tmp_path)) == ["index.json", "shard-000000.tar"]  # the old failed.jsonl is gone too


def test_leftovers_of_an_interrupted_run_are_replaced(videos: Path, tmp_path: Path) -> None:
    write_folder(videos, tmp_path / "whole")

    def stop(done: int, failed: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(videos, tmp_path / "out", workers=2, progress=stop)
    assert "index.json" not in contents(tmp_path / "out")
    assert "shard-000000.tar" in contents(tmp_path / "out")
    with pytest.raises(ShardError, match="not a finished data set"):
        ShardIndex.open(tmp_path / "out")
    write_folder(videos, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_files_of_others_are_never_deleted(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "shard-000000.tar").write_text("ours?")
    with pytest.raises(ShardError, match=r"not shards \(thesis.tex\)"):
        write_folder(videos, tmp_path, overwrite=True)
    assert sorted(contents(tmp_path)) == ["shard-000000.tar", "thesis.tex"]
    with pytest.raises(ShardError, match="is a file"):
        write_folder(videos, tmp_path / "thesis.tex")


def test_two_writers_do_not_share_a_folder(videos: Path, tmp_path: Path) -> None:
    def other(done: int, failed: int) -> None:
        with pytest.raises(ShardError, match="another process is writing there"):
            write_folder(videos, tmp_path)

    write_folder(videos, tmp_path, progress=other)
    assert len(ShardIndex.open(tmp_path)) == 6


def test_prompts_are_stored(videos: Path, tmp_path: Path) -> None:
    labels, records = read_folder(videos)
    write([replace(records[0], prompt="What is done?"), records[2]], labels, tmp_path)
    assert ShardIndex.open(tmp_path).prompts == ("What is done?", None)


def test_wrong_plans_are_refused_before_anything_is_written(videos: Path, tmp_path: Path) -> None:
    labels, records = read_folder(videos)
    out = tmp_path / "out"
    for wrong, message in [
        ([], "no clips"),
        ([records[0], records[0]], "a_clip0': two clips"),
        ([replace(records[0], label=1)], "do not agree"),
        ([replace(records[0], label=2)], "do not agree"),
    ]:
        with pytest.raises(ShardError, match=message):
            write(wrong, labels, out)
    with pytest.raises(ShardError, match="workers = -1"):
        write(records, labels, out, workers=-1)
    with pytest.raises(ShardError, match="samples_per_shard = 0"):
        write_shards(records, labels, SETTINGS, out, workers=0, samples_per_shard=0)
    assert not out.exists()


def test_longest_key_fits_a_plain_tar_header(videos: Path, tmp_path: Path) -> None:
    labels, records = read_folder(videos)
    write([replace(records[0], key="k" * 80)], labels, tmp_path)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert all(not member.pax_headers for member in tar)
        assert tar.getnames()[0] == "k" * 80 + ".000.jpg"


@pytest.mark.real
def test_real_clips_are_packed(real_data: Path, tmp_path: Path) -> None:
    labels = LabelSpace(("all",))
    paths = [*sorted((real_data / "clips").iterdir()), *sorted((real_data / "ssv2" / "videos").iterdir())[:3]]
    records = [ClipRecord(f"c{i}", path, 0, "all") for i, path in enumerate(paths)]
    summary = write(records, labels, tmp_path, workers=os.cpu_count() or 1)
    assert (summary.samples, summary.failed, summary.damaged) == (len(paths), 0, 1)
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file
                    assert min(Image.open(file).size) == 32
