"""Tokens of clips from the index alone, beside those of the batches that are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_loader import same
from vidcls.data.augment import AugmentSettings
from vidcls.data.budget import BudgetLayout
from vidcls.data.index import ShardIndex
from vidcls.data.joint import JointOrder
from vidcls.data.lengths import TokenBudget, clip_tokens
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice, Request, training_requests
from vidcls.data.reading import read_batches
from vidcls.model.patches import VisionGeometry
from vidcls.model.prompt import PromptEncoder
from vidcls.model.tiny import tiny_config, tiny_tokenizer
from vidcls.training.setup import check_texts

PROMPT = "<video> counterclockwise or not? <ACTION>"


@pytest.fixture(scope="module")
def index(two_sizes: Path) -> ShardIndex:
    return ShardIndex.open(two_sizes)


def batches_of(*sources: ClipSource) -> ClipBatches:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<ACTION>"]})
    geometry = VisionGeometry.from_config(tiny_config())
    video = tiny_config().video_token_id
    encoder = PromptEncoder(tokenizer, geometry, video, 512, 784, 112**2, template="empty")
    return ClipBatches(sources, encoder, FrameChoice(8), skip_bad=True)


def every_clip(index: ShardIndex, source: int, epoch: int) -> Request:
    count = len(index)
    return Request(tuple(range(count)), (source,) * count, epochs=(epoch,) * count)


def test_they_are_those_of_the_batches(index: ShardIndex) -> None:
    """Of two data sets with other prompts; a clip that cannot be read has as many."""
    clips = batches_of(ClipSource(index, PROMPT), ClipSource(index, "<video><ACTION>"))
    tokens = clip_tokens(clips, check_texts(clips, threads=2))
    assert np.unique(tokens[0] - tokens[0].min()).tolist() == [0, 16, 48]  # 16, 32 and 64 are the video's
    assert tokens[0].min() > tokens[1].min()
    for source, own in enumerate(tokens):
        assert clips[every_clip(index, source, 0)].lengths == tuple(own.tolist())
    damaged = replace(index, crc32=index.crc32 + 1)
    batch = batches_of(ClipSource(damaged, PROMPT))[every_clip(damaged, 0, 0)]
    assert len(batch.bad) == len(index)
    assert batch.lengths == tuple(tokens[0].tolist())


def test_a_flip_that_changes_a_text_counts_as_it_may_come(index: ShardIndex) -> None:
    flips = AugmentSettings(horizontal_flip=0.5)
    source = ClipSource(index, PROMPT, augment=flips, mirror=np.array([0, 2, 1, 3]), ids=np.arange(len(index)))
    clips = batches_of(source)
    (tokens,) = clip_tokens(clips, check_texts(clips, threads=2))
    seen = np.array([clips[every_clip(index, 0, epoch)].lengths for epoch in range(6)])
    assert (seen <= tokens).all()
    assert (seen.max(axis=0) == tokens).any()
    assert (seen.min(axis=0) < tokens).any()  # "clockwise" is shorter


def test_a_clip_above_the_limit_is_named(index: ShardIndex) -> None:
    clips = batches_of(ClipSource(index, PROMPT))
    texts = check_texts(clips, threads=2)
    (tokens,) = clip_tokens(clips, texts)
    most = int(tokens.max())
    longest = index.keys[int(tokens.argmax())]
    assert TokenBudget.of(clips, texts, most).limit == most
    said = f"max_tokens_per_batch: {most - 1}, but clip '{longest}' of .*shards has {most} tokens alone"
    with pytest.raises(ValueError, match=said):
        TokenBudget.of(clips, texts, most - 1)
    short = np.flatnonzero(tokens < most)  # clips that are left out of training do not count
    trained = batches_of(ClipSource(index, PROMPT, ids=short))
    assert TokenBudget.of(trained, texts, most - 1).limit == most - 1


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_hand_over_batches_of_any_number_of_clips(index: ShardIndex, workers: int) -> None:
    clips = batches_of(ClipSource(index, "<video><ACTION>"))
    budget = TokenBudget.of(clips, check_texts(clips, threads=2), 100)
    layout = BudgetLayout(JointOrder.single(len(index), 1), budget.tokens, budget.limit, 12, 1, 0)
    requests = list(training_requests(layout.order, layout, 0, 3))
    alone = list(map(clips.__getitem__, requests))
    assert len(alone[0]) < max(map(len, alone)), list(map(len, alone))
    assert max(batch.frames.nbytes for batch in alone) <= budget.most_bytes
    shared = read_batches(clips, requests, workers=workers, pin=False, most_bytes=budget.most_bytes)
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
