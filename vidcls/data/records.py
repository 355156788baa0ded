"""A data set before decoding: what is on disk -> a LabelSpace and one ClipRecord per video file."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vidcls.data.labels import LabelSpace, LabelSpaceError

VIDEO_SUFFIXES = frozenset(
    (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
)
SPLITS = ("train", "test")
MAX_KEY = 80  # with ".000.jpg" behind it a key still fits the 100 characters of a ustar header


class RecordError(ValueError):
    """A data set on disk that does not have the expected form."""


@dataclass(frozen=True)
class ClipRecord:
    """One video file and its class.

    key: unique in the data set, of [A-Za-z0-9_-] only: WebDataset cuts a member's name at its first dot.
    source: where the clip is below its data set's folder, for people; the file's name if left empty.
    """

    key: str
    path: Path
    label: int
    class_name: str
    prompt: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[A-Za-z0-9_-]{{1,{MAX_KEY}}}", self.key):
            raise RecordError(f"key = {self.key!r}: must be 1 to {MAX_KEY} characters of A-Z a-z 0-9 _ -")
        if self.label < 0:
            raise RecordError(f"{self.key}: label = {self.label}: must be at least 0")


def make_keys(names: Sequence[str]) -> list[str]:
    """One key per name (a relative path with "/"): the path without suffix, "/" written "_".

    A name with other characters, a long one, or one whose key another name has too gets a short hash of the
    whole name behind it. Raises RecordError if a name occurs twice.
    """
    plain = [str(PurePosixPath(name).with_suffix("")).replace("/", "_") for name in names]
    shared = {key for key, count in Counter(plain).items() if count > 1}
    keys = []
    for name, key in zip(names, plain, strict=True):
        safe = re.sub(r"[^A-Za-z0-9_-]", "_", key)
        if safe != key or len(key) > MAX_KEY or key in shared:
            safe = f"{safe[: MAX_KEY - 9]}-{_sha256(name)[:8]}"
        keys.append(safe)
    key, count = Counter(keys).most_common(1)[0] if keys else ("", 0)
    if count > 1:
        raise RecordError(f"{names[keys.index(key)]}: the same clip, or one with the same key, is there twice")
    return keys


def read_ucf101(videos: Path, list_file: Path, classes_file: Path) -> tuple[LabelSpace, list[ClipRecord]]:
    """The clips of one official UCF101 list, in the list's order.

    videos: the folder that holds <Class>/<clip>.avi. list_file: lines "Class/clip.avi" or "Class/clip.avi label".
    classes_file: lines "label Class", labels from 1; all its classes make the label space, whatever the list has.
    Raises RecordError with file:line for a line that is wrong, and one for all missing video files together.
    """
    labels = _read_classes(classes_file)
    lines = _numbered_lines(list_file)
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
    _check_present(records, list_file)
    return labels, records


def read_folder(
    videos: Path, split: str | None = None, test_fraction: float = 0.25
) -> tuple[LabelSpace, list[ClipRecord]]:
    """The clips of DIR/<Class>/<any depth>/<clip>, sorted by path; the classes are the folders, sorted.

    split: None for all clips, or "train" or "test" of a fixed split: in each class the clips are sorted by the
    sha256 of their relative path, and the first max(1, round(n * test_fraction)) of n >= 2 are "test" (never
    all n). Other files and hidden ones are ignored. Raises RecordError, for a class without a clip too.
    """
    if split is not None and split not in SPLITS:
        raise RecordError(f"split = {split!r}: must be None or one of {', '.join(SPLITS)}")
    if not 0 < test_fraction < 1:
        raise RecordError(f"test_fraction = {test_fraction}: must be between 0 and 1, both excluded")
    if not videos.is_dir():
        raise RecordError(f"{videos}: is not a folder")
    folders = sorted(entry for entry in videos.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise RecordError(f"{videos}: has no class folders; expected {videos}/<Class>/<clips>")
    clips = {folder.name: _videos_below(folder, videos) for folder in folders}
    empty = [name for name, sources in clips.items() if not sources]
    if empty:
        raise RecordError(
            f"{videos}: no video files for {_first_five(empty)}; known suffixes: {' '.join(sorted(VIDEO_SUFFIXES))}"
        )
    labels = LabelSpace(tuple(clips))
    # Keys come from the whole folder, so that a clip has the same key in every split.
    sources = sorted(source for found in clips.values() for source in found)
    key_of = dict(zip(sources, make_keys(sources), strict=True))
    chosen = {source for found in clips.values() for source in _of_split(found, split, test_fraction)}
    if not chosen:
        raise RecordError(f"{videos}: the {split} split is empty: no class has two clips")
    records = []
    for source in sources:
        if source in chosen:
            class_name = source.split("/")[0]
            records.append(
                ClipRecord(key_of[source], videos / source, labels.index(class_name), class_name, source=source)
            )
    return labels, records


def _of_split(sources: list[str], split: str | None, test_fraction: float) -> list[str]:
    if split is None:
        return sources
    by_hash = sorted(sources, key=_sha256)
    test = min(max(1, round(len(sources) * test_fraction)), len(sources) - 1)
    return by_hash[:test] if split == "test" else by_hash[test:]


def _videos_below(folder: Path, videos: Path) -> list[str]:
    """Paths of the video files below `folder`, relative to `videos`, with "/"."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in VIDEO_SUFFIXES:
                found.append((Path(parent) / name).relative_to(videos).as_posix())
    return found


def _read_classes(classes_file: Path) -> LabelSpace:
    names: list[str] = []
    for where, line in _numbered_lines(classes_file):
        number, _, name = line.partition(" ")
        if number != str(len(names) + 1):
            raise RecordError(f'{where}: {line!r}: must be "{len(names) + 1} Class": labels count up from 1')
        names.append(name.strip())
    try:
        return LabelSpace(tuple(names))
    except LabelSpaceError as error:
        raise RecordError(f"{classes_file}: {error}") from error


def _numbered_lines(path: Path) -> list[tuple[str, str]]:
    """("file:line", text) of every line that is not blank; CRLF and LF alike."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read: {error}") from error
    return [(f"{path}:{i}", line.strip()) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _check_present(records: list[ClipRecord], list_file: Path) -> None:
    missing = [str(record.path) for record in records if not record.path.is_file()]
    if missing:
        raise RecordError(
            f"{list_file}: {len(missing)} of {len(records)} video files are missing: {_first_five(missing)}"
        )


def _first_five(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
