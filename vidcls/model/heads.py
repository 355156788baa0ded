"""ActionDecoder: the hidden state at <ACTION> -> class logits. Shape suffixes: B batch, D hidden, C classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS_NAME = "action_decoder.safetensors"
CONFIG_NAME = "action_decoder_config.json"
INIT_STD = 0.02


def _linear(hidden_size: int, num_classes: int, mlp_hidden_size: int) -> nn.Module:
    return nn.Linear(hidden_size, num_classes)


def _mlp(hidden_size: int, num_classes: int, mlp_hidden_size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden_size, mlp_hidden_size), nn.GELU(), nn.Linear(mlp_hidden_size, num_classes))


HEADS = {"linear": _linear, "mlp": _mlp}


class ActionDecoder(nn.Module):
    """Maps hidden_BD to logits_BC with one linear layer or with Linear, GELU, Linear."""

    def __init__(
        self,
        hidden_size: int,
        num_classes: int,
        decoder_type: str = "linear",
        mlp_hidden_size: int | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        """`mlp_hidden_size` is for "mlp" only and defaults to `hidden_size`.

        Weights are normal with deviation 0.02 and biases zero, drawn from `seed`, or from the global
        generator when it is None. Raises ValueError for an unknown type and for sizes below 1.
        """
        super().__init__()
        if decoder_type not in HEADS:
            raise ValueError(f"decoder_type is {decoder_type!r}; it must be one of {sorted(HEADS)}")
        if mlp_hidden_size is not None and decoder_type != "mlp":
            raise ValueError(f"mlp_hidden_size is {mlp_hidden_size}; with decoder_type {decoder_type!r} leave it out")
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.decoder_type = decoder_type
        self.mlp_hidden_size = hidden_size if mlp_hidden_size is None else mlp_hidden_size
        for name in ("hidden_size", "num_classes", "mlp_hidden_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        self.layers = HEADS[decoder_type](hidden_size, num_classes, self.mlp_hidden_size)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for layer in self.layers.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=INIT_STD, generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return self.layers(hidden_BD)

    def config(self) -> dict[str, int | str | None]:
        """The constructor's arguments, as they stand in action_decoder_config.json."""
        return {
            "hidden_size": self.hidden_size,
            "num_classes": self.num_classes,
            "decoder_type": self.decoder_type,
            "mlp_hidden_size": self.mlp_hidden_size if self.decoder_type == "mlp" else None,
        }

    def save_pretrained(self, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write weights and config into `folder`; `state` replaces the module's own tensors.

        Pass `state` where the module holds no whole tensors, as under ZeRO-3.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.state_dict() if state is None else state
        _check_tensors(self, tensors, "state")
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(self.config(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load_pretrained(cls, folder: str | Path) -> ActionDecoder:
        """The decoder saved in `folder`, in the dtype it was saved in.

        Raises ValueError naming the file, and the key and shapes where they differ from the config.
        """
        config_path, weights_path = Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME
        for path in (config_path, weights_path):
            if not path.is_file():
                raise ValueError(f"{path} does not exist; {folder} is not a folder with an action decoder")
        try:
            head = cls(**json.loads(config_path.read_text(encoding="utf-8")), seed=0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_path} is not an action decoder's config: {error}") from error
        tensors = load_file(weights_path)
        _check_tensors(head, tensors, str(weights_path))
        head.load_state_dict(tensors, assign=True)
        return head.requires_grad_(True)


def _check_tensors(head: ActionDecoder, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Raise ValueError unless `tensors` are what a head of this config holds."""
    expected = _shapes(head)
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise ValueError(
                f"{source}: {key} has shape {found.get(key, 'missing')}; "
                f"the config asks for {expected.get(key, 'no such tensor')}"
            )


def _shapes(head: ActionDecoder) -> dict[str, tuple[int, ...]]:
    # From a twin on the meta device: under ZeRO-3 the head's own parameters are empty.
    with torch.device("meta"):
        layers = HEADS[head.decoder_type](head.hidden_size, head.num_classes, head.mlp_hidden_size)
    return {f"layers.{key}": tuple(tensor.shape) for key, tensor in layers.state_dict().items()}
