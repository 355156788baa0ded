"""report.html of a run: one file with all it shows, plotly included; nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import importlib.resources
import json
import os
import time
from pathlib import Path

from vidcls.report.content import BOARD_NAME, CONFIG_NAME, collect
from vidcls.report.page import BODY, PROGRAM, STYLE

REPORT_NAME = "report.html"


class Reporter:
    """Keeps a run's report up to date while it trains; the run is worth more than its report, which never ends it."""

    def __init__(self, run: Path, seconds: float = 60.0) -> None:
        """seconds: between two reports at least."""
        self._run, self._seconds = run, seconds
        self._written: float | None = None
        for leftover in run.glob(f"{REPORT_NAME}.tmp-*"):  # by killed runs
            leftover.unlink(missing_ok=True)

    def refresh(self, *, now: bool = False) -> None:
        """Write the report if the last one is old enough, or `now`."""
        if not now and self._written is not None and time.monotonic() - self._written < self._seconds:
            return
        try:
            write_report(self._run)
        except Exception as error:
            print(f"vidcls: no report: {type(error).__name__}: {error}", flush=True)
        self._written = time.monotonic()


def is_run(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def add_evaluation(checkpoint: Path, evaluation: Path) -> None:
    """Have a run's report show an evaluation of its checkpoint, and its TensorBoard too, if it has one.

    Nothing happens where the checkpoint is no longer in the folder of its run.
    """
    run = checkpoint.absolute().parent
    if not is_run(run):
        return
    Reporter(run).refresh(now=True)
    if not (run / BOARD_NAME).is_dir():
        return
    number = checkpoint.name.partition("-")[2]
    from torch.utils.tensorboard import SummaryWriter

    from vidcls.report.pictures import add_to_board

    with SummaryWriter(str(run / BOARD_NAME)) as board:
        add_to_board(board, evaluation, "evaluation", int(number) if number.isdigit() else 0)


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write what the folder `run` tells by now to `out`, by default report.html in it; raises OSError if it cannot."""
    out = out or run / REPORT_NAME
    content = collect(run)
    # Below plotly.offline.get_plotlyjs, whose import costs a second.
    plotly = importlib.resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(content['name'])}</title>\n<style>{STYLE}</style>\n<script>{plotly}</script>\n{BODY}\n"
            f'<script type="application/json" id="report">{data}</script>\n<script>{PROGRAM}</script>\n</html>\n',
            encoding="utf-8",
        )
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return out
