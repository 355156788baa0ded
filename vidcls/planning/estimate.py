"""A recipe on a cluster: what it needs, how long it takes, and which split of the same step fits and is fastest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from vidcls.batch_plan import BatchPlan, batch_plan, total_steps
from vidcls.config import Config, config_from_values
from vidcls.data.index import ShardIndex
from vidcls.data.settings import DecodeSettings
from vidcls.geometry import smart_resize
from vidcls.model.prompt import SYSTEM_TEXT
from vidcls.model.shapes import TINY, Architecture, read_architecture
from vidcls.options import VIDEO_TAG
from vidcls.planning.flops import micro_batch, total
from vidcls.planning.machines import Machine
from vidcls.planning.memory import Memory, memory, prepacked_share
from vidcls.planning.steptime import Cluster, StepTime, step_time
from vidcls.planning.workload import Clips, Workload

LETTERS_PER_TOKEN = 4
ANSWER_TOKENS = 14
CLASSES = 100
SPECIAL_TOKENS = {"qwen2_vl": 6, "empty": 3}  # of the template, the video and <ACTION>
BEHIND_VIDEO = 2  # of them
DEEPSPEED_FILES = {2: "ds_configs/zero2.json", 3: "ds_configs/zero3.json"}


@dataclass(frozen=True)
class Facts:
    """What is known of model and data without loading them. clips: in one epoch, None when not known. assumptions: what
    was not found and taken for granted, as a user reads it."""

    model: Architecture
    clip: Clips
    clips: int | None
    classes: tuple[int, ...]
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """One way to take the recipe's step. flops: of all ranks, without what is computed again."""

    stage: int
    checkpointing: bool
    plan: BatchPlan
    memory: Memory
    fits: bool
    step: StepTime
    flops: float
    recomputed_flops: float
    trained: int

    @property
    def clips_per_second(self) -> float:
        return self.plan.global_ / self.step.total

    def settings(self) -> dict[str, Any]:
        """The recipe's keys that say so."""
        return {
            "deepspeed": DEEPSPEED_FILES[self.stage],
            "gradient_checkpointing": self.checkpointing,
            "per_device_train_batch_size": self.plan.micro,
            "gradient_accumulation_steps": self.plan.accumulation,
            "max_tokens_per_batch": None,
        }


def gather_facts(config: Config, *, clips: int | None = None, frames: int | None = None) -> Facts:
    """Sizes of the model and of the data that `config` names, where they are at hand, else assumed.

    Args:
        clips: in one epoch, frames: of a clip, both instead of what the shards say.

    Raises:
        ValueError: the model's name says no size, its config or a folder of shards is damaged.
    """
    assumptions: list[str] = []
    name = config.model.model_name_or_path
    model, found = read_architecture(name)
    if not found:
        assumptions.append(f"{name} is not here: sizes of the published {model.name}")
    indexes = []
    for each in config.train_sets:
        if Path(each.place).is_dir():
            indexes.append(ShardIndex.open(each.place))
        else:
            assumptions.append(f"{each.place} is not here: clips as tools/make_shards.py stores them by default")
    usual, height, width = _clip_size(config, indexes, model)
    classes = _classes(config, indexes, assumptions)
    if clips is None and len(indexes) == len(config.train_sets):
        clips = sum(map(len, indexes))
    prompts = [each.prompt for each in config.train_sets]
    text = max(_text_tokens(config, prompt, assumptions) for prompt in prompts)
    stored = [prompt for index in indexes for prompt in index.prompts]
    prefix = _prefix_tokens(config, prompts + stored, assumptions) if config.model.shares_prefix else 0
    answers = 0
    if config.optim.lm_loss_weight > 0:
        answers = ANSWER_TOKENS
        assumptions.append(f"an answer has {ANSWER_TOKENS} tokens")
    clip = Clips(1, min(frames or usual, config.data.video_maxlen), height, width, text + answers, answers, prefix)
    return Facts(model, clip, clips, classes, tuple(dict.fromkeys(assumptions)))


def _clip_size(config: Config, indexes: list[ShardIndex], model: Architecture) -> tuple[int, int, int]:
    """Frames, height and width that clips are trained with: those of the clip of median size."""
    data, side = config.data, model.patch_size * model.merge
    if indexes:
        frames = np.concatenate([np.minimum(index.frames, data.video_maxlen) for index in indexes])
        height = np.concatenate([index.height for index in indexes])
        width = np.concatenate([index.width for index in indexes])
        order = np.argsort(frames.astype(np.int64) * height * width)
        middle = order[len(order) // 2]
        shape = int(frames[middle]), int(height[middle]), int(width[middle])
    else:
        stored, edge = DecodeSettings(), int(data.video_max_pixels**0.5)
        assert stored.frames is not None
        shape = min(stored.frames, data.video_maxlen), edge, edge
    most = data.image_max_pixels if shape[0] == 1 and data.image_max_pixels else data.video_max_pixels
    resized = smart_resize(*shape[1:], factor=side, min_pixels=data.video_min_pixels, max_pixels=most)
    return shape[0], *resized


def _classes(config: Config, indexes: list[ShardIndex], assumptions: list[str]) -> tuple[int, ...]:
    heads: dict[str, int] = {}
    for each, index in zip(config.train_sets, indexes, strict=False):
        heads[each.head] = len(index.labels)
    for each in config.train_sets:
        if each.head not in heads:
            heads[each.head] = config.model.num_action_classes or CLASSES
            if not config.model.num_action_classes:
                assumptions.append(f"{CLASSES} classes")
    return tuple(heads.values())


def _text_tokens(config: Config, prompt: str, assumptions: list[str]) -> int:
    """Tokens of a prompt with its template, up to <ACTION>, without the video's."""
    options = config.model
    words = prompt.replace(VIDEO_TAG, "").replace("<ACTION>", "").replace(options.action_token, "")
    return SPECIAL_TOKENS[options.template] + _count_words(config, words, assumptions)


def _prefix_tokens(config: Config, prompts: list[str], assumptions: list[str]) -> int:
    """Tokens before the video that all prompts begin with."""
    leads = {prompt.split(VIDEO_TAG)[0] for prompt in prompts}
    alike = os.path.commonprefix([*leads])  # noqa: RUF071 - letters are meant
    # The video's start follows a lead.
    special = SPECIAL_TOKENS[config.model.template] - BEHIND_VIDEO - (len(leads) > 1)
    return special + _count_words(config, alike, assumptions)


def _count_words(config: Config, words: str, assumptions: list[str]) -> int:
    """Of a prompt, and before it those of its template."""
    if config.model.template == "qwen2_vl":
        words = f"system\n{SYSTEM_TEXT}\nuser\n{words}"
    return _count(config.model.model_name_or_path, words, assumptions)


def _count(model: str, text: str, assumptions: list[str]) -> int:
    if model == TINY:
        return len(text.encode())
    path = Path(model) / "tokenizer.json"
    if path.is_file():
        try:
            return len(Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids)
        except Exception as error:  # tokenizers raises plain Exceptions
            raise ValueError(f"{path} cannot be read: {error}") from None
    assumptions.append(f"no tokenizer.json: a token for every {LETTERS_PER_TOKEN} letters of text")
    return -(-len(text) // LETTERS_PER_TOKEN)


def estimate(config: Config, facts: Facts, machine: Machine, cluster: Cluster) -> Estimate:
    """The recipe as it is. Raises ConfigError when its batch sizes do not go with so many ranks."""
    plan = batch_plan(config.optim, cluster.ranks)
    assert plan is not None
    if (most := config.optim.max_tokens_per_batch) is not None:
        micro = min(plan.micro, max(1, most // facts.clip.length(facts.model)))
        plan = BatchPlan(micro, -(-plan.micro // micro), plan.global_)
    return _estimate(config, facts, machine, cluster, plan)


def _estimate(config: Config, facts: Facts, machine: Machine, cluster: Cluster, plan: BatchPlan) -> Estimate:
    clips = replace(facts.clip, count=plan.micro)
    stage = config.zero_stage
    work = Workload.of(config, facts.model, clips, facts.classes, on_gpu=machine.on_gpu, stage=stage)
    sharing = 1 if machine.on_gpu else cluster.per_node  # a CPU's ranks share its memory
    needed = memory(work, config, machine, ranks=cluster.ranks, sharing=sharing)
    packed = prepacked_share(work, config, needed)
    products = micro_batch(work)
    times = plan.accumulation * cluster.ranks
    return Estimate(
        stage=stage,
        checkpointing=config.model.gradient_checkpointing,
        plan=plan,
        memory=needed,
        fits=needed.total * sharing <= machine.memory,
        step=step_time(work, machine, cluster, accumulation=plan.accumulation, packed=packed),
        flops=times * total(products, "forward", "backward"),
        recomputed_flops=times * total(products, "recomputed"),
        trained=work.trained,
    )


def alternatives(config: Config, facts: Facts, machine: Machine, cluster: Cluster) -> list[Estimate]:
    """The same optimizer step in other ways: both ZeRO stages, with and without gradient checkpointing, and each in the
    largest micro-batch that fits (or of one clip, if none does). The fastest that fits comes first."""
    given = batch_plan(config.optim, cluster.ranks)
    assert given is not None
    own = given.micro * given.accumulation
    found = []
    for stage, checkpointing in [(2, False), (2, True), (3, False), (3, True)]:
        changes: dict[str, Any] = {"gradient_checkpointing": checkpointing}
        if stage != config.zero_stage:
            changes["deepspeed"] = DEEPSPEED_FILES[stage]
        other = config_from_values({**config.flat(), **changes})
        ways = [
            _estimate(other, facts, machine, cluster, BatchPlan(micro, own // micro, given.global_))
            for micro in _divisors(own)
        ]
        fitting = [way for way in ways if way.fits]
        found.append(min(fitting, key=lambda way: way.step.total) if fitting else ways[0])
    return sorted(found, key=lambda way: (not way.fits, way.step.total if way.fits else way.memory.total))


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)


def steps_of_run(config: Config, facts: Facts, plan: BatchPlan) -> int | None:
    """Optimizer steps of the whole run; None when neither max_steps nor the number of clips is known."""
    if config.optim.max_steps is None and facts.clips is None:
        return None
    return total_steps(config.optim, facts.clips or 0, plan.global_)
