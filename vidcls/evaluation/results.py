"""The files of an evaluation: eval.json, predictions.jsonl, classes.csv, confusion.csv, missing.jsonl if clips are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidcls.data.frames import Views
from vidcls.data.labels import LabelSpace

if TYPE_CHECKING:  # both import torch; whoever reads the files, a report, needs none
    from vidcls.evaluation.evaluate import Evaluated
    from vidcls.evaluation.metrics import Details

METRICS_NAME = "eval.json"
PREDICTIONS_NAME = "predictions.jsonl"
CLASSES_NAME = "classes.csv"
CONFUSION_NAME = "confusion.csv"
MISSING_NAME = "missing.jsonl"
MISTAKES_NAME = "mistakes.json"
DIGITS = 6


def write_results(
    folder: Path,
    found: Evaluated,
    details: Details,
    mistakes: list[dict[str, Any]],
    labels: LabelSpace,
    views: Views,
) -> None:
    """Write the files; the metrics last, so that their presence means that all are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_NAME).unlink(missing_ok=True)
    _replace(folder / PREDICTIONS_NAME, _lines(_predictions(found, labels)))
    columns = ("class", "clips", "precision", "recall", "f1")
    _replace(folder / CLASSES_NAME, _csv([columns, *(map(_rounded, astuple(each)) for each in details.classes)]))
    _replace(folder / MISTAKES_NAME, json.dumps(mistakes) + "\n")
    rows = ([name, *row] for name, row in zip(labels.names, details.confusion_CC.tolist(), strict=True))
    _replace(folder / CONFUSION_NAME, _csv([["true, predicted:", *labels.names], *rows]))
    if found.missing:
        _replace(folder / MISSING_NAME, _lines({"key": key, "reason": why} for key, why in found.missing.items()))
    else:
        (folder / MISSING_NAME).unlink(missing_ok=True)
    _replace(folder / METRICS_NAME, json.dumps(summary(found, details, views), indent=2) + "\n")


def summary(found: Evaluated, details: Details, views: Views) -> dict[str, Any]:
    """What eval.json holds."""
    metrics = {key: _rounded(value) for key, value in found.metrics.to_dict().items()}
    return {
        **metrics,
        "missing": len(found.missing),
        "top1_interval": [_rounded(bound) for bound in details.top1_interval],
        **{f"macro_{key}": _rounded(value) for key, value in details.macro.items()},
        "calibration_error": _rounded(details.calibration_error),
        "calibration": [
            {"clips": each.clips, "confidence": _rounded(each.confidence), "accuracy": _rounded(each.accuracy)}
            for each in details.bins
        ],
        "views": {"segments": views.segments, "crops": views.crops},
        "control": views.control,
    }


def _predictions(found: Evaluated, labels: LabelSpace) -> Iterable[Mapping[str, Any]]:
    for each in found.predictions:
        yield {
            "key": each.key,
            "label": each.label,
            "predicted": each.predicted,
            "predicted_name": labels.names[each.predicted],
            "scores": [_rounded(float(score)) for score in each.scores],
        }


def _rounded(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
