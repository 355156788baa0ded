"""Decode a video data set once into WebDataset tar shards that vidcls trains from.

    python tools/make_shards.py ucf101 --videos UCF-101 --list trainlist01.txt --classes classInd.txt --out train
    python tools/make_shards.py folder --videos videos --split train --out train

Exit codes: 0 done, 2 wrong options or data, 3 more than 1 % of the clips failed, 130 interrupted. An interrupted
run leaves no index.json; the same command starts again.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vidcls.data.decode import DecodeSettings
from vidcls.data.labels import LabelSpace
from vidcls.data.packing import ShardSummary, write_shards
from vidcls.data.records import SPLITS, ClipRecord, read_folder, read_ucf101
from vidcls.data.shards import FAILED

MAX_FAILED = 0.01
PLAIN_LINE_SECONDS = 10.0


def parse_args() -> argparse.Namespace:
    how = argparse.ArgumentDefaultsHelpFormatter
    shared = argparse.ArgumentParser(add_help=False)
    default = DecodeSettings()
    cores = len(os.sched_getaffinity(0))
    shared.add_argument("--videos", type=Path, required=True, help="folder that holds <Class>/<clips>")
    shared.add_argument("--out", type=Path, required=True, help="folder for the shards; new or empty")
    shared.add_argument("--frames", type=int, default=default.frames, help="frames per clip, evenly spread")
    shared.add_argument("--short-side", type=int, default=default.short_side, help="pixels of the short side; even")
    shared.add_argument("--quality", type=int, default=default.quality, help="JPEG quality, 1 to 100")
    shared.add_argument("--workers", type=int, default=cores, help="decoding processes; 0: none besides this one")
    shared.add_argument("--samples-per-shard", type=int, default=256, help="clips per tar file")
    shared.add_argument("--clip-timeout", type=float, default=120.0, help="seconds before a clip is given up")
    shared.add_argument("--overwrite", action="store_true", help="replace a finished data set in OUT")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="layout", required=True)
    ucf101 = commands.add_parser("ucf101", parents=[shared], formatter_class=how, help="official UCF101 lists")
    ucf101.add_argument("--list", type=Path, required=True, help="trainlist or testlist file")
    ucf101.add_argument("--classes", type=Path, required=True, help="classInd.txt")
    folder = commands.add_parser("folder", parents=[shared], formatter_class=how, help="one folder per class")
    folder.add_argument("--split", choices=SPLITS, help="take one side of a fixed split; all clips if not given")
    folder.add_argument("--test-fraction", type=float, default=0.25, help="share of each class in the test split")
    return parser.parse_args()


def read_records(args: argparse.Namespace) -> tuple[LabelSpace, list[ClipRecord]]:
    if args.layout == "ucf101":
        return read_ucf101(args.videos, args.list, args.classes)
    return read_folder(args.videos, args.split, args.test_fraction)


def make_shards(args: argparse.Namespace, console: Console) -> int:
    """Returns the exit code."""
    settings = DecodeSettings(args.frames, args.short_side, args.quality)
    labels, records = read_records(args)
    console.print(f"{len(records)} clips of {len(labels)} classes, {args.workers} workers")
    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("clips", total=len(records), note="")
        started = last_line = time.monotonic()

        def progress(done: int, failed: int) -> None:
            nonlocal last_line
            now = time.monotonic()
            rate = done / (now - started)
            note = f"{rate:.1f} clips/s, {failed} failed"
            bar.update(task, completed=done, note=note)
            if not console.is_terminal and now - last_line >= PLAIN_LINE_SECONDS:
                last_line = now
                console.print(f"{done}/{len(records)} clips, {note}, {(len(records) - done) / rate:.0f} s left")

        summary = write_shards(
            records,
            labels,
            settings,
            args.out,
            workers=args.workers,
            samples_per_shard=args.samples_per_shard,
            progress=progress,
            clip_timeout=args.clip_timeout,
            overwrite=args.overwrite,
        )
    return report(summary, args.out, console)


def report(summary: ShardSummary, out: Path, console: Console) -> int:
    total = summary.samples + summary.failed
    decoders = ", ".join(f"{name} {count}" for name, count in summary.decoders.items())
    console.print(
        f"{out}: {summary.samples} clips in {summary.shards} shards, {summary.bytes / 1e6:.1f} MB, "
        f"{total / summary.seconds:.1f} clips/s; decoded by {decoders}"
    )
    if summary.damaged:
        console.print(f'{summary.damaged} clips are damaged: only their beginning was used ("damage" in their json)')
    if summary.failed:
        console.print(f"{summary.failed} of {total} clips failed, see {out / FAILED}")
    return 3 if summary.failed > MAX_FAILED * total else 0


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the workers are ended too
    console = Console(highlight=False, soft_wrap=True, markup=False)
    try:
        return make_shards(parse_args(), console)
    except KeyboardInterrupt:
        print("interrupted: nothing usable was written; the same command starts again", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
