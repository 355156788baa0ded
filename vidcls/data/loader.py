"""From shards and an order to batches of uint8 frames, token ids and positions.

Workers read, decode and resize; normalising and patchifying happen on the device (model/patches.py), so that one byte
per colour value crosses process and bus. `Batch` holds exactly what the classifier's forward takes, plus what the loss
needs.

Tensor name suffixes: B clips in the batch, L padded sequence length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vidcls.data.decode import decode_jpegs, resize_frames, segment_midpoints
from vidcls.data.order import SampleOrder, StepLayout, evaluation_chunks
from vidcls.data.shards import ShardError, ShardIndex, ShardReader

Grid = tuple[int, int, int]
WORKER_TIMEOUT_SECONDS = 300


class EncodedText(Protocol):
    """Token ids int64 [L] and rotary positions int64 [3, L]; the last token is <ACTION>."""

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def position_ids(self) -> np.ndarray: ...


class ClipEncoder(Protocol):
    """What the loader asks of the model side (model/prompt.py provides it)."""

    def frame_size(self, height: int, width: int) -> tuple[int, int]: ...
    def grid(self, frames: int, height: int, width: int) -> Grid: ...
    def encode(self, prompt: str, grid: Grid, seconds_per_grid: float) -> EncodedText: ...
    @property
    def frames_per_grid(self) -> int: ...


@dataclass(frozen=True)
class PreparedClip:
    """One clip as the model takes it: frames uint8 [T, H, W, 3] with T a multiple of the temporal patch."""

    key: str
    label: int
    frames: np.ndarray
    grid: Grid
    text: EncodedText


@dataclass(frozen=True)
class Batch:
    """Several clips. Rows with weight 0 are padding: computed, never counted."""

    frames: torch.Tensor  # uint8, every clip's [T, H, W, 3] raveled and joined
    grid_thw: tuple[Grid, ...]  # patches in time, height and width, per clip, on the host
    input_ids_BL: torch.Tensor  # right padded
    position_ids_3BL: torch.Tensor
    action_positions_B: torch.Tensor  # where <ACTION> stands in each row
    labels_B: torch.Tensor
    weights_B: torch.Tensor  # float32
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of ActionClassifier.forward."""
        return {
            "frames": self.frames,
            "grid_thw": self.grid_thw,
            "input_ids_BL": self.input_ids_BL,
            "position_ids_3BL": self.position_ids_3BL,
            "action_positions_B": self.action_positions_B,
        }

    def to(self, device: torch.device) -> Batch:
        return self._each_tensor(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each_tensor(lambda t: t.pin_memory())

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
        frames: uint8 [T, H, W, 3]; more than max_frames are thinned uniformly, an odd rest repeats its last frame (as
            transformers' video processor does).
        times: seconds of each frame; their mean spacing becomes the model's seconds per temporal grid.
    """
    if len(frames) > max_frames:
        chosen = segment_midpoints(len(frames), max_frames)
        frames, times = frames[chosen], [times[i] for i in chosen]
    spacing = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    if missing := -len(frames) % encoder.frames_per_grid:
        frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
    height, width = encoder.frame_size(*frames.shape[1:3])
    frames = resize_frames(frames, (height, width))
    grid = encoder.grid(len(frames), height, width)
    text = encoder.encode(prompt, grid, spacing * encoder.frames_per_grid)
    return PreparedClip(key, label, frames, grid, text)


def collate(clips: list[PreparedClip], weight: float = 1.0) -> Batch:
    """Join clips of any sizes; texts are padded on the right, behind <ACTION>, where causal attention never looks."""
    lengths = [len(clip.text.input_ids) for clip in clips]
    # Padding repeats the row's first token: ordinary text, never <ACTION> or a video placeholder.
    input_ids_BL = torch.empty(len(clips), max(lengths), dtype=torch.int64)
    position_ids_3BL = torch.zeros(3, len(clips), max(lengths), dtype=torch.int64)
    for row, (clip, length) in enumerate(zip(clips, lengths, strict=True)):
        ids = torch.from_numpy(clip.text.input_ids)
        input_ids_BL[row, :length] = ids
        input_ids_BL[row, length:] = ids[0]
        position_ids_3BL[:, row, :length] = torch.from_numpy(clip.text.position_ids)
    return Batch(
        frames=torch.from_numpy(np.concatenate([clip.frames.reshape(-1) for clip in clips])),
        grid_thw=tuple(clip.grid for clip in clips),
        input_ids_BL=input_ids_BL,
        position_ids_3BL=position_ids_3BL,
        action_positions_B=torch.tensor(lengths) - 1,
        labels_B=torch.tensor([clip.label for clip in clips]),
        weights_B=torch.full((len(clips),), weight),
        keys=tuple(clip.key for clip in clips),
    )


@dataclass(frozen=True)
class Request:
    """One micro-batch to read: sample ids, and the weight of its rows (0 for a padding batch)."""

    samples: tuple[int, ...]
    weight: float = 1.0


class ClipBatches(Dataset[Batch]):
    """Reads a Request into a Batch; used inside the worker processes."""

    def __init__(self, index: ShardIndex, encoder: ClipEncoder, *, prompt: str, max_frames: int) -> None:
        self.reader = ShardReader(index)
        self.encoder = encoder
        self.prompt = prompt
        self.max_frames = max_frames

    def __getitem__(self, request: Request) -> Batch:
        return collate([self._clip(sample) for sample in request.samples], request.weight)

    def _clip(self, sample: int) -> PreparedClip:
        stored = self.reader.read(sample)
        index = self.reader.index
        try:
            frames = decode_jpegs(stored.jpegs)
            if frames.shape[1:3] != (index.height[sample], index.width[sample]):
                raise ShardError(f"frames are {frames.shape[1]}x{frames.shape[2]}, the index says otherwise")
            return prepare_clip(
                key=stored.key,
                label=stored.label,
                frames=frames,
                times=stored.frame_times,
                prompt=stored.prompt or self.prompt,
                encoder=self.encoder,
                max_frames=self.max_frames,
            )
        except ValueError as error:
            raise type(error)(f"clip {stored.key!r}: {error}") from None


def training_requests(order: SampleOrder, layout: StepLayout, first_step: int, last_step: int) -> Iterator[Request]:
    """This rank's micro-batches of optimizer steps [first_step, last_step)."""
    for step in range(first_step, last_step):
        for micro_step in range(layout.accumulation):
            yield Request(tuple(order.at(position)[1] for position in layout.positions(step, micro_step)))


def evaluation_requests(samples: int, micro: int, world_size: int, rank: int) -> list[Request]:
    """This rank's batches of one evaluation, the same number on every rank."""
    chunks = evaluation_chunks(samples, micro, world_size, rank)
    return [Request((0,), weight=0.0) if chunk is None else Request(tuple(chunk)) for chunk in chunks]


def read_batches(batches: ClipBatches, requests: Iterable[Request], *, workers: int, pin: bool) -> Iterator[Batch]:
    """Read requests in order with `workers` processes ahead of the consumer (0: in this process).

    A worker that gives nothing for 300 s raises RuntimeError instead of hanging the run.
    """
    loader: DataLoader = DataLoader(
        batches,
        batch_size=None,
        sampler=requests,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_unchanged,  # type: ignore[arg-type]
        pin_memory=pin,
        timeout=WORKER_TIMEOUT_SECONDS if workers else 0,
    )
    return iter(loader)


def _unchanged(batch: Batch) -> Batch:
    return batch
