"""Prepacked weights multiply to the same bits as plain ones, and only while they are the same weights."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.model.test_adapters import NAMES, make_layers
from vidcls.model import prepacking
from vidcls.model.adapters import multiplied_here, project
from vidcls.model.prepacking import Prepacked, can_prepack, prepack, prepacked

WIDTH, WIDER = 96, 160

pytestmark = pytest.mark.skipif(
    not can_prepack(torch.zeros(1, dtype=torch.bfloat16)),
    reason="this processor or build of torch has no bf16 products",
)


def linear(inner: int = WIDTH, outer: int = WIDER) -> nn.Linear:
    return nn.Linear(inner, outer, dtype=torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 7, 130, 422])
def test_products_are_equal_bit_for_bit(rows: int) -> None:
    torch.manual_seed(0)
    layer = linear()
    made = Prepacked(layer.weight, backward=True)
    x, grad = (torch.randn(rows, width).bfloat16() for width in (WIDTH, WIDER))
    assert torch.equal(made.multiply(x, layer.bias), layer(x))
    assert torch.equal(made.multiply(x[:, :], None), x @ layer.weight.t())
    back, added = made.multiply_back(grad, None), made.multiply_back(grad, x)
    assert back is not None
    assert added is not None
    assert torch.equal(back, grad @ layer.weight)
    assert torch.equal(added, torch.addmm(x, grad, layer.weight))


def test_a_strided_input_is_read_as_it_is() -> None:
    torch.manual_seed(0)
    layer = linear()
    made = Prepacked(layer.weight, backward=True)
    x, grad = torch.randn(WIDTH, 30).bfloat16().t(), torch.randn(WIDER, 30).bfloat16().t()
    assert torch.equal(made.multiply(x, None), x.contiguous() @ layer.weight.t())
    back = made.multiply_back(grad, None)
    assert back is not None
    assert torch.equal(back, grad.contiguous() @ layer.weight)


@pytest.mark.parametrize("targets", [NAMES, ("b",), ()])
def test_layers_with_adapters_give_the_same_bits(targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make_layers(targets, dtype=torch.bfloat16)

    def step() -> list[torch.Tensor]:
        torch.manual_seed(3)
        x = torch.randn(50, 12).bfloat16().requires_grad_()
        outputs = project(x, layers.all())
        torch.cat([y * y for y in outputs], dim=1).sum().backward()
        grads = [p.grad for p in layers.parameters() if p.requires_grad]
        layers.zero_grad()
        return [*outputs, x.grad, *grads]

    plain = step()
    found = list(multiplied_here(layers))
    assert len(found) == 3
    assert prepack([(each, True) for each in found], 1e9, ranks=1) == (sum(4 * e.weight.numel() for e in found), 0)
    calls: list[str] = []
    for name in ("multiply", "multiply_back"):
        own = getattr(Prepacked, name)
        monkeypatch.setattr(Prepacked, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    for one, other in zip(plain, step(), strict=True):
        assert torch.equal(one, other)
    assert calls == ["multiply"] * 3 + ["multiply_back"] * 3


def test_a_layer_without_a_backward_multiplies_back_as_before() -> None:
    layer = linear()
    prepack([(layer, False)], 1e9, ranks=1)
    x = torch.randn(5, WIDTH).bfloat16().requires_grad_()
    (y,) = project(x, [layer])
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(5, WIDER).bfloat16() @ layer.weight)


def test_a_weight_that_was_written_to_is_not_mistaken() -> None:
    layer = linear()
    prepack([(layer, True)], 1e9, ranks=1)
    assert prepacked(layer) is not None
    with torch.no_grad():
        layer.weight.add_(1)
    assert prepacked(layer) is None
    other = linear()
    prepack([(other, True)], 1e9, ranks=1)
    other.weight.data = other.weight.data.clone()
    assert prepacked(other) is None


@pytest.mark.parametrize(("ranks", "backward", "fit"), [(1, False, 4), (1, True, 2), (2, False, 2), (2, True, 0)])
def test_what_it_costs_a_host(ranks: int, backward: bool, fit: int) -> None:
    """The matrix itself is no longer read: one copy costs nothing more, two as much as it; ranks share the matrix."""
    layers = [linear() for _ in range(4)]
    size = layers[0].weight.nbytes
    taken, left = prepack([(layer, backward) for layer in layers], 2 * size, ranks=ranks)
    assert (taken, left) == (fit * size * (1 + backward), 4 - fit)
    assert [prepacked(layer) is not None for layer in layers] == [True] * fit + [False] * (4 - fit)


def test_nothing_is_prepacked_where_a_bit_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = Prepacked.multiply

    def other(*args: Any) -> torch.Tensor:
        return multiply(*args).nextafter(torch.tensor(9e9, dtype=torch.bfloat16))

    monkeypatch.setattr(prepacking.Prepacked, "multiply", other)
    layer = linear()
    assert prepack([(layer, True)], 1e9, ranks=1) == (0, 1)
    assert prepacked(layer) is None


def test_only_frozen_layers_that_are_multiplied_here() -> None:
    layers = make_layers(("a",))
    layers.b.weight.requires_grad_()
    assert [each.out_features for each in multiplied_here(layers)] == [20, 6]
    assert not can_prepack(layers.a.weight)  # float32
    dora = make_layers(("a", "c"), use_dora=True)
    assert [each.out_features for each in multiplied_here(dora)] == [4]


@pytest.mark.skipif(sys.platform != "linux", reason="advice to Linux")
def test_pages_of_a_matrix_that_is_read_no_more_are_the_first_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice alone: which pages a kernel then takes depends on its version and the size of its folios."""
    given: list[tuple[int, int, int]] = []
    monkeypatch.setattr(prepacking, "_advise", lambda *advice: given.append(advice))
    page, width = mmap.PAGESIZE, 512
    memory = torch.zeros(width**2 + page, dtype=torch.bfloat16)
    for offset in (0, 8):  # in values; neither start nor end of the matrix need be those of a page
        layer = linear(width, width)
        layer.weight = nn.Parameter(memory[offset : offset + width**2].view(width, width), requires_grad=False)
        assert prepack([(layer, True)], 1e9, ranks=1) == (2 * layer.weight.nbytes, 0)
        address, size, advice = given.pop()
        assert (address % page, size % page, advice) == (0, 0, 20)  # MADV_COLD of linux/mman.h
        start, end = layer.weight.data_ptr(), layer.weight.data_ptr() + layer.weight.nbytes
        assert start <= address < start + page
        assert end - page < address + size <= end
    assert prepack([(linear(16, 16), True)], 1e9, ranks=1)[1] == 0
    assert not given  # less than a page


@pytest.mark.skipif(sys.platform != "linux", reason="advice to Linux")
def test_a_matrix_is_the_same_after_the_advice(tmp_path: Path) -> None:
    """Mapped from a file, and in memory of its own, which other advice would have cleared."""
    file, width = tmp_path / "weights", 512
    stored = torch.randn(width, width).bfloat16()
    file.write_bytes(stored.view(torch.int16).numpy().tobytes())
    mapped = torch.from_file(str(file), shared=False, size=width**2, dtype=torch.bfloat16).view(width, width)
    for matrix in (mapped, stored.clone()):
        layer = linear(width, width)
        layer.weight = nn.Parameter(matrix, requires_grad=False)
        assert prepack([(layer, True)], 1e9, ranks=1) == (2 * stored.nbytes, 0)
        assert torch.equal(layer.weight, stored)
