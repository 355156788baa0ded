"""What a recipe will need and how long it will take, before anything is bought, queued or loaded.

    python tools/plan.py launch/recipes/ucf101.yaml --gpu h100 --nodes 4 --gpus 8
    python tools/plan.py launch/recipes/ucf101.yaml per_device_train_batch_size=8 --gpu l40s --clips 9500 --json
    python tools/plan.py --calibrate machine.json                 measure this machine, in about a minute
    python tools/plan.py RECIPE --machine machine.json --gpus 2   two ranks on it

Does it fit, with which ZeRO stage and micro-batch, how long is a step and an epoch, and what takes the time. Model and
shards are looked at (sizes only) where they are at hand; else published sizes are taken. All that is assumed is said.
Exit codes: 0 it fits, 1 it does not, 2 wrong options or recipe.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vidcls.command import heavy_imports
from vidcls.config import load_config
from vidcls.planning.estimate import Estimate, Facts, alternatives, estimate, gather_facts, steps_of_run
from vidcls.planning.machines import ACCELERATORS, Machine, published, read_machine, write_machine
from vidcls.planning.steptime import Cluster

NETWORK_GBIT = 100
MEMORY_NAMES = {
    "base": "process: interpreter, libraries, context",
    "frozen_weights": "frozen weights",
    "trained_weights": "trained weights",
    "masters_and_moments": "float32 masters and Adam's moments",
    "gradients": "gradients and buckets",
    "gathered": "gathered layers (ZeRO-3)",
    "activations": "saved activations",
    "working_set": "working set",
    "loader": "loaded batches",
    "checkpoint": "a checkpoint written and read back",
    "allocator": "allocator",
    "prepacked": "beside it, while free: frozen weights once more",
}
TIME_NAMES = {
    "products": "matrix products",
    "passes": "element-wise passes",
    "host": "host",
    "optimizer": "optimizer",
    "communication": "communication",
    "loader": "loader workers on the same cores",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", nargs="?", help="YAML file, as for launch/train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    parser.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(ACCELERATORS)}")
    parser.add_argument("--machine", type=Path, metavar="FILE", help="instead of --gpu: what --calibrate measured")
    parser.add_argument("--nodes", type=int, default=1, help="(default: 1)")
    parser.add_argument("--gpus", type=int, default=1, help="ranks of a node (default: 1)")
    parser.add_argument(
        "--network-gbit",
        type=float,
        default=NETWORK_GBIT,
        help=f"10^9 bits a second into and out of a node (default: {NETWORK_GBIT})",
    )
    parser.add_argument("--clips", type=int, help="in an epoch, where the shards are not at hand")
    parser.add_argument("--frames", type=int, help="of a clip, likewise")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="measure this machine, write FILE, and stop")
    parser.add_argument("--json", action="store_true", help="print everything for programs")
    args = parser.parse_intermixed_args()
    for name in ("nodes", "gpus", "clips", "frames"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: must be at least 1, got {value}")
    if not args.network_gbit > 0:
        parser.error(f"--network-gbit: must be above 0, got {args.network_gbit:g}")
    if args.calibrate is None:
        if args.recipe is None:
            parser.error("RECIPE is missing")
        if (args.gpu is None) == (args.machine is None):
            parser.error("give either --gpu NAME or --machine FILE")
    return args


def calibrate(path: Path) -> None:
    with heavy_imports():  # with threads that wait as they do in training
        from vidcls.planning.calibrate import measure
    write_machine(measure(), path)
    print(f"{path}: written; plan with --machine {path}")


def machine_of(args: argparse.Namespace) -> Machine:
    return published(args.gpu) if args.gpu is not None else read_machine(args.machine)


def assumptions(facts: Facts, machine: Machine, cluster: Cluster) -> list[str]:
    clip = facts.clip
    found = [
        *facts.assumptions,
        f"every clip has {clip.frames} frames of {clip.height}x{clip.width} and {clip.text_tokens} tokens of text"
        + (f", the first {clip.prefix} of them in common" if clip.prefix else ""),
        *machine.assumptions,
        "loading data is not waited for, evaluation and checkpoints are not counted",
    ]
    if cluster.nodes > 1:
        found.append(f"{cluster.network / 1e9:g} GB/s into and out of a node, in a ring through all ranks")
    if cluster.ranks > 1:
        found.append("no communication is hidden behind computing")
    return found


def summary(way: Estimate, machine: Machine) -> dict[str, Any]:
    """One way as plain numbers: bytes, seconds, FLOPs."""
    return {
        **way.settings(),
        "train_batch_size": way.plan.global_,
        "fits": way.fits,
        "memory_bytes": {"total": way.memory.total, **asdict(way.memory)},
        "step_seconds": {"total": way.step.total, **asdict(way.step)},
        "bottleneck": way.step.bottleneck,
        "clips_per_second": way.clips_per_second,
        "flops": way.flops,
        "recomputed_flops": way.recomputed_flops,
        "trained_numbers": way.trained,
        "machine_memory_bytes": machine.memory,
    }


def parts(title: str, names: Mapping[str, str], values: Mapping[str, float], unit: float, word: str) -> Table:
    table = Table("part", word, title=title, title_justify="left", box=None, pad_edge=False)
    for key, name in names.items():
        if values[key] > 0:
            table.add_row(name, f"{values[key] / unit:,.3g}")
    table.add_row("sum", f"{sum(values.values()) / unit:,.3g}", style="bold")
    return table


def yaml_word(value: str | bool | int | None) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def show(
    given: Estimate, ways: list[Estimate], steps: int | None, facts: Facts, machine: Machine, assumed: list[str]
) -> None:
    console = Console(highlight=False, emoji=False, markup=False)
    console.width = max(console.width, 110)
    step = given.step
    verdict = "fits" if given.fits else "DOES NOT FIT"
    console.print(
        f"the recipe {verdict}: {given.memory.total / 1e9:.3g} GB of {machine.memory / 1e9:.3g} GB a rank, "
        f"{duration(step.total)} a step of {given.plan.global_} clips, {given.clips_per_second:.3g} clips/s, "
        f"bound by {TIME_NAMES[step.bottleneck]}",
        soft_wrap=True,
    )
    console.print(
        f"{facts.model.name}: {facts.model.weights / 1e9:.3g} billion weights, {given.trained / 1e6:.3g} million "
        f"numbers train; {given.flops / 1e12:.3g} TFLOP a step, {given.recomputed_flops / 1e12:.3g} more recomputed",
        soft_wrap=True,
    )
    if facts.clips is not None:
        console.print(f"an epoch of {facts.clips} clips: {duration(facts.clips / given.clips_per_second)}")
    if steps is not None:
        console.print(f"the run of {steps} steps: {duration(steps * step.total)}")
    console.print(parts("memory of a rank", MEMORY_NAMES, asdict(given.memory), 1e9, "GB"))
    console.print(parts("a step", TIME_NAMES, asdict(step), 1e-3, "ms"))
    table = Table(
        "ZeRO",
        "checkpointing",
        "micro-batch",
        "accumulation",
        "GB a rank",
        "fits",
        "step",
        "clips/s",
        "bound by",
        title="the same step in other ways, the fastest that fits first",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for way in ways:
        table.add_row(
            str(way.stage),
            "on" if way.checkpointing else "off",
            str(way.plan.micro),
            str(way.plan.accumulation),
            f"{way.memory.total / 1e9:.3g}",
            "yes" if way.fits else "no",
            duration(way.step.total),
            f"{way.clips_per_second:.3g}",
            TIME_NAMES[way.step.bottleneck],
        )
    console.print(table)
    if ways[0].fits:
        words = (f"{key}={yaml_word(value)}" for key, value in ways[0].settings().items())
        console.print(f"fastest: {' '.join(words)}", soft_wrap=True)
    console.print("assumed:")
    for line in assumed:
        console.print(f"  {line}", soft_wrap=True)


def main() -> int:
    args = parse_args()
    try:
        if args.calibrate is not None:
            calibrate(args.calibrate)
            return 0
        machine = machine_of(args)
        config = load_config(args.recipe, args.overrides)
        facts = gather_facts(config, clips=args.clips, frames=args.frames)
        cluster = Cluster(args.nodes, args.gpus, args.network_gbit * 1e9 / 8)
        given = estimate(config, facts, machine, cluster)
        ways = alternatives(config, facts, machine, cluster)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    steps = steps_of_run(config, facts, given.plan)
    assumed = assumptions(facts, machine, cluster)
    if args.json:
        told = {
            "recipe": summary(given, machine),
            "alternatives": [summary(way, machine) for way in ways],
            "model": asdict(facts.model) | {"weights": facts.model.weights},
            "clips": facts.clips,
            "steps": steps,
            "assumptions": assumed,
        }
        print(json.dumps(told, indent=1))
    else:
        show(given, ways, steps, facts, machine, assumed)
    return 0 if given.fits else 1


if __name__ == "__main__":
    sys.exit(main())
