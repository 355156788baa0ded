"""What a report tells, read from the files of a run: at any moment, also while it trains."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

import yaml

from vidcls.evaluation.results import CLASSES_NAME, CONFUSION_NAME, METRICS_NAME, MISTAKES_NAME
from vidcls.supervision.folder import CONFIG_NAME, STATE_NAME, RunFolder, read_object

# Written by vidcls.training, which imports this.
BOARD_NAME = "tensorboard"
PACKAGES = ("vidcls", "torch", "deepspeed", "transformers", "peft", "safetensors", "numpy", "torchmetrics")
MOST_ROWS = 4000  # of a curve: more than any screen has points


def collect(run: Path) -> dict[str, Any]:
    """What the page's program reads."""
    log = _thinned(RunFolder(run).rows())
    recipe = _recipe(run / CONFIG_NAME)
    return {
        "name": run.absolute().name,
        "state": _state(run, log),
        "log": log,
        "results": _results(run),
        "recipe": recipe,
        "data": _data(run),
        "versions": {**{name: _version(name) for name in PACKAGES}, "python": platform.python_version()},
        "commands": [
            f"deepspeed launch/train.py {run / CONFIG_NAME} output_dir=AGAIN",
            *(f"python launch/evaluate.py {place.parent} --data SHARDS" for place in _newest(run)),
        ],
    }


def _state(run: Path, log: list[dict[str, Any]]) -> str:
    outcome = RunFolder(run).outcome()
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    if outcome:
        return f"{outcome.get('outcome')} at step {outcome.get('step')} of {outcome.get('steps')}; written {written}"
    at = f"at step {log[-1]['step']}" if log else "not yet at its first log line"
    return f"{at}; written {written}"


def _results(run: Path) -> list[dict[str, Any]]:
    """Every evaluation below the run, the newest first."""
    found = []
    for path in run.rglob(METRICS_NAME):
        if ".tmp-" in path.as_posix():
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, StopIteration):  # being written, or of another version
            found.append((path.stat().st_mtime, read_result(path.parent, path.parent.relative_to(run).as_posix())))
    return [each for _, each in sorted(found, key=lambda pair: -pair[0])]


def read_result(folder: Path, title: str) -> dict[str, Any]:
    """The files of one evaluation. Raises OSError, ValueError, KeyError or StopIteration where they are not whole."""
    with (folder / CONFUSION_NAME).open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        names = next(rows)[1:]
        confusion = [[int(count) for count in row[1:]] for row in rows]
    with (folder / CLASSES_NAME).open(encoding="utf-8", newline="") as file:
        classes = [
            {"class": row["class"], "clips": int(row["clips"])}
            | {key: float(row[key]) for key in ("precision", "recall", "f1")}
            for row in csv.DictReader(file)
        ]
    mistakes = folder / MISTAKES_NAME
    return {
        "title": title,
        "metrics": json.loads((folder / METRICS_NAME).read_text(encoding="utf-8")),
        "names": names,
        "confusion": confusion,
        "classes": classes,
        "mistakes": json.loads(mistakes.read_text(encoding="utf-8")) if mistakes.is_file() else [],
    }


def _data(run: Path) -> dict[str, Any]:
    """Fingerprints and the stream of clips, as the newest checkpoint has them."""
    for path in _newest(run):
        state = read_object(path)
        stream = state.get("stream", {})
        return {**{key: _told(value) for key, value in stream.items()}, "step of this": state.get("step")}
    return {"none": "no checkpoint yet"}


def _newest(run: Path) -> list[Path]:
    """The training state of the newest checkpoint, if there is one."""
    found = [path for path in run.glob(f"checkpoint-*/{STATE_NAME}") if path.parent.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.parent.name.partition("-")[2]))[-1:]


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every so many of the log's rows; those of evaluations all."""
    step = -(-len(rows) // MOST_ROWS)
    return [row for number, row in enumerate(rows) if number % step == 0 or "loss" not in row] if step > 1 else rows


def _recipe(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in found.items()}
    return {}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
