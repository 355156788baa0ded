"""Windows of a long video, and the stretches that they come to."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vidcls.predict.timeline import Timeline, Window, windows_of


@given(
    seconds=st.floats(0.1, 300),
    window=st.floats(0.2, 20),
    share=st.floats(0.1, 1),
    place=st.floats(0, 1, exclude_max=True),
)
def test_every_moment_lies_in_a_window(seconds: float, window: float, share: float, place: float) -> None:
    spans = windows_of(seconds, window, window * share)
    assert any(start <= place * seconds < end for start, end in spans)
    assert spans[0][0] == 0
    assert spans[-1][1] == pytest.approx(seconds, abs=1e-5)
    assert all(end - start == pytest.approx(min(window, seconds)) for start, end in spans)
    starts = [start for start, _ in spans]
    assert starts == sorted(starts)
    assert all(later - earlier <= window * share + 1e-6 for earlier, later in itertools.pairwise(starts))


def test_windows_by_hand() -> None:
    assert windows_of(10, 4, 2) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert windows_of(9, 4, 2) == [(0, 4), (2, 6), (4, 8), (5, 9)]  # the last one ends with the video
    assert windows_of(3, 4, 2) == [(0, 3)]


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (2, 0), (2, 3), (float("nan"), 1), (-1, -1)])
def test_windows_that_make_no_sense(window: float, stride: float) -> None:
    with pytest.raises(ValueError, match="legal: 0 < stride <= window"):
        windows_of(10, window, stride)


def test_too_many_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="legal: at most 20000"):
        windows_of(1e6, 1, 0.01)


def timeline(*tops: int) -> Timeline:
    """Windows of 2 s, one a second, in which one of three classes has 0.8."""
    windows = []
    for place, top in enumerate(tops):
        scores = np.full(3, 0.1)
        scores[top] = 0.8
        windows.append(Window(place, place + 2, scores))
    return Timeline("v.mp4", len(tops) + 1, 2, 1, ("a", "b", "c$x$"), tuple(windows))


def test_stretches_by_hand() -> None:
    """Classes a a b b: middles at 1, 2, 3 and 4 s; the change is half-way between the second and the third."""
    first, second = timeline(0, 0, 1, 1).stretches()
    assert (first.name, first.start, first.end) == ("a", 0, 2.5)
    assert (second.name, second.start, second.end) == ("b", 2.5, 5)
    assert first.score == pytest.approx(0.8)
    assert [each.name for each in timeline(0, 1, 0).stretches()] == ["a", "b", "a"]
    (only,) = timeline(2).stretches()
    assert (only.start, only.end) == (0, 2)


def test_the_picture_and_the_file(tmp_path: Path) -> None:
    found = timeline(0, 0, 2, 1)
    found.draw(tmp_path / "x.png")
    assert np.asarray(Image.open(tmp_path / "x.png").convert("L")).std() > 5
    content = found.to_dict(top=2)
    assert [len(each["top"]) for each in content["windows"]] == [2, 2, 2, 2]
    assert content["windows"][2]["top"][0] == {"class": "c$x$", "score": 0.8}
    assert content["stretches"][0] == {"start": 0, "end": 2.5, "class": "a", "score": 0.8}
