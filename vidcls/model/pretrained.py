"""From options to a classifier, and between a classifier and a folder that plain transformers and peft can read.

A folder holds vidcls_model.json (this module's ModelSpec), the adapter in PEFT's format, the head, the <ACTION>
embedding and the tokenizer. The base model's weights stay where they are.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vidcls.manifest import MANIFEST_NAME, verify
from vidcls.model.backbone import (
    ADAPTER_WEIGHTS_NAME,
    LoraSettings,
    action_token_init,
    add_lora,
    load_adapter,
    load_backbone,
    load_config,
    load_tokenizer,
    save_adapter,
)
from vidcls.model.classifier import ActionClassifier, ActionToken
from vidcls.model.heads import CONFIG_NAME, WEIGHTS_NAME, ActionDecoder
from vidcls.model.patches import VisionGeometry
from vidcls.model.prompt import PromptEncoder

SPEC_NAME = "vidcls_model.json"
ACTION_TOKEN_NAME = "action_token.safetensors"
LABELS_NAME = "label_map.json"  # written and read by those who know data: training, evaluation, prediction
PREPROCESSING_NAME = "preprocessing.json"
INFERENCE_FILES = frozenset(
    {
        SPEC_NAME,
        ACTION_TOKEN_NAME,
        ADAPTER_WEIGHTS_NAME,
        WEIGHTS_NAME,
        CONFIG_NAME,
        LABELS_NAME,
        PREPROCESSING_NAME,
    }
)
ATTENTION = {"auto": None, "sdpa": "sdpa", "eager": "eager", "fa2": "flash_attention_2"}


@dataclass(frozen=True)
class ModelSpec:
    """What is needed, beside weights, to build the classifier and its inputs again."""

    model_name_or_path: str
    bf16: bool
    flash_attn: str
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    prompt: str
    video_maxlen: int
    video_min_pixels: int
    video_max_pixels: int
    cutoff_len: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


def build_encoder(spec: ModelSpec) -> PromptEncoder:
    """The host side of the model: texts, positions and frame sizes. Reads no weights.

    Raises:
        ValueError: the base model is no Qwen2.5-VL, or lacks a spare token row.
    """
    config = load_config(spec.model_name_or_path)
    tokenizer, _ = load_tokenizer(spec.model_name_or_path)
    return PromptEncoder(
        tokenizer,
        VisionGeometry.from_config(config),
        config.video_token_id,
        spec.cutoff_len,
        spec.video_min_pixels,
        spec.video_max_pixels,
    )


def build_model(
    spec: ModelSpec,
    encoder: PromptEncoder,
    *,
    num_classes: int,
    decoder_type: str,
    mlp_hidden_size: int | None,
    seed: int,
    gradient_checkpointing: bool = False,
) -> ActionClassifier:
    """A classifier ready to train: adapters, head and <ACTION> initialised from `seed`, all else frozen."""
    attention = ATTENTION[spec.flash_attn]
    backbone = load_backbone(spec.model_name_or_path, dtype=spec.dtype, attn_implementation=attention)
    token = ActionToken(action_token_init(backbone, encoder.tokenizer))
    text: Any = backbone.config.text_config
    adapted = add_lora(backbone, LoraSettings(spec.lora_rank, spec.lora_alpha, spec.lora_dropout), seed=seed)
    head = ActionDecoder(text.hidden_size, num_classes, decoder_type, mlp_hidden_size, seed=seed)
    model = ActionClassifier(adapted, head, token, action_token_id=encoder.action_token_id, geometry=encoder.geometry)
    if gradient_checkpointing:
        # On the language model only: on the whole model it would hook the frozen vision tower too. Not reentrant,
        # because the reentrant form drops every LoRA gradient when the inputs need none.
        model.inner.language_model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def save_model(
    folder: Path,
    model: ActionClassifier,
    spec: ModelSpec,
    weights: dict[str, torch.Tensor],
    tokenizer: Any,
) -> None:
    """Write everything but the training state. One process calls it.

    Args:
        weights: trained parameters, whole, by the classifier's parameter names (the module's own may be partitioned).
    """
    spec_text = json.dumps(asdict(spec), indent=2, ensure_ascii=False)
    (folder / SPEC_NAME).write_text(spec_text + "\n", encoding="utf-8")
    save_adapter(model.backbone, _below(weights, "backbone."), folder, base=spec.model_name_or_path)
    model.head.save_pretrained(folder, state=_below(weights, "head."))
    save_file(_below(weights, "action_token."), folder / ACTION_TOKEN_NAME)
    tokenizer.save_pretrained(folder)


def load_model(
    folder: Path, *, model_name_or_path: str | None = None
) -> tuple[ActionClassifier, PromptEncoder, ModelSpec]:
    """The classifier stored in `folder`, in eval mode, on the host.

    Args:
        model_name_or_path: where the base model is now, if it has moved since training.

    Raises:
        ValueError: a file is missing, or does not fit the base model; names it.
    """
    if (folder / MANIFEST_NAME).exists():
        verify(folder, only=INFERENCE_FILES)
    spec = read_spec(folder)
    if model_name_or_path is not None:
        spec = replace(spec, model_name_or_path=model_name_or_path)
    head = ActionDecoder.load_pretrained(folder)
    encoder = build_encoder(spec)
    model = build_model(
        spec,
        encoder,
        num_classes=head.num_classes,
        decoder_type=head.decoder_type,
        mlp_hidden_size=head.mlp_hidden_size if head.decoder_type == "mlp" else None,
        seed=0,
    )
    load_adapter(model.backbone, folder)
    model.head.load_state_dict(head.state_dict())
    token_path = folder / ACTION_TOKEN_NAME
    if not token_path.is_file():
        raise ValueError(f"{token_path} does not exist; {folder} is not a whole checkpoint")
    model.action_token.load_state_dict(load_file(token_path))
    return model.eval().requires_grad_(False), encoder, spec


def read_spec(folder: Path) -> ModelSpec:
    """The ModelSpec of a checkpoint folder. Raises ValueError when it is none."""
    path = folder / SPEC_NAME
    try:
        return ModelSpec(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint: it has no {SPEC_NAME}") from None
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error}") from None


def _below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
