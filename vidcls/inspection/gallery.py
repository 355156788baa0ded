"""One self-contained HTML page of stored clips, to look at. What a data set holds is hostile text: it never is markup.

Every class has a block of JSON with its pictures in base64; the page's program makes elements of it only while the
class is near the window, so that thousands of clips scroll smoothly. Nothing is loaded from elsewhere.
"""

import base64
import hashlib
import html
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import simplejpeg
from PIL import Image

from vidcls.data.codecs import FrameError, decode_frames
from vidcls.data.index import ShardError, ShardIndex
from vidcls.data.settings import segment_midpoints
from vidcls.data.shards import ShardReader
from vidcls.inspection.gallery_page import BODY, PROGRAM, STYLE
from vidcls.inspection.overview import Overview
from vidcls.inspection.similarity import Match
from vidcls.inspection.sweep import Lost, sweep

STRIP_HEIGHT, STRIP_QUALITY = 96, 70
MAX_STRIP_WIDTH = 1024  # a hostile clip may be 16 million pixels wide
PAIRS_SHOWN = 200  # of each reason


@dataclass(frozen=True)
class Strip:
    """One clip on the page. jpeg: its first, middle and last frame side by side; None: problem says why."""

    key: str
    source: str = ""
    seconds: float = 0.0
    frames: int = 0
    damage: str | None = None
    jpeg: bytes | None = None
    width: int = 0
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the page's program reads."""
        picture = None if self.jpeg is None else base64.b64encode(self.jpeg).decode()
        return {**vars(self), "jpeg": picture}


def write_gallery(
    out: Path,
    place: Path | str,
    *,
    per_class: int,
    workers: int,
    other: Path | str | None = None,
    found: Sequence[Match] = (),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes the page of the data set at `place` and returns how many clips it shows.

    per_class: clips of each class, evenly spread over it; 0: all. found: similar clips in `place` and `other` (None:
    in `place` itself), shown side by side. Raises ShardError, or OSError if `out` cannot be written.
    """
    index = ShardIndex.open(place)
    chosen = [choose(np.flatnonzero(index.label == label), per_class) for label in range(len(index.labels))]
    samples = [sample for members in chosen for sample in members]
    temporary = out.with_name(out.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="replace") as page:
            _write_page(page, Overview.of(index), chosen, _strips(place, index, samples, workers, progress))
            _write_pairs(page, place, place if other is None else other, found, workers)
            page.write(f"<script>{PROGRAM}</script>\n</html>\n")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return len(samples)


def choose(members: np.ndarray, count: int) -> list[int]:
    """`count` of `members`, evenly spread; all if there are no more, or count is 0."""
    if count == 0 or len(members) <= count:
        return members.tolist()
    return [int(members[i]) for i in segment_midpoints(len(members), count)]


def _strips(
    place: Path | str,
    index: ShardIndex,
    samples: Sequence[int],
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Strip]:
    for done, (sample, strip) in enumerate(sweep(place, samples, make_strip, workers), start=1):
        if progress is not None:
            progress(done, len(samples))
        yield Strip(index.keys[sample], problem=f"reading it {strip.reason}") if isinstance(strip, Lost) else strip


def make_strip(reader: ShardReader, sample: int) -> Strip:
    index = reader.index
    key = index.keys[sample]
    try:
        stored = reader.read(sample)
        ends = [0, len(stored.frames) // 2, len(stored.frames) - 1]
        size = int(index.height[sample]), int(index.width[sample])
        frames = decode_frames([stored.frames[i] for i in ends], index.settings.codec, *size)
    except (ShardError, FrameError) as error:
        return Strip(key, problem=str(error))
    width = min(max(1, round(size[1] * STRIP_HEIGHT / size[0])), MAX_STRIP_WIDTH)
    pictures = [np.asarray(Image.fromarray(frame).resize((width, STRIP_HEIGHT))) for frame in frames]
    jpeg = simplejpeg.encode_jpeg(np.concatenate(pictures, axis=1), quality=STRIP_QUALITY, colorsubsampling="420")
    about = stored.about
    return Strip(
        key=key,
        source=about.source,
        seconds=about.frame_times[-1] - about.frame_times[0],
        frames=len(stored.frames),
        damage=about.damage,
        jpeg=jpeg,
        width=3 * width,
    )


def _write_page(page: IO[str], overview: Overview, chosen: Sequence[list[int]], strips: Iterator[Strip]) -> None:
    # Only this program runs, should text ever become markup after all.
    digest = base64.b64encode(hashlib.sha256(PROGRAM.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    page.write(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(overview.place)}</title>\n'
    )
    page.write(f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n')
    page.write('<meta name="viewport" content="width=device-width, initial-scale=1">\n')
    page.write(f"<style>{STYLE}</style>\n{BODY}\n")
    about = []
    for label, members in enumerate(chosen):
        clips = [next(strips) for _ in members]
        _write_json(page, f"pictures-{label}", [clip.to_dict()["jpeg"] for clip in clips])
        about.append(
            {
                "name": overview.classes[label],
                "label": label,
                "count": overview.per_class[label],
                "clips": [{**clip.to_dict(), "jpeg": clip.jpeg is not None} for clip in clips],
            }
        )
    facts = {
        "place": overview.place,
        "clips": overview.clips,
        "failed": overview.failed,
        "damaged": overview.damaged,
        "shown": sum(map(len, chosen)),
    }
    _write_json(page, "facts", facts)
    _write_json(page, "classes", about)


def _write_pairs(page: IO[str], place: Path | str, other: Path | str, found: Sequence[Match], workers: int) -> None:
    sides: list[dict[int, Strip]] = []
    for where, column in ((place, "sample"), (other, "other_sample")):
        needed = sorted({getattr(pair, column) for match in found for pair in match.pairs[:PAIRS_SHOWN]})
        strips = _strips(where, ShardIndex.open(where), needed, workers) if needed else iter(())
        sides.append(dict(zip(needed, strips, strict=True)))
    shown = [
        {
            "reason": match.reason,
            "count": match.count,
            "pairs": [
                {
                    **vars(pair),
                    "clips": [sides[0][pair.sample].to_dict(), sides[1][pair.other_sample].to_dict()],
                }
                for pair in match.pairs[:PAIRS_SHOWN]
            ],
        }
        for match in found
    ]
    _write_json(page, "pairs", {"other": str(other), "matches": shown})


def _write_json(page: IO[str], name: str, value: Any) -> None:
    # Within <script>, only a "<" could end the block or begin a comment.
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    page.write(f'<script type="application/json" id="{name}">{text}</script>\n')
