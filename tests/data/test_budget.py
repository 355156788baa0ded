"""A rank's clips divided by tokens: in order, within the limit, equally many parts on all ranks, as even as can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidcls.data.budget import BudgetLayout, divide, parts_needed
from vidcls.data.joint import JointOrder, Part
from vidcls.data.loader import training_requests
from vidcls.data.order import StepLayout

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=9)


def largest(tokens: list[int], ends: list[int]) -> int:
    return max(sum(tokens[start:end]) for start, end in itertools.pairwise([0, *ends]))


def divisions(count: int, parts: int) -> Iterator[list[int]]:
    """Every way to cut `count` clips into so many parts with something in them."""
    for cuts in itertools.combinations(range(1, count), parts - 1):
        yield [*cuts, count]


@given(tokens=lengths, above=st.integers(0, 100))
def test_the_fewest_parts_by_trying_all(tokens: list[int], above: int) -> None:
    limit = max(tokens) + above
    fits = [
        parts
        for parts in range(1, len(tokens) + 1)
        if any(largest(tokens, ends) <= limit for ends in divisions(len(tokens), parts))
    ]
    assert parts_needed(tokens, limit) == fits[0]


@given(tokens=lengths, data=st.data())
def test_the_largest_part_is_the_smallest_by_trying_all(tokens: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(tokens)))
    ends = divide(tokens, parts)
    assert ends in list(divisions(len(tokens), parts))
    assert largest(tokens, ends) == min(largest(tokens, each) for each in divisions(len(tokens), parts))


def test_divisions_by_hand() -> None:
    # As few tokens in the largest part as 3 + 3 + 3 + 1 clips have, but not one part with next to nothing.
    sizes = np.diff([0, *divide([10] * 10, 4)])
    assert sorted(sizes.tolist()) == [2, 2, 3, 3]
    # 40 stands alone; the first part comes close to a fifth of all.
    assert divide([5, 5, 5, 5, 40, 6, 6, 6, 6], 5) == [3, 4, 5, 7, 9]
    assert divide([1, 1, 1], 3) == [1, 2, 3]
    assert divide([7], 1) == [1]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[BudgetLayout], int]:
    """All ranks' layouts of a stream of one or two data sets, and a step."""
    world, share = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=2))
    seed = draw(st.integers(0, 2**32))
    parts = tuple(Part.of(np.arange(size), seed + i, size, None, None) for i, size in enumerate(sizes))
    tokens = [np.array(draw(st.lists(st.integers(1, 30), min_size=size, max_size=size))) for size in sizes]
    limit = max(int(each.max()) for each in tokens) + draw(st.integers(0, 60))
    each = [BudgetLayout(JointOrder(parts, seed), tokens, limit, world * share, world, rank) for rank in range(world)]
    return each, draw(st.integers(0, 5))


def tokens_at(layout: BudgetLayout, positions: range) -> list[int]:
    drawn = map(layout.order.at, positions)
    return [int(layout.tokens[each.source][each.sample]) for each in drawn]


@given(layouts())
def test_ranks_cut_their_own_positions_into_equally_many_parts(made: tuple[list[BudgetLayout], int]) -> None:
    each, step = made
    world, size, limit = len(each), each[0].global_batch, each[0].limit
    divided = [layout.micro_batches(step) for layout in each]
    for layout, parts in zip(each, divided, strict=True):
        plain = StepLayout(size, size // world, world, layout.rank).positions(step, 0)
        assert [position for part in parts for position in part] == list(plain)
        assert all(len(part) > 0 and sum(tokens_at(layout, part)) <= limit for part in parts)
    (count,) = set(map(len, divided))
    # No fewer would do: some rank needs so many.
    assert count == max(
        parts_needed(tokens_at(layout, range(parts[0].start, parts[-1].stop)), limit)
        for layout, parts in zip(each, divided, strict=True)
    )


@given(layouts())
def test_requests_are_the_clips_at_these_positions(made: tuple[list[BudgetLayout], int]) -> None:
    (*_, layout), step = made
    requests = list(training_requests(layout.order, layout, step, step + 2))
    positions = [*layout.micro_batches(step), *layout.micro_batches(step + 1)]
    for request, own in zip(requests, positions, strict=True):
        drawn = [layout.order.at(position) for position in own]
        assert list(request.samples) == [each.sample for each in drawn]
        assert list(request.sources) == [each.source for each in drawn]
        assert list(request.epochs or ()) == [each.epoch for each in drawn]


def test_a_clip_above_the_limit_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="clip 1 has more than 5 tokens"):
        parts_needed([5, 6, 1], 5)
