"""How fast are batches read, against the bare JPEG decoder and against what one would otherwise write?

    python benchmarks/loader.py [--videos DIR] [--clips 300] [--workers 2] [--rounds 20] [--remote]

Clips of 16 frames are stored at the size that the model takes, so nobody resizes frames of shards again. Then, with as
many worker processes each and batches of 8 clips that the parent receives and drops:

    loader      read_batches as training calls it: random order, checksums, token ids, uint8 frames
    ceiling     simplejpeg alone (strict): every process decodes its share of the same JPEG bytes, which it holds in
                memory, over and over into one buffer that stays in the cache; nothing is kept or handed over
    batches     the same, but each batch of 8 clips is decoded into an array of its own, as it must be to be used
    webdataset  WebDataset(...).decode("rgb8") on the same shards, np.stack, WebLoader
    decord      the source videos: VideoReader(width=, height=).get_batch of 16 frames in a torch DataLoader (decord's
                own resizing was the fastest way found: faster than PIL or interpolate afterwards)

All are warm and keep their workers; they take turns in short rounds, and none begins before the one before it has
refilled its queues. Batches that lay ready are not counted. Beside the rates stands the CPU time per clip, of parent
and workers together: other programs on the machine disturb it less than the rates.

Then: memory of parent and workers together over epochs, with a plot (pages that no file backs, shared ones counted
once); and how an index of 200,000 clips opens and goes on far into a run, in fresh processes. --remote: the shards from
a web server on this machine, first through an empty cache, then through the full one.
DIR holds <Class>/<clips>; without it, synthetic H.264 clips of 240x240 are made.
Exit codes: 0 done (a missed bar is said, not an error), 2 wrong options or data.
"""

import argparse
import itertools
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import decord
import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from big_index import open_and_resume, write_big_index
from matplotlib.figure import Figure
from rounds import RESULTS, Ratio, Spread, clips_of, conditions, show_ratios, table, take_turns, write_json
from torch.utils.data import DataLoader, Dataset

from vidcls.data.features import FeatureCache
from vidcls.data.index import ShardIndex
from vidcls.data.joint import JointOrder
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice, training_requests
from vidcls.data.order import StepLayout
from vidcls.data.places import CacheSettings
from vidcls.data.reading import read_batches
from vidcls.data.settings import DecodeSettings, segment_midpoints
from vidcls.data.shards import ShardReader
from vidcls.model.patches import VisionGeometry
from vidcls.model.prompt import PromptEncoder
from vidcls.model.tiny import tiny_config, tiny_tokenizer
from vidcls.options import ACTION_TOKEN, DEFAULT_PROMPT
from vidcls.sharding.records import ClipRecord
from vidcls.sharding.writer import Plan, write_shards

FRAMES, BATCH = 16, 8
WARM_BATCHES = 8  # more than lie ready anywhere: 2 per worker
OF_CEILING, OVER_DECORD, OVER_WEBDATASET = 0.9, 10.0, 2.0
OPEN_SECONDS, RESUME_SECONDS, GROWTH_BYTES = 1.0, 0.1, 100e6
MEMORY_SAMPLES = 20  # per epoch
FOREVER = 10**9
SETTLED_POLLS, POLL_SECONDS = 4, 0.02
Turn = Callable[[], tuple[float, int]]
"""A contestant's part of a round: clips/s, and how many clips it took, those before the clock started included."""


class Contestant:
    """Called once a round, it gives clips/s."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.cpu_milliseconds: list[float] = []
        """Per clip, of this process and its children, in each round. Everybody else must be idle."""

    def __call__(self) -> float:
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        before = _cpu_seconds(family)
        rate, clips = self._turn()
        _settle(family[1:])
        self.cpu_milliseconds.append(1e3 * (_cpu_seconds(family) - before) / clips)
        return rate


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def _settle(workers: Sequence[psutil.Process]) -> None:
    """Wait until they have nothing to do: queues are full."""
    quiet = 0
    while quiet < SETTLED_POLLS:
        time.sleep(POLL_SECONDS)
        busy = any(worker.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP) for worker in workers)
        quiet = 0 if busy else quiet + 1


def reader_of(index: ShardIndex, features: FeatureCache | None = None) -> ClipBatches:
    """With the real prompt layout and geometry, but a tokenizer of bytes. Frames stay as large as they are stored."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [ACTION_TOKEN]})
    config, largest = tiny_config(), index.settings.max_pixels
    assert largest is not None
    encoder = PromptEncoder(tokenizer, VisionGeometry.from_config(config), config.video_token_id, 4096, 784, largest)
    return ClipBatches([ClipSource(index, DEFAULT_PROMPT, features=features)], encoder, FrameChoice(FRAMES))


def loader(index: ShardIndex, workers: int, seconds: float, features: FeatureCache | None = None) -> Turn:
    order, layout = JointOrder.single(len(index), 1), StepLayout(BATCH, BATCH, 1, 0)
    requests = training_requests(order, layout, 0, FOREVER)
    return _turn_of(map(len, read_batches(reader_of(index, features), requests, workers=workers, pin=False)), seconds)


def web_dataset(shards: Path, workers: int, seconds: float) -> Turn:
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=False).repeat().decode("rgb8").map(_stack).batched(BATCH)
    batches = webdataset.WebLoader(samples, batch_size=None, num_workers=workers)
    return _turn_of((len(frames) for frames, _ in batches), seconds)


def _stack(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
    return np.stack([sample[f"{i:03d}.jpg"] for i in range(FRAMES)]), sample["json"]["label"]


def decord_on_the_fly(records: Sequence[ClipRecord], size: tuple[int, int], workers: int, seconds: float) -> Turn:
    batches = DataLoader(_Videos(records, size), batch_size=BATCH, num_workers=workers)
    return _turn_of((len(frames) for frames, _ in batches), seconds)


class _Videos(Dataset):
    """(frames, label) of the videos over and over; size: (height, width)."""

    def __init__(self, records: Sequence[ClipRecord], size: tuple[int, int]) -> None:
        self.records = records
        self.size = size

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        record, (height, width) = self.records[i % len(self.records)], self.size
        video = decord.VideoReader(str(record.path), width=width, height=height, num_threads=1)
        frames = video.get_batch(segment_midpoints(len(video), FRAMES)).asnumpy()
        return torch.from_numpy(frames), record.label


def _turn_of(sizes: Iterator[int], seconds: float) -> Turn:
    """sizes: clips of each batch of an endless loader, which is consumed."""

    def run() -> tuple[float, int]:
        ready = sum(next(sizes) for _ in range(WARM_BATCHES))
        clips, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            clips += next(sizes)
        return clips / elapsed, ready + clips

    run()  # the workers start
    return run


def bare_jpeg(index: ShardIndex, workers: int, seconds: float, keep: bool, stack: ExitStack) -> Turn:
    """The ceiling; its processes end with `stack`. keep: a new array for each batch."""
    reader, context = ShardReader(index), multiprocessing.get_context("fork")
    pipes = []
    for number in range(workers):
        clips = [reader.read(sample).frames for sample in range(number, len(index), workers)]
        ours, theirs = context.Pipe()
        process = context.Process(target=_decode_share, args=(theirs, clips, seconds, keep), daemon=True)
        process.start()
        stack.callback(process.join)
        stack.callback(ours.send, False)
        pipes.append(ours)

    def run() -> tuple[float, int]:
        for pipe in pipes:
            pipe.send(True)
        done = [pipe.recv() for pipe in pipes]
        return sum(clips / elapsed for clips, elapsed in done), sum(clips for clips, _ in done)

    return run


def _decode_share(pipe: Connection, clips: list[list[bytes]], seconds: float, keep: bool) -> None:
    height, width, _, _ = simplejpeg.decode_jpeg_header(clips[0][0])
    shape = (BATCH if keep else 1, FRAMES, height, width, 3)
    batch = np.empty(shape, dtype=np.uint8)
    endless = itertools.cycle(clips)
    while pipe.recv():
        decoded, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            if keep:
                batch = np.empty(shape, dtype=np.uint8)
            for clip in batch:
                for i, stored in enumerate(next(endless)):
                    simplejpeg.decode_jpeg(stored, colorspace="RGB", strict=True, buffer=clip[i])
            decoded += len(batch)
        pipe.send((decoded, elapsed))


@dataclass(frozen=True)
class Comparison:
    """Per round: clips/s of each contestant, and its CPU milliseconds per clip."""

    rates: dict[str, list[float]]
    cpu: dict[str, list[float]]


def compare(turns: dict[str, Turn], rounds: int) -> Comparison:
    contestants = {name: Contestant(turn) for name, turn in turns.items()}
    _settle(psutil.Process().children(recursive=True))
    rates = take_turns(contestants, rounds)  # type: ignore[arg-type]
    return Comparison(rates, {name: contestant.cpu_milliseconds for name, contestant in contestants.items()})


@dataclass(frozen=True)
class Memory:
    """bytes: of parent and workers together, MEMORY_SAMPLES times per epoch. growth: from first to last epoch."""

    bytes: list[int]
    epochs: int

    @property
    def growth(self) -> float:
        first, last = self.bytes[:MEMORY_SAMPLES], self.bytes[-MEMORY_SAMPLES:]
        return median(last) / median(first) - 1

    def plot(self, path: Path) -> None:
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(np.arange(len(self.bytes)) / MEMORY_SAMPLES, np.array(self.bytes) / 1e6)
        axes.set(xlabel="epochs", ylabel="memory of parent and workers, MB")
        axes.set(xlim=(0, self.epochs), ylim=(0, 1.15 * max(self.bytes) / 1e6))
        axes.set_title(f"Reading batches: last epoch over the first {self.growth:+.2%}")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=100)


def memory(index: ShardIndex, workers: int, epochs: int) -> Memory:
    """Reads `epochs` epochs with fresh workers."""
    order, layout = JointOrder.single(len(index), 1), StepLayout(BATCH, BATCH, 1, 0)
    batches = epochs * len(index) // BATCH
    stops = {round((i + 1) * batches / (epochs * MEMORY_SAMPLES)) for i in range(epochs * MEMORY_SAMPLES)}
    me, samples = psutil.Process(), []
    others = set(me.children(recursive=True))
    requests = training_requests(order, layout, 0, batches)
    for number, _ in enumerate(read_batches(reader_of(index), requests, workers=workers, pin=False), 1):
        if number in stops:
            processes = {me, *me.children(recursive=True)} - others
            samples.append(sum(_own_bytes(process.pid) for process in processes))
    return Memory(samples, epochs)


def _own_bytes(process: int) -> int:
    """Pages that no file backs, shared ones in part. Libraries would count less while others run that map them too."""
    lines = map(str.split, Path(f"/proc/{process}/smaps_rollup").read_text().splitlines())
    return sum(1024 * int(words[1]) for words in lines if words[0] in ("Pss_Anon:", "Pss_Shmem:"))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of `folder` on a web server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def remote(shards: Path, workers: int, rounds: int) -> dict[str, list[float]]:
    """Clips/s of one epoch, from opening the index to the last batch: empty cache, full cache, and the local folder."""

    def epoch(place: Path | str, cache: Path) -> float:
        started = time.perf_counter()
        index = ShardIndex.open(place, CacheSettings(cache))
        order, layout = JointOrder.single(len(index), 1), StepLayout(BATCH, BATCH, 1, 0)
        requests = training_requests(order, layout, 0, len(index) // BATCH)
        clips = sum(map(len, read_batches(reader_of(index), requests, workers=workers, pin=False)))
        return clips / (time.perf_counter() - started)

    found: dict[str, list[float]] = {"empty cache": [], "full cache": [], "local": []}
    with served(shards) as url:
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="vidcls-cache-") as cache:
                for name, place in (("empty cache", url), ("full cache", url), ("local", shards)):
                    found[name].append(epoch(place, Path(cache)))
    return found


def limit(name: str, values: Sequence[float], most: float, unit: str) -> tuple[str, str, str]:
    """A row of the table; the bar holds for the median."""
    spread = Spread.of(values)
    return name, f"{spread} {unit}", f"<= {most:g} {unit}: {'met' if spread.median <= most else 'MISSED'}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--videos", type=Path, help="folder of <Class>/<clips>; synthetic clips without it")
    parser.add_argument(
        "--clips", type=int, default=300, help="in the shards; videos are used again if there are fewer"
    )
    parser.add_argument("--max-pixels", type=int, default=128 * 128, help="of a frame (default: 128 x 128)")
    parser.add_argument("--workers", type=int, default=2, help="processes of each contestant (default: 2)")
    parser.add_argument("--rounds", type=int, default=20, help="in which all take turns (default: 20)")
    parser.add_argument("--seconds", type=float, default=0.7, help="of each contestant in a round (default: 0.7)")
    parser.add_argument("--epochs", type=int, default=30, help="over which memory is watched (default: 30)")
    parser.add_argument("--index-samples", type=int, default=200_000, help="clips of the big index (default: 200000)")
    parser.add_argument("--remote", action="store_true", help="read through a web server and a cache, too")
    parser.add_argument("--json", type=Path, default=RESULTS / "loader.json", help="figures; the plot lies beside it")
    args = parser.parse_args()
    if min(args.workers, args.rounds, args.index_samples) < 1 or args.epochs < 2 or args.seconds <= 0:
        parser.error("legal: --workers, --rounds, --index-samples at least 1, --epochs at least 2, --seconds above 0")
    if args.clips < max(MEMORY_SAMPLES * BATCH, 2 * args.workers):
        parser.error(f"--clips: {args.clips}; legal: at least {MEMORY_SAMPLES * BATCH} and twice the workers")
    try:
        with tempfile.TemporaryDirectory(prefix="vidcls-loader-") as folder:
            results = measure(args, Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(args.json, results)
    return 0


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Runs everything, prints the tables, and returns what belongs into the JSON file."""
    labels, records = clips_of(args.videos, args.clips, work)
    settings = DecodeSettings(frames=FRAMES, short_side=None, max_pixels=args.max_pixels)
    shards = work / "shards"
    # As many shards as WebDataset needs to give every worker one.
    plan = Plan(records, labels, settings, max(1, len(records) // (2 * args.workers)))
    write_shards(plan, shards, workers=args.workers)
    index = ShardIndex.open(shards)
    sizes = {*zip(index.width.tolist(), index.height.tolist(), strict=True)}
    if len(sizes) > 1:
        raise ValueError(f"--videos: clips are stored as {sizes}; WebDataset's batches need one size for all")
    watched = memory(index, args.workers, args.epochs)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    watched.plot(args.json.with_name(f"{args.json.stem}_memory.png"))
    big = write_big_index(work / "big", args.index_samples)
    fresh = [open_and_resume(big) for _ in range(min(args.rounds, 3))]
    size = int(index.height[0]), int(index.width[0])
    with ExitStack() as stack:
        turns = {
            "ceiling": bare_jpeg(index, args.workers, args.seconds, False, stack),
            "batches": bare_jpeg(index, args.workers, args.seconds, True, stack),
            "loader": loader(index, args.workers, args.seconds),
            "webdataset": web_dataset(shards, args.workers, args.seconds),
        }
        fast = compare(turns, args.rounds)
        # Apart: a round has to be longer, for a batch takes a second.
        slow_seconds = 4 * args.seconds
        turns = {
            "loader": loader(index, args.workers, slow_seconds),
            "decord": decord_on_the_fly(records, size, args.workers, slow_seconds),
        }
        slow = compare(turns, max(1, args.rounds // 4))
    rates, cpu = fast.rates | {"decord": slow.rates["decord"]}, fast.cpu | {"decord": slow.cpu["decord"]}
    ratios = [
        Ratio.of("loader / ceiling (bare simplejpeg)", fast.rates["loader"], fast.rates["ceiling"], OF_CEILING),
        Ratio.of("loader / ceiling, by CPU time", fast.cpu["ceiling"], fast.cpu["loader"]),
        Ratio.of("loader / batches (simplejpeg, kept)", fast.rates["loader"], fast.rates["batches"], OF_CEILING),
        Ratio.of("loader / webdataset", fast.rates["loader"], fast.rates["webdataset"], OVER_WEBDATASET),
        Ratio.of("loader / decord on the fly", slow.rates["loader"], slow.rates["decord"], OVER_DECORD),
    ]
    sources = f"{len(records)} clips of {FRAMES} frames at {index.width[0]}x{index.height[0]}"
    show_ratios(f"Reading batches: {sources}, {args.workers} workers, {args.rounds} rounds", ratios)
    rows = [(name, Spread.of(rates[name]), Spread.of(cpu[name])) for name in rates]
    table("Rates", ("contestant", "clips/s", "CPU ms per clip"), rows)
    grown = watched.growth
    table(
        "Memory and opening",
        ("figure", "median (least to most)", "bar"),
        [
            (f"memory, epoch {args.epochs} over epoch 1", f"{grown:+.2%} of {watched.bytes[0] / 1e6:.0f} MB", ""),
            *index_rows(args.index_samples, fresh),
        ],
    )
    results = {
        "clips": len(records),
        "videos": "given" if args.videos else "synthetic",
        "frame_size": [int(index.width[0]), int(index.height[0])],
        "workers": args.workers,
        "batch": BATCH,
        "rounds": args.rounds,
        "settings": settings.to_dict(),
        "ratios": ratios,
        "clips_per_second": {name: rate for name, rate, _ in rows},
        "cpu_milliseconds_per_clip": {name: spent for name, _, spent in rows},
        "memory": {"epochs": args.epochs, "growth": round(grown, 4), "bytes": watched.bytes},
        "big_index": {
            "samples": args.index_samples,
            **{name: Spread.of([f[name] for f in fresh]) for name in fresh[0]},
        },
        **conditions("torch", "simplejpeg", "decord", "webdataset", "numpy", "pillow"),
    }
    if args.remote:
        epochs = {name: Spread.of(values) for name, values in remote(shards, args.workers, min(args.rounds, 3)).items()}
        table("One epoch over http, opening included", ("from", "clips/s"), list(epochs.items()))
        results["remote_clips_per_second"] = epochs
    return results


def index_rows(samples: int, fresh: list[dict[str, float]]) -> list[tuple[str, str, str]]:
    name = f"index of {samples} clips"
    return [
        limit(f"{name}: open", [f["open_seconds"] for f in fresh], OPEN_SECONDS, "s"),
        limit(f"{name}: first request far in", [f["resume_seconds"] for f in fresh], RESUME_SECONDS, "s"),
        limit(f"{name}: growth of the process", [f["growth_bytes"] / 1e6 for f in fresh], GROWTH_BYTES / 1e6, "MB"),
        limit(f"{name}: at its peak", [f["peak_growth_bytes"] / 1e6 for f in fresh], GROWTH_BYTES / 1e6, "MB"),
    ]


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: asked for
    sys.exit(main())
