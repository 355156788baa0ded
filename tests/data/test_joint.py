"""Several data sets in one stream: the shares asked for, every data set in its own order, the same on all ranks."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidcls.data.joint import Drawn, JointOrder, Part, quotas, select, source_seed
from vidcls.data.loader import training_requests
from vidcls.data.order import SampleOrder, ShardWindow, StepLayout

SEEDS = st.integers(0, 2**63)
# No deadlines: other processes may have the machine.
many, few = settings(deadline=None), settings(max_examples=40, deadline=None)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@st.composite
def joined(draw: st.DrawFn) -> JointOrder:
    """1 to 4 data sets of 1 to 12 clips of which some take part, with and without windows, in any shares."""
    seed = draw(SEEDS)
    data_sets = []
    for number in range(draw(st.integers(1, 4))):
        shard = np.array(draw(st.lists(st.integers(0, 4), min_size=1, max_size=12)))
        chosen = draw(st.lists(st.booleans(), min_size=len(shard), max_size=len(shard)).filter(any))
        data_sets.append(
            (np.flatnonzero(chosen), source_seed(seed, number), shard, draw(st.none() | st.integers(1, 6)))
        )
    sizes = [len(ids) for ids, *_ in data_sets]
    weights = draw(st.none() | st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    shares = quotas(sizes, weights=weights, temperature=draw(st.sampled_from([1.0, 2.0])))
    parts = [
        Part.of(ids, own_seed, quota, shard, shards)
        for (ids, own_seed, shard, shards), quota in zip(data_sets, shares, strict=True)
    ]
    return JointOrder(tuple(parts), seed)


def again(order: JointOrder) -> JointOrder:
    """The same stream, with nothing of it worked out yet."""
    parts = [Part(SampleOrder(p.order.samples, p.order.seed, p.order.window), p.ids, p.quota) for p in order.parts]
    return JointOrder(tuple(parts), order.seed)


def stream(order: JointOrder, positions: range) -> list[Drawn]:
    return [order.at(position) for position in positions]


@given(sizes=SIZES, data=st.data(), temperature=st.floats(0.05, 50))
@many
def test_quotas_add_up_to_all_sizes_and_none_is_left_out(sizes: list[int], data: st.DataObject, temperature: float):
    weights = data.draw(st.none() | st.lists(st.floats(1e-6, 1e6), min_size=len(sizes), max_size=len(sizes)))
    found = quotas(sizes, weights=weights, temperature=temperature)
    assert sum(found) == sum(sizes)
    assert min(found) >= 1


@given(sizes=SIZES)
@many
def test_natural_shares_are_one_epoch_of_each(sizes: list[int]) -> None:
    assert quotas(sizes, weights=None, temperature=1.0) == tuple(sizes)


@given(sizes=SIZES, data=st.data())
@many
def test_weights_are_respected_within_one_clip(sizes: list[int], data: st.DataObject) -> None:
    """In exact arithmetic; where a share is below one clip, the data set gets one and the others give it up."""
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(sizes), max_size=len(sizes)))
    exact = [Fraction(weight * sum(sizes), sum(weights)) for weight in weights]
    found = quotas(sizes, weights=[float(weight) for weight in weights], temperature=1.0)
    if min(exact) >= 1:
        assert all(abs(quota - share) < 1 + 1e-6 for quota, share in zip(found, exact, strict=True))
    else:
        assert all(quota == 1 for quota, share in zip(found, exact, strict=True) if share < 1)
        given_up = sum(1 - share for share in exact if share < 1)
        assert all(abs(quota - share) < 1 + given_up for quota, share in zip(found, exact, strict=True))


def test_temperatures_by_hand() -> None:
    sizes = [1600, 100, 400]  # roots 40, 10, 20 of 70
    assert quotas(sizes, weights=None, temperature=2.0) == (1200, 300, 600)
    assert quotas(sizes, weights=None, temperature=1e9) == (700, 700, 700)
    assert quotas(sizes, weights=None, temperature=0.5) == (1969, 8, 123)  # squares 256, 1, 16 of 273
    assert quotas([10**6, 10**3], weights=None, temperature=0.01) == (10**6 + 999, 1), "1e6 ** 100 is no float"
    assert quotas([5, 5], weights=[1e308, 1e308], temperature=1.0) == (5, 5)


@given(order=joined(), cycles=st.integers(1, 3))
@few
def test_a_cycle_holds_each_data_sets_quota(order: JointOrder, cycles: int) -> None:
    for cycle in range(cycles):
        drawn = stream(order, range(cycle * len(order), (cycle + 1) * len(order)))
        counts = Counter(each.source for each in drawn)
        assert [counts[number] for number in range(len(order.parts))] == [part.quota for part in order.parts]


@given(order=joined())
@few
def test_each_data_set_goes_on_as_it_would_alone(order: JointOrder) -> None:
    """Its clips, its epochs, its windows: those of a SampleOrder that knows of no other data set."""
    own: list[list[tuple[int, int]]] = [[] for _ in order.parts]
    for each in stream(order, range(3 * len(order))):
        own[each.source].append((each.epoch, each.sample))
    for found, part in zip(own, order.parts, strict=True):
        alone = SampleOrder(len(part.ids), part.order.seed, part.order.window)
        expected = [alone.at(position) for position in range(len(found))]
        assert found == [(epoch, int(part.ids[place])) for epoch, place in expected]
        once = len(part.ids)
        for epoch in range(len(found) // once):
            assert sorted(found[epoch * once : (epoch + 1) * once]) == [(epoch, int(i)) for i in part.ids]


@given(sizes=SIZES, seed=SEEDS)
@many
def test_with_natural_shares_a_cycle_is_each_clip_once(sizes: list[int], seed: int) -> None:
    parts = [Part.of(np.arange(s), source_seed(seed, i), s, None, None) for i, s in enumerate(sizes)]
    order = JointOrder(tuple(parts), seed)
    everything = [(number, sample) for number, size in enumerate(sizes) for sample in range(size)]
    for cycle in range(2):
        drawn = stream(order, range(cycle * len(order), (cycle + 1) * len(order)))
        assert sorted((each.source, each.sample) for each in drawn) == everything
        assert {each.epoch for each in drawn} == {cycle}


@given(order=joined(), positions=st.lists(st.integers(0, 200), min_size=1, max_size=12))
@few
def test_the_stream_does_not_depend_on_where_reading_begins(order: JointOrder, positions: list[int]) -> None:
    straight = stream(again(order), range(201))
    jumping = again(order)
    for position in positions:
        assert jumping.at(position) == straight[position] == again(order).at(position)


@given(order=joined(), micro=st.integers(1, 3), accumulation=st.integers(1, 2), first=st.integers(0, 3))
@few
def test_all_rank_counts_read_one_stream(order: JointOrder, micro: int, accumulation: int, first: int) -> None:
    for world in range(1, 9):
        size = micro * accumulation * world
        ranks = [
            list(training_requests(again(order), StepLayout(size, micro, world, rank), first, first + 2))
            for rank in range(world)
        ]
        read = []
        for step in range(2):
            for requests in ranks:
                for request in requests[step * accumulation : (step + 1) * accumulation]:
                    assert request.epochs is not None
                    read += map(Drawn, request.sources, request.epochs, request.samples)
        assert read == stream(order, range(first * size, (first + 2) * size)), world


@given(order=joined())
@few
def test_the_shard_of_a_clip_is_at_hand_and_none_is_fetched_for_nothing(order: JointOrder) -> None:
    """The shards of every data set's present window, whichever data set the position itself is of."""
    windowed = [number for number, part in enumerate(order.parts) if part.order.window is not None]
    needed: set[tuple[int, int]] = set()
    for number in windowed:
        window = order.parts[number].order.window
        assert window is not None
        needed |= {(number, int(shard)) for shard in window.shard}
    for position, drawn in enumerate(stream(order, range(2 * len(order)))):
        ahead = order.shards_ahead(position)
        assert len(ahead) == len({*ahead})
        assert {*ahead} <= needed
        assert [source for source, _ in ahead] == sorted(source for source, _ in ahead), "grouped by data set"
        window = order.parts[drawn.source].order.window
        if window is not None:
            place = int(np.searchsorted(order.parts[drawn.source].ids, drawn.sample))
            assert (drawn.source, int(window.shard[place])) in ahead
        assert {source for source, _ in ahead} == {*windowed}


@given(order=joined(), position=st.integers(0, 200))
@few
def test_shards_ahead_are_those_that_each_data_set_has_reached(order: JointOrder, position: int) -> None:
    reached = Counter(each.source for each in stream(again(order), range(position)))
    expected = [
        (source, shard) for source, part in enumerate(order.parts) for shard in part.order.shards_ahead(reached[source])
    ]
    assert list(order.shards_ahead(position)) == expected


def test_shards_without_a_chosen_clip_are_not_fetched() -> None:
    """A few clips of a large data set must not bring all of its shards."""
    shard = np.repeat(np.arange(100), 10)
    order = JointOrder((Part.of(np.array([5, 555, 556]), 1, 3, shard, 100),), 1)
    assert {shard for position in range(9) for _, shard in order.shards_ahead(position)} == {0, 55}
    one_at_a_time = SampleOrder(3, 1, ShardWindow(np.array([0, 55, 55]), 1))
    assert {one_at_a_time.shards_ahead(p) for p in (0, 3, 6)} <= {(0,), (55,), (0, 55), (55, 0)}


def test_data_sets_of_one_size_are_shuffled_apart_and_the_first_as_without_others() -> None:
    seeds = [source_seed(7, number) for number in range(4)]
    assert seeds[0] == 7
    assert len({*seeds}) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    orders = [[SampleOrder(50, seed).at(position) for position in range(50)] for seed in seeds]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_neighbours_are_mixed() -> None:
    """Of two data sets alike, half of all neighbours are of one: 500 of 999 here, with a deviation of 16."""
    parts = [Part.of(np.arange(500), source_seed(3, number), 500, None, None) for number in range(2)]
    drawn = [each.source for each in stream(JointOrder(tuple(parts), 3), range(1000))]
    assert 420 < sum(a == b for a, b in pairwise(drawn)) < 580


@given(
    samples=st.integers(1, 60), seed=SEEDS, most=st.none() | st.integers(1, 80), val=st.floats(0, 0.9) | st.just(3.0)
)
@many
def test_selected_clips_are_apart_and_always_the_same(samples: int, seed: int, most: int | None, val: float) -> None:
    taken = min(samples, most or samples)
    held_out = 3 if val == 3 else round(val * taken)
    if held_out >= taken:
        with pytest.raises(ValueError, match=rf"val_size: {val:g} of {taken} clips leaves none to train on"):
            select(samples, seed, most=most, val_size=val)
        return
    training, validation = select(samples, seed, most=most, val_size=val)
    assert (len(training), len(validation)) == (taken - held_out, held_out)
    both = [*training.tolist(), *validation.tolist()]
    assert len({*both}) == taken
    assert {*both} <= {*range(samples)}
    assert (np.diff(training) > 0).all()
    assert (np.diff(validation) > 0).all()
    repeated = select(samples, seed, most=most, val_size=val)
    assert [each.tolist() for each in repeated] == [training.tolist(), validation.tolist()]
    # What is held out is held out of the clips that max_samples leaves, not the other way round.
    left, _ = select(samples, seed, most=most, val_size=0.0)
    assert sorted(both) == left.tolist()


def test_another_seed_selects_other_clips() -> None:
    one, other = (select(1000, seed, most=100, val_size=0.1) for seed in (1, 2))
    assert one[0].tolist() != other[0].tolist()
    # 100 of 1000 drawn twice share 10, with a deviation of 2.8.
    assert len({*np.concatenate(one).tolist()} & {*np.concatenate(other).tolist()}) < 25
