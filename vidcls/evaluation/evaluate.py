"""Evaluate a model on a folder of shards: every clip exactly once, the same files at any rank count."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vidcls import distributed
from vidcls.data.batch import Batch
from vidcls.data.labels import LabelSpace
from vidcls.data.loader import ClipBatches, evaluation_requests
from vidcls.data.reading import WORKER_SECONDS, read_batches
from vidcls.evaluation.metrics import Metrics, compute_metrics
from vidcls.faults import guard

METRICS_NAME = "eval.json"
PREDICTIONS_NAME = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """One evaluated clip: probabilities of the classes of its head, float64 [C]."""

    key: str
    label: int
    scores: np.ndarray

    @property
    def predicted(self) -> int:
        return int(self.scores.argmax())


def class_scores(logits_BC: torch.Tensor, classes: int) -> torch.Tensor:
    """float64 probabilities scores_BC of the first `classes` classes: those of the rows' head, in a model of several.

    Raises:
        RuntimeError: a logit of these classes is not finite.
    """
    logits_BC = logits_BC[:, :classes]
    if logits_BC.shape[1] < classes or not torch.isfinite(logits_BC).all():
        raise RuntimeError(f"the logits of a clip are not finite for each of its {classes} classes")
    # float64: the rows of a large label space should still sum to 1 when they are read back from a file
    return torch.softmax(logits_BC.double(), dim=-1)


def predict_batches(
    model: torch.nn.Module, batches: Iterable[Batch], classes: int, done: Callable[[int], None] | None = None
) -> list[Prediction]:
    """Class probabilities of every counted row (weight above 0), in batch order; `done` hears of each batch's clips.

    Args:
        classes: how many the head of all these clips has.
    """
    predictions = []
    device = distributed.device()
    guard.phase("evaluate")
    # Not inference_mode: under ZeRO-3 training goes on with weights that were gathered here.
    with torch.no_grad():
        for batch in batches:
            guard.phase("evaluate", clips=", ".join(batch.keys))
            logits_BC = model(**batch.to(device).model_inputs())
            try:
                scores_BC = class_scores(logits_BC, classes).cpu().numpy()
            except RuntimeError as error:
                raise RuntimeError(f"clips {', '.join(batch.keys)}: {error}") from error
            rows = zip(batch.keys, batch.labels_B.tolist(), batch.weights_B.tolist(), scores_BC, strict=True)
            counted = [Prediction(key, label, scores) for key, label, weight, scores in rows if weight > 0]
            predictions += counted
            if done is not None:
                done(len(counted))
    return predictions


def evaluate(
    model: torch.nn.Module,
    clips: ClipBatches,
    *,
    ids: np.ndarray | None = None,
    micro: int,
    workers: int,
    seconds: int = WORKER_SECONDS,
    done: Callable[[int], None] | None = None,
) -> tuple[Metrics, list[Prediction]]:
    """Metrics and predictions over all clips, in the order of the shards. All ranks must call it; all get the same.

    The model is run as it is: put it into eval mode before.

    Args:
        clips: of one data set, whose labels are those of its head.
        ids: the samples to take, rising, if not all.
        seconds: limit of a wait for the loader workers.

    Raises:
        RuntimeError: the clips seen are not exactly those asked for.
    """
    (source,) = clips.sources
    index = source.index
    requests = evaluation_requests(index, micro, distributed.world_size(), distributed.rank(), ids)
    on_gpu = distributed.device().type != "cpu"
    batches = read_batches(clips, requests, workers=workers, pin=on_gpu, seconds=seconds)
    with distributed.all_or_none("evaluating"):
        mine = predict_batches(model, batches, len(index.labels), done)
    gathered = distributed.gather_objects(mine)
    by_key = {prediction.key: prediction for part in gathered for prediction in part}
    seen = sum(len(part) for part in gathered)
    samples = np.arange(len(index)) if ids is None else ids
    keys = [index.keys[sample] for sample in samples.tolist()]
    if seen != len(keys) or by_key.keys() != {*keys}:
        raise RuntimeError(f"evaluation saw {seen} clips ({len(by_key)} different), there are {len(keys)}")
    predictions = [by_key[key] for key in keys]
    scores_NC = np.stack([prediction.scores for prediction in predictions])
    return compute_metrics(scores_NC, np.asarray(index.label)[samples]), predictions


def write_results(folder: Path, metrics: Metrics, predictions: list[Prediction], labels: LabelSpace) -> None:
    """Write eval.json and predictions.jsonl; the metrics last, so that their presence means that both are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {
                "key": p.key,
                "label": p.label,
                "predicted": p.predicted,
                "predicted_name": labels.names[p.predicted],
                "scores": [round(float(score), 6) for score in p.scores],
            },
            ensure_ascii=False,
        )
        for p in predictions
    ]
    _replace(folder / PREDICTIONS_NAME, "\n".join(lines) + "\n")
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.to_dict().items()}
    _replace(folder / METRICS_NAME, json.dumps(rounded, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
