"""What the keys of a recipe may not say together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vidcls.options import AugmentOptions, DataOptions, EvalOptions, ModelOptions, OptimOptions, RunOptions
from vidcls.prompts import check_prompt, has_own_tokenizer, with_action_token
from vidcls.registry import EvalSet, TrainSet

METRICS = ("top1", "top5", "mean_class_accuracy", "loss")


class Sections(BaseModel):
    """The keys by section, each legal by itself, and what they name. Frozen: nothing is changed after loading."""

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

    @property
    def has_lora(self) -> bool:
        return "lora" in (self.model.finetuning_type, self.model.vision_tuning, self.model.merger_tuning)


def problem_in(recipe: Sections) -> str | None:
    """The first contradiction between keys, by their names; None when there is none."""
    for check in (_check_data, _check_model, _check_vision_cache, _check_evaluation):
        if problem := check(recipe):
            return problem
    return None


def _check_data(recipe: Sections) -> str | None:
    data, model = recipe.data, recipe.model
    for each in recipe.train_sets:
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
    if data.mixing_temperature != 1 and (len(recipe.train_sets) == 1 or recipe.train_sets[0].weight is not None):
        return f"mixing_temperature: {data.mixing_temperature} has no effect with one data set, or with weights"
    for each in recipe.train_sets:
        if each.augment.mirror_pairs != "auto" and not each.augment.horizontal_flip:
            return f"mirror_pairs: {each.augment.mirror_pairs!r} has no effect with horizontal_flip 0"
    places = [(each.head, os.path.normpath(each.place)) for each in recipe.train_sets]
    if doubled := sorted({place for place in places if places.count(place) > 1}):
        return f"dataset: {doubled[0][1]!r} stands there twice"
    if data.val_size and recipe.eval.eval_strategy == "no":
        return f"val_size: {data.val_size:g} has no effect with eval_strategy 'no'; use steps or epoch"
    if data.dense_stride != 2 and data.frame_sampling != "dense":
        return f"dense_stride: {data.dense_stride} has no effect with frame_sampling {data.frame_sampling!r}; use dense"
    return None


def _check_model(recipe: Sections) -> str | None:
    model, optim, kind = recipe.model, recipe.optim, recipe.model.action_decoder_type
    no_lora = "has no effect without LoRA: finetuning_type, vision_tuning and merger_tuning have none"
    for key, used, needed in (
        ("use_dora", model.use_dora, no_lora),
        ("use_rslora", model.use_rslora, no_lora),
        ("loraplus_lr_ratio", optim.loraplus_lr_ratio is not None, no_lora),
        ("adapter_name_or_path", model.adapter_name_or_path is not None, no_lora),
    ):
        if used and not recipe.has_lora:
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
    offload = recipe.zero["zero_optimization"].get("offload_optimizer")
    if optim.ema_decay is not None and isinstance(offload, dict) and offload.get("device") == "nvme":
        return f"ema_decay: {optim.ema_decay} needs the optimizer's state in memory; deepspeed offloads it to nvme"
    if model.flash_attn == "fa2" and not optim.bf16:
        return "flash_attn: 'fa2' needs bf16: true; flash-attention has no float32"
    if model.num_action_classes is not None and recipe.data.datasets is not None:
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


def _check_vision_cache(recipe: Sections) -> str | None:
    """Stored features are those of a tower that never changes, and of pixels that never do."""
    folder = recipe.data.vision_cache
    if folder is None:
        return None
    for key in ("vision_tuning", "merger_tuning"):
        if (value := getattr(recipe.model, key)) != "frozen":
            return f"vision_cache: {folder!r} needs {key} 'frozen', not {value!r}: what is stored would be out of date"
    for each in recipe.train_sets:
        for key, field in AugmentOptions.model_fields.items():
            value = getattr(each.augment, key)
            if key != "mirror_pairs" and value != field.default:
                where = f" of {each.name!r}" if recipe.data.datasets is not None else ""
                return (
                    f"vision_cache: {folder!r} does not go with {key} {value}{where}: features are stored of clips as "
                    f"they are; leave one out"
                )
    return None


def _check_evaluation(recipe: Sections) -> str | None:
    options = recipe.eval
    wanted = options.eval_strategy != "no"
    if wanted and not recipe.eval_sets and not recipe.data.val_size:
        return f"eval_strategy: {options.eval_strategy!r} needs clips to evaluate on: give val_size or eval_dataset"
    if recipe.eval_sets and not wanted:
        return f"eval_dataset: {recipe.eval_sets[0].place!r} has no effect with eval_strategy 'no'; use steps or epoch"
    if options.eval_steps is not None and options.eval_strategy != "steps":
        return f"eval_steps: {options.eval_steps} has no effect with eval_strategy {options.eval_strategy!r}; use steps"
    if options.load_best_model_at_end and not wanted:
        return "load_best_model_at_end: true needs eval_strategy steps or epoch: nothing is evaluated to choose by"
    for key, value in (("early_stopping_patience", options.early_stopping_patience), ("views", options.views)):
        if value and not wanted:
            return f"{key}: {value} needs eval_strategy steps or epoch: nothing is evaluated"
    if options.views.keys() - {"segments", "crops"}:
        return f"views: {options.views} is not legal: keys are segments and crops"
    if options.metric not in METRICS:
        return f"metric_for_best_model: {options.metric_for_best_model!r} is not legal: {' | '.join(METRICS)}"
    return None
