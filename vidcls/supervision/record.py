"""The record of a supervised run: a row an attempt, and at the end what the faults have cost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidcls.supervision.attempts import Attempt

ROWS_NAME = "supervise.jsonl"
FOLDER_NAME = "supervise"  # logs of the attempts, and the lock
SUMMARY_NAME = "summary.json"
LOGS_KEPT = 20


def next_number(output_dir: Path) -> int:
    """Attempts are counted over all supervisors of an output folder."""
    with contextlib.suppress(OSError):
        return len((output_dir / ROWS_NAME).read_bytes().splitlines()) + 1
    return 1


def append(output_dir: Path, attempt: Attempt) -> None:
    """Raises OSError where nothing can be written."""
    with (output_dir / ROWS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(attempt.row()) + "\n")


def log_path(output_dir: Path, number: int) -> Path:
    """Where the output of an attempt goes; logs of long ago are deleted."""
    folder = output_dir / FOLDER_NAME
    for suffix in ("log", "old"):
        (folder / f"attempt-{number - LOGS_KEPT}.{suffix}").unlink(missing_ok=True)
    return folder / f"attempt-{number}.log"


@dataclass(frozen=True)
class Summary:
    """What the attempts of one supervisor came to.

    restarts: launches after the first. lost_steps: done, and done again because no checkpoint held them.
    useful_seconds: spent in steps that count, by the rates in the log. goodput: their share of wall_seconds; None when
    the log does not say.
    """

    restarts: int
    lost_steps: int
    wall_seconds: float
    useful_seconds: float | None

    @property
    def goodput(self) -> float | None:
        return None if self.useful_seconds is None else min(self.useful_seconds / max(self.wall_seconds, 1e-9), 1.0)

    def content(self) -> dict[str, Any]:
        return {**vars(self), "goodput": self.goodput}

    def text(self) -> str:
        share = "" if self.goodput is None else f"; goodput {100 * self.goodput:.0f} %"
        return (
            f"{self.restarts} restarts, {self.lost_steps} steps done again, "
            f"{self.wall_seconds:.0f} s in all{share} (useful step time / all time)"
        )


def summarize(history: Sequence[Attempt], rows: Sequence[dict[str, Any]], global_batch: int | None) -> Summary:
    """Args: rows: those of train_log.jsonl, where a resume drops what is done again."""
    lost = sum(max(0, attempt.last_step - attempt.saved) for attempt in history[:-1])
    wall = history[-1].ended - history[0].started
    return Summary(len(history) - 1, lost, wall, _useful(rows, history[0].resumed_from, global_batch))


def _useful(rows: Sequence[dict[str, Any]], first: int, global_batch: int | None) -> float | None:
    if global_batch is None:
        return None
    done, seconds = first, 0.0
    for row in rows:
        rate = row.get("samples_per_second")
        if rate and row["step"] > done:
            seconds += (row["step"] - done) * global_batch / rate
            done = row["step"]
    return seconds if done > first else None
