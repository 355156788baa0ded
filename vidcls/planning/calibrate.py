"""What this machine can do, measured in about a minute: the figures that `machines.Machine` wants.

Weights and values come from more memory than caches hold, as they do in a step.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, pairwise

import psutil
import torch
import torch.nn.functional as F

from vidcls import distributed
from vidcls.model import adapters, layers
from vidcls.model.patches import VisionGeometry, frames_to_patches
from vidcls.model.prepacking import Prepacked, can_prepack
from vidcls.planning.machines import (
    CONTEXT_BYTES,
    LINK_EFFICIENCY,
    STEP_SECONDS,
    TENSOR_SECONDS,
    Machine,
    Rate,
)
from vidcls.planning.overhead import small_step

ROWS = (4, 64, 256, 512, 1024, 2048)
WEIGHTS = ((256, 256), (256, 1024), (1024, 2048), (2048, 4096), (2048, 11008))
WARM_UP_SECONDS = 2.0  # threads and clocks
LEAST_ROWS = 64  # of products that tell what prepacking gains
COLD_BYTES = 128 << 20
LEAST_SECONDS = 0.06  # of one figure, at least
VALUES = (844, 5504)
SCORES = (4, 16, 211, 211)
FRAMES = (8, 16, 112, 112, 3)  # clips, frames, height, width, colours
MEMORY_LINK = 4e9  # bytes a second between ranks of one host without accelerators: through shared memory
# A rank imports these; what torch's compiled operations and DeepSpeed's buffers take comes on top.
IMPORTS = "import torch, deepspeed, peft, transformers, vidcls.model.pretrained, psutil"
STARTED_BYTES = 0.13e9


def measure() -> Machine:
    device, dtype = distributed.device(), torch.bfloat16
    on_gpu = device.type != "cpu"
    rates = list(_rates(device, dtype, prepacked=True))
    plain = rates if on_gpu else _rates(device, dtype, prepacked=False)
    gains = [one.flops / other.flops for one, other in zip(rates, plain, strict=True) if one.rows >= LEAST_ROWS]
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    return Machine(
        name=distributed.accelerator_name() if on_gpu else f"this machine, {len(os.sched_getaffinity(0))} CPU cores",
        on_gpu=on_gpu,
        memory=float(total),
        peak=max(rate.flops for rate in rates),
        rates=tuple(rates),
        value_seconds=_value_seconds(device, dtype),
        operation_seconds=_operation_seconds(device, dtype),
        step_seconds=STEP_SECONDS,
        tensor_seconds=TENSOR_SECONDS,
        link=MEMORY_LINK if not on_gpu else 32e9 * LINK_EFFICIENCY,
        base_bytes=CONTEXT_BYTES if on_gpu else _imported_bytes() + STARTED_BYTES,
        prepacking_gain=statistics.median(gains),
        assumptions=(
            "rates of products, passes and operations as measured by --calibrate",
            f"DeepSpeed and the log take {STEP_SECONDS * 1e3:g} ms a step and {TENSOR_SECONDS * 1e6:g} us a tensor",
        ),
    )


def _rates(device: torch.device, dtype: torch.dtype, *, prepacked: bool) -> Iterator[Rate]:
    """With plain weights, or prepacked ones where there are any."""
    square, until = torch.randn(1024, 1024, device=device).to(dtype), time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < until:
        square @ square
    for inner, outer in WEIGHTS:
        copies = max(2, COLD_BYTES // (2 * inner * outer))
        weights = [torch.randn(outer, inner, device=device).to(dtype) for _ in range(min(copies, 64))]
        products: list[Callable[[torch.Tensor], torch.Tensor]] = [
            partial(F.linear, weight=weight) for weight in weights
        ]
        if prepacked and can_prepack(weights[0]):
            products = [partial(Prepacked(weight, backward=False).multiply, bias_O=None) for weight in weights]
        ring = cycle(products)
        for rows in ROWS:
            x = torch.randn(rows, inner, device=device).to(dtype)
            seconds = _seconds(partial(_multiply, x, ring))
            yield Rate(rows, inner * outer, 2.0 * rows * inner * outer / seconds)


def _multiply(x: torch.Tensor, products: Iterator[Callable[[torch.Tensor], torch.Tensor]]) -> None:
    next(products)(x)


def _value_seconds(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward of one value, by the kind of layer."""
    copies = math.ceil(COLD_BYTES / (2 * VALUES[0] * VALUES[1]))
    values = [torch.randn(VALUES, device=device).to(dtype).requires_grad_() for _ in range(copies + 1)]
    ring = cycle(pairwise(values))
    weight = torch.ones(VALUES[1], device=device, dtype=dtype)
    count = VALUES[0] * VALUES[1]

    def move() -> None:
        x, y = next(ring)
        with torch.no_grad():
            x + y

    def norm() -> None:
        x, y = next(ring)
        torch.autograd.grad(layers._RmsNorm.apply(x, weight, 1e-6), x, y.detach())

    def swiglu() -> None:
        x, y = next(ring)
        torch.autograd.grad(layers._SwiGlu.apply(x, y), (x, y), y.detach())

    def mask() -> None:
        x, y = next(ring)
        with torch.no_grad():
            keep = adapters._keep_mask(x, 0.05)
            x * keep
            x * keep
            y.detach().clone().addcmul_(x, keep)

    scores = torch.randn(SCORES, device=device).to(dtype).requires_grad_()

    def score() -> None:
        weights = scores.softmax(dim=-1)
        torch.autograd.grad(weights, scores, scores.detach())[0] * 0.1

    frames = torch.randint(256, (math.prod(FRAMES),), dtype=torch.uint8, device=device)
    geometry = VisionGeometry()
    grids = (geometry.grid(*FRAMES[1:4]),) * FRAMES[0]

    def pixel() -> None:
        frames_to_patches(frames, grids, geometry, dtype)

    functions = {"norm": norm, "swiglu": swiglu, "mask": mask, "move": move}
    found = {name: _seconds(function) / count for name, function in functions.items()}
    found["score"] = _seconds(score) / math.prod(SCORES)
    return found | {"pixel": _seconds(pixel) / len(frames)}


def _operation_seconds(device: torch.device, dtype: torch.dtype) -> float:
    step, operations = small_step(device, dtype)
    return _seconds(step) / operations


def _seconds(function: Callable[[], None]) -> float:
    """Of a call: the median of several after one that does not count, which is what a step meets."""
    function()
    times: list[float] = []
    while len(times) < 5 or sum(times) < LEAST_SECONDS:
        distributed.synchronize()
        start = time.perf_counter()
        function()
        distributed.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _imported_bytes() -> float:
    program = f"{IMPORTS}; print(psutil.Process().memory_info().rss)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
