"""The expected gradient of a head's last bias, beside autograd's through the heads themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vidcls import distributed
from vidcls.data.augment import AugmentSettings
from vidcls.data.batch import Batch
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipSource
from vidcls.model.heads import ActionDecoder
from vidcls.options import OptimOptions
from vidcls.training.objective import Objective
from vidcls.training.selfcheck.bias_gradient import Expected, ExpectedGradient, LabelReader, clipping, compare
from vidcls.training.selfcheck.gradients import classifier_layer

ROWS = 6


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank without a process group."""
    monkeypatch.setattr(distributed, "world_size", lambda: 1)


@pytest.fixture
def index(small_shards: Path) -> ShardIndex:
    return ShardIndex.open(small_shards)


def batch_of(index: ShardIndex, samples: list[int], **changes: Any) -> Batch:
    count = len(samples)
    batch = Batch(
        frames=torch.zeros(0, dtype=torch.uint8),
        grid_thw=((1, 1, 1),) * count,
        lengths=(1,) * count,
        input_ids_BL=torch.zeros(count, 1, dtype=torch.long),
        position_ids_3BL=torch.zeros(3, count, 1, dtype=torch.long),
        action_positions_B=torch.zeros(count, dtype=torch.long),
        heads_B=torch.zeros(count, dtype=torch.long),
        labels_B=torch.tensor(index.label[samples].astype(np.int64)),
        partners_B=torch.zeros(count, dtype=torch.long),
        shares_B=torch.zeros(count),
        weights_B=torch.ones(count),
        keys=tuple(index.keys[sample] for sample in samples),
        sources_B=torch.zeros(count, dtype=torch.long),
    )
    return replace(batch, **changes)


def objective(heads: int, **options: Any) -> Objective:
    optim = OptimOptions(per_device_train_batch_size=1, **options)
    return Objective.of(optim, [[5, 7, 7, 7]] * heads, torch.device("cpu"))


def test_plain_cross_entropy_by_hand(index: ShardIndex) -> None:
    batch = batch_of(index, list(range(0, 26, 5)))
    logits_BC = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    expected = ExpectedGradient([ClipSource(index, "")], objective(1).losses)
    assert expected.add(batch, logits_BC) is None
    (found,), chance = expected.over_ranks()
    errors_BC = logits_BC.softmax(dim=1) - F.one_hot(batch.labels_B, 4)
    torch.testing.assert_close(found.by_shift_VC[0], errors_BC.mean(dim=0).double(), rtol=1e-5, atol=1e-7)
    later_BC = logits_BC.softmax(dim=1) - F.one_hot((batch.labels_B + 1) % 4, 4)
    torch.testing.assert_close(found.by_shift_VC[1], later_BC.mean(dim=0).double(), rtol=1e-5, atol=1e-7)
    # Over all labels of each row, evenly.
    even = torch.stack([F.cross_entropy(logits_BC, torch.full((ROWS,), label)) for label in range(4)]).mean()
    assert chance[:2].tolist() == pytest.approx([even.item(), math.log(4)])


@pytest.mark.parametrize("kind", ["linear", "mlp", "attention"])
def test_two_heads_several_batches_every_option(index: ShardIndex, kind: str) -> None:
    sources = [ClipSource(index, "", head=0), ClipSource(index, "", head=1)]
    generator = torch.Generator().manual_seed(0)
    own = objective(2, label_smoothing=0.1, loss_type="focal", class_balance_beta=0.9)
    heads = [ActionDecoder(8, 4, kind, 8 if kind != "linear" else None, seed=seed) for seed in (1, 2)]
    expected = ExpectedGradient(sources, own.losses)
    for first in (0, 6):
        rows_B = torch.tensor([0, 1, 1, 0, 1, 0])
        batch = batch_of(
            index,
            list(range(first, first + ROWS)),
            heads_B=rows_B,
            sources_B=rows_B,
            partners_B=torch.tensor([1, 2, 3, 0, 1, 2]),
            shares_B=torch.tensor([0.0, 0.3, 0.0, 0.45, 0.0, 0.2]),
            weights_B=torch.tensor([1.0, 1, 1, 0, 1, 1]),
        )
        states_BD = torch.randn(ROWS, 8, generator=generator)
        tokens = {"tokens_BLD": torch.randn(ROWS, 3, 8, generator=generator), "mask_BL": torch.ones(ROWS, 3).bool()}
        both_HBC = torch.stack([head(states_BD, **tokens) for head in heads])
        logits_BC = both_HBC[rows_B, torch.arange(ROWS)]
        assert expected.add(batch, logits_BC.detach()) is None
        loss = (own.losses(logits_BC, batch) * batch.weights_B).sum() / ROWS
        (loss / 2).backward()  # the mean over two micro-batches
    gradients, _ = expected.over_ranks()
    for head, found in zip(heads, gradients, strict=True):
        bias = head.get_submodule(classifier_layer(head)).bias
        torch.testing.assert_close(found.by_shift_VC[0].float(), bias.grad, rtol=1e-4, atol=1e-7)


def test_a_wrong_label_is_named(index: ShardIndex) -> None:
    batch = batch_of(index, [0, 14, 8, 21])
    labels_B = batch.labels_B.clone()
    labels_B[2] = (labels_B[2] + 1) % 4
    expected = ExpectedGradient([ClipSource(index, "")], objective(1).losses)
    wrong = expected.add(replace(batch, labels_B=labels_B), torch.zeros(4, 4)) or ""
    assert wrong.startswith(f"1 of 4 clips have a wrong label: {index.keys[8]} is given class ")
    shifted = expected.add(replace(batch, labels_B=(batch.labels_B + 3) % 4), torch.zeros(4, 4)) or ""
    assert shifted.endswith("labels are shifted by 3")
    rolled = expected.add(replace(batch, labels_B=batch.labels_B.roll(1)), torch.zeros(4, 4)) or ""
    assert rolled.endswith("labels are shifted by 1 of 4 rows against the clips")
    # A clip that could not be read has label 0 and weight 0.
    unread = replace(batch, labels_B=labels_B, weights_B=torch.tensor([1.0, 1, 0, 1]))
    assert expected.add(unread, torch.zeros(4, 4)) is None
    other = replace(batch, heads_B=torch.tensor([0, 0, 1, 0]))
    assert "the clips' heads are [0, 0, 1, 0]" in (expected.add(other, torch.zeros(4, 4)) or "")


def test_a_mirrored_clip_may_have_the_mirrored_label(index: ShardIndex) -> None:
    mirror = np.array([0, 2, 1, -1])
    flipped = ClipSource(index, "", augment=AugmentSettings(horizontal_flip=0.5), mirror=mirror)
    legal = [LabelReader([flipped]).legal(0, label) for label in range(4)]
    assert legal == [{0}, {1, 2}, {1, 2}, {3}]
    assert LabelReader([ClipSource(index, "", mirror=mirror)]).legal(0, 1) == {1}


def found_reason(found_C: torch.Tensor, expected: Expected, monkeypatch: pytest.MonkeyPatch, ranks: int = 2) -> str:
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    return compare(found_C, expected, 0.01, micro_batches=4) or "nothing"


def test_the_likely_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    own_C = torch.tensor([-0.3, 0.1, 0.2], dtype=torch.float64)
    expected = Expected(torch.stack([own_C, own_C.roll(1), own_C.roll(-1)]), torch.full((3,), 0.5).double())
    assert found_reason(own_C * 1.005, expected, monkeypatch) == "nothing"
    reasons = {
        1 / 4: "divided twice by the 4 micro-batches",
        4.0: "not divided by the 4 micro-batches",
        1 / 2: "divided twice by the 2 ranks",
        2.0: "summed over the 2 ranks",
        1 / 8: "by micro-batches and by ranks",
        0.7: "the loss or the gradient is scaled",
    }
    for factor, reason in reasons.items():
        assert reason in found_reason(own_C * factor, expected, monkeypatch), factor
    assert "labels are shifted by 1" in found_reason(own_C.roll(1), expected, monkeypatch)
    assert "labels are shifted by -1" in found_reason(own_C.roll(-1), expected, monkeypatch)
    assert "the loss is another one" in found_reason(own_C.flip(0) + 0.1, expected, monkeypatch)


def test_nothing_is_told_from_a_gradient_that_cancels() -> None:
    """Two clips of each class and an even head: the gradient is 0, and half of it too."""
    terms_C = torch.full((4,), 0.5).double()
    assert not Expected(torch.zeros(3, 4).double(), terms_C).decides(0.02)
    assert Expected(torch.full((3, 4), 0.1).double(), terms_C).decides(0.02)


@pytest.mark.parametrize(("norm", "limit"), [(7.0, 0.5), (0.2, 0.5), (3.0, 3.0)])
def test_clipping_as_torch_does_it(norm: float, limit: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), norm / 2)
    torch.nn.utils.clip_grad_norm_([weight], limit)
    assert weight.grad[0].item() == pytest.approx(norm / 2 * clipping(norm, limit))
    assert clipping(norm, 0) == 1
