"""Which data sets a recipe names, and where their shards are: by path, by URL, or by a name in datasets.yaml."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from vidcls.options import DEFAULT_NAME, AugmentOptions, ConfigError, DataOptions, DatasetOptions, field_error

REGISTRY_NAME = "datasets.yaml"


@dataclass(frozen=True)
class TrainSet:
    """A data set to train on. place: its shards. head: which head it trains. weight: None: by its clip count."""

    name: str
    place: str
    head: str
    weight: float | None
    prompt: str
    augment: AugmentOptions


@dataclass(frozen=True)
class EvalSet:
    """A data set to evaluate on while training."""

    name: str
    place: str
    head: str
    prompt: str


def resolve_data_sets(data: DataOptions, augment: AugmentOptions) -> tuple[tuple[TrainSet, ...], tuple[EvalSet, ...]]:
    """The data sets that `dataset` or `datasets` name, with their places.

    Raises:
        ConfigError: a name that is no place, a name twice, weights for some only.
    """
    registry = _Registry(Path(data.dataset_dir))
    if data.datasets is None:
        assert data.dataset is not None
        names, places = _names_and_places(data.dataset, "dataset", registry)
        trained = [
            TrainSet(name, place, DEFAULT_NAME, None, data.prompt, augment)
            for name, place in zip(names, places, strict=True)
        ]
        evaluated = []
        if data.eval_dataset is not None:
            names, places = _names_and_places(data.eval_dataset, "eval_dataset", registry)
            evaluated = [
                EvalSet(name, place, DEFAULT_NAME, data.prompt) for name, place in zip(names, places, strict=True)
            ]
    else:
        if data.eval_dataset is not None:
            raise ConfigError("eval_dataset: stands in each entry of datasets, not beside them")
        names = [entry.name for entry in data.datasets]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"datasets: two entries have the name {doubled[0]!r}")
        if len({entry.weight is None for entry in data.datasets}) > 1:
            missing = [entry.name for entry in data.datasets if entry.weight is None]
            raise ConfigError(f"datasets: {missing[0]!r} has no weight, others have one; give it to all or none")
        trained = [
            TrainSet(
                entry.name,
                registry.place(entry.dataset, f"datasets: {entry.name}: dataset"),
                entry.name,
                entry.weight,
                entry.prompt or data.prompt,
                _with_changes(augment, entry),
            )
            for entry in data.datasets
        ]
        evaluated = [
            EvalSet(
                entry.name,
                registry.place(entry.eval_dataset, f"datasets: {entry.name}: eval_dataset"),
                entry.name,
                entry.prompt or data.prompt,
            )
            for entry in data.datasets
            if entry.eval_dataset is not None
        ]
    return tuple(trained), tuple(evaluated)


class _Registry:
    """datasets.yaml: lines `name: shards`, folders relative to the file, or URLs. Read when a name is looked up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def place(self, text: str, field: str) -> str:
        """Shards by path (with a slash, or a folder that is there), URL or name."""
        if "/" in text or Path(text).is_dir():
            return text
        path = self._folder / REGISTRY_NAME
        if not path.is_file():
            hint = ""
            if (self._folder / "dataset_info.json").is_file():
                hint = "; from the dataset_info.json there, tools/make_shards.py sharegpt makes shards"
            raise ConfigError(
                f"{field}: {text!r} is not a folder of shards, and there is no {path} to look it up in{hint}"
            )
        try:
            names = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"dataset_dir: {path} is not YAML: {error}") from None
        if not isinstance(names, dict) or not all(isinstance(x, str) for pair in names.items() for x in pair):
            raise ConfigError(f"dataset_dir: {path} must hold lines `name: shards`")
        if text not in names:
            close = difflib.get_close_matches(text, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(names)) or 'no names'}"
            raise ConfigError(f"{field}: {text!r} is neither a folder of shards nor a name in {path}; {hint}")
        place = names[text]
        return place if "://" in place else str(self._folder / place)


def _names_and_places(text: str, field: str, registry: _Registry) -> tuple[list[str], list[str]]:
    # A comma may also be part of a folder's name, or of a URL.
    if Path(text).is_dir() or "," not in text or text.count("://") == 1:
        return [DEFAULT_NAME], [registry.place(text, field)]
    names = [name.strip() for name in text.split(",")]
    if len({*names}) < len(names) or "" in names:
        raise ConfigError(f"{field}: {text!r} must be different names with commas between them")
    return names, [registry.place(name, field) for name in names]


def _with_changes(augment: AugmentOptions, entry: DatasetOptions) -> AugmentOptions:
    try:
        return AugmentOptions(**{**augment.model_dump(), **entry.augment})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"datasets: {entry.name}: augment: {field_error(AugmentOptions, first)}") from None
