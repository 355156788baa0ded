"""What the planner takes a step's time to go to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.planning.models import built, planned, recipe
from vidcls.planning.machines import Machine, published
from vidcls.planning.steptime import Cluster, gathers, step_time


@pytest.fixture
def cpu() -> Machine:
    return replace(published("h100"), on_gpu=False)


def test_zero3_gathers_each_module_with_weights_on_each_way() -> None:
    config = recipe()
    classifier, inputs = built(config)
    names = [name for name, module in classifier.named_modules() if [*module.parameters(recurse=False)]]
    both_ways = sum(2 if ".layers." in name else 1 for name in names)  # the tower is frozen
    # Left out: the embedding, <ACTION>, and the norms outside layers.
    assert gathers(planned(config, inputs, stage=3)) == pytest.approx(both_ways, abs=4)


def test_stored_features_need_no_pixels(cpu: Machine) -> None:
    config = recipe()
    _, inputs = built(config)
    work = planned(config, inputs)
    slow = replace(cpu, value_seconds=cpu.value_seconds | {"pixel": 1.0})
    one = Cluster(1, 1, 1e9)

    def passes(cached: bool) -> float:
        blocks = tuple(block for block in work.blocks if not cached or block.name != "vision")
        return step_time(replace(work, blocks=blocks), slow, one, accumulation=1).passes

    assert passes(cached=False) >= len(inputs[0])
    assert passes(cached=True) < 1


@pytest.mark.parametrize(("nodes", "ranks", "sent"), [(1, 4, 4 + 2), (2, 2, 4 + 2), (2, 4, 8 + 2)])
def test_gradients_travel_once_where_ranks_exchange_them(cpu: Machine, nodes: int, ranks: int, sent: int) -> None:
    config = recipe()
    _, inputs = built(config)
    work, cluster = planned(config, inputs), Cluster(nodes, ranks, cpu.link)
    seconds = step_time(work, cpu, cluster, accumulation=1).communication
    share = (cluster.ranks - 1) / cluster.ranks
    assert seconds * cpu.link == pytest.approx(share * work.trained * sent)
    on_gpu = step_time(work, published("h100"), cluster, accumulation=1).communication
    assert on_gpu * cpu.link == pytest.approx(share * work.trained * 10)
