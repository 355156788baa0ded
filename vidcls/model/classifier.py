"""ActionClassifier: frames and prompts -> class logits. Logits over the vocabulary only for answers that are learned.

Shape suffixes: B batch, L sequence, D hidden, C classes, N tokens of all rows (or patches), S of them those that are
computed, V video tokens, R tokens that are read, P values of a patch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5_VLModel
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from vidcls.model.attention import pieces_of
from vidcls.model.heads import ActionDecoder
from vidcls.model.language_head import LanguageHead
from vidcls.model.layers import speed_up
from vidcls.model.patches import Grid, VisionGeometry, frames_to_patches

# Layouts kept per model: one for every sequence of clip sizes that batches come in.
LAYOUT_CACHE = 64


class ActionToken(nn.Module):
    """The trained embedding of <ACTION>, put in place of its row in the frozen table."""

    def __init__(self, initial_D: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial_D.detach().clone())

    def forward(self, embeds_BLD: torch.Tensor, is_action_BL: torch.Tensor) -> torch.Tensor:
        return torch.where(is_action_BL[..., None], self.weight.to(embeds_BLD.dtype), embeds_BLD)


class ActionClassifier(nn.Module):
    """Backbone, <ACTION> embedding and heads as one module, so that one engine trains all of them.

    `backbone` is a Qwen2_5_VLModel or PEFT's wrapper around one; heads and token are cast to its dtype. Several heads
    share it, each with its own classes. Submodules are only ever called, never read, so the module runs with
    partitioned parameters (ZeRO-3); and every head runs on every row, so that all ranks call the same modules,
    whichever clips they have.
    """

    backbone: Any

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, ActionDecoder],
        action_token: ActionToken,
        *,
        action_token_id: int,
        geometry: VisionGeometry,
        language_head: LanguageHead | None = None,
        share_prefix: bool = True,
    ) -> None:
        """Raises ValueError when a head's or the token's width is not the language model's.

        Args:
            language_head: the vocabulary matrix, for a loss on answers.
            share_prefix: in training, compute what all rows begin with once.
        """
        super().__init__()
        self.backbone = backbone
        config: Any = self.inner.config
        widths = {f"head {name}": head.hidden_size for name, head in heads.items()}
        for name, width in {**widths, "action_token": action_token.weight.shape[0]}.items():
            if width != config.text_config.hidden_size:
                raise ValueError(f"{name} has hidden size {width}; the backbone's is {config.text_config.hidden_size}")
        speed_up(self.inner)
        self.dtype = next(backbone.parameters()).dtype
        self.action_token = action_token.to(self.dtype)
        self.heads = nn.ModuleDict({name: head.to(self.dtype) for name, head in heads.items()})
        self.language_head = language_head
        self.share_prefix = share_prefix
        self.num_classes = tuple(head.num_classes for head in heads.values())
        self.geometry = geometry
        self.action_token_id = action_token_id
        self.video_token_id = config.video_token_id
        self._vision_config: Any = config.vision_config
        self._vision_trains = any(parameter.requires_grad for parameter in self.inner.visual.parameters())
        self._heads_read_tokens = any(head.reads_tokens for head in heads.values())
        self._layout = functools.lru_cache(maxsize=LAYOUT_CACHE)(self._build_layout)

    @property
    def inner(self) -> Qwen2_5_VLModel:
        """The Qwen2.5-VL model inside PEFT's wrapper."""
        backbone: Any = self.backbone
        return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone

    @property
    def classes(self) -> dict[str, int]:
        """How many each head has."""
        return dict(zip(self.heads, self.num_classes, strict=True))

    def forward(
        self,
        frames: torch.Tensor,
        grid_thw: tuple[Grid, ...],
        lengths: tuple[int, ...],
        input_ids_BL: torch.Tensor,
        position_ids_3BL: torch.Tensor,
        action_positions_B: torch.Tensor,
        heads_B: torch.Tensor,
        answer_labels_BL: torch.Tensor | None = None,
        features_VD: torch.Tensor | None = None,
        prefix: int = 0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """float32 logits_BC, C the most classes that a head has: -inf for those that a row's own head has not.

        `frames` is flat uint8, every row's clip one after the other; `grid_thw` holds their grids and `lengths` the
        tokens of each row as host integers, one clip a row. Rows are padded on the right to L; the padding is never
        computed. `action_positions_B` says where <ACTION> stands in each row, at its end unless an answer follows;
        `heads_B` which head classifies it. With `answer_labels_BL` (the next token's id where it is to be predicted,
        else -100) also returns the float32 answer_losses_B of the language head. `features_VD`, what `encode_video`
        once gave for all clips, stands for their frames, which are not looked at: the vision tower is not called.
        All rows begin with the same `prefix` tokens, before their video's: with gradients these are computed once, with
        one dropout mask; without, a row's logits do not depend on what stands beside it.
        """
        batch, longest = input_ids_BL.shape
        if len(grid_thw) != batch or len(lengths) != batch:
            raise ValueError(
                f"grid_thw has {len(grid_thw)} clips, lengths {len(lengths)}, input_ids {batch} rows; they must agree"
            )
        device = input_ids_BL.device
        language_model = self.inner.language_model
        video_VD = self.encode_video(frames, grid_thw) if features_VD is None else features_VD
        shared = prefix if self.share_prefix and torch.is_grad_enabled() else 0
        pieces, tokens_S = pieces_of(lengths, device, shared), _tokens(lengths, longest, device, shared)
        input_ids_S = _packed(input_ids_BL.flatten(), tokens_S)
        is_video_S, is_action_S = input_ids_S == self.video_token_id, input_ids_S == self.action_token_id
        embeds_SD = language_model.embed_tokens(input_ids_S)
        embeds_SD = embeds_SD.masked_scatter(is_video_S[:, None], video_VD.to(embeds_SD.dtype))
        embeds_SD = self.action_token(embeds_SD, is_action_S)
        lasts_only = answer_labels_BL is None and not self._heads_read_tokens
        language_out = language_model(
            inputs_embeds=embeds_SD[None],
            position_ids=_packed(position_ids_3BL.flatten(1), tokens_S)[:, None],
            attention_mask={"full_attention": None},  # attention is cut into pieces, and within them causal
            use_cache=False,
            pieces=pieces,
            lasts_only=lasts_only,
        )
        hidden_RD = language_out.last_hidden_state[0].to(self.dtype)
        if lasts_only:
            return self._classify(hidden_RD, heads_B, {})
        tokens_N = _tokens(lengths, longest, device)
        hidden_BLD = _padded(pieces.unfold(hidden_RD), tokens_N, batch, longest)
        state_BD = hidden_BLD[torch.arange(batch, device=device), action_positions_B]
        read = {}
        if self._heads_read_tokens:
            is_read_N1 = pieces.unfold(is_video_S | is_action_S)[:, None]
            is_read_BL = _padded(is_read_N1, tokens_N, batch, longest)[..., 0]
            read = {"tokens_BLD": hidden_BLD, "mask_BL": is_read_BL}
        logits_BC = self._classify(state_BD, heads_B, read)
        if answer_labels_BL is None:
            return logits_BC
        assert self.language_head is not None, "answers without a language head"
        return logits_BC, self.language_head(hidden_BLD, answer_labels_BL)

    def _classify(self, state_BD: torch.Tensor, heads_B: torch.Tensor, read: dict[str, torch.Tensor]) -> torch.Tensor:
        """Every head on all rows; each row keeps the logits of its own."""
        most = max(self.num_classes)
        chosen_BC: torch.Tensor | None = None
        for number, head in enumerate(self.heads.values()):
            logits_BC = head(state_BD, **read).float()
            padded_BC = F.pad(logits_BC, (0, most - logits_BC.shape[1]), value=-math.inf)
            own_B1 = (heads_B == number)[:, None]
            chosen_BC = padded_BC if chosen_BC is None else torch.where(own_B1, padded_BC, chosen_BC)
        assert chosen_BC is not None
        return chosen_BC

    def encode_video(self, frames: torch.Tensor, grid_thw: tuple[Grid, ...]) -> torch.Tensor:
        """One embedding per video token, clip after clip."""
        patches_NP = frames_to_patches(frames, grid_thw, self.geometry, self.dtype)
        layout = self._layout(grid_thw, frames.device)
        # A frozen tower under no_grad keeps no activations.
        with torch.set_grad_enabled(self._vision_trains and torch.is_grad_enabled()):
            return self.inner.visual(patches_NP, **layout).pooler_output

    # Ordinary tensors even when evaluation builds them: training could not save inference tensors.
    @torch.inference_mode(False)
    def _build_layout(self, grid_thw: tuple[Grid, ...], device: torch.device) -> dict[str, Any]:
        """What the tower would derive from the grids in Python at every call: windows, segments, positions.

        It takes these as keyword arguments instead of computing them.
        """
        vision, merge = self._vision_config, self.geometry.merge_size
        grid = torch.tensor(grid_thw)
        window_index, window_seqlens = get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
        seqlens = get_vision_cu_seqlens(grid)
        lengths, window_lengths = (tuple(bounds.diff().tolist()) for bounds in (seqlens, window_seqlens))
        layout: dict[str, Any] = {
            "grid_thw": grid,
            "position_ids": get_vision_position_ids(grid, merge).to(device),
            "window_index": window_index.to(device),
            "cu_seqlens": pieces_of(lengths, device),  # layers.py reads them so
            "cu_window_seqlens": pieces_of(window_lengths, device),
        }
        if is_flash_attention_requested(vision):
            layout |= {"max_seqlen": max(lengths), "max_window_seqlen": max(window_lengths)}
        return layout


@functools.lru_cache(maxsize=LAYOUT_CACHE)
@torch.inference_mode(False)
def _tokens(lengths: tuple[int, ...], longest: int, device: torch.device, shared: int = 0) -> torch.Tensor | None:
    """Where the tokens of all rows are among B x `longest`, row after row, the first `shared` those of row 0 alone;
    None when these are all."""
    if set(lengths) == {longest} and not shared:
        return None
    rows = [torch.arange(shared if row else 0, length) + row * longest for row, length in enumerate(lengths)]
    return torch.cat(rows).to(device)


def _packed(values: torch.Tensor, tokens_S: torch.Tensor | None) -> torch.Tensor:
    """Of the last dimension, B x L, these tokens."""
    return values if tokens_S is None else values[..., tokens_S]


def _padded(values_ND: torch.Tensor, tokens_N: torch.Tensor | None, batch: int, longest: int) -> torch.Tensor:
    """Back to [B, L, D], zeros in the padding."""
    if tokens_N is not None:
        empty = values_ND.new_zeros(batch * longest, values_ND.shape[1])
        values_ND = empty.index_copy(0, tokens_N, values_ND)
    return values_ND.view(batch, longest, -1)
