"""What tools/plan.py foretells beside what runs: seconds of a step, and peak memory of a rank.

    python benchmarks/plan.py [--model DIR] [--only NAME ...] [--machine FILE]       about eight minutes

Trains each case through the deepspeed launcher and holds it against its plan, for this machine as `tools/plan.py
--calibrate` measures it before and after each case (time: the mean of both plans). A small model with the real
vocabulary ("mid" of tools/make_random_checkpoint.py), and with --model the checkpoint of a real one too; synthetic
clips of 16 frames of 112x112, LoRA on all layers of the language model.

Time is the median over the steps after the first ones. Memory is the peak of the resident set (VmHWM) of the rank that
needed most, its mapped part of the checkpoint included; beside its sum stands the part that the planner takes for the
process itself, which is measured at calibration: what is left of both, measured and foretold, is what the model takes.

Bars: within 15 % of time, within 10 % of memory. A bar that is missed is said, and is no error. Exit codes: 0 done, 1 a
case failed (its log is shown), 2 wrong options.
"""

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from processes import kilobytes, launched, logged_rows, motion_shards, ranks_below, tool
from rounds import RESULTS, conditions, table, write_json

from vidcls.config import load_config
from vidcls.planning.estimate import Estimate, estimate, gather_facts
from vidcls.planning.machines import Machine, read_machine
from vidcls.planning.steptime import Cluster

SAMPLE_SECONDS = 0.05
FRAMES, SIZE = 16, 112
WARM_UP = 3
TIME_BAR, MEMORY_BAR = 0.15, 0.10
MID, REAL = "mid", "real"


@dataclass(frozen=True)
class Case:
    """One training: `micro` clips on each rank. options: keys of a recipe."""

    name: str
    micro: int
    model: str = MID
    options: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    steps: int = 30


CASES = (
    Case("1 clip", 1),
    Case("2 clips", 2),
    Case("4 clips", 4),
    Case("16 clips", 16),
    Case("4 clips of 8 frames", 4, options={"video_maxlen": 8}),
    Case("4 clips, rank 256", 4, options={"lora_rank": 256}),
    Case("16 clips, no dropout", 16, options={"lora_dropout": 0}),
    Case("16 clips, checkpointing", 16, options={"gradient_checkpointing": True}),
    Case("4 clips, 2 ranks", 4, ranks=2),
    Case("4 clips, ZeRO-3", 4, options={"deepspeed": "ds_configs/zero3.json"}),
    Case("4 clips, ZeRO-3, 2 ranks", 4, options={"deepspeed": "ds_configs/zero3.json"}, ranks=2),
    Case("real, 1 clip", 1, REAL, steps=6),
    Case("real, 2 clips", 2, REAL, steps=6),
    Case("real, 2 clips, plain weights", 2, REAL, {"prepack_weights": False}, steps=6),  # for its memory
    Case("real, 4 clips", 4, REAL, steps=6),
    Case("real, 2 clips, checkpointing", 2, REAL, {"gradient_checkpointing": True}, steps=6),
    Case("real, 2 clips, rank 64, no dropout", 2, REAL, {"lora_rank": 64, "lora_dropout": 0}, steps=6),
)


@dataclass(frozen=True)
class Compared:
    """seconds: of a step; bytes: of the rank that needed most. The base is the process without a model. plan: with the
    machine as it was before the case; plan_after: as it was after it."""

    case: Case
    seconds: float
    planned_seconds: float
    bytes: float
    planned_bytes: float
    base_bytes: float
    plan: Estimate
    plan_after: Estimate

    @property
    def time_error(self) -> float:
        return self.planned_seconds / self.seconds - 1

    @property
    def memory_error(self) -> float:
        return self.planned_bytes / self.bytes - 1

    @property
    def model_error(self) -> float:
        """Of what is above the process itself."""
        return (self.planned_bytes - self.base_bytes) / (self.bytes - self.base_bytes) - 1


def words_of(case: Case, model: Path, work: Path) -> list[str]:
    options = {
        "model_name_or_path": model,
        "dataset": work / "shards",
        "num_action_classes": "null",
        "eval_dataset": "null",
        "eval_strategy": "no",
        "horizontal_flip": 0,
        "temporal_jitter": "false",
        "video_maxlen": FRAMES,
        "video_max_pixels": SIZE**2,
        "dataloader_num_workers": 1,
        "per_device_train_batch_size": case.micro,
        "gradient_accumulation_steps": 1,
        "max_steps": case.steps,
        "logging_steps": 1,
        "save_steps": 10**6,
        "plot_loss": "false",
        "html_report": "false",
        "report_to": "none",
        "output_dir": work / "run",
        **case.options,
    }
    return ["launch/recipes/ucf101.yaml", *(f"{key}={value}" for key, value in options.items())]


def run(case: Case, words: list[str], work: Path) -> tuple[float, int]:
    """Seconds of a step, and peak bytes of the rank that needed most."""
    log, output = work / "train.log", work / "run"
    shutil.rmtree(output, ignore_errors=True)
    peak = 0
    ranks: list[psutil.Process] = []
    with launched(case.ranks, words, log) as launcher:
        while launcher.poll() is None:
            ranks = ranks if len(ranks) == case.ranks else ranks_below(launcher)
            for process in ranks:
                with contextlib.suppress(psutil.Error, OSError):  # it comes and goes
                    peak = max(peak, kilobytes(Path(f"/proc/{process.pid}/status")).get("VmHWM", 0))
            time.sleep(SAMPLE_SECONDS)
    if launcher.returncode:
        raise RuntimeError(f"{case.name} failed:\n{log.read_text()[-3000:]}")
    clips = case.micro * case.ranks
    return statistics.median(clips / row["samples_per_second"] for row in logged_rows(output)[WARM_UP:]), peak


def calibrated(work: Path) -> Machine:
    tool("plan.py", "--calibrate", work / "machine.json")
    return read_machine(work / "machine.json")


def compare(case: Case, model: Path, work: Path, before: Machine, *, again: bool) -> tuple[Compared, Machine]:
    """Also the machine as it is afterwards, if it is measured `again`: then its step is planned on both, on average."""
    words = words_of(case, model, work)
    config = load_config(words[0], words[1:])
    seconds, peak = run(case, words, work)
    after = calibrated(work) if again else before
    facts = gather_facts(config)
    plans = [estimate(config, facts, machine, Cluster(1, case.ranks, machine.link)) for machine in (before, after)]
    planned_seconds = statistics.mean(plan.step.total for plan in plans)
    needed = plans[0].memory
    found = Compared(
        case, seconds, planned_seconds, peak, needed.total + needed.prepacked, needed.base, plans[0], plans[1]
    )
    return found, after


def show(found: list[Compared]) -> None:
    rows = [
        (
            each.case.name,
            f"{each.seconds:.3g}",
            f"{each.planned_seconds:.3g}",
            f"{each.time_error:+.0%}",
            f"{each.bytes / 1e9:.3g}",
            f"{each.planned_bytes / 1e9:.3g}",
            f"{each.memory_error:+.0%}",
            f"{each.model_error:+.0%}",
        )
        for each in found
    ]
    columns = ("case", "s a step", "planned", "", "GB a rank", "planned", "", "above the process")
    table("planned and measured", columns, rows)
    for name, errors, bar in (
        ("time", [each.time_error for each in found], TIME_BAR),
        ("memory", [each.memory_error for each in found], MEMORY_BAR),
    ):
        within = sum(abs(error) <= bar for error in errors)
        verdict = "met" if within == len(errors) else "MISSED"
        print(
            f"{name}: {within} of {len(errors)} cases within {bar:.0%}, at most {max(map(abs, errors)):.0%}: {verdict}"
        )


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a real checkpoint, for the cases named so")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="these cases")
    parser.add_argument("--machine", type=Path, metavar="FILE", help="an earlier calibration")
    return parser


def measure(
    parser: argparse.ArgumentParser, args: argparse.Namespace, show: Callable[[list[Compared]], None], *, timed: bool
) -> tuple[Machine, list[Compared]]:
    """All cases that `args` ask for; each is shown when it is done. timed: measure the machine after each, too."""
    cases = [case for case in CASES if case.model == MID or args.model]
    cases = [case for case in cases if args.only is None or case.name in args.only]
    if not cases:
        parser.error("--only: cases that are named real need --model")
    with tempfile.TemporaryDirectory(prefix="plan_") as folder:
        work = Path(folder)
        tool("make_random_checkpoint.py", "--shape", "mid", "--out", work / "mid")
        motion_shards(work, per_class=8, frames=FRAMES, size=SIZE)
        machine = calibrated(work) if args.machine is None else read_machine(args.machine)
        found = []
        for case in cases:
            model = work / "mid" if case.model == MID else args.model
            compared, machine = compare(case, model, work, machine, again=timed and args.machine is None)
            found.append(compared)
            show(found[-1:])
    return machine, found


def command(
    description: str | None, name: str, show: Callable[[list[Compared]], None], *, timed: bool
) -> list[Compared]:
    """All that a benchmark of plans does, `timed` as of `measure`; nothing when a case failed, which has been said."""
    parser = options(description)
    args = parser.parse_args()
    try:
        machine, found = measure(parser, args, show, timed=timed)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return []
    show(found)
    result = {"conditions": conditions("torch", "deepspeed"), "machine": asdict(machine), "cases": found}
    write_json(RESULTS / f"{name}.json", result)
    return found


def main() -> int:
    return 0 if command(__doc__, "plan", show, timed=True) else 1


if __name__ == "__main__":
    sys.exit(main())
