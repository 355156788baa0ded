"""A prompt and a clip's grid -> token ids and M-RoPE positions, on the host.

Shape suffix: L sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vidcls.config import ACTION_TOKEN, VIDEO_TAG, PromptError, check_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from vidcls.model.patches import Grid, VisionGeometry

SYSTEM_TEXT = "You are a helpful assistant."
# Tokenised prompts kept per encoder; a dataset with a prompt of its own for every clip must not fill memory.
CACHE_SIZE = 1024


@dataclass(frozen=True)
class EncodedPrompt:
    """One model input without its frames. It ends at <ACTION>, so that token's position is L - 1."""

    input_ids: np.ndarray
    """int64 [L]"""
    position_ids: np.ndarray
    """int64 [3, L]: time, height, width"""

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or self.input_ids.dtype != np.int64:
            raise ValueError(f"input_ids are {self.input_ids.dtype} {self.input_ids.shape}; need int64 [L]")
        if self.position_ids.shape != (3, len(self)) or self.position_ids.dtype != np.int64:
            raise ValueError(
                f"position_ids are {self.position_ids.dtype} {self.position_ids.shape}; need int64 (3, {len(self)})"
            )

    def __len__(self) -> int:
        return len(self.input_ids)


class PromptEncoder:
    """Encodes prompts in Qwen's chat layout: a system turn, then a user turn cut off at <ACTION>.

    Attention is causal, so text behind <ACTION> could not change what is read there: it is left out.
    Holds no torch objects and can be pickled into DataLoader workers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        geometry: VisionGeometry,
        video_token_id: int,
        cutoff_len: int,
        min_pixels: int,
        max_pixels: int,
    ) -> None:
        """`tokenizer` knows <ACTION>; `cutoff_len` counts tokens; the pixel bounds are areas of one frame.

        Raises ValueError when the tokenizer lacks a token of the layout or disagrees about the video token.
        """
        if cutoff_len < 1:
            raise ValueError(f"cutoff_len is {cutoff_len}; it must be at least 1")
        self.tokenizer = tokenizer
        self.geometry = geometry
        self.video_token_id = video_token_id
        self.cutoff_len = cutoff_len
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.action_token_id = self._token_id(ACTION_TOKEN)
        if (known := self._token_id("<|video_pad|>")) != video_token_id:
            raise ValueError(f"video_token_id is {video_token_id}; the tokenizer's <|video_pad|> is {known}")
        start, end = self._token_id("<|im_start|>"), self._token_id("<|im_end|>")
        system = [start, *self._text_ids(f"system\n{SYSTEM_TEXT}"), end, *self._text_ids("\n")]
        self._user_turn = [*system, start]
        self._vision_start = self._token_id("<|vision_start|>")
        self._vision_end = self._token_id("<|vision_end|>")
        self._prompts: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def frames_per_grid(self) -> int:
        """Frames in one step of a clip's temporal grid."""
        return self.geometry.temporal_patch_size

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """The height and width, in pixels, that frames of this size are resized to."""
        return self.geometry.frame_size(height, width, self.min_pixels, self.max_pixels)

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """The grid of a clip whose frames are already resized; see VisionGeometry.grid."""
        return self.geometry.grid(frames, height, width)

    def encode(self, prompt: str, grid: Grid, seconds_per_grid: float) -> EncodedPrompt:
        """Ids and positions for one clip; `seconds_per_grid` is the time between two grid steps.

        Raises PromptError when the prompt breaks the rules of `check_prompt` or is longer than
        `cutoff_len`: it is never cut, since that would drop <ACTION> or part of the video.
        """
        if prompt not in self._prompts:
            if len(self._prompts) >= CACHE_SIZE:
                self._prompts.clear()
            self._prompts[prompt] = self._tokenise(prompt)
        before, after = self._prompts[prompt]
        video_tokens = self.geometry.num_tokens(grid)
        needed = len(before) + video_tokens + len(after)
        if needed > self.cutoff_len:
            raise PromptError(
                f"prompt {prompt!r} with a video of grid {grid} needs {needed} tokens ({video_tokens} for the "
                f"video), cutoff_len allows {self.cutoff_len}; use fewer frames, fewer pixels per frame or a "
                "larger cutoff_len"
            )
        video = np.full(video_tokens, self.video_token_id, dtype=np.int64)
        position_ids = rope_positions(len(before), grid, len(after), seconds_per_grid, self.geometry)
        return EncodedPrompt(np.concatenate([before, video, after]), position_ids)

    def _tokenise(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids in front of the video's tokens and ids behind them, up to <ACTION>."""
        check_prompt(prompt)
        lead, rest = prompt.split(VIDEO_TAG)
        question, _ = rest.split(ACTION_TOKEN)
        before = [*self._user_turn, *self._text_ids(f"user\n{lead}"), self._vision_start]
        after = [self._vision_end, *self._text_ids(question), self.action_token_id]
        return np.array(before, dtype=np.int64), np.array(after, dtype=np.int64)

    def _text_ids(self, text: str) -> list[int]:
        # split_special_tokens: "<|im_end|>" or "<|video_pad|>" written in a prompt stays plain text.
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _token_id(self, token: str) -> int:
        vocabulary = self.tokenizer.get_added_vocab()
        if token not in vocabulary:
            raise ValueError(f"the tokenizer has no special token {token}; is it a Qwen2.5-VL tokenizer?")
        return vocabulary[token]


def rope_positions(
    before: int, grid: Grid, after: int, seconds_per_grid: float, geometry: VisionGeometry
) -> np.ndarray:
    """M-RoPE positions, int64 [3, L], of `before` text tokens, one video and `after` text tokens.

    The same numbers as `Qwen2_5_VLModel.get_rope_index`, which computes them on the device with host
    syncs. Text counts up by one in all three rows; the video's time row advances by
    `tokens_per_second * seconds_per_grid` a step, cut to whole numbers; text goes on behind the longer
    of the video's merged sides (not behind its time).
    """
    t, h, w = grid[0], grid[1] // geometry.merge_size, grid[2] // geometry.merge_size
    # float32 as in transformers: in float64 a product such as 3 * 0.333... can land on the other side of
    # a whole number.
    interval = np.float32(geometry.tokens_per_second) * np.float32(seconds_per_grid)
    steps = (np.arange(t, dtype=np.float32) * interval).astype(np.int64)
    video_3thw = np.empty((3, t, h, w), dtype=np.int64)
    video_3thw[0] = steps[:, None, None]
    video_3thw[1] = np.arange(h)[:, None]
    video_3thw[2] = np.arange(w)
    text_3L = np.tile(np.arange(before + after), (3, 1))
    pieces = [text_3L[:, :before], video_3thw.reshape(3, -1) + before, text_3L[:, before:] + max(h, w)]
    return np.concatenate(pieces, axis=1)
