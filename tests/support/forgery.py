"""Folders of shards changed by somebody who knows the format and mends every checksum on the way."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy


def forge(folder: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], object]) -> Path:
    """change(header, tensors) edits what index.json and samples.safetensors hold."""
    header = json.loads((folder / "index.json").read_bytes())
    tensors = {n: t.copy() for n, t in safetensors.numpy.load((folder / "samples.safetensors").read_bytes()).items()}
    change(header, tensors)
    table = safetensors.numpy.save(tensors)
    (folder / "samples.safetensors").write_bytes(table)
    header["table"] = {"bytes": len(table), "sha256": hashlib.sha256(table).hexdigest()}
    (folder / "index.json").write_text(json.dumps(header))
    return folder


def forge_sample(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """change(tar bytes of sample 0, in shard 0) gives as many other bytes."""

    def edit(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        path = folder / header["shards"][0]["name"]
        data = path.read_bytes()
        size = int(tensors["bytes"][0])
        new = change(data[:size])
        assert len(new) == size
        path.write_bytes(new + data[size:])
        header["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        tensors["crc32"][0] = zlib.crc32(new)

    return forge(folder, edit)
