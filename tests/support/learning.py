"""Short trainings through the public way, and what their checkpoints say of held-out clips."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.support import launch
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource, Request
from vidcls.data.settings import DecodeSettings
from vidcls.evaluation.evaluate import Prediction, predict_batches
from vidcls.evaluation.heads import frame_choice, head_for_labels, read_heads
from vidcls.model.pretrained import load_model
from vidcls.sharding.readers.folder import read_folder
from vidcls.sharding.writer import Plan, write_shards

QUICKSTART = "launch/recipes/quickstart.yaml"
BATCH = 16
QUIET = {"report_to": "none", "plot_loss": False, "save_only_model": True}


def train(folder: Path, recipes: dict[str, dict[str, Any]], *, ranks: int = 2, timeout: float = 500) -> dict[str, Path]:
    """Train what each recipe changes of the quickstart, all in one start; each one's last checkpoint."""
    start = yaml.safe_load((launch.ROOT / QUICKSTART).read_text())
    paths = []
    for name, values in recipes.items():
        content = {**start, **QUIET, "output_dir": str(folder / name), **values}
        kept = {key: value for key, value in content.items() if value is not None}
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(kept), encoding="utf-8")
    begin = time.monotonic()
    log = folder / f"train_{'_'.join(recipes)}_{ranks}.log"
    done = launch.deepspeed(ranks, "tests/support/trainings.py", *paths, log=log, timeout=timeout)
    assert done.code == 0, done.output[-4000:]
    print(f"{len(recipes)} trainings on {ranks} ranks in {time.monotonic() - begin:.0f} s")
    return {name: last_checkpoint(folder / name) for name in recipes}


def last_checkpoint(output_dir: Path) -> Path:
    return max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def log_rows(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


def predictions(checkpoint: Path, shards: Path, kind: type[ClipBatches] = ClipBatches) -> list[Prediction]:
    """What the checkpoint's head for these classes says of every clip, in this process; `kind` reads them."""
    model, encoder, spec = load_model(checkpoint)
    index = ShardIndex.open(shards)
    head = head_for_labels(read_heads(checkpoint), None, index.labels, str(shards))
    clips = kind([ClipSource(index, head.prompt, head.number)], encoder, frame_choice(spec))
    requests = (Request(tuple(range(i, min(i + BATCH, len(index))))) for i in range(0, len(index), BATCH))
    return predict_batches(model, map(clips.__getitem__, requests), len(index.labels))[0]


def top1(found: list[Prediction], labels: set[int] | None = None) -> float:
    """Of the clips with these labels, or of all."""
    return float(np.mean([p.predicted == p.label for p in found if labels is None or p.label in labels]))


def shard_classes(videos: Path, out: Path, kept: set[str], *, split: str | None = None, short_side: int = 112) -> Path:
    """Shards with all classes of DIR/<class>/<clip> as labels, and clips of those in `kept` only."""
    labels, records = read_folder(videos, split)
    records = [record for record in records if record.class_name in kept]
    write_shards(Plan(records, labels, DecodeSettings(frames=8, short_side=short_side), 100), out, workers=0)
    return out
