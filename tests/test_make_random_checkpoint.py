import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2_5_VLForConditionalGeneration

from tools import make_random_checkpoint as tool
from vidcls.model.tokens import load_tokenizer
from vidcls.model.weights import load_backbone, load_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in several shards."""
    return tool.write_checkpoint(tmp_path_factory.mktemp("random") / "model", "tiny", shard_bytes=200_000)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def test_both_classes_load_the_same_weights(folder: Path) -> None:
    backbone = load_backbone(str(folder), dtype=torch.bfloat16)
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    theirs = whole.model.state_dict()
    for name, tensor in backbone.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    assert whole.lm_head.weight is whole.model.language_model.embed_tokens.weight
    embedding = backbone.language_model.embed_tokens.weight
    assert torch.equal(embedding, stored(folder)["model.embed_tokens.weight"])
    assert embedding.float().std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(backbone.language_model.norm.weight, torch.ones(128, dtype=torch.bfloat16))


def test_index_names_every_tensor_once_and_sizes_are_right(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == set(shards)
    sizes = 0
    for name in shards:
        with safe_open(folder / name, "pt") as file:
            keys = set(file.keys())
            assert keys == {key for key, shard in index["weight_map"].items() if shard == name}
            size = sum(file.get_tensor(key).nbytes for key in keys)
        assert size <= 200_000 or len(keys) == 1
        sizes += size
    assert sizes == index["metadata"]["total_size"]


@pytest.mark.parametrize(
    ("shape", "total_size", "last", "head_stored"),
    [
        ("3b", 7_509_245_952, 35, False),
        ("7b", 16_584_333_312, 27, True),
        ("32b", None, 63, True),
        ("72b", None, 79, True),
    ],
)
def test_published_shapes(shape: str, total_size: int | None, last: int, head_stored: bool) -> None:
    """The sizes are those in the published checkpoints' indexes, or the billions in their model cards."""
    plans = {plan.name: plan for plan in tool.plan_tensors(tool.model_config(shape))}
    total = sum(plan.bytes for plan in plans.values())
    assert total == total_size or round(total / 2e9) == {"32b": 33, "72b": 73}[shape]
    assert {"visual.merger.ln_q.weight", f"model.layers.{last}.mlp.up_proj.weight", "model.norm.weight"} <= set(plans)
    assert ("lm_head.weight" in plans) == head_stored


def test_weights_depend_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    first = stored(folder)
    again = stored(tool.write_checkpoint(tmp_path / "again", "tiny"))
    other = stored(tool.write_checkpoint(tmp_path / "other", "tiny", seed=1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    drawn = [name for name, tensor in first.items() if not torch.all(tensor == 1)]
    assert len(drawn) > 30
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_layouts_hold_the_same_weights_by_other_names(tmp_path: Path) -> None:
    names, values = {}, {}
    for layout in tool.LAYOUTS:
        folder = tool.write_checkpoint(tmp_path / layout, "tiny-untied", layout=layout, shard_bytes=None)
        assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
        assert not load_config(str(folder)).tie_word_embeddings
        if layout != "base":
            whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            assert not torch.equal(whole.lm_head.weight, whole.get_input_embeddings().weight)
        values_text = json.loads((folder / "config.json").read_text()).get("text_config", {})
        assert not values_text.get("tie_word_embeddings", False)
        tensors = stored(folder)
        names[layout] = {name.split(".")[0] + "." + name.split(".")[1] for name in tensors}
        values[layout] = sorted(tensors[name].float().sum().item() for name in tensors if name != "lm_head.weight")
    assert names["old"] == {
        "visual.patch_embed", "visual.blocks", "visual.merger",
        "model.embed_tokens", "model.layers", "model.norm", "lm_head.weight",
    }  # fmt: skip
    assert names["new"] == {"model.visual", "model.language_model", "lm_head.weight"}
    assert {name.split(".")[0] for name in names["base"]} == {"visual", "language_model"}
    assert values["old"] == values["new"] == values["base"]
    assert "text_config" not in json.loads((tmp_path / "old/config.json").read_text())
    assert "text_config" in json.loads((tmp_path / "new/config.json").read_text())


def test_a_tensor_larger_than_the_pool() -> None:
    """72b's embedding table is 148 pools; no two rows of this one begin alike."""
    plan = tool.TensorPlan("w", "w", (10_000, 2048))
    values = np.frombuffer(b"".join(tool.random_values(plan, 0)), np.int16).reshape(plan.shape)
    assert len(np.unique(values[:, :8], axis=0)) == 10_000


def test_tokenizer_fits_the_config(folder: Path, tmp_path: Path) -> None:
    tokenizer, action_id = load_tokenizer(str(folder))
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == tool.model_config("tiny").video_token_id
    assert action_id < 512
    copied = tool.write_checkpoint(tmp_path / "copied", "tiny", tokenizer=folder)
    assert (copied / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_published_shapes_get_a_tokenizer_with_published_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "_write_weights", lambda *_, **__: None)
    made = tool.write_checkpoint(tmp_path / "model", "3b")
    tokenizer, action_id = load_tokenizer(str(made))
    text = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>é<|im_end|>"
    ids = tokenizer(text).input_ids
    assert [i for i in ids if i > 255] == [151644, 151652, 151656, 151653, 151645]
    assert tokenizer.decode(ids) == text
    assert 151656 < action_id < 151936
    with pytest.raises(ValueError, match="has ids up to 151656, the shape has 512 rows"):
        tool.write_checkpoint(tmp_path / "small", "tiny", tokenizer=made)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing half-written is left


def test_mistakes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is not empty"):
        tool.write_checkpoint(folder, "tiny")
    with pytest.raises(ValueError, match=r"legal: tiny \| tiny-untied \| mid \| 3b \| 7b \| 32b \| 72b"):
        tool.write_checkpoint(tmp_path / "new", "14b")
    with pytest.raises(ValueError, match=r"layout is 'odd'; legal: old \| new \| base"):
        tool.write_checkpoint(tmp_path / "new", "tiny", layout="odd")
    with pytest.raises(ValueError, match=r"shard_bytes is 0; it must be at least 1"):
        tool.write_checkpoint(tmp_path / "new", "tiny", shard_bytes=0)
    with pytest.raises(ValueError, match="is not a folder with a tokenizer"):
        tool.write_checkpoint(tmp_path / "new", "tiny", tokenizer=tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 10**9))
    with pytest.raises(ValueError, match=r"3b needs 7.6 GB, .* has 1.0 GB free"):
        tool.write_checkpoint(tmp_path / "new", "3b")
    assert not list(tmp_path.iterdir())
