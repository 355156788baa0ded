"""Frozen weights once more, in the layouts that oneDNN multiplies with on a CPU.

A product with a plain bf16 matrix rearranges it each time, which costs the more the fewer rows it is multiplied with.
Forward and backward take two layouts. torch's inductor prepacks weights for inference (freezing) by these operations.

Shape suffixes: N tokens, K inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

TRIED_ROWS = (1, 2, 64, 500)
ATTRIBUTE = "prepacked"  # of a linear layer
MADV_COLD = 20  # linux/mman.h, since Linux 5.4


class Prepacked:
    """The matrix of one linear layer."""

    def __init__(self, weight_OK: torch.Tensor, *, backward: bool) -> None:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        with torch.no_grad():
            self._forward = reorder(weight_OK, None)
            self._backward = reorder(weight_OK.t(), None) if backward else None
        self._of = _identity(weight_OK)

    def fits(self, weight_OK: torch.Tensor) -> bool:
        """Whether it still is what `weight_OK` holds."""
        return self._of == _identity(weight_OK)

    def multiply(self, x_NK: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_NK, self._forward, bias_O, "none", [], "")

    def multiply_back(self, grad_NO: torch.Tensor, onto_NK: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient of x, added to that of others; None where this layer has no backward."""
        if self._backward is None:
            return None
        if onto_NK is None:
            return torch.ops.mkldnn._linear_pointwise(grad_NO, self._backward, None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(grad_NO, onto_NK, self._backward, None, "add")


def prepacked(linear: nn.Linear) -> Prepacked | None:
    """What `prepack` made of it, if its weight is still the same."""
    found: Prepacked | None = vars(linear).get(ATTRIBUTE)
    return found if found is not None and found.fits(linear.weight) else None


def can_prepack(weight_OK: torch.Tensor) -> bool:
    return (
        weight_OK.device.type == "cpu"
        and weight_OK.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def prepack(layers: Iterable[tuple[nn.Linear, bool]], room: float, *, ranks: int) -> tuple[int, int]:
    """Prepack frozen layers, each with or without backward, in turn while there is room; (bytes taken, left plain).

    A layer that is prepacked no longer needs the pages of its own matrix, which the `ranks` of a host share. No product
    may change by a bit, or a run would depend on how much memory was free: layers of a shape for which one does stay
    plain.

    Args:
        room: bytes of the host, beside those of all matrices.
    """
    taken = left = 0
    equal: dict[tuple[torch.Size, bool], bool] = {}
    for linear, backward in layers:
        size = linear.weight.nbytes
        cost = (1 + backward) * size
        kind = linear.weight.shape, backward
        if ranks * cost - size > room or equal.get(kind) is False:
            left += 1
            continue
        made = Prepacked(linear.weight, backward=backward)
        if kind not in equal:
            equal[kind] = _is_equal(linear, made)
            if not equal[kind]:
                left += 1
                continue
        setattr(linear, ATTRIBUTE, made)
        _read_no_more(linear.weight)
        taken += cost
        room -= ranks * cost - size
    return taken, left


def _read_no_more(weight: torch.Tensor) -> None:
    """Have the system take this memory first when it is short of some, not what is still read.

    Left to itself it had pages of the 3B shape read again for 45 s after prepacking.
    """
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    first, last = -(-start // mmap.PAGESIZE), end // mmap.PAGESIZE  # whole pages
    if first < last and sys.platform == "linux":
        _advise(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, MADV_COLD)


def _advise(address: int, size: int, advice: int) -> None:
    """madvise, whose answer does not matter: a kernel that refuses or ignores it does no harm."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)


def _identity(weight: torch.Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


@torch.no_grad()
def _is_equal(linear: nn.Linear, made: Prepacked) -> bool:
    weight_OK, bias_O = linear.weight, linear.bias
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator).to(weight_OK.dtype)

    for rows in TRIED_ROWS:
        x_NK, grad_NO = random(rows, weight_OK.shape[1]), random(rows, weight_OK.shape[0])
        if not torch.equal(made.multiply(x_NK, bias_O), F.linear(x_NK, weight_OK, bias_O)):
            return False
        for onto_NK in (None, x_NK):
            plain = grad_NO @ weight_OK if onto_NK is None else torch.addmm(onto_NK, grad_NO, weight_OK)
            back = made.multiply_back(grad_NO, onto_NK)
            if back is not None and not torch.equal(back, plain):
                return False
    return True
