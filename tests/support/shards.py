"""Small folders of shards, made in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vidcls.data.decode import DecodeSettings
from vidcls.data.packing import write_shards
from vidcls.data.records import read_folder


def make_shards(
    videos: Path,
    out: Path,
    *,
    frames: int = 8,
    short_side: int = 56,
    samples_per_shard: int = 100,
    split: str | None = None,
    workers: int = 0,
    **options: Any,
) -> Path:
    """Shard DIR/<class>/<clip> and return the folder."""
    labels, records = read_folder(videos, split=split, **options)
    settings = DecodeSettings(frames=frames, short_side=short_side)
    write_shards(records, labels, settings, out, workers=workers, samples_per_shard=samples_per_shard)
    return out
