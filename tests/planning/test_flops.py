"""The planner's FLOPs and trained numbers against a real forward and backward, product by product."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.bare_loop import Products, flops
from tests.planning.models import built, loss_of, planned, recipe
from vidcls.planning.flops import micro_batch, total

CASES = {
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


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_flops_are_those_of_the_products_that_run(options: dict) -> None:
    # Written-out attention, because a fused one's products are not seen.
    config = recipe(**options, flash_attn="eager", bf16=False)
    classifier, inputs = built(config)
    work = planned(config, inputs)
    products = micro_batch(work)
    with Products() as forward:
        loss = loss_of(classifier, inputs)
    with Products() as backward:
        loss.backward()
    assert total(products, "forward") == forward.flops
    assert total(products, "backward", "recomputed") == backward.flops
    assert (total(products, "recomputed") > 0) is config.model.gradient_checkpointing
    # Not the sum alone: as many products of each size.
    mine: Counter[float] = Counter()
    for product in products:
        if product.phase == "forward":
            mine[product.flops / product.count] += int(product.count)
    theirs: Counter[float] = Counter()
    for product, count in forward.counts.items():
        theirs[flops(product)] += count
    assert mine == theirs
    assert work.trained == sum(p.numel() for p in classifier.parameters() if p.requires_grad)


def test_fused_causal_attention_is_half_of_it() -> None:
    config = recipe(flash_attn="auto")
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
