"""From a checked run to its engine: the model, fresh or from a checkpoint, wrapped by DeepSpeed."""

from __future__ import annotations

from pathlib import Path

from vidcls import distributed
from vidcls.model.pretrained import TrainingExtras, build_model
from vidcls.training.averaging import WeightAverage
from vidcls.training.checkpoint import check_fits, load_training_state, load_weights
from vidcls.training.engine import Engine, build_engine, deepspeed_config
from vidcls.training.partitioning import partitioned
from vidcls.training.setup import Run
from vidcls.training.sharded_state import WEIGHT, StoredState


def build(run: Run) -> tuple[Engine, WeightAverage | None]:
    """The engine, fresh or as the checkpoint left it, and the averages of its weights. All ranks must call it."""
    options, optim = run.config.model, run.config.optim
    extras = TrainingExtras(
        gradient_checkpointing=options.gradient_checkpointing,
        torch_compile=options.torch_compile,
        answers=optim.lm_loss_weight > 0,
        share_prefix=options.shares_prefix,
        # A run that goes on has its own weights, and the folder that it once started from may be gone.
        adapter=Path(options.adapter_name_or_path) if options.adapter_name_or_path and not run.resume else None,
    )
    with partitioned(deepspeed_config(run.config, run.plan)) as partition:
        model = build_model(
            run.spec, run.encoder, run.heads, seed=run.config.run.seed, extras=extras, partition=partition
        )
        stored = None
        if run.resume is not None:
            with distributed.all_or_none(f"reading {run.resume}"):
                stored = StoredState.open(run.resume)
                check_fits(model, stored.shapes, averaged=optim.ema_decay is not None)
                load_weights(model, stored.kind(WEIGHT))
        engine = build_engine(run.config, model.train(), run.plan)
    average = None if optim.ema_decay is None else WeightAverage(engine, optim.ema_decay)
    if stored is not None:
        load_training_state(engine, stored, run.start.adam_steps, average)
    return engine, average
