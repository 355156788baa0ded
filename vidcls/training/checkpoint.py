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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors.torch import load_file, save_file
from torch import nn

from vidcls import distributed
from vidcls.manifest import CheckpointError, fsync, seal, verify

STATE_NAME = "training_state.json"
TENSORS_NAME = "training_state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
VERSIONED = ("vidcls", "torch", "deepspeed", "transformers", "peft")
# What decides the stream of clips.
CONTINUED = (
    "seed",
    "global_batch",
    "samples",
    "data_digest",
    "label_fingerprint",
    "shuffle_shards",
    "temporal_jitter",
)
FOLDER_PATTERN = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunState:
    """Where a run stands. With the named tensors it is all that a resume needs: the order, the learning rate and
    dropout are functions of step and seed."""

    step: int  # optimizer steps done
    adam_steps: int  # those that were not skipped for an overflow
    seed: int
    global_batch: int
    samples: int
    data_digest: str
    label_fingerprint: str
    shuffle_shards: int | None = None
    temporal_jitter: bool = True

    def check_continues(self, now: RunState) -> None:
        """Raise CheckpointError unless a run with state `now` would read the same stream of samples."""
        for name in CONTINUED:
            stored, current = getattr(self, name), getattr(now, name)
            if stored != current:
                hint = ""
                if name == "global_batch":
                    hint = f" (train_batch_size={stored} gradient_accumulation_steps= keeps it on any rank count)"
                raise CheckpointError(
                    f"resume_from_checkpoint: {name} is {stored!r} in the checkpoint and {current!r} in this run; "
                    f"they must be equal for the run to go on{hint}"
                )


def gather_training_state(engine: deepspeed.DeepSpeedEngine) -> tuple[dict[str, torch.Tensor], int]:
    """Master weights and Adam moments, whole and fp32 on the host, as "kind/parameter name"; and Adam's step count.

    All ranks must call it; each gets everything (adapters are small). At least one step must have been taken.
    """
    _link_states(engine)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _trainable(engine.module):
        tensors[f"weight/{name}"] = safe_get_full_fp32_param(parameter).cpu()
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = safe_get_full_optimizer_state(parameter, moment).cpu()
    steps = {int(engine.optimizer.optimizer.state[flat]["step"]) for flat in _flat_masters(engine)}
    assert len(steps) == 1, steps
    return tensors, steps.pop()


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put stored master weights into a model that has no engine yet, rounded to its dtype as a step would.

    Raises:
        CheckpointError: names or shapes are not this model's.
    """
    expected = {f"{kind}/{name}": tuple(p.shape) for name, p in _trainable(model) for kind in ("weight", *MOMENTS)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if differing := sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)):
        key = differing[0]
        raise CheckpointError(
            f"{TENSORS_NAME}: {len(differing)} tensors differ from this model, the first is {key}: stored "
            f"{found.get(key, 'not at all')}, needed {expected.get(key, 'not at all')}"
        )
    with torch.no_grad():
        for name, parameter in _trainable(model):
            parameter.copy_(tensors[f"weight/{name}"])


def load_training_state(engine: deepspeed.DeepSpeedEngine, tensors: dict[str, torch.Tensor], adam_steps: int) -> None:
    """Set master weights, moments and step counts of a fresh engine, whose model got `load_weights` before.

    DeepSpeed's own setters change the masters only; the low-precision copies are right already because they were
    rounded from the same numbers before the engine was made. All ranks must call it.
    """
    inner = engine.optimizer.optimizer
    for flat in _flat_masters(engine):
        # FusedAdam counts in an int, torch's fused AdamW in a float tensor.
        is_torch = isinstance(inner, torch.optim.AdamW)
        step: Any = torch.tensor(float(adam_steps), device=flat.device) if is_torch else adam_steps
        inner.state[flat] = {"step": step, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    _link_states(engine)
    for name, parameter in _trainable(engine.module):
        if hasattr(parameter, "ds_id"):  # ZeRO-3
            safe_set_local_fp32_param(parameter, _own_part(parameter, tensors[f"weight/{name}"]))
            for moment in MOMENTS:
                part = _own_part(parameter, tensors[f"{moment}/{name}"])
                safe_set_local_optimizer_state(parameter, part, moment)
        else:
            device = engine.device
            safe_set_full_fp32_param(parameter, tensors[f"weight/{name}"].to(device))
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{moment}/{name}"].to(device), moment)


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _flat_masters(engine: deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
    zero = engine.optimizer
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    return list(zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups)


def _link_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """ZeRO-2 links Adam's state to parameters inside group 0's first step, before later groups have any (DeepSpeed
    0.19.8, stage_1_and_2.py), and then believes it done; link again. ZeRO-3 needs none of it."""
    zero = engine.optimizer
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a whole value. DeepSpeed's full setters fail under ZeRO-3 where sizes do not divide."""
    size = parameter.ds_tensor.ds_numel
    rank, world_size = distributed.rank(), distributed.world_size()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * world_size - value.numel()))
    return padded[rank * size : (rank + 1) * size].to(parameter.ds_tensor.device)


def write_state(folder: Path, state: RunState, tensors: dict[str, torch.Tensor]) -> None:
    """Write the training state into a checkpoint folder that is being made."""
    save_file(tensors, folder / TENSORS_NAME)
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    content = {**asdict(state), "versions": versions}
    (folder / STATE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path) -> RunState:
    """The RunState of a checkpoint. Raises CheckpointError when it has none."""
    path = folder / STATE_NAME
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


def remove_old(output_dir: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints, those set aside, and what killed runs left half-written.

    Call it right after `publish`: then the newest one is whole.
    """
    for leftover in [*output_dir.glob("checkpoint.tmp-*"), *output_dir.glob("checkpoint-*.superseded")]:
        shutil.rmtree(leftover)
    if keep is not None:
        for folder in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(folder)
