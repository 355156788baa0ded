"""Clips side by side: what crosses the border between the data and the model.

`Batch` holds exactly what the classifier's forward takes, plus what the loss needs.

Tensor name suffixes: B clips in the batch, L padded sequence length, V video tokens, D their width. Shapes: T frames,
H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch

from vidcls.data.codecs import resize_frames
from vidcls.data.frames import view
from vidcls.options import spared_tokens

Grid = tuple[int, int, int]
IGNORED = -100
"""An answer label where nothing is to be predicted, as in torch's cross_entropy."""


class EncodedText(Protocol):
    """Token ids int64 [L] and rotary positions int64 [3, L].

    action_position: where <ACTION> stands, L - 1 unless an answer follows. answer_start: the first of the ids that a
    language model is to predict; L without an answer. video_start: the first of the video's.
    """

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def position_ids(self) -> np.ndarray: ...
    @property
    def action_position(self) -> int: ...
    @property
    def answer_start(self) -> int: ...
    @property
    def video_start(self) -> int: ...


class ClipEncoder(Protocol):
    """What the loader asks of the model side (model/prompt.py provides it)."""

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]: ...
    def grid(self, frames: int, height: int, width: int) -> Grid: ...
    def video_tokens(self, grid: Grid) -> int: ...
    def encode(self, prompt: str, grid: Grid, seconds_per_grid: float, answer: str | None = None) -> EncodedText: ...
    @property
    def frames_per_grid(self) -> int: ...


@dataclass(frozen=True)
class ClipShape:
    """How a clip lies in a batch: frames [T, H, W, 3] with T a multiple of the temporal patch.

    used: the frames that are the clip's own, at the front; the others repeat the last one, as transformers' video
    processor does.
    """

    used: int
    shape: tuple[int, int, int, int]
    grid: Grid

    @classmethod
    def of(cls, encoder: ClipEncoder, used: int, height: int, width: int) -> ClipShape:
        """For `used` frames that are stored as height x width pixels."""
        frames = used + -used % encoder.frames_per_grid
        size = encoder.frame_size(used, height, width)
        return cls(used, (frames, *size, 3), encoder.grid(frames, *size))

    @property
    def bytes(self) -> int:
        return math.prod(self.shape)

    def fill(self, out: np.ndarray, frames: np.ndarray) -> None:
        """Write the clip's own frames [used, h, w, 3], resized, and their repetitions into uint8 `out` (`shape`).

        `frames` may be those of `out` itself.
        """
        own = out[: self.used]
        if not np.may_share_memory(own, frames):
            own[:] = resize_frames(frames, (self.shape[1], self.shape[2]))
        out[self.used :] = out[self.used - 1]


@dataclass(frozen=True)
class PreparedClip:
    """One clip as the model takes it: frames uint8 [T, H, W, 3] with T a multiple of the temporal patch, or none ([0])
    where stored features stand for them.

    head: which head classifies it. source: which data set it is from. partner, share: a second label and its part of
    the target, where two clips were mixed. bad: why it could not be read; its frames are black then, and its weight 0.
    """

    key: str
    label: int
    frames: np.ndarray
    grid: Grid
    text: EncodedText
    head: int = 0
    source: int = 0
    partner: int = 0
    share: float = 0.0
    bad: str | None = None


@dataclass(frozen=True)
class Batch:
    """Several clips. Rows with weight 0 are padding: computed, never counted."""

    frames: torch.Tensor  # uint8, every clip's [T, H, W, 3] raveled and joined; none with features_VD
    grid_thw: tuple[Grid, ...]  # patches in time, height and width, per clip, on the host
    lengths: tuple[int, ...]  # tokens of each row, on the host
    input_ids_BL: torch.Tensor  # right padded
    position_ids_3BL: torch.Tensor
    action_positions_B: torch.Tensor  # where <ACTION> stands in each row
    sources_B: torch.Tensor  # int64, which data set each row is from
    heads_B: torch.Tensor  # int64, which head classifies each row
    labels_B: torch.Tensor
    partners_B: torch.Tensor  # int64, the second label of rows that two clips were mixed into
    shares_B: torch.Tensor  # float32, the second label's part of the target; 0 where nothing was mixed
    weights_B: torch.Tensor  # float32
    keys: tuple[str, ...]
    prefix: int = 0  # tokens before the video's that all rows begin with, where it pays to compute them once
    answer_labels_BL: torch.Tensor | None = None  # int64, the next token where an answer is to be said, else -100
    features_VD: torch.Tensor | None = None  # stored vision features, clip after clip: the tower is not called then
    # (data set and key, reason) of rows that could not be read: black, label 0, weight 0
    bad: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def sources(self) -> tuple[int, ...]:
        """sources_B on the host: a sync, where the batch is on a GPU."""
        return tuple(self.sources_B.tolist())

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of ActionClassifier.forward."""
        optional = {"answer_labels_BL": self.answer_labels_BL, "features_VD": self.features_VD}
        return {
            "frames": self.frames,
            "grid_thw": self.grid_thw,
            "lengths": self.lengths,
            "input_ids_BL": self.input_ids_BL,
            "position_ids_3BL": self.position_ids_3BL,
            "action_positions_B": self.action_positions_B,
            "heads_B": self.heads_B,
            "prefix": self.prefix,
            **{name: tensor for name, tensor in optional.items() if tensor is not None},
        }

    def to(self, device: torch.device) -> Batch:
        return self._each_tensor(lambda t: t.to(device, non_blocking=True))

    def clone(self) -> Batch:
        """A copy in memory of its own: the loader fills that of a batch again."""
        return self._each_tensor(lambda t: t.clone())

    def pin_memory(self) -> Batch:
        return self._each_tensor(lambda t: t.pin_memory())

    def alone(self, row: int) -> Batch:
        """One row as a batch of its own, without the others' padding. Of batches without answers."""
        assert self.answer_labels_BL is None
        patches = [math.prod(grid) for grid in self.grid_thw]
        start, end = (sum(patches[:count]) for count in (row, row + 1))

        def cut(joined: torch.Tensor) -> torch.Tensor:
            """What belongs to the row of values, or tokens, that every clip has in proportion to its patches."""
            return joined[start * len(joined) // sum(patches) : end * len(joined) // sum(patches)]

        one, length = slice(row, row + 1), self.lengths[row]
        rows = {f.name: getattr(self, f.name)[one] for f in fields(self) if f.name.endswith("_B")}
        return replace(
            self,
            **rows,
            frames=cut(self.frames),
            features_VD=None if self.features_VD is None else cut(self.features_VD),
            grid_thw=self.grid_thw[one],
            lengths=self.lengths[one],
            input_ids_BL=self.input_ids_BL[one, :length],
            position_ids_3BL=self.position_ids_3BL[:, one, :length],
            keys=self.keys[one],
            prefix=0,
        )

    def _each_tensor(self, function: Any) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, torch.Tensor)})


def prepare_clip(
    *,
    key: str,
    label: int,
    frames: np.ndarray,
    times: list[float],
    prompt: str,
    encoder: ClipEncoder,
    max_frames: int,
) -> PreparedClip:
    """Choose frames, resize them, and lay out the text around them.

    Args:
        frames: uint8 [T, H, W, 3]; more than max_frames are thinned uniformly (frames.view).
        times: seconds of each frame; their mean spacing becomes the model's seconds per temporal grid.
    """
    chosen = view(len(frames), max_frames)
    shape = ClipShape.of(encoder, len(chosen), *frames.shape[1:3])
    pixels = np.empty(shape.shape, dtype=np.uint8)
    shape.fill(pixels, frames[chosen])
    text = encoder.encode(prompt, shape.grid, seconds_per_grid([times[i] for i in chosen], encoder))
    return PreparedClip(key, label, pixels, shape.grid, text)


def seconds_per_grid(times: list[float], encoder: ClipEncoder) -> float:
    """The mean time between two steps of a clip's temporal grid, from its frames' times in seconds."""
    spacing = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    return spacing * encoder.frames_per_grid


def collate(clips: list[PreparedClip], weight: float = 1.0, frames: np.ndarray | None = None) -> Batch:
    """Join clips of any sizes; texts are padded on the right, behind <ACTION>, where causal attention never looks.

    Args:
        frames: the clips' frames one behind the other, uint8, if they lie so already.
    """
    if frames is None:
        frames = np.concatenate([clip.frames.reshape(-1) for clip in clips])
    lengths = np.array([len(clip.text.input_ids) for clip in clips])
    # Padding repeats the row's first token: ordinary text, never <ACTION> or a video placeholder.
    input_ids_BL = np.empty((len(clips), lengths.max()), dtype=np.int64)
    position_ids_3BL = np.zeros((3, len(clips), lengths.max()), dtype=np.int64)
    answer_labels_BL = np.full_like(input_ids_BL, IGNORED)
    for row, (clip, length) in enumerate(zip(clips, lengths, strict=True)):
        text = clip.text
        input_ids_BL[row, :length] = text.input_ids
        input_ids_BL[row, length:] = text.input_ids[0]
        position_ids_3BL[:, row, :length] = text.position_ids
        answer_labels_BL[row, text.answer_start - 1 : length - 1] = text.input_ids[text.answer_start :]
    weights_B = np.array([0.0 if clip.bad else weight for clip in clips], dtype=np.float32)
    has_answers = any(clip.text.answer_start < length for clip, length in zip(clips, lengths, strict=True))
    return Batch(
        frames=torch.from_numpy(frames),
        grid_thw=tuple(clip.grid for clip in clips),
        lengths=tuple(lengths.tolist()),
        input_ids_BL=torch.from_numpy(input_ids_BL),
        position_ids_3BL=torch.from_numpy(position_ids_3BL),
        action_positions_B=torch.tensor([clip.text.action_position for clip in clips]),
        sources_B=torch.tensor([clip.source for clip in clips]),
        heads_B=torch.tensor([clip.head for clip in clips]),
        labels_B=torch.tensor([clip.label for clip in clips]),
        partners_B=torch.tensor([clip.partner for clip in clips]),
        shares_B=torch.tensor([clip.share for clip in clips], dtype=torch.float32),
        weights_B=torch.from_numpy(weights_B),
        keys=tuple(clip.key for clip in clips),
        prefix=_prefix(clips, int(lengths.sum())),
        answer_labels_BL=torch.from_numpy(answer_labels_BL) if has_answers else None,
        bad=tuple((clip.key, clip.bad) for clip in clips if clip.bad),
    )


def _prefix(clips: list[PreparedClip], tokens: int) -> int:
    """How many ids, and with them positions, all texts begin with before the first of a video's; 0 where sharing them
    spares too few of all `tokens`."""
    starts = [clip.text.input_ids[: clip.text.video_start] for clip in clips]
    shortest = min(map(len, starts))
    rows = np.stack([start[:shortest] for start in starts])
    differs = (rows != rows[0]).any(axis=0)
    prefix = int(differs.argmax()) if differs.any() else shortest
    return prefix if spared_tokens(len(clips), prefix, tokens) else 0
