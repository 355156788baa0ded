"""A checkpoint's tensors and the engine: gathered from all ranks to be written, and set again when a run goes on.

Trainable fp32 master weights, Adam moments and averages go by parameter name, whole. Nothing depends on rank, world
size or ZeRO stage. Whole tensors are handled one at a time: a rank keeps those that it writes, and reads those of which
it needs a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import nn

from vidcls import distributed
from vidcls.manifest import CheckpointError
from vidcls.model.stored import differing_shapes
from vidcls.training.averaging import WeightAverage
from vidcls.training.masters import flat_masters, own_part, set_master, trainable, whole_shape
from vidcls.training.optimizer import replay_steps
from vidcls.training.sharded_state import AVERAGE, MOMENTS, WEIGHT, StoredState, owners


@dataclass
class Gathered:
    """What one rank keeps of a training state to write it."""

    adam_steps: int = 0
    shard: dict[str, torch.Tensor] = field(default_factory=dict)  # fp32, "kind/parameter name"; of owned parameters
    model: dict[str, torch.Tensor] = field(default_factory=dict)  # main rank: all weights, as the saved model has them


def trained_sizes(model: nn.Module) -> dict[str, int]:
    """Numbers in each trained parameter, by name; the whole of it, where it is partitioned."""
    return {name: int(getattr(p, "ds_numel", p.numel())) for name, p in trainable(model)}


def gather_training_state(
    engine: deepspeed.DeepSpeedEngine, average: WeightAverage | None, *, dtype: torch.dtype, shards: int
) -> Gathered:
    """Master weights, Adam moments and averages, on the host, each kept by the rank that owns its parameter (`owners`
    over `shards` ranks); and on the main rank the weights to use, the average where there is one, in `dtype`.

    All ranks must call it. At least one step must have been taken.
    """
    link_states(engine)
    owner = owners(trained_sizes(engine.module), shards)
    kept = Gathered()

    def keep(kind: str, name: str, tensor: torch.Tensor) -> None:
        if owner[name] == distributed.rank():
            kept.shard[f"{kind}/{name}"] = tensor.cpu()
        if kind == (WEIGHT if average is None else AVERAGE) and distributed.is_main():
            kept.model[name] = tensor.to("cpu", dtype)

    for name, parameter in trainable(engine.module):
        keep(WEIGHT, name, safe_get_full_fp32_param(parameter))
        for moment in MOMENTS:
            keep(moment, name, safe_get_full_optimizer_state(parameter, moment))
    if average is not None:
        for name, tensor in average.gather():
            keep(AVERAGE, name, tensor)
    kept.adam_steps = adam_steps(engine)
    return kept


def adam_steps(engine: deepspeed.DeepSpeedEngine) -> int:
    """Steps that were applied, as Adam counts them."""
    steps = {int(engine.optimizer.optimizer.state[flat]["step"]) for flat in flat_masters(engine)}
    assert len(steps) == 1, steps
    return steps.pop()


def check_average(stored: StoredState, *, wanted: bool) -> None:
    """Raise CheckpointError where a checkpoint has averages and they are not wanted, or the reverse."""
    found = len(stored.kind(AVERAGE)) > 0
    if found != wanted:
        raise CheckpointError(
            f"resume_from_checkpoint: the checkpoint was written {'with' if found else 'without'} ema_decay, this run "
            f"is {'with' if wanted else 'without'}; they must be equal for the run to go on"
        )


def check_fits(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, averaged: bool) -> None:
    """Raise CheckpointError unless the stored tensors, by "kind/name", are those of this model."""
    kinds = (WEIGHT, *MOMENTS, *([AVERAGE] if averaged else []))
    expected = {f"{kind}/{name}": whole_shape(p) for name, p in trainable(model) for kind in kinds}
    if differing := differing_shapes(shapes, expected):
        raise CheckpointError(f"the training state: {differing}")


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put stored master weights into a model that has no engine yet, rounded to its dtype as a step would."""
    with torch.no_grad():
        for name, parameter in trainable(model):
            value = weights[name]
            if hasattr(parameter, "ds_tensor"):  # built partitioned
                parameter.ds_tensor.copy_(own_part(parameter, value))
            else:
                parameter.copy_(value)


def load_training_state(
    engine: deepspeed.DeepSpeedEngine,
    stored: StoredState,
    adam_steps: int,
    average: WeightAverage | None,
) -> None:
    """Set master weights, moments, step counts and averages of a fresh engine, whose model got `load_weights` before.

    DeepSpeed's own setters change the masters only; the low-precision copies are right already because they were
    rounded from the same numbers before the engine was made. All ranks must call it.
    """
    inner = engine.optimizer.optimizer
    for flat in flat_masters(engine):
        # FusedAdam counts in an int, torch's fused AdamW in a float tensor.
        is_torch = isinstance(inner, torch.optim.AdamW)
        step: Any = torch.tensor(float(adam_steps), device=flat.device) if is_torch else adam_steps
        inner.state[flat] = {"step": step, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    replay_steps(inner, adam_steps)
    link_states(engine)
    for name, parameter in trainable(engine.module):
        set_master(engine, parameter, stored[f"{WEIGHT}/{name}"])
        for moment in MOMENTS:
            value = stored[f"{moment}/{name}"]
            if hasattr(parameter, "ds_id"):  # ZeRO-3
                safe_set_local_optimizer_state(parameter, own_part(parameter, value), moment)
            else:
                safe_set_full_optimizer_state(parameter, value.to(engine.device), moment)
    if average is not None:
        average.load(stored.kind(AVERAGE))


def link_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """ZeRO-2 links Adam's state to parameters inside group 0's first step, before later groups have any (DeepSpeed
    0.19.8, stage_1_and_2.py), and then believes it done; link again. ZeRO-3 needs none of it."""
    zero = engine.optimizer
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
