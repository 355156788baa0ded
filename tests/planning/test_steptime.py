"""What the planner takes a step's time to go to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.planning.models import built, planned, recipe
from vidcls import options
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


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize(("nodes", "ranks", "way"), [(1, 4, 1), (2, 2, 1), (2, 4, 2)])
def test_what_gradients_and_weights_send(
    cpu: Machine, monkeypatch: pytest.MonkeyPatch, nodes: int, ranks: int, way: int, once: bool, accumulation: int
) -> None:
    """To the owners alone or to all, and once a step or in every micro-batch."""
    if not once:
        monkeypatch.setattr(options, "LOCAL_SUM", 1)
    config = recipe()
    _, inputs = built(config)
    work, cluster = planned(config, inputs), Cluster(nodes, ranks, cpu.link)

    def sent(machine: Machine) -> float:
        seconds = step_time(work, machine, cluster, accumulation=accumulation).communication
        return seconds * cpu.link / (work.trained * (cluster.ranks - 1) / cluster.ranks)

    times = 1 if once else accumulation
    assert sent(cpu) == pytest.approx(times * 4 * way + 2)
    assert sent(published("h100")) == pytest.approx(times * 4 * (1 if once else 2) + 2)
