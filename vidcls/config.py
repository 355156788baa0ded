"""Every option of a training run: flat YAML keys in four sections, checked before anything heavy is imported.

Nothing here may import torch, transformers or deepspeed: a typing mistake must be answered in well under a second,
on every rank, before the twenty seconds that those imports cost.

Keys are named as LLaMA-Factory names them. Each key has exactly one default and one home, which is its line below.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

ACTION_TOKEN = "<ACTION>"
VIDEO_TAG = "<video>"
DEFAULT_CACHE_GB = 50
DEFAULT_PROMPT = f"{VIDEO_TAG}\nWhat action is shown in the video? {ACTION_TOKEN}"


class ConfigError(ValueError):
    """A user's mistake in the configuration; the message names field, value and what is legal."""


class PromptError(ValueError):
    """A prompt that cannot be encoded."""


def check_prompt(prompt: str) -> None:
    """Raise PromptError unless there is exactly one <video> and, behind it, exactly one <ACTION>."""
    videos, actions = prompt.count(VIDEO_TAG), prompt.count(ACTION_TOKEN)
    if videos != 1 or actions != 1:
        raise PromptError(
            f"prompt {prompt!r} has {videos} {VIDEO_TAG} and {actions} {ACTION_TOKEN}; it must have exactly one of each"
        )
    if prompt.index(ACTION_TOKEN) < prompt.index(VIDEO_TAG):
        raise PromptError(
            f"prompt {prompt!r} has {ACTION_TOKEN} before {VIDEO_TAG}; it must come after, "
            "because a token sees only what is before it"
        )


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelOptions(Section):
    model_name_or_path: str = Field(description="local Qwen2.5-VL folder, or 'tiny' (built in, random)")
    finetuning_type: Literal["lora"] = Field("lora", description="how the language model is tuned")
    lora_rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    lora_alpha: float = Field(32, gt=0, description="LoRA scale is lora_alpha / lora_rank")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the input of the LoRA branch")
    action_decoder_type: Literal["linear", "mlp"] = Field("linear", description="classification head")
    action_decoder_hidden_size: int | None = Field(
        None, ge=1, description="hidden width of the mlp head (default: the backbone's)"
    )
    num_action_classes: int | None = Field(
        None, ge=2, description="expected class count; checked against the shards, which own the number"
    )
    flash_attn: Literal["auto", "sdpa", "fa2", "eager"] = Field(
        "auto", description="attention kernels: fa2 needs a GPU and flash-attn; auto is sdpa"
    )
    gradient_checkpointing: bool = Field(False, description="recompute language layers in backward")


class DataOptions(Section):
    dataset: str = Field(description="folder of shards (tools/make_shards.py), or its http(s):// or s3:// URL")
    prompt: str = Field(DEFAULT_PROMPT, description="used for clips whose shard stores no prompt")
    video_maxlen: int = Field(128, ge=1, description="frames per clip at most; more stored ones are thinned evenly")
    temporal_jitter: bool = Field(
        True, description="thin to a random frame of each part of a clip in training; false: always the middle one"
    )
    video_max_pixels: int = Field(128 * 128, ge=28 * 28, description="height x width of a frame at most")
    video_min_pixels: int = Field(28 * 28, ge=1, description="height x width of a frame at least")
    cutoff_len: int = Field(2048, ge=8, description="longest sequence in tokens; longer is an error")
    shuffle_shards: int | None = Field(
        None, ge=1, description="shuffle within this many shards at a time (default: within all of them)"
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        "error", description="a clip that cannot be read stops training, or is skipped; evaluation always stops"
    )
    max_bad_samples: float = Field(
        0.01, ge=0, le=1, description="skipping more different clips than this share of the data set stops the run"
    )
    cache_dir: str | None = Field(
        None, description="where shards of a URL are kept on each node (default: $VIDCLS_CACHE, or a temporary folder)"
    )
    cache_gb: float = Field(DEFAULT_CACHE_GB, gt=0, le=10**6, description="size of that cache in 10^9 bytes")
    dataloader_num_workers: int = Field(1, ge=0, description="loader processes per rank")


class OptimOptions(Section):
    per_device_train_batch_size: int | None = Field(None, ge=1, description="clips per forward and rank")
    gradient_accumulation_steps: int | None = Field(None, ge=1, description="forwards per optimizer step")
    train_batch_size: int | None = Field(None, ge=1, description="clips per optimizer step over all ranks")
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate of LoRA and head")
    action_token_lr_scale: float = Field(1.0, gt=0, description="learning rate of <ACTION> is this times")
    weight_decay: float = Field(0.01, ge=0, description="decoupled (AdamW); not on biases, norms, <ACTION>")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second-moment decay")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's denominator offset")
    max_grad_norm: float = Field(1.0, ge=0, description="global gradient norm is clipped to this; 0: never")
    lr_scheduler_type: Literal["cosine", "linear", "polynomial", "constant"] = Field(
        "cosine", description="shape of the decay after warm-up"
    )
    lr_scheduler_power: float = Field(2.0, gt=0, description="exponent of the polynomial schedule")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of all steps that warm up linearly")
    warmup_steps: int | None = Field(None, ge=0, description="warm-up in steps instead of warmup_ratio")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the data when max_steps is not set")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides num_train_epochs")
    bf16: bool = Field(True, description="bfloat16 weights with fp32 master copies; false: fp32")


class RunOptions(Section):
    output_dir: str = Field(description="everything the run writes goes here")
    overwrite_output_dir: bool = Field(False, description="delete an earlier run in output_dir instead of refusing it")
    resume_from_checkpoint: str | None = Field(
        None, description="a checkpoint folder, or 'latest' in output_dir (fresh start if it has none)"
    )
    deepspeed: str = Field("ds_configs/zero2.json", description="ZeRO and communication settings (JSON)")
    save_steps: int = Field(500, ge=1, description="optimizer steps between checkpoints; the last is always saved")
    save_total_limit: int | None = Field(3, ge=1, description="checkpoints kept")
    logging_steps: int = Field(10, ge=1, description="optimizer steps between log lines")
    plot_loss: bool = Field(True, description="write training_loss.png")
    report_to: Literal["none", "tensorboard"] = Field("tensorboard", description="extra log writers")
    seed: int = Field(42, ge=0, description="order, initial weights and dropout follow from it")
    ddp_timeout: int = Field(600, ge=1, description="seconds until a collective that hangs is an error")


SECTIONS: dict[str, type[Section]] = {
    "model": ModelOptions,
    "data": DataOptions,
    "optim": OptimOptions,
    "run": RunOptions,
}
OWNER = {key: section for section, cls in SECTIONS.items() for key in cls.model_fields}

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
}


class Config(BaseModel):
    """A resolved run. Frozen: nothing is changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: ModelOptions
    data: DataOptions
    optim: OptimOptions
    run: RunOptions
    zero: dict[str, Any] = Field(description="the content of the run.deepspeed file")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        try:
            check_prompt(self.data.prompt)
        except ValueError as error:
            raise ValueError(f"prompt: {error}") from None
        if self.data.video_min_pixels > self.data.video_max_pixels:
            raise ValueError(
                f"video_min_pixels: {self.data.video_min_pixels} is more than video_max_pixels "
                f"({self.data.video_max_pixels})"
            )
        if self.model.action_decoder_hidden_size and self.model.action_decoder_type != "mlp":
            raise ValueError(
                f"action_decoder_hidden_size: {self.model.action_decoder_hidden_size} has no effect with "
                f"action_decoder_type {self.model.action_decoder_type!r}; use mlp or leave it out"
            )
        batch_plan(self.optim, world_size=None)
        return self

    @property
    def zero_stage(self) -> int:
        return int(self.zero["zero_optimization"]["stage"])

    def flat(self) -> dict[str, Any]:
        """Every key and value, as a recipe would hold them."""
        return {key: value for name in SECTIONS for key, value in getattr(self, name).model_dump().items()}

    def dump(self) -> str:
        """The resolved recipe as YAML, which repeats the run: it neither resumes nor overwrites anything."""
        fresh = {"resume_from_checkpoint": None, "overwrite_output_dir": False}
        return yaml.safe_dump({**self.flat(), **fresh}, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class BatchPlan:
    """DeepSpeed's triple for one world size: global = micro * accumulation * world_size."""

    micro: int
    accumulation: int
    global_: int


def batch_plan(optim: OptimOptions, world_size: int | None) -> BatchPlan | None:
    """The batch triple for world_size ranks; with None only what holds for every world size is checked.

    Raises:
        ConfigError: the three keys contradict each other or do not divide; names what would.
    """
    micro, accumulation, global_ = (
        optim.per_device_train_batch_size,
        optim.gradient_accumulation_steps,
        optim.train_batch_size,
    )
    if micro is None and (global_ is None or accumulation is None):
        raise ConfigError(
            "per_device_train_batch_size: not given; of per_device_train_batch_size, "
            "gradient_accumulation_steps and train_batch_size give the first, or the last two"
        )
    if world_size is None:
        return None
    if global_ is None:
        assert micro is not None
        accumulation = accumulation or 1
        return BatchPlan(micro, accumulation, micro * accumulation * world_size)
    known = (micro or 1) * (accumulation or 1) * world_size
    if global_ % known or (micro and accumulation and global_ != known):
        fits = [w for w in range(1, global_ + 1) if global_ % (w * (micro or 1) * (accumulation or 1)) == 0]
        raise ConfigError(
            f"train_batch_size: {global_} is not per_device_train_batch_size ({micro}) x "
            f"gradient_accumulation_steps ({accumulation}) x ranks ({world_size}); with a missing one "
            f"filled in, these rank counts fit: {fits[:12]}"
        )
    if micro is None:
        return BatchPlan(global_ // known, accumulation or 1, global_)
    return BatchPlan(micro, accumulation or global_ // known, global_)


def total_steps(optim: OptimOptions, samples: int, global_batch: int) -> int:
    """Optimizer steps of the whole run over `samples` clips."""
    return optim.max_steps or max(1, math.ceil(optim.num_train_epochs * samples / global_batch))


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
    sections: dict[str, Section] = {}
    for name, cls in SECTIONS.items():
        try:
            sections[name] = cls(**{k: v for k, v in values.items() if OWNER.get(k) == name})
        except ValidationError as error:
            errors += [_field_error(cls, item) for item in error.errors()]
    if errors:
        raise ConfigError("\n".join(errors))
    run = sections["run"]
    assert isinstance(run, RunOptions)
    zero = _read_deepspeed_file(run.deepspeed)
    try:
        return Config(zero=zero, **sections)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError("\n".join(str(e["ctx"]["error"]) for e in error.errors())) from None


def check_output_dir(run: RunOptions) -> None:
    """Raise ConfigError when output_dir holds files and the run neither resumes there nor may overwrite it."""
    folder = Path(run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {run.output_dir!r} is a file, not a folder")
    resumed = run.resume_from_checkpoint
    goes_on = resumed is not None and (resumed == "latest" or Path(resumed).resolve().parent == folder.resolve())
    if folder.is_dir() and any(folder.iterdir()) and not (run.overwrite_output_dir or goes_on):
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
            default = "required" if field.is_required() else f"default {json.dumps(field.default)}"
            legal = _legal(field.annotation, field.metadata)
            lines.append(f"  {key}  ({default}{'; ' + legal if legal else ''})\n      {field.description}")
    return "\n".join(lines)


def _unknown_key(key: Any) -> str:
    close = difflib.get_close_matches(str(key), OWNER, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; --help lists all keys"
    return f"{key}: unknown option{hint}"


def _field_error(cls: type[Section], item: Any) -> str:
    key = str(item["loc"][0])
    if item["type"] == "missing":
        return f"{key}: required, not given ({cls.model_fields[key].description})"
    field = cls.model_fields[key]
    legal = _legal(field.annotation, field.metadata)
    return f"{key}: {item['input']!r} is not legal: {item['msg']}{' (legal: ' + legal + ')' if legal else ''}"


def _legal(annotation: Any, metadata: list[Any]) -> str:
    choices = getattr(annotation, "__args__", ())
    if choices and all(isinstance(c, str) for c in choices):
        return " | ".join(choices)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return ", ".join(f"{sign} {getattr(m, name)}" for m in metadata for name, sign in signs.items() if hasattr(m, name))


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
    both = [f"deepspeed: {name!r} sets {k!r}; that number is owned by {OWNED_BY_RECIPE[k]!r} of the recipe: "
            f"remove it from the file" for k in content if k in OWNED_BY_RECIPE]  # fmt: skip
    if both:
        raise ConfigError("\n".join(both))
    zero = content.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (2, 3):
        raise ConfigError(f"deepspeed: {name!r} has zero_optimization.stage {stage!r}; legal: 2 | 3")
    return content
