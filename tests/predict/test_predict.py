"""Predicting files: one by one or many, and what is told of them."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

import vidcls
from tests.support import launch
from tests.support.checkpoints import make_checkpoint
from tests.support.clips import text_as_video
from vidcls.data.batch import PreparedClip
from vidcls.predict import videos as videos_module
from vidcls.predict.predictor import Prediction, Predictor
from vidcls.predict.videos import Job, Unreadable, decode_all, find_videos, read_list
from vidcls.sharding.decode import Clip, DecodeError


@pytest.fixture(scope="module")
def checkpoint(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("predict") / "checkpoint-1", {"default": small_shards})


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return vidcls.load(checkpoint)


@pytest.fixture
def mixed(small_shards: Path, tmp_path: Path) -> list[Path]:
    """Seven videos, the fourth of which is none."""
    found = sorted((small_shards.parent / "videos").rglob("*.mp4"))[:18:3]
    return [*found[:3], text_as_video(tmp_path / "broken.mp4"), *found[3:]]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (3, 2)])
def test_many_are_predicted_as_each_alone(
    predictor: Predictor, mixed: list[Path], batch_size: int, workers: int
) -> None:
    found = list(predictor.predict_many(mixed, batch_size=batch_size, workers=workers))
    assert [isinstance(each, Unreadable) for each in found] == [False] * 3 + [True] + [False] * 3
    assert str(mixed[3]) in found[3].reason
    for video, each in zip(mixed, found, strict=True):
        if isinstance(each, Prediction):
            assert each.video == str(video)
            alone = predictor.predict(video)
            assert [name for name, _ in each.ranked()] == [name for name, _ in alone]
            np.testing.assert_allclose([p for _, p in each.ranked()], [p for _, p in alone], atol=1e-5)
    with pytest.raises(DecodeError, match="broken"):
        predictor.predict(mixed[3])


def test_a_video_that_the_model_cannot_take_costs_itself_only(
    predictor: Predictor, mixed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than cutoff_len, say: training looked at its own clips only."""
    prepare = Predictor.prepare

    def refuse(self: Predictor, job: Job, clip: Clip) -> PreparedClip:
        if job.video == str(mixed[1]):
            raise ValueError("needs 900 tokens")
        return prepare(self, job, clip)

    monkeypatch.setattr(Predictor, "prepare", refuse)
    found = list(predictor.predict_many(mixed[:3], batch_size=3))
    assert [isinstance(each, Unreadable) for each in found] == [False, True, False]
    assert found[1] == Unreadable(f"{mixed[1]}: needs 900 tokens")


def crash(job: Job) -> None:
    os._exit(11)


def test_a_file_that_crashes_the_decoder_costs_itself_only(
    predictor: Predictor, mixed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos_module, "decode", crash)
    (found,) = decode_all([Job(str(mixed[0]), predictor.head.settings)], workers=1)
    assert isinstance(found, Unreadable)
    assert found.reason == f"{mixed[0]}: crashed its worker process (exit code 11)"


def test_lists_and_folders(mixed: list[Path], tmp_path: Path) -> None:
    folder = mixed[0].parents[1]
    assert find_videos(folder) == sorted(folder.rglob("*.mp4"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--folder: .* has no video files"):
        find_videos(tmp_path / "empty")
    (tmp_path / "named.csv").write_text(f"label,video\n3,{mixed[0]}\n4,broken.mp4\n")
    assert read_list(tmp_path / "named.csv") == [mixed[0], tmp_path / "broken.mp4"]
    (tmp_path / "plain.csv").write_text(f"{mixed[1]}\n\n{mixed[2]},more\n")
    assert read_list(tmp_path / "plain.csv") == [mixed[1], mixed[2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists no video"),
        ("video\n", "lists no video"),
        ("nowhere.mp4\n", "--csv: not a file: .*nowhere.mp4"),
        ("a,video\nx\n", "has no column 2"),
        (None, "cannot be read"),
    ],
)
def test_a_list_that_is_none(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "list.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "list.csv")


@pytest.mark.launch
def test_the_command(checkpoint: Path, predictor: Predictor, mixed: list[Path], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("".join(f"{video}\n" for video in mixed))
    words = [launch.PYTHON, "launch/predict.py", checkpoint, "--csv", tmp_path / "list.csv", "--top", 2]
    done = launch.run([*words, "--csv-out", tmp_path / "out.csv"], log=tmp_path / "log")
    assert done.code == 1, done.output[-3000:]
    assert f"error: {mixed[3]}" in done.output
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["video"], row["rank"]) for row in rows] == [
        (str(video), rank) for video in mixed if video != mixed[3] for rank in ("1", "2")
    ]
    best = predictor.predict(mixed[0])[0]
    assert (rows[0]["class"], float(rows[0]["score"])) == (best[0], pytest.approx(best[1], abs=1e-5))
    assert f"{best[1]:6.1%}  {'#' * round(30 * best[1]):30}  {best[0]}" in done.output


@pytest.mark.launch
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "VIDEO, --folder, --csv: give one of them"),
        (["x.mp4"], "VIDEO: not a file: x.mp4"),
        (["--folder", "tests/predict", "--stride", "1"], "has no video files"),
    ],
)
def test_wrong_arguments(checkpoint: Path, words: list[str], message: str, tmp_path: Path) -> None:
    done = launch.run([launch.PYTHON, "launch/predict.py", checkpoint, *words], log=tmp_path / "log")
    assert done.code == 2, done.output
    assert message in done.output


def test_a_timeline_of_a_short_video_is_one_window(predictor: Predictor, mixed: list[Path]) -> None:
    """And it says what predicting the whole file says."""
    found, bad = list(predictor.timelines([mixed[0], mixed[3]], window=100, stride=50))
    assert isinstance(bad, Unreadable)
    assert not isinstance(found, Unreadable)
    (window,) = found.windows
    (whole,) = predictor.predict_many([mixed[0]])
    assert isinstance(whole, Prediction)
    np.testing.assert_allclose(window.scores_C, whole.scores_C, atol=1e-6)
    assert json.dumps(found.to_dict(3))
