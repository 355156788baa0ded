"""A checkpoint as a folder for others: what inference needs, in formats of transformers and peft, with a model card.

Such a folder is a checkpoint of vidcls too, without anything to resume.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

from vidcls.evaluation.command import RESULTS_NAME
from vidcls.evaluation.heads import StoredHead, check_classes, read_heads
from vidcls.export.card import write_card
from vidcls.manifest import fsync, seal, storage_errors
from vidcls.model.classifier import ActionClassifier
from vidcls.model.heads import ActionDecoder
from vidcls.model.pretrained import (
    ACTION_TOKEN_NAME,
    HERE,
    LABELS_NAME,
    PREPROCESSING_NAME,
    ModelSpec,
    head_folder,
    load_model,
    write_spec,
)
from vidcls.model.shapes import TINY
from vidcls.model.tuning import TUNED_WEIGHTS_NAME, TuningSettings, merge_adapter, save_adapter_with_token
from vidcls.model.weights import fingerprint

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LARGEST_FILE = "4GB"  # of merged weights
# What a checkpoint may have beside the model, and the card tells of.
ABOUT_FILES = ("config.yaml", "best.json")


@dataclass(frozen=True)
class Exported:
    folder: Path
    heads: list[StoredHead]
    bytes: int


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    merge: bool = False,
    dtype: str | None = None,
    base: str | None = None,
    base_name: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write `out`: adapter or merged weights, <ACTION>, heads, tokenizer, label maps, preprocessing, model card.

    Args:
        out: a folder that is not there yet, or empty. Nothing is in it until all of it is.
        merge: whole weights with adapters and <ACTION> in place, which need no base model any more.
        dtype: of all weights, "bf16" or "fp32"; by default as they were trained.
        base: the base model's folder, if it has moved since training.
        base_name: what the adapter and the card call the base model, such as its name on a hub; by default its folder.

    Raises:
        ValueError: the checkpoint is missing a piece or damaged, or belongs to another base model; `out` has files; or
            what was trained fits no adapter, and `merge` is false. Names it.
        StorageError: the disk refuses.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: {dtype!r}; legal: {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} is there already; give a folder that is not")
    heads = read_heads(checkpoint)
    model, encoder, spec = load_model(checkpoint, model_name_or_path=base, trust_remote_code=trust_remote_code)
    check_classes(heads, model.classes)
    if not merge:
        _check_adapter_is_all(checkpoint, spec)
    kept = spec.dtype if dtype is None else DTYPES[dtype]
    spec = replace(spec, bf16=kept == torch.bfloat16)
    called = base_name or spec.model_name_or_path
    with storage_errors(out), _whole_or_nothing(out) as folder:
        if merge:
            spec = _write_merged(model, spec, kept, encoder.action_token_id, folder)
        else:
            row_D = model.action_token.weight.to(kept)
            save_adapter_with_token(model.backbone, row_D, encoder.action_token_id, folder, dtype=kept, base=called)
        save_file({"weight": model.action_token.weight.to(kept).contiguous()}, folder / ACTION_TOKEN_NAME)
        for head in heads:
            _write_head(model, head, checkpoint, folder, kept)
        encoder.tokenizer.save_pretrained(folder)
        write_spec(folder, spec)
        for name in ABOUT_FILES:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, folder / name)
        seal(folder)
        # Behind the seal: an export may be evaluated again, and whoever publishes it writes more into its card.
        if (checkpoint / RESULTS_NAME).is_dir():
            shutil.copytree(checkpoint / RESULTS_NAME, folder / RESULTS_NAME)
        write_card(folder, heads, spec, encoder, base=None if merge else called, out=out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Exported(out, heads, size)


def _check_adapter_is_all(checkpoint: Path, spec: ModelSpec) -> None:
    if spec.model_name_or_path == TINY:
        raise ValueError(f"--merge: the built-in model {TINY!r} has no files that an adapter could go with; merge it")
    if (tuned := checkpoint / TUNED_WEIGHTS_NAME).exists():
        raise ValueError(f"--merge: {tuned} holds whole weights that were trained, which no adapter can hold; merge it")


def _write_merged(
    model: ActionClassifier, spec: ModelSpec, dtype: torch.dtype, token_id: int, folder: Path
) -> ModelSpec:
    """Whole weights; and the spec by which vidcls reads them: a base model in the same folder, and nothing to add."""
    backbone = merge_adapter(model.backbone, dtype=dtype)
    table: Any = backbone.get_input_embeddings().weight
    table.data[token_id] = model.action_token.weight.to(table)
    disable_progress_bar()
    backbone.save_pretrained(folder, max_shard_size=LARGEST_FILE)
    tuning = TuningSettings(finetuning_type="freeze")
    return replace(spec, model_name_or_path=HERE, base_weights=fingerprint(str(folder)), tuning=tuning)


def _write_head(model: ActionClassifier, head: StoredHead, checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    decoder = model.heads[head.name]
    assert isinstance(decoder, ActionDecoder)
    place = head_folder(folder, head.name)
    decoder.save_pretrained(place, state={name: t.to(dtype) for name, t in decoder.state_dict().items()})
    for name in (LABELS_NAME, PREPROCESSING_NAME):
        shutil.copyfile(head_folder(checkpoint, head.name) / name, place / name)


@contextlib.contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write in beside `out`, which becomes it when the block ends well, and is deleted otherwise."""
    folder = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if out.exists():
            out.rmdir()  # it was empty
        folder.rename(out)
        fsync(out.absolute().parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
