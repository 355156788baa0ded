"""Conversations about videos, in the ShareGPT form that LLaMA-Factory and the like train on."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidcls.data.labels import LabelSpace
from vidcls.options import ACTION_TOKEN
from vidcls.prompts import PromptError, check_prompt
from vidcls.sharding.records import (
    ClipRecord,
    RecordError,
    label_space,
    make_keys,
    numbered_lines,
    read_class_names,
    read_json,
    read_text,
    sha256,
)

MAX_LISTED = 20


@dataclass(frozen=True)
class Layout:
    """What the fields of a row and of its messages, and the roles, are called."""

    messages: str = "messages"
    videos: str = "videos"
    label: str = "action_label"
    role: str = "role"
    content: str = "content"
    user: str = "user"
    assistant: str = "assistant"
    system: str = "system"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--json", type=Path, help="JSON list or JSON lines of messages, videos, action_label")
    source.add_argument("--dataset-info", type=Path, help="LLaMA-Factory's dataset_info.json; needs --dataset")
    parser.add_argument("--dataset", help="name of the data set in --dataset-info")
    parser.add_argument(
        "--videos", type=Path, help="what relative paths start from; the folder of JSON or DATASET_INFO if not given"
    )
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument("--classes", type=Path, help="class names in label order, one per line")
    classes.add_argument("--num-classes", type=int, help='labels are 0 to N-1, the classes are named "class 0" ...')


def read(args: argparse.Namespace) -> tuple[LabelSpace, list[ClipRecord]]:
    if (args.dataset is None) != (args.dataset_info is None):
        raise RecordError(f"dataset = {args.dataset!r}: goes with --dataset-info, the file that has its entry")
    labels = numbered_classes(args.num_classes) if args.classes is None else read_class_names(args.classes)
    if args.dataset_info is None:
        return labels, read_sharegpt(args.json, labels, args.videos)
    file, layout = read_dataset_info(args.dataset_info, args.dataset)
    return labels, read_sharegpt(file, labels, args.videos or args.dataset_info.parent, layout)


def numbered_classes(count: int) -> LabelSpace:
    """Classes without names of their own: class 0 to class 9, class 00 to class 10, ...; sorted, in label order."""
    if count < 1:
        raise RecordError(f"num_classes = {count}: must be at least 1")
    digits = len(str(count - 1))
    return label_space([f"class {label:0{digits}d}" for label in range(count)], "num_classes")


def read_dataset_info(file: Path, name: str) -> tuple[Path, Layout]:
    """The JSON file and the names that entry `name` of a dataset_info.json gives, with LLaMA-Factory's defaults."""
    info = read_json(file)
    if not isinstance(info, dict) or name not in info:
        known = ", ".join(info) if isinstance(info, dict) else "not an object"
        raise RecordError(f"{file}: has no data set {name!r}; it has: {known}")
    entry = info[name]
    where = f"{file}: {name}"
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise RecordError(f"{where}: has no file_name; only data sets in local files can be read")
    if entry.get("formatting") != "sharegpt":
        raise RecordError(f"{where}: formatting = {entry.get('formatting')!r}: must be 'sharegpt'")
    columns, tags = _names(where, entry, "columns"), _names(where, entry, "tags")
    layout = Layout(
        messages=columns.get("messages", "conversations"),
        videos=columns.get("videos", "videos"),
        label=columns.get("action_label", "action_label"),
        role=tags.get("role_tag", "from"),
        content=tags.get("content_tag", "value"),
        user=tags.get("user_tag", "human"),
        assistant=tags.get("assistant_tag", "gpt"),
        system=tags.get("system_tag", "system"),
    )
    return file.parent / entry["file_name"], layout


def read_sharegpt(
    file: Path, labels: LabelSpace, videos: Path | None = None, layout: Layout | None = None
) -> list[ClipRecord]:
    """The clips of a list of conversations, in its order, each with its prompt and answer.

    file: a JSON list, or one JSON object per line. videos: what relative paths start from; None: the file's folder.
    A row has one user message, the prompt, which must end in <ACTION>; at most one assistant message behind it, the
    answer; messages of the system are ignored; one video; an integer label. One video may be in several rows.
    Raises one RecordError for everything that is wrong, missing video files too: its count and the first 20, each
    with its row (from 1; the line in JSON lines).
    """
    layout = layout or Layout()
    root = file.parent if videos is None else videos
    problems: list[str] = []
    samples: list[_Sample] = []
    row_of: dict[_Sample, int] = {}
    for number, row in _rows(file, problems):
        wrong: list[str] = []
        sample = _sample(row, layout, len(labels), root, wrong)
        if sample is not None and sample in row_of:
            wrong.append(f"the same video, prompt, answer and label as row {row_of[sample]}")
        problems += [f"row {number}: {text}" for text in wrong]
        if sample is not None and not wrong:
            samples.append(sample)
            row_of[sample] = number
    if problems:
        more = len(problems) - MAX_LISTED
        raise RecordError(
            f"{file}: {len(problems)} violations:\n  "
            + "\n  ".join(problems[:MAX_LISTED] + ([f"and {more} more"] if more > 0 else []))
        )
    if not samples:
        raise RecordError(f"{file}: lists no clips")
    return [
        ClipRecord(
            key,
            root / sample.video,
            sample.label,
            labels.names[sample.label],
            prompt=sample.prompt,
            source=sample.video,
            answer=sample.answer,
        )
        for key, sample in zip(make_keys(_key_names(samples)), samples, strict=True)
    ]


@dataclass(frozen=True)
class _Sample:
    video: str
    prompt: str
    answer: str | None
    label: int


def _key_names(samples: Sequence[_Sample]) -> list[str]:
    """The video, and a hash of the rest behind it where a video is in several rows: the same in any order of rows."""
    rows_with = Counter(sample.video for sample in samples)
    names = []
    for sample in samples:
        rest = sha256(json.dumps([sample.prompt, sample.answer, sample.label]))[:16]
        stem, suffix = os.path.splitext(sample.video)
        names.append(sample.video if rows_with[sample.video] == 1 else f"{stem}//{rest}{suffix}")
    return names


def _rows(file: Path, problems: list[str]) -> list[tuple[int, Any]]:
    """(row number, row); what is not JSON goes to the problems."""
    text = read_text(file).lstrip()
    if text.startswith("["):
        return list(enumerate(read_json(file), start=1))
    rows = []
    for where, line in numbered_lines(file):
        number = int(where.rpartition(":")[2])
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            problems.append(f"row {number}: is not JSON: {error} (need a JSON list, or one object per line)")
    return rows


def _sample(row: Any, layout: Layout, classes: int, root: Path, wrong: list[str]) -> _Sample | None:
    """None, and the reasons in `wrong`, if the row cannot be used."""
    if not isinstance(row, dict):
        wrong.append(f"must be an object with {layout.messages}, {layout.videos} and {layout.label}")
        return None
    turns = _turns(row, layout, wrong)
    prompt, answer = (None, None) if turns is None else _question(turns, layout, wrong)
    video = _video(row, layout, root, wrong)
    label = _label(row, layout, classes, wrong)
    if wrong or prompt is None or video is None or label is None:
        return None
    return _Sample(video, prompt, answer, label)


def _turns(row: Mapping[str, Any], layout: Layout, wrong: list[str]) -> list[tuple[str, str]] | None:
    """(role, text) of each message but the system's; None if a message is malformed."""
    messages = row.get(layout.messages)
    if not isinstance(messages, list):
        wrong.append(f"{layout.messages} must be a list of messages")
        return None
    before = len(wrong)
    turns = []
    for number, message in enumerate(messages, start=1):
        role, text = (
            (message.get(layout.role), message.get(layout.content)) if isinstance(message, dict) else (None,) * 2
        )
        if role not in (layout.user, layout.assistant, layout.system):
            legal = f"{layout.user}, {layout.assistant} and {layout.system}"
            wrong.append(f"message {number}: {layout.role} = {role!r}: unknown role; known are {legal}")
        elif not isinstance(text, str):
            wrong.append(f"message {number}: {layout.content} = {text!r}: must be text")
        elif role != layout.system:
            turns.append((role, text))
    return turns if len(wrong) == before else None


def _question(turns: Sequence[tuple[str, str]], layout: Layout, wrong: list[str]) -> tuple[str | None, str | None]:
    """(prompt, answer)"""
    roles = [role for role, _ in turns]
    if roles not in ([layout.user], [layout.user, layout.assistant]):
        wrong.append(
            f"messages of {', '.join(roles) or 'nobody'}: must be one of {layout.user}, "
            f"then at most one of {layout.assistant}"
        )
        return None, None
    texts = [text for _, text in turns]
    prompt, answer = texts[0], texts[1] if len(texts) > 1 else None
    try:
        check_prompt(prompt)
    except PromptError as error:
        wrong.append(str(error))
    else:
        behind = prompt.partition(ACTION_TOKEN)[2].strip()
        if behind:
            wrong.append(f"prompt {prompt!r} has text behind {ACTION_TOKEN}, which must end it: {behind!r}")
    if answer is not None and ACTION_TOKEN in answer:
        wrong.append(f"answer {answer!r} has {ACTION_TOKEN}: it belongs to the prompt, once")
    return prompt, answer


def _video(row: Mapping[str, Any], layout: Layout, root: Path, wrong: list[str]) -> str | None:
    videos = row.get(layout.videos)
    if not isinstance(videos, list) or len(videos) != 1 or not isinstance(videos[0], str) or not videos[0]:
        wrong.append(f"{layout.videos} = {videos!r}: must be a list of exactly one path")
        return None
    if not os.path.isfile(root / videos[0]):  # False, too, where Path.is_file raises: a name that is too long
        wrong.append(f"video {root / videos[0]} is missing")
        return None
    return videos[0]


def _label(row: Mapping[str, Any], layout: Layout, classes: int, wrong: list[str]) -> int | None:
    label = row.get(layout.label)
    if type(label) is not int or not 0 <= label < classes:  # True is an int too
        wrong.append(f"{layout.label} = {label!r}: must be an integer from 0 to {classes - 1}")
        return None
    return label


def _names(where: str, entry: Mapping[str, Any], field: str) -> dict[str, str]:
    names = entry.get(field, {})
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise RecordError(f"{where}: {field} must be an object of names")
    return names
