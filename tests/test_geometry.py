import random

import pytest
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil_processing

from vidcls.geometry import smart_resize


def test_smart_resize_equals_transformers():
    draw = random.Random(0)
    for _ in range(5000):
        height, width = draw.randint(1, 2000), draw.randint(1, 2000)
        if max(height, width) > 200 * min(height, width):
            continue
        low = draw.choice([1, 784, 56 * 56, 128 * 784])
        high = low + draw.choice([0, 784, 112 * 112, 768 * 784])
        expected = pil_processing.smart_resize(height, width, 28, low, high)
        assert smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high) == expected


@pytest.mark.parametrize(
    ("height", "width", "low", "high", "reason"),
    [
        (0, 5, 1, 100, "frame size is 0x5"),
        (10, 10, 200, 100, "min_pixels is 200, max_pixels is 100"),
        (2, 500, 1, 100, "aspect ratio must be at most 200"),
    ],
)
def test_smart_resize_refuses(height, width, low, high, reason):
    with pytest.raises(ValueError, match=reason):
        smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
