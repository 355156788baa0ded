"""How a checkpoint wants its clips: its heads, which of them a data set or a user means, and the choice of frames."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidcls.data.labels import LabelSpace, LabelSpaceError
from vidcls.data.loader import FrameChoice
from vidcls.data.settings import DecodeSettings
from vidcls.model.pretrained import LABELS_NAME, PREPROCESSING_NAME, ModelSpec, head_folder, read_spec


@dataclass(frozen=True)
class StoredHead:
    """What a checkpoint says of a head. number: its place in the model. settings: its training shards were made so."""

    name: str
    number: int
    prompt: str
    labels: LabelSpace
    settings: DecodeSettings


def read_heads(checkpoint: Path) -> list[StoredHead]:
    """The heads of a checkpoint folder, in the model's order.

    Raises:
        ValueError: it is no checkpoint, or a head's files are missing or damaged; names the file.
    """
    heads = []
    for number, (name, prompt) in enumerate(read_spec(checkpoint).prompts.items()):
        folder = head_folder(checkpoint, name)
        labels_path, settings_path = folder / LABELS_NAME, folder / PREPROCESSING_NAME
        for path in (labels_path, settings_path):
            if not path.is_file():
                raise ValueError(f"{path} does not exist; {checkpoint} is not a whole checkpoint")
        heads.append(StoredHead(name, number, prompt, LabelSpace.load(labels_path), _settings(settings_path)))
    return heads


def check_classes(heads: list[StoredHead], classes: Mapping[str, int]) -> None:
    """Raise LabelSpaceError where a head's weights have another number of classes (`classes`) than its label map."""
    for head in heads:
        if classes[head.name] != len(head.labels):
            raise LabelSpaceError(
                f"head {head.name!r} has {classes[head.name]} classes, and its label map {len(head.labels)} "
                f"(fingerprint {head.labels.fingerprint}): one of them is of another model"
            )


def choose_head(heads: list[StoredHead], wanted: str | None) -> StoredHead:
    """The head of name `wanted`; without one, the only head.

    Raises:
        ValueError: there is no such head, or several and none was asked for; lists them.
    """
    if wanted is None:
        if len(heads) > 1:
            raise ValueError(f"--head: the checkpoint has several heads, give one: {_listed(heads)}")
        return heads[0]
    for head in heads:
        if head.name == wanted:
            return head
    raise ValueError(f"--head: {wanted!r} is no head of the checkpoint; it has {_listed(heads)}")


def head_for_labels(heads: list[StoredHead], wanted: str | None, labels: LabelSpace, what: str) -> StoredHead:
    """The head with the classes `labels` of the data set `what`; `wanted` says which, if several have them.

    Raises:
        ValueError: no head, or not the one asked for, has these classes (LabelSpaceError where it is about one head);
            or several have them and none was asked for.
    """
    if wanted is not None or len(heads) == 1:
        head = choose_head(heads, wanted)
        head.labels.check_same(labels, f"head {head.name!r} of the checkpoint", what)
        return head
    fitting = [head for head in heads if head.labels.fingerprint == labels.fingerprint]
    if len(fitting) > 1:
        raise ValueError(f"--head: several heads have the classes of {what}, give one: {_listed(fitting)}")
    if not fitting:
        raise ValueError(
            f"--head: no head of the checkpoint has the {len(labels)} classes of {what} (fingerprint "
            f"{labels.fingerprint}); it has {_listed(heads)}"
        )
    return fitting[0]


def frame_choice(spec: ModelSpec) -> FrameChoice:
    """The choice of frames that the model was trained with."""
    return FrameChoice(spec.video_maxlen, spec.frame_sampling, spec.dense_stride)  # type: ignore[arg-type]


def _settings(path: Path) -> DecodeSettings:
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))
        return DecodeSettings.from_dict(stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _listed(heads: list[StoredHead]) -> str:
    return ", ".join(f"{head.name} ({len(head.labels)} classes)" for head in heads)
