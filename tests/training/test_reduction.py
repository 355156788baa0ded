"""Gradients under ZeRO-2 are right where they are needed, and are sent no further."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import launch
from tests.support.reductions import MICRO_BATCHES, SIZES, UNUSED, WAYS
from vidcls.training.sharded_state import WEIGHT, StoredState

pytestmark = pytest.mark.launch
STEPS, SETTLED = 8, 5  # the self-check gathers what it compares in the first ones


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_owners_get_the_mean_gradient(tmp_path: Path, ranks: int) -> None:
    """Parts of uneven size, some of nobody's and one without a gradient; whole or in several buckets."""
    done = launch.deepspeed(ranks, "tests/support/reductions.py", log=tmp_path / "log")
    assert done.code == 0, done.output[-3000:]
    (line,) = [line for line in done.output.splitlines() if line.startswith("found ")]
    found = json.loads(line.removeprefix("found "))
    assert list(found) == list(WAYS)
    whole, padding = sum(SIZES) + UNUSED, 16 * ranks
    # What is handed over, and how much padding may be in it; of it that of another rank leaves this one.
    payloads = {
        "exchange": ("all_to_all_single", whole, padding),
        "exchange in bf16": ("all_to_all_single", whole, padding),
        "reduce_scatter": ("reduce_scatter_tensor", whole, padding),
        "all_reduce": ("all_reduce", whole, padding + 10),  # norms and flags
        "buckets": ("all_to_all_single", MICRO_BATCHES * sum(SIZES), 0),
    }
    for way, of_ranks in found.items():
        assert len(of_ranks) == ranks
        for of_rank in of_ranks:
            assert of_rank["off"] < 1e-6, way
            assert of_rank["norm"] == pytest.approx(of_rank["right_norm"], rel=1e-6), way
            assert not of_rank["applied"], way
            assert of_rank["off_when_skipped"] == of_rank["off"], way
            assert of_rank["off_afterwards"] < 2e-6, way
            sent = of_rank["sent"]
            assert sent.get("reduce", 0) == 0
            if ranks > 1:
                collective, least, more = payloads[way]
                assert least <= sent[collective] <= least + more, way
                assert sum(sent.values()) <= least + more + 10, way


def test_a_training_step_sends_each_gradient_and_each_weight_once(small_shards: Path, tmp_path: Path) -> None:
    """What benchmarks/scaling.py measures at length: within 5 % of (R - 1) / R x numbers x (4 + 2) bytes, whatever the
    number of micro-batches."""
    out = tmp_path / "run"
    options = {
        "dataset": small_shards,
        "output_dir": out,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "lora_rank": 256,
        "plot_loss": "false",
        "report_to": "none",
        "save_steps": STEPS,
    }
    words = [f"{key}={value}" for key, value in options.items()]
    log = tmp_path / "log"
    done = launch.deepspeed(2, "benchmarks/counted_train.py", "launch/recipes/quickstart.yaml", *words, log=log)
    assert done.code == 0, done.output[-3000:]
    trained = StoredState.open(out / f"checkpoint-{STEPS}").kind(WEIGHT)
    minimum = sum(int(tensor.numel()) for tensor in trained.values()) * 6 / 2
    for rank in range(2):
        for step in json.loads((out / f"traffic-{rank}.json").read_text())[SETTLED:]:
            assert sum(step["sent"].values()) == pytest.approx(minimum, rel=0.05), step
