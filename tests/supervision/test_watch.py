"""A launch is watched from its first moment."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from vidcls.supervision.attempts import Patience, watch
from vidcls.supervision.folder import RunFolder
from vidcls.supervision.places import Return, probe_all
from vidcls.supervision.session import Session
from vidcls.supervision.signals import StopRequests


def test_a_rank_that_fails_before_the_watch_begins_is_not_missed(tmp_path: Path) -> None:
    """On a busy machine the launch may be well ahead of its supervisor."""
    session = Session([sys.executable, "-c", "import time; time.sleep(100)"], {}, tmp_path / "log")
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "rank1.json").write_text("{}")
    began = time.monotonic()
    end = watch(session, RunFolder(tmp_path), set(), StopRequests(), Patience(drain=0.5), Return([], probe_all, 60))
    assert (end.code, end.asked) == (137, "drain")
    assert time.monotonic() - began < 30


def test_a_report_of_an_earlier_launch_is_none_of_this_one(tmp_path: Path) -> None:
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "rank1.json").write_text("{}")
    session = Session([sys.executable, "-c", "import time; time.sleep(3)"], {}, tmp_path / "log")
    known = {"rank1.json"}
    end = watch(session, RunFolder(tmp_path), known, StopRequests(), Patience(drain=0.5), Return([], probe_all, 60))
    assert (end.code, end.asked) == (0, "")
