"""Linear layers with LoRA, several on one input: fewer and larger matrix products, and nothing kept for backward twice.

PEFT's own forward computes each layer alone: with its own dropout mask over the whole input, the input scaled and kept
once more, and the adapter's output scaled and added in passes of their own (docs/performance.md has what that costs).

Shape suffixes: N tokens, K inputs, O outputs, R rank of one adapter, S ranks of all adapters on the input together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from vidcls.model.prepacking import Prepacked, prepacked

ADAPTER = "default"
LANES = 4  # random numbers of 16 bits in one of 64


@dataclass(frozen=True)
class _Layer:
    """A frozen linear layer, with an adapter or without."""

    weight_OK: torch.Tensor
    bias_O: torch.Tensor | None
    down_RK: torch.Tensor | None = None
    up_OR: torch.Tensor | None = None
    scale: float = 0.0
    dropout: float = 0.0
    packed: Prepacked | None = None

    def multiply(self, x_NK: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return self.packed.multiply(x_NK, self.bias_O)
        return F.linear(x_NK, self.weight_OK, self.bias_O)

    def multiply_back(self, grad_NO: torch.Tensor, onto_NK: torch.Tensor | None) -> torch.Tensor:
        """The gradient of x; `onto_NK` is that of other layers, which may be written to."""
        found = None if self.packed is None else self.packed.multiply_back(grad_NO, onto_NK)
        if found is not None:
            return found
        return grad_NO @ self.weight_OK if onto_NK is None else onto_NK.addmm_(grad_NO, self.weight_OK)


def project(x: torch.Tensor, modules: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
    """What each of the linear layers, plain or with PEFT's LoRA, makes of x [..., K].

    As PEFT computes it, but for LoRA's dropout: layers on one input share its mask. Layers that are tuned in any other
    way (whole weights, DoRA, merged adapters) or partitioned (ZeRO-3 gathers them when they are called) are called.
    """
    layers = [_read(module) for module in modules]
    if any(layer is None for layer in layers) or not _equal_dropout(layers):
        return tuple(module(x) for module in modules)
    known: list[Any] = layers
    p = max(layer.dropout for layer in known)
    x_NK = x.reshape(-1, x.shape[-1])
    keep_NK = _keep_mask(x_NK, p) if p and modules[0].training else None
    tensors = [t for each in known for t in (each.weight_OK, each.bias_O, each.down_RK, each.up_OR)]
    fixed = tuple((each.scale, each.packed) for each in known)
    outputs = _Projections.apply(x_NK, keep_NK, 1.0 / (1.0 - p), fixed, *tensors)
    return tuple(y_NO.view(*x.shape[:-1], -1) for y_NO in outputs)


def _equal_dropout(layers: Sequence[_Layer | None]) -> bool:
    return len({layer.dropout for layer in layers if layer is not None and layer.down_RK is not None}) <= 1


def _read(module: nn.Module) -> _Layer | None:
    """What `project` computes itself; None for a layer that has to be called."""
    base: Any = module
    adapted: dict[str, Any] = {}
    if isinstance(module, LoraLinear):
        layer: Any = module
        base = layer.base_layer
        if layer.merged or layer.disable_adapters or layer.active_adapters != [ADAPTER] or layer.lora_variant:
            return None
        dropout = layer.lora_dropout[ADAPTER]
        adapted = {
            "down_RK": layer.lora_A[ADAPTER].weight,
            "up_OR": layer.lora_B[ADAPTER].weight,
            "scale": float(layer.scaling[ADAPTER]),
            "dropout": dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
        }
    if type(base) is not nn.Linear or base.weight.requires_grad or hasattr(base.weight, "ds_id"):
        return None
    return _Layer(base.weight, base.bias, packed=prepacked(base), **adapted)


def multiplied_here(root: nn.Module) -> Iterator[nn.Linear]:
    """The frozen linear layers below `root`, without their adapters, whose products `project` computes itself."""
    inner = {id(module.base_layer) for module in root.modules() if isinstance(module, LoraLinear)}
    for module in root.modules():
        if isinstance(module, nn.Linear | LoraLinear) and id(module) not in inner and _read(module) is not None:
            base: Any = module.base_layer if isinstance(module, LoraLinear) else module
            yield base


def _keep_mask(x_NK: torch.Tensor, p: float) -> torch.Tensor:
    """Like x: 1 with probability 1 - p, else 0; follows from torch's generator."""
    if x_NK.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty_like(x_NK).bernoulli_(1 - p)
    # torch's bernoulli_ (2.13) takes 5 ns an element: longer than the matrix product it is for.
    # 16 random bits an element are enough for a probability.
    seed = int(torch.empty((), dtype=torch.int64).random_())
    count = x_NK.numel()
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-count // LANES), dtype=np.uint64)
    lanes = torch.from_numpy(words.view(np.int16))[:count].view(x_NK.shape)
    return torch.ge(lanes, round(p * 2**16) - 2**15, out=torch.empty_like(x_NK))


def _layers(tensors: Sequence[Any], packs: Sequence[Prepacked | None]) -> list[_Layer]:
    starts = range(0, len(tensors), 4)
    return [replace(_Layer(*tensors[i : i + 4]), packed=packed) for i, packed in zip(starts, packs, strict=True)]


class _Projections(torch.autograd.Function):
    """x_NK -> each layer's x W^T + b + scale (drop(x) A^T) B^T.

    `amplify` is 1 / (1 - p) of the dropout; `fixed` has scale and prepacked weight of each layer.
    """

    @staticmethod
    def forward(ctx: Any, x_NK: Any, keep_NK: Any, amplify: float, fixed: tuple[Any, ...], *tensors: Any) -> Any:
        layers = _layers(tensors, [packed for _, packed in fixed])
        factors = [scale * (amplify if keep_NK is not None else 1.0) for scale, _ in fixed]
        downs = [layer.down_RK for layer in layers if layer.down_RK is not None]
        low_NS = None
        if downs:
            dropped_NK = x_NK if keep_NK is None else x_NK * keep_NK
            low_NS = F.linear(dropped_NK, torch.cat(downs))
        outputs, start = [], 0
        for layer, factor in zip(layers, factors, strict=True):
            y_NO = layer.multiply(x_NK)
            if layer.up_OR is not None:
                assert low_NS is not None
                rank = layer.up_OR.shape[1]
                y_NO.addmm_(low_NS[:, start : start + rank], layer.up_OR.t(), alpha=factor)
                start += rank
            outputs.append(y_NO)
        ctx.save_for_backward(x_NK if downs else None, keep_NK, low_NS, *tensors)  # a frozen layer needs no input
        ctx.factors, ctx.packs = factors, [layer.packed for layer in layers]
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x_NK, keep_NK, low_NS, *tensors = ctx.saved_tensors
        layers = _layers(tensors, ctx.packs)
        lows, ups, start = [], [], 0
        for layer, factor, grad_NO in zip(layers, ctx.factors, grads, strict=True):
            if layer.up_OR is not None:
                rank = layer.up_OR.shape[1]
                lows.append((grad_NO @ layer.up_OR).mul_(factor))
                ups.append((low_NS[:, start : start + rank].t() @ grad_NO).t().mul(factor))
                start += rank
        grad_low_NS = torch.cat(lows, dim=1) if lows else None
        grad_x: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            for layer, grad_NO in zip(layers, grads, strict=True):
                grad_x = layer.multiply_back(grad_NO, grad_x)
            assert grad_x is not None
            if grad_low_NS is not None:
                down_SK = torch.cat([layer.down_RK for layer in layers if layer.down_RK is not None])
                if keep_NK is None:
                    grad_x.addmm_(grad_low_NS, down_SK)
                else:
                    grad_x.addcmul_(grad_low_NS @ down_SK, keep_NK)
        grad_downs: list[torch.Tensor] = []
        if grad_low_NS is not None:
            grad_down_SK = grad_low_NS.t() @ (x_NK if keep_NK is None else x_NK * keep_NK)
            grad_downs = list(grad_down_SK.split([low.shape[1] for low in lows]))
        result: list[Any] = []
        for layer in layers:
            has = layer.up_OR is not None
            result += [None, None, grad_downs.pop(0) if has else None, ups.pop(0) if has else None]
        return grad_x, None, None, None, *result
