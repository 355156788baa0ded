"""Load the 3B shape on two ranks of this machine under ZeRO-2 and ZeRO-3, and measure what memory each rank needs.

    python benchmarks/load.py [--ranks 2] [--keep DIR]

Writes a random Qwen2.5-VL-3B checkpoint (7.5 GB; removed afterwards without --keep) and four synthetic clips, starts
launch/train.py through the deepspeed launcher for a step of one 112x112 clip of 16 frames a rank, LoRA of rank 16,
once a stage, and prints a table, which goes into benchmarks/results/ too.

Memory is that of the rank that needs most, counted alike for both stages:

    held       once the engine is made: the peak so far of the resident set (VmHWM, the kernel's own mark: every page
               the rank has touched, its own memory and mapped files, also when another rank has the same pages), and
               what it has mapped of the checkpoint and not touched yet. So much a rank takes of a host of its own, or
               of a GPU, to have its share of the model; the limit is on this one.
    resident   VmHWM, to the end of the step: ZeRO-3 has gathered layers, of which it keeps up to
               stage3_max_live_parameters (1e9 in ds_configs/zero3.json: 2 GB), and both have activations.
    pss        the same, but a page that n processes map counts as 1/n: what the rank takes of this host. Under ZeRO-2
               all ranks of a host share the checkpoint's pages; the one that ends last has them alone for a moment.
    anonymous  the part of pss that no file backs.

Exit codes: 0 done, 1 a run failed or the share of ZeRO-3 is above --limit, 2 wrong options.
"""

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import yaml
from processes import ROOT, kilobytes, launched, ranks_below
from rounds import RESULTS, conditions
from train_3b import SIZE, make_inputs

SAMPLE_SECONDS = 0.25
WRAPPED = "training  "  # how the line begins that a run prints when its engine is made
NUMBERS = ("held", "resident", "pss", "anonymous")


@dataclass
class Peak:
    """Bytes of the rank that needed most; each number is a peak of its own."""

    held: int = 0
    resident: int = 0
    pss: int = 0
    anonymous: int = 0

    def sample(self, pid: int) -> None:
        rollup = kilobytes(Path(f"/proc/{pid}/smaps_rollup"))
        self.resident = max(self.resident, kilobytes(Path(f"/proc/{pid}/status")).get("VmHWM", 0))
        self.pss = max(self.pss, rollup.get("Pss", 0))
        self.anonymous = max(self.anonymous, rollup.get("Pss_Anon", 0))

    def hold(self, process: psutil.Process) -> None:
        """Take `held` from a rank whose engine has just been made."""
        mapped = [part for part in process.memory_maps(grouped=False) if part.path.endswith(".safetensors")]
        peak = kilobytes(Path(f"/proc/{process.pid}/status"))["VmHWM"]
        self.held = max(self.held, peak + sum(part.size - part.rss for part in mapped))


@dataclass
class Load:
    """One run."""

    stage: int
    exit_code: int = 0
    seconds_to_wrapped: float = 0.0  # from the command: imports, load, engine
    peak: Peak = field(default_factory=Peak)
    losses: list[float] = field(default_factory=list)


def load(work: Path, *, stage: int, ranks: int) -> Load:
    """Start the launcher on the inputs in `work` and watch its ranks until it ends; its output is in load.log."""
    output = work / f"zero{stage}"
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "model_name_or_path": str(work / "model"),
        "dataset": str(work / "shards"),
        "lora_rank": 16,
        "video_max_pixels": SIZE * SIZE,
        "dataloader_num_workers": 0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "logging_steps": 1,
        "plot_loss": False,
        "report_to": "none",
        "deepspeed": f"ds_configs/zero{stage}.json",
        "output_dir": str(output),
    }
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(options), encoding="utf-8")
    result, log = Load(stage), work / "load.log"
    started = time.monotonic()
    with launched(ranks, [recipe], log) as launcher:
        while launcher.poll() is None:
            just_wrapped = not result.seconds_to_wrapped and WRAPPED in log.read_text()
            if just_wrapped:
                result.seconds_to_wrapped = time.monotonic() - started
            for process in ranks_below(launcher):
                with contextlib.suppress(psutil.Error, OSError):  # processes come and go
                    result.peak.sample(process.pid)
                    if just_wrapped:
                        result.peak.hold(process)
            time.sleep(SAMPLE_SECONDS)
    rows = output / "train_log.jsonl"
    if rows.exists():
        result.losses = [json.loads(line)["loss"] for line in rows.read_text().splitlines()]
    result.exit_code = launcher.returncode
    return result


def table(loads: list[Load]) -> str:
    """Both runs and the share that ZeRO-3 needs of ZeRO-2's memory, as a Markdown table."""
    lines = ["| peak of a rank | ZeRO-2 | ZeRO-3 | share |", "| --- | --- | --- | --- |"]
    for name in NUMBERS:
        two, three = (getattr(each.peak, name) / 1e9 for each in loads)
        lines.append(f"| {name} | {two:.2f} GB | {three:.2f} GB | {three / two:.2f} |")
    seconds = [each.seconds_to_wrapped for each in loads]
    lines.append(f"| command to engine made | {seconds[0]:.0f} s | {seconds[1]:.0f} s | |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="at least 2 (default: 2)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in DIR/load, use the checkpoint it holds, leave it"
    )
    parser.add_argument("--limit", type=float, default=0.7, help="fail above this share of what is held")
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error(f"--ranks: {args.ranks}; legal: >= 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that ranks end and files go
    work = (args.keep.resolve() if args.keep else ROOT / "runs") / "load"
    work.mkdir(parents=True, exist_ok=True)
    loads = []
    try:
        make_inputs(work)
        for stage in (2, 3):
            loads.append(load(work, stage=stage, ranks=args.ranks))
            if loads[-1].exit_code or len(loads[-1].losses) != 1:
                print((work / "load.log").read_text()[-4000:], file=sys.stderr)
                print(f"error: ZeRO-{stage}: exit code {loads[-1].exit_code}", file=sys.stderr)
                return 1
    except subprocess.CalledProcessError:  # the tool has said why
        return 1
    finally:
        if not args.keep:
            shutil.rmtree(work)
    text = table(loads)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "load.md").write_text(text + "\n", encoding="utf-8")
    content = {"conditions": conditions(), "loads": [asdict(each) for each in loads]}
    (RESULTS / "load.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    share = loads[1].peak.held / loads[0].peak.held
    if share > args.limit:
        print(f"error: ZeRO-3 holds {share:.2f} of what ZeRO-2 does, above --limit {args.limit}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
