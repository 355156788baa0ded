"""Metrics, by hand and against scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from vidcls.evaluation.metrics import CALIBRATION_BINS, bootstrap_interval, compute_details, compute_metrics


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


def test_details_by_hand() -> None:
    """Three classes, of which the last does not occur; class 0 is predicted four times, class 2 once."""
    scores_NC = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.6, 0.2, 0.2], [0.5, 0.4, 0.1], [0.1, 0.1, 0.8]])
    found = compute_details(scores_NC, np.array([0, 0, 1, 1, 1]), ("a", "b", "c"))
    assert found.confusion_CC.tolist() == [[2, 0, 0], [2, 0, 1], [0, 0, 0]]
    assert [(each.name, each.clips) for each in found.classes] == [("a", 2), ("b", 3), ("c", 0)]
    first, second, third = found.classes
    assert (first.precision, first.recall, first.f1) == pytest.approx((2 / 4, 1, 2 * 0.5 / 1.5))
    assert (second.precision, second.recall, second.f1) == (0, 0, 0)
    assert (third.precision, third.recall, third.f1) == (0, 0, 0)
    assert found.macro == pytest.approx({"precision": 0.25, "recall": 0.5, "f1": 1 / 3})
    # Bins of 1/15: 0.9 alone (right), 0.6 twice (one right), 0.5 alone (wrong), 0.8 alone (wrong).
    assert found.calibration_error == pytest.approx((0.1 + 2 * 0.1 + 0.5 + 0.8) / 5)
    assert [each.clips for each in found.bins if each.clips] == [1, 2, 1, 1]
    assert sum(each.clips * abs(each.accuracy - each.confidence) for each in found.bins) / 5 == pytest.approx(
        found.calibration_error
    )


@pytest.mark.parametrize("seed", range(3))
def test_details_against_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes, clips = 12, 500
    labels_N = rng.integers(classes - 1, size=clips)  # one class does not occur
    scores_NC = rng.dirichlet(np.ones(classes), size=clips)
    predicted_N = scores_NC.argmax(axis=1)
    found = compute_details(scores_NC, labels_N, tuple(map(str, range(classes))))
    everyone = range(classes)
    np.testing.assert_array_equal(found.confusion_CC, confusion_matrix(labels_N, predicted_N, labels=everyone))
    expected = precision_recall_fscore_support(labels_N, predicted_N, labels=everyone, zero_division=0)
    for key, column in zip(("precision", "recall", "f1", "clips"), expected, strict=True):
        np.testing.assert_allclose([getattr(each, key) for each in found.classes], column, rtol=1e-6)
    # The error once more, bin by bin.
    confidences_N, correct_N = scores_NC.max(axis=1), predicted_N == labels_N
    borders = np.linspace(0, 1, CALIBRATION_BINS + 1)
    error = 0.0
    for low, high in itertools.pairwise(borders):
        inside = (confidences_N > low) & (confidences_N <= high)
        if inside.any():
            error += inside.mean() * abs(correct_N[inside].mean() - confidences_N[inside].mean())
    assert found.calibration_error == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(("correct", "clips"), [(30, 42), (1, 26), (25, 26), (18_000, 24_777)])
def test_the_interval_is_that_of_the_bootstrap(correct: int, clips: int) -> None:
    low, high = bootstrap_interval(correct, clips)
    assert (low * clips, high * clips) == pytest.approx(tuple(binom.ppf([0.025, 0.975], clips, correct / clips)))
    outcomes = np.arange(clips) < correct
    rng = np.random.default_rng(0)
    drawn = [outcomes[rng.integers(clips, size=clips)].mean() for _ in range(2000)]
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1.1 / clips + 0.002)


def test_the_interval_of_all_or_nothing_is_a_point() -> None:
    assert bootstrap_interval(7, 7) == (1, 1)
    assert bootstrap_interval(0, 7) == (0, 0)


def test_one_class_only() -> None:
    found = compute_details(np.ones((3, 1)), np.zeros(3, dtype=int), ("a",))
    assert (found.confusion_CC.tolist(), found.calibration_error) == ([[3]], 0)
