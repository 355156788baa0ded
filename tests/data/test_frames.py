"""Which of the stored frames are used: one of each part, all of a short clip, always the same ones."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vidcls.data.frames import jittered, view
from vidcls.data.settings import segment_midpoints

totals, counts = st.integers(1, 200), st.integers(1, 40)


@given(total=totals, frames=counts, seed=st.integers(0, 2**63), epoch=st.integers(0, 99), sample=st.integers(0, 10**6))
def test_jitter_takes_one_frame_of_each_part(total: int, frames: int, seed: int, epoch: int, sample: int) -> None:
    chosen = jittered(total, frames, seed, epoch, sample)
    if total <= frames:
        assert chosen == list(range(total))
        return
    assert len(chosen) == frames
    for part, frame in enumerate(chosen):
        assert part * total // frames <= frame < (part + 1) * total // frames


def test_jitter_depends_on_seed_epoch_and_sample_alone() -> None:
    assert jittered(64, 8, 1, 2, 3) == jittered(64, 8, 1, 2, 3)
    others = [jittered(64, 8, *numbers) for numbers in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1))]
    assert len({*map(tuple, others)}) == len(others)
    # A release that changes these numbers goes on differently with the runs of an older one.
    assert others[0] == [7, 10, 19, 24, 38, 46, 55, 60]


def test_jitter_is_uniform_within_a_part() -> None:
    # The frame taken of 10 in the second of 3 parts: chi-squared, 9 degrees of freedom, p = 0.001 at 27.9.
    taken = np.bincount([jittered(30, 3, 5, 0, sample)[1] - 10 for sample in range(2000)], minlength=10)
    assert ((taken - 200) ** 2 / 200).sum() < 27.9


@given(total=totals, frames=counts, views=st.integers(1, 10))
def test_views_lie_evenly_in_each_part(total: int, frames: int, views: int) -> None:
    for number in range(views):
        chosen = view(total, frames, number, views)
        if total <= frames:
            assert chosen == list(range(total))
        else:
            place = Fraction(2 * number + 1, 2 * views)
            assert chosen == [floor((part + place) * total / frames) for part in range(frames)]


@given(total=totals, frames=counts)
def test_a_single_view_takes_the_midpoints(total: int, frames: int) -> None:
    if total > frames:
        assert view(total, frames) == segment_midpoints(total, frames)


def test_as_many_views_as_frames_in_a_part_see_every_frame() -> None:
    assert sorted(frame for number in range(4) for frame in view(32, 8, number, 4)) == list(range(32))
