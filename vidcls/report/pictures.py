"""The report's pictures of an evaluation for TensorBoard: confusion and calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vidcls.report.content import read_result

NAMED = 40  # classes; more names than that cannot be read


def add_to_board(board: Any, evaluation: Path, tag: str, step: int) -> None:
    """Draw what the folder `evaluation` holds; `board` is a SummaryWriter."""
    found = read_result(evaluation, tag)
    # What a data set calls its classes must not be taken for TeX.
    with matplotlib.rc_context({"text.parse_math": False}):
        board.add_figure(f"{tag}/confusion", draw_confusion(found), step)
        board.add_figure(f"{tag}/calibration", draw_calibration(found), step)


def draw_confusion(found: dict[str, Any]) -> Figure:
    names, counts = found["names"], found["confusion"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    side = max(4.0, min(12.0, 1.5 + 0.3 * len(names)))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.04)
    if len(names) <= NAMED:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    return figure


def draw_calibration(found: dict[str, Any]) -> Figure:
    bins = [each for each in found["metrics"]["calibration"] if each["clips"]]
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.plot([each["confidence"] for each in bins], [each["accuracy"] for each in bins], "o-")
    axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1.02))
    return figure
