"""Load Qwen2.5-VL without its vocabulary head, frozen; add LoRA; take <ACTION> into the tokenizer."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AddedToken,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
)

from vidcls.config import ACTION_TOKEN
from vidcls.model.tiny import TINY, tiny_backbone, tiny_config, tiny_tokenizer

MODEL_TYPE = "qwen2_5_vl"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Full paths, because the vision tower's blocks have gate_proj, up_proj and down_proj of their own.
LORA_TARGETS = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# The embedding of <ACTION> starts at the mean of what these words mean to the model.
ACTION_WORDS = (" action", " activity", " movement", " doing")


def load_config(name_or_path: str) -> Qwen2_5_VLConfig:
    """The config of "tiny" or of a local model folder; raises ValueError naming the path otherwise."""
    if name_or_path == TINY:
        return tiny_config()
    path = Path(name_or_path) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model is {name_or_path!r}; it must be {TINY!r} or a local folder with a config.json "
            "(nothing is downloaded)"
        )
    found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if found != MODEL_TYPE:
        raise ValueError(f"{path}: model_type is {found!r}; it must be {MODEL_TYPE!r}")
    return Qwen2_5_VLConfig.from_pretrained(name_or_path, local_files_only=True)


def load_tokenizer(name_or_path: str) -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer with <ACTION> as one special token, and that token's id.

    The token takes a spare row of the embedding table: Qwen2.5-VL has 151,936 rows for 151,665 tokens. The
    table is never resized (resizing it to the tokenizer's length would shrink it). A folder whose tokenizer
    already has <ACTION> keeps its id. Raises ValueError when there is no row left.
    """
    text_config: Any = load_config(name_or_path).text_config
    rows = text_config.vocab_size
    tokenizer: Any
    if name_or_path == TINY:
        tokenizer = tiny_tokenizer()
    else:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True, trust_remote_code=False)
    tokenizer.add_tokens([AddedToken(ACTION_TOKEN, special=True, normalized=False)], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(ACTION_TOKEN)
    if token_id >= rows:
        raise ValueError(
            f"{name_or_path}: {ACTION_TOKEN} gets id {token_id}, the embedding table has {rows} rows; "
            "the model needs one spare row"
        )
    return tokenizer, token_id


def load_backbone(name_or_path: str, *, dtype: torch.dtype, attn_implementation: str | None = None) -> Qwen2_5_VLModel:
    """Vision tower and language model, frozen, in eval mode, parameters in `dtype`.

    `Qwen2_5_VLModel` has no vocabulary head, so a tied and an untied checkpoint load alike. Raises
    ValueError when the folder's weights and the architecture do not match.
    """
    if name_or_path == TINY:
        model = tiny_backbone(attn_implementation=attn_implementation)
        # Parameters only: `model.to(dtype)` would also round the rotary frequencies, which are buffers.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    else:
        model = _load_folder(name_or_path, dtype, attn_implementation)
    model.config.use_cache = False
    text_config: Any = model.config.text_config
    text_config.use_cache = False
    return model.requires_grad_(False).eval()


def _load_folder(name_or_path: str, dtype: torch.dtype, attn_implementation: str | None) -> Qwen2_5_VLModel:
    loaded: Any = Qwen2_5_VLModel.from_pretrained(
        name_or_path,
        config=load_config(name_or_path),
        dtype=dtype,
        attn_implementation=attn_implementation,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith("lm_head."))
    if missing or unexpected:
        raise ValueError(
            f"{name_or_path}: the weights do not fit Qwen2.5-VL: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    return model


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters: their rank, the scale alpha / rank, and dropout on their input."""

    rank: int
    alpha: float
    dropout: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")


def add_lora(backbone: Qwen2_5_VLModel, settings: LoraSettings, *, seed: int) -> PeftModel:
    """Put LoRA on every linear layer of the language model, none of the vision tower.

    The initial weights depend on `seed` alone; the adapters have the backbone's dtype, because ZeRO-3
    wants one dtype for all that trains. `backbone` is changed in place.
    """
    dtype = next(backbone.parameters()).dtype
    alpha: Any = settings.alpha  # PEFT only divides it by the rank, but annotates it as a whole number
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout, target_modules=LORA_TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(backbone, config, autocast_adapter_dtype=False)
    assert all(parameter.dtype == dtype for parameter in model.parameters() if parameter.requires_grad)
    return model


def lora_counts(model: nn.Module) -> dict[str, int]:
    """How many adapted modules there are on each side: {"language": ..., "vision": ...}."""
    names = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    language = sum("language_model." in name for name in names)
    return {"language": language, "vision": len(names) - language}


def action_token_init(backbone: Qwen2_5_VLModel, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Where the embedding of <ACTION> starts, [D] in the backbone's dtype: the mean over `ACTION_WORDS`.

    The token's own row in the table was never trained and is not used: a mean of real embeddings has their
    scale and a related meaning.
    """
    ids = [i for word in ACTION_WORDS for i in tokenizer.encode(word, add_special_tokens=False)]
    weight = backbone.language_model.embed_tokens.weight
    rows = weight.detach()[torch.tensor(ids, device=weight.device)].float()
    return rows.mean(dim=0).to(weight.dtype)


def save_adapter(model: PeftModel, weights: dict[str, torch.Tensor], folder: Path, *, base: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json as `PeftModel.from_pretrained` reads them.

    `weights` are whole tensors by the PeftModel's parameter names (its own may be partitioned); `base` is noted
    as the model they belong to.
    """
    # save_embedding_layers: the default looks the base model up on the hub and may add its embedding table.
    tensors = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS_NAME)
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = base
    config.inference_mode = True
    # Which class the parameter names belong to: PEFT loads an adapter onto another one without a word.
    config.auto_mapping = {"base_model_class": "Qwen2_5_VLModel", "parent_library": "transformers"}
    config.save_pretrained(str(folder))


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put a saved adapter's weights into `model`, which `add_lora` made.

    Raises ValueError when the file is missing, or when its tensors are not exactly those of the model.
    """
    path = folder / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {folder} is not a folder with an adapter")
    tensors = load_file(path)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if differing := sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)):
        name = differing[0]
        raise ValueError(
            f"{path}: {len(differing)} tensors do not fit the base model, the first is {name}: stored "
            f"{found.get(name, 'not at all')}, needed {expected.get(name, 'not at all')}"
        )
    set_peft_model_state_dict(model, tensors)
