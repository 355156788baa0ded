"""Loader worker processes, and how batches come out of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vidcls.data.batch import Batch
from vidcls.data.loader import ClipBatches, Request
from vidcls.data.slots import FrameSlots

WORKER_TIMEOUT_SECONDS = 300
PREFETCHED = 2  # batches under way per worker


def read_batches(clips: ClipBatches, requests: Iterable[Request], *, workers: int, pin: bool) -> Iterator[Batch]:
    """Read requests in order with `workers` processes ahead of the consumer (0: in this process).

    The workers start at once. One that gives nothing for 300 s raises RuntimeError instead of hanging the run.
    """
    batches = _read_by_workers(clips, iter(requests), workers) if workers else map(clips.__getitem__, requests)
    return (batch.pin_memory() for batch in batches) if pin else batches


def _read_by_workers(clips: ClipBatches, requests: Iterator[Request], workers: int) -> Iterator[Batch]:
    first = list(itertools.islice(requests, 1))
    most = max((len(request.samples) for request in first), default=1)
    # Two more than are under way: the one that the consumer is given, and the one that it still has.
    slots = FrameSlots(PREFETCHED * workers + 2, most * max(shape.bytes for shape in clips.shapes()))
    tasks = (
        (request, slots.take() if len(request.samples) <= most else None)
        for request in itertools.chain(first, requests)
    )
    loader: DataLoader = DataLoader(
        _Sender(clips, slots),
        batch_size=None,
        sampler=tasks,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=PREFETCHED,
        collate_fn=_unchanged,  # type: ignore[arg-type]
        timeout=WORKER_TIMEOUT_SECONDS,
        multiprocessing_context="fork",  # the slots are inherited
    )
    return (parcel.unpack(slots) for parcel in loader)


@dataclass(frozen=True)
class _Parcel:
    """A Batch on its way out of a worker: its frames stay in their slot, if they have one.

    Everything else is pickled as arrays; each tensor would travel as a file descriptor, which takes longer.
    """

    arrays: dict[str, np.ndarray]
    rest: dict[str, Any]
    slot: int | None
    frame_bytes: int

    @classmethod
    def pack(cls, batch: Batch, slot: int | None) -> _Parcel:
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        arrays = {name: value.numpy() for name, value in values.items() if isinstance(value, torch.Tensor)}
        rest = {name: value for name, value in values.items() if name not in arrays}
        size = arrays["frames"].size
        if slot is not None:
            del arrays["frames"]
        return cls(arrays, rest, slot, size)

    def unpack(self, slots: FrameSlots) -> Batch:
        arrays = self.arrays
        if self.slot is not None:
            arrays = {**arrays, "frames": slots.borrow(self.slot, self.frame_bytes)}
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Batch(**self.rest, **tensors)


class _Sender(Dataset[_Parcel]):
    """What a worker runs."""

    def __init__(self, clips: ClipBatches, slots: FrameSlots) -> None:
        self.clips = clips
        self.slots = slots

    def __getitem__(self, task: tuple[Request, int | None]) -> _Parcel:
        request, slot = task
        into = None if slot is None else self.slots.view(slot, self.slots.size)
        return _Parcel.pack(self.clips.read(request, into), slot)


def _unchanged(parcel: _Parcel) -> _Parcel:
    return parcel
