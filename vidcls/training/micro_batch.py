"""`per_device_train_batch_size: auto`: the largest micro-batch whose memory stays below the recipe's `memory_limit`.

Found before the first step: forward and backward of the largest clip of the data sets, once, then twice, then as often
as each larger divisor of the rank's share of the global batch, and each time only if what it will need, drawn on from
what was measured, stays below the limit on every rank. The numbers of the run do not depend on having looked: gradients
are those of torch.autograd.grad, which never come to a parameter or to DeepSpeed's hooks on it, every step seeds the
generators itself, and ZeRO-3 takes the order of its layers down anew in each forward that differs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from vidcls import distributed
from vidcls.batch_plan import BatchPlan
from vidcls.config import Config, ConfigError
from vidcls.data.batch import ClipShape
from vidcls.data.loader import ClipBatches, Request
from vidcls.faults import guard
from vidcls.options import sums_locally
from vidcls.planning.memory import DEFAULT_BUCKET
from vidcls.training.engine import Engine
from vidcls.training.masters import is_stage3, trainable
from vidcls.training.memory import rank_memory
from vidcls.training.objective import Objective
from vidcls.training.setup import Run

MARGIN = 0.1  # more than in proportion, of what further clips may need


@dataclass
class Needs:
    """What one rank needs, in bytes.

    limit: it must stay below. held: before any clip. beside: what a step holds beside forward and backward. peaks: by
    clips, forward and backward measured, inf where memory ran out.
    """

    limit: float
    held: int
    beside: int
    peaks: dict[int, float] = field(default_factory=dict)

    def of(self, clips: int) -> float:
        """As measured, or as expected: each further clip like the dearest so far, and MARGIN."""
        if clips in self.peaks:
            return self.peaks[clips] + self.beside
        if not self.peaks:
            return float(self.held + self.beside)
        known = sorted(self.peaks)
        pairs = itertools.pairwise(known if len(known) > 1 else [0, *known])
        peaks = {0: float(self.held), **self.peaks}
        each = max((peaks[more] - peaks[less]) / (more - less) for less, more in pairs)
        last = known[-1]
        return self.peaks[last] + max(each, 0.0) * (clips - last) * (1 + MARGIN) + self.beside


def next_trial(ranks: Sequence[Needs], share: int) -> int | None:
    """The clips to measure next, None when no more can be or need be; the same on every rank, since `ranks` is."""
    tried = max(ranks[0].peaks, default=0)
    wanted = [clips for clips in divisors(share) if clips > tried]
    if tried == 1 and share > 2:
        wanted = [2, *wanted]  # two give what one more needs
    return wanted[0] if wanted and all(each.of(wanted[0]) < each.limit for each in ranks) else None


def largest(ranks: Sequence[Needs], share: int) -> int:
    """The largest divisor of the share that was measured and fits on every rank; 0 when none does."""
    fits = [n for n in divisors(share) if all(n in each.peaks and each.of(n) < each.limit for each in ranks)]
    return max(fits, default=0)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def choose(run: Run, engine: Engine) -> tuple[BatchPlan, str]:
    """The batch triple with the same global batch, which the engine is told, and a line about it. All ranks must call
    it, before the first step.

    Raises:
        ConfigError: on every rank; not even one clip fits.
    """
    guard.phase("start")
    share = run.plan.global_ // distributed.world_size()
    trial = _Trial(run, engine)
    ranks = distributed.gather_objects(trial.needs)
    while (clips := next_trial(ranks, share)) is not None:
        trial.measure(clips)
        ranks = distributed.gather_objects(trial.needs)
    micro = largest(ranks, share)
    scarce = max(ranks, key=lambda needs: needs.of(max(micro, 1)) / needs.limit)
    if not micro:
        raise ConfigError(
            f"memory_limit: {run.config.optim.memory_limit} leaves {scarce.limit / 1e9:.2f} GB for rank "
            f"{ranks.index(scarce)}, and {scarce.of(1) / 1e9:.2f} GB are needed for "
            f"{'one clip' if scarce.peaks else 'the model, before any clip'}; raise it, or use ZeRO-3, more ranks, "
            "gradient_checkpointing, fewer frames or pixels"
        )
    plan = BatchPlan(micro, share // micro, run.plan.global_)
    tell_engine(engine, plan)
    told = ", ".join(f"{n}: {max(each.of(n) for each in ranks) / 1e9:.3f}" for n in divisors(share))
    line = (
        f"per_device_train_batch_size: auto is {micro} of {share} clips a rank; memory_limit "
        f"{run.config.optim.memory_limit} is {scarce.limit / 1e9:.3f} GB; GB by clips, measured to "
        f"{max(scarce.peaks)}: {told}"
    )
    return plan, line


def tell_engine(engine: Engine, plan: BatchPlan) -> None:
    """DeepSpeed's own setters, and the optimizer's copy, which they leave."""
    engine.set_train_micro_batch_size(plan.micro)
    engine.set_train_batch_size(plan.global_)
    engine.optimizer.gradient_accumulation_steps = plan.accumulation
    assert engine.gradient_accumulation_steps() == plan.accumulation


class _Trial:
    """This rank's measurements."""

    def __init__(self, run: Run, engine: Engine) -> None:
        self._clips, self._engine = run.clips, engine
        self._largest = largest_clip(run.clips)
        self._objective = Objective.of(run.config.optim, run.data.class_counts(), engine.device)
        self._trained = [parameter for _, parameter in trainable(engine.module)]
        self._memory = rank_memory()
        wanted = run.config.optim.memory_limit
        limit = float(wanted[:-2]) * 1e9 if isinstance(wanted, str) else wanted * self._memory.total
        numbers = sum(int(getattr(p, "ds_numel", p.numel())) for p in self._trained)
        self.needs = Needs(limit, self._memory.start(), step_bytes(run.config, numbers))

    def measure(self, clips: int) -> None:
        """Forward and backward of so many clips. All ranks must call it with the same number."""
        source, sample = self._largest
        with distributed.all_or_none("reading the largest clip"):
            batch = self._clips.read(Request((sample,) * clips, (source,) * clips))
            batch = replace(batch, prefix=0).to(self._engine.device)  # other clips may share less than one with itself
        self._memory.start()
        try:
            outputs = self._engine.module(**batch.model_inputs())
            logits_BC, answers_B = outputs if isinstance(outputs, tuple) else (outputs, None)
            loss = self._objective.losses(logits_BC, batch).sum()
            if answers_B is not None:
                loss = loss + answers_B.sum()
            torch.autograd.grad(loss, self._trained, allow_unused=True)
        except torch.OutOfMemoryError:
            if is_stage3(self._engine):
                raise  # in the middle of a layer, for which the other ranks wait
            self.needs.peaks[clips] = math.inf
            return
        self.needs.peaks[clips] = self._memory.peak()


def step_bytes(config: Config, trained: int) -> int:
    """What a step holds beside activations and the parameters' own gradients: two fp32 buckets of gradients, one filled
    while the other is reduced (with a LocalSum, one of all that this rank has and one of what others send), and this
    rank's part of all gradients, accumulated and as the optimizer takes it."""
    bucket = int(config.zero["zero_optimization"].get("reduce_bucket_size", DEFAULT_BUCKET))
    if sums_locally(trained, config.zero_stage, config.zero["zero_optimization"]):
        bucket = trained
    return 4 * (2 * min(bucket, trained) + 2 * math.ceil(trained / distributed.world_size()))


def largest_clip(clips: ClipBatches) -> tuple[int, int]:
    """(data set, sample) of a clip with the most patches, and among those with the longest prompt."""
    found: list[tuple[int, int, int, int]] = []
    for number, source in enumerate(clips.sources):
        index = source.index
        used = np.minimum(index.frames, clips.frames.most)
        facts = np.stack([used, index.height, index.width, index.prompt], axis=1)
        rows, samples = np.unique(facts, axis=0, return_index=True)
        for (frames, height, width, _), sample in zip(rows.tolist(), samples.tolist(), strict=True):
            patches = math.prod(ClipShape.of(clips.encoder, frames, height, width).grid)
            found.append((patches, len(index.prompt_of(sample) or source.prompt), number, sample))
    _, _, number, sample = max(found)
    return number, sample
