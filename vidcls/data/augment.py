"""Changes of training clips: a pure function of (seed, epoch, sample), the same for all frames of a clip.

Frames are uint8 RGB [T, H, W, 3].

Random choices come from raw Philox words (order.random_words), made uniform numbers by hand, since numpy promises
stable words but not stable distributions. Each choice has words of its own: changing one setting leaves what the others
do to a clip as it is. What Pillow and the C library round can differ in the last bit between versions and machines.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vidcls.data.operations import OPERATIONS, jitter_colours, mean_colour
from vidcls.data.order import AUGMENT, MIX, random_words

MOST_OPERATIONS = 16
MOST_MAGNITUDE = 10.0
HUE_SHARE = 0.25
"""Hue turns by at most this times color_jitter, in full turns: the proportions of SimCLR (Chen et al. 2020)."""
CROP_RATIO = (3 / 4, 4 / 3)
"""How far a crop may be stretched when it gets the frame's shape again: width to height, relative to the frame's."""
ERASED_SHARE = (0.02, 1 / 3)
"""Of a frame's area, as in Zhong et al. 2020 (arXiv 1708.04896), whose box is at most 1 / 0.3 times as long as wide."""
ERASED_RATIO = (0.3, 1 / 0.3)
MIX_STEPS = 256

# The first word of each choice. These must not move, nor may words be shared: runs would go on with other pictures.
FLIP, CROP, ERASE, COLOUR, RAND = 0, 1, 5, 10, 14
WORDS = RAND + 2 * MOST_OPERATIONS


@dataclass(frozen=True)
class AugmentSettings:
    """What is done to training clips; everything is off by default. The names are those of the recipe's keys.

    horizontal_flip: probability. random_resized_crop: the smallest share of the frame's area that a crop keeps; 1: off.
    color_jitter: brightness, contrast and saturation are multiplied by 1 +- this, hue turns by up to a quarter of it (1
    is a full turn). random_erasing: probability of a box of the clip's mean colour. rand_augment: operations per clip,
    and their magnitude from 0 to 10 (Cubuk et al. 2020, arXiv 1909.13719). mixup_alpha, cutmix_alpha: each of
    Beta(alpha, alpha), from which the partner's share is drawn; 0: off.
    """

    horizontal_flip: float = 0.0
    random_resized_crop: float = 1.0
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    rand_augment: tuple[int, float] | None = None
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "color_jitter", "random_erasing"):
            if not _is_number(value := getattr(self, name)) or not 0 <= value <= 1:
                raise ValueError(f"{name}: {value!r}, legal: 0 to 1")
        if not _is_number(self.random_resized_crop) or not 0 < self.random_resized_crop <= 1:
            raise ValueError(f"random_resized_crop: {self.random_resized_crop!r}, legal: above 0 and at most 1")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not _is_number(value := getattr(self, name)) or value < 0:
                raise ValueError(f"{name}: {value!r}, legal: at least 0")
        if self.rand_augment is not None:
            pair = self.rand_augment
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(_is_number, pair)):
                raise ValueError(f"rand_augment: {pair!r}, legal: two numbers, like [2, 9]")
            object.__setattr__(self, "rand_augment", tuple(pair))
            count, magnitude = pair
            if type(count) is not int or not 1 <= count <= MOST_OPERATIONS or not 0 <= magnitude <= MOST_MAGNITUDE:
                raise ValueError(
                    f"rand_augment: {list(self.rand_augment)}, legal: a whole number of operations from 1 to "
                    f"{MOST_OPERATIONS}, then a magnitude from 0 to {MOST_MAGNITUDE:g}"
                )

    @property
    def on(self) -> bool:
        """Whether clips are changed at all."""
        return self != AugmentSettings()


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def augment_clip(
    frames: np.ndarray, settings: AugmentSettings, seed: int, epoch: int, sample: int
) -> tuple[np.ndarray, bool]:
    """(frames, whether they were flipped): crop, flip, RandAugment, colours, erasing, in this order.

    A crop has a size of its own: the caller resizes it to the shape that the clip shall have. The result is contiguous,
    and the input itself, or shares its memory, where nothing is to be done; nothing is written to the input.

    A clip that must not be flipped takes settings with horizontal_flip 0, and everything else stays as it was.
    """
    uniforms = _uniforms(random_words(seed, epoch, WORDS, purpose=AUGMENT, item=sample))
    flipped = uniforms[FLIP] < settings.horizontal_flip
    if settings.random_resized_crop < 1:
        shares = settings.random_resized_crop, 1.0
        rows, columns = _box(frames.shape[1:3], shares, CROP_RATIO, uniforms[CROP : CROP + 4])
        frames = frames[:, rows, columns]
    if flipped:
        frames = frames[:, :, ::-1]
    frames = np.ascontiguousarray(frames)
    if settings.rand_augment is not None:
        count, magnitude = settings.rand_augment
        frames = _rand_augment(frames, magnitude, uniforms[RAND : RAND + 2 * count])
    if settings.color_jitter > 0:
        brightness, contrast, saturation, hue = (2 * u - 1 for u in uniforms[COLOUR : COLOUR + 4])
        jitter = settings.color_jitter
        factors = 1 + jitter * brightness, 1 + jitter * contrast, 1 + jitter * saturation
        frames = jitter_colours(frames, *factors, turn=HUE_SHARE * jitter * hue)
    if uniforms[ERASE] < settings.random_erasing:
        rows, columns = _box(frames.shape[1:3], ERASED_SHARE, ERASED_RATIO, uniforms[ERASE + 1 : ERASE + 5])
        colour = mean_colour(frames)
        frames = frames.copy()
        frames[:, rows, columns] = colour
    return frames, flipped


@dataclass(frozen=True)
class Mix:
    """How a second clip is mixed into a clip.

    partner: its place among the clips to choose from. share: of the target, the partner's. middle: (row, column) of a
    cutmix box as parts of the frame's sides; the box has the share's area, before its parts outside of the frame are
    cut off.
    """

    partner: int
    kind: Literal["mixup", "cutmix"]
    share: float
    middle: tuple[float, float]


def mix_plan(settings: AugmentSettings, seed: int, epoch: int, sample: int, place: int, samples: int) -> Mix | None:
    """With which other one of some clips, 0 to samples - 1, a clip is mixed, and how: a pure function of its arguments.

    The clip stands at `place` among them. Its random words are those of `sample`, its id, since clips of several such
    groups have equal places.

    Mixup: Zhang et al. 2018 (arXiv 1710.09412); cutmix: Yun et al. 2019 (1905.04899); with both alphas, each in half of
    the clips. None where both are 0 or there is no other clip. All clips must have the same classes.
    """
    assert 0 <= place < samples, (place, samples)
    alphas: dict[Literal["mixup", "cutmix"], float] = {"mixup": settings.mixup_alpha, "cutmix": settings.cutmix_alpha}
    kinds = [kind for kind, alpha in alphas.items() if alpha > 0]
    if not kinds or samples == 1:
        return None
    words = random_words(seed, epoch, 6, purpose=MIX, item=sample)
    which, first, second, row, column, _ = _uniforms(words)
    kind = kinds[int(which * len(kinds))]
    partner = int(words[5]) % (samples - 1)
    return Mix(partner + (partner >= place), kind, symmetric_beta(alphas[kind], first, second), (row, column))


def mix_clips(frames: np.ndarray, partner: np.ndarray, mix: Mix) -> tuple[np.ndarray, float]:
    """(frames, the partner's share as it became): `frames` is written to and returned. Both of one shape, [T, H, W, 3].

    Mixup rounds the share to a multiple of 1/256, and pixels to the nearest, halves up: integers, the same everywhere.
    Cutmix puts one box of the partner into all frames; the share is the box's part of the frame.
    """
    assert frames.shape == partner.shape, (frames.shape, partner.shape)
    assert frames.dtype == partner.dtype == np.uint8, (frames.dtype, partner.dtype)
    if mix.kind == "mixup":
        part = round(mix.share * MIX_STEPS)
        for frame, other in zip(frames, partner, strict=True):  # one at a time: what it takes stays in the cache
            blend = frame * np.uint16(MIX_STEPS - part)
            blend += other * np.uint16(part)
            blend += np.uint16(MIX_STEPS // 2)
            frame[:] = blend // np.uint16(MIX_STEPS)
        return frames, part / MIX_STEPS
    side = math.sqrt(mix.share)
    rows, columns = (_span(*each, side) for each in zip(mix.middle, frames.shape[1:3], strict=True))
    frames[:, rows, columns] = partner[:, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return frames, area / (frames.shape[1] * frames.shape[2])


def symmetric_beta(alpha: float, first: float, second: float) -> float:
    """A draw from Beta(alpha, alpha), alpha > 0, from two independent uniform numbers in [0, 1).

    Source: Student's t with 2 alpha degrees of freedom in polar form (Bailey 1994, Math. Comp. 62, 779), of which
    (1 + t / sqrt(2 alpha + t^2)) / 2 has this distribution. Nothing is rejected, so two words are always enough.
    """
    power = math.log1p(-first) / alpha
    radius, tail, cos = -math.expm1(power), math.exp(power), math.cos(2 * math.pi * second)
    return 0.5 * (1 + math.sqrt(radius) * cos / math.sqrt(tail + radius * cos**2))


def _uniforms(words: np.ndarray) -> list[float]:
    """In [0, 1), from the upper 53 bits of each word."""
    return ((words >> np.uint64(11)) * 2.0**-53).tolist()


def _box(
    size: tuple[int, ...], shares: tuple[float, float], ratios: tuple[float, float], uniforms: list[float]
) -> tuple[slice, slice]:
    """(rows, columns) of a box of at least one pixel within a frame of `size` = (height, width), from four numbers.

    Its share of the area is uniform in `shares`; its ratio of width to height, relative to the frame's, log-uniform in
    the part of `ratios` with which such a box fits; its place uniform.
    """
    height, width = size
    share = shares[0] + (shares[1] - shares[0]) * uniforms[0]
    low, high = math.log(max(ratios[0], share)), math.log(min(ratios[1], 1 / share))
    ratio = math.exp(low + (high - low) * uniforms[1])
    rows = min(height, max(1, round(height * math.sqrt(share / ratio))))
    columns = min(width, max(1, round(width * math.sqrt(share * ratio))))
    top, left = int(uniforms[2] * (height - rows + 1)), int(uniforms[3] * (width - columns + 1))
    return slice(top, top + rows), slice(left, left + columns)


def _span(middle: float, length: int, part: float) -> slice:
    """The pixels of a box's side, which is `part` of `length` around `middle` of it, without what lies outside."""
    start = int(middle * length) - int(part * length) // 2
    return slice(max(0, start), min(length, start + int(part * length)))


def _rand_augment(frames: np.ndarray, magnitude: float, uniforms: list[float]) -> np.ndarray:
    """As many operations as there are pairs of numbers: one picks the operation, one its direction."""
    operations = list(OPERATIONS.values())
    for which, sign in zip(uniforms[::2], uniforms[1::2], strict=True):
        level = magnitude / MOST_MAGNITUDE * (1 if sign < 0.5 else -1)
        frames = operations[int(which * len(operations))](frames, level)
    return frames
