"""A data set before decoding: one ClipRecord per clip, and what the readers of data sets share."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from vidcls.data.labels import LabelSpace, LabelSpaceError
from vidcls.prompts import PromptError, check_prompt

VIDEO_SUFFIXES = frozenset(
    (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
)
MAX_KEY = 80  # with ".000.jpg" behind it a key still fits the 100 characters of a ustar header
HASH = 16  # hex digits: 64 bits, so that names alike but for their hash do not meet in millions


class RecordError(ValueError):
    """A data set on disk that does not have the expected form."""


@dataclass(frozen=True)
class ClipRecord:
    """One video file, or a part of it, and its class.

    key: unique in the data set, of [A-Za-z0-9_-] only: WebDataset cuts a member's name at its first dot.
    source: where the clip is below its data set's folder, for people; the file's name if left empty.
    prompt: what the model is asked about this clip; None: what the training recipe says. answer: the sentence that
    follows it, kept for those who train on it. start, end: only this part of the video, in seconds; None: from its
    beginning, to its end.
    """

    key: str
    path: Path
    label: int
    class_name: str
    prompt: str | None = None
    source: str = ""
    answer: str | None = None
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[A-Za-z0-9_-]{{1,{MAX_KEY}}}", self.key):
            raise RecordError(f"key = {self.key!r}: must be 1 to {MAX_KEY} characters of A-Z a-z 0-9 _ -")
        if self.label < 0:
            raise RecordError(f"{self.key}: label = {self.label}: must be at least 0")
        try:
            check_segment(self.start, self.end)
        except RecordError as error:
            raise RecordError(f"{self.key}: {error}") from error


def check_segment(start: float | None, end: float | None) -> None:
    """RecordError unless `start` and `end` are a part of a video, in seconds; None: its beginning, its end."""
    last = math.nextafter(math.inf, 0) if end is None else end
    if not 0 <= (start or 0.0) < last < math.inf:  # not a number compares false
        raise RecordError(f"start = {start}, end = {end}: need 0 <= start < end (seconds)")


def make_keys(names: Sequence[str]) -> list[str]:
    """One key per name (a relative path with "/"): the path without suffix, "/" written "_".

    A name with other characters, a long one, or one whose key another name has too gets a hash of the
    whole name behind it. Raises RecordError if a name occurs twice or is no file's name.
    """
    paths = [PurePosixPath(name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.name:
            raise RecordError(f"{name!r}: is not the name of a file")
    plain = [str(path.with_suffix("")).replace("/", "_") for path in paths]
    shared = {key for key, count in Counter(plain).items() if count > 1}
    keys = []
    for name, key in zip(names, plain, strict=True):
        safe = re.sub(r"[^A-Za-z0-9_-]", "_", key)
        if safe != key or len(key) > MAX_KEY or key in shared:
            safe = f"{safe[: MAX_KEY - HASH - 1]}-{sha256(name)[:HASH]}"
        keys.append(safe)
    key, count = Counter(keys).most_common(1)[0] if keys else ("", 0)
    if count > 1:
        raise RecordError(f"{names[keys.index(key)]}: the same clip, or one with the same key, is there twice")
    return keys


def check_present(records: Sequence[ClipRecord], what: Path | str) -> None:
    """One RecordError for all video files that are missing; `what` names the list they come from."""
    paths = dict.fromkeys(record.path for record in records)  # a video cut into clips counts once
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise RecordError(f"{what}: {len(missing)} of {len(paths)} video files are missing: {first_five(missing)}")


def with_prompts(records: Sequence[ClipRecord], prompts: Sequence[str]) -> list[ClipRecord]:
    """The records, each without a prompt of its own given one of `prompts`.

    Which one follows from the clip's key and the list of prompts alone, not from the clip's place or its split.
    Raises RecordError if there is no prompt or one is not legal.
    """
    if not prompts:
        raise RecordError("prompts: none given; need at least one")
    for number, prompt in enumerate(prompts, start=1):
        _check_prompt(f"prompt {number} of {len(prompts)}", prompt)
    return [
        replace(record, prompt=prompts[int(sha256(record.key), 16) % len(prompts)]) if record.prompt is None else record
        for record in records
    ]


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, one per line; blank lines and those that start with "#" are ignored.

    Raises RecordError with file:line for a prompt that is not legal.
    """
    lines = [(where, line) for where, line in numbered_lines(file) if not line.startswith("#")]
    if not lines:
        raise RecordError(f"{file}: has no prompts")
    for where, prompt in lines:
        _check_prompt(where, prompt)
    return [prompt for _, prompt in lines]


def read_class_names(file: Path) -> LabelSpace:
    """The classes of a file with one name per line, in label order."""
    return label_space([name for _, name in numbered_lines(file)], file)


def label_space(names: Sequence[str], where: Path | str) -> LabelSpace:
    """LabelSpace(names); RecordError that names `where` they are from if they cannot be used."""
    try:
        return LabelSpace(tuple(names))
    except LabelSpaceError as error:
        raise RecordError(f"{where}: {error}") from error


def numbered_lines(file: Path) -> list[tuple[str, str]]:
    """("file:line", text) of every line that is not blank; CRLF and LF alike."""
    # Not splitlines(): it also cuts at characters that JSON and paths may hold, such as U+2028.
    lines = read_text(file).split("\n")
    return [(f"{file}:{i}", line.strip()) for i, line in enumerate(lines, start=1) if line.strip()]


def read_json(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{file}: is not JSON: {error}") from error


def read_text(file: Path) -> str:
    """UTF-8, with or without a byte order mark; lines end in "\\n" whatever they end in on disk."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{file}: cannot be read: {error}") from error


def first_five(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def sha256(text: str) -> str:
    """In hex. Names of files that are not UTF-8 hold surrogates; they have a hash too."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _check_prompt(where: str, prompt: str) -> None:
    try:
        check_prompt(prompt)
    except PromptError as error:
        raise RecordError(f"{where}: {error}") from error
