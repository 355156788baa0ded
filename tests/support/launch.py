"""Run the public commands as a user would: the real deepspeed launcher, real processes, hard time limits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
DEEPSPEED = Path(PYTHON).parent / "deepspeed"


@dataclass(frozen=True)
class Finished:
    code: int
    output: str  # stdout and stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(words: list[object], *, log: Path) -> subprocess.Popen:
    """Start a command in a session of its own, from the repository's root, with one thread per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as output:
        return subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(words: list[object], *, log: Path, timeout: float = 240) -> Finished:
    """Run to the end; past `timeout` seconds everything it started is killed and the test fails."""
    process = start(words, log=log)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after {timeout} s:\n{log.read_text()[-4000:]}") from None
    finally:
        left = end_session(process.pid)
    assert not left, f"processes left behind: {left}\n{log.read_text()[-2000:]}"
    return Finished(code, log.read_text())


def deepspeed(ranks: int, script: str, *arguments: object, log: Path, timeout: float = 240) -> Finished:
    return run(launcher_words(ranks, script, *arguments), log=log, timeout=timeout)


def launcher_words(ranks: int, script: str, *arguments: object) -> list[object]:
    return [DEEPSPEED, "--num_gpus", ranks, "--master_port", free_port(), script, *arguments]


def session_processes(session: int) -> list[psutil.Process]:
    """The living processes of a session, which is what one `start` began."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def wait_until_gone(session: int, seconds: float) -> list[str]:
    """Wait for a session to empty; the command lines of what is still there after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := session_processes(session)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [" ".join(process.cmdline()) for process in left]


def end_session(session: int) -> list[str]:
    """Give a session 10 s to end by itself, then kill what is left by its ids and name it."""
    left = wait_until_gone(session, 10)
    for process in session_processes(session):
        process.send_signal(signal.SIGKILL)
    return left


def shared_buffers() -> set[str]:
    """DeepSpeed's buffers in /dev/shm."""
    return {path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")}
