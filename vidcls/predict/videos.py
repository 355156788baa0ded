"""Which videos, and their frames: decoded where a file that crashes or stops the decoder costs nothing else."""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from vidcls.data.settings import DecodeSettings
from vidcls.data.workers import Lost, run_all
from vidcls.sharding.decode import Clip, DecodeError, decode_clip, video_seconds

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp")
DECODE_SECONDS = 120.0  # for one clip or window


@dataclass(frozen=True)
class Job:
    """A video, or its part from `start` to `end` in seconds."""

    video: str
    settings: DecodeSettings
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Unreadable:
    """Why there are no frames; names the video."""

    reason: str


def find_videos(folder: Path) -> list[Path]:
    """Every video file below `folder`, by the end of its name, sorted. Raises ValueError where there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"--folder: {folder} has no video files ({', '.join(SUFFIXES)})")
    return found


def read_list(path: Path) -> list[Path]:
    """The videos of a CSV file: its column `video`, or its first column where no column has that name.

    Relative paths are below the file's folder. Raises ValueError where it cannot be read or a video is not there.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row and row[0].strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"--csv: {path} cannot be read: {error}") from None
    column = 0
    if rows and "video" in rows[0]:
        column = rows[0].index("video")
        rows = rows[1:]
    if short := next((row for row in rows if len(row) <= column), None):
        raise ValueError(f"--csv: {path}: the row {short} has no column {column + 1}")
    videos = [path.parent / row[column] for row in rows]
    if not videos:
        raise ValueError(f"--csv: {path} lists no video")
    check_there("--csv", videos)
    return videos


def check_there(option: str, videos: Iterable[Path]) -> None:
    """Raise ValueError, naming them, where some are not files."""
    missing = [str(video) for video in videos if not video.is_file()]
    if missing:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{option}: not a file: {', '.join(missing[:5])}{rest}")


def decode_all(jobs: Iterable[Job], workers: int) -> Generator[Clip | Unreadable, None, None]:
    """The frames of each job, in order. With workers > 0 each file is decoded in one of so many other processes."""
    tasks = list(jobs)
    for job, found in zip(tasks, run_all(decode, tasks, workers, DECODE_SECONDS), strict=True):
        yield Unreadable(f"{job.video}: {found.reason}") if isinstance(found, Lost) else found


def decode(job: Job) -> Clip | Unreadable:
    try:
        return decode_clip(job.video, job.settings, job.start, job.end)
    except DecodeError as error:
        return Unreadable(str(error))


def seconds_of(video: str) -> float | Unreadable:
    """How long a video lasts."""
    try:
        return video_seconds(video)
    except DecodeError as error:
        return Unreadable(str(error))


def all_seconds(videos: Iterable[str], workers: int) -> list[float | Unreadable]:
    names = list(videos)
    found = run_all(seconds_of, names, workers, DECODE_SECONDS)
    pairs = zip(names, found, strict=True)
    return [Unreadable(f"{name}: {each.reason}") if isinstance(each, Lost) else each for name, each in pairs]
