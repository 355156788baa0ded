"""What trains of the backbone: adapters, whole weights, or nothing; by part, by name, and to and from a folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2_5_VLModel

from vidcls.model.stored import differing_shapes, read_shapes, read_tensors
from vidcls.model.weights import own_trained_weights

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
TUNED_WEIGHTS_NAME = "backbone.safetensors"
PEFT_PREFIX = "base_model.model."
# How PEFT calls the embedding table's rows that an adapter holds, beside LoRA with TOKEN_ADAPTER in front.
EMBEDDINGS, TOKEN_ADAPTER, TOKEN_ROWS = "embed_tokens", "token_adapter.", "trainable_tokens_delta"

FINETUNING_TYPES = ("lora", "full", "freeze")
PART_TUNINGS = ("frozen", "lora", "full")
# The linear layers that LoRA can be on, as a pattern around the module's name. By full path, because the vision
# blocks have gate_proj, up_proj and down_proj of their own.
LANGUAGE_LAYERS = r"language_model\.layers\.\d+\.(?:self_attn|mlp)\.(?:{})"
LANGUAGE_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION_LAYERS = r"visual\.blocks\.\d+\.(?:attn\.qkv|attn\.proj|mlp\.(?:gate|up|down)_proj)"
MERGER_LAYERS = r"visual\.merger\.mlp\.[02]"  # between them stands the GELU
# What decides an adapter's function beside its tensors: PEFT loads it with other numbers without a word.
ADAPTER_NUMBERS = ("r", "lora_alpha", "use_dora", "use_rslora")
# The others (pissa, olora, ...) change the base weights themselves, which stand in no adapter's file.
PLAIN_INITS = (True, False, "gaussian")

Part = Literal["language", "vision", "merger", "head", "action_token"]


@dataclass(frozen=True)
class TuningSettings:
    """What of the backbone trains, and the adapters' numbers where there are any.

    finetuning_type is about the language model: adapters, all its layers, or nothing. The vision tower and its merger
    (the two layers that bring it to the language model's width) have settings of their own. lora_target names the
    language model's layers with adapters; in tower and merger they are on every linear layer. Without lora_alpha it
    is twice the rank.
    """

    finetuning_type: str = "lora"
    vision_tuning: str = "frozen"
    merger_tuning: str = "frozen"
    lora_rank: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_target: str | tuple[str, ...] = "all"
    use_dora: bool = False
    use_rslora: bool = False

    def __post_init__(self) -> None:
        legal = {"finetuning_type": FINETUNING_TYPES, "vision_tuning": PART_TUNINGS, "merger_tuning": PART_TUNINGS}
        for name, choices in legal.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank is {self.lora_rank}; it must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"lora_alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must be in [0, 1)")
        for name in ("use_dora", "use_rslora"):
            if getattr(self, name) and not self.has_lora:
                raise ValueError(f"{name} is true, but nothing is tuned with LoRA; it must be false")
        if self.lora_target != "all":
            self._check_target()

    def _check_target(self) -> None:
        if isinstance(self.lora_target, str) or not self.lora_target:
            raise ValueError(f"lora_target is {self.lora_target!r}; it must be 'all' or a tuple of module names")
        if unknown := sorted(set(self.lora_target) - set(LANGUAGE_NAMES)):
            raise ValueError(
                f"lora_target has {', '.join(unknown)}; linear layers of the language model are "
                f"{', '.join(LANGUAGE_NAMES)}"
            )
        if self.finetuning_type != "lora":
            raise ValueError(
                f"lora_target is {self.lora_target!r}; with finetuning_type {self.finetuning_type!r} it must be 'all'"
            )

    @property
    def alpha(self) -> float:
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def tuned(self) -> dict[str, str]:
        """How each part of the backbone is tuned: "lora", "full" or "frozen"."""
        language = "frozen" if self.finetuning_type == "freeze" else self.finetuning_type
        return {"language": language, "vision": self.vision_tuning, "merger": self.merger_tuning}

    @property
    def has_lora(self) -> bool:
        return "lora" in self.tuned.values()

    @property
    def lora_pattern(self) -> str:
        """The regular expression that PEFT matches with whole module names; "" without LoRA."""
        names = LANGUAGE_NAMES if self.lora_target == "all" else self.lora_target
        layers = {
            "language": LANGUAGE_LAYERS.format("|".join(names)),
            "vision": VISION_LAYERS,
            "merger": MERGER_LAYERS,
        }
        return "|".join(layers[part] for part, how in self.tuned.items() if how == "lora")


def tune(backbone: Qwen2_5_VLModel, settings: TuningSettings, *, seed: int) -> nn.Module:
    """Make a frozen backbone trainable as `settings` say, in place.

    Returns PEFT's wrapper around it when anything has LoRA, otherwise the backbone itself. The adapters' initial
    weights depend on `seed` alone and have the backbone's dtype, because ZeRO-3 wants one dtype for all that trains.

    "full" in the language model is every weight of its layers and the last norm, but not the embedding table: a
    prompt reads a few dozen of its 151,936 rows, and gradient, master and moments are dense over all of them. What a
    prompt needs of it, <ACTION>, is a parameter of its own.
    """
    model: nn.Module = backbone
    if settings.has_lora:
        model = _add_lora(backbone, settings, seed)
    for name, parameter in backbone.named_parameters():
        # After PEFT, which freezes all that it wraps.
        if settings.tuned[parameter_part(f"backbone.{name}")] == "full" and ".embed_tokens." not in name:
            parameter.requires_grad_(True)
    own_trained_weights(backbone)
    return model


def _add_lora(backbone: Qwen2_5_VLModel, settings: TuningSettings, seed: int) -> PeftModel:
    dtype = next(backbone.parameters()).dtype
    alpha: Any = settings.alpha  # PEFT only divides it by the rank, but annotates it as a whole number
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_pattern,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(backbone, config, autocast_adapter_dtype=False)
    assert all(parameter.dtype == dtype for parameter in model.parameters() if parameter.requires_grad)
    return model


def parameter_part(name: str) -> Part:
    """The part of an ActionClassifier that its parameter `name` belongs to. Raises ValueError for any other name."""
    owner, _, path = name.partition(".")
    if owner == "backbone":
        path = path.removeprefix(PEFT_PREFIX)
        if path.startswith("visual.merger."):
            return "merger"
        return "vision" if path.startswith("visual.") else "language"
    parts: dict[str, Part] = {
        "head": "head",
        "heads": "head",
        "action_token": "action_token",
        "language_head": "language",
    }
    if owner not in parts:
        raise ValueError(f"{name!r} is no parameter of an ActionClassifier; they start with backbone or {list(parts)}")
    return parts[owner]


def parameter_kind(name: str, parameter: torch.Tensor) -> Literal["lora", "full", "frozen"]:
    """How a parameter is tuned: as a low-rank adapter (DoRA's magnitudes too), itself, or not at all."""
    if not parameter.requires_grad:
        return "frozen"
    return "lora" if ".lora_" in name else "full"


@dataclass(frozen=True)
class TunedPart:
    """A line of the table of what trains; `modules` are those with an adapter or with weights that train."""

    part: str
    kind: str
    modules: int
    trainable: int
    frozen: int


def trained_table(model: nn.Module) -> list[TunedPart]:
    """What trains of an ActionClassifier, part after part, each head by its name; parameters are whole ones, also
    where they are partitioned."""
    counts: dict[str, dict[str, int]] = {}
    kinds: dict[str, set[str]] = {}
    modules: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        part = _part_title(name)
        kind = parameter_kind(name, parameter)
        line = counts.setdefault(part, {"trainable": 0, "frozen": 0})
        line["frozen" if kind == "frozen" else "trainable"] += int(getattr(parameter, "ds_numel", parameter.numel()))
        if kind != "frozen":
            kinds.setdefault(part, set()).add(kind)
            # An adapter's parameters are named MODULE.lora_A.default.weight.
            owner = name.partition(".lora_")[0] if kind == "lora" else name.rpartition(".")[0]
            modules.setdefault(part, set()).add(owner)
    return [
        TunedPart(part, "+".join(sorted(kinds.get(part, {"frozen"}))), len(modules.get(part, ())), **line)
        for part, line in counts.items()
    ]


def _part_title(name: str) -> str:
    part = parameter_part(name)
    if part == "head":
        return f"head {name.split('.')[1]}" if name.startswith("heads.") else "head"
    return "<ACTION>" if part == "action_token" else part


def format_table(rows: list[TunedPart]) -> list[str]:
    """The table as lines of text, with a header."""
    cells = [("part", "tuned", "modules", "trainable", "frozen")]
    cells += [(r.part, r.kind, f"{r.modules:,}", f"{r.trainable:,}", f"{r.frozen:,}") for r in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    lines = []
    for row in cells:
        left = [row[column].ljust(widths[column]) for column in (0, 1)]
        lines.append("  ".join([*left, *(row[column].rjust(widths[column]) for column in (2, 3, 4))]))
    return lines


def save_adapter(model: PeftModel, weights: dict[str, torch.Tensor], folder: Path, *, base: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json as `PeftModel.from_pretrained` reads them.

    `weights` are whole tensors by the PeftModel's parameter names (its own may be partitioned); `base` is noted
    as the model they belong to.
    """
    # save_embedding_layers: the default looks the base model up on the hub and may add its embedding table.
    tensors = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS_NAME)
    _save_adapter_config(copy.deepcopy(model.peft_config["default"]), folder, base)


def _save_adapter_config(config: PeftConfig, folder: Path, base: str) -> None:
    config.base_model_name_or_path = base
    config.inference_mode = True
    # Which class the parameter names belong to: PEFT loads an adapter onto another one without a word.
    config.auto_mapping = {"base_model_class": "Qwen2_5_VLModel", "parent_library": "transformers"}
    config.save_pretrained(str(folder))


def save_adapter_with_token(
    model: nn.Module, row_D: torch.Tensor, token_id: int, folder: Path, *, dtype: torch.dtype, base: str
) -> None:
    """Write an adapter that holds the embedding of <ACTION> too, so that plain PEFT has all that was trained.

    PEFT puts such rows in place of the table's (`trainable_token_indices`). A backbone without adapters gets one that
    is nothing but the row.

    Args:
        model: as `tune` made it, in memory as a whole.
        row_D: the embedding. token_id: its row in the table.
        dtype: of the stored weights.
        base: noted as the model they belong to.
    """
    tensors: dict[str, torch.Tensor] = {}
    config: PeftConfig
    if isinstance(model, PeftModel):
        tensors = dict(get_peft_model_state_dict(model, save_embedding_layers=False))
        lora: Any = copy.deepcopy(model.peft_config["default"])
        lora.trainable_token_indices = {EMBEDDINGS: [token_id]}
        config, name = lora, f"{TOKEN_ADAPTER}{TOKEN_ROWS}"
    else:
        config, name = TrainableTokensConfig(token_indices=[token_id], target_modules=[EMBEDDINGS]), TOKEN_ROWS
    tensors[f"{PEFT_PREFIX}language_model.{EMBEDDINGS}.{name}"] = row_D[None]
    save_file({key: t.to(dtype).contiguous() for key, t in tensors.items()}, folder / ADAPTER_WEIGHTS_NAME)
    _save_adapter_config(config, folder, base)


def merge_adapter(model: nn.Module, *, dtype: torch.dtype) -> Qwen2_5_VLModel:
    """The backbone with its adapters, if it has any, added to its weights, in `dtype`; `model` is used up.

    Each layer is merged in float32 and rounded once: in bf16 most of a small update is lost.
    """
    if not isinstance(model, PeftModel):
        plain: Any = model.to(dtype)
        return plain
    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.to(torch.float32)
            layer.merge(safe_merge=True)
            layer.to(dtype)
    merged: Any = model.unload()
    return merged.to(dtype)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put a saved adapter's weights into `model`, which `tune` made.

    Raises ValueError as `check_adapter_fits`.
    """
    check_adapter_fits(model, folder)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS_NAME)
    set_peft_model_state_dict(model, {name: t for name, t in tensors.items() if not name.endswith(TOKEN_ROWS)})


def check_adapter_fits(model: PeftModel, folder: Path) -> None:
    """Raise ValueError unless `load_adapter` would work. Reads headers only; `model` may be on the meta device.

    A file is missing or unreadable, its tensors are not exactly those of the model, or it was trained with another
    scale, with other numbers for some layers, or on changed base weights.
    """
    path = folder / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {folder} is not a folder with an adapter")
    _check_adapter_config(model, folder / ADAPTER_CONFIG_NAME)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    # <ACTION> has a parameter of its own here, and a file.
    found = {name: shape for name, shape in read_shapes(path).items() if not name.endswith(TOKEN_ROWS)}
    _check_shapes(path, found=found, expected=own)


def _check_adapter_config(model: PeftModel, path: Path) -> None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: it must hold an adapter's config")
    for name in ("rank_pattern", "alpha_pattern"):
        if stored.get(name):
            raise ValueError(f"{path}: {name} is {stored[name]!r}; it must be empty: one rank and scale for all layers")
    if (init := stored.get("init_lora_weights", True)) not in PLAIN_INITS:
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights too; it must be true, false or "
            "'gaussian'"
        )
    own = model.peft_config["default"]
    for name in ADAPTER_NUMBERS:
        if stored.get(name) != getattr(own, name):
            key = "lora_rank" if name == "r" else name
            raise ValueError(f"{path}: {key} is {stored.get(name)!r}; this model has {getattr(own, name)!r}")


def save_tuned(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the backbone's own trained weights by the plain model's names; no file when there are none.

    `weights` are whole tensors of all that trains, by the backbone's parameter names; adapters are passed over.
    """
    tensors = {_plain_name(name): t.contiguous() for name, t in weights.items() if ".lora_" not in name}
    if tensors:
        save_file(tensors, folder / TUNED_WEIGHTS_NAME)


def load_tuned(backbone: nn.Module, folder: Path) -> None:
    """Put what `save_tuned` wrote into a backbone that `tune` made with the same settings, not partitioned.

    Raises ValueError when the file does not hold exactly the weights that train here.
    """
    path = folder / TUNED_WEIGHTS_NAME
    own = {
        _plain_name(name): parameter
        for name, parameter in backbone.named_parameters()
        if parameter_kind(name, parameter) == "full"
    }
    if own and not path.is_file():
        raise ValueError(f"{path} does not exist; {len(own)} weights of the backbone were trained and belong there")
    tensors = read_tensors(path) if path.is_file() else {}
    _check_shapes(path, found={name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected=own)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _plain_name(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX)


def _check_shapes(path: Path, *, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, torch.Tensor]) -> None:
    needed = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if differing := differing_shapes(found, needed):
        raise ValueError(f"{path}: {differing}")
