"""tools/cache_features.py under the launcher, and trainings that read what it made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support import launch
from tests.support.launch import Finished
from vidcls.data.feature_parts import is_done
from vidcls.data.features import FeatureCache, read_header

pytestmark = pytest.mark.launch

STEPS, HALF = 4, 2
RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_dropout": 0.1,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-3,
    "max_steps": STEPS,
    "save_steps": HALF,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": HALF,
    "val_size": 6,
    "bf16": False,
    "plot_loss": False,
    "html_report": False,
    "report_to": "none",
    "deepspeed": "ds_configs/zero3.json",
}


@pytest.fixture(scope="module")
def made(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """The recipe whose features two ranks have made."""
    top = tmp_path_factory.mktemp("vision_cache")
    values = {**RECIPE, "dataset": str(small_shards), "vision_cache": str(top / "features")}
    recipe = top / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**values, "output_dir": str(top / "cached")}), encoding="utf-8")
    return recipe, launch.deepspeed(2, "tools/cache_features.py", recipe, log=top / "made.log")


@pytest.fixture(scope="module")
def runs(made: tuple[Path, Finished]) -> Path:
    """Trainings on two ranks with ZeRO-3: with features, without, and on from the checkpoints of both."""
    recipe, _ = made
    top, values = recipe.parent, yaml.safe_load(recipe.read_text(encoding="utf-8"))
    changes: dict[str, dict[str, Any]] = {
        "cached": {},
        "plain": {"vision_cache": None},
        "resumed": {"resume_from_checkpoint": str(top / "cached" / f"checkpoint-{HALF}")},
        "crossed": {"resume_from_checkpoint": str(top / "plain" / f"checkpoint-{HALF}"), "self_check": False},
    }
    recipes = []
    for name, each in changes.items():
        recipes.append(top / f"{name}.yaml")
        recipes[-1].write_text(yaml.safe_dump({**values, **each, "output_dir": str(top / name)}), encoding="utf-8")
    done = launch.deepspeed(2, "tests/support/trainings.py", *recipes, log=top / "runs.log")
    assert done.code == 0, done.output
    return top


def rows(run: Path, first: int = 1) -> list[dict[str, float]]:
    """What is logged from step `first` on, without times."""
    found = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    kept = ("loss", "grad_norm", "top1", "eval/loss", "eval/top1", "step")
    return [{k: v for k, v in row.items() if k in kept} for row in found if row["step"] >= first]


def test_two_ranks_make_a_whole_cache(made: tuple[Path, Finished]) -> None:
    recipe, done = made
    assert done.code == 0, done.output
    assert "26 clips, 0.000106 GB of features (4.1 kB a clip), 4 parts" in done.output
    assert done.output.count("complete: ") == 1
    (folder,) = [path.parent for path in (recipe.parent / "features").glob("*/cache.json")]
    cache = FeatureCache(folder, read_header(folder))
    assert all(is_done(cache, part, bad_allowed=False) for part in range(cache.parts))
    assert not list(folder.glob("*.tmp"))


def test_losses_are_those_of_training_on_frames(runs: Path) -> None:
    cached, plain = rows(runs / "cached"), rows(runs / "plain")
    assert len(cached) == STEPS + STEPS // HALF
    for one, other in zip(cached, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_run_goes_on_bit_for_bit_and_from_one_without_features(runs: Path) -> None:
    assert rows(runs / "resumed", HALF + 1) == rows(runs / "cached", HALF + 1)
    for one, other in zip(rows(runs / "crossed", HALF + 1), rows(runs / "plain", HALF + 1), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    weights = [
        load_file(runs / name / f"checkpoint-{STEPS}" / "adapter_model.safetensors") for name in ("cached", "resumed")
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
