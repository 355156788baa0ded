"""Training clips a second: vidcls through its launcher, a bare PyTorch loop, and the usual way, taking turns.

    python benchmarks/throughput.py --shape 3b --model DIR
    python benchmarks/throughput.py --shape tiny --steps 30

Contestants train the same model (random weights) on the same clips with the same settings, each in processes of its
own: `vidcls` is launch/train.py, `bare loop` is bare_loop.py, `usual way` is usual_way.py. In every round one runs
after the other. With `--turns steps` vidcls meets each of the others alone: both are alive and take turns step by step,
so that they find the same machine. That is for steps of seconds, and where two fit into memory. The last run is once
more vidcls, by itself and taken apart by instrumented_train.py: it tells the wait for data, which another's turn hides.

The ceiling, the machine's best rate of bf16 matrix products, is measured in the bare loop's process after each of its
steps, and the operations of a step are counted there: what a LoRA step needs, no gradients of frozen weights. Products
inside the fused attention of the frozen tower are left out; with `--option gradient_checkpointing=true` what is
recomputed is in.

Warm-up steps are left out; figures are medians over the steps of all rounds, ratios are taken within a round. Exit
codes: 0 done, 1 a contestant failed (its log is shown), 2 wrong options.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import ChainMap
from pathlib import Path
from typing import Any

import psutil
from instrumented_train import PARTS_NAME, TURNS_NAME, WARM_UP
from processes import launch_words, launched, motion_shards, session, tool
from rounds import RESULTS, Ratio, Spread, conditions, show_ratios, table, write_json
from turns import environment

from vidcls.data.settings import SUFFIXES

PACKAGES = ("torch", "deepspeed", "transformers", "peft")
BARE, USUAL, OURS = "bare loop", "usual way", "vidcls"
CLOCKED = "benchmarks/instrumented_train.py"
BARS = {BARE: 0.97, USUAL: 2.5}
BAR_WITH_CACHE = 3.5  # over the usual way


class Bench:
    """One benchmark: its inputs below `work`, and a run of each contestant."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.model = args.model or work / "model"
        if not args.model:
            tool("make_random_checkpoint.py", "--shape", args.shape, "--out", self.model)
        stored = {"frames": args.frames, "size": args.size, "codec": args.codec}
        videos = {"video_frames": 60, "video_size": args.video_size}
        motion_shards(work, per_class=8, **stored, **videos)
        self.options = list(args.option)
        if args.vision_cache:
            self.options.append(f"vision_cache={work / 'features'}")
            tool("cache_features.py", *self.words(work / "caching", 1))
        self.bare: list[dict[str, Any]] = []
        self.matches: list[dict[str, list[float]]] = []  # of contestants that are compared, the seconds of each step

    def words(self, output: Path, steps: int) -> list[str]:
        args = self.args
        options = {
            "model_name_or_path": self.model,
            "dataset": self.work / "shards",
            "num_action_classes": "null",
            "eval_dataset": "null",
            "eval_strategy": "no",
            "horizontal_flip": 0,
            "temporal_jitter": "false",
            "finetuning_type": args.tuning,
            "lora_rank": args.lora_rank,
            "lora_dropout": args.lora_dropout,
            "video_maxlen": args.frames,
            "video_max_pixels": args.size**2,
            "dataloader_num_workers": args.workers,
            "per_device_train_batch_size": args.micro_batch,
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
            "logging_steps": 10,  # as in the recipe
            "save_steps": 10**6,
            "plot_loss": "false",
            "html_report": "false",
            "report_to": "none",
            "deepspeed": f"ds_configs/zero{args.stage}.json",
            "output_dir": output,
        }
        return ["launch/recipes/ucf101.yaml", *(f"{k}={v}" for k, v in options.items()), *self.options]

    def round(self) -> None:
        if self.args.turns == "steps":
            self.matches += [self._play([OURS, name]) for name in self.args.against]
        else:
            alone = [self._play([name]) for name in (OURS, *self.args.against)]
            self.matches.append(dict(ChainMap(*alone)))

    def rates(self, name: str, beside: str) -> list[float]:
        """Clips a second in each of the matches with `beside`."""
        clips = self.args.micro_batch * (self.args.ranks if name == OURS else 1)
        return [clips / statistics.median(match[name]) for match in self.matches if beside in match]

    def _play(self, names: list[str]) -> dict[str, list[float]]:
        folder = Path(tempfile.mkdtemp(dir=self.work))
        with contextlib.ExitStack() as stack:
            running: dict[str, psutil.Popen] = {}
            for number, name in enumerate(names):
                place = environment(folder, number, len(names))
                command = self._command(name, folder / f"{number}")
                running[name] = stack.enter_context(session(command, folder / f"{number}.log", **place))
            while any(process.poll() is None for process in running.values()):
                time.sleep(0.2)
                for number, (name, process) in enumerate(running.items()):
                    if process.poll():
                        log = (folder / f"{number}.log").read_text()
                        raise RuntimeError(f"{name} failed with exit code {process.returncode}:\n{log[-3000:]}")
        seconds: dict[str, list[float]] = {}
        for number, name in enumerate(names):
            if name == OURS:
                seconds[name] = json.loads((folder / f"{number}" / TURNS_NAME).read_text())
                continue
            figures = json.loads((folder / f"{number}.json").read_text())
            seconds[name] = figures["seconds"]
            if name == BARE:
                self.bare.append(figures)
        return seconds

    def _command(self, name: str, output: Path) -> list[object]:
        steps, out = self.args.steps, output.with_suffix(".json")
        if name == OURS:
            return launch_words(self.args.ranks, self.words(output, WARM_UP + steps + 1), CLOCKED)
        script, more = "bare_loop.py", ["--ceiling"] if not self.bare else []
        if name == USUAL:
            script, more = "usual_way.py", ["--videos", str(self.work / "videos")]
        words = [f"benchmarks/{script}", *self.words(output, 100 + steps), "--steps", steps, "--out", out, *more]
        return [sys.executable, *words]

    def parts(self) -> dict[str, float]:
        """Shares of a step's time, medians over the steps."""
        output = Path(tempfile.mkdtemp(dir=self.work))
        log = output.with_suffix(".log")
        with launched(self.args.ranks, self.words(output / "run", WARM_UP + self.args.steps), log, CLOCKED) as launcher:
            if launcher.wait():
                raise RuntimeError(f"{OURS} failed:\n{log.read_text()[-3000:]}")
        steps = json.loads((output / "run" / PARTS_NAME).read_text())[WARM_UP:]
        names = list(dict.fromkeys(name for step in steps for name in step))
        seconds = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}
        return {name: value / sum(seconds.values()) for name, value in seconds.items()}


def ceiling(bench: Bench) -> dict[str, float]:
    """Model-FLOPs use of vidcls's steps, and of a step that were nothing but its products."""
    counted = bench.bare[0]
    flops = counted["flops"]
    # Ranks share the cores that the best rate was measured on; a GPU is a rank's own.
    share = bench.args.ranks if counted["device"] == "cpu" else 1
    best = [statistics.median(figures["peak_flops_per_second"]) for figures in bench.bare]
    ours = [statistics.median(match[OURS]) for match in bench.matches if BARE in match]
    used = [flops * share / seconds / peak for seconds, peak in zip(ours, best, strict=True)]
    alone = flops / counted["products_alone_seconds"] / counted["peak_beside_products"]
    return {
        "TFLOP of matrix products in a step": flops / 1e12,
        "best matrix products, TFLOP/s": statistics.median(best) / 1e12,
        "model-FLOPs use": statistics.median(used),
        "the same, of the step's products alone": alone,
        "products alone / whole step": statistics.median(used) / alone,
    }


def draw(path: Path, rates: dict[str, Spread], parts: dict[str, float], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = list(rates)
    middles = [rates[name].median for name in names]
    errors = [[r.median - r.least for r in rates.values()], [r.most - r.median for r in rates.values()]]
    bars = left.bar(names, middles, yerr=errors, color=["tab:blue", "tab:gray", "tab:orange"][: len(names)], capsize=4)
    left.bar_label(bars, fmt="%.3g", padding=3)
    left.set_ylabel("training clips / s")
    left.margins(y=0.15)
    shown = dict(sorted(parts.items(), key=lambda item: item[1]))
    right.barh(list(shown), [100 * share for share in shown.values()], color="tab:blue")
    right.set_xlabel("per cent of a step (vidcls)")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", help="tiny, or one of make_random_checkpoint.py (default: tiny)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint of that shape instead of a new one")
    parser.add_argument("--stage", type=int, choices=(2, 3), default=2, help="ZeRO stage (default: 2)")
    parser.add_argument("--ranks", type=int, default=1, help="of vidcls; the others have one process (default: 1)")
    parser.add_argument("--frames", type=int, default=16, help="per clip (default: 16)")
    parser.add_argument("--size", type=int, default=112, help="height and width of a frame in pixels (default: 112)")
    parser.add_argument("--codec", choices=SUFFIXES, default="jpg", help="of the frames in the shards (default: jpg)")
    parser.add_argument("--video-size", type=int, default=240, help="of the videos, in pixels (default: 240)")
    parser.add_argument("--micro-batch", type=int, default=2, help="clips per forward (default: 2)")
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora", help="finetuning_type (default: lora)")
    parser.add_argument("--lora-rank", type=int, default=16, help="(default: 16)")
    parser.add_argument("--lora-dropout", type=float, default=0.05, help="(default: 0.05, as in the recipes)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes (default: 1)")
    parser.add_argument("--steps", type=int, default=5, help="that count, in each round (default: 5)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: 2)")
    parser.add_argument(
        "--turns", choices=("steps", "runs"), default="runs", help="what contestants alternate in (default: runs)"
    )
    parser.add_argument(
        "--against",
        nargs="*",
        choices=(BARE, USUAL),
        default=[BARE, USUAL],
        help="default: both; the bare loop is the ceiling's",
    )
    parser.add_argument("--vision-cache", action="store_true", help="store the tower's output first; not the usual way")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="further recipe keys")
    parser.add_argument("--name", help="of the result files (default: throughput_SHAPE)")
    return parser


def main() -> int:
    args = options().parse_args()
    with tempfile.TemporaryDirectory(prefix="throughput_") as folder:
        try:
            bench = Bench(args, Path(folder))
            for _ in range(args.rounds):
                bench.round()
            parts = bench.parts()
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        words = bench.words(Path("OUT"), args.steps)
    names = (OURS, *args.against)
    rates = {name: Spread.of(bench.rates(name, name)) for name in names}
    bars = BARS | ({USUAL: BAR_WITH_CACHE} if args.vision_cache else {})
    ratios = [Ratio.of(f"{OURS} / {n}", bench.rates(OURS, n), bench.rates(n, n), bars[n]) for n in args.against]
    seconds = {name: Spread.of([s for match in bench.matches for s in match.get(name, [])]) for name in names}
    batch = f"{args.ranks} x {args.micro_batch} clips of {args.frames} x {args.size}x{args.size}"
    title = f"{args.shape}, ZeRO-{args.stage}, {args.tuning}, {batch}"
    table(title, ("contestant", "clips / s", "seconds a step"), [(n, rates[n], seconds[n]) for n in rates])
    show_ratios("within one round", ratios)
    table("a step of vidcls", ("part", "share"), [(name, f"{share:.1%}") for name, share in parts.items()])
    use = ceiling(bench) if BARE in args.against else {}
    if use:
        table("against the ceiling", ("figure", "value"), [(name, f"{value:.3g}") for name, value in use.items()])
    name = args.name or f"throughput_{args.shape}{'_cache' if args.vision_cache else ''}"
    result = {
        "conditions": conditions(*PACKAGES),
        "options": {key: str(value) for key, value in vars(args).items()},
        "recipe": words,
        "clips_per_second": rates,
        "step_seconds": seconds,
        "ratios": ratios,
        "parts": parts,
        "ceiling": use,
    }
    write_json(RESULTS / f"{name}.json", result)
    draw(RESULTS / f"{name}.png", rates, parts, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
