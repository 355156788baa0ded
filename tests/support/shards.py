"""Small folders of shards, made in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vidcls.data.batch import ClipEncoder
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice
from vidcls.data.settings import DecodeSettings
from vidcls.options import DEFAULT_PROMPT
from vidcls.sharding.readers.folder import read_folder
from vidcls.sharding.writer import Plan, write_shards


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
    write_shards(Plan(records, labels, settings, samples_per_shard), out, workers=workers)
    return out


def clip_batches(index: ShardIndex, encoder: ClipEncoder, most: int = 16, **options: Any) -> ClipBatches:
    """The clips of one data set."""
    return ClipBatches([ClipSource(index, DEFAULT_PROMPT)], encoder, FrameChoice(most), **options)
