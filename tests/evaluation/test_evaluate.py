"""Evaluation of one head among several, of all clips and of some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from tests.support.checkpoints import make_checkpoint
from tests.support.shards import make_shards
from vidcls.data.batch import Batch
from vidcls.data.codecs import FrameError
from vidcls.data.frames import Views
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice, Request
from vidcls.evaluation.evaluate import class_scores, evaluate, predict_batches
from vidcls.model.classifier import ActionClassifier
from vidcls.model.pretrained import load_model

FRAMES = FrameChoice(4)
HEADS = ("four", "two")
pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def indexes(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ShardIndex]:
    """26 clips in 4 classes, and 13 in 2 of them."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("up", "down"):
        (folder / "videos" / name).parent.mkdir(exist_ok=True)
        (folder / "videos" / name).symlink_to(small_shards.parent / "videos" / name)
    two = make_shards(folder / "videos", folder / "shards", frames=4)
    return [ShardIndex.open(small_shards), ShardIndex.open(two)]


@pytest.fixture(scope="module")
def loaded(indexes: list[ShardIndex], tmp_path_factory: pytest.TempPathFactory) -> tuple:
    places = {name: Path(index.folder.name) for name, index in zip(HEADS, indexes, strict=True)}
    return load_model(make_checkpoint(tmp_path_factory.mktemp("heads") / "checkpoint-1", places))


@pytest.fixture
def model(loaded: tuple) -> ActionClassifier:
    return loaded[0]


def clips_of(number: int, indexes: list[ShardIndex], loaded: tuple, most: int = 4, **options: Any) -> ClipBatches:
    prompt = list(loaded[2].prompts.values())[number]
    return ClipBatches([ClipSource(indexes[number], prompt, number)], loaded[1], FrameChoice(most), **options)


def own_scores(model: ActionClassifier, head: str, batches: list[Batch]) -> np.ndarray:
    """Softmax of what one head alone says, clip after clip."""
    heard: list[torch.Tensor] = []
    hook = model.heads[head].register_forward_hook(lambda _module, _inputs, output: heard.append(output))
    with torch.no_grad():
        for batch in batches:
            model(**batch.model_inputs())
    hook.remove()
    return torch.cat(heard).double().softmax(dim=-1).numpy()


@pytest.mark.parametrize("number", [0, 1])
def test_scores_are_a_distribution_over_the_own_heads_classes(
    indexes: list[ShardIndex], loaded: tuple, model: ActionClassifier, number: int
) -> None:
    index, clips = indexes[number], clips_of(number, indexes, loaded)
    done = evaluate(model, clips, micro=5, workers=0)
    metrics, predictions = done.metrics, done.predictions
    expected_NC = own_scores(model, HEADS[number], [clips[Request((i,))] for i in range(len(index))])
    found_NC = np.stack([prediction.scores for prediction in predictions])
    assert found_NC.shape == (len(index), len(index.labels)) == expected_NC.shape
    np.testing.assert_allclose(found_NC.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(found_NC, expected_NC, atol=1e-5)
    assert metrics.seen == len(index)
    assert metrics.top1 == pytest.approx(accuracy_score(index.label, expected_NC.argmax(axis=1)))
    assert metrics.loss == pytest.approx(log_loss(index.label, expected_NC), abs=1e-5)


def test_rows_of_two_heads_in_one_batch_keep_their_own_scores(
    indexes: list[ShardIndex], loaded: tuple, model: ActionClassifier
) -> None:
    four, two = (clips_of(number, indexes, loaded)[Request((3,))] for number in (0, 1))
    sources = [
        ClipSource(index, prompt, number)
        for number, (index, prompt) in enumerate(zip(indexes, loaded[2].prompts.values(), strict=True))
    ]
    both = ClipBatches(sources, loaded[1], FRAMES)[Request((3, 3), (0, 1))]
    with torch.no_grad():
        logits_BC = model(**both.model_inputs())
    assert class_scores(logits_BC[1:], 2)[0].numpy() == pytest.approx(own_scores(model, "two", [two])[0], abs=1e-5)
    assert class_scores(logits_BC[:1], 4)[0].numpy() == pytest.approx(own_scores(model, "four", [four])[0], abs=1e-5)


def test_more_classes_than_the_head_has_are_no_scores_of_zero(
    indexes: list[ShardIndex], loaded: tuple, model: ActionClassifier
) -> None:
    clips = clips_of(1, indexes, loaded)
    with pytest.raises(RuntimeError, match=f"{indexes[1].keys[0]}.*each of its 4 classes"):
        predict_batches(model, [clips[Request((0, 1))]], 4)
    with pytest.raises(RuntimeError, match="each of its 5 classes"):
        predict_batches(model, [clips[Request((0, 1))]], 5)


@pytest.mark.parametrize(("micro", "workers"), [(1, 0), (4, 0), (4, 2)])
def test_some_clips_only(
    indexes: list[ShardIndex], loaded: tuple, model: ActionClassifier, micro: int, workers: int
) -> None:
    ids = np.array([1, 2, 9, 10, 17, 25])
    clips = clips_of(0, indexes, loaded)
    heard: list[int] = []
    done = evaluate(model, clips, ids=ids, micro=micro, workers=workers, done=heard.append)
    metrics, predictions = done.metrics, done.predictions
    assert [prediction.key for prediction in predictions] == [indexes[0].keys[i] for i in ids]
    assert [prediction.label for prediction in predictions] == indexes[0].label[ids].tolist()
    expected_NC = own_scores(model, "four", [clips[Request((int(i),))] for i in ids])
    np.testing.assert_allclose(np.stack([p.scores for p in predictions]), expected_NC, atol=1e-5)
    assert metrics.seen == sum(heard) == 6
    assert metrics.top1 == pytest.approx(accuracy_score(indexes[0].label[ids], expected_NC.argmax(axis=1)))


def test_a_padding_batch_counts_for_nothing(indexes: list[ShardIndex], loaded: tuple, model: ActionClassifier) -> None:
    clips = clips_of(0, indexes, loaded)
    assert predict_batches(model, [clips[Request((0,), weight=0.0)]], 4) == ([], {})


def test_a_padding_batch_does_not_tell_of_its_clip_again(
    indexes: list[ShardIndex], loaded: tuple, model: ActionClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another rank: it reads the first clip, which may be one that cannot be read."""

    def refuse(*_: Any) -> Any:
        raise FrameError("cut short")

    monkeypatch.setattr(ClipBatches, "_read_frames", refuse)
    clips = clips_of(0, indexes, loaded, skip_bad=True)
    assert predict_batches(model, [clips[Request((0,), weight=0.0)]], 4) == ([], {})
    assert predict_batches(model, [clips[Request((0,))]], 4) == ([], {indexes[0].keys[0]: "cut short"})


def test_clips_that_were_not_seen_are_an_error(
    indexes: list[ShardIndex], loaded: tuple, model: ActionClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = clips_of(0, indexes, loaded)
    monkeypatch.setattr("vidcls.evaluation.evaluate.evaluation_requests", lambda *_: [Request((0, 1)), Request((1,))])
    with pytest.raises(RuntimeError, match=r"saw 3 clips \(2 different\), there are 3"):
        evaluate(model, clips, ids=np.array([0, 1, 2]), micro=2, workers=0)


@pytest.mark.parametrize("views", [Views(), Views(segments=2, crops=3)], ids=["one view", "six views"])
def test_no_number_depends_on_the_batch(
    views: Views, indexes: list[ShardIndex], loaded: tuple, model: ActionClassifier
) -> None:
    """In fp32, to the last bit: what else is in a batch changes the order of summation in a matrix product."""
    clips = clips_of(0, indexes, loaded, most=2, views=views)
    found = [evaluate(model, clips, micro=micro, workers=0).predictions for micro in (1, 4, 7)]
    for others in found[1:]:
        assert [each.key for each in others] == [each.key for each in found[0]]
        assert all(np.array_equal(one.scores, other.scores) for one, other in zip(found[0], others, strict=True))


def test_views_are_averaged_clip_by_clip(indexes: list[ShardIndex], loaded: tuple, model: ActionClassifier) -> None:
    views = Views(segments=2, crops=3)
    clips = clips_of(0, indexes, loaded, most=2, views=views)
    found = evaluate(model, clips, ids=np.array([3, 8, 20]), micro=2, workers=0).predictions
    for prediction, sample in zip(found, (3, 8, 20), strict=True):
        asked = [Request((sample,), segment=segment, crop=crop) for segment, crop in views.numbered()]
        single = [own_scores(model, "four", [clips[request]])[0] for request in asked]
        assert len(single) == 6
        np.testing.assert_allclose(prediction.scores, np.mean(single, axis=0), atol=1e-6)
        assert np.std(single, axis=0).max() > 1e-3  # else any view could pass for their mean


def test_a_clip_that_cannot_be_read_is_missing_and_nothing_takes_its_place(
    indexes: list[ShardIndex], loaded: tuple, model: ActionClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = clips_of(0, indexes, loaded, most=2, skip_bad=True, views=Views(segments=2))
    whole = evaluate(model, clips, micro=4, workers=0)
    read = ClipBatches._read_frames

    def refuse(self: ClipBatches, row: Any, out: np.ndarray) -> Any:
        if row.sample == 5 and row.segment == 1:  # one of its views is enough
            raise FrameError("cut short")
        return read(self, row, out)

    monkeypatch.setattr(ClipBatches, "_read_frames", refuse)
    found = evaluate(model, clips, micro=4, workers=0)
    key = indexes[0].keys[5]
    assert found.missing == {key: "cut short"}
    assert found.metrics.seen == len(indexes[0]) - 1
    kept = [each for each in whole.predictions if each.key != key]
    assert [each.key for each in found.predictions] == [each.key for each in kept]
    assert all(np.array_equal(one.scores, two.scores) for one, two in zip(found.predictions, kept, strict=True))
    monkeypatch.setattr(ClipBatches, "_read_frames", lambda *_: (_ for _ in ()).throw(FrameError("gone")))
    with pytest.raises(FrameError, match="none of 26 clips can be read"):
        evaluate(model, clips, micro=4, workers=0)
