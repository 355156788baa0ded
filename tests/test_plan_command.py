"""tools/plan.py as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = "launch/recipes/ucf101.yaml"


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plan.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def answer(*words: str) -> dict[str, Any]:
    done = plan(*words, "--json")
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_a_recipe_on_a_cluster_of_published_accelerators() -> None:
    done = plan(RECIPE, "--gpu", "h100", "--nodes", "4", "--gpus", "8", "--clips", "9500")
    assert done.returncode == 0, done.stderr
    for words in ("the recipe fits", "an epoch of 9500 clips", "saved activations", "matrix products", "assumed:"):
        assert words in done.stdout
    assert "nothing of this has been measured on a GPU yet" in done.stdout
    assert "sizes of the published Qwen2.5-VL-3B" in done.stdout


def test_numbers_add_up_and_the_best_way_is_one_that_fits() -> None:
    told = answer(RECIPE, "--gpu", "a100", "--gpus", "8", "--clips", "9500")
    for way in (told["recipe"], *told["alternatives"]):
        for parts in (way["memory_bytes"], way["step_seconds"]):
            assert parts["total"] == pytest.approx(sum(value for name, value in parts.items() if name != "total"))
        assert way["fits"] is (way["memory_bytes"]["total"] <= way["machine_memory_bytes"])
        clips = way["per_device_train_batch_size"] * way["gradient_accumulation_steps"] * 8
        assert clips == way["train_batch_size"] == told["recipe"]["train_batch_size"]
        assert way["clips_per_second"] == pytest.approx(clips / way["step_seconds"]["total"])
    best = told["alternatives"][0]
    assert best["fits"]
    fitting = [way["clips_per_second"] for way in (told["recipe"], *told["alternatives"]) if way["fits"]]
    assert best["clips_per_second"] == max(fitting)


def test_what_does_not_fit_is_said_with_the_exit_code_and_zero3_helps() -> None:
    words = (RECIPE, "model_name_or_path=models/Qwen2.5-VL-7B-Instruct", "finetuning_type=full", "--gpu", "a100")
    done = plan(*words)
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout
    told = answer(*words, "--gpus", "8", "--nodes", "2")
    assert {way["deepspeed"] for way in told["alternatives"] if way["fits"]} >= {"ds_configs/zero3.json"}


def test_shards_at_hand_say_sizes_classes_and_clips(small_shards: Path) -> None:
    words = (RECIPE, "model_name_or_path=tiny", f"dataset={small_shards}", "eval_dataset=null", "eval_strategy=no")
    told = answer(*words, "num_action_classes=null", "num_train_epochs=2", "--gpu", "l4")
    assert told["clips"] == 26
    assert told["steps"] == 4  # 2 epochs of 26 clips in steps of 16
    assert any("4 frames of 56x56" in line for line in told["assumptions"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((RECIPE,), "give either --gpu NAME or --machine FILE"),
        ((RECIPE, "--gpu", "h1000"), "error: --gpu: 'h1000' is not legal: b200 | h200 | h100"),
        ((RECIPE, "--gpu", "h100", "lora_rnak=4"), "lora_rnak: unknown option; did you mean 'lora_rank'?"),
        ((RECIPE, "--gpu", "h100", "--nodes", "0"), "--nodes: must be at least 1, got 0"),
        ((RECIPE, "--gpu", "h100", "model_name_or_path=models/none"), "its name is no published size; legal: tiny"),
        ((RECIPE, "--gpu", "h100", "train_batch_size=100", "--gpus", "8"), "train_batch_size: 100 is not"),
        ((RECIPE, "--machine", "none.json"), "--machine: 'none.json' is not a file; --calibrate writes one"),
        ((RECIPE, "--machine", "pyproject.toml"), "--machine: 'pyproject.toml' is no calibration"),
        (("none.yaml", "--gpu", "h100"), "recipe: 'none.yaml' is not a file"),
    ],
)
def test_mistakes_are_answered(words: tuple[str, ...], said: str) -> None:
    done = plan(*words)
    assert done.returncode == 2
    assert said in done.stderr
