"""How a step's clips are divided among ranks and micro-batches, and how many steps a run has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vidcls.options import AUTO, DEFAULT_MEMORY_LIMIT, ConfigError, OptimOptions


@dataclass(frozen=True)
class BatchPlan:
    """DeepSpeed's triple for one world size: global = micro * accumulation * world_size.

    With max_tokens_per_batch `micro` is a rank's clips of a step, and `accumulation` 1: how these are divided differs
    from step to step.
    """

    micro: int
    accumulation: int
    global_: int


def batch_plan(optim: OptimOptions, world_size: int | None) -> BatchPlan | None:
    """The batch triple for world_size ranks; with None only what holds for every world size is checked.

    Where the micro-batch is "auto" it is 1: the least that there can be, until memory has been measured.

    Raises:
        ConfigError: the three keys contradict each other or do not divide; names what would.
    """
    micro, accumulation, global_ = (
        optim.per_device_train_batch_size,
        optim.gradient_accumulation_steps,
        optim.train_batch_size,
    )
    if optim.max_tokens_per_batch is not None:
        if global_ is None or micro is not None or accumulation is not None:
            raise ConfigError(
                f"max_tokens_per_batch: {optim.max_tokens_per_batch} divides the clips of train_batch_size "
                f"({global_}), which must be given, and takes the place of per_device_train_batch_size ({micro}) and "
                f"gradient_accumulation_steps ({accumulation}), which must be left out"
            )
        accumulation = 1
    if micro == AUTO:
        if global_ is None or accumulation is not None:
            raise ConfigError(
                "per_device_train_batch_size: 'auto' needs train_batch_size and no gradient_accumulation_steps, which "
                f"follows; they are {global_} and {accumulation}"
            )
        micro = 1
    elif optim.memory_limit != DEFAULT_MEMORY_LIMIT:
        raise ConfigError(f"memory_limit: {optim.memory_limit} has no effect without per_device_train_batch_size auto")
    assert not isinstance(micro, str)
    if micro is None and (global_ is None or accumulation is None):
        raise ConfigError(
            "per_device_train_batch_size: not given; of per_device_train_batch_size, "
            "gradient_accumulation_steps and train_batch_size give the first, or the last two"
        )
    if world_size is None:
        return None
    if global_ is None:
        assert micro is not None
        accumulation = accumulation or 1
        return BatchPlan(micro, accumulation, micro * accumulation * world_size)
    known = (micro or 1) * (accumulation or 1) * world_size
    if global_ % known or (micro and accumulation and global_ != known):
        fits = [w for w in range(1, global_ + 1) if global_ % (w * (micro or 1) * (accumulation or 1)) == 0]
        raise ConfigError(
            f"train_batch_size: {global_} is not per_device_train_batch_size ({micro}) x "
            f"gradient_accumulation_steps ({accumulation}) x ranks ({world_size}); with a missing one "
            f"filled in, these rank counts fit: {fits[:12]}"
        )
    if micro is None:
        return BatchPlan(global_ // known, accumulation or 1, global_)
    return BatchPlan(micro, accumulation or global_ // known, global_)


def total_steps(optim: OptimOptions, samples: int, global_batch: int) -> int:
    """Optimizer steps of the whole run over `samples` clips."""
    return optim.max_steps or max(1, math.ceil(optim.num_train_epochs * samples / global_batch))
