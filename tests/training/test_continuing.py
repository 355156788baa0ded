"""What must be equal for a run to go on. On real checkpoints: test_resume.py, test_recipe_keys.py, test_damage.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.checkpoints import tiny_spec
from vidcls.config import Config, ConfigError, config_from_values
from vidcls.manifest import CheckpointError
from vidcls.options import OWNER
from vidcls.training.continuing import DECISIVE, FREE, SHOWS_IN, check_changes, check_continues
from vidcls.training.folders import CONFIG_NAME
from vidcls.training.sharded_state import RunState

STREAM = {"seed": 42, "global_batch": 8, "a/data_digest": "d" * 16, "a/chosen": "c", "a/clips": 9}
STATE = RunState(step=4, adam_steps=3, stream=STREAM)
SPEC = tiny_spec("a")


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": "tiny",
        "dataset": str(tmp_path / "shards"),
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "seed": 42,
    }


@pytest.fixture
def stored(tmp_path: Path, recipe: dict[str, Any]) -> Path:
    """A folder with the resolved recipe; all that is read of it here."""
    (tmp_path / "shards").mkdir()
    (tmp_path / CONFIG_NAME).write_text(config_from_values(recipe).dump())
    return tmp_path


def now(recipe: dict[str, Any], **changes: Any) -> Config:
    return config_from_values({**recipe, **changes})


def test_every_key_either_decides_numbers_or_may_differ() -> None:
    assert {*OWNER} == DECISIVE | FREE
    assert not DECISIVE & FREE
    assert SHOWS_IN.keys() <= DECISIVE


def test_what_may_always_differ(stored: Path, recipe: dict[str, Any]) -> None:
    config = now(
        recipe,
        output_dir="elsewhere",
        per_device_train_batch_size=None,
        train_batch_size=8,
        gradient_accumulation_steps=2,
        deepspeed="ds_configs/zero3.json",
        flash_attn="eager",
        save_steps=3,
        dataloader_num_workers=0,
        on_bad_sample="skip",
        ddp_timeout=9,
    )
    assert check_continues(stored, STATE, SPEC, config, replace(STATE, step=0, adam_steps=0), SPEC) == []


def test_every_difference_is_named_at_once(stored: Path, recipe: dict[str, Any]) -> None:
    stream = {**STATE.stream, "global_batch": 16, "b/data_digest": "e"}
    spec = replace(SPEC, base_weights="other")
    with pytest.raises(CheckpointError) as refused:
        check_continues(
            stored, STATE, SPEC, now(recipe, warmup_steps=1, lora_rank=4), replace(STATE, stream=stream), spec
        )
    assert str(refused.value) == (
        "resume_from_checkpoint: lora_rank is 16 in the checkpoint and 4 in this run, "
        "warmup_steps is None in the checkpoint and 1 in this run, "
        "b/data_digest is None in the checkpoint and 'e' in this run, "
        "global_batch is 8 in the checkpoint and 16 in this run, "
        f"base_weights is {SPEC.base_weights!r} in the checkpoint and 'other' in this run; "
        "they must be equal for the run to go on (train_batch_size=8 gradient_accumulation_steps= keeps it on any rank "
        "count); to let it differ all the same: resume_with_changes=lora_rank,warmup_steps"
    )


def test_named_keys_may_differ_with_all_that_follows_from_them(stored: Path, recipe: dict[str, Any]) -> None:
    fewer = replace(STATE, stream={**STATE.stream, "a/chosen": "x", "a/clips": 5})
    config = now(recipe, max_samples=5, resume_with_changes=["max_samples"])
    assert check_continues(stored, STATE, SPEC, config, fewer, SPEC) == ["max_samples is 5 and was None"]
    with pytest.raises(CheckpointError, match="max_samples is None in the checkpoint and 5 in") as refused:
        check_continues(stored, STATE, SPEC, now(recipe, max_samples=5), fewer, SPEC)
    assert "chosen" not in str(refused.value)  # said once
    other = replace(fewer, stream={**fewer.stream, "a/data_digest": "f"})
    with pytest.raises(CheckpointError, match="a/data_digest is "):
        check_continues(stored, STATE, SPEC, config, other, SPEC)


def test_a_set_that_differs_without_its_key_is_refused(stored: Path, recipe: dict[str, Any]) -> None:
    other = replace(STATE, stream={**STATE.stream, "a/chosen": "x"})
    with pytest.raises(CheckpointError, match=r"^resume_from_checkpoint: a/chosen is 'c' in the checkpoint and 'x' in"):
        check_continues(stored, STATE, SPEC, now(recipe, resume_with_changes=["max_samples"]), other, SPEC)


@pytest.mark.parametrize("text", ["", "[1", "- a"])
def test_a_recipe_that_cannot_be_read_is_named(stored: Path, recipe: dict[str, Any], text: str) -> None:
    (stored / CONFIG_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml "):
        check_continues(stored, STATE, SPEC, now(recipe), STATE, SPEC)


def test_a_run_that_is_repeated_allows_nothing(recipe: dict[str, Any]) -> None:
    assert yaml.safe_load(now(recipe, resume_with_changes="seed, max_steps").dump())["resume_with_changes"] == []


def test_changes_that_mean_nothing_are_refused() -> None:
    check_changes(["learning_rate", "max_steps"])
    with pytest.raises(ConfigError, match="resume_with_changes: 'rate' is no key of a recipe"):
        check_changes(["learning_rate", "rate"])
    with pytest.raises(ConfigError, match="resume_with_changes: 'deepspeed' may always differ; leave it out"):
        check_changes(["deepspeed"])
