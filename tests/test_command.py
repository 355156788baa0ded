"""What the commands in launch/ share."""

from __future__ import annotations

import os

import pytest

from vidcls.command import SPIN_COUNT, heavy_imports


@pytest.mark.parametrize(
    ("given", "then"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_how_long_threads_wait_awake(given: dict[str, str], then: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own setting wins."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with heavy_imports():
        assert os.environ.get("GOMP_SPINCOUNT") == then
