"""Whether a run may go on from a checkpoint: what must be equal, what may differ, and what the recipe lets differ."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from vidcls.config import Config, ConfigError
from vidcls.manifest import CheckpointError
from vidcls.model.pretrained import ModelSpec
from vidcls.options import OWNER
from vidcls.training.folders import read_config
from vidcls.training.sharded_state import RunState, differences

# Every key of a recipe is in one of the two. These decide the numbers that a run computes.
_DECISIVE = """
template action_token prompt cutoff_len finetuning_type vision_tuning merger_tuning bf16
lora_rank lora_alpha lora_dropout lora_target use_dora use_rslora
action_decoder_type action_decoder_hidden_size action_decoder_num_heads
mixing_temperature max_samples val_size shuffle_shards seed
video_maxlen frame_sampling dense_stride temporal_jitter video_max_pixels video_min_pixels image_max_pixels
horizontal_flip mirror_pairs random_resized_crop color_jitter random_erasing rand_augment mixup_alpha cutmix_alpha
learning_rate vision_lr_scale merger_lr_scale head_lr_scale action_token_lr_scale loraplus_lr_ratio layerwise_lr_decay
weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm ema_decay
lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps num_train_epochs max_steps
stage loss_type focal_gamma label_smoothing class_balance_beta lm_loss_weight
"""
# Places (what lies there is compared by its digest; stored features are those of the same tower, or refused), the start
# of a run that has started, kernels, how a global batch (which is compared) is split, clips that cannot be read,
# evaluation, saving, logging, and limits.
_FREE = """
model_name_or_path trust_remote_code dataset datasets dataset_dir eval_dataset cache_dir cache_gb output_dir
vision_cache
adapter_name_or_path action_decoder_path action_decoder_init num_action_classes
flash_attn enable_liger_kernel gradient_checkpointing torch_compile prepack_weights share_prefix deepspeed
per_device_train_batch_size gradient_accumulation_steps train_batch_size max_tokens_per_batch memory_limit
on_bad_sample max_bad_samples preprocessing_num_workers dataloader_num_workers
eval_strategy eval_steps per_device_eval_batch_size load_best_model_at_end metric_for_best_model
early_stopping_patience views do_train overwrite_output_dir resume_from_checkpoint resume_with_changes
save_steps save_total_limit save_only_model save_deepspeed_state async_save save_every_minutes
logging_steps plot_loss html_report report_to log_order self_check
ddp_timeout start_timeout data_timeout step_timeout save_timeout stop_timeout max_nonfinite_steps
"""
DECISIVE, FREE = frozenset(_DECISIVE.split()), frozenset(_FREE.split())
# What else a key shows in: names of the stream of clips. Said once, and let differ with the key.
SHOWS_IN = {
    "max_samples": {"chosen", "clips", "quota"},
    "val_size": {"chosen", "clips", "quota"},
    "seed": {"chosen"},
    "mixing_temperature": {"quota"},
    "prompt": {"prompts"},
}
# Of a ModelSpec, what is no key of a recipe under its own name.
SPEC_NAMES = ("base_weights", "prompts")


def check_changes(names: list[str]) -> None:
    """Raise ConfigError for a name in resume_with_changes that is no key, or one that may always differ."""
    for name in names:
        if name not in OWNER:
            raise ConfigError(f"resume_with_changes: {name!r} is no key of a recipe")
        if name in FREE:
            raise ConfigError(f"resume_with_changes: {name!r} may always differ; leave it out")


def check_continues(
    folder: Path, stored: RunState, stored_spec: ModelSpec, config: Config, now: RunState, spec: ModelSpec
) -> list[str]:
    """Differences that `config` allows, in words.

    Raises:
        CheckpointError: the run would compute other numbers than the one that wrote `folder`; every difference at once.
    """
    allowed = set(config.run.resume_with_changes)
    differing = differences(read_config(folder), config.flat(), DECISIVE)
    explained = differing.keys() | {name for key in differing for name in SHOWS_IN.get(key, ())}
    inner = {
        **differences(stored.stream, now.stream),
        **differences(asdict(stored_spec), asdict(spec), SPEC_NAMES),
    }
    differing |= {name: values for name, values in inner.items() if name.rpartition("/")[2] not in explained}
    refused = {name: values for name, values in differing.items() if name not in allowed}
    if refused:
        hint = ""
        if "global_batch" in refused:
            stored_batch = refused["global_batch"][0]
            hint = f" (train_batch_size={stored_batch} gradient_accumulation_steps= keeps it on any rank count)"
        if keys := [name for name in refused if name in DECISIVE]:
            hint += f"; to let it differ all the same: resume_with_changes={','.join(keys)}"
        words = ", ".join(
            f"{name} is {then!r} in the checkpoint and {today!r} in this run" for name, (then, today) in refused.items()
        )
        raise CheckpointError(f"resume_from_checkpoint: {words}; they must be equal for the run to go on{hint}")
    return [f"{name} is {today!r} and was {then!r}" for name, (then, today) in differing.items()]
