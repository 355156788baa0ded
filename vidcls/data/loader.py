"""From shards and an order to batches of uint8 frames, token ids and positions.

Workers read, decode and resize; normalising and patchifying happen on the device (model/patches.py), so that one byte
per colour value crosses process and bus.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch.utils.data import get_worker_info

from vidcls.data.batch import Batch, ClipEncoder, ClipShape, EncodedText, PreparedClip, collate, seconds_per_grid
from vidcls.data.codecs import FrameError, decode_frames
from vidcls.data.frames import jittered, view
from vidcls.data.index import ShardError, ShardIndex
from vidcls.data.order import SampleOrder, StepLayout, evaluation_chunks
from vidcls.data.shards import ShardReader

TEXTS_KEPT = 512


@dataclass(frozen=True)
class Request:
    """One micro-batch to read.

    weight: of its rows, 0 for a padding batch. epochs: in training, the epoch of each sample, on which the choice of
    frames depends. view: otherwise, which of `views` views of each clip (frames.view). ahead: shards to fetch.
    """

    samples: tuple[int, ...]
    weight: float = 1.0
    epochs: tuple[int, ...] | None = None
    view: int = 0
    views: int = 1
    ahead: tuple[int, ...] = ()


class ClipBatches:
    """Reads a Request into a Batch, in this process (read_batches has worker processes do it).

    max_frames: of a clip; of more, some are chosen before any is decoded. jitter_seed: training takes a random frame
    of each part of the clip (frames.jittered); None: always the middle one. skip_bad: a clip that cannot be read
    becomes a black one of weight 0 that Batch.bad names; otherwise it raises ShardError or FrameError.
    """

    def __init__(
        self,
        index: ShardIndex,
        encoder: ClipEncoder,
        *,
        prompt: str,
        max_frames: int,
        jitter_seed: int | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.reader = ShardReader(index)
        self.encoder = encoder
        self.prompt = prompt
        self.max_frames = max_frames
        self.jitter_seed = jitter_seed
        self.skip_bad = skip_bad
        # Few texts differ: clips of one size and frame rate share theirs. They are never written to.
        self._encode = lru_cache(maxsize=TEXTS_KEPT)(encoder.encode)
        self._announced: tuple[int, ...] = ()

    @property
    def index(self) -> ShardIndex:
        return self.reader.index

    def shapes(self) -> set[ClipShape]:
        """Every different shape that clips of this data set have."""
        index = self.index
        used = np.minimum(index.frames, self.max_frames)
        stored = {*zip(used.tolist(), index.height.tolist(), index.width.tolist(), strict=True)}
        return {ClipShape.of(self.encoder, *each) for each in stored}

    def shape_of(self, sample: int) -> ClipShape:
        index = self.index
        used = min(int(index.frames[sample]), self.max_frames)
        return ClipShape.of(self.encoder, used, int(index.height[sample]), int(index.width[sample]))

    def __getitem__(self, request: Request) -> Batch:
        return self.read(request)

    def read(self, request: Request, into: np.ndarray | None = None) -> Batch:
        """The batch; its frames lie at the start of `into` (uint8), if that is given."""
        self._announce(request.ahead)
        shapes = [self.shape_of(sample) for sample in request.samples]
        ends = list(itertools.accumulate(shape.bytes for shape in shapes))
        frames = np.empty(ends[-1], dtype=np.uint8) if into is None else into[: ends[-1]]
        clips = []
        for row, (shape, end) in enumerate(zip(shapes, ends, strict=True)):
            out = frames[end - shape.bytes : end].reshape(shape.shape)
            clips.append(self._clip(request, row, shape, out))
        return collate(clips, request.weight, frames)

    def _clip(self, request: Request, row: int, shape: ClipShape, out: np.ndarray) -> PreparedClip:
        sample, index = request.samples[row], self.index
        key, prompt = index.keys[sample], index.prompt_of(sample) or self.prompt
        try:
            times = self._read_frames(sample, self._chosen(request, row), shape, out)
        except (ShardError, FrameError) as error:
            if not self.skip_bad:
                raise
            out[:] = 0
            return PreparedClip(key, 0, out, shape.grid, self._text(key, prompt, shape, [0.0]), bad=str(error))
        return PreparedClip(key, int(index.label[sample]), out, shape.grid, self._text(key, prompt, shape, times))

    def _chosen(self, request: Request, row: int) -> list[int]:
        sample = request.samples[row]
        total = int(self.index.frames[sample])
        if request.epochs is not None and self.jitter_seed is not None:
            return jittered(total, self.max_frames, self.jitter_seed, request.epochs[row], sample)
        return view(total, self.max_frames, request.view, request.views)

    def _read_frames(self, sample: int, chosen: list[int], shape: ClipShape, out: np.ndarray) -> list[float]:
        """Decode the chosen frames into `out`; returns their times."""
        index = self.index
        stored = self.reader.read(sample)
        frames = [stored.frames[i] for i in chosen]
        try:
            size = int(index.height[sample]), int(index.width[sample])
            into = out[: shape.used] if size == shape.shape[1:3] else None  # straight to its place if it fits
            shape.fill(out, decode_frames(frames, index.settings.codec, *size, out=into))
        except FrameError as error:
            shard = index.shards[index.shard[sample]].name
            raise FrameError(f"{index.folder.name}/{shard}: {index.keys[sample]}: {error}") from error
        return [stored.about.frame_times[i] for i in chosen]

    def _text(self, key: str, prompt: str, shape: ClipShape, times: list[float]) -> EncodedText:
        try:
            return self._encode(prompt, shape.grid, seconds_per_grid(times, self.encoder))
        except ValueError as error:
            raise type(error)(f"clip {key!r}: {error}") from None

    def _announce(self, ahead: tuple[int, ...]) -> None:
        """Have shards fetched that will be needed."""
        if ahead == self._announced:
            return
        self._announced = ahead
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # Each worker begins with its own part, so that as many shards as workers are fetched at a time.
        parts = [ahead[(number + i) % workers :: workers] for i in range(workers)]
        shards = [self.index.shards[shard] for part in parts for shard in part]
        self.index.folder.prefetch([(shard.name, shard.bytes, shard.sha256) for shard in shards])


def training_requests(order: SampleOrder, layout: StepLayout, first_step: int, last_step: int) -> Iterator[Request]:
    """This rank's micro-batches of optimizer steps [first_step, last_step)."""
    for step in range(first_step, last_step):
        for micro_step in range(layout.accumulation):
            positions = layout.positions(step, micro_step)
            epochs, samples = zip(*map(order.at, positions), strict=True)
            yield Request(samples, epochs=epochs, ahead=order.shards_ahead(positions.start))


def evaluation_requests(index: ShardIndex, micro: int, world_size: int, rank: int) -> list[Request]:
    """This rank's batches of one evaluation of every clip, the same number on every rank."""
    requests = []
    for chunk in evaluation_chunks(len(index), micro, world_size, rank):
        if chunk is None:
            requests.append(Request((0,), weight=0.0))
        else:
            shard = int(index.shard[chunk.start])
            requests.append(Request(tuple(chunk), ahead=tuple(range(shard, min(shard + 2, len(index.shards))))))
    return requests
