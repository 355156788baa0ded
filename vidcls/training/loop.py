"""A training run: `train(setup(config))` is the whole story, from shards to the last checkpoint."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch

from vidcls import distributed
from vidcls.data.loader import training_requests
from vidcls.data.order import StepLayout
from vidcls.data.reading import read_batches
from vidcls.training.bad_samples import BadSamples
from vidcls.training.building import build
from vidcls.training.engine import train_step
from vidcls.training.objective import Objective, Tally
from vidcls.training.optimizer import learning_rate
from vidcls.training.output import open_log, summary
from vidcls.training.saving import save_checkpoint
from vidcls.training.selfcheck.check import SelfCheck
from vidcls.training.setup import Run
from vidcls.training.telemetry import StepClock, TimedIterator, plot_loss


def train(run: Run) -> Path | None:
    """Train to the last step; returns the last checkpoint's folder. All ranks must call it.

    With `do_train: false` the model is built and described, nothing is written, and None returned.
    """
    config, first = run.config, run.start.step
    layout = StepLayout(run.plan.global_, run.plan.micro, distributed.world_size(), distributed.rank())
    requests = training_requests(run.data.order, layout, first, run.steps)
    on_gpu = distributed.device().type != "cpu"
    batches = read_batches(run.clips, requests, workers=config.data.dataloader_num_workers, pin=on_gpu)
    engine, average = build(run)
    if not config.run.do_train:
        if distributed.is_main():
            print("\n".join([*summary(run, engine.module), "do_train is false: nothing was trained"]), flush=True)
        return None
    objective = Objective.of(config.optim, run.data.class_counts(), engine.device)
    check = SelfCheck(engine, run, objective.losses) if config.run.self_check else None
    clock = StepClock()
    timed = TimedIterator(batches, clock)
    log = open_log(run, engine.module)
    evaluations = run.evaluations
    if evaluations:
        evaluations.start(first)
    bad = BadSamples(run.data.clips, config.data.max_bad_samples) if config.data.on_bad_sample == "skip" else None
    tally, sources = Tally.zero(len(run.data.parts), engine.device), run.data.names
    window, logged = torch.zeros((), device=engine.device), first
    last: Path | None = None

    def say(line: str | None) -> None:
        if log and line:
            log.message(line)

    try:
        for step in range(first, run.steps):
            rate = learning_rate(step, run.steps, config.optim)
            result = train_step(
                engine,
                timed,
                objective,
                tally,
                accumulation=run.plan.accumulation,
                step=step,
                rate=rate,
                seed=config.run.seed,
                observe=check.observe if check and check.active else None,
            )
            if check and check.active:
                say(check.after_step(step, result))
            if average:
                average.update(step)
            window += result.loss
            if bad:
                bad.add(result.bad)
            done = step + 1
            if log:
                log.step(done)
            if done % config.run.logging_steps == 0 or done == run.steps:
                loss = distributed.all_sum(window / (done - logged)).item() / distributed.world_size()
                row = {"step": done, "loss": loss, "lr": rate, "grad_norm": float(result.grad_norm)}
                _check_finite(row)
                row |= tally.read(sources, answers=objective.lm_loss_weight > 0)
                if bad:
                    row["bad_samples"] = bad.collect()
                rates = clock.read((done - logged) * run.plan.global_)
                if log:
                    log.scalars({**row, **rates})
                window.zero_()
                tally.clear()
                logged = done
            if evaluations and evaluations.due(done):
                with clock.paused():
                    row = evaluations.run(engine.module, done, average)
                if log:
                    log.scalars(row)
            is_best = evaluations is not None and evaluations.must_save(done)
            if done % config.run.save_steps == 0 or done == run.steps or is_best:
                _check_finite({"step": done, "loss": window.item(), "grad_norm": float(result.grad_norm)})
                if bad:
                    bad.collect()
                first_save = last is None
                with clock.paused():
                    best = evaluations.best_checkpoint if evaluations else None
                    last = save_checkpoint(run, engine, average, done, best=best)
                    if check and first_save:
                        with average.applied() if average else contextlib.nullcontext():
                            say(check.after_first_save(last))
                say(f"saved {last}")
        if check:
            say(check.at_end())
        if evaluations and (best := evaluations.finish()):
            say(f"best checkpoint: {best}")
    finally:
        if log:
            log.close()
    if distributed.is_main() and config.run.plot_loss:
        plot_loss(run.output_dir)
    distributed.barrier()
    return last


def _check_finite(row: dict[str, Any]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise RuntimeError(
                f"{name} is {row[name]} at step {row['step']}: training has diverged; lower learning_rate, or go on "
                "from an earlier checkpoint"
            )
