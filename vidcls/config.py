"""A recipe and what follows from it, checked before anything heavy is imported. The keys are in options.py.

Nothing here may import torch, transformers or deepspeed: a typing mistake must be answered in well under a second,
on every rank, before the twenty seconds that those imports cost.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from vidcls.batch_plan import batch_plan
from vidcls.consistency import Sections, problem_in
from vidcls.options import (
    OWNER,
    SECTIONS,
    AugmentOptions,
    ConfigError,
    DataOptions,
    RunOptions,
    Section,
    field_error,
    legal_values,
)
from vidcls.registry import resolve_data_sets

LEFT_BY_FAILED_STARTS = {"failures", "run.lock", "STOP", "supervise", "supervise.jsonl"}
# What DeepSpeed would also read but the recipe owns; a number in both places would be two truths.
OWNED_BY_RECIPE = {
    "train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16": "bf16",
    "fp16": "bf16",
    "optimizer": "learning_rate",
    "scheduler": "lr_scheduler_type",
    "steps_per_print": "logging_steps",
    "tensorboard": "report_to",
    "wandb": "report_to",
    "csv_monitor": "report_to",
    "comet": "report_to",
}


class Config(Sections):
    """A resolved run."""

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if problem := problem_in(self):
            raise ValueError(problem)
        batch_plan(self.optim, world_size=None)
        return self

    @property
    def zero_stage(self) -> int:
        return int(self.zero["zero_optimization"]["stage"])

    def flat(self) -> dict[str, Any]:
        """Every key and value, as a recipe would hold them."""
        return {key: value for name in SECTIONS for key, value in getattr(self, name).model_dump(mode="json").items()}

    def dump(self) -> str:
        """The resolved recipe as YAML, which repeats the run: it neither resumes nor overwrites anything."""
        fresh: dict[str, Any] = {
            "resume_from_checkpoint": None,
            "resume_with_changes": [],
            "overwrite_output_dir": False,
        }
        return yaml.safe_dump({**self.flat(), **fresh}, sort_keys=False, allow_unicode=True)


def load_config(recipe: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe (flat YAML) and `key=value` overrides (values are YAML, and win).

    Raises:
        ConfigError: every mistake found, one line each.
    """
    path = Path(recipe)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe: {str(path)!r} is not a file; shipped ones are in launch/recipes/") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe: {str(path)!r} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe: {str(path)!r} holds {type(values).__name__}, not `key: value` lines")
    for item in overrides or []:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"argument: {item!r} is not key=value")
        try:
            values[key] = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {text!r} is not a YAML value: {str(error).splitlines()[0]}") from None
    return config_from_values(values)


def config_from_values(values: dict[str, Any]) -> Config:
    """Check flat keys and build the configuration. Raises ConfigError with all mistakes at once."""
    errors = [_unknown_key(key) for key in values if key not in OWNER]
    if (values.get("dataset") is None) == (values.get("datasets") is None):
        errors.append("dataset: required, not given: either dataset (one head) or datasets (a head each), not both")
    sections: dict[str, Section] = {}
    for name, cls in SECTIONS.items():
        try:
            sections[name] = cls(**{k: v for k, v in values.items() if OWNER.get(k) == name})
        except ValidationError as error:
            errors += [field_error(cls, item) for item in error.errors()]
    if errors:
        raise ConfigError("\n".join(errors))
    run = sections["run"]
    assert isinstance(run, RunOptions)
    zero = _read_deepspeed_file(run.deepspeed)
    data, augment = sections["data"], sections["augment"]
    assert isinstance(data, DataOptions)
    assert isinstance(augment, AugmentOptions)
    train_sets, eval_sets = resolve_data_sets(data, augment)
    try:
        return Config(zero=zero, train_sets=train_sets, eval_sets=eval_sets, **sections)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError("\n".join(str(e["ctx"]["error"]) for e in error.errors())) from None


def check_output_dir(run: RunOptions) -> None:
    """Raise ConfigError when output_dir holds files and the run neither resumes there nor may overwrite it."""
    folder = Path(run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {run.output_dir!r} is a file, not a folder")
    resumed = run.resume_from_checkpoint
    goes_on = resumed is not None and (resumed == "latest" or Path(resumed).resolve().parent == folder.resolve())
    kept = folder.is_dir() and any(path.name not in LEFT_BY_FAILED_STARTS for path in folder.iterdir())
    if kept and not (run.overwrite_output_dir or goes_on):
        raise ConfigError(
            f"output_dir: {run.output_dir!r} is not empty; give another folder, resume_from_checkpoint=latest to go "
            "on, or overwrite_output_dir=true to delete the run in it"
        )


def describe_options() -> str:
    """All keys with default and meaning, for --help."""
    lines = []
    for name, cls in SECTIONS.items():
        lines.append(f"\n{name}:")
        for key, field in cls.model_fields.items():
            default = (
                "required"
                if field.is_required()
                else f"default {json.dumps(field.get_default(call_default_factory=True))}"
            )
            legal = legal_values(field.annotation, field.metadata)
            lines.append(f"  {key}  ({default}{'; ' + legal if legal else ''})\n      {field.description}")
    return "\n".join(lines)


def _unknown_key(key: Any) -> str:
    close = difflib.get_close_matches(str(key), OWNER, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; --help lists all keys"
    return f"{key}: unknown option{hint}"


def _read_deepspeed_file(name: str) -> dict[str, Any]:
    path = Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"deepspeed: {name!r} is not a file (looked in {Path.cwd()}); shipped ones are in ds_configs/"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed: {name!r} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed: {name!r} holds {type(content).__name__}, not an object")
    content = _without_auto(content)
    both = [f"deepspeed: {name!r} sets {k!r}; that number is owned by {OWNED_BY_RECIPE[k]!r} of the recipe: "
            f"remove it from the file" for k in content if k in OWNED_BY_RECIPE]  # fmt: skip
    if both:
        raise ConfigError("\n".join(both))
    zero = content.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (2, 3):
        raise ConfigError(f"deepspeed: {name!r} has zero_optimization.stage {stage!r}; legal: 2 | 3")
    return content


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Without what transformers' DeepSpeed files leave to others by "auto": the recipe owns it, or DeepSpeed has a
    default."""
    kept = {key: value for key, value in values.items() if value != "auto"}
    switched = {key for key, value in kept.items() if isinstance(value, dict) and value.get("enabled") == "auto"}
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in kept.items()
        if key not in switched
    }
