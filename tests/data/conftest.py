import shutil
from pathlib import Path

import pytest

from tests.support.clips import class_folder
from tests.support.shards import make_shards


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 clips of 2 classes, 4 frames of 32x32 each, in 2 shards."""
    folder = tmp_path_factory.mktemp("made")
    videos = class_folder(folder / "videos")
    return make_shards(videos, folder / "shards", frames=4, short_side=32, samples_per_shard=4)


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` for each test."""
    return Path(shutil.copytree(made, tmp_path / "shards"))
