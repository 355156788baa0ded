"""The weighted cross-entropy sum."""

import pytest
import torch
import torch.nn.functional as F

from vidcls.model.losses import cross_entropy_sum


def test_sums_divide_to_the_weighted_mean():
    logits_BC, labels_B = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    total, weight = cross_entropy_sum(logits_BC, labels_B, torch.ones(6))
    assert (total / weight).item() == pytest.approx(F.cross_entropy(logits_BC, labels_B).item(), rel=1e-6)
    total, weight = cross_entropy_sum(logits_BC, labels_B, torch.tensor([1, 0, 0, 0.5, 0, 0]))
    single = F.cross_entropy(logits_BC, labels_B, reduction="none")
    assert total.item() == pytest.approx((single[0] + 0.5 * single[3]).item(), rel=1e-6)
    assert weight.item() == 1.5


def test_rows_of_weight_zero_give_no_gradient_and_sums_are_float32():
    logits_BC = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    total, weight = cross_entropy_sum(logits_BC, torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1]))
    assert total.dtype == weight.dtype == torch.float32
    total.backward()
    assert logits_BC.grad[0].any()
    assert not logits_BC.grad[1].any()
