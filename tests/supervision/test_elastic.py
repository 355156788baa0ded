"""The global batch on fewer ranks: by hand, and as a property."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidcls.batch_plan import BatchPlan
from vidcls.options import OptimOptions
from vidcls.supervision.elastic import fit, trim
from vidcls.supervision.launches import Batch, batch_keys


@pytest.mark.parametrize(
    ("hosts", "global_batch", "micro", "kept", "plan"),
    [
        # 3 hosts of 8, batch 96 = 24 x 4: all there
        ({"a": 8, "b": 8, "c": 8}, 96, 4, {"a": 8, "b": 8, "c": 8}, (4, 1)),
        # one lost: 16 ranks, 6 clips each; 6 is over 4, 3 fits twice
        ({"a": 8, "b": 8}, 96, 4, {"a": 8, "b": 8}, (3, 2)),
        # 5 ranks do not divide 8: 4 do, the fullest host gives one up; 2 clips each
        ({"a": 2, "b": 3}, 8, 4, {"a": 2, "b": 2}, (2, 1)),
        # a prime batch on an even number of ranks: one rank alone, clip by clip
        ({"a": 1, "b": 1}, 7, 4, {"a": 1}, (1, 7)),
        # more ranks than clips
        ({"a": 4, "b": 4}, 4, 1, {"a": 2, "b": 2}, (1, 1)),
    ],
)
def test_by_hand(
    hosts: dict[str, int], global_batch: int, micro: int, kept: dict[str, int], plan: tuple[int, int]
) -> None:
    layout = fit(hosts, global_batch, micro)
    assert layout.hosts == kept
    assert layout.plan == BatchPlan(*plan, global_batch)


@given(
    slots=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    global_batch=st.integers(1, 300),
    micro=st.integers(1, 16),
)
def test_the_global_batch_stays_and_no_more_ranks_would_do(slots: list[int], global_batch: int, micro: int) -> None:
    hosts = {f"host{i}": n for i, n in enumerate(slots)}
    layout = fit(hosts, global_batch, micro)
    assert layout.plan.micro * layout.plan.accumulation * layout.ranks == global_batch
    assert layout.plan.micro <= micro
    assert all(layout.hosts[host] <= hosts[host] for host in layout.hosts)
    assert list(layout.hosts) == [host for host in hosts if host in layout.hosts]
    assert not [n for n in range(layout.ranks + 1, sum(slots) + 1) if global_batch % n == 0]


def test_slots_are_taken_from_the_fullest_and_among_equals_from_the_last() -> None:
    assert trim({"a": 2, "b": 2, "c": 1}, 4) == {"a": 2, "b": 1, "c": 1}
    assert trim({"a": 2, "b": 2, "c": 1}, 2) == {"a": 1, "b": 1}


OPTIM = {"learning_rate": 1e-3, "num_train_epochs": 1.0}


def test_the_recipe_is_left_alone_where_it_comes_to_the_same() -> None:
    optim = OptimOptions(per_device_train_batch_size=4, gradient_accumulation_steps=2, **OPTIM)
    batch = Batch.of(optim, ranks=3, resumed=None)
    assert batch == Batch(24, 4)
    assert batch_keys(optim, batch.layout({"a": 3})) == {}
    assert batch_keys(optim, batch.layout({"a": 2})) == {
        "train_batch_size": 24,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
    }


def test_a_budget_of_tokens_stays_on_any_hosts() -> None:
    optim = OptimOptions(train_batch_size=24, max_tokens_per_batch=4096, **OPTIM)
    batch = Batch.of(optim, ranks=3, resumed=None)
    assert batch is not None
    for hosts, ranks in (({"a": 3}, 3), ({"a": 1, "b": 1}, 2), ({"a": 5}, 4)):
        layout = batch.layout(hosts)
        assert layout.ranks == ranks
        assert batch_keys(optim, layout) == {}


def test_the_batch_of_the_checkpoint_counts_unless_the_recipe_names_one(tmp_path) -> None:
    (tmp_path / "training_state.json").write_text('{"step": 5, "stream": {"global_batch": 32}}')
    relative = OptimOptions(per_device_train_batch_size=4, **OPTIM)
    assert Batch.of(relative, ranks=2, resumed=tmp_path) == Batch(32, 4)
    named = OptimOptions(per_device_train_batch_size=4, train_batch_size=8, **OPTIM)
    assert Batch.of(named, ranks=2, resumed=tmp_path) == Batch(8, 4)
    assert Batch.of(relative, ranks=None, resumed=tmp_path) is None
