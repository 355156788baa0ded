"""Which of a clip's stored frames are used, where more are stored than the model takes: pure integers.

A clip of `total` frames is cut into `frames` equal parts, and one frame of each is taken (temporal segments: Wang et
al. 2016, arXiv 1608.00859), or `frames` of them `stride` apart (dense: Feichtenhofer et al. 2019, arXiv 1812.03982).
A clip that has no more than `frames` is used whole, whatever else is asked.
"""

from dataclasses import dataclass

import numpy as np

from vidcls.data.order import CONTROL, DENSE, TEMPORAL_JITTER, random_words

CROPS = (1, 3)
CONTROLS = ("none", "shuffled", "single")


@dataclass(frozen=True)
class Views:
    """How a clip is looked at in evaluation; its scores are the mean over the views (Simonyan and Zisserman 2014,
    arXiv 1406.2199). ValueError unless the values are legal.

    segments: choices of frames (`view`). crops: of each, 1: whole frames; 3: the squares at both ends and in the middle
    of the longer side. control: what the model is not shown, to see what it uses: "shuffled": the order of the frames;
    "single": all but the middle one.
    """

    segments: int = 1
    crops: int = 1
    control: str = "none"

    def __post_init__(self) -> None:
        if self.segments < 1:
            raise ValueError(f"segments: {self.segments}; legal: >= 1")
        if self.crops not in CROPS:
            raise ValueError(f"crops: {self.crops}; legal: {', '.join(map(str, CROPS))}")
        if self.control not in CONTROLS:
            raise ValueError(f"control: {self.control!r}; legal: {', '.join(CONTROLS)}")

    @property
    def count(self) -> int:
        return self.segments * self.crops

    def numbered(self) -> list[tuple[int, int | None]]:
        """Every (number of the segment, number of the crop), the crop None for whole frames."""
        crops = [None] if self.crops == 1 else range(self.crops)
        return [(segment, crop) for segment in range(self.segments) for crop in crops]


def square(height: int, width: int, number: int) -> tuple[slice, slice]:
    """Rows and columns of square `number` (0 to 2, from the start to the end of the longer side) of a frame."""
    side = min(height, width)
    top, left = ((length - side) * number // 2 for length in (height, width))
    return slice(top, top + side), slice(left, left + side)


def controlled(count: int, control: str, sample: int) -> list[int]:
    """Which of `count` chosen frames stands at each place under a control: always the same for a sample."""
    if control == "single":
        return [count // 2] * count
    if control == "shuffled":
        return np.argsort(random_words(0, 0, count, purpose=CONTROL, item=sample), kind="stable").tolist()
    return list(range(count))


def jittered(total: int, frames: int, seed: int, epoch: int, sample: int) -> list[int]:
    """A random frame of each part, for training: always the same ones for the same seed, epoch and sample."""
    if total <= frames:
        return list(range(total))
    bounds = np.arange(frames + 1) * total // frames
    words = random_words(seed, epoch, frames, purpose=TEMPORAL_JITTER, item=sample)
    return (bounds[:-1] + (words % np.diff(bounds).astype(np.uint64)).astype(np.int64)).tolist()


def view(total: int, frames: int, number: int = 0, views: int = 1) -> list[int]:
    """The frames of view `number` of `views`, for evaluation: floor((i + (number + 0.5) / views) * total / frames).

    Views lie evenly spread within the parts; the only one of 1 takes the middles.
    """
    assert 0 <= number < views, (number, views)
    if total <= frames:
        return list(range(total))
    return [(2 * (i * views + number) + 1) * total // (2 * views * frames) for i in range(frames)]


def dense(total: int, frames: int, stride: int, seed: int, epoch: int, sample: int) -> list[int]:
    """A run of frames `stride` apart from a random start, for training: a pure function of its arguments.

    Where the run would be longer than the clip, the stride is the largest that fits.
    """
    if total <= frames:
        return list(range(total))
    span, stride = _span(total, frames, stride)
    (word,) = random_words(seed, epoch, 1, purpose=DENSE, item=sample).tolist()
    start = word % (total - span + 1)
    return list(range(start, start + span, stride))


def dense_view(total: int, frames: int, stride: int, number: int = 0, views: int = 1) -> list[int]:
    """Run `number` of `views`, for evaluation: the first begins with the clip, the last ends with it.

    The others lie evenly between them, and the only one of 1 in the middle. Strides are those of `dense`.
    """
    assert 0 <= number < views, (number, views)
    if total <= frames:
        return list(range(total))
    span, stride = _span(total, frames, stride)
    room = total - span
    start = room // 2 if views == 1 else room * number // (views - 1)
    return list(range(start, start + span, stride))


def _span(total: int, frames: int, stride: int) -> tuple[int, int]:
    """(frames from the first to the last of a run, stride), both as they fit into `total` > `frames`."""
    assert stride >= 1, stride
    stride = min(stride, (total - 1) // max(1, frames - 1))
    return (frames - 1) * stride + 1, stride
