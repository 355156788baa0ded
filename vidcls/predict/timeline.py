"""What is done when in a long video: the scores of its windows, and the stretches that they come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

SHOWN = 8  # classes in a picture
MOST_WINDOWS = 20_000


@dataclass(frozen=True)
class Window:
    """scores_C: probabilities of the classes for the part from `start` to `end` seconds."""

    start: float
    end: float
    scores_C: np.ndarray

    @property
    def middle(self) -> float:
        return (self.start + self.end) / 2


@dataclass(frozen=True)
class Stretch:
    """From `start` to `end` seconds `name` is the most probable class; score: its mean probability."""

    start: float
    end: float
    name: str
    score: float


@dataclass(frozen=True)
class Timeline:
    """Of one video. seconds: how long it lasts. window, stride: seconds."""

    video: str
    seconds: float
    window: float
    stride: float
    names: tuple[str, ...]
    windows: tuple[Window, ...]

    def stretches(self) -> list[Stretch]:
        """Windows in a row with the same most probable class; one ends where the next begins, half-way between the
        middles of their windows."""
        found: list[Stretch] = []
        top = [int(each.scores_C.argmax()) for each in self.windows]
        first = 0
        for place in range(1, len(top) + 1):
            if place < len(top) and top[place] == top[first]:
                continue
            start = found[-1].end if found else 0.0
            last = self.windows[place - 1]
            end = self.seconds if place == len(top) else (last.middle + self.windows[place].middle) / 2
            score = float(np.mean([each.scores_C[top[first]] for each in self.windows[first:place]]))
            found.append(Stretch(start, end, self.names[top[first]], score))
            first = place
        return found

    def to_dict(self, top: int) -> dict[str, Any]:
        """As JSON: the stretches, and of each window the `top` most probable classes."""
        return {
            "video": self.video,
            "seconds": round(self.seconds, 3),
            "window": self.window,
            "stride": self.stride,
            "stretches": [
                {"start": round(s.start, 3), "end": round(s.end, 3), "class": s.name, "score": round(s.score, 6)}
                for s in self.stretches()
            ],
            "windows": [
                {
                    "start": round(each.start, 3),
                    "end": round(each.end, 3),
                    "top": [
                        {"class": self.names[i], "score": round(float(each.scores_C[i]), 6)}
                        for i in np.argsort(-each.scores_C, kind="stable")[:top].tolist()
                    ],
                }
                for each in self.windows
            ],
        }

    def draw(self, out: Path) -> None:
        """A PNG: the probabilities of the most probable classes over time, and the stretches below them."""
        scores_WC = np.stack([each.scores_C for each in self.windows])
        shown = np.argsort(-scores_WC.max(axis=0), kind="stable")[:SHOWN].tolist()
        colours = {self.names[number]: f"C{place}" for place, number in enumerate(shown)}
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        # What a data set calls its classes must not be taken for TeX.
        with matplotlib.rc_context({"text.parse_math": False}):
            top, bottom = figure.subplots(2, 1, height_ratios=[5, 1], sharex=True)
            middles = [each.middle for each in self.windows]
            for number in shown:
                name = self.names[number]
                top.plot(middles, scores_WC[:, number], ".-", color=colours[name], label=name)
            top.set(ylabel="probability", ylim=(0, 1.02), title=Path(self.video).name)
            top.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
            top.grid(alpha=0.3)
            for each in self.stretches():
                bottom.barh(0, each.end - each.start, left=each.start, color=colours.get(each.name, "grey"))
            bottom.set(xlabel="seconds", yticks=[], xlim=(0, self.seconds))
            figure.savefig(out, dpi=110, format="png")


def check_windows(window: float, stride: float) -> None:
    if not 0 < stride <= window:
        raise ValueError(f"--window {window:g} --stride {stride:g}: legal: 0 < stride <= window (seconds)")


def windows_of(seconds: float, window: float, stride: float) -> list[tuple[float, float]]:
    """(start, end) of the windows of a video: one every `stride`, the last one ends with it. A video that is shorter
    than a window is one window."""
    check_windows(window, stride)
    if seconds <= window:
        return [(0.0, seconds)]
    count = int((seconds - window) / stride + 1e-9) + 1
    if count > MOST_WINDOWS:
        raise ValueError(f"--stride: {stride:g} s makes {count} windows of a video; legal: at most {MOST_WINDOWS}")
    starts = [number * stride for number in range(count)]
    if starts[-1] + window < seconds - 1e-6:
        starts.append(seconds - window)
    return [(start, start + window) for start in starts]
