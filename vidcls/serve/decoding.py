"""Decoding of uploads in other processes: hostile files end those, never the service."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import resource
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessPool
from PIL import Image

from vidcls.data.settings import DecodeSettings
from vidcls.serve.limits import RefusedError, ServeLimits
from vidcls.sharding.decode import DecodeError, decode_clip, video_seconds

MEMORY = 6 * 2**30  # bytes of address space of a decoding process
TASKS_EACH = 200  # after which a process is replaced: what a decoder leaks goes with it
STRIP, STRIP_HEIGHT = 8, 96


@dataclass(frozen=True)
class Upload:
    """A decoded video: frames uint8 [T, H, W, 3] and times in seconds, as the shards would have them; strip: some of
    them side by side, as JPEG."""

    frames: np.ndarray
    times: list[float]
    seconds: float
    strip: bytes


@dataclass(frozen=True)
class Unusable:
    reason: str
    too_long: bool = False


class Decoders:
    """A pool of decoding processes."""

    def __init__(self, settings: DecodeSettings, limits: ServeLimits) -> None:
        self._settings, self._limits = settings, limits
        self._pool = _new_pool(limits.workers)

    async def decode(self, path: str) -> Upload:
        """Raises RefusedError: it is no video, too long, or too much for a decoder."""
        limits = self._limits
        task = (path, self._settings, limits.video_seconds)
        pool = self._pool
        # Of the pool, should it no longer answer at all: others may be decoded before this one.
        patience = limits.decode_seconds * (2 + limits.waiting / limits.workers)
        try:
            future = pool.schedule(_decode, args=task, timeout=limits.decode_seconds)
            async with asyncio.timeout(patience) as overall:
                found = await asyncio.wrap_future(future)
        except (BrokenProcessPool, RuntimeError):  # a process died while it had nothing to do, or started
            await self._replace(pool)
            raise RefusedError(503, "restarting", "the decoders are starting again; come again") from None
        except TimeoutError:
            if overall.expired():
                await self._replace(pool)
                raise RefusedError(503, "restarting", "the decoders do not answer; come again") from None
            raise RefusedError(422, "too_slow", f"decoding took more than {limits.decode_seconds:g} s") from None
        except ProcessExpired:
            raise RefusedError(422, "crashed", "the file crashed the decoder") from None
        except MemoryError:
            raise RefusedError(422, "memory", "decoding it needs too much memory") from None
        if isinstance(found, Unusable):
            raise RefusedError(*((413, "too_long") if found.too_long else (422, "unreadable")), found.reason)
        return found

    async def _replace(self, pool: ProcessPool) -> None:
        if self._pool is pool:  # the first of several requests that find it so
            self._pool = _new_pool(self._limits.workers)
            await asyncio.to_thread(_end, pool)

    def close(self) -> None:
        _end(self._pool)


def _end(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _new_pool(workers: int) -> ProcessPool:
    # forkserver: this process has threads, and perhaps a GPU.
    context: Any = multiprocessing.get_context("forkserver")
    return ProcessPool(max_workers=workers, max_tasks=TASKS_EACH, context=context, initializer=_limit_memory)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _decode(path: str, settings: DecodeSettings, most_seconds: float) -> Upload | Unusable:
    try:
        seconds = video_seconds(path)
        if seconds > most_seconds:
            return Unusable(f"the video lasts {seconds:.1f} s; at most {most_seconds:g} s are taken", too_long=True)
        clip = decode_clip(path, settings)
    except DecodeError as error:
        return Unusable(error.reason.replace(path, "the upload").replace("file:", ""))
    except ValueError as error:
        return Unusable(str(error))
    chosen = clip.frames[np.linspace(0, len(clip.frames) - 1, min(STRIP, len(clip.frames))).round().astype(int)]
    return Upload(clip.frames, clip.times.tolist(), seconds, _strip(chosen))


def _strip(frames: np.ndarray) -> bytes:
    width = min(256, max(1, round(frames.shape[2] * STRIP_HEIGHT / frames.shape[1])))
    small = [np.asarray(Image.fromarray(frame).resize((width, STRIP_HEIGHT))) for frame in frames]
    out = io.BytesIO()
    Image.fromarray(np.concatenate(small, axis=1)).save(out, "JPEG", quality=80)
    return out.getvalue()
