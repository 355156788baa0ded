"""Clips -> the tar bytes of each, by worker processes that may crash or hang."""

import contextlib
import os
import tarfile
import zlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial

from vidcls.data.codecs import encode_frames
from vidcls.data.index import BLOCK, MAX_CLIP_BYTES, MAX_SAMPLE_BYTES
from vidcls.data.settings import DecodeSettings
from vidcls.data.shards import ClipInfo, member_names
from vidcls.data.workers import Lost, run_all
from vidcls.sharding.decode import DecodeError, decode_clip
from vidcls.sharding.records import ClipRecord


@dataclass(frozen=True)
class PackedClip:
    """One clip as it stands in a tar. frame_size: (height, width) as stored."""

    tar: bytes
    crc32: int
    frames: int
    frame_size: tuple[int, int]
    decoder: str
    damaged: bool


def pack_clip(record: ClipRecord, settings: DecodeSettings) -> PackedClip:
    """Decode, resize and encode one clip. Raises DecodeError, OSError or MemoryError."""
    clip = decode_clip(record.path, settings, record.start, record.end)
    count, height, width, _ = clip.frames.shape
    if clip.frames.nbytes > MAX_CLIP_BYTES:
        raise DecodeError(os.fspath(record.path), f"{count} frames of {width}x{height} are over {MAX_CLIP_BYTES} bytes")
    about = ClipInfo(
        key=record.key,
        label=record.label,
        class_name=record.class_name,
        source=record.source or record.path.name,
        frame_times=[round(seconds, 6) for seconds in clip.times.tolist()],
        decoder=clip.decoder,
        original_size=clip.original_size,
        start=record.start,
        end=record.end,
        prompt=record.prompt,
        answer=record.answer,
        damage=clip.damage,
    )
    members = [*encode_frames(clip.frames, settings), about.to_json()]
    tar = b"".join(map(_member, member_names(record.key, count, settings.suffix), members))
    if len(tar) > MAX_SAMPLE_BYTES:
        raise DecodeError(os.fspath(record.path), f"takes {len(tar)} bytes as stored, at most {MAX_SAMPLE_BYTES} fit")
    return PackedClip(tar, zlib.crc32(tar), count, (height, width), clip.decoder, clip.damage is not None)


def _member(name: str, data: bytes) -> bytes:
    # Fixed time, owner and mode: the same clip gives the same bytes.
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o444
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def pack_all(
    records: Iterable[ClipRecord], settings: DecodeSettings, workers: int, clip_timeout: float
) -> Generator[PackedClip | str, None, None]:
    """The packed clip, or the reason why there is none, for each record in order. Closing it ends the workers.

    workers: processes; 0 decodes in this process, without protection against crashes and hangs.
    """
    with contextlib.closing(run_all(partial(_try_clip, settings), records, workers, clip_timeout)) as outcomes:
        for outcome in outcomes:
            yield f"decoding {outcome.reason}" if isinstance(outcome, Lost) else outcome


def _try_clip(settings: DecodeSettings, record: ClipRecord) -> PackedClip | str:
    """What fails because of the clip is its reason; any other exception is a bug and goes on."""
    try:
        return pack_clip(record, settings)
    except DecodeError as error:
        return error.reason
    except (OSError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
