"""What a run tells: progress on the terminal, train_log.jsonl, TensorBoard, and the loss as a picture."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vidcls.data.reading import BatchReader
from vidcls.report.write import Reporter

LOG_NAME = "train_log.jsonl"
PLOT_NAME = "training_loss.png"
BOARD_NAME = "tensorboard"
WANDB_NAME = "wandb_id"


class StepClock:
    """Wall time between log lines, and how much of it the loop waited for data."""

    def __init__(self, batches: BatchReader) -> None:
        self._batches = batches
        self._restart()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the rates."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    def read(self, samples: int) -> dict[str, float]:
        """Rates since the last read, for `samples` clips over all ranks; then starts again."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        rates = {
            "samples_per_second": round(samples / elapsed, 3),
            "data_wait_fraction": round((self._batches.waited - self._waited) / elapsed, 4),
        }
        self._restart()
        return rates

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._batches.waited


class RunLog:
    """The log of one run; made on the main rank only.

    Args:
        first_step: rows of steps after this one (of a run that went further before it was resumed here) are dropped.
        html_report: keep report.html up to date.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        first_step: int,
        total_steps: int,
        report_to: str,
        config: dict[str, Any],
        html_report: bool = False,
    ) -> None:
        self.path = output_dir / LOG_NAME
        kept = [row for row in read_log(self.path) if row["step"] <= first_step]
        # Replaced in one piece: a kill in between must not cost the log of the steps before.
        temporary = self.path.with_name(f"{LOG_NAME}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _summary_writer(output_dir / BOARD_NAME, first_step) if report_to == "tensorboard" else None
        self._wandb = _wandb_run(output_dir, config, first_step) if report_to == "wandb" else None
        self._reporter = Reporter(output_dir) if html_report else None
        self._progress = _progress_bar(first_step, total_steps)
        self._total = total_steps

    def step(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def scalars(self, row: dict[str, Any]) -> None:
        """Write one log row; row["step"] is the number of optimizer steps done."""
        self._write(row)
        text = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "step")
        self.message(f"step {row['step']}/{self._total}  {text}")
        if self._board is not None:
            for key, value in row.items():
                if key != "step":
                    self._board.add_scalar(_tag(key), value, row["step"])
        if self._wandb is not None:
            values = {_tag(key): value for key, value in row.items() if key != "step"}
            self._wandb.log(values, step=row["step"])
        if self._reporter is not None:
            self._reporter.refresh()

    def message(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def _tag(key: str) -> str:
    return key if key.startswith("eval/") else f"train/{key}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a train_log.jsonl; none when there is no file. A last line cut by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_loss(output_dir: Path) -> Path | None:
    """Draw the logged loss and learning rate to training_loss.png; None when nothing was logged."""
    rows = [row for row in read_log(output_dir / LOG_NAME) if "loss" in row]  # others are of evaluations
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), height_ratios=[3, 1], sharex=True, layout="constrained")
    top.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="logged")
    top.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="smoothed")
    top.set_ylabel("training loss")
    top.set_ylim(bottom=0)
    top.grid(alpha=0.3)
    top.legend()
    bottom.plot(steps, [row["lr"] for row in rows], color="tab:orange")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.grid(alpha=0.3)
    path = output_dir / PLOT_NAME
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def smoothed(values: list[float], weight: float = 0.6) -> list[float]:
    """Exponential moving average with bias correction (as Adam's), so that the start is not pulled to zero."""
    average, correction, result = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        correction = weight * correction + (1 - weight)
        result.append(average / correction)
    return result


def _summary_writer(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides events that a run wrote beyond the checkpoint it is resumed from
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def _wandb_run(output_dir: Path, config: dict[str, Any], first_step: int) -> Any:
    import wandb  # optional; whoever asks for it has it, setup.py has looked

    # A run that goes on from its last step goes on in the same curves; any other is a run of its own.
    kept = output_dir / WANDB_NAME
    if not first_step or not kept.exists():
        kept.write_text(uuid.uuid4().hex, encoding="utf-8")
    identity = kept.read_text(encoding="utf-8")
    return wandb.init(dir=str(output_dir), name=output_dir.name, id=identity, resume="allow", config=config)


def _progress_bar(first_step: int, total_steps: int) -> Progress | None:
    if not sys.stdout.isatty():
        return None
    progress = Progress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(),
    )
    progress.add_task("training", total=total_steps, completed=first_step)
    progress.start()
    return progress
