"""tools/make_shards.py as users start it: a process of its own, from another folder."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.clips import class_folder, text_as_video, video
from vidcls.data.shards import ShardIndex, ShardReader

TOOL = Path(__file__).parents[1] / "tools" / "make_shards.py"
SMALL = ("--frames", "4", "--short-side", "32", "--workers", "2")


def start(folder: Path, *options: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    return subprocess.Popen(
        [sys.executable, str(TOOL), *map(str, options)],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(folder: Path, *options: object) -> tuple[int, str, str]:
    process = start(folder, *options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_folder(tmp_path: Path) -> None:
    class_folder(tmp_path / "videos", per_class=4)
    code, out, err = run(tmp_path, "folder", "--videos", "videos", "--split", "train", "--out", "train", *SMALL)
    assert (code, err) == (0, "")
    assert "6 clips of 2 classes, 2 workers" in out
    assert re.search(r"train: 6 clips in 1 shards, 0\.\d MB, [\d.]+ clips/s; decoded by .*(decord|pyav) \d", out)
    index = ShardIndex.open(tmp_path / "train")
    assert index.settings.to_dict() == {"frames": 4, "short_side": 32, "quality": 90}
    assert ShardReader(index).read(0).source.startswith("a/clip")


def test_ucf101(tmp_path: Path) -> None:
    video(tmp_path / "videos" / "Archery" / "v_Archery_g01_c01.avi", codec="mpeg4")
    (tmp_path / "list.txt").write_bytes(b"Archery/v_Archery_g01_c01.avi 1\r\n")
    (tmp_path / "classInd.txt").write_bytes(b"1 Archery\r\n2 Surfing\r\n")
    options = ("ucf101", "--videos", "videos", "--list", "list.txt", "--classes", "classInd.txt", "--out", "out")
    assert run(tmp_path, *options, *SMALL)[0] == 0
    index = ShardIndex.open(tmp_path / "out")
    assert index.labels.names == ("Archery", "Surfing")
    assert index.keys == ("v_Archery_g01_c01",)
    (tmp_path / "list.txt").write_bytes(b"Archery/v_Archery_g01_c01.avi 2\r\n")
    code, _, err = run(tmp_path, *options, *SMALL)
    assert code == 2
    assert err.startswith("error: list.txt:1: label 2 does not agree")


def test_failed_clips_give_exit_code_3(tmp_path: Path) -> None:
    class_folder(tmp_path / "videos")
    text_as_video(tmp_path / "videos" / "a" / "clip1.mp4")
    code, out, _ = run(tmp_path, "folder", "--videos", "videos", "--out", "out", *SMALL)
    assert code == 3
    assert "1 of 6 clips failed, see out/failed.jsonl" in out
    assert len(ShardIndex.open(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--videos", "none"), "error: none: is not a folder"),
        (("--videos", "videos", "--frames", "0"), "error: frames = 0: must be"),
        (("--videos", "videos", "--workers", "-1"), "error: workers = -1: must be"),
        (("--videos", "videos", "--test-fraction", "2", "--split", "test"), "error: test_fraction = 2.0"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    class_folder(tmp_path / "videos", per_class=1)
    code, _, err = run(tmp_path, "folder", "--out", "out", *options)
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_finished_data_set_is_refused_then_overwritten(tmp_path: Path) -> None:
    class_folder(tmp_path / "videos", per_class=1)
    options = ("folder", "--videos", "videos", "--out", "out", *SMALL)
    assert run(tmp_path, *options)[0] == 0
    code, _, err = run(tmp_path, *options)
    assert (code, "already holds a finished data set" in err, "--overwrite" in err) == (2, True, True)
    assert run(tmp_path, *options, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_interrupted_run_leaves_no_index_and_no_process(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    class_folder(tmp_path / "videos", classes=("a",), per_class=1)
    for i in range(1000):  # seconds of work
        os.link(tmp_path / "videos" / "a" / "clip0.mp4", tmp_path / "videos" / "a" / f"more{i}.mp4")
    options = ("folder", "--videos", "videos", "--out", "out", *SMALL, "--samples-per-shard", "8")
    process = start(tmp_path, *options)
    until = time.monotonic() + 60
    while not (tmp_path / "out" / "shard-000000.tar").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "index.json").exists()
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    for i in range(990):
        (tmp_path / "videos" / "a" / f"more{i}.mp4").unlink()
    assert run(tmp_path, *options)[0] == 0
    assert len(ShardIndex.open(tmp_path / "out")) == 11
    assert len(list((tmp_path / "out").iterdir())) == 3  # two shards and the index, nothing of the first run
