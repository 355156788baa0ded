"""Stored vision features of a run's data sets: which are wanted, where they are, and who reads them.

A frozen tower gives the same for a clip in every epoch, as long as the clip's pixels are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vidcls import distributed
from vidcls.config import Config, ConfigError
from vidcls.data.features import FeatureCache, FeatureError, FeatureOrigin
from vidcls.data.frames import Views
from vidcls.data.index import ShardIndex
from vidcls.model.pretrained import ModelSpec
from vidcls.model.tower import tower_config, tower_digest
from vidcls.training.data_sets import DataSets
from vidcls.training.evaluating import EvalClips

COMMAND = "python tools/cache_features.py RECIPE"


@dataclass(frozen=True)
class VisionCache:
    """The caches below the folder `top` that fit a model. tower, vision: its digest and configuration."""

    top: Path
    spec: ModelSpec
    tower: str
    vision: dict[str, Any]
    jitter: bool

    @classmethod
    def of(cls, config: Config, spec: ModelSpec) -> VisionCache | None:
        """None without vision_cache. Reads the tower's weights once."""
        if config.data.vision_cache is None:
            return None
        top = Path(config.data.vision_cache).expanduser()
        base = spec.model_name_or_path
        return cls(top, spec, tower_digest(base), tower_config(base), config.data.temporal_jitter)

    def origin(self, index: ShardIndex) -> FeatureOrigin:
        """What the features of a data set depend on."""
        spec = self.spec
        frames = "all"  # how some are chosen does not matter where none are
        if index.frames.max() > spec.video_maxlen:
            stride = f", stride {spec.dense_stride}" if spec.frame_sampling == "dense" else ""
            frames = f"{spec.video_maxlen} from the middle, {spec.frame_sampling}{stride}"
        return FeatureOrigin(
            tower=self.tower,
            vision=self.vision,
            frames=frames,
            video_min_pixels=spec.video_min_pixels,
            video_max_pixels=spec.video_max_pixels,
            image_max_pixels=spec.image_max_pixels,
            dtype=str(spec.dtype).removeprefix("torch."),
            shards=index.digest,
        )

    def check_frames(self, data: DataSets) -> None:
        """Raise ConfigError where training chooses other frames of a clip in every epoch."""
        for part in data.parts:
            most, taken = int(part.index.frames.max()), self.spec.video_maxlen
            if self.jitter and most > taken:
                raise ConfigError(
                    f"temporal_jitter: true chooses other frames in every epoch, and vision_cache holds one choice: "
                    f"clips of data set {part.about.name} have up to {most} frames, video_maxlen is {taken}; set "
                    "temporal_jitter to false, or make shards of no more frames"
                )

    def training(self, data: DataSets) -> DataSets:
        """The data sets with their features; ConfigError where they are not all there."""
        self.check_frames(data)
        parts = []
        for part in data.parts:
            try:
                parts.append(replace(part, features=self.complete(part.index)))
            except FeatureError as error:
                raise ConfigError(
                    f"vision_cache: data set {part.about.name}: {error}; `{COMMAND}` with this recipe makes what is "
                    "missing"
                ) from None
        return replace(data, parts=tuple(parts))

    def evaluation(self, clips: list[EvalClips], views: Views) -> list[EvalClips]:
        """Those to evaluate on, with features where every rank has all of them. All ranks must call it."""
        found = [replace(each, source=replace(each.source, features=None)) for each in clips]
        if views != Views():
            return found
        cached = []
        for each in found:
            try:
                cached.append(replace(each, source=replace(each.source, features=self.complete(each.source.index))))
            except FeatureError as error:
                if distributed.is_main():
                    print(f"vidcls: vision_cache: {each.name} is evaluated from its frames: {error}", flush=True)
                cached.append(each)
        # Under ZeRO-3 all ranks call the tower, or none does.
        everywhere = distributed.gather_objects([each.source.features is not None for each in cached])
        return [
            with_cache if all(rank[number] for rank in everywhere) else found[number]
            for number, with_cache in enumerate(cached)
        ]

    def complete(self, index: ShardIndex) -> FeatureCache:
        """The features of a data set; FeatureError unless they are all there."""
        cache = FeatureCache.open(self.top, self.origin(index))
        if cache.header.clips != len(index):
            raise FeatureError(f"{cache.folder} has {cache.header.clips} clips, the shards have {len(index)}")
        cache.check_complete()
        return cache
