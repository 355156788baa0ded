"""launch/evaluate.py and launch/predict.py as a user meets them: the same answer from any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import launch
from tests.support.clips import text_as_video
from tests.support.shards import make_shards
from vidcls.config import DEFAULT_PROMPT
from vidcls.data.labels import LabelSpace
from vidcls.data.loader import ClipBatches, Request
from vidcls.data.shards import ShardIndex
from vidcls.model.pretrained import (
    LABELS_NAME,
    PREPROCESSING_NAME,
    ModelSpec,
    build_encoder,
    build_model,
    load_model,
    save_model,
)

pytestmark = pytest.mark.launch

CLIPS = 26


@pytest.fixture(scope="module")
def checkpoint(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a run saves it. The weights are random, and so large that the clips' scores differ."""
    folder = tmp_path_factory.mktemp("evaluate") / "checkpoint-1"
    folder.mkdir()
    spec = ModelSpec(
        model_name_or_path="tiny",
        bf16=False,
        flash_attn="auto",
        lora_rank=2,
        lora_alpha=4,
        lora_dropout=0.1,
        prompt=DEFAULT_PROMPT,
        video_maxlen=4,
        video_min_pixels=784,
        video_max_pixels=3136,
        cutoff_len=512,
    )
    index = ShardIndex.open(small_shards)
    encoder = build_encoder(spec)
    model = build_model(
        spec, encoder, num_classes=len(index.labels), decoder_type="linear", mlp_hidden_size=None, seed=0
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters() if p.requires_grad
    }
    save_model(folder, model, spec, weights, encoder.tokenizer)
    index.labels.save(folder / LABELS_NAME)
    (folder / PREPROCESSING_NAME).write_text(json.dumps(index.settings.to_dict()), encoding="utf-8")
    return folder


def evaluate(ranks: int, checkpoint: Path, shards: Path, out: Path) -> None:
    words = ["launch/evaluate.py", checkpoint, "--data", shards, "--out", out, "--batch-size", 3]
    log = out.with_suffix(".log")
    done = launch.deepspeed(ranks, *words, log=log) if ranks > 1 else launch.run([launch.PYTHON, *words], log=log)
    assert done.code == 0, done.output[-4000:]
    assert f"{CLIPS} clips: top-1 " in done.output


@pytest.fixture(scope="module")
def evaluated(checkpoint: Path, small_shards: Path) -> dict[int, Path]:
    """The results from 1, 2 and 3 ranks; 26 clips in batches of 3 fill neither the last batch nor the last round."""
    folders = {ranks: checkpoint.parent / f"out{ranks}" for ranks in (1, 2, 3)}
    for ranks, out in folders.items():
        evaluate(ranks, checkpoint, small_shards, out)
    return folders


@pytest.fixture(scope="module")
def predictions(evaluated: dict[int, Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (evaluated[1] / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["eval.json", "predictions.jsonl"])
def test_the_files_are_the_same_bytes_at_any_rank_count(evaluated: dict[int, Path], ranks: int, name: str) -> None:
    assert (evaluated[ranks] / name).read_bytes() == (evaluated[1] / name).read_bytes()


def test_every_clip_counts_exactly_once(
    evaluated: dict[int, Path], predictions: list[dict[str, Any]], small_shards: Path
) -> None:
    assert [row["key"] for row in predictions] == list(ShardIndex.open(small_shards).keys)
    assert len({row["key"] for row in predictions}) == CLIPS
    assert json.loads((evaluated[3] / "eval.json").read_text())["seen"] == CLIPS


def test_the_numbers_are_those_of_one_clip_after_the_other(
    checkpoint: Path, small_shards: Path, evaluated: dict[int, Path], predictions: list[dict[str, Any]]
) -> None:
    index = ShardIndex.open(small_shards)
    model, encoder, spec = load_model(checkpoint)
    clips = ClipBatches(index, encoder, prompt=spec.prompt, max_frames=spec.video_maxlen)
    batches = [clips[Request((sample,))] for sample in range(CLIPS)]
    with torch.no_grad():
        logits_NC = torch.cat([model(**batch.model_inputs()) for batch in batches])
    labels_N = torch.cat([batch.labels_B for batch in batches])
    found = json.loads((evaluated[1] / "eval.json").read_text())
    hits_N = logits_NC.argmax(dim=-1) == labels_N
    assert found["top1"] == pytest.approx(hits_N.double().mean().item(), abs=1e-6)
    assert found["top5"] == 1
    recalls = [hits_N[labels_N == label].double().mean().item() for label in range(4)]
    assert found["mean_class_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-6)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits_NC, labels_N).item(), abs=1e-5)
    scores_NC = np.array([row["scores"] for row in predictions])
    np.testing.assert_allclose(scores_NC, logits_NC.softmax(dim=-1).numpy(), atol=5e-6)
    assert [row["label"] for row in predictions] == labels_N.tolist()
    assert [row["predicted"] for row in predictions] == logits_NC.argmax(dim=-1).tolist()
    assert scores_NC.std(axis=0).max() > 0.02  # else one clip's scores could pass for another's


def test_another_label_space_is_refused(checkpoint: Path, small_shards: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("up", "down"):
        (videos / name).symlink_to(small_shards.parent / "videos" / name)
    other = make_shards(videos, tmp_path / "shards", frames=4)
    words = [launch.PYTHON, "launch/evaluate.py", checkpoint, "--data", other, "--out", tmp_path / "out"]
    done = launch.run(words, log=tmp_path / "log")
    assert done.code == 2, done.output[-4000:]
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    for labels in (LabelSpace.load(checkpoint / LABELS_NAME), ShardIndex.open(other).labels):
        assert labels.fingerprint in line
    assert not (tmp_path / "out").exists()


def test_a_file_is_predicted_as_its_clip_was(
    checkpoint: Path, small_shards: Path, predictions: list[dict[str, Any]], tmp_path: Path
) -> None:
    """And a file that is no video costs its own answer only."""
    index = ShardIndex.open(small_shards)
    row = predictions[11]
    name = index.labels.names[row["label"]]
    video = small_shards.parent / "videos" / name / f"{row['key'].removeprefix(f'{name}_')}.mp4"
    broken = text_as_video(tmp_path / "broken.mp4")
    words = [launch.PYTHON, "launch/predict.py", checkpoint, broken, video, "--json", "--top", 4]
    done = launch.run(words, log=tmp_path / "log")
    assert done.code == 1, done.output[-4000:]
    assert "error: " in done.output
    assert str(broken) in done.output
    (answer,) = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    assert answer["video"] == str(video)
    scores = {entry["class"]: entry["score"] for entry in answer["top"]}
    assert [scores[name] for name in index.labels.names] == pytest.approx(row["scores"], abs=5e-6)
