"""ZeRO-2's gradients travel once, to the ranks that own them."""

from __future__ import annotations

import functools
import socket
from collections import Counter
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from vidcls import distributed
from vidcls.options import EXCHANGING_RANKS


def reduce_to_owners(engine: deepspeed.DeepSpeedEngine) -> None:
    """Have gloo carry each gradient to its owner instead of the sum of all to everybody. All ranks must call it.

    DeepSpeed all-reduces a bucket, of which each rank then keeps its part; with use_multi_rank_bucket_allreduce: false
    it reduces one part after the other, which gloo does with as many bytes. Here each rank sends every owner its part,
    and owners sum in the order of ranks: (R - 1) / R of a bucket leaves each of R ranks, the least there is. NCCL has
    rings for that and is left alone; and between hosts of many ranks the same bytes would cross the network for
    each rank of a host, where an all-reduce has summed them before.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or not optimizer.use_multi_rank_bucket_allreduce:
        return
    group = optimizer.dp_process_group
    if torch.distributed.get_world_size(group) == 1 or torch.distributed.get_backend(group) != "gloo":
        return
    ranks_of_host = Counter(distributed.gather_objects(socket.gethostname()))
    if len(ranks_of_host) == 1 or max(ranks_of_host.values()) <= EXCHANGING_RANKS:
        changed: Any = optimizer
        changed.allreduce_and_copy_with_multiple_ranks = functools.partial(_exchange, optimizer)


def _exchange(
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
