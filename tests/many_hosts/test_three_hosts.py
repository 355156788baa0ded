"""Three hosts under the supervisor, of which one is powered off: the other two go on with the same batches."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.host_faults import power_off
from tests.support.hosts import Hosts
from tests.support.many_hosts import Run, see_resumed, supervise_words
from vidcls.faults.exits import Exit

pytestmark = pytest.mark.launch


def test_a_host_that_is_powered_off_is_left_out(three: Hosts, small_shards: Path, tmp_path: Path) -> None:
    with Run(three, small_shards, tmp_path, supervise_words(three), log_order=True) as run:
        run.wait_for_save()
        before = {row["step"]: row["loss"] for row in run.rows()}
        since = time.monotonic()
        power_off(run)
        resumed = see_resumed(run, since)
        assert not run.left()
    assert resumed.code == Exit.STOPPED, resumed.said[-4000:]
    assert resumed.ranks == 2
    assert resumed.seconds is not None
    first, second = resumed.attempts[:2]
    assert first["code"] != Exit.DONE
    after = {row["step"]: row["loss"] for row in resumed.rows}
    assert max(after) > max(before)
    # Steps that no checkpoint held were done again, on two ranks: the same clips, up to the order of summation.
    assert sorted(after) == list(range(1, max(after) + 1))
    kept = [step for step in before if step in after]
    assert all(abs(before[step] - after[step]) < 0.05 for step in kept)
    assert second["hosts"].keys() == {three.name(1), three.name(2)}
