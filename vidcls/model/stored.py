"""The tensors of a local Hugging Face folder: one model.safetensors, or several files with their index.

Files are mapped, not read: a tensor costs memory when it is touched, and processes of one host share the pages. The
mapping is private (copy-on-write), so nothing that is written to a tensor reaches its file. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LEGAL_DTYPES = ("BF16", "F16", "F32")
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class StoredTensors:
    """What a folder holds, by stored name; headers are read, weights are not."""

    folder: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, folder: Path) -> StoredTensors:
        """Read the headers of all files.

        Raises:
            ValueError: no safetensors, a damaged file or index, a file or tensor that the index names and that is not
                there, a tensor in two files or in a dtype that is no plain weight. Names the file.
        """
        places: dict[str, str] | None = None
        if (folder / SINGLE_NAME).is_file():
            paths = [folder / SINGLE_NAME]
        elif (folder / INDEX_NAME).is_file():
            places = _read_index(folder / INDEX_NAME)
            paths = [folder / name for name in sorted({*places.values()})]
        else:
            raise ValueError(_nothing_stored(folder))
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            for name, shape in _read_header(path).items():
                if name in files:
                    raise ValueError(f"{path}: {name} is in {files[name].name} too; a tensor must be stored once")
                files[name], shapes[name] = path, shape
        for name, place in (places or {}).items():
            if name not in files or files[name].name != place:
                raise ValueError(f"{folder / place}: {name} is not in it, though {INDEX_NAME} says so")
        return cls(folder, files, shapes)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file."""
        with _opened(self.files[name]) as file:
            return file.get_tensor(name)

    def stream(self, *, remap_bytes: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (name, tensor), file by file.

        A mapping lives as long as a tensor from it. With `remap_bytes` a file is mapped anew after so many bytes, so
        that the pages of tensors the caller has let go can go too; without, once: for tensors that are kept.
        """
        for path in sorted({*self.files.values()}):
            names = [name for name, place in self.files.items() if place == path]
            while names:
                with _opened(path) as file:
                    read = 0
                    while names and (remap_bytes is None or read < remap_bytes):
                        tensor = file.get_tensor(names[0])
                        read += tensor.nbytes
                        yield names.pop(0), tensor
                        del tensor

    def fingerprint(self) -> str:
        """A digest of all headers, sizes and some pages: equal folders have equal ones. Reads a few MB at most.

        Ranks that each read their own host's copy can compare it; a changed byte between the samples is not seen.
        """
        digest = hashlib.sha256()
        for path in sorted({*self.files.values()}):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(8 + _header_bytes(path)))
                for sample in range(SAMPLES):
                    file.seek(max(0, (size - SAMPLE_BYTES) * sample // (SAMPLES - 1)))
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Everything in one file, in memory of its own. Raises ValueError naming a file that is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of one file's tensors, from its header alone. Raises ValueError as `read_tensors`."""
    try:
        with _opened(path) as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def differing_shapes(found: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]) -> str | None:
    """How stored tensors, by name, differ from a model's; None where they do not. To stand behind the file's name."""
    differing = sorted(name for name in found.keys() | needed.keys() if found.get(name) != needed.get(name))
    if not differing:
        return None
    name = differing[0]
    number = "1 tensor differs" if len(differing) == 1 else f"{len(differing)} tensors differ"
    stored, wanted = (shapes.get(name, "not at all") for shapes in (found, needed))
    return f"{number} from this model, the first is {name}: stored {stored}, needed {wanted}"


def _opened(path: Path) -> Any:
    return safe_open(path, "pt", device="cpu")


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors."""
    try:
        with _opened(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, though {INDEX_NAME} names it") from None
    except (SafetensorError, OSError) as error:
        hint = ""
        if path.is_file():
            with path.open("rb") as raw:
                hint = "; it is a git-lfs pointer: run `git lfs pull`" if raw.read(12) == b"version http" else ""
        raise ValueError(f"{path} is damaged or no safetensors file: {error}{hint}") from None
    for name, dtype in dtypes.items():
        if dtype not in LEGAL_DTYPES:
            raise ValueError(f"{path}: {name} is stored as {dtype}; it must be {', '.join(LEGAL_DTYPES)}")
    return shapes


def _read_index(path: Path) -> dict[str, str]:
    """File by tensor name."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; it must hold weight_map, a file name per tensor") from None
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{path}: weight_map must hold a file name per tensor")
    for place in places.values():
        if Path(place).name != place or not place.endswith(".safetensors"):
            raise ValueError(f"{path}: weight_map names {place!r}; it must be a .safetensors file beside the index")
    return places


def _nothing_stored(folder: Path) -> str:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    needed = f"{SINGLE_NAME}, or {INDEX_NAME} with its files"
    if pickled:
        return (
            f"{folder} has pickled weights only ({pickled[0]}), which can run code and are never read; it must have "
            f"{needed}: convert them with transformers' save_pretrained"
        )
    return f"{folder} has no weights; it must have {needed}"
