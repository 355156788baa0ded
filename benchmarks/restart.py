"""What a fault costs under launch/supervise.py, and how often it pays to save.

    python benchmarks/restart.py [--rounds 3] [--intervals 5 15 45] [--every 300]       about ten minutes

The built-in tiny backbone on two CPU ranks, through the real launcher. First, in each round, the time from the command
to the end of step 1, and from the SIGKILL of a rank to the end of the first step after the checkpoint: noticing it,
ending what is left, waiting (--backoff 1), starting again, reading the checkpoint. Then, for each save interval, a run
of 60 steps in which a rank is killed at step 44, and where its time went:

Training stands for its checkpoints (async_save=false), so that they show; written behind training they cost less
(benchmarks/startup.py).

    useful     steps that count, by the rates in the log          saving   steps done once, less that: the checkpoints
    again      steps that no checkpoint held                      starts   all else: both starts, the end, the waiting

Then a run in which a rank is killed every --every steps, three times, saving every 15: its goodput as it was, and as
the formula below has it.

From one save's cost C follows the interval that loses least for a mean time M between faults, sqrt(2 C M) (Young 1974,
Daly 2006), and the share of time that is useful for any interval t: 1 / (1 + C/t + (t/2 + R)/M), R the restart. The
picture shows both. Tables go to the screen, all numbers and the picture into benchmarks/results/.

The bar is for the restart over the cold start: 1.5. Exit codes: 0 done, 1 a run failed, 2 wrong options.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from matplotlib.figure import Figure
from processes import DEEPSPEED, ROOT, end_session, logged_rows, motion_shards, ranks_below
from rounds import RESULTS, Spread, conditions, table, write_json

LAUNCH_SECONDS = 300.0
BAR = 1.5
STEPS, FAULT = 60, 44
REPEATED, REPEATED_INTERVAL = 3, 15  # faults, steps between saves
MTBF_HOURS = (0.5, 2.0, 8.0, 24.0)


@dataclass(frozen=True)
class Fault:
    """Seconds. cold: from the command to the end of step 1. restart: from SIGKILL to the end of the first new step."""

    cold: float
    restart: float


@dataclass(frozen=True)
class Disturbed:
    """One run with one fault. save: seconds of one checkpoint, where there were enough to measure it."""

    interval: int
    lost_steps: int
    saves: int
    step: float
    wall: float
    useful: float
    save: float | None

    def parts(self, save: float) -> dict[str, float]:
        """Where its time went, in seconds."""
        known = {"useful": self.useful, "saving": self.saves * save, "again": self.lost_steps * self.step}
        return {**known, "starts": self.wall - sum(known.values())}


@dataclass(frozen=True)
class Repeated:
    """One run with a fault every `every` steps. goodput: useful seconds of all; expected: by `goodput()`."""

    every: int
    faults: int
    lost_steps: int
    wall: float
    useful: float
    goodput: float
    expected: float


class Run:
    """A supervised run in `folder`, whose log is followed."""

    def __init__(self, folder: Path, shards: Path, steps: int, interval: int) -> None:
        self.output = folder / "run"
        shutil.rmtree(self.output, ignore_errors=True)
        options = {
            "dataset": shards,
            "output_dir": self.output,
            "max_steps": steps,
            "save_steps": interval,
            "async_save": "false",  # so that the clock shows what a save costs
            "logging_steps": 1,
            "plot_loss": "false",
            "dataloader_num_workers": 0,
        }
        words = [sys.executable, "launch/supervise.py", "--backoff", 1, "--", DEEPSPEED, "--num_gpus", 2]
        words += ["launch/train.py", "launch/recipes/quickstart.yaml"]
        words += [f"{key}={value}" for key, value in options.items()]
        self.log = folder / "supervise.log"
        self.started = time.monotonic()
        with self.log.open("w") as file:
            self.process = psutil.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def rows(self) -> list[dict]:
        return logged_rows(self.output)

    def wait_for(self, least: int, most: int | None = None) -> float:
        """When the last row of the log is first seen to be one of these steps."""
        deadline = time.monotonic() + LAUNCH_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            rows = self.rows()
            if rows and least <= rows[-1]["step"] and (most is None or rows[-1]["step"] <= most):
                return time.monotonic()
            time.sleep(0.01)
        raise RuntimeError(f"no step {least} of {self.output}:\n{self.log.read_text()[-3000:]}")

    def kill_a_rank(self) -> float:
        ranks_below(self.process)[1].send_signal(signal.SIGKILL)
        return time.monotonic()

    def finish(self) -> dict:
        """The supervisor's summary."""
        if code := self.process.wait(LAUNCH_SECONDS):
            raise RuntimeError(f"exit code {code}:\n{self.log.read_text()[-3000:]}")
        return json.loads((self.output / "supervise" / "summary.json").read_text())


@contextlib.contextmanager
def supervised(folder: Path, shards: Path, *, steps: int, interval: int) -> Iterator[Run]:
    run = Run(folder, shards, steps, interval)
    try:
        yield run
    finally:
        end_session(run.process.pid)  # the launch below it ends with it


def one_fault(folder: Path, shards: Path) -> Fault:
    """A rank is killed three steps after the checkpoint of step 5."""
    with supervised(folder, shards, steps=20, interval=5) as run:
        cold = run.wait_for(1) - run.started
        run.wait_for(8)
        killed = run.kill_a_rank()
        restart = run.wait_for(6, 7) - killed  # the resume drops the rows beyond step 5
        run.finish()
    return Fault(cold, restart)


def disturbed(folder: Path, shards: Path, interval: int) -> Disturbed:
    with supervised(folder, shards, steps=STEPS, interval=interval) as run:
        first_save = run.wait_for(interval + 1) if interval < FAULT else None
        run.wait_for(FAULT)
        before = run.rows()
        seen = run.kill_a_rank()
        summary = run.finish()
    save = None
    if first_save is not None and (saves := (FAULT - interval - 1) // interval):
        stepping = sum(run_seconds(row) for row in before if row["step"] > interval + 1)
        save = max(seen - first_save - stepping, 0.0) / saves
    kept = FAULT // interval
    made = kept + math.ceil((STEPS - kept * interval) / interval)
    step = median(run_seconds(row) for row in before)
    return Disturbed(
        interval, summary["lost_steps"], made, step, summary["wall_seconds"], summary["useful_seconds"], save
    )


def again_and_again(folder: Path, shards: Path, every: int, save: float, restart: float) -> Repeated:
    with supervised(folder, shards, steps=every * (REPEATED + 1), interval=REPEATED_INTERVAL) as run:
        for number in range(1, REPEATED + 1):
            run.wait_for(every * number)
            run.kill_a_rank()
            run.wait_for(
                every * number - REPEATED_INTERVAL, every * number - 1
            )  # it goes on from the checkpoint before
        step = median(run_seconds(row) for row in run.rows())
        summary = run.finish()
    wall, useful = summary["wall_seconds"], summary["useful_seconds"]
    expected = goodput(REPEATED_INTERVAL * step, save, restart, wall / (REPEATED + 1))
    return Repeated(every, REPEATED, summary["lost_steps"], wall, useful, useful / wall, expected)


def run_seconds(row: dict) -> float:
    """Of the step that a row is of: 2 ranks of 8 clips."""
    return 16 / row["samples_per_second"]


def goodput(interval: float, save: float, restart: float, mtbf: float) -> float:
    """The share of time that is useful, for seconds between saves and between faults."""
    return 1 / (1 + save / interval + (interval / 2 + restart) / mtbf)


def plot(runs: Sequence[Disturbed], save: float, restart: float, path: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    bottom = [0.0] * len(runs)
    names = [f"every {run.interval}" for run in runs]
    for part, colour in (("useful", "#2e7d32"), ("saving", "#3b6ea5"), ("again", "#b3261e"), ("starts", "#9e9e9e")):
        values = [run.parts(save)[part] for run in runs]
        left.bar(names, values, bottom=bottom, label=part, color=colour)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    left.set(xlabel="steps between checkpoints", ylabel="seconds", title=f"{STEPS} steps, a rank killed at {FAULT}")
    left.legend()
    times = [2.0**exponent for exponent in range(14)]
    for hours in MTBF_HOURS:
        mtbf, best = hours * 3600, math.sqrt(2 * save * hours * 3600)
        (line,) = right.plot(times, [goodput(t, save, restart, mtbf) for t in times], label=f"a fault in {hours:g} h")
        right.plot([best], [goodput(best, save, restart, mtbf)], "o", color=line.get_color())
    right.set_xscale("log")
    right.set(xlabel="seconds between saves", ylabel="useful share of time", ylim=(0.8, 1.0))
    right.set_title(f"a save of {save:.2f} s, a restart of {restart:.0f} s; dots: sqrt(2 C M)")
    right.legend()
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def report(faults: Sequence[Fault], runs: Sequence[Disturbed], repeated: Repeated, save: float, restart: float) -> None:
    ratio = Spread.of([fault.restart / fault.cold for fault in faults])
    rows = [
        ["command to the end of step 1", f"{Spread.of([fault.cold for fault in faults])} s"],
        ["SIGKILL to the end of the first new step", f"{Spread.of([fault.restart for fault in faults])} s"],
        ["the second over the first", f"{ratio}; bar {BAR:g}: {'met' if ratio.median <= BAR else 'MISSED'}"],
        ["one save", f"{save:.2f} s"],
    ]
    table("Starting and restarting: median (least to most)", ["", ""], rows)
    columns = ["steps between saves", "lost", "useful", "saving", "again", "starts", "all", "goodput"]
    lines = []
    for run in runs:
        seconds = [*run.parts(save).values(), run.wall]
        share = f"{run.useful / run.wall:.0%}"
        lines.append([str(run.interval), str(run.lost_steps), *(f"{value:.1f} s" for value in seconds), share])
    table(f"{STEPS} steps, a rank killed at step {FAULT}", columns, lines)
    columns = ["a fault every", "faults", "steps lost", "useful", "all", "goodput", "by the formula"]
    line = [f"{repeated.every} steps", str(repeated.faults), str(repeated.lost_steps), f"{repeated.useful:.1f} s"]
    line += [f"{repeated.wall:.1f} s", f"{repeated.goodput:.0%}", f"{repeated.expected:.0%}"]
    table(f"A rank killed again and again, a save every {REPEATED_INTERVAL} steps", columns, [line])
    advice = []
    for hours in MTBF_HOURS:
        best = math.sqrt(2 * save * hours * 3600)
        gained = goodput(best, save, restart, hours * 3600)
        advice.append([f"{hours:g} h", f"{best:.0f} s", f"{gained:.1%}"])
    table("From these: how often to save", ["time between faults", "save every", "goodput"], advice)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="cold starts and restarts (default: 3)")
    parser.add_argument("--intervals", type=int, nargs="+", default=[5, 15, 45], help="steps (default: 5 15 45)")
    parser.add_argument("--every", type=int, default=300, help="steps between faults of the last run (default: 300)")
    args = parser.parse_args()
    if args.every <= 2 * REPEATED_INTERVAL:
        parser.error(f"--every must be more than {2 * REPEATED_INTERVAL}")
    if args.rounds < 1 or not all(1 <= interval <= STEPS for interval in args.intervals):
        parser.error(f"--rounds must be at least 1, --intervals 1 to {STEPS}")
    if min(args.intervals) > FAULT // 3:
        parser.error(f"--intervals: one must be at most {FAULT // 3}, to measure what a save costs")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that runs end and files go
    work = ROOT / "runs" / "restart"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        shards = motion_shards(work, per_class=16, frames=8, size=112)
        faults = [one_fault(work, shards) for _ in range(args.rounds)]
        runs = [disturbed(work, shards, interval) for interval in sorted(args.intervals)]
        save = next((run.save for run in runs if run.save is not None), 0.0)
        restart = median(fault.restart for fault in faults)
        repeated = again_and_again(work, shards, args.every, save, restart)
    except (RuntimeError, subprocess.SubprocessError, psutil.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work)
    report(faults, runs, repeated, save, restart)
    figures = {"faults": faults, "runs": runs, "repeated": repeated}
    write_json(RESULTS / "restart.json", {**conditions("torch", "deepspeed"), **figures})
    plot(runs, save, restart, RESULTS / "restart.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
