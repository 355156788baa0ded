"""Small video files for tests, odd ones among them, and a decoder to check others against."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import av
import numpy as np

from tools.make_motion_clips import motion_frames, write_video


def video(path: Path, frames: int = 24, seed: int = 0, codec: str | None = None) -> Path:
    """A clip of a moving blob, 64x64 at 12 frames a second; AVI, MP4 or MKV by the suffix of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = motion_frames(np.random.default_rng(seed), "right", max(frames, 2), 64)[:frames]
    write_video(path, pictures, codec)
    return path


def mpeg4_avi(path: Path, frames: int = 24, seed: int = 0) -> Path:
    return video(path, frames, seed, codec="mpeg4")


def truncated(path: Path, source: Path, share: float) -> Path:
    """The first `share` of the bytes of `source`."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def text_as_video(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("this is not a video\n" * 50, encoding="utf-8")
    return path


def class_folder(folder: Path, classes: tuple[str, ...] = ("a", "b"), per_class: int = 3) -> Path:
    """folder/<class>/clip<i>.mp4"""
    for label, name in enumerate(classes):
        for clip in range(per_class):
            video(folder / name / f"clip{clip}.mp4", seed=100 * label + clip)
    return folder


def sequential_decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every frame of a video, upright, and its time since the first: one pass, no seeking, nothing of vidcls."""
    with av.open(str(path)) as container:
        shown = [
            (np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90), frame.time)
            for frame in container.decode(video=0)
        ]
    times = np.array([time for _, time in shown])
    return np.stack([frame for frame, _ in shown]), times - times[0]


class KillingPath(type(Path())):  # type: ignore[misc]
    """A path that kills the worker process which opens it, as a crash in a native decoder does."""

    def __fspath__(self) -> str:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__fspath__()


class HangingPath(type(Path())):  # type: ignore[misc]
    """A path that hangs the worker process which opens it."""

    def __fspath__(self) -> str:
        if multiprocessing.parent_process() is not None:
            time.sleep(600)
        return super().__fspath__()
