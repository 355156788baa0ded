"""The moving average against one kept by hand from the logged masters; nothing is left behind of looking at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import launch
from tests.support.averages import CASES, DECAY, LOOK, STEPS, inputs, small_model
from vidcls.training.averaging import WeightAverage, decay_at

RANKS = 2


def test_the_decay_warms_up() -> None:
    assert [decay_at(0.999, step) for step in (0, 1, 90)] == [0.1, 2 / 11, 0.91]
    assert decay_at(0.999, 10**6) == 0.999
    assert decay_at(0.05, 0) == 0.05


class FakeZero:
    """Stands for DeepSpeed's ZeRO-2 optimizer."""

    def __init__(self, *masters: torch.Tensor) -> None:
        self.single_partition_of_fp32_groups = list(masters)


class FakeEngine:
    def __init__(self, *masters: torch.Tensor) -> None:
        self.module = torch.nn.Linear(2, 1)
        self.optimizer: Any = FakeZero(*masters)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"ema_decay is .*; it must be above 0 and below 1"):
        WeightAverage(FakeEngine(torch.zeros(2)), decay)


def test_masters_on_disk_are_refused() -> None:
    engine = FakeEngine(torch.zeros(0))
    engine.optimizer.swap_optimizer = True
    with pytest.raises(ValueError, match=r"ema_decay: .* offloaded to nvme"):
        WeightAverage(engine, 0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averages")
    done = launch.deepspeed(RANKS, "tests/support/averages.py", folder, log=folder / "log")
    assert done.code == 0, done.output[-4000:]
    return folder


def noted(folder: Path, case: str, prefix: str, rank: int = 0) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / f"{case}.{rank}.safetensors")
    return {n.removeprefix(f"{prefix}/"): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}


def averaged_by_hand(folder: Path, case: str, steps: int) -> dict[str, torch.Tensor]:
    average = {name: tensor.double() for name, tensor in noted(folder, case, "masters0").items()}
    for step in range(steps):
        decay = min(DECAY, (1 + step) / (10 + step))
        weights = noted(folder, case, f"masters{step + 1}")
        average = {name: decay * average[name] + (1 - decay) * weights[name].double() for name in average}
    return average


@pytest.mark.launch
@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("case", CASES)
def test_the_average_is_that_of_the_masters(folder: Path, case: str, rank: int) -> None:
    names = {name for name, p in small_model().named_parameters() if p.requires_grad}
    for steps in range(1, STEPS + 1):
        found, last = noted(folder, case, f"average{steps}", rank), noted(folder, case, f"masters{steps}")
        assert found.keys() == names
        for name, expected in averaged_by_hand(folder, case, steps).items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name].double(), expected, atol=1e-6, rtol=1e-6)
            assert not torch.allclose(found[name], last[name], atol=1e-4), name


@pytest.mark.launch
@pytest.mark.parametrize("case", CASES)
def test_the_model_computes_with_the_average(folder: Path, case: str) -> None:
    """Against a plain model in one process that is given the average, rounded."""
    dtype = torch.bfloat16 if CASES[case][0] else torch.float32
    plain = small_model().to(dtype)
    average = averaged_by_hand(folder, case, LOOK)
    plain.load_state_dict({name: tensor.to(dtype) for name, tensor in average.items()}, strict=False)
    expected = plain(inputs().to(dtype)).float().detach()
    for rank in range(RANKS):
        applied, before = noted(folder, case, "applied", rank), noted(folder, case, "before", rank)
        for name, parameter in plain.named_parameters():
            # An fp32 average can fall on the other side of a rounding boundary than the one in fp64: one bf16 step.
            torch.testing.assert_close(applied[name], parameter.detach(), atol=1e-6, rtol=8e-3)
        torch.testing.assert_close(applied["logits"], expected, atol=2e-2 if CASES[case][0] else 1e-5, rtol=0)
        assert (applied["logits"] - before["logits"]).abs().max() > 0.05


@pytest.mark.launch
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_behind(folder: Path, case: str) -> None:
    for rank in range(RANKS):
        before, after = noted(folder, case, "before", rank), noted(folder, case, "after", rank)
        assert before.keys() == after.keys()
        # By bits: the padding of a partition is never written, and may hold a NaN, which equals nothing.
        assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before)
        last, alone = noted(folder, case, f"masters{STEPS}", rank), noted(folder, case, "alone", rank)
        assert all(torch.equal(last[name], alone[name]) for name in last)


@pytest.mark.launch
@pytest.mark.parametrize("case", CASES)
def test_a_stored_average_is_taken_up_again(folder: Path, case: str) -> None:
    for rank in range(RANKS):
        stored, loaded = noted(folder, case, f"average{LOOK}", rank), noted(folder, case, "loaded", rank)
        masters = noted(folder, case, f"masters{STEPS}", rank)
        fresh = noted(folder, case, "fresh", rank)
        untouched = noted(folder, case, "masters-after-load", rank)
        for name in stored:
            assert torch.equal(loaded[name], stored[name])
            assert torch.equal(fresh[name], masters[name])
            assert torch.equal(untouched[name], masters[name])
