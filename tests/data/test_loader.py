"""Batches: the same at any worker and rank count, and what the model is promised about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from vidcls.config import DEFAULT_PROMPT, PromptError
from vidcls.data.loader import (
    Batch,
    ClipBatches,
    Request,
    collate,
    evaluation_requests,
    prepare_clip,
    read_batches,
    training_requests,
)
from vidcls.data.order import SampleOrder, StepLayout
from vidcls.data.shards import ShardError, ShardIndex, ShardReader
from vidcls.model.patches import VisionGeometry
from vidcls.model.prompt import PromptEncoder
from vidcls.model.tiny import tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<ACTION>"]})
    config = tiny_config()
    return PromptEncoder(tokenizer, VisionGeometry.from_config(config), config.video_token_id, 512, 784, 3136)


@pytest.fixture
def clips(small_shards: Path, encoder: PromptEncoder) -> ClipBatches:
    return ClipBatches(ShardIndex.open(small_shards), encoder, prompt=DEFAULT_PROMPT, max_frames=16)


def same(a: Batch, b: Batch) -> bool:
    fields = [f.name for f in dataclasses.fields(a) if isinstance(getattr(a, f.name), torch.Tensor)]
    return (
        a.keys == b.keys and a.grid_thw == b.grid_thw and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_worker_count(clips: ClipBatches, workers: int) -> None:
    requests = list(training_requests(SampleOrder(26, 1), StepLayout(6, 3, 1, 0), 0, 6))
    alone = list(read_batches(clips, requests, workers=0, pin=False))
    shared = list(read_batches(clips, requests, workers=workers, pin=False))
    assert len(alone) == 12
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_together_read_what_one_rank_reads(clips: ClipBatches, world: int) -> None:
    order, steps = SampleOrder(26, 1), 4

    def keys(world: int) -> list[str]:
        per_rank = [
            list(training_requests(order, StepLayout(12, 1, world, rank), 1, 1 + steps)) for rank in range(world)
        ]
        share = 12 // world
        return [
            clips.reader.index.keys[request.samples[0]]
            for step in range(steps)
            for requests in per_rank
            for request in requests[step * share : (step + 1) * share]
        ]

    assert keys(world) == keys(1)


def test_a_run_resumed_at_a_step_reads_the_tail_of_the_straight_one(clips: ClipBatches) -> None:
    layout, order = StepLayout(8, 2, 2, 1), SampleOrder(26, 5)
    straight = list(training_requests(order, layout, 0, 10))
    assert list(training_requests(order, layout, 4, 10)) == straight[4 * layout.accumulation :]


def test_frames_and_labels_are_those_of_the_shards(clips: ClipBatches) -> None:
    from vidcls.data.decode import decode_jpegs

    batch = clips[Request((3, 17))]
    reader = ShardReader(clips.reader.index)
    stored = [reader.read(3), reader.read(17)]
    assert batch.keys == tuple(s.key for s in stored)
    assert batch.labels_B.tolist() == [s.label for s in stored]
    frames = np.concatenate([decode_jpegs(s.jpegs).reshape(-1) for s in stored])
    assert np.array_equal(batch.frames.numpy(), frames)  # 56x56 fits the patches: nothing is resized
    assert batch.grid_thw == ((2, 4, 4), (2, 4, 4))
    assert batch.weights_B.tolist() == [1.0, 1.0]


def test_texts_are_padded_behind_action_only(encoder: PromptEncoder) -> None:
    rng = np.random.default_rng(0)
    clips = [
        prepare_clip(
            key=str(size),
            label=0,
            frames=rng.integers(0, 255, (4, size, 56, 3), dtype=np.uint8),
            times=[0.0, 0.5, 1.0, 1.5],
            prompt=DEFAULT_PROMPT,
            encoder=encoder,
            max_frames=16,
        )
        for size in (28, 56)
    ]
    batch = collate(clips)
    short, long = (len(clip.text.input_ids) for clip in clips)
    assert batch.action_positions_B.tolist() == [short - 1, long - 1]
    assert batch.input_ids_BL[0, short - 1] == encoder.action_token_id
    padding = batch.input_ids_BL[0, short:]
    assert len(padding) == long - short
    assert not torch.isin(padding, torch.tensor([encoder.action_token_id, encoder.video_token_id])).any()
    assert (batch.input_ids_BL == encoder.action_token_id).sum() == 2


def test_frames_are_thinned_uniformly_and_odd_counts_repeat_the_last(encoder: PromptEncoder) -> None:
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 28, 28, 3), dtype=np.uint8)
    prepared = prepare_clip(
        key="k",
        label=0,
        frames=frames,
        times=[0.25 * i for i in range(9)],
        prompt=DEFAULT_PROMPT,
        encoder=encoder,
        max_frames=3,
    )
    assert prepared.frames[:, 0, 0, 0].tolist() == [1, 4, 7, 7]
    # Frames 1, 4, 7 are 0.75 s apart; a grid step is two frames, 1.5 s, so 3 temporal positions at 2 a second.
    temporal = sorted(set(prepared.text.position_ids[0, prepared.text.input_ids == encoder.video_token_id].tolist()))
    assert temporal[1] - temporal[0] == 3


def test_a_prompt_that_does_not_fit_names_the_clip(small_shards: Path, encoder: PromptEncoder) -> None:
    short = PromptEncoder(encoder.tokenizer, encoder.geometry, encoder.video_token_id, 20, 784, 3136)
    clips = ClipBatches(ShardIndex.open(small_shards), short, prompt=DEFAULT_PROMPT, max_frames=16)
    with pytest.raises(PromptError, match=r"clip 'down_clip_0000'.*needs \d+ tokens .*cutoff_len allows 20"):
        clips[Request((0,))]


def test_a_damaged_shard_stops_the_loader_with_shard_and_key(
    small_shards: Path, encoder: PromptEncoder, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "shards"
    shutil.copytree(small_shards, copy)
    index = ShardIndex.open(copy)
    shard = copy / index.shard_names[0]
    data = bytearray(shard.read_bytes())
    data[int(index.offset[2]) + 600] ^= 1
    shard.write_bytes(data)
    clips = ClipBatches(index, encoder, prompt=DEFAULT_PROMPT, max_frames=16)
    with pytest.raises(ShardError, match=rf"shard-000000.tar.*{index.keys[2]}.*checksum"):
        list(read_batches(clips, [Request((0,)), Request((2,))], workers=1, pin=False))


def test_padding_batches_have_weight_zero(clips: ClipBatches) -> None:
    requests = [evaluation_requests(5, 2, 4, rank) for rank in range(4)]
    assert [len(r) for r in requests] == [1, 1, 1, 1]
    padding = clips[requests[3][0]]
    assert padding.weights_B.tolist() == [0.0]
    assert clips[requests[2][0]].weights_B.tolist() == [1.0]
