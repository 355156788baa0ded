"""More ranks, more hosts: what they send each other in a step, what it takes of the step, and whether numbers change.

    python benchmarks/scaling.py [--ranks 1 2 4] [--hosts 1 2 4]      about five minutes; needs root, sshd, pdsh, ip

Trains the tiny backbone under ZeRO-2 with the same global batch of 4 clips on each number of ranks of this host, and on
hosts of one rank each, made of network namespaces on this machine. LoRA has such a rank that 29.5 million numbers are
trained, what rank 16 is on the 3B shape; without dropout, which would draw other numbers on other ranks. A rank has one
thread.

    sent       bytes that a rank sends in a step, averaged over ranks: of every collective of training, ours included,
               its payload n by the lower bound of the collective: (R - 1) / R x n to reduce, scatter or gather, twice
               that for an all-reduce. Of the steps after the first five, in which the self-check gathers what it
               compares
    minimum    (R - 1) / R x trained numbers x (4 + 2): fp32 gradients reduced to their owners once, bf16 weights
               gathered
    interface  bytes that a host's network interface counted as sent: the backend's own algorithm, headers and all
    loss       largest relative difference of one of the first five steps' losses from one rank's; later ones
               multiply bf16's rounding

Bar: sent over minimum 1.05. It fails when hosts compute other numbers than ranks of one host, or when a loss is more
than 2 % from one rank's: other micro-batches and other orders of summing round bf16 otherwise.

`accumulation` is 2 ranks with 2 micro-batches, after each of which DeepSpeed's own ZeRO-2 would reduce gradients.
Tables go to the screen, numbers and a picture into benchmarks/results/. Exit codes: 0 done, 1 a run failed or numbers
differ, 2 wrong options.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from processes import ROOT, launched, logged_rows, motion_shards
from rounds import RESULTS, Ratio, Spread, conditions, show_ratios, table, write_json

sys.path.insert(0, str(ROOT))  # the hosts are those of tests/many_hosts
from tests.support.hosts import Hosts, NoHostsError
from tests.support.many_hosts import SSH, deepspeed_words
from vidcls.training.sharded_state import WEIGHT, StoredState

BAR, TOLERANCE = 1.05, 0.02
BATCH, SETTLED = 4, 5  # clips of a step; steps whose bytes and times do not count
GRADIENT_BYTES, WEIGHT_BYTES = 4, 2
SCRIPT = "benchmarks/counted_train.py"
GRADIENTS_AND_WEIGHTS = ("deepspeed", "reduction")  # who sends them
RUN_SECONDS = 600.0


@dataclass(frozen=True)
class Measured:
    """One run. sent: caller and collective -> bytes a step. self_check: bytes of all steps together. interface: bytes
    that a host sent in a step, None on one host. communication: share of a step."""

    name: str
    ranks: int
    trained: int
    sent: dict[str, float]
    self_check: float
    interface: float | None
    step_seconds: Spread
    communication: Spread
    losses: list[float]
    grad_norms: list[float]

    @property
    def minimum(self) -> float:
        return (self.ranks - 1) / self.ranks * self.trained * (GRADIENT_BYTES + WEIGHT_BYTES)

    @property
    def total(self) -> float:
        return sum(self.sent.values())


def words_of(args: argparse.Namespace, work: Path, output: Path, ranks: int, accumulation: int) -> list[str]:
    options = {
        "dataset": work / "shards",
        "num_action_classes": "null",
        "eval_strategy": "no",
        "lora_rank": args.lora_rank,
        "lora_alpha": 2 * args.lora_rank,
        "lora_dropout": 0,
        "dataloader_num_workers": 0,
        "train_batch_size": BATCH,
        "per_device_train_batch_size": BATCH // ranks // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": args.steps,
        "save_steps": 10**6,
        "logging_steps": 1,
        "plot_loss": "false",
        "html_report": "false",
        "report_to": "none",
        "deepspeed": args.deepspeed,
        "output_dir": output,
    }
    return ["launch/recipes/quickstart.yaml", *(f"{key}={value}" for key, value in options.items())]


def on_one_host(args: argparse.Namespace, work: Path, ranks: int, accumulation: int = 1) -> Measured:
    name = f"{ranks} rank{'s' * (ranks > 1)}" + (", accumulation" if accumulation > 1 else "")
    output = work / name.replace(", ", "_").replace(" ", "_")
    log = output.with_suffix(".log")
    with launched(ranks, words_of(args, work, output, ranks, accumulation), log, SCRIPT) as launcher:
        code = launcher.wait(RUN_SECONDS)
    return measured(name, ranks, output, code, log)


def on_hosts(args: argparse.Namespace, work: Path, count: int) -> Measured:
    name = f"{count} host{'s' * (count > 1)}"
    output = work / name.replace(", ", "_").replace(" ", "_")
    log = output.with_suffix(".log")
    hosts = Hosts(count)
    try:
        words = [*deepspeed_words(hosts), SCRIPT, *words_of(args, work, output, count, 1)]
        code = hosts.start(1, words, log, **SSH).wait(RUN_SECONDS)
    finally:
        hosts.close()
    return measured(name, count, output, code, log)


def measured(name: str, ranks: int, output: Path, code: int, log: Path) -> Measured:
    if code:
        raise RuntimeError(f"{name}: exit code {code}:\n{log.read_text()[-3000:]}")
    traffic: list[list[dict[str, Any]]] = [json.loads((output / f"traffic-{r}.json").read_text()) for r in range(ranks)]
    steady = [steps[SETTLED:] for steps in traffic]
    counted = len(steady[0])
    keys = sorted({key for steps in steady for step in steps for key in step["sent"]})
    sent = {
        key: sum(step["sent"].get(key, 0.0) for steps in steady for step in steps) / ranks / counted for key in keys
    }
    checks = sum(
        amount
        for steps in traffic
        for step in steps[:SETTLED]
        for key, amount in step["sent"].items()
        if not key.startswith("deepspeed") and key not in keys
    )
    interface = None
    if "host" in name:
        before = [steps[SETTLED - 1]["interface"]["tx"] for steps in traffic]
        interface = mean(steps[-1]["interface"]["tx"] - b for steps, b in zip(traffic, before, strict=True)) / counted
    rows = logged_rows(output)
    checkpoint = StoredState.open(next(output.glob("checkpoint-*")))
    return Measured(
        name,
        ranks,
        sum(int(tensor.numel()) for tensor in checkpoint.kind(WEIGHT).values()),
        sent,
        checks / ranks,
        interface,
        Spread.of([step["seconds"] for step in steady[0]]),
        Spread.of([step["communication"] / step["seconds"] for step in steady[0]]),
        [row["loss"] for row in rows],
        [row["grad_norm"] for row in rows],
    )


def difference(run: Measured, other: Measured) -> float:
    """The largest of the first losses, relative to the other's."""
    return max(abs(a - b) / abs(b) for a, b in zip(run.losses[:SETTLED], other.losses[:SETTLED], strict=True))


def faults(runs: list[Measured]) -> list[str]:
    """What must not be."""
    by_name = {run.name: run for run in runs}
    found = []
    for run in runs:
        here = by_name.get(run.name.replace("host", "rank"), run)
        if (run.losses, run.grad_norms) != (here.losses, here.grad_norms):
            found.append(f"{run.name} compute other numbers than {here.name} of one host")
        if difference(run, runs[0]) > TOLERANCE:
            found.append(f"{run.name}: a loss is more than {TOLERANCE:.0%} from that of {runs[0].name}")
    return found


def report(runs: list[Measured], cores: int) -> list[Ratio]:
    first = runs[0]
    rows = []
    for run in runs:
        interface = "" if run.interface is None else f"{run.interface / 1e6:.1f} MB"
        wire = "" if run.interface is None or not run.minimum else f"{run.interface / run.minimum:.2f}"
        ours = sum(amount for key, amount in run.sent.items() if not key.startswith(GRADIENTS_AND_WEIGHTS))
        over = f"{run.total / run.minimum:.4f}" if run.minimum else ""
        row = [run.name, f"{run.minimum / 1e6:.1f} MB", f"{run.total / 1e6:.1f} MB", over, f"{ours:.0f} B"]
        rows.append([*row, f"{run.self_check / 1e6:.3f} MB", interface, wire])
    columns = ["", "minimum", "sent", "/ minimum", "of it ours", "self-check, once", "interface", "/ minimum"]
    table(f"Bytes that a rank sends in a step; {first.trained:,} trained numbers", columns, rows)
    rows = []
    for run in runs:
        faster = first.step_seconds.median / run.step_seconds.median
        ideal = min(run.ranks, cores)
        share = f"{run.communication.median:.0%}"
        rows.append([run.name, run.step_seconds, share, f"{faster:.2f} of {ideal}", f"{difference(run, first):.2g}"])
    columns = ["", "seconds a step", "in collectives", f"faster than {first.name}", "loss"]
    table(f"Step of {BATCH} clips, {cores} cores", columns, rows)
    widest = max(runs, key=lambda run: run.ranks)
    table(
        f"What {widest.name} send in a step", ["caller: collective", "bytes a rank"], [*map(list, widest.sent.items())]
    )
    ratios = [
        Ratio.of(f"{run.name}: sent / minimum", [run.total], [run.minimum], limit=BAR) for run in runs if run.minimum
    ]
    show_ratios("Bytes", ratios)
    return ratios


def plot(runs: list[Measured], path: Path) -> None:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    several = [run for run in runs if run.ranks > 1]
    places = range(len(several))
    kinds = {
        "sent, by the collectives' bounds": ([run.total / 1e6 for run in several], -0.27, "#3b6ea5"),
        "minimum": ([run.minimum / 1e6 for run in several], 0.0, "#9e9e9e"),
        "sent by the network interface": ([(run.interface or 0) / 1e6 for run in several], 0.27, "#2e7d32"),
    }
    for label, (values, shift, colour) in kinds.items():
        left.bar([place + shift for place in places], values, width=0.25, label=label, color=colour)
    left.set_xticks(list(places), [run.name.replace(", ", ",\n") for run in several])
    left.set(ylabel="MB a rank and step", title="ZeRO-2: what a rank sends")
    left.margins(y=0.3)
    left.legend(loc="upper left")
    names = [run.name.replace(", ", ",\n") for run in runs]
    talking = [run.step_seconds.median * run.communication.median for run in runs]
    computing = [run.step_seconds.median - seconds for run, seconds in zip(runs, talking, strict=True)]
    right.bar(names, computing, label="everything else", color="#3b6ea5")
    right.bar(names, talking, bottom=computing, label="in collectives, waiting for others included", color="#b3261e")
    right.set(ylabel="seconds", title=f"a step of {BATCH} clips, one thread a rank, shared cores")
    right.margins(y=0.25)
    right.tick_params(axis="x", labelsize=8)
    right.legend(loc="upper right")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="on this host (default: 1 2 4)")
    parser.add_argument("--hosts", type=int, nargs="*", default=[1, 2, 4], help="of one rank (default: 1 2 4)")
    parser.add_argument("--steps", type=int, default=15, help=f"more than {SETTLED} (default: 15)")
    parser.add_argument("--lora-rank", type=int, default=7200, help="default: 7200, 29.5 million numbers")
    parser.add_argument("--deepspeed", default="ds_configs/zero2.json", help="default: ds_configs/zero2.json")
    parser.add_argument("--name", default="scaling", help="of the result files (default: scaling)")
    args = parser.parse_args()
    counts = {*args.ranks, *args.hosts}
    if args.steps <= SETTLED or args.lora_rank < 1 or any(count < 1 or BATCH % count for count in counts):
        parser.error(f"--steps must be more than {SETTLED}, --lora-rank at least 1, --ranks and --hosts 1, 2 or 4")
    os.environ["OMP_NUM_THREADS"] = "1"
    work = Path(tempfile.mkdtemp(prefix="vidcls-scaling-"))
    try:
        motion_shards(work, per_class=8, frames=8, size=112)
        runs = [on_one_host(args, work, ranks) for ranks in sorted(args.ranks)]
        runs += [on_hosts(args, work, count) for count in sorted(args.hosts)]
        if 2 in args.ranks:
            runs.append(on_one_host(args, work, 2, accumulation=2))
    except (RuntimeError, subprocess.SubprocessError, NoHostsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(work)
    versions = conditions("torch", "deepspeed", "transformers", "peft")
    ratios = report(runs, versions["cores"])
    zero = json.loads((ROOT / args.deepspeed).read_text())
    write_json(RESULTS / f"{args.name}.json", {**versions, "settings": zero, "ratios": ratios, "runs": runs})
    plot(runs, RESULTS / f"{args.name}.png")
    wrong = faults(runs)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
