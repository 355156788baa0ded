"""Checkpoints as named tensors: save, find, resume.

Trainable fp32 master weights and Adam moments are stored by parameter name, whole, in safetensors. Nothing depends on
rank, world size or ZeRO stage, and nothing is unpickled. A checkpoint is written to a temporary folder, its MANIFEST
(sizes and digests of all files) last, and renamed into place: a folder whose manifest verifies is whole.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vidcls import distributed
from vidcls.manifest import CheckpointError, fsync, seal, verify
from vidcls.model.stored import differing_shapes
from vidcls.training.averaging import WeightAverage
from vidcls.training.masters import flat_masters, own_part, set_master, trainable
from vidcls.training.optimizer import replay_steps

STATE_NAME = "training_state.json"
TENSORS_NAME = "training_state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"
VERSIONED = ("vidcls", "torch", "deepspeed", "transformers", "peft")
FOLDER_PATTERN = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunState:
    """Where a run stands. With the named tensors it is all that a resume needs: the order, the learning rate, the
    augmentation and dropout are functions of step and seed."""

    step: int  # optimizer steps done
    adam_steps: int  # those that were not skipped for an overflow
    stream: dict[str, Any]  # by name, what decides the stream of clips: seed, global_batch, data sets, ...

    def check_continues(self, now: RunState) -> None:
        """Raise CheckpointError unless a run with state `now` would read the same stream of samples."""
        for name in sorted(self.stream.keys() | now.stream.keys()):
            stored, current = self.stream.get(name), now.stream.get(name)
            if stored != current:
                hint = ""
                if name == "global_batch":
                    hint = f" (train_batch_size={stored} gradient_accumulation_steps= keeps it on any rank count)"
                raise CheckpointError(
                    f"resume_from_checkpoint: {name} is {stored!r} in the checkpoint and {current!r} in this run; "
                    f"they must be equal for the run to go on{hint}"
                )


def gather_training_state(
    engine: deepspeed.DeepSpeedEngine, average: WeightAverage | None
) -> tuple[dict[str, torch.Tensor], int]:
    """Master weights, Adam moments and averages, whole and fp32 on the host, as "kind/parameter name"; and Adam's
    step count.

    All ranks must call it; the main rank gets everything, the others nothing. At least one step must have been taken.
    """
    link_states(engine)
    tensors: dict[str, torch.Tensor] = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        if distributed.is_main():
            tensors[name] = tensor.cpu()

    for name, parameter in trainable(engine.module):
        keep(f"weight/{name}", safe_get_full_fp32_param(parameter))
        for moment in MOMENTS:
            keep(f"{moment}/{name}", safe_get_full_optimizer_state(parameter, moment))
    if average is not None:
        for name, tensor in average.gather():
            keep(f"{AVERAGE}/{name}", tensor)
    steps = {int(engine.optimizer.optimizer.state[flat]["step"]) for flat in flat_masters(engine)}
    assert len(steps) == 1, steps
    return tensors, steps.pop()


def check_average(folder: Path, *, wanted: bool) -> None:
    """Raise CheckpointError where a checkpoint has averages and they are not wanted, or the reverse."""
    with safe_open(folder / TENSORS_NAME, "pt") as file:
        stored = any(name.startswith(f"{AVERAGE}/") for name in file.keys())  # noqa: SIM118
    if stored != wanted:
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} was written {'with' if stored else 'without'} ema_decay, this run is "
            f"{'with' if wanted else 'without'}; they must be equal for the run to go on"
        )


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], *, averaged: bool) -> None:
    """Put stored master weights into a model that has no engine yet, rounded to its dtype as a step would.

    Raises:
        CheckpointError: names or shapes are not this model's.
    """
    kinds = ("weight", *MOMENTS, *([AVERAGE] if averaged else []))
    expected = {f"{kind}/{name}": _shape(p) for name, p in trainable(model) for kind in kinds}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if differing := differing_shapes(found, expected):
        raise CheckpointError(f"{TENSORS_NAME}: {differing}")
    with torch.no_grad():
        for name, parameter in trainable(model):
            value = tensors[f"weight/{name}"]
            if hasattr(parameter, "ds_tensor"):  # built partitioned
                parameter.ds_tensor.copy_(own_part(parameter, value))
            else:
                parameter.copy_(value)


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def load_training_state(
    engine: deepspeed.DeepSpeedEngine,
    tensors: dict[str, torch.Tensor],
    adam_steps: int,
    average: WeightAverage | None,
) -> None:
    """Set master weights, moments, step counts and averages of a fresh engine, whose model got `load_weights` before.

    DeepSpeed's own setters change the masters only; the low-precision copies are right already because they were
    rounded from the same numbers before the engine was made. All ranks must call it.
    """
    inner = engine.optimizer.optimizer
    for flat in flat_masters(engine):
        # FusedAdam counts in an int, torch's fused AdamW in a float tensor.
        is_torch = isinstance(inner, torch.optim.AdamW)
        step: Any = torch.tensor(float(adam_steps), device=flat.device) if is_torch else adam_steps
        inner.state[flat] = {"step": step, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    replay_steps(inner, adam_steps)
    link_states(engine)
    for name, parameter in trainable(engine.module):
        set_master(engine, parameter, tensors[f"weight/{name}"])
        for moment in MOMENTS:
            value = tensors[f"{moment}/{name}"]
            if hasattr(parameter, "ds_id"):  # ZeRO-3
                safe_set_local_optimizer_state(parameter, own_part(parameter, value), moment)
            else:
                safe_set_full_optimizer_state(parameter, value.to(engine.device), moment)
    if average is not None:
        prefix = f"{AVERAGE}/"
        average.load({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})


def link_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """ZeRO-2 links Adam's state to parameters inside group 0's first step, before later groups have any (DeepSpeed
    0.19.8, stage_1_and_2.py), and then believes it done; link again. ZeRO-3 needs none of it."""
    zero = engine.optimizer
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def write_state(folder: Path, state: RunState, tensors: dict[str, torch.Tensor]) -> None:
    """Write the training state into a checkpoint folder that is being made."""
    save_file(tensors, folder / TENSORS_NAME)
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    content = {**asdict(state), "versions": versions}
    (folder / STATE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path) -> RunState:
    """The RunState of a checkpoint. Raises CheckpointError when it has none."""
    path = folder / STATE_NAME
    if not path.exists():
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} has no training state: it was written with save_only_model"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("versions")
        return RunState(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / TENSORS_NAME)


def temporary_folder(output_dir: Path) -> Path:
    """A new folder to write a checkpoint in; only `publish` gives it a name that anyone reads."""
    folder = output_dir / f"checkpoint.tmp-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def publish(folder: Path, output_dir: Path, step: int) -> Path:
    """Make a finished temporary folder the checkpoint of `step`: manifest last, then one rename."""
    seal(folder)
    target = output_dir / f"checkpoint-{step}"
    if target.exists():
        set_aside(target)
    folder.rename(target)
    fsync(output_dir)
    return target


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-N folders, oldest first, whole or not."""
    if not output_dir.is_dir():
        return []
    found = [(int(m[1]), p) for p in output_dir.iterdir() if (m := FOLDER_PATTERN.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def find_latest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over."""
    passed_over: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            verify(folder)
            return folder, passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def set_aside(folder: Path) -> None:
    """Rename a checkpoint so that it is never chosen or counted; `remove_old` deletes it once a newer one is whole."""
    aside = folder.with_name(f"{folder.name}.superseded")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def set_aside_after(output_dir: Path, step: int) -> list[Path]:
    """Set aside the checkpoints beyond `step`: a run that goes on from there writes its own, and rotation by number
    would delete the new ones for being older."""
    beyond = [p for p in list_checkpoints(output_dir) if int(p.name.split("-")[1]) > step]
    for folder in beyond:
        set_aside(folder)
    return beyond


def remove_old(output_dir: Path, keep: int | None, best: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and `best`, those set aside, and what killed runs left half-written.

    Call it right after `publish`: then the newest one is whole.
    """
    for leftover in [*output_dir.glob("checkpoint.tmp-*"), *output_dir.glob("checkpoint-*.superseded")]:
        shutil.rmtree(leftover)
    if keep is not None:
        for folder in list_checkpoints(output_dir)[:-keep]:
            if folder != best:
                shutil.rmtree(folder)
