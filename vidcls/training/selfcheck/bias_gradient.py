"""The gradient that each head's last bias must get, from the logits alone and from labels read anew from the shards.

By a bias the loss's gradient is the sum of its gradients by the logits, so that it needs no backward pass; and a wrong
label, a wrong divisor or clips left out all show in it.

Shape suffixes: B batch, C classes (the most of all heads), H heads, V variants: labels as they are, or shifted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from vidcls import distributed
from vidcls.data.batch import Batch
from vidcls.data.loader import ClipSource
from vidcls.data.shards import ShardReader

Losses: TypeAlias = Callable[[torch.Tensor, Batch], torch.Tensor]
"""(logits_BC, batch) -> losses_B as they are minimised, rows not weighted."""
SHIFTS = (0, 1, -1)
# A gradient in bf16: each row's by the logits is rounded, then their sum, then what ranks and micro-batches add.
TOLERANCE_BF16 = 2.0**-8
TOLERANCE_FP32 = 1e-3


class LabelReader:
    """Labels by the class names in the clips' own files, apart from the index's and the loader's."""

    def __init__(self, sources: Sequence[ClipSource]) -> None:
        self._sources = sources
        self._readers = [ShardReader(source.index) for source in sources]
        self._samples: dict[int, dict[str, int]] = {}

    def read(self, source: int, key: str) -> int:
        """The label of a clip; ShardError if it cannot be read."""
        index = self._sources[source].index
        if source not in self._samples:
            self._samples[source] = {each: number for number, each in enumerate(index.keys)}
        about = self._readers[source].read(self._samples[source][key]).about
        return index.labels.index(about.class_name)

    def legal(self, source: int, label: int) -> set[int]:
        """The labels that a clip of this class may have in training: its own, and that of its mirror image."""
        about = self._sources[source]
        flips = about.augment is not None and about.augment.horizontal_flip > 0 and about.mirror is not None
        if not flips:
            return {label}
        assert about.mirror is not None
        mirrored = int(about.mirror[label])
        return {label} if mirrored < 0 else {label, mirrored}


@dataclass(frozen=True)
class Expected:
    """One head's expected gradient over all ranks: `by_shift` for each of SHIFTS, [V, C]; terms_C: what its terms'
    absolute values add up to, the measure of its rounding; float64, on the host."""

    by_shift_VC: torch.Tensor
    terms_C: torch.Tensor

    def times(self, factor: float) -> Expected:
        return Expected(self.by_shift_VC * factor, self.terms_C * factor)

    def decides(self, tolerance: float) -> bool:
        """Whether half of it, or that of shifted labels, would be told from it: it cancels where every class has as
        many clips as the head gives it likelihood."""
        own_C = self.by_shift_VC[0]
        return bool((own_C.abs() > 4 * tolerance * self.terms_C).any())


class ExpectedGradient:
    """Gathers what a step's micro-batches add to the gradient of each head's last bias."""

    def __init__(self, sources: Sequence[ClipSource], losses: Losses) -> None:
        self._labels = LabelReader(sources)
        self._losses = losses
        heads = max(source.head for source in sources) + 1
        self._sources = sources
        self.classes = [
            next(len(source.index.labels) for source in sources if source.head == head) for head in range(heads)
        ]
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        most = max(self.classes)
        self._sums_HVC = torch.zeros(len(self.classes), len(SHIFTS), most, dtype=torch.float64)
        self._terms_HC = torch.zeros(len(self.classes), most, dtype=torch.float64)
        self.micro_batches = self._rows = 0
        self._chance = torch.zeros(3, dtype=torch.float64)

    def add(self, batch: Batch, logits_BC: torch.Tensor) -> str | None:
        """Take in one micro-batch; returns what is wrong with its labels, if anything is."""
        sources = batch.sources
        labels_B = [
            self._labels.read(source, key) if weight else 0
            for source, key, weight in zip(sources, batch.keys, batch.weights_B.tolist(), strict=True)
        ]
        given_B, heads_B = batch.labels_B.tolist(), [self._sources[source].head for source in sources]
        if wrong := self._wrong_labels(batch, labels_B, heads_B):
            return wrong
        # A flip cannot be told from here: of the two labels that the clip may have, take the one it was given.
        true_B = torch.tensor(given_B, device=logits_BC.device)
        classes_B = torch.tensor([self.classes[head] for head in heads_B], device=logits_BC.device)
        for variant, shift in enumerate(SHIFTS):
            shifted = replace(batch, labels_B=(true_B + shift) % classes_B)
            gradient_BC = self._gradient(shifted, logits_BC)
            for head in range(len(self.classes)):
                rows_BC = gradient_BC[[row for row, own in enumerate(heads_B) if own == head]]
                self._sums_HVC[head, variant] += _padded(rows_BC.sum(dim=0), self._sums_HVC.shape[-1])
                if shift == 0:
                    self._terms_HC[head] += _padded(rows_BC.abs().sum(dim=0), self._sums_HVC.shape[-1])
        self._chance += self._by_chance(batch, logits_BC, heads_B)
        self.micro_batches += 1
        self._rows += len(batch)
        return None

    def _wrong_labels(self, batch: Batch, labels_B: list[int], heads_B: list[int]) -> str | None:
        given_B, sources = batch.labels_B.tolist(), batch.sources
        counted = [row for row, weight in enumerate(batch.weights_B.tolist()) if weight]
        if batch.heads_B.tolist() != heads_B:
            return f"the clips' heads are {batch.heads_B.tolist()}; their data sets belong to {heads_B}"
        wrong = [r for r in counted if given_B[r] not in self._labels.legal(sources[r], labels_B[r])]
        if not wrong:
            return None
        about = [f"{batch.keys[row]} is given class {given_B[row]} and stored as {labels_B[row]}" for row in wrong[:3]]
        steps = {(given_B[row] - labels_B[row]) % self.classes[heads_B[row]] for row in counted}
        rolls = [n for n in range(1, len(labels_B)) if given_B == labels_B[-n:] + labels_B[:-n]]
        reason = "another clip's label, or another order of the classes"
        if len(steps) == 1:
            reason = f"labels are shifted by {steps.pop()}"
        elif rolls:
            reason = f"labels are shifted by {rolls[0]} of {len(labels_B)} rows against the clips"
        return f"{len(wrong)} of {len(counted)} clips have a wrong label: {'; '.join(about)}; likely reason: {reason}"

    def _gradient(self, batch: Batch, logits_BC: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf_BC = logits_BC.detach().clone().requires_grad_()
            total = (self._losses(leaf_BC, batch) * batch.weights_B).sum()
            (gradient_BC,) = torch.autograd.grad(total, leaf_BC)
        return gradient_BC.double().cpu()

    def _by_chance(self, batch: Batch, logits_BC: torch.Tensor, heads_B: list[int]) -> torch.Tensor:
        """Sums over the rows: the loss that even labels would have, the uniform one, and the logits' variance."""
        result, logits_BC = torch.zeros(3, dtype=torch.float64), logits_BC.double().cpu()
        for row, (head, weight) in enumerate(zip(heads_B, batch.weights_B.tolist(), strict=True)):
            logits_C = logits_BC[row, : self.classes[head]]
            spread = logits_C.var(unbiased=False)
            loss = logits_C.logsumexp(dim=0) - logits_C.mean()
            uniform = torch.tensor(math.log(self.classes[head]), dtype=torch.float64)
            result += weight * torch.stack([loss, uniform, spread])
        return result

    def over_ranks(self) -> tuple[list[Expected], torch.Tensor]:
        """Means over the step's clips, as many on each rank: each head's gradient, `_by_chance`. All ranks must call
        it."""
        sizes = [self._sums_HVC.numel(), self._terms_HC.numel(), 3]
        joined = torch.cat([self._sums_HVC.flatten(), self._terms_HC.flatten(), self._chance])
        joined = distributed.all_sum(joined.to(distributed.device())).cpu()
        # As an engine must do it: by all rows of the step, whatever they weigh.
        joined = joined / (max(1, self._rows) * distributed.world_size())
        sums, terms, chance = joined.split(sizes)
        sums_HVC, terms_HC = sums.view_as(self._sums_HVC), terms.view_as(self._terms_HC)
        return [
            Expected(sums_HVC[head, :, :classes], terms_HC[head, :classes]) for head, classes in enumerate(self.classes)
        ], chance


def _padded(values_C: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(values_C, (0, width - len(values_C)))


def clipping(norm: float, max_grad_norm: float) -> float:
    """What gradients are multiplied by: as torch's clip_grad_norm_ and DeepSpeed do it; a limit of 0 means never."""
    return min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0


def tolerance(bf16: bool, additions: int) -> float:
    """How far the gradient may be off, in shares of its terms: a few roundings of 2^-9 each, and as they are random
    the root of the number of additions over ranks and micro-batches, should those be in bf16 as well."""
    return TOLERANCE_BF16 * (4 + math.sqrt(additions)) if bf16 else TOLERANCE_FP32


def compare(found_C: torch.Tensor, expected: Expected, limit: float, *, micro_batches: int) -> str | None:
    """What is wrong with the gradient that the optimizer got for a head's last bias; None if it is as expected.

    Args:
        limit: the largest legal difference, in shares of the gradient's terms.
    """
    own_C, terms_C = expected.by_shift_VC[0], expected.terms_C
    bound_C = limit * terms_C + 1e-12

    def equal(other_C: torch.Tensor) -> bool:
        return bool(((found_C - other_C).abs() <= bound_C).all())

    if equal(own_C):
        return None
    worst = int(((found_C - own_C).abs() / bound_C).argmax())
    ratio = ((found_C * own_C).sum() / (own_C * own_C).sum()).item()
    ranks = distributed.world_size()
    factors = {
        1 / micro_batches: f"the loss is divided twice by the {micro_batches} micro-batches of a step",
        1 / ranks: f"the gradient is divided twice by the {ranks} ranks",
        1 / (micro_batches * ranks): "the loss is divided twice, by micro-batches and by ranks",
        float(micro_batches): f"the loss is not divided by the {micro_batches} micro-batches of a step",
        float(ranks): f"the gradient is summed over the {ranks} ranks, not averaged",
    }
    reason = "the loss is another one, or clips were left out or counted twice"
    if equal(ratio * own_C):
        reason = "the loss or the gradient is scaled"
        for factor, meaning in factors.items():
            if factor != 1 and abs(ratio / factor - 1) < 0.1:
                reason = meaning
                break
    for variant, shift in enumerate(SHIFTS):
        if shift and equal(expected.by_shift_VC[variant]):
            reason = f"labels are shifted by {shift}"
    return (
        f"of class {worst} expected {own_C[worst].item():.4g}, found {found_C[worst].item():.4g}, allowed difference "
        f"{bound_C[worst].item():.2g}; over all classes it is {ratio:.3g} times the expected; likely reason: {reason}"
    )
