"""From a configuration to a checked run: every mistake of a user is found here, before anything is built or written."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

from vidcls import distributed
from vidcls.config import BatchPlan, Config, ConfigError, DataOptions, batch_plan, total_steps
from vidcls.data.batch import ClipShape, Grid
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches
from vidcls.data.order import SampleOrder, ShardWindow, shards_that_fit
from vidcls.data.places import CacheSettings, LocalFolder, default_cache_folder
from vidcls.model.pretrained import ModelSpec, build_encoder, read_spec
from vidcls.model.prompt import PromptEncoder
from vidcls.training import checkpoint
from vidcls.training.checkpoint import RunState


@dataclass(frozen=True)
class Run:
    """Everything checked, nothing heavy built yet."""

    config: Config
    index: ShardIndex
    order: SampleOrder
    spec: ModelSpec
    clips: ClipBatches
    plan: BatchPlan
    steps: int
    resume: Path | None
    start: RunState  # before the first step, or as stored in the checkpoint

    @property
    def output_dir(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def encoder(self) -> PromptEncoder:
        assert isinstance(self.clips.encoder, PromptEncoder)
        return self.clips.encoder


def setup(config: Config) -> Run:
    """Check data, prompts, batch sizes and a checkpoint to resume from; join the process group. Writes nothing.

    Raises:
        ValueError: a user's mistake, in one message (ConfigError, ShardError, PromptError, CheckpointError).
    """
    cache = _cache_settings(config.data)
    index = ShardIndex.open(config.data.dataset, cache)
    classes = config.model.num_action_classes
    if classes is not None and classes != len(index.labels):
        raise ConfigError(
            f"num_action_classes: {classes}, but the shards in {config.data.dataset!r} have {len(index.labels)} classes"
        )
    order = _sample_order(config, index, cache)
    _check_attention(config.model.flash_attn)
    spec = _model_spec(config)
    encoder = build_encoder(spec)
    clips = ClipBatches(
        index,
        encoder,
        prompt=spec.prompt,
        max_frames=spec.video_maxlen,
        jitter_seed=config.run.seed if config.data.temporal_jitter else None,
        skip_bad=config.data.on_bad_sample == "skip",
    )
    _check_texts(clips)
    distributed.start(config.run.ddp_timeout)
    plan = batch_plan(config.optim, distributed.world_size())
    assert plan is not None
    fresh = RunState(
        step=0,
        adam_steps=0,
        seed=config.run.seed,
        global_batch=plan.global_,
        samples=len(index),
        data_digest=index.digest,
        label_fingerprint=index.labels.fingerprint,
        shuffle_shards=config.data.shuffle_shards,
        temporal_jitter=config.data.temporal_jitter,
    )
    resume = _checkpoint_to_resume(config)
    start = fresh
    if resume is not None:
        with distributed.all_or_none(f"reading {resume}"):
            start = checkpoint.read_state(resume)
            start.check_continues(fresh)
            _check_same_model(read_spec(resume), spec)
    steps = total_steps(config.optim, len(index), plan.global_)
    if start.step >= steps:
        raise ConfigError(f"resume_from_checkpoint: {resume} has {start.step} of {steps} steps done; nothing is left")
    return Run(config, index, order, spec, clips, plan, steps, resume, start)


def _check_attention(flash_attn: str) -> None:
    if flash_attn != "fa2":
        return
    if distributed.accelerator_name() == "cpu" or importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            f"flash_attn: 'fa2' needs the package flash-attn and a GPU (here: {distributed.accelerator_name()}); "
            "use auto or sdpa"
        )


def _cache_settings(data: DataOptions) -> CacheSettings:
    folder = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_folder()
    return CacheSettings(folder=folder.absolute(), max_bytes=max(1, int(data.cache_gb * 10**9)))


def _sample_order(config: Config, index: ShardIndex, cache: CacheSettings) -> SampleOrder:
    """The order of the run; ConfigError if the shards of a URL that are needed at a time do not fit the cache."""
    shuffled = config.data.shuffle_shards
    if not isinstance(index.folder, LocalFolder):
        sizes = [shard.bytes for shard in index.shards]
        fits = shards_that_fit(sizes, cache.max_bytes)
        if min(shuffled or len(sizes), len(sizes)) > fits:
            largest = sum(sorted(sizes)[-2:]) / 10**9
            raise ConfigError(
                f"shuffle_shards: {shuffled}, of {len(sizes)} shards with {sum(sizes) / 10**9:.3g} GB; two windows of "
                f"that many shards must fit cache_gb ({config.data.cache_gb:g}) together: "
                + (f"at most {fits} do" if fits else f"not even two shards do, which take {largest:.3g}")
            )
        # A window even if it holds all shards: it is what tells the loader which shards to fetch.
        shuffled = shuffled or len(sizes)
    window = None if shuffled is None else ShardWindow(index.shard, shuffled)
    return SampleOrder(len(index), config.run.seed, window)


def _check_texts(clips: ClipBatches) -> None:
    """Encode each different prompt with the largest video that it stands with: none may be malformed or too long."""
    index, encoder = clips.index, clips.encoder
    largest: dict[int, Grid] = {}
    rows = zip(index.prompt.tolist(), index.frames.tolist(), index.height.tolist(), index.width.tolist(), strict=True)
    for prompt, frames, height, width in {*rows}:
        grid = ClipShape.of(encoder, min(frames, clips.max_frames), height, width).grid
        largest[prompt] = max(largest.get(prompt, grid), grid, key=math.prod)
    for prompt, grid in largest.items():
        encoder.encode(clips.prompt if prompt < 0 else index.prompts[prompt], grid, 1.0)


def _check_same_model(stored: ModelSpec, now: ModelSpec) -> None:
    # The base may have moved, and the attention kernel changes rounding only.
    for name in sorted(vars(now).keys() - {"model_name_or_path", "flash_attn"}):
        if getattr(stored, name) != getattr(now, name):
            raise checkpoint.CheckpointError(
                f"resume_from_checkpoint: {name} is {getattr(stored, name)!r} in the checkpoint and "
                f"{getattr(now, name)!r} in this run; they must be equal for the run to go on"
            )


def _model_spec(config: Config) -> ModelSpec:
    model, data = config.model, config.data
    base = model.model_name_or_path
    return ModelSpec(
        model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
        bf16=config.optim.bf16,
        flash_attn=model.flash_attn,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        prompt=data.prompt,
        video_maxlen=data.video_maxlen,
        video_min_pixels=data.video_min_pixels,
        video_max_pixels=data.video_max_pixels,
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
                chosen, passed_over = checkpoint.find_latest(Path(config.run.output_dir))
                for reason in passed_over:
                    print(f"vidcls: checkpoint passed over: {reason}", flush=True)
                if chosen is None and checkpoint.list_checkpoints(Path(config.run.output_dir)):
                    raise checkpoint.CheckpointError(
                        f"resume_from_checkpoint: no checkpoint in {config.run.output_dir!r} is whole; "
                        "starting over would lose the run, remove them to do so"
                    )
            else:
                chosen = Path(wanted)
                checkpoint.verify(chosen)
    return distributed.gather_objects(chosen)[0]
