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
from vidcls.data.reading import read_batches
from vidcls.evaluation.metrics import Metrics, compute_metrics

METRICS_NAME = "eval.json"
PREDICTIONS_NAME = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """One evaluated clip: class probabilities float64 [C]."""

    key: str
    label: int
    scores: np.ndarray

    @property
    def predicted(self) -> int:
        return int(self.scores.argmax())


def predict_batches(
    model: torch.nn.Module, batches: Iterable[Batch], done: Callable[[int], None] | None = None
) -> list[Prediction]:
    """Class probabilities of every counted row (weight above 0), in batch order; `done` hears of each batch's clips."""
    predictions = []
    device = distributed.device()
    with torch.inference_mode():
        for batch in batches:
            logits_BC = model(**batch.to(device).model_inputs())
            # float64: the rows of a large label space should still sum to 1 when they are read back from a file
            scores_BC = torch.softmax(logits_BC.double(), dim=-1).cpu().numpy()
            if not np.isfinite(scores_BC).all():
                raise RuntimeError(f"the scores of one of the clips {', '.join(batch.keys)} are not finite")
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
    micro: int,
    workers: int,
    done: Callable[[int], None] | None = None,
) -> tuple[Metrics, list[Prediction]]:
    """Metrics and predictions over all clips, in the order of the shards. All ranks must call it; all get the same.

    Raises:
        RuntimeError: the clips seen are not exactly those of the index.
    """
    index = clips.index
    requests = evaluation_requests(index, micro, distributed.world_size(), distributed.rank())
    batches = read_batches(clips, requests, workers=workers, pin=distributed.device().type != "cpu")
    gathered = distributed.gather_objects(predict_batches(model, batches, done))
    by_key = {prediction.key: prediction for part in gathered for prediction in part}
    seen = sum(len(part) for part in gathered)
    if seen != len(index) or any(key not in by_key for key in index.keys):
        raise RuntimeError(f"evaluation saw {seen} clips ({len(by_key)} different), the index has {len(index)}")
    predictions = [by_key[key] for key in index.keys]
    scores_NC = np.stack([prediction.scores for prediction in predictions])
    return compute_metrics(scores_NC, np.asarray(index.label)), predictions


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
