"""Shared memory for frames: seen by a child, never given away twice, free again when nothing refers to it."""

from __future__ import annotations

import gc
import os

import torch

from vidcls.data.slots import FrameSlots


def test_what_a_child_writes_is_there() -> None:
    slots = FrameSlots(2, 1000)
    first, second = slots.take(), slots.take()
    assert first is not None
    assert second is not None
    child = os.fork()
    if child == 0:
        slots.view(second, 1000)[:] = 7
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert slots.borrow(second, 1000).tolist() == [7] * 1000
    assert slots.borrow(first, 1000).tolist() == [0] * 1000


def test_a_slot_is_free_when_the_last_tensor_over_it_is_gone() -> None:
    slots = FrameSlots(1, 64)
    slot = slots.take()
    assert slot is not None
    assert slots.take() is None
    frames = torch.from_numpy(slots.borrow(slot, 64))
    part = frames[3:].view(torch.int8)
    del frames
    gc.collect()
    assert slots.take() is None
    del part
    assert slots.take() == slot
