"""Signals to the supervisor: the first asks the run to save and stop, a later one ends it at once."""

from __future__ import annotations

import signal
import time
from types import FrameType

from vidcls.faults.guard import SAME_REQUEST_SECONDS

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LOOK_SECONDS = 0.2


class StopRequests:
    def __init__(self) -> None:
        self.stop: str | None = None  # the signal that asked
        self.force = False
        self._asked_at = 0.0

    def listen(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and background shells leave them
                signal.signal(number, self._on_signal)

    def pause(self, seconds: float) -> None:
        """Sleep, but not on when a signal comes."""
        deadline = time.monotonic() + seconds
        before = (self.stop, self.force)
        while (left := deadline - time.monotonic()) > 0 and (self.stop, self.force) == before:
            time.sleep(min(left, LOOK_SECONDS))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop is None:
            self.stop = signal.Signals(number).name
            self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at > SAME_REQUEST_SECONDS:
            self.force = True
