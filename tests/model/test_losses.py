"""Targets, losses and class weights against torch's own, finite differences and numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from vidcls.model.losses import (
    LossSettings,
    class_balanced_weights,
    classification_losses,
    target_distribution,
)

FOCAL = LossSettings(loss_type="focal", focal_gamma=1.7)


def hard_targets(labels_B: torch.Tensor, num_classes: int, smoothing: float = 0.0) -> torch.Tensor:
    none_B = torch.zeros(len(labels_B), dtype=torch.float64)
    classes_B = torch.full_like(labels_B, num_classes)
    return target_distribution(labels_B, torch.zeros_like(labels_B), none_B, classes_B, num_classes, smoothing)


@pytest.fixture
def logits_BC() -> torch.Tensor:
    return 3 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LABELS_B = torch.tensor([0, 1, 2, 3, 4, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight_C", [None, torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)])
def test_cross_entropy_is_torchs(logits_BC, smoothing, weight_C):
    expected_B = F.cross_entropy(logits_BC, LABELS_B, weight=weight_C, label_smoothing=smoothing, reduction="none")
    weights_BC = None if weight_C is None else weight_C.expand(6, 5)
    targets_BC = hard_targets(LABELS_B, 5, smoothing)
    losses_B = classification_losses(logits_BC, targets_BC, LossSettings(), weights_BC)
    torch.testing.assert_close(losses_B, expected_B)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_is_its_formula(logits_BC, gamma):
    settings = LossSettings(loss_type="focal", focal_gamma=gamma)
    p_B = logits_BC.softmax(1)[torch.arange(6), LABELS_B]
    losses_B = classification_losses(logits_BC, hard_targets(LABELS_B, 5), settings)
    torch.testing.assert_close(losses_B, -((1 - p_B) ** gamma) * p_B.log())


@pytest.mark.parametrize("settings", [LossSettings(), FOCAL])
def test_gradients_are_those_of_finite_differences(logits_BC, settings):
    targets_BC = hard_targets(LABELS_B, 5, 0.2)
    weights_BC = torch.rand(6, 5, dtype=torch.float64)
    logits_BC.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: classification_losses(x, targets_BC, settings, weights_BC), logits_BC)


@pytest.mark.parametrize("settings", [LossSettings(), FOCAL, LossSettings(loss_type="focal", focal_gamma=0.5)])
def test_classes_that_a_head_does_not_have_count_for_nothing(logits_BC, settings):
    narrow_BC = logits_BC.detach().requires_grad_()
    wide_BC = F.pad(logits_BC.detach(), (0, 3), value=-math.inf).requires_grad_()
    none_B, classes_B = torch.zeros(6, dtype=torch.float64), torch.full((6,), 5)
    targets_BC = target_distribution(LABELS_B, LABELS_B, none_B, classes_B, 8, 0.1)
    narrow_B = classification_losses(narrow_BC, hard_targets(LABELS_B, 5, 0.1), settings)
    wide_B = classification_losses(wide_BC, targets_BC, settings, torch.ones(6, 8))
    assert torch.equal(narrow_B, wide_B)
    narrow_B.sum().backward()
    wide_B.sum().backward()
    torch.testing.assert_close(wide_BC.grad[:, :5], narrow_BC.grad)
    assert not wide_BC.grad[:, 5:].any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_a_certain_answer_gives_no_nan(gamma):
    """p is exactly 1 or 0 in float32, right or wrong."""
    logits_BC = torch.tensor([[200.0, 0, 0], [200, 0, 0]], requires_grad=True)
    settings = LossSettings(loss_type="focal", focal_gamma=gamma)
    losses_B = classification_losses(logits_BC, hard_targets(torch.tensor([0, 1]), 3).float(), settings)
    losses_B.sum().backward()
    assert losses_B.tolist() == [0.0, 200.0]
    assert logits_BC.grad.tolist() == [[0, 0, 0], [1, -1, 0]]


def test_losses_are_float32_for_bf16_logits():
    logits_BC = torch.randn(2, 3).bfloat16()
    losses_B = classification_losses(logits_BC, hard_targets(torch.tensor([0, 2]), 3).float(), LossSettings())
    assert losses_B.dtype == torch.float32
    torch.testing.assert_close(losses_B, F.cross_entropy(logits_BC.float(), torch.tensor([0, 2]), reduction="none"))


def test_targets_worked_out_by_hand():
    targets_BC = target_distribution(
        labels_B=torch.tensor([0, 1, 2]),
        partners_B=torch.tensor([1, 0, 2]),
        shares_B=torch.tensor([0.25, 0.0, 0.5]),
        classes_B=torch.tensor([2, 4, 4]),
        num_classes=4,
        label_smoothing=0.2,
    )
    expected_BC = [
        [0.8 * 0.75 + 0.1, 0.8 * 0.25 + 0.1, 0.0, 0.0],
        [0.05, 0.85, 0.05, 0.05],
        [0.05, 0.05, 0.85, 0.05],
    ]
    torch.testing.assert_close(targets_BC, torch.tensor(expected_BC))


def test_mixed_targets_give_the_mixed_losses(logits_BC):
    partners_B, share = LABELS_B.flip(0), 0.3
    shares_B, classes_B = torch.full((6,), share, dtype=torch.float64), torch.full((6,), 5)
    targets_BC = target_distribution(LABELS_B, partners_B, shares_B, classes_B, 5, 0.1)
    own_B, other_B = (
        F.cross_entropy(logits_BC, labels_B, label_smoothing=0.1, reduction="none")
        for labels_B in (LABELS_B, partners_B)
    )
    expected_B = (1 - share) * own_B + share * other_B
    torch.testing.assert_close(classification_losses(logits_BC, targets_BC, LossSettings()), expected_B)


def test_class_weights_worked_out_by_hand():
    # Effective numbers at beta 0.5: 1 sample 1, 2 samples 1.5, 3 samples 1.75.
    inverse = [1 / 1, 1 / 1.5, 1 / 1.75]
    scale = 3 / sum(inverse)
    expected = [inverse[0] * scale, 0.0, inverse[1] * scale, inverse[2] * scale]
    weights_C = class_balanced_weights([1, 0, 2, 3], 0.5)
    assert weights_C.dtype == torch.float32
    assert weights_C.tolist() == pytest.approx(expected)
    # Close to 1 the weights go with 1 / n.
    assert class_balanced_weights([1, 3], 1 - 1e-9).tolist() == pytest.approx([1.5, 0.5], rel=1e-6)
    assert class_balanced_weights([5, 0, 1], 0.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: LossSettings(label_smoothing=1.0), r"label_smoothing is 1.0; it must be in \[0, 1\)"),
        (lambda: LossSettings(label_smoothing=math.nan), "label_smoothing is nan"),
        (lambda: LossSettings(loss_type="hinge"), r"loss_type is 'hinge'; .*\['cross_entropy', 'focal'\]"),
        (lambda: LossSettings(focal_gamma=-1.0), "focal_gamma is -1.0"),
        (lambda: LossSettings(focal_gamma=math.inf), "focal_gamma is inf"),
        (lambda: class_balanced_weights([1, 2], 1.0), "class_balance_beta is 1.0"),
        (lambda: class_balanced_weights([1, -2], 0.9), r"counts are \[1, -2\]"),
        (lambda: class_balanced_weights([0, 0], 0.9), "not all 0"),
        (lambda: class_balanced_weights([], 0.9), "not all 0"),
    ],
)
def test_wrong_settings_are_named(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
