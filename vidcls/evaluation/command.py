"""The evaluation of a checkpoint, from its folder to its files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from vidcls import distributed
from vidcls.data.frames import Views
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource
from vidcls.data.order import evaluation_chunks
from vidcls.evaluation.evaluate import Evaluated, evaluate
from vidcls.evaluation.heads import check_classes, frame_choice, head_for_labels, read_heads
from vidcls.evaluation.metrics import compute_details
from vidcls.evaluation.mistakes import describe_mistakes
from vidcls.evaluation.results import write_results
from vidcls.model.pretrained import load_model
from vidcls.progress import progress_bar

RESULTS_NAME = "evaluation"
MISSING_SHOWN = 10


def evaluate_checkpoint(
    checkpoint: Path,
    data: str | Path,
    out: Path | None = None,
    *,
    head: str | None = None,
    micro: int,
    workers: int,
    base: str | None = None,
    trust_remote_code: bool = False,
    views: Views | None = None,
) -> tuple[Evaluated, Path]:
    """Evaluate and write the results; all ranks must call it, the main rank writes and prints. Also the folder.

    Args:
        data: folder of shards, or (as text) its http(s):// or s3:// URL, whose shards go through $VIDCLS_CACHE.
        out: by default evaluation/ in the checkpoint (evaluation-2x3, evaluation-shuffled and so on with other views),
            and there a folder of the head's name if it has several heads.
        head: which one is evaluated; needed where several have the classes of the shards.
        base, trust_remote_code: see load_model.
        views: of each clip, by default one of whole frames.

    Raises:
        ValueError: checkpoint or shards cannot be read, no one head has the shards' classes, or all segments would be
            the same because the shards hold no more frames than the model takes.
    """
    views = views or Views()
    with distributed.all_or_none("reading checkpoint and shards"):
        heads = read_heads(checkpoint)
        index = ShardIndex.open(data)
        chosen = head_for_labels(heads, head, index.labels, f"shards {data}")
        most = int(index.frames.max())
        model, encoder, spec = load_model(checkpoint, model_name_or_path=base, trust_remote_code=trust_remote_code)
        check_classes(heads, model.classes)
        if views.segments > 1 and most <= spec.video_maxlen:
            raise ValueError(
                f"--segments: {views.segments} views would be one and the same: {data} holds {most} frames a clip, the "
                f"model takes {spec.video_maxlen}; make shards of more frames"
            )
    if out is None:
        place = checkpoint / f"{RESULTS_NAME}{_suffix(views)}"
        out = place if len(heads) == 1 else place / chosen.name
    model.to(distributed.device())
    if distributed.is_main() and chosen.settings != index.settings:
        made, trained_on = index.settings.to_dict(), chosen.settings.to_dict()
        print(f"warning: {data} was made with {made}, the training shards with {trained_on}")
    source = ClipSource(index, chosen.prompt, chosen.number)
    clips = ClipBatches([source], encoder, frame_choice(spec), skip_bad=True, views=views)
    # The main rank's share stands for all.
    mine = evaluation_chunks(len(index), micro, distributed.world_size(), distributed.rank())
    share, seen = sum(len(chunk) for chunk in mine if chunk is not None), 0
    with progress_bar(Console(quiet=not distributed.is_main()), "clips evaluated") as show:

        def done(count: int) -> None:
            nonlocal seen
            seen += count
            show(seen, share)

        found = evaluate(model, clips, micro=micro, workers=workers, done=done)
    with distributed.all_or_none(f"writing {out}"):
        if distributed.is_main():
            scores_NC = np.stack([each.scores for each in found.predictions])
            labels_N = np.array([each.label for each in found.predictions])
            details = compute_details(scores_NC, labels_N, chosen.labels.names)
            write_results(out, found, details, describe_mistakes(found.predictions, index), chosen.labels, views)
            metrics, (low, high) = found.metrics, details.top1_interval
            print(
                f"{'' if len(heads) == 1 else f'head {chosen.name}: '}{metrics.seen} clips: top-1 {metrics.top1:.4f} "
                f"(95 %: {low:.4f} to {high:.4f}), top-5 {metrics.top5:.4f}, mean class accuracy "
                f"{metrics.mean_class_accuracy:.4f}, loss {metrics.loss:.4f}, calibration error "
                f"{details.calibration_error:.4f}; written to {out}",
                flush=True,
            )
            for key, why in list(found.missing.items())[:MISSING_SHOWN]:
                print(f"missing: {key}: {why}", file=sys.stderr)
    return found, out


def _suffix(views: Views) -> str:
    """So that what was found in another way never takes the place of the plain numbers."""
    counts = f"-{views.segments}x{views.crops}" if views.count > 1 else ""
    return counts + ("" if views.control == "none" else f"-{views.control}")
