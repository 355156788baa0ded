"""ActionClassifier: frames and prompts -> class logits. Logits over the vocabulary only for answers that are learned.

Shape suffixes: B batch, L sequence, D hidden, C classes, N patches, P values of a patch.
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

from vidcls.model.heads import ActionDecoder
from vidcls.model.language_head import LanguageHead
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
    ) -> None:
        """Raises ValueError when a head's or the token's width is not the language model's.

        Args:
            language_head: the vocabulary matrix, for a loss on answers.
        """
        super().__init__()
        self.backbone = backbone
        config: Any = self.inner.config
        widths = {f"head {name}": head.hidden_size for name, head in heads.items()}
        for name, width in {**widths, "action_token": action_token.weight.shape[0]}.items():
            if width != config.text_config.hidden_size:
                raise ValueError(f"{name} has hidden size {width}; the backbone's is {config.text_config.hidden_size}")
        self.dtype = next(backbone.parameters()).dtype
        self.action_token = action_token.to(self.dtype)
        self.heads = nn.ModuleDict({name: head.to(self.dtype) for name, head in heads.items()})
        self.language_head = language_head
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
        input_ids_BL: torch.Tensor,
        position_ids_3BL: torch.Tensor,
        action_positions_B: torch.Tensor,
        heads_B: torch.Tensor,
        answer_labels_BL: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """float32 logits_BC, C the most classes that a head has: -inf for those that a row's own head has not.

        `frames` is flat uint8, every row's clip one after the other; `grid_thw` holds their grids as host
        integers, one clip a row. Rows are padded on the RIGHT, with any id but the video's and <ACTION>'s:
        attention is causal, so no token sees the padding behind it and no mask is needed.
        `action_positions_B` says where <ACTION> stands in each row, `heads_B` which head classifies it. With
        `answer_labels_BL` (the next token's id where it is to be predicted, else -100) also returns the float32
        answer_losses_B of the language head.
        """
        batch = input_ids_BL.shape[0]
        if len(grid_thw) != batch:
            raise ValueError(f"grid_thw has {len(grid_thw)} clips, input_ids has {batch} rows; they must be equal")
        language_model = self.inner.language_model
        video_ND = self._encode_video(frames, grid_thw)
        embeds_BLD = language_model.embed_tokens(input_ids_BL)
        is_video_BL = input_ids_BL == self.video_token_id
        is_action_BL = input_ids_BL == self.action_token_id
        embeds_BLD = embeds_BLD.masked_scatter(is_video_BL[..., None], video_ND.to(embeds_BLD.dtype))
        embeds_BLD = self.action_token(embeds_BLD, is_action_BL)
        hidden_BLD = language_model(
            inputs_embeds=embeds_BLD, position_ids=position_ids_3BL, attention_mask=None, use_cache=False
        ).last_hidden_state.to(self.dtype)
        rows_B = torch.arange(batch, device=hidden_BLD.device)
        state_BD = hidden_BLD[rows_B, action_positions_B]
        read = {"tokens_BLD": hidden_BLD, "mask_BL": is_video_BL | is_action_BL} if self._heads_read_tokens else {}
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

    def _encode_video(self, frames: torch.Tensor, grid_thw: tuple[Grid, ...]) -> torch.Tensor:
        """One embedding per video token, clip after clip."""
        patches_NP = frames_to_patches(frames, grid_thw, self.geometry, self.dtype)
        layout = self._layout(grid_thw, frames.device)
        # A frozen tower under no_grad keeps no activations.
        with torch.set_grad_enabled(self._vision_trains and torch.is_grad_enabled()):
            return self.inner.visual(patches_NP, **layout).pooler_output

    # Ordinary tensors even when evaluation builds them: training could not save inference tensors.
    @torch.inference_mode(False)
    def _build_layout(self, grid_thw: tuple[Grid, ...], device: torch.device) -> dict[str, torch.Tensor | int]:
        """What the tower would derive from the grids in Python at every call: windows, segments, positions.

        It takes these as keyword arguments instead of computing them.
        """
        vision, merge = self._vision_config, self.geometry.merge_size
        grid = torch.tensor(grid_thw)
        window_index, window_seqlens = get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
        seqlens = get_vision_cu_seqlens(grid)
        layout: dict[str, torch.Tensor | int] = {
            "grid_thw": grid,
            "position_ids": get_vision_position_ids(grid, merge).to(device),
            "window_index": window_index.to(device),
            "cu_seqlens": seqlens,
            "cu_window_seqlens": window_seqlens,
        }
        # Flash attention reads the segment bounds on the device; the others cut with them on the host, where
        # a tensor on the device would cost one sync per layer.
        if is_flash_attention_requested(vision):
            layout |= {
                "cu_seqlens": seqlens.to(device),
                "cu_window_seqlens": window_seqlens.to(device),
                "max_seqlen": int(seqlens.diff().max()),
                "max_window_seqlen": int(window_seqlens.diff().max()),
            }
        return layout
