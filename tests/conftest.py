"""Fixtures for every test, and the check that the suite leaves nothing behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from tests.support.launch import shared_buffers
from tests.support.shards import make_shards
from tools.make_motion_clips import CLASSES, FRAMES_PER_SECOND, make_motion_clips, motion_frames, write_video
from vidcls.data.settings import DecodeSettings
from vidcls.sharding.readers.folder import read_folder
from vidcls.sharding.writer import Plan, write_shards

# A busy machine is slow now and then; pytest's own limit catches what hangs.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every command they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real clips; without it the test is skipped, on CI it fails."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VIDCLS_REAL_DATA", default))
    if not folder.is_dir():
        reason = f"{folder}: no real clips here; set VIDCLS_REAL_DATA"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 clips in 4 classes, 4 frames of 56x56: does not divide by 2, 3, 4 or 8 times most batches."""
    folder = tmp_path_factory.mktemp("small")
    videos = make_motion_clips(folder / "videos", 7, frames=8, size=56)
    for extra in ("left/clip_0006.mp4", "up/clip_0006.mp4"):
        (videos / extra).unlink()
    return make_shards(videos, folder / "shards", frames=4, short_side=56, samples_per_shard=10)


@pytest.fixture(scope="session")
def two_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips in 4 classes: of each class 3 of 8 frames of 56x56, 2 of 4 and 1 of 8 frames of 112x112."""
    folder = tmp_path_factory.mktemp("two_sizes")
    for label, name in enumerate(CLASSES):
        for clip, (frames, size) in enumerate([(8, 56), (8, 112), (4, 112), (8, 56), (4, 112), (8, 56)]):
            pictures = motion_frames(np.random.default_rng([label, clip]), name, frames, size)
            (folder / "videos" / name).mkdir(parents=True, exist_ok=True)
            write_video(folder / "videos" / name / f"clip_{clip}.mp4", pictures)
    labels, records = read_folder(folder / "videos")
    settings = DecodeSettings(
        frames=None, fps=FRAMES_PER_SECOND, max_frames=8, short_side=None, max_pixels=112**2, codec="png", quality=None
    )
    write_shards(Plan(records, labels, settings, 10), folder / "shards", workers=0)
    return folder / "shards"


@pytest.fixture(scope="session")
def up_down(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 of the clips as a data set of 2 classes."""
    videos = tmp_path_factory.mktemp("up_down") / "videos"
    videos.mkdir()
    for name in ("up", "down"):
        (videos / name).symlink_to(small_shards.parent / "videos" / name)
    return make_shards(videos, videos.parent / "shards", frames=4)


@pytest.fixture(scope="session", autouse=True)
def no_shared_buffers_left() -> Iterator[None]:
    """Runs, killed or not, leave nothing in /dev/shm: 69 MB a rank add up to a full memory."""
    before = shared_buffers()
    yield
    left = shared_buffers() - before
    assert not left, f"buffers left in /dev/shm: {sorted(left)}"
