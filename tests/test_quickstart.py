"""launch/quickstart.sh on a folder of a user's own, twice, with a file in it that is no video."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support import launch
from tests.support.clips import text_as_video
from tools.make_motion_clips import make_motion_clips

pytestmark = [pytest.mark.launch, pytest.mark.timeout(400)]


def test_a_folder_of_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = make_motion_clips(tmp_path / "my videos", per_class=12, frames=8, size=56)
    text_as_video(videos / "left" / "broken.mp4")
    run = tmp_path / "run"
    monkeypatch.setenv("VIDCLS_QUICKSTART_DIR", str(run))
    monkeypatch.setenv("VIDCLS_VENV", sys.prefix)
    (run / "shards").mkdir(parents=True)  # as a run before this one leaves it
    (run / "kept.txt").write_text("a file of the user's")
    done = launch.run(["bash", "launch/quickstart.sh", videos], log=tmp_path / "log", timeout=300)
    assert done.code == 0, done.output[-3000:]
    assert "1 of 37 clips failed" in done.output or "clips failed, see" in done.output
    (found,) = (run / "train").glob("checkpoint-*/evaluation/eval.json")
    assert json.loads(found.read_text())["seen"] in (12, 13)
    report = (run / "train" / "report.html").read_text()
    assert '"title":"checkpoint-' in report
    assert "finished at step" in report
    assert (run / "clips.html").is_file()
    assert (run / "kept.txt").is_file()
    assert "== done; look at" in done.output
    assert "Traceback" not in done.output
    assert len(list(videos.rglob("*.mp4"))) == 49


def test_videos_inside_the_output_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    videos = make_motion_clips(run / "videos", per_class=1, frames=2, size=32)
    words = ["env", f"VIDCLS_QUICKSTART_DIR={run}", f"VIDCLS_VENV={sys.prefix}", "bash", "launch/quickstart.sh", videos]
    done = launch.run(words, log=tmp_path / "log", timeout=60)
    assert done.code == 2
    assert "is inside" in done.output
    assert len(list(videos.rglob("*.mp4"))) == 4
