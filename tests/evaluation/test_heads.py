"""Which head of a checkpoint is meant."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.support.checkpoints import tiny_spec
from vidcls.data.labels import LabelSpace, LabelSpaceError
from vidcls.data.settings import DecodeSettings
from vidcls.evaluation.heads import choose_head, head_for_labels, read_heads
from vidcls.model.pretrained import SPEC_NAME

UP_DOWN, LEFT_RIGHT = LabelSpace(("up", "down")), LabelSpace(("left", "right"))


def checkpoint(folder: Path, **heads: LabelSpace) -> Path:
    """What is read of a checkpoint before any weights."""
    (folder / SPEC_NAME).write_text(json.dumps(asdict(tiny_spec(*heads))), encoding="utf-8")
    for frames, (name, labels) in enumerate(heads.items(), start=2):
        (folder / "heads" / name).mkdir(parents=True)
        labels.save(folder / "heads" / name / "label_map.json")
        settings = json.dumps(DecodeSettings(frames=frames).to_dict())
        (folder / "heads" / name / "preprocessing.json").write_text(settings, encoding="utf-8")
    return folder


def test_heads_are_read_in_the_models_order(tmp_path: Path) -> None:
    heads = read_heads(checkpoint(tmp_path, z=UP_DOWN, a=LEFT_RIGHT))
    assert [(head.name, head.number, head.labels, head.settings.frames) for head in heads] == [
        ("z", 0, UP_DOWN, 2),
        ("a", 1, LEFT_RIGHT, 3),
    ]
    assert "In a, what" in heads[1].prompt


def test_the_only_head_is_taken_and_must_have_the_classes(tmp_path: Path) -> None:
    heads = read_heads(checkpoint(tmp_path, only=UP_DOWN))
    assert choose_head(heads, None).name == "only"
    assert head_for_labels(heads, None, UP_DOWN, "shards x").name == "only"
    with pytest.raises(LabelSpaceError, match=r"'only'.*shards x.*'up' against 'left'"):
        head_for_labels(heads, None, LEFT_RIGHT, "shards x")


def test_of_several_the_one_with_the_classes_is_found(tmp_path: Path) -> None:
    heads = read_heads(checkpoint(tmp_path, one=UP_DOWN, other=LEFT_RIGHT))
    assert head_for_labels(heads, None, LEFT_RIGHT, "shards x").name == "other"
    down_up = LabelSpace(("down", "up"))  # another order is another label space
    with pytest.raises(
        ValueError, match=rf"--head: no head .* 2 classes of shards x .*{down_up.fingerprint}.* one \(2"
    ):
        head_for_labels(heads, None, down_up, "shards x")
    with pytest.raises(LabelSpaceError, match="head 'one'"):
        head_for_labels(heads, "one", LEFT_RIGHT, "shards x")


def test_where_several_have_the_classes_one_must_be_named(tmp_path: Path) -> None:
    heads = read_heads(checkpoint(tmp_path, one=UP_DOWN, two=UP_DOWN, other=LEFT_RIGHT))
    with pytest.raises(ValueError, match=r"--head: several .*give one: one \(2 classes\), two \(2 classes\)$"):
        head_for_labels(heads, None, UP_DOWN, "shards x")
    assert head_for_labels(heads, "two", UP_DOWN, "shards x").number == 1


def test_prediction_needs_a_name_among_several(tmp_path: Path) -> None:
    heads = read_heads(checkpoint(tmp_path, one=UP_DOWN, other=LEFT_RIGHT))
    with pytest.raises(ValueError, match=r"--head: .*several heads, give one: one \(2 classes\), other"):
        choose_head(heads, None)
    with pytest.raises(ValueError, match=r"--head: 'On' is no head .*it has one \(2"):
        choose_head(heads, "On")


@pytest.mark.parametrize("name", [SPEC_NAME, "heads/one/label_map.json", "heads/one/preprocessing.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path, name: str, damage: str) -> None:
    path = checkpoint(tmp_path, one=UP_DOWN) / name
    path.unlink() if damage == "missing" else path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match=path.name):
        read_heads(tmp_path)
