"""Seconds of an optimizer step: products, passes over memory, the host, the optimizer, and what ranks send.

On a GPU the host runs ahead of the device, and the slower of the two decides; on a CPU they take turns. Nothing that is
sent is taken to be hidden behind what is computed: an upper bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vidcls.options import EXCHANGING_RANKS
from vidcls.planning.flops import micro_batch
from vidcls.planning.machines import (
    GATHER_GPU_SECONDS,
    GATHER_OPERATIONS,
    GATHER_TOGETHER_OPERATIONS,
    STEP_OPERATIONS,
    SUMMED_TENSOR_OPERATIONS,
    TENSOR_OPERATIONS,
    Machine,
)
from vidcls.planning.workload import Block, Workload

# Operations that the host starts for a layer, forward and backward of it, and around all layers; products not counted.
FORWARD_OPERATIONS, BACKWARD_OPERATIONS, AROUND_OPERATIONS = 60, 55, 80
# Plain passes over a row of a layer, forward and backward: residuals, rotary, rows cut into pieces and back. The tower
# turns its queries and keys in float32. UNFOLDING: of a shared prefix, over what every piece has.
MOVES = {"language": 12, "vision": 60}
UNFOLDING = 10
# On a CPU products and passes take longer in a step than when each is repeated by itself; plans without this came out 4
# to 14 % short for the real 3B shape on one machine, 7 to 18 % for a small one on another (benchmarks/README.md,
# plan.py).
IN_A_STEP = 1.1
OPTIMIZER_BYTES = 40  # of a trained number: gradient, master and moments read and written, norm and clipping
SUMMING_BYTES = 14  # of a trained number in a micro-batch: joined in bf16, then added to a float32 sum
SENT_GRADIENT, SENT_WEIGHT = 4, 2  # communication_data_type fp32; bf16


@dataclass(frozen=True)
class Cluster:
    """ranks of a node; network: bytes a second into and out of a node."""

    nodes: int
    per_node: int
    network: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def exchanges(self) -> bool:
        """Whether training/reduction.py has gloo carry gradients to their owners alone."""
        return self.nodes == 1 or self.per_node <= EXCHANGING_RANKS

    def slowest(self, link: float) -> float:
        """Bytes a second of a ring through all ranks."""
        if self.ranks == 1:
            return float("inf")
        return min(link, self.network) if self.nodes > 1 else link


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to; loader: what its workers take from a CPU's cores, at most."""

    products: float
    passes: float
    host: float
    optimizer: float
    communication: float
    loader: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def bottleneck(self) -> str:
        parts = asdict(self)
        return max(parts, key=lambda name: parts[name])


def step_time(
    work: Workload, machine: Machine, cluster: Cluster, *, accumulation: int, packed: float = 0.0
) -> StepTime:
    """Of an optimizer step with `accumulation` micro-batches such as `work`; `packed`: which part of the matrices that
    can be prepacked is."""
    shared = 1 if machine.on_gpu else cluster.per_node  # ranks of a CPU share its cores and its memory
    slower = shared if machine.on_gpu else shared * IN_A_STEP
    all_products = micro_batch(work)
    gain = machine.prepacking_gain
    products = slower * sum(
        product.count
        * (packed + (1 - packed) * gain if product.frozen else gain)
        * machine.product_seconds(product, value_bytes=work.value_bytes)
        for product in all_products
    )
    passes = slower * (sum(_passes(block, work, machine) for block in work.blocks) + _pixels(work, machine))
    host = operations(work) * machine.operation_seconds
    if work.gathered:
        host += gathers(work) * _gather_seconds(machine, cluster)
    if machine.on_gpu:
        host = max(0.0, host - products - passes)
    each = SUMMED_TENSOR_OPERATIONS if work.summed else TENSOR_OPERATIONS
    step = (STEP_OPERATIONS + accumulation * work.trained_tensors * each) * machine.operation_seconds
    passed = work.trained / cluster.ranks * OPTIMIZER_BYTES
    if work.summed:
        passed += accumulation * work.trained * SUMMING_BYTES
    optimizer = step + shared * passed / machine.bandwidth
    read = work.clips.count * work.clips.pixel_bytes if _has_vision(work) else 0
    return StepTime(
        products=accumulation * products,
        passes=accumulation * passes,
        host=accumulation * host,
        optimizer=optimizer,
        communication=_sent(work, machine, cluster, accumulation) / cluster.slowest(machine.link),
        loader=accumulation * read * machine.loader_seconds,  # as many workers more as there are ranks
    )


def operations(work: Workload) -> float:
    """How many the host starts for a micro-batch."""
    found = AROUND_OPERATIONS + sum(product.count for product in micro_batch(work))
    for block in work.blocks:
        found += (block.count + block.checkpointed) * FORWARD_OPERATIONS
        found += block.count * BACKWARD_OPERATIONS if block.has_backward else 0
    return found


def gathers(work: Workload) -> int:
    """How often modules are gathered for a micro-batch under ZeRO-3."""
    found = len(work.around)
    for block in work.blocks:
        modules = 2 + sum(3 if layer.rank else 1 for p in block.projections for layer in p.layers)
        found += modules * (block.count * (2 if block.has_backward else 1) + block.checkpointed)
    return found


def _gather_seconds(machine: Machine, cluster: Cluster) -> float:
    if machine.on_gpu:
        return GATHER_GPU_SECONDS
    each = GATHER_OPERATIONS if cluster.ranks == 1 else GATHER_TOGETHER_OPERATIONS
    return each * machine.operation_seconds


def _sent(work: Workload, machine: Machine, cluster: Cluster, accumulation: int) -> float:
    """Bytes that pass each place of a ring. Gradients are reduced to their owners, or to all, which is twice as much;
    in every micro-batch, or once a step where few enough are trained (ZeRO-2, training/reduction.py). Then the new
    weights go to all (ZeRO-2), or all weights do in each forward and backward (ZeRO-3)."""
    share = (cluster.ranks - 1) / cluster.ranks
    gradients = work.trained * SENT_GRADIENT
    if work.gathered:
        return share * accumulation * (gradients + 2 * work.model.weights * SENT_WEIGHT)
    once = work.summed
    to_owners = once if machine.on_gpu else cluster.exchanges
    return share * (gradients * (1 if once else accumulation) * (1 if to_owners else 2) + work.trained * SENT_WEIGHT)


def _pixels(work: Workload, machine: Machine) -> float:
    """Seconds in which frames become patches; none where the tower's output is stored."""
    return work.clips.count * work.clips.pixel_bytes * machine.value_seconds["pixel"] if _has_vision(work) else 0.0


def _has_vision(work: Workload) -> bool:
    return any(block.name == "vision" for block in work.blocks)


def _passes(block: Block, work: Workload, machine: Machine) -> float:
    """Seconds of the element-wise work of `block.count` layers."""
    layers = block.layers
    values: dict[str, float] = {
        "norm": (block.rows + block.read) * layers.width,
        "swiglu": block.read * layers.inner,
        "move": MOVES[block.name] * block.rows * layers.width,
    }
    if block.attention.tokens > block.rows:
        values["move"] += UNFOLDING * block.attention.tokens * layers.width
    if not work.fused_attention:
        values["score"] = block.attention.scores
    if work.dropout:
        values["mask"] = sum(p.rows * p.inner for p in block.projections if p.ranks)
    both, forward = machine.value_seconds, machine.forward_seconds
    whole = both if block.has_backward else forward
    again = block.checkpointed if block.has_backward else 0
    return sum(count * (block.count * whole[kind] + again * forward[kind]) for kind, count in values.items())
