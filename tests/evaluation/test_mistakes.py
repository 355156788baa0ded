"""The mistakes that a model was most sure of."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidcls.data.index import ShardError, ShardIndex
from vidcls.data.shards import ShardReader
from vidcls.evaluation.evaluate import Prediction
from vidcls.evaluation.mistakes import HEIGHT, describe_mistakes, most_confident_mistakes


def prediction(key: str, label: int, *scores: float) -> Prediction:
    return Prediction(key, label, np.array(scores))


def test_only_mistakes_and_the_surest_first() -> None:
    given = [
        prediction("right", 0, 0.9, 0.1),
        prediction("unsure", 1, 0.6, 0.4),
        prediction("sure", 1, 0.95, 0.05),
        prediction("also sure", 0, 0.05, 0.95),
    ]
    assert [each.key for each in most_confident_mistakes(given)] == ["sure", "also sure", "unsure"]
    assert [each.key for each in most_confident_mistakes(given, 1)] == ["sure"]


def test_they_are_told_with_their_frames(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex.open(small_shards)
    predictions = []
    for sample, key in enumerate(index.keys):
        scores = np.full(4, 0.1)
        scores[(index.label[sample] + (sample < 3)) % 4] = 0.7 - sample / 100
        predictions.append(Prediction(key, int(index.label[sample]), scores))
    read = ShardReader.read

    def refuse(self: ShardReader, sample: int) -> object:
        if sample == 1:  # read a moment ago, gone now: it costs its picture only
            raise ShardError("gone")
        return read(self, sample)

    monkeypatch.setattr(ShardReader, "read", refuse)
    rows = json.loads(json.dumps(describe_mistakes(predictions, index)))
    assert [row["key"] for row in rows] == [index.keys[0], index.keys[2]]
    assert rows[0]["true"] == index.labels.names[index.label[0]]
    assert (rows[0]["confidence"], rows[0]["true_score"]) == (0.7, 0.1)
    picture = Image.open(io.BytesIO(base64.b64decode(rows[0]["jpeg"])))
    assert picture.size == (4 * HEIGHT, HEIGHT)  # four square frames
    assert np.asarray(picture).std() > 5
