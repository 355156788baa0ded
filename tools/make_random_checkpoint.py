"""Write a Qwen2.5-VL checkpoint of a published shape with random weights, for tests and benchmarks, no download.

    python tools/make_random_checkpoint.py --shape 3b --out models/random-3b
    python tools/make_random_checkpoint.py --shape 3b --out models/random-3b --tokenizer models/Qwen2.5-VL-3B-Instruct
    python tools/make_random_checkpoint.py --shape 72b --out models/random-72b --shard-size 4 --layout new

OUT is a local Hugging Face folder: config.json, bf16 safetensors (in shards with their index, or one file) and a
tokenizer. Without --tokenizer that is a small byte-level one (one token per byte), whose special tokens have the
published ids. Layouts: old, as published, with the language model's keys at the top of config.json; new, as
transformers writes the whole model today; base, as it writes the model without its vocabulary head. Weights go from a
pool of random values straight to the disk: a few hundred MB of memory for every shape, and as fast as the disk writes.
Exit codes: 0 done, 2 wrong options or no room, 130 interrupted; OUT appears only when it is whole.
"""

import argparse
import hashlib
import json
import math
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vidcls.model.shapes import PUBLISHED_SHAPES, TINY_VISION, published_vision
from vidcls.model.tiny import SPECIAL_IDS, tiny_config, tiny_tokenizer

STD = 0.02  # the family's initializer_range
BF16_BYTES = 2
SHARD_BYTES = 1 << 30
POOL_VALUES = 8_388_593  # a prime: no row of a matrix begins where another one of it did
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# What each layout writes for the names of transformers' modules.
LAYOUTS = {
    "old": {"model.visual.": "visual.", "model.language_model.": "model."},
    "new": {},
    "base": {"model.": ""},
}
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
TINY_SHAPES = ("tiny", "tiny-untied")
MID = "mid"  # a step takes a moment, with the real vocabulary
MID_TEXT = {
    **PUBLISHED_SHAPES["3b"],
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
MID_VISION = {
    **TINY_VISION,
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 512,
    "out_hidden_size": 256,
    "fullatt_block_indexes": [3],
}
SHAPES = (*TINY_SHAPES, MID, *PUBLISHED_SHAPES)


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write: its name in the file, that in transformers' module, and its shape."""

    name: str
    parameter: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BF16_BYTES


def model_config(shape: str) -> Qwen2_5_VLConfig:
    """The config of a shape: "tiny" is the built-in model's, "mid" is a small one with the real vocabulary, the
    others but "tiny-untied" are the published ones.

    Raises ValueError for another shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; legal: {' | '.join(SHAPES)}")
    config = tiny_config() if shape in TINY_SHAPES else _real_config(shape)
    if shape == "tiny-untied":
        text_config: Any = config.text_config  # has a flag of its own, which transformers obeys too
        config.tie_word_embeddings = text_config.tie_word_embeddings = False
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.dtype = torch.bfloat16
    return config


def plan_tensors(config: Qwen2_5_VLConfig, layout: str = "old") -> list[TensorPlan]:
    """Every tensor of the checkpoint in the model's order; a tied vocabulary head is not stored."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    without_head = layout == "base" or config.tie_word_embeddings
    return [
        TensorPlan(_stored_name(name, layout), name, tuple(p.shape))
        for name, p in model.named_parameters()
        if not (without_head and name == "lm_head.weight")
    ]


def random_values(plan: TensorPlan, seed: int) -> Iterator[memoryview]:
    """A tensor's bytes in pieces, which depend on (seed, parameter, shape) alone: bf16, ones where a norm scales.

    Else they are normal with std 0.02: consecutive values of one pool, from a place that the parameter's name chooses.
    """
    count = math.prod(plan.shape)
    is_scale = plan.parameter.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight"))
    pool = _ones() if is_scale else _pool(seed)
    digest = hashlib.sha256(plan.parameter.encode()).digest()
    first = int.from_bytes(digest[:8], "little") % POOL_VALUES
    while count:
        piece = min(count, POOL_VALUES - first)
        yield pool[first * BF16_BYTES : (first + piece) * BF16_BYTES]
        count, first = count - piece, 0


@cache
def _pool(seed: int) -> memoryview:
    generator = torch.Generator().manual_seed(seed)
    return _bytes(torch.empty(POOL_VALUES, dtype=torch.bfloat16).normal_(0, STD, generator=generator))


@cache
def _ones() -> memoryview:
    return _bytes(torch.ones(POOL_VALUES, dtype=torch.bfloat16))


def _bytes(values: torch.Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


def write_checkpoint(
    out: Path,
    shape: str,
    *,
    seed: int = 0,
    tokenizer: Path | None = None,
    shard_bytes: int | None = SHARD_BYTES,
    layout: str = "old",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the folder `out` and return it; nothing is there before all of it is.

    Args:
        tokenizer: folder to copy the tokenizer from; the built-in one if not given.
        shard_bytes: a file holds at most this many, or one tensor; None for a single model.safetensors.
        layout: a key of `LAYOUTS`.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        ValueError: unknown shape or layout, `out` is used, too little room on the disk, a tokenizer that does not fit.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {str(out)!r} is not empty; use a new folder")
    config = model_config(shape)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; legal: {' | '.join(LAYOUTS)}")
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; it must be at least 1, or None for one file")
    plans = plan_tensors(config, layout)
    shards = [plans] if shard_bytes is None else _split(plans, shard_bytes)
    total = sum(plan.bytes for shard in shards for plan in shard)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    needed = total + (64 << 20)  # config, tokenizer, the index
    if free < needed:
        raise ValueError(f"out: {shape} needs {needed / 1e9:.1f} GB, {out.parent} has {free / 1e9:.1f} GB free")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary, "checkpoint")
        folder.mkdir()
        _write_config(folder, config, layout)
        _write_tokenizer(folder, shape, tokenizer)
        _check_tokenizer(folder, config)
        _write_weights(folder, shards, seed, progress, single=shard_bytes is None)
        folder.replace(out)
    return out


def _real_config(name: str) -> Qwen2_5_VLConfig:
    """With the real vocabulary."""
    shape = MID_TEXT if name == MID else PUBLISHED_SHAPES[name]
    eighth = shape["hidden_size"] // shape["num_attention_heads"] // 8
    text = {
        **shape,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [eighth, eighth * 3 // 2, eighth * 3 // 2],
        },
        "bos_token_id": PUBLISHED_IDS["<|endoftext|>"],
        "eos_token_id": PUBLISHED_IDS["<|im_end|>"],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=MID_VISION if name == MID else published_vision(name),
        tie_word_embeddings=shape["tie_word_embeddings"],
        image_token_id=PUBLISHED_IDS["<|image_pad|>"],
        video_token_id=PUBLISHED_IDS["<|video_pad|>"],
        vision_start_token_id=PUBLISHED_IDS["<|vision_start|>"],
        vision_end_token_id=PUBLISHED_IDS["<|vision_end|>"],
    )


def _stored_name(name: str, layout: str) -> str:
    for module, stored in LAYOUTS[layout].items():
        if name.startswith(module):
            return stored + name.removeprefix(module)
    return name


def _write_config(folder: Path, config: Qwen2_5_VLConfig, layout: str) -> None:
    """config.json as the layout's files have it."""
    if layout == "base":
        config.architectures = ["Qwen2_5_VLModel"]
    config.save_pretrained(folder)
    if layout != "old":
        return
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    values["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    values["rope_theta"] = rope["rope_theta"]
    values["torch_dtype"] = values.pop("dtype")
    for name in ("model_type", "dtype", "layer_types"):
        text.pop(name, None)
    path.write_text(json.dumps({**text, **values}, indent=2) + "\n", encoding="utf-8")


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


def _write_weights(
    folder: Path,
    shards: list[list[TensorPlan]],
    seed: int,
    progress: Callable[[int, int], None] | None,
    *,
    single: bool,
) -> None:
    total = sum(plan.bytes for shard in shards for plan in shard)
    done, weight_map = 0, {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for plan in shard:
                for piece in random_values(plan, seed):
                    file.write(piece)
                weight_map[plan.name] = name
                done += plan.bytes
                if progress is not None:
                    progress(done, total)
    if not single:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(shard: list[TensorPlan]) -> bytes:
    """The head of a safetensors file: its length, and where each tensor is in what follows."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for plan in shard:
        entries[plan.name] = {"dtype": "BF16", "shape": plan.shape, "data_offsets": [first, first + plan.bytes]}
        first += plan.bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _write_tokenizer(folder: Path, shape: str, source: Path | None) -> None:
    if source is None:
        ids = SPECIAL_IDS if shape in TINY_SHAPES else PUBLISHED_IDS
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


def _gigabytes(text: str) -> int | None:
    if text == "none":
        return None
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}; legal: above 0, or none")
    return int(value * 1e9)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the temporary folder is removed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        required=True,
        help="tiny: the built-in model's; tiny-untied: with a head; mid: small, with the real vocabulary",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint; new or empty")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other weights (default: 0)")
    parser.add_argument("--tokenizer", type=Path, help="folder to copy the tokenizer from")
    parser.add_argument("--layout", choices=LAYOUTS, default="old", help="names of tensors (default: old)")
    parser.add_argument(
        "--shard-size", type=_gigabytes, default=SHARD_BYTES, metavar="GB", help="none: one file (default: 1.07)"
    )
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True, markup=False)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("weights", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            write_checkpoint(
                args.out,
                args.shape,
                seed=args.seed,
                tokenizer=args.tokenizer,
                shard_bytes=args.shard_size,
                layout=args.layout,
                progress=progress,
            )
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    console.print(f"{args.out}: {args.shape}, {size / 1e9:.2f} GB of random weights, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
