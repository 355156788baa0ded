"""Write a Qwen2.5-VL checkpoint of a published shape with random weights, for tests and benchmarks, no download.

    python tools/make_random_checkpoint.py --shape 3b --out models/random-3b
    python tools/make_random_checkpoint.py --shape 3b --out models/random-3b --tokenizer models/Qwen2.5-VL-3B-Instruct

OUT is a local Hugging Face folder with the published tensor names: config.json, sharded bf16 safetensors with their
index, and a tokenizer. Without --tokenizer that is a small byte-level one (one token per byte), whose special tokens
have the published ids. Memory: about 1 GB for every shape. Exit codes: 0 done, 2 wrong options or no room, 130
interrupted; OUT appears only when it is whole.
"""

import argparse
import hashlib
import json
import math
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vidcls.model.tiny import SPECIAL_IDS, tiny_config, tiny_tokenizer

STD = 0.02  # the family's initializer_range
BF16_BYTES = 2
SHARD_BYTES = 1 << 30
INDEX_NAME = "model.safetensors.index.json"
# Published names, and those of transformers' modules.
NAME_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
PUBLISHED_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
# Where the two published sizes differ; both vision towers are alike but for their output.
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
}
SHAPES = ("tiny", *PUBLISHED_SHAPES)


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write: its published name and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BF16_BYTES


def model_config(shape: str) -> Qwen2_5_VLConfig:
    """The config of a shape: "tiny" is the built-in model's, "3b" and "7b" are the published ones.

    Raises ValueError for another shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; legal: {' | '.join(SHAPES)}")
    config = tiny_config() if shape == "tiny" else _published_config(PUBLISHED_SHAPES[shape])
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.dtype = torch.bfloat16
    return config


def plan_tensors(config: Qwen2_5_VLConfig) -> list[TensorPlan]:
    """Every tensor of the checkpoint in the model's order; a tied vocabulary head is not stored."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    plans = [TensorPlan(_published_name(name), tuple(p.shape)) for name, p in model.named_parameters()]
    return [plan for plan in plans if not (config.tie_word_embeddings and plan.name == "lm_head.weight")]


def random_tensor(plan: TensorPlan, seed: int) -> torch.Tensor:
    """bf16 weights that depend on (seed, name, shape) alone: normal with std 0.02, and ones where a norm scales."""
    tensor = torch.empty(plan.shape, dtype=torch.bfloat16)
    if "norm" in plan.name or plan.name.endswith("ln_q.weight"):
        return tensor.fill_(1)
    digest = hashlib.sha256(f"{seed} {plan.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return tensor.normal_(0, STD, generator=generator)


def write_checkpoint(
    out: Path,
    shape: str,
    *,
    seed: int = 0,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the folder `out` and return it; nothing is there before all of it is.

    Args:
        tokenizer: folder to copy the tokenizer from; the built-in one if not given.
        shard_bytes: a file holds at most this many, or one tensor.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        ValueError: unknown shape, `out` is used, too little room on the disk, a tokenizer that does not fit.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {str(out)!r} is not empty; use a new folder")
    config = model_config(shape)
    shards = _split(plan_tensors(config), shard_bytes)
    total = sum(plan.bytes for shard in shards for plan in shard)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    needed = total + (64 << 20)  # config, tokenizer, the index
    if free < needed:
        raise ValueError(f"out: {shape} needs {needed / 1e9:.1f} GB, {out.parent} has {free / 1e9:.1f} GB free")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary, "checkpoint")
        folder.mkdir()
        config.save_pretrained(folder)
        _write_tokenizer(folder, shape, tokenizer)
        _check_tokenizer(folder, config)
        _write_shards(folder, shards, seed, progress)
        folder.replace(out)
    return out


def _published_config(shape: dict[str, Any]) -> Qwen2_5_VLConfig:
    text = {
        **shape,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": PUBLISHED_IDS["<|endoftext|>"],
        "eos_token_id": PUBLISHED_IDS["<|im_end|>"],
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": shape["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=shape["tie_word_embeddings"],
        image_token_id=PUBLISHED_IDS["<|image_pad|>"],
        video_token_id=PUBLISHED_IDS["<|video_pad|>"],
        vision_start_token_id=PUBLISHED_IDS["<|vision_start|>"],
        vision_end_token_id=PUBLISHED_IDS["<|vision_end|>"],
    )


def _published_name(name: str) -> str:
    for module, published in NAME_PREFIXES:
        if name.startswith(module):
            return published + name.removeprefix(module)
    return name


def _split(plans: list[TensorPlan], shard_bytes: int) -> list[list[TensorPlan]]:
    """Consecutive runs of tensors of at most `shard_bytes` each, or of one tensor."""
    shards: list[list[TensorPlan]] = []
    room = 0
    for plan in plans:
        if not shards or plan.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(plan)
        room -= plan.bytes
    return shards


def _write_shards(
    folder: Path, shards: list[list[TensorPlan]], seed: int, progress: Callable[[int, int], None] | None
) -> None:
    total = sum(plan.bytes for shard in shards for plan in shard)
    done, weight_map = 0, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for plan in shard:
            tensors[plan.name] = random_tensor(plan, seed)
            weight_map[plan.name] = name
            done += plan.bytes
            if progress is not None:
                progress(done, total)
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, shape: str, source: Path | None) -> None:
    if source is None:
        ids = SPECIAL_IDS if shape == "tiny" else PUBLISHED_IDS
        _byte_tokenizer(ids).save_pretrained(folder)
        return
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise ValueError(f"tokenizer: {str(source)!r} is not a folder with a tokenizer")
    for path in found:
        shutil.copyfile(path, folder / path.name)


def _byte_tokenizer(special_ids: dict[str, int]) -> PreTrainedTokenizerFast:
    """The built-in tokenizer with its special tokens at these ids."""
    tokenizer = tiny_tokenizer()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in description["added_tokens"]:
        token["id"] = special_ids[token["content"]]
    description["model"]["vocab"].update(special_ids)  # else the ids of added tokens follow the vocabulary's size
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        clean_up_tokenization_spaces=False,
    )


def _check_tokenizer(folder: Path, config: Any) -> None:
    """Raise ValueError unless the tokenizer has the config's ids and leaves a row of the table unused."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    rows, top = config.text_config.vocab_size, max(tokenizer.get_vocab().values())
    if top + 1 >= rows:
        raise ValueError(f"tokenizer: has ids up to {top}, the shape has {rows} rows; one row must be left over")
    for token, expected in (("<|video_pad|>", config.video_token_id), ("<|image_pad|>", config.image_token_id)):
        found = tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            raise ValueError(f"tokenizer: {token} has id {found}; the shape's is {expected}")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the temporary folder is removed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True, help="tiny: the built-in model's")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint; new or empty")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other weights (default: 0)")
    parser.add_argument("--tokenizer", type=Path, help="folder to copy the tokenizer from")
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True, markup=False)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("weights", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            write_checkpoint(args.out, args.shape, seed=args.seed, tokenizer=args.tokenizer, progress=progress)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = json.loads((args.out / INDEX_NAME).read_text(encoding="utf-8"))["metadata"]["total_size"]
    console.print(f"{args.out}: {args.shape}, {size / 1e9:.2f} GB of random weights, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
