from __future__ import annotations

import pytest


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process would know of its process group, without the seconds of making one."""
    monkeypatch.setattr("vidcls.distributed.world_size", lambda: 1)
    monkeypatch.setattr("vidcls.distributed.rank", lambda: 0)
