"""Video file -> frames (decord, or PyAV where decord cannot be trusted) -> JPEG bytes, and JPEG bytes -> frames.

Shapes: T frames, H height, W width; frames are uint8 RGB [T, H, W, 3].

Comparing decord 0.6.0's sparse get_batch with a full sequential PyAV decode shows where it cannot be trusted. It gives
wrong frames when it seeks in a stream stored in another order than shown (B-frames: MPEG-1, MPEG-4, HEVC, H.264 with
open groups of pictures), in H.264-in-AVI and in MPEG-TS, and for rotated files; it may count a frame too many at the
end of an AVI; some of its AVI timestamps are garbage. So decord gets only the containers and codecs listed below,
stored in the order shown, not rotated, with as many packets as it counts frames, and never the very last frame.
Times always come from the packets.
"""

import os
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import decord
import numpy as np
import simplejpeg
from PIL import Image

DECORD_TRUSTED = {
    "avi": frozenset({"mpeg4", "mjpeg"}),
    "matroska": frozenset({"h264", "mpeg4", "mjpeg", "vp8", "vp9"}),  # WebM too
    "mov": frozenset({"h264", "mpeg4", "mjpeg", "vp9"}),  # MP4 too
}
MAX_FRAMES = 999  # members are named key.000.jpg to key.998.jpg
MAX_JPEG_PIXELS = 2**24
MOST_OF_VIDEO = 0.75  # frames for less than this share of the duration in the header: noted as damage

decord.logging.set_level(decord.logging.QUIET)


class DecodeError(ValueError):
    """A video file without a single frame that can be used; names the file and the reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both as args, so that the error can be pickled by a worker process
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class JpegError(ValueError):
    """A stored frame that is not the JPEG it should be."""


@dataclass(frozen=True)
class DecodeSettings:
    """How clips are stored: number of frames, pixels of the short side (even), JPEG quality."""

    frames: int = 16
    short_side: int = 128
    quality: int = 90

    def __post_init__(self) -> None:
        for name, low, high in (("frames", 1, MAX_FRAMES), ("short_side", 16, 2160), ("quality", 1, 100)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} = {value!r}: must be a whole number from {low} to {high}")
        if self.short_side % 2:
            raise ValueError(f"short_side = {self.short_side}: must be even")

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Any) -> "DecodeSettings":
        """The inverse of `to_dict`; ValueError for a missing or unknown field."""
        fields = set(cls.__dataclass_fields__)
        if not isinstance(stored, dict) or set(stored) != fields:
            raise ValueError(f"decode settings: must have exactly the fields {', '.join(sorted(fields))}")
        return cls(**stored)


@dataclass
class Clip:
    """Frames of one video, as shown (rotation applied), at their original size.

    times: float64 [T], seconds since the video's first frame. original_size: (width, height).
    damage: None, or why this is only the beginning of the video.
    """

    frames: np.ndarray
    times: np.ndarray
    decoder: str
    original_size: tuple[int, int]
    damage: str | None = None

    def __post_init__(self) -> None:
        assert self.frames.dtype == np.uint8, self.frames.dtype
        assert self.frames.ndim == 4, self.frames.shape
        assert self.frames.shape[3] == 3, self.frames.shape
        assert self.times.dtype == np.float64, self.times.dtype
        assert self.times.shape == (len(self.frames),), self.times.shape
        assert self.decoder in ("decord", "pyav"), self.decoder


def segment_midpoints(total: int, frames: int) -> list[int]:
    """The frame at the middle of each of `frames` equal parts of `total` frames: floor((i + 0.5) * total / frames)."""
    return [(2 * i + 1) * total // (2 * frames) for i in range(frames)]


def decode_clip(path: str | os.PathLike[str], frames: int) -> Clip:
    """`frames` frames of the video, evenly spread (see segment_midpoints); a shorter video repeats frames.

    A file whose decoding stops early is used up to there, with the reason in `damage`. Raises DecodeError
    when there is no frame, no time, or no decoder that takes the file (then with the reason of each).
    """
    name = os.fspath(path)
    distrust = None
    try:
        video = _probe(name)
        distrust = video.distrust or _last_frame_wanted(video, frames)
        if not distrust:
            try:
                return _decode_with_decord(name, frames, video)
            except Exception as error:  # decord raises what it likes; PyAV decides whether the file is usable
                distrust = f"decord: {_first_line(error)}"
        return _decode_with_pyav(name, frames, video)
    except Exception as error:
        reason = f"PyAV: {_first_line(error)}"
        raise DecodeError(name, f"{distrust}; {reason}" if distrust else reason) from error


@dataclass
class _Video:
    """What can be known of a video from its headers, its packets and its first frame.

    times: presentation times of the packets, in order, seconds since the first; empty if some packet has none.
    distrust: None, or why decord must not be used. damage: as in Clip.
    """

    times: list[float]
    distrust: str | None
    damage: str | None


def _open(name: str) -> Any:
    # Only local files: without this, a playlist named clip.mp4 could make FFmpeg open network addresses.
    return av.open(f"file:{name}", options={"protocol_whitelist": "file"})


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("has no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # the workers are the parallelism
    return stream


def _probe(name: str) -> _Video:
    with _open(name) as container:
        stream = _video_stream(container)
        container_name, codec = container.format.name.split(",")[0], stream.codec_context.name
        reordered = bool(stream.codec_context.has_b_frames)
        packets = [(p.pts, p.size, p.is_discard) for p in container.demux(stream) if p.size or p.pts is not None]
        time_base, rate = stream.time_base, stream.average_rate
        duration = _promised_duration(container, stream)
    stamps = [pts for pts, _, _ in packets if pts is not None]
    times = []
    if len(stamps) == len(packets) and time_base is not None:
        times = [float((pts - min(stamps)) * time_base) for pts in sorted(stamps)] if stamps else []
    distrust = None
    if codec not in DECORD_TRUSTED.get(container_name, ()):
        distrust = f"{codec} in {container_name}"
    elif not times or any(size == 0 or discard for _, size, discard in packets):
        distrust = "packets without time or data"
    elif reordered or any(later <= earlier for earlier, later in pairwise(stamps)):
        distrust = "frames not stored in the order shown"
    elif _first_rotation(name):
        distrust = "rotated"
    damage = None
    if times and times[-1] + (1 / rate if rate else 0) < MOST_OF_VIDEO * duration:
        damage = f"the file ends after {times[-1]:.2f} of {duration:.2f} seconds"
    return _Video(times, distrust and f"decord not used ({distrust})", damage)


def _promised_duration(container: Any, stream: Any) -> float:
    """Seconds of video that the headers speak of, 0 if they do not."""
    if stream.frames and stream.average_rate:  # before the duration: FFmpeg scales that of a truncated AVI down
        return float(stream.frames / stream.average_rate)
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration and not container.streams.audio:  # sound may go on longer
        return container.duration / av.time_base
    return 0.0


def _first_rotation(name: str) -> int:
    with _open(name) as container:
        for frame in container.decode(_video_stream(container)):
            return int(frame.rotation)
    return 0


def _last_frame_wanted(video: _Video, frames: int) -> str | None:
    total = len(video.times)
    return "decord not used (last frame wanted)" if segment_midpoints(total, frames)[-1] == total - 1 else None


def _decode_with_decord(name: str, frames: int, video: _Video) -> Clip:
    # VP9 fails with more than one thread.
    reader = decord.VideoReader(name, ctx=decord.cpu(0), num_threads=1)
    if len(reader) != len(video.times):
        raise ValueError(f"counts {len(reader)} frames, the file has {len(video.times)} packets")
    wanted = segment_midpoints(len(reader), frames)
    picked = reader.get_batch(wanted).asnumpy()
    return Clip(picked, np.array(video.times)[wanted], "decord", (picked.shape[2], picked.shape[1]), video.damage)


def _decode_with_pyav(name: str, frames: int, video: _Video) -> Clip:
    """Decodes from the start. As many frames as packets are expected; a second pass follows if it were others."""
    expected = len(video.times)
    picked = _pick(name, segment_midpoints(expected, frames) if expected else [])
    if picked.total != expected and picked.total:
        picked = _pick(name, segment_midpoints(picked.total, frames))
    if not picked.total:
        raise ValueError(picked.damage or "has no frames")
    wanted = segment_midpoints(picked.total, frames)
    stacked = np.stack([picked.frames[index] for index in wanted])
    times = np.array([picked.times[index] for index in wanted], dtype=np.float64)
    return Clip(stacked, times, "pyav", (stacked.shape[2], stacked.shape[1]), picked.damage or video.damage)


@dataclass
class _Picked:
    """Frames and times by frame index, the number of frames the decoder gave, and why it stopped early if so."""

    frames: dict[int, np.ndarray]
    times: dict[int, float]
    total: int
    damage: str | None


def _pick(name: str, indices: list[int]) -> _Picked:
    """One sequential pass that keeps only the frames at `indices`: a long video never fills the memory."""
    picked = _Picked({}, {}, 0, None)
    wanted = set(indices)
    with _open(name) as container:
        stream = _video_stream(container)
        rate = stream.average_rate
        start, size = 0.0, {}
        try:
            for frame in container.decode(stream):
                time = _frame_time(frame, picked.total, rate)
                if picked.total == 0:
                    start = time
                    size = {"width": frame.width, "height": frame.height}  # a stream may change its size
                if picked.total in wanted:
                    upright = np.rot90(frame.to_ndarray(format="rgb24", **size), round(frame.rotation / 90))
                    picked.frames[picked.total] = np.ascontiguousarray(upright)
                    picked.times[picked.total] = max(0.0, time - start)
                picked.total += 1
        except av.FFmpegError as error:
            picked.damage = f"decoding stops after {picked.total} frames: {_first_line(error)}"
    return picked


def _frame_time(frame: Any, index: int, rate: Fraction | None) -> float:
    if frame.time is not None:
        return float(frame.time)
    if rate:
        return float(index / rate)
    raise ValueError("has neither timestamps nor a frame rate")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def target_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the short side `short_side` and the long one in proportion, to the nearest even number."""
    if height <= width:
        return short_side, 2 * round(width * short_side / height / 2)
    return 2 * round(height * short_side / width / 2), short_side


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[T, H, W, 3] -> [T, *size, 3], size = (height, width), bicubic; the input itself where it fits already."""
    if frames.shape[1:3] == size:
        return frames
    height, width = size
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(image) for image in resized])


def encode_jpegs(frames: np.ndarray, quality: int) -> list[bytes]:
    """One JPEG (4:2:0) for each frame of [T, H, W, 3]."""
    return [
        simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=quality, colorspace="RGB", colorsubsampling="420")
        for frame in frames
    ]


def decode_jpegs(jpegs: list[bytes]) -> np.ndarray:
    """uint8 [T, H, W, 3]. Strict: JpegError names the frame that is damaged, too large or of another size."""
    if not jpegs:
        raise JpegError("no frames")
    sizes = []
    for index, jpeg in enumerate(jpegs):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg, strict=True)
        except ValueError as error:
            raise JpegError(f"frame {index}: {_first_line(error)}") from error
        if height * width > MAX_JPEG_PIXELS:
            raise JpegError(f"frame {index}: {width}x{height} is more than {MAX_JPEG_PIXELS} pixels")
        sizes.append((height, width))
        if sizes[0] != sizes[-1]:
            raise JpegError(f"frame {index}: {width}x{height}, frame 0 is {sizes[0][1]}x{sizes[0][0]}")
    frames = np.empty((len(jpegs), *sizes[0], 3), dtype=np.uint8)
    for index, jpeg in enumerate(jpegs):
        try:
            simplejpeg.decode_jpeg(jpeg, colorspace="RGB", strict=True, buffer=frames[index])
        except ValueError as error:
            raise JpegError(f"frame {index}: {_first_line(error)}") from error
    return frames
