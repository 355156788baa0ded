"""What is minimised: the classification loss of each clip's own head, and, if wanted, that of saying the answer.

Shape suffixes: B batch, C classes, H heads, S data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vidcls import distributed
from vidcls.data.batch import Batch
from vidcls.model.losses import LossSettings, class_balanced_weights, classification_losses, target_distribution
from vidcls.options import OptimOptions


@dataclass(frozen=True)
class Objective:
    """classes_H: classes of each head. class_weights_HC: of their classes, 0 beyond; None: all weigh the same.

    lm_loss_weight: times the mean loss of a clip's answer tokens.
    """

    settings: LossSettings
    classes_H: torch.Tensor
    class_weights_HC: torch.Tensor | None
    lm_loss_weight: float

    @classmethod
    def of(cls, optim: OptimOptions, counts: Sequence[Sequence[int]], device: torch.device) -> Objective:
        """`counts` holds, for each head, the training clips of each class."""
        weights_HC = None
        if optim.class_balance_beta:
            most = max(map(len, counts))
            weights_HC = torch.zeros(len(counts), most)
            for row, counts_C in zip(weights_HC, counts, strict=True):
                row[: len(counts_C)] = class_balanced_weights(counts_C, optim.class_balance_beta)
            weights_HC = weights_HC.to(device)
        settings = LossSettings(optim.label_smoothing, optim.loss_type, optim.focal_gamma)
        classes_H = torch.tensor([len(each) for each in counts], device=device)
        return cls(settings, classes_H, weights_HC, optim.lm_loss_weight)

    def losses(self, logits_BC: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Classification losses_B, float32, as they are minimised: smoothed, mixed and balanced; rows unweighted."""
        targets_BC = target_distribution(
            batch.labels_B,
            batch.partners_B,
            batch.shares_B,
            self.classes_H[batch.heads_B],
            logits_BC.shape[1],
            self.settings.label_smoothing,
        )
        weights_BC = None if self.class_weights_HC is None else self.class_weights_HC[batch.heads_B]
        return classification_losses(logits_BC, targets_BC, self.settings, weights_BC)


@dataclass(frozen=True)
class Tally:
    """Sums over this rank's counted clips of some micro-batches, on the device: what log lines are made of.

    by_source_S3: for each data set classification loss, hits (the largest logit is that of the label) and clips.
    answer_loss: of the clips' mean answer losses.
    """

    by_source_S3: torch.Tensor
    answer_loss: torch.Tensor

    @classmethod
    def zero(cls, sources: int, device: torch.device) -> Tally:
        return cls(torch.zeros(sources, 3, device=device), torch.zeros((), device=device))

    def add(
        self, batch: Batch, logits_BC: torch.Tensor, losses_B: torch.Tensor, answers_B: torch.Tensor | None
    ) -> None:
        """Take in one micro-batch. No host sync."""
        with torch.no_grad():
            hits_B = (logits_BC.argmax(dim=1) == batch.labels_B).float()
            rows_B3 = torch.stack([losses_B, hits_B, torch.ones_like(hits_B)], dim=1) * batch.weights_B[:, None]
            # Rows of one data set picked by comparison and summed: adding by index has no fixed order on a GPU.
            is_source_SB = torch.arange(len(self.by_source_S3), device=rows_B3.device)[:, None] == batch.sources_B
            self.by_source_S3.add_(is_source_SB.float() @ rows_B3)
            if answers_B is not None:
                self.answer_loss.add_((answers_B * batch.weights_B).sum())

    def add_all(self, other: Tally) -> None:
        self.by_source_S3.add_(other.by_source_S3)
        self.answer_loss.add_(other.answer_loss)

    def clear(self) -> None:
        self.by_source_S3.zero_()
        self.answer_loss.zero_()

    def read(self, names: Sequence[str], *, answers: bool) -> dict[str, float]:
        """Means over all ranks' clips: training top-1, with several data sets each one's loss and top-1, with answers
        their loss. A data set without a clip is left out. All ranks must call it."""
        sums = distributed.all_sum(torch.cat([self.by_source_S3.flatten(), self.answer_loss[None]])).tolist()
        rows = [sums[3 * number : 3 * number + 3] for number in range(len(names))]
        clips = sum(row[2] for row in rows)
        values: dict[str, float] = {}
        if clips:
            values["top1"] = sum(row[1] for row in rows) / clips
            if answers:
                values["answer_loss"] = sums[-1] / clips
        if len(names) > 1:
            for name, (loss, hits, count) in zip(names, rows, strict=True):
                if count:
                    values |= {f"loss/{name}": loss / count, f"top1/{name}": hits / count}
        return values
