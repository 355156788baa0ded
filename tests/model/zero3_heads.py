"""An attention head and a language head, trained under ZeRO-3 or plainly.

deepspeed --num_gpus 2 tests/model/zero3_heads.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vidcls.model.heads import ActionDecoder
from vidcls.model.language_head import NO_ANSWER, LanguageHead
from vidcls.model.losses import LossSettings, classification_losses

RANKS, ROWS, LENGTH, WIDTH, VOCABULARY, CLASSES, STEPS, RATE = 2, 4, 6, 16, 40, 3, 3, 0.5


class SmallModel(nn.Module):
    """An embedding table, a layer that stands for the backbone, an attention head and the tied, frozen vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.table.weight.requires_grad_(False)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = ActionDecoder(WIDTH, CLASSES, "attention", seed=0)
        self.language_head = LanguageHead(self.table.weight, chunk=3)

    def forward(self, ids_BL: torch.Tensor, targets_BC: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        hidden_BLD = torch.tanh(self.layer(self.table(ids_BL)))
        logits_BC = self.head(hidden_BLD[:, -1], hidden_BLD, ids_BL > 5)
        answers_B = self.language_head(hidden_BLD, labels_BL)
        return (classification_losses(logits_BC, targets_BC, LossSettings(0.1, "focal")) + 0.5 * answers_B).mean()


def inputs(rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, targets and answer labels; only the first rank's rows have answers."""
    generator = torch.Generator().manual_seed(2)
    ids_BL = torch.randint(6, VOCABULARY, (ROWS, LENGTH), generator=generator)
    ids_BL[:, 1] = 2
    labels_BL = torch.full((ROWS, LENGTH), NO_ANSWER)
    labels_BL[: ROWS // RANKS, 2:4] = torch.randint(VOCABULARY, (ROWS // RANKS, 2), generator=generator)
    labels_BL[0, 4] = 7
    return ids_BL[rows], torch.eye(CLASSES)[torch.arange(ROWS) % CLASSES][rows], labels_BL[rows]


def train_plainly() -> dict[str, torch.Tensor]:
    """Every parameter after `STEPS` steps of SGD on all rows."""
    model = SmallModel()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(*inputs(slice(None))).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_under_zero3() -> dict[str, torch.Tensor]:
    """The same, each rank with its own rows. All ranks must call it."""
    import deepspeed

    model: Any = SmallModel()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": ROWS // RANKS,
            # Nothing stays gathered: not because it is small, nor because it will be used again soon.
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            },
            "gradient_clipping": 0.0,  # by default it clips to 1
            "zero_allow_untested_optimizer": True,
        },
    )
    own = ROWS // RANKS
    for _ in range(STEPS):
        loss = engine(*inputs(slice(distributed.rank() * own, (distributed.rank() + 1) * own)))
        assert model.table.weight.numel() == 0, "the weight is still whole between forward and backward"
        engine.backward(loss)
        engine.step()
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


if __name__ == "__main__":
    from vidcls import distributed

    distributed.start(60)
    try:
        results = train_under_zero3()
        if distributed.is_main():
            save_file(results, Path(sys.argv[-1]) / "zero3.safetensors")
    finally:
        distributed.stop()
