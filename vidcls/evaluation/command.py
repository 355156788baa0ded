"""The evaluation of a checkpoint, from its folder to its files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from vidcls import distributed
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource
from vidcls.data.order import evaluation_chunks
from vidcls.evaluation.evaluate import evaluate, write_results
from vidcls.evaluation.heads import frame_choice, head_for_labels, read_heads
from vidcls.evaluation.metrics import Metrics
from vidcls.model.pretrained import load_model
from vidcls.progress import progress_bar

RESULTS_NAME = "evaluation"


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
) -> Metrics:
    """Evaluate and write the results; all ranks must call it, the main rank writes and prints.

    Args:
        data: folder of shards, or (as text) its http(s):// or s3:// URL, whose shards go through $VIDCLS_CACHE.
        out: by default evaluation/ in the checkpoint, and there a folder of the head's name if it has several heads.
        head: which one is evaluated; needed where several have the classes of the shards.
        base, trust_remote_code: see load_model.

    Raises:
        ValueError: checkpoint or shards cannot be read, or no one head has the shards' classes.
    """
    with distributed.all_or_none("reading checkpoint and shards"):
        heads = read_heads(checkpoint)
        index = ShardIndex.open(data)
        chosen = head_for_labels(heads, head, index.labels, f"shards {data}")
        model, encoder, spec = load_model(checkpoint, model_name_or_path=base, trust_remote_code=trust_remote_code)
    if out is None:
        out = checkpoint / RESULTS_NAME if len(heads) == 1 else checkpoint / RESULTS_NAME / chosen.name
    model.to(distributed.device())
    if distributed.is_main() and chosen.settings != index.settings:
        made, trained_on = index.settings.to_dict(), chosen.settings.to_dict()
        print(f"warning: {data} was made with {made}, the training shards with {trained_on}")
    clips = ClipBatches([ClipSource(index, chosen.prompt, chosen.number)], encoder, frame_choice(spec))
    # The main rank's share stands for all.
    mine = evaluation_chunks(len(index), micro, distributed.world_size(), distributed.rank())
    share, seen = sum(len(chunk) for chunk in mine if chunk is not None), 0
    with progress_bar(Console(quiet=not distributed.is_main()), "clips evaluated") as show:

        def done(count: int) -> None:
            nonlocal seen
            seen += count
            show(seen, share)

        metrics, predictions = evaluate(model, clips, micro=micro, workers=workers, done=done)
    with distributed.all_or_none(f"writing {out}"):
        if distributed.is_main():
            write_results(out, metrics, predictions, chosen.labels)
            print(
                f"{'' if len(heads) == 1 else f'head {chosen.name}: '}{metrics.seen} clips: top-1 {metrics.top1:.4f}, "
                f"top-5 {metrics.top5:.4f}, mean class accuracy {metrics.mean_class_accuracy:.4f}, loss "
                f"{metrics.loss:.4f}; written to {out}",
                flush=True,
            )
    return metrics
