"""The fp32 masters that ZeRO keeps of what trains: where they lie, how one is set, and how they reach the model.

Each rank holds its own part of them, flat. The attributes used are DeepSpeed's own (0.19.8); nothing public reaches
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import nn

from vidcls import distributed


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Also where the parameter is partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_stage3(engine: deepspeed.DeepSpeedEngine) -> bool:
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat")


def flat_masters(engine: deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
    """This rank's masters, one flat tensor a group; the optimizer's own tensors."""
    zero = engine.optimizer
    return list(zero.fp32_partitioned_groups_flat if is_stage3(engine) else zero.single_partition_of_fp32_groups)


def own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a whole value. DeepSpeed's full setters fail under ZeRO-3 where sizes do not divide."""
    size = parameter.ds_tensor.ds_numel
    rank, world_size = distributed.rank(), distributed.world_size()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * world_size - value.numel()))
    return padded[rank * size : (rank + 1) * size].to(parameter.ds_tensor.device)


def set_master(engine: deepspeed.DeepSpeedEngine, parameter: Any, value: torch.Tensor) -> None:
    """Set this rank's part of a trained parameter's master from the whole value; the model's own copy stays."""
    if hasattr(parameter, "ds_id"):
        safe_set_local_fp32_param(parameter, own_part(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value.to(engine.device))


def push_masters(engine: deepspeed.DeepSpeedEngine) -> None:
    """Round the masters into the weights the model computes with, as an optimizer step does. All ranks must call it."""
    zero = engine.optimizer
    if not is_stage3(engine):
        zero.update_lp_params()
        return
    # The small parameters that ZeRO-3 keeps whole are released first and gathered again at the end.
    zero.checkpoint_event_prologue()
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    zero.checkpoint_event_epilogue()
