"""Digests of weights: what must show, and what must not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vidcls.training.selfcheck.digest import CHUNK, FrozenWeights, digest

DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int8]


def values(count: int, dtype: torch.dtype) -> torch.Tensor:
    return (100 * torch.randn(count, generator=torch.Generator().manual_seed(1))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_one_flipped_bit_shows_wherever_it_is(dtype: torch.dtype, count: int) -> None:
    tensor = values(count, dtype)
    before = digest(tensor)
    assert torch.equal(before, digest(tensor.clone()))
    raw = tensor.view(torch.uint8)
    for place in {0, len(raw) // 2, len(raw) - 1}:
        for bit in (1, 128):
            raw[place] ^= bit
            assert not torch.equal(before, digest(tensor)), (place, bit)
            raw[place] ^= bit
    assert torch.equal(before, digest(tensor))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_two_values_that_change_places_show(dtype: torch.dtype) -> None:
    tensor = values(60, dtype)
    before = digest(tensor)
    for first in range(60):
        for second in range(first):
            if tensor[first] != tensor[second]:
                swapped = tensor.clone()
                swapped[[first, second]] = tensor[[second, first]]
                assert not torch.equal(before, digest(swapped)), (first, second)


def test_values_of_two_chunks_that_change_places_show() -> None:
    tensor = values(2 * CHUNK + 5, torch.float32)
    before = digest(tensor)
    for first, second in ((0, CHUNK), (3, 2 * CHUNK + 3), (CHUNK, 2 * CHUNK)):
        swapped = tensor.clone()
        swapped[[first, second]] = tensor[[second, first]]
        assert not torch.equal(before, digest(swapped)), (first, second)


def test_the_layout_in_memory_does_not_matter() -> None:
    tensor = values(700, torch.bfloat16)
    padded = torch.cat([tensor[:1], tensor])
    assert torch.equal(digest(tensor), digest(tensor.view(70, 10).T.contiguous().T))
    # An odd start in its storage cannot be read as whole words; it must neither fail nor be missed.
    odd = digest(padded[1:])
    padded[-1] = 0
    assert not torch.equal(odd, digest(padded[1:]))


def test_changed_names_what_differs_and_nothing_that_trains() -> None:
    model = nn.ModuleDict({"frozen": nn.Linear(3, 2), "trained": nn.Linear(3, 2)})
    watched = FrozenWeights(model, {"trained.weight", "trained.bias"})
    assert watched.elements == 8
    with torch.no_grad():
        model["trained"].weight.add_(1)
        assert watched.changed() == []
        model["frozen"].bias[1].neg_()
    assert watched.changed() == ["frozen.bias"]
