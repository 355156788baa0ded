"""`prepack_weights`: on a CPU, frozen weights take of the memory that the first step has left."""

from __future__ import annotations

import socket
import time

from torch import nn

from vidcls import distributed
from vidcls.config import Config
from vidcls.model.adapters import multiplied_here
from vidcls.model.classifier import ActionClassifier
from vidcls.model.prepacking import can_prepack, prepack
from vidcls.options import PREPACKING_SHARE
from vidcls.training.memory import host_free


def prepack_weights(config: Config, model: ActionClassifier) -> str | None:
    """Prepack them as far as there is room; a line about it, None where there is nothing to prepack. All ranks must
    call it, between two steps."""
    layers = _layers(config, model) if config.model.prepack_weights and not config.model.torch_compile else []
    if not layers:
        return None
    start = time.perf_counter()
    hosts = distributed.gather_objects(socket.gethostname())
    room = PREPACKING_SHARE * host_free() - sum(linear.weight.nbytes for linear, _ in layers)
    distributed.barrier()  # nobody takes more before all have looked
    taken, left = prepack(layers, room, ranks=hosts.count(socket.gethostname()))
    line = f"prepack_weights: {taken / 1e9:.3g} GB a rank in {time.perf_counter() - start:.1f} s"
    return f"{line}; {left} of {len(layers)} layers are as they were" if left else line


def _layers(config: Config, model: ActionClassifier) -> list[tuple[nn.Linear, bool]]:
    """And whether their inputs have gradients."""
    language, vision = model.inner.language_model, model.inner.visual
    trains = any(parameter.requires_grad for parameter in vision.parameters())
    found = [(linear, True) for linear in multiplied_here(language.layers)]
    if config.data.vision_cache is None:
        found += [(linear, trains) for linear in multiplied_here(vision.blocks)]
    return [(linear, backward) for linear, backward in found if can_prepack(linear.weight)]
