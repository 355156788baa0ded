"""Attention over pieces of one long row of tokens: clips of a batch, windows of a frame. Nothing is padded.

Pieces may begin alike: under causal attention their states are alike too, as far as they do. The row then has that
prefix once, in front of everything; only attention itself sees it in every piece.

Shape suffixes: N tokens of all pieces, S tokens of the row (N without shared prefixes), P pieces, L tokens of a piece,
R rows that ask, H heads, G key and value heads, E values of a head.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Group:
    """All pieces of one length: their numbers [P], and their tokens [P * L]; None where these are all, in order."""

    length: int
    numbers: torch.Tensor | None
    tokens: torch.Tensor | None

    def cut(self, row: torch.Tensor) -> torch.Tensor:
        """[N, heads, E] -> [P, heads, L, E]."""
        own = row if self.tokens is None else row[self.tokens]
        return own.view(-1, self.length, *row.shape[1:]).transpose(1, 2)

    def ends(self, lasts: torch.Tensor) -> torch.Tensor:
        """Of one token a piece [all pieces, heads, E] this group's: [P, heads, 1, E]."""
        return (lasts if self.numbers is None else lasts[self.numbers])[:, :, None]


@dataclass(frozen=True)
class Pieces:
    """How a row of tokens is cut, one piece behind the other.

    lasts: the last token of each piece, in the row. bounds: int32 [P + 1], where pieces begin and the last one ends,
    each with the prefix. token_back, piece_back: from the groups' tokens or pieces, one group behind the other, to
    theirs in order; None with a single group. cuts: lengths of the prefix and of what follows it in each piece; empty
    where none is shared.
    """

    longest: int
    groups: tuple[Group, ...]
    lasts: torch.Tensor
    bounds: torch.Tensor
    token_back: torch.Tensor | None
    piece_back: torch.Tensor | None
    cuts: tuple[int, ...] = ()

    def unfold(self, row: torch.Tensor) -> torch.Tensor:
        """[S, ...] -> [N, ...]: the shared prefix in front of every piece."""
        return _Unfold.apply(row, self.cuts) if self.cuts else row

    def fold(self, row: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [S, ...]: of the prefix that of the first piece, for all are alike."""
        return _Fold.apply(row, self.cuts) if self.cuts else row


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # ordinary tensors even when evaluation makes them: training could not save the others
def pieces_of(lengths: tuple[int, ...], device: torch.device, prefix: int = 0) -> Pieces:
    """Pieces of these lengths, of which the first `prefix` tokens are shared; kept, because batches come in the same
    ones."""
    each = torch.tensor(lengths)
    ends = each.cumsum(0)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), ends.to(torch.int32)])
    lasts = prefix + (each - prefix).cumsum(0) - 1
    common = max(lengths), lasts.to(device), bounds.to(device)
    cuts = (prefix, *(length - prefix for length in lengths)) if prefix else ()
    if len(set(lengths)) == 1:
        return Pieces(common[0], (Group(lengths[0], None, None),), *common[1:], None, None, cuts)
    groups, numbers, tokens = [], [], []
    for length in dict.fromkeys(lengths):
        own = (each == length).nonzero()[:, 0]
        numbers.append(own)
        tokens.append((ends[own, None] - length + torch.arange(length)).flatten())
        groups.append(Group(length, own.to(device), tokens[-1].to(device)))
    token_back, piece_back = (torch.cat(parts).argsort().to(device) for parts in (tokens, numbers))
    return Pieces(common[0], tuple(groups), *common[1:], token_back, piece_back, cuts)


class _Unfold(torch.autograd.Function):
    """Pieces.unfold. The gradient of the prefix is one sum over all pieces, rounded once."""

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, cuts: tuple[int, ...]) -> torch.Tensor:
        ctx.cuts = cuts
        prefix, *owns = row.split(cuts)
        return _in_turns([prefix] * len(owns), owns)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        prefixes, owns = _turns(grad, ctx.cuts)
        return torch.cat([torch.stack(prefixes).sum(0), *owns]), None


class _Fold(torch.autograd.Function):
    """Pieces.fold."""

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, cuts: tuple[int, ...]) -> torch.Tensor:
        ctx.cuts = cuts
        prefixes, owns = _turns(row, cuts)
        return torch.cat([prefixes[0], *owns])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        prefix, *owns = grad.split(ctx.cuts)
        unread = torch.zeros_like(prefix)
        return _in_turns([prefix, *[unread] * (len(owns) - 1)], owns), None


def _in_turns(prefixes: list[torch.Tensor], owns: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part for pair in zip(prefixes, owns, strict=True) for part in pair])


def _turns(row: torch.Tensor, cuts: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Views of the prefixes and of what follows each."""
    prefix, *owns = cuts
    parts = row.split([part for own in owns for part in (prefix, own)])
    return list(parts[::2]), list(parts[1::2])


def attend(
    module: Any,
    q_RHE: torch.Tensor,
    k_SGE: torch.Tensor,
    v_SGE: torch.Tensor,
    pieces: Pieces,
    *,
    causal: bool,
    lasts_only: bool = False,
) -> torch.Tensor:
    """Attention within each piece: [R, H, E], R all of the row or, with `lasts_only`, the last token of each piece.

    `module` is transformers' attention module, whose config names the implementation.
    """
    k_NGE, v_NGE = pieces.unfold(k_SGE), pieces.unfold(v_SGE)
    asked = q_RHE if lasts_only else pieces.unfold(q_RHE)
    out = _within(module, asked, k_NGE, v_NGE, pieces, causal=causal, lasts_only=lasts_only)
    return out if lasts_only else pieces.fold(out)


def _within(
    module: Any,
    q_RHE: torch.Tensor,
    k_NGE: torch.Tensor,
    v_NGE: torch.Tensor,
    pieces: Pieces,
    *,
    causal: bool,
    lasts_only: bool,
) -> torch.Tensor:
    """`attend` where every piece is whole."""
    implementation = module.config._attn_implementation
    if implementation.startswith("flash_attention"):
        return _flash(implementation, module, (q_RHE, k_NGE, v_NGE), pieces, causal=causal, lasts_only=lasts_only)
    outputs = []
    for group in pieces.groups:
        k, v = group.cut(k_NGE), group.cut(v_NGE)
        q = group.ends(q_RHE) if lasts_only else group.cut(q_RHE)
        masked = causal and not lasts_only  # the last token sees all of its piece
        # On a CPU the backward of torch's fused attention takes twice the time of the one written out (torch 2.13).
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        if implementation == "eager" or (trains and q.device.type == "cpu"):
            out = _plain(q, k, v, module.scaling, causal=masked)
        else:
            shared = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=masked, scale=module.scaling, enable_gqa=shared)
        outputs.append(out.transpose(1, 2).reshape(-1, *q_RHE.shape[1:]))
    back = pieces.piece_back if lasts_only else pieces.token_back
    return outputs[0] if back is None else torch.cat(outputs)[back]


def _flash(
    implementation: str,
    module: Any,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pieces: Pieces,
    *,
    causal: bool,
    lasts_only: bool,
) -> torch.Tensor:
    """transformers' flash attention, which takes the bounds of the pieces."""
    interface: Any = ALL_ATTENTION_FUNCTIONS[implementation]
    single = torch.arange(len(pieces.bounds), dtype=torch.int32, device=pieces.bounds.device)
    out, _ = interface(
        module,
        *(t.transpose(0, 1)[None] for t in qkv),
        attention_mask=None,
        scaling=module.scaling,
        dropout=0.0,
        is_causal=causal,
        cu_seq_lens_q=single if lasts_only else pieces.bounds,
        cu_seq_lens_k=pieces.bounds,
        max_length_q=1 if lasts_only else pieces.longest,
        max_length_k=pieces.longest,
    )
    return out[0]


def _plain(
    q_PHRE: torch.Tensor, k_PGLE: torch.Tensor, v_PGLE: torch.Tensor, scale: float, *, causal: bool
) -> torch.Tensor:
    """Attention written out: [P, H, R, E]. torch computes a softmax of bf16 values in float32.

    Query heads that share a key head are rows of one matrix product.
    """
    pieces, heads, rows, width = q_PHRE.shape
    shared = k_PGLE.shape[1]
    q, k, v = q_PHRE.reshape(pieces * shared, -1, width), k_PGLE.flatten(0, 1), v_PGLE.flatten(0, 1)
    mask = _causal_mask(rows, q.dtype, q.device).repeat(heads // shared, 1) if causal else q.new_zeros(())
    weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(dim=-1)
    return (weights @ v).view(pieces, heads, rows, width)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 where a row may look, -inf beyond."""
    return torch.full((length, length), -math.inf, dtype=dtype, device=device).triu_(1)
