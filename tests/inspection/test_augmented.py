"""The picture of augmented clips: real pixels, the labels that training gets, and the clips worth looking at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.shards import make_shards
from tools.make_motion_clips import make_motion_clips
from vidcls.config import Config, config_from_values
from vidcls.data.augment import AugmentSettings
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice, Request
from vidcls.data.mirror import mirror_of
from vidcls.inspection.augmented import GAP, MARGIN, TITLE, _fitting, _Sizes, choose, draw_augmented

ROOT = Path(__file__).parents[2]
SIZE = 56


def recipe(shards: Path, **values: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": "tiny",
        "dataset": str(shards),
        "output_dir": "out",
        "per_device_train_batch_size": 1,
        "deepspeed": str(ROOT / "ds_configs/zero2.json"),
        "video_maxlen": 4,
        "seed": 5,
        **values,
    }


def rows_of(picture: Path, frames: int) -> list[np.ndarray]:
    """Frames uint8 [T, H, W, 3] of every row, read back from the picture of frames of 56x56, drawn twice as large."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    side, rows, top = 2 * SIZE, [], MARGIN + TITLE
    while top + side <= len(pixels):
        row = pixels[top : top + side, MARGIN : MARGIN + frames * (side + GAP)].reshape(side, frames, side + GAP, 3)
        large = row[:, :, :side].swapaxes(0, 1)
        assert (large == large[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2)).all(), "each pixel is a square"
        rows.append(large[:, ::2, ::2])
        top += side + TITLE + (MARGIN if len(rows) % 4 == 0 else 0)
    return rows


def config(shards: Path, **values: Any) -> Config:
    return config_from_values(recipe(shards, **values))


def test_flipped_clips_are_drawn_mirrored_pixel_for_pixel(small_shards: Path, tmp_path: Path) -> None:
    assert draw_augmented(tmp_path / "out.png", small_shards, config(small_shards, horizontal_flip=1.0)) == 4
    rows = rows_of(tmp_path / "out.png", 4)
    assert len(rows) == 4 * 4
    for first in range(0, 16, 4):
        for epoch in range(3):
            np.testing.assert_array_equal(rows[first + 1 + epoch], rows[first][:, :, ::-1])


def test_rows_are_what_training_reads(small_shards: Path, tmp_path: Path) -> None:
    changes = {"random_resized_crop": 0.4, "color_jitter": 0.5, "mixup_alpha": 1.0, "horizontal_flip": 0.5}
    draw_augmented(tmp_path / "out.png", small_shards, config(small_shards, **changes))
    rows = rows_of(tmp_path / "out.png", 4)
    index = ShardIndex.open(small_shards)
    mirror = mirror_of(index.labels)
    source = ClipSource(index, "", augment=AugmentSettings(**changes), mirror=mirror, ids=np.arange(26))
    clips = ClipBatches([source], _Sizes(784, 128**2, 128**2), FrameChoice(4), seed=5)
    for number, sample in enumerate(choose(index.label, mirror)):
        for epoch in range(3):
            batch = clips.read(Request((sample,), epochs=(epoch,)))
            np.testing.assert_array_equal(rows[4 * number + 1 + epoch].ravel(), batch.frames.numpy())


def test_a_picture_that_cannot_be_drawn_leaves_the_last_one(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_augmented(tmp_path / "out.png", small_shards, config(small_shards))
    before = (tmp_path / "out.png").read_bytes()

    def fail(self: Image.Image, out: Path, **options: Any) -> None:
        Path(out).write_bytes(before[:50])
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_augmented(tmp_path / "out.png", small_shards, config(small_shards, horizontal_flip=1.0))
    assert (tmp_path / "out.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_classes_that_swap_come_first_when_flips_are_on() -> None:
    # up, left, right, only left, down, and a class without clips
    mirror = np.array([0, 2, 1, -1, 4, 5])
    label = np.array([0, 0, 1, 2, 2, 2, 3, 4])
    assert label[choose(label, mirror)].tolist() == [1, 2, 3, 0, 4]
    assert label[choose(label, None)].tolist() == [0, 1, 2, 3, 4]
    assert len(choose(np.arange(100), np.arange(100))) == 6
    swapped = np.arange(100)[::-1]
    assert choose(np.arange(100), swapped)[:4] == [0, 99, 1, 98]


def test_names_from_a_data_set_cannot_break_the_picture(tmp_path: Path) -> None:
    videos = make_motion_clips(tmp_path / "videos", 1, frames=4, size=56)
    (videos / "left").rename(videos / ("turn left\nnew line \u202e" + "x" * 150))
    shards = make_shards(videos, tmp_path / "shards", frames=4)
    draw_augmented(tmp_path / "out.png", shards, config(shards, mixup_alpha=1.0))
    assert len(rows_of(tmp_path / "out.png", 4)) == 16


def test_titles_are_cut_to_the_picture() -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(12)
    assert isinstance(font, ImageFont.FreeTypeFont)
    cut = _fitting("a long title " * 20, font, 100)
    assert cut.startswith("a long")
    assert cut.endswith("…")
    assert 80 < font.getlength(cut) <= 100
    assert _fitting("short\n", font, 100) == "short\ufffd"


@pytest.mark.launch
def test_the_tool_draws_and_answers_mistakes(small_shards: Path, tmp_path: Path) -> None:
    def run(*options: object) -> tuple[int, str, str]:
        command = [sys.executable, ROOT / "tools/inspect_shards.py", small_shards, *options]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump(recipe(small_shards, rand_augment=[2, 9])))
    bad.write_text(yaml.safe_dump(recipe(small_shards, horizontal_flop=0.5)))
    code, out, err = run("--augmented", good, "--out", "seen.png")
    assert (code, err) == (0, "")
    assert "as trained on: seen.png, 4 clips" in out
    assert Image.open(tmp_path / "seen.png").format == "PNG"
    code, _, err = run("--augmented", bad)
    assert code == 2
    assert "horizontal_flop: unknown option; did you mean 'horizontal_flip'?" in err
    code, _, err = run("--out", "seen.png")
    assert code == 2
    assert "--out goes with --augmented" in err
