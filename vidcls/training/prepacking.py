"""`prepack_weights`: on a CPU, frozen weights take of the memory that the first step has left."""

from __future__ import annotations

import socket
import time

from torch import nn

from vidcls import distributed
from vidcls.config import Config
from vidcls.faults import guard
from vidcls.model.adapters import multiplied_here
from vidcls.model.classifier import ActionClassifier
from vidcls.model.prepacking import can_prepack, prepack
from vidcls.options import DEFAULT_MEMORY_LIMIT, PREPACKING_SHARE
from vidcls.planning.memory import CHECKPOINT_BYTES
from vidcls.training.memory import host_free


def prepack_weights(config: Config, model: ActionClassifier) -> str | None:
    """Prepack them as far as there is room; a line about it, None where there is nothing to prepack. All ranks must
    call it, between two steps."""
    stated = config.optim.memory_limit != DEFAULT_MEMORY_LIMIT  # which a run then keeps to
    if not config.model.prepack_weights or stated or distributed.accelerator_name() != "cpu":
        return None
    guard.phase("start")
    start = time.perf_counter()
    hosts = distributed.gather_objects(socket.gethostname())
    layers = _layers(config, model)  # other processors may have none, so every rank gathers
    ranks = hosts.count(socket.gethostname())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    free = host_free() - ranks * CHECKPOINT_BYTES * trained
    room = PREPACKING_SHARE * free - sum(linear.weight.nbytes for linear, _ in layers)
    distributed.barrier()  # nobody takes more before all have looked
    taken, left = prepack(layers, room, ranks=ranks)
    guard.phase("step")
    if not layers:
        return None
    line = f"prepack_weights: {taken / 1e9:.3g} GB a rank in {time.perf_counter() - start:.1f} s"
    return f"{line}; {left} of {len(layers)} layers are as they were" if left else line


def _layers(config: Config, model: ActionClassifier) -> list[tuple[nn.Linear, bool]]:
    """And whether their inputs have gradients; none of a model that is compiled, whose graph they would break, and none
    of a part with DoRA, whose layers are called."""
    options = config.model
    if options.torch_compile:
        return []
    found = []
    if not (options.use_dora and options.finetuning_type == "lora"):
        found += [(linear, True) for linear in multiplied_here(model.inner.language_model.layers)]
    vision = model.inner.visual
    if config.data.vision_cache is None and not (options.use_dora and options.vision_tuning == "lora"):
        trains = any(p.requires_grad for part in (vision.patch_embed, vision.blocks) for p in part.parameters())
        found += [(linear, trains) for linear in multiplied_here(vision.blocks)]
    return [(linear, backward) for linear, backward in found if can_prepack(linear.weight)]
