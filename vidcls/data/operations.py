"""Operations on the frames of a clip, all frames alike, with Pillow: RandAugment's, and one pass of colour jitter.

Frames are uint8 RGB [T, H, W, 3]. Results have the same shape and are new, writable and contiguous (identity gives its
input back); nothing is written to the input.

Whatever an operation measures (mean, histogram), it measures over the whole clip, so that nothing flickers: operations
on single pixels run once, on the frames standing one below the other. Those that look at neighbours run frame by frame.
None of them mirrors. What comes into view from outside a frame has the clip's mean colour.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, ImageStat

# Strengths of RandAugment at magnitude 10: Cubuk et al. 2020 (arXiv 1909.13719), ranges of AutoAugment (1805.09501).
MOST_SHEAR = 0.3
MOST_TRANSLATE = 0.45  # of the frame's side
MOST_DEGREES = 30.0
MOST_ENHANCE = 0.9  # a factor of 1 - 0.9 to 1 + 0.9
MOST_BITS_LOST = 4

TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""RGB to luma and two axes of colour (NTSC). The luma is that of Pillow's conversion to "L"."""


def mean_colour(frames: np.ndarray) -> tuple[int, int, int]:
    """Of all pixels of the clip, rounded."""
    red, green, blue = (round(value) for value in ImageStat.Stat(_tall(frames)).mean)
    return red, green, blue


def jitter_colours(
    frames: np.ndarray, brightness: float, contrast: float, saturation: float, turn: float
) -> np.ndarray:
    """By three factors, 1: no change, and a turn of the hue, 1: once around. One affine map of RGB, clipped at its end.

    Brightness scales all, contrast the distance to the clip's mean luma, saturation the distance to a pixel's own luma;
    the hue turns in the plane of I and Q, which keeps luma and saturation.
    """
    tall = _tall(frames)
    luma = float(TO_YIQ[0] @ ImageStat.Stat(tall).mean)
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    in_yiq = np.array([[1, 0, 0], [0, saturation * cos, -saturation * sin], [0, saturation * sin, saturation * cos]])
    matrix = brightness * contrast * (np.linalg.inv(TO_YIQ) @ in_yiq @ TO_YIQ)
    offset = np.full((3, 1), brightness * (1 - contrast) * luma)
    rows = np.hstack([matrix, offset]).ravel().tolist()
    return _clip(tall.convert("RGB", tuple(rows)), frames)


def _tall(frames: np.ndarray) -> Image.Image:
    count, height, width, _ = frames.shape
    return Image.fromarray(np.ascontiguousarray(frames).reshape(count * height, width, 3))


def _clip(tall: Image.Image, like: np.ndarray) -> np.ndarray:
    return np.array(tall).reshape(like.shape)  # asarray would be read-only


def _framewise(frames: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    out = np.empty(frames.shape, dtype=np.uint8)
    for number, frame in enumerate(frames):
        out[number] = np.asarray(change(Image.fromarray(np.ascontiguousarray(frame))))
    return out


def _affine(frames: np.ndarray, xx: float, xy: float, x: float, yx: float, yy: float, y: float) -> np.ndarray:
    """The pixel at (column, row) from the middle comes from (xx column + xy row + x, yx column + yy row + y)."""
    middle_x, middle_y = frames.shape[2] / 2, frames.shape[1] / 2
    x += middle_x - xx * middle_x - xy * middle_y
    y += middle_y - yx * middle_x - yy * middle_y
    fill, size = mean_colour(frames), (frames.shape[2], frames.shape[1])

    def change(image: Image.Image) -> Image.Image:
        matrix = (xx, xy, x, yx, yy, y)
        return image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)

    return _framewise(frames, change)


def _rotate(frames: np.ndarray, level: float) -> np.ndarray:
    fill, degrees = mean_colour(frames), MOST_DEGREES * level
    return _framewise(frames, lambda image: image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill))


def _sharpness(frames: np.ndarray, level: float) -> np.ndarray:
    factor = 1 + MOST_ENHANCE * level
    return _framewise(frames, lambda image: ImageEnhance.Sharpness(image).enhance(factor))


def _enhance(kind: type[ImageEnhance.Brightness | ImageEnhance.Color | ImageEnhance.Contrast]) -> "Operation":
    return lambda frames, level: _clip(kind(_tall(frames)).enhance(1 + MOST_ENHANCE * level), frames)


Operation = Callable[[np.ndarray, float], np.ndarray]
"""(frames, level from -1 to 1) -> frames. Level 0 changes nothing, except where there is no level (equalize)."""

OPERATIONS: dict[str, Operation] = {
    "identity": lambda frames, level: frames,
    "auto_contrast": lambda frames, level: _clip(ImageOps.autocontrast(_tall(frames)), frames),
    "equalize": lambda frames, level: _clip(ImageOps.equalize(_tall(frames)), frames),
    "rotate": _rotate,
    "solarize": lambda frames, level: _clip(ImageOps.solarize(_tall(frames), round(256 * (1 - abs(level)))), frames),
    "color": _enhance(ImageEnhance.Color),
    "posterize": lambda frames, level: _clip(
        ImageOps.posterize(_tall(frames), 8 - round(MOST_BITS_LOST * abs(level))), frames
    ),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _sharpness,
    "shear_x": lambda frames, level: _affine(frames, 1, MOST_SHEAR * level, 0, 0, 1, 0),
    "shear_y": lambda frames, level: _affine(frames, 1, 0, 0, MOST_SHEAR * level, 1, 0),
    "translate_x": lambda frames, level: _affine(frames, 1, 0, MOST_TRANSLATE * level * frames.shape[2], 0, 1, 0),
    "translate_y": lambda frames, level: _affine(frames, 1, 0, 0, 0, 1, MOST_TRANSLATE * level * frames.shape[1]),
}
"""RandAugment's fourteen. A draw picks one by its place: to add or move one changes the augmentation of every run."""
