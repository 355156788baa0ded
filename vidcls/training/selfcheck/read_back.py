"""Whether a checkpoint's model files hold the model that was trained: read, put in its place, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch

from vidcls import distributed
from vidcls.data.batch import Batch
from vidcls.model.classifier import ActionClassifier
from vidcls.model.heads import ActionDecoder
from vidcls.model.pretrained import ModelSpec, head_folder, load_backbone_tuning, read_spec
from vidcls.model.weights import fingerprint
from vidcls.training.masters import is_stage3, trainable
from vidcls.training.selfcheck.trained import listed


def read_back(engine: Any, folder: Path, spec: ModelSpec, batch: Batch) -> str | None:
    """What is wrong with the model files in `folder`; None if they hold this engine's model. All ranks must call it.

    The files' tensors are put into the live model by the functions that load a checkpoint, so that there is no
    second model; they must be bit by bit what was there, and so must the logits of `batch` be, in eval mode. The base
    model's files must still be those of `spec`. When something is wrong the model keeps its own weights.

    The trained weights are whole on every rank meanwhile, and twice on the main rank. No generator is moved.
    """
    before_BC = _logits(engine, batch)
    # Kernels of some accelerators differ from call to call; then equal weights have to do.
    repeats = _same_bits(_logits(engine, batch), before_BC)
    model: ActionClassifier = engine.module
    parameters: dict[str, Any] = dict(trainable(model))
    stage3 = is_stage3(engine)
    with deepspeed.zero.GatheredParameters([*parameters.values()], modifier_rank=0, enabled=stage3), torch.no_grad():
        wrong: str | None = None
        if distributed.is_main():
            try:
                wrong = _wrong_files(model, parameters, folder, spec)
            except Exception as error:  # whatever reading raises: the other ranks wait
                wrong = f"{folder} cannot be read back: {error}"
        wrong = distributed.gather_objects(wrong)[0]
        if not stage3 and distributed.world_size() > 1:
            for parameter in parameters.values():
                torch.distributed.broadcast(parameter.data, 0)
    if wrong is not None:
        return wrong
    equal = _same_bits(_logits(engine, batch), before_BC) or not repeats
    differing = [str(rank) for rank, same in enumerate(distributed.gather_objects(equal)) if not same]
    if differing:
        return (
            f"{folder}: the weights read from it are those of the model, but its logits differ on ranks "
            f"{', '.join(differing)}; likely reason: the model computes with more than its weights"
        )
    return None


def _wrong_files(model: ActionClassifier, parameters: Mapping[str, Any], folder: Path, spec: ModelSpec) -> str | None:
    """Compare, and leave the read tensors in the model. On the main rank, with whole parameters."""
    stored = read_spec(folder)
    for field in fields(ModelSpec):
        found, expected = getattr(stored, field.name), getattr(spec, field.name)
        if found != expected:
            return f"{folder}: {field.name} is stored as {found!r}; the model has {expected!r}"
    if fingerprint(stored.model_name_or_path) != spec.base_weights:
        return f"{stored.model_name_or_path} holds other weights than when the run began"
    held = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.data.fill_(torch.nan)  # what no file brings back shows
        load_backbone_tuning(model, folder)
        for name, head in model.heads.items():
            assert isinstance(head, ActionDecoder)
            read = ActionDecoder.load_pretrained(head_folder(folder, name))
            if read.config() != head.config():
                raise ValueError(f"head {name} is stored as {read.config()}; the model has {head.config()}")
            head.load_state_dict(read.state_dict())
        differing = [name for name, parameter in parameters.items() if not _same_bits(parameter.data, held[name])]
    except Exception:
        _put_back(parameters, held)
        raise
    if differing:
        first = differing[0]
        largest = (parameters[first].data.float() - held[first].float()).abs().max().item()
        _put_back(parameters, held)
        return (
            f"{folder}: {listed(differing)} are stored with other values than the model has, the first by up to "
            f"{largest:.3g}; likely reason: what was written is not what was trained"
        )
    return None


def _put_back(parameters: Mapping[str, Any], held: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.data.copy_(held[name])


def _logits(engine: Any, batch: Batch) -> torch.Tensor:
    engine.eval()
    try:
        with torch.no_grad():
            return engine(**replace(batch, answer_labels_BL=None).to(engine.device).model_inputs())
    finally:
        engine.train()


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )
