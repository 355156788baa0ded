"""Clips that are in two data sets, or twice in one: by where they come from, and by what they look like.

What a clip looks like is 4 words of 64 bits, one for each quarter of its time: of the quarter's mean picture, in grey
and 32 x 32 pixels, the 64 lowest frequencies of its DCT, each above their median or not. This is pHash (C. Zauner,
Implementation and Benchmarking of Perceptual Image Hash Functions, 2010) but for two things that were measured to
match more clips stored in two ways: frequencies in zigzag order instead of a square, and means over time instead of
single frames, which hardly depend on how many frames were stored and which.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from vidcls.data.codecs import FrameError, decode_frames
from vidcls.data.index import ShardError, ShardIndex
from vidcls.data.settings import segment_midpoints
from vidcls.data.shards import ClipInfo, ShardReader
from vidcls.inspection.sweep import Lost, sweep

QUARTERS, FRAMES, SIDE, BITS = 4, 16, 32, 64
MAX_DISTANCE = 56
"""Of 256 bits. docs/inspecting.md has the distances that were measured on real clips."""
LISTED = 1000
"""Pairs listed per reason; all are counted."""
INDEX_BITS = 27  # more samples than a table of MAX_TABLE_BYTES can have
BLOCK_ROWS, BLOCK_COLUMNS = 256, 4096  # of distances at a time: they stay in a core's cache


def _zigzag() -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the BITS lowest frequencies without the mean."""
    lowest = sorted(((u, v) for u in range(SIDE) for v in range(SIDE) if u + v), key=lambda f: (sum(f), max(f), f))
    rows, columns = np.array(lowest[:BITS]).T
    return rows, columns


ROWS, COLUMNS = _zigzag()
DCT = np.cos(np.pi * (2 * np.arange(SIDE) + 1) * np.arange(1 + max(ROWS.max(), COLUMNS.max()))[:, None] / (2 * SIDE))


@dataclass(frozen=True)
class Looks:
    """The clips of a data set. keys, classes, infos: of each, info None where the clip could not be read.

    hashes: uint64 [N, 4], see clip_hash; meaningless where there is no info. unread: key: reason.
    """

    keys: Sequence[str]
    classes: Sequence[str]
    infos: Sequence[ClipInfo | None]
    hashes: np.ndarray
    unread: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """key, sample of one data set; other_key, other_sample of the other. distance: of their looks, in bits of 256."""

    sample: int
    other_sample: int
    key: str
    other_key: str
    class_name: str
    other_class: str
    detail: str
    distance: int | None = None


@dataclass(frozen=True)
class Match:
    """All pairs that one reason makes. pairs: at most LISTED of count, the closest if they have a distance."""

    reason: str
    count: int
    pairs: tuple[Pair, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def clip_hash(frames: np.ndarray) -> np.ndarray:
    """uint64 [4] of frames uint8 [T, H, W, 3], T >= 1."""
    distinct = sorted({*segment_midpoints(len(frames), FRAMES)})
    grey = {
        i: np.asarray(Image.fromarray(frames[i]).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
        for i in distinct
    }
    chosen = np.stack([grey[i] for i in segment_midpoints(len(frames), FRAMES)])
    means = chosen.reshape(QUARTERS, FRAMES // QUARTERS, SIDE, SIDE).mean(axis=1)
    # Rounded: where a picture is flat, what is left of sums of zero must not decide.
    low = np.round(DCT @ means @ DCT.T, 6)[:, ROWS, COLUMNS]
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint64)[:, 0]


def look_at(
    place: Path | str, index: ShardIndex, workers: int, progress: Callable[[int, int], None] | None = None
) -> Looks:
    """Reads every clip of `index`, which is that of `place`; at most FRAMES frames of each are decoded.

    progress(clips done, clips in all). workers: processes; 0: none, and no protection against crashes.
    """
    infos: list[ClipInfo | None] = [None] * len(index)
    hashes = np.zeros((len(index), QUARTERS), dtype=np.uint64)
    unread: dict[str, str] = {}
    order = np.lexsort((index.offset, index.shard)).tolist()  # as the bytes lie
    for done, (sample, look) in enumerate(sweep(place, order, _look, workers), start=1):
        if isinstance(look, Lost):
            unread[index.keys[sample]] = f"reading it {look.reason}"
        elif isinstance(look, str):
            unread[index.keys[sample]] = look
        else:
            infos[sample], hashes[sample] = look
        if progress is not None:
            progress(done, len(order))
    classes = [index.labels.names[label] for label in index.label.tolist()]
    return Looks(list(index.keys), classes, infos, hashes, unread)


def _look(reader: ShardReader, sample: int) -> tuple[ClipInfo, np.ndarray] | str:
    index = reader.index
    try:
        stored = reader.read(sample)
        chosen = sorted({*segment_midpoints(len(stored.frames), FRAMES)})
        size = int(index.height[sample]), int(index.width[sample])
        return stored.about, clip_hash(decode_frames([stored.frames[i] for i in chosen], index.settings.codec, *size))
    except (ShardError, FrameError) as error:
        return str(error)


def matches(ours: Looks, others: Looks | None, max_distance: int = MAX_DISTANCE) -> list[Match]:
    """Pairs of a clip of `ours` and one of `others`; None: of two clips of `ours`, each pair once.

    Reasons, each only if there are such pairs: the same source (within one data set only parts that overlap in time),
    the same UCF101 group (between data sets only: within one that is as it should be), the same Something-Something V2
    id, and looks that differ in at most `max_distance` of 256 bits. Looks count only for clips of different sources,
    groups and ids: what comes from one scene looks alike.
    """
    reasons: dict[str, Callable[[ClipInfo], str | None]] = {
        "same source": lambda info: info.source,
        "same UCF101 group": lambda info: ucf101_group(info.source),
        "same Something-Something V2 id": lambda info: ssv2_id(info.source),
    }
    found = []
    known = []
    for reason, value_of in reasons.items():
        values, other_values = _values(ours, value_of), _values(others or ours, value_of)
        known.append((values, other_values))
        if others is not None:
            found.append(_between(reason, ours, values, others, other_values))
        elif reason != "same UCF101 group":
            found.append(_within(reason, ours, values))
    found.append(_alike(ours, others, max_distance, known))
    return [match for match in found if match.count]


def ucf101_group(source: str) -> str | None:
    """Of .../v_Archery_g07_c02.avi it is "Archery g07". Clips of a group are cut from one video, or show one scene."""
    match = re.fullmatch(r"v_(\w+)_(g\d+)_c\d+", PurePosixPath(source).stem)
    return f"{match[1]} {match[2]}" if match else None


def ssv2_id(source: str) -> str | None:
    """Of .../12345.webm it is "12345"."""
    path = PurePosixPath(source)
    return path.stem if path.suffix == ".webm" and re.fullmatch(r"[1-9]\d{0,5}", path.stem) else None


def _values(looks: Looks, value_of: Callable[[ClipInfo], str | None]) -> list[str | None]:
    return [None if info is None else value_of(info) for info in looks.infos]


def _groups(values: list[str | None]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for sample, value in enumerate(values):
        if value is not None:
            groups[value].append(sample)
    return groups


def _between(
    reason: str, ours: Looks, values: list[str | None], others: Looks, other_values: list[str | None]
) -> Match:
    groups, other_groups = _groups(values), _groups(other_values)
    shared = {value: (groups[value], other_groups[value]) for value in groups if value in other_groups}
    count = sum(len(mine) * len(theirs) for mine, theirs in shared.values())
    pairs = ((i, j, value) for value, members in shared.items() for i, j in product(*members))
    return Match(reason, count, tuple(_pair(ours, i, others, j, value) for i, j, value in islice(pairs, LISTED)))


def _within(reason: str, looks: Looks, values: list[str | None]) -> Match:
    """Pairs whose parts of the video overlap in time."""
    count = 0
    pairs: list[Pair] = []
    for value, members in _groups(values).items():
        spans = [_span(looks.infos[i]) for i in members]
        order = sorted(range(len(members)), key=lambda i: spans[i])
        starts, ends = np.array([spans[i] for i in order]).T
        # In order of their starts, clip i overlaps those behind it that start before it ends.
        last = np.searchsorted(starts, ends, side="left")
        count += int((last - np.arange(len(members)) - 1).sum())
        overlaps = ((members[order[i]], members[order[j]]) for i in range(len(order)) for j in range(i + 1, last[i]))
        pairs += [_pair(looks, min(pair), looks, max(pair), value) for pair in islice(overlaps, LISTED - len(pairs))]
    return Match(reason, count, tuple(pairs))


def _span(info: ClipInfo | None) -> tuple[float, float]:
    assert info is not None, "what could not be read has no source"
    return info.start or 0.0, np.inf if info.end is None else info.end


def _alike(ours: Looks, others: Looks | None, max_distance: int, known: list[tuple[list, list]]) -> Match:
    """Pairs that look alike and have no value in common in any list of `known`."""
    theirs = ours if others is None else others
    mine, columns = (np.array([i for i, info in enumerate(x.infos) if info], dtype=np.int64) for x in (ours, theirs))
    hashes, other_hashes = ours.hashes[mine], theirs.hashes[columns]
    codes = [_codes(values, other_values) for values, other_values in known]
    codes = [(code[mine], other_code[columns]) for code, other_code in codes]

    def compare(start: int) -> tuple[int, np.ndarray]:
        """How many pairs the BLOCK_ROWS rows from `start` on have, and the closest, see _closest."""
        count, closest = 0, np.zeros(0, dtype=np.int64)
        for left in range(start if others is None else 0, len(columns), BLOCK_COLUMNS):
            rows, cols = slice(start, start + BLOCK_ROWS), slice(left, left + BLOCK_COLUMNS)
            distance = np.zeros((len(hashes[rows]), len(other_hashes[cols])), dtype=np.uint8)
            for word in range(QUARTERS):
                bits = np.bitwise_count(hashes[rows, None, word] ^ other_hashes[None, cols, word])
                # 255 at most: 256 differing bits would wrap around to none.
                distance += np.minimum(bits, 63, out=bits) if word == 0 else bits
            i, j = np.nonzero(distance <= max_distance)
            near = distance[i, j].astype(np.int64)
            i, j = i + start, j + left
            new = np.ones(len(i), dtype=bool) if others is not None else j > i
            for code, other_code in codes:
                new &= code[i] != other_code[j]
            count += int(new.sum())
            closest = _closest(np.concatenate([closest, (near << 2 * INDEX_BITS | i << INDEX_BITS | j)[new]]))
        return count, closest

    total, nearest = 0, np.zeros(0, dtype=np.int64)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # NumPy computes without the interpreter's lock
        for count, closest in threads.map(compare, range(0, len(mine), BLOCK_ROWS)):
            total += count
            nearest = _closest(np.concatenate([nearest, closest]))
    last = 2**INDEX_BITS - 1
    pairs = [
        _pair(ours, mine[code >> INDEX_BITS & last], theirs, columns[code & last], "", code >> 2 * INDEX_BITS)
        for code in sorted(nearest.tolist())
    ]
    return Match("looks the same", total, tuple(pairs))


def _closest(codes: np.ndarray) -> np.ndarray:
    """The LISTED smallest of (distance, row, column), each as one number: so they sort, and are bounded."""
    return codes if len(codes) <= LISTED else np.partition(codes, LISTED - 1)[:LISTED]


def _codes(values: list[str | None], other_values: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers that are equal where the values are; no value equals nothing."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    code = np.array([-1 if value is None else numbers[value] for value in values], dtype=np.int64)
    other = [-2 if value is None else numbers.get(value, -2) for value in other_values]
    return code, np.array(other, dtype=np.int64)


def _pair(ours: Looks, i: int, others: Looks, j: int, detail: str, distance: int | None = None) -> Pair:
    return Pair(int(i), int(j), ours.keys[i], others.keys[j], ours.classes[i], others.classes[j], detail, distance)
