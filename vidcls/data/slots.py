"""Shared memory through which worker processes hand over frames.

A batch in fresh shared memory costs a page fault for every 4 KiB on both sides, which can take as long as decoding it;
here the same pages are used over and over. They have no name anywhere: when the last process ends, they are gone.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np


class FrameSlots:
    """`count` pieces of `size` bytes. Made before the workers are forked, so that they have it too."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, count * size)
        self._free = deque(range(count))

    def take(self) -> int | None:
        """A slot that nobody uses, or None. Only the parent calls it, and `borrow`."""
        return self._free.popleft() if self._free else None

    def view(self, slot: int, length: int) -> np.ndarray:
        """The first `length` bytes of a slot: uint8 [length]."""
        assert length <= self.size, (length, self.size)
        return np.frombuffer(self._memory, dtype=np.uint8, count=length, offset=slot * self.size)

    def borrow(self, slot: int, length: int) -> np.ndarray:
        """`view` of a slot that was taken; it is free again as soon as nothing refers to these bytes any more."""
        array = self.view(slot, length)
        weakref.finalize(array, self._free.append, slot).atexit = False
        return array
