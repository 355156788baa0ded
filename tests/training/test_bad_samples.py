"""Training goes on without clips that cannot be read, exactly as if they had no label, up to a limit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from tests.support import launch
from tests.support.launch import Finished
from tests.support.shards import clip_batches
from vidcls.data.index import ShardIndex
from vidcls.data.loader import Request
from vidcls.data.order import SampleOrder
from vidcls.model.heads import ActionDecoder
from vidcls.model.pretrained import build_encoder, build_model, read_spec

pytestmark = pytest.mark.launch

BATCH, SEED = 8, 7
RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_dropout": 0.0,
    "train_batch_size": BATCH,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "logging_steps": 1,
    "save_steps": 5,
    "bf16": False,
    "plot_loss": False,
    "report_to": "none",
    "seed": SEED,
    "on_bad_sample": "skip",
    "deepspeed": "ds_configs/zero2.json",
}


@pytest.fixture(scope="module")
def damaged(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The small shards, and the samples of them that cannot be read: one of the first step, and one of the third."""
    folder = shutil.copytree(small_shards, tmp_path_factory.mktemp("damaged") / "shards")
    index = ShardIndex.open(folder)
    order = SampleOrder(len(index), SEED)
    samples = [order.at(3)[1], order.at(2 * BATCH + 5)[1]]
    for sample in samples:
        path = folder / index.shards[index.shard[sample]].name
        data = bytearray(path.read_bytes())
        data[int(index.offset[sample]) + 700] ^= 1
        path.write_bytes(data)
    return folder, samples


@pytest.fixture(scope="module")
def finished(damaged: tuple[Path, list[int]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """2 of 26 clips are bad: the run "goes_on" may skip so many, the run "stops" may not."""
    top = tmp_path_factory.mktemp("runs")
    recipes = []
    for name, share in (("goes_on", 0.08), ("stops", 0.07)):
        values = {**RECIPE, "dataset": str(damaged[0]), "output_dir": str(top / name), "max_bad_samples": share}
        recipes.append(top / f"{name}.yaml")
        recipes[-1].write_text(yaml.safe_dump(values), encoding="utf-8")
    return top, launch.deepspeed(2, "tests/support/trainings.py", *recipes, log=top / "log")


def log_rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]


def test_bad_clips_are_counted_over_ranks_and_named_once(
    finished: tuple[Path, Finished], damaged: tuple[Path, list[int]]
) -> None:
    top, done = finished
    # Five steps of eight read 40 clips, an epoch has 26: both come twice, each time to the same rank, and count once.
    assert [row["bad_samples"] for row in log_rows(top / "goes_on")] == [1, 1, 2, 2, 2]
    assert (top / "goes_on" / "checkpoint-5").is_dir()
    before, _ = done.output.split("recipe " + str(top / "stops.yaml"), 1)
    index = ShardIndex.open(damaged[0])
    for sample in damaged[1]:
        said = [line for line in before.splitlines() if "clip skipped" in line and index.keys[sample] in line]
        assert len(said) == 1
        assert "checksum differs" in said[0]


def test_every_good_clip_keeps_its_share_of_the_gradient(
    finished: tuple[Path, Finished], small_shards: Path, damaged: tuple[Path, list[int]]
) -> None:
    spec = read_spec(finished[0] / "goes_on" / "checkpoint-5")
    index, encoder = ShardIndex.open(small_shards), build_encoder(spec)
    model = build_model(spec, encoder, {"default": ActionDecoder(128, len(index.labels), seed=SEED)}, seed=SEED)
    order = SampleOrder(len(index), SEED)
    samples = tuple(order.at(position)[1] for position in range(BATCH))
    batch = clip_batches(index, encoder).read(Request(samples))
    good = torch.tensor([sample not in damaged[1] for sample in samples])
    assert int(good.sum()) == BATCH - 1
    losses_B = F.cross_entropy(model.train()(**batch.model_inputs()), batch.labels_B, reduction="none")
    loss = losses_B[good].sum() / BATCH
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    row = log_rows(finished[0] / "goes_on")[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_too_many_bad_clips_end_the_run(finished: tuple[Path, Finished], damaged: tuple[Path, list[int]]) -> None:
    top, done = finished
    assert done.code != 0
    assert "RuntimeError: 2 clips could not be read, max_bad_samples allows 1 of this data set" in done.output
    key = ShardIndex.open(damaged[0]).keys[damaged[1][1]]
    assert f"{key}: checksum differs" in done.output.split("max_bad_samples allows")[1]
    assert [row["step"] for row in log_rows(top / "stops")] == [1, 2]
    assert not list((top / "stops").glob("checkpoint-*"))
