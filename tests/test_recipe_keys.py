"""Every key of a recipe has the effect that it names. TESTED says where that is shown, and no key may be missing."""

from __future__ import annotations

import ast
import itertools
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tests.support import launch
from tests.support.checkpoints import make_checkpoint
from tests.support.shards import make_shards
from tests.support.web import web
from tools.make_random_checkpoint import write_checkpoint
from vidcls.config import ConfigError, config_from_values
from vidcls.data.batch import Batch
from vidcls.data.loader import Request, training_requests
from vidcls.data.order import StepLayout
from vidcls.manifest import CheckpointError
from vidcls.model.classifier import ActionClassifier
from vidcls.model.pretrained import head_folder
from vidcls.model.prompt import PromptEncoder
from vidcls.model.tokens import load_tokenizer
from vidcls.model.tuning import parameter_part
from vidcls.options import OWNER, DatasetOptions
from vidcls.training import building, optimizer
from vidcls.training.caching import cache_features, plan
from vidcls.training.engine import deepspeed_config
from vidcls.training.objective import Objective
from vidcls.training.setup import Run, setup

HERE = "tests/test_recipe_keys.py"
COMMAND, RESUME, BATCH = "tests/test_train_command.py", "tests/test_resume.py", "tests/test_batch_plan.py"
OPTIMIZER, EVALUATING = "tests/training/test_optimizer.py", "tests/training/test_evaluating.py"
FAULTS, LIMITS = "tests/test_faults_command.py", "tests/faults/test_guard.py::test_limits_are_those_of_the_recipe"
PARITY, BAD = "tests/training/test_parity.py", "tests/training/test_bad_samples.py"
PREPACKING = "tests/training/test_prepacking.py"
BUDGET, MICRO = "tests/training/test_token_budget.py", "tests/training/test_micro_batch.py"
TESTED: dict[str, str] = {
    "model_name_or_path": f"{HERE}::test_model_name_or_path",
    "adapter_name_or_path": f"{HERE}::test_adapter_name_or_path",
    "trust_remote_code": f"{HERE}::test_trust_remote_code",
    "template": f"{HERE}::test_template",
    "action_token": f"{HERE}::test_action_token",
    "finetuning_type": f"{HERE}::test_what_trains",
    "vision_tuning": f"{HERE}::test_what_trains",
    "merger_tuning": f"{HERE}::test_what_trains",
    "lora_rank": f"{HERE}::test_lora_numbers",
    "lora_alpha": f"{HERE}::test_lora_numbers",
    "lora_dropout": f"{HERE}::test_lora_numbers",
    "lora_target": f"{HERE}::test_lora_target",
    "use_dora": f"{HERE}::test_use_dora",
    "use_rslora": f"{HERE}::test_lora_numbers",
    "action_decoder_type": f"{HERE}::test_action_decoder_sizes",
    "action_decoder_hidden_size": f"{HERE}::test_action_decoder_sizes",
    "action_decoder_num_heads": f"{HERE}::test_action_decoder_num_heads",
    "action_decoder_init": f"{HERE}::test_action_decoder_init",
    "action_decoder_path": f"{HERE}::test_action_decoder_path",
    "num_action_classes": f"{HERE}::test_num_action_classes",
    "flash_attn": f"{HERE}::test_flash_attn",
    "enable_liger_kernel": f"{HERE}::test_what_is_used_instead",
    "gradient_checkpointing": f"{HERE}::test_gradient_checkpointing",
    "torch_compile": f"{HERE}::test_torch_compile",
    "share_prefix": f"{HERE}::test_share_prefix",
    "prepack_weights": f"{PREPACKING}::test_numbers_are_the_same_with_and_without",
    "dataset": f"{HERE}::test_dataset_by_name",
    "datasets": f"{HERE}::test_datasets",
    "dataset_dir": f"{HERE}::test_dataset_by_name",
    "eval_dataset": f"{EVALUATING}::test_data_sets_and_their_heads",
    "mixing_temperature": f"{HERE}::test_mixing",
    "max_samples": f"{HERE}::test_max_samples",
    "val_size": f"{EVALUATING}::test_a_part_held_out_is_not_trained_on",
    "prompt": f"{HERE}::test_prompt",
    "video_maxlen": f"{HERE}::test_frames_and_pixels",
    "frame_sampling": f"{HERE}::test_frame_sampling",
    "dense_stride": f"{HERE}::test_frame_sampling",
    "temporal_jitter": f"{HERE}::test_temporal_jitter",
    "video_max_pixels": f"{HERE}::test_frames_and_pixels",
    "video_min_pixels": f"{HERE}::test_frames_and_pixels",
    "image_max_pixels": f"{HERE}::test_image_max_pixels",
    "cutoff_len": f"{HERE}::test_cutoff_len",
    "shuffle_shards": f"{HERE}::test_shuffle_shards",
    "on_bad_sample": f"{BAD}::test_bad_clips_are_counted_over_ranks_and_named_once",
    "max_bad_samples": f"{BAD}::test_too_many_bad_clips_end_the_run",
    "cache_dir": f"{HERE}::test_cache_dir",
    "vision_cache": f"{HERE}::test_vision_cache",
    "cache_gb": "tests/training/test_setup.py::test_windows_that_do_not_fit_the_cache",
    "preprocessing_num_workers": f"{HERE}::test_preprocessing_num_workers",
    "dataloader_num_workers": f"{HERE}::test_what_a_run_is_while_it_runs",
    "horizontal_flip": f"{HERE}::test_mirror_pairs",
    "mirror_pairs": f"{HERE}::test_mirror_pairs",
    "random_resized_crop": f"{HERE}::test_augmentation_changes_pixels",
    "color_jitter": f"{HERE}::test_augmentation_changes_pixels",
    "random_erasing": f"{HERE}::test_augmentation_changes_pixels",
    "rand_augment": f"{HERE}::test_augmentation_changes_pixels",
    "mixup_alpha": f"{HERE}::test_mixing_of_clips",
    "cutmix_alpha": f"{HERE}::test_mixing_of_clips",
    "per_device_train_batch_size": f"{BATCH}::test_two_of_the_batch_triple_give_the_third",
    "gradient_accumulation_steps": f"{BATCH}::test_two_of_the_batch_triple_give_the_third",
    "train_batch_size": f"{BATCH}::test_two_of_the_batch_triple_give_the_third",
    "max_tokens_per_batch": f"{BUDGET}::test_losses_and_gradient_norms",
    "memory_limit": f"{MICRO}::test_limits_that_allow_all_one_and_none",
    "learning_rate": f"{OPTIMIZER}::test_some_rates_by_hand",
    "vision_lr_scale": f"{OPTIMIZER}::test_each_part_has_its_own_rate",
    "merger_lr_scale": f"{OPTIMIZER}::test_each_part_has_its_own_rate",
    "head_lr_scale": f"{OPTIMIZER}::test_each_part_has_its_own_rate",
    "action_token_lr_scale": f"{OPTIMIZER}::test_each_part_has_its_own_rate",
    "loraplus_lr_ratio": f"{OPTIMIZER}::test_loraplus_speeds_up_b_alone",
    "layerwise_lr_decay": f"{OPTIMIZER}::test_layers_slow_down_from_each_sides_own_top",
    "weight_decay": f"{OPTIMIZER}::test_matrices_decay_and_vectors_do_not",
    "adam_beta1": f"{HERE}::test_adam",
    "adam_beta2": f"{HERE}::test_adam",
    "adam_epsilon": f"{HERE}::test_adam",
    "max_grad_norm": f"{PARITY}::test_losses_and_gradient_norms",
    "lr_scheduler_type": f"{OPTIMIZER}::test_schedules_are_what_transformers_steps_through",
    "lr_scheduler_kwargs": f"{OPTIMIZER}::test_schedules_are_what_transformers_steps_through",
    "warmup_ratio": f"{OPTIMIZER}::test_the_warmup_ratio_is_rounded_up",
    "warmup_steps": f"{OPTIMIZER}::test_schedules_are_what_transformers_steps_through",
    "num_train_epochs": f"{HERE}::test_steps",
    "max_steps": f"{HERE}::test_steps",
    "bf16": f"{HERE}::test_bf16",
    "ema_decay": "tests/training/test_averaging.py::test_the_average_is_that_of_the_masters",
    "loss_type": f"{HERE}::test_losses",
    "focal_gamma": f"{HERE}::test_losses",
    "label_smoothing": f"{HERE}::test_losses",
    "class_balance_beta": f"{HERE}::test_class_balance_beta",
    "lm_loss_weight": f"{HERE}::test_lm_loss_weight",
    "eval_strategy": f"{EVALUATING}::test_the_schedule_of_a_recipe",
    "eval_steps": f"{EVALUATING}::test_the_schedule_of_a_recipe",
    "per_device_eval_batch_size": f"{HERE}::test_per_device_eval_batch_size",
    "load_best_model_at_end": f"{EVALUATING}::test_the_best_is_kept_and_has_the_numbers_that_were_found",
    "early_stopping_patience": f"{EVALUATING}::test_early_stopping_patience",
    "views": f"{EVALUATING}::test_views",
    "metric_for_best_model": f"{EVALUATING}::test_the_best_is_kept_and_has_the_numbers_that_were_found",
    "stage": f"{HERE}::test_stage",
    "do_train": f"{HERE}::test_do_train_false_writes_nothing",
    "output_dir": f"{COMMAND}::test_the_output_folder_has_what_is_promised",
    "overwrite_output_dir": f"{HERE}::test_overwrite_output_dir",
    "resume_from_checkpoint": f"{RESUME}::test_the_log_goes_on_bit_for_bit",
    "resume_with_changes": f"{HERE}::test_resume_with_changes",
    "deepspeed": f"{HERE}::test_deepspeed",
    "save_steps": f"{COMMAND}::test_the_output_folder_has_what_is_promised",
    "save_total_limit": f"{COMMAND}::test_the_output_folder_has_what_is_promised",
    "save_only_model": f"{HERE}::test_save_only_model",
    "save_deepspeed_state": "tests/training/test_damage.py::test_deepspeeds_tools_find_the_same_weights",
    "logging_steps": f"{COMMAND}::test_the_output_folder_has_what_is_promised",
    "plot_loss": f"{HERE}::test_plot_loss_and_report_to",
    "html_report": f"{HERE}::test_plot_loss_and_report_to",
    "report_to": f"{HERE}::test_plot_loss_and_report_to",
    "seed": f"{HERE}::test_seed",
    "async_save": "tests/training/test_saver.py::test_a_line_is_said_when_the_checkpoint_is_whole",
    "save_every_minutes": "tests/training/test_stopping.py::test_a_save_is_due_once_when_the_minutes_are_over",
    "start_timeout": LIMITS,
    "data_timeout": LIMITS,
    "step_timeout": LIMITS,
    "save_timeout": LIMITS,
    "stop_timeout": LIMITS,
    "max_nonfinite_steps": "tests/training/test_stopping.py::test_steps_that_are_not_finite_end_the_run_in_the_end",
    "log_order": f"{FAULTS}::test_asked_to_stop_a_run_saves_and_goes_on_as_if_it_had_not",
    "ddp_timeout": f"{HERE}::test_what_a_run_is_while_it_runs",
    "self_check": f"{HERE}::test_self_check",
    **{f"datasets.{key}": f"{HERE}::test_datasets" for key in DatasetOptions.model_fields},
    "datasets.weight": f"{HERE}::test_mixing",
    "datasets.eval_dataset": f"{EVALUATING}::test_data_sets_and_their_heads",
}
ASK = "<video> What is it? <ACTION>"
Prepare = Callable[..., Run]


def functions(path: Path) -> dict[str, str]:
    """The text of every function of a file, decorators included, by name."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_every_key_is_tested_somewhere() -> None:
    assert TESTED.keys() == {*OWNER, *(f"datasets.{key}" for key in DatasetOptions.model_fields)}
    texts = {file: functions(launch.ROOT / file) for file in {place.partition("::")[0] for place in TESTED.values()}}
    missing = []
    for key, place in TESTED.items():
        file, _, name = place.partition("::")
        text = texts[file].get(name)
        # A test elsewhere may speak of the key by another name; one that is here has no reason to.
        if text is None or (file == HERE and key.removeprefix("datasets.") not in text):
            missing.append(f"{key}: {place}")
    assert not missing


@pytest.fixture
def prepare(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """setup() of a recipe that differs by `changes` (None takes a key away), as the only process of a run."""
    monkeypatch.setattr("vidcls.distributed.start", lambda *limits: None)
    monkeypatch.setattr("vidcls.distributed.world_size", lambda: 1)
    monkeypatch.setattr("vidcls.distributed.rank", lambda: 0)
    values = {
        "model_name_or_path": "tiny",
        "dataset": str(small_shards),
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "lora_rank": 4,
        "bf16": False,
        "dataloader_num_workers": 0,
        "deepspeed": str(launch.ROOT / "ds_configs" / "zero2.json"),
    }

    def run(**changes: Any) -> Run:
        content = {**values, **changes}
        return setup(config_from_values({key: value for key, value in content.items() if value is not None}))

    return run


@pytest.fixture
def build(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ActionClassifier]:
    """The model that such a recipe would train."""
    monkeypatch.setattr(building, "build_engine", lambda config, model, plan: SimpleNamespace(module=model))
    return lambda **changes: building.build(prepare(**changes))[0].module


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def first_batches(run: Run, steps: int = 1) -> list[Batch]:
    """What the first steps train on."""
    layout = StepLayout(run.plan.global_, run.plan.micro, 1, 0)
    return [run.clips[request] for request in training_requests(run.data.order, layout, 0, steps)]


def epoch(run: Run) -> list[int]:
    return [run.data.order.at(position).sample for position in range(run.data.clips)]


def encoded(run: Run, prompt: str = ASK) -> list[int]:
    return run.encoder.encode(prompt, (1, 2, 2), 1.0).input_ids.tolist()


# The model


def test_model_name_or_path(build: Callable[..., ActionClassifier], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "tiny")
    weights = [m.inner.get_input_embeddings().weight for m in (build(), build(model_name_or_path=str(folder)))]
    assert not torch.allclose(*weights)
    with pytest.raises(ValueError, match="model is '/nowhere'"):
        build(model_name_or_path="/nowhere")


def test_adapter_name_or_path(build: Callable[..., ActionClassifier], small_shards: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1", {"default": small_shards})
    stored = load_file(folder / "adapter_model.safetensors")
    own = trained(build(lora_rank=2, lora_alpha=4, adapter_name_or_path=str(folder)))
    found = {name.removeprefix("backbone.").replace(".default.", "."): p for name, p in own.items() if "lora_" in name}
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    with pytest.raises(ConfigError, match=r"adapter_name_or_path: .* has no effect without LoRA"):
        build(finetuning_type="full", adapter_name_or_path=str(folder))


def test_trust_remote_code(prepare: Prepare, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "tiny")
    path, trace = folder / "tokenizer_config.json", tmp_path / "trace"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    code = f"open({str(trace)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
    (folder / "own.py").write_text(code + "class Own(PreTrainedTokenizerFast):\n    pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        prepare(model_name_or_path=str(folder))
    assert not trace.exists()
    assert type(prepare(model_name_or_path=str(folder), trust_remote_code=True).encoder.tokenizer).__name__ == "Own"
    assert trace.exists()


def test_template(prepare: Prepare) -> None:
    chat, empty = prepare(), prepare(template="empty")
    assert encoded(chat)[: len("<|im_start|>system")].count(257) == 1  # <|im_start|>
    text = chat.encoder.tokenizer.decode(encoded(chat))
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert empty.encoder.tokenizer.decode(encoded(empty)) == (
        "<|vision_start|><|video_pad|><|vision_end|> What is it? <ACTION>"
    )
    with pytest.raises(ConfigError, match=r"template: 'llava' .*legal: qwen2_vl \| empty"):
        prepare(template="llava")


def test_action_token(prepare: Prepare) -> None:
    run = prepare(action_token="<CLS>")
    _, number = load_tokenizer("tiny", "<CLS>")
    (batch,) = first_batches(run)
    assert batch.input_ids_BL[torch.arange(2), batch.action_positions_B].tolist() == [number, number]
    # In the default prompt <ACTION> stands for it.
    assert run.encoder.tokenizer.decode(encoded(run, "<video> <ACTION>")).endswith("<CLS>")


@pytest.mark.parametrize(
    ("changes", "language", "vision", "merger"),
    [
        ({}, "lora", "", ""),
        ({"finetuning_type": "full"}, "full", "", ""),
        ({"finetuning_type": "freeze"}, "", "", ""),
        ({"vision_tuning": "lora"}, "lora", "lora", ""),
        ({"finetuning_type": "freeze", "vision_tuning": "full"}, "", "full", ""),
        ({"merger_tuning": "lora"}, "lora", "", "lora"),
        ({"merger_tuning": "full"}, "lora", "", "full"),
    ],
)
def test_what_trains(
    build: Callable[..., ActionClassifier], changes: dict[str, str], language: str, vision: str, merger: str
) -> None:
    """finetuning_type, vision_tuning and merger_tuning; head and <ACTION> always."""
    found: dict[str, set[str]] = {}
    for name in trained(build(**changes)):
        found.setdefault(parameter_part(name), set()).add("lora" if "lora_" in name else "full")
    expected = {"language": language, "vision": vision, "merger": merger, "head": "full", "action_token": "full"}
    assert found == {part: {how} for part, how in expected.items() if how}


@pytest.mark.parametrize(
    ("changes", "rank", "scale", "dropout"),
    [
        ({"lora_rank": 4}, 4, 2.0, 0.05),  # lora_alpha is twice the rank unless given
        ({"lora_rank": 2, "lora_alpha": 6}, 2, 3.0, 0.05),
        ({"lora_rank": 4, "lora_alpha": 6, "use_rslora": True}, 4, 3.0, 0.05),
        ({"lora_rank": 4, "lora_dropout": 0.25}, 4, 2.0, 0.25),
    ],
)
def test_lora_numbers(
    build: Callable[..., ActionClassifier], changes: dict[str, Any], rank: int, scale: float, dropout: float
) -> None:
    layer: Any = build(**changes).inner.language_model.layers[0].mlp.up_proj
    assert layer.lora_A["default"].weight.shape == (rank, 128)
    assert layer.lora_B["default"].weight.shape == (256, rank)
    layer.eval()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
        branch = layer(x) - layer.base_layer(x)
        expected = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(branch, scale * expected, rtol=1e-4, atol=1e-4)
    dropped = layer.lora_dropout["default"].train()(torch.ones(100_000))
    assert float((dropped == 0).float().mean()) == pytest.approx(dropout, abs=0.01)


@pytest.mark.parametrize(
    ("lora_target", "names"),
    [
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        (["down_proj"], {"down_proj"}),
    ],
)
def test_lora_target(build: Callable[..., ActionClassifier], lora_target: Any, names: set[str]) -> None:
    lora = [name for name in trained(build(lora_target=lora_target)) if ".lora_A." in name]
    assert {name.split(".lora_A.")[0].rpartition(".")[2] for name in lora} == names
    assert len(lora) == 2 * len(names)  # both layers of the language model, none of the vision tower


def test_use_dora(build: Callable[..., ActionClassifier]) -> None:
    assert not [name for name in trained(build()) if "magnitude" in name]
    assert len([name for name in trained(build(use_dora=True)) if "magnitude" in name]) == 14


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"action_decoder_type": "linear"}, {(4, 128), (4,)}),
        ({"action_decoder_type": "mlp"}, {(128, 128), (128,), (4, 128), (4,)}),
        ({"action_decoder_type": "mlp", "action_decoder_hidden_size": 24}, {(24, 128), (24,), (4, 24), (4,)}),
    ],
)
def test_action_decoder_sizes(prepare: Prepare, changes: dict[str, Any], shapes: set[tuple[int, ...]]) -> None:
    (head,) = prepare(**changes).heads.values()
    assert {tuple(p.shape) for p in head.parameters()} == shapes


def test_action_decoder_num_heads(prepare: Prepare) -> None:
    """They split the width: the same weights then attend otherwise."""
    hidden_BD, tokens_BLD = torch.randn(2, 128), torch.randn(2, 5, 128)
    logits = []
    for number in (1, 4):
        (head,) = prepare(action_decoder_type="attention", action_decoder_num_heads=number).heads.values()
        logits.append(head(hidden_BD, tokens_BLD, torch.ones(2, 5, dtype=torch.bool)))
    assert logits[0].shape == (2, 4)
    assert not torch.equal(logits[0], logits[1])
    with pytest.raises(ConfigError, match="action_decoder_num_heads: 3 has no effect"):
        prepare(action_decoder_num_heads=3)
    with pytest.raises(ConfigError, match=r"action_decoder: .*3"):
        prepare(action_decoder_type="attention", action_decoder_num_heads=3)


def test_action_decoder_init(prepare: Prepare, build: Callable[..., ActionClassifier]) -> None:
    def rows(init: str) -> torch.Tensor:
        (head,) = prepare(action_decoder_init=init).heads.values()
        return head.layers.weight.detach()

    assert rows("normal").std() == pytest.approx(0.02, rel=0.2)
    assert rows("zeros").count_nonzero() == 0
    run, table = prepare(), build().inner.get_input_embeddings().weight
    means = [table[run.encoder.tokenizer.encode(n)].mean(0) for n in run.data.parts[0].index.labels.names]
    similarity = F.cosine_similarity(rows("class_names")[:, None], torch.stack(means)[None], dim=-1)
    assert similarity.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_action_decoder_path(prepare: Prepare, small_shards: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1", {"default": small_shards})
    stored = load_file(head_folder(folder, "default") / "action_decoder.safetensors")
    for place in (folder, head_folder(folder, "default")):
        (head,) = prepare(action_decoder_path=str(place)).heads.values()
        assert torch.equal(head.layers.weight, stored["layers.weight"])
    with pytest.raises(ConfigError, match=r"action_decoder_path: .* holds .*this run's head default is"):
        prepare(action_decoder_path=str(folder), action_decoder_type="mlp")
    with pytest.raises(ConfigError, match="action_decoder_init: 'zeros' has no effect with action_decoder_path"):
        prepare(action_decoder_path=str(folder), action_decoder_init="zeros")


def test_num_action_classes(prepare: Prepare) -> None:
    prepare(num_action_classes=4)
    with pytest.raises(ConfigError, match=r"num_action_classes: 5, but the shards in .* have 4 classes"):
        prepare(num_action_classes=5)


@pytest.mark.parametrize(("value", "used"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_flash_attn(build: Callable[..., ActionClassifier], value: str, used: str) -> None:
    assert build(flash_attn=value).inner.config._attn_implementation == used


def test_what_is_used_instead(prepare: Prepare, build: Callable[..., ActionClassifier]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU may give what is asked for")
    changes = {"flash_attn": "fa2", "enable_liger_kernel": True, "bf16": True}
    attention, liger = prepare(**changes).spec.notices()
    assert attention.startswith("flash_attn: fa2 needs a GPU")
    assert liger.startswith("enable_liger_kernel: needs a GPU")
    assert build(**changes).inner.config._attn_implementation == "sdpa"
    assert prepare().spec.notices() == []


def test_gradient_checkpointing(build: Callable[..., ActionClassifier]) -> None:
    def recomputed(**changes: Any) -> list[bool]:
        return [layer.gradient_checkpointing for layer in build(**changes).inner.language_model.layers]

    assert recomputed() == [False, False]
    assert recomputed(gradient_checkpointing=True) == [True, True]


def test_torch_compile(build: Callable[..., ActionClassifier]) -> None:
    def compiled(**changes: Any) -> list[bool]:
        return [layer._compiled_call_impl is not None for layer in build(**changes).inner.language_model.layers]

    assert compiled() == [False, False]
    assert compiled(torch_compile=True) == [True, True]


def test_share_prefix(build: Callable[..., ActionClassifier]) -> None:
    def shares(**changes: Any) -> bool:
        return build(**changes).share_prefix

    assert shares()
    assert not shares(share_prefix=False)
    assert not shares(torch_compile=True)  # it would be compiled anew for each number of clips


# The data


def test_dataset_by_name(prepare: Prepare, small_shards: Path, tmp_path: Path) -> None:
    """A name in the registry of dataset_dir: its folder relative to the registry, several with commas."""
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "mine").symlink_to(small_shards)
    (tmp_path / "registry" / "datasets.yaml").write_text(f"mine: mine\nother: {small_shards}\n")
    registry = {"dataset_dir": str(tmp_path / "registry")}
    assert len(prepare(dataset="mine", **registry).data.parts[0].index) == 26
    both = prepare(dataset="mine, other", **registry)
    assert (both.data.names, both.data.clips, [*both.heads]) == (("mine", "other"), 52, ["default"])
    with pytest.raises(ConfigError, match=r"dataset: 'mnie' is neither .*did you mean 'mine'"):
        prepare(dataset="mnie", **registry)
    (tmp_path / "registry" / "datasets.yaml").rename(tmp_path / "registry" / "dataset_info.json")
    with pytest.raises(ConfigError, match=r"dataset: 'mine' .*dataset_info\.json .*make_shards\.py sharegpt"):
        prepare(dataset="mine", **registry)


@pytest.fixture
def up_down(small_shards: Path, tmp_path: Path) -> Path:
    """13 of the clips as a data set of 2 classes."""
    (tmp_path / "videos").mkdir()
    for name in ("up", "down"):
        (tmp_path / "videos" / name).symlink_to(small_shards.parent / "videos" / name)
    return make_shards(tmp_path / "videos", tmp_path / "up_down", frames=4)


def test_datasets(prepare: Prepare, small_shards: Path, up_down: Path) -> None:
    """Each with its head, its prompt and what differs of its augment."""
    entries = [
        {"name": "all", "dataset": str(small_shards)},
        {"name": "two", "dataset": str(up_down), "prompt": ASK, "augment": {"horizontal_flip": 0.5}},
    ]
    run = prepare(dataset=None, datasets=entries, color_jitter=0.3)
    assert {name: head.num_classes for name, head in run.heads.items()} == {"all": 4, "two": 2}
    first, second = run.clips.sources
    assert second.prompt == ASK != first.prompt
    assert first.augment is not None
    assert second.augment is not None
    assert [(a.horizontal_flip, a.color_jitter) for a in (first.augment, second.augment)] == [(0, 0.3), (0.5, 0.3)]
    batches = first_batches(run, 20)
    assert {*torch.cat([batch.heads_B for batch in batches]).tolist()} == {0, 1}
    assert prepare(dataset=None, datasets=[{**entries[0], "eval_dataset": str(small_shards)}], eval_strategy="epoch")


@pytest.mark.parametrize(
    ("weights", "changes", "share"),
    [
        ((None, None), {}, 26 / 39),
        ((None, None), {"mixing_temperature": 1e6}, 1 / 2),
        ((1.0, 3.0), {}, 1 / 4),
    ],
)
def test_mixing(
    prepare: Prepare,
    small_shards: Path,
    up_down: Path,
    weights: tuple[float | None, float | None],
    changes: dict[str, float],
    share: float,
) -> None:
    """mixing_temperature and the weight of each entry."""
    entries = [{"name": "all", "dataset": str(small_shards)}, {"name": "two", "dataset": str(up_down)}]
    entries = [{**entry, "weight": weight} for entry, weight in zip(entries, weights, strict=True)]
    run = prepare(dataset=None, datasets=entries, **changes)
    drawn = [run.data.order.at(position).source for position in range(run.data.clips)]
    assert drawn.count(0) / len(drawn) == pytest.approx(share, abs=0.02)


def test_max_samples(prepare: Prepare) -> None:
    run = prepare(max_samples=7, num_train_epochs=2)
    assert len({*epoch(run)}) == len(epoch(run)) == 7
    assert run.steps == 7
    assert {*epoch(run)} != {*epoch(prepare(max_samples=7, seed=1))}
    assert len(epoch(prepare(max_samples=100_000))) == 26


def test_prompt(prepare: Prepare) -> None:
    run = prepare(prompt=ASK)
    (batch,) = first_batches(run)
    assert "<|vision_end|> What is it? <ACTION>" in run.encoder.tokenizer.decode(batch.input_ids_BL[0].tolist())


@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        ({}, (2, 4, 4)),  # 4 frames of 56 x 56, in patches of 2 x 14 x 14
        ({"video_maxlen": 2}, (1, 4, 4)),
        ({"video_max_pixels": 784}, (2, 2, 2)),
        ({"video_min_pixels": 12544}, (2, 8, 8)),
    ],
)
def test_frames_and_pixels(prepare: Prepare, changes: dict[str, int], grid: tuple[int, int, int]) -> None:
    (batch,) = first_batches(prepare(**changes))
    assert batch.grid_thw == (grid, grid)
    assert len(batch.frames) == 2 * (2 * grid[0]) * (14 * grid[1]) * (14 * grid[2]) * 3


def test_image_max_pixels(prepare: Prepare, small_shards: Path, tmp_path: Path) -> None:
    single = make_shards(small_shards.parent / "videos", tmp_path / "single", frames=1)
    for changes, side in (({}, 4), ({"image_max_pixels": 784}, 2)):
        assert first_batches(prepare(dataset=str(single), **changes))[0].grid_thw[0][1:] == (side, side)
        assert first_batches(prepare(**changes))[0].grid_thw[0][1:] == (4, 4)  # not for clips of more frames
    large = prepare(dataset=str(single), video_max_pixels=784, image_max_pixels=12544)
    assert first_batches(large)[0].grid_thw[0][1:] == (4, 4)


@pytest.mark.parametrize(
    ("changes", "distances"),
    [({"frame_sampling": "dense", "dense_stride": 1}, {1}), ({"frame_sampling": "dense"}, {2}), ({}, {1, 2, 3})],
)
def test_frame_sampling(prepare: Prepare, changes: dict[str, Any], distances: set[int]) -> None:
    """Two of four stored frames: neighbours, dense_stride apart, or one of each half."""
    run = prepare(video_maxlen=2, **changes)
    chosen = [run.clips.frames.training(4, 0, epoch, sample) for epoch in range(4) for sample in range(8)]
    assert {second - first for first, second in chosen} == distances


@pytest.mark.parametrize("temporal_jitter", [True, False])
def test_temporal_jitter(prepare: Prepare, temporal_jitter: bool) -> None:
    run = prepare(video_maxlen=2, temporal_jitter=temporal_jitter)
    seen = {run.clips[Request((3,), epochs=(epoch,))].frames.numpy().tobytes() for epoch in range(8)}
    assert (len(seen) > 1) == temporal_jitter


def test_cutoff_len(prepare: Prepare) -> None:
    needed = len(first_batches(prepare())[0].input_ids_BL[0])
    prepare(cutoff_len=needed)
    with pytest.raises(ValueError, match=f"needs {needed} tokens .*cutoff_len allows {needed - 1}"):
        prepare(cutoff_len=needed - 1)


def test_shuffle_shards(prepare: Prepare) -> None:
    """One shard at a time: an epoch goes through one after the other; else they are all mixed."""
    apart, mixed = prepare(shuffle_shards=1), prepare()
    for run, changes in ((apart, 2), (mixed, None)):
        shards = [int(run.data.parts[0].index.shard[sample]) for sample in epoch(run)]
        found = sum(a != b for a, b in itertools.pairwise(shards))
        assert found == changes if changes else found > 5
        assert sorted(epoch(run)) == list(range(26))


def test_cache_dir(prepare: Prepare, small_shards: Path, tmp_path: Path) -> None:
    with web() as served:
        served.files = {path.name: path.read_bytes() for path in small_shards.iterdir()}
        run = prepare(dataset=served.url, cache_dir=str(tmp_path / "cache"), cache_gb=0.1)
        first_batches(run)
        sha = {shard.sha256 for shard in run.data.parts[0].index.shards}
    kept = {path.stem for path in (tmp_path / "cache").rglob("*.tar")}
    assert kept
    assert kept <= sha


def test_vision_cache(prepare: Prepare, tmp_path: Path) -> None:
    changes = {"vision_cache": str(tmp_path / "features")}
    with pytest.raises(ConfigError, match=r"vision_cache: .* has no features"):
        prepare(**changes)
    plain_config = prepare().config
    data = plain_config.data.model_copy(update=changes)
    cache_features(plan(plain_config.model_copy(update={"data": data})))
    ((stored,), (plain,)) = first_batches(prepare(**changes)), first_batches(prepare())
    assert (stored.features_VD is None, plain.features_VD is None) == (False, True)
    assert stored.keys == plain.keys


@pytest.mark.parametrize("workers", [1, 3])
def test_preprocessing_num_workers(
    prepare: Prepare, small_shards: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """As many threads tokenise: each waits until all are at it."""
    together, encode, threads = threading.Barrier(workers, timeout=20), PromptEncoder.encode, set()

    def encode_together(self: PromptEncoder, *arguments: Any) -> Any:
        together.wait()
        threads.add(threading.current_thread().name)
        return encode(self, *arguments)

    monkeypatch.setattr(PromptEncoder, "encode", encode_together)
    entries = [
        {"name": f"d{i}", "dataset": str(small_shards), "prompt": ASK.replace("it", "it" * i)} for i in (1, 2, 3)
    ]
    prepare(dataset=None, datasets=entries, preprocessing_num_workers=workers)
    assert len(threads) == workers


# Augmentation


@pytest.mark.parametrize(
    "changes",
    [
        {"random_resized_crop": 0.3},
        {"color_jitter": 0.9},
        {"random_erasing": 1.0},
        {"rand_augment": [2, 9]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_augmentation_changes_pixels(prepare: Prepare, changes: dict[str, Any]) -> None:
    plain, changed = prepare(), prepare(**changes)
    (own,), (other,) = first_batches(plain), first_batches(changed)
    assert own.keys == other.keys
    assert not torch.equal(own.frames, other.frames)
    # Never where clips are evaluated.
    evaluated = [run.clips[Request((0, 1))].frames for run in (plain, changed)]
    assert torch.equal(*evaluated)


@pytest.mark.parametrize(
    ("mirror_pairs", "swapped"),
    [("auto", {"left": "right", "right": "left"}), ([], {}), ([["up", "down"]], {"up": "down", "down": "up"})],
)
def test_mirror_pairs(prepare: Prepare, mirror_pairs: Any, swapped: dict[str, str]) -> None:
    """With horizontal_flip: 1 every clip is mirrored, and classes swap as told."""
    plain, flipped = prepare(), prepare(horizontal_flip=1.0, mirror_pairs=mirror_pairs)
    names = plain.data.parts[0].index.labels.names
    for own, other in zip(first_batches(plain, 13), first_batches(flipped, 13), strict=True):
        labels = [[names[label] for label in batch.labels_B.tolist()] for batch in (own, other)]
        assert labels[1] == [swapped.get(name, name) for name in labels[0]]
        pictures = [batch.frames.reshape(2, 4, 56, 56, 3) for batch in (own, other)]
        assert torch.equal(pictures[0].flip(3), pictures[1])


@pytest.mark.parametrize("key", ["mixup_alpha", "cutmix_alpha"])
def test_mixing_of_clips(prepare: Prepare, key: str) -> None:
    plain, mixed = prepare(), prepare(**{key: 1.0})
    batches = [first_batches(run, 8) for run in (plain, mixed)]
    assert all(batch.shares_B.count_nonzero() == 0 for batch in batches[0])
    shares = torch.cat([batch.shares_B for batch in batches[1]])
    assert len({*shares.tolist()}) > 8
    pixels = [torch.cat([batch.frames for batch in each]).reshape(16, -1) for each in batches]
    kept = (pixels[0] == pixels[1]).float().mean(dim=1)
    # cutmix leaves what is outside of the box; mixup changes what the partner has otherwise.
    if key == "cutmix_alpha":
        assert (kept >= 1 - shares - 0.01).all()
    assert (kept[shares > 0.3] < 1).all()


# Optimization


def test_adam(monkeypatch: pytest.MonkeyPatch, prepare: Prepare) -> None:
    """Two steps with gradients 1 and -3, decay 0, as Kingma and Ba (2015) compute them."""
    monkeypatch.setattr(optimizer, "load_op", lambda name: 1 / 0)  # torch's AdamW: nothing to compile
    monkeypatch.setattr("vidcls.distributed.is_main", lambda: False)
    optim = prepare(adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=0.25).config.optim
    weight = nn.Parameter(torch.zeros(1))
    adam = optimizer.build_adam([{"params": [weight], "lr": 0.1, "weight_decay": 0.0}], optim)
    for gradient in (1.0, -3.0):
        weight.grad = torch.tensor([gradient])
        adam.step()
    # Means 1 then (0.25 - 1.5) / 0.75; squares 1 then (0.1875 + 2.25) / 0.4375.
    expected = -0.1 * 1 / (1 + 0.25) - 0.1 * (-1.25 / 0.75) / ((2.4375 / 0.4375) ** 0.5 + 0.25)
    assert weight.item() == pytest.approx(expected, rel=1e-5)


def test_steps(prepare: Prepare) -> None:
    assert prepare(num_train_epochs=2).steps == 26  # of two clips
    assert prepare(num_train_epochs=0.5).steps == 7
    assert prepare(num_train_epochs=2, max_steps=5).steps == 5
    assert prepare(num_train_epochs=1, max_steps=-1).steps == 13


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16(build: Callable[..., ActionClassifier], prepare: Prepare, bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert {p.dtype for name, p in build(bf16=bf16).named_parameters() if name.startswith("backbone.")} == {dtype}
    run = prepare(bf16=bf16)
    assert deepspeed_config(run.config, run.plan)["bf16"] == {"enabled": bf16}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")),
        (
            {"label_smoothing": 0.2},
            lambda logits, labels: F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2),
        ),
        (
            {"loss_type": "focal", "focal_gamma": 3.0},
            lambda logits, labels: (
                (1 - F.softmax(logits, 1)[range(6), labels]) ** 3 * F.cross_entropy(logits, labels, reduction="none")
            ),
        ),
    ],
    ids=["plain", "smoothed", "focal"],
)
def test_losses(
    prepare: Prepare,
    changes: dict[str, Any],
    expected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    run = prepare(per_device_train_batch_size=6, **changes)
    (batch,) = first_batches(run)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    objective = Objective.of(run.config.optim, run.data.class_counts(), torch.device("cpu"))
    torch.testing.assert_close(objective.losses(logits, batch), expected(logits, batch.labels_B))


def test_class_balance_beta(prepare: Prepare) -> None:
    """Classes of 7, 7, 6 and 6 clips; the rarer ones weigh (1 - b^7) / (1 - b^6) times as much."""
    run, beta = prepare(class_balance_beta=0.9), 0.9
    assert sorted(run.data.class_counts()[0]) == [6, 6, 7, 7]
    objective = Objective.of(run.config.optim, run.data.class_counts(), torch.device("cpu"))
    losses = {}
    for batch in first_batches(run, 13):
        counts = [run.data.class_counts()[0][label] for label in batch.labels_B.tolist()]
        losses |= dict(zip(counts, objective.losses(torch.zeros(2, 4), batch).tolist(), strict=True))
    assert losses[6] / losses[7] == pytest.approx((1 - beta**7) / (1 - beta**6), rel=1e-5)


def test_lm_loss_weight(prepare: Prepare, build: Callable[..., ActionClassifier]) -> None:
    """Clips bring an answer, the class's name, whose likelihood the model gives too."""
    run, model = prepare(lm_loss_weight=0.5), build(lm_loss_weight=0.5)
    (batch,) = first_batches(run)
    assert batch.answer_labels_BL is not None
    row = batch.answer_labels_BL[0]
    answer = run.encoder.tokenizer.decode(row[row >= 0].tolist())
    assert answer.removesuffix("<|im_end|>") == run.data.parts[0].index.labels.names[batch.labels_B[0]]
    logits_BC, answers_B = model(**batch.model_inputs())
    assert (logits_BC.shape, answers_B.shape) == ((2, 4), (2,))
    assert Objective.of(run.config.optim, [[1]], torch.device("cpu")).lm_loss_weight == 0.5
    assert first_batches(prepare())[0].answer_labels_BL is None


# Evaluation while training


@pytest.mark.parametrize("size", [4, 8])
def test_per_device_eval_batch_size(
    prepare: Prepare, build: Callable[..., ActionClassifier], tmp_path: Path, size: int
) -> None:
    run = prepare(val_size=10, eval_strategy="epoch", per_device_eval_batch_size=size)
    assert run.evaluations is not None
    sizes: list[int] = []
    model = build().to(torch.bfloat16)  # in fp32 each clip is computed alone
    model.dtype = torch.bfloat16
    model.register_forward_pre_hook(lambda _m, _a, kwargs: sizes.append(len(kwargs["heads_B"])), with_kwargs=True)
    (tmp_path / "out").mkdir()
    run.evaluations.run(model, 1)
    assert sizes == {4: [4, 4, 2], 8: [8, 2]}[size]


# The run


def test_stage(prepare: Prepare) -> None:
    with pytest.raises(ConfigError, match="stage: 'sft' is not legal"):
        prepare(stage="sft")


def test_deepspeed(prepare: Prepare) -> None:
    run = prepare(deepspeed=str(launch.ROOT / "ds_configs" / "zero3.json"))
    merged = deepspeed_config(run.config, run.plan)
    assert merged["zero_optimization"]["stage"] == run.config.zero_stage == 3
    assert merged["train_micro_batch_size_per_gpu"] == 2


def test_seed(prepare: Prepare) -> None:
    one, again, other = (prepare(seed=seed, color_jitter=0.5) for seed in (1, 1, 2))
    assert epoch(one) == epoch(again) != epoch(other)
    request = Request((0, 1), epochs=(0, 0))
    frames = [run.clips[request].frames for run in (one, again, other)]
    assert torch.equal(frames[0], frames[1])
    assert not torch.equal(frames[0], frames[2])
    heads = [run.heads["default"].layers.weight for run in (one, again, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_wandb_is_asked_for_and_not_there(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="report_to: 'wandb' needs the package wandb"):
        prepare(report_to="wandb")


WANDB = """\
import json, multiprocessing, pathlib, torch
from torch.distributed import distributed_c10d

def init(**settings):
    group = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    about = {"workers": len(multiprocessing.active_children()), "timeout": group.options._timeout.total_seconds()}
    return Run(pathlib.Path(settings["dir"]) / "told.json", {**settings, **about})

class Run:
    def __init__(self, path, about):
        self.path, self.told = path, {"about": about, "rows": []}

    def log(self, values, step):
        self.told["rows"].append([step, values])

    def finish(self):
        self.path.write_text(json.dumps(self.told))
"""


@pytest.fixture(scope="module")
def runs(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs on two ranks, and their log: dry, told (with a stand-in for wandb) and over (an earlier run)."""
    top = tmp_path_factory.mktemp("runs")
    (top / "modules").mkdir()
    (top / "modules" / "wandb.py").write_text(WANDB)
    common = {
        "model_name_or_path": "tiny",
        "dataset": str(small_shards),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": None,
        "ddp_timeout": 180_000_000,
        "self_check": False,
    }
    changes: dict[str, dict[str, Any]] = {
        "dry": {"do_train": False},
        "told": {
            "report_to": "wandb",
            "dataloader_num_workers": 3,
            "save_only_model": True,
            "plot_loss": False,
            "html_report": False,
        },
        "over": {"overwrite_output_dir": True, "report_to": "none", "plot_loss": True, "self_check": True},
    }
    for name in ("checkpoint-9/model", "best/model"):
        (top / "over" / name).parent.mkdir(parents=True)
        (top / "over" / name).write_text("old")
    (top / "over" / "notes.txt").write_text("mine")
    recipes = []
    for name, values in changes.items():
        recipes.append(top / f"{name}.yaml")
        recipes[-1].write_text(yaml.safe_dump({**common, **values, "output_dir": str(top / name)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(top / "modules"))
        done = launch.deepspeed(2, "tests/support/trainings.py", *recipes, log=top / "log")
    assert done.code == 0, done.output[-4000:]
    return top


def said(runs: Path, name: str) -> str:
    """What was printed during one of the runs."""
    return (runs / "log").read_text().rpartition(f"recipe {runs / name}.yaml")[2].partition("recipe ")[0]


@pytest.mark.launch
def test_do_train_false_writes_nothing(runs: Path) -> None:
    """do_train: false; what would train is said all the same."""
    assert not (runs / "dry").exists()
    assert "do_train is false: nothing was trained" in said(runs, "dry")
    assert "training  2 steps of 4 clips" in said(runs, "dry")


@pytest.mark.launch
def test_plot_loss_and_report_to(runs: Path) -> None:
    """plot_loss writes a picture, html_report a page; report_to none nothing more, wandb tells wandb."""
    assert Image.open(runs / "over" / "training_loss.png").size[0] > 100
    for name in ("told", "over"):
        assert not (runs / name / "tensorboard").exists()
    for name in ("training_loss.png", "report.html"):
        assert not (runs / "told" / name).exists()
    assert "finished at step 2 of 2" in (runs / "over" / "report.html").read_text()
    told = json.loads((runs / "told" / "told.json").read_text())
    assert [step for step, _ in told["rows"]] == [1, 2]
    rows = [json.loads(line) for line in (runs / "told" / "train_log.jsonl").read_text().splitlines()]
    assert [values["train/loss"] for _, values in told["rows"]] == [row["loss"] for row in rows]
    assert told["about"]["config"]["max_steps"] == 2
    assert told["about"]["name"] == "told"


@pytest.mark.launch
def test_what_a_run_is_while_it_runs(runs: Path) -> None:
    """dataloader_num_workers processes, and collectives that wait for ddp_timeout seconds."""
    about = json.loads((runs / "told" / "told.json").read_text())["about"]
    assert about["workers"] == 3
    assert about["timeout"] == 180_000_000


@pytest.mark.launch
def test_overwrite_output_dir(runs: Path) -> None:
    """overwrite_output_dir deletes the earlier run and nothing else."""
    names = {path.name for path in (runs / "over").iterdir()}
    assert {"notes.txt", "checkpoint-1", "checkpoint-2"} <= names
    assert names.isdisjoint({"checkpoint-9", "best"})


@pytest.mark.launch
def test_save_only_model(runs: Path, prepare: Prepare) -> None:
    """save_only_model: smaller checkpoints, which evaluate and cannot be resumed."""
    names = [{p.name for p in (runs / run / "checkpoint-2").iterdir()} for run in ("told", "over")]
    assert names[1] - names[0] == {
        "training_state.json",
        "training_state-00001-of-00002.safetensors",
        "training_state-00002-of-00002.safetensors",
    }
    with pytest.raises(CheckpointError, match="no training state: it was written with save_only_model"):
        prepare(resume_from_checkpoint=str(runs / "told" / "checkpoint-2"))


@pytest.mark.launch
def test_resume_with_changes(runs: Path, prepare: Prepare) -> None:
    """Every key that decides numbers and differs is named at once; those of resume_with_changes may."""
    half = {"resume_from_checkpoint": str(runs / "over" / "checkpoint-1"), "bf16": True, "lora_rank": 16}
    half |= {"per_device_train_batch_size": 4, "max_steps": 2}  # of two ranks with 2 each
    assert prepare(**half).start.step == 1
    with pytest.raises(CheckpointError) as refused:
        prepare(**half | {"max_steps": 3, "learning_rate": 0.1, "seed": 1, "color_jitter": 0.5})
    said = str(refused.value)
    for key, then, now in (
        ("max_steps", 2, 3),
        ("learning_rate", 5e-05, 0.1),
        ("seed", 42, 1),
        ("color_jitter", 0.0, 0.5),
    ):
        assert said.count(f"{key} is {then!r} in the checkpoint and {now!r} in this run") == 1
    run = prepare(**half | {"max_steps": 3, "learning_rate": 0.1, "resume_with_changes": "max_steps,learning_rate"})
    assert (run.start.step, run.steps, run.config.optim.learning_rate) == (1, 3, 0.1)
    # What stood in the way once does not a second time: the stream that is stored next is that of the new recipe.
    run = prepare(**half | {"seed": 1, "max_samples": 20, "resume_with_changes": ["seed", "max_samples"]})
    assert run.start.stream["default/clips"] == 20
    with pytest.raises(
        CheckpointError, match=r"^resume_from_checkpoint: seed is 42 in the checkpoint and 1 in this run;"
    ):
        prepare(**half | {"seed": 1, "max_samples": 20, "resume_with_changes": ["max_samples"]})
    for names, reason in (("lerning_rate", "is no key of a recipe"), ("save_steps", "may always differ; leave it out")):
        with pytest.raises(ConfigError, match=f"resume_with_changes: '{names}' {reason}"):
            prepare(**half | {"resume_with_changes": names})


@pytest.mark.launch
def test_self_check(runs: Path) -> None:
    """self_check: true says what it found."""
    assert "self-check" in said(runs, "over")
    assert "self-check" not in said(runs, "told")
