"""What the index alone tells about a folder of shards; no tar is opened."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vidcls.data.index import ShardIndex

FIRST_PROMPTS = 5


@dataclass(frozen=True)
class Overview:
    """Numbers of one data set. bytes: of its tars.

    per_class: clips of each class, in label order. frame_counts: (frames, clips), rising. frame_sizes: ((height,
    width), clips), the most frequent first. prompts: how many different ones; first_prompts: some of them;
    without_prompt: clips that leave it to the recipe.
    """

    place: str
    digest: str
    clips: int
    failed: int
    damaged: int
    classes: tuple[str, ...]
    per_class: tuple[int, ...]
    shards: int
    bytes: int
    settings: dict[str, Any]
    decoders: dict[str, int]
    frame_counts: tuple[tuple[int, int], ...]
    frame_sizes: tuple[tuple[tuple[int, int], int], ...]
    prompts: int
    first_prompts: tuple[str, ...]
    without_prompt: int

    @classmethod
    def of(cls, index: ShardIndex) -> "Overview":
        frames, frames_of = np.unique(index.frames, return_counts=True)
        # One number per size: a table's rows are slow to tell apart.
        sizes, sizes_of = np.unique(index.height.astype(np.int64) << 32 | index.width, return_counts=True)
        by_count = np.argsort(-sizes_of, kind="stable")
        return cls(
            place=index.folder.name,
            digest=index.digest,
            clips=len(index),
            failed=index.header.counts.failed,
            damaged=index.header.counts.damaged,
            classes=index.labels.names,
            per_class=tuple(np.bincount(index.label, minlength=len(index.labels)).tolist()),
            shards=len(index.shards),
            bytes=sum(shard.bytes for shard in index.shards),
            settings=index.settings.to_dict(),
            decoders=dict(index.header.decoders),
            frame_counts=tuple(zip(frames.tolist(), frames_of.tolist(), strict=True)),
            frame_sizes=tuple(((int(sizes[i] >> 32), int(sizes[i] & 0xFFFFFFFF)), int(sizes_of[i])) for i in by_count),
            prompts=len(index.prompts),
            first_prompts=tuple(index.prompts[:FIRST_PROMPTS]),
            without_prompt=int((index.prompt < 0).sum()),
        )

    @property
    def by_frequency(self) -> list[tuple[str, int]]:
        """(class, clips) of the classes that have any, the most frequent first."""
        present = [(name, count) for name, count in zip(self.classes, self.per_class, strict=True) if count]
        return sorted(present, key=lambda entry: -entry[1])

    @property
    def empty_classes(self) -> list[str]:
        return [name for name, count in zip(self.classes, self.per_class, strict=True) if not count]

    @property
    def imbalance(self) -> float:
        """Clips of the most frequent class for each clip of the least frequent one that has any."""
        ordered = self.by_frequency
        return ordered[0][1] / ordered[-1][1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"imbalance": self.imbalance, "empty_classes": self.empty_classes}
