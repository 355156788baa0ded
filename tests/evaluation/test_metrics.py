"""Metrics, by hand and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, top_k_accuracy_score

from vidcls.evaluation.metrics import compute_metrics


def test_a_case_by_hand() -> None:
    scores_NC = np.array(
        [
            [0.50, 0.10, 0.10, 0.10, 0.10, 0.10],  # right
            [0.50, 0.10, 0.10, 0.10, 0.10, 0.10],  # class 5 ties for places 2 to 6 and, last by id, is not in the top 5
            [0.30, 0.30, 0.10, 0.10, 0.10, 0.10],  # class 1 ties for the top with class 0, which has the lower id
            [0.30, 0.30, 0.10, 0.10, 0.10, 0.10],  # the same tie, class 0: right
        ]
    )
    found = compute_metrics(scores_NC, np.array([0, 5, 1, 0]))
    assert found.top1 == 2 / 4
    assert found.top5 == 3 / 4
    assert found.mean_class_accuracy == pytest.approx((1 + 0 + 0) / 3)  # classes 0, 1 and 5 occur
    assert found.loss == pytest.approx(-(math.log(0.5) + math.log(0.1) + 2 * math.log(0.3)) / 4)
    assert found.seen == 4


def test_with_fewer_than_five_classes_top5_is_one() -> None:
    assert compute_metrics(np.array([[0.9, 0.1]]), np.array([1])).top5 == 1


def test_a_true_class_of_probability_zero_gives_a_finite_loss() -> None:
    assert math.isfinite(compute_metrics(np.array([[1.0, 0.0]]), np.array([1])).loss)


@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes, clips = 12, 500
    labels_N = rng.integers(classes, size=clips)
    logits_NC = rng.normal(size=(clips, classes))
    logits_NC[np.arange(clips), labels_N] += 1
    scores_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)
    predicted_N = scores_NC.argmax(axis=1)
    found = compute_metrics(scores_NC, labels_N)
    assert found.top1 == pytest.approx(accuracy_score(labels_N, predicted_N), abs=1e-12)
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels_N, scores_NC, k=5), abs=1e-12)
    assert found.mean_class_accuracy == pytest.approx(balanced_accuracy_score(labels_N, predicted_N), abs=1e-12)
    assert found.loss == pytest.approx(log_loss(labels_N, scores_NC), rel=1e-12)


def test_classes_that_do_not_occur_do_not_count() -> None:
    scores_NC = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    assert compute_metrics(scores_NC, np.array([0, 0, 1])).mean_class_accuracy == 0.5
