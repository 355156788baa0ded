"""A progress bar for long work on many clips."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 10.0


class ShowProgress(Protocol):
    """Called after each clip: `done` of `of` clips, and what else there is to say."""

    def __call__(self, done: int, of: int, note: str = "") -> None: ...


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator[ShowProgress]:
    """A bar on a terminal, elsewhere a line every 10 seconds."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")]
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, note="")
        started = last_line = time.monotonic()

        def progress(done: int, of: int, note: str = "") -> None:
            nonlocal last_line
            now = time.monotonic()
            rate = done / max(now - started, 1e-9)
            text = f"{rate:.1f} clips/s" + (f", {note}" if note else "")
            bar.update(task, completed=done, total=of, note=text)
            if not console.is_terminal and now - last_line >= PLAIN_LINE_SECONDS:
                last_line = now
                console.print(f"{done}/{of} {what}, {text}, {(of - done) / rate:.0f} s left")

        yield progress
