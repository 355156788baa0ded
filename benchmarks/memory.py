"""Peak memory of a rank beside the sum of weights, optimizer state, gradients, activations and the rest.

    python benchmarks/memory.py [--model DIR] [--only NAME ...] [--machine FILE]       about five minutes

Trains the cases of plan.py through the deepspeed launcher. A peak is the largest resident set (VmHWM) of the rank that
needed most, its mapped part of the checkpoint included. The sum is `vidcls.planning.memory`'s, part by part; what the
process takes without a model is measured on this machine, the other parts follow from recipe and model alone.

Bar: within 10 %. A bar that is missed is said, and is no error. Tables go to the screen, numbers and a picture into
benchmarks/results/. Exit codes: 0 done, 1 a case failed (its log is shown), 2 wrong options.
"""

import sys
from dataclasses import fields
from pathlib import Path

from matplotlib.figure import Figure
from plan import MEMORY_BAR, Compared, command
from rounds import RESULTS, table

from vidcls.planning.memory import Memory

# Columns of the table: parts of the sum.
COLUMNS = {
    "process": ("base",),
    "weights": ("frozen_weights", "trained_weights", "gathered"),
    "weights once more": ("prepacked",),
    "optimizer": ("masters_and_moments",),
    "gradients": ("gradients",),
    "activations": ("activations", "working_set"),
    "loader, checkpoint": ("loader", "checkpoint", "allocator"),
}
assert {name for names in COLUMNS.values() for name in names} == {field.name for field in fields(Memory)}


def parts(planned: Memory) -> dict[str, float]:
    return {column: sum(getattr(planned, name) for name in names) for column, names in COLUMNS.items()}


def show(found: list[Compared]) -> None:
    rows = []
    for each in found:
        sums = [f"{value / 1e9:.3f}" for value in parts(each.plan.memory).values()]
        total = (f"{each.planned_bytes / 1e9:.3f}", f"{each.bytes / 1e9:.3f}", f"{each.memory_error:+.1%}")
        rows.append((each.case.name, *sums, *total))
    table("GB of the rank that needs most", ("case", *COLUMNS, "sum", "measured", "sum / measured"), rows)
    within = sum(abs(each.memory_error) <= MEMORY_BAR for each in found)
    verdict = "met" if within == len(found) else "MISSED"
    print(f"{within} of {len(found)} cases within {MEMORY_BAR:.0%}: {verdict}")


def draw(found: list[Compared], path: Path) -> None:
    figure = Figure(figsize=(11, 0.5 * len(found) + 2), layout="constrained")
    axes = figure.subplots()
    names = [each.case.name for each in found]
    left = [0.0] * len(found)
    for column in COLUMNS:
        widths = [parts(each.plan.memory)[column] / 1e9 for each in found]
        axes.barh(names, widths, left=left, label=column, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    measured = [each.bytes / 1e9 for each in found]
    axes.scatter(measured, range(len(found)), color="black", marker="|", s=400, label="measured", zorder=3)
    axes.invert_yaxis()
    axes.set(xlabel="GB", title="Peak of the rank that needs most: the sum of its parts, and as measured")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> int:
    found = command(__doc__, "memory", show, timed=False)
    if found:
        draw(found, RESULTS / "memory.png")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
