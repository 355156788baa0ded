"""A training run: `train(setup(config))` is the whole story, from shards to the last checkpoint."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vidcls import distributed
from vidcls.data.loader import training_requests
from vidcls.data.order import StepLayout
from vidcls.data.reading import read_batches
from vidcls.training.bad_samples import BadSamples
from vidcls.training.building import build
from vidcls.training.engine import StepResult, train_step
from vidcls.training.objective import Objective, Tally
from vidcls.training.optimizer import learning_rate
from vidcls.training.output import open_log, summary
from vidcls.training.saving import save_checkpoint
from vidcls.training.selfcheck.check import SelfCheck
from vidcls.training.setup import Run
from vidcls.training.telemetry import RunLog, StepClock, TimedIterator, plot_loss


def train(run: Run) -> Path | None:
    """Train to the last step; returns the last checkpoint's folder. All ranks must call it.

    With `do_train: false` the model is built and described, nothing is written, and None returned.
    """
    config, first = run.config, run.start.step
    layout = StepLayout(run.plan.global_, run.plan.micro, distributed.world_size(), distributed.rank())
    requests = training_requests(run.data.order, layout, first, run.steps)
    on_gpu = distributed.device().type != "cpu"
    workers = config.data.dataloader_num_workers if config.run.do_train else 0
    batches = read_batches(run.clips, requests, workers=workers, pin=on_gpu)
    engine, average = build(run)
    if not config.run.do_train:
        if distributed.is_main():
            print("\n".join([*summary(run, engine.module), "do_train is false: nothing was trained"]), flush=True)
        distributed.barrier()
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
    window = Window(Tally.zero(len(run.data.parts), engine.device), first)
    last: Path | None = None
    try:
        for step in range(first, run.steps):
            rate = learning_rate(step, run.steps, config.optim)
            result = train_step(
                engine,
                timed,
                objective,
                window.tally,
                accumulation=run.plan.accumulation,
                step=step,
                rate=rate,
                seed=config.run.seed,
                observe=check.observe if check and check.active else None,
            )
            done = step + 1
            if check and check.active:
                _say(log, check.after_step(step, result))
            if average:
                average.update(step)
            window.add(result)
            if bad:
                bad.add(result.bad)
            if log:
                log.step(done)
            if done % config.run.logging_steps == 0 or done == run.steps:
                row = window.row(done, rate, run.data.names, answers=objective.lm_loss_weight > 0)
                if bad:
                    row["bad_samples"] = bad.collect()
                row |= clock.read(window.steps(done) * run.plan.global_)
                window.clear(done)
                if log:
                    log.scalars(row)
            if evaluations and evaluations.due(done):
                with clock.paused():
                    row = evaluations.run(engine.module, done, average)
                if log:
                    log.scalars(row)
            is_best = evaluations is not None and evaluations.must_save(done)
            if done % config.run.save_steps == 0 or done == run.steps or is_best:
                window.check_finite(done)
                if bad:
                    bad.collect()
                is_first, best = last is None, evaluations.best_checkpoint if evaluations else None
                with clock.paused():
                    last = save_checkpoint(run, engine, average, done, best=best)
                    if check and is_first:
                        with average.applied() if average else contextlib.nullcontext():
                            _say(log, check.after_first_save(last))
                _say(log, f"saved {last}")
        if check:
            _say(log, check.at_end())
        if evaluations and (best := evaluations.finish()):
            _say(log, f"best checkpoint: {best}")
    finally:
        if log:
            log.close()
    if distributed.is_main() and config.run.plot_loss:
        plot_loss(run.output_dir)
    distributed.barrier()
    return last


class Window:
    """What is logged of the steps since the last log line. All ranks must call all but `add` together."""

    def __init__(self, tally: Tally, first: int) -> None:
        self.tally = tally
        self._logged = first  # optimizer steps done at the last log line
        self._loss = torch.zeros_like(tally.answer_loss)
        self._grad_norm: torch.Tensor | float = 0.0

    def add(self, result: StepResult) -> None:
        self._loss += result.loss
        self._grad_norm = result.grad_norm

    def steps(self, done: int) -> int:
        return done - self._logged

    def row(self, done: int, rate: float, names: Sequence[str], *, answers: bool) -> dict[str, Any]:
        """The means over the steps and all ranks, and the last step's gradient norm.

        Raises:
            RuntimeError: on every rank, when one of them is not finite.
        """
        loss = self._over_ranks() / self.steps(done)
        row = {"step": done, "loss": loss, "lr": rate, "grad_norm": float(self._grad_norm)}
        _check_finite(row)
        return row | self.tally.read(names, answers=answers)

    def check_finite(self, done: int) -> None:
        """Raise RuntimeError on every rank when a loss or the last gradient norm is not finite."""
        _check_finite({"step": done, "loss": self._over_ranks(), "grad_norm": float(self._grad_norm)})

    def clear(self, done: int) -> None:
        self._loss.zero_()
        self.tally.clear()
        self._logged = done

    def _over_ranks(self) -> float:
        return distributed.all_sum(self._loss.clone()).item() / distributed.world_size()


def _say(log: RunLog | None, line: str | None) -> None:
    if log and line:
        log.message(line)


def _check_finite(row: dict[str, Any]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise RuntimeError(
                f"{name} is {row[name]} at step {row['step']}: training has diverged; lower learning_rate, or go on "
                "from an earlier checkpoint"
            )
