"""Decode a video data set once into WebDataset tar shards that vidcls trains from.

    python tools/make_shards.py ucf101 --videos UCF-101 --list trainlist01.txt --classes classInd.txt --out train
    python tools/make_shards.py ssv2 --videos 20bn-ssv2 --list train.json --labels labels.json --out train
    python tools/make_shards.py folder --videos videos --split train --out train

On several hosts that see the same folders, one process on each:

    mpirun -n 8 --map-by node --bind-to none python tools/make_shards.py ...

Stopped at any moment, the same command goes on where it was; the result is the same, byte for byte.
Exit codes: 0 done, 2 wrong options or data, or a full disk, 3 more than 1 % of the clips failed, 130 interrupted.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from vidcls.data.index import FAILED
from vidcls.data.settings import LOSSY, SUFFIXES, DecodeSettings
from vidcls.progress import progress_bar
from vidcls.sharding.readers import folder, sharegpt, ssv2, table, ucf101
from vidcls.sharding.records import check_present, read_prompts, with_prompts
from vidcls.sharding.team import Team, join_team
from vidcls.sharding.writer import Plan, ShardSummary, write_shards

READERS = {
    "ucf101": (ucf101, "official UCF101 lists"),
    "ssv2": (ssv2, "official Something-Something V2 lists"),
    "folder": (folder, "one folder per class"),
    "csv": (table, "a table of path, label and perhaps start, end; Kinetics lists too"),
    "sharegpt": (sharegpt, "ShareGPT JSON with action_label, as of LLaMA-Factory"),
}
MAX_FAILED = 0.01
DEFAULT = DecodeSettings()
MAX_PIXELS = 128 * 128  # as video_max_pixels in training


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="layout", required=True)
    for name, (reader, about) in READERS.items():
        command = commands.add_parser(name, formatter_class=Help, help=about, description=about, allow_abbrev=False)
        reader.add_arguments(command.add_argument_group("data set"))
        _add_storing(command.add_argument_group("what is stored"))
        _add_running(command.add_argument_group("how it runs"))
    return parser.parse_args()


def _add_storing(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=Path, required=True, help="folder for the shards; new or empty")
    count = group.add_mutually_exclusive_group()
    count.add_argument("--frames", type=int, help=f"frames per clip, evenly spread (if no --fps: {DEFAULT.frames})")
    count.add_argument("--fps", type=float, help="frames per second of video instead; at most --max-frames a clip")
    group.add_argument("--max-frames", type=int, help="frames per clip at most, with --fps")
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--short-side",
        type=int,
        help=f"pixels of a frame's short side, even (if no --max-pixels: {DEFAULT.short_side})",
    )
    size.add_argument("--max-pixels", type=int, help="largest frame area in pixels; sides become multiples of 28")
    group.add_argument("--codec", choices=SUFFIXES, default=DEFAULT.codec, help="of the stored frames")
    group.add_argument("--quality", type=int, help=f"of jpg and webp, 1 to 100 (there {DEFAULT.quality})")
    group.add_argument("--samples-per-shard", type=int, default=256, help="clips per tar file")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help='what the model is asked: "<video>... <ACTION>"; else the recipe says it')
    prompts.add_argument("--prompts", type=Path, help="file with a prompt per line, of which each clip gets one")


def _add_running(group: argparse._ArgumentGroup) -> None:
    cores = len(os.sched_getaffinity(0))
    group.add_argument("--workers", type=int, default=cores, help="decoding processes on each host; 0: none of its own")
    group.add_argument("--clip-timeout", type=float, default=120.0, help="seconds before a clip is given up")
    group.add_argument("--overwrite", action="store_true", help="replace another data set of ours in OUT")


def plan_of(args: argparse.Namespace) -> Plan:
    """ValueError for options or a data set that cannot be used."""
    settings = DecodeSettings(
        frames=args.frames if args.frames is not None or args.fps is not None else DEFAULT.frames,
        fps=args.fps,
        max_frames=args.max_frames,
        short_side=args.short_side,
        max_pixels=args.max_pixels if args.max_pixels is not None or args.short_side is not None else MAX_PIXELS,
        codec=args.codec,
        quality=args.quality if args.quality is not None or args.codec not in LOSSY else DEFAULT.quality,
    )
    labels, records = READERS[args.layout][0].read(args)
    check_present(records, args.layout)
    if args.prompt is not None or args.prompts is not None:
        records = with_prompts(records, [args.prompt] if args.prompts is None else read_prompts(args.prompts))
    return Plan(records, labels, settings, args.samples_per_shard)


def make_shards(args: argparse.Namespace, team: Team, console: Console) -> int:
    """Returns the exit code."""
    plan: Plan = team.share(plan_of(args) if team.rank == 0 else None)
    hosts = f" in each of {team.size} processes" if team.size > 1 else ""
    console.print(f"{len(plan.records)} clips of {len(plan.labels)} classes, {args.workers} workers{hosts}")
    with progress_bar(console, "clips of this process" if team.size > 1 else "clips") as show:
        summary = write_shards(
            plan,
            args.out,
            workers=args.workers,
            clip_timeout=args.clip_timeout,
            overwrite=args.overwrite,
            progress=lambda done, failed, of: show(done, of, f"{failed} failed"),
            team=team,
        )
    return report(summary, args.out, console)


def report(summary: ShardSummary, out: Path, console: Console) -> int:
    total = summary.samples + summary.failed
    decoders = ", ".join(f"{name} {count}" for name, count in summary.decoders.items())
    size = f"{summary.samples} clips in {summary.shards} shards, {summary.bytes / 1e6:.1f} MB"
    console.print(f"{out}: {size}; decoded by {decoders}")
    if summary.made:
        console.print(f"{summary.made} clips in {summary.seconds:.1f} s, {summary.made / summary.seconds:.1f} clips/s")
    if summary.made < total:
        console.print(f"{total - summary.made} clips were there already")
    if summary.damaged:
        console.print(f'{summary.damaged} clips are damaged: only their beginning was used ("damage" in their json)')
    if summary.failed:
        console.print(f"{summary.failed} of {total} clips failed, see {out / FAILED}")
    return 3 if summary.failed > MAX_FAILED * total else 0


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the workers are ended too
    team = join_team()
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=team.rank > 0)
    try:
        return make_shards(args, team, console)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        code = 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    team.end(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
