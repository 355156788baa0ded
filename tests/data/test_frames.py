"""Which of the stored frames are used: one of each part, all of a short clip, always the same ones."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vidcls.data.frames import dense, dense_view, jittered, view
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


@given(total=totals, frames=counts, stride=st.integers(1, 30), seed=st.integers(0, 2**63), sample=st.integers(0, 10**6))
def test_a_dense_run_keeps_its_stride_where_that_fits(
    total: int, frames: int, stride: int, seed: int, sample: int
) -> None:
    chosen = dense(total, frames, stride, seed, 0, sample)
    if total <= frames:
        assert chosen == list(range(total))
        return
    assert len(chosen) == frames
    assert chosen[0] >= 0
    assert chosen[-1] < total
    steps = {later - earlier for earlier, later in pairwise(chosen)}
    assert len(steps) <= 1
    for step in steps:
        assert step == stride or (step < stride and (frames - 1) * (step + 1) >= total)


def test_a_dense_run_depends_on_seed_epoch_and_sample_alone() -> None:
    assert dense(300, 8, 4, 1, 2, 3) == dense(300, 8, 4, 1, 2, 3)
    others = [dense(300, 8, 4, *numbers) for numbers in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1))]
    assert len({*map(tuple, others)}) == len(others)
    # A release that changes these numbers goes on differently with the runs of an older one.
    assert others[0] == [197, 201, 205, 209, 213, 217, 221, 225]


def test_dense_runs_start_anywhere_alike() -> None:
    # 3 frames 4 apart span 9 of 18: starts 0 to 9, chi-squared, 9 degrees of freedom, p = 0.001 at 27.9.
    starts = np.bincount([dense(18, 3, 4, 5, 0, sample)[0] for sample in range(2000)], minlength=10)
    assert len(starts) == 10
    assert ((starts - 200) ** 2 / 200).sum() < 27.9


@given(total=totals, frames=counts, stride=st.integers(1, 30), views=st.integers(1, 10))
def test_dense_views_cover_the_clip_evenly(total: int, frames: int, stride: int, views: int) -> None:
    runs = [dense_view(total, frames, stride, number, views) for number in range(views)]
    if total <= frames:
        assert runs == [list(range(total))] * views
        return
    trained = dense(total, frames, stride, 0, 0, 0)
    assert all(np.array_equal(np.diff(run), np.diff(trained)) and len(run) == frames for run in runs)
    if views == 1:
        assert runs[0][0] - (total - 1 - runs[0][-1]) in (0, -1)  # as far from the beginning as from the end
        return
    assert (runs[0][0], runs[-1][-1]) == (0, total - 1)
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(runs)]
    assert max(gaps) - min(gaps) <= 1


def test_dense_views_by_hand() -> None:
    assert dense_view(20, 4, 3) == [5, 8, 11, 14]
    assert [dense_view(20, 4, 3, number, 3)[0] for number in range(3)] == [0, 5, 10]
    assert dense_view(20, 1, 3, 1, 3) == [9]
    assert dense_view(8, 4, 30) == [0, 2, 4, 6], "a stride of 2 is the largest that fits"
