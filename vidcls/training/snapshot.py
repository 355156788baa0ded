"""A copy of the training state on the host, taken at memory speed, and whole named tensors made from all ranks' copies.

ZeRO holds what trains as a few flat tensors a rank. Those are copied as they are; which piece of which parameter lies
where in them does not change, and is looked up once. The attributes used are DeepSpeed's own (0.19.8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch

from vidcls import distributed
from vidcls.training.averaging import WeightAverage
from vidcls.training.checkpoint import Gathered, adam_steps, trained_sizes
from vidcls.training.masters import flat_masters, is_stage3, trainable, whole_shape
from vidcls.training.sharded_state import AVERAGE, MOMENTS, WEIGHT, owners


@dataclass(frozen=True)
class Piece:
    """Where a rank holds a part of a parameter: `numel` numbers from `start` of flat tensor `flat`, which are those
    from `offset` of the flattened parameter."""

    flat: int
    start: int
    offset: int
    numel: int


def own_pieces(engine: deepspeed.DeepSpeedEngine) -> dict[str, Piece]:
    """This rank's piece of each trained parameter, by name; those of which it has none are left out."""
    found = {name: _own_piece(engine, parameter) for name, parameter in trainable(engine.module)}
    return {name: piece for name, piece in found.items() if piece is not None and piece.numel > 0}


def _own_piece(engine: deepspeed.DeepSpeedEngine, parameter: Any) -> Piece | None:
    if is_stage3(engine):
        zero = engine.optimizer
        flat, start, size = zero.grad_position[zero.get_param_id(parameter)]
        offset = size * distributed.rank()
        return Piece(flat, start, offset, min(size, parameter.ds_numel - offset))  # the last rank's part is padded
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat, part = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Piece(mapping.param_group_index, flat.start, part.start, part.numel)


class Snapshot:
    """Host buffers for this rank's part of the training state, kept for the whole run: the first touch of fresh memory
    takes longer than a copy.

    All ranks must make one together. only_used: of weights, averages and moments, those alone that a saved model has.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, average: WeightAverage | None, *, only_used: bool = False
    ) -> None:
        self.adam_steps = 0
        self.shapes = {name: whole_shape(parameter) for name, parameter in trainable(engine.module)}
        self.pieces: list[dict[str, Piece]] = distributed.gather_objects(own_pieces(engine))
        _check_covered(self.pieces, trained_sizes(engine.module))
        self.used = WEIGHT if average is None else AVERAGE
        self.kinds = (self.used,) if only_used else tuple(dict.fromkeys((WEIGHT, *MOMENTS, self.used)))
        self._engine, self._average = engine, average
        on_gpu = distributed.device().type != "cpu"
        self._buffers = {
            kind: [torch.empty_like(flat, device="cpu", pin_memory=on_gpu) for flat in flat_masters(engine)]
            for kind in self.kinds
        }

    def touch(self) -> None:
        """Have the kernel give the buffers their pages."""
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer.zero_()

    def take(self) -> None:
        """Copy the state as it is now. At least one step must have been taken."""
        with torch.no_grad():
            for kind, buffers in self._buffers.items():
                for buffer, live in zip(buffers, self._live(kind), strict=True):
                    buffer.copy_(live, non_blocking=True)
        if distributed.device().type != "cpu":
            torch.accelerator.synchronize()
        self.adam_steps = adam_steps(self._engine)

    def part(self, kind: str, name: str) -> torch.Tensor | None:
        """This rank's piece of a parameter, flat; None where it has none."""
        piece = self.pieces[distributed.rank()].get(name)
        return None if piece is None else self._buffers[kind][piece.flat].narrow(0, piece.start, piece.numel)

    def _live(self, kind: str) -> Sequence[torch.Tensor]:
        masters = flat_masters(self._engine)
        if kind == WEIGHT:
            return masters
        if kind == AVERAGE:
            assert self._average is not None
            return self._average.parts
        return [self._engine.optimizer.optimizer.state[flat][kind] for flat in masters]


def gather_snapshot(
    snapshot: Snapshot, group: torch.distributed.ProcessGroup | None, *, dtype: torch.dtype, shards: int
) -> Gathered:
    """What `checkpoint.gather_training_state` gathers, bit by bit, from the ranks' snapshots over `group` (gloo).

    All ranks must call it, and none may `take` anew before it has returned: of one rank, tensors are views.
    """
    sizes = {name: torch.Size(shape).numel() for name, shape in snapshot.shapes.items()}
    owner, kept = owners(sizes, shards), Gathered(adam_steps=snapshot.adam_steps)
    for name, shape in snapshot.shapes.items():
        pieces = [rank.get(name) for rank in snapshot.pieces]
        for kind in snapshot.kinds:
            part = snapshot.part(kind, name)
            whole = _collect(part, pieces, to=owner[name], group=group)
            if whole is not None:
                kept.shard[f"{kind}/{name}"] = whole.view(shape)
            if kind == snapshot.used:
                rounded = None if part is None else part.to(dtype)
                whole = _collect(rounded, pieces, to=0, group=group, dtype=dtype)
                if whole is not None:
                    kept.model[name] = whole.view(shape)
    return kept


def _collect(
    part: torch.Tensor | None,
    pieces: Sequence[Piece | None],
    *,
    to: int,
    group: torch.distributed.ProcessGroup | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor | None:
    """The whole of a flattened parameter on rank `to`, from every rank's part of it; None on the others."""
    if distributed.rank() != to:
        if part is not None:
            torch.distributed.send(part, to, group=group)
        return None
    if part is not None and sum(piece is not None for piece in pieces) == 1:
        return part
    whole = torch.empty(sum(piece.numel for piece in pieces if piece), dtype=dtype)
    for rank, piece in enumerate(pieces):
        if piece is None:
            continue
        place = whole.narrow(0, piece.offset, piece.numel)
        if rank != to:
            torch.distributed.recv(place, rank, group=group)
        elif part is not None:
            place.copy_(part)
    return whole


def _check_covered(pieces: Sequence[Mapping[str, Piece]], sizes: Mapping[str, int]) -> None:
    """Every number of every parameter is in one rank's piece."""
    for name, size in sizes.items():
        parts = sorted((rank[name].offset, rank[name].numel) for rank in pieces if name in rank)
        ends = [0, *(offset + numel for offset, numel in parts)]
        assert [offset for offset, _ in parts] == ends[:-1], f"{name}: {parts}"
        assert ends[-1] == size, f"{name}: {parts} of {size}"
