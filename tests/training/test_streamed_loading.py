"""Weights under ZeRO on two ranks: partitioned as they are read, or mapped once for both; trained the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import launch
from tools.make_random_checkpoint import write_checkpoint

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote down; one start for all cases."""
    top = tmp_path_factory.mktemp("streamed")
    folder = write_checkpoint(top / "model", "tiny", shard_bytes=400_000)
    done = launch.deepspeed(2, "tests/support/streaming.py", folder, top, log=top / "log")
    assert done.code == 0, done.output[-4000:]
    return [json.loads((top / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["folder-fp32", "folder-bf16", "tiny-fp32", "tiny-bf16", "uneven"])
def test_partitions_hold_the_stored_weights(results: list[dict[str, Any]], case: str) -> None:
    """Gathered, they are bit for bit those of a plain load; buffers, shapes and sizes of the parts too."""
    assert [result[case] for result in results] == [[], []]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_streamed_zero3_trains_as_zero2(results: list[dict[str, Any]], kind: str) -> None:
    """Measured: 1.3e-6."""
    for result in results:
        assert result[f"{kind}-zero3"] == pytest.approx(result[f"{kind}-zero2"], rel=1e-5)
        assert len({*result[f"{kind}-zero2"]}) == 3


def test_dora_is_not_lora(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["dora-zero3"][0] == pytest.approx(result["lora-zero3"][0], rel=1e-5)
        assert result["dora-zero3"][1] != pytest.approx(result["lora-zero3"][1], rel=1e-3)


def test_small_weights_that_stay_whole(results: list[dict[str, Any]]) -> None:
    """Below stage3_param_persistence_threshold DeepSpeed keeps weights gathered."""
    for result in results:
        assert result["lora-zero3-persistent"] == result["lora-zero3"]


def test_zero2_leaves_mapped_weights_alone(results: list[dict[str, Any]]) -> None:
    """DeepSpeed as it is has rank 1 write over the whole model, which costs it a copy."""
    assert [result["shared"]["own"] for result in results] == [0, 0]
    assert results[1]["sent"]["own"] >= results[1]["sent"]["frozen"] > 10**6
