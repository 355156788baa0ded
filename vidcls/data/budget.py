"""A step's clips in micro-batches by their tokens instead of their number: pure integers, no torch.

Nothing about the stream changes (order.py): a rank still takes the r-th contiguous G/W positions of a step, and their
order stays. Only where its micro-batches end depends on how long the clips are.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vidcls.data.joint import JointOrder

STEPS_KEPT = 64  # the loader asks for a step some steps before it is taken


def parts_needed(tokens: Sequence[int], limit: int) -> int:
    """Into how few contiguous parts of at most `limit` tokens the clips go; none has more than `limit` alone."""
    sums = _sums(tokens)
    parts, end = 0, 0
    while end < len(tokens):
        end = _reach(sums, end, limit)
        parts += 1
    return parts


def divide(tokens: Sequence[int], parts: int) -> list[int]:
    """Where each of `parts` contiguous parts ends, none of them empty; the last one at len(tokens).

    The largest part is as small as it can be; among such divisions each part in turn comes as close to an even share of
    what is left as the others' limit lets it.
    """
    assert 1 <= parts <= len(tokens), (parts, len(tokens))
    sums, count = _sums(tokens), len(tokens)
    limit = _smallest_limit(tokens, parts)
    # earliest[k]: the first clip from which k parts reach the end.
    earliest = [count]
    for _ in range(1, parts):
        earliest.append(bisect_left(sums, sums[earliest[-1]] - limit))
    ends, start = [], 0
    for behind in reversed(range(parts)):
        first = max(start + 1, earliest[behind])
        last = min(_reach(sums, start, limit), count - behind)
        even = sums[start] + (sums[count] - sums[start]) / (behind + 1)
        start = min(range(first, last + 1), key=lambda end: abs(sums[end] - even))
        ends.append(start)
    return ends


@dataclass(frozen=True, eq=False)
class BudgetLayout:
    """How one global batch is laid over ranks and micro-batches of at most `limit` tokens.

    Every rank takes as many micro-batches in a step as the rank that needs most: under ZeRO-3 a forward is one of all
    ranks. tokens: for each data set those of each of its samples, int64; none has more than `limit`.
    """

    order: JointOrder
    tokens: Sequence[np.ndarray]
    limit: int
    global_batch: int
    world_size: int
    rank: int

    def __post_init__(self) -> None:
        assert self.global_batch % self.world_size == 0, (self.global_batch, self.world_size)
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)

    @functools.lru_cache(maxsize=STEPS_KEPT)  # noqa: B019 - one layout lives as long as the run
    def micro_batches(self, step: int) -> list[range]:
        """Stream positions of each of this rank's micro-batches of optimizer step `step`."""
        share = self.global_batch // self.world_size
        first = step * self.global_batch
        drawn = map(self.order.at, range(first, first + self.global_batch))
        tokens = [int(self.tokens[each.source][each.sample]) for each in drawn]
        shares = [tokens[start : start + share] for start in range(0, self.global_batch, share)]
        parts = max(parts_needed(each, self.limit) for each in shares)
        ends = divide(shares[self.rank], parts)
        first += self.rank * share
        return [range(first + start, first + end) for start, end in itertools.pairwise([0, *ends])]


def _sums(tokens: Sequence[int]) -> list[int]:
    """Of the clips before each, and of all."""
    return list(itertools.accumulate(tokens, initial=0))


def _reach(sums: Sequence[int], start: int, limit: int) -> int:
    """Where a part that begins at clip `start` ends at the latest."""
    end = bisect_right(sums, sums[start] + limit) - 1
    assert end > start, f"clip {start} has more than {limit} tokens"
    return end


def _smallest_limit(tokens: Sequence[int], parts: int) -> int:
    """The fewest tokens that the largest of `parts` contiguous parts can have."""
    low, high = max(max(tokens), -(-sum(tokens) // parts)), sum(tokens)
    while low < high:
        middle = (low + high) // 2
        if parts_needed(tokens, middle) <= parts:
            high = middle
        else:
            low = middle + 1
    return low
