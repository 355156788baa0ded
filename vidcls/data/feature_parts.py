"""Writing stored vision features (features.py): a part at a time, so that a killed run loses no more than one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vidcls.data.features import (
    CHECKSUMS,
    ENDS,
    FACTS,
    FORMAT,
    HEADER_NAME,
    KEY_LETTERS,
    TOKENS,
    ClipFacts,
    FeatureCache,
    FeatureError,
    FeatureOrigin,
    Header,
    Seal,
    checksum,
)
from vidcls.data.index import Texts
from vidcls.manifest import FileDigest, fsync, storage_errors

PART_BYTES = 2**28
"""A part has no more, unless its fewest clips do: a rank holds one in memory, and a kill costs its clips."""
PARTS = 256  # of a data set, where that makes them smaller: ranks share them
LEAST_CLIPS = 8  # of a part


def start_cache(top: Path, origin: FeatureOrigin, *, place: str, clips: int, bytes_: int) -> Path:
    """Make the folder of a cache of `clips` clips and `bytes_` bytes in all, unless it is there; one process calls it.

    Returns the folder, which is locked by nobody yet.

    Raises:
        StorageError: the disk refuses.
    """
    folder = top / origin.key[:KEY_LETTERS]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / HEADER_NAME).exists():
            per_part = max(LEAST_CLIPS, min(PART_BYTES * clips // bytes_, -(-clips // PARTS)))
            header = Header(format_version=FORMAT, place=place, clips=clips, clips_per_part=per_part, origin=origin)
            _publish(folder / HEADER_NAME, json.dumps(header.model_dump(), indent=2) + "\n")
    return folder


def is_done(cache: FeatureCache, part: int, *, bad_allowed: bool) -> bool:
    """Whether a part is there, every byte of it, and, unless allowed, without clips that could not be read."""
    try:
        seal = cache.seal(part)
    except FeatureError:
        return False
    return (bad_allowed or not seal.bad) and FileDigest.of(cache.part_path(part)) == FileDigest(seal.bytes, seal.sha256)


def write_part(cache: FeatureCache, part: int, features: Sequence[torch.Tensor], facts: Sequence[ClipFacts]) -> None:
    """Write and seal a part. One process writes it at a time, the same or another after a kill.

    Args:
        features: features_VD of each clip, on the host; without rows for a bad one.

    Raises:
        StorageError: the disk refuses.
    """
    assert len(features) == len(facts) == len(cache.clips_of(part)), (part, len(features), len(facts))
    path, seal_path = cache.part_path(part), cache.seal_path(part)
    temporary = path.with_suffix(".tmp")
    texts = [each.to_json() for each in facts]
    utf8, ends = Texts.pack(texts)
    data = [each.contiguous().view(torch.uint8).numpy().reshape(-1) for each in features]
    checksums = [checksum(each, text) for each, text in zip(data, texts, strict=True)]
    tensors = {
        TOKENS: torch.cat(list(features)),
        ENDS: torch.tensor([len(each) for each in features]).cumsum(0),
        CHECKSUMS: torch.from_numpy(np.array(checksums, dtype=np.uint32)),
        f"{FACTS}.utf8": torch.from_numpy(utf8.copy()),
        f"{FACTS}.ends": torch.from_numpy(ends),
    }
    with storage_errors(cache.folder, tensors[TOKENS].nbytes):
        seal_path.unlink(missing_ok=True)
        save_file(tensors, temporary)
        fsync(temporary)
        digest = FileDigest.of(temporary)
        os.replace(temporary, path)
        bad = sum(each.bad is not None for each in facts)
        seal = Seal(clips=len(facts), bad=bad, bytes=digest.bytes, sha256=digest.sha256)
        _publish(seal_path, seal.model_dump_json() + "\n")


def _publish(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)
