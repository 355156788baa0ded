"""The official UCF101 lists."""

import argparse
import re
from pathlib import Path

from vidcls.data.labels import LabelSpace, LabelSpaceError
from vidcls.sharding.records import ClipRecord, RecordError, label_space, make_keys, numbered_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videos", type=Path, required=True, help="folder that holds <Class>/<clip>.avi")
    parser.add_argument("--list", type=Path, required=True, help="trainlist or testlist file")
    parser.add_argument("--classes", type=Path, required=True, help="classInd.txt")


def read(args: argparse.Namespace) -> tuple[LabelSpace, list[ClipRecord]]:
    return read_ucf101(args.videos, args.list, args.classes)


def read_ucf101(videos: Path, list_file: Path, classes_file: Path) -> tuple[LabelSpace, list[ClipRecord]]:
    """The clips of one official UCF101 list, in the list's order.

    videos: the folder that holds <Class>/<clip>.avi. list_file: lines "Class/clip.avi" or "Class/clip.avi label".
    classes_file: lines "label Class", labels from 1; all its classes make the label space, whatever the list has.
    Raises RecordError with file:line for a line that is wrong.
    """
    labels = _read_classes(classes_file)
    lines = numbered_lines(list_file)
    if not lines:
        raise RecordError(f"{list_file}: lists no clips")
    names: list[str] = []
    found: list[tuple[str, int, str]] = []
    for where, line in lines:
        match = re.fullmatch(r"([^/]+)/([^/]+?)(?:\s+(\S+))?", line)
        if not match or ".." in match.groups():
            raise RecordError(f'{where}: {line!r}: must be "Class/clip.avi" or "Class/clip.avi label"')
        class_name, file_name, written = match.groups()
        try:
            label = labels.index(class_name)
        except LabelSpaceError as error:
            raise RecordError(f"{where}: {error} (from {classes_file})") from error
        if written is not None and written != str(label + 1):
            raise RecordError(
                f"{where}: label {written} does not agree with folder {class_name}: "
                f"{classes_file} gives it label {label + 1}"
            )
        names.append(file_name)
        found.append((f"{class_name}/{file_name}", label, class_name))
    records = [
        ClipRecord(key, videos / source, label, class_name, source=source)
        for key, (source, label, class_name) in zip(make_keys(names), found, strict=True)
    ]
    return labels, records


def _read_classes(classes_file: Path) -> LabelSpace:
    names: list[str] = []
    for where, line in numbered_lines(classes_file):
        number, _, name = line.partition(" ")
        if number != str(len(names) + 1):
            raise RecordError(f'{where}: {line!r}: must be "{len(names) + 1} Class": labels count up from 1')
        names.append(name.strip())
    return label_space(names, classes_file)
