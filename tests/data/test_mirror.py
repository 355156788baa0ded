"""What a flip makes of names: exactly Something-Something's official pairs, and nothing that only looks like a side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vidcls.data.labels import LabelSpace, LabelSpaceError
from vidcls.data.mirror import ONE_SIDED, mirror_for, mirror_of, mirror_pairs, swap_sides, swaps_classes


@pytest.mark.parametrize(
    ("text", "flipped"),
    [
        ("Pulling [something] from left to right", "Pulling [something] from right to left"),
        ("Swiping Left", "Swiping Right"),
        ("TURN LEFT!", "TURN RIGHT!"),
        ("turn_left", "turn_right"),
        ("TurnLeft", "TurnRight"),
        ("LeftTurn", "RightTurn"),
        ("left-handed, leftwards, the leftmost", "right-handed, rightwards, the rightmost"),
        ("Righthand Leftward leftside", "Lefthand Rightward rightside"),
        ("Left2Right", "Right2Left"),
        ("Turning Hand Clockwise", "Turning Hand Counterclockwise"),
        ("counter-clockwise, ANTICLOCKWISE", "clockwise, CLOCKWISE"),
    ],
)
def test_sides_are_swapped_and_swapped_back(text: str, flipped: str) -> None:
    assert swap_sides(text) == flipped
    if "clockwise" not in text.lower():
        assert swap_sides(flipped) == text


@pytest.mark.parametrize(
    "text",
    [
        "Putting something upright on the table",
        "bright leftover cleft LEFTOVER BRIGHT Leftovers outright rights",
        "pulling it right out as you remove your hand",
        "right away, RIGHT NOW, right_now",
        "otherwise",
        "",
    ],
)
def test_what_only_looks_like_a_side_stays(text: str) -> None:
    assert swap_sides(text) == text


def test_pairs_of_names_and_classes_without_a_partner() -> None:
    labels = LabelSpace(
        ("walk", "turn_left", "jump left", "turn_right", "Roll Clockwise", "Roll Counter-Clockwise", "Up")
    )
    assert mirror_of(labels).tolist() == [0, 3, ONE_SIDED, 1, 5, 4, 6]
    assert mirror_of(labels).dtype == np.int64


def test_two_spellings_of_one_mirror_class_leave_none_to_guess() -> None:
    labels = LabelSpace(("spin clockwise", "spin anticlockwise", "spin counter-clockwise"))
    mirror = mirror_of(labels)
    paired = np.flatnonzero(mirror != ONE_SIDED)
    np.testing.assert_array_equal(mirror[mirror[paired]], paired)


@pytest.mark.real
def test_something_something_has_its_three_official_pairs_and_no_other_side(real_data: Path) -> None:
    stored = json.loads((real_data / "ssv2/annotations/something-something-v2-labels.json").read_text())
    labels = LabelSpace(tuple(sorted(stored, key=lambda name: int(stored[name]))))
    assert len(labels) == 174
    mirror = mirror_of(labels)
    changed = {(int(a), int(mirror[a])) for a in np.flatnonzero(mirror != np.arange(174))}
    assert changed == {(86, 87), (87, 86), (93, 94), (94, 93), (166, 167), (167, 166)}
    assert ONE_SIDED not in mirror


@pytest.mark.real
def test_no_class_of_ucf101_has_a_side(real_data: Path) -> None:
    lines = (real_data / "ucf101/annotations/classInd.txt").read_text().split("\n")
    labels = LabelSpace(tuple(line.split()[1] for line in lines if line.strip()))
    assert len(labels) == 101
    assert mirror_of(labels).tolist() == list(range(101))


def test_explicit_pairs_replace_what_names_say() -> None:
    labels = LabelSpace(("west", "turn left", "east", "turn right", "only left"))
    assert mirror_pairs([["west", "east"]], labels).tolist() == [2, 1, 0, 3, 4]
    assert mirror_pairs([("west", "east"), ("turn left", "turn right")], labels).tolist() == [2, 3, 0, 1, 4]
    assert mirror_pairs([], labels).tolist() == [0, 1, 2, 3, 4]


def test_the_mirror_of_a_recipe_is_none_where_no_flip_matters() -> None:
    sides, choices = LabelSpace(("turn left", "turn right", "up")), LabelSpace(("choose the right one", "up"))
    found = mirror_for("auto", 0.5, sides)
    assert found is not None
    assert found.tolist() == [1, 0, 2]
    assert swaps_classes(found)
    explicit = mirror_for([("turn left", "up")], 0.5, sides)
    assert explicit is not None
    assert explicit.tolist() == [2, 1, 0]
    assert mirror_for("auto", 0.0, sides) is None
    assert mirror_for([], 0.5, sides) is None
    assert mirror_for("auto", 0.5, LabelSpace(("up", "down"))) is None
    alone = mirror_for("auto", 0.5, choices)  # not flipped; but nothing is called otherwise
    assert alone is not None
    assert alone.tolist() == [ONE_SIDED, 1]
    assert not swaps_classes(alone)
    assert not swaps_classes(None)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([["turn leftt", "right"]], r"mirror_pairs\[0\]: there is no class 'turn leftt'; close names: 'turn left'"),
        ([["zzzz", "right"]], r"no class 'zzzz'; legal: the 3 class names"),
        ([["turn left"]], r"mirror_pairs\[0\]: \['turn left'\], legal: the names of two classes"),
        (["no"], r"mirror_pairs\[0\]: 'no', legal: the names of two classes"),
        (
            [["turn left", "turn right"], ["turn left", "up"]],
            r"mirror_pairs\[1\]: class 0 \('turn left'\) is in mirror_pairs\[0\] too",
        ),
    ],
)
def test_pairs_that_cannot_be(pairs: list, message: str) -> None:
    with pytest.raises(LabelSpaceError, match=message):
        mirror_pairs(pairs, LabelSpace(("turn left", "turn right", "up")))
