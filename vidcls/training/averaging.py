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
        self._averages = [master.detach().clone() for master in self._masters]

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0-based)."""
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._masters, 1 - decay_at(self.decay, step))

    @property
    def parts(self) -> list[torch.Tensor]:
        """This rank's averages, flat, as `masters.flat_masters` has the weights; not to be changed."""
        return self._averages

    def gather(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(parameter name, its average), whole and fp32 on the host, one after the other. All ranks must go through
        all of it, and the engine must not be used before it is done."""
        with self._in_masters():
            for name, parameter in trainable(self._engine.module):
                yield name, safe_get_full_fp32_param(parameter).cpu()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the average to what `gather` gave, at any rank count and ZeRO stage; the names and shapes are those of
        what trains. Needs no other rank."""
        with self._in_masters():
            for name, parameter in trainable(self._engine.module):
                set_master(self._engine, parameter, tensors[name])

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
        """Inside, masters and averages have changed places."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Values, one tensor at a time: optimizer and parameters refer to the masters, and a copy of all of them would
        take as much memory again."""
        with torch.no_grad():
            for master, average in zip(self._masters, self._averages, strict=True):
                held = master.detach().clone()
                master.data.copy_(average)
                average.copy_(held)
