"""Checkpoints as a run saves them, with random weights so large that the clips' scores differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vidcls.data.index import ShardIndex
from vidcls.data.settings import DecodeSettings
from vidcls.manifest import seal
from vidcls.model.heads import ActionDecoder
from vidcls.model.pretrained import (
    LABELS_NAME,
    PREPROCESSING_NAME,
    ModelSpec,
    build_encoder,
    build_model,
    head_folder,
    save_model,
)
from vidcls.model.tuning import TuningSettings
from vidcls.model.weights import fingerprint
from vidcls.options import DEFAULT_PROMPT


def tiny_spec(*heads: str) -> ModelSpec:
    """The built-in model; each head has a prompt of its own."""
    return ModelSpec(
        model_name_or_path="tiny",
        base_weights=fingerprint("tiny"),
        bf16=False,
        flash_attn="auto",
        enable_liger_kernel=False,
        tuning=TuningSettings(lora_rank=2, lora_alpha=4),
        action_token="<ACTION>",
        template="qwen2_vl",
        prompts={name: DEFAULT_PROMPT.replace("What", f"In {name}, what") for name in heads},
        video_maxlen=4,
        frame_sampling="segments",
        dense_stride=2,
        video_min_pixels=784,
        video_max_pixels=3136,
        image_max_pixels=None,
        cutoff_len=512,
    )


def make_checkpoint(
    folder: Path,
    shards: dict[str, Path],
    *,
    decoder_type: str = "linear",
    settings: DecodeSettings | None = None,
    **changes: Any,
) -> Path:
    """A checkpoint with a head for each of these data sets, by name.

    settings: instead of the shards' own. changes: of the spec; its base_weights follow.
    """
    folder.mkdir(parents=True)
    spec = replace(tiny_spec(*shards), **changes)
    spec = replace(spec, base_weights=fingerprint(spec.model_name_or_path))
    encoder = build_encoder(spec)
    opened = {name: ShardIndex.open(place) for name, place in shards.items()}
    heads = {name: ActionDecoder(128, len(index.labels), decoder_type) for name, index in opened.items()}
    model = build_model(spec, encoder, heads, seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: (0.2 if name.startswith("heads.") else 0.3) * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    save_model(folder, model, spec, weights, encoder.tokenizer)
    for name, index in opened.items():
        index.labels.save(head_folder(folder, name) / LABELS_NAME)
        stored = json.dumps((settings or index.settings).to_dict())
        (head_folder(folder, name) / PREPROCESSING_NAME).write_text(stored, encoding="utf-8")
    seal(folder)
    return folder
