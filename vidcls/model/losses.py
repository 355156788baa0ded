"""The training loss: targets with smoothing and mixing, cross-entropy, focal loss, class weights.

Losses come one per row; the caller weights them, adds them up and divides once. Shape suffixes: B batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LOSS_TYPES = ("cross_entropy", "focal")


@dataclass(frozen=True)
class LossSettings:
    """What is minimised; `focal_gamma` counts only with loss_type "focal", where 0 means plain cross-entropy."""

    label_smoothing: float = 0.0
    loss_type: str = "cross_entropy"
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type is {self.loss_type!r}; it must be one of {list(LOSS_TYPES)}")
        if not 0 <= self.focal_gamma < math.inf:
            raise ValueError(f"focal_gamma is {self.focal_gamma}; it must be a finite number of at least 0")


def class_balanced_weights(counts_C: Sequence[int], beta: float) -> torch.Tensor:
    """float32 weight of each class by its effective number of samples, (1 - beta) / (1 - beta^n).

    After Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", and scaled as there: the
    weights add up to the number of classes. A class without samples gets 0 and does not count as one. Beta 0
    balances nothing: ones throughout.

    Raises:
        ValueError: beta is outside [0, 1), a count is negative, or all are 0.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"class_balance_beta is {beta}; it must be in [0, 1)")
    if min(counts_C, default=0) < 0 or not any(counts_C):
        raise ValueError(f"counts are {list(counts_C)}; they must be at least 0 and not all 0")
    if beta == 0:
        return torch.ones(len(counts_C))
    counts = torch.as_tensor(counts_C, dtype=torch.float64)
    weights = torch.where(counts > 0, (1 - beta) / (1 - beta**counts), 0.0)
    return (weights * (counts > 0).sum() / weights.sum()).float()


def target_distribution(
    labels_B: torch.Tensor,
    partners_B: torch.Tensor,
    shares_B: torch.Tensor,
    classes_B: torch.Tensor,
    num_classes: int,
    label_smoothing: float,
) -> torch.Tensor:
    """targets_BC in the dtype of `shares_B`; every row adds up to 1.

    Args:
        partners_B: the second label of a mixed clip; any legal label where the share is 0.
        shares_B: how much of the target the partner gets, in [0, 1].
        classes_B: how many classes the row's own head has; smoothing spreads over those alone.
        num_classes: C, the largest of them.
    """
    # By comparison: F.one_hot reads the largest label on the host first.
    classes_C = torch.arange(num_classes, device=labels_B.device)
    labels_BC = (classes_C == labels_B[:, None]).to(shares_B.dtype)
    partners_BC = (classes_C == partners_B[:, None]).to(shares_B.dtype)
    targets_BC = torch.lerp(labels_BC, partners_BC, shares_B[:, None])
    even_BC = (classes_C < classes_B[:, None]).to(shares_B.dtype) / classes_B[:, None]
    return (1 - label_smoothing) * targets_BC + label_smoothing * even_BC


def classification_losses(
    logits_BC: torch.Tensor,
    targets_BC: torch.Tensor,
    settings: LossSettings,
    class_weights_BC: torch.Tensor | None = None,
) -> torch.Tensor:
    """losses_B, float32 (float64 for float64 logits): -sum_c w_c t_c (1 - p_c)^gamma log p_c, p the softmax.

    Gamma is 0 for cross-entropy, which makes it F.cross_entropy with `weight` and `label_smoothing`, not yet
    averaged; with a hard label and gamma above 0 it is the focal loss of Lin et al. 2017. A logit of -inf marks
    a class that the row's head does not have: it adds nothing to the loss and gets a gradient of 0, whatever
    its target. A row needs one finite logit.
    """
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    logs_BC = F.log_softmax(logits_BC, dim=-1).masked_fill(logits_BC == -math.inf, 0.0)
    losses_BC = -targets_BC * logs_BC
    if settings.loss_type == "focal":
        # The floor: at p = 1 the power's slope is infinite for a gamma below 1, and inf * 0 is NaN.
        misses_BC = (-torch.expm1(logs_BC)).clamp(min=torch.finfo(logs_BC.dtype).tiny)
        losses_BC = losses_BC * misses_BC**settings.focal_gamma
    if class_weights_BC is not None:
        losses_BC = losses_BC * class_weights_BC
    return losses_BC.sum(dim=-1)
