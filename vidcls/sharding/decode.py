"""Video file -> the frames to store, at their stored size: by decord, or by PyAV where decord cannot be trusted.

Shapes: T frames, H height, W width; frames are uint8 RGB [T, H, W, 3]. Times are seconds since the video's first frame.

Comparing decord 0.6.0's sparse get_batch with a full sequential PyAV decode shows where it cannot be trusted. It gives
wrong frames when it seeks in a stream stored in another order than shown (B-frames: MPEG-1, MPEG-4, HEVC, H.264 with
open groups of pictures), in H.264-in-AVI and in MPEG-TS, and for rotated files; it may count a frame too many at the
end of an AVI; some of its AVI timestamps are garbage. So decord gets only the containers and codecs listed below,
stored in the order shown, not rotated, with as many packets as it counts frames, and never the very last frame.
Times always come from the packets.

decord is worth its seeking only where few frames of many are wanted: up to SEEK_GAP frames apart, PyAV has decoded them
all in the time that decord needs (docs/log.md).

A video may be long and large. PyAV frames are shrunk one by one; decord, which holds a whole batch and, asked for
several smaller batches, more and more frames that it decoded ahead, gets only clips up to DECORD_BYTES.
"""

import functools
import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import decord
import numpy as np
from av.video.reformatter import VideoReformatter

from vidcls.data.codecs import resize_frames
from vidcls.data.settings import MAX_PIXELS, DecodeSettings, segment_midpoints

DECORD_TRUSTED = {
    "avi": frozenset({"mpeg4", "mjpeg"}),
    "matroska": frozenset({"h264", "mpeg4", "mjpeg", "vp8", "vp9"}),  # WebM too
    "mov": frozenset({"h264", "mpeg4", "mjpeg", "vp9"}),  # MP4 too
}
SEEK_GAP = 25  # frames between two that are wanted, on average
SEEKABLE = frozenset({"matroska", "mov"})  # containers whose packets carry the time at which they are shown
SEEK_AFTER = 30.0  # seconds; up to there decoding from the start is cheap
MAX_VIDEO_PIXELS = 2**26  # of one decoded frame; 8K is half of that
MAX_SIDE = 16383  # of a stored frame: WebP's limit
DECORD_BYTES = 2**27  # of the wanted frames at their original size: 16 of 1920x1080 are 100 MB
MOST_OF_VIDEO = 0.75  # frames for less than this share of the duration in the header: noted as damage

decord.logging.set_level(decord.logging.QUIET)


class DecodeError(ValueError):
    """A video file without a single frame that can be used; names the file and the reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both as args, so that the error can be pickled by a worker process
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class _Refused(ValueError):
    """A reason against the video or the part of it that is wanted, whichever decoder reads it."""


@dataclass
class Clip:
    """Frames of one video, as shown (rotation applied), at the size that the settings ask for.

    times: float64 [T], seconds since the video's first frame. original_size: (width, height) before resizing.
    damage: None, or why these are frames of less than was asked for: the video or its segment is cut short.
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


def decode_clip(
    path: str | os.PathLike[str], settings: DecodeSettings, start: float | None = None, end: float | None = None
) -> Clip:
    """The frames to store of a video, or of its frames with a time in [start, end): evenly spread, resized.

    They are spread by segment_midpoints; a clip with fewer frames than wanted repeats some. A segment lasts from its
    first frame to one frame interval (the video's mean) behind its last.

    A file whose decoding stops early, and a segment that ends more than one frame interval behind the video, are used
    up to there, with the reason in `damage`. Raises DecodeError when there is no frame in the segment, no time, frames
    are too large, or no decoder takes the file (then with the reason of each); ValueError unless 0 <= start < end.
    """
    span = _Span(start or 0.0, math.inf if end is None else end)
    name = os.fspath(path)
    distrust = None
    try:
        video = _probe(name)
        wanted = _choose(video.times, video.rate, settings, span) if video.times else []
        distrust = video.distrust
        if not distrust and wanted[-1] < SEEK_GAP * len(wanted):
            distrust = "decord not used (not worth seeking)"
        if not distrust and wanted[-1] == len(video.times) - 1:
            distrust = "decord not used (last frame wanted)"
        if not distrust and len(wanted) * math.prod(video.size) * 3 > DECORD_BYTES:
            distrust = "decord not used (frames too large)"
        if not distrust:
            try:
                return _decode_with_decord(name, settings, span, video, wanted)
            except _Refused:
                raise
            except Exception as error:  # decord raises what it likes; PyAV decides whether the file is usable
                distrust = f"decord: {_first_line(error)}"
        return _decode_with_pyav(name, settings, span, video, wanted)
    except _Refused as error:
        raise DecodeError(name, str(error)) from error
    except Exception as error:
        reason = f"PyAV: {_first_line(error)}"
        raise DecodeError(name, f"{distrust}; {reason}" if distrust else reason) from error


def video_seconds(path: str | os.PathLike[str]) -> float:
    """How long the frames of a video are shown. Raises DecodeError where its packets do not say."""
    name = os.fspath(path)
    try:
        video = _probe(name)
    except _Refused as error:
        raise DecodeError(name, str(error)) from error
    except Exception as error:
        raise DecodeError(name, f"PyAV: {_first_line(error)}") from error
    if not video.times:
        raise DecodeError(name, "its frames have no times")
    return video.times[-1] + _interval(video.times, video.rate)


@dataclass(frozen=True)
class _Span:
    """The part of a video that is wanted, in seconds since its first frame."""

    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:  # not a number compares false
            raise ValueError(f"start = {self.start}, end = {self.end}: need 0 <= start < end (seconds)")


@dataclass(frozen=True)
class _Video:
    """What can be known of a video from its headers, its packets and its first frame.

    stamps: presentation times of the packets that are shown, in that order, in units of the stream; empty if some
    packet has none. times: the same in seconds since the first. keys: the numbers of the key frames among them, if one
    can be sought. size: (height, width) as coded. rate: frames a second in the header, if it has one.
    distrust: None, or why decord must not be used. damage: None, or how much less there is than the header says.
    """

    stamps: tuple[int, ...]
    times: tuple[float, ...]
    keys: tuple[int, ...]
    size: tuple[int, int]
    rate: Fraction | None
    distrust: str | None
    damage: str | None


def _open(name: str) -> Any:
    # Only local files: without this, a playlist named clip.mp4 could make FFmpeg open network addresses.
    # max_pixels: for a picture that turns out larger than the header says.
    options = {"protocol_whitelist": "file", "max_pixels": str(MAX_VIDEO_PIXELS)}
    return av.open(f"file:{name}", options=options)


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("has no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if not context.width or not context.height:  # FFmpeg leaves them out where they break max_pixels
        raise _Refused(f"has no frame size, or frames of more than {MAX_VIDEO_PIXELS} pixels")
    if context.width * context.height > MAX_VIDEO_PIXELS:
        raise _Refused(f"frames of {context.width}x{context.height} are more than {MAX_VIDEO_PIXELS} pixels")
    context.thread_count = 1  # the workers are the parallelism
    context.options = {"max_pixels": str(MAX_VIDEO_PIXELS)}
    return stream


def _probe(name: str) -> _Video:
    about = os.stat(name)
    return _probe_file(name, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=8)  # segments of one video follow each other, and listing its packets takes longest
def _probe_file(name: str, size_now: int, changed: int) -> _Video:
    with _open(name) as container:
        stream = _video_stream(container)
        container_name, codec = container.format.name.split(",")[0], stream.codec_context.name
        reordered = bool(stream.codec_context.has_b_frames)
        packets = [
            (p.pts, p.size, p.is_discard, p.is_keyframe) for p in container.demux(stream) if p.size or p.pts is not None
        ]
        time_base, rate = stream.time_base, stream.average_rate
        size = (stream.codec_context.height, stream.codec_context.width)
        duration = _promised_duration(container, stream)
    in_file = [pts for pts, _, _, _ in packets if pts is not None]
    stamps: list[int] = []
    if len(in_file) == len(packets) and time_base is not None:
        stamps = sorted(pts for pts, _, discard, _ in packets if not discard)
    times = [float((pts - stamps[0]) * time_base) for pts in stamps]
    odd = any(size == 0 or discard for _, size, discard, _ in packets)
    distrust = None
    if codec not in DECORD_TRUSTED.get(container_name, ()):
        distrust = f"{codec} in {container_name}"
    elif not times or odd:
        distrust = "packets without time or data"
    elif reordered or any(later <= earlier for earlier, later in pairwise(in_file)):
        distrust = "frames not stored in the order shown"
    elif _first_rotation(name):
        distrust = "rotated"
    damage = None
    if times and times[-1] + (1 / rate if rate else 0) < MOST_OF_VIDEO * duration:
        damage = f"the file ends after {times[-1]:.2f} of {duration:.2f} seconds"
    keys: list[int] = []
    if container_name in SEEKABLE and not odd and len(set(stamps)) == len(stamps):
        key_stamps = {pts for pts, _, _, key in packets if key}
        keys = [number for number, pts in enumerate(stamps) if pts in key_stamps]
    distrust = distrust and f"decord not used ({distrust})"
    return _Video(tuple(stamps), tuple(times), tuple(keys), size, rate, distrust, damage)


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


def _interval(times: Sequence[float], rate: Fraction | None) -> float:
    """Mean seconds from one frame to the next; of a single frame what the header says, if it does."""
    if len(times) > 1:
        return (times[-1] - times[0]) / (len(times) - 1)
    return float(1 / rate) if rate else 0.0


def _choose(times: Sequence[float], rate: Fraction | None, settings: DecodeSettings, span: _Span) -> list[int]:
    """The numbers of the frames to store, of all frames of a video with these times."""
    inside = [index for index, time in enumerate(times) if span.start <= time < span.end]
    interval = _interval(times, rate)
    if not inside:
        what = f"segment from {span.start:g} to {span.end:g} s"
        if span.start > times[-1]:
            raise _Refused(f"{what}: the video lasts {times[-1] + interval:.2f} s")
        raise _Refused(f"{what}: no frame is shown in it, frames are {interval:.3f} s apart")
    duration = times[inside[-1]] - times[inside[0]] + interval
    count = settings.frame_count(len(inside), duration)
    return [inside[index] for index in segment_midpoints(len(inside), count)]


def _damage(times: Sequence[float], video: _Video, span: _Span, stopped: str | None = None) -> str | None:
    """Why frames are missing of a span that was asked for, of a video with frames at these times."""
    interval = _interval(times, video.rate)
    lasts = times[-1] + interval
    if span.end <= lasts:
        return None
    if stopped or video.damage or span.end == math.inf or span.end <= lasts + interval:
        return stopped or video.damage
    return f"the segment ends at {span.end:g} s, the video at {lasts:.2f} s"


def _stored_size(settings: DecodeSettings, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the stored frames."""
    try:
        size = settings.target_size(height, width)
    except ValueError as error:
        raise _Refused(str(error)) from error
    if max(size) > MAX_SIDE or size[0] * size[1] > MAX_PIXELS:
        raise _Refused(
            f"frames of {width}x{height} would be stored as {size[1]}x{size[0]}; sides must be at most {MAX_SIDE}, "
            f"frames at most {MAX_PIXELS} pixels"
        )
    return size


def _decode_with_decord(name: str, settings: DecodeSettings, span: _Span, video: _Video, wanted: list[int]) -> Clip:
    height, width = video.size
    size = _stored_size(settings, height, width)
    # VP9 fails with more than one thread.
    reader = decord.VideoReader(name, ctx=decord.cpu(0), num_threads=1)
    if len(reader) != len(video.times):
        raise ValueError(f"counts {len(reader)} frames, the file has {len(video.times)} packets")
    frames = reader.get_batch(wanted).asnumpy()
    if frames.shape[1:3] != video.size:
        raise ValueError(f"frames are {frames.shape[2]}x{frames.shape[1]}, the header says {width}x{height}")
    times = np.array(video.times)[wanted]
    damage = _damage(video.times, video, span)
    return Clip(resize_frames(frames, size), times, "decord", (width, height), damage)


def _decode_with_pyav(name: str, settings: DecodeSettings, span: _Span, video: _Video, wanted: list[int]) -> Clip:
    """As many frames as packets are expected; a second pass follows if they were others."""
    picked = _pick_by_seeking(name, settings, video, wanted)
    if picked is None:
        picked = _pick(name, settings, wanted, video.times if span.end < math.inf else ())
    if not picked.times:
        raise ValueError(picked.stopped or "has no frames")
    try:
        wanted = _choose(picked.times, video.rate, settings, span)
    except _Refused as error:
        raise _Refused(f"{error}; {picked.stopped}") if picked.stopped else error from None
    if not picked.pictures.keys() >= set(wanted):
        picked = _pick(name, settings, wanted, ())
    stacked = np.stack([picked.pictures[number] for number in wanted])
    times = np.array([picked.times[number] for number in wanted], dtype=np.float64)
    return Clip(stacked, times, "pyav", picked.original_size, _damage(picked.times, video, span, picked.stopped))


@dataclass
class _Picked:
    """Pictures of the stored size by frame number; the times of all frames of the video; why it stopped early if so."""

    pictures: dict[int, np.ndarray]
    times: list[float]
    original_size: tuple[int, int] = (0, 0)
    stopped: str | None = None


def _pick(name: str, settings: DecodeSettings, wanted: list[int], expected: Sequence[float]) -> _Picked:
    """One pass from the start that keeps only the frames `wanted`.

    It may end behind the last of them if all frames up to there came at the times `expected` of the whole video.
    """
    picked = _Picked({}, [])
    chosen = set(wanted)
    with _open(name) as container:
        stream = _video_stream(container)
        try:
            for number, frame in enumerate(container.decode(stream)):
                time = _frame_time(frame, number, stream.average_rate)
                if number == 0:
                    begin, shrinker = time, _Shrinker(settings, frame)
                    picked.original_size = shrinker.original_size
                picked.times.append(max(0.0, float(time - begin)))
                if number in chosen:
                    picked.pictures[number] = shrinker.shrink(frame)
                    if number == wanted[-1] and picked.times == list(expected[: number + 1]):
                        picked.times = list(expected)
                        break
        except av.FFmpegError as error:
            picked.stopped = f"decoding stops after {len(picked.times)} frames: {_first_line(error)}"
    return picked


def _pick_by_seeking(name: str, settings: DecodeSettings, video: _Video, wanted: list[int]) -> _Picked | None:
    """As `_pick`, from a key frame before the frames `wanted`; None where that gains nothing or might not be exact.

    Frames behind a key frame may need others before it (open groups of pictures), so decoding begins one key frame
    earlier still, and from the second on every packet's frame must come, known by its time.
    """
    if not wanted or video.times[wanted[0]] < SEEK_AFTER or video.keys[:1] != (0,):
        return None
    before = bisect_right(video.keys, wanted[0])
    if before < 2:
        return None
    run_in, number = video.keys[before - 2 : before]
    picked = _Picked({}, list(video.times))
    chosen, shrinker = set(wanted), None
    with _open(name) as container:
        stream = _video_stream(container)
        try:
            container.seek(video.stamps[run_in], stream=stream)
            for position, packet in enumerate(container.demux(stream)):
                if position == 0 and (packet.pts is None or packet.pts > video.stamps[run_in]):
                    return None
                for frame in packet.decode():
                    if frame.pts is None or frame.is_corrupt or (frame.height, frame.width) != video.size:
                        return None
                    if frame.pts < video.stamps[number]:
                        continue
                    if frame.pts != video.stamps[number]:
                        return None
                    if number in chosen:
                        shrinker = shrinker or _Shrinker(settings, frame)
                        picked.original_size = shrinker.original_size
                        picked.pictures[number] = shrinker.shrink(frame)
                        if number == wanted[-1]:
                            return picked
                    number += 1
        except av.FFmpegError:
            pass  # the pass from the start says what is wrong
    return None


class _Shrinker:
    """Decoded frames -> upright RGB pictures of the stored size; the video's first frame decides on the size."""

    def __init__(self, settings: DecodeSettings, first: Any) -> None:
        self._coded = {"width": first.width, "height": first.height}  # a stream may change its size
        self._quarters = round(first.rotation / 90)
        self._reformatter = VideoReformatter()  # one for all: its tables cost more than converting a frame
        height, width = (first.width, first.height) if self._quarters % 2 else (first.height, first.width)
        self._size = _stored_size(settings, height, width)
        self.original_size = (width, height)

    def shrink(self, frame: Any) -> np.ndarray:
        if round(frame.rotation / 90) != self._quarters:
            raise ValueError("the rotation changes within the video")
        rgb = self._reformatter.reformat(frame, format="rgb24", **self._coded).to_ndarray()
        upright = np.ascontiguousarray(np.rot90(rgb, self._quarters))
        return resize_frames(upright[np.newaxis], self._size)[0]


def _frame_time(frame: Any, number: int, rate: Fraction | None) -> Fraction:
    if frame.pts is not None and frame.time_base:
        return frame.pts * frame.time_base
    if rate:
        return number / rate
    raise ValueError("has neither timestamps nor a frame rate")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
