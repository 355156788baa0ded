"""Bytes that one rank needs at its worst moment, by what they are for.

DeepSpeed 0.19.8 with vidcls's optimizer: trained weights in bf16 on every rank (ZeRO-2) or cut into parts (ZeRO-3);
float32 masters, Adam's two moments and gradients of a rank's own part; what gradients are summed and sent in. On a GPU
buckets are taken whole; on a CPU a page costs when it is touched, and weights stay mapped from the checkpoint's files
(ZeRO-2), which the ranks of a host share.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from vidcls.config import Config
from vidcls.options import DEFAULT_MEMORY_LIMIT, PREPACKING_SHARE, offloads, sums_locally
from vidcls.planning import activations
from vidcls.planning.machines import FRAGMENTATION, Machine
from vidcls.planning.workload import Workload

FLOAT = 4
# On a CPU, bytes for each trained number of a checkpoint that is written and read back: a copy of masters, moments and
# weights, the same once more as the file's bytes, and the weights before and after.
CHECKPOINT_BYTES = 14 + 14 + 2 + 2
LOADED_BATCHES = 4  # in memory that the loader shares with a rank of a CPU
PREPACKING_BYTES = 0.07e9  # beside the copies: oneDNN's code for them, as seven small cases had it
DEFAULT_BUCKET = 500_000_000  # DeepSpeed's, where a file names none
DEFAULT_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; their sum is the peak. `gathered`: whole layers under ZeRO-3.

    prepacked: taken beside it while memory is free, and no part of the sum.
    """

    base: float
    frozen_weights: float
    trained_weights: float
    masters_and_moments: float
    gradients: float
    gathered: float
    activations: float
    working_set: float
    loader: float
    checkpoint: float
    allocator: float
    prepacked: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self)) - self.prepacked


def memory(work: Workload, config: Config, machine: Machine, *, ranks: int, sharing: int) -> Memory:
    """At the worst moment of a step; on a CPU a checkpoint that is copied to be written counts too.

    sharing: ranks that the machine's memory is shared by.
    """
    zero: dict[str, Any] = config.zero["zero_optimization"]
    size, trained, stage = work.value_bytes, work.trained, config.zero_stage
    full = trained_of_backbone(work)
    frozen = work.model.weights - full
    offloaded = offloads(zero, "offload_optimizer")
    gathered = 0.0
    bucket = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    buckets = 2 if stage == 2 and zero.get("overlap_comm", False) else 1
    if not machine.on_gpu:
        bucket = min(bucket, trained)
    if stage == 3:
        own = 0.0 if offloads(zero, "offload_param") else 1 / ranks
        frozen_bytes, trained_bytes = frozen * size * own, trained * size * own
        live = zero.get("stage3_max_live_parameters", DEFAULT_LIVE)
        live += zero.get("stage3_prefetch_bucket_size", 0)
        gathered = size * max(min(live, work.model.weights), work.largest_layer)
    else:
        frozen_bytes, trained_bytes = float(frozen * size), float(trained * size)
    states = 0.0 if offloaded else 3 * FLOAT * trained / ranks
    if config.optim.ema_decay is not None and not offloaded:
        states += FLOAT * trained / ranks
    if sums_locally(trained, stage, zero):
        gradients = _local_sum(trained, size, ranks, on_gpu=machine.on_gpu)
    else:
        gradients = (0.0 if offloaded else FLOAT * trained / ranks) + bucket * (buckets * size + FLOAT)
        if stage == 2 and ranks > 1 and not machine.on_gpu:
            gradients += bucket * FLOAT  # parts of it that come from others (training/reduction.py)
    kept, again = activations.kept(work), activations.again(work)
    working, tower = activations.working_set(work), activations.tower_working_set(work)
    loader = checkpoint = 0.0
    if machine.on_gpu:
        working = max(working, tower - kept, FLOAT * trained / ranks - kept)
    else:
        # What the C library has freed in small pieces it does not give back, and large ones come on top.
        working += tower
        loader = LOADED_BATCHES * work.clips.count * work.clips.pixel_bytes
        checkpoint = float(CHECKPOINT_BYTES * trained)
        if ranks == 1:
            gathered = 0.0  # the partition is the whole
        elif stage == 3:  # gloo's copy, the buffer it fills, and about as much that is freed and not given back
            gathered += 3 * size * max(work.largest_layer, work.model.embedding_weights)
    found = Memory(
        base=machine.base_bytes,
        frozen_weights=frozen_bytes,
        trained_weights=trained_bytes,
        masters_and_moments=states,
        gradients=gradients,
        gathered=gathered,
        activations=kept + again,
        working_set=working,
        loader=loader,
        checkpoint=checkpoint,
        allocator=0.0,
    )
    if not machine.on_gpu:
        return replace(found, prepacked=_prepacked(work, config, machine, found, sharing))
    extra = (FRAGMENTATION - 1) * (found.total - found.base)
    return Memory(**{field.name: getattr(found, field.name) for field in fields(found)} | {"allocator": extra})


def _local_sum(trained: int, size: int, ranks: int, *, on_gpu: bool) -> float:
    """Of training/reduction.py's LocalSum, while it takes in a micro-batch (gradients, the same in one piece, the sum)
    or while the sum is reduced."""
    taken_in = trained * (2 * size + FLOAT)
    if ranks == 1:
        return float(taken_in)
    received = FLOAT * trained if not on_gpu else 0
    return max(taken_in, FLOAT * trained * (1 + 1 / ranks) + received)


def prepackable(work: Workload, config: Config) -> tuple[int, int]:
    """Bytes of the matrices that `prepack_weights` takes on a CPU, and bytes that it makes of all of them."""
    model = config.model
    off = not model.prepack_weights or model.torch_compile or config.optim.memory_limit != DEFAULT_MEMORY_LIMIT
    if off or not work.bf16 or work.gathered:
        return 0, 0
    plain = made = 0
    for block in work.blocks:
        dora = work.dora and any(projection.ranks for projection in block.projections)
        for projection in block.projections:
            for layer in projection.layers:
                if not layer.trains and not dora:
                    size = work.value_bytes * block.count * layer.inner * layer.outer
                    plain += size
                    made += size * (2 if block.has_backward else 1)
    return plain, made


def _prepacked(work: Workload, config: Config, machine: Machine, step: Memory, sharing: int) -> float:
    """As training/prepacking.py does it, to which the mapped weights are free memory."""
    plain, made = prepackable(work, config)
    free = machine.memory - sharing * (step.total - step.frozen_weights)
    room, added = PREPACKING_SHARE * free - plain, sharing * made - plain
    if not made or room <= 0:
        return 0.0
    return PREPACKING_BYTES + made * min(1.0, room / added if added else 1.0)


def prepacked_share(work: Workload, config: Config, step: Memory) -> float:
    """Of the bytes that prepacking all would take."""
    _, made = prepackable(work, config)
    return max(0.0, step.prepacked - PREPACKING_BYTES) / made if made else 0.0


def trained_of_backbone(work: Workload) -> int:
    """Weights of the checkpoint itself that train (full tuning)."""
    model = work.model
    linear = [(block.count, p) for block in work.blocks for p in block.projections]
    linear += [(1, p) for p in work.around if p.name != "head"]
    matrices = sum(
        count * (layer.inner * layer.outer + (layer.outer if layer.bias else 0))
        for count, p in linear
        for layer in p.layers
        if layer.trains
    )
    return min(matrices, model.weights)
