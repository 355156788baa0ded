"""The data sets of a run: opened, checked against each other, split, and put into one stream."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidcls.config import Config, ConfigError
from vidcls.data.augment import AugmentSettings
from vidcls.data.features import FeatureCache
from vidcls.data.index import ShardIndex
from vidcls.data.joint import JointOrder, Part, quotas, select, source_seed
from vidcls.data.labels import LabelSpace
from vidcls.data.loader import ClipSource
from vidcls.data.mirror import ONE_SIDED, mirror_for
from vidcls.data.order import shards_that_fit
from vidcls.data.places import CacheSettings, LocalFolder, default_cache_folder
from vidcls.options import AugmentOptions, DataOptions
from vidcls.registry import TrainSet


@dataclass(frozen=True)
class TrainData:
    """An opened data set. ids: the samples that train; held_out: those of val_size."""

    about: TrainSet
    index: ShardIndex
    ids: np.ndarray
    held_out: np.ndarray
    mirror: np.ndarray | None  # the label of each class when flipped (mirror_for)
    shuffled: int | None  # shards that are shuffled together; None: everything, without a window
    features: FeatureCache | None = None  # of a frozen vision tower, where they are stored

    def counts(self) -> np.ndarray:
        """Training clips of each class, int64 [C], as they are expected after flips: rounded, and at least 1 of a class
        that has any."""
        own = np.bincount(self.index.label[self.ids], minlength=len(self.index.labels))
        if self.mirror is None:
            return own
        share = self.about.augment.horizontal_flip
        becomes = np.where(self.mirror == ONE_SIDED, np.arange(len(own)), self.mirror)
        expected = (1 - share) * own + share * np.bincount(becomes, weights=own, minlength=len(own))
        return np.where(expected > 0, np.maximum(np.rint(expected), 1), 0).astype(np.int64)


@dataclass(frozen=True)
class DataSets:
    """All data sets to train on. heads: the classes of each head, in the heads' order."""

    parts: tuple[TrainData, ...]
    heads: dict[str, LabelSpace]
    order: JointOrder

    @property
    def clips(self) -> int:
        """Clips in one epoch of the stream."""
        return len(self.order)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.about.name for part in self.parts)

    def class_counts(self) -> list[list[int]]:
        """For each head the training clips of each class, over the data sets that train it."""
        return [
            sum(part.counts() for part in self.parts if part.about.head == head).tolist()  # type: ignore[union-attr]
            for head in self.heads
        ]

    def sources(self) -> list[ClipSource]:
        heads = list(self.heads)
        return [
            ClipSource(
                part.index,
                part.about.prompt,
                head=heads.index(part.about.head),
                features=part.features,
                augment=augment_settings(part.about.augment),
                mirror=part.mirror,
                ids=part.ids,
                shards_apart=part.shuffled is not None,
            )
            for part in self.parts
        ]

    def stream(self) -> dict[str, Any]:
        """What decides which clips these data sets give, as a checkpoint stores it."""
        values: dict[str, Any] = {"data_sets": list(self.names)}
        for part, joined in zip(self.parts, self.order.parts, strict=True):
            augment = part.about.augment.model_dump(mode="json")
            decisive = {
                "head": part.about.head,
                "data_digest": part.index.digest,
                "label_fingerprint": part.index.labels.fingerprint,
                "clips": len(part.ids),
                "chosen": hashlib.sha256(part.ids.astype("<i8").tobytes()).hexdigest()[:16],
                "quota": joined.quota,
                "shuffle_shards": part.shuffled,
                **augment,
            }
            values |= {f"{part.about.name}/{name}": value for name, value in decisive.items()}
        return values


def open_data_sets(config: Config) -> DataSets:
    """Open and check them. Reads no clip.

    Raises:
        ShardError: a folder is no data set.
        ConfigError: class counts or label spaces differ from what they must be, a cache is too small, nothing is left
            to train on.
    """
    data, seed = config.data, config.run.seed
    cache = cache_settings(data)
    parts = []
    for number, about in enumerate(config.train_sets):
        index = ShardIndex.open(about.place, cache)
        try:
            ids, held_out = select(len(index), source_seed(seed, number), most=data.max_samples, val_size=data.val_size)
        except ValueError as error:
            raise ConfigError(f"{error} ({about.place})") from None
        mirror, shuffled = mirror_labels(about, index.labels), _shuffled_shards(data, index, cache)
        parts.append(TrainData(about, index, ids, held_out, mirror, shuffled))
    heads: dict[str, LabelSpace] = {}
    for part in parts:
        first = heads.setdefault(part.about.head, part.index.labels)
        part.index.labels.check_same(first, f"data set {part.about.place}", f"the others of head {part.about.head}")
    made: dict[str, TrainData] = {}
    for part in parts:
        other = made.setdefault(part.about.head, part)
        if part.index.settings != other.index.settings:  # a head is evaluated and predicts with one kind of clips
            raise ConfigError(
                f"dataset: {part.about.place} was made with {part.index.settings.to_dict()}, {other.about.place}, for "
                f"the same head, with {other.index.settings.to_dict()}; make one of them anew"
            )
    wanted = config.model.num_action_classes
    if wanted is not None and wanted != len(parts[0].index.labels):  # with more than one head it is refused before
        place, found = parts[0].about.place, len(parts[0].index.labels)
        raise ConfigError(f"num_action_classes: {wanted}, but the shards in {place!r} have {found} classes")
    weights = [part.about.weight for part in parts if part.about.weight is not None]
    sizes = [len(part.ids) for part in parts]
    shares = quotas(sizes, weights=weights, temperature=data.mixing_temperature)
    joined = tuple(
        Part.of(part.ids, source_seed(seed, number), quota, part.index.shard, part.shuffled)
        for number, (part, quota) in enumerate(zip(parts, shares, strict=True))
    )
    return DataSets(tuple(parts), heads, JointOrder(joined, seed))


def cache_settings(data: DataOptions) -> CacheSettings:
    """Where shards of URLs are kept on this node."""
    folder = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_folder()
    return CacheSettings(folder=folder.absolute(), max_bytes=max(1, int(data.cache_gb * 10**9)))


def augment_settings(options: AugmentOptions) -> AugmentSettings | None:
    """None when nothing is to be changed."""
    settings = AugmentSettings(**options.model_dump(exclude={"mirror_pairs"}))
    return settings if settings.on else None


def mirror_labels(about: TrainSet, labels: LabelSpace) -> np.ndarray | None:
    """See mirror_for; ConfigError for what is no pair of classes."""
    try:
        return mirror_for(about.augment.mirror_pairs, about.augment.horizontal_flip, labels)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _shuffled_shards(data: DataOptions, index: ShardIndex, cache: CacheSettings) -> int | None:
    """How many shards are shuffled together; ConfigError if those of a URL that are needed at a time do not fit the
    cache."""
    shuffled = data.shuffle_shards
    if isinstance(index.folder, LocalFolder):
        return shuffled
    sizes = [shard.bytes for shard in index.shards]
    fits = shards_that_fit(sizes, cache.max_bytes)
    if min(shuffled or len(sizes), len(sizes)) > fits:
        largest = sum(sorted(sizes)[-2:]) / 10**9
        raise ConfigError(
            f"shuffle_shards: {shuffled}, of {len(sizes)} shards with {sum(sizes) / 10**9:.3g} GB; two windows of "
            f"that many shards must fit cache_gb ({data.cache_gb:g}) together: "
            + (f"at most {fits} do" if fits else f"not even two shards do, which take {largest:.3g}")
        )
    # A window even if it holds all shards: it is what tells the loader which shards to fetch.
    return shuffled or len(sizes)


def describe(sets: DataSets) -> Sequence[str]:
    """One line a data set."""
    lines = []
    for part, joined in zip(sets.parts, sets.order.parts, strict=True):
        share = f", {joined.quota / len(sets.order):.1%} of the stream" if len(sets.parts) > 1 else ""
        held = f", {len(part.held_out)} held out" if len(part.held_out) else ""
        classes = len(part.index.labels)
        stored = f", features from {part.features.folder}" if part.features else ""
        lines.append(
            f"{part.about.name}: {len(part.ids)} clips{held}, {classes} classes{share}, {part.about.place}{stored}"
        )
    return lines
