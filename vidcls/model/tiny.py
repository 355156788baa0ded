"""The built-in model "tiny": Qwen2.5-VL's architecture at a size for tests and first runs, no download.

Its weights are random but always the same, so two runs, two ranks and a reload agree on the frozen part.
"""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLModel

from vidcls.model.shapes import TINY_TEXT, TINY_VISION

WEIGHTS_SEED = 20250217
# Deviation of the weights. The published 0.02 is about 1 / sqrt(2048), the 3B model's width; at these widths it leaves
# attention flat, and LoRA on top learns nothing from where and when something moves.
TEXT_STD = 0.09
VISION_STD = 0.08
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL_IDS = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}


def tiny_config() -> Qwen2_5_VLConfig:
    """A two-layer Qwen2.5-VL with the real geometry: 14 pixel patches, 2x2 merging, 112 pixel windows."""
    text = {
        **TINY_TEXT,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "bos_token_id": SPECIAL_IDS["<|endoftext|>"],
        "eos_token_id": SPECIAL_IDS["<|im_end|>"],
        "use_cache": False,
        "initializer_range": TEXT_STD,
    }
    vision = {**TINY_VISION, "initializer_range": VISION_STD}
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=SPECIAL_IDS["<|image_pad|>"],
        video_token_id=SPECIAL_IDS["<|video_pad|>"],
        vision_start_token_id=SPECIAL_IDS["<|vision_start|>"],
        vision_end_token_id=SPECIAL_IDS["<|vision_end|>"],
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 0 to 255) and Qwen's special tokens behind them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def tiny_backbone(*, attn_implementation: str | None = None) -> Qwen2_5_VLModel:
    """The float32 model; its weights depend on nothing but `WEIGHTS_SEED`, and no global state moves."""
    config = tiny_config()
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    # devices=[]: everything is drawn on the CPU, whatever accelerator the run uses.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(WEIGHTS_SEED)
        return Qwen2_5_VLModel(config)
