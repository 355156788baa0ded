"""Several adapted layers at once against PEFT's own forward, one after the other."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from vidcls.model import adapters
from vidcls.model.adapters import project

NAMES = ("a", "b", "c")


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(12, 20), nn.Linear(12, 4, bias=False), nn.Linear(12, 6)

    def all(self):
        return self.a, self.b, self.c


def make_layers(targets=NAMES, dtype=torch.float32, **settings):
    layers = Layers()
    if targets:
        config = LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), **settings)
        inject_adapter_in_model(config, layers)
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return layers.to(dtype)


def results(layers, compute, x):
    """Outputs and the gradients of a sum with fixed random weights."""
    x = x.clone().requires_grad_()
    outputs = compute(x)
    generator = torch.Generator().manual_seed(0)
    sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs).backward()
    grads = {name: p.grad for name, p in layers.named_parameters() if p.requires_grad}
    return [*outputs, x.grad, *grads.values()], grads


@pytest.mark.parametrize("targets", [NAMES, ("a",), ("a", "c"), ()])
def test_equals_one_layer_after_the_other(targets, monkeypatch):
    layers, x = make_layers(targets), torch.randn(2, 5, 12)
    expected, grads = results(layers, lambda x: [layer(x) for layer in layers.all()], x)
    assert len(grads) == 2 * len(targets)
    ours = copy.deepcopy(layers)
    ours.zero_grad()
    for layer in ours.all():
        monkeypatch.setattr(layer, "forward", None)  # nothing is called
    found, _ = results(ours, lambda x: project(x, ours.all()), x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_dropout_mask_for_all_layers_on_an_input(dtype, monkeypatch):
    layers, x = make_layers(lora_dropout=0.25, dtype=dtype).train(), torch.randn(400, 12).to(dtype)
    masks = []
    make = adapters._keep_mask
    monkeypatch.setattr(adapters, "_keep_mask", lambda *args: masks.append(make(*args)) or masks[-1])
    found, _ = results(layers, lambda x: project(x, layers.all()), x)
    (keep,) = masks
    assert abs(keep.float().mean() - 0.75) < 0.03
    assert keep.unique().tolist() == [0, 1]

    def by_hand(x):
        dropped = x * keep / 0.75
        for layer in layers.all():
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            yield layer.base_layer(x) + dropped @ down.T @ up.T * (5 / 3)

    layers.zero_grad()
    expected, _ = results(layers, lambda x: list(by_hand(x)), x)
    coarse = dtype == torch.bfloat16
    tolerance = {"atol": 0.6, "rtol": 0.05} if coarse else {"atol": 2e-4, "rtol": 1e-5}  # sums over 400 rows
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_a_mask_follows_from_torchs_generator():
    x = torch.zeros(30, 7)
    torch.manual_seed(3)
    first, second = adapters._keep_mask(x, 0.5), adapters._keep_mask(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(adapters._keep_mask(x, 0.5), first)
    assert not torch.equal(first, second)
    many = adapters._keep_mask(torch.zeros(1000, 1000), 0.05)
    assert many.float().mean().item() == pytest.approx(0.95, abs=0.001)  # 4.6 deviations
    rows = many.float() - 0.95
    assert (rows[:-1] * rows[1:]).mean().abs() < 3e-4  # neighbours do not know each other
    assert (rows[:, :-1] * rows[:, 1:]).mean().abs() < 3e-4


def test_evaluation_drops_nothing():
    layers, x = make_layers(lora_dropout=0.5).eval(), torch.randn(4, 12)
    for one, layer in zip(project(x, layers.all()), layers.all(), strict=True):
        torch.testing.assert_close(one, layer(x))


def test_an_input_is_kept_once_for_adapters_and_not_at_all_without():
    x = torch.randn(50, 12)
    for targets, copies in ((NAMES, 1), (("b",), 1), ((), 0)):
        layers, kept = make_layers(targets), []
        inputs = (x.clone().requires_grad_() * 1).contiguous()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t) or t, lambda t: t):
            project(inputs, layers.all())
        assert sum(t.data_ptr() == inputs.data_ptr() for t in kept) == copies


def made_by_peft_itself(change):
    layers = make_layers(use_dora=change == "dora")
    if change == "merged":
        layers.a.merge()
    if change == "whole weights":
        layers.a.base_layer.weight.requires_grad_()
    if change == "disabled":
        layers.b.enable_adapters(False)
    if change == "partitioned":
        layers.c.base_layer.weight.ds_id = 1
    return layers


@pytest.mark.parametrize("change", ["dora", "merged", "whole weights", "disabled", "partitioned"])
def test_other_layers_are_called(change, monkeypatch):
    layers, x = made_by_peft_itself(change), torch.randn(4, 12)
    expected = [layer(x) for layer in layers.all()]
    monkeypatch.setattr(adapters._Projections, "apply", None)
    for one, other in zip(project(x, layers.all()), expected, strict=True):
        assert torch.equal(one, other)
