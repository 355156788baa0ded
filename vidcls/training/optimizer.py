"""Parameter groups and the learning-rate schedule: which number moves how fast, at which step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vidcls import distributed
from vidcls.config import OptimOptions
from vidcls.ops import load_op


def parameter_groups(model: nn.Module, optim: OptimOptions) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one named group; each group has `lr_scale` and `weight_decay`.

    Biases, norms and <ACTION> are not decayed: they are scales and a word, not weights of a linear map.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    token: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("action_token."):
            token.append(parameter)
        elif parameter.ndim > 1:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "lr_scale": 1.0, "weight_decay": optim.weight_decay},
        {"name": "plain", "params": plain, "lr_scale": 1.0, "weight_decay": 0.0},
        {"name": "action_token", "params": token, "lr_scale": optim.action_token_lr_scale, "weight_decay": 0.0},
    ]
    groups = [dict(group, lr=0.0) for group in groups if group["params"]]
    check_groups(model, groups)
    return groups


def check_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Raise ValueError naming trainable parameters that are not in exactly one group, and frozen ones that are in any.

    A head outside the optimizer never trains, and the loss still falls, because the rest adapts to it.
    """
    counts: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    wrong = [
        f"{name} ({counts.get(id(p), 0)} groups, {'trainable' if p.requires_grad else 'frozen'})"
        for name, p in model.named_parameters()
        if counts.get(id(p), 0) != int(p.requires_grad)
    ]
    if wrong:
        raise ValueError(f"parameters not in exactly one optimizer group: {', '.join(wrong)}")


def build_adam(groups: list[dict[str, Any]], optim: OptimOptions) -> torch.optim.Optimizer:
    """DeepSpeed's FusedAdam (AdamW mode), or torch's fused AdamW where its op cannot be compiled."""
    from deepspeed.ops.adam import FusedAdam

    settings: dict[str, Any] = {"betas": (optim.adam_beta1, optim.adam_beta2), "eps": optim.adam_epsilon}
    try:
        load_op("FusedAdamBuilder")
        return FusedAdam(groups, adam_w_mode=True, **settings)
    except Exception as error:  # whatever a compiler run raises
        if distributed.is_main():
            reason = (str(error).strip() or "no reason given").splitlines()[0][:80]
            print(
                f"vidcls: DeepSpeed's FusedAdam cannot be compiled ({reason} ...); using torch's fused AdamW",
                flush=True,
            )
        return torch.optim.AdamW(groups, fused=True, **settings)


def _constant(progress: float, power: float) -> float:
    return 1.0


def _linear(progress: float, power: float) -> float:
    return 1.0 - progress


def _cosine(progress: float, power: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _polynomial(progress: float, power: float) -> float:
    return (1.0 - progress) ** power


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
}


def learning_rate(step: int, total: int, optim: OptimOptions) -> float:
    """The base learning rate of optimizer step `step` (0-based) of `total`: a pure function, so nothing to save.

    Linear warm-up from 0 over the warm-up steps, then the chosen decay to 0 at `total`; as transformers' schedules do.
    """
    warmup = optim.warmup_steps if optim.warmup_steps is not None else math.ceil(optim.warmup_ratio * total)
    if step < warmup:
        return optim.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return optim.learning_rate * SCHEDULES[optim.lr_scheduler_type](progress, optim.lr_scheduler_power)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group rate times its own scale. Takes DeepSpeed's ZeRO optimizers and torch's alike."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
