"""Metrics of a whole evaluation, from every clip's scores. Suffixes: N clips, C classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

CALIBRATION_BINS = 15
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Metrics:
    """Shares are in 0..1. mean_class_accuracy is over the classes that occur (scikit-learn: balanced_accuracy)."""

    top1: float
    top5: float
    mean_class_accuracy: float
    loss: float  # mean cross-entropy, nats
    seen: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass(frozen=True)
class ClassMetrics:
    """Of one class: how many clips; precision and recall, 0 where there is none; their harmonic mean."""

    name: str
    clips: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Bin:
    """Clips whose highest probability lies in one of `CALIBRATION_BINS` equal parts of 0..1.

    confidence: the mean of that probability. accuracy: the share of them that are right.
    """

    clips: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Details:
    """What one number does not say.

    confusion_CC: clips by true class (row) and predicted class. top1_interval: `bootstrap_interval` of top1.
    calibration_error: the mean over clips of |accuracy - confidence| of their bin (Guo et al. 2017, arXiv 1706.04599).
    """

    confusion_CC: np.ndarray
    classes: tuple[ClassMetrics, ...]
    top1_interval: tuple[float, float]
    calibration_error: float
    bins: tuple[Bin, ...]

    @property
    def macro(self) -> dict[str, float]:
        """Unweighted means over the classes that occur."""
        there = [each for each in self.classes if each.clips]
        return {key: float(np.mean([getattr(each, key) for each in there])) for key in ("precision", "recall", "f1")}


def compute_metrics(scores_NC: np.ndarray, labels_N: np.ndarray) -> Metrics:
    """Metrics from class probabilities (float, rows sum to 1) and true class ids.

    A tie counts for the class with the lower id, as argmax does. With fewer than 5 classes top5 is 1.
    """
    # A stable sort of the negated scores puts the lower id first among equals.
    ranked_NC = np.argsort(-scores_NC, axis=1, kind="stable")
    hits_NC = ranked_NC == labels_N[:, None]
    correct_N = hits_NC[:, 0]
    per_class = [correct_N[labels_N == label].mean() for label in np.unique(labels_N)]
    likelihoods_N = scores_NC[np.arange(len(labels_N)), labels_N]
    return Metrics(
        top1=float(correct_N.mean()),
        top5=float(hits_NC[:, :5].any(axis=1).mean()),
        mean_class_accuracy=float(np.mean(per_class)),
        loss=float(-np.log(np.maximum(likelihoods_N, np.finfo(np.float64).tiny)).mean()),
        seen=len(labels_N),
    )


def compute_details(scores_NC: np.ndarray, labels_N: np.ndarray, names: tuple[str, ...]) -> Details:
    """As `compute_metrics`; names: of the C classes."""
    # Here, because it takes seconds to import and training does without.
    from torchmetrics.functional.classification import (
        multiclass_calibration_error,
        multiclass_confusion_matrix,
        multiclass_f1_score,
        multiclass_precision,
        multiclass_recall,
    )

    classes = max(2, len(names))  # torchmetrics refuses one class; a second one, that nothing is, changes nothing
    scores_NC = np.pad(scores_NC, ((0, 0), (0, classes - len(names))))
    # argmax here: where two classes tie, torch's may be either.
    predicted, labels = torch.from_numpy(scores_NC.argmax(axis=1)), torch.from_numpy(np.asarray(labels_N, np.int64))
    confusion_CC = multiclass_confusion_matrix(predicted, labels, classes).numpy()[: len(names), : len(names)]
    columns = [
        measure(predicted, labels, classes, average="none", zero_division=0).double().tolist()[: len(names)]
        for measure in (multiclass_precision, multiclass_recall, multiclass_f1_score)
    ]
    counts = confusion_CC.sum(axis=1).tolist()
    per_class = tuple(ClassMetrics(*each) for each in zip(names, counts, *columns, strict=True))
    error = float(multiclass_calibration_error(torch.from_numpy(scores_NC), labels, classes, CALIBRATION_BINS))
    correct_N = scores_NC.argmax(axis=1) == labels_N
    return Details(
        confusion_CC,
        per_class,
        bootstrap_interval(int(correct_N.sum()), len(labels_N)),
        error,
        calibration_bins(scores_NC.max(axis=1), correct_N),
    )


def bootstrap_interval(correct: int, clips: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of an accuracy.

    Drawn again with replacement, the number of correct clips is binomial; its percentiles are computed, not sampled.
    """
    share = correct / clips
    if share in (0.0, 1.0):
        return share, share
    counts = torch.arange(clips + 1, dtype=torch.float64)
    ways = torch.lgamma(torch.tensor(clips + 1.0, dtype=torch.float64)) - torch.lgamma(counts + 1)
    ways = ways - torch.lgamma(clips - counts + 1)
    likely = (ways + counts * np.log(share) + (clips - counts) * np.log1p(-share)).exp().cumsum(0)
    low, high = (int(torch.searchsorted(likely, level)) / clips for level in INTERVAL)
    return low, high


def calibration_bins(confidences_N: np.ndarray, correct_N: np.ndarray) -> tuple[Bin, ...]:
    """The bins of a reliability diagram, the least confident first; a clip on a border belongs to the lower one."""
    number_N = np.clip(np.ceil(confidences_N * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    bins = []
    for number in range(CALIBRATION_BINS):
        inside = number_N == number
        count = int(inside.sum())
        found = (float(confidences_N[inside].mean()), float(correct_N[inside].mean())) if count else (0.0, 0.0)
        bins.append(Bin(count, *found))
    return tuple(bins)
