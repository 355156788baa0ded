"""The training state on disk: training_state.json, and named fp32 tensors over safetensors files that all ranks write.

Each whole tensor is in one file, that of the rank which owns its parameter. Readers open all files and go by name, so
that nothing depends on the number of ranks that wrote; and nothing is unpickled. Needs no engine.
"""

from __future__ import annotations

import importlib.metadata
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vidcls.manifest import FORMAT, CheckpointError, FileDigest, fsync
from vidcls.model.stored import read_shapes

STATE_NAME = "training_state.json"
TENSORS_PATTERN = "training_state-*-of-*.safetensors"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"
VERSIONED = ("vidcls", "torch", "deepspeed", "transformers", "peft")


@dataclass(frozen=True)
class RunState:
    """Where a run stands. With the named tensors it is all that a resume needs: the order, the learning rate, the
    augmentation and dropout are functions of step and seed."""

    step: int  # optimizer steps done
    adam_steps: int  # those that were not skipped for an overflow
    stream: dict[str, Any]  # by name, what decides the stream of clips: global_batch, data sets, ...


def write_state(folder: Path, state: RunState, about: Mapping[str, Any] | None = None) -> None:
    """Write training_state.json. `about`: for people, and never read by a resume: layout, schedule, label spaces."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    content = {"format": FORMAT, **asdict(state), **(about or {}), "versions": versions}
    (folder / STATE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_state_file(folder: Path) -> dict[str, Any]:
    """All of training_state.json. Raises CheckpointError when there is none, or when it is of another format."""
    path = folder / STATE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, versions = content["format"], content["versions"]
        writer = versions["vidcls"]
    except FileNotFoundError:
        if not folder.is_dir():
            raise CheckpointError(
                f"resume_from_checkpoint: there is no folder {folder} on {socket.gethostname()}"
            ) from None
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} has no training state: it was written with save_only_model"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} is of format {found}, written by vidcls {writer}; vidcls {importlib.metadata.version('vidcls')} "
            f"reads format {FORMAT}"
        )
    return content


def read_state(folder: Path) -> RunState:
    """The RunState of a checkpoint. Raises CheckpointError when it has none."""
    content = read_state_file(folder)
    step, adam_steps, stream = (content.get(name) for name in ("step", "adam_steps", "stream"))
    if not (isinstance(step, int) and isinstance(adam_steps, int) and isinstance(stream, dict)):
        found = f"step, adam_steps and stream are {step!r}, {adam_steps!r}, {stream!r}"
        raise CheckpointError(f"{folder / STATE_NAME} cannot be read: {found}")
    return RunState(step, adam_steps, stream)


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], names: frozenset[str] | tuple[str, ...] | None = None
) -> dict[str, tuple[Any, Any]]:
    """(then, now) of every name (of `names`, or of either) whose values differ; a missing one counts as None."""
    looked_at = names if names is not None else then.keys() | now.keys()
    pairs = {name: (then.get(name), now.get(name)) for name in sorted(looked_at)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank writes each parameter, by name: the largest first, each to the rank that has least so far."""
    loads = [0] * ranks
    result = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        result[name] = rank
        loads[rank] += max(1, sizes[name])
    return result


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], rank: int, ranks: int) -> tuple[str, FileDigest]:
    """Write one rank's file and put it on disk; its name and digest."""
    path = folder / f"training_state-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    save_file(tensors, path)
    fsync(path)
    return path.name, FileDigest.of(path)


class StoredState(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint as "kind/parameter name". Headers are read at once, a tensor when it is asked for.

    A tensor is mapped from its file and given back with the last reference to it, so that a reader who takes one after
    the other never holds them all.
    """

    def __init__(self, files: dict[str, Path], shapes: dict[str, tuple[int, ...]], prefix: str = "") -> None:
        """`prefix`: of the stored names, which `files` and `shapes` leave out."""
        self._files = files
        self.shapes = shapes
        self._prefix = prefix

    @classmethod
    def open(cls, folder: Path) -> StoredState:
        """Read the headers of all files. Raises CheckpointError for a file that is damaged or missing, and for a
        tensor that is in two."""
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        paths = sorted(folder.glob(TENSORS_PATTERN))
        named = int(paths[0].stem.rpartition("-")[2]) if paths else 1
        if len(paths) != named:
            raise CheckpointError(f"{folder} has {len(paths)} of {named} files {TENSORS_PATTERN}")
        for path in paths:
            try:
                found = read_shapes(path)
            except ValueError as error:
                raise CheckpointError(str(error)) from None
            for name, shape in found.items():
                if name in files:
                    raise CheckpointError(f"{path}: {name} is in {files[name].name} too")
                files[name], shapes[name] = path, shape
        return cls(files, shapes)

    def kind(self, kind: str) -> StoredState:
        """The tensors of one kind ("weight", "exp_avg", "exp_avg_sq", "average"), by parameter name."""
        prefix = f"{kind}/"
        names = {name.removeprefix(prefix): name for name in self._files if name.startswith(prefix)}
        files = {short: self._files[name] for short, name in names.items()}
        return StoredState(files, {short: self.shapes[name] for short, name in names.items()}, self._prefix + prefix)

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._files[name]
        try:
            with safe_open(path, "pt", device="cpu") as file:
                return file.get_tensor(self._prefix + name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
