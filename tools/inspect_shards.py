"""Look into a folder of shards: what is in it, whether it is whole, what it looks like, what it shares with another.

    python tools/inspect_shards.py train                          numbers, from the index alone
    python tools/inspect_shards.py train --verify                 every byte of every shard
    python tools/inspect_shards.py train --html train.html        a page of clips to look at
    python tools/inspect_shards.py train --against test           clips that both have
    python tools/inspect_shards.py train --against train          clips that it has twice
    python tools/inspect_shards.py train --augmented recipe.yaml --out seen.png    clips as training sees them

DIR and OTHER are folders, or URLs that start with http://, https:// or s3://.
Exit codes: 0 nothing wrong, 1 problems or common clips found, 2 wrong options or no data set, 130 interrupted.
"""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vidcls.data.index import ShardError, ShardIndex
from vidcls.inspection.overview import Overview
from vidcls.progress import progress_bar

if TYPE_CHECKING:  # what only some options need is imported by them: the numbers alone come at once
    from vidcls.inspection.similarity import Match

BAR_WIDTH = 30
ROWS = 10  # of a histogram
PAIRS_SHOWN = 10  # of each reason; --json has more


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("place", metavar="DIR", help="folder of shards, or its URL")
    parser.add_argument("--verify", action="store_true", help="check every shard, clip and frame against the index")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write a page of clips; one file, opens anywhere")
    parser.add_argument("--per-class", type=int, default=12, help="clips of each class on the page (12); 0: all")
    parser.add_argument("--against", metavar="OTHER", help="find clips that OTHER has too; DIR itself: twice in it")
    parser.add_argument("--max-distance", type=int, help="bits of 256 in which clips that look the same differ (56)")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write charts of classes, frames and sizes (PNG)")
    parser.add_argument("--augmented", type=Path, metavar="RECIPE", help="draw clips as this recipe augments them")
    parser.add_argument("--out", type=Path, metavar="OUT", help="where --augmented draws to (augmented.png)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all that is found, for programs")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; 0: none")
    args = parser.parse_args()
    if args.per_class < 0 or args.workers < 0:
        parser.error("--per-class and --workers must be at least 0")
    if args.max_distance is not None and not 0 <= args.max_distance <= 128:
        parser.error("--max-distance must be from 0 to 128")  # unrelated clips differ in 126 bits on average
    if args.out is not None and args.augmented is None:
        parser.error("--out goes with --augmented")
    args.out = args.out or Path("augmented.png")
    for out in (args.html, args.plot, args.json, args.augmented and args.out):
        if out is not None and not out.absolute().parent.is_dir():
            parser.error(f"{out}: there is no folder {out.absolute().parent}")
    return args


def inspect(args: argparse.Namespace, console: Console) -> int:
    """Returns the exit code."""
    result: dict[str, Any] = {}
    try:
        index = ShardIndex.open(args.place)
    except ShardError as error:
        if not args.verify:
            raise
        result["problems"] = [{"shard": "index.json", "key": None, "member": None, "reason": str(error)}]
        console.print(f"index.json: {error}")
        _write_json(args.json, result)
        return 1
    overview = Overview.of(index)
    result["overview"] = overview.to_dict()
    show(overview, console)
    found: list[Match] = []
    if args.plot is not None:
        from vidcls.inspection.charts import draw

        draw(overview, args.plot)
        console.print(f"charts: {args.plot}")
    if args.augmented is not None:
        from vidcls.config import load_config
        from vidcls.inspection.augmented import draw_augmented

        shown = draw_augmented(args.out, args.place, load_config(args.augmented))
        console.print(f"as trained on: {args.out}, {shown} clips")
    if args.verify:
        result["problems"] = check(args, console)
    if args.against is not None:
        found, unread = compare(args, index, console)
        result["common"] = [match.to_dict() for match in found]
        result["unread"] = unread
    if args.html is not None:
        from vidcls.inspection.gallery import write_gallery

        with progress_bar(console, "clips on the page") as progress:
            shown = write_gallery(
                args.html,
                args.place,
                per_class=args.per_class,
                workers=args.workers,
                other=args.against,
                found=found,
                progress=progress,
            )
        console.print(f"page: {args.html}, {shown} clips, {args.html.stat().st_size / 1e6:.1f} MB")
    _write_json(args.json, result)
    return 1 if result.get("problems") or result.get("unread") or found else 0


def show(overview: Overview, console: Console) -> None:
    per_clip = overview.bytes / overview.clips
    console.print(f"{overview.place}: {overview.clips:,} clips of {len(overview.classes)} classes")
    console.print(f"  {overview.shards:,} shards, {overview.bytes / 1e6:,.1f} MB, {per_clip / 1e3:.1f} kB a clip")
    settings = ", ".join(f"{name} {value}" for name, value in overview.settings.items() if value is not None)
    console.print(f"  settings: {settings}")
    console.print(f"  decoded by {', '.join(f'{name} {count:,}' for name, count in overview.decoders.items())}")
    console.print(f"  {overview.failed:,} clips failed, {overview.damaged:,} are damaged")
    frames = [(str(count), clips) for count, clips in overview.frame_counts]
    sizes = [(f"{width}x{height}", clips) for (height, width), clips in overview.frame_sizes]
    bars(console, "frames a clip", frames)
    bars(console, "frame size (width x height), most frequent first", sizes)
    ordered = overview.by_frequency
    bars(console, "most frequent classes", ordered[:5])
    bars(console, "least frequent classes", ordered[-5:], ordered[0][1])
    console.print(f"  largest class to smallest: {overview.imbalance:.1f} to 1")
    if overview.empty_classes:
        first = ", ".join(map(safe, overview.empty_classes[:5]))
        more = ", ..." if len(overview.empty_classes) > 5 else ""
        console.print(f"  {len(overview.empty_classes)} classes without clips: {first}{more}")
    console.print(f"  {overview.prompts:,} different prompts, {overview.without_prompt:,} clips without")
    for prompt in overview.first_prompts:
        console.print(f"    {safe(prompt)[:150]}")


def bars(console: Console, title: str, rows: list[tuple[str, int]], most: int | None = None) -> None:
    """A histogram in text; rows that do not fit are summed up. most: what a whole bar stands for."""
    console.print(f"  {title}:")
    most = max(count for _, count in rows) if most is None else most
    names = [safe(name)[:40] for name, _ in rows[:ROWS]]
    width = max(map(len, names))
    for name, (_, count) in zip(names, rows, strict=False):
        console.print(f"    {name:>{width}} {'█' * max(1, round(BAR_WIDTH * count / most))} {count:,}")
    if len(rows) > ROWS:
        console.print(f"    and {len(rows) - ROWS} others with {sum(count for _, count in rows[ROWS:]):,} clips")


def number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}" if count else f"no {what}s"


def safe(text: str) -> str:
    """Text of a data set as one line that cannot steer the terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def check(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from vidcls.inspection.verify import verify

    started = time.monotonic()
    problems = []
    with progress_bar(console, "clips checked") as progress:
        for problem in verify(args.place, args.workers, progress):
            problems.append(asdict(problem))
            console.print(safe(str(problem)))
    seconds = time.monotonic() - started
    console.print(f"{args.place}: {number(len(problems), 'problem')} found in {seconds:.1f} s")
    return problems


def compare(args: argparse.Namespace, index: ShardIndex, console: Console) -> tuple[list["Match"], dict[str, str]]:
    """(matches, key -> reason of the clips that could not be read)"""
    from vidcls.inspection.similarity import MAX_DISTANCE, look_at, matches

    other = ShardIndex.open(args.against)
    itself = other.digest == index.digest
    if other.labels.names != index.labels.names:
        console.print(f"{args.against} has other classes, or another order of them")
    looks = []
    for place, opened in [(args.place, index)] + ([] if itself else [(args.against, other)]):
        with progress_bar(console, f"clips of {place} read") as progress:
            looks.append(look_at(place, opened, args.workers, progress))
    unread: dict[str, str] = {}
    for look in looks:
        unread |= look.unread
    for key, reason in unread.items():
        console.print(safe(f"{key}: not compared: {reason}"))
    max_distance = MAX_DISTANCE if args.max_distance is None else args.max_distance
    found = matches(looks[0], None if itself else looks[1], max_distance)
    for match in found:
        console.print(f"{match.reason}: {number(match.count, 'pair')}")
        for pair in match.pairs[:PAIRS_SHOWN]:
            distance = "" if pair.distance is None else f"{pair.distance} of 256 bits differ"
            detail = ", ".join(filter(None, (pair.detail, distance)))
            console.print(safe(f"  {pair.key} and {pair.other_key} ({detail})"))
        if match.count > PAIRS_SHOWN:
            console.print(f"  and {match.count - PAIRS_SHOWN:,} more")
    if not found:
        console.print("no clip is there twice" if itself else f"no clip in common with {args.against}")
    return found, unread


def _write_json(out: Path | None, result: dict[str, Any]) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the workers are ended too
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        return inspect(args, console)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
