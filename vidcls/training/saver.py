"""When checkpoints are written: behind the steps that follow (async_save), or while training stands."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from vidcls import distributed
from vidcls.faults import guard
from vidcls.faults.causes import StuckError, exit_of
from vidcls.faults.exits import Exit
from vidcls.training.averaging import WeightAverage
from vidcls.training.engine import Engine
from vidcls.training.saving import save_checkpoint, shards_of, write_checkpoint
from vidcls.training.setup import Run
from vidcls.training.snapshot import Snapshot, gather_snapshot

LATE_SECONDS = 5.0  # beyond save_timeout: what another rank's limit says comes first
_Result = TypeVar("_Result")


def _behind(work: Callable[..., _Result], *args: Any) -> Future[_Result]:
    """Do `work` in a thread of its own that ends with it.

    A thread that computes with torch has a team of OpenMP threads. While one lives beside the main thread's, libgomp
    counts more threads than cores and lets them sleep at every barrier: all steps take a tenth longer.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    result = thread.submit(work, *args)
    thread.shutdown(wait=False)
    return result


@dataclass
class _UnderWay:
    """A checkpoint that is being written. stood: seconds for which training did, up to now."""

    target: Path
    step: int
    stood: float
    result: Future[float]  # seconds of the writing
    began: float = field(default_factory=time.monotonic)


class Saver:
    """Saves a run's checkpoints, one at a time, and says so when one is whole.

    Behind training: a save copies this rank's part of the state into host memory, which is kept for the whole run, and
    returns; a thread gathers, writes and publishes over a process group of its own. Its error comes out of the next
    `save`, `finish`, or by way of `failed`, on every rank. DeepSpeed's own state, and an optimizer on NVMe, can only be
    saved while training stands.

    All ranks must make one together, and call `save` and `finish` together.
    """

    def __init__(self, run: Run, engine: Engine, average: WeightAverage | None, say: Callable[[str], None]) -> None:
        options = run.config.run
        self._run, self._engine, self._average, self._say = run, engine, average, say
        self._limit = options.save_timeout
        self._under_way: _UnderWay | None = None
        self._stalled = 0.0
        self._snapshot: Snapshot | None = None
        self._group: torch.distributed.ProcessGroup | None = None
        on_nvme = getattr(engine.optimizer, "swap_optimizer", False)
        if options.async_save and not options.save_deepspeed_state and not on_nvme:
            self._snapshot = Snapshot(engine, average, only_used=options.save_only_model)
            if distributed.world_size() > 1:
                limit = datetime.timedelta(seconds=self._limit)
                self._group = torch.distributed.new_group(backend="gloo", timeout=limit)
            self._touched = _behind(self._snapshot.touch)

    def save(self, step: int, *, best: Path | None) -> Path:
        """Save checkpoint-`step`; `finish` waits until it is whole. `best`: what rotation must not delete.

        An earlier one that is being written is waited for.

        Raises:
            StorageError: on every rank, when this checkpoint, or the one before, cannot be written.
        """
        target = self._run.output_dir / f"checkpoint-{step}"
        with self._standing():
            self._wait(f"{target.name} waits for {{}}, which is still being written")
            guard.phase("save", step)
            began = time.perf_counter()
            if self._snapshot is None:
                save_checkpoint(self._run, self._engine, self._average, step, best=best)
                self._say(f"saved {target} (training stood for {time.perf_counter() - began:.3g} s)")
                return target
            self._touched.result()
            self._snapshot.take()
            stood = time.perf_counter() - began
            self._under_way = _UnderWay(target, step, stood, _behind(self._write, step, best))
        return target

    @property
    def failed(self) -> bool:
        """Whether this rank could not write the checkpoint under way, or has been at it for longer than save_timeout.

        Tell all ranks, and have them `finish` at the same step.
        """
        now = self._under_way
        if now is None:
            return False
        return now.result.exception() is not None if now.result.done() else self._is_late(now)

    def look(self) -> None:
        """Say that the checkpoint under way is whole, if it is by now. Any rank may call it at any time."""
        now = self._under_way
        if now is not None and now.result.done() and now.result.exception() is None:
            self._under_way = None
            self._say_whole(now)

    def finish(self) -> None:
        """Wait until the checkpoint under way is whole.

        Raises:
            StorageError: on every rank, when it cannot be written; earlier checkpoints stay.
            StuckError: it has not been written within save_timeout.
        """
        with self._standing():
            self._wait("training waits for {}, which is still being written")

    def leave(self, error: BaseException) -> None:
        """Before a rank ends with `error`: a checkpoint under way comes to be, unless it needs a rank that is gone."""
        now, self._under_way = self._under_way, None
        # The phase stays, as the report of the error tells it; so does its limit.
        if now is not None and exit_of(error) is not Exit.PEER_LOST and self._wait_for(now):
            self._say_whole(now)

    def take_stalled(self) -> float:
        """Seconds for which training has stood for checkpoints since this was last asked."""
        stalled, self._stalled = self._stalled, 0.0
        return stalled

    def _write(self, step: int, best: Path | None) -> float:
        """The thread's work."""
        began, snapshot = time.perf_counter(), self._snapshot
        assert snapshot is not None
        dtype, shards = self._run.spec.dtype, shards_of(self._engine)
        write_checkpoint(
            self._run,
            self._engine,
            step,
            lambda: gather_snapshot(snapshot, self._group, dtype=dtype, shards=shards),
            best=best,
            group=self._group,
        )
        return time.perf_counter() - began

    def _wait(self, about: str) -> None:
        """`about` says for whom, with {} for the checkpoint; said if there is something to wait for."""
        now, self._under_way = self._under_way, None
        if now is None:
            return
        if not now.result.done():
            guard.phase("save", now.step)
            self._say(about.format(now.target.name))
            began = time.perf_counter()
            if not self._wait_for(now):
                raise StuckError(f"{now.target} has not been written within save_timeout: {self._limit} seconds")
            now.stood += time.perf_counter() - began
        now.result.result()
        self._say_whole(now)

    def _wait_for(self, now: _UnderWay) -> bool:
        """Whether its writing has ended within the limit."""
        wait([now.result], max(0.0, now.began + self._limit - time.monotonic()) + LATE_SECONDS)
        return now.result.done()

    def _say_whole(self, now: _UnderWay) -> None:
        if now.result.exception() is None:
            written = now.result.result()
            self._say(f"saved {now.target} (training stood for {now.stood:.3g} s, written in {written:.3g} s)")

    def _is_late(self, now: _UnderWay) -> bool:
        return time.monotonic() - now.began > self._limit

    @contextlib.contextmanager
    def _standing(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._stalled += time.perf_counter() - began
