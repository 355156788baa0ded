"""Which kernels are used where, with a stand-in for what this machine lacks; compiled layers compute the same."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vidcls import distributed
from vidcls.model.kernels import apply_liger, compile_layers, resolve_attention, resolve_liger
from vidcls.model.tuning import TuningSettings, tune
from vidcls.model.weights import load_backbone


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "accelerator_name", lambda: "cuda")


def pretend_package(monkeypatch: pytest.MonkeyPatch, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize(
    ("option", "implementation"), [("auto", None), ("sdpa", "sdpa"), ("eager", "eager"), ("disabled", "eager")]
)
def test_attention_that_every_machine_has(option: str, implementation: str | None) -> None:
    assert resolve_attention(option) == (implementation, None)


def test_flash_attention_needs_a_gpu_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "accelerator_name", lambda: "cpu")
    rest = "; torch's sdpa is used"
    both = "flash_attn: fa2 needs a GPU (here: cpu) and the package flash-attn"
    assert resolve_attention("fa2") == ("sdpa", both + rest)
    pretend_package(monkeypatch, "flash_attn")
    assert resolve_attention("fa2") == ("sdpa", "flash_attn: fa2 needs a GPU (here: cpu)" + rest)
    pretend_gpu(monkeypatch)
    assert resolve_attention("fa2") == ("flash_attention_2", None)
    monkeypatch.delitem(sys.modules, "flash_attn")
    assert resolve_attention("fa2") == ("sdpa", "flash_attn: fa2 needs the package flash-attn" + rest)


def test_attention_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="flash_attn is 'fa3'; it must be one of auto, sdpa, eager, disabled, fa2"):
        resolve_attention("fa3")


def test_a_kernel_that_is_not_asked_for_needs_nothing() -> None:
    assert resolve_liger(False) is None


def test_without_liger_its_absence_is_said_and_the_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "accelerator_name", lambda: "cpu")
    notice = resolve_liger(True)
    assert notice is not None
    assert notice.startswith("enable_liger_kernel: needs a GPU (here: cpu)")
    assert notice.endswith("transformers' own RMSNorm and SwiGLU are used")
    backbone = load_backbone("tiny", dtype=torch.float32)
    apply_liger(backbone, True)
    assert not any("forward" in vars(module) for module in backbone.modules())


def test_with_liger_this_instance_is_patched_and_nothing_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes what liger-kernel 0.8.5 takes, with its defaults."""
    calls: list[dict[str, Any]] = []

    def apply_liger_kernel_to_qwen2_5_vl(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: Any = None,
    ) -> None:
        calls.append(dict(locals()))

    pretend_gpu(monkeypatch)
    pretend_package(monkeypatch, "liger_kernel")
    transformers: Any = pretend_package(monkeypatch, "liger_kernel.transformers")
    transformers.apply_liger_kernel_to_qwen2_5_vl = apply_liger_kernel_to_qwen2_5_vl
    backbone = load_backbone("tiny", dtype=torch.float32)
    apply_liger(backbone, False)
    assert calls == []
    assert resolve_liger(True) is None
    apply_liger(backbone, True)
    (call,) = calls
    assert call.pop("model") is backbone
    assert {name for name, on in call.items() if on} - {"calls"} == {"rms_norm", "swiglu"}


@pytest.fixture
def compiled_in_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace as ever and run the traced graphs as they are: compiling them takes half a minute."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: real(*args, **{**kwargs, "backend": "eager"}))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def adapted(*, compiled: bool) -> Any:
    """LoRA with moved B matrices, checkpointing on, in training."""
    model: Any = tune(load_backbone("tiny", dtype=torch.float32), TuningSettings(lora_rank=4), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=generator)
    inner = model.get_base_model()
    inner.language_model.activation_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_layers(inner)
    return model.train()


def gradients(model: Any, length: int) -> dict[str, torch.Tensor]:
    embeds = torch.randn(2, length, 128, generator=torch.Generator().manual_seed(length))
    model.zero_grad()
    hidden = model.get_base_model().language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    hidden[:, -1].square().sum().backward()
    return {"hidden": hidden.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.usefixtures("compiled_in_python")
@pytest.mark.launch
def test_compiled_layers_keep_their_names_values_and_gradients() -> None:
    plain, compiled = adapted(compiled=False), adapted(compiled=True)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in compiled.modules()]
    for length in (6, 9):
        expected, found = gradients(plain, length), gradients(compiled, length)
        assert expected.keys() == found.keys()
        assert sum(".lora_" in name for name in found) == 2 * 14
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def test_layers_that_are_not_compiled_are_left_alone() -> None:
    model = adapted(compiled=False)
    assert all(layer._compiled_call_impl is None for layer in model.get_base_model().language_model.layers)
    compile_layers(model.get_base_model())
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {f"base_model.model.language_model.layers.{layer}" for layer in (0, 1)}
