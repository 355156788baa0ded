"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import get_polynomial_decay_schedule_with_warmup

from vidcls.config import OptimOptions
from vidcls.model.classifier import ActionClassifier
from vidcls.model.pretrained import ModelSpec, build_encoder, build_model
from vidcls.training.optimizer import check_groups, learning_rate, parameter_groups, set_learning_rate


def options(**values: Any) -> OptimOptions:
    return OptimOptions(per_device_train_batch_size=1, **values)


@pytest.fixture(scope="module")
def model() -> ActionClassifier:
    spec = ModelSpec(
        model_name_or_path="tiny",
        bf16=False,
        flash_attn="auto",
        lora_rank=2,
        lora_alpha=4,
        lora_dropout=0.0,
        prompt="<video> <ACTION>",
        video_maxlen=4,
        video_min_pixels=784,
        video_max_pixels=3136,
        cutoff_len=64,
    )
    return build_model(spec, build_encoder(spec), num_classes=3, decoder_type="mlp", mlp_hidden_size=5, seed=0)


def names_of(model: nn.Module, group: dict[str, Any]) -> set[str]:
    members = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in members}


def test_matrices_decay_and_biases_and_token_do_not(model: ActionClassifier) -> None:
    groups = {g["name"]: g for g in parameter_groups(model, options(weight_decay=0.3, action_token_lr_scale=7))}
    assert groups.keys() == {"decayed", "plain", "action_token"}
    lora = {name for name, p in model.named_parameters() if ".lora_" in name}
    assert names_of(model, groups["decayed"]) == lora | {"head.layers.0.weight", "head.layers.2.weight"}
    assert names_of(model, groups["plain"]) == {"head.layers.0.bias", "head.layers.2.bias"}
    assert names_of(model, groups["action_token"]) == {"action_token.weight"}
    assert {name: g["weight_decay"] for name, g in groups.items()} == {"decayed": 0.3, "plain": 0, "action_token": 0}
    assert {name: g["lr_scale"] for name, g in groups.items()} == {"decayed": 1, "plain": 1, "action_token": 7}


def test_every_group_gets_the_rate_times_its_scale(model: ActionClassifier) -> None:
    adam = torch.optim.AdamW(parameter_groups(model, options(action_token_lr_scale=7)))
    set_learning_rate(adam, 0.01)
    assert [group["lr"] for group in adam.param_groups] == [0.01, 0.01, 0.07]


def test_a_model_without_biases_has_no_empty_group(model: ActionClassifier) -> None:
    alone = nn.Linear(2, 2, bias=False)
    assert [group["name"] for group in parameter_groups(alone, options())] == ["decayed"]


def test_a_head_outside_the_optimizer_is_an_error(model: ActionClassifier) -> None:
    head = {id(p) for p in model.head.parameters()}
    groups = parameter_groups(model, options())
    kept = [dict(g, params=[p for p in g["params"] if id(p) not in head]) for g in groups]
    with pytest.raises(ValueError, match=r"head\.layers\.0\.weight \(0 groups, trainable\)"):
        check_groups(model, kept)


def test_a_parameter_in_two_groups_is_an_error(model: ActionClassifier) -> None:
    groups = parameter_groups(model, options())
    groups[0]["params"].append(model.action_token.weight)
    with pytest.raises(ValueError, match=r"group: action_token\.weight \(2 groups, trainable\)$"):
        check_groups(model, groups)


def test_a_frozen_parameter_in_a_group_is_an_error(model: ActionClassifier) -> None:
    groups = parameter_groups(model, options())
    groups[1]["params"].append(model.inner.language_model.norm.weight)
    with pytest.raises(ValueError, match=r"language_model\.norm\.weight \(1 groups, frozen\)$"):
        check_groups(model, groups)


def rates(total: int, optim: OptimOptions) -> list[float]:
    return [learning_rate(step, total, optim) for step in range(total)]


def transformers_rates(total: int, build: Any) -> list[float]:
    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler, found = build(adam), []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        adam.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(("name", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", None)])
def test_schedules_are_those_of_transformers(name: str, theirs: str | None, warmup: int) -> None:
    optim = options(learning_rate=3e-4, lr_scheduler_type=name, warmup_steps=warmup)
    expected = transformers_rates(
        50, lambda adam: get_scheduler(theirs or "constant_with_warmup", adam, warmup, num_training_steps=50)
    )
    assert rates(50, optim) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("warmup", [0, 5])
def test_the_polynomial_schedule_is_that_of_transformers(power: float, warmup: int) -> None:
    optim = options(learning_rate=3e-4, lr_scheduler_type="polynomial", lr_scheduler_power=power, warmup_steps=warmup)
    expected = transformers_rates(
        50, lambda adam: get_polynomial_decay_schedule_with_warmup(adam, warmup, 50, lr_end=0.0, power=power)
    )
    assert rates(50, optim) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_the_warmup_ratio_is_rounded_up() -> None:
    by_ratio = options(learning_rate=1.0, warmup_ratio=0.1)
    assert rates(41, by_ratio) == rates(41, options(learning_rate=1.0, warmup_steps=5))


def test_the_rate_falls_to_zero_behind_the_last_step() -> None:
    optim = options(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=0)
    assert rates(4, optim) == [1.0, 0.75, 0.5, 0.25]
