"""Clips of requests that come at the same time go through the model together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vidcls.data.batch import PreparedClip


class Batcher:
    """Runs `scores` on up to `most` clips at once, in a thread of its own; a clip waits `wait` seconds for others."""

    def __init__(
        self,
        scores: Callable[[list[PreparedClip]], np.ndarray],
        most: int,
        wait: float,
        observe: Callable[[int], None] = lambda clips: None,
    ) -> None:
        self._scores, self._most, self._wait, self._observe = scores, most, wait, observe
        self._queue: asyncio.Queue[tuple[PreparedClip, asyncio.Future[np.ndarray]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown()

    async def __call__(self, clip: PreparedClip) -> np.ndarray:
        """Class probabilities, float64 [C]."""
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        await self._queue.put((clip, future))
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            until = loop.time() + self._wait
            while len(batch) < self._most:
                with contextlib.suppress(asyncio.QueueEmpty):
                    batch.append(self._queue.get_nowait())
                    continue
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), max(0.0, until - loop.time())))
                except TimeoutError:
                    break
            waited = [(clip, future) for clip, future in batch if not future.done()]  # nobody waits for the others
            if not waited:
                continue
            self._observe(len(waited))
            try:
                rows = await loop.run_in_executor(self._thread, self._scores, [clip for clip, _ in waited])
            except Exception as error:  # it is theirs to tell, and the next batch may go well
                for _, future in waited:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), row in zip(waited, rows, strict=True):
                if not future.done():
                    future.set_result(row)
