"""A checkpoint of a run: the model as evaluation and prediction read it, and all that a resume needs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from vidcls import distributed
from vidcls.model.pretrained import LABELS_NAME, PREPROCESSING_NAME, head_folder, save_model
from vidcls.training import checkpoint
from vidcls.training.averaging import WeightAverage
from vidcls.training.engine import Engine
from vidcls.training.setup import Run

CONFIG_NAME = "config.yaml"


def save_checkpoint(
    run: Run, engine: Engine, average: WeightAverage | None, step: int, *, best: Path | None = None
) -> Path:
    """Write checkpoint-`step`, then delete those beyond save_total_limit, but not `best`. All ranks must call it.

    The model in it has the averaged weights, where there are any; the training state has both.

    Raises:
        RuntimeError: on every rank, when the main rank cannot write; the previous checkpoint stays.
    """
    tensors, adam_steps = checkpoint.gather_training_state(engine, average)
    target = run.output_dir / f"checkpoint-{step}"
    with distributed.all_or_none(f"saving {target}"):
        if distributed.is_main():
            state = replace(run.start, step=step, adam_steps=adam_steps)
            folder = checkpoint.temporary_folder(run.output_dir)
            try:
                prefix = "weight/" if average is None else f"{checkpoint.AVERAGE}/"
                weights = {
                    name.removeprefix(prefix): tensor.to(run.spec.dtype)
                    for name, tensor in tensors.items()
                    if name.startswith(prefix)
                }
                save_model(folder, engine.module, run.spec, weights, run.encoder.tokenizer)
                for part in run.data.parts:
                    head = head_folder(folder, part.about.head)
                    part.index.labels.save(head / LABELS_NAME)
                    settings = json.dumps(part.index.settings.to_dict(), indent=2)
                    (head / PREPROCESSING_NAME).write_text(settings + "\n", encoding="utf-8")
                (folder / CONFIG_NAME).write_text(run.config.dump(), encoding="utf-8")
                if not run.config.run.save_only_model:
                    checkpoint.write_state(folder, state, tensors)
                checkpoint.publish(folder, run.output_dir, step)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            checkpoint.remove_old(run.output_dir, run.config.run.save_total_limit, best)
    return target
