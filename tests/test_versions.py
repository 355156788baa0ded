"""Ranks with other versions do not train together."""

from __future__ import annotations

from typing import Any

import pytest

from vidcls import distributed
from vidcls.distributed import LaunchError


def test_another_version_on_one_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another_host(mine: tuple[str, dict[str, str]]) -> list[Any]:
        host, versions = mine
        return [(host, versions), ("node2", {**versions, "peft": "0.0.1"}), ("node3", versions)]

    monkeypatch.setattr(distributed, "gather_objects", with_another_host)
    with pytest.raises(LaunchError, match=r"versions differ between ranks: peft is 0\.0\.1 on node2 \(rank 1\) and "):
        distributed._check_equal_versions()
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, mine])
    distributed._check_equal_versions()
