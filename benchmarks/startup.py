"""What a start, a resume and a checkpoint cost: seconds to the first step, seconds that training stands, bytes.

    python benchmarks/startup.py [--rounds 3] [--shape tiny]                 about five minutes
    python benchmarks/startup.py --shape 3b [--model DIR] [--rounds 1]       eight minutes a round, 14 GB of memory

Each round starts launch/train.py three times through the deepspeed launcher, on --ranks CPU ranks, with the recipe's
self-check:

    cold       a new run that writes its checkpoints behind training (async_save); to its end
    resume     a new folder, from the first run's first checkpoint; to the first new step
    standing   a new run for whose checkpoints training stands (async_save=false); to its end

The tiny model trains LoRA of such a rank that 29.5 million parameters have masters and moments (354 MB), about what
rank 16 is on the 3B shape; --lora-rank 16 is the quickstart's. The 3B shape has random weights: those of --model DIR
(as tools/make_random_checkpoint.py writes them), or new ones of 7.5 GB, removed at the end.

A stall is what the log's save_stall_seconds says, of every save but a run's first, which the self-check reads back, and
its last, which is waited for. What a save costs in all is its stall and what the steps behind it take longer than the
run's median step before its first save: on a CPU the writing takes cores from them.

Bars: resume over cold 1.2; stall behind over stall standing 0.05; a checkpoint's bytes 1.05 x 12 a trained number, and
the model. Tables go to the screen, all numbers with versions and recipes, and a picture, into benchmarks/results/.
Exit codes: 0 done, 1 a run failed, 2 wrong options.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml
from matplotlib.figure import Figure
from processes import ROOT, launched, logged_rows, motion_shards, ranks_below, tool
from rounds import RESULTS, Ratio, Spread, conditions, show_ratios, table, write_json

from vidcls.training.sharded_state import WEIGHT, StoredState

FIRST_STEP_SECONDS = 900.0
RUN_SECONDS = 3600.0
RESUME_BAR, STALL_BAR, SIZE_BAR = 1.2, 0.05, 1.05
STATE_BYTES = 12  # of a trained number: fp32 master and two moments
MODEL_BYTES = 2  # bf16
PHASES = {
    "launcher": "command to rank",
    "building": "imports, checks, model, engine",
    "stepping": "first step",
}


@dataclass(frozen=True)
class Shape:
    """How a shape is run. Saves are `interval` steps apart, so that none waits for the one before."""

    recipe: str
    lora_rank: int
    per_class: int
    frames: int
    batch: int
    steps: int
    interval: int


SHAPES = {
    "tiny": Shape("quickstart", lora_rank=7200, per_class=16, frames=8, batch=4, steps=18, interval=5),
    "3b": Shape("ucf101", lora_rank=16, per_class=1, frames=16, batch=2, steps=8, interval=3),
}
SIZE = 112


@dataclass(frozen=True)
class Start:
    """Seconds from the command to the end of the first step, and of its PHASES."""

    seconds: float
    launcher: float
    building: float
    stepping: float


@dataclass(frozen=True)
class Saves:
    """Of one run, in seconds: its stalls; step, the median one without a save's company; behind, `steps` steps after
    each save."""

    stalls: list[float]
    step: float
    behind: list[float]
    steps: int

    @property
    def cost(self) -> float:
        """Seconds that a save costs in all."""
        return median(self.stalls) + max(0.0, median(self.behind) - self.step * self.steps)


@dataclass(frozen=True)
class Round:
    cold: Start
    resume: Start
    behind: Saves
    standing: Saves


def options_of(shape: Shape, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The recipe's keys that all runs share."""
    return {
        "model_name_or_path": work / "model" if args.shape != "tiny" else "tiny",
        "dataset": work / "shards",
        "num_action_classes": "null",
        "eval_dataset": "null",
        "eval_strategy": "no",
        "lora_rank": args.lora_rank or shape.lora_rank,
        "lora_alpha": 2 * (args.lora_rank or shape.lora_rank),
        "video_max_pixels": SIZE * SIZE,
        "dataloader_num_workers": 1,
        "per_device_train_batch_size": shape.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": shape.steps,
        "save_steps": shape.interval,
        "save_total_limit": "null",
        "logging_steps": 1,
        "plot_loss": "false",
        "report_to": "none",
        "deepspeed": f"ds_configs/zero{args.stage}.json",
    }


def run(output: Path, shape: Shape, options: dict[str, Any], ranks: int, *, to_the_end: bool) -> Start:
    """Start a run in `output`, follow it to its first step, and on to its end if told so."""
    shutil.rmtree(output, ignore_errors=True)
    words = [f"launch/recipes/{shape.recipe}.yaml", f"output_dir={output}"]
    words += [f"{key}={value}" for key, value in options.items()]
    log = output.with_suffix(".log")
    command = time.time()
    began: float | None = None
    with launched(ranks, words, log) as launcher:
        while not logged_rows(output):
            if began is None and ranks_below(launcher):
                began = time.time()
            if launcher.poll() is not None or time.time() - command > FIRST_STEP_SECONDS:
                raise RuntimeError(f"no first step:\n{log.read_text()[-3000:]}")
            time.sleep(0.01)
        stepped = time.time()
        if to_the_end and (code := launcher.wait(RUN_SECONDS)):
            raise RuntimeError(f"exit code {code}:\n{log.read_text()[-3000:]}")
    assert began is not None
    built = (output / "config.yaml").stat().st_mtime  # written when model and engine are there
    return Start(stepped - command, began - command, built - began, stepped - built)


def saves_of(output: Path, shape: Shape, ranks: int) -> Saves:
    rows = logged_rows(output)
    seconds = {row["step"]: shape.batch * ranks / row["samples_per_second"] for row in rows}
    first = 2 * shape.interval  # the self-check reads the one before back
    saves = range(first, shape.steps, shape.interval)
    steps = min(shape.interval, shape.steps - saves[-1])
    stalls = [row["save_stall_seconds"] for row in rows if row["step"] - 1 in saves]
    alone = [seconds[step] for step in range(2, shape.interval + 1)]
    behind = [sum(seconds[step] for step in range(save + 1, save + steps + 1)) for save in saves]
    return Saves(stalls, median(alone), behind, steps)


def one_round(work: Path, shape: Shape, options: dict[str, Any], ranks: int) -> Round:
    cold = run(work / "cold", shape, options, ranks, to_the_end=True)
    resumed = {**options, "resume_from_checkpoint": work / "cold" / f"checkpoint-{shape.interval}"}
    resume = run(work / "resume", shape, resumed, ranks, to_the_end=False)
    run(work / "standing", shape, {**options, "async_save": "false"}, ranks, to_the_end=True)
    return Round(cold, resume, saves_of(work / "cold", shape, ranks), saves_of(work / "standing", shape, ranks))


def size_of(checkpoint: Path) -> dict[str, int]:
    """Bytes of a checkpoint, and those that the formula allows."""
    trained = sum(int(tensor.numel()) for tensor in StoredState.open(checkpoint).kind(WEIGHT).values())
    total = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    state = sum(path.stat().st_size for path in checkpoint.glob("training_state-*"))
    allowed = round(SIZE_BAR * STATE_BYTES * trained + MODEL_BYTES * trained)
    return {"trained": trained, "bytes": total, "training_state_bytes": state, "allowed_bytes": allowed}


def report(rounds: Sequence[Round], size: dict[str, int], title: str) -> list[Ratio]:
    starts: dict[str, Callable[[Round], Start]] = {"cold": lambda r: r.cold, "resume": lambda r: r.resume}
    rows = []
    for name, of in starts.items():
        each = [of(r) for r in rounds]
        parts = [Spread.of([getattr(start, phase) for start in each]).median for phase in PHASES]
        rows.append([name, f"{Spread.of([start.seconds for start in each])} s", *(f"{part:.2f} s" for part in parts)])
    table(f"{title}: command to the end of the first step", ["", "in all", *PHASES.values()], rows)
    alone = [step for r in rounds for step in (r.standing.step, r.behind.step)]
    ways: dict[str, Callable[[Round], Saves]] = {"standing": lambda r: r.standing, "behind": lambda r: r.behind}
    rows = []
    for name, saves in ways.items():
        stalls = Spread.of([median(saves(r).stalls) for r in rounds])
        costs = Spread.of([saves(r).cost for r in rounds])
        rows.append([name, f"{stalls} s", f"{costs} s"])
    rows.append(["a step alone", "", f"{Spread.of(alone)} s"])
    table("One checkpoint", ["", "training stands", "costs in all"], rows)
    formula = size["allowed_bytes"]
    words = f"{size['bytes'] / 1e6:.1f} MB of {formula / 1e6:.1f}: {'met' if size['bytes'] <= formula else 'MISSED'}"
    numbers = f"{size['trained']:,}"
    table("Its size", ["trained numbers", "bytes, and 1.05 x 12 + 2 a number"], [[numbers, words]])
    ratios = [
        Ratio.of(
            "resume over cold",
            [r.resume.seconds for r in rounds],
            [r.cold.seconds for r in rounds],
            limit=RESUME_BAR,
        ),
        Ratio.of(
            "stall behind over standing",
            [median(r.behind.stalls) for r in rounds],
            [median(r.standing.stalls) for r in rounds],
            limit=STALL_BAR,
        ),
        Ratio.of(
            "cost in all, behind over standing",
            [r.behind.cost for r in rounds],
            [r.standing.cost for r in rounds],
        ),
    ]
    show_ratios("In the same round", ratios)
    return ratios


def plot(rounds: Sequence[Round], title: str, path: Path) -> None:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ["cold", "resume"]
    bottom = [0.0, 0.0]
    for (phase, words), colour in zip(PHASES.items(), ("#9e9e9e", "#3b6ea5", "#2e7d32"), strict=True):
        values = [median(getattr(getattr(r, name), phase) for r in rounds) for name in names]
        left.bar(names, values, bottom=bottom, label=words, color=colour)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    left.set(ylabel="seconds", title=f"{title}: to the first step", ylim=(0, 1.3 * max(bottom)))
    left.legend()
    ways = ["standing", "behind"]
    stalls = [median(median(getattr(r, way).stalls) for r in rounds) for way in ways]
    costs = [median(getattr(r, way).cost for r in rounds) for way in ways]
    right.bar(ways, costs, color="#c9d8ea", label="in all, with slower steps")
    right.bar(ways, stalls, color="#b3261e", width=0.5, label="training stands")
    for place, stall in enumerate(stalls):
        right.annotate(f"{stall:.3f} s", (place, stall), ha="center", va="bottom")
    right.set(ylabel="seconds", title="one checkpoint")
    right.legend()
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny", help="what is trained (default: tiny)")
    parser.add_argument("--model", type=Path, help="folder of the 3B shape's weights (default: made anew)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--ranks", type=int, default=1, help="default: 1")
    parser.add_argument("--stage", type=int, choices=(2, 3), default=2, help="ZeRO stage (default: 2)")
    parser.add_argument("--lora-rank", type=int, help="default: 7200 of tiny, 16 of 3b")
    parser.add_argument("--work", type=Path, default=ROOT / "runs", help="folder for runs/startup (default: runs)")
    args = parser.parse_args()
    if args.rounds < 1 or args.ranks < 1 or (args.lora_rank or 1) < 1:
        parser.error("--rounds, --ranks and --lora-rank must be at least 1")
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"--model: {str(args.model)!r} has no config.json")
    return args


def main() -> int:
    args = parse()
    shape = SHAPES[args.shape]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that runs end and files go
    work = args.work.resolve() / "startup"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        motion_shards(work, per_class=shape.per_class, frames=shape.frames, size=SIZE)
        if args.model is not None:
            (work / "model").symlink_to(args.model.resolve())
        elif args.shape != "tiny":
            tool("make_random_checkpoint.py", "--shape", args.shape, "--out", work / "model")
        options = options_of(shape, args, work)
        rounds = [one_round(work, shape, options, args.ranks) for _ in range(args.rounds)]
        size = size_of(work / "cold" / f"checkpoint-{shape.interval}")
        recipes = {name: yaml.safe_load((work / name / "config.yaml").read_text()) for name in ("cold", "standing")}
    except (RuntimeError, subprocess.SubprocessError, psutil.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work)
    title = f"{args.shape}, ZeRO-{args.stage}, ranks: {args.ranks}"
    ratios = report(rounds, size, title)
    name = f"startup_{args.shape}_zero{args.stage}"
    versions = conditions("torch", "deepspeed", "transformers", "peft", "safetensors")
    figures = {"rounds": rounds, "ratios": ratios, "size": size, "recipes": recipes}
    write_json(RESULTS / f"{name}.json", {**versions, **figures})
    plot(rounds, title, RESULTS / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
