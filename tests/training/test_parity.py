"""Launched runs compute what a plain PyTorch loop computes, at every ZeRO stage, rank count and accumulation.

Tolerances are about ten times (bf16: three times) what was measured; the order of additions is all that should differ.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import yaml

from tests.support import launch
from tests.training.plain import PlainResult, train_plainly
from vidcls.config import config_from_values
from vidcls.data.loader import Request
from vidcls.data.reading import read_batches
from vidcls.model.pretrained import read_spec
from vidcls.model.tuning import parameter_part
from vidcls.training.engine import train_step
from vidcls.training.loop import build
from vidcls.training.objective import Objective, Tally
from vidcls.training.setup import setup
from vidcls.training.sharded_state import StoredState, read_state

pytestmark = pytest.mark.launch

STEPS, HALF, GLOBAL_BATCH = 6, 3, 8
RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "train_batch_size": GLOBAL_BATCH,
    "learning_rate": 2e-3,
    "action_token_lr_scale": 5.0,
    "weight_decay": 1.0,  # so much that decaying a bias or <ACTION> too would show
    "max_grad_norm": 0.5,  # the norms are 1 to 7: every step is clipped
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_steps": HALF,
    "plot_loss": False,
    "report_to": "none",
    "seed": 7,
}


@dataclass(frozen=True)
class Case:
    """One way to run RECIPE; `resumes` names the case whose checkpoint of step HALF it starts from."""

    ranks: int
    stage: int
    accumulation: int
    bf16: bool = False
    resumes: str | None = None

    @property
    def forward_size(self) -> int:
        return GLOBAL_BATCH // (self.ranks * self.accumulation)


CASES = {
    "zero2-1rank": Case(ranks=1, stage=2, accumulation=1),
    "zero2-2ranks": Case(ranks=2, stage=2, accumulation=1),
    "zero2-2ranks-accumulation4": Case(ranks=2, stage=2, accumulation=4),
    "zero3-2ranks": Case(ranks=2, stage=3, accumulation=1),
    "zero3-1rank-accumulation4": Case(ranks=1, stage=3, accumulation=4),
    "zero2-2ranks-then-zero3-1rank": Case(ranks=1, stage=3, accumulation=2, resumes="zero2-2ranks"),
    "zero2-2ranks-bf16": Case(ranks=2, stage=2, accumulation=1, bf16=True),
}


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences: of a loss, a gradient norm, and (in L2 norm) a tensor.

    A weight is compared by how far it moved: by its whole size everything would agree.
    """

    loss: float
    grad_norm: float
    weight: float
    moment: float


# Measured: 7e-7, 3e-6, 1e-4, 2.2e-5. FusedAdam takes 1 - 0.999 in float32, torch in float64: 1.3e-5 of every second
# moment. Adam's first steps are as large for a gradient that is next to nothing, whose rounding then shows in a weight.
FP32 = Tolerance(loss=7e-6, grad_norm=3e-5, weight=1e-3, moment=2e-4)
# Measured: 6e-4, 4e-3, 6e-2, 4e-2. One bf16 rounding is up to 4e-3, and roundings that fall otherwise feed back.
BF16 = Tolerance(loss=2e-3, grad_norm=1.2e-2, weight=1.5e-1, moment=1.2e-1)


@pytest.fixture(scope="module")
def folders(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case's output folder; one start per rank count runs them all."""
    top = tmp_path_factory.mktemp("parity")
    for ranks in (2, 1):
        recipes = [write_recipe(top, name, small_shards) for name, case in CASES.items() if case.ranks == ranks]
        done = launch.deepspeed(ranks, "tests/support/trainings.py", *recipes, log=top / f"log{ranks}")
        assert done.code == 0, done.output[-4000:]
    return {name: top / name for name in CASES}


def write_recipe(top: Path, name: str, shards: Path) -> Path:
    case = CASES[name]
    values = {
        **RECIPE,
        "dataset": str(shards),
        "output_dir": str(top / name),
        "deepspeed": f"ds_configs/zero{case.stage}.json",
        "gradient_accumulation_steps": case.accumulation,
        "bf16": case.bf16,
    }
    if case.resumes:
        values["resume_from_checkpoint"] = str(top / case.resumes / f"checkpoint-{HALF}")
    path = top / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path], small_shards: Path) -> dict[bool, PlainResult]:
    """The plain loop in fp32 with whole batches, and (True) in bf16 with the forwards of the bf16 case."""
    recipe = {**RECIPE, "dataset": str(small_shards)}
    bf16 = "zero2-2ranks-bf16"
    exact = train_plainly(recipe, read_spec(last(folders["zero2-1rank"])), forward_size=GLOBAL_BATCH)
    rounded = train_plainly(recipe, read_spec(last(folders[bf16])), forward_size=CASES[bf16].forward_size)
    return {False: exact, True: rounded}


def last(folder: Path) -> Path:
    return folder / f"checkpoint-{STEPS}"


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradient_norms(folders: dict[str, Path], plain: dict[bool, PlainResult], name: str) -> None:
    case, expected = CASES[name], plain[CASES[name].bf16]
    limit = BF16 if case.bf16 else FP32
    rows = [json.loads(line) for line in (folders[name] / "train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(HALF + 1 if case.resumes else 1, STEPS + 1))
    assert min(expected.grad_norms) > 2 * RECIPE["max_grad_norm"]
    for row in rows:
        step = row["step"] - 1
        assert row["loss"] == pytest.approx(expected.losses[step], rel=limit.loss), row
        assert row["grad_norm"] == pytest.approx(expected.grad_norms[step], rel=limit.grad_norm), row


@pytest.mark.parametrize("name", CASES)
def test_weights_and_moments(folders: dict[str, Path], plain: dict[bool, PlainResult], name: str) -> None:
    expected = plain[CASES[name].bf16]
    limit = BF16 if CASES[name].bf16 else FP32
    found = StoredState.open(last(folders[name]))
    assert found.keys() == expected.tensors.keys()
    assert read_state(last(folders[name])).adam_steps == STEPS
    for key, tensor in expected.tensors.items():
        kind, _, parameter = key.partition("/")
        size = tensor - expected.initial[parameter] if kind == "weight" else tensor
        difference = ((found[key] - tensor).norm() / size.norm()).item()
        assert difference < (limit.weight if kind == "weight" else limit.moment), (key, difference)


@pytest.mark.parametrize("name", CASES)
def test_every_part_trains(folders: dict[str, Path], plain: dict[bool, PlainResult], name: str) -> None:
    """Against the initial weights of the same seed: no LoRA matrix, head or token that stayed where it was."""
    initial = plain[CASES[name].bf16].initial
    found = StoredState.open(last(folders[name]))
    assert {parameter_part(parameter) for parameter in initial} == {"language", "head", "action_token"}
    still = [parameter for parameter in initial if torch.equal(found[f"weight/{parameter}"], initial[parameter])]
    assert not still


@pytest.fixture(scope="module")
def own_process() -> Iterator[ProcessPoolExecutor]:
    """One process, because what runs in it joins a process group."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_else_trains(small_shards: Path, tmp_path: Path, own_process: ProcessPoolExecutor, stage: int) -> None:
    values = {
        **RECIPE,
        "dataset": str(small_shards),
        "output_dir": str(tmp_path),
        "deepspeed": f"ds_configs/zero{stage}.json",
        "gradient_accumulation_steps": 1,
    }
    report = own_process.submit(watch_training, values).result(timeout=120)
    assert report.changed_frozen == []
    assert report.still_trained == []
    assert report.group_counts == {name: int(trains) for name, trains in report.trains.items()}
    trained = [name for name, trains in report.trains.items() if trains]
    assert all(parameter_part(name) in ("head", "action_token") or ".lora_" in name for name in trained)


@dataclass(frozen=True)
class Report:
    trains: dict[str, bool]  # by parameter name
    group_counts: dict[str, int]  # in how many of the engine's optimizer groups each parameter is
    changed_frozen: list[str]
    still_trained: list[str]


def watch_training(values: dict[str, Any]) -> Report:
    """Take three steps with a run's engine and compare every parameter, frozen ones too, with before."""
    run = setup(config_from_values(values))
    engine, _ = build(run)
    objective = Objective.of(run.config.optim, run.data.class_counts(), engine.device)
    tally = Tally.zero(1, engine.device)
    before = {name: whole(p) for name, p in engine.module.named_parameters()}
    requests = [Request(tuple(range(step, step + GLOBAL_BATCH))) for step in range(3)]
    batches = read_batches(run.clips, requests, workers=0, pin=False)
    for step in range(3):
        train_step(engine, batches, objective, tally, sizes=[GLOBAL_BATCH], step=step, rate=1e-3, seed=0)
    parameters = dict(engine.module.named_parameters())
    zero = engine.optimizer
    groups = zero.fp16_groups if run.config.zero_stage == 3 else zero.bit16_groups
    members = [id(p) for group in groups for p in flatten(group)]
    same = {name: torch.equal(whole(p), before[name]) for name, p in parameters.items()}
    return Report(
        trains={name: p.requires_grad for name, p in parameters.items()},
        group_counts={name: members.count(id(p)) for name, p in parameters.items()},
        changed_frozen=[name for name, p in parameters.items() if not p.requires_grad and not same[name]],
        still_trained=[name for name, p in parameters.items() if p.requires_grad and same[name]],
    )


def whole(parameter: Any) -> torch.Tensor:
    """The full value, also of a parameter that ZeRO-3 has partitioned."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def flatten(group: Any) -> list[torch.Tensor]:
    return [group] if isinstance(group, torch.Tensor) else [p for part in group for p in flatten(part)]
