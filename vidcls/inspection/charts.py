"""Charts of what a folder of shards holds."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vidcls.inspection.overview import Overview

COLOUR, EMPTY = "#3b6ea5", "#b3261e"
NAMES_UP_TO = 200  # classes; more than that cannot be read, and are drawn as one curve
MOST_ROWS = 12
NAME_LENGTH = 45


def draw(overview: Overview, out: Path) -> None:
    """Writes a PNG: clips of every class in falling order, clips by number of frames, clips by frame size."""
    classes = sorted(zip(overview.per_class, overview.classes, strict=True), key=lambda entry: -entry[0])
    named = len(classes) <= NAMES_UP_TO
    figure = Figure(figsize=(13, max(6.0, 0.17 * len(classes)) if named else 8.0), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1))
    # What a data set calls its classes must not be taken for TeX.
    with matplotlib.rc_context({"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}):
        _draw_classes(figure.add_subplot(grid[:, 0]), classes, named)
        frames = [(str(count), clips) for count, clips in overview.frame_counts]
        _draw_bars(figure.add_subplot(grid[0, 1]), "frames a clip", frames)
        sizes = [(f"{width}x{height}", clips) for (height, width), clips in overview.frame_sizes]
        _draw_bars(figure.add_subplot(grid[1, 1]), "frame size in pixels", sizes)
        figure.suptitle(f"{overview.place}: {overview.clips:,} clips of {len(overview.classes)} classes")
        figure.savefig(out, dpi=110, format="png")


def _draw_classes(axes: Axes, classes: list[tuple[int, str]], named: bool) -> None:
    counts = [count for count, _ in classes]
    if named:
        axes.barh(range(len(classes)), counts, color=COLOUR)
        names = [name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 3] + "..." for _, name in classes]
        axes.set_yticks(range(len(classes)), names, fontsize=8)
        for row, label in enumerate(axes.get_yticklabels()):
            label.set_color("black" if counts[row] else EMPTY)
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(axis="x", top=True, labeltop=True)
    else:
        axes.fill_between(range(len(classes)), counts, step="mid", color=COLOUR)
        axes.set_xlabel("classes, the most frequent first")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    empty = counts.count(0)
    axes.set_title(f"clips of each class, {empty} without any" if empty else "clips of each class")


def _draw_bars(axes: Axes, title: str, rows: list[tuple[str, int]]) -> None:
    if len(rows) > MOST_ROWS:
        title = f"{title}: the {MOST_ROWS} most frequent of {len(rows)}"
        kept = sorted(sorted(range(len(rows)), key=lambda row: -rows[row][1])[:MOST_ROWS])
        rows = [rows[row] for row in kept]
    bars = axes.barh(range(len(rows)), [clips for _, clips in rows], color=COLOUR)
    axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(MOST_ROWS - 0.4, -0.6)  # a lone bar would fill it all
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.margins(x=0.12)
    axes.set_title(title)
