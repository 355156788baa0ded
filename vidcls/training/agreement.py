"""What all ranks decide together at the end of a step, without anybody waiting for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vidcls import distributed


@dataclass(frozen=True)
class Decision:
    """The same on every rank. stop: some rank was asked to stop. save: a checkpoint is due by the clock. failed: some
    rank could not write the checkpoint under way."""

    stop: bool = False
    save: bool = False
    failed: bool = False


class Agreement:
    """Ranks exchange their wishes beside the training step: each exchange begins at the end of one step and is read at
    the end of the next, when it has long arrived. On a gloo group of its own, so that no accelerator is waited for.

    All ranks must make one together, and call its methods together.
    """

    def __init__(self) -> None:
        self._group = torch.distributed.new_group(backend="gloo") if distributed.world_size() > 1 else None
        self._under_way: tuple[Any, torch.Tensor] | None = None

    def exchange(self, *, stop: bool, save: bool, failed: bool) -> Decision:
        """Say what this rank wishes; what all wished one step ago (of a single rank: now)."""
        if self._group is None:
            return Decision(stop, save, failed)
        decided = self.finish()
        wishes = torch.tensor([stop, save, failed], dtype=torch.uint8)
        work = torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._under_way = work, wishes
        return decided

    def finish(self) -> Decision:
        """What was decided last; nothing is under way afterwards."""
        if self._under_way is None:
            return Decision()
        work, wishes = self._under_way
        work.wait()
        self._under_way = None
        return Decision(*(bool(value) for value in wishes.tolist()))
