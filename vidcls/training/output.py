"""The output folder of a run: made or gone on with, and what the run says at its start."""

from __future__ import annotations

import shutil
from pathlib import Path

from vidcls import distributed
from vidcls.model.classifier import ActionClassifier
from vidcls.model.tuning import format_table, trained_table
from vidcls.training import checkpoint
from vidcls.training.best import BEST_NAME, LEFT_BEHIND
from vidcls.training.data_sets import describe
from vidcls.training.evaluating import EVALUATIONS_NAME
from vidcls.training.saving import CONFIG_NAME
from vidcls.training.setup import Run
from vidcls.training.telemetry import BOARD_NAME, LOG_NAME, PLOT_NAME, WANDB_NAME, RunLog


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


def _open_log(run: Run) -> RunLog:
    folder = run.output_dir
    if run.config.run.overwrite_output_dir and run.resume is None and folder.exists():
        _remove_outputs(folder)
    for beyond in checkpoint.set_aside_after(folder, run.start.step):
        print(f"vidcls: {beyond} is beyond step {run.start.step} and set aside", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(run.config.dump(), encoding="utf-8")
    return RunLog(
        folder,
        first_step=run.start.step,
        total_steps=run.steps,
        report_to=run.config.run.report_to,
        config=run.config.flat(),
    )


def _remove_outputs(folder: Path) -> None:
    """Delete what an earlier run wrote, and nothing else that a user keeps in the folder."""
    names = (CONFIG_NAME, LOG_NAME, PLOT_NAME, BOARD_NAME, WANDB_NAME, "wandb", EVALUATIONS_NAME, BEST_NAME)
    for pattern in (*names, *LEFT_BEHIND, "checkpoint-*", "checkpoint.tmp-*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def summary(run: Run, model: ActionClassifier) -> list[str]:
    """What is about to be trained, on what, as lines of text."""
    plan = run.plan
    lines = [
        *(f"data      {line}" for line in describe(run.data)),
        f"model     {run.spec.model_name_or_path}",
        *(f"          {line}" for line in format_table(trained_table(model))),
        f"training  {run.steps} steps of {plan.global_} clips = {plan.micro} x {plan.accumulation} accumulation x "
        f"{distributed.world_size()} ranks, ZeRO-{run.config.zero_stage}, {distributed.device().type}",
        *(f"instead   {notice}" for notice in run.spec.notices()),
    ]
    if run.config.model.torch_compile and run.config.zero_stage == 3:
        lines.append("note      torch_compile: ZeRO-3 breaks the graph at every gathered layer; ZeRO-2 does not")
    if run.resume is not None:
        lines.append(f"resuming  {run.resume} at step {run.start.step}")
    return lines
