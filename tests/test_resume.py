"""A run goes on from a checkpoint as if it had never stopped; what would go on as another run is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support import launch
from tests.support.shards import make_shards

pytestmark = pytest.mark.launch

# The first step after a resume is the sixth, where the powers of Adam's betas show whether they were multiplied up.
STEPS, HALF = 10, 5
RUNS = ("zero2", "zero3", "all2", "all3")
STATE = "training_state-*-of-*.safetensors"  # every rank writes one
WEIGHTS = (
    STATE,
    "adapter_model.safetensors",
    "heads/default/action_decoder.safetensors",
    "action_token.safetensors",
)
RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_rank": 8,
    "lora_dropout": 0.1,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "max_steps": STEPS,
    "save_steps": HALF,
    "logging_steps": 1,
    "bf16": True,
    "plot_loss": False,
    "report_to": "none",
    "seed": 7,
}
DAMAGED = "training_state-00002-of-00002.safetensors"
# Everything whose state could be lost on the way.
ALL: dict[str, Any] = {
    "use_dora": True,
    "vision_tuning": "lora",
    "merger_tuning": "full",
    "action_decoder_type": "attention",
    "loraplus_lr_ratio": 4.0,
    "layerwise_lr_decay": 0.8,
    "ema_decay": 0.9,
    "label_smoothing": 0.1,
    "horizontal_flip": 0.5,
    "random_resized_crop": 0.5,
    "color_jitter": 0.4,
    "rand_augment": [2, 9],
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "lm_loss_weight": 0.1,
    "gradient_checkpointing": True,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
}


def write_recipe(path: Path, shards: Path, **values: Any) -> Path:
    content = {**RECIPE, "dataset": str(shards), "output_dir": str(path.with_suffix("")), **values}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def train(folder: Path, name: str, *recipes: Path) -> str:
    done = launch.deepspeed(2, "tests/support/trainings.py", *recipes, log=folder / f"{name}.log")
    assert done.code == 0, done.output[-4000:]
    return done.output


def zero(stage: int) -> str:
    return f"ds_configs/zero{stage}.json"


@pytest.fixture(scope="module")
def straight(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with RUNS, each trained to its end on 2 ranks; "all2" and "all3" with everything in ALL."""
    top = tmp_path_factory.mktemp("straight")
    recipes = [write_recipe(top / f"zero{stage}.yaml", small_shards, deepspeed=zero(stage)) for stage in (2, 3)]
    recipes += [write_recipe(top / f"all{stage}.yaml", small_shards, deepspeed=zero(stage), **ALL) for stage in (2, 3)]
    train(top, "straight", *recipes)
    return top


@pytest.fixture(scope="module")
def resumed(straight: Path, small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs, resumed in a new process.

    "zero2" goes on from the half-way checkpoint in a new folder. "zero3" goes on from the latest of a copy of the
    whole run, whose newest checkpoint is damaged.
    """
    top = tmp_path_factory.mktemp("resumed")
    half = straight / "zero2" / f"checkpoint-{HALF}"
    fresh = write_recipe(top / "zero2.yaml", small_shards, deepspeed=zero(2), resume_from_checkpoint=str(half))
    latest = write_recipe(top / "zero3.yaml", small_shards, deepspeed=zero(3), resume_from_checkpoint="latest")
    shutil.copytree(straight / "zero3", top / "zero3")
    flip_a_bit(top / "zero3" / f"checkpoint-{STEPS}" / DAMAGED)
    others = []
    for stage in (2, 3):
        half = straight / f"all{stage}" / f"checkpoint-{HALF}"
        values = {**ALL, "deepspeed": zero(stage), "resume_from_checkpoint": str(half)}
        others.append(write_recipe(top / f"all{stage}.yaml", small_shards, **values))
    train(top, "resumed", fresh, latest, *others)
    return top


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def tensors(checkpoint: Path, pattern: str) -> dict[str, torch.Tensor]:
    """Those of all files that `pattern` names."""
    files = [load_file(path) for path in checkpoint.glob(pattern)]
    found = {name: tensor for file in files for name, tensor in file.items()}
    assert found
    assert len(found) == sum(map(len, files))
    return found


def log_rows(run: Path) -> list[dict[str, float]]:
    """The log without what a clock measured."""
    rows = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "lr", "grad_norm")} for row in rows]


@pytest.mark.parametrize("run", RUNS)
def test_the_log_goes_on_bit_for_bit(straight: Path, resumed: Path, run: str) -> None:
    rows = log_rows(straight / run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert log_rows(resumed / run)[-HALF:] == rows[-HALF:]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_tensor_is_bit_equal(straight: Path, resumed: Path, run: str, name: str) -> None:
    last = Path(run) / f"checkpoint-{STEPS}"
    expected, found = tensors(straight / last, name), tensors(resumed / last, name)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    half = tensors(straight / run / f"checkpoint-{HALF}", name)
    # There was something to go on with; of what is saved in bf16, rounding can hide it.
    still = [key for key in expected if torch.equal(expected[key], half[key])]
    assert still == [] or name != STATE


def test_a_new_folder_logs_the_steps_it_took(resumed: Path) -> None:
    assert [row["step"] for row in log_rows(resumed / "zero2")] == list(range(HALF + 1, STEPS + 1))
    assert [p.name for p in (resumed / "zero2").glob("checkpoint*")] == [f"checkpoint-{STEPS}"]


def test_the_same_folder_logs_each_step_once(straight: Path, resumed: Path) -> None:
    assert log_rows(resumed / "zero3") == log_rows(straight / "zero3")


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(resumed: Path) -> None:
    said = (resumed / "resumed.log").read_text()
    damaged = resumed / "zero3" / f"checkpoint-{STEPS}" / DAMAGED
    assert f"vidcls: checkpoint passed over: {damaged} is damaged" in said
    assert f"resuming  {resumed / 'zero3' / f'checkpoint-{HALF}'} at step {HALF}" in said


def refusal(straight: Path, tmp_path: Path, shards: Path, *, ranks: int | None, **values: Any) -> list[str]:
    """What a run that resumes "zero2" with other values says about it, after exit code 2."""
    half = straight / "zero2" / f"checkpoint-{HALF}"
    recipe = write_recipe(tmp_path / "again.yaml", shards, resume_from_checkpoint=str(half), **values)
    words = ["launch/train.py", recipe]
    log = tmp_path / "log"
    done = launch.deepspeed(ranks, *words, log=log) if ranks else launch.run([launch.PYTHON, *words], log=log)
    assert done.code == 2, done.output[-4000:]
    assert "Traceback" not in done.output
    assert not (tmp_path / "again").exists()
    return [line for line in done.output.splitlines() if line.startswith("error: ")]


def test_another_seed_is_refused(straight: Path, tmp_path: Path, small_shards: Path) -> None:
    assert refusal(straight, tmp_path, small_shards, ranks=2, seed=8) == [
        "error: resume_from_checkpoint: seed is 7 in the checkpoint and 8 in this run; "
        "they must be equal for the run to go on; to let it differ all the same: resume_with_changes=seed"
    ]


def test_another_global_batch_is_refused(straight: Path, tmp_path: Path, small_shards: Path) -> None:
    (line,) = refusal(straight, tmp_path, small_shards, ranks=None, train_batch_size=16)
    assert "global_batch is 8 in the checkpoint and 16 in this run" in line


def test_another_dataset_is_refused(straight: Path, tmp_path: Path, small_shards: Path) -> None:
    """The same clips in bigger frames: as many, named the same, and not the same data."""
    other = make_shards(small_shards.parent / "videos", tmp_path / "shards", frames=4, short_side=64)
    (line,) = refusal(straight, tmp_path, other, ranks=None)
    assert "default/data_digest is " in line
