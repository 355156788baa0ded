"""What the benchmarks of this folder share: contestants take turns, and a figure is a ratio with its spread.

A machine is never quite idle. Contestants that run one after the other in short rounds meet the same company, so the
ratio of two in one round says more than either rate; the median over rounds is the figure, the extremes are its spread.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vidcls.data.labels import LabelSpace
from vidcls.sharding.readers.folder import read_folder
from vidcls.sharding.records import ClipRecord

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SYNTHETIC = ("--per-class", "8", "--frames", "60", "--size", "240")  # 5 seconds each


@dataclass(frozen=True)
class Spread:
    """Median and extremes over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(*(float(f"{value:.4g}") for value in (median(values), min(values), max(values))))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.least:.4g} to {self.most:.4g})"


@dataclass(frozen=True)
class Ratio:
    """One figure over another of the same round. bar: what it must reach, limit: what it must not pass, if anything."""

    name: str
    ratio: Spread
    bar: float | None = None
    limit: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        rates: Sequence[float],
        others: Sequence[float],
        bar: float | None = None,
        *,
        limit: float | None = None,
    ) -> "Ratio":
        return cls(name, Spread.of([a / b for a, b in zip(rates, others, strict=True)]), bar, limit)

    @property
    def verdict(self) -> str:
        if self.limit is not None:
            return f"<= {self.limit:g}: {'met' if self.ratio.median <= self.limit else 'MISSED'}"
        if self.bar is None:
            return ""
        return f">= {self.bar:g}: {'met' if self.ratio.median >= self.bar else 'MISSED'}"


def take_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each gives in each round. Every other round goes backwards: nobody always follows the same one."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            results[name].append(contestants[name]())
    return results


def clips_of(videos: Path | None, count: int, work: Path) -> tuple[LabelSpace, list[ClipRecord]]:
    """`count` clips in an order that mixes classes, some of them several times if `videos` holds fewer.

    Without `videos`, synthetic ones are made below `work`.
    """
    if videos is None:
        videos = work / "videos"
        command = [sys.executable, "tools/make_motion_clips.py", "--out", str(videos), *SYNTHETIC]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    labels, records = read_folder(videos)
    order = np.random.default_rng(0).permutation(len(records))
    chosen = [records[order[i % len(records)]] for i in range(count)]
    return labels, [replace(record, key=f"{i:06d}_{record.key}"[:80]) for i, record in enumerate(chosen)]


def conditions(*packages: str) -> dict[str, Any]:
    """Machine, versions and the command's words, to stand beside the figures."""
    return {
        "command": sys.argv[1:],
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {name: importlib.metadata.version(name) for name in ("vidcls", *packages)},
    }


def processor() -> str:
    """Its name, and which of the instructions for bf16 products it has: they differ tenfold in speed."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    found = {"amx_bf16", "avx512_bf16"} & set(fields.get("flags", "").split())
    return f"{fields.get('model name', platform.processor())}, {' '.join(sorted(found)) or 'no bf16 products'}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print it."""
    shown = Table(*columns, title=title, title_justify="left")
    for row in rows:
        shown.add_row(*map(str, row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(shown)


def show_ratios(title: str, ratios: Sequence[Ratio]) -> None:
    table(title, ("figure", "median (least to most)", "bar"), [(r.name, r.ratio, r.verdict) for r in ratios])


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Dataclasses become objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, default=asdict) + "\n", encoding="utf-8")
