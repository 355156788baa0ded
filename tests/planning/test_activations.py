"""What the planner says autograd keeps, against the storages that it does keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.planning.models import built, loss_of, planned, recipe
from vidcls.planning.activations import kept

CASES = {
    "lora": {},
    "no dropout": {"lora_dropout": 0.0, "lora_rank": 16},
    "float32": {"bf16": False},
    "checkpointing": {"gradient_checkpointing": True},
    "some layers": {"lora_target": ["q_proj", "v_proj"]},
    "nothing tuned": {"finetuning_type": "freeze"},
    "full": {"finetuning_type": "full"},
    "DoRA": {"use_dora": True},
    "vision lora": {"vision_tuning": "lora", "merger_tuning": "lora"},
}


@pytest.mark.parametrize("prefix", [0, 40])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_kept_bytes_are_those_of_the_saved_tensors(options: dict[str, Any], prefix: int) -> None:
    config = recipe(**options)
    classifier, inputs = built(config)
    parameters = {p.untyped_storage().data_ptr() for p in classifier.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(classifier, inputs, prefix)
    saved = sum(storage.nbytes() for storage in storages.values())
    slack = {"DoRA": 0.1, "vision lora": 0.03}.get(next(n for n, o in CASES.items() if o is options), 0.005)
    assert kept(planned(config, inputs, prefix=prefix)) == pytest.approx(saved, rel=slack)
