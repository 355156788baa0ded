"""tools/make_shards.py as users start it: a process of its own, from another folder."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.clips import class_folder, text_as_video, video
from vidcls.data.index import ShardIndex
from vidcls.data.settings import DecodeSettings
from vidcls.data.shards import ShardReader

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
    assert re.search(r"train: 6 clips in 1 shards, 0\.\d MB; decoded by .*(decord|pyav) \d", out)
    index = ShardIndex.open(tmp_path / "train")
    assert index.settings == DecodeSettings(frames=4, short_side=32)
    assert ShardReader(index).read(0).about.source.startswith("a/clip")


def test_ucf101(tmp_path: Path) -> None:
    video(tmp_path / "videos" / "Archery" / "v_Archery_g01_c01.avi", codec="mpeg4")
    (tmp_path / "list.txt").write_bytes(b"Archery/v_Archery_g01_c01.avi 1\r\n")
    (tmp_path / "classInd.txt").write_bytes(b"1 Archery\r\n2 Surfing\r\n")
    options = ("ucf101", "--videos", "videos", "--list", "list.txt", "--classes", "classInd.txt", "--out", "out")
    assert run(tmp_path, *options, *SMALL)[0] == 0
    index = ShardIndex.open(tmp_path / "out")
    assert index.labels.names == ("Archery", "Surfing")
    assert list(index.keys) == ["v_Archery_g01_c01"]
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


@pytest.mark.launch
def test_finished_data_set_is_left_alone_and_another_refused(tmp_path: Path) -> None:
    class_folder(tmp_path / "videos", per_class=1)
    options = ("folder", "--videos", "videos", "--out", "out", *SMALL)
    assert run(tmp_path, *options)[0] == 0
    code, out, _ = run(tmp_path, *options)
    assert (code, "2 clips were there already" in out) == (0, True)
    code, _, err = run(tmp_path, *options, "--quality", "50")
    assert (code, "already holds another finished data set" in err, "--overwrite" in err) == (2, True, True)
    assert run(tmp_path, *options, "--quality", "50", "--overwrite")[0] == 0


def test_what_is_stored_can_be_chosen(tmp_path: Path) -> None:
    class_folder(tmp_path / "videos", per_class=1)
    (tmp_path / "prompts.txt").write_text("<video>What? <ACTION>\n\n# a comment\n<video>Which action? <ACTION>\n")
    options = ("--fps", "4", "--max-frames", "6", "--max-pixels", "3200", "--codec", "png", "--prompts", "prompts.txt")
    code, _, err = run(tmp_path, "folder", "--videos", "videos", "--out", "out", "--workers", "0", *options)
    assert (code, err) == (0, "")
    index = ShardIndex.open(tmp_path / "out")
    assert (index.frames.tolist(), index.height.tolist(), index.width.tolist()) == ([6, 6], [56, 56], [56, 56])
    assert {index.prompt_of(i) for i in range(2)} <= {"<video>What? <ACTION>", "<video>Which action? <ACTION>"}
    assert index.settings.codec == "png"


def many_clips(folder: Path, clips: int) -> None:
    """A class of `clips` clips, all of them one file."""
    class_folder(folder, classes=("a",), per_class=1)
    for i in range(clips - 1):
        os.link(folder / "a" / "clip0.mp4", folder / "a" / f"more{i}.mp4")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.launch
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_no_process_and_goes_on(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    many_clips(tmp_path / "videos", 300)
    options = ("folder", "--videos", "videos", "--out", "out", *SMALL, "--samples-per-shard", "8")
    process = start(tmp_path, *options)
    until = time.monotonic() + 60
    while not (tmp_path / "out" / "part-000000.json").exists():
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
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    code, out, _ = run(tmp_path, *options)
    assert code == 0
    there = re.search(r"(\d+) clips were there already", out)
    assert there
    assert int(there[1]) >= 8
    assert len(ShardIndex.open(tmp_path / "out")) == 300


@pytest.mark.launch
def test_killed_at_random_points_it_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL again and again, until a run gets through: at first while it starts, then later."""
    many_clips(tmp_path / "videos", 240)
    text_as_video(tmp_path / "videos" / "a" / "broken.mp4")
    options = ("folder", "--videos", "videos", *SMALL, "--samples-per-shard", "8")
    draw = random.Random()
    kills = 0
    while True:
        process = start(tmp_path, *options, "--out", "out")
        try:
            process.communicate(timeout=draw.uniform(0.2, 0.9) if kills < 2 else draw.uniform(0.8, 2.5))
            break
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.communicate()
            kills += 1
            assert psutil.wait_procs(children, timeout=20)[1] == []
        assert kills < 60
    assert process.returncode == 0
    assert kills >= 2
    assert run(tmp_path, *options, "--out", "whole")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.launch
def test_full_disk_is_one_line_and_can_be_gone_on_from(tmp_path: Path) -> None:
    """A real file system of 300 KB, private to the command and to what copies the half-made folder out of it."""
    many_clips(tmp_path / "videos", 40)
    options = ["folder", "--videos", "videos", "--out", "out", *SMALL, "--samples-per-shard", "4"]
    (tmp_path / "out").mkdir()
    command = " ".join(map(shlex.quote, [sys.executable, str(TOOL), *options]))
    script = f"mount -t tmpfs -o size=300k tmpfs out && {{ {command}; code=$?; cp -r out saved; exit $code; }}"
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, timeout=120
    )
    if not (tmp_path / "saved").exists():
        pytest.skip(f"no private file system can be mounted here: {done.stderr.decode()[:200]}")
    assert (done.returncode, done.stderr.decode()) == (
        2,
        "error: out: the disk is full; make space, then the same command goes on where it was\n",
    )
    saved = contents(tmp_path / "saved")
    assert "part-000000.json" in saved
    assert not [name for name in saved if name.endswith(".tmp")]
    (tmp_path / "out").rmdir()
    (tmp_path / "saved").rename(tmp_path / "out")
    code, out, _ = run(tmp_path, *options)
    assert (code, "clips were there already" in out) == (0, True)
    assert run(tmp_path, *["whole" if word == "out" else word for word in options])[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.launch
def test_mpi_ranks_write_one_data_set(tmp_path: Path) -> None:
    """Killed in the middle and started again with another number of ranks, as the same command alone would."""
    many_clips(tmp_path / "videos", 120)
    text_as_video(tmp_path / "videos" / "a" / "broken.mp4")
    options = ["folder", "--videos", "videos", "--frames", "4", "--short-side", "32", "--samples-per-shard", "8"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(TOOL.parents[1]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }

    def mpirun(ranks: int, *more: str) -> subprocess.Popen:
        mpirun = Path(sys.executable).parent / "mpirun"
        words = [mpirun, "-n", ranks, "--bind-to", "none", "--oversubscribe", sys.executable, TOOL, *options, *more]
        return subprocess.Popen(
            [str(word) for word in words],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    process = mpirun(3, "--workers", "1", "--out", "out")
    until = time.monotonic() + 60
    while not (tmp_path / "out" / "part-000003.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    rank = next(p for p in psutil.Process(process.pid).children(recursive=True) if str(TOOL) in p.cmdline())
    everything = psutil.Process(process.pid).children(recursive=True)
    rank.kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert psutil.wait_procs(everything, timeout=20)[1] == []
    assert not (tmp_path / "out" / "index.json").exists()
    process = mpirun(2, "--workers", "1", "--out", "out")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "1 workers in each of 2 processes" in out
    assert "clips were there already" in out
    assert run(tmp_path, *options, "--out", "whole")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    process = mpirun(2, "--workers", "1", "--out", "out", "--quality", "50")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("already holds another finished data set") == 1
