"""Whether any bit of the frozen weights has changed, without keeping a copy of them."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

CHUNK = 1 << 18  # words; the products of one chunk stay in a CPU's cache
BITS = (1 << 30) - 1


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """int64 on the host, one number for each `CHUNK` of the tensor's 4-byte words, from their bits alone.

    Each is the sum of the words, every one times an odd number of its own below 2^31, modulo 2^64. So one changed
    word always shows, and two values that changed places too: words differ by less than 2^32 and their factors by
    less than 2^31, which cannot give a multiple of 2^64.
    """
    flat = tensor.detach().reshape(-1)
    size = flat.element_size()
    words = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    if size < 4 and flat.nbytes % 4 == 0 and flat.storage_offset() * size % 4 == 0:
        words = flat.view(torch.int32)
    factors = _factors(flat.device)
    # One temporary for all chunks: of fresh ones glibc may keep as many as there are, between the small results.
    wide = torch.empty(min(CHUNK, words.numel()), dtype=torch.int64, device=flat.device)
    sums = torch.zeros(max(1, -(-words.numel() // CHUNK)), dtype=torch.int64, device=flat.device)
    for number, part in enumerate(words.split(CHUNK)):
        own, times = wide[: len(part)].copy_(part), factors[: len(part)]
        # On GPUs there is no dot product of whole numbers.
        sums[number] = torch.dot(own, times) if flat.device.type == "cpu" else own.mul_(times).sum()
    return sums.cpu()


@functools.lru_cache(maxsize=1)
def _factors(device: torch.device) -> torch.Tensor:
    """`CHUNK` different odd numbers below 2^31 in no simple order: each step is one-to-one on 30 bits."""
    numbers = torch.arange(1, CHUNK + 1, device=device) * 0x1E3779B1 & BITS
    numbers = (numbers ^ numbers >> 13) * 0x05EBCA6B & BITS
    return 2 * (numbers ^ numbers >> 16) + 1


class FrozenWeights:
    """The bits of everything that must not train, as far as this rank holds it, when this was made.

    elements: how many weights were looked at; seconds: how long it took; unread: parameters that are not in memory
    (offloaded to a disk). Needs no other rank, and reads each weight once.
    """

    def __init__(self, model: nn.Module, trained: Collection[str]) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if name not in trained}
        self._digests: dict[tuple[str, str], torch.Tensor] = {}
        self.elements, self.seconds = 0, 0.0
        self.take_new()
        self.unread = [name for name, parameter in self._parameters.items() if not dict(_held(parameter))]

    def take_new(self) -> None:
        """Look at what was not here before: ZeRO-3 gathers the small parameters that it keeps whole in the first
        step."""
        start = time.perf_counter()
        for name, parameter in self._parameters.items():
            for kind, tensor in _held(parameter):
                if (name, kind) not in self._digests:
                    self._digests[name, kind] = digest(tensor)
                    self.elements += tensor.numel()
        self.seconds += time.perf_counter() - start

    def changed(self) -> list[str]:
        """The parameters of which this rank now holds other bits."""
        return [name for name, parameter in self._parameters.items() if self._differs(name, parameter)]

    def _differs(self, name: str, parameter: Any) -> bool:
        for kind, tensor in _held(parameter):
            before = self._digests.get((name, kind))
            if before is not None and not torch.equal(before, digest(tensor)):
                return True
        return False


def _held(parameter: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank has of a parameter: its part, and, where it is or stays whole, all of it."""
    if hasattr(parameter, "ds_tensor") and parameter.ds_tensor.numel():
        yield "part", parameter.ds_tensor
    # A large parameter of ZeRO-3 that happens to be gathered just now is a copy of the parts.
    if parameter.numel() and getattr(parameter, "ds_persist", True):
        yield "whole", parameter.data
