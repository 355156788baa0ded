"""The built-in model as a run trains it, beside what the planner takes it for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from tests.model.test_classifier import make_batch
from vidcls.config import Config, config_from_values
from vidcls.model.classifier import ActionClassifier
from vidcls.model.heads import ActionDecoder
from vidcls.model.pretrained import TrainingExtras, build_encoder, build_model
from vidcls.model.shapes import read_architecture
from vidcls.options import DEFAULT_PROMPT
from vidcls.planning.workload import Clips, Workload
from vidcls.training.setup import model_spec

CLASSES = 6
FRAMES, HEIGHT, WIDTH = 8, 112, 140


def recipe(**options: Any) -> Config:
    values = {
        "model_name_or_path": "tiny",
        "dataset": "data/none",
        "lora_rank": 4,
        "per_device_train_batch_size": 3,
        "output_dir": "runs/none",
        **options,
    }
    return config_from_values(values)


def built(config: Config) -> tuple[ActionClassifier, Any]:
    """The classifier in training mode, and the inputs of a micro-batch of equal clips."""
    spec, model = model_spec(config), config.model
    head = ActionDecoder(128, CLASSES, model.action_decoder_type, model.action_decoder_hidden_size, seed=0)
    extras = TrainingExtras(gradient_checkpointing=model.gradient_checkpointing)
    classifier = build_model(spec, build_encoder(spec), {"default": head}, seed=0, extras=extras)
    count = config.optim.per_device_train_batch_size or 1
    return classifier.train(), make_batch([(FRAMES, HEIGHT, WIDTH, 0.5, DEFAULT_PROMPT)] * count)


def planned(config: Config, inputs: Any, *, stage: int = 2, prefix: int = 0) -> Workload:
    model, _ = read_architecture("tiny")
    lengths = inputs[2]
    clips = Clips(len(lengths), FRAMES, HEIGHT, WIDTH, text_tokens=0)
    clips = replace(clips, text_tokens=lengths[0] - clips.video_tokens(model), prefix=prefix)
    return Workload.of(config, model, clips, (CLASSES,), on_gpu=False, stage=stage)


def loss_of(classifier: ActionClassifier, inputs: Any, prefix: int = 0) -> torch.Tensor:
    torch.manual_seed(0)
    return F.cross_entropy(classifier(*inputs, prefix=prefix), torch.zeros(len(inputs[2]), dtype=torch.long))
