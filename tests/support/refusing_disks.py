"""Train recipes whose disk refuses the second checkpoint, in the way that the recipe's name says; each output_dir is a
file system of its own. What every rank is told goes beside the recipe, NAME.rank0.json.

deepspeed --num_gpus N tests/support/refusing_disks.py RECIPE.yaml...
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vidcls import distributed
from vidcls.command import command_arguments
from vidcls.config import load_config
from vidcls.training import loop, saver, saving
from vidcls.training.setup import setup

LEFT_FREE = 300_000
LEFT_FOR_PICKLES = 20_000
WRITE_PICKLES = saving._write_deepspeed_state
NEW_MOUNTS = 0x20000  # CLONE_NEWNS


def fill(disk: Path, left: int = LEFT_FREE) -> None:
    (disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))


def fill_and_write(engine: Any, folder: Path, needed: int) -> None:
    if distributed.is_main():
        fill(folder.parents[1], LEFT_FOR_PICKLES)
    distributed.barrier()
    WRITE_PICKLES(engine, folder, needed)


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def see_another_disk(place: Path) -> None:
    """From now on this rank alone finds another file system at `place`, as a host would that does not share it."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)


def refuse_one(*_: Any) -> None:
    raise OSError(28, "No space left on device", "a shard of rank 1")


def train_until_refused(recipe: Path) -> None:
    """The recipe's name says how. "seen": too little space is left; "met": and nobody looked; "pickles": what is left
    is too little for DeepSpeed's own files; "other": one rank meets it alone; "readonly": the disk takes no more;
    "apart": rank 1 has another disk, and keeps it."""
    how = recipe.stem
    write = saving.write_checkpoint

    def write_or_refuse(run: Any, engine: Any, step: int, *rest: Any, **named: Any) -> Path:
        changes: list[Any] = []
        if step == 2:
            if how in ("seen", "met", "readonly") and distributed.is_main():
                (make_read_only if how == "readonly" else fill)(run.output_dir)
            if how == "met":
                changes.append(patch.object(saving, "check_space", lambda *_: None))
            if how == "pickles":
                changes.append(patch.object(saving, "_write_deepspeed_state", fill_and_write))
            if how == "apart" and distributed.rank() == 1:
                see_another_disk(run.output_dir)
            if how == "other" and distributed.rank() == 1:
                changes.append(patch.object(saving, "write_tensors", refuse_one))
        for change in changes:
            change.start()
        try:
            return write(run, engine, step, *rest, **named)
        finally:
            for change in changes:
                change.stop()

    told: dict[str, str] = {}
    no_log: Callable[..., None] = lambda *_: None  # noqa: E731  # a disk with an open file cannot be made read-only
    try:
        with (
            patch.object(saving, "write_checkpoint", write_or_refuse),
            patch.object(saver, "write_checkpoint", write_or_refuse),
            patch.object(loop, "open_log", no_log),
        ):
            loop.train(setup(load_config(recipe)))
    except RuntimeError as error:
        told = {"kind": type(error).__name__, "message": str(error)}
    recipe.with_suffix(f".rank{distributed.rank()}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    try:
        for argument in command_arguments():
            train_until_refused(Path(argument))
    finally:
        distributed.stop()
    sys.exit(0)
