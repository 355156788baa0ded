"""What a horizontal flip makes of names and texts: left becomes right, clockwise counterclockwise, and back.

Only whole words count (not "bright", "leftover" or "upright"), also in names like turn_left and TurnLeft. "Right" is no
side in "right out", "right away" and "right now". Whether "left" is a verb cannot be told: a class like "leaving what
is left" has no mirror class, and is not flipped unless explicit pairs replace this.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from vidcls.data.labels import LabelSpace, LabelSpaceError

ONE_SIDED = -1
_START = r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"
_END = r"(?![a-z])(?!(?<=[A-Z])[A-Z])"
_SIDE = rf"(?P<side>(?i:left|right))(?=(?i:wards?|most|hand(?:ed)?|side)?{_END})"
_NO_SIDE = r"(?!(?i:right)[\s_-]+(?i:out|away|now)(?![A-Za-z]))"
_TURN = rf"(?P<counter>(?i:counter|anti)[\s_-]?)?(?P<clockwise>(?i:clockwise)){_END}"
_WORDS = re.compile(rf"{_START}(?:{_NO_SIDE}{_SIDE}|{_TURN})")


def swap_sides(text: str) -> str:
    """The text as it holds for the flipped clip. Case is kept; the opposite of clockwise is "counterclockwise"."""
    return _WORDS.sub(_opposite, text)


def mirror_of(labels: LabelSpace) -> np.ndarray:
    """int64 [classes]: the label that a clip of each class has when it is flipped, found from the names.

    A class whose name has no side is its own mirror; one that names a side and has no mirror class is ONE_SIDED, and
    must not be flipped.
    """
    label_of = {_one_spelling(name): label for label, name in enumerate(labels.names)}
    mirror = np.arange(len(labels))
    for label, name in enumerate(labels.names):
        if (swapped := swap_sides(name)) != name:
            mirror[label] = label_of.get(swapped, ONE_SIDED)
    # Two spellings of one name ("anticlockwise", "counter-clockwise") would share a mirror class, which has one only.
    return np.where((mirror == ONE_SIDED) | (mirror[mirror] == np.arange(len(labels))), mirror, ONE_SIDED)


def mirror_for(pairs: Literal["auto"] | Sequence[Sequence[str]], flip: float, labels: LabelSpace) -> np.ndarray | None:
    """What the recipe's `mirror_pairs` and `horizontal_flip` say: the label of each class when flipped, ONE_SIDED where
    flipping is wrong. None: no clip is flipped, or any may be and keeps its label. LabelSpaceError names a wrong pair.
    """
    if not flip:
        return None
    mirror = mirror_of(labels) if pairs == "auto" else mirror_pairs(pairs, labels)
    return None if np.array_equal(mirror, np.arange(len(labels))) else mirror


def swaps_classes(mirror: np.ndarray | None) -> bool:
    """Whether a flip changes any label; if not, "right" in a data set's texts may well mean "correct"."""
    return mirror is not None and bool(np.any((mirror != ONE_SIDED) & (mirror != np.arange(len(mirror)))))


def mirror_pairs(pairs: Sequence[Sequence[str]], labels: LabelSpace) -> np.ndarray:
    """int64 [classes]: mirror labels from pairs of class names alone; a class of no pair is its own mirror.

    What names say is not looked at: without pairs, any clip may be flipped and keeps its label. LabelSpaceError names
    the pair.
    """
    mirror = np.arange(len(labels))
    of_pair: dict[int, int] = {}
    for number, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise LabelSpaceError(f"mirror_pairs[{number}]: {pair!r}, legal: the names of two classes")
        first, second = (_label(each, labels, number) for each in pair)
        for label in {first, second}:
            if of_pair.setdefault(label, number) != number:
                where = f"is in mirror_pairs[{of_pair[label]}] too"
                raise LabelSpaceError(f"mirror_pairs[{number}]: class {label} ({labels.names[label]!r}) {where}")
        mirror[first], mirror[second] = second, first
    return mirror


def _opposite(match: re.Match[str]) -> str:
    if (side := match["side"]) is not None:
        return _cased("right" if side.lower() == "left" else "left", side)
    return _cased("clockwise" if match["counter"] else "counterclockwise", match[0])


def _one_spelling(text: str) -> str:
    """With every "anti-clockwise" and the like as "counterclockwise"."""
    return _WORDS.sub(lambda found: _cased("counterclockwise", found[0]) if found["counter"] else found[0], text)


def _cased(word: str, like: str) -> str:
    if like.isupper():
        return word.upper()
    return word.capitalize() if like[0].isupper() else word


def _label(given: str, labels: LabelSpace, number: int) -> int:
    if given in labels.names:
        return labels.index(given)
    close = difflib.get_close_matches(str(given), labels.names, n=3)
    hint = f"close names: {', '.join(map(repr, close))}" if close else f"legal: the {len(labels)} class names"
    raise LabelSpaceError(f"mirror_pairs[{number}]: there is no class {given!r}; {hint}")
