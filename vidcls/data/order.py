"""Which sample stands where: pure integers, the same for every rank count and worker count.

The stream of samples is a function of (seed, epoch, position). Epochs are concatenated, so there is no partial batch
and every rank runs the same number of steps. Optimizer step s consumes stream positions [s*G, (s+1)*G), G the global
batch; rank r takes the r-th contiguous G/W of them. Going on after a stop therefore needs one integer, the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# What random words are for; different purposes never share a word.
SAMPLE_ORDER, SHARD_ORDER, TEMPORAL_JITTER, AUGMENT, MIX, DENSE, JOINT_ORDER, SELECTION, CONTROL = range(9)
HEAD_START = 8
"""The next window is announced once 1/8 of the present one is read: by then every rank has left the one before, whose
shards may have to make room in a cache."""


def random_words(seed: int, epoch: int, count: int, *, purpose: int, item: int = 0) -> np.ndarray:
    """uint64 [count], a function of the arguments alone; `item` is, say, the sample that they are for.

    Raw Philox words (Salmon et al. 2011): numpy promises stable raw streams across versions (NEP 19), but not stable
    shuffles or choices, and an order that changes with an upgrade cannot resume.
    """
    return np.random.Philox(key=[seed, epoch], counter=[0, 0, item, purpose]).random_raw(count)


def epoch_permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order of one epoch when everything is shuffled together: int64 [samples]."""
    return np.argsort(random_words(seed, epoch, samples, purpose=SAMPLE_ORDER), kind="stable")


@dataclass(frozen=True, eq=False)
class ShardWindow:
    """Samples are shuffled among those of a few shards, so that few shards are in use at any time.

    shard: int [samples], the shard that holds each sample. shards: how many of them are shuffled together.
    """

    shard: np.ndarray
    shards: int

    def __post_init__(self) -> None:
        assert self.shard.ndim == 1, self.shard.shape
        if self.shards < 1:
            raise ValueError(f"shuffle_shards: {self.shards}, legal: at least 1")


@dataclass(frozen=True)
class _Epoch:
    """samples: the sample ids in order. windows: the shards of each window. ends: where in `samples` each ends."""

    samples: np.ndarray
    windows: list[np.ndarray]
    ends: np.ndarray


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """The infinite stream of sample ids of a run over `samples` clips.

    With a window, an epoch takes the shards in a random order, `window.shards` at a time, and shuffles the samples of
    those among themselves. A window over all shards, or none, shuffles everything together; the order is the same.
    """

    samples: int
    seed: int
    window: ShardWindow | None = None
    _epochs: dict[int, _Epoch] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: {self.samples}; a data set needs at least 1 clip")
        assert self.window is None or len(self.window.shard) == self.samples, "a shard for each sample"

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample id) at a stream position >= 0."""
        epoch, within = divmod(position, self.samples)
        return epoch, int(self._epoch(epoch).samples[within])

    def shards_ahead(self, position: int) -> tuple[int, ...]:
        """The shards to have at hand at a stream position: those of its window, and then those of the next one.

        The next window's are left out in the first eighth of a window. Empty without a window.
        """
        if self.window is None:
            return ()
        epoch, within = divmod(position, self.samples)
        now = self._epoch(epoch)
        number = int(np.searchsorted(now.ends, within, side="right"))
        first = int(now.ends[number - 1]) if number else 0
        ahead = now.windows[number].tolist()
        if (within - first) * HEAD_START >= now.ends[number] - first:
            last = number + 1 == len(now.windows)
            ahead += (self._epoch(epoch + 1).windows[0] if last else now.windows[number + 1]).tolist()
        return tuple(dict.fromkeys(ahead))

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            # A batch can straddle two epochs; more than two are never in use.
            for old in sorted(self._epochs)[:-1]:
                del self._epochs[old]
            self._epochs[epoch] = self._ordered(epoch)
        return self._epochs[epoch]

    def _ordered(self, epoch: int) -> _Epoch:
        samples = epoch_permutation(self.seed, epoch, self.samples)
        if self.window is None:
            return _Epoch(samples, [], np.array([], dtype=np.int64))
        shard, size = self.window.shard, self.window.shards
        used = np.unique(shard)  # of a selection of clips: not every shard has one
        count = len(used)
        shards = used[np.argsort(random_words(self.seed, epoch, count, purpose=SHARD_ORDER), kind="stable")]
        window_of_shard = np.empty(int(used[-1]) + 1, dtype=np.int64)
        window_of_shard[shards] = np.arange(count) // size
        window = window_of_shard[shard]
        windows = [shards[first : first + size] for first in range(0, count, size)]
        ends = np.cumsum(np.bincount(window, minlength=len(windows)))
        return _Epoch(samples[np.argsort(window[samples], kind="stable")], windows, ends)


def shards_that_fit(sizes: Sequence[int], limit: int) -> int:
    """The largest window, in shards, of which any two in a row take at most `limit` bytes; 0 if none does.

    sizes: bytes of all shards. Windows are drawn at random, so the largest shards may meet.
    """
    largest = np.cumsum(sorted(sizes, reverse=True))
    if largest[-1] <= limit:
        return len(sizes)
    return int(np.searchsorted(largest, limit, side="right")) // 2


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

    def micro_batches(self, step: int) -> list[range]:
        """Those of all micro-steps, in order."""
        return [self.positions(step, micro_step) for micro_step in range(self.accumulation)]


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
