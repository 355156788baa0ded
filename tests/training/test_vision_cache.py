"""Stored vision features: what is stored, who may read it, and that training finds what the tower would have given."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.model.test_patches import processor_patches, video_processor  # noqa: F401
from tests.support import launch
from tests.support.shards import make_shards
from tests.support.web import web
from tools.make_random_checkpoint import write_checkpoint
from vidcls.config import ConfigError, config_from_values
from vidcls.data import feature_parts
from vidcls.data.features import FeatureCache, FeatureError
from vidcls.data.frames import Views
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipSource, Request, training_requests
from vidcls.data.order import StepLayout
from vidcls.data.reading import read_batches
from vidcls.data.shards import ShardReader
from vidcls.manifest import StorageError
from vidcls.model.pretrained import build_model
from vidcls.model.tiny import tiny_backbone
from vidcls.model.tower import tower_digest
from vidcls.training import caching
from vidcls.training.caching import cache_features, plan
from vidcls.training.evaluating import EvalClips
from vidcls.training.setup import Run, setup
from vidcls.training.vision_cache import VisionCache

CLIPS, PARTS = 26, 4


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidcls.distributed.start", lambda *limits: None)
    monkeypatch.setattr("vidcls.distributed.world_size", lambda: 1)
    monkeypatch.setattr("vidcls.distributed.rank", lambda: 0)


Values = dict[str, Any]


@pytest.fixture
def recipe(small_shards: Path, tmp_path: Path) -> Values:
    return {
        "model_name_or_path": "tiny",
        "dataset": str(small_shards),
        "vision_cache": str(tmp_path / "features"),
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "lora_rank": 4,
        "bf16": False,
        "dataloader_num_workers": 0,
        "deepspeed": str(launch.ROOT / "ds_configs" / "zero2.json"),
    }


def make(values: Values, **changes: Any) -> None:
    cache_features(plan(config_from_values({**values, **changes})))


def opened(values: Values, **changes: Any) -> Run:
    return setup(config_from_values({**values, **changes}))


def folder_of(values: Values) -> Path:
    (folder,) = [path.parent for path in Path(values["vision_cache"]).glob("*/cache.json")]
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# What is stored


def test_features_are_what_transformers_own_tower_gives(
    recipe: Values,
    small_shards: Path,
    video_processor: Any,  # noqa: F811
) -> None:
    make(recipe)
    index, tower = ShardIndex.open(small_shards), tiny_backbone().visual.eval()
    parts = [load_file(path) for path in sorted(folder_of(recipe).glob("*.safetensors"))]
    assert len(parts) == PARTS
    stored = [clip for part in parts for clip in part["tokens"].tensor_split(part["ends"][:-1])]
    assert len(stored) == CLIPS
    for sample in (0, 7, 8, 25):
        frames = [np.array(Image.open(io.BytesIO(data))) for data in ShardReader(index).read(sample).frames]
        patches, grid = processor_patches(video_processor, [torch.from_numpy(np.stack(frames))])
        with torch.no_grad():
            expected = tower(patches, grid_thw=torch.tensor(grid)).pooler_output
        torch.testing.assert_close(stored[sample], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_logits_and_all_else_are_those_of_frames(recipe: Values, bf16: bool) -> None:
    recipe |= {"bf16": bf16}
    make(recipe)
    cached, plain = opened(recipe), opened(recipe, vision_cache=None)
    model = build_model(cached.spec, cached.encoder, cached.heads, seed=1).eval()
    called: list[int] = []
    model.inner.visual.register_forward_hook(lambda *about: called.append(1))
    request = Request((3, 0, 25, 8), epochs=(0, 0, 1, 2))
    one, other = cached.clips[request], plain.clips[request]
    assert one.keys == other.keys
    assert one.frames.numel() == 0
    for name, tensor in vars(other).items():
        if isinstance(tensor, torch.Tensor) and name != "frames":
            assert torch.equal(getattr(one, name), tensor), name
    with torch.no_grad():
        found = model(**one.model_inputs())
        assert not called
        expected = model(**other.model_inputs())
        assert called
        tolerance = 2e-2 if bf16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        if not bf16:
            rows = torch.cat([model(**one.alone(row).model_inputs()) for row in range(4)])
            torch.testing.assert_close(rows, found, rtol=1e-5, atol=1e-5)
        others = model(**cached.clips[Request((4, 1, 24, 9))].model_inputs())
        assert not torch.allclose(others, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_hand_features_over_unchanged(recipe: Values, workers: int) -> None:
    recipe |= {"bf16": True}
    make(recipe)
    clips = opened(recipe).clips
    requests = [Request((sample, (sample + 5) % CLIPS)) for sample in range(CLIPS)] + [
        Request((1, 2, 3))
    ]  # no slot fits
    for request, batch in zip(requests, read_batches(clips, requests, workers=workers, pin=False), strict=True):
        expected = clips[request]
        assert batch.features_VD is not None
        assert expected.features_VD is not None
        assert batch.features_VD.dtype == torch.bfloat16
        assert torch.equal(batch.features_VD.view(torch.int16), expected.features_VD.view(torch.int16))
        assert torch.equal(batch.clone().input_ids_BL, expected.input_ids_BL)


def test_clips_of_different_sizes_and_answers(recipe: Values, small_shards: Path, tmp_path: Path) -> None:
    videos = small_shards.parent / "videos"
    wide = make_shards(videos, tmp_path / "wide", frames=5, short_side=84)
    del recipe["dataset"]
    recipe |= {"lm_loss_weight": 1.0}
    recipe |= {"datasets": [{"name": "a", "dataset": str(small_shards)}, {"name": "b", "dataset": str(wide)}]}
    make(recipe)
    cached, plain = opened(recipe), opened(recipe, vision_cache=None)
    request = Request((0, 3, 5), (0, 1, 0), epochs=(0, 0, 0))
    one, other = cached.clips[request], plain.clips[request]
    assert one.answer_labels_BL is not None
    assert other.answer_labels_BL is not None
    assert torch.equal(one.answer_labels_BL, other.answer_labels_BL)
    assert torch.equal(one.position_ids_3BL, other.position_ids_3BL)
    model = build_model(cached.spec, cached.encoder, cached.heads, seed=1).eval()
    with torch.no_grad():
        inputs = [{k: v for k, v in b.model_inputs().items() if k != "answer_labels_BL"} for b in (one, other)]
        torch.testing.assert_close(model(**inputs[0]), model(**inputs[1]), rtol=1e-5, atol=1e-5)


def test_shards_behind_a_url_are_not_fetched(recipe: Values, small_shards: Path, tmp_path: Path) -> None:
    make(recipe)
    with web() as served:
        served.files = {path.name: path.read_bytes() for path in small_shards.iterdir()}
        run = opened(recipe, dataset=served.url, cache_dir=str(tmp_path / "cache"), cache_gb=0.1)
        layout = StepLayout(run.plan.global_, run.plan.micro, 1, 0)
        batches = [run.clips[request] for request in training_requests(run.data.order, layout, 0, 7)]
    assert len(batches) == 7
    assert not list((tmp_path / "cache").rglob("*.tar"))


# Who may read it


def test_without_features_the_command_is_named(recipe: Values) -> None:
    with pytest.raises(ConfigError, match=r"vision_cache: data set default: .* has no features.*tools/cache_features"):
        opened(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bf16": True}, 'dtype is "float32" there and "bfloat16" here'),
        ({"video_max_pixels": 784}, "video_max_pixels is 16384 there and 784 here"),
        ({"video_min_pixels": 3136}, "video_min_pixels is 784 there and 3136 here"),
        ({"image_max_pixels": 784}, "image_max_pixels is null there and 784 here"),
        ({"video_maxlen": 2, "temporal_jitter": False}, 'frames is "all" there and "2 from the'),
    ],
)
def test_features_of_other_pixels_are_refused(recipe: Values, changes: Values, message: str) -> None:
    make(recipe)
    with pytest.raises(ConfigError, match=message):
        opened(recipe, **changes)


def test_features_of_another_tower_are_refused(recipe: Values, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "tiny")
    make(recipe, model_name_or_path=str(folder))
    with pytest.raises(ConfigError, match=r'tower is "[0-9a-f]{11}\.\.\. there'):
        opened(recipe)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    before = tower_digest(str(folder))
    language = next(name for name in tensors if "layers.0" in name)
    tensors[language] = tensors[language] + 1
    save_file(tensors, weights)
    assert tower_digest(str(folder)) == before  # another language model has the same features
    opened(recipe, model_name_or_path=str(folder))
    merger = next(name for name in tensors if "merger" in name and tensors[name].ndim == 1)
    tensors[merger].view(torch.uint8)[0] ^= 1
    save_file(tensors, weights)
    with pytest.raises(ConfigError, match=r'tower is "[0-9a-f]{11}\.\.\. there'):
        opened(recipe, model_name_or_path=str(folder))


def test_features_of_other_shards_are_refused(recipe: Values, small_shards: Path, tmp_path: Path) -> None:
    make(recipe)
    again = make_shards(small_shards.parent / "videos", tmp_path / "again", frames=4, short_side=28)
    with pytest.raises(ConfigError, match=r'shards is "[0-9a-f]{11}\.\.\. there'):
        opened(recipe, dataset=str(again))
    make(recipe, dataset=str(again))  # beside the other
    opened(recipe, dataset=str(again))
    opened(recipe)


def test_other_choices_of_the_same_frames_are_no_difference(recipe: Values) -> None:
    make(recipe)
    opened(recipe, video_maxlen=4)
    opened(recipe, video_maxlen=100, temporal_jitter=False, frame_sampling="dense")


def test_jitter_and_a_fixed_choice(recipe: Values) -> None:
    with pytest.raises(
        ConfigError, match=r"temporal_jitter: true .* vision_cache .* up to 4 frames, video_maxlen is 2"
    ):
        make(recipe, video_maxlen=2)
    fixed: Values = {"video_maxlen": 2, "temporal_jitter": False}
    make(recipe, **fixed)
    cached, plain = opened(recipe, **fixed), opened(recipe, **fixed, vision_cache=None)
    model = build_model(cached.spec, cached.encoder, cached.heads, seed=1).eval()
    with torch.no_grad():
        found, expected = (model(**run.clips[Request((3,), epochs=(1,))].model_inputs()) for run in (cached, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r'frames is "2 from the mi'):
        opened(recipe, video_maxlen=2, temporal_jitter=False, frame_sampling="dense")


Change = Callable[[Path], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "part-00002.json").unlink(), "1 of 4 parts .*part-00002.json is missing"),
        (lambda folder: (folder / "part-00001.safetensors").unlink(), "part-00001.safetensors is missing"),
        (lambda folder: os.truncate(folder / "part-00001.safetensors", 900), "part-00001.* is damaged: 900 bytes"),
        (lambda folder: damage(folder / "part-00000.json", 1), "part-00000.json is damaged"),
        (lambda folder: damage(folder / "cache.json", 1), "has no features of|cache.json is damaged"),
        (
            lambda folder: (folder / "cache.json").write_text(
                (folder / "cache.json").read_text().replace('"video_max_pixels": 16384', '"video_max_pixels": 999')
            ),
            "video_max_pixels is 999 there and 16384 here",
        ),
    ],
)
def test_an_incomplete_or_damaged_cache_is_refused_and_made_whole(recipe: Values, change: Change, message: str) -> None:
    make(recipe)
    folder = folder_of(recipe)
    whole = contents(folder)
    change(folder)
    with pytest.raises(ConfigError, match=message):
        opened(recipe)
    if (folder / "cache.json").read_bytes() != whole["cache.json"]:
        with pytest.raises(FeatureError, match=r"cache\.json"):  # never written over: it may be somebody else's
            make(recipe)
        return
    make(recipe)
    assert contents(folder) == whole
    opened(recipe)


@pytest.mark.parametrize("place", [-1, -3000])
def test_a_changed_byte_is_found_when_it_is_read(recipe: Values, place: int) -> None:
    make(recipe)
    folder = folder_of(recipe)
    whole = contents(folder)
    for path in folder.glob("*.safetensors"):
        damage(path, place)
    run = opened(recipe)
    with pytest.raises(FeatureError, match=r"part-\d+\.safetensors"):
        list(map(run.clips.__getitem__, [Request((sample,)) for sample in range(CLIPS)]))
    skipping = opened(recipe, on_bad_sample="skip").clips
    batches = [skipping[Request((sample,))] for sample in range(CLIPS)]
    bad = [batch for batch in batches if batch.bad]
    assert bad
    assert all(batch.weights_B.item() == 0 and not batch.features_VD.any() for batch in bad)  # type: ignore[union-attr]
    make(recipe)
    assert contents(folder) == whole


def test_a_clip_that_cannot_be_read(
    recipe: Values, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = shutil.copytree(small_shards, tmp_path / "shards")
    index = ShardIndex.open(shards)
    damage(shards / index.shards[index.shard[9]].name, int(index.offset[9]) + 700)
    recipe |= {"dataset": str(shards)}
    with pytest.raises(ValueError, match=f"{index.keys[9]}: checksum differs"):
        make(recipe)
    make(recipe, on_bad_sample="skip")
    assert "; 1 clips could not be read" in capsys.readouterr().out
    cached, plain = (opened(recipe, on_bad_sample="skip", **more) for more in ({}, {"vision_cache": None}))
    request = Request((8, 9))
    one, other = cached.clips[request], plain.clips[request]
    assert one.bad == other.bad
    assert one.weights_B.tolist() == [1, 0]
    assert torch.equal(one.position_ids_3BL, other.position_ids_3BL)
    with pytest.raises(ValueError, match=f"{index.keys[9]}: checksum differs"):
        opened(recipe).clips[request]
    seals = [json.loads(path.read_text()) for path in folder_of(recipe).glob("part-*.json")]
    assert sum(seal["bad"] for seal in seals) == 1
    # Whoever wants no bad clip has the part made again, now that the shard is mended.
    shutil.copytree(small_shards, shards, dirs_exist_ok=True)
    make(recipe)
    assert not opened(recipe).clips[request].bad


# Making it


class Killed(BaseException):
    pass


def test_killed_at_any_file_operation_it_goes_on(recipe: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    make(recipe)
    folder = folder_of(recipe)
    whole = contents(folder)
    written: list[int] = []
    write = feature_parts.write_part

    def count(cache: FeatureCache, part: int, *about: Any) -> None:
        written.append(part)
        write(cache, part, *about)

    monkeypatch.setattr("vidcls.training.caching.write_part", count)
    kills = 0
    for name in ("save_file", "fsync", "replace"):
        for call in range(1, 12, 2):
            shutil.rmtree(folder)
            with monkeypatch.context() as patched:
                target = "os.replace" if name == "replace" else f"vidcls.data.feature_parts.{name}"
                patched.setattr(target, _killing(getattr(os if name == "replace" else feature_parts, name), call))
                try:
                    make(recipe)
                except Killed:
                    kills += 1
            sealed = len(list(folder.glob("part-*.json")))
            written.clear()
            make(recipe)
            assert len(written) == PARTS - sealed  # what was done is not done again
            assert contents(folder) == whole
    assert kills > 8


def _killing(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`function` that kills at its call number `call`: before it does anything."""
    calls: list[int] = []

    def run(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return function(*arguments)

    return run


def test_a_full_disk_is_told_before_anything_is_computed(
    recipe: Values, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = CLIPS * 2 * 4 * 128 * 4  # clips x temporal steps x tokens x width x fp32
    usage = shutil.disk_usage(".")._replace(free=needed - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    with pytest.raises(StorageError, match=f"{needed} bytes are needed, {needed - 1} bytes are free"):
        make(recipe)
    assert "26 clips, 0.000106 GB of features (4.1 kB a clip), 4 parts" in capsys.readouterr().out
    assert not list(folder_of(recipe).glob("part-*"))


def test_ranks_make_disjoint_parts(recipe: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks one after the other, the main rank last, since it waits for the other."""
    make(recipe)
    whole = contents(folder_of(recipe))
    for path in folder_of(recipe).glob("part-*"):
        path.unlink()
    made: list[set[str]] = []
    monkeypatch.setattr("vidcls.distributed.world_size", lambda: 2)
    monkeypatch.setattr("vidcls.distributed.gather_objects", lambda value, group=None: [value, value])
    monkeypatch.setattr(
        "vidcls.training.caching._missing",
        lambda caches, **how: [caching._Job(0, part) for part in range(PARTS)],
    )
    for rank in (1, 0):
        monkeypatch.setattr("vidcls.distributed.rank", lambda rank=rank: rank)
        before = {path.name for path in folder_of(recipe).glob("part-*.json")}
        make(recipe)
        made.append({path.name for path in folder_of(recipe).glob("part-*.json")} - before)
    assert [len(each) for each in made] == [2, 2]
    assert contents(folder_of(recipe)) == whole


def test_evaluation_reads_features_where_they_are(
    recipe: Values,
    small_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe |= {"eval_strategy": "steps", "eval_steps": 2, "val_size": 5}
    make(recipe)

    def stored(**changes: Any) -> list[bool]:
        run = opened(recipe, **changes)
        assert run.evaluations is not None
        return [each.sources[0].features is not None for each in run.evaluations.batches.values()]

    assert stored() == [True]
    assert stored(views={"crops": 3}) == [False]
    other = make_shards(small_shards.parent / "videos", tmp_path / "eval", frames=4, short_side=56, samples_per_shard=3)
    assert stored(val_size=0.0, eval_dataset=str(other)) == [False]
    assert "default is evaluated from its frames" in capsys.readouterr().out
    make(recipe, val_size=0.0, eval_dataset=str(other))
    assert stored(val_size=0.0, eval_dataset=str(other)) == [True]
    # One rank's host lacks them: no rank reads any, since under ZeRO-3 all call the tower or none does.
    run, index = opened(recipe), ShardIndex.open(small_shards)
    cache = VisionCache.of(run.config, run.spec)
    assert cache is not None
    monkeypatch.setattr("vidcls.distributed.gather_objects", lambda value, group=None: [value, [False]])
    (clips,) = cache.evaluation([EvalClips("default", ClipSource(index, "", features=cache.complete(index)))], Views())
    assert clips.source.features is None
