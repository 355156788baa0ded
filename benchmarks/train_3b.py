"""Train the real 3B shape for a few optimizer steps on this machine's CPU, and measure what it takes.

    python benchmarks/train_3b.py [--steps 4] [--stage 2] [--keep DIR]

Writes a random Qwen2.5-VL-3B checkpoint (7.5 GB; removed afterwards without --keep), shards of four synthetic clips
(16 frames of 112x112), and starts launch/train.py through the deepspeed launcher: one rank, 2 clips a step, LoRA of
rank 16, one loader worker, ZeRO stage 2 or 3. Prints a table and writes it beside a JSON file in benchmarks/results/.

Times mean something on an otherwise idle machine only: the load average is written beside them. Memory is that of the
rank and its children, read twice a second from /proc/PID/smaps_rollup as PSS (pages that several processes map are
counted once), and the rank's VmHWM, the kernel's own peak of its resident set, which misses nothing. Both count the
checkpoint's pages, which are mapped from its files and which the kernel can drop and read again.
Frozen weights are not prepacked, which would take of whatever is free (`prepack_weights: false`).
Exit codes: 0 done, 1 the run failed or needed more than --limit-gb, 2 wrong options.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from processes import ROOT, kilobytes, launched, logged_rows, motion_shards, ranks_below, tool

RESULTS = ROOT / "benchmarks" / "results"
FRAMES, SIZE, CLIPS_PER_STEP = 16, 112, 2
SAMPLE_SECONDS = 0.5
VERSIONED = ("vidcls", "torch", "deepspeed", "transformers", "peft", "safetensors")


@dataclass
class PeakMemory:
    """Bytes; each number is a peak of its own, so they do not add up."""

    rank_rss: int = 0  # VmHWM of the rank alone
    tree_pss: int = 0  # rank and children
    tree_anonymous: int = 0  # of it, what no file backs

    def sample(self, rank: psutil.Process) -> None:
        processes = [rank, *rank.children(recursive=True)]
        rollups = [kilobytes(Path(f"/proc/{process.pid}/smaps_rollup")) for process in processes]
        self.tree_pss = max(self.tree_pss, sum(r.get("Pss", 0) for r in rollups))
        self.tree_anonymous = max(self.tree_anonymous, sum(r.get("Pss_Anon", 0) for r in rollups))
        status = kilobytes(Path(f"/proc/{rank.pid}/status"))
        self.rank_rss = max(self.rank_rss, status.get("VmHWM", 0))

    @property
    def largest(self) -> int:
        return max(self.rank_rss, self.tree_pss)


@dataclass
class Result:
    """What one run gave; `seconds_to_first_step` is from the command to the end of step 1: imports, load, engine."""

    stage: int
    exit_code: int
    memory: PeakMemory
    seconds_in_all: float
    seconds_to_first_step: float | None = None
    seconds_per_step: float | None = None  # median of the steps after the first
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: {n: importlib.metadata.version(n) for n in VERSIONED})
    load_average: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))
    machine: str = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def make_inputs(work: Path) -> None:
    """The checkpoint and the shards, each only if `work` does not hold it yet."""
    if not (work / "model").exists():
        tool("make_random_checkpoint.py", "--shape", "3b", "--out", work / "model")
    motion_shards(work, per_class=1, frames=FRAMES, size=SIZE)


def train(work: Path, *, steps: int, stage: int) -> Result:
    """Start the launcher on the inputs in `work` and watch its memory until it ends; its output is in train.log."""
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "model_name_or_path": work / "model",
        "dataset": work / "shards",
        "num_action_classes": "null",
        "eval_dataset": "null",
        "eval_strategy": "no",
        "lora_rank": 16,
        "prepack_weights": "false",  # it takes what is free: this asks for what is needed
        "video_max_pixels": SIZE * SIZE,
        "dataloader_num_workers": 1,
        "per_device_train_batch_size": CLIPS_PER_STEP,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "logging_steps": 1,
        "plot_loss": "false",
        "report_to": "none",
        "deepspeed": f"ds_configs/zero{stage}.json",
        "output_dir": output,
    }
    words = ["launch/recipes/ucf101.yaml", *(f"{key}={value}" for key, value in options.items())]
    memory, rows = PeakMemory(), output / "train_log.jsonl"
    started, first_step = time.monotonic(), None
    with launched(1, words, work / "train.log") as launcher:
        while launcher.poll() is None:
            with contextlib.suppress(psutil.Error, OSError):  # processes come and go
                for rank in ranks_below(launcher):
                    memory.sample(rank)
            if first_step is None and rows.exists() and rows.stat().st_size:
                first_step = time.monotonic() - started
            time.sleep(SAMPLE_SECONDS)
    logged = logged_rows(output)
    seconds = [CLIPS_PER_STEP / row["samples_per_second"] for row in logged[1:]]
    return Result(
        stage=stage,
        exit_code=launcher.returncode,
        memory=memory,
        seconds_in_all=time.monotonic() - started,
        seconds_to_first_step=first_step,
        seconds_per_step=statistics.median(seconds) if seconds else None,
        losses=[row["loss"] for row in logged],
        grad_norms=[row["grad_norm"] for row in logged],
    )


def table(result: Result, limit_gb: float) -> str:
    """The result as a Markdown table."""
    memory = result.memory
    rows = {
        "peak resident set of the rank (VmHWM)": f"{memory.rank_rss / 1e9:.2f} GB",
        "peak PSS, rank and children": f"{memory.tree_pss / 1e9:.2f} GB",
        "of it not backed by files": f"{memory.tree_anonymous / 1e9:.2f} GB",
        "limit": f"{limit_gb:.2f} GB",
        "command to the end of step 1": _seconds(result.seconds_to_first_step),
        "seconds per step, median after the first": _seconds(result.seconds_per_step),
        "seconds in all, with the checkpoint": _seconds(result.seconds_in_all),
        "loss by step": ", ".join(f"{loss:.4f}" for loss in result.losses),
        "gradient norm by step": ", ".join(f"{norm:.3g}" for norm in result.grad_norms),
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        "machine": result.machine,
        "load average, 1 minute (of it the run about 2)": f"{result.load_average}",
    }
    title = f"ZeRO-{result.stage}, 1 rank, {CLIPS_PER_STEP} clips of {FRAMES} frames at {SIZE}x{SIZE} a step"
    return "\n".join([f"| {title} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps, at least 2 (default: 4)")
    parser.add_argument("--stage", type=int, choices=(2, 3), default=2, help="ZeRO stage (default: 2)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in DIR/train_3b, use the checkpoint it holds, and leave it"
    )
    parser.add_argument("--limit-gb", type=float, default=13.0, help="fail above this peak (default: 13)")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps: {args.steps}; legal: >= 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that ranks end and files go
    work = (args.keep.resolve() if args.keep else ROOT / "runs") / "train_3b"
    work.mkdir(parents=True, exist_ok=True)
    try:
        make_inputs(work)
        result = train(work, steps=args.steps, stage=args.stage)
        if result.exit_code or len(result.losses) != args.steps:
            print((work / "train.log").read_text()[-4000:], file=sys.stderr)
            print(f"error: exit code {result.exit_code}, {len(result.losses)} of {args.steps} steps", file=sys.stderr)
            return 1
    except subprocess.CalledProcessError:  # the tool has said why
        return 1
    finally:
        if not args.keep:
            shutil.rmtree(work)
    text = table(result, args.limit_gb)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    name = f"train_3b_zero{args.stage}"
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    if result.memory.largest > args.limit_gb * 1e9:
        print(f"error: the peak is above --limit-gb {args.limit_gb}", file=sys.stderr)
        return 1
    return 0


def _seconds(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
