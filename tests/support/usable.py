"""What others make of a checkpoint or an export: scores of the same videos, by every way there is."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient

import vidcls
from vidcls.serve.app import create_app

# Runs a card's code on videos where neither vidcls nor deepspeed can be imported; prints the log-probabilities.
STRANGER = """
import json, re, sys
sys.modules["vidcls"] = sys.modules["deepspeed"] = None
code = re.findall(r"```python\\n(.*?)```", open(sys.argv[1] + "/README.md").read(), re.S)[1]
for video in sys.argv[2:]:
    names = {}
    exec(code.replace('"clip.mp4"', repr(video)), names)
    print("FOUND", json.dumps(names["logits"].double().log_softmax(-1)[0].tolist()))
"""


def own(model: Path, videos: list[Path], **options: Any) -> list[list[float]]:
    """Log-probabilities, class by class, of vidcls.load."""
    predictor = vidcls.load(model, **options)
    found = []
    for video in videos:
        scores = dict(predictor.predict(video))
        found.append([math.log(scores[name]) for name in predictor.head.labels.names])
    return found


def served(model: Path, videos: list[Path]) -> list[list[float]]:
    """Log-probabilities by the HTTP service."""
    predictor = vidcls.load(model)
    found = []
    with TestClient(create_app(predictor)) as client:
        for video in videos:
            answer = client.post("/predict", files={"video": video.read_bytes()}, params={"top": 1000})
            assert answer.status_code == 200, f"{video}: {answer.text}"
            scores = {each["class"]: each["score"] for each in answer.json()["top"]}
            found.append([math.log(scores[name]) for name in predictor.head.labels.names])
    return found


def strangers(export: Path, videos: list[Path]) -> list[list[float]]:
    words = [sys.executable, "-c", STRANGER, export.name, *map(str, videos)]
    done = subprocess.run(words, cwd=export.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]


def card_code(export: Path) -> str:
    return re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)[1]


def difference(one: list[list[float]], other: list[list[float]]) -> float:
    return (torch.tensor(one) - torch.tensor(other)).abs().max().item()
