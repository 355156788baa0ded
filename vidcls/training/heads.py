"""The heads of a run, as they start: new, with a prior from class names, or from a saved action decoder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from vidcls.config import Config, ConfigError
from vidcls.data.labels import LabelSpace
from vidcls.model.class_names import class_name_rows
from vidcls.model.heads import ActionDecoder
from vidcls.model.pretrained import LABELS_NAME, ModelSpec, head_folder
from vidcls.model.prompt import PromptEncoder
from vidcls.model.weights import load_config, load_token_embeddings
from vidcls.training.data_sets import DataSets


def build_heads(config: Config, data: DataSets, spec: ModelSpec, encoder: PromptEncoder) -> dict[str, ActionDecoder]:
    """One head for each label space, by name, whole and on the host; the same on every rank.

    Raises:
        ConfigError: sizes do not fit, or action_decoder_path holds another head.
    """
    text: Any = load_config(spec.model_name_or_path).text_config
    options = config.model
    heads = {}
    for number, (name, labels) in enumerate(data.heads.items()):
        if hasattr(torch.nn.ModuleDict(), name):
            raise ConfigError(f"datasets: the name {name!r} is taken inside torch; choose another one")
        try:
            head = ActionDecoder(
                text.hidden_size,
                len(labels),
                options.action_decoder_type,
                options.action_decoder_hidden_size,
                options.action_decoder_num_heads,
                init="zeros" if options.action_decoder_init == "zeros" else "normal",
                seed=config.run.seed + number,
            )
        except ValueError as error:
            raise ConfigError(f"action_decoder: {error}") from None
        if options.action_decoder_init == "class_names":
            rows_of = functools.partial(load_token_embeddings, spec.model_name_or_path, dtype=torch.float32)
            try:
                head.set_class_rows(class_name_rows(labels.names, encoder.tokenizer, rows_of))
            except ValueError as error:
                raise ConfigError(f"action_decoder_init: {error}") from None
        if options.action_decoder_path is not None:
            _start_from(Path(options.action_decoder_path), name, head, labels)
        heads[name] = head
    return heads


def _start_from(path: Path, name: str, head: ActionDecoder, labels: LabelSpace) -> None:
    """Put the weights of a saved head into `head`. `path`: its folder, or a checkpoint with a head of this name."""
    folder = head_folder(path, name) if head_folder(path, name).is_dir() else path
    try:
        stored = ActionDecoder.load_pretrained(folder)
        if (folder / LABELS_NAME).is_file():  # a head alone does not say what its rows mean
            LabelSpace.load(folder / LABELS_NAME).check_same(labels, str(folder), f"head {name}")
    except ValueError as error:
        raise ConfigError(f"action_decoder_path: {error}") from None
    if stored.config() != head.config():
        raise ConfigError(
            f"action_decoder_path: {folder} holds {stored.config()}, this run's head {name} is {head.config()}"
        )
    head.load_state_dict(stored.state_dict())
