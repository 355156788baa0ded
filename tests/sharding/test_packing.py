import io
import json
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.support.clips import HangingPath, KillingPath, class_folder, sequential_decode, text_as_video, video
from vidcls.data.codecs import resize_frames
from vidcls.data.settings import DecodeSettings
from vidcls.sharding.decode import DecodeError
from vidcls.sharding.packing import PackedClip, pack_all, pack_clip
from vidcls.sharding.readers.folder import read_folder
from vidcls.sharding.records import ClipRecord

SETTINGS = DecodeSettings(frames=4, short_side=32, quality=90)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipRecord:
    """24 frames of 64x64 in 2 seconds."""
    path = video(tmp_path_factory.mktemp("videos") / "clip.mp4")
    return ClipRecord("c-1", path, 0, "a", source="a/clip.mp4")


def members(packed: PackedClip) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(packed.tar + bytes(1024))) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


@pytest.mark.parametrize("codec", ["jpg", "webp", "png", "raw"])
def test_plain_webdataset_reads_the_frames(clip: ClipRecord, tmp_path: Path, codec: str) -> None:
    """Every codec, with webdataset's own decoders, against a sequential decode and PIL's resize."""
    settings = DecodeSettings(4, short_side=32, codec=codec, quality=95 if codec in ("jpg", "webp") else None)
    (tmp_path / "shard.tar").write_bytes(pack_clip(clip, settings).tar + bytes(1024))
    (sample,) = webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False).decode("rgb8")
    assert sample["__key__"] == "c-1"
    frames, times = sequential_decode(clip.path)
    wanted = [3, 9, 15, 21]
    expected = resize_frames(frames[wanted], (32, 32)).astype(int)
    found = np.stack([sample[f"{i:03d}.{settings.suffix}"] for i in range(4)]).astype(int)
    assert np.abs(found - expected).max() <= {"jpg": 40, "webp": 40, "png": 0, "raw": 0}[codec]
    assert np.abs(found - expected).mean() < 3
    assert sample["json"]["frame_times"] == pytest.approx(times[wanted], abs=1e-6)
    assert {name: sample["json"][name] for name in ("key", "label", "class_name", "source", "original_size")} == {
        "key": "c-1",
        "label": 0,
        "class_name": "a",
        "source": "a/clip.mp4",
        "original_size": [64, 64],
    }


def test_bytes_and_checksum(clip: ClipRecord) -> None:
    packed = pack_clip(clip, SETTINGS)
    assert packed == pack_clip(clip, SETTINGS)
    assert (packed.frames, packed.frame_size, packed.crc32) == (4, (32, 32), zlib.crc32(packed.tar))
    assert list(members(packed)) == ["c-1.000.jpg", "c-1.001.jpg", "c-1.002.jpg", "c-1.003.jpg", "c-1.json"]
    with tarfile.open(fileobj=io.BytesIO(packed.tar + bytes(1024))) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode, m.offset % 512) for m in tar} == {(0, 0, 0, "", 0o444, 0)}


def test_longest_key_fits_a_plain_tar_header(clip: ClipRecord) -> None:
    packed = pack_clip(replace(clip, key="k" * 80), SETTINGS)
    with tarfile.open(fileobj=io.BytesIO(packed.tar + bytes(1024))) as tar:
        assert all(not member.pax_headers for member in tar)
        assert tar.getnames()[0] == "k" * 80 + ".000.jpg"


def test_segments_prompts_and_answers_are_stored(clip: ClipRecord) -> None:
    record = replace(clip, start=1.0, end=2.0, prompt="<video>What? <ACTION>", answer="Jump.")
    about = json.loads(members(pack_clip(record, SETTINGS))["c-1.json"])
    assert (about["start"], about["end"]) == (1.0, 2.0)
    assert (about["prompt"], about["answer"]) == ("<video>What? <ACTION>", "Jump.")
    assert all(1.0 <= time < 2.0 for time in about["frame_times"])


@pytest.mark.parametrize(("fps", "most", "frames"), [(2, 64, 4), (12, 64, 24), (12, 10, 10), (100, 999, 24)])
def test_frames_by_rate(clip: ClipRecord, fps: float, most: int, frames: int) -> None:
    settings = DecodeSettings(frames=None, fps=fps, max_frames=most, short_side=32)
    assert pack_clip(clip, settings).frames == frames


def test_frame_area(clip: ClipRecord) -> None:
    assert pack_clip(clip, DecodeSettings(4, short_side=None, max_pixels=3000)).frame_size == (28, 28)
    assert pack_clip(clip, DecodeSettings(4, short_side=None, max_pixels=56 * 56)).frame_size == (56, 56)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ClipRecord]:
    """6 clips, the second is no video."""
    folder = class_folder(tmp_path_factory.mktemp("class_folder"))
    text_as_video(folder / "a" / "clip1.mp4")
    return read_folder(folder)[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_outcomes_come_in_order_whatever_the_number_of_workers(records: list[ClipRecord], workers: int) -> None:
    alone = list(pack_all(records, SETTINGS, 0, 60.0))
    assert list(pack_all(records, SETTINGS, workers, 60.0)) == alone
    assert isinstance(alone[1], str)
    assert "Invalid data" in alone[1]
    keys = [next(iter(members(packed))) for packed in alone if not isinstance(packed, str)]
    assert keys == [f"{key}.000.jpg" for key in ("a_clip0", "a_clip2", "b_clip0", "b_clip1", "b_clip2")]


@pytest.mark.parametrize(
    ("path_type", "reason"),
    [
        (KillingPath, "decoding crashed its worker process (exit code -9)"),
        (HangingPath, "decoding took more than 1 seconds"),
    ],
)
def test_crash_or_hang_costs_one_clip(records: list[ClipRecord], path_type: type, reason: str) -> None:
    records = [record for record in records if record.key != "a_clip1"]
    records[2] = replace(records[2], path=path_type(records[2].path))
    outcomes = list(pack_all(records, SETTINGS, 2, 1.0))
    assert outcomes[2] == reason
    assert all(isinstance(outcome, PackedClip) for i, outcome in enumerate(outcomes) if i != 2)


def test_failures_of_our_own_are_not_blamed_on_the_clip(records: list[ClipRecord]) -> None:
    with pytest.raises(TypeError):
        list(pack_all([replace(records[0], path=None)], SETTINGS, 1, 60.0))  # type: ignore[arg-type]


def test_clips_too_large_to_be_read_back_are_refused(clip: ClipRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidcls.sharding.packing.MAX_SAMPLE_BYTES", 1000)
    with pytest.raises(DecodeError, match=r"clip.mp4: takes \d+ bytes as stored, at most 1000 fit"):
        pack_clip(clip, SETTINGS)
