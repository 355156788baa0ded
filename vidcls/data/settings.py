"""How clips are decoded and stored: which frames, of which size, in which codec."""

from dataclasses import asdict, dataclass
from typing import Any

from vidcls.geometry import FACTOR, smart_resize

MAX_FRAMES = 999  # members are named key.000.jpg to key.998.jpg
MAX_PIXELS = 2**24  # of one stored frame
SUFFIXES = {"jpg": "jpg", "webp": "webp", "png": "png", "raw": "npy"}
"""Codec -> suffix of a stored frame. raw is NumPy's npy: uint8 [H, W, 3]."""
LOSSY = ("jpg", "webp")


@dataclass(frozen=True)
class DecodeSettings:
    """ValueError unless the values make sense together.

    frames: this many, evenly spread over the clip, or else fps: this many a second, evenly spread, at most max_frames.
    short_side: pixels (even), the long side in proportion; or else max_pixels: the largest area of a frame, its sides
    multiples of 28 as Qwen2.5-VL's smart resize picks them. quality: 1 to 100, of jpg and webp; None for the lossless
    codecs png and raw.
    """

    frames: int | None = 16
    fps: float | None = None
    max_frames: int | None = None
    short_side: int | None = 128
    max_pixels: int | None = None
    codec: str = "jpg"
    quality: int | None = 90

    def __post_init__(self) -> None:
        if (self.frames is None) == (self.fps is None):
            raise ValueError(f"frames = {self.frames!r}, fps = {self.fps!r}: give exactly one of them")
        if (self.fps is None) != (self.max_frames is None):
            raise ValueError(f"max_frames = {self.max_frames!r}: goes with fps, which is {self.fps!r}")
        if (self.short_side is None) == (self.max_pixels is None):
            raise ValueError(f"short_side = {self.short_side!r}, max_pixels = {self.max_pixels!r}: give exactly one")
        if not isinstance(self.codec, str) or self.codec not in SUFFIXES:
            raise ValueError(f"codec = {self.codec!r}: must be one of {', '.join(SUFFIXES)}")
        if (self.codec in LOSSY) != (self.quality is not None):
            raise ValueError(f"quality = {self.quality!r}: belongs to the codecs {', '.join(LOSSY)} and to no other")
        ranges = {
            "frames": (1, MAX_FRAMES),
            "max_frames": (2, MAX_FRAMES),
            "short_side": (16, 2160),
            "max_pixels": (FACTOR**2, MAX_PIXELS),
            "quality": (1, 100),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not low <= value <= high):
                raise ValueError(f"{name} = {value!r}: must be a whole number from {low} to {high}")
        if self.fps is not None and not (type(self.fps) in (int, float) and 0 < self.fps <= 240):
            raise ValueError(f"fps = {self.fps!r}: must be above 0 and at most 240 frames a second")
        if self.short_side is not None and self.short_side % 2:
            raise ValueError(f"short_side = {self.short_side}: must be even")

    @property
    def suffix(self) -> str:
        """Of the members that hold the frames."""
        return SUFFIXES[self.codec]

    @property
    def most_frames(self) -> int:
        """Frames that a clip has at most."""
        most = self.frames or self.max_frames
        assert most is not None
        return most

    def frame_count(self, available: int, duration: float) -> int:
        """How many frames are stored of a clip with `available` >= 1 frames that lasts `duration` seconds.

        With fps an even number, since Qwen2.5-VL merges frames in pairs, and not more than there are (of 1: 2).
        """
        if self.frames is not None:
            return self.frames
        assert self.fps is not None
        most = min(self.most_frames, available)
        return max(2, 2 * min(round(duration * self.fps / 2), most // 2))

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which frames of height x width pixels are stored."""
        if self.max_pixels is not None:
            return smart_resize(height, width, factor=FACTOR, min_pixels=FACTOR**2, max_pixels=self.max_pixels)
        assert self.short_side is not None
        if height <= width:
            return self.short_side, 2 * round(width * self.short_side / height / 2)
        return 2 * round(height * self.short_side / width / 2), self.short_side

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Any) -> "DecodeSettings":
        """The inverse of `to_dict`; ValueError for a missing or unknown field."""
        fields = set(cls.__dataclass_fields__)
        if not isinstance(stored, dict) or set(stored) != fields:
            raise ValueError(f"decode settings: must have exactly the fields {', '.join(sorted(fields))}")
        return cls(**stored)


def segment_midpoints(total: int, frames: int) -> list[int]:
    """The frame at the middle of each of `frames` equal parts of `total` frames: floor((i + 0.5) * total / frames)."""
    return [(2 * i + 1) * total // (2 * frames) for i in range(frames)]
