"""Which sample stands where: pure integers, the same for every rank count and worker count.

The stream of samples is a function of (seed, epoch, position). Epochs are concatenated, so there is no partial batch
and every rank runs the same number of steps. Optimizer step s consumes stream positions [s*G, (s+1)*G), G the global
batch; rank r takes the r-th contiguous G/W of them. Going on after a stop therefore needs one integer, the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # a batch can straddle two epochs
def epoch_permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order of one epoch: int64 [samples].

    Sorts raw Philox words (Salmon et al. 2011) instead of calling Generator.permutation: numpy promises stable raw
    streams across versions (NEP 19), not stable shuffles, and an order that changes with an upgrade cannot resume.
    """
    words = np.random.Philox(key=[seed, epoch]).random_raw(samples)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class SampleOrder:
    """The infinite stream of sample ids of a run over `samples` clips."""

    samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: {self.samples}; a data set needs at least 1 clip")

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample id) at a stream position >= 0."""
        epoch, within = divmod(position, self.samples)
        return epoch, int(epoch_permutation(self.seed, epoch, self.samples)[within])


@dataclass(frozen=True)
class StepLayout:
    """How one global batch is laid over ranks and micro-steps.

    Raises ValueError when micro * accumulation * world_size is not the global batch or the rank is outside.
    """

    global_batch: int
    micro: int
    world_size: int
    rank: int
    accumulation: int = field(init=False)

    def __post_init__(self) -> None:
        accumulation, rest = divmod(self.global_batch, self.micro * self.world_size)
        if rest or accumulation < 1:
            raise ValueError(
                f"global_batch: {self.global_batch} is not a multiple of micro ({self.micro}) x "
                f"world_size ({self.world_size})"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: {self.rank}, legal: 0 to {self.world_size - 1}")
        object.__setattr__(self, "accumulation", accumulation)

    def positions(self, step: int, micro_step: int) -> range:
        """Stream positions this rank reads in one micro-step of optimizer step `step`."""
        first = step * self.global_batch + (self.rank * self.accumulation + micro_step) * self.micro
        return range(first, first + self.micro)


def evaluation_chunks(samples: int, micro: int, world_size: int, rank: int) -> list[range | None]:
    """The batches rank evaluates: every sample exactly once over all ranks, the same number of batches on each.

    Batch k holds samples [k*micro, (k+1)*micro) whatever the rank count, so that what a clip shares its forward with,
    and therefore its rounding, does not depend on it. None is a padding batch: under ZeRO-3 every rank must run every
    forward, since each gathers the others' weights.
    """
    batches = [range(first, min(first + micro, samples)) for first in range(0, samples, micro)]
    rounds = -(-len(batches) // world_size)
    mine: list[range | None] = list(batches[rank::world_size])
    return mine + [None] * (rounds - len(mine))
