"""Parameter groups and the learning-rate schedule: which number moves how fast, at which step."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from vidcls import distributed
from vidcls.config import ConfigError
from vidcls.model.tuning import Part, parameter_part
from vidcls.ops import load_op
from vidcls.options import OptimOptions

# Schedules that take no warm-up, and those that get_scheduler hands no further arguments.
WITHOUT_WARMUP = ("constant",)
WITHOUT_KWARGS = ("constant", "constant_with_warmup")
# What get_scheduler fills in itself, and num_stable_steps, which would contradict the length of the run.
OWN_ARGUMENTS = ("optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch")
LAYER = re.compile(r"\b(?:layers|blocks)\.(\d+)\.")


@dataclass(frozen=True, order=True)
class GroupKey:
    """What the parameters of one optimizer group have in common."""

    part: Part
    above: int  # layers above them; 0 where layers all learn equally fast
    lora_b: bool
    decays: bool

    @property
    def name(self) -> str:
        words = [self.part, f"above{self.above}" if self.above else "", "lora_B" if self.lora_b else ""]
        return ".".join(word for word in [*words, "decayed" if self.decays else "plain"] if word)


def parameter_groups(model: nn.Module, optim: OptimOptions) -> list[dict[str, Any]]:
    """Every trainable parameter of an ActionClassifier in exactly one named group.

    Each group has `weight_decay` and `lr_scale`: the part's scale, times loraplus_lr_ratio for LoRA's B matrices
    (LoRA+, arXiv 2402.12354), times layerwise_lr_decay for each layer above.

    Vectors are not decayed (biases, norms, DoRA's magnitudes, <ACTION>): they are offsets, scales and words, not
    weights of a linear map.
    """
    names = [name for name, _ in model.named_parameters()]
    tops = {part: _layer_count(names, part) for part in ("language", "vision")}
    part_scales: dict[Part, float] = {
        "language": 1.0,
        "vision": optim.vision_lr_scale,
        "merger": optim.merger_lr_scale,
        "head": optim.head_lr_scale,
        "action_token": optim.action_token_lr_scale,
    }
    groups: dict[GroupKey, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = parameter_part(name)
            key = GroupKey(
                part,
                above=_layers_above(name, tops[part]) if part in tops and optim.layerwise_lr_decay < 1 else 0,
                lora_b=".lora_B." in name,
                decays=_dimensions(parameter) > 1,
            )
            groups.setdefault(key, []).append(parameter)
    result = [
        {
            "name": key.name,
            "params": groups[key],
            "lr": 0.0,
            "lr_scale": part_scales[key.part]
            * ((optim.loraplus_lr_ratio or 1.0) if key.lora_b else 1.0)
            * optim.layerwise_lr_decay**key.above,
            "weight_decay": optim.weight_decay if key.decays else 0.0,
        }
        for key in sorted(groups)
    ]
    check_groups(model, result)
    return result


def _dimensions(parameter: Any) -> int:
    # A partitioned parameter (ZeRO-3) is flat itself and remembers its shape.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _layer_count(names: list[str], part: str) -> int:
    numbers = [int(found[1]) for name in names if parameter_part(name) == part and (found := LAYER.search(name))]
    return max(numbers, default=-1) + 1


def _layers_above(name: str, layers: int) -> int:
    """As BEiT and VideoMAE count: what follows the last layer (norm, merger, head) is a layer too, and what comes
    before the first one (embeddings, patches) lies below it. <ACTION>, which is new, does not count as an embedding."""
    if found := LAYER.search(name):
        return layers - int(found[1])
    return layers + 1 if "embed" in name else 0


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


def replay_steps(optimizer: Any, steps: int) -> None:
    """Bring FusedAdam's CPU op to where it is after `steps` steps; call it when a run goes on from there.

    The op keeps the powers of the betas and multiplies them once a step; where the count jumps it takes `pow` instead
    (cpu_adam.h), which differs in the last bit for some steps, and a resumed run would not be bit-equal.
    """
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.ops.adam.multi_tensor_apply import MultiTensorApply

    if not isinstance(optimizer, FusedAdam) or distributed.device().type != "cpu":
        return
    group = optimizer.param_groups[0]
    lists = [[torch.zeros(1)] for _ in range(4)]  # gradient, parameter and moments of a weight that nobody has
    apply = MultiTensorApply(2048)
    for step in range(1, steps + 1):
        bias_correction = int(group["bias_correction"])
        numbers = (0.0, *group["betas"], group["eps"], step, optimizer.adam_w_mode, bias_correction, 0.0)
        apply(optimizer.multi_tensor_adam, optimizer._dummy_overflow_buf, lists, *numbers)


def learning_rate(step: int, total: int, optim: OptimOptions) -> float:
    """The base learning rate of optimizer step `step` (0-based) of `total`: a pure function, so nothing to save.

    transformers' schedule lr_scheduler_type with its lr_scheduler_kwargs: warm-up from 0, then the decay to `total`.

    Raises:
        ConfigError: the schedule does not take these arguments; before the first step is early enough to ask.
    """
    factor = _schedule(
        optim.lr_scheduler_type,
        json.dumps(optim.lr_scheduler_kwargs, sort_keys=True),
        optim.warmup_steps if optim.warmup_steps is not None else math.ceil(optim.warmup_ratio * total),
        total,
        optim.learning_rate,
    )
    if optim.warmup_steps and optim.lr_scheduler_type in WITHOUT_WARMUP:
        raise ConfigError(
            f"warmup_steps: {optim.warmup_steps} has no effect with lr_scheduler_type {optim.lr_scheduler_type!r}; "
            "use constant_with_warmup"
        )
    return optim.learning_rate * factor(step)


@functools.lru_cache(maxsize=8)
def _schedule(name: str, kwargs_json: str, warmup: int, total: int, peak: float) -> Callable[[int], float]:
    kwargs = json.loads(kwargs_json)
    build: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    parameters = inspect.signature(build).parameters
    taken = [] if name in WITHOUT_KWARGS else [key for key in parameters if key not in OWN_ARGUMENTS]
    if unknown := sorted(kwargs.keys() - set(taken)):
        raise ConfigError(
            f"lr_scheduler_kwargs: {name} does not take {', '.join(unknown)}; legal: {', '.join(taken) or 'none'}"
        )
    if missing := [key for key in taken if parameters[key].default is inspect.Parameter.empty and key not in kwargs]:
        raise ConfigError(f"lr_scheduler_kwargs: {name} needs {', '.join(missing)}; legal: {', '.join(taken)}")
    # Never stepped. Some schedules ask it for the peak, against which they measure another rate.
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    try:
        scheduler: Any = get_scheduler(name, dummy, warmup, total, scheduler_specific_kwargs=kwargs)
        factor: Callable[[int], float] = scheduler.lr_lambdas[0]
        factors = [float(factor(step)) for step in {0, warmup, (warmup + total) // 2, total - 1}]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"lr_scheduler_kwargs: {kwargs} does not fit {name} over {total} steps: {error}") from None
    if name == "warmup_stable_decay" and (decay := kwargs["num_decay_steps"]) > total - warmup:
        raise ConfigError(
            f"lr_scheduler_kwargs: num_decay_steps is {decay}; of {total} steps, {warmup} of them warm-up, at most "
            f"{total - warmup} are left"
        )
    if not all(math.isfinite(f) and f >= 0 for f in factors):
        raise ConfigError(f"lr_scheduler_kwargs: {kwargs} gives {name} a learning rate of {min(factors) * peak:g}")
    return factor


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group rate times its own scale. Takes DeepSpeed's ZeRO optimizers and torch's alike."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
