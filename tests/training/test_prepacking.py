"""`prepack_weights`: the same numbers with and without, and no more memory than is free."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning.models import built, planned, recipe
from tests.support import launch
from tests.training.test_micro_batch import RECIPE, rows, write
from vidcls import distributed
from vidcls.model.prepacking import can_prepack
from vidcls.options import PREPACKING_SHARE
from vidcls.planning.memory import CHECKPOINT_BYTES, prepackable
from vidcls.training import prepacking
from vidcls.training.prepacking import prepack_weights

RUNS: dict[str, dict[str, Any]] = {
    "with": {},
    "without": {"prepack_weights": False},
    "tower": {"vision_tuning": "lora"},
    "tower_without": {"vision_tuning": "lora", "prepack_weights": False},
    "fp32": {"bf16": False},
    "stage3": {"deepspeed": "ds_configs/zero3.json"},
}
GIGABYTE = 1e9
STATED = {"per_device_train_batch_size": "auto", "train_batch_size": 3, "memory_limit": "2GB"}
pytestmark = pytest.mark.skipif(
    not can_prepack(torch.zeros(1, dtype=torch.bfloat16)),
    reason="this processor or build of torch has no bf16 products",
)


@pytest.fixture(scope="module")
def runs(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two ranks, in one start; and one that goes on from half-way."""
    top = tmp_path_factory.mktemp("prepacking")
    changes = RUNS | {"resumed": {"resume_from_checkpoint": str(top / "without" / "checkpoint-2")}}
    recipes = [
        write(top, small_shards, name, **{"per_device_train_batch_size": 2, **more}) for name, more in changes.items()
    ]
    done = launch.deepspeed(2, "tests/support/trainings.py", *recipes, log=top / "log")
    assert done.code == 0, done.output[-4000:]
    return top


@pytest.mark.launch
@pytest.mark.parametrize("tower", ["", "tower"])
def test_numbers_are_the_same_with_and_without(runs: Path, tower: str) -> None:
    """To the last bit, on LoRA's weights too."""
    one, other = (runs / tower, runs / f"{tower}_without") if tower else (runs / "with", runs / "without")
    assert len(rows(one)) == RECIPE["max_steps"]
    assert rows(one) == rows(other)
    adapters = [(run / "checkpoint-4" / "adapter_model.safetensors").read_bytes() for run in (one, other)]
    assert adapters[0] == adapters[1]


@pytest.mark.launch
def test_a_run_goes_on_with_them_where_it_was_without(runs: Path) -> None:
    assert rows(runs / "resumed") == rows(runs / "with")[2:]


@pytest.mark.launch
def test_who_prepacks_says_so(runs: Path) -> None:
    """Not in float32, and not what ZeRO-3 has partitioned; a tower that trains has a backward too."""
    said = re.findall(r"prepack_weights: ([0-9.]+) GB a rank in [0-9.]+ s\n", (runs / "log").read_text())
    alone, tower, resumed = map(float, said)
    assert 0 < alone == resumed < tower


@pytest.fixture
def prepack(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str | None, int]]:
    """What is said of a built model with so many bytes free (above what a checkpoint will take), and how many layers of
    it there are to prepack."""
    monkeypatch.setattr(distributed, "gather_objects", lambda each: [each])
    monkeypatch.setattr(distributed, "barrier", lambda: None)

    def run(free: float, **options: Any) -> tuple[str | None, int]:
        config = recipe(bf16=True, **options)
        model, _ = built(recipe(bf16=True, **{k: v for k, v in options.items() if k not in STATED}))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        monkeypatch.setattr(prepacking, "host_free", lambda: free + CHECKPOINT_BYTES * trained)
        count = len(prepacking._layers(config, model))
        return prepack_weights(config, model), count

    return run


def test_what_is_free_bounds_it(prepack: Callable[..., tuple[str | None, int]]) -> None:
    line, layers = prepack(GIGABYTE)
    assert line is not None
    assert line.startswith("prepack_weights: ")
    assert "as they were" not in line
    size = sum(linear.weight.nbytes for linear, _ in prepacking._layers(recipe(bf16=True), built(recipe(bf16=True))[0]))
    line, _ = prepack(1.2 * size / PREPACKING_SHARE)  # the originals, and a fifth of them more
    assert line is not None
    left = re.search(r"; (\d+) of (\d+) layers are as they were", line)
    assert left
    assert 0 < int(left[1]) < int(left[2]) == layers


def test_whose_weights_are_prepacked(prepack: Callable[..., tuple[str | None, int]]) -> None:
    _, layers = prepack(GIGABYTE)
    _, without_tower = prepack(GIGABYTE, vision_cache="features")
    assert 0 < without_tower < layers
    assert prepack(GIGABYTE, prepack_weights=False)[0] is None
    assert prepack(GIGABYTE, torch_compile=True)[0] is None
    assert prepack(GIGABYTE, **STATED)[0] is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vision_tuning": "lora"},
        {"merger_tuning": "lora"},
        {"vision_cache": "features"},
        {"use_dora": True, "lora_target": "up_proj"},
        {"use_dora": True, "vision_tuning": "lora"},
    ],
)
def test_the_planner_counts_the_same_bytes(
    prepack: Callable[..., tuple[str | None, int]], options: dict[str, Any]
) -> None:
    config = recipe(bf16=True, **options)
    model, inputs = built(config)
    layers = prepacking._layers(config, model)
    plain = sum(linear.weight.nbytes for linear, _ in layers)
    made = sum(linear.weight.nbytes * (1 + backward) for linear, backward in layers)
    assert prepackable(planned(config, inputs), config) == (plain, made)
