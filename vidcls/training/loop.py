"""A training run: `train(setup(config))` is the whole story, from shards to the last checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vidcls import distributed
from vidcls.command import user_errors
from vidcls.data.budget import BudgetLayout
from vidcls.data.loader import training_requests
from vidcls.data.order import StepLayout
from vidcls.data.reading import BatchReader, read_batches
from vidcls.faults import guard
from vidcls.faults.causes import DivergedError
from vidcls.training.agreement import Agreement
from vidcls.training.bad_samples import BadSamples
from vidcls.training.building import build
from vidcls.training.engine import StepResult, train_step
from vidcls.training.micro_batch import choose
from vidcls.training.objective import Objective, Tally
from vidcls.training.optimizer import learning_rate
from vidcls.training.output import Outcome, finish_output, open_log, open_order_log, summary
from vidcls.training.patience import Patience
from vidcls.training.prepacking import prepack_weights
from vidcls.training.saver import Saver
from vidcls.training.selfcheck.check import SelfCheck
from vidcls.training.setup import Run
from vidcls.training.telemetry import RunLog, StepClock


def train(run: Run) -> Outcome:
    """Train to the last step, or until it is asked to stop. All ranks must call it.

    With `do_train: false` the model is built and described, and nothing is written.
    """
    config, first = run.config, run.start.step
    chosen = None
    if run.measures_memory:
        engine, average = build(run)
        with user_errors():  # too little memory is one, and the same on all ranks
            plan, chosen = choose(run, engine)
        run = replace(run, plan=plan)
        layout = run.layout()
        batches = _batches(run, layout)
    else:
        layout = run.layout()
        batches = _batches(run, layout)  # workers start while the model is built
        engine, average = build(run)
    if not config.run.do_train:
        if distributed.is_main():
            lines = [*summary(run, engine.module), *([chosen] if chosen else [])]
            print("\n".join([*lines, "do_train is false: nothing was trained"]), flush=True)
        distributed.barrier()
        return Outcome(first, run.steps)
    objective = Objective.of(config.optim, run.data.class_counts(), engine.device)
    check = SelfCheck(engine, run, objective.losses) if config.run.self_check else None
    clock = StepClock(batches)
    log = open_log(run, engine.module)
    _say(log, chosen)
    order = open_order_log(run)
    evaluations = run.evaluations
    if evaluations:
        evaluations.start(first)
    bad = BadSamples(run.data.clips, config.data.max_bad_samples) if config.data.on_bad_sample == "skip" else None
    patience = Patience(config.run.max_nonfinite_steps)
    window = Window(len(run.data.parts), engine.device, first)
    agreement, timer = Agreement(), SaveTimer(config.run.save_every_minutes)
    saver = Saver(run, engine, average, partial(_say, log))
    last: Path | None = None
    done = first
    early = evaluations is not None and evaluations.exhausted()  # stopped so, and killed before it had said so
    try:
        with guard.stoppable():
            for step in range(first, first if early else run.steps):
                rate = learning_rate(step, run.steps, config.optim)
                result = train_step(
                    engine,
                    batches,
                    objective,
                    window.step_tally,
                    sizes=[len(positions) for positions in layout.micro_batches(step)],
                    step=step,
                    rate=rate,
                    seed=config.run.seed,
                    observe=check.observe if check and check.active else None,
                )
                done = step + 1
                if step == first and done < run.steps:
                    with clock.paused():
                        _say(log, prepack_weights(config, engine.module))
                if order:
                    order.add(step, result.keys)
                if check and check.active:
                    _say(log, check.after_step(step, result))
                _say(log, patience.after_step(done, applied=result.applied, suspects=result.suspects))
                if average:
                    average.update(step)
                window.add(result)
                if bad:
                    bad.add(result.bad)
                if log:
                    log.step(done)
                saver.look()
                stop = guard.stop_wanted() is not None
                decision = agreement.exchange(stop=stop, save=timer.is_due(), failed=saver.failed)
                if decision.failed:
                    saver.finish()  # raises, on every rank at this step
                if done % config.run.logging_steps == 0 or done == run.steps:
                    row = window.row(done, rate, run.data.names, answers=objective.lm_loss_weight > 0)
                    if bad:
                        row["bad_samples"] = bad.collect()
                    row |= clock.read(window.steps(done) * run.plan.global_)
                    if stalled := saver.take_stalled():
                        row["save_stall_seconds"] = round(stalled, 4)
                    window.clear(done)
                    if log:
                        log.scalars(row)
                if evaluations and evaluations.due(done):
                    with clock.paused():
                        saver.finish()  # an evaluation forks loader workers, and no thread may hold a lock meanwhile
                        guard.phase("evaluate", step)
                        row = evaluations.run(engine.module, done, average)
                    if log:
                        log.scalars(row)
                    early = evaluations.exhausted()
                is_best = evaluations is not None and evaluations.must_save(done)
                asked = decision.save or decision.stop or early
                if done % config.run.save_steps == 0 or done == run.steps or is_best or asked:
                    window.check_finite(done)
                    if bad:
                        bad.collect()
                    is_first, best = last is None, evaluations.best_checkpoint if evaluations else None
                    with clock.paused():
                        last = saver.save(done, best=best)
                        if check and is_first:
                            saver.finish()
                            with average.applied() if average else contextlib.nullcontext():
                                _say(log, check.after_first_save(last))
                    timer.restart()
                if early:
                    _say(log, f"no better for {config.eval.early_stopping_patience} evaluations: stopped early")
                if early or (decision.stop and done < run.steps):
                    break
            agreement.finish()
            saver.finish()
        batches.close()
        guard.phase("finish", done)
        if check:
            _say(log, check.at_end())
        early = early and done < run.steps
        if (early or done == run.steps) and evaluations and (best := evaluations.finish()):
            _say(log, f"best checkpoint: {best}")
    except BaseException as error:
        saver.leave(error)
        raise
    finally:
        if log:
            log.close()
        if order:
            order.close()
    outcome = Outcome(done, run.steps, last, early)
    finish_output(run, outcome)
    return outcome


def _batches(run: Run, layout: StepLayout | BudgetLayout) -> BatchReader:
    """This rank's micro-batches, from the run's first step to its last."""
    data, options = run.config.data, run.config.run
    return read_batches(
        run.clips,
        training_requests(run.data.order, layout, run.start.step, run.steps),
        workers=data.dataloader_num_workers if options.do_train else 0,
        pin=distributed.device().type != "cpu",
        seconds=options.data_timeout,
        most_bytes=run.most_batch_bytes(),
    )


class Window:
    """What is logged of the steps since the last log line. All ranks must call all but `add` together."""

    def __init__(self, sources: int, device: torch.device, first: int) -> None:
        self.step_tally = Tally.zero(sources, device)  # of the step under way
        self._tally = Tally.zero(sources, device)
        self._logged = first  # optimizer steps done at the last log line
        self._applied = 0  # of these, all that were not skipped
        self._loss = torch.zeros_like(self._tally.answer_loss)
        self._grad_norm: torch.Tensor | float = 0.0

    def add(self, result: StepResult) -> None:
        """Take in the step that was done; one that DeepSpeed skipped counts for nothing."""
        if result.applied:
            self._tally.add_all(self.step_tally)
            self._loss += result.loss
            self._grad_norm = result.grad_norm
            self._applied += 1
        self.step_tally.clear()

    def steps(self, done: int) -> int:
        """Steps done since the last log line, skipped ones too."""
        return done - self._logged

    def row(self, done: int, rate: float, names: Sequence[str], *, answers: bool) -> dict[str, Any]:
        """The means over the steps and all ranks, and the last step's gradient norm; skipped_steps, if there are any.

        Raises:
            DivergedError: on every rank, when one of them is not finite.
        """
        skipped = self.steps(done) - self._applied
        about = {"skipped_steps": skipped} if skipped else {}
        if not self._applied:
            return {"step": done, "lr": rate, **about}
        loss = self._over_ranks() / self._applied
        row = {"step": done, "loss": loss, "lr": rate, "grad_norm": float(self._grad_norm)}
        _check_finite(row)
        return row | self._tally.read(names, answers=answers) | about

    def check_finite(self, done: int) -> None:
        """Raise DivergedError on every rank when a loss or the last gradient norm is not finite."""
        _check_finite({"step": done, "loss": self._over_ranks(), "grad_norm": float(self._grad_norm)})

    def clear(self, done: int) -> None:
        self._loss.zero_()
        self._tally.clear()
        self._applied = 0
        self._logged = done

    def _over_ranks(self) -> float:
        return distributed.all_sum(self._loss.clone()).item() / distributed.world_size()


class SaveTimer:
    """Whether `minutes` have passed since the last save; the main rank's clock decides for all."""

    def __init__(self, minutes: float | None) -> None:
        self._minutes = minutes if distributed.is_main() else None
        self._saved = time.monotonic()
        self._said = False

    def is_due(self) -> bool:
        """Says so once, until the save that follows."""
        if self._minutes is None or self._said or time.monotonic() - self._saved <= 60 * self._minutes:
            return False
        self._said = True
        return True

    def restart(self) -> None:
        self._saved = time.monotonic()
        self._said = False


def _say(log: RunLog | None, line: str | None) -> None:
    if log and line:
        log.message(line)


def _check_finite(row: dict[str, Any]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise DivergedError(
                f"{name} is {row[name]} at step {row['step']}: training has diverged; lower learning_rate, or go on "
                "from an earlier checkpoint"
            )
