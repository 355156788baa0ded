"""The planner's FLOPs and trained numbers against a real forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.planning.models import built, loss_of, planned, recipe
from vidcls.planning.flops import micro_batch, total

CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, checkpointing": {"gradient_checkpointing": True},
    "lora on some layers, mlp": {
        "lora_target": ["q_proj", "v_proj", "down_proj"],
        "action_decoder_type": "mlp",
        "action_decoder_hidden_size": 32,
    },
    "merger full": {"merger_tuning": "full", "finetuning_type": "freeze"},
    "vision lora": {"vision_tuning": "lora", "merger_tuning": "lora", "gradient_checkpointing": True},
    "full": {"vision_tuning": "full", "merger_tuning": "full", "finetuning_type": "full"},
    "attention head": {"action_decoder_type": "attention"},
}


class Products(TorchDispatchMode):
    """2 FLOPs for each multiply-add of the matrix products inside the block. torch's FlopCounterMode misses addmm_."""

    flops = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1].rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = args[1:3] if "add" in name else args[:2]
            self.flops += 2.0 * left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("prefix", [0, 40])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_flops_are_those_of_the_products_that_run(options: dict[str, Any], prefix: int) -> None:
    # Written-out attention, because a fused one's products are not seen.
    config = recipe(**options, flash_attn="eager", bf16=False)
    classifier, inputs = built(config)
    work = planned(config, inputs, prefix=prefix)
    products = micro_batch(work)
    with Products() as forward:
        loss = loss_of(classifier, inputs, prefix)
    with Products() as backward:
        loss.backward()
    # The attention head's one query a clip is left out, 0.01 %.
    slack = 1e-3 if config.model.action_decoder_type == "attention" else 0
    assert total(products, "forward") == pytest.approx(forward.flops, rel=slack, abs=0)
    assert total(products, "backward", "recomputed") == pytest.approx(backward.flops, rel=slack, abs=0)
    assert (total(products, "recomputed") > 0) is config.model.gradient_checkpointing
    assert work.trained == sum(p.numel() for p in classifier.parameters() if p.requires_grad)


def test_fused_causal_attention_is_half_of_it() -> None:
    config = recipe()
    _, inputs = built(config)
    work = planned(config, inputs)
    fused = replace(work, fused_attention=True)
    attended = [
        (a.flops, b.flops)
        for a, b in zip(micro_batch(work), micro_batch(fused), strict=True)
        if a.batch > 1 and a.part == "language" and a.phase == "forward" and a.rows > 3 * 2
    ]
    assert attended
    assert all(b == a / 2 for a, b in attended)
