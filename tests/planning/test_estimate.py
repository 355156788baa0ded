"""Facts, memory, time and machines: what must hold whatever the figures are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.planning.models import built, recipe
from vidcls.options import DEFAULT_PROMPT
from vidcls.planning.estimate import Estimate, alternatives, estimate, gather_facts
from vidcls.planning.flops import Product
from vidcls.planning.machines import Machine, Rate, published, read_machine, write_machine
from vidcls.planning.steptime import Cluster

ALONE = Cluster(1, 1, 1e9)


def plan(cluster: Cluster = ALONE, machine: Machine | None = None, **options: object) -> Estimate:
    config = recipe(model_name_or_path="Qwen2.5-VL-3B", **options)
    return estimate(config, gather_facts(config), machine or published("h100"), cluster)


@pytest.mark.parametrize("prompt", [DEFAULT_PROMPT, "<video> <ACTION>", "Look: <video>\nWhich one? <ACTION>"])
@pytest.mark.parametrize("template", ["qwen2_vl", "empty"])
def test_text_is_as_long_as_the_encoder_makes_it(prompt: str, template: str) -> None:
    config = recipe(prompt=prompt, template=template)
    from tests.model.test_classifier import CLIPS
    from vidcls.model.pretrained import build_encoder
    from vidcls.training.setup import model_spec

    encoder = build_encoder(model_spec(config))
    frames, height, width, seconds, _ = CLIPS[0]
    grid = encoder.grid(frames, height, width)
    text, clip = encoder.encode(prompt, grid, seconds), gather_facts(config).clip
    assert clip.text_tokens == len(text) - encoder.geometry.num_tokens(grid)
    assert clip.prefix == text.video_start
    assert gather_facts(recipe(prompt=prompt, template=template, share_prefix=False)).clip.prefix == 0


def test_a_plan_shares_what_all_prompts_begin_with_where_it_pays() -> None:
    def row(clips: int, **options: object) -> int:
        config = recipe(**options)
        facts = gather_facts(config, frames=8)
        clip = replace(facts.clip, count=clips, height=112, width=112)
        return clips * clip.length(facts.model) - clip.row(facts.model)

    lead = gather_facts(recipe()).clip.prefix
    assert (row(1), row(4)) == (0, 3 * lead)
    assert row(4, torch_compile=True) == row(4, share_prefix=False) == 0
    assert row(4, template="empty") == 0  # the video's start alone
    several = [{"name": name, "dataset": "data/none", "prompt": f"{name} <video> <ACTION>"} for name in ("one", "two")]
    assert row(2, dataset=None, datasets=several) == lead - 1


def test_partitions_shrink_with_the_ranks() -> None:
    alone, many = plan(), plan(Cluster(1, 8, 1e9))
    assert many.memory.masters_and_moments == alone.memory.masters_and_moments / 8
    assert many.memory.frozen_weights == alone.memory.frozen_weights
    three = plan(Cluster(1, 8, 1e9), deepspeed="ds_configs/zero3.json")
    assert three.memory.frozen_weights == alone.memory.frozen_weights / 8
    assert three.memory.gathered > 0
    assert three.step.communication > many.step.communication > alone.step.communication == 0


def test_full_tuning_takes_18_bytes_a_trained_number() -> None:
    """bf16 weight, float32 master and moments, float32 gradient (ZeRO paper, arXiv 1910.02054, with our fp32 sums)."""
    found = plan(finetuning_type="full")
    states = found.memory.trained_weights + found.memory.masters_and_moments + found.memory.gradients
    assert states == pytest.approx(18 * found.trained, rel=0.02)
    assert found.trained == pytest.approx(3.086e9 - 0.311e9, rel=0.001)  # published: language model, embedding table


def test_a_slow_network_costs() -> None:
    fast, slow = (plan(Cluster(2, 8, speed), deepspeed="ds_configs/zero3.json") for speed in (50e9, 1e9))
    assert slow.step.communication == pytest.approx(50 * fast.step.communication)
    assert slow.step.bottleneck == "communication"


def test_checkpointing_trades_time_for_memory() -> None:
    config = recipe(model_name_or_path="Qwen2.5-VL-3B", per_device_train_batch_size=8)
    with_, without = (
        estimate(each, gather_facts(each), published("h100"), ALONE)
        for each in (recipe(**{**config.flat(), "gradient_checkpointing": on}) for on in (True, False))
    )
    assert with_.memory.activations < without.memory.activations / 5
    assert with_.step.total > without.step.total
    assert with_.flops == without.flops
    assert without.recomputed_flops == 0


def test_a_token_budget_divides_the_step() -> None:
    options = {"train_batch_size": 10, "per_device_train_batch_size": None, "max_tokens_per_batch": 600}
    found = plan(**options)  # 16 frames of 112x112 and some text: 154 tokens a clip
    assert (found.plan.micro, found.plan.accumulation, found.plan.global_) == (3, 4, 10)


def test_the_fastest_that_fits_is_first() -> None:
    config = recipe(model_name_or_path="Qwen2.5-VL-7B", train_batch_size=64, per_device_train_batch_size=8)
    small = replace(published("h100"), memory=24e9)
    ways = alternatives(config, gather_facts(config), small, Cluster(1, 2, 1e9))
    assert [way.fits for way in ways] == sorted((way.fits for way in ways), reverse=True)
    fitting = [way.step.total for way in ways if way.fits]
    assert fitting == sorted(fitting)
    assert all(way.plan.global_ == 64 for way in ways)


def test_a_calibration_of_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    write_machine(published("h100"), path)
    values = json.loads(path.read_text())
    del values["forward_seconds"]
    path.write_text(json.dumps(values | {"step_seconds": 0.01}))
    with pytest.raises(ValueError, match="of another version, by forward_seconds, step_seconds"):
        read_machine(path)


FUSED = (Rate(16, 32, 1e9), Rate(64, 32, 2e9), Rate(16, 80, 3e9), Rate(64, 80, 4e9))


def test_a_rate_lies_between_those_that_were_measured(tmp_path: Path) -> None:
    rates = (Rate(4, 100, 1e9), Rate(64, 100, 3e9), Rate(4, 10000, 5e9), Rate(64, 10000, 7e9))
    values = {**published("h100").value_seconds, "move": 1e-30}
    machine = replace(published("h100"), rates=rates, batched=rates, fused=FUSED, value_seconds=values)

    def rate(rows: int, inner: int, outer: int, **kind: Any) -> float:
        product = Product("forward", "", rows, inner, outer, **kind)
        return product.flops / machine.product_seconds(product, value_bytes=2)

    assert rate(4, 10, 10, batch=3) == pytest.approx(1e9)
    assert rate(64, 100, 100, batch=3) == pytest.approx(7e9)
    assert rate(512, 80, 64, batch=3, fused=(64, 80)) == pytest.approx(4e9)  # 8 query heads of a key
    assert rate(64, 16, 32, batch=3, fused=(16, 32)) == pytest.approx(1e9)
    assert rate(4, 10, 10) == pytest.approx(1e9)
    assert rate(16, 10, 10) == pytest.approx(2e9)  # halfway in the logarithm
    assert rate(16, 10, 100) == pytest.approx(4e9)
    assert rate(1000, 1000, 1000) == pytest.approx(7e9)  # the nearest beyond the ends
    narrow = Product("forward", "", 1000, 1000, 16)
    slow = replace(machine, narrow_seconds=1e-3)
    assert slow.product_seconds(replace(narrow, frozen=True), value_bytes=2) < 1
    assert slow.product_seconds(narrow, value_bytes=2) == pytest.approx(1e-3 * (1000 * 1000 + 2 * 16 * 1000))
    write_machine(machine, tmp_path / "machine.json")
    assert read_machine(tmp_path / "machine.json") == machine


def test_planned_sizes_are_those_of_a_real_batch() -> None:
    config = recipe()
    _, inputs = built(config)
    facts = gather_facts(config, frames=8)
    clip = replace(facts.clip, height=112, width=140)
    assert clip.length(facts.model) == inputs[2][0]
    assert clip.pixel_bytes * 3 == len(inputs[0])


def test_prepacked_weights_take_what_is_free_and_no_more() -> None:
    """On a CPU; a recipe fits or not without them, and products are slower where there is no room."""
    cpu = replace(published("h100"), on_gpu=False, memory=64e9, prepacking_gain=1.25)
    full = plan(machine=cpu).memory.prepacked
    assert full == pytest.approx(12.36e9 + 0.07e9, rel=0.01)  # 2 x 5.55 GB of the language model, 1.26 GB of the tower
    assert plan(machine=cpu, prepack_weights=False).memory.prepacked == 0
    assert plan(machine=cpu, deepspeed="ds_configs/zero3.json").memory.prepacked == 0
    less, none = (plan(machine=replace(cpu, memory=gigabytes * 1e9)) for gigabytes in (20, 9))
    assert 0 < less.memory.prepacked < full
    assert none.memory.prepacked == 0
    assert none.fits == plan(machine=replace(cpu, memory=9e9), prepack_weights=False).fits
    fast, slow = (plan(machine=cpu, prepack_weights=on).step.products for on in (True, False))
    assert 1.2 * fast < slow < 1.25 * fast  # LoRA's own products are never prepacked
    assert plan(Cluster(1, 4, 1e9), cpu).memory.prepacked < full  # each rank has its own
    assert plan().memory.prepacked == 0  # a GPU


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prepack_weights": False},
        {"bf16": False},
        {"torch_compile": True},
        {"finetuning_type": "full"},
        {"deepspeed": "ds_configs/zero3.json"},
    ],
)
def test_a_cpu_that_is_too_small_is_told_so(options: dict[str, object]) -> None:
    small = replace(published("h100"), on_gpu=False, memory=4e9)
    found = plan(machine=small, **options)
    assert not found.fits
    assert found.memory.prepacked == 0
    config = recipe(model_name_or_path="Qwen2.5-VL-3B", **options)
    assert not any(way.fits for way in alternatives(config, gather_facts(config), small, ALONE))
