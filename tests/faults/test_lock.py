"""One run at a time in an output folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidcls.faults import lock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time, os
from pathlib import Path
from vidcls.faults.lock import lock_output
lock_output(Path(sys.argv[1]))
if os.fork() == 0:  # a loader worker, which lives on for a moment
    time.sleep(30)
print("held", flush=True)
time.sleep(30)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(lock, "_held", {})
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"held\n"
            with pytest.raises(
                ValueError, match=rf"output_dir: '{tmp_path}' is in use by another run.*\"pid\": {first.pid}"
            ):
                lock.lock_output(tmp_path)
            first.kill()
            first.wait()
            lock.lock_output(tmp_path)
            lock.lock_output(tmp_path)  # its own lock is no other run's
            assert f'"pid": {os.getpid()}' in (tmp_path / lock.LOCK_NAME).read_text()
        finally:
            os.killpg(first.pid, 9)
