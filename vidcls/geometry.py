"""Frame sizes as Qwen2.5-VL wants them: plain numbers, for storing clips and for feeding them."""

import math

FACTOR = 28
"""Pixels along each side of one token of Qwen2.5-VL: patches of 14, merged 2 by 2."""
MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The frame size Qwen2-VL would pick: multiples of `factor`, area within the bounds, aspect ratio kept.

    Source: `smart_resize` of the Qwen2-VL processors. Raises ValueError for sides or bounds that make no
    sense and for frames more than 200 times as long as wide.
    """
    if height < 1 or width < 1:
        raise ValueError(f"frame size is {height}x{width}; both sides must be at least 1")
    if not 1 <= min_pixels <= max_pixels:
        raise ValueError(f"min_pixels is {min_pixels}, max_pixels is {max_pixels}; 1 <= min <= max must hold")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"frame size is {height}x{width}; the aspect ratio must be at most {MAX_ASPECT_RATIO}")
    # round() sends ties to the even neighbour; the processors do the same.
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor
