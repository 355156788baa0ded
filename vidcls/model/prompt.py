"""A prompt and a clip's grid -> token ids and M-RoPE positions, on the host.

Shape suffix: L sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vidcls.options import ACTION_TOKEN, VIDEO_TAG
from vidcls.prompts import PromptError, check_prompt, with_action_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from vidcls.model.patches import Grid, VisionGeometry

SYSTEM_TEXT = "You are a helpful assistant."
# Tokenised prompts kept per encoder; a dataset with a prompt of its own for every clip must not fill memory.
CACHE_SIZE = 1024


@dataclass(frozen=True)
class EncodedPrompt:
    """One model input without its frames. It ends at <ACTION>, or at the end of the answer behind it."""

    input_ids: np.ndarray
    """int64 [L]"""
    position_ids: np.ndarray
    """int64 [3, L]: time, height, width"""
    action_position: int
    """where <ACTION> stands: L - 1 unless an answer follows"""
    answer_start: int
    """the first id of the answer; L if there is none"""
    video_start: int
    """the first of the video's tokens"""

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or self.input_ids.dtype != np.int64:
            raise ValueError(f"input_ids are {self.input_ids.dtype} {self.input_ids.shape}; need int64 [L]")
        if self.position_ids.shape != (3, len(self)) or self.position_ids.dtype != np.int64:
            raise ValueError(
                f"position_ids are {self.position_ids.dtype} {self.position_ids.shape}; need int64 (3, {len(self)})"
            )
        if not 0 <= self.video_start <= self.action_position < self.answer_start <= len(self):
            raise ValueError(
                f"video_start {self.video_start}, action_position {self.action_position}, "
                f"answer_start {self.answer_start} of {len(self)}"
            )

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Layout:
    """What stands around a prompt: ids before it, text that is tokenised together with its beginning, ids between
    <ACTION> and an answer, ids that end the answer."""

    before: list[int]
    role: str
    to_answer: list[int]
    end: list[int]


class PromptEncoder:
    """Encodes prompts as `template` says; "qwen2_vl": Qwen's chat layout, a system turn, then a user turn cut off at
    <ACTION>; "empty": the prompt alone.

    Attention is causal, so text behind <ACTION> could not change what is read there: it is left out, but for an answer
    that is to be learned. Holds no torch objects and can be pickled for worker processes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        geometry: VisionGeometry,
        video_token_id: int,
        cutoff_len: int,
        min_pixels: int,
        max_pixels: int,
        *,
        image_max_pixels: int | None = None,
        action_token: str = ACTION_TOKEN,
        template: str = "qwen2_vl",
    ) -> None:
        """`tokenizer` knows `action_token`; `cutoff_len` counts tokens; the pixel bounds are areas of one frame,
        `image_max_pixels` that of a clip with a single one.

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
        self.image_max_pixels = max_pixels if image_max_pixels is None else image_max_pixels
        self.action_token = action_token
        self.action_token_id = self._token_id(action_token)
        if (known := self._token_id("<|video_pad|>")) != video_token_id:
            raise ValueError(f"video_token_id is {video_token_id}; the tokenizer's <|video_pad|> is {known}")
        self._layout = TEMPLATES[template](self)
        self._vision_start = self._token_id("<|vision_start|>")
        self._vision_end = self._token_id("<|vision_end|>")
        self._prompts: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def frames_per_grid(self) -> int:
        """Frames in one step of a clip's temporal grid."""
        return self.geometry.temporal_patch_size

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """The height and width, in pixels, that the frames of a clip of this size are resized to."""
        most = self.image_max_pixels if frames == 1 else self.max_pixels
        return self.geometry.frame_size(height, width, self.min_pixels, most)

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """The grid of a clip whose frames are already resized; see VisionGeometry.grid."""
        return self.geometry.grid(frames, height, width)

    def video_tokens(self, grid: Grid) -> int:
        """Tokens of a sequence that are the video's."""
        return self.geometry.num_tokens(grid)

    def encode(self, prompt: str, grid: Grid, seconds_per_grid: float, answer: str | None = None) -> EncodedPrompt:
        """Ids and positions for one clip; `seconds_per_grid` is the time between two grid steps.

        <ACTION> in a prompt stands for the action token, however that is spelt.

        Raises PromptError when the prompt breaks the rules of `check_prompt` or is longer than
        `cutoff_len`: it is never cut, since that would drop <ACTION> or part of the video.
        """
        found = self._prompts.get(prompt)  # once: threads share the cache, and it may be emptied at any time
        if found is None:
            if len(self._prompts) >= CACHE_SIZE:
                self._prompts.clear()
            found = self._prompts[prompt] = self._tokenise(prompt)
        before, after = found
        behind = np.array([], dtype=np.int64)
        if answer is not None:
            behind = np.array([*self._layout.to_answer, *self._text_ids(answer), *self._layout.end], dtype=np.int64)
        video_tokens = self.video_tokens(grid)
        needed = len(before) + video_tokens + len(after) + len(behind)
        if needed > self.cutoff_len:
            raise PromptError(
                f"prompt {prompt!r} with a video of grid {grid} needs {needed} tokens ({video_tokens} for the "
                f"video), cutoff_len allows {self.cutoff_len}; use fewer frames, fewer pixels per frame or a "
                "larger cutoff_len"
            )
        video = np.full(video_tokens, self.video_token_id, dtype=np.int64)
        ids = np.concatenate([before, video, after, behind])
        positions = rope_positions(len(before), grid, len(after) + len(behind), seconds_per_grid, self.geometry)
        action = len(before) + video_tokens + len(after) - 1
        answer_start = needed if answer is None else action + 1 + len(self._layout.to_answer)
        return EncodedPrompt(ids, positions, action, answer_start, len(before))

    def _tokenise(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids in front of the video's tokens and ids behind them, up to <ACTION>."""
        prompt = with_action_token(prompt, self.action_token)
        check_prompt(prompt, self.action_token)
        lead, rest = prompt.split(VIDEO_TAG)
        question, _ = rest.split(self.action_token)
        before = [*self._layout.before, *self._text_ids(self._layout.role + lead), self._vision_start]
        after = [self._vision_end, *self._text_ids(question), self.action_token_id]
        return np.array(before, dtype=np.int64), np.array(after, dtype=np.int64)

    def chat_layout(self) -> Layout:
        """Qwen's: a system turn, the prompt in a user turn, the answer in an assistant turn."""
        start, end, newline = self._token_id("<|im_start|>"), self._token_id("<|im_end|>"), self._text_ids("\n")
        system = [start, *self._text_ids(f"system\n{SYSTEM_TEXT}"), end, *newline]
        to_answer = [end, *newline, start, *self._text_ids("assistant\n")]
        return Layout([*system, start], "user\n", to_answer, [end])

    def empty_layout(self) -> Layout:
        """The prompt, and straight behind it the answer."""
        return Layout([], "", [], [self._token_id("<|im_end|>")])

    def _text_ids(self, text: str) -> list[int]:
        # split_special_tokens: "<|im_end|>" or "<|video_pad|>" written in a prompt stays plain text.
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _token_id(self, token: str) -> int:
        vocabulary = self.tokenizer.get_added_vocab()
        if token not in vocabulary:
            raise ValueError(f"the tokenizer has no special token {token}; is it a Qwen2.5-VL tokenizer?")
        return vocabulary[token]


TEMPLATES = {"qwen2_vl": PromptEncoder.chat_layout, "empty": PromptEncoder.empty_layout}


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
