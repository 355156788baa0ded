"""What is to train, by name, from the options alone; and whether the engine's optimizer holds exactly that."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from vidcls.model.tuning import PEFT_PREFIX, TuningSettings, parameter_part
from vidcls.training.masters import is_stage3

ADAPTER = "default"


def intended_parameters(model: nn.Module, tuning: TuningSettings, heads: Iterable[str]) -> set[str]:
    """The names of all that should train in an ActionClassifier: adapters, whole weights, heads, <ACTION>.

    From the settings, not from requires_grad; so there can be names in it that the model does not have.
    """
    names = [name for name, _ in model.named_parameters()]
    intended = {"action_token.weight"}
    for head in heads:
        intended |= {name for name in names if name.startswith(f"heads.{head}.")} or {f"heads.{head}"}
    pattern = re.compile(tuning.lora_pattern) if tuning.has_lora else None
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector") if tuning.use_dora else ("lora_A", "lora_B")
    for name in names:
        if not name.startswith("backbone.") or ".lora_" in name:
            continue
        # PEFT puts a layer with adapters one level down.
        path = name.removeprefix("backbone.").removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        if tuning.tuned[parameter_part(name)] == "full" and ".embed_tokens." not in path:
            intended.add(name)
        layer = path.removesuffix(".weight")
        if pattern is not None and layer != path and pattern.fullmatch(layer):
            intended |= {f"backbone.{PEFT_PREFIX}{layer}.{kind}.{ADAPTER}.weight" for kind in kinds}
    return intended


def trained_wrongly(engine: Any, intended: Collection[str]) -> str | None:
    """What is wrong with the parameters that train in a DeepSpeed engine; None if they are the intended ones.

    Each intended one must require a gradient and be in exactly one group of the engine's optimizer, no other one may.
    """
    parameters: dict[str, Any] = dict(engine.module.named_parameters())
    counts = dict.fromkeys(parameters, 0)
    by_id = {id(parameter): name for name, parameter in parameters.items()}
    for member in _flatten(engine.optimizer.fp16_groups if is_stage3(engine) else engine.optimizer.bit16_groups):
        if id(member) in by_id:
            counts[by_id[id(member)]] += 1
    wanted = [name for name in sorted(intended) if name in parameters]
    found = {
        "should train, but the model does not have": [name for name in sorted(intended) if name not in parameters],
        "should train, but do not require a gradient": [n for n in wanted if not parameters[n].requires_grad],
        "should train, but are in no group of the optimizer": [
            n for n in wanted if parameters[n].requires_grad and counts[n] == 0
        ],
        "are in more than one group of the optimizer": [n for n in wanted if counts[n] > 1],
        "should be frozen, but require a gradient or are in the optimizer": [
            name for name, p in parameters.items() if name not in intended and (p.requires_grad or counts[name])
        ],
    }
    wrong = [f"{listed(names)} {what}" for what, names in found.items() if names]
    return "; ".join(wrong) or None


def listed(names: Collection[str]) -> str:
    """The first names, and how many there are."""
    first = list(names)[:3]
    more = len(names) - len(first)
    return f"{len(names)} parameter{'s' if len(names) > 1 else ''} ({', '.join(first)}{', ...' if more else ''})"


def _flatten(group: Any) -> Iterator[torch.Tensor]:
    """The tensors of lists in lists."""
    if isinstance(group, torch.Tensor):
        yield group
    else:
        for part in group:
            yield from _flatten(part)
