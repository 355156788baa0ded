"""The configuration: strict, fast, and every mistake answered with field, value and what is legal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.launch import ROOT
from vidcls.config import Config, ConfigError, check_output_dir, config_from_values, describe_options, load_config
from vidcls.options import OWNER, DatasetOptions

VALUES = {
    "model_name_or_path": "tiny",
    "dataset": "data/shards",
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
}
BUDGET = {"per_device_train_batch_size": None, "train_batch_size": 24, "max_tokens_per_batch": 4096}


def config(**changes: object) -> Config:
    return config_from_values({**VALUES, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1e-4}, "lerning_rate: unknown option; did you mean 'learning_rate'?"),
        ({"learning_rate": -1}, "learning_rate: -1 is not legal: .*legal: > 0"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is not legal"),
        ({"action_decoder_type": "tree"}, "action_decoder_type: 'tree' .*legal: linear | mlp"),
        ({"dataset": None}, "dataset: required, not given"),
        ({"lora_dropout": 1.0}, "lora_dropout: 1.0 is not legal: .*>= 0, < 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 is not legal"),
        ({"per_device_train_batch_size": "auto"}, "per_device_train_batch_size: 'auto' needs train_batch_size"),
        (
            {"per_device_train_batch_size": "auto", "train_batch_size": 8, "gradient_accumulation_steps": 2},
            "'auto' needs train_batch_size and no gradient_accumulation_steps, .* they are 8 and 2",
        ),
        ({"memory_limit": 0.5}, "memory_limit: 0.5 has no effect without per_device_train_batch_size auto"),
        ({"memory_limit": 1.5}, "memory_limit: 1.5 is not legal"),
        ({"memory_limit": "12"}, "memory_limit: '12' is not legal"),
        ({"max_steps": 0}, "max_steps: 0 is not legal: .*>= 1"),
        ({"prompt": "<video> what?"}, "0 <ACTION>"),
        ({"prompt": "<video> <ACTION> <ACTION>"}, "2 <ACTION>"),
        ({"prompt": "what? <ACTION>"}, "0 <video>"),
        ({"action_decoder_hidden_size": 64}, "action_decoder_hidden_size: 64 has no effect"),
        ({"video_min_pixels": 10**6}, "video_min_pixels: 1000000 is more than video_max_pixels"),
        ({"shuffle_shards": 0}, "shuffle_shards: 0 is not legal: .*>= 1"),
        ({"on_bad_sample": "ignore"}, "on_bad_sample: 'ignore' .*legal: error | skip"),
        ({"max_bad_samples": 1.5}, "max_bad_samples: 1.5 is not legal: .*<= 1"),
        ({"dataset": "data/a/.,data/a"}, "dataset: 'data/a' stands there twice"),
        ({"mirror_pairs": [["a", "b"]]}, "mirror_pairs: .* has no effect with horizontal_flip 0"),
        ({"val_size": 0.1}, "val_size: 0.1 has no effect with eval_strategy 'no'"),
        ({"rand_augment": [99, 9]}, "rand_augment: 0: 99 is not legal"),
        ({"dataset": None, "datasets": [{"dataset": "data/a"}]}, "datasets: 0: name: required, not given$"),
        ({"cache_gb": 0}, "cache_gb: 0 is not legal: .*> 0"),
        ({"vision_cache": "f", "vision_tuning": "lora"}, "vision_cache: 'f' needs vision_tuning 'frozen', not 'lora'"),
        ({"vision_cache": "f", "merger_tuning": "full"}, "vision_cache: 'f' needs merger_tuning 'frozen', not 'full'"),
        *(
            ({"vision_cache": "f", key: value}, f"vision_cache: 'f' does not go with {key} ")
            for key, value in {
                "horizontal_flip": 0.5,
                "random_resized_crop": 0.5,
                "color_jitter": 0.1,
                "random_erasing": 0.1,
                "rand_augment": [1, 9],
                "mixup_alpha": 0.2,
                "cutmix_alpha": 1,
            }.items()
        ),
        (
            {
                "vision_cache": "f",
                "dataset": None,
                "datasets": [{"name": "a", "dataset": "d/a", "augment": {"color_jitter": 0.1}}],
            },
            "vision_cache: 'f' does not go with color_jitter 0.1 of 'a'",
        ),
        ({"mixing_temperature": 2}, "mixing_temperature: 2.0 has no effect with one data set"),
        ({"vision_lr_scale": 0.1}, "vision_lr_scale: 0.1 has no effect with vision_tuning 'frozen'"),
        ({"merger_lr_scale": 2}, "merger_lr_scale: 2.0 has no effect with merger_tuning 'frozen'"),
        ({"finetuning_type": "full", "use_dora": True}, "use_dora: True has no effect without LoRA"),
        ({"finetuning_type": "full", "loraplus_lr_ratio": 16}, "loraplus_lr_ratio: 16.0 has no effect without LoRA"),
        ({"finetuning_type": "freeze", "lora_target": "q_proj"}, "has no effect with finetuning_type 'freeze'"),
        ({"action_decoder_init": "zeros", "action_decoder_path": "head"}, "has no effect with action_decoder_path"),
        ({"focal_gamma": 3}, "focal_gamma: 3.0 has no effect with loss_type 'cross_entropy'"),
        ({"dense_stride": 3}, "dense_stride: 3 has no effect with frame_sampling 'segments'"),
        ({"eval_dataset": "data/test"}, "eval_dataset: 'data/test' has no effect with eval_strategy 'no'"),
        ({"eval_strategy": "steps"}, "eval_strategy: 'steps' needs clips to evaluate on"),
        ({"eval_steps": 5}, "eval_steps: 5 has no effect with eval_strategy 'no'"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end: true needs eval_strategy"),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model: 'f1' is not legal: top1"),
        ({"per_device_train_batch_size": None}, "per_device_train_batch_size: not given"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch: 0 is not legal: .*>= 1"),
        *(
            ({**BUDGET, **changes}, "max_tokens_per_batch: 4096 divides the clips of train_batch_size " + words)
            for changes, words in (
                ({"train_batch_size": None}, r"\(None\), which must be given, "),
                ({"per_device_train_batch_size": 2}, r".* place of per_device_train_batch_size \(2\)"),
                ({"gradient_accumulation_steps": 2}, r".*gradient_accumulation_steps \(2\), which must be left out"),
            )
        ),
        ({**BUDGET, "lm_loss_weight": 0.1}, "max_tokens_per_batch: 4096 does not go with lm_loss_weight 0.1"),
        ({"deepspeed": "nowhere.json"}, "deepspeed: 'nowhere.json' is not a file"),
    ],
)
def test_a_mistake_names_field_value_and_what_is_legal(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize("finetuning_type", ["full", "freeze"])
def test_the_numbers_of_a_lora_that_is_not_used_are_no_mistake(finetuning_type: str) -> None:
    """People switch LoRA off by this one key, and nobody is misled."""
    made = config(finetuning_type=finetuning_type, lora_rank=8, lora_alpha=16, lora_dropout=0.1, lora_target="all")
    assert not made.has_lora


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"max_steps": -1}, "max_steps", None),  # transformers' "not set"
        ({"eval_strategy": False}, "eval_strategy", "no"),  # what YAML reads for a bare no
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint", "latest"),
        ({"resume_from_checkpoint": False}, "resume_from_checkpoint", None),
        ({"lora_target": "q_proj, v_proj"}, "lora_target", ["q_proj", "v_proj"]),
        ({"learning_rate": "1e-4"}, "learning_rate", 1e-4),  # text to YAML, since it has no point
    ],
)
def test_spellings_of_the_same(changes: dict, key: str, value: object) -> None:
    assert config(**changes).flat()[key] == value


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_values({"lora_rnk": 1, "lora_alpha": -1, "seed": "x"})
    for part in ("lora_rnk", "lora_alpha", "seed", "model_name_or_path: required", "dataset: required"):
        assert part in str(caught.value)


def test_a_number_in_both_places_names_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 8, "bf16": {"enabled": true}}')
    with pytest.raises(ConfigError, match="'train_batch_size'; that number is owned by 'train_batch_size'") as caught:
        config(deepspeed=str(file))
    assert "owned by 'bf16'" in str(caught.value)


@pytest.mark.parametrize("content", ["[1]", "{", '{"zero_optimization": {"stage": 1}}', "{}"])
def test_a_deepspeed_file_that_cannot_serve_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"ds\.json"):
        config(deepspeed=str(file))


def test_overrides_win_and_the_dump_loads_again(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(VALUES) + "learning_rate: 5e-5\n")
    loaded = load_config(recipe, ["lora_rank=4", "bf16=false", "prompt=<video> Which? <ACTION>"])
    assert (loaded.model.lora_rank, loaded.optim.bf16, loaded.optim.learning_rate) == (4, False, 5e-5)
    again = tmp_path / "again.yaml"
    again.write_text(loaded.dump())
    assert load_config(again) == loaded


def test_a_used_output_dir_needs_a_decision(tmp_path: Path) -> None:
    (tmp_path / "something").write_text("x")
    with pytest.raises(ConfigError, match=r"output_dir: .* is not empty"):
        check_output_dir(config(output_dir=str(tmp_path)).run)
    check_output_dir(config(output_dir=str(tmp_path), overwrite_output_dir=True).run)
    check_output_dir(config(output_dir=str(tmp_path), resume_from_checkpoint="latest").run)
    check_output_dir(config(output_dir=str(tmp_path / "new")).run)


def test_every_option_is_described() -> None:
    text = describe_options()
    assert "learning_rate  (default 5e-05; > 0)" in text
    assert "output_dir  (required)" in text


def test_every_key_stands_in_the_documentation() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [key for key in (*OWNER, *DatasetOptions.model_fields) if f"`{key}`" not in text] == []


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml"))])
def test_shipped_recipes_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    load_config(ROOT / "launch" / "recipes" / name)


def test_a_typo_is_answered_before_any_heavy_import(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**VALUES, "max_stepz": 3}))
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['train.py', '--local_rank=0', {str(recipe)!r}]\n"
        "try:\n    runpy.run_path('launch/train.py', run_name='__main__')\n"
        "except SystemExit as leaving:\n    code = leaving.code\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'peft'} & sys.modules.keys()\n"
        "print(code, sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "2 []"
    assert done.stderr.strip() == "error: max_stepz: unknown option; did you mean 'max_steps'?"


def test_a_deepspeed_file_of_transformers_leaves_its_auto_values_to_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    batch = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    half = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}}
    file.write_text(json.dumps({**batch, **half, "zero_optimization": zero}))
    assert config(deepspeed=str(file)).zero == {"zero_optimization": {"stage": 3, "overlap_comm": True}}
