"""Lists of videos and labels as a table: CSV in its many forms, Kinetics' annotations, lists "path label"."""

import argparse
import csv
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vidcls.data.labels import LabelSpace
from vidcls.sharding.records import (
    ClipRecord,
    RecordError,
    check_segment,
    label_space,
    make_keys,
    read_class_names,
    read_text,
)

SEPARATORS = {"tab": "\t", "semicolon": ";", "comma": ",", "space": " "}  # in the order in which they are tried
PATH_TEMPLATE = "{label}/{youtube_id}_{time_start:06d}_{time_end:06d}.mp4"
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?")  # a label like this is meant as an index, legal or not
CLOCK = re.compile(r"(?:([0-9]+):)?([0-5]?[0-9]):([0-5]?[0-9](?:\.[0-9]*)?)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", type=Path, required=True, help="table of path, label and, optionally, start, end")
    parser.add_argument("--videos", type=Path, help="what relative paths start from; the list's folder if not given")
    parser.add_argument(
        "--classes",
        type=Path,
        help="class names in label order, one per line; if not given, the list's names, sorted",
    )
    parser.add_argument("--separator", choices=SEPARATORS, help="between columns; seen in the first line if not given")
    parser.add_argument(
        "--path-template",
        default=PATH_TEMPLATE,
        help="where a clip of a list with youtube_id instead of path is; its fields are the list's columns",
    )
    parser.add_argument(
        "--cut",
        action="store_true",
        help="take time_start to time_end (seconds) out of each file; by default files are taken to be cut already",
    )


def read(args: argparse.Namespace) -> tuple[LabelSpace, list[ClipRecord]]:
    separator = None if args.separator is None else SEPARATORS[args.separator]
    return read_table(args.list, args.videos, args.classes, separator, args.path_template, args.cut)


def read_table(
    list_file: Path,
    videos: Path | None = None,
    classes_file: Path | None = None,
    separator: str | None = None,
    path_template: str = PATH_TEMPLATE,
    cut: bool = False,
) -> tuple[LabelSpace, list[ClipRecord]]:
    """The clips of a table, in its order.

    list_file: with a header (columns path and label, or youtube_id and label as Kinetics has them; others are
    ignored) or without (path, label[, start, end]). start, end: seconds or [hh:]mm:ss; empty: the video's beginning
    or end. videos: what relative paths start from; None: the list's folder. separator: None: the first of tab,
    semicolon, comma and space that cuts the first line into two or more columns.
    classes_file: class names, one per line; labels are then names or indices from 0. None: labels are names, and the
    classes are those of the list, sorted. path_template: str.format of a row's columns, where there is no path.
    cut: time_start and time_end are a part of the file, as start and end are.
    Raises RecordError with file:line for a row that is wrong, or there twice.
    """
    rows = _read_rows(list_file, separator, path_template, cut)
    labels, label_of = _label_space(rows, list_file, classes_file)
    line_of: dict[tuple[str, float, float | None], str] = {}
    for row in rows:
        clip = (row.path, row.start or 0.0, row.end)
        if clip in line_of:
            raise RecordError(f"{row.where}: the same clip as {line_of[clip]}: {row.path}{row.segment}")
        line_of[clip] = row.where
    root = list_file.parent if videos is None else videos
    records = []
    for key, row in zip(make_keys([row.name for row in rows]), rows, strict=True):
        label = label_of[row.label]
        records.append(
            ClipRecord(key, root / row.path, label, labels.names[label], source=row.path, start=row.start, end=row.end)
        )
    return labels, records


@dataclass(frozen=True)
class _Row:
    """where: file:line. path: normal form, as listed otherwise. start, end: seconds."""

    where: str
    path: str
    label: str
    start: float | None
    end: float | None

    @property
    def segment(self) -> str:
        if self.start is None and self.end is None:
            return ""
        return f" {_seconds(self.start or 0.0)}-{'end' if self.end is None else _seconds(self.end)}"

    @property
    def name(self) -> str:
        """For make_keys: differs from that of every other clip, of this video or another."""
        if not self.segment:
            return self.path
        stem, suffix = os.path.splitext(self.path)
        return f"{stem}//{self.segment.strip()}{suffix}"  # no path in normal form has "//" within


def _read_rows(list_file: Path, separator: str | None, path_template: str, cut: bool) -> list[_Row]:
    text = read_text(list_file)
    separator = separator or _sniff(text, list_file)
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True)
    columns: list[str] | None = None
    rows = []
    try:
        for fields in reader:
            where, fields = f"{list_file}:{reader.line_num}", [field.strip() for field in fields]
            if separator == " ":
                fields = [field for field in fields if field]  # spaces at the line's end, or more than one
            if not any(fields):
                continue
            if columns is None:
                columns = _header(where, fields, cut)
                if columns is not None:
                    continue
                columns = ["path", "label", "start", "end"][: len(fields)]
                if len(fields) not in (2, 4) or cut:
                    raise RecordError(
                        f"{where}: {len(fields)} columns separated by {separator!r} and no header: need path,label or "
                        "path,label,start,end, or a header with path (or youtube_id) and label; --cut needs a header"
                    )
            if len(fields) != len(columns):
                raise RecordError(
                    f"{where}: {len(fields)} columns separated by {separator!r}, need {len(columns)} "
                    f"({', '.join(columns)}); text with the separator in it must be in double quotes"
                )
            rows.append(_row(where, dict(zip(columns, fields, strict=True)), path_template, cut))
    except csv.Error as error:
        raise RecordError(f"{list_file}:{reader.line_num}: {error}") from error
    if not rows:
        raise RecordError(f"{list_file}: lists no clips")
    return rows


def _sniff(text: str, list_file: Path) -> str:
    first = next((line for line in text.split("\n") if line.strip()), None)
    if first is None:
        raise RecordError(f"{list_file}: lists no clips")
    for separator in SEPARATORS.values():
        if separator in re.sub(r'"[^"]*"', "", first.strip()):  # not what is in quotes
            return separator
    raise RecordError(f"{list_file}: {first!r}: has one column only: no tab, semicolon, comma or space in it")


def _header(where: str, fields: list[str], cut: bool) -> list[str] | None:
    """The columns if the fields are a header, None if they are a first row."""
    columns = [field.lower() for field in fields]
    if not {"path", "youtube_id", "label"} & set(columns):
        return None
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise RecordError(f"{where}: column {twice!r} is there twice")
    if "label" not in columns or not {"path", "youtube_id"} & set(columns):
        raise RecordError(f"{where}: need the columns label and path (or youtube_id), have {', '.join(columns)}")
    if cut and not {"time_start", "time_end"} <= set(columns):
        raise RecordError(f"{where}: --cut needs the columns time_start and time_end, have {', '.join(columns)}")
    if cut and {"start", "end"} & set(columns):
        raise RecordError(f"{where}: --cut takes time_start and time_end, but there are start or end too")
    return columns


def _row(where: str, fields: dict[str, str], path_template: str, cut: bool) -> _Row:
    label = fields["label"]
    if not label:
        raise RecordError(f"{where}: the label is empty")
    path = fields["path"] if "path" in fields else _path_from(where, path_template, fields)
    if not path or path.endswith("/"):
        raise RecordError(f"{where}: path = {path!r}: is not a file's name")
    names = ("time_start", "time_end") if cut else ("start", "end")
    start, end = (_time(where, name, fields[name]) if fields.get(name) else None for name in names)
    try:
        check_segment(start, end)
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from error
    return _Row(where, os.path.normpath(path), label, start, end)


def _path_from(where: str, path_template: str, fields: Mapping[str, str]) -> str:
    values: dict[str, str | int] = dict(fields)
    for name in ("time_start", "time_end"):
        if name in fields:
            seconds = _time(where, name, fields[name])
            values[name] = int(seconds) if seconds.is_integer() else fields[name]
    try:
        return path_template.format_map(values)
    except (KeyError, ValueError, AttributeError, IndexError) as error:
        raise RecordError(
            f"{where}: path template {path_template!r} does not fit: {type(error).__name__}: {error}; "
            f"it can have the fields {', '.join(fields)}; the times are whole numbers if the list has such"
        ) from error


def _time(where: str, name: str, text: str) -> float:
    """Seconds. Takes "12", "12.5", "1:02" and "0:01:02.5"."""
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text):
        return float(text)
    match = CLOCK.fullmatch(text)
    if not match:
        raise RecordError(f"{where}: {name} = {text!r}: must be seconds or [hh:]mm:ss, such as 12.5 or 1:02")
    hours, minutes, seconds = match.groups()
    return 3600.0 * int(hours or 0) + 60.0 * int(minutes) + float(seconds)


def _seconds(value: float) -> str:
    """Shortest text for which no two times are alike."""
    return repr(int(value)) if value.is_integer() else repr(value)


def _label_space(rows: list[_Row], list_file: Path, classes_file: Path | None) -> tuple[LabelSpace, dict[str, int]]:
    """The classes, and the label of every text that stands for one in the list."""
    written = {row.label for row in rows}
    numbers = all(NUMBER.fullmatch(text) for text in written)
    if classes_file is None:
        if numbers:
            raise RecordError(f"{list_file}: labels are numbers: give the class names with --classes FILE")
        labels = label_space(sorted(written), list_file)
        return labels, {name: label for label, name in enumerate(labels.names)}
    labels = read_class_names(classes_file)
    label_of = {name: label for label, name in enumerate(labels.names)}
    if numbers and not written <= label_of.keys():
        label_of = {text: int(text) for text in written if text.isdigit() and int(text) < len(labels)}
        legal = f"an index from 0 to {len(labels) - 1}"
    else:
        legal = "one of its names"
    for row in rows:
        if row.label not in label_of:
            raise RecordError(f"{row.where}: label {row.label!r} is not {legal} ({len(labels)} in {classes_file})")
    return labels, label_of
