"""Which clips each optimizer step took, on request: proof that none is lost or taken twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vidcls import distributed

FOLDER_NAME = "order"


class OrderLog:
    """order/rank-00000.jsonl, a row {"step", "keys"} for each optimizer step of this rank.

    A step that a resumed run does again stands there again. Rows reach the file before the step's weights reach a
    checkpoint.
    """

    def __init__(self, output_dir: Path) -> None:
        folder = output_dir / FOLDER_NAME
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{distributed.rank():05d}.jsonl"
        # A kill may have cut the last line.
        cut = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if cut:
            self._file.write("\n")

    def add(self, step: int, keys: Sequence[str]) -> None:
        """The keys of all clips that this rank took in step `step`, counted from 0."""
        self._file.write(json.dumps({"step": step, "keys": list(keys)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
