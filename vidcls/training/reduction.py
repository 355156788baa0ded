"""ZeRO-2's gradients travel to the ranks that own them alone, and where few are trained once a step."""

from __future__ import annotations

import functools
import math
import socket
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch._utils import _flatten_dense_tensors

from vidcls import distributed
from vidcls.options import EXCHANGING_RANKS, LOCAL_SUM

Way: TypeAlias = Literal["exchange", "reduce_scatter", "all_reduce"]
NORM_NUMBERS = 2**20  # that are made float64 at a time: a float32 sum of squares over many loses digits


def reduce_to_owners(engine: deepspeed.DeepSpeedEngine) -> None:
    """Replace how DeepSpeed reduces gradients under ZeRO-2. All ranks must call it.

    Where few enough numbers train, `LocalSum` does it. Otherwise gradients leave in buckets during the backward pass,
    as DeepSpeed has it; but gloo carries each bucket's parts to their owners instead of the sum of all to everybody.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or not optimizer.partition_gradients:
        return
    trained = sum(parameter.numel() for group in optimizer.bit16_groups for parameter in group)
    if trained <= LOCAL_SUM and not optimizer.cpu_offload:  # options.sums_locally
        LocalSum(optimizer, _way(optimizer.dp_process_group)).take_over()
    elif optimizer.use_multi_rank_bucket_allreduce and _way(optimizer.dp_process_group) == "exchange":
        changed: Any = optimizer
        changed.allreduce_and_copy_with_multiple_ranks = functools.partial(_exchange_bucket, optimizer)


def _way(group: Any) -> Way | None:
    """How gradients come to their owners; None for a single rank. All ranks must call it.

    With the exchange each rank sends every owner its part, and owners sum in the order of ranks: (R - 1) / R of all
    gradients leaves each of R ranks, the least there is. But between hosts of many ranks the same bytes would cross the
    network for each rank of a host, where an all-reduce has summed them before.
    """
    if torch.distributed.get_world_size(group) == 1:
        return None
    if torch.distributed.get_backend(group) != "gloo":
        return "reduce_scatter"
    ranks_of_host = Counter(distributed.gather_objects(socket.gethostname()))
    return "exchange" if len(ranks_of_host) == 1 or max(ranks_of_host.values()) <= EXCHANGING_RANKS else "all_reduce"


@dataclass(frozen=True)
class _Piece:
    """A stretch of a parameter's gradient; or, where begin is None, as many zeros, as padding."""

    parameter: torch.Tensor
    length: int
    begin: int | None

    def gradient(self) -> torch.Tensor:
        gradient = self.parameter.grad
        if gradient is None or self.begin is None:
            return self.parameter.new_zeros(self.length)
        whole = self.length == gradient.numel()
        return gradient if whole else gradient.reshape(-1)[self.begin : self.begin + self.length]


class LocalSum:
    """Gradients of a step, summed over its micro-batches on each rank, and reduced once at the end.

    DeepSpeed reduces in every micro-batch, so that no rank keeps more than its own part of the sum; of adapters and
    heads the whole is small beside activations. It also treats every gradient on its own, with a hook, a slice and a
    norm: 5 % of a step of a small model. Here one call does it for all; what DeepSpeed sends during the backward pass
    is sent after it.

    The sum lies in the order of owners: for each rank its partitions of all parameter groups, padded as DeepSpeed pads
    them. The attributes used are those of DeepSpeed 0.19.8.

    Shape suffixes: S sum over all ranks' parts, P part of one rank.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, way: Way | None) -> None:
        self._optimizer: Any = optimizer
        self._way = way
        self._ranks = torch.distributed.get_world_size(optimizer.dp_process_group)
        self._rank = torch.distributed.get_rank(optimizer.dp_process_group)
        self._sizes = [int(size) for size in optimizer.partition_size]  # of a rank's partition of each group
        self._pieces = self._in_order()
        self._sum_S: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None

    def _in_order(self) -> list[_Piece]:
        """What the sum consists of, padding too."""
        zero, of_rank, before = self._optimizer, sum(self._sizes), 0
        placed: list[tuple[int, _Piece]] = []  # each with its place in the sum
        for group, (parameters, size) in enumerate(zip(zero.bit16_groups, self._sizes, strict=True)):
            for parameter in parameters:
                key = zero.get_param_id(parameter)
                for owner in zero.param_to_partition_ids[group].get(key, ()):  # an empty one may be nobody's
                    begin = int(zero.grad_start_offset[group][owner][key])
                    offset = int(zero.grad_partition_insertion_offset[group][owner][key])
                    length = min(parameter.numel() - begin, size - offset)
                    placed.append((owner * of_rank + before + offset, _Piece(parameter, length, begin)))
            before += size
        found: list[_Piece] = []
        at = 0
        for start, piece in sorted(placed, key=lambda each: each[0]):
            if start > at:
                found.append(_Piece(piece.parameter, start - at, None))
            found.append(piece)
            at = start + piece.length
        if at < self._ranks * of_rank:
            found.append(_Piece(found[-1].parameter, self._ranks * of_rank - at, None))
        return found

    def take_over(self) -> None:
        """From now on the engine's backward and step work with this sum."""
        zero = self._optimizer
        for hook in zero._grad_acc_hooks:  # torch leaves gradients in `grad`; nothing is to be done until all are there
            hook.remove()
        zero._grad_acc_hooks.clear()
        zero.overlapping_partition_gradients_reduce_epilogue = self._after_backward
        zero.has_overflow = self._is_infinite
        zero.scaled_global_norm = self._whole_norm

    @torch.no_grad()
    def _after_backward(self) -> None:
        """Take in a micro-batch, and after the last one of a step hand the owners their part."""
        zero = self._optimizer
        added_S = _flatten_dense_tensors([piece.gradient() for piece in self._pieces])
        if self._sum_S is None:
            self._sum_S = added_S.float()  # whatever DeepSpeed's file says
        else:
            self._sum_S.add_(added_S)
        del added_S
        zero.zero_grad(set_to_none=True)
        if not zero.is_gradient_accumulation_boundary():
            return
        sum_S, self._sum_S = self._sum_S, None
        part_P = self._reduce(sum_S)
        self._norm = self._norm_over_ranks(part_P)
        for group, own in enumerate(part_P.split(self._sizes)):
            zero.averaged_gradients[group] = GradPartitionBufferGroup([own], own)

    def _reduce(self, sum_S: torch.Tensor) -> torch.Tensor:
        """This rank's part of the mean over ranks, float32."""
        if self._way is None:
            return sum_S
        dtype, group = self._optimizer.communication_data_type, self._optimizer.dp_process_group
        sent_S = sum_S.div_(self._ranks).to(dtype)
        if self._way == "exchange":
            received_S = torch.empty_like(sent_S)
            torch.distributed.all_to_all_single(received_S, sent_S, group=group)
            part_P = received_S.view(self._ranks, -1).sum(0)
        elif self._way == "reduce_scatter":
            part_P = sent_S.new_empty(sum(self._sizes))
            torch.distributed.reduce_scatter_tensor(part_P, sent_S, group=group)
        else:
            torch.distributed.all_reduce(sent_S, group=group)
            part_P = sent_S.view(self._ranks, -1)[self._rank].clone()
        return part_P.float()

    def _norm_over_ranks(self, part_P: torch.Tensor) -> torch.Tensor:
        """Of the whole gradient, a float32 scalar; not finite where a gradient is not."""
        dtype = get_norm_dtype()
        norms = [torch.linalg.vector_norm(piece, dtype=dtype) for piece in part_P.split(NORM_NUMBERS)]
        square = torch.stack(norms).square().sum()
        if self._ranks > 1:
            torch.distributed.all_reduce(square, group=self._optimizer.dp_process_group)
        return square.sqrt().float()

    def _is_infinite(self, partition_gradients: bool = True) -> bool:
        assert self._norm is not None
        return not math.isfinite(self._norm.item())

    def _whole_norm(self, norm_type: int = 2) -> torch.Tensor:
        assert norm_type == 2
        assert self._norm is not None
        return self._norm


def _exchange_bucket(
    optimizer: DeepSpeedZeroOptimizer,
    pieces: list[torch.Tensor],
    dtype: torch.dtype,
    *,
    bucket_ranks: list[frozenset[int]],
    output_bucket: list[torch.Tensor | None],
    process_group: Any,
    divide: bool,
    log: None = None,
) -> None:
    """DeepSpeedZeroOptimizer.allreduce_and_copy_with_multiple_ranks: each piece's owner gets its sum, in place.

    It is called with gradients that are divided by the number of ranks already.
    """
    assert not divide
    ranks, own = torch.distributed.get_world_size(process_group), torch.distributed.get_rank(process_group)
    of_rank: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    mine = []
    for piece, owners, output in zip(pieces, bucket_ranks, output_bucket, strict=True):
        (owner,) = owners  # several only for matrices of DeepSpeed's Muon
        of_rank[owner].append(piece)
        if owner == own:
            mine.append((piece, output))
    sizes = [sum(piece.numel() for piece in owned) for owned in of_rank]
    sent = torch.cat([piece for owned in of_rank for piece in owned]).to(dtype)
    received = sent.new_empty(ranks * sizes[own])
    torch.distributed.all_to_all_single(received, sent, [sizes[own]] * ranks, sizes, group=process_group)
    summed = received.view(ranks, -1).sum(0)
    for (piece, output), total in zip(mine, summed.split([piece.numel() for piece, _ in mine]), strict=True):
        optimizer._add_to_grad_partition_buffer(output, total)
        piece.copy_(total)
