"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from vidcls.config import ConfigError
from vidcls.model.tuning import TuningSettings, tune
from vidcls.model.weights import load_backbone
from vidcls.options import OptimOptions
from vidcls.training.optimizer import check_groups, learning_rate, parameter_groups, set_learning_rate


def options(**values: Any) -> OptimOptions:
    return OptimOptions(per_device_train_batch_size=1, **values)


def classifier(**settings: Any) -> nn.Module:
    """The parts of an ActionClassifier by their names: two language layers, two vision blocks, a head, <ACTION>."""
    model = nn.Module()
    model.backbone = tune(load_backbone("tiny", dtype=torch.float32), TuningSettings(lora_rank=2, **settings), seed=0)
    model.heads = nn.ModuleDict({"ucf": nn.Sequential(nn.Linear(128, 8), nn.LayerNorm(8), nn.Linear(8, 3))})
    model.action_token = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(128))})
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return classifier()


def scales(model: nn.Module, optim: OptimOptions) -> dict[str, float]:
    """The factor on the learning rate of every trained parameter."""
    found = {id(p): group["lr_scale"] for group in parameter_groups(model, optim) for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def decays(model: nn.Module) -> set[str]:
    groups = parameter_groups(model, options(weight_decay=0.3))
    assert {group["weight_decay"] for group in groups} <= {0.3, 0.0}
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in decayed}


def test_matrices_decay_and_vectors_do_not(model: nn.Module) -> None:
    lora = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert decays(model) == lora | {"heads.ucf.0.weight", "heads.ucf.2.weight"}
    assert {group["name"] for group in parameter_groups(model, options())} == {
        "language.decayed",
        "language.lora_B.decayed",
        "head.decayed",
        "head.plain",
        "action_token.plain",
    }


def test_magnitudes_norms_and_biases_do_not_decay() -> None:
    whole = classifier(finetuning_type="full", vision_tuning="lora", use_dora=True)
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    plain = trained - decays(whole)
    assert {name for name in trained if "magnitude" in name} < plain
    ends = {name.split(".")[-2] for name in plain if "language_model" in name}
    assert ends == {"q_proj", "k_proj", "v_proj", "input_layernorm", "post_attention_layernorm", "norm"}
    assert all(name.endswith("bias") for name in plain if "_proj." in name and "magnitude" not in name)


def test_each_part_has_its_own_rate() -> None:
    whole = classifier(vision_tuning="full", merger_tuning="lora")
    optim = options(vision_lr_scale=0.1, merger_lr_scale=3, head_lr_scale=10, action_token_lr_scale=7)
    for name, scale in scales(whole, optim).items():
        if name.startswith("heads."):
            assert scale == 10, name
        elif name == "action_token.weight":
            assert scale == 7
        elif ".visual.merger." in name:
            assert scale == 3, name
        else:
            assert scale == (0.1 if ".visual." in name else 1), name


def test_loraplus_speeds_up_b_alone() -> None:
    found = scales(classifier(vision_tuning="lora"), options(loraplus_lr_ratio=16, vision_lr_scale=0.5))
    for name, scale in found.items():
        expected = (0.5 if ".visual." in name else 1) * (16 if ".lora_B." in name else 1)
        assert scale == expected, name


def test_layers_slow_down_from_each_sides_own_top() -> None:
    """BEiT's rule by hand: of N blocks number i (from 0) has decay ** (N - i), the embedding decay ** (N + 1)."""
    whole = classifier(finetuning_type="full", vision_tuning="full", merger_tuning="full")
    found = scales(whole, options(layerwise_lr_decay=0.5, head_lr_scale=8))
    expected = {
        "backbone.language_model.layers.0.": 0.25,
        "backbone.language_model.layers.1.": 0.5,
        "backbone.language_model.norm.": 1,
        "backbone.visual.patch_embed.": 0.125,
        "backbone.visual.blocks.0.": 0.25,
        "backbone.visual.blocks.1.": 0.5,
        "backbone.visual.merger.": 1,
        "heads.": 8,
        "action_token.": 1,
    }
    for name, scale in found.items():
        (start,) = [start for start in expected if name.startswith(start)]
        assert scale == expected[start], name
    assert {start for start in expected if any(name.startswith(start) for name in found)} == expected.keys()


def test_layers_are_counted_inside_pefts_wrapper_too() -> None:
    found = scales(classifier(), options(layerwise_lr_decay=0.5, loraplus_lr_ratio=4))
    lower = {scale for name, scale in found.items() if ".layers.0." in name}
    upper = {scale for name, scale in found.items() if ".layers.1." in name}
    assert lower == {0.25, 1.0}
    assert upper == {0.5, 2.0}


def test_partitioned_parameters_are_grouped_by_their_whole_shape(model: nn.Module) -> None:
    """ZeRO-3 leaves an empty vector behind and notes the shape."""
    name = "heads.ucf.2.weight"
    weight: Any = model.get_parameter(name)
    whole = weight.data
    try:
        weight.data, weight.ds_shape = torch.empty(0), whole.shape
        assert name in decays(model)
    finally:
        weight.data = whole
        del weight.ds_shape


def test_every_group_gets_the_rate_times_its_scale(model: nn.Module) -> None:
    adam = torch.optim.AdamW(parameter_groups(model, options(action_token_lr_scale=7)))
    set_learning_rate(adam, 0.01)
    assert {group["name"]: group["lr"] for group in adam.param_groups} == {
        "language.decayed": 0.01,
        "language.lora_B.decayed": 0.01,
        "head.decayed": 0.01,
        "head.plain": 0.01,
        "action_token.plain": pytest.approx(0.07),
    }


def test_parts_that_do_not_train_have_no_group() -> None:
    groups = parameter_groups(classifier(finetuning_type="freeze"), options())
    assert {group["name"] for group in groups} == {"head.decayed", "head.plain", "action_token.plain"}


def test_a_head_outside_the_optimizer_is_an_error(model: nn.Module) -> None:
    groups = [group for group in parameter_groups(model, options()) if not group["name"].startswith("head.")]
    with pytest.raises(ValueError, match=r"heads\.ucf\.0\.weight \(0 groups, trainable\)"):
        check_groups(model, groups)


def test_a_parameter_in_two_groups_is_an_error(model: nn.Module) -> None:
    groups = parameter_groups(model, options())
    groups[-1]["params"].append(model.get_parameter("action_token.weight"))
    with pytest.raises(ValueError, match=r"group: action_token\.weight \(2 groups, trainable\)$"):
        check_groups(model, groups)


def test_a_frozen_parameter_in_a_group_is_an_error(model: nn.Module) -> None:
    groups = parameter_groups(model, options())
    groups[1]["params"].append(model.backbone.get_base_model().language_model.norm.weight)
    with pytest.raises(ValueError, match=r"language_model\.norm\.weight \(1 groups, frozen\)$"):
        check_groups(model, groups)


def rates(total: int, optim: OptimOptions) -> list[float]:
    return [learning_rate(step, total, optim) for step in range(total)]


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"num_cycles": 0.4},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2, "lr_end": 1e-5},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 40},
    "cosine_with_min_lr": {"min_lr": 6e-5},
    "warmup_stable_decay": {"num_decay_steps": 12, "decay_type": "1-sqrt", "min_lr_ratio": 0.05},
}


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_what_transformers_steps_through(name: str, warmup: int) -> None:
    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler: Any = get_scheduler(name, adam, warmup, 50, scheduler_specific_kwargs=dict(SCHEDULES[name]))
    expected = []
    for _ in range(50):
        expected.append(scheduler.get_last_lr()[0])
        adam.step()
        scheduler.step()
    optim = options(
        learning_rate=3e-4,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=SCHEDULES[name],
        warmup_steps=None if name == "constant" else warmup,
    )
    assert rates(50, optim) == pytest.approx(expected, rel=1e-12, abs=1e-18)
    # A pure function of the step: a resumed run asks for a later one first.
    assert learning_rate(31, 50, optim) == pytest.approx(expected[31], rel=1e-12)


def test_some_rates_by_hand() -> None:
    assert rates(4, options(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=0)) == [1.0, 0.75, 0.5, 0.25]
    cosine = rates(8, options(learning_rate=2.0, warmup_steps=4))
    half = math.sqrt(0.5)
    assert cosine == pytest.approx([0, 0.5, 1, 1.5, 2, 1 + half, 1, 1 - half])


def test_the_warmup_ratio_is_rounded_up() -> None:
    by_ratio = options(learning_rate=1.0, warmup_ratio=0.1)
    assert rates(41, by_ratio) == rates(41, options(learning_rate=1.0, warmup_steps=5))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"exponent": 2}},
            "lr_scheduler_kwargs: polynomial does not take exponent; legal: lr_end, power$",
        ),
        (
            {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"power": 2}},
            "constant_with_warmup does not take power; legal: none$",
        ),
        ({"lr_scheduler_kwargs": {"num_training_steps": 9}}, "does not take num_training_steps; legal: num_cycles$"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "two"}}, "{'power': 'two'} does not fit"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1}}, "does not fit polynomial over 50"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "does not fit cosine_with_min_lr .* min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay needs num_decay_steps; legal: num_decay"),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 46}},
            "num_decay_steps is 46; of 50 steps, 5 of them warm-up, at most 45 are left",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1}},
            "gives polynomial a learning rate of -",
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps: 5 has no effect .* constant_with_warmup"),
    ],
)
def test_arguments_that_a_schedule_does_not_take(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        learning_rate(0, 50, options(**values))
