"""The official annotations of Something-Something V2."""

import argparse
import re
from pathlib import Path
from typing import Any

from vidcls.data.labels import LabelSpace, LabelSpaceError
from vidcls.sharding.records import ClipRecord, RecordError, label_space, make_keys, numbered_lines, read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videos", type=Path, required=True, help="folder that holds <id>.webm")
    parser.add_argument("--list", type=Path, required=True, help="train.json, validation.json or test.json")
    parser.add_argument("--labels", type=Path, required=True, help="labels.json: template -> class index")
    parser.add_argument("--answers", type=Path, help='test-answers.csv, lines "id;template"; needed for test.json')
    parser.add_argument("--suffix", default=".webm", help="of the video files")


def read(args: argparse.Namespace) -> tuple[LabelSpace, list[ClipRecord]]:
    return read_ssv2(args.videos, args.list, args.labels, args.answers, args.suffix)


def read_ssv2(
    videos: Path, list_file: Path, labels_file: Path, answers_file: Path | None = None, suffix: str = ".webm"
) -> tuple[LabelSpace, list[ClipRecord]]:
    """The clips of one official list, in the list's order, with the official class indices.

    videos: the folder that holds <id><suffix>. list_file: JSON list of {"id", "template", ...}; in the official test
    list there are ids only, and answers_file has the templates. labels_file: JSON object, template without brackets ->
    index. Raises RecordError with the row (from 1), or file:line of the answers, for an entry that is wrong.
    """
    if not re.fullmatch(r"\.[A-Za-z0-9]+", suffix):
        raise RecordError(f"suffix = {suffix!r}: must be a dot and letters or digits, such as .webm")
    labels = _read_labels(labels_file)
    answers = {} if answers_file is None else _read_answers(answers_file)
    rows = read_json(list_file)
    if not isinstance(rows, list) or not rows:
        raise RecordError(f'{list_file}: must be a JSON list of at least one {{"id": ..., "template": ...}}')
    row_of: dict[str, int] = {}
    found: list[tuple[str, int]] = []
    for number, row in enumerate(rows, start=1):
        where = f"{list_file}: row {number}"
        clip = _read_id(where, row)
        if clip in row_of:
            raise RecordError(f"{where}: id {clip} is also that of row {row_of[clip]}")
        row_of[clip] = number
        template = row.get("template")
        if template is None:
            if answers_file is None:
                raise RecordError(
                    f"{where}: has no template: a test list needs the file of answers, --answers test-answers.csv"
                )
            if clip not in answers:
                raise RecordError(f"{where}: {answers_file} has no answer for id {clip}")
            where, template = answers[clip]
        if not isinstance(template, str):
            raise RecordError(f"{where}: template = {template!r}: must be text")
        try:
            found.append((f"{clip}{suffix}", labels.index(_plain(template))))
        except LabelSpaceError as error:
            raise RecordError(f"{where}: {error} (from {labels_file})") from error
    keys = make_keys([name for name, _ in found])
    records = [
        ClipRecord(key, videos / name, label, labels.names[label], source=name)
        for key, (name, label) in zip(keys, found, strict=True)
    ]
    return labels, records


def _plain(template: str) -> str:
    """As labels.json writes it: the list has its placeholders in brackets."""
    return template.replace("[", "").replace("]", "")


def _read_id(where: str, row: Any) -> str:
    if not isinstance(row, dict):
        raise RecordError(f'{where}: must be an object {{"id": ..., "template": ...}}')
    if "id" not in row:
        raise RecordError(f"{where}: has no id")
    if not isinstance(row["id"], str) or not re.fullmatch(r"[0-9]+", row["id"]):
        raise RecordError(f"{where}: id = {row['id']!r}: must be digits, as text")
    return row["id"]


def _read_labels(labels_file: Path) -> LabelSpace:
    stored = read_json(labels_file)
    if not isinstance(stored, dict) or not stored:
        raise RecordError(f'{labels_file}: must be a JSON object {{template: "index", ...}}')
    name_of: dict[int, str] = {}
    for name, index in stored.items():
        if not re.fullmatch(r"[0-9]+", str(index)):
            raise RecordError(f"{labels_file}: {name!r} has index {index!r}: must be a whole number")
        if int(index) in name_of:
            raise RecordError(f"{labels_file}: {name!r} and {name_of[int(index)]!r} both have index {index}")
        name_of[int(index)] = name
    missing = next((index for index in range(len(name_of)) if index not in name_of), None)
    if missing is not None:
        raise RecordError(f"{labels_file}: no template has index {missing}: {len(name_of)} must be 0 to n-1, no holes")
    return label_space([name_of[index] for index in range(len(name_of))], labels_file)


def _read_answers(answers_file: Path) -> dict[str, tuple[str, str]]:
    """id -> (file:line, template)"""
    answers: dict[str, tuple[str, str]] = {}
    for where, line in numbered_lines(answers_file):
        clip, separator, template = line.partition(";")
        if not separator or not re.fullmatch(r"[0-9]+", clip):
            raise RecordError(f'{where}: {line!r}: must be "id;template"')
        if clip in answers:
            raise RecordError(f"{where}: id {clip} is also that of {answers[clip][0]}")
        answers[clip] = (where, template.strip())
    return answers
