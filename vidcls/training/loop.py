"""A training run, from a configuration to checkpoints: `train(setup(config))` is the whole story."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vidcls import distributed
from vidcls.config import BatchPlan, Config, ConfigError, batch_plan, total_steps
from vidcls.data.loader import ClipBatches, read_batches, training_requests
from vidcls.data.order import SampleOrder, StepLayout
from vidcls.data.shards import ShardIndex
from vidcls.model.backbone import lora_counts
from vidcls.model.classifier import ActionClassifier, parameter_kind
from vidcls.model.pretrained import (
    LABELS_NAME,
    PREPROCESSING_NAME,
    ModelSpec,
    build_encoder,
    build_model,
    read_spec,
    save_model,
)
from vidcls.model.prompt import PromptEncoder
from vidcls.training import checkpoint
from vidcls.training.checkpoint import RunState
from vidcls.training.engine import Engine, build_engine, train_step
from vidcls.training.optimizer import learning_rate
from vidcls.training.telemetry import BOARD_NAME, LOG_NAME, PLOT_NAME, RunLog, StepClock, TimedIterator, plot_loss

CONFIG_NAME = "config.yaml"


@dataclass(frozen=True)
class Run:
    """Everything checked, nothing heavy built yet."""

    config: Config
    index: ShardIndex
    spec: ModelSpec
    clips: ClipBatches
    plan: BatchPlan
    steps: int
    resume: Path | None
    start: RunState  # before the first step, or as stored in the checkpoint

    @property
    def output_dir(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def encoder(self) -> PromptEncoder:
        assert isinstance(self.clips.encoder, PromptEncoder)
        return self.clips.encoder


def setup(config: Config) -> Run:
    """Check data, prompts, batch sizes and a checkpoint to resume from; join the process group. Writes nothing.

    Raises:
        ValueError: a user's mistake, in one message (ConfigError, ShardError, PromptError, CheckpointError).
    """
    index = ShardIndex.open(config.data.dataset)
    classes = config.model.num_action_classes
    if classes is not None and classes != len(index.labels):
        raise ConfigError(
            f"num_action_classes: {classes}, but the shards in {config.data.dataset!r} have {len(index.labels)} classes"
        )
    _check_attention(config.model.flash_attn)
    spec = _model_spec(config)
    encoder = build_encoder(spec)
    clips = ClipBatches(index, encoder, prompt=spec.prompt, max_frames=spec.video_maxlen)
    _check_texts(clips)
    distributed.start(config.run.ddp_timeout)
    plan = batch_plan(config.optim, distributed.world_size())
    assert plan is not None
    fresh = RunState(
        step=0,
        adam_steps=0,
        seed=config.run.seed,
        global_batch=plan.global_,
        samples=len(index),
        data_digest=index.digest,
        label_fingerprint=index.labels.fingerprint,
    )
    resume = _checkpoint_to_resume(config)
    start = fresh
    if resume is not None:
        with distributed.all_or_none(f"reading {resume}"):
            start = checkpoint.read_state(resume)
            start.check_continues(fresh)
            _check_same_model(read_spec(resume), spec)
    steps = total_steps(config.optim, len(index), plan.global_)
    if start.step >= steps:
        raise ConfigError(f"resume_from_checkpoint: {resume} has {start.step} of {steps} steps done; nothing is left")
    return Run(config, index, spec, clips, plan, steps, resume, start)


def train(run: Run) -> Path:
    """Train to the last step; returns the last checkpoint's folder. All ranks must call it."""
    config, first = run.config, run.start.step
    layout = StepLayout(run.plan.global_, run.plan.micro, distributed.world_size(), distributed.rank())
    requests = training_requests(SampleOrder(len(run.index), config.run.seed), layout, first, run.steps)
    on_gpu = distributed.device().type != "cpu"
    batches = read_batches(run.clips, requests, workers=config.data.dataloader_num_workers, pin=on_gpu)
    engine = _build(run)
    clock = StepClock()
    timed = TimedIterator(batches, clock)
    log = _open_log(run, engine.module)
    window, logged = torch.zeros((), device=engine.device), first
    last = Path()
    try:
        for step in range(first, run.steps):
            rate = learning_rate(step, run.steps, config.optim)
            result = train_step(
                engine, timed, accumulation=run.plan.accumulation, step=step, rate=rate, seed=config.run.seed
            )
            window += result.loss
            done = step + 1
            if log:
                log.step(done)
            if done % config.run.logging_steps == 0 or done == run.steps:
                loss = distributed.all_sum(window / (done - logged)).item() / distributed.world_size()
                row = {"step": done, "loss": loss, "lr": rate, "grad_norm": float(result.grad_norm)}
                _check_finite(row)
                rates = clock.read((done - logged) * run.plan.global_)
                if log:
                    log.scalars({**row, **rates})
                window.zero_()
                logged = done
            if done % config.run.save_steps == 0 or done == run.steps:
                _check_finite({"step": done, "loss": window.item(), "grad_norm": float(result.grad_norm)})
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


def _check_attention(flash_attn: str) -> None:
    if flash_attn != "fa2":
        return
    if distributed.accelerator_name() == "cpu" or importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            f"flash_attn: 'fa2' needs the package flash-attn and a GPU (here: {distributed.accelerator_name()}); "
            "use auto or sdpa"
        )


def _check_texts(clips: ClipBatches) -> None:
    """Encode every different pair of prompt and frame size: none may be malformed or longer than cutoff_len."""
    index, encoder = clips.reader.index, clips.encoder
    frames = min(index.settings.frames, clips.max_frames)
    prompts = index.prompts or (None,) * len(index)
    for prompt, height, width in {*zip(prompts, index.height.tolist(), index.width.tolist(), strict=True)}:
        grid = encoder.grid(frames, *encoder.frame_size(height, width))
        encoder.encode(prompt or clips.prompt, grid, 1.0)


def _check_same_model(stored: ModelSpec, now: ModelSpec) -> None:
    # The base may have moved, and the attention kernel changes rounding only.
    for name in sorted(vars(now).keys() - {"model_name_or_path", "flash_attn"}):
        if getattr(stored, name) != getattr(now, name):
            raise checkpoint.CheckpointError(
                f"resume_from_checkpoint: {name} is {getattr(stored, name)!r} in the checkpoint and "
                f"{getattr(now, name)!r} in this run; they must be equal for the run to go on"
            )


def _model_spec(config: Config) -> ModelSpec:
    model, data = config.model, config.data
    base = model.model_name_or_path
    return ModelSpec(
        model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
        bf16=config.optim.bf16,
        flash_attn=model.flash_attn,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        prompt=data.prompt,
        video_maxlen=data.video_maxlen,
        video_min_pixels=data.video_min_pixels,
        video_max_pixels=data.video_max_pixels,
        cutoff_len=data.cutoff_len,
    )


def _checkpoint_to_resume(config: Config) -> Path | None:
    """The verified checkpoint this run goes on from; the main rank chooses, so that all choose the same."""
    wanted = config.run.resume_from_checkpoint
    if wanted is None:
        return None
    chosen: Path | None = None
    with distributed.all_or_none("choosing the checkpoint to resume"):
        if distributed.is_main():
            if wanted == "latest":
                chosen, passed_over = checkpoint.find_latest(Path(config.run.output_dir))
                for reason in passed_over:
                    print(f"vidcls: checkpoint passed over: {reason}", flush=True)
                if chosen is None and checkpoint.list_checkpoints(Path(config.run.output_dir)):
                    raise checkpoint.CheckpointError(
                        f"resume_from_checkpoint: no checkpoint in {config.run.output_dir!r} is whole; "
                        "starting over would lose the run, remove them to do so"
                    )
            else:
                chosen = Path(wanted)
                checkpoint.verify(chosen)
    return distributed.gather_objects(chosen)[0]


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
