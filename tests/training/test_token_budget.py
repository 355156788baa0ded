"""Launched runs with max_tokens_per_batch take the steps that a plain loop over whole global batches takes.

Clips have 21, 37 or 69 tokens; how many micro-batches a step has, and how many clips each, differs from step to step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support import launch
from tests.training.plain import PlainResult, train_plainly
from tests.training.test_parity import FP32
from tools.checkpoint import show
from vidcls import distributed
from vidcls.config import config_from_values
from vidcls.data.loader import training_requests
from vidcls.model.pretrained import read_spec
from vidcls.training.setup import setup
from vidcls.training.sharded_state import StoredState

pytestmark = pytest.mark.launch

STEPS, HALF, GLOBAL_BATCH, LIMIT = 4, 2, 8, 100
RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "template": "empty",
    "prompt": "<video><ACTION>",
    "lora_rank": 4,
    "lora_dropout": 0.0,
    "train_batch_size": GLOBAL_BATCH,
    "max_tokens_per_batch": LIMIT,
    "learning_rate": 2e-3,
    "action_token_lr_scale": 5.0,
    "weight_decay": 1.0,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_steps": HALF,
    "bf16": False,
    "plot_loss": False,
    "html_report": False,
    "report_to": "none",
    "log_order": True,
    "seed": 7,
}
BY_NUMBER = {"max_tokens_per_batch": None, "gradient_accumulation_steps": 2}
RANDOM = {"bf16": True, "lora_dropout": 0.1, "horizontal_flip": 0.5}


@dataclass(frozen=True)
class Case:
    """One way to run RECIPE; `resumes` names the case whose checkpoint of step HALF it starts from."""

    ranks: int
    stage: int
    changes: dict[str, Any]
    resumes: str | None = None


EXACT = {
    "by-number": Case(2, 2, BY_NUMBER),
    "zero2-2ranks": Case(2, 2, {}),
    "zero3-2ranks": Case(2, 3, {}),
    "zero2-1rank": Case(1, 2, {}),
    "zero3-1rank": Case(1, 3, {}),
    "zero2-2ranks-then-zero3-1rank": Case(1, 3, {}, resumes="zero2-2ranks"),
}
CASES = EXACT | {
    "random2": Case(2, 2, RANDOM),
    "random3": Case(2, 3, RANDOM),
    "random2-again": Case(2, 2, RANDOM, resumes="random2"),
    "random3-again": Case(2, 3, RANDOM, resumes="random3"),
}


@pytest.fixture(scope="module")
def folders(two_sizes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case's output folder; one start per rank count runs them all."""
    top = tmp_path_factory.mktemp("budget")
    # Nothing of a model this small would be partitioned at the shipped threshold.
    zero = json.loads((launch.ROOT / "ds_configs" / "zero3.json").read_text())
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (top / "zero3.json").write_text(json.dumps(zero))
    for ranks in (2, 1):
        recipes = [write_recipe(top, name, two_sizes) for name, case in CASES.items() if case.ranks == ranks]
        done = launch.deepspeed(ranks, "tests/support/trainings.py", *recipes, log=top / f"log{ranks}")
        assert done.code == 0, done.output[-4000:]
    return {name: top / name for name in CASES}


def write_recipe(top: Path, name: str, shards: Path) -> Path:
    case = CASES[name]
    stages = {2: "ds_configs/zero2.json", 3: str(top / "zero3.json")}
    values = {"dataset": str(shards), "output_dir": str(top / name), "deepspeed": stages[case.stage]}
    if case.resumes:
        values["resume_from_checkpoint"] = str(top / case.resumes / f"checkpoint-{HALF}")
    path = top / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **values, **case.changes}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path], two_sizes: Path) -> PlainResult:
    recipe = {**RECIPE, "dataset": str(two_sizes)}
    return train_plainly(recipe, read_spec(last(folders["by-number"])), forward_size=GLOBAL_BATCH)


def last(folder: Path) -> Path:
    return folder / f"checkpoint-{STEPS}"


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("name", EXACT)
def test_losses_and_gradient_norms(folders: dict[str, Path], plain: PlainResult, name: str) -> None:
    found = rows(folders[name], "train_log.jsonl")
    assert [row["step"] for row in found] == list(range(HALF + 1 if EXACT[name].resumes else 1, STEPS + 1))
    assert min(plain.grad_norms) > 2 * RECIPE["max_grad_norm"]
    for row in found:
        assert row["loss"] == pytest.approx(plain.losses[row["step"] - 1], rel=FP32.loss), row
        assert row["grad_norm"] == pytest.approx(plain.grad_norms[row["step"] - 1], rel=FP32.grad_norm), row


@pytest.mark.parametrize("name", EXACT)
def test_weights_and_moments(folders: dict[str, Path], plain: PlainResult, name: str) -> None:
    found = StoredState.open(last(folders[name]))
    assert found.keys() == plain.tensors.keys()
    for key, tensor in plain.tensors.items():
        kind, _, parameter = key.partition("/")
        size = tensor - plain.initial[parameter] if kind == "weight" else tensor
        difference = ((found[key] - tensor).norm() / size.norm()).item()
        assert difference < (FP32.weight if kind == "weight" else FP32.moment), (key, difference)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_is_bit_equal(folders: dict[str, Path], stage: int) -> None:
    straight, again = folders[f"random{stage}"], folders[f"random{stage}-again"]
    expected, found = StoredState.open(last(straight)), StoredState.open(last(again))
    keys = expected.keys()
    assert keys == found.keys()
    assert [key for key in keys if not torch.equal(expected[key], found[key])] == []
    clocks = {"samples_per_second", "data_wait_fraction", "save_stall_seconds"}
    logs = [
        [{key: row[key] for key in row.keys() - clocks} for row in rows(folder, "train_log.jsonl")]
        for folder in (straight, again)
    ]
    assert logs[1] == logs[0][HALF:]


def test_every_rank_count_trains_on_the_same_clips(folders: dict[str, Path]) -> None:
    def order(name: str) -> list[list[str]]:
        """The keys of each step, of all ranks one behind the other."""
        ranks = [rows(path.parent, path.name) for path in sorted((folders[name] / "order").iterdir())]
        return [[key for row in step for key in row["keys"]] for step in zip(*ranks, strict=True)]

    expected = order("by-number")
    assert [len(set(keys)) for keys in expected] == [GLOBAL_BATCH] * STEPS
    assert order("zero2-2ranks") == order("zero3-1rank") == expected
    assert order("zero2-2ranks-then-zero3-1rank") == expected[HALF:]


def test_the_layout_is_told(folders: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    layout = "8 clips = 4 (at most 100 tokens a forward) x 2 ranks"
    assert f"training  {STEPS} steps of {layout}, ZeRO-3, cpu" in (folders["zero3-2ranks"].parent / "log2").read_text()
    show(last(folders["zero3-2ranks"]))
    assert f"layout    2 ranks, ZeRO-3, {layout}" in capsys.readouterr().out


def test_steps_are_cut_differently(two_sizes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runs above went through: of each rank, clips of the micro-batches of each step."""
    monkeypatch.setattr(distributed, "start", lambda *limits: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    values = {**RECIPE, "dataset": str(two_sizes), "output_dir": str(tmp_path / "out"), "dataloader_num_workers": 0}
    run = setup(config_from_values({**values, "deepspeed": str(launch.ROOT / "ds_configs" / "zero2.json")}))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    sizes = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sizes.append([[len(part) for part in run.layout().micro_batches(step)] for step in range(STEPS)])
        for request in training_requests(run.data.order, run.layout(), 0, STEPS):
            assert sum(run.clips[request].lengths) <= LIMIT
    counts = [[len(step) for step in own] for own in sizes]
    assert counts[0] == counts[1]
    assert len(set(counts[0])) > 1
    assert any(len(set(step)) > 1 for own in sizes for step in own)
