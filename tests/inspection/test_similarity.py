from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from tests.support.clips import class_folder, video
from tools.make_motion_clips import motion_frames
from vidcls.data.index import ShardIndex
from vidcls.data.labels import LabelSpace
from vidcls.data.settings import DecodeSettings
from vidcls.data.shards import ClipInfo
from vidcls.inspection import similarity
from vidcls.inspection.similarity import MAX_DISTANCE, Looks, clip_hash, look_at, matches, ssv2_id, ucf101_group
from vidcls.sharding.readers.ucf101 import read_ucf101
from vidcls.sharding.records import ClipRecord
from vidcls.sharding.writer import Plan, write_shards


def moving(seed: int, frames: int = 16, size: int = 64) -> np.ndarray:
    return motion_frames(np.random.default_rng(seed), "right", frames, size)


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return sum((int(x) ^ int(y)).bit_count() for x, y in zip(a, b, strict=True))


def infos(sources: list[str | None], **fields: object) -> list[ClipInfo | None]:
    one = ClipInfo(
        key="k", label=0, class_name="a", source="", frame_times=[0.0], decoder="av", original_size=(9, 9), **fields
    )
    return [None if source is None else one.model_copy(update={"source": source}) for source in sources]


def looks(sources: list[str | None], hashes: np.ndarray | None = None, seed: int = 0) -> Looks:
    """Clips k0, k1, ...; random hashes differ in 128 bits or so."""
    if hashes is None:
        hashes = np.random.default_rng(seed).integers(0, 2**64, (len(sources), 4), dtype=np.uint64)
    keys = [f"k{i}" for i in range(len(sources))]
    return Looks(keys, ["a"] * len(sources), infos(sources), hashes, {})


def test_bits_are_those_of_a_dct_by_scipy() -> None:
    """Word 0, from the first four of 16 frames."""
    frames = moving(1)
    grey = [np.asarray(Image.fromarray(f).convert("L").resize((32, 32), Image.Resampling.BOX), float) for f in frames]
    spectrum = scipy.fft.dctn(np.mean(grey[:4], axis=0), type=2)
    bits = np.unpackbits(clip_hash(frames)[:1].view(np.uint8)).astype(bool)
    lowest = [(u, v) for u in range(32) for v in range(32) if 1 <= u + v <= 9]  # 54 frequencies: all within the 64
    assert bits.sum() == 32
    values = sorted(spectrum[u, v] for u, v in lowest)
    # Whatever the order of the bits, the largest coefficients are set and the smallest are not.
    order = [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0)]
    expected = [spectrum[f] > np.median(values) for f in order if abs(spectrum[f]) > 100]
    found = [bit for bit, f in zip(bits[:5], order, strict=True) if abs(spectrum[f]) > 100]
    assert len(found) >= 3
    assert found == expected


def test_hash_survives_other_sizes_brightness_and_frame_counts() -> None:
    frames = moving(2, 32)
    original = clip_hash(frames)
    larger = np.stack([np.asarray(Image.fromarray(frame).resize((240, 160))) for frame in frames])
    assert distance(original, clip_hash(larger)) <= 16
    assert distance(original, clip_hash((frames * 0.7 + 20).astype(np.uint8))) <= 16
    assert distance(original, clip_hash(frames[1::2])) <= 16
    assert distance(original, clip_hash(moving(3, 32))) > MAX_DISTANCE


def test_hash_of_odd_clips() -> None:
    black = np.zeros((5, 20, 30, 3), dtype=np.uint8)
    assert clip_hash(black).tolist() == [0, 0, 0, 0]
    assert clip_hash(black + 255).tolist() == [0, 0, 0, 0]
    assert clip_hash(moving(1)[:1]).shape == (4,)
    assert clip_hash(np.zeros((1, 1, 500, 3), dtype=np.uint8)).dtype == np.uint64


@pytest.mark.parametrize("within", [False, True])
def test_pairs_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch, within: bool) -> None:
    """Blocks that do not divide, more pairs than are listed, clips that could not be read, the largest distance."""
    monkeypatch.setattr(similarity, "BLOCK_ROWS", 7)
    monkeypatch.setattr(similarity, "BLOCK_COLUMNS", 11)
    monkeypatch.setattr(similarity, "LISTED", 20)
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2**64, (3, 4), dtype=np.uint64)

    def some(count: int, name: str) -> Looks:
        noise = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
        for _ in range(3):
            noise &= rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
        hashes = centres[rng.integers(0, 3, count)] ^ noise
        hashes[0] = ~hashes[1]  # 256 bits apart
        return looks([None if i % 5 == 2 else f"{name}{i}" for i in range(count)], hashes)

    ours = some(40, "a")
    others = ours if within else some(23, "b")
    expected = sorted(
        (distance(ours.hashes[i], others.hashes[j]), i, j)
        for i in range(40)
        for j in range(len(others.keys))
        if (j > i or not within) and ours.infos[i] and others.infos[j]
    )
    expected = [entry for entry in expected if entry[0] <= 40]
    assert len(expected) > 20
    (match,) = matches(ours, None if within else others, 40)
    assert (match.reason, match.count) == ("looks the same", len(expected))
    assert [(pair.distance, pair.sample, pair.other_sample) for pair in match.pairs] == expected[:20]


def test_names_tell_groups_and_numbers() -> None:
    assert ucf101_group("Archery/v_Archery_g07_c02.avi") == "Archery g07"
    assert ucf101_group("v_HandstandPushups_g07_c02.avi") == "HandstandPushups g07"
    assert ucf101_group("Archery/archery_g07.avi") is None
    assert ssv2_id("20bn/12345.webm") == "12345"
    assert ssv2_id("12345.mp4") is None
    assert ssv2_id("0012.webm") is None


def test_sources_groups_and_numbers_between_data_sets() -> None:
    """A pair has the first reasons that fit, and looks count only where there is no other."""
    train = looks(["A/v_A_g01_c01.avi", "A/v_A_g02_c01.avi", "x/7.webm", "8.webm", None])
    test = looks(["A/v_A_g01_c02.avi", "A/v_A_g02_c01.avi", "7.webm", "9.webm", None], seed=1)
    test.hashes[0] = train.hashes[0]
    found = {match.reason: match for match in matches(train, test)}
    assert {reason: [(p.key, p.other_key, p.detail) for p in match.pairs] for reason, match in found.items()} == {
        "same source": [("k1", "k1", "A/v_A_g02_c01.avi")],
        "same UCF101 group": [("k0", "k0", "A g01"), ("k1", "k1", "A g02")],
        "same Something-Something V2 id": [("k2", "k2", "7")],
    }
    test.hashes[3] = train.hashes[0]
    assert matches(train, test)[-1].pairs[0].other_key == "k3"


def test_within_a_data_set_only_parts_that_overlap_are_twice_there() -> None:
    spans = [(0.0, 2.0), (2.0, 4.0), (3.5, 5.0), (None, 1.0), (4.5, None)]
    one = looks(["v.mp4"] * 5 + ["w.mp4"])
    parts = [
        info.model_copy(update={"start": start, "end": end})  # type: ignore[union-attr]
        for info, (start, end) in zip(one.infos, spans, strict=False)
    ]
    (match,) = matches(replace(one, infos=[*parts, one.infos[5]]), None)
    assert match.reason == "same source"
    assert match.count == 3
    assert {(pair.sample, pair.other_sample) for pair in match.pairs} == {(0, 3), (1, 2), (2, 4)}


def test_clips_of_a_group_within_a_data_set_may_look_the_same() -> None:
    one = looks(["v_A_g01_c01.avi", "v_A_g01_c02.avi", "v_A_g02_c01.avi"])
    one.hashes[1] = one.hashes[0]
    assert matches(one, None) == []
    one.hashes[2] = one.hashes[0]
    (match,) = matches(one, None)
    assert [(pair.sample, pair.other_sample, pair.distance) for pair in match.pairs] == [(0, 2, 0), (1, 2, 0)]


def test_many_clips_of_one_source_are_counted_and_not_listed() -> None:
    many = looks(["v.mp4"] * 30_000, np.zeros((30_000, 4), dtype=np.uint64))
    (match,) = matches(many, looks(["v.mp4"] * 1000))
    assert (match.count, len(match.pairs)) == (30_000_000, 1000)
    assert matches(looks(["v.mp4"] * 3000), None)[0].count == 3000 * 2999 // 2


def test_clips_are_read_from_shards(tmp_path: Path) -> None:
    """A copy in another file, codec, size and frame count is found; a damaged clip is named."""
    videos = class_folder(tmp_path / "videos", per_class=2)
    labels = LabelSpace(("a", "b"))
    records = [
        ClipRecord(f"{n}{i}", videos / n / f"clip{i}.mp4", label, n) for label, n in enumerate("ab") for i in (0, 1)
    ]
    write_shards(Plan(records, labels, DecodeSettings(short_side=64), 9), tmp_path / "one", workers=0)
    copy = ClipRecord("copy", video(tmp_path / "copy.avi", seed=100), 1, "b")
    settings = DecodeSettings(frames=12, short_side=48, codec="png", quality=None)
    write_shards(Plan([copy], labels, settings, 9), tmp_path / "two", workers=0)
    index = ShardIndex.open(tmp_path / "one")
    tar = tmp_path / "one" / index.shards[0].name
    data = bytearray(tar.read_bytes())
    data[int(index.offset[1]) + 600] ^= 1
    tar.write_bytes(data)
    progress: list[tuple[int, int]] = []
    one = look_at(tmp_path / "one", index, 0, lambda done, of: progress.append((done, of)))
    two = look_at(tmp_path / "two", ShardIndex.open(tmp_path / "two"), 0)
    assert progress[-1] == (4, 4)
    assert list(one.unread) == ["a1"]
    assert "checksum differs" in one.unread["a1"]
    (match,) = matches(one, two)
    assert [(pair.key, pair.other_key) for pair in match.pairs] == [("b0", "copy")]


@pytest.mark.real
def test_real_clips_match_themselves_and_no_others(real_data: Path, tmp_path: Path) -> None:
    """The official test clips stored in two ways. One of them shows the same seconds of a match as a training clip."""
    folder = real_data / "ucf101"
    labels, records = read_ucf101(
        folder / "videos", folder / "annotations" / "subset6_testlist01.txt", folder / "annotations" / "classInd.txt"
    )
    _, train = read_ucf101(
        folder / "videos", folder / "annotations" / "subset6_trainlist01.txt", folder / "annotations" / "classInd.txt"
    )
    records += [record for record in train if record.key == "v_BasketballDunk_g11_c02"]
    kinds = {
        "jpg": DecodeSettings(),
        "fewer": DecodeSettings(frames=None, fps=4.0, max_frames=24, short_side=112, quality=60),
    }
    seen = []
    for name, settings in kinds.items():
        write_shards(Plan(records, labels, settings, 99), tmp_path / name, workers=2)
        seen.append(look_at(tmp_path / name, ShardIndex.open(tmp_path / name), 2))
    for one in seen:
        assert [{pair.key, pair.other_key} for match in matches(one, None) for pair in match.pairs] == [
            {"v_BasketballDunk_g01_c07", "v_BasketballDunk_g11_c02"}
        ]
    same = [distance(*pair) for pair in zip(seen[0].hashes, seen[1].hashes, strict=True)]
    assert sum(d <= MAX_DISTANCE for d in same) >= 42  # of 43
