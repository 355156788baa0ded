from pathlib import Path

import numpy as np
import pytest

from tests.support.clips import sequential_decode
from tools.make_motion_clips import CLASSES, make_motion_clips, motion_frames


def blob_centres(frames: np.ndarray) -> np.ndarray:
    """(row, column) of what differs from the still background, [T, 2]."""
    moving = np.abs(frames.astype(float) - np.median(frames, axis=0)).sum(axis=3)
    moving[moving < 90] = 0
    rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]]
    weight = moving.sum(axis=(1, 2))
    return np.stack([(moving * rows).sum(axis=(1, 2)) / weight, (moving * columns).sum(axis=(1, 2)) / weight], axis=1)


@pytest.mark.parametrize(("one", "other"), [("left", "right"), ("up", "down")])
def test_only_the_order_of_frames_tells_the_classes_apart(one: str, other: str) -> None:
    for seed in range(3):
        forward = motion_frames(np.random.default_rng(seed), other, 12, 64)
        backward = motion_frames(np.random.default_rng(seed), one, 12, 64)
        np.testing.assert_array_equal(forward, backward[::-1])


def test_written_clips_move_as_their_folder_says(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    folder = make_motion_clips(tmp_path / "m", 2, progress=lambda *counts: done.append(counts))
    assert done == [(i + 1, 8) for i in range(8)]
    directions = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}
    assert set(directions) == set(CLASSES)
    for name, direction in directions.items():
        for path in sorted((folder / name).iterdir()):
            frames, times = sequential_decode(path)
            assert frames.shape == (24, 96, 96, 3)
            np.testing.assert_allclose(times, np.arange(24) / 12, atol=1e-3)
            centres = blob_centres(frames)
            step = np.sign(np.round((centres[16:].mean(0) - centres[:8].mean(0)) / 10))
            assert tuple(step) == direction, path


def test_clips_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def made(name: str, per_class: int, seed: int) -> dict[str, bytes]:
        folder = make_motion_clips(tmp_path / name, per_class, seed)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/*")}

    first = made("a", 1, 0)
    again = made("b", 2, 0)
    assert all(again[name] == data for name, data in first.items())
    assert not set(first.values()) & set(made("c", 1, 1).values())


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        make_motion_clips(tmp_path, 1)
    with pytest.raises(ValueError, match="per_class = 0"):
        make_motion_clips(tmp_path / "new", 0)
