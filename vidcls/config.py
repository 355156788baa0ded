"""A recipe and what follows from it, checked before anything heavy is imported. The keys are in options.py.

Nothing here may import torch, transformers or deepspeed: a typing mistake must be answered in well under a second,
on every rank, before the twenty seconds that those imports cost.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vidcls.options import (
    ACTION_TOKEN,
    AUTO,
    DEFAULT_MEMORY_LIMIT,
    OWNER,
    SECTIONS,
    VIDEO_TAG,
    AugmentOptions,
    ConfigError,
    DataOptions,
    EvalOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    Section,
    field_error,
    legal_values,
)
from vidcls.registry import EvalSet, TrainSet, resolve_data_sets

LEFT_BY_FAILED_STARTS = {"failures", "run.lock", "STOP", "supervise", "supervise.jsonl"}
METRICS = ("top1", "top5", "mean_class_accuracy", "loss")


class PromptError(ValueError):
    """A prompt that cannot be encoded."""


def check_prompt(prompt: str, action_token: str = ACTION_TOKEN) -> None:
    """Raise PromptError unless there is exactly one <video> and, behind it, exactly one <ACTION>."""
    videos, actions = prompt.count(VIDEO_TAG), prompt.count(action_token)
    if videos != 1 or actions != 1:
        raise PromptError(
            f"prompt {prompt!r} has {videos} {VIDEO_TAG} and {actions} {action_token}; it must have exactly one of each"
        )
    if prompt.index(action_token) < prompt.index(VIDEO_TAG):
        raise PromptError(
            f"prompt {prompt!r} has {action_token} before {VIDEO_TAG}; it must come after, "
            "because a token sees only what is before it"
        )


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


class Config(BaseModel):
    """A resolved run. Frozen: nothing is changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: ModelOptions
    data: DataOptions
    augment: AugmentOptions
    optim: OptimOptions
    eval: EvalOptions
    run: RunOptions
    zero: dict[str, Any] = Field(description="the content of the run.deepspeed file")
    train_sets: tuple[TrainSet, ...] = Field(description="the data sets, with the registry's names resolved")
    eval_sets: tuple[EvalSet, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for check in (_check_data, _check_model, _check_vision_cache, _check_evaluation):
            if problem := check(self):
                raise ValueError(problem)
        batch_plan(self.optim, world_size=None)
        return self

    @property
    def zero_stage(self) -> int:
        return int(self.zero["zero_optimization"]["stage"])

    def flat(self) -> dict[str, Any]:
        """Every key and value, as a recipe would hold them."""
        return {key: value for name in SECTIONS for key, value in getattr(self, name).model_dump(mode="json").items()}

    @property
    def has_lora(self) -> bool:
        return "lora" in (self.model.finetuning_type, self.model.vision_tuning, self.model.merger_tuning)

    def dump(self) -> str:
        """The resolved recipe as YAML, which repeats the run: it neither resumes nor overwrites anything."""
        fresh: dict[str, Any] = {
            "resume_from_checkpoint": None,
            "resume_with_changes": [],
            "overwrite_output_dir": False,
        }
        return yaml.safe_dump({**self.flat(), **fresh}, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class BatchPlan:
    """DeepSpeed's triple for one world size: global = micro * accumulation * world_size.

    With max_tokens_per_batch `micro` is a rank's clips of a step, and `accumulation` 1: how these are divided differs
    from step to step.
    """

    micro: int
    accumulation: int
    global_: int


def batch_plan(optim: OptimOptions, world_size: int | None) -> BatchPlan | None:
    """The batch triple for world_size ranks; with None only what holds for every world size is checked.

    Where the micro-batch is "auto" it is 1: the least that there can be, until memory has been measured.

    Raises:
        ConfigError: the three keys contradict each other or do not divide; names what would.
    """
    micro, accumulation, global_ = (
        optim.per_device_train_batch_size,
        optim.gradient_accumulation_steps,
        optim.train_batch_size,
    )
    if optim.max_tokens_per_batch is not None:
        if global_ is None or micro is not None or accumulation is not None:
            raise ConfigError(
                f"max_tokens_per_batch: {optim.max_tokens_per_batch} divides the clips of train_batch_size "
                f"({global_}), which must be given, and takes the place of per_device_train_batch_size ({micro}) and "
                f"gradient_accumulation_steps ({accumulation}), which must be left out"
            )
        accumulation = 1
    if micro == AUTO:
        if global_ is None or accumulation is not None:
            raise ConfigError(
                "per_device_train_batch_size: 'auto' needs train_batch_size and no gradient_accumulation_steps, which "
                f"follows; they are {global_} and {accumulation}"
            )
        micro = 1
    elif optim.memory_limit != DEFAULT_MEMORY_LIMIT:
        raise ConfigError(f"memory_limit: {optim.memory_limit} has no effect without per_device_train_batch_size auto")
    assert not isinstance(micro, str)
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


def _check_data(config: Config) -> str | None:
    data, model = config.data, config.model
    for each in config.train_sets:
        try:
            check_prompt(with_action_token(each.prompt, model.action_token), model.action_token)
        except ValueError as error:
            return f"prompt: {error}"
    if data.video_min_pixels > min(data.video_max_pixels, data.image_max_pixels or data.video_max_pixels):
        return (
            f"video_min_pixels: {data.video_min_pixels} is more than video_max_pixels ({data.video_max_pixels}) or "
            f"image_max_pixels ({data.image_max_pixels})"
        )
    if data.val_size >= 1 and data.val_size != int(data.val_size):
        return f"val_size: {data.val_size} must be a share below 1 or a whole number of clips"
    if data.mixing_temperature != 1 and (len(config.train_sets) == 1 or config.train_sets[0].weight is not None):
        return f"mixing_temperature: {data.mixing_temperature} has no effect with one data set, or with weights"
    for each in config.train_sets:
        if each.augment.mirror_pairs != "auto" and not each.augment.horizontal_flip:
            return f"mirror_pairs: {each.augment.mirror_pairs!r} has no effect with horizontal_flip 0"
    places = [(each.head, os.path.normpath(each.place)) for each in config.train_sets]
    if doubled := sorted({place for place in places if places.count(place) > 1}):
        return f"dataset: {doubled[0][1]!r} stands there twice"
    if data.val_size and config.eval.eval_strategy == "no":
        return f"val_size: {data.val_size:g} has no effect with eval_strategy 'no'; use steps or epoch"
    if data.dense_stride != 2 and data.frame_sampling != "dense":
        return f"dense_stride: {data.dense_stride} has no effect with frame_sampling {data.frame_sampling!r}; use dense"
    return None


def _check_model(config: Config) -> str | None:
    model, optim, kind = config.model, config.optim, config.model.action_decoder_type
    no_lora = "has no effect without LoRA: finetuning_type, vision_tuning and merger_tuning have none"
    for key, used, needed in (
        ("use_dora", model.use_dora, no_lora),
        ("use_rslora", model.use_rslora, no_lora),
        ("loraplus_lr_ratio", optim.loraplus_lr_ratio is not None, no_lora),
        ("adapter_name_or_path", model.adapter_name_or_path is not None, no_lora),
    ):
        if used and not config.has_lora:
            return f"{key}: {getattr(optim if key in OptimOptions.model_fields else model, key)!r} {needed}"
    if model.lora_target != "all" and model.finetuning_type != "lora":
        return f"lora_target: {model.lora_target!r} has no effect with finetuning_type {model.finetuning_type!r}"
    if model.action_decoder_hidden_size and kind == "linear":
        return (
            f"action_decoder_hidden_size: {model.action_decoder_hidden_size} has no effect with action_decoder_type "
            "'linear'; use mlp or attention, or leave it out"
        )
    if model.action_decoder_num_heads and kind != "attention":
        return (
            f"action_decoder_num_heads: {model.action_decoder_num_heads} has no effect with action_decoder_type "
            f"{kind!r}; use attention or leave it out"
        )
    offload = config.zero["zero_optimization"].get("offload_optimizer")
    if optim.ema_decay is not None and isinstance(offload, dict) and offload.get("device") == "nvme":
        return f"ema_decay: {optim.ema_decay} needs the optimizer's state in memory; deepspeed offloads it to nvme"
    if model.flash_attn == "fa2" and not optim.bf16:
        return "flash_attn: 'fa2' needs bf16: true; flash-attention has no float32"
    if model.num_action_classes is not None and config.data.datasets is not None:
        return f"num_action_classes: {model.num_action_classes} is for dataset; each of datasets has its own number"
    if model.action_decoder_init == "class_names" and kind != "linear":
        return f"action_decoder_init: 'class_names' needs action_decoder_type 'linear', not {kind!r}"
    if model.action_decoder_init != "normal" and model.action_decoder_path is not None:
        return f"action_decoder_init: {model.action_decoder_init!r} has no effect with action_decoder_path; drop one"
    for part, tuning in (("vision", model.vision_tuning), ("merger", model.merger_tuning)):
        key = f"{part}_lr_scale"
        if getattr(optim, key) != 1 and tuning == "frozen":
            return f"{key}: {getattr(optim, key)} has no effect with {part}_tuning 'frozen'; use lora or full"
    if not model.trust_remote_code and has_own_tokenizer(Path(model.model_name_or_path)):
        return (
            f"trust_remote_code: false, but the tokenizer of {model.model_name_or_path} is Python code in that folder; "
            "true lets it run"
        )
    if optim.max_tokens_per_batch is not None and optim.lm_loss_weight > 0:
        return (
            f"max_tokens_per_batch: {optim.max_tokens_per_batch} does not go with lm_loss_weight "
            f"{optim.lm_loss_weight}: how long an answer is, is not known before its clip is read; use "
            "per_device_train_batch_size"
        )
    if optim.focal_gamma != OptimOptions.model_fields["focal_gamma"].default and optim.loss_type != "focal":
        return f"focal_gamma: {optim.focal_gamma} has no effect with loss_type {optim.loss_type!r}; use focal"
    return None


def _check_vision_cache(config: Config) -> str | None:
    """Stored features are those of a tower that never changes, and of pixels that never do."""
    folder = config.data.vision_cache
    if folder is None:
        return None
    for key in ("vision_tuning", "merger_tuning"):
        if (value := getattr(config.model, key)) != "frozen":
            return f"vision_cache: {folder!r} needs {key} 'frozen', not {value!r}: what is stored would be out of date"
    for each in config.train_sets:
        for key, field in AugmentOptions.model_fields.items():
            value = getattr(each.augment, key)
            if key != "mirror_pairs" and value != field.default:
                where = f" of {each.name!r}" if config.data.datasets is not None else ""
                return (
                    f"vision_cache: {folder!r} does not go with {key} {value}{where}: features are stored of clips as "
                    f"they are; leave one out"
                )
    return None


def has_own_tokenizer(folder: Path) -> bool:
    """Whether a model's folder brings code for its tokenizer; without it transformers takes another class silently."""
    try:
        stored = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return "AutoTokenizer" in stored.get("auto_map", {})
    except (OSError, ValueError, AttributeError):
        return False  # no such file, or one that is refused when it is loaded


def _check_evaluation(config: Config) -> str | None:
    options = config.eval
    wanted = options.eval_strategy != "no"
    if wanted and not config.eval_sets and not config.data.val_size:
        return f"eval_strategy: {options.eval_strategy!r} needs clips to evaluate on: give val_size or eval_dataset"
    if config.eval_sets and not wanted:
        return f"eval_dataset: {config.eval_sets[0].place!r} has no effect with eval_strategy 'no'; use steps or epoch"
    if options.eval_steps is not None and options.eval_strategy != "steps":
        return f"eval_steps: {options.eval_steps} has no effect with eval_strategy {options.eval_strategy!r}; use steps"
    if options.load_best_model_at_end and not wanted:
        return "load_best_model_at_end: true needs eval_strategy steps or epoch: nothing is evaluated to choose by"
    for key, value in (("early_stopping_patience", options.early_stopping_patience), ("views", options.views)):
        if value and not wanted:
            return f"{key}: {value} needs eval_strategy steps or epoch: nothing is evaluated"
    if options.views.keys() - {"segments", "crops"}:
        return f"views: {options.views} is not legal: keys are segments and crops"
    if metric_name(options) not in METRICS:
        return f"metric_for_best_model: {options.metric_for_best_model!r} is not legal: {' | '.join(METRICS)}"
    return None


def metric_name(options: EvalOptions) -> str:
    """metric_for_best_model without transformers' prefix eval_; accuracy is top1."""
    name = options.metric_for_best_model.removeprefix("eval_")
    return "top1" if name == "accuracy" else name


def with_action_token(prompt: str, action_token: str) -> str:
    """A prompt as the tokenizer sees it: <ACTION> in recipes and shards stands for whatever the token is called."""
    return prompt if action_token in prompt else prompt.replace(ACTION_TOKEN, action_token)


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
