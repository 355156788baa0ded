"""AttentiveClassifier: the <ACTION> state looks over the clip's tokens before it is classified.

Shape suffixes: B batch, L sequence, D hidden, W inner width, N heads, H width of one head, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class AttentiveClassifier(nn.Module):
    """One query per row attends over the row's tokens; query plus answer, normalised, goes to a linear layer.

    The query is a linear map of the <ACTION> state (its bias is the query that all clips share), and it is added to
    what it finds. So the state decides what is looked for, and it reaches the classes undiluted, where as one key
    among hundreds it would have next to no say: attention is about even at first.
    """

    def __init__(self, hidden_size: int, num_classes: int, width: int, num_heads: int) -> None:
        """`width` is W, which `num_heads` must divide: ValueError otherwise."""
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide the inner width, which is {width}")
        self.num_heads = num_heads
        self.state_norm = nn.LayerNorm(hidden_size)
        self.token_norm = nn.LayerNorm(hidden_size)
        self.to_query = nn.Linear(hidden_size, width)
        # Without a bias: it would add the same to every key's score, so it could never learn.
        self.to_key = nn.Linear(hidden_size, width, bias=False)
        self.to_value = nn.Linear(hidden_size, width)
        self.to_output = nn.Linear(width, width)
        self.output_norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, hidden_BD: torch.Tensor, tokens_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """logits_BC; `mask_BL` is True at the tokens to read, at one of every row at least."""
        query_BW = self.to_query(self.state_norm(hidden_BD))
        tokens_BLD = self.token_norm(tokens_BLD)
        query_BN1H = self._split(query_BW[:, None])
        key_BNLH, value_BNLH = self._split(self.to_key(tokens_BLD)), self._split(self.to_value(tokens_BLD))
        found_BN1H = F.scaled_dot_product_attention(
            query_BN1H, key_BNLH, value_BNLH, attn_mask=mask_BL[:, None, None, :]
        )
        return self.classifier(self.output_norm(query_BW + self.to_output(found_BN1H.flatten(1))))

    def _split(self, values_BLW: torch.Tensor) -> torch.Tensor:
        return values_BLW.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
