"""Sizes without transformers, against transformers' own model of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.make_random_checkpoint import SHAPES, model_config, plan_tensors
from vidcls.model.shapes import PUBLISHED_SHAPES, TINY, read_architecture
from vidcls.model.tuning import parameter_part


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_those_of_the_model(shape: str, tmp_path: Path) -> None:
    config = model_config(shape)
    config.save_pretrained(tmp_path)
    found, read = read_architecture(str(tmp_path))
    assert read
    parts = dict.fromkeys(("language", "vision", "merger"), 0)
    for tensor in plan_tensors(config, "base"):
        parts[parameter_part(f"backbone.{tensor.name}")] += tensor.bytes // 2
    assert found.embedding_weights + found.text_weights == parts["language"]
    assert found.vision_weights == parts["vision"]
    assert found.merger_weights == parts["merger"]
    assert found.weights == sum(parts.values())
    if shape in PUBLISHED_SHAPES:
        named, read = read_architecture(f"models/Qwen2.5-VL-{shape.upper()}-Instruct")
        assert not read
        assert named.weights == found.weights
    if shape == TINY:
        assert read_architecture(TINY)[0].weights == found.weights


def test_old_configs_have_the_language_models_keys_at_the_top(tmp_path: Path) -> None:
    values = model_config("3b").to_dict()
    text = values.pop("text_config")
    (tmp_path / "config.json").write_text(json.dumps({**text, **values}))
    assert read_architecture(str(tmp_path))[0].weights == read_architecture("Qwen2.5-VL-3B")[0].weights


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no Qwen2.5-VL config"),
        ('{"model_type": "qwen2_5_vl", "vision_config": {}}', "KeyError"),
        ("[]", "is no Qwen2.5-VL config"),
    ],
)
def test_a_config_that_is_none_is_named(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_architecture(str(tmp_path))


def test_another_model_is_named(tmp_path: Path) -> None:
    values = model_config("tiny").to_dict() | {"model_type": "llava"}
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    with pytest.raises(ValueError, match="model_type is 'llava'"):
        read_architecture(str(tmp_path))


@pytest.mark.parametrize("name", ["models/none", "a13b", "Qwen2.5-VL-3Bx"])
def test_a_name_without_a_published_size_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="its name is no published size"):
        read_architecture(name)
