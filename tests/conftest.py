"""Fixtures for every test."""

import os
from pathlib import Path

import pytest


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
