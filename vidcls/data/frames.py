"""Which of a clip's stored frames are used, where more are stored than the model takes: pure integers.

A clip of `total` frames is cut into `frames` equal parts, and one frame of each is taken (temporal segments: Wang et
al. 2016, arXiv 1608.00859). A clip that has no more than `frames` is used whole, whatever else is asked.
"""

import numpy as np

from vidcls.data.order import TEMPORAL_JITTER, random_words


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
