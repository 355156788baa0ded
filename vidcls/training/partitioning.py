"""Frozen weights under DeepSpeed: partitioned as they are read (ZeRO-3), or shared by the ranks of a host (ZeRO-1, 2).

DeepSpeed would have rank 0 send every weight to all others. Here each rank reads its own part from the files instead,
so all ranks must have read the same ones: compare `vidcls.model.weights.fingerprint` when they may have copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from vidcls.model.weights import Partition


@contextlib.contextmanager
def partitioned(config: dict[str, Any]) -> Iterator[Partition | None]:
    """Build one model inside: yields the `partition` for `load_backbone`, None below ZeRO-3. All ranks must call it.

    Adapters must be added inside as well. DoRA starts from the whole weight of each layer, and PEFT gathers it only
    while transformers believes in ZeRO-3, which is while an HfDeepSpeedConfig is alive. Nothing needs it later: in
    forwards DeepSpeed gathers what DoRA reads. What is built inside without `partition` (adapters, heads) stays whole
    until deepspeed.initialize partitions it.

    Args:
        config: the merged DeepSpeed configuration, with batch sizes; its bf16.enabled is the dtype of what is read.
    """
    if config["zero_optimization"]["stage"] != 3:
        yield None
        return
    believers = []  # transformers has weak references only

    @contextlib.contextmanager
    def partition() -> Iterator[None]:
        # No dtype: where the accelerator has no fp16, DeepSpeed 0.19.8 takes bf16 whatever is passed; not if told
        # by its configuration.
        with _ReadByAllRanks(config_dict_or_path=config):
            yield
        # From now on only: a believing transformers would start a zero.Init of its own for each part of a new model.
        believers.append(HfDeepSpeedConfig(config))

    try:
        yield partition
    finally:
        believers.clear()


class _ReadByAllRanks(deepspeed.zero.Init):
    """zero.Init, except that a parameter built in the context is cut where it is, not sent by rank 0 before.

    Each rank then touches the pages of its own part only, and never writes to a mapped file. What deepspeed.initialize
    partitions later, through the same object, is sent as ever.
    """

    inside = False

    def __enter__(self) -> None:
        self.inside = True
        super().__enter__()

    def __exit__(self, *reason: Any) -> bool | None:
        self.inside = False
        return super().__exit__(*reason)

    def _zero_init_param(self, param: nn.Parameter) -> None:
        if not self.inside:
            super()._zero_init_param(param)
            return
        self._convert_to_deepspeed_param(param)
        param.partition()  # type: ignore[attr-defined]


def keep_shared(model: nn.Module) -> None:
    """Have deepspeed.initialize send only what trains to the other ranks; call it before.

    Otherwise every rank but 0 would write the frozen weights it receives over its mapped pages, and own a copy of
    the whole model. The mark is DeepSpeed's own, for weights that are not alike on all ranks.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.ds_optim_param = True  # type: ignore[attr-defined]
