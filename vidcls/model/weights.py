"""Load Qwen2.5-VL without its vocabulary head, as little of it as possible: shared pages, or this rank's partition.

A folder is read in each of the layouts its family is saved in, by the names this module's `parameter_name` maps.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from vidcls.model.shapes import MODEL_TYPE, TINY
from vidcls.model.stored import StoredTensors
from vidcls.model.tiny import tiny_backbone, tiny_config

LANGUAGE_HEAD = "lm_head.weight"
TOKEN_EMBEDDINGS = "language_model.embed_tokens.weight"
# Published files; what transformers writes today; what it writes for the model without a head. First match counts.
STORED_PREFIXES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "language_model."),
    ("visual.", "visual."),
    ("language_model.", "language_model."),
    ("model.", "language_model."),
)
# While partitioning, a file is mapped anew after so many bytes: pages that were read once need not stay.
REMAP_BYTES = 256 << 20

Partition: TypeAlias = Callable[[], contextlib.AbstractContextManager[Any]]


def load_config(name_or_path: str) -> Qwen2_5_VLConfig:
    """The config of "tiny" or of a local model folder; raises ValueError naming the path otherwise.

    Old files have the language model's keys at the top level, new ones below text_config.
    """
    if name_or_path == TINY:
        return tiny_config()
    path = Path(name_or_path) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model is {name_or_path!r}; it must be {TINY!r} or a local folder with a config.json "
            "(nothing is downloaded)"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != MODEL_TYPE:
        raise ValueError(f"{path}: model_type is {found!r}; it must be {MODEL_TYPE!r}")
    if "quantization_config" in values:
        raise ValueError(f"{path}: quantization_config is set; the weights must be plain bf16, fp16 or fp32")
    try:
        return Qwen2_5_VLConfig.from_pretrained(name_or_path, local_files_only=True)
    except Exception as error:  # transformers checks fields with exceptions of several kinds
        raise ValueError(f"{path} is no Qwen2.5-VL config: {error}") from error


def load_backbone(
    name_or_path: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    partition: Partition | None = None,
) -> Qwen2_5_VLModel:
    """Vision tower and language model, frozen, in eval mode, parameters in `dtype`; rotary buffers stay float32.

    Without `partition`, weights that are stored in `dtype` stay mapped from their files: ranks of a host share them.
    Who trains one calls `own_trained_weights` first. With `partition`, the context that modules are built in under
    ZeRO-3, each parameter is handed over as soon as it is read; one is whole at a time, and what a rank keeps is what
    that context leaves. Then all ranks must call it.

    `Qwen2_5_VLModel` has no vocabulary head, so a tied and an untied checkpoint load alike.

    Raises:
        ValueError: the folder is no Qwen2.5-VL, or its weights and the architecture do not match; names what.
    """
    model = empty_backbone(name_or_path, dtype=dtype, attn_implementation=attn_implementation)
    tensors: Iterable[tuple[str, torch.Tensor]]
    if name_or_path == TINY:
        tensors = ((name, parameter.detach()) for name, parameter in tiny_backbone().named_parameters())
    else:
        stored = StoredTensors.open(Path(name_or_path))
        names = _match(stored, {name: tuple(p.shape) for name, p in model.named_parameters()})
        streamed = stored.stream(remap_bytes=None if partition is None else REMAP_BYTES)
        tensors = ((names[name], tensor) for name, tensor in streamed if name in names)
    _fill(model, tensors, dtype, partition)
    model.config.use_cache = False
    text_config: Any = model.config.text_config
    text_config.use_cache = False
    return model.requires_grad_(False).eval()


def empty_backbone(name_or_path: str, *, dtype: torch.dtype, attn_implementation: str | None = None) -> Qwen2_5_VLModel:
    """The model with nothing allocated or initialised but the rotary buffers, which no file holds. Reads no weights."""
    config: Any = load_config(name_or_path)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    with init_empty_weights(include_buffers=False):
        return Qwen2_5_VLModel(config)


def load_language_head(name_or_path: str, *, dtype: torch.dtype) -> torch.Tensor | None:
    """The vocabulary matrix [V, D], mapped from its file where `dtype` fits; None where it is the embedding table.

    Raises:
        ValueError: as `load_backbone`; or the matrix is not stored, though it is not the table, or has another shape.
    """
    config: Any = load_config(name_or_path)
    if config.tie_word_embeddings or name_or_path == TINY:
        return None
    stored = StoredTensors.open(Path(name_or_path))
    if LANGUAGE_HEAD not in stored.files:
        raise ValueError(
            f"{name_or_path}: tie_word_embeddings is false and {LANGUAGE_HEAD} is not stored; lm_loss_weight needs it"
        )
    needed = (config.text_config.vocab_size, config.text_config.hidden_size)
    if stored.shapes[LANGUAGE_HEAD] != needed:
        raise ValueError(
            f"{stored.files[LANGUAGE_HEAD]}: {LANGUAGE_HEAD} has shape {stored.shapes[LANGUAGE_HEAD]}; "
            f"it must be {needed}"
        )
    return stored.read(LANGUAGE_HEAD).to(dtype)


def load_token_embeddings(name_or_path: str, ids: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
    """Rows [len(ids), D] of the embedding table, straight from the file: a partitioned model has none to look at."""
    if name_or_path == TINY:
        table = tiny_backbone().language_model.embed_tokens.weight.detach()
    else:
        stored = StoredTensors.open(Path(name_or_path))
        names = [name for name in stored.files if parameter_name(name) == TOKEN_EMBEDDINGS]
        if len(names) != 1:
            raise ValueError(f"{name_or_path}: {len(names)} tensors are {TOKEN_EMBEDDINGS}; it must be stored once")
        table = stored.read(names[0])
    return table[torch.tensor(ids, dtype=torch.long)].to(dtype)


def fingerprint(name_or_path: str) -> str:
    """Equal for equal weights: ranks compare it, since each reads its own host's copy. Raises ValueError as
    `load_config` does, and for a folder without weights."""
    load_config(name_or_path)
    return TINY if name_or_path == TINY else StoredTensors.open(Path(name_or_path)).fingerprint()


def own_trained_weights(model: nn.Module) -> None:
    """Take the parameters that train out of the files' mappings.

    Writing to a mapped weight never reaches the file, but it would copy page by page, and keep the mapping alive.
    Partitioned parameters are left alone.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.numel() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.clone()


def parameter_name(stored: str) -> str | None:
    """The model's name for a stored tensor, in whichever layout; None for what is not below one of its parts."""
    for prefix, inner in STORED_PREFIXES:
        if stored.startswith(prefix):
            return inner + stored.removeprefix(prefix)
    return None


def _match(stored: StoredTensors, needed: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """The parameter of each stored tensor; ValueError unless there is exactly one for each, of its shape."""
    names: dict[str, str] = {}
    sources: dict[str, str] = {}
    unexpected = []
    for name, path in stored.files.items():
        if name == LANGUAGE_HEAD:
            continue
        inner = parameter_name(name)
        if inner not in needed:
            unexpected.append(name)
            continue
        if inner in sources:
            raise ValueError(f"{path}: {name} and {sources[inner]} are the same parameter; it must be stored once")
        if stored.shapes[name] != needed[inner]:
            raise ValueError(f"{path}: {name} has shape {stored.shapes[name]}; it must be {needed[inner]}")
        names[name], sources[inner] = inner, name
    missing = sorted(needed.keys() - sources.keys())
    if missing or unexpected:
        raise ValueError(
            f"{stored.folder}: the weights do not fit Qwen2.5-VL: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    return names


class _Slot(nn.Module):
    """A parameter as a module of its own: what a context does to modules as they are built happens to it alone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor, requires_grad=False)


def _fill(
    model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, partition: Partition | None
) -> None:
    """Put tensors in place of the model's unallocated parameters, each in a `partition` context if there is one."""
    with contextlib.nullcontext() if partition is None else partition():
        for name, tensor in tensors:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, _Slot(tensor.to(dtype)).weight)
            del tensor
    assert not any(parameter.is_meta for parameter in model.parameters())
