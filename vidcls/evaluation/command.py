"""The evaluation of a checkpoint, from its folder to its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vidcls import distributed
from vidcls.data.index import ShardIndex
from vidcls.data.labels import LabelSpace
from vidcls.data.loader import ClipBatches
from vidcls.evaluation.evaluate import evaluate, write_results
from vidcls.evaluation.metrics import Metrics
from vidcls.model.pretrained import LABELS_NAME, PREPROCESSING_NAME, load_model


def evaluate_checkpoint(
    checkpoint: Path, data: str | Path, out: Path, *, micro: int, workers: int, base: str | None = None
) -> Metrics:
    """Evaluate and write the results; all ranks must call it, the main rank writes and prints.

    Args:
        data: folder of shards, or (as text) its http(s):// or s3:// URL, whose shards go through $VIDCLS_CACHE.

    Raises:
        ValueError: checkpoint or shards cannot be read, or their label spaces differ.
    """
    index = ShardIndex.open(data)
    if not (checkpoint / LABELS_NAME).is_file():
        raise ValueError(f"CHECKPOINT: {str(checkpoint)!r} is not a checkpoint folder: it has no {LABELS_NAME}")
    labels = LabelSpace.load(checkpoint / LABELS_NAME)
    labels.check_same(index.labels, f"checkpoint {checkpoint}", f"shards {data}")
    model, encoder, spec = load_model(checkpoint, model_name_or_path=base)
    model.to(distributed.device())
    trained_on = json.loads((checkpoint / PREPROCESSING_NAME).read_text(encoding="utf-8"))
    if distributed.is_main() and trained_on != index.settings.to_dict():
        print(f"warning: {data} was made with {index.settings.to_dict()}, the training shards with {trained_on}")
    clips = ClipBatches(index, encoder, prompt=spec.prompt, max_frames=spec.video_maxlen)
    with _progress() as progress:
        # The main rank's share stands for all: batches are dealt out evenly.
        task = progress.add_task("evaluating", total=-(-len(index) // distributed.world_size()))
        metrics, predictions = evaluate(
            model, clips, micro=micro, workers=workers, done=lambda count: progress.advance(task, count)
        )
    with distributed.all_or_none(f"writing {out}"):
        if distributed.is_main():
            write_results(out, metrics, predictions, labels)
            print(
                f"{metrics.seen} clips: top-1 {metrics.top1:.4f}, top-5 {metrics.top5:.4f}, mean class accuracy "
                f"{metrics.mean_class_accuracy:.4f}, loss {metrics.loss:.4f}; written to {out}",
                flush=True,
            )
    return metrics


def _progress() -> Progress:
    return Progress(
        TextColumn("evaluating"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not distributed.is_main() or not sys.stdout.isatty(),
    )
