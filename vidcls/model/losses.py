"""The training loss. Shape suffixes: B batch, C classes."""

import torch
import torch.nn.functional as F


def cross_entropy_sum(
    logits_BC: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the cross-entropies and the sum of the weights, both float32 scalars.

    Sums, not means: the caller adds them over micro-batches and ranks and divides once. A row of weight 0
    counts for nothing but needs a legal label (0 <= label < C).
    """
    losses_B = F.cross_entropy(logits_BC.float(), labels_B, reduction="none")
    weights_B = weights_B.float()
    return (losses_B * weights_B).sum(), weights_B.sum()
