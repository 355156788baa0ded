"""Sizes of Qwen2.5-VL: of the built-in model, as published, and as a checkpoint's config.json says. Nothing heavy."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY = "tiny"
MODEL_TYPE = "qwen2_5_vl"
TINY_TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# What all towers of the family have in common.
VISION_GEOMETRY: dict[str, Any] = {
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "tokens_per_second": 2,
}
TINY_VISION: dict[str, Any] = {
    **VISION_GEOMETRY,
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 128,
    "fullatt_block_indexes": [1],
}
# Where the published sizes differ; all vision towers are alike but for their output and intermediate_size.
PUBLISHED_SHAPES: dict[str, dict[str, Any]] = {
    "3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "32b": {
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "72b": {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
VISION_INTERMEDIATE = {"3b": 3420, "7b": 3420, "32b": 3456, "72b": 3456}


def published_vision(name: str) -> dict[str, Any]:
    """The vision_config of a published shape."""
    return {
        **VISION_GEOMETRY,
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": VISION_INTERMEDIATE[name],
        "num_heads": 16,
        "out_hidden_size": PUBLISHED_SHAPES[name]["hidden_size"],
        "fullatt_block_indexes": [7, 15, 23, 31],
    }


@dataclass(frozen=True)
class Layers:
    """A stack of transformer layers. kv_heads: as many as heads in the vision tower. inner: of the SwiGLU."""

    count: int
    width: int
    inner: int
    heads: int
    kv_heads: int

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width


@dataclass(frozen=True)
class Architecture:
    """The sizes of one model. patch_values: of a patch, 3 colours. window: side of an attention window in tokens.
    full_blocks: how many of the tower's blocks look at whole frames."""

    name: str
    vocabulary: int
    text: Layers
    vision: Layers
    patch_size: int
    temporal_patch: int
    merge: int
    window: int
    full_blocks: int

    @property
    def patch_values(self) -> int:
        return 3 * self.temporal_patch * self.patch_size**2

    @property
    def merged(self) -> int:
        """Width of the patches of one token side by side, which the merger reads."""
        return self.vision.width * self.merge**2

    @property
    def embedding_weights(self) -> int:
        return self.vocabulary * self.text.width

    @property
    def text_weights(self) -> int:
        """All weights of the language model's layers and its last norm: biases at q, k and v."""
        t = self.text
        attention = t.width * (2 * t.width + 2 * t.kv_width) + t.width + 2 * t.kv_width
        return t.count * (attention + 3 * t.width * t.inner + 2 * t.width) + t.width

    @property
    def vision_weights(self) -> int:
        """All weights of the tower's blocks and patch embedding: biases at every linear layer but that embedding."""
        v = self.vision
        block = v.width * (4 * v.width + 3 * v.inner) + 5 * v.width + 2 * v.inner + 2 * v.width
        return v.count * block + self.patch_values * v.width

    @property
    def merger_weights(self) -> int:
        m = self.merged
        return self.vision.width + m * m + m + m * self.text.width + self.text.width

    @property
    def weights(self) -> int:
        """Of the backbone, without a vocabulary head."""
        return self.embedding_weights + self.text_weights + self.vision_weights + self.merger_weights


def architecture(text: dict[str, Any], vision: dict[str, Any], name: str) -> Architecture:
    """From the two parts of a Qwen2.5-VL config. Raises KeyError for a missing size."""
    layers = (
        Layers(
            text["num_hidden_layers"],
            text["hidden_size"],
            text["intermediate_size"],
            text["num_attention_heads"],
            text["num_key_value_heads"],
        ),
        Layers(
            vision["depth"],
            vision["hidden_size"],
            vision["intermediate_size"],
            vision["num_heads"],
            vision["num_heads"],
        ),
    )
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    return Architecture(
        name,
        text["vocab_size"],
        *layers,
        patch_size=patch,
        temporal_patch=vision["temporal_patch_size"],
        merge=merge,
        window=vision["window_size"] // patch // merge,
        full_blocks=len(vision["fullatt_block_indexes"]),
    )


def read_architecture(name_or_path: str) -> tuple[Architecture, bool]:
    """The sizes of "tiny", of a local folder's config.json, or, where there is no such folder, of the published model
    that the name says (3b, 7b, 32b, 72b); and whether they were read rather than looked up.

    Raises ValueError naming the model when it is none of these, and for a config.json that is no Qwen2.5-VL's.
    """
    if name_or_path == TINY:
        return architecture(TINY_TEXT, TINY_VISION, TINY), True
    path = Path(name_or_path) / "config.json"
    if path.is_file():
        return _read_config(path), True
    found = re.search(rf"(?<![0-9a-z])({'|'.join(PUBLISHED_SHAPES)})(?![0-9a-z])", name_or_path.lower())
    if found is None or Path(name_or_path).exists():
        raise ValueError(
            f"model_name_or_path: {name_or_path!r} has no config.json, and its name is no published size; legal: "
            f"{TINY}, a Qwen2.5-VL folder, or a name with {', '.join(PUBLISHED_SHAPES)} in it"
        )
    size = found[1]
    return architecture(PUBLISHED_SHAPES[size], published_vision(size), f"Qwen2.5-VL-{size.upper()}"), False


def _read_config(path: Path) -> Architecture:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model_type = values["model_type"]
        text = values.get("text_config", values)  # published files have the language model's keys at the top
        found = architecture(text, VISION_GEOMETRY | values["vision_config"], path.parent.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no Qwen2.5-VL config: {error!r}") from None
    if model_type != MODEL_TYPE:
        raise ValueError(f"{path}: model_type is {model_type!r}; it must be {MODEL_TYPE!r}")
    return found
