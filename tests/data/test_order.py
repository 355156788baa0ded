"""The stream of samples: the same for every rank count, each sample once an epoch, the same tail after a resume."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidcls.data.order import (
    SampleOrder,
    ShardWindow,
    StepLayout,
    epoch_permutation,
    evaluation_chunks,
    shards_that_fit,
)

PINNED = [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]


def stream(order: SampleOrder, first: int, last: int) -> list[int]:
    return [order.at(position)[1] for position in range(first, last)]


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    """Up to 8 shards of 1 to 9 samples each, whose samples may lie mixed, with and without a window."""
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    shard = draw(st.permutations([number for number, count in enumerate(counts) for _ in range(count)]))
    shards = draw(st.none() | st.integers(1, len(counts) + 1))
    window = None if shards is None else ShardWindow(np.array(shard, dtype=np.int32), shards)
    return SampleOrder(len(shard), draw(st.integers(0, 2**63)), window)


def windows_of(order: SampleOrder, epoch: int) -> list[tuple[int, set[int]]]:
    """(first position, shards) of each window of an epoch, found by looking at the stream alone."""
    assert order.window is not None
    first = epoch * order.samples
    found: list[tuple[int, set[int]]] = []
    for position, sample in enumerate(stream(order, first, first + order.samples), first):
        shard = int(order.window.shard[sample])
        if not found or (shard not in found[-1][1] and len(found[-1][1]) == order.window.shards):
            found.append((position, set()))
        found[-1][1].add(shard)
    return found


@pytest.mark.parametrize("samples", [1, 7, 108, 1000])
def test_every_sample_once_an_epoch_and_another_order_in_each(samples: int) -> None:
    order = SampleOrder(samples, seed=3)
    epochs = [stream(order, e * samples, (e + 1) * samples) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(samples))
    if samples > 6:
        assert epochs[0] != epochs[1] != epochs[2]
    assert [order.at(e * samples)[0] for e in range(3)] == [0, 1, 2]


def test_the_order_is_pinned_for_ever() -> None:
    # A release that changes these numbers cannot resume the runs of an older one.
    assert epoch_permutation(42, 0, 10).tolist() == PINNED
    assert epoch_permutation(43, 0, 10).tolist() != PINNED


def test_positions_are_uniform() -> None:
    # Sample 0's place over many epochs: chi-squared against uniform, 9 degrees of freedom, p = 0.001 at 27.9.
    places = [int(np.flatnonzero(epoch_permutation(7, epoch, 10) == 0)[0]) for epoch in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


@given(order=orders(), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_sample_once_and_finishes_a_window_before_the_next(order: SampleOrder, epoch: int) -> None:
    first = epoch * order.samples
    assert sorted(stream(order, first, first + order.samples)) == list(range(order.samples))
    if order.window is not None:
        windows = windows_of(order, epoch)
        # Each shard is in exactly one window, and only the last window may have fewer of them.
        assert sorted(shard for _, shards in windows for shard in shards) == np.unique(order.window.shard).tolist()
        assert {len(shards) for _, shards in windows[:-1]} <= {order.window.shards}


@given(order=orders(), epoch=st.integers(0, 3))
def test_a_window_over_all_shards_is_the_order_without_one(order: SampleOrder, epoch: int) -> None:
    plain = SampleOrder(order.samples, order.seed)
    first = epoch * order.samples
    same = stream(order, first, first + order.samples) == stream(plain, first, first + order.samples)
    all_shards = order.window is None or order.window.shards > int(order.window.shard.max())
    assert same or not all_shards


def test_samples_of_a_window_and_shards_of_an_epoch_are_shuffled() -> None:
    shard = np.repeat(np.arange(20, dtype=np.int32), 50)
    order = SampleOrder(1000, 3, ShardWindow(shard, 4))
    first = windows_of(order, 0)
    assert [shards for _, shards in first] != [shards for _, shards in windows_of(order, 1)]
    taken = shard[stream(order, 0, 200)]
    # Of 199 neighbours drawn from 4 shards alike, a quarter is of one shard: 50, standard deviation 6.
    assert 25 < sum(a == b for a, b in pairwise(taken.tolist())) < 75


@given(order=orders())
def test_the_shard_of_a_sample_was_announced_before(order: SampleOrder) -> None:
    if order.window is None:
        assert order.shards_ahead(0) == ()
        return
    windows = [window for epoch in range(3) for window in windows_of(order, epoch)]
    for (first, shards), (end, following) in pairwise(windows):
        announced = [order.shards_ahead(position) for position in range(first, end)]
        assert set(announced[0]) == shards, "the next window's may displace those of the last one"
        assert all(set(ahead[: len(shards)]) == shards and len(ahead) == len({*ahead}) for ahead in announced)
        if len(announced) > 1:
            assert set(announced[-1]) == shards | following


@given(
    order=orders(),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 8),
    other_world=st.integers(1, 8),
    stop=st.integers(0, 4),
)
@settings(max_examples=200)
def test_ranks_read_one_stream_and_a_resume_on_others_reads_its_tail(
    order: SampleOrder, micro: int, accumulation: int, world: int, other_world: int, stop: int
) -> None:
    size = micro * accumulation * world * other_world
    steps = 5

    def read(order: SampleOrder, world: int, first: int, last: int) -> list[int]:
        layouts = [StepLayout(size, micro, world, rank) for rank in range(world)]
        return [
            order.at(position)[1]
            for step in range(first, last)
            for layout in layouts
            for micro_step in range(layout.accumulation)
            for position in layout.positions(step, micro_step)
        ]

    straight = stream(order, 0, steps * size)
    assert read(order, world, 0, steps) == straight
    resumed = SampleOrder(order.samples, order.seed, order.window)  # knows nothing of the epochs before
    assert read(resumed, other_world, stop, steps) == straight[stop * size :]


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=9), limit=st.integers(1, 200))
def test_the_window_that_fits_a_cache_is_the_largest(sizes: list[int], limit: int) -> None:
    def worst(window: int) -> int:
        return sum(sorted(sizes, reverse=True)[: 2 * window])

    fits = [window for window in range(1, len(sizes) + 1) if worst(window) <= limit]
    assert shards_that_fit(sizes, limit) == max(fits, default=0)


def test_a_window_of_no_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="shuffle_shards: 0, legal: at least 1"):
        ShardWindow(np.zeros(3, dtype=np.int32), 0)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_reads_the_same_samples_in_the_same_order_at_any_rank_count(world: int, micro: int) -> None:
    global_batch = 48
    for step in (0, 5):
        read: list[int] = []
        for rank in range(world):
            layout = StepLayout(global_batch, micro, world, rank)
            for micro_step in range(layout.accumulation):
                read += layout.positions(step, micro_step)
        assert read == list(range(step * global_batch, (step + 1) * global_batch))


@pytest.mark.parametrize(("world", "rank", "match"), [(5, 0, "not a multiple"), (2, 2, "rank: 2, legal: 0 to 1")])
def test_a_layout_that_cannot_be_is_refused(world: int, rank: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        StepLayout(8, 2, world, rank)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="samples: 0"):
        SampleOrder(0, seed=1)


@pytest.mark.parametrize("samples", [1, 5, 26, 64])
@pytest.mark.parametrize("micro", [1, 4, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_deals_every_sample_once_in_batches_that_do_not_depend_on_ranks(
    samples: int, micro: int, world: int
) -> None:
    per_rank = [evaluation_chunks(samples, micro, world, rank) for rank in range(world)]
    assert len({len(chunks) for chunks in per_rank}) == 1
    dealt = [chunk for chunks in per_rank for chunk in chunks if chunk is not None]
    assert sorted(i for chunk in dealt for i in chunk) == list(range(samples))
    alone = evaluation_chunks(samples, micro, 1, 0)
    assert sorted(dealt, key=lambda chunk: chunk.start) == alone
