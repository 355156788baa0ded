"""It learns: real clips well above chance, and motion from the order of frames alone. Through the public commands."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support import launch
from tools.make_motion_clips import make_motion_clips
from vidcls.data.loader import Batch, ClipBatches, Request
from vidcls.data.shards import ShardIndex
from vidcls.evaluation.evaluate import predict_batches
from vidcls.model.patches import Grid
from vidcls.model.pretrained import load_model

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

RECIPE = "launch/recipes/quickstart.yaml"
ON_REAL_CLIPS = ("per_device_train_batch_size=6", "learning_rate=2e-3", "max_steps=120", "warmup_ratio=0.1")


def shard(out: Path, *arguments: object) -> Path:
    words = ["tools/make_shards.py", *arguments, "--out", out, "--frames", "8", "--short-side", "112"]
    done = launch.run([launch.PYTHON, *words], log=out.parent / f"{out.name}.log")
    assert done.code == 0, done.output
    return out


def train(shards: Path, output_dir: Path, *overrides: str) -> Path:
    words = (RECIPE, f"dataset={shards}", f"output_dir={output_dir}", "report_to=none", *overrides)
    done = launch.deepspeed(2, "launch/train.py", *words, log=output_dir.with_suffix(".log"))
    assert done.code == 0, done.output[-3000:]
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return checkpoints[-1]


def evaluate(checkpoint: Path, shards: Path) -> float:
    done = launch.deepspeed(
        2, "launch/evaluate.py", checkpoint, "--data", shards, log=checkpoint.parent / "evaluate.log"
    )
    assert done.code == 0, done.output[-3000:]
    return json.loads((checkpoint / "evaluation" / "eval.json").read_text())["top1"]


class ShuffledFrames(ClipBatches):
    """The same clips with the frames of each in a random order."""

    def __getitem__(self, request: Request) -> Batch:
        batch = super().__getitem__(request)
        start = 0
        for row, grid in enumerate(batch.grid_thw):
            count = self.encoder.frames_per_grid * grid[0]
            size = count * frame_values(grid)
            frames = batch.frames[start : start + size].reshape(count, -1)
            order = np.random.default_rng([request.samples[row]]).permutation(count)
            batch.frames[start : start + size] = frames[order].reshape(-1)
            start += size
        return batch


def frame_values(grid: Grid) -> int:
    return grid[1] * grid[2] * 14 * 14 * 3


def test_motion_is_learned_from_the_order_of_frames(tmp_path: Path) -> None:
    videos = make_motion_clips(tmp_path / "videos", per_class=100)
    folder = ("folder", "--videos", videos, "--split")
    checkpoint = train(shard(tmp_path / "train", *folder, "train"), tmp_path / "run")
    test = shard(tmp_path / "test", *folder, "test")
    in_order = evaluate(checkpoint, test)

    model, encoder, spec = load_model(checkpoint)
    index = ShardIndex.open(test)
    clips = ShuffledFrames(index, encoder, prompt=spec.prompt, max_frames=spec.video_maxlen)
    predictions = predict_batches(model, (clips[Request((i,))] for i in range(len(index))))
    shuffled = float(np.mean([p.predicted == p.label for p in predictions]))
    print(f"motion: top-1 {in_order:.3f} in order, {shuffled:.3f} with shuffled frames, {len(index)} held-out clips")
    assert in_order >= 0.9
    assert shuffled <= 0.6


@pytest.mark.real
@pytest.mark.parametrize("stage", [2, 3])
def test_real_clips_are_learned(real_data: Path, tmp_path: Path, stage: int) -> None:
    ucf = real_data / "ucf101"
    shards = {}
    for split in ("train", "test"):
        lists = (
            "--list",
            ucf / f"annotations/subset6_{split}list01.txt",
            "--classes",
            ucf / "annotations/classInd.txt",
        )
        shards[split] = shard(tmp_path / split, "ucf101", "--videos", ucf / "videos", *lists)
    assert (len(ShardIndex.open(shards["train"])), len(ShardIndex.open(shards["test"]))) == (108, 42)
    accuracies = []
    for seed in (1, 2, 3):
        begin = time.monotonic()
        zero = f"deepspeed=ds_configs/zero{stage}.json"
        checkpoint = train(shards["train"], tmp_path / f"seed{seed}", *ON_REAL_CLIPS, f"seed={seed}", zero)
        accuracies.append(evaluate(checkpoint, shards["test"]))
        print(f"real clips, ZeRO-{stage}, seed {seed}: top-1 {accuracies[-1]:.3f}, {time.monotonic() - begin:.0f} s")
    print(f"real clips, ZeRO-{stage}: mean top-1 {np.mean(accuracies):.3f} on 42 held-out clips, chance 0.17")
    assert np.mean(accuracies) >= 0.55
