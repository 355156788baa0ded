"""What is to train, by name: against what `tune` makes trainable, and against an optimizer's groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vidcls.model.heads import ActionDecoder
from vidcls.model.tuning import TuningSettings, tune
from vidcls.model.weights import load_backbone
from vidcls.training.selfcheck.gradients import Reached
from vidcls.training.selfcheck.trained import intended_parameters, trained_wrongly

SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_dora": True, "vision_tuning": "lora", "merger_tuning": "lora"},
    {"lora_target": ("q_proj", "down_proj")},
    {"finetuning_type": "full", "vision_tuning": "full", "merger_tuning": "full"},
    {"finetuning_type": "freeze"},
    {"finetuning_type": "freeze", "vision_tuning": "lora", "merger_tuning": "full"},
    {"finetuning_type": "full", "merger_tuning": "lora", "use_dora": True},
]


def classifier(**settings: Any) -> nn.Module:
    """The parts of an ActionClassifier by their names."""
    model = nn.Module()
    model.backbone = tune(load_backbone("tiny", dtype=torch.float32), TuningSettings(**settings), seed=0)
    model.heads = nn.ModuleDict({"ucf": ActionDecoder(128, 3, "mlp", 8), "ssv2": ActionDecoder(128, 5)})
    model.action_token = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(128))})
    return model


def engine(model: nn.Module, groups: list[list[nn.Parameter]]) -> Any:
    """As much of a ZeRO-2 engine as is looked at."""
    return SimpleNamespace(module=model, optimizer=SimpleNamespace(bit16_groups=groups))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_intended_is_what_tuning_makes_trainable(settings: dict[str, Any]) -> None:
    model = classifier(**settings)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert intended_parameters(model, TuningSettings(**settings), ["ucf", "ssv2"]) == trained


def test_what_is_missing_twice_or_too_many_is_named() -> None:
    model = classifier()
    settings = TuningSettings()
    intended = intended_parameters(model, settings, ["ucf", "ssv2"])
    parameters = dict(model.named_parameters())
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    assert trained_wrongly(engine(model, [[*wanted.values()]]), intended) is None

    without = [p for name, p in wanted.items() if name != "heads.ucf.layers.2.bias"]
    found = trained_wrongly(engine(model, [without]), intended)
    assert found == "1 parameter (heads.ucf.layers.2.bias) should train, but are in no group of the optimizer"

    twice = trained_wrongly(engine(model, [[*wanted.values()], [wanted["action_token.weight"]]]), intended)
    assert twice == "1 parameter (action_token.weight) are in more than one group of the optimizer"

    frozen = "backbone.base_model.model.language_model.norm.weight"
    too_many = trained_wrongly(engine(model, [[*wanted.values(), parameters[frozen]]]), intended) or ""
    assert too_many.startswith(f"1 parameter ({frozen}) should be frozen")

    lacking = intended_parameters(model, settings, ["ucf", "ssv2", "kinetics"])
    assert "(heads.kinetics) should train, but the model does not have" in (
        trained_wrongly(engine(model, [[*wanted.values()]]), lacking) or ""
    )


def test_an_adapter_that_was_never_added_is_named() -> None:
    model = classifier(lora_target=("q_proj",))
    intended = intended_parameters(model, TuningSettings(), ["ucf", "ssv2"])
    groups = [[p for p in model.parameters() if p.requires_grad]]
    found = trained_wrongly(engine(model, groups), intended) or ""
    assert found.startswith("24 parameters (")  # A and B of six projections in two layers
    assert "q_proj" not in found
    assert "k_proj.lora_A.default.weight" in "".join(intended)


A = "backbone.base_model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"
B, TOKEN = A.replace("lora_A", "lora_B"), "action_token.weight"
TOP, LOWER, OTHER = "heads.ucf.layers.2.bias", "heads.ucf.layers.0.bias", "heads.ssv2.layers.weight"
NAMES = [A, B, TOKEN, TOP, LOWER, OTHER]


@pytest.mark.parametrize(
    ("zero_heads", "steps"),
    [
        # (clips of each head, rate, what must have a gradient)
        (False, [([3, 0], 0.0, {B, TOKEN, TOP, LOWER}), ([3, 1], 1.0, {B, TOKEN, TOP, LOWER, OTHER})]),
        (False, [([3, 0], 1.0, {B, TOKEN, TOP, LOWER}), ([0, 1], 0.0, {A, B, TOKEN, OTHER})]),
        (False, [([0, 0], 1.0, set())]),
        (
            True,
            [
                ([3, 0], 0.0, {TOP}),  # warm-up: nothing moves
                ([3, 0], 1.0, {TOP}),
                ([0, 2], 1.0, {OTHER}),  # the other head is still zero
                ([3, 0], 1.0, {TOP, LOWER, B, TOKEN}),
                ([0, 2], 1.0, {OTHER, A, B, TOKEN}),
            ],
        ),
    ],
)
def test_when_a_gradient_can_be_there(zero_heads: bool, steps: list[tuple[list[float], float, set[str]]]) -> None:
    reached = Reached(classifier(), NAMES, zero_heads=zero_heads)
    for number, (clips, rate, expected) in enumerate(steps):
        assert reached.step(clips, rate) == expected, number
