"""uint8 frames -> the normalised patches that the vision tower reads.

Shape suffixes: T frames, H and W pixels, N patches, C colour channels, P values of one patch and channel.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vidcls.geometry import smart_resize

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig

Grid = tuple[int, int, int]
"""Patches of one clip along time, height and width, before merging."""

# Colour statistics of the images CLIP was trained on (Radford et al. 2021; `OPENAI_CLIP_MEAN` and `_STD`
# in transformers), which Qwen2.5-VL keeps.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionGeometry:
    """How the vision tower cuts a clip: sizes in pixels, frames and patches, and its clock."""

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    tokens_per_second: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"VisionGeometry.{name} is {value}; it must be at least 1")

    @classmethod
    def from_config(cls, config: Qwen2_5_VLConfig) -> VisionGeometry:
        vision: Any = config.vision_config
        return cls(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, vision.tokens_per_second)

    @property
    def factor(self) -> int:
        """Frame heights and widths are multiples of this many pixels: one token is factor x factor."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values in one patch: channels * frames * height * width."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def frame_size(self, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        """Height and width, in pixels, that a frame is resized to; see `smart_resize`."""
        return smart_resize(height, width, factor=self.factor, min_pixels=min_pixels, max_pixels=max_pixels)

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """The grid of a clip of `frames` frames of height x width pixels; an odd last frame counts twice.

        Raises ValueError when there is no frame or a side is not a positive multiple of `factor`.
        """
        if frames < 1:
            raise ValueError(f"a clip has {frames} frames; it must have at least 1")
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % self.factor:
                raise ValueError(f"frame {name} is {side}; it must be a positive multiple of {self.factor}")
        steps = math.ceil(frames / self.temporal_patch_size)
        return steps, height // self.patch_size, width // self.patch_size

    def num_tokens(self, grid: Grid) -> int:
        """Tokens that a clip of this grid takes in the language model."""
        return math.prod(grid) // self.merge_size**2

    def num_values(self, grid: Grid) -> int:
        """uint8 values in a clip of this grid."""
        return math.prod(grid) * self.patch_dim


def frames_to_patches(
    frames: torch.Tensor, grid_thw: tuple[Grid, ...], geometry: VisionGeometry, dtype: torch.dtype
) -> torch.Tensor:
    """Normalise the clips and cut them into patches, on the device of `frames` and without waiting for it.

    `frames` is flat uint8: every clip's [T, H, W, 3], one after the other, T a multiple of
    `temporal_patch_size`. Returns [N, patch_dim] in `dtype`, equal to what transformers' Qwen2-VL video
    processor gives in float32. Raises ValueError when the number of values does not fit the grids.
    """
    sizes = [geometry.num_values(grid) for grid in grid_thw]
    if frames.dtype != torch.uint8 or frames.numel() != sum(sizes):
        raise ValueError(
            f"frames hold {frames.numel()} values of {frames.dtype}; "
            f"the grids {grid_thw} need {sum(sizes)} of torch.uint8"
        )
    # Clips of one grid are cut together; a batch mostly has one grid, and then this is a single view.
    pieces, start = [], 0
    for grid, run in itertools.groupby(grid_thw):
        count = len(list(run))
        values = count * geometry.num_values(grid)
        pieces.append(_cut(frames[start : start + values], count, grid, geometry))
        start += values
    patches_NCP = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    # uint8 up to here: reordering moves a quarter of the bytes. The arithmetic is float32 whatever the
    # dtype asked for, because the processor's is too.
    mean_C1, std_C1 = _colour_statistics(frames.device)
    normalised_NCP = patches_NCP.to(torch.float32).sub_(mean_C1).div_(std_C1)
    return normalised_NCP.flatten(1).to(dtype)


def _cut(frames: torch.Tensor, count: int, grid: Grid, geometry: VisionGeometry) -> torch.Tensor:
    """`count` clips of one grid -> uint8 [N, 3, P]; the merge_size**2 patches of a token lie together."""
    t, h, w = grid
    merge, patch, tubelet = geometry.merge_size, geometry.patch_size, geometry.temporal_patch_size
    pixels = frames.view(count, t, tubelet, h // merge, merge, patch, w // merge, merge, patch, 3)
    pixels = pixels.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return pixels.reshape(count * t * h * w, 3, tubelet * patch * patch)


@functools.cache
def _colour_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation in units of pixel values, [3, 1] float32; cached so that no step copies them."""
    mean, std = (torch.tensor(values) * 255.0 for values in (CLIP_MEAN, CLIP_STD))
    return mean[:, None].to(device), std[:, None].to(device)
