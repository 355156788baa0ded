"""From options to a classifier, and between a classifier and a folder that plain transformers and peft can read.

A folder holds vidcls_model.json (this module's ModelSpec), what was trained of the backbone (an adapter in PEFT's
format, whole weights, or both), the <ACTION> embedding, the tokenizer, and below heads/ each head with its label map.
The base model's weights stay where they are.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vidcls.manifest import is_sealed, verify
from vidcls.model.classifier import ActionClassifier, ActionToken
from vidcls.model.heads import ActionDecoder
from vidcls.model.kernels import apply_liger, compile_layers, resolve_attention, resolve_liger
from vidcls.model.language_head import LanguageHead
from vidcls.model.patches import VisionGeometry
from vidcls.model.prompt import PromptEncoder
from vidcls.model.stored import differing_shapes, read_shapes, read_tensors
from vidcls.model.tokens import action_token_init, load_tokenizer
from vidcls.model.tuning import (
    TUNED_WEIGHTS_NAME,
    TuningSettings,
    check_adapter_fits,
    load_adapter,
    load_tuned,
    save_adapter,
    save_tuned,
    tune,
)
from vidcls.model.weights import Partition, empty_backbone, fingerprint, load_backbone, load_config, load_language_head

SPEC_NAME = "vidcls_model.json"
ACTION_TOKEN_NAME = "action_token.safetensors"
HEADS_NAME = "heads"
LABELS_NAME = "label_map.json"  # of a head; written and read by those who know data: training, evaluation, prediction
PREPROCESSING_NAME = "preprocessing.json"
HERE = "."  # as model_name_or_path: the base model is in the checkpoint's own folder
TRAINING_ONLY = ("training_state", "deepspeed/")  # how the names of files begin that inference does not read


@dataclass(frozen=True)
class ModelSpec:
    """What is needed, beside weights, to build the classifier and its inputs again.

    base_weights: the base model's fingerprint (weights.fingerprint), wherever its folder is by now. prompts: by head,
    in the order of the heads; for clips that come with none of their own.
    """

    model_name_or_path: str
    base_weights: str
    bf16: bool
    flash_attn: str
    enable_liger_kernel: bool
    tuning: TuningSettings
    action_token: str
    template: str
    prompts: dict[str, str]
    video_maxlen: int
    frame_sampling: str
    dense_stride: int
    video_min_pixels: int
    video_max_pixels: int
    image_max_pixels: int | None
    cutoff_len: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def notices(self) -> list[str]:
        """What this machine cannot give, and what is used instead."""
        found = [resolve_attention(self.flash_attn)[1], resolve_liger(self.enable_liger_kernel)]
        return [notice for notice in found if notice]


@dataclass(frozen=True)
class TrainingExtras:
    """What only training asks of a model.

    answers: give it the vocabulary matrix for a loss on answers. adapter: a folder to start the adapters from, and
    <ACTION> too where it holds one, as a checkpoint does: an adapter was trained together with it.
    """

    gradient_checkpointing: bool = False
    torch_compile: bool = False
    answers: bool = False
    adapter: Path | None = None
    share_prefix: bool = True


def build_encoder(spec: ModelSpec, *, trust_remote_code: bool = False) -> PromptEncoder:
    """The host side of the model: texts, positions and frame sizes. Reads no weights.

    Raises:
        ValueError: the base model is no Qwen2.5-VL, or lacks a spare token row.
    """
    config = load_config(spec.model_name_or_path)
    tokenizer, _ = load_tokenizer(spec.model_name_or_path, spec.action_token, trust_remote_code=trust_remote_code)
    return PromptEncoder(
        tokenizer,
        VisionGeometry.from_config(config),
        config.video_token_id,
        spec.cutoff_len,
        spec.video_min_pixels,
        spec.video_max_pixels,
        image_max_pixels=spec.image_max_pixels,
        action_token=spec.action_token,
        template=spec.template,
    )


def build_model(
    spec: ModelSpec,
    encoder: PromptEncoder,
    heads: Mapping[str, ActionDecoder],
    *,
    seed: int,
    extras: TrainingExtras | None = None,
    partition: Partition | None = None,
) -> ActionClassifier:
    """A classifier ready to train: adapters initialised from `seed`, <ACTION> from words, or both from
    `extras.adapter`; all else frozen.

    Args:
        heads: by name, as in `spec.prompts`.
        partition: the context that modules are built in under ZeRO-3 (weights.load_backbone); all ranks call it then.

    Raises:
        ValueError: the base model, or `extras.adapter` (see `check_adapter`), does not fit; names the file.
    """
    extras = extras or TrainingExtras()
    attention, _ = resolve_attention(spec.flash_attn)
    base = spec.model_name_or_path
    initial_D = action_token_init(base, encoder.tokenizer, spec.dtype)
    if extras.adapter is not None:
        check_adapter(extras.adapter, spec)
        if (token_path := extras.adapter / ACTION_TOKEN_NAME).is_file():
            initial_D = read_tensors(token_path)["weight"].to(spec.dtype)
    token = ActionToken(initial_D)
    backbone = load_backbone(base, dtype=spec.dtype, attn_implementation=attention, partition=partition)
    language_head = None
    if extras.answers:
        matrix = load_language_head(base, dtype=spec.dtype)
        if matrix is None:
            language_head = LanguageHead(backbone.language_model.embed_tokens.weight)
        else:
            with contextlib.nullcontext() if partition is None else partition():
                language_head = LanguageHead(nn.Parameter(matrix, requires_grad=False))
    apply_liger(backbone, spec.enable_liger_kernel)
    tuned: Any = tune(backbone, spec.tuning, seed=seed)
    if extras.adapter is not None:
        load_adapter(tuned, extras.adapter)
    model = ActionClassifier(
        tuned,
        heads,
        token,
        action_token_id=encoder.action_token_id,
        geometry=encoder.geometry,
        language_head=language_head,
        share_prefix=extras.share_prefix,
    )
    if extras.gradient_checkpointing:
        # On the parts with layers only: on the whole model it would hook the frozen vision tower too. Not reentrant,
        # because the reentrant form drops every LoRA gradient when the inputs need none.
        model.inner.language_model.activation_checkpointing_enable({"use_reentrant": False})
        if spec.tuning.vision_tuning != "frozen":
            model.inner.visual.activation_checkpointing_enable({"use_reentrant": False})
    if extras.torch_compile:
        compile_layers(model.inner)
    return model


def check_adapter(folder: Path, spec: ModelSpec) -> None:
    """Raise ValueError unless `build_model` can start from the adapter in `folder`. Reads headers only, no weights.

    Beside what `tuning.check_adapter_fits` looks at, a checkpoint with whole trained weights of the backbone is
    refused, as its adapter means nothing without them; and an <ACTION> beside the adapter must have the model's width.
    The settings must have LoRA somewhere.
    """
    if (tuned := folder / TUNED_WEIGHTS_NAME).exists():
        raise ValueError(
            f"adapter_name_or_path: {tuned} holds trained weights of the backbone, without which the adapter beside "
            f"them does not work; write a base model with them in place and set model_name_or_path to it, and "
            f"adapter_name_or_path to a folder without {TUNED_WEIGHTS_NAME}"
        )
    empty = empty_backbone(spec.model_name_or_path, dtype=torch.float32)  # on the meta device DoRA's are always that
    with torch.device("meta"):
        model: Any = tune(empty, spec.tuning, seed=0)
    check_adapter_fits(model, folder)
    if (token_path := folder / ACTION_TOKEN_NAME).exists():
        _check_action_token(token_path, read_shapes(token_path), empty.config.get_text_config().hidden_size)


def save_model(
    folder: Path,
    model: ActionClassifier,
    spec: ModelSpec,
    weights: dict[str, torch.Tensor],
    tokenizer: Any,
) -> None:
    """Write everything but label maps and the training state. One process calls it.

    Args:
        weights: trained parameters, whole, by the classifier's parameter names (the module's own may be partitioned).
    """
    write_spec(folder, spec)
    backbone = _below(weights, "backbone.")
    if spec.tuning.has_lora:
        save_adapter(model.backbone, backbone, folder, base=spec.model_name_or_path)
    save_tuned(backbone, folder)
    for name, head in model.heads.items():
        assert isinstance(head, ActionDecoder)
        head.save_pretrained(head_folder(folder, name), state=_below(weights, f"heads.{name}."))
    save_file(_below(weights, "action_token."), folder / ACTION_TOKEN_NAME)
    tokenizer.save_pretrained(folder)


def load_model(
    folder: Path, *, model_name_or_path: str | None = None, trust_remote_code: bool = False
) -> tuple[ActionClassifier, PromptEncoder, ModelSpec]:
    """The classifier stored in `folder`, in eval mode, on the host.

    Args:
        model_name_or_path: where the base model is now, if it has moved since training.
        trust_remote_code: let the base model's own tokenizer code run; a checkpoint never switches that on itself.

    Raises:
        ValueError: a file is missing, differs from what was saved, or does not fit the base model; names it.
    """
    if is_sealed(folder):
        verify(folder, skip=TRAINING_ONLY)
    spec = read_spec(folder)
    if model_name_or_path is not None:
        spec = replace(spec, model_name_or_path=model_name_or_path)
    if fingerprint(spec.model_name_or_path) != spec.base_weights:
        raise ValueError(f"{spec.model_name_or_path} holds other weights than the base model of {folder}")
    encoder = build_encoder(spec, trust_remote_code=trust_remote_code)
    heads = {name: ActionDecoder.load_pretrained(head_folder(folder, name)) for name in spec.prompts}
    model = build_model(spec, encoder, heads, seed=0)
    load_backbone_tuning(model, folder)
    return model.eval().requires_grad_(False), encoder, spec


def load_backbone_tuning(model: ActionClassifier, folder: Path) -> None:
    """Put what was trained of the backbone, and <ACTION>, into a model built from the folder's spec."""
    if hasattr(model.backbone, "peft_config"):
        load_adapter(model.backbone, folder)
    load_tuned(model.backbone, folder)
    token_path = folder / ACTION_TOKEN_NAME
    if not token_path.is_file():
        raise ValueError(f"{token_path} does not exist; {folder} is not a whole checkpoint")
    tensors = read_tensors(token_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_action_token(token_path, shapes, model.action_token.weight.numel())
    model.action_token.load_state_dict(tensors)


def head_folder(folder: Path, name: str) -> Path:
    """Where a head of the checkpoint in `folder` is: its weights, label map and preprocessing settings."""
    return folder / HEADS_NAME / name


def write_spec(folder: Path, spec: ModelSpec) -> None:
    text = json.dumps(asdict(spec), indent=2, ensure_ascii=False)
    (folder / SPEC_NAME).write_text(text + "\n", encoding="utf-8")


def read_spec(folder: Path) -> ModelSpec:
    """The ModelSpec of a checkpoint folder. Raises ValueError when it is none."""
    path = folder / SPEC_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        tuning = values.pop("tuning")
        if isinstance(tuning["lora_target"], list):
            tuning["lora_target"] = tuple(tuning["lora_target"])
        if values["model_name_or_path"] == HERE:
            values["model_name_or_path"] = str(folder)
        return ModelSpec(**values, tuning=TuningSettings(**tuning))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint: it has no {SPEC_NAME}") from None
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error}") from None


def _check_action_token(path: Path, found: Mapping[str, tuple[int, ...]], width: int) -> None:
    if differing := differing_shapes(found, {"weight": (width,)}):
        raise ValueError(f"{path}: {differing}")


def _below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
