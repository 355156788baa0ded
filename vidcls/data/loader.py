"""From shards and an order to batches of uint8 frames, token ids and positions.

Workers read, decode, augment and resize; normalising and patchifying happen on the device (model/patches.py), so that
one byte per colour value crosses process and bus. Where a data set has stored vision features, they are read instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from vidcls.data.ahead import worker_place
from vidcls.data.augment import AugmentSettings, augment_clip, mix_clips, mix_plan
from vidcls.data.batch import Batch, ClipEncoder, ClipShape, EncodedText, PreparedClip, collate, seconds_per_grid
from vidcls.data.budget import BudgetLayout
from vidcls.data.codecs import FrameError, decode_frames
from vidcls.data.features import ClipFacts, FeatureCache
from vidcls.data.frames import Views, controlled, dense, dense_view, jittered, square, view
from vidcls.data.index import ShardError, ShardIndex
from vidcls.data.joint import JointOrder, source_seed
from vidcls.data.mirror import swap_sides, swaps_classes
from vidcls.data.order import StepLayout, evaluation_chunks
from vidcls.data.shards import ShardReader

TEXTS_KEPT = 512
NO_FRAMES = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True)
class Request:
    """One micro-batch to read.

    sources: the data set of each sample (all 0 when left out). weight: of its rows, 0 for a padding batch. epochs: in
    training, the epoch of each sample, on which its frames and its augmentation depend. segment, crop: otherwise, which
    view of each clip (frames.Views). ahead: (data set, shard) to fetch.
    """

    samples: tuple[int, ...]
    sources: tuple[int, ...] = ()
    weight: float = 1.0
    epochs: tuple[int, ...] | None = None
    segment: int = 0
    crop: int | None = None
    ahead: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        assert len(self.sources) in (0, len(self.samples)), (self.sources, self.samples)


@dataclass(frozen=True)
class ClipSource:
    """A data set as it is read.

    prompt: for clips that store none. head: which head classifies its clips. features: of all its clips, complete: they
    are read instead of frames, which are then neither augmented nor seen in other views. In training also: ids: the
    samples that take part, from which mixing draws its partners; shards_apart: partners come from the clip's own shard,
    because others may not be at hand; mirror: int [C], the label of each class when flipped, -1 where it must not be.
    """

    index: ShardIndex
    prompt: str
    head: int = 0
    features: FeatureCache | None = None
    augment: AugmentSettings | None = None
    mirror: np.ndarray | None = None
    ids: np.ndarray | None = None
    shards_apart: bool = False

    def mixes(self) -> bool:
        return self.augment is not None and (self.augment.mixup_alpha > 0 or self.augment.cutmix_alpha > 0)

    def swaps_texts(self) -> bool:
        """Whether texts of a flipped clip say the opposite side; not where no class does."""
        return swaps_classes(self.mirror)

    def texts(self, prompt: int) -> list[str]:
        """What can stand with clips of this row of the index's prompts, -1 for none."""
        text = self.prompt if prompt < 0 else self.index.prompts[prompt]
        return [text, swap_sides(text)] if self.swaps_texts() else [text]


@dataclass(frozen=True)
class FrameChoice:
    """Which stored frames are used where there are more than `most`. stride: of a dense run, in stored frames."""

    most: int
    sampling: Literal["segments", "dense"] = "segments"
    stride: int = 1

    def training(self, total: int, seed: int, epoch: int, sample: int) -> list[int]:
        if self.sampling == "dense":
            return dense(total, self.most, self.stride, seed, epoch, sample)
        return jittered(total, self.most, seed, epoch, sample)

    def evaluation(self, total: int, number: int, views: int) -> list[int]:
        if self.sampling == "dense":
            return dense_view(total, self.most, self.stride, number, views)
        return view(total, self.most, number, views)


@dataclass(frozen=True)
class _Row:
    """A row of a batch before it is read. epoch: None in evaluation."""

    source: int
    sample: int
    epoch: int | None
    segment: int
    crop: int | None
    shape: ClipShape


@dataclass(frozen=True)
class _Seen:
    """What was read of a clip. name: its class. swapped: it was mirrored, and left and right mean the opposite."""

    label: int
    name: str
    seconds_per_grid: float
    answer: str
    swapped: bool


class ClipBatches:
    """Reads a Request into a Batch, in this process (read_batches has worker processes do it).

    seed: of frames and augmentation in training. jitter: training chooses frames at random; otherwise as evaluation
    does. skip_bad: a clip that cannot be read becomes a black one of weight 0 that Batch.bad names with its data set,
    as "1/key", and is mixed into no other; otherwise it raises ShardError or FrameError. answers: put each clip's
    answer behind <ACTION>: its own, or its class name, also where its own is too long for the encoder. views: of
    evaluation.
    """

    def __init__(
        self,
        sources: Sequence[ClipSource],
        encoder: ClipEncoder,
        frames: FrameChoice,
        *,
        seed: int = 0,
        jitter: bool = True,
        skip_bad: bool = False,
        answers: bool = False,
        views: Views | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.encoder = encoder
        self.frames = frames
        self.seeds = tuple(source_seed(seed, number) for number in range(len(self.sources)))
        self.jitter = jitter
        self.skip_bad = skip_bad
        self.answers = answers
        self.views = views or Views()
        caches = {None if source.features is None else source.features.origin.token_bytes for source in self.sources}
        assert len(caches) == 1, "a batch is of frames or of features of one kind"
        self._features = self.sources[0].features
        assert self._features is None or self.views == Views(), self.views
        self._readers = [ShardReader(source.index) for source in self.sources]
        # Few texts differ: clips of one size and frame rate share theirs. They are never written to.
        self._encode = lru_cache(maxsize=TEXTS_KEPT)(encoder.encode)
        self._announced: tuple[tuple[int, int], ...] = ()
        self._by_shard: dict[int, list[np.ndarray]] = {}

    def most_bytes(self) -> int:
        """Of the frames or features of one clip, at most."""
        return max(map(self.clip_bytes, self.shapes()))

    def shapes(self) -> set[ClipShape]:
        """Every different shape that clips of these data sets have."""
        stored: set[tuple[int, int, int]] = set()
        for index in (source.index for source in self.sources):
            used = np.minimum(index.frames, self.frames.most)
            stored |= {*zip(used.tolist(), index.height.tolist(), index.width.tolist(), strict=True)}
        if self.views.crops > 1:
            stored |= {(used, min(size), min(size)) for used, *size in stored}
        return {ClipShape.of(self.encoder, *each) for each in stored}

    def __getitem__(self, request: Request) -> Batch:
        return self.read(request)

    def describe(self, request: Request, most: int) -> str:
        """Where up to `most` of the request's clips lie: "shard: key key; shard: key"."""
        found: dict[str, list[str]] = {}
        for place, sample in enumerate(request.samples[:most]):
            index = self.sources[request.sources[place] if request.sources else 0].index
            shard = f"{index.folder.name}/{index.shards[index.shard[sample]].name}"
            found.setdefault(shard, []).append(index.keys[sample])
        rest = len(request.samples) - most
        told = "; ".join(f"{shard}: {' '.join(keys)}" for shard, keys in found.items())
        return told if rest <= 0 else f"{told} and {rest} more"

    def read(self, request: Request, into: np.ndarray | None = None) -> Batch:
        """The batch; its frames or features lie at the start of `into` (uint8), if that is given."""
        self._announce(request.ahead)
        rows = self._rows(request)
        ends = list(itertools.accumulate(self.clip_bytes(row.shape) for row in rows))
        data = np.empty(ends[-1], dtype=np.uint8) if into is None else into[: ends[-1]]
        clips = [self._clip(row, data[start:end]) for row, start, end in zip(rows, [0, *ends], ends, strict=False)]
        # Two data sets may have equal keys. A padding batch reads a clip that another batch counts, bad or not.
        bad = tuple((f"{clip.source}/{clip.key}", clip.bad) for clip in clips if clip.bad and request.weight)
        if self._features is None:
            return replace(collate(clips, request.weight, data), bad=bad)
        features_VD = self._features.tensor(data)
        return replace(collate(clips, request.weight, NO_FRAMES), bad=bad, features_VD=features_VD)

    def facts(self, source: int, sample: int) -> ClipFacts:
        """What stored features of a clip must hold beside them; ShardError. Its frames are chosen as in evaluation."""
        (row,) = self._rows(Request((sample,), (source,)))
        about = self._readers[source].read(sample).about
        times = [about.frame_times[i] for i in self._chosen(row)]
        return ClipFacts(seconds_per_grid(times, self.encoder), about.answer)

    def clip_bytes(self, shape: ClipShape) -> int:
        """Of the frames or features of a clip of this shape."""
        return shape.bytes if self._features is None else self._features.origin.clip_bytes(shape.grid)

    def _rows(self, request: Request) -> list[_Row]:
        rows = []
        for place, sample in enumerate(request.samples):
            source = request.sources[place] if request.sources else 0
            index = self.sources[source].index
            used = min(int(index.frames[sample]), self.frames.most)
            size = int(index.height[sample]), int(index.width[sample])
            if request.crop is not None:
                size = min(size), min(size)
            shape = ClipShape.of(self.encoder, used, *size)
            epoch = None if request.epochs is None else request.epochs[place]
            rows.append(_Row(source, sample, epoch, request.segment, request.crop, shape))
        return rows

    def _clip(self, row: _Row, out: np.ndarray) -> PreparedClip:
        """The clip of a row; its frames, or its stored features, are put into `out`, uint8 of just their size."""
        source = self.sources[row.source]
        if source.features is None:
            frames = out = out.reshape(row.shape.shape)
        else:
            frames = NO_FRAMES
        index, key = source.index, source.index.keys[row.sample]
        prompt = index.prompt_of(row.sample) or source.prompt
        about = {"key": key, "frames": frames, "grid": row.shape.grid, "head": source.head, "source": row.source}
        try:
            own = self._read_frames(row, out) if source.features is None else self._read_features(row, out)
        except (ShardError, FrameError) as error:
            if not self.skip_bad:
                raise
            out[:] = 0
            text = self._text(key, prompt, row.shape, 0.0, [""] if self.answers else [None])
            return PreparedClip(**about, label=0, text=text, bad=str(error))
        partner, share = self._mix(row, out)
        # What is said is one action: of a mixed clip the larger part.
        said = own if partner is None or share <= 0.5 else partner
        if own.swapped:
            prompt = swap_sides(prompt)
        answers = [said.answer, said.name] if self.answers else [None]
        text = self._text(key, prompt, row.shape, own.seconds_per_grid, answers)
        second = 0 if partner is None else partner.label
        return PreparedClip(**about, label=own.label, text=text, partner=second, share=share)

    def _mix(self, row: _Row, out: np.ndarray) -> tuple[_Seen | None, float]:
        """Mix another clip of the data set into `out`: that clip, and its share of the target.

        With skip_bad one that cannot be read is not mixed in: it is reported in its own turn.
        """
        source = self.sources[row.source]
        if row.epoch is None or not source.mixes():
            return None, 0.0
        assert source.augment is not None
        ids = self._partners(row)
        place = int(np.searchsorted(ids, row.sample))
        mix = mix_plan(source.augment, self.seeds[row.source], row.epoch, row.sample, place, len(ids))
        if mix is None:
            return None, 0.0
        frames = np.empty_like(out[: row.shape.used])
        shape = replace(row.shape, shape=frames.shape)
        try:
            seen = self._read_frames(replace(row, sample=int(ids[mix.partner]), shape=shape), frames)
        except (ShardError, FrameError):
            if not self.skip_bad:
                raise
            return None, 0.0
        _, share = mix_clips(out[: row.shape.used], frames, mix)
        out[row.shape.used :] = out[row.shape.used - 1]
        return seen, share

    def _partners(self, row: _Row) -> np.ndarray:
        """The samples that a clip may be mixed with, and its own, rising."""
        source = self.sources[row.source]
        assert source.ids is not None
        if not source.shards_apart:
            return source.ids
        if row.source not in self._by_shard:
            shard = source.index.shard[source.ids]
            ends = np.cumsum(np.bincount(shard, minlength=len(source.index.shards)))
            self._by_shard[row.source] = np.split(source.ids[np.argsort(shard, kind="stable")], ends[:-1])
        return self._by_shard[row.source][source.index.shard[row.sample]]

    def _read_features(self, row: _Row, out: np.ndarray) -> _Seen:
        """Put the stored features into `out`."""
        source = self.sources[row.source]
        assert source.features is not None
        facts = source.features.read(row.sample, out)
        label = int(source.index.label[row.sample])
        name = source.index.labels.names[label]
        return _Seen(label, name, facts.seconds_per_grid, name if facts.answer is None else facts.answer, False)

    def _read_frames(self, row: _Row, out: np.ndarray) -> _Seen:
        """Decode, augment and resize the chosen frames into `out`."""
        source = self.sources[row.source]
        index = source.index
        chosen = self._chosen(row)
        stored = self._readers[row.source].read(row.sample)
        shown = chosen
        if row.epoch is None:
            shown = [chosen[i] for i in controlled(len(chosen), self.views.control, row.sample)]
        encoded = [stored.frames[i] for i in shown]
        size = int(index.height[row.sample]), int(index.width[row.sample])
        augment = source.augment if row.epoch is not None else None
        # To its place, if it fits.
        straight = augment is None and row.crop is None and size == row.shape.shape[1:3]
        try:
            frames = decode_frames(
                encoded, index.settings.codec, *size, out=out[: row.shape.used] if straight else None
            )
        except FrameError as error:
            shard = index.shards[index.shard[row.sample]].name
            raise FrameError(f"{index.folder.name}/{shard}: {index.keys[row.sample]}: {error}") from error
        flipped = False
        own_label = label = int(index.label[row.sample])
        if augment is not None:
            assert row.epoch is not None
            one_sided = source.mirror is not None and source.mirror[label] < 0
            settings = replace(augment, horizontal_flip=0.0) if one_sided else augment
            frames, flipped = augment_clip(frames, settings, self.seeds[row.source], row.epoch, row.sample)
        if row.crop is not None:
            frames = frames[:, *square(*size, row.crop)]
        row.shape.fill(out, frames)
        times = [stored.about.frame_times[i] for i in chosen]
        if flipped and source.mirror is not None:
            label = int(source.mirror[label])
        swapped = flipped and source.swaps_texts()
        names = index.labels.names
        answer = names[label] if stored.about.answer is None else stored.about.answer
        if swapped and stored.about.answer is not None:
            answer = swap_sides(answer)
            # Explicit pairs need not say left and right: the old answer would contradict the new label.
            if label != own_label and stored.about.answer in (answer, names[own_label]):
                answer = names[label]
        return _Seen(label, names[label], seconds_per_grid(times, self.encoder), answer, swapped)

    def _chosen(self, row: _Row) -> list[int]:
        """As many stored frames as the shape asks for; of a clip that has fewer, the last one again."""
        total = int(self.sources[row.source].index.frames[row.sample])
        if row.epoch is not None and self.jitter:
            chosen = self.frames.training(total, self.seeds[row.source], row.epoch, row.sample)
        else:
            chosen = self.frames.evaluation(total, row.segment, self.views.segments)
        used = row.shape.used
        if len(chosen) > used:
            return [chosen[i] for i in view(len(chosen), used)]
        return chosen + chosen[-1:] * (used - len(chosen))

    def _text(
        self, key: str, prompt: str, shape: ClipShape, seconds: float, answers: Sequence[str | None]
    ) -> EncodedText:
        """With the first of the answers that is not too long."""
        for answer in answers:
            try:
                return self._encode(prompt, shape.grid, seconds, answer)
            except ValueError as error:
                failed = error
        raise type(failed)(f"clip {key!r}: {failed}") from None

    def _announce(self, ahead: tuple[tuple[int, int], ...]) -> None:
        """Have shards fetched that will be needed."""
        if ahead == self._announced or self._features is not None:
            return
        self._announced = ahead
        number, workers = worker_place()
        for source, group in itertools.groupby(ahead, key=lambda pair: pair[0]):
            shards = [shard for _, shard in group]
            # Each worker begins with its own part, so that as many shards as workers are fetched at a time.
            parts = [shards[(number + i) % workers :: workers] for i in range(workers)]
            index = self.sources[source].index
            wanted = [index.shards[shard] for part in parts for shard in part]
            index.folder.prefetch([(shard.name, shard.bytes, shard.sha256) for shard in wanted])


def training_requests(
    order: JointOrder, layout: StepLayout | BudgetLayout, first_step: int, last_step: int
) -> Iterator[Request]:
    """This rank's micro-batches of optimizer steps [first_step, last_step)."""
    for step in range(first_step, last_step):
        for positions in layout.micro_batches(step):
            drawn = [order.at(position) for position in positions]
            yield Request(
                tuple(each.sample for each in drawn),
                tuple(each.source for each in drawn),
                epochs=tuple(each.epoch for each in drawn),
                ahead=order.shards_ahead(positions.start),
            )


def evaluation_requests(
    index: ShardIndex,
    micro: int,
    world_size: int,
    rank: int,
    ids: np.ndarray | None = None,
    views: Views | None = None,
) -> list[Request]:
    """This rank's batches of one evaluation of every clip (or those of `ids`), the same number on every rank.

    Each batch comes once for every view, one behind the other.
    """
    numbered = (views or Views()).numbered()
    samples = np.arange(len(index)) if ids is None else ids
    shard = index.shard[samples]
    changes = np.flatnonzero(np.diff(shard)) + 1
    chunks = evaluation_chunks(len(samples), micro, world_size, rank)
    requests = []
    for number, chunk in enumerate(chunks):
        if chunk is None:
            padding = Request((int(samples[0]),), weight=0.0)
            requests += [replace(padding, segment=segment, crop=crop) for segment, crop in numbered]
            continue
        both = [each for each in chunks[number : number + 2] if each is not None]
        needed = dict.fromkeys(used for each in both for used in shard[each.start : each.stop].tolist())
        if len(needed) == 1:  # many batches a shard: the next one comes while they are evaluated
            later = changes[np.searchsorted(changes, chunk.stop) :][:1]
            needed |= dict.fromkeys(shard[later].tolist())
        ahead = tuple((0, each) for each in needed)
        clips = Request(tuple(samples[chunk.start : chunk.stop].tolist()), ahead=ahead)
        requests += [replace(clips, segment=segment, crop=crop) for segment, crop in numbered]
    return requests
