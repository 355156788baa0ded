"""Flipping that knows left from right teaches; flipping that does not cannot be told from a wrong label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import learning
from tools.make_motion_clips import CLASSES, make_motion_clips
from vidcls.config import config_from_values
from vidcls.data.index import ShardIndex
from vidcls.data.labels import LabelSpace
from vidcls.data.loader import ClipBatches, FrameChoice, Request
from vidcls.evaluation.evaluate import Prediction
from vidcls.model.pretrained import build_encoder, read_spec
from vidcls.training.data_sets import open_data_sets

pytestmark = [pytest.mark.launch, pytest.mark.long, pytest.mark.timeout(900)]

SIZE = 112
FLIPPED = {"horizontal_flip": 0.5, "max_steps": 160, "save_steps": 160, "seed": 1}
SIDES = {CLASSES.index("left"), CLASSES.index("right")}
OTHERS = {0, 1, 2, 3} - SIDES


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "train", "test", and "one_sided": the training clips without a single one that moves left."""
    folder = tmp_path_factory.mktemp("mirror")
    videos = make_motion_clips(folder / "videos", per_class=100)
    everything = {*CLASSES}
    return {
        "train": learning.shard_classes(videos, folder / "train", everything, split="train", short_side=SIZE),
        "test": learning.shard_classes(videos, folder / "test", everything, split="test", short_side=SIZE),
        "one_sided": learning.shard_classes(
            videos, folder / "one_sided", everything - {"left"}, split="train", short_side=SIZE
        ),
    }


@pytest.fixture(scope="module")
def checkpoints(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The one that swaps labels has not even seen a left clip, the other has."""
    recipes = {
        "aware": {**FLIPPED, "dataset": str(shards["one_sided"])},
        "naive": {**FLIPPED, "dataset": str(shards["train"]), "mirror_pairs": []},
    }
    return learning.train(tmp_path_factory.mktemp("mirror_runs"), recipes)


@pytest.fixture(scope="module")
def held_out(checkpoints: dict[str, Path], shards: dict[str, Path]) -> dict[str, list[Prediction]]:
    found = {name: learning.predictions(checkpoint, shards["test"]) for name, checkpoint in checkpoints.items()}
    for name, each in found.items():
        sides, others, share = learning.top1(each, SIDES), learning.top1(each, OTHERS), true_side_N(each).mean()
        print(
            f"{name} flipping: top-1 {sides:.3f} left/right, {others:.3f} up/down; share of the true side {share:.3f}"
        )
    return found


def true_side_N(found: list[Prediction]) -> np.ndarray:
    """Of what a clip that moves left or right is given for these two classes, the part of the true one."""
    sides = sorted(SIDES)
    return np.array([p.scores[p.label] / p.scores[sides].sum() for p in found if p.label in SIDES])


def test_flipping_that_swaps_labels_teaches_a_side_without_a_clip(held_out: dict[str, list[Prediction]]) -> None:
    aware = held_out["aware"]
    assert learning.top1(aware) >= 0.9
    assert learning.top1(aware, {CLASSES.index("left")}) >= 0.8
    assert true_side_N(aware).mean() >= 0.9


def test_flipping_that_keeps_labels_confuses_left_and_right_and_nothing_else(
    held_out: dict[str, list[Prediction]],
) -> None:
    """Half of the clips of each side look like the other side: the best that can be said is 0.5, log 2 nats.

    Which of the two is the larger is chance, and the same for all clips: accuracy says nothing here.
    """
    naive = held_out["naive"]
    assert learning.top1(naive, OTHERS) >= 0.9
    assert np.mean([p.predicted in SIDES for p in naive if p.label in SIDES]) >= 0.9
    assert 0.35 <= true_side_N(naive).mean() <= 0.65
    assert -np.log(true_side_N(naive)).mean() >= 0.55


def test_a_data_set_can_forbid_flipping(shards: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Of two data sets with the same clips, in one stream, one is flipped and the other is not."""
    values: dict[str, Any] = {
        "model_name_or_path": "tiny",
        "datasets": [
            {"name": "still", "dataset": str(shards["test"]), "augment": {"horizontal_flip": 0}},
            {"name": "flipped", "dataset": str(shards["test"])},
        ],
        "horizontal_flip": 1.0,
        "temporal_jitter": False,
        "per_device_train_batch_size": 2,
        "output_dir": str(tmp_path),
    }
    index = ShardIndex.open(shards["test"])
    encoder = build_encoder(read_spec(checkpoints["aware"]))
    sources = open_data_sets(config_from_values(values)).sources()
    clips = ClipBatches(sources, encoder, FrameChoice(8), jitter=False)
    for sample in (0, 30, 60, 90):
        batch = clips[Request((sample, sample), (0, 1), epochs=(0, 0))]
        still, flipped = batch.frames.reshape(2, 8, SIZE, SIZE, 3)
        assert still.tolist() == flipped.flip(2).tolist() != flipped.tolist()
        label = int(index.label[sample])
        assert batch.labels_B.tolist() == [label, mirrored(label, index.labels)]


def mirrored(label: int, labels: LabelSpace) -> int:
    other = {"left": "right", "right": "left"}.get(labels.names[label], labels.names[label])
    return labels.names.index(other)
