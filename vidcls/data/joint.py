"""Several data sets in one stream: pure integers, the same for every rank count and worker count.

A cycle of the stream holds a fixed number of clips of each data set in a random order. Every data set goes through its
own epochs as it would alone, so that each of its clips is drawn once before any is drawn again, whatever its share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vidcls.data.order import JOINT_ORDER, SELECTION, SampleOrder, ShardWindow, random_words


def source_seed(seed: int, source: int) -> int:
    """The seed of data set number `source`: data sets of equal size must not be shuffled alike."""
    if source == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {source}".encode(), digest_size=7).digest(), "little")


def select(samples: int, seed: int, *, most: int | None, val_size: float) -> tuple[np.ndarray, np.ndarray]:
    """(for training, for validation): sample ids, int64, each rising; at most `most` of all, drawn at random.

    val_size: a share of them below 1, rounded, or a number.

    Raises:
        ValueError: nothing is left to train on.
    """
    drawn = np.argsort(random_words(seed, 0, samples, purpose=SELECTION), kind="stable")[:most]
    held_out = int(val_size) if val_size >= 1 else round(val_size * len(drawn))
    if held_out >= len(drawn):
        raise ValueError(f"val_size: {val_size:g} of {len(drawn)} clips leaves none to train on")
    return np.sort(drawn[held_out:]), np.sort(drawn[:held_out])


def quotas(sizes: Sequence[int], *, weights: Sequence[float] | None, temperature: float) -> tuple[int, ...]:
    """How many clips of each data set a cycle holds; the sum is that of all sizes, and each has at least one.

    Shares are the weights, or size ** (1 / temperature): 1 is one epoch of each, more evens them out. Rounded by
    largest remainders.
    """
    total = sum(sizes)
    raw = np.array(weights or sizes, dtype=np.float64)
    raw /= raw.max()  # first: a large power of a large size is no float
    if not weights:
        raw **= 1.0 / temperature
    exact = raw / raw.sum() * total
    floors = np.maximum(np.floor(exact + 1e-9).astype(np.int64), 1)
    order = np.argsort(-(exact - floors), kind="stable")
    missing = total - int(floors.sum())
    if missing > 0:
        floors[order[:missing]] += 1
    while missing < 0:  # the ones that every small share got come off the largest
        floors[floors.argmax()] -= 1
        missing += 1
    return tuple(floors.tolist())


@dataclass(frozen=True)
class Part:
    """One data set of the stream. ids: the sample ids that take part; order: over their places in `ids`."""

    order: SampleOrder
    ids: np.ndarray
    quota: int

    def __post_init__(self) -> None:
        assert self.order.samples == len(self.ids), (self.order.samples, len(self.ids))

    @classmethod
    def of(cls, ids: np.ndarray, seed: int, quota: int, shard: np.ndarray | None, shards: int | None) -> Part:
        """`shard` holds the shard of every sample of the data set, `shards` how many are shuffled together (None: all,
        without a window)."""
        window = None if shards is None or shard is None else ShardWindow(shard[ids], shards)
        return cls(SampleOrder(len(ids), seed, window), ids, quota)


@dataclass(frozen=True)
class Drawn:
    """What stands at a position of the stream: data set, that data set's epoch, and the sample id in it."""

    source: int
    epoch: int
    sample: int


@dataclass(frozen=True)
class _Cycle:
    """sources: the data set of each position. earlier: how many of that data set came before. places: for each data set
    its positions, rising."""

    sources: np.ndarray
    earlier: np.ndarray
    places: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class JointOrder:
    """The infinite stream of clips of one or more data sets."""

    parts: tuple[Part, ...]
    seed: int
    _cycles: dict[int, _Cycle] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def single(cls, samples: int, seed: int, window: ShardWindow | None = None) -> JointOrder:
        """The stream of one whole data set."""
        return cls((Part(SampleOrder(samples, seed, window), np.arange(samples), samples),), seed)

    def __len__(self) -> int:
        """Clips in a cycle; with one data set, or natural shares, in an epoch."""
        return sum(part.quota for part in self.parts)

    def at(self, position: int) -> Drawn:
        """What is read at a stream position >= 0."""
        source, own = self._own_position(position)
        part = self.parts[source]
        epoch, place = part.order.at(own)
        return Drawn(source, epoch, int(part.ids[place]))

    def shards_ahead(self, position: int) -> tuple[tuple[int, int], ...]:
        """(data set, shard) to have at hand at a stream position; see SampleOrder.shards_ahead."""
        if all(part.order.window is None for part in self.parts):
            return ()
        reached = [position]
        if len(self.parts) > 1:
            cycle, within = divmod(position, len(self))
            places = self._cycle(cycle).places
            counts = [int(np.searchsorted(each, within)) for each in places]
            reached = [cycle * part.quota + count for part, count in zip(self.parts, counts, strict=True)]
        return tuple(
            (source, shard)
            for source, part in enumerate(self.parts)
            for shard in part.order.shards_ahead(reached[source])
        )

    def _own_position(self, position: int) -> tuple[int, int]:
        """The data set of a position, and the position in that data set's own stream."""
        if len(self.parts) == 1:
            return 0, position
        cycle, within = divmod(position, len(self))
        now = self._cycle(cycle)
        source = int(now.sources[within])
        return source, cycle * self.parts[source].quota + int(now.earlier[within])

    def _cycle(self, cycle: int) -> _Cycle:
        if cycle not in self._cycles:
            for old in sorted(self._cycles)[:-1]:  # a batch can straddle two cycles; more are never in use
                del self._cycles[old]
            sources = np.repeat(np.arange(len(self.parts)), [part.quota for part in self.parts])
            words = random_words(self.seed, cycle, len(sources), purpose=JOINT_ORDER)
            sources = sources[np.argsort(words, kind="stable")]
            earlier = np.empty(len(sources), dtype=np.int64)
            places = [np.flatnonzero(sources == source) for source in range(len(self.parts))]
            for each in places:
                earlier[each] = np.arange(len(each))
            self._cycles[cycle] = _Cycle(sources, earlier, places)
        return self._cycles[cycle]
