"""How much of the machine's bare decoding speed does making shards keep?

    python benchmarks/sharding.py [--videos DIR] [--clips 120] [--workers N] [--rounds 7]

The ceiling: N plain processes decode, resize and encode a static share of the clips each and throw the result away;
they are running and warm before the clock starts. Against it stands write_shards with N workers: the whole data set,
from the first call to index.json on disk (tar, checksums, fsync, rename). It starts its workers anew in every call,
which takes as long for ten clips as for a million, so there are two figures:

    steady    clips after the first tenth, from the tenth's last clip to the return of write_shards
    command   all clips, from the call to the return: start-up of the workers and their imports included

The ceiling decodes the clips that `steady` counts. Beside `steady` stands the same by the CPU time that all processes
spent on those clips, which other programs on the machine disturb less. Everything is done for frames with a short side
of 128 and for frames of at most --max-pixels. DIR holds <Class>/<clips>; without it, synthetic H.264 clips of 240x240
are made.
Exit codes: 0 done (a missed bar is said, not an error), 2 wrong options or data.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from rounds import RESULTS, Ratio, Spread, clips_of, conditions, show_ratios, table, take_turns, write_json

from vidcls.data.codecs import encode_frames
from vidcls.data.labels import LabelSpace
from vidcls.data.settings import DecodeSettings
from vidcls.sharding import decode, packing
from vidcls.sharding.decode import decode_clip
from vidcls.sharding.records import ClipRecord
from vidcls.sharding.writer import Plan, write_shards

BAR = 0.9
SAMPLES_PER_SHARD = 100
COSTED_CLIPS = 60


@dataclass(frozen=True)
class Written:
    """One call of write_shards; clips/s, seconds until the first clip was there, and CPU seconds of all processes."""

    steady: float
    command: float
    start_up: float
    cpu: float


def write(plan: Plan, out: Path, workers: int, warm: int) -> Written:
    """`warm`: the clips that the steady rate leaves out."""
    arrived: list[float] = []
    cpu_before = _cpu_with_ended_workers()
    started = time.perf_counter()
    write_shards(plan, out, workers=workers, progress=lambda *_: arrived.append(time.perf_counter()))
    ended = time.perf_counter()
    shutil.rmtree(out)
    clips = len(plan.records)
    steady = (clips - warm) / (ended - arrived[warm - 1])
    cpu = _cpu_with_ended_workers() - cpu_before
    return Written(steady, clips / (ended - started), arrived[0] - started, cpu)


def _cpu_with_ended_workers() -> float:
    """CPU seconds of this process and of the workers that its fork server has had and has seen the end of."""
    time.sleep(0.2)  # until it has
    used = [psutil.Process().cpu_times()[:2]]
    for child in psutil.Process().children():
        if any("forkserver" in word for word in child.cmdline()):
            used.append(child.cpu_times()[:4])
    return sum(map(sum, used))


@contextmanager
def bare_decoders(
    records: Sequence[ClipRecord], workers: int
) -> Iterator[Callable[[DecodeSettings], tuple[float, float]]]:
    """Gives a function that has the processes go through all the clips once: clips/s, and CPU seconds."""
    context = multiprocessing.get_context("forkserver")
    with ExitStack() as stack:
        pipes = []
        for number in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_decode_share, args=(theirs, records[number::workers]), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(ours.close)  # which ends the process
            theirs.close()
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()

        def run(settings: DecodeSettings) -> tuple[float, float]:
            started = time.perf_counter()
            for pipe in pipes:
                pipe.send(settings)
            cpu = sum(pipe.recv() for pipe in pipes)
            return len(records) / (time.perf_counter() - started), cpu

        yield run


def _decode_share(pipe: Connection, records: Sequence[ClipRecord]) -> None:
    for record in records[:3]:
        _decode_one(record, DecodeSettings())
    pipe.send(None)
    while True:
        try:
            settings = pipe.recv()
        except EOFError:
            return
        started = time.process_time()
        for record in records:
            _decode_one(record, settings)
        pipe.send(time.process_time() - started)


def _decode_one(record: ClipRecord, settings: DecodeSettings) -> None:
    encode_frames(decode_clip(record.path, settings, record.start, record.end).frames, settings)


def costs(records: Sequence[ClipRecord], settings: DecodeSettings) -> dict[str, float]:
    """Mean milliseconds of the parts of pack_clip, in this process alone."""
    spent = {"decode_clip": 0.0, "resize_frames": 0.0, "encode_frames": 0.0, "pack_clip": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            spent[name] += time.perf_counter() - started
            return result

        return call

    with (
        mock.patch.object(packing, "decode_clip", timed("decode_clip", packing.decode_clip)),
        mock.patch.object(packing, "encode_frames", timed("encode_frames", packing.encode_frames)),
        mock.patch.object(decode, "resize_frames", timed("resize_frames", decode.resize_frames)),
    ):
        for record in records:
            timed("pack_clip", packing.pack_clip)(record, settings)
    each = {name: 1e3 * seconds / len(records) for name, seconds in spent.items()}
    return {
        "decode": each["decode_clip"] - each["resize_frames"],
        "resize": each["resize_frames"],
        "encode": each["encode_frames"],
        "tar and checksum": each["pack_clip"] - each["decode_clip"] - each["encode_frames"],
    }


def compare(
    labels: LabelSpace, records: list[ClipRecord], variants: dict[str, DecodeSettings], rounds: int, workers: int
) -> tuple[list[Ratio], dict[str, Spread]]:
    """Ratios against the ceiling, and the rates (clips/s) and start-up times (s) that they come from."""
    warm = max(workers, len(records) // 10)
    written: dict[str, list[Written]] = {name: [] for name in variants}
    cpu: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in variants}
    with (
        tempfile.TemporaryDirectory(prefix="vidcls-sharding-") as folder,
        bare_decoders(records[warm:], workers) as decode_all,
    ):
        outs = (Path(folder) / f"shards-{number}" for number in count())

        def write_variant(name: str) -> float:
            few, every = (Plan(some, labels, variants[name], SAMPLES_PER_SHARD) for some in (records[:warm], records))
            start = write(few, next(outs), workers, 1)  # only for its CPU time, most of it imports
            written[name].append(write(every, next(outs), workers, warm))
            cpu[name][1].append(written[name][-1].cpu - start.cpu)
            return written[name][-1].steady

        def decode_variant(name: str) -> float:
            rate, seconds = decode_all(variants[name])
            cpu[name][0].append(seconds)
            return rate

        contestants: dict[str, Callable[[], float]] = {}
        for name in variants:
            contestants[f"{name}: ceiling"] = partial(decode_variant, name)
            contestants[f"{name}: steady"] = partial(write_variant, name)
        rates = take_turns(contestants, rounds)
    ratios, spreads = [], {name: Spread.of(values) for name, values in rates.items()}
    for name, calls in written.items():
        ceiling = rates[f"{name}: ceiling"]
        ratios.append(Ratio.of(f"{name}: steady / ceiling", rates[f"{name}: steady"], ceiling, BAR))
        ratios.append(Ratio.of(f"{name}: steady / ceiling, by CPU time", *cpu[name]))
        ratios.append(Ratio.of(f"{name}: command / ceiling", [call.command for call in calls], ceiling))
        spreads[f"{name}: command"] = Spread.of([call.command for call in calls])
        spreads[f"{name}: start-up, s"] = Spread.of([call.start_up for call in calls])
    return ratios, spreads


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--videos", type=Path, help="folder of <Class>/<clips>; synthetic clips without it")
    parser.add_argument("--clips", type=int, default=120, help="per round; videos are used again if there are fewer")
    parser.add_argument("--workers", type=int, default=cores, help=f"processes of each side (default: {cores}, cores)")
    parser.add_argument("--rounds", type=int, default=7, help="in which all take turns (default: 7)")
    parser.add_argument("--max-pixels", type=int, default=128 * 128, help="of the second variant (default: 128 x 128)")
    parser.add_argument("--json", type=Path, default=RESULTS / "sharding.json", help="where the figures go")
    args = parser.parse_args()
    if args.workers < 1 or args.rounds < 1 or args.clips < 10 * args.workers:
        parser.error("legal: --workers and --rounds at least 1, --clips at least 10 times the workers")
    try:
        variants = {
            "short side 128": DecodeSettings(),
            f"max-pixels {args.max_pixels}": DecodeSettings(short_side=None, max_pixels=args.max_pixels),
        }
        with tempfile.TemporaryDirectory(prefix="vidcls-videos-") as folder:
            labels, records = clips_of(args.videos, args.clips, Path(folder))
            per_clip = {name: costs(records[:COSTED_CLIPS], settings) for name, settings in variants.items()}
            ratios, rates = compare(labels, records, variants, args.rounds, args.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show_ratios(f"Making shards: {args.clips} clips of 16 frames, {args.workers} workers, {args.rounds} rounds", ratios)
    table("Rates", ("contestant", "clips/s, or s"), [(name, spread) for name, spread in rates.items()])
    parts = list(next(iter(per_clip.values())))
    rows = [(name, *(f"{cost[part]:.2f}" for part in parts)) for name, cost in per_clip.items()]
    table("Milliseconds per clip, one process", ("variant", *parts), rows)
    results = {
        "clips": args.clips,
        "videos": "given" if args.videos else "synthetic",
        "workers": args.workers,
        "rounds": args.rounds,
        "settings": {name: settings.to_dict() for name, settings in variants.items()},
        "ratios": ratios,
        "rates": rates,
        "milliseconds_per_clip": per_clip,
        **conditions("decord", "av", "simplejpeg", "pillow", "numpy", "pebble"),
    }
    write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
