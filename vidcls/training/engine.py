"""DeepSpeed: the merged configuration, the engine, and one optimizer step."""

from __future__ import annotations

import copy
import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import deepspeed
import torch
from deepspeed.runtime import compiler
from torch import nn

from vidcls import distributed
from vidcls.batch_plan import BatchPlan
from vidcls.config import Config
from vidcls.data.batch import Batch
from vidcls.data.reading import BatchReader
from vidcls.faults import guard
from vidcls.training.objective import Objective, Tally
from vidcls.training.optimizer import build_adam, parameter_groups, set_learning_rate
from vidcls.training.partitioning import keep_shared
from vidcls.training.reduction import reduce_to_owners

Engine: TypeAlias = deepspeed.DeepSpeedEngine


def deepspeed_config(config: Config, plan: BatchPlan) -> dict[str, Any]:
    """The ds_configs file with the numbers that the recipe owns put in."""
    merged = copy.deepcopy(config.zero)
    merged.update(
        train_batch_size=plan.global_,
        train_micro_batch_size_per_gpu=plan.micro,
        gradient_accumulation_steps=plan.accumulation,
        gradient_clipping=config.optim.max_grad_norm,
        bf16={"enabled": config.optim.bf16},
        steps_per_print=2**31 - 1,  # vidcls logs itself
    )
    return merged


def build_engine(config: Config, model: nn.Module, plan: BatchPlan) -> Engine:
    """Wrap the whole classifier in one engine. All ranks must call it.

    Backbone adapters, <ACTION> and heads are one module, so that ZeRO partitions, reduces and clips them together.
    """
    optimizer = build_adam(parameter_groups(model, config.optim), config.optim)
    keep_shared(model)
    _import_muon()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, plan))
    reduce_to_owners(engine)
    return engine


def _import_muon() -> None:
    """DeepSpeed imports this optimizer to see that ours is another; torch would compile its functions meanwhile, and
    load inductor for it: 1.4 s of a start."""
    compile = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile


@dataclass(frozen=True)
class StepResult:
    """Scalars of one optimizer step, left on the device so that reading them (a sync) is the caller's choice."""

    loss: torch.Tensor  # this rank's mean over its clips of the step; one that could not be read counts as 0
    grad_norm: torch.Tensor | float  # global, before clipping
    bad: tuple[tuple[str, str], ...]  # (key, reason) of this rank's clips that could not be read
    keys: tuple[str, ...]  # of this rank's clips
    applied: bool  # False on every rank where loss or gradient was not finite: DeepSpeed has skipped the step
    suspects: tuple[str, ...]  # of a skipped step: keys of this rank's clips whose own loss was not finite


Observer: TypeAlias = Callable[[Batch, torch.Tensor], None]
"""Sees each micro-batch and its logits, detached, before backward."""


def train_step(
    engine: Engine,
    batches: BatchReader,
    objective: Objective,
    tally: Tally,
    *,
    sizes: Sequence[int],
    step: int,
    rate: float,
    seed: int,
    observe: Observer | None = None,
) -> StepResult:
    """One optimizer step at base learning rate `rate`. All ranks must call it.

    sizes: clips of each of this rank's micro-batches; ranks have equally many of both. What is logged is added to
    `tally`.
    """
    set_learning_rate(engine.optimizer, rate)
    total = torch.zeros((), device=engine.device)
    bad: tuple[tuple[str, str], ...] = ()
    seen: list[tuple[tuple[str, ...], torch.Tensor]] = []  # keys and losses of each micro-batch
    count, mean_size = len(sizes), sum(sizes) / len(sizes)
    for micro_step, size in enumerate(sizes):
        # The micro-batches of a step are counted here, because with a budget of tokens they differ from step to step.
        engine.set_gradient_accumulation_boundary(micro_step == count - 1)
        guard.phase("data", step, batches.awaited())
        batch = next(batches).to(engine.device)
        assert len(batch) == size, (len(batch), size)
        clips = ", ".join(batch.keys)
        guard.phase("forward", step, clips)
        # Dropout follows from (seed, step, micro-step, rank) alone: a resumed run needs no generator state.
        distributed.seed_everything(_dropout_seed(seed, step, micro_step, distributed.rank()))
        outputs = engine(**batch.model_inputs())
        logits_BC, answers_B = outputs if isinstance(outputs, tuple) else (outputs, None)
        if observe is not None:
            observe(batch, logits_BC.detach())
        losses_B = objective.losses(logits_BC, batch)
        tally.add(batch, logits_BC, losses_B, answers_B)
        if answers_B is not None:
            losses_B = losses_B + objective.lm_loss_weight * answers_B
        # By all rows, not by their weights: a clip's share of the gradient must not grow when another cannot be read.
        # By the mean number of rows, so that the mean over micro-batches is that over the step's clips.
        loss = (losses_B * batch.weights_B).sum() / mean_size
        guard.phase("backward", step, clips)
        engine.backward(loss / count, scale_wrt_gas=False)  # DeepSpeed averages over ranks
        guard.phase("step", step, clips)
        engine.step()
        total += loss.detach()
        bad += batch.bad
        seen.append((tuple(batch.keys), losses_B.detach()))
    applied = engine.was_step_applied()
    return StepResult(
        loss=total / count,
        grad_norm=engine.get_global_grad_norm(),
        bad=bad,
        keys=tuple(key for keys, _ in seen for key in keys),
        applied=applied,
        suspects=() if applied else _not_finite(seen),
    )


def _not_finite(seen: list[tuple[tuple[str, ...], torch.Tensor]]) -> tuple[str, ...]:
    return tuple(
        key
        for keys, losses_B in seen
        for key, finite in zip(keys, losses_B.isfinite().tolist(), strict=True)
        if not finite
    )


def _dropout_seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")
