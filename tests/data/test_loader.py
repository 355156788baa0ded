"""Batches: the same at any worker and rank count, and what the model is promised about them."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.forgery import forge_sample
from tests.support.shards import clip_batches, make_shards
from tests.support.web import web
from tools.make_motion_clips import write_video
from vidcls.data import loader, reading
from vidcls.data.augment import AugmentSettings
from vidcls.data.background import SCHED_IDLE
from vidcls.data.batch import Batch, collate, prepare_clip
from vidcls.data.codecs import FrameError, decode_frames
from vidcls.data.frames import Views, jittered, view
from vidcls.data.index import ShardError, ShardIndex
from vidcls.data.joint import JointOrder
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice, Request, evaluation_requests, training_requests
from vidcls.data.order import ShardWindow, StepLayout
from vidcls.data.places import CacheSettings, LocalFolder
from vidcls.data.reading import read_batches
from vidcls.data.shards import ShardReader, StoredSample
from vidcls.model.patches import VisionGeometry
from vidcls.model.prompt import PromptEncoder
from vidcls.model.tiny import tiny_config, tiny_tokenizer
from vidcls.options import DEFAULT_PROMPT
from vidcls.prompts import PromptError


def byte_encoder() -> PromptEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<ACTION>"]})
    config = tiny_config()
    return PromptEncoder(tokenizer, VisionGeometry.from_config(config), config.video_token_id, 512, 784, 3136)


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return byte_encoder()


@pytest.fixture
def clips(small_shards: Path, encoder: PromptEncoder) -> ClipBatches:
    return clip_batches(ShardIndex.open(small_shards), encoder, 16)


def same(a: Batch, b: Batch) -> bool:
    fields = [f.name for f in dataclasses.fields(a) if isinstance(getattr(a, f.name), torch.Tensor)]
    return (
        a.keys == b.keys and a.grid_thw == b.grid_thw and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)
    )


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_do_not_depend_on_the_worker_count(clips: ClipBatches, workers: int) -> None:
    requests = list(training_requests(JointOrder.single(26, 1), StepLayout(6, 3, 1, 0), 0, 6))
    alone = list(read_batches(clips, requests, workers=0, pin=False))
    # All of them kept, which is more than there is shared memory for.
    shared = list(read_batches(clips, requests, workers=workers, pin=False))
    assert len(alone) == 12
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    # And each dropped before the next, which uses the same memory over and over.
    for one, batch in zip(alone, read_batches(clips, requests, workers=workers, pin=False), strict=True):
        assert same(one, batch)


def has_leisure() -> bool:
    """Whether a thread of the one loader worker leaves the cores to others."""
    (worker,) = multiprocessing.active_children()
    threads = os.listdir(f"/proc/{worker.pid}/task")
    return any(os.sched_getscheduler(int(thread)) == SCHED_IDLE for thread in threads)


@pytest.mark.skipif(SCHED_IDLE is None, reason="SCHED_IDLE is Linux's")
@pytest.mark.parametrize("pin", [False, True])
def test_workers_leave_the_cores_to_a_rank_that_computes_on_them(
    clips: ClipBatches, monkeypatch: pytest.MonkeyPatch, pin: bool
) -> None:
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)  # it needs a GPU
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 60.0)  # for other processes of the machine
    monkeypatch.setattr(reading, "LATE_SECONDS", 60.0)
    batches = read_batches(clips, [Request((0,))] * 9, workers=1, pin=pin)
    for _ in range(3):
        next(batches)
    assert has_leisure() == (not pin)
    assert (batches._background is None) == pin
    batches.close()


def test_workers_hurry_when_a_rank_waits_for_them(clips: ClipBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    now = without_core = 0.0
    monkeypatch.setattr(reading.time, "perf_counter", lambda: now)
    monkeypatch.setattr(reading, "seconds_without_core", lambda: without_core)
    batches = read_batches(clips, [Request((0,))] * 99, workers=1, pin=False)
    background = batches._background
    assert background is not None

    def after(computed: float, waited: float, held_up: float = 0.0) -> bool:
        """Whether workers hurry after a batch that was asked for `computed` seconds after the last, `held_up` of them
        without a core, and waited for."""
        nonlocal now, without_core
        now += computed
        without_core += held_up

        def late() -> Batch:
            nonlocal now
            now += waited
            return next(read)

        batches._batches = iter(late, None)
        next(batches)
        return background.hurried

    read = batches._batches
    assert not after(0.0, 100.0)  # a start is a wait, whatever workers do
    assert not any(after(36.0, 3.0, held_up=3.0) for _ in range(20))
    assert not after(36_000.0, 0.0)
    # Then somebody else takes the cores.
    assert [after(0.1, 0.9) for _ in range(3)] == [False, False, True]
    background._hurry_until[0] = 0.0  # a minute later
    assert not any(after(1.0, 0.0, held_up=0.1) for _ in range(30))
    assert [after(1.0, 0.0, held_up=0.5) for _ in range(5)][-1]
    batches._batches = read
    batches.close()


def test_a_read_that_finds_no_core_is_done_again(clips: ClipBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot is not used again, for the first reading is still under way."""
    requests = list(training_requests(JointOrder.single(26, 1), StepLayout(6, 3, 1, 0), 0, 6))
    alone = list(read_batches(clips, requests, workers=0, pin=False))
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 0.2)
    read = ClipBatches.read

    def starved(self: ClipBatches, request: Request, into: np.ndarray | None = None) -> Batch:
        if threading.current_thread() is not threading.main_thread():
            for _ in range(30):
                time.sleep(0.1)
                assert into is not None
                into[:] = 7
        return read(self, request, into)

    monkeypatch.setattr(ClipBatches, "read", starved)
    batches = read_batches(clips, requests, workers=1, pin=False)
    assert all(same(a, b) for a, b in zip(alone, batches, strict=True))


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_worker_goes_on_when_others_signal_it(clips: ClipBatches, name: str) -> None:
    requests = list(training_requests(JointOrder.single(26, 1), StepLayout(6, 3, 1, 0), 0, 6))
    batches = read_batches(clips, requests, workers=1, pin=False)
    (worker,) = multiprocessing.active_children()
    first = next(batches)
    subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len([first, *batches]) == 12


def test_an_error_ends_a_rank_that_still_has_workers(small_shards: Path) -> None:
    """As the interpreter ends they are terminated and waited for."""
    script = f"""
    from pathlib import Path
    from tests.data import test_loader
    from tests.support.shards import clip_batches
    index = test_loader.ShardIndex.open(Path({str(small_shards)!r}))
    clips = clip_batches(index, test_loader.byte_encoder(), 16)
    batches = test_loader.read_batches(clips, [test_loader.Request((0,))] * 99, workers=2, pin=False)
    print(next(batches).keys, flush=True)
    raise ValueError("after a batch")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: after a batch\n")
    assert done.stdout.startswith("('")


def pixel_digest(frames: np.ndarray) -> str:
    return hashlib.sha256(frames.tobytes()).hexdigest()


def global_stream(
    clips: ClipBatches, order: JointOrder, *, world: int, workers: int, first: int, last: int
) -> list[tuple[str, str]]:
    """(key, digest of the pixels) of the clips of steps [first, last) of 12, in the order of all ranks' shares."""
    per_rank = []
    for rank in range(world):
        requests = training_requests(order, StepLayout(12, 1, world, rank), first, last)
        batches = read_batches(clips, requests, workers=workers, pin=False)
        per_rank.append([(batch.keys[0], pixel_digest(batch.frames.numpy())) for batch in batches])
    share = 12 // world
    return [
        clip for step in range(last - first) for read in per_rank for clip in read[step * share : (step + 1) * share]
    ]


@pytest.mark.parametrize("shards", [None, 1, 2])
def test_the_stream_is_the_same_on_any_ranks_and_workers_and_after_a_resume(
    small_shards: Path, encoder: PromptEncoder, shards: int | None
) -> None:
    index = ShardIndex.open(small_shards)
    assert len(index.shards) == 3
    clips = clip_batches(index, encoder, 2, seed=1)
    order = JointOrder.single(26, 1, None if shards is None else ShardWindow(index.shard, shards))
    straight = global_stream(clips, order, world=1, workers=0, first=0, last=5)
    reader = ShardReader(index)
    for position, (key, digest) in enumerate(straight):
        epoch, sample = order.at(position).epoch, order.at(position).sample
        frames = decode_frames(reader.read(sample).frames, "jpg", 56, 56)
        assert (key, digest) == (index.keys[sample], pixel_digest(frames[jittered(4, 2, 1, epoch, sample)]))
    assert sorted(key for key, _ in straight[:26]) == sorted(index.keys)
    for world, workers in ((2, 1), (3, 2), (6, 0), (4, 4)):
        head = global_stream(clips, order, world=world, workers=workers, first=0, last=2)
        assert head == straight[:24], (world, workers)
    tail = global_stream(clips, order, world=2, workers=3, first=2, last=5)
    assert tail == straight[24:]


def test_a_run_resumed_at_a_step_reads_the_tail_of_the_straight_one(clips: ClipBatches) -> None:
    layout, order = StepLayout(8, 2, 2, 1), JointOrder.single(26, 5)
    straight = list(training_requests(order, layout, 0, 10))
    assert list(training_requests(order, layout, 4, 10)) == straight[4 * layout.accumulation :]


def test_frames_and_labels_are_those_of_the_shards(clips: ClipBatches) -> None:
    batch = clips.read(Request((3, 17)))
    reader = ShardReader(clips.sources[0].index)
    stored = [reader.read(3), reader.read(17)]
    assert batch.keys == tuple(s.about.key for s in stored)
    assert batch.labels_B.tolist() == [s.about.label for s in stored]
    frames = np.concatenate([decode_frames(s.frames, "jpg", 56, 56).reshape(-1) for s in stored])
    assert np.array_equal(batch.frames.numpy(), frames)  # 56x56 fits the patches: nothing is resized
    assert batch.grid_thw == ((2, 4, 4), (2, 4, 4))
    assert batch.weights_B.tolist() == [1.0, 1.0]


def test_training_takes_other_frames_each_epoch_and_evaluation_the_view_it_asks_for(
    small_shards: Path, encoder: PromptEncoder
) -> None:
    index = ShardIndex.open(small_shards)
    decoded = decode_frames(ShardReader(index).read(5).frames, "jpg", 56, 56)

    def read(request: Request, jitter: bool = True, **options: Any) -> np.ndarray:
        clips = clip_batches(index, encoder, 2, seed=9, jitter=jitter, **options)
        return clips.read(request).frames.numpy()

    epochs = [read(Request((5,), epochs=(epoch,))) for epoch in range(8)]
    for epoch, frames in enumerate(epochs):
        assert np.array_equal(frames, decoded[jittered(4, 2, 9, epoch, 5)].reshape(-1))
    assert len({frames.tobytes() for frames in epochs}) > 1
    middle = decoded[[1, 3]].reshape(-1)
    assert np.array_equal(read(Request((5,), epochs=(3,)), jitter=False), middle)
    assert np.array_equal(read(Request((5,))), middle)
    for number in range(2):
        expected = decoded[view(4, 2, number, 2)].reshape(-1)
        assert np.array_equal(read(Request((5,), segment=number), views=Views(segments=2)), expected)
    assert np.array_equal(read(Request((5,)), views=Views(control="single")), decoded[[3, 3]].reshape(-1))
    training = Request((5,), epochs=(0,))  # which no control concerns
    assert np.array_equal(read(training, views=Views(control="single")), epochs[0])


def test_crops_are_squares_along_the_longer_side(encoder: PromptEncoder, tmp_path: Path) -> None:
    (tmp_path / "videos" / "a").mkdir(parents=True)
    pictures = np.random.default_rng(0).integers(256, size=(8, 64, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "videos" / "a" / "clip.mp4", pictures)
    index = ShardIndex.open(make_shards(tmp_path / "videos", tmp_path / "shards", frames=4, short_side=56))
    height, width = int(index.height[0]), int(index.width[0])
    assert height == 56 < width
    decoded = decode_frames(ShardReader(index).read(0).frames, "jpg", height, width)
    clips = clip_batches(index, encoder, 4, views=Views(crops=3))
    for number, left in enumerate((0, (width - 56) // 2, width - 56)):
        batch = clips.read(Request((0,), crop=number))
        assert batch.grid_thw == ((2, 4, 4),)
        assert np.array_equal(batch.frames.numpy(), decoded[:, :, left : left + 56].reshape(-1))
    assert clips.read(Request((0,))).grid_thw != ((2, 4, 4),)


def test_shuffled_frames_keep_their_times(small_shards: Path, encoder: PromptEncoder) -> None:
    """What the model is told of the time is the same; only what it sees is not."""
    index = ShardIndex.open(small_shards)
    plain = clip_batches(index, encoder, 4)
    shuffled = clip_batches(index, encoder, 4, views=Views(control="shuffled"))
    moved = 0
    for sample in range(6):
        first, second = (clips.read(Request((sample,))) for clips in (plain, shuffled))
        assert torch.equal(first.position_ids_3BL, second.position_ids_3BL)
        before, after = (batch.frames.view(4, -1) for batch in (first, second))
        assert sorted(frame.sum() for frame in before) == sorted(frame.sum() for frame in after)
        moved += not torch.equal(before, after)
    assert moved > 2


def test_frames_that_are_not_used_are_not_decoded(small_shards: Path, encoder: PromptEncoder, tmp_path: Path) -> None:
    folder = shutil.copytree(small_shards, tmp_path / "shards")
    forge_sample(folder, spoil_frame(0))
    index = ShardIndex.open(folder)
    assert clip_batches(index, encoder, 2).read(Request((0,))).bad == ()
    with pytest.raises(FrameError, match=rf"shard-000000.tar: {index.keys[0]}: frame 0: "):
        clip_batches(index, encoder, 4).read(Request((0,)))


def spoil_frame(number: int) -> Callable[[bytes], bytes]:
    """A JPEG whose first bytes are gone, with a checksum that says so."""

    def change(tar: bytes) -> bytes:
        start = -1
        for _ in range(number + 1):
            start = tar.index(b"\xff\xd8\xff", start + 1)
        return tar[:start] + b"\0\0\0" + tar[start + 3 :]

    return change


def flip_a_bit(folder: Path, sample: int) -> None:
    index = ShardIndex.open(folder)
    path = folder / index.shards[index.shard[sample]].name
    data = bytearray(path.read_bytes())
    data[int(index.offset[sample]) + 600] ^= 1
    path.write_bytes(data)


def test_a_clip_that_cannot_be_read_is_skipped_and_changes_nothing_else(
    small_shards: Path, encoder: PromptEncoder, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_shards, tmp_path / "shards")
    forge_sample(folder, spoil_frame(2))
    flip_a_bit(folder, 12)
    index = ShardIndex.open(folder)
    (folder / index.shards[2].name).unlink()
    request = Request((0, 3, 12, 25, 4), epochs=(0,) * 5)
    whole = clip_batches(ShardIndex.open(small_shards), encoder, skip_bad=True).read(request)
    for workers in (0, 2):
        (batch,) = read_batches(clip_batches(index, encoder, skip_bad=True), [request], workers=workers, pin=False)
        assert batch.weights_B.tolist() == [0.0, 1.0, 0.0, 0.0, 1.0]
        assert batch.labels_B.tolist() == [
            label * int(w) for label, w in zip(whole.labels_B, batch.weights_B, strict=True)
        ]
        assert (batch.keys, batch.grid_thw) == (whole.keys, whole.grid_thw)
        assert batch.input_ids_BL.shape == whole.input_ids_BL.shape
        frames, expected = batch.frames.view(5, -1), whole.frames.view(5, -1)
        assert [int(row.max()) for row in frames[[0, 2, 3]]] == [0, 0, 0]
        assert torch.equal(frames[[1, 4]], expected[[1, 4]])
        assert [key for key, _ in batch.bad] == [f"0/{index.keys[i]}" for i in (0, 12, 25)]
        for (key, reason), word in zip(batch.bad, ("frame 2", "checksum", "cannot be opened"), strict=True):
            assert key.removeprefix("0/") in reason
            assert word in reason


def test_evaluation_stops_at_a_clip_that_cannot_be_read(
    small_shards: Path, encoder: PromptEncoder, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_shards, tmp_path / "shards")
    flip_a_bit(folder, 2)
    index = ShardIndex.open(folder)
    clips = clip_batches(index, encoder, 16)
    requests = evaluation_requests(index, 4, 1, 0)
    with pytest.raises(ShardError, match=rf"shard-000000.tar.*{index.keys[2]}.*checksum"):
        list(read_batches(clips, requests, workers=1, pin=False))


@pytest.mark.launch
@pytest.mark.parametrize("held", [2, 3])
def test_shards_of_a_url_are_fetched_before_they_are_needed(
    small_shards: Path, encoder: PromptEncoder, tmp_path: Path, held: int
) -> None:
    """Through a cache that holds two or all of the three, the stream is that of local shards."""
    with web() as served:
        served.files = {path.name: path.read_bytes() for path in small_shards.iterdir()}
        sizes = [path.stat().st_size for path in small_shards.glob("*.tar")]
        cache = CacheSettings(folder=tmp_path / "cache", max_bytes=sum(sorted(sizes)[-held:]))
        index = ShardIndex.open(served.url, cache)
        clips = clip_batches(index, encoder, 16)
        order = JointOrder.single(26, 1, ShardWindow(index.shard, 1))
        requests = list(training_requests(order, StepLayout(2, 2, 1, 0), 0, 13))
        local = clip_batches(ShardIndex.open(small_shards), encoder, 16)
        batches = read_batches(clips, requests, workers=2, pin=False)
        assert batches._background is None
        remote = list(batches)
        assert all(same(a, b) for a, b in zip(remote, map(local.read, requests), strict=True))
        asked = {name: count for name, count in served.requests.items() if name.endswith(".tar")}
        assert set(asked) == {shard.name for shard in index.shards}
        if held == 3:  # of two, one is forgotten while the slower worker still reads it: how often is chance
            assert set(asked.values()) == {1}


def test_each_change_of_shards_to_fetch_is_announced_once(small_shards: Path, encoder: PromptEncoder) -> None:
    index = ShardIndex.open(small_shards)
    announced: list[list[tuple[str, int, str]]] = []

    class Folder(LocalFolder):
        def prefetch(self, files: Iterable[tuple[str, int, str]]) -> None:
            announced.append(list(files))

    heard = dataclasses.replace(index, folder=Folder(small_shards))
    clips = clip_batches(heard, encoder, 1)
    order = JointOrder.single(26, 1, ShardWindow(index.shard, 2))
    for request in training_requests(order, StepLayout(1, 1, 1, 0), 0, 26):
        clips.read(request)
    shards = [(shard.name, shard.bytes, shard.sha256) for shard in index.shards]
    first, second = (shards[i] for _, i in order.shards_ahead(0))
    (third,) = {*shards} - {first, second}
    assert announced[:2] == [[first, second], [first, second, third]]
    assert announced[2][0] == third
    assert len(announced) == 4


def test_each_worker_begins_with_its_own_shards(
    small_shards: Path, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ShardIndex.open(small_shards)
    announced: list[list[str]] = []

    class Folder(LocalFolder):
        def prefetch(self, files: Iterable[tuple[str, int, str]]) -> None:
            announced.append([name for name, _, _ in files])

    names = [shard.name for shard in index.shards]
    assert len(names) == 3
    for number in range(2):
        monkeypatch.setattr(loader, "worker_place", lambda number=number: (number, 2))
        clips = clip_batches(dataclasses.replace(index, folder=Folder(small_shards)), encoder, 1)
        clips.read(Request((0,), ahead=((0, 0), (0, 1), (0, 2))))
    assert announced == [[names[0], names[2], names[1]], [names[1], names[0], names[2]]]


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


def test_a_batch_knows_what_all_its_prompts_begin_with(encoder: PromptEncoder) -> None:
    def batch(*prompts: str) -> Batch:
        frames = np.zeros((2, 28, 28, 3), dtype=np.uint8)
        fixed = {"label": 0, "frames": frames, "times": [0.0, 0.25], "encoder": encoder, "max_frames": 16}
        return collate([prepare_clip(key=prompt, prompt=prompt, **fixed) for prompt in prompts])

    def start(text: str) -> int:
        return len(encoder.tokenizer.encode(f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{text}"))

    fork = "<|im_start|>user\n"
    for prompts, wanted in {
        # All of it up to the video, whose tokens and positions are alike too.
        ("See: <video> Which? <ACTION>",) * 3: f"{fork}See: <|vision_start|>",
        ("See: <video> <ACTION>", "Sea: <video> <ACTION>"): f"{fork}Se",
        ("<video> <ACTION>", "See: <video> <ACTION>"): fork,
    }.items():
        found = batch(*prompts)
        assert found.prefix == start(wanted), prompts
        assert (found.input_ids_BL[:, : found.prefix] == found.input_ids_BL[0, : found.prefix]).all()
        assert (found.position_ids_3BL[..., : found.prefix] == torch.arange(found.prefix)).all()
        assert found.model_inputs()["prefix"] == found.prefix
        assert found.alone(1).prefix == 0
    assert batch("<video> <ACTION>").prefix == 0


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
    clips = clip_batches(ShardIndex.open(small_shards), short, 16)
    with pytest.raises(PromptError, match=r"clip 'down_clip_0000'.*needs \d+ tokens .*cutoff_len allows 20"):
        clips.read(Request((0,)))


def test_padding_batches_have_weight_zero(clips: ClipBatches) -> None:
    requests = [evaluation_requests(clips.sources[0].index, 8, 5, rank) for rank in range(5)]
    assert [len(r) for r in requests] == [1, 1, 1, 1, 1]
    padding = clips.read(requests[4][0])
    assert padding.weights_B.tolist() == [0.0]
    assert clips.read(requests[3][0]).weights_B.tolist() == [1.0, 1.0]


def answering(
    index: ShardIndex,
    encoder: PromptEncoder,
    answers: dict[int, str],
    mirror: list[int] | None,
    prompt: str = DEFAULT_PROMPT,
) -> ClipBatches:
    """All clips flipped, some samples with an answer of their own."""
    source = ClipSource(
        index,
        prompt,
        augment=AugmentSettings(horizontal_flip=1.0),
        mirror=None if mirror is None else np.array(mirror),
        ids=np.arange(len(index)),
    )
    clips = ClipBatches([source], encoder, FrameChoice(2), answers=True)
    stored = clips._readers[0].read

    def read(sample: int) -> StoredSample:
        found = stored(sample)
        return dataclasses.replace(found, about=found.about.model_copy(update={"answer": answers.get(sample)}))

    clips._readers[0].read = read  # type: ignore[method-assign]
    return clips


def said(batch: Batch, encoder: PromptEncoder) -> list[str]:
    assert batch.answer_labels_BL is not None
    rows = [[i for i in row if i >= 0] for row in batch.answer_labels_BL.tolist()]
    return [encoder.tokenizer.decode(row).removesuffix("<|im_end|>") for row in rows]


@pytest.mark.parametrize(
    ("mirror", "answer", "label", "expected"),
    [
        ([3, 1, 2, 0], "down", 3, "up"),  # the old class's name
        ([3, 1, 2, 0], "It sinks.", 3, "up"),  # no side to swap
        ([3, 1, 2, 0], "It sinks to the left.", 3, "It sinks to the right."),
        ([0, 2, 1, 3], "It sinks to the left.", 0, "It sinks to the right."),
        ([0, 2, 1, 3], "It sinks.", 0, "It sinks."),
        ([2, 1, 0, 3], "down", 2, "right"),
        ([0, -1, 2, 3], "The right one.", 0, "The right one."),  # no class has a partner
        (None, "The right one.", 0, "The right one."),
    ],
)
def test_the_answer_of_a_flipped_clip_does_not_contradict_its_label(
    small_shards: Path, encoder: PromptEncoder, mirror: list[int] | None, answer: str, label: int, expected: str
) -> None:
    index = ShardIndex.open(small_shards)
    assert index.labels.names == ("down", "left", "right", "up")
    batch = answering(index, encoder, {0: answer}, mirror).read(Request((0,), epochs=(0,)))
    assert batch.labels_B.tolist() == [label]
    assert said(batch, encoder) == [expected]


@pytest.mark.parametrize(("mirror", "word"), [([0, 2, 1, 3], "left"), ([0, -1, -1, 3], "right"), (None, "right")])
def test_prompts_are_swapped_only_where_classes_are(
    small_shards: Path, encoder: PromptEncoder, mirror: list[int] | None, word: str
) -> None:
    prompt = "<video>Choose the right action. <ACTION>"
    clips = answering(ShardIndex.open(small_shards), encoder, {}, mirror, prompt)
    batch = clips.read(Request((0,), epochs=(0,)))
    assert f"Choose the {word} action." in encoder.tokenizer.decode(batch.input_ids_BL[0])


def test_an_answer_that_is_too_long_gives_way_to_the_class_name(small_shards: Path, encoder: PromptEncoder) -> None:
    clips = answering(ShardIndex.open(small_shards), encoder, {0: "word " * 600, 1: "It sinks."}, [3, 1, 2, 0])
    batch = clips.read(Request((0, 1), epochs=(0, 0)))
    assert said(batch, encoder) == ["up", "up"]
    assert said(answering(clips.sources[0].index, encoder, {0: "word " * 600}, None).read(Request((0,))), encoder) == [
        "down"
    ]


def mixing(index: ShardIndex, encoder: PromptEncoder, *, apart: bool = False, sources: int = 1) -> ClipBatches:
    augment = AugmentSettings(mixup_alpha=1.0)
    source = ClipSource(index, DEFAULT_PROMPT, augment=augment, ids=np.arange(len(index)), shards_apart=apart)
    return ClipBatches([source] * sources, encoder, FrameChoice(4), skip_bad=True)


def test_a_partner_that_cannot_be_read_leaves_a_clip_unmixed(
    small_shards: Path, encoder: PromptEncoder, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_shards, tmp_path / "shards")
    flip_a_bit(folder, 12)
    everything = tuple(range(26))
    whole = mixing(ShardIndex.open(small_shards), encoder)
    damaged = mixing(ShardIndex.open(folder), encoder)
    plain = clip_batches(ShardIndex.open(small_shards), encoder, 4).read(Request(everything)).frames.view(26, -1)
    changed = set()
    for epoch in range(4):
        request = Request(everything, epochs=(epoch,) * 26)
        expected, found = whole.read(request), damaged.read(request)
        assert [key for key, _ in found.bad] == [f"0/{found.keys[12]}"]
        assert found.weights_B.tolist() == [float(sample != 12) for sample in everything]
        for sample in set(everything) - {12}:
            frames, wanted = found.frames.view(26, -1)[sample], expected.frames.view(26, -1)[sample]
            if not torch.equal(frames, wanted):
                changed.add(sample)
                assert torch.equal(frames, plain[sample])
                assert found.shares_B[sample] == 0
                assert found.labels_B[sample] == expected.labels_B[sample]
    assert changed, "somebody's partner"


def test_bad_clips_of_equal_keys_in_two_data_sets_are_told_apart(
    small_shards: Path, encoder: PromptEncoder, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_shards, tmp_path / "shards")
    flip_a_bit(folder, 12)
    index = ShardIndex.open(folder)
    batch = mixing(index, encoder, sources=2).read(Request((12, 12), sources=(0, 1), epochs=(0, 0)))
    assert [key for key, _ in batch.bad] == [f"0/{index.keys[12]}", f"1/{index.keys[12]}"]
    assert batch.keys == (index.keys[12],) * 2


def test_partners_within_a_shard_are_drawn_for_each_clip(small_shards: Path, encoder: PromptEncoder) -> None:
    """Clips at the same place of several shards do not share how they are mixed."""
    index = ShardIndex.open(small_shards)
    clips = mixing(index, encoder, apart=True)
    batch = clips.read(Request(tuple(range(26)), epochs=(0,) * 26))
    shares = batch.shares_B.tolist()
    assert len({*zip(shares[:10], shares[10:20], strict=True)}) == 10
    assert sum(a != b for a, b in zip(shares[:10], shares[10:20], strict=True)) >= 9
    for sample in range(26):
        (row,) = clips._rows(Request((sample,), epochs=(0,)))
        assert clips._partners(row).tolist() == np.flatnonzero(index.shard == index.shard[sample]).tolist()


@pytest.mark.parametrize(
    ("ids", "micro", "ahead"),
    [
        (None, 10, [(0, 1), (1, 2), (2,)]),
        (None, 2, [(0, 1)] * 4 + [(0, 1)] + [(1, 2)] * 5 + [(2,)] * 3),
        ([0, 1, 25], 1, [(0, 2), (0, 2), (2,)]),
        ([3, 12, 25], 1, [(0, 1), (1, 2), (2,)]),
        ([0, 25], 2, [(0, 2)]),
    ],
)
def test_evaluation_announces_the_shards_that_it_needs(
    small_shards: Path, ids: list[int] | None, micro: int, ahead: list[tuple[int, ...]]
) -> None:
    index = ShardIndex.open(small_shards)
    requests = evaluation_requests(index, micro, 1, 0, None if ids is None else np.array(ids))
    assert [tuple(shard for _, shard in request.ahead) for request in requests] == ahead
