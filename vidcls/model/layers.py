"""transformers' Qwen2.5-VL layers with forwards that do the same in fewer and larger steps.

`speed_up` puts them into a backbone, module by module: names, parameters and the loops over the layers stay, and so do
gradient checkpointing, torch.compile and ZeRO's hooks. The rows of a batch come as one row of `Pieces` (attention.py).

Shape suffixes: N patches, S tokens of the row, D hidden, H heads, G key and value heads, E values of a head, R rows
that are read.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from vidcls.model.adapters import project
from vidcls.model.attention import Pieces, attend


def speed_up(backbone: Qwen2_5_VLModel) -> None:
    """Replace the forwards of a backbone's layers, in place. Those that have been replaced before, by Liger, stay."""
    language, vision = backbone.language_model, backbone.visual
    _replace(vision.patch_embed, _embed_patches)
    for block in vision.blocks:
        _replace(block.attn, _vision_attention)
        _replace(block.mlp, _mlp)
    for layer in language.layers:
        _replace(layer.self_attn, _language_attention)
        _replace(layer.mlp, _mlp)
    _replace(language.layers[-1], _last_layer)
    for module in backbone.modules():
        if isinstance(module, Qwen2_5_VLRMSNorm):
            _replace(module, _rms_norm)


def _replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    if "forward" not in vars(module):
        changed: Any = module
        changed.forward = types.MethodType(forward, module)


def _rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    if self.weight.requires_grad or hasattr(self.weight, "ds_id"):
        return type(self).forward(self, x)
    return _RmsNorm.apply(x, self.weight, self.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    """Qwen2_5_VLRMSNorm with a frozen weight; keeps its input, and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight_D, inverse)
        return weight_D * (wide * inverse).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight_D, inverse = ctx.saved_tensors
        inner = (grad * weight_D).float()
        normal = x.float().mul_(inverse)
        along = (inner * normal).mean(-1, keepdim=True)
        return inner.sub_(normal.mul_(along)).mul_(inverse).to(x.dtype), None, None


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = project(x, (self.gate_proj, self.up_proj))
    (down,) = project(_SwiGlu.apply(gate, up), (self.down_proj,))
    return down


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up; keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up  # out of place: bf16 in place takes twice as long on a CPU

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class _Rotary(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin for tables whose halves are alike; keeps nothing but the tables."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    half = cos.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(second, sin[..., :half], value=-1)
    out[..., half:].addcmul_(first, sin[..., half:])
    return out


def _language_attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    pieces: Pieces,
    lasts: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[1, R, D]: all tokens, or those of `lasts`, the last one of each piece."""
    hidden_SD = hidden_states[0]
    cos_S1E, sin_S1E = (table[0][:, None] for table in position_embeddings)
    if lasts is None:
        q, k, v = project(hidden_SD, (self.q_proj, self.k_proj, self.v_proj))
        cos_R1E, sin_R1E = cos_S1E, sin_S1E
    else:
        k, v = project(hidden_SD, (self.k_proj, self.v_proj))
        (q,) = project(hidden_SD[lasts], (self.q_proj,))
        cos_R1E, sin_R1E = cos_S1E[lasts], sin_S1E[lasts]
    q_RHE, k_SGE, v_SGE = (t.view(len(t), -1, self.head_dim) for t in (q, k, v))
    q_RHE, k_SGE = _Rotary.apply(q_RHE, cos_R1E, sin_R1E), _Rotary.apply(k_SGE, cos_S1E, sin_S1E)
    out_RHE = attend(self, q_RHE, k_SGE, v_SGE, pieces, causal=True, lasts_only=lasts is not None)
    (out_RD,) = project(out_RHE.flatten(1), (self.o_proj,))
    return out_RD[None], None


def _last_layer(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    pieces: Pieces,
    lasts_only: bool,
    **kwargs: Any,
) -> torch.Tensor:
    """A decoder layer of whose output [1, R, D] only the last token of each piece is needed: keys and values of all
    tokens, everything else of these alone."""
    if not lasts_only:
        return type(self).forward(self, hidden_states, position_embeddings=position_embeddings, pieces=pieces, **kwargs)
    normal = self.input_layernorm(hidden_states)
    read, _ = self.self_attn(normal, position_embeddings=position_embeddings, pieces=pieces, lasts=pieces.lasts)
    hidden = hidden_states[:, pieces.lasts] + read
    return hidden + self.mlp(self.post_attention_layernorm(hidden))


def _vision_attention(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: Pieces,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: Any,
) -> torch.Tensor:
    """`cu_seqlens` are the windows, or the frames where a block looks at all of one."""
    (qkv,) = project(hidden_states, (self.qkv,))
    qk_N2HE, v_NHE = qkv.view(len(qkv), 3, self.num_heads, self.head_dim).split((2, 1), dim=1)
    cos, sin = (table[:, None, None].float() for table in position_embeddings)
    turned = _Rotary.apply(qk_N2HE.float(), cos, sin).to(qkv.dtype)
    out_NHE = attend(self, turned[:, 0], turned[:, 1], v_NHE[:, 0], cu_seqlens, causal=False)
    (out_ND,) = project(out_NHE.flatten(1), (self.proj,))
    return out_ND


def _embed_patches(self: Any, patches_NP: torch.Tensor) -> torch.Tensor:
    """A convolution whose stride is its kernel is a matrix product."""
    weight = self.proj.weight
    if hasattr(weight, "ds_id"):
        return type(self).forward(self, patches_NP)
    return F.linear(patches_NP.to(weight.dtype), weight.flatten(1))
