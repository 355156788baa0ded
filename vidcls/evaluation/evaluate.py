"""Evaluate a model on a folder of shards: every clip exactly once, the same files at any rank count."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vidcls import distributed
from vidcls.data.batch import Batch
from vidcls.data.codecs import FrameError
from vidcls.data.loader import ClipBatches, evaluation_requests
from vidcls.data.reading import WORKER_SECONDS, read_batches
from vidcls.evaluation.metrics import Metrics, compute_metrics
from vidcls.faults import guard


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


@dataclass(frozen=True)
class Evaluated:
    """predictions: of every clip that could be read, in the order of the shards. missing: why each other could not."""

    metrics: Metrics
    predictions: list[Prediction]
    missing: dict[str, str]


def predict_batches(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    classes: int,
    done: Callable[[int], None] | None = None,
    *,
    views: int = 1,
    forwards: int | None = None,
) -> tuple[list[Prediction], dict[str, str]]:
    """Class probabilities of every counted row (weight above 0), in batch order, and why others could not be read.

    Args:
        classes: how many the head of all these clips has.
        done: hears of each batch's clips.
        views: so many batches in a row hold the same clips; their probabilities are averaged.
        forwards: run each row alone, so that no number depends on what else is in its batch, and so many of them for
            each batch, as ZeRO-3 needs the same number on every rank. None: a batch at a time.
    """
    predictions: list[Prediction] = []
    missing: dict[str, str] = {}
    device = distributed.device()
    guard.phase("evaluate")
    # Not inference_mode: under ZeRO-3 training goes on with weights that were gathered here.
    with torch.no_grad():
        summed_BC: Any = 0.0
        seen, bad = 0, dict[str, str]()
        for batch in batches:
            guard.phase("evaluate", clips=", ".join(batch.keys))
            logits_BC = _forward(model, batch.to(device), forwards)
            try:
                summed_BC = summed_BC + class_scores(logits_BC, classes).cpu().numpy()
            except RuntimeError as error:
                raise RuntimeError(f"clips {', '.join(batch.keys)}: {error}") from error
            bad |= {name.partition("/")[2]: reason for name, reason in batch.bad}
            seen += 1
            if seen < views:
                continue
            # A row that could not be read in one of its views has weight 0 in that one only.
            counted = [key not in bad and weight > 0 for key, weight in zip(batch.keys, batch.weights_B, strict=True)]
            rows = zip(batch.keys, batch.labels_B.tolist(), summed_BC / views, counted, strict=True)
            predictions += [Prediction(key, label, scores) for key, label, scores, counts in rows if counts]
            missing |= bad
            if done is not None:
                done(sum(counted) + len(bad))
            summed_BC, seen, bad = 0.0, 0, {}
    return predictions, missing


def _forward(model: torch.nn.Module, batch: Batch, forwards: int | None) -> torch.Tensor:
    if forwards is None:
        return model(**batch.model_inputs())
    rows = [model(**batch.alone(min(row, len(batch) - 1)).model_inputs()) for row in range(forwards)]
    return torch.cat(rows[: len(batch)])


def evaluate(
    model: torch.nn.Module,
    clips: ClipBatches,
    *,
    ids: np.ndarray | None = None,
    micro: int,
    workers: int,
    seconds: int = WORKER_SECONDS,
    done: Callable[[int], None] | None = None,
) -> Evaluated:
    """Metrics and predictions over all clips, in the order of the shards. All ranks must call it; all get the same.

    The model is run as it is: put it into eval mode before. In fp32 each clip is computed alone: the numbers do not
    depend on `micro`. In bf16 a batch is one forward, and they may, by its rounding.

    Args:
        clips: of one data set, whose labels are those of its head. With skip_bad, clips that cannot be read are
            missing from the metrics instead of ending it.
        ids: the samples to take, rising, if not all.
        seconds: limit of a wait for the loader workers.

    Raises:
        RuntimeError: the clips seen are not exactly those asked for.
        FrameError: no clip could be read.
    """
    (source,) = clips.sources
    index = source.index
    requests = evaluation_requests(index, micro, distributed.world_size(), distributed.rank(), ids, clips.views)
    alone = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    on_gpu = distributed.device().type != "cpu"
    batches = read_batches(clips, requests, workers=workers, pin=on_gpu, seconds=seconds)
    with distributed.all_or_none("evaluating"):
        mine = predict_batches(
            model, batches, len(index.labels), done, views=clips.views.count, forwards=micro if alone else None
        )
    gathered = distributed.gather_objects(mine)
    by_key = {prediction.key: prediction for part, _ in gathered for prediction in part}
    missing = {key: reason for _, part in gathered for key, reason in part.items()}
    seen = sum(len(part) + len(bad) for part, bad in gathered)
    samples = np.arange(len(index)) if ids is None else ids
    keys = [index.keys[sample] for sample in samples.tolist()]
    if seen != len(keys) or by_key.keys() | missing.keys() != {*keys}:
        raise RuntimeError(f"evaluation saw {seen} clips ({len(by_key)} different), there are {len(keys)}")
    predictions = [by_key[key] for key in keys if key in by_key]
    if not predictions:
        raise FrameError(f"none of {len(keys)} clips can be read; the first: {keys[0]}: {missing[keys[0]]}")
    scores_NC = np.stack([prediction.scores for prediction in predictions])
    labels_N = np.array([prediction.label for prediction in predictions])
    return Evaluated(compute_metrics(scores_NC, labels_N), predictions, {k: missing[k] for k in keys if k in missing})
