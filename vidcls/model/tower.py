"""The vision tower and its merger without the language model, and what tells one tower from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vidcls.model.classifier import ActionClassifier, ActionToken
from vidcls.model.kernels import resolve_attention
from vidcls.model.patches import VisionGeometry
from vidcls.model.pretrained import ModelSpec
from vidcls.model.shapes import TINY
from vidcls.model.stored import StoredTensors, differing_shapes
from vidcls.model.tiny import tiny_backbone
from vidcls.model.weights import empty_backbone, load_config, parameter_name

VISUAL = "visual."
# Of the vision config: what decides the tower's output, beside its weights.
DECISIVE = (
    *("depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads", "in_channels", "out_hidden_size"),
    *("patch_size", "spatial_merge_size", "temporal_patch_size", "window_size", "fullatt_block_indexes"),
)


def load_tower(spec: ModelSpec) -> ActionClassifier:
    """A frozen classifier of which nothing but `encode_video` works: neither language model nor heads are read.

    Raises:
        ValueError: the base model's folder lacks the tower's weights, or they have other shapes.
    """
    attention, _ = resolve_attention(spec.flash_attn)
    name = spec.model_name_or_path
    backbone: Any = empty_backbone(name, dtype=spec.dtype, attn_implementation=attention)
    tensors = {key.removeprefix(VISUAL): tensor.to(spec.dtype) for key, tensor in _tensors(name)}
    needed = {key: tuple(tensor.shape) for key, tensor in backbone.visual.named_parameters()}
    if differing := differing_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()}, needed):
        raise ValueError(f"{name}: {VISUAL[:-1]}: {differing}")
    backbone.visual.load_state_dict(tensors, assign=True)
    width = backbone.config.get_text_config().hidden_size
    token = ActionToken(torch.zeros(width))
    geometry = VisionGeometry.from_config(backbone.config)
    model = ActionClassifier(backbone.requires_grad_(False), {}, token, action_token_id=0, geometry=geometry)
    backbone.language_model = nn.Identity()  # nothing of it was allocated
    return model.requires_grad_(False).eval()


def tower_digest(name_or_path: str) -> str:
    """sha256 over the names, types, shapes and values of the tower's weights as stored: every byte is read."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(name_or_path), key=lambda each: each[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tower_config(name_or_path: str) -> dict[str, Any]:
    """What else decides its output."""
    vision: Any = load_config(name_or_path).vision_config
    return {name: getattr(vision, name) for name in DECISIVE}


def _tensors(name_or_path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tower's weights by their parameters' names, mapped from their files."""
    if name_or_path == TINY:
        for name, parameter in tiny_backbone().visual.named_parameters(prefix=VISUAL[:-1]):
            yield name, parameter.detach()
        return
    stored = StoredTensors.open(Path(name_or_path))
    for name in stored.files:
        inner = parameter_name(name)
        if inner is not None and inner.startswith(VISUAL):
            yield inner, stored.read(name)
