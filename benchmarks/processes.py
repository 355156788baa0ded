"""The processes of a run that a benchmark starts: their memory, their ranks, their end."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
DEEPSPEED = Path(sys.executable).parent / "deepspeed"


def tool(name: str, *words: object) -> None:
    """Run one of tools/; CalledProcessError when it fails, after it has said why."""
    subprocess.run([sys.executable, ROOT / "tools" / name, *map(str, words)], cwd=ROOT, check=True)


def motion_shards(
    work: Path,
    *,
    per_class: int,
    frames: int,
    size: int,
    codec: str = "jpg",
    video_frames: int = 24,
    video_size: int | None = None,
) -> Path:
    """Shards of synthetic clips of four classes below `work`, made only if it does not hold them yet.

    Args:
        frames, size, codec: of a stored clip. video_frames, video_size: of the videos it is cut from (default: as
            large).
    """
    shards = work / "shards"
    if not shards.exists():
        shutil.rmtree(work / "videos", ignore_errors=True)
        video = ("--per-class", per_class, "--frames", video_frames, "--size", video_size or size)
        tool("make_motion_clips.py", "--out", work / "videos", *video)
        settings = ("--frames", frames, "--short-side", size, "--codec", codec, "--workers", 0)
        tool("make_shards.py", "folder", "--videos", work / "videos", "--out", shards, *settings)
    return shards


def logged_rows(output_dir: Path) -> list[dict]:
    """The whole rows of a run's train_log.jsonl up to now."""
    with contextlib.suppress(OSError):
        lines = (output_dir / "train_log.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    return []


@contextlib.contextmanager
def session(command: Sequence[object], log: Path, **environment: str) -> Iterator[psutil.Popen]:
    """A command that leads a session of its own, its output in `log`; nothing of the session is left behind."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what was started, too
    words = [str(word) for word in command]
    with log.open("w") as file:
        leader = psutil.Popen(
            words,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        yield leader
    finally:
        end_session(leader.pid)


def launch_words(ranks: int, words: Sequence[object], script: str = "launch/train.py") -> list[object]:
    """`script` with `words` on `ranks` ranks."""
    return [DEEPSPEED, "--num_gpus", ranks, "--master_port", free_port(), script, *words]


@contextlib.contextmanager
def launched(ranks: int, words: Sequence[object], log: Path, script: str = "launch/train.py") -> Iterator[psutil.Popen]:
    """`script` with `words` on `ranks` ranks, its output in `log`; nothing of its session is left behind."""
    with session(launch_words(ranks, words, script), log) as launcher:
        yield launcher


def ranks_below(launcher: psutil.Process) -> list[psutil.Process]:
    """The training processes: the launcher's descendants with the argument that only ranks get."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in launcher.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(word.startswith("--local_rank=") for word in process.cmdline()):
                    found.append(process)
    return found


def kilobytes(path: Path) -> dict[str, int]:
    """The `Name: 123 kB` lines of a file in /proc, in bytes."""
    fields = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if len(words) == 3 and words[2] == "kB"}


def end_session(session: int) -> None:
    """Kill what is left of the session that the launcher leads."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
