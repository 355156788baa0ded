"""What tools/plan.py foretells beside what runs: seconds of a step and peak memory of a rank, on this machine.

python benchmarks/plan.py [--model DIR] [--only NAME ...]
"""

import contextlib
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from processes import kilobytes, launched, logged_rows, ranks_below

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Case:
    """One training. model: mid, or 3b. options: keys of a recipe."""

    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    steps: int = 12


@dataclass
class Measured:
    """seconds: of a step, the median after the first ones. Bytes are those of the rank that needed most."""

    seconds: float
    resident: int
    anonymous: int


def run(case: Case, recipe_words: list[str], work: Path) -> Measured:
    log, output = work / "train.log", work / "run"
    shutil.rmtree(output, ignore_errors=True)
    resident = anonymous = 0
    with launched(case.ranks, recipe_words, log) as launcher:
        found: list[psutil.Process] = []
        while launcher.poll() is None:
            if len(found) < case.ranks:
                found = ranks_below(launcher)
            for process in found:
                with contextlib.suppress(psutil.Error, OSError):  # it comes and goes
                    status = kilobytes(Path(f"/proc/{process.pid}/status"))
                    resident = max(resident, status.get("VmHWM", 0))
                    anonymous = max(anonymous, status.get("RssAnon", 0))
            time.sleep(SAMPLE_SECONDS)
    if launcher.returncode:
        raise RuntimeError(f"{case.name} failed:\n{log.read_text()[-3000:]}")
    rows = logged_rows(output)
    return Measured(0, resident, anonymous), rows
