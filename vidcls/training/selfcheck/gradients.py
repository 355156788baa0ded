"""Which trained parameters get a gradient, in backward and in the optimizer, and from which step on they must.

Shape suffix: P trained parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
)
from torch import nn

from vidcls import distributed

MOMENT = "exp_avg"


class GradientFlow:
    """Looks at each gradient as backward makes it, and at Adam's first moments after a step."""

    def __init__(self, engine: Any, names: Sequence[str]) -> None:
        self.names = list(names)
        self._engine = engine
        parameters = dict(engine.module.named_parameters())
        self._parameters = [parameters[name] for name in self.names]
        self._hooks = [p.register_hook(self._look(number)) for number, p in enumerate(self._parameters)]
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self._flags_P2 = torch.zeros(len(self.names), 2, device=self._engine.device)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, number: int) -> Any:
        def look(gradient: torch.Tensor) -> None:
            # On the device: a sync for each parameter would be the slowest part of backward.
            self._flags_P2[number, 0] += gradient.ne(0).any()
            self._flags_P2[number, 1] += ~gradient.isfinite().all()

        return look

    def in_backward(self) -> tuple[set[str], set[str]]:
        """(not zero, not finite) on any rank in this step. All ranks must call it."""
        flags_2P = (distributed.all_sum(self._flags_P2.clone()) > 0).T.tolist()
        nonzero, infinite = ({n for n, flag in zip(self.names, row, strict=True) if flag} for row in flags_2P)
        return nonzero, infinite

    def in_optimizer(self) -> set[str]:
        """The parameters whose first moment is anywhere not zero. All ranks must call it, after
        `checkpoint.link_states`."""
        moments = (own_moment(parameter) for parameter in self._parameters)
        flags = [moment is not None and bool(moment.any()) for moment in moments]
        sums_P = distributed.all_sum(torch.tensor(flags, dtype=torch.float32, device=self._engine.device))
        return {name for name, found in zip(self.names, sums_P.tolist(), strict=True) if found}


def whole_master(parameter: Any) -> torch.Tensor:
    """A trained parameter's fp32 master, on the host. All ranks must call it."""
    return safe_get_full_fp32_param(parameter).cpu()


def whole_moment(parameter: Any) -> torch.Tensor:
    """Adam's first moment of a parameter, fp32, on the host. All ranks must call it, after `checkpoint.link_states`."""
    return safe_get_full_optimizer_state(parameter, MOMENT).cpu()


def own_moment(parameter: Any) -> torch.Tensor | None:
    """This rank's part of Adam's first moment of a parameter; None if it has none."""
    if hasattr(parameter, "ds_id"):
        return safe_get_local_optimizer_state(parameter, MOMENT)
    mapping = parameter._hp_mapping
    return None if mapping is None else mapping.get_optim_state_fragment(MOMENT)


def classifier_layer(head: nn.Module) -> str:
    """The name inside an ActionDecoder of the layer that has the classes: its last nn.Linear."""
    return [name for name, module in head.named_modules() if isinstance(module, nn.Linear)][-1]


class Reached:
    """Which gradients can be there, given which heads had clips in which steps, and which steps moved anything.

    A layer of zeros passes no gradient on to what is below it: LoRA's B at first, and with `zero_heads` the last
    layer of each head. What is below waits until a step with clips moved that layer.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, zero_heads: bool) -> None:
        heads: Any = model.heads
        self._waits = int(zero_heads)
        self._tops = [f"heads.{name}.{classifier_layer(head)}." for name, head in heads.items()]
        self._heads = [f"heads.{name}." for name in heads]
        self._names = list(names)
        self._head_moves = [0] * len(self._heads)
        self._backbone_moves = 0

    def step(self, clips_H: Sequence[float], rate: float) -> set[str]:
        """The parameters that must have a gradient in this step: clips of each head in it, largest learning rate."""
        fed = [bool(clips) and moves >= self._waits for clips, moves in zip(clips_H, self._head_moves, strict=True)]
        reached = {name for name in self._names if self._is_reached(name, clips_H, fed)}
        if rate > 0:
            self._head_moves = [moves + bool(clips) for moves, clips in zip(self._head_moves, clips_H, strict=True)]
            self._backbone_moves += any(fed)
        return reached

    def _is_reached(self, name: str, clips_H: Sequence[float], fed: Sequence[bool]) -> bool:
        for head, prefix in enumerate(self._heads):
            if name.startswith(prefix):
                return bool(clips_H[head]) if name.startswith(self._tops[head]) else fed[head]
        return any(fed) and (".lora_A." not in name or self._backbone_moves > 0)
