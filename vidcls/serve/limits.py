"""What the service takes, and the answers to what it does not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeLimits:
    """ValueError unless the values make sense.

    upload_bytes: of one request; upload_seconds: until it is all there. video_seconds: of one video. decode_seconds:
    for decoding it. waiting: requests that are in work or wait at once; more are told to come again. workers: decoding
    processes. batch_size: clips per forward; batch_wait: seconds that a clip waits for others at most.
    """

    upload_bytes: int = 100 * 2**20
    upload_seconds: float = 60.0
    video_seconds: float = 600.0
    decode_seconds: float = 30.0
    waiting: int = 64
    workers: int = 2
    batch_size: int = 8
    batch_wait: float = 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "batch_wait" else 1e-9
            if value < least:
                raise ValueError(f"{name}: {value}; legal: {'>= 0' if name == 'batch_wait' else '> 0'}")


# How files of the containers that are taken begin: (offset, bytes). FFmpeg itself would find a video inside a tar.
CONTAINERS: dict[str, tuple[tuple[int, bytes], ...]] = {
    "mp4, mov, 3gp": tuple((4, name) for name in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
    "mkv, webm": ((0, b"\x1a\x45\xdf\xa3"),),
    "avi": ((8, b"AVI "),),
    "mpeg": ((0, b"\x00\x00\x01\xba"), (0, b"\x00\x00\x01\xb3")),
    "ts": ((188, b"G"),),
    "flv": ((0, b"FLV"),),
    "wmv": ((0, b"\x30\x26\xb2\x75"),),
    "ogv": ((0, b"OggS"),),
}
HEAD_BYTES = 256  # that `container_of` needs


def container_of(head: bytes) -> str | None:
    """The kind of a file with this beginning; None: none that is taken."""
    for name, marks in CONTAINERS.items():
        if any(head[at : at + len(mark)] == mark for at, mark in marks) and (name != "ts" or head[:1] == b"G"):
            return name
    return None


class RefusedError(Exception):
    """An upload that is not answered. status: of HTTP; reason: for whoever sent it."""

    def __init__(self, status: int, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.outcome, self.reason = status, outcome, reason
