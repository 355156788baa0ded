"""vidcls: video action classification with Qwen2.5-VL and DeepSpeed.

model = vidcls.load("runs/my/best")
model.predict("clip.mp4")[0]   ->  ("Archery", 0.97)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidcls.predict.predictor import Predictor

__version__ = "0.1.0"


def load(
    checkpoint: str | Path, *, head: str | None = None, base: str | None = None, trust_remote_code: bool = False
) -> Predictor:
    """A checkpoint or an export, ready to classify video files on this machine's accelerator; see `Predictor.load`.

    Raises:
        ValueError: a file is missing or damaged, belongs to another base model, or no one head is meant; names it.
    """
    from vidcls.predict.predictor import Predictor  # torch and transformers take seconds

    return Predictor.load(checkpoint, head=head, base=base, trust_remote_code=trust_remote_code)
