"""All checks before training, so that a user's mistake costs seconds and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from vidcls import distributed
from vidcls.batch_plan import BatchPlan, batch_plan, total_steps
from vidcls.config import Config, ConfigError
from vidcls.data.batch import ClipShape, Grid
from vidcls.data.budget import BudgetLayout
from vidcls.data.lengths import TokenBudget
from vidcls.data.loader import ClipBatches, ClipSource
from vidcls.data.order import StepLayout
from vidcls.evaluation.heads import frame_choice
from vidcls.manifest import CheckpointError, verify
from vidcls.model.heads import ActionDecoder
from vidcls.model.pretrained import ModelSpec, build_encoder, check_adapter, read_spec
from vidcls.model.prompt import PromptEncoder
from vidcls.model.tuning import TuningSettings
from vidcls.model.weights import fingerprint
from vidcls.options import AUTO
from vidcls.training.checkpoint import check_average
from vidcls.training.continuing import check_changes, check_continues
from vidcls.training.data_sets import DataSets, open_data_sets
from vidcls.training.evaluating import Evaluations, Schedule, eval_views, open_eval_clips
from vidcls.training.folders import find_latest, list_checkpoints
from vidcls.training.heads import build_heads
from vidcls.training.optimizer import learning_rate
from vidcls.training.sharded_state import RunState, StoredState, read_state, read_state_file
from vidcls.training.vision_cache import VisionCache


@dataclass(frozen=True)
class Run:
    """Everything checked, nothing heavy built yet but the heads."""

    config: Config
    data: DataSets
    spec: ModelSpec
    heads: dict[str, ActionDecoder]
    clips: ClipBatches
    plan: BatchPlan
    measures_memory: bool  # the plan's micro-batch is provisional, and the largest is still to be found
    steps: int
    resume: Path | None
    start: RunState  # before the first step, or as stored in the checkpoint
    evaluations: Evaluations | None
    budget: TokenBudget | None  # of micro-batches, with max_tokens_per_batch

    @property
    def output_dir(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def encoder(self) -> PromptEncoder:
        assert isinstance(self.clips.encoder, PromptEncoder)
        return self.clips.encoder

    def layout(self) -> StepLayout | BudgetLayout:
        """How the clips of each step are laid over ranks and micro-batches, and which are this rank's."""
        world_size, rank = distributed.world_size(), distributed.rank()
        if self.budget is None:
            return StepLayout(self.plan.global_, self.plan.micro, world_size, rank)
        return BudgetLayout(self.data.order, self.budget.tokens, self.budget.limit, self.plan.global_, world_size, rank)

    def most_batch_bytes(self) -> int | None:
        """Of the frames or features of a micro-batch at most; None: the first one has as many clips as any."""
        if self.budget is None:
            return None
        return min(self.budget.most_bytes, self.plan.micro * self.clips.most_bytes())


def setup(config: Config) -> Run:
    """Check data, prompts, batch sizes and a checkpoint to resume from; join the process group. Writes nothing.

    Raises:
        ValueError: a user's mistake, in one message (ConfigError, ShardError, PromptError, CheckpointError).
    """
    options = config.run
    with distributed.joining(options.ddp_timeout, max(options.start_timeout, options.save_timeout)):
        if options.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ConfigError("report_to: 'wandb' needs the package wandb: pip install wandb, or use tensorboard")
        check_changes(options.resume_with_changes)
        data = open_data_sets(config)
        spec = model_spec(config)
        cache = VisionCache.of(config, spec)
        if cache:
            data = cache.training(data)
        encoder = build_encoder(spec, trust_remote_code=config.model.trust_remote_code)
        clips = ClipBatches(
            data.sources(),
            encoder,
            frame_choice(spec),
            seed=config.run.seed,
            jitter=config.data.temporal_jitter,
            skip_bad=config.data.on_bad_sample == "skip",
            answers=config.optim.lm_loss_weight > 0,
        )
        texts = check_texts(clips, threads=config.data.preprocessing_num_workers)
        limit = config.optim.max_tokens_per_batch
        budget = None if limit is None else TokenBudget.of(clips, texts, limit)
        eval_clips = open_eval_clips(config, data) if config.eval.eval_strategy != "no" else []
        heads = build_heads(config, data, spec, encoder)
    _check_equal_weights(spec)
    plan = batch_plan(config.optim, distributed.world_size())
    assert plan is not None
    fresh = RunState(step=0, adam_steps=0, stream=_stream(config, data, plan))
    resume = _checkpoint_to_resume(config)
    start = fresh
    measures_memory = config.optim.per_device_train_batch_size == AUTO
    if resume is not None:
        with distributed.all_or_none(f"reading {resume}"):
            stored = read_state(resume)
            changes = check_continues(resume, stored, read_spec(resume), config, fresh, spec)
            check_average(StoredState.open(resume), wanted=config.optim.ema_decay is not None)
            start = replace(stored, stream=fresh.stream)
            micro = stored_micro_batch(resume, config, plan) if measures_memory else None
        if micro is not None:
            plan, measures_memory = replace(plan, micro=micro, accumulation=plan.accumulation // micro), False
        if changes and distributed.is_main():
            print(f"vidcls: goes on with changes: {', '.join(changes)}", flush=True)
    elif config.model.adapter_name_or_path is not None:
        check_adapter(Path(config.model.adapter_name_or_path), spec)
    steps = total_steps(config.optim, data.clips, plan.global_)
    if config.optim.warmup_steps is not None and config.optim.warmup_steps >= steps:
        raise ConfigError(f"warmup_steps: {config.optim.warmup_steps} of {steps} steps leaves none at the full rate")
    learning_rate(0, steps, config.optim)  # the schedule knows its own arguments
    # One that was killed right after its last save is done, and only has to say so.
    done = start.step == steps and config.run.resume_from_checkpoint == "latest"
    if start.step >= steps and not done:
        raise ConfigError(f"resume_from_checkpoint: {resume} has {start.step} of {steps} steps done; nothing is left")
    evaluations = None
    if eval_clips:
        if cache:
            eval_clips = cache.evaluation(eval_clips, eval_views(config))
        schedule = Schedule.of(config, last=steps, clips_per_epoch=data.clips, global_batch=plan.global_)
        evaluations = Evaluations(config, eval_clips, encoder, frame_choice(spec), schedule)
        for batches in evaluations.batches.values():
            check_texts(batches, threads=config.data.preprocessing_num_workers)
    return Run(config, data, spec, heads, clips, plan, measures_memory, steps, resume, start, evaluations, budget)


def stored_micro_batch(folder: Path, config: Config, plan: BatchPlan) -> int | None:
    """That of the run which wrote the checkpoint, so that this one computes the same numbers; None, which is said, when
    it was on another layout, whose memory says nothing of this one's."""
    layout = read_state_file(folder)["layout"]
    now = {
        "ranks": distributed.world_size(),
        "zero_stage": config.zero_stage,
        "global_batch": plan.global_,
        "max_tokens_per_batch": None,
    }
    same = all(layout.get(name) == value for name, value in now.items())
    if distributed.is_main():
        then = ", ".join(f"{name} {layout.get(name)}" for name in now)
        today = ", ".join(f"{name} {value}" for name, value in now.items())
        how = f"{layout['micro_batch']} as in {folder}"
        how = how if same else f"measured anew: {folder} is of another layout ({then}) than this run ({today})"
        print(f"vidcls: per_device_train_batch_size: auto is {how}", flush=True)
    return layout["micro_batch"] if same else None


def _stream(config: Config, data: DataSets, plan: BatchPlan) -> dict[str, object]:
    return {
        "seed": config.run.seed,
        "global_batch": plan.global_,
        "temporal_jitter": config.data.temporal_jitter,
        "frame_sampling": config.data.frame_sampling,
        "dense_stride": config.data.dense_stride,
        **data.stream(),
    }


def check_texts(clips: ClipBatches, *, threads: int) -> dict[tuple[int, str], int]:
    """Encode each different prompt, also as flips change it, with the largest video that it stands with, and, where
    answers are learned, the class name of most tokens: none may be malformed or too long. Tokenising is spread over
    `threads`.

    Returns, for each data set and text, the tokens beside those of the video. Clips' own answers are not in the index:
    one that is too long gives way to the class name when it is read.
    """
    largest: dict[tuple[int, str], Grid] = {}
    for number, source in enumerate(clips.sources):
        for prompt, grid in _prompts_with_grids(clips, source):
            key = number, prompt
            largest[key] = max(largest.get(key, grid), grid, key=math.prod)
    some = {number: (prompt, grid) for (number, prompt), grid in largest.items()}

    def longest_answer(number: int) -> str:
        prompt, grid = some[number]
        names = clips.sources[number].index.labels.names
        return max(names, key=lambda name: len(clips.encoder.encode(prompt, grid, 1.0, name).input_ids))

    answers = [longest_answer(number) if clips.answers else None for number in range(len(clips.sources))]

    def encode(item: tuple[tuple[int, str], Grid]) -> int:
        (number, prompt), grid = item
        whole = len(clips.encoder.encode(prompt, grid, 1.0, answers[number]).input_ids)
        return whole - clips.encoder.video_tokens(grid)

    with ThreadPoolExecutor(threads, thread_name_prefix="prompts") as pool:
        return dict(zip(largest, pool.map(encode, largest.items()), strict=True))


def _prompts_with_grids(clips: ClipBatches, source: ClipSource) -> Iterator[tuple[str, Grid]]:
    """Every different prompt of a data set with every different grid that it stands with."""
    index = source.index
    rows = zip(index.prompt.tolist(), index.frames.tolist(), index.height.tolist(), index.width.tolist(), strict=True)
    for prompt, frames, height, width in {*rows}:
        grid = ClipShape.of(clips.encoder, min(frames, clips.frames.most), height, width).grid
        yield from ((text, grid) for text in source.texts(prompt))


def _check_equal_weights(spec: ModelSpec) -> None:
    """Each rank reads the base model itself, perhaps its own host's copy. All ranks must call it."""
    found = distributed.gather_objects(spec.base_weights)
    if differing := [str(rank) for rank, other in enumerate(found) if other != found[0]]:
        raise ConfigError(
            f"model_name_or_path: {spec.model_name_or_path} holds other weights on ranks {', '.join(differing)} "
            "than on rank 0"
        )


def model_spec(config: Config) -> ModelSpec:
    """ValueError when the base model is none."""
    model, data = config.model, config.data
    base = model.model_name_or_path
    target = model.lora_target
    prompts: dict[str, str] = {}
    for each in config.train_sets:
        prompts.setdefault(each.head, each.prompt)
    return ModelSpec(
        model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
        base_weights=fingerprint(base),
        bf16=config.optim.bf16,
        flash_attn=model.flash_attn,
        enable_liger_kernel=model.enable_liger_kernel,
        tuning=TuningSettings(
            finetuning_type=model.finetuning_type,
            vision_tuning=model.vision_tuning,
            merger_tuning=model.merger_tuning,
            lora_rank=model.lora_rank,
            lora_alpha=model.lora_alpha,
            lora_dropout=model.lora_dropout,
            lora_target="all" if target == "all" else tuple(target),
            use_dora=model.use_dora,
            use_rslora=model.use_rslora,
        ),
        action_token=model.action_token,
        template=model.template,
        prompts=prompts,
        video_maxlen=data.video_maxlen,
        frame_sampling=data.frame_sampling,
        dense_stride=data.dense_stride,
        video_min_pixels=data.video_min_pixels,
        video_max_pixels=data.video_max_pixels,
        image_max_pixels=data.image_max_pixels,
        cutoff_len=data.cutoff_len,
    )


def _checkpoint_to_resume(config: Config) -> Path | None:
    """The verified checkpoint this run goes on from; the main rank chooses, so that all choose the same."""
    wanted = config.run.resume_from_checkpoint
    if wanted is None:
        return None
    chosen: Path | None = None
    with distributed.all_or_none("choosing the checkpoint to resume"):
        if distributed.is_main():
            if wanted == "latest":
                chosen, passed_over = find_latest(Path(config.run.output_dir))
                for reason in passed_over:
                    print(f"vidcls: checkpoint passed over: {reason}", flush=True)
                if chosen is None and list_checkpoints(Path(config.run.output_dir)):
                    raise CheckpointError(
                        f"resume_from_checkpoint: no checkpoint in {config.run.output_dir!r} is whole; "
                        "starting over would lose the run, remove them to do so"
                    )
            else:
                chosen = Path(wanted)
                verify(chosen)
    return distributed.gather_objects(chosen)[0]
