"""Shards of the real clips at hand, at a size for tests."""

from __future__ import annotations

import json
from pathlib import Path

from vidcls.data.labels import LabelSpace
from vidcls.data.settings import DecodeSettings
from vidcls.sharding.readers.ssv2 import read_ssv2
from vidcls.sharding.readers.ucf101 import read_ucf101
from vidcls.sharding.records import ClipRecord
from vidcls.sharding.writer import Plan, write_shards


def ucf101_shards(real_data: Path, folder: Path) -> dict[str, Path]:
    """ "train" (108 clips) and "test" (42) of the official split 1, with the six classes that there are as labels."""
    ucf = real_data / "ucf101"
    lists = {split: ucf / "annotations" / f"subset6_{split}list01.txt" for split in ("train", "test")}
    clips = {split: [line.split()[0] for line in path.read_text().splitlines()] for split, path in lists.items()}
    names = sorted({clip.split("/")[0] for clip in clips["train"]})
    classes = folder / "classes.txt"
    classes.write_text("".join(f"{number} {name}\n" for number, name in enumerate(names, start=1)))
    shards = {}
    for split, listed in clips.items():
        path = folder / f"{split}.txt"
        path.write_text("\n".join(listed))  # without the official labels, which are those of 101 classes
        shards[split] = _write(*read_ucf101(ucf / "videos", path, classes), folder / split)
    return shards


def ssv2_shards(real_data: Path, folder: Path) -> Path:
    """All 13 clips, with the official 174 classes as labels."""
    ssv2 = real_data / "ssv2"
    lists = [ssv2 / "annotations" / f"subset_{split}.json" for split in ("train", "validation")]
    both = folder / "list.json"
    both.write_text(json.dumps([row for path in lists for row in json.loads(path.read_text())]))
    labels = ssv2 / "annotations" / "something-something-v2-labels.json"
    return _write(*read_ssv2(ssv2 / "videos", both, labels), folder / "ssv2")


def _write(labels: LabelSpace, records: list[ClipRecord], out: Path) -> Path:
    write_shards(Plan(records, labels, DecodeSettings(frames=8, short_side=84), 100), out, workers=0)
    return out
