"""What the host needs for one operation of a model: a step of the built-in one, whose work is next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vidcls.config import config_from_values
from vidcls.model.classifier import ActionClassifier, ActionToken
from vidcls.model.heads import ActionDecoder
from vidcls.model.patches import VisionGeometry
from vidcls.model.prompt import PromptEncoder
from vidcls.model.shapes import TINY, read_architecture
from vidcls.model.tokens import load_tokenizer
from vidcls.model.tuning import TuningSettings, tune
from vidcls.model.weights import load_backbone, load_config
from vidcls.options import DEFAULT_PROMPT
from vidcls.planning.steptime import operations
from vidcls.planning.workload import Clips, Workload

FRAMES, SIDE, CLASSES, DROPOUT = 2, 28, 4, 0.05
RECIPE = {
    "model_name_or_path": TINY,
    "dataset": "none/none",
    "output_dir": "none",
    "per_device_train_batch_size": 1,
    "lora_dropout": DROPOUT,
}


def small_step(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """A forward and backward of one small clip, and how many operations a plan counts in it."""
    config: Any = load_config(TINY)
    tokenizer, token_id = load_tokenizer(TINY)
    geometry = VisionGeometry.from_config(config)
    encoder = PromptEncoder(tokenizer, geometry, config.video_token_id, 2048, SIDE**2, SIDE**2)
    grid = encoder.grid(FRAMES, SIDE, SIDE)
    text = encoder.encode(DEFAULT_PROMPT, grid, 1.0)
    width = config.get_text_config().hidden_size
    backbone = tune(
        load_backbone(TINY, dtype=dtype, attn_implementation="sdpa"), TuningSettings(lora_dropout=DROPOUT), seed=0
    )
    heads = {"default": ActionDecoder(width, CLASSES, seed=0)}
    token = ActionToken(torch.zeros(width))
    model = ActionClassifier(backbone, heads, token, action_token_id=token_id, geometry=geometry).to(device).train()
    inputs = (
        torch.zeros(FRAMES * SIDE * SIDE * 3, dtype=torch.uint8, device=device),
        (grid,),
        (len(text),),
        torch.from_numpy(text.input_ids)[None].to(device),
        torch.from_numpy(text.position_ids)[:, None].to(device),
        torch.tensor([text.action_position], device=device),
        torch.zeros(1, dtype=torch.long, device=device),
    )

    def step() -> None:
        model(*inputs).sum().backward()
        model.zero_grad()

    architecture, _ = read_architecture(TINY)
    clips = Clips(1, FRAMES, SIDE, SIDE, len(text) - geometry.num_tokens(grid))
    on_gpu = device.type != "cpu"
    work = Workload.of(config_from_values(RECIPE), architecture, clips, (CLASSES,), on_gpu=on_gpu, stage=2)
    return step, operations(work)
