"""Every key of a recipe: one line each, with its only default, its limits and its meaning.

Nothing here may import torch, transformers or deepspeed (see config.py). Keys are named as LLaMA-Factory and
transformers' TrainingArguments name them, where these have one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

ACTION_TOKEN = "<ACTION>"
VIDEO_TAG = "<video>"
DEFAULT_CACHE_GB = 50
DEFAULT_MEMORY_LIMIT = 0.9
AUTO = "auto"
ATTENTION_SIZE = 512  # of an attention head, where the hidden size is not smaller
# Of a micro-batch's tokens those that share_prefix spares, at least: to put the prefix back in front of every clip,
# attention copies its inputs and its output, which on a GPU takes about as long as 4 % of a layer's products (by data
# sheets), and about as many bytes.
LEAST_SPARED = 0.05
PREPACKING_SHARE = 0.75  # of the memory that is free, for what prepack_weights adds
EXCHANGING_RANKS = 2  # of a host among several: with more, training/reduction.py does not exchange parts of gradients
LOCAL_SUM = 10**8  # trained numbers whose gradients a rank keeps whole, 0.4 GB, twice while they are exchanged
DEFAULT_PROMPT = f"{VIDEO_TAG}\nWhat action is shown in the video? {ACTION_TOKEN}"
DEFAULT_NAME = "default"

# YAML reads a bare `no` as false; transformers writes "not set" as -1 and "the latest" as true.
NoMeansNo = BeforeValidator(lambda value: "no" if value is False else value)
MinusOneMeansNone = BeforeValidator(lambda value: None if value == -1 else value)
TrueMeansLatest = BeforeValidator(
    lambda value: {True: "latest", False: None}[value] if isinstance(value, bool) else value
)
CommaList = BeforeValidator(
    lambda value: [part.strip() for part in value.split(",")] if isinstance(value, str) and value != "all" else value
)


def spared_tokens(clips: int, prefix: int, tokens: int) -> int:
    """Tokens, of those of all `clips`, that share_prefix does not compute; 0 where it does not pay."""
    spared = (clips - 1) * prefix
    return spared if spared >= LEAST_SPARED * tokens else 0


def offloads(zero: dict[str, Any], key: str) -> bool:
    """Whether a DeepSpeed file's zero_optimization has something offloaded: offload_optimizer or offload_param."""
    value = zero.get(key)
    return isinstance(value, dict) and value.get("device", "none") != "none"


def sums_locally(trained: int, stage: int, zero: dict[str, Any]) -> bool:
    """Whether training/reduction.py sums the gradients of so many trained numbers over a step's micro-batches on each
    rank, and reduces them once; `zero` as of `offloads`."""
    return stage == 2 and not offloads(zero, "offload_optimizer") and trained <= LOCAL_SUM


class ConfigError(ValueError):
    """A user's mistake in the configuration; the message names field, value and what is legal."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelOptions(Section):
    model_name_or_path: str = Field(description="local Qwen2.5-VL folder, or 'tiny' (built in, random)")
    adapter_name_or_path: str | None = Field(None, description="folder with a LoRA adapter to start from")
    trust_remote_code: bool = Field(
        False, description="run Python code of the model's folder, if its tokenizer has some"
    )
    template: Literal["qwen2_vl", "empty"] = Field(
        "qwen2_vl", description="chat layout around the prompt; empty: the prompt alone"
    )
    action_token: str = Field(
        ACTION_TOKEN, min_length=1, description="the special token whose hidden state is classified"
    )
    finetuning_type: Literal["lora", "full", "freeze"] = Field(
        "lora", description="how the language model is tuned; freeze: not at all, only head and token"
    )
    vision_tuning: Literal["frozen", "lora", "full"] = Field("frozen", description="how the vision tower is tuned")
    merger_tuning: Literal["frozen", "lora", "full"] = Field("frozen", description="how the vision merger is tuned")
    lora_rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    lora_alpha: float | None = Field(
        None, gt=0, description="LoRA scale is lora_alpha / lora_rank (default: 2 x lora_rank)"
    )
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the input of the LoRA branch")
    lora_target: Annotated[Literal["all"] | list[str], CommaList] = Field(
        "all", description="linear layers with LoRA in the language model: all, or names such as q_proj,v_proj"
    )
    use_dora: bool = Field(False, description="weight-decomposed LoRA (arXiv 2402.09353)")
    use_rslora: bool = Field(False, description="LoRA scale lora_alpha / sqrt(lora_rank) (arXiv 2312.03732)")
    action_decoder_type: Literal["linear", "mlp", "attention"] = Field("linear", description="classification head")
    action_decoder_hidden_size: int | None = Field(
        None, ge=1, description="width of the mlp (default: the backbone's) or attention head (default: 512 at most)"
    )
    action_decoder_num_heads: int | None = Field(
        None, ge=1, description="attention heads of the attention head (default: 8)"
    )
    action_decoder_init: Literal["normal", "zeros", "class_names"] = Field(
        "normal", description="start of the last layer; class_names: rows are the mean token embeddings (linear head)"
    )
    action_decoder_path: str | None = Field(None, description="folder with a saved action decoder to start from")
    num_action_classes: int | None = Field(
        None, ge=2, description="expected class count; checked against the shards, which own the number"
    )
    flash_attn: Literal["auto", "sdpa", "fa2", "eager", "disabled"] = Field(
        "auto", description="attention kernels: fa2 needs a GPU and flash-attn, otherwise sdpa is used; auto is sdpa"
    )
    enable_liger_kernel: bool = Field(False, description="fused Liger kernels; need a GPU and liger-kernel")
    gradient_checkpointing: bool = Field(False, description="recompute layers in backward")
    torch_compile: bool = Field(False, description="compile the language model's layers with torch.compile")
    share_prefix: bool = Field(
        True, description="in training, compute what all prompts of a micro-batch begin with once (not compiled)"
    )
    prepack_weights: bool = Field(
        True, description="on a CPU, frozen bf16 weights once more as its products want them, while memory is free"
    )

    @property
    def shares_prefix(self) -> bool:
        """Not compiled: layers would be compiled anew for each number of clips."""
        return self.share_prefix and not self.torch_compile


class DatasetOptions(Section):
    """An entry of `datasets`: one data set with a head of its own."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="names its head and its metrics")
    dataset: str = Field(description="shards: a folder, a URL or a name in the registry")
    eval_dataset: str | None = Field(None, description="shards to evaluate on")
    weight: float | None = Field(None, gt=0, description="share of the stream (with mixing_temperature: none of them)")
    prompt: str | None = Field(None, description="for its clips without a stored prompt (default: the recipe's prompt)")
    augment: dict[str, Any] = Field(default_factory=dict, description="augmentation keys that differ from the recipe's")


class DataOptions(Section):
    dataset: str | None = Field(
        None,
        description="shards (tools/make_shards.py): a folder, an http(s):// or s3:// URL, or a name in the registry; "
        "several, with commas, must have the same classes and share one head",
    )
    datasets: list[DatasetOptions] | None = Field(
        None, min_length=1, description="instead of dataset: several data sets, each with its own classes and head"
    )
    dataset_dir: str = Field("data", description="folder of the registry datasets.yaml, with lines `name: shards`")
    eval_dataset: str | None = Field(None, description="shards to evaluate on while training")
    mixing_temperature: float = Field(
        1.0, gt=0, description="data sets without weights are drawn as their clip count to the power 1 / this"
    )
    max_samples: int | None = Field(
        None, ge=1, description="train on at most this many clips of each data set, drawn by seed"
    )
    val_size: float = Field(
        0.0, ge=0, description="clips of each data set set aside for evaluation: a share below 1, or a number"
    )
    prompt: str = Field(DEFAULT_PROMPT, description="used for clips whose shard stores no prompt")
    video_maxlen: int = Field(128, ge=1, description="frames per clip at most; of more stored ones some are chosen")
    frame_sampling: Literal["segments", "dense"] = Field(
        "segments", description="choose frames over the whole clip, or from a run of neighbouring ones"
    )
    dense_stride: int = Field(2, ge=1, description="distance of the frames of a dense run, in stored frames")
    temporal_jitter: bool = Field(
        True, description="choose frames at random in training (of each segment, or the run's start); false: the middle"
    )
    video_max_pixels: int = Field(128 * 128, ge=28 * 28, description="height x width of a frame at most")
    video_min_pixels: int = Field(28 * 28, ge=1, description="height x width of a frame at least")
    image_max_pixels: int | None = Field(
        None, ge=28 * 28, description="the same for clips of a single frame (default: video_max_pixels)"
    )
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
    vision_cache: str | None = Field(
        None, description="read stored features of a frozen vision tower from this folder (tools/cache_features.py)"
    )
    preprocessing_num_workers: int = Field(1, ge=1, description="threads that check all prompts before training")
    dataloader_num_workers: int = Field(1, ge=0, description="loader processes per rank")


class AugmentOptions(Section):
    """Also the keys that an entry of `datasets` may hold below `augment`."""

    horizontal_flip: float = Field(0.0, ge=0, le=1, description="probability of mirroring a clip")
    mirror_pairs: Literal["auto"] | list[tuple[str, str]] = Field(
        "auto", description="classes that swap when mirrored; auto: names that differ in left and right; []: none do"
    )
    random_resized_crop: float = Field(
        1.0, gt=0, le=1, description="least share of the frame that a crop keeps; 1: off"
    )
    color_jitter: float = Field(
        0.0, ge=0, le=1, description="strength of brightness, contrast, saturation, hue; 0: off"
    )
    random_erasing: float = Field(0.0, ge=0, le=1, description="probability of blanking a box")
    rand_augment: tuple[Annotated[int, Field(ge=1, le=16)], Annotated[float, Field(ge=0, le=10)]] | None = Field(
        None, description="[operations per clip, magnitude 0 to 10]"
    )
    mixup_alpha: float = Field(0.0, ge=0, description="mixup with shares from Beta(alpha, alpha); 0: off")
    cutmix_alpha: float = Field(0.0, ge=0, description="cutmix likewise; with both, each clip gets one of them")


class OptimOptions(Section):
    per_device_train_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None, description="clips per forward and rank; auto: as many as memory_limit allows, given train_batch_size"
    )
    memory_limit: Annotated[float, Field(gt=0, le=1)] | Annotated[str, Field(pattern=r"^[0-9.]*[1-9][0-9]*GB$")] = (
        Field(
            DEFAULT_MEMORY_LIMIT,
            description="of auto: share of the accelerator's memory, on a CPU of the host's by its ranks; or as 40GB",
        )
    )
    gradient_accumulation_steps: int | None = Field(None, ge=1, description="forwards per optimizer step")
    train_batch_size: int | None = Field(None, ge=1, description="clips per optimizer step over all ranks")
    max_tokens_per_batch: int | None = Field(
        None, ge=1, description="clips per forward and rank: as many as have at most so many tokens together"
    )
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate of the language model and of what follows")
    vision_lr_scale: float = Field(1.0, gt=0, description="learning rate of the vision tower is this times")
    merger_lr_scale: float = Field(1.0, gt=0, description="learning rate of the vision merger is this times")
    head_lr_scale: float = Field(1.0, gt=0, description="learning rate of the heads is this times")
    action_token_lr_scale: float = Field(1.0, gt=0, description="learning rate of <ACTION> is this times")
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="learning rate of LoRA's B matrices is this times that of A (arXiv 2402.12354)"
    )
    layerwise_lr_decay: float = Field(
        1.0, gt=0, le=1, description="each layer learns this times as fast as the one above"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled (AdamW); not on biases, norms, <ACTION>")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second-moment decay")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's denominator offset")
    max_grad_norm: float = Field(1.0, ge=0, description="global gradient norm is clipped to this; 0: never")
    lr_scheduler_type: Literal[
        "cosine",
        "linear",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = Field("cosine", description="transformers' schedule of this name")
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict, description="its further arguments")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of all steps that warm up linearly")
    warmup_steps: int | None = Field(None, ge=0, description="warm-up in steps instead of warmup_ratio")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the data when max_steps is not set")
    max_steps: Annotated[int | None, MinusOneMeansNone] = Field(
        None, ge=1, description="optimizer steps; overrides num_train_epochs"
    )
    bf16: bool = Field(True, description="bfloat16 weights with fp32 master copies; false: fp32")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="average the trained weights with this decay; evaluation and saved models use them",
    )
    loss_type: Literal["cross_entropy", "focal"] = Field("cross_entropy", description="classification loss")
    focal_gamma: float = Field(2.0, ge=0, description="exponent of the focal loss (arXiv 1708.02002)")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    class_balance_beta: float = Field(
        0.0, ge=0, lt=1, description="classes weigh by their effective number of clips (arXiv 1901.05555); 0: equally"
    )
    lm_loss_weight: float = Field(
        0.0, ge=0, description="times the language-model loss of the answer behind <ACTION>; 0: none is computed"
    )


class EvalOptions(Section):
    eval_strategy: Annotated[Literal["no", "steps", "epoch"], NoMeansNo] = Field(
        "no", description="when to evaluate while training"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="optimizer steps between evaluations (default: logging_steps)"
    )
    per_device_eval_batch_size: int = Field(8, ge=1, description="clips per forward and rank in evaluation (fp32: one)")
    load_best_model_at_end: bool = Field(False, description="keep the best evaluated checkpoint and end with it: best/")
    metric_for_best_model: str = Field(
        "top1", description="top1, top5, mean_class_accuracy or loss; mean over data sets"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="evaluations in a row without a better metric_for_best_model, after which training ends"
    )
    views: dict[str, int] = Field(
        default_factory=dict, description="of each clip, averaged: {segments: K, crops: 1 or 3} (default: 1 and 1)"
    )

    @property
    def metric(self) -> str:
        """metric_for_best_model without transformers' prefix eval_; accuracy is top1."""
        name = self.metric_for_best_model.removeprefix("eval_")
        return "top1" if name == "accuracy" else name


class RunOptions(Section):
    stage: Literal["action_cls"] = Field("action_cls", description="what is trained: an action classifier")
    do_train: bool = Field(True, description="false: check everything, say what would train, and stop")
    output_dir: str = Field(description="everything the run writes goes here")
    overwrite_output_dir: bool = Field(False, description="delete an earlier run in output_dir instead of refusing it")
    resume_from_checkpoint: Annotated[str | None, TrueMeansLatest] = Field(
        None, description="a checkpoint folder, or 'latest' in output_dir (fresh start if it has none)"
    )
    resume_with_changes: Annotated[list[str], CommaList] = Field(
        default_factory=list, description="keys whose value may differ from the checkpoint's, though it decides numbers"
    )
    deepspeed: str = Field("ds_configs/zero2.json", description="ZeRO and communication settings (JSON)")
    save_steps: int = Field(500, ge=1, description="optimizer steps between checkpoints; the last is always saved")
    save_total_limit: int | None = Field(3, ge=1, description="checkpoints kept")
    save_only_model: bool = Field(False, description="checkpoints without training state: smaller, but no resume")
    save_deepspeed_state: bool = Field(False, description="add DeepSpeed's own state to checkpoints, for its tools")
    async_save: bool = Field(
        True, description="write checkpoints while training goes on; one more copy of the training state on the host"
    )
    save_every_minutes: float | None = Field(None, gt=0, description="minutes between checkpoints, besides save_steps")
    logging_steps: int = Field(10, ge=1, description="optimizer steps between log lines")
    plot_loss: bool = Field(True, description="write training_loss.png")
    html_report: bool = Field(
        True, description="keep report.html up to date: curves, evaluations, recipe; for a browser"
    )
    report_to: Literal["none", "tensorboard", "wandb"] = Field("tensorboard", description="extra log writers")
    seed: int = Field(42, ge=0, description="order, initial weights, augmentation and dropout follow from it")
    ddp_timeout: int = Field(600, ge=1, description="seconds until a collective that hangs is an error")
    start_timeout: int = Field(1800, ge=1, description="seconds from the start of a rank to its first step")
    data_timeout: int = Field(300, ge=1, description="seconds that a rank waits for its next batch")
    step_timeout: int = Field(
        660, ge=1, description="seconds of one forward, backward or optimizer step; more than ddp_timeout"
    )
    save_timeout: int = Field(1800, ge=1, description="seconds of one checkpoint")
    stop_timeout: int = Field(300, ge=1, description="seconds from a request to stop until the run has saved and left")
    max_nonfinite_steps: int = Field(
        3, ge=1, description="steps in a row with a loss or gradient that is not finite, until the run stops"
    )
    log_order: bool = Field(False, description="write the clips of every step to order/, for proofs")
    self_check: bool = Field(True, description="the first steps prove that what should learn does; false: do not")


SECTIONS: dict[str, type[Section]] = {
    "model": ModelOptions,
    "data": DataOptions,
    "augment": AugmentOptions,
    "optim": OptimOptions,
    "eval": EvalOptions,
    "run": RunOptions,
}
OWNER = {key: section for section, cls in SECTIONS.items() for key in cls.model_fields}


def field_error(cls: type[Section], item: Any) -> str:
    """One of pydantic's errors about a section, as a user reads it: field, value, what is legal."""
    key = str(item["loc"][0])
    where = ": ".join(
        str(part) for part in item["loc"] if not str(part).startswith(("list[", "literal[", "constrained"))
    )
    if item["type"] == "missing":
        about = f" ({cls.model_fields[key].description})" if len(item["loc"]) == 1 else ""
        return f"{where}: required, not given{about}"
    field = cls.model_fields[key]
    legal = legal_values(field.annotation, field.metadata)
    return f"{where}: {item['input']!r} is not legal: {item['msg']}{' (legal: ' + legal + ')' if legal else ''}"


def legal_values(annotation: Any, metadata: list[Any]) -> str:
    """What a field may be, in words; "" where its type says enough."""
    choices = getattr(annotation, "__args__", ())
    if choices and all(isinstance(c, str) for c in choices):
        return " | ".join(choices)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return ", ".join(f"{sign} {getattr(m, name)}" for m in metadata for name, sign in signs.items() if hasattr(m, name))
