"""ActionDecoder: the hidden state at <ACTION>, with or without the clip's tokens -> class logits.

Shape suffixes: B batch, L sequence, D hidden, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from vidcls.model.attentive_classifier import AttentiveClassifier
from vidcls.model.stored import differing_shapes, read_tensors
from vidcls.options import ATTENTION_SIZE

WEIGHTS_NAME = "action_decoder.safetensors"
CONFIG_NAME = "action_decoder_config.json"
INIT_STD = 0.02
INITS = ("normal", "zeros")
ATTENTION_HEADS = 8


def _mlp(hidden_size: int, num_classes: int, mlp_hidden_size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden_size, mlp_hidden_size), nn.GELU(), nn.Linear(mlp_hidden_size, num_classes))


# Each takes hidden_size, num_classes and the inner sizes of its type; its last nn.Linear is the one that has classes.
HEADS: dict[str, Callable[..., nn.Module]] = {"linear": nn.Linear, "mlp": _mlp, "attention": AttentiveClassifier}


class ActionDecoder(nn.Module):
    """Class logits from one linear layer, from Linear, GELU, Linear, or from attention over the clip's tokens."""

    def __init__(
        self,
        hidden_size: int,
        num_classes: int,
        decoder_type: str = "linear",
        mlp_hidden_size: int | None = None,
        num_heads: int | None = None,
        *,
        init: str = "normal",
        seed: int | None = None,
    ) -> None:
        """Sizes that a type does not have are left out (None).

        Linear weights are normal with deviation 0.02 and biases zero, drawn from `seed`, or from the global
        generator when it is None. With `init` "zeros" the layer that has the classes is zero throughout: every
        class starts equally likely, and what is below that layer gets its first gradient on the second step.

        Args:
            mlp_hidden_size: the width inside. "mlp": by default `hidden_size`. "attention": of queries, keys and
                values, by default `ATTENTION_SIZE` or `hidden_size`, the smaller.
            num_heads: of "attention", by default `ATTENTION_HEADS`; must divide the width.

        Raises:
            ValueError: an unknown type or init, a size below 1 or of another type, heads that do not divide the width.
        """
        super().__init__()
        if decoder_type not in HEADS:
            raise ValueError(f"decoder_type is {decoder_type!r}; it must be one of {sorted(HEADS)}")
        if init not in INITS:
            raise ValueError(f"init is {init!r}; it must be one of {list(INITS)}")
        self.hidden_size = _at_least_1("hidden_size", hidden_size)
        self.num_classes = _at_least_1("num_classes", num_classes)
        self.decoder_type = decoder_type
        sizes = _inner_sizes(decoder_type, hidden_size, mlp_hidden_size, num_heads)
        self.mlp_hidden_size = sizes.get("mlp_hidden_size")
        self.num_heads = sizes.get("num_heads")
        self.layers = self._build_layers()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        linear = [layer for layer in self.layers.modules() if isinstance(layer, nn.Linear)]
        for layer in linear:
            nn.init.normal_(layer.weight, std=INIT_STD, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if init == "zeros":
            nn.init.zeros_(linear[-1].weight)

    def _build_layers(self) -> nn.Module:
        inner = [size for size in (self.mlp_hidden_size, self.num_heads) if size is not None]
        return HEADS[self.decoder_type](self.hidden_size, self.num_classes, *inner)

    @property
    def reads_tokens(self) -> bool:
        """Whether `forward` needs tokens_BLD and mask_BL."""
        return self.decoder_type == "attention"

    def forward(
        self,
        hidden_BD: torch.Tensor,
        tokens_BLD: torch.Tensor | None = None,
        mask_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """logits_BC from the states at <ACTION>; a head that `reads_tokens` also reads those where `mask_BL` is True.

        The mask, boolean, needs a True in every row. Other heads ignore tokens and mask. Raises ValueError when a
        head that reads tokens gets none.
        """
        if not self.reads_tokens:
            return self.layers(hidden_BD)
        if tokens_BLD is None or mask_BL is None:
            raise ValueError(f"decoder_type {self.decoder_type!r} reads tokens; it needs tokens_BLD and mask_BL")
        return self.layers(hidden_BD, tokens_BLD, mask_BL)

    def set_class_rows(self, rows_CD: torch.Tensor) -> None:
        """Start a linear head from one weight row per class (see `class_name_rows`); the biases become 0.

        Raises ValueError for another type of head and for rows of another shape. For a whole head only: call it
        before an engine partitions the parameters.
        """
        if self.decoder_type != "linear":
            raise ValueError(f"decoder_type is {self.decoder_type!r}; only a linear head has one row per class to set")
        shape = (self.num_classes, self.hidden_size)
        if tuple(rows_CD.shape) != shape:
            raise ValueError(f"rows have shape {tuple(rows_CD.shape)}; the head needs {shape}")
        self.load_state_dict({"layers.weight": rows_CD, "layers.bias": torch.zeros(self.num_classes)})

    def config(self) -> dict[str, int | str | None]:
        """The constructor's arguments that give the shapes, as they stand in action_decoder_config.json."""
        config: dict[str, int | str | None] = {
            "hidden_size": self.hidden_size,
            "num_classes": self.num_classes,
            "decoder_type": self.decoder_type,
            "mlp_hidden_size": self.mlp_hidden_size,
        }
        return config if self.num_heads is None else config | {"num_heads": self.num_heads}

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

        Raises ValueError naming a file that is missing or damaged, and the key and shapes where they differ from the
        config.
        """
        config_path, weights_path = Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME
        for path in (config_path, weights_path):
            if not path.is_file():
                raise ValueError(f"{path} does not exist; {folder} is not a folder with an action decoder")
        try:
            head = cls(**json.loads(config_path.read_text(encoding="utf-8")), seed=0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_path} is not an action decoder's config: {error}") from error
        tensors = read_tensors(weights_path)
        _check_tensors(head, tensors, str(weights_path))
        head.load_state_dict(tensors, assign=True)
        return head.requires_grad_(True)


def _check_tensors(head: ActionDecoder, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Raise ValueError unless `tensors` are what a head of this config holds."""
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if differing := differing_shapes(found, _shapes(head)):
        raise ValueError(f"{source}: {differing}")


def _shapes(head: ActionDecoder) -> dict[str, tuple[int, ...]]:
    # From a twin on the meta device: under ZeRO-3 the head's own parameters are empty.
    with torch.device("meta"):
        layers = head._build_layers()
    return {f"layers.{key}": tuple(tensor.shape) for key, tensor in layers.state_dict().items()}


def _inner_sizes(
    decoder_type: str, hidden_size: int, mlp_hidden_size: int | None, num_heads: int | None
) -> dict[str, int]:
    """The sizes that heads of this type have inside, as given or by default."""
    defaults: dict[str, dict[str, int]] = {
        "linear": {},
        "mlp": {"mlp_hidden_size": hidden_size},
        "attention": {"mlp_hidden_size": min(ATTENTION_SIZE, hidden_size), "num_heads": ATTENTION_HEADS},
    }
    sizes = dict(defaults[decoder_type])
    for name, value in (("mlp_hidden_size", mlp_hidden_size), ("num_heads", num_heads)):
        if value is not None and name not in sizes:
            raise ValueError(f"{name} is {value}; with decoder_type {decoder_type!r} leave it out")
        if value is not None:
            sizes[name] = _at_least_1(name, value)
    return sizes


def _at_least_1(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return value
