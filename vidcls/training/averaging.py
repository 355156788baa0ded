"""An exponential moving average of the trained weights, to evaluate and to save in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from vidcls.training.masters import flat_masters, push_masters, set_master, trainable


def decay_at(decay: float, step: int) -> float:
    """The decay that optimizer step `step` (0-based) uses: min(decay, (1 + step) / (10 + step)).

    TensorFlow's ExponentialMovingAverage warms up so. The average starts as the initial weights, and with the full
    decay from the first step on they would still be most of it after 1 / (1 - decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """average <- d * average + (1 - d) * weights after every optimizer step, d being `decay_at` of the step.

    In fp32, on each rank's own part of the master weights: averaging is elementwise, so that it does not matter how
    they are partitioned, and it costs one more copy of them. With the step's number and what `gather` returns,
    `load` goes on from a checkpoint.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decay: float) -> None:
        """Starts as the engine's weights. Raises ValueError for a decay that is none and for masters on disk."""
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay is {decay}; it must be above 0 and below 1")
        if getattr(engine.optimizer, "swap_optimizer", False):
            raise ValueError("ema_decay: the optimizer's state is offloaded to nvme; averages need cpu or no offload")
        self.decay = decay
        self._engine = engine
        self._masters = flat_masters(engine)
        self._averages = _copies(self._masters)

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0-based)."""
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._masters, 1 - decay_at(self.decay, step))

    def gather(self) -> dict[str, torch.Tensor]:
        """The average by parameter name, whole and fp32 on the host. All ranks must call it; all get it."""
        with self._in_masters():
            return {name: safe_get_full_fp32_param(p).cpu() for name, p in trainable(self._engine.module)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the average to what `gather` returned, at any rank count and ZeRO stage. Needs no other rank.

        Raises ValueError naming a tensor that is missing, too many, or of another shape.
        """
        parameters = dict(trainable(self._engine.module))
        needed = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if differing := sorted(n for n in needed.keys() | found.keys() if needed.get(n) != found.get(n)):
            name = differing[0]
            raise ValueError(
                f"the stored average differs from this model in {len(differing)} tensors, the first is {name}: stored "
                f"{found.get(name, 'not at all')}, needed {needed.get(name, 'not at all')}"
            )
        with self._in_masters():
            for name, parameter in parameters.items():
                set_master(self._engine, parameter, tensors[name])
            self._averages = _copies(self._masters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights; behind, with its own, bit by bit. No step inside.

        All ranks must enter and leave it. Where one leaves by an exception, its model keeps the averaged weights:
        giving them back takes the other ranks, which may never come.
        """
        with self._in_masters():
            push_masters(self._engine)
            yield
        push_masters(self._engine)

    @contextmanager
    def _in_masters(self) -> Iterator[None]:
        """Inside, the masters hold the averages. Copied, not swapped: optimizer and parameters refer to the masters."""
        held = _copies(self._masters)
        _set(self._masters, self._averages)
        try:
            yield
        finally:
            _set(self._masters, held)


def _copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _set(targets: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.data.copy_(value)
