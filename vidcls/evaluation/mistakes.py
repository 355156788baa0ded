"""The wrong predictions that a model was most sure of, with their frames: to look at."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np
import simplejpeg

from vidcls.data.codecs import FrameError, decode_frames, resize_frames
from vidcls.data.frames import view
from vidcls.data.index import ShardError, ShardIndex
from vidcls.data.shards import ShardReader
from vidcls.evaluation.evaluate import Prediction

MOST, FRAMES, HEIGHT, QUALITY = 24, 4, 96, 75
MAX_WIDTH = 512  # of one frame: a hostile clip may be 16 million pixels wide


def most_confident_mistakes(predictions: Iterable[Prediction], most: int = MOST) -> list[Prediction]:
    """The wrong ones with the highest probabilities, the most confident first; of equals the first one."""
    wrong = [each for each in predictions if each.predicted != each.label]
    return sorted(wrong, key=lambda each: -float(each.scores[each.predicted]))[:most]


def describe_mistakes(predictions: Iterable[Prediction], index: ShardIndex) -> list[dict[str, Any]]:
    """As JSON: key, classes, probabilities, and `FRAMES` frames of each clip side by side, a JPEG in base64."""
    reader, names = ShardReader(index), index.labels.names
    sample_of = {key: sample for sample, key in enumerate(index.keys)}
    rows = []
    for each in most_confident_mistakes(predictions):
        try:
            picture = _strip(reader, sample_of[each.key])
        except (ShardError, FrameError):  # it could be read a moment ago; the numbers are worth more than a picture
            continue
        rows.append(
            {
                "key": each.key,
                "true": names[each.label],
                "predicted": names[each.predicted],
                "confidence": round(float(each.scores[each.predicted]), 6),
                "true_score": round(float(each.scores[each.label]), 6),
                "jpeg": base64.b64encode(picture).decode("ascii"),
            }
        )
    return rows


def _strip(reader: ShardReader, sample: int) -> bytes:
    index = reader.index
    stored = reader.read(sample).frames
    chosen = [stored[i] for i in view(len(stored), FRAMES)]
    size = int(index.height[sample]), int(index.width[sample])
    frames = decode_frames(chosen, index.settings.codec, *size)
    width = min(MAX_WIDTH, max(1, round(size[1] * HEIGHT / size[0])))
    strip = np.concatenate(list(resize_frames(frames, (HEIGHT, width))), axis=1)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(strip), quality=QUALITY, colorsubsampling="420")
