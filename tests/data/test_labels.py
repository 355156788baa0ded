import hashlib
import json

import pytest

from vidcls.data.labels import LabelSpace, LabelSpaceError


def test_fingerprint_is_that_of_the_ordered_names() -> None:
    labels = LabelSpace(("walk", "run"))
    assert labels.fingerprint == hashlib.sha256(b'["walk","run"]').hexdigest()
    assert labels.fingerprint != LabelSpace(("run", "walk")).fingerprint
    assert labels.index("run") == 1
    assert len(labels) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "at least one"),
        (["a"], "tuple"),
        (("a", " "), r"names\[1\] = ' '"),
        (("a", "b", "a"), r"names\[2\] = 'a': already the name of class 0"),
        (("a", 3), r"names\[1\] = 3"),
    ],
)
def test_names_that_cannot_be_used(names: object, message: str) -> None:
    with pytest.raises(LabelSpaceError, match=message):
        LabelSpace(names)  # type: ignore[arg-type]


def test_unknown_class_is_named() -> None:
    with pytest.raises(LabelSpaceError, match="'c' is unknown: the 2 classes are a, b"):
        LabelSpace(("a", "b")).index("c")


def test_save_and_load(tmp_path) -> None:
    labels = LabelSpace(("ä", "b"))
    labels.save(tmp_path / "labels.json")
    assert LabelSpace.load(tmp_path / "labels.json") == labels


def test_names_changed_by_hand_are_refused(tmp_path) -> None:
    path = tmp_path / "labels.json"
    stored = LabelSpace(("a", "b")).to_dict()
    path.write_text(json.dumps({**stored, "names": ["b", "a"]}))
    with pytest.raises(LabelSpaceError, match=r"labels.json.*changed by hand"):
        LabelSpace.load(path)
    path.write_text("{")
    with pytest.raises(LabelSpaceError, match=r"labels.json"):
        LabelSpace.load(path)


@pytest.mark.parametrize(
    ("other", "difference"),
    [(("a", "c"), "class 1: 'b' against 'c'"), (("a",), "class 1: 'b' against no such class")],
)
def test_check_same_names_both_sides_and_the_first_difference(other: tuple[str, ...], difference: str) -> None:
    ours, theirs = LabelSpace(("a", "b")), LabelSpace(other)
    ours.check_same(LabelSpace(("a", "b")), "x", "y")
    with pytest.raises(LabelSpaceError, match=difference) as caught:
        ours.check_same(theirs, "the checkpoint", "the shards")
    for text in (ours.fingerprint, theirs.fingerprint, "the checkpoint", "the shards"):
        assert text in str(caught.value)
