"""What trains under each setting, by module, against PEFT's own reading of what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2_5_VLModel

from vidcls.model.tiny import tiny_backbone
from vidcls.model.tuning import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    TUNED_WEIGHTS_NAME,
    TunedPart,
    TuningSettings,
    format_table,
    load_adapter,
    load_tuned,
    parameter_kind,
    parameter_part,
    save_adapter,
    save_tuned,
    trained_table,
    tune,
)
from vidcls.model.weights import load_backbone

LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
EVERYWHERE = TuningSettings(lora_rank=4, vision_tuning="lora", merger_tuning="lora")


def frozen(dtype: torch.dtype = torch.float32) -> Qwen2_5_VLModel:
    return load_backbone("tiny", dtype=dtype)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_modules(model: nn.Module) -> set[str]:
    """Names in the plain model of the modules that have an adapter."""
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_modules()]
    return {name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")}


def linears(prefix: str) -> set[str]:
    return {n for n, m in tiny_backbone().named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix)}


def run(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower's and the language model's output for fixed inputs."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    generator = torch.Generator().manual_seed(3)
    dtype = next(inner.parameters()).dtype
    patches = torch.randn(32, 3 * 2 * 14 * 14, generator=generator).to(dtype)
    embeds = torch.randn(2, 5, 128, generator=generator).to(dtype)
    with torch.no_grad():
        seen = inner.visual(patches, grid_thw=torch.tensor([[2, 4, 4]])).pooler_output
        return seen, inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state


def stir(model: nn.Module) -> dict[str, torch.Tensor]:
    """Move everything that trains, as training would; returns it by name."""
    generator = torch.Generator().manual_seed(5)
    for parameter in trained(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return {name: parameter.detach().clone() for name, parameter in trained(model).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_default_every_linear_layer_of_the_language_model_has_an_adapter(dtype: torch.dtype) -> None:
    model = tune(frozen(dtype), TuningSettings(lora_rank=4), seed=0)
    assert adapted_modules(model) == linears("language_model.")
    assert len(trained(model)) == 2 * 2 * 7
    assert all(".lora_" in name and p.dtype == dtype for name, p in trained(model).items())


def test_tower_and_merger_get_adapters_of_their_own() -> None:
    both = {"vision_tuning": "lora", "merger_tuning": "lora"}
    tower = {name for name in linears("visual.") if ".merger." not in name}
    merger = linears("visual.merger.")
    for settings, expected in (
        (TuningSettings(vision_tuning="lora"), linears("language_model.") | tower),
        (TuningSettings(merger_tuning="lora"), linears("language_model.") | merger),
        (TuningSettings(finetuning_type="freeze", **both), tower | merger),
        (TuningSettings(finetuning_type="full", vision_tuning="lora"), tower),
        (EVERYWHERE, linears("")),
    ):
        assert adapted_modules(tune(frozen(), settings, seed=0)) == expected
    assert len(tower) == 2 * 5
    assert len(merger) == 2


def test_lora_target_names_layers_of_the_language_model_alone() -> None:
    settings = TuningSettings(lora_target=("q_proj", "gate_proj"), vision_tuning="lora")
    found = adapted_modules(tune(frozen(), settings, seed=0))
    assert {name for name in found if name.startswith("language")} == {
        f"language_model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.gate_proj")
    }
    assert len([name for name in found if name.startswith("visual")]) == 2 * 5


@pytest.mark.parametrize("dora", [False, True])
def test_the_initial_weights_follow_the_seed_and_change_no_output(dora: bool) -> None:
    states = []
    for global_seed, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(global_seed)
        model = tune(frozen(), TuningSettings(lora_rank=4, use_dora=dora, vision_tuning="lora"), seed=seed)
        states.append({name: p.detach() for name, p in trained(model).items()})
    equal = [all(torch.equal(states[0][n], other[n]) for n in states[0]) for other in states[1:]]
    assert equal == [True, False]
    for mine, plain in zip(run(model.eval()), run(frozen()), strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-4)


def test_full_tuning_is_every_weight_but_the_embedding_table() -> None:
    settings = TuningSettings(finetuning_type="full", vision_tuning="full", merger_tuning="full")
    model = tune(frozen(), settings, seed=0)
    assert isinstance(model, Qwen2_5_VLModel)
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {"language_model.embed_tokens.weight"}


def test_full_parts_beside_adapters_train_too() -> None:
    """PEFT freezes all that it wraps."""
    model = tune(frozen(), TuningSettings(lora_rank=2, vision_tuning="full", merger_tuning="frozen"), seed=0)
    full = {n.removeprefix("base_model.model.") for n in trained(model) if ".lora_" not in n}
    tower = {n for n, _ in tiny_backbone().named_parameters() if n.startswith("visual.") and ".merger." not in n}
    assert full == tower
    assert {n.partition(".lora_")[0].split(".")[-1] for n in trained(model) if ".lora_" in n} == LANGUAGE


def test_frozen_everywhere_is_the_backbone_itself() -> None:
    backbone = frozen()
    assert tune(backbone, TuningSettings(finetuning_type="freeze"), seed=0) is backbone
    assert not trained(backbone)


def test_trained_weights_that_lie_in_a_file_are_copied_and_frozen_ones_are_not(tmp_path: Path) -> None:
    tiny_backbone().save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), dtype=torch.float32)
    before = {name: p.data_ptr() for name, p in backbone.named_parameters()}
    tune(backbone, TuningSettings(finetuning_type="freeze", merger_tuning="full"), seed=0)
    moved = {name for name, p in backbone.named_parameters() if p.data_ptr() != before[name]}
    assert moved == {name for name in before if ".merger." in name}


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    models = [
        tune(frozen(), TuningSettings(lora_rank=16, lora_alpha=8, use_rslora=rslora), seed=0)
        for rslora in (False, True)
    ]
    scales = [
        m.get_submodule("base_model.model.language_model.layers.0.mlp.up_proj").scaling["default"] for m in models
    ]
    assert scales == [8 / 16, 8 / 4]
    assert TuningSettings(lora_rank=16).alpha == 32


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"finetuning_type": "qlora"}, "finetuning_type is 'qlora'; it must be one of lora, full, freeze"),
        ({"vision_tuning": "freeze"}, "vision_tuning is 'freeze'; it must be one of frozen, lora, full"),
        ({"merger_tuning": True}, "merger_tuning is True"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"finetuning_type": "full", "use_dora": True}, "use_dora is true, but nothing is tuned with LoRA"),
        ({"finetuning_type": "freeze", "use_rslora": True}, "use_rslora is true, but nothing"),
        ({"lora_target": ("q_proj", "qkv", "lm_head")}, "lora_target has lm_head, qkv; .* q_proj, k_proj, v_proj"),
        ({"lora_target": "q_proj"}, "lora_target is 'q_proj'; it must be 'all' or a tuple"),
        ({"lora_target": ()}, r"lora_target is \(\)"),
        (
            {"finetuning_type": "full", "vision_tuning": "lora", "lora_target": ("q_proj",)},
            "with finetuning_type 'full' it must be 'all'",
        ),
    ],
)
def test_settings_check_themselves(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TuningSettings(**values)


@pytest.mark.parametrize("dora", [False, True])
def test_a_saved_adapter_is_one_for_peft(dora: bool, tmp_path: Path) -> None:
    settings = TuningSettings(lora_rank=4, use_dora=dora, vision_tuning="lora", merger_tuning="lora")
    model = tune(frozen(), settings, seed=0)
    weights = stir(model)
    save_adapter(model, weights, tmp_path, base="somewhere")
    theirs = PeftModel.from_pretrained(frozen(), tmp_path)
    again = tune(frozen(), settings, seed=1)
    load_adapter(again, tmp_path)
    plain = run(frozen())
    for other in (theirs, again):
        for mine, found, before in zip(run(model.eval()), run(other.eval()), plain, strict=True):
            assert torch.equal(mine, found)
            assert not torch.allclose(mine, before, atol=1e-2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere"


def test_an_adapter_for_something_else_is_refused(tmp_path: Path) -> None:
    def fails(settings: TuningSettings, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            load_adapter(tune(frozen(), settings, seed=0), tmp_path)

    fails(EVERYWHERE, "adapter_model.safetensors does not exist")
    model = tune(frozen(), EVERYWHERE, seed=0)
    save_adapter(model, stir(model), tmp_path, base="somewhere")
    wider = TuningSettings(lora_rank=8, lora_alpha=8, vision_tuning="lora", merger_tuning="lora")
    fails(wider, "lora_rank is 4; this model has 8")
    louder = TuningSettings(lora_rank=4, lora_alpha=16, vision_tuning="lora", merger_tuning="lora")
    fails(louder, "lora_alpha is 8.0; this model has 16")
    fails(TuningSettings(lora_rank=4, vision_tuning="lora"), r"4 tensors .*visual\.merger.* needed not at all")
    config = tmp_path / ADAPTER_CONFIG_NAME
    plain = json.loads(config.read_text())
    for name, value in (
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 1}),
        ("init_lora_weights", "pissa"),
    ):
        config.write_text(json.dumps({**plain, name: value}))
        fails(EVERYWHERE, f"adapter_config.json: {name} is .*{next(iter(value)) if type(value) is dict else value}")
    config.write_text("[]")
    fails(EVERYWHERE, "adapter_config.json is damaged")
    config.write_text(json.dumps({**plain, "init_lora_weights": "gaussian"}))
    load_adapter(tune(frozen(), EVERYWHERE, seed=0), tmp_path)
    (tmp_path / ADAPTER_WEIGHTS_NAME).write_bytes(b"{}")
    fails(EVERYWHERE, "adapter_model.safetensors cannot be read")


def test_full_weights_are_stored_by_the_plain_models_names(tmp_path: Path) -> None:
    settings = TuningSettings(lora_rank=4, vision_tuning="full", merger_tuning="full")
    model = tune(frozen(), settings, seed=0)
    weights = stir(model)
    save_tuned(weights, tmp_path)
    save_adapter(model, weights, tmp_path, base="somewhere")
    again = tune(frozen(), settings, seed=1)
    load_adapter(again, tmp_path)
    load_tuned(again, tmp_path)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in trained(again).items())
    # Without any of this package: plain weights into the plain model, PEFT's adapter on top.
    plain = tiny_backbone()
    result = plain.load_state_dict(load_file(tmp_path / TUNED_WEIGHTS_NAME), strict=False)
    assert not result.unexpected_keys
    for mine, theirs in zip(run(again.eval()), run(PeftModel.from_pretrained(plain, tmp_path).eval()), strict=True):
        assert torch.equal(mine, theirs)


def test_full_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    merger = TuningSettings(finetuning_type="freeze", merger_tuning="full")
    save_tuned({}, tmp_path)
    assert not (tmp_path / TUNED_WEIGHTS_NAME).exists()
    with pytest.raises(ValueError, match=r"backbone.safetensors does not exist; 5 weights"):
        load_tuned(tune(frozen(), merger, seed=0), tmp_path)
    save_tuned(stir(tune(frozen(), merger, seed=0)), tmp_path)
    with pytest.raises(ValueError, match=r"5 tensors differ .* needed not at all"):
        load_tuned(tune(frozen(), TuningSettings(), seed=0), tmp_path)


def test_every_parameter_has_its_part() -> None:
    expected = {
        "backbone.language_model.norm.weight": "language",
        "backbone.base_model.model.language_model.layers.3.mlp.up_proj.lora_A.default.weight": "language",
        "backbone.base_model.model.visual.blocks.0.attn.qkv.base_layer.weight": "vision",
        "backbone.visual.patch_embed.proj.weight": "vision",
        "backbone.visual.merger.ln_q.weight": "merger",
        "backbone.base_model.model.visual.merger.mlp.0.base_layer.weight": "merger",
        "heads.ucf101.layers.weight": "head",
        "language_head.weight": "language",
        "action_token.weight": "action_token",
    }
    assert {name: parameter_part(name) for name in expected} == expected
    with pytest.raises(ValueError, match=r"'visual\.merger\.ln_q\.weight' is no parameter of an ActionClassifier"):
        parameter_part("visual.merger.ln_q.weight")


def test_adapters_are_told_from_whole_weights() -> None:
    model = tune(frozen(), TuningSettings(lora_rank=2, use_dora=True, merger_tuning="full"), seed=0)
    kinds = {name: parameter_kind(name, parameter) for name, parameter in model.named_parameters()}
    assert {name.split(".lora_")[1].split(".")[0] for name, kind in kinds.items() if kind == "lora"} == {
        "A",
        "B",
        "magnitude_vector",
    }
    assert {name for name, kind in kinds.items() if kind == "full"} == {name for name in kinds if ".merger." in name}


def test_the_table_counts_what_trains() -> None:
    model = nn.Module()
    model.backbone = tune(frozen(), TuningSettings(lora_rank=3, merger_tuning="full"), seed=0)
    model.heads = nn.ModuleDict({"ucf": nn.Linear(128, 5), "ssv2": nn.Linear(128, 7)})
    model.action_token = nn.Linear(1, 128, bias=False)
    # A partitioned parameter (ZeRO-3) is empty and knows its size.
    bias: Any = model.heads["ssv2"].bias
    bias.data, bias.ds_numel = torch.empty(0), 7
    plain = tiny_backbone()
    sizes = {part: sum(p.numel() for n, p in plain.named_parameters() if parameter_part(f"backbone.{n}") == part)
             for part in ("language", "vision", "merger")}  # fmt: skip
    # Per layer: q, o: 128 -> 128; k, v: 128 -> 64; gate, up: 128 -> 256; down: 256 -> 128.
    lora = 2 * 3 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    rows = {row.part: row for row in trained_table(model)}
    assert rows == {
        "language": TunedPart("language", "lora", 14, lora, sizes["language"]),
        "vision": TunedPart("vision", "frozen", 0, 0, sizes["vision"]),
        "merger": TunedPart("merger", "full", 3, sizes["merger"], 0),
        "head ucf": TunedPart("head ucf", "full", 1, 129 * 5, 0),
        "head ssv2": TunedPart("head ssv2", "full", 1, 129 * 7, 0),
        "<ACTION>": TunedPart("<ACTION>", "full", 1, 128, 0),
    }
    lines = format_table(list(rows.values()))
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["part", "tuned", "modules", "trainable", "frozen"]
    assert any(line.split() == ["language", "lora", "14", f"{lora:,}", f"{sizes['language']:,}"] for line in lines)
