"""A checkpoint of a run, written by all ranks: the model as evaluation and prediction read it, and all that a resume
needs."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vidcls import distributed
from vidcls.manifest import FileDigest, StorageError, check_space, storage_errors
from vidcls.model.pretrained import LABELS_NAME, PREPROCESSING_NAME, head_folder, save_model
from vidcls.training.averaging import WeightAverage
from vidcls.training.checkpoint import Gathered, gather_training_state, trained_sizes
from vidcls.training.engine import Engine
from vidcls.training.folders import CONFIG_NAME, publish, remove_old, temporary_folder
from vidcls.training.optimizer import learning_rate
from vidcls.training.setup import Run
from vidcls.training.sharded_state import MOMENTS, write_state, write_tensors

DEEPSPEED_NAME, DEEPSPEED_TAG = "deepspeed", "state"
MARGIN_BYTES = 32 * 2**20  # tokenizer, label maps, headers


def save_checkpoint(
    run: Run, engine: Engine, average: WeightAverage | None, step: int, *, best: Path | None = None
) -> Path:
    """Write checkpoint-`step` from the live training state, while training stands. All ranks must call it.

    best, and what it raises: as in `write_checkpoint`.
    """
    shards = shards_of(engine)
    return write_checkpoint(
        run,
        engine,
        step,
        lambda: gather_training_state(engine, average, dtype=run.spec.dtype, shards=shards),
        best=best,
    )


def write_checkpoint(
    run: Run,
    engine: Engine,
    step: int,
    gather: Callable[[], Gathered],
    *,
    best: Path | None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Path:
    """Write checkpoint-`step`, then delete those beyond save_total_limit, but not `best`. All ranks must call it.

    Args:
        gather: gives what each of `shards_of` ranks keeps; all ranks call it.
        group: to meet over; a thread beside training needs one that nobody else uses. Of the engine it then reads
            names and shapes only.

    Raises:
        StorageError: on every rank, when any of them cannot write; earlier checkpoints stay, and nothing half-written.
    """
    target = run.output_dir / f"checkpoint-{step}"
    needed = bytes_needed(run, engine)
    name = ""
    with distributed.all_or_none(f"saving {target}", group), storage_errors(run.output_dir, needed):
        if distributed.is_main():
            folder = temporary_folder(run.output_dir)
            name = folder.name
            try:
                check_space(folder, needed)
            except StorageError:
                folder.rmdir()
                raise
    folder = run.output_dir / distributed.gather_objects(name, group)[0]
    try:
        digests = _write(run, engine, step, gather, folder, needed, group)
        with distributed.all_or_none(f"saving {target}", group), storage_errors(folder, needed):
            if distributed.is_main():
                check_all_there(folder, digests)
                publish(folder, run.output_dir, step, {name: digest for name, digest in digests if digest})
                remove_old(run.output_dir, run.config.run.save_total_limit, best)
    except BaseException:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def shards_of(engine: Engine) -> int:
    """How many ranks write a file of the training state."""
    return min(distributed.world_size(), len(trained_sizes(engine.module)))


def bytes_needed(run: Run, engine: Engine) -> int:
    """What a checkpoint takes on the disk, over all ranks."""
    numbers, options = sum(trained_sizes(engine.module).values()), run.config.run
    each = run.spec.dtype.itemsize
    fp32 = torch.float32.itemsize
    if not options.save_only_model:
        each += fp32 * (1 + len(MOMENTS) + (run.config.optim.ema_decay is not None))
    if options.save_deepspeed_state:
        each += run.spec.dtype.itemsize + fp32 * (1 + len(MOMENTS))
    return numbers * each + MARGIN_BYTES


def _write(
    run: Run,
    engine: Engine,
    step: int,
    gather: Callable[[], Gathered],
    folder: Path,
    needed: int,
    group: torch.distributed.ProcessGroup | None,
) -> list[tuple[str, FileDigest | None]]:
    """Fill the folder that the main rank made; name and digest of each rank's file."""
    rank, shards = distributed.rank(), shards_of(engine)
    gathered = gather()
    written: tuple[str, FileDigest | None] = "", None
    with distributed.all_or_none(f"writing {folder}", group), storage_errors(folder, needed):
        if not folder.is_dir():
            raise StorageError(
                f"{folder}, which the main rank has made, is not there on {socket.gethostname()}: output_dir must be "
                "on a file system that all hosts share"
            )
        if not run.config.run.save_only_model and rank < shards:
            written = write_tensors(folder, gathered.shard, rank, shards)
        if distributed.is_main():
            _write_model(run, engine, folder, gathered.model)
            if not run.config.run.save_only_model:
                state = replace(run.start, step=step, adam_steps=gathered.adam_steps)
                write_state(folder, state, _about(run, step))
    if run.config.run.save_deepspeed_state:
        _write_deepspeed_state(engine, folder / DEEPSPEED_NAME, needed)
    return distributed.gather_objects(written, group)


def _write_model(run: Run, engine: Engine, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_model(folder, engine.module, run.spec, weights, run.encoder.tokenizer)
    for part in run.data.parts:
        head = head_folder(folder, part.about.head)
        part.index.labels.save(head / LABELS_NAME)
        settings = json.dumps(part.index.settings.to_dict(), indent=2)
        (head / PREPROCESSING_NAME).write_text(settings + "\n", encoding="utf-8")
    (folder / CONFIG_NAME).write_text(run.config.dump(), encoding="utf-8")


def _about(run: Run, step: int) -> Mapping[str, Any]:
    """What a reader wants to know and a resume does not need: it may have another layout, and the schedule is a
    function of the step."""
    optim, plan = run.config.optim, run.plan
    rate = learning_rate(step, run.steps, optim) if step < run.steps else None
    return {
        "schedule": {"type": optim.lr_scheduler_type, "steps": run.steps, "next_learning_rate": rate},
        "layout": {
            "ranks": distributed.world_size(),
            "zero_stage": run.config.zero_stage,
            "micro_batch": plan.micro,
            "accumulation": plan.accumulation,
            "global_batch": plan.global_,
            "max_tokens_per_batch": optim.max_tokens_per_batch,
        },
        "label_spaces": {head: labels.fingerprint for head, labels in run.data.heads.items()},
    }


def check_all_there(folder: Path, digests: Sequence[tuple[str, FileDigest | None]]) -> None:
    """Raise StorageError unless every rank's file, as it reported it, is in this process's `folder`."""
    for rank, (name, digest) in enumerate(digests):
        if digest is None:
            continue
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != digest.bytes:
            there = "is not there" if found is None else f"has {found} bytes"
            raise StorageError(
                f"{path}, which rank {rank} wrote with {digest.bytes} bytes, {there} on {socket.gethostname()}: "
                "output_dir must be on a file system that all hosts share"
            )


def _write_deepspeed_state(engine: Engine, folder: Path, needed: int) -> None:
    """DeepSpeed's own checkpoint, for its tools; vidcls never reads it. All ranks must call it.

    DeepSpeed meets in barriers between its files, where the others would wait for a rank that has raised; what its
    writers raise is therefore kept until all are through.
    """
    failures: list[Exception] = []

    def keeping(write: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*arguments: Any, **named: Any) -> Any:
            try:
                return write(*arguments, **named)
            except Exception as error:
                failures.append(error)

        return kept

    with distributed.all_or_none(f"writing {folder}"), storage_errors(folder, needed):
        if distributed.is_main():
            (folder / DEEPSPEED_TAG).mkdir(parents=True)
    writers = (engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")
    for owner, name in writers:
        setattr(owner, name, keeping(getattr(owner, name)))
    try:
        engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, save_latest=False, exclude_frozen_parameters=True)
    finally:
        for owner, name in writers:
            delattr(owner, name)
    with distributed.all_or_none(f"writing {folder}"), storage_errors(folder, needed):
        if failures:
            raise failures[0]
        if distributed.is_main():
            (folder / "latest").write_text(DEEPSPEED_TAG, encoding="utf-8")
