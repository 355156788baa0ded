"""Metrics of a whole evaluation, from every clip's scores. Suffixes: N clips, C classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


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
