from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidcls.inspection.charts import draw
from vidcls.inspection.overview import Overview


def overview(counts: list[int], names: list[str]) -> Overview:
    return Overview(
        place="$x$",
        digest="",
        clips=sum(counts),
        failed=0,
        damaged=0,
        classes=tuple(names),
        per_class=tuple(counts),
        shards=1,
        bytes=1,
        settings={},
        decoders={},
        frame_counts=tuple((i, i) for i in range(2, 60, 2)),
        frame_sizes=(((128, 170), 7), ((128, 228), 2)),
        prompts=0,
        first_prompts=(),
        without_prompt=0,
    )


@pytest.mark.parametrize("classes", [1, 174, 1000])
def test_png_whatever_the_number_of_classes(tmp_path: Path, classes: int) -> None:
    names = [f"$\\frac{{{i}}}$ <b> {'long ' * 20}" for i in range(classes)]  # no TeX, no markup
    draw(overview([i + 1 for i in range(classes)], names), tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG"
        assert 600 < image.height < 4500
        assert image.width == 1430
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_longest_bar_is_the_largest_class(tmp_path: Path) -> None:
    draw(overview([1, 8, 2], ["a", "b", "c"]), tmp_path / "out.png")
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    left = pixels[:, :900]
    blue = (abs(left - (0x3B, 0x6E, 0xA5)).sum(axis=2) < 10).sum(axis=1)
    bars = [int(run.max()) for run in np.split(blue, np.flatnonzero(np.diff(blue > 0) != 0) + 1) if run.max() > 0]
    assert len(bars) == 3
    assert bars[0] / bars[2] == pytest.approx(8, rel=0.05)
    assert bars[0] / bars[1] == pytest.approx(4, rel=0.05)
