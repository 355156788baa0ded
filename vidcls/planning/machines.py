"""What a machine can do: published numbers of accelerators with assumed efficiencies, or rates that were measured.

Published numbers are the makers' data sheets: dense bf16 with float32 sums (not the doubled number "with sparsity"),
10^9 bytes of memory, and one direction of the link between the accelerators of a node.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vidcls.planning.flops import Product

# Assumed of a published number, and printed with every answer.
PRODUCTS_EFFICIENCY = 0.6  # of the dense peak, for products with many rows
HALF_RATE_ROWS = 256  # with so many rows a product reaches half of that
MEMORY_EFFICIENCY = 0.75  # of the published bandwidth, in element-wise passes
LINK_EFFICIENCY = 0.7
HOST_SECONDS = 7e-6  # of Python and the driver for one operation
CONTEXT_BYTES = 1.5e9  # CUDA context, NCCL, cuBLAS workspaces
FRAGMENTATION = 1.1  # what the allocator takes is this times what tensors need
# What DeepSpeed and the log take of the host beside the model, in times of one of its operations: once a step, for each
# trained tensor (fewer with training/reduction.py's LocalSum), and to gather and drop a module's weights under ZeRO-3,
# alone and with a second rank. Measured on two CPU cores; to gather is assumed to take 0.2 ms with a GPU.
STEP_OPERATIONS, TENSOR_OPERATIONS, SUMMED_TENSOR_OPERATIONS = 300, 8, 0.5
GATHER_OPERATIONS, GATHER_TOGETHER_OPERATIONS, GATHER_GPU_SECONDS = 43, 63, 0.2e-3
FORWARD_MOVES = 1 / 3  # of a layer's plain passes, those that are forward
NARROW = 64  # the least side of a product that counts as narrow: LoRA's

# Bytes that pass through memory for one value, forward and backward, as model/layers.py does it in bf16.
PASS_BYTES = {
    "norm": (36, 74),
    "swiglu": (10, 22),
    "mask": (2 + 6, 6 + 12),
    "score": (8, 12),
    "move": (FORWARD_MOVES * 4, (1 - FORWARD_MOVES) * 4),
    "pixel": (2 + 5 + 8 + 8 + 6, 0),  # of a frame: reordered, float32, mean and deviation, bf16
}


@dataclass(frozen=True)
class Accelerator:
    """A line of a data sheet. flops: dense bf16 peak; bandwidth and link in bytes a second, memory in bytes."""

    flops: float
    memory: float
    bandwidth: float
    link: float


ACCELERATORS = {
    "b200": Accelerator(2250e12, 180e9, 8.0e12, 900e9),
    "h200": Accelerator(989e12, 141e9, 4.8e12, 450e9),
    "h100": Accelerator(989e12, 80e9, 3.35e12, 450e9),
    "h100-pcie": Accelerator(756e12, 80e9, 2.0e12, 64e9),
    "a100": Accelerator(312e12, 80e9, 2.039e12, 300e9),
    "a100-40gb": Accelerator(312e12, 40e9, 1.555e12, 300e9),
    "l40s": Accelerator(362e12, 48e9, 0.864e12, 32e9),
    "a6000": Accelerator(154.8e12, 48e9, 0.768e12, 32e9),
    "l4": Accelerator(121e12, 24e9, 0.3e12, 32e9),
    "a10": Accelerator(125e12, 24e9, 0.6e12, 32e9),
    "rtx4090": Accelerator(165.2e12, 24e9, 1.008e12, 32e9),
    "rtx3090": Accelerator(71e12, 24e9, 0.936e12, 32e9),
}


@dataclass(frozen=True)
class Rate:
    """FLOP/s of products of `rows` rows with a weight of `weights` numbers; of fused attention over `rows` tokens with
    heads of width `weights`."""

    rows: int
    weights: int
    flops: float


@dataclass(frozen=True)
class Machine:
    """What one rank has when nobody else uses the machine.

    rates: measured, or () where they follow from `peak`; so batched, of many products at once, and fused, of attention
    without its backward. narrow_seconds: least of a narrow product, for each number of its factors and its result.
    prepacking_gain: of a CPU, whose rates are those of prepacked weights, how many times as fast as with plain ones.
    value_seconds: of one value, by the keys of PASS_BYTES; forward_seconds: of it, forward alone. loader_seconds: that
    a loader worker takes from a rank for one byte of a frame, where they share cores.
    base_bytes: of a rank before it has a model.
    """

    name: str
    on_gpu: bool
    memory: float
    peak: float
    rates: tuple[Rate, ...]
    value_seconds: dict[str, float]
    forward_seconds: dict[str, float]
    operation_seconds: float
    link: float
    base_bytes: float
    batched: tuple[Rate, ...] = ()
    fused: tuple[Rate, ...] = ()
    narrow_seconds: float = 0.0
    loader_seconds: float = 0.0
    prepacking_gain: float = 1.0
    assumptions: tuple[str, ...] = ()

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a plain pass."""
        return sum(PASS_BYTES["move"]) / self.value_seconds["move"]

    def product_seconds(self, product: Product, *, value_bytes: int) -> float:
        """Of it once, whatever its count."""
        one = replace(product, count=1)
        passing = one.bytes(value_bytes) / self.bandwidth
        rows, weights = one.rows, one.inner * one.outer
        if not self.rates:
            rate = self.peak * PRODUCTS_EFFICIENCY * rows / (rows + HALF_RATE_ROWS)
        elif one.fused:
            # Scores are not moved, and so what is moved is no bound.
            return one.flops / _rate(self.fused, *one.fused)
        elif one.batch > 1:
            rate = _rate(self.batched, rows, weights)
        else:
            rate = _rate(self.rates, rows, weights)
        if min(one.rows, one.inner, one.outer) <= NARROW and one.batch == 1 and not one.frozen:
            passing = max(passing, one.bytes(1) * self.narrow_seconds)
        return max(one.flops / rate, passing)


def _rate(rates: tuple[Rate, ...], rows: int, weights: int) -> float:
    by_size: dict[int, list[tuple[int, float]]] = {}
    for rate in sorted(rates, key=lambda each: (each.weights, each.rows)):
        by_size.setdefault(rate.weights, []).append((rate.rows, rate.flops))
    return _between([(size, _between(of_rows, rows)) for size, of_rows in by_size.items()], weights)


def _between(points: list[tuple[int, float]], at: int) -> float:
    """Linear in the logarithm of x; the nearest end beyond the ends. `points` by rising x."""
    number = bisect_left([x for x, _ in points], at)
    if number == 0:
        return points[0][1]
    if number == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[number - 1], points[number]
    share = math.log(at / left) / math.log(right / left)
    return low + share * (high - low)


def published(name: str) -> Machine:
    """An accelerator of the table. Raises ValueError for another name."""
    if name not in ACCELERATORS:
        raise ValueError(f"--gpu: {name!r} is not legal: {' | '.join(ACCELERATORS)}")
    card = ACCELERATORS[name]
    bandwidth = card.bandwidth * MEMORY_EFFICIENCY
    return Machine(
        name=name,
        on_gpu=True,
        memory=card.memory,
        peak=card.flops,
        rates=(),
        value_seconds={key: sum(bytes_) / bandwidth for key, bytes_ in PASS_BYTES.items()},
        forward_seconds={key: bytes_[0] / bandwidth for key, bytes_ in PASS_BYTES.items()},
        operation_seconds=HOST_SECONDS,
        link=card.link * LINK_EFFICIENCY,
        base_bytes=CONTEXT_BYTES,
        assumptions=(
            f"{name}: {card.flops / 1e12:g} TFLOP/s dense bf16, {card.memory / 1e9:g} GB, "
            f"{card.bandwidth / 1e12:g} TB/s, {card.link / 1e9:g} GB/s to its neighbours (data sheet)",
            f"products reach {PRODUCTS_EFFICIENCY:.0%} of that peak with many rows, half of it with {HALF_RATE_ROWS}",
            f"element-wise passes reach {MEMORY_EFFICIENCY:.0%} of the memory's bandwidth, links {LINK_EFFICIENCY:.0%}",
            f"the host needs {HOST_SECONDS * 1e6:g} us for an operation, {STEP_OPERATIONS} of them for a step",
            f"under ZeRO-3 the host needs {GATHER_GPU_SECONDS * 1e3:g} ms to gather a module",
            f"CUDA context and libraries take {CONTEXT_BYTES / 1e9:g} GB, the allocator {FRAGMENTATION - 1:.0%} more",
            "nothing of this has been measured on a GPU yet",
        ),
    )


def read_machine(path: Path) -> Machine:
    """What `write_machine` wrote. Raises ValueError naming a file that is missing, damaged or of another version."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if other := {field.name for field in fields(Machine)} ^ values.keys():
            raise ValueError(f"--machine: {str(path)!r} is of another version, by {', '.join(sorted(other))}")
        rates = {name: tuple(Rate(**rate) for rate in values[name]) for name in ("rates", "batched", "fused")}
        machine = Machine(**values | rates | {"assumptions": tuple(values["assumptions"])})
        missing = PASS_BYTES.keys() - (machine.value_seconds.keys() & machine.forward_seconds.keys())
    except FileNotFoundError:
        raise ValueError(f"--machine: {str(path)!r} is not a file; --calibrate writes one") from None
    except (OSError, json.JSONDecodeError, UnicodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--machine: {str(path)!r} is no calibration: {error!r}") from None
    missing |= {name for name, found in rates.items() if not found}
    if missing:
        raise ValueError(f"--machine: {str(path)!r} is of another version: {sorted(missing)} are missing")
    return machine


def write_machine(machine: Machine, path: Path) -> None:
    path.write_text(json.dumps(asdict(machine), indent=1) + "\n", encoding="utf-8")
