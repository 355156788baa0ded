"""The model card of an export: what it is, how good, made of what, and how to use it."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import yaml

from vidcls.evaluation.heads import StoredHead
from vidcls.export.plain import plain_code
from vidcls.model.pretrained import ModelSpec
from vidcls.model.prompt import PromptEncoder

CARD_NAME = "README.md"
CLASSES_SHOWN = 30
SHOWN_METRICS = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class accuracy", "loss": "loss"}


def write_card(
    folder: Path, heads: list[StoredHead], spec: ModelSpec, encoder: PromptEncoder, *, base: str | None, out: Path
) -> None:
    """Write README.md into `folder`, which holds all else, and will be `out`.

    Args:
        base: what the adapter goes on; None where the weights are merged.
    """
    front: dict[str, Any] = {
        "library_name": "transformers" if base is None else "peft",
        "pipeline_tag": "video-classification",
        "tags": ["vidcls", "qwen2_5_vl", "action-recognition"],
        "license": "other",
    }
    if base is not None:
        front["base_model"] = base
    recipe = _recipe(folder)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {out.absolute().name}",
        "A video action classifier: the last hidden state of Qwen2.5-VL at one `"
        f"{spec.action_token}` token, read by {'a head' if len(heads) == 1 else 'one of several heads'}. "
        f"Trained and exported with vidcls {importlib.metadata.version('vidcls')}.",
        *_scores(folder),
        *_classes(heads),
        "## Use\n\nWith vidcls:",
        _code(f'import vidcls\n\nmodel = vidcls.load("{out.absolute().name}")\nmodel.predict("clip.mp4")'),
        "Without it, with transformers"
        + ("" if base is None else " and peft")
        + " alone (from the folder above this one):",
        _code(plain_code(out.absolute(), heads[0], spec, encoder, base, at=folder).rstrip()),
        "It needs av, pillow and simplejpeg too. Frames are chosen, stored and resized as those that the model was "
        "trained on: `preprocessing.json` of the head says how, `vidcls_model.json` what else the model expects.",
        "## Training",
        _training(recipe, spec, base),
        "## Before you publish it",
        "The base model's licence applies to what was made of it, and the videos may have terms of their own: look at "
        "both, and set `license` above. Classes are scored against each other only: a clip of something else gets one "
        "of them too.",
    ]
    (folder / CARD_NAME).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _scores(folder: Path) -> list[str]:
    """What evaluations there are: launch/evaluate.py's, else that by which the run chose its best checkpoint."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "evaluation").rglob("eval.json")):
        name = path.parent.relative_to(folder / "evaluation").as_posix()
        row = json.loads(path.read_text(encoding="utf-8"))
        if row.get("control", "none") == "none":  # what the model is not shown says nothing of how good it is
            rows["evaluation" if name == "." else name] = row
    if not rows and (best := folder / "best.json").is_file():
        rows = json.loads(best.read_text(encoding="utf-8")).get("metrics", {})
    if not rows:
        return ["## Scores", "Not evaluated before the export."]
    lines = [
        f"| data | clips | {' | '.join(SHOWN_METRICS.values())} |",
        f"| --- | --- |{' --- |' * len(SHOWN_METRICS)}",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['seen']} | {' | '.join(f'{row[key]:.4f}' for key in SHOWN_METRICS)} |")
    return ["## Scores", "\n".join(lines)]


def _classes(heads: list[StoredHead]) -> list[str]:
    parts = ["## Classes"]
    for head in heads:
        names = head.labels.names
        shown = ", ".join(names[:CLASSES_SHOWN]) + ("" if len(names) <= CLASSES_SHOWN else ", ...")
        title = f"{len(names)} classes" if len(heads) == 1 else f"Head `{head.name}`: {len(names)} classes"
        parts.append(f"{title} (fingerprint `{head.labels.fingerprint[:12]}`): {shown}.")
    return parts


def _training(recipe: dict[str, Any], spec: ModelSpec, base: str | None) -> str:
    lines = [f"- base model: {os.path.basename(base or str(recipe.get('model_name_or_path', '')))}"]
    lines.append(
        f"- its weights' fingerprint: `{spec.base_weights[:12]}`" if base is not None else "- weights are merged"
    )
    if data := recipe.get("dataset"):
        lines.append(f"- data: {data}")
    keys = (
        "finetuning_type",
        "lora_rank",
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "train_batch_size",
        "seed",
    )
    lines += [f"- {key}: {recipe[key]}" for key in keys if recipe.get(key) is not None]
    if recipe:
        lines.append("- the whole recipe: `config.yaml`; again with `deepspeed launch/train.py config.yaml`")
    return "\n".join(lines)
