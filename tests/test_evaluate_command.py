"""launch/evaluate.py and launch/predict.py as a user meets them: the same answer from any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import launch
from tests.support.checkpoints import make_checkpoint
from tests.support.clips import text_as_video
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice, Request
from vidcls.faults.exits import Exit
from vidcls.model.pretrained import load_model

pytestmark = pytest.mark.launch

CLIPS = 26
FILES = ("eval.json", "predictions.jsonl", "classes.csv", "confusion.csv", "mistakes.json")


@pytest.fixture(scope="module")
def checkpoint(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It takes two of the four frames that the shards hold."""
    folder = tmp_path_factory.mktemp("evaluate") / "checkpoint-1"
    return make_checkpoint(folder, {"default": small_shards}, video_maxlen=2)


@pytest.fixture(scope="module")
def two_heads(small_shards: Path, up_down: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a head for each of two data sets; the one with fewer classes is the second."""
    return make_checkpoint(tmp_path_factory.mktemp("two") / "checkpoint-1", {"all": small_shards, "some": up_down})


def evaluate(ranks: int, micro: int, checkpoint: Path, shards: Path, out: Path, *more: object) -> None:
    words = ["launch/evaluate.py", checkpoint, "--data", shards, "--out", out, "--batch-size", micro, *more]
    log = out.with_suffix(".log")
    done = launch.deepspeed(ranks, *words, log=log) if ranks > 1 else launch.run([launch.PYTHON, *words], log=log)
    assert done.code == 0, done.output[-4000:]
    assert f"{CLIPS} clips: top-1 " in done.output


@pytest.fixture(scope="module")
def evaluated(checkpoint: Path, small_shards: Path) -> dict[int, Path]:
    """The results from 1, 2 and 3 ranks; 26 clips in batches of 3 or 4 fill no last batch and no last round."""
    folders = {ranks: checkpoint.parent / f"out{ranks}" for ranks in (1, 2, 3)}
    for (ranks, out), micro in zip(folders.items(), (1, 4, 3), strict=True):
        evaluate(ranks, micro, checkpoint, small_shards, out)
    return folders


@pytest.fixture(scope="module")
def predictions(evaluated: dict[int, Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (evaluated[1] / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", FILES)
def test_the_files_are_the_same_bytes_at_any_rank_count_and_micro_batch(
    evaluated: dict[int, Path], ranks: int, name: str
) -> None:
    assert sorted(path.name for path in evaluated[ranks].iterdir()) == sorted(FILES)
    assert (evaluated[ranks] / name).read_bytes() == (evaluated[1] / name).read_bytes()


def test_several_views_too(checkpoint: Path, small_shards: Path, evaluated: dict[int, Path], tmp_path: Path) -> None:
    views = ["--segments", 2, "--crops", 3]
    evaluate(1, 4, checkpoint, small_shards, tmp_path / "one", *views)
    evaluate(3, 1, checkpoint, small_shards, tmp_path / "three", *views)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    found = json.loads((tmp_path / "one" / "eval.json").read_text())
    assert found["views"] == {"segments": 2, "crops": 3}
    assert found["seen"] == CLIPS
    before = (evaluated[1] / "predictions.jsonl").read_text()
    assert (tmp_path / "one" / "predictions.jsonl").read_text() != before


def test_a_clip_that_cannot_be_read_is_listed_and_told(checkpoint: Path, small_shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    tar = sorted(shards.glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 0xFF
    tar.write_bytes(content)
    words = [launch.PYTHON, "launch/evaluate.py", checkpoint, "--data", shards, "--out", tmp_path / "out"]
    done = launch.run([*words, "--shuffle-frames"], log=tmp_path / "log")
    assert done.code == Exit.DATA, done.output[-3000:]
    (missing,) = [json.loads(line) for line in (tmp_path / "out" / "missing.jsonl").read_text().splitlines()]
    assert f"missing: {missing['key']}: " in done.output
    assert tar.name in missing["reason"]
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (found["seen"], found["missing"], found["control"]) == (CLIPS - 1, 1, "shuffled")
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {*ShardIndex.open(small_shards).keys} - {missing["key"]}


def test_segments_that_would_all_be_the_same_are_refused(two_heads: Path, small_shards: Path, tmp_path: Path) -> None:
    words = [launch.PYTHON, "launch/evaluate.py", two_heads, "--data", small_shards, "--out", tmp_path / "out"]
    done = launch.run([*words, "--segments", 2], log=tmp_path / "log")
    assert done.code == 2, done.output[-3000:]
    assert "error: --segments: 2 views would be one and the same" in done.output


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
    clips = ClipBatches([ClipSource(index, spec.prompts["default"])], encoder, FrameChoice(spec.video_maxlen))
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


def test_another_label_space_is_refused(checkpoint: Path, small_shards: Path, up_down: Path, tmp_path: Path) -> None:
    words = [launch.PYTHON, "launch/evaluate.py", checkpoint, "--data", up_down, "--out", tmp_path / "out"]
    done = launch.run(words, log=tmp_path / "log")
    assert done.code == 2, done.output[-4000:]
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    for place in (small_shards, up_down):
        assert ShardIndex.open(place).labels.fingerprint in line
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


def test_of_two_heads_the_one_with_the_shards_classes_is_evaluated(
    two_heads: Path, up_down: Path, tmp_path: Path
) -> None:
    """On two ranks, one of which has nothing to do in the last round; and beside what each head alone says."""
    words = ["launch/evaluate.py", two_heads, "--data", up_down, "--batch-size", 5]
    done = launch.deepspeed(2, *words, log=tmp_path / "log")
    assert done.code == 0, done.output[-4000:]
    out = two_heads / "evaluation" / "some"
    assert f"head some: 13 clips: top-1 {json.loads((out / 'eval.json').read_text())['top1']:.4f}" in done.output
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    index = ShardIndex.open(up_down)
    assert [row["key"] for row in rows] == list(index.keys)
    model, encoder, spec = load_model(two_heads)
    clips = ClipBatches([ClipSource(index, spec.prompts["some"], head=1)], encoder, FrameChoice(4))
    heard: list[torch.Tensor] = []
    model.heads["some"].register_forward_hook(lambda _module, _inputs, output: heard.append(output))
    with torch.no_grad():
        for sample in range(13):
            model(**clips[Request((sample,))].model_inputs())
    scores_NC = torch.cat(heard).softmax(dim=-1).numpy()
    np.testing.assert_allclose(np.array([row["scores"] for row in rows]), scores_NC, atol=5e-6)
    assert {row["predicted_name"] for row in rows} <= {"up", "down"}


def test_prediction_stays_inside_the_head_that_is_named(two_heads: Path, small_shards: Path, tmp_path: Path) -> None:
    video = small_shards.parent / "videos" / "left" / "clip_0000.mp4"
    words = [launch.PYTHON, "launch/predict.py", two_heads, video, "--json"]
    done = launch.run(words, log=tmp_path / "log")
    assert done.code == 2, done.output[-4000:]
    assert "error: --head: the checkpoint has several heads, give one: all (4 classes), some (2 classes)" in done.output
    done = launch.run([*words, "--head", "some"], log=tmp_path / "log")
    assert done.code == 0, done.output[-4000:]
    (answer,) = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    assert {entry["class"] for entry in answer["top"]} == {"up", "down"}
    assert sum(entry["score"] for entry in answer["top"]) == pytest.approx(1, abs=2e-6)
