"""What of the data sets training counts on: clips of each class after flips, and texts that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.launch import ROOT
from tests.support.shards import make_shards
from tools.make_motion_clips import make_motion_clips
from vidcls.config import Config, ConfigError, config_from_values
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice
from vidcls.model.losses import class_balanced_weights
from vidcls.model.patches import VisionGeometry
from vidcls.model.prompt import PromptEncoder
from vidcls.model.tiny import tiny_config, tiny_tokenizer
from vidcls.prompts import PromptError
from vidcls.training.data_sets import open_data_sets
from vidcls.training.setup import check_texts


def config(shards: Path, **values: Any) -> Config:
    return config_from_values(
        {
            "model_name_or_path": "tiny",
            "dataset": str(shards),
            "output_dir": "out",
            "per_device_train_batch_size": 1,
            "deepspeed": str(ROOT / "ds_configs/zero2.json"),
            **values,
        }
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [7, 6, 7, 6]),
        ({"horizontal_flip": 1.0}, [7, 7, 6, 6]),
        ({"horizontal_flip": 1.0, "mirror_pairs": []}, [7, 6, 7, 6]),
        ({"horizontal_flip": 1.0, "mirror_pairs": [["down", "left"]]}, [6, 7, 7, 6]),
    ],
)
def test_classes_are_counted_as_flips_make_them(
    small_shards: Path, values: dict[str, Any], expected: list[int]
) -> None:
    assert open_data_sets(config(small_shards, **values)).class_counts() == [expected]


def test_a_class_that_only_flips_give_has_a_weight(tmp_path: Path) -> None:
    videos = make_motion_clips(tmp_path / "videos", 3, frames=4, size=56)
    (videos / "up").rename(videos / "jump left")  # without a partner: never flipped
    shards = make_shards(videos, tmp_path / "shards", frames=4)
    index = ShardIndex.open(shards)
    assert index.labels.names == ("down", "jump left", "left", "right")
    data = open_data_sets(config(shards, horizontal_flip=0.5))
    data.parts[0].index.label[index.label == 3] = 2  # all that went right goes left
    (counts,) = data.class_counts()
    assert counts == [3, 3, 3, 3]
    assert class_balanced_weights(counts, 0.9).tolist() == pytest.approx([1, 1, 1, 1])
    rarely = open_data_sets(config(shards, horizontal_flip=0.01))
    rarely.parts[0].index.label[index.label == 3] = 2
    assert rarely.class_counts() == [[3, 3, 6, 1]]


def test_a_wrong_mirror_pair_is_named_once(small_shards: Path) -> None:
    wrong = config(small_shards, horizontal_flip=0.5, mirror_pairs=[["left", "rihgt"]])
    with pytest.raises(ConfigError, match=r"^mirror_pairs\[0\]: there is no class 'rihgt'; close names: 'right'"):
        open_data_sets(wrong)


def encoder(cutoff_len: int) -> PromptEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<ACTION>"]})
    tiny = tiny_config()
    return PromptEncoder(tokenizer, VisionGeometry.from_config(tiny), tiny.video_token_id, cutoff_len, 784, 3136)


def tokens(prompt: str, index: ShardIndex, answer: str | None = None) -> int:
    clips = ClipBatches([ClipSource(index, prompt)], encoder(9999), FrameChoice(4))
    (shape,) = clips.shapes()
    return len(clips.encoder.encode(prompt, shape.grid, 1.0, answer).input_ids)


def test_the_longest_prompt_may_be_the_swapped_one(small_shards: Path) -> None:
    index = ShardIndex.open(small_shards)
    prompt, swapped = ("<video>" + f"turning {word} " * 9 + "<ACTION>" for word in ("clockwise", "counterclockwise"))
    fits = tokens(prompt, index)
    assert tokens(swapped, index) > fits
    for mirror, cutoff, good in (
        (None, fits, True),
        ([0, -1, -1, 3], fits, True),
        ([0, 2, 1, 3], fits, False),
        ([0, 2, 1, 3], tokens(swapped, index), True),
    ):
        source = ClipSource(index, prompt, mirror=None if mirror is None else np.array(mirror))
        clips = ClipBatches([source], encoder(cutoff), FrameChoice(4))
        if good:
            check_texts(clips, threads=2)
        else:
            with pytest.raises(PromptError, match="counterclockwise"):
                check_texts(clips, threads=2)


def test_the_class_name_of_most_tokens_must_fit(tmp_path: Path) -> None:
    """Few characters can be many tokens."""
    videos = make_motion_clips(tmp_path / "videos", 1, frames=4, size=56)
    (videos / "up").rename(videos / "the video the video")
    (videos / "down").rename(videos / "\u0416\u0416\u0416\u0416\u0416\u0416\u0416\u0416\u0416\u0416\u0416\u0416")
    index = ShardIndex.open(make_shards(videos, tmp_path / "shards", frames=4))
    prompt = "<video><ACTION>"
    by_tokens = sorted(index.labels.names, key=lambda name: tokens(prompt, index, name))
    needed = tokens(prompt, index, by_tokens[-1])
    assert by_tokens[-1] != max(index.labels.names, key=len)
    assert tokens(prompt, index, max(index.labels.names, key=len)) < needed
    check_texts(ClipBatches([ClipSource(index, prompt)], encoder(needed), FrameChoice(4), answers=True), threads=2)
    short = ClipBatches([ClipSource(index, prompt)], encoder(needed - 1), FrameChoice(4), answers=True)
    with pytest.raises(PromptError, match=f"needs {needed} tokens"):
        check_texts(short, threads=2)
