"""A training run: `train(setup(config))` is the whole story, from shards to the last checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from vidcls import distributed
from vidcls.data.loader import training_requests
from vidcls.data.order import StepLayout
from vidcls.data.reading import read_batches
from vidcls.model.backbone import lora_counts
from vidcls.model.classifier import ActionClassifier, parameter_kind
from vidcls.model.pretrained import LABELS_NAME, PREPROCESSING_NAME, build_model, save_model
from vidcls.training import checkpoint
from vidcls.training.bad_samples import BadSamples
from vidcls.training.checkpoint import RunState
from vidcls.training.engine import Engine, build_engine, train_step
from vidcls.training.optimizer import learning_rate
from vidcls.training.setup import Run
from vidcls.training.telemetry import BOARD_NAME, LOG_NAME, PLOT_NAME, RunLog, StepClock, TimedIterator, plot_loss

CONFIG_NAME = "config.yaml"


def train(run: Run) -> Path:
    """Train to the last step; returns the last checkpoint's folder. All ranks must call it."""
    config, first = run.config, run.start.step
    layout = StepLayout(run.plan.global_, run.plan.micro, distributed.world_size(), distributed.rank())
    requests = training_requests(run.order, layout, first, run.steps)
    on_gpu = distributed.device().type != "cpu"
    batches = read_batches(run.clips, requests, workers=config.data.dataloader_num_workers, pin=on_gpu)
    engine = _build(run)
    clock = StepClock()
    timed = TimedIterator(batches, clock)
    log = _open_log(run, engine.module)
    bad = BadSamples(len(run.index), config.data.max_bad_samples) if config.data.on_bad_sample == "skip" else None
    window, logged = torch.zeros((), device=engine.device), first
    last = Path()
    try:
        for step in range(first, run.steps):
            rate = learning_rate(step, run.steps, config.optim)
            result = train_step(
                engine, timed, accumulation=run.plan.accumulation, step=step, rate=rate, seed=config.run.seed
            )
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
                if bad:
                    row["bad_samples"] = bad.collect()
                rates = clock.read((done - logged) * run.plan.global_)
                if log:
                    log.scalars({**row, **rates})
                window.zero_()
                logged = done
            if done % config.run.save_steps == 0 or done == run.steps:
                _check_finite({"step": done, "loss": window.item(), "grad_norm": float(result.grad_norm)})
                if bad:
                    bad.collect()
                with clock.paused():
                    last = save_checkpoint(run, engine, done)
                if log:
                    log.message(f"saved {last}")
    finally:
        if log:
            log.close()
    if distributed.is_main() and config.run.plot_loss:
        plot_loss(run.output_dir)
    distributed.barrier()
    return last


def save_checkpoint(run: Run, engine: Engine, step: int) -> Path:
    """Write checkpoint-`step`, then delete those beyond save_total_limit. All ranks must call it.

    Raises:
        RuntimeError: on every rank, when the main rank cannot write; the previous checkpoint stays.
    """
    tensors, adam_steps = checkpoint.gather_training_state(engine)
    target = run.output_dir / f"checkpoint-{step}"
    with distributed.all_or_none(f"saving {target}"):
        if distributed.is_main():
            state = RunState(**{**vars(run.start), "step": step, "adam_steps": adam_steps})
            folder = checkpoint.temporary_folder(run.output_dir)
            try:
                prefix = "weight/"
                weights = {
                    name.removeprefix(prefix): tensor.to(run.spec.dtype)
                    for name, tensor in tensors.items()
                    if name.startswith(prefix)
                }
                save_model(folder, engine.module, run.spec, weights, run.encoder.tokenizer)
                run.index.labels.save(folder / LABELS_NAME)
                settings = json.dumps(run.index.settings.to_dict(), indent=2)
                (folder / PREPROCESSING_NAME).write_text(settings + "\n", encoding="utf-8")
                (folder / CONFIG_NAME).write_text(run.config.dump(), encoding="utf-8")
                checkpoint.write_state(folder, state, tensors)
                checkpoint.publish(folder, run.output_dir, step)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            checkpoint.remove_old(run.output_dir, run.config.run.save_total_limit)
    return target


def _build(run: Run) -> Engine:
    model_options = run.config.model
    model = build_model(
        run.spec,
        run.encoder,
        num_classes=len(run.index.labels),
        decoder_type=model_options.action_decoder_type,
        mlp_hidden_size=model_options.action_decoder_hidden_size,
        seed=run.config.run.seed,
        gradient_checkpointing=model_options.gradient_checkpointing,
    )
    model.train()
    if run.resume is None:
        return build_engine(run.config, model, run.plan)
    tensors = checkpoint.read_tensors(run.resume)
    checkpoint.load_weights(model, tensors)
    engine = build_engine(run.config, model, run.plan)
    checkpoint.load_training_state(engine, tensors, run.start.adam_steps)
    return engine


def _open_log(run: Run, model: ActionClassifier) -> RunLog | None:
    """Make the output folder and say what is about to happen; the main rank only."""
    if not distributed.is_main():
        return None
    folder = run.output_dir
    if run.config.run.overwrite_output_dir and run.resume is None and folder.exists():
        _remove_outputs(folder)
    for beyond in checkpoint.set_aside_after(folder, run.start.step):
        print(f"vidcls: {beyond} is beyond step {run.start.step} and set aside", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(run.config.dump(), encoding="utf-8")
    board = run.config.run.report_to == "tensorboard"
    log = RunLog(folder, first_step=run.start.step, total_steps=run.steps, tensorboard=board)
    for line in _summary(run, model):
        log.message(line)
    return log


def _remove_outputs(folder: Path) -> None:
    """Delete what an earlier run wrote, and nothing else that a user keeps in the folder."""
    for pattern in (CONFIG_NAME, LOG_NAME, PLOT_NAME, BOARD_NAME, "checkpoint-*", "checkpoint.tmp-*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _summary(run: Run, model: ActionClassifier) -> list[str]:
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = parameter_kind(name)
        counts[kind] = counts.get(kind, 0) + int(getattr(parameter, "ds_numel", parameter.numel()))
    sides = lora_counts(model)
    plan = run.plan
    lines = [
        f"data      {len(run.index)} clips, {len(run.index.labels)} classes, {run.config.data.dataset}",
        f"model     {run.spec.model_name_or_path}: "
        + ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items())),
        f"          LoRA on {sides['language']} language and {sides['vision']} vision layers",
        f"training  {run.steps} steps of {plan.global_} clips = {plan.micro} x {plan.accumulation} accumulation x "
        f"{distributed.world_size()} ranks, ZeRO-{run.config.zero_stage}, {distributed.device().type}",
    ]
    if run.resume is not None:
        lines.append(f"resuming  {run.resume} at step {run.start.step}")
    return lines


def _check_finite(row: dict[str, Any]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise RuntimeError(
                f"{name} is {row[name]} at step {row['step']}: training has diverged; lower learning_rate, or go on "
                "from an earlier checkpoint"
            )
