"""An export says what the checkpoint says: read by vidcls, and by transformers and peft without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

import vidcls
from tests.support.checkpoints import make_checkpoint
from tests.support.usable import card_code, difference, own
from tools.make_random_checkpoint import write_checkpoint
from vidcls.data.labels import LabelSpace, LabelSpaceError
from vidcls.data.settings import DecodeSettings
from vidcls.export.folder import export_checkpoint
from vidcls.manifest import CheckpointError, seal
from vidcls.model.heads import ActionDecoder
from vidcls.model.pretrained import load_model
from vidcls.model.tuning import TuningSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "base", "tiny")


@pytest.fixture(scope="module")
def videos(small_shards: Path) -> list[Path]:
    return sorted((small_shards.parent / "videos").rglob("*.mp4"))[::9]


DENSE = {"frame_sampling": "dense", "dense_stride": 2}
SETTINGS = {
    "area": DecodeSettings(frames=6, short_side=None, max_pixels=56 * 84),
    "rate": DecodeSettings(frames=None, fps=4, max_frames=8, short_side=70),
    "fewer frames than the model takes": DecodeSettings(frames=3, short_side=56),
    "webp": DecodeSettings(frames=4, short_side=56, codec="webp", quality=80),
    "png": DecodeSettings(frames=4, short_side=56, codec="png", quality=None),
}


@pytest.mark.parametrize(
    ("settings", "decoder_type", "changes"),
    [
        *((settings, "linear", {}) for settings in SETTINGS.values()),
        (None, "attention", {}),
        (None, "linear", {"prompts": {"default": "Is <|im_end|> or <|video_pad|> text? <video> And? <ACTION>"}}),
        (DecodeSettings(frames=8, short_side=56), "linear", DENSE),
        (DecodeSettings(frames=None, fps=4, max_frames=8, short_side=56), "linear", {**DENSE, "video_maxlen": 2}),
        (DecodeSettings(frames=4, short_side=84), "linear", {"video_maxlen": 1, "image_max_pixels": 28 * 56}),
    ],
    ids=[*SETTINGS, "attention", "special tokens as text", "dense", "dense at a rate", "one frame"],
)
def test_the_code_of_the_card_does_as_vidcls_does(
    settings: DecodeSettings | None,
    decoder_type: str,
    changes: dict[str, Any],
    base: Path,
    small_shards: Path,
    videos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = make_checkpoint(
        tmp_path / "checkpoint-1",
        {"default": small_shards},
        decoder_type=decoder_type,
        settings=settings,
        model_name_or_path=str(base),
        **changes,
    )
    export_checkpoint(checkpoint, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    code = card_code(tmp_path / "out")
    found = []
    for video in videos:
        names: dict[str, Any] = {}
        exec(code.replace('"clip.mp4"', repr(str(video))), names)
        found.append(names["logits"].double().log_softmax(-1)[0].tolist())
    assert difference(found, own(checkpoint, videos)) < 1e-4


@pytest.mark.parametrize("finetuning_type", ["lora", "freeze"])
def test_peft_alone_has_the_row_of_action(finetuning_type: str, base: Path, small_shards: Path, tmp_path: Path) -> None:
    tuning = TuningSettings(finetuning_type=finetuning_type, lora_rank=2)
    checkpoint = make_checkpoint(
        tmp_path / "checkpoint-1", {"default": small_shards}, model_name_or_path=str(base), tuning=tuning
    )
    export_checkpoint(checkpoint, tmp_path / "out")
    plain = AutoModel.from_pretrained(base, dtype=torch.float32)
    before = plain.get_input_embeddings().weight.clone()
    model: Any = PeftModel.from_pretrained(plain, tmp_path / "out")
    _, encoder, _ = load_model(checkpoint)
    ids = torch.tensor([[5, encoder.action_token_id]])
    rows = model.get_input_embeddings()(ids)[0]
    assert torch.equal(rows[0], before[5])
    assert torch.equal(rows[1], load_file(checkpoint / "action_token.safetensors")["weight"])
    assert not torch.equal(rows[1], before[encoder.action_token_id])


@pytest.mark.parametrize(
    "tuning",
    [
        TuningSettings(lora_rank=2, vision_tuning="lora", merger_tuning="lora"),
        TuningSettings(lora_rank=2, use_dora=True),
        TuningSettings(finetuning_type="full", vision_tuning="lora", lora_rank=2),
        TuningSettings(finetuning_type="freeze"),
    ],
    ids=["lora everywhere", "dora", "full and lora", "nothing"],
)
def test_merged_weights_do_the_same(
    tuning: TuningSettings, base: Path, small_shards: Path, videos: list[Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(
        tmp_path / "checkpoint-1", {"default": small_shards}, model_name_or_path=str(base), tuning=tuning
    )
    export_checkpoint(checkpoint, tmp_path / "out", merge=True)
    assert difference(own(tmp_path / "out", videos), own(checkpoint, videos)) < 1e-4
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")  # it is its own base model, wherever it is
    assert difference(own(tmp_path / "elsewhere", videos), own(checkpoint, videos)) < 1e-4


def test_bf16_weights_are_merged_in_fp32_and_rounded_once(base: Path, small_shards: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint-1", {"default": small_shards}, model_name_or_path=str(base))
    export_checkpoint(checkpoint, tmp_path / "out", merge=True, dtype="bf16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    layer = "language_model.layers.1.mlp.up_proj"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    before = AutoModel.from_pretrained(base, dtype=torch.float32).get_submodule(layer).weight
    expected = (before + 4 / 2 * b @ a).to(torch.bfloat16)  # alpha 4, rank 2
    (name,) = (name for name in stored if name.endswith("layers.1.mlp.up_proj.weight"))
    assert torch.equal(stored[name], expected)


def test_an_adapter_in_another_dtype(base: Path, small_shards: Path, videos: list[Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint-1", {"default": small_shards}, model_name_or_path=str(base))
    export_checkpoint(checkpoint, tmp_path / "out", dtype="bf16")
    files = list((tmp_path / "out").rglob("*.safetensors"))
    assert len(files) == 3
    assert {tensor.dtype for path in files for tensor in load_file(path).values()} == {torch.bfloat16}
    assert difference(own(tmp_path / "out", videos), own(checkpoint, videos)) < 1.0  # random weights are large
    assert "torch.bfloat16" in card_code(tmp_path / "out")


def test_several_heads(base: Path, small_shards: Path, up_down: Path, videos: list[Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(
        tmp_path / "checkpoint-1", {"all": small_shards, "some": up_down}, model_name_or_path=str(base)
    )
    export_checkpoint(checkpoint, tmp_path / "out")
    for head in ("all", "some"):
        assert own(tmp_path / "out", videos, head=head) == own(checkpoint, videos, head=head)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Head `all`: 4 classes" in card
    assert "Head `some`: 2 classes" in card


def test_the_card_tells_scores_data_and_base(base: Path, small_shards: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint-1", {"default": small_shards}, model_name_or_path=str(base))
    (checkpoint / "evaluation").mkdir()
    scores = {"top1": 0.5, "top5": 1.0, "mean_class_accuracy": 0.25, "loss": 1.5, "seen": 26}
    (checkpoint / "evaluation" / "eval.json").write_text(json.dumps(scores))
    (checkpoint / "config.yaml").write_text("dataset: motion\nlearning_rate: 0.01\n")
    export_checkpoint(checkpoint, tmp_path / "out", base_name="Qwen/Qwen2.5-VL-3B-Instruct")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert "| evaluation | 26 | 0.5000 | 1.0000 | 0.2500 | 1.5000 |" in card
    assert "- data: motion" in card
    assert "- learning_rate: 0.01" in card
    assert "licence" in card
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    # A card is there to be written in, and an export may be evaluated again; the model is what it is.
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    (tmp_path / "out" / "evaluation" / "eval.json").write_text(json.dumps({**scores, "control": "single"}))
    vidcls.load(tmp_path / "out")
    with (tmp_path / "out" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        vidcls.load(tmp_path / "out")
    shutil.copyfile(tmp_path / "out" / "evaluation" / "eval.json", checkpoint / "evaluation" / "eval.json")
    export_checkpoint(checkpoint, tmp_path / "controlled")
    assert "Not evaluated before the export." in (tmp_path / "controlled" / "README.md").read_text()


def test_what_cannot_be_exported_is_named_and_leaves_nothing(base: Path, small_shards: Path, tmp_path: Path) -> None:
    def checkpoint(name: str, **changes: Any) -> Path:
        changes.setdefault("model_name_or_path", str(base))
        return make_checkpoint(tmp_path / name / "checkpoint-1", {"default": small_shards}, **changes)

    out = tmp_path / "exports" / "out"
    whole = checkpoint("whole")
    with pytest.raises(ValueError, match="--merge: the built-in model 'tiny' has no files"):
        export_checkpoint(checkpoint("tiny", model_name_or_path="tiny"), out)
    with pytest.raises(ValueError, match=r"backbone\.safetensors holds whole weights that were trained"):
        export_checkpoint(checkpoint("full", tuning=TuningSettings(finetuning_type="full")), out)
    other = write_checkpoint(tmp_path / "other", "tiny", seed=1)
    with pytest.raises(ValueError, match="holds other weights than the base model of"):
        export_checkpoint(whole, out, base=str(other))
    with pytest.raises(ValueError, match=r"base/nowhere'; it must be|base/nowhere"):
        export_checkpoint(whole, out, base=str(base / "nowhere"))
    headless = checkpoint("headless")
    (headless / "heads" / "default" / "label_map.json").unlink()
    with pytest.raises(ValueError, match=r"label_map\.json"):
        export_checkpoint(headless, out)
    foreign = checkpoint("foreign")
    LabelSpace(("a", "b")).save(foreign / "heads" / "default" / "label_map.json")
    seal(foreign)  # whole, as far as digests tell
    with pytest.raises(LabelSpaceError, match=r"head 'default' has 4 classes, and its label map 2 \(fingerprint "):
        export_checkpoint(foreign, out)
    with pytest.raises(LabelSpaceError, match="one of them is of another model"):
        vidcls.load(foreign)
    old = checkpoint("old")
    ActionDecoder(64, 4).save_pretrained(old / "heads" / "default")
    seal(old)
    with pytest.raises(ValueError, match=r"head default has hidden size 64; the backbone's is 128"):
        export_checkpoint(old, out)
    assert not out.parent.exists() or not list(out.parent.iterdir())
    out.mkdir(parents=True)
    (out / "mine").touch()
    with pytest.raises(ValueError, match=r"--out: .* is there already"):
        export_checkpoint(whole, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
