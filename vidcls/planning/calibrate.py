"""What this machine can do, measured in about a minute: the figures that `machines.Machine` wants.

Weights and values come from more memory than caches hold, as they do in a step.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, pairwise

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from vidcls import distributed
from vidcls.data.codecs import decode_frames, encode_frames
from vidcls.data.settings import DecodeSettings
from vidcls.model import adapters, layers
from vidcls.model.patches import VisionGeometry, frames_to_patches
from vidcls.model.prepacking import Prepacked, can_prepack
from vidcls.planning.machines import (
    CONTEXT_BYTES,
    FORWARD_MOVES,
    LINK_EFFICIENCY,
    STEP_OPERATIONS,
    TENSOR_OPERATIONS,
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
TOKENS, HEAD_WIDTHS, HEADS = (16, 64, 256, 1024), (32, 64, 128), 64
NARROW_SIDES, RANK = ((844, 256), (844, 2048), (3376, 1024)), 16
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
    both, forward = _value_seconds(device, dtype)
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    return Machine(
        name=distributed.accelerator_name() if on_gpu else f"this machine, {len(os.sched_getaffinity(0))} CPU cores",
        on_gpu=on_gpu,
        memory=float(total),
        peak=max(rate.flops for rate in rates),
        rates=tuple(rates),
        value_seconds=both,
        forward_seconds=forward,
        operation_seconds=_operation_seconds(device, dtype),
        link=MEMORY_LINK if not on_gpu else 32e9 * LINK_EFFICIENCY,
        base_bytes=CONTEXT_BYTES if on_gpu else _imported_bytes() + STARTED_BYTES,
        batched=tuple(_batched_rates(device, dtype)),
        fused=tuple(_fused_rates(device, dtype)),
        narrow_seconds=0.0 if on_gpu else _narrow_seconds(device, dtype),  # there a launch is most of it
        loader_seconds=0.0 if on_gpu else _loader_seconds(),
        prepacking_gain=statistics.median(gains),
        assumptions=(
            "rates of products, passes and operations as measured by --calibrate",
            f"DeepSpeed and the log take as long as {STEP_OPERATIONS} of these operations a step, and "
            f"{TENSOR_OPERATIONS} a tensor where gradients are reduced one by one",
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


def _batched_rates(device: torch.device, dtype: torch.dtype) -> Iterator[Rate]:
    """Of attention that is written out, scores and their sum over values: the heads of a few clips at once."""
    for tokens, width, shared in itertools.product(TOKENS, HEAD_WIDTHS, (1, 8)):  # shared: query heads of a key
        heads = _heads(tokens)
        q = torch.randn(heads, shared * tokens, width, device=device).to(dtype)
        k = torch.randn(heads, tokens, width, device=device).to(dtype)
        seconds = _seconds(partial(_scored_and_summed, q, k))
        yield Rate(shared * tokens, tokens * width, 4.0 * heads * shared * tokens * tokens * width / seconds)


def _fused_rates(device: torch.device, dtype: torch.dtype) -> Iterator[Rate]:
    """Of the tower's attention, forward."""
    for tokens, width in itertools.product(TOKENS, HEAD_WIDTHS):
        q = torch.randn(1, _heads(tokens), tokens, width, device=device).to(dtype)
        seconds = _seconds(partial(F.scaled_dot_product_attention, q, q, q))
        yield Rate(tokens, width, 4.0 * q.shape[1] * tokens * tokens * width / seconds)


def _scored_and_summed(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.mT @ k


def _heads(tokens: int) -> int:
    """As many as leave the scores at most a few megabytes."""
    return max(4, HEADS * 64 // tokens)


def _narrow_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Of a number that takes part in one of LoRA's products: its two factors' and the result's."""
    found = []
    for rows, width in NARROW_SIDES:
        x, down = torch.randn(rows, width, device=device).to(dtype), torch.randn(RANK, width, device=device).to(dtype)
        low = torch.randn(rows, 3 * RANK, device=device).to(dtype)[:, :RANK]  # of three layers on one input
        ways: tuple[Callable[[], torch.Tensor], ...] = (
            partial(F.linear, x, down),
            partial(torch.mm, low, down),
            partial(torch.mm, low.t(), x),
        )
        numbers = rows * width + width * RANK + rows * RANK
        found += [_seconds(way) / numbers for way in ways]
    return statistics.mean(found)


def _loader_seconds() -> float:
    """Of a byte of a frame: what a worker decodes and hands over."""
    frame = np.linspace(0, 255, math.prod(FRAMES[2:])).astype(np.uint8).reshape(FRAMES[2:])
    settings = DecodeSettings()
    stored = encode_frames(np.stack([frame] * FRAMES[1]), settings)

    def load() -> None:
        torch.from_numpy(decode_frames(stored, settings.codec, *FRAMES[2:4])).clone()

    return _seconds(load) / math.prod(FRAMES[1:])


def _multiply(x: torch.Tensor, products: Iterator[Callable[[torch.Tensor], torch.Tensor]]) -> None:
    next(products)(x)


def _value_seconds(device: torch.device, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """Of one value by the kind of layer: forward and backward, and forward alone."""
    copies = math.ceil(COLD_BYTES / (2 * VALUES[0] * VALUES[1]))
    values = [torch.randn(VALUES, device=device).to(dtype).requires_grad_() for _ in range(copies + 1)]
    ring = cycle(pairwise(values))
    weight = torch.ones(VALUES[1], device=device, dtype=dtype)
    scores = torch.randn(SCORES, device=device).to(dtype).requires_grad_()

    def norm(backward: bool) -> None:
        x, y = next(ring)
        result = layers._RmsNorm.apply(x, weight, 1e-6)
        if backward:
            torch.autograd.grad(result, x, y.detach())

    def swiglu(backward: bool) -> None:
        x, y = next(ring)
        result = layers._SwiGlu.apply(x, y)
        if backward:
            torch.autograd.grad(result, (x, y), y.detach())

    @torch.no_grad()
    def mask(backward: bool) -> None:
        x, y = next(ring)
        keep = adapters._keep_mask(x, 0.05)
        x * keep
        if backward:
            x * keep
            y.clone().addcmul_(x, keep)

    def score(backward: bool) -> None:
        weights = scores.softmax(dim=-1)
        if backward:
            torch.autograd.grad(weights, scores, scores.detach())[0] * 0.1

    @torch.no_grad()
    def move() -> None:
        x, y = next(ring)
        x + y

    frames = torch.randint(256, (math.prod(FRAMES),), dtype=torch.uint8, device=device)
    geometry = VisionGeometry()
    grids = (geometry.grid(*FRAMES[1:4]),) * FRAMES[0]

    def pixel() -> None:
        frames_to_patches(frames, grids, geometry, dtype)

    size = math.prod(VALUES)
    both, forward = {}, {}
    for name, function, count in (
        ("norm", norm, size),
        ("swiglu", swiglu, size),
        ("mask", mask, size),
        ("score", score, math.prod(SCORES)),
    ):
        both[name], forward[name] = (_seconds(partial(function, way)) / count for way in (True, False))
    both["move"] = _seconds(move) / size
    both["pixel"] = forward["pixel"] = _seconds(pixel) / len(frames)
    return both, forward | {"move": FORWARD_MOVES * both["move"]}


def _operation_seconds(device: torch.device, dtype: torch.dtype) -> float:
    step, operations = small_step(device, dtype)
    return _seconds(step) / operations


def _seconds(function: Callable[[], object]) -> float:
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
