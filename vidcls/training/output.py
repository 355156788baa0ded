"""The output folder of a run: made or gone on with, and what the run says at its start."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidcls import distributed
from vidcls.faults import guard
from vidcls.faults.lock import lock_output
from vidcls.model.classifier import ActionClassifier
from vidcls.model.tuning import format_table, trained_table
from vidcls.report.write import REPORT_NAME, Reporter
from vidcls.training.best import BEST_NAME, LEFT_BEHIND
from vidcls.training.data_sets import describe
from vidcls.training.evaluating import EVALUATIONS_NAME
from vidcls.training.folders import CONFIG_NAME, set_aside_after
from vidcls.training.order_log import FOLDER_NAME as ORDER_NAME
from vidcls.training.order_log import OrderLog
from vidcls.training.setup import Run
from vidcls.training.telemetry import BOARD_NAME, LOG_NAME, PLOT_NAME, WANDB_NAME, RunLog, plot_loss

OUTCOME_NAME = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How training ended well. step: optimizer steps done, of `steps`; checkpoint: the last one that was saved.

    early: evaluations had got no better for long enough.
    """

    step: int
    steps: int
    checkpoint: Path | None = None
    early: bool = False

    @property
    def finished(self) -> bool:
        return self.step == self.steps or self.early


def open_log(run: Run, model: ActionClassifier) -> RunLog | None:
    """Make the output folder and say what is about to happen: the main rank, which gets the log. All ranks must call
    it.

    Raises:
        RuntimeError or ValueError: on every rank, when the folder cannot be written or a log service not reached.
    """
    log = None
    with distributed.all_or_none(f"opening the log in {run.output_dir}"):
        if distributed.is_main():
            log = _open_log(run)
            for line in summary(run, model):
                log.message(line)
    return log


def open_order_log(run: Run) -> OrderLog | None:
    """With log_order, each rank's own. All ranks must call it."""
    if not run.config.run.log_order:
        return None
    order = None
    with distributed.all_or_none(f"opening the order log in {run.output_dir}"):
        order = OrderLog(run.output_dir)
    return order


def finish_output(run: Run, outcome: Outcome) -> None:
    """Say that training ended well, for whoever started it: outcome.json, then the picture. All ranks must call it."""
    with distributed.all_or_none(f"writing {run.output_dir / OUTCOME_NAME}"):
        if distributed.is_main():
            word = "finished" if outcome.finished else "stopped"
            content: dict[str, Any] = {"outcome": word, "step": outcome.step, "steps": outcome.steps}
            content |= {"early_stopping": True} if outcome.early else {}
            content |= {"launch": guard.launch(), "time": time.time()}
            path = run.output_dir / OUTCOME_NAME
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
            temporary.replace(path)
            (run.output_dir / guard.STOP_NAME).unlink(missing_ok=True)
    if distributed.is_main() and run.config.run.plot_loss:
        try:
            plot_loss(run.output_dir)
        except Exception as error:  # the run is done, with or without its picture
            print(f"vidcls: no picture of the loss: {type(error).__name__}: {error}", flush=True)
    if distributed.is_main() and run.config.run.html_report:
        Reporter(run.output_dir).refresh(now=True)


def _open_log(run: Run) -> RunLog:
    folder = run.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    lock_output(folder)
    (folder / OUTCOME_NAME).unlink(missing_ok=True)
    if run.config.run.overwrite_output_dir and run.resume is None:
        _remove_outputs(folder)
    for beyond in set_aside_after(folder, run.start.step):
        print(f"vidcls: {beyond} is beyond step {run.start.step} and set aside", flush=True)
    (folder / CONFIG_NAME).write_text(run.config.dump(), encoding="utf-8")
    return RunLog(
        folder,
        first_step=run.start.step,
        total_steps=run.steps,
        report_to=run.config.run.report_to,
        config=run.config.flat(),
        html_report=run.config.run.html_report,
    )


def _remove_outputs(folder: Path) -> None:
    """Delete what an earlier run wrote, and nothing else that a user keeps in the folder."""
    logs = (
        CONFIG_NAME,
        LOG_NAME,
        PLOT_NAME,
        REPORT_NAME,
        BOARD_NAME,
        WANDB_NAME,
        "wandb",
        EVALUATIONS_NAME,
        ORDER_NAME,
    )
    for pattern in (*logs, BEST_NAME, *LEFT_BEHIND, "checkpoint-*", "checkpoint.tmp-*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def summary(run: Run, model: ActionClassifier) -> list[str]:
    """What is about to be trained, on what, as lines of text."""
    plan = run.plan
    divided = f"{plan.micro} x {plan.accumulation} accumulation"
    if run.budget is not None:
        divided = f"{plan.micro} (at most {run.budget.limit} tokens a forward)"
    lines = [
        *(f"data      {line}" for line in describe(run.data)),
        f"model     {run.spec.model_name_or_path}",
        *(f"          {line}" for line in format_table(trained_table(model))),
        f"training  {run.steps} steps of {plan.global_} clips = {divided} x {distributed.world_size()} ranks, "
        f"ZeRO-{run.config.zero_stage}, {distributed.device().type}",
        *(f"instead   {notice}" for notice in run.spec.notices()),
    ]
    if run.config.model.torch_compile and run.config.zero_stage == 3:
        lines.append("note      torch_compile: ZeRO-3 breaks the graph at every gathered layer; ZeRO-2 does not")
    if run.resume is not None:
        lines.append(f"resuming  {run.resume} at step {run.start.step}")
    return lines
