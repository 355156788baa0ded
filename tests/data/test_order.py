"""The stream of samples: the same for every rank count, each sample once an epoch, the same tail after a resume."""

from __future__ import annotations

import numpy as np
import pytest

from vidcls.data.order import SampleOrder, StepLayout, epoch_permutation, evaluation_chunks

PINNED = [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]


def stream(order: SampleOrder, first: int, last: int) -> list[int]:
    return [order.at(position)[1] for position in range(first, last)]


@pytest.mark.parametrize("samples", [1, 7, 108, 1000])
def test_every_sample_once_an_epoch_and_another_order_in_each(samples: int) -> None:
    order = SampleOrder(samples, seed=3)
    epochs = [stream(order, e * samples, (e + 1) * samples) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(samples))
    if samples > 6:
        assert epochs[0] != epochs[1] != epochs[2]
    assert [order.at(e * samples)[0] for e in range(3)] == [0, 1, 2]


def test_the_order_is_pinned_for_ever() -> None:
    # A release that changes these numbers cannot resume the runs of an older one.
    assert epoch_permutation(42, 0, 10).tolist() == PINNED
    assert epoch_permutation(43, 0, 10).tolist() != PINNED


def test_positions_are_uniform() -> None:
    # Sample 0's place over many epochs: chi-squared against uniform, 9 degrees of freedom, p = 0.001 at 27.9.
    places = [int(np.flatnonzero(epoch_permutation(7, epoch, 10) == 0)[0]) for epoch in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_reads_the_same_samples_in_the_same_order_at_any_rank_count(world: int, micro: int) -> None:
    global_batch = 48
    for step in (0, 5):
        read: list[int] = []
        for rank in range(world):
            layout = StepLayout(global_batch, micro, world, rank)
            for micro_step in range(layout.accumulation):
                read += layout.positions(step, micro_step)
        assert read == list(range(step * global_batch, (step + 1) * global_batch))


@pytest.mark.parametrize(("world", "rank", "match"), [(5, 0, "not a multiple"), (2, 2, "rank: 2, legal: 0 to 1")])
def test_a_layout_that_cannot_be_is_refused(world: int, rank: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        StepLayout(8, 2, world, rank)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="samples: 0"):
        SampleOrder(0, seed=1)


@pytest.mark.parametrize("samples", [1, 5, 26, 64])
@pytest.mark.parametrize("micro", [1, 4, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_deals_every_sample_once_in_batches_that_do_not_depend_on_ranks(
    samples: int, micro: int, world: int
) -> None:
    per_rank = [evaluation_chunks(samples, micro, world, rank) for rank in range(world)]
    assert len({len(chunks) for chunks in per_rank}) == 1
    dealt = [chunk for chunks in per_rank for chunk in chunks if chunk is not None]
    assert sorted(i for chunk in dealt for i in chunk) == list(range(samples))
    alone = evaluation_chunks(samples, micro, 1, 0)
    assert sorted(dealt, key=lambda chunk: chunk.start) == alone
