"""Contestants that are all alive and take turns step by step: what disturbs the machine for a minute disturbs all.

Each process calls `Turns.next` where one of its steps ends and the next one begins: it hands on to the contestant
behind it and sleeps until its own turn comes. All begin together, once each has called it for the first time, and take
the same number of turns. `environment` is how a process learns its place.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

PLACE = "VIDCLS_BENCHMARK_TURNS"
POLL_SECONDS = 0.005
LIMIT_SECONDS = 1800.0  # for all to start, and for the others' steps


def environment(folder: Path, number: int, contestants: int) -> dict[str, str]:
    """What contestant `number` is started with. folder: empty, of this match alone."""
    return {PLACE: f"{number}:{contestants}:{folder}"}


class Turns:
    """Of one process; without a place it has the machine to itself. `seconds`: of each of its turns that has ended.

    Of several ranks of one contestant the first one hands on; all wait.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: list[float] = []
        self._synchronize = synchronize
        place = os.environ.get(PLACE)
        self._number, self._contestants, self._folder = 0, 1, None
        if place:
            number, contestants, folder = place.split(":", 2)
            self._number, self._contestants, self._folder = int(number), int(contestants), Path(folder)
        self._began: float | None = None

    def next(self, *, last: bool = False, aside: Callable[[], object] | None = None) -> None:
        """End the turn under way, if any, and wait for the next one, or after the `last` until all have ended theirs.

        aside: is done between the turn's end and the next contestant's beginning, and not counted.
        """
        self._synchronize()
        ended = self._began is not None
        if self._began is not None:
            self.seconds.append(time.perf_counter() - self._began)
        if ended and aside is not None:
            aside()
        if self._folder is not None:
            self._pass_on(self._folder, ended=ended, last=last)
        self._began = time.perf_counter()

    def _pass_on(self, folder: Path, *, ended: bool, last: bool) -> None:
        round_ = len(self.seconds) * self._contestants  # the first turn of the round that comes now
        sign = f"taken-{round_ - self._contestants + self._number}" if ended else f"ready-{self._number}"
        if os.environ.get("RANK", "0") == "0":
            (folder / sign).touch()
        if not ended:
            _wait(lambda: len(list(folder.glob("ready-*"))) == self._contestants)
        before = round_ - 1 if last else round_ + self._number - 1
        if before >= 0:
            _wait((folder / f"taken-{before}").exists)


def _wait(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT_SECONDS
    while not ready():
        if time.monotonic() > until:
            raise RuntimeError(f"another contestant has not made its step in {LIMIT_SECONDS:g} s")
        time.sleep(POLL_SECONDS)
