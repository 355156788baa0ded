import json

import numpy as np
import pytest

from vidcls.data.settings import MAX_FRAMES, DecodeSettings, segment_midpoints


def test_segment_midpoints() -> None:
    for total in (1, 2, 15, 16, 17, 250, 99991):
        for frames in (1, 2, 8, 16):
            expected = np.floor((np.arange(frames) + 0.5) * total / frames)
            assert segment_midpoints(total, frames) == expected.tolist()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(240, 320, (128, 170)), (320, 240, (170, 128)), (240, 427, (128, 228)), (64, 64, (128, 128))],
)
def test_short_side(height: int, width: int, expected: tuple[int, int]) -> None:
    assert DecodeSettings(short_side=128).target_size(height, width) == expected


@pytest.mark.parametrize(("height", "width"), [(240, 320), (1080, 1920), (1920, 1080), (50, 3000), (28, 28), (20, 20)])
@pytest.mark.parametrize("tokens", [1, 64, 256])
def test_max_pixels_gives_whole_tokens_within_the_area(height: int, width: int, tokens: int) -> None:
    settings = DecodeSettings(short_side=None, max_pixels=tokens * 28 * 28)
    rows, columns = settings.target_size(height, width)
    assert rows % 28 == columns % 28 == 0
    assert rows >= 28
    assert columns >= 28
    assert rows * columns <= max(tokens, max(rows, columns) // 28) * 28 * 28  # one row of tokens is the least
    if height * width >= tokens * 28 * 28 and min(rows, columns) > 5 * 28:
        assert 0.75 < (rows / columns) / (height / width) < 1.33


def test_frames_at_a_rate_are_even_and_not_more_than_there_are() -> None:
    settings = DecodeSettings(frames=None, fps=2, max_frames=17)
    for available, seconds, expected in [
        (300, 4.0, 8),
        (300, 3.9, 8),
        (300, 4.4, 8),
        (300, 60.0, 16),
        (5, 10.0, 4),
        (1, 0.04, 2),  # a pair is the least, of the same frame if there is one
        (2, 0.0, 2),
        (300, 0.1, 2),
    ]:
        assert settings.frame_count(available, seconds) == expected, (available, seconds)
    assert DecodeSettings(frames=5).frame_count(3, 0.1) == 5


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"frames": 0}, "frames"),
        ({"frames": MAX_FRAMES + 1}, "frames"),
        ({"frames": 8.0}, "frames"),
        ({"frames": True}, "frames"),
        ({"frames": None}, "fps"),
        ({"fps": 2.0, "max_frames": 16}, "fps"),
        ({"frames": None, "fps": 2.0}, "max_frames"),
        ({"max_frames": 16}, "max_frames"),
        ({"frames": None, "fps": 0.0, "max_frames": 16}, "fps"),
        ({"frames": None, "fps": float("nan"), "max_frames": 16}, "fps"),
        ({"frames": None, "fps": True, "max_frames": 16}, "fps"),
        ({"frames": None, "fps": 2.0, "max_frames": 1}, "max_frames"),
        ({"short_side": 127}, "short_side"),
        ({"short_side": None}, "short_side"),
        ({"max_pixels": 50176}, "max_pixels"),
        ({"short_side": None, "max_pixels": 783}, "max_pixels"),
        ({"short_side": None, "max_pixels": 2**24 + 1}, "max_pixels"),
        ({"codec": "gif"}, "codec"),
        ({"quality": 101}, "quality"),
        ({"quality": None}, "quality"),
        ({"codec": "png"}, "quality"),
    ],
)
def test_settings_check_themselves(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DecodeSettings(**wrong)


@pytest.mark.parametrize(
    "settings",
    [
        DecodeSettings(8, short_side=112, quality=85),
        DecodeSettings(None, 2.5, 64, None, 50176, "webp", 75),
        DecodeSettings(codec="raw", quality=None),
    ],
)
def test_settings_survive_storing(settings: DecodeSettings) -> None:
    assert DecodeSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("stored", [None, [], {}, {"frames": 8}, {**DecodeSettings().to_dict(), "more": 1}])
def test_stored_settings_with_other_fields_are_refused(stored: object) -> None:
    with pytest.raises(ValueError, match="exactly the fields"):
        DecodeSettings.from_dict(stored)
