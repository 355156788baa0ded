"""The matrix products of a micro-batch, each with its sizes: what a step computes, and what a clock has to time.

2 floating-point operations per multiply-add. No weight gradient of a frozen weight, no backward of a frozen tower, the
last layer for the rows that are read; what gradient checkpointing computes again stands apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from vidcls.planning.workload import Attention, Block, Projection, Workload

Phase = Literal["forward", "backward", "recomputed"]


@dataclass(frozen=True)
class Product:
    """`count` times [rows, inner] x [inner, outer]. batch: so many at once, each with factors of its own. frozen: of a
    layer's own matrix, which does not change. fused: of attention in one operation, its tokens and its heads' width."""

    phase: Phase
    part: str
    rows: int
    inner: int
    outer: int
    count: float = 1
    batch: int = 1
    frozen: bool = False
    fused: tuple[int, int] | None = None

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.rows * self.inner * self.outer * self.count

    def bytes(self, value: int) -> float:
        """Moved at least, once for each factor and the result, of `value` bytes a number."""
        numbers = self.rows * self.inner + self.inner * self.outer + self.rows * self.outer
        return float(value * self.batch * numbers * self.count)


def total(products: Iterable[Product], *phases: Phase) -> float:
    """FLOPs of these phases; of all when none is named."""
    return sum(product.flops for product in products if not phases or product.phase in phases)


def micro_batch(work: Workload) -> list[Product]:
    """Every product of one forward and backward."""
    found: list[Product] = []
    for block in work.blocks:
        forward, backward = list(_forward(block, work)), list(_backward(block, work))
        found += [replace(product, count=product.count * block.count) for product in forward + backward]
        found += [
            replace(product, phase="recomputed", count=product.count * block.checkpointed)
            for product in forward
            if block.checkpointed
        ]
    for projection in work.around:
        found += _projected(projection, projection.name)
        found += _projected_back(projection, projection.name)
    return found


def _forward(block: Block, work: Workload) -> Iterator[Product]:
    for projection in block.projections:
        yield from _projected(projection, block.name)
    yield from _attended(block.attention, block.name, "forward", times=1, fused=work.fused_attention)


def _backward(block: Block, work: Workload) -> Iterator[Product]:
    if not block.has_backward:
        return
    for projection in block.projections:
        yield from _projected_back(projection, block.name)
    yield from _attended(block.attention, block.name, "backward", times=2, fused=work.fused_attention)


def _projected(projection: Projection, part: str) -> Iterator[Product]:
    rows = projection.rows
    for layer in projection.layers:
        yield Product("forward", part, rows, layer.inner, layer.outer, frozen=not layer.trains)
        if layer.rank:
            yield Product("forward", part, rows, layer.rank, layer.outer)
    if projection.ranks:
        yield Product("forward", part, rows, projection.inner, projection.ranks)


def _projected_back(projection: Projection, part: str) -> Iterator[Product]:
    if not projection.has_backward:
        return
    rows = projection.rows
    for layer in projection.layers:
        if projection.needs_grad:
            yield Product("backward", part, rows, layer.outer, layer.inner, frozen=not layer.trains)
        if layer.trains:
            yield Product("backward", part, layer.outer, rows, layer.inner)
        if layer.rank:
            yield Product("backward", part, rows, layer.outer, layer.rank)
            yield Product("backward", part, layer.rank, rows, layer.outer)
    if projection.ranks:
        yield Product("backward", part, projection.ranks, rows, projection.inner)
        if projection.needs_grad:
            yield Product("backward", part, rows, projection.ranks, projection.inner)


def _attended(attention: Attention, part: str, phase: Phase, *, times: int, fused: bool) -> Iterator[Product]:
    """Scores and their sum over values; `times` 2 for the gradients. Fused causal attention skips half of it, and
    computes the scores once more in backward (FlashAttention-2, arXiv 2307.08691)."""
    fused = fused or not attention.trains
    share = 0.5 if fused and attention.causal else 1.0
    extra = 0.5 * times if fused and phase == "backward" else 0.0
    per_key_head = attention.heads // attention.kv_heads
    for length, count in attention.pieces:
        rows = (attention.rows or length) * per_key_head
        batch = count * attention.kv_heads
        number = times * share
        kernel = (length, attention.head_width) if fused else None
        scores = Product(phase, part, rows, attention.head_width, length, number + extra * share, batch, fused=kernel)
        yield scores
        yield replace(scores, inner=length, outer=attention.head_width, count=number)
