"""Micro-batch, accumulation and global batch on any number of ranks."""

from __future__ import annotations

import pytest

from vidcls.batch_plan import batch_plan, total_steps
from vidcls.options import ConfigError, OptimOptions

BUDGET = {"train_batch_size": 24, "max_tokens_per_batch": 4096}


@pytest.mark.parametrize(
    ("batch", "world", "expected"),
    [
        ({"per_device_train_batch_size": 2}, 3, (2, 1, 6)),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 2, (2, 4, 16)),
        ({"per_device_train_batch_size": 2, "train_batch_size": 24}, 3, (2, 4, 24)),
        (
            {"gradient_accumulation_steps": 2, "train_batch_size": 24},
            3,
            (4, 2, 24),
        ),
        (BUDGET, 3, (8, 1, 24)),
    ],
)
def test_two_of_the_batch_triple_give_the_third(batch: dict, world: int, expected: tuple[int, int, int]) -> None:
    plan = batch_plan(OptimOptions(**batch), world)
    assert plan is not None
    assert (plan.micro, plan.accumulation, plan.global_) == expected


def test_a_batch_that_does_not_divide_lists_the_rank_counts_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"train_batch_size: 12 .*these rank counts fit: \[1, 2, 3, 6\]"):
        batch_plan(OptimOptions(per_device_train_batch_size=2, train_batch_size=12), 4)
    with pytest.raises(ConfigError, match=r"train_batch_size: 24 .*rank counts fit: \[1, 2, 3, 4, 6, 8, 12, 24\]"):
        batch_plan(OptimOptions(**BUDGET), 5)


def test_total_steps() -> None:
    assert total_steps(OptimOptions(num_train_epochs=2), samples=25, global_batch=4) == 13
    assert total_steps(OptimOptions(max_steps=7), samples=25, global_batch=4) == 7
