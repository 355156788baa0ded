"""Loader worker processes, and how batches come out of them."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from vidcls.data.ahead import Ahead, WorkerError
from vidcls.data.background import Background, seconds_without_core
from vidcls.data.batch import Batch
from vidcls.data.loader import ClipBatches, Request
from vidcls.data.places import LocalFolder
from vidcls.data.slots import FrameSlots

WORKER_SECONDS = 300
PREFETCHED = 2  # batches under way per worker
CLIPS_NAMED = 8  # of a batch
LATE_SECONDS, WINDOW_SECONDS = 2.0, 10.0  # a rank that waits for so long, of so long, has its workers hurry
LOOK_SECONDS = 0.5  # between looks whether it does: each costs the rank a tenth of a millisecond
PATIENCE_SECONDS = 3.0  # with a read on cores that are free


class LoaderError(RuntimeError):
    """A loader worker died or gave nothing for too long; names the clips that were waited for."""


class BatchReader:
    """An iterator of batches that knows which clips come next, and how long it was waited for."""

    def __init__(
        self,
        clips: ClipBatches,
        requests: Iterable[Request],
        *,
        workers: int,
        pin: bool,
        seconds: int,
        most_bytes: int | None,
    ):
        self.waited = 0.0  # seconds that the consumer has waited, in all
        self._clips = clips
        self._asked: deque[Request] = deque()
        asked = map(self._remember, requests)
        # What a shard that comes from elsewhere needs of a core (encryption, digests) is not known before it is there.
        here = all(source.features or isinstance(source.index.folder, LocalFolder) for source in clips.sources)
        self._background = Background(min(PATIENCE_SECONDS, seconds / 4)) if here and workers and not pin else None
        self._ahead: Ahead[_Task, _Parcel] | None = None
        self._batches: Iterator[Batch] = map(clips.__getitem__, asked)
        if workers:
            tasks, slots = _with_slots(clips, asked, PREFETCHED * workers, most_bytes)
            read = _Reader(clips, slots, self._background)
            self._ahead = Ahead(read, tasks, workers=workers, per_worker=PREFETCHED, seconds=seconds)
            self._batches = (parcel.unpack(slots) for parcel in self._ahead)
        self._pin = pin
        # Since when waiting is looked at, not before the first batch; what `waited`, and waiting for a core, were then.
        self._window: tuple[float, float, float] | None = None
        self._looked = -LOOK_SECONDS

    def __iter__(self) -> BatchReader:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            batch = next(self._batches)
        except WorkerError as error:
            raise LoaderError(f"a loader worker {error}; waited for {self.awaited()}") from error
        self._asked.popleft()
        self.waited += time.perf_counter() - start
        if self._background:
            self._hurry_if_late(self._background)
        return batch.pin_memory() if self._pin else batch

    def _hurry_if_late(self, background: Background) -> None:
        """Also where others want the cores, which a consumer then waits for: threads that leave them make its steps
        up to three times as long (docs/performance.md)."""
        clock = time.perf_counter()
        if clock - self._looked < LOOK_SECONDS:
            return
        self._looked = clock
        now = clock, self.waited, seconds_without_core()
        passed, waited, without_core = (new - old for new, old in zip(now, self._window or now, strict=True))
        late = max(waited, without_core) > LATE_SECONDS * max(1.0, passed / WINDOW_SECONDS)
        if late:
            background.hurry()
        if late or self._window is None or passed > WINDOW_SECONDS:
            self._window = now

    def close(self) -> None:
        """End the workers; for a consumer that does not read to the end. Waits up to 5 s for the clips under way."""
        if self._ahead:
            self._ahead.close()

    def awaited(self) -> str:
        """Shards and keys of the next batch, or "" when none has been asked for yet."""
        return self._clips.describe(self._asked[0], CLIPS_NAMED) if self._asked else ""

    def _remember(self, request: Request) -> Request:
        self._asked.append(request)
        return request


def read_batches(
    clips: ClipBatches,
    requests: Iterable[Request],
    *,
    workers: int,
    pin: bool,
    seconds: int = WORKER_SECONDS,
    most_bytes: int | None = None,
) -> BatchReader:
    """Read requests in order with `workers` processes ahead of the consumer (0: in this process).

    pin: the batches are on their way to another device. Otherwise the consumer itself computes on the cores, and
    workers read when it leaves one free, as long as it does not have to wait for them.

    The workers start at once. One that dies, or gives nothing for `seconds`, raises LoaderError instead of hanging
    the run. most_bytes: of the frames or features of any request; None: none has more clips than the first.
    """
    return BatchReader(clips, requests, workers=workers, pin=pin, seconds=seconds, most_bytes=most_bytes)


_Task: TypeAlias = tuple[Request, int | None]  # and the slot for its frames or features


def _with_slots(
    clips: ClipBatches, requests: Iterator[Request], under_way: int, most_bytes: int | None
) -> tuple[Iterator[_Task], FrameSlots]:
    first = list(itertools.islice(requests, 1))
    most = max((len(request.samples) for request in first), default=1)
    size = most * clips.most_bytes() if most_bytes is None else most_bytes
    # Two more than are under way: the one that the consumer is given, and the one that it still has.
    slots = FrameSlots(under_way + 2, size)
    tasks = (
        (request, slots.take() if most_bytes is not None or len(request.samples) <= most else None)
        for request in itertools.chain(first, requests)
    )
    return tasks, slots


@dataclass(frozen=True)
class _Parcel:
    """A Batch on its way out of a worker: its frames or features (the bulk) stay in their slot, if they have one.

    Everything else is pickled as arrays; each tensor would travel as a file descriptor, which takes longer.
    """

    arrays: dict[str, np.ndarray]
    rest: dict[str, Any]
    slot: int | None
    bulk: str  # its field
    bulk_dtype: torch.dtype
    bulk_shape: torch.Size
    bulk_bytes: int
    unslotted: np.ndarray | None  # uint8, the bulk, if it has no slot

    @classmethod
    def pack(cls, batch: Batch, slot: int | None) -> _Parcel:
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        bulk = "frames" if batch.features_VD is None else "features_VD"
        tensor = values.pop(bulk)
        arrays = {name: value.numpy() for name, value in values.items() if isinstance(value, torch.Tensor)}
        rest = {name: value for name, value in values.items() if name not in arrays}
        unslotted = tensor.view(torch.uint8).numpy().reshape(-1) if slot is None else None
        return cls(arrays, rest, slot, bulk, tensor.dtype, tensor.shape, tensor.nbytes, unslotted)

    def unpack(self, slots: FrameSlots) -> Batch:
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        data = self.unslotted if self.slot is None else slots.borrow(self.slot, self.bulk_bytes)
        assert data is not None
        # NumPy has no bfloat16.
        tensors[self.bulk] = torch.from_numpy(data).view(self.bulk_dtype).view(self.bulk_shape)
        return Batch(**self.rest, **tensors)


class _Reader:
    """What a worker does."""

    def __init__(self, clips: ClipBatches, slots: FrameSlots, background: Background | None) -> None:
        self.clips = clips
        self.slots = slots
        self.background = background

    def __call__(self, task: _Task) -> _Parcel:
        request, slot = task
        if self.background is None:
            return self._read(request, slot)
        # Not into the slot a second time: the first reading still may write there.
        return self.background.run(partial(self._read, request, slot), instead=partial(self._read, request, None))

    def _read(self, request: Request, slot: int | None) -> _Parcel:
        into = None if slot is None else self.slots.view(slot, self.slots.size)
        return _Parcel.pack(self.clips.read(request, into), slot)
