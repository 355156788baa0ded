"""A launch is watched from its first moment."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.support.fake_deepspeed import tell
from vidcls.supervision.attempts import Patience, watch
from vidcls.supervision.folder import RunFolder
from vidcls.supervision.places import Return, probe_all
from vidcls.supervision.session import Session
from vidcls.supervision.signals import StopRequests


def test_a_rank_that_fails_before_the_watch_begins_is_not_missed(tmp_path: Path) -> None:
    """On a busy machine the launch may be well ahead of its supervisor."""
    session = Session([sys.executable, "-c", "import time; time.sleep(100)"], {}, tmp_path / "log")
    tell(tmp_path, {"launch": "this", "rank": 1})
    began = time.monotonic()
    end = watch(session, RunFolder(tmp_path), "this", StopRequests(), Patience(drain=0.5), Return([], probe_all, 60))
    assert (end.code, end.asked) == (137, "drain")
    assert time.monotonic() - began < 30


def test_a_report_of_another_launch_is_none_of_this_one(tmp_path: Path) -> None:
    tell(tmp_path, {"launch": "before", "rank": 1})
    tell(tmp_path, {"launch": "", "rank": 1})  # of a run that somebody started by hand
    session = Session([sys.executable, "-c", "import time; time.sleep(3)"], {}, tmp_path / "log")
    end = watch(session, RunFolder(tmp_path), "this", StopRequests(), Patience(drain=0.5), Return([], probe_all, 60))
    assert (end.code, end.asked) == (0, "")
