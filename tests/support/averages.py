"""Train a small model with and without looking at its averaged weights, and write down everything that they were.

deepspeed --num_gpus N tests/support/averages.py FOLDER

FOLDER gets CASE.RANK.safetensors for each of CASES. Sizes are odd, so that no partition divides evenly; the matrices
are above ZeRO-3's threshold in "zero3-some-whole", the vectors below it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import nn

from vidcls import distributed
from vidcls.command import command_arguments
from vidcls.options import OptimOptions
from vidcls.training.averaging import WeightAverage
from vidcls.training.optimizer import build_adam

STEPS, LOOK, DECAY = 6, 3, 0.4  # the warm-up of the decay (0.1, 0.18, 0.25, 0.31, 0.36, 0.4) ends inside
ZERO2: dict[str, Any] = {"stage": 2}
ZERO3: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "zero2": (True, ZERO2),
    "zero3": (True, ZERO3),
    "zero3-some-whole": (True, {**ZERO3, "stage3_param_persistence_threshold": 100}),
    "zero3-fp32": (False, ZERO3),
}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 33), nn.GELU(), nn.Linear(33, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    model[2].requires_grad_(False)
    return model


def inputs(rank: int = 0, step: int = 0) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * rank + step))


def build(bf16: bool, zero: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    model = small_model().to(torch.bfloat16 if bf16 else torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Two groups, because ZeRO keeps the masters of each in a tensor of its own.
    groups = [{"params": trained[:1], "lr": 0.02}, {"params": trained[1:], "lr": 0.02}]
    optimizer = build_adam(groups, OptimOptions(per_device_train_batch_size=4))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "steps_per_print": 2**31 - 1,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def step(engine: deepspeed.DeepSpeedEngine, number: int) -> None:
    x = inputs(distributed.rank(), number).to(engine.device)
    loss = engine(x.to(next(engine.module.parameters()).dtype)).float().square().sum()
    engine.backward(loss)
    engine.step()


def masters(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return {n: safe_get_full_fp32_param(p).cpu() for n, p in engine.module.named_parameters() if p.requires_grad}


def weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """What the model computes with: whole, and this rank's partition of it."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        partition: Any = parameter
        if hasattr(parameter, "ds_id"):
            found[f"{name}.part"] = partition.ds_tensor.detach().clone()
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


@torch.no_grad()  # inference_mode would leave ZeRO-3 weights behind that training cannot use
def logits(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    return engine(inputs().to(next(engine.module.parameters()).dtype)).float()


def train_and_look(bf16: bool, zero: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine, seen = build(bf16, zero), {}

    def note(prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        seen.update({f"{prefix}/{name}": tensor.contiguous() for name, tensor in tensors.items()})

    average = WeightAverage(engine, DECAY)
    note("masters0", masters(engine))
    for number in range(STEPS):
        step(engine, number)
        average.update(number)
        note(f"masters{number + 1}", masters(engine))
        note(f"average{number + 1}", dict(average.gather()))
        if number + 1 == LOOK:
            note("before", {**weights(engine), "logits": logits(engine)})
            with average.applied():
                note("applied", {**weights(engine), "logits": logits(engine)})
            note("after", {**weights(engine), "logits": logits(engine)})
    resumed = WeightAverage(engine, DECAY)
    note("fresh", dict(resumed.gather()))
    resumed.load({name.partition("/")[2]: t for name, t in seen.items() if name.startswith(f"average{LOOK}/")})
    note("loaded", dict(resumed.gather()))
    note("masters-after-load", masters(engine))
    # The same run without an average: looking must not have changed where it went.
    alone = build(bf16, zero)
    for number in range(STEPS):
        step(alone, number)
    note("alone", masters(alone))
    return seen


if __name__ == "__main__":
    (folder,) = command_arguments()
    distributed.start(60)
    try:
        for name, (bf16, zero) in CASES.items():
            seen = train_and_look(bf16, zero)
            save_file(seen, Path(folder) / f"{name}.{distributed.rank()}.safetensors")
    finally:
        distributed.stop()
    sys.exit(0)
