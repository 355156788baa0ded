"""Operations that a plan counts against those that torch dispatches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vidcls.planning.overhead import small_step


class Operations(TorchDispatchMode):
    """How many run inside the block that compute anything."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_operations_are_about_as_many_as_torch_dispatches() -> None:
    step, planned = small_step(torch.device("cpu"), torch.float32)
    with Operations() as run:
        step()
    assert planned == pytest.approx(run.count, rel=0.1)
