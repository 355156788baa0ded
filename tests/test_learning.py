"""It learns: real clips well above chance, and motion from the order of frames alone. Through the public commands."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support import launch
from tests.support.learning import predictions, top1
from tools.make_motion_clips import make_motion_clips
from vidcls.data.batch import Batch
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, Request
from vidcls.model.patches import Grid

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

RECIPE = "launch/recipes/quickstart.yaml"
ON_REAL_CLIPS = {
    "per_device_train_batch_size": 6,
    "learning_rate": 2e-3,
    "max_steps": 90,
    "save_steps": 90,
    "warmup_ratio": 0.1,
    "report_to": "none",
    "plot_loss": False,
}
SEEDS = (1, 2, 3)


def shard(out: Path, *arguments: object) -> Path:
    words = ["tools/make_shards.py", *arguments, "--out", out, "--frames", "8", "--short-side", "112"]
    done = launch.run([launch.PYTHON, *words], log=out.parent / f"{out.name}.log")
    assert done.code == 0, done.output
    return out


def train(shards: Path, output_dir: Path) -> Path:
    words = (RECIPE, f"dataset={shards}", f"output_dir={output_dir}", "report_to=none")
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

    shuffled = top1(predictions(checkpoint, test, ShuffledFrames))
    print(f"motion: top-1 {in_order:.3f} in order, {shuffled:.3f} with shuffled frames, on 100 held-out clips")
    assert in_order >= 0.9
    assert shuffled <= 0.6


@pytest.fixture(scope="module")
def ucf_shards(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six classes of UCF101: "train" and "test" of the official split 1."""
    folder = tmp_path_factory.mktemp("ucf101")
    ucf = real_data / "ucf101"
    shards = {}
    for split in ("train", "test"):
        lists = ucf / "annotations"
        words = ("--list", lists / f"subset6_{split}list01.txt", "--classes", lists / "classInd.txt")
        shards[split] = shard(folder / split, "ucf101", "--videos", ucf / "videos", *words)
    assert (len(ShardIndex.open(shards["train"])), len(ShardIndex.open(shards["test"]))) == (108, 42)
    return shards


@pytest.mark.real
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_real_clips_are_learned(ucf_shards: dict[str, Path], tmp_path: Path, stage: int) -> None:
    """Three seeds in one start of the launcher: starting costs as much as the training."""
    recipes = []
    for seed in SEEDS:
        zero = f"ds_configs/zero{stage}.json"
        options = {"dataset": str(ucf_shards["train"]), "output_dir": str(tmp_path / f"seed{seed}"), "deepspeed": zero}
        recipe = {**yaml.safe_load((launch.ROOT / RECIPE).read_text()), **ON_REAL_CLIPS, **options, "seed": seed}
        recipes.append(tmp_path / f"seed{seed}.yaml")
        recipes[-1].write_text(yaml.safe_dump(recipe))
    begin = time.monotonic()
    done = launch.deepspeed(2, "tests/support/trainings.py", *recipes, log=tmp_path / "log", timeout=400)
    assert done.code == 0, done.output[-3000:]
    print(f"real clips, ZeRO-{stage}: {len(SEEDS)} trainings in {time.monotonic() - begin:.0f} s")
    checkpoints = [tmp_path / f"seed{seed}" / "checkpoint-90" for seed in SEEDS]
    accuracies = [top1(predictions(checkpoint, ucf_shards["test"])) for checkpoint in checkpoints]
    listed = ", ".join(f"{a:.3f}" for a in accuracies)
    print(f"real clips, ZeRO-{stage}: top-1 {listed}, mean {np.mean(accuracies):.3f} on 42 held-out clips, chance 0.17")
    assert np.mean(accuracies) >= 0.55
