"""Starting from another run's adapter: its <ACTION> comes along, and what does not fit is refused at once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import tiny_spec
from vidcls.model.classifier import ActionClassifier
from vidcls.model.heads import ActionDecoder
from vidcls.model.pretrained import (
    ACTION_TOKEN_NAME,
    ModelSpec,
    TrainingExtras,
    build_encoder,
    build_model,
    check_adapter,
    load_model,
    save_model,
)
from vidcls.model.tiny import tiny_config
from vidcls.model.tuning import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, TUNED_WEIGHTS_NAME, TuningSettings

SPEC = tiny_spec("clips")


def build(spec: ModelSpec = SPEC, adapter: Path | None = None) -> ActionClassifier:
    heads = {"clips": ActionDecoder(128, 3)}
    return build_model(spec, build_encoder(spec), heads, seed=0, extras=TrainingExtras(adapter=adapter))


def save(folder: Path, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights; returns them by name."""
    folder.mkdir()
    model = build(spec)
    weights = {name: torch.randn(p.shape).to(p.dtype) for name, p in model.named_parameters() if p.requires_grad}
    save_model(folder, model, spec, weights, build_encoder(spec).tokenizer)
    return weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "checkpoint", SPEC)
    return tmp_path / "checkpoint"


def refused(folder: Path, reason: str, spec: ModelSpec = SPEC) -> None:
    """Alone, before anything heavy, and in building."""
    with pytest.raises(ValueError, match=reason):
        check_adapter(folder, spec)
    with pytest.raises(ValueError, match=reason):
        build(spec, folder)


def test_an_adapter_brings_its_action_token(folder: Path) -> None:
    check_adapter(folder, SPEC)
    stored, fresh = load_file(folder / ACTION_TOKEN_NAME)["weight"], build().action_token.weight
    assert not torch.allclose(stored, fresh)
    started = build(adapter=folder).action_token.weight
    assert started.requires_grad
    assert torch.equal(started, stored)
    assert build(replace(SPEC, bf16=True), folder).action_token.weight.dtype == torch.bfloat16
    (folder / ACTION_TOKEN_NAME).unlink()  # an adapter of another tool's
    check_adapter(folder, SPEC)
    assert torch.equal(build(adapter=folder).action_token.weight, fresh)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_checked_without_the_base_models_weights(dora: bool, tmp_path: Path) -> None:
    spec = replace(SPEC, bf16=True, tuning=TuningSettings(lora_rank=2, use_dora=dora, vision_tuning="lora"))
    save(tmp_path / "checkpoint", spec)
    tiny_config().save_pretrained(tmp_path / "base")
    elsewhere = replace(spec, model_name_or_path=str(tmp_path / "base"))
    check_adapter(tmp_path / "checkpoint", elsewhere)
    narrow = tiny_config()
    narrow.text_config.intermediate_size = 200
    narrow.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"tensors differ .*mlp\.\S+: stored .*256.* needed .*200"):
        check_adapter(tmp_path / "checkpoint", elsewhere)


def test_half_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    tuning = replace(SPEC.tuning, merger_tuning="full")
    save(tmp_path / "checkpoint", replace(SPEC, tuning=tuning))
    for spec in (SPEC, replace(SPEC, tuning=tuning)):
        refused(tmp_path / "checkpoint", f"{TUNED_WEIGHTS_NAME} holds trained weights of the backbone", spec)


def test_adapters_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path, f"{ADAPTER_WEIGHTS_NAME} does not exist")
    refused(folder, "lora_rank is 2; this model has 3", replace(SPEC, tuning=TuningSettings(lora_rank=3)))
    more = replace(SPEC, tuning=replace(SPEC.tuning, merger_tuning="lora"))
    refused(folder, r"4 tensors differ .*merger.*: stored not at all", more)
    config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text())
    (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps({**config, "rank_pattern": {"q_proj": 8}}))
    refused(folder, r"rank_pattern is \{'q_proj': 8\}; it must be empty")


def test_action_tokens_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    token = folder / ACTION_TOKEN_NAME
    whole = shutil.copy(token, tmp_path / "whole")
    save_file({"weight": torch.zeros(64)}, token)
    refused(folder, rf"{ACTION_TOKEN_NAME}: 1 tensor differs .* weight: stored \(64,\), needed \(128,\)")
    with pytest.raises(ValueError, match=rf"{ACTION_TOKEN_NAME}: 1 tensor differs"):
        load_model(folder)
    token.write_bytes(Path(whole).read_bytes()[:-1])
    refused(folder, f"{ACTION_TOKEN_NAME} cannot be read")
    with pytest.raises(ValueError, match=f"{ACTION_TOKEN_NAME} cannot be read"):
        load_model(folder)
