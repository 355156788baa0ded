"""The self-check under the launcher: planted faults stop all ranks by name, sound runs of every kind pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import launch
from tests.support.selfchecks import FAULTS, SOUND
from vidcls.training.sharded_state import StoredState

pytestmark = pytest.mark.launch

# By case: the check that must speak, what it must name, and the likely reason.
EXPECTED = {
    "head-left-out": ("what trains", "heads.default.layers.bias, heads.default.layers.weight", "in no group"),
    "lora-frozen": ("what trains", "14 parameters", "do not require a gradient"),
    "labels-rolled": ("labels", "have a wrong label", "labels are shifted by 1 of 3 rows"),
    "classes-shifted": ("labels", "3 of 3 clips", "labels are shifted by 1"),
    "labels-shifted-later": ("the classifier's gradient", "heads.default.layers.bias", "labels are shifted by 1"),
    "divided-twice": ("the classifier's gradient", "0.33", "divided twice by the 3 micro-batches"),
    "loss-halved": ("first loss", "expected 1.386", "the loss is scaled"),
    "token-detached": ("gradients", "action_token.weight", "cut off from the loss"),
    "nan": ("finite gradients", "31 parameters", "not finite"),
    "nan-fp32": ("finite gradients", "31 parameters", "not finite"),
    "head-not-stepped": ("head and token move", "heads.default.layers.bias", "not stepped"),
    "wrong-file": ("save and load", "heads.default.layers.bias", "what was written is not what was trained"),
    "wrong-scale": ("save and load", "lora_alpha is 16", "this model has 8"),
    "frozen-changed": ("frozen weights", "visual.blocks.1.mlp.up_proj.weight", "on rank 1"),
}
# Cases that partitioning may change; ZeRO-2 runs all.
SOUND_3 = ["lora", "lora-unchecked", "resumed", "dora", "full", "attention-zeros", "mlp-zeros-ema", "two-heads"]
# ZeRO-3 keeps the vectors of the tiny model whole and partitions the rest.
PERSISTENT = 200


def run_cases(shards: Path, top: Path, stage: int, names: list[str]) -> tuple[int, list[dict[str, Any]]]:
    zero = json.loads((launch.ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    if stage == 3:
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENT
    (top / f"zero{stage}.json").write_text(json.dumps(zero))
    script = "tests/support/selfchecks.py"
    done = launch.deepspeed(2, script, shards, top, stage, *names, log=top / "log", timeout=280)
    results = [top / f"rank{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in results), done.output[-4000:]
    return done.code, [json.loads(path.read_text()) for path in results]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_planted_fault_stops_every_rank(small_shards: Path, tmp_path: Path, stage: int) -> None:
    code, ranks = run_cases(small_shards, tmp_path, stage, list(FAULTS))
    assert code != 0
    for name, (check, subject, reason) in EXPECTED.items():
        errors = [result[name]["error"] for result in ranks]
        assert errors[0] == errors[1], name
        assert errors[0].startswith(f"SelfCheckError: self-check failed: {check}: "), (name, errors[0])
        assert subject in errors[0], (name, errors[0])
        assert reason in errors[0], (name, errors[0])
    assert EXPECTED.keys() == FAULTS.keys()


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_sound_run_passes_and_is_not_changed(small_shards: Path, tmp_path: Path, stage: int) -> None:
    names = list(SOUND) if stage == 2 else SOUND_3
    code, ranks = run_cases(small_shards, tmp_path, stage, names)
    assert [result[name]["error"] for result in ranks for name in names if result[name]["error"]] == []
    assert code == 0
    for name in names:
        lines = " ".join(sorted(ranks[0][name]["lines"]))
        if name == "lora-unchecked":
            assert lines == ""
        else:
            assert "trained parameters get gradients" in lines, name
            assert "reads back bit by bit" in lines, name
            assert "not judged" not in lines, name
    weights = {
        name: StoredState.open(tmp_path / name / "checkpoint-5") for name in ("lora", "lora-unchecked", "resumed")
    }
    for other in ("lora", "resumed"):
        for name, tensor in weights["lora-unchecked"].items():
            assert tensor.equal(weights[other][name]), (other, name)
