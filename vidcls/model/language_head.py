"""LanguageHead: the language model's loss on answer tokens, without ever holding their vocabulary logits.

Shape suffixes: B batch, L sequence, T answer tokens (of all rows, or of one chunk), D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

NO_ANSWER = -100
CHUNK_BYTES = 64 * 2**20  # the float32 logits of one chunk: 110 tokens at Qwen2.5-VL's 151,936 rows


class LanguageHead(nn.Module):
    """Mean negative log-likelihood of each row's answer tokens.

    `weight` is the vocabulary matrix [V, D]: the very Parameter of the embedding table where the two are tied, so
    that ZeRO-3 gathers it around this module too. It must be frozen: it gets no gradient.
    """

    def __init__(self, weight: nn.Parameter, chunk: int | None = None) -> None:
        """`chunk` is how many tokens have logits at a time, by default as many as fill `CHUNK_BYTES`."""
        super().__init__()
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"weight is a {type(weight).__name__}; it must be the vocabulary's nn.Parameter itself")
        if weight.requires_grad:
            raise ValueError("weight requires grad; the vocabulary must be frozen, as the loss gives it no gradient")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1")
        self.weight = weight
        self.chunk = chunk

    def forward(self, hidden_BLD: torch.Tensor, answer_labels_BL: torch.Tensor) -> torch.Tensor:
        """float32 losses_B (float64 for a float64 weight); a row without answer tokens gives 0.

        `answer_labels_BL[b, i]` is the id of token i + 1 where that one is to be predicted, `NO_ANSWER` elsewhere.
        Costs one host sync on a GPU, for the number of answer tokens. Memory for backward is one hidden state per
        answer token; gradients are exact for any weighting of the rows.
        """
        rows_T, columns_T = torch.nonzero(answer_labels_BL != NO_ANSWER, as_tuple=True)
        hidden_TD = hidden_BLD[rows_T, columns_T].to(self.weight.dtype)
        chunk = self.chunk or max(1, CHUNK_BYTES // (4 * self.weight.shape[0]))
        losses_T: Any = _TokenLosses.apply(hidden_TD, self.weight, answer_labels_BL[rows_T, columns_T], chunk)
        # Laid out and summed, not added by index: that would be in another order every time on a GPU.
        losses_BL = losses_T.new_zeros(answer_labels_BL.shape).index_put((rows_T, columns_T), losses_T)
        counts_B = (answer_labels_BL != NO_ANSWER).sum(dim=1)
        return losses_BL.sum(dim=1) / counts_B.clamp(min=1)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each token against its label, in chunks.

    The weight is frozen and so needed in forward only: the hidden states' gradient is computed there and scaled in
    backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        losses_T = hidden_TD.new_empty(len(labels_T), dtype=_exact(weight_VD.dtype))
        gradient_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        for part in _chunks(len(labels_T), chunk):
            losses_T[part], errors_TV = _losses_and_errors(hidden_TD[part], weight_VD, labels_T[part])
            if gradient_TD is not None:
                gradient_TD[part] = errors_TV.to(weight_VD.dtype) @ weight_VD
            del errors_TV  # or it would stay while the next chunk's is made
        ctx.save_for_backward(gradient_TD)
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_T: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient_TD,) = ctx.saved_tensors
        return (gradient_TD * upstream_T[:, None]).to(gradient_TD.dtype), None, None, None


def _losses_and_errors(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """losses_T and errors_TV, the softmax less the one-hot label, which is each loss's gradient by the logits."""
    logits_TV = F.linear(hidden_TD, weight_VD)
    errors_TV = F.log_softmax(logits_TV, dim=-1, dtype=_exact(weight_VD.dtype))
    losses_T = -errors_TV.gather(1, labels_T[:, None]).squeeze(1)
    errors_TV.exp_()
    errors_TV[torch.arange(len(labels_T), device=labels_T.device), labels_T] -= 1
    return losses_T, errors_TV


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))
