"""transformers' and PEFT's own layers back again, to hold ours against."""

from torch import nn


def with_own_forwards(backbone: nn.Module) -> nn.Module:
    """The backbone of a classifier without the forwards that vidcls put into it; changed in place."""
    for module in backbone.modules():
        vars(module).pop("forward", None)
    return backbone
