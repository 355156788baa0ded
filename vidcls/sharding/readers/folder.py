"""Videos of one's own: one folder per class."""

import argparse
import os
from pathlib import Path

from vidcls.data.labels import LabelSpace
from vidcls.sharding.records import VIDEO_SUFFIXES, ClipRecord, RecordError, first_five, make_keys, sha256

SPLITS = ("train", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videos", type=Path, required=True, help="folder that holds <Class>/<clips>")
    parser.add_argument("--split", choices=SPLITS, help="take one side of a fixed split; all clips if not given")
    parser.add_argument("--test-fraction", type=float, default=0.25, help="share of each class in the test split")


def read(args: argparse.Namespace) -> tuple[LabelSpace, list[ClipRecord]]:
    return read_folder(args.videos, args.split, args.test_fraction)


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
            f"{videos}: no video files for {first_five(empty)}; known suffixes: {' '.join(sorted(VIDEO_SUFFIXES))}"
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
    by_hash = sorted(sources, key=sha256)
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
